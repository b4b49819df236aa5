// How rows are cut: over the blocks of a cluster, into buffers in shared memory, and into 16-byte
// words. This is plain index arithmetic for host and device, which tests/cpp/tile_walk.cpp checks
// exhaustively.
#pragma once

#include <stdint.h>

#include "papo/platform.h"

namespace papo {
namespace cuda {

constexpr int kWordBytes = 16;
// How many warps that sum a derived tile gives a block at most:
constexpr int kWholeWarps = 8;   // one that has a multiprocessor to itself
constexpr int kPairedWarps = 4;  // one that shares a multiprocessor
constexpr int kStreamWarps = 8;  // one that reads rows from global memory
// How many a block can have:
constexpr int kMaxWarps = 8;       // one of a cluster, which has as many again that write gradients
constexpr int kMaxStatsWarps = 8;  // one that takes all slices of a row
constexpr int kServiceWarps = 2;   // beside these: one copies, one finishes rows
constexpr int kStatsThreads = 32 * (kMaxStatsWarps + kServiceWarps);
constexpr int kMaxCluster = 16;
constexpr int kMaxRing = 8;
// Words of a thread, below which another warp is not worth what it does once a row.
constexpr int kUsefulWords = 16;
constexpr int kStreamBatch = 4;  // the same, from global memory
// The fewest rows for each block that takes all slices. With fewer rows some blocks would be idle
// at the end, where a cluster shares the last row.
constexpr int kStatsRounds = 8;
constexpr int kReservedShared = 1024;  // bytes of a block's shared memory that the system takes
// Columns are counted in 32 bits, and so is what rounds them up. Callers refuse longer rows.
constexpr int64_t kMostColumns = int64_t{1} << 30;
constexpr int64_t kMostStageBytes = 1 << 20;  // fewer than a barrier can count

PAPO_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PAPO_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
PAPO_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PAPO_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- a run of elements in memory ----------------------------------------------------------------

// A run of elements in memory, as whole aligned words with ragged ends:
// head elements | words x 16 bytes | tail elements.
struct Walk {
  int head, words, tail;

  // How many elements the two ends have, and where the k-th of these is in a run of `count`.
  PAPO_HD int ends() const { return head + tail; }
  PAPO_HD int end_place(int k, int count) const { return k < head ? k : count - tail + (k - head); }
};

PAPO_HD Walk make_walk(uintptr_t address, int64_t elements, int element_bytes) {
  const int per_word = kWordBytes / element_bytes;
  const int off = static_cast<int>(address % kWordBytes) / element_bytes;
  const int64_t head = smaller((per_word - off) % per_word, elements);
  const int64_t words = (elements - head) / per_word;
  return {static_cast<int>(head), static_cast<int>(words),
          static_cast<int>(elements - head - words * per_word)};
}

// The aligned bytes [begin, end) that one bulk copy brings for a run of elements. They may include
// neighbors of the run in the same word, but no byte outside [lowest, highest), the matrix. Where
// that makes the copy too short, `head` and `tail` elements are missing at its ends.
struct CopyRange {
  uintptr_t begin, end;
  int head, tail;
};

PAPO_HD CopyRange make_copy_range(uintptr_t first, int elements, int element_bytes,
                                  uintptr_t lowest, uintptr_t highest) {
  const uintptr_t last = first + static_cast<uintptr_t>(elements) * element_bytes;
  uintptr_t begin = first / kWordBytes * kWordBytes;
  uintptr_t end = (last + kWordBytes - 1) / kWordBytes * kWordBytes;
  if (begin < lowest) begin += kWordBytes;
  if (end > highest) end -= kWordBytes;
  if (begin >= end) return {begin, begin, elements, 0};
  return {begin, end, begin > first ? static_cast<int>(begin - first) / element_bytes : 0,
          last > end ? static_cast<int>(last - end) / element_bytes : 0};
}

// ---- tiles --------------------------------------------------------------------------------------

struct DeviceLimits {
  int multiprocessors;
  int shared_per_block;
  int shared_per_multiprocessor;
  int max_cluster;  // 0: it has neither clusters nor bulk copies
};

// How the rows of a call are cut. It depends on the vocabulary, the type of the logits and the
// device, and not on the number of rows. So every call forms the sums of a row in the same order,
// and logp has the same bits in all of them.
struct Tile {
  int cluster;  // blocks that share a row, a slice each; 0: rows are read from global memory
  int warps;    // that sum a slice; as many write its gradient
  int slice;    // columns of a slice
  int stage;    // columns of a buffer
  int stages;   // buffers that a slice fills
  int ring;     // buffers that a block has
  int blocks;   // on a multiprocessor
  int summing;  // blocks on a multiprocessor where no gradient is wanted
  int stage_bytes;
  int shared_bytes;

