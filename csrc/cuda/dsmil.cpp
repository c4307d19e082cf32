// dsmil_pool on a GPU, the second stream of DSMIL (Li, Li, Eliceiri 2021), and dsmil, both streams in one op.
//
// What is linear never meets the instances: <Wq x_i + bq, q_m> = <x_i, Wq^T q_m> + <bq, q_m>, so a linear query is one
// vector for each bag and class, and V sum_i a_i x_i = sum_i a_i V x_i, since the weights sum to 1. An MLP query and a
// value with an activation or dropout go through in slices of rows, again in the backward. The few critical instances
// are PyTorch's own small products.
#include <torch/library.h>

#include <array>
#include <tuple>

#include "choice.h"
#include "pooling.h"

namespace milkernels {
namespace {

enum Parameter { kQ, kQBias, kQ2, kQ2Bias, kV, kVBias, kParameters };
using Parameters = std::array<Tensor, kParameters>;

// Products of a few rows are in the accumulation type, whatever PyTorch's switch lets large ones be.
Tensor few_products(const Tensor& a, const Tensor& b) {
  const at::NoTF32Guard exact;
  return a.matmul(b);
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Tensor z = few_products(x, weight.t());
  return bias.defined() ? z + bias : z;
}

// sum a_i b_i^T over bags and classes.
Tensor summed_outer(const Tensor& a, const Tensor& b) { return few_products(a.flatten(0, 1).t(), b.flatten(0, 1)); }

void add_to(Tensor& sum, const Tensor& part) { sum = sum.defined() ? sum + part : part; }

class DSMILCall : public Call {
 public:
  DSMILCall(const Tensor& x, const DSMILWeights& given, const OptionalTensor& offsets, const OptionalTensor& mask,
            const OptionalTensor& seed, const std::optional<c10::string_view>& v_activation, double v_dropout_p,
            std::optional<double> scale, std::optional<ScalarType> compute_dtype, const EmbedArguments& embedding)
      : Call(x, offsets, mask, embedding), type(product_type(row_type(), compute_dtype)),
        activation(v_activation ? parse_activation(*v_activation) : Activation::kIdentity),
        dropout(*this, seed, v_dropout_p) {
    const auto units = [&](Parameter i, int64_t width) {
      return given[i] ? units_of(*given[i], DSMILWeights::kNames[i], width) : 0;
    };
    const auto taken = [&](Parameter i, at::IntArrayRef sizes) {
      return take(given[i], DSMILWeights::kNames[i], sizes);
    };
    const int64_t Q = units(kQ, width), Q2 = units(kQ2, Q), Lv = units(kV, width);
    parameters = {taken(kQ, {Q, width}), taken(kQBias, {Q}),     taken(kQ2, {Q2, Q}),
                  taken(kQ2Bias, {Q2}),  taken(kV, {Lv, width}), taken(kVBias, {Lv})};
    mlp = Q2 > 0;
    folded = Lv > 0 && activation == Activation::kIdentity;
    layered = Lv > 0 && !folded;
    value_rows = layered || dropout;
    pooled_width = layered ? Lv : width;
    bag_width = Lv > 0 ? Lv : width;
    this->scale = scale.value_or(1. / std::sqrt(static_cast<double>(mlp ? Q2 : Q)));
  }

  const Tensor& operator[](Parameter i) const { return parameters[i]; }

  // Bytes of a slice's row: activations of the query and the value, and their gradients.
  int64_t bytes_per_row(const RowGradients* to = nullptr) const {
    const bool gradient = to != nullptr;
    const int64_t units =
        (mlp ? parameters[kQ].size(0) + parameters[kQ2].size(0) : 0) + (value_rows ? pooled_width : 0);
    const int64_t numbers = units * (gradient ? 4 : 2) + width * (gradient ? 1 + mlp + value_rows : 1 + value_rows);
    return numbers * static_cast<int64_t>(c10::elementSize(acc)) + bytes_of_instance(*this, to);
  }

