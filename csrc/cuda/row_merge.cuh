// The messages of a row's warps in shared memory, and their merge to the sums of the row.
#pragma once

#include "row_reduce.cuh"

namespace papo {
namespace cuda {

PAPO_DEVICE void store_message(uint32_t address, const WarpMessage& message, int lane) {
  if (lane < 2) {
    machine::store_shared(address + static_cast<uint32_t>(lane * kWordBytes), message.word(lane));
  }
}

// A message that lies in shared memory, in nats.
PAPO_DEVICE RowScan load_message(uint32_t address, double inv_temperature) {
  const Word first = machine::load_shared(address);
  const Word second = machine::load_shared(address + kWordBytes);
  const float m = machine::as_float(first.r[0]);
  const double o = machine::as_float(first.r[1]);
  const double Z = machine::as_float(first.r[2]);
  const double T = machine::as_float(first.r[3]);
  const double Z2 = machine::as_float(second.r[0]);
  const double T2 = machine::as_float(second.r[1]);
  RowScan scan;
  // Rounded alike in every kernel: the difference of these two is 0 for the maximum itself, and one
  // kernel's logp is another's to the bit.
  const double sampled = machine::as_float(second.r[2]);
  scan.target_u = machine::product(sampled, inv_temperature);
  if (Z != Z) {
    scan.state = RowState<double>::bad();
  } else if (m == -infinity<float>()) {
    scan.state = RowState<double>::empty();
  } else {
    // y was (x - m) unit + o.
    const double top = machine::as_float(second.r[3]);
    const double k = exp2_near_zero(-o);
    const double u = machine::product(static_cast<double>(m), inv_temperature);
    scan.state = {u, top + k * Z, k * (T - o * Z) * kLn2, top + k * k * Z2,
                  k * k * (T2 - o * Z2) * kLn2};
  }
  return scan;
}

// The larger of the two. A NaN from either side stays.
PAPO_DEVICE double larger_target(double a, double b) { return b > a || b != b ? b : a; }

// Merges the parts of `lanes` consecutive lanes, a power of two. Every lane gets the same bits, as
// in each step both sides add the same two numbers.
PAPO_DEVICE RowScan merge_lanes(RowScan scan, int lanes) {
  double top = scan.state.max;
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const double other = machine::shuffle_xor(top, mask);
    top = other > top ? other : top;
    scan.target_u = larger_target(scan.target_u, machine::shuffle_xor(scan.target_u, mask));
  }
  // No comparison with a bad part is true. Its NaN reaches every lane through the sums.
  RowState<double> r = scan.state.rescaled(top, exp_of_distance);
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    r.Z += machine::shuffle_xor(r.Z, mask);
    r.T += machine::shuffle_xor(r.T, mask);
    r.Z2 += machine::shuffle_xor(r.Z2, mask);
    r.T2 += machine::shuffle_xor(r.T2, mask);
  }
  scan.state = r.Z != r.Z ? RowState<double>::bad() : r;
  return scan;
}

// Two parts of a row, as merge_lanes merges them.
PAPO_DEVICE RowScan merge_two(const RowScan& a, const RowScan& b) {
  const double top = b.state.max > a.state.max ? b.state.max : a.state.max;
  const RowState<double> x = a.state.rescaled(top, exp_of_distance);
  const RowState<double> y = b.state.rescaled(top, exp_of_distance);
  return {{top, x.Z + y.Z, x.T + y.T, x.Z2 + y.Z2, x.T2 + y.T2},
          larger_target(a.target_u, b.target_u)};
}

// A row from its `count` messages, a power of two, which lie one behind the other.
PAPO_DEVICE RowScan merge_messages(uint32_t messages, int count, double inv_temperature, int lane) {
  const auto load = [&](int i) {
    return load_message(messages + static_cast<uint32_t>(i * kMessageBytes), inv_temperature);
  };
  const int lanes = count < 32 ? count : 32;
  RowScan scan = load(lane & (lanes - 1));
#pragma unroll 1
  for (int i = 32; i < count; i += 32) scan = merge_two(scan, load(i + lane));
  return merge_lanes(scan, lanes);
}

}  // namespace cuda
}  // namespace papo
