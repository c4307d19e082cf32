// Rows as matrix products take them, and their gradients on the way back; and what a layer makes of its products.
#pragma once

#include "activation.h"
#include "ragged.h"

namespace milkernels {

// Which of all rows those of a kernel are: [first, first + count), or those at `places`.
struct RowNumbers {
  int64_t first, count;
  const int64_t* places;  // [count] or null
  int64_t rows;           // in all
  const bool* mask;       // of all rows, or null

  __device__ int64_t at(int64_t r) const { return places == nullptr ? first + r : places[r]; }
  // A place outside of the rows is as masked.
  __device__ bool real(int64_t row) const { return row >= 0 && row < rows && (mask == nullptr || mask[row]); }
};

// out: the rows x, 0 where masked, dropped out, in the type E; times the gradient of the activation where its value (of
// gelu: its argument) is z.
template <typename T, typename E>
struct CopyRows {
  using A = acc_t<T>;
  RowNumbers numbers;
  const T* x;  // the first of these rows, as of out and z
  int64_t stride;
  int width;
  E* out;  // [count, width]
  Dropped dropped = {};
  DropoutBranch branch = DropoutBranch::kValue;
  const A* z = nullptr;  // [count, width] or null
  Activation activation = Activation::kIdentity;
};
template <typename T, typename E>
void copy_rows(const CopyRows<T, E>& p, cudaStream_t stream);

// out: drop(act(z + bias)) of the products z, 0 where masked.
template <typename E>
struct EmbedRows {
  using A = acc_t<E>;
  RowNumbers numbers;
  A* z;  // [count, width]
  int width;
  const A* bias;  // [width] or null
  Activation activation;
  Dropped dropped;
  E* out;         // [count, width]
  bool gradient;  // follows: the activation (of gelu: its argument) is written over z
};
template <typename E>
void embed_rows(const EmbedRows<E>& p, cudaStream_t stream);

}  // namespace milkernels
