"""Every use of a private part of PyTorch: transforms, dispatch keys, autograd's threads, hooks of modules, pytrees.

`eager`, `transforming` and `exporting` are asked on every call, so they read flags; all can be traced by torch.compile.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import Context

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _global_hooks
from torch.utils import _pytree as pytree  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass  # noqa: F401

_functorch = torch._C._functorch
_TRACING_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())  # fake, proxy, functional
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")  # of PyTorch's older vmap
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCPU
)
_PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Transforms and traces


def eager() -> bool:
    """Whether nothing looks into a call: no compiler, no trace, nothing of torch.func, no level of forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def unobserved(tensor: Tensor) -> bool:
    """Whether a call with this tensor is eager, and no mode and no subclass of tensors would see the ops in it."""
    plain = eager() and tensor.__class__ in _PLAIN  # in this order: a compiler knows the first
    modes = plain and torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return plain and not modes and not batching_gradients()


def transforming() -> bool:
    """Whether anything of torch.func is at work, or a level of forward mode is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batching_gradients() -> bool:
    """Whether a backward is run for several gradients at once, by ``is_grads_batched`` or ``vectorize=True``."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def context_of_backward() -> Context | None:
    """In a thread of autograd, which has no context of its own: that of the thread that called backward."""
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


def to_list(tensor: Tensor) -> list:
    """``tensor.tolist()``.  That of PyTorch 2.9 fails within torch.func, where single numbers can be read."""
    try:
        return tensor.tolist()
    except RuntimeError:
        return [tensor[i].item() for i in range(len(tensor))]


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


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, which makes two objects."""
    return "cpu" if tensor.is_cpu else tensor.device.type


# The dispatcher

OpOverload = torch._ops.OpOverload
below_autograd = torch._C._AutoDispatchBelowAutograd  # within the block, calls go past autograd


def has_kernel(overload: str, device_type: str) -> bool:
    """Whether a kernel was registered for tensors of that device: ``milkernels::mean_pool_fwd.native``, "cpu"."""
    known = torch._C._dispatch_has_kernel(overload)  # an op that the reference alone serves is not
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(overload, device_type.upper())


# What torch.compiler.assume_constant_result does, without its import of the compiler: that calls it while it traces.
has_kernel._dynamo_marked_constant = True


def direct(op: Callable) -> Callable:
    """An overload without a frame of Python around it, 0.4 us a call, for what no compiler traces."""
    return op._op if isinstance(op, OpOverload) else op


def direct_apply(function: type[torch.autograd.Function]) -> Callable:
    """``function.apply`` where no transform of torch.func is active, without the Python that looks for these and into
    every argument, 10 us a call."""
    return super(torch.autograd.Function, function).apply


def without_autocast() -> torch._C._ExcludeDispatchKeyGuard:
    """Within the block PyTorch's products keep the types that they are given. Cheaper than ``torch.autocast``."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


# Modules


def called_hooks(module: nn.Module) -> list[str]:
    """The kinds of hooks that a call of the module runs, beside those of all modules."""
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return []
    return [kind.strip("_").replace("_", " ") for kind in _HOOKS if getattr(module, kind)]


