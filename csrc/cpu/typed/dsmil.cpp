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
  const auto layer = [&](const Tensor& weight, const Tensor& bias, Activation activation, const KeptRows& kept) {
    return Layer<E>(weight.const_data_ptr<A>(), data_or_null<A>(bias), weight.size(0), weight.size(1), activation,
                    planes, call.rows, kept);
  };
  // Products are kept in the order of the layers.
  int64_t kept_columns = 0;
  const auto kept_of = [&](const Tensor& weight) {
    const int64_t columns = round_up(weight.size(0), kBlock);
    return call.kept.hidden.part(std::exchange(kept_columns, kept_columns + columns), columns);
  };
  std::array<KeptRows, 2> kept;
  if (call.mlp()) kept = {kept_of(call.q_weight()), kept_of(call.q2_weight())};
  std::optional<ValueStage<T, E>> stage;
  if (call.layered()) {
    const KeptRows values = kept_of(call.v_weight());
    stage.emplace(call.width, call.v_dropout, layer(call.v_weight(), call.v_bias(), call.v_activation, values), values);
  } else if (call.v_dropout) {
    stage.emplace(call.width, call.v_dropout, std::nullopt, KeptRows());
  }
  ValueStage<T, E>* const value = stage ? &*stage : nullptr;
  if (call.mlp()) {
    MlpScore<T, E> score(in, layer(call.q_weight(), call.q_bias(), Activation::kRelu, kept[0]),
                         layer(call.q2_weight(), call.q2_bias(), Activation::kTanh, kept[1]), call.queries<A>(), kept);
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
    const auto to = [&](int i) { return data_if<A>(grads[i].numel() > 0, grads[i]); };
    with_programs<T, E>(call, in, [&](auto& score, auto* stage) {
      if constexpr (std::is_same_v<std::decay_t<decltype(score)>, MlpScore<T, E>>) {
        score.prepare_backward(call.rows, to(0), to(2), in.has_gradient());
      } else {
        score.products.prepare_gradient();
      }
      if (stage) stage->prepare_backward(call.rows, to(4), in.has_gradient());
      pool_backward<T>(score, stage, in, typed<A>(tensors));
      const auto g = typed<A>(tensors);
      score.products.gradient_of_bags(grad_vectors.mutable_data_ptr<A>(), call.mlp() || stage ? nullptr : &g);
      const auto finish = [&](typename Layer<E>::Gradients& sums, int bias) {
        sums.weight.finish();
        sums.bias.copy_to(to(bias), 0, grads[bias].numel());
      };
      if constexpr (std::is_same_v<std::decay_t<decltype(score)>, MlpScore<T, E>>) {
        finish(*score.first_gradients, 1);
        finish(*score.second_gradients, 3);
      }
      if (stage && stage->gradients) finish(*stage->gradients, 5);
    });
  });
}

template void dsmil_rows(const DSMILCall&, const Ragged<MILKERNELS_TYPE>&, const Tensor&, const Tensor&, const Tensor&);
template void dsmil_rows_backward(const DSMILCall&, const Ragged<MILKERNELS_TYPE>&, const PooledTensors&, const Tensor&,
                                  const std::array<Tensor, 6>&);

}  // namespace milkernels
