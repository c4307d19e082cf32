// What a GPU does for DSMIL (Li, Li, Eliceiri 2021): the passes of its second stream over the rows, and what touches a
// few of them; milkernels/ops/dsmil_kernels.py composes the ops of these. An MLP query and a value with an activation
// or dropout go through in slices of rows, again in the backward.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "choice.h"
#include "pooling.h"

namespace milkernels {
namespace {

enum Parameter { kQ, kQBias, kQ2, kQ2Bias, kV, kVBias, kParameters };
using Parameters = std::array<Tensor, kParameters>;

void add_to(Tensor& sum, const Tensor& part) { sum = sum.defined() ? sum + part : part; }

class DSMILCall : public WithSecondStream<Call> {
 public:
  DSMILCall(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
            const DSMILWeights& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
            const OptionalTensor& seed, const std::optional<std::string_view>& v_activation, double v_dropout_p,
            std::optional<ScalarType> compute_dtype, const EmbedArguments& embed)
      : WithSecondStream(x, vectors, shift, critical, weights, offsets, mask, v_activation, embed),
        type(product_type(row_type(), compute_dtype)), dropout(*this, seed, v_dropout_p),
        value_rows(layered() || dropout) {}

  // Bytes of a slice's row: activations of the query and the value, and their gradients.
  int64_t bytes_per_row(const RowGradients* to = nullptr) const {
    const bool gradient = to != nullptr;
    const int64_t units =
        (mlp() ? parameters[kQ].size(0) + parameters[kQ2].size(0) : 0) + (value_rows ? pooled_width() : 0);
    const int64_t numbers = units * (gradient ? 4 : 2) + width * (gradient ? 1 + mlp() + value_rows : 1 + value_rows);
    return numbers * static_cast<int64_t>(c10::elementSize(acc)) + bytes_of_instance(*this, to);
  }

  // W x + b in the accumulation type; x has that of products.
  Tensor layer(const Tensor& x, Parameter weight) const {
    const Tensor z = product(x, parameters[weight].to(type).t(), acc);
    return parameters[weight + 1].defined() ? z.add_(parameters[weight + 1]) : z;
  }

  ScalarType type;  // of products
  DropoutTensors dropout;
  bool value_rows;  // what is pooled are rows of its own, not those of x, since a layer or dropout comes before
};

// The MLP query of a slice's rows: relu(W1 x + b1) and tanh(W2 . + b2), in the accumulation type; and the first in that
// of products.
struct QueryRows {
  QueryRows(const DSMILCall& call, const Tensor& x)
      : first(call.layer(x, kQ).relu_()), hidden(first.to(call.type)), query(call.layer(hidden, kQ2).tanh_()) {}
  Tensor first, hidden, query;
};

// The value of a slice's rows: what goes into V, what is pooled, and what its derivative is taken at.
struct ValueRows {
  ValueRows(const DSMILCall& call, const Slice& slice, bool clean) {
    if (call.dropout) {
      input = copied_rows(call, slice, call.layered() ? call.type : call.row_type(), {call.dropout.typed()});
    } else {
      input = rows_for_products(call, slice, call.type, clean);
    }
    if (!call.layered()) {
      pooled = input;
      return;
    }
    const Tensor z = call.layer(input, kV);
    if (call.v_activation == Activation::kGelu) pooled = at::gelu(z), argument = z;
    else pooled = argument = call.v_activation == Activation::kRelu ? z.relu_() : z.tanh_();
  }
  Tensor input, pooled, argument;
};

// The backward of scores and pooling over the rows: at once where both are linear in x, else slice by slice. Gradients
// of the layers are added, that of x is written.
class RowsBackward {
 public:
  RowsBackward(DSMILCall& call, const PooledTensors& of, RowGradients& to, Parameters& grads)
      : call_(call), of_(of), to_(to), grads_(grads), pool_(call, of, to.wanted() || call.layered()) {}

