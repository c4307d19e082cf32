// Ops that choose, on a GPU: instance_max, max_pool.
#include "choice.h"

#include <torch/library.h>

#include <tuple>
#include <utility>

#include "choice_kernels.h"
#include "pooling.h"

namespace milkernels {
namespace {

Tensor empty_indices(const Call& call, at::IntArrayRef sizes) {
  return at::empty(sizes, call.x.options().dtype(at::kLong));
}

// The workspace for what segments chose; it is empty where each bag lies in one chunk.
struct ChosenTensors {
  ChosenTensors(const Call& call, int64_t columns)
      : values(call.empty({call.ragged().whole() ? 0 : call.slots(), columns})),
        rows(empty_indices(call, values.sizes())) {}
  template <typename A>
  Chosen<A> typed() const {
    return {data<A>(values), data<int64_t>(rows)};
  }
  Tensor values, rows;
};

Places places_of(const Tensor& indices, int64_t rows) { return {data<int64_t>(indices), indices.numel(), rows}; }

// out[indices[b, c], c] = or += values[b, c], of values like out.
void put_at(const Call& call, const Tensor& indices, const Tensor& values, bool add, const Tensor& out) {
  dispatch(out.scalar_type(), [&]<typename T>() {
    put(places_of(indices, out.size(0)), out.size(1), data<const T>(values), add, data<T>(out), call.stream());
  });
}

// values [bags, C] and rows [bags, C] of the first largest of the columns of values [rows, C], in their type; where
// there is nothing to choose, `empty` and -1. `dead`: -inf is never chosen.
std::pair<Tensor, Tensor> first_max(const Call& call, const Tensor& values, bool dead, double empty) {
  const int64_t C = values.size(1);
  const Tensor out = at::empty({call.bags, C}, values.options()), indices = empty_indices(call, out.sizes());
  const ChosenTensors partials(call, C);
  dispatch(values.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    first_max(FirstMax<T>{Call::rows_at<T>(values), call.ragged(), dead, static_cast<A>(empty), partials.typed<A>(),
                          data<T>(out), data<int64_t>(indices)},
              call.stream());
  });
  return {out, indices};
}

}  // namespace

// --- What other ops need

Tensor gather_rows(const Call& call, const Tensor& indices) {
  const Tensor out = at::empty({indices.size(0), indices.size(1), call.x.size(1)}, call.x.options());
  dispatch(call.x.scalar_type(), [&]<typename T>() {
    gather_rows(places_of(indices, call.rows), call.typed<T>(), data<T>(out), call.stream());
  });
  return out;
}

void check_written(const Call& call, const Tensor& grad_x, const Tensor& grad_e_weight, const Tensor& grad_e_bias) {
  TORCH_CHECK_VALUE(grad_x.numel() == 0 || (call.here(grad_x) && grad_x.sizes() == call.x.sizes() &&
                                            grad_x.scalar_type() == call.x.scalar_type() && grad_x.is_contiguous()),
                    "grad_x must be empty or a contiguous gradient; got ", grad_x.scalar_type(), " ", grad_x.sizes());
  TORCH_CHECK_VALUE(grad_e_weight.numel() == 0 && grad_e_bias.numel() == 0,
                    "grad_e_weight and grad_e_bias must be empty without embed; got ", grad_e_weight.sizes(), " and ",
                    grad_e_bias.sizes());
}

void add_to_rows(const Call& call, const Tensor& indices, const Tensor& vectors, const Tensor& out) {
  dispatch(out.scalar_type(), [&]<typename T>() {
    add_rows(places_of(indices, out.size(0)), static_cast<int>(indices.size(1)), static_cast<int>(out.size(1)),
             data<const acc_t<T>>(vectors), data<T>(out), call.stream());
  });
}

std::tuple<Tensor, Tensor, Tensor> winner_gradients(const Tensor& grad_values, const Tensor& indices,
                                                    const Tensor& rows, const Tensor& weight) {
  const Tensor g = grad_values.masked_fill(indices < 0, 0).unsqueeze(2);
  const Tensor of_weight = (g * rows.view({g.size(0), g.size(1), rows.size(1)})).sum(0);
  return {(g * weight).flatten(0, 1), of_weight, g.sum({0, 2})};
}

