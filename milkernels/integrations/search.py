"""Which modules of a model are fused by their graph: the outermost that pool by attention, where no structure did."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from milkernels._torch import submodules
from milkernels.integrations import engine, proof, tracing
from milkernels.integrations.calls import Call, Unknown
from milkernels.integrations.graph import MOST_HEADS, NoPooling
from milkernels.integrations.layers import Unfusable, original_class
from milkernels.integrations.report import EXAMPLE, THREE_LINES, Entry
from milkernels.integrations.traced import Traced, arguments, parameters_of

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Search:
    """What was found in one model."""

    def __init__(self, minimum: int | None, examples: Mapping[int, Call] | None):
        self.changed: list[Entry] = []
        self.left: list[Entry] = []
        self._minimum, self._examples, self._seen = minimum, examples, set()

    def within(self, name: str, module: nn.Module) -> bool:
        """Whether the module, or else something inside of it, is fused by its graph now."""
        if id(module) in self._seen or isinstance(module, torch.jit.ScriptModule):
            return False
        self._seen.add(id(module))
        structure = engine.structure_of(module)
        if structure is not None and not isinstance(structure, Traced):
            return False
        reason = self._fuse(name, module) if _may_pool(module) else None
        if isinstance(engine.structure_of(module), Traced):
            return True
        inside = [
            self.within(f"{name}.{child}" if name else child, inner)
            for child, inner in submodules(module).items()
            if inner is not None
        ]
        if reason is not None and not any(inside):
            unknown = isinstance(reason, Unknown)
            step = EXAMPLE if unknown else THREE_LINES
            if not unknown or any(engine.structure_of(m) is not None for m in module.modules()):
                self.left.insert(0, Entry(name, original_class(module).__name__, "", str(reason), "", step))
        return any(inside)

    def _fuse(self, name: str, module: nn.Module) -> Unfusable | None:
        """Fuses it, or says why not; None where it does not pool by attention."""
        fused = engine.structure_of(module)
        try:
            if isinstance(fused, Traced):
                with proof.mode(module, False):
                    if _is_served(module, fused):
                        engine.fuse_as(module, fused, self._minimum)
                        self._report(name, module, fused)
                        return None
                engine.undo(module)
            example = None if self._examples is None else self._examples.get(id(module))
            if self._examples is not None and example is None:
                return None  # it is not called
            structure = tracing.fused_by_graph(module, example)
        except NoPooling:
            return None
        except Unfusable as reason:
            return reason
        engine.fuse_as(module, structure, self._minimum)
        self._report(name, module, structure)
        return None

    def _report(self, name: str, module: nn.Module, structure: Traced) -> None:
        remark = "" if any(v.training for v in structure.variants) else structure.remark
        kind = original_class(module).__name__
        self.changed.append(Entry(name, kind, structure.name, remark, structure.share(module)))


def _is_served(module: nn.Module, structure: Traced) -> bool:
    try:
        structure.parts(module)
    except Unfusable:
        return False
    return True


def _may_pool(module: nn.Module) -> bool:
    """Whether it is worth a trace: it has what a gate is made of, and nothing in it pools already."""
    if isinstance(module, _CONTAINERS) or engine.is_lazy(module):
        return False
    inner = [engine.structure_of(m) for m in module.modules() if m is not module]
    if any(s is not None and s.pools for s in inner):
        return False
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return len(linear) >= 2 and any(m.out_features <= MOST_HEADS for m in linear)


# Examples


def calls_of(model: nn.Module, example: Any) -> dict[int, Call]:
    """The call of the model that the example is, and those of its submodules in it, by the module's id."""
    if not isinstance(example, Tensor | tuple | list | Mapping):
        raise TypeError(f"example must be a tensor, a tuple or a dict; got {type(example).__name__}")
    found: dict[int, Call] = {}
    args, kwargs = ((), dict(example)) if isinstance(example, Mapping) else (example, {})
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    own = tracing.unfused(model)
    pairs = dict(zip(own.modules(), model.modules(), strict=True))

    def keep(module: nn.Module, given: tuple, named: dict) -> None:
        call = arguments(parameters_of(module), given, named)
        found.setdefault(id(pairs[module]), _detached(call))

    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in own.modules() if _has_forward(m)]
    try:
        with proof.isolated(model), proof.mode(own, False), torch.no_grad():
            own(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"example must be the arguments of a call of the model; got {proof.line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return found


def _has_forward(module: nn.Module) -> bool:
    return inspect.isfunction(getattr(original_class(module), "forward", None))


def _detached(call: Call) -> Call:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in call.items()}
