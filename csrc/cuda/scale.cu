// A gradient times a number.
#include "launch.cuh"
#include "write_gradient.cuh"

namespace papo {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kScalePart = 32768;  // elements of a row

template <typename T>
PAPO_DEVICE void scale_run(char* data, int count, float factor, Share share) {
  const Walk walk = make_walk(reinterpret_cast<uintptr_t>(data), count, T::kBytes);
  const GlobalRow<T> row = {data, count};
  if (share.thread < walk.ends()) {
    const int i = walk.end_place(share.thread, count);
    store_element<T>(data + static_cast<int64_t>(i) * T::kBytes, row.element(i) * factor);
  }
  const GlobalRow<T> body = row.from(walk.head);
  const Pair f = both(factor);
  for (int base = share.thread; base < walk.words; base += 4 * share.threads) {
    Word w[4] = {};
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int i = base + u * share.threads;
      if (i < walk.words) w[u] = body.aligned_word(i);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int i = base + u * share.threads;
      if (i >= walk.words) continue;
#pragma unroll
      for (int p = 0; p < T::kPairs; ++p) {
        set_pair<T>(w[u], p, machine::mul(pair<T>(w[u], p), f));
      }
      machine::store_global(const_cast<char*>(body.data) + static_cast<int64_t>(i) * kWordBytes,
                            w[u]);
    }
  }
}

// Rows are cut into `parts` of kScalePart columns: part p of row i is item i * parts + p. An element
// may be infinite where the factor is 0, and 0 where the factor is infinite.
template <typename T>
PAPO_KERNEL(kThreads, 1) scale_kernel(const PAPO_PARAM Matrix m, const float* factor,
                                      int64_t parts) {
  const float f = saturated<float>(*factor);
  if (f == 1.0f) return;
  const Share share = {machine::thread_index(), machine::block_threads()};
  const int64_t items = m.rows * parts;
  for (int64_t item = machine::block_index(); item < items; item += machine::grid_blocks()) {
    const int64_t begin = item % parts * kScalePart;
    const int count = static_cast<int>(smaller(kScalePart, m.cols - begin));
    char* run = element_at<T>(m, item / parts, begin);
    if (f == 0.0f) {
      write_zeros<T>(run, count, share);
    } else {
      scale_run<T>(run, count, f, share);
    }
  }
}

}  // namespace

Status launch_scale(const Matrix& matrix, const void* factor, const Launch& launch) {
  Matrix m = matrix;
  if (m.row_stride == m.cols) {  // one long row
    m.cols *= m.rows;
    m.row_stride = m.cols;
    m.rows = m.rows > 0 ? 1 : 0;
  }
  if (m.rows == 0 || m.cols == 0) return Status::success();
  const DeviceGuard guard(launch.device);
  if (!guard.status().ok()) return guard.status();
  const Device& device = device_of(launch.device);
  if (device.error != nullptr) return {device.error};
  const int64_t parts = ceil_div(m.cols, kScalePart);
  return with_types(m, Matrix{}, [&](auto type, auto) -> Status {
    return launch_persistent(scale_kernel<decltype(type)>, {0, kThreads, 1, 0}, m.rows * parts,
                             launch, m, static_cast<const float*>(factor), parts);
  });
}

}  // namespace cuda
}  // namespace papo
