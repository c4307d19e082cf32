// What a GPU does for DSMIL (Li, Li, Eliceiri 2021): the passes of its second stream over the rows, and what touches a
// few of them; milkernels/ops/dsmil_kernels.py composes the ops of these. The query is linear and so is the value:
// milkernels/native.py says that there is no more.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "choice.h"
#include "pooling.h"

namespace milkernels {
namespace {

// What rows are scored by are vectors of their bags, and what is pooled are the rows themselves.
struct DSMILCall : WithSecondStream<Call> {
  DSMILCall(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
            const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
            const std::optional<std::string_view>& v_activation, double v_dropout_p, const EmbedArguments& embed)
      : WithSecondStream(x, vectors, shift, critical, DSMILWeights(weights), offsets, mask, v_activation, embed) {
    TORCH_CHECK_VALUE(!mlp(), "CUDA's C++ kernels have no MLP query; got q2_weight");
    TORCH_CHECK_VALUE(!layered() && v_dropout_p == 0,
                      "CUDA's C++ kernels have no value but a linear one; got v_weight or v_dropout_p");
  }
};

Tensor keep(const Tensor& x, int64_t bytes) { return at::empty({bytes}, x.options().dtype(at::kByte)); }

std::tuple<Tensor, Tensor, Tensor> dsmil_rows_fwd(
    const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
    const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask, const OptionalTensor&,
    std::optional<std::string_view> v_activation, double v_dropout_p, std::optional<ScalarType>,
    const OptionalTensors& embed, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, const Tensor&, bool) {
  DSMILCall call(x, vectors, shift, critical, weights, offsets, mask, v_activation, v_dropout_p,
                 {embed, embed_activation, embed_dropout_p, embed_dtype});
  return pool_by_products(call, call.vectors, call.shift);
}

using OfRows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

OfRows dsmil_rows_bwd(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
                      const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
                      const OptionalTensor&, std::optional<std::string_view> v_activation, double v_dropout_p,
                      std::optional<ScalarType>, const OptionalTensors& embed,
                      std::optional<std::string_view> embed_activation, double embed_dropout_p,
                      std::optional<ScalarType> embed_dtype, const Tensor&, const Tensor& bag, const Tensor& scores,
                      const Tensor& lse, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
                      const OptionalTensor& grad_lse, std::array<bool, 3> needs) {
  DSMILCall call(x, vectors, shift, critical, weights, offsets, mask, v_activation, v_dropout_p,
                 {embed, embed_activation, embed_dropout_p, embed_dtype});
  const PooledTensors of(call, call.classes, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  const Tensor grad_x = call.grad_x(needs[0]), none = call.empty({0});
  const Tensor of_vectors = pool_by_products_backward(call, of, call.vectors, grad_x, true)
                                .masked_fill(call.dead.unsqueeze(2), 0);  // such a class may have summed 0 * NaN
  const auto [of_e_weight, of_e_bias] = call.of_no_embedding(needs[1], needs[2]);
  return {grad_x, of_vectors, none, none, none, none, none, none, of_e_weight, of_e_bias};
}

Call call_of(const Tensor& x, const OptionalTensors& embed, std::optional<std::string_view> activation,
             double dropout_p, std::optional<ScalarType> dtype) {
  return {x, std::nullopt, std::nullopt, {embed, activation, dropout_p, dtype}};
}

Tensor rows_at(const Tensor& x, const Tensor& indices, const OptionalTensors& embed,
               std::optional<std::string_view> embed_activation, double embed_dropout_p,
               std::optional<ScalarType> embed_dtype) {
  const Call call = call_of(x, embed, embed_activation, embed_dropout_p, embed_dtype);
  return gather_rows(call, call.take_indices(indices, "indices", indices.sizes())).flatten(0, 1).to(call.acc);
}

void add_rows_(const Tensor& grad_x, const Tensor& grad_e_weight, const Tensor& grad_e_bias, const Tensor& x,
               const Tensor& indices, const Tensor& grad_rows, const OptionalTensors& embed,
               std::optional<std::string_view> embed_activation, double embed_dropout_p,
               std::optional<ScalarType> embed_dtype) {
  const Call call = call_of(x, embed, embed_activation, embed_dropout_p, embed_dtype);
  check_written(call, grad_x, grad_e_weight, grad_e_bias);
  if (grad_x.numel() == 0) return;
  const Tensor places = call.take_indices(indices, "indices", indices.sizes());
  add_to_rows(call, places, call.take(grad_rows, "grad_rows", {places.numel(), call.width}), grad_x);
}

// Layers on a few rows. Their products are in the accumulation type, whatever PyTorch's switch lets large ones be.
Tensor few_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  std::optional<std::string_view> activation, double scale) {
  const at::NoTF32Guard exact;
  Tensor z = x.matmul(weight.t());
  if (bias) z.add_(*bias);
  const Activation f = activation ? parse_activation(*activation) : Activation::kIdentity;
  TORCH_CHECK_VALUE(f != Activation::kGelu, "activation must be tanh, relu or identity; got gelu");
  if (f == Activation::kRelu) z.relu_();
  if (f == Activation::kTanh) z.tanh_();
  return scale == 1 ? z : z.mul_(scale);
}

std::tuple<Tensor, Tensor, Tensor> few_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                  const OptionalTensor& out, std::optional<std::string_view> activation,
                                                  double scale) {
  const at::NoTF32Guard exact;
  const Activation f = activation ? parse_activation(*activation) : Activation::kIdentity;
  TORCH_CHECK_VALUE(out || f == Activation::kIdentity, "out must be given with an activation; got None");
  Tensor g = scale == 1 ? grad : grad * scale;
  if (f == Activation::kRelu) g = g.masked_fill(*out <= 0, 0);
  if (f == Activation::kTanh) g = g * (1 - *out * *out);
  return {g.matmul(weight), g.t().matmul(x), g.sum(0)};
}

Tensor linear_of_bags(const Tensor& pooled, const Tensor& lse, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor out = few_linear(pooled.flatten(0, 1), weight, bias, std::nullopt, 1);
  return out.view({lse.size(0), lse.size(1), out.size(1)}).masked_fill_((lse == kDead).unsqueeze(2), 0);
}

std::tuple<Tensor, Tensor> few_transposed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const at::NoTF32Guard exact;
  return {x.matmul(weight), bias ? x.matmul(*bias) : x.new_zeros({x.size(0)})};
}

