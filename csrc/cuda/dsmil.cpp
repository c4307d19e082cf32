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
#include "layers.h"
#include "pooling.h"

namespace milkernels {
namespace {

enum Parameter { kQ, kQBias, kQ2, kQ2Bias, kV, kVBias, kParameters };
using Parameters = std::array<Tensor, kParameters>;

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Tensor z = x.matmul(weight.t());
  return bias.defined() ? z + bias : z;
}

// sum a_i b_i^T over bags and classes.
Tensor summed_outer(const Tensor& a, const Tensor& b) { return a.flatten(0, 1).t().mm(b.flatten(0, 1)); }

void add_to(Tensor& sum, const Tensor& part) { sum = sum.defined() ? sum + part : part; }

class DSMILCall : public Call {
 public:
  DSMILCall(const Tensor& x, const std::array<OptionalTensor, kParameters>& given, const OptionalTensor& offsets,
            const OptionalTensor& mask, const OptionalTensor& seed,
            const std::optional<c10::string_view>& v_activation, double v_dropout_p, std::optional<double> scale,
            std::optional<ScalarType> compute_dtype)
      : Call(x, offsets, mask), type(product_type(*this, compute_dtype)),
        activation(v_activation ? activation_of(*v_activation) : Activation::kIdentity),
        dropout(*this, seed, v_dropout_p) {
    const auto units = [&](Parameter i, const char* name) -> int64_t {
      if (!given[i]) return 0;
      TORCH_CHECK_VALUE(given[i]->dim() == 2 && given[i]->size(0) > 0, name, " must be 2-D and not empty; got ",
                        given[i]->sizes());
      return given[i]->size(0);
    };
    const int64_t Q = units(kQ, "q_weight"), Q2 = units(kQ2, "q2_weight"), Lv = units(kV, "v_weight");
    parameters = {take(given[kQ], "q_weight", {Q, width}),  take(given[kQBias], "q_bias", {Q}),
                  take(given[kQ2], "q2_weight", {Q2, Q}),   take(given[kQ2Bias], "q2_bias", {Q2}),
                  take(given[kV], "v_weight", {Lv, width}), take(given[kVBias], "v_bias", {Lv})};
    mlp = Q2 > 0;
    folded = Lv > 0 && activation == Activation::kIdentity;
    layered = Lv > 0 && !folded;
    staged = layered || dropout;
    pooled_width = layered ? Lv : width;
    bag_width = Lv > 0 ? Lv : width;
    this->scale = scale.value_or(1. / std::sqrt(static_cast<double>(mlp ? Q2 : Q)));
  }

  const Tensor& operator[](Parameter i) const { return parameters[i]; }

