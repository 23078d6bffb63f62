// Which calls Decode answers, and their scores as the backward recomputes them.
//
// Weights add up to one, and to the forward's output, only if scores are rounded as those that the lse and
// the output came of: a score of some hundreds is coarse. Decode has lanes along the head dimension, each
// with a sum of its own, and adds those by halves. Here queries lie across the lanes, and the same sums are
// taken in the same order: the scores have the same bits.
#pragma once

#include "gemm.h"
#include "softmax.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// So few that lanes along the queries would mostly idle. Six also where these are not as few: a sum in many
// lanes keeps more digits than one in sequence, as naive attention's do for so few.
template <class V>
constexpr long most_few = max(V::lanes / 2, 6);
template <class V>
INLINE bool is_few(long queries) {
  return queries <= most_few<V>;
}

// sum[i] = A(i, k) B(k) over k = first, first + step, ..., in the order of Decode.
template <class V, int rows, int first = 0, int step = 1>
INLINE void multiply_by_lanes(typename V::vector (&sum)[rows], DepthContiguous<typename V::element> a,
                              const typename V::element* b, long b_stride, long depth) {
  if constexpr (step == V::lanes) {
    UNROLL for (int i = 0; i < rows; i++) sum[i] = V::zero();
    for (long k = first; k < depth; k += step) {
      const auto x = V::load(b + k * b_stride);
      UNROLL for (int i = 0; i < rows; i++) sum[i] =
          V::fma(V::broadcast(a.data + i * a.stride + k), x, sum[i]);
    }
  } else {
    typename V::vector other[rows];
    multiply_by_lanes<V, rows, first, 2 * step>(sum, a, b, b_stride, depth);
    multiply_by_lanes<V, rows, first + step, 2 * step>(other, a, b, b_stride, depth);
    UNROLL for (int i = 0; i < rows; i++) sum[i] = V::add(sum[i], other[i]);
  }
}

// Calls finish(row, column, products) for each row of A [rows][depth] times each vector of B
// [depth][queries].
template <class V, class Finish>
INLINE void few_queries_product(long queries, long rows, DepthContiguous<typename V::element> a,
                                const typename V::element* b, long b_stride, long depth, Finish finish) {
  const auto tile = [&](auto count, long row) {
    constexpr int n = decltype(count)::value;
    for (long q = 0; q < queries; q += V::lanes) {
      typename V::vector sum[n];
      multiply_by_lanes<V, n>(sum, a.rows_from(row), b + q, b_stride, depth);
      UNROLL for (int i = 0; i < n; i++) finish(row + i, q, sum[i]);
    }
  };
  constexpr int several = V::tile_rows;
  long row = 0;
  for (; row + several <= rows; row += several) tile(std::integral_constant<int, several>(), row);
  for (; row < rows; row++) tile(std::integral_constant<int, 1>(), row);
}

// C [rows][queries] = A B, likewise.
template <class V>
INLINE void few_queries_scores(long queries, long rows, DepthContiguous<typename V::element> a,
                               const typename V::element* b, long b_stride, long depth, typename V::scalar* c,
                               long c_stride) {
  few_queries_product<V>(
      queries, rows, a, b, b_stride, depth,
      [&](long row, long column, typename V::vector x) { V::store(c + row * c_stride + column, x); });
}

// Scores as the forward multiplies and adds them.
template <class V>
struct ForwardScores {
  using S = typename V::scalar;
  using E = typename V::element;
  const ScoreUnits<S> units;
  const S product_factor;  // takes products to log2 units where there is no bias
  const bool as_decoded;

  explicit ForwardScores(const Problem& problem)
      : units(problem.scale, problem.bias.data),
        product_factor(units.multiplier * units.factor),
        as_decoded(V::depth == 1 && is_few<V>(problem.queries)) {}

  // products [keys][width] = K times packed queries, in the first `columns` vectors.
  void multiply(int columns, long keys, DepthContiguous<E> key, const E* query, long depth,
                S* products) const {
    constexpr long width = V::tile_vectors * V::lanes;
    if constexpr (V::depth == 1)
      if (as_decoded)
        return few_queries_scores<V>(columns * V::lanes, keys, key, query, width, depth, products, width);
    gemm_columns<V, Store>(columns, keys, key, query, width, depth, products, width);
  }
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
