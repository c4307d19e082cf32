"""How much of other models `milkernels.accelerate` fuses: ``python -m benchmarks.upstream --coverage DIR ...``.

Every DIR is a checkout, known by the name of its folder.  Each model in it that the table names is built as its authors
build it, and accelerated: what share is fused, whether outputs, all gradients and 20 training steps are what they were,
and the most bytes that a training step allocates, gradients included: before, after, and after where ops save nothing
that they can compute again.  Nothing of these projects is kept here.
"""

import contextlib
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import milkernels
from benchmarks.upstream_published import PUBLISHED, Published, built
from benchmarks.upstream_run import without_dropout
from milkernels._torch import pytree
from milkernels.bench import memory
from milkernels.integrations import Report

_ROWS, _FEW = 8_000, 300  # instances of the step whose memory is measured, and of those that are compared
_STEPS, _RATE = 20, 0.01  # of the training that is compared
_TOLERANCE = 1e-6  # of float64: some models have constants in float32


class Row(NamedTuple):
    model: str
    share: str  # what is fused, or why nothing could be tried
    equal: str
    before: float = 0.0  # MiB of a training step
    after: float = 0.0
    least: float = 0.0  # with nothing saved


def _bag(model: Published, rows: int, dtype: torch.dtype) -> Tensor:
    shape = [size or rows for size in model.shape]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu().to(dtype)


def _run(model: Published, module: nn.Module, x: Tensor) -> list[Tensor]:
    given = model.call(x)
    out = module(**given) if isinstance(given, dict) else module(*given)
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def _step(model: Published, module: nn.Module, x: Tensor) -> list[Tensor]:
    """A loss of every output, and the gradients of all parameters."""
    outputs = _run(model, module, x)
    loss = sum(t.square().mean() for t in outputs if t.requires_grad)
    gradients = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


def _train(model: Published, module: nn.Module, x: Tensor) -> list[Tensor]:
    """How far 20 training steps take each parameter."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, _RATE, momentum=0.9)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        sum(t.square().mean() for t in _run(model, module, x) if t.requires_grad).backward()
        optimizer.step()
    return [p.detach() - s for p, s in zip(parameters, start, strict=True)]


def _differ(model: Published, before: nn.Module, after: nn.Module) -> float:
    """The largest relative difference of an output, a gradient, or a parameter's way in training, without dropout."""
    worst, x = 0.0, _bag(model, _FEW, torch.float64)
    for training, run in ((False, _step), (True, _step), (True, _train)):
        found = []
        for module in (before, after):
            wide = copy.deepcopy(module).double().train(training)
            torch.manual_seed(0)
            found.append([t.detach() for t in run(model, wide, x)])
        if len(found[0]) != len(found[1]):
            return math.inf
        for a, b in zip(*found, strict=True):
            size, distance = float(a.norm()), float((a - b).norm())
            relative = distance / size if size > 1e-9 else distance
            worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def _share(report: Report) -> str:
    """Of the module that has the largest."""
    shares = [entry.share for entry in report.changed]
    return max(shares, key=len, default="nothing")


def measured(model: Published, folder: str) -> Row:
    name = f"{model.project}: {model.name}"
    try:
        before = built(model, folder)
        x = _bag(model, _FEW, torch.float32)
        _run(model, before, x)
    except Exception as error:  # of theirs: a package is not here, say
        return Row(name, f"not built: {type(error).__name__}: {str(error)[:60]}", "")
    after = copy.deepcopy(before)
    report = milkernels.accelerate(after, example=model.call(x) if model.example else None)
    share = _share(report)
    with contextlib.ExitStack() as stack:
        for module in (before, after):
            stack.enter_context(without_dropout(module))
        exact = copy.deepcopy(before)
        milkernels.accelerate(exact, example=model.call(x) if model.example else None, min_instances=0)
        worst = _differ(model, before, exact)
    x = _bag(model, _ROWS // (model.shape[0] or 1), torch.float32)
    peaks = [memory.allocator_peak(lambda m=m: _step(model, m, x)) for m in (before.train(), after.train())]
    with milkernels.saved_bytes(0):
        peaks.append(memory.allocator_peak(lambda: _step(model, after, x)))
    return Row(name, share, "yes" if worst <= _TOLERANCE else f"no: {worst:.1e}", *(p / 2**20 for p in peaks))


def show(folders: Sequence[str], console: Console) -> int:
    """Prints the table; 1 where a result differs or nothing was found in the folders."""
    at_hand = {Path(folder).resolve().name.lower(): str(Path(folder).resolve()) for folder in folders}
    chosen = [model for model in PUBLISHED if model.project.lower() in at_hand]
    rows = []
    console.print(_line("model", "fused", "equal", "MiB before", "after", "nothing saved"), highlight=False)
    for model in chosen:
        row = measured(model, at_hand[model.project.lower()])
        rows.append(row)
        shares = [f"{peak:.0f} ({peak / row.before:.2f})" for peak in (row.after, row.least) if row.before]
        sizes = [f"{row.before:.0f}", *shares] if row.before else []
        console.print(_line(row.model, row.share, row.equal, *sizes), highlight=False, markup=False)
    whole = sum(row.share.startswith("scores + softmax + sum") for row in rows)
    console.print(f"{whole} of {len(rows)} models have the whole pooling fused", highlight=False)
    return int(not rows or any(row.equal.startswith("no") for row in rows))


def _line(*cells: str) -> str:
    """Rows are printed as they come in, so widths are fixed."""
    return " ".join(cell.ljust(width) for cell, width in zip(cells, (40, 40, 12, 10, 10, 13), strict=False)).rstrip()
