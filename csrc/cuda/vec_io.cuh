// Elements in memory: how each type sits in a 16-byte word, words at any element boundary, and the
// two places a row is read from.
#pragma once

#include "machine.cuh"
#include "papo/params.h"
#include "tile.h"

namespace papo {
namespace cuda {

// ---- the stored types -----------------------------------------------------------------------
// kPairs: pairs of elements in a word. pair(w, i) has elements 2i and 2i + 1.

struct BF16 {
  static constexpr int kBytes = 2;
  static constexpr int kPairs = 4;
  static constexpr uint32_t kMasked = 0xff80ff80u;  // -inf, twice

  static PAPO_DEVICE uint32_t max_nan(uint32_t a, uint32_t b) {
    return machine::max_nan_bf16x2(a, b);
  }
  static PAPO_DEVICE Pair wide(uint32_t x) {
    return {machine::as_float(x << 16), machine::as_float(x & 0xffff0000u)};
  }
  static PAPO_DEVICE uint32_t narrow(Pair x) { return machine::to_bf16x2(x); }
};

struct F16 {
  static constexpr int kBytes = 2;
  static constexpr int kPairs = 4;
  static constexpr uint32_t kMasked = 0xfc00fc00u;

  static PAPO_DEVICE uint32_t max_nan(uint32_t a, uint32_t b) {
    return machine::max_nan_f16x2(a, b);
  }
  static PAPO_DEVICE Pair wide(uint32_t x) { return machine::from_f16x2(x); }
  static PAPO_DEVICE uint32_t narrow(Pair x) { return machine::to_f16x2(x); }
};

struct F32 {
  static constexpr int kBytes = 4;
  static constexpr int kPairs = 2;
  static constexpr uint32_t kMasked = 0xff800000u;

  static PAPO_DEVICE uint32_t max_nan(uint32_t a, uint32_t b) {
    return machine::as_bits(machine::max_nan(machine::as_float(a), machine::as_float(b)));
  }
};

template <typename T>
PAPO_DEVICE Pair pair(const Word& w, int i) {
  if constexpr (T::kBytes == 2) {
    return T::wide(w.r[i]);
  } else {
    return {machine::as_float(w.r[2 * i]), machine::as_float(w.r[2 * i + 1])};
  }
}

// The same of elements raised to at least `low`, which is in the bits of their type.
template <typename T>
PAPO_DEVICE Pair raised_pair(const Word& w, int i, uint32_t low) {
  if constexpr (T::kBytes == 2) {
    return T::wide(T::max_nan(w.r[i], low));
  } else {
    return {machine::as_float(T::max_nan(w.r[2 * i], low)),
            machine::as_float(T::max_nan(w.r[2 * i + 1], low))};
  }
}

template <typename T>
PAPO_DEVICE void set_pair(Word& w, int i, Pair x) {
  if constexpr (T::kBytes == 2) {
    w.r[i] = T::narrow(x);
  } else {
    w.r[2 * i] = machine::as_bits(x.lo);
    w.r[2 * i + 1] = machine::as_bits(x.hi);
  }
}

template <typename T>
PAPO_DEVICE float from_bits(uint32_t bits) {
  if constexpr (T::kBytes == 2) {
    return T::wide(bits).lo;
  } else {
    return machine::as_float(bits);
  }
}

template <typename T>
PAPO_DEVICE void store_element(char* p, float x) {
  if constexpr (T::kBytes == 2) {
    machine::store_global_16(p, T::narrow({x, x}) & 0xffffu);
  } else {
    machine::store_global_32(p, machine::as_bits(x));
  }
}

template <typename T>
constexpr int kPerWord = kWordBytes / T::kBytes;

template <typename T>
PAPO_DEVICE Word masked_word() {
  return {{T::kMasked, T::kMasked, T::kMasked, T::kMasked}};
}

// The first `keep` elements of a word, the others masked.
template <typename T>
PAPO_DEVICE Word keep_first(Word w, int keep) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (T::kBytes == 2) {
      const uint32_t kept = keep > 2 * i + 1 ? 0xffffffffu : keep > 2 * i ? 0x0000ffffu : 0u;
      w.r[i] = (w.r[i] & kept) | (T::kMasked & ~kept);
    } else if (keep <= i) {
      w.r[i] = T::kMasked;
    }
  }
  return w;
}

// ---- words at any element boundary ------------------------------------------------------------

