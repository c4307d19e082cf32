// The pooling driver: score each instance, softmax the scores inside its bag, sum the instances by their weights.
//
// Rows of all bags lie back to back and are cut into chunks of 256 (or 64), whatever the bags; a chunk is read in tiles
// of kBlock rows that cross bag boundaries. The rows that chunk c and bag b share are one segment; what is summed over
// it lies in slot c + b of the partial results, which no other segment has, since from one segment to the next c or b
// or both grow. Slots of a bag are merged in order, so results do not depend on the number of threads.
//
// Score programs (attention_score.h, query_score.h, mlp_score.h) plug in as a Score, what is done with the scores as a
// reduction. Rows lie in memory or come from a source (instances.h), which makes them for a tile at a time; a stage
// (value.h) makes other rows to be pooled than were scored.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../online_softmax.h"
#include "heads.h"
#include "matmul.h"

namespace milkernels {

// Rows of a chunk: fewer where there are few, so that all threads find work. They depend on shapes only.
constexpr int64_t kChunk = 256;
inline int64_t chunk_rows(int64_t rows) { return rows <= 2048 ? kBlock : kChunk; }

template <typename A>
constexpr A kDead = -std::numeric_limits<A>::infinity();  // the score of a row that does not count

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

// Where a unit lies in its pass, see sums.h: in which item, and at which row.
struct Place {
  int64_t item, row;
};
constexpr int64_t kAllRows = std::numeric_limits<int64_t>::max();

// Rows that do not lie in memory. Workers belong to one thread each; T: the type in which rows are made.
template <typename T>
struct Source {
  struct Worker {
    virtual ~Worker() = default;
    virtual Tile<T> rows(const Tile<T>& tile) = 0;  // those of the tile, until others are made
    // After `rows` of this unit, from their gradient [rows, width], 0 in masked ones: what they were made of.
    virtual void backward(const Tile<T>& unit, const T* grad_rows, const Place& place) = 0;
    virtual void skip_backward(const Tile<T>& unit) = 0;  // in its place for a unit without a real row
  };
  virtual ~Source() = default;
  virtual std::unique_ptr<Worker> worker(int64_t rows) const = 0;  // for tiles or units of at most so many
  virtual bool has_gradient() const = 0;
  virtual int64_t pass_rows() const = 0;  // in a backward, as those of a Score
  virtual void add_pass(int64_t rows) const = 0;
};

// Bags back to back: offsets have been checked.
template <typename T>
struct Ragged {
  const T* x;
  int64_t ld, width, rows;
  const bool* mask;
  std::vector<int64_t> offsets;
  const Source<T>* source = nullptr;  // where x is null
  T* grad_x = nullptr;  // where the gradient of x goes in a backward; null: nowhere, or to the source

  bool has_gradient() const { return grad_x != nullptr || (source && source->has_gradient()); }
  int64_t bags() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t chunk() const { return chunk_rows(rows); }
  int64_t chunks() const { return ceil_div(rows, chunk()); }
  int64_t slots() const { return chunks() + bags(); }
  int64_t slot_of(int64_t row, int64_t bag) const { return row / chunk() + bag; }
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

// The rows of tiles of a chunk, one after another: those of a source are made for the rest of the chunk at once.
template <typename T>
class Reader {
 public:
  explicit Reader(const Ragged<T>& in) : in_(&in), worker_(in.source ? in.source->worker(in.chunk()) : nullptr) {}
  Tile<T> operator()(const Tile<T>& tile) {
    if (!worker_) return tile;
    if (tile.first < held_.first || tile.first + tile.rows > held_.first + held_.rows) {
      const int64_t end = std::min(in_->rows, (tile.first / in_->chunk() + 1) * in_->chunk());
      held_ = worker_->rows(in_->tile(tile.first, end - tile.first));
    }
    return held_.part(tile.first - held_.first, tile.rows);
  }
  typename Source<T>::Worker* source() const { return worker_.get(); }

 private:
  const Ragged<T>* in_;
  std::unique_ptr<typename Source<T>::Worker> worker_;
  Tile<T> held_{};
};

// work(tile, worker) for every tile; the tiles of a chunk go to one thread, in order.
template <typename T, typename MakeWorker, typename Work>
void for_tiles(const Ragged<T>& in, const MakeWorker& make_worker, const Work& work) {
  parallel_items(in.chunks(), make_worker, [&](int64_t chunk, auto& worker) {
    const int64_t end = std::min(in.rows, (chunk + 1) * in.chunk());
    for (int64_t first = chunk * in.chunk(); first < end; first += kBlock) {
      work(in.tile(first, std::min(kBlock, end - first)), worker);
    }
  });
}

// Rows of a segment that count: selected, so that nothing another row holds is touched.
template <typename A>
struct Selection {
  int32_t index[kChunk];
  int64_t count = 0;

