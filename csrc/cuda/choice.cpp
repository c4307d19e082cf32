// Ops that choose, on a GPU: instance_max, max_pool, topk_instances.
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

// out[indices[j, c, i], c] = or += values[j, c, i], of indices [., columns, any] and values like out.
void put_at(const Call& call, const Tensor& indices, const Tensor& values, bool add, const Tensor& out) {
  const int64_t columns = out.size(1), k = indices.dim() == 3 ? indices.size(2) : 1;
  dispatch(out.scalar_type(), [&]<typename T>() {
    put(places_of(indices, out.size(0)), columns, k, data<const T>(values), add, data<T>(out), call.stream());
  });
}

// The gradient of rows some of which were chosen: zeros, and those of the values at their indices [bags, columns, ...].
Tensor of_chosen(const Tensor& x, const Tensor& indices, const Tensor& grad_values, bool need) {
  const Call call(x, std::nullopt, std::nullopt);
  TORCH_CHECK_VALUE(indices.dim() >= 2 && indices.size(1) == call.width, "indices must be [bags, ", call.width,
                    ", ...]; got ", indices.sizes());
  TORCH_CHECK_VALUE(call.here(grad_values) && grad_values.sizes() == indices.sizes(), "grad_values must be ",
                    indices.sizes(), " on ", x.device(), "; got ", grad_values.sizes());
  const Tensor rows = call.take_indices(indices, "indices", indices.sizes()), grad = call.grad_x(need);
  if (need) put_at(call, rows, grad_values.to(x.scalar_type()).contiguous(), false, grad.zero_());
  return grad;
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
  if (call.embedding) return false;
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
  for_instances(call, nullptr, [&](const Slice& slice) { products(call, slice, weight, bias, kDead, logits); });
  const auto [largest, rows] = first_max(call, logits, true, kDead);
  return {largest, rows, logits};
}

// The gradients of W and b in the accumulation type, empty where nobody needs them, from those of all logits. That of
// the rows is written, or with `onto` added to what is there.
std::tuple<Tensor, Tensor> logit_gradients(ClassCall& call, const Tensor& of_logits, std::array<bool, 2> needs,
                                           RowGradients& rows, bool onto) {
  std::optional<Sums> of_weight;
  if (needs[0]) of_weight.emplace(call, call.one_bag(), call.classes, call.width, Scoring::kWeights);
  const auto take_back = [&](const Slice& slice) {
    if (needs[0]) of_weight->add(slice.x, slice.first, of_logits);
    if (!rows.wanted()) return;
    if (onto) rows.add(slice, {of_logits, call.weight});
    else rows.write(slice, {}, {of_logits, call.weight});
  };
  if (needs[0] || rows.wanted()) for_instances(call, &rows, take_back);
  return {needs[0] ? of_weight->bag.squeeze(0) : call.empty({0}), needs[1] ? of_logits.sum(0) : call.empty({0})};
}

Tensor taken_logit_gradients(const ClassCall& call, const Tensor& logits, const Tensor& grad_logits) {
  return alive(call.take(grad_logits, "grad_logits", {call.rows, call.classes}),
               call.take(logits, "logits", {call.rows, call.classes}));
}

