#include "instances.h"

#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "dropout.h"
#include "few_rows.h"
#include "layer.h"

namespace milkernels {
namespace {

// T: in what x is stored; E: of the products; H: in what rows are made.
template <typename T, typename E, typename H>
class EmbedSource final : public EmbeddedRows<H> {
 public:
  using A = acc_t<E>;
  using V = Vectorized<A>;

  EmbedSource(const Call& call, RowGradients* gradients)
      : x_(call.ragged<T>()), layer_(call.embedding.template layer<E>(x_.width, x_.rows, call.kept.embedded)),
        dropout_(call.embedding.dropout),
        // The derivative of a ReLU and its dropout can be read off what came out.
        keeps_slopes_(call.embedding.activation != Activation::kRelu), kept_(call.kept.embedded),
        gradients_(gradients) {
    if (!has_gradient()) return;
    pass_rows_ = milkernels::pass_rows(x_.rows);
    bias_.emplace(pass_rows_, layer_.columns());
    if (needs_weight()) {
      using Part = typename OuterProducts<E>::Part;
      weight_.emplace(pass_rows_, layer_.columns(), layer_.in(), layer_.planes(),
                      std::vector<Part>{{gradients->weight.mutable_data_ptr<A>(), 0, layer_.out()}});
    }
    if (gradients->need_x) {
      layer_.prepare_input_gradient();
      advise_huge_pages(gradients->x.mutable_data_ptr<T>(), x_.rows * x_.width * int64_t(sizeof(T)));
    }
  }

  std::unique_ptr<typename Source<H>::Worker> worker(int64_t rows) const override {
    return std::make_unique<Worker>(*this, rows);
  }
  bool has_gradient() const override { return gradients_ != nullptr && gradients_->any(); }
  int64_t pass_rows() const override { return pass_rows_; }
  void add_pass(int64_t rows) const override {
    if (weight_) weight_->add_pass(rows);
    if (bias_) bias_->add_pass();
  }

  void finish() override {
    if (!has_gradient()) return;
    if (weight_) weight_->finish();
    if (gradients_->need_bias) bias_->copy_to(gradients_->bias.mutable_data_ptr<A>(), 0, layer_.out());
  }

 private:
  struct Worker final : Source<H>::Worker {
    const EmbedSource& p;
    MatrixUnits matrix_units;
    Buffer<E> copied, left, transposed;
    Buffer<H> made;
    const H* rows_at = nullptr;  // what was made last, here or where it is kept
    Buffer<A> block, keep, slopes;
    Matrix<E> x{};

    Worker(const EmbedSource& p, int64_t rows)
        : p(p), copied(p.layer_.planes() * rows * p.layer_.depth()),
          left(p.has_gradient() ? p.layer_.planes() * rows * p.layer_.columns() : 0),
          transposed(p.layer_.scratch_size(rows)), made(rows * p.layer_.columns()), block(kBlock * kBlock),
          keep(p.dropout_ ? kBlock * kBlock : 0),
          slopes(p.has_gradient() && p.keeps_slopes_ ? rows * p.layer_.columns() : 0) {}

    Tile<H> rows(const Tile<H>& tile) override { return p.make(tile, *this); }
    void backward(const Tile<H>& unit, const H* grad_rows, const Place& place) override {
      p.backward(unit, grad_rows, place, *this);
    }
    void skip_backward(const Tile<H>& unit) override {
      if (T* const grad_x = p.grad_x()) std::fill_n(grad_x + unit.first * p.x_.width, unit.rows * p.x_.width, T(0));
    }
  };

  bool needs_weight() const { return gradients_ != nullptr && gradients_->need_weight; }
  T* grad_x() const { return gradients_ ? data_if<T>(gradients_->need_x, gradients_->x) : nullptr; }

