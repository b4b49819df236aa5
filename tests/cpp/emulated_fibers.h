// Threads as fibers, and what they wait for: the emulated machine below its instructions.
// emulated_machine.h says what it is for; emulated_launch.h runs the fibers.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace papo {
namespace cuda {
namespace emulator {

struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
};

struct Warp {
  uint64_t slots[2][32] = {};
  int arrived = 0;
  uint32_t generation = 0;
};

struct Block {
  int64_t index = 0;
  int rank = 0, threads = 0;
  int64_t first_of_cluster = 0;  // block index
  std::vector<unsigned char> shared;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Warp> warps;
  int at_sync = 0;
  uint32_t sync_generation = 0;
};

struct ClusterSync {
  int arrived = 0, threads = 0;
  uint32_t generation = 0;
};

struct Fiber {
  Block* block = nullptr;
  int thread = 0;
  bool done = false;
  std::unique_ptr<unsigned char[]> stack;
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  std::function<bool()> waiting_for;  // empty: runnable
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

// One launch at a time.
struct Machine {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<ClusterSync> clusters;
  std::vector<std::function<void()>> in_flight;
  std::vector<Range> memory;
  int cluster = 1;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::string error;
  std::mt19937 random{1};
};

inline Machine& machine() {
  static Machine m;
  return m;
}

constexpr size_t kStackBytes = 64 * 1024;

__attribute__((noinline)) inline void switch_to_scheduler() {
  Machine& m = machine();
  if (_setjmp(m.current->resume) == 0) _longjmp(m.scheduler, 1);
}

// Gives way to others, then goes on once `ready` holds.
inline void wait_until(std::function<bool()> ready) {
  Machine& m = machine();
  m.current->waiting_for = std::move(ready);
  switch_to_scheduler();
}

[[noreturn]] inline void fail(const std::string& what) {
  Machine& m = machine();
  if (m.error.empty()) {
    m.error = what;
    if (m.current != nullptr) {
      m.error += " (block " + std::to_string(m.current->block->index) + ", thread " +
                 std::to_string(m.current->thread) + ")";
    }
  }
  _longjmp(m.scheduler, 1);
}

inline Block& block() { return *machine().current->block; }
inline int thread() { return machine().current->thread; }
inline Warp& warp() { return block().warps[static_cast<size_t>(thread() / 32)]; }

// ---- memory -----------------------------------------------------------------------------------

inline void check_global(const void* p, size_t bytes, bool write) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % bytes != 0) fail("misaligned global access of " + std::to_string(bytes) + " bytes");
  for (const Range& r : machine().memory) {
    if (at >= r.begin && at + bytes <= r.end && (r.writable || !write)) return;
  }
  fail(std::string(write ? "store to" : "load from") + " global memory outside the matrices");
}

inline unsigned char* shared_at(Block& b, uint32_t address, size_t bytes) {
  if (address % (bytes > 16 ? 16 : bytes) != 0) fail("misaligned shared access");
  if (address + bytes > b.shared.size()) fail("shared access out of range");
  return b.shared.data() + address;
}

template <typename T>
T load(const void* p) {
  T x;
  memcpy(&x, p, sizeof(T));
  return x;
}

// ---- barriers -----------------------------------------------------------------------------------

inline Barrier& barrier_at(Block& b, uint32_t address) {
  const auto it = b.barriers.find(address);
  if (it == b.barriers.end()) fail("barrier used before it was initialised");
  return it->second;
}

inline void settle(Barrier& b) {
  if (b.pending < 0) fail("more arrivals at a barrier than it expects");
  if (b.bytes < 0) fail("bytes reached a barrier that does not expect them yet");
  if (b.pending == 0 && b.bytes == 0) {
    b.pending = b.arrivals;
    ++b.phase;
  }
}

inline void wait_phase(uint32_t address, uint32_t parity) {
  Barrier* b = &barrier_at(block(), address);
  if ((b->phase & 1u) != parity) return;
  wait_until([b, parity] { return (b->phase & 1u) != parity; });
}

inline uint64_t exchange(uint64_t value, int from) {
  Warp& w = warp();
  const uint32_t mine = w.generation;
  w.slots[mine & 1u][thread() % 32] = value;
  if (++w.arrived == 32) {
    w.arrived = 0;
    ++w.generation;
  } else {
    Warp* p = &w;
    wait_until([p, mine] { return p->generation != mine; });
  }
  return w.slots[mine & 1u][from];
}

template <typename T>
T exchange_value(T x, int from) {
  static_assert(sizeof(T) <= 8, "one slot");
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  bits = exchange(bits, from);
  memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace emulator
}  // namespace cuda
}  // namespace papo
