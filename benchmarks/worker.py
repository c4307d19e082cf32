"""The process that measures the units of a grid: ``python -m milkernels.bench.worker``.

It reads units, one JSON line each, and answers in JSON lines: ``doing`` (a contender at work), ``rows`` (of a mode, as
soon as it is measured), ``done``.  A CUDA error that spoils the process is answered by ``poisoned``, and ends it: what
``Worker`` does then is start another.  With ``--compile`` it only runs our contenders once, which fills Triton's cache
on disk: several such processes compile in parallel what one that measures would compile in turn.
"""

import contextlib
import functools
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from milkernels.bench.units import Unit

_PACKAGES = Path(__file__).resolve().parents[2]  # what must be importable in the process
_TIMING = 0.35  # seconds of rounds for each mode
_COMPILED = ("triton", "fused", "split")
Emit = Callable[[dict], object]


class Died(Exception):
    """The process ended in the middle of a unit; ``contender`` and ``mode`` were at work, where it is known."""

    def __init__(self, reason: str, contender: str = "", mode: str = ""):
        super().__init__(reason)
        self.contender, self.mode = contender, mode


class OutOfTime(Exception):
    """The unit was not finished at its deadline."""


class Worker:
    """The other end: one process that lives as long as nothing goes wrong in it."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-m", "milkernels.bench.worker")):
        self.command = command
        self.process: subprocess.Popen | None = None

    def run(self, unit: Unit, emit: Emit, deadline: float) -> None:
        """Measures the unit; ``emit`` takes each ``rows`` event.  ``deadline`` is of ``time.monotonic``.

        Raises:
            Died: the process ended, by itself or by a signal.
            OutOfTime: it was ended, because the deadline passed.
        """
        if self.process is None or self.process.poll() is not None:
            self._start()
        at_work = {"contender": "", "mode": ""}
        with contextlib.suppress(OSError):  # where it has ended, that is in the queue
            self.process.stdin.write(unit.to_json() + "\n")
            self.process.stdin.flush()
        while True:
            try:
                event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.stop()
                raise OutOfTime(f"{at_work['contender']} {at_work['mode']}".strip()) from None
            if event is None:
                raise Died(self._epitaph(), **at_work)
            if "doing" in event:
                at_work = event["doing"]
            elif "poisoned" in event:
                self.stop()
                raise Died(event["poisoned"], **at_work)
            elif "done" in event:
                return
            else:
                emit(event)

    def _start(self) -> None:
        self.stop()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by stop
        self.process = subprocess.Popen(
            self.command,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,  # torch.compile has processes of its own, which must end with it
        )
        self.events: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=_listen, args=(self.process.stdout, self.events), daemon=True).start()

    def stop(self) -> None:
        if self.process is None:
            return
        end_group(self.process)
        self.process = None
        self.errors.close()

    def _epitaph(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or [""])[-1]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self.stop()
        return ": ".join(filter(None, (f"the process ended with {how}", last)))


class Compilers:
    """Processes that compile for units that will be measured; what fails in them will fail, and be told, there."""

    def __init__(self, units: list[Unit], count: int):
        command = (sys.executable, "-m", "milkernels.bench.worker", "--compile")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.processes = []
        for i in range(min(count, len(units))):
            process = subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, text=True, **quiet)
            with contextlib.suppress(OSError):
                process.stdin.write("".join(unit.to_json() + "\n" for unit in units[i::count]))
                process.stdin.close()
            self.processes.append(process)

    def finish(self, seconds: float) -> int:
        """Waits so long, ends those that are at it still and returns how many: nothing may disturb what is timed."""
        end, late = time.monotonic() + seconds, 0
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late += 1
            end_group(process)
        self.processes = []
        return late


def _environment() -> dict[str, str]:
    paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _listen(stream, events: queue.Queue) -> None:
    for line in stream:
        events.put(json.loads(line))
    events.put(None)


def end_group(process: subprocess.Popen) -> None:
    """Ends a process that leads a session, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# In the process


def measure(unit: Unit, emit: Emit) -> None:
    if unit.workload.device == "cpu":
        _set_threads(unit.threads)
    kinds = {"bench": _bench, "alone": _alone, "limits": _limits, "calls": _calls, "largest": _largest, "disk": _disk}
    kinds[unit.kind](unit, emit)


def _set_threads(count: int) -> None:
    """Sets as many threads as the unit wants, or as PyTorch took when it was imported."""
    import torch

    usual = _machine_threads()  # asked before they are changed for the first time
    torch.set_num_threads(count or usual)


@functools.cache
def _machine_threads() -> int:
    import torch

    return torch.get_num_threads()


def _rows(unit: Unit, rows: Sequence, probe, bandwidth: float) -> dict:
    from milkernels.bench import report
    from milkernels.bench.workload import DTYPES

    limits = {"read_bandwidth": bandwidth, "matrix_rate": statistics.median(probe.rates[DTYPES[unit.dtype]])}
    return {"rows": [report.plain(report.row_values(row) | {"limits": limits}) for row in rows]}


