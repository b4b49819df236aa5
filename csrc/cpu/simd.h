// One vector abstraction for every instruction set. The translation unit that includes it is
// compiled once per set, with one of PAPO_ISA_AVX512_BF16 (AVX-512 with bfloat16 conversions),
// PAPO_ISA_AVX512 and PAPO_ISA_AVX2 defined, or none. Everything is in an anonymous namespace, so
// that no set's code can be linked into another's.
//
// Vectors are those of GCC and Clang, for which the language has + - * and the bit operators. Below
// is only what it lacks. FMA is always explicit, and the build passes -ffp-contract=off: if the
// product in u were fused into u - row_max, a row's maximum would differ from itself.
#pragma once

#include <stdint.h>
#include <string.h>

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

// The type that a stored element is computed in, and the vectors of that width.
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

// a * b + c, rounded once where the machine can do that.
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

// a > b ? a : b. Where either is NaN the result is b, so a NaN survives in `b` alone.
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

// Whether any lane of a is greater than that lane of b.
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

// Over the lanes of one vector. Once per chunk a plain loop will do.
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
// The two vectors hold 2 * lanes consecutive elements, in an order that depends on the format:
// bfloat16 is split into even and odd elements, which takes no shuffle. A store undoes the order of
// the load.

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
  // The instruction gives all of a, then all of b. Element 2j comes from a, and 2j + 1 from b.
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  store_raw(p, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
#else
// Rounds to the nearest, ties to even, in the upper half. A NaN stays a NaN: it is the default one
// or came from a half-width logit, so that its lower half is zero and nothing carries.
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
  if (x < 0x38800000u) {                       // subnormal in half: the addition rounds to even
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

// -inf in each stored format, for the lanes of a partial vector.
PAPO_HD void set_masked(float* p) { *p = -infinity<float>(); }
PAPO_HD void set_masked(double* p) { *p = -infinity<double>(); }
PAPO_HD void set_masked(BFloat16* p) { p->bits = 0xff80; }
PAPO_HD void set_masked(Float16* p) { p->bits = 0xfc00; }

}  // namespace
}  // namespace papo
