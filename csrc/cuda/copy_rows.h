// Rows as matrix products take them.
#pragma once

#include "ragged.h"

namespace milkernels {

// out: rows [first, first + count), which rows.x holds, 0 where masked, in the type E.
template <typename T, typename E>
struct CopyRows {
  Rows<T> rows;
  const bool* mask;  // of all rows, or null
  int64_t first, count;
  E* out;  // [count, width]
};
template <typename T, typename E>
void copy_rows(const CopyRows<T, E>& p, cudaStream_t stream);

}  // namespace milkernels
