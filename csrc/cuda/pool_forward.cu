// Pooling in one read of the rows: a tile of them is scored, weighted by a running softmax and summed while it lies in
// shared memory.
#include "pool.h"
#include "tile.h"

namespace milkernels {
namespace {

constexpr int kSumBytes = 40 << 10;  // of sums in shared memory: what does not fit is left to blocks of its own

// How a call is cut into blocks: columns of the sums and heads of one of them.
struct Cut {
  int columns, heads, tile;
  int64_t shared;
};

// Whether scores are made of products with the rows.
__host__ __device__ constexpr bool scored(Scoring s) { return s == Scoring::kQuery || s == Scoring::kLogSumExp; }

// A weight that stands for: this row is not summed, whatever it holds.
template <typename A>
constexpr A kLeftOut = A(-1);

// The state of a block's pooling, in shared memory.
template <typename T>
struct Shared {
  using A = acc_t<T>;
  T* stages;    // of the pipeline
  A* sum;       // [heads, pitch]
  A* products;  // [tile, vectors]
  A* weights;   // [tile, heads]
  A *top, *total, *scale;  // [heads]

  __host__ __device__ static int64_t bytes(int tile, int pitch, int heads, int vectors) {
    return pipeline_bytes<T>(tile, pitch) +
           (int64_t{heads} * (pitch + 3) + int64_t{tile} * (vectors + heads)) * static_cast<int64_t>(sizeof(A));
  }
  __device__ Shared(unsigned char* memory, int tile, int pitch, int heads, int vectors) {
    stages = reinterpret_cast<T*>(memory);
    sum = reinterpret_cast<A*>(stages + int64_t{kStages} * tile * pitch);
    products = sum + heads * pitch;
    weights = products + tile * vectors;
    top = weights + tile * heads;
    total = top + heads;
    scale = total + heads;
  }
};

// One block: heads [head, head + heads) of a segment, and columns of its sums.
template <typename T, Scoring SCORING>
struct Block {
  using A = acc_t<T>;
  static constexpr int V = Vec<T>::kSize;
  const PoolForward<T>& p;
  const Shared<T>& s;
  int head, heads, vectors, columns, pitch;
  int bag;

  // Scores of a row for a head, where they are not products.
  __device__ A given(int64_t row, int k) const { return p.given == nullptr ? A(1) : p.given[row * p.heads + head + k]; }

  // The logits of kLogSumExp, or the scores of kQuery, as they leave.
  __device__ void store_products(const Tile<T>& tile) const {
    A* const out = SCORING == Scoring::kLogSumExp ? p.products : p.scores;
    if (out == nullptr) return;
    const int all = SCORING == Scoring::kLogSumExp ? vectors : p.heads,
              first = SCORING == Scoring::kLogSumExp ? 0 : head;
    for (int i = static_cast<int>(threadIdx.x); i < tile.count * vectors; i += static_cast<int>(blockDim.x)) {
      const int r = i / vectors, j = i % vectors;
      const A value = tile.real >> r & 1 ? s.products[i] : -std::numeric_limits<A>::infinity();
      out[(tile.row + r) * all + first + j] = value;
    }
  }

  __device__ A score(const Tile<T>& tile, int r, int k) const {
    if constexpr (SCORING == Scoring::kQuery) return s.products[r * vectors + k];
    if constexpr (SCORING == Scoring::kLogSumExp) {
      const A* const logits = s.products + r * vectors;
      A top = logits[0];
      for (int j = 1; j < vectors; ++j) top = larger(top, logits[j]);
      if (top == -std::numeric_limits<A>::infinity()) top = 0;
      A sum = 0;
      for (int j = 0; j < vectors; ++j) sum += std::exp(logits[j] - top);
      return log_sum_exp(SoftmaxState<A>{top, sum});
    }
    return given(tile.row + r, k);
  }

