"""The largest bag that a contender can train within so many bytes of memory, its features and gradients included."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks import cuda
from benchmarks.units import Unit
from milkernels.bench import contenders, harness, memory
from milkernels.bench.contenders import Contender
from milkernels.bench.workload import DTYPES
from milkernels.testing import Inputs, OpCase, evaluate

_CLOSE = 0.05  # how far from the largest bag the search may end
_NO_MEMORY = ("allocate", "alloc", "memory")  # what the exceptions of libraries say then


@dataclass
class _Trial:
    """Whether a bag of so many instances can be trained."""

    case: OpCase
    contender: Contender
    few: Inputs
    mode: str

    def __call__(self, rows: int) -> bool:
        try:
            inputs = replace(self.few, x=_many(self.few.x, rows), lengths=(rows,))
            with self.contender.within(), cuda.sound() if inputs.x.is_cuda else contextlib.nullcontext():
                compute, inputs = self.contender.prepare(self.case, inputs, False)
                evaluate(compute, inputs, self.mode, self.case.primary)
            return True
        except (torch.OutOfMemoryError, MemoryError):
            return False
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in _NO_MEMORY):
                raise
            return False
        finally:
            inputs = compute = None  # before what they held is given back
            torch.cuda.empty_cache() if self.few.x.is_cuda else memory.release()


def _many(few: torch.Tensor, rows: int) -> torch.Tensor:
    """The first rows over and over: numbers drawn anew would take longer than the trial."""
    x = torch.empty(rows, few.shape[1], dtype=few.dtype, device=few.device)
    whole = rows // len(few) * len(few)
    x[:whole].view(-1, *few.shape).copy_(few.detach())
    x[whole:].copy_(few[: rows - whole].detach())
    return x


@contextlib.contextmanager
def _limit(nbytes: int, device: str) -> Iterator[None]:
    if device == "cpu":
        with memory.within(nbytes):
            yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(nbytes / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def largest_bag(unit: Unit, mode: str, contender: str) -> dict:
    """``instances`` of it, and the ``memory`` it had to do with."""
    case, device = unit.workload.case, unit.workload.device
    if unit.memory > contenders.available_memory(device):
        return {"status": "unavailable", "reason": f"less than {unit.memory} bytes of memory are free"}
    try:
        few = unit.workload.inputs(DTYPES[unit.dtype])
        trial = _Trial(case, contenders.REGISTRY[contender], few, mode)
        with _limit(unit.memory, device):
            return {"memory": unit.memory, "instances": largest(trial)}
    except Exception as error:
        return refused(error)


def refused(error: Exception) -> dict:
    status = "unavailable" if isinstance(error, contenders.Unavailable) else "error"
    return {"status": status, "reason": str(error) if status == "unavailable" else harness.describe(error)}


def largest(fits: Callable[[int], bool], first: int = 1 << 14, most: int = 1 << 30) -> int:
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
