// csrc/cuda/machine.cuh for a host: every CUDA thread is a fiber, run in an order drawn at random.
//
// The CUDA sources compile against this unchanged (-DPAPO_EMULATED). What is asynchronous on a GPU
// stays so: bulk copies and messages between blocks arrive at some random later moment, and what
// they are going to overwrite is spoilt at once. A missing barrier therefore shows as NaN, a wrong
// phase as a deadlock, and a stray or misaligned access as an error. Everything is reported through
// error().
#pragma once

#include "emulated_arithmetic.h"
#include "emulated_fibers.h"

#define PAPO_DEVICE inline __attribute__((always_inline))
#define PAPO_KERNEL(max_threads, min_blocks) void
#define PAPO_PARAM
#define PAPO_HAS_CLUSTERS 1

namespace papo {
namespace cuda {

namespace machine {

inline int thread_index() { return emulator::thread(); }
inline int block_threads() { return emulator::block().threads; }
inline int64_t block_index() { return emulator::block().index; }
inline int64_t grid_blocks() { return static_cast<int64_t>(emulator::machine().blocks.size()); }

// ---- a warp and a block ---------------------------------------------------------------------

inline void warp_sync() { emulator::exchange(0, 0); }
template <typename T>
T shuffle_xor(T x, int mask) {
  return emulator::exchange_value(x, (emulator::thread() % 32) ^ mask);
}
template <typename T>
T broadcast(T x, int lane) {
  return emulator::exchange_value(x, lane);
}
inline int warp_max(int x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}
inline bool any(bool x) { return warp_max(x ? 1 : 0) != 0; }
inline void block_sync() {
  emulator::Block* b = &emulator::block();
  const uint32_t mine = b->sync_generation;
  if (++b->at_sync == b->threads) {
    b->at_sync = 0;
    ++b->sync_generation;
    return;
  }
  emulator::wait_until([b, mine] { return b->sync_generation != mine; });
}

// ---- memory -----------------------------------------------------------------------------------

inline Word load_global(const void* p) {
  emulator::check_global(p, 16, false);
  return emulator::load<Word>(p);
}
inline Word load_global_cached(const void* p) { return load_global(p); }
inline uint32_t load_global_32(const void* p) {
  emulator::check_global(p, 4, false);
  return emulator::load<uint32_t>(p);
}
inline uint32_t load_global_16(const void* p) {
  emulator::check_global(p, 2, false);
  return emulator::load<uint16_t>(p);
}
inline void store_global(void* p, Word w) {
  emulator::check_global(p, 16, true);
  memcpy(p, &w, 16);
}
inline void store_global_32(void* p, uint32_t x) {
  emulator::check_global(p, 4, true);
  memcpy(p, &x, 4);
}
inline void store_global_16(void* p, uint32_t x) {
  emulator::check_global(p, 2, true);
  memcpy(p, &x, 2);
}

inline uint32_t shared_base() { return 0; }
template <typename T>
T load_shared_as(uint32_t address) {
  return emulator::load<T>(emulator::shared_at(emulator::block(), address, sizeof(T)));
}
template <typename T>
void store_shared_as(uint32_t address, T x) {
  memcpy(emulator::shared_at(emulator::block(), address, sizeof(T)), &x, sizeof(T));
}
inline Word load_shared(uint32_t address) { return load_shared_as<Word>(address); }
inline uint32_t load_shared_32(uint32_t address) { return load_shared_as<uint32_t>(address); }
inline uint32_t load_shared_16(uint32_t address) { return load_shared_as<uint16_t>(address); }
inline double load_shared_double(uint32_t address) { return load_shared_as<double>(address); }
inline void store_shared(uint32_t address, Word w) { store_shared_as(address, w); }
inline void store_shared_32(uint32_t address, uint32_t x) { store_shared_as(address, x); }
inline void store_shared_16(uint32_t address, uint32_t x) {
  store_shared_as(address, static_cast<uint16_t>(x));
}

// ---- barriers, bulk copies, clusters ------------------------------------------------------------

inline void barrier_init(uint32_t barrier, int arrivals) {
  emulator::shared_at(emulator::block(), barrier, 8);
  emulator::Barrier b;
  b.arrivals = b.pending = arrivals;
  emulator::block().barriers[barrier] = b;
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) {
  emulator::Barrier& b = emulator::barrier_at(emulator::block(), barrier);
  --b.pending;
  emulator::settle(b);
}
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulator::Barrier& b = emulator::barrier_at(emulator::block(), barrier);
  b.bytes += bytes;
  --b.pending;
  emulator::settle(b);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity, const char*) {
  emulator::wait_phase(barrier, parity);
}
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity, const char*) {
  emulator::wait_phase(barrier, parity);
}
inline void fence_before_bulk() {}

inline void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  if (bytes % 16 != 0 || bytes == 0 || target % 16 != 0) emulator::fail("bulk copy not in words");
  for (uint32_t i = 0; i < bytes; i += 16) {
    emulator::check_global(static_cast<const char*>(source) + i, 16, false);
  }
  emulator::Block* b = &emulator::block();
  unsigned char* into = emulator::shared_at(*b, target, bytes);
  memset(into, 0xff, bytes);
  const char* from = static_cast<const char*>(source);
  // The engine may read at any time until it is done.
  std::shared_ptr<std::vector<char>> early;
  if (emulator::machine().random() % 2 == 0) {
    early = std::make_shared<std::vector<char>>(from, from + bytes);
  }
  emulator::machine().in_flight.push_back([=] {
    memcpy(into, early != nullptr ? early->data() : from, bytes);
    emulator::Barrier& to = emulator::barrier_at(*b, barrier);
    to.bytes -= bytes;
    emulator::settle(to);
  });
}

inline int cluster_rank() { return emulator::block().rank; }
inline void cluster_sync() {
  emulator::Machine& m = emulator::machine();
  auto& sync = m.clusters[static_cast<size_t>(emulator::block().index / m.cluster)];
  const uint32_t mine = sync.generation;
  if (++sync.arrived == sync.threads) {
    sync.arrived = 0;
    ++sync.generation;
    return;
  }
  emulator::ClusterSync* p = &sync;
  emulator::wait_until([p, mine] { return p->generation != mine; });
}
inline void cluster_arrive() {}
inline void cluster_wait() { cluster_sync(); }
inline void send(uint32_t target, int rank, double a, double b, uint32_t barrier) {
  emulator::Machine& m = emulator::machine();
  if (rank < 0 || rank >= m.cluster) emulator::fail("message to no block of the cluster");
  emulator::Block* to =
      m.blocks[static_cast<size_t>(emulator::block().first_of_cluster + rank)].get();
  unsigned char* into = emulator::shared_at(*to, target, 16);
  memset(into, 0xff, 16);
  m.in_flight.push_back([=] {
    memcpy(into, &a, 8);
    memcpy(into + 8, &b, 8);
    emulator::Barrier& at = emulator::barrier_at(*to, barrier);
    at.bytes -= 16;
    emulator::settle(at);
  });
}

}  // namespace machine
}  // namespace cuda
}  // namespace papo
