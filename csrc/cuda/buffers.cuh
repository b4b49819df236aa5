// The buffers in shared memory, and the bulk copies that bring rows into them.
#pragma once

#include "words.cuh"

namespace papo {
namespace cuda {

#if defined(PAPO_HAS_CLUSTERS)

// A place in the ring of buffers, and the parity of how often the ring has been passed.
struct Cursor {
  int buffer = 0;
  uint32_t parity = 0;

  PAPO_DEVICE void advance(int ring) {
    if (++buffer == ring) {
      buffer = 0;
      parity ^= 1u;
    }
  }
};

// The elements of a row in a buffer. Slices and stages are whole words: in its buffer a stage
// starts as far from a 16-byte boundary as the row does in memory.
template <typename T>
PAPO_DEVICE SharedRow<T> row_in_buffer(const Matrix& m, int64_t row, uint32_t buffer) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(element_at<T>(m, row, 0));
  return {buffer + static_cast<uint32_t>(start % kWordBytes)};
}

template <typename T>
PAPO_DEVICE void copy_element(const SharedRow<T>& target, const char* source, int i) {
  const uint32_t to = target.address + static_cast<uint32_t>(i) * T::kBytes;
  const char* from = source + static_cast<int64_t>(i) * T::kBytes;
  if constexpr (T::kBytes == 2) {
    machine::store_shared_16(to, machine::load_global_16(from));
  } else {
    machine::store_shared_32(to, machine::load_global_32(from));
  }
}

// One thread sends columns of a row on their way into a buffer that is no longer read. `full`
// completes when they have landed.
template <typename T>
PAPO_DEVICE void fill_buffer(const Matrix& m, int64_t row, Span columns, uint32_t buffer,
                             uint32_t full) {
  if (columns.count == 0) return machine::barrier_arrive(full);
  const char* source = element_at<T>(m, row, columns.begin);
  const uintptr_t first = reinterpret_cast<uintptr_t>(source);
  const CopyRange range = make_copy_range(
      first, columns.count, T::kBytes, reinterpret_cast<uintptr_t>(m.data),
      reinterpret_cast<uintptr_t>(element_at<T>(m, m.rows - 1, m.cols)));
  const SharedRow<T> target = row_in_buffer<T>(m, row, buffer);
  for (int i = 0; i < range.head; ++i) copy_element(target, source, i);
  for (int i = columns.count - range.tail; i < columns.count; ++i) copy_element(target, source, i);
  // A barrier has ordered this after the buffer's last readers. The fence tells the copy engine so.
  machine::fence_before_bulk();
  const uint32_t bytes = static_cast<uint32_t>(range.end - range.begin);
  if (bytes == 0) return machine::barrier_arrive(full);
  machine::barrier_arrive_expect(full, bytes);
  const uint32_t into = static_cast<uint32_t>(range.begin - first / kWordBytes * kWordBytes);
  machine::bulk_load(buffer + into, reinterpret_cast<const void*>(range.begin), bytes, full);
}

#endif  // PAPO_HAS_CLUSTERS

}  // namespace cuda
}  // namespace papo
