// dsmil_pool on the CPU, the second stream of DSMIL (Li, Li, Eliceiri 2021), and dsmil, both streams: then the gradient
// of the first, a few rows, is added to that of the second where it lies.
//
// What is linear never meets the instances: <Wq x_i + bq, q_m> = <x_i, Wq^T q_m> + <bq, q_m>, so a linear query is one
// vector for each bag and class, and V sum_i a_i x_i = sum_i a_i V x_i, since the weights sum to 1. The few critical
// instances are dealt with in PyTorch's own small products.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "instance_max.h"
#include "mlp_score.h"
#include "value.h"

namespace milkernels {
namespace {

class DSMILCall : public Call {
 public:
  DSMILCall(const Tensor& x, const Tensor& q_weight, const OptionalTensor& q_bias, const OptionalTensor& q2_weight,
            const OptionalTensor& q2_bias, const OptionalTensor& v_weight, const OptionalTensor& v_bias,
            const OptionalTensor& offsets, const OptionalTensor& mask, const OptionalTensor& seed,
            const std::optional<std::string_view>& v_activation, double v_dropout_p, std::optional<double> scale,
            std::optional<ScalarType> compute_dtype, const EmbedArguments& embed)
      : Call(x, offsets, mask, embed), v_activation(v_activation ? parse_activation(*v_activation) : Activation::kIdentity),
        v_dropout(checked_dropout(seed, v_dropout_p)), planes(bf16_planes(x.scalar_type(), compute_dtype)) {
    const auto rows_of_weight = [](const Tensor& t, const char* name) {
      TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) > 0, name, " must be 2-D and not empty; got ", t.sizes());
      return t.size(0);
    };
    const int64_t Q = rows_of_weight(q_weight, "q_weight");
    const int64_t Q2 = q2_weight ? rows_of_weight(*q2_weight, "q2_weight") : 0;
    const int64_t Lv = v_weight ? rows_of_weight(*v_weight, "v_weight") : 0;
    parameters = {take(q_weight, "q_weight", {Q, width}),  take(q_bias, "q_bias", {Q}),
                  take(q2_weight, "q2_weight", {Q2, Q}),   take(q2_bias, "q2_bias", {Q2}),
                  take(v_weight, "v_weight", {Lv, width}), take(v_bias, "v_bias", {Lv})};
    this->scale = scale.value_or(1. / std::sqrt(static_cast<double>(q2_weight ? Q2 : Q)));
  }

  const Tensor& q_weight() const { return parameters[0]; }
  const Tensor& q_bias() const { return parameters[1]; }
  const Tensor& q2_weight() const { return parameters[2]; }
  const Tensor& q2_bias() const { return parameters[3]; }
  const Tensor& v_weight() const { return parameters[4]; }
  const Tensor& v_bias() const { return parameters[5]; }
  bool mlp() const { return q2_weight().defined(); }
  bool folded() const { return v_weight().defined() && v_activation == Activation::kIdentity; }
  bool staged() const { return v_weight().defined() && !folded(); }  // the value is no linear map of the pooled vector
  int64_t pooled_width() const { return staged() ? v_weight().size(0) : width; }
  int64_t bag_width() const { return v_weight().defined() ? v_weight().size(0) : width; }

  Activation v_activation;
  Dropout v_dropout;
  int planes;
  double scale;
  std::array<Tensor, 6> parameters;  // q_weight .. v_bias, in the accumulation type; undefined where absent
};

Tensor plus_bias(Tensor product, const Tensor& bias) { return bias.defined() ? product.add_(bias) : product; }

