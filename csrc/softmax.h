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

// Scores are kept in the units in which naive attention rounds them, and become log2 units in the exponent
// itself, by one fused multiply-add: products that are exact stay so, and a bias of thousands costs no more
// digits than there.
//
// A score is multiplier * product + bias, and factor * score is in log2 units. Without a bias the multiplier
// is the sign of the scale, so that a score is as exact as its product.
template <class S>
struct ScoreUnits {
  S multiplier, factor;  // the factor is positive

  ScoreUnits(double scale, bool has_bias)
      : multiplier(static_cast<S>(scale)), factor(static_cast<S>(log2_e)) {
    if (has_bias) return;
    const double size = scale < 0 ? -scale : scale;
    const bool is_zero = size < std::numeric_limits<S>::min();
    multiplier = is_zero ? S(0) : scale < 0 ? S(-1) : S(1);
    if (!is_zero) factor = static_cast<S>(size * log2_e);
  }
};

// The lowest score, and that in log2 units, which do not go much further.
template <class S>
constexpr S lowest_score = static_cast<S>(Limits<S>::lowest * ln_2 * (1 - 1e-6));
template <class S>
constexpr S lowest_reference = lowest_score<S> * static_cast<S>(log2_e);

// What turns a block of products into scores, -inf where unseen.
template <class V>
struct ScoreRules {
  using S = typename V::scalar;
  static constexpr int width = V::lanes * V::tile_vectors;

  ScoreUnits<S> units;
  const S* bias;        // [keys][width], or null
  const uint8_t* seen;  // [keys][width] bytes from classify(), or null: `band` tells
  const Band* band;
  Range queries, keys;

  INLINE bool leaves_products() const { return !bias && units.multiplier == 1; }

  // Lanes of vector j that may attend to key row r.
  INLINE typename V::mask lanes_seeing(long r, int j) const {
    if (seen) return V::nonzero(seen + r * width + j * V::lanes);
    const Range who = band->queries_of({keys.begin + r, keys.begin + r + 1});
    const long first = queries.begin + j * V::lanes;
    return V::both(V::first_lanes(who.end - first), V::lanes_from(who.begin - first));
  }
};

// multiplier * product + bias; a bias of -inf forbids the key even if the product is NaN, and a finite one
// never does. NaN passes, by the operands' order.
template <class V>
INLINE typename V::vector with_bias(typename V::vector product, typename V::vector multiplier,
                                    typename V::vector bias) {
  using S = typename V::scalar;
  const auto forbidden = V::greater(V::set1(Limits<S>::lowest), bias);
  return V::select(forbidden, bias, V::max(V::set1(lowest_score<S>), V::fma(product, multiplier, bias)));
}

// Turns rows [0, rows) of vector j of the products into scores, so that every later step can treat all rows
// alike. Nothing is touched where a positive scale is the only rule.
template <class V>
inline void prepare_scores(const ScoreRules<V>& rules, int j, const Reach& reach, long rows,
                           typename V::scalar* products) {
  using S = typename V::scalar;
  constexpr int width = V::lanes * V::tile_vectors;
  const auto nothing = V::set1(-Limits<S>::infinity);
  S* const column = products + j * V::lanes;
  if (!rules.leaves_products()) {
    const auto multiplier = V::set1(rules.units.multiplier);
    const S* const bias = rules.bias ? rules.bias + j * V::lanes : nullptr;
    for (long r = 0; r < rows; r++) {
      const auto product = V::load(column + r * width);
      V::store(column + r * width, bias ? with_bias<V>(product, multiplier, V::load(bias + r * width))
                                        : V::mul(product, multiplier));
    }
  }
  const auto restrict_rows = [&](long begin, long end) {
    for (long r = begin; r < end; r++)
      V::store(column + r * width, V::select(rules.lanes_seeing(r, j), V::load(column + r * width), nothing));
  };
  const auto hide_rows = [&](long begin, long end) {
    for (long r = begin; r < end; r++) V::store(column + r * width, nothing);
  };
  const long full_begin = min(reach.full_begin, rows), full_end = min(reach.full_end, rows);
  hide_rows(0, min(reach.begin, rows));
  restrict_rows(reach.begin, min(full_begin, reach.end));
  restrict_rows(max(full_begin, full_end), min(reach.end, rows));
  hide_rows(reach.end, rows);
}

