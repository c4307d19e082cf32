"""Which backend serves which op on which tensors, and why the others do not.

``auto`` takes the first backend of the tensor's device that can serve the call, else the reference, and says so once
where a kernel exists but cannot be used.  A backend asked for by name never falls back: it raises, with the reason.

Compiled ops know reverse mode, once, and vmap, which calls them for each of its slices.  What torch.func and forward
mode differentiate, and what leaves for ONNX or a jit trace, is the reference's.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from milkernels import _context, _torch, native, triton
from milkernels.arguments import DTYPES

KERNELS = {"native": native, "triton": triton}
# What `auto` tries, by device. The native kernels for CUDA are there for where Triton is not, until a recorded
# measurement says at which sizes they are faster.
_AUTO = {"cpu": ("native",), "cuda": ("triton", "native")}
NAMES = ("auto", *KERNELS, "reference")


def _checked(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in NAMES:
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


class BackendUnavailable(RuntimeError):
    """The backend that was asked for by name cannot serve the call; the message says why."""


NOT_IN_ONNX = 'ONNX has no compiled ops; export with backend="reference"'
NOT_IN_TRACE = 'torch.jit.trace cannot note the arguments of compiled ops; trace with backend="reference"'
DIFFERENTIATED_ONCE = (
    "compiled ops are differentiated once and in reverse mode, by autograd; "
    'torch.func and forward mode go through backend="reference"'
)


def choose(op: str, x: Tensor, parameters: Sequence[Tensor | None] = (), requested: str | None = None) -> str:
    """The backend that serves this call.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailable: the backend asked for by name (argument, ``use_backend`` or ``MILKERNELS_BACKEND``) cannot.
    """
    double = False
    for t in parameters:
        if t is not None and t.dtype == torch.float64:
            double = True
    if not _torch.eager():
        return _choose_in_transform(op, x, parameters, double, requested)
    if requested is None:
        requested = _context.current() or _START
    elif requested.__class__ is not str:
        _checked(requested, "backend")
    key = requested, op, x.device.type, x.dtype, double
    served = _served.get(key)
    if served is None:
        _checked(requested, "backend")
        served, said = _choose(*key)
        if said is None:
            _served[key] = served
        else:
            _say_once(op, *said)
    return served


_served: dict[tuple, str] = {}  # (backend asked for, op, device type, type of x, whether a parameter is float64)


def _choose(requested: str, op: str, *kind) -> tuple[str, tuple[str, str] | None]:
    """The backend that serves such tensors; and, where ``auto`` would rather have taken another one, which and why it
    does not serve."""
    if requested != "auto":
        if (reason := why_not(requested, op, *kind)) is not None:
            raise BackendUnavailable(f"backend {requested!r} cannot serve {op}: {reason}")
        return requested, None
    missed = None
    for name in _AUTO.get(kind[0], ()):
        reason = why_not(name, op, *kind)
        if reason is None:
            return name, None
        if missed is None and reason != _NO_KERNEL.format(op):
            missed = name, reason
    return "reference", missed


def _choose_in_transform(op: str, x: Tensor, parameters, double: bool, requested: str | None) -> str:
    """The same where a compiler, a trace or a transform looks into the call."""
    if requested is None:
        requested = _traced[-1] if _traced else _context.backend or _START
    requested = _checked(requested, "backend")
    beyond = _beyond_kernels(x, *parameters)
    if requested == "auto":
        # PyTorch's own operators: what any program loads, and what can be transformed while it is compiled.
        if _torch.exporting() or (_torch.transforming() and torch.compiler.is_dynamo_compiling()):
            return "reference"
        served, said = _choose(requested, op, x.device.type, x.dtype, double)
        if served == "reference" and said is not None:
            _say_once(op, *said)
        elif served != "reference" and beyond is not None:
            _say_once(op, served, beyond)
            return "reference"
        return served
    served, _ = _choose(requested, op, x.device.type, x.dtype, double)
    if served != "reference" and beyond is not None:
        raise BackendUnavailable(f"backend {served!r} cannot serve {op}: {beyond}")
    return served


def _beyond_kernels(*tensors: Tensor | None) -> str | None:
    if _torch.exporting():
        return NOT_IN_ONNX if torch.onnx.is_in_onnx_export() else NOT_IN_TRACE
    # A compiler cannot look into tensors: inside of its graph the op itself refuses.
    if not _torch.transforming() or torch.compiler.is_dynamo_compiling():
        return None
    return DIFFERENTIATED_ONCE if any(t is not None and _torch.differentiated(t) for t in tensors) else None


_NO_KERNEL = "it has no kernel for {}"


def why_not(backend: str, op: str, device: str, dtype: torch.dtype = torch.float32, double: bool = False) -> str | None:
    """Why ``backend`` cannot serve ``op`` for instances of that type on that device, ``double`` if a parameter is
    float64; None if it can."""
    if backend == "reference":
        return None
    module = KERNELS[backend]
    if device not in module.device_types():
        return f"it has no kernels for {device} tensors"
    if (error := module.load_error(device)) is not None:
        return error
    if not _torch.has_kernel(f"milkernels::{op}_fwd.{backend}", device):
        return _NO_KERNEL.format(op)
    if dtype not in DTYPES:
        return f"it has no kernels for {dtype}"
    if double and dtype != torch.float64:
        return f"float64 parameters with {dtype} x"
    return None


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
            reasons = {name: why_not(name, op, device) for name in KERNELS}
            serving = next((name for name in _AUTO[device] if reasons[name] is None), "reference")
            rows.append((op, device, serving, {n: r for n, r in reasons.items() if r is not None}))
    return rows
