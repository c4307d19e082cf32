// Ops that choose, on the host: what other ops need of them.
#pragma once

#include <tuple>
#include <utility>

#include "instances.h"

namespace milkernels {

// values [bags, C] and rows [bags, C] of the first largest of the columns of values [rows, C], in their type; where
// there is nothing to choose, `empty` and -1. `dead`: -inf is never chosen.
std::pair<Tensor, Tensor> first_max(const Call& call, const Tensor& values, bool dead, double empty);

// values and rows [bags, classes] of the largest logits, and the logits  W x + b  [rows, classes]. Weight and bias are
// in the accumulation type, bias may be undefined.
std::tuple<Tensor, Tensor, Tensor> instance_max(Call& call, const Tensor& weight, const Tensor& bias);

// The gradients of W and b in the accumulation type; empty where nobody needs them. That of the rows is written, or
// with `onto` added to what is there: of a few rows, unless the logits have a gradient.
std::tuple<Tensor, Tensor> instance_max_gradients(Call& call, const Tensor& weight, const Tensor& indices,
                                                  const Tensor& logits, const OptionalTensor& grad_values,
                                                  const OptionalTensor& grad_logits, std::array<bool, 2> needs,
                                                  RowGradients& rows, bool onto);

// The rows of x at these indices [bags, C], 0 for -1: [bags, C, L] in the type of x.
Tensor gather_rows(const Call& call, const Tensor& indices);

// out[indices[b, c]] += vectors[b, c], of vectors [bags, C, L] in the accumulation type and out like x.
void add_to_rows(const Call& call, const Tensor& indices, const Tensor& vectors, const Tensor& out);

}  // namespace milkernels
