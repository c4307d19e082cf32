"""One upstream model before and after `accelerate`: compared, timed in turns, and its memory measured."""

import contextlib
import copy
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.upstream_models import MODELS, PROJECTS, WORKLOADS, Data, Missing, Model, Source, make_data, separate
from milkernels.bench import contenders, gate, harness, memory, process
from milkernels.bench.workload import DTYPES
from milkernels.testing import Reference, errors_of, promise_from_errors

MODES = ("fwd", "step")
OK, FAIL, UNCHANGED, ERROR = "ok", "FAIL", "unchanged", "error"
# What two good results may differ by, relatively, without a look at which of them is closer to the truth.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
_FILL = 1e8  # numbers this large stand for "masked", like infinities
_MEMORY_TIMEOUT = 900.0


@dataclass(frozen=True)
class Options:
    budget: float  # seconds of timing per row
    modes: Sequence[str]
    threads: int | None = None
    memory: bool = True


@dataclass
class Side:
    """One of the two copies."""

    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    spread: float | None = None
    resident: int | None = None
    allocator: int | None = None
    memory_note: str = ""


@dataclass
class Row:
    project: str
    version: str
    model: str
    workload: dict
    dtype: str
    mode: str
    status: str = OK
    reason: str = ""
    before: Side = field(default_factory=Side)
    after: Side = field(default_factory=Side)
    ratio: float | None = None
    errors: list[dict] = field(default_factory=list)
    report: list[str] = field(default_factory=list)

    @property
    def worst(self) -> str:
        """The largest relative difference within the tolerance, and how many results were held to the error promise."""
        errors = [e["error"] for e in self.errors if "allowed" not in e and not math.isnan(e["error"])]
        promised = sum("allowed" in e for e in self.errors)
        return (f"{max(errors):.1e}" if errors else "-") + (f" +{promised}" if promised else "")


@dataclass(frozen=True)
class Case:
    """One model on one workload in one type."""

    model: Model
    source: Source
    workload: str
    dtype: str
    instances: int

    @property
    def name(self) -> str:
        return f"{self.model.key} {self.workload}"

    def about(self) -> dict:
        workload = WORKLOADS[self.workload]
        dim = "28 x 28" if workload.images else self.model.dim
        shape = {"lengths": list(workload.lengths(self.instances)), "dim": dim}
        return {"name": workload.name, "shape": shape, "padded": workload.padded, "dropout": 0.0}

    def build(self) -> tuple[nn.Module, Data]:
        """The model and its bags, the same in every process."""
        torch.manual_seed(0)
        model = self.model.build(self.source).eval()
        data = make_data(WORKLOADS[self.workload], self.instances, self.model.dim)
        if self.model.choice:
            separate(self.model.choice, model, data)
        return model.to(DTYPES[self.dtype]), data.to(DTYPES[self.dtype])

    def to_json(self) -> str:
        values = {"workload": self.workload, "dtype": self.dtype, "instances": self.instances}
        at = {"project": self.source.project.option, "path": self.source.path}
        return json.dumps(values | at | {"model": self.model.key})

    @classmethod
    def from_json(cls, text: str) -> "Case":
        values = json.loads(text)
        source = Source(PROJECTS[values.pop("project")], values.pop("path"))
        key = values.pop("model")
        return cls(next(model for model in MODELS if model.key == key), source, **values)


@dataclass(frozen=True)
class Run:
    """One call of one copy; a step leaves the gradients of the parameters."""

    model: Model
    module: nn.Module
    data: Data
    mode: str

    def __call__(self) -> object:
        self.module.train(self.mode == "step")
        if self.mode == "fwd":
            with torch.no_grad():
                return self.model.forward(self.module, self.data)
        self.module.zero_grad(set_to_none=True)
        loss = self.model.loss(self.module, self.data)
        loss.backward()
        return loss.detach()


# Comparing


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    layers = [(layer, layer.p) for layer in module.modules() if isinstance(layer, nn.Dropout)]
    for layer, _ in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in layers:
            layer.p = p


def results(run: Run) -> dict[str, Tensor]:
    """Every floating output, or the loss and every gradient of a step without dropout."""
    with without_dropout(run.module):
        outputs = run()
    if run.mode == "fwd":
        leaves = torch.utils._pytree.tree_leaves(outputs)
        floating = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
        return {f"output {i}": t for i, t in enumerate(floating)}
    gradients = {name: p.grad for name, p in run.module.named_parameters() if p.grad is not None}
    run.module.zero_grad(set_to_none=True)
    return {"loss": outputs} | {f"gradient of {name}": g for name, g in gradients.items()}


