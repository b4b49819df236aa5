// The emulated machine's memory, its barriers, and its bulk copies and messages. It says which
// accesses are allowed, and with emulated_order.h which of them are ordered.
#pragma once

#include "emulated_fibers.h"

namespace papo {
namespace cuda {
namespace emulator {

// ---- which accesses are allowed -----------------------------------------------------------------

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

// ---- which of them are ordered ------------------------------------------------------------------

// The agents are the threads of a cluster, block by block, and then two for each barrier.
inline uint32_t thread_agents() {
  return static_cast<uint32_t>(machine().cluster * machine().threads);
}
inline bool is_thread(uint32_t agent) { return agent < thread_agents(); }
inline bool is_message(uint32_t agent) {
  return !is_thread(agent) && (agent - thread_agents()) % 2 == 1;
}

inline std::string name_of_thread(uint32_t agent) {
  const uint32_t threads = static_cast<uint32_t>(machine().threads);
  return "thread " + std::to_string(agent % threads) + " of the cluster's block " +
         std::to_string(agent / threads);
}
inline std::string name_of(const Stamp& s, bool wrote) {
  if (is_thread(s.agent)) return name_of_thread(s.agent) + (wrote ? " wrote" : " read");
  return is_message(s.agent) ? "a message of another block writes" : "a bulk copy writes";
}

inline const char* missing(const Stamp& s) {
  if (is_message(s.agent)) return ": it was not waited for at the scope of the cluster";
  return is_thread(s.agent) ? ": nothing orders the two" : ": it was not waited for";
}

// `what` touches the bytes now. Earlier accesses by threads must be in `known`, and those by
// transfers in `landed`.
inline void check_order(Block& b, uint32_t address, size_t bytes, bool writing, const char* what,
                        const Clock& known, const Clock& landed) {
  const uint32_t end = (address + static_cast<uint32_t>(bytes) + kCellBytes - 1) / kCellBytes;
  for (uint32_t i = address / kCellBytes; i < end; ++i) {
    const Cell& c = b.cells[i];
    const auto complain = [&](const Stamp& s, bool wrote) {
      const bool unfenced = landed.knows(s);
      fail(std::string(what) + " shared memory at " + std::to_string(i * kCellBytes) + " that " +
           name_of(s, wrote) + (unfenced ? ": no fence_before_bulk in between" : missing(s)));
    };
    if (!(is_thread(c.write.agent) ? known : landed).knows(c.write)) complain(c.write, true);
    if (!writing) continue;
    for (const Stamp& s : c.reads) {
      if (!known.knows(s)) complain(s, false);
    }
  }
}

inline void note_write(Block& b, uint32_t address, size_t bytes, const Stamp& by) {
  for (uint32_t i = 0; i < bytes; i += kCellBytes) {
    b.cells[(address + i) / kCellBytes].note_write(by);
  }
}

// A thread's own load or store.
inline void note_access(uint32_t address, size_t bytes, bool writing) {
  if (!machine().check_order) return;
  Fiber& f = fiber();
  check_order(*f.block, address, bytes, writing, writing ? "store to" : "load from", f.known,
              f.known);
  if (writing) return note_write(*f.block, address, bytes, f.now);
  for (uint32_t i = 0; i < bytes; i += kCellBytes) {
    f.block->cells[(address + i) / kCellBytes].note_read(f.now);
  }
}

// ---- barriers -----------------------------------------------------------------------------------

inline void init_barrier(uint32_t address, int arrivals) {
  Fiber& f = fiber();
  shared_at(*f.block, address, 8);
  Barrier& b = f.block->barriers[address] = Barrier{};
  b.arrivals = b.pending = arrivals;
  b.initializer = f.now.agent;
  b.initialized = f.now;
  b.copies = f.block->cluster->agents++;
  b.messages = f.block->cluster->agents++;
}

inline void fence_barriers() {
  for (auto& [address, b] : block().barriers) {
    if (b.initializer == fiber().now.agent) b.fenced = true;
  }
}

// The barrier, for this thread or, if `asynchronous`, for a bulk copy or message that it starts.
inline Barrier& barrier_at(Block& b, uint32_t address, bool asynchronous = false) {
  const auto it = b.barriers.find(address);
  if (it == b.barriers.end()) fail("barrier used before it was initialized");
  const Fiber& f = fiber();
  if (!it->second.fenced && (asynchronous || it->second.initializer != f.now.agent)) {
    fail("barrier used by others before its barrier_init_fence");
  }
  if (machine().check_order && !f.known.knows(it->second.initialized)) {
    fail("barrier used by others: nothing orders its initialization before");
  }
  return it->second;
}

// A parity tells a phase from the next one and no other. So a phase may not end until every thread
// that waits for the last one has surely seen its end: otherwise it might wait forever.
inline void check_observers(Barrier& b) {
  for (const Stamp& s : b.observers) {
    if (b.arriving.knows(s) || b.arriving_cluster.knows(s)) continue;
    fail(std::string("a phase of ") + b.name + " may end while " + name_of_thread(s.agent) +
         " still waits for the one before: nothing orders the two");
  }
  b.observers.clear();
}

inline void settle(Barrier& b) {
  if (b.pending < 0) fail("more arrivals at a barrier than it expects");
  if (b.bytes < 0) fail("bytes reached a barrier that does not expect them yet");
  if (b.pending != 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  ++b.phase;
  if (!machine().check_order) return;
  check_observers(b);
  b.released = b.arriving;
  b.released_cluster = b.arriving_cluster;
}

inline void arrive_at(uint32_t address, int64_t bytes) {
  Barrier& b = barrier_at(block(), address);
  release(b.arriving);
  b.bytes += bytes;
  --b.pending;
  settle(b);
}

inline void wait_phase(uint32_t address, uint32_t parity, const char* name, bool cluster) {
  Barrier* b = &barrier_at(block(), address);
  if ((b->phase & 1u) == parity) {
    wait_until(name, address, [b, parity] { return (b->phase & 1u) != parity; });
  }
  if (!machine().check_order) return;
  acquire(b->released);
  if (cluster) acquire(b->released_cluster);
  b->name = name;
  b->observers.push_back(fiber().now);
}

// ---- clusters -----------------------------------------------------------------------------------

inline void meet_cluster() {
  Block& here = block();
  for (const auto& [address, b] : here.barriers) {
    if (!b.fenced) fail("cluster_sync before a barrier's barrier_init_fence");
  }
  meet(here.cluster->sync, machine().cluster * here.threads, "its cluster");
}

// ---- bulk copies and messages -------------------------------------------------------------------

// Starts bytes on their way into shared memory. The bytes there are spoiled at once. At some later
// moment `write` replaces them, and they count toward the barrier.
inline void start_transfer(Block& b, uint32_t target, uint32_t bytes, uint32_t barrier,
                           bool message, std::function<void(unsigned char*)> write) {
  Machine& m = machine();
  Fiber& f = fiber();
  if (b.running == 0) fail("a transfer outlived its block");
  unsigned char* into = shared_at(b, target, bytes);
  Barrier* to = &barrier_at(b, barrier, true);
  const uint32_t agent = message ? to->messages : to->copies;
  auto sent = std::make_shared<Clock>();
  if (m.check_order) {
    check_order(b, target, bytes, true, message ? "message to" : "bulk copy into",
                message ? f.known : f.fenced, f.known);
    note_write(b, target, bytes, {agent, kNeverKnown});
    if (message) release(*sent);
  }
  memset(into, 0xff, bytes);
  m.in_flight.push_back([=, &b, write = std::move(write)] {
    if (b.running == 0) fail("a transfer outlived its block");
    write(into);
    if (machine().check_order) {
      const Stamp landed = {agent, to->phase + 1};
      note_write(b, target, bytes, landed);
      Clock& arriving = message ? to->arriving_cluster : to->arriving;
      arriving.learn(landed);
      arriving.learn(*sent);
    }
    to->bytes -= bytes;
    settle(*to);
  });
}

}  // namespace emulator
}  // namespace cuda
}  // namespace papo
