// Score programs `attention` and `gated` (Ilse, Tomczak, Welling 2018, eqs. 8 and 9):
//   score[i, k] = w_k . drop(act(V x_i + b_V)) + c_k
//   score[i, k] = w_k . (drop(act(V x_i + b_V)) * drop(sigmoid(U x_i + b_U))) + c_k
//
// Hidden units are taken in groups small enough that the products of V and of U for one group fill one packed block:
// 32 units gated ([V | U]), 64 plain. A tile of rows is multiplied with one block, gated in place and reduced to scores
// before the next block; but for the products of the first rows, which are kept if the call says so, nothing of size
// N x D exists.
#pragma once

#include "dropout.h"
#include "kept.h"
#include "pool_backward.h"
#include "projection.h"

namespace milkernels {

// Parameters as the program wants them: contiguous, in the accumulation type; null where absent.
template <typename A>
struct AttentionParameters {
  const A *v_weight, *v_bias;  // [hidden, width], [hidden]
  const A *u_weight, *u_bias;  // the same, or null: plain attention
  const A *w_weight, *w_bias;  // [heads, hidden], [heads]
  int64_t width, hidden, heads;

  bool gated() const { return u_weight != nullptr; }
};

// One item's sums of the gradients of a few parameters. In a backward columns are those of V, then those of U.
template <typename A>
struct AttentionGradients {
  A *bias, *w_weight, *w_bias;
};

template <typename T, typename E>
class AttentionScore final : public Score<T> {
 public:
  using A = acc_t<T>;
  using V = Vectorized<A>;

  // `rows`: of the call, which are kept in `kept` as far as that goes.
  AttentionScore(const AttentionParameters<A>& p, Activation activation, Dropout dropout, int planes,
                 const KeptRows& kept, int64_t rows)
      : p_(p), dropout_(dropout), planes_(planes), group_(p.gated() ? kBlock / 2 : kBlock),
        groups_(ceil_div(p.hidden, group_)), bias_(columns(), A(0)), w_(p.heads * units(), A(0)),
        gate_(select_gate(activation, p.gated())), kept_(kept) {
    if (rows > 0 && !kept.reads(rows - 1)) {
      forward_.emplace(p.width, columns(), planes, rows, [&](int64_t c) { return projection_row(c); });
    }
    for (int64_t c = 0; c < columns(); ++c) {
      const A* const bias = is_u(c) ? p.u_bias : p.v_bias;
      if (bias != nullptr && unit(c) < p.hidden) bias_[c] = bias[unit(c)];
    }
    for (int64_t k = 0; k < p.heads; ++k) {
      std::copy_n(p.w_weight + k * p.hidden, p.hidden, w_.begin() + k * units());
    }
  }

  int64_t heads() const override { return p_.heads; }
  bool whole_chunks() const override { return false; }
  int64_t pass_rows() const override { return pass_rows_; }
  void add_pass(int64_t rows) const override {
    if (projection_) projection_->add_pass(rows);
    sums_->add_pass();
  }
  int64_t units() const { return groups_ * group_; }  // hidden units, padded
  int64_t columns() const { return groups_ * kBlock; }  // of the projection: V and U of group 0, of group 1, ..
  int64_t unit(int64_t column) const { return column / kBlock * group_ + column % group_; }
  bool is_u(int64_t column) const { return p_.gated() && column % kBlock >= group_; }

  std::unique_ptr<typename Score<T>::Worker> forward_worker() const override {
    return std::make_unique<Worker>(*this, kBlock, false);
  }
  std::unique_ptr<typename Score<T>::Worker> backward_worker() const override {
    return std::make_unique<Worker>(*this, kChunk, true);
  }

