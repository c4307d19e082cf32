// Pooling by plain sums and maxima, on the CPU: weighted_pool, mean_pool, max_pool.
#include <torch/library.h>

#include <tuple>

#include "call.h"
#include "query_score.h"

namespace milkernels {
namespace {

// --- weighted_pool, mean_pool

// Sums of the real rows of each bag, times weights [rows, heads], or 1: bag [bags, heads, width].
template <typename T>
void sum_rows(const Ragged<T>& in, int64_t heads, const acc_t<T>* weights, acc_t<T>* bag) {
  using A = acc_t<T>;
  using Worker = typename Partials<A>::Worker;
  Partials<A> partials(in.slots(), heads, in.width);
  for_tiles(
      in, [&] { return Worker(heads, true); },
      [&](const Tile<T>& tile, Worker& w) {
        in.for_bags(tile.first, tile.first + tile.rows, [&](int64_t b, int64_t from, int64_t to) {
          const Tile<T> rows = tile.part(from - tile.first, to - from);
          w.selected.select(rows.mask, rows.rows);
          for (int64_t i = 0; i < w.selected.count; ++i) {
            for (int64_t k = 0; k < heads; ++k) {
              w.weight[i * heads + k] = weights ? weights[(from + w.selected.index[i]) * heads + k] : A(1);
            }
          }
          partials.add(in.slot_of(from, b), rows.x, rows.ld, w.selected.index, w.selected.count, w.weight.data(), w);
        });
      });
  partials.merge_bags(in, false, bag, nullptr);
}

// grad_x of those sums from grad_bag [bags, heads, width].
template <typename T>
void spread_rows(const Ragged<T>& in, int64_t heads, const acc_t<T>* weights, const acc_t<T>* grad_bag, T* grad_x) {
  using A = acc_t<T>;
  advise_huge_pages(grad_x, in.rows * in.width * int64_t(sizeof(T)));
  const std::vector<A> ones(weights ? 0 : kBlock, A(1));
  const bool finite =
      std::all_of(grad_bag, grad_bag + in.bags() * heads * in.width, [](A v) { return std::isfinite(v); });
  for_tiles(
      in, [&] { return std::vector<int64_t>(kBlock); },
      [&](const Tile<T>& tile, std::vector<int64_t>& bag_of) {
        InputGradient<T> out;
        out.to = grad_x + tile.first * in.width;
        out.width = in.width, out.heads = heads, out.mask = tile.mask, out.grad_bag = grad_bag,
        out.bag_of = bag_of.data();
        out.weight = weights ? weights + tile.first * heads : ones.data();
        out.finite = finite;
        in.for_bags(tile.first, tile.first + tile.rows, [&](int64_t b, int64_t from, int64_t to) {
          std::fill(bag_of.begin() + (from - tile.first), bag_of.begin() + (to - tile.first), b);
          out.store_rows(from - tile.first, to - from, nullptr, nullptr, 0);
        });
      });
}

Tensor checked_weights(const Call& call, const Tensor& weights) {
  return call.take(weights, "weights", {call.rows, columns_of(weights, "weights", call.rows)});
}

Tensor weighted_pool_fwd(const Tensor& x, const Tensor& weights, const OptionalTensor& offsets,
                         const OptionalTensor& mask) {
  const Call call(x, offsets, mask);
  const Tensor w = checked_weights(call, weights);
  Tensor bag = call.empty({call.bags, w.size(1), call.width});
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    sum_rows(call.ragged<T>(), w.size(1), w.const_data_ptr<acc_t<T>>(), bag.mutable_data_ptr<acc_t<T>>());
  });
  return bag;
}

std::tuple<Tensor, Tensor> weighted_pool_bwd(const Tensor& x, const Tensor& weights, const OptionalTensor& offsets,
                                             const OptionalTensor& mask, const Tensor& grad_bag,
                                             std::array<bool, 2> needs) {
  const Call call(x, offsets, mask);
  const Tensor w = checked_weights(call, weights);
  const int64_t heads = w.size(1);
  const Tensor g = call.take(grad_bag, "grad_bag", {call.bags, heads, call.width});
  Tensor grad_x = call.grad_x(needs[0]), grad_weights = call.gradient(needs[1], w.sizes());
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const auto in = call.ragged<T>();
    if (needs[0]) spread_rows(in, heads, w.const_data_ptr<A>(), g.const_data_ptr<A>(), grad_x.mutable_data_ptr<T>());
    if (!needs[1]) return;
    const QueryProducts<T> products(in, {g.const_data_ptr<A>(), heads, heads * in.width, nullptr, 0}, in.width);
    A* const out = grad_weights.mutable_data_ptr<A>();
    for_tiles(
        in, [] { return 0; },
        [&](const Tile<T>& tile, int) {
          products.scores(tile, tile.x, tile.ld, out + tile.first * heads, /*streamed=*/true);
          for (int64_t r = 0; r < tile.rows; ++r) {
            if (!is_real(tile.mask, r)) std::fill_n(out + (tile.first + r) * heads, heads, A(0));
          }
        });
  });
  if (needs[1]) grad_weights = grad_weights.to(weights.scalar_type());
  return {grad_x, grad_weights};
}