  // What is kept are rows, or the products that they are made of where a slope cannot be read off them.
  Tile<H> make(const Tile<H>& tile, Worker& s) const {
    const int64_t rows = round_up(tile.rows, kRowMultiple), columns = layer_.columns(), at = tile.first * columns;
    const bool reads = kept_.reads(tile.first), writes = kept_.writes(tile.first);
    const bool keeps_rows = !keeps_slopes_ && (reads || writes);
    if (!reads || needs_weight()) {
      const auto from = x_.tile(tile.first, tile.rows);
      s.x = copy_rows(from.x, from.ld, tile.mask, tile.rows, rows, x_.width, layer_.depth(), layer_.planes(),
                      s.copied.get());
    }
    if (writes) zero_skipped(tile.first);
    H* const in_place = keeps_rows ? kept_.as<H>(at) : nullptr;
    H* const made = in_place ? in_place : s.made.get();
    s.rows_at = made;
    const Tile<H> result{made, columns, tile.width, tile.first, tile.rows, tile.mask};
    if (reads && keeps_rows) {
      if (!in_place) kept_.read(at, made, rows * columns);
      return result;
    }
    if (!reads) layer_.projection().prepare(s.x, rows, s.transposed.get());
    layer_.for_blocks(rows, [&](int64_t t, int64_t c, int64_t count, const A* bias) {
      A* const block = s.block.get();
      if (!reads) layer_.projection().block(s.x, t, count, c, s.transposed.get(), block, kBlock);
      for (int64_t r = 0; (reads || writes) && !keeps_rows && r < count; ++r) {
        if (reads) kept_.read(at + (t + r) * columns + c, block + r * kBlock, kBlock);
        else kept_.write_and_round(at + (t + r) * columns + c, block + r * kBlock, kBlock);
      }
      if (dropout_) {
        dropout_factors(dropout_, {DropoutBranch::kEmbedding}, tile.first + t, count, c, kBlock, s.keep.get(), kBlock);
      }
      A* const slopes = has_gradient() && keeps_slopes_ ? s.slopes.get() + t * columns + c : nullptr;
      with_activation(layer_.activation(), [&](auto f) {
        activate<decltype(f)::value>(block, bias, s.keep.get(), count, made + t * columns + c, slopes);
      });
    });
    if (writes && keeps_rows && !in_place) kept_.write_and_round(at, made, rows * columns);
    return result;
  }

  // Tiles of a chunk that a forward passed over, for they have no real row: a backward takes the chunk whole.
  void zero_skipped(int64_t first) const {
    const int64_t begin = first / x_.chunk() * x_.chunk(), row = layer_.columns() * kept_.size;
    std::memset(kept_.data + begin * row, 0, (first - begin) * row);
  }

  // A block of products becomes rows and, where slopes is not null, the derivatives of these.
  template <Activation F>
  void activate(const A* block, const A* bias, const A* keep, int64_t count, H* made, A* slopes) const {
    const int64_t ld = layer_.columns();
    const V zero(A(0));
    const auto dropped = [&](V v, const A* factor) {
      const V k = V::loadu(factor);
      return V::blendv(v * k, zero, k == zero);  // selected away, it may be infinite
    };
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t j = 0; j < kBlock; j += Pair<H>::width) {
        V made_of[2];
        for (int i = 0; i < 2; ++i) {
          const int64_t at = j + i * V::size();
          const V a = V::loadu(block + r * kBlock + at) + V::loadu(bias + at);
          V h = gate<F, false, A>(a, zero);
          if (dropout_) h = dropped(h, keep + r * kBlock + at);
          made_of[i] = h;
          if (slopes == nullptr) continue;
          V slope = gate_grad<F, false, A>(a, zero).da;
          if (dropout_) slope = slope * V::loadu(keep + r * kBlock + at);
          slope.store(slopes + r * ld + at);
        }
        Pair<H>{made_of[0], made_of[1]}.store(made + r * ld + j);
      }
    }
  }

  void backward(const Tile<H>& unit, const H* grad_rows, const Place& place, Worker& s) const {
    const int64_t rows = round_up(unit.rows, kRowMultiple), columns = layer_.columns();
    const Matrix<E> left{s.left.get(), columns, rows * columns};
    A* const bias = bias_->at(place.item);
    for (int64_t c = 0; c < columns; c += kBlock) gradient_of_products(unit, grad_rows, rows, c, s, bias + c);
    if (weight_) weight_->put(place.row, rows, left, s.x);
    if (T* const to = grad_x()) {
      layer_.input_gradient(left, rows, s.block.get(), [&](int64_t r, int64_t column, int64_t count, const A* part) {
        if (r >= unit.rows) return;
        T* const out = to + (unit.first + r) * x_.width + column;
        if (is_real(unit.mask, r)) convert_row(part, out, count);
        else std::fill_n(out, count, T(0));
      });
    }
  }

