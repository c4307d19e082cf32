// Attention's gate on products that a library has made: scores of rows, and the gradients of the products.
#include "gate.h"

#include "hidden_units.h"

namespace milkernels {
namespace {

// Threads that share a row, 8 units each at a time: a power of two, `most` at most.
int threads_across(int hidden, int most) {
  int threads = 1;
  while (threads < most && threads * kUnitsTogether < hidden) threads *= 2;
  return threads;
}

// The hidden units of row p.first + r.
template <bool GATED, bool GRADIENT, typename E>
__device__ inline HiddenUnits<acc_t<E>, GATED, GRADIENT> hidden_units(const GateRows<E>& p, int64_t r, int unit) {
  const int hidden = p.gate.hidden;
  const E* const z = p.z + r * hidden * (GATED ? 2 : 1);
  Units<acc_t<E>> v, u;
  load_columns(v, z, unit, hidden);
  if constexpr (GATED) load_columns(u, z + hidden, unit, hidden);
  return {p.gate, p.first + r, unit, v, u};
}

// K heads at a time.
template <typename E, bool GATED, int K>
__global__ void __launch_bounds__(kThreads, kBlocks) gate_scores_kernel(GateRows<E> p, acc_t<E>* scores, int across) {
  using A = acc_t<E>;
  const int hidden = p.gate.hidden, heads = p.gate.heads, lane = static_cast<int>(threadIdx.x) % across;
  const int64_t r = int64_t{blockIdx.x} * (kThreads / across) + static_cast<int>(threadIdx.x) / across;
  const bool inside = r < p.count, real = inside && (p.mask == nullptr || p.mask[p.first + r]);
  for (int k0 = 0; k0 < heads; k0 += K) {
    A sum[K] = {};
    for (int unit = lane * kUnitsTogether; unit < hidden; unit += across * kUnitsTogether) {
      const auto h = hidden_units<GATED, false>(p, smaller(r, p.count - 1), unit);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        Units<A> w;
        load_columns(w, p.gate.w + int64_t{smaller(k0 + k, heads - 1)} * hidden, unit, hidden);
#pragma unroll
        for (int i = 0; i < kUnitsTogether; ++i) sum[k] += h.at(i) * w[i];
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      for (int step = across / 2; step > 0; step /= 2) sum[k] += __shfl_xor_sync(kAllLanes, sum[k], step);
      if (lane == 0 && inside && k0 + k < heads) {
        if (p.gate.w_bias != nullptr) sum[k] += p.gate.w_bias[k0 + k];
        scores[(p.first + r) * heads + k0 + k] = real ? sum[k] : -std::numeric_limits<A>::infinity();
      }
    }
  }
}

// Sums over the threads of a column of the block, in order, to out [hidden].
template <typename A>
__device__ inline void sum_down(const Units<A>& value, A* shared, int across, int unit, int hidden, A* out) {
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();  // what was here before has been read
#pragma unroll
  for (int i = 0; i < kUnitsTogether; ++i) shared[t * kUnitsTogether + i] = value[i];
  __syncthreads();
  const int units = across * kUnitsTogether, first = unit - t % across * kUnitsTogether;
  for (int i = t; i < units && first + i < hidden; i += kThreads) {
    A sum = 0;
    for (int down = 0; down < kThreads / across; ++down) sum += shared[down * units + i];
    out[first + i] = sum;
  }
}

// Sums for w are made of K heads at a time; with the last of them the products become their gradients.
template <typename E, bool GATED, int K>
__global__ void __launch_bounds__(kThreads, sizeof(E) == 8 ? 2 : kBlocks)
    gate_backward_kernel(GateRows<E> p, const acc_t<E>* all_ds, const acc_t<E>* scale, acc_t<E>* sums, int across) {
  using A = acc_t<E>;
  MILKERNELS_SHARED(memory);
  A* const shared = reinterpret_cast<A*>(memory);
  const int hidden = p.gate.hidden, heads = p.gate.heads;
  const int unit = (static_cast<int>(blockIdx.y) * across + static_cast<int>(threadIdx.x) % across) * kUnitsTogether;
  const int64_t begin = int64_t{blockIdx.x} * kSummedRows, end = smaller(begin + kSummedRows, p.count);
  const A factor = scale == nullptr ? A(1) : *scale;
  A* const out = sums + int64_t{blockIdx.x} * (heads + 2) * hidden;
  for (int k0 = 0; k0 < heads; k0 += K) {
    Units<A> dw[K] = {}, dv_bias = {}, du_bias = {};
    for (int64_t r = begin + static_cast<int>(threadIdx.x) / across; unit < hidden && r < end; r += kThreads / across) {
      const bool real = p.mask == nullptr || p.mask[p.first + r];
      const auto h = hidden_units<GATED, true>(p, r, unit);
      const A* const ds = all_ds + (p.first + r) * heads;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const A of_head = ds[smaller(k0 + k, heads - 1)];
#pragma unroll
        for (int i = 0; i < kUnitsTogether; ++i) dw[k][i] += real ? of_head * h.at(i) : A(0);
      }
      if (k0 + K >= heads) {
        Units<A> gradient = {}, w, dz;
        for (int k = 0; k < heads; ++k) {
          load_columns(w, p.gate.w + int64_t{k} * hidden, unit, hidden);
          const A of_head = ds[k];
#pragma unroll
          for (int i = 0; i < kUnitsTogether; ++i) gradient[i] += of_head * w[i];
        }
        E* const to = p.gradient + r * hidden * (GATED ? 2 : 1);
#pragma unroll
        for (int i = 0; i < kUnitsTogether; ++i) {
          dz[i] = real ? h.of_v(i, gradient[i]) : A(0);
          dv_bias[i] += dz[i];
          dz[i] *= factor;
        }
        store_columns(to, dz, unit, hidden);
        if constexpr (GATED) {
#pragma unroll
          for (int i = 0; i < kUnitsTogether; ++i) {
            dz[i] = real ? h.of_u(i, gradient[i]) : A(0);
            du_bias[i] += dz[i];
            dz[i] *= factor;
          }
          store_columns(to + hidden, dz, unit, hidden);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k0 + k < heads) sum_down(dw[k], shared, across, unit, hidden, out + int64_t{k0 + k} * hidden);
    }
    if (k0 + K >= heads) {
      sum_down(dv_bias, shared, across, unit, hidden, out + int64_t{heads} * hidden);
      sum_down(du_bias, shared, across, unit, hidden, out + int64_t{heads + 1} * hidden);
    }
  }
}

}  // namespace

template <typename E>
void gate_scores(const GateRows<E>& p, acc_t<E>* scores, cudaStream_t stream) {
  const int across = threads_across(p.gate.hidden, kWarp);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.count, int64_t{kThreads / across})));
  const bool one = p.gate.heads == 1;
  if (p.gate.gated && one) launch<gate_scores_kernel<E, true, 1>>(grid, kThreads, 0, stream, p, scores, across);
  else if (p.gate.gated) launch<gate_scores_kernel<E, true, 4>>(grid, kThreads, 0, stream, p, scores, across);
  else if (one) launch<gate_scores_kernel<E, false, 1>>(grid, kThreads, 0, stream, p, scores, across);
  else launch<gate_scores_kernel<E, false, 4>>(grid, kThreads, 0, stream, p, scores, across);
}

