#include "dsmil.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

namespace milkernels {

DSMILCall::DSMILCall(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
                     const DSMILWeights& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
                     const OptionalTensor& seed, const std::optional<std::string_view>& v_activation,
                     double v_dropout_p, std::optional<ScalarType> compute_dtype, const EmbedArguments& embed)
    : WithSecondStream(x, vectors, shift, critical, weights, offsets, mask, v_activation, embed),
      v_dropout(dropout_of(seed, v_dropout_p)), planes(planes_of(compute_dtype)), padded(this->vectors) {
  if (!mlp()) return;
  const int64_t width = padded.size(2);
  padded = at::constant_pad_nd(padded, {0, round_up(width, kBlock) - width}).contiguous();
}

namespace {

Tensor keep(const Tensor&, int64_t bytes) { return kept_bytes(bytes); }

std::tuple<Tensor, Tensor, Tensor> dsmil_rows_fwd(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift,
                                                  const Tensor& critical, const OptionalTensors& weights,
                                                  const OptionalTensor& offsets, const OptionalTensor& mask,
                                                  const OptionalTensor& seed,
                                                  std::optional<std::string_view> v_activation, double v_dropout_p,
                                                  std::optional<ScalarType> compute_dtype, const OptionalTensors& embed,
                                                  std::optional<std::string_view> embed_activation,
                                                  double embed_dropout_p, std::optional<ScalarType> embed_dtype,
                                                  const Tensor& kept, bool has_rows) {
  DSMILCall call(x, vectors, shift, critical, DSMILWeights(weights), offsets, mask, seed, v_activation, v_dropout_p,
                 compute_dtype, {embed, embed_activation, embed_dropout_p, embed_dtype});
  call.use_kept(kept, call.kept_width(), compute_dtype, has_rows, false);
  Tensor bag = call.empty({call.bags, call.classes, call.pooled_width()}),
         scores = call.empty({call.rows, call.classes}), lse = call.empty({call.bags, call.classes});
  with_rows(call, nullptr, [&](const auto& in) { dsmil_rows(call, in, bag, scores, lse); });
  return {bag, scores, lse};
}

using RowsBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RowsBackward dsmil_rows_bwd(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
                            const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
                            const OptionalTensor& seed, std::optional<std::string_view> v_activation,
                            double v_dropout_p, std::optional<ScalarType> compute_dtype, const OptionalTensors& embed,
                            std::optional<std::string_view> embed_activation, double embed_dropout_p,
                            std::optional<ScalarType> embed_dtype, const Tensor& kept, const Tensor& bag,
                            const Tensor& scores, const Tensor& lse, const OptionalTensor& grad_bag,
                            const OptionalTensor& grad_scores, const OptionalTensor& grad_lse,
                            std::array<bool, 3> needs) {
  DSMILCall call(x, vectors, shift, critical, DSMILWeights(weights), offsets, mask, seed, v_activation, v_dropout_p,
                 compute_dtype, {embed, embed_activation, embed_dropout_p, embed_dtype});
  call.use_kept(kept, call.kept_width(), compute_dtype, true, true);
  RowGradients of_rows(call, needs[0], needs[1], needs[2]);
  const PooledTensors tensors(call, call.classes, call.pooled_width(), bag, scores, lse, grad_bag, grad_scores,
                              grad_lse);
  std::array<Tensor, 6> grads;
  for (int i = 0; i < 6; ++i) {
    grads[i] = call.parameters[i].defined() ? at::empty_like(call.parameters[i]) : call.empty({0});
  }
  Tensor grad_vectors = at::empty_like(call.padded);
  with_rows(call, &of_rows, [&](const auto& in) { dsmil_rows_backward(call, in, tensors, grad_vectors, grads); });
  const auto& [q, qb, q2, q2b, v, vb] = grads;
  grad_vectors = grad_vectors.slice(2, 0, vectors.size(2)).contiguous();
  grad_vectors.masked_fill_(call.dead.unsqueeze(2), 0.);  // a class that pools nothing may have summed 0 * NaN
  return {of_rows.x, grad_vectors, q, qb, q2, q2b, v, vb, of_rows.weight, of_rows.bias};
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("keep.native", keep);
  m.impl("dsmil_rows_fwd.native", dsmil_rows_fwd);
  m.impl("dsmil_rows_bwd.native", dsmil_rows_bwd);
}

}  // namespace
}  // namespace milkernels
