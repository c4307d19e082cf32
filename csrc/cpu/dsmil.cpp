// dsmil_pool on the CPU, the second stream of DSMIL (Li, Li, Eliceiri 2021), and dsmil, both streams: then the gradient
// of the first, a few rows, is added to that of the second where it lies.
//
// What is linear never meets the instances: <Wq x_i + bq, q_m> = <x_i, Wq^T q_m> + <bq, q_m>, so a linear query is one
// vector for each bag and class, and V sum_i a_i x_i = sum_i a_i V x_i, since the weights sum to 1. The few critical
// instances are dealt with in PyTorch's own small products.
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
            const std::optional<c10::string_view>& v_activation, double v_dropout_p, std::optional<double> scale,
            std::optional<ScalarType> compute_dtype)
      : Call(x, offsets, mask), v_activation(v_activation ? parse_activation(*v_activation) : Activation::kIdentity),
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
  CriticalQueries(const DSMILCall& call, const Tensor& critical) : call_(call), critical_(critical.reshape({-1})) {
    bags_ = critical.size(0), classes_ = critical.size(1);
    dead = critical_ < 0;
    const bool empty = call.rows == 0;
    rows_ = empty ? call.empty({critical_.numel(), call.width}).zero_()
                  : call.x.index_select(0, critical_.clamp_min(0)).to(call.acc).masked_fill_(dead.unsqueeze(1), 0.);
    z_ = plus_bias(rows_.mm(call.q_weight().t()), call.q_bias());
    if (call.mlp()) {
      hidden_ = z_.relu();
      q_ = plus_bias(hidden_.mm(call.q2_weight().t()), call.q2_bias()).tanh_();
    } else {
      q_ = z_;
    }
    const Tensor scaled = q_ * call.scale;
    shift = at::zeros({critical_.numel()}, q_.options());
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
  // parameters [q_weight .. q2_bias] and returns that of the critical rows.
  Tensor backward(const Tensor& grad_vectors, const Tensor& grad_shift, std::array<Tensor, 4>& grads) const {
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
    grads[0].addmm_(grad_q.t(), rows_);
    if (call_.q_bias().defined()) grads[1].add_(grad_q.sum(0));
    return grad_q.mm(q_weight);
  }

  template <typename T>
  void add_to_rows(const Tensor& grad_rows, T* grad_x) const {
    using A = acc_t<T>;
    const int64_t* const row = critical_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < critical_.numel(); ++i) {
      if (row[i] >= 0)
        add_to_row(grad_x + row[i] * call_.width, grad_rows.const_data_ptr<A>() + i * call_.width, A(1), call_.width);
    }
  }

  Tensor dead;     // [bags * classes]
  Tensor vectors;  // what instances are multiplied with, scale included: [bags * classes, width or padded hidden]
  Tensor shift;    // [bags * classes]

 private:
  const DSMILCall& call_;
  Tensor critical_, rows_, z_, hidden_, q_;  // [bags * classes, ..]; z_ before the first activation
  int64_t bags_, classes_;
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
Outputs dsmil_pool_fwd(const Tensor& x, const Tensor& instance_logits, const Tensor& q_weight,
                       const OptionalTensor& q_bias, const OptionalTensor& q2_weight, const OptionalTensor& q2_bias,
                       const OptionalTensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& offsets,
                       const OptionalTensor& mask, const OptionalTensor& seed,
                       std::optional<c10::string_view> v_activation, double v_dropout_p, std::optional<double> scale,
                       std::optional<ScalarType> compute_dtype) {
  const DSMILCall call(x, q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias, offsets, mask, seed, v_activation,
                       v_dropout_p, scale, compute_dtype);
  TORCH_CHECK_VALUE(instance_logits.dim() == 2 && instance_logits.size(1) > 0, "instance_logits must be [", call.rows,
                    ", any]; got ", instance_logits.sizes());
  const int64_t B = call.bags(), C = instance_logits.size(1);
  const Tensor logits = call.take(instance_logits, "instance_logits", {call.rows, C});
  Tensor critical = at::empty({B, C}, x.options().dtype(at::kLong)), bag = call.empty({B, C, call.pooled_width()}),
         scores = call.empty({call.rows, C}), lse = call.empty({B, C});
  dispatch_products(x.scalar_type(), call.planes, [&]<typename T, typename E>() {
    using A = acc_t<T>;
    const auto in = call.ragged<T>();
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

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients dsmil_pool_bwd(const Tensor& x, const Tensor& q_weight, const OptionalTensor& q_bias,
                         const OptionalTensor& q2_weight, const OptionalTensor& q2_bias, const OptionalTensor& v_weight,
                         const OptionalTensor& v_bias, const OptionalTensor& offsets, const OptionalTensor& mask,
                         const OptionalTensor& seed, const Tensor& bag, const Tensor& scores, const Tensor& lse,
                         const Tensor& critical, const Tensor& pooled, std::optional<c10::string_view> v_activation,
                         double v_dropout_p, std::optional<double> scale, std::optional<ScalarType> compute_dtype,
                         const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
                         const OptionalTensor& grad_lse, std::array<bool, 7> needs) {
  const DSMILCall call(x, q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias, offsets, mask, seed, v_activation,
                       v_dropout_p, scale, compute_dtype);
  TORCH_CHECK_VALUE(critical.dim() == 2 && critical.size(1) > 0, "critical must be [bags, any]; got ",
                    critical.sizes());
  const int64_t B = call.bags(), C = critical.size(1), N = call.rows, L = call.width, Lv = call.bag_width();
  const Tensor winners = call.take_indices(critical, "critical", {B, C});
  Tensor grad_pooled = call.take(grad_bag, "grad_bag", {B, C, Lv});
  const CriticalQueries queries(call, winners);

  std::array<Tensor, 7> grads;  // x, q_weight .. v_bias
  grads[0] = call.grad_x(needs[0]);
  for (int i = 1; i < 7; ++i) {
    const Tensor& parameter = call.parameters[i - 1];
    const bool whole = i < 5 || call.folded();  // those of a value stage come from its sums
    grads[i] = parameter.defined() && whole ? at::zeros_like(parameter) : call.empty({0});
  }
  if (call.folded() && grad_pooled.defined()) {
    const Tensor empty = (lse == kDead<double>).reshape({B * C, 1});
    const Tensor g = grad_pooled.view({B * C, Lv}).masked_fill(empty, 0.);
    grads[5].addmm_(g.t(), pooled.to(call.acc).reshape({B * C, L}));
    if (call.v_bias().defined()) grads[6].add_(g.sum(0));
    grad_pooled = g.mm(call.v_weight()).view({B, C, L});
  }
  const PoolTensors tensors(call, C, call.pooled_width(), call.folded() ? pooled : bag, scores, lse,
                            grad_pooled.defined() ? OptionalTensor(grad_pooled) : std::nullopt, grad_scores, grad_lse);
  // A shift of all scores of a bag and class leaves the weights as they are.
  Tensor grad_shift;
  if (!call.mlp() && call.q_bias().defined() && (grad_scores || grad_lse)) {
    grad_shift = at::zeros({B, C}, call.x.options().dtype(call.acc));
    if (grad_lse) grad_shift.add_(tensors.grad_lse());
    if (grad_scores) {
      const Tensor real = tensors.grad_scores().masked_fill(scores == kDead<double>, 0.);
      for (int64_t b = 0; b < B; ++b) {
        grad_shift[b].add_(real.slice(0, call.offsets[b], call.offsets[b + 1]).sum(0));
      }
    }
    grad_shift = grad_shift.reshape({B * C}).masked_fill(queries.dead, 0.);
  }

  dispatch_products(x.scalar_type(), call.planes, [&]<typename T, typename E>() {
    using A = acc_t<T>;
    const auto in = call.ragged<T>();
    T* const grad_x = data_if<T>(needs[0], grads[0]);
    Tensor grad_vectors = call.empty({B * C, queries.vectors.size(1)});
    with_programs<T, E>(call, in, queries, [&](auto& score, auto* stage) {
      int64_t slices = in.chunks();
      const auto fewer = [&](int64_t n) { slices = std::min(slices, n); };
      if constexpr (std::is_same_v<std::decay_t<decltype(score)>, MlpScore<T, E>>) {
        score.prepare_backward(N, needs[0]);
        fewer(score.slices());
      } else {
        score.products.prepare_gradient();
      }
      if (stage) {
        stage->prepare_backward(N, needs[0]);
        if (stage->slices()) fewer(*stage->slices());
      }
      pool_backward<T>(score, stage, in, tensors.typed<A>(), grad_x, slices);
      const auto g = tensors.typed<A>();
      score.products.gradient_of_bags(grad_vectors.mutable_data_ptr<A>(), call.mlp() || stage ? nullptr : &g);
      const auto take_sums = [&](const Layer<E>& layer, const typename Layer<E>::Sums& sums, int weight) {
        Tensor &w = grads[weight], &b = grads[weight + 1];
        const auto& parameter = call.parameters[weight - 1];
        if (w.numel() == 0) w = at::empty_like(parameter);
        std::copy_n(sums.weight, layer.out() * layer.in(), w.template mutable_data_ptr<A>());
        if (!call.parameters[weight].defined()) return;
        if (b.numel() == 0) b = at::empty_like(call.parameters[weight]);
        std::copy_n(sums.bias, layer.out(), b.template mutable_data_ptr<A>());
      };
      if constexpr (std::is_same_v<std::decay_t<decltype(score)>, MlpScore<T, E>>) {
        const auto [first, second] = score.layer_gradients();
        take_sums(score.first, first, 1);
        take_sums(score.second, second, 3);
      }
      if (stage && stage->layer) take_sums(*stage->layer, stage->layer_gradient(), 5);
    });
    std::array<Tensor, 4> of_query{grads[1], grads[2], grads[3], grads[4]};
    const Tensor grad_rows = queries.backward(grad_vectors, grad_shift, of_query);
    if (grad_x != nullptr) queries.add_to_rows(grad_rows.contiguous(), grad_x);
  });
  const std::array<OptionalTensor, 6> parameters{q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias};
  for (int i = 1; i < 7; ++i) {
    grads[i] = needs[i] ? grads[i].to(parameters[i - 1]->scalar_type()) : at::empty({0}, x.options());
  }
  return std::tuple_cat(grads);
}

// --- both streams

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dsmil_fwd(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& q2_weight, const OptionalTensor& q2_bias,
    const OptionalTensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::optional<c10::string_view> v_activation,
    double v_dropout_p, std::optional<double> scale, std::optional<ScalarType> compute_dtype) {
  auto [values, indices, logits] = instance_max_fwd(x, weight, bias, offsets, mask);
  auto [bag, scores, lse, critical, pooled] =
      dsmil_pool_fwd(x, logits, q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias, offsets, mask, seed,
                     v_activation, v_dropout_p, scale, compute_dtype);
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
  auto [grad_x, grad_q, grad_q_bias, grad_q2, grad_q2_bias, grad_v, grad_v_bias] =
      dsmil_pool_bwd(x, q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias, offsets, mask, seed, bag, scores, lse,
                     critical, pooled, v_activation, v_dropout_p, scale, compute_dtype, grad_bag, grad_scores, grad_lse,
                     {needs[0], needs[3], needs[4], needs[5], needs[6], needs[7], needs[8]});
  Tensor grad_weight = at::empty({0}, x.options()), grad_bias = grad_weight.clone();
  if (grad_values || grad_logits) {
    std::tie(grad_x, grad_weight, grad_bias) = instance_max_gradients(
        x, weight, bias, offsets, mask, critical, logits, grad_values, grad_logits, {needs[0], needs[1], needs[2]},
        needs[0] ? OptionalTensor(grad_x) : std::nullopt);
  } else {
    if (needs[1]) grad_weight = at::zeros_like(weight, at::MemoryFormat::Contiguous);
    if (needs[2]) grad_bias = at::zeros_like(*bias, at::MemoryFormat::Contiguous);
  }
  return {grad_x, grad_weight, grad_bias, grad_q, grad_q_bias, grad_q2, grad_q2_bias, grad_v, grad_v_bias};
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("dsmil_fwd.native", dsmil_fwd);
  m.impl("dsmil_bwd.native", dsmil_bwd);
  m.impl("dsmil_pool_fwd.native", dsmil_pool_fwd);
  m.impl("dsmil_pool_bwd.native", dsmil_pool_bwd);
}

}  // namespace
}  // namespace milkernels
