// Vectors of 512 bits. F32 and F64 are the vector types that every kernel is a template over; BF16Pair is
// the multiply-accumulate of bf16 pairs into fp32 lanes where there is an instruction for it.
#pragma once

#include <immintrin.h>

#include "problem.h"
#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

struct F32 {
  using scalar = float;
  using element = float;  // what the micro-kernel multiplies
  using vector = __m512;
  using mask = __mmask16;
  static constexpr int lanes = 16;
  // 24 accumulators + 4 of B + 1 broadcast = 29 of 32 registers.
  static constexpr int tile_rows = 6, tile_vectors = 4;
  static constexpr int depth = 1;  // values per element
  static constexpr int exp2_at_once = 8;

  INLINE static vector zero() { return _mm512_setzero_ps(); }
  INLINE static vector set1(float x) { return _mm512_set1_ps(x); }
  INLINE static mask first_lanes(long n) { return n >= lanes ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
  INLINE static vector load(const float* p) { return _mm512_loadu_ps(p); }
  INLINE static vector load(const float* p, long n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
  INLINE static vector load(const bf16* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  INLINE static vector load(const bf16* p, long n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  INLINE static vector load(const fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  INLINE static vector load(const fp16* p, long n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  INLINE static void store(float* p, vector v) { _mm512_storeu_ps(p, v); }
  INLINE static void store(float* p, vector v, long n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  INLINE static void store(bf16* p, vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
  }
  INLINE static void store(bf16* p, vector v, long n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(v));
  }
  // How many floats x lies above `from`, at most 2^15 away (for which 2^15 - 1 stands), and the way back.
  INLINE static void store_distance(bf16* p, vector x, vector from, long n = lanes) {
    const __m512i distance = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_castps_si512(from));
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtsepi32_epi16(distance));
  }
  INLINE static vector add_distance(vector from, const bf16* p, long n = lanes) {
    const __m512i distance = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(from), distance));
  }
  INLINE static void store(fp16* p, vector v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
  }
  INLINE static void store(fp16* p, vector v, long n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v, 0));
  }

