// RowState::merge and rescaled: any tree over any cut of a row gives the sums of the whole row.
#include "papo/row_state.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using papo::RowState;

namespace {

std::mt19937_64 random_bits(1);

double uniform() { return std::uniform_real_distribution<double>(0.0, 1.0)(random_bits); }

std::vector<double> make_row(size_t n, int kind) {
  std::vector<double> u(n);
  for (size_t i = 0; i < n; ++i) {
    u[i] = 12.0 * (uniform() - 0.5);
    if (kind == 1) u[i] += 1e4;
    if (kind == 2) u[i] = static_cast<double>(i);          // rising: the maximum moves each time
    if (kind == 3) u[i] = -static_cast<double>(40 * i);    // far apart: weights underflow
    if (kind == 4 && uniform() < 0.5) u[i] = -papo::infinity<double>();
    if (kind == 5) u[i] = i == n / 2 ? 3.0 : -papo::infinity<double>();
  }
  return u;
}

long double sum_of(const std::vector<double>& u, double max, int power, bool times_d) {
  long double sum = 0;
  for (const double x : u) {
    if (x == -papo::infinity<double>()) continue;
    const long double d = static_cast<long double>(x) - max;
    sum += expl(power * d) * (times_d ? d : 1.0L);
  }
  return sum;
}

template <typename A>
RowState<A> merge_tree(std::vector<RowState<A>> parts, int shape) {
  while (parts.size() > 1) {
    // 0: left to right; 1: pairs, as lanes merge; 2: at random.
    size_t i = 0;
    if (shape == 1) {
      std::vector<RowState<A>> half;
      for (; i + 1 < parts.size(); i += 2) {
        RowState<A> s = parts[i];
        s.merge(parts[i + 1]);
        half.push_back(s);
      }
      if (i < parts.size()) half.push_back(parts[i]);
      parts = half;
      continue;
    }
    if (shape == 2) i = random_bits() % (parts.size() - 1);
    parts[i].merge(parts[i + 1]);
    parts.erase(parts.begin() + static_cast<long>(i) + 1);
  }
  return parts[0];
}

// As csrc/cuda merges lanes: everything moves to the largest maximum, then plain sums.
template <typename A>
RowState<A> merge_flat(const std::vector<RowState<A>>& parts) {
  A top = -papo::infinity<A>();
  for (const RowState<A>& s : parts) top = s.max > top ? s.max : top;
  RowState<A> sum = {top, 0, 0, 0, 0};
  for (const RowState<A>& s : parts) {
    const RowState<A> r = s.rescaled(top, [](A x) { return papo::exp_of(x); });
    sum = {top, sum.Z + r.Z, sum.T + r.T, sum.Z2 + r.Z2, sum.T2 + r.T2};
  }
  return sum;
}

template <typename A>
void expect(const RowState<A>& s, const std::vector<double>& u, double tolerance,
            const char* what) {
  const double max = static_cast<double>(s.max);
  const long double exact[] = {sum_of(u, max, 1, false), sum_of(u, max, 1, true),
                               sum_of(u, max, 2, false), sum_of(u, max, 2, true)};
  const double got[] = {static_cast<double>(s.Z), static_cast<double>(s.T),
                        static_cast<double>(s.Z2), static_cast<double>(s.T2)};
  for (int k = 0; k < 4; ++k) {
    const double scale = 1.0 + static_cast<double>(fabsl(exact[k]));
    if (!(fabs(got[k] - static_cast<double>(exact[k])) <= tolerance * scale)) {
      std::printf("%s: sum %d is %.17g, expected %.17Lg\n", what, k, got[k], exact[k]);
      std::exit(1);
    }
  }
}

template <typename A>
void check(double tolerance) {
  for (int kind = 0; kind < 6; ++kind) {
    for (const size_t n : {1u, 2u, 17u, 400u}) {
      std::vector<double> u = make_row(n, kind);
      for (double& x : u) x = static_cast<double>(static_cast<A>(x));
      bool masked = true;
      for (const double x : u) masked = masked && x == -papo::infinity<double>();
      if (masked) u[0] = 0.5;
      for (int cut = 0; cut < 20; ++cut) {
        std::vector<RowState<A>> parts;
        for (size_t i = 0; i < n;) {
          RowState<A> s = RowState<A>::empty();
          for (size_t left = random_bits() % 40; left > 0 && i < n; --left) {
            s.update(static_cast<A>(u[i++]));
          }
          parts.push_back(s);  // some of them empty
        }
        for (int shape = 0; shape < 3; ++shape) {
          expect(merge_tree(parts, shape), u, tolerance, "tree");
        }
        expect(merge_flat(parts), u, tolerance, "flat");
      }
    }
  }
  // NaN and +inf in any part reach the result; an empty part is the identity.
  for (const A bad : {papo::quiet_nan<A>(), papo::infinity<A>()}) {
    for (int shape = 0; shape < 3; ++shape) {
      std::vector<RowState<A>> parts(8, RowState<A>::empty());
      for (size_t i = 0; i < 8; i += 2) parts[i].update(static_cast<A>(i));
      parts[3].update(bad);
      if (!merge_tree(parts, shape).is_bad()) {
        std::printf("a bad part is lost\n");
        std::exit(1);
      }
    }
  }
}

}  // namespace

int main() {
  check<double>(1e-12);
  check<float>(2e-4);
  std::printf("ok\n");
  return 0;
}
