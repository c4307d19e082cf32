// Attention pooling in one kernel: a block takes the rows of a segment a tile at a time, scores them, and sums them by
// a running softmax while they lie in shared memory. And its backward, but for the pooling and the gradients of V and
// U: a block takes a tile, makes the gradients of its products and, from these, of its rows.
#include "small_attention.h"

#include "hidden_units.h"
#include "mma.h"

namespace milkernels {
namespace {

constexpr int kPanel = 64;  // columns of the weights in shared memory at a time

// What a block has in shared memory: a tile of rows, a panel of weights, their products, and `more` numbers behind.
template <typename T>
struct Shared {
  using A = acc_t<T>;
  T* x;       // [32, product_pitch(width)]
  T* panel;   // [64, kPanelPitch] of V, or of V and U
  A* z;       // [32, kSumsPitch]: products
  A* scores;  // [32, heads]; then the weights; of the backward the gradients of the scores
  A* more;

  static constexpr int kPanelPitch = product_pitch<T>(kPanel);
  static int64_t bytes(int width, int heads) {
    return (int64_t{kProductRows} * product_pitch<T>(width) + kProductColumns * kPanelPitch) *
               static_cast<int64_t>(sizeof(T)) +
           int64_t{kProductRows} * (kSumsPitch<A> + heads) * static_cast<int64_t>(sizeof(A));
  }
  __device__ Shared(unsigned char* memory, int width, int heads) {
    x = reinterpret_cast<T*>(memory);
    panel = x + kProductRows * product_pitch<T>(width);
    z = reinterpret_cast<A*>(panel + kProductColumns * kPanelPitch);
    scores = z + kProductRows * kSumsPitch<A>;
    more = scores + kProductRows * heads;
  }
};

template <typename T>
struct SharedForward : Shared<T> {
  using A = acc_t<T>;
  A* sum;                  // [heads, width]
  A *top, *total, *scale;  // [heads]

  static int64_t bytes(int width, int heads) {
    return Shared<T>::bytes(width, heads) + int64_t{heads} * (width + 3) * static_cast<int64_t>(sizeof(A));
  }
  __device__ SharedForward(unsigned char* memory, int width, int heads) : Shared<T>(memory, width, heads) {
    sum = this->more;
    top = sum + heads * width;
    total = top + heads;
    scale = total + heads;
  }
};

// The backward's shared memory. Units of the gradients come as slices do: those of V in whole slices, those of U behind.
template <typename T>
struct SharedBackward : Shared<T> {
  using A = acc_t<T>;
  A* h;   // [32, kSumsPitch]: hidden units of a slice
  T* dz;  // [32, product_pitch(depth)]: the gradients of the products

  static int64_t bytes(int width, int heads, int depth) {
    return Shared<T>::bytes(width, heads) +
           int64_t{kProductRows} * (kSumsPitch<A> * static_cast<int64_t>(sizeof(A)) +
                                    product_pitch<T>(depth) * static_cast<int64_t>(sizeof(T)));
  }
  __device__ SharedBackward(unsigned char* memory, int width, int heads) : Shared<T>(memory, width, heads) {
    h = this->more;
    dz = reinterpret_cast<T*>(h + kProductRows * kSumsPitch<A>);
  }
};

// Hidden units whose products are made at a time, and how many there are in whole slices.
__host__ __device__ constexpr int slice_of(bool gated) { return gated ? kProductColumns / 2 : kProductColumns; }
template <typename A>
__host__ __device__ inline int depth_of(const Gate<A>& gate) {
  return round_up(gate.hidden, slice_of(gate.gated)) * (gate.gated ? 2 : 1);
}

// `rows` rows of `columns` numbers, a multiple of 8, into shared memory: row_at(r) says where `width` of them are, the
// others are 0; all are where it is null.
template <typename T, typename RowAt>
__device__ inline void copy_rows(T* to, int pitch, int rows, int columns, int width, const RowAt& row_at) {
  const int across = columns / kUnitsTogether;
  for (int i = static_cast<int>(threadIdx.x); i < rows * across; i += kThreads) {
    const int r = i / across, c = i % across * kUnitsTogether;
    const T* const from = row_at(r);
    Units<acc_t<T>> value = {};
    if (from != nullptr) load_columns(value, from, c, width);
    store_columns(to + r * pitch, value, c, pitch);
  }
}

// A tile of rows and its products.
template <typename T, bool GATED>
struct Products {
  using A = acc_t<T>;
  static constexpr int kSlice = slice_of(GATED);
  static constexpr int kAcross = kSlice / kUnitsTogether;  // neighbouring threads that share a row
  const SmallAttention<T>& of;
  const Shared<T>& s;

