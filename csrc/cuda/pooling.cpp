// Pooling whose cost is reading x, on a GPU: softmax_pool, query_pool, loss_attention_pool, weighted_pool, mean_pool.
#include <torch/library.h>

#include <tuple>

#include "call.h"

namespace milkernels {
namespace {

struct Forward {
  Tensor bag, scores, lse;
  Forward(const Call& call, int64_t heads)
      : bag(call.empty({call.bags, heads, call.width})), scores(call.empty({call.rows, heads})),
        lse(call.empty({call.bags, heads})) {}

  template <typename T>
  PoolForward<T> arguments(Call& call, Scoring scoring) const {
    using A = acc_t<T>;
    PoolForward<T> p{};
    p.rows = call.typed<T>();
    p.bags = call.ragged();
    p.scoring = scoring;
    p.heads = static_cast<int>(scores.size(1));
    p.scores = data<A>(scores);
    p.partials = call.partials<A>(p.heads, call.width);
    p.bag = data<A>(bag);
    p.lse = data<A>(lse);
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor> softmax_pool_fwd(const Tensor& x, const Tensor& given, const OptionalTensor& offsets,
                                                    const OptionalTensor& mask) {
  Call call(x, offsets, mask);
  TORCH_CHECK_VALUE(given.dim() == 2 && given.size(1) > 0, "scores must be [", call.rows, ", any]; got ",
                    given.sizes());
  const Tensor scores = call.take(given, "scores", {call.rows, given.size(1)});
  const Forward out(call, scores.size(1));
  dispatch(x.scalar_type(), [&]<typename T>() {
    auto p = out.arguments<T>(call, Scoring::kGiven);
    p.given = data<const acc_t<T>>(scores);
    pool_forward(p, call.stream());
  });
  return {out.bag, out.scores, out.lse};
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("softmax_pool_fwd.native", softmax_pool_fwd);
}

}  // namespace
}  // namespace milkernels
