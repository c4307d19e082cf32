"""Rows of contenders that run one after the other, each in a process of its own: how times and memory grow."""

from collections.abc import Callable
from dataclasses import replace

from milkernels.bench import alone, contenders, harness, roofline, run
from milkernels.bench.units import Unit
from milkernels.bench.workload import DTYPES


def rows(unit: Unit, emit: Callable[[list[run.Row], roofline.MatrixProbe, float], object]) -> None:
    """Every contender of the unit in a process of its own; ``emit`` takes its rows, the probe and the bandwidth."""
    case, shape, dtype = unit.workload.case, unit.workload.shape, DTYPES[unit.dtype]
    bandwidth, _ = roofline.read_bandwidth()
    probe = roofline.MatrixProbe([dtype])
    one = case.inputs(replace(shape, lengths=(1,)), dtype)  # all would be held beside the children's
    for name in unit.contenders:
        contender = contenders.REGISTRY[name]
        probe.sample()
        budget = unit.budget / len(unit.modes)
        text = unit.workload.to_json()
        answers = alone.measure(text, name, unit.dtype, list(unit.modes), [], unit.threads, unit.seconds, budget)
        probe.sample()
        made = []
        for mode in unit.modes:
            row = run.Row(case.name, unit.dtype, mode, name, contender.label(case, one), contender.ours)
            row.instances, row.bags = shape.instances, shape.bags
            row.flops, row.bytes = case.flops(shape, mode), case.bytes(shape, dtype, mode)
            row.floor_seconds = roofline.floor_seconds(row.flops, row.bytes, probe.rate(dtype), bandwidth)
            _fill(row, answers)
            made.append(row)
        emit(made, probe, bandwidth)


def _fill(row: run.Row, answers: dict[str, dict] | str) -> None:
    if isinstance(answers, str):
        row.status, row.reason = run.ERROR, answers
        return
    answer = answers[row.mode]
    if "reason" in answer:
        row.status, row.reason = answer["status"], answer["reason"]
        return
    row.timing, row.once = harness.Timing(**answer["timing"]), answer["once"]
    row.resident, row.allocator = answer["resident"], answer["allocator"]
    if row.timing.error:
        row.status, row.reason = run.ERROR, row.timing.error
    row.errors, row.gate_note = answer.get("errors", []), answer.get("gate_note", "")
    if answer.get("broken"):
        row.status, row.reason = run.FAIL, answer["broken"]
