"""What an op keeps of its first rows for its backward, in bytes: rows as an embedding leaves them, then the products of
layers. A slice of rows is kept as a whole or not at all."""

import torch
from torch import Tensor

from milkernels.triton.call import Call
from milkernels.triton.host import ceil_div

_PADDED = 64  # rows: blocks begin where kernels read fast, and `saving.kept_bytes` counts so many
_PIECE = 256  # rows that are kept together, or not


class Kept:
    """Room for numbers [rows, width] of the first rows, if any; ``filled`` says that these are there already."""

    def __init__(self, width: int, dtype: torch.dtype):
        self.width, self.dtype = width, dtype
        self.numbers: Tensor | None = None
        self.filled = False

    def of(self, rows: slice | Tensor) -> Tensor | None:
        """The numbers of a slice, in place; None where these are not kept."""
        if self.numbers is None or not isinstance(rows, slice) or rows.stop > self.numbers.shape[0]:
            return None
        return self.numbers[rows]

    def bytes_per_row(self) -> int:
        return self.width * self.dtype.itemsize


def lay_out(call: Call, memory: Tensor, *groups: list[Kept]) -> None:
    """Divides the bytes: each group gets as many first rows as fit behind the groups before it. Slices of the call end
    where these rows do."""
    first, padded, piece = 0, ceil_div(call.rows, _PADDED) * _PADDED, max(call.unit, _PIECE)
    for group in groups:
        per_row = sum(kept.bytes_per_row() for kept in group)
        if per_row == 0:
            continue
        rows = (memory.shape[0] - first) // per_row
        rows = call.rows if rows >= padded else rows // piece * piece
        for kept in group if rows else ():
            last = first + rows * kept.bytes_per_row()
            kept.numbers = memory[first:last].view(kept.dtype).view(rows, kept.width)
            first = ceil_div(last, _PADDED) * _PADDED
        call.cuts.add(rows)
