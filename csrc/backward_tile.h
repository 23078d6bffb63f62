// What happens to one panel of scores between the products: weights, dropout, score gradients, and the
// bias read and its gradient written. Rows are keys, lanes are queries.
#pragma once

#include "backward_operands.h"
#include "few_queries.h"
#include "softmax.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Queries across one panel of the transposed scores.
template <class V>
constexpr long panel_width = V::tile_vectors * V::lanes;

// A row major block of a panel.
template <class S>
struct Block {
  S* data;
  long stride;
  INLINE S* row(long i) const { return data + i * stride; }
};

// out[queries][keys] += the transpose of gradient [keys][panel], over whichever dimensions `out` keeps.
template <class V>
void add_transposed(Block<typename V::scalar> gradient, long queries, long keys, typename V::scalar* out,
                    long query_stride, long key_stride) {
  using vector = typename V::vector;
  constexpr long lanes = V::lanes;
  if (query_stride == 0) {
    for (long k = 0; k < keys; k++) {
      vector sum = V::zero();
      for (long q = 0; q < queries; q += lanes) {
        const vector values = V::load(gradient.row(k) + q);
        sum =
            V::add(sum, q + lanes <= queries ? values : V::zero_unless(V::first_lanes(queries - q), values));
      }
      out[k * key_stride] += V::sum(sum);
    }
    return;
  }
  for (long q = 0; q < queries; q += lanes) {
    for (long k = 0; k < keys; k += lanes) {
      vector block[lanes];
      UNROLL for (long i = 0; i < lanes; i++) block[i] =
          k + i < keys ? V::load(gradient.row(k + i) + q) : V::zero();
      V::transpose(block);
      UNROLL for (long i = 0; i < lanes; i++) {
        if (q + i < queries) {
          typename V::scalar* row = out + (q + i) * query_stride + k;
          store_some<V>(row, V::add(load_some<V>(row, keys - k), block[i]), keys - k);
        }
      }
    }
  }
}

// Products -> softmax weights exp(score - lse), in place. `reference` and `shift` are the query's Shift; bias
// [keys][panel] and allowed [keys][panel] are null where the template says so.
template <class V, bool has_bias, bool has_mask>
void weights_of(Block<typename V::scalar> scores, long keys, const typename V::scalar* reference,
                const typename V::scalar* shift, const ForwardScores<V>& units,
                const typename V::scalar* bias, const uint8_t* allowed) {
  using S = typename V::scalar;
  // A bias may have a gradient of its own dtype, which is more precise than the others.
  constexpr int degree = V::depth == 2 && !has_bias ? 3 : 5;
  constexpr long width = panel_width<V>;
  for (long k = 0; k < keys; k++) {
    UNROLL for (long q = 0; q < width; q += V::lanes) {
      if constexpr (has_mask) {
        if (!V::any(V::nonzero(allowed + k * width + q))) {
          V::store(scores.row(k) + q, V::zero());
          continue;
        }
      }
      typename V::vector x = V::load(scores.row(k) + q);
      if constexpr (has_bias) {
        const typename V::vector b = V::load(bias + k * width + q);
        x = V::max(V::set1(lowest_score<S>), V::fma(x, V::set1(units.units.multiplier), b));
        x = V::sub(x, V::load(reference + q));
        x = V::template exp2<degree>(V::fused(x, V::set1(units.units.factor), V::load(shift + q)));
        x = V::zero_unless(V::not_less_equal(b, V::set1(-Limits<S>::infinity)), x);
      } else {
        x = V::sub(x, V::load(reference + q));
        x = V::template exp2<degree>(V::fused(x, V::set1(units.product_factor), V::load(shift + q)));
      }
      if constexpr (has_mask) x = V::zero_unless(V::nonzero(allowed + k * width + q), x);
      V::store(scores.row(k) + q, x);
    }
  }
}

