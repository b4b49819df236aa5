// Rows whose state is known, and scaling.
#include "launch.cuh"
#include "row_gradient.cuh"

namespace papo {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGradientBlocks = 3;        // on a multiprocessor
constexpr int64_t kLeastPart = 4096;      // elements of a row
constexpr int64_t kScalePart = 32768;

// ---- kernels ------------------------------------------------------------------------------------

// Part p of row i is item i * parts + p.
template <typename In, typename Out>
PAPO_KERNEL(kThreads, kGradientBlocks) gradient_kernel(const PAPO_PARAM RowsCall call, int parts, int size) {
  const int thread = machine::thread_index();
  const Share share = {thread, machine::block_threads()};
  const uint32_t plan = machine::shared_base();
  const int64_t items = call.logits.rows * parts;
  for (int64_t item = machine::block_index(); item < items; item += machine::grid_blocks()) {
    const Job job = {item / parts, sampled_column(call, item / parts)};
    const int part = static_cast<int>(item % parts);
    if (job.column == kColumnInactive) {
      write_zero_columns<Out>(call, job.row, 0, part, parts, share);
      if (part == 0 && thread == 0) write_nothing(call, job.row);
      continue;
    }
    machine::block_sync();  // nobody still reads the plan of the item before
    if (thread < 32) {
      const bool writes = part == 0 && thread == 0;
      const ElementGrad g = finish_row(call, job, given_scan(call, job.row),
                                       load_numbers(call, job.row), nullptr, writes);
      if (thread == 0) store_plan(plan, g);
    }
    machine::block_sync();
    const Span span = span_of(part, size, call.columns());
    const GlobalRow<In> row = {element_at<In>(call.logits, job.row, span.begin), span.count};
    const int target = job.column >= 0 ? job.column - span.begin : -1;
    if (span.count > 0) {
      write_gradient<In, Out>(row, span.count, element_at<Out>(call.dlogits, job.row, span.begin),
                              target, load_plan(plan), call.scaling, share);
    }
    write_zero_columns<Out>(call, job.row, call.columns(), part, parts, share);
  }
}

// Outputs alone, a thread a row.
PAPO_KERNEL(128, 1) outputs_kernel(const PAPO_PARAM RowsCall call) {
  const WeightingValues<float> weighting = load_weighting(call.weighting);
  const int64_t step = machine::grid_blocks() * machine::block_threads();
  int64_t i = machine::block_index() * machine::block_threads() + machine::thread_index();
  for (; i < call.logits.rows; i += step) {
    const Job job = {i, sampled_column(call, i)};
    if (job.column == kColumnInactive) {
      write_nothing(call, i);
    } else {
      finish_row(call, job, given_scan(call, i), load_numbers(call, i), &weighting, true);
    }
  }
}

template <typename T>
PAPO_DEVICE void scale_run(char* data, int count, float factor, Share share) {
  const Walk walk = make_walk(reinterpret_cast<uintptr_t>(data), count, T::kBytes);
  const GlobalRow<T> row = {data, count};
  if (share.thread < walk.head + walk.tail) {
    const int i = share.thread < walk.head ? share.thread
                                           : count - walk.tail + (share.thread - walk.head);
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

// Part p of row i is item i * parts + p.
template <typename T>
PAPO_KERNEL(kThreads, 1) scale_kernel(const PAPO_PARAM Matrix m, const float* factor,
                                      int64_t parts) {
  const float f = *factor;
  if (f == 1.0f) return;
  const Share share = {machine::thread_index(), machine::block_threads()};
  const int64_t items = m.rows * parts;
  for (int64_t item = machine::block_index(); item < items; item += machine::grid_blocks()) {
    const int64_t begin = item % parts * kScalePart;
    const int count = static_cast<int>(smaller(kScalePart, m.cols - begin));
    scale_run<T>(element_at<T>(m, item / parts, begin), count, f, share);
  }
}

}  // namespace

Status launch_from_state(const RowsCall& call, const Launch& launch) {
  const int64_t rows = call.logits.rows;
  if (!call.wants_gradient()) {
    return launch_persistent(outputs_kernel, {0, 128, 1, 0}, ceil_div(rows, 128), launch, call);
  }
  // Rows too few to fill the device are cut. Others are not: every part would finish the row again.
  const int64_t blocks = kGradientBlocks * device_of(launch.device).limits.multiprocessors;
  const int64_t finest = ceil_div(call.columns(), kLeastPart);
  const int64_t wanted = rows >= blocks ? 1 : ceil_div(2 * blocks, rows);
  // 64: a whole number of words in every type, so that parts start where their row's words do.
  const int size = static_cast<int>(
      round_up(ceil_div(call.columns(), smaller(wanted, finest)), 64));
  const int parts = static_cast<int>(ceil_div(call.columns(), size));
  return with_types(call.logits, call.dlogits, [&](auto in, auto out) -> Status {
    return launch_persistent(gradient_kernel<decltype(in), decltype(out)>,
                             {0, kThreads, 1, kPlanBytes}, rows * parts, launch, call, parts,
                             size);
  });
}

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
