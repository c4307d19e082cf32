"""Which backend serves which op on which tensors, and why the others do not.

``auto`` takes the first backend of the tensor's device that can serve the call, else the reference, and says so once
where a kernel exists but cannot be used.  A backend asked for by name never falls back: it raises, with the reason.

On CUDA Triton is the complete backend.  The C++ kernels serve what the host bounds, calls of few rows, since a call of
theirs costs a fraction of Triton's; and whatever they can where Triton is missing.

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
_AUTO = {"cpu": ("native",), "cuda": ("triton", "native")}  # what `auto` tries, by device: for few rows the last first
FEW_ROWS = 16_384  # on CUDA; calls of fewer are thought to be bound by the host. It is an estimate: nobody measured it.
NAMES = ("auto", *KERNELS, "reference")


def _checked(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")
    return name


_START = _checked(os.environ.get("MILKERNELS_BACKEND", "auto"), "MILKERNELS_BACKEND")
_DOUBLE = torch.float64  # at hand: a call of a few instances feels every look-up
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


def choose(
    op: str,
    x: Tensor,
    parameters: Sequence[Tensor | None] = (),
    requested: str | None = None,
    needs: tuple[str, ...] = (),
) -> str:
    """The backend that serves this call, which ``needs`` these of `native.lacks` beyond its op.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailable: the backend asked for by name (argument, ``use_backend`` or ``MILKERNELS_BACKEND``) cannot.
    """
    double = False
    for t in parameters:
        if t is not None and t.dtype is _DOUBLE:
            double = True
    if not _torch.eager():
        return _choose_in_transform(op, x, parameters, double, requested, needs)
    if requested is None:
        requested = _context.current() or _START
    elif requested.__class__ is not str:
        _checked(requested, "backend")
    device = _torch.device_type(x)
    key = requested, op, device, x.dtype, double, needs, device == "cuda" and x.shape[0] < FEW_ROWS
    served = _served.get(key)
    if served is None:
        _checked(requested, "backend")
        served, said = _choose(*key)
        if said is None:
            _served[key] = served
        else:
            _say_once(op, *said)
    return served


# By (backend asked for, op, device type, type of x, whether a parameter is float64, what else the call needs, whether
# it has few rows on CUDA).
_served: dict[tuple, str] = {}


def _choose(requested: str, op: str, device: str, dtype, double: bool, needs, few: bool):
    """The backend that serves such a call; and, where ``auto`` would rather have taken another one than the reference,
    which and why it does not serve: ``(name, reason)``, else None."""
    kind = op, device, dtype, double, needs
    if requested != "auto":
        if (reason := why_not(requested, *kind)) is not None:
            others = [name for name in KERNELS if why_not(name, *kind) is None]
            can = f"; backend={others[0]!r} can" if others else ""
            raise BackendUnavailable(f"backend {requested!r} cannot serve {op}: {reason}{can}")
        return requested, None
    reasons = [(name, why_not(name, *kind)) for name in _AUTO.get(device, ())]
    able = [name for name, reason in reasons if reason is None]
    if able:
        return able[-1 if few else 0], None
    missed = [(name, reason) for name, reason in reasons if reason != _NO_KERNEL.format(op)]
    return "reference", missed[0] if missed else None


def _choose_in_transform(op: str, x: Tensor, parameters, double: bool, requested: str | None, needs) -> str:
    """The same where a compiler, a trace or a transform looks into the call.

    On CUDA it is Triton's, if it is there, whatever the number of rows: to read that would compile each program twice,
    and specialise one that is compiled for any number.  A compiled call costs the host little anyway.
    """
    if requested is None:
        requested = _traced[-1] if _traced else _context.backend or _START
    requested = _checked(requested, "backend")
    beyond = _beyond_kernels(x, *parameters)
    if requested == "auto":
        # PyTorch's own operators: what any program loads, and what can be transformed while it is compiled.
        if _torch.exporting() or (_torch.transforming() and torch.compiler.is_dynamo_compiling()):
            return "reference"
        served, said = _choose(requested, op, x.device.type, x.dtype, double, needs, False)
        if served == "reference" and said is not None:
            _say_once(op, *said)
        elif served != "reference" and beyond is not None:
            _say_once(op, served, beyond)
            return "reference"
        return served
    served, _ = _choose(requested, op, x.device.type, x.dtype, double, needs, False)
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


def why_not(
    backend: str,
    op: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    double: bool = False,
    needs: tuple[str, ...] = (),
) -> str | None:
    """Why ``backend`` cannot serve ``op`` for instances of that type on that device, ``double`` if a parameter is
    float64, where the call ``needs`` these of `native.lacks`; None if it can."""
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
    if needs and module is native:
        lacking = native.lacks(device)
        for need in needs:
            if need in lacking:
                return f"CUDA's C++ kernels have {lacking[need]}"
    return None


def _say_once(op: str, backend: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (op, reason) in _warned:
        return
    _warned.add((op, reason))
    warnings.warn(f"milkernels: {op} runs on the reference; {backend}: {reason}", stacklevel=5)


def report(ops: tuple[str, ...]) -> list[tuple[str, str, str, dict[str, str]]]:
    """Rows ``(op, device, who serves it, {other backend: why not})`` for float32 tensors on CPU and CUDA."""
    rows = []
    for op in ops:
        for device, order in _AUTO.items():
            reasons = {name: why_not(name, op, device) for name in KERNELS}
            able = [name for name in order if reasons[name] is None]
            serving = able[0] if able else "reference"
            if len(able) > 1:
                serving = f"{able[-1]} below {FEW_ROWS:,} rows, {able[0]} from there on and under torch.compile"
            rows.append((op, device, serving, {n: r for n, r in reasons.items() if r is not None}))
    return rows
