// attention_pool, attention_scores and their backward on the CPU: from tensors to the driver.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "attention_score.h"
#include "cpu.h"

namespace milkernels {
namespace {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Activation parse_activation(std::string_view name) {
  if (name == "tanh") return Activation::kTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  TORCH_CHECK_VALUE(name == "identity", "activation must be tanh, relu, gelu or identity; got ", name);
  return Activation::kIdentity;
}

// The tensors of a call, checked so that nothing is read out of bounds whatever Python passed.
class AttentionCall {
 public:
  AttentionCall(const Tensor& x, const Tensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& u_weight,
                const OptionalTensor& u_bias, const Tensor& w_weight, const OptionalTensor& w_bias,
                const OptionalTensor& offsets, const OptionalTensor& mask, const OptionalTensor& seed,
                std::string_view activation, double dropout_p, std::optional<ScalarType> compute_dtype)
      : x(rows_of(x)), acc(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
        activation(parse_activation(activation)), planes(bf16_planes(x.scalar_type(), compute_dtype)) {
    TORCH_CHECK_VALUE(v_weight.dim() == 2 && w_weight.dim() == 2, "v_weight and w_weight must be 2-D; got ",
                      v_weight.sizes(), " and ", w_weight.sizes());
    width = x.size(1), hidden = v_weight.size(0), heads = w_weight.size(0), rows = x.size(0);
    TORCH_CHECK_VALUE(width > 0 && hidden > 0 && heads > 0, "x, v_weight and w_weight must not be empty");
    parameters[0] = take(v_weight, "v_weight", {hidden, width});
    parameters[1] = take(v_bias, "v_bias", {hidden});
    parameters[2] = take(u_weight, "u_weight", {hidden, width});
    parameters[3] = take(u_bias, "u_bias", {hidden});
    parameters[4] = take(w_weight, "w_weight", {heads, hidden});
    parameters[5] = take(w_bias, "w_bias", {heads});
    if (mask) {
      TORCH_CHECK_VALUE(mask->scalar_type() == at::kBool && mask->dim() == 1 && mask->size(0) == rows && mask->is_cpu(),
                        "mask must be bool [", rows, "]; got ", mask->scalar_type(), " ", mask->sizes());
      this->mask = mask->contiguous();
    }
    TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be in [0, 1]; got ", dropout_p);
    if (dropout_p > 0) {
      TORCH_CHECK_VALUE(seed && seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->is_cpu(),
                        "dropout needs a seed: one int64 on the CPU");
      dropout = Dropout(static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), dropout_p);
    }
    this->offsets = checked_offsets(offsets, rows);
  }

  int64_t bags() const { return static_cast<int64_t>(offsets.size()) - 1; }
  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, x.options().dtype(acc)); }

  template <typename T>
  Ragged<T> ragged() const {
    return {x.const_data_ptr<T>(), rows > 1 ? x.stride(0) : width, width, rows,
            mask.defined() ? mask.const_data_ptr<bool>() : nullptr, offsets};
  }
  template <typename A>
  AttentionParameters<A> typed_parameters() const {
    const auto data = [&](int i) { return parameters[i].defined() ? parameters[i].const_data_ptr<A>() : nullptr; };
    return {data(0), data(1), data(2), data(3), data(4), data(5), width, hidden, heads};
  }

  Tensor x;
  ScalarType acc;  // of scores, sums and gradients
  Activation activation;
  int planes;  // 0: products in the accumulation type, no planes; else of how many bfloat16 numbers a factor is made
  int64_t rows = 0, width = 0, hidden = 0, heads = 0;
  std::array<Tensor, 6> parameters;  // v_weight .. w_bias, in the accumulation type; undefined where absent
  Tensor mask;
  Dropout dropout;
  std::vector<int64_t> offsets;

 private:
  Tensor take(const OptionalTensor& t, const char* name, at::IntArrayRef sizes) const {
    if (!t) return {};
    TORCH_CHECK_VALUE(t->is_cpu() && t->sizes() == sizes, name, " must be ", sizes, " on the CPU; got ", t->sizes(),
                      " on ", t->device());
    return t->to(acc).contiguous();
  }
};

// Calls f.template operator()<T, E>() for the storage type of x and the element type of the products.
template <typename F>
auto dispatch(const AttentionCall& call, const F& f) {
  switch (call.x.scalar_type()) {
    case at::kDouble: return f.template operator()<double, double>();
    case at::kFloat: return call.planes ? f.template operator()<float, BFloat16>() : f.template operator()<float, float>();
    case at::kHalf: return call.planes ? f.template operator()<Half, BFloat16>() : f.template operator()<Half, float>();
    default: return call.planes ? f.template operator()<BFloat16, BFloat16>() : f.template operator()<BFloat16, float>();
  }
}

