// The backward of a softmax pooling, which every op that pools shares, from kernels that serve any width.
#pragma once

#include "call.h"
#include "rows.h"

namespace milkernels {

// 0 where a score or logit is -inf.
inline Tensor alive(const Tensor& gradient, const Tensor& values) {
  return gradient.masked_fill(values == -std::numeric_limits<double>::infinity(), 0);
}

// Products of a slice's rows with vectors [B, K, L] or [K, L], into out [N, K].
inline void products(const Call& call, const Slice& slice, const Tensor& vectors, const Tensor& shift, double fill,
                     const Tensor& out, const Tensor& centre = {}) {
  dispatch(slice.x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const int64_t K = vectors.size(-2), L = vectors.size(-1);
    const Vectors<A> v{data<A>(vectors), static_cast<int>(K), vectors.dim() == 3 ? K * L : 0, data<A>(shift),
                       shift.defined() && shift.dim() == 2 ? K : 0};
    row_products(RowProducts<T>{Call::rows_at<T>(slice.x), call.ragged(), slice.first, slice.count, v, data<A>(centre),
                                static_cast<A>(fill), data<A>(out)},
                 call.stream());
  });
}

// Weights [N, K] and vectors [B, K, L] or [K, L] of a term of rows; undefined: none.
struct TermTensors {
  Tensor weights, vectors;
  template <typename A>
  Term<A> typed() const {
    if (!weights.defined()) return {};
    const int64_t K = vectors.size(-2);
    return {data<A>(weights), data<A>(vectors), static_cast<int>(K), vectors.dim() == 3 ? K * vectors.size(-1) : 0};
  }
};

// Writes product * scale + both terms into rows [first, first + out's) of x's, which out [., L] holds.
inline void expand(const Call& call, const Tensor& out, int64_t first, const TermTensors& pooled,
                   const TermTensors& scored, const Tensor& product = {}, const Tensor& scale = {}) {
  dispatch(out.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    expand_rows(ExpandRows<T>{call.ragged(), first, out.size(0), static_cast<int>(out.size(1)), data<A>(product),
                              data<A>(scale), pooled.typed<A>(), scored.typed<A>(), data<T>(out)},
                call.stream());
  });
}

// sum_i values[i, k] over each bag, without masked rows: [B, K].
inline Tensor sums_of_columns(const Call& call, const Tensor& values) {
  const int64_t K = values.size(1);
  const Tensor out = call.empty({call.bags, K}), partials = call.empty({call.slots(), K});
  dispatch_sums(call.acc, [&]<typename A>() {
    column_sums<A>(call.ragged(), static_cast<int>(K), data<A>(values), data<A>(partials), data<A>(out), call.stream());
  });
  return out;
}

// Sums of rows by weights, or by the softmax of scores: of all rows together, or of one slice of whole chunks after the
// other.
class Sums {
 public:
  Sums(Call& call, const Bags& bags, int64_t heads, int64_t width, Scoring scoring)
      : bag(call.empty({bags.count, heads, width})), call_(call), bags_(bags), scoring_(scoring) {
    const bool softmax = scoring == Scoring::kGiven;
    if (softmax) lse = call.empty({bags.count, heads});
    dispatch_sums(call.acc, [&]<typename A>() {
      const Partials<A> p = call.partials<A>(bags, heads, width);
      partials_ = {p.top, p.total, p.sum};
    });
    if (call.rows == 0) add(call.empty({0, width}), 0, {});  // nobody will
  }
  // Rows [first, first + x's) that x holds, by weights or scores [N, heads], of all rows; null: each counts once.
  void add(const Tensor& x, int64_t first, const Tensor& weights) {
    dispatch(x.scalar_type(), [&]<typename T>() {
      using A = acc_t<T>;
      PoolForward<T> p{};
      p.rows = Call::rows_at<T>(x);
      p.bags = bags_;
      p.scoring = scoring_;
      p.heads = static_cast<int>(bag.size(1));
      p.given = data<A>(weights);
      p.partials = {static_cast<A*>(partials_[0]), static_cast<A*>(partials_[1]), static_cast<A*>(partials_[2])};
      p.bag = data<A>(bag), p.lse = data<A>(lse);
      p.mean = !weights.defined();
      p.first = first, p.count = x.size(0), p.last = first + x.size(0) == call_.rows;
      pool_forward(p, call_.stream());
    });
  }
  Tensor bag, lse;  // [bags, heads, width], [bags, heads], after the last rows

