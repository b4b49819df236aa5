// Chooses the tiles of a call from what it asks for, or says why that does not fit the device.
#pragma once

#include <stdio.h>

#include "papo/params.h"
#include "tile.h"

namespace papo {
namespace cuda {

struct Chosen {
  Tile tile;
  StatsTile stats;
  const char* error;  // null if there is none; valid until the thread's next call of choose()
};

namespace choice {

inline bool power_of_two(int x) { return x > 0 && (x & (x - 1)) == 0; }

// The message for a `value` that does not keep a limit of the device or the kernel.
inline const char* beyond(const char* what, int64_t value, const char* limit, int64_t most) {
  thread_local char text[160];
  snprintf(text, sizeof(text), "%s is %lld, %s is %lld", what, static_cast<long long>(value), limit,
           static_cast<long long>(most));
  return text;
}

inline const char* no_power_of_two(const char* what, int value) {
  thread_local char text[80];
  snprintf(text, sizeof(text), "%s is %d, which is no power of two", what, value);
  return text;
}

// Why a multiprocessor has no room for `blocks` blocks of so many threads; null if it has.
inline const char* why_crowded(int64_t threads, int blocks, int64_t shared_bytes,
                               const DeviceLimits& device) {
  if (blocks < 1) return beyond("blocks", blocks, "the least", 1);
  const int64_t registers = threads * blocks * kOnChipRegisters;
  if (registers > kRegisters) {
    return beyond("what all blocks take of the registers", registers, "a multiprocessor's",
                  kRegisters);
  }
  const int64_t budget = shared_budget(device, blocks);
  if (shared_bytes > budget) {
    return beyond("a block's shared memory", shared_bytes, "the device's, for so many blocks",
                  budget);
  }
  return nullptr;
}

inline const char* why_unfit(const TileChoice& c, const Tile& t, const DeviceLimits& device) {
  if (device.max_cluster == 0) return "the device has no clusters: its rows are streamed";
  if (!power_of_two(c.cluster)) return no_power_of_two("cluster", c.cluster);
  if (c.cluster > device.max_cluster) {
    return beyond("cluster", c.cluster, "the device's largest", device.max_cluster);
  }
  if (!power_of_two(c.warps)) return no_power_of_two("warps", c.warps);
  if (c.warps > kMaxWarps) return beyond("warps", c.warps, "the kernel's most", kMaxWarps);
  if (c.stages < 1) return beyond("stages", c.stages, "the least", 1);
  if (c.ring > kMaxRing) return beyond("ring", c.ring, "the kernel's most", kMaxRing);
  if (c.ring <= c.stages) {
    return beyond("ring", c.ring, "the least beyond its stages", c.stages + 1);
  }
  const char* crowded = why_crowded(writing_threads(c.warps), c.blocks, t.shared_bytes, device);
  if (crowded != nullptr) return crowded;
  return t.cluster == 0 ? "a buffer would hold more bytes than a barrier can count" : nullptr;
}

inline const char* why_unfit(const TileChoice& c, const Tile& t, const StatsTile& s,
                             const DeviceLimits& device) {
  if (t.cluster == 0) return "statistics of streamed rows have no tile of their own";
  if (t.stages != 1) return beyond("stages", t.stages, "with statistics of their own the most", 1);
  if (!power_of_two(c.stats_teams)) return no_power_of_two("teams", c.stats_teams);
  if (c.stats_teams > t.cluster) {
    return beyond("teams", c.stats_teams, "the row's slices", t.cluster);
  }
  if (c.stats_ring > kMaxRing) return beyond("ring", c.stats_ring, "the kernel's most", kMaxRing);
  const int64_t warps = c.stats_teams * static_cast<int64_t>(t.warps);
  if (warps > kMaxStatsWarps) {
    return beyond("warps of all teams", warps, "the kernel's most", kMaxStatsWarps);
  }
  if (c.stats_ring < c.stats_teams) {
    return beyond("ring", c.stats_ring, "the least, a buffer a team,", c.stats_teams);
  }
  return why_crowded(summing_threads(warps), c.stats_blocks, s.shared_bytes, device);
}

}  // namespace choice

// The tiles of rows of `columns`: those that are asked for, and the others derived.
inline Chosen choose(const TileChoice& asked, int64_t columns, int element_bytes,
                     const DeviceLimits& device) {
  Chosen chosen = {};
  if (asked.kernel == kStreamed) {
    chosen.tile = stream_tile(columns, element_bytes);
  } else if (asked.cluster != 0) {
    // Numbers that cannot be a tile must not reach its arithmetic.
    const bool sane = asked.cluster > 0 && asked.stages > 0 && asked.ring > 0 && asked.warps > 0;
    if (sane && asked.cluster <= kMaxCluster && asked.ring <= kMaxRing) {
      chosen.tile = make_tile(columns, element_bytes, asked.cluster, asked.warps, asked.stages,
                              asked.ring, asked.blocks);
    }
    chosen.error = choice::why_unfit(asked, chosen.tile, device);
  } else {
    chosen.tile = derived_tile(columns, element_bytes, device);
    if (asked.kernel == kOnChip && chosen.tile.cluster == 0) {
      chosen.error = device.max_cluster == 0
                         ? "the device has no clusters: its rows are streamed"
                         : choice::beyond("columns", columns, "of bytes of shared memory a block",
                                          device.shared_per_block);
    }
  }
  if (chosen.error != nullptr || asked.stats == kStatsByClusters) return chosen;
  if (asked.stats == 0) {
    chosen.stats = derived_stats_tile(chosen.tile, device);
    return chosen;
  }
  if (asked.stats_ring <= kMaxRing) {
    chosen.stats = make_stats_tile(chosen.tile, asked.stats_teams, asked.stats_ring,
                                   asked.stats_blocks,
                                   asked.stats == kStatsGiven ? kStatsRounds : 0);
  }
  chosen.error = choice::why_unfit(asked, chosen.tile, chosen.stats, device);
  return chosen;
}

}  // namespace cuda
}  // namespace papo
