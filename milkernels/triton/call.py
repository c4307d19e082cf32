"""One call of an op on the host: its tensors as kernels take them, and its schedule of chunks, slots and slices.

Nothing here waits for the device or reads from it, so every op can be captured in a CUDA graph.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from milkernels import ragged
from milkernels.triton.host import accumulation_dtype, ceil_div, power_of_two

# The bytes that a slice of rows may take between two kernels, and twice as many where one row takes more than 8 KB: at
# least 32k rows, so that products fill the chip and launches hide behind the work.
WORKSPACE = 256 << 20
_WIDE = 8 << 10
_MOST_SUMMED = 1 << 10
_MOST_CHUNKS = 1 << 14  # one program merges the partial results of a bag, a hundred at a time


@dataclass
class Call:
    """The rows ``x`` [N, L] of a call, in bags: ``offsets`` int64 [B + 1], None for one bag; ``mask`` bool [N] or
    None."""

    x: Tensor
    offsets: Tensor | None
    mask: Tensor | None

    def __post_init__(self):
        self.x = self.x if self.x.stride(1) == 1 and self.x.stride(0) >= self.x.shape[1] else self.x.contiguous()
        self.rows = self.x.shape[0]
        self.width, self.dtype = self.x.shape[1], self.x.dtype  # `Instances` replaces both where rows are embedded
        self.bags = 1 if self.offsets is None else self.offsets.shape[0] - 1
        self.offsets = None if self.offsets is None else self.offsets.contiguous()
        self.mask = None if self.mask is None else self.mask.contiguous().view(torch.uint8)
        self.acc = accumulation_dtype(self.x)
        # Chunks are as long as `ragged` says, and longer where there are very many rows.
        self.chunk = ragged.chunk_rows(self.rows)
        self.chunk *= power_of_two(ceil_div(self.rows, self.chunk * _MOST_CHUNKS))
        # So many rows one program sums for the gradients of parameters, whose partial sums are about a thousand.
        self.summed = min(max(power_of_two(ceil_div(self.rows, _MOST_SUMMED)), 64), _MOST_SUMMED)
        self.cuts: set[int] = set()  # rows, multiples of `unit` or all, at which no slice goes on

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.acc)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_zeros(shape, dtype=dtype or self.acc)

    def to_acc(self, t: Tensor | None) -> Tensor | None:
        """Converts a parameter or a gradient to what kernels read: contiguous, in the accumulation type."""
        return None if t is None else t.to(self.acc).contiguous()

    @property
    def slots(self) -> int:
        """How many partial results there are at most: a slot is a chunk number plus a bag number."""
        return ceil_div(self.rows, self.chunk) + self.bags

    def slots_in(self, rows: slice) -> int:
        """How many slots a slice of rows needs; its first slot is ``start // chunk``, where ``start`` begins a
        chunk."""
        return ceil_div(rows.stop - rows.start, self.chunk) + self.bags - 1 if self.bags else 0

    def sum_at_most(self, columns: int) -> None:
        """Lets programs sum more rows each where the sums of so many columns would take more than a quarter of a
        workspace."""
        while ceil_div(self.rows, self.summed) * columns * self.acc.itemsize > max(WORKSPACE // 4, 1 << 20):
            self.summed *= 2

    def sums(self, columns: int) -> Tensor:
        """Room for the sums of `summed` rows each, those from row r on at ``r // summed``: [programs, columns]."""
        return self.empty(ceil_div(self.rows, self.summed), columns)

    @property
    def parts(self) -> int:
        """How many programs share a segment in kernels that sum nothing over rows."""
        return ceil_div(self.chunk, 64)

    @property
    def unit(self) -> int:
        """The rows that no slice separates."""
        return max(self.chunk, self.summed)

    @property
    def whole(self) -> slice:
        return slice(0, self.rows)

    def slices(self, bytes_per_row: int | None = None) -> Iterable[slice]:
        """Cuts the rows into slices whose workspace stays within `WORKSPACE`; without one they end at `cuts` alone."""
        return [self.whole] if bytes_per_row is None and not self.cuts else self.blocks(bytes_per_row or 1)

    def blocks(self, bytes_per_row: int) -> Iterator[slice]:
        """Cuts the rows into slices of whole chunks, about equally long between `cuts`, whose workspace stays within
        `WORKSPACE`."""
        unit = self.unit
        most = max(1, (WORKSPACE << (bytes_per_row > _WIDE)) // (bytes_per_row * unit))
        for first, last in itertools.pairwise(sorted({0, self.rows} | self.cuts)):
            units = ceil_div(last - first, unit)
            step = ceil_div(units, ceil_div(units, most)) * unit
            for start in range(first, last, step):
                yield slice(start, min(start + step, last))
