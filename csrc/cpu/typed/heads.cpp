#include "../heads.h"

#include <vector>

namespace milkernels {
namespace {

// Heads of a block, and weights held at a time: as many as there are registers for.
constexpr bool kManyRegisters = Vectorized<float>::size() >= 16;
constexpr int kHeadBlock = kManyRegisters ? 4 : 2;
constexpr int kWeightRegisters = kManyRegisters ? 16 : 8;

// Whether rows from memory are read one after another, see heads.h.
template <typename T>
constexpr bool one_by_one(int64_t heads) {
  return heads == 1 && sizeof(T) >= sizeof(float);
}

// Rows that far ahead are asked for: with half types the processor's own guesses come too late.
constexpr int64_t kAhead = 8;
template <typename T>
inline void prefetch(const T* pair) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < Pair<T>::width * int64_t(sizeof(T)); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(pair) + i, 0, 2);
  }
}

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
  using A = acc_t<T>;
  using V = Vectorized<A>;
  // Padded vectors are read whole, others as far as they go.
  const auto load_vector = [](const A* p, auto step) {
    if constexpr (std::is_same_v<T, at::BFloat16>) return Pair<A>::load(p);
    else return load_pair(p, step);
  };
  const auto block = [&](int64_t r, int64_t k, auto rows, auto block_heads, auto centred) {
    constexpr int R = decltype(rows)::value, H = decltype(block_heads)::value;
    V sum[R][H];
    const T* row[R];
    unroll<R>([&](auto i) {
      row[i] = x + index[r + i] * ld;
      unroll<H>([&](auto h) { sum[i][h] = V(A(0)); });
    });
    for_steps<Pair<T>::width>(width, [&](int64_t l, auto step) {
      Pair<A> w[H], c;
      unroll<H>([&](auto h) { w[h] = load_vector(v + (k + h) * ld_v + l, step); });
      if constexpr (decltype(centred)::value) c = load_vector(centre + l, step);
      unroll<R>([&](auto i) {
        if constexpr (R > 1) prefetch<T>(row[i] + kAhead * ld + l);
        auto p = load_quick(row[i] + l, step);
        if constexpr (decltype(centred)::value) p.lo = p.lo - c.lo, p.hi = p.hi - c.hi;
        unroll<H>([&](auto h) { sum[i][h] = fmadd(p.hi, w[h].hi, fmadd(p.lo, w[h].lo, sum[i][h])); });
      });
    });
    unroll<R>([&](auto i) { unroll<H>([&](auto h) { out[(r + i) * heads + k + h] = horizontal_sum(sum[i][h]); }); });
  };
  const auto all_heads = [&](int64_t r, auto rows) {
    for_blocks<kHeadBlock>(heads, [&](int64_t k, auto block_heads) {
      if (centre != nullptr) block(r, k, rows, block_heads, std::true_type{});
      else block(r, k, rows, block_heads, std::false_type{});
    });
  };
  if (streamed && one_by_one<T>(heads)) for_blocks<1>(n, all_heads);
  else for_blocks<4>(n, all_heads);
}

template <typename T>
void weighted_sums(const T* x, int64_t ld, const int32_t* index, int64_t n, const acc_t<T>* weight, int64_t heads,
                   const acc_t<T>* scale, int64_t width, acc_t<T>* out, bool streamed) {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  // Rows are read in their order, a few at a time, each as far as the sums of a strip fit into the nearest cache.
  constexpr int64_t kStrip = 512;
  A sums[kHeadBlock * kStrip];
  const auto add_rows = [&](int64_t k, int64_t l, int64_t wide, int64_t r, bool first, auto block_heads, auto rows) {
    constexpr int H = decltype(block_heads)::value, R = decltype(rows)::value;
    const T* row[R];
    V w[R][H];
    unroll<R>([&](auto i) {
      row[i] = x + index[r + i] * ld + l;
      unroll<H>([&](auto h) { w[i][h] = V(weight[(r + i) * heads + k + h]); });
    });
    for_steps<Pair<T>::width>(wide, [&](int64_t at, auto step) {
      Pair<A> sum[H];
      unroll<H>([&](auto h) { sum[h] = first ? Pair<A>{V(A(0)), V(A(0))} : Pair<A>::load(sums + h * kStrip + at); });
      unroll<R>([&](auto i) {
        if (streamed && sizeof(T) < sizeof(float)) prefetch<T>(row[i] + R * ld + at);
        const auto v = load_quick(row[i] + at, step);
        unroll<H>([&](auto h) { sum[h] = {fmadd(w[i][h], v.lo, sum[h].lo), fmadd(w[i][h], v.hi, sum[h].hi)}; });
      });
      unroll<H>([&](auto h) { sum[h].store(sums + h * kStrip + at); });
    });
  };
  for_blocks<kHeadBlock>(heads, [&](int64_t k, auto block_heads) {
    constexpr int H = decltype(block_heads)::value;
    for (int64_t l = 0; l < width; l += kStrip) {
      const int64_t wide = std::min(kStrip, width - l);
      const auto add = [&](int64_t r, auto rows) { add_rows(k, l, wide, r, r == 0, block_heads, rows); };
      if (streamed && one_by_one<T>(heads)) for_blocks<1>(n, add);
      else for_blocks<kWeightRegisters / H>(n, add);
      unroll<H>([&](auto h) {
        const V s(scale[k + h]);
        A* const to = out + (k + h) * width + l;
        for_steps<Pair<A>::width>(wide, [&](int64_t at, auto step) {
          auto sum = in_order<T>(Pair<A>::load(sums + h * kStrip + at));
          if (scale[k + h] != A(0)) {
            const auto old = load_pair(to + at, step);
            sum = {fmadd(s, old.lo, sum.lo), fmadd(s, old.hi, sum.hi)};
          }
          store_pair(sum, to + at, step);
        });
      });
    }
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

template class RowVectors<MILKERNELS_TYPE>;
template void dots(const MILKERNELS_TYPE*, int64_t, const int32_t*, int64_t, const acc_t<MILKERNELS_TYPE>*,
                   const acc_t<MILKERNELS_TYPE>*, int64_t, int64_t, int64_t, acc_t<MILKERNELS_TYPE>*, bool);
template void weighted_sums(const MILKERNELS_TYPE*, int64_t, const int32_t*, int64_t, const acc_t<MILKERNELS_TYPE>*,
                            int64_t, const acc_t<MILKERNELS_TYPE>*, int64_t, acc_t<MILKERNELS_TYPE>*, bool);
template void combine(const acc_t<MILKERNELS_TYPE>*, const acc_t<MILKERNELS_TYPE>* const*, int64_t, int64_t, int64_t,
                      MILKERNELS_TYPE*, int64_t);

}  // namespace milkernels
