// The arguments of a call as its kernels get them, and the order in which a warp takes the rows.
#pragma once

#include <type_traits>

#include "papo/row_arrays.h"
#include "row_reduce.cuh"

namespace papo {
namespace cuda {

enum class RowTask : int { kStats, kStatsGradient, kPolicyLoss };

struct RowsCall {
  RowTask task;
  Matrix logits;
  Matrix dlogits;  // data null: no gradient
  RowParams row;
  // Of row.temperature.
  Scaling scaling;
  double inv_temperature;
  Tile tile;
  StatsTile stats_tile;
  const int64_t* targets;
  const double* state;  // null: scan the logits
  // Of kStats.
  TokenStatsOut stats;
  // Of kStatsGradient.
  TokenStatsGrads grads;
  // Of kPolicyLoss.
  TokenInputs tokens;
  Objective objective;
  Weighting weighting;
  PolicyLossOut loss;

  PAPO_HD int columns() const { return static_cast<int>(row.vocab_size); }
  PAPO_HD bool wants_gradient() const { return dlogits.data != nullptr; }
  PAPO_HD bool own_temperatures() const { return row.temperatures != nullptr; }
};

// A row's sampled column, or one of these:
constexpr int kColumnElsewhere = -1;
constexpr int kColumnInvalid = -2;   // out of range, or no temperature: the row becomes NaN
constexpr int kColumnInactive = -3;  // the row contributes nothing and is not read

// Below, kOwn says whether rows may have temperatures of their own. Where none has, inner loops
// read the scaling from the kernel's parameters, and no row pays for it.

template <bool kOwn>
PAPO_DEVICE int sampled_column(const RowsCall& call, int64_t i) {
  const int64_t target = call.targets[i];
  if (target == kIgnoreIndex) return kColumnInactive;
  if (call.task == RowTask::kPolicyLoss && !has_weight<float>(call.tokens, i)) {
    return kColumnInactive;
  }
  if (kOwn && call.own_temperatures() && !call.row.of_row<float>(i).has_temperature()) {
    return kColumnInvalid;
  }
  if (target == kElsewhere && call.row.sharded) return kColumnElsewhere;
  return target >= 0 && target < call.row.vocab_size ? static_cast<int>(target) : kColumnInvalid;
}

template <bool kOwn>
PAPO_DEVICE float unit_of(const RowsCall& call, int64_t i) {
  if (!kOwn || !call.own_temperatures()) return call.scaling.unit;
  return Scaling::unit_of(call.row.of_row<float>(i).temperature);
}

struct Job {
  int64_t row;  // -1: there are no more
  int column;
  float unit;  // of its Scaling

  static PAPO_DEVICE Job none() { return {-1, kColumnInactive, 0.0f}; }
  template <bool kOwn>
  static PAPO_DEVICE Job of(const RowsCall& call, int64_t i) {
    return {i, sampled_column<kOwn>(call, i), unit_of<kOwn>(call, i)};
  }
};

// Bound to a const Scaling&, the copy lives as long as that does.
template <bool kOwn>
PAPO_DEVICE std::conditional_t<kOwn, Scaling, const Scaling&> scaling_of(const RowsCall& call,
                                                                         const Job& job) {
  if constexpr (kOwn) {
    Scaling s = call.scaling;
    if (call.own_temperatures()) s.set_unit(job.unit, call.logits.dtype);
    return s;
  } else {
    return call.scaling;
  }
}

// The rows first, first + step, ... of a call, for one warp. Its lanes look up 32 rows at a time,
// so that a row's target and temperature are there when the row's turn comes.
template <bool kOwn>
class RowQueue {
 public:
  PAPO_DEVICE RowQueue(const RowsCall& call, int64_t first, int64_t step, int lane)
      : call_(call), next_(first), step_(step), lane_(lane), at_(0), column_(0), unit_(0.0f) {}

  PAPO_DEVICE Job next() {
    if (next_ >= call_.logits.rows) return Job::none();
    if (at_ == 0) {
      const int64_t i = next_ + lane_ * step_;
      const bool is_row = i < call_.logits.rows;
      column_ = is_row ? sampled_column<kOwn>(call_, i) : kColumnInactive;
      if (kOwn && is_row) unit_ = unit_of<kOwn>(call_, i);
    }
    const float unit = kOwn ? machine::broadcast(unit_, at_) : call_.scaling.unit;
    const Job job = {next_, machine::broadcast(column_, at_), unit};
    next_ += step_;
    at_ = (at_ + 1) % 32;
    return job;
  }

  PAPO_DEVICE Job next_active() {
    Job job = next();
    while (job.row >= 0 && job.column == kColumnInactive) job = next();
    return job;
  }

 private:
  const RowsCall& call_;
  int64_t next_, step_;
  int lane_, at_, column_;
  float unit_;
};

}  // namespace cuda
}  // namespace papo