  // Before the backward: where the gradients of V and U go, null where nobody wants them; and whether x has one.
  void prepare_backward(int64_t rows, A* v, A* u, bool input_gradient) {
    pass_rows_ = milkernels::pass_rows(rows);
    std::vector<typename OuterProducts<E>::Part> parts;
    if (v != nullptr) parts.push_back({v, 0, p_.hidden});
    if (u != nullptr) parts.push_back({u, units(), p_.hidden});
    if (!parts.empty()) projection_.emplace(pass_rows_, columns(), p_.width, planes_, parts);
    sums_.emplace(pass_rows_, columns() + p_.heads * (units() + 1));
    if (!input_gradient) return;
    backward_.emplace(p_.width, columns(), planes_, rows, [&](int64_t c) {
      const int64_t unit = c % units();
      return unit < p_.hidden ? (c < units() ? p_.v_weight : p_.u_weight) + unit * p_.width : nullptr;
    });
  }

  // After it: the gradients of the others, any of which may be null.
  void finish(A* v_bias, A* u_bias, A* w, A* w_bias) {
    if (projection_) projection_->finish();
    sums_->copy_to(v_bias, 0, p_.hidden);
    sums_->copy_to(u_bias, units(), p_.hidden);
    for (int64_t k = 0; w != nullptr && k < p_.heads; ++k) {
      sums_->copy_to(w + k * p_.hidden, columns() + k * units(), p_.hidden);
    }
    sums_->copy_to(w_bias, columns() + p_.heads * units(), p_.heads);
  }

 private:
  struct Worker final : Score<T>::Worker {
    const AttentionScore& program;
    MatrixUnits matrix_units;
    Buffer<E> copied, grad, transposed;
    Buffer<A> block, keep;

    Worker(const AttentionScore& p, int64_t rows, bool backward)
        : program(p), copied(p.planes_ * rows * p.depth()), grad(backward ? p.planes_ * rows * p.columns() : 0),
          transposed(p.forward_ ? p.forward_->scratch_size(rows) : 0), block(kBlock * kBlock), keep(kBlock * kBlock) {}
    void scores(const Tile<T>& tile, A* scores) override { program.forward(tile, scores, *this); }
    void backward(const Tile<T>& unit, const A* grad_scores, const InputGradient<T>& grad_x,
                  const Place& place) override {
      program.backward(unit, grad_scores, grad_x, place, *this);
    }
  };

