// Ops on scores alone, on a GPU: segment_softmax, attention_weights.
#include <torch/library.h>

#include <tuple>

#include "gradients.h"
#include "score_kernels.h"

namespace milkernels {
namespace {

// Scores or weights [rows, heads], as the instances of a call, in the accumulation type.
struct ScoresCall : Call {
  ScoresCall(const Tensor& scores, const OptionalTensor& offsets, const OptionalTensor& mask)
      : Call(scores, offsets, mask), values(x.to(acc).contiguous()), heads(static_cast<int>(width)) {}
  Tensor values;
  int heads;
};

Tensor segment_softmax_fwd(const Tensor& scores, const OptionalTensor& offsets, const OptionalTensor& mask) {
  const ScoresCall call(scores, offsets, mask);
  const Tensor top = call.empty({call.bags, call.heads}), total = call.empty({call.bags, call.heads});
  const Tensor out = call.empty({call.rows, call.heads}), partials = call.empty({call.slots(), call.heads, 2});
  dispatch_sums(call.acc, [&]<typename A>() {
    softmax_terms(SoftmaxTerms<A>{call.ragged(), call.heads, data<A>(call.values), data<SoftmaxState<A>>(partials),
                                  data<A>(top), data<A>(total)},
                  call.stream());
    softmax_weights(SoftmaxWeights<A>{call.ragged(), call.heads, data<A>(call.values), data<A>(top), data<A>(total),
                                      data<A>(out)},
                    call.stream());
  });
  return out;
}

// Writes weight (grad - shift[b]); without a shift: weight grad.
void write_gradients(const ScoresCall& call, const Tensor& grad, const Tensor& shift, const Tensor& out) {
  dispatch_sums(call.acc, [&]<typename A>() {
    weight_gradients(WeightGradients<A>{call.ragged(), call.heads, data<A>(call.values), data<A>(grad), data<A>(shift),
                                        data<A>(out)},
                     call.stream());
  });
}

// grad_scores = weight (grad - sum over the bag of weight grad)
Tensor segment_softmax_bwd(const Tensor& scores, const OptionalTensor& offsets, const Tensor& weights,
                           const Tensor& grad_weights, std::array<bool, 1> needs) {
  const ScoresCall call(weights, offsets, std::nullopt);
  const Tensor grad = call.take(grad_weights, "grad_weights", {call.rows, call.heads});
  const Tensor out = call.gradient(needs[0], {call.rows, call.heads});
  if (needs[0]) {
    write_gradients(call, grad, {}, out);
    write_gradients(call, grad, sums_of_columns(call, out), out);
  }
  return out.to(scores.scalar_type());
}

Tensor attention_weights_fwd(const Tensor& scores, const Tensor& lse, const OptionalTensor& offsets,
                             const OptionalTensor& mask) {
  const ScoresCall call(scores, offsets, mask);
  const Tensor out = call.empty({call.rows, call.heads}), top = call.take(lse, "lse", {call.bags, call.heads});
  dispatch_sums(call.acc, [&]<typename A>() {
    softmax_weights(SoftmaxWeights<A>{call.ragged(), call.heads, data<A>(call.values), data<A>(top), nullptr,
                                      data<A>(out)},
                    call.stream());
  });
  return out;
}

// grad_scores = weight grad; grad_lse = -sum over the bag of it.
std::tuple<Tensor, Tensor> attention_weights_bwd(const Tensor& scores, const Tensor& lse, const OptionalTensor& offsets,
                                                 const Tensor& weights, const Tensor& grad_weights,
                                                 std::array<bool, 2> needs) {
  const ScoresCall call(weights, offsets, std::nullopt);
  const Tensor grad = call.take(grad_weights, "grad_weights", {call.rows, call.heads});
  const Tensor of_scores = call.empty({call.rows, call.heads}), none = call.empty({0});
  write_gradients(call, grad, {}, of_scores);
  const Tensor of_lse = needs[1] ? sums_of_columns(call, of_scores).neg_() : none;
  return {(needs[0] ? of_scores : none).to(scores.scalar_type()), of_lse.to(lse.scalar_type())};
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("segment_softmax_fwd.native", segment_softmax_fwd);
  m.impl("segment_softmax_bwd.native", segment_softmax_bwd);
  m.impl("attention_weights_fwd.native", attention_weights_fwd);
  m.impl("attention_weights_bwd.native", attention_weights_bwd);
}

}  // namespace
}  // namespace milkernels
