"""What every call needs on the host: launches, products by the library, sizes and types.

Nothing here waits for the device or reads from it, so every op can be captured in a CUDA graph.
"""

import torch
from torch import Tensor


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launches a kernel. All launches pass here, so that a stand-in can take the place of the device."""
    # A product and a sum may become one instruction, as nvcc has it; Triton's own default is changing.
    _run(kernel, grid, args, {"enable_fp_fusion": True, **options})


def _run(kernel, grid: tuple[int, ...], args: tuple, options: dict) -> None:
    kernel[grid](*args, **options)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype, compute_dtype: torch.dtype | None) -> torch.dtype:
    """The type of products with rows of ``dtype``: ``compute_dtype`` where autocast asks for it, but for float64
    rows."""
    return dtype if dtype == torch.float64 or compute_dtype is None else compute_dtype


def dropout_of(seed: Tensor | None, p: float) -> tuple[Tensor | None, int]:
    """``(seed, threshold)``: a unit is dropped if its 16 random bits are below the threshold; without a seed none
    is."""
    threshold = int(p * 65536 + 0.5)
    return (None, 0) if seed is None or threshold == 0 else (seed, threshold)


def dropout_bits(threshold: int) -> int:
    """log2 of the largest factor by which dropout scales a kept unit, rounded up."""
    return 17 - max((1 << 16) - threshold, 1).bit_length()


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``a @ b`` by the library, in ``dtype``. Half types accumulate in float32, which need not be rounded to half."""
    dtype = dtype or a.dtype
    if a.is_cuda:
        return a @ b if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)
    # Only the interpreter comes here. Products of half types on a CPU may read into the next row, which may hold NaN.
    acc = accumulation_dtype(a)
    return (a.to(acc) @ b.to(acc)).to(dtype)


class Products:
    """The products of a weight W [M, L] with rows x [n, L], and with the gradient z [n, M] of these products."""

    bytes_per_row = 0  # of the workspace that the products need

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.acc = accumulation_dtype(weight)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``x W^T`` [n, M], in the type of x or in ``dtype``."""
        return product(x, self.weight.t(), dtype)

    def rows_gradient(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        """``z W`` [n, L], in the accumulation type, or written to ``out``, which has the type of z."""
        if out is None:
            return product(z, self.weight, self.acc)
        return torch.mm(z, self.weight, out=out) if z.is_cuda else out.copy_(product(z, self.weight))

    def weight_gradient(self, z: Tensor, x: Tensor) -> Tensor:
        """``z^T x`` [M, L], in the accumulation type."""
        return product(z.t(), x, self.acc)
