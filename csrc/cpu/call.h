// The tensors of a call, checked so that nothing is read out of bounds whatever Python passed.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <initializer_list>
#include <optional>
#include <string_view>

#include "../arguments.h"
#include "cpu.h"
#include "layer.h"
#include "query_score.h"

namespace milkernels {

inline Activation parse_activation(std::string_view name) {
  if (name == "tanh") return Activation::kTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  TORCH_CHECK_VALUE(name == "identity", "activation must be tanh, relu, gelu or identity; got ", name);
  return Activation::kIdentity;
}

inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <typename A>
const A* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<A>() : nullptr;
}

// A backward is told which gradients are needed: ValueError for that of a parameter which is not there.
inline void check_need(bool need, bool given, const char* name) {
  TORCH_CHECK_VALUE(given || !need, "needs says that ", name, " wants a gradient, but ", name, " is absent");
}

// The layer in front of an op, checked and in the accumulation type.
struct Embedding {
  Tensor weight, bias;  // [width, width of x], [width] or undefined
  ScalarType weight_type, bias_type;  // in which they came
  Activation activation = Activation::kIdentity;
  Dropout dropout;
  int planes = 0;  // of its products

  explicit operator bool() const { return weight.defined(); }
  // In what its rows are made: bfloat16 where their products are, as eager PyTorch would have them.
  ScalarType rows_type(ScalarType acc) const { return planes == 1 ? at::kBFloat16 : acc; }
  template <typename E>
  Layer<E> layer(int64_t in) const {
    using A = acc_t<E>;
    return {weight.const_data_ptr<A>(), data_or_null<A>(bias), weight.size(0), in, activation, std::max(planes, 1)};
  }
};

// What every op has: instances, bags, mask.
class Call {
 public:
  Call(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask, const EmbedArguments& embed = {})
      : x(rows_of(x)), acc(accumulation_type(x)), rows(x.size(0)), width(x.size(1)),
        offsets(checked_offsets(offsets, rows)) {
    TORCH_CHECK_VALUE(width > 0, "x must have at least one column; got ", x.sizes());
    if (embed.weight) take_embedding(embed);
    if (mask) {
      TORCH_CHECK_VALUE(mask->scalar_type() == at::kBool && mask->dim() == 1 && mask->size(0) == rows && mask->is_cpu(),
                        "mask must be bool [", rows, "]; got ", mask->scalar_type(), " ", mask->sizes());
      this->mask = mask->contiguous();
    }
  }

  int64_t bags() const { return static_cast<int64_t>(offsets.size()) - 1; }
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, x.options().dtype(acc)); }
  // A gradient to fill, in the type of x or of accumulation; an empty tensor where nobody needs it.
  Tensor grad_x(bool need) const { return at::empty(need ? x.sizes() : at::IntArrayRef({0}), x.options()); }
  Tensor gradient(bool need, at::IntArrayRef sizes) const { return need ? empty(sizes) : empty({0}); }

  template <typename T>
  Ragged<T> ragged() const {  // as x lies
    const int64_t width = x.size(1);
    return {x.const_data_ptr<T>(), rows > 1 ? x.stride(0) : width, width, rows, data_or_null<bool>(mask), offsets};
  }

  // A tensor of these sizes, contiguous and in the accumulation type; undefined where it is absent.
  Tensor take(const OptionalTensor& t, const char* name, at::IntArrayRef sizes) const {
    if (!t) return {};
    TORCH_CHECK_VALUE(t->is_cpu() && t->sizes() == sizes, name, " must be ", sizes, " on the CPU; got ", t->sizes(),
                      " on ", t->device());
    return t->to(acc).contiguous();
  }
  // Takes indices likewise: they are int64, -1 or rows of x.
  Tensor take_indices(const Tensor& t, const char* name, at::IntArrayRef sizes) const {
    TORCH_CHECK_VALUE(t.is_cpu() && t.scalar_type() == at::kLong && t.sizes() == sizes, name, " must be int64 ", sizes,
                      " on the CPU; got ", t.scalar_type(), " ", t.sizes());
    const Tensor indices = t.contiguous();
    const int64_t* const p = indices.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < indices.numel(); ++i) {
      TORCH_CHECK_VALUE(p[i] >= -1 && p[i] < rows, name, " must be rows of x or -1; got ", p[i]);
    }
    return indices;
  }

  Tensor x;
  ScalarType acc;  // of scores, sums and gradients
  int64_t rows, width;  // as the op sees them: behind an embedding, where there is one
  Embedding embedding;
  Tensor mask;
  std::vector<int64_t> offsets;

 private:
  void take_embedding(const EmbedArguments& e) {
    TORCH_CHECK_VALUE(e.weight->dim() == 2 && e.weight->size(0) > 0, "e_weight must be [any, ", width, "]; got ",
                      e.weight->sizes());
    TORCH_CHECK_VALUE(e.activation, "embed_activation must be given with embed; got None");
    const int64_t out = e.weight->size(0);
    embedding.weight = take(e.weight, "e_weight", {out, width});
    embedding.bias = take(e.bias, "e_bias", {out});
    embedding.weight_type = e.weight->scalar_type();
    embedding.bias_type = e.bias ? e.bias->scalar_type() : acc;
    embedding.activation = parse_activation(*e.activation);
    embedding.dropout = checked_dropout(e.seed, e.dropout_p);
    embedding.planes = bf16_planes(x.scalar_type(), e.dtype);
    width = out;
  }

  // PyTorch's own small products keep the types they are given while the call lasts.
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// An op with a classifier: weight [classes, width] and bias [classes].
class ClassCall : public Call {
 public:
  ClassCall(const Tensor& x, const ClassifierWeights& weights, const OptionalTensor& offsets,
            const OptionalTensor& mask, const EmbedArguments& embed)
      : Call(x, offsets, mask, embed) {
    const Tensor& weight = weights.weight();
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0, "weight must be [any, ", width, "]; got ",
                      weight.sizes());
    classes = weight.size(0);
    this->weight = take(weight, "weight", {classes, width});
    bias = take(weights.bias(), "bias", {classes});
  }
  template <typename A>
  Queries<A> queries() const {
    return {weight.const_data_ptr<A>(), classes, 0, data_or_null<A>(bias), 0};
  }
  int64_t classes;
  Tensor weight, bias;
};

