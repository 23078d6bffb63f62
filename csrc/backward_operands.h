// The backward's passes over rows of operands and gradients: all that costs O(L D).
#pragma once

#include "gemm.h"
#include "pack.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Loads count (at most lanes) elements at p, zero past them.
template <class V, class T>
INLINE typename V::vector load_some(const T* p, long count) {
  return count >= V::lanes ? V::load(p) : V::load(p, count);
}
template <class V, class T>
INLINE void store_some(T* p, typename V::vector v, long count) {
  if (count >= V::lanes)
    V::store(p, v);
  else
    V::store(p, v, count);
}

template <class V, class T>
INLINE typename V::scalar first_of(const T* p) {
  typename V::scalar values[V::lanes];
  V::store(values, V::load(p, 1));
  return values[0];
}

template <class V, class T>
INLINE typename V::scalar dot(const T* a, const T* b, long count) {
  typename V::vector sum = V::zero();
  for (long c = 0; c < count; c += V::lanes)
    sum = V::fma(load_some<V>(a + c, count - c), load_some<V>(b + c, count - c), sum);
  return V::sum(sum);
}

// The same of rows before they were narrowed.
template <class V, class T>
INLINE typename V::scalar dot_unrounded(const T* a, const T* residual, const T* b, long count) {
  typename V::vector sum = V::zero();
  long c = 0;
  for (; c + V::lanes <= count; c += V::lanes)
    sum = V::fma(load_unrounded<V>(a + c, residual + c), V::load(b + c), sum);
  if (c < count)
    sum = V::fma(load_unrounded<V>(a + c, residual + c, count - c), V::load(b + c, count - c), sum);
  return V::sum(sum);
}

template <class V, class T>
bool all_finite(const T* source, long stride, long rows, long columns) {
  typename V::vector zeros = V::zero();  // 0 * x is NaN for a NaN or infinite x
  for (long r = 0; r < rows; r++)
    for (long c = 0; c < columns; c += V::lanes)
      zeros = V::fma(load_some<V>(source + r * stride + c, columns - c), V::zero(), zeros);
  return V::sum(zeros) == 0;
}

// panel[ceil(columns / depth)][panel width] = transpose of rows [count][columns], times `factor` where
// elements are single values; lanes past the last row are 0.
template <class V, class T>
void pack_panel(const T* rows, long stride, long count, long columns,
                [[maybe_unused]] typename V::scalar factor, typename V::element* panel) {
  constexpr long width = V::tile_vectors * V::lanes;
  if (count < width) memset(panel, 0, sizeof(*panel) * width * ceil_div(columns, V::depth));
#ifdef FASTATTN_BF16_DOT
  if constexpr (V::depth == 2)
    pack_pairs_transposed(rows, stride, count, columns, panel);
  else
#endif
    pack_transposed<V>(rows, stride, count, columns, factor, panel);
}

#ifdef FASTATTN_BF16_DOT
// Pairs of consecutive columns: bf16 [rows][columns] -> uint32 [rows][pairs], zero past the columns.
inline void pair_columns(const bf16* source, long stride, long rows, long columns, uint32_t* out,
                         long pairs) {
  for (long r = 0; r < rows; r++) {
    memset(out + r * pairs, 0, sizeof(uint32_t) * pairs);
    memcpy(out + r * pairs, source + r * stride, sizeof(bf16) * columns);
  }
}
#endif

// Rows [count][columns] as a product reads them along their columns: where they are, or widened or paired in
// `copy` [count][ceil(columns / depth)].
template <class V, class T>
constexpr bool reads_in_place = V::depth == 1 && sizeof(T) == sizeof(typename V::element);
template <class V, class T>
DepthContiguous<typename V::element> rows_as_read(const T* rows, long stride, long count, long columns,
                                                  [[maybe_unused]] typename V::element* copy) {
  if constexpr (reads_in_place<V, T>) {
    return {rows, stride};
  } else {
    const long elements = ceil_div(columns, V::depth);
#ifdef FASTATTN_BF16_DOT
    if constexpr (V::depth == 2)
      pair_columns(rows, stride, count, columns, copy, elements);
    else
#endif
      copy_widened<V>(rows, stride, count, columns, copy, elements);
    return {copy, elements};
  }
}

// factor * sum, narrowed: scalar [rows][columns_padded] -> T [rows][columns].
template <class V, class T>
void write_rows(const typename V::scalar* sum, long columns_padded, long rows, long columns,
                typename V::scalar factor, T* out, long stride) {
  for (long r = 0; r < rows; r++)
    for (long c = 0; c < columns; c += V::lanes)
      store_some<V>(out + r * stride + c, V::mul(V::load(sum + r * columns_padded + c), V::set1(factor)),
                    columns - c);
}

// sum[count] += part, in whole vectors.
template <class V>
void add_to(typename V::scalar* sum, const typename V::scalar* part, long count) {
  for (long i = 0; i < count; i += V::lanes) V::store(sum + i, V::add(V::load(sum + i), V::load(part + i)));
}

template <class T>
void zero_rows(T* out, long stride, long rows, long columns) {
  for (long r = 0; r < rows; r++) memset(static_cast<void*>(out + r * stride), 0, sizeof(T) * columns);
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
