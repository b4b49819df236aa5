// The online state of one row of logits.
//
// With u the scaled logits, m their maximum and d = u - m, a row keeps
//   Z = sum e^d    T = sum e^d d    Z2 = sum e^2d    T2 = sum e^2d d,
// from which come logp, the entropy and the unit polarity (arXiv 2605.11775) in a single pass.
#pragma once

#include "papo/platform.h"

namespace papo {

template <typename A>
struct RowState {
  A max, Z, T, Z2, T2;

  static PAPO_HD RowState empty() { return {-infinity<A>(), A(0), A(0), A(0), A(0)}; }

  // The same sums about new_max >= max. `exp` computes e^x. A part without mass has nothing to
  // move, and its maximum of -inf would turn 0 * inf into NaN.
  template <typename Exp>
  PAPO_HD RowState rescaled(A new_max, const Exp& exp) const {
    if (max == -infinity<A>() && Z == A(0)) return {new_max, A(0), A(0), A(0), A(0)};
    if (max == new_max) return *this;
    const A shift = max - new_max;
    const A alpha = exp(shift);
    // Nothing is left of the sums, and a shift of -inf would turn them into NaN.
    if (alpha == A(0)) return {new_max, A(0), A(0), A(0), A(0)};
    const A alpha2 = alpha * alpha;
    return {new_max, alpha * Z, alpha * (T + shift * Z), alpha2 * Z2, alpha2 * (T2 + shift * Z2)};
  }

  // One more scaled logit.
  PAPO_HD void update(A u) { merge({u, A(1), A(0), A(1), A(0)}, u == -infinity<A>()); }

  // Adds the sums of other columns of the same row. A part that is empty or holds nothing but -inf
  // changes nothing. NaN in either part reaches the result.
  PAPO_HD void merge(const RowState& other, bool other_is_masked = false) {
    if (other_is_masked) return;
    if (is_bad() || other.is_bad()) {
      *this = bad();
      return;
    }
    const A new_max = other.max > max ? other.max : max;
    const auto exp = [](A x) { return exp_of(x); };
    const RowState a = rescaled(new_max, exp);
    const RowState b = other.rescaled(new_max, exp);
    *this = {new_max, a.Z + b.Z, a.T + b.T, a.Z2 + b.Z2, a.T2 + b.T2};
  }

  static PAPO_HD RowState bad() {
    return {quiet_nan<A>(), quiet_nan<A>(), quiet_nan<A>(), quiet_nan<A>(), quiet_nan<A>()};
  }

  // A NaN or +inf is among the logits. An empty part is not bad: other parts may follow.
  PAPO_HD bool is_bad() const { return Z != Z || max != max || max == infinity<A>(); }

  // The logits are bad, or none of them is finite.
  PAPO_HD bool has_no_distribution() const { return is_bad() || Z == A(0); }
};

// A row, or some of its columns, and the scaled logit of the sampled token, which is -inf where the
// token is masked or in other columns.
struct RowScan {
  RowState<double> state;
  double target_u;
};

// The statistics of one row and its sampled token a.
template <typename A>
struct RowStats {
  A logp, entropy, unit_polarity, lse;
  // For the gradient: p_a, s_a = log p_a + H, mu = T/Z, Q = sum p^2, S = sum p^2 (log p + H), and
  // 1 - p_a, formed from the sums.
  A p_a, s_a, mu, Q, S, one_minus_p_a;
};

// target_u is the sampled token's scaled logit, -inf if that token is masked. `exp` computes e^x.
template <typename A, typename Exp>
PAPO_HD RowStats<A> finish(const RowState<A>& state, A target_u, const Exp& exp) {
  RowStats<A> r;
  if (state.has_no_distribution()) {
    const A nan = quiet_nan<A>();
    r = {nan, nan, nan, nan, nan, nan, nan, nan, nan, nan};
    return r;
  }
  const A log_Z = log_of(state.Z);
  const A inv_Z = A(1) / state.Z;
  const A d = target_u - state.max;
  const bool masked = target_u == -infinity<A>();
  const A e = masked ? A(0) : exp(d);
  r.mu = state.T * inv_Z;
  r.Q = state.Z2 * inv_Z * inv_Z;
  r.S = (state.T2 * inv_Z) * inv_Z - r.mu * r.Q;
  r.lse = state.max + log_Z;
  r.logp = d - log_Z;
  r.entropy = log_Z - r.mu;
  r.p_a = e * inv_Z;
  r.s_a = masked ? A(0) : d - r.mu;
  r.one_minus_p_a = (state.Z - e) * inv_Z;
  r.unit_polarity = r.S - r.p_a * r.s_a;
  return r;
}

template <typename A>
PAPO_HD RowStats<A> finish(const RowState<A>& state, A target_u) {
  return finish(state, target_u, [](A x) { return exp_of(x); });
}

}  // namespace papo
