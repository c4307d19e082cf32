#include "stage.h"

#include "tile.h"

namespace milkernels {
namespace {

// Eight columns of a row for each thread.
template <typename T, typename E>
__global__ void __launch_bounds__(kThreads) stage_kernel(StageRows<T, E> p) {
  using A = acc_t<T>;
  const int across = ceil_div(p.width, kUnitsTogether);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, r = i / across;
  if (r >= p.count) return;
  const int c = static_cast<int>(i % across) * kUnitsTogether;
  A value[kUnitsTogether] = {};
  if (p.mask == nullptr || p.mask[p.first + r]) load_columns(value, p.x + r * p.stride, c, p.width);
  if (p.dropped.seed != nullptr) {
    // What is dropped is selected away: it may be infinite.
    const unsigned kept = p.dropped.kept(p.first + r, c, DropoutBranch::kValue);
    const A scale = p.dropped.template scale<A>();
#pragma unroll
    for (int j = 0; j < kUnitsTogether; ++j) value[j] = kept >> j & 1 ? value[j] * scale : A(0);
  }
  if (p.z != nullptr) {
    A z[kUnitsTogether];
    load_columns(z, p.z + r * p.width, c, p.width);
#pragma unroll
    for (int j = 0; j < kUnitsTogether; ++j) value[j] *= activation_gradient(z[j], z[j], p.activation);
  }
  store_columns(p.out + r * p.width, value, c, p.width);
}

}  // namespace

template <typename T, typename E>
void stage_rows(const StageRows<T, E>& p, cudaStream_t stream) {
  const int64_t vectors = p.count * ceil_div(p.width, kUnitsTogether);
  if (vectors == 0) return;
  launch<stage_kernel<T, E>>(dim3(static_cast<unsigned>(ceil_div(vectors, int64_t{kThreads}))), kThreads, 0, stream, p);
}

template void stage_rows(const StageRows<double, double>&, cudaStream_t);
#define MILKERNELS_STAGE(T)                                              \
  template void stage_rows(const StageRows<T, float>&, cudaStream_t);    \
  template void stage_rows(const StageRows<T, bfloat16>&, cudaStream_t); \
  template void stage_rows(const StageRows<T, float16>&, cudaStream_t);
MILKERNELS_STAGE(float)
MILKERNELS_STAGE(bfloat16)
MILKERNELS_STAGE(float16)
#undef MILKERNELS_STAGE

}  // namespace milkernels
