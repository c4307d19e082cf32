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

// f(bag, first row, rows end, slot) for every segment: what a chunk and a bag share.
template <typename A, typename F>
void for_slots(const Ragged<A>& in, const F& f) {
  constexpr int64_t kChunks = 16;  // of one thread, at least
  at::parallel_for(0, in.chunks(), kChunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * in.chunk(), last = std::min(first + in.chunk(), in.rows);
      in.for_bags(first, last, [&](int64_t b, int64_t from, int64_t to) { f(b, from, to, in.slot_of(from, b)); });
    }
  });
}

// What `update` makes of each head's numbers x [n, heads], one after another, into `result` [heads]; of one head, which
// most have, as many at once as a processor takes: `join` puts those together.
template <typename R, typename X, typename Update, typename Join>
void reduce_by_head(int64_t n, int64_t heads, R neutral, R* result, const X& x, const Update& update,
                    const Join& join) {
  std::fill_n(result, heads, neutral);
  if (heads > 1) {
    for (int64_t i = 0; i < n * heads; i += heads) {
      for (int64_t k = 0; k < heads; ++k) result[k] = update(result[k], x(i + k));
    }
    return;
  }
  constexpr int64_t kLanes = 16;
  R lanes[kLanes];
  std::fill_n(lanes, kLanes, neutral);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = update(lanes[l], x(i + l));
  }
  for (; i < n; ++i) result[0] = update(result[0], x(i));
  for (const R lane : lanes) result[0] = join(result[0], lane);
}

// The sums of bags, by head, of those of their slots.
template <typename A>
std::vector<double> of_bags(const Ragged<A>& in, const std::vector<double>& sums) {
  const int64_t heads = in.width;
  std::vector<double> total(in.bags() * heads, 0.);
  for (int64_t b = 0; b < in.bags(); ++b) {
    const int64_t from = in.offsets[b], to = in.offsets[b + 1];
    for (int64_t slot = in.slot_of(from, b); from < to && slot <= in.slot_of(to - 1, b); ++slot) {
      for (int64_t k = 0; k < heads; ++k) total[b * heads + k] += sums[slot * heads + k];
    }
  }
  return total;
}

// out = exp(scores - max) of n rows, 0 where a score does not count; what they sum to, by head.
template <typename A>
void exp_of_segment(const A* scores, const bool* mask, int64_t n, int64_t heads, A* max, double* sum,
                    SoftmaxState<double>* state, A* out) {
  std::copy_n(scores, n * heads, out);
  for (int64_t r = 0; mask != nullptr && r < n; ++r) {
    if (!mask[r]) std::fill_n(out + r * heads, heads, kDead<A>);
  }
  const auto at = [&](int64_t i) { return out[i]; };
  const auto larger = [](A a, A b) { return a < b ? b : a; };  // NaN is not
  reduce_by_head(n, heads, kDead<A>, max, at, larger, larger);
  for (int64_t k = 0; k < heads; ++k) {
    state[k].max = max[k];
    if (max[k] == kDead<A>) max[k] = A(0);  // the exponential of -inf itself is 0
  }
  exp_minus(out, n * heads, max, heads);
  const auto plus = [](double a, double b) { return a + b; };
  reduce_by_head(n, heads, 0., sum, at, plus, plus);
  for (int64_t k = 0; k < heads; ++k) state[k].sum = sum[k];
}

