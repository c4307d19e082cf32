"""Types: in which products run, sums accumulate and results come."""

import functools

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute in on the device of ``x``; None where it is off."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def compute_dtype_of(x: Tensor) -> torch.dtype | None:
    """The type of autocast, which leaves float64 alone; None where it is off."""
    dtype = autocast_dtype(x)
    return None if x.dtype == torch.float64 else dtype


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The promoted type of the tensors that are there."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.promote_types(result_dtype(*tensors), torch.float32)


def types_of(compute_dtype: torch.dtype | None, x: Tensor, *others: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """Of accumulation, and of products with ``x``: its own, or that of autocast; float64 where anything is."""
    acc = accumulation_dtype(x, *others)
    return acc, acc if acc == torch.float64 else compute_dtype or x.dtype


def without_autocast(fn):
    @functools.wraps(fn)
    def wrapper(first: Tensor, *args, **kwargs):
        if autocast_dtype(first) is None:
            return fn(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return fn(first, *args, **kwargs)

    return wrapper