// --- instance_max

namespace {

// Does all of it in one read of x, or returns false where its rows do not fit.
bool instance_max_at_once(Call& call, const Tensor& weight, const Tensor& bias, const Tensor& values,
                          const Tensor& indices, const Tensor& logits) {
  const int64_t C = weight.size(0);
  const ChosenTensors partials(call, C);
  return dispatch(call.x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    return class_max(ClassMax<T>{call.typed<T>(), call.ragged(), data<A>(weight), data<A>(bias), static_cast<int>(C),
                                 data<A>(logits), partials.typed<A>(), data<A>(values), data<int64_t>(indices)},
                     call.stream());
  });
}

std::tuple<Tensor, Tensor, Tensor> instance_max(Call& call, const Tensor& weight, const Tensor& bias) {
  const int64_t C = weight.size(0);
  const Tensor values = call.empty({call.bags, C}), indices = empty_indices(call, values.sizes());
  const Tensor logits = call.empty({call.rows, C});
  if (instance_max_at_once(call, weight, bias, values, indices, logits)) return {values, indices, logits};
  products(call, weight, bias, kDead, logits);
  const auto [largest, rows] = first_max(call, logits, true, kDead);
  return {largest, rows, logits};
}

// The gradients of W and b in the accumulation type, empty where nobody needs them, from those of all logits.
std::tuple<Tensor, Tensor> logit_gradients(ClassCall& call, const Tensor& of_logits, std::array<bool, 2> needs) {
  return {needs[0] ? weighted_sums(call, call.one_bag(), of_logits).squeeze(0) : call.empty({0}),
          needs[1] ? of_logits.sum(0) : call.empty({0})};
}

Tensor taken_logit_gradients(const ClassCall& call, const Tensor& logits, const Tensor& grad_logits) {
  return alive(call.take(grad_logits, "grad_logits", {call.rows, call.classes}),
               call.take(logits, "logits", {call.rows, call.classes}));
}

// The same from those of the maxima too: of a few rows, unless the logits have a gradient. That of x is written.
std::tuple<Tensor, Tensor> instance_max_gradients(ClassCall& call, const Tensor& indices, const Tensor& logits,
                                                  const OptionalTensor& grad_values, const OptionalTensor& grad_logits,
                                                  std::array<bool, 2> needs, const Tensor& grad_x) {
  const int64_t C = call.classes;
  const Tensor chosen = call.take_indices(indices, "indices", {call.bags, C}),
               of_values = call.take(grad_values, "grad_values", {call.bags, C});
  if (grad_logits) {
    const Tensor of_logits = taken_logit_gradients(call, logits, *grad_logits);
    if (of_values.defined()) put_at(call, chosen, of_values, true, of_logits);
    if (grad_x.numel() > 0) expand(call, grad_x, 0, {}, {of_logits, call.weight});
    return logit_gradients(call, of_logits, needs);
  }
  // Few rows have a gradient, and nothing else is read.
  TORCH_CHECK_VALUE(of_values.defined(), "neither values nor logits have a gradient");
  const Tensor winners = gather_rows(call, chosen).flatten(0, 1).to(call.acc);
  const auto [of_rows, of_weight, of_bias] = winner_gradients(of_values, chosen, winners, call.weight);
  grad_x.zero_();
  if (grad_x.numel() > 0) add_to_rows(call, chosen, of_rows, grad_x);
  return {needs[0] ? of_weight : call.empty({0}), needs[1] ? of_bias : call.empty({0})};
}

