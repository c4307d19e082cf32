// attention_pool, attention_scores and their backward on a GPU. Rows go through in slices: products with V and U by the
// library into a workspace, kernels for gate and scores behind them; then the pooling of all of them.
#include <torch/library.h>

#include <string_view>
#include <tuple>

#include "gate.h"
#include "layers.h"
#include "pooling.h"

namespace milkernels {
namespace {

class AttentionCall : public Call {
 public:
  AttentionCall(const Tensor& x, const AttentionWeights& p, const OptionalTensor& offsets, const OptionalTensor& mask,
                const OptionalTensor& seed, std::string_view activation, double dropout_p,
                std::optional<ScalarType> compute_dtype, const EmbedArguments& embed)
      : Call(x, offsets, mask, embed), gated(p.u_weight().has_value()),
        type(product_type(x.scalar_type(), compute_dtype)), activation_(parse_activation(activation)),
        dropout_(*this, seed, dropout_p) {
    const Tensor &v_weight = p.v_weight(), &w_weight = p.w_weight();
    hidden = units_of(v_weight, "v_weight", width), heads = units_of(w_weight, "w_weight", hidden);
    TORCH_CHECK_VALUE(hidden <= (1 << 22) && heads <= (1 << 22), "too many hidden units or heads: ", hidden, ", ",
                      heads);
    weights_.push_back(take(v_weight, "v_weight", {hidden, width}, type));
    if (gated) weights_.push_back(take(p.u_weight(), "u_weight", {hidden, width}, type));
    v_bias_ = take(p.v_bias(), "v_bias", {hidden}), u_bias_ = take(p.u_bias(), "u_bias", {hidden});
    w = take(w_weight, "w_weight", {heads, hidden}), w_bias_ = take(p.w_bias(), "w_bias", {heads});
  }

  int64_t units() const { return gated ? 2 * hidden : hidden; }
  // V over U in the type of products.
  Tensor projection() const { return gated ? at::cat(weights_) : weights_[0]; }

  template <typename A>
  Gate<A> gate() const {
    return {gated,
            activation_,
            dropout_.typed(),
            static_cast<int>(hidden),
            static_cast<int>(heads),
            data<A>(v_bias_),
            data<A>(u_bias_),
            data<A>(w),
            data<A>(w_bias_)};
  }
  template <typename E>
  GateRows<E> gate_rows(const Tensor& z, const Tensor& gradient, int64_t first) const {
    return {gate<acc_t<E>>(), data<const E>(z), data<E>(gradient), first, z.size(0), data<bool>(mask)};
  }

  // Bits by which a unit's gradient may exceed its score's: factors of dropout, and what a gate multiplies.
  int headroom() const {
    int bits = 0;  // of the part of 65536 that is kept
    for (uint32_t kept = dropout_.threshold < 65536 ? 65536 - dropout_.threshold : 1; kept > 0; kept /= 2) ++bits;
    return (17 - bits) * (gated ? 2 : 1) + (gated && activation_ != Activation::kTanh ? 6 : 0);
  }

  bool same_type() const { return type == x.scalar_type(); }

  // Memory for at most `limit` bytes (-1: any) of products with V and U, which the backward need not compute again.
  // Where the emulator stands in for a device, it is as much as the kernels of a CPU would need.
  Tensor keep(int64_t limit) const {
    const int64_t columns = x.is_cpu() ? round_up(units(), int64_t{64}) : units();
    const int64_t size = x.is_cpu() && type == at::kHalf ? 4 : static_cast<int64_t>(c10::elementSize(type));
    const int64_t row = columns * size, all = round_up(rows, int64_t{64});
    const int64_t kept = limit < 0 ? all : std::min(all, limit / (row * 64) * 64);
    return at::empty({kept * row}, x.options().dtype(at::kByte));
  }
  // The products [rows that are kept, units] in what `keep` returned.
  Tensor products_in(const Tensor& kept) const {
    TORCH_CHECK_VALUE(kept.scalar_type() == at::kByte && kept.dim() == 1 && here(kept) && kept.is_contiguous(),
                      "kept must be contiguous uint8 [any] on ", x.device(), "; got ", kept.scalar_type(), " ",
                      kept.sizes(), " on ", kept.device());
    const int64_t row = units() * static_cast<int64_t>(c10::elementSize(type)), most = kept.numel() / row;
    const int64_t count = most >= rows ? rows : most / kKeptTogether * kKeptTogether;
    return kept.narrow(0, 0, count * row).view(type).view({count, units()});
  }

  bool gated;
  ScalarType type;  // of products
  int64_t hidden, heads;
  Tensor w;  // [heads, hidden]

 private:
  static constexpr int64_t kKeptTogether = 256;  // rows that are kept together, or not

