// What the launchers of the kernels take: pointers, sizes, and nothing of PyTorch.
#pragma once

#include "ragged.h"

namespace milkernels {

// What a row is pooled by.
enum class Scoring {
  kGiven,    // scores that are an input
  kQuery,    // <x_i, vector[b, k]> + shift[b, k]
  kLogSumExp,  // one head: log sum_j exp(<x_i, vector[j]> + shift[j])
  kWeights,  // no softmax: given weights, or 1
};

// Vectors [count, width] that rows are multiplied with.
template <typename A>
struct Vectors {
  const A* at = nullptr;
  int count = 0;
  int64_t of_bag = 0;        // numbers from one bag's to the next one's; 0: all bags share them
  const A* shift = nullptr;  // [count] or null
  int64_t shift_of_bag = 0;
};

// Partial results of segments, by slot.
template <typename A>
struct Partials {
  A *top, *total, *sum;  // [slots, heads], [slots, heads], [slots, heads, width]
};

template <typename T>
struct PoolForward {
  using A = acc_t<T>;
  Rows<T> rows;
  Bags bags;
  Scoring scoring;
  int heads;
  const A* given;      // [rows, heads], or null: weights of 1
  Vectors<A> vectors;  // of kQuery, kLogSumExp
  A *products, *scores;  // [rows, vectors] of kLogSumExp or null, [rows, heads] or null
  Partials<A> partials;
  bool mean;         // sums of weights divide kWeights
  A *bag, *lse;      // [bags, heads, width], [bags, heads] or null
};

// Scores, weights and sums of rows in one read of them. False, and nothing is done, where they do not fit.
template <typename T>
bool pool_forward(const PoolForward<T>& p, cudaStream_t stream);

enum class Merge { kSoftmax, kSum, kMean };

// The partial results of each bag, in the order of their slots: out [bags, heads, width], and total [bags, heads] or
// null: the lse of a softmax, else the sum of the partial totals.
template <typename A>
void combine(const Bags& bags, int heads, int width, Merge merge, const Partials<A>& partials, A* out, A* total,
             cudaStream_t stream);

template <typename T>
struct PoolBackward {
  using A = acc_t<T>;
  Rows<T> rows;
  Bags bags;
  Scoring scoring;  // but kWeights
  int heads;
  Vectors<A> vectors;  // of kQuery, kLogSumExp
  const A *bag, *scores, *lse, *logits;  // of the forward; logits of kLogSumExp
  // [slots, heads]: what sums over a bag's slots to sum_i exp(score - lse); not read where bags are whole
  const A* normal;
  const A *grad_bag, *grad_scores, *grad_lse, *grad_logits;  // all but the first may be null
  T* grad_x;                           // [rows, width] or null
  A* grad_given;                       // [rows, heads] of kGiven or null
  Partials<A> partials;                // of `vectors` heads
  A *grad_vectors, *grad_shift;        // [bags, vectors, width] or null; [bags, vectors] of kLogSumExp
};

// Whether a block has the shared memory for it.
template <typename T>
bool fits(const PoolBackward<T>& p);

// The gradients of a pooling and of its scores in one read of the rows, where it fits.
template <typename T>
void pool_backward(const PoolBackward<T>& p, cudaStream_t stream);

}  // namespace milkernels