  // From scores to weights, a warp for each head and a lane for each row.
  __device__ void weigh(const Tile<T>& tile) const {
    const int r = lane_index();
    for (int k = warp_index(); k < heads; k += warp_count()) {
      const bool real = tile.real >> r & 1;
      if constexpr (SCORING == Scoring::kWeights) {
        const A weight = real ? given(tile.row + r, k) : A(0);
        if (r < tile.count) s.weights[r * heads + k] = weight;
        const A sum = warp_sum(weight);
        if (r == 0) s.total[k] += sum, s.scale[k] = 1;
      } else {
        constexpr A kDead = -std::numeric_limits<A>::infinity();
        const A value = real ? score(tile, r, k) : kDead;
        if (SCORING != Scoring::kQuery && p.scores != nullptr && r < tile.count) {
          p.scores[(tile.row + r) * p.heads + head + k] = value;
        }
        const A before = s.top[k], top = larger(before, warp_max(value)), base = top == kDead ? A(0) : top;
        const A weight = value == kDead ? A(0) : std::exp(value - base);
        if (r < tile.count) s.weights[r * heads + k] = value == kDead ? kLeftOut<A> : weight;
        const A sum = warp_sum(weight), scale = rescale(before, top);
        __syncwarp();  // all lanes have read the maximum so far
        if (r == 0) s.top[k] = top, s.total[k] = s.total[k] * scale + sum, s.scale[k] = scale;
      }
    }
  }

  // sum[k] = sum[k] scale[k] + weights x, K heads at a time; a vector of columns for each thread in turn. A tile is
  // summed by itself: beside a row of weight 1 many small ones would be rounded away one by one.
  template <int K>
  __device__ void add(const Tile<T>& tile) const {
    for (int c = static_cast<int>(threadIdx.x) * V; c < pitch; c += static_cast<int>(blockDim.x) * V) {
      for (int k0 = 0; k0 < heads; k0 += K) {
        A sum[K][V] = {};
#pragma unroll 4
        for (int r = 0; r < tile.count; ++r) {
          A x[V];
          load_tile<T>(x, tile.x + r * pitch + c);
#pragma unroll
          for (int k = 0; k < K; ++k) {
            // Past the last head that one is summed again, and not stored.
            const A weight = s.weights[r * heads + smaller(k0 + k, heads - 1)];
            if (SCORING == Scoring::kWeights || !(weight < 0)) {  // the same in all threads
#pragma unroll
              for (int i = 0; i < V; ++i) sum[k][i] += weight * x[i];
            }
          }
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (k0 + k < heads) {
            A all[V];
            load_columns(all, s.sum + (k0 + k) * pitch, c, pitch);
            const A scale = s.scale[k0 + k];
#pragma unroll
            for (int i = 0; i < V; ++i) all[i] = all[i] * scale + sum[k][i];
            store_columns(s.sum + (k0 + k) * pitch, all, c, pitch);
          }
        }
      }
    }
  }