// The queries of the critical instances, recomputed here so that the gradient flows through both uses of q.
class CriticalQueries {
 public:
  // critical [bags, classes], -1 for a class without one: its scores are -inf.
  CriticalQueries(const DSMILCall& call, const Tensor& critical)
      : dead((critical < 0).reshape({-1})), call_(call), instances_(call, critical),
        classes_(critical.size(1)) {
    z_ = plus_bias(instances_.rows.mm(call.q_weight().t()), call.q_bias());
    if (call.mlp()) {
      hidden_ = z_.relu();
      q_ = plus_bias(hidden_.mm(call.q2_weight().t()), call.q2_bias()).tanh_();
    } else {
      q_ = z_;
    }
    const Tensor scaled = q_ * call.scale;
    shift = at::zeros({dead.numel()}, q_.options());
    if (call.mlp()) {
      vectors = at::constant_pad_nd(scaled, {0, round_up(q_.size(1), kBlock) - q_.size(1)});
    } else {
      vectors = scaled.mm(call.q_weight());
      if (call.q_bias().defined()) shift = scaled.mv(call.q_bias());
    }
    shift.masked_fill_(dead, kDead<double>);
    vectors = vectors.contiguous();
  }

  template <typename A>
  Queries<A> typed() const {
    return {vectors.const_data_ptr<A>(), classes_, classes_ * vectors.size(1), shift.const_data_ptr<A>(), classes_};
  }

  // From the gradients of `vectors` and, for a linear query, of `shift` (or undefined): adds to those of the query's
  // parameters [q_weight .. q2_bias] and of the critical rows.
  void backward(const Tensor& grad_vectors, const Tensor& grad_shift, std::array<Tensor, 4> grads,
                RowGradients& of_rows) const {
    const Tensor q_weight = call_.q_weight(), scaled = q_ * call_.scale;
    Tensor grad_q;
    if (call_.mlp()) {
      grad_q = grad_vectors.slice(1, 0, q_.size(1)) * call_.scale;
      const Tensor grad_z2 = grad_q * (1 - q_ * q_);
      grads[2].addmm_(grad_z2.t(), hidden_);
      if (call_.q2_bias().defined()) grads[3].add_(grad_z2.sum(0));
      grad_q = grad_z2.mm(call_.q2_weight()) * (z_ > 0);
    } else {
      grad_q = grad_vectors.mm(q_weight.t());
      grads[0].addmm_(scaled.t(), grad_vectors);
      if (call_.q_bias().defined() && grad_shift.defined()) {
        grad_q.addr_(grad_shift, call_.q_bias());
        grads[1].add_(scaled.t().mv(grad_shift));
      }
      grad_q = grad_q * call_.scale;
    }
    grads[0].addmm_(grad_q.t(), instances_.rows);
    if (call_.q_bias().defined()) grads[1].add_(grad_q.sum(0));
    instances_.backward(grad_q.mm(q_weight), of_rows);
  }

  Tensor dead;     // [bags * classes]
  Tensor vectors;  // what instances are multiplied with, scale included: [bags * classes, width or padded hidden]
  Tensor shift;    // [bags * classes]

 private:
  const DSMILCall& call_;
  SomeRows instances_;
  int64_t classes_;
  Tensor z_, hidden_, q_;  // [bags * classes, ..]; z_ before the first activation
};

