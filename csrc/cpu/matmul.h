// Products of small matrices through PyTorch's own micro-kernels: which element type they run in, how the operands are
// laid out for it, and the call. Three kinds of element:
//   float     brgemm in float32, PyTorch's micro-kernels of oneDNN; half types are converted tile by tile
//   double    for float64, the vectors of this page
//   BFloat16  brgemm on the matrix units (AMX), or with AVX-512's instructions for bfloat16, which multiply twice as
//             many numbers as those for float32. A number is the sum of `planes` bfloat16 numbers: one plane is
//             bfloat16 itself, two hold a float16 exactly, and hi*hi + hi*lo + lo*hi is then the float16 product.
#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include "rows.h"

namespace milkernels {

constexpr int64_t kBlock = 64;  // columns of a packed block, and rows of a tile
constexpr int64_t kDeepest = 2048;  // terms of a float32 sum that are added one behind another
constexpr int64_t kDeepestOfFew = 64;  // where a library would add in the lanes of a vector, for the columns are few
constexpr int64_t kRowMultiple = 8;  // rows of a product: few distinct shapes, each costs about 0.1 ms when first met

// A matrix by rows; plane p of a split number is plane_stride further on. For the right operand of a BFloat16 product
// rows come in pairs: element (k, n) is at (k / 2) * 2 * ld + 2 * n + k % 2.
template <typename E>
struct Matrix {
  const E* data;
  int64_t ld;
  int64_t plane_stride = 0;

  static constexpr int64_t kRowsTogether = std::is_same_v<E, BFloat16> ? 2 : 1;  // in a right operand