  // The gradient of the queries' vectors.
  Tensor run() {
    const bool values = call_.value_rows && of_.grad_bag.defined();
    Sums of_vectors(call_, call_.chunked(), call_.classes, call_.vectors.size(2), Scoring::kWeights);
    call_.in_slices(call_.bytes_per_row(&to_), [&](int64_t first, int64_t count) {
      const Slice slice = instances(call_, first, count, &to_);
      Tensor part;
      if (call_.value_rows) {
        const ValueRows rows(call_, slice, true);
        pool_.add({rows.pooled, first, count});
        if (values) part = through_value(rows, slice);
      } else {
        pool_.add(slice);
      }
      if (call_.mlp()) {
        const Tensor x = rows_for_products(call_, slice, call_.type, true);
        const QueryRows rows(call_, x);
        of_vectors.add(rows.query, first, pool_.scores);
        const Tensor of_x = through_query(rows, x, slice);
        if (part.defined() && of_x.defined()) part.add_(of_x);
        else if (of_x.defined()) part = of_x;
      } else {
        of_vectors.add(slice.x, first, pool_.scores);
      }
      if (!to_.wanted()) return;
      // What came through layers, that of the bag, and that of a linear query.
      to_.write(slice, call_.value_rows ? TermTensors{} : pool_.term(),
                call_.mlp() ? TermTensors{} : TermTensors{pool_.scores, call_.vectors}, part);
    });
    return of_vectors.bag;
  }

 private:
  Tensor expanded(const Slice& slice, int64_t width, const TermTensors& term) {
    const Tensor out = call_.empty({slice.count, width});
    expand(call_, out, slice.first, term, {});
    return out;
  }
  Tensor derived(const Tensor& grad, const Slice& slice, const Tensor& z, Activation activation) {
    return copied_rows(call_, {grad, slice.first, slice.count}, call_.acc, {{}, z, activation});
  }

  Tensor through_value(const ValueRows& rows, const Slice& slice) {
    Tensor grad = expanded(slice, call_.pooled_width(), pool_.term());
    if (call_.layered()) {
      grad = through(derived(grad, slice, rows.argument, call_.v_activation), rows.input, kV, to_.wanted());
    }
    if (!to_.wanted() || !call_.dropout) return grad;
    return copied_rows(call_, {grad, slice.first, slice.count}, call_.acc, {call_.dropout.typed()});
  }

  Tensor through_query(const QueryRows& rows, const Tensor& x, const Slice& slice) {
    Tensor grad = expanded(slice, call_.q2_weight().size(0), {pool_.scores, call_.vectors});
    grad = through(derived(grad, slice, rows.query, Activation::kTanh), rows.hidden, kQ2, true);
    return through(derived(grad, slice, rows.first, Activation::kRelu), x, kQ, to_.wanted());
  }

  // Through a layer  W x + b: adds the gradients of W and b, returns that of x if it is wanted.
  Tensor through(const Tensor& grad, const Tensor& x, Parameter weight, bool wanted) {
    const LayerGradient layer(grad, call_.type);
    add_to(grads_[weight + 1], grad.sum(0));
    add_to(grads_[weight], layer.of_weight(x));
    return wanted ? layer.of_x(call_.parameters[weight].to(call_.type)) : Tensor();
  }

