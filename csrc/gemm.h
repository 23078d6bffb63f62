// The one micro-kernel: C[rows, vectors] += A[rows, depth] B[depth, vectors].
//
// A is read one element at a time and broadcast, straight from memory in whatever layout it has; B is rows
// of contiguous vectors; C stays in registers. With 6 x 4 AVX-512 accumulators, a step is 24 multiply-adds
// (12 cycles on two ports) against 10 loads (5 cycles on two ports) and 36 of 48 issue slots, so only the
// multiply-adds bind. Broadcasts come from memory, which costs a load port and no arithmetic one.
#pragma once

#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// A stored with consecutive depth: A(i, k) = data[i * stride + k]. Scores (rows of K against Q^T), and
// rows of P^T and dS^T against dO and Q.
template <class E>
struct DepthContiguous {
  static constexpr bool strided_depth = false;
  const E* data;
  long stride;
  INLINE DepthContiguous rows_from(long row) const { return {data + row * stride, stride}; }
  INLINE DepthContiguous depth_from(long k) const { return {data + k, stride}; }
  template <int rows>
  struct Cursor {
    const E* row[rows];
    INLINE explicit Cursor(const DepthContiguous& a) {
      UNROLL for (int i = 0; i < rows; i++) row[i] = a.data + i * a.stride;
    }
    INLINE const E* at(int i, long k) const { return row[i] + k; }
  };
};

// A stored with consecutive rows: A(i, k) = data[k * stride + i]. Columns of V against P^T, and columns
// of dS^T against K.
template <class E>
struct RowsContiguous {
  static constexpr bool strided_depth = true;
  const E* data;
  long stride;
  INLINE RowsContiguous rows_from(long row) const { return {data + row, stride}; }
  INLINE RowsContiguous depth_from(long k) const { return {data + k * stride, stride}; }
  template <int rows>
  struct Cursor {
    const E* data;
    long stride;
    INLINE explicit Cursor(const RowsContiguous& a) : data(a.data), stride(a.stride) {}
    INLINE const E* at(int i, long k) const { return data + k * stride + i; }
  };
};

// Columns before `first` are left alone.
template <class V, int rows, int vectors, int first = 0, class A>
INLINE void multiply(typename V::vector (&c)[rows][vectors], A a, const typename V::element* b, long b_stride,
                     long depth) {
  const typename A::template Cursor<rows> cursor(a);
  const auto step = [&](long k) {
    typename V::vector column[vectors];
    UNROLL for (int j = first; j < vectors; j++) column[j] = V::load(b + k * b_stride + j * V::lanes);
    UNROLL for (int i = 0; i < rows; i++) {
      const typename V::vector x = V::broadcast(cursor.at(i, k));
      UNROLL for (int j = first; j < vectors; j++) c[i][j] = V::multiply_add(x, column[j], c[i][j]);
    }
  };
  // Where two strides advance, two steps share the loop's own instructions: issue slots are scarce.
  if constexpr (A::strided_depth)
    _Pragma("GCC unroll 2") for (long k = 0; k < depth; k++) step(k);
  else
    for (long k = 0; k < depth; k++) step(k);
}

// The same with a depth known at compile time, and no loop.
template <class V, int rows, int vectors, int depth, int first = 0, class A>
INLINE void multiply_steps(typename V::vector (&c)[rows][vectors], A a, const typename V::element* b,
                           long b_stride) {
  const typename A::template Cursor<rows> cursor(a);
  UNROLL for (int k = 0; k < depth; k++) {
    typename V::vector column[vectors];
    UNROLL for (int j = first; j < vectors; j++) column[j] = V::load(b + k * b_stride + j * V::lanes);
    UNROLL for (int i = 0; i < rows; i++) {
      const typename V::vector x = V::broadcast(cursor.at(i, k));
      UNROLL for (int j = first; j < vectors; j++) c[i][j] = V::multiply_add(x, column[j], c[i][j]);
    }
  }
}

// What becomes of a finished tile. Products are summed from zero and C is added at the end: a third of the
// rounding error of summing onto C, and no wait for C before the first product.
struct Store {
  static constexpr bool stairs = false;
  template <class V>
  INLINE static void apply(typename V::scalar* c, typename V::vector product) {
    V::store(c, product);
  }
};
struct Accumulate {
  static constexpr bool stairs = false;
  template <class V>
  INLINE static void apply(typename V::scalar* c, typename V::vector product) {
    V::store(c, V::add(V::load(c), product));
  }
};
struct StoreStairs : Store {
  static constexpr bool stairs = true;
};
struct AccumulateStairs : Accumulate {
  static constexpr bool stairs = true;
};