  // f(first head, heads) for groups of heads for which the same rows count: all heads, unless some of a row's scores
  // are -inf and others not.
  template <typename F>
  void for_groups(const A* scores, int64_t rows, int64_t heads, const F& f) {
    bool mixed = false;
    count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t alive = 0;
      for (int64_t k = 0; k < heads; ++k) alive += scores[r * heads + k] != kDead<A>;
      index[count] = static_cast<int32_t>(r);
      count += alive != 0;
      mixed |= alive != 0 && alive != heads;
    }
    if (!mixed) {
      if (count > 0) f(int64_t{0}, heads);
      return;
    }
    for (int64_t k = 0; k < heads; ++k) {
      count = 0;
      for (int64_t r = 0; r < rows; ++r) {
        index[count] = static_cast<int32_t>(r);
        count += scores[r * heads + k] != kDead<A>;
      }
      if (count > 0) f(k, int64_t{1});
    }
  }
  void select(const bool* mask, int64_t rows) {
    count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      index[count] = static_cast<int32_t>(r);
      count += is_real(mask, r);
    }
  }
};

// x[i] = exp(x[i] - shift[i % heads])
template <typename A>
inline void exp_minus(A* x, int64_t n, const A* shift, int64_t heads) {
  using V = Vectorized<A>;
  for (int64_t i = 0; i < n; i += heads) {
    for (int64_t k = 0; k < heads; ++k) x[i + k] -= shift[k];
  }
  for (int64_t i = 0; i < n; i += V::size()) {
    const int64_t count = std::min<int64_t>(V::size(), n - i);
    exp_nonpositive<A>(V::loadu(x + i, count)).store(x + i, count);
  }
}

// Of one head, what slots first .. last [slots, heads] hold together.
inline SoftmaxState<double> merged(const SoftmaxState<double>* slots, int64_t first, int64_t last, int64_t heads,
                                   int64_t head) {
  SoftmaxState<double> total;
  for (int64_t slot = first; slot <= last; ++slot) total.max = std::max(total.max, slots[slot * heads + head].max);
  for (int64_t slot = first; slot <= last; ++slot) {
    const SoftmaxState<double>& s = slots[slot * heads + head];
    if (s.sum != 0.) total.sum += rescale(s.max, total.max) * s.sum;
  }
  return total;
}

// Sums over segments: of rows weighted by exp(score - max), or plain ones, which have the state {0, 1}.
template <typename A>
class Partials {
 public:
  Partials(int64_t slots, int64_t heads, int64_t width)
      : heads_(heads), width_(width), state_(slots * heads), sums_(slots * heads * width) {}

  struct Worker {
    Selection<A> selected;
    std::vector<A> weight, max, scale;
    bool streamed;  // rows come from memory
    explicit Worker(int64_t heads, bool streamed = false)
        : weight(kChunk * heads), max(heads), scale(heads), streamed(streamed) {}
  };

  // `scores` [rows, heads of all].
  template <typename T>
  void add_softmax(int64_t slot, const T* x, int64_t ld, int64_t rows, const A* scores, Worker& w) {
    w.selected.for_groups(scores, rows, heads_, [&](int64_t first, int64_t heads) {
      const int64_t n = w.selected.count;
      SoftmaxState<double>* const s = state_.data() + slot * heads_ + first;
      for (int64_t k = 0; k < heads; ++k) w.max[k] = static_cast<A>(s[k].max);
      for (int64_t i = 0; i < n; ++i) {
        const A* const from = scores + w.selected.index[i] * heads_ + first;
        for (int64_t k = 0; k < heads; ++k) {
          w.weight[i * heads + k] = from[k];
          w.max[k] = std::max(w.max[k], from[k]);
        }
      }
      exp_minus(w.weight.data(), n * heads, w.max.data(), heads);
      for (int64_t k = 0; k < heads; ++k) {
        double sum = 0;  // an error here would be common to all features of a bag, and to all score gradients
        for (int64_t i = 0; i < n; ++i) sum += w.weight[i * heads + k];
        w.scale[k] = rescale(static_cast<A>(s[k].max), w.max[k]);
        s[k] = {w.max[k], s[k].sum * w.scale[k] + sum};
      }
      weighted_sums(x, ld, w.selected.index, n, w.weight.data(), heads, w.scale.data(), width_, sum(slot, first),
                    w.streamed);
    });
  }

