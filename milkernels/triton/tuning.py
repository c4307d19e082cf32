"""Which kernels a call takes, where there are several that can serve it: a static table, never timed at run time.

An entry stands for a measurement on that device, recorded in ``benchmarks/results/``; what has none takes the default:
the library's products on chunks of rows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

SCORES = ("chunked", "fused")
PRODUCTS = ("library", "split")


@dataclass(frozen=True)
class Plan:
    """``scores``: of attention, on chunks or by the persistent kernel of ``fused``.  ``products`` of float32 at precision
    "highest": the library's, or of three bfloat16 parts each (``split``)."""

    scores: str = "chunked"
    products: str = "library"


_MEASURED: dict[tuple, Plan] = {}  # (compute capability, dtype, width, hidden units): plan
_forced: dict[str, str] = {}


@contextlib.contextmanager
def use(*, scores: str | None = None, products: str | None = None) -> Iterator[None]:
    """Within the block calls take these kernels, where they can serve the call: for tests and measurements."""
    global _forced
    for name, value, choices in (("scores", scores, SCORES), ("products", products, PRODUCTS)):
        if value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    previous, wanted = _forced, {"scores": scores, "products": products}
    _forced = previous | {name: value for name, value in wanted.items() if value is not None}
    try:
        yield
    finally:
        _forced = previous


def plan(device: torch.device, dtype: torch.dtype, width: int, hidden: int) -> Plan:
    """The plan of a call on these sizes."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and _MEASURED else None
    return replace(_MEASURED.get((capability, dtype, width, hidden), Plan()), **_forced)
