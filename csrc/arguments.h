// What ops take as lists of tensors, each of which has a name and a place in its list (milkernels/ops). Built once in a
// call; sizes, types and devices are checked by the call itself, which knows where it runs.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/StringUtil.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string_view>

namespace milkernels {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;  // Tensor?[] of a schema

// The elements of a list, one for each name; ValueError unless there are as many, and those at `required` are tensors.
template <size_t N>
std::array<OptionalTensor, N> named(const OptionalTensors& list, const char* must_have,
                                    const std::array<const char*, N>& names, std::initializer_list<size_t> required) {
  TORCH_CHECK_VALUE(list.size() == N, must_have, " ", N, " elements, ", c10::Join(", ", names), "; got ", list.size());
  std::array<OptionalTensor, N> out;
  for (size_t i = 0; i < N; ++i) out[i] = list.get(i);
  for (const size_t i : required) TORCH_CHECK_VALUE(out[i], names[i], " must be a tensor; got None");
  return out;
}

// V, U and w of attention with their biases.
struct AttentionWeights : std::array<OptionalTensor, 6> {
  static constexpr std::array<const char*, 6> kNames{"v_weight", "v_bias", "u_weight", "u_bias", "w_weight", "w_bias"};
  explicit AttentionWeights(const OptionalTensors& list) : array(named(list, "weights must have", kNames, {0, 4})) {}

  const Tensor& v_weight() const { return *(*this)[0]; }
  const OptionalTensor& v_bias() const { return (*this)[1]; }
  const OptionalTensor& u_weight() const { return (*this)[2]; }
  const OptionalTensor& u_bias() const { return (*this)[3]; }
  const Tensor& w_weight() const { return *(*this)[4]; }
  const OptionalTensor& w_bias() const { return (*this)[5]; }
};

// One layer with a row for each class.
struct ClassifierWeights : std::array<OptionalTensor, 2> {
  static constexpr std::array<const char*, 2> kNames{"weight", "bias"};
  explicit ClassifierWeights(const OptionalTensors& list) : array(named(list, "weights must have", kNames, {0})) {}

  const Tensor& weight() const { return *(*this)[0]; }
  const OptionalTensor& bias() const { return (*this)[1]; }
};

// The layers that rows go through in DSMIL's second stream: an MLP query, a value that is not linear.
struct DSMILWeights : std::array<OptionalTensor, 6> {
  static constexpr std::array<const char*, 6> kNames{"q_weight", "q_bias",   "q2_weight",
                                                     "q2_bias",  "v_weight", "v_bias"};
  explicit DSMILWeights(const OptionalTensors& list) : array(named(list, "weights must have", kNames, {})) {}
};

// The layer in front of an op; without a weight there is none.
struct EmbedArguments {
  static constexpr std::array<const char*, 3> kNames{"e_weight", "e_bias", "e_seed"};
  EmbedArguments() = default;
  EmbedArguments(const OptionalTensors& list, std::optional<std::string_view> activation, double dropout_p,
                 std::optional<ScalarType> dtype)
      : activation(activation), dropout_p(dropout_p), dtype(dtype) {
    if (list.empty()) return;
    const auto found = named(list, "embed must be empty or have", kNames, {0});
    weight = found[0], bias = found[1], seed = found[2];
  }

  OptionalTensor weight, bias, seed;
  std::optional<std::string_view> activation;
  double dropout_p = 0;
  std::optional<ScalarType> dtype;  // of products, and of what they give
};

}  // namespace milkernels