  DSMILCall& call_;
  const PooledTensors& of_;
  RowGradients& to_;
  Parameters& grads_;
  PoolGradients pool_;
};

// --- The ops

std::tuple<Tensor, Tensor, Tensor> dsmil_rows_fwd(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift,
                                                  const Tensor& critical, const OptionalTensors& weights,
                                                  const OptionalTensor& offsets, const OptionalTensor& mask,
                                                  const OptionalTensor& seed,
                                                  std::optional<std::string_view> v_activation, double v_dropout_p,
                                                  std::optional<ScalarType> compute_dtype, const OptionalTensors& embed,
                                                  std::optional<std::string_view> embed_activation,
                                                  double embed_dropout_p, std::optional<ScalarType> embed_dtype) {
  DSMILCall call(x, vectors, shift, critical, DSMILWeights(weights), offsets, mask, seed, v_activation, v_dropout_p,
                 compute_dtype, {embed, embed_activation, embed_dropout_p, embed_dtype});
  if (!call.mlp() && !call.value_rows) return pool_by_products(call, call.vectors, call.shift);
  const Tensor scores = call.empty({call.rows, call.classes});
  Sums sums(call, call.chunked(), call.classes, call.pooled_width(), Scoring::kGiven);
  call.in_slices(call.bytes_per_row(), [&](int64_t first, int64_t count) {
    const Slice slice = instances(call, first, count);
    if (call.mlp()) {
      const QueryRows of(call, rows_for_products(call, slice, call.type, false));
      products(call, {of.query, first, count}, call.vectors, call.shift, kDead, scores);
    } else {
      products(call, slice, call.vectors, call.shift, kDead, scores);
    }
    sums.add(call.value_rows ? ValueRows(call, slice, false).pooled : slice.x, first, scores);
  });
  return {sums.bag, scores, sums.lse};
}

using OfRows = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

OfRows dsmil_rows_bwd(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
                      const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
                      const OptionalTensor& seed, std::optional<std::string_view> v_activation, double v_dropout_p,
                      std::optional<ScalarType> compute_dtype, const OptionalTensors& embed,
                      std::optional<std::string_view> embed_activation, double embed_dropout_p,
                      std::optional<ScalarType> embed_dtype, const Tensor& bag, const Tensor& scores, const Tensor& lse,
                      const OptionalTensor& grad_bag, const OptionalTensor& grad_scores, const OptionalTensor& grad_lse,
                      std::array<bool, 3> needs) {
  DSMILCall call(x, vectors, shift, critical, DSMILWeights(weights), offsets, mask, seed, v_activation, v_dropout_p,
                 compute_dtype, {embed, embed_activation, embed_dropout_p, embed_dtype});
  RowGradients rows(call, needs[0], needs[1], needs[2]);
  const PooledTensors of(call, call.classes, call.pooled_width(), bag, scores, lse, grad_bag, grad_scores, grad_lse);
  Parameters grads;
  Tensor of_vectors = !call.mlp() && !call.value_rows ? pool_by_products_backward(call, of, call.vectors, rows, true)
                                                      : RowsBackward(call, of, rows, grads).run();
  of_vectors = of_vectors.masked_fill(call.dead.unsqueeze(2), 0);  // such a class may have summed 0 * NaN
  for (size_t i = 0; i < kParameters; ++i) {
    if (!grads[i].defined())
      grads[i] = call.parameters[i].defined() ? at::zeros_like(call.parameters[i]) : call.empty({0});
  }
  const auto& [q, qb, q2, q2b, v, vb] = grads;
  const auto [of_e_weight, of_e_bias] = rows.sums();
  return {rows.x, of_vectors, q, qb, q2, q2b, v, vb, of_e_weight, of_e_bias};
}

Call call_of(const Tensor& x, const OptionalTensors& embed, std::optional<std::string_view> activation,
             double dropout_p, std::optional<ScalarType> dtype) {
  return {x, std::nullopt, std::nullopt, {embed, activation, dropout_p, dtype}};
}

Tensor rows_at(const Tensor& x, const Tensor& indices, const OptionalTensors& embed,
               std::optional<std::string_view> embed_activation, double embed_dropout_p,
               std::optional<ScalarType> embed_dtype) {
  const Call call = call_of(x, embed, embed_activation, embed_dropout_p, embed_dtype);
  return instances_at(call, call.take_indices(indices, "indices", indices.sizes())).x.to(call.acc);
}

void add_rows_(const Tensor& grad_x, const Tensor& grad_e_weight, const Tensor& grad_e_bias, const Tensor& x,
               const Tensor& indices, const Tensor& grad_rows, const OptionalTensors& embed,
               std::optional<std::string_view> embed_activation, double embed_dropout_p,
               std::optional<ScalarType> embed_dtype) {
  const Call call = call_of(x, embed, embed_activation, embed_dropout_p, embed_dtype);
  RowGradients of_rows(call, grad_x, grad_e_weight, grad_e_bias);
  if (!of_rows.wanted()) return;
  const Tensor places = call.take_indices(indices, "indices", indices.sizes());
  const Tensor grad = call.take(grad_rows, "grad_rows", {places.numel(), call.width})
                          .view({places.size(0), places.size(1), call.width});
  if (!call.embedding) return add_to_rows(call, places, grad, grad_x);
  of_rows.add_at(instances_at(call, places), grad);
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
