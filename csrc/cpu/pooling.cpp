// Pooling whose cost is reading x, on the CPU: softmax_pool, query_pool and query_scores, loss_attention_pool.
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <tuple>

#include "instances.h"
#include "query_score.h"

namespace milkernels {
namespace {

struct Forward {
  Tensor bag, scores, lse;
  Forward(const Call& call, int64_t heads)
      : bag(call.empty({call.bags, heads, call.width})), scores(call.empty({call.rows, heads})),
        lse(call.empty({call.bags, heads})) {}
  template <typename T>
  void pool(const Score<T>& score, const Ragged<T>& in) {
    using A = acc_t<T>;
    pool_forward(score, in, scores.mutable_data_ptr<A>(),
                 SoftmaxPool<T>(in, score, nullptr, bag.mutable_data_ptr<A>(), lse.mutable_data_ptr<A>()));
  }
};

// --- softmax_pool

Tensor checked_given(const Call& call, const Tensor& given) {
  return call.take(given, "scores", {call.rows, columns_of(given, "scores", call.rows)});
}

std::tuple<Tensor, Tensor, Tensor> softmax_pool_fwd(const Tensor& x, const Tensor& given, const OptionalTensor& offsets,
                                                    const OptionalTensor& mask) {
  const Call call(x, offsets, mask);
  const Tensor scores = checked_given(call, given);
  Forward out(call, scores.size(1));
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    const auto in = call.ragged<T>();
    out.pool(GivenScore<T>(in, scores.size(1), scores.const_data_ptr<acc_t<T>>(), nullptr), in);
  });
  return {out.bag, out.scores, out.lse};
}

