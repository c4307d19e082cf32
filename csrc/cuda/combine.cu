// Partial results of the segments of a bag, put together in the order of their slots.
#include "pool.h"

namespace milkernels {
namespace {

constexpr int kColumns = 32, kLanes = 8, kCombiners = kColumns * kLanes;  // of a block: so many threads share a column

template <typename A>
__global__ void __launch_bounds__(kCombiners)
    combine_kernel(Bags bags, int heads, int width, Merge merge, Partials<A> partials, A* out, A* out_total) {
  MILKERNELS_SHARED(memory);
  A* const parts = reinterpret_cast<A*>(memory);  // [2, kLanes, kColumns]
  A* const totals = parts + kLanes * kColumns;
  const int64_t of_bag = blockIdx.x;
  const int k = static_cast<int>(of_bag % heads), bag = static_cast<int>(of_bag / heads);
  const int c = static_cast<int>(blockIdx.y) * kColumns + lane_index(), part = warp_index();
  const Range slots = bags.slots_of(bag);
  constexpr A kDead = -std::numeric_limits<A>::infinity();
  A top = kDead;
  if (merge == Merge::kSoftmax) {
    for (int64_t s = slots.begin + threadIdx.x; s < slots.end; s += kCombiners) {
      top = larger(top, partials.top[s * heads + k]);
    }
    parts[threadIdx.x] = top;
    __syncthreads();
    for (int i = 0; i < kLanes; ++i) top = larger(top, parts[i * kColumns + lane_index()]);
    top = warp_max(top);
    __syncthreads();
  }
  A total = 0, sum = 0;
#pragma unroll 4
  for (int64_t s = slots.begin + part; s < slots.end; s += kLanes) {
    const A of_part = partials.total[s * heads + k];
    const A scale = merge == Merge::kSoftmax ? rescale(partials.top[s * heads + k], top == kDead ? A(0) : top) : A(1);
    total += of_part * scale;
    // A part in which no row counts has sums of 0, whatever its scale.
    if (c < width) sum += partials.sum[(s * heads + k) * width + c] * scale;
  }
  parts[threadIdx.x] = sum;
  totals[threadIdx.x] = total;
  __syncthreads();
  if (part != 0) return;
  for (int i = 1; i < kLanes; ++i) {
    sum += parts[i * kColumns + lane_index()];
    total += totals[i * kColumns + lane_index()];
  }
  if (c < width) out[of_bag * width + c] = merge == Merge::kSum || total == 0 ? sum : sum / total;
  if (out_total != nullptr && blockIdx.y == 0 && lane_index() == 0) {
    out_total[of_bag] = merge == Merge::kSoftmax ? log_sum_exp(SoftmaxState<A>{top, total}) : total;
  }
}

}  // namespace

template <typename A>
void combine(const Bags& bags, int heads, int width, Merge merge, const Partials<A>& partials, A* out, A* total,
             cudaStream_t stream) {
  if (bags.count == 0 || heads == 0) return;
  const dim3 grid(static_cast<unsigned>(int64_t{bags.count} * heads), ceil_div(width, kColumns));
  launch<combine_kernel<A>>(grid, kCombiners, 2 * kCombiners * sizeof(A), stream, bags, heads, width, merge, partials,
                            out, total);
}

template void combine(const Bags&, int, int, Merge, const Partials<float>&, float*, float*, cudaStream_t);
template void combine(const Bags&, int, int, Merge, const Partials<double>&, double*, double*, cudaStream_t);

}  // namespace milkernels
