// The tensors of a call on the CPU, where the values of offsets and indices are checked too.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <optional>

#include "../call.h"
#include "../philox.h"
#include "cpu.h"
#include "kept.h"
#include "layer.h"
#include "query_score.h"

namespace milkernels {

template <typename A>
const A* data_or_null(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<A>() : nullptr;
}

// The layer in front of an op, in the accumulation type.
struct Embedding : EmbeddingTensors {
  Dropout dropout;
  int planes = 0;  // of its products

  explicit operator bool() const { return weight.defined(); }
  // In what its rows are made: bfloat16 where their products are, as eager PyTorch would have them.
  ScalarType rows_type(ScalarType acc) const { return planes == 1 ? at::kBFloat16 : acc; }
  template <typename E>
  Layer<E> layer(int64_t in, int64_t rows, const KeptRows& kept) const {
    using A = acc_t<E>;
    return {weight.const_data_ptr<A>(),
            data_or_null<A>(bias),
            weight.size(0),
            in,
            activation,
            std::max(planes, 1),
            rows,
            kept};
  }
};

class Call : public CallTensors {
 public:
  Call(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask, const EmbedArguments& embed = {})
      : CallTensors(x, offsets, mask, c10::DeviceType::CPU), offsets(checked_offsets(offsets, rows)) {
    if (!embed.weight) return;
    embedding = {{*this, embed, acc}, dropout_of(embed.seed, embed.dropout_p), planes_of(embed.dtype)};
    width = embedding.weight.size(0);
  }

  template <typename T>
  Ragged<T> ragged() const {  // as x lies
    const int64_t width = x.size(1);
    return {x.const_data_ptr<T>(), rows > 1 ? x.stride(0) : width, width, rows, data_or_null<bool>(mask), offsets};
  }

  // Takes indices: they are -1 or rows of x.
  Tensor take_indices(const Tensor& t, const char* name, at::IntArrayRef sizes) const {
    const Tensor indices = CallTensors::take_indices(t, name, sizes);
    const int64_t* const p = indices.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < indices.numel(); ++i) {
      TORCH_CHECK_VALUE(p[i] >= -1 && p[i] < rows, name, " must be rows of x or -1; got ", p[i]);
    }
    return indices;
  }

  // The dropout of a share p of the units.
  Dropout dropout_of(const OptionalTensor& seed, double p) const {
    return drops(seed, p) ? Dropout(static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), p) : Dropout();
  }
  int planes_of(std::optional<ScalarType> dtype) const { return bf16_planes(x.scalar_type(), dtype); }

  // Before a forward: memory for at most `limit` bytes (-1: any) of embedded rows and of `hidden_width` products a row,
  // which `compute` says the type of.
  Tensor keep(int64_t limit, int64_t hidden_width, std::optional<ScalarType> compute) {
    const int64_t size = Kept::bytes(limit, rows, embedded_width(), hidden_width, number_size(compute));
    Tensor bytes = kept_bytes(size);
    use_kept(bytes, hidden_width, compute, false, false);
    return bytes;
  }
  // What is kept in `bytes`, of which a forward has filled embedded rows and products, or will.
  void use_kept(const Tensor& bytes, int64_t hidden_width, std::optional<ScalarType> compute, bool has_rows,
                bool has_hidden) {
    TORCH_CHECK_VALUE(bytes.scalar_type() == at::kByte && bytes.dim() == 1 && here(bytes) && bytes.is_contiguous(),
                      "kept must be contiguous uint8 [any] on ", x.device(), "; got ", bytes.scalar_type(), " ",
                      bytes.sizes(), " on ", bytes.device());
    kept = Kept(bytes, rows, embedded_width(), hidden_width, number_size(compute));
    kept.embedded.filled = has_rows, kept.hidden.filled = has_hidden;
  }

  Embedding embedding;
  std::vector<int64_t> offsets;
  Kept kept;

 private:
  int64_t embedded_width() const { return embedding ? round_up(width, kBlock) : 0; }
  // Of a number that is kept: in the type of products, if that is bfloat16, else in that of sums.
  int64_t number_size(std::optional<ScalarType> compute) const {
    return acc == at::kDouble ? 8 : compute.value_or(x.scalar_type()) == at::kBFloat16 ? 2 : 4;
  }
};

struct ClassCall : WithClasses<Call> {
  using WithClasses::WithClasses;
  template <typename A>
  Queries<A> queries() const {
    return {weight.const_data_ptr<A>(), classes, 0, data_or_null<A>(bias), 0};
  }
};

template <typename A>
PoolGradients<A> typed(const PooledTensors& p) {
  return {data_or_null<A>(p.bag),      data_or_null<A>(p.scores),      data_or_null<A>(p.lse),
          data_or_null<A>(p.grad_bag), data_or_null<A>(p.grad_scores), data_or_null<A>(p.grad_lse)};
}

// Calls f.template operator()<T>() for the storage type of x.
template <typename F>
auto dispatch_storage(ScalarType x, const F& f) {
  switch (x) {
    case at::kDouble: return f.template operator()<double>();
    case at::kFloat: return f.template operator()<float>();
    case at::kHalf: return f.template operator()<Half>();
    case at::kBFloat16: return f.template operator()<BFloat16>();
    default: TORCH_CHECK_TYPE(false, "x must be float16, bfloat16, float32 or float64; got ", x);
  }
}

// Calls f.template operator()<E>() for the element type of products with rows of type T; `planes`: of how many bfloat16
// numbers a factor is made, 0 for products in the accumulation type.
template <typename T, typename F>
auto with_element(int planes, const F& f) {
  if constexpr (std::is_same_v<T, double>) return f.template operator()<double>();
  else return planes ? f.template operator()<BFloat16>() : f.template operator()<float>();
}
// Calls f.template operator()<T, E>(), which has the storage type T of x too.
template <typename F>
auto dispatch_products(ScalarType x, int planes, const F& f) {
  return dispatch_storage(x, [&]<typename T>() {
    return with_element<T>(planes, [&]<typename E>() { return f.template operator()<T, E>(); });
  });
}

// Where a gradient goes; null where nobody needs it.
template <typename A>
A* data_if(bool need, const Tensor& t) {
  return need ? t.mutable_data_ptr<A>() : nullptr;
}

}  // namespace milkernels
