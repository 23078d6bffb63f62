// The ceilings that benchmarks compare with: multiply-adds on registers alone, and reading memory.
//
// Both only do the work; the caller times it.
#pragma once

#include "parallel.h"
#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// As many independent chains as the micro-kernel has accumulators. `values` holds probe_values<V> zeros
// that the compiler cannot know, and takes the result, so that no chain is folded, shared or dropped.
template <class V>
constexpr int probe_values = 2 * V::lanes + V::tile_rows * V::tile_vectors;

template <class V>
__attribute__((noinline)) void multiply_add_rounds(typename V::scalar* values, int64_t rounds) {
  constexpr int chains = V::tile_rows * V::tile_vectors;
  const typename V::vector x = V::load(values), y = V::load(values + V::lanes);
  typename V::vector sum[chains];
  UNROLL for (int i = 0; i < chains; i++) sum[i] = V::load(values + V::lanes + i);
  for (int64_t round = 0; round < rounds; round++) {
    UNROLL for (int i = 0; i < chains; i++) {
      if constexpr (V::depth == 1) {
        sum[i] = V::fma(sum[i], x, y);  // a product of constants would be hoisted where there is no FMA
      } else {
        sum[i] = V::multiply_add(x, y, sum[i]);
      }
    }
  }
  UNROLL for (int i = 1; i < chains; i++) sum[0] = V::add(sum[0], sum[i]);
  V::store(values, sum[0]);
}

// Runs `rounds` rounds for every thread, in pieces, so that a thread that starts late does not leave
// another's whole share to be waited for. Returns the floating-point operations done.
template <class V>
double multiply_add_probe(int threads, int64_t rounds) {
  using T = typename V::scalar;
  constexpr int64_t pieces = 64;
  rounds = ceil_div(rounds, pieces) * pieces;
  parallel_for(threads * pieces, threads, probe_values<V> * sizeof(T), [=](int64_t, void* scratch) {
    T* values = static_cast<T*>(scratch);
    for (int i = 0; i < probe_values<V>; i++) values[i] = 0;
    multiply_add_rounds<V>(values, rounds / pieces);
  });
  return 2.0 * V::depth * V::lanes * V::tile_rows * V::tile_vectors * rounds * threads;
}

// 16-bit floats run at fp32's rate but for bf16 where there is a dot product.
inline double probe_multiply_add(DType dtype, int threads, int64_t rounds) {
  if (dtype == DType::f64) return multiply_add_probe<F64>(threads, rounds);
#ifdef FASTATTN_BF16_DOT
  if (dtype == DType::bf16) return multiply_add_probe<BF16Pair>(threads, rounds);
#endif
  return multiply_add_probe<F32>(threads, rounds);
}

// Reads every whole block of `data` once, all threads together.
inline void probe_read(const float* data, int64_t count, int threads) {
  constexpr int streams = 8;
  constexpr int64_t block = 1 << 16;
  parallel_for(count / block, threads, F32::lanes * sizeof(float), [=](int64_t item, void* scratch) {
    const float* p = data + item * block;
    F32::vector sum[streams];
    UNROLL for (int i = 0; i < streams; i++) sum[i] = F32::zero();
    for (int64_t k = 0; k < block; k += streams * F32::lanes) {
      UNROLL for (int i = 0; i < streams; i++) sum[i] = F32::add(sum[i], F32::load(p + k + i * F32::lanes));
    }
    UNROLL for (int i = 1; i < streams; i++) sum[0] = F32::add(sum[0], sum[i]);
    F32::store(static_cast<float*>(scratch), sum[0]);
  });
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
