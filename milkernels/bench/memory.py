"""Memory of this process: how far a call goes beyond what was held before, and a limit on it.

Resident memory is what the process needs beyond what it held before the call (inputs, libraries and what a
warm-up keeps), outputs and gradients included.  The allocator's peak counts PyTorch's own allocations
exactly, and nothing else.
"""

import contextlib
import ctypes
import gc
import json
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from milkernels import native

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def _status(field: str) -> int:
    """Bytes."""
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
