// The sums of a row: of a lane over words of logits, and of a warp. row_merge.cuh has the rest.
//
// Lanes count in base 2, about a maximum m that their warp shares. With unit = log2(e)/temperature:
//   y = (x - m) unit    Z = sum 2^y    T = sum 2^y y    Z2 = sum 4^y    T2 = sum 4^y y
// In the usual case y comes from one fma, x unit - M, where M is m unit rounded. The rounding error
// o = m unit - M is known exactly and is the same for every element: the sums are about m - o/unit.
// A warp leaves the sums of all elements but its maximum, which about itself adds exactly 1 to Z
// and Z2, and 0 to T and T2. So beside a nearly certain token the others keep their digits. From
// there on the sums are a RowState<double> in nats, merged as everywhere else.
#pragma once

#include "papo/row_state.h"
#include "words.cuh"

namespace papo {
namespace cuda {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;
// y of a masked logit. 2^y and 2^y y are then 0, where y = -inf would make the product NaN.
constexpr float kFloor = -500.0f;

// 2^x for |x| <= 2^-4, good to 2e-9.
PAPO_DEVICE double exp2_near_zero(double x) {
  const double t = x * kLn2;
  return 1.0 + t * (1.0 + t * (1.0 / 2 + t * (1.0 / 6 + t * (1.0 / 24))));
}

// e^x for x <= 0, good to 6e-9 and exactly 1 at 0: enough for float outputs. It takes a third of
// the time of exp(), and every row waits for several of them in turn.
PAPO_DEVICE double exp_of_distance(double x) {
  const double y = x * kLog2E;
  if (y < -1000.0) return 0.0;
  const double whole = rint(y);
  const double t = (y - whole) * kLn2;
  const double t2 = t * t;
  const double low = (1.0 + t) + t2 * (1.0 / 2 + t * (1.0 / 6));
  const double high = (1.0 / 24 + t * (1.0 / 120)) + t2 * (1.0 / 720 + t * (1.0 / 5040));
  return (low + t2 * t2 * high) * machine::power_of_two(static_cast<int>(whole));
}

// A row's RowParams as the inner loops need them.
struct Scaling {
  float unit;
  float softcap, inv_softcap;  // 0: none
  // A negative power of two that logits are raised to, 2^22 below 0 in units of y, or the nearest
  // that their type has.
  float low;
  uint32_t low_bits;  // `low` in the bits of the logits' type, in each element of a register

  static PAPO_HD float unit_of(double temperature) {
    return static_cast<float>(saturated<float>(kLog2E / temperature));
  }

  PAPO_HD void set_unit(float new_unit, DType dtype) {
    unit = new_unit;
    uint32_t bits;
    __builtin_memcpy(&bits, &unit, sizeof(bits));
    const int most = dtype == DType::kFloat16 ? 15 : 127;
    const int least = dtype == DType::kFloat16 ? -14 : -126;
    const int wanted = 22 - (static_cast<int>(bits >> 23 & 255u) - 127);
    const int exponent = wanted > most ? most : wanted < least ? least : wanted;
    bits = 0x80000000u | static_cast<uint32_t>(exponent + 127) << 23;
    __builtin_memcpy(&low, &bits, sizeof(low));
    const uint32_t half = dtype == DType::kFloat16
                              ? 0x8000u | static_cast<uint32_t>(exponent + 15) << 10
                              : bits >> 16;
    low_bits = dtype == DType::kFloat32 ? bits : half | half << 16;
  }

  // Whether the fma is exact enough about this maximum: m unit is at most 2^20, and a logit raised
  // to `low` is still too far below to count.
  PAPO_DEVICE bool is_fast(float m) const {
    const float y = machine::product(m, unit);
    return softcap == 0.0f && abs_of(y) <= 1048576.0f && y - machine::product(low, unit) >= 300.0f;
  }

  PAPO_DEVICE float capped(float x) const {
    if (softcap == 0.0f || x == -infinity<float>()) return x;
    return machine::product(softcap, tanh_of(x * inv_softcap));
  }
};

PAPO_DEVICE Pair both(float x) { return {x, x}; }

// What a warp has found in its words of a row:
//   the maximum m and o, as above | the sums of all elements but one at the maximum | the softcapped
//   logit of the sampled token | 1 if such an element was left out, or 0
struct WarpMessage {
  Word first, second;

  // One of the two, register by register: nvcc would choose between their addresses, on the stack.
  PAPO_DEVICE Word word(int i) const {
    Word w;
#pragma unroll
    for (int k = 0; k < 4; ++k) w.r[k] = i == 0 ? first.r[k] : second.r[k];
    return w;
  }
};

// ---- over a lane's words ----------------------------------------------------------------------

struct LaneSums {
  Pair Z, T, Z2, T2;

  static PAPO_DEVICE LaneSums zero() {
    const Pair none = {0.0f, 0.0f};
    return {none, none, none, none};
  }

