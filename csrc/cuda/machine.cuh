// The machine below the kernels. Each PTX instruction, built-in variable and collective that they
// use is behind one function here, and nothing else in csrc/cuda contains assembly. So a build for
// the host (PAPO_EMULATED, see tests/cpp) can put threads of its own underneath.
#pragma once

#include <stdint.h>

#include "papo/platform.h"

#if defined(PAPO_EMULATED)

#include "emulated_machine.h"

#else

#include <assert.h>
#include <cuda_runtime.h>

#define PAPO_DEVICE __device__ __forceinline__
#define PAPO_KERNEL(max_threads, min_blocks) \
  __global__ void __launch_bounds__(max_threads, min_blocks)
#define PAPO_PARAM __grid_constant__

// Bulk copies, transaction barriers and clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PAPO_HAS_CLUSTERS 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define PAPO_HAS_PAIRS 1
#endif

namespace papo {
namespace cuda {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// 16 bytes: the widest access that a thread makes.
struct alignas(16) Word {
  uint32_t r[4];
};

// Two floats. On sm_100 one instruction computes on both.
struct Pair {
  float lo, hi;
};

namespace machine {

// ---- who and where --------------------------------------------------------------------------

PAPO_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PAPO_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
PAPO_DEVICE int64_t block_index() { return blockIdx.x; }
PAPO_DEVICE int64_t grid_blocks() { return gridDim.x; }

// ---- arithmetic -------------------------------------------------------------------------------

// 2^x, to 2 units in the last place. Results below 2^-126 are 0.
PAPO_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a b, rounded before it is added to anything. Otherwise nvcc would fuse the two.
PAPO_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
PAPO_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }

// The larger and the smaller of the two. Unlike fmaxf and fminf they are NaN where either is NaN.
PAPO_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
PAPO_DEVICE float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
PAPO_DEVICE uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
PAPO_DEVICE uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

PAPO_DEVICE Pair from_f16x2(uint32_t x) {
  Pair y;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(y.lo), "=f"(y.hi)
      : "r"(x));
  return y;
}
PAPO_DEVICE uint32_t to_f16x2(Pair x) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(x.hi), "f"(x.lo));
  return y;
}
PAPO_DEVICE uint32_t to_bf16x2(Pair x) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(x.hi), "f"(x.lo));
  return y;
}

// 2^n, for -1022 <= n <= 1023.
PAPO_DEVICE double power_of_two(int n) { return __hiloint2double((1023 + n) << 20, 0); }

PAPO_DEVICE float as_float(uint32_t x) { return __uint_as_float(x); }
PAPO_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// Bits [shift, shift + 32) of hi:lo, for 0 <= shift < 32.
PAPO_DEVICE uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t shift) {
  return __funnelshift_r(lo, hi, shift);
}

#if defined(PAPO_HAS_PAIRS)
PAPO_DEVICE Pair unpacked(unsigned long long x) {
  Pair y;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(y.lo), "=f"(y.hi) : "l"(x));
  return y;
}
PAPO_DEVICE unsigned long long packed(Pair x) {
  unsigned long long y;
  asm("mov.b64 %0, {%1, %2};" : "=l"(y) : "f"(x.lo), "f"(x.hi));
  return y;
}
PAPO_DEVICE Pair add(Pair a, Pair b) {
  unsigned long long y;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(y) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(y);
}
PAPO_DEVICE Pair mul(Pair a, Pair b) {
  unsigned long long y;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(y) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(y);
}
PAPO_DEVICE Pair fma(Pair a, Pair b, Pair c) {
  unsigned long long y;
  asm("fma.rn.f32x2 %0, %1, %2, %3;"
      : "=l"(y)
      : "l"(packed(a)), "l"(packed(b)), "l"(packed(c)));
  return unpacked(y);
}
#else
PAPO_DEVICE Pair add(Pair a, Pair b) { return {a.lo + b.lo, a.hi + b.hi}; }
PAPO_DEVICE Pair mul(Pair a, Pair b) { return {product(a.lo, b.lo), product(a.hi, b.hi)}; }
PAPO_DEVICE Pair fma(Pair a, Pair b, Pair c) {
  return {fmaf(a.lo, b.lo, c.lo), fmaf(a.hi, b.hi, c.hi)};
}
#endif

// ---- a warp and a block ---------------------------------------------------------------------

PAPO_DEVICE void warp_sync() { __syncwarp(); }
PAPO_DEVICE void block_sync() { __syncthreads(); }

template <typename T>
PAPO_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(kWholeWarp, x, mask);
}
template <typename T>
PAPO_DEVICE T broadcast(T x, int lane) {
  return __shfl_sync(kWholeWarp, x, lane);
}
// Whether x is true in any lane.
PAPO_DEVICE bool any(bool x) { return __any_sync(kWholeWarp, x) != 0; }
// The largest signed integer of the warp.
PAPO_DEVICE int warp_max(int x) { return __reduce_max_sync(kWholeWarp, x); }

// ---- global memory ----------------------------------------------------------------------------

