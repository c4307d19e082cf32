"""The units of a grid in turn, in a process that may die of one: what is measured is on disk at once, and what breaks
or hangs is a row that says so."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.results import Evidence
from benchmarks.units import Unit, without
from milkernels.bench import contenders, process
from milkernels.bench.process import Emit

GRACE = 5.0  # seconds: the least that a unit is started with
Measure = Callable[[Unit, Emit, float], None]


class Worker:
    """The process that measures units."""

    def __init__(self, command: tuple[str, ...] = ()):
        self.process = process.Process(command)

    def run(self, unit: Unit, emit: Emit, deadline: float) -> None:
        self.process.call("benchmarks.kinds.measure", {"unit": unit.to_json()}, emit, deadline)
        if unit.kind == "calls":
            self.process.stop()  # the profiler goes with the process

    def stop(self) -> None:
        self.process.stop()


class Compilers:
    """Processes that compile for units that will be measured; what fails in them will fail, and be told, there."""

    def __init__(self, units: list[Unit], count: int):
        # What calls many ops is not compiled for in turn.
        jobs = [
            replace(unit, modes=modes)
            for unit in units
            for modes in (((mode,) for mode in unit.modes) if unit.kind == "calls" else (unit.modes,))
        ]
        self.processes = [process.Process() for _ in range(min(count, len(jobs)))]
        for i, one in enumerate(self.processes):
            one.send("benchmarks.kinds.compile_units", {"units": [job.to_json() for job in jobs[i::count]]})

    def finish(self, seconds: float) -> int:
        """Waits so long, ends those that are at it still and returns how many: nothing may disturb what is timed."""
        end, late = time.monotonic() + seconds, 0
        for one in self.processes:
            try:
                one.receive(lambda event: None, end)
            except process.OutOfTime:
                late += 1
            except process.Died:
                pass
            one.stop()
        return late


def say(text: str) -> None:
    print(text, flush=True)


def measure_units(
    evidence: Evidence,
    measure: Measure,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    *,
    units: Sequence[Unit] | None = None,
    but: Sequence[str] = (),
) -> None:
    """Every unit in turn, what failed in an earlier run last; ``deadline`` is of ``clock``.  Contenders that are not
    here, ``but``, stay unmeasured."""
    for unit in sorted(evidence.units if units is None else units, key=lambda unit: unit.name in evidence.retried):
        absent = {pair for pair in unit.pairs() if pair[1] in but}
        while (left := without(unit, evidence.measured(unit) | absent)) is not None:
            if clock() > deadline - GRACE:
                return
            _go(evidence, unit, left, measure, deadline, clock)


def _go(evidence: Evidence, unit: Unit, left: Unit, measure: Measure, deadline: float, clock) -> None:
    """One attempt at ``left`` of ``unit``: it leaves less unmeasured, or the deadline has passed."""

    def emit(event: dict) -> None:
        evidence.add(unit, event["rows"])
        for mode in dict.fromkeys(row["mode"] for row in event["rows"]):
            say(f"{unit.name}, {mode}: {summary(evidence.rows[unit.name], mode)}")

    until = min(deadline, clock() + unit.seconds)
    before = evidence.measured(unit)
    try:
        measure(left, emit, until)
        reason, blamed = "the process finished without it", None
    except process.OutOfTime as late:
        if until == deadline:
            return  # the run is over, the unit is not to blame
        reason, blamed = f"not finished after {unit.seconds:.0f} s ({late})", None
    except process.Died as death:
        reason, blamed = str(death), (death.mode, death.contender)
    missing = [pair for pair in left.pairs() if pair not in evidence.measured(unit)]
    if blamed in missing:
        missing = [blamed]
    elif evidence.measured(unit) != before and blamed is not None:
        return  # it got somewhere, and nobody is known to have ended it
    _record(evidence, unit, missing, reason)


def _record(evidence: Evidence, unit: Unit, pairs: list[tuple[str, str]], reason: str) -> None:
    if not pairs:
        return
    ours = {name: contender.ours for name, contender in contenders.REGISTRY.items()}
    common = {"dtype": unit.dtype, "status": "error", "reason": reason}
    evidence.add(unit, [common | {"mode": m, "contender": c, "label": c, "ours": ours.get(c, True)} for m, c in pairs])
    for mode, contender in pairs:
        say(f"{unit.name}, {mode}: {contender}: {reason}")


def summary(rows: dict, mode: str) -> str:
    """Times of all contenders in a mode, and what they come to."""
    mine = {c: row for (m, c), row in rows.items() if m == mode}
    parts = []
    for contender, row in mine.items():
        if row["status"] != "ok":
            parts.append(f"{contender} [{row['status']}: {row.get('reason', '')[:100]}]")
        elif row.get("median") is None:
            known = ("instances", "read_bandwidth", "copy_bandwidth", "matrix_rates", "product_rates")
            parts.append(f"{contender} " + json.dumps({name: row[name] for name in known if name in row}))
        else:
            parts.append(f"{contender} {_timed(row)}")
    return "; ".join(parts)


def _timed(row: dict) -> str:
    text = f"{1e3 * row['median']:.4g} ms"
    if row.get("host") is not None:
        text += f", host {1e6 * row['host']:.0f} us, {row.get('launches') or '?'} launches"
    notes = [f"{ratio:.2f} x {name}" for name, ratio in row.get("ratios", {}).items() if name != row["contender"]]
    if row.get("share_of_floor") is not None:
        notes.append(f"{100 * row['share_of_floor']:.0f}% of floor")
    if row.get("allocator") is not None:
        notes.append(f"{row['allocator'] / 1e6:.1f} MB")
    return text + (f" ({', '.join(notes)})" if notes else "")


def conclude(evidence: Evidence) -> None:
    targets = evidence.targets()
    if targets:
        say("\nTargets (met, value, goal):")
    for t in targets:
        sign = "yes" if t["met"] else "NO "
        say(f"  {sign} {t['value']:>12.4g} {t['goal']:>12.4g}  {t['what']}: {t['unit']}, {t['mode']}, {t['contender']}")
    left = evidence.not_measured()
    if left:
        say(f"\nNot measured for want of time ({sum(map(len, left.values()))} modes; the next run goes on there):")
    for name, modes in left.items():
        say(f"  {name}: {', '.join(modes) if len(modes) < 5 else f'{len(modes)} modes'}")
    failures = evidence.failures()
    say("\nFailed:" if failures else "\nNothing failed.")
    for line in failures:
        say(f"  {line}")
    say(f"\n{evidence.path}")