  // W x + b in the accumulation type; x has that of products.
  Tensor layer(const Tensor& x, Parameter weight) const {
    const Tensor z = product(x, parameters[weight].to(type).t(), acc);
    return parameters[weight + 1].defined() ? z.add_(parameters[weight + 1]) : z;
  }

  ScalarType type;  // of products
  Activation activation;
  DropoutTensors dropout;
  Parameters parameters;  // in the accumulation type; undefined where absent
  // layered: the value is no linear map of what is pooled. value_rows: what is pooled are rows of its own, not those of
  // x, since a layer or dropout comes before.
  bool mlp, folded, layered, value_rows;
  int64_t pooled_width, bag_width;
  double scale;
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
      input = copied_rows(call, slice, call.layered ? call.type : call.row_type(), {call.dropout.typed()});
    } else {
      input = rows_for_products(call, slice, call.type, clean);
    }
    if (!call.layered) {
      pooled = input;
      return;
    }
    const Tensor z = call.layer(input, kV);
    if (call.activation == Activation::kGelu) pooled = at::gelu(z), argument = z;
    else pooled = argument = call.activation == Activation::kRelu ? z.relu_() : z.tanh_();
  }
  Tensor input, pooled, argument;
};

// The queries of the critical instances, computed here so that the gradient flows through both uses of q.
class CriticalQueries {
 public:
  // critical [bags, classes], -1 for a class without one: its scores are -inf.
  CriticalQueries(const DSMILCall& call, const Tensor& critical)
      : dead(critical < 0), rows(instances_at(call, critical)), call_(call),
        x_(rows.x.view({critical.size(0), critical.size(1), call.width}).to(call.acc)),
        z_(linear(x_, call[kQ], call[kQBias])) {
    if (call.mlp) hidden_ = z_.relu();
    query_ = call.mlp ? linear(hidden_, call[kQ2], call[kQ2Bias]).tanh_() : z_;
    const Tensor scaled = query_ * call.scale;
    vectors = call.mlp ? scaled : few_products(scaled, call[kQ]).contiguous();
    shift =
        call.mlp || !call[kQBias].defined() ? at::zeros_like(scaled.select(2, 0)) : few_products(scaled, call[kQBias]);
    shift = shift.masked_fill(dead, kDead).contiguous();
  }

  // Adds to the gradients of the query's parameters; returns that of the critical rows. `of_shift` may be undefined.
  Tensor backward(const Tensor& of_vectors, const Tensor& of_shift, Parameters& grads) const {
    Tensor of_z;
    if (call_.mlp) {
      const Tensor of_z2 = of_vectors * call_.scale * (1 - query_ * query_);
      add_to(grads[kQ2], summed_outer(of_z2, hidden_));
      add_to(grads[kQ2Bias], of_z2.sum({0, 1}));
      of_z = few_products(of_z2, call_[kQ2]) * (z_ > 0);
    } else {
      const Tensor scaled = query_ * call_.scale;
      Tensor of_query = few_products(of_vectors, call_[kQ].t());
      add_to(grads[kQ], summed_outer(scaled, of_vectors));
      if (of_shift.defined()) {
        of_query = of_query + of_shift.unsqueeze(2) * call_[kQBias];
        add_to(grads[kQBias], (of_shift.unsqueeze(2) * scaled).sum({0, 1}));
      }
      of_z = of_query * call_.scale;
    }
    add_to(grads[kQ], summed_outer(of_z, x_));
    add_to(grads[kQBias], of_z.sum({0, 1}));
    return few_products(of_z, call_[kQ]);
  }

  Tensor dead;  // [bags, classes]
  Slice rows;  // the instances
  Tensor vectors;  // what instances, or their queries, are multiplied with, scale included: [bags, classes, L or Q2]
  Tensor shift;  // [bags, classes]

 private:
  const DSMILCall& call_;
  Tensor x_, z_, hidden_, query_;  // [bags, classes, .]; z before the first activation
};

