// The shared headers on their own: merging row states in random trees, gradients against finite
// differences, every branch of the policy loss. Prints what failed; exit status 1 if anything did.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "papo/launch.h"
#include "papo/policy_loss.h"
#include "papo/row_grad.h"
#include "papo/row_state.h"

namespace {

using papo::RowState;
using Row = std::vector<double>;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

int failures = 0;
std::mt19937 rng(20240517);

void check(bool ok, const char* what, double got = 0, double expected = 0) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s: got %.17g, expected %.17g\n", what, got, expected);
}

bool is_close(double a, double b, double relative, double absolute) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::fabs(a - b) <= absolute + relative * std::fabs(b);
}

void check_close(double got, double expected, double relative, double absolute, const char* what) {
  check(is_close(got, expected, relative, absolute), what, got, expected);
}

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(rng);
}
int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(rng); }

// ---- the definitions, in long double ------------------------------------------------------------

struct Exact {
  long double logp, entropy, unit_polarity, lse;
};

Exact exact_stats(const Row& u, int target) {
  long double max = -kInf;
  for (double x : u) max = std::max<long double>(max, x);
  long double Z = 0;
  for (double x : u) Z += expl(x - max);
  const long double lse = max + logl(Z);
  const auto log_p = [&](double x) { return static_cast<long double>(x) - lse; };
  long double H = 0, state_term = 0;
  for (double x : u) {
    if (x != -kInf) H -= expl(log_p(x)) * log_p(x);
  }
  for (double x : u) {
    if (x != -kInf) state_term += expl(2 * log_p(x)) * (log_p(x) + H);
  }
  const long double l_a = log_p(u[target]);
  const long double sampled = u[target] == -kInf ? 0 : -expl(l_a) * (l_a + H);
  return {l_a, H, state_term + sampled, lse};
}

Row random_row(int n, int kind) {
  Row u(n);
  for (double& x : u) x = uniform(-6, 6);
  if (kind == 1) u[below(n)] += 30;                     // peaked
  if (kind == 2) for (double& x : u) x -= 120;          // all far below zero
  if (kind == 3) for (double& x : u) x += 1e4;          // a common offset
  if (kind == 4) for (double& x : u) x = 0.25;          // uniform
  if (kind == 5) for (int i = 0; i < n / 2; ++i) u[i] = -kInf;
  if (kind == 6) for (double& x : u) x = uniform(-1, 1) * 1e4;
  if (kind == 7 && n > 1) {                             // all but one masked
    const double kept = u[0];
    std::fill(u.begin(), u.end(), -kInf);
    u[below(n)] = kept;
  }
  return u;
}
constexpr int kKinds = 8;

// ---- row_state.h --------------------------------------------------------------------------------

template <typename A>
RowState<A> one_pass(const Row& u, int begin, int end) {
  RowState<A> state = RowState<A>::empty();
  for (int i = begin; i < end; ++i) state.update(static_cast<A>(u[i]));
  return state;
}

// A random binary tree over [begin, end), with empty leaves now and then.
template <typename A>
RowState<A> random_tree(const Row& u, int begin, int end) {
  if (end - begin <= 1 || below(6) == 0) return one_pass<A>(u, begin, end);
  const int cut = begin + below(end - begin + 1);
  RowState<A> left = random_tree<A>(u, begin, cut);
  const RowState<A> right = random_tree<A>(u, cut, end);
  if (below(2) == 0) {
    left.merge(right);
    return left;
  }
  RowState<A> swapped = right;
  swapped.merge(left);
  return swapped;
}

template <typename A>
void test_merge(double tolerance) {
  for (int trial = 0; trial < 4000; ++trial) {
    const int n = 1 + below(40);
    Row u = random_row(n, trial % kKinds);
    for (double& x : u) x = static_cast<A>(x);
    const int target = below(n);
    const Exact exact = exact_stats(u, target);
    for (const RowState<A>& state : {one_pass<A>(u, 0, n), random_tree<A>(u, 0, n)}) {
      const auto stats = papo::finish(state, static_cast<A>(u[target]));
      const double room = tolerance * (1 + std::fabs(static_cast<double>(exact.logp)));
      check_close(stats.logp, exact.logp, tolerance, tolerance, "logp");
      check_close(stats.entropy, exact.entropy, tolerance, tolerance, "entropy");
      check_close(stats.unit_polarity, exact.unit_polarity, tolerance, tolerance, "polarity");
      check_close(stats.lse, exact.lse, tolerance, room, "lse");
    }
  }
}

void test_empty_parts() {
  const RowState<double> empty = RowState<double>::empty();
  RowState<double> masked = empty;
  masked.update(-kInf);
  check(masked.max == -kInf && masked.Z == 0 && masked.T == 0, "a masked token adds nothing");
  RowState<double> both = empty;
  both.merge(masked);
  check(both.has_no_distribution() && !both.is_bad(), "two empty parts");
  check(std::isnan(papo::finish(both, -kInf).entropy), "no finite logit: NaN");
  const RowState<double> full = one_pass<double>({1.0, 2.0, -3.0}, 0, 3);
  for (RowState<double> side : {full, empty}) {
    side.merge(side.Z == 0 ? full : empty);
    check(side.max == full.max && side.Z == full.Z && side.T == full.T && side.Z2 == full.Z2 &&
              side.T2 == full.T2,
          "an empty part is the identity, on either side");
  }
}

