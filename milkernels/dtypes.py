"""Types: in which products run, sums accumulate and results come."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from milkernels._torch import device_type


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute in on the device of ``x``; None where it is off."""
    kind = device_type(x)
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def compute_dtype_of(x: Tensor) -> torch.dtype | None:
    """The type of autocast, which leaves float64 alone; None where it is off."""
    return None if x.dtype is torch.float64 else autocast_dtype(x)


def result_dtype(x: Tensor, others: Iterable[Tensor | None] = ()) -> torch.dtype:
    """The promoted type of the tensors that are there."""
    dtype = x.dtype
    for t in others:
        if t is not None and t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, which takes a microsecond even where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def accumulation_dtype(x: Tensor, others: Iterable[Tensor | None] = ()) -> torch.dtype:
    """The type of sums: float64 if any tensor is, else float32."""
    return torch.promote_types(result_dtype(x, others), torch.float32)


def product_dtypes(
    compute_dtype: torch.dtype | None, x: Tensor, others: Iterable[Tensor | None] = ()
) -> tuple[torch.dtype, torch.dtype]:
    """``(accumulation, products)``: products run in the type of ``x`` or of autocast; in float64 where anything is."""
    acc = accumulation_dtype(x, others)
    return acc, acc if acc == torch.float64 else compute_dtype or x.dtype


def without_autocast(fn):
    """A function of a tensor and more that autocast does not reach."""

    @functools.wraps(fn)
    def wrapper(first: Tensor, *args, **kwargs):
        if autocast_dtype(first) is None:
            return fn(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return fn(first, *args, **kwargs)

    return wrapper
