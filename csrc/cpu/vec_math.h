// Elementary functions of the gate, on PyTorch's Vectorized so that one source serves every instruction set.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "../activation.h"

namespace milkernels {

using at::vec::fmadd;
using at::vec::Vectorized;

// exp(x) - 1 = scale * p + (scale - 1) and exp(x) = scale * p + scale, with p = exp(r) - 1 for the reduced r. Keeping p
// apart makes both accurate near 0, where tanh needs expm1. float: two-step reduction and degree 7, within 1.5 ulp for
// |x| <= 87; callers clamp (and clamping lets NaN through).
struct ExpParts {
  Vectorized<float> p, scale;
};

inline ExpParts exp_parts(Vectorized<float> x) {
  using V = Vectorized<float>;
  const V n = (x * V(1.44269504f)).round();
  V r = at::vec::fnmadd(n, V(0.693145752f), x);
  r = at::vec::fnmadd(n, V(1.42860677e-6f), r);
  V q = fmadd(r, V(1.9841270e-4f), V(1.3888889e-3f));
  q = fmadd(q, r, V(8.3333333e-3f));
  q = fmadd(q, r, V(4.1666667e-2f));
  q = fmadd(q, r, V(1.6666667e-1f));
  q = fmadd(q, r, V(0.5f));
  const auto bits = (at::vec::convert_to_int_of_same_size(n) + Vectorized<int32_t>(127)) << Vectorized<int32_t>(23);
  return {fmadd(q, r * r, r), at::vec::cast<float>(bits)};
}

inline Vectorized<float> exp_clamped(Vectorized<float> x) {
  const ExpParts e = exp_parts(x);
  return fmadd(e.scale, e.p, e.scale);
}
inline Vectorized<float> expm1_clamped(Vectorized<float> x) {
  const ExpParts e = exp_parts(x);
  return fmadd(e.scale, e.p, e.scale - Vectorized<float>(1.f));
}
inline Vectorized<double> exp_clamped(Vectorized<double> x) { return x.exp(); }
inline Vectorized<double> expm1_clamped(Vectorized<double> x) { return x.expm1(); }

// Largest arguments whose exponentials, multiplied together, stay finite; tanh and sigmoid are flat beyond them.
template <typename A>
struct Range;
template <>
struct Range<float> {
  static constexpr float lowest = -87.f, tanh = 40.f, sigmoid = 30.f;
};
template <>
struct Range<double> {
  static constexpr double lowest = -708., tanh = 80., sigmoid = 300.;
};

// exp of a number that is at most 0, or NaN (softmax weights); 0 where it would not be a normal number.
template <typename A>
inline Vectorized<A> exp_nonpositive(Vectorized<A> x) {
  using V = Vectorized<A>;
  const V lowest(Range<A>::lowest);
  return V::blendv(exp_clamped(at::vec::clamp_min(x, lowest)), V(A(0)), x < lowest);
}

// 1 + exp(-b); sigmoid(b) is its reciprocal.
template <typename A>
inline Vectorized<A> sigmoid_denominator(Vectorized<A> b, Vectorized<A>& e) {
  using V = Vectorized<A>;
  e = exp_clamped(at::vec::clamp(b.neg(), V(Range<A>::lowest), V(Range<A>::sigmoid)));
  return e + V(A(1));
}

// exp(-2a) - 1; tanh(a) = -m / (2 + m).
template <typename A>
inline Vectorized<A> tanh_expm1(Vectorized<A> a) {
  using V = Vectorized<A>;
  return expm1_clamped(at::vec::clamp(a * V(A(-2)), V(Range<A>::lowest), V(Range<A>::tanh)));
}

// The hidden unit g = act(a) or act(a) * sigmoid(b).
template <Activation F, bool GATED, typename A>
inline Vectorized<A> gate(Vectorized<A> a, Vectorized<A> b) {
  using V = Vectorized<A>;
  const V one(A(1)), two(A(2));
  V e, denominator = one, numerator = a;
  if constexpr (GATED) denominator = sigmoid_denominator<A>(b, e);
  if constexpr (F == Activation::kTanh) {
    const V m = tanh_expm1<A>(a);
    return m.neg() / ((two + m) * denominator);
  } else if constexpr (F == Activation::kRelu) {
    numerator = at::vec::clamp_min(a, V(A(0)));
  } else if constexpr (F == Activation::kGelu) {
    numerator = a * V(A(0.5)) * (one + (a * V(A(M_SQRT1_2))).erf());
  }
  if constexpr (GATED) numerator = numerator / denominator;
  return numerator;
}

template <typename A>
struct GateGrad {
  Vectorized<A> g, da, db;  // the hidden unit and its derivatives with respect to a and b
};

template <Activation F, bool GATED, typename A>
inline GateGrad<A> gate_grad(Vectorized<A> a, Vectorized<A> b) {
  using V = Vectorized<A>;
  const V one(A(1)), two(A(2));
  V e, s = one, value, slope;
  if constexpr (F == Activation::kTanh) {  // one division for both factors; 1 - tanh^2 = 4 (1 + m) / (2 + m)^2
    const V m = tanh_expm1<A>(a), n = two + m;
    V d = one;
    if constexpr (GATED) d = sigmoid_denominator<A>(b, e);
    const V r = one / (n * d), inverse_n = d * r;
    value = m.neg() * inverse_n;
    slope = V(A(4)) * (one + m) * inverse_n * inverse_n;
    if constexpr (GATED) s = n * r;
  } else {
    if constexpr (GATED) s = one / sigmoid_denominator<A>(b, e);
    if constexpr (F == Activation::kRelu) {
      value = at::vec::clamp_min(a, V(A(0)));
      slope = V::blendv(V(A(0)), one, a > V(A(0)));
    } else if constexpr (F == Activation::kGelu) {
      const V cdf = V(A(0.5)) * (one + (a * V(A(M_SQRT1_2))).erf());
      const V density = (a * a * V(A(-0.5))).exp() * V(A(0.3989422804014326779));
      value = a * cdf;
      slope = fmadd(a, density, cdf);
    } else {
      value = a;
      slope = one;
    }
  }
  if constexpr (!GATED) return {value, slope, V(A(0))};
  const V g = value * s;
  return {g, slope * s, g * e * s};  // 1 - s = e s, without cancellation
}

}  // namespace milkernels