  void forward(const Tile<T>& tile, A* scores, Worker& s) const {
    const int64_t rows = round_up(tile.rows, kRowMultiple), heads = p_.heads;
    const auto x = copy_rows(tile.x, tile.ld, tile.mask, tile.rows, rows, p_.width, depth(), planes_, s.copied.get());
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t k = 0; k < heads; ++k) scores[r * heads + k] = p_.w_bias ? p_.w_bias[k] : A(0);
    }
    A* const block = s.block.get();
    forward_->prepare(x, rows, s.transposed.get());
    for (int64_t g = 0; g < groups_; ++g) {
      forward_->block(x, 0, rows, g * kBlock, s.transposed.get(), block, kBlock);
      if (kept_.writes(tile.first)) kept_.write(kept_place(tile.first, g), block, rows * kBlock);
      if (dropout_) fill_keep(tile.first, rows, g, s.keep.get());
      (this->*gate_.forward)(block, rows, g, s.keep.get());
      for (int64_t r = 0; r < tile.rows; ++r) {
        for (int64_t k = 0; k < heads; ++k) {
          const A* const w = w_.data() + k * units() + g * group_;
          V sum(A(0));
          for (int64_t j = 0; j < group_; j += V::size()) {
            sum = fmadd(V::loadu(block + r * kBlock + j), V::loadu(w + j), sum);
          }
          scores[r * heads + k] += horizontal_sum(sum);
        }
      }
    }
  }

  // Hidden units that are not kept are computed again, tile by tile.
  void backward(const Tile<T>& chunk, const A* grad_scores, const InputGradient<T>& grad_x, const Place& place,
                Worker& s) const {
    const int64_t rows = round_up(chunk.rows, kRowMultiple), heads = p_.heads;
    const int64_t plane_stride = rows * columns();
    const auto x =
        copy_rows(chunk.x, chunk.ld, chunk.mask, chunk.rows, rows, p_.width, depth(), planes_, s.copied.get());
    const auto out = gradients(sums_->at(place.item));
    for (int64_t k = 0; k < heads; ++k) {
      double sum = 0;
      for (int64_t r = 0; r < chunk.rows; ++r) sum += grad_scores[r * heads + k];
      out.w_bias[k] += static_cast<A>(sum);
    }
    A* const block = s.block.get();
    if (forward_) forward_->prepare(x, rows, s.transposed.get());
    for (int64_t t = 0; t < rows; t += kBlock) {
      const int64_t count = std::min(kBlock, rows - t);
      E* const grad = s.grad.get() + t * columns();
      const bool kept = kept_.reads(chunk.first + t);
      // A tile without a real row was passed over, and nothing of it is kept.
      const bool real = !kept || chunk.part(t, std::min(kBlock, chunk.rows - t)).any_real();
      for (int64_t g = 0; g < groups_; ++g) {
        if (!kept) forward_->block(x, t, count, g * kBlock, s.transposed.get(), block, kBlock);
        else if (real) kept_.read(kept_place(chunk.first + t, g), block, count * kBlock);
        else std::fill_n(block, count * kBlock, A(0));
        if (dropout_) fill_keep(chunk.first + t, count, g, s.keep.get());
        (this->*gate_.backward)(block, count, g, s.keep.get(), grad_scores + t * heads, grad, plane_stride, out);
      }
      if (!grad_x) continue;
      for (int64_t l = 0; l < p_.width; l += kBlock) {
        backward_->block({grad, columns(), plane_stride}, count, l, block);
        const int64_t real = std::min(count, chunk.rows - t), wide = std::min(kBlock, p_.width - l);
        for (int64_t r = 0; r < real; ++r) grad_x.store(t + r, l, wide, block + r * kBlock);
      }
    }
    if (projection_) projection_->put(place.row, rows, {s.grad.get(), columns(), plane_stride}, x);
  }

  int64_t depth() const { return Packed<E>::depth_of(p_.width); }
  // Of a tile, what is kept of one group lies together.
  int64_t kept_place(int64_t row, int64_t g) const { return row * columns() + g * kBlock * kBlock; }
  AttentionGradients<A> gradients(A* p) const { return {p, p + columns(), p + columns() + p_.heads * units()}; }

  using Forward = void (AttentionScore::*)(A*, int64_t, int64_t, const A*) const;
  using Backward = void (AttentionScore::*)(A*, int64_t, int64_t, const A*, const A*, E*, int64_t,
                                            const AttentionGradients<A>&) const;
  struct Gate {
    Forward forward;
    Backward backward;
  };

  template <Activation F>
  static Gate gate_of(bool gated) {
    if (gated) return {&AttentionScore::gate_forward<F, true>, &AttentionScore::gate_backward<F, true>};
    return {&AttentionScore::gate_forward<F, false>, &AttentionScore::gate_backward<F, false>};
  }
  static Gate select_gate(Activation f, bool gated) {
    switch (f) {
      case Activation::kTanh: return gate_of<Activation::kTanh>(gated);
      case Activation::kRelu: return gate_of<Activation::kRelu>(gated);
      case Activation::kGelu: return gate_of<Activation::kGelu>(gated);
      default: return gate_of<Activation::kIdentity>(gated);
    }
  }

  // The row of V or U that makes a column of the projection; null for padding.
  const A* projection_row(int64_t c) const {
    return unit(c) < p_.hidden ? (is_u(c) ? p_.u_weight : p_.v_weight) + unit(c) * p_.width : nullptr;
  }

  // What a hidden unit is multiplied by: 0 or the scale, of both branches together. Rows of `keep` are kBlock long.
  void fill_keep(int64_t first_row, int64_t rows, int64_t g, A* keep) const {
    const auto fill = [&](std::initializer_list<DropoutBranch> branches) {
      dropout_factors(dropout_, branches, first_row, rows, g * group_, group_, keep, kBlock);
    };
    if (p_.gated()) fill({DropoutBranch::kActivation, DropoutBranch::kSigmoid});
    else fill({DropoutBranch::kActivation});
  }

  // Turns the products of a group into its hidden units, in place.
  template <Activation F, bool GATED>
  void gate_forward(A* block, int64_t rows, int64_t g, const A* keep) const {
    const A* const bias = bias_.data() + g * kBlock;
    for (int64_t r = 0; r < rows; ++r) {
      A* const row = block + r * kBlock;
      for (int64_t j = 0; j < group_; j += V::size()) {
        const V a = V::loadu(row + j) + V::loadu(bias + j);
        V b;
        if constexpr (GATED) b = V::loadu(row + group_ + j) + V::loadu(bias + group_ + j);
        V h = gate<F, GATED, A>(a, b);
        if (dropout_) h = h * V::loadu(keep + r * kBlock + j);
        h.store(row + j);
      }
    }
  }

  // The products of a group become its hidden units, in place; the gradient of the products goes to its columns of
  // `grad` [rows, columns()], and the sums for the biases and w grow.
  template <Activation F, bool GATED>
  void gate_backward(A* block, int64_t rows, int64_t g, const A* keep, const A* grad_scores, E* grad,
                     int64_t plane_stride, const AttentionGradients<A>& out) const {
    const A *const bias = bias_.data() + g * kBlock, *const w = w_.data() + g * group_;
    A unsplit[2][kBlock], bias_sum[2][kBlock] = {};  // of this tile: long running sums lose digits
    const int64_t first[2] = {g * group_, units() + g * group_};  // columns of V and U
    constexpr int kBranches = GATED ? 2 : 1;
    for (int64_t r = 0; r < rows; ++r) {
      A* const row = block + r * kBlock;
      const A* const ds = grad_scores + r * p_.heads;
      A* to[2] = {unsplit[0], unsplit[1]};
      if constexpr (std::is_same_v<A, E>)
        to[0] = grad + r * columns() + first[0], to[1] = grad + r * columns() + first[1];
      const auto emit = [&](int branch, int64_t j, V value) {
        value.store(to[branch] + j);
        (V::loadu(bias_sum[branch] + j) + value).store(bias_sum[branch] + j);
      };
      for (int64_t j = 0; j < group_; j += V::size()) {
        const V a = V::loadu(row + j) + V::loadu(bias + j);
        V b;
        if constexpr (GATED) b = V::loadu(row + group_ + j) + V::loadu(bias + group_ + j);
        const GateGrad<A> d = gate_grad<F, GATED, A>(a, b);
        V dg = V(ds[0]) * V::loadu(w + j), h = d.g;
        for (int64_t k = 1; k < p_.heads; ++k) dg = fmadd(V(ds[k]), V::loadu(w + k * units() + j), dg);
        if (dropout_) {
          const V factor = V::loadu(keep + r * kBlock + j);
          dg = dg * factor;
          h = h * factor;
        }
        emit(0, j, dg * d.da);
        if constexpr (GATED) emit(1, j, dg * d.db);
        h.store(row + j);
      }
      for (int b = 0; !std::is_same_v<A, E> && b < kBranches; ++b) {
        write_elements(unsplit[b], grad + r * columns() + first[b], group_, planes_, plane_stride);
      }
    }
    for (int b = 0; b < kBranches; ++b) {
      for (int64_t j = 0; j < group_; ++j) out.bias[first[b] + j] += bias_sum[b][j];
    }
    for (int64_t k = 0; k < p_.heads; ++k) {
      A* const sum = out.w_weight + k * units() + g * group_;
      for (int64_t j = 0; j < group_; j += V::size()) {
        V total(A(0));
        for (int64_t r = 0; r < rows; ++r) {
          total = fmadd(V(grad_scores[r * p_.heads + k]), V::loadu(block + r * kBlock + j), total);
        }
        (V::loadu(sum + j) + total).store(sum + j);
      }
    }
  }

  AttentionParameters<A> p_;
  Dropout dropout_;
  int planes_;
  int64_t group_, groups_;
  std::vector<A> bias_, w_;  // [columns], [heads, units]
  Gate gate_;
  KeptRows kept_;
  std::optional<Projection<E>> forward_;  // where they are needed
  std::optional<BackProjection<E>> backward_;
  int64_t pass_rows_ = kAllRows;
  mutable std::optional<OuterProducts<E>> projection_;  // in a backward, if its gradient is needed: [columns, width]
  mutable std::optional<ItemSums<A>> sums_;
};

}  // namespace milkernels
