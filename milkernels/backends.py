"""Which backend serves which op on which tensors, and why the others do not.

``auto`` takes the first backend of the tensor's device that can serve the call, else the reference, and says so once
where a kernel exists but cannot be used.  A backend asked for by name never falls back: it raises, with the reason.

Compiled ops know reverse mode, once, and vmap, which calls them for each of its slices.  What torch.func and forward
mode differentiate, and what leaves for ONNX or a jit trace, is the reference's.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from milkernels import _context, _torch, native, triton

KERNELS = {"native": native, "triton": triton}
# What `auto` tries, by device. The native kernels for CUDA are there for where Triton is not, until a recorded
# measurement says at which sizes they are faster.
_AUTO = {"cpu": ("native",), "cuda": ("triton", "native")}
NAMES = ("auto", *KERNELS, "reference")


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")
    return name


_START = _checked(os.environ.get("MILKERNELS_BACKEND", "auto"), "MILKERNELS_BACKEND")
_traced: tuple[str, ...] = ()  # blocks inside of a graph that is being traced
_warned: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls that name no backend use ``name``: auto, native, triton or reference.

    It counts for this thread and this asyncio task alone; a thread that is started inside begins with
    ``MILKERNELS_BACKEND``.  A generator that is suspended inside of its block lends it to who goes on, as
    ``torch.no_grad`` does.
    """
    global _traced
    _checked(name, "backend")
    if torch.compiler.is_compiling():  # which follows the assignment, not a ContextVar
        _traced = (*_traced, name)
        try:
            yield
        finally:
            _traced = _traced[:-1]
        return
    block = _context.enter(name)
    try:
        yield
    finally:
        _context.leave(block)


def _requested() -> str:
    return _traced[-1] if _traced else _context.backend or _START


def why_not(backend: str, op: str, x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why ``backend`` cannot serve ``op`` on these tensors, or None if it can."""
    if backend == "reference":
        return None
    return KERNELS[backend].unsupported(op, x, *parameters) or _beyond_kernels(x, *parameters)


def _beyond_kernels(*tensors: Tensor | None) -> str | None:
    if _torch.exporting():
        return NOT_IN_ONNX if torch.onnx.is_in_onnx_export() else NOT_IN_TRACE
    # A compiler cannot look into tensors: inside of its graph the op itself refuses.
    if not _torch.transforming() or torch.compiler.is_dynamo_compiling():
        return None
    return DIFFERENTIATED_ONCE if any(t is not None and _torch.differentiated(t) for t in tensors) else None


NOT_IN_ONNX = 'ONNX has no compiled ops; export with backend="reference"'
NOT_IN_TRACE = 'torch.jit.trace cannot note the arguments of compiled ops; trace with backend="reference"'
DIFFERENTIATED_ONCE = (
    "compiled ops are differentiated once and in reverse mode, by autograd; "
    'torch.func and forward mode go through backend="reference"'
)


def choose(op: str, x: Tensor, *parameters: Tensor | None, requested: str | None = None) -> str:
    """The backend that serves this call.

    Raises:
        ValueError: an unknown backend name.
        RuntimeError: the backend asked for by name (argument, ``use_backend`` or ``MILKERNELS_BACKEND``) cannot.
    """
    backend = _requested() if requested is None else _checked(requested, "backend")
    if backend != "auto":
        reason = why_not(backend, op, x, *parameters)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot serve {op}: {reason}")
        return backend
    if _torch.exporting() or (_torch.transforming() and torch.compiler.is_dynamo_compiling()):
        return (
            "reference"  # PyTorch's own operators: what any program loads, and what can be transformed while compiled
        )
    return _first(op, _torch.transforming(), x, *parameters)


def _first(op: str, transformed: bool, *tensors: Tensor | None) -> str:
    """Of the backends that `auto` tries; it says why the one that it would rather have taken does not serve."""
    missed = None
    for name in _AUTO.get(tensors[0].device.type, ()):
        reason = KERNELS[name].unsupported(op, *tensors) or (_beyond_kernels(*tensors) if transformed else None)
        if reason is None:
            return name
        if missed is None and op in KERNELS[name].OPS:
            missed = name, reason
    if missed is not None:
        _say_once(op, *missed)
    return "reference"


def _say_once(op: str, backend: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (op, reason) in _warned:
        return
    _warned.add((op, reason))
    warnings.warn(f"milkernels: {op} runs on the reference; {backend}: {reason}", stacklevel=5)


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
