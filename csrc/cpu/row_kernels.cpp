// The inner loops: scan, with its five sums, and grad. Compiled once per instruction set; see
// simd.h. The standard library is not used here: one of its inline functions, compiled for AVX-512,
// could be linked into code that runs on machines without.
#include "row_kernels.h"

#include <type_traits>

#include "exp.h"
#include "scaled_logits.h"
#include "simd.h"

namespace papo {
namespace {

using cpu::kChunk;

// Elements whose maximum is taken before their exponentials. They stay in the L1 cache for both.
constexpr int64_t kBlock = 1024;
static_assert(kChunk % kBlock == 0, "a chunk is a whole number of blocks");

// Fetches the lines of n elements one block ahead, while arithmetic leaves the memory idle. The
// address is an integer, as it may lie beyond the array. A prefetch never faults.
template <typename S>
PAPO_HD void prefetch_next_block(const S* x, int64_t n) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x) + kBlock * sizeof(S);
  for (uintptr_t line = 0; line < static_cast<uintptr_t>(n) * sizeof(S); line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + line));
  }
}

// ---- scan ---------------------------------------------------------------------------------------

// The four sums about the maximum m, in vector lanes.
template <typename V>
struct LaneSums {
  V Z{}, T{}, Z2{}, T2{};

  PAPO_HD void add(V y, V e) {
    const V e2 = e * e;
    Z += e;
    T = fma(e, y, T);
    Z2 += e2;
    T2 = fma(e2, y, T2);
  }

  PAPO_HD void add(const LaneSums& block) {
    Z += block.Z;
    T += block.T;
    Z2 += block.Z2;
    T2 += block.T2;
  }

  // Moves the sums to a maximum that is larger by -shift.
  PAPO_HD void rescale(V shift) {
    const V alpha = exp_of(shift);
    const V alpha2 = alpha * alpha;
    T = alpha * (T + shift * Z);
    Z = alpha * Z;
    T2 = alpha2 * (T2 + shift * Z2);
    Z2 = alpha2 * Z2;
  }
};

// The maxima of the lanes, or the lanes of m0 where those are larger. A NaN may be lost.
template <typename S, typename V>
PAPO_HD V block_max(const S* x, int64_t n, V m0) {
  constexpr int kStep = 2 * lanes<V>();
  V a = m0, b = m0;
  for (int64_t i = 0; i < n; i += kStep) {
    V x0, x1;
    load_pair(x + i, x0, x1);
    a = max_keep_nan(x0, a);
    b = max_keep_nan(x1, b);
  }
  return max_keep_nan(a, b);
}

// Positive bfloat16 numbers have the order of their bits. As int16, a block with a positive logit
// takes one instruction per vector. A positive NaN wins too, and is not greater than 0.
PAPO_HD F32 block_max(const BFloat16* x, int64_t n, F32 m0) {
  constexpr int kStep = 2 * lanes<F32>();
  I16 best = load_raw<I16>(x);
  for (int64_t i = kStep; i < n; i += kStep) best = max_of(best, load_raw<I16>(x + i));
  BFloat16 top[kStep];
  store_raw(top, best);
  F32 a, b;
  load_pair(top, a, b);
  const F32 positive = max_keep_nan(a, b);
  return any_greater(positive, F32{}) ? positive : block_max<BFloat16>(x, n, m0);
}

template <typename V, typename S>
PAPO_HD bool has_nan(const S* x, int64_t n) {
  constexpr int kStep = 2 * lanes<V>();
  bool any = false;
  for (int64_t i = 0; i < n; i += kStep) {
    V x0, x1;
    load_pair(x + i, x0, x1);
    for (int k = 0; k < lanes<V>(); ++k) any |= (x0[k] != x0[k]) | (x1[k] != x1[k]);
  }
  return any;
}

template <typename S, template <typename> class Prep>
struct Scanner {
  using V = typename Acc<S>::Vec;
  using Scalar = typename Acc<S>::Scalar;
  static constexpr int kStep = 2 * lanes<V>();

  Prep<V> prep;
  Scalar raw_max = -infinity<Scalar>();
  V raw_max_v, m;
  LaneSums<V> sums;
  bool bad = false;

  explicit Scanner(const RowParams& row)
      : prep(row), raw_max_v(splat(raw_max, V{})), m(splat(raw_max, V{})) {}

  // n: a multiple of kStep, at most kBlock.
  PAPO_HD void block(const S* x, int64_t n) {
    const V top = block_max(x, n, raw_max_v);
    if (any_greater(top, raw_max_v)) {
      const Scalar new_max = max_lanes(top);
      const V new_m = prep(splat(new_max, V{}));
      if (raw_max != -infinity<Scalar>()) sums.rescale(m - new_m);
      raw_max = new_max;
      raw_max_v = splat(new_max, V{});
      m = new_m;
    }
    if (raw_max == infinity<Scalar>()) {
      bad = true;
    } else if (raw_max == -infinity<Scalar>()) {
      bad |= has_nan<V>(x, n);
    } else {
      accumulate(x, n);
    }
  }

