// A pipeline of tiles: rows of a segment on their way from memory to the multiprocessor, while earlier ones are used.
#pragma once

#include "ragged.h"

namespace milkernels {

constexpr int kStages = 3;     // of the pipeline: two tiles on their way while one is used
constexpr int kTileRows = 32;  // at most: a lane for each
constexpr int kThreads = 128;  // of a block
constexpr int kBlocks = 3;     // of a multiprocessor at least, as far as registers go
constexpr int kTileBytes = 16 << 10;

// Rows [row, row + count) in shared memory, `pitch` apart; masked rows, rows past the last and columns past the width
// are 0.
template <typename T>
struct Tile {
  const T* x;
  int64_t row;
  int count;
  unsigned real;  // bit r: row r counts
};

// Numbers from one row to the next in shared memory: whole vectors.
template <typename T>
__host__ __device__ inline int tile_pitch(int width) {
  return round_up(width, Vec<T>::kSize);
}
template <typename T>
inline int tile_rows(int width) {
  const int row = tile_pitch<T>(width) * static_cast<int>(sizeof(T));
  return smaller(larger(kTileBytes / row / 4 * 4, 4), kTileRows);
}
template <typename T>
__host__ __device__ inline int64_t pipeline_bytes(int tile, int pitch) {
  return int64_t{kStages} * tile * pitch * static_cast<int64_t>(sizeof(T));
}

template <typename T>
class Pipeline {
 public:
  // `stages` has pipeline_bytes; columns [0, width) of the rows of a segment, `tile` rows at a time.
  __device__ Pipeline(T* stages, const Rows<T>& rows, const Bags& bags, Range range, int width, int tile)
      : stages_(stages), rows_(rows), bags_(bags), range_(range), width_(width), tile_(tile),
        pitch_(tile_pitch<T>(width)) {
    // What no copy reaches.
    const int rest = pitch_ - width_;
    for (int i = static_cast<int>(threadIdx.x); i < kStages * tile_ * rest; i += static_cast<int>(blockDim.x)) {
      stages_[i / rest * pitch_ + width_ + i % rest] = narrow<T>(0);
    }
    for (int t = 0; t < kStages - 1; ++t) load(t);
  }

  __device__ int count() const { return static_cast<int>(ceil_div(range_.size(), static_cast<int64_t>(tile_))); }

  // The tile t, in order; all threads of the block ask for it, and are done with the one before.
  __device__ Tile<T> next(int t) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    load(t + kStages - 1);
    const int64_t row = range_.begin + int64_t{t} * tile_;
    const int count = static_cast<int>(smaller(static_cast<int64_t>(tile_), range_.end - row));
    const int lane = lane_index();
    const unsigned real = __ballot_sync(kAllLanes, lane < count && bags_.real(row + smaller(lane, count - 1)));
    return {stages_ + t % kStages * tile_ * pitch_, row, count, real};
  }

 private:
  template <int BYTES>
  __device__ void copy(T* to, const T* from, bool used) const {
    constexpr int kNumbers = BYTES / sizeof(T);
    for (int c = lane_index() * kNumbers; c < width_; c += kWarp * kNumbers) copy_async<BYTES>(to + c, from + c, used);
  }
  // A row for each warp in turn. Every thread commits once, so that it knows what it waits for.
  __device__ void load(int t) {
    if (t < count()) {
      T* const stage = stages_ + t % kStages * tile_ * pitch_;
      for (int r = warp_index(); r < tile_; r += warp_count()) {
        const int64_t row = range_.begin + int64_t{t} * tile_ + r;
        const bool used = row < range_.end && bags_.real(row);
        const T* const from = rows_.x + (used ? row : range_.begin) * rows_.stride;
        T* const to = stage + r * pitch_;
        if (rows_.copy == 16) copy<16>(to, from, used);
        else if (rows_.copy == 8) copy<8>(to, from, used);
        else if (sizeof(T) <= 4 && rows_.copy == 4) copy<4>(to, from, used);
        else {
          for (int c = lane_index(); c < width_; c += kWarp) to[c] = used ? from[c] : narrow<T>(0);
        }
      }
    }
    commit_copies();
  }

  T* const stages_;
  const Rows<T> rows_;
  const Bags& bags_;
  const Range range_;
  const int width_, tile_, pitch_;
};

