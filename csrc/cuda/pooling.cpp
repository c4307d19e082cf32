// Pooling whose cost is reading x, on a GPU: softmax_pool, query_pool and query_scores, loss_attention_pool,
// weighted_pool, mean_pool.
#include <torch/library.h>

#include <tuple>

#include "pooling.h"

namespace milkernels {
namespace {

// --- softmax_pool

std::tuple<Tensor, Tensor, Tensor> softmax_pool_fwd(const Tensor& x, const Tensor& given, const OptionalTensor& offsets,
                                                    const OptionalTensor& mask) {
  Call call(x, offsets, mask);
  const int64_t heads = columns_of(given, "scores", call.rows);
  const Forward out(call, heads);
  out.pool_given(call, call.take(given, "scores", {call.rows, heads}));
  return {out.bag, out.scores, out.lse};
}

std::tuple<Tensor, Tensor> softmax_pool_bwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask,
                                            const Tensor& bag, const Tensor& scores, const Tensor& lse,
                                            const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
                                            const OptionalTensor& grad_lse, std::array<bool, 2> needs) {
  Call call(x, offsets, mask);
  const int64_t heads = columns_of(scores, "scores", call.rows);
  const PooledTensors of(call, heads, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  Tensor grad_x = call.grad_x(needs[0]), grad_given = call.gradient(needs[1], scores.sizes());
  if (Backward{of, Scoring::kGiven, {}, {}, {}, grad_x, grad_given}.run(call)) return {grad_x, grad_given};
  const PoolGradients gradients(call, of, needs[0]);
  if (needs[0]) expand(call, grad_x, 0, gradients.term(), {});
  return {grad_x, needs[1] ? gradients.scores : grad_given};
}

// --- query_pool, query_scores

using QueryCall = WithQuery<Call>;

std::tuple<Tensor, Tensor, Tensor, Tensor> query_pool_fwd(const Tensor& x, const Tensor& query,
                                                          const OptionalTensor& offsets, const OptionalTensor& mask,
                                                          double scale, const OptionalTensors& embed,
                                                          std::optional<std::string_view> embed_activation,
                                                          double embed_dropout_p, std::optional<ScalarType> embed_dtype,
                                                          int64_t) {
  QueryCall call(x, query, offsets, mask, scale, {embed, embed_activation, embed_dropout_p, embed_dtype});
  return std::tuple_cat(pool_by_products(call, call.scaled, {}), std::make_tuple(call.nothing_kept()));
}

std::tuple<Tensor, Tensor> query_scores_fwd(const Tensor& x, const Tensor& query, const OptionalTensor& offsets,
                                            const OptionalTensor& mask, double scale, const OptionalTensors& embed,
                                            std::optional<std::string_view> embed_activation, double embed_dropout_p,
                                            std::optional<ScalarType> embed_dtype, int64_t) {
  const QueryCall call(x, query, offsets, mask, scale, {embed, embed_activation, embed_dropout_p, embed_dtype});
  Tensor scores = call.empty({call.rows, call.heads});
  products(call, call.scaled, {}, kDead, scores);
  return {scores, call.nothing_kept()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> query_bwd(
    const Tensor& x, const Tensor& query, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& bag, const Tensor& scores, const OptionalTensor& lse, const OptionalTensors& embed,
    const Tensor&, double scale, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
    const OptionalTensor& grad_lse, std::array<bool, 4> needs) {
  QueryCall call(x, query, offsets, mask, scale, {embed, embed_activation, embed_dropout_p, embed_dtype});
  const PooledTensors of(call, call.heads, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  const Tensor grad_x = call.grad_x(needs[0]);
  Tensor grad_query = pool_by_products_backward(call, of, call.scaled, grad_x, needs[1]);
  if (needs[1] && query.dim() == 2) grad_query = grad_query.sum(0);
  grad_query = needs[1] ? grad_query.mul_(scale).to(query.scalar_type()) : call.empty({0});
  return std::tuple_cat(std::make_tuple(grad_x, grad_query), call.of_no_embedding(needs[2], needs[3]));
}

// --- loss_attention_pool

using LossAttention = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // bag, scores, lse, logits, kept

LossAttention loss_attention_pool_fwd(const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets,
                                      const OptionalTensor& mask, const OptionalTensors& embed,
                                      std::optional<std::string_view> embed_activation, double embed_dropout_p,
                                      std::optional<ScalarType> embed_dtype, int64_t) {
  ClassCall call(x, ClassifierWeights(weights), offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  const Forward out(call, 1);
  const Tensor logits = call.empty({call.rows, call.classes});
  const bool done = dispatch(x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    auto p = out.arguments<T>(call, Scoring::kLogSumExp);
    p.vectors = {data<A>(call.weight), static_cast<int>(call.classes), 0, data<A>(call.bias), 0};
    p.products = data<A>(logits);
    return pool_forward(p, call.stream());
  });
  if (!done) {
    products(call, call.weight, call.bias, kDead, logits);
    Tensor scores = out.scores;
    at::logsumexp_out(scores, logits, 1, true);
    out.pool_given(call, scores);
  }
  return {out.bag, out.scores, out.lse, logits, call.nothing_kept()};
}

// The gradients of weight and bias, in the accumulation type, by a kernel for each step; that of x is written.
std::tuple<Tensor, Tensor> loss_attention_by_parts(ClassCall& call, const PooledTensors& of, const Tensor& logits,
                                                   const Tensor& grad_logits, bool need_weight, const Tensor& grad_x) {
  const bool need_x = grad_x.numel() > 0;
  const PoolGradients gradients(call, of, need_x);
  Tensor of_logits = alive(gradients.scores * (logits - of.scores).exp(), logits);
  if (grad_logits.defined()) of_logits.add_(alive(grad_logits, logits));
  if (need_x) expand(call, grad_x, 0, gradients.term(), {of_logits, call.weight});
  return {need_weight ? weighted_sums(call, call.one_bag(), of_logits).squeeze(0) : Tensor(), of_logits.sum(0)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_attention_pool_bwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const Tensor& bag, const Tensor& scores, const Tensor& lse, const Tensor& logits, const OptionalTensors& embed,
    const Tensor&, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag, const OptionalTensor& grad_scores,
    const OptionalTensor& grad_lse, const OptionalTensor& grad_logits, std::array<bool, 5> needs) {
  const ClassifierWeights given(weights);
  ClassCall call(x, given, offsets, mask, {embed, embed_activation, embed_dropout_p, embed_dtype});
  const PooledTensors of(call, 1, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  const Tensor l = call.take(logits, "logits", {call.rows, call.classes}),
               g = call.take(grad_logits, "grad_logits", {call.rows, call.classes});
  check_needs(needs.data() + 1, given);
  const bool sums = needs[1] || needs[2];
  const Tensor grad_x = call.grad_x(needs[0]);
  Tensor grad_weight = call.gradient(sums, {call.bags, call.classes, call.width}),
         grad_bias = call.gradient(sums, {call.bags, call.classes});
  if (Backward{of, Scoring::kLogSumExp, call.weight, l, g, grad_x, {}, grad_weight, grad_bias}.run(call)) {
    grad_weight = grad_weight.sum(0), grad_bias = grad_bias.sum(0);
  } else {
    std::tie(grad_weight, grad_bias) = loss_attention_by_parts(call, of, l, g, needs[1], grad_x);
  }
  const auto own = [&](int i, const Tensor& t) {
    return needs[i + 1] ? t.to(given[i]->scalar_type()) : call.empty({0});
  };
  return std::tuple_cat(std::make_tuple(grad_x, own(0, grad_weight), own(1, grad_bias)),
                        call.of_no_embedding(needs[3], needs[4]));
}

// --- weighted_pool, mean_pool

Tensor weighted_pool_fwd(const Tensor& x, const Tensor& weights, const OptionalTensor& offsets,
                         const OptionalTensor& mask) {
  Call call(x, offsets, mask);
  const int64_t heads = columns_of(weights, "weights", call.rows);
  return weighted_sums(call, call.ragged(), call.take(weights, "weights", {call.rows, heads}));
}

std::tuple<Tensor, Tensor> weighted_pool_bwd(const Tensor& x, const Tensor& weights, const OptionalTensor& offsets,
                                             const OptionalTensor& mask, const Tensor& grad_bag,
                                             std::array<bool, 2> needs) {
  const Call call(x, offsets, mask);
  const int64_t heads = columns_of(weights, "weights", call.rows);
  const Tensor w = call.take(weights, "weights", {call.rows, heads}),
               g = call.take(grad_bag, "grad_bag", {call.bags, heads, call.width});
  Tensor grad_x = call.grad_x(needs[0]), grad_weights = call.gradient(needs[1], w.sizes());
  if (needs[0]) expand(call, grad_x, 0, {w, g}, {});
  if (needs[1]) products(call, g, {}, 0, grad_weights);
  return {grad_x, grad_weights.to(weights.scalar_type())};
}

Tensor mean_pool_fwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask) {
  Call call(x, offsets, mask);
  return weighted_sums(call, call.ragged(), {}).squeeze(1);
}

Tensor mean_pool_bwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask, const Tensor& grad_bag,
                     std::array<bool, 1> needs) {
  const Call call(x, offsets, mask);
  Tensor grad_x = call.grad_x(needs[0]);
  if (!needs[0]) return grad_x;
  const Tensor ones = call.empty({call.rows, 1}).fill_(1), counts = sums_of_columns(call, ones).clamp_min_(1);
  const Tensor of_rows = call.take(grad_bag, "grad_bag", {call.bags, call.width}) / counts;
  expand(call, grad_x, 0, {ones, of_rows.unsqueeze(1)}, {});
  return grad_x;
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("softmax_pool_fwd.native", softmax_pool_fwd);
  m.impl("softmax_pool_bwd.native", softmax_pool_bwd);
  m.impl("query_pool_fwd.native", query_pool_fwd);
  m.impl("query_scores_fwd.native", query_scores_fwd);
  m.impl("query_bwd.native", query_bwd);
  m.impl("loss_attention_pool_fwd.native", loss_attention_pool_fwd);
  m.impl("loss_attention_pool_bwd.native", loss_attention_pool_bwd);
  m.impl("weighted_pool_fwd.native", weighted_pool_fwd);
  m.impl("weighted_pool_bwd.native", weighted_pool_bwd);
  m.impl("mean_pool_fwd.native", mean_pool_fwd);
  m.impl("mean_pool_bwd.native", mean_pool_bwd);
}

}  // namespace
}  // namespace milkernels
