// Linear algebra on a few rows, such as the critical instances of DSMIL. A library's bits change with the number of
// threads, the alignment of its operands and the processor; those of these products depend on shapes and on the
// instruction sets of the processor alone. Matrices are contiguous and all of one type, that of accumulation.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "vec_math.h"

namespace milkernels {

at::Tensor product_nt(const at::Tensor& a, const at::Tensor& b);  // a b^T: [n, k], [m, k] -> [n, m]
at::Tensor product_nn(const at::Tensor& a, const at::Tensor& b);  // a b:   [n, k], [k, m] -> [n, m]
at::Tensor product_tn(const at::Tensor& a, const at::Tensor& b);  // a^T b: [k, n], [k, m] -> [n, m]
at::Tensor column_sums(const at::Tensor& a);                      // [n, m] -> [m]

// The largest logits of bags and classes are those of `rows` [bags * classes, width] by `weight` [classes, width];
// indices [bags, classes] are -1 for none. From their gradients: those of the rows, of the weight and of the bias.
std::tuple<at::Tensor, at::Tensor, at::Tensor> winner_gradients(const at::Tensor& grad_values,
                                                                const at::Tensor& indices, const at::Tensor& rows,
                                                                const at::Tensor& weight);

at::Tensor activated(const at::Tensor& z, Activation activation);
// `grad` times the derivative of the activation at z; NaN has the slope of what is positive, as in PyTorch.
at::Tensor through_activation(const at::Tensor& grad, const at::Tensor& z, Activation activation);

}  // namespace milkernels