  // What the block has found, into its slot; or finished, where nobody else has a part in the bag.
  __device__ void store(int64_t slot, int column, int width) const {
    const bool whole = p.bags.whole();
    for (int k = static_cast<int>(threadIdx.x); column == 0 && k < heads; k += static_cast<int>(blockDim.x)) {
      if (!whole) {
        p.partials.top[slot * p.heads + head + k] = s.top[k];
        p.partials.total[slot * p.heads + head + k] = s.total[k];
      } else if (p.lse != nullptr) {
        p.lse[slot * p.heads + head + k] = log_sum_exp(SoftmaxState<A>{s.top[k], s.total[k]});
      }
    }
    for (int k = 0; k < heads; ++k) {
      A divisor = 1;
      if (whole && (SCORING != Scoring::kWeights || p.mean) && s.total[k] != 0) divisor = s.total[k];
      A* const out = (whole ? p.bag : p.partials.sum) + (slot * p.heads + head + k) * width + column;
      for (int c = static_cast<int>(threadIdx.x); c < columns; c += static_cast<int>(blockDim.x)) {
        out[c] = s.sum[k * pitch + c] / divisor;
      }
    }
  }
};

template <typename T, Scoring SCORING>
__global__ void __launch_bounds__(kThreads, kBlocks) pool_kernel(PoolForward<T> p, Cut cut) {
  using A = acc_t<T>;
  MILKERNELS_SHARED(memory);
  const int64_t slot = blockIdx.x;
  const Segment segment = p.bags.segment(slot);
  if (segment.begin >= segment.end && !p.bags.whole()) return;
  const int head = static_cast<int>(blockIdx.y) * cut.heads, heads = smaller(cut.heads, p.heads - head);
  const int column = static_cast<int>(blockIdx.z) * cut.columns, columns = smaller(cut.columns, p.rows.width - column);
  const int vectors = SCORING == Scoring::kQuery ? heads : SCORING == Scoring::kLogSumExp ? p.vectors.count : 0;
  const int pitch = tile_pitch<T>(columns);
  const Shared<T> s(memory, cut.tile, pitch, heads, vectors);
  for (int i = static_cast<int>(threadIdx.x); i < heads * pitch; i += kThreads) s.sum[i] = 0;
  for (int k = static_cast<int>(threadIdx.x); k < heads; k += kThreads) {
    s.top[k] = -std::numeric_limits<A>::infinity();
    s.total[k] = 0;
  }
  const Block<T, SCORING> block{p, s, head, heads, vectors, columns, pitch, segment.bag};
  const A* const of_bag = p.vectors.at + segment.bag * p.vectors.of_bag + int64_t{head} * p.rows.width;
  Rows<T> rows = p.rows;
  rows.x += column;
  Pipeline<T> pipeline(s.stages, rows, p.bags, {segment.begin, segment.end}, columns, cut.tile);
  for (int t = 0; t < pipeline.count(); ++t) {
    const Tile<T> tile = pipeline.next(t);
    if constexpr (scored(SCORING)) {
      if (tile.real != 0) {
        tile_products(tile.x, cut.tile, columns, of_bag, vectors, static_cast<const A*>(nullptr), s.products);
        __syncthreads();
        if (p.vectors.shift != nullptr) {
          const A* const shift = p.vectors.shift + segment.bag * p.vectors.shift_of_bag + head;
          for (int i = static_cast<int>(threadIdx.x); i < cut.tile * vectors; i += kThreads) {
            s.products[i] = shifted(s.products[i], shift[i % vectors]);
          }
          __syncthreads();
        }
      }
      block.store_products(tile);
    }
    block.weigh(tile);
    __syncthreads();
    if (tile.real == 0) continue;  // the same in all warps
    if (heads == 1) block.template add<1>(tile);
    else if (heads == 2) block.template add<2>(tile);
    else block.template add<4>(tile);
  }
  __syncthreads();
  block.store(slot, column, p.rows.width);
}

// False where a row that has to be scored is too wide.
template <typename T>
bool make_cut(const PoolForward<T>& p, Cut& cut) {
  using A = acc_t<T>;
  const int width = p.rows.width, vectors = scored(p.scoring) ? p.vectors.count : 0;
  // What is not scored may be cut anywhere, evenly and at whole vectors.
  const int most = scored(p.scoring) ? width : kTileBytes / 4 / static_cast<int>(sizeof(T));
  cut.columns = round_up(ceil_div(width, ceil_div(width, most)), Vec<T>::kSize);
  const int pitch = cut.columns;
  cut.tile = tile_rows<T>(cut.columns);
  cut.heads = smaller(p.heads, larger(kSumBytes / static_cast<int>(pitch * sizeof(A)), 1));
  cut.shared = Shared<T>::bytes(cut.tile, pitch, cut.heads, p.scoring == Scoring::kQuery ? cut.heads : vectors);
  return cut.shared <= shared_limit();
}

}  // namespace

template <typename T>
bool pool_forward(const PoolForward<T>& p, cudaStream_t stream) {
  Cut cut;
  if (!make_cut(p, cut)) return false;
  if (p.bags.count == 0) return true;
  const dim3 grid(static_cast<unsigned>(p.bags.slots()), ceil_div(p.heads, cut.heads),
                  ceil_div(p.rows.width, cut.columns));
  switch (p.scoring) {
    case Scoring::kGiven: launch<pool_kernel<T, Scoring::kGiven>>(grid, kThreads, cut.shared, stream, p, cut); break;
    case Scoring::kQuery: launch<pool_kernel<T, Scoring::kQuery>>(grid, kThreads, cut.shared, stream, p, cut); break;
    case Scoring::kLogSumExp:
      launch<pool_kernel<T, Scoring::kLogSumExp>>(grid, kThreads, cut.shared, stream, p, cut);
      break;
    case Scoring::kWeights:
      launch<pool_kernel<T, Scoring::kWeights>>(grid, kThreads, cut.shared, stream, p, cut);
      break;
  }
  if (!p.bags.whole()) {
    const Merge merge = p.scoring != Scoring::kWeights ? Merge::kSoftmax : p.mean ? Merge::kMean : Merge::kSum;
    combine<acc_t<T>>(p.bags, p.heads, p.rows.width, merge, p.partials, p.bag, p.lse, stream);
  }
  return true;
}

template bool pool_forward(const PoolForward<float>&, cudaStream_t);
template bool pool_forward(const PoolForward<double>&, cudaStream_t);
template bool pool_forward(const PoolForward<bfloat16>&, cudaStream_t);
template bool pool_forward(const PoolForward<float16>&, cudaStream_t);

}  // namespace milkernels
