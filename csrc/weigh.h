// Scores and weights in one sweep over a block of keys that every query of the panel sees.
//
//   S^T = K Q^T        a tile of keys at a time
//   P^T = 2^(S^T - r)  of the tile before it, beside the multiply-adds of this one
#pragma once

#include "prefetch.h"
#include "softmax.h"
#include "sweep.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// References are integers in log2 units: a difference from one has the fraction of the score itself.
template <class V>
INLINE typename V::vector nearest_integer(typename V::vector x) {
  using S = typename V::scalar;
  const auto shift = V::set1(V::rounding_shift);
  const auto size = V::max(x, V::sub(V::zero(), x));
  return V::select(V::greater(V::set1(S(1 << 22)), size), V::sub(V::add(x, shift), shift), x);
}

// What the exponentials of a panel are taken against, by the lane: [width] each. `low` and `high` bound
// scores before `factor` takes them to log2 units.
template <class V>
struct Exponents {
  using S = typename V::scalar;
  static constexpr int width = V::lanes * V::tile_vectors;
  // Added to a score, less its reference, it rounds to steps of 2^-step_bits.
  static constexpr S rounding_shift = V::rounding_shift / (1 << V::step_bits);
  // fp32 scores of this size hold no fraction worth having
  static constexpr S largest_reference = (1 << 20) >> V::step_bits;

  alignas(64) S low[width], high[width], shift[width];

  // For integral references; false if some reference is too large, infinite or NaN.
  INLINE bool set(const S* reference, S factor) {
    bool fits = true;
    const auto inverse = V::set1(1 / factor);
    for (int j = 0; j < width; j += V::lanes) {
      const auto r = V::load(reference + j);
      const auto size = V::max(r, V::sub(V::zero(), r));
      fits = fits && !V::any(V::not_less_equal(size, V::set1(largest_reference)));
      V::store(low + j, V::mul(V::add(r, V::set1(-125)), inverse));
      V::store(high + j, V::mul(V::add(r, V::set1(64)), inverse));  // 2^64: beyond Forward's overflow_sum
      V::store(shift + j, V::sub(V::set1(rounding_shift), r));
    }
    return fits;
  }
};

// 2^(n / 16 + x) for vectors of fractions x, |x| <= 1/32, and t = Exponents::rounding_shift + n / 16: with
// sixteen powers in a table, two multiply-adds fewer than a polynomial needs for an eighth of the error.
template <class V, int degree, int n>
INLINE void exp2_of_steps_and_fractions(typename V::vector (&x)[n], const typename V::vector (&t)[n]) {
  const float* c = Stepped<degree>::coefficient;
  asm("" : "+r"(c));
  typename V::vector p[n];
  UNROLL for (int i = 0; i < n; i++) p[i] = V::set1(c[0]);
  UNROLL for (int k = 1; k < degree; k++) UNROLL for (int i = 0; i < n; i++) p[i] =
      V::fma(p[i], x[i], V::set1(c[k]));
  UNROLL for (int i = 0; i < n; i++) p[i] = V::mul(p[i], x[i]);
  UNROLL for (int i = 0; i < n; i++) {
    const auto power = V::exp2_of_steps(t[i]);
    x[i] = V::fma(p[i], power, power);
  }
}

// 2^(factor x - r) for n vectors: a score of less than r - 125 weighs 2^-125, one above r + 64, or NaN, 2^64.
template <class V, int degree, int n>
INLINE void exp2_beside_products(typename V::vector (&x)[n], const typename V::scalar& factor,
                                 const typename V::scalar* low, const typename V::scalar* high,
                                 const typename V::scalar* shift) {
  typename V::vector t[n];
  UNROLL for (int i = 0; i < n; i++) {
    x[i] = V::max(V::min(x[i], V::load(high)), V::load(low));  // the operands' order turns NaN into `high`
    if constexpr (V::depth == 1) {
      t[i] = V::fma(x[i], V::set1(factor), V::load(shift));
      x[i] = V::fms(x[i], V::set1(factor), V::sub(t[i], V::load(shift)));
    } else {  // 16 bits have no use for the exact product, which takes a multiply-add's pipe twice
      x[i] = V::mul(x[i], V::set1(factor));
      t[i] = V::add(x[i], V::load(shift));
      x[i] = V::sub(x[i], V::sub(t[i], V::load(shift)));
    }
  }
  if constexpr (V::step_bits > 0)
    exp2_of_steps_and_fractions<V, degree == 4 ? 2 : 3>(x, t);
  else
    exp2_of_parts<V, degree>(x, t);
}

// What a sweep adds to its scores and takes out of its weights, laid out like them.
template <class V>
struct Extras {
  const typename V::scalar* bias;  // [keys][width], or null
  const uint8_t* seen;             // [keys][width], 0 where a query may not attend to a key, or null
  typename V::scalar multiplier;   // of the products beside a bias
};