// The largest score of each query in log2 units, over `rows` rows of a column of vectors.
template <class V>
inline typename V::vector largest_score(const typename V::scalar* column, typename V::scalar factor,
                                        long rows) {
  constexpr int width = V::lanes * V::tile_vectors, chains = 4;
  typename V::vector largest[chains];
  for (auto& x : largest) x = V::set1(-Limits<typename V::scalar>::infinity);
  long r = 0;
  for (; r + chains <= rows; r += chains)
    UNROLL for (int i = 0; i < chains; i++) largest[i] =
        V::max(largest[i], V::load(column + (r + i) * width));
  for (; r < rows; r++) largest[0] = V::max(largest[0], V::load(column + r * width));
  return V::mul(V::max(V::max(largest[0], largest[1]), V::max(largest[2], largest[3])), V::set1(factor));
}

// p 2^n for n vectors: 2^x for the fractions x = f, |f| <= 1/2, and t = rounding_shift + n. Additions, shifts
// and comparisons run on pipes that multiply-adds do not use (AMD Zen 5; the instructions that split and
// scale by powers of two use them). Constants come from memory, hidden from the compiler, which would keep
// them in registers that accumulators need.
template <class V, int degree, int n>
INLINE void exp2_of_parts(typename V::vector (&x)[n], const typename V::vector (&t)[n]) {
  const float* c = Centred<degree>::coefficient;
  asm("" : "+r"(c));
  typename V::vector p[n];
  UNROLL for (int i = 0; i < n; i++) p[i] = V::set1(c[0]);
  UNROLL for (int k = 1; k <= degree; k++) UNROLL for (int i = 0; i < n; i++) p[i] =
      V::fma(p[i], x[i], V::set1(c[k]));
  UNROLL for (int i = 0; i < n; i++) x[i] = V::add_to_exponent(p[i], t[i]);
}

// 2^x for n vectors of about 0 or less; 2^-126 for what is below -126. NaN stays NaN.
template <class V, int degree, int n>
INLINE void exp2_below_one(typename V::vector (&x)[n]) {
  static constexpr float constants[] = {-126, V::rounding_shift};
  const float* c = constants;
  asm("" : "+r"(c));
  typename V::vector t[n];
  UNROLL for (int i = 0; i < n; i++) {
    x[i] = V::max(V::set1(c[0]), x[i]);                     // NaN stays, by the operands' order
    t[i] = V::add(V::min(x[i], V::zero()), V::set1(c[1]));  // and counts as 0 here
    x[i] = V::sub(x[i], V::sub(t[i], V::set1(c[1])));
  }
  exp2_of_parts<V, degree>(x, t);
}

// Finite references in log2 units whose rounding is not small; scores are rounded alike before these are
// subtracted.
template <class V>
INLINE typename V::mask huge(typename V::vector reference) {
  const auto size = V::max(reference, V::sub(V::zero(), reference));
  const auto finite = V::greater(V::set1(Limits<typename V::scalar>::infinity), size);
  return V::both(finite, V::greater(size, V::set1(1 << 20)));
}

