#include "choice_kernels.h"

#include "columns.h"
#include "tile.h"

namespace milkernels {
namespace {

// V columns side by side, in one load.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T at[V];
};

// The best so far, and where; -1: nothing yet.
template <typename A, int V>
struct Best {
  A value[V];
  int at[V];
};
template <typename A, int V>
__device__ inline Best<A, V> no_best() {
  Best<A, V> none;
#pragma unroll
  for (int i = 0; i < V; ++i) none.value[i] = -std::numeric_limits<A>::infinity(), none.at[i] = -1;
  return none;
}

// Whether a value takes the place of the best, which comes before it. No branches: most lanes would differ.
template <typename A>
__device__ inline bool wins(A value, A best, int best_at) {
  return (best_at < 0) | ((best == best) & !(value <= best));
}

template <typename A, int V>
__device__ inline void merge_best(Best<A, V>& best, const Best<A, V>& other) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    // The one of the two that comes first is asked to give way.
    const bool later = best.at[i] < 0 || (other.at[i] >= 0 && best.at[i] < other.at[i]);
    const bool other_wins =
        later ? wins(other.value[i], best.value[i], best.at[i]) : !wins(best.value[i], other.value[i], other.at[i]);
    const bool taken = other.at[i] >= 0 && other_wins;
    best.value[i] = taken ? other.value[i] : best.value[i];
    best.at[i] = taken ? other.at[i] : best.at[i];
  }
}

// What was chosen in a bag; `empty` where that is nothing.
template <typename A, typename T>
__device__ inline void store_choice(T* values, int64_t* indices, int64_t at, A value, int64_t row, A empty) {
  values[at] = narrow<T>(row < 0 ? empty : value);
  indices[at] = row;
}

// Five blocks, so that registers suffice for what is read ahead.
template <typename T, int V>
__global__ void __launch_bounds__(kReducers, 5) first_max_kernel(FirstMax<T> p, int at_once) {
  using A = acc_t<T>;
  const int64_t slot = blockIdx.x;
  const Segment segment = p.bags.segment(slot);
  const bool whole = p.bags.whole();
  if (segment.begin >= segment.end && !whole) return;
  const int width = p.rows.width;
  reduce_columns<Pack<T, V>>(
      Range{segment.begin, segment.end}, width / V, at_once, no_best<A, V>(),
      [&](Pack<T, V>& to, int64_t row, int column) {
        const bool real = p.bags.real(row);
        if (real) to = *reinterpret_cast<const Pack<T, V>*>(p.rows.x + row * p.rows.stride + int64_t{column} * V);
        return real;
      },
      [&](Best<A, V>& best, const Pack<T, V>& x, bool counts, int at) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A value = widen(x.at[i]);
          const bool eligible = counts & !(p.dead & (value == -std::numeric_limits<A>::infinity()));
          const bool chosen = eligible & wins(value, best.value[i], best.at[i]);
          best.value[i] = chosen ? value : best.value[i];
          best.at[i] = chosen ? at : best.at[i];
        }
      },
      merge_best<A, V>,
      [&](int column, const Best<A, V>& best) {
        for (int i = 0; i < V; ++i) {
          const int64_t to = slot * width + int64_t{column} * V + i;
          const int64_t row = best.at[i] < 0 ? -1 : segment.begin + best.at[i];
          if (whole) {
            store_choice(p.values, p.indices, to, best.value[i], row, p.empty);
          } else {
            p.partials.values[to] = best.value[i];
            p.partials.rows[to] = row;
          }
        }
      });
}

// The best of each bag's segments.
template <typename A, typename T>
__global__ void __launch_bounds__(kReducers)
    combine_choices(Bags bags, int columns, int at_once, Chosen<A> partials, A empty, T* values, int64_t* indices) {
  const int bag = static_cast<int>(blockIdx.x);
  const Range rows = bags.range(bag), slots = bags.slots_of(bag);
  reduce_columns<A>(
      slots, columns, at_once, no_best<A, 1>(),
      [&](A& value, int64_t slot, int column) {
        value = partials.values[slot * columns + column];
        // Offsets that are wrong have slots which nobody wrote.
        const int64_t row = partials.rows[slot * columns + column];
        return row >= rows.begin && row < rows.end;
      },
      [](Best<A, 1>& best, A value, bool counts, int at) {
        const bool chosen = counts & wins(value, best.value[0], best.at[0]);
        best.value[0] = chosen ? value : best.value[0];
        best.at[0] = chosen ? at : best.at[0];
      },
      merge_best<A, 1>,
      [&](int column, const Best<A, 1>& best) {
        const int64_t row = best.at[0] < 0 ? -1 : partials.rows[(slots.begin + best.at[0]) * columns + column];
        store_choice(values, indices, int64_t{bag} * columns + column, best.value[0], row, empty);
      });
}

constexpr int kCombinedColumns = 32;  // of a block: more have more blocks, which wait for memory together

