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

// Room for the sum of four terms, and in two of them for s, keeps an element's gradient finite, and
// so 0 where e = 0. No s is as large as 2^24.
constexpr float kMost = 3.4028234663852886e38f;
constexpr float kMostOfTerms = kMost / 4.0f;
constexpr float kMostOfSlopes = kMostOfTerms / 16777216.0f;

PAPO_DEVICE float clamped(double x, float most) {
  return machine::min_nan(machine::max_nan(static_cast<float>(x), -most), most);
}

// What a row's finish needs beside its sums, and loads before they are there.
struct RowInputs {
  RowParams row;
  double inv_temperature;
  TokenIn<float> token;      // of kPolicyLoss
  Upstream<float> upstream;  // of kStatsGradient
};

template <bool kOwn>
PAPO_DEVICE RowInputs load_inputs(const RowsCall& call, int64_t i) {
  RowInputs in = {};
  in.row = call.row;
  in.inv_temperature = call.inv_temperature;
  if (kOwn && call.own_temperatures()) {
    in.row = call.row.of_row<float>(i);
    in.inv_temperature = 1.0 / in.row.temperature;
  }
  if (call.task == RowTask::kPolicyLoss) {
    in.token = load_token<float, float>(call.tokens, i);
  } else if (call.task == RowTask::kStatsGradient) {
    const auto at = [i](const void* array) { return clamped(load_acc<float>(array, i), kMost); };
    in.upstream = {at(call.grads.logp), at(call.grads.entropy), at(call.grads.unit_polarity),
                   at(call.grads.lse)};
  }
  return in;
}

// Writes the outputs of a row that contributes nothing.
PAPO_DEVICE void write_nothing(const RowsCall& call, int64_t i) {
  if (call.task == RowTask::kStats) {
    write_stats<float>(call.stats, i, RowScan{}, RowStats<double>{});
  }
  if (call.task == RowTask::kPolicyLoss) {
    write_loss<float>(call.loss, i, RowStats<double>{}, TokenOut<float>{});
  }
}

PAPO_DEVICE ElementGrad make_element_grad(const RowGrad<double>& g, const RowScan& scan, double mu,
                                          const RowInputs& in, const Scaling& s) {
  const double temperature = in.row.temperature;
  const double m = scan.state.max * temperature;  // in the units of the softcapped logits
  const double unit = s.unit;
  const float m_float = static_cast<float>(m);
  const bool fast = s.is_fast(m_float);
  // The maximum was a float before it was multiplied by 1/temperature, which may have rounded it.
  const double exact = abs_of(m - m_float) <= 1e-15 * abs_of(m) ? m_float : m;
  const double center = exact + mu * temperature;
  ElementGrad e;
  // Not chain_rule(): the whole row waits for its division.
  e.target = clamped(
      through_softcap(g.target, scan.target_u * temperature, in.row) * in.inv_temperature, kMost);
  e.m = static_cast<float>(fast ? exact * unit : exact);
  e.center = static_cast<float>(fast ? center * unit : center);
  // What the rounding of m adds to every y, and how far the rounded center is from the maximum. The
  // coefficients make up for both.
  const double o = fast ? exact * unit - e.m : (exact - e.m) * unit;
  const double r = fast ? e.center - exact * unit : (e.center - exact) * unit;
  const double k = exp2_near_zero(-o);
  const double by = k * in.inv_temperature;
  e.a1 = clamped(by * g.a1 * kLn2, kMostOfSlopes);
  e.b0 = clamped(k * by * (g.b0 + g.b1 * kLn2 * r), kMostOfTerms);
  e.b1 = clamped(k * by * g.b1 * kLn2, kMostOfSlopes);
  const bool scaled_exp = e.a1 == 0.0f && e.b0 == 0.0f && e.b1 == 0.0f;
  e.a0 = clamped(by * (g.a0 + g.a1 * kLn2 * r), scaled_exp ? kMost : kMostOfTerms);
  e.mode = !fast ? GradMode::kCareful : scaled_exp ? GradMode::kScaledExp : GradMode::kGeneral;
  return e;
}

// Returns the row's gradient, if the call wants one: that of its token's loss, or of its statistics
// with the upstream gradients. The thread for which `writes` is true writes the row's outputs. A
// null `weighting` is loaded here.
template <bool kOwn>
PAPO_DEVICE ElementGrad finish_row(const RowsCall& call, const Job& job, RowScan scan,
                                   const RowInputs& in, const WeightingValues<float>* weighting,
                                   bool writes) {
  if (job.column == kColumnInvalid) scan.state = RowState<double>::bad();
  const RowStats<double> stats = finish(scan.state, scan.target_u, exp_of_distance);
  Upstream<float> up = in.upstream;
  if (call.task == RowTask::kPolicyLoss) {
    const TokenOut<float> token = policy_token<float>(
        stats, in.token, call.objective,
        weighting != nullptr ? *weighting : load_weighting<float, float>(call.weighting));
    if (writes) write_loss<float>(call.loss, job.row, stats, token);
    up = {clamped(token.dlogp, kMost), clamped(token.dentropy, kMost), 0.0f, 0.0f};
  } else if (call.task == RowTask::kStats && writes) {
    write_stats<float>(call.stats, job.row, scan, stats);
  }
  if (!call.wants_gradient()) return ElementGrad{};
  const Upstream<double> g = {up.logp, up.entropy, up.unit_polarity, up.lse};
  return make_element_grad(make_row_grad(scan.state, stats, g), scan, stats.mu, in,
                           scaling_of<kOwn>(call, job));
}

// A plan is a row's ElementGrad in shared memory. The warp that finishes the row leaves it there
// for the others.
struct PlanWords {
  Word first, second;
};
PAPO_DEVICE PlanWords pack(const ElementGrad& g) {
  return {{{machine::as_bits(g.m), machine::as_bits(g.center), machine::as_bits(g.a0),
            machine::as_bits(g.a1)}},
          {{machine::as_bits(g.b0), machine::as_bits(g.b1), machine::as_bits(g.target),
            static_cast<uint32_t>(g.mode)}}};
}
PAPO_DEVICE void store_plan(uint32_t address, const ElementGrad& g) {
  const PlanWords words = pack(g);
  machine::store_shared(address, words.first);
  machine::store_shared(address + kWordBytes, words.second);
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
