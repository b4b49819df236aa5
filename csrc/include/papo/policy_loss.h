// One token of the policy loss: its value, and its derivative with respect to logp and entropy.
//
//   r  = exp(logp - old_logp), or 1 on-policy        polarity = r A c
//   w  = scale (1 + strength phase h(polarity/sigma))    A' = w A
//   L  = -min(r A', clip(r, 1 - low, 1 + high) A');  dual clip C: where A' < 0, L = min(L, -C A')
//   L += kl_coef (e^(ref - logp) - (ref - logp) - 1)     L -= entropy_coef H
// No gradient flows through w. The row's gradient is that of row_grad.h, with {dlogp, dentropy, 0}
// upstream.
#pragma once

#include "papo/params.h"
#include "papo/platform.h"
#include "papo/row_state.h"

namespace papo {

// One token's inputs in the accumulation type.
template <typename A>
struct TokenIn {
  A advantage, token_weight;
  bool has_old, has_ref;
  A old_logp, ref_logp;
};

// A Weighting whose scalars have been loaded.
template <typename A>
struct WeightingValues {
  WeightShape shape;
  A strength, dead_zone, phase, sigma, scale;
};

template <typename A>
struct TokenOut {
  A loss;  // token_weight applied
  A polarity, weight, ratio;
  bool clipped;
  A dlogp, dentropy;  // d loss / d logp, d loss / d entropy
};

// w. At a strength or phase of 0 it is exactly `scale`, whatever h is.
template <typename A>
PAPO_HD A polarity_weight(const WeightingValues<A>& w, A unit_polarity, A polarity) {
  if (w.shape == WeightShape::kNone) return A(1);
  A h;
  if (w.shape == WeightShape::kTanh) {
    h = tanh_of(polarity / w.sigma);
  } else {
    h = polarity > A(0) ? A(1) : (polarity < A(0) ? A(-1) : A(0));
    // Of a deterministic token c is rounding noise, whose sign means nothing.
    if (abs_of(unit_polarity) <= w.dead_zone) h = A(0);
  }
  const A swing = w.strength * w.phase;
  return swing == A(0) ? w.scale : w.scale * (A(1) + swing * h);
}

template <typename A>
PAPO_HD TokenOut<A> policy_token(A logp, A entropy, A unit_polarity, const TokenIn<A>& in,
                                 const Objective& objective, const WeightingValues<A>& w) {
  TokenOut<A> out;
  if (entropy != entropy) {  // the row has no distribution
    const A nan = quiet_nan<A>();
    out = {nan, nan, nan, nan, false, nan, nan};
    return out;
  }
  const A ratio = in.has_old ? exp_of(logp - in.old_logp) : A(1);
  out.ratio = ratio;
  out.polarity = ratio * in.advantage * unit_polarity;
  out.weight = polarity_weight(w, unit_polarity, out.polarity);
  const A adv = out.weight * in.advantage;

  const A low = A(1) - static_cast<A>(objective.clip_low);
  const A high = A(1) + static_cast<A>(objective.clip_high);
  const A clamped = ratio < low ? low : (ratio > high ? high : ratio);
  const A plain = ratio * adv;
  const A bounded = clamped * adv;
  // On a tie min() takes the unclipped branch. Both have the same gradient there.
  out.clipped = bounded < plain;
  A loss = out.clipped ? -bounded : -plain;
  if (objective.dual_clip > 0.0 && adv < A(0)) {
    const A cap = -static_cast<A>(objective.dual_clip) * adv;
    if (cap < loss) {
      loss = cap;
      out.clipped = true;
    }
  }
  A dlogp = out.clipped ? A(0) : -plain;  // d(-r A')/dlogp = -r A', since dr/dlogp = r

  if (objective.kl_coef != 0.0 && in.has_ref) {
    const A kl_coef = static_cast<A>(objective.kl_coef);
    const A gap = in.ref_logp - logp;
    // expm1 keeps the digits of the k3 estimate where the policies are close.
    const A growth = expm1_of(gap);
    loss += kl_coef * (growth == infinity<A>() ? growth : growth - gap);
    dlogp -= kl_coef * growth;
  }
  loss -= static_cast<A>(objective.entropy_coef) * entropy;
  out.loss = in.token_weight * loss;
  out.dlogp = in.token_weight * dlogp;
  out.dentropy = -in.token_weight * static_cast<A>(objective.entropy_coef);
  return out;
}

// The statistics are rounded to A first, as an earlier call rounded old_logp: its ratio to the same
// logp is then exactly 1.
template <typename A>
PAPO_HD TokenOut<A> policy_token(const RowStats<double>& stats, const TokenIn<A>& in,
                                 const Objective& objective, const WeightingValues<A>& w) {
  return policy_token(static_cast<A>(stats.logp), static_cast<A>(stats.entropy),
                      static_cast<A>(stats.unit_polarity), in, objective, w);
}

}  // namespace papo