// f(score program, stage or null) of the call.
template <typename T, typename E, typename F>
void with_programs(const DSMILCall& call, const Ragged<T>& in, const CriticalQueries& critical, const F& f) {
  using A = acc_t<T>;
  const int planes = std::max(call.planes, 1);
  const auto layer = [&](const Tensor& weight, const Tensor& bias, Activation activation) {
    return Layer<E>(weight.const_data_ptr<A>(), data_or_null<A>(bias), weight.size(0), weight.size(1), activation,
                    planes);
  };
  std::optional<ValueStage<T, E>> stage;
  if (call.staged()) {
    stage.emplace(call.width, call.v_dropout, layer(call.v_weight(), call.v_bias(), call.v_activation));
  } else if (call.v_dropout) {
    stage.emplace(call.width, call.v_dropout, std::nullopt);
  }
  ValueStage<T, E>* const value = stage ? &*stage : nullptr;
  if (call.mlp()) {
    MlpScore<T, E> score(in, layer(call.q_weight(), call.q_bias(), Activation::kRelu),
                         layer(call.q2_weight(), call.q2_bias(), Activation::kTanh), critical.typed<A>());
    f(score, value);
  } else {
    QueryScore<T> score(in, critical.typed<A>());
    f(score, value);
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// `pooled` is what is pooled before a linear value is taken of it; empty where that is the bag itself.
Outputs second_stream(const DSMILCall& call, const Tensor& instance_logits) {
  TORCH_CHECK_VALUE(instance_logits.dim() == 2 && instance_logits.size(1) > 0, "instance_logits must be [", call.rows,
                    ", any]; got ", instance_logits.sizes());
  const int64_t B = call.bags(), C = instance_logits.size(1);
  const Tensor logits = call.take(instance_logits, "instance_logits", {call.rows, C});
  Tensor critical = at::empty({B, C}, call.x.options().dtype(at::kLong)), bag = call.empty({B, C, call.pooled_width()}),
         scores = call.empty({call.rows, C}), lse = call.empty({B, C});
  with_products(call, call.planes, nullptr, [&]<typename T, typename E>(const Ragged<T>& in) {
    using A = acc_t<T>;
    FirstMax<T> first(in, C, nullptr, critical.mutable_data_ptr<int64_t>());
    for_tiles(in, [&] { return first.worker(); }, [&](const Tile<T>& tile, auto& w) {
      first.add(tile, logits.const_data_ptr<A>() + tile.first * C, w);
    });
    first.finish();
    const CriticalQueries queries(call, critical);
    with_programs<T, E>(call, in, queries, [&](const auto& score, const auto* stage) {
      pool_forward<T>(score, in, scores.mutable_data_ptr<A>(),
                      SoftmaxPool<T>(in, score, stage, bag.mutable_data_ptr<A>(), lse.mutable_data_ptr<A>()));
    });
  });
  Tensor pooled = call.empty({0});
  if (call.folded()) {
    pooled = bag;
    const auto empty = (lse == kDead<double>).unsqueeze(2);
    bag = plus_bias(pooled.view({B * C, call.width}).mm(call.v_weight().t()), call.v_bias())
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
std::array<Tensor, 6> second_stream_backward(const DSMILCall& call, const std::array<OptionalTensor, 6>& parameters,
                                             const Tensor& bag, const Tensor& scores, const Tensor& lse,
                                             const Tensor& critical, const Tensor& pooled, const StreamGradients& from,
                                             const std::array<bool, 6>& needs, RowGradients& of_rows) {
  TORCH_CHECK_VALUE(critical.dim() == 2 && critical.size(1) > 0, "critical must be [bags, any]; got ",
                    critical.sizes());
  const int64_t B = call.bags(), C = critical.size(1), N = call.rows, L = call.width, Lv = call.bag_width();
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
    grads[4].addmm_(g.t(), pooled.to(call.acc).reshape({B * C, L}));
    if (call.v_bias().defined()) grads[5].add_(g.sum(0));
    grad_pooled = g.mm(call.v_weight()).view({B, C, L});
  }
  const PoolTensors tensors(call, C, call.pooled_width(), call.folded() ? pooled : bag, scores, lse,
                            grad_pooled.defined() ? OptionalTensor(grad_pooled) : std::nullopt, from.scores, from.lse);
  // A shift of all scores of a bag and class leaves the weights as they are.
  Tensor grad_shift;
  if (!call.mlp() && call.q_bias().defined() && (from.scores || from.lse)) {
    grad_shift = at::zeros({B, C}, call.x.options().dtype(call.acc));
    if (from.lse) grad_shift.add_(tensors.grad_lse());
    if (from.scores) {
      const Tensor real = tensors.grad_scores().masked_fill(scores == kDead<double>, 0.);
      for (int64_t b = 0; b < B; ++b) {
        grad_shift[b].add_(real.slice(0, call.offsets[b], call.offsets[b + 1]).sum(0));
      }
    }
    grad_shift = grad_shift.reshape({B * C}).masked_fill(queries.dead, 0.);
  }

  Tensor grad_vectors = call.empty({B * C, queries.vectors.size(1)});
  with_products(call, call.planes, &of_rows, [&]<typename T, typename E>(const Ragged<T>& in) {
    using A = acc_t<T>;
    with_programs<T, E>(call, in, queries, [&](auto& score, auto* stage) {
      int64_t slices = in.chunks();
      const auto fewer = [&](int64_t n) { slices = std::min(slices, n); };
      if constexpr (std::is_same_v<std::decay_t<decltype(score)>, MlpScore<T, E>>) {
        score.prepare_backward(N, in.has_gradient());
        fewer(score.slices());
      } else {
        score.products.prepare_gradient();
      }
      if (stage) {
        stage->prepare_backward(N, in.has_gradient());
        if (stage->slices()) fewer(*stage->slices());
      }
      pool_backward<T>(score, stage, in, tensors.typed<A>(), slices);
      const auto g = tensors.typed<A>();
      score.products.gradient_of_bags(grad_vectors.mutable_data_ptr<A>(), call.mlp() || stage ? nullptr : &g);
      const auto take_sums = [&](const Layer<E>& layer, const typename Layer<E>::Sums& sums, int weight) {
        Tensor &w = grads[weight], &b = grads[weight + 1];
        if (w.numel() == 0) w = at::empty_like(call.parameters[weight]);
        std::copy_n(sums.weight, layer.out() * layer.in(), w.template mutable_data_ptr<A>());
        if (!call.parameters[weight + 1].defined()) return;
        if (b.numel() == 0) b = at::empty_like(call.parameters[weight + 1]);
        std::copy_n(sums.bias, layer.out(), b.template mutable_data_ptr<A>());
      };
      if constexpr (std::is_same_v<std::decay_t<decltype(score)>, MlpScore<T, E>>) {
        const auto [first, second] = score.layer_gradients();
        take_sums(score.first, first, 0);
        take_sums(score.second, second, 2);
      }
      if (stage && stage->layer) take_sums(*stage->layer, stage->layer_gradient(), 4);
    });
  });
  queries.backward(grad_vectors, grad_shift, {grads[0], grads[1], grads[2], grads[3]}, of_rows);
  for (int i = 0; i < 6; ++i) {
    grads[i] = needs[i] ? grads[i].to(parameters[i]->scalar_type()) : at::empty({0}, call.x.options());
  }
  return grads;
}

// --- The ops

Outputs dsmil_pool_fwd(const Tensor& x, const Tensor& instance_logits, const Tensor& q_weight,
                       const OptionalTensor& q_bias, const OptionalTensor& q2_weight, const OptionalTensor& q2_bias,
                       const OptionalTensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& offsets,
                       const OptionalTensor& mask, const OptionalTensor& seed,
                       std::optional<std::string_view> v_activation, double v_dropout_p, std::optional<double> scale,
                       std::optional<ScalarType> compute_dtype, const OptionalTensor& e_weight, const OptionalTensor& e_bias, const OptionalTensor& e_seed,
                       std::optional<std::string_view> e_activation, double e_dropout_p, std::optional<ScalarType> e_dtype) {
  const DSMILCall call(x, q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias, offsets, mask, seed, v_activation,
                       v_dropout_p, scale, compute_dtype, {e_weight, e_bias, e_seed, e_activation, e_dropout_p, e_dtype});
  return second_stream(call, instance_logits);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients dsmil_pool_bwd(const Tensor& x, const Tensor& q_weight, const OptionalTensor& q_bias,
                         const OptionalTensor& q2_weight, const OptionalTensor& q2_bias, const OptionalTensor& v_weight,
                         const OptionalTensor& v_bias, const OptionalTensor& offsets, const OptionalTensor& mask,
                         const OptionalTensor& seed, const Tensor& bag, const Tensor& scores, const Tensor& lse,
                         const Tensor& critical, const Tensor& pooled, const OptionalTensor& e_weight, const OptionalTensor& e_bias, const OptionalTensor& e_seed, std::optional<std::string_view> v_activation,
                         double v_dropout_p, std::optional<double> scale, std::optional<ScalarType> compute_dtype,
                         std::optional<std::string_view> e_activation, double e_dropout_p, std::optional<ScalarType> e_dtype, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
                         const OptionalTensor& grad_lse, std::array<bool, 9> needs) {
  const DSMILCall call(x, q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias, offsets, mask, seed, v_activation,
                       v_dropout_p, scale, compute_dtype, {e_weight, e_bias, e_seed, e_activation, e_dropout_p, e_dtype});
  RowGradients of_rows(call, needs[0], needs[7], needs[8]);
  const auto [q, qb, q2, q2b, v, vb] = second_stream_backward(
      call, {q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias}, bag, scores, lse, critical, pooled,
      {grad_bag, grad_scores, grad_lse}, {needs[1], needs[2], needs[3], needs[4], needs[5], needs[6]}, of_rows);
  return {of_rows.x, q, qb, q2, q2b, v, vb, of_rows.typed_weight(call), of_rows.typed_bias(call)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_fwd(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& q2_weight, const OptionalTensor& q2_bias,
    const OptionalTensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::optional<std::string_view> v_activation,
    double v_dropout_p, std::optional<double> scale, std::optional<ScalarType> compute_dtype, const OptionalTensor& e_weight, const OptionalTensor& e_bias, const OptionalTensor& e_seed,
    std::optional<std::string_view> e_activation, double e_dropout_p, std::optional<ScalarType> e_dtype) {
  const EmbedArguments embed {e_weight, e_bias, e_seed, e_activation, e_dropout_p, e_dtype};
  auto [values, indices, logits] = instance_max_forward({x, weight, bias, offsets, mask, embed});
  const DSMILCall call(x, q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias, offsets, mask, seed, v_activation,
                       v_dropout_p, scale, compute_dtype, embed);
  auto [bag, scores, lse, critical, pooled] = second_stream(call, logits);
  return {bag, scores, lse, critical, values, logits, pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_bwd(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& q2_weight, const OptionalTensor& q2_bias,
    const OptionalTensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, const Tensor& bag, const Tensor& scores, const Tensor& lse,
    const Tensor& critical, const Tensor& logits, const Tensor& pooled, const OptionalTensor& e_weight, const OptionalTensor& e_bias, const OptionalTensor& e_seed,
    std::optional<std::string_view> v_activation, double v_dropout_p, std::optional<double> scale,
    std::optional<ScalarType> compute_dtype, std::optional<std::string_view> e_activation, double e_dropout_p, std::optional<ScalarType> e_dtype,
    const OptionalTensor& grad_bag, const OptionalTensor& grad_scores, const OptionalTensor& grad_lse,
    const OptionalTensor& grad_values, const OptionalTensor& grad_logits, std::array<bool, 11> needs) {
  const EmbedArguments embed {e_weight, e_bias, e_seed, e_activation, e_dropout_p, e_dtype};
  const DSMILCall call(x, q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias, offsets, mask, seed, v_activation,
                       v_dropout_p, scale, compute_dtype, embed);
  RowGradients of_rows(call, needs[0], needs[9], needs[10]);
  const auto [q, qb, q2, q2b, v, vb] = second_stream_backward(
      call, {q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias}, bag, scores, lse, critical, pooled,
      {grad_bag, grad_scores, grad_lse}, {needs[3], needs[4], needs[5], needs[6], needs[7], needs[8]}, of_rows);
  Tensor grad_weight = at::empty({0}, x.options()), grad_bias = grad_weight.clone();
  if (grad_values || grad_logits) {
    const ClassCall first(x, weight, bias, offsets, mask, embed);
    std::tie(grad_weight, grad_bias) = instance_max_gradients(first, critical, logits, grad_values, grad_logits,
                                                              needs[1], needs[2], /*add=*/true, of_rows);
    if (needs[1]) grad_weight = grad_weight.to(weight.scalar_type());
    if (needs[2]) grad_bias = grad_bias.to(bias->scalar_type());
  } else {
    if (needs[1]) grad_weight = at::zeros_like(weight, at::MemoryFormat::Contiguous);
    if (needs[2]) grad_bias = at::zeros_like(*bias, at::MemoryFormat::Contiguous);
  }
  return {of_rows.x, grad_weight, grad_bias, q, qb, q2, q2b, v, vb, of_rows.typed_weight(call),
          of_rows.typed_bias(call)};
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("dsmil_fwd.native", dsmil_fwd);
  m.impl("dsmil_bwd.native", dsmil_bwd);
  m.impl("dsmil_pool_fwd.native", dsmil_pool_fwd);
  m.impl("dsmil_pool_bwd.native", dsmil_pool_bwd);
}

}  // namespace
}  // namespace milkernels
