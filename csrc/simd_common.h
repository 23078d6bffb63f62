// What the vector types of all instruction sets share.
#pragma once

#include <cstdint>
#include <cstring>

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
INLINE constexpr long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE constexpr long ceil_div(long n, long divisor) { return (n + divisor - 1) / divisor; }

// 2^f for f in [0, 1): minimax polynomials (Remez on the relative error).
template <class V, int degree>
INLINE typename V::vector exp2_fraction(typename V::vector f) {
  static_assert(degree == 3 || degree == 5, "");
  typename V::vector p;
  if constexpr (degree == 3) {
    p = V::set1(7.802452264e-02f);
    p = V::fma(p, f, V::set1(2.260671554e-01f));
    p = V::fma(p, f, V::set1(6.958335405e-01f));
    return V::fma(p, f, V::set1(9.999252186e-01f));
  } else {
    p = V::set1(1.877576676e-03f);
    p = V::fma(p, f, V::set1(8.989340089e-03f));
    p = V::fma(p, f, V::set1(5.582631806e-02f));
    p = V::fma(p, f, V::set1(2.401536170e-01f));
    p = V::fma(p, f, V::set1(6.931530732e-01f));
    return V::fma(p, f, V::set1(9.999999251e-01f));
  }
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
