"""Peak memory of one contender, in a process of its own: ``python -m milkernels.bench.memory SPEC``.

Resident memory is what the process needs beyond what it held before the run (inputs, libraries and what a
warm-up keeps), outputs and gradients included.  The allocator's peak counts PyTorch's own allocations
exactly, and nothing else.  SPEC is JSON; so is the answer, on the last line.
"""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_PACKAGES = Path(__file__).resolve().parents[2]  # what must be importable in the child


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@dataclass
class Peak:
    extra: int | None = None  # bytes


@contextlib.contextmanager
def resident_peak() -> Iterator[Peak]:
    """Growth of resident memory inside the block: the kernel's high-water mark, or where it cannot be reset
    a thread that looks every millisecond; None where neither works."""
    peak = Peak()
    try:
        _CLEAR_REFS.write_text("5")  # resets VmHWM
        before = _status("VmRSS")
    except (OSError, StopIteration):
        with _sampled_peak(peak):
            yield peak
        return
    yield peak
    peak.extra = max(0, _status("VmHWM") - before)


@contextlib.contextmanager
def _sampled_peak(peak: Peak) -> Iterator[None]:
    try:
        import psutil

        process = psutil.Process()
        before = highest = process.memory_info().rss
    except Exception:  # no psutil, or no permission: there is no figure
        yield
        return
    stop = threading.Event()

    def look() -> None:
        nonlocal highest
        while not stop.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    peak.extra = max(highest, process.memory_info().rss) - before


def allocator_peak(call: Callable[[], object]) -> int | None:
    """Most bytes that PyTorch's CPU allocator held at once for ``call``, by the profiler's memory events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = [e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0]
    held = highest = 0
    for event in sorted(events, key=lambda e: (e["ts"], e["args"].get("Ev Idx", 0))):
        held += event["args"]["Bytes"]
        highest = max(highest, held)
    return highest if events else None


def release() -> None:
    """Gives what the warm-up freed back to the system, or reusing it would not show."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _measure(spec: dict) -> dict[str, dict]:
    from milkernels.bench import contenders
    from milkernels.bench.workload import DTYPES, Workload
    from milkernels.testing import evaluate

    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    workload = Workload.from_json(spec["workload"])
    case, inputs = workload.case, workload.inputs(DTYPES[spec["dtype"]])
    contender = contenders.REGISTRY[spec["contender"]]
    answers = {}
    for mode in spec["modes"]:
        once = mode in spec["once"]
        compute, its_inputs = contenders.warmed_up(contender, case, inputs, mode, whole=not once)

        def call(compute=compute, its_inputs=its_inputs, mode=mode):
            return evaluate(compute, its_inputs, mode, case.primary)

        release()
        with resident_peak() as peak:
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
        del result
        allocated = None if once else allocator_peak(call)
        answers[mode] = {"resident": peak.extra, "allocator": allocated, "seconds": seconds}
    return answers


def measure(
    workload_json: str,
    contender: str,
    dtype: str,
    modes: list[str],
    once: list[str],
    threads: int | None,
    timeout: float,
) -> dict[str, dict] | str:
    """Answers by mode from a child process, or a line that says why there are none.

    An answer has ``resident`` and ``allocator`` bytes or None, and the ``seconds`` of the run.  Modes in
    ``once`` are run once, after a warm-up on a prefix.
    """
    spec = {
        "workload": workload_json,
        "contender": contender,
        "dtype": dtype,
        "modes": modes,
        "once": once,
        "threads": threads,
    }
    paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "milkernels.bench.memory", json.dumps(spec)]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not finished after {timeout:.0f} s"
    if child.returncode != 0:
        return (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    return json.loads(child.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
