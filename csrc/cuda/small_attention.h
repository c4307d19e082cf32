// Attention pooling of so little that launches would cost more than work: a kernel for all of it.
#pragma once

#include <string>

#include "gate.h"
#include "pool.h"

namespace milkernels {

// For tests: one way for all calls, "small" or "sliced"; "": whichever suits the shapes.
void force_attention(const std::string& way);

template <typename T>
struct SmallAttention {
  using A = acc_t<T>;
  Rows<T> rows;
  Bags bags;
  Gate<A> gate;
  const T *v_weight, *u_weight;  // [hidden, width], u_weight null where there is no gate
};

template <typename T>
struct SmallForward {
  using A = acc_t<T>;
  SmallAttention<T> of;
  A* scores;  // [rows, heads]
  Partials<A> partials;
  A *bag, *lse;  // [bags, heads, width], [bags, heads]; null: scores are all that is wanted
};

// Whether a block has the shared memory for it.
template <typename T>
bool fits(const SmallForward<T>& p);
template <typename T>
void small_forward(const SmallForward<T>& p, cudaStream_t stream);

constexpr int kSmallRows = 32;  // of a block of the backward

template <typename T>
struct SmallBackward {  // not for float16, whose gradients need a scale
  using A = acc_t<T>;
  SmallAttention<T> of;
  const A* ds;  // [rows, heads]: the gradients of the scores
  T* dz;        // [rows, hidden], or [rows, 2 hidden] with a gate: those of the products
  A* sums;      // [blocks, heads + 2, hidden]: what blocks add to the gradients of w and of the biases of V and U
  T* grad_x;    // [rows, width] or null
  bool added;   // to what is in grad_x
};
template <typename T>
bool fits(const SmallBackward<T>& p);
template <typename T>
void small_backward(const SmallBackward<T>& p, cudaStream_t stream);

}  // namespace milkernels
