#include "few_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "call.h"
#include "heads.h"
#include "layer.h"

namespace milkernels {

using at::Tensor;

namespace {

constexpr int64_t kRowsTogether = 4;      // rows of a result that are made together
constexpr int64_t kTermsTogether = 256;   // terms of a sum in one chain of additions: longer ones lose digits
constexpr int64_t kWorkOfAThread = 1 << 15;  // multiplications that are worth waking a thread for

void check(const Tensor& a, const Tensor& b, bool fits) {
  TORCH_INTERNAL_ASSERT(fits && a.is_contiguous() && b.is_contiguous() && a.scalar_type() == b.scalar_type());
}

// f(first row, rows) for the rows of a result, in blocks that no number of threads changes; `work`: of one row.
template <typename F>
void for_row_blocks(int64_t rows, int64_t work, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kWorkOfAThread / std::max<int64_t>(work * kRowsTogether, 1));
  at::parallel_for(0, ceil_div(rows, kRowsTogether), grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kRowsTogether; first < std::min(end * kRowsTogether, rows); first += kRowsTogether) {
      f(first, std::min(kRowsTogether, rows - first));
    }
  });
}

// out [n, m]: row i is sum_j coefficient(i, j) * b[j].
template <typename A, typename Coefficient>
void sums_of_rows(int64_t n, int64_t terms, const A* b, int64_t m, const Coefficient& coefficient, A* out) {
  for_row_blocks(n, terms * m, [&](int64_t first, int64_t rows) {
    std::vector<A> c(kRowsTogether * kTermsTogether), part(kRowsTogether * m);
    std::vector<const A*> vectors(kTermsTogether);
    for (int64_t from = 0; from == 0 || from < terms; from += kTermsTogether) {
      const int64_t count = std::min(kTermsTogether, terms - from);
      for (int64_t j = 0; j < count; ++j) {
        vectors[j] = b + (from + j) * m;
        for (int64_t r = 0; r < rows; ++r) c[r * count + j] = coefficient(first + r, from + j);
      }
      A* const to = out + first * m;
      combine<A>(c.data(), vectors.data(), count, rows, m, from == 0 ? to : part.data(), m);
      if (from > 0) add_to_row<A>(to, part.data(), A(1), rows * m);
    }
  });
}

// out [n, m] = a [n, k] times what is packed: of tiles of rows, as the kernels over all rows multiply.
template <typename A>
void tiled_product(const Tensor& a, const Packed<A>& packed, Tensor& out) {
  const int64_t n = a.size(0), k = a.size(1), m = out.size(1);
  const A* const from = a.const_data_ptr<A>();
  A* const to = out.mutable_data_ptr<A>();
  at::parallel_for(0, ceil_div(n, kBlock), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * kBlock; r < std::min(end * kBlock, n); r += kBlock) {
      for (int64_t c = 0; c < m; c += kBlock) {
        product<A>(std::min(kBlock, n - r), std::min(kBlock, m - c), k, {from + r * k, k}, packed.block(c / kBlock), 1,
                   to + r * m + c, m, false);
      }
    }
  });
}

// f(vector of inputs) -> outputs, element by element, in steps that do not depend on the threads.
template <typename A, typename F>
void elementwise(int64_t n, const F& f) {
  constexpr int64_t kSteps = 512;
  using V = Vectorized<A>;
  at::parallel_for(0, ceil_div(n, kSteps * V::size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kSteps * V::size(); i < std::min(end * kSteps * V::size(), n); i += V::size()) {
      f(i, std::min<int64_t>(V::size(), n - i));
    }
  });
}

}  // namespace

Tensor product_nt(const Tensor& a, const Tensor& b) {
  check(a, b, a.size(1) == b.size(1));
  const int64_t n = a.size(0), k = a.size(1), m = b.size(0);
  Tensor out = at::empty({n, m}, a.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "product_nt", [&] {
    const scalar_t *const rows = a.const_data_ptr<scalar_t>(), *const vectors = b.const_data_ptr<scalar_t>();
    if (n >= kBlock) {
      const auto column = [&](int64_t c) { return vectors + c * k; };
      return tiled_product<scalar_t>(a, Packed<scalar_t>::from_columns(k, m, 1, column), out);
    }
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    for_row_blocks(n, k * m, [&](int64_t first, int64_t count) {
      constexpr int32_t kInOrder[kRowsTogether] = {0, 1, 2, 3};
      dots<scalar_t>(rows + first * k, k, kInOrder, count, nullptr, vectors, k, m, k, to + first * m,
                     /*streamed=*/false);
    });
  });
  return out;
}

