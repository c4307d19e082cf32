// The instances as an op sees them, rows of x or their embedding made slice by slice, and their gradients on the way
// back.
#pragma once

#include <tuple>

#include "gradients.h"
#include "layers.h"

namespace milkernels {

// The gradient of the rows an op sees: of x, or through the embedding to x and the parameters there.
class RowGradients {
 public:
  // What is needed; of the parameters, where there is an embedding.
  RowGradients(const Call& call, bool x, bool weight, bool bias);
  // All have been written, and more is added; empty where they are not needed.
  RowGradients(const Call& call, const Tensor& x, const Tensor& weight, const Tensor& bias);

  bool need_x() const { return x.numel() > 0; }
  bool wanted() const { return need_x() || weight_.defined() || bias_.defined(); }
  // That of a slice's rows is product * scale + both terms.
  void write(const Slice& slice, const TermTensors& pooled, const TermTensors& scored, const Tensor& product = {},
             const Tensor& scale = {});
  // Adds the term; all rows have been written.
  void add(const Slice& slice, const TermTensors& scored);
  // Adds vectors [bags, C, width], in the accumulation type, to rows from instances_at; all have been written.
  void add_at(const Slice& chosen, const Tensor& vectors);
  // Instead of writing: there is none.
  void zero() const { x.zero_(); }

  // Those of the parameters, and these in their types; empty where they are not needed.
  std::tuple<Tensor, Tensor> sums() const;
  std::tuple<Tensor, Tensor> parameters() const;

  Tensor x;  // like x, empty where it is not needed

 private:
  LayerGradient into_layer(const Slice& slice, const Tensor& grad);

  const Call& call_;
  Tensor weight_, bias_;  // sums, where they are needed
};

// Rows [first, first + count); `to`: where their gradient will go, in a backward.
Slice instances(const Call& call, int64_t first, int64_t count, const RowGradients* to = nullptr);

// Those at these indices [bags, C] of rows, 0 for -1, with what RowGradients needs.
Slice instances_at(const Call& call, const Tensor& indices);

// Bytes of a slice's row on its way, and on the way back.
int64_t bytes_of_instance(const Call& call, const RowGradients* to = nullptr);

// f(slice) for the rows as they come: once for those of x, slice by slice where they are embedded.
template <typename F>
void for_instances(const Call& call, const RowGradients* to, const F& f) {
  if (!call.embedding) return f(Slice{call.x, 0, call.rows});
  call.in_slices(bytes_of_instance(call, to),
                 [&](int64_t first, int64_t count) { f(instances(call, first, count, to)); });
}

}  // namespace milkernels
