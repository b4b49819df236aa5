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

#include "emulated_order.h"

namespace papo {
namespace cuda {
namespace emulator {

struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  uint32_t initializer = 0;  // agent
  bool fenced = false;       // the initializer's barrier_init_fence came
  Stamp initialized;
  uint32_t copies = 0, messages = 0;  // the agents that stand for what completes on it
  // What its phases pass on, at the scope of the block and at that of the cluster: of the phases
  // that are over, and with what has arrived since.
  Clock released, released_cluster, arriving, arriving_cluster;
  std::vector<Stamp> observers;  // threads that saw the end of the phase before
  const char* name = "";         // as its last waiter called it
};

// Threads that all wait for one another, time after time.
struct Meeting {
  int arrived = 0;
  uint32_t generation = 0;
  Clock brought[2];  // by the threads of this time; the other half may still be read
};

struct Warp {
  uint64_t slots[2][32] = {};
  Meeting exchange, sync;
};

struct Cluster {
  Meeting sync;
  uint32_t agents = 0;
};

struct Block {
  int64_t index = 0;
  int rank = 0, threads = 0, running = 0;
  int64_t first_of_cluster = 0;  // block index
  Cluster* cluster = nullptr;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;  // of `shared`, where the order of accesses is checked
  std::map<uint32_t, Barrier> barriers;
  std::vector<Warp> warps;
  Meeting sync;
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
  const char* awaited = "";           // its name
  int64_t awaited_at = -1;            // its address, if it has one
  Stamp now;      // its place in its own time
  Clock known;    // what has surely happened, to this thread
  Clock fenced;   // the same, to the bulk copies that it starts
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

// One launch at a time.
struct Machine {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Cluster> clusters;
  std::vector<std::function<void()>> in_flight;
  std::vector<Range> memory;
  int cluster = 1, threads = 0;  // blocks of a cluster, threads of a block
  bool check_order = false;
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

// Gives way to others, then goes on once `ready` holds. `name` and `at` are for deadlocks.
inline void wait_until(const char* name, int64_t at, std::function<bool()> ready) {
  Machine& m = machine();
  m.current->awaited = name;
  m.current->awaited_at = at;
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

inline Fiber& fiber() { return *machine().current; }
inline Block& block() { return *machine().current->block; }
inline int thread() { return machine().current->thread; }
inline Warp& warp() { return block().warps[static_cast<size_t>(thread() / 32)]; }

// ---- threads that meet --------------------------------------------------------------------------

// What this thread has done so far, and knows of others, becomes part of `to`.
inline void release(Clock& to) {
  Fiber& f = fiber();
  if (!machine().check_order) return;
  to.learn(f.known);
  ++f.now.time;
  f.known.learn(f.now);
}
inline void acquire(const Clock& from) {
  if (machine().check_order) fiber().known.learn(from);
}

// Returns the generation to wait for.
inline uint32_t arrive(Meeting& m, int threads, bool ordered) {
  const uint32_t mine = m.generation;
  if (ordered) release(m.brought[mine & 1u]);
  if (++m.arrived == threads) {
    m.arrived = 0;
    ++m.generation;
  }
  return mine;
}
inline void wait(Meeting& m, uint32_t generation, const char* name, bool ordered) {
  if (m.generation == generation) {
    Meeting* p = &m;
    wait_until(name, -1, [p, generation] { return p->generation != generation; });
  }
  if (ordered) acquire(m.brought[generation & 1u]);
}
inline void meet(Meeting& m, int threads, const char* name) {
  wait(m, arrive(m, threads, true), name, true);
}

inline uint64_t exchange(uint64_t value, int from) {
  Warp& w = warp();
  const uint32_t half = w.exchange.generation & 1u;
  w.slots[half][thread() % 32] = value;
  wait(w.exchange, arrive(w.exchange, 32, false), "its warp's shuffle", false);
  return w.slots[half][from];
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
