// The pooling driver: score each instance, softmax the scores inside its bag, sum the instances by their weights.
//
// Rows of all bags lie back to back and are cut into chunks of 256 (or 64), whatever the bags; a chunk is scored in tiles of
// kBlock rows that cross bag boundaries. The rows that chunk c and bag b share are one segment; its running softmax and
// weighted sum live in slot c + b of the partial results, which no other segment has, since from one segment to the
// next c or b or both grow. Slots of a bag are merged in order, so results do not depend on the number of threads.
//
// A score program plugs in with
//   int64_t heads() const;
//   Scratch make_scratch() const;
//   void scores(Tile<T>, A* scores [rows, heads], Scratch&) const;
//   Scratch make_backward_scratch() const;
//   template <DX> void backward(Tile<T>, const A* grad_scores, DX store_dx, Gradients of the slice, bool first, Scratch&);
#pragma once

#include <optional>
#include <vector>

#include "../online_softmax.h"
#include "matmul.h"

namespace milkernels {

// Rows of a chunk: fewer where there are few, so that all threads find work. They depend on shapes only.
constexpr int64_t kChunk = 256;
inline int64_t chunk_rows(int64_t rows) { return rows <= 2048 ? kBlock : kChunk; }

// Rows [first, first + rows) of x, never more than a chunk; mask null: all are real.
template <typename T>
struct Tile {
  const T* x;
  int64_t ld, width, first, rows;
  const bool* mask;

  Tile part(int64_t from, int64_t count) const {
    return {x + from * ld, ld, width, first + from, count, mask ? mask + from : nullptr};
  }
  bool any_real() const {
    return mask == nullptr || std::any_of(mask, mask + rows, [](bool m) { return m; });
  }
};

// Bags back to back: offsets have been checked.
template <typename T>
struct Ragged {
  const T* x;
  int64_t ld, width, rows;
  const bool* mask;
  std::vector<int64_t> offsets;

  int64_t bags() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t chunk() const { return chunk_rows(rows); }
  int64_t chunks() const { return ceil_div(rows, chunk()); }
  int64_t partials() const { return chunks() + bags(); }
  int64_t bag_of(int64_t row) const {
    return std::upper_bound(offsets.begin(), offsets.end(), row) - offsets.begin() - 1;
  }
  Tile<T> tile(int64_t first, int64_t count) const {
    return {x + first * ld, ld, width, first, count, mask ? mask + first : nullptr};
  }
  // f(bag, begin, end) for each bag with rows in [begin, end), in order.
  template <typename F>
  void for_bags(int64_t begin, int64_t end, const F& f) const {
    for (int64_t bag = bag_of(begin), row = begin; row < end; ++bag) {
      const int64_t stop = std::min(offsets[bag + 1], end);
      if (stop > row) f(bag, row, stop);
      row = stop;
    }
  }
};

// Rows of [begin, end) whose score for head k counts: selected, so that nothing an unselected row holds is touched.
template <typename A>
struct Selection {
  int32_t index[kChunk];
  A value[kChunk];
  int64_t count = 0;

  void select(const A* scores, int64_t rows, int64_t stride) {
    count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const A s = scores[r * stride];
      index[count] = static_cast<int32_t>(r);
      value[count] = s;
      count += s != -std::numeric_limits<A>::infinity();
    }
  }
  void exp_minus(A shift) {
    using V = Vectorized<A>;
    for (int64_t i = 0; i < count; i += V::size()) {
      const int64_t n = std::min<int64_t>(V::size(), count - i);
      exp_nonpositive<A>(V::loadu(value + i, n) - V(shift)).store(value + i, n);
    }
  }
};

// Partial results of the segments.
template <typename A>
struct Partials {
  int64_t heads, width;
  std::vector<SoftmaxState<A>> state;
  Buffer<A> sums;

  Partials(int64_t slots, int64_t heads, int64_t width)
      : heads(heads), width(width), state(slots * heads), sums(slots * heads * width) {}

  template <typename T>
  void add(int64_t slot, int64_t head, const Tile<T>& rows, const A* scores, Selection<A>& selected) {
    selected.select(scores + head, rows.rows, heads);
    if (selected.count == 0) return;
    SoftmaxState<A>& s = state[slot * heads + head];
    A max = s.max;
    for (int64_t i = 0; i < selected.count; ++i) max = std::max(max, selected.value[i]);
    const A scale = rescale(s.max, max);
    selected.exp_minus(max);
    A sum = 0;
    for (int64_t i = 0; i < selected.count; ++i) sum += selected.value[i];
    weighted_sum(rows.x, rows.ld, selected.index, selected.value, selected.count, width, scale,
                 sums.get() + (slot * heads + head) * width);
    s = {max, s.sum * scale + sum};
  }

