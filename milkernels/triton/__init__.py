"""Adapter to the Triton kernels: which calls they serve, and their registration with PyTorch's dispatcher.

Triton is imported when a kernel is first called. With ``TRITON_INTERPRET=1`` set before that, Triton runs kernels on
the CPU, slowly and in Python: so their numbers can be tested where there is no GPU. ``auto`` never chooses that.
"""

import importlib
import importlib.util
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FAMILIES = {  # module: ops
    "attention": ("attention_pool", "attention_scores"),
    "pooling": (
        *("softmax_pool", "query_pool", "query_scores", "weighted_pool", "mean_pool", "loss_attention_pool"),
        *("segment_softmax", "attention_weights"),
    ),
    "choice": ("instance_max", "max_pool", "topk_instances"),
    "dsmil": ("dsmil", "dsmil_pool"),
}
OPS = frozenset(op for ops in _FAMILIES.values() for op in ops)
_SHARED = {  # the backward of several ops
    "attention": ("attention_pool", "attention_scores"),
    "query": ("query_pool", "query_scores"),
}
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)
_LIBRARY = torch.library.Library("milkernels", "IMPL")


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def load_error() -> str | None:
    """Why there are no Triton kernels here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton`"
    return None


def device_types() -> tuple[str, ...]:
    return ("cuda", "cpu") if interpreted() else ("cuda",)


def unsupported(op: str, x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why this backend cannot serve ``op`` on these tensors, or None if it can."""
    if op not in OPS:
        return f"it has no kernel for {op}"
    if x.device.type not in device_types():
        return f"it has no kernels for {x.device.type} tensors"
    if (error := load_error()) is not None:
        return error
    if x.dtype not in _DTYPES:
        return f"it has no kernels for {x.dtype}"
    if x.dtype != torch.float64 and any(p is not None and p.dtype == torch.float64 for p in parameters):
        return f"float64 parameters with {x.dtype} x"
    return None


def kernels() -> dict[str, str]:
    """``<op>_fwd`` and ``<op>_bwd`` of every op, and the module that has them."""
    found = {f"{op}_fwd": family for family, ops in _FAMILIES.items() for op in ops}
    for family, ops in _FAMILIES.items():
        for op in ops:
            shared = next((name for name, users in _SHARED.items() if op in users), op)
            found[f"{shared}_bwd"] = family
    return found


def kernel(name: str):
    """The kernel of that name, which runs on the device of its first argument."""
    family, found = kernels()[name], None

    def call(first: Tensor, *args):
        nonlocal found
        found = found or getattr(importlib.import_module(f"milkernels.triton.{family}"), name)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):  # PyTorch's own small products keep the types they are given
            if not first.is_cuda:
                return found(first, *args)
            with torch.cuda.device(first.device):
                return found(first, *args)

    return call


for _name in kernels():
    for _device in device_types():
        _LIBRARY.impl(f"{_name}.triton", kernel(_name), _device.upper())
