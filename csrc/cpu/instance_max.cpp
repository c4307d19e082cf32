#include "instance_max.h"

#include <torch/library.h>

namespace milkernels {

std::tuple<Tensor, Tensor, Tensor> instance_max_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    const OptionalTensor& offsets, const OptionalTensor& mask) {
  const ClassCall call(x, weight, bias, offsets, mask);
  Tensor values = call.empty({call.bags(), call.classes}), logits = call.empty({call.rows, call.classes});
  Tensor indices = at::empty({call.bags(), call.classes}, x.options().dtype(at::kLong));
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const auto in = call.ragged<T>();
    const QueryScore<T> score(in, call.queries<A>());
    pool_forward(score, in, logits.mutable_data_ptr<A>(),
                 FirstMax<T>(in, call.classes, values.mutable_data_ptr<A>(), indices.mutable_data_ptr<int64_t>()));
  });
  return {values, indices, logits};
}

namespace {

// Where only the maxima have a gradient, it goes to the rows that have them and nothing else is read.
template <typename T>
void add_winners(const ClassCall& call, const Tensor& indices, const Tensor& grad_values, T* grad_x,
                 acc_t<T>* grad_weight, acc_t<T>* grad_bias) {
  using A = acc_t<T>;
  const auto in = call.ragged<T>();
  const int64_t* const row = indices.const_data_ptr<int64_t>();
  const A *const grads = grad_values.const_data_ptr<A>(), *const weight = call.weight.const_data_ptr<A>();
  if (grad_weight != nullptr) std::fill_n(grad_weight, call.classes * call.width, A(0));
  if (grad_bias != nullptr) std::fill_n(grad_bias, call.classes, A(0));
  std::vector<A> values(call.width);
  for (int64_t i = 0; i < call.bags() * call.classes; ++i) {
    if (row[i] < 0) continue;
    const int64_t c = i % call.classes;
    if (grad_bias != nullptr) grad_bias[c] += grads[i];
    if (grad_weight != nullptr) {
      convert_row(in.x + row[i] * in.ld, values.data(), call.width);
      add_to_row<A>(grad_weight + c * call.width, values.data(), grads[i], call.width);
    }
    if (grad_x != nullptr) add_to_row(grad_x + row[i] * call.width, weight + c * call.width, grads[i], call.width);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> instance_max_gradients(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const Tensor& indices, const Tensor& logits, const OptionalTensor& grad_values,
    const OptionalTensor& grad_logits, std::array<bool, 3> needs, const OptionalTensor& add_to) {
  const ClassCall call(x, weight, bias, offsets, mask);
  const int64_t B = call.bags(), C = call.classes;
  const Tensor rows = call.take_indices(indices, "indices", {B, C}), l = call.take(logits, "logits", {call.rows, C}),
               values = call.take(grad_values, "grad_values", {B, C});
  Tensor dense = call.take(grad_logits, "grad_logits", {call.rows, C});
  const bool rows_only = !dense.defined() && add_to;
  Tensor grad_x = rows_only ? *add_to : call.grad_x(needs[0]),
         grad_weight = call.gradient(needs[1], call.weight.sizes()), grad_bias = call.gradient(needs[2], {C});
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const auto out_x = data_if<T>(needs[0], grad_x);
    const auto out_weight = data_if<A>(needs[1], grad_weight), out_bias = data_if<A>(needs[2], grad_bias);
    if (!dense.defined()) {
      if (needs[0] && !rows_only) zero_rows(out_x, call.rows * call.width);
      add_winners<T>(call, rows, values, out_x, out_weight, out_bias);
      return;
    }
    if (values.defined()) {  // each goes to its own logit
      dense = dense.clone();
      const int64_t* const row = rows.const_data_ptr<int64_t>();
      for (int64_t i = 0; i < B * C; ++i) {
        if (row[i] >= 0) dense.mutable_data_ptr<A>()[row[i] * C + i % C] += values.const_data_ptr<A>()[i];
      }
    }
    const auto in = call.ragged<T>();
    QueryScore<T> score(in, call.queries<A>());
    if (needs[1] || needs[2]) score.products.prepare_gradient();
    const PoolGradients<A> g{nullptr, l.const_data_ptr<A>(), nullptr, nullptr, dense.const_data_ptr<A>(), nullptr};
    pool_backward<T>(score, nullptr, in, g, out_x, in.chunks());
    if (needs[1]) score.products.gradient(out_weight, nullptr);
    if (needs[2]) score.products.shift_gradient(out_bias);
  });
  if (needs[1]) grad_weight = grad_weight.to(weight.scalar_type());
  if (needs[2]) grad_bias = grad_bias.to(bias->scalar_type());
  if (needs[0] && add_to && !rows_only) grad_x = add_to->add_(grad_x);
  return {grad_x, grad_weight, grad_bias};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> instance_max_bwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    const OptionalTensor& offsets, const OptionalTensor& mask,
                                                    const Tensor& indices, const Tensor& logits,
                                                    const OptionalTensor& grad_values,
                                                    const OptionalTensor& grad_logits, std::array<bool, 3> needs) {
  return instance_max_gradients(x, weight, bias, offsets, mask, indices, logits, grad_values, grad_logits, needs, {});
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("instance_max_fwd.native", instance_max_fwd);
  m.impl("instance_max_bwd.native", instance_max_bwd);
}

}  // namespace
}  // namespace milkernels
