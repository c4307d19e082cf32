"""Checks of the arguments of public functions: each error names the argument and the value it got.

They look at types, shapes and devices, so they cost microseconds and can be traced.  Values are read where that is
free: on the CPU, outside of a trace.
"""

import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from milkernels._torch import has_values, is_dtensor

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = (Tensor, torch.nn.Parameter)
_INTEGER, _REAL = (int, torch.SymInt), (int, float, torch.SymInt, torch.SymFloat)  # a union takes time to make
_INT64 = (-(2**63), 2**63 - 1)
_COUNTS = 2**31  # what is counted in 64 bits stays far from their end, whatever it is multiplied by


def readable(tensor: Tensor) -> bool:
    """Whether reading the values is possible and free: on the CPU, outside of a trace."""
    return tensor.is_cpu and has_values(tensor)


def in_order(t: Tensor, device: torch.device) -> bool:
    """Whether ``t`` is a dense floating-point tensor on that device.

    With the right shape it nearly always is: then this one look is all, and the checks below, which have the words for
    what is wrong, are not called.
    """
    return (
        type(t) in _PLAIN and not t.is_nested and t.dtype in DTYPES and t.layout is torch.strided and t.device == device
    )


def check_dense(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    if type(t) not in _PLAIN and is_dtensor(t):
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor: take .to_local() of instances that are spread over ranks, "
            "and have milkernels.all_merge put together what these pool, and .full_tensor() of a parameter"
        )
    if t.layout is not torch.strided or t.is_nested:
        got = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name} must be a dense tensor; got {got}")


def check_type(name: str, value, kinds: type | tuple[type, ...], words: str) -> None:
    """What is of these kinds by accident is refused: a bool as an int, text as a sequence, a tensor of one number."""
    if not isinstance(value, kinds) or isinstance(value, (bool, str, bytes)) or getattr(value, "ndim", 1) == 0:
        raise TypeError(f"{name} must be {words}; got {type(value).__name__}")


def check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of the instances, {x.device}; got {t.device}")


def check_tensor(name: str, t: Tensor, ndim: int) -> None:
    check_dense(name, t)
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {t.dtype}")
    if t.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions; got shape {tuple(t.shape)}")


def check_instances(x: Tensor, name: str = "x") -> None:
    """``x`` is ``[N, L]`` with N >= 0 and L >= 1."""
    check_tensor(name, x, 2)
    if x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column; got shape {tuple(x.shape)}")


def check_shape(name: str, t: Tensor, shape: tuple[int | None, ...], x: Tensor) -> None:
    """``t`` has that shape, where None is any size from 1 on, and lies on the device of ``x``."""
    check_tensor(name, t, len(shape))
    for got, expected in zip(t.shape, shape, strict=True):
        if got != expected and (expected is not None or got < 1):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} must be [{sizes}]; got shape {tuple(t.shape)}")
    check_device(name, t, x)


def check_per_row(name: str, t: Tensor, x: Tensor) -> None:
    """One row per instance: ``[N, K]``, K >= 1."""
    if in_order(t, x.device) and len(shape := t.shape) == 2 and shape[0] == x.shape[0] and shape[1] >= 1:
        return
    check_tensor(name, t, 2)
    if t.shape[0] != x.shape[0] or t.shape[1] < 1:
        raise ValueError(f"{name} must be [{x.shape[0]}, any]; got shape {tuple(t.shape)}")
    check_device(name, t, x)


def checked_indices(name: str, indices: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """``(indices, None)`` after a check that they are in ``[0, size)``.

    Where their values are not read it is ``(indices within [0, size), which of them were not)``: a gather of the first
    is safe, and what comes of the others can be made NaN.
    """
    if indices.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor; got {indices.dtype}")
    if size == 0 and indices.numel():
        raise ValueError(f"{name} must be in [0, 0), so there can be none; got {indices.numel()}")
    if not readable(indices):
        return indices.clamp(0, max(size - 1, 0)), (indices < 0) | (indices >= size)
    if indices.numel():
        for value in torch.aminmax(indices):
            if not 0 <= value < size:
                raise ValueError(f"{name} must be in [0, {size}); got {int(value)}")
    return indices, None


def check_choice(name: str, value, choices) -> None:
    if not isinstance(value, (str, type(None))) or value not in choices:
        got = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {got}")


def _check_real(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def check_number(name: str, value: float) -> None:
    """A finite number, or a symbolic one."""
    _check_real(name, value)
    if isinstance(value, float) and not -math.inf < value < math.inf:  # not by a function: value may be symbolic
        raise ValueError(f"{name} must be finite; got {value}")
    if isinstance(value, int) and not _INT64[0] <= value <= _INT64[1]:
        raise ValueError(f"{name} must fit into 64 bits; got {value}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__}")


def check_share(name: str, value: float) -> None:
    _check_real(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1; got {value}")


def check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, _INTEGER):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    if value >= _COUNTS:
        raise ValueError(f"{name} must be below 2^31; got {value}")


def required(name: str, user: str, install: str) -> ModuleType:
    """A module that only ``user`` needs; ``install`` is what pip installs it by.

    Raises:
        ImportError: it is not there.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{user} needs {name.split('.')[0]}: pip install {install}; got: {error}") from error


def checked_seed(seed: Tensor | int | None, p_name: str, p: float, x: Tensor) -> Tensor | None:
    """The dropout seed as int64 ``[1]`` on the device of ``x``; None where nothing is dropped."""
    if seed is None and p.__class__ is float and p == 0:
        return None
    check_share(p_name, p)
    if isinstance(seed, Tensor):
        check_dense("seed", seed)
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be int64; got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element; got shape {tuple(seed.shape)}")
        check_device("seed", seed, x)
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int64 tensor, an int or None; got {type(seed).__name__}")
        if not _INT64[0] <= seed <= _INT64[1]:
            raise ValueError(f"seed must fit into 64 bits; got {seed}")
    if p == 0:
        return None
    if seed is None:
        return torch.randint(_INT64[1], (1,), device=x.device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)
