"""What is asked of private parts of PyTorch: which transforms are at work, and whether an op is inside of them.

`transforming` and `exporting` are asked on every call, so they read flags; both can be traced by torch.compile.
"""

from contextvars import Context

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch
_TRACING_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # fake, proxy, functional
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")  # of PyTorch's older vmap


def transforming() -> bool:
    """Whether anything of torch.func is at work, or a level of forward mode is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batching_gradients() -> bool:
    """Whether a backward is run for several gradients at once, by ``is_grads_batched`` or ``vectorize=True``."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def context_of_backward() -> Context | None:
    """In a thread of autograd, which has none of its own: that of the thread that called backward."""
    return torch._C._get_obj_in_tls("context") if torch._C._is_key_in_tls("context") else None


def exporting() -> bool:
    """Whether a graph is made that has to do without this package: a jit trace, or one for ONNX by either exporter."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def in_onnx_export() -> bool:
    """The same of ONNX alone. Its own flag takes microseconds to read, so it is asked in the traces that it makes."""
    return exporting() and torch.onnx.is_in_onnx_export()


def differentiated(tensor: Tensor) -> bool:
    """Whether torch.func or forward mode differentiates by it, through any number of vmaps around it."""
    forward = forward_ad._current_level >= 0
    while _functorch.is_functorch_wrapped_tensor(tensor):
        # The tangent of an outer level cannot be read inside of others, so in forward mode the wrapper has to do.
        if _functorch.is_gradtrackingtensor(tensor) and (forward or tensor.requires_grad):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return forward and forward_ad.unpack_dual(tensor).tangent is not None


def has_values(tensor: Tensor) -> bool:
    """Whether the values of a CPU tensor are real and may be read, i.e. nothing is tracing."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False  # FakeTensor, FunctionalTensor and others that are more than their own values
    if _functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if torch._C._len_torch_dispatch_stack() == 0:
        return True
    return all(torch._C._get_dispatch_mode(mode) is None for mode in _TRACING_MODES)
