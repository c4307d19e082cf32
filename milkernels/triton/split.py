"""Products of float32 matrices on bfloat16 matrix units, as exact as float32 ones: each number is the sum of three
bfloat16 parts (8 + 8 + 8 bits), and of their nine products six count; they accumulate in float32, the small ones first.

For users who leave ``torch.get_float32_matmul_precision()`` at "highest", where a GPU has no fast float32 products.
"""

import functools
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from milkernels.triton import tuning
from milkernels.triton.common import kernel
from milkernels.triton.host import Products, ceil_div, launch, power_of_two, product


@kernel
def split_rows(X, OUT, rows, x_stride, L, BN: tl.constexpr, BL: tl.constexpr):
    """Writes to OUT [rows, 3 L] the three parts of X [rows, L], side by side."""
    r = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BL + tl.arange(0, BL)
    inside = (r < rows)[:, None] & (c < L)[None, :]
    rest = tl.load(X + r[:, None] * x_stride + c[None, :], mask=inside, other=0.0)
    out = OUT + r[:, None] * (3 * L) + c[None, :]
    for i in tl.static_range(3):
        part = rest.to(tl.bfloat16)
        tl.store(out + i * L, part, mask=inside)
        taken = part.to(tl.float32)
        # The first part of a number that is infinite or NaN is too; inf - inf would make the others NaN.
        rest = tl.where(tl.abs(taken) < float("inf"), rest - taken, 0.0)


def serves(dtype: torch.dtype) -> bool:
    """Whether products of this type are float32 ones that PyTorch has been told not to round."""
    return dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def products_of(parameters: Sequence[Tensor], dtype: torch.dtype, plan: tuning.Plan) -> Products:
    """The products that the plan asks for, where they can serve the type; else the library's."""
    return (SplitProducts if plan.products == "split" and serves(dtype) else Products)(parameters, dtype)


class SplitProducts(Products):
    """What `Products` does, for float32."""

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype):
        super().__init__(parameters, dtype)
        self.bytes_per_row = 6 * (self.units + parameters[0].shape[1])

    @functools.cached_property  # every slice of rows uses it
    def _across(self):
        return _stacked(self.weight.t())

    @functools.cached_property
    def _along(self):
        return _stacked(self.weight)

    def parts(self, rows: Tensor) -> Tensor:
        return split(rows)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        return _by_weight(x, self._across, out)

    def rows_gradient(self, z: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
        return _by_weight(z, self._along, out, add)

    def weight_gradient(self, z: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
        L = x.shape[1] // 3
        first, second, third = (part.t() for part in z.chunk(3, 1))
        lowest = product(third, x[:, :L], torch.float32)
        low = product(second, x[:, : 2 * L], torch.float32)
        high = product(first, x, torch.float32)
        out = lowest.add_(high[:, 2 * L :]).add_(low[:, L:])
        out = out.add_(low[:, :L]).add_(high[:, L : 2 * L]).add_(high[:, :L])
        return out if onto is None else onto.add_(out)


def split(x: Tensor) -> Tensor:
    """Splits float32 rows [N, L] into their three bfloat16 parts, side by side: [N, 3 L]."""
    rows, L = x.shape
    out = x.new_empty((rows, 3 * L), dtype=torch.bfloat16)
    block = min(max(power_of_two(L), 16), 256)
    launch(
        split_rows, (ceil_div(rows, 8), ceil_div(L, block)), x, out, rows, x.stride(0), L, BN=8, BL=block, num_warps=4
    )
    return out


def _by_weight(
    a: Tensor, weight: tuple[Tensor, Tensor, Tensor], out: Tensor | None = None, add: bool = False
) -> Tensor:
    """``a @ b`` [N, M] in float32, from the parts [N, 3 L] of a and what `_stacked` makes of b [L, M]; written or added
    to ``out`` if given."""
    L = a.shape[1] // 3
    lowest, low, high = weight
    small = product(a[:, :L], lowest, torch.float32)
    small += product(a[:, : 2 * L], low, torch.float32)
    found = product(a, high, torch.float32)
    return out.add_(small).add_(found) if add else torch.add(small, found, out=out)


def _stacked(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stacks the parts of b [L, M] = b1 + b2 + b3 to meet ``[a1 a2 a3]``: ``(b3, [b2; b2], [b1; b1; b1])``."""
    high, low, lowest = split(b.t().contiguous()).chunk(3, dim=1)
    return lowest.t(), torch.cat([low, low], 1).t(), torch.cat([high, high, high], 1).t()
