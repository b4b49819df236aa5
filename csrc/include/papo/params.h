// Plain structs that carry a call's arguments to the CPU and CUDA launchers.
// "acc" is the type that sums are formed in: float, or double where the logits are double.
#pragma once

#include <stdint.h>

#include "papo/platform.h"

namespace papo {

// Targets that are not a column of these logits.
constexpr int64_t kIgnoreIndex = -100;  // the row is not read and contributes exactly nothing
constexpr int64_t kElsewhere = -1;      // in a shard: another shard has the sampled token

// A row's state in memory, always double: row_max, Z, T, Z2, T2 and target_u, the sampled token's
// scaled logit (-inf if that token is masked or elsewhere).
constexpr int kStateSize = 6;

enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

PAPO_HD int element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Rows of logits or of their gradient. The row stride counts elements.
struct Matrix {
  void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  DType dtype;

  // Where element (i, j) is, given the size of an element.
  PAPO_HD char* at(int64_t i, int64_t j, int bytes) const {
    return static_cast<char*>(data) + (i * row_stride + j) * bytes;
  }
};

// u = softcap(z) / temperature. A softcap of 0 means none. Columns from vocab_size on are padding.
struct RowParams {
  double temperature;
  double softcap;
  int64_t vocab_size;
  // The columns are a shard of the vocabulary: a target may be kElsewhere, which is out of range
  // otherwise.
  bool sharded = false;
  // [rows] acc: each row's, in place of `temperature`. Null: they have that in common.
  const void* temperatures = nullptr;

  // Those of row i alone, for logits whose acc is A.
  template <typename A>
  PAPO_HD RowParams of_row(int64_t i) const {
    RowParams row = *this;
    row.temperatures = nullptr;
    if (temperatures != nullptr) {
      row.temperature = static_cast<double>(static_cast<const A*>(temperatures)[i]);
    }
    return row;
  }

  // A row whose temperature is not a positive number has no distribution.
  PAPO_HD bool has_temperature() const {
    return temperature > 0.0 && temperature < static_cast<double>(HUGE_VALF);
  }
};

// In the structs below a row array is contiguous, [rows], and its elements are acc unless the
// comment says otherwise. Null means that an output is not wanted.
struct TokenStatsOut {
  void* logp;
  void* entropy;
  void* unit_polarity;
  void* lse;
  double* state;  // [rows, kStateSize]
};

// Upstream gradients of the statistics. Null means zero.
struct TokenStatsGrads {
  const void* logp;
  const void* entropy;
  const void* unit_polarity;
  const void* lse;
};

struct TokenInputs {
  const int64_t* targets;  // a column, kIgnoreIndex or kElsewhere
  const void* advantages;
  const void* token_weight;
  const void* old_logp;        // null, as is log_ratio: on-policy
  const void* ref_logp;        // null: no reference policy, and kl_coef must be 0
  const void* log_ratio;       // in place of old_logp: the log of the ratio itself
  const void* kl_weight;       // null: token_weight
  const void* entropy_weight;  // null: token_weight
  const double* state;   // [rows, kStateSize] of the whole rows; null: scan the logits
};

enum class Surrogate : int {
  kClip = 0,
  kCispo = 1,
  kSapo = 2,
  kDppoTv = 3,
  kDppoKl = 4,
  kCeGppo = 5
};

enum class KlEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };

// What the loss is; papo_kernels/objective.py has the formulas. Limits that are off are infinite.
struct Objective {
  Surrogate surrogate;
  KlEstimator kl_estimator;
  bool kl_slope_of_k2;  // the gradient of the KL term is that of k2
  bool kl_ratio;        // the KL term is multiplied by the ratio
  double clip_low, clip_high;          // of tokens with a positive advantage
  double negative_low, negative_high;  // of the others
  double dual_clip, log_ratio_limit, ratio_cap, kl_limit;
  double sapo_positive, sapo_other;
  double gppo_low, gppo_high;
  double kl_coef, entropy_coef;
};

enum class WeightShape : int { kNone = 0, kSign = 1, kTanh = 2 };

// w = scale (1 + strength * phase * h(polarity / sigma)). The last three are scalars in the memory
// of the logits' device, so that a new phase needs no synchronization with the host.
struct Weighting {
  WeightShape shape;  // kNone: w = 1, and the pointers are not read
  double strength;
  double dead_zone;
  const void* phase;
  const void* sigma;
  const void* scale;
};

// The bound that acted on a token's policy gradient.
enum class ClipSide : uint8_t { kInside = 0, kLow = 1, kHigh = 2, kDual = 3 };

struct PolicyLossOut {
  void* token_loss;  // token_weight applied
  void* logp;
  void* entropy;
  void* unit_polarity;
  void* polarity;
  void* weight;
  void* ratio;
  uint8_t* clip_side;  // a ClipSide
};

// How rows are cut on a GPU, as papo_kernels/backends/tuning.py reads it from the table or the
// environment. Zeros are derived from the device. csrc/cuda/choice.h says what fits.
struct TileChoice {
  int kernel;  // kOnChip or kStreamed; 0: on chip where rows fit
  int cluster, warps, stages, ring, blocks;
  int stats;  // one of the constants below; 0: derived
  int stats_teams, stats_ring, stats_blocks;
};

constexpr int kOnChip = 1;
constexpr int kStreamed = 2;
constexpr int kStatsGiven = 1;       // as the choice says, if there are enough rows
constexpr int kStatsByClusters = 2;  // by the kernel of the loss
constexpr int kStatsAlways = 3;      // as the choice says, for any number of rows

// Where a call runs. The CPU uses `threads`, a GPU the rest.
struct Launch {
  int threads;
  int device;
  void* stream;
  TileChoice choice;
};

}  // namespace papo
