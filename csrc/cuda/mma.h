// Products of a tile of rows with a panel of weights, both in shared memory: half types on the units that multiply
// matrices, others by fused multiply-adds on tiles in registers.
#pragma once

#include "tile.h"

#ifndef MILKERNELS_EMULATED
#include <mma.h>
#endif

namespace milkernels {

constexpr int kProductRows = 32, kProductColumns = 64;  // of a block's product
constexpr int kProductDepth = 16;                       // what a depth is a multiple of

// Numbers from one row to the next in shared memory, for rows of `depth` numbers: a vector more, so that neighbours
// lie in different banks.
template <typename T>
__host__ __device__ constexpr int product_pitch(int depth) {
  return round_up(depth, kProductDepth) + Vec<T>::kSize;
}
template <typename A>
constexpr int kSumsPitch = kProductColumns + Vec<A>::kSize;

// sum[r, c] = <rows_r, columns_c>, 32 x 64 of them, over depths that come one after the other. All threads of a block
// of 128; each of the operands is [32 or 64, pitch].
template <typename T>
class Product {
 public:
  using A = acc_t<T>;

  __device__ void add(const T* rows, int row_pitch, const T* columns, int column_pitch, int depth) {
    for (int d = 0; d < depth; d += V) {
      A a[kTile][V], b[kTile][V];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        load_tile<T>(a[i], rows + (first_row() + i) * row_pitch + d);
        load_tile<T>(b[i], columns + (first_column() + i * kAcross) * column_pitch + d);
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
#pragma unroll
          for (int v = 0; v < V; ++v) sum_[i][j] += a[i][v] * b[j][v];
        }
      }
    }
  }
  // Into [32, kSumsPitch].
  __device__ void store(A* to) const {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) to[(first_row() + i) * kSumsPitch<A> + first_column() + j * kAcross] = sum_[i][j];
    }
  }

 private:
  static constexpr int V = Vec<T>::kSize, kTile = 4, kAcross = kProductColumns / kTile;
  static_assert(kThreads * kTile * kTile == kProductRows * kProductColumns);
  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / kAcross * kTile; }
  __device__ static int first_column() { return static_cast<int>(threadIdx.x) % kAcross; }

  A sum_[kTile][kTile] = {};
};

// The matrix units, a warp for 16 columns and all rows.
template <typename T>
class UnitProduct {
 public:
  __device__ UnitProduct() {
#pragma unroll
    for (int i = 0; i < kHalves; ++i) clear(sum_[i]);
  }
  __device__ void add(const T* rows, int row_pitch, const T* columns, int column_pitch, int depth) {
    const T* const mine = columns + warp_index() * kSide * column_pitch;
    for (int d = 0; d < depth; d += kSide) {
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        multiply(sum_[i], rows + i * kSide * row_pitch + d, row_pitch, mine + d, column_pitch);
      }
    }
  }
  __device__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      store(sum_[i], to + i * kSide * kSumsPitch<float> + warp_index() * kSide);
    }
  }

 private:
  static constexpr int kSide = 16, kHalves = kProductRows / kSide;
  static_assert(kThreads / kWarp * kSide == kProductColumns);

#ifdef MILKERNELS_EMULATED
  // How a warp shares a matrix is its own affair: here all of it is the first lane's.
  struct Sum {
    float at[kSide][kSide];
  };
  static void clear(Sum& sum) { std::memset(&sum, 0, sizeof(sum)); }
  static void multiply(Sum& sum, const T* rows, int row_pitch, const T* columns, int column_pitch) {
    __syncwarp();
    for (int i = 0; lane_index() == 0 && i < kSide * kSide * kSide; ++i) {
      const int r = i / kSide / kSide, c = i / kSide % kSide, d = i % kSide;
      sum.at[r][c] += widen(rows[r * row_pitch + d]) * widen(columns[c * column_pitch + d]);
    }
    __syncwarp();
  }
  static void store(const Sum& sum, float* to) {
    __syncwarp();
    for (int i = 0; lane_index() == 0 && i < kSide * kSide; ++i) {
      to[i / kSide * kSumsPitch<float> + i % kSide] = sum.at[i / kSide][i % kSide];
    }
    __syncwarp();
  }
#else
  using Sum = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kSide, kSide, kSide, float>;
  __device__ static void clear(Sum& sum) { nvcuda::wmma::fill_fragment(sum, 0.f); }
  __device__ static void multiply(Sum& sum, const T* rows, int row_pitch, const T* columns, int column_pitch) {
    namespace wmma = nvcuda::wmma;
    wmma::fragment<wmma::matrix_a, kSide, kSide, kSide, T, wmma::row_major> a;
    wmma::fragment<wmma::matrix_b, kSide, kSide, kSide, T, wmma::col_major> b;
    wmma::load_matrix_sync(a, rows, row_pitch);
    wmma::load_matrix_sync(b, columns, column_pitch);
    wmma::mma_sync(sum, a, b, sum);
  }
  __device__ static void store(const Sum& sum, float* to) {
    nvcuda::wmma::store_matrix_sync(to, sum, kSumsPitch<float>, nvcuda::wmma::mem_row_major);
  }
#endif

  Sum sum_[kHalves];
};

template <>
class Product<bfloat16> : public UnitProduct<bfloat16> {};
template <>
class Product<float16> : public UnitProduct<float16> {};

}  // namespace milkernels
