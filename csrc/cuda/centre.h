// The centre of a bag, which its rows are taken less of before their products with the gradients of bag vectors.
#pragma once

#include "tile.h"

namespace milkernels {

// The gradient of a score is  weight (<x - c, grad[k]> - <bag[k] - c, grad[k]>)  for any c: one near the bag vectors
// keeps the digits of features with a mean. All heads of a bag share it, so that rows are read once. It is the shortest
// of the bag vectors: one that is no longer than a head's own costs that head no digit, whatever the others look at.
//
// Writes centre [width, padded with 0 to `padded`], by all threads of the block; `sizes` [heads] is theirs to use. Only
// heads with a living row and a finite vector are asked: nothing of what is NaN in one head reaches another.
template <typename A>
__device__ inline void find_centre(const A* bag, const A* lse, int heads, int width, int padded, A* sizes, A* centre) {
  for (int k = warp_index(); heads > 1 && k < heads; k += warp_count()) {
    A sum = 0;
    for (int c = lane_index(); c < width; c += kWarp) sum += bag[int64_t{k} * width + c] * bag[int64_t{k} * width + c];
    sum = warp_sum(sum);
    const bool usable = sum - sum == 0 && lse[k] - lse[k] == 0;
    if (lane_index() == 0) sizes[k] = usable ? sum : std::numeric_limits<A>::infinity();
  }
  __syncthreads();
  int shortest = 0;
  for (int k = 1; k < heads; ++k) {
    if (sizes[k] < sizes[shortest]) shortest = k;
  }
  for (int c = static_cast<int>(threadIdx.x); c < padded; c += static_cast<int>(blockDim.x)) {
    const A value = c < width ? bag[int64_t{shortest} * width + c] : A(0);
    centre[c] = value - value == 0 ? value : A(0);
  }
  __syncthreads();
}

// <bag[k] - centre, grad[k]>, by a warp, in float64: all rows of a bag share its error, which adds up over them.
template <typename A>
__device__ inline A centre_shift(const A* bag, const A* grad, const A* centre, int k, int width) {
  double sum = 0;
  for (int c = lane_index(); c < width; c += kWarp) {
    sum += (double(bag[int64_t{k} * width + c]) - centre[c]) * grad[int64_t{k} * width + c];
  }
  return static_cast<A>(warp_sum(sum));
}

}  // namespace milkernels
