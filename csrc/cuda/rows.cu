#include "rows.h"

#include "centre.h"

namespace milkernels {
namespace {

constexpr int kMostParts = 16;  // blocks that share a segment, where rows need no sums

// The rows of a slot that are in [first, end), those of this block first; `step` to its next ones.
struct Share {
  int bag;
  int64_t begin, end, step;
};

__device__ inline Share share_of(const Bags& bags, int64_t slot, int rows_at_once, int64_t first, int64_t end) {
  const Segment segment = bags.segment(slot);
  const int64_t begin = larger(segment.begin, first) + int64_t{blockIdx.z} * rows_at_once;
  return {segment.bag, begin, smaller(segment.end, end), int64_t{gridDim.z} * rows_at_once};
}

inline unsigned parts_of(const Bags& bags, int rows_at_once) {
  const int64_t longest = smaller(bags.chunk(), bags.rows);
  return static_cast<unsigned>(smaller(ceil_div(longest, int64_t{rows_at_once}), int64_t{kMostParts}));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) row_products_kernel(RowProducts<T> p) {
  using A = acc_t<T>;
  constexpr int V = Vec<T>::kSize, kWarps = kThreads / kWarp;
  const Share share = share_of(p.bags, blockIdx.x, kRowsAtOnce * kWarps, 0, p.bags.rows);
  const int bag = share.bag, count = p.vectors.count, lane = lane_index();
  if (share.begin >= share.end) return;
  const A* const vectors = p.vectors.at + bag * p.vectors.of_bag;
  const A* const shift = p.vectors.shift == nullptr ? nullptr : p.vectors.shift + bag * p.vectors.shift_of_bag;
  const A* const centre = p.centre == nullptr ? nullptr : p.centre + int64_t{bag} * p.rows.width;
  for_vectors(count, [&]<int J>() {
    for (int64_t row = share.begin + warp_index() * kRowsAtOnce; row < share.end; row += share.step) {
      bool real[kRowsAtOnce];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) real[r] = row + r < share.end && p.bags.real(row + r);
      const auto load = [&](int r, int c, A(&x)[V]) {
        if (real[r]) load_columns(x, p.rows.x + (row + r) * p.rows.stride, c, p.rows.width);
#pragma unroll
        for (int i = 0; i < V; ++i) x[i] = real[r] ? x[i] : A(0);
      };
      for (int j0 = 0; j0 < count; j0 += J) {
        const A product = warp_products<J, T>(load, p.rows.width, vectors, j0, count, centre);
        const int r = lane / J, j = j0 + lane % J;
        if (lane < kRowsAtOnce * J && row + r < share.end && j < count) {
          const A value = shift == nullptr ? product : shifted(product, shift[j]);
          p.out[(row + r) * count + j] = p.bags.real(row + r) ? value : p.fill;
        }
      }
    }
  });
}

template <int V, typename A>
__device__ inline void add_term(const Term<A>& term, int bag, int64_t row, int rows, int c, int width,
                                A (&out)[kRowsAtOnce][V]) {
  if (term.weights == nullptr) return;
  for (int k = 0; k < term.count; ++k) {
    A v[V];
    load_columns(v, term.vectors + bag * term.of_bag + int64_t{k} * width, c, width);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const A weight = r < rows ? term.weights[(row + r) * term.count + k] : A(0);
      if (weight != 0) {
#pragma unroll
        for (int i = 0; i < V; ++i) out[r][i] += weight * v[i];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) expand_rows_kernel(ExpandRows<T> p, int64_t first_slot) {
  using A = acc_t<T>;
  constexpr int V = larger(Vec<T>::kSize, Vec<A>::kSize);
  const Share share = share_of(p.bags, first_slot + blockIdx.x, kRowsAtOnce, p.first, p.first + p.count);
  const A scale = p.scale == nullptr ? A(1) : *p.scale;
  for (int c = static_cast<int>(threadIdx.x) * V; c < p.width; c += kThreads * V) {
    for (int64_t row = share.begin; row < share.end; row += share.step) {
      const int rows = static_cast<int>(smaller(share.end - row, int64_t{kRowsAtOnce}));
      A out[kRowsAtOnce][V] = {};
      if (p.product != nullptr) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (r < rows) load_columns(out[r], p.product + (row + r - p.first) * p.width, c, p.width);
#pragma unroll
          for (int i = 0; i < V; ++i) out[r][i] *= scale;
        }
      }
      add_term(p.pooled, share.bag, row, rows, c, p.width, out);
      add_term(p.scored, share.bag, row, rows, c, p.width, out);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (r < rows) {
          const bool real = p.bags.real(row + r);
#pragma unroll
          for (int i = 0; i < V; ++i) out[r][i] = real ? out[r][i] : A(0);
          store_columns(p.out + (row + r - p.first) * p.width, out[r], c, p.width);
        }
      }
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads, kBlocks) score_gradients_kernel(ScoreGradients<A> p) {
  const Share share = share_of(p.bags, blockIdx.x, kThreads, 0, p.bags.rows);
  for (int64_t row = share.begin + threadIdx.x; row < share.end; row += share.step) {
    for (int k = 0; k < p.heads; ++k) {
      const int64_t at = row * p.heads + k, of_bag = int64_t{share.bag} * p.heads + k;
      const A score = p.scores[at];
      const bool alive = score != -std::numeric_limits<A>::infinity();
      A gradient = p.grad_scores == nullptr ? A(0) : p.grad_scores[at], weight = 0;
      if (alive && p.normal != nullptr) {
        weight = std::exp(score - p.lse[of_bag]) / p.normal[of_bag];
        A inner = p.grad_lse == nullptr ? A(0) : p.grad_lse[of_bag];
        if (p.shift != nullptr) inner -= p.shift[of_bag];
        if (p.da != nullptr) inner += p.da[at];
        gradient += weight * inner;
      }
      p.out[at] = alive ? gradient : A(0);
      if (p.weights != nullptr) p.weights[at] = weight;
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) pool_centres_kernel(PoolCentres<A> p) {
  const int64_t bag = blockIdx.x, head = bag * p.heads;
  A *const centre = p.centre + bag * p.width, *const shift = p.shift + head;
  const A *const vectors = p.bag + head * p.width, *const grad = p.grad_bag + head * p.width;
  find_centre(vectors, p.lse + head, p.heads, p.width, p.width, shift, centre);
  for (int k = warp_index(); k < p.heads; k += warp_count()) {
    const A sum = centre_shift(vectors, grad, centre, k, p.width);
    if (lane_index() == 0) shift[k] = sum;
  }
}

// Sums over the rows of a segment, or of a bag: of exp(value - lse), or of the values.
template <typename A>
struct ColumnSums {
  Bags bags;
  int columns;
  const A *values, *lse;  // lse [bags, columns] or null
  A* out;  // [slots, columns]
};

template <typename A>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(ColumnSums<A> p) {
  const int64_t slot = blockIdx.x;
  const Segment segment = p.bags.segment(slot);
  if (segment.begin >= segment.end && !p.bags.whole()) return;
  for (int k = warp_index(); k < p.columns; k += warp_count()) {
    const A lse = p.lse == nullptr ? A(0) : p.lse[int64_t{segment.bag} * p.columns + k];
    A sum = 0;
#pragma unroll 4
    for (int64_t row = segment.begin + lane_index(); row < segment.end; row += kWarp) {
      if (p.bags.real(row)) {
        const A value = p.values[row * p.columns + k];
        if (p.lse == nullptr) sum += value;
        else if (value != -std::numeric_limits<A>::infinity()) sum += std::exp(value - lse);
      }
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) p.out[slot * p.columns + k] = sum;
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) column_combine_kernel(Bags bags, int columns, const A* partials, A* out) {
  const int64_t i = int64_t{blockIdx.x} * warp_count() + warp_index();
  if (i >= int64_t{bags.count} * columns) return;  // whole warps
  const Range slots = bags.slots_of(static_cast<int>(i / columns));
  A sum = 0;
  for (int64_t s = slots.begin + lane_index(); s < slots.end; s += kWarp) sum += partials[s * columns + i % columns];
  sum = warp_sum(sum);
  if (lane_index() == 0) out[i] = sum;
}

template <typename A>
void sum_columns(const Bags& bags, int columns, const A* values, const A* lse, A* partials, A* out,
                 cudaStream_t stream) {
  if (bags.count == 0 || columns == 0) return;
  const int threads = kWarp * smaller(columns, kThreads / kWarp);
  const ColumnSums<A> p{bags, columns, values, lse, bags.whole() && out != nullptr ? out : partials};
  launch<column_sums_kernel<A>>(dim3(static_cast<unsigned>(bags.slots())), threads, 0, stream, p);
  if (bags.whole() || out == nullptr) return;
  const int64_t warps = kThreads / kWarp, blocks = ceil_div(int64_t{bags.count} * columns, warps);
  launch<column_combine_kernel<A>>(dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, bags, columns,
                                   const_cast<const A*>(partials), out);
}

dim3 grid_of(const Bags& bags, int64_t slots, int rows_at_once) {
  return dim3(static_cast<unsigned>(slots), 1, parts_of(bags, rows_at_once));
}

}  // namespace

template <typename T>
void row_products(const RowProducts<T>& p, cudaStream_t stream) {
  if (p.bags.rows == 0 || p.bags.count == 0 || p.vectors.count == 0) return;
  launch<row_products_kernel<T>>(grid_of(p.bags, p.bags.slots(), kRowsAtOnce * (kThreads / kWarp)), kThreads, 0, stream,
                                 p);
}

template <typename T>
void expand_rows(const ExpandRows<T>& p, cudaStream_t stream) {
  if (p.count == 0 || p.bags.count == 0) return;
  launch<expand_rows_kernel<T>>(grid_of(p.bags, p.bags.slots_in(p.first, p.count), kRowsAtOnce), kThreads, 0, stream, p,
                                p.bags.first_slot(p.first));
}

template <typename A>
void score_gradients(const ScoreGradients<A>& p, cudaStream_t stream) {
  if (p.bags.rows == 0 || p.bags.count == 0) return;
  launch<score_gradients_kernel<A>>(grid_of(p.bags, p.bags.slots(), kThreads), kThreads, 0, stream, p);
}

template <typename A>
void pool_centres(const PoolCentres<A>& p, cudaStream_t stream) {
  if (p.bags == 0) return;
  launch<pool_centres_kernel<A>>(dim3(static_cast<unsigned>(p.bags)), kThreads, 0, stream, p);
}

template <typename A>
void softmax_normal(const Bags& bags, int heads, const A* scores, const A* lse, A* partials, A* out,
                    cudaStream_t stream) {
  sum_columns(bags, heads, scores, lse, partials, out, stream);
}

template <typename A>
void column_sums(const Bags& bags, int columns, const A* values, A* partials, A* out, cudaStream_t stream) {
  sum_columns(bags, columns, values, static_cast<const A*>(nullptr), partials, out, stream);
}

#define MILKERNELS_INSTANTIATE(T)                                  \
  template void row_products(const RowProducts<T>&, cudaStream_t); \
  template void expand_rows(const ExpandRows<T>&, cudaStream_t);
MILKERNELS_INSTANTIATE(float)
MILKERNELS_INSTANTIATE(double)
MILKERNELS_INSTANTIATE(bfloat16)
MILKERNELS_INSTANTIATE(float16)
#undef MILKERNELS_INSTANTIATE

#define MILKERNELS_INSTANTIATE(A)                                                           \
  template void score_gradients(const ScoreGradients<A>&, cudaStream_t);                    \
  template void pool_centres(const PoolCentres<A>&, cudaStream_t);                          \
  template void softmax_normal(const Bags&, int, const A*, const A*, A*, A*, cudaStream_t); \
  template void column_sums(const Bags&, int, const A*, A*, A*, cudaStream_t);
MILKERNELS_INSTANTIATE(float)
MILKERNELS_INSTANTIATE(double)
#undef MILKERNELS_INSTANTIATE

}  // namespace milkernels