  // Adds one word. Its exponentials are added to each other before they are added to Z: once a
  // nearly certain token is in Z, every sum is rounded to the last place of that token.
  template <int kPairs>
  PAPO_DEVICE void add(const Pair (&y)[kPairs]) {
    Pair e[kPairs], e2[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      e[j] = {machine::exp2_fast(y[j].lo), machine::exp2_fast(y[j].hi)};
      e2[j] = machine::mul(e[j], e[j]);
      T = machine::fma(e[j], y[j], T);
      T2 = machine::fma(e2[j], y[j], T2);
    }
    Z = machine::add(Z, total(e));
    Z2 = machine::add(Z2, total(e2));
  }

  // Moves the sums to a maximum that is larger by -shift, in units of y. NaN stays NaN.
  PAPO_DEVICE void rescale(float shift) {
    const float alpha = machine::exp2_fast(shift);
    // A shift whose exponential underflows may be -inf, and -inf * 0 is NaN.
    const Pair by = both(alpha == 0.0f ? 0.0f : shift);
    const Pair a = both(alpha);
    const Pair a2 = both(alpha * alpha);
    T = machine::mul(a, machine::fma(by, Z, T));
    Z = machine::mul(a, Z);
    T2 = machine::mul(a2, machine::fma(by, Z2, T2));
    Z2 = machine::mul(a2, Z2);
  }

  // Takes out one element at y = o, which is in one of the halves. What it added is known exactly.
  PAPO_DEVICE void take_out(float o) {
    const float e = machine::exp2_fast(o);
    const Pair by = Z.lo >= e ? Pair{-e, 0.0f} : Pair{0.0f, -e};
    const Pair e2 = machine::mul(by, by);
    Z = machine::add(Z, by);
    T = machine::add(T, machine::mul(by, both(o)));
    Z2 = machine::add(Z2, {-e2.lo, -e2.hi});
    T2 = machine::add(T2, machine::mul(e2, both(-o)));
  }

