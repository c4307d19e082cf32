// Score programs that cost a few dot products for each instance, so that reading x is what they cost:
//   given       score[i, k] = an input
//   query       score[i, k] = <x_i, q[b, k]> + shift[b, k], b the bag of i (DSMIL with a linear query, Li et al. 2021)
//   logsumexp   score[i] = log sum_c exp(<x_i, W_c> + b_c) (Loss-Attention, Shi et al. 2020)
#pragma once

#include <array>
#include <cmath>
#include <numeric>

#include "pool_backward.h"

namespace milkernels {

inline const std::array<int32_t, kChunk> kEveryRow = [] {
  std::array<int32_t, kChunk> rows;
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}();

template <typename T>
class GivenScore final : public Score<T> {
 public:
  using A = acc_t<T>;

  // scores and, for the backward, their gradient (or null): [rows, heads].
  GivenScore(const Ragged<T>& in, int64_t heads, const A* scores, A* grad_scores)
      : in_(in), heads_(heads), scores_(scores), grad_scores_(grad_scores) {}
  int64_t heads() const override { return heads_; }
  bool reads_rows() const override { return false; }
  std::unique_ptr<typename Score<T>::Worker> forward_worker() const override { return std::make_unique<Worker>(*this); }
  std::unique_ptr<typename Score<T>::Worker> backward_worker() const override {
    return std::make_unique<Worker>(*this);
  }

 private:
  struct Worker final : Score<T>::Worker {
    const GivenScore& program;
    explicit Worker(const GivenScore& p) : program(p) {}

    void scores(const Tile<T>& tile, A* scores) override {
      std::copy_n(program.scores_ + tile.first * program.heads_, tile.rows * program.heads_, scores);
    }
    void backward(const Tile<T>& unit, const A* grad_scores, const InputGradient<T>& grad_x, const Place&) override {
      if (program.grad_scores_ != nullptr) {
        std::copy_n(grad_scores, unit.rows * program.heads_, program.grad_scores_ + unit.first * program.heads_);
      }
      if (!grad_x) return;
      program.in_.for_bags(unit.first, unit.first + unit.rows, [&](int64_t, int64_t from, int64_t to) {
        grad_x.store_rows(from - unit.first, to - from, nullptr, nullptr, 0);
      });
    }
  };

  const Ragged<T>& in_;
  int64_t heads_;
  const A* scores_;
  A* grad_scores_;
};

// The queries of all bags: those of bag b are q + b * bag_stride, and so for shift (null: none). A shift of -inf leaves
// the head of that bag without scores.
template <typename A>
struct Queries {
  const A* q;  // [heads, width]
  int64_t heads, bag_stride;
  const A* shift;  // [heads]
  int64_t shift_stride;
};

// Scores of rows by the queries of their bags, and what the queries get back. Rows are those of x, or hidden ones made
// of them, of type R: `rows` holds those of the tile, ld apart.
template <typename T, typename R = T>
class QueryProducts {
 public:
  using A = acc_t<T>;
  using Worker = typename Partials<A>::Worker;

  QueryProducts(const Ragged<T>& in, const Queries<A>& queries, int64_t width)
      : in_(in), queries_(queries), width_(width),
        vectors_(queries.q, queries.bag_stride ? in.bags() * queries.heads : queries.heads, width) {}
  int64_t heads() const { return queries_.heads; }
  Worker worker() const { return Worker(queries_.heads); }

  void scores(const Tile<T>& tile, const R* rows, int64_t ld, A* scores, bool streamed) const {
    const auto& q = queries_;
    in_.for_bags(tile.first, tile.first + tile.rows, [&](int64_t b, int64_t from, int64_t to) {
      const int64_t at = from - tile.first, n = to - from;
      A* const out = scores + at * q.heads;
      dots(rows + at * ld, ld, kEveryRow.data(), n, nullptr, vectors_.from(q.bag_stride ? b * q.heads : 0),
           vectors_.ld(), q.heads, width_, out, streamed);
      for (int64_t k = 0; q.shift != nullptr && k < q.heads; ++k) {
        const A shift = q.shift[b * q.shift_stride + k];
        for (int64_t r = 0; r < n; ++r) out[r * q.heads + k] = shift == kDead<A> ? shift : out[r * q.heads + k] + shift;
      }
    });
  }

