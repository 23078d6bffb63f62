// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011), for dropout.
//
// Element (b, h, i, j) of the score matrix has counter (j / 4, i, b * Hq + h, offset) under the key
// (seed low, seed high) and uses output word j mod 4.  Lanes are queries, so one evaluation of kLanes
// counters covers kLanes queries x 4 consecutive keys.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

struct PhiloxKey {
  uint32_t low;   // seed, low half
  uint32_t high;  // seed, high half
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

INLINE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

template <class T, int kLanes>
struct LaneVector {
  using Type [[gnu::vector_size(sizeof(T) * kLanes)]] = T;
};

template <int kLanes>
struct Words {
  using Vector = typename LaneVector<uint32_t, kLanes>::Type;
  using Wide = typename LaneVector<uint64_t, kLanes>::Type;

  INLINE static Vector broadcast(uint32_t x) { return Vector{} + x; }

  // The 64-bit products of every lane with one factor, as halves.
  INLINE static void multiply(Vector x, uint32_t factor, Vector& high, Vector& low) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {
      const __m512i a = (__m512i)x, m = _mm512_set1_epi32(static_cast<int>(factor));
      const __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
      low = (Vector)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, static_cast<_MM_PERM_ENUM>(0xA0));
      high = (Vector)_mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xF5));
      return;
    }
#endif
#if defined(__AVX2__)
    if constexpr (kLanes == 8) {
      const __m256i a = (__m256i)x, m = _mm256_set1_epi32(static_cast<int>(factor));
      const __m256i even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
      low = (Vector)_mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
      high = (Vector)_mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xF5), odd, 0xAA);
      return;
    }
#endif
    const Wide product = __builtin_convertvector(x, Wide) * static_cast<uint64_t>(factor);
    low = __builtin_convertvector(product, Vector);
    high = __builtin_convertvector(product >> 32, Vector);
  }
};

// Lanes whose word is at least the threshold, as the mask of the vector type V.
template <class V>
INLINE typename V::mask at_least(typename Words<V::lanes>::Vector word, uint32_t threshold) {
#if defined(__AVX512F__)
  if constexpr (V::lanes == 16)
    return _mm512_cmpge_epu32_mask((__m512i)word, _mm512_set1_epi32(static_cast<int>(threshold)));
  else
    return _mm256_cmpge_epu32_mask((__m256i)word, _mm256_set1_epi32(static_cast<int>(threshold)));
#else
  using Integer = std::conditional_t<sizeof(typename V::scalar) == 8, int64_t, int32_t>;
  return (typename V::mask) __builtin_convertvector(word >= Words<V::lanes>::broadcast(threshold),
                                                    typename LaneVector<Integer, V::lanes>::Type);
#endif
}

// The generator for kLanes consecutive queries of one head.
//
// Only counter word 1 differs between lanes, and only word 0 between keys, so the first round is
// scalar, the product of the second is the same for every key (kept here), and the third needs one
// vector product: 15 vector products per evaluation instead of 20.
template <int kLanes>
class PhiloxQueries {
 public:
  using Vector = typename Words<kLanes>::Vector;

  // head is b * Hq + h; the lanes are queries first_query, first_query + 1, ...
  PhiloxQueries(PhiloxKey key, uint32_t offset, uint32_t head, uint32_t first_query)
      : key_(key), offset_(offset), low1_(kPhiloxMultiplier1 * head) {
    Vector query;
    for (int lane = 0; lane < kLanes; ++lane) query[lane] = first_query + static_cast<uint32_t>(lane);
    const Vector word0 = query ^ (multiply_high(kPhiloxMultiplier1, head) ^ key.low);
    Words<kLanes>::multiply(word0, kPhiloxMultiplier0, second_high_, second_low_);
  }

  // The words of keys 4 * key_quad .. 4 * key_quad + 3.
  INLINE void words(uint32_t key_quad, Vector (&word)[4]) const {
    using W = Words<kLanes>;
    uint32_t low = key_.low + kPhiloxWeyl0, high = key_.high + kPhiloxWeyl1;
    // After round 1: (vector kept in second_*, low1_, word2, word3); round 2 splits likewise.
    const uint32_t word2 = multiply_high(kPhiloxMultiplier0, key_quad) ^ offset_ ^ key_.high;
    const uint32_t word3 = kPhiloxMultiplier0 * key_quad;
    const uint32_t scalar0 = multiply_high(kPhiloxMultiplier1, word2) ^ low1_ ^ low;
    const uint32_t scalar1 = kPhiloxMultiplier1 * word2;
    const Vector vector2 = second_high_ ^ (word3 ^ high);
    low += kPhiloxWeyl0;
    high += kPhiloxWeyl1;
    // Round 3.
    Vector product_high, product_low;
    W::multiply(vector2, kPhiloxMultiplier1, product_high, product_low);
    word[0] = product_high ^ (scalar1 ^ low);
    word[1] = product_low;
    word[2] = second_low_ ^ (multiply_high(kPhiloxMultiplier0, scalar0) ^ high);
    word[3] = W::broadcast(kPhiloxMultiplier0 * scalar0);
#pragma GCC unroll 8
    for (int round = 3; round < kPhiloxRounds; ++round) {
      low += kPhiloxWeyl0;
      high += kPhiloxWeyl1;
      Vector high0, low0, high1, low1;
      W::multiply(word[0], kPhiloxMultiplier0, high0, low0);
      W::multiply(word[2], kPhiloxMultiplier1, high1, low1);
      word[0] = high1 ^ word[1] ^ W::broadcast(low);
      word[1] = low1;
      word[2] = high0 ^ word[3] ^ W::broadcast(high);
      word[3] = low0;
    }
  }

 private:
  PhiloxKey key_;
  uint32_t offset_, low1_;
  Vector second_high_, second_low_;  // the halves of round 2's product with word 0
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