// The 16 bytes `off` bytes into three halves of words (24 bytes); off is 0, 2, 4 or 6.
PAPO_DEVICE Word funnel(const uint32_t (&x)[6], uint32_t off) {
  uint32_t y[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) y[i] = (off & 4u) != 0 ? x[i + 1] : x[i];
  Word w;
#pragma unroll
  for (int i = 0; i < 4; ++i) w.r[i] = machine::funnel_right(y[i], y[i + 1], (off & 2u) * 8u);
  return w;
}

// Elements in a buffer of shared memory, which holds one word more than they fill.
template <typename T>
struct SharedRow {
  static constexpr int kUnroll = 4;

  uint32_t address;  // of element 0

  PAPO_DEVICE SharedRow from(int element) const {
    return {address + static_cast<uint32_t>(element) * T::kBytes};
  }

  // Whether words start on 16-byte boundaries; aligned_word() is for then.
  PAPO_DEVICE bool aligned() const { return (address & 15u) == 0; }

  // Word i has elements [kPerWord i, kPerWord (i + 1)).
  PAPO_DEVICE Word aligned_word(int i) const {
    return machine::load_shared(address + static_cast<uint32_t>(i) * kWordBytes);
  }
  // Three halves of words, from an 8-byte boundary to at most a word behind the last element.
  PAPO_DEVICE Word word(int i) const {
    const uint32_t at = address + static_cast<uint32_t>(i) * kWordBytes;
    const uint32_t half = at & ~7u;
    uint32_t x[6];
    machine::load_shared_half(half, x[0], x[1]);
    machine::load_shared_half(half + 8, x[2], x[3]);
    machine::load_shared_half(half + 16, x[4], x[5]);
    return funnel(x, at & 7u);
  }

  PAPO_DEVICE float element(int i) const {
    const uint32_t at = address + static_cast<uint32_t>(i) * T::kBytes;
    return from_bits<T>(T::kBytes == 2 ? machine::load_shared_16(at) : machine::load_shared_32(at));
  }
};

// Elements [0, count) in global memory; word() and element() read nothing outside them.
template <typename T>
struct GlobalRow {
  static constexpr int kUnroll = 4;

  const char* data;
  int count;

  PAPO_DEVICE GlobalRow from(int element) const {
    return {data + static_cast<int64_t>(element) * T::kBytes, count - element};
  }

  PAPO_DEVICE bool aligned() const { return (reinterpret_cast<uintptr_t>(data) & 15u) == 0; }
  PAPO_DEVICE bool holds_word(int i) const { return (i + 1) * kPerWord<T> <= count; }
  // The three halves reach up to 7 bytes before the word and 8 behind it.
  PAPO_DEVICE bool holds_halves(int i) const {
    return i > 0 && (i + 1) * kPerWord<T> + 8 / T::kBytes <= count;
  }

  PAPO_DEVICE Word aligned_word(int i) const { return machine::load_global(at(i)); }
  PAPO_DEVICE Word halves(int i) const {
    const uint32_t off = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data) & 7u);
    const char* half = at(i) - off;
    uint32_t x[6];
    machine::load_global_half(half, x[0], x[1]);
    machine::load_global_half(half + 8, x[2], x[3]);
    machine::load_global_half(half + 16, x[4], x[5]);
    return funnel(x, off);
  }
  // What lies behind the last element is masked.
  PAPO_DEVICE Word word(int i) const { return holds_halves(i) ? halves(i) : gathered(i); }

  PAPO_DEVICE float element(int i) const { return from_bits<T>(bits(i)); }

 private:
  PAPO_DEVICE const char* at(int i) const { return data + static_cast<int64_t>(i) * kWordBytes; }

  PAPO_DEVICE uint32_t bits(int i) const {
    const char* p = data + static_cast<int64_t>(i) * T::kBytes;
    return T::kBytes == 2 ? machine::load_global_16(p) : machine::load_global_32(p);
  }

  PAPO_DEVICE Word gathered(int word) const {
    Word w = masked_word<T>();
#pragma unroll
    for (int i = 0; i < kPerWord<T>; ++i) {
      const int j = word * kPerWord<T> + i;
      if (j >= count) continue;
      if constexpr (T::kBytes == 2) {
        const int shift = 16 * (i % 2);
        w.r[i / 2] = (w.r[i / 2] & ~(0xffffu << shift)) | (bits(j) << shift);
      } else {
        w.r[i] = bits(j);
      }
    }
    return w;
  }
};

// element (i, j) of a matrix of T.
template <typename T>
PAPO_DEVICE char* element_at(const Matrix& m, int64_t i, int64_t j) {
  return static_cast<char*>(m.data) + (i * m.row_stride + j) * T::kBytes;
}

}  // namespace cuda
}  // namespace papo
