// csrc/cuda/machine.cuh for a host: every CUDA thread is a fiber, run in an order drawn at random.
//
// The CUDA sources compile against this unchanged (-DPAPO_EMULATED). What is asynchronous on a GPU
// stays so: bulk copies and messages between blocks arrive at some random later moment, and what
// they are going to overwrite is spoilt at once. A missing barrier therefore shows as NaN, a wrong
// phase as a deadlock, and a stray or misaligned access as an error. Everything is reported through
// error().
#pragma once

#include <math.h>
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

#define PAPO_DEVICE inline __attribute__((always_inline))
#define PAPO_KERNEL(max_threads, min_blocks) void
#define PAPO_PARAM
#define PAPO_HAS_CLUSTERS 1

namespace papo {
namespace cuda {

constexpr uint32_t kWholeWarp = 0xffffffffu;

struct alignas(16) Word {
  uint32_t r[4];
};
struct Pair {
  float lo, hi;
};

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

namespace machine {

inline int thread_index() { return emulator::thread(); }
inline int block_threads() { return emulator::block().threads; }
inline int64_t block_index() { return emulator::block().index; }
inline int64_t grid_blocks() { return static_cast<int64_t>(emulator::machine().blocks.size()); }

// ---- arithmetic -------------------------------------------------------------------------------

inline float as_float(uint32_t x) { return emulator::load<float>(&x); }
inline uint32_t as_bits(float x) { return emulator::load<uint32_t>(&x); }

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float max_nan(float a, float b) {
  return a != a || b != b ? as_float(0x7fffffffu) : fmaxf(a, b);
}

inline float from_half(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31u) return as_float(sign | 0x7f800000u | mantissa << 13);
  const float magnitude = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -24)
                                        : ldexpf(static_cast<float>(1024u + mantissa),
                                                 static_cast<int>(exponent) - 25);
  return sign != 0 ? -magnitude : magnitude;
}
inline uint32_t to_half(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000u;
  const float a = fabsf(x);
  if (a != a) return 0x7fffu;
  if (a >= 65520.0f) return sign | 0x7c00u;
  int exponent = 0;
  frexpf(a, &exponent);
  const int step = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last place
  const float units = nearbyintf(ldexpf(a, -step));
  const float rounded = ldexpf(units, step);
  if (rounded < 6.103515625e-05f) return sign | static_cast<uint32_t>(ldexpf(rounded, 24));
  frexpf(rounded, &exponent);
  return sign | static_cast<uint32_t>(exponent + 14) << 10 |
         (static_cast<uint32_t>(ldexpf(rounded, 11 - exponent)) & 1023u);
}
inline uint32_t to_bf16(float x) {
  if (x != x) return 0x7fffu;
  const uint32_t b = as_bits(x);
  return (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
}

inline Pair from_f16x2(uint32_t x) { return {from_half(x & 0xffffu), from_half(x >> 16)}; }
inline uint32_t to_f16x2(Pair x) { return to_half(x.lo) | to_half(x.hi) << 16; }
inline uint32_t to_bf16x2(Pair x) { return to_bf16(x.lo) | to_bf16(x.hi) << 16; }

inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  const float lo = max_nan(as_float(a << 16), as_float(b << 16));
  const float hi = max_nan(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u));
  return as_bits(lo) >> 16 | (as_bits(hi) & 0xffff0000u);
}
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  const Pair x = from_f16x2(a), y = from_f16x2(b);
  return to_f16x2({max_nan(x.lo, y.lo), max_nan(x.hi, y.hi)});
}
inline uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31u));
}

inline Pair add(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Pair mul(Pair a, Pair b) { return {a.lo * b.lo, a.hi * b.hi}; }
inline Pair fma(Pair a, Pair b, Pair c) {
  return {fmaf(a.lo, b.lo, c.lo), fmaf(a.hi, b.hi, c.hi)};
}

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
inline void load_global_half(const void* p, uint32_t& a, uint32_t& b) {
  emulator::check_global(p, 8, false);
  a = emulator::load<uint32_t>(p);
  b = emulator::load<uint32_t>(static_cast<const char*>(p) + 4);
}
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
inline void load_shared_half(uint32_t address, uint32_t& a, uint32_t& b) {
  const uint64_t x = load_shared_as<uint64_t>(address);
  a = static_cast<uint32_t>(x);
  b = static_cast<uint32_t>(x >> 32);
}
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
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::wait_phase(barrier, parity);
}
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
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
