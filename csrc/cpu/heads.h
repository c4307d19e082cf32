// Rows of a tile against the vectors of several heads: dot products, weighted sums, and rows made of vectors. A row is
// read once for a block of heads. T: in what rows are stored.
//
// Several rows are read at once, and what they share is read once for them. Where rows come from memory (`streamed`)
// and few heads are wanted, they are read one after another: processors guess what is wanted next where one address
// follows another, and there is little to share. With more heads, and where numbers are converted, the work that
// several rows share counts for more (measured: 10 to 40 % of the time), if there are registers for it. The numbers are
// the same.
#pragma once

#include "rows.h"

namespace milkernels {

// Vectors [count, width] that rows of type T are multiplied with, in the order in which elements of such rows are read
// quickest: as they are given, or a copy.
template <typename T>
class RowVectors {
 public:
  using A = acc_t<T>;
  RowVectors(const A* v, int64_t count, int64_t width);
  const A* from(int64_t i) const { return (copy_.empty() ? given_ : copy_.data()) + i * ld_; }
  int64_t ld() const { return ld_; }

 private:
  const A* given_;
  int64_t ld_;
  std::vector<A> copy_;
};

// out[r * heads + k] = <x[index[r]] - centre, v[k]>; centre null: <x[index[r]], v[k]>. centre is one of RowVectors, v
// [heads] of them from the first, ld_v apart. Subtracting first keeps digits that the difference of two dot products
// loses when features have a mean.
template <typename T>
void dots(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* centre, const acc_t<T>* v,
          int64_t ld_v, int64_t heads, int64_t width, acc_t<T>* out, bool streamed);

// out[k] = scale[k] * out[k] + sum_r weight[r * heads + k] * x[index[r]]; out is [heads, width]. Where scale is 0 `out`
// is not read. The sum of a call is formed on its own before it is added: long running sums lose digits.
template <typename T>
void weighted_sums(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* weight, int64_t heads,
                   const acc_t<T>* scale, int64_t width, acc_t<T>* out, bool streamed);

// y[r] = sum_j coefficient[r * terms + j] * vector[j], for n rows ld_y apart.
template <typename T>
void combine(const acc_t<T>* coefficient, const acc_t<T>* const* vector, int64_t terms, int64_t n, int64_t width, T* y,
             int64_t ld_y);

}  // namespace milkernels
