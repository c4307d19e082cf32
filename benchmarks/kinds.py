"""How a unit of a grid is measured, by its kind: `milkernels.bench.process` runs this in a process that may die of it.

What is emitted: ``doing`` (a contender at work) and ``rows`` (of a mode, as soon as they are measured).
"""

import contextlib
import functools
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from benchmarks import calls, clam, cuda, disk, gpu_grid, variants
from benchmarks.largest import largest_bag, refused
from benchmarks.units import Unit
from milkernels.bench import contenders, gate, harness, memory, report, roofline, run
from milkernels.bench.contenders import REGISTRY, Contender
from milkernels.bench.process import Emit, ask
from milkernels.bench.workload import DTYPES
from milkernels.testing import Inputs, OpCase, evaluate

assert variants  # which adds to the contenders
_TIMING = 0.35  # seconds of rounds for each mode
_MOST = 0.9  # of the memory that is left
_LONG = 6.0  # seconds of a run above which there is one only
_JUDGED = 100_000  # instances: float64 and eager take their time


def measure(emit: Emit, unit: str) -> None:
    one = Unit.from_json(unit)
    if one.workload.device == "cpu":
        torch.set_num_threads(one.threads or _machine_threads())
    _KINDS[one.kind](one, emit)


@functools.cache
def _machine_threads() -> int:
    """As many as PyTorch took when it was imported."""
    return torch.get_num_threads()


_machine_threads()  # before they are changed for the first time


def _rows(rows: Sequence[run.Row], probe, bandwidth: float) -> dict:
    return {"rows": [report.row_values(row, probe, bandwidth) for row in rows]}


def _doing(contender: str, mode: str) -> dict:
    return {"doing": {"contender": contender, "mode": mode}}


def _row(mode: str, contender: str, values: dict | None = None, **more) -> dict:
    about = {"mode": mode, "contender": contender, "label": contender, "status": "ok"}
    if contender in REGISTRY:
        about["ours"] = REGISTRY[contender].ours
    return {**about, **(values or {}), **more}


def _bench(unit: Unit, emit: Emit) -> None:
    """Contenders take turns, after the gate."""
    cpu = unit.workload.device == "cpu"  # on a GPU a peak is taken in this process
    budget = unit.budget or _TIMING * len(unit.modes)
    peaks = cpu and unit.peaks
    options = run.Options([unit.dtype], unit.modes, unit.contenders, budget, threads=unit.threads or None, memory=peaks)
    bench = run.Bench(
        unit.workload,
        options,
        finished=lambda rows: emit(_rows(rows, bench.probe, bench.bandwidth)),
        at_work=lambda contender, mode: emit(_doing(contender, mode)),
        gpu=None if cpu else cuda,
    )
    bench.run()


# Every contender in a process of its own, one after the other: how times and memory grow


def _alone(unit: Unit, emit: Emit) -> None:
    case, dtype = unit.workload.case, DTYPES[unit.dtype]
    bandwidth, _ = roofline.read_bandwidth()
    probe = roofline.MatrixProbe([dtype])
    one = case.inputs(replace(unit.workload.shape, lengths=(1,)), dtype)  # all would be held beside the children's
    for name in unit.contenders:
        probe.sample()
        answers = ask(f"{__name__}.alone", {"unit": unit.to_json(), "contender": name}, unit.seconds)
        probe.sample()
        rows = []
        for mode in unit.modes:
            row = run.Row(case.name, unit.dtype, mode, name, REGISTRY[name].label(case, one), REGISTRY[name].ours)
            row.bound(unit.workload, probe.rate(dtype), bandwidth)
            if isinstance(answers, str):
                row.status, row.reason = run.ERROR, answers
            else:
                answer = next(answer for answer in answers if answer.pop("mode", mode) == mode)
                timing = answer.pop("timing", None)
                for key, value in answer.items():
                    setattr(row, key, value)
                row.timing = timing and harness.Timing(**timing)
                answers.remove(answer)
            rows.append(row)
        emit(_rows(rows, probe, bandwidth))


def alone(emit: Emit, unit: str, contender: str) -> None:
    """In the child: fields of a row, by mode."""
    one = Unit.from_json(unit)
    torch.set_num_threads(one.threads or torch.get_num_threads())
    with memory.within(int(_MOST * contenders.available_memory())):
        case, inputs = one.workload.case, one.workload.inputs(DTYPES[one.dtype])
        for mode in one.modes:
            try:
                answer = _timed(REGISTRY[contender], case, inputs, mode, one.budget / len(one.modes))
            except Exception as error:  # any reason: the other modes still count
                answer = refused(error)
            emit({"mode": mode, **answer})


def _timed(contender: Contender, case: OpCase, inputs: Inputs, mode: str, budget: float) -> dict:
    """Memory, then times, then what the gate says of ours."""
    # A contender that compiles is taken for eager: a prefix would be compiled for itself.
    like = contender if contender.ours or contender.peer else REGISTRY["eager"]
    guess = gate.guess_seconds(like, case, inputs, mode)
    once = guess > _LONG
    answer, call = memory.peak(contender, case, inputs, mode, once)
    timing = harness.Timing([answer.pop("seconds")], warm=False)
    if not once:
        timing = harness.measure({contender.name: call}, budget)[contender.name]
    answer |= {"timing": asdict(timing), "once": once}
    if timing.error:
        return answer | {"status": run.ERROR, "reason": timing.error}
    return answer | (_judged(contender, case, inputs, mode, guess) if contender.ours else {})


