// The tensors of a call, wherever it runs, checked so that nothing is read out of bounds whatever Python passed. Values
// are not read here: those of offsets and indices are checked where that does not wait for a device.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <c10/core/Device.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <limits>

#include "activation.h"
#include "arguments.h"

namespace milkernels {

inline Activation parse_activation(std::string_view name) {
  if (name == "tanh") return Activation::kTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  TORCH_CHECK_VALUE(name == "identity", "activation must be tanh, relu, gelu or identity; got ", name);
  return Activation::kIdentity;
}

// The type of scores, sums and gradients for rows like x.
inline ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A backward is told which gradients are needed: ValueError for that of a parameter which is not there.
inline void check_need(bool need, bool given, const char* name) {
  TORCH_CHECK_VALUE(given || !need, "needs says that ", name, " wants a gradient, but ", name, " is absent");
}
// Checks each of an op's weights in this way.
template <typename Weights>
void check_needs(const bool* needs, const Weights& given) {
  for (size_t i = 0; i < given.size(); ++i) check_need(needs[i], given[i].has_value(), Weights::kNames[i]);
}

// How many columns `t` [rows, any] has, at least one.
inline int64_t columns_of(const Tensor& t, const char* name, int64_t rows) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(1) > 0, name, " must be [", rows, ", any]; got ", t.sizes());
  return t.size(1);
}
// How many units a layer of `weight` [any, width] has, at least one.
inline int64_t units_of(const Tensor& weight, const char* name, int64_t width) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0, name, " must be [any, ", width, "]; got ", weight.sizes());
  return weight.size(0);
}

// What every op has: instances, bags, mask. Other tensors are taken for it.
class CallTensors {
 public:
  // `device`: where the op's kernels run.
  CallTensors(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask, c10::DeviceType device)
      : x(rows_of(x, device)), acc(accumulation_type(x)), rows(x.size(0)), width(x.size(1)) {
    TORCH_CHECK_VALUE(width > 0, "x must have at least one column; got ", x.sizes());
    if (offsets) {
      TORCH_CHECK_TYPE(offsets->scalar_type() == at::kInt || offsets->scalar_type() == at::kLong,
                       "offsets must be int32 or int64; got ", offsets->scalar_type());
      TORCH_CHECK_VALUE(here(*offsets) && offsets->dim() == 1 && offsets->size(0) >= 1,
                        "offsets must be [bags + 1] on ", x.device(), "; got ", offsets->sizes(), " on ",
                        offsets->device());
      bags = offsets->size(0) - 1;
    }
    if (mask) {
      TORCH_CHECK_VALUE(mask->scalar_type() == at::kBool && mask->dim() == 1 && mask->size(0) == rows && here(*mask),
                        "mask must be bool [", rows, "] on ", x.device(), "; got ", mask->scalar_type(), " ",
                        mask->sizes(), " on ", mask->device());
      this->mask = mask->contiguous();
    }
  }