// How far each column of vectors reaches along the summed dimension: `vectors` ends that never decrease.
// The same for all in a plain product; a staircase where causality ends the columns of P^T one by one.
template <int vectors>
struct Depth {
  long end[vectors];
  INLINE explicit Depth(long depth) { UNROLL for (int j = 0; j < vectors; j++) end[j] = depth; }
  INLINE explicit Depth(const long* ends) { UNROLL for (int j = 0; j < vectors; j++) end[j] = ends[j]; }
};

template <class V, int rows, int vectors, int first = 0, class A>
INLINE void multiply_stairs(typename V::vector (&c)[rows][vectors], A a, const typename V::element* b,
                            long b_stride, const Depth<vectors>& depth, long done = 0) {
  multiply<V, rows, vectors, first>(c, a.depth_from(done), b + done * b_stride, b_stride,
                                    depth.end[first] - done);
  if constexpr (first + 1 < vectors)
    if (depth.end[vectors - 1] > depth.end[first])
      multiply_stairs<V, rows, vectors, first + 1>(c, a, b, b_stride, depth, depth.end[first]);
}

template <class V, int rows, int vectors, class Finish, class A>
INLINE void gemm_tile(A a, const typename V::element* b, long b_stride, const Depth<vectors>& depth,
                      typename V::scalar* c, long c_stride) {
  typename V::vector sum[rows][vectors];
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = V::zero();
  if constexpr (Finish::stairs)
    multiply_stairs<V, rows, vectors>(sum, a, b, b_stride, depth);
  else
    multiply<V, rows, vectors>(sum, a, b, b_stride, depth.end[0]);
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int j = 0; j < vectors; j++)
      Finish::template apply<V>(c + i * c_stride + j * V::lanes, sum[i][j]);
}

// The rows of the next tile when `left` are left. Tiles of 6, 4, 3, 2 and 1 rows exist; few rows share a tile
// evenly, so that none is too small to hide the latency of the multiply-adds.
INLINE long next_rows(long left) {
  constexpr signed char few[12] = {0, 1, 2, 3, 4, 3, 6, 4, 4, 6, 6, 4};
  return left >= 12 ? 6 : few[left];
}

// C[rows, vectors * lanes] (=, +=) A B for any number of rows.
template <class V, int vectors, class Finish, class A>
inline void gemm(long rows, A a, const typename V::element* b, long b_stride, const Depth<vectors>& depth,
                 typename V::scalar* c, long c_stride) {
  static_assert(V::tile_rows == 6, "next_rows() knows the tiles");
  for (long row = 0; row < rows;) {
    const long count = next_rows(rows - row);
    const A from = a.rows_from(row);
    typename V::scalar* to = c + row * c_stride;
    switch (count) {
      case 6:
        gemm_tile<V, 6, vectors, Finish>(from, b, b_stride, depth, to, c_stride);
        break;
      case 4:
        gemm_tile<V, 4, vectors, Finish>(from, b, b_stride, depth, to, c_stride);
        break;
      case 3:
        gemm_tile<V, 3, vectors, Finish>(from, b, b_stride, depth, to, c_stride);
        break;
      case 2:
        gemm_tile<V, 2, vectors, Finish>(from, b, b_stride, depth, to, c_stride);
        break;
      default:
        gemm_tile<V, 1, vectors, Finish>(from, b, b_stride, depth, to, c_stride);
    }
    row += count;
  }
}
template <class V, int vectors, class Finish, class A>
inline void gemm(long rows, A a, const typename V::element* b, long b_stride, long depth,
                 typename V::scalar* c, long c_stride) {
  gemm<V, vectors, Finish>(rows, a, b, b_stride, Depth<vectors>(depth), c, c_stride);
}

// The same with the number of vectors known at run time, 1 <= count <= V::tile_vectors. `depth` is one
// number, or `count` ends.
template <class V, class Finish, int vectors = V::tile_vectors, class A, class D>
inline void gemm_columns(int count, long rows, A a, const typename V::element* b, long b_stride, D depth,
                         typename V::scalar* c, long c_stride) {
  if (count == vectors)
    gemm<V, vectors, Finish>(rows, a, b, b_stride, Depth<vectors>(depth), c, c_stride);
  else if constexpr (vectors > 1)
    gemm_columns<V, Finish, vectors - 1>(count, rows, a, b, b_stride, depth, c, c_stride);
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