  // Bytes of a slice's row: activations of the query and the value, and their gradients.
  int64_t bytes_per_row(bool gradient) const {
    const int64_t units = (mlp ? parameters[kQ].size(0) + parameters[kQ2].size(0) : 0) + (staged ? pooled_width : 0);
    const int64_t numbers = units * (gradient ? 4 : 2) + width * (gradient ? 1 + mlp + staged : 1 + staged);
    return numbers * static_cast<int64_t>(c10::elementSize(acc));
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
  bool mlp, folded, layered, staged;  // layered: the value is no linear map of what is pooled; staged: nor are its rows
                                      // those of x
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
  ValueRows(const DSMILCall& call, int64_t first, int64_t count, bool clean) {
    if (call.dropout) {
      input = milkernels::staged(call, call.x.narrow(0, first, count), first,
                                 call.layered ? call.type : call.x.scalar_type(), {call.dropout.typed()});
    } else {
      input = rows_for_products(call, first, count, call.type, clean);
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
      : dead(critical < 0), call_(call), x_(gather_rows(call, critical).to(call.acc)),
        z_(linear(x_, call[kQ], call[kQBias])) {
    if (call.mlp) hidden_ = z_.relu();
    query_ = call.mlp ? linear(hidden_, call[kQ2], call[kQ2Bias]).tanh_() : z_;
    const Tensor scaled = query_ * call.scale;
    vectors = call.mlp ? scaled : scaled.matmul(call[kQ]).contiguous();
    shift = call.mlp || !call[kQBias].defined() ? at::zeros_like(scaled.select(2, 0)) : scaled.matmul(call[kQBias]);
    shift = shift.masked_fill(dead, kDead).contiguous();
  }

  // Adds to the gradients of the query's parameters; returns that of the critical rows. `of_shift` may be undefined.
  Tensor backward(const Tensor& of_vectors, const Tensor& of_shift, Parameters& grads) const {
    Tensor of_z;
    if (call_.mlp) {
      const Tensor of_z2 = of_vectors * call_.scale * (1 - query_ * query_);
      add_to(grads[kQ2], summed_outer(of_z2, hidden_));
      add_to(grads[kQ2Bias], of_z2.sum({0, 1}));
      of_z = of_z2.matmul(call_[kQ2]) * (z_ > 0);
    } else {
      const Tensor scaled = query_ * call_.scale;
      Tensor of_query = of_vectors.matmul(call_[kQ].t());
      add_to(grads[kQ], summed_outer(scaled, of_vectors));
      if (of_shift.defined()) {
        of_query = of_query + of_shift.unsqueeze(2) * call_[kQBias];
        add_to(grads[kQBias], (of_shift.unsqueeze(2) * scaled).sum({0, 1}));
      }
      of_z = of_query * call_.scale;
    }
    add_to(grads[kQ], summed_outer(of_z, x_));
    add_to(grads[kQBias], of_z.sum({0, 1}));
    return of_z.matmul(call_[kQ]);
  }

  Tensor dead;     // [bags, classes]
  Tensor vectors;  // what instances, or their queries, are multiplied with, scale included: [bags, classes, L or Q2]
  Tensor shift;    // [bags, classes]

 private:
  const DSMILCall& call_;
  Tensor x_, z_, hidden_, query_;  // [bags, classes, .]; z before the first activation
};

using SecondStream = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// bag, scores, lse, and what is pooled before a linear value is taken of it; empty where that is the bag itself.
SecondStream second_stream(DSMILCall& call, const Tensor& critical) {
  const CriticalQueries queries(call, critical);
  Tensor bag, scores, lse, pooled = call.empty({0});
  if (!call.mlp && !call.staged) {
    std::tie(bag, scores, lse) = pool_by_products(call, queries.vectors, queries.shift);
  } else {
    scores = call.empty({call.rows, critical.size(1)});
    if (!call.mlp) products(call, {call.x, 0, call.rows}, queries.vectors, queries.shift, kDead, scores);
    Sums sums(call, call.chunked(), critical.size(1), call.pooled_width, Scoring::kGiven);
    call.in_slices(call.bytes_per_row(false), [&](int64_t first, int64_t count) {
      if (call.mlp) {
        const QueryRows of(call, rows_for_products(call, first, count, call.type, false));
        products(call, {of.query, first, count}, queries.vectors, queries.shift, kDead, scores);
      }
      const Tensor x = call.x.narrow(0, first, count);
      sums.add(call.staged ? ValueRows(call, first, count, false).pooled : x, first, scores);
    });
    if (call.rows == 0) sums.add(call.empty({0, call.pooled_width}), 0, scores);
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
  RowsBackward(DSMILCall& call, const CriticalQueries& queries, const PooledTensors& of, const Tensor& grad_x,
               Parameters& grads)
      : call_(call), queries_(queries), of_(of), grad_x_(grad_x), grads_(grads),
        pool_(call, of, need_x() || call.layered) {}

  // The gradient of the queries' vectors.
  Tensor run() {
    const bool values = call_.staged && of_.grad_bag.defined();
    std::optional<Sums> of_vectors;
    if (call_.mlp) {
      if (!call_.staged) pool_.add({call_.x, 0, call_.rows});
      of_vectors.emplace(call_, call_.chunked(), of_.scores.size(1), call_[kQ2].size(0), Scoring::kWeights);
    }
    call_.in_slices(call_.bytes_per_row(true), [&](int64_t first, int64_t count) {
      Tensor part;
      if (call_.staged) {
        const ValueRows rows(call_, first, count, true);
        pool_.add({rows.pooled, first, count});
        if (values) part = through_value(rows, first, count);
      }
      if (call_.mlp) {
        const Tensor x = rows_for_products(call_, first, count, call_.type, true);
        const QueryRows rows(call_, x);
        of_vectors->add(rows.query, first, pool_.scores);
        const Tensor of_x = through_query(rows, x, first, count);
        if (part.defined() && of_x.defined()) part.add_(of_x);
        else if (of_x.defined()) part = of_x;
      }
      if (need_x()) store(first, count, part);
    });
    if (call_.mlp && call_.rows == 0) of_vectors->add(call_.empty({0, call_[kQ2].size(0)}), 0, pool_.scores);
    return call_.mlp ? of_vectors->bag : weighted_sums(call_, call_.x, pool_.scores);
  }

 private:
  bool need_x() const { return grad_x_.numel() > 0; }

  // What came through layers, that of the bag, and that of a linear query.
  void store(int64_t first, int64_t count, const Tensor& part) {
    expand(call_, grad_x_.narrow(0, first, count), first, call_.staged ? TermTensors{} : pool_.term(),
           call_.mlp ? TermTensors{} : TermTensors{pool_.scores, queries_.vectors}, part);
  }

  Tensor expanded(int64_t count, int64_t width, int64_t first, const TermTensors& term) {
    const Tensor out = call_.empty({count, width});
    expand(call_, out, first, term, {});
    return out;
  }
  Tensor derived(const Tensor& grad, int64_t first, const Tensor& z, Activation activation) {
    return staged(call_, grad, first, call_.acc, {{}, z, activation});
  }

  Tensor through_value(const ValueRows& rows, int64_t first, int64_t count) {
    Tensor grad = expanded(count, call_.pooled_width, first, pool_.term());
    if (call_.layered) {
      grad = through(derived(grad, first, rows.argument, call_.activation), rows.input, kV, need_x());
    }
    if (need_x() && call_.dropout) grad = staged(call_, grad, first, call_.acc, {call_.dropout.typed()});
    return grad;
  }

  Tensor through_query(const QueryRows& rows, const Tensor& x, int64_t first, int64_t count) {
    Tensor grad = expanded(count, call_[kQ2].size(0), first, {pool_.scores, queries_.vectors});
    grad = through(derived(grad, first, rows.query, Activation::kTanh), rows.hidden, kQ2, true);
    return through(derived(grad, first, rows.first, Activation::kRelu), x, kQ, need_x());
  }

  // Through a layer  W x + b: adds the gradients of W and b, returns that of x if it is wanted.
  Tensor through(const Tensor& grad, const Tensor& x, Parameter weight, bool wanted) {
    add_to(grads_[weight + 1], grad.sum(0));
    Tensor scaled = grad, scale;
    if (call_.type == at::kHalf) {
      scale = power_of_two_scale(largest(grad));
      scaled = grad * scale;
    }
    scaled = scaled.to(call_.type);
    Tensor of_weight = product(scaled.t(), x, call_.acc);
    add_to(grads_[weight], scale.defined() ? of_weight.div_(scale) : of_weight);
    if (!wanted) return {};
    Tensor of_x = product(scaled, call_[weight].to(call_.type), call_.acc);
    return scale.defined() ? of_x.div_(scale) : of_x;
  }

  DSMILCall& call_;
  const CriticalQueries& queries_;
  const PooledTensors& of_;
  const Tensor& grad_x_;
  Parameters& grads_;
  PoolGradients pool_;
};

// What the forward left of the second stream and what came back for it.
struct SecondStreamSaved {
  const Tensor &bag, &scores, &lse, &critical, &pooled;
  const OptionalTensor &grad_bag, &grad_scores, &grad_lse;
};

// Writes the gradient of x, if grad_x has any numbers; returns those of the parameters, undefined where there is none.
Parameters second_stream_backward(DSMILCall& call, const SecondStreamSaved& saved, const Tensor& grad_x) {
  TORCH_CHECK_VALUE(saved.critical.dim() == 2 && saved.critical.size(1) > 0, "critical must be [bags, any]; got ",
                    saved.critical.sizes());
  const int64_t C = saved.critical.size(1);
  const Tensor critical = call.take_indices(saved.critical, "critical", {call.bags, C});
  Parameters grads;
  if (!saved.grad_bag && !saved.grad_scores && !saved.grad_lse) {
    if (grad_x.numel() > 0) grad_x.zero_();
    return grads;
  }
  const CriticalQueries queries(call, critical);
  OptionalTensor grad_bag = saved.grad_bag;
  if (call.folded && grad_bag) {
    const Tensor of_bag = call.take(grad_bag, "grad_bag", {call.bags, C, call.bag_width})
                              .masked_fill((saved.lse == kDead).unsqueeze(2), 0);
    grads[kV] = summed_outer(of_bag, call.take(saved.pooled, "pooled", {call.bags, C, call.width}));
    grads[kVBias] = of_bag.sum({0, 1});
    grad_bag = of_bag.matmul(call[kV]);
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
  if (!call.mlp && !call.staged) of_vectors = pool_by_products_backward(call, of, queries.vectors, grad_x, true);
  else of_vectors = RowsBackward(call, queries, of, grad_x, grads).run();
  const Tensor of_rows = queries.backward(of_vectors, of_shift, grads);
  if (grad_x.numel() > 0) add_to_rows(call, critical, of_rows, grad_x);
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
    const Tensor& x, const Tensor& instance_logits, const Tensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& q2_weight, const OptionalTensor& q2_bias, const OptionalTensor& v_weight,
    const OptionalTensor& v_bias, const OptionalTensor& offsets, const OptionalTensor& mask, const OptionalTensor& seed,
    std::optional<c10::string_view> v_activation, double v_dropout_p, std::optional<double> scale,
    std::optional<ScalarType> compute_dtype) {
  DSMILCall call(x, {q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias}, offsets, mask, seed, v_activation,
                 v_dropout_p, scale, compute_dtype);
  TORCH_CHECK_VALUE(instance_logits.dim() == 2 && instance_logits.size(1) > 0, "instance_logits must be [", call.rows,
                    ", any]; got ", instance_logits.sizes());
  Tensor logits = call.take(instance_logits, "instance_logits", {call.rows, instance_logits.size(1)});
  const Tensor critical = first_max(call, logits, true, kDead).second;
  auto [bag, scores, lse, pooled] = second_stream(call, critical);
  return {bag, scores, lse, critical, pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_pool_bwd(
    const Tensor& x, const Tensor& q_weight, const OptionalTensor& q_bias, const OptionalTensor& q2_weight,
    const OptionalTensor& q2_bias, const OptionalTensor& v_weight, const OptionalTensor& v_bias,
    const OptionalTensor& offsets, const OptionalTensor& mask, const OptionalTensor& seed, const Tensor& bag,
    const Tensor& scores, const Tensor& lse, const Tensor& critical, const Tensor& pooled,
    std::optional<c10::string_view> v_activation, double v_dropout_p, std::optional<double> scale,
    std::optional<ScalarType> compute_dtype, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
    const OptionalTensor& grad_lse, std::array<bool, 7> needs) {
  const std::array<OptionalTensor, kParameters> given{q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias};
  DSMILCall call(x, given, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype);
  const Tensor grad_x = call.grad_x(needs[0]);
  const Parameters found = second_stream_backward(
      call, {bag, scores, lse, critical, pooled, grad_bag, grad_scores, grad_lse}, grad_x);
  return std::tuple_cat(std::make_tuple(grad_x), in_their_types(found, given, needs.data() + 1));
}

// --- both streams

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_fwd(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& q2_weight, const OptionalTensor& q2_bias,
    const OptionalTensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::optional<c10::string_view> v_activation,
    double v_dropout_p, std::optional<double> scale, std::optional<ScalarType> compute_dtype) {
  DSMILCall call(x, {q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias}, offsets, mask, seed, v_activation,
                 v_dropout_p, scale, compute_dtype);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0, "weight must be [any, ", call.width, "]; got ",
                    weight.sizes());
  const int64_t C = weight.size(0);
  const auto [values, critical, logits] =
      instance_max(call, call.take(weight, "weight", {C, call.width}), call.take(bias, "bias", {C}));
  auto [bag, scores, lse, pooled] = second_stream(call, critical);
  return {bag, scores, lse, critical, values, logits, pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_bwd(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& q2_weight, const OptionalTensor& q2_bias,
    const OptionalTensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, const Tensor& bag, const Tensor& scores, const Tensor& lse,
    const Tensor& critical, const Tensor& logits, const Tensor& pooled, std::optional<c10::string_view> v_activation,
    double v_dropout_p, std::optional<double> scale, std::optional<ScalarType> compute_dtype,
    const OptionalTensor& grad_bag, const OptionalTensor& grad_scores, const OptionalTensor& grad_lse,
    const OptionalTensor& grad_values, const OptionalTensor& grad_logits, std::array<bool, 9> needs) {
  const std::array<OptionalTensor, kParameters> given{q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias};
  DSMILCall call(x, given, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype);
  const int64_t C = weight.size(0);
  const Tensor grad_x = call.grad_x(needs[0]);
  const Parameters found = second_stream_backward(
      call, {bag, scores, lse, critical, pooled, grad_bag, grad_scores, grad_lse}, grad_x);
  std::array<Tensor, 2> first;
  if (grad_values || grad_logits) {
    const auto gradients = instance_max_gradients(
        call, call.take(weight, "weight", {C, call.width}), call.take_indices(critical, "critical", {call.bags, C}),
        call.take(logits, "logits", {call.rows, C}), grad_values, grad_logits, {needs[0], needs[1], needs[2]}, grad_x);
    first = {std::get<1>(gradients), std::get<2>(gradients)};
  }
  return std::tuple_cat(std::make_tuple(grad_x),
                        in_their_types<2>(first, {weight, bias ? *bias : weight}, needs.data() + 1),
                        in_their_types(found, given, needs.data() + 3));
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("dsmil_fwd.native", dsmil_fwd);
  m.impl("dsmil_bwd.native", dsmil_bwd);
  m.impl("dsmil_pool_fwd.native", dsmil_pool_fwd);
  m.impl("dsmil_pool_bwd.native", dsmil_pool_bwd);
}

}  // namespace
}  // namespace milkernels
