// The vectorised inner loops, one table of them per instruction set.
#pragma once

#include "papo/params.h"
#include "papo/row_grad.h"
#include "papo/row_state.h"

namespace papo {
namespace cpu {

// Columns handled by one call. Fixed, so that a row's result does not depend on who computed which
// part of it.
constexpr int64_t kChunk = 16384;

struct RowKernels {
  const char* isa;

  // State of n <= kChunk contiguous logits.
  void (*scan)(const void* logits, int64_t n, DType dtype, const RowParams& row,
               RowState<double>* state);

  // dlogits[j] = grad.element(...) with the chain rule of scaling and soft cap; grad.target is not
  // used. dlogits may be logits.
  void (*grad)(const void* logits, void* dlogits, int64_t n, DType dtype, double row_max,
               const RowGrad<double>& grad, const RowParams& row);

  // u of one logit, rounded exactly as in scan and grad.
  double (*scaled)(const void* logit, DType dtype, const RowParams& row);

  // data[j] *= factor.
  void (*scale)(void* data, int64_t n, DType dtype, double factor);

  // Plain value <-> stored format, for single elements.
  double (*load)(const void* element, DType dtype);
  void (*store)(void* element, DType dtype, double value);
};

// The best set that this machine has, or the one named by PAPO_CPU_ISA.
const RowKernels& row_kernels();

extern const RowKernels kPortableKernels;
#if defined(PAPO_X86)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
extern const RowKernels kAvx512Bf16Kernels;
#endif

}  // namespace cpu
}  // namespace papo