  PAPO_HD void accumulate(const S* x, int64_t n) {
    // Each block has sums of its own. Added to the row's one by one, its many small terms would be
    // lost in the rounding of a large sum.
    LaneSums<V> s;
    for (int64_t i = 0; i < n; i += kStep) {
      prefetch_next_block(x + i, kStep);
      V x0, x1;
      load_pair(x + i, x0, x1);
      V y0 = prep(x0) - m;
      V y1 = prep(x1) - m;
      const V e0 = exp_of(y0);
      const V e1 = exp_of(y1);
      s.add(y0, e0);
      s.add(y1, e1);
    }
    sums.add(s);
  }

  PAPO_HD RowState<double> result() const {
    if (bad) return RowState<double>::bad();
    if (raw_max == -infinity<Scalar>()) return RowState<double>::empty();
    return {static_cast<double>(m[0]), sum_lanes(sums.Z), sum_lanes(sums.T), sum_lanes(sums.Z2),
            sum_lanes(sums.T2)};
  }
};

template <typename S, template <typename> class Prep>
void scan_as(const S* x, int64_t n, const RowParams& row, RowState<double>* state) {
  Scanner<S, Prep> scanner(row);
  constexpr int kStep = Scanner<S, Prep>::kStep;
  const int64_t whole = n - n % kStep;
  for (int64_t i = 0; i < whole; i += kBlock) {
    scanner.block(x + i, whole - i < kBlock ? whole - i : kBlock);
  }
  if (whole < n) {
    S tail[kStep];
    for (int k = 0; k < kStep; ++k) set_masked(tail + k);
    memcpy(tail, x + whole, static_cast<size_t>(n - whole) * sizeof(S));
    scanner.block(tail, kStep);
  }
  *state = scanner.result();
}

// ---- gradient ---------------------------------------------------------------------------------

// kLogpOnly: a1 = b0 = b1 = 0, as for the usual policy loss. The gradient is a multiple of p.
template <typename S, template <typename> class Prep, bool kLogpOnly>
struct GradWriter {
  using V = typename Acc<S>::Vec;
  using Scalar = typename Acc<S>::Scalar;
  static constexpr int kStep = 2 * lanes<V>();
  // Only where nothing is subtracted: in e a - e^2 b the error of e may exceed what is left.
  static constexpr bool kIsCoarse = kLogpOnly && std::is_same_v<S, BFloat16>;

  Prep<V> prep;
  V m, a0, a1, b0, b1;

  GradWriter(const RowParams& row, double row_max, const RowGrad<double>& g)
      : prep(row),
        m(splat(static_cast<Scalar>(row_max), V{})),
        a0(constant(kIsCoarse ? g.a0 * kCoarse : g.a0, kLogpOnly ? 1.0 : 0.75)),
        a1(constant(g.a1)),
        b0(constant(g.b0)),
        b1(constant(g.b1)) {}

  // What overflows becomes finite, as a p of 0 has to make it 0: a share of the largest number, so
  // that the sum of all is finite too.
  static PAPO_HD V constant(double x, double share = 1.0 / 1024.0) {
    return splat(static_cast<Scalar>(saturated<Scalar>(x / share) * share), V{});
  }

  static PAPO_HD V exponential(F64& y) { return exp_of(y); }
  static PAPO_HD V exponential(F32& y) { return kIsCoarse ? exp_coarse(y) : exp_of(y); }

  PAPO_HD V element(V z) const {
    V y = prep(z) - m;
    const V e = exponential(y);
    const V du = kLogpOnly ? e * a0 : e * fma(e, fma(b1, y, b0), fma(a1, y, a0));
    return prep.chain(du, z);
  }

  PAPO_HD void step(const S* x, S* dx) const {
    V x0, x1;
    load_pair(x, x0, x1);
    const V d0 = element(x0);
    const V d1 = element(x1);
    store_pair(dx, d0, d1);
  }

  PAPO_HD void run(const S* x, S* dx, int64_t n) const {
    const int64_t whole = n - n % kStep;
    for (int64_t i = 0; i < whole; i += kStep) {
      prefetch_next_block(x + i, kStep);
      step(x + i, dx + i);
    }
    if (whole < n) {
      S tail[kStep];
      for (int k = 0; k < kStep; ++k) set_masked(tail + k);
      const size_t bytes = static_cast<size_t>(n - whole) * sizeof(S);
      memcpy(tail, x + whole, bytes);
      step(tail, tail);
      memcpy(dx + whole, tail, bytes);
    }
  }
};

template <typename S, template <typename> class Prep>
void grad_as(const S* x, S* dx, int64_t n, double row_max, const RowGrad<double>& g,
             const RowParams& row) {
  if (g.a1 == 0 && g.b0 == 0 && g.b1 == 0) {
    GradWriter<S, Prep, true>(row, row_max, g).run(x, dx, n);
  } else {
    GradWriter<S, Prep, false>(row, row_max, g).run(x, dx, n);
  }
}

// ---- single elements and scaling ----------------------------------------------------------------

