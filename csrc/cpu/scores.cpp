// Ops on scores alone, on the CPU: segment_softmax, attention_weights, topk_instances.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>

#include "call.h"

namespace milkernels {
namespace {

// Scores as the instances of a call, in the accumulation type.
class ScoresCall : public Call {
 public:
  ScoresCall(const Tensor& scores, const OptionalTensor& offsets, const OptionalTensor& mask)
      : Call(scores.to(accumulation_type(scores)).contiguous(), offsets, mask) {}
  template <typename F>
  void dispatch(const F& f) const {
    if (acc == at::kDouble) f.template operator()<double>();
    else f.template operator()<float>();
  }
};

// f(bag, first row, rows, heads' values of the bag): weights[i, k] = f's, 0 where a score does not count.
template <typename A, typename F>
void for_segments(const Ragged<A>& in, const F& f) {
  for_tiles(
      in, [] { return 0; },
      [&](const Tile<A>& tile, int) {
        in.for_bags(tile.first, tile.first + tile.rows, [&](int64_t b, int64_t from, int64_t to) { f(b, from, to); });
      });
}

// out = exp(scores - shift[bag]) * scale[bag] (null: 1).
template <typename A>
void weights(const Ragged<A>& in, const A* shift, const A* scale, A* out) {
  const int64_t heads = in.width;
  for_segments(in, [&](int64_t b, int64_t from, int64_t to) {
    const A *const s = in.x + from * heads, *const top = shift + b * heads;
    A* const w = out + from * heads;
    const int64_t n = (to - from) * heads;
    std::copy_n(s, n, w);
    exp_minus(w, n, top, heads);
    for (int64_t i = 0; i < n; ++i) {
      if (s[i] == kDead<A> || !is_real(in.mask, from + i / heads)) w[i] = A(0);
      else if (scale != nullptr) w[i] *= scale[b * heads + i % heads];
    }
  });
}

Tensor segment_softmax_fwd(const Tensor& scores, const OptionalTensor& offsets, const OptionalTensor& mask) {
  const ScoresCall call(scores, offsets, mask);
  const int64_t heads = call.width;
  Tensor out = call.empty({call.rows, heads});
  call.dispatch([&]<typename A>() {
    const auto in = call.ragged<A>();
    Partials<A> partials(in.slots(), heads, 0);
    for_tiles(
        in, [&] { return std::pair(typename Partials<A>::Worker(heads), std::vector<A>(kBlock * heads)); },
        [&](const Tile<A>& tile, auto& w) {
          auto& [worker, s] = w;
          std::copy_n(tile.x, tile.rows * heads, s.data());
          for (int64_t r = 0; r < tile.rows; ++r) {
            if (!is_real(tile.mask, r)) std::fill_n(s.data() + r * heads, heads, kDead<A>);
          }
          in.for_bags(tile.first, tile.first + tile.rows, [&](int64_t b, int64_t from, int64_t to) {
            const int64_t at = from - tile.first;
            partials.add_softmax(in.slot_of(from, b), tile.x, 0, to - from, s.data() + at * heads, worker);
          });
        });
    std::vector<A> top(in.bags() * heads), scale(in.bags() * heads);
    partials.merge_states(in, [&](int64_t i, const SoftmaxState<double>& state) {
      top[i] = static_cast<A>(state.max);
      scale[i] = static_cast<A>(1. / state.sum);
    });
    weights(in, top.data(), scale.data(), out.mutable_data_ptr<A>());
  });
  return out;
}

// grad_scores = weight * (grad - sum over the bag of weight * grad)
Tensor segment_softmax_bwd(const Tensor& scores, const OptionalTensor& offsets, const Tensor& weights,
                           const Tensor& grad_weights, std::array<bool, 1> needs) {
  const ScoresCall call(weights, offsets, std::nullopt);
  const Tensor g = call.take(grad_weights, "grad_weights", {call.rows, call.width});
  Tensor grad = call.gradient(needs[0], {call.rows, call.width});
  if (!needs[0]) return grad;
  call.dispatch([&]<typename A>() {
    const auto in = call.ragged<A>();
    const int64_t heads = in.width;
    const A* const from_grad = g.const_data_ptr<A>();
    std::vector<double> sums(in.slots() * heads, 0.), total(in.bags() * heads, 0.);
    const auto counts = [&](int64_t i) { return in.x[i] != A(0); };  // a weight of 0 hides whatever came back for it
    for_segments(in, [&](int64_t b, int64_t from, int64_t to) {
      double* const sum = sums.data() + in.slot_of(from, b) * heads;
      for (int64_t i = from * heads; i < to * heads; ++i) {
        if (counts(i)) sum[i % heads] += double(in.x[i]) * from_grad[i];
      }
    });
    for (int64_t b = 0; b < in.bags(); ++b) {
      const int64_t from = in.offsets[b], to = in.offsets[b + 1];
      for (int64_t slot = in.slot_of(from, b); from < to && slot <= in.slot_of(to - 1, b); ++slot) {
        for (int64_t k = 0; k < heads; ++k) total[b * heads + k] += sums[slot * heads + k];
      }
    }
    A* const out = grad.mutable_data_ptr<A>();
    for_segments(in, [&](int64_t b, int64_t from, int64_t to) {
      for (int64_t i = from * heads; i < to * heads; ++i) {
        out[i] = counts(i) ? in.x[i] * static_cast<A>(from_grad[i] - total[b * heads + i % heads]) : A(0);
      }
    });
  });
  return grad.to(scores.scalar_type());
}

Tensor attention_weights_fwd(const Tensor& scores, const Tensor& lse, const OptionalTensor& offsets,
                             const OptionalTensor& mask) {
  const ScoresCall call(scores, offsets, mask);
  const Tensor l = call.take(lse, "lse", {call.bags, call.width});
  Tensor out = call.empty({call.rows, call.width});
  call.dispatch(
      [&]<typename A>() { weights<A>(call.ragged<A>(), l.const_data_ptr<A>(), nullptr, out.mutable_data_ptr<A>()); });
  return out;
}

// grad_scores = weight * grad; grad_lse = -sum over the bag of it.
std::tuple<Tensor, Tensor> attention_weights_bwd(const Tensor& scores, const Tensor& lse, const OptionalTensor& offsets,
                                                 const Tensor& weights, const Tensor& grad_weights,
                                                 std::array<bool, 2> needs) {
  const ScoresCall call(weights, offsets, std::nullopt);
  const Tensor g = call.take(grad_weights, "grad_weights", {call.rows, call.width});
  Tensor grad_scores = call.gradient(true, {call.rows, call.width}), grad_lse = call.empty({call.bags, call.width});
  call.dispatch([&]<typename A>() {
    const auto in = call.ragged<A>();
    const int64_t heads = in.width;
    const A* const from_grad = g.const_data_ptr<A>();
    A *const out = grad_scores.mutable_data_ptr<A>(), *const out_lse = grad_lse.mutable_data_ptr<A>();
    at::parallel_for(0, in.bags(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        std::vector<double> sum(heads, 0.);
        for (int64_t i = in.offsets[b] * heads; i < in.offsets[b + 1] * heads; ++i) {
          out[i] = in.x[i] == A(0) ? A(0) : in.x[i] * from_grad[i];
          sum[i % heads] += out[i];
        }
        for (int64_t k = 0; k < heads; ++k) out_lse[b * heads + k] = static_cast<A>(-sum[k]);
      }
    });
  });
  const auto given = [&](int i, const Tensor& t, const Tensor& like) {
    return needs[i] ? t.to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {given(0, grad_scores, scores), given(1, grad_lse, lse)};
}

// --- topk_instances

std::tuple<Tensor, Tensor> topk_instances_fwd(const Tensor& scores, int64_t k, const OptionalTensor& offsets,
                                              bool largest, const OptionalTensor& mask) {
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1; got ", k);
  const ScoresCall call(scores, offsets, mask);
  const int64_t B = call.bags, heads = call.width;
  Tensor indices = at::empty({B, heads, k}, scores.options().dtype(at::kLong));
  Tensor values = call.empty({B, heads, k});
  call.dispatch([&]<typename A>() {
    const auto in = call.ragged<A>();
    // The first of equal scores comes first; NaN counts as the largest number there is.
    const auto better = [&](A a, A b) {
      if (largest) return a > b || (std::isnan(a) && !std::isnan(b));
      return a < b || (!std::isnan(a) && std::isnan(b));
    };
    at::parallel_for(0, B * heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> rows;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / heads, head = i % heads;
        const auto score = [&](int64_t row) { return in.x[row * heads + head]; };
        rows.clear();
        for (int64_t row = in.offsets[b]; row < in.offsets[b + 1]; ++row) {
          if (is_real(in.mask, row) && score(row) != kDead<A>) rows.push_back(row);
        }
        const int64_t found = std::min<int64_t>(k, rows.size());
        std::partial_sort(rows.begin(), rows.begin() + found, rows.end(), [&](int64_t p, int64_t q) {
          const A a = score(p), b = score(q);
          return better(a, b) || (!better(b, a) && p < q);
        });
        for (int64_t j = 0; j < k; ++j) {
          indices.mutable_data_ptr<int64_t>()[i * k + j] = j < found ? rows[j] : -1;
          values.mutable_data_ptr<A>()[i * k + j] = j < found ? score(rows[j]) : largest ? kDead<A> : -kDead<A>;
        }
      }
    });
  });
  return {values.to(scores.scalar_type()), indices};
}

