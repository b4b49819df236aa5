// One small kernel on the emulated machine, with a step left out: what the machine says to it.
// Arguments: names of steps; prints a line for each, after one for the kernel as it should be.
#include <stdio.h>
#include <string.h>

#include "launch.cuh"

namespace papo {
namespace cuda {

// In shared memory: a word per lane, and a peer's message behind them; then the barriers.
constexpr uint32_t kMessage = 512, kFull = 528, kEmpty = 536, kExchange = 544, kBytes = 552;
constexpr int kRounds = 3;

struct Steps {
  const char* left_out;

  bool take(const char* name) const { return strcmp(name, left_out) != 0; }
};

void init_barriers(const Steps& steps) {
  machine::barrier_init(kFull, 1);
  machine::barrier_init(kEmpty, 1);
  machine::barrier_init(kExchange, 1);
  if (steps.take("expect of messages")) machine::barrier_arrive_expect(kExchange, 16);
  if (steps.take("barrier_init_fence")) machine::barrier_init_fence();
}

void copy_rounds(const Steps& steps, const char* source) {
  for (uint32_t k = 0; k < kRounds; ++k) {
    if (steps.take("wait for empty")) machine::barrier_wait(kEmpty, (k & 1u) ^ 1u, "empty");
    if (steps.take("fence_before_bulk")) machine::fence_before_bulk();
    if (steps.take("expect of bytes")) machine::barrier_arrive_expect(kFull, 512);
    machine::bulk_load(0, source, 512, kFull);
  }
}

void read_rounds(const Steps& steps, int lane) {
  for (uint32_t k = 0; k < kRounds; ++k) {
    if (steps.take("wait for full")) machine::barrier_wait(kFull, k & 1u, "full");
    const bool only_waits = !steps.take("load and warp_sync");
    if (!only_waits) machine::load_shared(16 * static_cast<uint32_t>(lane));
    if (!only_waits && steps.take("warp_sync")) machine::warp_sync();
    if (lane == 0 && steps.take("arrive at empty")) machine::barrier_arrive(kEmpty);
  }
}

void exchange(const Steps& steps, int lane) {
  if (lane == 0) machine::send(kMessage, 1 - machine::cluster_rank(), Word{}, kExchange);
  if (!steps.take("wait for a message")) return;
  if (steps.take("cluster scope")) {
    machine::barrier_wait_cluster(kExchange, 0, "exchange");
  } else {
    machine::barrier_wait(kExchange, 0, "exchange");
  }
  machine::load_shared_double(kMessage);
}

PAPO_KERNEL(64, 1) handover(const Steps steps, const char* source) {
  const int lane = machine::thread_index() % 32;
  if (machine::thread_index() == 0) init_barriers(steps);
  if (steps.take("cluster_sync")) machine::cluster_sync();
  if (machine::thread_index() >= 32) {
    if (lane == 0) copy_rounds(steps, source);
  } else {
    read_rounds(steps, lane);
    exchange(steps, lane);
  }
  if (steps.take("block_sync")) machine::block_sync();
  if (machine::thread_index() == 32) machine::store_shared(0, Word{});
}

}  // namespace cuda
}  // namespace papo

int main(int count, char** names) {
  using namespace papo::cuda;
  alignas(16) static char source[512] = {};
  emulator::machine().memory.push_back({reinterpret_cast<uintptr_t>(source),
                                        reinterpret_cast<uintptr_t>(source) + sizeof(source),
                                        false});
  emulator::machine().check_order = true;
  for (int i = 0; i < count; ++i) {
    const char* left_out = i == 0 ? "nothing" : names[i];
    const char* const from = source;
    emulator::machine().random.seed(1);
    const papo::Status status = launch_kernel(handover, {2, 64, 2, static_cast<int>(kBytes)},
                                              nullptr, Steps{left_out}, from);
    printf("%s | %s\n", left_out, status.ok() ? "" : status.message);
  }
  return 0;
}
