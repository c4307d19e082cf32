"""``make gpu``: builds, tests and measures on an NVIDIA GPU within a time budget, and needs no network.

Writes ``<device>.json`` (see ``milkernels.bench.evidence``).  A stage or row that breaks is reported and the rest goes
on; what time does not allow is listed as not measured, and measured by the next run.  The exit status is 0 if nothing
failed, 1 if something did, 2 if there is no GPU.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    from milkernels.bench import contenders, cuda, grid, report, worker
    from milkernels.bench.evidence import Evidence
except ImportError as missing:
    sys.exit(f"make gpu: {missing}; it needs a python3 with PyTorch, Triton, pytest, numpy, rich and psutil")

RESULTS = ROOT / "benchmarks" / "results"
_GRACE = 5.0  # seconds for a process to end in good order, and the least that a unit is started with
_COMPILERS = 8  # processes; each has a CUDA context of its own


@dataclass(frozen=True)
class Budget:
    """Seconds: of the whole run, and at most of the stages before the measurements."""

    whole: float
    build: float
    tests: float
    compiling: float  # after the tests, where it goes on beside them
    units: int  # that are compiled for: about those that will be reached


FULL, QUICK = Budget(525, 100, 200, 30, 80), Budget(170, 40, 70, 15, 24)


def say(text: str) -> None:
    print(text, flush=True)


def run_stage(command: Sequence[str], seconds: float, **settings: str) -> tuple[str, str]:
    """(status, last line of what it said): it is interrupted when its time is over, and ended if that does not help."""
    environment = os.environ | settings
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        status = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"not finished after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        finally:
            worker.end_group(process)
        log.seek(0)
        text = log.read().strip()
    status = status or ("ok" if process.returncode == 0 else f"exit status {process.returncode}")
    if status != "ok":
        say(text[-12_000:])
    return status, (text.splitlines() or [""])[-1]


def build(seconds: float) -> dict:
    """The CPU modules, and the CUDA module for this device where its compiler is found."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status, last = run_stage(command, seconds, MILKERNELS_BUILD_EXT="1", TORCH_CUDA_ARCH_LIST=cuda.architecture())
    return {"status": status, "said": last if status != "ok" else ""}


def run_tests(seconds: float, quick: bool) -> dict:
    """The GPU tests; a sick GPU must not pass for want of tests, so skipped ones are counted."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--maxfail=25", f"--junitxml={xml}"]
        options += ["-m", "not slow"] if quick else []
        command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", *options]
        status, last = run_stage(command, seconds)
        outcome = _outcome(xml) if xml.exists() else {}
    if status == "ok" and not outcome.get("passed"):
        status = "no test ran"
    return {"status": status, "said": last, "quick": quick, **outcome}


def _outcome(xml: Path) -> dict:
    cases = list(ET.parse(xml).getroot().iter("testcase"))
    failed = {c.get("name"): c.find(kind) for c in cases for kind in ("failure", "error") if c.find(kind) is not None}
    skipped = {c.get("name"): c.find("skipped").get("message", "") for c in cases if c.find("skipped") is not None}
    first_lines = {name: ((found.get("message") or "").splitlines() or [""])[0] for name, found in failed.items()}
    return {"passed": len(cases) - len(failed) - len(skipped), "failed": first_lines, "skipped": skipped}


# Measurements

Measure = Callable[[grid.Unit, worker.Emit, float], None]


def measure_units(
    evidence: Evidence, measure: Measure, deadline: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Every unit in turn, what failed in an earlier run last; ``deadline`` is of ``clock``."""
    for unit in sorted(evidence.units, key=lambda unit: unit.name in evidence.retried):
        while (left := grid.without(unit, evidence.measured(unit))) is not None:
            if clock() > deadline - _GRACE:
                return
            _go(evidence, unit, left, measure, deadline, clock)


def _go(evidence: Evidence, unit: grid.Unit, left: grid.Unit, measure: Measure, deadline: float, clock) -> None:
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
    except worker.OutOfTime as late:
        if until == deadline:
            return  # the run is over, the unit is not to blame
        reason, blamed = f"not finished after {unit.seconds:.0f} s ({late})", None
    except worker.Died as death:
        reason, blamed = str(death), (death.mode, death.contender)
    missing = [pair for pair in left.pairs() if pair not in evidence.measured(unit)]
    if blamed in missing:
        missing = [blamed]
    elif evidence.measured(unit) != before and blamed is not None:
        return  # it got somewhere, and nobody is known to have ended it
    _record(evidence, unit, missing, reason)


def _record(evidence: Evidence, unit: grid.Unit, pairs: list[tuple[str, str]], reason: str) -> None:
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


# The command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n\n")[0])
    p.add_argument("--quick", action="store_true", help="three minutes instead of nine")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    p.add_argument("--commit", help="of this tree, where it is no git checkout")
    p.add_argument("--fresh", action="store_true", help="measure everything again")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    arguments = parse(argv)
    why = cuda.unavailable()
    if why is not None:
        print(f"make gpu needs a GPU: {why}. Nothing was measured or written.", file=sys.stderr)
        return 2
    budget = QUICK if arguments.quick else FULL
    evidence = _evidence(arguments)
    say(f"{evidence.head['machine']['gpu']['name']}: {evidence.path}")
    stages = {"build": lambda: build(budget.build), "tests": lambda: run_tests(budget.tests, arguments.quick)}
    _stage(evidence, "build", stages["build"], arguments.quick)
    ahead = [unit for unit in evidence.units if grid.without(unit, evidence.measured(unit)) is not None]
    compilers = worker.Compilers(ahead[: budget.units], min(_COMPILERS, os.cpu_count() or 1))
    try:
        _stage(evidence, "tests", stages["tests"], arguments.quick)
    finally:
        late = compilers.finish(budget.compiling)
    say(f"compiling ahead: {f'{late} processes were ended' if late else 'done'}")
    process = worker.Worker()
    try:
        measure_units(evidence, process.run, started + budget.whole)
    finally:
        process.stop()
        evidence.save()
        conclude(evidence)
    return int(bool(evidence.failures()))


def _evidence(arguments: argparse.Namespace) -> Evidence:
    """The file of this device; it goes on with an earlier one of the same code, there or among the published ones."""
    machine = report.machine() | {"gpu": cuda.about()}
    name = f"{report.device_slug(machine['gpu']['name'])}.json"
    command = "make gpu" + (" QUICK=1" if arguments.quick else "")
    path = arguments.out.resolve() / name
    evidence = Evidence(path, grid.grid(), machine, command, arguments.commit)
    count = 0 if arguments.fresh else evidence.resume((path, RESULTS / name))
    if count:
        say(f"goes on with an earlier run of the same code on such a device: {count} rows")
    return evidence


def _stage(evidence: Evidence, name: str, stage: Callable[[], dict], quick: bool) -> None:
    done = evidence.stages.get(name)
    if done is not None and (quick or not done.get("quick")):
        say(f"{name}: ok in an earlier run")
        return
    started = time.monotonic()
    try:
        result = stage()
    except Exception as error:  # the stages after it do not need it
        result = {"status": f"{type(error).__name__}: {error}"}
    result["seconds"] = round(time.monotonic() - started, 1)
    evidence.stages[name] = result
    evidence.save()
    say(f"{name}: {result['status']}, {result['seconds']} s. {result.get('said', '')}")


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


if __name__ == "__main__":
    sys.exit(main())
