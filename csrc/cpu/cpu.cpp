#include "cpu.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <chrono>

#include "rows.h"

namespace milkernels {

using at::ScalarType;

namespace {
std::atomic<bool> emulated{false};
}

void emulate_matrix_units(bool on) { emulated = on; }

void release_workspace() { Workspace::of_thread() = Workspace(); }

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

std::vector<int64_t> checked_offsets(const std::optional<at::Tensor>& offsets, int64_t rows) {
  if (!offsets) return {0, rows};
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
