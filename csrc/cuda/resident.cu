// Rows that stay on chip: the logits are read once, and a gradient is written once.
//
// A cluster of blocks shares a row. Each block's slice is copied into buffers in shared memory,
// where it stays until its gradient has been written. In a block four roles run side by side:
//   copy      one warp: fills free buffers with slices of the next rows
//   sum       tile.warps warps: form the sums of the block's slice
//   finish    one warp: merges the sums of the block and of the cluster, writes the row's outputs,
//             and forms the coefficients of its gradient, in every block from the same numbers
//   write     tile.warps warps: form the gradient from the same buffers; none without a gradient
// They hand over through barriers in shared memory:
//   full[buffer]    copy -> sum, write     the bytes have landed
//   empty[buffer]   write -> copy          every warp is done with them; sum -> copy: no gradient
//   partial[row]    sum -> finish          every warp has left its sums of a row
//   exchange[2]     finish -> finish       every block of the cluster has sent its sums of a row
//   plan[row]       finish -> write, sum   the coefficients of a row are there
// There are as many of `partial` and `plan` as the ring holds rows, and rows take them in turn. So
// do they the two of `exchange`. docs/kernels.md says why that is enough.
#include "buffers.cuh"
#include "launch.cuh"
#include "write_gradient.cuh"
#include "slice_scan.cuh"

namespace papo {
namespace cuda {
namespace {

#if defined(PAPO_HAS_CLUSTERS)

template <typename In, typename Out, bool kOwn>
class ResidentRows {
 public:
  PAPO_DEVICE explicit ResidentRows(const RowsCall& call)
      : call_(call),
        tile_(call.tile),
        layout_(make_layout(tile_.cluster, tile_.warps, tile_.rows(), tile_.ring,
                            tile_.stage_bytes)),
        shared_(machine::shared_base()),
        rank_(tile_.cluster > 1 ? machine::cluster_rank() : 0),
        warp_(machine::broadcast(machine::thread_index() / 32, 0)),
        lane_(machine::thread_index() % 32),
        log_threads_(log2_of(32 * tile_.warps)),
        slice_(span_of(rank_, tile_.slice, call.columns())) {}

  PAPO_DEVICE void run() {
    if (machine::thread_index() == 0) init_barriers();
    machine::cluster_sync();
    if (warp_ < tile_.warps) {
      sum_rows();
    } else if (warp_ == tile_.warps) {
      copy_rows();
    } else if (warp_ == tile_.warps + 1) {
      finish_rows();
    } else {
      write_rows();
    }
    // Blocks need not wait for each other at the end: once its finish warp is done, a block has
    // every message that its peers send it.
  }

 private:
  // ---- barriers -------------------------------------------------------------------------------

  PAPO_DEVICE uint32_t barrier(int i) const {
    return shared_ + static_cast<uint32_t>(layout_.barriers + i * kBarrierBytes);
  }
  PAPO_DEVICE uint32_t full(int buffer) const { return barrier(buffer); }
  PAPO_DEVICE uint32_t empty(int buffer) const { return barrier(tile_.ring + buffer); }
  PAPO_DEVICE uint32_t partial(int place) const { return barrier(2 * tile_.ring + place); }
  PAPO_DEVICE uint32_t plan(int place) const {
    return barrier(2 * tile_.ring + tile_.rows() + place);
  }
  PAPO_DEVICE uint32_t exchange(int k) const {
    return barrier(2 * tile_.ring + 2 * tile_.rows() + (k & 1));
  }

  PAPO_DEVICE uint32_t message_bytes() const {
    return static_cast<uint32_t>(tile_.cluster * kCtaMessageBytes);
  }