  // Slices that the ring holds at a time: a row is summed while the gradients of those before it
  // are still to be written.
  PAPO_HD int rows() const { return ring / stages; }
};

// How a block takes all slices of a row in turn, where no gradient is wanted. Each of its teams of
// tile.warps warps sums a slice at a time. The sums have the same bits as with the Tile alone.
struct StatsTile {
  int teams;   // 0: clusters share the rows of statistics too
  int ring;    // buffers that a block has, a slice each
  int blocks;  // on a multiprocessor
  int rounds;  // the fewest rows for each block
  int shared_bytes;
};

struct Span {
  int begin, count;
};

// Part `part` of `total` columns, in parts of `size`. kMostColumns keeps part * size below 2^31.
PAPO_HD Span span_of(int part, int size, int total) {
  const int begin = part * size < total ? part * size : total;
  return {begin, size < total - begin ? size : total - begin};
}

// Part `part` of the columns [begin, end) of a row, cut into `parts` of whole words.
PAPO_HD Span span_between(int64_t begin, int64_t end, int part, int parts, int per_word) {
  const int64_t size = round_up(ceil_div(end - begin, parts), per_word);
  const int64_t first = smaller(begin + part * size, end);
  return {static_cast<int>(first), static_cast<int>(smaller(size, end - first))};
}

// Of a run of words in shared memory a lane has word 32 warp + lane, and then every
// 2^log_threads-th. This is how many words a lane of the warp has at most: its rounds.
PAPO_HD int rounds_of(int words, int warp, int log_threads) {
  const int left = words - 32 * warp;
  return left <= 0 ? 0 : ((left - 1) >> log_threads) + 1;
}
// The rounds in which every lane has one of the first `whole` words. If at most one word follows
// those, at most one round follows these.
PAPO_HD int whole_rounds_of(int whole, int warp, int log_threads) {
  return rounds_of(whole - 31, warp, log_threads);
}

PAPO_HD int log2_of(int x) {
  int n = 0;
  while ((1 << n) < x) ++n;
  return n;
}

// Offsets in the shared memory of a block of a cluster.
struct SharedLayout {
  int messages;  // [turns][cluster][warps] WarpMessage, of the rows that this block finishes
  int plan;      // [rows] ElementGrad
  int barriers;  // full[ring], empty[ring], plan[rows], messages[turns]
  int bytes;
};

constexpr int kMessageBytes = 32;
constexpr int kPlanBytes = 32;
constexpr int kBarrierBytes = 8;

// The blocks of a cluster finish its rows in turn: how many of the `rows` that a ring holds are one
// block's, at most.
PAPO_HD int turns_of(int cluster, int rows) { return (rows + cluster - 1) / cluster; }

PAPO_HD SharedLayout make_layout(int cluster, int warps, int rows, int ring, int stage_bytes) {
  const int turns = turns_of(cluster, rows);
  SharedLayout s;
  s.messages = ring * stage_bytes;
  s.plan = s.messages + turns * cluster * warps * kMessageBytes;
  s.barriers = s.plan + rows * kPlanBytes;
  s.bytes = s.barriers + (2 * ring + rows + turns) * kBarrierBytes;
  return s;
}

// The same for a block that takes all slices of its rows.
struct StatsLayout {
  int messages;  // [slices][warps] WarpMessage
  int barriers;  // full[ring], empty[ring], partial, taken
  int bytes;
};

PAPO_HD StatsLayout make_stats_layout(int slices, int warps, int ring, int stage_bytes) {
  StatsLayout s;
  s.messages = ring * stage_bytes;
  s.barriers = s.messages + slices * warps * kMessageBytes;
  s.bytes = s.barriers + (2 * ring + 2) * kBarrierBytes;
  return s;
}

// The bytes of a buffer for `columns`. It has one more word than they fill, as a row may start
// anywhere within a word.
PAPO_HD int64_t buffer_bytes(int64_t columns, int element_bytes) {
  return round_up(columns * element_bytes, kWordBytes) + kWordBytes;
}

// How many warps `words` keep busy: a power of two, and `most` at most.
PAPO_HD int useful_warps(int64_t words, int words_per_warp, int most) {
  int warps = 1;
  while (warps < most && static_cast<int64_t>(warps) * words_per_warp < words) warps *= 2;
  return warps;
}

// ---- the choice ---------------------------------------------------------------------------------

// The threads of a block that sums with so many warps and writes gradients with as many.
PAPO_HD int64_t writing_threads(int64_t warps) { return 32 * (2 * warps + kServiceWarps); }
// The same without a gradient.
PAPO_HD int64_t summing_threads(int64_t warps) { return 32 * (warps + kServiceWarps); }
constexpr int kResidentThreads = 32 * (2 * kMaxWarps + kServiceWarps);
constexpr int kRegisters = 65536;     // of a multiprocessor
constexpr int kOnChipRegisters = 96;  // that a thread has at most where rows stay on chip

// How many of `most` workers to use for `rows`: the fewest that take as many rounds as all of them.
PAPO_HD int64_t even_grid(int64_t rows, int64_t most) {
  return rows == 0 ? 0 : ceil_div(rows, ceil_div(rows, most));
}

// The shared memory that a block may have where `blocks` share a multiprocessor.
PAPO_HD int64_t shared_budget(const DeviceLimits& device, int blocks) {
  const int64_t share = device.shared_per_multiprocessor / blocks - kReservedShared;
  return larger(0, smaller(share, device.shared_per_block));
}

// The shared memory that a block must ask for, so that at most `blocks` share a multiprocessor.
PAPO_HD int exclusive_bytes(const DeviceLimits& device, int blocks, int bytes) {
  const int64_t most = device.shared_per_multiprocessor / (blocks + 1) - kReservedShared;
  const int64_t least = round_up(larger(most, 0) + 1, kWordBytes);
  return static_cast<int>(larger(bytes, smaller(least, device.shared_per_block)));
}

// The tile of rows of `columns`, cut over `cluster` blocks with `ring` buffers each.
inline Tile make_tile(int64_t columns, int element_bytes, int cluster, int warps, int stages,
                      int ring, int blocks) {
  const int per_word = kWordBytes / element_bytes;
  Tile t = {};
  const int64_t slice = round_up(ceil_div(columns, cluster), per_word);
  const int64_t stage = round_up(ceil_div(slice, stages), per_word);
  const int64_t bytes = buffer_bytes(stage, element_bytes);
  // No device has as much, but as an int it might look small.
  if (bytes > kMostStageBytes) return t;
  t.cluster = cluster;
  t.warps = warps;
  t.slice = static_cast<int>(slice);
  t.stage = static_cast<int>(stage);
  t.stages = stages;
  t.ring = ring;
  t.blocks = t.summing = blocks;
  t.stage_bytes = static_cast<int>(bytes);
  t.shared_bytes = make_layout(cluster, warps, t.rows(), ring, t.stage_bytes).bytes;
  return t;
}

// The tile that cuts a row over `cluster` blocks, where `blocks` share a multiprocessor and the
// ring holds at least `rows_wanted` slices. Its cluster is 0 if the row does not fit.
inline Tile fit_tile(int64_t columns, int element_bytes, int cluster, int most_warps,
                     const DeviceLimits& device, int blocks, int rows_wanted) {
  constexpr int64_t kStageBytes = 32768;  // of the buffers for a slice that does not fit in one
  const int per_word = kWordBytes / element_bytes;
  const int64_t words = ceil_div(ceil_div(columns, cluster), per_word);
  const bool whole = rows_wanted > 1;
  const int64_t stages = whole ? 1 : larger(1, ceil_div(words * kWordBytes, kStageBytes));
  if (stages >= kMaxRing) return Tile{};
  const int warps = useful_warps(words, 32 * kUsefulWords, most_warps);
  // One buffer more than a row fills: the next row is on its way while this one is finished.
  const int least = whole ? rows_wanted : static_cast<int>(stages) + 1;
  for (int ring = whole ? 4 : kMaxRing; ring >= least; --ring) {
    const Tile t = make_tile(columns, element_bytes, cluster, warps, static_cast<int>(stages), ring,
                             blocks);
    if (t.cluster != 0 && t.shared_bytes <= shared_budget(device, blocks)) return t;
  }
  return Tile{};
}

// The tile of rows that are read from global memory.
inline Tile stream_tile(int64_t columns, int element_bytes) {
  Tile t = {};
  t.warps = useful_warps(ceil_div(columns * element_bytes, kWordBytes),
                         32 * kStreamBatch * 4, kStreamWarps);
  t.slice = static_cast<int>(columns);
  return t;
}

// The same tile with as many blocks on a multiprocessor as fit. Short rows leave room for more.
inline Tile crowded(Tile t, const DeviceLimits& device) {
  const auto more = [&](int blocks, int64_t threads) {
    while (t.shared_bytes <= shared_budget(device, blocks + 1) &&
           (blocks + 1) * threads * kOnChipRegisters <= kRegisters) {
      ++blocks;
    }
    return blocks;
  };
  t.blocks = more(t.blocks, writing_threads(t.warps));
  t.summing = more(t.blocks, summing_threads(t.warps));
  return t;
}

// The best tile by rule. Two blocks or more share a multiprocessor, so that one computes while
// another waits. The cluster is the smallest whose blocks hold three rows: one being finished, one
// being summed, and one on its way.
inline Tile derived_tile(int64_t columns, int element_bytes, const DeviceLimits& device) {
  for (int cluster = 1; cluster <= smaller(8, device.max_cluster); cluster *= 2) {
    const Tile t = fit_tile(columns, element_bytes, cluster, kPairedWarps, device, 2, 3);
    if (t.cluster != 0) return crowded(t, device);
  }
  // For a long row a block takes a whole multiprocessor.
  for (int cluster = 8; cluster <= device.max_cluster; cluster *= 2) {
    for (int rows_wanted = 3; rows_wanted > 0; --rows_wanted) {
      const Tile t = fit_tile(columns, element_bytes, cluster, kWholeWarps, device, 1, rows_wanted);
      if (t.cluster != 0) return t;
    }
  }
  return stream_tile(columns, element_bytes);
}

inline StatsTile make_stats_tile(const Tile& tile, int teams, int ring, int blocks, int rounds) {
  const int bytes = make_stats_layout(tile.cluster, tile.warps, ring, tile.stage_bytes).bytes;
  return {teams, ring, blocks, rounds, bytes};
}

// As many teams as fill a block, and at least one buffer more. A row of one slice and slices of
// several buffers get no teams: they are left to the kernel of clusters.
inline StatsTile derived_stats_tile(const Tile& tile, const DeviceLimits& device) {
  if (tile.cluster < 2 || tile.stages != 1) return StatsTile{};
  for (int blocks = 2; blocks > 0; --blocks) {
    const int64_t most = larger(1, smaller(kMaxStatsWarps / tile.warps, tile.cluster));
    for (int teams = static_cast<int>(most); teams > 0; teams /= 2) {
      for (int ring = static_cast<int>(smaller(teams + 2, kMaxRing)); ring > teams; --ring) {
        const StatsTile s = make_stats_tile(tile, teams, ring, blocks, kStatsRounds);
        if (s.shared_bytes <= shared_budget(device, blocks)) return s;
      }
    }
  }
  return StatsTile{};
}

}  // namespace cuda
}  // namespace papo