def _bench(unit: Unit, emit: Emit) -> None:
    from milkernels.bench.run import Bench, Options

    def at_work(contender: str, mode: str) -> None:
        emit({"doing": {"contender": contender, "mode": mode}})

    cpu = unit.workload.device == "cpu"  # on a GPU a peak is taken in this process
    budget = unit.budget or _TIMING * len(unit.modes)
    options = Options([unit.dtype], unit.modes, unit.contenders, budget, threads=unit.threads or None, memory=cpu)
    bench = Bench(
        unit.workload,
        options,
        finished=lambda rows: emit(_rows(unit, rows, bench.probe, bench.bandwidth)),
        at_work=at_work,
    )
    bench.run()


def _alone(unit: Unit, emit: Emit) -> None:
    from milkernels.bench import scaling

    scaling.rows(unit, lambda rows, probe, bandwidth: emit(_rows(unit, rows, probe, bandwidth)))


def _disk(unit: Unit, emit: Emit) -> None:
    from milkernels.bench import disk

    for mode in unit.modes:
        emit({"doing": {"contender": "", "mode": mode}})
        emit({"rows": [_row(mode, **row) for row in disk.rows(unit, mode)]})


def _limits(unit: Unit, emit: Emit) -> None:
    import torch

    from milkernels.bench import cuda
    from milkernels.bench.gpu_grid import HEADLINE_SIZES, INSTANCES

    def rate(dtype: torch.dtype, precision: str = "highest") -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        probe = cuda.MatrixProbe([dtype])
        for _ in range(9):
            probe.sample()
        torch.set_float32_matmul_precision(before)
        return probe.rate(dtype)

    def product(dim: int, hidden: int) -> float:
        device = unit.workload.device
        a, b = (torch.randn(n, dim, device=device, dtype=torch.bfloat16) for n in (INSTANCES, 2 * hidden))
        cuda.product_rate(a, b.t())
        return statistics.median(cuda.product_rate(a, b.t()) for _ in range(9))

    bandwidth, array = cuda.read_bandwidth()
    rates = {name: rate(getattr(torch, name)) for name in ("bfloat16", "float16", "float32", "float64")}
    row = {
        "read_bandwidth": bandwidth,
        "copy_bandwidth": cuda.copy_bandwidth(),
        "array_bytes": array,
        "matrix_rates": rates | {"tf32": rate(torch.float32, "high")},
        "product_rates": {f"{INSTANCES} x {d} x {2 * h}": product(d, h) for d, h in HEADLINE_SIZES},
    }
    emit({"rows": [_row("limits", "device", row)]})


def _row(mode: str, contender: str, values: dict | None = None, **more) -> dict:
    from milkernels.bench.contenders import REGISTRY

    about = {"mode": mode, "contender": contender, "label": contender, "status": "ok"}
    if contender in REGISTRY:
        about["ours"] = REGISTRY[contender].ours
    return {**about, **(values or {}), **more}


def _calls(unit: Unit, emit: Emit) -> None:
    """Host time and launches of one call; counted after all is timed, because a profiler may slow down what follows."""
    from milkernels.bench import calls

    rows = {}
    for mode, contender in unit.pairs():
        emit({"doing": {"contender": contender, "mode": mode}})
        rows[mode, contender] = _row(mode, contender, calls.times(unit, mode, contender))
        emit({"rows": [rows[mode, contender]]})
    for (mode, contender), row in rows.items():
        if row["status"] == "ok":
            emit({"doing": {"contender": contender, "mode": mode}})
            emit({"rows": [row | calls.launches(unit, mode, contender)]})


def _largest(unit: Unit, emit: Emit) -> None:
    from milkernels.bench.largest import largest_bag

    for mode, contender in unit.pairs():
        emit({"doing": {"contender": contender, "mode": mode}})
        emit({"rows": [_row(mode, contender, largest_bag(unit, mode, contender))]})


def compile_unit(unit: Unit) -> None:
    from milkernels.bench import contenders, cuda
    from milkernels.bench.workload import DTYPES
    from milkernels.testing import evaluate

    if unit.kind != "bench":
        return
    case, inputs = unit.workload.case, unit.workload.inputs(DTYPES[unit.dtype])
    for mode, name in unit.pairs():
        contender = contenders.REGISTRY[name]
        if name not in _COMPILED:
            continue
        with contextlib.suppress(Exception), unit.workload.products(), contender.within(), cuda.sound():
            compute, its_inputs = contender.prepare(case, inputs, True)
            evaluate(compute, its_inputs, mode, case.primary)


def main(argv: Sequence[str] | None = None) -> int:
    from milkernels.bench import cuda

    if "--compile" in (sys.argv[1:] if argv is None else argv):
        os.nice(10)
        for line in sys.stdin:
            with contextlib.suppress(Exception):
                compile_unit(Unit.from_json(line))
        return 0
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints must not end up among the answers

    def emit(event: dict) -> None:
        answers.write(json.dumps(event) + "\n")

    for line in sys.stdin:
        unit = Unit.from_json(line)
        try:
            measure(unit, emit)
        except cuda.Poisoned as error:
            emit({"poisoned": str(error)})
            return 3
        emit({"done": unit.name})
        if unit.kind == "calls":
            return 0  # the profiler goes with the process
        _tidy(unit)
    return 0


def _tidy(unit: Unit) -> None:
    """The next unit finds the memory that this one found."""
    import gc

    import torch

    gc.collect()
    if unit.workload.device != "cpu":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
