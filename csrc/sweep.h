// A product with the work on its results beside it: while one tile of C = A B is multiplied, the tile before
// it is turned into weights or gradients, a few vectors at a time between the multiply-adds.
//
// That work would take the multiply-add pipes for a sixteenth of a call at D = 64. Its additions, shifts and
// comparisons run on pipes that products leave idle, but only where an out-of-order core finds products
// beside them: in epilogues and passes of their own they are as slow as anything else.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

template <class V>
class Sweep {
  using S = typename V::scalar;
  using E = typename V::element;
  static constexpr int vectors = V::tile_vectors, rows = V::tile_rows;
  // A unit of work: as many rows of one vector as fit beside the accumulators, which stay in registers; a
  // pair where the products want pairs.
  static constexpr int unit_rows = max(1, V::rows_beside_products), units = rows / unit_rows * vectors;

 public:
  static constexpr int width = V::lanes * vectors;

  // Whether it can run: an instruction set with registers and pipes to spare, and a product long enough.
  static bool fits(long count, long depth) {
    return V::rows_beside_products > 0 && count >= rows && depth >= units;
  }
  // The rows that `run` covers where the work does not take tiles of fewer rows.
  static long whole_tiles(long count) { return count / rows * rows; }

  // How far down C each column of vectors is wanted: to `end` [vectors], which never decreases and ends with
  // the count of rows; all of them in the first `level` rows, at least one.
  struct Stairs {
    long level, end[vectors];
    INLINE int first_column(long row) const {
      int first = 0;
      while (end[first] <= row) first++;
      return first;
    }
  };

  // C [count][width] = A [count][depth] B [depth][width]. `work` has
  //
  //   bool begin(const S* product)          [tile_rows][width], the first tile; false ends the run at once
  //   void between()                        once a tile
  //   void unit<n>(const S* product, long row, int column)
  //                                         rows [row, row + n) from `column` on, one vector wide; n is
  //                                         unit_rows but for the last ones of an uneven count
  //   takes_part_tiles                      whether rows past the last whole tile are wanted too
  template <class Work>
  bool run(long count, DepthContiguous<E> a, const E* b, long depth, Work& work) {
    return choose_steps(depth,
                        [&](auto steps) { return run<decltype(steps)::value>(count, a, b, depth, work); });
  }

  // The same down stairs; in tiles that reach past the level rows `work` has `edge_unit` in the place of
  // `unit`.
  template <class Work>
  bool run(const Stairs& stairs, DepthContiguous<E> a, const E* b, long depth, Work& work) {
    return choose_steps(depth,
                        [&](auto steps) { return run<decltype(steps)::value>(stairs, a, b, depth, work); });
  }

 private:
  // Steps of depth between two units of work.
  template <class F>
  static bool choose_steps(long depth, F run) {
    if (depth >= 10 * units) return run(std::integral_constant<int, 10>());
    if (depth >= 5 * units) return run(std::integral_constant<int, 5>());
    if (depth >= 2 * units) return run(std::integral_constant<int, 2>());
    return run(std::integral_constant<int, 1>());
  }

  template <int steps, class Work>
  bool run(long count, DepthContiguous<E> a, const E* b, long depth, Work& work) {
    if (!level_tiles<steps>(count, a, b, depth, work)) return false;
    const long row = whole_tiles(count);
    long pending = row - rows, end = row;
    if constexpr (Work::takes_part_tiles) {
      end = count;
      if (row < count) {
        last_tile<rows - 1, steps>(count - row, a.rows_from(row), b, depth, row, work);
        pending = row;
      }
    }
    for (; pending < end; pending += unit_rows) {
      for (int j = 0; j < width; j += V::lanes) {
        if (!Work::takes_part_tiles || pending + unit_rows <= end)
          work.template unit<unit_rows>(products(pending) + j, pending, j);
        else if constexpr (Work::takes_part_tiles)
          work.template unit<1>(products(pending) + j, pending, j);
      }
    }
    return true;
  }

  template <int steps, class Work>
  bool run(const Stairs& stairs, DepthContiguous<E> a, const E* b, long depth, Work& work) {
    const long count = stairs.end[vectors - 1];
    if (!level_tiles<steps>(stairs.level, a, b, depth, work)) return false;
    long row = max<long>(rows, whole_tiles(stairs.level));
    const S* pending = products(row - rows);
    int first = 0;  // column of the pending tile
    for (; row < count; row += rows) {
      // The last tile repeats rows of the one before, instead of having fewer.
      const long from = min(row, count - rows);
      const int next = stairs.first_column(row);
      for (; first < next; first++)
        for (int i = 0; i < rows; i += unit_rows)
          work.template edge_unit<unit_rows>(pending + i * width + first * V::lanes, row - rows + i,
                                             first * V::lanes);
      edge_tile<0, steps>(first, a.rows_from(from), b, depth, pending, row, work);
      pending = products(row) + (row - from) * width;
    }
    for (row -= rows; row < count; row += unit_rows, pending += unit_rows * width)
      for (int j = first * V::lanes; j < width; j += V::lanes) {
        if (row + unit_rows <= count)
          work.template edge_unit<unit_rows>(pending + j, row, j);
        else
          work.template edge_unit<1>(pending + j, row, j);
      }
    return true;
  }

