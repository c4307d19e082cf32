#include "cpu.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <atomic>
#include <chrono>
#include <mutex>

#include "kept.h"
#include "matmul.h"

namespace milkernels {

using at::ScalarType;

namespace {
std::atomic<bool> emulated{false};
}

void emulate_matrix_units(bool on) { emulated = on; }

namespace {

// Memory in which calls keep something until their backward, reused from one to the next: fresh pages cost as much as
// what they spare, about a microsecond for 1 KB. All threads share it, for another one may run the backward. What is
// free is the system's to take, if it runs short of memory.
class KeptMemory {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static KeptMemory& instance() {
    static auto* const memory = new KeptMemory();  // never destroyed: tensors may outlive the module
    return *memory;
  }

  // The smallest of the free blocks that is large enough, but not far too large; or a new one.
  Block take(size_t bytes) {
    // Not waited for: in the child of a fork, nobody may be there to unlock it.
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock()) {
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        const bool fits = it->bytes >= bytes && it->bytes / 4 <= bytes;
        if (fits && (best == free_.end() || it->bytes < best->bytes)) best = it;
      }
      if (best != free_.end()) {
        const Block block = *best;
        free_.erase(best);
        return block;
      }
    }
    return allocate(bytes);
  }

  // Blocks that have waited longest make room.
  void give_back(Block block) {
    std::vector<Block> gone;
    if (const std::unique_lock lock(mutex_, std::try_to_lock); !lock.owns_lock() || block.bytes > kMost) {
      gone.push_back(block);
    } else {
      advise_free(block);
      size_t total = block.bytes;
      for (const Block& b : free_) total += b.bytes;
      while (total > kMost || free_.size() == kBlocks) {
        total -= free_.front().bytes;
        gone.push_back(free_.front());
        free_.erase(free_.begin());
      }
      free_.push_back(block);
    }
    for (const Block& b : gone) release(b);
  }

  void release_all() {
    std::vector<Block> gone;
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock()) gone.swap(free_);
    for (const Block& b : gone) release(b);
  }

 private:
  static constexpr size_t kMost = size_t{128} << 20, kBlocks = 16, kHuge = size_t{2} << 20;

#if defined(__linux__)
  static Block allocate(size_t bytes) {
    const bool huge = bytes >= kHuge;  // then it begins at a multiple of a large page
    const size_t page = huge ? kHuge : 4096, whole = (bytes + page - 1) / page * page, mapped = whole + huge * kHuge;
    void* const begin = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, begin != MAP_FAILED, "milkernels: no memory for ", whole, " saved bytes");
    if (!huge) return {begin, whole};
    const auto from = reinterpret_cast<uintptr_t>(begin), data = (from + kHuge - 1) / kHuge * kHuge;
    if (data > from) munmap(begin, data - from);
    if (const size_t after = from + mapped - (data + whole)) munmap(reinterpret_cast<void*>(data + whole), after);
    (void)madvise(reinterpret_cast<void*>(data), whole, MADV_HUGEPAGE);
    return {reinterpret_cast<void*>(data), whole};
  }
  static void release(const Block& block) { munmap(block.data, block.bytes); }
  static void advise_free(const Block& block) {
#if defined(MADV_FREE)
    if (block.bytes >= kHuge) (void)madvise(block.data, block.bytes, MADV_FREE);
#endif
  }
#else
  static Block allocate(size_t bytes) { return {c10::alloc_cpu(bytes), bytes}; }
  static void release(const Block& block) { c10::free_cpu(block.data); }
  static void advise_free(const Block&) {}
#endif

  std::mutex mutex_;
  std::vector<Block> free_;  // the one that was given back last comes last
};

}  // namespace

at::Tensor kept_bytes(int64_t bytes) {
  const auto options = at::TensorOptions().dtype(at::kByte);
  if (bytes == 0) return at::empty({0}, options);
  const auto block = KeptMemory::instance().take(bytes);
  // PyTorch's memory profiler sees what is held, as it sees its own allocations.
  const auto report = [bytes, data = block.data](int64_t sign) {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(data, sign * bytes, 0, 0, c10::Device(c10::kCPU));
  };
  report(1);
  // As at::empty does: not all of it is written to, rows are kept in whole tiles.
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    std::memset(block.data, 0xff, bytes);
  }
  return at::from_blob(
      block.data, {bytes},
      [block, report](void*) {
        report(-1);
        KeptMemory::instance().give_back(block);
      },
      options);
}

void release_workspace() {
  Workspace::of_thread() = Workspace();
  KeptMemory::instance().release_all();
}

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
  const bool one = emulated || has_bf16_products(), three = emulated || has_matrix_units();  // products of planes
  if (x == at::kDouble) return 0;
  const ScalarType type = compute.value_or(x);
  if (type == at::kBFloat16) return one ? 1 : 0;
  if (type == at::kHalf) return three ? 2 : 0;
  switch (at::globalContext().float32MatmulPrecision()) {
    case at::Float32MatmulPrecision::MEDIUM: return one ? 1 : 0;
    case at::Float32MatmulPrecision::HIGH: return three ? 2 : 0;
    default: return 0;
  }
}

}  // namespace milkernels