// Scores, and with `pool` the bag vectors and lse too.
std::tuple<Tensor, Tensor, Tensor> forward(const AttentionCall& call, bool pool) {
  Tensor scores = call.empty({call.rows, call.heads}), bag, lse;
  if (pool) {
    bag = call.empty({call.bags(), call.heads, call.width});
    lse = call.empty({call.bags(), call.heads});
  }
  dispatch(call, [&]<typename T, typename E>() {
    using A = acc_t<T>;
    const AttentionScore<T, E> program(call.typed_parameters<A>(), call.activation, call.dropout, std::max(call.planes, 1));
    pool_forward(program, call.ragged<T>(), scores.mutable_data_ptr<A>(), pool ? bag.mutable_data_ptr<A>() : nullptr,
                 pool ? lse.mutable_data_ptr<A>() : nullptr);
  });
  return {bag, scores, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_pool_fwd(
    const Tensor& x, const Tensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& u_weight,
    const OptionalTensor& u_bias, const Tensor& w_weight, const OptionalTensor& w_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::string_view activation, double dropout_p,
    std::optional<ScalarType> compute_dtype) {
  return forward({x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, seed, activation, dropout_p,
                  compute_dtype}, true);
}

Tensor attention_scores_fwd(
    const Tensor& x, const Tensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& u_weight,
    const OptionalTensor& u_bias, const Tensor& w_weight, const OptionalTensor& w_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::string_view activation, double dropout_p,
    std::optional<ScalarType> compute_dtype) {
  return std::get<1>(forward({x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, seed, activation,
                              dropout_p, compute_dtype}, false));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_bwd(
    const Tensor& x, const Tensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& u_weight,
    const OptionalTensor& u_bias, const Tensor& w_weight, const OptionalTensor& w_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::string_view activation, double dropout_p,
    std::optional<ScalarType> compute_dtype, const OptionalTensor& bag, const OptionalTensor& scores,
    const OptionalTensor& lse, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
    const OptionalTensor& grad_lse, std::array<bool, 7> needs) {
  const AttentionCall call(x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, seed, activation,
                           dropout_p, compute_dtype);
  const auto checked = [&](const OptionalTensor& t, const char* name, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(!t || (t->is_cpu() && t->sizes() == sizes), name, " must be ", sizes);
    return t ? t->to(call.acc).contiguous() : Tensor();
  };
  const int64_t B = call.bags(), K = call.heads, L = call.width;
  const Tensor s = checked(scores, "scores", {call.rows, K}), l = checked(lse, "lse", {B, K}),
               pooled = checked(bag, "bag", {B, K, L}), g_bag = checked(grad_bag, "grad_bag", {B, K, L}),
               g_scores = checked(grad_scores, "grad_scores", {call.rows, K}),
               g_lse = checked(grad_lse, "grad_lse", {B, K});
  const bool pooling = g_bag.defined() || g_lse.defined();
  TORCH_CHECK_VALUE(s.defined() && (!pooling || (l.defined() && pooled.defined())),
                    "the backward needs what the forward returned");
  std::array<Tensor, 7> grads;
  const auto options = x.options();
  grads[0] = needs[0] ? at::empty({call.rows, L}, options) : at::empty({0}, options);
  for (int i = 0; i < 6; ++i) {
    grads[i + 1] = needs[i + 1] ? call.empty(call.parameters[i].sizes()) : at::empty({0}, options);
  }
  dispatch(call, [&]<typename T, typename E>() {
    using A = acc_t<T>;
    const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<A>() : nullptr; };
    const auto out = [&](int i) { return needs[i] ? grads[i].mutable_data_ptr<A>() : nullptr; };
    AttentionScore<T, E> program(call.typed_parameters<A>(), call.activation, call.dropout, std::max(call.planes, 1));
    if (needs[0]) program.prepare_input_gradient();
    const auto in = call.ragged<T>();
    const bool projection = needs[1] || needs[3];
    const int64_t accumulator = projection ? program.columns() * L * int64_t(sizeof(A)) : 0;
    AttentionSlices<A> slices(num_slices(call.rows, accumulator), program.columns(), L, program.units(), K, projection);
    const PoolGradients<A> g{data(pooled), data(s), data(l), data(g_bag), data(g_scores), data(g_lse)};
    pool_backward(program, in, g, needs[0] ? grads[0].mutable_data_ptr<T>() : nullptr, slices);
    const auto sums = slices.reduce();
    program.projection_gradient(sums, out(1), out(3), out(2), out(4), out(5));
    if (needs[6]) std::copy_n(sums.w_bias, K, out(6));
  });
  const std::array<OptionalTensor, 6> parameters{v_weight, v_bias, u_weight, u_bias, w_weight, w_bias};
  for (int i = 0; i < 6; ++i) {
    if (needs[i + 1]) grads[i + 1] = grads[i + 1].to(parameters[i]->scalar_type());
  }
  return std::tuple_cat(grads);
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("attention_pool_fwd.native", attention_pool_fwd);
  m.impl("attention_scores_fwd.native", attention_scores_fwd);
  m.impl("attention_bwd.native", attention_bwd);
}

}  // namespace
}  // namespace milkernels
