// Entry points of the kernels. Each returns a Status. None throws, exits or synchronizes.
#pragma once

#include "papo/params.h"

namespace papo {

struct Status {
  const char* message;  // null on success; valid until the thread's next call

  bool ok() const { return message == nullptr; }
  static Status success() { return {nullptr}; }
};

namespace cpu {

// A null `state` means that the logits are scanned. Otherwise it is [rows, kStateSize], merged over
// all shards of the vocabulary, and the logits are not read. All outputs of an ignored row are 0,
// its state included.
Status launch_token_stats_fwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const RowParams& row, const TokenStatsOut& out,
                              const Launch& launch);

// dlogits may be the logits. It has their shape, any row stride, and their dtype; on CUDA a
// half-width dtype is possible where the logits are float32. Padding columns are written as 0.
Status launch_token_stats_bwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const TokenStatsGrads& grads, const RowParams& row,
                              const Matrix& dlogits, const Launch& launch);

// A null dlogits.data means no gradient, and logits.data means in place.
Status launch_policy_loss(const Matrix& logits, const TokenInputs& tokens,
                          const Objective& objective, const Weighting& weighting,
                          const RowParams& row, const PolicyLossOut& out, const Matrix& dlogits,
                          const Launch& launch);

// matrix *= *factor, which is acc. Where it is 1 the matrix is neither read nor written, and where
// it is 0 it becomes 0, infinite elements too.
Status launch_scale(const Matrix& matrix, const void* factor, const Launch& launch);

// The instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable".
const char* isa_name();

}  // namespace cpu

#if defined(PAPO_WITH_CUDA)
namespace cuda {

Status launch_token_stats_fwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const RowParams& row, const TokenStatsOut& out,
                              const Launch& launch);
Status launch_token_stats_bwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const TokenStatsGrads& grads, const RowParams& row,
                              const Matrix& dlogits, const Launch& launch);
Status launch_policy_loss(const Matrix& logits, const TokenInputs& tokens,
                          const Objective& objective, const Weighting& weighting,
                          const RowParams& row, const PolicyLossOut& out, const Matrix& dlogits,
                          const Launch& launch);
Status launch_scale(const Matrix& matrix, const void* factor, const Launch& launch);

// Whether a device can cut logits of `columns` as `choice` says. Where it cannot, the message names
// the limit.
Status check_tile(int64_t columns, DType dtype, int device, const TileChoice& choice);

}  // namespace cuda
#endif

}  // namespace papo