template <typename E>
void gate_backward(const GateRows<E>& p, const acc_t<E>* ds, const acc_t<E>* scale, acc_t<E>* sums,
                   cudaStream_t stream) {
  const int across = threads_across(p.gate.hidden, kThreads / 8);
  const dim3 grid(static_cast<unsigned>(ceil_div(p.count, int64_t{kSummedRows})),
                  ceil_div(p.gate.hidden, across * kUnitsTogether));
  const int64_t shared = int64_t{kThreads} * kUnitsTogether * sizeof(acc_t<E>);
  const auto run = [&]<auto KERNEL>() { launch<KERNEL>(grid, kThreads, shared, stream, p, ds, scale, sums, across); };
  const bool one = p.gate.heads == 1;
  if (p.gate.gated && one) run.template operator()<gate_backward_kernel<E, true, 1>>();
  else if (p.gate.gated) run.template operator()<gate_backward_kernel<E, true, 4>>();
  else if (one) run.template operator()<gate_backward_kernel<E, false, 1>>();
  else run.template operator()<gate_backward_kernel<E, false, 4>>();
}

#define MILKERNELS_INSTANTIATE(E)                                         \
  template void gate_scores(const GateRows<E>&, acc_t<E>*, cudaStream_t); \
  template void gate_backward(const GateRows<E>&, const acc_t<E>*, const acc_t<E>*, acc_t<E>*, cudaStream_t);
MILKERNELS_INSTANTIATE(float)
MILKERNELS_INSTANTIATE(double)
MILKERNELS_INSTANTIATE(bfloat16)
MILKERNELS_INSTANTIATE(float16)
#undef MILKERNELS_INSTANTIATE

}  // namespace milkernels
