"""One call of an op on the host: its tensors as kernels take them, its schedule, its launches.

Nothing here waits for the device or reads from it, so every op can be captured in a CUDA graph.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from milkernels import ragged

if TYPE_CHECKING:
    from milkernels.triton.embedding import Embedding

# Of row chunks between two kernels, in bytes: large enough that launches hide, small enough to stay in the L2 of a
# data-centre GPU, and under the 64 MB that DESIGN allows.
WORKSPACE = 32 << 20
_MOST_CHUNKS = 1 << 14  # partial results of one bag are merged a hundred at a time


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Every kernel is launched here, so that a stand-in can take the place of the device."""
    # Products and sums may be fused, as they are by nvcc; Triton's own default is changing.
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
    """Of products with rows of that type, where autocast may ask for another."""
    return dtype if dtype == torch.float64 or compute_dtype is None else compute_dtype


def dropout_of(seed: Tensor | None, p: float) -> tuple[Tensor | None, int]:
    """``(seed, threshold)``: a unit is dropped if its 16 bits are below the threshold; no seed, no dropout."""
    threshold = int(p * 65536 + 0.5)
    return (None, 0) if seed is None or threshold == 0 else (seed, threshold)


def dropout_bits(threshold: int) -> int:
    """By which what is kept grows, at most."""
    return 17 - max((1 << 16) - threshold, 1).bit_length()


@dataclass
class Rows:
    """Some rows as an op sees them, and what the gradient of embedded ones goes back through."""

    which: slice | Tensor  # their numbers; there is no row -1
    values: Tensor
    x: Tensor | None = None  # what is embedded, in the type of products
    argument: Tensor | None = None  # of the activation, as `Embedding` keeps it


@dataclass
class Call:
    """Rows ``x [N, L]`` in bags, or their embedding [N, E]. ``offsets`` None is one bag, ``mask`` bool [N] or None."""

    x: Tensor
    offsets: Tensor | None
    mask: Tensor | None
    embedding: "Embedding | None" = None

    def __post_init__(self):
        self.x = self.x if self.x.stride(1) == 1 and self.x.stride(0) >= self.x.shape[1] else self.x.contiguous()
        self.rows = self.x.shape[0]
        self.width, self.dtype = self.x.shape[1], self.x.dtype  # of rows as the op sees them
        if self.embedding is not None:
            self.width, self.dtype = self.embedding.width, self.embedding.type
        self.bags = 1 if self.offsets is None else self.offsets.shape[0] - 1
        self.offsets = None if self.offsets is None else self.offsets.contiguous()
        self.mask = None if self.mask is None else self.mask.contiguous().view(torch.uint8)
        self.acc = accumulation_dtype(self.x)
        # The schedule of `ragged`, with longer chunks where there are very many rows.
        self.chunk = ragged.chunk_rows(self.rows)
        self.chunk *= power_of_two(ceil_div(self.rows, self.chunk * _MOST_CHUNKS))

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.acc)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_zeros(shape, dtype=dtype or self.acc)

    def take(self, t: Tensor | None) -> Tensor | None:
        """A parameter or a gradient as kernels read it: contiguous, in the accumulation type."""
        return None if t is None else t.to(self.acc).contiguous()

    @property
    def slots(self) -> int:
        """Of partial results: one for each chunk and bag."""
        return ceil_div(self.rows, self.chunk) + self.bags

    def slots_in(self, rows: slice) -> int:
        """How many slots the rows need; the first is ``start // chunk``, and ``start`` begins a chunk."""
        return ceil_div(rows.stop - rows.start, self.chunk) + self.bags - 1

    @property
    def parts(self) -> int:
        """Programs that share a segment, where rows need no sums."""
        return ceil_div(self.chunk, 64)

    @property
    def whole(self) -> slice:
        return slice(0, self.rows)

    def rows_at(self, block: slice, *, keep: bool = False) -> Rows:
        """A slice of rows as the op sees them; ``keep`` what their gradient goes back through."""
        if self.embedding is None:
            return Rows(block, self.x[block])
        return self.embedding.of_slice(self, block, keep)

    def slices(self, bytes_per_row: int | None = None) -> Iterable[slice]:
        """Of rows, whose workspace stays within bounds; where there is none, all of them at once."""
        if self.embedding is not None:
            return self.blocks((bytes_per_row or 0) + self.embedding.bytes_per_row(self))
        return [self.whole] if bytes_per_row is None else self.blocks(bytes_per_row)

    def blocks(self, bytes_per_row: int) -> Iterator[slice]:
        """Even slices of rows, of whole chunks, whose workspace stays within bounds."""
        chunks = ceil_div(self.rows, self.chunk)
        most = max(1, WORKSPACE // (bytes_per_row * self.chunk))
        count = ceil_div(chunks, most)
        step = ceil_div(chunks, count) * self.chunk if count else 1
        for start in range(0, self.rows, step):
            yield slice(start, min(start + step, self.rows))


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``a @ b`` by the library, in ``dtype``: half types accumulate in float32 and need not be rounded."""
    dtype = dtype or a.dtype
    if a.is_cuda:
        return a @ b if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)
    # Only an interpreter comes here; products of half types on a CPU may read into the next row, NaN or not.
    acc = accumulation_dtype(a)
    return (a.to(acc) @ b.to(acc)).to(dtype)


class Products:
    """Of rows x [n, L] with a weight W [M, L], and of the gradient z [n, M] of these, by the library."""

    bytes_per_row = 0  # of workspace

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.acc = accumulation_dtype(weight)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``x W^T``, in their type or in that of accumulation."""
        return product(x, self.weight.t(), dtype)

    def of_rows(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        """``z W`` in the accumulation type, or in ``out``, which has the type of z."""
        if out is None:
            return product(z, self.weight, self.acc)
        return torch.mm(z, self.weight, out=out) if z.is_cuda else out.copy_(product(z, self.weight))

    def of_weight(self, z: Tensor, x: Tensor) -> Tensor:
        """``z^T x``, likewise."""
        return product(z.t(), x, self.acc)