  PAPO_DEVICE void init_barriers() const {
    for (int i = 0; i < tile_.ring; ++i) {
      machine::barrier_init(full(i), 1);
      machine::barrier_init(empty(i), tile_.warps);
    }
    for (int place = 0; place < tile_.rows(); ++place) {
      machine::barrier_init(partial(place), tile_.warps);
      machine::barrier_init(plan(place), 1);
    }
    for (int k = 0; k < 2; ++k) {
      machine::barrier_init(exchange(k), 1);
      // Armed one use ahead, so that no message of a peer comes before it is expected.
      machine::barrier_arrive_expect(exchange(k), message_bytes());
    }
    machine::barrier_init_fence();
  }

  // ---- places -----------------------------------------------------------------------------------

  PAPO_DEVICE uint32_t buffer_address(int buffer) const {
    return shared_ + static_cast<uint32_t>(buffer * tile_.stage_bytes);
  }
  PAPO_DEVICE uint32_t warp_message(int place, int warp) const {
    const int index = place * tile_.warps + warp;
    return shared_ + static_cast<uint32_t>(layout_.partial + index * kWarpMessageBytes);
  }
  PAPO_DEVICE uint32_t cta_message(int k, int rank) const {
    const int index = (k & 1) * tile_.cluster + rank;
    return shared_ + static_cast<uint32_t>(layout_.exchange + index * kCtaMessageBytes);
  }
  PAPO_DEVICE uint32_t plan_address(int place) const {
    return shared_ + static_cast<uint32_t>(layout_.plan + place * kPlanBytes);
  }

  PAPO_DEVICE RowQueue<kOwn> rows() const {
    return RowQueue<kOwn>(call_, machine::block_index() / tile_.cluster,
                          machine::grid_blocks() / tile_.cluster, lane_);
  }
  // Stage s of this block's slice, in columns of the row.
  PAPO_DEVICE Span stage_of(int s) const {
    const Span within = span_of(s, tile_.stage, slice_.count);
    return {slice_.begin + within.begin, within.count};
  }
  PAPO_DEVICE SharedRow<In> staged(int buffer, int64_t row) const {
    return row_in_buffer<In>(call_.logits, row, buffer_address(buffer));
  }

  PAPO_DEVICE void release(int buffer) const {
    machine::warp_sync();
    if (lane_ == 0) machine::barrier_arrive(empty(buffer));
  }

  // ---- copy ------------------------------------------------------------------------------------

  PAPO_DEVICE void copy_rows() const {
    RowQueue<kOwn> queue = rows();
    Cursor at;
    for (Job job = queue.next(); job.row >= 0; job = queue.next()) {
      if (job.column == kColumnInactive) {
        if (call_.wants_gradient()) {
          write_zero_columns<Out>(call_, job.row, 0, rank_, tile_.cluster, {lane_, 32});
        }
        continue;
      }
      for (int s = 0; s < tile_.stages; ++s) {
        if (lane_ == 0) {
          machine::barrier_wait(empty(at.buffer), at.parity ^ 1u, "empty");
          fill_buffer<In>(call_.logits, job.row, stage_of(s), buffer_address(at.buffer),
                          full(at.buffer));
        }
        at.advance(tile_.ring);
      }
    }
  }

  // ---- sum -------------------------------------------------------------------------------------

  PAPO_DEVICE void sum_rows() const {
    RowQueue<kOwn> queue = rows();
    Cursor at, turn;
    bool masked = false;
    for (Job job = queue.next_active(); job.row >= 0; job = queue.next_active()) {
      scan(job, turn, at, masked);
      turn.advance(tile_.rows());
    }
  }

