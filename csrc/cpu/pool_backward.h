// The backward of the pooling driver: from the gradients of bag vectors, scores and lse to those of the scores and of
// the rows, unit by unit; a unit is a tile or a chunk, as the score program wants it.
#pragma once

#include "sums.h"

namespace milkernels {

// What the forward left and what comes back; a gradient that nobody gave is null. All in the accumulation type.
template <typename A>
struct PoolGradients {
  const A *bag, *scores, *lse;                 // [bags, heads, width pooled], [rows, heads], [bags, heads]
  const A *grad_bag, *grad_scores, *grad_lse;  // of the same shapes
};

// Where the gradient of a unit's rows is written, and what the pooling itself adds to it: weight times the bag's
// gradient or, behind a stage, what came through the stage.
template <typename T>
class InputGradient {
 public:
  using A = acc_t<T>;
  T* to = nullptr;  // row 0 of the unit; null: nobody wants it
  int64_t width = 0, heads = 0;
  const bool* mask = nullptr;
  const A* weight = nullptr;       // [rows, heads]; null behind a stage, and where only scores have a gradient
  const A* grad_bag = nullptr;     // [bags, heads, width]
  const int64_t* bag_of = nullptr;  // [rows]
  const A* staged = nullptr;       // [rows, width], or null
  bool finite = true;              // grad_bag is, so that a weight of 0 may be multiplied with it

  explicit operator bool() const { return to != nullptr; }

  // Row r, columns [column, column + count): the program's part is given.
  void store(int64_t r, int64_t column, int64_t count, const A* part) const {
    T* const y = to + r * width + column;
    for_steps<Pair<T>::width>(count, [&](int64_t i, auto step) {
      auto sum = load_pair(part + i, step);
      for (int64_t k = 0; weight != nullptr && k < heads; ++k) {
        const A w = weight[r * heads + k];
        if (w == A(0)) continue;
        const auto d = load_pair(grad_bag + (bag_of[r] * heads + k) * width + column + i, step);
        sum = {fmadd(Vectorized<A>(w), d.lo, sum.lo), fmadd(Vectorized<A>(w), d.hi, sum.hi)};
      }
      if (staged != nullptr) {
        const auto d = load_pair(staged + r * width + column + i, step);
        sum = {sum.lo + d.lo, sum.hi + d.hi};
      }
      store_pair(Pair<T>{sum.lo, sum.hi}, y + i, step);
    });
  }

  // Rows [from, from + n) of one bag, whose part is coefficients [n, terms] times vectors [terms, width].
  void store_rows(int64_t from, int64_t n, const A* coefficient, const A* vectors, int64_t terms) const {
    const int64_t pooled = weight != nullptr ? heads : 0, all = pooled + terms;
    std::vector<const A*> vector(all + 1);
    std::vector<A> c(n * (all + 1));
    for (int64_t k = 0; k < pooled; ++k) vector[k] = grad_bag + (bag_of[from] * heads + k) * width;
    for (int64_t j = 0; j < terms; ++j) vector[pooled + j] = vectors + j * width;
    if (staged == nullptr && finite) {
      for (int64_t r = 0; r < n; ++r) {
        if (pooled) std::copy_n(weight + (from + r) * heads, heads, c.data() + r * all);
        std::copy_n(coefficient + r * terms, terms, c.data() + r * all + pooled);
      }
      combine(c.data(), vector.data(), all, n, width, to + from * width, width);
    } else {
      for (int64_t r = 0; r < n; ++r) {
        int64_t used = 0;
        std::vector<const A*> row(all + 1);
        const auto use = [&](A w, const A* v) {
          if (w == A(0)) return;
          c[used] = w;
          row[used++] = v;
        };
        for (int64_t k = 0; k < pooled; ++k) use(weight[(from + r) * heads + k], vector[k]);
        for (int64_t j = 0; j < terms; ++j) use(coefficient[r * terms + j], vector[pooled + j]);
        if (staged != nullptr) use(A(1), staged + (from + r) * width);
        combine(c.data(), row.data(), used, 1, width, to + (from + r) * width, width);
      }
    }
    for (int64_t r = 0; mask != nullptr && r < n; ++r) {
      if (!mask[from + r]) std::fill_n(to + (from + r) * width, width, T(0));
    }
  }
};

// Turns the pooling's gradients into those of scores and rows, unit by unit.
template <typename T>
class ScoreGradients {
 public:
  using A = acc_t<T>;