  __device__ int heads() const { return of.gate.heads; }
  __device__ int width() const { return of.rows.width; }

  // Rows [row, row + count), zeros where masked and past them; returns which count.
  __device__ unsigned load(int64_t row, int count) const {
    const int lane = lane_index();
    const unsigned real = __ballot_sync(kAllLanes, lane < count && of.bags.real(row + smaller(lane, count - 1)));
    copy_rows(s.x, product_pitch<T>(width()), kProductRows, round_up(width(), kProductDepth), width(), [&](int r) {
      return real >> r & 1 ? of.rows.x + (row + r) * of.rows.stride : static_cast<const T*>(nullptr);
    });
    return real;
  }

  // Products of the tile with the units from `unit` on, into s.z: V's, and U's behind.
  __device__ void multiply(int unit) const {
    Product<T> product;
    const int depth = round_up(width(), kProductDepth);
    for (int c = 0; c < depth; c += kPanel) {
      const int wide = smaller(kPanel, depth - c);
      __syncthreads();  // the tile has come, the panel before has been used
      copy_rows(s.panel, Shared<T>::kPanelPitch, kProductColumns, wide, width() - c, [&](int r) {
        const int u = unit + r % kSlice;
        const T* const weight = r < kSlice ? of.v_weight : of.u_weight;
        return u < of.gate.hidden ? weight + int64_t{u} * width() + c : static_cast<const T*>(nullptr);
      });
      __syncthreads();
      product.add(s.x + c, product_pitch<T>(width()), s.panel, Shared<T>::kPanelPitch, wide);
    }
    product.store(s.z);
    __syncthreads();
  }

  // The 8 units from `unit` + 8 (i % kAcross) on of row i / kAcross of the tile.
  template <bool GRADIENT>
  __device__ HiddenUnits<A, GATED, GRADIENT> hidden_units(int64_t row, int unit, int i) const {
    Units<A> v, u;
    const A* const z = s.z + i / kAcross * kSumsPitch<A> + i % kAcross * kUnitsTogether;
    load_columns(v, z, 0, kUnitsTogether);
    if constexpr (GATED) load_columns(u, z + kSlice, 0, kUnitsTogether);
    return {of.gate, row + i / kAcross, unit + i % kAcross * kUnitsTogether, v, u};
  }
};

template <typename T, bool GATED>
struct Pooling {
  using A = acc_t<T>;
  static constexpr A kDead = -std::numeric_limits<A>::infinity();
  const Products<T, GATED>& products;
  const SharedForward<T>& s;

  __device__ int heads() const { return products.heads(); }
  __device__ int width() const { return products.width(); }