// Exponentials over the maximum of their segment, and then a factor for each segment: one exponential for each score.
Tensor segment_softmax_fwd(const Tensor& scores, const OptionalTensor& offsets, const OptionalTensor& mask) {
  const ScoresCall call(scores, offsets, mask);
  const int64_t heads = call.width;
  Tensor out = call.empty({call.rows, heads});
  call.dispatch([&]<typename A>() {
    const auto in = call.ragged<A>();
    A* const w = out.mutable_data_ptr<A>();
    std::vector<SoftmaxState<double>> segments(in.slots() * heads), bags(in.bags() * heads);
    std::vector<A> max(in.slots() * heads);
    std::vector<double> sum(in.slots() * heads);
    for_slots(in, [&](int64_t, int64_t from, int64_t to, int64_t slot) {
      const int64_t at = slot * heads;
      exp_of_segment(in.x + from * heads, in.mask ? in.mask + from : nullptr, to - from, heads, &max[at], &sum[at],
                     &segments[at], w + from * heads);
    });
    for (int64_t b = 0; b < in.bags(); ++b) {
      const int64_t from = in.offsets[b], to = in.offsets[b + 1];
      for (int64_t k = 0; from < to && k < heads; ++k) {
        bags[b * heads + k] = merged(segments.data(), in.slot_of(from, b), in.slot_of(to - 1, b), heads, k);
      }
    }
    for_slots(in, [&](int64_t b, int64_t from, int64_t to, int64_t slot) {
      A* const factor = &max[slot * heads];
      bool finite = true;
      for (int64_t k = 0; k < heads; ++k) {
        const auto &part = segments[slot * heads + k], &whole = bags[b * heads + k];
        factor[k] = static_cast<A>(rescale(part.max, whole.max) / whole.sum);
        finite &= std::isfinite(factor[k]);
      }
      for (int64_t r = from; r < to; ++r) {
        const bool real = finite || is_real(in.mask, r);
        for (int64_t k = 0; k < heads; ++k) {
          A& weight = w[r * heads + k];
          weight = finite || (real && in.x[r * heads + k] != kDead<A>) ? weight * factor[k] : A(0);
        }
      }
    });
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
    std::vector<double> sums(in.slots() * heads, 0.);
    A* const out = grad.mutable_data_ptr<A>();
    // A weight of 0 hides whatever came back for it. What it leaves is written first and added up then: in one loop GCC
    // 12 turns selecting and adding into a masked addition that loses sums of float64.
    for_slots(in, [&](int64_t, int64_t from, int64_t to, int64_t slot) {
      const A *const w = in.x + from * heads, *const dw = from_grad + from * heads;
      A* const seen = out + from * heads;
      for (int64_t i = 0; i < (to - from) * heads; ++i) seen[i] = w[i] != A(0) ? dw[i] : A(0);
      const auto plus = [](double a, double b) { return a + b; };
      reduce_by_head(
          to - from, heads, 0., &sums[slot * heads], [&](int64_t i) { return double(w[i]) * seen[i]; }, plus, plus);
    });
    const std::vector<double> total = of_bags(in, sums);
    for_slots(in, [&](int64_t b, int64_t from, int64_t to, int64_t) {
      for (int64_t i = from * heads; i < to * heads; i += heads) {
        for (int64_t k = 0; k < heads; ++k) {
          const A w = in.x[i + k];
          out[i + k] = w != A(0) ? w * static_cast<A>(from_grad[i + k] - total[b * heads + k]) : A(0);
        }
      }
    });
  });
  return grad.to(scores.scalar_type());
}

// out = exp(scores - lse) of n rows, 0 where a score does not count.
template <typename A>
void weights_of_segment(const A* scores, const bool* mask, int64_t n, int64_t heads, const A* lse, A* out) {
  std::copy_n(scores, n * heads, out);
  exp_minus(out, n * heads, lse, heads);
  for (int64_t i = 0; i < n * heads; ++i) out[i] = scores[i] == kDead<A> ? A(0) : out[i];
  for (int64_t r = 0; mask != nullptr && r < n; ++r) {
    if (!mask[r]) std::fill_n(out + r * heads, heads, A(0));
  }
}

Tensor attention_weights_fwd(const Tensor& scores, const Tensor& lse, const OptionalTensor& offsets,
                             const OptionalTensor& mask) {
  const ScoresCall call(scores, offsets, mask);
  const Tensor l = call.take(lse, "lse", {call.bags, call.width});
  Tensor out = call.empty({call.rows, call.width});
  call.dispatch([&]<typename A>() {
    const auto in = call.ragged<A>();
    const int64_t heads = in.width;
    const A* const shift = l.const_data_ptr<A>();
    A* const w = out.mutable_data_ptr<A>();
    for_slots(in, [&](int64_t b, int64_t from, int64_t to, int64_t) {
      weights_of_segment(in.x + from * heads, in.mask ? in.mask + from : nullptr, to - from, heads, shift + b * heads,
                         w + from * heads);
    });
  });
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
    std::vector<double> sums(in.slots() * heads, 0.);
    for_slots(in, [&](int64_t, int64_t from, int64_t to, int64_t slot) {
      const A *const w = in.x + from * heads, *const dw = from_grad + from * heads;
      A* const mine = out + from * heads;
      // A weight of 0 hides whatever came back for it.
      for (int64_t i = 0; i < (to - from) * heads; ++i) mine[i] = w[i] != A(0) ? w[i] * dw[i] : A(0);
      const auto plus = [](double a, double b) { return a + b; };
      reduce_by_head(to - from, heads, 0., &sums[slot * heads], [&](int64_t i) { return double(mine[i]); }, plus, plus);
    });
    const std::vector<double> total = of_bags(in, sums);
    for (int64_t i = 0; i < in.bags() * heads; ++i) out_lse[i] = static_cast<A>(-total[i]);
  });
  const auto given = [&](int i, const Tensor& t, const Tensor& like) {
    return needs[i] ? t.to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {given(0, grad_scores, scores), given(1, grad_lse, lse)};
}

// --- topk_instances

constexpr int64_t kPart = 8192;  // rows that one thread looks through

// The k best of rows that are offered in order. The first of equal scores comes first; NaN counts as the largest number
// there is.
template <typename A>
class BestRows {
 public:
  BestRows(const A* scores, int64_t stride, int64_t k, bool largest)
      : scores_(scores), stride_(stride), k_(k), largest_(largest) {}

