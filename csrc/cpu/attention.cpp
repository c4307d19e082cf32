// attention_pool, attention_scores and their backward on the CPU: from tensors to the driver.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "attention.h"

namespace milkernels {
namespace {

// Scores, and with `pool` the bag vectors and lse too; at last what is kept.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(AttentionCall& call, bool pool, int64_t saved_bytes,
                                                   std::optional<ScalarType> compute_dtype) {
  Tensor scores = call.empty({call.rows, call.heads}), kept = call.keep(saved_bytes, call.kept_width(), compute_dtype);
  Tensor bag, lse;
  if (pool) {
    bag = call.empty({call.bags, call.heads, call.width});
    lse = call.empty({call.bags, call.heads});
  }
  with_rows(call, nullptr, [&](const auto& in) { attention_forward(call, in, scores, bag, lse); });
  return {bag, scores, lse, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_fwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& seed, std::string_view activation, double dropout_p, std::optional<ScalarType> compute_dtype,
    const OptionalTensors& embed, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, int64_t saved_bytes) {
  AttentionCall call(x, AttentionWeights(weights), offsets, mask, seed, activation, dropout_p, compute_dtype,
                     {embed, embed_activation, embed_dropout_p, embed_dtype});
  return forward(call, true, saved_bytes, compute_dtype);
}

std::tuple<Tensor, Tensor> attention_scores_fwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& seed, std::string_view activation, double dropout_p, std::optional<ScalarType> compute_dtype,
    const OptionalTensors& embed, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, int64_t saved_bytes) {
  AttentionCall call(x, AttentionWeights(weights), offsets, mask, seed, activation, dropout_p, compute_dtype,
                     {embed, embed_activation, embed_dropout_p, embed_dtype});
  const auto [bag, scores, lse, kept] = forward(call, false, saved_bytes, compute_dtype);
  return {scores, kept};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_bwd(const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets,
                        const OptionalTensor& mask, const OptionalTensor& seed, const OptionalTensor& bag,
                        const Tensor& scores, const OptionalTensor& lse, const OptionalTensors& embed,
                        const Tensor& kept, std::string_view activation, double dropout_p,
                        std::optional<ScalarType> compute_dtype, std::optional<std::string_view> embed_activation,
                        double embed_dropout_p, std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag,
                        const OptionalTensor& grad_scores, const OptionalTensor& grad_lse, std::array<bool, 9> needs) {
  const AttentionWeights given(weights);
  AttentionCall call(x, given, offsets, mask, seed, activation, dropout_p, compute_dtype,
                     {embed, embed_activation, embed_dropout_p, embed_dtype});
  call.use_kept(kept, call.kept_width(), compute_dtype, true, true);
  const PooledTensors pooled(call, call.heads, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  check_needs(needs.data() + 1, given);
  RowGradients of_rows(call, needs[0], needs[7], needs[8]);
  std::array<Tensor, 9> grads;
  for (int i = 1; i < 7; ++i) {
    grads[i] = needs[i] ? call.empty(call.parameters[i - 1].sizes()) : at::empty({0}, x.options());
  }
  with_rows(call, &of_rows, [&](const auto& in) { attention_backward(call, in, pooled, needs, grads); });
  for (int i = 0; i < 6; ++i) {
    if (needs[i + 1]) grads[i + 1] = grads[i + 1].to(given[i]->scalar_type());
  }
  grads[0] = of_rows.x, grads[7] = of_rows.typed_weight(call), grads[8] = of_rows.typed_bias(call);
  return std::tuple_cat(grads);
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("attention_pool_fwd.native", attention_pool_fwd);
  m.impl("attention_scores_fwd.native", attention_scores_fwd);
  m.impl("attention_bwd.native", attention_bwd);
}

}  // namespace
}  // namespace milkernels
