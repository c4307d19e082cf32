// Activations of hidden units, their derivatives, and the units that dropout drops.
#pragma once

#include "../activation.h"
#include "device.h"

namespace milkernels {

template <typename A>
__device__ inline A sigmoid(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

// The activation is the same in all threads, so that asking for it costs next to nothing.
template <typename A>
__device__ inline A activate(A x, Activation f) {
  if (f == Activation::kTanh) return std::tanh(x);
  if (f == Activation::kRelu) return x < 0 ? A(0) : x;
  if (f == Activation::kGelu) return A(0.5) * x * (A(1) + std::erf(x * A(0.70710678118654752440)));
  return x;
}

// The derivative at x, where the activation is y.
template <typename A>
__device__ inline A activation_gradient(A x, A y, Activation f) {
  if (f == Activation::kTanh) return A(1) - y * y;
  if (f == Activation::kRelu) return x > 0 ? A(1) : A(0);
  if (f == Activation::kGelu) {
    const A distribution = A(0.5) * (A(1) + std::erf(x * A(0.70710678118654752440)));
    return distribution + x * A(0.39894228040143267794) * std::exp(A(-0.5) * x * x);
  }
  return A(1);
}

constexpr int kUnitsTogether = 8;  // that share random bits

// Dropout as kernels take it: the seed stays on the device.
struct Dropped {
  const int64_t* seed = nullptr;  // null: nothing is dropped
  uint32_t threshold = 0;         // of 65536

  // Units that are kept are multiplied by this; none is kept where the threshold is 65536.
  template <typename A>
  __device__ A scale() const {
    return A(65536) / static_cast<A>(larger(65536 - static_cast<int>(threshold), 1));
  }

  // Bit u: unit `unit` + u is kept, for the 8 units from a multiple of 8 on; all are without dropout.
  __device__ unsigned kept(int64_t row, int unit, DropoutBranch branch) const {
    if (seed == nullptr) return 0xff;
    uint32_t word[4] = {static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                        static_cast<uint32_t>(unit) / kUnitsTogether, static_cast<uint32_t>(branch)};
    philox<1>(static_cast<uint64_t>(*seed), word, word + 1, word + 2, word + 3);
    unsigned bits = 0;
#pragma unroll
    for (int u = 0; u < kUnitsTogether; ++u) {
      bits |= static_cast<unsigned>((word[u / 2] >> u % 2 * 16 & 0xffff) >= threshold) << u;
    }
    return bits;
  }
};

}  // namespace milkernels
