"""``accelerate(model)`` has the models people already have use the fused ops; ``restore(model)`` undoes it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from milkernels.integrations import abmil, clam, dsmil, engine, others, scores  # noqa: F401  their structures register
from milkernels.integrations.layers import original_class


class Entry(NamedTuple):
    """A module that was recognised: its name in the model ("" is the model itself), its class, the structure it was
    taken for, and what there is to say: why it was left alone, or where it returns something else on purpose."""

    name: str
    kind: str
    structure: str
    remark: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'}: {self.kind} as {self.structure}" + (self.remark and f": {self.remark}")


@dataclass
class Report:
    """What `accelerate` did."""

    changed: list[Entry] = field(default_factory=list)
    waiting: list[Entry] = field(default_factory=list)  # parameters not initialised: checked at their first call
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, entries in (("changed", self.changed), ("waiting for a first call", self.waiting)):
            lines += [f"{title}: {entry}" for entry in entries]
        lines += [f"left alone: {entry}" for entry in self.left]
        return "\n".join(lines or ["nothing was recognised"])


def accelerate(model: nn.Module, *, min_instances: int | None = None) -> Report:
    """Swaps the methods of modules that are recognised by structure, in place, for fused ones.

    A module is swapped only if its own methods and the fused ones return the same, in type, shape, order and value, on
    small random bags.  Parameters, keys of the state dict, attributes and ``isinstance`` stay; nothing outside of the
    model is touched.  Whenever a layer that is passed over has hooks, a computed weight (pruning, weight_norm,
    parametrizations), another type than was proven, or dropout that no op has, the module's own method runs; and so it
    does under torch.func and forward mode, in a jit trace and in an export to ONNX.

    The last ``Linear[, activation][, Dropout]`` of an embedding in front goes into the op, so that embedded instances
    are not stored, and features may be stored in half.  Layers before it, an embedding that is anything else or whose
    last layer has hooks or a computed weight, and one whose instances are returned, are called as they are.

    Args:
        model: any module; the recognised ones among it and its submodules are changed.
        min_instances: calls with fewer, and no mask, take the module's own methods, which are faster for a few
            instances on a CPU.  None: 1000, and 200 where gradients are recorded (DSMIL and Loss-Attention: 200 and
            1000); 0 always takes the fused ones, as other devices and masked batches do.

    Returns:
        `Report`: what was changed, what waits for lazily built parameters, what was left alone and why.  Scores that
        are returned for padded rows are -inf, and weights 0.

    Raises:
        TypeError: ``model`` is no module, or ``min_instances`` no int.
        ValueError: ``min_instances`` is negative.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if min_instances is not None and not isinstance(min_instances, int):
        raise TypeError(f"min_instances must be an int or None; got {type(min_instances).__name__}")
    if min_instances is not None and min_instances < 0:
        raise ValueError(f"min_instances must be at least 0; got {min_instances}")
    report = Report()
    for name, module, candidates in engine.candidates_among(model):
        kind, names = original_class(module).__name__, " or ".join(s.name for s in candidates)
        if engine.structure_of(module) is None and engine.is_lazy(module):
            engine.fuse_after_first_call(module, candidates, min_instances)
            report.waiting.insert(0, Entry(name, kind, names, ""))
        elif reason := engine.fuse_if_proven(module, candidates, min_instances):
            report.left.insert(0, Entry(name, kind, names, reason))
        else:
            structure, reason = engine.structure_of(module), engine.training_reason(module)
            in_training = reason and f"in training its own methods run: {reason}"
            remark = "; ".join(filter(None, (structure.note, in_training)))
            report.changed.insert(0, Entry(name, kind, structure.name, remark))
    engine.rebind_captured(model)
    return report


def restore(model: nn.Module) -> list[str]:
    """Undoes `accelerate`: every module has the methods of its class again.  Returns the names of those that changed.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    names = [name for name, module in model.named_modules() if engine.undo(module)]
    engine.rebind_captured(model)
    return names
