// Vectors of 128 bits written on the compiler's vector extensions: any machine that GCC or Clang knows.
// See simd_avx512.h for what the operations mean.
#pragma once

#include <type_traits>

#include "problem.h"
#include "simd_common.h"

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// The operations that need no instruction of their own, for a scalar type S and an integer I of its size.
template <class S, class I>
struct Extension {
  using scalar = S;
  using element = S;
  static constexpr int lanes = 16 / sizeof(S);
  // 12 accumulators + 2 of B + 1 broadcast = 15 of SSE's 16 registers.
  static constexpr int tile_rows = 6, tile_vectors = 2;
  static constexpr int depth = 1;
  static constexpr int exp2_at_once = 4;
  typedef S vector __attribute__((vector_size(16)));
  typedef I mask __attribute__((vector_size(16)));
  // What wraps around where a sum of bits leaves its range, as one with those of a NaN does.
  typedef std::make_unsigned_t<I> bits __attribute__((vector_size(16)));

  INLINE static vector zero() { return vector{}; }
  INLINE static vector set1(S x) { return x - vector{}; }
  INLINE static mask first_lanes(long n) {
    mask m;
    UNROLL for (int i = 0; i < lanes; i++) m[i] = i < n ? -1 : 0;
    return m;
  }
  INLINE static mask lanes_from(long n) { return ~first_lanes(n); }
  INLINE static vector load(const S* p) {
    vector v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  INLINE static vector load(const S* p, long n) {
    vector v = zero();
    memcpy(&v, p, sizeof(S) * count(n));
    return v;
  }
  INLINE static void store(S* p, vector v) { memcpy(p, &v, sizeof v); }
  INLINE static void store(S* p, vector v, long n) { memcpy(p, &v, sizeof(S) * count(n)); }

  INLINE static vector add(vector a, vector b) { return a + b; }
  INLINE static vector sub(vector a, vector b) { return a - b; }
  INLINE static vector mul(vector a, vector b) { return a * b; }
  INLINE static vector div(vector a, vector b) { return a / b; }
  INLINE static vector fma(vector a, vector b, vector c) { return a * b + c; }
  INLINE static vector fms(vector a, vector b, vector c) { return a * b - c; }
  INLINE static vector max(vector a, vector b) { return a > b ? a : b; }
  INLINE static vector min(vector a, vector b) { return a < b ? a : b; }
  INLINE static S sum(vector v) {
    S total = v[0];
    UNROLL for (int i = 1; i < lanes; i++) total += v[i];
    return total;
  }
  INLINE static S maximum(vector v) {
    S largest = v[0];
    UNROLL for (int i = 1; i < lanes; i++) largest = v[i] > largest ? v[i] : largest;
    return largest;
  }

  INLINE static mask greater(vector a, vector b) { return a > b; }
  INLINE static mask not_less_equal(vector a, vector b) { return ~(a <= b); }
  INLINE static mask nonzero(const uint8_t* p) {
    mask m;
    UNROLL for (int i = 0; i < lanes; i++) m[i] = p[i] ? -1 : 0;
    return m;
  }
  INLINE static mask both(mask a, mask b) { return a & b; }
  INLINE static bool any(mask m) {
    uint64_t halves[2];
    memcpy(halves, &m, sizeof halves);
    return (halves[0] | halves[1]) != 0;
  }
  INLINE static vector select(mask m, vector yes, vector no) { return m ? yes : no; }
  INLINE static vector zero_unless(mask m, vector v) { return (vector)((mask)v & m); }

  INLINE static vector broadcast(const S* p) { return set1(*p); }
  INLINE static vector multiply_add(vector a, vector b, vector c) { return a * b + c; }

  INLINE static void transpose(vector (&r)[lanes]) {
    S t[lanes][lanes];
    UNROLL for (int i = 0; i < lanes; i++) store(t[i], r[i]);
    UNROLL for (int i = 0; i < lanes; i++) UNROLL for (int j = 0; j < lanes; j++) r[i][j] = t[j][i];
  }

 protected:
  INLINE static long count(long n) { return n > lanes ? lanes : n < 0 ? 0 : n; }

  // Splits lowest <= x <= highest into the nearest integer, returned shifted into the exponent field, and a
  // fraction in [-1/2, 1/2]. Adding 1.5 * 2^mantissa leaves the integer in the low bits of the sum.
  template <int mantissa_bits>
  INLINE static bits split(vector x, vector& fraction) {
    const vector magic = set1(static_cast<S>(1.5) * static_cast<S>(I{1} << mantissa_bits));
    const vector shifted = x + magic;
    fraction = x - (shifted - magic);
    return ((bits)shifted - (bits)magic) << mantissa_bits;
  }
  // p 2^n for n in the exponent field; 0 where x is below the exponents of normal numbers, and NaN where it
  // is one, whose payload reaches the exponent.
  INLINE static vector scaled(vector p, bits n, vector x, S least) {
    return (vector)(((mask)((bits)p + n) & ~(x < set1(least))) | (x != x));
  }
};

struct F32 : Extension<float, int32_t> {
  static constexpr int rows_beside_products = 0;
  static constexpr float rounding_shift = 12582912;  // 1.5 * 2^23
  INLINE static vector fused(vector a, vector b, vector c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fma(a, b, c);
#else
    typedef double doubles __attribute__((vector_size(8 * lanes)));
    const auto product = __builtin_convertvector(a, doubles) * __builtin_convertvector(b, doubles);
    return __builtin_convertvector(product + __builtin_convertvector(c, doubles), vector);
#endif
  }
  using Extension::load;
  using Extension::store;
  INLINE static vector load(const bf16* p) {
    vector v;
    UNROLL for (int i = 0; i < lanes; i++) v[i] = widen(p[i]);
    return v;
  }
  INLINE static vector load(const bf16* p, long n) {
    vector v = zero();
    for (long i = 0; i < count(n); i++) v[i] = widen(p[i]);
    return v;
  }
  INLINE static vector load(const fp16* p) {
    mask half;
    UNROLL for (int i = 0; i < lanes; i++) half[i] = p[i].bits;
    return widen_fp16(half);
  }
  INLINE static vector load(const fp16* p, long n) {
    mask half = mask{};
    for (long i = 0; i < count(n); i++) half[i] = p[i].bits;
    return widen_fp16(half);
  }
  INLINE static void store(bf16* p, vector v) { store(p, v, lanes); }
  INLINE static void store(bf16* p, vector v, long n) {
    for (long i = 0; i < count(n); i++) p[i].bits = narrow_bf16(v[i]);
  }
  // How many floats x lies above `from`, at most 2^15 away (for which 2^15 - 1 stands), and the way back.
  INLINE static void store_distance(bf16* p, vector x, vector from, long n = lanes) {
    const mask distance = (mask)((bits)x - (bits)from), most = mask{} + 0x7fff;
    const mask bounded = distance > most ? most : distance;
    for (long i = 0; i < count(n); i++) p[i].bits = static_cast<uint16_t>(bounded[i]);
  }
  INLINE static vector add_distance(vector from, const bf16* p, long n = lanes) {
    mask distance = mask{};
    for (long i = 0; i < count(n); i++) distance[i] = static_cast<int16_t>(p[i].bits);
    return (vector)((bits)from + (bits)distance);
  }
  INLINE static void store(fp16* p, vector v) { store(p, v, lanes); }
  INLINE static void store(fp16* p, vector v, long n) {
    const mask half = narrow_fp16(v);
    for (long i = 0; i < count(n); i++) p[i].bits = static_cast<uint16_t>(half[i]);
  }