  INLINE static vector add(vector a, vector b) { return _mm512_add_ps(a, b); }
  INLINE static vector sub(vector a, vector b) { return _mm512_sub_ps(a, b); }
  INLINE static vector mul(vector a, vector b) { return _mm512_mul_ps(a, b); }
  INLINE static vector div(vector a, vector b) { return _mm512_div_ps(a, b); }
  INLINE static vector fma(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
  // fma where it is the one rounding that matters, which an instruction set without the instruction has to
  // see to.
  INLINE static vector fused(vector a, vector b, vector c) { return fma(a, b, c); }
  INLINE static vector fms(vector a, vector b, vector c) { return _mm512_fmsub_ps(a, b, c); }
  // Like the instruction: the second operand wins when either is NaN.
  INLINE static vector max(vector a, vector b) { return _mm512_max_ps(a, b); }
  INLINE static vector min(vector a, vector b) { return _mm512_min_ps(a, b); }
  INLINE static float sum(vector v) { return _mm512_reduce_add_ps(v); }
  INLINE static float maximum(vector v) { return _mm512_reduce_max_ps(v); }

  INLINE static mask greater(vector a, vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  INLINE static mask not_less_equal(vector a, vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  INLINE static mask lanes_from(long n) { return 0xffffu << clamp(n, 0, lanes); }
  INLINE static mask nonzero(const uint8_t* p) {
    return _mm_test_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-1));
  }
  INLINE static mask both(mask a, mask b) { return a & b; }
  INLINE static bool any(mask m) { return m != 0; }
  INLINE static vector select(mask m, vector yes, vector no) { return _mm512_mask_mov_ps(no, m, yes); }
  INLINE static vector zero_unless(mask m, vector v) { return _mm512_maskz_mov_ps(m, v); }

  // 2^x for n vectors. -inf gives 0, NaN stays NaN.
  template <int degree, int n>
  INLINE static void exp2_each(vector (&x)[n]) {
    vector fraction[n], p[n];
    UNROLL for (int i = 0; i < n; i++) fraction[i] = _mm512_reduce_ps(x[i], 0x09);  // x - floor(x)
    exp2_fractions<F32, FromZero<degree>>(fraction, p);
    UNROLL for (int i = 0; i < n; i++) x[i] = _mm512_scalef_ps(p[i], x[i]);
  }
  static constexpr float rounding_shift = 12582912;  // 1.5 * 2^23
  static constexpr int rows_beside_products = 2;
  static constexpr int step_bits = 4;
  // 2^(n / 16) for the integer n in the low bits of t: its last bits choose from a table, the others are the
  // exponent, from which the table has taken what those last bits add to it.
  INLINE static vector exp2_of_steps(vector t) {
    alignas(64) static constexpr uint32_t table[] = {
        0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
        0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    const uint32_t* entries = table;
    asm("" : "+r"(entries));  // from memory: accumulators need the registers
    const __m512i n = _mm512_castps_si512(t);
    const __m512i power = _mm512_permutexvar_epi32(n, _mm512_load_si512(entries));
    return _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(n, 23 - step_bits)));
  }
  // p 2^n for the integer n in the low bits of t.
  INLINE static vector add_to_exponent(vector p, vector t) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
  }
  template <int degree = 5>
  INLINE static vector exp2(vector x) {
    vector one[1] = {x};
    exp2_each<degree>(one);
    return one[0];
  }

  INLINE static vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  INLINE static vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }

  // rows[i] lane j  <->  rows[j] lane i
  INLINE static void transpose(vector (&r)[lanes]) {
    vector t[lanes];
    UNROLL for (int i = 0; i < 8; i++) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
      UNROLL for (int j = 0; j < 2; j++) {
        const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
        r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    }
    UNROLL for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
  }

 protected:
  INLINE static vector widen_bf16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  INLINE static __m256i narrow_bf16(vector v) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    // Round to nearest even by adding 0x7fff + the lowest kept bit; a NaN keeps its top bits, made quiet.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  }
};

struct F64 {
  static constexpr int rows_beside_products = 0;
  static constexpr double rounding_shift = 6755399441055744.0;
  using scalar = double;
  using element = double;
  using vector = __m512d;
  using mask = __mmask8;
  static constexpr int lanes = 8;
  // A smaller tile than fp32's: enough to hide the latency, and half the code to compile.
  static constexpr int tile_rows = 6, tile_vectors = 2;
  static constexpr int depth = 1;
  static constexpr int exp2_at_once = 4;

