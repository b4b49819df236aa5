// The host side of csrc/cuda/launch.cuh for the emulated machine: an invented device, and launches
// that run all blocks of a grid together.
#pragma once

#include <algorithm>
#include <tuple>

namespace papo {
namespace cuda {

struct Device {
  DeviceLimits limits;
  const char* error;
};

struct EmulatedDevice {
  Device device = {};
  int resident = 2;  // clusters that run at a time
  bool refuses_clusters = false;  // as where too few multiprocessors of a group are free
  int kernels_launched = 0;
  int widest_cluster = 0;
};

inline EmulatedDevice& emulated_device() {
  static EmulatedDevice d;
  return d;
}
inline const Device& device_of(int) { return emulated_device().device; }

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  Status status() const { return Status::success(); }
};

template <typename... Args>
int resident_clusters(void (*)(Args...), const LaunchShape& shape, int, int) {
  const DeviceLimits& limits = emulated_device().device.limits;
  const bool fits = shape.shared_bytes <= limits.shared_per_block &&
                    (shape.cluster == 1 || shape.cluster <= limits.max_cluster);
  const bool refused = shape.cluster > 1 && emulated_device().refuses_clusters;
  return fits && !refused ? emulated_device().resident : 0;
}

namespace emulator {

inline std::function<void()>& body() {
  static std::function<void()> fn;
  return fn;
}

inline void fiber_main() {
  body()();
  fiber().done = true;
  --block().running;
  _longjmp(machine().scheduler, 1);
}

__attribute__((noinline)) inline void run_fiber(Fiber& f) {
  Machine& m = machine();
  m.current = &f;
  if (_setjmp(m.scheduler) == 0) {
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    setcontext(&f.context);
  }
  m.current = nullptr;
}

__attribute__((noinline)) inline void deliver_one() {
  Machine& m = machine();
  const size_t i = m.random() % m.in_flight.size();
  std::function<void()> arrive = std::move(m.in_flight[i]);
  m.in_flight.erase(m.in_flight.begin() + static_cast<std::ptrdiff_t>(i));
  if (_setjmp(m.scheduler) == 0) arrive();
}

// Runs the lanes of one warp until none can go on.
inline bool run_warp(size_t first) {
  Machine& m = machine();
  bool any = false;
  for (bool progress = true; progress && m.error.empty();) {
    progress = false;
    for (size_t i = first; i < first + 32 && m.error.empty(); ++i) {
      Fiber& f = *m.fibers[i];
      if (f.done || (f.waiting_for && !f.waiting_for())) continue;
      f.waiting_for = nullptr;
      run_fiber(f);
      progress = any = true;
    }
  }
  return any;
}

// Which warp waits for what, each once.
inline std::string deadlock() {
  constexpr size_t kMostShown = 8;
  std::vector<std::string> waits;
  for (const auto& f : machine().fibers) {
    if (f->done) continue;
    std::string one = "block " + std::to_string(f->block->index) + " warp " +
                      std::to_string(f->thread / 32) + " waits for " + f->awaited;
    if (f->awaited_at >= 0) one += " at " + std::to_string(f->awaited_at);
    if (std::find(waits.begin(), waits.end(), one) == waits.end()) waits.push_back(one);
  }
  std::string all = "deadlock";
  for (size_t i = 0; i < waits.size() && i < kMostShown; ++i) {
    all += (i == 0 ? ": " : ", ") + waits[i];
  }
  if (waits.size() > kMostShown) {
    all += " and " + std::to_string(waits.size() - kMostShown) + " more";
  }
  return all;
}

inline void run_all() {
  Machine& m = machine();
  std::vector<size_t> order;
  for (size_t i = 0; i < m.fibers.size(); i += 32) order.push_back(i);
  // Some launches favor a few warps over the others, so that roles drift apart.
  const unsigned skip = m.random() % 4;
  for (;;) {
    bool progress = false, left = false;
    std::shuffle(order.begin(), order.end(), m.random);
    for (const size_t first : order) {
      if (skip != 0 && m.random() % (skip + 1) != 0) {
        left = true;
        continue;
      }
      progress |= run_warp(first);
      if (!m.error.empty()) return;
      if (!m.in_flight.empty() && m.random() % 3 == 0) deliver_one();
    }
    if (progress || left) {
      left = false;
      for (const auto& f : m.fibers) left |= !f->done;
      if (!left) break;
      if (progress) continue;
    }
    // Nothing moved in this round: a transfer arrives, or every warp gets its turn.
    for (const size_t first : order) progress |= run_warp(first);
    if (!m.error.empty()) return;
    if (progress) continue;
    left = false;
    for (const auto& f : m.fibers) left |= !f->done;
    if (!left) break;
    if (m.in_flight.empty()) {
      m.error = deadlock();
      return;
    }
    deliver_one();
    if (!m.error.empty()) return;
  }
  if (!m.in_flight.empty()) m.error = "a transfer outlived its block";
}

inline void prepare(Fiber& f) {
  f.stack.reset(new unsigned char[kStackBytes]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
}

inline void build(const LaunchShape& shape) {
  Machine& m = machine();
  m.blocks.clear();
  m.fibers.clear();
  m.in_flight.clear();
  m.error.clear();
  m.cluster = shape.cluster;
  m.threads = shape.threads;
  m.clusters.assign(static_cast<size_t>(shape.blocks / shape.cluster), Cluster{});
  for (Cluster& c : m.clusters) c.agents = static_cast<uint32_t>(shape.cluster * shape.threads);
  for (int64_t b = 0; b < shape.blocks; ++b) {
    auto block = std::make_unique<Block>();
    block->index = b;
    block->rank = static_cast<int>(b % shape.cluster);
    block->first_of_cluster = b - b % shape.cluster;
    block->cluster = &m.clusters[static_cast<size_t>(b / shape.cluster)];
    block->threads = block->running = shape.threads;
    block->shared.assign(static_cast<size_t>(shape.shared_bytes), 0xff);
    if (m.check_order) block->cells.resize(ceil_div(shape.shared_bytes, kCellBytes));
    block->warps.resize(static_cast<size_t>(shape.threads / 32));
    for (int t = 0; t < shape.threads; ++t) {
      auto f = std::make_unique<Fiber>();
      f->block = block.get();
      f->thread = t;
      f->now = {static_cast<uint32_t>(block->rank * shape.threads + t), 1};
      if (m.check_order) f->known.learn(f->now);
      m.fibers.push_back(std::move(f));
    }
    m.blocks.push_back(std::move(block));
  }
  for (const auto& f : m.fibers) prepare(*f);
}

}  // namespace emulator

template <typename... Params, typename... Args>
Status launch_kernel(void (*kernel)(Params...), const LaunchShape& shape, void*,
                     const Args&... args) {
  if (shape.blocks <= 0 || shape.blocks % shape.cluster != 0 || shape.threads % 32 != 0) {
    return {"emulator: not a launch"};
  }
  EmulatedDevice& device = emulated_device();
  ++device.kernels_launched;
  device.widest_cluster = std::max(device.widest_cluster, shape.cluster);
  emulator::build(shape);
  emulator::body() = [&] { kernel(args...); };
  emulator::run_all();
  static std::string message;
  message = emulator::machine().error;
  return {message.empty() ? nullptr : message.c_str()};
}

}  // namespace cuda
}  // namespace papo
