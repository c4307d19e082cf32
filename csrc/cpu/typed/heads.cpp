#include "../heads.h"

#include <vector>

namespace milkernels {
namespace {

// Rows and heads of a block, and weights held at a time: as many as there are registers for.
constexpr bool kManyRegisters = Vectorized<float>::size() >= 16;
constexpr int kDotRows = kManyRegisters ? 4 : 1, kDotHeads = 4;
constexpr int kSumHeads = kManyRegisters ? 4 : 2;
constexpr int kWeightRegisters = kManyRegisters ? 16 : 8;

// With half types the processor's own guesses of what is wanted next come too late: rows are asked for that far ahead.
constexpr int64_t kAhead = 8;
template <typename T>
constexpr bool kGuessed = sizeof(T) >= sizeof(float);

// Up to so many heads, rows from memory are read one after another, see heads.h.
template <typename T>
constexpr int64_t kDotsOneByOne = kGuessed<T> ? 4 : 2;
template <typename T>
constexpr int64_t kSumsOneByOne = kGuessed<T> ? 1 : 0;

// Two vectors from 2 * size() elements in the order that costs least: bfloat16 numbers are the upper halves of float32
// ones, so those at even places are a shift away, those at odd places a mask. in_order puts a pair back.
template <typename T, typename Step>
inline Pair<T> load_quick(const T* p, Step step) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    using I = Vectorized<int32_t>;
    int32_t padded[I::size()] = {};
    if constexpr (!std::is_same_v<Step, WholeStep>) std::memcpy(padded, p, step * sizeof(T));
    const I bits = std::is_same_v<Step, WholeStep> ? I::loadu(p) : I::loadu(padded);
    return {at::vec::cast<float>(bits << I(16)), at::vec::cast<float>(bits & I(int32_t(0xffff0000)))};
  } else {
    return load_pair(p, step);
  }
}
template <typename T, typename A>
inline Pair<A> in_order(const Pair<A>& v) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const auto [lo, hi] = at::vec::interleave2(v.lo, v.hi);
    return {lo, hi};
  }
  return v;
}

// Sums are kept of as many heads and columns as the nearest cache holds beside a few rows, at a distance that is not
// that of the rows, or reads would wait for writes whose addresses look alike.
constexpr int64_t kStrip = 512;
template <typename A>
constexpr int64_t kMostHeads = 32 / sizeof(A);
template <typename A>
constexpr int64_t kSumLd = kStrip + 128 / sizeof(A);

// Blocks of rows and heads. Each is a function of its own: among others, compilers keep its sums in memory.

// out[r * heads + h] = <x[index[r]] - centre, v[h]> for R rows and H of the heads.
template <typename T, int R, int H, bool CENTRED>
[[gnu::noinline]] void dot_block(const T* x, int64_t ld, const int32_t* index, const acc_t<T>* centre,
                                 const acc_t<T>* v, int64_t ld_v, int64_t width, acc_t<T>* out, int64_t heads) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  // Padded vectors are read whole, others as far as they go.
  const auto load_vector = [](const A* p, auto step) {
    if constexpr (std::is_same_v<T, at::BFloat16>) return Pair<A>::load(p);
    else return load_pair(p, step);
  };
  // Few sums would wait for themselves, and have two parts.
  constexpr int kParts = kManyRegisters && H > 2 ? 1 : 2;
  V sum[kParts][R][H];
  const T* row[R];
  unroll<R>([&](auto i) {
    row[i] = x + index[i] * ld;
    unroll<H>([&](auto h) { unroll<kParts>([&](auto part) { sum[part][i][h] = V(A(0)); }); });
  });
  for_steps<Pair<T>::width>(width, [&](int64_t l, auto step) MILKERNELS_INLINE {
    Pair<A> w[H], c;
    unroll<H>([&](auto h) { w[h] = load_vector(v + h * ld_v + l, step); });
    if constexpr (CENTRED) c = load_vector(centre + l, step);
    unroll<R>([&](auto i) {
      if constexpr (R > 1 || !kGuessed<T>) prefetch_pair(row[i] + kAhead * ld + l);
      auto p = load_quick(row[i] + l, step);
      if constexpr (CENTRED) p.lo = p.lo - c.lo, p.hi = p.hi - c.hi;
      unroll<H>([&](auto h) {
        sum[0][i][h] = fmadd(p.lo, w[h].lo, sum[0][i][h]);
        sum[kParts - 1][i][h] = fmadd(p.hi, w[h].hi, sum[kParts - 1][i][h]);
      });
    });
  });
  unroll<R>([&](auto i) {
    unroll<H>([&](auto h) {
      out[i * heads + h] = horizontal_sum(kParts == 1 ? sum[0][i][h] : sum[0][i][h] + sum[kParts - 1][i][h]);
    });
  });
}

// sums[h] (+)= sum_r weight[r * heads + h] * x[index[r]] for R rows and H of the heads, and `wide` columns.
template <typename T, int R, int H, bool FIRST>
[[gnu::noinline]] void sum_block(const T* x, int64_t ld, const int32_t* index, const acc_t<T>* weight, int64_t heads,
                                 int64_t wide, acc_t<T>* sums, bool streamed) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  const T* row[R];
  V w[R][H];
  unroll<R>([&](auto i) {
    row[i] = x + index[i] * ld;
    unroll<H>([&](auto h) { w[i][h] = V(weight[i * heads + h]); });
  });
  for_steps<Pair<T>::width>(wide, [&](int64_t at, auto step) MILKERNELS_INLINE {
    Pair<A> sum[H];
    unroll<H>([&](auto h) { sum[h] = FIRST ? Pair<A>{V(A(0)), V(A(0))} : Pair<A>::load(sums + h * kSumLd<A> + at); });
    unroll<R>([&](auto i) {
      if (!kGuessed<T> && streamed) prefetch_pair(row[i] + R * ld + at);
      const auto v = load_quick(row[i] + at, step);
      unroll<H>([&](auto h) { sum[h] = {fmadd(w[i][h], v.lo, sum[h].lo), fmadd(w[i][h], v.hi, sum[h].hi)}; });
    });
    unroll<H>([&](auto h) { sum[h].store(sums + h * kSumLd<A> + at); });
  });
}
}  // namespace

