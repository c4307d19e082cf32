#include "copy_rows.h"

#include "tile.h"

namespace milkernels {
namespace {

constexpr int kColumns = 8;  // of a thread: two vectors of 16 bytes, or one of a half type

template <typename T, typename E>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(CopyRows<T, E> p) {
  const int width = p.rows.width, across = ceil_div(width, kColumns);
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, r = i / across;
  if (r >= p.count) return;
  const int c = static_cast<int>(i % across) * kColumns;
  acc_t<T> value[kColumns] = {};
  if (p.mask == nullptr || p.mask[p.first + r]) load_columns(value, p.rows.x + r * p.rows.stride, c, width);
  store_columns(p.out + r * width, value, c, width);
}

}  // namespace

template <typename T, typename E>
void copy_rows(const CopyRows<T, E>& p, cudaStream_t stream) {
  const int64_t threads = p.count * ceil_div(p.rows.width, kColumns);
  if (threads == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(threads, int64_t{kThreads})));
  launch<copy_rows_kernel<T, E>>(grid, kThreads, 0, stream, p);
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

}  // namespace milkernels
