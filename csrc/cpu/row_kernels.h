// The vectorized inner loops: a table of them for each instruction set.
#pragma once

#include "papo/params.h"
#include "papo/row_grad.h"
#include "papo/row_state.h"

namespace papo {
namespace cpu {

// Columns that one call handles. It is fixed, so that a row's result does not depend on which
// thread computed which part.
constexpr int64_t kChunk = 16384;

struct RowKernels {
  const char* isa;

  // The state of n <= kChunk contiguous logits.
  void (*scan)(const void* logits, int64_t n, DType dtype, const RowParams& row,
               RowState<double>* state);

  // dlogits[j] = grad.element(...), with the chain rule of temperature and soft cap. It does not
  // use grad.target. dlogits may be logits.
  void (*grad)(const void* logits, void* dlogits, int64_t n, DType dtype, double row_max,
               const RowGrad<double>& grad, const RowParams& row);

  // u of one logit, with exactly the rounding of scan and grad.
  double (*scaled)(const void* logit, DType dtype, const RowParams& row);

  // data[j] *= factor.
  void (*scale)(void* data, int64_t n, DType dtype, double factor);

  // One element, from and to its stored format.
  double (*load)(const void* element, DType dtype);
  void (*store)(void* element, DType dtype, double value);
};

// Those of the best instruction set that this machine has and PAPO_CPU_ISA allows.
const RowKernels& row_kernels();

extern const RowKernels kPortableKernels;
#if defined(PAPO_X86)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
extern const RowKernels kAvx512Bf16Kernels;
#endif

}  // namespace cpu
}  // namespace papo