template <typename T>
RowVectors<T>::RowVectors(const A* v, int64_t count, int64_t width) : given_(v), ld_(width) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    ld_ = round_up(width, Pair<A>::width);  // what is read past the last is 0
    copy_.resize(count * ld_);
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        for_steps<Pair<A>::width>(width, [&](int64_t l, auto step) {
          const auto p = load_pair(v + k * width + l, step);
          const auto [even, odd] = at::vec::deinterleave2(p.lo, p.hi);
          Pair<A>{even, odd}.store(copy_.data() + k * ld_ + l);
        });
      }
    });
  }
}

template <typename T>
void dots(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* centre, const acc_t<T>* v,
          int64_t ld_v, int64_t heads, int64_t width, acc_t<T>* out, bool streamed) {
  const auto all_heads = [&](int64_t r, auto rows) {
    for_blocks<kDotHeads>(heads, [&](int64_t k, auto block_heads) {
      constexpr int R = decltype(rows)::value, H = decltype(block_heads)::value;
      const auto block = centre ? dot_block<T, R, H, true> : dot_block<T, R, H, false>;
      block(x, ld, index + r, centre, v + k * ld_v, ld_v, width, out + r * heads + k, heads);
    });
  };
  if (streamed && heads <= kDotsOneByOne<T>) for_blocks<1>(n, all_heads);
  else for_blocks<kDotRows>(n, all_heads);
}

template <typename T>
void weighted_sums(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* weight, int64_t heads,
                   const acc_t<T>* scale, int64_t width, acc_t<T>* out, bool streamed) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  A sums[kMostHeads<A> * kSumLd<A>];
  for (int64_t k = 0; k < heads; k += kMostHeads<A>) {
    const int64_t some = std::min(kMostHeads<A>, heads - k);
    for (int64_t l = 0; l < width; l += kStrip) {
      const int64_t wide = std::min(kStrip, width - l);
      const auto add = [&](int64_t r, auto rows) {
        for_blocks<kSumHeads>(some, [&](int64_t h, auto block_heads) {
          constexpr int R = decltype(rows)::value, H = decltype(block_heads)::value;
          if constexpr (R * H <= kWeightRegisters) {  // so many rows go with so few heads only, see below
            const auto block = r == 0 ? sum_block<T, R, H, true> : sum_block<T, R, H, false>;
            block(x + l, ld, index + r, weight + r * heads + k + h, heads, wide, sums + h * kSumLd<A>,
                  streamed && h == 0);
          }
        });
      };
      if (streamed && heads <= kSumsOneByOne<T>) for_blocks<1>(n, add);
      else if (some >= kSumHeads) for_blocks<kWeightRegisters / kSumHeads>(n, add);
      else if (some > 1) for_blocks<kWeightRegisters / 2>(n, add);
      else for_blocks<kWeightRegisters>(n, add);
      for (int64_t h = 0; h < some; ++h) {
        const A factor = scale[k + h];
        A* const to = out + (k + h) * width + l;
        for_steps<Pair<A>::width>(wide, [&](int64_t at, auto step) {
          auto sum = in_order<T>(Pair<A>::load(sums + h * kSumLd<A> + at));
          if (factor != A(0)) {
            const auto old = load_pair(to + at, step);
            sum = {fmadd(V(factor), old.lo, sum.lo), fmadd(V(factor), old.hi, sum.hi)};
          }
          store_pair(sum, to + at, step);
        });
      }
    }
  }
}

template <typename T>
void combine(const acc_t<T>* coefficient, const acc_t<T>* const* vector, int64_t terms, int64_t n, int64_t width, T* y,
             int64_t ld_y) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  for_blocks<4>(n, [&](int64_t r, auto rows) {
    constexpr int R = decltype(rows)::value;
    const A* const c = coefficient + r * terms;
    for_steps<Pair<T>::width>(width, [&](int64_t l, auto step) MILKERNELS_INLINE {
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

template class RowVectors<MILKERNELS_TYPE>;
template void dots(const MILKERNELS_TYPE*, int64_t, const int32_t*, int64_t, const acc_t<MILKERNELS_TYPE>*,
                   const acc_t<MILKERNELS_TYPE>*, int64_t, int64_t, int64_t, acc_t<MILKERNELS_TYPE>*, bool);
template void weighted_sums(const MILKERNELS_TYPE*, int64_t, const int32_t*, int64_t, const acc_t<MILKERNELS_TYPE>*,
                            int64_t, const acc_t<MILKERNELS_TYPE>*, int64_t, acc_t<MILKERNELS_TYPE>*, bool);
template void combine(const acc_t<MILKERNELS_TYPE>*, const acc_t<MILKERNELS_TYPE>* const*, int64_t, int64_t, int64_t,
                      MILKERNELS_TYPE*, int64_t);

}  // namespace milkernels
