// Rows as an op sees them, embedded or not. Those of an embedding, the layer in front of an aggregator, are
// h_i = drop(act(W x_i + b)): they are made for a tile at a time, in the forward and, but for those that are kept,
// again in the backward.
#pragma once

#include "call.h"

namespace milkernels {

// The gradients of what an op's rows are made of: x and, where there is an embedding, its weight and bias. Those that
// nobody needs are empty tensors.
struct RowGradients {
  RowGradients(const Call& call, bool need_x, bool need_weight, bool need_bias)
      : need_x(need_x), need_weight(need_weight), need_bias(need_bias), x(call.grad_x(need_x)) {
    check_need(need_weight, call.embedding.weight.defined(), "e_weight");
    check_need(need_bias, call.embedding.bias.defined(), "e_bias");
    weight = need_weight ? at::empty_like(call.embedding.weight) : call.empty({0});
    bias = need_bias ? at::empty_like(call.embedding.bias) : call.empty({0});
  }
  // Those that a backward has written, to which more is added; empty where nobody needs them.
  RowGradients(const Call& call, const Tensor& x, const Tensor& weight, const Tensor& bias);
  bool any() const { return need_x || need_weight || need_bias; }
  void zero() {
    for (Tensor* const t : {&x, &weight, &bias}) t->zero_();
  }
  // Adds values [n, width of x], in the accumulation type, to rows of x's gradient (-1: to none) when `finish` is
  // called: what several give to one row is summed before it is rounded.
  void add_to_rows(const Tensor& indices, const Tensor& values) { added_.emplace_back(indices, values); }
  void finish();
  // They return the gradients of weight and bias in the types of these.
  Tensor typed_weight(const Call& call) const { return need_weight ? weight.to(call.embedding.weight_type) : weight; }
  Tensor typed_bias(const Call& call) const { return need_bias ? bias.to(call.embedding.bias_type) : bias; }

  bool need_x, need_weight, need_bias;
  Tensor x, weight, bias;

 private:
  std::vector<std::pair<Tensor, Tensor>> added_;
};

// The embedding of a call as a source of rows of type H.
template <typename H>
struct EmbeddedRows : Source<H> {
  virtual void finish() = 0;  // after a backward: writes the gradients of weight and bias
};
template <typename H>
std::unique_ptr<EmbeddedRows<H>> embedded_rows(const Call& call, RowGradients* gradients);

// f(in), a Ragged<T>: the rows as the op sees them. `gradients` (or null) are those that a backward fills.
template <typename F>
void with_rows(const Call& call, RowGradients* gradients, const F& f) {
  if (!call.embedding) {
    dispatch_storage(call.x.scalar_type(), [&]<typename T>() {
      auto in = call.ragged<T>();
      if (gradients != nullptr) in.grad_x = data_if<T>(gradients->need_x, gradients->x);
      f(in);
    });
    return;
  }
  const auto run = [&]<typename H>() {
    const auto source = embedded_rows<H>(call, gradients);
    f(Ragged<H>{nullptr, 0, call.width, call.rows, data_or_null<bool>(call.mask), call.offsets, source.get()});
    if (gradients != nullptr) source->finish();
  };
  switch (call.embedding.rows_type(call.acc)) {
    case at::kDouble: return run.template operator()<double>();
    case at::kFloat: return run.template operator()<float>();
    default: return run.template operator()<BFloat16>();
  }
}

// Calls f.template operator()<T, E>(in), where E is the element type of products with the rows; `planes` is that of
// dispatch_products.
template <typename F>
void with_products(const Call& call, int planes, RowGradients* gradients, const F& f) {
  with_rows(call, gradients, [&]<typename T>(const Ragged<T>& in) {
    with_element<T>(planes, [&]<typename E>() { f.template operator()<T, E>(in); });
  });
}

// A few of the rows that an op sees, for products of a few rows, and the way back to what they are made of.
class SomeRows {
 public:
  // `indices`, n in all, are rows of x, or -1: none, and zeros here.
  SomeRows(const Call& call, const Tensor& indices);
  // Adds to the gradients, from that of the rows [n, call.width]; to those of x when `gradients` are finished.
  void backward(const Tensor& grad_rows, RowGradients& gradients) const;

  Tensor rows;  // [n, call.width], in the accumulation type

 private:
  const Call& call_;
  Tensor indices_, x_, dead_, z_, keep_;  // what rows are made of; behind x_ those of an embedding
};

}  // namespace milkernels
