// Rows and their fixed chunks of columns, for token_stats.cpp and policy_loss.cpp.
#pragma once

#include <cstring>
#include <vector>

#include "papo/launch.h"
#include "papo/row_arrays.h"
#include "papo/row_grad.h"
#include "parallel_for.h"
#include "row_kernels.h"

namespace papo {
namespace cpu {

inline char* element_at(const Matrix& m, int64_t i, int64_t j) {
  return m.at(i, j, element_bytes(m.dtype));
}

// Calls fn(A{}), where A is acc for logits of this type.
template <typename Fn>
void with_acc(DType logits, const Fn& fn) {
  if (logits == DType::kFloat64) {
    fn(double{});
  } else {
    fn(float{});
  }
}

// What a row's gradient needs. The gradient of a row that is not active is 0.
struct RowPlan {
  bool active = false;
  double row_max = 0;
  double target_u = 0;
  RowGrad<double> grad{};
};

// The logits of a call, shared out over its threads.
class Rows {
 public:
  Rows(const Matrix& logits, const RowParams& row, int threads)
      : logits_(logits),
        row_(row),
        kernels_(row_kernels()),
        chunks_((row.vocab_size + kChunk - 1) / kChunk),
        threads_(useful_threads(threads, logits.rows * row.vocab_size)) {}

  int64_t chunks() const { return chunks_; }
  int64_t count() const { return logits_.rows; }

  // Whether the threads share the chunks of each row, as there are fewer rows than threads.
  bool splits_rows() const { return logits_.rows < threads_ && chunks_ > 1; }

  template <typename Fn>
  void for_each_row(const Fn& fn) const {
    const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, row_.vocab_size));
    parallel_for(logits_.rows, threads_, grain, fn);
  }

  // Calls fn(i, chunk) for every chunk of every row.
  template <typename Fn>
  void for_each_chunk(const Fn& fn) const {
    parallel_for(logits_.rows * chunks_, threads_, 1,
                 [&](int64_t task) { fn(task / chunks_, task % chunks_); });
  }

  RowState<double> scan_chunk(int64_t i, int64_t chunk) const {
    RowState<double> state;
    RowParams own;
    kernels_.scan(element_at(logits_, i, chunk * kChunk), chunk_size(chunk), logits_.dtype,
                  row_of(i, &own), &state);
    return state;
  }

  // Chunks are merged in order, whichever thread scanned them: the bits do not depend on threads.
  template <typename ChunkState>
  RowScan merge_row(int64_t i, int64_t target, const ChunkState& chunk_state) const {
    RowParams own;
    if (!row_of(i, &own).has_temperature()) return {RowState<double>::bad(), quiet_nan<double>()};
    RowScan scan{RowState<double>::empty(), target_u(i, target)};
    for (int64_t c = 0; c < chunks_; ++c) scan.state.merge(chunk_state(c));
    return scan;
  }

  // Row i from its logits, or from `given`, [rows, kStateSize], where that is not null.
  RowScan scan_row(int64_t i, int64_t target, const double* given) const {
    if (given != nullptr) return load_scan(given, i);
    return merge_row(i, target, [&](int64_t c) { return scan_chunk(i, c); });
  }

  // Calls done(i, scan) for every row. A row for which is_active(i) is false is not read: its scan
  // is zeros.
  template <typename Active, typename Done>
  void scan_all(const int64_t* targets, const double* given, const Active& is_active,
                const Done& done) const {
    const RowScan none{};
    if (given != nullptr || !splits_rows()) {
      for_each_row([&](int64_t i) {
        done(i, is_active(i) ? scan_row(i, targets[i], given) : none);
      });
      return;
    }
    std::vector<RowState<double>> parts(static_cast<size_t>(logits_.rows * chunks_));
    for_each_chunk([&](int64_t i, int64_t c) {
      if (is_active(i)) parts[static_cast<size_t>(i * chunks_ + c)] = scan_chunk(i, c);
    });
    for (int64_t i = 0; i < logits_.rows; ++i) {
      const RowState<double>* row = parts.data() + i * chunks_;
      done(i, is_active(i) ? merge_row(i, targets[i], [&](int64_t c) { return row[c]; }) : none);
    }
  }

  // Writes dlogits, which may be the logits. plan(i) is called once a row.
  template <typename Plan>
  void grad_all(const int64_t* targets, const Plan& plan, const Matrix& dlogits) const {
    if (!splits_rows()) {
      for_each_row([&](int64_t i) {
        const RowPlan row = plan(i);
        // From its end, which the scan has left in the nearest cache.
        for (int64_t c = chunks_ - 1; c >= 0; --c) grad_chunk(i, c, row, dlogits);
        finish_grad_row(i, targets[i], row, dlogits);
      });
      return;
    }
    std::vector<RowPlan> plans(static_cast<size_t>(logits_.rows));
    for (size_t i = 0; i < plans.size(); ++i) plans[i] = plan(static_cast<int64_t>(i));
    for_each_chunk([&](int64_t i, int64_t c) {
      grad_chunk(i, c, plans[static_cast<size_t>(i)], dlogits);
    });
    for (int64_t i = 0; i < logits_.rows; ++i) {
      finish_grad_row(i, targets[i], plans[static_cast<size_t>(i)], dlogits);
    }
  }

 private:
  void grad_chunk(int64_t i, int64_t chunk, const RowPlan& plan, const Matrix& dlogits) const {
    if (!plan.active) return;
    RowParams own;
    kernels_.grad(element_at(logits_, i, chunk * kChunk), element_at(dlogits, i, chunk * kChunk),
                  chunk_size(chunk), logits_.dtype, plan.row_max, plan.grad, row_of(i, &own));
  }

  // Replaces the sampled token's gradient, and writes the zeros that grad_chunk does not.
  void finish_grad_row(int64_t i, int64_t target, const RowPlan& plan,
                       const Matrix& dlogits) const {
    if (!plan.active) return zero_columns(i, 0, dlogits);
    if (target != kElsewhere) {
      RowParams own;
      const RowParams& row = row_of(i, &own);
      const double du = plan.grad.target, capped = plan.target_u * row.temperature;
      const double dz = logits_.dtype == DType::kFloat64 ? chain_rule<double>(du, capped, row)
                                                         : chain_rule<float>(du, capped, row);
      kernels_.store(element_at(dlogits, i, target), dlogits.dtype, dz);
    }
    zero_columns(i, row_.vocab_size, dlogits);
  }

  static void zero_columns(int64_t i, int64_t begin, const Matrix& m) {
    std::memset(element_at(m, i, begin), 0,
                static_cast<size_t>((m.cols - begin) * element_bytes(m.dtype)));
  }

  double target_u(int64_t i, int64_t target) const {
    if (target == kElsewhere) return -infinity<double>();
    RowParams own;
    return kernels_.scaled(element_at(logits_, i, target), logits_.dtype, row_of(i, &own));
  }

  // Those of row i; in `own`, where they are not the call's.
  const RowParams& row_of(int64_t i, RowParams* own) const {
    if (row_.temperatures == nullptr) return row_;
    *own = logits_.dtype == DType::kFloat64 ? row_.of_row<double>(i) : row_.of_row<float>(i);
    return *own;
  }

  int64_t chunk_size(int64_t chunk) const {
    return std::min(kChunk, row_.vocab_size - chunk * kChunk);
  }

  Matrix logits_;
  RowParams row_;
  const RowKernels& kernels_;
  int64_t chunks_;
  int threads_;
};

}  // namespace cpu
}  // namespace papo