  bool here(const Tensor& t) const { return t.device() == x.device(); }
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, x.options().dtype(acc)); }
  // A gradient to fill, in the type of x or of accumulation; an empty tensor where nobody needs it.
  Tensor grad_x(bool need) const { return at::empty(need ? x.sizes() : at::IntArrayRef({0}), x.options()); }
  Tensor gradient(bool need, at::IntArrayRef sizes) const { return need ? empty(sizes) : empty({0}); }

  // A tensor of these sizes, contiguous and in `type`, that of accumulation by default; undefined where it is absent.
  Tensor take(const OptionalTensor& t, const char* name, at::IntArrayRef sizes, ScalarType type) const {
    if (!t) return {};
    TORCH_CHECK_VALUE(here(*t) && t->sizes() == sizes, name, " must be ", sizes, " on ", x.device(), "; got ",
                      t->sizes(), " on ", t->device());
    return t->to(type).contiguous();
  }
  Tensor take(const OptionalTensor& t, const char* name, at::IntArrayRef sizes) const {
    return take(t, name, sizes, acc);
  }
  // Takes indices of rows, which are int64.
  Tensor take_indices(const Tensor& t, const char* name, at::IntArrayRef sizes) const {
    TORCH_CHECK_VALUE(here(t) && t.scalar_type() == at::kLong && t.sizes() == sizes, name, " must be int64 ", sizes,
                      " on ", x.device(), "; got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
    return t.contiguous();
  }

  // Whether a share p of the units is dropped; then there is a seed.
  bool drops(const OptionalTensor& seed, double p) const {
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, "the share to drop must be in [0, 1]; got ", p);
    if (p == 0) return false;
    TORCH_CHECK_VALUE(seed && seed->scalar_type() == at::kLong && seed->numel() == 1 && here(*seed),
                      "dropout needs a seed: one int64 on ", x.device());
    return true;
  }

  Tensor x;  // rows of consecutive elements
  ScalarType acc;  // of scores, sums and gradients
  int64_t rows, width;  // as the op sees them: behind an embedding, where there is one
  int64_t bags = 1;
  Tensor mask;

 private:
  // x, copied only if elements of a row are not consecutive or rows overlap.
  static Tensor rows_of(const Tensor& x, c10::DeviceType device) {
    TORCH_CHECK_VALUE(x.dim() == 2 && x.device().type() == device, "x must be [N, L] on ", device, "; got ", x.sizes(),
                      " on ", x.device());
    const bool consecutive = x.size(1) == 1 || x.stride(1) == 1;
    return consecutive && (x.size(0) <= 1 || x.stride(0) >= x.size(1)) ? x : x.contiguous();
  }

  // PyTorch's own small products keep the types they are given while the call lasts.
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
};

// The layer in front of an op, h = drop(act(W x + b)), without its dropout.
struct EmbeddingTensors {
  EmbeddingTensors() = default;
  EmbeddingTensors(const CallTensors& call, const EmbedArguments& of, ScalarType type) {
    TORCH_CHECK_VALUE(of.activation, "embed_activation must be given with embed; got None");
    activation = parse_activation(*of.activation);
    const int64_t width = units_of(*of.weight, "e_weight", call.width);
    weight = call.take(of.weight, "e_weight", {width, call.width}, type);
    bias = call.take(of.bias, "e_bias", {width});
    weight_type = of.weight->scalar_type();
    if (of.bias) bias_type = of.bias->scalar_type();
  }

  Tensor weight;  // [width, width of x] in the type of products
  Tensor bias;  // [width] in that of sums, or undefined
  ScalarType weight_type = at::kFloat, bias_type = at::kFloat;  // in which they came
  Activation activation = Activation::kIdentity;
};

// An op with a classifier, weight [classes, width] and bias [classes]; CALL is that of a device.
template <typename CALL>
class WithClasses : public CALL {
 public:
  WithClasses(const Tensor& x, const ClassifierWeights& weights, const OptionalTensor& offsets,
              const OptionalTensor& mask, const EmbedArguments& embed)
      : CALL(x, offsets, mask, embed), classes(units_of(weights.weight(), "weight", this->width)),
        weight(this->take(weights.weight(), "weight", {classes, this->width})),
        bias(this->take(weights.bias(), "bias", {classes})) {}

  int64_t classes;
  Tensor weight, bias;
};

// An op with a query [heads, width], or with one for each bag [bags, heads, width].
template <typename CALL>
class WithQuery : public CALL {
 public:
  WithQuery(const Tensor& x, const Tensor& query, const OptionalTensor& offsets, const OptionalTensor& mask,
            double scale, const EmbedArguments& embed)
      : CALL(x, offsets, mask, embed) {
    const bool per_bag = query.dim() == 3;
    TORCH_CHECK_VALUE(per_bag || query.dim() == 2, "query must be 2-D or 3-D; got ", query.sizes());
    heads = query.size(-2);
    TORCH_CHECK_VALUE(heads > 0, "query must have at least one head; got ", query.sizes());
    if (per_bag) scaled = this->take(query, "query", {this->bags, heads, this->width});
    else scaled = this->take(query, "query", {heads, this->width});
    if (scale != 1.) scaled = scaled * scale;
  }

  int64_t heads;
  Tensor scaled;  // the query times the scale
};

