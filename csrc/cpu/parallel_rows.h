// Work sharing between a call's threads.
//
// Threads live as long as the call: nothing spins between calls, and a process may fork at any time
// (a pool's threads would be missing in the child). Starting one costs about as much as scanning a
// few thousand logits, so small calls stay on the caller's thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace papo {
namespace cpu {

// Subnormal operands and results count as zero within this scope: exp of a far tail would otherwise
// take the processor's slow path. Restores the caller's mode.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// Elements worth a thread of their own.
constexpr int64_t kElementsPerThread = 65536;

inline int useful_threads(int threads, int64_t elements) {
  const int64_t most = std::max<int64_t>(1, elements / kElementsPerThread);
  return static_cast<int>(std::min<int64_t>(std::max(threads, 1), most));
}

// Calls fn(i) for i in [0, tasks), each once, on up to `threads` threads; tasks are handed out in
// runs of `grain`. fn must not throw.
template <typename Fn>
void parallel_for(int64_t tasks, int threads, int64_t grain, const Fn& fn) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    const FlushSubnormals guard;
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= tasks) return;
      const int64_t end = std::min(begin + grain, tasks);
      for (int64_t i = begin; i < end; ++i) fn(i);
    }
  };
  std::vector<std::thread> helpers;
  const int64_t shares = (tasks + grain - 1) / grain;
  try {
    for (int64_t t = 1; t < std::min<int64_t>(threads, shares); ++t) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system refuses more threads: those that started, and this one, do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace cpu
}  // namespace papo
