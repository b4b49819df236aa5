// The step from a row's sums to its gradient: writes the outputs, and forms the coefficients. One
// warp takes it for a row, and all its lanes do the same.
#pragma once

#include "papo/row_grad.h"
#include "row_call.cuh"

namespace papo {
namespace cuda {

enum class GradMode : int {
  kScaledExp,  // du = a0 2^y, as for the usual policy loss
  kGeneral,
  kCareful,  // for soft caps, and for maxima at which the fma of kGeneral is not exact enough
};

// A row's gradient in the units of the inner loops: du = e (a0 + a1 s + e (b0 + b1 s)), e = 2^y.
// Here y = x unit - m and s = x unit - center, or for kCareful (x - m) unit and (x - center) unit.
// At the center, d = mu, an element's gradient changes sign: measured from there it keeps its
// digits. 1/temperature is folded into the coefficients.
struct ElementGrad {
  float m, center, a0, a1, b0, b1;
  float target;  // of the sampled token
  GradMode mode;
};

// The per-token inputs of a row, which are loaded before its sums are there.
struct TokenNumbers {
  // advantage, token_weight, old_logp and ref_logp, or the three upstream gradients
  float x[4];
};

PAPO_DEVICE TokenNumbers load_numbers(const RowsCall& call, int64_t i) {
  TokenNumbers n = {};
  if (call.task == RowTask::kPolicyLoss) {
    n.x[0] = load_acc<float>(call.tokens.advantages, i);
    n.x[1] = load_acc<float>(call.tokens.token_weight, i);
    n.x[2] = load_acc<float>(call.tokens.old_logp, i);
    n.x[3] = load_acc<float>(call.tokens.ref_logp, i);
  } else if (call.task == RowTask::kStatsGradient) {
    n.x[0] = load_acc<float>(call.grads.logp, i);
    n.x[1] = load_acc<float>(call.grads.entropy, i);
    n.x[2] = load_acc<float>(call.grads.unit_polarity, i);
  }
  return n;
}

// Writes the outputs of a row that contributes nothing.
PAPO_DEVICE void write_nothing(const RowsCall& call, int64_t i) {
  if (call.task == RowTask::kStats) {
    write_stats<float>(call.stats, i, RowScan{}, RowStats<double>{});
  }
  if (call.task == RowTask::kPolicyLoss) {
    write_loss(call.loss, i, RowStats<double>{}, TokenOut<float>{});
  }
}

PAPO_DEVICE ElementGrad make_element_grad(const RowGrad<double>& g, const RowScan& scan, double mu,
                                          const RowsCall& call) {
  const double temperature = call.row.temperature;
  const double m = scan.state.max * temperature;  // in the units of the softcapped logits
  const double unit = call.scaling.unit;
  const float m_float = static_cast<float>(m);
  const bool fast = call.row.softcap == 0.0 && m_float >= call.scaling.fast_min &&
                    m_float <= call.scaling.fast_max;
  // The maximum was a float before it was multiplied by 1/temperature, which may have rounded it.
  const double exact = abs_of(m - m_float) <= 1e-15 * abs_of(m) ? m_float : m;
  const double center = exact + mu * temperature;
  ElementGrad e;
  e.target = static_cast<float>(chain_rule(g.target, scan.target_u * temperature, call.row));
  e.m = static_cast<float>(fast ? exact * unit : exact);
  e.center = static_cast<float>(fast ? center * unit : center);
  // What the rounding of m adds to every y, and how far the rounded center is from the maximum. The
  // coefficients make up for both.
  const double o = fast ? exact * unit - e.m : (exact - e.m) * unit;
  const double r = fast ? e.center - exact * unit : (e.center - exact) * unit;
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

// Returns the row's gradient, if the call wants one: that of its token's loss, or of its statistics
// with the upstream gradients. The thread for which `writes` is true writes the row's outputs. A
// null `weighting` is loaded here.
PAPO_DEVICE ElementGrad finish_row(const RowsCall& call, const Job& job, RowScan scan,
                                   const TokenNumbers& numbers,
                                   const WeightingValues<float>* weighting, bool writes) {
  if (job.column == kColumnInvalid) scan.state = RowState<double>::bad();
  const RowStats<double> stats = finish(scan.state, scan.target_u, exp_of_distance);
  Upstream<double> up = {numbers.x[0], numbers.x[1], numbers.x[2]};
  if (call.task == RowTask::kPolicyLoss) {
    const TokenIn<float> in = {numbers.x[0],
                               numbers.x[1],
                               call.tokens.old_logp != nullptr,
                               call.tokens.ref_logp != nullptr,
                               numbers.x[2],
                               numbers.x[3]};
    const TokenOut<float> token =
        policy_token(stats, in, call.objective,
                     weighting != nullptr ? *weighting : load_weighting<float>(call.weighting));
    if (writes) write_loss(call.loss, job.row, stats, token);
    up = {token.dlogp, token.dentropy, 0.0};
  } else if (call.task == RowTask::kStats && writes) {
    write_stats<float>(call.stats, job.row, scan, stats);
  }
  if (!call.wants_gradient()) return ElementGrad{};
  return make_element_grad(make_row_grad(scan.state, stats, up), scan, stats.mu, call);
}

// A plan is a row's ElementGrad in shared memory. The warp that finishes the row leaves it there
// for the others.
PAPO_DEVICE void store_plan(uint32_t address, const ElementGrad& g) {
  const Word first = {{machine::as_bits(g.m), machine::as_bits(g.center), machine::as_bits(g.a0),
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

}  // namespace cuda
}  // namespace papo