template <typename A, typename T>
void combine_segments(const Bags& bags, int columns, const Chosen<A>& partials, A empty, T* values, int64_t* indices,
                      cudaStream_t stream) {
  const int at_once = columns_at_once(columns, kCombinedColumns);
  launch<combine_choices<A, T>>(column_grid(bags.count, columns, at_once), kReducers, reduce_bytes<Best<A, 1>>(),
                                stream, bags, columns, at_once, partials, empty, values, indices);
}

template <typename T, int V>
void launch_first_max(const FirstMax<T>& p, cudaStream_t stream) {
  const int vectors = p.rows.width / V, at_once = columns_at_once(vectors);
  launch<first_max_kernel<T, V>>(column_grid(p.bags.slots(), vectors, at_once), kReducers,
                                 reduce_bytes<Best<acc_t<T>, V>>(), stream, p, at_once);
}

// --- Logits

// A block's memory: the pipeline, products [tile, classes], and the best of each class.
template <typename T>
struct ClassCut {
  using A = acc_t<T>;
  int tile, classes;
  __host__ __device__ int64_t products(int width) const { return pipeline_bytes<T>(tile, tile_pitch<T>(width)); }
  __host__ __device__ int64_t best(int width) const {
    return products(width) + round_up(int64_t{tile} * classes * static_cast<int64_t>(sizeof(A)), int64_t{8});
  }
  int64_t bytes(int width) const { return best(width) + classes * static_cast<int64_t>(sizeof(Best<A, 1>)); }
};

constexpr int kProductBytes = 16 << 10;  // of a tile's products and what is best so far

// The first largest of each class in a tile, a warp for each class and a lane for each row.
template <typename A>
__device__ inline void choose(Best<A, 1>* best, int classes, unsigned real, const A* products, const A* bias, int at) {
  constexpr A kDead = -std::numeric_limits<A>::infinity();
  const int lane = lane_index();
  for (int c = warp_index(); c < classes; c += warp_count()) {
    A value = kDead;
    if ((real >> lane & 1) != 0) value = products[lane * classes + c] + (bias == nullptr ? A(0) : bias[c]);
    const unsigned nan = __ballot_sync(kAllLanes, value != value);
    const A top = warp_max(value);
    const unsigned largest = __ballot_sync(kAllLanes, value == top && value != kDead);
    const unsigned first = nan != 0 ? nan : largest;
    if (first != 0 && lane == __ffs(first) - 1 && wins(value, best[c].value[0], best[c].at[0])) {
      best[c].value[0] = value;
      best[c].at[0] = at + lane;
    }
    __syncwarp();  // another lane may be the next to write
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) class_max_kernel(ClassMax<T> p, ClassCut<T> cut) {
  using A = acc_t<T>;
  MILKERNELS_SHARED(memory);
  const int64_t slot = blockIdx.x;
  const Segment segment = p.bags.segment(slot);
  const bool whole = p.bags.whole();
  if (segment.begin >= segment.end && !whole) return;
  const int width = p.rows.width;
  const int first = static_cast<int>(blockIdx.y) * cut.classes, classes = smaller(cut.classes, p.classes - first);
  A* const products = reinterpret_cast<A*>(memory + cut.products(width));
  Best<A, 1>* const best = reinterpret_cast<Best<A, 1>*>(memory + cut.best(width));
  const A* const bias = p.bias == nullptr ? nullptr : p.bias + first;
  for (int c = static_cast<int>(threadIdx.x); c < classes; c += kThreads) best[c] = no_best<A, 1>();
  Pipeline<T> pipeline(reinterpret_cast<T*>(memory), p.rows, p.bags, {segment.begin, segment.end}, width, cut.tile);
  for (int t = 0; t < pipeline.count(); ++t) {
    const Tile<T> tile = pipeline.next(t);
    if (tile.real != 0) {
      tile_products(tile.x, cut.tile, width, p.weight + int64_t{first} * width, classes, static_cast<const A*>(nullptr),
                    products);
      __syncthreads();
      choose(best, classes, tile.real, products, bias, static_cast<int>(tile.row - segment.begin));
    }
    for (int i = static_cast<int>(threadIdx.x); i < tile.count * classes; i += kThreads) {
      const int r = i / classes, c = i % classes;
      A logit = -std::numeric_limits<A>::infinity();
      if ((tile.real >> r & 1) != 0) logit = products[i] + (bias == nullptr ? A(0) : bias[c]);
      p.logits[(tile.row + r) * p.classes + first + c] = logit;
    }
  }
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x); c < classes; c += kThreads) {
    const int64_t to = slot * p.classes + first + c, row = best[c].at[0] < 0 ? -1 : segment.begin + best[c].at[0];
    if (whole) {
      store_choice(p.values, p.indices, to, best[c].value[0], row, best[c].value[0]);
    } else {
      p.partials.values[to] = best[c].value[0];
      p.partials.rows[to] = row;
    }
  }
}

// --- Rows that were chosen

constexpr int kElements = 256;  // threads of a block that go through numbers one by one

