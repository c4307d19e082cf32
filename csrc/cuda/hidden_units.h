// Attention's hidden units, eight of a row side by side in a thread.
#pragma once

#include "gate.h"
#include "tile.h"

namespace milkernels {

// Numbers of 8 hidden units side by side.
template <typename A>
using Units = A[kUnitsTogether];

// 8 hidden units of a row: t u, t alone where there is no gate; and with GRADIENT the derivatives of t and u.
template <typename A, bool GATED, bool GRADIENT>
struct HiddenUnits {
  Units<A> t, u, dt, du;

  // From products with V and U, without the biases. What is dropped is selected away: an activation may be infinite.
  __device__ HiddenUnits(const Gate<A>& gate, int64_t row, int unit, const Units<A>& v, const Units<A>& s) {
    unsigned kept_t = 0xff, kept_u = 0xff;
    A scale = 1;
    if (gate.dropped.seed != nullptr) {
      scale = gate.dropped.template scale<A>();
      kept_t = gate.dropped.kept(row, unit, DropoutBranch::kActivation);
      if constexpr (GATED) kept_u = gate.dropped.kept(row, unit, DropoutBranch::kSigmoid);
    }
    Units<A> bias = {};
    if (gate.v_bias != nullptr) load_columns(bias, gate.v_bias, unit, gate.hidden);
#pragma unroll
    for (int i = 0; i < kUnitsTogether; ++i) {
      const A z = v[i] + bias[i], value = activate(z, gate.activation);
      const bool kept = kept_t >> i & 1;
      t[i] = kept ? value * scale : A(0);
      if constexpr (GRADIENT) dt[i] = kept ? activation_gradient(z, value, gate.activation) * scale : A(0);
    }
    if constexpr (GATED) {
#pragma unroll
      for (int i = 0; i < kUnitsTogether; ++i) bias[i] = 0;
      if (gate.u_bias != nullptr) load_columns(bias, gate.u_bias, unit, gate.hidden);
#pragma unroll
      for (int i = 0; i < kUnitsTogether; ++i) {
        const A value = sigmoid(s[i] + bias[i]);
        const bool kept = kept_u >> i & 1;
        u[i] = kept ? value * scale : A(0);
        if constexpr (GRADIENT) du[i] = kept ? value * (A(1) - value) * scale : A(0);
      }
    }
  }
  __device__ A at(int i) const {
    if constexpr (GATED) return t[i] * u[i];
    return t[i];
  }
  // The gradients of the products, from those of the units.
  __device__ A of_v(int i, A gradient) const {
    if constexpr (GATED) gradient *= u[i];
    return gradient * dt[i];
  }
  __device__ A of_u(int i, A gradient) const { return gradient * t[i] * du[i]; }
};

}  // namespace milkernels