 private:
  Call& call_;
  Bags bags_;
  Scoring scoring_;
  std::array<void*, 3> partials_{};
};

// sum_i weights[i, k] x_i over each bag, or over all of them: [B, K, L].
inline Tensor weighted_sums(Call& call, const Tensor& x, const Tensor& weights, bool all = false) {
  Sums sums(call, all ? call.one_bag() : call.ragged(), weights.size(1), x.size(1), Scoring::kWeights);
  sums.add(x, 0, weights);
  return sums.bag;
}

// The gradient of the scores [N, K], and the weights [N, K] by which rows get that of their bag; undefined where they
// are not wanted or the bag vectors [B, K, L] have no gradient.
class PoolGradients {
 public:
  PoolGradients(Call& call, const PooledTensors& of, bool weights) : call_(call), of_(of) {
    const int64_t K = of.scores.size(1);
    pooled_ = of.grad_bag.defined() || of.grad_lse.defined();
    if (weights && of.grad_bag.defined()) this->weights = call.empty({call.rows, K});
    if (!pooled_) {
      if (of.grad_scores.defined()) scores = alive(of.grad_scores, of.scores);
      else scores = call.empty({call.rows, K}).zero_();
      return;
    }
    scores = call.empty({call.rows, K});
    normal_ = call.empty({call.bags, K});
    const Tensor partials = call.empty({call.slots(), K});
    dispatch_sums(call.acc, [&]<typename A>() {
      softmax_normal<A>(call.ragged(), static_cast<int>(K), data<A>(of.scores), data<A>(of.lse), data<A>(partials),
                        data<A>(normal_), call.stream());
    });
    if (!of.grad_bag.defined()) return;
    const int64_t width = of.bag.size(2);
    centre_ = call.empty({call.bags, width}), shift_ = call.empty({call.bags, K});
    dispatch_sums(call.acc, [&]<typename A>() {
      pool_centres(PoolCentres<A>{static_cast<int>(call.bags), static_cast<int>(K), static_cast<int>(width),
                                  data<A>(of.bag), data<A>(of.lse), data<A>(of.grad_bag), data<A>(centre_),
                                  data<A>(shift_)},
                   call.stream());
    });
  }

  // The slice's rows, which were pooled.
  void add(const Slice& slice) {
    if (!pooled_) return;
    // The products are overwritten where they stand.
    if (of_.grad_bag.defined()) products(call_, slice, of_.grad_bag, {}, 0, scores, centre_);
    dispatch_sums(call_.acc, [&]<typename A>() {
      score_gradients(ScoreGradients<A>{call_.ragged(), slice.first, slice.count, static_cast<int>(scores.size(1)),
                                        data<A>(of_.scores), data<A>(of_.lse), data<A>(normal_),
                                        of_.grad_bag.defined() ? data<A>(scores) : nullptr, data<A>(shift_),
                                        data<A>(of_.grad_lse), data<A>(of_.grad_scores), data<A>(scores),
                                        data<A>(weights)},
                      call_.stream());
    });
  }

  // The gradient of vectors that scores are products with, from sum_i gradient[i, k] x_i: [B, K, L].
  //
  // The gradients of a bag's scores sum to that of its lse and those of the scores themselves: what rounding makes of
  // them beyond that is an error that all rows share, and is large where features have a mean.
  Tensor of_vectors(const Tensor& sums) {
    if (!centre_.defined()) return sums;
    Tensor excess = -sums_of_columns(call_, scores);
    if (of_.grad_lse.defined()) excess.add_(of_.grad_lse.masked_fill(normal_ == 0, 0));  // no living row, no lse
    if (of_.grad_scores.defined()) excess.add_(sums_of_columns(call_, alive(of_.grad_scores, of_.scores)));
    return sums.add_(excess.unsqueeze(-1) * centre_.unsqueeze(1));
  }

  // Weight times the gradient of the bag, in the gradient of rows.
  TermTensors term() const { return weights.defined() ? TermTensors{weights, of_.grad_bag} : TermTensors{}; }

  Tensor scores, weights;

 private:
  Call& call_;
  PooledTensors of_;
  Tensor normal_, centre_, shift_;
  bool pooled_;
};

}  // namespace milkernels
