"""What a call costs on a GPU apart from its arithmetic: host time and launches."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import cuda, variants
from benchmarks.largest import refused
from benchmarks.units import Unit
from milkernels.bench import contenders
from milkernels.bench.workload import DTYPES
from milkernels.testing import CASES, Shape, evaluate

_CALLS = 50  # in a row: enough for the host to run ahead of the device, if it can
_REPEATS = 5


def times(unit: Unit, mode: str, contender: str) -> dict:
    """Seconds per call of the host alone, and until the device is done, one call behind the other."""
    try:
        with prepared(unit, mode, contender) as call:
            call()
            torch.cuda.synchronize()
            pairs = [_host_and_device(call) for _ in range(_REPEATS)]
    except Exception as error:
        return refused(error)
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
        with prepared(unit, mode, contender) as call:
            ours = variants.launched(call)
            return {"triton_kernels": dict(ours), "launches": _device_kernels(call)}
    except Exception as error:
        return refused(error)


def _device_kernels(call) -> int | None:
    """By the profiler; None where it sees no device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    seen = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    return len(seen) or None


@contextlib.contextmanager
def prepared(unit: Unit, mode: str, contender: str) -> Iterator:
    """A call without arguments of the op, bag and mode that "op bags mode" names, bags as "8192" or "100x8"."""
    op, bags, mode = mode.split()
    count, _, rows = bags.rpartition("x")
    case, who = CASES[op], contenders.REGISTRY[contender]
    shape = Shape((int(rows),) * int(count or 1), unit.workload.shape.dim, case.default_hidden, case.default_heads)
    inputs = replace(unit.workload, op=op, shape=shape).inputs(DTYPES[unit.dtype])
    with who.within(), cuda.sound():
        compute, its_inputs = who.prepare(case, inputs, True)
        yield lambda: evaluate(compute, its_inputs, mode, case.primary)