// COUNT numbers from column c on, 0 past the width: of rows or vectors in memory, which may lie anywhere.
template <int COUNT, typename A, typename T>
__device__ inline void load_columns(A (&to)[COUNT], const T* from, int c, int width) {
  constexpr int kStep = Vec<T>::kSize;
  static_assert(COUNT % kStep == 0);
  if (c + COUNT <= width && reinterpret_cast<uintptr_t>(from + c) % kVectorBytes == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += kStep) {
      const Vec<T> v = *reinterpret_cast<const Vec<T>*>(from + c + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) to[i + j] = widen(v.at[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = c + i < width ? widen(from[c + i]) : A(0);
  }
}

// Stores columns in this way.
template <int COUNT, typename T, typename A>
__device__ inline void store_columns(T* to, const A (&from)[COUNT], int c, int width) {
  constexpr int kStep = Vec<T>::kSize;
  if (COUNT % kStep == 0 && c + COUNT <= width && reinterpret_cast<uintptr_t>(to + c) % kVectorBytes == 0) {
#pragma unroll
    for (int i = 0; i + kStep <= COUNT; i += kStep) {
      Vec<T> v;
#pragma unroll
      for (int j = 0; j < kStep; ++j) v.at[j] = narrow<T>(from[i + j]);
      *reinterpret_cast<Vec<T>*>(to + c + i) = v;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (c + i < width) to[c + i] = narrow<T>(from[i]);
    }
  }
}

// A vector of a tile, widened.
template <typename T>
__device__ inline void load_tile(acc_t<T> (&to)[Vec<T>::kSize], const T* from) {
  const Vec<T> v = *reinterpret_cast<const Vec<T>*>(from);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) to[i] = widen(v.at[i]);
}

// A product and the shift of its vector; one of -inf hides the vector from rows that hold anything.
template <typename A>
__device__ inline A shifted(A product, A shift) {
  return shift == -std::numeric_limits<A>::infinity() ? shift : product + shift;
}

constexpr int kRowsAtOnce = 4;  // of a warp's dot products

// <row - centre, vector> of kRowsAtOnce rows with J vectors [count, width] from j0 on (past the last: that one again):
// of row r and vector j in lane r J + j. `load(r, c, x)` gives a vector of a row's columns; `centre` may be null.
template <int J, typename T, typename Load>
__device__ inline acc_t<T> warp_products(const Load& load, int width, const acc_t<T>* vectors, int j0, int count,
                                         const acc_t<T>* centre) {
  using A = acc_t<T>;
  constexpr int V = Vec<T>::kSize;
  A sum[kRowsAtOnce * J] = {};
  for (int c = lane_index() * V; c < width; c += kWarp * V) {
    A x[kRowsAtOnce][V];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) load(r, c, x[r]);
    if (centre != nullptr) {
      A base[V];
      load_columns(base, centre, c, width);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int i = 0; i < V; ++i) x[r][i] -= base[i];
      }
    }
#pragma unroll
    for (int j = 0; j < J; ++j) {
      A v[V];
      load_columns(v, vectors + int64_t{smaller(j0 + j, count - 1)} * width, c, width);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum[r * J + j] += x[r][i] * v[i];
      }
    }
  }
  return warp_sums(sum);
}

// f<J>() for the number of vectors that are worth taking at once.
template <typename F>
__device__ inline void for_vectors(int count, const F& f) {
  if (count == 1) f.template operator()<1>();
  else if (count == 2) f.template operator()<2>();
  else f.template operator()<4>();
}

// Takes products of all rows of a tile in shared memory (a multiple of kRowsAtOnce), into out [rows, count] there.
template <typename T>
__device__ inline void tile_products(const T* tile, int rows, int width, const acc_t<T>* vectors, int count,
                                     const acc_t<T>* centre, acc_t<T>* out) {
  constexpr int V = Vec<T>::kSize;
  const int pitch = tile_pitch<T>(width), lane = lane_index();
  for_vectors(count, [&]<int J>() {
    for (int first = warp_index() * kRowsAtOnce; first < rows; first += warp_count() * kRowsAtOnce) {
      const auto load = [&](int r, int c, acc_t<T>(&x)[V]) { load_tile<T>(x, tile + (first + r) * pitch + c); };
      for (int j0 = 0; j0 < count; j0 += J) {
        const acc_t<T> product = warp_products<J, T>(load, width, vectors, j0, count, centre);
        if (lane < kRowsAtOnce * J && j0 + lane % J < count) out[(first + lane / J) * count + j0 + lane % J] = product;
      }
    }
  });
}

}  // namespace milkernels
