// policy_loss.h on its own: every branch of the policy loss, its bounds, and what overflows. Prints
// what failed; exit status 1 if anything did.
#include <cmath>

#include "checks.h"
#include "papo/policy_loss.h"

namespace {

using papo::ClipSide;
using papo::KlEstimator;
using papo::Surrogate;

struct Options {
  papo::Objective objective{Surrogate::kClip, KlEstimator::kK3, false, false, 0.2, 0.2, 0.2, 0.2,
                            kInf, kInf, kInf, kInf, 1.0, 1.05, 0.75, 1.0, 0.0, 0.0};
  papo::WeightingValues<double> weighting{papo::WeightShape::kNone, 0, 0, 0, 1, 1};
};

constexpr double kLogp = -1.5;

// A token of weight 2, and its ratio exactly.
papo::TokenOut<double> token(double ratio, double advantage, const Options& o, double c = 0.1,
                             double ref_gap = 0.0) {
  const papo::TokenIn<double> in{advantage,        2.0, 2.0, 2.0, papo::Past::kLogRatio,
                                 std::log(ratio), true, kLogp + ref_gap};
  return papo::policy_token(kLogp, 0.7, c, in, o.objective, o.weighting);
}

// loss and dlogp carry the token weight 2.
void expect_token(const papo::TokenOut<double>& out, double loss, double dlogp, ClipSide side,
                  const char* what) {
  check_close(out.loss, 2 * loss, 1e-12, 1e-12, what);
  check_close(out.dlogp, 2 * dlogp, 1e-12, 1e-12, what);
  check(out.clip_side == side, what, static_cast<int>(out.clip_side), static_cast<int>(side));
}

void test_clipping() {
  Options o;
  expect_token(token(1.1, 2, o), -2.2, -2.2, ClipSide::kInside, "inside");
  expect_token(token(1.3, 2, o), -2.4, 0, ClipSide::kHigh, "above, rewarded");
  expect_token(token(0.5, 2, o), -1.0, -1.0, ClipSide::kInside, "below, rewarded");
  expect_token(token(0.5, -2, o), 1.6, 0, ClipSide::kLow, "below, punished");
  expect_token(token(1.5, -2, o), 3.0, 3.0, ClipSide::kInside, "above, punished");
  expect_token(token(1.0, 0, o), 0, 0, ClipSide::kInside, "no advantage");
  o.objective.dual_clip = 3;
  expect_token(token(5.0, -2, o), 6.0, 0, ClipSide::kDual, "dual clip");
  expect_token(token(2.0, -2, o), 4.0, 4.0, ClipSide::kInside, "within the dual clip");
  expect_token(token(5.0, 2, o), -2.4, 0, ClipSide::kHigh, "dual clip, rewarded: none");
  o = Options();
  o.objective.clip_high = kInf;
  expect_token(token(9.0, 1, o), -9.0, -9.0, ClipSide::kInside, "no upper bound");
}

// Bounds that the ratio has exactly: on them a token is inside, just beyond them it is not.
void test_bounds() {
  const double log3 = std::log(3.0), r = std::exp(log3);
  for (Surrogate surrogate : {Surrogate::kClip, Surrogate::kCispo, Surrogate::kCeGppo}) {
    for (double sign : {1.0, -1.0}) {
      Options o;
      o.objective.surrogate = surrogate;
      o.objective.clip_high = o.objective.negative_high = r - 1;
      o.objective.clip_low = o.objective.negative_low = 1 - r;
      check(token(3, sign, o).clip_side == ClipSide::kInside, "on both bounds");
      check_close(token(3, sign, o).dlogp, -2 * sign * r, 1e-15, 0, "the slope of inside");
      o.objective.clip_high = o.objective.negative_high = std::nextafter(r - 1, 0.0);
      const bool acts = sign > 0 || surrogate == Surrogate::kCispo;
      check((token(3, sign, o).clip_side == ClipSide::kHigh) == acts, "above");
      o.objective.clip_high = o.objective.negative_high = kInf;
      o.objective.clip_low = o.objective.negative_low = std::nextafter(1 - r, -kInf);
      const bool acts_low = sign < 0 || surrogate == Surrogate::kCispo;
      check((token(3, sign, o).clip_side == ClipSide::kLow) == acts_low, "below");
    }
  }
  Options o;
  o.objective.negative_high = kInf;
  o.objective.dual_clip = r;
  check(token(3, -1, o).clip_side == ClipSide::kInside, "on the dual clip");
  o.objective.dual_clip = std::nextafter(r, 0.0);
  check(token(3, -1, o).clip_side == ClipSide::kDual, "above the dual clip");
  o = Options();
  o.objective.log_ratio_limit = log3;
  check_close(token(3, -1, o).dlogp, 2 * r, 1e-15, 0, "on the limit of log r");
  o.objective.log_ratio_limit = std::nextafter(log3, 0.0);
  check(token(3, -1, o).dlogp == 0, "beyond the limit of log r");
}

// dloss/dlogp of every surrogate and estimate of KL, by finite differences. A surrogate whose
// factor stops the gradient has no such loss.
void test_slopes() {
  for (int trial = 0; trial < 2000; ++trial) {
    Options o;
    papo::Objective& f = o.objective;
    const Surrogate surrogates[] = {Surrogate::kClip, Surrogate::kSapo};
    f.surrogate = surrogates[below(2)];
    f.kl_estimator = static_cast<KlEstimator>(below(4));
    f.kl_ratio = below(2) == 0;
    f.kl_coef = 0.3;
    f.kl_limit = below(3) == 0 ? 0.2 : kInf;
    f.log_ratio_limit = below(3) == 0 ? 0.3 : kInf;
    f.dual_clip = below(2) == 0 ? 1.4 : kInf;
    f.sapo_positive = uniform(0.3, 4);
    papo::TokenIn<double> in{uniform(-2, 2), uniform(0, 2), uniform(0, 2), 1.0,
                             papo::Past::kOldLogp, kLogp + uniform(-0.7, 0.7), true,
                             kLogp + uniform(-1, 1)};
    const auto at = [&](double logp) {
      return papo::policy_token(logp, 0.7, 0.1, in, f, o.weighting);
    };
    const double step = 1e-6;
    const auto up = at(kLogp + step), here = at(kLogp), down = at(kLogp - step);
    const double right = (up.loss - here.loss) / step, left = (here.loss - down.loss) / step;
    if (std::fabs(right - left) > 1e-3) continue;  // a jump of the slope lies between
    check_close(here.dlogp, (up.loss - down.loss) / (2 * step), 1e-5, 1e-7, "dloss/dlogp");
  }
}

void test_extra_terms() {
  Options o;
  o.objective.kl_coef = 0.5;
  for (double gap : {-20.0, -0.3, -1e-5, 0.0, 1e-5, 0.3, 20.0}) {
    const auto out = token(1.0, 0, o, 0.1, gap);
    check_close(out.loss, 2 * 0.5 * (std::expm1(gap) - gap), 1e-9, 1e-14, "k3");
    check_close(out.dlogp, -2 * 0.5 * std::expm1(gap), 1e-9, 1e-14, "dk3/dlogp");
  }
  for (double gap : {kInf, -kInf}) {
    check(token(1.0, 0, o, 0.1, gap).loss == kInf, "an infinite gap is an infinite loss");
  }
  o = Options();
  o.objective.entropy_coef = 0.25;
  const auto out = token(1.0, 0, o);
  check_close(out.loss, -2 * 0.25 * 0.7, 1e-12, 0, "entropy bonus");
  check_close(out.dentropy, -2 * 0.25, 1e-12, 0, "dloss/dentropy");
}

// A product is 0 where a factor is, and finite where it is, whatever its other factors are.
template <typename C>
void test_overflow(C gap) {
  const Options o;
  const papo::WeightingValues<C> none{papo::WeightShape::kNone, 0, 0, 0, 1, 1};
  const auto run = [&](papo::Objective objective, C advantage, C weight, C logp, C old, C ref) {
    const papo::TokenIn<C> in{advantage, weight, weight, weight, papo::Past::kOldLogp,
                              old,       true,   ref};
    return papo::policy_token<C>(logp, C(0.7), C(0.1), in, objective, none);
  };
  const C far = std::exp(gap / 2), small = C(1) / far;
  check(std::isinf(std::exp(gap)) && !std::isinf(far), "the gap overflows");
  for (int surrogate = 0; surrogate < 6; ++surrogate) {
    papo::Objective f = o.objective;
    f.surrogate = static_cast<Surrogate>(surrogate);
    const auto zero = run(f, C(0), C(1), C(-1), C(-1) - gap, C(-1));
    check(zero.loss == 0 && zero.dlogp == 0 && zero.polarity == 0, "advantage 0", surrogate);
    check(std::isinf(zero.ratio), "the ratio is reported");
    const auto tiny = run(f, C(-1), small, C(-1), C(-1) - gap, C(-1));
    check(std::isfinite(tiny.loss) && std::isfinite(tiny.dlogp), "weight", surrogate);
    if (f.surrogate == Surrogate::kClip) check_close(tiny.loss, far, 1e-4, 0, "a small weight");
  }
  papo::Objective f = o.objective;
  f.kl_coef = 1;
  check_close(run(f, C(0), small, C(-1), C(-1), C(-1) + gap).loss, far, 1e-4, 0, "k3");
  f.kl_ratio = true;
  check_close(run(f, C(0), C(1), C(-1) - gap, C(-1), C(-1)).loss, 1, 1e-4, 0, "r k3");
  check(run(f, C(0), C(1), C(-kInf), C(-1), C(-1)).loss == 0, "r = 0");
}

void test_weighting() {
  Options o;
  o.weighting = {papo::WeightShape::kSign, 0.5, 1e-6, 0.8, 1.0, 1.5};
  check_close(token(1.1, 2, o, 0.1).weight, 1.5 * 1.4, 1e-12, 0, "sign, expanding");
  check_close(token(1.1, -2, o, 0.1).weight, 1.5 * 0.6, 1e-12, 0, "sign, contracting");
  check_close(token(1.1, -2, o, -0.1).weight, 1.5 * 1.4, 1e-12, 0, "sign, both negative");
  check(token(1.1, 2, o, 1e-6).weight == 1.5, "the dead zone includes its edge");
  check(token(1.1, 0, o, 0.1).weight == 1.5, "no advantage, no polarity");
  check_close(token(1.1, 2, o, 0.1).polarity, 1.1 * 2 * 0.1, 1e-12, 0, "polarity");
  // Clipping is decided without the weight, which scales value and slope alike.
  const double inside = -2.2 * 2.1;
  expect_token(token(1.1, 2, o, 0.1), inside, inside, ClipSide::kInside, "weighted, inside");
  expect_token(token(1.3, 2, o, 0.1), -2.4 * 2.1, 0, ClipSide::kHigh, "weighted, clipped");
  o.weighting.shape = papo::WeightShape::kTanh;
  o.weighting.sigma = 0.1;
  const double h = std::tanh(1.1 * 2 * 0.1 / 0.1);
  check_close(token(1.1, 2, o, 0.1).weight, 1.5 * (1 + 0.4 * h), 1e-12, 0, "tanh");
  for (double phase : {0.0, 0.8}) {
    o.weighting.phase = phase;
    o.weighting.strength = phase == 0.0 ? 0.5 : 0.0;
    check(token(1.1, 2, o, kNan).weight == 1.5, "strength or phase 0: exactly the scale");
  }
}

void test_bad_token() {
  const Options o;
  papo::TokenIn<double> in{1.0, 1.0, 1.0, 1.0, papo::Past::kOnPolicy, 0.0, false, 0.0};
  const auto out = papo::policy_token(kNan, kNan, kNan, in, o.objective, o.weighting);
  check(std::isnan(out.loss) && std::isnan(out.ratio) && std::isnan(out.weight) &&
            out.clip_side == ClipSide::kInside,
        "a bad row is NaN throughout");
  const auto on_policy = papo::policy_token(-3.0, 0.5, 0.1, in, o.objective, o.weighting);
  check(on_policy.ratio == 1.0 && on_policy.dlogp == -1.0, "on-policy: 1, with gradient");
  const auto masked = papo::policy_token(-kInf, 0.5, 0.1, in, o.objective, o.weighting);
  check(masked.ratio == 1.0 && masked.loss == -1.0, "on-policy, masked token");
  in.past = papo::Past::kOldLogp;
  in.old = -kInf;
  in.advantage = 0.0;
  check(std::isnan(papo::policy_token(-kInf, 0.5, 0.1, in, o.objective, o.weighting).loss),
        "masked now and then: NaN");
}

}  // namespace

int main() {
  test_clipping();
  test_bounds();
  test_slopes();
  test_extra_terms();
  test_overflow<double>(800.0);
  test_overflow<float>(92.9f);
  test_weighting();
  test_bad_token();
  return report();
}
