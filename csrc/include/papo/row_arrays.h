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

template <typename A>
PAPO_HD WeightingValues<A> load_weighting(const Weighting& w) {
  WeightingValues<A> v = {w.shape, A(0), A(0), A(0), A(0), A(0)};
  if (w.shape == WeightShape::kNone) return v;
  v.strength = static_cast<A>(w.strength);
  v.dead_zone = static_cast<A>(w.dead_zone);
  v.phase = *static_cast<const A*>(w.phase);
  v.sigma = *static_cast<const A*>(w.sigma);
  v.scale = *static_cast<const A*>(w.scale);
  return v;
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

template <typename A>
PAPO_HD void write_loss(const PolicyLossOut& out, int64_t i, const RowStats<double>& stats,
                        const TokenOut<A>& token) {
  store_acc<A>(out.token_loss, i, token.loss);
  store_acc<A>(out.logp, i, stats.logp);
  store_acc<A>(out.entropy, i, stats.entropy);
  store_acc<A>(out.unit_polarity, i, stats.unit_polarity);
  store_acc<A>(out.polarity, i, token.polarity);
  store_acc<A>(out.weight, i, token.weight);
  store_acc<A>(out.ratio, i, token.ratio);
  out.clipped[i] = token.clipped;
}

}  // namespace papo
