// What one call asks of its rows, which rows there are, and the step between a row's sums and its
// gradient: outputs written, coefficients formed. One warp does that step for a row, all lanes
// alike.
#pragma once

#include "papo/policy_loss.h"
#include "papo/row_grad.h"
#include "row_reduce.cuh"

namespace papo {
namespace cuda {

enum class RowTask : int { kStats, kStatsGradient, kPolicyLoss };

// A call as its kernels get it. kStats uses `stats`, kStatsGradient `grads`, kPolicyLoss the rest.
struct RowsCall {
  RowTask task;
  Matrix logits;
  Matrix dlogits;  // data null: no gradient
  RowParams row;
  Scaling scaling;
  Tile tile;
  StatsTile stats_tile;
  const int64_t* targets;
  const double* state;  // null: scan the logits
  TokenStatsOut stats;
  TokenStatsGrads grads;
  TokenInputs tokens;
  PolicyLossParams params;
  Weighting weighting;
  PolicyLossOut loss;

  PAPO_HD int columns() const { return static_cast<int>(row.vocab_size); }
  PAPO_HD bool wants_gradient() const { return dlogits.data != nullptr; }
};

PAPO_DEVICE float acc_at(const void* array, int64_t i) {
  return array == nullptr ? 0.0f : static_cast<const float*>(array)[i];
}

// ---- which rows ---------------------------------------------------------------------------------

// A row's sampled column, or why it has none.
constexpr int kColumnElsewhere = -1;
constexpr int kColumnInvalid = -2;   // out of range: the row becomes NaN
constexpr int kColumnInactive = -3;  // contributes nothing and is not read

PAPO_DEVICE int sampled_column(const RowsCall& call, int64_t i) {
  const int64_t target = call.targets[i];
  if (target == kIgnoreIndex) return kColumnInactive;
  if (call.task == RowTask::kPolicyLoss && acc_at(call.tokens.token_weight, i) == 0.0f) {
    return kColumnInactive;
  }
  if (target == kElsewhere && call.row.sharded) return kColumnElsewhere;
  return target >= 0 && target < call.row.vocab_size ? static_cast<int>(target) : kColumnInvalid;
}

struct Job {
  int64_t row;  // -1: no more
  int column;
};

// The rows first, first + step, ... of a call, read by one warp: its lanes look up 32 at a time, so
// that a row's target is there when the row's turn comes.
class RowQueue {
 public:
  PAPO_DEVICE RowQueue(const RowsCall& call, int64_t first, int64_t step, int lane)
      : call_(call), next_(first), step_(step), lane_(lane), at_(0), column_(0) {}

  PAPO_DEVICE Job next() {
    if (next_ >= call_.logits.rows) return {-1, kColumnInactive};
    if (at_ == 0) {
      const int64_t i = next_ + lane_ * step_;
      column_ = i < call_.logits.rows ? sampled_column(call_, i) : kColumnInactive;
    }
    const Job job = {next_, machine::broadcast(column_, at_)};
    next_ += step_;
    at_ = (at_ + 1) % 32;
    return job;
  }

  PAPO_DEVICE Job next_active() {
    Job job = next();
    while (job.row >= 0 && job.column == kColumnInactive) job = next();
    return job;
  }

