// The CUDA backend on the emulated machine, behind a C interface for ctypes.
#include "choice.h"
#include "launch.cuh"

using namespace papo;

extern "C" {

// `max_cluster` 0: a device without clusters. The seed orders threads and transfers.
void emulated_configure(const cuda::DeviceLimits* limits, int resident, unsigned seed) {
  cuda::EmulatedDevice& d = cuda::emulated_device();
  d.device = {*limits, nullptr};
  d.resident = resident;
  d.refuses_clusters = false;
  d.kernels_launched = 0;
  d.widest_cluster = 0;
  cuda::emulator::machine().random.seed(seed);
  cuda::emulator::machine().check_order = false;
}

// Whether accesses to shared memory that nothing orders are errors; slow. Until the next
// emulated_configure.
void emulated_check_order(bool check) { cuda::emulator::machine().check_order = check; }

void emulated_refuse_clusters() { cuda::emulated_device().refuses_clusters = true; }

// Bytes that kernels may read, and write where `writable`.
void emulated_allow(uintptr_t begin, int64_t bytes, bool writable) {
  cuda::emulator::machine().memory.push_back(
      {begin, begin + static_cast<uintptr_t>(bytes), writable});
}
void emulated_forget() { cuda::emulator::machine().memory.clear(); }

int emulated_widest_cluster() { return cuda::emulated_device().widest_cluster; }
int emulated_launches() { return cuda::emulated_device().kernels_launched; }

cuda::Chosen emulated_choose(const TileChoice* asked, int64_t columns, int element_bytes,
                             const cuda::DeviceLimits* limits) {
  return cuda::choose(*asked, columns, element_bytes, *limits);
}
const char* emulated_check_tile(int64_t columns, int dtype, const TileChoice* choice) {
  return cuda::check_tile(columns, static_cast<DType>(dtype), 0, *choice).message;
}

const char* emulated_token_stats_fwd(const Matrix* logits, uintptr_t targets, uintptr_t state,
                                     const RowParams* row, const TokenStatsOut* out,
                                     const Launch* launch) {
  return cuda::launch_token_stats_fwd(*logits, reinterpret_cast<const int64_t*>(targets),
                                      reinterpret_cast<const double*>(state), *row, *out, *launch)
      .message;
}

const char* emulated_token_stats_bwd(const Matrix* logits, uintptr_t targets, uintptr_t state,
                                     const TokenStatsGrads* grads, const RowParams* row,
                                     const Matrix* dlogits, const Launch* launch) {
  return cuda::launch_token_stats_bwd(*logits, reinterpret_cast<const int64_t*>(targets),
                                      reinterpret_cast<const double*>(state), *grads, *row,
                                      *dlogits, *launch)
      .message;
}

const char* emulated_policy_loss(const Matrix* logits, const TokenInputs* tokens,
                                 const Objective* objective, const Weighting* weighting,
                                 const RowParams* row, const PolicyLossOut* out,
                                 const Matrix* dlogits, const Launch* launch) {
  return cuda::launch_policy_loss(*logits, *tokens, *objective, *weighting, *row, *out, *dlogits,
                                  *launch)
      .message;
}

const char* emulated_scale(const Matrix* matrix, uintptr_t factor, const Launch* launch) {
  return cuda::launch_scale(*matrix, reinterpret_cast<const void*>(factor), *launch).message;
}
}
