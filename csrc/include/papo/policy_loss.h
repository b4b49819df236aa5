// One token of the policy loss: its value, and its derivative with respect to logp and entropy.
//
//   r  = exp(logp - old_logp), or 1 on-policy        polarity = r A c
//   w  = scale (1 + strength phase h(polarity/sigma))    A' = w A
//   L  = the surrogate of r and A' + kl_coef KL - entropy_coef H, each term by its weight
// papo_kernels/objective.py has the surrogates and the estimates of KL. No gradient flows through
// w. The row's gradient is that of row_grad.h, with {dlogp, dentropy, 0, 0} upstream.
//
// Where a factor overflows, a product is still right: 0 if another factor is 0, and finite if the
// product is. C is the type of the arithmetic, A that of the statistics and the inputs.
#pragma once

#include "papo/params.h"
#include "papo/platform.h"
#include "papo/row_state.h"

namespace papo {

// What the ratio is taken from.
enum class Past : int { kOnPolicy, kOldLogp, kLogRatio };

// One token's inputs.
template <typename C>
struct TokenIn {
  C advantage;
  C token_weight, kl_weight, entropy_weight;
  Past past;
  C old;  // old_logp, or the log of the ratio
  bool has_ref;
  C ref_logp;
};

// A Weighting whose scalars have been loaded.
template <typename C>
struct WeightingValues {
  WeightShape shape;
  C strength, dead_zone, phase, sigma, scale;
};

template <typename C>
struct TokenOut {
  C loss;  // the weights applied
  C polarity, weight, ratio;
  ClipSide clip_side;
  C dlogp, dentropy;  // d loss / d logp, d loss / d entropy
};

// ---- products of what may overflow --------------------------------------------------------------

// x y, and 0 where either is, however large the other.
template <typename C>
PAPO_HD C product(C x, C y) {
  return (x == C(0) && y == y) || (y == C(0) && x == x) ? C(0) : x * y;
}

// e^x, kept as a square where it leaves C: a product with a small number may not.
template <typename C>
struct Exponential {
  C root, square;  // square is root or 1

  static PAPO_HD Exponential of(C x) {
    const bool is_far = x > (sizeof(C) == 4 ? C(88) : C(709));
    const C root = exp_of(is_far ? x / C(2) : x);
    return {root, is_far ? root : C(1)};
  }

  PAPO_HD C value() const { return root * square; }
  PAPO_HD C times(C x) const { return product(product(x, root), square); }
};

// ---- the weight ---------------------------------------------------------------------------------

// w. At a strength or phase of 0 it is exactly `scale`, whatever h is.
template <typename C>
PAPO_HD C polarity_weight(const WeightingValues<C>& w, C unit_polarity, C polarity) {
  if (w.shape == WeightShape::kNone) return C(1);
  C h;
  if (w.shape == WeightShape::kTanh) {
    h = tanh_of(polarity / w.sigma);
  } else {
    h = polarity > C(0) ? C(1) : (polarity < C(0) ? C(-1) : C(0));
    // Of a deterministic token c is rounding noise, whose sign means nothing.
    if (abs_of(unit_polarity) <= w.dead_zone) h = C(0);
  }
  const C swing = w.strength * w.phase;
  return swing == C(0) ? w.scale : w.scale * (C(1) + swing * h);
}

// ---- the terms ----------------------------------------------------------------------------------

// A term of the loss with its derivatives: by logp where the ratio is held, and by the log of the
// ratio.
template <typename C>
struct Term {
  C value, dlogp, dlog_ratio;
};

// The ratio of a token. Its log is clamped, and does not move the loss where the clamp acts.
template <typename C>
struct Ratio {
  C log;
  Exponential<C> exp;
  C value;
  C old_logp;
  bool moves;

