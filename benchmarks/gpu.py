"""``make gpu``: one sitting on a machine with an NVIDIA GPU, within a time budget; it needs no network.

It writes ``<device>.json`` (see ``README.md``), and what each stage said, into the folder that ``OUT`` names: that is
the one to take away from a machine that is lent. A stage or row that breaks or hangs is reported and the rest goes on;
what time does not allow is listed as not measured, and done by the next run. The exit status is 0 if nothing failed, 1
if something did, 2 if there is no GPU.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Run as a script its folder would be searched first, whose modules have names that others have.
sys.path[:] = [
    str(ROOT),
    *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent),
]

try:
    import psutil

    from benchmarks import cuda, gpu_grid, results, runner
    from benchmarks.results import SKIPPED, Evidence
    from benchmarks.runner import GRACE, conclude, measure_units, say
    from benchmarks.units import Unit, without
    from milkernels.bench import report
    from milkernels.bench.process import end_group
except ImportError as missing:
    sys.exit(f"make gpu: {missing}; it needs a python3 with PyTorch, Triton, pytest, numpy, rich and psutil")

RESULTS = results.FOLDER
now = time.monotonic
_COMPILERS = 8  # processes; each has a CUDA context of its own


@dataclass(frozen=True)
class Budget:
    """Seconds: since the run began, or at most for a stage, which 0 leaves out."""

    whole: float  # since the run began, as the next two
    first: float  # when the first rows have to be there
    build: float  # when the native module has to be there
    smoke: float
    tests: float  # of Triton
    compiling: float  # of them, before the first one
    native_smoke: float
    native_tests: float
    sanitizer: float
    units: int  # that are compiled for: about those that will be reached


FULL = Budget(525, 180, 325, 45, 120, 45, 20, 45, 60, 60)
QUICK = Budget(170, 100, 140, 45, 0, 0, 15, 0, 0, 16)
_AHEAD = 10.0  # seconds that compiling for rows goes on, after the stage that it went on beside
_SMOKE = ("gated_attention_pool", "softmax_pool", "query_pool", "dsmil", "loss_attention_pool")


class Job:
    """A command, from now on; what it says goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, **settings: str):
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings, stdout=file, stderr=file, start_new_session=True
            )

    def _all(self, what: str) -> None:
        """Of it and all that it started: ninja's commands lead groups of their own."""
        for _ in range(2):  # what was started while this one looked
            if self.process.poll() is None:
                top = psutil.Process(self.process.pid)
                for one in (top, *top.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        getattr(one, what)()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._all("suspend")
        try:
            yield
        finally:
            self._all("resume")

    def stop(self) -> None:
        self._all("kill")
        end_group(self.process)

    def finish(self, seconds: float) -> dict:
        """How it ended; when its time is over it is interrupted, and ended if that does not help."""
        status = ""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"not finished after {seconds:.0f} s"
            os.killpg(self.process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        finally:
            self.stop()
        code, text = self.process.returncode, self.log.read_text(errors="replace").strip()
        status = status or ("ok" if code == 0 else f"exit status {code}")
        if status != "ok":
            say(text[-12_000:])
        return {"status": status, "said": (text.splitlines() or [""])[-1]}


def build(folder: Path) -> Job:
    """The CUDA module, for this device, in the background."""
    command = ["nice", sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    settings = {"MILKERNELS_BUILD_EXT": "0", "MILKERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": cuda.architecture()}
    return Job(command, folder / "build.log", **settings)


def run_tests(log: Path, which: str, marked: str, seconds: float, compiling: float) -> dict:
    """GPU tests by their names and mark; a sick GPU must not pass for want of tests, so skipped ones are counted."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        # One line for each, so that the log of a run that hangs names the test.
        options = ["-v", "--tb=short", "-p", "no:cacheprovider", "--maxfail=25", f"--junitxml={xml}"]
        options += ["-k", which, "-m", marked, f"--compiling={compiling:.0f}"]
        command = [sys.executable, "-m", "pytest", "tests/test_numbers.py", "tests/test_gpu.py", *options]
        result = Job(command, log).finish(seconds)
        outcome = _outcome(xml) if xml.exists() else {}
    if result["status"] == "ok" and not outcome.get("passed"):
        result["status"] = "no test ran"
    return result | outcome


def smoke(leg: str) -> str:
    """Which tests: forward and backward of a few ops, in the type that matters, against the oracle."""
    return "test_error_promise and (" + " or ".join(f"{leg}-{op}-bfloat16" for op in _SMOKE) + ")"


def _outcome(xml: Path) -> dict:
    cases = list(ET.parse(xml).getroot().iter("testcase"))
    failed = {c.get("name"): c.find(kind) for c in cases for kind in ("failure", "error") if c.find(kind) is not None}
    skipped = {c.get("name"): c.find("skipped").get("message", "") for c in cases if c.find("skipped") is not None}
    first_lines = {name: ((found.get("message") or "").splitlines() or [""])[0] for name, found in failed.items()}
    return {"passed": len(cases) - len(failed) - len(skipped), "failed": first_lines, "skipped": skipped}


class Sitting:
    """The stages of a run in turn, what tells most first; what one of them costs is bounded, whatever becomes of it."""

    def __init__(self, evidence: Evidence, budget: Budget, started: float):
        self.evidence, self.budget, self.started = evidence, budget, started
        self.folder = evidence.path.parent

    def run(self) -> None:
        budget, units = self.budget, self.evidence.units
        building = build(self.folder)
        try:
            with self._compiling(units[: gpu_grid.FIRST]):
                self._tests("smoke", smoke("gpu_triton"), "not slow", budget.smoke, budget.smoke / 2)
            with building.paused():
                self._measure(units[: gpu_grid.FIRST], budget.first)
            self._tests_in_turn("tests", "gpu_triton", budget.tests, budget.compiling)
            with self._compiling(units):
                built = self._stage("build", self.started + budget.build - now(), building.finish, anew=True)
                self._tests("native smoke", smoke("gpu_native"), "not slow", built and budget.native_smoke)
                self._tests_in_turn("native tests", "gpu_native", built and budget.native_tests)
            self._measure(units, budget.whole - budget.sanitizer, but=() if built else ("native",))
            self._tests("sanitizer", "sanitizer and gpu_native", "slow", built and budget.sanitizer - GRACE)
        finally:
            building.stop()

    def _stage(self, name: str, seconds: float, work: Callable[[float], dict], *, anew: bool = False) -> bool:
        """Whether it is in order, or was in an earlier run."""
        if self.evidence.stages.get(name, {}).get("status") == "ok" and not anew:
            say(f"{name}: ok in an earlier run")
            return True
        began = now()
        seconds = min(seconds, self.started + self.budget.whole - GRACE - began)
        if seconds <= 0:
            result = {"status": SKIPPED}
        else:
            try:
                result = work(seconds)
            except Exception as error:  # the stages after it do not need it
                result = {"status": f"{type(error).__name__}: {error}"}
        result["seconds"] = round(now() - began, 1)
        self.evidence.stages[name] = result
        self.evidence.save()
        say(f"{name}: {result['status']}, {result['seconds']} s. {result.get('said', '')}")
        return result["status"] == "ok"

    def _tests(self, name: str, which: str, marked: str, seconds: float, compiling: float = 0.0) -> None:
        log = self.folder / f"{name.replace(' ', '-')}.log"
        self._stage(name, seconds, lambda allowed: run_tests(log, which, marked, allowed, compiling))

    def _tests_in_turn(self, name: str, leg: str, seconds: float, compiling: float = 0.0) -> None:
        """Those that are not slow; in a run after one in which they passed, the slow ones."""
        slow = self.evidence.stages.get(name, {}).get("status") == "ok"
        name, marked = (f"slow {name}", "slow") if slow else (name, "not slow")
        self._tests(name, f"{leg} and not sanitizer", marked, seconds, compiling)

    @contextlib.contextmanager
    def _compiling(self, units: Sequence[Unit]) -> Iterator[None]:
        """Beside the block kernels are compiled for those of these units that come next."""
        ahead = [unit for unit in units if without(unit, self.evidence.measured(unit)) is not None]
        compilers = runner.Compilers(ahead[: self.budget.units], min(_COMPILERS, os.cpu_count() or 1))
        try:
            yield
        finally:
            late = compilers.finish(_AHEAD)
            say(f"compiling ahead: {f'{late} processes were ended' if late else 'done'}")

    def _measure(self, units: Sequence[Unit], until: float, but: Sequence[str] = ()) -> None:
        worker = runner.Worker()  # of its own: what is built meanwhile is seen by processes that start later
        try:
            measure_units(self.evidence, worker.run, self.started + until, now, units=units, but=but)
        finally:
            worker.stop()


# The command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="make gpu", description=__doc__.partition("\n\n")[0])
    p.add_argument("--quick", action="store_true", help="three minutes instead of nine")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file and of what stages said")
    p.add_argument("--commit", help="of this tree, where it is no git checkout")
    p.add_argument("--fresh", action="store_true", help="measure everything again")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    started = now()
    arguments = parse(argv)
    why = cuda.unavailable()
    if why is not None:
        print(f"make gpu needs a GPU: {why}. Nothing was measured or written.", file=sys.stderr)
        return 2
    evidence = _evidence(arguments)
    evidence.save()
    say(f"results: {evidence.path}")
    try:
        Sitting(evidence, QUICK if arguments.quick else FULL, started).run()
    finally:
        evidence.save()
        conclude(evidence)
    return int(bool(evidence.failures()))


def _evidence(arguments: argparse.Namespace) -> Evidence:
    """The file of this device; it goes on with an earlier one of the same code, there or among the published ones."""
    machine = report.machine() | {"gpu": cuda.about()}
    known = {"python": sys.version.split()[0], "torch": machine["torch"], **machine["gpu"]}
    say(", ".join(f"{name} {value}" for name, value in known.items()))
    name = f"{results.device_slug(machine['gpu']['name'])}.json"
    command = "make gpu" + (" QUICK=1" if arguments.quick else "")
    path = arguments.out.resolve() / name
    evidence = Evidence(path, gpu_grid.grid(), machine, command, arguments.commit)
    count = 0 if arguments.fresh else evidence.resume((path, RESULTS / name))
    if count:
        say(f"goes on with an earlier run of the same code on such a device: {count} rows")
    return evidence


if __name__ == "__main__":
    sys.exit(main())
