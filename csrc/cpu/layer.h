// A linear layer with its activation on a tile of rows, act(x W^T + b), and its backward: what the query network of
// DSMIL and the value stage are made of.
#pragma once

#include "pool_backward.h"

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

  // weight [out, in]; bias [out] or null.
  Layer(const A* weight, const A* bias, int64_t out, int64_t in, Activation activation, int planes)
      : weight_(weight), out_(out), in_(in), activation_(activation), planes_(planes), bias_(columns(), A(0)),
        packed_(Packed<E>::from_columns(in, columns(), planes, [&](int64_t c) { return row(c); })) {
    if (bias != nullptr) std::copy_n(bias, out, bias_.begin());
  }

  int64_t in() const { return in_; }
  int64_t out() const { return out_; }
  int64_t columns() const { return round_up(out_, kBlock); }
  int64_t depth() const { return packed_.depth(); }  // of its input as a left operand
  int planes() const { return planes_; }
  Activation activation() const { return activation_; }

  // f(row, column, rows, bias) for every block of x W^T, which `block` [rows, kBlock] then holds, without the bias.
  template <typename F>
  void for_blocks(const Matrix<E>& x, int64_t rows, A* block, const F& f) const {
    for (int64_t c = 0; c < columns(); c += kBlock) {  // the weights are read once for all rows
      for (int64_t t = 0; t < rows; t += kBlock) {
        const int64_t count = std::min(kBlock, rows - t);
        product<E>(count, kBlock, depth(), x.rows_from(t), packed_.block(c / kBlock), planes_, block, kBlock, false);
        f(t, c, count, bias_.data() + c);
      }
    }
  }
  // z [rows, columns()] = x W^T + b
  void products(const Matrix<E>& x, int64_t rows, A* z) const {
    for (int64_t t = 0; t < rows; t += kBlock) {
      const int64_t count = std::min(kBlock, rows - t);
      for (int64_t c = 0; c < columns(); c += kBlock) {
        product<E>(count, kBlock, depth(), x.rows_from(t), packed_.block(c / kBlock), planes_, z + t * columns() + c,
                   columns(), false);
      }
      for (int64_t r = t; r < t + count; ++r) {
        for (int64_t c = 0; c < columns(); c += V::size()) {
          A* const to = z + r * columns() + c;
          (V::loadu(to) + V::loadu(bias_.data() + c)).store(to);
        }
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

  // Sums over the rows of a slice.
  struct Sums {
    A *weight, *bias;  // [columns(), in], [columns()]
  };
  int64_t sums_size() const { return columns() * (in_ + 1); }
  Sums sums(A* p) const { return {p, p + columns() * in_}; }

  // Scratch of one thread.
  struct Backward {
    Buffer<E> grad, transposed, panel;  // [planes, rows, columns()], and of copy_columns
    Backward(const Layer& l, int64_t rows)
        : grad(std::is_same_v<A, E> ? 0 : l.planes_ * rows * l.columns()), transposed(l.planes_ * rows * l.columns()),
          panel(l.planes_ * rows * kBlock) {}
  };

  // grad [rows, columns()] is that of y and becomes that of z; adds to the sums (`first`: starts them).
  Matrix<E> backward(const Matrix<E>& x, const A* z, int64_t rows, A* grad, bool first, const Sums& sums,
                     Backward& s) const {
    with_activation(activation_, [&](auto f) {
      for (int64_t i = 0; i < rows * columns(); i += V::size()) {
        (V::loadu(grad + i) * gate_grad<decltype(f)::value, false, A>(V::loadu(z + i), V(A(0))).da).store(grad + i);
      }
    });
    if (first) std::fill_n(sums.bias, columns(), A(0));
    for (int64_t c = 0; c < columns(); c += V::size()) {
      V sum(A(0));
      for (int64_t r = 0; r < rows; ++r) sum = sum + V::loadu(grad + r * columns() + c);
      (V::loadu(sums.bias + c) + sum).store(sums.bias + c);
    }
    Matrix<E> left;
    if constexpr (std::is_same_v<A, E>) {
      left = {grad, columns()};
    } else {
      left = {s.grad.get(), columns(), rows * columns()};
      write_elements(grad, s.grad.get(), rows * columns(), planes_, left.plane_stride);
    }
    add_outer_products<E>(left, columns(), x, in_, rows, planes_, !first, s.transposed.get(), s.panel.get(),
                          sums.weight);
    return left;
  }

  // Before input_gradient: the weights as the right operand of [rows, columns()] products.
  void prepare_input_gradient() {
    packed_rows_.emplace(Packed<E>::from_rows(columns(), in_, planes_, [&](int64_t c) { return row(c); }));
  }
  // f(row, column, count, values) for blocks of the gradient of x; `grad` is what `backward` returned; `block` holds
  // kBlock * kBlock numbers.
  template <typename F>
  void input_gradient(const Matrix<E>& grad, int64_t rows, A* block, const F& f) const {
    for (int64_t t = 0; t < rows; t += kBlock) {
      const int64_t count = std::min(kBlock, rows - t);
      for (int64_t l = 0; l < in_; l += kBlock) {
        product<E>(count, kBlock, columns(), grad.rows_from(t), packed_rows_->block(l / kBlock), planes_, block, kBlock,
                   false);
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
  Packed<E> packed_;
  std::optional<Packed<E>> packed_rows_;
};

}  // namespace milkernels
