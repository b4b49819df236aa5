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

  // The same sums about another maximum, new_max >= max. A part without mass has nothing to move,
  // and its -inf maximum would turn 0 * inf into NaN. `exp` is e^x, however it is computed.
  template <typename Exp>
  PAPO_HD RowState rescaled(A new_max, const Exp& exp) const {
    if (max == -infinity<A>() && Z == A(0)) return {new_max, A(0), A(0), A(0), A(0)};
    if (max == new_max) return *this;
    const A shift = max - new_max;
    const A alpha = exp(shift);
    // e^x underflows long before shift * 0 could matter; -inf * 0 would be NaN.
    if (alpha == A(0)) return {new_max, A(0), A(0), A(0), A(0)};
    const A alpha2 = alpha * alpha;
    return {new_max, alpha * Z, alpha * (T + shift * Z), alpha2 * Z2, alpha2 * (T2 + shift * Z2)};
  }

  // One more scaled logit.
  PAPO_HD void update(A u) { merge({u, A(1), A(0), A(1), A(0)}, u == -infinity<A>()); }

  // Adds a part computed over other columns of the same row. An empty or all -inf part is the
  // identity; NaN in either part reaches the result.
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

  // A NaN or +inf among the logits. (An empty row is not bad yet: other parts may follow.)
  PAPO_HD bool is_bad() const { return Z != Z || max != max || max == infinity<A>(); }

  // No finite logit at all, or a bad one: the row has no distribution.
  PAPO_HD bool has_no_distribution() const { return is_bad() || Z == A(0); }
};

// What one row yields for its sampled token.
template <typename A>
struct RowStats {
  A logp, entropy, unit_polarity, lse;
  // Kept for the gradient: p_a of the sampled token, its own s_a = log p_a + H, mu = T/Z,
  // Q = sum p^2, S = sum p^2 (log p + H), and 1 - p_a from the sums.
  A p_a, s_a, mu, Q, S, one_minus_p_a;
};

// target_u: scaled logit of the sampled token, -inf if it is masked. `exp` is e^x.
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
