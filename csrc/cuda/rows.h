// Row by row: products of rows with the vectors of their bag, and rows made of such vectors.
#pragma once

#include "pool.h"

namespace milkernels {

// out[i, k] = <x_i - centre[b], vector[b, k]> + shift[b, k], -inf where the shift is, `fill` where masked. Any width.
template <typename T>
struct RowProducts {
  using A = acc_t<T>;
  Rows<T> rows;
  Bags bags;
  Vectors<A> vectors;
  const A* centre;  // [bags, width] or null
  A fill;
  A* out;  // [all rows, vectors]
};
template <typename T>
void row_products(const RowProducts<T>& p, cudaStream_t stream);

// A term of rows: sum_k weight[i, k] vector[b, k]; a weight of 0 hides whatever the vector holds.
template <typename A>
struct Term {
  const A* weights = nullptr;  // [all rows, count], or null
  const A* vectors = nullptr;  // [bags, count, width], or [count, width]
  int count = 0;
  int64_t of_bag = 0;  // numbers from one bag's vectors to the next one's
};

// out_i = product_i scale + both terms; 0 where masked.
template <typename T>
struct ExpandRows {
  using A = acc_t<T>;
  Bags bags;
  int64_t first, count;    // rows [first, first + count)
  int width;
  const A* product = nullptr;  // [count, width] or null
  const A* scale = nullptr;    // one number or null
  Term<A> pooled, scored;
  T* out;  // [count, width], row `first` first
};
template <typename T>
void expand_rows(const ExpandRows<T>& p, cudaStream_t stream);

// ds = a (da - shift[b] + dlse[b]) + grad of the score itself, 0 where the score is -inf; and the weights
// a = exp(score - lse) / normal.
template <typename A>
struct ScoreGradients {
  Bags bags;
  int heads;
  const A *scores, *lse, *normal;  // [rows, heads], [bags, heads], [bags, heads]; normal null: no gradient of a pooling
  const A *da, *shift, *grad_lse, *grad_scores;  // [rows, heads], [bags, heads] x 2, [rows, heads]; each may be null
  A *out, *weights;  // [rows, heads]; weights may be null
};
template <typename A>
void score_gradients(const ScoreGradients<A>& p, cudaStream_t stream);

// The centre of each bag (centre.h), and shift[b, k] = <bag[b, k] - centre[b], grad[b, k]>.
template <typename A>
struct PoolCentres {
  int bags, heads, width;
  const A *bag, *lse, *grad_bag;  // [bags, heads, width], [bags, heads], [bags, heads, width]
  A *centre, *shift;  // [bags, width], [bags, heads]
};
template <typename A>
void pool_centres(const PoolCentres<A>& p, cudaStream_t stream);

// sum_i exp(score - lse) over each bag, 1 but for the rounding of lse: out [bags, heads]; null: only its parts, which
// partials [slots, heads] gets.
template <typename A>
void softmax_normal(const Bags& bags, int heads, const A* scores, const A* lse, A* partials, A* out,
                    cudaStream_t stream);

// sum_i values[i, k] over each bag, without masked rows: [bags, columns]; `partials` [slots, columns].
template <typename A>
void column_sums(const Bags& bags, int columns, const A* values, A* partials, A* out, cudaStream_t stream);

}  // namespace milkernels