using SecondStream = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// bag, scores, lse, and what is pooled before a linear value is taken of it; empty where that is the bag itself.
SecondStream second_stream(DSMILCall& call, const Tensor& critical) {
  const CriticalQueries queries(call, critical);
  Tensor bag, scores, lse, pooled = call.empty({0});
  if (!call.mlp && !call.value_rows) {
    std::tie(bag, scores, lse) = pool_by_products(call, queries.vectors, queries.shift);
  } else {
    scores = call.empty({call.rows, critical.size(1)});
    Sums sums(call, call.chunked(), critical.size(1), call.pooled_width, Scoring::kGiven);
    call.in_slices(call.bytes_per_row(), [&](int64_t first, int64_t count) {
      const Slice slice = instances(call, first, count);
      if (call.mlp) {
        const QueryRows of(call, rows_for_products(call, slice, call.type, false));
        products(call, {of.query, first, count}, queries.vectors, queries.shift, kDead, scores);
      } else {
        products(call, slice, queries.vectors, queries.shift, kDead, scores);
      }
      sums.add(call.value_rows ? ValueRows(call, slice, false).pooled : slice.x, first, scores);
    });
    bag = sums.bag, lse = sums.lse;
  }
  if (call.folded) {
    pooled = bag;
    bag = linear(pooled, call[kV], call[kVBias]).masked_fill_((lse == kDead).unsqueeze(2), 0);
  }
  return {bag, scores, lse, pooled};
}

// The backward of scores and pooling over the rows: at once where both are linear in x, else slice by slice. Gradients
// of the layers are added, that of x is written.
class RowsBackward {
 public:
  RowsBackward(DSMILCall& call, const CriticalQueries& queries, const PooledTensors& of, RowGradients& to,
               Parameters& grads)
      : call_(call), queries_(queries), of_(of), to_(to), grads_(grads), pool_(call, of, to.wanted() || call.layered) {}

  // The gradient of the queries' vectors.
  Tensor run() {
    const bool values = call_.value_rows && of_.grad_bag.defined();
    const int64_t width = call_.mlp ? call_[kQ2].size(0) : call_.width;
    Sums of_vectors(call_, call_.chunked(), of_.scores.size(1), width, Scoring::kWeights);
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
      if (call_.mlp) {
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
                call_.mlp ? TermTensors{} : TermTensors{pool_.scores, queries_.vectors}, part);
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
    Tensor grad = expanded(slice, call_.pooled_width, pool_.term());
    if (call_.layered) {
      grad = through(derived(grad, slice, rows.argument, call_.activation), rows.input, kV, to_.wanted());
    }
    if (!to_.wanted() || !call_.dropout) return grad;
    return copied_rows(call_, {grad, slice.first, slice.count}, call_.acc, {call_.dropout.typed()});
  }

  Tensor through_query(const QueryRows& rows, const Tensor& x, const Slice& slice) {
    Tensor grad = expanded(slice, call_[kQ2].size(0), {pool_.scores, queries_.vectors});
    grad = through(derived(grad, slice, rows.query, Activation::kTanh), rows.hidden, kQ2, true);
    return through(derived(grad, slice, rows.first, Activation::kRelu), x, kQ, to_.wanted());
  }

  // Through a layer  W x + b: adds the gradients of W and b, returns that of x if it is wanted.
  Tensor through(const Tensor& grad, const Tensor& x, Parameter weight, bool wanted) {
    const LayerGradient layer(grad, call_.type);
    add_to(grads_[weight + 1], grad.sum(0));
    add_to(grads_[weight], layer.of_weight(x));
    return wanted ? layer.of_x(call_[weight].to(call_.type)) : Tensor();
  }

  DSMILCall& call_;
  const CriticalQueries& queries_;
  const PooledTensors& of_;
  RowGradients& to_;
  Parameters& grads_;
  PoolGradients pool_;
};

// What the forward left of the second stream and what came back for it.
struct SecondStreamSaved {
  const Tensor &bag, &scores, &lse, &critical, &pooled;
  const OptionalTensor &grad_bag, &grad_scores, &grad_lse;
};

