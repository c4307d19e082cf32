// Rows of any storage type, read and written in the accumulation type, and how work on them is handed to threads.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Unroll.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "vec_math.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace milkernels {

using at::BFloat16;
using at::Half;

// float64 accumulates in float64, everything else in float32.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Memory that a thread keeps from one call to the next, up to kMost bytes. Given back to the C library, what lies at
// the end of the heap goes back to the system, and every 4 KB of it cost the next call a page fault: a step of ten
// rows, whose sums need 4 MB, took twice as long.
class Workspace {
 public:
  struct Block {
    c10::DataPtr data;
    size_t bytes = 0;
  };

  static Workspace& of_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }

  // The smallest of the kept blocks that is large enough, unless that is more than twice as large as needed; or a new
  // one from PyTorch's allocator (aligned, and seen by its memory profiler).
  Block take(size_t bytes) {
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->bytes >= bytes && it->bytes <= 2 * bytes;
      if (fits && (best == kept_.end() || it->bytes < best->bytes)) best = it;
    }
    if (best == kept_.end()) return {c10::GetCPUAllocator()->allocate(bytes), bytes};
    Block block = std::move(*best);
    kept_.erase(best);
    total_ -= block.bytes;
    return block;
  }

  // Those that were given back first make room.
  void give_back(Block block) {
    if (block.bytes > kMost / 2) return;
    while (total_ + block.bytes > kMost || kept_.size() == kBlocks) {
      total_ -= kept_.front().bytes;
      kept_.erase(kept_.begin());
    }
    total_ += block.bytes;
    kept_.push_back(std::move(block));
  }

 private:
  static constexpr size_t kMost = size_t{8} << 20, kBlocks = 32;
  std::vector<Block> kept_;  // the one that was given back last comes last
  size_t total_ = 0;
};

// An uninitialised array of a thread's workspace.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : block_(Workspace::of_thread().take(std::max<int64_t>(n, 1) * sizeof(T))) {}
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    // A pointer that was moved from still has its address, but no memory to free.
    if (block_.data.get_context() != nullptr) Workspace::of_thread().give_back(std::move(block_));
  }
  T* get() const { return static_cast<T*>(block_.data.get()); }

 private:
  Workspace::Block block_;
};

// Runs work(item, scratch) for 0 <= item < n; a thread takes the next item when it is free, so that skipped
// (masked) items do not unbalance the threads. Results may not depend on which thread runs what.
template <typename MakeScratch, typename Work>
void parallel_items(int64_t n, const MakeScratch& make_scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(at::in_parallel_region() ? 1 : at::get_num_threads(), n);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t item; (item = next.fetch_add(1)) < n;) work(item, scratch);
  });
}

// Fresh pages of a large output are faulted in 4 KB at a time unless the system is told that large ones will do.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  if (bytes < int64_t(4 * kHuge)) return;
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), (end - begin) & ~(kHuge - 1), MADV_HUGEPAGE);
#endif
}

// Two vectors of the accumulation type from 2 * size() consecutive elements; `count` of them where fewer are there.
template <typename T>
struct Pair {
  using A = acc_t<T>;
  using V = Vectorized<A>;
  static constexpr int64_t width = 2 * V::size();
  V lo, hi;

  static Pair load(const T* p) {
    if constexpr (std::is_same_v<T, A>) {
      return {V::loadu(p), V::loadu(p + V::size())};
    } else {
      auto [lo, hi] = at::vec::convert_to_float<T>(Vectorized<T>::loadu(p));
      return {lo, hi};
    }
  }
  static Pair load(const T* p, int64_t count) {
    T padded[width] = {};
    std::memcpy(static_cast<void*>(padded), p, count * sizeof(T));
    return load(padded);
  }
  void store(T* p) const {
    if constexpr (std::is_same_v<T, A>) {
      lo.store(p);
      hi.store(p + V::size());
    } else {
      at::vec::convert_from_float<T>(lo, hi).store(p);
    }
  }
  void store(T* p, int64_t count) const {
    T padded[width];
    store(padded);
    std::memcpy(static_cast<void*>(p), padded, count * sizeof(T));
  }
};

