"""Modules that are fused by their graph: what `accelerate` does with those that no structure is the name of.

A program takes the place of the module's forward for calls of one kind: the same arguments, dimensions and mode
(`tracing` makes it).  All other calls run the module's own forward, and so do all calls once anything that the graph
took for granted has changed: a submodule, an attribute, a hook.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from milkernels._torch import called_hooks, registered, submodules, tensors_of, version
from milkernels.dtypes import autocast_dtype
from milkernels.integrations import program
from milkernels.integrations.engine import EMBEDDING, POOLING, Structure
from milkernels.integrations.layers import original_class, refuse

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_DEPTH = 40
# What every module has, and what torch.compile and fully_shard add to it.
_STANDARD = frozenset(vars(nn.Module())) | {"_is_torch_compile", "_compiled_call_impl"}
_STANDARD |= {"_is_fsdp_managed_module", "_fsdp_use_orig_params"}
_SHARDED = "__composable_api_state_key_"  # with a number that differs between processes


def _is_own(attribute: str) -> bool:
    return attribute not in _STANDARD and not attribute.startswith(_SHARDED)


# What a graph takes for granted


class State(NamedTuple):
    """What a module was made of when it was traced, beside the numbers in its parameters."""

    kind: type
    attributes: tuple  # (name, value), all that are not every module's
    parameters: tuple[tuple[str, bool], ...]  # names of parameters and buffers; whether it is None
    children: tuple  # (name, State or None)


def state_of(module: nn.Module, tensors: bool = False, depth: int = 0) -> State:
    """``tensors``: which tensors there are among the attributes, and how often they were written to."""
    if depth > _DEPTH:
        refuse("its submodules contain each other")
    own = {name: value for name, value in vars(module).items() if _is_own(name)}
    attributes = tuple((name, _frozen(name, value, tensors)) for name, value in own.items())
    parameters = tuple((name, tensor is None) for name, tensor in tensors_of(module).items())
    children = tuple(
        (name, None if child is None else state_of(child, tensors, depth + 1))
        for name, child in submodules(module).items()
    )
    return State(original_class(module), attributes, parameters, children)


def _frozen(name: str, value: Any, tensors: bool = False, depth: int = 0) -> Any:
    """What can be compared, and pickled."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return ("tensor", id(value), version(value)) if tensors else "tensor"
    if isinstance(value, list | tuple | set | frozenset):
        values = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return (type(value), *(_frozen(name, v, tensors, depth + 1) for v in values))
    if isinstance(value, Mapping):
        return (type(value), *((k, _frozen(name, v, tensors, depth + 1)) for k, v in value.items()))
    if isinstance(value, type) or inspect.isroutine(value):
        return value
    if hasattr(value, "__dict__") and not isinstance(value, nn.Module) and depth < 4:
        return (type(value), *((k, _frozen(name, v, tensors, depth + 1)) for k, v in vars(value).items()))
    refuse(f"its attribute {name} is of type {type(value).__name__}, and its changes could not be seen")


def check_unchanged(name: str, module: nn.Module, state: State, training: bool) -> None:
    """Refuses a module that is not what was traced, or is more than its forward."""
    if original_class(module) is not state.kind:
        refuse(f"{name} is {type(module).__name__}, not {state.kind.__name__}")
    if name and called_hooks(module):  # those of the module itself are run around its forward
        refuse(f"{name} has hooks")
    if "forward" in module.__dict__:
        refuse(f"the forward of {name} was replaced")
    if module.training is not training:
        refuse(f"{name} is in another mode")
    _check_attributes(name, module, state)
    for child, inner in state.children:
        found = submodules(module)[child]
        if inner is not None:
            check_unchanged(f"{name}.{child}" if name else child, found, inner, training)


def _check_attributes(name: str, module: nn.Module, state: State) -> None:
    own = module.__dict__
    more = sum(map(_is_own, own))
    if more != len(state.attributes) or len(submodules(module)) != len(state.children):
        refuse(f"{name or 'it'} has other attributes than before")
    for attribute, value in state.attributes:
        now = own.get(attribute, own)
        if now is not value and _frozen(attribute, now) != value:
            refuse(f"{attribute} of {name or 'it'} has changed")
    tensors = tensors_of(module)
    for parameter, absent in state.parameters:
        if parameter not in tensors or (tensors[parameter] is None) is not absent:
            refuse(f"{parameter} of {name or 'it'} is computed")
    for child, inner in state.children:
        if child not in submodules(module) or (submodules(module)[child] is None) is not (inner is None):
            refuse(f"{child} of {name or 'it'} has changed")


