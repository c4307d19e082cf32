// Sums over all rows, for the gradients of parameters. Rows are taken a pass at a time. First threads take the items of
// a pass, runs of its rows, and put there what is to be summed; then all threads add the pass to the sums, each thread
// to its own part of them. A sum is formed in the order of its rows, so it does not depend on the threads, and there is
// one of each, however many threads there are.
#pragma once

#include "pool.h"

namespace milkernels {

// Rows of a pass: enough that all threads find work, few enough for the caches. No sum depends on it.
inline int64_t pass_rows(int64_t rows) {
  const int64_t most = std::clamp<int64_t>(at::get_num_threads() * kChunk, 4 * kChunk, 16 * kChunk);
  return std::min(most, round_up(std::max<int64_t>(rows, 1), kRowMultiple));
}

// Sums of a few numbers, of which each item has its own until the end of the pass.
template <typename A>
class ItemSums {
 public:
  // `size` numbers each; `rows` of a pass.
  ItemSums(int64_t rows, int64_t size)
      : size_(size), used_(ceil_div(rows, kBlock), 0), items_(ceil_div(rows, kBlock) * size), total_(size, 0.) {}

  // Those of an item, which starts with zeros. One thread at a time has it.
  A* at(int64_t item) {
    A* const sums = items_.get() + item * size_;
    if (!std::exchange(used_[item], 1)) std::fill_n(sums, size_, A(0));
    return sums;
  }
  void add_pass() {
    at::parallel_for(0, size_, 4096, [&](int64_t begin, int64_t end) {
      for (size_t item = 0; item < used_.size(); ++item) {
        const A* const sums = items_.get() + item * size_;
        for (int64_t i = begin; used_[item] && i < end; ++i) total_[i] += sums[i];
      }
    });
    std::fill(used_.begin(), used_.end(), 0);
  }
  // After the last pass: numbers [first, first + count).
  void copy_to(A* to, int64_t first, int64_t count) const {
    for (int64_t i = 0; to != nullptr && i < count; ++i) to[i] = static_cast<A>(total_[first + i]);
  }

 private:
  int64_t size_;
  std::vector<uint8_t> used_;
  Buffer<A> items_;
  std::vector<double> total_;
};

// The sum [columns, width] of left^T right over all rows; `columns` is a multiple of kBlock.
template <typename E>
class OuterProducts {
 public:
  using A = acc_t<E>;

  // Where rows [first, first + count) of the sum go.
  struct Part {
    A* to;
    int64_t first, count;
  };

  // `rows` of a pass. What is in no part is not summed.
  OuterProducts(int64_t rows, int64_t columns, int64_t width, int planes, const std::vector<Part>& parts)
      : columns_(columns), width_(width), depth_(std::min(kChunk, round_up(rows, kRowMultiple))), planes_(planes),
        put_(ceil_div(rows, kBlock), 0), left_(ceil_div(rows, depth_) * left_size()),
        right_(ceil_div(rows, depth_) * right_size()) {
    constexpr int64_t kTogether = 2 * kBlock;
    for (const Part& part : parts) {
      for (int64_t r = 0; r < part.count; r += kTogether) {
        strips_.push_back({part.to + r * width, part.first + r, std::min(kTogether, part.count - r)});
      }
    }
  }

  // The rows from `first` of the pass on, in one tile or in one chunk: left [rows, columns], right [rows, width]. Any
  // thread.
  void put(int64_t first, int64_t rows, const Matrix<E>& left, const Matrix<E>& right) {
    E* const to = left_.get() + first / depth_ * left_size() + first % depth_;
    for (int p = 0; p < planes_; ++p) {
      transpose(left.data + p * left.plane_stride, left.ld, rows, columns_, to + p * columns_ * depth_, depth_);
    }
    E* const panels = right_.get() + first / depth_ * right_size() + first % depth_ * kBlock;
    for (int64_t l = 0; l < width_; l += kBlock) {
      copy_columns(right, rows, l, std::min(kBlock, width_ - l), planes_, panels + l * planes_ * depth_,
                   depth_ * kBlock);
    }
    for (int64_t r = first; r < first + rows; r += kBlock) put_[r / kBlock] = 1;
  }

  // At the end of a pass of so many rows. Rows that nobody put are zeros.
  void add_pass(int64_t rows) {
    rows = round_up(rows, kRowMultiple);
    if (std::none_of(put_.begin(), put_.end(), [](uint8_t put) { return put; })) return;
    for (int64_t r = 0; r < rows; r += kBlock) {
      if (!put_[r / kBlock]) zero(r, std::min(kBlock, rows - r));
    }
    const int64_t across = static_cast<int64_t>(strips_.size()), blocks = across * ceil_div(width_, kBlock);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      const MatrixUnits units;
      for (int64_t first = 0; first < rows; first += depth_) {
        const Matrix<E> left{left_.get() + first / depth_ * left_size(), depth_, columns_ * depth_};
        for (int64_t b = begin; b < end; ++b) {
          const int64_t l = b / across * kBlock;
          const Part& strip = strips_[b % across];
          const Matrix<E> right{right_.get() + first / depth_ * right_size() + l * planes_ * depth_, kBlock,
                                depth_ * kBlock};
          product<E>(strip.count, std::min(kBlock, width_ - l), std::min(depth_, rows - first),
                     left.rows_from(strip.first), right, planes_, strip.to + l, width_, started_ || first > 0);
        }
      }
    });
    started_ = true;
    std::fill(put_.begin(), put_.end(), 0);
  }

  // After the last pass: there may have been none.
  void finish() {
    for (const Part& strip : strips_) {
      if (!started_) std::fill_n(strip.to, strip.count * width_, A(0));
    }
  }

 private:
  // Of a chunk: left is [planes, columns, depth], right a panel [planes, depth, kBlock] for every kBlock columns.
  int64_t left_size() const { return planes_ * columns_ * depth_; }
  int64_t right_size() const { return planes_ * round_up(width_, kBlock) * depth_; }
  void zero(int64_t first, int64_t rows) {
    E* const left = left_.get() + first / depth_ * left_size() + first % depth_;
    E* const right = right_.get() + first / depth_ * right_size() + first % depth_ * kBlock;
    for (int64_t c = 0; c < planes_ * columns_; ++c) std::fill_n(left + c * depth_, rows, E(0));
    for (int64_t l = 0; l < planes_ * ceil_div(width_, kBlock); ++l) {
      std::fill_n(right + l * depth_ * kBlock, rows * kBlock, E(0));
    }
  }

  int64_t columns_, width_, depth_;  // depth: rows of a product
  int planes_;
  std::vector<uint8_t> put_;  // by kBlock rows
  Buffer<E> left_, right_;
  std::vector<Part> strips_;  // of rows that are computed together
  bool started_ = false;
};

}  // namespace milkernels
