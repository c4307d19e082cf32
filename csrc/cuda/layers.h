// Layers of instances: products by the library, in the type that a call wants them in, of rows that kernels prepare.
#pragma once

#include <string_view>

#include "call.h"
#include "stage.h"

namespace milkernels {

inline Activation activation_of(std::string_view name) {
  if (name == "tanh") return Activation::kTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  TORCH_CHECK_VALUE(name == "identity", "activation must be tanh, relu, gelu or identity; got ", name);
  return Activation::kIdentity;
}

// In what the products of rows run.
inline ScalarType product_type(const Call& call, std::optional<ScalarType> compute_dtype) {
  const ScalarType type = call.acc == at::kDouble || !compute_dtype ? call.x.scalar_type() : *compute_dtype;
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                   "compute_dtype must be float16, bfloat16 or float32; got ", type);
  return type;
}

// What drops a share p of the units; holds the seed, which stays on the device.
struct DropoutTensors {
  DropoutTensors(const Call& call, const OptionalTensor& seed, double p) {
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, "the share that is dropped must be in [0, 1]; got ", p);
    threshold = static_cast<uint32_t>(p * 65536 + 0.5);
    if (threshold == 0) return;
    TORCH_CHECK_VALUE(seed && seed->numel() == 1 && seed->scalar_type() == at::kLong && call.here(*seed),
                      "dropout needs a seed: an int64 tensor of one element on ", call.x.device());
    this->seed = *seed;
  }
  explicit operator bool() const { return seed.defined(); }
  Dropped typed() const { return {data<int64_t>(seed), threshold}; }

  Tensor seed;
  uint32_t threshold;  // of 65536
};

// a b by the library, in `type`: half types accumulate in float32 and need not be rounded.
inline Tensor product(const Tensor& a, const Tensor& b, ScalarType type) {
#ifdef MILKERNELS_EMULATED
  // Products of half types on a CPU may read into the next row, NaN or not.
  const ScalarType acc = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::mm(a.to(acc), b.to(acc)).to(type);
#else
  return type == a.scalar_type() ? at::mm(a, b) : at::mm(a, b, type);
#endif
}

// The same into `out`, which has their type.
inline void product_into(Tensor out, const Tensor& a, const Tensor& b) {
#ifdef MILKERNELS_EMULATED
  out.copy_(product(a, b, out.scalar_type()));
#else
  at::mm_out(out, a, b);
#endif
}

// What gradients of at most `bound` are multiplied by so that the largest come to about 2^12 in float16, or to
// `headroom` bits less: of 100,000 rows most would be 0 there otherwise. A power of two, which costs no digit.
inline Tensor power_of_two_scale(const Tensor& bound, int headroom = 0) {
  const Tensor exponent = (12 - headroom - bound.log2().ceil()).clamp(-40, 100);
  return at::where(bound > 0, exponent.exp2(), at::ones_like(bound));
}

// The largest finite size; 0 of nothing.
inline Tensor largest(const Tensor& t) {
  return t.numel() > 0 ? t.nan_to_num(0, 0, 0).abs().amax() : at::zeros({}, t.options());
}

// What is done to rows on their way besides a change of type.
struct Staging {
  Dropped dropped = {};
  Tensor z = {};  // in the accumulation type
  Activation activation = Activation::kIdentity;
};

// Rows [first, first + from's) of x, or others in their place, in `type`: masked ones 0, staged as asked.
inline Tensor staged(const Call& call, const Tensor& from, int64_t first, ScalarType type, const Staging& how = {}) {
  const Tensor out = at::empty({from.size(0), from.size(1)}, from.options().dtype(type));
  dispatch(from.scalar_type(), [&]<typename T>() {
    dispatch(type, [&]<typename E>() {
      if constexpr (std::is_same_v<acc_t<T>, acc_t<E>>) {
        const Rows<T> rows = Call::rows_at<T>(from);
        stage_rows(StageRows<T, E>{rows.x, rows.stride, first, from.size(0), rows.width, data<bool>(call.mask),
                                   data<E>(out), how.dropped, data<acc_t<T>>(how.z), how.activation},
                   call.stream());
      }
    });
  });
  return out;
}

// The slice's rows of x for products: a copy where their type is another, or where masked rows, which may hold anything,
// must not be multiplied (`clean`).
inline Tensor rows_for_products(const Call& call, int64_t first, int64_t count, ScalarType type, bool clean) {
  const Tensor part = call.x.narrow(0, first, count);
  const bool as_it_is = call.x.scalar_type() == type && !(clean && call.mask.defined());
  return as_it_is ? part : staged(call, part, first, type);
}

}  // namespace milkernels