  static PAPO_HD Ratio of(const TokenIn<C>& in, C logp, const Objective& objective) {
    const C log = in.past == Past::kLogRatio ? in.old
                  : in.past == Past::kOldLogp ? logp - in.old
                                              : C(0);
    const C limit = static_cast<C>(objective.log_ratio_limit);
    Ratio r;
    r.log = log > limit ? limit : log < -limit ? -limit : log;
    r.exp = Exponential<C>::of(r.log);
    r.value = r.exp.value();
    r.old_logp = in.past == Past::kOldLogp ? in.old : logp - log;
    r.moves = !(abs_of(log) > limit);
    return r;
  }
};

// 0 where x is negative, as 1 - p is by rounding.
template <typename C>
PAPO_HD C positive_part(C x) {
  return x < C(0) ? C(0) : x;
}

// DPPO's divergence of the token, negative where the token has become less likely.
template <typename C>
PAPO_HD C dppo_divergence(Surrogate surrogate, C logp, C old_logp) {
  const C p = exp_of(logp), old = exp_of(old_logp);
  if (surrogate == Surrogate::kDppoTv) return p - old;
  const C eps = C(1e-8);  // keeps the logarithms finite, as in verl
  const C rest = positive_part(-expm1_of(logp));
  const C old_rest = positive_part(-expm1_of(old_logp));
  const C kl =
      product(old, old_logp - logp) + old_rest * log_of((old_rest + eps) / (rest + eps));
  return p > old ? kl : p < old ? -kl : C(0);
}

// Of a ratio. Only negative advantages are clipped from below, and only positive ones from above.
template <typename C>
PAPO_HD C lower_bound(const Objective& o) {
  return C(1) - static_cast<C>(o.negative_low);
}
template <typename C>
PAPO_HD C upper_bound(const Objective& o) {
  return C(1) + static_cast<C>(o.clip_high);
}

// PPO's clip, with the dual clip. `adv` is A', and `weighted` the same times the token's weight.
template <typename C>
PAPO_HD Term<C> clip_term(const Objective& o, C adv, C weighted, const Ratio<C>& r,
                          ClipSide* side) {
  const C low = lower_bound<C>(o), high = upper_bound<C>(o), dual = static_cast<C>(o.dual_clip);
  const bool positive = adv > C(0), negative = adv < C(0);
  *side = ClipSide::kInside;
  if (negative && r.value < low) *side = ClipSide::kLow;
  if (positive && r.value > high) *side = ClipSide::kHigh;
  if (negative && r.value > dual) *side = ClipSide::kDual;
  if (*side == ClipSide::kInside) {
    const C plain = r.exp.times(weighted);
    return {-plain, C(0), -plain};  // d(-r A')/dlog r = -r A'
  }
  const C bound = *side == ClipSide::kLow ? low : *side == ClipSide::kHigh ? high : dual;
  return {-bound * weighted, C(0), C(0)};
}

// The surrogate of one token; the clip, which most runs have, takes no jump.
template <typename C>
PAPO_HD Term<C> surrogate_term(const Objective& o, C adv, C weighted, const Ratio<C>& r, C logp,
                               ClipSide* side) {
  if (o.surrogate == Surrogate::kClip) return clip_term(o, adv, weighted, r, side);
  const bool positive = adv > C(0), negative = adv < C(0);
  *side = ClipSide::kInside;
  switch (o.surrogate) {
    case Surrogate::kSapo: {
      const C t = static_cast<C>(positive ? o.sapo_positive : o.sapo_other);
      const C x = t * (r.value - C(1));
      const C gate = C(1) / (C(1) + exp_of(-x)), rest = C(1) / (C(1) + exp_of(x));
      return {C(-4) * gate * weighted / t, C(0), -r.exp.times(C(4) * gate * rest * weighted)};
    }
    case Surrogate::kCispo: {
      const C low = C(1) - static_cast<C>(positive ? o.clip_low : o.negative_low);
      const C high = C(1) + static_cast<C>(positive ? o.clip_high : o.negative_high);
      if (r.value < low) *side = ClipSide::kLow;
      if (r.value > high) *side = ClipSide::kHigh;
      const C kept = *side == ClipSide::kLow    ? low * weighted
                     : *side == ClipSide::kHigh ? high * weighted
                                                : r.exp.times(weighted);
      return {-product(kept, logp), -kept, C(0)};
    }
    case Surrogate::kCeGppo: {
      const C low = lower_bound<C>(o), high = upper_bound<C>(o);
      if (negative && r.value < low) *side = ClipSide::kLow;
      if (positive && r.value > high) *side = ClipSide::kHigh;
      const C kept = *side == ClipSide::kLow    ? static_cast<C>(o.gppo_low) * low * weighted
                     : *side == ClipSide::kHigh ? static_cast<C>(o.gppo_high) * high * weighted
                                                : r.exp.times(weighted);
      return {-kept, C(0), -kept};
    }
    default: {  // DPPO, whose bounds are of a divergence
      const C divergence = dppo_divergence(o.surrogate, logp, r.old_logp);
      if (positive && divergence > static_cast<C>(o.clip_high)) *side = ClipSide::kHigh;
      if (!positive && divergence < -static_cast<C>(o.negative_low)) *side = ClipSide::kLow;
      if (*side != ClipSide::kInside) return {C(0), C(0), C(0)};
      const C cap = static_cast<C>(o.ratio_cap);
      const C kept = r.value > cap ? weighted * cap : r.exp.times(weighted);
      return {-product(kept, logp), -kept, C(0)};
    }
  }
}

// `scale` is the coefficient times the token's weight.
template <typename C>
PAPO_HD Term<C> kl_term(const Objective& o, C logp, C ref_logp, C scale, const Ratio<C>& r) {
  const C x = logp - ref_logp, limit = static_cast<C>(o.kl_limit);
  C value = x, slope = C(1), growth = C(0);
  if (o.kl_estimator == KlEstimator::kK2) {
    value = C(0.5) * x * x;
    slope = x;
  } else if (o.kl_estimator == KlEstimator::kAbs) {
    value = abs_of(x);
    slope = x > C(0) ? C(1) : x < C(0) ? C(-1) : C(0);
  } else if (o.kl_estimator == KlEstimator::kK3) {
    growth = expm1_of(-x);  // keeps the digits where the policies are close
    value = growth == infinity<C>() ? growth : growth + x;
    slope = -growth;
  }
  const bool is_beyond = abs_of(value) > limit;
  if (is_beyond) {
    value = value > C(0) ? limit : -limit;
    slope = C(0);
  }
  if (o.kl_slope_of_k2) slope = x;
  const auto weighted = [&](C y) {
    return o.kl_ratio ? r.exp.times(product(scale, y)) : product(scale, y);
  };
  Term<C> term = {weighted(value), weighted(slope), C(0)};
  // From here on nothing of k3 but e^-x counts.
  constexpr C kFar = sizeof(C) == 4 ? C(40) : C(700);
  if (growth > C(0) && !is_beyond && (growth == infinity<C>() || (o.kl_ratio && -x > kFar))) {
    // e^-x, or its product with the weight, may leave C. The weight, or the ratio, which is
    // infinitely small for a masked token, may bring it back.
    C exponent = -x;
    if (o.kl_ratio) exponent = r.log == -infinity<C>() ? r.log : exponent + r.log;
    term.value = Exponential<C>::of(exponent).times(scale);
    if (!o.kl_slope_of_k2) term.dlogp = -term.value;
  }
  if (o.kl_ratio) term.dlog_ratio = term.value;
  return term;
}

// ---- the token ----------------------------------------------------------------------------------

template <typename C>
PAPO_HD TokenOut<C> policy_token(C logp, C entropy, C unit_polarity, const TokenIn<C>& in,
                                 const Objective& objective, const WeightingValues<C>& w) {
  TokenOut<C> out;
  if (entropy != entropy) {  // the row has no distribution
    const C nan = quiet_nan<C>();
    out = {nan, nan, nan, nan, ClipSide::kInside, nan, nan};
    return out;
  }
  const Ratio<C> ratio = Ratio<C>::of(in, logp, objective);
  out.ratio = ratio.value;
  out.polarity = ratio.exp.times(product(in.advantage, unit_polarity));
  out.weight = polarity_weight(w, unit_polarity, out.polarity);
  const C adv = out.weight * in.advantage;
  Term<C> sum =
      surrogate_term(objective, adv, product(in.token_weight, adv), ratio, logp, &out.clip_side);
  if (objective.kl_coef != 0.0 && in.has_ref) {
    const C scale = product(static_cast<C>(objective.kl_coef), in.kl_weight);
    const Term<C> kl = kl_term(objective, logp, in.ref_logp, scale, ratio);
    // Saturated, as infinite slopes of opposite signs would make NaN.
    sum = {sum.value + kl.value, saturated<C>(sum.dlogp) + saturated<C>(kl.dlogp),
           saturated<C>(sum.dlog_ratio) + saturated<C>(kl.dlog_ratio)};
  }
  out.dentropy = product(-static_cast<C>(objective.entropy_coef), in.entropy_weight);
  out.loss = sum.value + product(out.dentropy, entropy);
  out.dlogp =
      saturated<C>(sum.dlogp) + (ratio.moves ? saturated<C>(sum.dlog_ratio) : C(0));
  return out;
}

// The statistics are rounded to A first, as an earlier call rounded old_logp: its ratio to the same
// logp is then exactly 1.
template <typename A, typename C>
PAPO_HD TokenOut<C> policy_token(const RowStats<double>& stats, const TokenIn<C>& in,
                                 const Objective& objective, const WeightingValues<C>& w) {
  return policy_token<C>(static_cast<A>(stats.logp), static_cast<A>(stats.entropy),
                         static_cast<A>(stats.unit_polarity), in, objective, w);
}

}  // namespace papo