Tensor product_nn(const Tensor& a, const Tensor& b) {
  check(a, b, a.size(1) == b.size(0));
  const int64_t n = a.size(0), k = a.size(1), m = b.size(1);
  Tensor out = at::empty({n, m}, a.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "product_nn", [&] {
    const scalar_t *const c = a.const_data_ptr<scalar_t>(), *const vectors = b.const_data_ptr<scalar_t>();
    if (n >= kBlock) {
      const auto row = [&](int64_t j) { return vectors + j * m; };
      return tiled_product<scalar_t>(a, Packed<scalar_t>::from_rows(k, m, 1, row), out);
    }
    sums_of_rows<scalar_t>(
        n, k, vectors, m, [&](int64_t i, int64_t j) { return c[i * k + j]; }, out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

Tensor product_tn(const Tensor& a, const Tensor& b) {
  check(a, b, a.size(0) == b.size(0));
  const int64_t k = a.size(0), n = a.size(1), m = b.size(1);
  Tensor out = at::empty({n, m}, a.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "product_tn", [&] {
    const scalar_t* const c = a.const_data_ptr<scalar_t>();
    sums_of_rows<scalar_t>(
        n, k, b.const_data_ptr<scalar_t>(), m, [&](int64_t i, int64_t j) { return c[j * n + i]; },
        out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

Tensor column_sums(const Tensor& a) {
  const int64_t n = a.size(0), m = a.size(1);
  Tensor out = at::empty({m}, a.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "column_sums", [&] {
    const scalar_t* const from = a.const_data_ptr<scalar_t>();
    std::vector<double> sums(m, 0.);
    for (int64_t i = 0; i < n * m; ++i) sums[i % m] += from[i];
    std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> winner_gradients(const Tensor& grad_values, const Tensor& indices,
                                                    const Tensor& rows, const Tensor& weight) {
  const int64_t n = indices.numel(), C = weight.size(0), L = weight.size(1);
  Tensor grad_rows = at::empty_like(rows), grad_weight = at::zeros({C, L}, rows.options()),
         grad_bias = at::zeros({C}, rows.options());
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "winner_gradients", [&] {
    using A = scalar_t;
    const int64_t* const row = indices.const_data_ptr<int64_t>();
    const A *const from = rows.const_data_ptr<A>(), *const w = weight.const_data_ptr<A>();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = i % C;
      const A g = row[i] < 0 ? A(0) : grad_values.const_data_ptr<A>()[i];
      grad_bias.mutable_data_ptr<A>()[c] += g;
      add_to_row<A>(grad_weight.mutable_data_ptr<A>() + c * L, from + i * L, g, L);
      A* const to = grad_rows.mutable_data_ptr<A>() + i * L;
      for (int64_t l = 0; l < L; ++l) to[l] = g * w[c * L + l];
    }
  });
  return {grad_rows, grad_weight, grad_bias};
}

Tensor activated(const Tensor& z, Activation activation) {
  if (activation == Activation::kIdentity) return z;
  Tensor y = at::empty_like(z);
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "activated", [&] {
    using V = Vectorized<scalar_t>;
    const scalar_t* const from = z.const_data_ptr<scalar_t>();
    scalar_t* const to = y.mutable_data_ptr<scalar_t>();
    with_activation(activation, [&](auto f) {
      elementwise<scalar_t>(z.numel(), [&](int64_t i, int64_t count) {
        gate<decltype(f)::value, false, scalar_t>(V::loadu(from + i, count), V(scalar_t(0))).store(to + i, count);
      });
    });
  });
  return y;
}

Tensor through_activation(const Tensor& grad, const Tensor& z, Activation activation) {
  if (activation == Activation::kIdentity) return grad;
  if (activation == Activation::kRelu) return grad.masked_fill(z.le(0), 0.);
  Tensor out = at::empty_like(z);
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "through_activation", [&] {
    using V = Vectorized<scalar_t>;
    const scalar_t *const g = grad.const_data_ptr<scalar_t>(), *const from = z.const_data_ptr<scalar_t>();
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    with_activation(activation, [&](auto f) {
      elementwise<scalar_t>(z.numel(), [&](int64_t i, int64_t count) {
        const V slope = gate_grad<decltype(f)::value, false, scalar_t>(V::loadu(from + i, count), V(scalar_t(0))).da;
        (V::loadu(g + i, count) * slope).store(to + i, count);
      });
    });
  });
  return out;
}

// --- The ops

namespace {

Tensor matrix(const Tensor& t, const char* name, ScalarType type) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.device().is_cpu() && (type == at::kFloat || type == at::kDouble), name,
                    " must be a float32 or float64 matrix on cpu; got ", t.scalar_type(), " ", t.sizes(), " on ",
                    t.device());
  return t.to(type).contiguous();
}

Tensor vector(const Tensor& t, const char* name, int64_t size, ScalarType type) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == size && t.device().is_cpu(), name, " must be [", size,
                    "] on cpu; got ", t.sizes(), " on ", t.device());
  return t.to(type).contiguous();
}

// A layer on a few rows x [n, in]: weight [out, in] and bias [out], all in the type of x.
struct FewLayer {
  FewLayer(const Tensor& x, int64_t columns, const Tensor& weight, const OptionalTensor& bias)
      : x(matrix(x, "x", x.scalar_type())), weight(matrix(weight, "weight", x.scalar_type())) {
    TORCH_CHECK_VALUE(this->x.size(1) == this->weight.size(columns), "x must be [any, ", this->weight.size(columns),
                      "]; got ", x.sizes());
    if (bias) this->bias = vector(*bias, "bias", this->weight.size(0), x.scalar_type());
  }
  Tensor gradient(const Tensor& t, const char* name, int64_t columns) const {
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == columns, name, " must be [", x.size(0),
                      ", ", columns, "]; got ", t.sizes());
    return matrix(t, name, x.scalar_type());
  }
  Tensor x, weight, bias;
};

Activation activation_of(std::optional<std::string_view> name) {
  const Activation found = name ? parse_activation(*name) : Activation::kIdentity;
  TORCH_CHECK_VALUE(found != Activation::kGelu, "activation must be tanh, relu or identity; got gelu");
  return found;
}

Tensor few_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  std::optional<std::string_view> activation, double scale) {
  const FewLayer layer(x, 1, weight, bias);
  Tensor z = product_nt(layer.x, layer.weight);
  if (bias) z.add_(layer.bias);
  z = activated(z, activation_of(activation));
  return scale == 1 ? z : z.mul_(scale);
}

// The slope of these activations can be read off what came out.
std::tuple<Tensor, Tensor, Tensor> few_linear_bwd(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                  const OptionalTensor& out, std::optional<std::string_view> activation,
                                                  double scale) {
  const FewLayer layer(x, 1, weight, std::nullopt);
  const int64_t units = layer.weight.size(0);
  Tensor g = layer.gradient(grad, "grad", units);
  if (scale != 1) g = g * scale;
  const Activation f = activation_of(activation);
  TORCH_CHECK_VALUE(out || f == Activation::kIdentity, "out must be given with an activation; got None");
  if (f == Activation::kRelu) g = g.masked_fill(layer.gradient(*out, "out", units).le(0), 0.);
  if (f == Activation::kTanh) {
    const Tensor y = layer.gradient(*out, "out", units);
    g = g * (1 - y * y);
  }
  return {product_nn(g, layer.weight), product_tn(g, layer.x), column_sums(g)};
}

Tensor linear_of_bags(const Tensor& pooled, const Tensor& lse, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(pooled.dim() == 3 && lse.sizes() == pooled.sizes().slice(0, 2), "lse must be ",
                    pooled.sizes().slice(0, 2), "; got ", lse.sizes());
  const Tensor out = few_linear(pooled.flatten(0, 1), weight, bias, std::nullopt, 1);
  return out.masked_fill_(lse.eq(kDead<double>).view({-1, 1}), 0.).view({lse.size(0), lse.size(1), out.size(1)});
}

std::tuple<Tensor, Tensor> few_transposed(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const FewLayer layer(x, 0, weight, bias);
  const Tensor shift =
      bias ? product_nt(layer.x, layer.bias.unsqueeze(0)) : at::zeros({x.size(0), 1}, layer.x.options());
  return {product_nn(layer.x, layer.weight), shift.view({-1})};
}

std::tuple<Tensor, Tensor, Tensor> few_transposed_bwd(const Tensor& grad, const OptionalTensor& grad_shift,
                                                      const Tensor& x, const Tensor& weight,
                                                      const OptionalTensor& bias) {
  const FewLayer layer(x, 0, weight, bias);
  const Tensor g = layer.gradient(grad, "grad", layer.weight.size(1));
  Tensor of_x = product_nt(g, layer.weight), of_bias = at::zeros({layer.weight.size(0)}, of_x.options());
  if (bias && grad_shift) {
    const Tensor shift = vector(*grad_shift, "grad_shift", layer.x.size(0), layer.x.scalar_type()).unsqueeze(1);
    of_x.add_(shift * layer.bias);
    of_bias = product_tn(shift, layer.x).view({-1});
  }
  return {of_x, product_tn(layer.x, g), of_bias};
}

std::tuple<Tensor, Tensor, Tensor> few_winners_bwd(const Tensor& grad_values, const Tensor& indices, const Tensor& rows,
                                                   const Tensor& weight) {
  const FewLayer layer(rows, 1, weight, std::nullopt);
  const int64_t classes = layer.weight.size(0);
  TORCH_CHECK_VALUE(indices.dim() == 2 && indices.size(1) == classes && indices.scalar_type() == at::kLong &&
                        indices.numel() == layer.x.size(0) && indices.device().is_cpu(),
                    "indices must be int64 [bags, ", classes, "] on cpu; got ", indices.scalar_type(), " ",
                    indices.sizes());
  TORCH_CHECK_VALUE(grad_values.sizes() == indices.sizes(), "grad_values must be ", indices.sizes(), "; got ",
                    grad_values.sizes());
  const Tensor g = matrix(grad_values, "grad_values", layer.x.scalar_type());
  return winner_gradients(g, indices.contiguous(), layer.x, layer.weight);
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("few_linear.native", few_linear);
  m.impl("few_linear_bwd.native", few_linear_bwd);
  m.impl("linear_of_bags.native", linear_of_bags);
  m.impl("few_transposed.native", few_transposed);
  m.impl("few_transposed_bwd.native", few_transposed_bwd);
  m.impl("few_winners_bwd.native", few_winners_bwd);
}

}  // namespace
}  // namespace milkernels