// Gives the weights that dropout drops a negative sign, by which the gradient pass knows them.
template <class V>
void mark_dropped(const Problem& problem, const Tile& tile, Block<typename V::scalar> weights) {
  const PhiloxKey key{static_cast<uint32_t>(problem.dropout_seed),
                      static_cast<uint32_t>(problem.dropout_seed >> 32)};
  const uint32_t threshold = static_cast<uint32_t>(problem.dropout_p * 4294967296.0);
  const uint32_t head = static_cast<uint32_t>(tile.batch * problem.query_heads + tile.head);
  for (long q = 0; q < panel_width<V>; q += V::lanes) {
    const PhiloxQueries<V::lanes> generator(key, static_cast<uint32_t>(problem.dropout_offset), head,
                                            static_cast<uint32_t>(tile.queries.begin + q));
    for (long quad = tile.keys.begin / 4; quad * 4 < tile.keys.end; quad++) {
      typename Words<V::lanes>::Vector word[4];
      generator.words(static_cast<uint32_t>(quad), word);
      UNROLL for (int i = 0; i < 4; i++) {
        const long k = quad * 4 + i - tile.keys.begin;
        if (k < 0 || k >= tile.keys.size()) continue;
        typename V::scalar* p = weights.row(k) + q;
        const typename V::vector w = V::load(p);
        V::store(p, V::select(at_least<V>(word[i], threshold), w, V::sub(V::zero(), w)));
      }
    }
  }
}

// dS = P * (M dP / (1 - p) - delta), from one vector each of P and dP. With dropout the weight comes in
// with its mark and leaves as M P.
template <class V, bool has_dropout, bool guarded>
INLINE typename V::vector score_gradient(typename V::vector& weight, typename V::vector product,
                                         typename V::vector delta, typename V::vector keep_scale) {
  typename V::vector p = weight;
  if constexpr (has_dropout) {
    const typename V::mask kept = V::not_less_equal(weight, V::zero());
    p = V::max(weight, V::sub(V::zero(), weight));
    product = V::zero_unless(kept, V::mul(product, keep_scale));
    weight = V::zero_unless(kept, weight);
  }
  const typename V::vector gradient = V::mul(p, V::sub(product, delta));
  // A forbidden key may hold NaN or infinity, and 0 * NaN would carry it on.
  if constexpr (guarded) return V::zero_unless(V::not_less_equal(p, V::zero()), gradient);
  return gradient;
}

// Products dO V^T -> score gradients, in place, and marked weights -> kept weights.
template <class V, bool has_dropout, bool guarded>
void score_gradients(Block<typename V::scalar> weights, Block<typename V::scalar> products, long keys,
                     const typename V::scalar* delta, typename V::scalar keep_scale) {
  for (long k = 0; k < keys; k++) {
    UNROLL for (long q = 0; q < panel_width<V>; q += V::lanes) {
      typename V::vector weight = V::load(weights.row(k) + q);
      const typename V::vector gradient = score_gradient<V, has_dropout, guarded>(
          weight, V::load(products.row(k) + q), V::load(delta + q), V::set1(keep_scale));
      if constexpr (has_dropout) V::store(weights.row(k) + q, weight);
      V::store(products.row(k) + q, gradient);
    }
  }
}

#ifdef FASTATTN_BF16_DOT
// What the last three products read of weights and score gradients in bf16: rows, which hold queries in
// pairs, and the gradients once more with keys in pairs, [ceil(keys / 2)][stride], for dQ.
struct GradientPairs {
  Block<bf16> weights, gradients;
  Block<uint32_t> key_pairs;

  // Of keys k and k + 1, for an even k.
  template <class V>
  INLINE void store(long k, long q, const typename V::vector (&weight)[2],
                    const typename V::vector (&gradient)[2]) const {
    V::store_halves(weights.row(k) + q, weights.row(k + 1) + q, V::halves(weight[0], weight[1]));
    const auto both = V::halves(gradient[0], gradient[1]);
    V::store_halves(gradients.row(k) + q, gradients.row(k + 1) + q, both);
    V::store(key_pairs.row(k / 2) + q, V::interleaved(both));
  }
};

// The same from fp32 scratch into bf16. With keeps_gradients they also replace the products, as the bias
// wants them.
template <class V, bool has_dropout, bool guarded>
void score_gradients_pairs(Block<float> weights, Block<float> products, long keys, const float* delta,
                           float keep_scale, bool keeps_gradients, const GradientPairs& out) {
  for (long k = 0; k < keys; k += 2) {
    UNROLL for (long q = 0; q < panel_width<V>; q += V::lanes) {
      typename V::vector weight[2] = {}, gradient[2] = {};
      UNROLL for (long i = 0; i < 2; i++) {
        if (k + i == keys) break;
        weight[i] = V::load(weights.row(k + i) + q);
        gradient[i] = score_gradient<V, has_dropout, guarded>(weight[i], V::load(products.row(k + i) + q),
                                                              V::load(delta + q), V::set1(keep_scale));
        if (keeps_gradients) V::store(products.row(k + i) + q, gradient[i]);
      }
      out.template store<V>(k, q, weight, gradient);
    }
  }
}
#endif

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
