// The policy loss of every row and its gradient, written over the logits or beside them. A row is
// read twice, the second time from the cache. Nothing as wide as the vocabulary is ever allocated.
#include "rows.h"

namespace papo {
namespace cpu {
namespace {

template <typename A>
class PolicyLossRows {
 public:
  PolicyLossRows(const Rows& rows, const TokenInputs& tokens, const Objective& objective,
                 const Weighting& weighting, const PolicyLossOut& out)
      : rows_(rows),
        tokens_(tokens),
        objective_(objective),
        out_(out),
        weighting_(load_weighting<double, A>(weighting)) {}

  bool is_active(int64_t i) const {
    return tokens_.targets[i] != kIgnoreIndex && has_weight<A>(tokens_, i);
  }

  RowScan scan(int64_t i) const {
    return is_active(i) ? rows_.scan_row(i, tokens_.targets[i], tokens_.state) : RowScan{};
  }

  // Writes the token's outputs, and returns what the row's gradient needs.
  RowPlan finish_token(int64_t i, const RowScan& scan) const {
    if (!is_active(i)) {
      write_loss<A>(out_, i, RowStats<double>{}, TokenOut<double>{});
      return RowPlan{};
    }
    const RowStats<double> stats = finish(scan.state, scan.target_u);
    const TokenOut<double> token =
        policy_token<A>(stats, load_token<double, A>(tokens_, i), objective_, weighting_);
    write_loss<A>(out_, i, stats, token);
    const Upstream<double> up = {saturated<A>(token.dlogp), saturated<A>(token.dentropy), 0.0, 0.0};
    return {true, scan.state.max, scan.target_u, make_row_grad(scan.state, stats, up)};
  }

 private:
  const Rows& rows_;
  const TokenInputs& tokens_;
  const Objective& objective_;
  const PolicyLossOut& out_;
  const WeightingValues<double> weighting_;
};

template <typename A>
void run(const Rows& rows, const TokenInputs& tokens, const PolicyLossRows<A>& loss,
         const Matrix& dlogits) {
  if (dlogits.data != nullptr && !rows.splits_rows()) {
    const auto plan = [&](int64_t i) { return loss.finish_token(i, loss.scan(i)); };
    return rows.grad_all(tokens.targets, plan, dlogits);
  }
  std::vector<RowPlan> plans(static_cast<size_t>(rows.count()));
  rows.scan_all(
      tokens.targets, tokens.state, [&](int64_t i) { return loss.is_active(i); },
      [&](int64_t i, const RowScan& scan) {
        plans[static_cast<size_t>(i)] = loss.finish_token(i, scan);
      });
  if (dlogits.data == nullptr) return;
  rows.grad_all(tokens.targets, [&](int64_t i) { return plans[static_cast<size_t>(i)]; }, dlogits);
}

}  // namespace

Status launch_policy_loss(const Matrix& logits, const TokenInputs& tokens,
                          const Objective& objective, const Weighting& weighting,
                          const RowParams& row, const PolicyLossOut& out, const Matrix& dlogits,
                          const Launch& launch) {
  const Rows rows(logits, row, launch.threads);
  with_acc(logits.dtype, [&](auto acc) {
    using Loss = PolicyLossRows<decltype(acc)>;
    run(rows, tokens, Loss(rows, tokens, objective, weighting, out), dlogits);
  });
  return Status::success();
}

}  // namespace cpu
}  // namespace papo
