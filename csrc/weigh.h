// Scores and weights in one sweep over a block of keys that every query of the panel sees.
//
//   S^T = K Q^T        a tile of tile_rows keys at a time, stored as it is finished
//   P^T = 2^(S^T - r)  of the tile before it, a few vectors at a time between the multiply-adds of this one
//
// The exponentials' own arithmetic would take the multiply-add pipes for a sixteenth of a call at D = 64.
// exp2_beside_products() needs them for its polynomial alone; the rest runs on pipes that the products leave
// idle, but only where an out-of-order core finds products beside it.
#pragma once

#include "gemm.h"
#include "prefetch.h"
#include "softmax.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// References are integers: a difference from one has the fraction of the score itself.
template <class V>
INLINE typename V::vector nearest_integer(typename V::vector x) {
  using S = typename V::scalar;
  const auto shift = V::set1(V::rounding_shift);
  const auto size = V::max(x, V::sub(V::zero(), x));
  return V::select(V::greater(V::set1(S(1 << 22)), size), V::sub(V::add(x, shift), shift), x);
}

// What the exponentials of a panel are taken against, by the lane: [width] each.
template <class V>
struct Exponents {
  using S = typename V::scalar;
  static constexpr int width = V::lanes * V::tile_vectors;
  static constexpr S largest_reference = 1 << 20;  // fp32 scores of this size hold no fraction worth having

  alignas(64) S low[width], high[width], shift[width];

  // For integral references; false if some reference is too large, infinite or NaN.
  INLINE bool set(const S* reference) {
    bool fits = true;
    for (int j = 0; j < width; j += V::lanes) {
      const auto r = V::load(reference + j);
      const auto size = V::max(r, V::sub(V::zero(), r));
      fits = fits && !V::any(V::not_less_equal(size, V::set1(largest_reference)));
      V::store(low + j, V::add(r, V::set1(-126)));
      V::store(high + j, V::add(r, V::set1(64)));  // 2^64: beyond Forward's overflow_sum
      V::store(shift + j, V::sub(V::set1(V::rounding_shift), r));
    }
    return fits;
  }
};

// 2^(x - r) for n vectors: a score below r - 126 weighs 2^-126, one above r + 64, or NaN, 2^64. Additions,
// shifts and comparisons run on pipes that multiply-adds do not use (AMD Zen 5; the instructions that split
// and scale by powers of two use them). Constants come from memory, hidden from the compiler, which would
// keep them in registers that accumulators need.
template <class V, int degree, int n>
INLINE void exp2_beside_products(typename V::vector (&x)[n], const typename V::scalar* low,
                                 const typename V::scalar* high, const typename V::scalar* shift) {
  const float* c = Centred<degree>::coefficient;
  asm("" : "+r"(c));
  typename V::vector t[n], p[n];
  UNROLL for (int i = 0; i < n; i++) {
    x[i] = V::max(V::min(x[i], V::load(high)), V::load(low));  // the operands' order turns NaN into `high`
    t[i] = V::add(x[i], V::load(shift));
    x[i] = V::sub(x[i], V::sub(t[i], V::load(shift)));
    p[i] = V::set1(c[0]);
  }
  UNROLL for (int k = 1; k <= degree; k++) UNROLL for (int i = 0; i < n; i++) p[i] =
      V::fma(p[i], x[i], V::set1(c[k]));
  UNROLL for (int i = 0; i < n; i++) x[i] = V::add_to_exponent(p[i], t[i]);
}

// What a sweep adds to its scores and takes out of its weights, laid out like them.
template <class V>
struct Extras {
  const typename V::scalar* bias;  // [keys][width] in log2 units, or null
  const uint8_t* seen;             // [keys][width], 0 where a query may not attend to a key, or null
};

template <class V, int degree, bool has_extras>
class WeightSweep {
  using S = typename V::scalar;
  using E = typename V::element;
  static constexpr int vectors = V::tile_vectors, width = V::lanes * vectors, rows = V::tile_rows;
  // A unit of exponentials: as many keys of one vector of queries as fit beside the accumulators, which stay
  // in registers; a pair where the products want pairs.
  static constexpr int unit_keys = V::keys_beside_products, units = rows / unit_keys * vectors;

 public:
  // `weights` [keys or pairs of keys][width] are what the micro-kernel reads, `sums` [depth][width] their
  // sums over the keys, of pairs also as rounded; `factor` times a product is a score. Every tile brings some
  // of what lies `ahead` into the cache.
  WeightSweep(E* weights, S factor, S* sums, Extras<V> extras, Ahead& ahead)
      : weights_(weights), factor_(factor), sums_(sums), extras_(extras), ahead_(ahead) {}

  // Returns false, with the weights of no use, if the references are unfit. `reference` [width] is chosen
  // from the first tile unless it is `ready`: integers near the largest score of that tile.
  bool run(long keys, DepthContiguous<E> a, const E* panel, long depth, S* reference, bool ready) {
    if (depth >= 5 * units) return run<5>(keys, a, panel, depth, reference, ready);
    if (depth >= 2 * units) return run<2>(keys, a, panel, depth, reference, ready);
    return depth >= units && run<1>(keys, a, panel, depth, reference, ready);
  }

