// What the launchers of the kernels take: pointers, sizes, and nothing of PyTorch.
#pragma once

#include "ragged.h"

namespace milkernels {

// What a row is pooled by.
enum class Scoring {
  kGiven,    // scores that are an input
  kQuery,    // <x_i, vector[b, k]> + shift[b, k]
  kClasses,  // one head: log sum_j exp(<x_i, vector[j]> + shift[j])
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
  Vectors<A> vectors;  // of kQuery, kClasses
  A *products, *scores;  // [rows, vectors] of kClasses or null, [rows, heads] or null
  Partials<A> partials;
  bool mean;         // sums of weights divide kWeights
  A *bag, *lse;      // [bags, heads, width], [bags, heads] or null
};

// Scores, weights and sums of rows in one read of them. False, and nothing is done, where they do not fit.
template <typename T>
bool pool_forward(const PoolForward<T>& p, cudaStream_t stream);

enum class Merge { kSoftmax, kSum, kMean };

// The partial results of each bag, in the order of their slots: out [bags, heads, width]; lse [bags, heads] or null.
template <typename A>
void combine(const Bags& bags, int heads, int width, Merge merge, const Partials<A>& partials, A* out, A* lse,
             cudaStream_t stream);

}  // namespace milkernels
