"""``accelerate(model)`` has the models people already have use the fused ops; ``restore(model)`` undoes it."""

from typing import Any

from torch import nn

# The structures in the first of them register themselves.
from milkernels.integrations import abmil, clam, dsmil, engine, others, scores, search  # noqa: F401
from milkernels.integrations.layers import original_class
from milkernels.integrations.report import Entry, Report
from milkernels.integrations.traced import Traced


def accelerate(model: nn.Module, *, example: Any = None, min_instances: int | None = None) -> Report:
    """Swaps the methods of modules that pool by attention, in place, for fused ones.

    They are recognised by structure, as published models are, or found by the graph that `torch.export` makes of them:
    scores of instances, a softmax over them, and the sum of the same instances by these weights.  A module is swapped
    only if its own methods and the fused ones return the same, in type, shape, order and value, on small random bags of
    several sizes; where the graph was used also the same gradients, in eval mode and in training.  Parameters, keys of
    the state dict, attributes and ``isinstance`` stay; nothing outside of the model is touched.  Whenever a layer that
    is passed over has hooks, a computed weight (pruning, weight_norm, parametrizations), another type than was proven,
    or dropout that no op has, the module's own method runs; and so it does for calls that were not proven, under
    torch.func and forward mode, in a jit trace and in an export to ONNX.

    The last ``Linear[, activation][, Dropout]`` of an embedding in front goes into the op, so that embedded instances
    are not stored, and features may be stored in half.  Layers before it, an embedding that is anything else or whose
    last layer has hooks or a computed weight, and one whose instances are returned, are called as they are.

    Args:
        model: any module; the recognised ones among it and its submodules are changed.
        example: the arguments of one call of the model, of any size: a tensor, a tuple, or a dict by name.  Without it
            bags ``[N, D]``, ``[1, N, D]`` and ``[B, N, D]`` are tried, which models of several inputs do not take.
        min_instances: calls with fewer, and no mask, take the module's own methods, which are faster for a few
            instances on a CPU.  None: 100 (DSMIL and Loss-Attention: 200; attention networks that only score: 200, and
            400 where gradients are recorded); 0 always takes the fused ones, as other devices and masked batches do.

    Returns:
        `Report`: what was changed and what share of its pooling is fused, what waits for lazily built parameters, what
        was left alone, why, and the next step.  Scores that are returned for padded rows are -inf, and weights 0.

    Raises:
        TypeError: ``model`` is no module, ``example`` no arguments, or ``min_instances`` no int.
        ValueError: ``min_instances`` is negative, or the model raised for ``example``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
        >>> print(accelerate(model))
        changed: (the model): Sequential as attention network, sequential: scores fused
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if min_instances is not None and not isinstance(min_instances, int):
        raise TypeError(f"min_instances must be an int or None; got {type(min_instances).__name__}")
    if min_instances is not None and min_instances < 0:
        raise ValueError(f"min_instances must be at least 0; got {min_instances}")
    examples = None if example is None else search.calls_of(model, example)
    report = Report()
    for name, module, candidates in engine.candidates_among(model):
        kind, names = original_class(module).__name__, " or ".join(s.name for s in candidates)
        if isinstance(engine.structure_of(module), Traced):
            continue
        if engine.structure_of(module) is None and engine.is_lazy(module):
            engine.fuse_after_first_call(module, candidates, min_instances)
            report.waiting.insert(0, Entry(name, kind, names, ""))
        elif reason := engine.fuse_if_proven(module, candidates, min_instances):
            alike = " or ".join(s.name for s in candidates if engine.has_its_methods(module, s))
            report.left.insert(0, Entry(name, kind, alike, reason))
        else:
            report.changed.insert(0, _changed(name, module))
    _search(model, report, min_instances, examples)
    engine.rebind_captured(model)
    return report


def _changed(name: str, module: nn.Module) -> Entry:
    structure, reason = engine.structure_of(module), engine.training_reason(module)
    in_training = reason and f"in training its own methods run: {reason}"
    remark = "; ".join(filter(None, (structure.note, in_training)))
    return Entry(name, original_class(module).__name__, structure.name, remark, engine.share(module))


def _search(model: nn.Module, report: Report, minimum: int | None, examples: dict | None) -> None:
    """Adds what is found by graphs.  What is said of modules inside of those that were fused is no matter any more."""
    found = search.Search(minimum, examples)
    found.within("", model)
    inside = tuple(f"{entry.name}." if entry.name else "" for entry in found.changed)
    fused = {entry.name for entry in found.changed}
    by_graph = {entry.name: entry for entry in found.left}
    left = [e for e in report.left if e.name not in fused and not (inside and e.name.startswith(inside))]
    known = {entry.name for entry in left if entry.structure}
    report.changed += found.changed
    report.left = [entry for entry in left if entry.structure or entry.name not in by_graph]
    report.left += [entry for name, entry in by_graph.items() if name not in known]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for entries in (report.changed, report.left):
        entries.sort(key=lambda entry: order[entry.name])


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