  Matrix rows_from(int64_t r) const { return {data + r * ld, ld, plane_stride}; }  // left operand
  Matrix columns_from(int64_t c) const { return {data + c * kRowsTogether, ld, plane_stride}; }  // right operand
};

inline bool has_matrix_units() {
  static const bool value = at::native::cpublas::could_pack(at::kBFloat16);
  return value;
}

// Whether PyTorch has micro-kernels of AVX-512's instructions for bfloat16 here: oneDNN may be told to use less.
inline bool has_bf16_instructions() {
#if defined(__x86_64__) && AT_MKLDNN_ENABLED()
  static const bool value = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    const std::vector<BFloat16> a(16 * 64, BFloat16(0)), b(64 * 64, BFloat16(0));
    std::vector<float> c(16 * 64);
    try {
      at::native::cpublas::brgemm(16, 64, 64, 64, 64, 64, false, a.data(), b.data(), c.data(), /*is_vnni=*/true);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return value && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

// Whether bfloat16 is multiplied faster than float32.
inline bool has_bf16_products() { return has_matrix_units() || has_bf16_instructions(); }

// On other machines a BFloat16 product is reached by tests only: the layouts are then provable on any.
inline void bf16_product(int64_t M, int64_t N, int64_t K, Matrix<BFloat16> a, Matrix<BFloat16> b, float* c, int64_t ldc,
                         bool add) {
  if (has_bf16_products()) {
    at::native::cpublas::brgemm(M, N, K, a.ld, b.ld, ldc, add, a.data, b.data, c, /*is_vnni=*/true);
    return;
  }
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      float sum = add ? c[m * ldc + n] : 0.f;
      for (int64_t k = 0; k < K; ++k) {
        sum += float(a.data[m * a.ld + k]) * float(b.data[k / 2 * 2 * b.ld + 2 * n + k % 2]);
      }
      c[m * ldc + n] = sum;
    }
  }
}

// Whether float products have micro-kernels. Without them brgemm is a library's gemm, whose bits depend on the threads.
inline bool has_micro_kernels() {
#if defined(__x86_64__) && AT_MKLDNN_ENABLED()
  static const bool avx2 = __builtin_cpu_supports("avx2");
  return avx2 && at::globalContext().userEnabledMkldnn();
#elif defined(__x86_64__)
  return false;
#else
  return true;
#endif
}

// c = a b, or c += a b, in vectors: every sum is formed in the order of its terms.
template <typename A>
inline void vector_product(int64_t M, int64_t N, int64_t K, Matrix<A> a, Matrix<A> b, A* c, int64_t ldc, bool add) {
  using V = Vectorized<A>;
  for_blocks<4>(M, [&](int64_t m, auto rows) {
    constexpr int R = decltype(rows)::value;
    for_steps<Pair<A>::width>(N, [&](int64_t n, auto step) {
      Pair<A> sum[R];
      unroll<R>([&](auto r) { sum[r] = {V(A(0)), V(A(0))}; });
      for (int64_t k = 0; k < K; ++k) {
        const auto v = load_pair(b.data + k * b.ld + n, step);
        unroll<R>([&](auto r) {
          const V w(a.data[(m + r) * a.ld + k]);
          sum[r] = {fmadd(w, v.lo, sum[r].lo), fmadd(w, v.hi, sum[r].hi)};
        });
      }
      unroll<R>([&](auto r) {
        A* const to = c + (m + r) * ldc + n;
        if (add) {
          const auto before = load_pair(to, step);
          sum[r] = {sum[r].lo + before.lo, sum[r].hi + before.hi};
        }
        store_pair(sum[r], to, step);
      });
    });
  });
}

// c = a b, or c += a b; c is [M, N] in the accumulation type. At most `deepest` float32 terms are added one behind
// another.
template <typename E>
inline void product(int64_t M, int64_t N, int64_t K, Matrix<E> a, Matrix<E> b, int planes, acc_t<E>* c, int64_t ldc,
                    bool add, int64_t deepest = kDeepest) {
  if constexpr (std::is_same_v<E, double>) {
    vector_product<double>(M, N, K, a, b, c, ldc, add);
  } else if constexpr (std::is_same_v<E, float>) {
    const bool library = has_micro_kernels();
    int64_t k = 0;
    do {  // one part after another, for the rounding of a sum grows with its number of terms
      const int64_t terms = std::min(deepest, K - k);
      const Matrix<float> left{a.data + k, a.ld}, right{b.data + k * b.ld, b.ld};
      if (library) {
        at::native::cpublas::brgemm(M, N, terms, left.ld, right.ld, ldc, add, left.data, right.data, c,
                                    /*is_vnni=*/false);
      } else {
        vector_product<float>(M, N, terms, left, right, c, ldc, add);
      }
      add = true;
    } while ((k += deepest) < K);
  } else {
    for (int order = planes - 1; order >= 0; --order) {  // small terms first
      for (int p = 0; p <= order; ++p, add = true) {
        bf16_product(M, N, K, {a.data + p * a.plane_stride, a.ld}, {b.data + (order - p) * b.plane_stride, b.ld}, c,
                     ldc, add);
      }
    }
  }
}

// Gives the matrix units back; each thread does so when it leaves a parallel region, also by an exception.
struct MatrixUnits {
  MatrixUnits() = default;
  MatrixUnits(MatrixUnits&& other) noexcept : used(std::exchange(other.used, false)) {}
  ~MatrixUnits() {
    if (used && has_matrix_units()) at::native::cpublas::brgemm_release();
  }
  bool used = true;
};

// Writes n numbers as E: converted, or split into planes.
template <typename S, typename E>
inline void write_elements(const S* x, E* y, int64_t n, int planes, int64_t plane_stride) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    for_steps<Pair<S>::width>(n, [&](int64_t i, auto step) {
      auto rest = load_pair(x + i, step);
      for (int p = 0; p < planes; ++p) {
        E* const to = y + p * plane_stride + i;
        store_pair(Pair<E>{rest.lo, rest.hi}, to, step);
        const auto part = load_pair(to, step);
        rest.lo = rest.lo - part.lo;
        rest.hi = rest.hi - part.hi;
      }
    });
    return;
  }
  convert_row(x, y, n);
}

