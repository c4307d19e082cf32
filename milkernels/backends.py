"""Which backend serves which op on which tensors, and why the others do not.

``auto`` takes the first backend of the tensor's device that can serve the call, else the reference, and says so once
where a kernel exists but cannot be used.  A backend asked for by name never falls back: it raises, with the reason.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from milkernels import native, triton

KERNELS = {"native": native, "triton": triton}
# What `auto` tries, by device. The native kernels for CUDA are chosen by name only, until a recorded measurement says
# that they are faster than Triton's.
_AUTO = {"cpu": ("native",), "cuda": ("triton",)}
NAMES = ("auto", *KERNELS, "reference")


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")
    return name


_default = _checked(os.environ.get("MILKERNELS_BACKEND", "auto"), "MILKERNELS_BACKEND")
_warned: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls that name no backend use ``name``: auto, native, triton or reference."""
    global _default
    previous, _default = _default, _checked(name, "backend")
    try:
        yield
    finally:
        _default = previous


def why_not(backend: str, op: str, x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why ``backend`` cannot serve ``op`` on these tensors, or None if it can."""
    if backend == "reference":
        return None
    return KERNELS[backend].unsupported(op, x, *parameters)


def choose(op: str, x: Tensor, *parameters: Tensor | None, requested: str | None = None) -> str:
    """The backend that serves this call.

    Raises:
        ValueError: an unknown backend name.
        RuntimeError: the backend asked for by name (argument, ``use_backend`` or ``MILKERNELS_BACKEND``) cannot.
    """
    backend = _default if requested is None else _checked(requested, "backend")
    if backend != "auto":
        reason = why_not(backend, op, x, *parameters)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot serve {op}: {reason}")
        return backend
    for name in _AUTO.get(x.device.type, ()):
        module = KERNELS[name]
        reason = module.unsupported(op, x, *parameters)
        if reason is None:
            return name
        if op in module.OPS:
            _say_once(name, op, reason)
    return "reference"


def _say_once(backend: str, op: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (op, reason) in _warned:
        return
    _warned.add((op, reason))
    warnings.warn(f"milkernels: {op} runs on the reference; {backend}: {reason}", stacklevel=4)


def report(ops: tuple[str, ...]) -> list[tuple[str, str, str, dict[str, str]]]:
    """Rows ``(op, device, serving backend, {other backend: why not})`` for float32 tensors on CPU and CUDA."""
    rows = []
    for op in ops:
        for device in ("cpu", "cuda"):
            # Only type and device are looked at, so this stands for a tensor on a device that may not be there.
            x = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
            reasons = {name: why_not(name, op, x) for name in NAMES if name not in ("auto", "reference")}
            serving = next((name for name in _AUTO[device] if reasons[name] is None), "reference")
            rows.append((op, device, serving, {n: r for n, r in reasons.items() if r is not None}))
    return rows
