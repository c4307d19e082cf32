// The value stage of DSMIL, act(V drop(x_i) + b_V): pooled in place of x_i, computed for a tile at a time
// and again in the backward, never stored. Without V it is drop(x_i): a linear value is taken of the pooled vector
// instead.
#pragma once

#include "dropout.h"
#include "layer.h"

namespace milkernels {

template <typename T, typename E>
class ValueStage final : public Stage<T> {
 public:
  using A = acc_t<T>;

  // `kept`: the products of the layer.
  ValueStage(int64_t in_width, Dropout dropout, std::optional<Layer<E>> layer, const KeptRows& kept)
      : layer(std::move(layer)), in_width_(in_width), dropout_(dropout), kept_(kept) {}
  int64_t width() const override { return layer ? layer->out() : in_width_; }
  int64_t ld() const override { return layer ? layer->columns() : in_width_; }
  std::unique_ptr<typename Stage<T>::Worker> worker(int64_t rows) const override {
    return std::make_unique<Worker>(*this, rows);
  }

  // The gradient of the layer's weight is written to `weight`.
  void prepare_backward(int64_t rows, A* weight, bool input_gradient) {
    if (!layer) return;
    pass_rows_ = milkernels::pass_rows(rows);
    gradients.emplace(*layer, pass_rows_, weight);
    if (input_gradient) layer->prepare_input_gradient();
  }
  int64_t pass_rows() const override { return pass_rows_; }
  void add_pass(int64_t rows) const override {
    if (gradients) gradients->add_pass(rows);
  }

  std::optional<Layer<E>> layer;
  mutable std::optional<typename Layer<E>::Gradients> gradients;  // in a backward

 private:
  struct Worker final : Stage<T>::Worker {
    const ValueStage& p;
    MatrixUnits matrix_units;
    Buffer<A> keep, dropped, z, y, grad, block;
    Buffer<E> copied, elements, transposed;
    Matrix<E> x{};

    Worker(const ValueStage& p, int64_t rows)
        : p(p), keep(p.dropout_ ? rows * p.in_width_ : 0), dropped(p.dropout_ ? rows * p.in_width_ : 0),
          z(p.layer ? rows * p.ld() : 0), y(p.layer ? rows * p.ld() : 0), grad(p.gradients ? rows * p.ld() : 0),
          block(kBlock * kBlock), copied(p.layer ? p.layer->planes() * rows * p.layer->depth() : 0),
          elements(p.gradients ? p.layer->planes() * rows * p.ld() : 0),
          transposed(p.layer ? p.layer->scratch_size(rows) : 0) {}

    const A* rows(const Tile<T>& tile) override {
      const int64_t width = p.in_width_;
      if (p.dropout_) {
        dropout_factors(p.dropout_, {DropoutBranch::kValue}, tile.first, tile.rows, 0, width, keep.get(), width);
        for (int64_t r = 0; r < tile.rows; ++r) {
          A *const to = dropped.get() + r * width, *const factor = keep.get() + r * width;
          if (is_real(tile.mask, r)) convert_row(tile.x + r * tile.ld, to, width);
          else std::fill_n(to, width, A(0));
          // Selected, not multiplied away: a dropped unit may hold anything.
          for (int64_t l = 0; l < width; ++l) to[l] = factor[l] == A(0) ? A(0) : to[l] * factor[l];
        }
      }
      if (!p.layer) return dropped.get();
      const int64_t rows = round_up(tile.rows, kRowMultiple), depth = p.layer->depth();
      const int planes = p.layer->planes();
      x = p.dropout_ ? copy_rows(dropped.get(), width, tile.mask, tile.rows, rows, width, depth, planes, copied.get())
                     : copy_rows(tile.x, tile.ld, tile.mask, tile.rows, rows, width, depth, planes, copied.get());
      p.layer->forward(p.kept_, tile, x, rows, transposed.get(), z.get());
      p.layer->activate(z.get(), rows, y.get());
      return y.get();
    }

    void backward(const Tile<T>& unit, A* grad_rows, A* grad_x, const Place& place) override {
      const int64_t width = p.in_width_;
      if (p.layer) {
        const Layer<E>& layer = *p.layer;
        const int64_t rows = round_up(unit.rows, kRowMultiple);
        for (int64_t r = 0; r < rows; ++r) {
          A* const to = grad.get() + r * layer.columns();
          const int64_t real = r < unit.rows ? layer.out() : 0;
          std::copy_n(grad_rows + r * layer.out(), real, to);
          std::fill(to + real, to + layer.columns(), A(0));
        }
        const auto left = layer.backward(x, z.get(), rows, grad.get(), place, *p.gradients, elements.get());
        if (grad_x == nullptr) return;
        layer.input_gradient(left, rows, block.get(), [&](int64_t r, int64_t column, int64_t count, const A* part) {
          if (r < unit.rows) std::copy_n(part, count, grad_x + r * width + column);
        });
      } else if (grad_x != nullptr) {
        std::copy_n(grad_rows, unit.rows * width, grad_x);
      }
      if (p.dropout_ && grad_x != nullptr) {
        for (int64_t i = 0; i < unit.rows * width; ++i)
          grad_x[i] = keep.get()[i] == A(0) ? A(0) : grad_x[i] * keep.get()[i];
      }
    }
  };

  int64_t in_width_;
  Dropout dropout_;
  KeptRows kept_;
  int64_t pass_rows_ = kAllRows;
};

}  // namespace milkernels
