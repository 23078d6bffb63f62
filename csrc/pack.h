// Moves between memory in its own layout and dtype and the layouts that the micro-kernel reads: panels
// with queries across the lanes, rows widened to fp32, pairs of bf16.
#pragma once

#include "gemm.h"
#include "problem.h"
#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// panel[depth][lanes of the vectors] = transpose of rows [rows][depth], widened, times `factor`; lanes past
// the last row are 0 up to a whole number of vectors. row_stride counts elements of T.
template <class V, long panel_stride = V::lanes * V::tile_vectors, class T>
inline void pack_transposed(const T* rows, long row_stride, long row_count, long depth,
                            typename V::scalar factor, typename V::scalar* panel) {
  constexpr int W = V::lanes;
  const auto f = V::set1(factor);
  for (long row = 0; row < row_count; row += W) {
    const long count = min<long>(W, row_count - row);
    for (long d = 0; d < depth; d += W) {
      const long width = min<long>(W, depth - d);
      const T* source = rows + row * row_stride + d;
      typename V::scalar* target = panel + d * panel_stride + row;
      if (count == W && width == W) {
        typename V::vector block[W];
        UNROLL for (int i = 0; i < W; i++) block[i] = V::mul(V::load(source + i * row_stride), f);
        V::transpose(block);
        UNROLL for (int i = 0; i < W; i++) V::store(target + i * panel_stride, block[i]);
      } else {
        typename V::vector block[W];
        for (int i = 0; i < W; i++)
          block[i] = i < count ? V::load(source + i * row_stride, width) : V::zero();
        V::transpose(block);
        for (int i = 0; i < width; i++) V::store(target + i * panel_stride, V::mul(block[i], f));
      }
    }
  }
}

// A residual is what narrowing took: from fp16 another fp16 number, multiplied so that it is not below the
// least one, together 22 bits; from bf16, the upper half of an fp32 number, the distance from it in units of
// the lower half, by which nothing is lost but the last bit of a number in the middle of two.
constexpr float fp16_residual_scale = 2048;

// Stores x narrowed, all lanes or the first of them, and its residual unless that is null.
template <class V, class T, class... Count>
INLINE void store_narrowed(T* target, [[maybe_unused]] T* residual, typename V::vector x, Count... count) {
  V::store(target, x, count...);
  if constexpr (sizeof(T) == 2) {
    if (!residual) return;
    const auto narrowed = V::load(target, count...);
    if constexpr (std::is_same_v<T, bf16>)
      V::store_distance(residual, x, narrowed, count...);
    else
      V::store(residual, V::mul(V::sub(x, narrowed), V::set1(fp16_residual_scale)), count...);
  }
}

// x as it was before, from both.
template <class V, class T, class... Count>
INLINE typename V::vector load_unrounded(const T* target, const T* residual, Count... count) {
  const auto narrowed = V::load(target, count...);
  if constexpr (std::is_same_v<T, bf16>)
    return V::add_distance(narrowed, residual, count...);
  else
    return V::fma(V::load(residual, count...), V::set1(1 / fp16_residual_scale), narrowed);
}

// rows[r][d] = panel[d][r] * factor[r], narrowed: the way back, from a panel of V::tile_vectors vectors.
// `residual`, like rows or null, gets what narrowing to 16 bits took.
template <class V, class T>
inline void unpack_transposed(const typename V::scalar* panel, const typename V::scalar* factor,
                              long row_count, long depth, T* rows, long row_stride, T* residual = nullptr,
                              long residual_stride = 0) {
  constexpr int W = V::lanes, panel_stride = W * V::tile_vectors;
  for (long row = 0; row < row_count; row += W) {
    const long count = min<long>(W, row_count - row);
    const auto f = V::load(factor + row);
    const typename V::scalar* source = panel + row;
    T* target = rows + row * row_stride;
    const auto scaled = [&](long d) { return V::mul(V::load(source + d * panel_stride), f); };
    const auto residual_at = [&](long i, long d) {
      return residual ? residual + (row + i) * residual_stride + d : nullptr;
    };
    long d = 0;
    if constexpr (V::depth == 2 && sizeof(T) == 2) {
      // Two of a row at a time: half of the shuffles, but what narrowing takes is not to be had.
      for (; !residual && count == W && d + 2 * W <= depth; d += 2 * W) {
        typename V::vector block[W];
        UNROLL for (int i = 0; i < W; i++) block[i] = V::pair(scaled(d + 2 * i), scaled(d + 2 * i + 1));
        V::transpose(block);
        UNROLL for (int i = 0; i < W; i++)
            V::store(reinterpret_cast<typename V::element*>(target + i * row_stride + d), block[i]);
      }
    }
    for (; count == W && d + W <= depth; d += W) {
      typename V::vector block[W];
      UNROLL for (int i = 0; i < W; i++) block[i] = scaled(d + i);
      V::transpose(block);
      UNROLL for (int i = 0; i < W; i++)
          store_narrowed<V>(target + i * row_stride + d, residual_at(i, d), block[i]);
    }
    // Fewer rows or columns are indexed at run time: an array that lies in memory.
    for (; d < depth; d += W) {
      const long width = min<long>(W, depth - d);
      typename V::vector block[W];
      for (int i = 0; i < W; i++) block[i] = i < width ? scaled(d + i) : V::zero();
      V::transpose(block);
      for (int i = 0; i < count; i++)
        store_narrowed<V>(target + i * row_stride + d, residual_at(i, d), block[i], width);
    }
  }
}