  PAPO_DEVICE void scan(const Job& job, const Cursor& turn, Cursor& at, bool& masked) const {
    const Scaling& scaling = scaling_of<kOwn>(call_, job);
    WarpScan<In> sums(scaling);
    const Cursor begin = at;
    const auto buffer = [&](int s) {
      const int i = begin.buffer + s;
      return i < tile_.ring ? i : i - tile_.ring;
    };
    const auto wait = [&](int) {
      machine::barrier_wait(full(at.buffer), at.parity, "full");
      at.advance(tile_.ring);
    };
    const auto stage = [&](int s) {
      return Stage<In>{staged(buffer(s), job.row), stage_of(s).count};
    };
    const TeamWarp mine = {warp_, lane_, log_threads_};
    scan_slice(sums, tile_.stages, wait, stage, mine, scaling.low_bits, masked);
    if (!call_.wants_gradient()) {
      // No writer holds the buffers back: the last row with this message must have been finished.
      machine::barrier_wait(plan(turn.buffer), turn.parity ^ 1u, "plan");
    }
    sums.leave(warp_message(turn.buffer, warp_), lane_, sampled(job, stage));
    machine::warp_sync();
    if (lane_ == 0) machine::barrier_arrive(partial(turn.buffer));
    if (call_.wants_gradient()) return;
    for (int s = 0; s < tile_.stages; ++s) release(buffer(s));
  }

  // Warp 0 gets the softcapped logit of the sampled token if it is in this block's slice, or -inf.
  template <typename At>
  PAPO_DEVICE float sampled(const Job& job, const At& stage) const {
    const int place = job.column - slice_.begin;
    if (warp_ != 0 || job.column < 0 || place < 0 || place >= slice_.count) {
      return -infinity<float>();
    }
    const int s = tile_.stages == 1 ? 0 : place / tile_.stage;
    return call_.scaling.capped(stage(s).row.element(place - s * tile_.stage));
  }

  // ---- write -----------------------------------------------------------------------------------

  PAPO_DEVICE void write_rows() const {
    RowQueue<kOwn> queue = rows();
    Cursor at, turn;
    for (Job job = queue.next_active(); job.row >= 0; job = queue.next_active()) {
      machine::barrier_wait(plan(turn.buffer), turn.parity, "plan");
      write(job, load_plan(plan_address(turn.buffer)), at);
      turn.advance(tile_.rows());
    }
  }

  PAPO_DEVICE void write(const Job& job, const ElementGrad& g, Cursor& at) const {
    const Scaling& scaling = scaling_of<kOwn>(call_, job);
    const int writer = warp_ - tile_.warps - kServiceWarps;
    const Share share = {32 * writer + lane_, 32 * tile_.warps};
    for (int s = 0; s < tile_.stages; ++s) {
      machine::barrier_wait(full(at.buffer), at.parity, "full");
      const Span stage = stage_of(s);
      const int target = job.column >= 0 ? job.column - stage.begin : -1;
      if (stage.count > 0) {
        write_gradient<In, Out>(staged(at.buffer, job.row), stage.count,
                                element_at<Out>(call_.dlogits, job.row, stage.begin), target, g,
                                scaling, share);
      }
      release(at.buffer);
      at.advance(tile_.ring);
    }
    write_zero_columns<Out>(call_, job.row, call_.columns(), rank_, tile_.cluster, share);
  }

  // ---- finish ----------------------------------------------------------------------------------

  PAPO_DEVICE void finish_rows() const {
    RowQueue<kOwn> queue = rows();
    const WeightingValues<float> weighting = load_weighting<float, float>(call_.weighting);
    Cursor turn;
    int k = 0;
    for (Job job = queue.next(); job.row >= 0; job = queue.next()) {
      if (job.column == kColumnInactive) {
        if (rank_ == 0 && lane_ == 0) write_nothing(call_, job.row);
        continue;
      }
      // Every block needs the coefficients of a gradient. Without a gradient the blocks take turns.
      const int owner = call_.wants_gradient() ? 0 : k & (tile_.cluster - 1);
      const bool writes = rank_ == owner && lane_ == 0;
      const RowInputs in = load_inputs<kOwn>(call_, job.row);
      machine::barrier_wait(partial(turn.buffer), turn.parity, "partial");
      const uint32_t message = warp_message(turn.buffer, lane_ & (tile_.warps - 1));
      RowScan scan = merge_lanes(load_warp_message(message, in.inv_temperature), tile_.warps);
      if (tile_.cluster > 1) exchange_parts(scan, k);
      if (rank_ == owner || call_.wants_gradient()) {
        if (tile_.cluster > 1) scan = merge_cluster(k);
        const ElementGrad g = finish_row<kOwn>(call_, job, scan, in, &weighting, writes);
        if (lane_ == 0) store_plan(plan_address(turn.buffer), g);
      }
      machine::warp_sync();
      if (lane_ == 0) machine::barrier_arrive(plan(turn.buffer));
      turn.advance(tile_.rows());
      ++k;
    }
  }

