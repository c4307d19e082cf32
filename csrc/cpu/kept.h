// What a forward keeps so that its backward need not compute it again: embedded rows, then products with hidden units,
// of the first rows, in the bytes of one tensor. milkernels/saving.py says how many bytes it has.
#pragma once

#include <ATen/core/Tensor.h>

#include "rows.h"

namespace milkernels {

// Numbers of the first rows, `width` a row, in bfloat16 (of `size` 2) or in the accumulation type.
struct KeptRows {
  char* data = nullptr;
  int64_t rows = 0, width = 0, size = 0;
  bool filled = false;  // they are to be read, else to be written

  bool reads(int64_t row) const { return filled && row < rows; }
  bool writes(int64_t row) const { return !filled && row < rows; }

  // The place of number `at`, where numbers lie as T; else null.
  template <typename T>
  T* as(int64_t at) const {
    return int64_t(sizeof(T)) == size ? reinterpret_cast<T*>(data) + at : nullptr;
  }
  template <typename T>
  void write(int64_t at, const T* from, int64_t n) const {
    if (size == 2) convert_row(from, reinterpret_cast<BFloat16*>(data) + at, n);
    else convert_row(from, reinterpret_cast<acc_t<T>*>(data) + at, n);
  }
  template <typename T>
  void read(int64_t at, T* to, int64_t n) const {
    if (size == 2) convert_row(reinterpret_cast<const BFloat16*>(data) + at, to, n);
    else convert_row(reinterpret_cast<const acc_t<T>*>(data) + at, to, n);
  }
  // Writes, and rounds to what is then read: what a pooling weighs must be the same in its backward.
  template <typename T>
  void write_and_round(int64_t at, T* values, int64_t n) const {
    write(at, values, n);
    if (size < int64_t(sizeof(T))) read(at, values, n);
  }
  // Columns [first, first + count) of all rows, which lie apart from the others.
  KeptRows part(int64_t first, int64_t count) const { return {data + rows * first * size, rows, count, size, filled}; }
};

struct Kept {
  KeptRows embedded, hidden;

  // How many bytes are kept of `count` rows of so many numbers of that size each, if `limit` allows (-1: any).
  static int64_t bytes(int64_t limit, int64_t count, int64_t embedded_width, int64_t hidden_width, int64_t size) {
    int64_t total = 0;
    for (const int64_t row : {embedded_width * size, hidden_width * size}) {
      const int64_t all = round_up(count, 64);
      if (row != 0) total += row * (limit < 0 ? all : std::min(all, (limit - total) / (row * 64) * 64));
    }
    return total;
  }

  Kept() = default;
  // Rows in `bytes`, uint8, which are `embedded_width` and `hidden_width` numbers wide, 0 where there are none.
  Kept(const at::Tensor& bytes, int64_t count, int64_t embedded_width, int64_t hidden_width, int64_t size) {
    char* data = static_cast<char*>(bytes.data_ptr());
    int64_t left = bytes.numel();
    const auto take = [&](int64_t width) -> KeptRows {
      const int64_t row = width * size, all = round_up(count, 64);
      if (row == 0) return {};
      const int64_t rows = all * row <= left ? all : left / row / kTogether * kTogether;
      const KeptRows found{data, rows, width, size};
      data += rows * row, left -= rows * row;
      return found;
    };
    embedded = take(embedded_width), hidden = take(hidden_width);
  }

 private:
  static constexpr int64_t kTogether = 256;  // rows that are kept together, or not: whole chunks
};

// Memory for what is kept, from what was given back, if that is large enough: see cpu.cpp.
at::Tensor kept_bytes(int64_t bytes);

}  // namespace milkernels
