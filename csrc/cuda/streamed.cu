// Rows that are read from global memory, by one block each: once for the sums, and again for the
// gradient if one is wanted. For GPUs without clusters, and for rows that a cluster's shared memory
// cannot hold.
#include "launch.cuh"
#include "row_merge.cuh"
#include "write_gradient.cuh"

namespace papo {
namespace cuda {
namespace {

constexpr int kThreads = 32 * kStreamWarps;

// Loads kStreamBatch words of this lane: first, first + step, ....
template <typename In>
PAPO_DEVICE void load_batch(const GlobalRow<In>& row, int first, int step,
                            Word (&w)[kStreamBatch]) {
  const int last = first + (kStreamBatch - 1) * step;
  if (row.aligned() && row.holds_word(last)) {
#pragma unroll
    for (int u = 0; u < kStreamBatch; ++u) w[u] = row.aligned_word(first + u * step);
  } else if (first > 0 && row.holds_both(last)) {
#pragma unroll
    for (int u = 0; u < kStreamBatch; ++u) w[u] = row.from_both(first + u * step);
  } else {
    // At the ends of the row. The words rotate, so that the code for one of them is there once.
#pragma unroll 1
    for (int u = 0; u < kStreamBatch; ++u) {
#pragma unroll
      for (int k = 0; k + 1 < kStreamBatch; ++k) w[k] = w[k + 1];
      w[kStreamBatch - 1] = row.word(first + u * step);
    }
  }
}

template <typename In>
PAPO_DEVICE void scan_row(WarpScan<In>& sums, const GlobalRow<In>& row, int warp, int lane) {
  const int threads = machine::block_threads();
  const int words = static_cast<int>(ceil_div(row.count, kPerWord<In>));
  Word next[kStreamBatch] = {};
  if (32 * warp < words) load_batch(row, 32 * warp + lane, threads, next);
#pragma unroll 1
  for (int base = 32 * warp; base < words; base += kStreamBatch * threads) {
    Word w[kStreamBatch];
#pragma unroll
    for (int u = 0; u < kStreamBatch; ++u) w[u] = next[u];
    // The next batch is on its way while this one is summed.
    const int ahead = base + kStreamBatch * threads;
    if (ahead < words) load_batch(row, ahead + lane, threads, next);
    sums.batch(w);
  }
}

template <typename In, typename Out>
PAPO_KERNEL(kThreads, 2) streamed_kernel(const PAPO_PARAM RowsCall call) {
  const int thread = machine::thread_index();
  const int warp = machine::broadcast(thread / 32, 0);
  const int lane = thread % 32;
  const int warps = call.tile.warps;
  const Share share = {thread, machine::block_threads()};
  const uint32_t messages = machine::shared_base();
  const uint32_t plan = messages + static_cast<uint32_t>(warps * kMessageBytes);
  const WeightingValues<float> weighting = load_weighting<float, float>(call.weighting);

  RowQueue<true> queue(call, machine::block_index(), machine::grid_blocks(), lane);
  for (Job job = queue.next(); job.row >= 0; job = queue.next()) {
    if (job.column == kColumnInactive) {
      if (call.wants_gradient()) write_zero_columns<Out>(call, job.row, 0, 0, 1, share);
      if (thread == 0) write_nothing(call, job.row);
      continue;
    }
    const GlobalRow<In> row = {element_at<In>(call.logits, job.row, 0), call.columns()};
    const Scaling& scaling = scaling_of<true>(call, job);
    WarpScan<In> sums(scaling);
    scan_row(sums, row, warp, lane);
    // Read before an in-place gradient overwrites it.
    const bool here = warp == 0 && job.column >= 0;
    const float sampled =
        here ? scaling.capped(row.element(job.column)) : -infinity<float>();
    store_message(messages + static_cast<uint32_t>(warp * kMessageBytes),
                  sums.message(lane, sampled), lane);
    machine::block_sync();
    if (warp == 0) {
      const RowInputs in = load_inputs<true>(call, job.row);
      const RowScan scan = merge_messages(messages, warps, in.inv_temperature, lane);
      const ElementGrad g = finish_row<true>(call, job, scan, in, &weighting, lane == 0);
      if (lane == 0) store_plan(plan, g);
    }
    machine::block_sync();
    if (!call.wants_gradient()) continue;
    write_gradient<In, Out>(row, row.count, element_at<Out>(call.dlogits, job.row, 0), job.column,
                            load_plan(plan), scaling, share);
    write_zero_columns<Out>(call, job.row, call.columns(), 0, 1, share);
  }
}

}  // namespace

Status launch_streamed(const RowsCall& call, const Launch& launch) {
  const int shared = call.tile.warps * kMessageBytes + kPlanBytes;
  return with_types(call.logits, call.dlogits, [&](auto in, auto out) -> Status {
    return launch_persistent(streamed_kernel<decltype(in), decltype(out)>,
                             {0, 32 * call.tile.warps, 1, shared}, call.logits.rows, launch, call);
  });
}

}  // namespace cuda
}  // namespace papo
