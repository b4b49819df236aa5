// The gradient of logp, entropy, unit polarity and lse with respect to a row's logits.
//
// With p = e^d / Z, mu = T/Z, s_j = d_j - mu, Q = sum p^2, S = sum p^2 s and the sampled token a
// (s_j is log p_j + H without the cancellation):
//   dlogp/du_j = [j=a] - p_j
//   dH/du_j    = -p_j s_j
//   dlse/du_j  = p_j
//   dc/du_j    = p_j (2 p_j s_j + p_j - 2 S - Q - Q s_j + p_a s_a + p_a + p_a s_j)
//                - [j=a] p_a (s_a + 1)
// Weighted by the upstream gradients they add up to
//   du_j = e^d_j (a0 + a1 d_j + e^d_j (b0 + b1 d_j)) + [j=a] g_t
// with four coefficients per row, into which the powers of 1/Z are folded.
#pragma once

#include "papo/params.h"
#include "papo/platform.h"
#include "papo/row_state.h"

namespace papo {

template <typename A>
struct Upstream {
  A logp, entropy, unit_polarity, lse;
};

template <typename A>
struct RowGrad {
  A a0, a1, b0, b1;
  A target;  // the sampled token's whole gradient, formed without rounding 1 - p_a

  // d = u - row_max is finite, and e = exp(d).
  PAPO_HD A element(A d, A e) const { return e * (a0 + a1 * d + e * (b0 + b1 * d)); }

  static PAPO_HD RowGrad zero() { return {A(0), A(0), A(0), A(0), A(0)}; }
};

template <typename A>
PAPO_HD RowGrad<A> make_row_grad(const RowState<A>& state, const RowStats<A>& r,
                                 const Upstream<A>& g) {
  // A masked sampled token has p = 0 and logp = -inf. Its row's gradient is 0.
  if (r.logp == -infinity<A>()) return RowGrad<A>::zero();
  const A inv_Z = A(1) / state.Z;
  const A gc = g.unit_polarity;
  const A a1 = gc * (r.p_a - r.Q) - g.entropy;
  const A a0 = gc * (r.p_a - r.Q + r.p_a * r.s_a - A(2) * r.S) - g.logp + g.lse - a1 * r.mu;
  const A b1 = A(2) * gc;
  const A b0 = gc * (A(1) - A(2) * r.mu);
  RowGrad<A> out;
  out.a0 = a0 * inv_Z;
  out.a1 = a1 * inv_Z;
  out.b0 = b0 * inv_Z * inv_Z;
  out.b1 = b1 * inv_Z * inv_Z;
  // With q = 1 - p_a, and Q_r = Q - p_a^2 and S_r = S - p_a^2 s_a of the other tokens, dc/du_a is
  //   p_a (-(q^2 + Q_r)(1 + s_a) + 2 p_a q s_a - 2 S_r),
  // whose terms are small both for p_a -> 0 and for p_a -> 1.
  const A q = r.one_minus_p_a;
  const A p2 = r.p_a * r.p_a;
  const A Q_r = r.Q - p2;
  const A S_r = r.S - p2 * r.s_a;
  const A dc = r.p_a * (A(2) * r.p_a * q * r.s_a - (q * q + Q_r) * (A(1) + r.s_a) - A(2) * S_r);
  out.target = g.logp * q - g.entropy * r.p_a * r.s_a + gc * dc + g.lse * r.p_a;
  return out;
}

// The slope of a soft cap, 1 - t^2, where t = tanh(z / softcap). The product keeps its digits where
// the cap saturates. V is a number or a vector of them.
template <typename V>
PAPO_HD V softcap_slope(V t) {
  return (1 - t) * (1 + t);
}

// du times the slope of the soft cap. `capped` is softcap(z) = u * temperature, where u has been
// rounded to Acc: at the cap it may lie a few roundings off, and has no slope all the same.
template <typename Acc = float, typename A>
PAPO_HD A through_softcap(A du, A capped, const RowParams& row) {
  // A masked token has du = 0 and an infinite `capped`.
  if (row.softcap > 0.0 && du != A(0)) {
    const A t = capped / static_cast<A>(row.softcap);
    constexpr A kRoundings = sizeof(Acc) == 8 ? A(0x1p-51) : A(0x1p-22);
    du *= A(1) - abs_of(t) < kRoundings ? A(0) : softcap_slope(t);
  }
  return du;
}

// dz = du * du/dz.
template <typename Acc = float, typename A>
PAPO_HD A chain_rule(A du, A capped, const RowParams& row) {
  return through_softcap<Acc>(du, capped, row) / static_cast<A>(row.temperature);
}

}  // namespace papo
