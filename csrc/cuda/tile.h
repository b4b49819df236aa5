// How rows are cut: over the blocks of a cluster, into buffers in shared memory, into 16-byte
// words. Plain index arithmetic for host and device; tests/cpp/tile_walk.cpp checks it
// exhaustively.
#pragma once

#include <stdint.h>

#include "papo/platform.h"

namespace papo {
namespace cuda {

constexpr int kWordBytes = 16;
constexpr int kMaxWarps = 8;      // that compute, in a block that has its multiprocessor to itself
constexpr int kPairedWarps = 4;   // the same, where two blocks share one
constexpr int kStreamWarps = 8;   // the same, where a block reads whole rows
constexpr int kServiceWarps = 2;  // the one that copies and the one that finishes rows
constexpr int kMaxThreads = 512;  // not below the above, and caps the registers at 128
constexpr int kMaxCluster = 16;
constexpr int kMaxRing = 8;
constexpr int kBatchWords = 8;   // words per thread between two looks at the running maximum
constexpr int kStreamBatch = 4;  // the same, where the next batch is in registers too
constexpr int kReservedShared = 1024;  // taken by the system from each block's shared memory

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

// How the rows of a call are worked on. It depends on the vocabulary, the logits' type and the
// device, and on nothing else: the sums of a row are then formed in the same order in every call,
// whatever the number of rows, and logp is the same to the last bit in all of them.
struct Tile {
  int cluster;  // blocks that share a row; 0: a block reads a row from global memory, twice
  int warps;    // that compute, per block
  int slice;    // columns of a row per block
  int stage;    // columns per buffer
  int stages;   // buffers that a slice fills
  int ring;     // buffers of a block
  int stage_bytes;
  int shared_bytes;
  bool ahead;  // a row's sums are formed before the gradient of the row before it
};

struct Span {
  int begin, count;
};

PAPO_HD Span span_of(int part, int size, int total) {
  const int64_t begin = smaller(static_cast<int64_t>(part) * size, total);
  return {static_cast<int>(begin), static_cast<int>(smaller(size, total - begin))};
}

// Part `part` of the columns [begin, end) of a row, cut into `parts` of whole words.
PAPO_HD Span span_between(int64_t begin, int64_t end, int part, int parts, int per_word) {
  const int64_t size = round_up(ceil_div(end - begin, parts), per_word);
  const int64_t first = smaller(begin + part * size, end);
  return {static_cast<int>(first), static_cast<int>(smaller(size, end - first))};
}

// A warp goes over a run of words in batches that start at words 32 warp, 32 warp + most * threads,
// ...: word u of a lane's batch is base + lane + u * threads. The first batch_size() of its `most`
// words lie in the run for some lane.
PAPO_HD int batch_size(int base, int words, int threads, int most) {
  return static_cast<int>(smaller(most, ceil_div(words - base, threads)));
}

// Offsets in a block's shared memory.
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

// The buffer of `columns` columns: one more word, as a row may start anywhere within one.
PAPO_HD int buffer_bytes(int columns, int element_bytes) {
  return static_cast<int>(round_up(static_cast<int64_t>(columns) * element_bytes, kWordBytes)) +
         kWordBytes;
}

// The warps that `words` keep busy, a power of two of at most `most`.
PAPO_HD int useful_warps(int64_t words, int words_per_warp, int most) {
  int warps = 1;
  while (warps < most && static_cast<int64_t>(warps) * words_per_warp < words) warps *= 2;
  return warps;
}

// The tile that cuts a row over `cluster` blocks with `budget` bytes of shared memory each; its
// cluster is 0 where the row does not fit. `rows_wanted`: slices that the ring must hold at least.
inline Tile fit_tile(int64_t columns, int element_bytes, int cluster, int most_warps, int budget,
                     int rows_wanted) {
  constexpr int kStageBytes = 32768;  // of a slice that is too long to be one buffer
  const int per_word = kWordBytes / element_bytes;
  Tile t = {};
  t.slice = static_cast<int>(round_up(ceil_div(columns, cluster), per_word));
  const int64_t words = t.slice / per_word;
  t.warps = useful_warps(words, 32 * kBatchWords, most_warps);
  const int64_t fixed = make_layout(cluster, t.warps, kMaxRing, 0).bytes;
  const bool whole = rows_wanted > 1;
  t.stages = whole ? 1 : static_cast<int>(larger(1, ceil_div(words * kWordBytes, kStageBytes)));
  t.stage = static_cast<int>(round_up(ceil_div(t.slice, t.stages), per_word));
  t.stage_bytes = buffer_bytes(t.stage, element_bytes);
  t.ring = static_cast<int>(smaller((budget - fixed) / t.stage_bytes, kMaxRing));
  // One buffer more than a row, so that the next row is on its way while this one is finished.
  const int least = whole ? rows_wanted : t.stages + 1;
  if (t.ring < least) return t;
  if (whole) t.ring = static_cast<int>(smaller(t.ring, 4));
  t.cluster = cluster;
  t.shared_bytes = make_layout(cluster, t.warps, t.ring, t.stage_bytes).bytes;
  t.ahead = t.ring > 2 * t.stages;
  return t;
}

// The tile of rows that a block reads from global memory.
inline Tile stream_tile(int64_t columns, int element_bytes) {
  Tile t = {};
  t.warps = useful_warps(ceil_div(columns * element_bytes, kWordBytes),
                         32 * kStreamBatch * 4, kStreamWarps);
  t.slice = static_cast<int>(columns);
  return t;
}

// Prefers two blocks on a multiprocessor, so that one computes where the other waits, and the
// smallest cluster whose blocks hold three rows: one being finished, one being summed, one on its
// way.
inline Tile choose_tile(int64_t columns, int element_bytes, const DeviceLimits& device) {
  const int half = device.shared_per_multiprocessor / 2 - kReservedShared;
  const int shared = static_cast<int>(smaller(half, device.shared_per_block));
  for (int cluster = 1; cluster <= smaller(8, device.max_cluster); cluster *= 2) {
    const Tile t = fit_tile(columns, element_bytes, cluster, kPairedWarps, shared, 3);
    if (t.cluster != 0) return t;
  }
  // A long row takes the multiprocessor for one block.
  for (int cluster = 8; cluster <= device.max_cluster; cluster *= 2) {
    for (int rows_wanted = 3; rows_wanted > 0; --rows_wanted) {
      const Tile t = fit_tile(columns, element_bytes, cluster, kMaxWarps, device.shared_per_block,
                              rows_wanted);
      if (t.cluster != 0) return t;
    }
  }
  return stream_tile(columns, element_bytes);
}

}  // namespace cuda
}  // namespace papo
