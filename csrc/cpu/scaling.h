// From logits to scaled logits, u = softcap(z) / temperature, a vector at a time: `operator()`, and
// `chain`, the derivative's way back. Included by the code that is compiled once per instruction set.
#pragma once

#include "exp.h"
#include "papo/params.h"

namespace papo {
namespace {

// temperature 1, no soft cap: u = z.
template <typename V>
struct Identity {
  explicit Identity(const RowParams&) {}
  PAPO_HD V operator()(V z) const { return z; }
  PAPO_HD V chain(V du, V) const { return du; }
};

template <typename V>
struct Tempered {
  V inv_temperature;
  explicit Tempered(const RowParams& row)
      : inv_temperature(splat(static_cast<decltype(V{}[0] + V{}[0])>(1.0 / row.temperature), V{})) {}
  PAPO_HD V operator()(V z) const { return z * inv_temperature; }
  PAPO_HD V chain(V du, V) const { return du * inv_temperature; }
};

template <typename V>
struct Capped {
  using Scalar = decltype(V{}[0] + V{}[0]);
  V inv_cap, scale, inv_temperature;
  explicit Capped(const RowParams& row)
      : inv_cap(splat(static_cast<Scalar>(1.0 / row.softcap), V{})),
        scale(splat(static_cast<Scalar>(row.softcap / row.temperature), V{})),
        inv_temperature(splat(static_cast<Scalar>(1.0 / row.temperature), V{})) {}
  PAPO_HD V operator()(V z) const {
    const V masked = splat(-infinity<Scalar>(), V{});
    return z == masked ? masked : scale * tanh_of(z * inv_cap);
  }
  PAPO_HD V chain(V du, V z) const {
    const V t = tanh_of(z * inv_cap);
    // (1 - t)(1 + t) keeps its digits where the cap saturates.
    return du * ((1 - t) * (1 + t)) * inv_temperature;
  }
};

}  // namespace
}  // namespace papo