// target[rows][width] = rows of T, widened.
template <class V, class T>
inline void copy_widened(const T* rows, long row_stride, long row_count, long width,
                         typename V::scalar* target, long target_stride) {
  constexpr int W = V::lanes;
  for (long row = 0; row < row_count; row++) {
    const T* source = rows + row * row_stride;
    typename V::scalar* out = target + row * target_stride;
    long d = 0;
    for (; d + W <= width; d += W) V::store(out + d, V::load(source + d));
    if (d < width) V::store(out + d, V::load(source + d, width - d), width - d);
  }
}

#ifdef FASTATTN_BF16_DOT
// panel[pair of depth][rows] = pairs (row[2p], row[2p + 1]); an odd depth is padded with 0.
inline void pack_pairs_transposed(const bf16* rows, long row_stride, long row_count, long depth,
                                  uint32_t* panel) {
  constexpr int W = F32::lanes, panel_stride = W * F32::tile_vectors;
  for (long row = 0; row < row_count; row += W) {
    const long count = min<long>(W, row_count - row);
    for (long d = 0; d < depth; d += 2 * W) {
      const long width = min<long>(2 * W, depth - d);
      __m512 block[W];
      const __mmask32 halves = width == 2 * W ? ~0u : (1u << width) - 1;
      UNROLL for (int i = 0; i < W; i++) {
        const bf16* source = rows + (row + (i < count ? i : 0)) * row_stride + d;
        block[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(i < count ? halves : 0, source));
      }
      F32::transpose(block);
      uint32_t* target = panel + d / 2 * panel_stride + row;
      const long pairs = (width + 1) / 2;
      UNROLL for (int i = 0; i < W; i++) if (i < pairs) _mm512_storeu_ps(target + i * panel_stride, block[i]);
    }
  }
}

// target[pair of rows][width] = pairs (row 2p, row 2p + 1); an odd count of rows is padded with 0.
inline void interleave_row_pairs(const bf16* rows, long row_stride, long row_count, long width,
                                 uint32_t* target, long target_stride) {
  const __m512i low_index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39,
                                             7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high_index = _mm512_add_epi16(low_index, _mm512_set1_epi16(16));
  for (long row = 0; row < row_count; row += 2) {
    const bf16 *first = rows + row * row_stride, *second = first + (row + 1 < row_count ? row_stride : 0);
    uint32_t* out = target + row / 2 * target_stride;
    const auto merge = [&](__m512i a, __m512i b, long d, long count) {
      _mm512_mask_storeu_epi32(out + d, F32::first_lanes(count), _mm512_permutex2var_epi16(a, low_index, b));
      if (count > 16)
        _mm512_mask_storeu_epi32(out + d + 16, F32::first_lanes(count - 16),
                                 _mm512_permutex2var_epi16(a, high_index, b));
    };
    long d = 0;
    if (row + 1 < row_count)
      for (; d + 32 <= width; d += 32)
        merge(_mm512_loadu_si512(first + d), _mm512_loadu_si512(second + d), d, 32);
    for (; d < width; d += 32) {
      const __mmask32 mask = width - d >= 32 ? ~0u : (1u << (width - d)) - 1;
      merge(_mm512_maskz_loadu_epi16(mask, first + d),
            _mm512_maskz_loadu_epi16(row + 1 < row_count ? mask : 0, second + d), d, min(32L, width - d));
    }
  }
}
#endif

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
    if constexpr (V::depth == 2) {
      // Pairs must not reach into the next row.
      if (columns % 2 == 0 && stride % 2 == 0)
        return {reinterpret_cast<const typename V::element*>(rows), stride / 2};
      pair_columns(rows, stride, count, columns, copy, elements);
    } else
#endif
      copy_widened<V>(rows, stride, count, columns, copy, elements);
    return {copy, elements};
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