  // Before a backward in which the queries have a gradient.
  void prepare_gradient() {
    sums_.emplace(in_.slots(), queries_.heads, width_);
    shift_sums_.assign(in_.slots() * queries_.heads, 0.);
  }
  // f(bag, first row in the tile, rows, their queries) for each bag of the unit, after its sums were taken.
  template <typename F>
  void backward(const Tile<T>& unit, const R* rows, int64_t ld, const A* grad_scores, Worker& w, const F& f) const {
    in_.for_bags(unit.first, unit.first + unit.rows, [&](int64_t b, int64_t from, int64_t to) {
      const int64_t at = from - unit.first;
      if (sums_) add(unit.part(at, to - from), rows + at * ld, ld, in_.slot_of(from, b), grad_scores + at * heads(), w);
      f(at, to - from, queries_.q + b * queries_.bag_stride);
    });
  }
  // After it: of each bag [bags, heads, width], or of queries that all bags share [heads, width]; and of shared shifts.
  // With the softmax's part of the score gradients, sum_i a_i (<x_i - bag, grad_bag> + grad_lse), goes an error that
  // all instances of a bag share. Those of the first term sum to 0, so what they do sum to is known, and its share of
  // the gradient, that times the bag, is taken off where the bag was made of the rows that were scored (else null).
  void gradient_of_bags(A* grad_q, const PoolGradients<A>* g) const {
    sums_->merge_bags(in_, false, grad_q, nullptr);
    if (g != nullptr) add_excess(*g, grad_q, heads() * width_);
  }
  void gradient(A* grad_q, const PoolGradients<A>* g) const {
    sums_->merge_all(grad_q);
    if (g != nullptr) add_excess(*g, grad_q, 0);
  }
  void shift_gradient(A* grad_shift) const {
    for (int64_t k = 0; k < heads(); ++k) {
      double sum = 0;
      for (size_t i = k; i < shift_sums_.size(); i += heads()) sum += shift_sums_[i];
      grad_shift[k] = static_cast<A>(sum);
    }
  }

 private:
  void add_excess(const PoolGradients<A>& g, A* grad_q, int64_t bag_stride) const {
    if (g.grad_bag == nullptr && g.grad_lse == nullptr) return;
    for (int64_t b = 0; b < in_.bags(); ++b) {
      const int64_t from = in_.offsets[b], to = in_.offsets[b + 1];
      for (int64_t k = 0; from < to && k < heads(); ++k) {
        const int64_t bk = b * heads() + k;
        double excess = g.grad_lse ? -double(g.grad_lse[bk]) : 0.;
        for (int64_t slot = in_.slot_of(from, b); slot <= in_.slot_of(to - 1, b); ++slot) {
          excess += shift_sums_[slot * heads() + k];
        }
        for (int64_t row = from; g.grad_scores != nullptr && row < to; ++row) {
          if (g.scores[row * heads() + k] != kDead<A>) excess -= g.grad_scores[row * heads() + k];
        }
        if (g.lse[bk] == kDead<A>) continue;  // nothing counts
        add_to_row(grad_q + b * bag_stride + k * width_, g.bag + bk * width_, static_cast<A>(-excess), width_);
      }
    }
  }
  void add(const Tile<T>& tile, const R* rows, int64_t ld, int64_t slot, const A* grads, Worker& w) const {
    w.selected.select(tile.mask, tile.rows);
    double* const shift = shift_sums_.data() + slot * heads();
    for (int64_t i = 0; i < w.selected.count; ++i) {
      for (int64_t k = 0; k < heads(); ++k) {
        const A grad = grads[w.selected.index[i] * heads() + k];
        w.weight[i * heads() + k] = grad;
        shift[k] += grad;
      }
    }
    sums_->add(slot, rows, ld, w.selected.index, w.selected.count, w.weight.data(), w);
  }

