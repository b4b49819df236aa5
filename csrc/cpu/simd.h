// One vector abstraction for every instruction set. The translation unit that includes it is
// compiled once per set, with PAPO_ISA_AVX512_BF16 (AVX-512 with bfloat16 conversions), PAPO_ISA_AVX512,
// PAPO_ISA_AVX2 or none of them defined; everything lives in an anonymous namespace so that no set's
// code can be linked into another's.
//
// Vectors are GCC/Clang vector types: + - * and the bit operators are the language's. Only what it
// lacks is spelled out below. FMA is always explicit (the build passes -ffp-contract=off): fused into
// u - row_max, the product in u would make the row's maximum differ from itself.
#pragma once

#include <stdint.h>
#include <string.h>

#include <initializer_list>

#include "papo/platform.h"

#if defined(PAPO_ISA_AVX512_BF16)
#define PAPO_ISA_AVX512
#endif
#if defined(PAPO_ISA_AVX512) || defined(PAPO_ISA_AVX2)
#include <immintrin.h>
#endif

namespace papo {
namespace {

#if defined(PAPO_ISA_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(PAPO_ISA_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef double F64 __attribute__((vector_size(kVectorBytes)));
typedef int16_t I16 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t I64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that a stored element is computed in, and its vector.
template <typename S>
struct Acc {
  using Scalar = float;
  using Vec = F32;
  using Int = I32;
};
template <>
struct Acc<double> {
  using Scalar = double;
  using Vec = F64;
  using Int = I64;
};

template <typename V>
constexpr int lanes() {
  return kVectorBytes / static_cast<int>(sizeof(V{}[0]));
}

PAPO_HD F32 splat(float x, F32) { return F32{} + x; }
PAPO_HD F64 splat(double x, F64) { return F64{} + x; }

// a * b + c, in one rounding where the machine can.
PAPO_HD F32 fma(F32 a, F32 b, F32 c) {
#if defined(PAPO_ISA_AVX512)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PAPO_ISA_AVX2)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
PAPO_HD F64 fma(F64 a, F64 b, F64 c) {
#if defined(PAPO_ISA_AVX512)
  return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(PAPO_ISA_AVX2)
  return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
template <typename V>
PAPO_HD V fma(V a, V b, decltype(V{}[0] + 0.0f) c) {
  return fma(a, b, splat(c, V{}));
}

// a > b ? a : b: where either is NaN the result is b, so `b` is the operand whose NaN must survive.
PAPO_HD F32 max_keep_nan(F32 a, F32 b) {
#if defined(PAPO_ISA_AVX512)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(PAPO_ISA_AVX2)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
PAPO_HD F64 max_keep_nan(F64 a, F64 b) {
#if defined(PAPO_ISA_AVX512)
  return (F64)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(PAPO_ISA_AVX2)
  return (F64)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

template <typename I>
PAPO_HD I max_of(I a, I b) {
  return a > b ? a : b;
}

// Is any lane of a greater than its lane of b?
PAPO_HD bool any_greater(F32 a, F32 b) {
#if defined(PAPO_ISA_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(PAPO_ISA_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  bool any = false;
  for (int i = 0; i < lanes<F32>(); ++i) any |= a[i] > b[i];
  return any;
#endif
}
PAPO_HD bool any_greater(F64 a, F64 b) {
  bool any = false;
  for (int i = 0; i < lanes<F64>(); ++i) any |= a[i] > b[i];
  return any;
}

// Horizontal results are needed once per chunk, so a plain loop will do.
template <typename V>
PAPO_HD double sum_lanes(V v) {
  double total = 0;
  for (int i = 0; i < lanes<V>(); ++i) total += v[i];
  return total;
}
template <typename V>
PAPO_HD auto max_lanes(V v) -> decltype(v[0] + v[0]) {
  auto best = v[0] + 0;
  for (int i = 1; i < lanes<V>(); ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// ---- loads and stores: two vectors at a time --------------------------------------------------
// The two vectors hold 2 * lanes consecutive elements in an order of the format's choosing (bfloat16
// splits into even and odd elements, which costs no shuffle); a store undoes its own load's order.

template <typename V, typename S>
PAPO_HD V load_raw(const S* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V, typename S>
PAPO_HD void store_raw(S* p, V v) {
  memcpy(p, &v, sizeof(v));
}

PAPO_HD void load_pair(const float* p, F32& a, F32& b) {
  a = load_raw<F32>(p);
  b = load_raw<F32>(p + lanes<F32>());
}
PAPO_HD void store_pair(float* p, F32 a, F32 b) {
  store_raw(p, a);
  store_raw(p + lanes<F32>(), b);
}
PAPO_HD void load_pair(const double* p, F64& a, F64& b) {
  a = load_raw<F64>(p);
  b = load_raw<F64>(p + lanes<F64>());
}
PAPO_HD void store_pair(double* p, F64 a, F64 b) {
  store_raw(p, a);
  store_raw(p + lanes<F64>(), b);
}

PAPO_HD void load_pair(const BFloat16* p, F32& a, F32& b) {
  const U32 both = load_raw<U32>(p);
  a = (F32)(both << 16);
  b = (F32)(both & 0xffff0000u);
}

#if defined(PAPO_ISA_AVX512_BF16)
PAPO_HD void store_pair(BFloat16* p, F32 a, F32 b) {
  // The instruction gives all of a, then all of b: elements 2j come from a, 2j + 1 from b.
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  store_raw(p, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
#else
// Rounds to nearest even in the upper half word. A NaN stays one: those that get here are the
// default NaN or came from a half-width logit, so their low halves are zero and nothing carries.
PAPO_HD U32 round_to_bfloat16(F32 v) {
#if defined(PAPO_ISA_AVX512)
  const __m512i x = (__m512i)v;
  const __m512i rounded = _mm512_add_epi32(x, _mm512_set1_epi32(0x7fff));
  const __mmask16 is_odd = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10000));
  return (U32)_mm512_mask_add_epi32(rounded, is_odd, rounded, _mm512_set1_epi32(1));
#else
  const U32 x = (U32)v;
  return x + 0x7fffu + ((x >> 16) & 1u);
#endif
}
PAPO_HD void store_pair(BFloat16* p, F32 a, F32 b) {
  store_raw(p, (round_to_bfloat16(a) >> 16) | (round_to_bfloat16(b) & 0xffff0000u));
}
#endif

#if defined(PAPO_ISA_AVX512)
PAPO_HD void load_pair(const Float16* p, F32& a, F32& b) {
  a = (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  b = (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 16)));
}
PAPO_HD void store_pair(Float16* p, F32 a, F32 b) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)a, 0));
  _mm256_storeu_si256((__m256i*)(p + 16), _mm512_cvtps_ph((__m512)b, 0));
}
#elif defined(PAPO_ISA_AVX2)
PAPO_HD void load_pair(const Float16* p, F32& a, F32& b) {
  a = (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  b = (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
}
PAPO_HD void store_pair(Float16* p, F32 a, F32 b) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)a, 0));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph((__m256)b, 0));
}
#else
PAPO_HD float bits_to_float(uint32_t x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
PAPO_HD float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 0x1f;
  const uint32_t mantissa = h & 0x3ff;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = (float)mantissa * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}
PAPO_HD uint16_t float_to_half(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  const uint16_t sign = (uint16_t)((x >> 16) & 0x8000);
  x &= 0x7fffffffu;
  if (x > 0x7f800000u) return sign | 0x7e00;
  if (x >= 0x477ff000u) return sign | 0x7c00;  // rounds to infinity
  if (x < 0x38800000u) {                       // a half subnormal: the adder rounds to even
    const float shifted = bits_to_float(x) + 0.5f;
    uint32_t y;
    memcpy(&y, &shifted, 4);
    return sign | (uint16_t)(y - 0x3f000000u);
  }
  x += 0xc8000fffu + ((x >> 13) & 1u);  // rebias the exponent by -112 and round
  return sign | (uint16_t)(x >> 13);
}
PAPO_HD void load_pair(const Float16* p, F32& a, F32& b) {
  for (int i = 0; i < lanes<F32>(); ++i) {
    a[i] = half_to_float(p[i].bits);
    b[i] = half_to_float(p[i + lanes<F32>()].bits);
  }
}
PAPO_HD void store_pair(Float16* p, F32 a, F32 b) {
  for (int i = 0; i < lanes<F32>(); ++i) {
    p[i].bits = float_to_half(a[i]);
    p[i + lanes<F32>()].bits = float_to_half(b[i]);
  }
}
#endif

// -inf in each stored format, to fill a partial vector with masked logits.
PAPO_HD void set_masked(float* p) { *p = -infinity<float>(); }
PAPO_HD void set_masked(double* p) { *p = -infinity<double>(); }
PAPO_HD void set_masked(BFloat16* p) { p->bits = 0xff80; }
PAPO_HD void set_masked(Float16* p) { p->bits = 0xfc00; }

// ---- exp and tanh -----------------------------------------------------------------------------

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kLowest = -88.02969193111305f;  // -127 ln 2

// e^y, y <= 88, within 1.5 ulp; exactly 1 at 0 and exactly 0 from -127 ln 2 down, so that -inf and the
// products with it stay finite. y is replaced by its clamped value. The band up to -126 ln 2 yields a
// subnormal, zero in the flush-to-zero mode that the kernels run in.
#if defined(PAPO_ISA_AVX512)
// y = k/32 ln 2 + f: 2^(k/32) from a table that fits two registers and one permutation, then a minimax
// quadratic (5.3e-8) on |f| <= ln 2 / 64. Two multiplications fewer than the polynomial alone.
// Entry j is the bit pattern of 2^(j/32) less j << 18, so that adding k << 18 sets the exponent
// and cancels the low five bits of k.
alignas(64) constexpr uint32_t kExp2Table[32] = {
    0x3f800000u, 0x3f7ecd87u, 0x3f7daac3u, 0x3f7c980fu, 0x3f7b95c2u, 0x3f7aa43au, 0x3f79c3d3u,
    0x3f78f4f0u, 0x3f7837f0u, 0x3f778d3au, 0x3f76f532u, 0x3f767043u, 0x3f75fed7u, 0x3f75a15bu,
    0x3f75583fu, 0x3f7523f6u, 0x3f7504f3u, 0x3f74fbafu, 0x3f7508a4u, 0x3f752c4du, 0x3f75672au,
    0x3f75b9beu, 0x3f76248cu, 0x3f76a81eu, 0x3f7744fdu, 0x3f77fbb8u, 0x3f78ccdfu, 0x3f79b907u,
    0x3f7ac0c7u, 0x3f7be4bau, 0x3f7d257du, 0x3f7e83b3u};

// Clamps y and splits e^y into the table's part, which is returned, and f.
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

// Without the square of f, for what is rounded to bfloat16: times kCoarse within 2.94e-5, a hundredth of
// that format's own rounding, with two multiplications fewer.
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
  // Minimax for the relative error (9.2e-8) with the constant held at 1.
  F32 p = splat(8.290311321616173e-3f, F32{});
  for (float c : {4.189784452319145e-2f, 1.6667641699314117e-1f, 4.9999150633811950e-1f,
                  9.9999970197677612e-1f, 1.0f}) {
    p = fma(p, f, c);
  }
  // At the lower bound f is just below 0, p below 1, and the sum below the bits of 0.
  return (F32)max_of((I32)p + ((I32)shifted << 23), I32{});
}

PAPO_HD F32 exp_coarse(F32& y) { return exp_of(y); }
constexpr double kCoarse = 1.0;
#endif

// e^y, y <= 709, relative error below 2e-16 (with rounding 1 ulp); exactly 0 below -708.
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

// tanh to about 1 ulp: odd polynomial near 0, 1 - 2 / (e^2x + 1) beyond.
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
