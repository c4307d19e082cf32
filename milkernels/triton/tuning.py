"""Which kernels a call takes, where there are several that can serve it: a static table, never timed at run time.

An entry stands for a measurement on that device, recorded in ``benchmarks/results/``; a call that has none takes the
default, the library's products on slices of rows.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from milkernels.triton import interpreted

SCORES = ("chunked", "fused")
PRODUCTS = ("library", "split")


@dataclass(frozen=True)
class Plan:
    """``scores`` says how attention scores are computed: by products on slices of rows ("chunked") or by the persistent
    kernel of ``fused``.  ``products`` says how float32 products at precision "highest" are: by the library, or from
    three bfloat16 parts of each number (``split``)."""

    scores: str = "chunked"
    products: str = "library"


_MEASURED: dict[tuple, Plan] = {}  # (architecture, dtype, width, hidden units): plan
_forced: dict[str, str] = {}


@contextlib.contextmanager
def use(*, scores: str | None = None, products: str | None = None) -> Iterator[None]:
    """Within the block calls take these kernels, where they can serve the call: for tests and measurements."""
    global _forced
    for name, value, choices in (("scores", scores, SCORES), ("products", products, PRODUCTS)):
        if value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    previous, chosen = _forced, {"scores": scores, "products": products}
    _forced = previous | {name: value for name, value in chosen.items() if value is not None}
    try:
        yield
    finally:
        _forced = previous


def plan(device: torch.device, dtype: torch.dtype, width: int, hidden: int) -> Plan:
    """The plan of a call with rows of ``width`` and ``hidden`` units, in this type on this device."""
    key = (target(device)[1], dtype, width, hidden) if _MEASURED else None
    return replace(_MEASURED.get(key, Plan()), **_forced)


def target(device: torch.device) -> tuple[str, int | str]:
    """The backend and architecture that kernels are compiled for: ("cuda", 90), ("hip", "gfx942"), ("interpreter",
    0)."""
    if interpreted():
        return "interpreter", 0
    from triton.runtime import driver  # only where a kernel is about to run

    found = driver.active.get_current_target()
    return found.backend, found.arch


def large_tiles(device: torch.device) -> bool:
    """Whether there are tensor descriptors (TMA), and shared memory of more than 200 KB for what they load."""
    backend, architecture = target(device)
    return backend == "interpreter" or (backend == "cuda" and 90 <= architecture < 120)


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132  # kernels are interpreted, or compiled for a device that is not there
    return torch.cuda.get_device_properties(device).multi_processor_count