  // Lane r sends this block's part to block r. Returns once the parts of all blocks are here.
  PAPO_DEVICE void exchange_parts(const RowScan& scan, int k) const {
    const uint32_t to = cta_message(k, rank_);
    if (lane_ < tile_.cluster) {
      machine::send(to, lane_, scan.state.max, scan.state.Z, exchange(k));
      machine::send(to + 16, lane_, scan.state.T, scan.state.Z2, exchange(k));
      machine::send(to + 32, lane_, scan.state.T2, scan.target_u, exchange(k));
    }
    const uint32_t parity = static_cast<uint32_t>(k >> 1) & 1u;
    machine::barrier_wait_cluster(exchange(k), parity, "exchange");
    // Armed for row k + 2. No peer sends its part of that row before it has ours of row k + 1.
    if (lane_ == 0) machine::barrier_arrive_expect(exchange(k), message_bytes());
  }

  PAPO_DEVICE RowScan merge_cluster(int k) const {
    const uint32_t from = cta_message(k, lane_ & (tile_.cluster - 1));
    const auto at = [&](uint32_t i) { return machine::load_shared_double(from + 8 * i); };
    return merge_lanes({{at(0), at(1), at(2), at(3), at(4)}, at(5)}, tile_.cluster);
  }

  const RowsCall& call_;
  const Tile& tile_;
  const SharedLayout layout_;
  const uint32_t shared_;
  const int rank_, warp_, lane_, log_threads_;
  const Span slice_;
};

#endif  // PAPO_HAS_CLUSTERS

template <typename In, typename Out, bool kOwn>
PAPO_KERNEL(kResidentThreads, 1) resident_kernel(const PAPO_PARAM RowsCall call) {
#if defined(PAPO_HAS_CLUSTERS)
  ResidentRows<In, Out, kOwn>(call).run();
#endif
}

}  // namespace

// ---- launch -------------------------------------------------------------------------------------

namespace {

template <typename In, typename Out>
auto kernel_of(const RowsCall& call) {
  return call.own_temperatures() ? resident_kernel<In, Out, true>
                                 : resident_kernel<In, Out, false>;
}

LaunchShape shape_of(const RowsCall& call, const DeviceLimits& limits) {
  const Tile& tile = call.tile;
  const int64_t threads =
      call.wants_gradient() ? writing_threads(tile.warps) : 32 * (tile.warps + kServiceWarps);
  return {0, static_cast<int>(threads), tile.cluster,
          exclusive_bytes(limits, tile.blocks, tile.shared_bytes)};
}

}  // namespace

Status count_clusters(const RowsCall& call, const DeviceLimits& limits, const Launch& launch,
                      int* clusters) {
  return with_types(call.logits, call.dlogits, [&](auto in, auto out) -> Status {
    *clusters = resident_clusters(kernel_of<decltype(in), decltype(out)>(call),
                                  shape_of(call, limits), launch.device, kClusterPtx);
    return Status::success();
  });
}

Status launch_resident(const RowsCall& call, const DeviceLimits& limits, const Launch& launch,
                       int clusters) {
  return with_types(call.logits, call.dlogits, [&](auto in, auto out) -> Status {
    LaunchShape shape = shape_of(call, limits);
    shape.blocks = even_grid(call.logits.rows, clusters) * call.tile.cluster;
    return launch_kernel(kernel_of<decltype(in), decltype(out)>(call), shape, launch.stream, call);
  });
}

}  // namespace cuda
}  // namespace papo
