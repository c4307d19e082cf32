// Scores alone: the softmax weights of each bag, and their gradients.
#pragma once

#include "ragged.h"

namespace milkernels {

// The largest score of each bag and head (0 where none counts) and the sum of exp(score - top): a weight is
// exp(score - top) / total, exact where exp(score - lse) is not: the rounding of an lse of 500 is 3e-5.
template <typename A>
struct SoftmaxTerms {
  Bags bags;
  int heads;
  const A* scores;          // [rows, heads]; -inf does not count
  SoftmaxState<A>* partials;  // [slots, heads]
  A *top, *total;           // [bags, heads]
};
template <typename A>
void softmax_terms(const SoftmaxTerms<A>& p, cudaStream_t stream);

// out = exp(scores - top[b]) / total[b], 0 where a score is -inf or its row is masked; total null: 1.
template <typename A>
struct SoftmaxWeights {
  Bags bags;
  int heads;
  const A *scores, *top, *total;
  A* out;  // [rows, heads]
};
template <typename A>
void softmax_weights(const SoftmaxWeights<A>& p, cudaStream_t stream);

// out = weights (grad - shift[b]), 0 where a weight is; shift null: 0.
template <typename A>
struct WeightGradients {
  Bags bags;
  int heads;
  const A *weights, *grad, *shift;
  A* out;  // [rows, heads]
};
template <typename A>
void weight_gradients(const WeightGradients<A>& p, cudaStream_t stream);

}  // namespace milkernels
