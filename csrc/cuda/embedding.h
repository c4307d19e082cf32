// The layer in front of an op, h = drop(act(W x + b)), as a call holds it; and what it shares with other layers.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "../call.h"
#include "activation.h"

namespace milkernels {

// The type in which products with rows of that type run.
inline ScalarType product_type(ScalarType rows, std::optional<ScalarType> compute_dtype) {
  const ScalarType type = rows == at::kDouble || !compute_dtype ? rows : *compute_dtype;
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                   "compute_dtype must be float16, bfloat16 or float32; got ", type);
  return type;
}

// What drops a share p of the units; holds the seed, which stays on the device.
struct DropoutTensors {
  DropoutTensors(const CallTensors& call, const OptionalTensor& seed, double p) {
    if (!call.drops(seed, p)) return;
    threshold = static_cast<uint32_t>(p * 65536 + 0.5);
    if (threshold > 0) this->seed = *seed;
  }
  explicit operator bool() const { return seed.defined(); }
  Dropped typed() const { return {seed.defined() ? seed.const_data_ptr<int64_t>() : nullptr, threshold}; }

  Tensor seed;
  uint32_t threshold = 0;  // of 65536
};

struct Embedding : EmbeddingTensors {
  Embedding(const CallTensors& call, const EmbedArguments& of)
      : EmbeddingTensors(call, of, product_type(call.x.scalar_type(), of.dtype)), dropout(call, of.seed, of.dropout_p) {
  }

  DropoutTensors dropout;
};

}  // namespace milkernels
