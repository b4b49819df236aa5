// csrc/cuda/machine.cuh for a host: every CUDA thread is a fiber, run in an order drawn at random.
//
// The CUDA sources compile against this unchanged, with -DPAPO_EMULATED. What is asynchronous on a
// GPU stays so: bulk copies and messages between blocks arrive at some random later moment, and
// what they will overwrite is spoiled at once. So a missing barrier shows as NaN, a wrong phase as
// a deadlock, and a stray or misaligned access as an error. With Machine::check_order an access to
// shared memory that nothing orders is an error too, whatever order it came in; see
// emulated_order.h. Errors are the status of the launch.
#pragma once

#include "emulated_arithmetic.h"
#include "emulated_shared.h"

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

inline void warp_sync() { emulator::meet(emulator::warp().sync, 32, "its warp"); }
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
  emulator::meet(emulator::block().sync, emulator::block().threads, "its block");
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
  const unsigned char* from = emulator::shared_at(emulator::block(), address, sizeof(T));
  emulator::note_access(address, sizeof(T), false);
  return emulator::load<T>(from);
}
template <typename T>
void store_shared_as(uint32_t address, T x) {
  unsigned char* to = emulator::shared_at(emulator::block(), address, sizeof(T));
  emulator::note_access(address, sizeof(T), true);
  memcpy(to, &x, sizeof(T));
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
  emulator::init_barrier(barrier, arrivals);
}
inline void barrier_init_fence() { emulator::fence_barriers(); }
inline void barrier_arrive(uint32_t barrier) { emulator::arrive_at(barrier, 0); }
inline void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulator::arrive_at(barrier, bytes);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity, const char* name) {
  emulator::wait_phase(barrier, parity, name, false);
}
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity, const char* name) {
  emulator::wait_phase(barrier, parity, name, true);
}
inline void fence_before_bulk() {
  if (emulator::machine().check_order) emulator::fiber().fenced = emulator::fiber().known;
}

inline void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  if (bytes % 16 != 0 || bytes == 0 || target % 16 != 0) emulator::fail("bulk copy not in words");
  for (uint32_t i = 0; i < bytes; i += 16) {
    emulator::check_global(static_cast<const char*>(source) + i, 16, false);
  }
  const char* from = static_cast<const char*>(source);
  // The engine may read at any time until it is done.
  std::shared_ptr<std::vector<char>> early;
  if (emulator::machine().random() % 2 == 0) {
    early = std::make_shared<std::vector<char>>(from, from + bytes);
  }
  emulator::start_transfer(emulator::block(), target, bytes, barrier, false,
                           [=](unsigned char* into) {
                             memcpy(into, early != nullptr ? early->data() : from, bytes);
                           });
}

inline int cluster_rank() { return emulator::block().rank; }
inline void cluster_sync() { emulator::meet_cluster(); }
inline void send(uint32_t target, int rank, const Word& w, uint32_t barrier) {
  emulator::Machine& m = emulator::machine();
  if (rank < 0 || rank >= m.cluster) emulator::fail("message to no block of the cluster");
  emulator::Block& to = *m.blocks[static_cast<size_t>(emulator::block().first_of_cluster + rank)];
  emulator::start_transfer(to, target, 16, barrier, true,
                           [=](unsigned char* into) { memcpy(into, w.r, 16); });
}

}  // namespace machine
}  // namespace cuda
}  // namespace papo
