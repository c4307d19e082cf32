"""Checks of the arguments of public functions: each error names the argument and the value it got.

They look at types, shapes and devices only, so they cost microseconds and can be traced.
"""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SEEDS = (-(2**63), 2**63 - 1)


def check_tensor(name: str, t: Tensor, ndim: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {t.dtype}")
    if t.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions; got shape {tuple(t.shape)}")


def check_instances(x: Tensor, name: str = "x") -> None:
    """``[N, L]`` with N >= 0 and L >= 1."""
    check_tensor(name, x, 2)
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got layout {x.layout}")
    if x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column; got shape {tuple(x.shape)}")


def check_shape(name: str, t: Tensor, shape: tuple[int | None, ...], x: Tensor) -> None:
    """Of that shape, where None is any size from 1 on, and on the device of ``x``."""
    check_tensor(name, t, len(shape))
    for got, expected in zip(t.shape, shape, strict=True):
        if got != expected and (expected is not None or got < 1):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must be [{sizes}]; got shape {tuple(t.shape)}")
    check_device(name, t, x)


def check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of the instances, {x.device}; got {t.device}")


def check_per_row(name: str, t: Tensor, x: Tensor) -> None:
    """One row per instance: ``[N, K]``, K >= 1."""
    check_tensor(name, t, 2)
    if t.shape[0] != x.shape[0] or t.shape[1] < 1:
        raise ValueError(f"{name} must be [{x.shape[0]}, any]; got shape {tuple(t.shape)}")
    check_device(name, t, x)


def check_linear(prefix: str, weight: Tensor, bias: Tensor | None, width: int, x: Tensor) -> None:
    """``weight [any, width]`` and ``bias [any]`` or None."""
    check_shape(f"{prefix}weight", weight, (None, width), x)
    if bias is not None:
        check_shape(f"{prefix}bias", bias, (weight.shape[0],), x)


def checked_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask as bool ``[N]``."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor; got {type(mask).__name__}")
    if mask.ndim != 1 or mask.shape[0] != x.shape[0]:
        raise ValueError(f"mask must be [{x.shape[0]}]; got shape {tuple(mask.shape)}")
    check_device("mask", mask, x)
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous()


def check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def check_share(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1; got {value}")


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def checked_seed(seed: Tensor | int | None, p_name: str, p: float, x: Tensor) -> Tensor | None:
    """The dropout seed as int64 ``[1]`` on the device of ``x``; None where nothing is dropped."""
    check_share(p_name, p)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be int64; got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element; got shape {tuple(seed.shape)}")
        check_device("seed", seed, x)
    elif seed is not None:
        if not isinstance(seed, int):
            raise TypeError(f"seed must be an int64 tensor, an int or None; got {type(seed).__name__}")
        if not _SEEDS[0] <= seed <= _SEEDS[1]:
            raise ValueError(f"seed must fit into 64 bits; got {seed}")
    if p == 0:
        return None
    if seed is None:
        return torch.randint(_SEEDS[1], (1,), device=x.device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)