std::tuple<Tensor, Tensor> softmax_pool_bwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask,
                                            const Tensor& bag, const Tensor& scores, const Tensor& lse,
                                            const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
                                            const OptionalTensor& grad_lse, std::array<bool, 2> needs) {
  const Call call(x, offsets, mask);
  const int64_t heads = checked_given(call, scores).size(1);
  const PooledTensors pooled(call, heads, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  RowGradients of_rows(call, needs[0], false, false);
  Tensor grad_given = call.gradient(needs[1], {call.rows, heads});
  if (needs[1]) grad_given.zero_();  // units without a real row are passed over
  with_rows(call, &of_rows, [&]<typename T>(const Ragged<T>& in) {
    using A = acc_t<T>;
    const GivenScore<T> score(in, heads, nullptr, data_if<A>(needs[1], grad_given));
    pool_backward<T>(score, nullptr, in, typed<A>(pooled));
  });
  return {of_rows.x, grad_given};
}

// --- query_pool, query_scores

struct QueryCall : WithQuery<Call> {
  using WithQuery::WithQuery;
  bool per_bag() const { return scaled.dim() == 3; }
  template <typename T>
  QueryScore<T> program(const Ragged<T>& in) const {
    return {in, {scaled.const_data_ptr<acc_t<T>>(), heads, per_bag() ? heads * width : 0, nullptr, 0}};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> query_pool_fwd(const Tensor& x, const Tensor& query,
                                                          const OptionalTensor& offsets, const OptionalTensor& mask,
                                                          double scale, const OptionalTensors& embed,
                                                          std::optional<std::string_view> embed_activation,
                                                          double embed_dropout_p, std::optional<ScalarType> embed_dtype,
                                                          int64_t saved_bytes) {
  QueryCall call(x, query, offsets, mask, scale, {embed, embed_activation, embed_dropout_p, embed_dtype});
  Forward out(call, call.heads);
  const Tensor kept = call.keep(saved_bytes, 0, embed_dtype);
  with_rows(call, nullptr, [&]<typename T>(const Ragged<T>& in) { out.pool(call.program<T>(in), in); });
  return {out.bag, out.scores, out.lse, kept};
}

std::tuple<Tensor, Tensor> query_scores_fwd(const Tensor& x, const Tensor& query, const OptionalTensor& offsets,
                                            const OptionalTensor& mask, double scale, const OptionalTensors& embed,
                                            std::optional<std::string_view> embed_activation, double embed_dropout_p,
                                            std::optional<ScalarType> embed_dtype, int64_t saved_bytes) {
  QueryCall call(x, query, offsets, mask, scale, {embed, embed_activation, embed_dropout_p, embed_dtype});
  Tensor scores = call.empty({call.rows, call.heads}), kept = call.keep(saved_bytes, 0, embed_dtype);
  with_rows(call, nullptr, [&]<typename T>(const Ragged<T>& in) {
    pool_forward(call.program<T>(in), in, scores.mutable_data_ptr<acc_t<T>>(), NoPool());
  });
  return {scores, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> query_bwd(
    const Tensor& x, const Tensor& query, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& bag, const Tensor& scores, const OptionalTensor& lse, const OptionalTensors& embed,
    const Tensor& kept, double scale, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
    const OptionalTensor& grad_lse, std::array<bool, 4> needs) {
  QueryCall call(x, query, offsets, mask, scale, {embed, embed_activation, embed_dropout_p, embed_dtype});
  call.use_kept(kept, 0, embed_dtype, true, true);
  const PooledTensors pooled(call, call.heads, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  RowGradients of_rows(call, needs[0], needs[2], needs[3]);
  Tensor grad_query = call.gradient(needs[1], query.sizes());
  with_rows(call, &of_rows, [&]<typename T>(const Ragged<T>& in) {
    using A = acc_t<T>;
    auto score = call.program<T>(in);
    if (needs[1]) score.products.prepare_gradient();
    pool_backward<T>(score, nullptr, in, typed<A>(pooled));
    if (!needs[1]) return;
    const auto g = typed<A>(pooled);
    if (call.per_bag()) score.products.gradient_of_bags(grad_query.mutable_data_ptr<A>(), &g);
    else score.products.gradient(grad_query.mutable_data_ptr<A>(), &g);
  });
  if (needs[1]) grad_query = (scale == 1. ? grad_query : grad_query.mul_(scale)).to(query.scalar_type());
  return {of_rows.x, grad_query, of_rows.typed_weight(call), of_rows.typed_bias(call)};
}

// --- loss_attention_pool

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_attention_pool_fwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensors& embed, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, int64_t saved_bytes) {
  ClassCall call(x, ClassifierWeights(weights), offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  Forward out(call, 1);
  const Tensor kept = call.keep(saved_bytes, 0, embed_dtype);
  Tensor logits = call.empty({call.rows, call.classes});
  if (mask) logits.fill_(kDead<double>);  // tiles without a real row are passed over
  with_rows(call, nullptr, [&]<typename T>(const Ragged<T>& in) {
    out.pool(LogSumExpScore<T>(in, call.queries<acc_t<T>>(), logits.mutable_data_ptr<acc_t<T>>(), nullptr), in);
  });
  return {out.bag, out.scores, out.lse, logits, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_attention_pool_bwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const Tensor& bag, const Tensor& scores, const Tensor& lse, const Tensor& logits, const OptionalTensors& embed,
    const Tensor& kept, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
    const OptionalTensor& grad_lse, const OptionalTensor& grad_logits, std::array<bool, 5> needs) {
  const ClassifierWeights given(weights);
  ClassCall call(x, given, offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  call.use_kept(kept, 0, embed_dtype, true, true);
  check_needs(needs.data() + 1, given);
  const PooledTensors pooled(call, 1, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  const Tensor l = call.take(logits, "logits", {call.rows, call.classes}),
               g = call.take(grad_logits, "grad_logits", {call.rows, call.classes});
  RowGradients of_rows(call, needs[0], needs[3], needs[4]);
  Tensor grad_weight = call.gradient(needs[1], call.weight.sizes()),
         grad_bias = call.gradient(needs[2], {call.classes});
  with_rows(call, &of_rows, [&]<typename T>(const Ragged<T>& in) {
    using A = acc_t<T>;
    LogSumExpScore<T> score(in, call.queries<A>(), const_cast<A*>(l.const_data_ptr<A>()), data_or_null<A>(g));
    if (needs[1] || needs[2]) score.classes().prepare_gradient();
    pool_backward<T>(score, nullptr, in, typed<A>(pooled));
    if (needs[1]) score.classes().gradient(grad_weight.mutable_data_ptr<A>(), nullptr);
    if (needs[2]) score.classes().shift_gradient(grad_bias.mutable_data_ptr<A>());
  });
  if (needs[1]) grad_weight = grad_weight.to(given.weight().scalar_type());
  if (needs[2]) grad_bias = grad_bias.to(given.bias()->scalar_type());
  return {of_rows.x, grad_weight, grad_bias, of_rows.typed_weight(call), of_rows.typed_bias(call)};
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("softmax_pool_fwd.native", softmax_pool_fwd);
  m.impl("softmax_pool_bwd.native", softmax_pool_bwd);
  m.impl("query_pool_fwd.native", query_pool_fwd);
  m.impl("query_scores_fwd.native", query_scores_fwd);
  m.impl("query_bwd.native", query_bwd);
  m.impl("loss_attention_pool_fwd.native", loss_attention_pool_fwd);
  m.impl("loss_attention_pool_bwd.native", loss_attention_pool_bwd);
}

}  // namespace
}  // namespace milkernels