  const Ragged<T>& in_;
  Queries<A> queries_;
  int64_t width_;
  RowVectors<R> vectors_;
  mutable std::optional<Partials<A>> sums_;  // a slot is written by one thread
  mutable std::vector<double> shift_sums_;
};

template <typename T>
class QueryScore final : public Score<T> {
 public:
  using A = acc_t<T>;

  QueryScore(const Ragged<T>& in, const Queries<A>& queries)
      : products(in, queries, in.width), streamed_(in.source == nullptr) {}
  int64_t heads() const override { return products.heads(); }
  std::unique_ptr<typename Score<T>::Worker> forward_worker() const override { return std::make_unique<Worker>(*this); }
  std::unique_ptr<typename Score<T>::Worker> backward_worker() const override {
    return std::make_unique<Worker>(*this);
  }

  QueryProducts<T> products;

 private:
  struct Worker final : Score<T>::Worker {
    const QueryProducts<T>& products;
    typename QueryProducts<T>::Worker worker;
    bool streamed;
    explicit Worker(const QueryScore& p) : products(p.products), worker(p.products.worker()), streamed(p.streamed_) {}

    void scores(const Tile<T>& tile, A* scores) override { products.scores(tile, tile.x, tile.ld, scores, streamed); }
    void backward(const Tile<T>& unit, const A* grad_scores, const InputGradient<T>& grad_x, const Place&) override {
      products.backward(unit, unit.x, unit.ld, grad_scores, worker, [&](int64_t at, int64_t n, const A* queries) {
        if (grad_x) grad_x.store_rows(at, n, grad_scores + at * products.heads(), queries, products.heads());
      });
    }
  };

  bool streamed_;  // rows come from memory
};

template <typename T>
class LogSumExpScore final : public Score<T> {
 public:
  using A = acc_t<T>;
  using V = Vectorized<A>;

  // logits [rows, classes] are written by the forward and read by the backward; their own gradient may be null.
  LogSumExpScore(const Ragged<T>& in, const Queries<A>& classes, A* logits, const A* grad_logits)
      : classes_(in, classes), logits_(logits), grad_logits_(grad_logits) {}
  int64_t heads() const override { return 1; }
  std::unique_ptr<typename Score<T>::Worker> forward_worker() const override {
    return std::make_unique<Worker>(*this, classes_.forward_worker());
  }
  std::unique_ptr<typename Score<T>::Worker> backward_worker() const override {
    return std::make_unique<Worker>(*this, classes_.backward_worker());
  }
  QueryProducts<T>& classes() { return classes_.products; }

 private:
  struct Worker final : Score<T>::Worker {
    const LogSumExpScore& program;
    std::unique_ptr<typename Score<T>::Worker> classes;
    std::vector<A> by_class, grad_logits;
    static constexpr int64_t kRows = V::size();

    Worker(const LogSumExpScore& p, std::unique_ptr<typename Score<T>::Worker> classes)
        : program(p), classes(std::move(classes)), by_class(p.classes_.heads() * kRows),
          grad_logits(kChunk * p.classes_.heads()) {}

    void scores(const Tile<T>& tile, A* scores) override {
      const int64_t C = program.classes_.heads();
      A* const logits = program.logits_ + tile.first * C;
      classes->scores(tile, logits);
      for (int64_t r = 0; r < tile.rows; r += kRows) {
        const int64_t n = std::min(kRows, tile.rows - r);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t c = 0; c < C; ++c) by_class[c * kRows + i] = logits[(r + i) * C + c];
        }
        V max = V::loadu(by_class.data()), sum(A(0));
        for (int64_t c = 1; c < C; ++c) max = at::vec::maximum(max, V::loadu(by_class.data() + c * kRows));
        for (int64_t c = 0; c < C; ++c) sum = sum + exp_nonpositive<A>(V::loadu(by_class.data() + c * kRows) - max);
        V::blendv(max + sum.log(), max, max.abs() == V(-kDead<A>)).store(scores + r, n);  // of inf and -inf themselves
      }
      for (int64_t r = 0; tile.mask != nullptr && r < tile.rows; ++r) {
        if (!tile.mask[r]) std::fill_n(logits + r * C, C, kDead<A>);
      }
    }

