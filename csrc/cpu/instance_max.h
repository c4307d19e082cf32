// instance_max on the CPU, the first stream of DSMIL (Li, Li, Eliceiri 2021).
#pragma once

#include <tuple>

#include "instances.h"

namespace milkernels {

// values and indices [bags, classes], logits [rows, classes].
std::tuple<Tensor, Tensor, Tensor> instance_max_forward(const ClassCall& call);

// Gradients of weight and bias (empty where nobody needs them), in the accumulation type. Those of the rows are written
// or, where `add` says that something is there already, added: a few rows, unless logits have a gradient.
std::tuple<Tensor, Tensor> instance_max_gradients(const ClassCall& call, const Tensor& indices, const Tensor& logits,
                                                  const OptionalTensor& grad_values, const OptionalTensor& grad_logits,
                                                  bool need_weight, bool need_bias, bool add, RowGradients& of_rows);

}  // namespace milkernels