// Behind a lambda's parameters: it is inlined, whatever the compiler thinks of its size. In a call of its own, arrays
// that it takes by reference lie in memory, not in registers.
#define MILKERNELS_INLINE __attribute__((always_inline))

// Calls f(offset, step) over [0, n) in whole steps of WIDTH and one of the elements left over. A step is a type where
// it is whole, so that load_pair and store_pair know it when they are compiled.
struct WholeStep {};
template <int64_t WIDTH, typename F>
inline void for_steps(int64_t n, const F& f) {
  const int64_t left = n % WIDTH;
  for (int64_t i = 0; i < n - left; i += WIDTH) f(i, WholeStep{});
  if (left) f(n - left, left);
}
// f(0), f(1), .. with numbers known when it is compiled: arrays indexed by them stay in registers.
template <int N, typename F>
inline void unroll(const F& f) {
  c10::ForcedUnroll<N>{}(f);
}

// f(first, count) over [0, n) in blocks of MAX, then of halves of it; counts are types.
template <int MAX, typename F>
inline void for_blocks(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + MAX <= n; i += MAX) f(i, std::integral_constant<int, MAX>{});
  if constexpr (MAX > 1) {
    if (i < n) for_blocks<MAX / 2>(n - i, [&](int64_t rest, auto count) { f(i + rest, count); });
  }
}

// Asks for the elements of a pair before they are wanted; they may lie past the end of anything.
template <typename T>
inline void prefetch_pair(const T* p) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < Pair<T>::width * int64_t(sizeof(T)); i += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + i, 0, 2);
  }
}
template <typename T>
inline Pair<T> load_pair(const T* p, WholeStep) {
  return Pair<T>::load(p);
}
template <typename T>
inline Pair<T> load_pair(const T* p, int64_t count) {
  return Pair<T>::load(p, count);
}
template <typename T>
inline void store_pair(const Pair<T>& v, T* p, WholeStep) {
  v.store(p);
}
template <typename T>
inline void store_pair(const Pair<T>& v, T* p, int64_t count) {
  v.store(p, count);
}

template <typename A>
inline A horizontal_sum(Vectorized<A> v) {
  return at::vec::vec_reduce_all<A>([](Vectorized<A>& x, Vectorized<A>& y) { return x + y; }, v);
}

// y[i] for n elements of type S, converted to T.
template <typename S, typename T>
inline void convert_row(const S* x, T* y, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    std::memcpy(static_cast<void*>(y), x, n * sizeof(T));
  } else if constexpr (std::is_same_v<acc_t<S>, acc_t<T>>) {
    for_steps<Pair<S>::width>(n, [&](int64_t i, auto step) {
      const auto v = load_pair(x + i, step);
      store_pair(Pair<T>{v.lo, v.hi}, y + i, step);
    });
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(x[i]);
  }
}

// x += factor * values, in the accumulation type.
template <typename T>
inline void add_to_row(T* x, const acc_t<T>* values, acc_t<T> factor, int64_t width) {
  using V = Vectorized<acc_t<T>>;
  for_steps<Pair<T>::width>(width, [&](int64_t l, auto step) {
    const auto old = load_pair(x + l, step);
    const auto v = load_pair(values + l, step);
    store_pair(Pair<T>{fmadd(V(factor), v.lo, old.lo), fmadd(V(factor), v.hi, old.hi)}, x + l, step);
  });
}

template <typename T>
inline void zero_rows(T* x, int64_t n) {
  advise_huge_pages(x, n * int64_t(sizeof(T)));
  at::parallel_for(0, n, int64_t{1} << 18, [&](int64_t begin, int64_t end) { std::fill(x + begin, x + end, T(0)); });
}

}  // namespace milkernels
