// Softmax pooling by given scores or by products, and its backward, for the ops that are made of it.
#pragma once

#include <tuple>

#include "gradients.h"

namespace milkernels {

constexpr double kDead = -std::numeric_limits<double>::infinity();  // the score of a row that does not count

// The outputs of a softmax pooling of x.
struct Forward {
  Tensor bag, scores, lse;
  Forward(const Call& call, int64_t heads)
      : bag(call.empty({call.bags, heads, call.width})), scores(call.empty({call.rows, heads})),
        lse(call.empty({call.bags, heads})) {}

  // By scores [N, heads] in the accumulation type; `scores` gets them too, where they are not there already.
  void pool_given(Call& call, const Tensor& given) const {
    dispatch(call.x.scalar_type(), [&]<typename T>() {
      auto p = arguments<T>(call, Scoring::kGiven);
      p.given = data<acc_t<T>>(given);
      if (given.is_same(scores)) p.scores = nullptr;
      pool_forward(p, call.stream());
    });
  }

  template <typename T>
  PoolForward<T> arguments(Call& call, Scoring scoring) const {
    using A = acc_t<T>;
    PoolForward<T> p{};
    p.rows = call.typed<T>();
    p.bags = call.ragged();
    p.scoring = scoring;
    p.heads = static_cast<int>(scores.size(1));
    p.scores = data<A>(scores);
    p.partials = call.partials<A>(p.bags, p.heads, call.width);
    p.bag = data<A>(bag);
    p.lse = data<A>(lse);
    return p;
  }
};

// The backward in one read of the rows; `vectors` are those of the scores. False where it does not fit, or no gradient
// of the bag came back.
struct Backward {
  const PooledTensors& of;
  Scoring scoring;
  Tensor vectors, logits, grad_logits;
  Tensor grad_x, grad_given, grad_vectors, grad_shift;  // where they are wanted

  bool run(Call& call) const {
    if (!of.grad_bag.defined()) return false;
    const int64_t K = of.scores.size(1), J = vectors.defined() ? vectors.size(-2) : 0;
    return dispatch(call.x.scalar_type(), [&]<typename T>() {
      using A = acc_t<T>;
      PoolBackward<T> p{};
      p.rows = call.typed<T>();
      p.bags = call.ragged();
      p.scoring = scoring;
      p.heads = static_cast<int>(K);
      p.vectors = {data<A>(vectors), static_cast<int>(J), J > 0 && vectors.dim() == 3 ? J * call.width : 0, nullptr, 0};
      p.bag = data<A>(of.bag), p.scores = data<A>(of.scores), p.lse = data<A>(of.lse), p.logits = data<A>(logits);
      p.grad_bag = data<A>(of.grad_bag), p.grad_scores = data<A>(of.grad_scores);
      p.grad_lse = data<A>(of.grad_lse), p.grad_logits = data<A>(grad_logits);
      p.grad_x = data<T>(grad_x), p.grad_given = data<A>(grad_given);
      p.grad_vectors = data<A>(grad_vectors), p.grad_shift = data<A>(grad_shift);
      p.partials = call.partials<A>(p.bags, J, call.width);
      const Tensor normal = call.empty({p.bags.whole() ? 0 : p.bags.slots(), K});
      p.normal = data<A>(normal);
      if (!fits(p)) return false;
      if (!p.bags.whole()) {
        softmax_normal<A>(p.bags, p.heads, p.scores, p.lse, data<A>(normal), nullptr, call.stream());
      }
      pool_backward(p, call.stream());
      return true;
    });
  }
};

using ClassCall = WithClasses<Call>;

// (bag, scores, lse) by the scores <x_i, vectors[b, k]> + shift[b, k]; vectors [B, K, L], or [K, L] for all bags.
inline std::tuple<Tensor, Tensor, Tensor> pool_by_products(Call& call, const Tensor& vectors, const Tensor& shift) {
  const int64_t K = vectors.size(-2);
  const Forward out(call, K);
  const bool done = dispatch(call.x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    auto p = out.arguments<T>(call, Scoring::kQuery);
    p.vectors = {data<A>(vectors), static_cast<int>(K), vectors.dim() == 3 ? K * call.width : 0, data<A>(shift),
                 shift.defined() ? K : 0};
    return pool_forward(p, call.stream());
  });
  if (!done) {
    products(call, vectors, shift, kDead, out.scores);
    out.pool_given(call, out.scores);
  }
  return {out.bag, out.scores, out.lse};
}

// Writes the gradient of x, empty where it is not needed; returns that of the vectors [B, K, L], if wanted.
inline Tensor pool_by_products_backward(Call& call, const PooledTensors& of, const Tensor& vectors,
                                        const Tensor& grad_x, bool wanted) {
  const Tensor grad_vectors = wanted ? call.empty({call.bags, vectors.size(-2), call.width}) : Tensor();
  if (Backward{of, Scoring::kQuery, vectors, {}, {}, grad_x, {}, grad_vectors}.run(call)) return grad_vectors;
  const bool need_x = grad_x.numel() > 0;
  PoolGradients gradients(call, of, need_x);
  if (need_x) expand(call, grad_x, 0, gradients.term(), {gradients.scores, vectors});
  return wanted ? gradients.of_vectors(weighted_sums(call, call.ragged(), gradients.scores)) : Tensor();
}

}  // namespace milkernels
