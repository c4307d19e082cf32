// Attention's gate: what lies between the products of a row with V and U and its scores,
//   score[i, k] = w_k . drop(act(V x_i + b_V)) + c_k
//   score[i, k] = w_k . (drop(act(V x_i + b_V)) * drop(sigmoid(U x_i + b_U))) + c_k
#pragma once

#include "activation.h"
#include "ragged.h"

namespace milkernels {

template <typename A>
struct Gate {
  bool gated = false;
  Activation activation = Activation::kTanh;
  Dropped dropped;
  int hidden = 0, heads = 0;
  const A *v_bias = nullptr, *u_bias = nullptr;  // [hidden] or null
  const A *w = nullptr, *w_bias = nullptr;       // [heads, hidden], [heads] or null
};

// Products of rows [first, first + count) with V, and with U behind: [count, hidden] or [count, 2 hidden]; and where
// their gradients go, which may be the same place.
template <typename E>
struct GateRows {
  using A = acc_t<E>;
  Gate<A> gate;
  const E* z;
  E* gradient;
  int64_t first, count;
  const bool* mask;
};

// The scores of these rows, -inf where masked: [all rows, heads].
template <typename E>
void gate_scores(const GateRows<E>& p, acc_t<E>* scores, cudaStream_t stream);

constexpr int kSummedRows = 64;  // by one block of the backward

// The gradients of the products, times `scale` (one number, or null); and what blocks of kSummedRows add to the
// gradients of w and of the biases of V and U, into sums [blocks, heads + 2, hidden]. `ds` are the gradients of the
// scores [all rows, heads].
template <typename E>
void gate_backward(const GateRows<E>& p, const acc_t<E>* ds, const acc_t<E>* scale, acc_t<E>* sums,
                   cudaStream_t stream);

}  // namespace milkernels
