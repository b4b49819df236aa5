// Host/device marker and the few scalar functions that the shared headers need.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define PAPO_HD __host__ __device__ __forceinline__
#else
// Always inlined, as these headers are also compiled for newer instruction sets: from an
// out-of-line copy made there the linker could serve code that has to run on an older machine.
#define PAPO_HD inline __attribute__((always_inline))
#endif

namespace papo {

PAPO_HD float exp_of(float x) { return ::expf(x); }
PAPO_HD double exp_of(double x) { return ::exp(x); }
PAPO_HD float log_of(float x) { return ::logf(x); }
PAPO_HD double log_of(double x) { return ::log(x); }
PAPO_HD float tanh_of(float x) { return ::tanhf(x); }
PAPO_HD double tanh_of(double x) { return ::tanh(x); }
PAPO_HD float abs_of(float x) { return ::fabsf(x); }
PAPO_HD double abs_of(double x) { return ::fabs(x); }
PAPO_HD float expm1_of(float x) { return ::expm1f(x); }
PAPO_HD double expm1_of(double x) { return ::expm1(x); }

template <typename A>
PAPO_HD A infinity() {
  return static_cast<A>(HUGE_VALF);
}

template <typename A>
PAPO_HD A quiet_nan() {
  return static_cast<A>(NAN);
}

// Of double, in which sums are formed, with room for a sum of such numbers.
PAPO_HD float largest(float) { return 3.4028234663852886e38f; }
PAPO_HD double largest(double) { return 1.7976931348623157e308 / 1024.0; }

// x, but no larger than the largest number of A. In a sum of products an infinite factor would turn
// a 0 into NaN. A NaN stays.
template <typename A, typename X>
PAPO_HD X saturated(X x) {
  const X most = static_cast<X>(largest(A{}));
  return x > most ? most : x < -most ? -most : x;
}

}  // namespace papo
