"""``make gpu``: builds, tests and measures on an NVIDIA GPU within a time budget, and needs no network.

Writes ``<device>.json`` (see ``README.md``).  A stage or row that breaks is reported and the rest goes
on; what time does not allow is listed as not measured, and measured by the next run.  The exit status is 0 if nothing
failed, 1 if something did, 2 if there is no GPU.
"""

import argparse
import contextlib
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
# Run as a script its folder would be searched first, whose modules have names that others have.
sys.path[:] = [
    str(ROOT),
    *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent),
]

try:
    from benchmarks import cuda, gpu_grid, results, runner
    from benchmarks.results import Evidence
    from benchmarks.runner import GRACE, conclude, measure_units, say
    from benchmarks.units import without
    from milkernels.bench import report
    from milkernels.bench.process import end_group
except ImportError as missing:
    sys.exit(f"make gpu: {missing}; it needs a python3 with PyTorch, Triton, pytest, numpy, rich and psutil")

RESULTS = results.FOLDER
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
                process.wait(GRACE)
        finally:
            end_group(process)
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
        files = ["tests/test_numbers.py", "tests/test_gpu.py", "--legs", "gpu"]
        command = [sys.executable, "-m", "pytest", *files, *options]
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
    say(f"{evidence.machine['gpu']['name']}: {evidence.path}")
    stages = {"build": lambda: build(budget.build), "tests": lambda: run_tests(budget.tests, arguments.quick)}
    _stage(evidence, "build", stages["build"], arguments.quick)
    ahead = [unit for unit in evidence.units if without(unit, evidence.measured(unit)) is not None]
    compilers = runner.Compilers(ahead[: budget.units], min(_COMPILERS, os.cpu_count() or 1))
    try:
        _stage(evidence, "tests", stages["tests"], arguments.quick)
    finally:
        late = compilers.finish(budget.compiling)
    say(f"compiling ahead: {f'{late} processes were ended' if late else 'done'}")
    worker = runner.Worker()
    try:
        measure_units(evidence, worker.run, started + budget.whole)
    finally:
        worker.stop()
        evidence.save()
        conclude(evidence)
    return int(bool(evidence.failures()))


def _evidence(arguments: argparse.Namespace) -> Evidence:
    """The file of this device; it goes on with an earlier one of the same code, there or among the published ones."""
    machine = report.machine() | {"gpu": cuda.about()}
    name = f"{results.device_slug(machine['gpu']['name'])}.json"
    command = "make gpu" + (" QUICK=1" if arguments.quick else "")
    path = arguments.out.resolve() / name
    evidence = Evidence(path, gpu_grid.grid(), machine, command, arguments.commit)
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


if __name__ == "__main__":
    sys.exit(main())