// to[c][r] = from[r][c]; not inline, where the compiler would warn of tiles that known sizes do not have.
template <typename E>
C10_NOINLINE void transpose(const E* from, int64_t ld_from, int64_t rows, int64_t columns, E* to, int64_t ld_to) {
  constexpr int64_t kTile = 16;
  for (int64_t c = 0; c < columns; c += kTile) {
    for (int64_t r = 0; r < rows; r += kTile) {
      const E* const source = from + r * ld_from + c;
      E* const target = to + c * ld_to + r;
      const int64_t height = std::min(kTile, rows - r), width = std::min(kTile, columns - c);
      if (height == kTile && width == kTile) {
        at::vec::transpose_mxn<E, kTile, kTile>(source, ld_from, target, ld_to);
      } else {
        at::vec::transpose_mxn<E>(source, ld_from, target, ld_to, height, width);
      }
    }
  }
}

// The right operand of a product, in column blocks of kBlock; columns past N and an odd last row are zeros.
template <typename E>
class Packed {
 public:
  using A = acc_t<E>;

  Packed(int64_t rows, int64_t columns, int planes)
      : columns_(columns), depth_(depth_of(rows)), plane_stride_(round_up(columns, kBlock) * depth_),
        buffer_(planes * plane_stride_) {}

  // Element (k, n) is column(n)[k]; a null column is zeros.
  template <typename Column>
  static Packed from_columns(int64_t rows, int64_t columns, int planes, const Column& column) {
    constexpr int64_t kPiece = kPair == 1 ? 16 : 64;  // of a column at a time, so that it stays in the nearest cache
    Packed packed(rows, columns, planes);
    packed.for_blocks([&](int64_t n, E* block) {
      if constexpr (kPair == 1) {  // columns that lie one after the other are a matrix to transpose
        if (n + kBlock <= columns && lie_together(n, rows, column)) {
          transpose(column(n), rows, kBlock / 2, rows, block, kBlock);
          transpose(column(n + kBlock / 2), rows, kBlock / 2, rows, block + kBlock / 2, kBlock);
          return;
        }
      }
      // Pairs of rows lie together and are moved as one.
      using Pairs = std::conditional_t<kPair == 1, E, float>;
      constexpr int64_t kPlane = kBlock * kPiece;
      alignas(64) Pairs pairs[(kPair == 1 ? 1 : 3) * kPlane / kPair] = {};
      E* const piece = reinterpret_cast<E*>(pairs);
      for (int64_t k = 0; k < rows; k += kPiece) {
        const int64_t count = std::min(kPiece, rows - k);
        for (int64_t j = 0; j < std::min(kBlock, columns - n); ++j) {
          const A* const from = column(n + j);
          E* const to = piece + j * kPiece;
          const int64_t given = from == nullptr ? 0 : count;
          if (given != 0) write_elements(from + k, to, count, planes, kPlane);
          for (int p = 0; p < planes; ++p) std::memset(to + p * kPlane + given, 0, (kPiece - given) * sizeof(E));
        }
        for (int p = 0; p < planes; ++p) {
          transpose(pairs + p * kPlane / kPair, kPiece / kPair, kBlock, ceil_div(count, kPair),
                    reinterpret_cast<Pairs*>(block + p * packed.plane_stride_ + k * kBlock), kBlock);
        }
      }
    });
    return packed;
  }

  // Element (k, n) is row(k)[n]; a null row is zeros.
  template <typename Row>
  static Packed from_rows(int64_t rows, int64_t columns, int planes, const Row& row) {
    Packed packed(rows, columns, planes);
    packed.for_blocks([&](int64_t n, E* block) {
      E piece[kPair][3 * kBlock];
      const int64_t count = std::min(kBlock, columns - n);
      for (int64_t k = 0; k < rows; k += kPair) {
        for (int64_t i = 0; i < kPair; ++i) {
          std::fill_n(piece[i], 3 * kBlock, E(0));
          const A* const from = k + i < rows ? row(k + i) : nullptr;
          if (from != nullptr) write_elements(from + n, piece[i], count, planes, kBlock);
        }
        for (int p = 0; p < planes; ++p) {
          E* const to = block + p * packed.plane_stride_ + k * kBlock;
          for (int64_t j = 0; j < kBlock; ++j) {
            for (int64_t i = 0; i < kPair; ++i) to[j * kPair + i] = piece[i][p * kBlock + j];
          }
        }
      }
    });
    return packed;
  }

