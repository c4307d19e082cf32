// Runs CUDA kernels on the host, for tests: what the kernels use of CUDA, and no more.
//
// A thread of a block is a fiber. It runs until it has to wait for others, at a barrier of the block or in a shuffle of
// its warp; then the next one runs. What a GPU leaves open is made as unkind as it may be: shared memory starts as NaN,
// asynchronous copies arrive only when they are waited for, and the order in which threads run can be turned around or
// shuffled (set_order): results that change with it were a race. Barriers that some threads never reach end the run
// with an error. Blocks run one after the other. Addresses are the host's, so that AddressSanitizer watches them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace milkernels::emulator {

enum class Order { kForward, kReverse, kShuffled };
void set_order(Order order);
void set_dry(bool on);  // kernels are counted and not run
int64_t launch_count();  // so far, of kernels

struct Thread {
  dim3 thread, block;
};
const Thread& self();
extern dim3 grid_size, block_size;
unsigned char* shared_memory();

void run(dim3 grid, dim3 block, int64_t shared, const std::function<void()>& kernel);
void block_barrier();
void warp_barrier(unsigned mask);
// The lane's 8 bytes to others of its warp: where `from` says they come from.
uint64_t exchange(unsigned mask, uint64_t value, int from);
unsigned ballot(unsigned mask, bool value);
void copy_async(void* to, const void* from, int bytes, bool used);
void commit_copies();
void wait_for_copies(int pending);

template <typename V>
V shuffle(unsigned mask, V value, int from) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = exchange(mask, bits, from);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}

}  // namespace milkernels::emulator

#define threadIdx (::milkernels::emulator::self().thread)
#define blockIdx (::milkernels::emulator::self().block)
#define blockDim (::milkernels::emulator::block_size)
#define gridDim (::milkernels::emulator::grid_size)
#define MILKERNELS_SHARED(name) unsigned char* const name = ::milkernels::emulator::shared_memory()

inline void __syncthreads() { milkernels::emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { milkernels::emulator::warp_barrier(mask); }
inline unsigned __ballot_sync(unsigned mask, bool value) { return milkernels::emulator::ballot(mask, value); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <typename V>
V __shfl_xor_sync(unsigned mask, V value, int with) {
  return milkernels::emulator::shuffle(mask, value, (static_cast<int>(threadIdx.x) & 31) ^ with);
}

namespace milkernels {

template <int BYTES>
void copy_async(void* to, const void* from, bool used) {
  emulator::copy_async(to, from, BYTES, used);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int PENDING>
void wait_for_copies() {
  emulator::wait_for_copies(PENDING);
}

inline int64_t shared_limit() { return 99 << 10; }  // of the GPUs that have the least

template <auto KERNEL, typename... Args>
void launch(dim3 grid, int threads, int64_t shared, cudaStream_t, const Args&... args) {
  emulator::run(grid, dim3(threads), shared, [&] { KERNEL(args...); });
}

}  // namespace milkernels
