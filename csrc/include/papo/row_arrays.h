// A row's entries in the arrays that a call brings: states, statistics and outputs of the loss.
// A is the type of their elements, "acc" in params.h.
#pragma once

#include "papo/params.h"
#include "papo/platform.h"
#include "papo/policy_loss.h"
#include "papo/row_state.h"

namespace papo {

// 0 where there is no array.
template <typename A>
PAPO_HD A load_acc(const void* array, int64_t i) {
  return array == nullptr ? A(0) : static_cast<const A*>(array)[i];
}
// Nothing is written where there is no array.
template <typename A>
PAPO_HD void store_acc(void* array, int64_t i, double x) {
  if (array != nullptr) static_cast<A*>(array)[i] = static_cast<A>(x);
}

PAPO_HD RowScan load_scan(const double* states, int64_t i) {
  const double* s = states + kStateSize * i;
  return {{s[0], s[1], s[2], s[3], s[4]}, s[5]};
}
PAPO_HD void store_scan(double* states, int64_t i, const RowScan& scan) {
  double* s = states + kStateSize * i;
  s[0] = scan.state.max;
  s[1] = scan.state.Z;
  s[2] = scan.state.T;
  s[3] = scan.state.Z2;
  s[4] = scan.state.T2;
  s[5] = scan.target_u;
}

template <typename C, typename A>
PAPO_HD WeightingValues<C> load_weighting(const Weighting& w) {
  WeightingValues<C> v = {w.shape, C(0), C(0), C(0), C(0), C(0)};
  if (w.shape == WeightShape::kNone) return v;
  v.strength = static_cast<C>(w.strength);
  v.dead_zone = static_cast<C>(w.dead_zone);
  v.phase = *static_cast<const A*>(w.phase);
  v.sigma = *static_cast<const A*>(w.sigma);
  v.scale = *static_cast<const A*>(w.scale);
  return v;
}

// Whether any of the loss's terms has a weight at token i.
template <typename A>
PAPO_HD bool has_weight(const TokenInputs& in, int64_t i) {
  return load_acc<A>(in.token_weight, i) != A(0) || load_acc<A>(in.kl_weight, i) != A(0) ||
         load_acc<A>(in.entropy_weight, i) != A(0);
}

// Token i's inputs, in the arithmetic of C.
template <typename C, typename A>
PAPO_HD TokenIn<C> load_token(const TokenInputs& in, int64_t i) {
  TokenIn<C> t;
  t.advantage = load_acc<A>(in.advantages, i);
  t.token_weight = load_acc<A>(in.token_weight, i);
  t.kl_weight = in.kl_weight != nullptr ? C(load_acc<A>(in.kl_weight, i)) : t.token_weight;
  t.entropy_weight =
      in.entropy_weight != nullptr ? C(load_acc<A>(in.entropy_weight, i)) : t.token_weight;
  t.past = in.log_ratio != nullptr  ? Past::kLogRatio
           : in.old_logp != nullptr ? Past::kOldLogp
                                    : Past::kOnPolicy;
  t.old = load_acc<A>(in.log_ratio != nullptr ? in.log_ratio : in.old_logp, i);
  t.has_ref = in.ref_logp != nullptr;
  t.ref_logp = load_acc<A>(in.ref_logp, i);
  return t;
}

template <typename A>
PAPO_HD void write_stats(const TokenStatsOut& out, int64_t i, const RowScan& scan,
                         const RowStats<double>& stats) {
  store_acc<A>(out.logp, i, stats.logp);
  store_acc<A>(out.entropy, i, stats.entropy);
  store_acc<A>(out.unit_polarity, i, stats.unit_polarity);
  store_acc<A>(out.lse, i, stats.lse);
  if (out.state != nullptr) store_scan(out.state, i, scan);
}

template <typename A, typename C>
PAPO_HD void write_loss(const PolicyLossOut& out, int64_t i, const RowStats<double>& stats,
                        const TokenOut<C>& token) {
  store_acc<A>(out.token_loss, i, token.loss);
  store_acc<A>(out.logp, i, stats.logp);
  store_acc<A>(out.entropy, i, stats.entropy);
  store_acc<A>(out.unit_polarity, i, stats.unit_polarity);
  store_acc<A>(out.polarity, i, token.polarity);
  store_acc<A>(out.weight, i, token.weight);
  store_acc<A>(out.ratio, i, token.ratio);
  out.clip_side[i] = static_cast<uint8_t>(token.clip_side);
}

}  // namespace papo