// The same from those of the maxima too: of a few rows, unless the logits have a gradient.
std::tuple<Tensor, Tensor> instance_max_gradients(ClassCall& call, const Tensor& indices, const Tensor& logits,
                                                  const OptionalTensor& grad_values, const OptionalTensor& grad_logits,
                                                  std::array<bool, 2> needs, RowGradients& rows) {
  const int64_t C = call.classes;
  const Tensor chosen = call.take_indices(indices, "indices", {call.bags, C}),
               of_values = call.take(grad_values, "grad_values", {call.bags, C});
  if (grad_logits) {
    const Tensor of_logits = taken_logit_gradients(call, logits, *grad_logits);
    if (of_values.defined()) put_at(call, chosen, of_values, true, of_logits);
    return logit_gradients(call, of_logits, needs, rows, false);
  }
  // Few rows have a gradient, and nothing else is read.
  TORCH_CHECK_VALUE(of_values.defined(), "neither values nor logits have a gradient");
  const Slice winners = instances_at(call, chosen);
  const auto [of_rows, of_weight, of_bias] = winner_gradients(of_values, chosen, winners.x.to(call.acc), call.weight);
  rows.zero();
  if (rows.wanted()) rows.add_at(winners, of_rows.view({call.bags, C, call.width}));
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> instance_max_bwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const Tensor& indices, const Tensor& logits, const OptionalTensors& embed,
    std::optional<std::string_view> embed_activation, double embed_dropout_p, std::optional<ScalarType> embed_dtype,
    const OptionalTensor& grad_values, const OptionalTensor& grad_logits, std::array<bool, 5> needs) {
  const ClassifierWeights given(weights);
  ClassCall call(x, given, offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  check_needs(needs.data() + 1, given);
  RowGradients rows(call, needs[0], needs[3], needs[4]);
  const auto [grad_weight, grad_bias] =
      instance_max_gradients(call, indices, logits, grad_values, grad_logits, {needs[1], needs[2]}, rows);
  return std::tuple_cat(std::make_tuple(rows.x, grad_weight.to(given.weight().scalar_type()),
                                        given.bias() ? grad_bias.to(given.bias()->scalar_type()) : grad_bias),
                        rows.parameters());
}

std::tuple<Tensor, Tensor> logits_bwd_(const Tensor& grad_x, const Tensor& grad_e_weight, const Tensor& grad_e_bias,
                                       const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets,
                                       const OptionalTensor& mask, const Tensor& logits, const OptionalTensors& embed,
                                       std::optional<std::string_view> embed_activation, double embed_dropout_p,
                                       std::optional<ScalarType> embed_dtype, const Tensor& grad_logits) {
  ClassCall call(x, ClassifierWeights(weights), offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  RowGradients rows(call, grad_x, grad_e_weight, grad_e_bias);
  return logit_gradients(call, taken_logit_gradients(call, logits, grad_logits), {true, true}, rows, true);
}

// --- max_pool

std::tuple<Tensor, Tensor> max_pool_fwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask) {
  const Call call(x, offsets, mask);
  return first_max(call, call.x, false, 0);
}

Tensor max_pool_bwd(const Tensor& x, const Tensor& indices, const Tensor& grad_values, std::array<bool, 1> needs) {
  return of_chosen(x, indices, grad_values, needs[0]);
}

// --- topk_instances

// Rows [columns, rows], bag after bag, in each of them the best first and the dead last: one sort by the library.
template <typename T>
Tensor order_of(const Call& call, TopK<T> p) {
  const Tensor keys = empty_indices(call, {call.width, call.rows});
  p.keys = data<int64_t>(keys);
  sort_keys(p, call.stream());
  if (sizeof(T) < sizeof(double)) return std::get<1>(at::sort(keys, /*stable=*/true, 1, /*descending=*/false));
  // Numbers fill 64 bits and are sorted first.
  const Tensor order = std::get<1>(at::sort(call.x.t().contiguous(), /*stable=*/true, 1, p.largest));
  return order.gather(1, std::get<1>(at::sort(keys.gather(1, order), /*stable=*/true, 1, /*descending=*/false)));
}

std::tuple<Tensor, Tensor> topk_instances_fwd(const Tensor& scores, int64_t k, const OptionalTensor& offsets,
                                              bool largest, const OptionalTensor& mask) {
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1; got ", k);
  const Call call(scores, offsets, mask);
  const Tensor values = at::empty({call.bags, call.width, k}, call.x.options()),
               indices = empty_indices(call, values.sizes());
  dispatch(call.x.scalar_type(), [&]<typename T>() {
    TopK<T> p{call.typed<T>(), call.ragged(), largest, nullptr, nullptr, k, data<T>(values), data<int64_t>(indices)};
    const Tensor order = order_of(call, p);
    p.order = data<const int64_t>(order);
    pick(p, call.stream());
  });
  return {values, indices};
}

Tensor topk_instances_bwd(const Tensor& scores, const Tensor& indices, const Tensor& grad_values,
                          std::array<bool, 1> needs) {
  return of_chosen(scores, indices, grad_values, needs[0]);
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("logits_bwd_.native", logits_bwd_);
  m.impl("instance_max_fwd.native", instance_max_fwd);
  m.impl("instance_max_bwd.native", instance_max_bwd);
  m.impl("max_pool_fwd.native", max_pool_fwd);
  m.impl("max_pool_bwd.native", max_pool_bwd);
  m.impl("topk_instances_fwd.native", topk_instances_fwd);
  m.impl("topk_instances_bwd.native", topk_instances_bwd);
}

}  // namespace
}  // namespace milkernels
