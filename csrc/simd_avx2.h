// Vectors of 256 bits (AVX2, FMA, F16C). See simd_avx512.h for what the operations mean.
#pragma once

#include <immintrin.h>

#include "problem.h"
#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

struct F32 {
  static constexpr int rows_beside_products = 1, step_bits = 0;
  static constexpr float rounding_shift = 12582912;  // 1.5 * 2^23
  using scalar = float;
  using element = float;
  using vector = __m256;
  using mask = __m256;
  static constexpr int lanes = 8;
  // 12 accumulators + 2 of B + 1 broadcast = 15 of 16 registers.
  static constexpr int tile_rows = 6, tile_vectors = 2;
  static constexpr int depth = 1;
  static constexpr int exp2_at_once = 4;

  INLINE static vector zero() { return _mm256_setzero_ps(); }
  INLINE static vector set1(float x) { return _mm256_set1_ps(x); }
  INLINE static mask first_lanes(long n) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int count = n > lanes ? lanes : n < 0 ? 0 : static_cast<int>(n);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), index));
  }
  INLINE static vector load(const float* p) { return _mm256_loadu_ps(p); }
  INLINE static vector load(const float* p, long n) {
    return _mm256_maskload_ps(p, _mm256_castps_si256(first_lanes(n)));
  }
  INLINE static vector load(const bf16* p) {
    return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  INLINE static vector load(const bf16* p, long n) { return widen_bf16(load_halves(p, n)); }
  INLINE static vector load(const fp16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  INLINE static vector load(const fp16* p, long n) { return _mm256_cvtph_ps(load_halves(p, n)); }
  INLINE static void store(float* p, vector v) { _mm256_storeu_ps(p, v); }
  INLINE static void store(float* p, vector v, long n) {
    _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(n)), v);
  }
  INLINE static void store(bf16* p, vector v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v));
  }
  INLINE static void store(bf16* p, vector v, long n) { store_halves(p, narrow_bf16(v), n); }
  // How many floats x lies above `from`, at most 2^15 away (for which 2^15 - 1 stands), and the way back.
  INLINE static void store_distance(bf16* p, vector x, vector from, long n = lanes) {
    const __m256i distance = _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_castps_si256(from));
    store_halves(p, _mm_packs_epi32(_mm256_castsi256_si128(distance), _mm256_extracti128_si256(distance, 1)),
                 n);
  }
  INLINE static vector add_distance(vector from, const bf16* p, long n = lanes) {
    const __m256i distance = _mm256_cvtepi16_epi32(load_halves(p, n));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(from), distance));
  }
  INLINE static void store(fp16* p, vector v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
  }
  INLINE static void store(fp16* p, vector v, long n) { store_halves(p, _mm256_cvtps_ph(v, 0), n); }

  INLINE static vector add(vector a, vector b) { return _mm256_add_ps(a, b); }
  INLINE static vector sub(vector a, vector b) { return _mm256_sub_ps(a, b); }
  INLINE static vector mul(vector a, vector b) { return _mm256_mul_ps(a, b); }
  INLINE static vector div(vector a, vector b) { return _mm256_div_ps(a, b); }
  INLINE static vector fma(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
  INLINE static vector fused(vector a, vector b, vector c) { return fma(a, b, c); }
  INLINE static vector fms(vector a, vector b, vector c) { return _mm256_fmsub_ps(a, b, c); }
  INLINE static vector max(vector a, vector b) { return _mm256_max_ps(a, b); }
  INLINE static vector min(vector a, vector b) { return _mm256_min_ps(a, b); }
  INLINE static float sum(vector v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  INLINE static float maximum(vector v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  INLINE static mask greater(vector a, vector b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  INLINE static mask not_less_equal(vector a, vector b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
  INLINE static mask lanes_from(long n) {
    return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_castps_si256(first_lanes(n)), _mm256_set1_epi32(-1)));
  }
  INLINE static mask nonzero(const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(bytes, _mm256_setzero_si256()));
  }
  INLINE static mask both(mask a, mask b) { return _mm256_and_ps(a, b); }
  INLINE static bool any(mask m) { return _mm256_movemask_ps(m) != 0; }
  INLINE static vector select(mask m, vector yes, vector no) { return _mm256_blendv_ps(no, yes, m); }
  INLINE static vector zero_unless(mask m, vector v) { return _mm256_and_ps(m, v); }

  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum, from where it is shifted into
  // the exponent. What lies below the normal numbers comes out denormal, which the engine flushes to zero.
  template <int degree, int n>
  INLINE static void exp2_each(vector (&x)[n]) {
    const vector magic = set1(12582912.0f);
    vector shifted[n], fraction[n], p[n];
    UNROLL for (int i = 0; i < n; i++) x[i] = _mm256_min_ps(set1(127.4f), _mm256_max_ps(set1(-126.5f), x[i]));
    UNROLL for (int i = 0; i < n; i++) shifted[i] = _mm256_add_ps(x[i], magic);
    UNROLL for (int i = 0; i < n; i++) fraction[i] = _mm256_sub_ps(x[i], _mm256_sub_ps(shifted[i], magic));
    exp2_fractions<F32, Centred<degree>>(fraction, p);
    UNROLL for (int i = 0; i < n; i++) {
      const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted[i]), 23);
      const vector nan = _mm256_cmp_ps(x[i], x[i], _CMP_UNORD_Q);  // its payload reaches the exponent
      x[i] = _mm256_or_ps(nan, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p[i]), exponent)));
    }
  }
  // p 2^n for the integer n in the low bits of t.
  INLINE static vector add_to_exponent(vector p, vector t) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
  }
  template <int degree = 5>
  INLINE static vector exp2(vector x) {
    vector one[1] = {x};
    exp2_each<degree>(one);
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(-126.0f), _CMP_LT_OQ), one[0]);
  }

  INLINE static vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  INLINE static vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }

  INLINE static void transpose(vector (&r)[lanes]) {
    vector t[lanes];
    UNROLL for (int i = 0; i < 4; i++) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
  }

 private:
  template <class H>
  INLINE static __m128i load_halves(const H* p, long n) {
    alignas(16) uint16_t buffer[lanes] = {};
    memcpy(buffer, p, 2 * (n > lanes ? lanes : n < 0 ? 0 : n));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
  }
  template <class H>
  INLINE static void store_halves(H* p, __m128i v, long n) {
    alignas(16) uint16_t buffer[lanes];
    _mm_store_si128(reinterpret_cast<__m128i*>(buffer), v);
    memcpy(p, buffer, 2 * (n > lanes ? lanes : n < 0 ? 0 : n));
  }
  INLINE static vector widen_bf16(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  INLINE static __m128i narrow_bf16(vector v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
};

struct F64 {
  static constexpr int rows_beside_products = 0;
  static constexpr double rounding_shift = 6755399441055744.0;  // 1.5 * 2^52
  using scalar = double;
  using element = double;
  using vector = __m256d;
  using mask = __m256d;
  static constexpr int lanes = 4;
  static constexpr int tile_rows = 6, tile_vectors = 2;
  static constexpr int depth = 1;
  static constexpr int exp2_at_once = 4;

  INLINE static vector zero() { return _mm256_setzero_pd(); }
  INLINE static vector set1(double x) { return _mm256_set1_pd(x); }
  INLINE static mask first_lanes(long n) {
    const long count = n > lanes ? lanes : n < 0 ? 0 : n;
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3)));
  }
  INLINE static vector load(const double* p) { return _mm256_loadu_pd(p); }
  INLINE static vector load(const double* p, long n) {
    return _mm256_maskload_pd(p, _mm256_castpd_si256(first_lanes(n)));
  }
  INLINE static vector load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  INLINE static vector load(const float* p, long n) {
    return _mm256_cvtps_pd(_mm256_castps256_ps128(F32::load(p, n > lanes ? lanes : n)));
  }
  INLINE static void store(double* p, vector v) { _mm256_storeu_pd(p, v); }
  INLINE static void store(double* p, vector v, long n) {
    _mm256_maskstore_pd(p, _mm256_castpd_si256(first_lanes(n)), v);
  }

  INLINE static vector add(vector a, vector b) { return _mm256_add_pd(a, b); }
  INLINE static vector sub(vector a, vector b) { return _mm256_sub_pd(a, b); }
  INLINE static vector mul(vector a, vector b) { return _mm256_mul_pd(a, b); }
  INLINE static vector div(vector a, vector b) { return _mm256_div_pd(a, b); }
  INLINE static vector fma(vector a, vector b, vector c) { return _mm256_fmadd_pd(a, b, c); }
  INLINE static vector fused(vector a, vector b, vector c) { return fma(a, b, c); }
  INLINE static vector fms(vector a, vector b, vector c) { return _mm256_fmsub_pd(a, b, c); }
  INLINE static vector max(vector a, vector b) { return _mm256_max_pd(a, b); }
  INLINE static vector min(vector a, vector b) { return _mm256_min_pd(a, b); }
  INLINE static double sum(vector v) {
    const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
  }
  INLINE static double maximum(vector v) {
    const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
  }

  INLINE static mask greater(vector a, vector b) { return _mm256_cmp_pd(a, b, _CMP_GT_OQ); }
  INLINE static mask not_less_equal(vector a, vector b) { return _mm256_cmp_pd(a, b, _CMP_NLE_UQ); }
  INLINE static mask lanes_from(long n) {
    return _mm256_castsi256_pd(_mm256_xor_si256(_mm256_castpd_si256(first_lanes(n)), _mm256_set1_epi64x(-1)));
  }
  INLINE static mask nonzero(const uint8_t* p) {
    int bytes;
    memcpy(&bytes, p, lanes);
    return _mm256_castsi256_pd(
        _mm256_cmpgt_epi64(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)), _mm256_setzero_si256()));
  }
  INLINE static mask both(mask a, mask b) { return _mm256_and_pd(a, b); }
  INLINE static bool any(mask m) { return _mm256_movemask_pd(m) != 0; }
  INLINE static vector select(mask m, vector yes, vector no) { return _mm256_blendv_pd(no, yes, m); }
  INLINE static vector zero_unless(mask m, vector v) { return _mm256_and_pd(m, v); }

  template <int = 0>
  INLINE static vector exp2(vector x) {
    const vector clamped = _mm256_min_pd(set1(1023.5), _mm256_max_pd(set1(-1022.0), x));
    const vector whole = _mm256_round_pd(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vector p = exp2_fraction_f64<F64>(_mm256_sub_pd(clamped, whole));
    const __m256i exponent = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(whole)), 52);
    const vector scaled = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(p), exponent));
    return _mm256_andnot_pd(_mm256_cmp_pd(x, set1(-1022.0), _CMP_LT_OQ), scaled);
  }

  template <int degree, int n>
  INLINE static void exp2_each(vector (&x)[n]) {
    UNROLL for (int i = 0; i < n; i++) x[i] = exp2<degree>(x[i]);
  }

  INLINE static vector broadcast(const double* p) { return _mm256_broadcast_sd(p); }
  INLINE static vector multiply_add(vector a, vector b, vector c) { return _mm256_fmadd_pd(a, b, c); }

  INLINE static void transpose(vector (&r)[lanes]) {
    const vector a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    const vector c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
