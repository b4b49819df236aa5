// The arithmetic of csrc/cuda/machine.cuh on a host, no more exact than on a GPU.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace papo {
namespace cuda {

// 16 bytes, the widest access of one thread.
struct alignas(16) Word {
  uint32_t r[4];
};
struct Pair {
  float lo, hi;
};

namespace machine {

inline float as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
inline uint32_t as_bits(float x) {
  uint32_t y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// ex2.approx is off by up to two units in the last place, but exact for whole numbers.
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  if (!(y >= 1.17549435e-38f)) return x != x ? x : 0.0f;
  if (y > 1e38f || x == rintf(x)) return y;
  const uint32_t hash = as_bits(x) * 2654435761u >> 16;
  return as_float(as_bits(y) + hash % 5u - 2u);
}
template <typename T>
T product(T a, T b) {
  T y = a * b;
  asm("" : "+m"(y));  // or the compiler, which contracts as nvcc does, fuses it with an addition
  return y;
}
inline double power_of_two(int n) { return ldexp(1.0, n); }
inline float max_nan(float a, float b) {
  return a != a || b != b ? as_float(0x7fffffffu) : fmaxf(a, b);
}
inline float min_nan(float a, float b) {
  return a != a || b != b ? as_float(0x7fffffffu) : fminf(a, b);
}

inline float from_half(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31u) return as_float(sign | 0x7f800000u | mantissa << 13);
  const float magnitude = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -24)
                                        : ldexpf(static_cast<float>(1024u + mantissa),
                                                 static_cast<int>(exponent) - 25);
  return sign != 0 ? -magnitude : magnitude;
}
inline uint32_t to_half(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000u;
  const float a = fabsf(x);
  if (a != a) return 0x7fffu;
  if (a >= 65520.0f) return sign | 0x7c00u;
  int exponent = 0;
  frexpf(a, &exponent);
  const int step = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last place
  const float units = nearbyintf(ldexpf(a, -step));
  const float rounded = ldexpf(units, step);
  if (rounded < 6.103515625e-05f) return sign | static_cast<uint32_t>(ldexpf(rounded, 24));
  frexpf(rounded, &exponent);
  return sign | static_cast<uint32_t>(exponent + 14) << 10 |
         (static_cast<uint32_t>(ldexpf(rounded, 11 - exponent)) & 1023u);
}
inline uint32_t to_bf16(float x) {
  if (x != x) return 0x7fffu;
  const uint32_t b = as_bits(x);
  return (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
}

inline Pair from_f16x2(uint32_t x) { return {from_half(x & 0xffffu), from_half(x >> 16)}; }
inline uint32_t to_f16x2(Pair x) { return to_half(x.lo) | to_half(x.hi) << 16; }
inline uint32_t to_bf16x2(Pair x) { return to_bf16(x.lo) | to_bf16(x.hi) << 16; }

inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  const float lo = max_nan(as_float(a << 16), as_float(b << 16));
  const float hi = max_nan(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u));
  return as_bits(lo) >> 16 | (as_bits(hi) & 0xffff0000u);
}
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  const Pair x = from_f16x2(a), y = from_f16x2(b);
  return to_f16x2({max_nan(x.lo, y.lo), max_nan(x.hi, y.hi)});
}
inline uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31u));
}

inline Pair add(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Pair mul(Pair a, Pair b) { return {product(a.lo, b.lo), product(a.hi, b.hi)}; }
inline Pair fma(Pair a, Pair b, Pair c) {
  return {fmaf(a.lo, b.lo, c.lo), fmaf(a.hi, b.hi, c.hi)};
}

}  // namespace machine
}  // namespace cuda
}  // namespace papo