// Writes the gradient of the rows; returns those of the parameters, undefined where there is none.
Parameters second_stream_backward(DSMILCall& call, const SecondStreamSaved& saved, RowGradients& rows) {
  const int64_t C = columns_of(saved.critical, "critical", call.bags);
  const Tensor critical = call.take_indices(saved.critical, "critical", {call.bags, C});
  Parameters grads;
  if (!saved.grad_bag && !saved.grad_scores && !saved.grad_lse) {
    rows.zero();
    return grads;
  }
  const CriticalQueries queries(call, critical);
  OptionalTensor grad_bag = saved.grad_bag;
  if (call.folded && grad_bag) {
    const Tensor of_bag = call.take(grad_bag, "grad_bag", {call.bags, C, call.bag_width})
                              .masked_fill((saved.lse == kDead).unsqueeze(2), 0);
    grads[kV] = summed_outer(of_bag, call.take(saved.pooled, "pooled", {call.bags, C, call.width}));
    grads[kVBias] = of_bag.sum({0, 1});
    grad_bag = few_products(of_bag, call[kV]);
  }
  const PooledTensors of(call, C, call.pooled_width, call.folded ? saved.pooled : saved.bag, saved.scores, saved.lse,
                         grad_bag, saved.grad_scores, saved.grad_lse);
  // A shift of all scores of a bag and class leaves the weights as they are.
  Tensor of_shift;
  if (!call.mlp && call[kQBias].defined() && (of.grad_scores.defined() || of.grad_lse.defined())) {
    of_shift = of.grad_lse.defined() ? of.grad_lse.clone() : at::zeros_like(of.lse);
    if (of.grad_scores.defined()) of_shift.add_(sums_of_columns(call, alive(of.grad_scores, of.scores)));
    of_shift.masked_fill_(queries.dead, 0);
  }
  Tensor of_vectors;
  if (!call.mlp && !call.value_rows) of_vectors = pool_by_products_backward(call, of, queries.vectors, rows, true);
  else of_vectors = RowsBackward(call, queries, of, rows, grads).run();
  const Tensor of_rows = queries.backward(of_vectors, of_shift, grads);
  if (rows.wanted()) rows.add_at(queries.rows, of_rows);
  return grads;
}

