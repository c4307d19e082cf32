// Reductions down the columns of consecutive rows: what ops that choose are made of.
#pragma once

#include "ragged.h"

namespace milkernels {

constexpr int kReducers = 128;  // threads of a block
constexpr int kReadAhead = 4;   // rows that a thread reads before it uses the first

// Columns that a block takes at once: all, or even parts of them.
inline int columns_at_once(int columns, int most = kReducers) { return ceil_div(columns, ceil_div(columns, most)); }
template <typename S>
constexpr int64_t reduce_bytes() {
  return kReducers * static_cast<int64_t>(sizeof(S));
}
// Blocks (owner, columns): y is gone through more than once where there are too many.
inline dim3 column_grid(int64_t owners, int columns, int at_once) {
  return dim3(static_cast<unsigned>(owners), smaller(ceil_div(columns, at_once), 65535));
}

// A state for each column of the rows in a range: load(to, row, column) says whether the row counts and gives what
// fold(state, loaded, counts, at) puts into the state, `at` rows after the first; merge(state, other) puts two together
// and store(column, state) takes the result. A thread has one column, so that rows side by side are read at once.
template <typename Loaded, typename S, typename Load, typename Fold, typename Merge, typename Store>
__device__ inline void reduce_columns(Range range, int columns, int at_once, S none, const Load& load, const Fold& fold,
                                      const Merge& merge, const Store& store) {
  MILKERNELS_SHARED(memory);
  S* const states = reinterpret_cast<S*>(memory);
  const int thread = static_cast<int>(threadIdx.x), groups = kReducers / at_once, group = thread / at_once;
  for (int first = static_cast<int>(blockIdx.y) * at_once; first < columns;
       first += static_cast<int>(gridDim.y) * at_once) {
    const int column = first + thread % at_once;
    const bool takes_part = group < groups && column < columns;
    S state = none;
    for (int64_t row = range.begin + group; takes_part && row < range.end; row += int64_t{kReadAhead} * groups) {
      Loaded loaded[kReadAhead];
      bool counts[kReadAhead];
#pragma unroll
      for (int i = 0; i < kReadAhead; ++i) {
        counts[i] = row + i * groups < range.end && load(loaded[i], row + i * groups, column);
      }
#pragma unroll
      for (int i = 0; i < kReadAhead; ++i) {
        fold(state, loaded[i], counts[i], static_cast<int>(row - range.begin) + i * groups);
      }
    }
    states[thread] = state;
    for (int left = groups; left > 1;) {
      const int half = ceil_div(left, 2);
      __syncthreads();
      if (group + half < left) merge(states[thread], states[thread + half * at_once]);
      left = half;
    }
    if (takes_part && group == 0) store(column, states[thread]);
    __syncthreads();
  }
}

}  // namespace milkernels
