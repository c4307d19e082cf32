#include "heads.h"

#include <c10/util/Unroll.h>

namespace milkernels {
namespace {

// Heads of a block, and pairs of vectors of a strip: as many sums as there are registers for.
constexpr bool kManyRegisters = Vectorized<float>::size() >= 16;
constexpr int kHeadBlock = kManyRegisters ? 4 : 2;
constexpr int kStripPairs = kManyRegisters ? 8 : 4;

// f(0), f(1), .. with numbers known when it is compiled: arrays indexed by them stay in registers.
template <int N, typename F>
inline void unroll(const F& f) {
  c10::ForcedUnroll<N>{}(f);
}

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

}  // namespace

template <typename T>
void dots(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* center, const acc_t<T>* v,
          int64_t heads, int64_t width, acc_t<T>* out) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  const auto block = [&](int64_t r, int64_t k, auto rows, auto block_heads, auto centered) {
    constexpr int R = decltype(rows)::value, H = decltype(block_heads)::value;
    V sum[R][H];
    const T* row[R];
    unroll<R>([&](auto i) {
      row[i] = x + index[r + i] * ld;
      unroll<H>([&](auto h) { sum[i][h] = V(A(0)); });
    });
    for_steps<Pair<T>::width>(width, [&](int64_t l, auto step) {
      Pair<A> w[H], c;
      unroll<H>([&](auto h) { w[h] = load_pair(v + (k + h) * width + l, step); });
      if constexpr (decltype(centered)::value) c = load_pair(center + l, step);
      unroll<R>([&](auto i) {
        auto p = load_pair(row[i] + l, step);
        if constexpr (decltype(centered)::value) p.lo = p.lo - c.lo, p.hi = p.hi - c.hi;
        unroll<H>([&](auto h) { sum[i][h] = fmadd(p.hi, w[h].hi, fmadd(p.lo, w[h].lo, sum[i][h])); });
      });
    });
    unroll<R>([&](auto i) {
      unroll<H>([&](auto h) { out[(r + i) * heads + k + h] = horizontal_sum(sum[i][h]); });
    });
  };
  for_blocks<4>(n, [&](int64_t r, auto rows) {
    for_blocks<kHeadBlock>(heads, [&](int64_t k, auto block_heads) {
      if (center != nullptr) block(r, k, rows, block_heads, std::true_type{});
      else block(r, k, rows, block_heads, std::false_type{});
    });
  });
}

template <typename T>
void weighted_sums(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* weight, int64_t heads,
                   const acc_t<T>* scale, int64_t width, acc_t<T>* out) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  constexpr int64_t kPair = Pair<T>::width;
  const auto strip = [&](int64_t k, int64_t l, auto block_heads, auto pairs, auto step) {
    constexpr int H = decltype(block_heads)::value, P = decltype(pairs)::value;
    Pair<A> sum[H][P];
    unroll<H>([&](auto h) { unroll<P>([&](auto p) { sum[h][p] = {V(A(0)), V(A(0))}; }); });
    for (int64_t r = 0; r < n; ++r) {
      const T* const row = x + index[r] * ld + l;
      V w[H];
      unroll<H>([&](auto h) { w[h] = V(weight[r * heads + k + h]); });
      unroll<P>([&](auto p) {
        const auto v = load_pair(row + p * kPair, step);
        unroll<H>([&](auto h) { sum[h][p] = {fmadd(w[h], v.lo, sum[h][p].lo), fmadd(w[h], v.hi, sum[h][p].hi)}; });
      });
    }
    unroll<H>([&](auto h) {
      const V s(scale[k + h]);
      unroll<P>([&](auto p) {
        A* const to = out + (k + h) * width + l + p * kPair;
        if (scale[k + h] != A(0)) {
          const auto old = load_pair(to, step);
          sum[h][p] = {fmadd(s, old.lo, sum[h][p].lo), fmadd(s, old.hi, sum[h][p].hi)};
        }
        store_pair(sum[h][p], to, step);
      });
    });
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

template <typename T>
void combine(const acc_t<T>* coefficient, const acc_t<T>* const* vector, int64_t terms, int64_t n, int64_t width, T* y,
             int64_t ld_y) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  for_blocks<4>(n, [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    const A* const c = coefficient + r * terms;
    for_steps<Pair<T>::width>(width, [&](int64_t l, auto step) {
      Pair<T> sum[R];
      unroll<R>([&](auto i) { sum[i] = {V(A(0)), V(A(0))}; });
      for (int64_t j = 0; j < terms; ++j) {
        const auto v = load_pair(vector[j] + l, step);
        unroll<R>([&](auto i) {
          const V w(c[i * terms + j]);
          sum[i] = {fmadd(w, v.lo, sum[i].lo), fmadd(w, v.hi, sum[i].hi)};
        });
      }
      unroll<R>([&](auto i) { store_pair(sum[i], y + (r + i) * ld_y + l, step); });
    });
  });
}

#define INSTANTIATE(T)                                                                                              \
  template void dots(const T*, int64_t, const int32_t*, int64_t, const acc_t<T>*, const acc_t<T>*, int64_t, int64_t, \
                     acc_t<T>*);                                                                                    \
  template void weighted_sums(const T*, int64_t, const int32_t*, int64_t, const acc_t<T>*, int64_t, const acc_t<T>*, \
                              int64_t, acc_t<T>*);                                                                  \
  template void combine(const acc_t<T>*, const acc_t<T>* const*, int64_t, int64_t, int64_t, T*, int64_t);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(at::Half)
INSTANTIATE(at::BFloat16)
#undef INSTANTIATE

}  // namespace milkernels
