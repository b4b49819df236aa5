// Rows that stay on chip: the logits are read once, and a gradient is written once.
//
// A cluster of blocks shares a row. Each block's slice is copied into buffers in shared memory,
// where it stays until its gradient has been written. In a block four roles run side by side:
//   copy      one warp: fills free buffers with slices of the next rows
//   sum       tile.warps warps: form the sums of the block's slice
//   finish    one warp: merges the sums of all blocks, writes the row's outputs, and forms the
//             coefficients of its gradient. The blocks of a cluster take turns
//   write     tile.warps warps: form the gradient from the same buffers; none without a gradient
// They hand over through barriers in shared memory:
//   full[buffer]     copy -> sum, write    the bytes have landed
//   empty[buffer]    write -> copy         every warp is done with them; sum -> copy: no gradient
//   messages[turn]   sum -> finish         every warp of the cluster has sent its sums of a row
//   plan[row]        finish -> write, sum  the coefficients of a row have been sent to every block
// There are as many of `plan` as the ring holds rows, and of `messages` as many as these give each
// block turns. docs/kernels.md says why that is enough.
#include "buffers.cuh"
#include "launch.cuh"
#include "row_merge.cuh"
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
    // Blocks need not wait for each other at the end: by then a block has every message and every
    // plan that its peers send it.
  }

 private:
  // ---- barriers -------------------------------------------------------------------------------

  PAPO_DEVICE uint32_t barrier(int i) const {
    return shared_ + static_cast<uint32_t>(layout_.barriers + i * kBarrierBytes);
  }
  PAPO_DEVICE uint32_t full(int buffer) const { return barrier(buffer); }
  PAPO_DEVICE uint32_t empty(int buffer) const { return barrier(tile_.ring + buffer); }
  PAPO_DEVICE uint32_t plan(int row) const { return barrier(2 * tile_.ring + row); }
  PAPO_DEVICE uint32_t messages(int turn) const {
    return barrier(2 * tile_.ring + tile_.rows() + turn);
  }

  // A block alone is no cluster: there is no sending, and each warp arrives for itself.
  PAPO_DEVICE bool alone() const { return tile_.cluster == 1; }
  PAPO_DEVICE int row_messages() const { return tile_.cluster * tile_.warps; }
  // The phase of a turn's messages ends when these have come, and not before this call.
  PAPO_DEVICE void expect_messages(int turn) const {
    if (alone()) return;
    machine::barrier_arrive_expect(messages(turn),
                                   static_cast<uint32_t>(row_messages() * kMessageBytes));
  }

  PAPO_DEVICE void init_barriers() const {
    for (int i = 0; i < tile_.ring; ++i) {
      machine::barrier_init(full(i), 1);
      machine::barrier_init(empty(i), tile_.warps);
    }
    for (int row = 0; row < tile_.rows(); ++row) machine::barrier_init(plan(row), 1);
    for (int turn = 0; turn < turns(); ++turn) {
      machine::barrier_init(messages(turn), alone() ? tile_.warps : 1);
      expect_messages(turn);
    }
    machine::barrier_init_fence();
  }

  // ---- places -----------------------------------------------------------------------------------

  PAPO_DEVICE uint32_t buffer_address(int buffer) const {
    return shared_ + static_cast<uint32_t>(buffer * tile_.stage_bytes);
  }
  PAPO_DEVICE uint32_t message_address(int turn, int i) const {
    const int index = turn * row_messages() + i;
    return shared_ + static_cast<uint32_t>(layout_.messages + index * kMessageBytes);
  }
  PAPO_DEVICE uint32_t plan_address(int row) const {
    return shared_ + static_cast<uint32_t>(layout_.plan + row * kPlanBytes);
  }
  PAPO_DEVICE int turns() const { return turns_of(tile_.cluster, tile_.rows()); }

  // Where the rows are, in the order in which all roles meet them: the place of a row among `plan`,
  // the block that finishes it, and the place of its messages there.
  struct Turn {
    Cursor row, turn;
    int owner = 0;
  };
  PAPO_DEVICE void advance(Turn& at) const {
    at.row.advance(tile_.rows());
    if (++at.owner == tile_.cluster) {
      at.owner = 0;
      at.turn.advance(turns());
    }
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
    Cursor buffers;
    Turn at;
    bool masked = false;
    for (Job job = queue.next_active(); job.row >= 0; job = queue.next_active()) {
      scan(job, at, buffers, masked);
      advance(at);
    }
    if (call_.wants_gradient()) return;
    // No plan may come to a block that has left.
    for (int i = 0; i < tile_.rows(); ++i) {
      wait_for_former_plan(at);
      advance(at);
    }
  }

  // Until the row that had this place before has been finished.
  PAPO_DEVICE void wait_for_former_plan(const Turn& at) const {
    machine::barrier_wait_cluster(plan(at.row.buffer), at.row.parity ^ 1u, "plan");
  }

  PAPO_DEVICE void scan(const Job& job, const Turn& at, Cursor& buffers, bool& masked) const {
    const Scaling& scaling = scaling_of<kOwn>(call_, job);
    WarpScan<In> sums(scaling);
    const Cursor begin = buffers;
    const auto buffer = [&](int s) {
      const int i = begin.buffer + s;
      return i < tile_.ring ? i : i - tile_.ring;
    };
    const auto wait = [&](int) {
      machine::barrier_wait(full(buffers.buffer), buffers.parity, "full");
      buffers.advance(tile_.ring);
    };
    const auto stage = [&](int s) {
      return Stage<In>{staged(buffer(s), job.row), stage_of(s).count};
    };
    const TeamWarp mine = {warp_, lane_, log_threads_};
    // 8 elements at a time.
    constexpr Batch kBatch = In::kBytes == 2 ? Batch::kOne : Batch::kTwo;
    scan_slice<kBatch>(sums, tile_.stages, wait, stage, mine, scaling.low_bits, masked);
    const WarpMessage message = sums.message(lane_, sampled(job, stage));
    // With a gradient, writers have held back the buffers until then.
    if (!call_.wants_gradient()) wait_for_former_plan(at);
    send(message, at);
    if (call_.wants_gradient()) return;
    for (int s = 0; s < tile_.stages; ++s) release(buffer(s));
  }

  // To the block that finishes the row.
  PAPO_DEVICE void send(const WarpMessage& message, const Turn& at) const {
    const int turn = at.turn.buffer;
    const uint32_t to = message_address(turn, rank_ * tile_.warps + warp_);
    if (alone()) {
      store_message(to, message, lane_);
      machine::warp_sync();
      if (lane_ == 0) machine::barrier_arrive(messages(turn));
      return;
    }
    if (warp_ == 0 && lane_ == 0) {
      machine::barrier_arrive_expect(plan(at.row.buffer), kPlanBytes);
    }
    machine::warp_sync();
    if (lane_ < 2) {
      machine::send(to + static_cast<uint32_t>(lane_ * kWordBytes), at.owner, message.word(lane_),
                    messages(turn));
    }
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
    Cursor buffers, row;
    for (Job job = queue.next_active(); job.row >= 0; job = queue.next_active()) {
      machine::barrier_wait_cluster(plan(row.buffer), row.parity, "plan");
      write(job, load_plan(plan_address(row.buffer)), buffers);
      row.advance(tile_.rows());
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
    Turn at;
    for (Job job = queue.next(); job.row >= 0; job = queue.next()) {
      if (job.column == kColumnInactive) {
        if (rank_ == 0 && lane_ == 0) write_nothing(call_, job.row);
        continue;
      }
      if (at.owner == rank_) finish(job, at, weighting);
      advance(at);
    }
  }

  PAPO_DEVICE void finish(const Job& job, const Turn& at,
                          const WeightingValues<float>& weighting) const {
    const int turn = at.turn.buffer;
    const RowInputs in = load_inputs<kOwn>(call_, job.row);
    machine::barrier_wait_cluster(messages(turn), at.turn.parity, "messages");
    const RowScan scan =
        merge_messages(message_address(turn, 0), row_messages(), in.inv_temperature, lane_);
    // Before the plan is sent, without which no block sends its messages of a later turn.
    if (lane_ == 0) expect_messages(turn);
    send_plan(finish_row<kOwn>(call_, job, scan, in, &weighting, lane_ == 0), at.row.buffer);
  }

  // To all blocks.
  PAPO_DEVICE void send_plan(const ElementGrad& g, int row) const {
    const uint32_t to = plan_address(row);
    if (alone()) {
      if (lane_ == 0) store_plan(to, g);
      machine::warp_sync();
      if (lane_ == 0) machine::barrier_arrive(plan(row));
      return;
    }
    const PlanWords words = pack(g);
    machine::warp_sync();
    if (lane_ < tile_.cluster) {
      machine::send(to, lane_, words.first, plan(row));
      machine::send(to + kWordBytes, lane_, words.second, plan(row));
    }
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

LaunchShape shape_of(const Tile& tile, bool writes, const DeviceLimits& limits) {
  const int64_t threads = writes ? writing_threads(tile.warps) : summing_threads(tile.warps);
  return {0, static_cast<int>(threads), tile.cluster,
          exclusive_bytes(limits, writes ? tile.blocks : tile.summing, tile.shared_bytes)};
}

}  // namespace

Status count_clusters(const RowsCall& call, const DeviceLimits& limits, const Launch& launch,
                      int* clusters) {
  return with_types(call.logits, call.dlogits, [&](auto in, auto out) -> Status {
    const auto count = [&](bool writes) {
      return resident_clusters(kernel_of<decltype(in), decltype(out)>(call),
                               shape_of(call.tile, writes, limits), launch.device, kClusterPtx);
    };
    // Where no block that writes gradients fits, rows are not on chip without one either: their
    // sums would have other bits.
    *clusters = count(true);
    if (*clusters > 0 && !call.wants_gradient()) *clusters = count(false);
    return Status::success();
  });
}

Status launch_resident(const RowsCall& call, const DeviceLimits& limits, const Launch& launch,
                       int clusters) {
  return with_types(call.logits, call.dlogits, [&](auto in, auto out) -> Status {
    LaunchShape shape = shape_of(call.tile, call.wants_gradient(), limits);
    shape.blocks = even_grid(call.logits.rows, clusters) * call.tile.cluster;
    return launch_kernel(kernel_of<decltype(in), decltype(out)>(call), shape, launch.stream, call);
  });
}

}  // namespace cuda
}  // namespace papo
