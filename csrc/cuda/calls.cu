// The entry points. A call gets its constants and tiles, and goes to a kernel.
#include <stdio.h>

#include "choice.h"
#include "launch.cuh"

namespace papo {
namespace cuda {
namespace {

Scaling make_scaling(const RowParams& row, DType dtype) {
  Scaling s = {};
  s.softcap = static_cast<float>(row.softcap);
  s.inv_softcap = row.softcap > 0 ? static_cast<float>(1.0 / row.softcap) : 0.0f;
  s.set_unit(Scaling::unit_of(row.temperature), dtype);
  return s;
}

RowsCall make_call(RowTask task, const Matrix& logits, const int64_t* targets, const double* state,
                   const RowParams& row, const Matrix& dlogits) {
  RowsCall call = {};
  call.task = task;
  call.logits = logits;
  call.dlogits = dlogits;
  call.row = row;
  call.scaling = make_scaling(row, logits.dtype);
  call.inv_temperature = 1.0 / row.temperature;
  call.targets = targets;
  call.state = state;
  return call;
}

// A tile that was asked for is not replaced by another.
Status cannot_run(int cluster, int shared_bytes) {
  thread_local char text[160];
  snprintf(text, sizeof(text),
           "papo_kernels: the device cannot run a cluster of %d blocks with %d bytes of shared "
           "memory each",
           cluster, shared_bytes);
  return {text};
}

// If the device cannot run the tile's clusters, all rows whose sums are wanted are streamed, also
// those of statistics: a row's sums have the same bits in every call.
Status launch_call(RowsCall call, const Launch& launch) {
  if (call.logits.rows == 0) return Status::success();
  const Device device = device_of(launch.device);
  if (device.error != nullptr) return {device.error};
  const DeviceGuard guard(launch.device);
  if (!guard.status().ok()) return guard.status();
  if (call.state != nullptr) return launch_from_state(call, launch);
  const Chosen chosen =
      choose(launch.choice, call.columns(), element_bytes(call.logits.dtype), device.limits);
  if (chosen.error != nullptr) return {chosen.error};
  call.tile = chosen.tile;
  call.stats_tile = chosen.stats;
  int clusters = 0;
  if (call.tile.cluster > 0) {
    const Status status = count_clusters(call, device.limits, launch, &clusters);
    if (!status.ok()) return status;
    const bool asked = launch.choice.cluster != 0 || launch.choice.kernel == kOnChip ||
                       launch.choice.stats == kStatsAlways;
    if (clusters == 0 && asked) {
      return cannot_run(call.tile.cluster, call.tile.shared_bytes);
    }
  }
  if (clusters == 0) {
    call.tile = stream_tile(call.columns(), element_bytes(call.logits.dtype));
    return launch_streamed(call, launch);
  }
  if (!call.wants_gradient() && call.stats_tile.teams > 0) {
    bool ran = false;
    const Status status = launch_stats(call, device.limits, launch, &ran);
    if (ran || !status.ok()) return status;
    if (launch.choice.stats == kStatsAlways) return cannot_run(1, call.stats_tile.shared_bytes);
  }
  return launch_resident(call, device.limits, launch, clusters);
}

}  // namespace

Status launch_token_stats_fwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const RowParams& row, const TokenStatsOut& out,
                              const Launch& launch) {
  RowsCall call = make_call(RowTask::kStats, logits, targets, state, row, Matrix{});
  call.stats = out;
  return launch_call(call, launch);
}

Status launch_token_stats_bwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const TokenStatsGrads& grads, const RowParams& row,
                              const Matrix& dlogits, const Launch& launch) {
  RowsCall call = make_call(RowTask::kStatsGradient, logits, targets, state, row, dlogits);
  call.grads = grads;
  return launch_call(call, launch);
}

Status launch_policy_loss(const Matrix& logits, const TokenInputs& tokens,
                          const Objective& objective, const Weighting& weighting,
                          const RowParams& row, const PolicyLossOut& out, const Matrix& dlogits,
                          const Launch& launch) {
  RowsCall call = make_call(RowTask::kPolicyLoss, logits, tokens.targets, tokens.state, row,
                            dlogits);
  call.tokens = tokens;
  call.objective = objective;
  call.weighting = weighting;
  call.loss = out;
  return launch_call(call, launch);
}

Status check_tile(int64_t columns, DType dtype, int device, const TileChoice& choice) {
  const Device d = device_of(device);
  if (d.error != nullptr) return {d.error};
  return {choose(choice, columns, element_bytes(dtype), d.limits).error};
}

}  // namespace cuda
}  // namespace papo
