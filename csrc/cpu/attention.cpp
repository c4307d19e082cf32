// attention_pool, attention_scores and their backward on the CPU: from tensors to the driver.
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "attention_score.h"
#include "embed.h"

namespace milkernels {
namespace {

class AttentionCall : public Call {
 public:
  AttentionCall(const Tensor& x, const Tensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& u_weight,
                const OptionalTensor& u_bias, const Tensor& w_weight, const OptionalTensor& w_bias,
                const OptionalTensor& offsets, const OptionalTensor& mask, const OptionalTensor& seed,
                std::string_view activation, double dropout_p, std::optional<ScalarType> compute_dtype,
                const EmbedArguments& embed)
      : Call(x, offsets, mask, embed), activation(parse_activation(activation)), dropout(checked_dropout(seed, dropout_p)),
        planes(bf16_planes(x.scalar_type(), compute_dtype)) {
    TORCH_CHECK_VALUE(v_weight.dim() == 2 && w_weight.dim() == 2, "v_weight and w_weight must be 2-D; got ",
                      v_weight.sizes(), " and ", w_weight.sizes());
    hidden = v_weight.size(0), heads = w_weight.size(0);
    TORCH_CHECK_VALUE(hidden > 0 && heads > 0, "v_weight and w_weight must not be empty");
    parameters = {take(v_weight, "v_weight", {hidden, width}), take(v_bias, "v_bias", {hidden}),
                  take(u_weight, "u_weight", {hidden, width}), take(u_bias, "u_bias", {hidden}),
                  take(w_weight, "w_weight", {heads, hidden}), take(w_bias, "w_bias", {heads})};
  }

  template <typename T, typename E>
  AttentionScore<T, E> program() const {
    using A = acc_t<T>;
    const auto data = [&](int i) { return data_or_null<A>(parameters[i]); };
    return {{data(0), data(1), data(2), data(3), data(4), data(5), width, hidden, heads}, activation, dropout,
            std::max(planes, 1)};
  }

  Activation activation;
  Dropout dropout;
  int planes;
  int64_t hidden = 0, heads = 0;
  std::array<Tensor, 6> parameters;  // v_weight .. w_bias, in the accumulation type; undefined where absent
};

// Scores, and with `pool` the bag vectors and lse too.
std::tuple<Tensor, Tensor, Tensor> forward(const AttentionCall& call, bool pool) {
  Tensor scores = call.empty({call.rows, call.heads}), bag, lse;
  if (pool) {
    bag = call.empty({call.bags(), call.heads, call.width});
    lse = call.empty({call.bags(), call.heads});
  }
  with_products(call, call.planes, nullptr, [&]<typename T, typename E>(const Ragged<T>& in) {
    using A = acc_t<T>;
    const auto program = call.program<T, E>();
    A* const to = scores.mutable_data_ptr<A>();
    if (pool) {
      pool_forward(program, in, to,
                   SoftmaxPool<T>(in, program, nullptr, bag.mutable_data_ptr<A>(), lse.mutable_data_ptr<A>()));
    } else {
      pool_forward(program, in, to, NoPool());
    }
  });
  return {bag, scores, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_pool_fwd(
    const Tensor& x, const Tensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& u_weight,
    const OptionalTensor& u_bias, const Tensor& w_weight, const OptionalTensor& w_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::string_view activation, double dropout_p,
    std::optional<ScalarType> compute_dtype, const OptionalTensor& e_weight, const OptionalTensor& e_bias, const OptionalTensor& e_seed,
    std::optional<std::string_view> e_activation, double e_dropout_p, std::optional<ScalarType> e_dtype) {
  return forward({x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, seed, activation, dropout_p,
                  compute_dtype, {e_weight, e_bias, e_seed, e_activation, e_dropout_p, e_dtype}}, true);
}

Tensor attention_scores_fwd(
    const Tensor& x, const Tensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& u_weight,
    const OptionalTensor& u_bias, const Tensor& w_weight, const OptionalTensor& w_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, std::string_view activation, double dropout_p,
    std::optional<ScalarType> compute_dtype, const OptionalTensor& e_weight, const OptionalTensor& e_bias, const OptionalTensor& e_seed,
    std::optional<std::string_view> e_activation, double e_dropout_p, std::optional<ScalarType> e_dtype) {
  return std::get<1>(forward({x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, seed, activation,
                              dropout_p, compute_dtype, {e_weight, e_bias, e_seed, e_activation, e_dropout_p, e_dtype}}, false));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_bwd(
    const Tensor& x, const Tensor& v_weight, const OptionalTensor& v_bias, const OptionalTensor& u_weight,
    const OptionalTensor& u_bias, const Tensor& w_weight, const OptionalTensor& w_bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const OptionalTensor& seed, const OptionalTensor& bag, const Tensor& scores,
    const OptionalTensor& lse, const OptionalTensor& e_weight, const OptionalTensor& e_bias, const OptionalTensor& e_seed,
    std::string_view activation, double dropout_p, std::optional<ScalarType> compute_dtype,
    std::optional<std::string_view> e_activation, double e_dropout_p, std::optional<ScalarType> e_dtype,
    const OptionalTensor& grad_bag, const OptionalTensor& grad_scores, const OptionalTensor& grad_lse,
    std::array<bool, 9> needs) {
  const AttentionCall call(x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, seed, activation,
                           dropout_p, compute_dtype, {e_weight, e_bias, e_seed, e_activation, e_dropout_p, e_dtype});
  const PoolTensors pooled(call, call.heads, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  RowGradients of_rows(call, needs[0], needs[7], needs[8]);
  constexpr std::array kNames{"v_weight", "v_bias", "u_weight", "u_bias", "w_weight", "w_bias"};
  std::array<Tensor, 9> grads;
  for (int i = 1; i < 7; ++i) {
    check_need(needs[i], call.parameters[i - 1].defined(), kNames[i - 1]);
    grads[i] = needs[i] ? call.empty(call.parameters[i - 1].sizes()) : at::empty({0}, x.options());
  }
  with_products(call, call.planes, &of_rows, [&]<typename T, typename E>(const Ragged<T>& in) {
    using A = acc_t<T>;
    const auto out = [&](int i) { return data_if<A>(needs[i], grads[i]); };
    auto program = call.program<T, E>();
    program.prepare_backward(call.rows, needs[1] || needs[3], in.has_gradient());
    pool_backward<T>(program, nullptr, in, pooled.typed<A>(), program.slices());
    program.parameter_gradients(out(1), out(3), out(2), out(4), out(5), out(6));
  });
  const std::array<OptionalTensor, 6> parameters{v_weight, v_bias, u_weight, u_bias, w_weight, w_bias};
  for (int i = 0; i < 6; ++i) {
    if (needs[i + 1]) grads[i + 1] = grads[i + 1].to(parameters[i]->scalar_type());
  }
  grads[0] = of_rows.x, grads[7] = of_rows.typed_weight(call), grads[8] = of_rows.typed_bias(call);
  return std::tuple_cat(grads);
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("attention_pool_fwd.native", attention_pool_fwd);
  m.impl("attention_scores_fwd.native", attention_scores_fwd);
  m.impl("attention_bwd.native", attention_bwd);
}

}  // namespace
}  // namespace milkernels
