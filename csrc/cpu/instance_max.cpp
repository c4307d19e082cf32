// instance_max on the CPU, the first stream of DSMIL (Li, Li, Eliceiri 2021).
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>

#include "few_rows.h"
#include "instances.h"

namespace milkernels {

namespace {

// Each gradient of a maximum goes to its own logit.
Tensor with_winners(const Tensor& grad_logits, const Tensor& indices, const Tensor& grad_values) {
  Tensor all = grad_logits.clone();
  const int64_t C = all.size(1);
  AT_DISPATCH_FLOATING_TYPES(all.scalar_type(), "instance_max_bwd", [&] {
    const int64_t* const row = indices.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < indices.numel(); ++i) {
      if (row[i] >= 0) {
        all.mutable_data_ptr<scalar_t>()[row[i] * C + i % C] += grad_values.const_data_ptr<scalar_t>()[i];
      }
    }
  });
  return all;
}

// Gradients of weight and bias (empty where nobody needs them), in the accumulation type, from those of all logits;
// writes those of the rows.
std::tuple<Tensor, Tensor> logit_gradients(const ClassCall& call, const Tensor& logits, const Tensor& grad_logits,
                                           bool need_weight, bool need_bias, RowGradients& of_rows) {
  Tensor grad_weight = call.gradient(need_weight, call.weight.sizes()),
         grad_bias = call.gradient(need_bias, {call.classes});
  with_rows(call, &of_rows, [&]<typename T>(const Ragged<T>& in) {
    using A = acc_t<T>;
    QueryScore<T> score(in, call.queries<A>());
    if (need_weight || need_bias) score.products.prepare_gradient();
    const PoolGradients<A> g{nullptr, logits.const_data_ptr<A>(),      nullptr,
                             nullptr, grad_logits.const_data_ptr<A>(), nullptr};
    pool_backward<T>(score, nullptr, in, g);
    if (need_weight) score.products.gradient(grad_weight.mutable_data_ptr<A>(), nullptr);
    if (need_bias) score.products.shift_gradient(grad_bias.mutable_data_ptr<A>());
  });
  return {grad_weight, grad_bias};
}

// The same from those of the maxima too: of a few rows, unless logits have a gradient.
std::tuple<Tensor, Tensor> instance_max_gradients(const ClassCall& call, const Tensor& indices, const Tensor& logits,
                                                  const OptionalTensor& grad_values, const OptionalTensor& grad_logits,
                                                  bool need_weight, bool need_bias, RowGradients& of_rows) {
  const int64_t B = call.bags, C = call.classes;
  const Tensor rows = call.take_indices(indices, "indices", {B, C}), l = call.take(logits, "logits", {call.rows, C}),
               values = call.take(grad_values, "grad_values", {B, C}),
               dense = call.take(grad_logits, "grad_logits", {call.rows, C});
  check_need(need_bias, call.bias.defined(), "bias");
  if (dense.defined()) {
    const Tensor all = values.defined() ? with_winners(dense, rows, values) : dense;
    return logit_gradients(call, l, all, need_weight, need_bias, of_rows);
  }
  of_rows.zero();
  if (values.defined()) {  // it goes to the rows that have the maxima, and nothing else is read
    const SomeRows winners(call, rows);
    const auto [of_winners, of_weight, of_bias] = winner_gradients(values, rows, winners.rows, call.weight);
    if (of_rows.any()) winners.backward(of_winners, of_rows);
    return {need_weight ? of_weight : call.empty({0}), need_bias ? of_bias : call.empty({0})};
  }
  return {call.gradient(need_weight, call.weight.sizes()).zero_(), call.gradient(need_bias, {C}).zero_()};
}

std::tuple<Tensor, Tensor, Tensor> largest_logits(const ClassCall& call) {
  Tensor values = call.empty({call.bags, call.classes}), logits = call.empty({call.rows, call.classes});
  Tensor indices = at::empty({call.bags, call.classes}, call.x.options().dtype(at::kLong));
  with_rows(call, nullptr, [&]<typename T>(const Ragged<T>& in) {
    using A = acc_t<T>;
    const QueryScore<T> score(in, call.queries<A>());
    pool_forward(score, in, logits.mutable_data_ptr<A>(),
                 FirstMax<T>(in, call.classes, values.mutable_data_ptr<A>(), indices.mutable_data_ptr<int64_t>()));
  });
  return {values, indices, logits};
}

std::tuple<Tensor, Tensor, Tensor> instance_max_fwd(const Tensor& x, const OptionalTensors& weights,
                                                    const OptionalTensor& offsets, const OptionalTensor& mask,
                                                    const OptionalTensors& embed,
                                                    std::optional<std::string_view> embed_activation,
                                                    double embed_dropout_p, std::optional<ScalarType> embed_dtype) {
  return largest_logits(
      {x, ClassifierWeights(weights), offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype}});
}