  // Columns [c, c + kBlock) of the gradient of W x + b, and their sums for the bias.
  void gradient_of_products(const Tile<H>& unit, const H* grad_rows, int64_t rows, int64_t c, Worker& s,
                            A* bias) const {
    const int64_t columns = layer_.columns(), wide = std::min(kBlock, unit.width - c);
    const V scale(static_cast<A>(dropout_.scale)), zero(A(0));
    A values[kBlock] = {}, sum[kBlock] = {};  // of this unit: long running sums lose digits
    for (int64_t r = 0; r < rows; ++r) {
      E* const to = s.left.get() + r * columns + c;
      if (r >= unit.rows || !is_real(unit.mask, r)) {
        for (int p = 0; p < layer_.planes(); ++p) std::fill_n(to + p * rows * columns, kBlock, E(0));
        continue;
      }
      for_steps<Pair<H>::width>(std::max<int64_t>(wide, 0), [&](int64_t j, auto step) {
        auto g = load_pair(grad_rows + r * unit.width + c + j, step);
        if (keeps_slopes_) {
          const auto slope = load_pair(s.slopes.get() + r * columns + c + j, step);
          g = {g.lo * slope.lo, g.hi * slope.hi};
        } else {  // NaN has the slope of what is positive, as in PyTorch
          const auto h = load_pair(s.rows_at + r * columns + c + j, step);
          g = {V::blendv(g.lo * scale, zero, h.lo <= zero), V::blendv(g.hi * scale, zero, h.hi <= zero)};
        }
        const Pair<A> value{g.lo, g.hi};
        store_pair(value, values + j, step);
        const auto so_far = load_pair(sum + j, step);
        store_pair(Pair<A>{so_far.lo + g.lo, so_far.hi + g.hi}, sum + j, step);
      });
      write_elements(values, to, kBlock, layer_.planes(), rows * columns);
    }
    for (int64_t j = 0; j < kBlock; ++j) bias[j] += sum[j];
  }

  Ragged<T> x_;
  Layer<E> layer_;
  Dropout dropout_;
  bool keeps_slopes_;
  KeptRows kept_;
  RowGradients* gradients_;
  int64_t pass_rows_ = kAllRows;
  mutable std::optional<OuterProducts<E>> weight_;  // in a backward, as their gradients are needed
  mutable std::optional<ItemSums<A>> bias_;
};

}  // namespace

template <typename H>
std::unique_ptr<EmbeddedRows<H>> embedded_rows(const Call& call, RowGradients* gradients) {
  std::unique_ptr<EmbeddedRows<H>> rows;
  const auto make = [&]<typename T, typename E>() {
    // H goes with one element type of these pairs only.
    if constexpr (std::is_same_v<acc_t<T>, acc_t<H>> && (std::is_same_v<H, E> || std::is_same_v<H, acc_t<E>>)) {
      rows = std::make_unique<EmbedSource<T, E, H>>(call, gradients);
    }
  };
  dispatch_products(call.x.scalar_type(), call.embedding.planes, make);
  TORCH_INTERNAL_ASSERT(rows != nullptr);
  return rows;
}
template std::unique_ptr<EmbeddedRows<double>> embedded_rows(const Call&, RowGradients*);
template std::unique_ptr<EmbeddedRows<float>> embedded_rows(const Call&, RowGradients*);
template std::unique_ptr<EmbeddedRows<BFloat16>> embedded_rows(const Call&, RowGradients*);

SomeRows::SomeRows(const Call& call, const Tensor& indices)
    : call_(call), indices_(indices.reshape({-1}).contiguous()) {
  const int64_t n = indices_.numel(), width = call.x.size(1);
  const int64_t* const row = indices_.const_data_ptr<int64_t>();
  x_ = call.empty({n, width});
  dispatch_storage(call.x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const auto in = call.ragged<T>();
    for (int64_t i = 0; i < n; ++i) {
      A* const to = x_.mutable_data_ptr<A>() + i * width;
      if (row[i] < 0) std::fill_n(to, width, A(0));
      else convert_row(in.x + row[i] * in.ld, to, width);
    }
  });
  rows = x_;
  const Embedding& e = call.embedding;
  if (!e) return;
  dead_ = (indices_ < 0).unsqueeze(1);
  z_ = product_nt(x_, e.weight);
  if (e.bias.defined()) z_.add_(e.bias);
  rows = activated(z_, e.activation);
  if (e.dropout) {
    keep_ = at::empty_like(z_);
    const auto fill = [&]<typename A>() {
      const int64_t padded = round_up(call.width, 8);  // units come in groups of eight
      std::vector<A> factors(padded);
      for (int64_t i = 0; i < n; ++i) {
        dropout_factors(e.dropout, {DropoutBranch::kEmbedding}, std::max<int64_t>(row[i], 0), 1, 0, padded,
                        factors.data(), padded);
        std::copy_n(factors.data(), call.width, keep_.mutable_data_ptr<A>() + i * call.width);
      }
    };
    if (call.acc == at::kDouble) fill.template operator()<double>();
    else fill.template operator()<float>();
    rows = (rows * keep_).masked_fill_(keep_ == 0, 0.);
  }
  rows = rows.masked_fill(dead_, 0.);
}

