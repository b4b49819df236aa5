// Plain structs that carry a call's arguments to the CPU and CUDA launchers.
// "acc" is float, or double where the logits are double.
#pragma once

#include <stdint.h>

namespace papo {

// Targets that are no column of the logits at hand.
constexpr int64_t kIgnoreIndex = -100;  // the row is not read and contributes exactly nothing
constexpr int64_t kElsewhere = -1;      // of a shard: the sampled token lies in another one

// A row's state in memory, always double: row_max, Z, T, Z2, T2 and target_u, the scaled logit of the
// sampled token (-inf where it is masked or elsewhere).
constexpr int kStateSize = 6;

enum class DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

// Rows of logits or of their gradient: element (i, j) at data[i * row_stride + j].
struct Matrix {
  void* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  DType dtype;
};

// u = softcap(z) / temperature; softcap 0 means none; columns from vocab_size on are padding.
// `sharded`: the columns are a shard of the vocabulary, and a target may be kElsewhere, which is
// out of range otherwise.
struct RowParams {
  double temperature;
  double softcap;
  int64_t vocab_size;
  bool sharded = false;
};

// acc* unless said; row arrays are contiguous [rows]. A null pointer: not wanted.
struct TokenStatsOut {
  void* logp;
  void* entropy;
  void* unit_polarity;
  void* lse;
  double* state;  // [rows, kStateSize]
};

// Upstream gradients of the statistics; null: zero.
struct TokenStatsGrads {
  const void* logp;
  const void* entropy;
  const void* unit_polarity;
};

struct TokenInputs {
  const int64_t* targets;  // a column, kIgnoreIndex or kElsewhere
  const void* advantages;
  const void* token_weight;
  const void* old_logp;  // null: on-policy
  const void* ref_logp;  // null: no reference, kl_coef must be 0
  const double* state;   // [rows, kStateSize] of the whole rows; null: scan the logits
};

// dual_clip 0: off.
struct PolicyLossParams {
  double clip_low, clip_high, dual_clip, kl_coef, entropy_coef;
};

enum class WeightShape : int { kNone = 0, kSign = 1, kTanh = 2 };

// w = scale (1 + strength * phase * h(polarity / sigma)); phase, sigma and scale are scalars in the
// memory of the logits' device, so that a step's new phase needs no host sync.
struct Weighting {
  WeightShape shape;  // kNone: w = 1 and the pointers are not read
  double strength;
  double dead_zone;
  const void* phase;
  const void* sigma;
  const void* scale;
};

struct PolicyLossOut {
  void* token_loss;  // token_weight applied
  void* logp;
  void* entropy;
  void* unit_polarity;
  void* polarity;
  void* weight;
  void* ratio;
  bool* clipped;
};

// How rows are cut on a GPU, as papo_kernels/backends/tuning.py has it from the table or the environment;
// zeros: derived from the device. csrc/cuda/choice.h says what fits.
struct TileChoice {
  int kernel;  // kOnChip, kStreamed; 0: on chip where rows fit
  int cluster, warps, stages, ring, blocks;
  int stats;  // kStatsGiven or kStatsAlways: as below; kStatsByClusters: by the kernel of the loss
  int stats_teams, stats_ring, stats_blocks;
};

constexpr int kOnChip = 1;
constexpr int kStreamed = 2;
constexpr int kStatsGiven = 1;  // where rows are many
constexpr int kStatsByClusters = 2;
constexpr int kStatsAlways = 3;

// Where a call runs: `threads` matters on the CPU, the rest on a GPU.
struct Launch {
  int threads;
  int device;
  void* stream;
  TileChoice choice;
};

}  // namespace papo
