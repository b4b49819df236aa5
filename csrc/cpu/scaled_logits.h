// From a vector of logits to scaled logits, u = softcap(z) / temperature, by operator(), and from
// du back to dz by chain(). For code that is compiled once per instruction set.
#pragma once

#include "exp.h"
#include "papo/params.h"
#include "papo/row_grad.h"

namespace papo {
namespace {

// At temperature 1 without a soft cap, u = z.
template <typename V>
struct Identity {
  explicit Identity(const RowParams&) {}
  PAPO_HD V operator()(V z) const { return z; }
  PAPO_HD V chain(V du, V) const { return du; }
};

template <typename V>
struct Tempered {
  using Scalar = decltype(V{}[0] + V{}[0]);
  V inv_temperature;
  explicit Tempered(const RowParams& row)
      : inv_temperature(splat(static_cast<Scalar>(1.0 / row.temperature), V{})) {}
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
    return du * softcap_slope(tanh_of(z * inv_cap)) * inv_temperature;
  }
};

}  // namespace
}  // namespace papo