void SomeRows::backward(const Tensor& grad_rows, RowGradients& gradients) const {
  const Embedding& e = call_.embedding;
  Tensor g = grad_rows;
  if (e) {
    g = g.masked_fill(dead_, 0.);
    if (e.dropout) g = g * keep_;
    g = through_activation(g.contiguous(), z_, e.activation);
    if (gradients.need_weight) gradients.weight.add_(product_tn(g, x_));
    if (gradients.need_bias) gradients.bias.add_(column_sums(g));
    if (gradients.need_x) g = product_nn(g, e.weight);
  }
  if (gradients.need_x) gradients.add_to_rows(indices_, g.contiguous());
}

RowGradients::RowGradients(const Call& call, const Tensor& x, const Tensor& weight, const Tensor& bias)
    : need_x(x.numel() > 0), need_weight(weight.numel() > 0), need_bias(bias.numel() > 0), x(x), weight(weight),
      bias(bias) {
  const auto check = [&](const Tensor& t, const char* name, const Tensor& like, ScalarType type) {
    const bool fits = like.defined() && t.sizes() == like.sizes() && t.scalar_type() == type && call.here(t);
    TORCH_CHECK_VALUE(t.numel() == 0 || (fits && t.is_contiguous()), name,
                      " must be empty or a contiguous gradient; got ", t.scalar_type(), " ", t.sizes());
  };
  check(x, "grad_x", call.x, call.x.scalar_type());
  check(weight, "grad_e_weight", call.embedding.weight, call.acc);
  check(bias, "grad_e_bias", call.embedding.bias, call.acc);
}

void RowGradients::finish() {
  if (added_.empty()) return;
  const int64_t width = x.size(1);
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    std::vector<std::pair<int64_t, const A*>> given;
    for (const auto& [indices, values] : added_) {
      const int64_t* const row = indices.template const_data_ptr<int64_t>();
      const A* const value = values.template const_data_ptr<A>();
      for (int64_t i = 0; i < indices.numel(); ++i) {
        if (row[i] >= 0) given.emplace_back(row[i], value + i * width);
      }
    }
    std::stable_sort(given.begin(), given.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    std::vector<A> sum(width);
    for (size_t i = 0; i < given.size();) {
      const int64_t row = given[i].first;
      std::copy_n(given[i].second, width, sum.begin());
      while (++i < given.size() && given[i].first == row) add_to_row<A>(sum.data(), given[i].second, A(1), width);
      add_to_row(x.mutable_data_ptr<T>() + row * width, sum.data(), A(1), width);
    }
  });
  added_.clear();
}

// --- The ops

namespace {

Call call_of(const Tensor& x, const OptionalTensors& embed, std::optional<std::string_view> activation,
             double dropout_p, std::optional<ScalarType> dtype) {
  return {x, std::nullopt, std::nullopt, {embed, activation, dropout_p, dtype}};
}

Tensor rows_at(const Tensor& x, const Tensor& indices, const OptionalTensors& embed,
               std::optional<std::string_view> embed_activation, double embed_dropout_p,
               std::optional<ScalarType> embed_dtype) {
  const Call call = call_of(x, embed, embed_activation, embed_dropout_p, embed_dtype);
  return SomeRows(call, call.take_indices(indices, "indices", indices.sizes())).rows;
}

void add_rows_(const Tensor& grad_x, const Tensor& grad_e_weight, const Tensor& grad_e_bias, const Tensor& x,
               const Tensor& indices, const Tensor& grad_rows, const OptionalTensors& embed,
               std::optional<std::string_view> embed_activation, double embed_dropout_p,
               std::optional<ScalarType> embed_dtype) {
  const Call call = call_of(x, embed, embed_activation, embed_dropout_p, embed_dtype);
  RowGradients of_rows(call, grad_x, grad_e_weight, grad_e_bias);
  if (!of_rows.any()) return;
  const Tensor places = call.take_indices(indices, "indices", indices.sizes());
  const Tensor grad = call.take(grad_rows, "grad_rows", {places.numel(), call.width});
  if (call.embedding) SomeRows(call, places).backward(grad, of_rows);
  else of_rows.add_to_rows(places, grad);
  of_rows.finish();
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("rows_at.native", rows_at);
  m.impl("add_rows_.native", add_rows_);
}

}  // namespace
}  // namespace milkernels
