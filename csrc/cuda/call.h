// The tensors of a call as kernels take them, checked; on the device of x, whose stream and memory are used. Nothing
// here waits for the device or reads from it.
#pragma once

#include <ATen/ATen.h>

#ifndef MILKERNELS_EMULATED
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "../call.h"
#include "copy_rows.h"
#include "pool.h"

// The dispatch key of the ops: kernels that are emulated run on tensors of the CPU.
#ifdef MILKERNELS_EMULATED
#define MILKERNELS_DEVICE_KEY CPU
#else
#define MILKERNELS_DEVICE_KEY CUDA
#endif

namespace milkernels {

// f<T>() for the type of the rows, as kernels know it.
template <typename F>
decltype(auto) dispatch(ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat: return f.template operator()<float>();
    case at::kDouble: return f.template operator()<double>();
    case at::kBFloat16: return f.template operator()<bfloat16>();
    case at::kHalf: return f.template operator()<float16>();
    default: TORCH_CHECK_TYPE(false, "x must be float16, bfloat16, float32 or float64; got ", type);
  }
}

// f<A>() for the accumulation type.
template <typename F>
decltype(auto) dispatch_sums(ScalarType acc, const F& f) {
  if (acc == at::kDouble) return f.template operator()<double>();
  return f.template operator()<float>();
}

template <typename T>
T* data(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr;
}
// Null where nobody needs the tensor.
template <typename T>
T* data_if(bool need, const Tensor& t) {
  return need ? data<T>(t) : nullptr;
}

constexpr int kMostChunks = 1 << 14;   // partial results of one bag are put together by one block
constexpr int64_t kWholeRows = 16384;  // up to so many rows in all, and kWholeBag in a bag on average, a bag is one
constexpr int64_t kWholeBag = 1024;    // block's: one launch for all of them

// A slice of rows between two kernels has at least so many rows, that products fill the chip, or bytes; and no more
// than the workspace.
constexpr int64_t kSliceRows = 32768, kSliceBytes = 32 << 20;
inline int64_t workspace = 256 << 20;  // tests make it small

class Call : public CallTensors {
 public:
  // These kernels have no embedding stage (milkernels/native.py says so): an `embed` is refused.
  Call(const Tensor& x, const OptionalTensor& offsets, const OptionalTensor& mask, const EmbedArguments& embed = {})
      : CallTensors(x, offsets, mask, c10::DeviceType::MILKERNELS_DEVICE_KEY), guard_(x) {
    TORCH_CHECK_VALUE(!embed.weight, "CUDA's C++ kernels have no embedding stage; got embed");
    if (offsets) this->offsets = offsets->contiguous();
    TORCH_CHECK_VALUE(rows < (int64_t{1} << 40) && width <= (1 << 30) && bags < (1 << 30),
                      "too many rows, columns or bags: ", rows, ", ", width, ", ", bags);
    chunk_shift_ = rows <= 2048 ? 6 : 8;
    while (rows > int64_t{kMostChunks} << chunk_shift_) ++chunk_shift_;
    shift = chunk_shift_;
    if (rows <= kWholeRows && rows <= kWholeBag * bags && bags > 1) {
      while (int64_t{1} << shift < rows) ++shift;
    }
  }

  Bags ragged() const {
    return {data<void>(offsets),
            offsets.defined() && offsets.scalar_type() == at::kLong,
            static_cast<int>(bags),
            shift,
            rows,
            data<bool>(mask)};
  }
  // All rows in one bag: for what is summed over all of them.
  Bags one_bag() const { return {nullptr, true, 1, chunk_shift_, rows, data<bool>(mask)}; }
  // f(first row, rows) for slices of the rows in order, with a workspace of so many bytes for each row.
  template <typename F>
  void in_slices(int64_t bytes_per_row, const F& f) const {
    const int64_t chunk = int64_t{1} << chunk_shift_, chunks = ceil_div(rows, chunk);
    const int64_t wanted = std::max(kSliceBytes / bytes_per_row, kSliceRows);
    const int64_t most = std::max(std::min(wanted, workspace / bytes_per_row) / chunk, int64_t{1});
    const int64_t step = chunks == 0 ? 1 : ceil_div(chunks, ceil_div(chunks, most)) * chunk;
    for (int64_t first = 0; first < rows; first += step) f(first, std::min(step, rows - first));
  }
  // What an op keeps that computes nothing twice.
  Tensor nothing_kept() const { return at::empty({0}, x.options().dtype(at::kByte)); }
  int64_t slots() const { return ragged().slots(); }
  template <typename T>
  Rows<T> typed() const {
    return rows_at<T>(x);
  }
  // Rows of a tensor [., any] like x: a copy of part of it, or of another type.
  template <typename T>
  static Rows<T> rows_at(const Tensor& t) {
    const int64_t stride = t.size(0) > 1 ? t.stride(0) : t.size(1), bytes = sizeof(T);
    uint64_t all = reinterpret_cast<uint64_t>(t.data_ptr()) | static_cast<uint64_t>(stride * bytes) |
                   static_cast<uint64_t>(t.size(1) * bytes) | 16;
    int copy = 1;
    while ((all & 1) == 0) all >>= 1, copy *= 2;
    return {data<T>(t), stride, static_cast<int>(t.size(1)), copy};
  }

  // The gradients of the weight and bias of an embedding, which there is not.
  std::tuple<Tensor, Tensor> of_no_embedding(bool need_weight, bool need_bias) const {
    check_need(need_weight, false, "e_weight"), check_need(need_bias, false, "e_bias");
    return {empty({0}), empty({0})};
  }

  // Allocates the workspace for partial results: nothing where each bag lies in one chunk.
  template <typename A>
  Partials<A> partials(const Bags& bags, int64_t heads, int64_t columns) {
    const int64_t slots = bags.whole() ? 0 : bags.slots();
    workspace_.push_back(empty({slots, heads, columns + 2}));
    A* const at = data<A>(workspace_.back());
    return {at, at + slots * heads, at + 2 * slots * heads};
  }

#ifdef MILKERNELS_EMULATED
  static cudaStream_t stream() { return nullptr; }
#else
  static cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }
#endif

  int shift = 0;
  Tensor offsets;

 private:
#ifdef MILKERNELS_EMULATED
  struct Guard {
    explicit Guard(const Tensor&) {}
  } guard_;
#else
  struct Guard : c10::cuda::CUDAGuard {
    explicit Guard(const Tensor& x) : CUDAGuard(x.device()) {}
  } guard_;
#endif
  std::vector<Tensor> workspace_;
  int chunk_shift_ = 0;
};

}  // namespace milkernels
