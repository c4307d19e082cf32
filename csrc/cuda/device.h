// What the kernels are written in: CUDA, or the thin layer of emulator.h that runs the same source on the host, for
// tests. What differs between the two is here, and nowhere else.
#pragma once

#include <cstdint>

#include "../online_softmax.h"
#include "../philox.h"

#ifdef MILKERNELS_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#ifndef __CUDACC__  // the compiler of host code sees what kernels call, and calls nothing of it
#include <device_launch_parameters.h>
unsigned __ballot_sync(unsigned mask, int value);
int __popc(unsigned bits);
size_t __cvta_generic_to_shared(const void* address);
template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int with);
#endif
#endif

namespace milkernels {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;  // of a load or store

// --- Types

#ifdef MILKERNELS_EMULATED
using bfloat16 = c10::BFloat16;
using float16 = c10::Half;
#else
using bfloat16 = __nv_bfloat16;
using float16 = __half;
#endif

// Sums, scores and gradients of scores: float, double for double.
template <typename T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulation<T>::type;

template <typename T>
__device__ inline acc_t<T> widen(T value) {
  return static_cast<acc_t<T>>(value);
}
template <typename T>
__device__ inline T narrow(acc_t<T> value) {
  return static_cast<T>(value);
}

// What one load of 16 bytes holds.
template <typename T>
struct alignas(kVectorBytes) Vec {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T at[kSize];
};

// --- The grid

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }

template <typename I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
template <typename I>
__host__ __device__ constexpr I round_up(I a, I b) {
  return ceil_div(a, b) * b;
}
template <typename N>
__host__ __device__ constexpr N smaller(N a, N b) {
  return b < a ? b : a;
}
template <typename N>
__host__ __device__ constexpr N larger(N a, N b) {
  return a < b ? b : a;
}

template <typename A>
__device__ inline A warp_sum(A value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}
// NaN is passed over, as by fmax.
template <typename A>
__device__ inline A warp_max(A value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, step);
    if (other > value || value != value) value = other;
  }
  return value;
}

// Sums of COUNT numbers (a power of two, 2 to 32) over groups of COUNT lanes: that of value[i] ends in lane i of each.
template <int COUNT, typename A>
__device__ inline A group_sums(const A (&value)[COUNT]) {
  constexpr int kHalf = COUNT / 2;
  const bool upper = (lane_index() & kHalf) != 0;
  A sum[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    sum[i] =
        (upper ? value[i + kHalf] : value[i]) + __shfl_xor_sync(kAllLanes, upper ? value[i] : value[i + kHalf], kHalf);
  }
  if constexpr (kHalf > 1) {
    return group_sums(sum);
  } else {
    return sum[0];
  }
}

// Such sums over the warp take COUNT - 1 + log2(32 / COUNT) shuffles instead of 5 COUNT.
template <int COUNT, typename A>
__device__ inline A warp_sums(const A (&value)[COUNT]) {
  A sum = group_sums(value);
#pragma unroll
  for (int step = COUNT; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// --- Asynchronous copies into shared memory: BYTES is 4, 8 or 16, and what both addresses are multiples of.

#ifndef MILKERNELS_EMULATED

// `from` is not read where `used` is false: zeros are written.
template <int BYTES>
__device__ inline void copy_async(void* to, const void* from, bool used) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int size = used ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(from), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared), "l"(from), "n"(BYTES), "r"(size)
                 : "memory");
  }
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Until all but the PENDING latest groups of this thread's copies have arrived.
template <int PENDING>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Aligned as vectors are.
#define MILKERNELS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("milkernels: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Bytes of shared memory that a block can have on this device.
inline int64_t shared_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Shared memory of more than this is asked for by an attribute of the kernel.
constexpr int kSharedWithoutAsking = 48 << 10;

#ifdef __CUDACC__
template <auto KERNEL, typename... Args>
void launch(dim3 grid, int threads, int64_t shared, cudaStream_t stream, const Args&... args) {
  if (shared > kSharedWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(KERNEL), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          "cudaFuncSetAttribute");
  }
  KERNEL<<<grid, threads, shared, stream>>>(args...);
  check(cudaGetLastError(), "launch");
}
#endif

#endif

}  // namespace milkernels
