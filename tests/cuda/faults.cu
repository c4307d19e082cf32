// Kernels with one fault each, for the emulator to show: the program runs the one that is named, with threads in the
// order that is named, and prints what it computes. Without a fault that is 0 + 1 + ... + 63, whatever the order.
#include "cuda/device.h"

#include <cstdio>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

namespace milkernels {
namespace {

constexpr int kCount = 64;  // threads, and numbers

enum class Fault {
  kNone,
  kBarrierMissing,     // neighbours read what may not have been written
  kBarrierTooLate,     // a number is overwritten that a neighbour may not have read
  kBarrierDivergent,   // half of the threads wait at a barrier, the others in a shuffle
  kShuffleDivergent,   // half of a warp has left when the others shuffle
  kCopyNotWaitedFor,   // asynchronous copies are read before they have arrived
  kCopyWaitedForLate,  // the same, of the latest of two groups
  kCopyNotCommitted,   // at the end of the kernel
  kCopyMisaligned,     // 8 bytes to an odd multiple of 4
  kVectorMisaligned,   // a load of 16 bytes from a multiple of 4
  kSharedRead,         // one number past shared memory
  kSharedWrite,
  kGlobalRead,  // one number past an array
};

const char* const kNames[] = {
    "none",          "barrier-missing",  "barrier-too-late", "barrier-divergent", "shuffle-divergent",
    "copy-unwaited", "copy-waited-late", "copy-uncommitted", "copy-misaligned",   "vector-misaligned",
    "shared-read",   "shared-write",     "global-read"};

template <Fault FAULT>
__global__ void sum_kernel(const float* in, float* out) {
  MILKERNELS_SHARED(memory);
  float* const numbers = reinterpret_cast<float*>(memory);
  const int t = static_cast<int>(threadIdx.x);
  // Two groups of copies for each thread, of the lower and of the upper half.
  if (FAULT == Fault::kCopyMisaligned) copy_async<8>(numbers + 1, in, true);
  if (t < kCount / 2) copy_async<4>(numbers + t, in + t, true);
  commit_copies();
  if (t >= kCount / 2) copy_async<4>(numbers + t, in + t, true);
  commit_copies();
  if (FAULT == Fault::kCopyNotCommitted) copy_async<4>(numbers + t, in + t, true);
  if (FAULT == Fault::kCopyWaitedForLate) wait_for_copies<1>();
  else if (FAULT != Fault::kCopyNotWaitedFor) wait_for_copies<0>();
  if (FAULT == Fault::kBarrierDivergent) {
    if (t % 2 == 0) __syncthreads();
    else numbers[t] = __shfl_xor_sync(kAllLanes, numbers[t], 1);
  }
  if (FAULT == Fault::kShuffleDivergent && t % kWarp >= kWarp / 2) return;
  if (FAULT != Fault::kBarrierMissing) __syncthreads();
  float number = numbers[(t + 1) % kCount];
  if (FAULT == Fault::kBarrierTooLate) numbers[t] = number;
  if (FAULT == Fault::kVectorMisaligned) number += reinterpret_cast<const Vec<float>*>(numbers + 1)->at[0];
  if (FAULT == Fault::kSharedRead && t == 0) number += numbers[kCount];
  if (FAULT == Fault::kSharedWrite && t == 0) numbers[kCount] = number;
  if (FAULT == Fault::kGlobalRead && t == 0) number += in[kCount];
  const float sum = warp_sum(number);
  __syncthreads();
  if (lane_index() == 0) numbers[warp_index()] = sum;
  __syncthreads();
  if (t == 0) *out = numbers[0] + numbers[1];
}

template <Fault FAULT>
bool run(const std::string& name, const float* in, float* out) {
  if (name != kNames[static_cast<int>(FAULT)]) return false;
  launch<sum_kernel<FAULT>>(dim3(1), kCount, kCount * sizeof(float), nullptr, in, out);
  return true;
}

template <int... FAULTS>
bool run_any(std::integer_sequence<int, FAULTS...>, const std::string& name, const float* in, float* out) {
  return (run<static_cast<Fault>(FAULTS)>(name, in, out) || ...);
}

}  // namespace
}  // namespace milkernels

int main(int, char** given) {
  using namespace milkernels;
  const std::string name = given[1], order = given[2];
  emulator::set_order(order == "reverse"    ? emulator::Order::kReverse
                      : order == "shuffled" ? emulator::Order::kShuffled
                                            : emulator::Order::kForward);
  float* const in = new float[kCount];
  float out = -1;
  for (int i = 0; i < kCount; ++i) in[i] = static_cast<float>(i);
  try {
    if (name == "grid-empty") launch<sum_kernel<Fault::kNone>>(dim3(0), kCount, 256, nullptr, in, &out);
    else if (name == "half-warp") launch<sum_kernel<Fault::kNone>>(dim3(1), kWarp / 2, 256, nullptr, in, &out);
    else if (!run_any(std::make_integer_sequence<int, std::size(kNames)>(), name, in, &out)) return 2;
    std::printf("%g\n", static_cast<double>(out));
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  delete[] in;
  return 0;
}