  // What these units add to the scores.
  __device__ void score(int64_t row, int unit) const {
    constexpr int kAcross = Products<T, GATED>::kAcross;
    const Gate<A>& gate = products.of.gate;
    for (int i = static_cast<int>(threadIdx.x); i < kProductRows * kAcross; i += kThreads) {
      const auto h = products.template hidden_units<false>(row, unit, i);
      for (int k = 0; k < heads(); ++k) {
        Units<A> w;
        load_columns(w, gate.w + int64_t{k} * gate.hidden, unit + i % kAcross * kUnitsTogether, gate.hidden);
        A sum = 0;
#pragma unroll
        for (int j = 0; j < kUnitsTogether; ++j) sum += h.at(j) * w[j];
        for (int step = kAcross / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (i % kAcross == 0) s.scores[i / kAcross * heads() + k] += sum;
      }
    }
  }

  // From scores to weights, a warp for each head and a lane for each row; what does not count weighs nothing.
  __device__ void weigh(A* scores, int64_t row, int count, unsigned real) const {
    const int r = lane_index();
    for (int k = warp_index(); k < heads(); k += warp_count()) {
      const A value = real >> r & 1 ? s.scores[r * heads() + k] : kDead;
      if (r < count) scores[(row + r) * heads() + k] = value;
      const A before = s.top[k], top = larger(before, warp_max(value)), base = top == kDead ? A(0) : top;
      const A weight = value == kDead ? A(0) : std::exp(value - base);
      s.scores[r * heads() + k] = weight;
      const A sum = warp_sum(weight), scale = rescale(before, top);
      __syncwarp();  // all lanes have read the maximum so far
      if (r == 0) s.top[k] = top, s.total[k] = s.total[k] * scale + sum, s.scale[k] = scale;
    }
  }

  // sum[k] = sum[k] scale[k] + weights x; a column for each thread in turn.
  __device__ void add() const {
    for (int i = static_cast<int>(threadIdx.x); i < heads() * width(); i += kThreads) {
      const int k = i / width(), c = i % width();
      A sum = 0;  // of the tile: long running sums lose digits
#pragma unroll 4
      for (int r = 0; r < kProductRows; ++r) {
        const A weight = s.scores[r * heads() + k];
        if (weight != 0) sum += weight * widen(s.x[r * product_pitch<T>(width()) + c]);
      }
      s.sum[i] = s.sum[i] * s.scale[k] + sum;
    }
  }
};

template <typename T, bool GATED>
__global__ void __launch_bounds__(kThreads, kBlocks) small_forward_kernel(SmallForward<T> p) {
  using A = acc_t<T>;
  MILKERNELS_SHARED(memory);
  const SmallAttention<T>& of = p.of;
  const int64_t slot = blockIdx.x;
  const bool whole = of.bags.whole();
  const Segment segment = of.bags.segment(slot);
  if (segment.begin >= segment.end && !whole) return;
  const int heads = of.gate.heads, width = of.rows.width, thread = static_cast<int>(threadIdx.x);
  const SharedForward<T> s(memory, width, heads);
  const Products<T, GATED> products{of, s};
  const Pooling<T, GATED> pooling{products, s};
  for (int i = thread; i < heads * width; i += kThreads) s.sum[i] = 0;
  for (int k = thread; k < heads; k += kThreads) s.top[k] = -std::numeric_limits<A>::infinity(), s.total[k] = 0;
  for (int64_t row = segment.begin; row < segment.end; row += kProductRows) {
    const int count = static_cast<int>(smaller(int64_t{kProductRows}, segment.end - row));
    __syncthreads();  // the tile before has been used
    const unsigned real = products.load(row, count);
    for (int i = thread; i < kProductRows * heads; i += kThreads) {
      s.scores[i] = of.gate.w_bias == nullptr ? A(0) : of.gate.w_bias[i % heads];
    }
    for (int unit = 0; real != 0 && unit < of.gate.hidden; unit += slice_of(GATED)) {
      products.multiply(unit);
      pooling.score(row, unit);
    }
    __syncthreads();
    pooling.weigh(p.scores, row, count, real);
    __syncthreads();
    if (p.bag != nullptr && real != 0) pooling.add();
  }
  if (p.bag == nullptr) return;
  __syncthreads();
  for (int k = thread; k < heads; k += kThreads) {
    if (!whole) p.partials.top[slot * heads + k] = s.top[k], p.partials.total[slot * heads + k] = s.total[k];
    else p.lse[slot * heads + k] = log_sum_exp(SoftmaxState<A>{s.top[k], s.total[k]});
  }
  A* const out = (whole ? p.bag : p.partials.sum) + slot * heads * width;
  for (int i = thread; i < heads * width; i += kThreads) {
    const A total = s.total[i / width];
    out[i] = whole && total != 0 ? s.sum[i] / total : s.sum[i];
  }
}

template <typename T, bool GATED>
struct Backward {
  using A = acc_t<T>;
  static constexpr int kAcross = Products<T, GATED>::kAcross, kSlice = slice_of(GATED);
  const SmallBackward<T>& p;
  const Products<T, GATED>& products;
  const SharedBackward<T>& s;
  int64_t row;
  int count, depth;
  unsigned real;

