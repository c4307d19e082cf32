#include "score_kernels.h"

#include "columns.h"

namespace milkernels {
namespace {

template <typename A>
constexpr A kNoScore = -std::numeric_limits<A>::infinity();

template <typename A>
__device__ inline void merge_states(SoftmaxState<A>& state, const SoftmaxState<A>& other) {
  const A top = larger(state.max, other.max), base = top == kNoScore<A> ? A(0) : top;
  state.sum = state.sum * rescale(state.max, base) + other.sum * rescale(other.max, base);
  state.max = top;
}

// A score has a state of its own: NaN is in the sum, never the largest.
template <typename A>
__device__ inline void fold_score(SoftmaxState<A>& state, A score, bool counts) {
  if (!counts || score == kNoScore<A>) return;
  const A top = larger(state.max, score), base = top == kNoScore<A> ? A(0) : top;
  state.sum = state.sum * rescale(state.max, base) + std::exp(score - base);
  state.max = top;
}

template <typename A>
__device__ inline void store_terms(const SoftmaxTerms<A>& p, int64_t to, const SoftmaxState<A>& state) {
  p.top[to] = state.max == kNoScore<A> ? A(0) : state.max;
  p.total[to] = state.sum;
}

template <typename A>
__global__ void __launch_bounds__(kReducers) terms_kernel(SoftmaxTerms<A> p, int at_once) {
  const int64_t slot = blockIdx.x;
  const Segment segment = p.bags.segment(slot);
  const bool whole = p.bags.whole();
  if (segment.begin >= segment.end && !whole) return;
  reduce_columns<A>(
      Range{segment.begin, segment.end}, p.heads, at_once, SoftmaxState<A>{},
      [&](A& score, int64_t row, int k) {
        score = p.scores[row * p.heads + k];
        return p.bags.real(row);
      },
      [](SoftmaxState<A>& state, A score, bool counts, int) { fold_score(state, score, counts); }, merge_states<A>,
      [&](int k, const SoftmaxState<A>& state) {
        if (whole) store_terms(p, slot * p.heads + k, state);
        else p.partials[slot * p.heads + k] = state;
      });
}

template <typename A>
__global__ void __launch_bounds__(kReducers) combine_terms(SoftmaxTerms<A> p, int at_once) {
  using State = SoftmaxState<A>;
  const int bag = static_cast<int>(blockIdx.x);
  reduce_columns<State>(
      p.bags.slots_of(bag), p.heads, at_once, State{},
      [&](State& part, int64_t slot, int k) {
        part = p.partials[slot * p.heads + k];
        return true;
      },
      [](State& state, const State& part, bool counts, int) {
        if (counts) merge_states(state, part);
      },
      merge_states<A>, [&](int k, const State& state) { store_terms(p, int64_t{bag} * p.heads + k, state); });
}

// value(at, row, at of the bag) of all scores of a segment.
template <typename A, typename Value>
__device__ inline void for_scores(const Bags& bags, int heads, int at_once, A* out, const Value& value) {
  const Segment segment = bags.segment(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), groups = kReducers / at_once;
  if (thread / at_once >= groups) return;
  for (int k = static_cast<int>(blockIdx.y) * at_once + thread % at_once; k < heads;
       k += static_cast<int>(gridDim.y) * at_once) {
    for (int64_t row = segment.begin + thread / at_once; row < segment.end; row += groups) {
      const int64_t at = row * heads + k;
      out[at] = value(at, row, int64_t{segment.bag} * heads + k);
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kReducers) weights_kernel(SoftmaxWeights<A> p, int at_once) {
  for_scores(p.bags, p.heads, at_once, p.out, [&](int64_t at, int64_t row, int64_t of_bag) {
    const A score = p.bags.real(row) ? p.scores[at] : kNoScore<A>;
    const A weight = std::exp(score - p.top[of_bag]) / (p.total == nullptr ? A(1) : p.total[of_bag]);
    return score == kNoScore<A> ? A(0) : weight;
  });
}

template <typename A>
__global__ void __launch_bounds__(kReducers) gradients_kernel(WeightGradients<A> p, int at_once) {
  for_scores(p.bags, p.heads, at_once, p.out, [&](int64_t at, int64_t, int64_t of_bag) {
    const A weight = p.weights[at], grad = p.grad[at] - (p.shift == nullptr ? A(0) : p.shift[of_bag]);
    return weight == 0 ? A(0) : weight * grad;
  });
}

}  // namespace

template <typename A>
void softmax_terms(const SoftmaxTerms<A>& p, cudaStream_t stream) {
  if (p.bags.count == 0) return;
  const int at_once = columns_at_once(p.heads);
  constexpr int64_t kShared = reduce_bytes<SoftmaxState<A>>();
  launch<terms_kernel<A>>(column_grid(p.bags.slots(), p.heads, at_once), kReducers, kShared, stream, p, at_once);
  if (p.bags.whole()) return;
  launch<combine_terms<A>>(column_grid(p.bags.count, p.heads, at_once), kReducers, kShared, stream, p, at_once);
}

template <typename A>
void softmax_weights(const SoftmaxWeights<A>& p, cudaStream_t stream) {
  if (p.bags.count == 0) return;
  const int at_once = columns_at_once(p.heads);
  launch<weights_kernel<A>>(column_grid(p.bags.slots(), p.heads, at_once), kReducers, 0, stream, p, at_once);
}

template <typename A>
void weight_gradients(const WeightGradients<A>& p, cudaStream_t stream) {
  if (p.bags.count == 0) return;
  const int at_once = columns_at_once(p.heads);
  launch<gradients_kernel<A>>(column_grid(p.bags.slots(), p.heads, at_once), kReducers, 0, stream, p, at_once);
}

#define MILKERNELS_SCORES(A)                                             \
  template void softmax_terms(const SoftmaxTerms<A>&, cudaStream_t);     \
  template void softmax_weights(const SoftmaxWeights<A>&, cudaStream_t); \
  template void weight_gradients(const WeightGradients<A>&, cudaStream_t);
MILKERNELS_SCORES(float)
MILKERNELS_SCORES(double)
#undef MILKERNELS_SCORES

}  // namespace milkernels
