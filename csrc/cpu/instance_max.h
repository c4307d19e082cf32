// instance_max on the CPU, the first stream of DSMIL (Li, Li, Eliceiri 2021).
#pragma once

#include <tuple>

#include "call.h"

namespace milkernels {

// values and indices [bags, classes], logits [rows, classes].
std::tuple<Tensor, Tensor, Tensor> instance_max_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    const OptionalTensor& offsets, const OptionalTensor& mask);

// Gradients of x, weight and bias. That of x is added to `add_to`, where it is given: a few rows, unless logits have
// one.
std::tuple<Tensor, Tensor, Tensor> instance_max_gradients(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& offsets,
    const OptionalTensor& mask, const Tensor& indices, const Tensor& logits, const OptionalTensor& grad_values,
    const OptionalTensor& grad_logits, std::array<bool, 3> needs, const OptionalTensor& add_to);

}  // namespace milkernels
