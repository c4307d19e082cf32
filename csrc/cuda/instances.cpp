#include "instances.h"

#include "choice.h"

namespace milkernels {
namespace {

// The embedding of rows of x in the type of products.
Slice embedded(const Call& call, const Slice& rows, bool gradient) {
  const Embedding& e = *call.embedding;
  const Tensor z = product(rows.x, e.weight.t(), call.acc);
  Slice out = rows;
  out.embedded = true;
  out.x = at::empty({rows.count, call.width}, rows.x.options());
  dispatch(rows.x.scalar_type(), [&]<typename E>() {
    using A = acc_t<E>;
    embed_rows(EmbedRows<E>{call.numbers(rows), data<A>(z), static_cast<int>(call.width), data<A>(e.bias), e.activation,
                            e.dropout.typed(), data<E>(out.x), gradient},
               call.stream());
  });
  if (gradient) out.input = rows.x, out.argument = z;
  return out;
}

}  // namespace

Slice instances(const Call& call, int64_t first, int64_t count, const RowGradients* to) {
  const bool gradient = to != nullptr && to->wanted();
  Slice rows{call.x.narrow(0, first, count), first, count};
  if (!call.embedding) return rows;
  rows.x = rows_for_products(call, rows, call.row_type(), gradient);
  return embedded(call, rows, gradient);
}

Slice instances_at(const Call& call, const Tensor& indices) {
  const Tensor x = gather_rows(call, indices).flatten(0, 1);
  if (!call.embedding) return {x, 0, x.size(0), indices};
  return embedded(call, {x.to(call.row_type()), 0, x.size(0), indices}, true);
}

int64_t bytes_of_instance(const Call& call, const RowGradients* to) {
  if (!call.embedding) return 0;
  const bool gradient = to != nullptr && to->wanted();
  const auto size = [](ScalarType type) { return static_cast<int64_t>(c10::elementSize(type)); };
  const int64_t of_sums = size(call.acc), of_rows = size(call.row_type()), in = call.x.size(1);
  const bool copied = call.x.scalar_type() != call.row_type() || (gradient && call.mask.defined());
  // x, products, rows; and the gradients of the last two, what float16 finds a scale on, the scaled, and that of x.
  const int64_t gradients = (call.row_type() == at::kHalf ? 4 : 2) * of_sums + of_rows;
  return (copied ? in * of_rows : 0) + call.width * (of_sums + of_rows) +
         (gradient ? call.width * gradients + (to->need_x() ? in * of_sums : 0) : 0);
}

RowGradients::RowGradients(const Call& call, bool x, bool weight, bool bias) : x(call.grad_x(x)), call_(call) {
  check_need(weight, call.embedding.has_value(), "e_weight");
  check_need(bias, call.embedding && call.embedding->bias.defined(), "e_bias");
  if (weight) weight_ = at::zeros(call.embedding->weight.sizes(), call.x.options().dtype(call.acc));
  if (bias) bias_ = at::zeros({call.width}, call.x.options().dtype(call.acc));
}

RowGradients::RowGradients(const Call& call, const Tensor& x, const Tensor& weight, const Tensor& bias)
    : x(x), call_(call) {
  const auto take = [&](const Tensor& t, const char* name, at::IntArrayRef sizes, ScalarType type) {
    if (t.numel() == 0) return Tensor();
    TORCH_CHECK_VALUE(call.here(t) && t.sizes() == sizes && t.scalar_type() == type && t.is_contiguous(), name,
                      " must be empty or a contiguous gradient; got ", t.scalar_type(), " ", t.sizes());
    return t;
  };
  take(x, "grad_x", call.x.sizes(), call.x.scalar_type());
  const int64_t in = call.x.size(1);
  weight_ = take(weight, "grad_e_weight", {call.embedding ? call.width : 0, in}, call.acc);
  bias_ = take(bias, "grad_e_bias", {call.embedding ? call.width : 0}, call.acc);
}

// From the gradient of embedded rows, which is that of the activations.
LayerGradient RowGradients::into_layer(const Slice& slice, const Tensor& grad) {
  const Embedding& e = *call_.embedding;
  Slice of_rows = slice;
  of_rows.x = grad;
  const Tensor of_products = copied_rows(call_, of_rows, call_.acc,
                                         {e.dropout.typed(), slice.argument, e.activation, DropoutBranch::kEmbedding});
  if (bias_.defined()) bias_ += of_products.sum(0);
  const LayerGradient layer(of_products, call_.row_type());
  if (weight_.defined()) weight_ += layer.of_weight(slice.input);
  return layer;
}

void RowGradients::write(const Slice& slice, const TermTensors& pooled, const TermTensors& scored,
                         const Tensor& product, const Tensor& scale) {
  const Tensor of_x = need_x() ? x.narrow(0, slice.first, slice.count) : Tensor();
  if (!call_.embedding) return expand(call_, of_x, slice.first, pooled, scored, product, scale);
  const Tensor grad = product.defined() ? product : call_.empty({slice.count, call_.width});
  expand(call_, grad, slice.first, pooled, scored, product, scale);
  const LayerGradient layer = into_layer(slice, grad);
  if (need_x()) layer.write_of_x(call_.embedding->weight, of_x);
}

void RowGradients::add(const Slice& slice, const TermTensors& scored) {
  if (call_.embedding) {
    const Tensor grad = call_.empty({slice.count, call_.width});
    expand(call_, grad, slice.first, {}, scored);
    const LayerGradient layer = into_layer(slice, grad);
    if (need_x()) x.narrow(0, slice.first, slice.count).add_(layer.of_x(call_.embedding->weight));
    return;
  }
  // What has the type of sums already is read where it stands.
  if (x.scalar_type() == call_.acc) return expand(call_, x, 0, {}, scored, x);
  call_.in_slices(call_.width * static_cast<int64_t>(c10::elementSize(call_.acc)), [&](int64_t first, int64_t count) {
    const Tensor rows = x.narrow(0, first, count);
    expand(call_, rows, first, {}, scored, rows.to(call_.acc));
  });
}

void RowGradients::add_at(const Slice& chosen, const Tensor& vectors) {
  if (!call_.embedding) return add_to_rows(call_, chosen.places, vectors, x);
  const LayerGradient layer = into_layer(chosen, vectors.reshape({chosen.count, call_.width}).contiguous());
  if (!need_x()) return;
  const Tensor of_x = layer.of_x(call_.embedding->weight);
  add_to_rows(call_, chosen.places, of_x.view({vectors.size(0), vectors.size(1), of_x.size(1)}), x);
}

std::tuple<Tensor, Tensor> RowGradients::sums() const {
  const auto own = [&](const Tensor& sum) { return sum.defined() ? sum : call_.empty({0}); };
  return {own(weight_), own(bias_)};
}

std::tuple<Tensor, Tensor> RowGradients::parameters() const {
  const auto [weight, bias] = sums();
  if (!call_.embedding) return {weight, bias};
  return {weight.to(call_.embedding->weight_type), bias.to(call_.embedding->bias_type)};
}

}  // namespace milkernels