  // `width`: of the rows that were pooled; `streamed`: these come from memory.
  ScoreGradients(const Ragged<T>& in, const PoolGradients<A>& g, int64_t heads, int64_t width, bool streamed)
      : in_(in), g_(g), heads_(heads), width_(width), streamed_(streamed), as_rows_(g, of_bag(in, g, heads), width),
        as_staged_(g, of_bag(in, g, heads), width), centre_(in.bags(), 0), correction_(in.bags() * heads, A(0)) {
    if (g.grad_bag != nullptr || g.grad_lse != nullptr) normalise();
    if (g.grad_bag == nullptr) return;
    // All heads of a bag subtract the same centre, and what a head's own would have given is added to its dot products:
    // heads are then read together, and no digits are lost that eager PyTorch keeps.
    at::parallel_for(0, heads > 1 ? in.bags() : 0, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t c = centre_[b] = smallest_bag(b);
        const A* const centre = g.bag + (b * heads + c) * width;
        for (int64_t k = 0; k < heads; ++k) {
          double sum = 0;
          const A *const bag = g.bag + (b * heads + k) * width, *const grad = g.grad_bag + (b * heads + k) * width;
          for (int64_t l = 0; k != c && l < width; ++l) sum += (double(centre[l]) - bag[l]) * grad[l];
          correction_[b * heads + k] = static_cast<A>(sum);
        }
      }
    });
    finite_ = std::all_of(g.grad_bag, g.grad_bag + in.bags() * heads * width, [](A v) { return std::isfinite(v); });
  }

  bool finite() const { return finite_; }

  struct Worker {
    std::vector<A> weight, score, dot, exp;  // [kChunk, heads]
    Selection<A> selected;
    explicit Worker(int64_t heads)
        : weight(kChunk * heads), score(kChunk * heads), dot(kChunk * heads), exp(kChunk * heads) {}
  };

  // grad_score = weight * (<row - bag, grad_bag> + grad_lse) + what came back for the score itself. `rows` are those
  // that were pooled.
  template <typename R>
  void operator()(const Tile<T>& unit, const R* rows, int64_t ld, Worker& w) const {
    std::fill(w.weight.begin(), w.weight.end(), A(0));
    std::fill(w.score.begin(), w.score.end(), A(0));
    const bool weighted = g_.grad_bag != nullptr || g_.grad_lse != nullptr;
    in_.for_bags(unit.first, unit.first + unit.rows, [&](int64_t b, int64_t from, int64_t to) {
      const int64_t offset = from - unit.first;
      const A* const scores = g_.scores + from * heads_;
      w.selected.for_groups(scores, to - from, heads_, [&](int64_t first, int64_t heads) {
        const int64_t n = w.selected.count, bh = b * heads_ + first;
        const bool alone = heads < heads_;  // then a head is its own centre
        if (g_.grad_bag != nullptr) {
          const auto& [bags, grads] = vectors<R>();
          dots(rows + offset * ld, ld, w.selected.index, n, bags.from(alone ? bh : b * heads_ + centre_[b]),
               grads.from(bh), grads.ld(), heads, width_, w.dot.data(), streamed_);
        }
        for (int64_t i = 0; i < n; ++i) {
          std::copy_n(scores + w.selected.index[i] * heads_ + first, heads, w.exp.data() + i * heads);
        }
        if (weighted) exp_minus(w.exp.data(), n * heads, g_.lse + bh, heads);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t k = 0; k < heads; ++k) {
            const int64_t at = (offset + w.selected.index[i]) * heads_ + first + k;
            A grad = g_.grad_scores ? g_.grad_scores[unit.first * heads_ + at] : A(0);
            if (weighted) {
              A inner = g_.grad_lse ? g_.grad_lse[bh + k] : A(0);
              if (g_.grad_bag) inner += w.dot[i * heads + k] + (alone ? A(0) : correction_[bh + k]);
              w.weight[at] = w.exp[i * heads + k] * normal_[bh + k];
              grad += w.weight[at] * inner;
            }
            w.score[at] = grad;
          }
        }
      });
    });
  }

 private:
  static int64_t of_bag(const Ragged<T>& in, const PoolGradients<A>& g, int64_t heads) {
    return g.grad_bag != nullptr ? in.bags() * heads : 0;
  }
  template <typename R>
  const auto& vectors() const {
    if constexpr (std::is_same_v<R, T>) return as_rows_;
    else return as_staged_;
  }

  // The head whose bag vector is the smallest of those that are finite and of some rows: a head that looks at an
  // outlier or at NaN must not take the digits of the others.
  int64_t smallest_bag(int64_t b) const {
    double least = std::numeric_limits<double>::infinity();
    int64_t head = 0;
    for (int64_t k = 0; k < heads_; ++k) {
      if (!std::isfinite(g_.lse[b * heads_ + k])) continue;
      const A* const bag = g_.bag + (b * heads_ + k) * width_;
      double squares = 0;
      for (int64_t l = 0; l < width_; ++l) squares += double(bag[l]) * bag[l];
      if (squares < least) least = squares, head = k;
    }
    return head;
  }

  // exp(score - lse) sums to 1 over a bag but for the rounding of lse, which large scores make coarse: what it sums to
  // is divided out.
  void normalise() {
    const auto exp_sum = [&](int64_t bh, int64_t from, int64_t to) {
      using V = Vectorized<A>;
      V sum(A(0));
      const V lse(g_.lse[bh]), dead(kDead<A>);
      for (int64_t row = from; row < to; row += V::size()) {
        A s[V::size()];
        for (int64_t i = 0; i < V::size(); ++i) {
          s[i] = row + i < to ? g_.scores[(row + i) * heads_ + bh % heads_] : kDead<A>;
        }
        const V score = V::loadu(s);
        sum = sum + V::blendv(exp_nonpositive<A>(score - lse), V(A(0)), score == dead);
      }
      return static_cast<double>(horizontal_sum(sum));
    };
    std::vector<double> slots(in_.slots() * heads_, 0.);
    at::parallel_for(0, in_.chunks(), 8, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * in_.chunk(), in_.rows);
      for (int64_t first = begin * in_.chunk(); first < last; first += in_.chunk()) {
        in_.for_bags(first, std::min(first + in_.chunk(), last), [&](int64_t b, int64_t from, int64_t to) {
          double* const slot = slots.data() + in_.slot_of(from, b) * heads_;
          for (int64_t k = 0; k < heads_; ++k) slot[k] = exp_sum(b * heads_ + k, from, to);
        });
      }
    });
    normal_.resize(in_.bags() * heads_);
    for (int64_t i = 0; i < in_.bags() * heads_; ++i) {
      const int64_t b = i / heads_, from = in_.offsets[b], to = in_.offsets[b + 1];
      double sum = 0;
      for (int64_t slot = in_.slot_of(from, b); from < to && slot <= in_.slot_of(to - 1, b); ++slot) {
        sum += slots[slot * heads_ + i % heads_];
      }
      normal_[i] = static_cast<A>(1. / sum);
    }
  }

  const Ragged<T>& in_;
  PoolGradients<A> g_;
  int64_t heads_, width_;
  bool streamed_;
  // Bag vectors and their gradients, to multiply rows with.
  template <typename R>
  struct BagVectors {
    RowVectors<R> bags, grads;
    BagVectors(const PoolGradients<A>& g, int64_t count, int64_t width)
        : bags(g.bag, count, width), grads(g.grad_bag, count, width) {}
  };
  BagVectors<T> as_rows_;
  BagVectors<A> as_staged_;
  std::vector<A> normal_;  // [bags, heads]
  std::vector<int64_t> centre_;
  std::vector<A> correction_;
  bool finite_ = true;
};