 private:
  const RowsCall& call_;
  int64_t next_, step_;
  int lane_, at_, column_;
};

// ---- from sums to outputs and coefficients -----------------------------------------------------

enum class GradMode : int {
  kScaledExp,  // du = a0 2^y, the usual policy loss
  kGeneral,
  kCareful,  // soft caps, and maxima for which the fma of kGeneral is not exact enough
};

// A row's gradient in the units of the inner loops: du = e (a0 + a1 s + e (b0 + b1 s)), e = 2^y,
// with y = x unit - m and s = x unit - centre, or (x - m) unit and (x - centre) unit if careful. At
// the centre, d = mu, an element's gradient changes its sign: measured from there it keeps its
// digits. 1/temperature is folded in.
struct ElementGrad {
  float m, centre, a0, a1, b0, b1;
  float target;  // of the sampled token
  GradMode mode;
};

// The per-token numbers of a row, loaded before its sums are there.
struct TokenNumbers {
  float x[4];  // advantage, token_weight, old_logp, ref_logp; or the three upstream gradients
};

PAPO_DEVICE TokenNumbers load_numbers(const RowsCall& call, int64_t i) {
  TokenNumbers n = {};
  if (call.task == RowTask::kPolicyLoss) {
    n.x[0] = acc_at(call.tokens.advantages, i);
    n.x[1] = acc_at(call.tokens.token_weight, i);
    n.x[2] = acc_at(call.tokens.old_logp, i);
    n.x[3] = acc_at(call.tokens.ref_logp, i);
  } else if (call.task == RowTask::kStatsGradient) {
    n.x[0] = acc_at(call.grads.logp, i);
    n.x[1] = acc_at(call.grads.entropy, i);
    n.x[2] = acc_at(call.grads.unit_polarity, i);
  }
  return n;
}

PAPO_DEVICE WeightingValues<float> load_weighting(const Weighting& w) {
  WeightingValues<float> v = {w.shape, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  if (w.shape == WeightShape::kNone) return v;
  v.strength = static_cast<float>(w.strength);
  v.dead_zone = static_cast<float>(w.dead_zone);
  v.phase = *static_cast<const float*>(w.phase);
  v.sigma = *static_cast<const float*>(w.sigma);
  v.scale = *static_cast<const float*>(w.scale);
  return v;
}

PAPO_DEVICE void put(void* array, int64_t i, double x) {
  if (array != nullptr) static_cast<float*>(array)[i] = static_cast<float>(x);
}

PAPO_DEVICE void write_stats(const TokenStatsOut& out, int64_t i, const RowScan& scan,
                             const RowStats<double>& stats) {
  put(out.logp, i, stats.logp);
  put(out.entropy, i, stats.entropy);
  put(out.unit_polarity, i, stats.unit_polarity);
  put(out.lse, i, stats.lse);
  if (out.state == nullptr) return;
  double* state = out.state + kStateSize * i;
  state[0] = scan.state.max;
  state[1] = scan.state.Z;
  state[2] = scan.state.T;
  state[3] = scan.state.Z2;
  state[4] = scan.state.T2;
  state[5] = scan.target_u;
}

PAPO_DEVICE void write_loss(const PolicyLossOut& out, int64_t i, const RowStats<double>& stats,
                            const TokenOut<float>& token) {
  put(out.token_loss, i, token.loss);
  put(out.logp, i, stats.logp);
  put(out.entropy, i, stats.entropy);
  put(out.unit_polarity, i, stats.unit_polarity);
  put(out.polarity, i, token.polarity);
  put(out.weight, i, token.weight);
  put(out.ratio, i, token.ratio);
  out.clipped[i] = token.clipped;
}

// The outputs of a row that contributes nothing.
PAPO_DEVICE void write_nothing(const RowsCall& call, int64_t i) {
  if (call.task == RowTask::kStats) write_stats(call.stats, i, RowScan{}, RowStats<double>{});
  if (call.task == RowTask::kPolicyLoss) {
    write_loss(call.loss, i, RowStats<double>{}, TokenOut<float>{});
  }
}

PAPO_DEVICE ElementGrad make_element_grad(const RowGrad<double>& g, const RowScan& scan, double mu,
                                          const RowsCall& call) {
  const double temperature = call.row.temperature;
  const double m = scan.state.max * temperature;  // in the units of the (softcapped) logits
  const double unit = call.scaling.unit;
  const float m_float = static_cast<float>(m);
  const bool fast = call.row.softcap == 0.0 && m_float >= call.scaling.fast_min &&
                    m_float <= call.scaling.fast_max;
  // The maximum was a float; its way through 1/temperature may have cost it a rounding.
  const double exact = abs_of(m - m_float) <= 1e-15 * abs_of(m) ? m_float : m;
  const double centre = exact + mu * temperature;
  ElementGrad e;
  e.target = static_cast<float>(chain_rule(g.target, scan.target_u * temperature, call.row));
  e.m = static_cast<float>(fast ? exact * unit : exact);
  e.centre = static_cast<float>(fast ? centre * unit : centre);
  // What rounding m adds to every y, and from the maximum to the centre as it was rounded: the
  // coefficients take both out again.
  const double o = fast ? exact * unit - e.m : (exact - e.m) * unit;
  const double r = fast ? e.centre - exact * unit : (e.centre - exact) * unit;
  const double k = exp2_near_zero(-o);
  const double by = k * call.scaling.inv_temperature;
  e.a0 = static_cast<float>(by * (g.a0 + g.a1 * kLn2 * r));
  e.a1 = static_cast<float>(by * g.a1 * kLn2);
  e.b0 = static_cast<float>(k * by * (g.b0 + g.b1 * kLn2 * r));
  e.b1 = static_cast<float>(k * by * g.b1 * kLn2);
  const bool scaled_exp = e.a1 == 0.0f && e.b0 == 0.0f && e.b1 == 0.0f;
  e.mode = !fast ? GradMode::kCareful : scaled_exp ? GradMode::kScaledExp : GradMode::kGeneral;
  return e;
}

// The gradient of the row's statistics with respect to its logits, given the token's loss or the
// upstream gradients. `weighting` null: loaded here. Lane 0 writes the row's outputs if `writes`.
PAPO_DEVICE ElementGrad finish_row(const RowsCall& call, const Job& job, RowScan scan,
                                   const TokenNumbers& numbers,
                                   const WeightingValues<float>* weighting, bool writes) {
  if (job.column == kColumnInvalid) scan.state = RowState<double>::bad();
  const RowStats<double> stats = finish(scan.state, scan.target_u, exp_of_distance);
  Upstream<double> up = {numbers.x[0], numbers.x[1], numbers.x[2]};
  if (call.task == RowTask::kPolicyLoss) {
    TokenIn<float> in = {};
    in.advantage = numbers.x[0];
    in.token_weight = numbers.x[1];
    in.has_old = call.tokens.old_logp != nullptr;
    in.has_ref = call.tokens.ref_logp != nullptr;
    in.old_logp = numbers.x[2];
    in.ref_logp = numbers.x[3];
    const TokenOut<float> token =
        policy_token(stats, in, call.params,
                     weighting != nullptr ? *weighting : load_weighting(call.weighting));
    if (writes) write_loss(call.loss, job.row, stats, token);
    up = {token.dlogp, token.dentropy, 0.0};
  } else if (call.task == RowTask::kStats && writes) {
    write_stats(call.stats, job.row, scan, stats);
  }
  if (!call.wants_gradient()) return ElementGrad{};
  return make_element_grad(make_row_grad(scan.state, stats, up), scan, stats.mu, call);
}

// A plan in shared memory: how the warp that finishes rows tells the others.
PAPO_DEVICE void store_plan(uint32_t address, const ElementGrad& g) {
  const Word first = {{machine::as_bits(g.m), machine::as_bits(g.centre), machine::as_bits(g.a0),
                       machine::as_bits(g.a1)}};
  const Word second = {{machine::as_bits(g.b0), machine::as_bits(g.b1),
                        machine::as_bits(g.target), static_cast<uint32_t>(g.mode)}};
  machine::store_shared(address, first);
  machine::store_shared(address + kWordBytes, second);
}
PAPO_DEVICE ElementGrad load_plan(uint32_t address) {
  const Word first = machine::load_shared(address);
  const Word second = machine::load_shared(address + kWordBytes);
  return {machine::as_float(first.r[0]),  machine::as_float(first.r[1]),
          machine::as_float(first.r[2]),  machine::as_float(first.r[3]),
          machine::as_float(second.r[0]), machine::as_float(second.r[1]),
          machine::as_float(second.r[2]), static_cast<GradMode>(second.r[3])};
}

// A row's state as the call brings it.
PAPO_DEVICE RowScan given_scan(const RowsCall& call, int64_t i) {
  const double* s = call.state + kStateSize * i;
  return {{s[0], s[1], s[2], s[3], s[4]}, s[5]};
}

}  // namespace cuda
}  // namespace papo