def _judged(contender: Contender, case: OpCase, inputs: Inputs, mode: str, guess: float) -> dict:
    """What the gate says; beyond ``_JUDGED`` instances of the first ones."""
    judged = inputs if len(inputs.x) <= _JUDGED else case.prefix(inputs, contenders.PREFIX)
    seconds = gate.guess_seconds(REGISTRY["eager"], case, judged, mode)
    baseline = gate.yardstick(case, judged, mode, seconds, contenders.available_memory() // 2)
    compute, _ = contender.prepare(case, judged, True)
    promise = gate.judge(case, baseline, compute, judged, mode, guess)
    note = baseline.note if judged is inputs else f"judged on the first {len(judged.x)} instances"
    errors = [asdict(v) | {"ok": v.ok, "ratio": v.ratio} for v in promise.verdicts]
    answer = {"errors": errors, "gate_note": note}
    return answer if promise.ok else answer | {"status": run.FAIL, "reason": promise.broken()}


# The other kinds


def _disk(unit: Unit, emit: Emit) -> None:
    for mode in unit.modes:
        emit(_doing("", mode))
        emit({"rows": [_row(mode, **row) for row in disk.rows(unit, mode)]})


def _clam(unit: Unit, emit: Emit) -> None:
    for mode in unit.modes:
        emit(_doing("", mode))
        emit({"rows": [_row(mode, **row) for row in clam.rows(unit, mode)]})


def _largest(unit: Unit, emit: Emit) -> None:
    for mode, contender in unit.pairs():
        emit(_doing(contender, mode))
        emit({"rows": [_row(mode, contender, largest_bag(unit, mode, contender))]})


def _calls(unit: Unit, emit: Emit) -> None:
    """Host time and launches of one call; counted after all is timed, because a profiler may slow down what follows."""
    rows = {}
    for mode, contender in unit.pairs():
        emit(_doing(contender, mode))
        rows[mode, contender] = _row(mode, contender, calls.times(unit, mode, contender))
        emit({"rows": [rows[mode, contender]]})
    for (mode, contender), row in rows.items():
        if row["status"] == "ok":
            emit(_doing(contender, mode))
            emit({"rows": [row | calls.launches(unit, mode, contender)]})


def _limits(unit: Unit, emit: Emit) -> None:
    """Of a GPU."""

    def rate(dtype: torch.dtype, precision: str = "highest") -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        probe = cuda.MatrixProbe([dtype])
        for _ in range(9):
            probe.sample()
        torch.set_float32_matmul_precision(before)
        return probe.rate(dtype)

    def product(dim: int, hidden: int) -> float:
        rows, device = gpu_grid.INSTANCES, unit.workload.device
        a, b = (torch.randn(n, dim, device=device, dtype=torch.bfloat16) for n in (rows, 2 * hidden))
        cuda.product_rate(a, b.t())
        return statistics.median(cuda.product_rate(a, b.t()) for _ in range(9))

    bandwidth, array = cuda.read_bandwidth()
    rates = {name: rate(dtype) for name, dtype in DTYPES.items()}
    row = {
        "read_bandwidth": bandwidth,
        "copy_bandwidth": cuda.copy_bandwidth(),
        "array_bytes": array,
        "matrix_rates": rates | {"tf32": rate(torch.float32, "high")},
        "product_rates": {f"{gpu_grid.INSTANCES} x {d} x {2 * h}": product(d, h) for d, h in gpu_grid.HEADLINE_SIZES},
    }
    emit({"rows": [_row("limits", "device", row)]})


_KINDS = {
    "bench": _bench,
    "alone": _alone,
    "limits": _limits,
    "calls": _calls,
    "largest": _largest,
    "disk": _disk,
    "clam": _clam,
}


def compile_units(emit: Emit, units: list[str]) -> None:
    """Only runs our contenders once, which fills Triton's cache on disk: several such processes compile in parallel
    what one that measures would compile in turn."""
    os.nice(10)
    for text in units:
        with contextlib.suppress(Exception):
            compile_unit(Unit.from_json(text))


def compile_unit(unit: Unit) -> None:
    if unit.kind == "calls":
        for mode in unit.modes:
            with contextlib.suppress(Exception), calls.prepared(unit, mode, "triton") as call:
                call()
    if unit.kind != "bench":
        return
    case, inputs = unit.workload.case, unit.workload.inputs(DTYPES[unit.dtype])
    for mode, name in unit.pairs():
        contender = REGISTRY[name]
        if not contender.ours or name in ("native", "reference"):
            continue
        with contextlib.suppress(Exception), unit.workload.products(), contender.within(), cuda.sound():
            compute, its_inputs = contender.prepare(case, inputs, True)
            evaluate(compute, its_inputs, mode, case.primary)
