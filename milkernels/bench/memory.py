"""Memory of this process: how far a call goes beyond what was held before, and a limit on it.

Resident memory is what the process needs beyond what it held before the call (inputs, libraries and what a
warm-up keeps), outputs and gradients included.  The allocator's peak counts PyTorch's own allocations
exactly, and nothing else.  A contender is measured in a process where nothing else is held.
"""

import contextlib
import ctypes
import gc
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from milkernels import native
from milkernels.bench import contenders
from milkernels.bench.contenders import Contender
from milkernels.bench.process import Emit, ask
from milkernels.bench.workload import DTYPES, Workload
from milkernels.testing import Inputs, OpCase, evaluate

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MOST = 0.9  # of the memory that is left


def _status(field: str) -> int:
    """Bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@dataclass
class Peak:
    extra: int | None = None  # bytes


@contextlib.contextmanager
def resident_peak() -> Iterator[Peak]:
    """Growth of resident memory inside the block, by the system's high-water mark; None where it cannot be reset."""
    peak = Peak()
    try:
        _CLEAR_REFS.write_text("5")  # resets VmHWM
        before = _status("VmRSS")
    except (OSError, StopIteration):
        yield peak
        return
    yield peak
    peak.extra = max(0, _status("VmHWM") - before)


def allocator_peak(call: Callable[[], object]) -> int | None:
    """Most bytes that PyTorch's CPU allocator held at once for ``call``, by the profiler's memory events."""
    from torch.profiler import ProfilerActivity, profile

    native.release_workspace()
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
    native.release_workspace()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def within(extra: int) -> Iterator[None]:
    """Within the block allocations fail that would have this process hold ``extra`` bytes more, touched or not.

    Without it the system ends some process, not always this one, when there is no memory left.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + extra, hard))
    except (OSError, ValueError, StopIteration):  # no such limit here
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def of_contender(seconds: float, workload: Workload, **more) -> dict[str, dict] | str:
    """By mode: ``resident`` and ``allocator`` bytes or None, and the ``seconds`` of the run; or a line that says why
    there is nothing.  The arguments are those of `peaks`, in another process."""
    answers = ask(f"{__name__}.peaks", {"workload": workload.to_json(), **more}, seconds)
    return answers if isinstance(answers, str) else {answer["mode"]: answer for answer in answers}


def peaks(
    emit: Emit, workload: str, contender: str, dtype: str, modes: list[str], once: list[str], threads: int | None
) -> None:
    """Modes in ``once`` are run once, after a warm-up on a prefix."""
    if threads:
        torch.set_num_threads(threads)
    with within(int(_MOST * contenders.available_memory())):
        chosen = Workload.from_json(workload)
        case, inputs = chosen.case, chosen.inputs(DTYPES[dtype])
        for mode in modes:
            emit({"mode": mode, **peak(contenders.REGISTRY[contender], case, inputs, mode, mode in once)[0]})


def peak(contender: Contender, case: OpCase, inputs: Inputs, mode: str, once: bool):
    """What one run takes, and the run itself."""
    compute, its_inputs = contenders.warmed_up(contender, case, inputs, mode, whole=not once)

    def call():
        with contender.within():
            return evaluate(compute, its_inputs, mode, case.primary)

    release()
    with resident_peak() as extra:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    del result
    held = None if once else allocator_peak(call)
    return {"resident": extra.extra, "allocator": held, "seconds": seconds}, call
