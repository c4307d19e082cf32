"""What every call needs on the host: launches, products by the library, sizes and types.

Nothing here waits for the device or reads from it, so every op can be captured in a CUDA graph.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launches a kernel, unless its grid is empty. All launches pass here, so that a stand-in can take the place of the
    device."""
    if 0 in grid:
        return
    # A product and a sum may become one instruction, as nvcc has it; Triton's own default is changing.
    _run(kernel, grid, args, {"enable_fp_fusion": True, **options})


def _run(kernel, grid: tuple[int, ...], args: tuple, options: dict) -> None:
    kernel[grid](*args, **options)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def alignment(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all of them."""
    return math.gcd(16, *sizes)


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


def stacked(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One parameter, or the second below the first, in this type."""
    if len(parameters) == 1:
        return parameters[0].to(dtype).contiguous()
    return torch.cat([p.to(dtype) for p in parameters])


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, onto: Tensor | None = None) -> Tensor:
    """``a @ b`` by the library, in ``dtype``, or added to ``onto``. Half types accumulate in float32, which need not be
    rounded to half."""
    dtype = (dtype or a.dtype) if onto is None else onto.dtype
    if not a.is_cuda:
        # Only the interpreter comes here. Products of half types on a CPU may read into the next row, which may hold
        # NaN.
        acc = accumulation_dtype(a)
        found = a.to(acc) @ b.to(acc)
        return found.to(dtype) if onto is None else onto.copy_(found.add_(onto))
    if onto is None:
        return a @ b if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)
    # PyTorch 2.9 adds a product to nothing of another type.
    return onto.addmm_(a, b) if dtype == a.dtype else onto.add_(torch.mm(a, b, out_dtype=dtype))


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Writes ``a @ b`` to ``out``, which may be float32 where a and b are of a half type."""
    if not a.is_cuda:
        return out.copy_(product(a, b, out.dtype))
    return torch.mm(a, b, out=out) if out.dtype == a.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


class Products:
    """The products of a weight W [M, L] with rows x [n, L], and with the gradient z [n, M] of these products. `parts`
    makes of rows, or of z, what the products take. W is one parameter, or the second below the first, in the type of
    products."""

    bytes_per_row = 0  # of the workspace that the products need

    def __init__(
        self, parameters: Sequence[Tensor], dtype: torch.dtype, prepared: Callable[[Tensor], Tensor] | None = None
    ):
        self.parameters, self.dtype, self.prepared = parameters, dtype, prepared
        self.units = sum(len(p) for p in parameters)
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32

    @functools.cached_property  # made where it is needed: not for the gradient of a parameter from what is kept
    def weight(self) -> Tensor:
        weight = stacked(self.parameters, self.dtype)
        return weight if self.prepared is None else self.prepared(weight)

    def parts(self, rows: Tensor):
        return rows

    def forward(self, x, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """``x W^T`` [n, M], in the type of x or in ``dtype``; or written to ``out``, as `product_into` takes it."""
        return product(x, self.weight.t(), dtype) if out is None else product_into(out, x, self.weight.t())

    def rows_gradient(self, z, out: Tensor | None = None, *, add: bool = False) -> Tensor:
        """``z W`` [n, L], in the accumulation type; or written or added to ``out``, which has the type of z, or float32
        where z is of a half type."""
        if out is None:
            return product(z, self.weight, self.acc)
        return product(z, self.weight, onto=out) if add else product_into(out, z, self.weight)

    def weight_gradient(self, z, x, onto: Tensor | None = None) -> Tensor:
        """``z^T x`` [M, L] in the accumulation type, added to ``onto`` if given."""
        return product(z.t(), x, self.acc, onto)
