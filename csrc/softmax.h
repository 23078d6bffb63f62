// The softmax of one block of transposed scores [keys][queries]: row statistics lie across the lanes, so
// nothing here reduces over lanes.
#pragma once

#include "mask.h"
#include "philox.h"
#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

constexpr double log2_e = 1.4426950408889634074;
constexpr double ln_2 = 0.69314718055994530942;

template <class S>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float lowest = -3.402823466e38f, infinity = __builtin_inff();
};
template <>
struct Limits<double> {
  static constexpr double lowest = -1.7976931348623157e308, infinity = __builtin_inf();
};

// Which rows (keys) of a block one vector of queries sees: none outside [begin, end), all of
// [full_begin, full_end), and some of the others.
struct Reach {
  long begin, full_begin, full_end, end;
};

// A block of scores in log2 units, and what is to be done to them: score = factor * product + bias.
template <class V>
struct ScoreBlock {
  using S = typename V::scalar;
  static constexpr int width = V::lanes * V::tile_vectors;

  S* products;                   // [keys][width]
  const S* bias;                 // [keys][width] in log2 units, or null
  const uint8_t* seen;           // [keys][width] bytes from classify(), or null: `band` tells
  const typename V::mask* kept;  // dropout, [keys][tile_vectors], or null
  S factor;
  const Band* band;
  Range queries, keys;

  // Lanes of vector j that may attend to key row r.
  INLINE typename V::mask lanes_seeing(long r, int j) const {
    if (seen) return V::nonzero(seen + r * width + j * V::lanes);
    const Range who = band->queries_of({keys.begin + r, keys.begin + r + 1});
    const long first = queries.begin + j * V::lanes;
    return V::both(V::first_lanes(who.end - first), V::lanes_from(who.begin - first));
  }
  INLINE typename V::vector score(long r, int j) const {
    const auto product = V::load(products + r * width + j * V::lanes);
    const auto scaled = V::mul(product, V::set1(factor));
    return bias ? V::fma(product, V::set1(factor), V::load(bias + r * width + j * V::lanes)) : scaled;
  }
};

// The largest score of each query of vector j.
template <class V>
inline typename V::vector largest_score(const ScoreBlock<V>& block, int j, const Reach& reach) {
  auto largest = V::set1(-Limits<typename V::scalar>::infinity);
  for (long r = reach.begin; r < reach.end; r++) {
    auto score = block.score(r, j);
    if (r < reach.full_begin || r >= reach.full_end)
      score = V::select(block.lanes_seeing(r, j), score, V::set1(-Limits<typename V::scalar>::infinity));
    largest = V::max(largest, score);
  }
  return largest;
}

// Replaces the products of vector j by 2^(score - reference), as the micro-kernel reads them, and returns
// their sum per query. Rows outside the reach become 0 if they lie in [0, rows).
template <class V, int degree>
struct Exponentials {
  using S = typename V::scalar;
  using vector = typename V::vector;
  static constexpr int width = V::lanes * V::tile_vectors;

  const ScoreBlock<V>& block;
  int j;
  vector factor, minus_reference;

  INLINE vector plain(long r) const {
    const vector product = V::load(block.products + r * width + j * V::lanes);
    return V::template exp2<degree>(V::fma(product, factor, minus_reference));
  }
  // Any ingredient; `total` takes the weight before dropout.
  INLINE vector general(long r, bool partial, vector& total) const {
    vector p = block.bias ? V::template exp2<degree>(V::add(block.score(r, j), minus_reference)) : plain(r);
    if (partial) p = V::zero_unless(block.lanes_seeing(r, j), p);
    total = V::add(total, p);
    return block.kept ? V::zero_unless(block.kept[r * V::tile_vectors + j], p) : p;
  }
};

// Rows of weights as the second product reads them: one per key, or one per pair of keys. Pair p takes the
// place of row p, whose scores are used up by then.
template <class V>
INLINE void store_weights(typename V::scalar* products, long r, int j, typename V::vector p) {
  V::store(products + r * V::lanes * V::tile_vectors + j * V::lanes, p);
}
#ifdef FASTATTN_BF16_DOT
INLINE void store_weight_pair(float* products, long r, int j, F32::vector low, F32::vector high) {
  constexpr int width = F32::lanes * F32::tile_vectors;
  BF16Pair::store_pair(reinterpret_cast<uint32_t*>(products) + r / 2 * width + j * F32::lanes, low, high);
}
#endif