template <typename T>
void pool_backward(const Score<T>& score, const Stage<T>* stage, const Ragged<T>& in,
                   const PoolGradients<acc_t<T>>& g) {
  using A = acc_t<T>;
  const int64_t heads = score.heads(), width = in.width, pooled_width = stage ? stage->width() : width;
  const int64_t pass = std::min(
      {score.pass_rows(), stage ? stage->pass_rows() : kAllRows, in.source ? in.source->pass_rows() : kAllRows});
  const int64_t item_rows = stage || in.source || score.whole_chunks() ? in.chunk() : kBlock;
  const int64_t unit_rows = std::min(in.chunk(), stage || in.source ? kChunk : score.backward_rows());
  const ScoreGradients<T> score_gradients(in, g, heads, pooled_width, !stage && !in.source);
  if (in.grad_x != nullptr) advise_huge_pages(in.grad_x, in.rows * width * int64_t(sizeof(T)));

  struct Worker {
    Reader<T> read;
    std::unique_ptr<typename Score<T>::Worker> score;
    std::unique_ptr<typename Stage<T>::Worker> stage;
    typename ScoreGradients<T>::Worker gradients;
    std::vector<int64_t> bag_of;
    Buffer<A> grad_rows, staged;
    Buffer<T> grad_x;  // of the source's rows
  };
  const auto make_worker = [&] {
    const int64_t staged = stage ? kChunk : 0;
    return Worker{Reader<T>(in),
                  score.backward_worker(),
                  stage ? stage->worker(kChunk) : nullptr,
                  typename ScoreGradients<T>::Worker(heads),
                  std::vector<int64_t>(kChunk),
                  Buffer<A>(staged * pooled_width),
                  Buffer<A>(in.has_gradient() ? staged * width : 0),
                  Buffer<T>(in.source && in.has_gradient() ? kChunk * width : 0)};
  };
  const auto run = [&](int64_t start, int64_t item, Worker& w) {
    const int64_t begin = start + item * item_rows, end = std::min(in.rows, begin + item_rows);
    for (int64_t first = begin; first < end; first += unit_rows) {
      const Place at{item, first - start};
      const Tile<T> tile = in.tile(first, std::min(unit_rows, end - first));
      if (!tile.any_real()) {
        if (in.grad_x != nullptr) std::fill_n(in.grad_x + first * width, tile.rows * width, T(0));
        if (in.source) w.read.source()->skip_backward(tile);
        continue;
      }
      const Tile<T> unit = w.read(tile);
      in.for_bags(first, first + unit.rows, [&](int64_t b, int64_t from, int64_t to) {
        std::fill(w.bag_of.begin() + (from - first), w.bag_of.begin() + (to - first), b);
      });
      InputGradient<T> out;
      if (in.has_gradient()) out.to = in.source ? w.grad_x.get() : in.grad_x + first * width;
      out.width = width, out.heads = heads, out.mask = unit.mask, out.bag_of = w.bag_of.data();
      out.finite = score_gradients.finite();
      if (stage) {
        score_gradients(unit, w.stage->rows(unit), stage->ld(), w.gradients);
        if (g.grad_bag != nullptr) {  // otherwise nothing comes back through the stage
          A* const grad_rows = w.grad_rows.get();
          InputGradient<A> through;  // the gradient of the pooled rows: weight times the bag's gradient
          through.to = grad_rows, through.width = pooled_width, through.heads = heads, through.mask = unit.mask;
          through.weight = w.gradients.weight.data(), through.grad_bag = g.grad_bag, through.bag_of = w.bag_of.data();
          through.finite = score_gradients.finite();
          in.for_bags(first, first + unit.rows, [&](int64_t, int64_t from, int64_t to) {
            through.store_rows(from - first, to - from, nullptr, nullptr, 0);
          });
          w.stage->backward(unit, grad_rows, out ? w.staged.get() : nullptr, at);
          if (out) out.staged = w.staged.get();
        }
      } else {
        score_gradients(unit, unit.x, unit.ld, w.gradients);
        out.grad_bag = g.grad_bag;
        if (g.grad_bag != nullptr) out.weight = w.gradients.weight.data();
      }
      w.score->backward(unit, w.gradients.score.data(), out, at);
      if (in.source && out) w.read.source()->backward(unit, w.grad_x.get(), at);
    }
  };
  for (int64_t start = 0; start < in.rows; start += std::min(pass, in.rows)) {
    const int64_t rows = std::min(pass, in.rows - start);
    parallel_items(ceil_div(rows, item_rows), make_worker, [&](int64_t item, Worker& w) { run(start, item, w); });
    score.add_pass(rows);
    if (stage) stage->add_pass(rows);
    if (in.source) in.source->add_pass(rows);
  }
}

}  // namespace milkernels