Tensor topk_instances_bwd(const Tensor& scores, const Tensor& indices, const Tensor& grad_values,
                          std::array<bool, 1> needs) {
  const Call call(scores, std::nullopt, std::nullopt);
  TORCH_CHECK_VALUE(indices.dim() == 3 && indices.size(1) == call.width, "indices must be [bags, ", call.width,
                    ", k]; got ", indices.sizes());
  const Tensor rows = call.take_indices(indices, "indices", indices.sizes());
  const Tensor g = call.take(grad_values, "grad_values", indices.sizes());
  Tensor grad = call.gradient(needs[0], {call.rows, call.width});
  if (!needs[0]) return grad;
  grad.zero_();
  const int64_t k = indices.size(2);
  AT_DISPATCH_FLOATING_TYPES(call.acc, "topk_instances_bwd", [&] {
    for (int64_t i = 0; i < rows.numel(); ++i) {
      const int64_t row = rows.const_data_ptr<int64_t>()[i];
      if (row >= 0)
        grad.mutable_data_ptr<scalar_t>()[row * call.width + i / k % call.width] = g.const_data_ptr<scalar_t>()[i];
    }
  });
  return grad.to(scores.scalar_type());
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("segment_softmax_fwd.native", segment_softmax_fwd);
  m.impl("segment_softmax_bwd.native", segment_softmax_bwd);
  m.impl("attention_weights_fwd.native", attention_weights_fwd);
  m.impl("attention_weights_bwd.native", attention_weights_bwd);
  m.impl("topk_instances_fwd.native", topk_instances_fwd);
  m.impl("topk_instances_bwd.native", topk_instances_bwd);
}

}  // namespace
}  // namespace milkernels
