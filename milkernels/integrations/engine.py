"""How a module's methods are replaced by fused ones, proven before and undone after.

The class of the one instance is replaced by a subclass with the fused methods: parameters, keys, hooks, attributes and
``isinstance`` stay as they are, deepcopy and pickle work, and whatever calls the methods by way of the instance sees
them.  Each fused method reads the layers anew on every call (see ``layers``) and leaves the call to the original method
where they are no longer what was proven, or where it does not serve the arguments.
"""

import copyreg
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from milkernels import _torch
from milkernels.dtypes import autocast_dtype
from milkernels.integrations import proof
from milkernels.integrations.layers import Unfusable, check_global_hooks, check_tensors, original_class, refuse

# What of an attention pooling is fused.
SCORES, SOFTMAX, POOLING, EMBEDDING = "scores", "scores + softmax", "scores + softmax + sum", " + embedding"
_MASKS = ("mask", "attn_mask", "lens")  # arguments that say what is padding


class Structure:
    """A kind of module that is recognised: how it looks, what it is made of, and its methods, fused.

    A fused method is called as ``method(module, parts, *arguments)`` and returns ``NotImplemented``, before any work,
    for arguments it does not serve.
    """

    name: ClassVar[str]
    methods: ClassVar[dict[str, tuple[str, ...]]]  # each replaced method, and the arguments it must take
    opaque: ClassVar[tuple[str, ...]] = ()  # submodules that are called as they are: nothing is asked of them
    embedding: ClassVar[str] = ""  # a submodule in front, of which only the last layer is more than called
    pools: ClassVar[bool] = True  # whether it sums the instances; a model around others sums them itself
    note: ClassVar[str] = ""  # where what is returned differs from the original on purpose
    # Below so many instances eager is faster: in a forward alone, and where gradients are recorded.
    min_instances: ClassVar[tuple[int, int]] = (100, 100)

    def looks_like(self, module: nn.Module) -> bool:
        """Whether attributes and types suggest this structure; proven nothing yet."""
        raise NotImplementedError

    def parts(self, module: nn.Module) -> Any:
        """The parameters and options of what is fused away.  Raises ``Unfusable`` where they cannot be had."""
        raise NotImplementedError

    def bags(self, name: str, given: Mapping[str, Any]) -> Any:
        """The instances among the arguments of a method; what is no tensor is never too few."""
        return given.get(self.methods[name][0])

    def serves(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives nothing but what the fused method takes: a model of one's own may take more."""
        takes = self.methods[name]
        return len(args) <= len(takes) and all(key in takes for key in kwargs)

    def share(self, parts: Any) -> str:
        """What of an attention pooling is fused."""
        front = getattr(parts, "embedding", None)
        return POOLING + (EMBEDDING if getattr(front, "embed", None) is not None else "")

    def instances(self, x: Tensor) -> int:
        """How many there are in the bags."""
        return x.shape[:-1].numel()

    def examples(self, module: nn.Module, parts: Any, inputs: proof.Inputs) -> Iterable[proof.Example]:
        """Calls that, between them, use everything the fused methods do."""
        raise NotImplementedError


_STRUCTURES: list[Structure] = []  # in the order in which they are tried


def register(*structures: Structure) -> None:
    """Has `accelerate` recognise them; a pickled module finds them by their names, which differ."""
    _STRUCTURES.extend(structures)


def has(module: nn.Module, *names: str) -> bool:
    """Whether all of these are submodules."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


# Classes


def structure_of(module: nn.Module) -> Structure | None:
    """The structure by which the module is fused; None where it is not, or not yet."""
    return getattr(type(module), "_milkernels_structure", None)


def _is_ours(module: nn.Module) -> bool:
    """Whether its class is one that was made here, and not one made of such a class."""
    return "_milkernels_original" in vars(type(module))


def is_waiting(module: nn.Module) -> bool:
    """Whether it will be checked at the first call that initialises its parameters."""
    return getattr(type(module), "_milkernels_waiting", False)


def is_lazy(module: nn.Module) -> bool:
    return any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters())


def _original_is_faster(structure: Structure, name: str, module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether the original is faster and does the same: few instances, all real, on a CPU, in a type that it takes."""
    minimum, takes = type(module)._milkernels_minimum, structure.methods[name]
    given = dict(zip(takes, args, strict=False)) | kwargs
    x = structure.bags(name, given)
    if minimum == 0 or torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.device.type != "cpu":
        return False
    if any(given.get(mask) is not None for mask in _MASKS):
        return False
    if autocast_dtype(x) is None and x.dtype != next(module.parameters()).dtype:
        return False
    return structure.instances(x) < (structure.min_instances[torch.is_grad_enabled()] if minimum is None else minimum)


def _fused_method(structure: Structure, name: str, original: Callable) -> Callable:
    fused = getattr(structure, name)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        # A transform or an export sees the model that it was before, in PyTorch's own operators.
        if _torch.transforming() or _torch.exporting() or not structure.serves(name, args, kwargs):
            return original(self, *args, **kwargs)
        if _original_is_faster(structure, name, self, args, kwargs):
            return original(self, *args, **kwargs)
        try:
            check_global_hooks()
            check_tensors(*args, *kwargs.values())
            parts = structure.parts(self)
        except Unfusable:
            return original(self, *args, **kwargs)
        result = fused(self, parts, *args, **kwargs)
        return original(self, *args, **kwargs) if result is NotImplemented else result

    return method


def _method_before_fusing(candidates: tuple[Structure, ...], original: Callable) -> Callable:
    @functools.wraps(original)
    def method(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if is_waiting(self) and not torch.compiler.is_compiling() and not is_lazy(self):
            reason = fuse_if_proven(self, candidates, type(self)._milkernels_minimum)
            if reason is not None:
                warnings.warn(f"milkernels: {original_class(self).__name__} was left alone: {reason}", stacklevel=2)
        return result

    return method


def _reduce_ex(self, protocol):
    """Copied and pickled by its original class and the names of structures (those made for one module: as they are):
    the subclass can not be imported."""
    rebuild, arguments, *rest = original_class(self).__reduce_ex__(self, max(protocol, 2))
    if rebuild is not copyreg.__newobj__:
        raise TypeError(f"{type(self).__name__} is pickled in its own way, which does not keep the fused methods")
    names = tuple(s.name if s in _STRUCTURES else s for s in type(self)._milkernels_candidates)
    how = (names, type(self)._milkernels_minimum, is_waiting(self))
    return (_rebuild, (original_class(self), *how, *arguments[1:]), *rest)


def _rebuild(original: type, names: tuple, minimum: int | None, waiting: bool, *arguments) -> nn.Module:
    by_name = {s.name: s for s in _STRUCTURES}
    candidates = tuple(by_name[s] if isinstance(s, str) else s for s in names if s in by_name or not isinstance(s, str))
    cls = _subclass(original, candidates, minimum, waiting)
    return cls.__new__(cls, *arguments)


@functools.cache  # one class for all instances, so that what torch.compile made serves them all
def _subclass(original: type, candidates: tuple[Structure, ...], minimum: int | None, waiting: bool) -> type:
    made = {"_milkernels_original": original, "_milkernels_candidates": candidates, "__reduce_ex__": _reduce_ex}
    made["_milkernels_minimum"] = minimum  # instances; None: the structure's own
    made |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    if waiting:
        made["_milkernels_waiting"] = True
        for name in dict.fromkeys(name for structure in candidates for name in structure.methods):
            if hasattr(original, name):
                made[name] = _method_before_fusing(candidates, getattr(original, name))
    else:
        (structure,) = candidates
        made["_milkernels_structure"] = structure
        for name in structure.methods:
            made[name] = _fused_method(structure, name, getattr(original, name))
    return type(original)(original.__name__, (original,), made)


# Swapping


def fuse_if_proven(module: nn.Module, candidates: Iterable[Structure], minimum: int | None) -> str | None:
    """Fuses the module by the first of the structures that proves right; None, or why none did."""
    original, fused = original_class(module), structure_of(module)
    if fused is not None and not _is_ours(module):  # made of ours, by a parametrization say
        return None
    if fused is not None:
        module.__class__ = _subclass(original, (fused,), minimum, False)
        return None
    module.__class__ = original
    reasons = []
    for structure in candidates:
        reason = _why_not(module, structure)
        if reason is None:
            module.__class__ = _subclass(original, (structure,), minimum, False)
            return None
        reasons.append(reason)
    return "; or ".join(dict.fromkeys(reasons))


def fuse_as(module: nn.Module, structure: Structure, minimum: int | None) -> None:
    """Fuses the module by a structure that was made for it and proven."""
    module.__class__ = _subclass(original_class(module), (structure,), minimum, False)


def fuse_after_first_call(module: nn.Module, candidates: Iterable[Structure], minimum: int | None) -> None:
    """Has the module fused, if a structure proves right, after the first call that initialised its parameters."""
    module.__class__ = _subclass(original_class(module), tuple(candidates), minimum, True)


def undo(module: nn.Module) -> bool:
    """Whether there was anything to undo."""
    if not _is_ours(module):
        return False
    module.__class__ = original_class(module)
    return True


def _why_not(module: nn.Module, structure: Structure) -> str | None:
    try:
        for name, arguments in structure.methods.items():
            _check_method(module, name, arguments)
        return proof.difference(module, structure)
    except Unfusable as reason:
        return str(reason)


def _check_method(module: nn.Module, name: str, arguments: tuple[str, ...]) -> None:
    if name in vars(module):
        refuse(f"its {name} was replaced on the instance")
    method = getattr(type(module), name, None)
    if not inspect.isfunction(method):
        refuse(f"it has no method {name}")
    if not _takes(method, arguments):
        takes = list(inspect.signature(method).parameters)[1:]
        refuse(f"its {name} takes {', '.join(takes)}, not {', '.join(arguments)}")


def _takes(method: Callable, arguments: tuple[str, ...]) -> bool:
    """Whether it takes these, and nothing more that has no default."""
    takes = list(inspect.signature(method).parameters.values())[1:]
    more = takes[len(arguments) :]
    optional = all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in more)
    return tuple(p.name for p in takes[: len(arguments)]) == arguments and optional


def has_its_methods(module: nn.Module, structure: Structure) -> bool:
    """Whether its class has the structure's methods, with their arguments, whatever they return."""
    methods = {name: getattr(original_class(module), name, None) for name in structure.methods}
    if not all(map(inspect.isfunction, methods.values())):
        return False
    return all(_takes(methods[name], arguments) for name, arguments in structure.methods.items())


def share(module: nn.Module) -> str:
    """What of its pooling is fused."""
    structure = structure_of(module)
    with proof.mode(module, False):
        return structure.share(structure.parts(module))


def training_reason(module: nn.Module) -> str | None:
    """Why the module's own methods would run in training, if so (dropout that no op has)."""
    try:
        with proof.mode(module, True):
            structure_of(module).parts(module)
    except Unfusable as reason:
        return str(reason)
    return None


def rebind_captured(model: nn.Module) -> None:
    """Points methods that were taken from a module (``self.forward = self.model.forward``) at what it has now."""
    for holder in model.modules():
        for key, value in list(vars(holder).items()):
            if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
                now = getattr(type(value.__self__), value.__func__.__name__, None)
                if now is not value.__func__ and inspect.unwrap(now) is inspect.unwrap(value.__func__):
                    vars(holder)[key] = types.MethodType(now, value.__self__)


def candidates_among(model: nn.Module) -> Iterator[tuple[str, nn.Module, list]]:
    """Modules that look like a structure, inner ones first: outer ones build on what their parts turned out to be."""
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if found := [s for s in _STRUCTURES if s.looks_like(module)]:
            yield name, module, found
