"""What a call costs apart from its arithmetic: host time and launches; and the largest bag that memory allows."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from milkernels.bench import contenders, cuda, harness
from milkernels.bench.contenders import Contender, Unavailable
from milkernels.bench.grid import Unit
from milkernels.bench.workload import DTYPES
from milkernels.testing import CASES, Inputs, OpCase, Shape, evaluate

_CALLS = 50  # in a row: enough for the host to run ahead of the device, if it can
_REPEATS = 9
_CLOSE = 0.05  # how far from the largest bag the search may end


def times(unit: Unit, mode: str, contender: str) -> dict:
    """Seconds per call of the host alone, and until the device is done, one call behind the other."""
    try:
        with _prepared(unit, mode, contender) as call:
            call()
            torch.cuda.synchronize()
            pairs = [_host_and_device(call) for _ in range(_REPEATS)]
    except Exception as error:
        return _refused(error)
    host, whole = ([pair[i] for pair in pairs] for i in (0, 1))
    return {"host": statistics.median(host), "median": statistics.median(whole), "seconds": whole}


def _host_and_device(call) -> tuple[float, float]:
    with cuda.sound():
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return host / _CALLS, (time.perf_counter() - start) / _CALLS


def launches(unit: Unit, mode: str, contender: str) -> dict:
    """How many kernels one call launches, and which of them are Triton's."""
    try:
        with _prepared(unit, mode, contender) as call:
            ours = contenders.launched(call)
            return {"triton_kernels": dict(ours), "launches": _device_kernels(call)}
    except Exception as error:
        return _refused(error)


def _device_kernels(call) -> int | None:
    """By the profiler; None where it sees no device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    seen = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return len(seen) or None


def _refused(error: Exception) -> dict:
    status = "unavailable" if isinstance(error, Unavailable) else "error"
    return {"status": status, "reason": str(error) if status == "unavailable" else harness.describe(error)}


@contextlib.contextmanager
def _prepared(unit: Unit, mode: str, contender: str) -> Iterator:
    """A call without arguments of the op, bag and mode that "op rows mode" names."""
    op, rows, mode = mode.split()
    case, who = CASES[op], contenders.REGISTRY[contender]
    shape = Shape((int(rows),), unit.workload.shape.dim, case.default_hidden, case.default_heads)
    inputs = replace(unit.workload, op=op, shape=shape).inputs(DTYPES[unit.dtype])
    with who.within(), cuda.sound():
        compute, its_inputs = who.prepare(case, inputs, True)
        yield lambda: evaluate(compute, its_inputs, mode, case.primary)


@dataclass
class _Trial:
    """Whether a bag of so many instances can be trained."""

    unit: Unit
    case: OpCase
    contender: Contender
    few: Inputs
    mode: str

    def __call__(self, rows: int) -> bool:
        try:
            shape = (rows, self.few.x.shape[1])
            x = torch.randn(shape, dtype=self.few.x.dtype, device=self.few.x.device)
            inputs = replace(self.few, x=x, lengths=(rows,))
            with self.contender.within(), cuda.sound():
                compute, inputs = self.contender.prepare(self.case, inputs, False)
                evaluate(compute, inputs, self.mode, self.case.primary)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            x = inputs = compute = None  # before the cache is emptied
            torch.cuda.empty_cache()


def largest_bag(unit: Unit, mode: str, contender: str) -> dict:
    """Instances of the largest bag, its own features and gradients included, within the unit's memory."""
    case, total = unit.workload.case, torch.cuda.get_device_properties(0).total_memory
    if unit.memory > cuda.available_memory():
        return {"status": "unavailable", "reason": f"less than {unit.memory} bytes of memory are free"}
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(unit.memory / total)
    try:
        few = unit.workload.inputs(DTYPES[unit.dtype])
        trial = _Trial(unit, case, contenders.REGISTRY[contender], few, mode)
        return {"memory": unit.memory, "instances": largest(trial)}
    except Exception as error:
        return _refused(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def largest(fits, first: int = 1 << 16, most: int = 1 << 30) -> int:
    """The largest number that fits, to within ``_CLOSE``; 0 if ``first`` does not."""
    if not fits(first):
        return 0
    low = first
    while low < most and fits(2 * low):
        low *= 2
    if low >= most:
        return low
    high = 2 * low
    while high - low > _CLOSE * low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
