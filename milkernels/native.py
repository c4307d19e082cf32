"""Adapter to the compiled extensions.

The C++ kernels are compiled once per instruction set, each into a module of its own; importing one registers its
kernels with PyTorch's dispatcher.  Exactly one is imported: the best that this machine runs, by PyTorch's own
judgement, so ``ATEN_CPU_CAPABILITY=default|avx2|avx512`` chooses here as it does in PyTorch.  The kernels for CUDA
tensors are a module beside it.

PyTorch's C++ interface holds from one patch release to the next, not between minor ones: loaded beside another one, a
module may crash or compute wrongly.  So a module's name has the minor version that it was compiled against, and only
that of the running PyTorch is looked for.
"""

import importlib
import os
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(__file__).parent
_MODULES = {"AVX512": "_C_avx512", "AVX2": "_C_avx2", "DEFAULT": "_C_default"}  # best first
SUFFIX = "_torch" + "_".join(torch.__version__.split(".")[:2])  # of those that the running PyTorch may load


# An isolated build compiles against the newest PyTorch, not the one that is installed.
_BUILD = (
    "in the source tree, with a C++ compiler (and CUDA's for kernels for CUDA tensors), this builds it: "
    '`pip install "setuptools>=77" ninja`, then '
    "`pip install --no-build-isolation --no-deps -e .`; "
    "where make installed it, `make MILKERNELS_CPU=all` (the default is the best instruction set alone)"
)


def emulated() -> bool:
    """Whether calls on CPU tensors run the CUDA kernels, on the host and slowly: so their numbers can be tested where
    there is no GPU. Set ``MILKERNELS_EMULATE_CUDA=1`` before this package is imported."""
    return os.environ.get("MILKERNELS_EMULATE_CUDA") == "1"


def _is_here(name: str) -> bool:
    """Whether this folder has the module for the running PyTorch. Python itself would look further: where another
    checkout is installed in editable mode, it finds the modules that were compiled there."""
    return PathFinder.find_spec(f"milkernels.{name}{SUFFIX}", [str(_FOLDER)]) is not None


def _imported(name: str) -> tuple[ModuleType | None, str | None]:
    """The module for the running PyTorch, or None and why not."""
    full = f"milkernels.{name}{SUFFIX}"
    if full not in sys.modules and not _is_here(name):  # who puts one there takes it from elsewhere on purpose
        return None, f"the compiled extension {name} {_missing(name)}; {_BUILD}"
    try:
        return importlib.import_module(full), None
    except ImportError as failure:
        return None, f"the compiled extension could not be imported ({failure}); {_BUILD}"


def _missing(name: str) -> str:
    """What there is in the place of a module that is not there."""
    suffixes = {file.name.partition(".")[0].removeprefix(name) for file in _FOLDER.glob(f"{name}_torch*")}
    if not suffixes:
        return "was not built"
    if SUFFIX in suffixes:
        return "is built for another Python"
    versions = ", ".join(sorted(suffix.removeprefix("_torch").replace("_", ".") for suffix in suffixes))
    return f"is built for PyTorch {versions}, and this is {torch.__version__}"


def is_built(instruction_set: str) -> bool:
    """Whether there are kernels of default, avx2 or avx512 for the running PyTorch; they are not loaded."""
    return _is_here(_MODULES[instruction_set.upper()])


def _load_cpu() -> tuple[ModuleType | None, str | None]:
    """The best module that was built and that this machine runs."""
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


def _load_cuda() -> tuple[ModuleType | None, str | None]:
    if torch.version.cuda is None:
        return None, "this PyTorch is not built for CUDA"
    return _imported("_C_cuda")


_loaded = {"cpu": _load_cpu(), "cuda": _load_cuda()}  # device type: the module or None, and why not
_extension = _loaded["cpu"][0]
_any = next((module for module, _ in _loaded.values() if module is not None), None)


def load_error(device: str = "cpu") -> str | None:
    """Why there are no compiled kernels for tensors on this type of device, or None."""
    return _loaded[device][1]


def device_types() -> tuple[str, ...]:
    return tuple(_loaded)


# What a call may need beyond its op, and kernels that serve what the host bounds do without, in words.
_CUDA_LACKS = {
    "embed": "no embedding stage",
    "q2": "no MLP query",
    "value": "no value but a linear one without dropout",
}


def lacks(device: str) -> dict[str, str]:
    """What calls may need beyond their op and kernels for tensors on that type of device do not have."""
    return _CUDA_LACKS if device == "cuda" or emulated() else {}


def build_info(device: str = "cpu") -> dict[str, str]:
    """What the loaded module for that device says of itself; empty where there is none."""
    module = _loaded[device][0]
    return {} if module is None else {"module": module.__name__, **module.build_info()}


def differentiable_call(**plan) -> Callable | None:
    """A function that calls a raw op without Python between its kernels, differentiably; None without an extension.
    It reaches kernels through the dispatcher, so any module's serves every backend."""
    return None if _any is None else _any.differentiable_call(**plan)


def raw_call(name: str, backend: str) -> Callable | None:
    """A shorter way to a raw op, which takes arguments in their order; None without an extension."""
    return None if _any is None else _any.raw_call(f"milkernels::{name}", backend)


def release_workspace() -> None:
    """Frees the workspace that this thread keeps from call to call, so that what a call needs can be measured."""
    if _extension is not None and hasattr(_extension, "release_workspace"):  # CUDA's kernels keep none
        _extension.release_workspace()


def product_rate() -> float | None:
    """FLOP/s at which the kernels' float32 tile products run on this machine now; None without the extension."""
    return None if _extension is None else _extension.product_rate()
