// Layers of instances: products by the library, in the type that a call wants them in, of rows that kernels prepare.
#pragma once

#include "call.h"

namespace milkernels {

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
struct Copying {
  Dropped dropped = {};
  Tensor z = {};  // in the accumulation type
  Activation activation = Activation::kIdentity;
  DropoutBranch branch = DropoutBranch::kValue;
};

// The rows of a slice in `type`: masked ones 0, changed as asked.
inline Tensor copied_rows(const Call& call, const Slice& slice, ScalarType type, const Copying& how = {}) {
  const Tensor out = at::empty({slice.x.size(0), slice.x.size(1)}, slice.x.options().dtype(type));
  dispatch(slice.x.scalar_type(), [&]<typename T>() {
    dispatch(type, [&]<typename E>() {
      if constexpr (std::is_same_v<acc_t<T>, acc_t<E>>) {
        const Rows<T> rows = Call::rows_at<T>(slice.x);
        copy_rows(CopyRows<T, E>{call.numbers(slice), rows.x, rows.stride, rows.width, data<E>(out), how.dropped,
                                 how.branch, data<acc_t<T>>(how.z), how.activation},
                  call.stream());
      }
    });
  });
  return out;
}

// A slice's rows for products: a copy where their type is another, or where masked rows of x, which may hold anything,
// must not be multiplied (`clean`); embedded ones are 0.
inline Tensor rows_for_products(const Call& call, const Slice& slice, ScalarType type, bool clean) {
  const bool as_it_is = slice.x.scalar_type() == type && !(clean && call.mask.defined() && !slice.embedded);
  return as_it_is ? slice.x : copied_rows(call, slice, type);
}

// The gradient of what a layer W x + b gives, in the type of its products: on its way to those of W and x.
class LayerGradient {
 public:
  LayerGradient(const Tensor& grad, ScalarType type) : acc_(grad.scalar_type()) {
    if (type == at::kHalf) scale_ = power_of_two_scale(largest(grad));
    scaled_ = (scale_.defined() ? grad * scale_ : grad).to(type);
  }
  // In the accumulation type.
  Tensor of_weight(const Tensor& x) const { return unscaled(product(scaled_.t(), x, acc_)); }
  Tensor of_x(const Tensor& weight) const { return unscaled(product(scaled_, weight, acc_)); }
  // Into `out`, in its type.
  void write_of_x(const Tensor& weight, Tensor out) const {
    if (scale_.defined() || out.scalar_type() != scaled_.scalar_type()) out.copy_(of_x(weight));
    else product_into(out, scaled_, weight);
  }

 private:
  Tensor unscaled(Tensor t) const { return scale_.defined() ? t.div_(scale_) : t; }
  ScalarType acc_;
  Tensor scaled_, scale_;
};

}  // namespace milkernels
