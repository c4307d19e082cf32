"""Saved bytes: how much of what its backward would compute again an op may save.

Hidden units and embedded rows cost a matrix product to compute.  Saved for the first rows, up to a limit that does not
grow with N, they spare a third of a training step on bags that fit, and a bag of a million instances still fits.
"""

import math
import os
import re
from typing import Any

import torch
from torch import Tensor

from milkernels import _context, _torch

__all__ = ["saved_bytes"]

Limit = int | str | None
ALL = -1  # in an op's schema: no limit
_DEFAULTS = {"cpu": 64 << 20, "cuda": 512 << 20}  # by device
_UNITS = {"": 1, "B": 1, **{f"{prefix}iB": 1 << 10 * (i + 1) for i, prefix in enumerate("KMGT")}}
_GROUP = 64  # rows and columns of a block that a kernel writes on the CPU


def _checked(limit: Limit, source: str) -> int:
    """In bytes; `ALL` for None."""
    if limit is None:
        return ALL
    words = f'{source} must be a number of bytes, text such as "64MiB", or None'
    if isinstance(limit, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B?)\s*", limit)
        if found is None:
            raise ValueError(f"{words}; got {limit!r}")
        return math.floor(float(found[1]) * _UNITS[found[2]]) if "." in found[1] else int(found[1]) * _UNITS[found[2]]
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise TypeError(f"{words}; got {type(limit).__name__}")
    if not 0 <= limit < 2**62:
        raise ValueError(f"{words}; got {limit}")
    return limit


def _start() -> int | None:
    """What the environment says; None: the default of the device."""
    given = os.environ.get("MILKERNELS_SAVED_BYTES", "")
    return None if given == "" else _checked(None if given == "None" else given, "MILKERNELS_SAVED_BYTES")


_START = _start()
_traced: tuple[int, ...] = ()  # blocks inside of a graph that is being traced


class saved_bytes:  # noqa: N801, as torch.no_grad
    """Sets how many bytes an op may save of what its backward would compute again; as a context manager, for the block.

    Hidden units of attention, of DSMIL's MLP query and of its non-linear value, and the rows of an embedding cost a
    matrix product each.  The forward of a call that needs gradients saves them for the first instances, as many as
    fit, and its backward computes the others again: more is faster, less is smaller.  Gradients are the same but for
    rounding in bfloat16 and float16, where products are saved in that type, as eager PyTorch saves them.

    It counts for this thread and this asyncio task; a thread that is started later begins with
    ``MILKERNELS_SAVED_BYTES`` (bytes, ``64MiB``, or ``None``), or where that is not set with 64 MiB on a CPU and
    512 MiB on a GPU, for each call that waits for its backward.

    Args:
        limit: bytes, or text such as ``"64MiB"``; 0: compute everything again; None: save everything, O(N D) memory.

    Raises:
        ValueError: a negative number, or text that is not an amount.
        TypeError: anything else.

    >>> import torch
    >>> from milkernels import attention_pool, saved_bytes
    >>> x, v, w = torch.randn(100, 16), torch.nn.Linear(16, 8), torch.nn.Linear(8, 1)
    >>> with saved_bytes("1GiB"):
    ...     attention_pool(x, v, w).bag.sum().backward()
    """

    def __init__(self, limit: Limit):
        global _traced
        limit = _checked(limit, "limit")
        self._before: Any  # what was set, of another kind while a graph is traced
        self._tracing = torch.compiler.is_compiling()  # which follows the assignment, not a ContextVar
        if self._tracing:
            self._before, _traced = _traced, (*_traced, limit)
        else:
            self._before = _context.set_saved_bytes(limit)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        global _traced
        if self._tracing:
            _traced = self._before
        else:
            _context.reset_saved_bytes(self._before)


def limit_of(x: Tensor) -> int:
    """The limit of a call with these instances, as its schema has it: `ALL` for none."""
    if torch.compiler.is_compiling():
        limit = _traced[-1] if _traced else _context.saved_bytes
    else:
        limit = _context.current_saved_bytes()
    if limit is None:
        limit = _START
    return _DEFAULTS.get(_torch.device_type(x), 0) if limit is None else limit


def kept_bytes(x: Tensor, limit: int, product: torch.dtype, embedded: int, hidden: tuple[int, ...]):
    """How many bytes an op keeps: embedded rows of that width first (0: it has none), then the products of layers with
    so many hidden units.

    Kernels lay them out: on a CPU in blocks of 64 columns, in bfloat16 or in the accumulation type.
    """
    on_cpu = x.device.type == "cpu"
    if x.dtype == torch.float64:
        number = 8
    elif product == torch.bfloat16 or (product == torch.float16 and not on_cpu):
        number = 2
    else:
        number = 4
    wide = (lambda n: -(-n // _GROUP) * _GROUP) if on_cpu else (lambda n: n)
    rows, total = -(-x.shape[0] // _GROUP) * _GROUP, 0
    for width in (wide(embedded), sum(wide(n) for n in hidden)):
        if isinstance(width, int) and width == 0:
            continue
        row = width * number
        fitting = rows if limit == ALL else torch.sym_min(rows, (limit - total) // (row * _GROUP) * _GROUP)
        total += fitting * row
    return total