// The same, which keeps the embedded rows.
std::tuple<Tensor, Tensor, Tensor> dsmil_logits_fwd(const Tensor& x, const OptionalTensors& weights,
                                                    const OptionalTensor& offsets, const OptionalTensor& mask,
                                                    const OptionalTensors& embed,
                                                    std::optional<std::string_view> embed_activation,
                                                    double embed_dropout_p, std::optional<ScalarType> embed_dtype,
                                                    const Tensor& kept) {
  ClassCall call(x, ClassifierWeights(weights), offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  call.use_kept(kept, 0, embed_dtype, false, false);
  return largest_logits(call);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> instance_max_bwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const Tensor& indices, const Tensor& logits, const OptionalTensors& embed,
    std::optional<std::string_view> embed_activation, double embed_dropout_p, std::optional<ScalarType> embed_dtype,
    const OptionalTensor& grad_values, const OptionalTensor& grad_logits, std::array<bool, 5> needs) {
  const ClassifierWeights given(weights);
  const ClassCall call(x, given, offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  RowGradients of_rows(call, needs[0], needs[3], needs[4]);
  auto [grad_weight, grad_bias] =
      instance_max_gradients(call, indices, logits, grad_values, grad_logits, needs[1], needs[2], of_rows);
  of_rows.finish();
  if (needs[1]) grad_weight = grad_weight.to(given.weight().scalar_type());
  if (needs[2]) grad_bias = grad_bias.to(given.bias()->scalar_type());
  return {of_rows.x, grad_weight, grad_bias, of_rows.typed_weight(call), of_rows.typed_bias(call)};
}

std::tuple<Tensor, Tensor> logits_bwd_(const Tensor& grad_x, const Tensor& grad_e_weight, const Tensor& grad_e_bias,
                                       const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets,
                                       const OptionalTensor& mask, const Tensor& logits, const OptionalTensors& embed,
                                       std::optional<std::string_view> embed_activation, double embed_dropout_p,
                                       std::optional<ScalarType> embed_dtype, const Tensor& kept,
                                       const Tensor& grad_logits) {
  ClassCall call(x, ClassifierWeights(weights), offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  call.use_kept(kept, 0, embed_dtype, true, true);
  RowGradients onto(call, grad_x, grad_e_weight, grad_e_bias),
      found(call, onto.need_x, onto.need_weight, onto.need_bias);
  const Tensor l = call.take(logits, "logits", {call.rows, call.classes}),
               g = call.take(grad_logits, "grad_logits", {call.rows, call.classes});
  const auto of_layer = logit_gradients(call, l, g, true, true, found);
  if (onto.need_x) onto.x.add_(found.x);
  if (onto.need_weight) onto.weight.add_(found.weight);
  if (onto.need_bias) onto.bias.add_(found.bias);
  return of_layer;
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("logits_bwd_.native", logits_bwd_);
  m.impl("dsmil_logits_fwd.native", dsmil_logits_fwd);
  m.impl("instance_max_fwd.native", instance_max_fwd);
  m.impl("instance_max_bwd.native", instance_max_bwd);
}

}  // namespace
}  // namespace milkernels
