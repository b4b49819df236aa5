// Many rows without a gradient: a block takes all slices of a row in turn.
//
// The slices, each warp's words of them and the order of merges are those of resident.cu, and so
// are the bits of every result. Here nothing crosses blocks, one block finishes a row, and there
// are more warps, so that some compute while others wait.
//   copy      one warp: fills free buffers with slices, row after row
//   compute   teams of tile.warps warps: team t sums slices t, t + teams, ... of a row
//   finish    one warp: merges a row's sums and writes its outputs
// They hand over through barriers in shared memory:
//   full[buffer]    copy -> compute      the bytes have landed
//   empty[buffer]   compute -> copy      every warp is done with them, or has passed them by
//   partial         compute -> finish    every warp has left its sums of its slices of a row
//   taken           finish -> compute    those sums have been read
#include "buffers.cuh"
#include "launch.cuh"
#include "row_merge.cuh"
#include "row_finish.cuh"
#include "slice_scan.cuh"

namespace papo {
namespace cuda {
namespace {

#if defined(PAPO_HAS_CLUSTERS)

template <typename In, bool kOwn>
class StatsRows {
 public:
  PAPO_DEVICE explicit StatsRows(const RowsCall& call)
      : call_(call),
        tile_(call.tile),
        stats_(call.stats_tile),
        layout_(make_stats_layout(tile_.cluster, tile_.warps, stats_.ring, tile_.stage_bytes)),
        shared_(machine::shared_base()),
        warp_(machine::broadcast(machine::thread_index() / 32, 0)),
        lane_(machine::thread_index() % 32),
        log_warps_(log2_of(tile_.warps)) {}

  PAPO_DEVICE void run() {
    if (machine::thread_index() == 0) init_barriers();
    machine::block_sync();
    if (warp_ < stats_.teams * tile_.warps) {
      compute();
    } else if (warp_ == stats_.teams * tile_.warps) {
      copy();
    } else {
      finish_rows();
    }
  }

 private:
  // ---- barriers and places ----------------------------------------------------------------------

  PAPO_DEVICE uint32_t barrier(int i) const {
    return shared_ + static_cast<uint32_t>(layout_.barriers + i * kBarrierBytes);
  }
  PAPO_DEVICE uint32_t full(int buffer) const { return barrier(buffer); }
  PAPO_DEVICE uint32_t empty(int buffer) const { return barrier(stats_.ring + buffer); }
  PAPO_DEVICE uint32_t partial() const { return barrier(2 * stats_.ring); }
  PAPO_DEVICE uint32_t taken() const { return barrier(2 * stats_.ring + 1); }
  static PAPO_DEVICE uint32_t parity(int k) { return static_cast<uint32_t>(k) & 1u; }

  PAPO_DEVICE void init_barriers() const {
    for (int i = 0; i < stats_.ring; ++i) {
      machine::barrier_init(full(i), 1);
      machine::barrier_init(empty(i), stats_.teams * tile_.warps);
    }
    machine::barrier_init(partial(), stats_.teams * tile_.warps);
    machine::barrier_init(taken(), 1);
    machine::barrier_init_fence();
  }

  PAPO_DEVICE uint32_t buffer_address(int buffer) const {
    return shared_ + static_cast<uint32_t>(buffer * tile_.stage_bytes);
  }
  PAPO_DEVICE uint32_t message(int slice, int warp) const {
    const int index = (slice << log_warps_) + warp;
    return shared_ + static_cast<uint32_t>(layout_.messages + index * kMessageBytes);
  }
  PAPO_DEVICE RowQueue<kOwn> rows() const {
    return RowQueue<kOwn>(call_, machine::block_index(), machine::grid_blocks(), lane_);
  }
  PAPO_DEVICE Span slice_of(int slice) const {
    return span_of(slice, tile_.slice, call_.columns());
  }

  // ---- copy ------------------------------------------------------------------------------------

  PAPO_DEVICE void copy() const {
    RowQueue<kOwn> queue = rows();
    Cursor at;
    for (Job job = queue.next_active(); job.row >= 0; job = queue.next_active()) {
      for (int slice = 0; slice < tile_.cluster; ++slice) {
        if (lane_ == 0) {
          machine::barrier_wait(empty(at.buffer), at.parity ^ 1u, "empty");
          fill_buffer<In>(call_.logits, job.row, slice_of(slice), buffer_address(at.buffer),
                          full(at.buffer));
        }
        at.advance(stats_.ring);
      }
    }
  }

  // ---- compute ---------------------------------------------------------------------------------