// What a pooling's forward left and what comes back for it, checked; `heads` and `width` of the pooled rows.
class PoolTensors {
 public:
  PoolTensors(const Call& call, int64_t heads, int64_t width, const OptionalTensor& bag, const OptionalTensor& scores,
              const OptionalTensor& lse, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
              const OptionalTensor& grad_lse) {
    const int64_t B = call.bags(), N = call.rows;
    tensors_ = {call.take(bag, "bag", {B, heads, width}),
                call.take(scores, "scores", {N, heads}),
                call.take(lse, "lse", {B, heads}),
                call.take(grad_bag, "grad_bag", {B, heads, width}),
                call.take(grad_scores, "grad_scores", {N, heads}),
                call.take(grad_lse, "grad_lse", {B, heads})};
    const bool pooling = grad_bag || grad_lse;
    TORCH_CHECK_VALUE(scores && (!pooling || (lse && bag)), "the backward needs what the forward returned");
  }
  template <typename A>
  PoolGradients<A> typed() const {
    const auto data = [&](int i) { return data_or_null<A>(tensors_[i]); };
    return {data(0), data(1), data(2), data(3), data(4), data(5)};
  }
  const Tensor& bag() const { return tensors_[0]; }
  const Tensor& lse() const { return tensors_[2]; }
  const Tensor& grad_scores() const { return tensors_[4]; }
  const Tensor& grad_lse() const { return tensors_[5]; }

 private:
  std::array<Tensor, 6> tensors_;
};

// Calls f.template operator()<T>() for the storage type of x.
template <typename F>
auto dispatch_storage(ScalarType x, const F& f) {
  switch (x) {
    case at::kDouble: return f.template operator()<double>();
    case at::kFloat: return f.template operator()<float>();
    case at::kHalf: return f.template operator()<Half>();
    case at::kBFloat16: return f.template operator()<BFloat16>();
    default: TORCH_CHECK_TYPE(false, "x must be float16, bfloat16, float32 or float64; got ", x);
  }
}

// Calls f.template operator()<E>() for the element type of products with rows of type T; `planes`: of how many bfloat16
// numbers a factor is made, 0 for products in the accumulation type.
template <typename T, typename F>
auto with_element(int planes, const F& f) {
  if constexpr (std::is_same_v<T, double>) return f.template operator()<double>();
  else return planes ? f.template operator()<BFloat16>() : f.template operator()<float>();
}
// Calls f.template operator()<T, E>(), which has the storage type T of x too.
template <typename F>
auto dispatch_products(ScalarType x, int planes, const F& f) {
  return dispatch_storage(x, [&]<typename T>() {
    return with_element<T>(planes, [&]<typename E>() { return f.template operator()<T, E>(); });
  });
}

// Where a gradient goes; null where nobody needs it.
template <typename A>
A* data_if(bool need, const Tensor& t) {
  return need ? t.mutable_data_ptr<A>() : nullptr;
}

}  // namespace milkernels
