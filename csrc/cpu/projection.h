// Products of rows with weights [columns, width], x W^T, and their way back, z W. Weights are packed once for a call,
// but for few rows, whose products would cost less than that: then the rows are transposed instead, tile by tile.
#pragma once

#include "pool.h"

namespace milkernels {

constexpr int64_t kFewRows = 256;  // for which nothing is packed

// Runs of weights that lie one behind the other: f(first column, columns, their data or null for zeros).
template <typename A, typename F>
inline void for_runs(const std::vector<const A*>& rows, int64_t first, int64_t last, int64_t width, const F& f) {
  for (int64_t c = first; c < last;) {
    int64_t end = c + 1;
    while (end < last && (rows[c] == nullptr ? rows[end] == nullptr : rows[end] == rows[c] + (end - c) * width)) ++end;
    f(c, end - c, rows[c]);
    c = end;
  }
}

template <typename E>
class Projection {
 public:
  using A = acc_t<E>;
  static constexpr bool kPlain = std::is_same_v<A, E>;  // weights are elements of products as they are

  // row(c) is a row of weights, or null for zeros; `columns` is a multiple of kBlock.
  template <typename Row>
  Projection(int64_t width, int64_t columns, int planes, int64_t rows_of_call, const Row& row)
      : width_(width), planes_(planes), few_(kPlain && rows_of_call <= kFewRows) {
    if (few_)
      for (int64_t c = 0; c < columns; ++c) rows_.push_back(row(c));
    else packed_.emplace(Packed<E>::from_columns(width, columns, planes, row));
    int64_t real = 0;
    for (int64_t c = 0; c < columns; ++c) real += row(c) != nullptr;
    if (real <= kFewColumns) deepest_ = kDeepestOfFew;
  }

  // Numbers that a thread needs for products of so many rows.
  int64_t scratch_size(int64_t rows) const { return few_ ? round_up(rows, kBlock) * width_ + kBlock * kBlock : 0; }
  // Before the products of these rows, at most a chunk.
  void prepare(const Matrix<E>& x, int64_t rows, E* scratch) const {
    for (int64_t t = 0; few_ && t < rows; t += kBlock) {
      transpose(x.data + t * x.ld, x.ld, std::min(kBlock, rows - t), width_,
                scratch + kBlock * (kBlock + t / kBlock * width_), kBlock);
    }
  }
  // Of rows [first, first + count), a tile, with columns [column, column + kBlock): [count, kBlock], ld apart.
  void block(const Matrix<E>& x, int64_t first, int64_t count, int64_t column, E* scratch, A* out, int64_t ld) const {
    if constexpr (kPlain) {
      if (few_) {
        const E* const right = scratch + kBlock * (kBlock + first / kBlock * width_);
        for_runs(rows_, column, column + kBlock, width_, [&](int64_t c, int64_t columns, const A* weights) {
          A* const to = scratch + (c - column) * kBlock;
          if (weights == nullptr) std::fill_n(to, columns * kBlock, A(0));
          else product<E>(columns, count, width_, {weights, width_}, {right, kBlock}, 1, to, kBlock, false, deepest_);
        });
        transpose(scratch, kBlock, kBlock, count, out, ld);
        return;
      }
    }
    product<E>(count, kBlock, Packed<E>::depth_of(width_), x.rows_from(first), packed_->block(column / kBlock), planes_,
               out, ld, false, deepest_);
  }

 private:
  static constexpr int64_t kFewColumns = 16;  // of weights, also of two matrices of them

  int64_t width_;
  int64_t deepest_ = kDeepest;
  int planes_;
  bool few_;
  std::vector<const A*> rows_;
  std::optional<Packed<E>> packed_;
};

template <typename E>
class BackProjection {
 public:
  using A = acc_t<E>;

  // As above.
  template <typename Row>
  BackProjection(int64_t width, int64_t columns, int planes, int64_t rows_of_call, const Row& row)
      : width_(width), columns_(columns), planes_(planes), few_(Projection<E>::kPlain && rows_of_call <= kFewRows) {
    if (few_)
      for (int64_t c = 0; c < columns; ++c) rows_.push_back(row(c));
    else packed_.emplace(Packed<E>::from_rows(columns, width, planes, row));
  }

  // Of z [rows, columns], a tile, columns [first, first + kBlock) of z W or as many as there are: [rows, kBlock].
  void block(const Matrix<E>& z, int64_t rows, int64_t first, A* out) const {
    if constexpr (Projection<E>::kPlain) {
      if (few_) {
        bool add = false;
        for_runs(rows_, 0, columns_, width_, [&](int64_t c, int64_t terms, const A* weights) {
          if (weights == nullptr) return;
          product<E>(rows, std::min(kBlock, width_ - first), terms, {z.data + c, z.ld}, {weights + first, width_}, 1,
                     out, kBlock, std::exchange(add, true));
        });
        return;
      }
    }
    product<E>(rows, kBlock, columns_, z, packed_->block(first / kBlock), planes_, out, kBlock, false);
  }

 private:
  int64_t width_, columns_;
  int planes_;
  bool few_;
  std::vector<const A*> rows_;
  std::optional<Packed<E>> packed_;
};

}  // namespace milkernels
