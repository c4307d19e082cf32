// The backward of pooling in one read of the rows: while a tile lies in shared memory, the gradients of its scores are
// made, its own gradient is written, and what scores are products with gets its sums.
#include "centre.h"
#include "pool.h"

namespace milkernels {
namespace {

// A block's numbers, in shared memory. Its vectors [V] are those that scores are products with, its heads [K] those
// that were pooled.
template <typename T>
struct Shared {
  using A = acc_t<T>;
  T* stages;        // of the pipeline
  A* centre;        // [pitch]
  A* sum;           // [V, pitch]: of coefficients times rows
  A* products;      // [tile, K]: <row - centre, grad_bag>
  A* weights;       // [tile, K]
  A* coefficients;  // [tile, V]: the gradients of the scores, or of the logits
  A* normal;        // [K]
  A* shift;         // [K]: grad_lse - <bag - centre, grad_bag>
  A* total;         // [V]: of coefficients of kLogSumExp, of the gradients that came for the scores of kQuery
  A* lost;          // [V]: what rounding took from the totals, which thousands of tiles add to

  static int64_t bytes(int tile, int pitch, int heads, int vectors) {
    return pipeline_bytes<T>(tile, pitch) +
           ((int64_t{vectors} + 1) * pitch + (int64_t{tile} + 2) * vectors + (int64_t{tile} + 1) * 2 * heads) *
               static_cast<int64_t>(sizeof(A));
  }
  __device__ Shared(unsigned char* memory, int tile, int pitch, int heads, int vectors) {
    stages = reinterpret_cast<T*>(memory);
    centre = reinterpret_cast<A*>(stages + int64_t{kStages} * tile * pitch);
    sum = centre + pitch;
    products = sum + vectors * pitch;
    weights = products + tile * heads;
    coefficients = weights + tile * heads;
    normal = coefficients + tile * vectors;
    shift = normal + heads;
    total = shift + heads;
    lost = total + vectors;
  }
};

// sum += term, with what rounding loses (Kahan 1965).
template <typename A>
__device__ inline void add_exactly(A& sum, A& lost, A term) {
  const A rest = term - lost, next = sum + rest;
  lost = next - next == 0 ? (next - sum) - rest : A(0);
  sum = next;
}

template <typename T, Scoring SCORING>
struct Block {
  using A = acc_t<T>;
  static constexpr int V = Vec<T>::kSize;
  static constexpr A kDead = -std::numeric_limits<A>::infinity();
  const PoolBackward<T>& p;
  const Shared<T>& s;
  Segment segment;
  int vectors, pitch;
  const A *vector, *grad_bag;  // of the bag

  // sum_i exp(score - lse) over the bag, by a warp: 1 but for the rounding of lse.
  __device__ A normal(int k) const {
    A sum = 0;
    if (p.bags.whole()) {
      const A lse = p.lse[int64_t{segment.bag} * p.heads + k];
      for (int64_t row = segment.begin + lane_index(); row < segment.end; row += kWarp) {
        const A score = p.scores[row * p.heads + k];
        sum += score == kDead ? A(0) : std::exp(score - lse);
      }
    } else {
      const Range slots = p.bags.slots_of(segment.bag);
      for (int64_t slot = slots.begin + lane_index(); slot < slots.end; slot += kWarp) {
        sum += p.normal[slot * p.heads + k];
      }
    }
    return warp_sum(sum);
  }

  __device__ void begin() const {
    const int width = p.rows.width, heads = p.heads;
    const int64_t first_head = int64_t{segment.bag} * heads;
    const A* const bag = p.bag + first_head * width;
    for (int i = static_cast<int>(threadIdx.x); i < vectors * pitch; i += kThreads) s.sum[i] = 0;
    for (int j = static_cast<int>(threadIdx.x); j < vectors; j += kThreads) s.total[j] = s.lost[j] = 0;
    find_centre(bag, p.lse + first_head, heads, width, pitch, s.shift, s.centre);
    for (int k = warp_index(); k < heads; k += warp_count()) {
      const A shift = centre_shift(bag, grad_bag, s.centre, k, width), all = normal(k);
      if (lane_index() == 0) {
        s.normal[k] = all;
        s.shift[k] = (p.grad_lse == nullptr ? A(0) : p.grad_lse[first_head + k]) - shift;
      }
    }
  }

  // The weight of a row for a head and the gradient of its score; 0 where that is dead.
  __device__ A gradient(const Tile<T>& tile, int r, int k, A& weight) const {
    const int64_t at = (tile.row + r) * p.heads + k;
    const A score = p.scores[at];
    weight = 0;
    if (score == kDead || !(tile.real >> r & 1)) return 0;
    weight = std::exp(score - p.lse[int64_t{segment.bag} * p.heads + k]) / s.normal[k];
    return weight * (s.products[r * p.heads + k] + s.shift[k]) + (p.grad_scores == nullptr ? A(0) : p.grad_scores[at]);
  }

