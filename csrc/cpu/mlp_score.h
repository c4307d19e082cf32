// Score program `mlp_query`: score[i, k] = <tanh(W2 relu(W1 x_i + b1) + b2), q[b, k]>, b the bag of i: the query
// network of DSMIL as its authors ship it (Li, Li, Eliceiri 2021, public code).
#pragma once

#include "layer.h"
#include "query_score.h"

namespace milkernels {

template <typename T, typename E>
class MlpScore final : public Score<T> {
 public:
  using A = acc_t<T>;

  // The queries are second.columns() wide, padded with zeros. `kept`: the products of both layers.
  MlpScore(const Ragged<T>& in, Layer<E> first, Layer<E> second, const Queries<A>& queries,
           const std::array<KeptRows, 2>& kept)
      : first(std::move(first)), second(std::move(second)), products(in, queries, this->second.columns()), kept_(kept) {
  }
  int64_t heads() const override { return products.heads(); }
  int64_t backward_rows() const override { return kChunk; }
  std::unique_ptr<typename Score<T>::Worker> forward_worker() const override {
    return std::make_unique<Worker>(*this, kBlock);
  }
  std::unique_ptr<typename Score<T>::Worker> backward_worker() const override {
    return std::make_unique<BackwardWorker>(*this);
  }

  // The gradients of the layers' weights are written to these.
  void prepare_backward(int64_t rows, A* first_weight, A* second_weight, bool input_gradient) {
    pass_rows_ = milkernels::pass_rows(rows);
    first_gradients.emplace(first, pass_rows_, first_weight);
    second_gradients.emplace(second, pass_rows_, second_weight);
    second.prepare_input_gradient();
    if (input_gradient) first.prepare_input_gradient();
    products.prepare_gradient();
  }
  int64_t pass_rows() const override { return pass_rows_; }
  void add_pass(int64_t rows) const override {
    first_gradients->add_pass(rows);
    second_gradients->add_pass(rows);
  }

  Layer<E> first, second;
  mutable std::optional<typename Layer<E>::Gradients> first_gradients, second_gradients;  // in a backward
  QueryProducts<T, A> products;

 private:
  struct Worker : Score<T>::Worker {
    const MlpScore& p;
    MatrixUnits matrix_units;
    Buffer<E> copied, hidden, transposed;
    Buffer<A> z1, z2, query;
    typename QueryProducts<T, A>::Worker worker;

    Worker(const MlpScore& p, int64_t rows)
        : p(p), copied(p.first.planes() * rows * p.first.depth()), hidden(p.first.planes() * rows * p.first.columns()),
          transposed(std::max(p.first.scratch_size(rows), p.second.scratch_size(rows))), z1(rows * p.first.columns()),
          z2(rows * p.second.columns()), query(rows * p.second.columns()), worker(p.products.worker()) {}

    // Fills z1, z2 and query; returns the inputs of the two layers.
    std::pair<Matrix<E>, Matrix<E>> forward(const Tile<T>& tile, int64_t rows) {
      const auto& [first, second] = std::tie(p.first, p.second);
      const int64_t columns = first.columns();
      const auto x = copy_rows(tile.x, tile.ld, tile.mask, tile.rows, rows, tile.width, first.depth(), first.planes(),
                               copied.get());
      first.forward(p.kept_[0], tile, x, rows, transposed.get(), z1.get());
      A* const activated = activation_of(z1);
      first.activate(z1.get(), rows, activated);
      if constexpr (!std::is_same_v<A, E>) {
        write_elements(activated, hidden.get(), rows * columns, first.planes(), rows * columns);
      }
      const Matrix<E> h{hidden.get(), columns, rows * columns};
      second.forward(p.kept_[1], tile, h, rows, transposed.get(), z2.get());
      second.activate(z2.get(), rows, query.get());
      return {x, h};
    }
    // Where the hidden units go: they are the next operand as they are, or z1 again before they are split.
    A* activation_of(Buffer<A>& z) {
      if constexpr (std::is_same_v<A, E>) return hidden.get();
      else return scratch_of(z);
    }
    virtual A* scratch_of(Buffer<A>& z) { return z.get(); }

    void scores(const Tile<T>& tile, A* scores) override {
      forward(tile, round_up(tile.rows, kRowMultiple));
      p.products.scores(tile, query.get(), p.second.columns(), scores, /*streamed=*/false);
    }
    void backward(const Tile<T>&, const A*, const InputGradient<T>&, const Place&) override {}
  };

  struct BackwardWorker final : Worker {
    Buffer<A> grad1, grad2, block;
    Buffer<E> elements;

    explicit BackwardWorker(const MlpScore& p)
        : Worker(p, kChunk), grad1(kChunk * p.first.columns()), grad2(kChunk * p.second.columns()),
          block(kBlock * kBlock),
          elements(p.first.planes() * kChunk * std::max(p.first.columns(), p.second.columns())) {}
    A* scratch_of(Buffer<A>&) override { return grad1.get(); }  // z1 is needed again

    void backward(const Tile<T>& unit, const A* grad_scores, const InputGradient<T>& grad_x,
                  const Place& place) override {
      const auto& p = this->p;
      const int64_t rows = round_up(unit.rows, kRowMultiple), columns = p.second.columns(), heads = p.heads();
      const auto [x, h] = this->forward(unit, rows);
      std::fill(grad2.get() + unit.rows * columns, grad2.get() + rows * columns, A(0));
      std::vector<const A*> vectors(heads);
      p.products.backward(unit, this->query.get(), columns, grad_scores, this->worker,
                          [&](int64_t at, int64_t n, const A* queries) {
                            for (int64_t k = 0; k < heads; ++k) vectors[k] = queries + k * columns;
                            combine(grad_scores + at * heads, vectors.data(), heads, n, columns,
                                    grad2.get() + at * columns, columns);
                          });
      const auto grad_h =
          p.second.backward(h, this->z2.get(), rows, grad2.get(), place, *p.second_gradients, elements.get());
      if (p.first.columns() != p.first.out()) std::fill_n(grad1.get(), rows * p.first.columns(), A(0));
      p.second.input_gradient(grad_h, rows, block.get(), [&](int64_t r, int64_t column, int64_t count, const A* part) {
        std::copy_n(part, count, grad1.get() + r * p.first.columns() + column);
      });
      const auto grad =
          p.first.backward(x, this->z1.get(), rows, grad1.get(), place, *p.first_gradients, elements.get());
      if (!grad_x) return;
      p.first.input_gradient(grad, rows, block.get(), [&](int64_t r, int64_t column, int64_t count, const A* part) {
        if (r < unit.rows) grad_x.store(r, column, count, part);
      });
    }
  };

  std::array<KeptRows, 2> kept_;
  int64_t pass_rows_ = kAllRows;
};

}  // namespace milkernels