// Volatile, so that a read stays before the write of an in-place gradient to the same place.
PAPO_DEVICE Word load_global(const void* p) {
  Word w;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.r[0]), "=r"(w.r[1]), "=r"(w.r[2]), "=r"(w.r[3])
               : "l"(p));
  return w;
}
// Through the L1 cache, as a neighbor reads the same word.
PAPO_DEVICE Word load_global_cached(const void* p) {
  Word w;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.r[0]), "=r"(w.r[1]), "=r"(w.r[2]), "=r"(w.r[3])
               : "l"(p));
  return w;
}
PAPO_DEVICE uint32_t load_global_32(const void* p) {
  uint32_t x;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
PAPO_DEVICE uint32_t load_global_16(const void* p) {
  uint16_t x;
  asm volatile("ld.global.b16 %0, [%1];" : "=h"(x) : "l"(p));
  return x;
}
PAPO_DEVICE void store_global(void* p, Word w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.r[0]), "r"(w.r[1]),
               "r"(w.r[2]), "r"(w.r[3]));
}
PAPO_DEVICE void store_global_32(void* p, uint32_t x) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(x));
}
PAPO_DEVICE void store_global_16(void* p, uint32_t x) {
  asm volatile("st.global.b16 [%0], %1;" ::"l"(p), "h"(static_cast<uint16_t>(x)));
}

// ---- shared memory, by its 32-bit address -----------------------------------------------------

PAPO_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char papo_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(papo_shared));
}
PAPO_DEVICE Word load_shared(uint32_t address) {
  Word w;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.r[0]), "=r"(w.r[1]), "=r"(w.r[2]), "=r"(w.r[3])
               : "r"(address));
  return w;
}
PAPO_DEVICE uint32_t load_shared_32(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}
PAPO_DEVICE uint32_t load_shared_16(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(address));
  return x;
}
PAPO_DEVICE double load_shared_double(uint32_t address) {
  double x;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(address));
  return x;
}
PAPO_DEVICE void store_shared(uint32_t address, Word w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w.r[0]),
               "r"(w.r[1]), "r"(w.r[2]), "r"(w.r[3])
               : "memory");
}
PAPO_DEVICE void store_shared_32(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
PAPO_DEVICE void store_shared_16(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(x))
               : "memory");
}

#if defined(PAPO_HAS_CLUSTERS)
// ---- barriers in shared memory ------------------------------------------------------------------

PAPO_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialized barriers visible to the cluster and to the copy engine.
PAPO_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives once, and releases what this thread wrote.
PAPO_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same, and the phase also waits until `bytes` have been written.
PAPO_DEVICE void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// A wait sleeps for at most so many nanoseconds, and is woken when the phase ends. Without this
// hint it gives up after a few cycles, and is tried again so often that half of all instructions
// were these tries. A build that counts its tries does not sleep.
#if defined(PAPO_SPIN_LIMIT)
constexpr uint32_t kSleep = 0;
#else
constexpr uint32_t kSleep = 10'000'000;
#endif
// Waits for some time, and tells whether the phase of this parity is over. Then what was released
// to it within the block is acquired.
PAPO_DEVICE bool try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\n"
      "selp.b32 %0, 1, 0, p;}"
      : "=r"(over)
      : "r"(barrier), "r"(parity), "r"(kSleep)
      : "memory");
  return over != 0;
}
// The same for what was released to it within the cluster.
PAPO_DEVICE bool try_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2, %3;\n"
      "selp.b32 %0, 1, 0, p;}"
      : "=r"(over)
      : "r"(barrier), "r"(parity), "r"(kSleep)
      : "memory");
  return over != 0;
}
// Waits until it is over. A build with PAPO_SPIN_LIMIT gives up after so many tries, and names what
// it waited for: a mistake in the barriers is then an error, and not a hang.
template <typename Try>
PAPO_DEVICE void wait_for(const Try& over, [[maybe_unused]] const char* name) {
#if defined(PAPO_SPIN_LIMIT)
  for (int tries = 0; !over(); ++tries) {
    if (tries >= PAPO_SPIN_LIMIT) __assert_fail(name, __FILE__, __LINE__, "barrier_wait");
  }
#else
  while (!over()) {
  }
#endif
}
PAPO_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity, const char* name) {
  wait_for([=] { return try_wait(barrier, parity); }, name);
}
PAPO_DEVICE void barrier_wait_cluster(uint32_t barrier, uint32_t parity, const char* name) {
  wait_for([=] { return try_wait_cluster(barrier, parity); }, name);
}

// ---- bulk copies --------------------------------------------------------------------------------

// Orders ordinary accesses to shared memory before this thread's later bulk copies into it: its own
// accesses, and those of others that it has acquired.
PAPO_DEVICE void fence_before_bulk() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Copies from global to shared memory. source, target and bytes are multiples of 16, and the bytes
// count toward `barrier`. As they are read once, they are the first to leave the L2 cache.
PAPO_DEVICE void bulk_load(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "{.reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], policy;}" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- a cluster of blocks ------------------------------------------------------------------------

PAPO_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Waits for all threads of the cluster. Afterward each sees what the others had written.
PAPO_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// Writes a word to shared memory of block `rank`, at the same address `target`, a multiple of 16.
// Its 16 bytes count toward that block's barrier.
PAPO_DEVICE void send(uint32_t target, int rank, const Word& w, uint32_t barrier) {
  asm volatile(
      "{.reg .b32 there, bar;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mapa.shared::cluster.u32 bar, %6, %1;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], "
      "{%2, %3, %4, %5}, [bar];}" ::"r"(target),
      "r"(rank), "r"(w.r[0]), "r"(w.r[1]), "r"(w.r[2]), "r"(w.r[3]), "r"(barrier)
      : "memory");
}
#endif  // PAPO_HAS_CLUSTERS

}  // namespace machine
}  // namespace cuda
}  // namespace papo

#endif  // PAPO_EMULATED
