#include "../dsmil.h"

#include "../mlp_score.h"
#include "../value.h"

namespace milkernels {
namespace {

// f(score program, stage or null) of the call.
template <typename T, typename E, typename F>
void with_programs(const DSMILCall& call, const Ragged<T>& in, const F& f) {
  using A = acc_t<T>;
  const int planes = std::max(call.planes, 1);
  const auto layer = [&](const Tensor& weight, const Tensor& bias, Activation activation) {
    return Layer<E>(weight.const_data_ptr<A>(), data_or_null<A>(bias), weight.size(0), weight.size(1), activation,
                    planes);
  };
  // Products are kept in the order of the layers.
  int64_t kept_columns = 0;
  const auto kept = [&](const Tensor& weight) {
    const int64_t columns = round_up(weight.size(0), kBlock),
                  first = std::exchange(kept_columns, kept_columns + columns);
    return call.kept.hidden.part(first, columns);
  };
  std::array<KeptRows, 2> kept_query;
  if (call.mlp()) kept_query = {kept(call.q_weight()), kept(call.q2_weight())};
  std::optional<ValueStage<T, E>> stage;
  if (call.layered()) {
    stage.emplace(call.width, call.v_dropout, layer(call.v_weight(), call.v_bias(), call.v_activation),
                  kept(call.v_weight()));
  } else if (call.v_dropout) {
    stage.emplace(call.width, call.v_dropout, std::nullopt, KeptRows());
  }
  ValueStage<T, E>* const value = stage ? &*stage : nullptr;
  if (call.mlp()) {
    MlpScore<T, E> score(in, layer(call.q_weight(), call.q_bias(), Activation::kRelu),
                         layer(call.q2_weight(), call.q2_bias(), Activation::kTanh), call.queries<A>(), kept_query);
    f(score, value);
  } else {
    QueryScore<T> score(in, call.queries<A>());
    f(score, value);
  }
}

}  // namespace

template <typename T>
void dsmil_rows(const DSMILCall& call, const Ragged<T>& in, const Tensor& bag, const Tensor& scores,
                const Tensor& lse) {
  using A = acc_t<T>;
  with_element<T>(call.planes, [&]<typename E>() {
    with_programs<T, E>(call, in, [&](const auto& score, const auto* stage) {
      pool_forward<T>(score, in, scores.mutable_data_ptr<A>(),
                      SoftmaxPool<T>(in, score, stage, bag.mutable_data_ptr<A>(), lse.mutable_data_ptr<A>()));
    });
  });
}

template <typename T>
void dsmil_rows_backward(const DSMILCall& call, const Ragged<T>& in, const PooledTensors& tensors,
                         const Tensor& grad_vectors, const std::array<Tensor, 6>& grads) {
  using A = acc_t<T>;
  with_element<T>(call.planes, [&]<typename E>() {
    with_programs<T, E>(call, in, [&](auto& score, auto* stage) {
      if constexpr (std::is_same_v<std::decay_t<decltype(score)>, MlpScore<T, E>>) {
        score.prepare_backward(call.rows, in.has_gradient());
      } else {
        score.products.prepare_gradient();
      }
      if (stage) stage->prepare_backward(call.rows, in.has_gradient());
      pool_backward<T>(score, stage, in, typed<A>(tensors));
      const auto g = typed<A>(tensors);
      score.products.gradient_of_bags(grad_vectors.mutable_data_ptr<A>(), call.mlp() || stage ? nullptr : &g);
      const auto take_sums = [&](const Layer<E>& layer, typename Layer<E>::Gradients& sums, int weight) {
        const Tensor &w = grads[weight], &b = grads[weight + 1];
        std::copy_n(sums.weight.sum(), layer.out() * layer.in(), w.template mutable_data_ptr<A>());
        if (b.numel() > 0) sums.bias.copy_to(b.template mutable_data_ptr<A>(), 0, layer.out());
      };
      if constexpr (std::is_same_v<std::decay_t<decltype(score)>, MlpScore<T, E>>) {
        take_sums(score.first, *score.first_gradients, 0);
        take_sums(score.second, *score.second_gradients, 2);
      }
      if (stage && stage->layer) take_sums(*stage->layer, *stage->gradients, 4);
    });
  });
}

template void dsmil_rows(const DSMILCall&, const Ragged<MILKERNELS_TYPE>&, const Tensor&, const Tensor&, const Tensor&);
template void dsmil_rows_backward(const DSMILCall&, const Ragged<MILKERNELS_TYPE>&, const PooledTensors&, const Tensor&,
                                  const std::array<Tensor, 6>&);

}  // namespace milkernels