# A kind of call


@dataclass(frozen=True)
class Variant:
    """A program, and the calls that it serves."""

    training: bool
    given: tuple[tuple[str, Any], ...]  # names of arguments, and those that are no tensors; Tensor where they are
    types: tuple[torch.dtype | None, ...]  # of the tensors; None: any floating one
    fits: str  # whether it serves tensors of these shapes, as a program
    text: str
    tensors: tuple[tuple[str, str], ...]  # parameters and buffers: the submodule, the name there
    fixed: tuple[torch.dtype, str] | None  # the type and device that it names
    embedding: bool  # whether the layer in front is fused

    def __post_init__(self):
        # Made here, since torch.compile traces no exec.
        object.__setattr__(self, "_fits", program.compiled(self.fits))
        object.__setattr__(self, "_forward", program.compiled(self.text))

    def __reduce__(self):
        return Variant, tuple(getattr(self, field.name) for field in fields(self))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, value in self.given if value is Tensor)

    def serves(self, given: Mapping[str, Any]) -> bool:
        if given.keys() != dict(self.given).keys():
            return False
        for name, value in self.given:
            if isinstance(given[name], Tensor) is not (value is Tensor) or (
                value is not Tensor and given[name] != value
            ):
                return False
        tensors = [given[name] for name in self.names]
        for tensor, dtype in zip(tensors, self.types, strict=True):
            if tensor.dtype != dtype and (dtype is not None or not tensor.is_floating_point()):
                return False
        if self.fixed is not None:
            x = tensors[0]
            if autocast_dtype(x) is not None or x.dtype != self.fixed[0] or str(x.device) != self.fixed[1]:
                return False
        return self._fits(*(tensor.shape for tensor in tensors))

    def run(self, module: nn.Module, given: Mapping[str, Any], dropping: bool = True) -> Any:
        tensors = [registered(module, *name) for name in self.tensors]
        forward = self._forward if dropping else program.compiled(self.text, False)
        return forward(None, *tensors, *(given[name] for name in self.names))


@dataclass(frozen=True)
class Traced(Structure):
    """A module that is fused by its graph."""

    state: State
    takes: tuple[tuple[str, Any], ...]  # the arguments of forward and their defaults; inspect.Parameter.empty: none
    aliases: tuple[tuple[tuple[str, str], ...], ...]  # names of parameters that are the same
    variants: tuple[Variant, ...]
    remark: str = ""  # why other calls are not served

    name = "attention pooling, found by its graph"

    @property
    def methods(self) -> dict[str, tuple[str, ...]]:
        return {"forward": tuple(name for name, _ in self.takes)}

    def share(self, parts: Any) -> str:
        return POOLING + (EMBEDDING if any(v.embedding for v in self.variants) else "")

    def serves(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        return True  # its variants say

    def bags(self, name: str, given: Mapping[str, Any]) -> Any:
        return next((v for v in given.values() if isinstance(v, Tensor) and v.ndim >= 2), None)

    def parts(self, module: nn.Module) -> nn.Module:
        check_unchanged("", module, self.state, module.training)
        for same in self.aliases:
            if len({id(registered(module, *name)) for name in same}) > 1:
                refuse("parameters that were the same are not any more")
        if not any(v.training is module.training for v in self.variants):
            refuse(self.remark)
        return module

    def forward(self, module: nn.Module, parts: nn.Module, *args, **kwargs) -> Any:
        given = arguments(self.takes, args, kwargs)
        for variant in self.variants:
            if variant.training is module.training and variant.serves(given):
                return variant.run(module, given)
        return NotImplemented


def parameters_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What forward takes by name, with defaults."""
    signature = inspect.signature(original_class(module).forward)
    by_name = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    taken = [p for p in list(signature.parameters.values())[1:] if p.kind in by_name]
    return tuple((p.name, _default(p.default)) for p in taken)


def _default(value: Any) -> Any:
    return value if isinstance(value, PLAIN) else inspect.Parameter.empty


def arguments(takes: tuple[tuple[str, Any], ...], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call gives by name, without what is the default anyway."""
    if len(args) > len(takes):
        return {"too many": None}
    given = {name: value for (name, _), value in zip(takes, args, strict=False)} | kwargs
    for name, default in takes:
        if name in given and type(given[name]) is type(default) and given[name] == default:
            del given[name]
    return given