template <class V, int degree>
inline typename V::vector exponentiate(const ScoreBlock<V>& block, int j, const Reach& reach,
                                       typename V::vector reference, long rows) {
  using vector = typename V::vector;
  const bool simple = !block.bias && !block.kept;
  const Exponentials<V, degree> exponentials{block, j, V::set1(block.factor), V::sub(V::zero(), reference)};
  vector sum[2] = {V::zero(), V::zero()};
  const auto is_partial = [&](long r) { return r < reach.full_begin || r >= reach.full_end; };
  const auto one = [&](long r, vector& total) {
    if (r < reach.begin || r >= reach.end) return V::zero();
    return exponentials.general(r, is_partial(r), total);
  };
  constexpr int step = V::depth == 2 ? 2 : 1, unroll = 4;
  long r = 0;
  const auto slow = [&](long until) {
    for (; r < until; r += step) {
      if constexpr (step == 1) {
        store_weights<V>(block.products, r, j, one(r, sum[0]));
      } else {
#ifdef FASTATTN_BF16_DOT
        const vector low = one(r, sum[0]), high = r + 1 < rows ? one(r + 1, sum[1]) : V::zero();
        store_weight_pair(block.products, r, j, low, high);
#endif
      }
    }
  };
  if (simple) {
    slow(min(rows, (reach.full_begin + step - 1) / step * step));
    for (; r + unroll <= reach.full_end; r += unroll) {
      UNROLL for (int i = 0; i < unroll; i += 2) {
        const vector a = exponentials.plain(r + i), b = exponentials.plain(r + i + 1);
        sum[0] = V::add(sum[0], a);
        sum[1] = V::add(sum[1], b);
        if constexpr (step == 1) {
          store_weights<V>(block.products, r + i, j, a);
          store_weights<V>(block.products, r + i + 1, j, b);
        } else {
#ifdef FASTATTN_BF16_DOT
          store_weight_pair(block.products, r + i, j, a, b);
#endif
        }
      }
    }
  }
  slow(rows);
  return V::add(sum[0], sum[1]);
}

// Fills kept [keys][tile_vectors] with the queries that dropout spares.
template <class V>
inline void draw_dropout(const Problem& problem, const Tile& tile, int columns, typename V::mask* kept) {
  const PhiloxKey key{static_cast<uint32_t>(problem.dropout_seed),
                      static_cast<uint32_t>(problem.dropout_seed >> 32)};
  const uint32_t threshold = static_cast<uint32_t>(problem.dropout_p * 4294967296.0);
  const uint32_t head = static_cast<uint32_t>(tile.batch * problem.query_heads + tile.head);
  for (int j = 0; j < columns; j++) {
    const PhiloxQueries<V::lanes> generator(key, static_cast<uint32_t>(problem.dropout_offset), head,
                                            static_cast<uint32_t>(tile.queries.begin + j * V::lanes));
    typename Words<V::lanes>::Vector word[4];
    for (long k = tile.keys.begin; k < tile.keys.end; k++) {
      if (k == tile.keys.begin || k % 4 == 0) generator.words(static_cast<uint32_t>(k / 4), word);
      kept[(k - tile.keys.begin) * V::tile_vectors + j] = at_least<V>(word[k % 4], threshold);
    }
  }
}

// A finite bias stays finite in log2 units: only -inf forbids.
template <class V>
INLINE typename V::vector bias_in_log2(typename V::vector x) {
  using S = typename V::scalar;
  // The operands' order lets NaN pass.
  const auto finite = V::max(V::set1(Limits<S>::lowest), V::mul(x, V::set1(static_cast<S>(log2_e))));
  return V::select(V::greater(V::set1(Limits<S>::lowest), x), x, finite);
}

// bias [keys][width] in log2 units from the problem's bias, whatever its layout and dtype.
template <class V, class T>
inline void load_bias(const Problem& problem, const Tile& tile, typename V::scalar* bias) {
  using S = typename V::scalar;
  constexpr int W = V::lanes, width = W * V::tile_vectors;
  const Tensor4<const T> source = problem.bias.as<const T>();
  const long query_stride = source.stride[2], key_stride = source.stride[3];
  const long queries = tile.queries.size(), keys = tile.keys.size();
  const T* data = source.at(tile.batch, tile.head, tile.queries.begin, tile.keys.begin);
  const auto gather = [&](long q, long k) {
    alignas(64) S buffer[W] = {};
    for (long i = 0; i < min<long>(W, queries - q); i++)
      V::store(buffer + i, V::load(data + (q + i) * query_stride + k * key_stride, 1), 1);
    return V::load(buffer);
  };
  for (long q = 0; q < queries; q += W) {
    const long count = min<long>(W, queries - q);
    long k = 0;
    if (key_stride == 1 && query_stride != 0 && count == W) {
      for (; k + W <= keys; k += W) {
        typename V::vector block[W];
        UNROLL for (int i = 0; i < W; i++) block[i] =
            bias_in_log2<V>(V::load(data + (q + i) * query_stride + k));
        V::transpose(block);
        UNROLL for (int i = 0; i < W; i++) V::store(bias + (k + i) * width + q, block[i]);
      }
    }
    for (; k < keys; k++) {
      typename V::vector row;
      if (query_stride == 0) {
        alignas(64) S one[W];
        V::store(one, V::load(data + k * key_stride, 1));
        row = V::set1(one[0]);
      } else {
        row = gather(q, k);
      }
      V::store(bias + k * width + q, bias_in_log2<V>(row));
    }
  }
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
