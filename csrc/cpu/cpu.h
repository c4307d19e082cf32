// What every op on the CPU needs of its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace milkernels {

// Offsets [bags + 1] as int64, or {0, rows} where absent; ValueError unless they start at 0, never decrease and end at
// `rows`.
std::vector<int64_t> checked_offsets(const std::optional<at::Tensor>& offsets, int64_t rows);

// In what the products run: 0 for the accumulation type, else the number of bfloat16 planes of each factor. Half types
// and, where the user allows it, float32 take the matrix units if the machine has them: bfloat16 one plane, float16 two
// (exact), float32 one at precision "medium", two at "high". AVX-512's instructions for bfloat16 are taken for one
// plane: three products of planes would be slower than one of float32.
int bf16_planes(at::ScalarType x, std::optional<at::ScalarType> compute);

// The rate (FLOP/s) at which the micro-kernels multiply float32 tiles that lie in cache, on all threads: what a kernel
// made of such products cannot beat.
double product_rate();

// Frees the workspace that this thread keeps, so that what a call needs can be measured.
void release_workspace();

// Tests take the layouts of the matrix units on any machine.
void emulate_matrix_units(bool on);

}  // namespace milkernels
