// The running softmax that every driver uses, on the host and on the device.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define MILKERNELS_HOST_DEVICE __host__ __device__
#else
#define MILKERNELS_HOST_DEVICE
#endif

namespace milkernels {

// The largest score seen and the sum of exp(score - max). Sums of rows are kept at the same max beside it.
// A state that has seen nothing has sum 0; one that has seen only NaN has max -inf and sum NaN.
template <typename A>
struct SoftmaxState {
  A max = -std::numeric_limits<A>::infinity();
  A sum = A(0);
};

// What sums taken at `from` are multiplied by when the maximum becomes `to`.
template <typename A>
MILKERNELS_HOST_DEVICE inline A rescale(A from, A to) {
  return from == -std::numeric_limits<A>::infinity() ? A(0) : std::exp(from - to);
}

template <typename A>
MILKERNELS_HOST_DEVICE inline A log_sum_exp(const SoftmaxState<A>& s) {
  // The sum is NaN where a score is inf, as its weight is. An empty bag has -inf: -inf + log 0.
  return s.max == std::numeric_limits<A>::infinity() ? s.max : s.max + std::log(s.sum);
}

}  // namespace milkernels
