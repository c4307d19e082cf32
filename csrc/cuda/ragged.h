// Bags back to back, as kernels see them: rows of x, and the schedule. Rows are cut into chunks of 2^shift; a segment
// is what one bag has in one chunk. Bag b owns the slots from (its first row >> shift) + b on, so that segments of a
// bag follow each other and no two share a slot: as in cpu/pool.h and milkernels/bags.py.
#pragma once

#include "device.h"

namespace milkernels {

template <typename T>
struct Rows {
  const T* x;
  int64_t stride;  // of a row, in numbers
  int width;
  int copy;  // bytes of an asynchronous copy: what addresses, strides and the width are multiples of; 2: none is
};

struct Range {
  int64_t begin, end;
  __device__ int64_t size() const { return end > begin ? end - begin : 0; }
};

struct Segment {
  int bag;
  int64_t begin, end;  // of its rows; none where begin >= end
};

struct Bags {
  const void* offsets = nullptr;  // [count + 1] of int64 or int32; null: one bag
  bool wide = true;               // int64
  int count = 1;
  int shift = 0;
  int64_t rows = 0;
  const bool* mask = nullptr;  // [rows], or null: all are real

  int64_t chunk() const { return int64_t{1} << shift; }
  // Each bag lies in one chunk, so that nothing has to be put together; its only slot is its own number.
  __host__ __device__ bool whole() const { return (int64_t{1} << shift) >= rows; }
  int64_t slots() const { return whole() ? count : ceil_div(rows, chunk()) + count; }

  // The slots that rows [first, first + count) may have a part in.
  __host__ __device__ int64_t first_slot(int64_t first) const { return whole() ? 0 : first >> shift; }
  int64_t slots_in(int64_t first, int64_t rows_in) const {
    return whole() ? count : ((first + rows_in - 1) >> shift) - (first >> shift) + count;
  }

  // Whatever the offsets say, no row outside x is touched.
  __device__ int64_t offset(int bag) const {
    const int64_t at = wide ? static_cast<const int64_t*>(offsets)[bag] : static_cast<const int32_t*>(offsets)[bag];
    return smaller(larger(at, int64_t{0}), rows);
  }
  __device__ Range range(int bag) const {
    if (offsets == nullptr) return {0, rows};
    return {offset(bag), offset(bag + 1)};
  }
  __device__ bool real(int64_t row) const { return mask == nullptr || mask[row]; }

  // The slots of a bag; empty where it has no rows.
  __device__ Range slots_of(int bag) const {
    const Range r = range(bag);
    const int64_t first = whole() ? bag : (r.begin >> shift) + bag;
    return {first, r.end <= r.begin ? first : whole() ? first + 1 : ((r.end - 1) >> shift) + bag + 1};
  }

  // The segment of a slot. All lanes of a warp ask together: each step they look at 32 bags.
  __device__ Segment segment(int64_t slot) const {
    if (whole()) {
      const Range r = range(static_cast<int>(slot));
      return {static_cast<int>(slot), r.begin, r.end};
    }
    int low = 0, high = count;  // the bag sought is in [low, high): the last that begins at this slot or before
    while (high - low > 1) {
      const int step = ceil_div(high - low, kWarp), bag = low + lane_index() * step;
      const bool before = bag < high && (offsets == nullptr || (offset(bag) >> shift) + bag <= slot);
      // Lane 0 holds by construction, so that offsets that are wrong do no worse than to find another bag.
      const int last = larger(__popc(__ballot_sync(kAllLanes, before)), 1) - 1;
      high = smaller(low + (last + 1) * step, high);
      low += last * step;
    }
    const Range r = range(low);
    const int64_t chunk = (slot - low) << shift;
    return {low, larger(r.begin, chunk), smaller(r.end, chunk + (int64_t{1} << shift))};
  }
};

}  // namespace milkernels
