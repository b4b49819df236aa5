// A gradient times a number.
#include "rows.h"

namespace papo {
namespace cpu {

Status launch_scale(const Matrix& matrix, const void* factor, const Launch& launch) {
  double value = 0;
  with_acc(matrix.dtype, [&](auto acc) {
    using A = decltype(acc);
    value = saturated<A>(double(load_acc<A>(factor, 0)));
  });
  if (value == 1.0) return Status::success();
  const RowKernels& kernels = row_kernels();
  parallel_for(matrix.rows, useful_threads(launch.threads, matrix.rows * matrix.cols), 1,
               [&](int64_t i) {
                 char* row = element_at(matrix, i, 0);
                 if (value == 0.0) {
                   std::memset(row, 0,
                               static_cast<size_t>(matrix.cols * element_bytes(matrix.dtype)));
                 } else {
                   kernels.scale(row, matrix.cols, matrix.dtype, value);
                 }
               });
  return Status::success();
}

}  // namespace cpu
}  // namespace papo
