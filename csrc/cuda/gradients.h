// The backward of a softmax pooling, which every op that pools shares, from kernels that serve any width.
#pragma once

#include "call.h"
#include "rows.h"

namespace milkernels {

// 0 where a score or logit is -inf.
inline Tensor alive(const Tensor& gradient, const Tensor& values) {
  return gradient.masked_fill(values == -std::numeric_limits<double>::infinity(), 0);
}

// Products of the rows with vectors [B, K, L] or [K, L], into out [N, K].
inline void products(const Call& call, const Tensor& vectors, const Tensor& shift, double fill, const Tensor& out,
                     const Tensor& centre = {}) {
  dispatch(call.x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const int64_t K = vectors.size(-2), L = vectors.size(-1);
    const Vectors<A> v{data<A>(vectors), static_cast<int>(K), vectors.dim() == 3 ? K * L : 0, data<A>(shift),
                       shift.defined() && shift.dim() == 2 ? K : 0};
    row_products(RowProducts<T>{call.typed<T>(), call.ragged(), v, data<A>(centre), static_cast<A>(fill), data<A>(out)},
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

// Writes product * scale + both terms into rows [first, first + out's) of the gradient of x, which out [., L] holds.
inline void expand(const Call& call, const Tensor& out, int64_t first, const TermTensors& pooled,
                   const TermTensors& scored, const Tensor& product = {}, const Tensor& scale = {}) {
  dispatch(out.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    expand_rows(ExpandRows<T>{call.ragged(), first, out.size(0), static_cast<int>(out.size(1)), data<A>(product),
                              data<A>(scale), pooled.typed<A>(), scored.typed<A>(), data<T>(out)},
                call.stream());
  });
}

// Adds a term to the gradient of x, all of which has been written.
inline void add_term(const Call& call, const Tensor& grad_x, const TermTensors& term) {
  // What has the type of sums already is read where it stands.
  if (grad_x.scalar_type() == call.acc) return expand(call, grad_x, 0, {}, term, grad_x);
  call.in_slices(call.width * static_cast<int64_t>(c10::elementSize(call.acc)), [&](int64_t first, int64_t count) {
    const Tensor rows = grad_x.narrow(0, first, count);
    expand(call, rows, first, {}, term, rows.to(call.acc));
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

// sum_i weights[i, k] x_i over each of the bags [bags, K, L]; without weights the mean of their rows, K is 1.
inline Tensor weighted_sums(Call& call, const Bags& bags, const Tensor& weights) {
  const int64_t K = weights.defined() ? weights.size(1) : 1;
  const Tensor out = call.empty({bags.count, K, call.width});
  dispatch(call.x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    PoolForward<T> p{};
    p.rows = call.typed<T>();
    p.bags = bags;
    p.scoring = Scoring::kWeights;
    p.heads = static_cast<int>(K);
    p.given = data<A>(weights);
    p.partials = call.partials<A>(bags, K, call.width);
    p.mean = !weights.defined();
    p.bag = data<A>(out);
    pool_forward(p, call.stream());
  });
  return out;
}

// The gradient of the scores [N, K], and the weights [N, K] by which rows get that of their bag; undefined where they
// are not wanted or the bag vectors [B, K, L] have no gradient.
class PoolGradients {
 public:
  PoolGradients(const Call& call, const PooledTensors& of, bool weights)
      : scores(call.empty(of.scores.sizes())), call_(call), of_(of) {
    if (!of.grad_bag.defined() && !of.grad_lse.defined()) {
      if (of.grad_scores.defined()) scores = alive(of.grad_scores, of.scores);
      else scores.zero_();
      return;
    }
    if (weights && of.grad_bag.defined()) this->weights = call.empty(scores.sizes());
    if (of.grad_bag.defined()) take_products();
    dispatch_sums(call.acc, [&]<typename A>() { differentiate<A>(); });
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
  // Leaves <x_i - centre, gradient of the bag's vector> where the gradients of the scores will be.
  void take_products() {
    const int64_t K = scores.size(1), width = of_.bag.size(2);
    centre_ = call_.empty({call_.bags, width}), shift_ = call_.empty({call_.bags, K});
    dispatch_sums(call_.acc, [&]<typename A>() {
      pool_centres(PoolCentres<A>{static_cast<int>(call_.bags), static_cast<int>(K), static_cast<int>(width),
                                  data<A>(of_.bag), data<A>(of_.lse), data<A>(of_.grad_bag), data<A>(centre_),
                                  data<A>(shift_)},
                   call_.stream());
    });
    products(call_, of_.grad_bag, {}, 0, scores, centre_);
  }

  template <typename A>
  void differentiate() {
    const int K = static_cast<int>(scores.size(1));
    const Tensor partials = call_.empty({call_.slots(), K});
    normal_ = call_.empty({call_.bags, K});
    softmax_normal<A>(call_.ragged(), K, data<A>(of_.scores), data<A>(of_.lse), data<A>(partials), data<A>(normal_),
                      call_.stream());
    score_gradients(ScoreGradients<A>{call_.ragged(), K, data<A>(of_.scores), data<A>(of_.lse), data<A>(normal_),
                                      data_if<A>(centre_.defined(), scores), data<A>(shift_), data<A>(of_.grad_lse),
                                      data<A>(of_.grad_scores), data<A>(scores), data<A>(weights)},
                    call_.stream());
  }

  const Call& call_;
  PooledTensors of_;
  Tensor normal_, centre_, shift_;
};

}  // namespace milkernels
