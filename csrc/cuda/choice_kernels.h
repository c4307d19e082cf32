// Ops that choose: the first largest of a column, in a bag, and what is read from or goes to the rows chosen. The
// lowest row wins a tie and NaN beats every number.
#pragma once

#include "ragged.h"

namespace milkernels {

// What was chosen in each segment: [slots, columns], row -1 where there was nothing to choose.
template <typename A>
struct Chosen {
  A* values;
  int64_t* rows;
};

// The first largest of each column of each bag.
template <typename T>
struct FirstMax {
  using A = acc_t<T>;
  Rows<T> rows;  // [rows, columns]
  Bags bags;
  bool dead;  // -inf is never chosen
  A empty;    // where there is nothing to choose
  Chosen<A> partials;
  T* values;  // [bags, columns]
  int64_t* indices;
};
template <typename T>
void first_max(const FirstMax<T>& p, cudaStream_t stream);

// Finds the largest of the logits  W x + b  [rows, classes], which are -inf where masked and never chosen there, in one
// read of the rows.
template <typename T>
struct ClassMax {
  using A = acc_t<T>;
  Rows<T> rows;
  Bags bags;
  const A *weight, *bias;  // [classes, width], [classes] or null
  int classes;
  A* logits;
  Chosen<A> partials;
  A* values;  // [bags, classes]
  int64_t* indices;
};
// False, and nothing is done, where rows do not fit.
template <typename T>
bool class_max(const ClassMax<T>& p, cudaStream_t stream);

// Rows chosen, `count` in all; what is none of [0, rows) is passed over.
struct Places {
  const int64_t* indices;
  int64_t count, rows;
};

// out[place, c] = or += values[i], of places [., columns]. No two go to one place.
template <typename T>
void put(const Places& places, int64_t columns, const T* values, bool add, T* out, cudaStream_t stream);

// out[i] = the row at place i, or 0: [count, width].
template <typename T>
void gather_rows(const Places& places, const Rows<T>& from, T* out, cudaStream_t stream);

// out[place] += vectors[i], of places [bags, classes] and out [rows, width]. The classes of a bag may have chosen one
// row, bags never do.
template <typename T>
void add_rows(const Places& places, int classes, int width, const acc_t<T>* vectors, T* out, cudaStream_t stream);

}  // namespace milkernels