// The passes of DSMIL's second stream over its rows; CALL is that of a device. A score is
// <row, vectors[b, c]> + shift[b, c], and -inf for a class that has no critical instance. A row is an instance, or its
// query where the query is an MLP; what is pooled are instances, or their values where there is a value layer.
template <typename CALL>
class WithSecondStream : public CALL {
 public:
  WithSecondStream(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
                   const DSMILWeights& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
                   const std::optional<std::string_view>& v_activation, const EmbedArguments& embed)
      : CALL(x, offsets, mask, embed),
        v_activation(v_activation ? parse_activation(*v_activation) : Activation::kIdentity) {
    const auto units = [&](int i, int64_t width) {
      return weights[i] ? units_of(*weights[i], DSMILWeights::kNames[i], width) : 0;
    };
    const auto taken = [&](int i, at::IntArrayRef sizes) {
      return this->take(weights[i], DSMILWeights::kNames[i], sizes);
    };
    const int64_t L = this->width, Q = units(0, L), Q2 = units(2, Q), Lv = units(4, L);
    TORCH_CHECK_VALUE((Q > 0) == (Q2 > 0), "weights must have q_weight and q2_weight, or neither");
    parameters = {taken(0, {Q, L}), taken(1, {Q}),     taken(2, {Q2, Q}),
                  taken(3, {Q2}),   taken(4, {Lv, L}), taken(5, {Lv})};
    TORCH_CHECK_VALUE(vectors.dim() == 3 && vectors.size(1) > 0, "vectors must be [", this->bags,
                      ", classes, width]; got ", vectors.sizes());
    classes = vectors.size(1);
    this->vectors = this->take(vectors, "vectors", {this->bags, classes, mlp() ? Q2 : L});
    // -1 is a class without a critical instance: all its scores are -inf.
    dead = CallTensors::take_indices(critical, "critical", {this->bags, classes}) < 0;
    this->shift =
        shift ? this->take(shift, "shift", {this->bags, classes}) : this->empty({this->bags, classes}).zero_();
    this->shift = this->shift.masked_fill(dead, -std::numeric_limits<double>::infinity());
  }

  const Tensor& q_weight() const { return parameters[0]; }
  const Tensor& q_bias() const { return parameters[1]; }
  const Tensor& q2_weight() const { return parameters[2]; }
  const Tensor& q2_bias() const { return parameters[3]; }
  const Tensor& v_weight() const { return parameters[4]; }
  const Tensor& v_bias() const { return parameters[5]; }
  bool mlp() const { return q2_weight().defined(); }
  bool layered() const { return v_weight().defined(); }
  int64_t pooled_width() const { return layered() ? v_weight().size(0) : this->width; }

  Activation v_activation;
  std::array<Tensor, 6> parameters;  // q_weight .. v_bias, in the accumulation type; undefined where absent
  int64_t classes;
  Tensor vectors, shift, dead;  // [bags, classes, width or units of q2], [bags, classes], [bags, classes]
};

// What a softmax pooling's forward left and what comes back for it, in the accumulation type; `heads` and `width` are
// those of the pooled rows.
struct PooledTensors {
  PooledTensors(const CallTensors& call, int64_t heads, int64_t width, const OptionalTensor& bag,
                const OptionalTensor& scores, const OptionalTensor& lse, const OptionalTensor& grad_bag,
                const OptionalTensor& grad_scores, const OptionalTensor& grad_lse)
      : bag(call.take(bag, "bag", {call.bags, heads, width})), scores(call.take(scores, "scores", {call.rows, heads})),
        lse(call.take(lse, "lse", {call.bags, heads})),
        grad_bag(call.take(grad_bag, "grad_bag", {call.bags, heads, width})),
        grad_scores(call.take(grad_scores, "grad_scores", {call.rows, heads})),
        grad_lse(call.take(grad_lse, "grad_lse", {call.bags, heads})) {
    const bool pooling = grad_bag || grad_lse;
    TORCH_CHECK_VALUE(scores && (!pooling || (lse && bag)), "the backward needs what the forward returned");
  }

  Tensor bag, scores, lse, grad_bag, grad_scores, grad_lse;
};

}  // namespace milkernels
