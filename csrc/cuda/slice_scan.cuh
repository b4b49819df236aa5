// The sums of a slice that lies in shared memory, by the warps of a team. Each warp reads its words
// twice: once for their largest element, and once for the sums about it. The second read costs less
// than the upkeep of a running maximum, and no words wait in registers.
#pragma once

#include "row_reduce.cuh"

namespace papo {
namespace cuda {

// This warp's place in its team; rounds_of() says which words it has.
struct TeamWarp {
  int warp, lane, log_threads;

  PAPO_DEVICE int first_word() const { return 32 * warp + lane; }
  PAPO_DEVICE int threads() const { return 1 << log_threads; }
};

// The elements of a slice that lie in one buffer.
template <typename T>
struct Stage {
  SharedRow<T> row;
  int count;

  PAPO_DEVICE int words() const {
    return static_cast<int>(static_cast<uint32_t>(count + kPerWord<T> - 1) / kPerWord<T>);
  }
  // Word i, with `fill` behind the last element.
  PAPO_DEVICE Word last_word(int i, uint32_t fill) const {
    const int within = i < words() ? i : words() - 1;
    return keep_first<T>(row.word(within), count - i * kPerWord<T>, fill);
  }
  PAPO_DEVICE int whole_rounds(const TeamWarp& t) const {
    return whole_rounds_of(static_cast<int>(static_cast<uint32_t>(count) / kPerWord<T>), t.warp,
                           t.log_threads);
  }
  PAPO_DEVICE int rounds(const TeamWarp& t) const {
    return rounds_of(words(), t.warp, t.log_threads);
  }
};

// ---- the largest element ------------------------------------------------------------------------

// Meets `rounds` words, first, first + threads, ..., four at a time.
template <typename T>
PAPO_DEVICE void meet_words(LaneTop<T>& top, const SharedRow<T>& row, int first, int threads,
                            int rounds) {
#pragma unroll 1
  for (; rounds >= 4; rounds -= 4, first += 4 * threads) {
    Word w[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) w[u] = row.aligned_word(first + u * threads);
#pragma unroll
    for (int u = 0; u < 4; ++u) top.meet(w[u]);
  }
  // Meeting a word twice does no harm.
  if (rounds == 0) return;
  const int last = first + (rounds - 1) * threads;
  Word w[3];
#pragma unroll
  for (int u = 0; u < 3; ++u) w[u] = row.aligned_word(u + 1 < rounds ? first + u * threads : last);
#pragma unroll
  for (int u = 0; u < 3; ++u) top.meet(w[u]);
}

// The 32 words of a round are one run of elements. If it starts off a 16-byte boundary, 31 aligned
// words lie within it, and a part of a word at each end. Each lane meets the ends of some rounds.
template <typename T>
PAPO_DEVICE void meet_unaligned(LaneTop<T>& top, const SharedRow<T>& row, const TeamWarp& t,
                                int rounds) {
  if (rounds == 0) return;
  const SharedRow<T> floor = {row.address & ~15u};
  const int before = static_cast<int>(row.address & 15u) / T::kBytes;
  // Lane 0 meets its neighbor's word once more.
  const int inner = 32 * t.warp + (t.lane > 0 ? t.lane : 1);
  meet_words(top, floor, inner, t.threads(), rounds);
#pragma unroll 1
  for (int round = t.lane; round < rounds; round += 32) {
    const int run = 32 * t.warp + (round << t.log_threads);
    top.meet(drop_first<T>(floor.aligned_word(run), before));
    top.meet(keep_first<T>(floor.aligned_word(run + 32), before, T::kMasked));
  }
}

template <typename T>
PAPO_DEVICE void meet_stage(LaneTop<T>& top, const Stage<T>& stage, const TeamWarp& t) {
  const int whole = stage.whole_rounds(t);
  if (stage.row.aligned()) {
    meet_words(top, stage.row, t.first_word(), t.threads(), whole);
  } else {
    meet_unaligned(top, stage.row, t, whole);
  }
  if (stage.rounds(t) == whole) return;
  top.meet(stage.last_word(t.first_word() + (whole << t.log_threads), T::kMasked));
}

// ---- the sums -----------------------------------------------------------------------------------

// How a lane's words are added; the order is the same, and so are the bits. Measured on an H200,
// where code that runs once a row takes twice the time of the same instructions in a loop:
enum class Batch {
  kOne,  // one short loop, the next word on its way: faster beside warps that write gradients
  kTwo,  // two words in flight, and single ones behind them: faster elsewhere
};

template <bool kAligned, bool kRaised, int kWords, typename T>
PAPO_DEVICE void add_words(WarpScan<T>& sums, const SharedRow<T>& row, int first, int threads) {
  Word w[kWords];
#pragma unroll
  for (int u = 0; u < kWords; ++u) {
    const int i = first + u * threads;
    w[u] = kAligned ? row.aligned_word(i) : row.word(i);
  }
  sums.template add<kRaised>(w);
}

template <bool kAligned, bool kRaised, typename T>
PAPO_DEVICE void add_one_by_one(WarpScan<T>& sums, const Stage<T>& stage, const TeamWarp& t,
                                uint32_t low_bits) {
  const int whole = stage.whole_rounds(t), rounds = stage.rounds(t);
  // What is behind the last element is too far below the maximum to count.
  const auto load = [&](int round) {
    const int i = t.first_word() + (round << t.log_threads);
    if (round >= whole) return stage.last_word(i, low_bits);
    return kAligned ? stage.row.aligned_word(i) : stage.row.word(i);
  };
  Word next = {};
  if (rounds > 0) next = load(0);
#pragma unroll 1
  for (int round = 1; round <= rounds; ++round) {
    const Word w[1] = {next};
    if (round < rounds) next = load(round);
    sums.template add<kRaised>(w);
  }
}

template <bool kAligned, bool kRaised, typename T>
PAPO_DEVICE void add_two_by_two(WarpScan<T>& sums, const Stage<T>& stage, const TeamWarp& t,
                                uint32_t low_bits) {
  const int threads = t.threads(), whole = stage.whole_rounds(t);
  int left = whole, i = t.first_word();
#pragma unroll 1
  for (; left >= 2; left -= 2, i += 2 * threads) {
    add_words<kAligned, kRaised, 2>(sums, stage.row, i, threads);
  }
  if (left > 0) {
    add_words<kAligned, kRaised, 1>(sums, stage.row, i, threads);
    i += threads;
  }
  if (stage.rounds(t) == whole) return;
  Word last[1] = {stage.last_word(i, low_bits)};
  sums.template add<kRaised>(last);
}

template <Batch kBatch, bool kAligned, bool kRaised, typename T>
PAPO_DEVICE void add_stage(WarpScan<T>& sums, const Stage<T>& stage, const TeamWarp& t,
                           uint32_t low_bits) {
  if constexpr (kBatch == Batch::kOne) {
    add_one_by_one<kAligned, kRaised>(sums, stage, t, low_bits);
  } else {
    add_two_by_two<kAligned, kRaised>(sums, stage, t, low_bits);
  }
}

template <typename T>
PAPO_DEVICE void add_stage_carefully(WarpScan<T>& sums, const Stage<T>& stage, const TeamWarp& t) {
  const int rounds = stage.rounds(t);
  int i = t.first_word();
#pragma unroll 1
  for (int round = 1; round <= rounds; ++round, i += t.threads()) {
    Word w[1] = {round < rounds ? stage.row.word(i) : stage.last_word(i, T::kMasked)};
    sums.add_careful(w);
  }
}

template <Batch kBatch, bool kRaised, typename T, typename At>
PAPO_DEVICE void add_stages(WarpScan<T>& sums, int stages, const At& at, const TeamWarp& t,
                            uint32_t low_bits) {
#pragma unroll 1
  for (int s = 0; s < stages; ++s) {
    const Stage<T> stage = at(s);
    if (stage.row.aligned()) {
      add_stage<kBatch, true, kRaised>(sums, stage, t, low_bits);
    } else {
      add_stage<kBatch, false, kRaised>(sums, stage, t, low_bits);
    }
  }
}

// Sums the slice in the buffers at(0) ... at(stages - 1). Buffer s holds its elements once wait(s)
// has returned. `masked` says whether the warp expects -inf among them. It is kept from row to row,
// as a row with masked logits is usually followed by others.
template <Batch kBatch, typename T, typename Wait, typename At>
PAPO_DEVICE void scan_slice(WarpScan<T>& sums, int stages, const Wait& wait, const At& at,
                            const TeamWarp& t, uint32_t low_bits, bool& masked) {
  LaneTop<T> top;
#pragma unroll 1
  for (int s = 0; s < stages; ++s) {
    wait(s);
    meet_stage(top, at(s), t);
  }
  if (!sums.start(top.largest())) return;
  if (sums.careful()) {
#pragma unroll 1
    for (int s = 0; s < stages; ++s) add_stage_carefully(sums, at(s), t);
    return;
  }
  if (!masked) {
    add_stages<kBatch, false>(sums, stages, at, t, low_bits);
    masked = sums.met_masked();
    if (!masked) return;
    sums.restart();
  }
  add_stages<kBatch, true>(sums, stages, at, t, low_bits);
}

}  // namespace cuda
}  // namespace papo
