// Entry points of the kernels. Every one returns a Status; none throws, exits or synchronises.
#pragma once

#include "papo/params.h"

namespace papo {

// `message` outlives the call; null on success.
struct Status {
  const char* message;
  bool ok() const { return message == nullptr; }
  static Status success() { return {nullptr}; }
};

namespace cpu {

// Outputs of an ignored row, state included, are 0. `state` null: scan the logits; otherwise it is
// [rows, kStateSize], merged over all shards of the vocabulary, and the logits are not read.
Status launch_token_stats_fwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const RowParams& row, const TokenStatsOut& out,
                              const Launch& launch);

// dlogits: same shape as logits, any row stride, the same dtype or (CUDA) half-width where logits are
// float32; may be the logits. Padding columns are written as 0.
Status launch_token_stats_bwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const TokenStatsGrads& grads, const RowParams& row,
                              const Matrix& dlogits, const Launch& launch);

// dlogits.data null: no gradient; dlogits.data == logits.data: in place.
Status launch_policy_loss(const Matrix& logits, const TokenInputs& tokens,
                          const PolicyLossParams& params, const Weighting& weighting,
                          const RowParams& row, const PolicyLossOut& out, const Matrix& dlogits,
                          const Launch& launch);

// matrix *= *factor (acc); nothing is read or written where *factor == 1.
Status launch_scale(const Matrix& matrix, const void* factor, const Launch& launch);

// Instruction set in use: "avx512_bf16", "avx512", "avx2" or "portable".
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
                          const PolicyLossParams& params, const Weighting& weighting,
                          const RowParams& row, const PolicyLossOut& out, const Matrix& dlogits,
                          const Launch& launch);
Status launch_scale(const Matrix& matrix, const void* factor, const Launch& launch);

// Why logits of `columns` cannot be cut on a device as `choice` says; success where they can. The
// message names the limit and is valid until the thread's next call.
Status check_tile(int64_t columns, DType dtype, int device, const TileChoice& choice);

}  // namespace cuda
#endif

}  // namespace papo
