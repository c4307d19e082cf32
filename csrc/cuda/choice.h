// Ops that choose, on the host: what other ops need of them.
#pragma once

#include "instances.h"

namespace milkernels {

// The rows of x at these indices [bags, C], 0 for -1: [bags, C, L] in the type of x.
Tensor gather_rows(const Call& call, const Tensor& indices);

// out[indices[b, c]] += vectors[b, c], of vectors [bags, C, L] in the accumulation type and out like x.
void add_to_rows(const Call& call, const Tensor& indices, const Tensor& vectors, const Tensor& out);

}  // namespace milkernels
