// Rows whose state the call brings: gradients and outputs, without a scan.
#include "launch.cuh"
#include "write_gradient.cuh"

namespace papo {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGradientBlocks = 3;    // on a multiprocessor
constexpr int64_t kLeastPart = 4096;  // elements of a row

// ---- kernels ------------------------------------------------------------------------------------

// Rows are cut into `parts` of `size` columns: part p of row i is item i * parts + p.
template <typename In, typename Out>
PAPO_KERNEL(kThreads, kGradientBlocks)
gradient_kernel(const PAPO_PARAM RowsCall call, int parts, int size) {
  const int thread = machine::thread_index();
  const Share share = {thread, machine::block_threads()};
  const uint32_t plan = machine::shared_base();
  const int64_t items = call.logits.rows * parts;
  for (int64_t item = machine::block_index(); item < items; item += machine::grid_blocks()) {
    const Job job = Job::of<true>(call, item / parts);
    const int part = static_cast<int>(item % parts);
    if (job.column == kColumnInactive) {
      write_zero_columns<Out>(call, job.row, 0, part, parts, share);
      if (part == 0 && thread == 0) write_nothing(call, job.row);
      continue;
    }
    machine::block_sync();  // until no thread still reads the plan of the last item
    if (thread < 32) {
      const bool writes = part == 0 && thread == 0;
      const ElementGrad g = finish_row<true>(call, job, load_scan(call.state, job.row),
                                       load_inputs<true>(call, job.row), nullptr, writes);
      if (thread == 0) store_plan(plan, g);
    }
    machine::block_sync();
    const Span span = span_of(part, size, call.columns());
    const GlobalRow<In> row = {element_at<In>(call.logits, job.row, span.begin), span.count};
    const int target = job.column >= 0 ? job.column - span.begin : -1;
    if (span.count > 0) {
      write_gradient<In, Out>(row, span.count, element_at<Out>(call.dlogits, job.row, span.begin),
                              target, load_plan(plan), scaling_of<true>(call, job), share);
    }
    write_zero_columns<Out>(call, job.row, call.columns(), part, parts, share);
  }
}

// Outputs without a gradient, a thread for each row.
PAPO_KERNEL(128, 1) outputs_kernel(const PAPO_PARAM RowsCall call) {
  const WeightingValues<float> weighting = load_weighting<float, float>(call.weighting);
  const int64_t step = machine::grid_blocks() * machine::block_threads();
  int64_t i = machine::block_index() * machine::block_threads() + machine::thread_index();
  for (; i < call.logits.rows; i += step) {
    const Job job = Job::of<true>(call, i);
    if (job.column == kColumnInactive) {
      write_nothing(call, i);
    } else {
      finish_row<true>(call, job, load_scan(call.state, i), load_inputs<true>(call, i), &weighting,
                       true);
    }
  }
}

}  // namespace

Status launch_from_state(const RowsCall& call, const Launch& launch) {
  const int64_t rows = call.logits.rows;
  if (!call.wants_gradient()) {
    return launch_persistent(outputs_kernel, {0, 128, 1, 0}, ceil_div(rows, 128), launch, call);
  }
  // Rows are cut if there are too few of them to fill the device. Otherwise not, as every part
  // finishes its row once more.
  const int64_t blocks = kGradientBlocks * device_of(launch.device).limits.multiprocessors;
  const int64_t finest = ceil_div(call.columns(), kLeastPart);
  const int64_t wanted = rows >= blocks ? 1 : ceil_div(2 * blocks, rows);
  // 64 elements are whole words in every type, so that a part starts where a word of its row does.
  const int size = static_cast<int>(
      round_up(ceil_div(call.columns(), smaller(wanted, finest)), 64));
  const int parts = static_cast<int>(ceil_div(call.columns(), size));
  return with_types(call.logits, call.dlogits, [&](auto in, auto out) -> Status {
    return launch_persistent(gradient_kernel<decltype(in), decltype(out)>,
                             {0, kThreads, 1, kPlanBytes}, rows * parts, launch, call, parts,
                             size);
  });
}

}  // namespace cuda
}  // namespace papo
