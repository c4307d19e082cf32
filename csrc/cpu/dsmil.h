// DSMIL on the CPU (Li, Li, Eliceiri 2021): a call, its critical instances, and the two passes of its second stream
// over the rows, which typed/dsmil.cpp has for each type of these.
//
// What is linear never meets the instances: <Wq x_i + bq, q_m> = <x_i, Wq^T q_m> + <bq, q_m>, so a linear query is one
// vector for each bag and class, and V sum_i a_i x_i = sum_i a_i V x_i, since the weights sum to 1. The few critical
// instances are dealt with by products of a few rows.
#pragma once

#include "instances.h"

namespace milkernels {

class DSMILCall : public Call {
 public:
  DSMILCall(const Tensor& x, const DSMILWeights& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
            const OptionalTensor& seed, const std::optional<std::string_view>& v_activation, double v_dropout_p,
            std::optional<double> scale, std::optional<ScalarType> compute_dtype, const EmbedArguments& embed)
      : Call(x, offsets, mask, embed),
        v_activation(v_activation ? parse_activation(*v_activation) : Activation::kIdentity),
        v_dropout(dropout_of(seed, v_dropout_p)), planes(planes_of(compute_dtype)) {
    const auto units = [&](int i, int64_t width) {
      return weights[i] ? units_of(*weights[i], DSMILWeights::kNames[i], width) : 0;
    };
    const auto taken = [&](int i, at::IntArrayRef sizes) { return take(weights[i], DSMILWeights::kNames[i], sizes); };
    const int64_t Q = units(0, width), Q2 = units(2, Q), Lv = units(4, width);
    parameters = {taken(0, {Q, width}), taken(1, {Q}),         taken(2, {Q2, Q}),
                  taken(3, {Q2}),       taken(4, {Lv, width}), taken(5, {Lv})};
    this->scale = scale.value_or(1. / std::sqrt(static_cast<double>(Q2 > 0 ? Q2 : Q)));
  }

  const Tensor& q_weight() const { return parameters[0]; }
  const Tensor& q_bias() const { return parameters[1]; }
  const Tensor& q2_weight() const { return parameters[2]; }
  const Tensor& q2_bias() const { return parameters[3]; }
  const Tensor& v_weight() const { return parameters[4]; }
  const Tensor& v_bias() const { return parameters[5]; }
  bool mlp() const { return q2_weight().defined(); }
  bool folded() const { return v_weight().defined() && v_activation == Activation::kIdentity; }
  bool layered() const { return v_weight().defined() && !folded(); }  // the value is no linear map of what is pooled
  int64_t pooled_width() const { return layered() ? v_weight().size(0) : width; }
  int64_t bag_width() const { return v_weight().defined() ? v_weight().size(0) : width; }

  Activation v_activation;
  Dropout v_dropout;
  int planes;
  double scale;
  std::array<Tensor, 6> parameters;  // q_weight .. v_bias, in the accumulation type; undefined where absent
};

// The queries of the critical instances, recomputed here so that the gradient flows through both uses of q.
class CriticalQueries {
 public:
  // critical [bags, classes], -1 for a class without one: its scores are -inf.
  CriticalQueries(const DSMILCall& call, const Tensor& critical);

  template <typename A>
  Queries<A> typed() const {
    return {vectors.const_data_ptr<A>(), classes_, classes_ * vectors.size(1), shift.const_data_ptr<A>(), classes_};
  }

  // From the gradients of `vectors` and, for a linear query, of `shift` (or undefined): adds to those of the query's
  // parameters [q_weight .. q2_bias] and of the critical rows.
  void backward(const Tensor& grad_vectors, const Tensor& grad_shift, std::array<Tensor, 4> grads,
                RowGradients& of_rows) const;

  Tensor dead;  // [bags * classes]
  Tensor vectors;  // what instances are multiplied with, scale included: [bags * classes, width or padded hidden]
  Tensor shift;  // [bags * classes]

 private:
  const DSMILCall& call_;
  SomeRows instances_;
  int64_t classes_;
  Tensor z_, hidden_, z2_, q_;  // [bags * classes, ..]; z_ and z2_ before an activation
};

// Writes the critical instances, those with the largest of `logits` [rows, classes], what is pooled by their scores,
// the scores and lse.
template <typename T>
void second_stream_rows(const DSMILCall& call, const Ragged<T>& in, const Tensor& logits, const Tensor& critical,
                        const Tensor& bag, const Tensor& scores, const Tensor& lse);

// Writes the gradients of the vectors of `queries`, those of the rows, and those of the layers that rows went through
// into grads (q_weight .. v_bias).
template <typename T>
void second_stream_rows_backward(const DSMILCall& call, const Ragged<T>& in, const CriticalQueries& queries,
                                 const PooledTensors& tensors, const Tensor& grad_vectors,
                                 std::array<Tensor, 6>& grads);

}  // namespace milkernels
