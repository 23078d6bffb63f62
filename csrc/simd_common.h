// What the vector types of all instruction sets share.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "problem.h"

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace fastattn {
namespace FASTATTN_ISA_NAMESPACE {

// Own min/max: an inline std:: function compiled here with wide vectors could be the copy that the linker
// keeps for code that must run on a machine without them.
template <class T>
INLINE constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
INLINE constexpr T max(T a, T b) {
  return a < b ? b : a;
}
INLINE constexpr long clamp(long n, long least, long most) { return max(least, min(n, most)); }
INLINE constexpr long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE constexpr long ceil_div(long n, long divisor) { return (n + divisor - 1) / divisor; }

// Minimax polynomials of 2^f, the highest power first, with relative errors of at most
//
//   degree 5   1.5e-7
//   degree 4   2.7e-6 about 0; 3.4e-6 from 0, exact at both ends, where scores lie that are all but equal
//   degree 3   9.4e-5 and 1.8e-4, exact at 0 and 0 on average: for weights alone that are rounded to 16 bits
template <int degree>
struct FromZero;  // f in [0, 1)
template <>
struct FromZero<3> {
  static constexpr float coefficient[] = {7.742989577e-02f, 2.271328225e-01f, 6.952500436e-01f, 1.0f};
};
template <>
struct FromZero<4> {
  static constexpr float coefficient[] = {1.355574746e-02f, 5.203237012e-02f, 2.413797677e-01f,
                                          6.930321455e-01f, 1.0f};
};
template <>
struct FromZero<5> {
  static constexpr float coefficient[] = {1.877576676e-03f, 8.989340089e-03f, 5.582631806e-02f,
                                          2.401536170e-01f, 6.931530732e-01f, 9.999999251e-01f};
};
template <int degree>
struct Centred;  // |f| <= 1/2
template <>
struct Centred<3> {
  static constexpr float coefficient[] = {5.200957988e-02f, 2.418633740e-01f, 6.939748337e-01f, 1.0f};
};
template <>
struct Centred<4> {
  static constexpr float coefficient[] = {9.570102207e-03f, 5.591785908e-02f, 2.402474433e-01f,
                                          6.931217909e-01f, 9.999992847e-01f};
};
template <>
struct Centred<5> {
  static constexpr float coefficient[] = {1.327647199e-03f, 9.675541334e-03f, 5.550713274e-02f,
                                          2.402211972e-01f, 6.931469671e-01f, 1.000000072e+00f};
};

// (2^f - 1) / f, |f| <= 1/32: relative errors of 2^f of 4.3e-7 and 1.6e-9, none at 0 and on average.
template <int degree>
struct Stepped;
template <>
struct Stepped<2> {
  static constexpr float coefficient[] = {2.402264327e-01f, 6.931877136e-01f};
};
template <>
struct Stepped<3> {
  static constexpr float coefficient[] = {5.550213531e-02f, 2.402342856e-01f, 6.931471825e-01f};
};

// p = 2^f for n vectors at once, each step for all of them: the scheduler's window is too small to find the
// independent steps of chains that are written one after the other.
template <class V, class Polynomial, int n>
INLINE void exp2_fractions(const typename V::vector (&f)[n], typename V::vector (&p)[n]) {
  constexpr int degree = sizeof(Polynomial::coefficient) / sizeof(float) - 1;
  const float* const c = Polynomial::coefficient;
  UNROLL for (int i = 0; i < n; i++) p[i] = V::fma(V::set1(c[0]), f[i], V::set1(c[1]));
  UNROLL for (int k = 2; k <= degree; k++) UNROLL for (int i = 0; i < n; i++) p[i] =
      V::fma(p[i], f[i], V::set1(c[k]));
}

// 2^f for |f| <= 1/2 in double: the Taylor series of exp(f ln 2); the 14th term is below 2^-57.
template <class V>
INLINE typename V::vector exp2_fraction_f64(typename V::vector f) {
  constexpr double coefficient[] = {1.36914888539041241e-12, 2.56784359934881958e-11, 4.44553827187081007e-10,
                                    7.05491162080112088e-09, 1.01780860092396960e-07, 1.32154867901443053e-06,
                                    1.52527338040598377e-05, 1.54035303933816061e-04, 1.33335581464284411e-03,
                                    9.61812910762847688e-03, 5.55041086648215762e-02, 2.40226506959100694e-01,
                                    6.93147180559945286e-01, 1.00000000000000000e+00};
  typename V::vector p = V::set1(coefficient[0]);
  UNROLL for (int i = 1; i < 14; i++) p = V::fma(p, f, V::set1(coefficient[i]));
  return p;
}

// log2 of positive normal numbers (inf and NaN stay), by the lane: x = 2^e m with m in [sqrt(1/2), sqrt(2)),
// and log2(m) = 2/ln(2) artanh(z) with z = (m - 1) / (m + 1), as a series that stops below the rounding
// error.
template <class V>
INLINE typename V::vector log2_of(typename V::vector x) {
  using S = typename V::scalar;
  constexpr bool wide = sizeof(S) == 8;
  using Integer = std::conditional_t<wide, int64_t, int32_t>;
  typedef Integer integers __attribute__((vector_size(sizeof(x))));
  typedef S scalars __attribute__((vector_size(sizeof(x))));
  constexpr Integer sqrt_half = wide ? static_cast<Integer>(0x3fe6a09e667f3bcdll) : 0x3f3504f3;
  constexpr int mantissa_bits = wide ? 52 : 23, last_term = wide ? 23 : 9;
  const integers shifted = (integers)x - sqrt_half;
  const auto exponent = (typename V::vector) __builtin_convertvector(shifted >> mantissa_bits, scalars);
  const integers mantissa = (shifted & ((Integer{1} << mantissa_bits) - 1)) + sqrt_half;
  const auto m = (typename V::vector)mantissa, one = V::set1(1), z = V::div(V::sub(m, one), V::add(m, one));
  const auto square = V::mul(z, z);
  auto series = V::set1(S(1) / last_term);
  UNROLL for (int n = last_term - 2; n > 0; n -= 2) series = V::fma(series, square, V::set1(S(1) / n));
  const auto result = V::fma(V::mul(z, V::set1(static_cast<S>(2.8853900817779268))), series, exponent);
  return V::select(V::not_less_equal(x, V::set1(std::numeric_limits<S>::max())), x, result);
}

INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
INLINE uint16_t narrow_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  if (f != f) return static_cast<uint16_t>((bits | 0x400000) >> 16);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace FASTATTN_ISA_NAMESPACE
}  // namespace fastattn
