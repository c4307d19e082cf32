// attention_pool, attention_scores and their backward on the CPU: a call, and the two passes over its rows, which
// typed/attention.cpp has for each type of these.
#pragma once

#include <string_view>

#include "instances.h"

namespace milkernels {

class AttentionCall : public Call {
 public:
  AttentionCall(const Tensor& x, const AttentionWeights& weights, const OptionalTensor& offsets,
                const OptionalTensor& mask, const OptionalTensor& seed, std::string_view activation, double dropout_p,
                std::optional<ScalarType> compute_dtype, const EmbedArguments& embed)
      : Call(x, offsets, mask, embed), activation(parse_activation(activation)), dropout(dropout_of(seed, dropout_p)),
        planes(planes_of(compute_dtype)) {
    const Tensor &v_weight = weights.v_weight(), &w_weight = weights.w_weight();
    hidden = units_of(v_weight, "v_weight", width), heads = units_of(w_weight, "w_weight", hidden);
    parameters = {take(v_weight, "v_weight", {hidden, width}),           take(weights.v_bias(), "v_bias", {hidden}),
                  take(weights.u_weight(), "u_weight", {hidden, width}), take(weights.u_bias(), "u_bias", {hidden}),
                  take(w_weight, "w_weight", {heads, hidden}),           take(weights.w_bias(), "w_bias", {heads})};
  }

  // Numbers that are kept of a row: V and U in whole blocks.
  int64_t kept_width() const { return round_up(hidden * (parameters[2].defined() ? 2 : 1), kBlock); }

  Activation activation;
  Dropout dropout;
  int planes;
  int64_t hidden = 0, heads = 0;
  std::array<Tensor, 6> parameters;  // v_weight .. w_bias, in the accumulation type; undefined where absent
};

// Writes the scores, and the bag vectors and lse where these are defined.
template <typename T>
void attention_forward(const AttentionCall& call, const Ragged<T>& in, const Tensor& scores, const Tensor& bag,
                       const Tensor& lse);

// Writes the gradients of the parameters, grads[1] .. grads[6], those that are needed, and those of the rows.
template <typename T>
void attention_backward(const AttentionCall& call, const Ragged<T>& in, const PooledTensors& pooled,
                        const std::array<bool, 9>& needs, const std::array<Tensor, 9>& grads);

}  // namespace milkernels
