// The headers of a row on their own: merging row states in random trees, and gradients against
// finite differences. Prints what failed; exit status 1 if anything did.
#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "papo/launch.h"
#include "papo/row_grad.h"
#include "papo/row_state.h"

namespace {

using papo::RowState;
using Row = std::vector<double>;

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

// The gradient of g.logp logp + g.entropy H + g.unit_polarity c + g.lse lse in z, where
// u = softcap(z) / temperature.
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

}  // namespace

int main() {
  test_merge<double>(1e-11);
  test_merge<float>(4e-6);
  test_empty_parts();
  test_bad_parts();
  test_gradient();
  test_certain_token();
  return report();
}