  Activation activation_;
  DropoutTensors dropout_;
  std::vector<Tensor> weights_;  // V, and U
  Tensor v_bias_, u_bias_, w_bias_;
};

// --- Forward

// What is kept of a slice from that row on: rows of `kept`, all of them or none of the slice, or some.
Tensor kept_of(const Tensor& kept, int64_t first, int64_t count) {
  return kept.narrow(0, std::min(first, kept.size(0)), std::clamp(kept.size(0) - first, int64_t{0}, count));
}

void scores_in_slices(const AttentionCall& call, const Tensor& scores, const Tensor& kept) {
  const Tensor weight = call.projection(), to = call.products_in(kept);
  const int64_t numbers = call.units() + (call.same_type() ? 0 : call.width);  // of a row
  call.in_slices(numbers * weight.element_size(), [&](int64_t first, int64_t count) {
    const Tensor x = rows_for_products(call, first, count, call.type, false);
    Tensor z = kept_of(to, first, count);
    if (z.size(0) == count) {
      product_into(z, x, weight.t());
    } else {
      const Tensor part = z;
      z = product(x, weight.t(), call.type);
      if (part.size(0) > 0) part.copy_(z.narrow(0, 0, part.size(0)));
    }
    dispatch(call.type, [&]<typename E>() {
      gate_scores(call.gate_rows<E>(z, {}, first), data<acc_t<E>>(scores), call.stream());
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_fwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& seed, std::string_view activation, double dropout_p, std::optional<ScalarType> compute_dtype,
    const OptionalTensors& embed, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, int64_t saved_bytes) {
  AttentionCall call(x, AttentionWeights(weights), offsets, mask, seed, activation, dropout_p, compute_dtype,
                     {embed, embed_activation, embed_dropout_p, embed_dtype});
  const Forward out(call, call.heads);
  const Tensor kept = call.keep(saved_bytes);
  scores_in_slices(call, out.scores, kept);
  out.pool_given(call, out.scores);
  return {out.bag, out.scores, out.lse, kept};
}

std::tuple<Tensor, Tensor> attention_scores_fwd(
    const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets, const OptionalTensor& mask,
    const OptionalTensor& seed, std::string_view activation, double dropout_p, std::optional<ScalarType> compute_dtype,
    const OptionalTensors& embed, std::optional<std::string_view> embed_activation, double embed_dropout_p,
    std::optional<ScalarType> embed_dtype, int64_t saved_bytes) {
  const AttentionCall call(x, AttentionWeights(weights), offsets, mask, seed, activation, dropout_p, compute_dtype,
                           {embed, embed_activation, embed_dropout_p, embed_dtype});
  const Tensor scores = call.empty({call.rows, call.heads}), kept = call.keep(saved_bytes);
  scores_in_slices(call, scores, kept);
  return {scores, kept};
}

// --- Backward

// The gradients of the scores [rows, heads]; of V over U, undefined where nobody needs it; and the sums
// [heads + 2, hidden] that are those of w and of the biases of V and U.
struct Found {
  Tensor scores, weight, sums;
};

void add_to(Tensor& sum, const Tensor& part) {
  if (sum.defined()) sum += part;
  else sum = part;
}

// The factor of gradients of a slice's products in float16; undefined in other types. A unit's gradient is at most
// sum_k |w[k, unit]| times those of the scores.
Tensor scale_of(const AttentionCall& call, const Tensor& of_scores) {
  if (call.type != at::kHalf) return {};
  const Tensor most = call.w.abs().nan_to_num(0, 0, 0).sum(0).amax();
  return power_of_two_scale(largest(of_scores) * most, call.headroom());
}

// The gradient of x, which is written where it is not empty: what comes from the pooling, and behind it, or in the same
// pass, what comes through the products.
class OfRows {
 public:
  OfRows(AttentionCall& call, const PooledTensors& of, const Tensor& grad_x)
      : scores(call.empty({call.rows, call.heads})), call_(call), x_(grad_x),
        direct_(call.same_type() && call.type != at::kHalf) {
    added_ = direct_ && Backward{of, Scoring::kGiven, {}, {}, {}, x_, scores}.run(call);
    if (added_) return;
    const PoolGradients gradients(call, of, wanted());
    scores = gradients.scores, pooled_ = gradients.term();
    added_ = direct_ && pooled_.weights.defined();
    if (added_) expand(call, x_, 0, pooled_, {});
  }

  bool wanted() const { return x_.numel() > 0; }
  // Bytes of a slice's row.
  int64_t bytes() const {
    return wanted() && !direct_ ? call_.width * static_cast<int64_t>(c10::elementSize(call_.acc)) : 0;
  }
  // From the gradients of the products of rows from `first` on, times the inverse of `inverse`.
  void through(const Tensor& z, const Tensor& weight, int64_t first, const Tensor& inverse) const {
    if (!wanted()) return;
    const Tensor out = x_.narrow(0, first, z.size(0));
    if (!direct_) expand(call_, out, first, pooled_, {}, product(z, weight, call_.acc), inverse);
    else if (added_) add_product(out, z, weight);
    else product_into(out, z, weight);
  }

  Tensor scores;  // their gradients [rows, heads]

 private:
  const AttentionCall& call_;
  Tensor x_;
  bool direct_;  // products need neither another type nor a scale
  bool added_;  // to what the pooling left in x_
  TermTensors pooled_;
};

Found backward_in_slices(const AttentionCall& call, const OfRows& rows, bool need_weight, const Tensor& kept) {
  const Tensor weight = call.projection(), products = call.products_in(kept);
  const bool half = call.type == at::kHalf;
  const int64_t copied = call.mask.defined() || !call.same_type() ? call.width : 0;
  Found found;
  found.scores = rows.scores;
  call.in_slices((call.units() + copied) * weight.element_size() + rows.bytes(), [&](int64_t first, int64_t count) {
    const Tensor x = rows_for_products(call, first, count, call.type, true), known = kept_of(products, first, count);
    const bool all = known.size(0) == count;  // then nobody writes over them: a graph may be walked again
    const Tensor z = all ? at::empty_like(known) : product(x, weight.t(), call.type);
    const Tensor scale = scale_of(call, rows.scores.narrow(0, first, count));
    const Tensor sums = call.empty({ceil_div(count, int64_t{kSummedRows}), call.heads + 2, call.hidden});
    dispatch(call.type, [&]<typename E>() {
      using A = acc_t<E>;
      gate_backward(call.gate_rows<E>(all ? known : z, z, first), data<const A>(rows.scores), data<const A>(scale),
                    data<A>(sums), call.stream());
    });
    add_to(found.sums, sums.sum(0));
    const Tensor inverse = half ? scale.reciprocal() : Tensor();
    if (need_weight) {
      const Tensor part = product(z.t(), x, call.acc);
      add_to(found.weight, half ? part * inverse : part);
    }
    rows.through(z, weight, first, inverse);
  });
  if (found.sums.defined()) return found;
  found.sums = call.empty({call.heads + 2, call.hidden}).zero_();  // there are no rows
  found.weight = call.empty({call.units(), call.width}).zero_();
  return found;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_bwd(const Tensor& x, const OptionalTensors& weights, const OptionalTensor& offsets,
                        const OptionalTensor& mask, const OptionalTensor& seed, const OptionalTensor& bag,
                        const Tensor& scores, const OptionalTensor& lse, const OptionalTensors& embed,
                        const Tensor& kept, std::string_view activation, double dropout_p,
                        std::optional<ScalarType> compute_dtype, std::optional<std::string_view> embed_activation,
                        double embed_dropout_p, std::optional<ScalarType> embed_dtype, const OptionalTensor& grad_bag,
                        const OptionalTensor& grad_scores, const OptionalTensor& grad_lse, std::array<bool, 9> needs) {
  const AttentionWeights given(weights);
  AttentionCall call(x, given, offsets, mask, seed, activation, dropout_p, compute_dtype,
                     {embed, embed_activation, embed_dropout_p, embed_dtype});
  check_needs(needs.data() + 1, given);
  const int64_t K = call.heads, D = call.hidden;
  const PooledTensors of(call, K, call.width, bag, scores, lse, grad_bag, grad_scores, grad_lse);
  const Tensor grad_x = call.grad_x(needs[0]);
  const Found found = backward_in_slices(call, OfRows(call, of, grad_x), needs[1] || needs[3], kept);
  const auto part = [](const Tensor& t, int64_t first, int64_t count) {
    return t.defined() ? t.narrow(0, first, count) : t;
  };
  const std::array<Tensor, 6> all{
      part(found.weight, 0, D), found.sums[K],          call.gated ? part(found.weight, D, D) : Tensor(),
      found.sums[K + 1],        part(found.sums, 0, K), needs[6] ? found.scores.sum(0) : Tensor()};
  std::array<Tensor, 6> own;
  for (int i = 0; i < 6; ++i) {
    // Each gradient has memory of its own.
    own[i] = needs[i + 1] ? all[i].to(given[i]->scalar_type(), false, /*copy=*/true) : call.grad_x(false);
  }
  return std::tuple_cat(std::make_tuple(grad_x), own, call.of_no_embedding(needs[7], needs[8]));
}

TORCH_LIBRARY_IMPL(milkernels, MILKERNELS_DEVICE_KEY, m) {
  m.impl("attention_pool_fwd.native", attention_pool_fwd);
  m.impl("attention_scores_fwd.native", attention_scores_fwd);
  m.impl("attention_bwd.native", attention_bwd);
}

}  // namespace
}  // namespace milkernels
