"""One call of an op on the host: its tensors as kernels take them, its schedule, its launches.

Nothing here waits for the device or reads from it, so every op can be captured in a CUDA graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from milkernels import bags

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


def product_dtype(x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 or compute_dtype is None else compute_dtype


@dataclass
class Call:
    """Rows ``x [N, L]`` in bags. ``offsets`` None is one bag, ``mask`` is bool [N] or None."""

    x: Tensor
    offsets: Tensor | None
    mask: Tensor | None

    def __post_init__(self):
        self.x = self.x if self.x.stride(1) == 1 and self.x.stride(0) >= self.x.shape[1] else self.x.contiguous()
        self.rows, self.width = self.x.shape
        self.bags = 1 if self.offsets is None else self.offsets.shape[0] - 1
        self.offsets = None if self.offsets is None else self.offsets.contiguous()
        self.mask = None if self.mask is None else self.mask.contiguous().view(torch.uint8)
        self.acc = accumulation_dtype(self.x)
        # The schedule of `bags`, with longer chunks where there are very many rows.
        self.chunk = bags.chunk_rows(self.rows)
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

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T``, in their type."""
        return product(x, self.weight.t())

    def of_rows(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        """``z W`` in the accumulation type, or in ``out``, which has the type of z."""
        if out is None:
            return product(z, self.weight, self.acc)
        return torch.mm(z, self.weight, out=out) if z.is_cuda else out.copy_(product(z, self.weight))

    def of_weight(self, z: Tensor, x: Tensor) -> Tensor:
        """``z^T x``, likewise."""
        return product(z.t(), x, self.acc)
