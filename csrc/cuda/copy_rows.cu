#include "copy_rows.h"

#include "tile.h"

namespace milkernels {
namespace {

// The row of a thread, and the first of its eight columns.
struct Place {
  int64_t r;
  int c;
};
__device__ inline Place place_of_thread(int width) {
  const int across = ceil_div(width, kUnitsTogether);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  return {i / across, static_cast<int>(i % across) * kUnitsTogether};
}
// Blocks for them.
inline dim3 grid_of(int64_t count, int width) {
  return dim3(static_cast<unsigned>(ceil_div(count * ceil_div(width, kUnitsTogether), int64_t{kThreads})));
}

// What is dropped is selected away: it may be infinite.
template <typename A>
__device__ inline void drop(A (&value)[kUnitsTogether], const Dropped& dropped, int64_t row, int c,
                            DropoutBranch branch) {
  if (dropped.seed == nullptr) return;
  const unsigned kept = dropped.kept(row, c, branch);
  const A scale = dropped.template scale<A>();
#pragma unroll
  for (int j = 0; j < kUnitsTogether; ++j) value[j] = kept >> j & 1 ? value[j] * scale : A(0);
}

template <typename T, typename E>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(CopyRows<T, E> p) {
  using A = acc_t<T>;
  const auto [r, c] = place_of_thread(p.width);
  if (r >= p.numbers.count) return;
  const int64_t row = p.numbers.at(r);
  const bool real = p.numbers.real(row);
  A value[kUnitsTogether] = {};
  if (real) load_columns(value, p.x + r * p.stride, c, p.width);
  drop(value, p.dropped, row, c, p.branch);
  if (p.z != nullptr) {
    A z[kUnitsTogether];
    load_columns(z, p.z + r * p.width, c, p.width);
#pragma unroll
    for (int j = 0; j < kUnitsTogether; ++j) value[j] *= activation_gradient(z[j], z[j], p.activation);
  }
  store_columns(p.out + r * p.width, value, c, p.width);
}

template <typename E>
__global__ void __launch_bounds__(kThreads) embed_kernel(EmbedRows<E> p) {
  using A = acc_t<E>;
  const auto [r, c] = place_of_thread(p.width);
  if (r >= p.numbers.count) return;
  const int64_t row = p.numbers.at(r);
  A value[kUnitsTogether] = {}, argument[kUnitsTogether] = {};
  if (p.numbers.real(row)) {
    A bias[kUnitsTogether] = {};
    load_columns(value, p.z + r * p.width, c, p.width);
    if (p.bias != nullptr) load_columns(bias, p.bias, c, p.width);
#pragma unroll
    for (int j = 0; j < kUnitsTogether; ++j) {
      const A z = value[j] + bias[j];
      value[j] = activate(z, p.activation);
      argument[j] = p.activation == Activation::kGelu ? z : value[j];
    }
    drop(value, p.dropped, row, c, DropoutBranch::kEmbedding);
  }
  store_columns(p.out + r * p.width, value, c, p.width);
  if (p.gradient) store_columns(p.z + r * p.width, argument, c, p.width);
}

}  // namespace

template <typename T, typename E>
void copy_rows(const CopyRows<T, E>& p, cudaStream_t stream) {
  if (p.numbers.count == 0) return;
  launch<copy_rows_kernel<T, E>>(grid_of(p.numbers.count, p.width), kThreads, 0, stream, p);
}

template <typename E>
void embed_rows(const EmbedRows<E>& p, cudaStream_t stream) {
  if (p.numbers.count == 0) return;
  launch<embed_kernel<E>>(grid_of(p.numbers.count, p.width), kThreads, 0, stream, p);
}

template void copy_rows(const CopyRows<double, double>&, cudaStream_t);
#define MILKERNELS_COPY_ROWS(T)                                        \
  template void copy_rows(const CopyRows<T, float>&, cudaStream_t);    \
  template void copy_rows(const CopyRows<T, bfloat16>&, cudaStream_t); \
  template void copy_rows(const CopyRows<T, float16>&, cudaStream_t);
MILKERNELS_COPY_ROWS(float)
MILKERNELS_COPY_ROWS(bfloat16)
MILKERNELS_COPY_ROWS(float16)
#undef MILKERNELS_COPY_ROWS
template void embed_rows(const EmbedRows<float>&, cudaStream_t);
template void embed_rows(const EmbedRows<double>&, cudaStream_t);
template void embed_rows(const EmbedRows<bfloat16>&, cudaStream_t);
template void embed_rows(const EmbedRows<float16>&, cudaStream_t);

}  // namespace milkernels