  // Hidden units into s.h; the gradients of their products over the products, and rounded into dz.
  __device__ void gate(int unit) const {
    const Gate<A>& gate = p.of.gate;
    const int hidden = gate.hidden, pitch = product_pitch<T>(depth);
    for (int i = static_cast<int>(threadIdx.x); i < kProductRows * kAcross; i += kThreads) {
      const int r = i / kAcross, lane = i % kAcross * kUnitsTogether, first = unit + lane;
      const bool counts = real >> r & 1;
      const auto h = products.template hidden_units<true>(row, unit, i);
      Units<A> gradient = {}, w, dz;
      for (int k = 0; k < gate.heads; ++k) {
        const A ds = s.scores[r * gate.heads + k];
        load_columns(w, gate.w + int64_t{k} * hidden, first, hidden);
#pragma unroll
        for (int j = 0; j < kUnitsTogether; ++j) gradient[j] += ds * w[j];
      }
      A* const z = s.z + r * kSumsPitch<A> + lane;
      T* const out = p.dz + (row + r) * hidden * (GATED ? 2 : 1);
#pragma unroll
      for (int j = 0; j < kUnitsTogether; ++j) dz[j] = counts ? h.of_v(j, gradient[j]) : A(0);
      store_columns(z, dz, 0, kUnitsTogether);
      store_columns(s.dz + r * pitch, dz, first, pitch);
      if (r < count) store_columns(out, dz, first, hidden);
      if constexpr (GATED) {
#pragma unroll
        for (int j = 0; j < kUnitsTogether; ++j) dz[j] = counts ? h.of_u(j, gradient[j]) : A(0);
        store_columns(z + kSlice, dz, 0, kUnitsTogether);
        store_columns(s.dz + r * pitch + depth / 2, dz, first, pitch - depth / 2);
        if (r < count) store_columns(out + hidden, dz, first, hidden);
      }
#pragma unroll
      for (int j = 0; j < kUnitsTogether; ++j) dz[j] = counts ? h.at(j) : A(0);
      store_columns(s.h + r * kSumsPitch<A> + lane, dz, 0, kUnitsTogether);
    }
  }

  // What the tile adds to the gradients of w and of the biases.
  __device__ void sum(int unit) const {
    const int heads = p.of.gate.heads, hidden = p.of.gate.hidden;
    A* const out = p.sums + int64_t{blockIdx.x} * (heads + 2) * hidden;
    for (int i = static_cast<int>(threadIdx.x); i < (heads + 2) * kSlice; i += kThreads) {
      const int k = i / kSlice, u = i % kSlice;
      A sum = 0;
      for (int r = 0; r < kProductRows; ++r) {
        if (k < heads) sum += s.scores[r * heads + k] * s.h[r * kSumsPitch<A> + u];
        else if (k == heads || GATED) sum += s.z[r * kSumsPitch<A> + (k - heads) * kSlice + u];
      }
      if (unit + u < hidden) out[int64_t{k} * hidden + unit + u] = sum;
    }
  }