std::tuple<Tensor, Tensor, Tensor> instance_max_fwd(const Tensor& x, const OptionalTensors& weights,
                                                    const OptionalTensor& offsets, const OptionalTensor& mask,
                                                    const OptionalTensors& embed,
                                                    std::optional<std::string_view> embed_activation,
                                                    double embed_dropout_p, std::optional<ScalarType> embed_dtype) {
  ClassCall call(x, ClassifierWeights(weights), offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  return instance_max(call, call.weight, call.bias);
}

std::tuple<Tensor, Tensor, Tensor> dsmil_logits_fwd(const Tensor& x, const OptionalTensors& weights,
                                                    const OptionalTensor& offsets, const OptionalTensor& mask,
                                                    const OptionalTensors& embed,
                                                    std::optional<std::string_view> embed_activation,
                                                    double embed_dropout_p, std::optional<ScalarType> embed_dtype,
                                                    const Tensor&) {
  return instance_max_fwd(x, weights, offsets, mask, embed, embed_activation, embed_dropout_p, embed_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> instance_max_bwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const Tensor& indices, const Tensor& logits, const OptionalTensors& embed,
    std::optional<std::string_view> embed_activation, double embed_dropout_p, std::optional<ScalarType> embed_dtype,
    const OptionalTensor& grad_values, const OptionalTensor& grad_logits, std::array<bool, 5> needs) {
  const ClassifierWeights given(weights);
  ClassCall call(x, given, offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  check_needs(needs.data() + 1, given);
  const Tensor grad_x = call.grad_x(needs[0]);
  const auto [grad_weight, grad_bias] =
      instance_max_gradients(call, indices, logits, grad_values, grad_logits, {needs[1], needs[2]}, grad_x);
  return std::tuple_cat(std::make_tuple(grad_x, grad_weight.to(given.weight().scalar_type()),
                                        given.bias() ? grad_bias.to(given.bias()->scalar_type()) : grad_bias),
                        call.of_no_embedding(needs[3], needs[4]));
}

std::tuple<Tensor, Tensor> logits_bwd_(const Tensor& grad_x, const Tensor& grad_e_weight, const Tensor& grad_e_bias,
                                       const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets,
                                       const OptionalTensor& mask, const Tensor& logits, const OptionalTensors& embed,
                                       std::optional<std::string_view> embed_activation, double embed_dropout_p,
                                       std::optional<ScalarType> embed_dtype, const Tensor&,
                                       const Tensor& grad_logits) {
  ClassCall call(x, ClassifierWeights(weights), offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  check_written(call, grad_x, grad_e_weight, grad_e_bias);
  const Tensor of_logits = taken_logit_gradients(call, logits, grad_logits);
  if (grad_x.numel() > 0) add_term(call, grad_x, {of_logits, call.weight});
  return logit_gradients(call, of_logits, {true, true});
}

// --- max_pool

std::tuple<Tensor, Tensor> max_pool_fwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask) {
  const Call call(x, offsets, mask);
  return first_max(call, call.x, false, 0);
}

Tensor max_pool_bwd(const Tensor& x, const Tensor& indices, const Tensor& grad_values, std::array<bool, 1> needs) {
  const Call call(x, std::nullopt, std::nullopt);
  TORCH_CHECK_VALUE(indices.dim() == 2 && indices.size(1) == call.width, "indices must be [bags, ", call.width,
                    "]; got ", indices.sizes());
  TORCH_CHECK_VALUE(call.here(grad_values) && grad_values.sizes() == indices.sizes(), "grad_values must be ",
                    indices.sizes(), " on ", x.device(), "; got ", grad_values.sizes());
  const Tensor rows = call.take_indices(indices, "indices", indices.sizes()), grad_x = call.grad_x(needs[0]);
  if (needs[0]) put_at(call, rows, grad_values.to(x.scalar_type()).contiguous(), false, grad_x.zero_());
  return grad_x;
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("logits_bwd_.native", logits_bwd_);
  m.impl("dsmil_logits_fwd.native", dsmil_logits_fwd);
  m.impl("instance_max_fwd.native", instance_max_fwd);
  m.impl("instance_max_bwd.native", instance_max_bwd);
  m.impl("max_pool_fwd.native", max_pool_fwd);
  m.impl("max_pool_bwd.native", max_pool_bwd);
}

}  // namespace
}  // namespace milkernels