  // Merges slots first, first + 1, .. last of one head, in order and in double.
  void merge(int64_t first, int64_t last, int64_t head, A* bag, A* lse) const {
    SoftmaxState<double> total;
    for (int64_t slot = first; slot <= last; ++slot) {
      total.max = std::max<double>(total.max, state[slot * heads + head].max);
    }
    std::vector<double> out(width, 0.);
    for (int64_t slot = first; slot <= last; ++slot) {
      const SoftmaxState<A>& s = state[slot * heads + head];
      if (s.sum == A(0)) continue;
      const double scale = rescale<double>(s.max, total.max);
      total.sum += scale * s.sum;
      const A* part = sums.get() + (slot * heads + head) * width;
      for (int64_t l = 0; l < width; ++l) out[l] += scale * part[l];
    }
    const bool empty = total.sum == 0.;
    for (int64_t l = 0; l < width; ++l) bag[l] = empty ? A(0) : static_cast<A>(out[l] / total.sum);
    *lse = static_cast<A>(log_sum_exp(total));
  }
};

// scores [rows, heads]; bag [bags, heads, width] and lse [bags, heads], or both null where only scores are wanted.
template <typename Program, typename T>
void pool_forward(const Program& program, const Ragged<T>& in, acc_t<T>* scores, acc_t<T>* bag, acc_t<T>* lse) {
  using A = acc_t<T>;
  const int64_t heads = program.heads();
  std::optional<Partials<A>> partials;
  if (bag != nullptr) partials.emplace(in.partials(), heads, in.width);

  parallel_items(in.chunks(), [&] { return program.make_scratch(); }, [&](int64_t chunk, auto& scratch) {
    Selection<A> selected;
    const int64_t end = std::min(in.rows, (chunk + 1) * in.chunk());
    for (int64_t first = chunk * in.chunk(); first < end; first += kBlock) {
      const Tile<T> tile = in.tile(first, std::min(kBlock, end - first));
      A* const out = scores + first * heads;
      if (!tile.any_real()) {
        std::fill_n(out, tile.rows * heads, -std::numeric_limits<A>::infinity());
        continue;
      }
      program.scores(tile, out, scratch);
      for (int64_t r = 0; r < tile.rows; ++r) {
        if (!is_real(tile.mask, r)) std::fill_n(out + r * heads, heads, -std::numeric_limits<A>::infinity());
      }
      if (!partials) continue;
      in.for_bags(first, first + tile.rows, [&](int64_t b, int64_t from, int64_t to) {
        const Tile<T> rows = tile.part(from - first, to - from);
        for (int64_t k = 0; k < heads; ++k) partials->add(chunk + b, k, rows, scores + from * heads, selected);
      });
    }
  });
  if (!partials) return;

  at::parallel_for(0, in.bags() * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, from = in.offsets[b], to = in.offsets[b + 1];
      const int64_t first = from / in.chunk() + b, last = from < to ? (to - 1) / in.chunk() + b : first - 1;
      partials->merge(first, last, i % heads, bag + i * in.width, lse + i);
    }
  });
}

// What the forward left and what comes back; a gradient that nobody gave is null. All in the accumulation type.
template <typename A>
struct PoolGradients {
  const A *bag, *scores, *lse;                 // [bags, heads, width], [rows, heads], [bags, heads]
  const A *grad_bag, *grad_scores, *grad_lse;  // of the same shapes
};

// Weights and score gradients of one chunk: [rows, heads].
template <typename A>
struct ChunkGradients {
  std::vector<A> weight, score;
};