  // The gradient of the rows: that of the products times V and U.
  __device__ void rows() const {
    const int width = products.width(), hidden = p.of.gate.hidden, units = GATED ? depth / 2 : depth;
    constexpr int kPitch = Shared<T>::kPanelPitch, kGroups = kPanel / kUnitsTogether;
    for (int column = 0; column < width; column += kProductColumns) {
      Product<T> product;
      for (int d = 0; d < depth; d += kPanel) {
        __syncthreads();  // the panel before has been used, and all gradients are there
        for (int i = static_cast<int>(threadIdx.x); i < kPanel * kGroups; i += kThreads) {
          const int j = d + i / kGroups, u = j % units, c = i % kGroups * kUnitsTogether;
          Units<A> value = {};
          const T* const weight = j < units ? p.of.v_weight : p.of.u_weight;
          if (u < hidden) load_columns(value, weight + int64_t{u} * width, column + c, width);
#pragma unroll
          for (int v = 0; v < kUnitsTogether; ++v) s.panel[(c + v) * kPitch + j - d] = narrow<T>(value[v]);
        }
        __syncthreads();
        product.add(s.dz + d, product_pitch<T>(depth), s.panel, kPitch, kPanel);
      }
      product.store(s.z);
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < count * kProductColumns; i += kThreads) {
        const int r = i / kProductColumns, c = i % kProductColumns;
        if (column + c < width) {
          T* const to = p.grad_x + (row + r) * width + column + c;
          const A before = p.added ? widen(*to) : A(0);
          *to = narrow<T>(real >> r & 1 ? before + s.z[r * kSumsPitch<A> + c] : A(0));
        }
      }
    }
  }
};

template <typename T, bool GATED>
__global__ void __launch_bounds__(kThreads, kBlocks) small_backward_kernel(SmallBackward<T> p) {
  using A = acc_t<T>;
  MILKERNELS_SHARED(memory);
  const int heads = p.of.gate.heads;
  const int64_t row = int64_t{blockIdx.x} * kSmallRows;
  const int count = static_cast<int>(smaller(int64_t{kSmallRows}, p.of.bags.rows - row));
  const SharedBackward<T> s(memory, p.of.rows.width, heads);
  const Products<T, GATED> products{p.of, s};
  const unsigned real = products.load(row, count);
  const Backward<T, GATED> backward{p, products, s, row, count, depth_of(p.of.gate), real};
  for (int i = static_cast<int>(threadIdx.x); i < kSmallRows * heads; i += kThreads) {
    s.scores[i] = real >> i / heads & 1 ? p.ds[row * heads + i] : A(0);
  }
  for (int unit = 0; unit < p.of.gate.hidden; unit += slice_of(GATED)) {
    products.multiply(unit);
    backward.gate(unit);
    __syncthreads();
    backward.sum(unit);
  }
  if (p.grad_x != nullptr) backward.rows();
}

}  // namespace

template <typename T>
bool fits(const SmallForward<T>& p) {
  return SharedForward<T>::bytes(p.of.rows.width, p.of.gate.heads) <= shared_limit();
}

template <typename T>
void small_forward(const SmallForward<T>& p, cudaStream_t stream) {
  const SmallAttention<T>& of = p.of;
  const dim3 grid(static_cast<unsigned>(of.bags.slots()));
  const int64_t shared = SharedForward<T>::bytes(of.rows.width, of.gate.heads);
  if (grid.x == 0) return;
  if (of.gate.gated) launch<small_forward_kernel<T, true>>(grid, kThreads, shared, stream, p);
  else launch<small_forward_kernel<T, false>>(grid, kThreads, shared, stream, p);
  if (p.bag == nullptr || of.bags.whole()) return;
  combine(of.bags, of.gate.heads, of.rows.width, Merge::kSoftmax, p.partials, p.bag, p.lse, stream);
}

template <typename T>
int64_t shared_bytes(const SmallBackward<T>& p) {
  return SharedBackward<T>::bytes(p.of.rows.width, p.of.gate.heads, depth_of(p.of.gate));
}

template <typename T>
bool fits(const SmallBackward<T>& p) {
  return shared_bytes(p) <= shared_limit();
}

template <typename T>
void small_backward(const SmallBackward<T>& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.of.bags.rows, int64_t{kSmallRows})));
  if (grid.x == 0) return;
  if (p.of.gate.gated) launch<small_backward_kernel<T, true>>(grid, kThreads, shared_bytes(p), stream, p);
  else launch<small_backward_kernel<T, false>>(grid, kThreads, shared_bytes(p), stream, p);
}

#define MILKERNELS_INSTANTIATE(T)             \
  template bool fits(const SmallForward<T>&); \
  template void small_forward(const SmallForward<T>&, cudaStream_t);
MILKERNELS_INSTANTIATE(float)
MILKERNELS_INSTANTIATE(double)
MILKERNELS_INSTANTIATE(bfloat16)
MILKERNELS_INSTANTIATE(float16)
#undef MILKERNELS_INSTANTIATE

#define MILKERNELS_INSTANTIATE(T)              \
  template bool fits(const SmallBackward<T>&); \
  template void small_backward(const SmallBackward<T>&, cudaStream_t);
MILKERNELS_INSTANTIATE(float)
MILKERNELS_INSTANTIATE(double)
MILKERNELS_INSTANTIATE(bfloat16)
#undef MILKERNELS_INSTANTIATE

}  // namespace milkernels