def difference(before: Tensor, after: Tensor) -> tuple[float, str]:
    """Relative difference in the 2-norm, and what is wrong that a norm does not show."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return math.nan, f"{after.dtype} {tuple(after.shape)} instead of {before.dtype} {tuple(before.shape)}"
    if not torch.equal(before.isnan(), after.isnan()):
        return math.nan, "NaN"
    if not torch.equal(before.abs() >= _FILL, after.abs() >= _FILL):
        return math.nan, "masked elsewhere"
    before, after = _plain(before), _plain(after)
    error, size = _norm(after - before), _norm(before)
    return (error / size if size else math.inf if error else 0.0), ""


def _plain(t: Tensor) -> Tensor:
    """In float64, without what stands for "masked"."""
    t = t.detach().double()
    return t.masked_fill(~(t.abs() < _FILL), 0.0)


def compare(before: Run, after: Run) -> list[dict]:
    """One entry per result.  Those that differ by more than the tolerance are held to the error promise: accelerated, a
    model may be twice as far from the result in a wider type as the original is."""
    dtype = before.data.x.dtype
    with memory.resident_peak() as peak:
        theirs = results(before)
    ours = results(after)
    entries = {name: _entry(name, theirs, ours, _TOLERANCE[dtype]) for name in dict.fromkeys([*theirs, *ours])}
    doubtful = [name for name, entry in entries.items() if not entry["ok"] and not entry["reason"]]
    if doubtful and dtype in _WIDER:
        needed = 3 * (peak.extra or 0) + 3 * before.data.x.nbytes  # twice as wide, and some room
        parts = math.ceil(needed / contenders.available_memory())
        whole = {name: (_plain(theirs[name]), _plain(ours[name])) for name in doubtful}
        del theirs, ours
        for name, verdict in _judged(before, after, whole, parts).items():
            entries[name] |= verdict
    return list(entries.values())


def _entry(name: str, theirs: dict[str, Tensor], ours: dict[str, Tensor], tolerance: float) -> dict:
    if name in theirs and name in ours:
        error, reason = difference(theirs[name], ours[name])
    else:
        error, reason = math.nan, "only before" if name in theirs else "only after"
    ok = not reason and error <= tolerance
    return {"name": name, "error": error, "tolerance": tolerance, "ok": ok, "reason": reason}


def _judged(before: Run, after: Run, whole: dict[str, tuple[Tensor, Tensor]], parts: int) -> dict[str, dict]:
    """Verdicts of the error promise on the results in ``whole``, against the original model in a wider type.

    Where that does not fit into memory, they are judged on a part of each bag; on all of it, what was allowed there may
    then be exceeded twice.  The gradient of a bias is a sum over instances, often of terms that cancel (those of a
    score's bias to 0): it cannot be more accurate than its terms, so it is also allowed eps times their absolute sum.
    """
    dtype = before.data.x.dtype
    data = before.data.part(parts) if parts > 1 else before.data
    wide = replace(before, module=copy.deepcopy(before.module).to(_WIDER[dtype]), data=data.to(_WIDER[dtype]))
    with _summands(wide.module) as summands:
        exact = {name: _plain(t) for name, t in results(wide).items() if name in whole}
    del wide
    if parts > 1:
        theirs, ours = (results(replace(run, data=data)) for run in (before, after))
        pairs = {name: (_plain(theirs[name]), _plain(ours[name])) for name in whole}
    else:
        pairs = whole
    reference = Reference(exact)
    # In the type of the results again: its rounding is part of what is promised.
    theirs, ours = ({name: pair[side].to(dtype) for name, pair in pairs.items()} for side in (0, 1))
    promise = promise_from_errors(ours, errors_of(theirs, reference), reference, dtype, gate.LUCK)
    verdicts = {}
    for v in promise.verdicts:
        rounding = torch.finfo(dtype).eps * _norm(summands.get(v.name, torch.zeros(1)))
        verdict = {"after": v.ours, "before": v.eager, "allowed": max(v.bound, rounding), "reason": v.reason}
        verdict["ok"] = not v.reason and v.ours <= verdict["allowed"]
        if parts > 1:
            original, accelerated = whole[v.name]
            relative = (v.bound + v.eager) / v.size * _norm(original) if v.size else 0.0
            verdict["ok"] &= _norm(accelerated - original) <= 2 * max(relative, rounding)
            verdict["instances"] = sum(data.lengths)
        verdicts[v.name] = verdict
    return verdicts


def _norm(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


@contextlib.contextmanager
def _summands(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """By the name of the gradient of each bias added to rows: the absolute sum of its terms in a backward inside."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            sums[name] = sums.get(name, 0.0) + gradient.detach().abs().reshape(-1, gradient.shape[-1]).sum(dim=0)

        def forward(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)

        return forward

    adding = (nn.Linear, nn.BatchNorm1d)
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, adding)}
    hooks = [layer.register_forward_hook(watch(f"gradient of {name}.bias")) for name, layer in linear.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def broken(errors: Sequence[dict]) -> str:
    """The first wrong results in one line; empty if there are none."""
    wrong = [e for e in errors if not e["ok"]]
    lines = [f"{e['name']}: {e['reason'] or 'relative difference {:.1e}'.format(e['error'])}" for e in wrong[:3]]
    return "; ".join(lines + [f"and {len(wrong) - 3} more"] * (len(wrong) > 3))


# Measuring


def measure(case: Case, options: Options, say: Callable[[str], object] = lambda text: None) -> list[Row]:
    """A row per mode.  Whatever goes wrong is a row that says so."""
    about = (case.source.project.title, case.source.version, case.model.name, case.about(), case.dtype)
    rows = [Row(*about, mode) for mode in options.modes]
    try:
        _measure_time(rows, case, options.budget, say)
    except Exception as error:  # any reason: other models are measured
        return [_failed(row, error) for row in rows]
    good = [row for row in rows if row.status == OK]
    if options.memory and good:
        say("memory")
        _measure_memory(good, case, options.threads)
    return rows


def _measure_time(rows: list[Row], case: Case, budget: float, say: Callable[[str], object]) -> None:
    say("building")
    before, data = case.build()
    after = copy.deepcopy(before)
    changed, lines = case.model.accelerate(after)
    compared = copy.deepcopy(before)
    with without_dropout(compared):  # what is fused by its graph serves no other dropout than it had then
        case.model.accelerate(compared)
    for row in rows:
        row.report = lines
        if not changed:
            row.status, row.reason = UNCHANGED, "; ".join(lines) or "nothing was recognised"
            continue
        say(row.mode)
        pair = {"before": Run(case.model, before, data, row.mode), "after": Run(case.model, after, data, row.mode)}
        try:
            _time(row, pair, Run(case.model, compared, data, row.mode), budget)
        except Exception as error:  # as above, of this mode
            _failed(row, error)
        for module in (before, after, compared):
            module.zero_grad(set_to_none=True)


def _failed(row: Row, error: Exception) -> Row:
    row.status, row.reason = ERROR, _anonymous(str(error) if isinstance(error, Missing) else harness.describe(error))
    return row


def _anonymous(text: str) -> str:
    """With paths cut to their last part: results are published."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)*([^\s/:'\"]+)", r"\1", text)


def _time(row: Row, pair: dict[str, Run], compared: Run, budget: float) -> None:
    row.errors = compare(pair["before"], compared)
    row.reason = broken(row.errors)
    if row.reason:
        row.status = FAIL
        return
    for name, timing in harness.measure(pair, budget).items():
        if timing.error:
            raise RuntimeError(f"{name}: {timing.error}")
        side = getattr(row, name)
        side.seconds, side.median, side.spread = timing.seconds, timing.median, timing.spread
    row.ratio = row.before.median / row.after.median


def _measure_memory(rows: list[Row], case: Case, threads: int | None) -> None:
    for side in ("before", "after"):
        answer = _ask_child(case, side, [row.mode for row in rows], threads)
        for row in rows:
            if isinstance(answer, str):
                getattr(row, side).memory_note = _anonymous(answer)
            else:
                values = answer[row.mode]
                setattr(row, side, replace(getattr(row, side), **values))


def _ask_child(case: Case, side: str, modes: list[str], threads: int | None) -> dict[str, dict] | str:
    """Peaks by mode from a process of its own, or a line that says why there are none."""
    spec = {"case": case.to_json(), "side": side, "modes": modes, "threads": threads}
    answers = process.ask(f"{__name__}.measure_memory", spec, _MEMORY_TIMEOUT)
    return answers if isinstance(answers, str) else {answer.pop("mode"): answer for answer in answers}


def environment(*folders: str) -> dict[str, str]:
    found = process.environment()
    paths = os.pathsep.join([*folders, found["PYTHONPATH"]])
    return found | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}


def measure_memory(emit: process.Emit, case: str, side: str, modes: list[str], threads: int | None) -> None:
    """In the child: ``resident`` and ``allocator`` peaks of each mode, after a warm-up."""
    if threads:
        torch.set_num_threads(threads)
    chosen = Case.from_json(case)
    module, data = chosen.build()
    if side == "after":
        chosen.model.accelerate(module)
    for mode in modes:
        run = Run(chosen.model, module, data, mode)
        run()
        module.zero_grad(set_to_none=True)
        memory.release()
        with memory.resident_peak() as peak:
            result = run()
        del result
        module.zero_grad(set_to_none=True)
        emit({"mode": mode, "resident": peak.extra, "allocator": memory.allocator_peak(run)})