// grad_score = weight * (<x - bag, grad_bag> + grad_lse) + what came back for the score itself.
template <typename T, typename A>
void score_gradients(const Ragged<T>& in, const PoolGradients<A>& g, int64_t heads, const Tile<T>& chunk,
                     ChunkGradients<A>& out) {
  out.weight.assign(kChunk * heads, A(0));
  out.score.assign(kChunk * heads, A(0));
  const bool weighted = g.grad_bag != nullptr || g.grad_lse != nullptr;
  Selection<A> selected;
  std::vector<A> dots(kChunk, A(0));
  in.for_bags(chunk.first, chunk.first + chunk.rows, [&](int64_t b, int64_t from, int64_t to) {
    const int64_t offset = from - chunk.first;
    for (int64_t k = 0; k < heads; ++k) {
      const int64_t bk = b * heads + k;
      selected.select(g.scores + from * heads + k, to - from, heads);
      if (g.grad_bag != nullptr) {
        centered_dots(chunk.x + offset * chunk.ld, chunk.ld, selected.index, selected.count, g.bag + bk * in.width,
                      g.grad_bag + bk * in.width, in.width, dots.data());
      }
      if (weighted) selected.exp_minus(g.lse[bk]);
      for (int64_t i = 0; i < selected.count; ++i) {
        const int64_t at = (offset + selected.index[i]) * heads + k;
        A grad = g.grad_scores ? g.grad_scores[(chunk.first * heads) + at] : A(0);
        if (weighted) {
          out.weight[at] = selected.value[i];
          grad += selected.value[i] * (dots[i] + (g.grad_lse ? g.grad_lse[bk] : A(0)));
        }
        out.score[at] = grad;
      }
    }
  });
}

// Rows are cut into slices, each with accumulators of its own for the parameter gradients: a number and a size that
// depend on shapes alone, so sums do not depend on the threads. Accumulators take at most 64 MB, but are at least 4.
inline int64_t num_slices(int64_t rows, int64_t accumulator_bytes) {
  const int64_t most = std::clamp<int64_t>((int64_t{64} << 20) / std::max<int64_t>(accumulator_bytes, 1), 4, 16);
  return std::clamp<int64_t>(ceil_div(rows, chunk_rows(rows)), 1, most);
}

// grad_x [rows, width] or null. `slices` holds the program's accumulators.
template <typename Program, typename T, typename Slices>
void pool_backward(const Program& program, const Ragged<T>& in, const PoolGradients<acc_t<T>>& g, T* grad_x,
                   Slices& slices) {
  using A = acc_t<T>;
  const int64_t heads = program.heads(), width = in.width;
  const int64_t slice_rows = ceil_div(in.chunks(), slices.count()) * in.chunk();
  if (grad_x != nullptr) advise_huge_pages(grad_x, in.rows * width * int64_t(sizeof(T)));

  parallel_items(slices.count(), [&] { return program.make_backward_scratch(); }, [&](int64_t slice, auto& scratch) {
    ChunkGradients<A> gradients;
    std::vector<int64_t> bag_of(kChunk);
    auto accumulators = slices.at(slice);
    bool first_chunk = true;
    const int64_t end = std::min(in.rows, (slice + 1) * slice_rows);
    for (int64_t first = slice * slice_rows; first < end; first += in.chunk()) {
      const Tile<T> chunk = in.tile(first, std::min(in.chunk(), end - first));
      if (!chunk.any_real()) {
        if (grad_x != nullptr) std::fill_n(grad_x + first * width, chunk.rows * width, T(0));
        continue;
      }
      score_gradients(in, g, heads, chunk, gradients);
      in.for_bags(first, first + chunk.rows, [&](int64_t b, int64_t from, int64_t to) {
        std::fill(bag_of.begin() + (from - first), bag_of.begin() + (to - first), b);
      });
      // grad_x of row r, columns [column, column + count): the program's part plus weight times the bag's gradient.
      const auto store_dx = [&](int64_t r, int64_t column, int64_t count, const A* part) {
        T* const to = grad_x + (first + r) * width + column;
        const A* const weight = gradients.weight.data() + r * heads;
        for_steps<Pair<T>::width>(count, [&](int64_t i, auto step) {
          auto sum = load_pair(part + i, step);
          for (int64_t k = 0; g.grad_bag != nullptr && k < heads; ++k) {
            if (weight[k] == A(0)) continue;
            const auto d = load_pair(g.grad_bag + (bag_of[r] * heads + k) * width + column + i, step);
            const Vectorized<A> w(weight[k]);
            sum = {fmadd(w, d.lo, sum.lo), fmadd(w, d.hi, sum.hi)};
          }
          store_pair(Pair<T>{sum.lo, sum.hi}, to + i, step);
        });
      };
      program.backward(chunk, gradients.score.data(), grad_x != nullptr, store_dx, accumulators, first_chunk, scratch);
      first_chunk = false;
    }
    if (first_chunk) accumulators.set_zero();
  });
}

}  // namespace milkernels