  // Plain sums with the weights [n, heads] of the rows in `index`.
  template <typename T>
  void add(int64_t slot, const T* x, int64_t ld, const int32_t* index, int64_t n, const A* weight, Worker& w) {
    if (n == 0) return;
    SoftmaxState<double>* const s = state_.data() + slot * heads_;
    for (int64_t k = 0; k < heads_; ++k) w.scale[k] = static_cast<A>(s[k].sum);  // 0 at first, then 1
    weighted_sums(x, ld, index, n, weight, heads_, w.scale.data(), width_, sum(slot, 0), w.streamed);
    for (int64_t k = 0; k < heads_; ++k) s[k] = {0., 1.};
  }

  // Merges slots first .. last of one head, in order and in double: columns [begin, end) of the sum, divided by the
  // total where a softmax is wanted. Nothing in the slots: 0.
  SoftmaxState<double> merge(int64_t first, int64_t last, int64_t head, bool softmax, int64_t begin, int64_t end,
                             A* out) const {
    const SoftmaxState<double> total = merge_state(first, last, head);
    std::vector<double> sums(end - begin, 0.);
    for (int64_t slot = first; slot <= last; ++slot) {
      const SoftmaxState<double>& s = state_[slot * heads_ + head];
      if (s.sum == 0.) continue;
      const double scale = rescale(s.max, total.max);
      const A* const part = sum(slot, head);
      for (int64_t l = begin; l < end; ++l) sums[l - begin] += scale * part[l];
    }
    const double divisor = softmax && total.sum != 0. ? total.sum : 1.;
    for (int64_t l = begin; l < end; ++l) out[l] = static_cast<A>(sums[l - begin] / divisor);
    return total;
  }

  // out [bags, heads, width]; lse [bags, heads] or null.
  template <typename T>
  void merge_bags(const Ragged<T>& in, bool softmax, A* out, A* lse) const {
    const int64_t blocks = std::max<int64_t>(ceil_div(width_, kMergeColumns), 1);
    at::parallel_for(0, in.bags() * heads_ * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t bh = i / blocks, b = bh / heads_, from = in.offsets[b], to = in.offsets[b + 1];
        const int64_t first = in.slot_of(from, b), last = from < to ? in.slot_of(to - 1, b) : first - 1;
        const int64_t column = i % blocks * kMergeColumns;
        const auto total = merge(first, last, bh % heads_, softmax, column, std::min(column + kMergeColumns, width_),
                                 out + bh * width_);
        if (lse != nullptr && column == 0) lse[bh] = static_cast<A>(log_sum_exp(total));
      }
    });
  }
  // Sums over all bags: out [heads, width].
  void merge_all(A* out) const {
    const int64_t blocks = ceil_div(width_, kMergeColumns), slots = static_cast<int64_t>(state_.size()) / heads_;
    at::parallel_for(0, heads_ * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / blocks, column = i % blocks * kMergeColumns;
        merge(0, slots - 1, head, false, column, std::min(column + kMergeColumns, width_), out + head * width_);
      }
    });
  }

  int64_t heads() const { return heads_; }

 private:
  static constexpr int64_t kMergeColumns = 256;
  SoftmaxState<double> merge_state(int64_t first, int64_t last, int64_t head) const {
    return merged(state_.data(), first, last, heads_, head);
  }
  A* sum(int64_t slot, int64_t head) const { return sums_.get() + (slot * heads_ + head) * width_; }

  int64_t heads_, width_;
  std::vector<SoftmaxState<double>> state_;
  Buffer<A> sums_;
};

template <typename T>
class InputGradient;  // pool_backward.h

// A score program. A worker belongs to one thread and holds its scratch.
template <typename T>
struct Score {
  using A = acc_t<T>;
  struct Worker {
    virtual ~Worker() = default;
    virtual void scores(const Tile<T>& tile, A* scores) = 0;  // [rows, heads]; what masked rows get is overwritten
    // From the gradient of the scores [kChunk, heads], 0 for masked rows and past the last: the program's part of
    // grad_x, and its sums for the parameters. Units of an item come in order.
    virtual void backward(const Tile<T>& unit, const A* grad_scores, const InputGradient<T>& grad_x,
                          const Place& place) = 0;
  };
  virtual ~Score() = default;
  virtual int64_t heads() const = 0;
  virtual std::unique_ptr<Worker> forward_worker() const = 0;
  virtual std::unique_ptr<Worker> backward_worker() const = 0;
  virtual bool reads_rows() const { return true; }
  virtual int64_t backward_rows() const { return kBlock; }  // of a unit: a tile, or a chunk for products over rows
  // Rows whose sums are added together, by all threads: of a pass, if the program has such sums.
  virtual int64_t pass_rows() const { return kAllRows; }
  virtual void add_pass(int64_t) const {}
  virtual bool whole_chunks() const { return true; }  // whether the tiles of a chunk go to one thread
};