 private:
  template <int kPairs>
  static PAPO_DEVICE Pair total(Pair (&x)[kPairs]) {
#pragma unroll
    for (int step = 1; step < kPairs; step *= 2) {
#pragma unroll
      for (int j = 0; j + step < kPairs; j += 2 * step) x[j] = machine::add(x[j], x[j + step]);
    }
    return x[0];
  }
};

// Floats as integers in the same order, and back. A NaN whose sign bit is clear comes after +inf.
PAPO_DEVICE int ordered(float x) {
  const int b = static_cast<int>(machine::as_bits(x));
  return b ^ ((b >> 31) & 0x7fffffff);
}
PAPO_DEVICE float unordered(int key) {
  return machine::as_float(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

// The largest element of a lane's words, or NaN. There are two chains of maxima, as each step of a
// chain waits for the last.
template <typename T>
struct LaneTop {
  uint32_t best = T::kMasked, second = T::kMasked;

  PAPO_DEVICE void meet(const Word& w) {
    best = T::max_nan(T::max_nan(best, w.r[0]), w.r[1]);
    second = T::max_nan(T::max_nan(second, w.r[2]), w.r[3]);
  }
  PAPO_DEVICE float largest() const {
    const uint32_t top = T::max_nan(best, second);
    if constexpr (T::kBytes == 2) {
      const Pair p = T::to_floats(top);
      return machine::max_nan(p.lo, p.hi);
    } else {
      return machine::as_float(top);
    }
  }
};

template <typename T, int kWords>
PAPO_DEVICE float largest(const Word (&w)[kWords]) {
  LaneTop<T> top;
#pragma unroll
  for (int i = 0; i < kWords; ++i) top.meet(w[i]);
  return top.largest();
}

template <typename T>
class WarpScan {
 public:
  PAPO_DEVICE explicit WarpScan(const Scaling& scaling)
      : s_(scaling), m_(-infinity<float>()), big_m_(0.0f), o_(0.0f), mode_(kNothing),
        sums_(LaneSums::zero()) {}

  // ---- words that are read once: sums about the largest so far

  // Adds kWords words of every lane, which are masked where the row has none. The warp takes every
  // branch as one.
  template <int kWords>
  PAPO_DEVICE void batch(Word (&w)[kWords]) {
    const float top = largest<T>(w);
    // A new maximum and NaN are rare. A batch without them goes straight to its sums.
    if (machine::any(!(top <= m_)) && !raise(top)) return;
    if (mode_ == kFast) {
      add<true>(w);
    } else if (mode_ == kCareful) {
      add_careful(w);
    }
  }

  // ---- words that are read twice: sums about the largest of all

  // Promises that no element to be added exceeds its lane's `lane_top`. Where this returns false
  // there is nothing to add: the warp's part of the row is bad or masked.
  PAPO_DEVICE bool start(float lane_top) { return raise(lane_top) && mode_ != kNothing; }
  PAPO_DEVICE bool careful() const { return mode_ == kCareful; }

  // With kRaised, -inf among the words is raised to a finite number. Without, it makes T NaN, which
  // met_masked() reports, and restart() then clears the sums.
  template <bool kRaised, int kWords>
  PAPO_DEVICE void add(const Word (&w)[kWords]) {
    const Pair unit = both(s_.unit);
    const Pair minus_m = both(-big_m_);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      Pair y[T::kPairs];
#pragma unroll
      for (int j = 0; j < T::kPairs; ++j) {
        const Pair x = kRaised ? raised_pair<T>(w[i], j, s_.low_bits) : pair<T>(w[i], j);
        y[j] = machine::fma(x, unit, minus_m);
      }
      sums_.add(y);
    }
  }
  PAPO_DEVICE bool met_masked() const {
    const float T_lane = sums_.T.lo + sums_.T.hi;
    return machine::any(T_lane != T_lane);
  }
  PAPO_DEVICE void restart() { sums_ = LaneSums::zero(); }

  // For soft caps, and for maxima outside the fast range. The words rotate, so that the code for
  // one of them is there once.
  template <int kWords>
  PAPO_DEVICE void add_careful(Word (&w)[kWords]) {
#pragma unroll 1
    for (int i = 0; i < kWords; ++i) {
      Pair y[T::kPairs];
#pragma unroll
      for (int j = 0; j < T::kPairs; ++j) {
        const Pair x = pair<T>(w[0], j);
        y[j] = {distance(x.lo), distance(x.hi)};
      }
      sums_.add(y);
#pragma unroll
      for (int k = 0; k + 1 < kWords; ++k) w[k] = w[k + 1];
    }
  }

  // ---- a warp's message

  // What the warp has found, the same in every lane. `sampled` is the softcapped logit of the
  // sampled token if this warp has it, and -inf otherwise.
  PAPO_DEVICE WarpMessage message(int lane, float sampled) {
    const float top = take_out_maximum(lane);
    const float total = warp_total(lane);
    const auto of_lane = [total](int from) {
      return machine::as_bits(machine::broadcast(total, from));
    };
    return {{{machine::as_bits(m_), machine::as_bits(o_), of_lane(0), of_lane(16)}},
            {{of_lane(8), of_lane(24), machine::as_bits(sampled), machine::as_bits(top)}}};
  }

 private:
  enum Mode : int { kNothing, kFast, kCareful };  // kNothing: only masked logits so far

  // Moves to the warp's maximum if that is new. Returns false if the row is bad, for good.
  PAPO_DEVICE bool raise(float lane_top) {
    const float raw = unordered(machine::warp_max(ordered(lane_top)));
    if (!(raw < infinity<float>())) {
      sums_.Z = both(quiet_nan<float>());
      return false;
    }
    const float top = s_.capped(raw);
    if (!(top > m_)) return true;
    const bool fast = s_.is_fast(top);
    const float big_m = fast ? top * s_.unit : 0.0f;
    const float o = fast ? fmaf(top, s_.unit, -big_m) : 0.0f;
    if (mode_ != kNothing) sums_.rescale(fmaf(m_ - top, s_.unit, o - o_));
    m_ = top;
    big_m_ = big_m;
    o_ = o;
    mode_ = fast ? kFast : kCareful;
    return true;
  }

  PAPO_DEVICE float distance(float x) const {
    return machine::max_nan(fmaf(s_.capped(x) - m_, s_.unit, o_), kFloor);
  }

  // Takes one element at the maximum out of the sums, and returns how many it took out: 1, or 0 if
  // the part is bad or masked. Any lane will do whose Z is at least what the maximum adds: where
  // there are several, the total is so large that the choice costs no digits.
  PAPO_DEVICE float take_out_maximum(int lane) {
    const float e = machine::exp2_fast(o_);
    const bool has = sums_.Z.lo >= e || sums_.Z.hi >= e;
    const int from = machine::warp_max(has ? lane : -1);
    if (lane == from) sums_.take_out(o_);
    return from >= 0 ? 1.0f : 0.0f;
  }

  // Leaves each lane one of the warp's four totals, eight lanes the same: of Z, Z2, T, T2. In the
  // first two steps a lane keeps half of what it has. That takes a third of the shuffles of four
  // sums.
  PAPO_DEVICE float warp_total(int lane) const {
    const float Z = sums_.Z.lo + sums_.Z.hi;
    const float T1 = sums_.T.lo + sums_.T.hi;
    const float Z2 = sums_.Z2.lo + sums_.Z2.hi;
    const float T2 = sums_.T2.lo + sums_.T2.hi;
    const bool upper = (lane & 16) != 0;
    const float a = (upper ? T1 : Z) + machine::shuffle_xor(upper ? Z : T1, 16);
    const float b = (upper ? T2 : Z2) + machine::shuffle_xor(upper ? Z2 : T2, 16);
    const bool second = (lane & 8) != 0;
    float c = (second ? b : a) + machine::shuffle_xor(second ? a : b, 8);
#pragma unroll
    for (int mask = 4; mask > 0; mask /= 2) c += machine::shuffle_xor(c, mask);
    return c;
  }

  const Scaling& s_;
  float m_, big_m_, o_;  // big_m_ is the M above
  Mode mode_;
  LaneSums sums_;
};

}  // namespace cuda
}  // namespace papo
