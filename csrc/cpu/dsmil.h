// The second stream of DSMIL on the CPU (Li, Li, Eliceiri 2021): the passes over its rows, which typed/dsmil.cpp has
// for each type of these. What a few critical instances need beside them is composed in Python.
#pragma once

#include "instances.h"

namespace milkernels {

class DSMILCall : public WithSecondStream<Call> {
 public:
  DSMILCall(const Tensor& x, const Tensor& vectors, const OptionalTensor& shift, const Tensor& critical,
            const DSMILWeights& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
            const OptionalTensor& seed, const std::optional<std::string_view>& v_activation, double v_dropout_p,
            std::optional<ScalarType> compute_dtype, const EmbedArguments& embed);
  template <typename A>
  Queries<A> queries() const {
    return {padded.const_data_ptr<A>(), classes, classes * padded.size(2), shift.const_data_ptr<A>(), classes};
  }

  // Numbers that are kept of a row: the products of each layer that rows go through.
  int64_t kept_width() const {
    int64_t width = 0;
    for (const int layer : {0, 2, 4}) {
      if (parameters[layer].defined()) width += round_up(parameters[layer].size(0), kBlock);
    }
    return width;
  }

  Dropout v_dropout;
  int planes;
  Tensor padded;  // the vectors, for an MLP with zeros up to the width of its hidden units as they are stored
};

// Writes what is pooled by the scores, the scores and lse.
template <typename T>
void dsmil_rows(const DSMILCall& call, const Ragged<T>& in, const Tensor& bag, const Tensor& scores, const Tensor& lse);

// Writes the gradients of the vectors, those of the rows, and those of the layers that rows went through into grads
// (q_weight .. v_bias).
template <typename T>
void dsmil_rows_backward(const DSMILCall& call, const Ragged<T>& in, const PooledTensors& tensors,
                         const Tensor& grad_vectors, const std::array<Tensor, 6>& grads);

}  // namespace milkernels
