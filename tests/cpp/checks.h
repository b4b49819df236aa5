// What the tests of the headers share: checks that count failures, and random numbers.
#pragma once

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>

namespace {

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

// The exit status of a test.
int report() {
  if (failures == 0) std::printf("passed\n");
  return failures == 0 ? 0 : 1;
}

}  // namespace