  void offer(int64_t row) {
    if (full_ && !better(score(row), bar_)) return;
    rows_.push_back(row);
    if (static_cast<int64_t>(rows_.size()) >= 2 * k_ + kSpare) keep_best();
  }
  // Rows [from, to) that count. Most are worse than what was found before: of one head, of which scores lie together,
  // it is found out for many at once.
  void offer(int64_t from, int64_t to, const bool* mask) {
    constexpr int64_t kMany = 64;
    for (int64_t first = from; first < to; first += kMany) {
      const int64_t last = std::min(first + kMany, to);
      if (stride_ == 1 && full_ && last - first == kMany && none_better(scores_ + first, kMany)) continue;
      for (int64_t row = first; row < last; ++row) {
        if (is_real(mask, row) && score(row) != kDead<A>) offer(row);
      }
    }
  }
  std::vector<int64_t> take() {
    keep_best();
    std::sort(rows_.begin(), rows_.end());
    return std::move(rows_);
  }
  std::vector<int64_t> take_sorted() {
    keep_best();
    std::sort(rows_.begin(), rows_.end(), [&](int64_t p, int64_t q) { return before(p, q); });
    return std::move(rows_);
  }

 private:
  static constexpr int64_t kSpare = 64;  // rows above twice those wanted that are held before the worst are let go

  A score(int64_t row) const { return scores_[row * stride_]; }
  bool better(A a, A b) const {
    if (largest_) return a > b || (std::isnan(a) && !std::isnan(b));
    return a < b || (!std::isnan(a) && std::isnan(b));
  }
  bool before(int64_t p, int64_t q) const {
    const A a = score(p), b = score(q);
    return better(a, b) || (!better(b, a) && p < q);
  }
  bool none_better(const A* scores, int64_t n) const {
    int any = 0;
    if (std::isnan(bar_)) {
      for (int64_t i = 0; i < n; ++i) any |= !largest_ & (scores[i] == scores[i]);
    } else if (largest_) {
      for (int64_t i = 0; i < n; ++i) any |= !(scores[i] <= bar_);
    } else {
      for (int64_t i = 0; i < n; ++i) any |= scores[i] < bar_;
    }
    return any == 0;
  }
  void keep_best() {
    if (static_cast<int64_t>(rows_.size()) < k_) return;
    const auto last = rows_.begin() + (k_ - 1);
    std::nth_element(rows_.begin(), last, rows_.end(), [&](int64_t p, int64_t q) { return before(p, q); });
    bar_ = score(*last), full_ = true;
    rows_.resize(k_);
  }

  const A* scores_;
  int64_t stride_, k_;
  bool largest_;
  std::vector<int64_t> rows_;
  bool full_ = false;  // k rows were found; others must be better than `bar_`
  A bar_{};
};

std::tuple<Tensor, Tensor> topk_instances_fwd(const Tensor& scores, int64_t k, const OptionalTensor& offsets,
                                              bool largest, const OptionalTensor& mask) {
  TORCH_CHECK_VALUE(k >= 1, "k must be at least 1; got ", k);
  const ScoresCall call(scores, offsets, mask);
  const int64_t B = call.bags, heads = call.width;
  Tensor indices = at::empty({B, heads, k}, scores.options().dtype(at::kLong));
  Tensor values = call.empty({B, heads, k});
  call.dispatch([&]<typename A>() {
    const auto in = call.ragged<A>();
    // Of each bag and head those of its parts, and then those of these.
    const int64_t parts = ceil_div(call.rows, kPart) + B;
    std::vector<std::vector<int64_t>> found(parts * heads);
    const auto best_of = [&](int64_t head) { return BestRows<A>(in.x + head, heads, k, largest); };
    at::parallel_for(0, ceil_div(call.rows, kPart), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        in.for_bags(part * kPart, std::min((part + 1) * kPart, in.rows), [&](int64_t b, int64_t from, int64_t to) {
          for (int64_t head = 0; head < heads; ++head) {
            auto best = best_of(head);
            best.offer(from, to, in.mask);
            found[(part + b) * heads + head] = best.take();
          }
        });
      }
    });
    at::parallel_for(0, B * heads, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / heads, head = i % heads, from = in.offsets[b], to = in.offsets[b + 1];
        auto best = best_of(head);
        for (int64_t part = from / kPart; from < to && part <= (to - 1) / kPart; ++part) {
          for (const int64_t row : found[(part + b) * heads + head]) best.offer(row);
        }
        const auto rows = best.take_sorted();
        const int64_t count = static_cast<int64_t>(rows.size());
        for (int64_t j = 0; j < k; ++j) {
          indices.mutable_data_ptr<int64_t>()[i * k + j] = j < count ? rows[j] : -1;
          values.mutable_data_ptr<A>()[i * k + j] = j < count ? in.x[rows[j] * heads + head]
                                                    : largest ? kDead<A>
                                                              : -kDead<A>;
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