// How many real rows each bag has, at least 1.
template <typename T>
std::vector<double> counts(const Ragged<T>& in) {
  std::vector<double> count(in.bags());
  for (int64_t b = 0; b < in.bags(); ++b) {
    const int64_t from = in.offsets[b], to = in.offsets[b + 1];
    const int64_t real = in.mask ? std::count(in.mask + from, in.mask + to, true) : to - from;
    count[b] = std::max<double>(static_cast<double>(real), 1.);
  }
  return count;
}

Tensor mean_pool_fwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask) {
  const Call call(x, offsets, mask);
  Tensor bag = call.empty({call.bags, call.width});
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const auto in = call.ragged<T>();
    A* const out = bag.mutable_data_ptr<A>();
    sum_rows<T>(in, 1, nullptr, out);
    const auto count = counts(in);
    for (int64_t i = 0; i < in.bags() * in.width; ++i) out[i] = static_cast<A>(out[i] / count[i / in.width]);
  });
  return bag;
}

Tensor mean_pool_bwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask, const Tensor& grad_bag,
                     std::array<bool, 1> needs) {
  const Call call(x, offsets, mask);
  Tensor grad_x = call.grad_x(needs[0]), g = call.take(grad_bag, "grad_bag", {call.bags, call.width});
  if (!needs[0]) return grad_x;
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    using A = acc_t<T>;
    const auto in = call.ragged<T>();
    const auto count = counts(in);
    const A* const from = g.const_data_ptr<A>();
    std::vector<A> shares(in.bags() * in.width);
    for (size_t i = 0; i < shares.size(); ++i) shares[i] = static_cast<A>(from[i] / count[i / in.width]);
    spread_rows<T>(in, 1, nullptr, shares.data(), grad_x.mutable_data_ptr<T>());
  });
  return grad_x;
}

// --- max_pool

// The maximum of each feature over a segment, and its row: the first of equal ones, NaN before any number. Rows are
// taken some at a time, and the next are asked for. Which of these had a maximum is remembered, and which row of them
// it was is looked up in the end: in a segment of 256 rows and 32 columns a new maximum is nothing rare.
template <typename T>
class FeatureMax {
 public:
  using A = acc_t<T>;
  using V = Vectorized<A>;

  explicit FeatureMax(const Ragged<T>& in)
      : in_(in), rows_(in.slots(), -1), values_(in.slots() * in.width), places_(in.slots() * in.width) {}

  using Worker = Selection<A>;

  // Rows of a segment come in order; places are counted from the first row of its chunk, exact in every type.
  void add(const Tile<T>& rows, int64_t slot, Worker& selected) {
    selected.select(rows.mask, rows.rows);
    const int64_t width = in_.width, chunk = rows.first / in_.chunk() * in_.chunk();
    A *const best = values_.get() + slot * width, *const place = places_.get() + slot * width;
    for_blocks<kTogether>(selected.count, [&](int64_t i, auto some) {
      const int32_t* const index = selected.index + i;
      const A here = static_cast<A>(rows.first + index[0] - chunk);
      if (std::exchange(rows_[slot], chunk) < 0)
        offer<decltype(some)::value, true>(rows.x, rows.ld, index, here, best, place);
      else offer<decltype(some)::value, false>(rows.x, rows.ld, index, here, best, place);
    });
  }
  // values and indices [bags, width]; an empty bag has 0 and -1.
  void finish(T* values, int64_t* indices) const {
    const int64_t width = in_.width, blocks = ceil_div(width, kColumns);
    at::parallel_for(0, in_.bags() * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * kColumns;
        finish(i / blocks, first, std::min(first + kColumns, width), values, indices);
      }
    });
  }

 private:
  static constexpr int64_t kTogether = 8, kColumns = 64;

  // The maxima of R rows, of which the first is `here`, where they are larger; FIRST: whatever they are.
  template <int R, bool FIRST>
  [[gnu::noinline]] void offer(const T* x, int64_t ld, const int32_t* index, A here, A* best, A* place) const {
    const T* row[R];
    unroll<R>([&](auto i) { row[i] = x + index[i] * ld; });
    for_steps<Pair<T>::width>(in_.width, [&](int64_t l, auto step) MILKERNELS_INLINE {
      unroll<R>([&](auto i) { prefetch_pair(row[i] + kTogether * ld + l); });
      auto v = load_pair(row[0] + l, step);
      unroll<R>([&](auto i) {
        if constexpr (i == 0) return;
        const auto other = load_pair(row[i] + l, step);
        v = {at::vec::maximum(v.lo, other.lo), at::vec::maximum(v.hi, other.hi)};
      });
      if constexpr (FIRST) {
        store_pair(Pair<A>{v.lo, v.hi}, best + l, step);
        store_pair(Pair<A>{V(here), V(here)}, place + l, step);
      } else {
        const auto old = load_pair(best + l, step), where = load_pair(place + l, step);
        const auto wins = [](const V& a, const V& b) { return (a > b) | ((a != a) & (b == b)); };
        const V lo = wins(v.lo, old.lo), hi = wins(v.hi, old.hi);
        store_pair(Pair<A>{V::blendv(old.lo, v.lo, lo), V::blendv(old.hi, v.hi, hi)}, best + l, step);
        store_pair(Pair<A>{V::blendv(where.lo, V(here), lo), V::blendv(where.hi, V(here), hi)}, place + l, step);
      }
    });
  }
  // Of a bag and at most kColumns columns: where the maxima are, asked for all at once, and then which rows have them.
  void finish(int64_t b, int64_t first, int64_t last, T* values, int64_t* indices) const {
    const int64_t from = in_.offsets[b], to = in_.offsets[b + 1];
    values += b * in_.width, indices += b * in_.width;
    A maxima[kColumns];
    for (int64_t l = first; l < last; ++l) {
      A& best = maxima[l - first] = A(0);
      int64_t& row = indices[l];
      row = -1;
      for (int64_t slot = in_.slot_of(from, b); from < to && slot <= in_.slot_of(to - 1, b); ++slot) {
        if (rows_[slot] < 0) continue;
        const A value = values_.get()[slot * in_.width + l];
        if (row >= 0 && !(value > best) && !(std::isnan(value) && !std::isnan(best))) continue;
        best = value;
        row = rows_[slot] + static_cast<int64_t>(places_.get()[slot * in_.width + l]);
      }
      for (int64_t r = row; row >= 0 && r < std::min(row + kTogether, to); ++r) {
        __builtin_prefetch(in_.x + r * in_.ld + l);
      }
    }
    for (int64_t l = first; l < last; ++l) {
      const A best = maxima[l - first];
      int64_t& row = indices[l];
      values[l] = T(0);
      if (row < 0) continue;
      const auto has_it = [&] {
        const A value = static_cast<A>(in_.x[row * in_.ld + l]);
        return is_real(in_.mask, row) && (value == best || (std::isnan(value) && std::isnan(best)));
      };
      while (!has_it()) ++row;
      values[l] = in_.x[row * in_.ld + l];
    }
  }

  const Ragged<T>& in_;
  std::vector<int64_t> rows_;   // the first row of a slot's chunk, -1 where nothing was seen
  Buffer<A> values_, places_;  // places: the first of the rows among which the maximum is
};