  INLINE static vector zero() { return _mm512_setzero_pd(); }
  INLINE static vector set1(double x) { return _mm512_set1_pd(x); }
  INLINE static mask first_lanes(long n) { return n >= lanes ? 0xff : n <= 0 ? 0 : (1u << n) - 1; }
  INLINE static vector load(const double* p) { return _mm512_loadu_pd(p); }
  INLINE static vector load(const double* p, long n) { return _mm512_maskz_loadu_pd(first_lanes(n), p); }
  INLINE static vector load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  INLINE static vector load(const float* p, long n) {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(first_lanes(n), p));
  }
  INLINE static void store(double* p, vector v) { _mm512_storeu_pd(p, v); }
  INLINE static void store(double* p, vector v, long n) { _mm512_mask_storeu_pd(p, first_lanes(n), v); }

  INLINE static vector add(vector a, vector b) { return _mm512_add_pd(a, b); }
  INLINE static vector sub(vector a, vector b) { return _mm512_sub_pd(a, b); }
  INLINE static vector mul(vector a, vector b) { return _mm512_mul_pd(a, b); }
  INLINE static vector div(vector a, vector b) { return _mm512_div_pd(a, b); }
  INLINE static vector fma(vector a, vector b, vector c) { return _mm512_fmadd_pd(a, b, c); }
  INLINE static vector fused(vector a, vector b, vector c) { return fma(a, b, c); }
  INLINE static vector fms(vector a, vector b, vector c) { return _mm512_fmsub_pd(a, b, c); }
  INLINE static vector max(vector a, vector b) { return _mm512_max_pd(a, b); }
  INLINE static vector min(vector a, vector b) { return _mm512_min_pd(a, b); }
  INLINE static double sum(vector v) { return _mm512_reduce_add_pd(v); }
  INLINE static double maximum(vector v) { return _mm512_reduce_max_pd(v); }

  INLINE static mask greater(vector a, vector b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
  INLINE static mask not_less_equal(vector a, vector b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ); }
  INLINE static mask lanes_from(long n) { return 0xffu << clamp(n, 0, lanes); }
  INLINE static mask nonzero(const uint8_t* p) {
    return _mm_test_epi8_mask(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(-1));
  }
  INLINE static mask both(mask a, mask b) { return a & b; }
  INLINE static bool any(mask m) { return m != 0; }
  INLINE static vector select(mask m, vector yes, vector no) { return _mm512_mask_mov_pd(no, m, yes); }
  INLINE static vector zero_unless(mask m, vector v) { return _mm512_maskz_mov_pd(m, v); }

  template <int = 0>
  INLINE static vector exp2(vector x) {
    const vector fraction = _mm512_reduce_pd(x, 0x08);  // x - nearest integer
    const vector whole = _mm512_sub_pd(x, fraction);
    return _mm512_scalef_pd(exp2_fraction_f64<F64>(fraction), whole);
  }

  template <int degree, int n>
  INLINE static void exp2_each(vector (&x)[n]) {
    UNROLL for (int i = 0; i < n; i++) x[i] = exp2<degree>(x[i]);
  }

  INLINE static vector broadcast(const double* p) { return _mm512_set1_pd(*p); }
  INLINE static vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_pd(a, b, c); }

  INLINE static void transpose(vector (&r)[lanes]) {
    vector t[lanes];
    UNROLL for (int i = 0; i < 4; i++) {
      t[2 * i] = _mm512_unpacklo_pd(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_pd(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
      r[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
      r[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
      r[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
      r[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
  }
};

#ifdef FASTATTN_BF16_DOT
// Elements are pairs of bf16 in 32 bits: consecutive values of the summed dimension. The accumulators and
// everything around the products are F32's.
struct BF16Pair : F32 {
  using element = uint32_t;
  static constexpr int depth = 2;

  using F32::load;
  INLINE static vector load(const uint32_t* p) { return _mm512_loadu_ps(p); }
  // Rows of bf16 that are read in place may begin at an odd one.
  INLINE static vector broadcast(const uint32_t* p) {
    int pair;
    memcpy(&pair, p, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
#ifdef __AVX512BF16__
  INLINE static vector multiply_add(vector a, vector b, vector c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
#else
  // The instruction spelt out, to test this path on a machine without it.
  INLINE static vector multiply_add(vector a, vector b, vector c) {
    return _mm512_fmadd_ps(low_half(a), low_half(b), _mm512_fmadd_ps(high_half(a), high_half(b), c));
  }
#endif
  INLINE static vector low_half(vector pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
  }
  INLINE static vector high_half(vector pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(0xffff0000)));
  }
  // Two vectors rounded to bf16, one after the other.
  INLINE static __m512i halves(vector low, vector high) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#else
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16(low)), narrow_bf16(high), 1);
#endif
  }
  // Lane i of the result holds the pair (low[i], high[i]).
  INLINE static vector interleaved(__m512i halves) {
    const __m512i index = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23,
                                           7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, halves));
  }
  INLINE static vector pair(vector low, vector high) { return interleaved(halves(low, high)); }
  INLINE static void store_halves(bf16* low, bf16* high, __m512i halves) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm512_castsi512_si256(halves));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm512_extracti64x4_epi64(halves, 1));
  }
  // Adds both values of each pair: one instruction, like any product of pairs.
  INLINE static vector add_pairs(vector sum, vector pairs) {
    return multiply_add(pairs, _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80)), sum);
  }
  using F32::store;
  INLINE static void store(uint32_t* p, vector pairs) { _mm512_storeu_ps(p, pairs); }
};
#endif

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
