// Rows of a tile against the vectors of several heads: dot products, weighted sums, and rows made of vectors. A row is
// read once for a block of heads, and what is shared by four rows is read once for them.
#pragma once

#include "rows.h"

namespace milkernels {

// Heads of a block, and pairs of vectors of a strip: as many sums as there are registers for.
constexpr bool kManyRegisters = Vectorized<float>::size() >= 16;
constexpr int kHeadBlock = kManyRegisters ? 4 : 2;
constexpr int kStripPairs = kManyRegisters ? 8 : 4;

// f(first, count) over [0, n) in blocks of MAX, then of 2 and 1; counts are types.
template <int MAX, typename F>
inline void for_blocks(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + MAX <= n; i += MAX) f(i, std::integral_constant<int, MAX>{});
  if constexpr (MAX > 2) {
    if (i + 2 <= n) f(i, std::integral_constant<int, 2>{}), i += 2;
  }
  if constexpr (MAX > 1) {
    if (i < n) f(i, std::integral_constant<int, 1>{});
  }
}

// out[r * heads + k] = <x[index[r]] - center, v[k]>; center null: <x[index[r]], v[k]>. v is [heads, width]. Subtracting
// first keeps digits that the difference of two dot products loses when features have a mean.
template <typename T, typename A>
inline void dots(const T* x, int64_t ld, const int32_t* index, int64_t n, const A* center, const A* v, int64_t heads,
                 int64_t width, A* out) {
  using V = Vectorized<A>;
  const auto block = [&](int64_t r, int64_t k, auto rows, auto block_heads, auto centered) {
    constexpr int R = decltype(rows)::value, H = decltype(block_heads)::value;
    V sum[R][H];
    for (auto& row : sum) {
      for (auto& s : row) s = V(A(0));
    }
    const T* row[R];
    for (int i = 0; i < R; ++i) row[i] = x + index[r + i] * ld;
    for_steps<Pair<T>::width>(width, [&](int64_t l, auto step) {
      Pair<A> w[H];
      for (int h = 0; h < H; ++h) w[h] = load_pair(v + (k + h) * width + l, step);
      Pair<A> c;
      if constexpr (decltype(centered)::value) c = load_pair(center + l, step);
      for (int i = 0; i < R; ++i) {
        auto p = load_pair(row[i] + l, step);
        if constexpr (decltype(centered)::value) p.lo = p.lo - c.lo, p.hi = p.hi - c.hi;
        for (int h = 0; h < H; ++h) {
          sum[i][h] = fmadd(p.lo, w[h].lo, sum[i][h]);
          sum[i][h] = fmadd(p.hi, w[h].hi, sum[i][h]);
        }
      }
    });
    for (int i = 0; i < R; ++i) {
      for (int h = 0; h < H; ++h) out[(r + i) * heads + k + h] = horizontal_sum(sum[i][h]);
    }
  };
  for_blocks<4>(n, [&](int64_t r, auto rows) {
    for_blocks<kHeadBlock>(heads, [&](int64_t k, auto block_heads) {
      if (center != nullptr) block(r, k, rows, block_heads, std::true_type{});
      else block(r, k, rows, block_heads, std::false_type{});
    });
  });
}

// out[k] = scale[k] * out[k] + sum_r weight[r * heads + k] * x[index[r]]; out is [heads, width]. Where scale is 0 `out`
// is not read. The sum of a call is formed on its own before it is added: long running sums lose digits.
template <typename T, typename A>
inline void weighted_sums(const T* x, int64_t ld, const int32_t* index, int64_t n, const A* weight, int64_t heads,
                          const A* scale, int64_t width, A* out) {
  using V = Vectorized<A>;
  constexpr int64_t kPair = Pair<T>::width;
  const auto strip = [&](int64_t k, int64_t l, auto block_heads, auto pairs, auto step) {
    constexpr int H = decltype(block_heads)::value, P = decltype(pairs)::value;
    Pair<A> sum[H][P];
    for (auto& head : sum) {
      for (auto& s : head) s = {V(A(0)), V(A(0))};
    }
    for (int64_t r = 0; r < n; ++r) {
      const T* const row = x + index[r] * ld + l;
      V w[H];
      for (int h = 0; h < H; ++h) w[h] = V(weight[r * heads + k + h]);
      for (int p = 0; p < P; ++p) {
        const auto v = load_pair(row + p * kPair, step);
        for (int h = 0; h < H; ++h) {
          sum[h][p].lo = fmadd(w[h], v.lo, sum[h][p].lo);
          sum[h][p].hi = fmadd(w[h], v.hi, sum[h][p].hi);
        }
      }
    }
    for (int h = 0; h < H; ++h) {
      const A s = scale[k + h];
      for (int p = 0; p < P; ++p) {
        A* const to = out + (k + h) * width + l + p * kPair;
        auto total = sum[h][p];
        if (s != A(0)) {
          const auto old = load_pair(to, step);
          total = {fmadd(V(s), old.lo, total.lo), fmadd(V(s), old.hi, total.hi)};
        }
        store_pair(Pair<A>{total.lo, total.hi}, to, step);
      }
    }
  };
  for_blocks<kHeadBlock>(heads, [&](int64_t k, auto block_heads) {
    constexpr int64_t kPairs = kStripPairs / decltype(block_heads)::value;
    int64_t l = 0;
    for (; l + kPairs * kPair <= width; l += kPairs * kPair) {
      strip(k, l, block_heads, std::integral_constant<int, kPairs>{}, WholeStep{});
    }
    for_steps<kPair>(width - l, [&](int64_t at, auto step) {
      strip(k, l + at, block_heads, std::integral_constant<int, 1>{}, step);
    });
  });
}

// y[r] = sum_j coefficient[r * terms + j] * vector[j], for n rows ld_y apart.
template <typename T, typename A>
inline void combine(const A* coefficient, const A* const* vector, int64_t terms, int64_t n, int64_t width, T* y,
                    int64_t ld_y) {
  using V = Vectorized<A>;
  for_blocks<4>(n, [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    const A* const c = coefficient + r * terms;
    for_steps<Pair<T>::width>(width, [&](int64_t l, auto step) {
      Pair<T> sum[R];
      for (auto& s : sum) s = {V(A(0)), V(A(0))};
      for (int64_t j = 0; j < terms; ++j) {
        const auto v = load_pair(vector[j] + l, step);
        for (int i = 0; i < R; ++i) {
          const V w(c[i * terms + j]);
          sum[i] = {fmadd(w, v.lo, sum[i].lo), fmadd(w, v.hi, sum[i].hi)};
        }
      }
      for (int i = 0; i < R; ++i) store_pair(sum[i], y + (r + i) * ld_y + l, step);
    });
  });
}

}  // namespace milkernels
