// Rows of a tile against the vectors of several heads: dot products, weighted sums, and rows made of vectors. A row is
// read once for a block of heads, and what is shared by four rows is read once for them. T: in what rows are stored.
#pragma once

#include "rows.h"

namespace milkernels {

// out[r * heads + k] = <x[index[r]] - centre, v[k]>; centre null: <x[index[r]], v[k]>. v is [heads, width]. Subtracting
// first keeps digits that the difference of two dot products loses when features have a mean.
template <typename T>
void dots(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* centre, const acc_t<T>* v,
          int64_t heads, int64_t width, acc_t<T>* out);

// out[k] = scale[k] * out[k] + sum_r weight[r * heads + k] * x[index[r]]; out is [heads, width]. Where scale is 0 `out`
// is not read. The sum of a call is formed on its own before it is added: long running sums lose digits.
// `prefetch`: the rows are not in cache yet.
template <typename T>
void weighted_sums(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* weight, int64_t heads,
                   const acc_t<T>* scale, int64_t width, acc_t<T>* out, bool prefetch);

// y[r] = sum_j coefficient[r * terms + j] * vector[j], for n rows ld_y apart.
template <typename T>
void combine(const acc_t<T>* coefficient, const acc_t<T>* const* vector, int64_t terms, int64_t n, int64_t width, T* y,
             int64_t ld_y);

}  // namespace milkernels
