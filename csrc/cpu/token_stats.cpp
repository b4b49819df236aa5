// Statistics of every row, forward and backward.
#include "rows.h"

namespace papo {
namespace cpu {

Status launch_token_stats_fwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const RowParams& row, const TokenStatsOut& out,
                              const Launch& launch) {
  const Rows rows(logits, row, launch.threads);
  const DType dtype = logits.dtype;
  const auto is_active = [&](int64_t i) { return targets[i] != kIgnoreIndex; };
  rows.scan_all(targets, state, is_active, [&](int64_t i, const RowScan& scan) {
    const RowStats<double> stats =
        is_active(i) ? finish(scan.state, scan.target_u) : RowStats<double>{};
    store_acc(out.logp, i, dtype, stats.logp);
    store_acc(out.entropy, i, dtype, stats.entropy);
    store_acc(out.unit_polarity, i, dtype, stats.unit_polarity);
    store_acc(out.lse, i, dtype, stats.lse);
    store_scan(out.state, i, scan);
  });
  return Status::success();
}

Status launch_token_stats_bwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const TokenStatsGrads& grads, const RowParams& row,
                              const Matrix& dlogits, const Launch& launch) {
  const Rows rows(logits, row, launch.threads);
  const auto upstream = [&](const void* g, int64_t i) {
    return g == nullptr ? 0.0 : load_acc(g, i, logits.dtype);
  };
  const auto plan = [&](int64_t i) {
    if (targets[i] == kIgnoreIndex) return RowPlan{};
    const RowScan scan = load_scan(state, i);
    const Upstream<double> g = {upstream(grads.logp, i), upstream(grads.entropy, i),
                                upstream(grads.unit_polarity, i)};
    return RowPlan{true, scan.state.max, scan.target_u,
                   make_row_grad(scan.state, finish(scan.state, scan.target_u), g)};
  };
  rows.grad_all(targets, plan, dlogits);
  return Status::success();
}

Status launch_scale(const Matrix& matrix, const void* factor, const Launch& launch) {
  const double value = load_acc(factor, 0, matrix.dtype);
  if (value == 1.0) return Status::success();
  const RowKernels& kernels = row_kernels();
  parallel_for(matrix.rows, useful_threads(launch.threads, matrix.rows * matrix.cols), 1,
               [&](int64_t i) {
                 kernels.scale(element_at(matrix, i, 0), matrix.cols, matrix.dtype, value);
               });
  return Status::success();
}

}  // namespace cpu
}  // namespace papo