  PAPO_DEVICE void compute() const {
    RowQueue<kOwn> queue = rows();
    const int team = warp_ >> log_warps_;
    const TeamWarp mine = {warp_ & (tile_.warps - 1), lane_, log_warps_ + 5};
    Cursor at;
    bool masked = false;
    int k = 0;
    for (Job job = queue.next_active(); job.row >= 0; job = queue.next_active()) {
      for (int slice = 0; slice < tile_.cluster; ++slice) {
        // Also for slices of other teams: a parity tells two phases apart, so none may be missed.
        machine::barrier_wait(full(at.buffer), at.parity, "full");
        if ((slice & (stats_.teams - 1)) == team) {
          scan(job, slice, mine, at.buffer, masked, k);
        } else {
          machine::warp_sync();
          if (lane_ == 0) machine::barrier_arrive(empty(at.buffer));
        }
        at.advance(stats_.ring);
      }
      machine::warp_sync();
      if (lane_ == 0) machine::barrier_arrive(partial());
      ++k;
    }
  }

  PAPO_DEVICE void scan(const Job& job, int slice, const TeamWarp& mine, int buffer, bool& masked,
                        int k) const {
    const Scaling& scaling = scaling_of<kOwn>(call_, job);
    WarpScan<In> sums(scaling);
    const Span columns = slice_of(slice);
    const Stage<In> stage = {row_in_buffer<In>(call_.logits, job.row, buffer_address(buffer)),
                             columns.count};
    const auto here = [](int) {};
    const auto only = [&](int) { return stage; };
    scan_slice<Batch::kTwo>(sums, 1, here, only, mine, scaling.low_bits, masked);
    const int place = job.column - columns.begin;
    float sampled = -infinity<float>();
    if (mine.warp == 0 && job.column >= 0 && place >= 0 && place < columns.count) {
      sampled = call_.scaling.capped(stage.row.element(place));
    }
    machine::warp_sync();
    if (lane_ == 0) machine::barrier_arrive(empty(buffer));
    // The finish warp may not have read the messages of the previous row yet.
    if (slice < stats_.teams && k > 0) machine::barrier_wait(taken(), parity(k - 1), "taken");
    store_message(message(slice, mine.warp), sums.message(lane_, sampled), lane_);
  }

  // ---- finish ----------------------------------------------------------------------------------

  PAPO_DEVICE void finish_rows() const {
    RowQueue<kOwn> queue = rows();
    const WeightingValues<float> weighting = load_weighting<float, float>(call_.weighting);
    int k = 0;
    for (Job job = queue.next(); job.row >= 0; job = queue.next()) {
      if (job.column == kColumnInactive) {
        if (lane_ == 0) write_nothing(call_, job.row);
        continue;
      }
      const RowInputs in = load_inputs<kOwn>(call_, job.row);
      machine::barrier_wait(partial(), parity(k), "partial");
      const RowScan scan = merge_messages(message(0, 0), tile_.cluster << log_warps_,
                                           in.inv_temperature, lane_);
      machine::warp_sync();
      if (lane_ == 0) machine::barrier_arrive(taken());
      finish_row<kOwn>(call_, job, scan, in, &weighting, lane_ == 0);
      ++k;
    }
  }

  const RowsCall& call_;
  const Tile& tile_;
  const StatsTile& stats_;
  const StatsLayout layout_;
  const uint32_t shared_;
  const int warp_, lane_, log_warps_;
};

#endif  // PAPO_HAS_CLUSTERS

template <typename In, bool kOwn>
PAPO_KERNEL(kStatsThreads, 2) stats_kernel(const PAPO_PARAM RowsCall call) {
#if defined(PAPO_HAS_CLUSTERS)
  StatsRows<In, kOwn>(call).run();
#endif
}

}  // namespace

// ---- launch -------------------------------------------------------------------------------------

Status launch_stats(const RowsCall& call, const DeviceLimits& limits, const Launch& launch,
                    bool* ran) {
  const StatsTile& stats = call.stats_tile;
  return with_types(call.logits, Matrix{}, [&](auto in, auto) -> Status {
    using In = decltype(in);
    const auto kernel =
        call.own_temperatures() ? stats_kernel<In, true> : stats_kernel<In, false>;
    LaunchShape shape = {0, static_cast<int>(summing_threads(stats.teams * call.tile.warps)), 1,
                         exclusive_bytes(limits, stats.blocks, stats.shared_bytes)};
    const int blocks = resident_clusters(kernel, shape, launch.device, kClusterPtx);
    *ran = blocks > 0 && call.logits.rows >= static_cast<int64_t>(stats.rounds) * blocks;
    if (!*ran) return Status::success();
    shape.blocks = even_grid(call.logits.rows, blocks);
    return launch_kernel(kernel, shape, launch.stream, call);
  });
}

}  // namespace cuda
}  // namespace papo