template <typename S>
typename Acc<S>::Scalar load_one(const S* x) {
  using V = typename Acc<S>::Vec;
  constexpr int kStep = 2 * lanes<V>();
  S buffer[kStep] = {};
  buffer[0] = *x;
  V a, b;
  load_pair(buffer, a, b);
  return a[0];
}

template <typename S>
void store_one(S* x, double value) {
  using V = typename Acc<S>::Vec;
  constexpr int kStep = 2 * lanes<V>();
  S buffer[kStep];
  V v = splat(static_cast<typename Acc<S>::Scalar>(value), V{});
  store_pair(buffer, v, v);
  *x = buffer[0];
}

template <typename S, template <typename> class Prep>
double scaled_as(const S* x, const RowParams& row) {
  using V = typename Acc<S>::Vec;
  return Prep<V>(row)(splat(load_one(x), V{}))[0];
}

template <typename S>
void scale_as(S* x, int64_t n, double factor) {
  using V = typename Acc<S>::Vec;
  constexpr int kStep = 2 * lanes<V>();
  const V f = splat(static_cast<typename Acc<S>::Scalar>(factor), V{});
  const int64_t whole = n - n % kStep;
  V a{}, b{};
  for (int64_t i = 0; i < whole; i += kStep) {
    load_pair(x + i, a, b);
    store_pair(x + i, a * f, b * f);
  }
  S tail[kStep] = {};
  const size_t bytes = static_cast<size_t>(n - whole) * sizeof(S);
  memcpy(tail, x + whole, bytes);
  load_pair(tail, a, b);
  store_pair(tail, a * f, b * f);
  memcpy(x + whole, tail, bytes);
}

// ---- the table --------------------------------------------------------------------------------

// fn(typed pointer) for the stored type.
template <typename Fn>
PAPO_HD auto with_dtype(const void* p, DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat16:
      return fn(static_cast<const Float16*>(p));
    case DType::kBFloat16:
      return fn(static_cast<const BFloat16*>(p));
    case DType::kFloat32:
      return fn(static_cast<const float*>(p));
    default:
      return fn(static_cast<const double*>(p));
  }
}

template <typename S>
void scan_rows(const S* x, int64_t n, const RowParams& row, RowState<double>* state) {
  if (row.softcap > 0) return scan_as<S, Capped>(x, n, row, state);
  if (row.temperature != 1) return scan_as<S, Tempered>(x, n, row, state);
  return scan_as<S, Identity>(x, n, row, state);
}

template <typename S>
void grad_rows(const S* x, S* dx, int64_t n, double row_max, const RowGrad<double>& g,
               const RowParams& row) {
  if (row.softcap > 0) return grad_as<S, Capped>(x, dx, n, row_max, g, row);
  if (row.temperature != 1) return grad_as<S, Tempered>(x, dx, n, row_max, g, row);
  return grad_as<S, Identity>(x, dx, n, row_max, g, row);
}

template <typename S>
double scaled_one(const S* x, const RowParams& row) {
  if (row.softcap > 0) return scaled_as<S, Capped>(x, row);
  if (row.temperature != 1) return scaled_as<S, Tempered>(x, row);
  return scaled_as<S, Identity>(x, row);
}

void scan(const void* x, int64_t n, DType dtype, const RowParams& row, RowState<double>* state) {
  with_dtype(x, dtype, [&](auto* p) { scan_rows(p, n, row, state); });
}

void grad(const void* x, void* dx, int64_t n, DType dtype, double row_max,
          const RowGrad<double>& g, const RowParams& row) {
  with_dtype(x, dtype, [&](auto* p) {
    grad_rows(p, static_cast<std::remove_const_t<std::remove_pointer_t<decltype(p)>>*>(dx), n,
              row_max, g, row);
  });
}

double scaled(const void* x, DType dtype, const RowParams& row) {
  return with_dtype(x, dtype, [&](auto* p) { return scaled_one(p, row); });
}

void scale(void* x, int64_t n, DType dtype, double factor) {
  with_dtype(x, dtype, [&](auto* p) {
    scale_as(static_cast<std::remove_const_t<std::remove_pointer_t<decltype(p)>>*>(x), n, factor);
  });
}

double load(const void* x, DType dtype) {
  return with_dtype(x, dtype, [](auto* p) { return static_cast<double>(load_one(p)); });
}

void store(void* x, DType dtype, double value) {
  with_dtype(x, dtype, [&](auto* p) {
    store_one(static_cast<std::remove_const_t<std::remove_pointer_t<decltype(p)>>*>(x), value);
  });
}

}  // namespace

namespace cpu {

#if defined(PAPO_ISA_AVX512_BF16)
const RowKernels kAvx512Bf16Kernels = {"avx512_bf16", scan, grad, scaled, scale, load, store};
#elif defined(PAPO_ISA_AVX512)
const RowKernels kAvx512Kernels = {"avx512", scan, grad, scaled, scale, load, store};
#elif defined(PAPO_ISA_AVX2)
const RowKernels kAvx2Kernels = {"avx2", scan, grad, scaled, scale, load, store};
#else
const RowKernels kPortableKernels = {"portable", scan, grad, scaled, scale, load, store};
#endif

}  // namespace cpu
}  // namespace papo
