// The statistics forward and backward, rows whose state is known, and scaling.
#include <math.h>

#include "launch.cuh"
#include "row_gradient.cuh"

namespace papo {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPartElements = 32768;  // of a row that a block takes at a time
constexpr int64_t kLeastPart = 4096;

// ---- kernels ------------------------------------------------------------------------------------

// Part p of row i is item i * parts + p.
template <typename In, typename Out>
PAPO_KERNEL(kThreads, 3) gradient_kernel(const PAPO_PARAM RowsCall call, int parts, int size) {
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
    const int64_t begin = item % parts * kPartElements;
    const int count = static_cast<int>(smaller(kPartElements, m.cols - begin));
    scale_run<T>(element_at<T>(m, item / parts, begin), count, f, share);
  }
}

// ---- calls --------------------------------------------------------------------------------------

// A type's number, in float and in bits, not beyond `least` < 0 in magnitude where the type allows.
struct Low {
  float value;
  uint32_t bits;
};

Low low_of(DType dtype, float least) {
  if (dtype == DType::kFloat32) {
    Low low = {least, 0};
    __builtin_memcpy(&low.bits, &least, sizeof(low.bits));
    return low;
  }
  if (dtype == DType::kBFloat16) {
    uint32_t bits;
    __builtin_memcpy(&bits, &least, sizeof(bits));
    bits &= 0xffff0000u;
    Low low = {0.0f, bits | bits >> 16};
    __builtin_memcpy(&low.value, &bits, sizeof(bits));
    return low;
  }
  // float16: the power of two below, within [2^-14, 2^15], or the largest number.
  if (least <= -65504.0f) return {-65504.0f, 0xfbfffbffu};
  int exponent;
  frexpf(-least, &exponent);  // 2^(exponent - 1) <= -least
  exponent = exponent - 1 < -14 ? -14 : exponent - 1;
  const uint32_t bits = 0x8000u | static_cast<uint32_t>(exponent + 15) << 10;
  return {-ldexpf(1.0f, exponent), bits | bits << 16};
}

Scaling make_scaling(const RowParams& row, DType dtype) {
  Scaling s = {};
  s.unit = static_cast<float>(kLog2e / row.temperature);
  s.softcap = static_cast<float>(row.softcap);
  s.inv_softcap = row.softcap > 0 ? static_cast<float>(1.0 / row.softcap) : 0.0f;
  s.inv_temperature = 1.0 / row.temperature;
  const float bound = 1048576.0f / s.unit;  // 2^20 in units of y
  const float lowest = -3.0e38f;
  const Low low = low_of(dtype, 4.0f * bound < -lowest ? -4.0f * bound : lowest);
  s.low = low.value;
  s.low_bits = low.bits;
  s.fast_max = bound;
  s.fast_min = fmaxf(-bound, low.value + 300.0f / s.unit);
  return s;
}

Status check_call(const RowsCall& call, const Launch& launch) {
  const Device& device = device_of(launch.device);
  if (device.error != nullptr) return {device.error};
  constexpr int64_t kMostColumns = int64_t{1} << 30;
  if (call.logits.cols > kMostColumns) return {"papo_kernels: more than 2^30 columns"};
  return Status::success();
}

}  // namespace

RowsCall make_call(RowTask task, const Matrix& logits, const int64_t* targets, const double* state,
                   const RowParams& row, const Matrix& dlogits) {
  RowsCall call = {};
  call.task = task;
  call.logits = logits;
  call.dlogits = dlogits;
  call.row = row;
  call.scaling = make_scaling(row, logits.dtype);
  call.targets = targets;
  call.state = state;
  return call;
}

Status launch_call(const RowsCall& call, const Launch& launch) {
  if (call.logits.rows == 0) return Status::success();
  const Status status = check_call(call, launch);
  if (!status.ok()) return status;
  const DeviceGuard guard(launch.device);
  if (!guard.status().ok()) return guard.status();
  return call.state != nullptr ? launch_from_state(call, launch) : launch_rows(call, launch);
}

Status launch_from_state(const RowsCall& call, const Launch& launch) {
  const int64_t rows = call.logits.rows;
  if (!call.wants_gradient()) {
    return launch_persistent(outputs_kernel, {0, 128, 1, 0}, ceil_div(rows, 128), launch, call);
  }
  // Few rows are cut finer, so that they fill the device.
  const int64_t blocks = 8 * device_of(launch.device).limits.multiprocessors;
  const int64_t finest = ceil_div(call.columns(), kLeastPart);
  const int64_t wanted = larger(ceil_div(call.columns(), kPartElements), ceil_div(blocks, rows));
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

Status launch_token_stats_fwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const RowParams& row, const TokenStatsOut& out,
                              const Launch& launch) {
  RowsCall call = make_call(RowTask::kStats, logits, targets, state, row, Matrix{});
  call.stats = out;
  return launch_call(call, launch);
}

Status launch_token_stats_bwd(const Matrix& logits, const int64_t* targets, const double* state,
                              const TokenStatsGrads& grads, const RowParams& row,
                              const Matrix& dlogits, const Launch& launch) {
  RowsCall call = make_call(RowTask::kStatsGradient, logits, targets, state, row, dlogits);
  call.grads = grads;
  return launch_call(call, launch);
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
  const int64_t parts = ceil_div(m.cols, kPartElements);
  return with_types(m, Matrix{}, [&](auto type, auto) -> Status {
    return launch_persistent(scale_kernel<decltype(type)>, {0, kThreads, 1, 0}, m.rows * parts,
                             launch, m, static_cast<const float*>(factor), parts);
  });
}

}  // namespace cuda
}  // namespace papo