std::tuple<Tensor, Tensor> max_pool_fwd(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask) {
  const Call call(x, offsets, mask);
  Tensor values = at::empty({call.bags, call.width}, x.options()),
         indices = at::empty({call.bags, call.width}, x.options().dtype(at::kLong));
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    const auto in = call.ragged<T>();
    FeatureMax<T> best(in);
    for_tiles(
        in, [] { return typename FeatureMax<T>::Worker(); },
        [&](const Tile<T>& tile, auto& worker) {
          in.for_bags(tile.first, tile.first + tile.rows, [&](int64_t b, int64_t from, int64_t to) {
            best.add(tile.part(from - tile.first, to - from), in.slot_of(from, b), worker);
          });
        });
    best.finish(values.mutable_data_ptr<T>(), indices.mutable_data_ptr<int64_t>());
  });
  return {values, indices};
}

Tensor max_pool_bwd(const Tensor& x, const Tensor& indices, const Tensor& grad_values, std::array<bool, 1> needs) {
  const Call call(x, std::nullopt, std::nullopt);
  TORCH_CHECK_VALUE(grad_values.is_cpu() && grad_values.dim() == 2 && grad_values.size(1) == call.width &&
                        grad_values.scalar_type() == x.scalar_type(),
                    "grad_values must be [bags, ", call.width, "] in the type of x; got ", grad_values.sizes());
  const Tensor rows = call.take_indices(indices, "indices", grad_values.sizes()), g = grad_values.contiguous();
  Tensor grad_x = call.grad_x(needs[0]);
  if (!needs[0]) return grad_x;
  dispatch_storage(x.scalar_type(), [&]<typename T>() {
    T* const out = grad_x.mutable_data_ptr<T>();
    zero_rows(out, call.rows * call.width);
    const int64_t* const row = rows.const_data_ptr<int64_t>();
    const T* const from = g.const_data_ptr<T>();
    for (int64_t i = 0; i < g.numel(); ++i) {
      if (row[i] >= 0) out[row[i] * call.width + i % call.width] = from[i];  // a row is in one bag
    }
  });
  return grad_x;
}

TORCH_LIBRARY_IMPL(milkernels, CPU, m) {
  m.impl("weighted_pool_fwd.native", weighted_pool_fwd);
  m.impl("weighted_pool_bwd.native", weighted_pool_bwd);
  m.impl("mean_pool_fwd.native", mean_pool_fwd);
  m.impl("mean_pool_bwd.native", mean_pool_bwd);
  m.impl("max_pool_fwd.native", max_pool_fwd);
  m.impl("max_pool_bwd.native", max_pool_bwd);
}

}  // namespace
}  // namespace milkernels