void test_bad_parts() {
  for (double poison : {kNan, kInf}) {
    for (int position = 0; position < 5; ++position) {
      Row u = random_row(5, 0);
      u[position] = poison;
      for (int trial = 0; trial < 20; ++trial) {
        const RowState<double> state = random_tree<double>(u, 0, 5);
        const auto stats = papo::finish(state, u[0]);
        check(std::isnan(stats.logp) && std::isnan(stats.entropy) &&
                  std::isnan(stats.unit_polarity) && std::isnan(stats.lse),
              "NaN and +inf reach every statistic");
      }
    }
  }
}

// ---- row_grad.h ---------------------------------------------------------------------------------

double scaled_logit(double z, const papo::RowParams& row) {
  const double capped = row.softcap > 0 ? row.softcap * std::tanh(z / row.softcap) : z;
  return (z == -kInf ? z : capped) / row.temperature;
}

// The gradient of g.logp logp + g.entropy H + g.unit_polarity c + g.lse lse in z, u = softcap(z) / temperature.
Row row_gradient(const Row& z, int target, const papo::Upstream<double>& g,
                 const papo::RowParams& row) {
  Row u(z.size());
  for (size_t i = 0; i < z.size(); ++i) u[i] = scaled_logit(z[i], row);
  const auto state = one_pass<double>(u, 0, static_cast<int>(u.size()));
  const auto grad = papo::make_row_grad(state, papo::finish(state, u[target]), g);
  Row dz(z.size(), 0.0);
  for (size_t i = 0; i < z.size(); ++i) {
    if (u[i] == -kInf) continue;
    const double d = u[i] - state.max;
    const bool sampled = static_cast<int>(i) == target;
    const double du = sampled ? grad.target : grad.element(d, std::exp(d));
    dz[i] = papo::chain_rule<double>(du, u[i] * row.temperature, row);
  }
  return dz;
}

double objective(const Row& z, int target, const papo::Upstream<double>& g,
                 const papo::RowParams& row) {
  Row u(z.size());
  for (size_t i = 0; i < z.size(); ++i) u[i] = scaled_logit(z[i], row);
  const Exact s = exact_stats(u, target);
  const long double total =
      g.entropy * s.entropy + g.unit_polarity * s.unit_polarity + g.lse * s.lse;
  return static_cast<double>(u[target] == -kInf ? total : total + g.logp * s.logp);
}

void test_gradient() {
  for (int trial = 0; trial < 600; ++trial) {
    const int n = 2 + below(12);
    Row z = random_row(n, std::vector<int>{0, 1, 2, 4, 5}[trial % 5]);
    const double cap = trial % 3 == 0 ? 8.0 : 0.0;
    const papo::RowParams row{uniform(0.4, 2.0), cap, n};
    int target = below(n);
    while (z[target] == -kInf) target = below(n);
    const papo::Upstream<double> g{uniform(-2, 2), uniform(-2, 2), uniform(-2, 2),
                                     uniform(-2, 2)};
    const Row dz = row_gradient(z, target, g, row);
    for (int i = 0; i < n; ++i) {
      if (z[i] == -kInf) {
        check(dz[i] == 0, "a masked token has no gradient", dz[i]);
        continue;
      }
      const double step = 1e-5;
      Row up = z, down = z;
      up[i] += step;
      down[i] -= step;
      const double slope =
          (objective(up, target, g, row) - objective(down, target, g, row)) / (2 * step);
      check_close(dz[i], slope, 1e-5, 1e-8, "gradient by finite differences");
    }
  }
}

// 1 - p_a must not be formed by rounding p_a.
void test_certain_token() {
  for (double q : {1e-3, 1e-6, 1e-9, 1e-14}) {
    const int n = 5;
    Row z(n, 0.0);
    z[2] = std::log((1 - q) / q * (n - 1));
    const Row dz = row_gradient(z, 2, {1, 0, 0, 0}, {1, 0, n});
    check_close(dz[2], q, 1e-2, 0, "dlogp of a nearly certain token");
    const Row none = row_gradient({0.0, 1e4, 0.0}, 1, {1, 1, 1, 0}, {1, 0, 3});
    check(none[0] == 0 && none[1] == 0 && none[2] == 0, "a one-hot row has no gradient");
  }
  const double q = std::ldexp(1.0, -40);
  const RowState<double> state{0, 1 + q, 0, 1, 0};
  check_close(papo::finish(state, 0.0).one_minus_p_a, q / (1 + q), 1e-14, 0, "1 - p_a");
  const Row masked = row_gradient({0.5, -kInf, 1.0}, 1, {1, 1, 1, 0}, {1, 0, 3});
  check(masked[0] == 0 && masked[2] == 0, "a masked sampled token: no gradient in its row");
}

// ---- policy_loss.h ------------------------------------------------------------------------------

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
  expect_token(token(1.1, 2, o, 0.1), -2.2 * 2.1, -2.2 * 2.1, ClipSide::kInside, "weighted, inside");
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
  test_merge<double>(1e-11);
  test_merge<float>(4e-6);
  test_empty_parts();
  test_bad_parts();
  test_gradient();
  test_certain_token();
  test_clipping();
  test_bounds();
  test_slopes();
  test_extra_terms();
  test_overflow<double>(800.0);
  test_overflow<float>(92.9f);
  test_weighting();
  test_bad_token();
  if (failures == 0) std::printf("passed\n");
  return failures == 0 ? 0 : 1;
}