std::tuple<Tensor, Tensor, Tensor> few_transposed_bwd(const Tensor& grad, const OptionalTensor& grad_shift,
                                                      const Tensor& x, const Tensor& weight,
                                                      const OptionalTensor& bias) {
  const at::NoTF32Guard exact;
  const Tensor of_x = grad.matmul(weight.t());
  if (bias && grad_shift) of_x.add_(grad_shift->unsqueeze(1) * *bias);
  return {of_x, x.t().matmul(grad), bias && grad_shift ? grad_shift->matmul(x) : x.new_zeros({x.size(1)})};
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("keep.native", keep);
  m.impl("dsmil_rows_fwd.native", dsmil_rows_fwd);
  m.impl("dsmil_rows_bwd.native", dsmil_rows_bwd);
  m.impl("rows_at.native", rows_at);
  m.impl("add_rows_.native", add_rows_);
  m.impl("few_linear.native", few_linear);
  m.impl("few_linear_bwd.native", few_linear_bwd);
  m.impl("linear_of_bags.native", linear_of_bags);
  m.impl("few_transposed.native", few_transposed);
  m.impl("few_transposed_bwd.native", few_transposed_bwd);
  m.impl("few_winners_bwd.native", winner_gradients);
}

}  // namespace
}  // namespace milkernels
