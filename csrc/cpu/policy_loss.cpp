// The policy loss of every row and its gradient, written over the logits or beside them. The row is
// read twice, the second time from the cache; nothing as wide as the vocabulary is ever allocated.
#include "papo/policy_loss.h"

#include "rows.h"

namespace papo {
namespace cpu {
namespace {

// A: the accumulation type.
template <typename A>
class PolicyLossRows {
 public:
  PolicyLossRows(const Rows& rows, const TokenInputs& tokens, const PolicyLossParams& params,
                 const Weighting& weighting, const PolicyLossOut& out)
      : rows_(rows), tokens_(tokens), params_(params), out_(out), weighting_{} {
    weighting_.shape = weighting.shape;
    if (weighting.shape != WeightShape::kNone) {
      weighting_.strength = static_cast<A>(weighting.strength);
      weighting_.dead_zone = static_cast<A>(weighting.dead_zone);
      weighting_.phase = *static_cast<const A*>(weighting.phase);
      weighting_.sigma = *static_cast<const A*>(weighting.sigma);
      weighting_.scale = *static_cast<const A*>(weighting.scale);
    }
  }

  bool is_active(int64_t i) const {
    return tokens_.targets[i] != kIgnoreIndex && at(tokens_.token_weight, i) != A(0);
  }

  RowScan scan(int64_t i) const {
    return is_active(i) ? rows_.scan_row(i, tokens_.targets[i], tokens_.state) : RowScan{};
  }

  // Writes the token's outputs; returns what its gradient needs.
  RowPlan finish_token(int64_t i, const RowScan& scan) const {
    if (!is_active(i)) {
      write(i, RowStats<double>{}, TokenOut<A>{});
      return RowPlan{};
    }
    const RowStats<double> stats = finish(scan.state, scan.target_u);

    TokenIn<A> in{};
    in.advantage = at(tokens_.advantages, i);
    in.token_weight = at(tokens_.token_weight, i);
    in.has_old = tokens_.old_logp != nullptr;
    in.has_ref = tokens_.ref_logp != nullptr;
    if (in.has_old) in.old_logp = at(tokens_.old_logp, i);
    if (in.has_ref) in.ref_logp = at(tokens_.ref_logp, i);
    const TokenOut<A> token = policy_token(stats, in, params_, weighting_);
    write(i, stats, token);
    return {true, scan.state.max, scan.target_u,
            make_row_grad(scan.state, stats, Upstream<double>{token.dlogp, token.dentropy, 0.0})};
  }

 private:
  static A at(const void* array, int64_t i) { return static_cast<const A*>(array)[i]; }
  static void put(void* array, int64_t i, double x) {
    static_cast<A*>(array)[i] = static_cast<A>(x);
  }

  void write(int64_t i, const RowStats<double>& stats, const TokenOut<A>& token) const {
    put(out_.token_loss, i, token.loss);
    put(out_.logp, i, stats.logp);
    put(out_.entropy, i, stats.entropy);
    put(out_.unit_polarity, i, stats.unit_polarity);
    put(out_.polarity, i, token.polarity);
    put(out_.weight, i, token.weight);
    put(out_.ratio, i, token.ratio);
    out_.clipped[i] = token.clipped;
  }

  const Rows& rows_;
  const TokenInputs& tokens_;
  const PolicyLossParams& params_;
  const PolicyLossOut& out_;
  WeightingValues<A> weighting_;
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
                          const PolicyLossParams& params, const Weighting& weighting,
                          const RowParams& row, const PolicyLossOut& out, const Matrix& dlogits,
                          const Launch& launch) {
  const Rows rows(logits, row, launch.threads);
  if (logits.dtype == DType::kFloat64) {
    run(rows, tokens, PolicyLossRows<double>(rows, tokens, params, weighting, out), dlogits);
  } else {
    run(rows, tokens, PolicyLossRows<float>(rows, tokens, params, weighting, out), dlogits);
  }
  return Status::success();
}

}  // namespace cpu
}  // namespace papo
