// Shares the work of a call between threads. They are the process's OpenMP team where there is one,
// as in any process with torch: that team spins for a while after every operation, and would fight
// other threads for the cores. The team is looked up by name, so that nothing here links OpenMP.
// Without a team, and in the child of a fork, which inherits none of its threads, threads are
// started for the call.
#pragma once

#include <dlfcn.h>
#include <pthread.h>

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

// Within this scope subnormal operands and results count as zero: the exponentials of a far tail
// would otherwise take the processor's slow path. The caller's mode is restored.
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

// The type of GOMP_parallel, which OpenMP libraries other than GNU's offer too. It runs fn(data) on
// `threads` threads, of which the caller's is one.
using RunTeam = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

inline std::atomic<bool> is_forked{false};
inline const int kForkHook = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

// Null where there is no team to use.
inline RunTeam openmp_team() {
  static const auto team = reinterpret_cast<RunTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return is_forked ? nullptr : team;
}

// Calls fn() on up to `threads` threads, once on each. fn must not throw.
template <typename Fn>
void run_on_threads(int64_t threads, Fn& fn) {
  if (threads <= 1) return fn();
  if (const RunTeam team = openmp_team()) {
    return team([](void* data) { (*static_cast<Fn*>(data))(); }, &fn,
                static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> helpers;
  try {
    for (int64_t t = 1; t < threads; ++t) helpers.emplace_back([&] { fn(); });
  } catch (const std::system_error&) {
    // The system refuses more threads. Those that have started do the work with this one.
  }
  fn();
  for (std::thread& helper : helpers) helper.join();
}

// Elements that are worth a thread of their own.
constexpr int64_t kElementsPerThread = 65536;

inline int useful_threads(int threads, int64_t elements) {
  const int64_t most = std::max<int64_t>(1, elements / kElementsPerThread);
  return static_cast<int>(std::min<int64_t>(std::max(threads, 1), most));
}

// Calls fn(i) once for each i in [0, tasks), on up to `threads` threads, which take `grain` tasks
// at a time. fn must not throw.
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
  const int64_t shares = (tasks + grain - 1) / grain;
  run_on_threads(std::min<int64_t>(threads, shares), work);
}

}  // namespace cpu
}  // namespace papo
