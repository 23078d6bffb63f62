// The two products whose results need no pass: scores become weights, and dP becomes dS, beside the next
// tile's products where a panel is full (sweep.h), else as each tile is finished. Only for tiles with no
// mask, bias or dropout: the others store the products and pass over them.
#pragma once

#include <type_traits>

#include "backward_tile.h"
#include "few_queries.h"
#include "prefetch.h"
#include "sweep.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class V, int rows, class F>
INLINE void visit_rows(long count, long row, F& visit) {
  if constexpr (rows > 0) {
    if (count == rows)
      visit(std::integral_constant<int, rows>(), row);
    else
      visit_rows<V, rows - 1>(count, row, visit);
  }
}

// Calls visit(std::integral_constant<int, n>(), first row) for tiles of n rows that cover `rows`, cut as
// gemm() cuts them.
template <class V, class F>
INLINE void for_each_row_tile(long rows, F visit) {
  constexpr int full = V::tile_rows;
  long row = 0;
  for (; rows - row >= 2 * full || rows - row == full; row += full)
    visit(std::integral_constant<int, full>(), row);
  while (row < rows) {
    const long left = rows - row, count = left > full ? (left + 1) / 2 : left;
    visit_rows<V, full>(count, row, visit);
    row += count;
  }
}

template <class V, int rows, int vectors, class A>
INLINE void panel_product(typename V::vector (&sum)[rows][vectors], A a, const typename V::element* panel,
                          long depth) {
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = V::zero();
  multiply<V, rows, vectors>(sum, a, panel, panel_width<V>, depth);
}

// weights[keys][vectors of the panel] = exp2(factor (A B - reference) + shift), of references that are not
// all 0.
template <class V, int vectors, bool has_references, class A>
void weights_product(long keys, A a, const typename V::element* panel, long depth,
                     const typename V::scalar* reference, const typename V::scalar* shift,
                     typename V::scalar factor, Block<typename V::scalar> weights) {
  constexpr int degree = V::depth == 2 ? 3 : 5;
  for_each_row_tile<V>(keys, [&](auto count, long row) {
    constexpr int rows = decltype(count)::value;
    typename V::vector sum[rows][vectors];
    panel_product<V>(sum, a.rows_from(row), panel, depth);
    UNROLL for (int i = 0; i < rows; i++) {
      UNROLL for (int j = 0; j < vectors; j++) {
        if constexpr (has_references) sum[i][j] = V::sub(sum[i][j], V::load(reference + j * V::lanes));
        sum[i][j] = V::fused(sum[i][j], V::set1(factor), V::load(shift + j * V::lanes));
      }
      V::template exp2_each<degree>(sum[i]);
      UNROLL for (int j = 0; j < vectors; j++) V::store(weights.row(row + i) + j * V::lanes, sum[i][j]);
    }
  });
}

// The same for queries whose scores Decode has summed.
template <class V, bool has_references>
void few_weights_product(long queries, long keys, DepthContiguous<typename V::element> a,
                         const typename V::element* panel, long depth, const typename V::scalar* reference,
                         const typename V::scalar* shift, typename V::scalar factor,
                         Block<typename V::scalar> weights) {
  few_queries_product<V>(
      queries, keys, a, panel, panel_width<V>, depth, [&](long key, long q, typename V::vector x) {
        if constexpr (has_references) x = V::sub(x, V::load(reference + q));
        V::store(weights.row(key) + q, V::template exp2<5>(V::fused(x, V::set1(factor), V::load(shift + q))));
      });
}

// gradients[keys][vectors of the panel] = weights * (A B - delta).
template <class V, int vectors, class A>
void gradients_product(long keys, A a, const typename V::element* panel, long depth,
                       const typename V::scalar* delta, Block<typename V::scalar> weights,
                       Block<typename V::scalar> gradients) {
  for_each_row_tile<V>(keys, [&](auto count, long row) {
    constexpr int rows = decltype(count)::value;
    typename V::vector sum[rows][vectors];
    panel_product<V>(sum, a.rows_from(row), panel, depth);
    UNROLL for (int i = 0; i < rows; i++) {
      UNROLL for (int j = 0; j < vectors; j++) {
        const typename V::vector weight = V::load(weights.row(row + i) + j * V::lanes);
        V::store(gradients.row(row + i) + j * V::lanes,
                 V::mul(weight, V::sub(sum[i][j], V::load(delta + j * V::lanes))));
      }
    }
  });
}

// The same two for whole panels and tiles, as a sweep's work. The weights' sweeps fetch what comes next.
template <class V, bool has_references>
struct WeightsWork {
  using S = typename V::scalar;
  static constexpr bool takes_part_tiles = false;
  static constexpr int degree = V::depth == 2 ? 3 : 5;
  const S *reference, *shift;
  const S factor;
  const Block<S> weights;
  Upcoming& next;

  INLINE bool begin(const S*) { return true; }
  INLINE void between() { next.fetch_some(); }
  template <int n>
  INLINE void unit(const S* product, long key, int at) {
    typename V::vector x[n];
    UNROLL for (int i = 0; i < n; i++) {
      x[i] = V::load(product + i * Sweep<V>::width);
      if constexpr (has_references) x[i] = V::sub(x[i], V::load(reference + at));
      x[i] = V::fused(x[i], V::set1(factor), V::load(shift + at));
    }
    exp2_below_one<V, degree>(x);
    UNROLL for (int i = 0; i < n; i++) V::store(weights.row(key + i) + at, x[i]);
  }
};

// `Out` is where score gradients go: a Block, or GradientPairs.
template <class V, class Out>
struct GradientsWork {
  using S = typename V::scalar;
  static constexpr bool takes_part_tiles = false;
  const S* delta;
  const Block<S> weights;
  const Out out;

  INLINE bool begin(const S*) { return true; }
  INLINE void between() {}
  template <int n>
  INLINE void unit(const S* product, long key, int at) {
    typename V::vector weight[n], gradient[n];
    UNROLL for (int i = 0; i < n; i++) {
      weight[i] = V::load(weights.row(key + i) + at);
      gradient[i] = V::mul(weight[i], V::sub(V::load(product + i * Sweep<V>::width), V::load(delta + at)));
    }
    if constexpr (std::is_same_v<Out, Block<S>>) {
      UNROLL for (int i = 0; i < n; i++) V::store(out.row(key + i) + at, gradient[i]);
    } else {
      out.template store<V>(key, at, weight, gradient);
    }
  }
};

template <class V, class Work>
void sweep_panel(long keys, DepthContiguous<typename V::element> a, const typename V::element* panel,
                 long depth, Work work) {
  if constexpr (V::rows_beside_products > 0) Sweep<V>().run(keys, a, panel, depth, work);
}

// Calls visit(std::integral_constant<int, n>(), first column) for pieces of n vectors that cover `columns` of
// a panel: few queries do not pay for all of it.
template <class V, class F>
INLINE void for_each_piece(long columns, F visit) {
  constexpr long two = 2 * V::lanes;
  if (columns > panel_width<V> - V::lanes) return visit(std::integral_constant<int, V::tile_vectors>(), 0L);
  long first = 0;
  for (; columns - first > V::lanes; first += two) visit(std::integral_constant<int, 2>(), first);
  if (first < columns) visit(std::integral_constant<int, 1>(), first);
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