  // A warp for each head or class, a lane for each row.
  __device__ void differentiate(const Tile<T>& tile) const {
    const int r = lane_index(), count = SCORING == Scoring::kLogSumExp ? vectors : p.heads;
    for (int j = warp_index(); j < count; j += warp_count()) {
      A weight = 0, coefficient = 0, summed = 0;
      if (r < tile.count) {
        const int k = SCORING == Scoring::kLogSumExp ? 0 : j;
        coefficient = gradient(tile, r, k, weight);
        const int64_t at = (tile.row + r) * count + j;
        if constexpr (SCORING == Scoring::kLogSumExp) {
          const A logit = p.logits[at], score = p.scores[tile.row + r];
          const bool dead = logit == kDead || !(tile.real >> r & 1);
          coefficient *= dead ? A(0) : std::exp(logit - score);
          if (p.grad_logits != nullptr) coefficient += p.grad_logits[at];
          coefficient = dead ? A(0) : coefficient;
          summed = coefficient;
        } else if (SCORING == Scoring::kGiven) {
          if (p.grad_given != nullptr) p.grad_given[at] = coefficient;
        } else if (p.grad_scores != nullptr && p.scores[at] != kDead && tile.real >> r & 1) {
          summed = p.grad_scores[at];
        }
        s.weights[r * p.heads + k] = weight;
        if (SCORING != Scoring::kGiven) s.coefficients[r * count + j] = coefficient;
      }
      if (SCORING != Scoring::kGiven) {
        summed = warp_sum(summed);
        if (r == 0) add_exactly(s.total[j], s.lost[j], summed);
      }
    }
  }

  // out += weight vector, for rows [first, first + kRowsAtOnce) of the tile.
  __device__ void add_term(const A* weights, int count, const A* of, int first, int rows, int c,
                           A (&out)[kRowsAtOnce][V]) const {
    for (int k = 0; k < count; ++k) {
      A v[V];
      load_columns(v, of + int64_t{k} * p.rows.width, c, p.rows.width);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const A weight = first + r < rows ? weights[(first + r) * count + k] : A(0);
        if (weight != 0) {  // the same in all threads: whatever a vector holds is hidden by a weight of 0
#pragma unroll
          for (int i = 0; i < V; ++i) out[r][i] += weight * v[i];
        }
      }
    }
  }

  __device__ void store_rows(const Tile<T>& tile) const {
    for (int c = static_cast<int>(threadIdx.x) * V; c < pitch; c += kThreads * V) {
      for (int first = 0; first < tile.count; first += kRowsAtOnce) {
        A out[kRowsAtOnce][V] = {};
        add_term(s.weights, p.heads, grad_bag, first, tile.count, c, out);
        if (SCORING != Scoring::kGiven) add_term(s.coefficients, vectors, vector, first, tile.count, c, out);
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
          if (first + r < tile.count) {
            store_columns(p.grad_x + (tile.row + first + r) * p.rows.width, out[r], c, p.rows.width);
          }
        }
      }
    }
  }

