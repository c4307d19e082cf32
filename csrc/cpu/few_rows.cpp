#include "few_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

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
      dots<scalar_t>(rows + first * k, k, kInOrder, count, nullptr, vectors, m, k, to + first * m);
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

Tensor few_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  std::optional<std::string_view> activation) {
  const Tensor a = matrix(x, "x", x.scalar_type()), b = matrix(weight, "weight", x.scalar_type());
  TORCH_CHECK_VALUE(a.size(1) == b.size(1), "weight must be [any, ", a.size(1), "]; got ", b.sizes());
  Tensor z = product_nt(a, b);
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == b.size(0) && bias->device().is_cpu(), "bias must be [",
                      b.size(0), "]; got ", bias->sizes());
    z.add_(*bias);
  }
  return activation ? activated(z, parse_activation(*activation)) : z;
}

Tensor few_product(const Tensor& a, const Tensor& b, bool transposed) {
  const Tensor left = matrix(a, "a", a.scalar_type()), right = matrix(b, "b", a.scalar_type());
  TORCH_CHECK_VALUE(left.size(!transposed) == right.size(0), "b must be [", left.size(!transposed), ", any]; got ",
                    right.sizes());
  return transposed ? product_tn(left, right) : product_nn(left, right);
}

Tensor few_sums(const Tensor& a) { return column_sums(matrix(a, "a", a.scalar_type())); }

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("few_linear.native", few_linear);
  m.impl("few_product.native", few_product);
  m.impl("few_sums.native", few_sums);
}

}  // namespace
}  // namespace milkernels