// The number of this thread.
__device__ inline int64_t element() { return static_cast<int64_t>(blockIdx.x) * kElements + threadIdx.x; }
inline dim3 element_grid(int64_t count) { return dim3(static_cast<unsigned>(ceil_div(count, int64_t{kElements}))); }

__device__ inline int64_t place(const Places& places, int64_t i) {
  const int64_t row = places.indices[i];
  return row < places.rows ? row : -1;
}

template <typename T>
__global__ void put_kernel(Places places, int64_t columns, const T* values, bool add, T* out) {
  const int64_t i = element();
  const int64_t row = i < places.count ? place(places, i) : -1;
  if (row < 0) return;
  T* const to = out + row * columns + i % columns;
  *to = add ? narrow<T>(widen(*to) + widen(values[i])) : values[i];
}

template <typename T>
__global__ void gather_kernel(Places places, Rows<T> from, T* out) {
  const int64_t i = blockIdx.x, row = place(places, i);
  for (int c = static_cast<int>(threadIdx.x); c < from.width; c += kElements) {
    out[i * from.width + c] = row < 0 ? narrow<T>(0) : from.x[row * from.stride + c];
  }
}

// The first of the classes that chose a row adds for all of them.
template <typename T>
__global__ void add_rows_kernel(Places places, int classes, int width, const acc_t<T>* vectors, T* out) {
  using A = acc_t<T>;
  const int64_t i = blockIdx.x, bag = i / classes * classes, row = place(places, i);
  if (row < 0) return;
  for (int64_t before = bag; before < i; ++before) {
    if (places.indices[before] == row) return;
  }
  for (int c = static_cast<int>(threadIdx.x); c < width; c += kElements) {
    A sum = widen(out[row * width + c]);
    for (int64_t j = i; j < bag + classes; ++j) {
      if (places.indices[j] == row) sum += vectors[j * width + c];
    }
    out[row * width + c] = narrow<T>(sum);
  }
}

}  // namespace

// --- Launches

template <typename T>
void first_max(const FirstMax<T>& p, cudaStream_t stream) {
  if (p.bags.count == 0) return;
  if (p.rows.copy == kVectorBytes) launch_first_max<T, Vec<T>::kSize>(p, stream);
  else launch_first_max<T, 1>(p, stream);
  if (!p.bags.whole()) combine_segments(p.bags, p.rows.width, p.partials, p.empty, p.values, p.indices, stream);
}

template <typename T>
bool class_max(const ClassMax<T>& p, cudaStream_t stream) {
  using A = acc_t<T>;
  ClassCut<T> cut;
  cut.tile = tile_rows<T>(p.rows.width);
  const int of_class = cut.tile * static_cast<int>(sizeof(A)) + static_cast<int>(sizeof(Best<A, 1>));
  cut.classes = columns_at_once(p.classes, kProductBytes / of_class);
  const dim3 grid(static_cast<unsigned>(p.bags.slots()), ceil_div(p.classes, cut.classes));
  if (cut.bytes(p.rows.width) > shared_limit() || grid.y > 65535) return false;
  if (p.bags.count == 0) return true;
  launch<class_max_kernel<T>>(grid, kThreads, cut.bytes(p.rows.width), stream, p, cut);
  if (!p.bags.whole()) {
    combine_segments(p.bags, p.classes, p.partials, -std::numeric_limits<A>::infinity(), p.values, p.indices, stream);
  }
  return true;
}

template <typename T>
void put(const Places& places, int64_t columns, const T* values, bool add, T* out, cudaStream_t stream) {
  if (places.count == 0) return;
  launch<put_kernel<T>>(element_grid(places.count), kElements, 0, stream, places, columns, values, add, out);
}

template <typename T>
void gather_rows(const Places& places, const Rows<T>& from, T* out, cudaStream_t stream) {
  if (places.count == 0) return;
  launch<gather_kernel<T>>(dim3(static_cast<unsigned>(places.count)), kElements, 0, stream, places, from, out);
}

template <typename T>
void add_rows(const Places& places, int classes, int width, const acc_t<T>* vectors, T* out, cudaStream_t stream) {
  if (places.count == 0) return;
  launch<add_rows_kernel<T>>(dim3(static_cast<unsigned>(places.count)), kElements, 0, stream, places, classes, width,
                             vectors, out);
}

#define MILKERNELS_CHOICE(T)                                                   \
  template void first_max(const FirstMax<T>&, cudaStream_t);                   \
  template bool class_max(const ClassMax<T>&, cudaStream_t);                   \
  template void put(const Places&, int64_t, const T*, bool, T*, cudaStream_t); \
  template void gather_rows(const Places&, const Rows<T>&, T*, cudaStream_t);  \
  template void add_rows(const Places&, int, int, const acc_t<T>*, T*, cudaStream_t);
MILKERNELS_CHOICE(float)
MILKERNELS_CHOICE(double)
MILKERNELS_CHOICE(bfloat16)
MILKERNELS_CHOICE(float16)
#undef MILKERNELS_CHOICE

}  // namespace milkernels
