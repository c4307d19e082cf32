// Rows as matrix products take them, and their gradients on the way back.
#pragma once

#include "activation.h"
#include "ragged.h"

namespace milkernels {

// out: rows [first, first + count) of x, 0 where masked, dropped out (branch 2), in the type E; times the gradient of the
// activation where its value (of gelu: its argument) is z.
template <typename T, typename E>
struct StageRows {
  using A = acc_t<T>;
  const T* x;  // row `first`, as of out and z
  int64_t stride, first, count;
  int width;
  const bool* mask;  // of all rows, or null
  E* out;            // [count, width]
  Dropped dropped = {};
  const A* z = nullptr;  // [count, width] or null
  Activation activation = Activation::kIdentity;
};
template <typename T, typename E>
void stage_rows(const StageRows<T, E>& p, cudaStream_t stream);

}  // namespace milkernels
