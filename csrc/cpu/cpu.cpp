#include "cpu.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <chrono>

namespace milkernels {

using at::ScalarType;

namespace {
std::atomic<bool> emulated{false};
}

void emulate_matrix_units(bool on) { emulated = on; }

double product_rate() {
  constexpr int64_t kRows = 64, kDepth = 512, kColumns = 64, kRepeats = 200;
  const int64_t threads = at::get_num_threads();
  const std::vector<float> a(kRows * kDepth, 1.f), b(kDepth * kColumns, 1.f);
  const auto start = std::chrono::steady_clock::now();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> c(kRows * kColumns);
    for (int64_t i = 0; i < (end - begin) * kRepeats; ++i) {
      at::native::cpublas::brgemm(kRows, kColumns, kDepth, kDepth, kColumns, kColumns, false, a.data(), b.data(),
                                  c.data(),
                                  /*is_vnni=*/false);
    }
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 2. * kRows * kDepth * kColumns * kRepeats * threads / seconds.count();
}

at::Tensor rows_of(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_cpu(), "x must be [N, L] on the CPU; got ", x.sizes(), " on ", x.device());
  const bool consecutive = x.size(1) == 1 || x.stride(1) == 1;
  return consecutive && (x.size(0) <= 1 || x.stride(0) >= x.size(1)) ? x : x.contiguous();
}

std::vector<int64_t> checked_offsets(const std::optional<at::Tensor>& offsets, int64_t rows) {
  if (!offsets) return {0, rows};
  TORCH_CHECK_TYPE(offsets->scalar_type() == at::kInt || offsets->scalar_type() == at::kLong,
                   "offsets must be int32 or int64; got ", offsets->scalar_type());
  TORCH_CHECK_VALUE(offsets->is_cpu() && offsets->dim() == 1 && offsets->size(0) >= 1,
                    "offsets must be [bags + 1] on the CPU; got ", offsets->sizes(), " on ", offsets->device());
  const at::Tensor wide = offsets->to(at::kLong).contiguous();
  const int64_t* const p = wide.const_data_ptr<int64_t>();
  std::vector<int64_t> out(p, p + wide.numel());
  TORCH_CHECK_VALUE(out.front() == 0, "offsets must start at 0; got ", out.front());
  for (size_t i = 1; i < out.size(); ++i) {
    TORCH_CHECK_VALUE(out[i] >= out[i - 1], "offsets must not decrease; got ", out[i - 1], " then ", out[i], " at ", i);
  }
  TORCH_CHECK_VALUE(out.back() == rows, "offsets must end at the number of rows, ", rows, "; got ", out.back());
  return out;
}

Dropout checked_dropout(const std::optional<at::Tensor>& seed, double p) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "the share to drop must be in [0, 1]; got ", p);
  if (p == 0) return {};
  TORCH_CHECK_VALUE(seed && seed->scalar_type() == at::kLong && seed->numel() == 1 && seed->is_cpu(),
                    "dropout needs a seed: one int64 on the CPU");
  return {static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), p};
}

int bf16_planes(ScalarType x, std::optional<ScalarType> compute) {
  const bool available = emulated || at::native::cpublas::could_pack(at::kBFloat16);
  if (!available || x == at::kDouble) return 0;
  const ScalarType type = compute.value_or(x);
  if (type == at::kBFloat16) return 1;
  if (type == at::kHalf) return 2;
  switch (at::globalContext().float32MatmulPrecision()) {
    case at::Float32MatmulPrecision::MEDIUM: return 1;
    case at::Float32MatmulPrecision::HIGH: return 2;
    default: return 0;
  }
}

}  // namespace milkernels