  // Sums of coefficients times rows; less the centre for a query, whose coefficients sum to what `finish` adds.
  template <int J>
  __device__ void add(const Tile<T>& tile) const {
    for (int c = static_cast<int>(threadIdx.x) * V; c < pitch; c += kThreads * V) {
      A base[V] = {};
      if (SCORING == Scoring::kQuery) load_columns(base, s.centre, c, pitch);
      for (int j0 = 0; j0 < vectors; j0 += J) {
        A sum[J][V] = {};
#pragma unroll 4
        for (int r = 0; r < tile.count; ++r) {
          A x[V];
          load_tile<T>(x, tile.x + r * pitch + c);
#pragma unroll
          for (int j = 0; j < J; ++j) {
            const A coefficient = s.coefficients[r * vectors + smaller(j0 + j, vectors - 1)];
            if (coefficient != 0) {
#pragma unroll
              for (int i = 0; i < V; ++i) sum[j][i] += coefficient * (x[i] - base[i]);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < J; ++j) {
          if (j0 + j < vectors) {
            A all[V];
            load_columns(all, s.sum + (j0 + j) * pitch, c, pitch);
#pragma unroll
            for (int i = 0; i < V; ++i) all[i] += sum[j][i];
            store_columns(s.sum + (j0 + j) * pitch, all, c, pitch);
          }
        }
      }
    }
  }

  __device__ void finish(int64_t slot) const {
    const bool whole = p.bags.whole();
    // The gradients of a bag's scores sum to that of its lse, which its first segment adds, and those that came for the
    // scores: what rounding makes of them beyond that is large where features have a mean.
    const bool first = segment.begin == p.bags.range(segment.bag).begin;
    for (int j = 0; j < vectors; ++j) {
      A shared = 0;
      if (SCORING == Scoring::kQuery) {
        shared = s.total[j];
        if (first && p.grad_lse != nullptr && s.normal[j] != 0)
          shared += p.grad_lse[int64_t{segment.bag} * p.heads + j];
      }
      A* const out = (whole ? p.grad_vectors : p.partials.sum) + (slot * vectors + j) * p.rows.width;
      for (int c = static_cast<int>(threadIdx.x); c < p.rows.width; c += kThreads) {
        const A sum = s.sum[j * pitch + c];
        out[c] = shared == 0 ? sum : sum + shared * s.centre[c];
      }
    }
    A* const totals = whole ? p.grad_shift : p.partials.total;
    for (int j = static_cast<int>(threadIdx.x); totals != nullptr && j < vectors; j += kThreads) {
      totals[slot * vectors + j] = s.total[j];
    }
  }
};

template <typename T, Scoring SCORING>
__global__ void __launch_bounds__(kThreads, kBlocks) pool_backward_kernel(PoolBackward<T> p, int tile_size) {
  MILKERNELS_SHARED(memory);
  const int64_t slot = blockIdx.x;
  const Segment segment = p.bags.segment(slot);
  if (segment.begin >= segment.end && !p.bags.whole()) return;
  const int vectors = SCORING == Scoring::kGiven ? 0 : p.vectors.count, pitch = tile_pitch<T>(p.rows.width);
  const Shared<T> s(memory, tile_size, pitch, p.heads, vectors);
  const Block<T, SCORING> block{p,
                                s,
                                segment,
                                vectors,
                                pitch,
                                p.vectors.at + segment.bag * p.vectors.of_bag,
                                p.grad_bag + int64_t{segment.bag} * p.heads * p.rows.width};
  Pipeline<T> pipeline(s.stages, p.rows, p.bags, {segment.begin, segment.end}, p.rows.width, tile_size);
  block.begin();
  for (int t = 0; t < pipeline.count(); ++t) {
    const Tile<T> tile = pipeline.next(t);
    if (tile.real != 0) {
      tile_products(tile.x, tile_size, p.rows.width, block.grad_bag, p.heads, s.centre, s.products);
    }
    __syncthreads();
    block.differentiate(tile);
    __syncthreads();
    if (p.grad_x != nullptr) block.store_rows(tile);
    if (SCORING == Scoring::kGiven || p.grad_vectors == nullptr || tile.real == 0) continue;
    if (vectors == 1) block.template add<1>(tile);
    else if (vectors == 2) block.template add<2>(tile);
    else block.template add<4>(tile);
  }
  __syncthreads();
  if (SCORING != Scoring::kGiven && p.grad_vectors != nullptr) block.finish(slot);
}

template <typename T>
int64_t shared_bytes(const PoolBackward<T>& p) {
  const int width = p.rows.width;
  return Shared<T>::bytes(tile_rows<T>(width), tile_pitch<T>(width), p.heads, p.vectors.count);
}

}  // namespace

template <typename T>
bool fits(const PoolBackward<T>& p) {
  return shared_bytes(p) <= shared_limit();
}

template <typename T>
void pool_backward(const PoolBackward<T>& p, cudaStream_t stream) {
  if (p.bags.count == 0) return;
  const int tile = tile_rows<T>(p.rows.width);
  const int64_t shared = shared_bytes(p);
  const dim3 grid(static_cast<unsigned>(p.bags.slots()));
  if (p.scoring == Scoring::kGiven) {
    launch<pool_backward_kernel<T, Scoring::kGiven>>(grid, kThreads, shared, stream, p, tile);
  } else if (p.scoring == Scoring::kQuery) {
    launch<pool_backward_kernel<T, Scoring::kQuery>>(grid, kThreads, shared, stream, p, tile);
  } else {
    launch<pool_backward_kernel<T, Scoring::kLogSumExp>>(grid, kThreads, shared, stream, p, tile);
  }
  if (p.grad_vectors != nullptr && !p.bags.whole()) {
    combine<acc_t<T>>(p.bags, p.vectors.count, p.rows.width, Merge::kSum, p.partials, p.grad_vectors, p.grad_shift,
                      stream);
  }
}

template bool fits(const PoolBackward<float>&);
template void pool_backward(const PoolBackward<float>&, cudaStream_t);
template bool fits(const PoolBackward<double>&);
template void pool_backward(const PoolBackward<double>&, cudaStream_t);
template bool fits(const PoolBackward<bfloat16>&);
template void pool_backward(const PoolBackward<bfloat16>&, cudaStream_t);
template bool fits(const PoolBackward<float16>&);
template void pool_backward(const PoolBackward<float16>&, cudaStream_t);

}  // namespace milkernels