template <class V, int degree, bool has_extras>
class WeightSweep {
  using S = typename V::scalar;
  using E = typename V::element;
  static constexpr int width = Sweep<V>::width;

 public:
  // `weights` [keys or pairs of keys][width] are what the micro-kernel reads, `sums` [depth][width] their
  // sums over the keys, of pairs also as rounded; `factor` takes scores to log2 units. Every tile brings some
  // of what lies `ahead` into the cache.
  WeightSweep(E* weights, S factor, S* sums, Extras<V> extras, Ahead& ahead)
      : weights_(weights), factor_(factor), sums_(sums), extras_(extras), ahead_(ahead) {}

  // Returns false, with the weights of no use, if the references are unfit. `reference` [width] is chosen
  // from the first tile unless it is `ready`: integers near the largest score of that tile.
  bool run(long keys, DepthContiguous<E> a, const E* panel, long depth, S* reference, bool ready) {
    return prepare(keys, depth, reference, ready) && sweep_.run(keys, a, panel, depth, *this);
  }

  // The same where the last queries see all keys, and the first one the level ones, each one key more than
  // the one before it. The reference is chosen as if all were seen.
  bool run(const typename Sweep<V>::Stairs& keys, DepthContiguous<E> a, const E* panel, long depth,
           S* reference, bool ready) {
    level_ = keys.level;
    return prepare(keys.end[V::tile_vectors - 1], depth, reference, ready) &&
           sweep_.run(keys, a, panel, depth, *this);
  }

 private:
  friend class Sweep<V>;
  static constexpr bool takes_part_tiles = true;

  bool prepare(long keys, long depth, S* reference, bool ready) {
    if (!Sweep<V>::fits(keys, depth) || (ready && !exponents_.set(reference, factor_))) return false;
    for (int j = 0; j < V::depth * width; j += V::lanes) V::store(sums_ + j, V::zero());
    reference_ = ready ? nullptr : reference;
    return true;
  }

  INLINE void between() { ahead_.fetch_some(); }

  // References from the scores of the first tile; false if they are unfit, and then `reference_` is left
  // alone.
  INLINE bool begin(const S* product) {
    if (!reference_) return true;
    alignas(64) S chosen[width];
    for (int at = 0; at < width; at += V::lanes) {
      auto largest = score(product + at, 0, at);
      for (int i = 1; i < V::tile_rows; i++)
        largest = V::max(largest, score(product + i * width + at, i, at));
      V::store(chosen + at, nearest_integer<V>(V::mul(largest, V::set1(factor_))));
    }
    if (!exponents_.set(chosen, factor_)) return false;
    memcpy(reference_, chosen, sizeof chosen);
    return true;
  }

  template <int n>
  INLINE void unit(const S* product, long key, int at) {
    weigh<n, false>(product, key, at);
  }
  template <int n>
  INLINE void edge_unit(const S* product, long key, int at) {
    weigh<n, true>(product, key, at);
  }

  template <int n, bool on_edge>
  INLINE void weigh(const S* product, long key, int at) {
    typename V::vector x[n];
    UNROLL for (int i = 0; i < n; i++) x[i] = score(product + i * width, key + i, at);
    exp2_beside_products<V, degree>(x, factor_, exponents_.low + at, exponents_.high + at,
                                    exponents_.shift + at);
    if constexpr (has_extras)
      if (extras_.seen)
        UNROLL for (int i = 0; i < n; i++) x[i] =
            V::zero_unless(V::nonzero(extras_.seen + (key + i) * width + at), x[i]);
    if constexpr (on_edge)
      UNROLL for (int i = 0; i < n; i++) x[i] =
          V::zero_unless(V::lanes_from(key + i - level_ + 1 - at), x[i]);
    auto sum = x[0];
    if constexpr (n == 2) sum = V::add(sum, x[1]);
    S* const sums = sums_ + at;
    V::store(sums, V::add(V::load(sums), sum));
    E* const target = weights_ + key / V::depth * width + at;
    if constexpr (V::depth == 1) {
      UNROLL for (int i = 0; i < n; i++) V::store(target + i * width, x[i]);
    } else {
      const auto pair = V::pair(x[0], n == 2 ? x[n - 1] : V::zero());
      V::store(target, pair);
      V::store(sums + width, V::add_pairs(V::load(sums + width), pair));
    }
  }

  INLINE typename V::vector score(const S* product, long key, int at) const {
    const auto x = V::load(product);
    if constexpr (has_extras)
      if (extras_.bias)
        return V::fma(x, V::set1(extras_.multiplier), V::load(extras_.bias + key * width + at));
    return x;
  }

  Sweep<V> sweep_;
  E* const weights_;
  const S factor_;
  S* const sums_;
  const Extras<V> extras_;
  Ahead& ahead_;
  S* reference_ = nullptr;  // to be chosen
  long level_ = 0;          // keys that the panel's first query sees
  Exponents<V> exponents_;
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