  // The whole tiles among the first `count` rows, or the first tile. Not inlined: one copy for all.
  template <int steps, class Work>
  __attribute__((noinline)) bool level_tiles(long count, DepthContiguous<E> a, const E* b, long depth,
                                             Work& work) {
    tile<rows, 0>(a, b, depth, 0, work);
    if (!work.begin(products(0))) return false;
    for (long row = rows; row + rows <= count; row += rows)
      tile<rows, steps>(a.rows_from(row), b, depth, row, work);
    return true;
  }

  // `count` rows from `row` on; with `steps`, the work on the tile before them on the way.
  template <int count, int steps, class Work>
  INLINE void tile(DepthContiguous<E> a, const E* b, long depth, long row, Work& work) {
    typename V::vector sum[count][vectors];
    UNROLL for (int i = 0; i < count; i++) UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = V::zero();
    long k = 0;
    if constexpr (steps > 0) {
      work.between();
      const S* source = products(row - rows);
      for (int i = 0; i < rows; i += unit_rows) {
        // Many steps are enough for a loop, and too much for the cache of instructions if unrolled further.
        if constexpr (steps < 10) {
          UNROLL for (int j = 0; j < vectors; j++)
              worked_steps<count, steps>(sum, a, b, depth, k, source, row, i, j, work);
        } else {
          _Pragma("GCC unroll 1") for (int j = 0; j < vectors; j++)
              worked_steps<count, steps>(sum, a, b, depth, k, source, row, i, j, work);
        }
        source += unit_rows * width;
      }
    }
    multiply<V, count, vectors>(sum, a.depth_from(k), b + k * width, width, depth - k);
    S* const out = products(row);
    UNROLL for (int i = 0; i < count; i++) UNROLL for (int j = 0; j < vectors; j++)
        V::store(out + i * width + j * V::lanes, sum[i][j]);
  }
  // Some steps of a tile's products, and unit (i, j) of the work on the tile before.
  template <int count, int steps, class Work>
  INLINE void worked_steps(typename V::vector (&sum)[count][vectors], DepthContiguous<E> a, const E* b,
                           long depth, long& k, const S* source, long row, int i, int j, Work& work) {
    multiply_steps<V, count, vectors, steps>(sum, a.depth_from(k), b + k * width, width);
    k += steps;
    work.template unit<unit_rows>(source + j * V::lanes, row - rows + i, j * V::lanes);
    fetch_ahead(a, depth, i, j);
  }
  template <int count, int steps, class Work>
  INLINE void last_tile(long left, DepthContiguous<E> a, const E* b, long depth, long row, Work& work) {
    if constexpr (count > 0) {
      if (left == count)
        tile<count, steps>(a, b, depth, row, work);
      else
        last_tile<count - 1, steps>(left, a, b, depth, row, work);
    }
  }

  // A tile of the columns from `first` on, to be found as the rows from `row` on, and the work on the
  // `pending` rows before them. It runs once or twice per panel: its code, loops where tile() is unrolled,
  // must not take tile()'s place in the level 1 cache for instructions.
  template <int column, int steps, class Work>
  INLINE void edge_tile(int first, DepthContiguous<E> a, const E* b, long depth, const S* pending, long row,
                        Work& work) {
    if constexpr (column + 1 < vectors)
      if (column < first) return edge_tile<column + 1, steps>(first, a, b, depth, pending, row, work);
    constexpr int steps_here = steps * vectors / (vectors - column);
    typename V::vector sum[rows][vectors];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = column; j < vectors; j++) sum[i][j] = V::zero();
    work.between();
    long k = 0;
    for (int i = 0; i < rows; i += unit_rows) {
      UNROLL for (int j = 0; j < vectors; j++) fetch_ahead(a, depth, i, j);
      _Pragma("GCC unroll 1") for (int j = column; j < vectors; j++) {
        multiply_steps<V, rows, vectors, steps_here, column>(sum, a.depth_from(k), b + k * width, width);
        k += steps_here;
        work.template edge_unit<unit_rows>(pending + i * width + j * V::lanes, row - rows + i, j * V::lanes);
      }
    }
    multiply<V, rows, vectors, column>(sum, a.depth_from(k), b + k * width, width, depth - k);
    S* const out = products(row);
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = column; j < vectors; j++)
        V::store(out + i * width + j * V::lanes, sum[i][j]);
  }

  // A unit's share of the rows of a tile to come. They lie in the level 2 cache, and the core's window is
  // taken by the work's chains: it sees a missing row too late.
  INLINE static void fetch_ahead(DepthContiguous<E> a, long depth, int i, int j) {
    constexpr int tiles_ahead = 3, parts = vectors / unit_rows;
    const long part = depth * static_cast<long>(sizeof(E)) / parts;
    const E* row = a.data + (tiles_ahead * rows + i + j / parts) * a.stride;
    const char* bytes = reinterpret_cast<const char*>(row) + j % parts * part;
    UNROLL for (int line = 0; line < 4; line++) if (line * 64 < part) __builtin_prefetch(bytes + line * 64);
  }

  INLINE S* products(long row) { return products_ + row % (2 * rows) * width; }

  alignas(64) S products_[2 * rows * width];  // of this tile and the one before it
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
