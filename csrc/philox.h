// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) as the dropout mask of every backend uses it.
#pragma once

#include <cstdint>

#include "online_softmax.h"  // MILKERNELS_HOST_DEVICE

namespace milkernels {

enum class DropoutBranch : uint32_t { kActivation = 0, kSigmoid = 1, kValue = 2, kEmbedding = 3 };

// Lanes run side by side so that the compiler vectorises the loop over them; LANES = 1 is the scalar form.
// Counter words c0..c3 come in, random words go out.
template <int LANES>
MILKERNELS_HOST_DEVICE inline void philox(uint64_t seed, uint32_t* c0, uint32_t* c1, uint32_t* c2, uint32_t* c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < LANES; ++i) {
      const uint64_t a = uint64_t{0xD2511F53u} * c0[i], b = uint64_t{0xCD9E8D57u} * c2[i];
      const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(b);
      c3[i] = static_cast<uint32_t>(a);
      c0[i] = n0;
      c2[i] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Units are dropped when their 16-bit lane is below round(p * 2^16); kept ones are scaled so that the mean stays.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // 0: no dropout
  double scale = 1.;

  Dropout() = default;
  Dropout(uint64_t seed, double p) : seed(seed), threshold(static_cast<uint32_t>(p * 65536.0 + 0.5)) {
    scale = threshold < 65536u ? 65536.0 / (65536.0 - threshold) : 0.;
  }
  explicit operator bool() const { return threshold > 0; }
};

}  // namespace milkernels
