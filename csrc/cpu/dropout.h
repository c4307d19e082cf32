// Dropout factors of a tile: the mask of philox.h as numbers to multiply with.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "../philox.h"

namespace milkernels {

// factor[r * ld + j] = 0 where unit first_unit + j (first_unit a multiple of 8) of row first_row + r is dropped in any
// of the branches (two at most), else the scale to the power of their number.
template <typename A>
inline void dropout_factors(const Dropout& dropout, std::initializer_list<DropoutBranch> branches, int64_t first_row,
                            int64_t rows, int64_t first_unit, int64_t units, A* factor, int64_t ld) {
  constexpr int64_t kLanes = 16, kUnits = 64;
  alignas(64) uint32_t c[4][kLanes], words[2][kLanes][kUnits / 2];  // 16-bit lanes in unit order, low half first
  A scale = 1;
  for (size_t i = 0; i < branches.size(); ++i) scale *= static_cast<A>(dropout.scale);
  for (int64_t u = 0; u < units; u += kUnits) {
    const int64_t wide = std::min(kUnits, units - u);
    for (int64_t r = 0; r < rows; r += kLanes) {
      for (int64_t j = 0; j < wide; j += 8) {
        auto* to = words;
        for (const DropoutBranch branch : branches) {
          for (int64_t i = 0; i < kLanes; ++i) {
            const uint64_t row = first_row + r + i;
            c[0][i] = static_cast<uint32_t>(row);
            c[1][i] = static_cast<uint32_t>(row >> 32);
            c[2][i] = static_cast<uint32_t>((first_unit + u + j) / 8);
            c[3][i] = static_cast<uint32_t>(branch);
          }
          philox<kLanes>(dropout.seed, c[0], c[1], c[2], c[3]);
          for (int64_t i = 0; i < kLanes; ++i) {
            for (int word = 0; word < 4; ++word) (*to)[i][j / 2 + word] = c[word][i];
          }
          ++to;
        }
      }
      for (int64_t i = 0; i < std::min(kLanes, rows - r); ++i) {
        uint16_t lanes[2][kUnits];
        std::memcpy(lanes[0], words[0][i], sizeof(lanes[0]));
        std::memcpy(lanes[1], words[branches.size() - 1][i], sizeof(lanes[1]));
        A* const out = factor + (r + i) * ld + u;
        for (int64_t j = 0; j < wide; ++j) {
          out[j] = std::min(lanes[0][j], lanes[1][j]) >= dropout.threshold ? scale : A(0);
        }
      }
    }
  }
}

}  // namespace milkernels
