// csrc/cuda/tile.h and choice.h, exhaustively: every element in exactly one place, every access in
// bounds, every tile within the device's limits.
#include "../../csrc/cuda/choice.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace papo;
using namespace papo::cuda;

namespace {

long checks = 0;

#define CHECK(condition, ...)                              \
  do {                                                     \
    ++checks;                                              \
    if (!(condition)) {                                    \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                            \
      std::printf("\n");                                   \
      std::exit(1);                                        \
    }                                                      \
  } while (0)

const DeviceLimits kDevices[] = {
    {132, 232448, 233472, 16},  // H100, H200
    {148, 232448, 233472, 16},  // B200
    {170, 101376, 102400, 8},   // sm_120
    {2, 24000, 26000, 8},       // as in the emulator's tests
    {2, 9000, 6000, 8},
    {108, 166912, 167936, 0},  // A100
};

const int64_t kVocabularies[] = {
    1,      2,      7,      8,      9,      31,     33,     100,    1000,   1023,  1025,   4096,
    4097,   16385,  18944,  18945,  32000,  32001,  50257,  65536,  100277, 128256, 131072, 151936,
    151937, 152064, 201088, 248320, 256000, 262144, 262145, 450000, 500000, 1000003};

void check_walk() {
  for (const int bytes : {2, 4}) {
    for (uintptr_t off = 0; off < 32; off += bytes) {
      for (int64_t n = 0; n < 300; ++n) {
        const Walk w = make_walk(0x1000 + off, n, bytes);
        const int per_word = kWordBytes / bytes;
        CHECK(w.head + static_cast<int64_t>(w.words) * per_word + w.tail == n, "%d", w.head);
        CHECK(w.head >= 0 && w.head < per_word, "head %d", w.head);
        CHECK(w.tail >= 0 && w.tail < per_word, "tail %d", w.tail);
        CHECK(w.words == 0 || (0x1000 + off + w.head * bytes) % kWordBytes == 0, "off %d",
              static_cast<int>(off));
        CHECK(w.head + w.tail <= 32, "a warp takes the ends");
      }
    }
  }
}

// Runs [first, first + n) inside a matrix of `total` elements that starts `off` bytes into a word.
void check_copy_range() {
  for (const int bytes : {2, 4}) {
    for (uintptr_t off = 0; off < 16; off += bytes) {
      for (int total = 1; total < 70; ++total) {
        const uintptr_t lowest = 0x1000 + off, highest = lowest + total * bytes;
        for (int at = 0; at < total; ++at) {
          for (int n = 1; at + n <= total; ++n) {
            const uintptr_t first = lowest + at * bytes, last = first + n * bytes;
            const CopyRange r = make_copy_range(first, n, bytes, lowest, highest);
            CHECK(r.begin % 16 == 0 && r.end % 16 == 0 && r.begin <= r.end, "aligned");
            CHECK(r.begin == r.end || (r.begin >= lowest && r.end <= highest), "in the matrix");
            CHECK(r.begin == r.end || (r.begin + 16 > first && r.end < last + 16), "no detour");
            const bool none = r.begin == r.end;
            const uintptr_t from = none ? last : first + r.head * bytes;
            const uintptr_t to = none ? last : last - r.tail * bytes;
            CHECK(!none || r.head == n, "all by hand");
            CHECK(none || (r.begin <= from && r.end >= to && from <= to), "covered");
            CHECK(none || (r.head * bytes < 16 && r.tail * bytes < 16), "ends below a word");
            // Where the bulk copy lands in the buffer, and how much of it is read from.
            const uintptr_t buffer = first / 16 * 16;
            CHECK(none || r.end - buffer <= static_cast<uintptr_t>(buffer_bytes(n, bytes)),
                  "in the buffer");
          }
        }
      }
    }
  }
}

// What word(i) of a SharedRow reads: two aligned words.
void check_words_across() {
  for (const int bytes : {2, 4}) {
    const int per_word = kWordBytes / bytes;
    for (int shift = 0; shift < 16; shift += bytes) {
      for (int n = 1; n < 100; ++n) {
        for (int lead = 0; lead < per_word && lead < n; ++lead) {
          const int64_t words = ceil_div(n - lead, per_word);
          const int64_t at = shift + lead * bytes + 16 * (words - 1);
          const bool whole = (n - lead) % per_word == 0;
          // A ragged last word is read in the scan, from element 0, and not in the gradient.
          if (lead != 0 && !whole) continue;
          // Nothing is read across where the row is aligned.
          const int64_t end = at % 16 == 0 ? at + 16 : at / 16 * 16 + 32;
          CHECK(end <= buffer_bytes(n, bytes), "n %d shift %d lead %d", n, shift, lead);
        }
      }
    }
  }
}

void check_rounds() {
  for (const int warps : {1, 2, 4, 8, 16}) {
    const int threads = 32 * warps, log_threads = log2_of(threads);
    CHECK(1 << log_threads == threads, "%d", log_threads);
    for (int words = 0; words < 3000; words += words < 600 ? 1 : 37) {
      std::vector<int> seen(static_cast<size_t>(words));
      for (int warp = 0; warp < warps; ++warp) {
        const int rounds = rounds_of(words, warp, log_threads);
        const int whole = whole_rounds_of(words - 1, warp, log_threads);
        CHECK(whole <= rounds && rounds <= whole + 1, "%d of %d", whole, rounds);
        for (int lane = 0; lane < 32; ++lane) {
          for (int r = 0; r < rounds; ++r) {
            const int i = 32 * warp + lane + r * threads;
            CHECK(r >= whole || i < words - 1, "round %d of %d whole ones", r, whole);
            if (i < words) ++seen[static_cast<size_t>(i)];
          }
          CHECK(32 * warp + lane + rounds * threads >= words, "a word is left out");
        }
      }
      for (const int count : seen) CHECK(count == 1, "%d words, %d threads", words, threads);
    }
  }
}

void check_spans() {
  for (const int per_word : {4, 8}) {
    for (const int parts : {1, 2, 8, 16}) {
      for (int begin = 0; begin < 40; ++begin) {
        for (int end = begin; end < 300; ++end) {
          int next = begin;
          for (int p = 0; p < parts; ++p) {
            const Span s = span_between(begin, end, p, parts, per_word);
            CHECK(s.count >= 0 && (s.count == 0 || s.begin == next), "part %d", p);
            CHECK(s.count == 0 || (s.begin - begin) % per_word == 0, "whole words");
            next += s.count;
          }
          CHECK(next == end, "%d of [%d, %d)", next, begin, end);
        }
      }
    }
  }
}

using choice::power_of_two;

// Every limit of a device.
bool kept(const Tile& t, const DeviceLimits& device) {
  return power_of_two(t.cluster) && t.cluster <= device.max_cluster && power_of_two(t.warps) &&
         t.warps <= kMaxWarps && t.stages > 0 && t.ring > t.stages && t.ring <= kMaxRing &&
         t.blocks > 0 && t.shared_bytes <= device.shared_per_block &&
         writing_threads(t.warps) * t.blocks * kOnChipRegisters <= kRegisters &&
         t.blocks * (static_cast<int64_t>(t.shared_bytes) + kReservedShared) <=
             device.shared_per_multiprocessor;
}

void check_resident(const Tile& t, int64_t columns, int bytes, const DeviceLimits& device) {
  const int v = static_cast<int>(columns), per_word = kWordBytes / bytes;
  CHECK(power_of_two(t.cluster) && t.cluster <= device.max_cluster, "cluster %d", t.cluster);
  CHECK(power_of_two(t.warps) && t.warps <= kMaxWarps, "warps %d", t.warps);
  CHECK(writing_threads(t.warps) <= kResidentThreads, "threads");
  CHECK(t.ring > t.stages && t.ring <= kMaxRing, "ring %d", t.ring);
  CHECK((t.rows() + 1) * t.stages > t.ring, "a row waits for the one whose message it takes");
  CHECK(t.shared_bytes <= device.shared_per_block, "shared %d", t.shared_bytes);
  CHECK(t.slice % per_word == 0 && t.stage % per_word == 0, "whole words");
  CHECK(t.stage_bytes % 16 == 0 && t.stage_bytes >= buffer_bytes(t.stage, bytes), "stage");
  CHECK(t.stage_bytes <= kMostStageBytes, "a barrier counts no more bytes than that");
  const SharedLayout s = make_layout(t.cluster, t.warps, t.rows(), t.ring, t.stage_bytes);
  CHECK(s.messages % 16 == 0 && s.plan % 16 == 0, "words");
  CHECK(s.barriers % 8 == 0 && s.bytes == t.shared_bytes, "layout");
  int64_t next = 0;
  for (int rank = 0; rank < t.cluster; ++rank) {
    const Span slice = span_of(rank, t.slice, v);
    CHECK(slice.count >= 0 && slice.begin + slice.count <= v, "slice %d", rank);
    for (int k = 0; k < t.stages; ++k) {
      const Span stage = span_of(k, t.stage, slice.count);
      CHECK(stage.count >= 0 && stage.count <= t.stage, "stage %d", k);
      CHECK(stage.count == 0 || slice.begin + stage.begin == next, "stage %d of %d", k, rank);
      next += stage.count;
    }
  }
  CHECK(next == columns, "columns");
  CHECK(kept(t, device), "blocks %d", t.blocks);
}

void check_even_grid() {
  for (int64_t rows = 0; rows < 400; ++rows) {
    for (int64_t most = 1; most < 50; ++most) {
      const int64_t workers = even_grid(rows, most);
      CHECK(workers <= most && workers <= rows, "workers");
      if (rows == 0) continue;
      // No more rounds than with all of them, and no worker that a round less would do without.
      CHECK(ceil_div(rows, workers) == ceil_div(rows, most), "rounds");
      CHECK(workers == 1 || ceil_div(rows, workers - 1) > ceil_div(rows, most), "idle");
    }
  }
}

void check_stats(const StatsTile& s, const Tile& t, const DeviceLimits& device) {
  CHECK(power_of_two(s.teams) && t.cluster % s.teams == 0, "teams %d", s.teams);
  CHECK(s.teams * t.warps <= kMaxStatsWarps, "warps %d", s.teams * t.warps);
  CHECK(s.ring > s.teams && s.ring <= kMaxRing && t.stages == 1, "ring %d", s.ring);
  CHECK(s.shared_bytes <= shared_budget(device, s.blocks), "shared %d", s.shared_bytes);
  const StatsLayout l = make_stats_layout(t.cluster, t.warps, s.ring, t.stage_bytes);
  CHECK(l.messages % 16 == 0 && l.barriers % 8 == 0 && l.bytes == s.shared_bytes, "layout");
}

void check_tiles() {
  std::vector<int64_t> vocabularies(std::begin(kVocabularies), std::end(kVocabularies));
  for (int64_t v = 1; v < 3000; v += 3) vocabularies.push_back(v);
  for (int shift = 20; shift <= 30; ++shift) {
    for (int64_t off = -1; off <= 1; ++off) vocabularies.push_back((int64_t{1} << shift) + off);
  }
  for (const DeviceLimits& device : kDevices) {
    for (const int64_t v : vocabularies) {
      for (const int bytes : {2, 4}) {
        const Chosen c = choose(TileChoice{}, v, bytes, device);
        CHECK(c.error == nullptr, "%s", c.error);
        CHECK(power_of_two(c.tile.warps), "warps %d", c.tile.warps);
        if (c.tile.cluster == 0) {
          CHECK(c.tile.warps <= kStreamWarps && c.tile.slice == v, "streamed");
          CHECK(c.stats.teams == 0, "and its statistics");
        } else {
          check_resident(c.tile, v, bytes, device);
        }
        if (c.stats.teams > 0) check_stats(c.stats, c.tile, device);
      }
    }
  }
}

// The shapes that matter most, on the GPU that they are meant for.
void check_h200() {
  const DeviceLimits& h200 = kDevices[0];
  for (const int64_t v : {32000, 128256, 151936, 151937}) {
    const Chosen c = choose(TileChoice{}, v, 2, h200);
    const Tile& t = c.tile;
    CHECK(t.rows() >= 3 && t.stages == 1 && t.blocks == 2, "V %d", static_cast<int>(v));
    CHECK(t.cluster == (v == 32000 ? 2 : 8), "V %d", static_cast<int>(v));
    CHECK(c.stats.teams == 2 && c.stats.blocks == 2, "V %d: %d teams", static_cast<int>(v),
          c.stats.teams);
  }
  CHECK(derived_tile(4096, 2, h200).blocks == 5, "short rows leave room");
  for (const int bytes : {2, 4}) {
    for (int64_t v = 1; v <= 450000; v += 997) {
      CHECK(derived_tile(v, bytes, h200).cluster > 0, "V %d does not fit", static_cast<int>(v));
    }
  }
  CHECK(derived_tile(262144, 2, h200).rows() > 1 && derived_tile(128256, 4, h200).rows() > 1, "long rows");
}

// Every tile that can be asked for: it keeps every limit, or names the one that it does not.
void check_choices() {
  for (const DeviceLimits& device : kDevices) {
    for (const int64_t v : {int64_t{1}, int64_t{1000}, int64_t{151937}, kMostColumns}) {
      for (int cluster = -1; cluster <= 33; ++cluster) {
        for (const int warps : {0, 1, 3, 4, 16, 32}) {
          for (const int stages : {0, 1, 3}) {
            for (int ring = -1; ring <= kMaxRing + 1; ++ring) {
              for (const int blocks : {0, 1, 2, 40}) {
                if (cluster == 0) continue;
                TileChoice asked = {};
                asked.cluster = cluster;
                asked.warps = warps;
                asked.stages = stages;
                asked.ring = ring;
                asked.blocks = blocks;
                const Chosen c = choose(asked, v, 2, device);
                CHECK((c.error == nullptr) == (c.tile.cluster == cluster && kept(c.tile, device)),
                      "%d,%d,%d,%d,%d: %s", cluster, warps, stages, ring, blocks, c.error);
                if (c.error == nullptr) check_resident(c.tile, v, 2, device);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_walk();
  check_copy_range();
  check_words_across();
  check_rounds();
  check_even_grid();
  check_spans();
  check_tiles();
  check_h200();
  check_choices();
  std::printf("%ld checks\n", checks);
  return 0;
}