// Gradients of the parameters in their types; zeros where there is none, empty where nobody needs them.
template <size_t COUNT>
std::array<Tensor, COUNT> in_their_types(const std::array<Tensor, COUNT>& found,
                                         const std::array<OptionalTensor, COUNT>& given, const bool* needs) {
  std::array<Tensor, COUNT> out;
  for (size_t i = 0; i < COUNT; ++i) {
    if (!needs[i]) out[i] = at::empty({0}, given[0]->options());
    else if (!found[i].defined()) out[i] = at::zeros_like(*given[i], at::MemoryFormat::Contiguous);
    else out[i] = found[i].to(given[i]->scalar_type()).contiguous();
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_pool_fwd(
    const Tensor& x, const Tensor& instance_logits, const OptionalTensors& weights, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::optional<std::string_view> v_activation,
    double v_dropout_p, std::optional<double> scale, std::optional<ScalarType> compute_dtype,
    const OptionalTensors& embed, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype) {
  DSMILCall call(x, DSMILWeights(weights), offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype,
                 {embed, embed_activation, embed_dropout_p, embed_dtype});
  const int64_t C = columns_of(instance_logits, "instance_logits", call.rows);
  const Tensor logits = call.take(instance_logits, "instance_logits", {call.rows, C});
  const Tensor critical = first_max(call, logits, true, kDead).second;
  auto [bag, scores, lse, pooled] = second_stream(call, critical);
  return {bag, scores, lse, critical, pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_pool_bwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& seed, const Tensor& bag, const Tensor& scores, const Tensor& lse, const Tensor& critical,
    const Tensor& pooled, const OptionalTensors& embed, std::optional<std::string_view> v_activation,
    double v_dropout_p, std::optional<double> scale, std::optional<ScalarType> compute_dtype,
    std::optional<std::string_view> embed_activation, double embed_dropout_p, std::optional<ScalarType> embed_dtype,
    const OptionalTensor& grad_bag, const OptionalTensor& grad_scores, const OptionalTensor& grad_lse,
    std::array<bool, 9> needs) {
  const DSMILWeights given(weights);
  DSMILCall call(x, given, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype,
                 {embed, embed_activation, embed_dropout_p, embed_dtype});
  check_needs(needs.data() + 1, given);
  RowGradients rows(call, needs[0], needs[7], needs[8]);
  const Parameters found =
      second_stream_backward(call, {bag, scores, lse, critical, pooled, grad_bag, grad_scores, grad_lse}, rows);
  return std::tuple_cat(std::make_tuple(rows.x), in_their_types<6>(found, given, needs.data() + 1), rows.parameters());
}

// --- both streams

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_fwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& seed, std::optional<std::string_view> v_activation, double v_dropout_p,
    std::optional<double> scale, std::optional<ScalarType> compute_dtype, const OptionalTensors& embed,
    std::optional<std::string_view> embed_activation, double embed_dropout_p, std::optional<ScalarType> embed_dtype) {
  const DualStreamWeights given(weights);
  DSMILCall call(x, given.second, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype,
                 {embed, embed_activation, embed_dropout_p, embed_dtype});
  const Tensor& weight = given.first.weight();
  const int64_t C = units_of(weight, "weight", call.width);
  const auto [values, critical, logits] =
      instance_max(call, call.take(weight, "weight", {C, call.width}), call.take(given.first.bias(), "bias", {C}));
  auto [bag, scores, lse, pooled] = second_stream(call, critical);
  return {bag, scores, lse, critical, values, logits, pooled};
}

using BothStreams = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

BothStreams dsmil_bwd(const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets,
                      const OptionalTensor& mask, const OptionalTensor& seed, const Tensor& bag, const Tensor& scores,
                      const Tensor& lse, const Tensor& critical, const Tensor& logits, const Tensor& pooled,
                      const OptionalTensors& embed, std::optional<std::string_view> v_activation, double v_dropout_p,
                      std::optional<double> scale, std::optional<ScalarType> compute_dtype,
                      std::optional<std::string_view> embed_activation, double embed_dropout_p,
                      std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag,
                      const OptionalTensor& grad_scores, const OptionalTensor& grad_lse,
                      const OptionalTensor& grad_values, const OptionalTensor& grad_logits,
                      std::array<bool, 11> needs) {
  const DualStreamWeights given(weights);
  DSMILCall call(x, given.second, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype,
                 {embed, embed_activation, embed_dropout_p, embed_dtype});
  check_needs(needs.data() + 1, given.first);
  check_needs(needs.data() + 3, given.second);
  const Tensor& weight = given.first.weight();
  const int64_t C = units_of(weight, "weight", call.width);
  RowGradients rows(call, needs[0], needs[9], needs[10]);
  const Parameters found =
      second_stream_backward(call, {bag, scores, lse, critical, pooled, grad_bag, grad_scores, grad_lse}, rows);
  std::array<Tensor, 2> first;
  if (grad_values || grad_logits) {
    std::tie(first[0], first[1]) = instance_max_gradients(call, call.take(weight, "weight", {C, call.width}), critical,
                                                          call.take(logits, "logits", {call.rows, C}), grad_values,
                                                          grad_logits, {needs[1], needs[2]}, rows, /*onto=*/true);
  }
  return std::tuple_cat(std::make_tuple(rows.x), in_their_types<2>(first, given.first, needs.data() + 1),
                        in_their_types<6>(found, given.second, needs.data() + 3), rows.parameters());
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("dsmil_fwd.native", dsmil_fwd);
  m.impl("dsmil_bwd.native", dsmil_bwd);
  m.impl("dsmil_pool_fwd.native", dsmil_pool_fwd);
  m.impl("dsmil_pool_bwd.native", dsmil_pool_bwd);
}

}  // namespace
}  // namespace milkernels
