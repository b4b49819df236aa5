// Rows and their fixed chunks of columns: what token_stats.cpp and policy_loss.cpp share.
#pragma once

#include <cstring>
#include <vector>

#include "papo/launch.h"
#include "papo/policy_loss.h"
#include "papo/row_grad.h"
#include "parallel_rows.h"
#include "row_kernels.h"

namespace papo {
namespace cpu {

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    default:
      return 8;
  }
}

inline char* element_at(const Matrix& m, int64_t i, int64_t j) {
  return static_cast<char*>(m.data) + (i * m.row_stride + j) * element_size(m.dtype);
}

// Reads or writes entry i of a row array in the accumulation type of `logits`.
inline double load_acc(const void* array, int64_t i, DType logits) {
  return logits == DType::kFloat64 ? static_cast<const double*>(array)[i]
                                   : static_cast<const float*>(array)[i];
}
inline void store_acc(void* array, int64_t i, DType logits, double value) {
  if (array == nullptr) return;
  if (logits == DType::kFloat64) {
    static_cast<double*>(array)[i] = value;
  } else {
    static_cast<float*>(array)[i] = static_cast<float>(value);
  }
}

// A row's state and its sampled token's scaled logit.
struct RowScan {
  RowState<double> state = RowState<double>::empty();
  double target_u = 0;
};

inline RowScan load_scan(const double* states, int64_t i) {
  const double* s = states + kStateSize * i;
  return {{s[0], s[1], s[2], s[3], s[4]}, s[5]};
}
inline void store_scan(double* states, int64_t i, const RowScan& scan) {
  const RowState<double>& s = scan.state;
  const double values[kStateSize] = {s.max, s.Z, s.T, s.Z2, s.T2, scan.target_u};
  std::copy(values, values + kStateSize, states + kStateSize * i);
}

// A row between its statistics and its gradient.
struct RowPlan {
  bool active = false;
  double row_max = 0;
  double target_u = 0;
  RowGrad<double> grad{};
};

// One call's view of its logits.
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

  // With fewer rows than threads, the threads share out the chunks of each row.
  bool splits_rows() const { return logits_.rows < threads_ && chunks_ > 1; }

  template <typename Fn>
  void for_each_row(const Fn& fn) const {
    const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, row_.vocab_size));
    parallel_for(logits_.rows, threads_, grain, fn);
  }

  // fn(i, chunk) for every chunk of every row.
  template <typename Fn>
  void for_each_chunk(const Fn& fn) const {
    parallel_for(logits_.rows * chunks_, threads_, 1,
                 [&](int64_t task) { fn(task / chunks_, task % chunks_); });
  }

  RowState<double> scan_chunk(int64_t i, int64_t chunk) const {
    RowState<double> state;
    kernels_.scan(element_at(logits_, i, chunk * kChunk), chunk_size(chunk), logits_.dtype, row_,
                  &state);
    return state;
  }

  // Chunks merge in order, whoever scanned them: the result is the same for any thread count.
  template <typename ChunkState>
  RowScan merge_row(int64_t i, int64_t target, const ChunkState& chunk_state) const {
    RowScan scan{RowState<double>::empty(), target_u(i, target)};
    for (int64_t c = 0; c < chunks_; ++c) scan.state.merge(chunk_state(c));
    return scan;
  }

  // Row i from `given`, [rows, kStateSize], where it is not null, else from its logits.
  RowScan scan_row(int64_t i, int64_t target, const double* given) const {
    if (given != nullptr) return load_scan(given, i);
    return merge_row(i, target, [&](int64_t c) { return scan_chunk(i, c); });
  }

  // done(i, scan) for every row; the scans of rows that are not is_active(i) are all zero.
  template <typename Active, typename Done>
  void scan_all(const int64_t* targets, const double* given, const Active& is_active,
                const Done& done) const {
    const RowScan none{RowState<double>{}, 0};
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

  // dlogits, which may be the logits, of every row by plan(i), asked for once a row.
  template <typename Plan>
  void grad_all(const int64_t* targets, const Plan& plan, const Matrix& dlogits) const {
    if (!splits_rows()) {
      for_each_row([&](int64_t i) {
        const RowPlan row = plan(i);
        // Backwards: the end of the row is what a scan left in the nearest cache.
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
    kernels_.grad(element_at(logits_, i, chunk * kChunk), element_at(dlogits, i, chunk * kChunk),
                  chunk_size(chunk), logits_.dtype, plan.row_max, plan.grad, row_);
  }

  // The sampled token's gradient over what grad_chunk wrote, and zeros over the columns that it left.
  void finish_grad_row(int64_t i, int64_t target, const RowPlan& plan,
                       const Matrix& dlogits) const {
    if (!plan.active) return zero_columns(i, 0, dlogits);
    if (target != kElsewhere) {
      const double dz = chain_rule(plan.grad.target, plan.target_u * row_.temperature, row_);
      kernels_.store(element_at(dlogits, i, target), dlogits.dtype, dz);
    }
    zero_columns(i, row_.vocab_size, dlogits);
  }

  static void zero_columns(int64_t i, int64_t begin, const Matrix& m) {
    std::memset(element_at(m, i, begin), 0,
                static_cast<size_t>((m.cols - begin) * element_size(m.dtype)));
  }

  double target_u(int64_t i, int64_t target) const {
    if (target == kElsewhere) return -infinity<double>();
    return kernels_.scaled(element_at(logits_, i, target), logits_.dtype, row_);
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