def weight_and_bias(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """``(layer.weight, layer.bias)``. Python looks for parameters everywhere else first, so a plain layer is asked
    where it keeps them; others may compute them or have them as attributes."""
    own, parameters = layer.__dict__, layer._parameters
    plain = type(layer) is nn.Linear and "weight" in parameters and "bias" in parameters
    if plain and "weight" not in own and "bias" not in own:
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias


def has_global_hooks() -> bool:
    """Whether hooks for all modules are registered."""
    return any(getattr(_global_hooks, f"_global{kind}") for kind in _HOOKS)


def submodules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules inside of it by name, as they are registered: those that are None and the same ones again too."""
    return module._modules


def has_own(module: nn.Module, *names: str) -> bool:
    """Whether these are parameters (or None) that the module registered, not tensors that something computes."""
    return module._parameters.keys() >= set(names)


def tensors_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The parameters and buffers that the module itself registered, by name."""
    return module._parameters | module._buffers


def registered(module: nn.Module, path: str, name: str) -> Tensor:
    """The parameter or buffer of that name of a submodule."""
    for part in path.split(".") if path else ():
        module = module._modules[part]
    return module._parameters[name] if name in module._parameters else module._buffers[name]


def in_python(expression) -> str:
    """An expression of symbolic sizes as Python has it.  What prints it takes a second to import."""
    from torch.utils._sympy.printers import PythonPrinter

    return PythonPrinter().doprint(expression)


def ragged_dimension(nested: Tensor) -> int:
    """The dimension of a jagged nested tensor whose size differs."""
    return nested._ragged_idx


# Tensors


def version(tensor: Tensor) -> int:
    """How often it was written to in place."""
    return tensor._version


def run_by_python(function: Callable) -> None:
    """A compiler does not look into the function, as by torch.compiler.disable, whose import of the compiler is not
    needed here."""
    function._torchdynamo_disable = True


# Processes


def world_size() -> int:
    """Of all processes; 1 where there are no groups."""
    return torch.distributed.get_world_size() if has_groups() else 1


def has_groups() -> bool:
    """Whether this process is one of several, or could be."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def group_of(group) -> tuple[str, int, int]:
    """``(name, size, rank)`` of a ProcessGroup, a DeviceMesh of one dimension, or None, all processes."""
    if not has_groups():
        raise RuntimeError("torch.distributed has no process group: call torch.distributed.init_process_group first")
    distributed = torch.distributed
    mesh = sys.modules.get("torch.distributed.device_mesh")
    if mesh is not None and isinstance(group, mesh.DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or tuple(range(group.ndim))
            raise ValueError(f"group must be a mesh of one dimension, mesh[name]; got one of {group.ndim}: {names}")
        group = group.get_group()
    group = distributed.group.WORLD if group is None else group
    if group is distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must have this process in it; got one without it")
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None; got {type(group).__name__}")
    return group.group_name, group.size(), group.rank()


def all_gather(tensor: Tensor, size: int, name: str) -> Tensor:
    """``[W, ...]``: that of each rank of a group, all of one shape. It waits, is traced, and has no gradient."""
    collective = torch.ops._c10d_functional
    gathered = collective.all_gather_into_tensor(tensor.contiguous().flatten(), size, name)
    return collective.wait_tensor(gathered).view(size, *tensor.shape)


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor. Where their module was not loaded there are none, and loading it takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _sharded_states(module: nn.Module) -> list[tuple[nn.Module, object]]:
    """``(module, state)`` of each that FSDP2 shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [(m, m._get_fsdp_state()) for m in module.modules() if isinstance(m, kind)]


@contextlib.contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Within the block the module's parameters are whole and calls of it communicate nothing, whatever FSDP2 shards.

    FSDP2 has this for modules that are run again in a backward, which has gathered their parameters: in the state
    PRE_BACKWARD its hooks convert types and do no more.
    """
    states = [(m, s, s._training_state, any(map(is_dtensor, m.parameters()))) for m, s in _sharded_states(module)]
    for m, *_ in states:
        m.unshard()
    try:
        for _, state, now, _ in states:
            state._training_state = type(now).PRE_BACKWARD
        yield
    finally:
        for m, state, before, sharded in states:
            state._training_state = before
            if sharded:
                m.reshard()


def sharded_as(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient of a whole parameter, averaged over ranks and cut as FSDP2 cut the parameter; None is 0, since
    every rank has to take part."""
    if not is_dtensor(parameter):
        return gradient
    if gradient is None:
        gradient = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    module = sys.modules["torch.distributed.tensor"]
    mesh = parameter.device_mesh
    partial = module.DTensor.from_local(gradient / mesh.size(), mesh, [module.Partial()] * mesh.ndim, run_check=False)
    return partial.redistribute(placements=parameter.placements)