// A value stage: the rows that are pooled, made of those that were scored. Workers as above.
template <typename T>
struct Stage {
  using A = acc_t<T>;
  struct Worker {
    virtual ~Worker() = default;
    virtual const A* rows(const Tile<T>& tile) = 0;  // [rows, width], ld apart
    // After `rows` of this unit, from their gradient [rows, width]: grad_x [rows, width of x] or null, and sums.
    virtual void backward(const Tile<T>& unit, A* grad_rows, A* grad_x, const Place& place) = 0;
  };
  virtual ~Stage() = default;
  virtual int64_t width() const = 0;
  virtual int64_t ld() const = 0;
  virtual std::unique_ptr<Worker> worker(int64_t rows) const = 0;  // for tiles or units of at most so many
  virtual int64_t pass_rows() const { return kAllRows; }
  virtual void add_pass(int64_t) const {}
};

// Reduction: bag vectors by softmax.
template <typename T>
class SoftmaxPool {
 public:
  using A = acc_t<T>;

  SoftmaxPool(const Ragged<T>& in, const Score<T>& score, const Stage<T>* stage, A* bag, A* lse)
      : in_(in), streamed_(!score.reads_rows() && in.source == nullptr), stage_(stage), bag_(bag), lse_(lse),
        partials_(in.slots(), score.heads(), stage ? stage->width() : in.width) {}

  struct Worker {
    typename Partials<A>::Worker partials;
    std::unique_ptr<typename Stage<T>::Worker> stage;
  };
  Worker worker() const {
    return {typename Partials<A>::Worker(partials_.heads(), streamed_), stage_ ? stage_->worker(kBlock) : nullptr};
  }
  void add(const Tile<T>& tile, const A* scores, Worker& w) {
    const int64_t heads = partials_.heads();
    const A* const staged = stage_ ? w.stage->rows(tile) : nullptr;
    in_.for_bags(tile.first, tile.first + tile.rows, [&](int64_t b, int64_t from, int64_t to) {
      const int64_t slot = in_.slot_of(from, b), at = from - tile.first;
      const A* const s = scores + at * heads;
      if (stage_) partials_.add_softmax(slot, staged + at * stage_->ld(), stage_->ld(), to - from, s, w.partials);
      else partials_.add_softmax(slot, tile.x + at * tile.ld, tile.ld, to - from, s, w.partials);
    });
  }
  void finish() { partials_.merge_bags(in_, true, bag_, lse_); }

 private:
  const Ragged<T>& in_;
  bool streamed_;
  const Stage<T>* stage_;
  A *bag_, *lse_;
  Partials<A> partials_;
};

// Reduction: scores alone.
struct NoPool {
  struct Worker {};
  Worker worker() const { return {}; }
  template <typename Tile, typename A>
  void add(const Tile&, const A*, Worker&) {}
  void finish() {}
};

// scores [rows, heads].
template <typename T, typename Reduction>
void pool_forward(const Score<T>& score, const Ragged<T>& in, acc_t<T>* scores, Reduction&& reduction) {
  using A = acc_t<T>;
  const int64_t heads = score.heads();
  const auto make_worker = [&] { return std::tuple(Reader<T>(in), score.forward_worker(), reduction.worker()); };
  for_tiles(in, make_worker, [&](const Tile<T>& tile, auto& worker) {
    A* const out = scores + tile.first * heads;
    if (!tile.any_real()) {
      std::fill_n(out, tile.rows * heads, kDead<A>);
      return;
    }
    auto& [read, program, reduced] = worker;
    const Tile<T> rows = read(tile);
    program->scores(rows, out);
    for (int64_t r = 0; tile.mask != nullptr && r < tile.rows; ++r) {
      if (!tile.mask[r]) std::fill_n(out + r * heads, heads, kDead<A>);
    }
    reduction.add(rows, out, reduced);
  });
  reduction.finish();
}

}  // namespace milkernels
