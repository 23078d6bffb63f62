// The parts of the kernels, each alone on operands of the size and residence it meets in a call: blocks of
// K, V, Q and dO stream through, panels and score blocks stay in the L1 cache.
#pragma once

#include "../backward_products.h"
#include "../forward.h"
#include "../probe.h"
#include "part_list.h"

namespace fastattn {

namespace FASTATTN_ISA_NAMESPACE {

constexpr long bench_length = 1024, bench_dim = 64, bench_keys = 256;

// Zeros suit: timing depends on no value, and nothing overflows.
template <class V>
struct Operands {
  using S = typename V::scalar;
  using E = typename V::element;
  static constexpr int width = V::lanes * V::tile_vectors;
  AlignedBuffer rows{bench_length * bench_dim * sizeof(E)}, panel{bench_dim * width * sizeof(E)};
  AlignedBuffer scores{bench_keys * width * sizeof(S)}, sums{bench_length * bench_dim * sizeof(S)};
  Operands() {
    memset(rows.data(), 0, bench_length * bench_dim * sizeof(E));
    memset(panel.data(), 0, bench_dim * width * sizeof(E));
    memset(scores.data(), 0, bench_keys * width * sizeof(S));
    memset(sums.data(), 0, bench_length * bench_dim * sizeof(S));
  }
  static Operands& get() {
    static Operands operands;
    return operands;
  }
  E* block(long first) { return static_cast<E*>(rows.data()) + first * bench_dim / V::depth; }
  E* panel_data() { return static_cast<E*>(panel.data()); }
  S* score_data() { return static_cast<S*>(scores.data()); }
  E* weight_data() { return static_cast<E*>(scores.data()); }
  S* sum_data() { return static_cast<S*>(sums.data()); }
};

// S^T = K Q^T, and in the backward also dP^T = V dO^T: rows of a streaming block against a panel.
template <class V>
double scores_part() {
  auto& o = Operands<V>::get();
  for (long k = 0; k < bench_length; k += bench_keys)
    gemm_columns<V, Store>(V::tile_vectors, bench_keys,
                           DepthContiguous<typename V::element>{o.block(k), bench_dim / V::depth},
                           o.panel_data(), o.width, bench_dim / V::depth, o.score_data(), o.width);
  return 2.0 * bench_length * bench_dim * o.width;
}

template <class V, int degree>
double softmax_part() {
  auto& o = Operands<V>::get();
  for (long k = 0; k < bench_length; k += bench_keys)
    for (int j = 0; j < V::tile_vectors; j++) {
      typename V::vector sums[V::depth] = {};
      exponentiate<V, degree>(o.score_data() + j * V::lanes, bench_keys, 1, V::zero(), nullptr, sums);
      V::store(o.sum_data() + j * V::lanes, sums[0]);
    }
  return 2.0 * bench_length * o.width;
}

// O^T += V^T P^T: columns of a streaming block against the weights.
template <class V>
double output_part() {
  auto& o = Operands<V>::get();
  long depth[V::tile_vectors];
  for (long& d : depth) d = bench_keys / V::depth;
  for (long k = 0; k < bench_length; k += bench_keys)
    gemm_columns<V, AccumulateStairs>(V::tile_vectors, bench_dim,
                                      RowsContiguous<typename V::element>{o.block(k), bench_dim},
                                      o.weight_data(), o.width, depth, o.sum_data(), o.width);
  return 2.0 * bench_length * bench_dim * o.width;
}

// S^T and P^T, in one sweep where the instruction set has that.
template <class V, int degree>
double sweep_part() {
  if constexpr (V::rows_beside_products == 0) {
    softmax_part<V, degree>();
    return scores_part<V>();
  } else {
    auto& o = Operands<V>::get();
    using E = typename V::element;
    alignas(64) typename V::scalar reference[Operands<V>::width] = {}, sums[V::depth * Operands<V>::width];
    Ahead ahead;
    for (long k = 0; k < bench_length; k += bench_keys) {
      WeightSweep<V, degree, false> sweep(o.weight_data(), 1, sums, {nullptr, nullptr}, ahead);
      sweep.run(bench_keys, DepthContiguous<E>{o.block(k), bench_dim / V::depth}, o.panel_data(),
                bench_dim / V::depth, reference, true);
    }
    return 2.0 * bench_length * bench_dim * o.width;
  }
}

// The backward's first two products, with what becomes of them beside the next tile's or, without sweeps, in
// the same registers: P = exp2(S - lse) and dS = P (dP - delta).
template <class V>
double weights_part() {
  auto& o = Operands<V>::get();
  using E = typename V::element;
  constexpr long keys = bench_keys / V::tile_rows * V::tile_rows, depth = bench_dim / V::depth;
  const Block<typename V::scalar> weights{o.score_data(), o.width};
  Upcoming nothing;
  for (long k = 0; k < bench_length; k += bench_keys) {
    const DepthContiguous<E> rows{o.block(k), depth};
    if (Sweep<V>::fits(keys, depth))
      sweep_panel<V>(keys, rows, o.panel_data(), depth,
                     WeightsWork<V, false>{o.sum_data(), o.sum_data(), 1, weights, nothing});
    else
      weights_product<V, V::tile_vectors, false>(keys, rows, o.panel_data(), depth, o.sum_data(),
                                                 o.sum_data(), 1, weights);
  }
  return 2.0 * bench_length / bench_keys * keys * bench_dim * o.width;
}
template <class V>
double score_gradients_part() {
  auto& o = Operands<V>::get();
  using E = typename V::element;
  using Out = Block<typename V::scalar>;
  constexpr long keys = bench_keys / V::tile_rows * V::tile_rows, depth = bench_dim / V::depth;
  const Out weights{o.score_data(), o.width};
  for (long k = 0; k < bench_length; k += bench_keys) {
    const DepthContiguous<E> rows{o.block(k), depth};
    if (Sweep<V>::fits(keys, depth))
      sweep_panel<V>(keys, rows, o.panel_data(), depth,
                     GradientsWork<V, Out>{o.sum_data(), weights, weights});
    else
      gradients_product<V, V::tile_vectors>(keys, rows, o.panel_data(), depth, o.sum_data(), weights,
                                            weights);
  }
  return 2.0 * bench_length / bench_keys * keys * bench_dim * o.width;
}

// dV += P^T dO and dK += dS^T Q: rows of weights against rows of a block; head dimension across the lanes.
template <class V>
double key_gradient_part() {
  auto& o = Operands<V>::get();
  constexpr int width = Operands<V>::width;
  for (long q = 0; q < bench_length; q += width)
    for (long d = 0; d < bench_dim; d += width < bench_dim ? width : bench_dim)
      gemm_columns<V, Accumulate>(V::tile_vectors, bench_keys,
                                  DepthContiguous<typename V::element>{o.weight_data(), width / V::depth},
                                  o.block(q) + d, bench_dim, width / V::depth, o.sum_data() + d, bench_dim);
  return 2.0 * bench_length * bench_dim * bench_keys;
}

// dQ += dS K: columns of weights against rows of a streaming block.
template <class V>
double query_gradient_part() {
  auto& o = Operands<V>::get();
  constexpr int width = Operands<V>::width;
  for (long k = 0; k < bench_length; k += bench_keys)
    for (long d = 0; d < bench_dim; d += width < bench_dim ? width : bench_dim)
      gemm_columns<V, Accumulate>(V::tile_vectors, width,
                                  RowsContiguous<typename V::element>{o.weight_data(), width}, o.block(k) + d,
                                  bench_dim, bench_keys / V::depth, o.sum_data() + d, bench_dim);
  return 2.0 * bench_length * bench_dim * width;
}

template <class V>
double probe_part() {
  return multiply_add_probe<V>(1, 20000);
}

template <class V, int degree>
constexpr Part all_parts[] = {
    {"S = Q K^T  (and dP = dO V^T)", scores_part<V>},
    {"exp and row sums", softmax_part<V, degree>},
    {"S, P and row sums, as in a call", sweep_part<V, degree>},
    {"O = P V", output_part<V>},
    {"S and P = exp(S - lse)", weights_part<V>},
    {"dP and dS = P (dP - delta)", score_gradients_part<V>},
    {"dV = P^T dO (and dK = dS^T Q)", key_gradient_part<V>},
    {"dQ = dS K", query_gradient_part<V>},
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
