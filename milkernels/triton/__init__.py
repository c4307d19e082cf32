"""Adapter to the Triton kernels: their registration with PyTorch's dispatcher.

Triton is imported when a kernel is first called. With ``TRITON_INTERPRET=1`` set before that, Triton runs kernels on
the CPU, slowly and in Python: so their numbers can be tested where there is no GPU. ``auto`` never chooses that.
"""

import importlib
import importlib.util
import os

import torch
from torch import Tensor

from milkernels import _torch

_LIBRARY = torch.library.Library("milkernels", "IMPL")
_modules: dict[str, str] = {}  # of every kernel that was registered: the module of this folder that has it


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def load_error(device: str = "cuda") -> str | None:
    """Why there are no Triton kernels here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton`"
    return None


def device_types() -> tuple[str, ...]:
    return ("cuda", "cpu") if interpreted() else ("cuda",)


def register(name: str, module: str, devices: tuple[str, ...] | None = None) -> None:
    """Registers the function ``name`` of ``milkernels.triton.<module>`` as the kernel of the op of that name."""
    _modules[name] = module
    for device in devices or device_types():
        _LIBRARY.impl(f"{name}.triton", kernel(name), device.upper())


def kernels() -> dict[str, str]:
    """The raw ops that have a kernel here, and the module that has it."""
    return dict(_modules)


def kernel(name: str):
    """The kernel of that name, which runs on the device of its first argument."""
    found = None

    def call(first: Tensor, *args):
        nonlocal found
        found = found or getattr(importlib.import_module(f"milkernels.triton.{_modules[name]}"), name)
        with _torch.without_autocast():
            if not first.is_cuda:
                return found(first, *args)
            with torch.cuda.device(first.device):
                return found(first, *args)

    return call
