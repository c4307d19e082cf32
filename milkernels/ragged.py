"""Ragged bags: the layout, its checks, its conversions and the schedule that every backend shares.

**Layout.** ``x [N, L]`` holds the instances of all bags back to back.  ``offsets [B + 1]`` (int32 or int64,
on the device of ``x``) starts at 0, never decreases and ends at N.  Bag ``b`` is
``x[offsets[b]:offsets[b + 1]]`` and may be empty.  ``offsets=None`` is one bag.

**Schedule.** Rows are cut into flat chunks of ``chunk_rows(N)`` rows, which may cross bag boundaries.  A
*segment* is a maximal run of rows inside one chunk and one bag: what one worker reduces to one partial result.
The segment of chunk ``c`` and bag ``b`` writes its partial into slot ``c + b``.  From a segment to the next
one ``c`` or ``b`` or both grow and neither shrinks, so slots are unique and in row order, and
``ceil(N / chunk) + B`` of them are enough.  No table is needed: a bag of rows ``[start, end)`` that is not
empty owns the chunks ``start // chunk`` to ``(end - 1) // chunk``, and merging its partials in slot order
gives the same bits whatever ran in parallel.  ``segments`` is this paragraph as code.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from milkernels import _torch
from milkernels._torch import has_values, to_list
from milkernels.arguments import check_dense, check_device, readable

INT_TYPES = (torch.int32, torch.int64)


def checked_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask of the rows of ``x`` as bool ``[N]``.

    Raises:
        TypeError: not a dense tensor.
        ValueError: another shape or device; for floating-point values that are read: others than 0 and 1, such as the
            0 and -inf of a mask that is added to scores.
    """
    if mask is None:
        return None
    check_dense("mask", mask)
    if mask.ndim != 1 or mask.shape[0] != x.shape[0]:
        raise ValueError(f"mask must be [{x.shape[0]}]; got shape {tuple(mask.shape)}")
    check_device("mask", mask, x)
    if mask.dtype == torch.bool:
        return mask.contiguous()
    if mask.is_complex() or mask.is_quantized:
        raise TypeError(f"mask must be bool or of real numbers; got {mask.dtype}")
    if mask.is_floating_point() and readable(mask):
        other = mask[(mask != 0) & (mask != 1)]
        if len(other):
            value = other[0].item()
            hint = ", as of a mask that is added to scores" if value < 0 else ""
            raise ValueError(f"mask must be bool, or 1 for a real instance and 0 for none; got {value}{hint}")
    return (mask != 0).contiguous()


def check_offsets(offsets: Tensor, num_rows: int, device: torch.device) -> None:
    """Checks that ``offsets`` cuts ``num_rows`` rows on ``device`` into bags.

    Values are read on the CPU only: never on another device, where that would synchronise, and never under
    tracing.

    Raises:
        TypeError: not a dense tensor, or neither int32 nor int64.
        ValueError: not 1-D, without elements, on another device than the rows; for values that are read: not
            starting at 0, decreasing, not ending at ``num_rows``.
    """
    check_dense("offsets", offsets)
    if offsets.dtype not in INT_TYPES:
        raise TypeError(f"offsets must be int32 or int64; got {offsets.dtype}")
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be 1-D, one element more than bags; got shape {tuple(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"offsets must be on the device of the instances, {device}; got {offsets.device}")
    if offsets.is_cpu and has_values(offsets):
        check_offset_values(offsets, num_rows)
    elif offsets.shape[0] == 1 and isinstance(num_rows, int) and num_rows > 0:
        raise ValueError(f"offsets of no bags, [0], need no instances; got {num_rows}")


def check_offset_values(offsets: Tensor, num_rows: int) -> None:
    if offsets.shape[0] > 256 and bool((offsets[1:] >= offsets[:-1]).all()):
        offsets = offsets[:: offsets.shape[0] - 1]  # in order: reading the ends is enough
    bounds = to_list(offsets)  # the cheapest way to look at a few
    if bounds[0] != 0:
        raise ValueError(f"offsets must start at 0; got {bounds[0]}")
    if bounds != sorted(bounds):
        at = next(i for i in range(1, len(bounds)) if bounds[i] < bounds[i - 1])
        got = f"{bounds[at]} after {bounds[at - 1]} at position {at}"
        raise ValueError(f"offsets must not decrease; got {got}")
    if bounds[-1] != num_rows:
        raise ValueError(f"offsets must end at the number of instances, {num_rows}; got {bounds[-1]}")


def for_kernels(x: Tensor) -> Tensor:
    """``x`` with rows that kernels can read: unit stride inside, no overlap between."""
    if x.is_contiguous() or (x.stride(1) == 1 and x.stride(0) >= x.shape[1]):
        return x
    return x.contiguous()


def bag_lengths(offsets: Tensor) -> Tensor:
    """The number of instances of each bag, ``[B]`` in the type of ``offsets``."""
    return offsets[1:] - offsets[:-1]


def bag_index(offsets: Tensor | None, num_rows: int, device: torch.device | None = None) -> Tensor:
    """The bag of each row, ``[num_rows]`` int64, always within ``[0, B - 1]`` even if ``offsets`` are wrong.

    Does not synchronise and can be traced with a dynamic ``num_rows``.  ``device`` is where the result lies
    when ``offsets`` is None (one bag); otherwise it lies with ``offsets``.
    """
    if offsets is None:
        return torch.zeros(num_rows, dtype=torch.int64, device=device)
    # Not repeat_interleave(lengths, output_size=num_rows): on CUDA it trusts output_size and writes out of
    # bounds when the offsets do not end there; without output_size it synchronises.
    rows = torch.arange(num_rows, device=offsets.device)
    if _torch.in_onnx_export():  # ONNX has no search
        return (rows[:, None] >= offsets[1:]).sum(1).clamp(0, offsets.shape[0] - 2)
    bag = torch.searchsorted(offsets.to(torch.int64).contiguous(), rows, right=True) - 1
    return bag.clamp(0, offsets.shape[0] - 2)


def chunk_rows(num_rows: int) -> int:
    """Rows of one chunk: fewer where there are few, so that all workers find work; from shapes alone."""
    return 64 if num_rows <= 2048 else 256


def num_partials(num_rows: int, num_bags: int) -> int:
    """How many slots for partial results the schedule needs."""
    return -(-num_rows // chunk_rows(num_rows)) + num_bags


def segments(offsets: Tensor | None, num_rows: int) -> Iterator[tuple[int, int, int, int]]:
    """The segments ``(slot, bag, start, end)`` in row order, on the host: what kernels must agree with."""
    bounds, rows = [0, num_rows] if offsets is None else offsets.tolist(), chunk_rows(num_rows)
    for bag, (bag_start, bag_end) in enumerate(itertools.pairwise(bounds)):
        if bag_start == bag_end:
            continue
        for chunk in range(bag_start // rows, (bag_end - 1) // rows + 1):
            start, end = max(bag_start, chunk * rows), min(bag_end, (chunk + 1) * rows)
            yield chunk + bag, bag, start, end
