// Ops that choose, on the host: what other ops need of them.
#pragma once

#include <tuple>

#include "instances.h"

namespace milkernels {

// From the gradients of the largest logits [bags, classes] of `rows` [bags * classes, width] by `weight`: those of the
// rows, the weight and the bias. An index of -1 is none.
std::tuple<Tensor, Tensor, Tensor> winner_gradients(const Tensor& grad_values, const Tensor& indices,
                                                    const Tensor& rows, const Tensor& weight);

// The rows of x at these indices [bags, C], 0 for -1: [bags, C, L] in the type of x.
Tensor gather_rows(const Call& call, const Tensor& indices);

// out[indices[b, c]] += vectors[b, c], of vectors [bags, C, L] in the accumulation type and out like x.
void add_to_rows(const Call& call, const Tensor& indices, const Tensor& vectors, const Tensor& out);

}  // namespace milkernels
