// dsmil_pool on the CPU, the second stream of DSMIL (Li, Li, Eliceiri 2021), and dsmil, both streams: then the gradient
// of the first, a few rows, is added to that of the second where it lies.
#include "dsmil.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <tuple>

#include "few_rows.h"
#include "instance_max.h"

namespace milkernels {
namespace {

Tensor plus_bias(Tensor product, const Tensor& bias) { return bias.defined() ? product.add_(bias) : product; }

}  // namespace

CriticalQueries::CriticalQueries(const DSMILCall& call, const Tensor& critical)
    : dead((critical < 0).reshape({-1})), call_(call), instances_(call, critical), classes_(critical.size(1)) {
  z_ = plus_bias(product_nt(instances_.rows, call.q_weight()), call.q_bias());
  if (call.mlp()) {
    hidden_ = activated(z_, Activation::kRelu);
    z2_ = plus_bias(product_nt(hidden_, call.q2_weight()), call.q2_bias());
    q_ = activated(z2_, Activation::kTanh);
  } else {
    q_ = z_;
  }
  const Tensor scaled = q_ * call.scale;
  shift = at::zeros({dead.numel()}, q_.options());
  if (call.mlp()) {
    vectors = at::constant_pad_nd(scaled, {0, round_up(q_.size(1), kBlock) - q_.size(1)});
  } else {
    vectors = product_nn(scaled, call.q_weight());
    if (call.q_bias().defined()) shift = product_nt(scaled, call.q_bias().unsqueeze(0)).reshape({-1});
  }
  shift.masked_fill_(dead, kDead<double>);
  vectors = vectors.contiguous();
}

void CriticalQueries::backward(const Tensor& grad_vectors, const Tensor& grad_shift, std::array<Tensor, 4> grads,
                               RowGradients& of_rows) const {
  const Tensor q_weight = call_.q_weight(), scaled = q_ * call_.scale;
  Tensor grad_q;
  if (call_.mlp()) {
    const Tensor grad_q2 = grad_vectors.slice(1, 0, q_.size(1)) * call_.scale;
    const Tensor grad_z2 = through_activation(grad_q2.contiguous(), z2_, Activation::kTanh);
    grads[2].add_(product_tn(grad_z2, hidden_));
    if (call_.q2_bias().defined()) grads[3].add_(column_sums(grad_z2));
    grad_q = product_nn(grad_z2, call_.q2_weight()) * (z_ > 0);
  } else {
    grad_q = product_nt(grad_vectors, q_weight);
    grads[0].add_(product_tn(scaled, grad_vectors));
    if (call_.q_bias().defined() && grad_shift.defined()) {
      grad_q.add_(grad_shift.unsqueeze(1) * call_.q_bias());
      grads[1].add_(product_tn(scaled, grad_shift.unsqueeze(1)).reshape({-1}));
    }
    grad_q = grad_q * call_.scale;
  }
  grads[0].add_(product_tn(grad_q, instances_.rows));
  if (call_.q_bias().defined()) grads[1].add_(column_sums(grad_q));
  instances_.backward(product_nn(grad_q, q_weight), of_rows);
}

namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// `pooled` is what is pooled before a linear value is taken of it; empty where that is the bag itself.
Outputs second_stream(const DSMILCall& call, const Tensor& instance_logits) {
  const int64_t B = call.bags, C = columns_of(instance_logits, "instance_logits", call.rows);
  const Tensor logits = call.take(instance_logits, "instance_logits", {call.rows, C});
  Tensor critical = at::empty({B, C}, call.x.options().dtype(at::kLong)), bag = call.empty({B, C, call.pooled_width()}),
         scores = call.empty({call.rows, C}), lse = call.empty({B, C});
  with_rows(call, nullptr, [&](const auto& in) { second_stream_rows(call, in, logits, critical, bag, scores, lse); });
  Tensor pooled = call.empty({0});
  if (call.folded()) {
    pooled = bag;
    const auto empty = (lse == kDead<double>).unsqueeze(2);
    bag = plus_bias(product_nt(pooled.view({B * C, call.width}), call.v_weight()), call.v_bias())
              .view({B, C, call.bag_width()});
    bag.masked_fill_(empty, 0.);
  }
  return {bag, scores, lse, critical, pooled};
}

// What comes back for the outputs of the second stream.
struct StreamGradients {
  const OptionalTensor &bag, &scores, &lse;
};

// Gradients of q_weight .. v_bias, those that are needed, in their types; writes those of the rows.
std::array<Tensor, 6> second_stream_backward(const DSMILCall& call, const DSMILWeights& given, const Tensor& bag,
                                             const Tensor& scores, const Tensor& lse, const Tensor& critical,
                                             const Tensor& pooled, const StreamGradients& from,
                                             const std::array<bool, 6>& needs, RowGradients& of_rows) {
  check_needs(needs.data(), given);
  const int64_t B = call.bags, C = columns_of(critical, "critical", B), L = call.width, Lv = call.bag_width();
  const Tensor winners = call.take_indices(critical, "critical", {B, C});
  Tensor grad_pooled = call.take(from.bag, "grad_bag", {B, C, Lv});
  const CriticalQueries queries(call, winners);

  std::array<Tensor, 6> grads;
  for (int i = 0; i < 6; ++i) {
    const Tensor& parameter = call.parameters[i];
    const bool whole = i < 4 || call.folded();  // those of a value stage come from its sums
    grads[i] = parameter.defined() && whole ? at::zeros_like(parameter) : call.empty({0});
  }
  if (call.folded() && grad_pooled.defined()) {
    const Tensor empty = (lse == kDead<double>).reshape({B * C, 1});
    const Tensor g = grad_pooled.view({B * C, Lv}).masked_fill(empty, 0.);
    grads[4].add_(product_tn(g, call.take(pooled, "pooled", {B, C, L}).view({B * C, L})));
    if (call.v_bias().defined()) grads[5].add_(column_sums(g));
    grad_pooled = product_nn(g, call.v_weight()).view({B, C, L});
  }
  const PooledTensors tensors(call, C, call.pooled_width(), call.folded() ? pooled : bag, scores, lse,
                              grad_pooled.defined() ? OptionalTensor(grad_pooled) : std::nullopt, from.scores,
                              from.lse);
  // A shift of all scores of a bag and class leaves the weights as they are.
  Tensor grad_shift;
  if (!call.mlp() && call.q_bias().defined() && (from.scores || from.lse)) {
    grad_shift = at::zeros({B, C}, call.x.options().dtype(call.acc));
    if (from.lse) grad_shift.add_(tensors.grad_lse);
    if (from.scores) {
      const Tensor real = tensors.grad_scores.masked_fill(scores == kDead<double>, 0.);
      for (int64_t b = 0; b < B; ++b) {
        grad_shift[b].add_(column_sums(real.slice(0, call.offsets[b], call.offsets[b + 1])));
      }
    }
    grad_shift = grad_shift.reshape({B * C}).masked_fill(queries.dead, 0.);
  }

  Tensor grad_vectors = call.empty({B * C, queries.vectors.size(1)});
  with_rows(call, &of_rows,
            [&](const auto& in) { second_stream_rows_backward(call, in, queries, tensors, grad_vectors, grads); });
  grad_vectors.masked_fill_(queries.dead.unsqueeze(1), 0.);  // a class that pools nothing may have summed 0 * NaN
  queries.backward(grad_vectors, grad_shift, {grads[0], grads[1], grads[2], grads[3]}, of_rows);
  for (int i = 0; i < 6; ++i) {
    grads[i] = needs[i] ? grads[i].to(given[i]->scalar_type()) : at::empty({0}, call.x.options());
  }
  return grads;
}

// --- The ops

Outputs dsmil_pool_fwd(const Tensor& x, const Tensor& instance_logits, const OptionalTensors& weights,
                       const OptionalTensor& offsets, const OptionalTensor& mask, const OptionalTensor& seed,
                       std::optional<std::string_view> v_activation, double v_dropout_p, std::optional<double> scale,
                       std::optional<ScalarType> compute_dtype, const OptionalTensors& embed,
                       std::optional<std::string_view> embed_activation, double embed_dropout_p,
                       std::optional<ScalarType> embed_dtype) {
  const DSMILCall call(x, DSMILWeights(weights), offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype,
                       {embed, embed_activation, embed_dropout_p, embed_dtype});
  return second_stream(call, instance_logits);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients dsmil_pool_bwd(const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets,
                         const OptionalTensor& mask, const OptionalTensor& seed, const Tensor& bag,
                         const Tensor& scores, const Tensor& lse, const Tensor& critical, const Tensor& pooled,
                         const OptionalTensors& embed, std::optional<std::string_view> v_activation, double v_dropout_p,
                         std::optional<double> scale, std::optional<ScalarType> compute_dtype,
                         std::optional<std::string_view> embed_activation, double embed_dropout_p,
                         std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag,
                         const OptionalTensor& grad_scores, const OptionalTensor& grad_lse, std::array<bool, 9> needs) {
  const DSMILWeights given(weights);
  const DSMILCall call(x, given, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype,
                       {embed, embed_activation, embed_dropout_p, embed_dtype});
  RowGradients of_rows(call, needs[0], needs[7], needs[8]);
  const auto [q, qb, q2, q2b, v, vb] =
      second_stream_backward(call, given, bag, scores, lse, critical, pooled, {grad_bag, grad_scores, grad_lse},
                             {needs[1], needs[2], needs[3], needs[4], needs[5], needs[6]}, of_rows);
  of_rows.finish();
  return {of_rows.x, q, qb, q2, q2b, v, vb, of_rows.typed_weight(call), of_rows.typed_bias(call)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_fwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& seed, std::optional<std::string_view> v_activation, double v_dropout_p,
    std::optional<double> scale, std::optional<ScalarType> compute_dtype, const OptionalTensors& embed,
    std::optional<std::string_view> embed_activation, double embed_dropout_p, std::optional<ScalarType> embed_dtype) {
  const DualStreamWeights given(weights);
  const EmbedArguments layer{embed, embed_activation, embed_dropout_p, embed_dtype};
  auto [values, indices, logits] = instance_max_forward({x, given.first, offsets, mask, layer});
  const DSMILCall call(x, given.second, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype, layer);
  auto [bag, scores, lse, critical, pooled] = second_stream(call, logits);
  return {bag, scores, lse, critical, values, logits, pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_bwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& seed, const Tensor& bag, const Tensor& scores, const Tensor& lse, const Tensor& critical,
    const Tensor& logits, const Tensor& pooled, const OptionalTensors& embed,
    std::optional<std::string_view> v_activation, double v_dropout_p, std::optional<double> scale,
    std::optional<ScalarType> compute_dtype, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
    const OptionalTensor& grad_lse, const OptionalTensor& grad_values, const OptionalTensor& grad_logits,
    std::array<bool, 11> needs) {
  const DualStreamWeights given(weights);
  const EmbedArguments layer{embed, embed_activation, embed_dropout_p, embed_dtype};
  const DSMILCall call(x, given.second, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype, layer);
  RowGradients of_rows(call, needs[0], needs[9], needs[10]);
  const auto [q, qb, q2, q2b, v, vb] =
      second_stream_backward(call, given.second, bag, scores, lse, critical, pooled, {grad_bag, grad_scores, grad_lse},
                             {needs[3], needs[4], needs[5], needs[6], needs[7], needs[8]}, of_rows);
  const Tensor& weight = given.first.weight();
  const OptionalTensor& bias = given.first.bias();
  Tensor grad_weight = at::empty({0}, x.options()), grad_bias = grad_weight.clone();
  if (grad_values || grad_logits) {
    const ClassCall first(x, given.first, offsets, mask, layer);
    std::tie(grad_weight, grad_bias) = instance_max_gradients(first, critical, logits, grad_values, grad_logits,
                                                              needs[1], needs[2], /*add=*/true, of_rows);
    if (needs[1]) grad_weight = grad_weight.to(weight.scalar_type());
    if (needs[2]) grad_bias = grad_bias.to(bias->scalar_type());
  } else {
    check_need(needs[2], bias.has_value(), "bias");
    if (needs[1]) grad_weight = at::zeros_like(weight, at::MemoryFormat::Contiguous);
    if (needs[2]) grad_bias = at::zeros_like(*bias, at::MemoryFormat::Contiguous);
  }
  of_rows.finish();
  return {
      of_rows.x, grad_weight, grad_bias, q, qb, q2, q2b, v, vb, of_rows.typed_weight(call), of_rows.typed_bias(call)};
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("dsmil_fwd.native", dsmil_fwd);
  m.impl("dsmil_bwd.native", dsmil_bwd);
  m.impl("dsmil_pool_fwd.native", dsmil_pool_fwd);
  m.impl("dsmil_pool_bwd.native", dsmil_pool_bwd);
}

}  // namespace
}  // namespace milkernels