// Replaces a column of vectors of scores by the weights 2^(factor * score - reference), as the
// micro-kernel reads them (one row per key, or per pair of keys: pair p takes the place of row p, which is
// used up by then). Adds them to sums[0] and, where they are stored as pairs, as rounded for that to sums[1].
// `kept` [keys][tile_vectors], unless null, then drops weights, which count in both. `rest` [pairs][width],
// unless null, gets pairs of what that rounding took, which sums[1] then has too.
template <class V, int degree>
inline void exponentiate(typename V::scalar* column, long rows, typename V::scalar units_factor,
                         typename V::vector reference, const typename V::mask* kept,
                         typename V::vector (&sums)[V::depth],
                         [[maybe_unused]] typename V::element* rest = nullptr) {
  using vector = typename V::vector;
  constexpr int width = V::lanes * V::tile_vectors, step = V::exp2_at_once;
  auto factor = V::set1(units_factor);
  const auto shift = V::sub(V::zero(), reference);
  // What rounding took from a huge reference would be a power of two of any size.
  if (const auto rounds = huge<V>(reference); V::any(rounds)) {
    const auto one = V::set1(1), first = V::select(rounds, factor, one);
    for (long r = 0; r < rows; r++) V::store(column + r * width, V::mul(V::load(column + r * width), first));
    factor = V::select(rounds, one, factor);
  }
  vector sum[2] = {V::zero(), V::zero()};
  long row = 0;
  const auto some = [&](auto count, auto dropout) {
    constexpr int n = decltype(count)::value;
    vector x[n];
    UNROLL for (int i = 0; i < n; i++) x[i] = V::fused(V::load(column + (row + i) * width), factor, shift);
    V::template exp2_each<degree>(x);
    UNROLL for (int i = 0; i < n; i++) sum[i % 2] = V::add(sum[i % 2], x[i]);
    const auto drop = [&](vector(&y)[n]) {
      if constexpr (decltype(dropout)::value)
        UNROLL for (int i = 0; i < n; i++) y[i] = V::zero_unless(kept[(row + i) * V::tile_vectors], y[i]);
    };
    if constexpr (V::depth == 1) {
      drop(x);
      UNROLL for (int i = 0; i < n; i++) V::store(column + (row + i) * width, x[i]);
    } else {
      const auto pair = [](const vector(&y)[n], int i) {
        return V::pair(y[i], i + 1 < n ? y[i + 1] : V::zero());
      };
      const auto store_pairs = [&](vector(&y)[n], typename V::element* to) {
        UNROLL for (int i = 0; i < n; i += 2) sums[1] = V::add_pairs(sums[1], pair(y, i));
        drop(y);
        UNROLL for (int i = 0; i < n; i += 2) V::store(to + (row + i) / 2 * width, pair(y, i));
      };
      vector left[n];
      if (rest) UNROLL for (int i = 0; i < n; i++) {
          const vector rounded = pair(x, i / 2 * 2);
          left[i] = V::sub(x[i], i % 2 ? V::high_half(rounded) : V::low_half(rounded));
        }
      store_pairs(x, reinterpret_cast<typename V::element*>(column));
      if (rest) store_pairs(left, rest);
    }
    row += n;
  };
  const auto all = [&](auto dropout) {
    while (row + step <= rows) some(std::integral_constant<int, step>(), dropout);
    while (row + 2 <= rows) some(std::integral_constant<int, 2>(), dropout);
    if (row < rows) some(std::integral_constant<int, 1>(), dropout);
  };
  if (kept)
    all(std::true_type());
  else
    all(std::false_type());
  sums[0] = V::add(sums[0], V::add(sum[0], sum[1]));
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

// bias [keys][width] from the problem's bias, whatever its layout and dtype.
template <class V, class T>
inline void load_bias(const Problem& problem, const Tile& tile, typename V::scalar* bias) {
  using S = typename V::scalar;
  constexpr int W = V::lanes, width = W * V::tile_vectors;
  const Tensor4<const T> source = problem.bias.as<const T>();
  const long query_stride = source.stride[2], key_stride = source.stride[3];
  const long queries = tile.queries.size(), keys = tile.keys.size();
  const T* data = source.at(tile.batch, tile.head, tile.queries.begin, tile.keys.begin);
  if (query_stride == 0) {
    // One value per key: converted W keys at a time, then spread over the row.
    for (long k = 0; k < keys; k += W) {
      const long count = min<long>(W, keys - k);
      alignas(64) S values[W] = {};
      for (long i = 0; i < count; i++) V::store(values + i, V::load(data + (k + i) * key_stride, 1), 1);
      for (long i = 0; i < count; i++)
        UNROLL for (int j = 0; j < width; j += W) V::store(bias + (k + i) * width + j, V::set1(values[i]));
    }
    return;
  }
  const auto gather = [&](long q, long k) {
    alignas(64) S buffer[W] = {};
    for (long i = 0; i < min<long>(W, queries - q); i++)
      V::store(buffer + i, V::load(data + (q + i) * query_stride + k * key_stride, 1), 1);
    return V::load(buffer);
  };
  for (long q = 0; q < queries; q += W) {
    const long count = min<long>(W, queries - q);
    long k = 0;
    if (key_stride == 1 && count == W) {
      for (; k + W <= keys; k += W) {
        typename V::vector block[W];
        UNROLL for (int i = 0; i < W; i++) block[i] = V::load(data + (q + i) * query_stride + k);
        V::transpose(block);
        UNROLL for (int i = 0; i < W; i++) V::store(bias + (k + i) * width + q, block[i]);
      }
    }
    for (; k < keys; k++) {
      V::store(bias + k * width + q, gather(q, k));
    }
  }
}

// Whether any of the loaded biases [rows][width] is -inf, in the vectors that hold queries.
template <class V>
inline bool bias_forbids(const typename V::scalar* bias, long rows, int columns) {
  constexpr int width = V::lanes * V::tile_vectors;
  auto largest = V::zero();
  for (long r = 0; r < rows; r++)
    for (int j = 0; j < columns; j++)  // the operands' order loses NaN
      largest = V::max(V::sub(V::zero(), V::load(bias + r * width + j * V::lanes)), largest);
  return V::maximum(largest) == Limits<typename V::scalar>::infinity;
}

// Clears the bytes [rows][width] of what a loaded bias of -inf forbids.
template <int width, class S>
inline void take_out_forbidden(const S* bias, long rows, uint8_t* bytes) {
  for (long i = 0; i < rows * width; i++) bytes[i] = bias[i] < Limits<S>::lowest ? 0 : bytes[i];
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
