// Ops that choose, on the host: what other ops need of them.
#pragma once

#include <tuple>

#include "call.h"

namespace milkernels {

// From the gradients of the largest logits [bags, classes] of `rows` [bags * classes, width] by `weight`: those of the
// rows, the weight and the bias. An index of -1 is none.
std::tuple<Tensor, Tensor, Tensor> winner_gradients(const Tensor& grad_values, const Tensor& indices,
                                                    const Tensor& rows, const Tensor& weight);

// The rows of x at these indices [bags, C], 0 for -1: [bags, C, L] in the type of x.
Tensor gather_rows(const Call& call, const Tensor& indices);

// ValueError unless these are gradients that more may be added to: of x, or empty where it needs none.
void check_written(const Call& call, const Tensor& grad_x, const Tensor& grad_e_weight, const Tensor& grad_e_bias);

// out[indices[b, c]] += vectors[b, c], of vectors [bags, C, L], or [bags C, L], in the accumulation type and out like
// x.
void add_to_rows(const Call& call, const Tensor& indices, const Tensor& vectors, const Tensor& out);

}  // namespace milkernels
