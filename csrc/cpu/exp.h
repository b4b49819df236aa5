// exp and tanh of a vector, for code that is compiled once per instruction set.
#pragma once

#include <initializer_list>

#include "simd.h"

namespace papo {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kLowest = -88.02969193111305f;  // -127 ln 2

// e^y for y <= 88, within 1.5 ulp. It is exactly 1 at 0, and exactly 0 from -127 ln 2 down. y is
// clamped there too, so that its product with e^y is finite. Between -127 and -126 ln 2 the result
// is subnormal: zero in the mode that the kernels run in.
#if defined(PAPO_ISA_AVX512)
// y = k/32 ln 2 + f. 2^(k/32) comes from a table, which fits in two registers and takes one
// permutation; e^f from a minimax quadratic, good to 5.3e-8 for |f| <= ln 2 / 64. A polynomial
// alone takes two multiplications more. Entry j is the bit pattern of 2^(j/32) less j << 18: adding
// k << 18 to it sets the exponent, and cancels the low five bits of k.
alignas(64) constexpr uint32_t kExp2Table[32] = {
    0x3f800000u, 0x3f7ecd87u, 0x3f7daac3u, 0x3f7c980fu, 0x3f7b95c2u, 0x3f7aa43au, 0x3f79c3d3u,
    0x3f78f4f0u, 0x3f7837f0u, 0x3f778d3au, 0x3f76f532u, 0x3f767043u, 0x3f75fed7u, 0x3f75a15bu,
    0x3f75583fu, 0x3f7523f6u, 0x3f7504f3u, 0x3f74fbafu, 0x3f7508a4u, 0x3f752c4du, 0x3f75672au,
    0x3f75b9beu, 0x3f76248cu, 0x3f76a81eu, 0x3f7744fdu, 0x3f77fbb8u, 0x3f78ccdfu, 0x3f79b907u,
    0x3f7ac0c7u, 0x3f7be4bau, 0x3f7d257du, 0x3f7e83b3u};

// Clamps y, returns the table's part of e^y, and leaves the rest to f.
PAPO_HD F32 exp_parts(F32& y, F32& f) {
  constexpr float kRound = 393216.0f;  // 1.5 * 2^18: adding it rounds to a multiple of 1/32
  y = max_keep_nan(splat(kLowest, F32{}), y);
  const F32 shifted = fma(y, splat(kLog2E, F32{}), kRound);
  f = fma(shifted - kRound, splat(-kLn2, F32{}), y);
  const __m512i entry =
      _mm512_permutex2var_epi32(_mm512_load_si512(kExp2Table), (__m512i)shifted,
                                _mm512_load_si512(kExp2Table + 16));
  return (F32)((I32)entry + ((I32)shifted << 18));
}

PAPO_HD F32 exp_of(F32& y) {
  F32 f;
  const F32 t = exp_parts(y, f);
  const F32 q = fma(f, splat(0.49999997f, F32{}), 1.0000147f);
  return fma(t * f, q, t);
}

// e^y without the square of f, for results that are rounded to bfloat16. Multiplied by kCoarse it
// is good to 2.94e-5, a hundredth of that rounding.
PAPO_HD F32 exp_coarse(F32& y) {
  F32 f;
  const F32 t = exp_parts(y, f);
  return fma(t, f, t);
}
constexpr double kCoarse = 1.0 + 2.94e-5;
#else
PAPO_HD F32 exp_of(F32& y) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  y = max_keep_nan(splat(kLowest, F32{}), y);
  const F32 shifted = fma(y, splat(kLog2E, F32{}), kRound);
  const F32 k = shifted - kRound;
#if defined(PAPO_ISA_AVX2)
  const F32 f = fma(k, splat(-kLn2, F32{}), y);
#else
  const F32 f = (y - k * 0.693359375f) - k * -2.12194440e-4f;
#endif
  // Minimax in the relative error, 9.2e-8, with a constant term of 1.
  F32 p = splat(8.290311321616173e-3f, F32{});
  for (float c : {4.189784452319145e-2f, 1.6667641699314117e-1f, 4.9999150633811950e-1f,
                  9.9999970197677612e-1f, 1.0f}) {
    p = fma(p, f, c);
  }
  // At kLowest f is just below 0 and p just below 1, which puts the sum below the bits of 0.
  return (F32)max_of((I32)p + ((I32)shifted << 23), I32{});
}

PAPO_HD F32 exp_coarse(F32& y) { return exp_of(y); }
constexpr double kCoarse = 1.0;
#endif

// e^y for y <= 709: 1 ulp, and exactly 0 below -708. Before rounding the relative error is 2e-16.
PAPO_HD F64 exp_of(F64& y) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const F64 low = splat(-708.0, F64{});
  y = max_keep_nan(low, y);
  const F64 shifted = fma(y, splat(1.44269504088896340736, F64{}), kRound);
  const F64 n = shifted - kRound;
  const F64 r = (y - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  // Taylor to r^13 on |r| <= ln2 / 2.
  F64 p = splat(1.0 / 6227020800.0, F64{});
  for (double c : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                   1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0,
                   0.5, 1.0, 1.0}) {
    p = fma(p, r, c);
  }
  const I64 e = (I64)p + ((I64)shifted << 52);
  return (F64)(e & ~(I64)(y == low));
}

// tanh to about 1 ulp: an odd polynomial near 0, and 1 - 2 / (e^2x + 1) beyond.
PAPO_HD F32 tanh_of(F32 x) {
  const I32 sign = (I32)x & (I32)(U32{} + 0x80000000u);
  const F32 a = (F32)((I32)x ^ sign);
  const F32 x2 = a * a;
  F32 p = splat(-5.70498872745e-3f, F32{});
  for (float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) {
    p = fma(p, x2, c);
  }
  const F32 near_zero = fma(p, x2 * a, a);
  F32 y = 2.0f * (a > 20.0f ? splat(20.0f, F32{}) : a);
  const F32 far = 1.0f - 2.0f / (exp_of(y) + 1.0f);
  const I32 is_near = a < 0.625f;
  const I32 t = ((I32)near_zero & is_near) | ((I32)far & ~is_near);
  return (F32)(t | sign);
}
PAPO_HD F64 tanh_of(F64 x) {
  for (int i = 0; i < lanes<F64>(); ++i) x[i] = ::tanh(x[i]);
  return x;
}

}  // namespace
}  // namespace papo