  static int64_t depth_of(int64_t rows) { return round_up(rows, kPair); }
  int64_t depth() const { return depth_; }
  Matrix<E> block(int64_t b) const { return {buffer_.get() + b * kBlock * depth_, kBlock, plane_stride_}; }

 private:
  static constexpr int64_t kPair = Matrix<E>::kRowsTogether;

  // Whether the columns of either half of the block from n on lie one after the other.
  template <typename Column>
  static bool lie_together(int64_t n, int64_t rows, const Column& column) {
    for (int64_t j = 0; j < kBlock; ++j) {
      const A* const half = column(n + j / (kBlock / 2) * (kBlock / 2));
      if (half == nullptr || column(n + j) != half + j % (kBlock / 2) * rows) return false;
    }
    return true;
  }

  // fill(first column, block) for every block, in parallel.
  template <typename F>
  void for_blocks(const F& fill) {
    at::parallel_for(0, ceil_div(columns_, kBlock), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) fill(b * kBlock, buffer_.get() + b * kBlock * depth_);
    });
  }

  int64_t columns_, depth_, plane_stride_;
  Buffer<E> buffer_;
};

// Whether row r of a tile takes part; no mask: all do.
inline bool is_real(const bool* mask, int64_t r) { return mask == nullptr || mask[r]; }

// Rows of x as the left operand of a product: as they lie where type and layout allow, else written to `buffer` of
// planes * padded_rows * depth elements, masked rows and padding as zeros (whatever a masked row holds, its products
// are then finite, and 0 times them is 0).
template <typename T, typename E>
inline Matrix<E> copy_rows(const T* x, int64_t ld, const bool* mask, int64_t rows, int64_t padded_rows, int64_t width,
                           int64_t depth, int planes, E* buffer) {
  if constexpr (std::is_same_v<T, E>) {
    const bool whole = rows == padded_rows && width == depth && planes == 1;
    if (whole && (mask == nullptr || std::all_of(mask, mask + rows, [](bool m) { return m; }))) return {x, ld};
  }
  const int64_t plane_stride = padded_rows * depth;
  for (int64_t r = 0; r < padded_rows; ++r) {
    E* const to = buffer + r * depth;
    const bool real = r < rows && is_real(mask, r);
    if (real) write_elements(x + r * ld, to, width, planes, plane_stride);
    for (int p = 0; p < planes; ++p) {
      std::fill(to + p * plane_stride + (real ? width : 0), to + p * plane_stride + depth, E(0));
    }
  }
  return {buffer, depth, plane_stride};
}

// Columns [first, first + width) of rows from `copy_rows`, at most kBlock, as a right operand [rows, kBlock]: close
// together, which products over many rows are faster with, BFloat16 with rows in pairs. Planes are plane_stride apart.
template <typename E>
inline void copy_columns(Matrix<E> a, int64_t rows, int64_t first, int64_t width, int planes, E* panel,
                         int64_t plane_stride) {
  for (int p = 0; p < planes; ++p) {
    const E* const from = a.data + p * a.plane_stride + first;
    E* const to = panel + p * plane_stride;
    if constexpr (!std::is_same_v<E, BFloat16>) {
      for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * a.ld, width, to + r * kBlock);
    } else {
      for (int64_t r = 0; r < rows; r += 2) {
        const auto* const even = reinterpret_cast<const uint16_t*>(from + r * a.ld);
        auto* const pairs = reinterpret_cast<uint32_t*>(to + r * kBlock);
        for (int64_t i = 0; i < width; ++i) pairs[i] = even[i] | uint32_t{even[a.ld + i]} << 16;
      }
    }
  }
}

}  // namespace milkernels
