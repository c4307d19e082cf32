// Layers of instances: products by the library, in the type that a call wants them in, of rows that kernels prepare.
#pragma once

#include "call.h"

namespace milkernels {

// The type in which products with rows of that type run.
inline ScalarType product_type(ScalarType rows, std::optional<ScalarType> compute_dtype) {
  const ScalarType type = rows == at::kDouble || !compute_dtype ? rows : *compute_dtype;
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                   "compute_dtype must be float16, bfloat16 or float32; got ", type);
  return type;
}

// What drops a share p of the units; holds the seed, which stays on the device.
struct DropoutTensors {
  DropoutTensors(const CallTensors& call, const OptionalTensor& seed, double p) {
    if (!call.drops(seed, p)) return;
    threshold = static_cast<uint32_t>(p * 65536 + 0.5);
    if (threshold > 0) this->seed = *seed;
  }
  Dropped typed() const { return {seed.defined() ? seed.const_data_ptr<int64_t>() : nullptr, threshold}; }

  Tensor seed;
  uint32_t threshold = 0;  // of 65536
};

// a b by the library, in `type`: half types accumulate in float32 and need not be rounded.
inline Tensor product(const Tensor& a, const Tensor& b, ScalarType type) {
#ifdef MILKERNELS_EMULATED
  // Products of half types on a CPU may read into the next row, NaN or not.
  const ScalarType acc = accumulation_type(a);
  return at::mm(a.to(acc), b.to(acc)).to(type);
#else
  return type == a.scalar_type() ? at::mm(a, b) : at::mm(a, b, type);
#endif
}

// Writes that product into `out`, which has their type.
inline void product_into(Tensor out, const Tensor& a, const Tensor& b) {
#ifdef MILKERNELS_EMULATED
  out.copy_(product(a, b, out.scalar_type()));
#else
  at::mm_out(out, a, b);
#endif
}

// Adds it to what is in `out`.
inline void add_product(Tensor out, const Tensor& a, const Tensor& b) {
#ifdef MILKERNELS_EMULATED
  out.copy_(product(a, b, accumulation_type(a)).add_(out));
#else
  at::addmm_out(out, out, a, b);
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

// Rows [first, first + count) for products: a copy where their type is another, or where masked rows, which may hold
// anything, must not be multiplied (`clean`).
inline Tensor rows_for_products(const Call& call, int64_t first, int64_t count, ScalarType type, bool clean) {
  const Tensor x = call.x.narrow(0, first, count);
  if (x.scalar_type() == type && !(clean && call.mask.defined())) return x;
  const Tensor out = at::empty({count, call.width}, x.options().dtype(type));
  dispatch(x.scalar_type(), [&]<typename T>() {
    dispatch(type, [&]<typename E>() {
      if constexpr (std::is_same_v<acc_t<T>, acc_t<E>>) {
        copy_rows(CopyRows<T, E>{Call::rows_at<T>(x), data<const bool>(call.mask), first, count, data<E>(out)},
                  call.stream());
      }
    });
  });
  return out;
}

}  // namespace milkernels
