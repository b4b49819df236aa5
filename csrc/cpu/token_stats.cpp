// The statistics of every row, forward and backward.
#include "rows.h"

namespace papo {
namespace cpu {

Status launch_token_stats_fwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const RowParams& row, const TokenStatsOut& out,
                              const Launch& launch) {
  const Rows rows(logits, row, launch.threads);
  const auto is_active = [&](int64_t i) { return targets[i] != kIgnoreIndex; };
  with_acc(logits.dtype, [&](auto acc) {
    rows.scan_all(targets, state, is_active, [&](int64_t i, const RowScan& scan) {
      const RowStats<double> stats =
          is_active(i) ? finish(scan.state, scan.target_u) : RowStats<double>{};
      write_stats<decltype(acc)>(out, i, scan, stats);
    });
  });
  return Status::success();
}

Status launch_token_stats_bwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const TokenStatsGrads& grads, const RowParams& row,
                              const Matrix& dlogits, const Launch& launch) {
  const Rows rows(logits, row, launch.threads);
  with_acc(logits.dtype, [&](auto acc) {
    using A = decltype(acc);
    const auto plan = [&](int64_t i) {
      if (targets[i] == kIgnoreIndex) return RowPlan{};
      const RowScan scan = load_scan(state, i);
      const Upstream<double> g = {saturated<A>(double(load_acc<A>(grads.logp, i))),
                                  saturated<A>(double(load_acc<A>(grads.entropy, i))),
                                  saturated<A>(double(load_acc<A>(grads.unit_polarity, i))),
                                  saturated<A>(double(load_acc<A>(grads.lse, i)))};
      return RowPlan{true, scan.state.max, scan.target_u,
                     make_row_grad(scan.state, finish(scan.state, scan.target_u), g)};
    };
    rows.grad_all(targets, plan, dlogits);
  });
  return Status::success();
}

}  // namespace cpu
}  // namespace papo