    // A logit's gradient is the score's times its share of the sum, and what came back for the logit itself.
    void backward(const Tile<T>& unit, const A* grad_scores, const InputGradient<T>& grad_x,
                  const Place& place) override {
      const int64_t C = program.classes_.heads();
      const A* const logits = program.logits_ + unit.first * C;
      for (int64_t r = 0; r < unit.rows; r += kRows) {
        const int64_t n = std::min(kRows, unit.rows - r);
        A score[kRows] = {}, grad[kRows] = {};
        for (int64_t i = 0; i < n; ++i) {
          const A* const row = logits + (r + i) * C;
          A max = row[0];
          for (int64_t c = 0; c < C; ++c) max = std::max(max, row[c]);
          const bool counts = is_real(unit.mask, r + i) && max != kDead<A>;
          score[i] = counts ? max : A(0);
          grad[i] = counts ? grad_scores[r + i] : A(0);
          for (int64_t c = 0; c < C; ++c) by_class[c * kRows + i] = counts ? row[c] : A(0);
        }
        const V max = V::loadu(score);
        V sum(A(0));
        for (int64_t c = 0; c < C; ++c) {
          const V e = exp_nonpositive<A>(V::loadu(by_class.data() + c * kRows) - max);
          e.store(by_class.data() + c * kRows);
          sum = sum + e;
        }
        const V factor = V::loadu(grad) / sum;
        for (int64_t c = 0; c < C; ++c) {
          (V::loadu(by_class.data() + c * kRows) * factor).store(by_class.data() + c * kRows);
        }
        for (int64_t i = 0; i < n; ++i) {
          const A* const direct = program.grad_logits_ ? program.grad_logits_ + (unit.first + r + i) * C : nullptr;
          for (int64_t c = 0; c < C; ++c) {
            A g = by_class[c * kRows + i];
            if (direct != nullptr && is_real(unit.mask, r + i)) g += direct[c];
            grad_logits[(r + i) * C + c] = g;
          }
        }
      }
      classes->backward(unit, grad_logits.data(), grad_x, place);
    }
  };

  QueryScore<T> classes_;
  A* logits_;
  const A* grad_logits_;
};

// Reduction: the largest score of each bag and head, and the row that has it: the first of equal ones, NaN before any
// number; no row where all are -inf.
template <typename T>
class FirstMax {
 public:
  using A = acc_t<T>;

  // values and indices are [bags, heads].
  FirstMax(const Ragged<T>& in, int64_t heads, A* values, int64_t* indices)
      : in_(in), heads_(heads), values_(values), indices_(indices), best_(in.slots() * heads) {}

  struct Worker {};
  Worker worker() const { return {}; }
  void add(const Tile<T>& tile, const A* scores, Worker&) {
    in_.for_bags(tile.first, tile.first + tile.rows, [&](int64_t b, int64_t from, int64_t to) {
      Best* const best = best_.data() + in_.slot_of(from, b) * heads_;
      for (int64_t row = from; row < to; ++row) {
        if (!is_real(tile.mask, row - tile.first)) continue;
        for (int64_t k = 0; k < heads_; ++k) best[k].offer({scores[(row - tile.first) * heads_ + k], row});
      }
    });
  }
  void finish() {
    for (int64_t b = 0; b < in_.bags(); ++b) {
      for (int64_t k = 0; k < heads_; ++k) {
        Best best;
        const int64_t from = in_.offsets[b], to = in_.offsets[b + 1];
        for (int64_t slot = in_.slot_of(from, b); from < to && slot <= in_.slot_of(to - 1, b); ++slot) {
          best.offer(best_[slot * heads_ + k]);
        }
        values_[b * heads_ + k] = best.value;
        indices_[b * heads_ + k] = best.row;
      }
    }
  }

 private:
  struct Best {
    A value = kDead<A>;
    int64_t row = -1;
    void offer(const Best& other) {
      if (other.value > value || (std::isnan(other.value) && !std::isnan(value))) *this = other;
    }
  };

  const Ragged<T>& in_;
  int64_t heads_;
  A* values_;
  int64_t* indices_;
  std::vector<Best> best_;
};

}  // namespace milkernels