 private:
  template <int steps>
  bool run(long keys, DepthContiguous<E> a, const E* panel, long depth, S* reference, bool ready) {
    if (keys < rows || (ready && !exponents_.set(reference))) return false;
    for (int j = 0; j < V::depth * width; j += V::lanes) V::store(sums_ + j, V::zero());
    tile<rows, 0>(a, panel, depth, 0);
    if (!ready && !choose(reference)) return false;
    long row = rows;
    for (; row + rows <= keys; row += rows) tile<rows, steps>(a.rows_from(row), panel, depth, row);
    long pending = row - rows;
    if (row < keys) {
      last_tile<rows - 1, steps>(keys - row, a.rows_from(row), panel, depth, row);
      pending = row;
    }
    for (; pending < keys; pending += unit_keys) {
      const S* const source = scores(pending);
      E* const target = weights_ + pending / V::depth * width;
      for (int j = 0; j < vectors; j++) {
        if (pending + unit_keys <= keys)
          weigh<unit_keys>(source, target, pending, j);
        else
          weigh<1>(source, target, pending, j);
      }
    }
    return true;
  }

  // Scores of `count` keys from `row` on; with `steps`, the weights of the tile before them on the way.
  template <int count, int steps>
  INLINE void tile(DepthContiguous<E> a, const E* panel, long depth, long row) {
    typename V::vector sum[count][vectors];
    UNROLL for (int i = 0; i < count; i++) UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = V::zero();
    long k = 0;
    if constexpr (steps > 0) {
      ahead_.fetch_some();
      const S* source = scores(row - rows);
      E* target = weights_ + (row - rows) / V::depth * width;
      for (int i = 0; i < rows; i += unit_keys) {
        UNROLL for (int j = 0; j < vectors; j++) {
          multiply_steps<V, count, vectors, steps>(sum, a.depth_from(k), panel + k * width, width);
          k += steps;
          weigh<unit_keys>(source, target, row - rows + i, j);
          fetch_ahead(a, depth, i, j);
        }
        source += unit_keys * width;
        target += unit_keys / V::depth * width;
      }
    }
    multiply<V, count, vectors>(sum, a.depth_from(k), panel + k * width, width, depth - k);
    S* const out = scores(row);
    UNROLL for (int i = 0; i < count; i++) UNROLL for (int j = 0; j < vectors; j++)
        V::store(out + i * width + j * V::lanes, sum[i][j]);
  }
  template <int count, int steps>
  INLINE void last_tile(long left, DepthContiguous<E> a, const E* panel, long depth, long row) {
    if constexpr (count > 0) {
      if (left == count)
        tile<count, steps>(a, panel, depth, row);
      else
        last_tile<count - 1, steps>(left, a, panel, depth, row);
    }
  }

  // A unit's share of the keys of a tile to come. They lie in the level 2 cache, and the core's window is
  // taken by the exponentials' chains: it sees a missing key too late.
  INLINE static void fetch_ahead(DepthContiguous<E> a, long depth, int i, int j) {
    constexpr int tiles_ahead = 3, parts = vectors / unit_keys;
    const long part = depth * static_cast<long>(sizeof(E)) / parts;
    const E* row = a.data + (tiles_ahead * rows + i + j / parts) * a.stride;
    const char* bytes = reinterpret_cast<const char*>(row) + j % parts * part;
    UNROLL for (int line = 0; line < 4; line++) if (line * 64 < part) __builtin_prefetch(bytes + line * 64);
  }

  // n keys from `key` on, for vector j of the queries.
  template <int n>
  INLINE void weigh(const S* source, E* target, long key, int j) {
    const int at = j * V::lanes;
    typename V::vector x[n];
    UNROLL for (int i = 0; i < n; i++) x[i] = score(source + i * width + at, key + i, at);
    exp2_beside_products<V, degree>(x, exponents_.low + at, exponents_.high + at, exponents_.shift + at);
    if constexpr (has_extras)
      if (extras_.seen)
        UNROLL for (int i = 0; i < n; i++) x[i] =
            V::zero_unless(V::nonzero(extras_.seen + (key + i) * width + at), x[i]);
    auto sum = x[0];
    if constexpr (n == 2) sum = V::add(sum, x[1]);
    add_to(sums_ + at, sum);
    if constexpr (V::depth == 1) {
      UNROLL for (int i = 0; i < n; i++) V::store(target + i * width + at, x[i]);
    } else {
      const auto pair = V::pair(x[0], n == 2 ? x[n - 1] : V::zero());
      V::store(target + at, pair);
      V::store(sums_ + width + at, V::add_pairs(V::load(sums_ + width + at), pair));
    }
  }

  INLINE typename V::vector score(const S* product, long key, int at) const {
    auto x = V::load(product);
    if constexpr (V::depth == 2) x = V::mul(x, V::set1(factor_));
    if constexpr (has_extras)
      if (extras_.bias) x = V::add(x, V::load(extras_.bias + key * width + at));
    return x;
  }

  INLINE static void add_to(S* sum, typename V::vector x) { V::store(sum, V::add(V::load(sum), x)); }

  // References from the scores of the first tile; false if they are unfit, and then `reference` is left
  // alone.
  INLINE bool choose(S* reference) {
    alignas(64) S chosen[width];
    for (int at = 0; at < width; at += V::lanes) {
      auto largest = score(scores_ + at, 0, at);
      for (int i = 1; i < rows; i++) largest = V::max(largest, score(scores_ + i * width + at, i, at));
      V::store(chosen + at, nearest_integer<V>(largest));
    }
    if (!exponents_.set(chosen)) return false;
    memcpy(reference, chosen, sizeof chosen);
    return true;
  }

  INLINE S* scores(long row) { return scores_ + row % (2 * rows) * width; }

  alignas(64) S scores_[2 * rows * width];  // of this tile and the one before it
  E* const weights_;
  const S factor_;
  S* const sums_;
  const Extras<V> extras_;
  Ahead& ahead_;
  Exponents<V> exponents_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