  template <int degree = 5>
  INLINE static vector exp2(vector x) {
    // The order of the operands keeps NaN.
    const vector clamped = min(set1(127.4f), max(set1(-126.0f), x));
    vector fraction[1], p[1];
    const bits exponent = split<23>(clamped, fraction[0]);
    exp2_fractions<F32, Centred<degree>>(fraction, p);
    return scaled(p[0], exponent, x, -126.0f);
  }
  template <int degree, int n>
  INLINE static void exp2_each(vector (&x)[n]) {
    UNROLL for (int i = 0; i < n; i++) x[i] = exp2<degree>(x[i]);
  }

 private:
  // By integers and normal numbers alone: in fp32's layout a subnormal half is one that is flushed to zero.
  INLINE static vector widen_fp16(mask half) {
    const bits sign = ((bits)half & 0x8000) << 16;
    const mask magnitude = half & 0x7fff, moved = magnitude << 13;
    const mask subnormal =
        (mask)((vector)(magnitude | (mask)set1(0.5f)) - set1(0.5f));  // 0.5 has an ulp of 2^-24
    mask single = magnitude < 0x400 ? subnormal : moved + (112 << 23);
    single = magnitude >= 0x7c00 ? moved | 0x7f800000 : single;
    return (vector)(sign | (bits)single);
  }
  // Round to nearest even at the half's precision by adding and removing a power of two, then rebias.
  INLINE static mask narrow_fp16(vector v) {
    const mask sign = ((mask)v >> 16) & 0x8000, magnitude = (mask)v & 0x7fffffff;
    const bits rounded = ((bits)magnitude + 0xfff + (((bits)magnitude >> 13) & 1)) >> 13;
    const mask subnormal = (mask)((vector)magnitude + set1(0.5f)) - (mask)set1(0.5f);
    mask half = magnitude < 0x38800000 ? subnormal : (mask)(rounded - (112 << 10));
    half = magnitude >= 0x477ff000 ? mask{} + 0x7c00 : half;
    half = magnitude > 0x7f800000 ? mask{} + 0x7e00 : half;
    return sign | half;
  }
};

struct F64 : Extension<double, int64_t> {
  static constexpr int rows_beside_products = 0;
  static constexpr double rounding_shift = 6755399441055744.0;  // 1.5 * 2^52
  INLINE static vector fused(vector a, vector b, vector c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fma(a, b, c);
#else
    // Eleven bits more than a double has, on x86.
    vector v;
    UNROLL for (int i = 0; i < lanes; i++) v[i] =
        static_cast<double>(static_cast<long double>(a[i]) * b[i] + c[i]);
    return v;
#endif
  }
  using Extension::load;
  INLINE static vector load(const float* p) {
    vector v;
    UNROLL for (int i = 0; i < lanes; i++) v[i] = p[i];
    return v;
  }
  INLINE static vector load(const float* p, long n) {
    vector v = zero();
    for (long i = 0; i < count(n); i++) v[i] = p[i];
    return v;
  }

  template <int = 0>
  INLINE static vector exp2(vector x) {
    const vector clamped = min(set1(1023.5), max(set1(-1022.0), x));
    vector fraction;
    const bits exponent = split<52>(clamped, fraction);
    return scaled(exp2_fraction_f64<F64>(fraction), exponent, x, -1022.0);
  }
  template <int degree, int n>
  INLINE static void exp2_each(vector (&x)[n]) {
    UNROLL for (int i = 0; i < n; i++) x[i] = exp2<degree>(x[i]);
  }
};

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
