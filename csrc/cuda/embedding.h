// The layer in front of an op, h = drop(act(W x + b)), as a call holds it; and what it shares with other layers.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "../arguments.h"
#include "activation.h"

namespace milkernels {

inline Activation activation_of(std::string_view name) {
  if (name == "tanh") return Activation::kTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  TORCH_CHECK_VALUE(name == "identity", "activation must be tanh, relu, gelu or identity; got ", name);
  return Activation::kIdentity;
}

// A gradient can be asked for of what is there alone.
inline void check_wanted(bool need, bool given, const char* name) {
  TORCH_CHECK_VALUE(!need || given, "needs says that ", name, " wants a gradient, but ", name, " is absent");
}

// Checks each of an op's weights in this way.
template <typename Weights>
void check_wanted(const bool* needs, const Weights& given) {
  for (size_t i = 0; i < given.size(); ++i) check_wanted(needs[i], given[i].has_value(), Weights::kNames[i]);
}

// The type in which products with rows of that type run.
inline ScalarType product_type(ScalarType rows, std::optional<ScalarType> compute_dtype) {
  const ScalarType type = rows == at::kDouble || !compute_dtype ? rows : *compute_dtype;
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                   "compute_dtype must be float16, bfloat16 or float32; got ", type);
  return type;
}

// What drops a share p of the units; holds the seed, which stays on the device.
struct DropoutTensors {
  DropoutTensors(const Tensor& x, const OptionalTensor& seed, double p) {
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, "the share that is dropped must be in [0, 1]; got ", p);
    threshold = static_cast<uint32_t>(p * 65536 + 0.5);
    if (threshold == 0) return;
    TORCH_CHECK_VALUE(seed && seed->numel() == 1 && seed->scalar_type() == at::kLong && seed->device() == x.device(),
                      "dropout needs a seed: an int64 tensor of one element on ", x.device());
    this->seed = *seed;
  }
  explicit operator bool() const { return seed.defined(); }
  Dropped typed() const { return {seed.defined() ? seed.const_data_ptr<int64_t>() : nullptr, threshold}; }

  Tensor seed;
  uint32_t threshold;  // of 65536
};

struct Embedding {
  Embedding(const Tensor& x, const EmbedArguments& of)
      : dropout(x, of.seed, of.dropout_p), activation(activation_of(of.activation.value_or("none"))) {
    const Tensor& w = *of.weight;
    TORCH_CHECK_VALUE(w.dim() == 2 && w.size(0) > 0 && w.size(0) <= (1 << 30) && w.size(1) == x.size(1) &&
                          w.device() == x.device(),
                      "e_weight must be [any, ", x.size(1), "] on ", x.device(), "; got ", w.sizes(), " on ",
                      w.device());
    weight = w.to(product_type(x.scalar_type(), of.dtype)).contiguous();
    weight_type = w.scalar_type();
    if (!of.bias) return;
    TORCH_CHECK_VALUE(of.bias->sizes() == at::IntArrayRef({w.size(0)}) && of.bias->device() == x.device(),
                      "e_bias must be [", w.size(0), "] on ", x.device(), "; got ", of.bias->sizes(), " on ",
                      of.bias->device());
    bias = of.bias->to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
    bias_type = of.bias->scalar_type();
  }

  DropoutTensors dropout;
  Activation activation;
  Tensor weight;  // [E, L] in the type of products
  Tensor bias;    // [E] in that of sums, or undefined
  ScalarType weight_type, bias_type = at::kFloat;  // as they were given
};

}  // namespace milkernels
