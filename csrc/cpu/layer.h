// A linear layer with its activation on a tile of rows, act(x W^T + b), and its backward: what the query network of
// DSMIL and the value stage are made of.
#pragma once

#include "kept.h"
#include "pool_backward.h"
#include "projection.h"

namespace milkernels {

// f(std::integral_constant<Activation, ..>)
template <typename F>
inline void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kTanh: return f(std::integral_constant<Activation, Activation::kTanh>{});
    case Activation::kRelu: return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu: return f(std::integral_constant<Activation, Activation::kGelu>{});
    default: return f(std::integral_constant<Activation, Activation::kIdentity>{});
  }
}

// E: in what the products run, see matmul.h. Outputs are padded to columns(); padding is 0 on the way there, since
// every activation of 0 is 0, and must be 0 on the way back. Rows are a multiple of kRowMultiple, at most kChunk.
template <typename E>
class Layer {
 public:
  using A = acc_t<E>;
  using V = Vectorized<A>;

  // weight [out, in]; bias [out] or null; `rows` of the call, of which so many are kept.
  Layer(const A* weight, const A* bias, int64_t out, int64_t in, Activation activation, int planes, int64_t rows,
        const KeptRows& kept)
      : weight_(weight), out_(out), in_(in), activation_(activation), planes_(planes), bias_(columns(), A(0)),
        rows_of_call_(rows) {
    if (rows > 0 && !kept.reads(rows - 1)) {
      forward_.emplace(in, columns(), planes, rows, [&](int64_t c) { return row(c); });
    }
    if (bias != nullptr) std::copy_n(bias, out, bias_.begin());
  }

  int64_t in() const { return in_; }
  int64_t out() const { return out_; }
  int64_t columns() const { return round_up(out_, kBlock); }
  int64_t depth() const { return Packed<E>::depth_of(in_); }  // of its input as a left operand
  const Projection<E>& projection() const { return *forward_; }  // where not all rows are kept
  int64_t scratch_size(int64_t rows) const { return forward_ ? forward_->scratch_size(rows) : 0; }
  int planes() const { return planes_; }
  Activation activation() const { return activation_; }

  // f(row, column, rows, bias) for every block of x W^T.
  template <typename F>
  void for_blocks(int64_t rows, const F& f) const {
    for (int64_t c = 0; c < columns(); c += kBlock) {  // the weights are read once for all rows
      for (int64_t t = 0; t < rows; t += kBlock) f(t, c, std::min(kBlock, rows - t), bias_.data() + c);
    }
  }
  // z [rows, columns()] = x W^T; `scratch` is that of the projection.
  void products(const Matrix<E>& x, int64_t rows, E* scratch, A* z) const {
    forward_->prepare(x, rows, scratch);
    for (int64_t t = 0; t < rows; t += kBlock) {
      const int64_t count = std::min(kBlock, rows - t);
      for (int64_t c = 0; c < columns(); c += kBlock) {
        forward_->block(x, t, count, c, scratch, z + t * columns() + c, columns());
      }
    }
  }
  // z [rows, columns()] = x W^T + b of a tile; the product is read from or written to what is kept of it.
  template <typename T>
  void forward(const KeptRows& kept, const Tile<T>& tile, const Matrix<E>& x, int64_t rows, E* scratch, A* z) const {
    if (!kept.reads(tile.first)) products(x, rows, scratch, z);
    if (kept.writes(tile.first)) kept.write_and_round(tile.first * columns(), z, rows * columns());
    for (int64_t t = 0; kept.reads(tile.first) && t < rows; t += kBlock) {
      const int64_t size = std::min(kBlock, rows - t) * columns();
      // A tile without a real row was passed over.
      if (tile.part(t, std::min(kBlock, tile.rows - t)).any_real()) {
        kept.read((tile.first + t) * columns(), z + t * columns(), size);
      } else {
        std::fill_n(z + t * columns(), size, A(0));
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns(); c += V::size()) {
        A* const to = z + r * columns() + c;
        (V::loadu(to) + V::loadu(bias_.data() + c)).store(to);
      }
    }
  }
  // y = act(z), which may be the same.
  void activate(const A* z, int64_t rows, A* y) const {
    with_activation(activation_, [&](auto f) {
      for (int64_t i = 0; i < rows * columns(); i += V::size()) {
        gate<decltype(f)::value, false, A>(V::loadu(z + i), V(A(0))).store(y + i);
      }
    });
  }

  // The gradients of weight and bias, sums over all rows.
  struct Gradients {
    OuterProducts<E> weight;  // [columns(), in]
    ItemSums<A> bias;  // [columns()]
    // The weight's is written to `to` [out, in].
    Gradients(const Layer& l, int64_t pass_rows, A* to)
        : weight(pass_rows, l.columns(), l.in(), l.planes(), {{to, 0, l.out()}}), bias(pass_rows, l.columns()) {}
    void add_pass(int64_t rows) {
      weight.add_pass(rows);
      bias.add_pass();
    }
  };

  // grad [rows, columns()] is that of y and becomes that of z, which is returned, for a product in `elements`
  // [planes, rows, columns()] if need be; puts the rows into `sums`.
  Matrix<E> backward(const Matrix<E>& x, const A* z, int64_t rows, A* grad, const Place& place, Gradients& sums,
                     E* elements) const {
    with_activation(activation_, [&](auto f) {
      for (int64_t i = 0; i < rows * columns(); i += V::size()) {
        (V::loadu(grad + i) * gate_grad<decltype(f)::value, false, A>(V::loadu(z + i), V(A(0))).da).store(grad + i);
      }
    });
    A* const bias = sums.bias.at(place.item);
    for (int64_t c = 0; c < columns(); c += V::size()) {
      V sum(A(0));
      for (int64_t r = 0; r < rows; ++r) sum = sum + V::loadu(grad + r * columns() + c);
      (V::loadu(bias + c) + sum).store(bias + c);
    }
    Matrix<E> left;
    if constexpr (std::is_same_v<A, E>) {
      left = {grad, columns()};
    } else {
      left = {elements, columns(), rows * columns()};
      write_elements(grad, elements, rows * columns(), planes_, left.plane_stride);
    }
    sums.weight.put(place.row, rows, left, x);
    return left;
  }

  // Before input_gradient: the weights as the right operand of [rows, columns()] products.
  void prepare_input_gradient() {
    backward_.emplace(in_, columns(), planes_, rows_of_call_, [&](int64_t c) { return row(c); });
  }
  // f(row, column, count, values) for blocks of the gradient of x; `grad` is what `backward` returned; `block` holds
  // kBlock * kBlock numbers.
  template <typename F>
  void input_gradient(const Matrix<E>& grad, int64_t rows, A* block, const F& f) const {
    for (int64_t t = 0; t < rows; t += kBlock) {
      const int64_t count = std::min(kBlock, rows - t);
      for (int64_t l = 0; l < in_; l += kBlock) {
        backward_->block(grad.rows_from(t), count, l, block);
        for (int64_t r = 0; r < count; ++r) f(t + r, l, std::min(kBlock, in_ - l), block + r * kBlock);
      }
    }
  }

 private:
  const A* row(int64_t c) const { return c < out_ ? weight_ + c * in_ : nullptr; }

  const A* weight_;
  int64_t out_, in_;
  Activation activation_;
  int planes_;
  std::vector<A> bias_;
  int64_t rows_of_call_;
  std::optional<Projection<E>> forward_;
  std::optional<BackProjection<E>> backward_;
};

}  // namespace milkernels
