"""Adapter to the compiled extension.

The C++ kernels are compiled once per instruction set, each into a module of its own; importing one registers its
kernels with PyTorch's dispatcher.  Exactly one is imported: the best that this machine runs, by PyTorch's own
judgement, so ``ATEN_CPU_CAPABILITY=default|avx2|avx512`` chooses here as it does in PyTorch.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

_MODULES = {"AVX512": "_C_avx512", "AVX2": "_C_avx2", "DEFAULT": "_C_default"}  # best first
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = frozenset(
    (
        *("softmax_pool", "query_pool", "query_scores", "weighted_pool", "mean_pool", "max_pool"),
        *("attention_pool", "attention_scores", "loss_attention_pool"),
        *("dsmil", "dsmil_pool", "instance_max"),
        *("segment_softmax", "attention_weights", "topk_instances"),
    )
)


def emulated() -> bool:
    """Whether calls on CPU tensors run the CUDA kernels, on the host and slowly: so their numbers can be tested where
    there is no GPU. Set ``MILKERNELS_EMULATE_CUDA=1`` before this package is imported."""
    return os.environ.get("MILKERNELS_EMULATE_CUDA") == "1"


def _load() -> tuple[ModuleType | None, str | None]:
    """The best extension module that was built and that this machine runs, or None and why not."""
    if emulated():
        return _imported("_C_emulated")
    order = list(_MODULES)
    capability = torch.backends.cpu.get_cpu_capability()
    candidates = order[order.index(capability) if capability in order else -1 :]
    error = None
    for name in candidates:
        module, failure = _imported(_MODULES[name])
        if module is not None:
            return module, None
        error = error or failure
    return None, error


def _imported(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"milkernels.{name}"), None
    except ImportError as failure:
        return None, f"the compiled extension could not be imported ({failure}); build it with `pip install .`"


_extension, _load_error = _load()


def load_error() -> str | None:
    """Why there is no compiled extension, or None."""
    return _load_error


def build_info() -> dict[str, str]:
    """What the loaded extension says of itself; empty where there is none."""
    return {} if _extension is None else {"module": _extension.__name__, **_extension.build_info()}


def product_rate() -> float | None:
    """FLOP/s at which the kernels' float32 tile products run on this machine now; None without the extension."""
    return None if _extension is None else _extension.product_rate()


def unsupported(op: str, x: Tensor, *parameters: Tensor | None) -> str | None:
    """Why this backend cannot serve ``op`` on these tensors, or None if it can."""
    if op not in OPS:
        return f"it has no kernel for {op}"
    if _extension is None:
        return _load_error
    if x.device.type != "cpu":
        return f"it has no kernels for {x.device.type} tensors"
    if x.dtype not in _DTYPES:
        return f"it has no kernels for {x.dtype}"
    if x.dtype != torch.float64 and any(p is not None and p.dtype == torch.float64 for p in parameters):
        return f"float64 parameters with {x.dtype} x"
    return None
