// Elements in memory: how each type lies in a 16-byte word, words that start at any element, and
// the two places that a row is read from.
#pragma once

#include "machine.cuh"
#include "papo/params.h"
#include "tile.h"

namespace papo {
namespace cuda {

// The thread's place among those that share some work.
struct Share {
  int thread, threads;
};

// ---- the stored types -----------------------------------------------------------------------
// A word has kPairs pairs of elements, and pair(w, i) has elements 2i and 2i + 1.

struct BF16 {
  static constexpr int kBytes = 2;
  static constexpr int kPairs = 4;
  static constexpr uint32_t kMasked = 0xff80ff80u;  // -inf, twice

  static PAPO_DEVICE uint32_t max_nan(uint32_t a, uint32_t b) {
    return machine::max_nan_bf16x2(a, b);
  }
  static PAPO_DEVICE Pair to_floats(uint32_t x) {
    return {machine::as_float(x << 16), machine::as_float(x & 0xffff0000u)};
  }
  static PAPO_DEVICE uint32_t from_floats(Pair x) { return machine::to_bf16x2(x); }
};

struct F16 {
  static constexpr int kBytes = 2;
  static constexpr int kPairs = 4;
  static constexpr uint32_t kMasked = 0xfc00fc00u;

  static PAPO_DEVICE uint32_t max_nan(uint32_t a, uint32_t b) {
    return machine::max_nan_f16x2(a, b);
  }
  static PAPO_DEVICE Pair to_floats(uint32_t x) { return machine::from_f16x2(x); }
  static PAPO_DEVICE uint32_t from_floats(Pair x) { return machine::to_f16x2(x); }
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
    return T::to_floats(w.r[i]);
  } else {
    return {machine::as_float(w.r[2 * i]), machine::as_float(w.r[2 * i + 1])};
  }
}

// The same, with elements below `low` raised to it. `low` is in the bits of their type.
template <typename T>
PAPO_DEVICE Pair raised_pair(const Word& w, int i, uint32_t low) {
  if constexpr (T::kBytes == 2) {
    return T::to_floats(T::max_nan(w.r[i], low));
  } else {
    return {machine::as_float(T::max_nan(w.r[2 * i], low)),
            machine::as_float(T::max_nan(w.r[2 * i + 1], low))};
  }
}

template <typename T>
PAPO_DEVICE void set_pair(Word& w, int i, Pair x) {
  if constexpr (T::kBytes == 2) {
    w.r[i] = T::from_floats(x);
  } else {
    w.r[2 * i] = machine::as_bits(x.lo);
    w.r[2 * i + 1] = machine::as_bits(x.hi);
  }
}

template <typename T>
PAPO_DEVICE float from_bits(uint32_t bits) {
  if constexpr (T::kBytes == 2) {
    return T::to_floats(bits).lo;
  } else {
    return machine::as_float(bits);
  }
}

template <typename T>
PAPO_DEVICE void store_element(char* p, float x) {
  if constexpr (T::kBytes == 2) {
    machine::store_global_16(p, T::from_floats({x, x}) & 0xffffu);
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

// A word of which all but the first `keep` elements are `fill`, given in the bits of a register.
template <typename T>
PAPO_DEVICE Word keep_first(Word w, int keep, uint32_t fill) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (T::kBytes == 2) {
      const uint32_t kept = keep > 2 * i + 1 ? 0xffffffffu : keep > 2 * i ? 0x0000ffffu : 0u;
      w.r[i] = (w.r[i] & kept) | (fill & ~kept);
    } else if (keep <= i) {
      w.r[i] = fill;
    }
  }
  return w;
}
// A word of which the first `drop` elements are masked.
template <typename T>
PAPO_DEVICE Word drop_first(Word w, int drop) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (T::kBytes == 2) {
      const uint32_t gone = drop > 2 * i + 1 ? 0xffffffffu : drop > 2 * i ? 0x0000ffffu : 0u;
      w.r[i] = (w.r[i] & ~gone) | (T::kMasked & gone);
    } else if (drop > i) {
      w.r[i] = T::kMasked;
    }
  }
  return w;
}

// ---- words that start at any element ----------------------------------------------------------

// 16 bytes of the words `low` and `high`, which follow each other, from byte `off` on. `off` is the
// same for all words of a row.
template <typename T>
PAPO_DEVICE Word funnel(const Word& low, const Word& high, uint32_t off) {
  const uint32_t x[8] = {low.r[0],  low.r[1],  low.r[2],  low.r[3],
                         high.r[0], high.r[1], high.r[2], high.r[3]};
  uint32_t y[6], z[5];
#pragma unroll
  for (int i = 0; i < 6; ++i) y[i] = (off & 8u) != 0 ? x[i + 2] : x[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) z[i] = (off & 4u) != 0 ? y[i + 1] : y[i];
  Word w;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    w.r[i] = T::kBytes == 4 ? z[i] : machine::funnel_right(z[i], z[i + 1], (off & 2u) * 8u);
  }
  return w;
}

// Elements in a buffer in shared memory, which has one word more than they fill.
template <typename T>
struct SharedRow {
  static constexpr int kUnroll = 2;

  uint32_t address;  // of element 0

  PAPO_DEVICE SharedRow from(int element) const {
    return {address + static_cast<uint32_t>(element) * T::kBytes};
  }

  // Whether words start on 16-byte boundaries, as aligned_word() expects.
  PAPO_DEVICE bool aligned() const { return (address & 15u) == 0; }

  // Word i has elements [kPerWord i, kPerWord (i + 1)).
  PAPO_DEVICE Word aligned_word(int i) const {
    return machine::load_shared(address + static_cast<uint32_t>(i) * kWordBytes);
  }
  // Put together from two aligned words, of which the second may lie behind the last element.
  PAPO_DEVICE Word word(int i) const {
    const SharedRow floor = {address & ~15u};
    return funnel<T>(floor.aligned_word(i), floor.aligned_word(i + 1), address & 15u);
  }

  PAPO_DEVICE float element(int i) const {
    const uint32_t at = address + static_cast<uint32_t>(i) * T::kBytes;
    return from_bits<T>(T::kBytes == 2 ? machine::load_shared_16(at) : machine::load_shared_32(at));
  }
};

// Elements [0, count) in global memory. word() and element() read nothing else.
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
  // Whether both aligned words that word i lies across are within the row. They reach up to 15
  // bytes before it and 15 bytes behind it.
  PAPO_DEVICE bool holds_both(int i) const {
    return i > 0 && (i + 2) * kPerWord<T> <= count;
  }

  PAPO_DEVICE Word aligned_word(int i) const { return machine::load_global(at(i)); }
  PAPO_DEVICE Word from_both(int i) const {
    const uint32_t off = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(data) & 15u);
    const char* floor = at(i) - off;
    return funnel<T>(machine::load_global_cached(floor),
                     machine::load_global_cached(floor + kWordBytes), off);
  }
  // Behind the last element it is masked.
  PAPO_DEVICE Word word(int i) const { return holds_both(i) ? from_both(i) : gathered(i); }

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

// Where element (i, j) of a matrix of T is.
template <typename T>
PAPO_DEVICE char* element_at(const Matrix& m, int64_t i, int64_t j) {
  return m.at(i, j, T::kBytes);
}

}  // namespace cuda
}  // namespace papo
