// How rows are cut: over the blocks of a cluster, into buffers in shared memory, into 16-byte
// words. Plain index arithmetic for host and device; tests/cpp/tile_walk.cpp checks it
// exhaustively.
#pragma once

#include <stdint.h>

#include "papo/platform.h"

namespace papo {
namespace cuda {

constexpr int kWordBytes = 16;
constexpr int kWholeWarps = 8;    // that compute, in a block that has its multiprocessor to itself
constexpr int kPairedWarps = 4;   // the same, where two blocks share one
constexpr int kStreamWarps = 8;   // the same, where a block reads whole rows
constexpr int kServiceWarps = 2;  // the one that copies and the one that finishes rows
constexpr int kMaxWarps = 16;     // that compute, in a block of a cluster
constexpr int kMaxStatsWarps = 8;  // the same, in a block that takes all slices
constexpr int kResidentThreads = 32 * (kMaxWarps + kServiceWarps);
constexpr int kStatsThreads = 32 * (kMaxStatsWarps + kServiceWarps);
constexpr int kMaxCluster = 16;
constexpr int kMaxRing = 8;
constexpr int kUsefulWords = 8;  // of a thread, before another warp is worth its once-a-row work
constexpr int kScanWords = 4;    // of a thread that are summed together, of a slice on chip
// Rows for each block that takes all slices. With fewer some blocks have nothing to do at the end,
// while a cluster shares the work of the last row.
constexpr int kStatsRounds = 8;
constexpr int kStreamBatch = 4;  // words per thread between two looks at the running maximum
constexpr int kReservedShared = 1024;  // taken by the system from each block's shared memory
constexpr int64_t kMostStageBytes = 1 << 20;  // fewer than a barrier can count

PAPO_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PAPO_HD int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
PAPO_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PAPO_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- a run of elements in memory ----------------------------------------------------------------

// `elements` from some address on, as whole aligned words with ragged ends:
// head elements | words x 16 bytes | tail elements.
struct Walk {
  int head, words, tail;
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
// a few bytes of its neighbours in the same word, but never leave [lowest, highest), the bytes of
// the matrix: what the copy then lacks at the ends are `head` and `tail` elements.
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

// ---- a row over a cluster -----------------------------------------------------------------------

struct DeviceLimits {
  int multiprocessors;
  int shared_per_block;
  int shared_per_multiprocessor;
  int max_cluster;  // 0: no clusters or bulk copies
};

// How the rows of a call are cut. It depends on the vocabulary, the logits' type and the device, and
// on nothing else: the sums of a row are then formed in the same order in every call, whatever the
// number of rows, and logp is the same to the last bit in all of them.
struct Tile {
  int cluster;  // slices of a row, and blocks that share it; 0: rows are read from global memory
  int warps;    // that compute, per slice
  int slice;    // columns of a row per block
  int stage;    // columns per buffer
  int stages;   // buffers that a slice fills
  int ring;     // buffers of a block
  int blocks;   // on a multiprocessor
  int stage_bytes;
  int shared_bytes;
  bool ahead;  // a row's sums are formed before the gradient of the row before it
};

// How a block takes all slices of a row in turn, where no gradient is wanted: teams of tile.warps
// warps, each with a slice. The sums are those of the same Tile, to the last bit.
struct StatsTile {
  int teams;   // 0: the rows of statistics are shared by clusters too
  int ring;    // buffers of a slice
  int blocks;  // on a multiprocessor
  int rounds;  // rows for each block, at least
  int shared_bytes;
};

struct Span {
  int begin, count;
};

// Part `part` of `total` columns in parts of `size`; part * size is below 2^31, as there are at most
// 2^30 columns.
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

// A warp's part of a run of words in shared memory: word 32 warp + lane, and then every
// 2^log_threads-th. rounds_of() is how many of them some lane of it has.
PAPO_HD int rounds_of(int words, int warp, int log_threads) {
  const int left = words - 32 * warp;
  return left <= 0 ? 0 : ((left - 1) >> log_threads) + 1;
}
// The rounds in which every lane has one of the `whole` first words. After them there is one round
// more or none, where no more than one word follows those.
PAPO_HD int whole_rounds_of(int whole, int warp, int log_threads) {
  return rounds_of(whole - 31, warp, log_threads);
}

PAPO_HD int log2_of(int x) {
  int n = 0;
  while ((1 << n) < x) ++n;
  return n;
}

// Offsets in the shared memory of a block that shares its rows with a cluster.
struct SharedLayout {
  int exchange;  // [2][cluster] CtaMessage
  int partial;   // [2][warps] WarpMessage
  int plan;      // [2] ElementGrad
  int barriers;  // full[ring], empty[ring], partial[2], exchange[2], plan[2]
  int bytes;
};

constexpr int kCtaMessageBytes = 48;
constexpr int kWarpMessageBytes = 32;
constexpr int kPlanBytes = 32;
constexpr int kBarrierBytes = 8;

PAPO_HD SharedLayout make_layout(int cluster, int warps, int ring, int stage_bytes) {
  SharedLayout s;
  s.exchange = ring * stage_bytes;
  s.partial = s.exchange + 2 * cluster * kCtaMessageBytes;
  s.plan = s.partial + 2 * warps * kWarpMessageBytes;
  s.barriers = s.plan + 2 * kPlanBytes;
  s.bytes = s.barriers + (2 * ring + 6) * kBarrierBytes;
  return s;
}

// The same of a block that takes all slices of its rows.
struct StatsLayout {
  int partial;   // [slices][warps] WarpMessage
  int barriers;  // full[ring], empty[ring], partial, taken
  int bytes;
};

PAPO_HD StatsLayout make_stats_layout(int slices, int warps, int ring, int stage_bytes) {
  StatsLayout s;
  s.partial = ring * stage_bytes;
  s.barriers = s.partial + slices * warps * kWarpMessageBytes;
  s.bytes = s.barriers + (2 * ring + 2) * kBarrierBytes;
  return s;
}

// The buffer of `columns` columns: one more word, as a row may start anywhere within one.
PAPO_HD int64_t buffer_bytes(int64_t columns, int element_bytes) {
  return round_up(columns * element_bytes, kWordBytes) + kWordBytes;
}

// The warps that `words` keep busy, a power of two of at most `most`.
PAPO_HD int useful_warps(int64_t words, int words_per_warp, int most) {
  int warps = 1;
  while (warps < most && static_cast<int64_t>(warps) * words_per_warp < words) warps *= 2;
  return warps;
}

// ---- the choice ---------------------------------------------------------------------------------

constexpr int kRegisters = 65536;     // of a multiprocessor
constexpr int kOnChipRegisters = 96;  // of a thread, at most, in the kernels that keep rows on chip

// As many of `most` workers as have equal shares of `rows`: with more, some would be idle while
// others do their last row.
PAPO_HD int64_t even_grid(int64_t rows, int64_t most) {
  return rows == 0 ? 0 : ceil_div(rows, ceil_div(rows, most));
}

// Bytes that one of `blocks` blocks on a multiprocessor may have.
PAPO_HD int64_t shared_budget(const DeviceLimits& device, int blocks) {
  const int64_t share = device.shared_per_multiprocessor / blocks - kReservedShared;
  return larger(0, smaller(share, device.shared_per_block));
}

// What a block must ask for so that no more than `blocks` of them share a multiprocessor.
PAPO_HD int exclusive_bytes(const DeviceLimits& device, int blocks, int bytes) {
  const int64_t most = device.shared_per_multiprocessor / (blocks + 1) - kReservedShared;
  const int64_t least = round_up(larger(most, 0) + 1, kWordBytes);
  return static_cast<int>(larger(bytes, smaller(least, device.shared_per_block)));
}

// A row of `columns` cut over `cluster` blocks; its shared memory is that of `ring` buffers.
inline Tile make_tile(int64_t columns, int element_bytes, int cluster, int warps, int stages,
                      int ring, int blocks) {
  const int per_word = kWordBytes / element_bytes;
  Tile t = {};
  const int64_t slice = round_up(ceil_div(columns, cluster), per_word);
  const int64_t stage = round_up(ceil_div(slice, stages), per_word);
  const int64_t bytes = buffer_bytes(stage, element_bytes);
  // Beyond what any device has; as an int it might look small.
  if (bytes > kMostStageBytes) return t;
  t.cluster = cluster;
  t.warps = warps;
  t.slice = static_cast<int>(slice);
  t.stage = static_cast<int>(stage);
  t.stages = stages;
  t.ring = ring;
  t.blocks = blocks;
  t.stage_bytes = static_cast<int>(bytes);
  t.shared_bytes = make_layout(cluster, warps, ring, t.stage_bytes).bytes;
  t.ahead = ring > 2 * stages;
  return t;
}

// The tile that cuts a row over `cluster` blocks, `blocks` of them on a multiprocessor; its cluster
// is 0 where the row does not fit. `rows_wanted`: slices that the ring must hold at least.
inline Tile fit_tile(int64_t columns, int element_bytes, int cluster, int most_warps,
                     const DeviceLimits& device, int blocks, int rows_wanted) {
  constexpr int64_t kStageBytes = 32768;  // of a slice that is too long to be one buffer
  const int per_word = kWordBytes / element_bytes;
  const int64_t words = ceil_div(ceil_div(columns, cluster), per_word);
  const bool whole = rows_wanted > 1;
  const int64_t stages = whole ? 1 : larger(1, ceil_div(words * kWordBytes, kStageBytes));
  if (stages >= kMaxRing) return Tile{};
  const int warps = useful_warps(words, 32 * kUsefulWords, most_warps);
  // One buffer more than a row, so that the next row is on its way while this one is finished.
  const int least = whole ? rows_wanted : static_cast<int>(stages) + 1;
  for (int ring = whole ? 4 : kMaxRing; ring >= least; --ring) {
    const Tile t = make_tile(columns, element_bytes, cluster, warps, static_cast<int>(stages), ring,
                             blocks);
    if (t.cluster != 0 && t.shared_bytes <= shared_budget(device, blocks)) return t;
  }
  return Tile{};
}

// The tile of rows that a block reads from global memory.
inline Tile stream_tile(int64_t columns, int element_bytes) {
  Tile t = {};
  t.warps = useful_warps(ceil_div(columns * element_bytes, kWordBytes),
                         32 * kStreamBatch * 4, kStreamWarps);
  t.slice = static_cast<int>(columns);
  return t;
}

// The same tile with as many blocks on a multiprocessor as fit: short rows leave room for more.
inline Tile crowded(Tile t, const DeviceLimits& device) {
  const int threads = 32 * (t.warps + kServiceWarps);
  const auto fits = [&](int blocks) {
    return t.shared_bytes <= shared_budget(device, blocks) &&
           blocks * threads * kOnChipRegisters <= kRegisters;
  };
  while (fits(t.blocks + 1)) ++t.blocks;
  return t;
}

// Prefers two blocks or more on a multiprocessor, so that one computes where the other waits, and
// the smallest cluster whose blocks hold three rows: one being finished, one being summed, one on
// its way.
inline Tile derived_tile(int64_t columns, int element_bytes, const DeviceLimits& device) {
  for (int cluster = 1; cluster <= smaller(8, device.max_cluster); cluster *= 2) {
    const Tile t = fit_tile(columns, element_bytes, cluster, kPairedWarps, device, 2, 3);
    if (t.cluster != 0) return crowded(t, device);
  }
  // A long row takes the multiprocessor for one block.
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

// As many teams as fill a block, and a buffer more than there are teams. No teams: a row of one
// slice, and slices of several buffers, are the cluster kernel's.
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
