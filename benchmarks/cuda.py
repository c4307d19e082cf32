"""What measuring on a GPU needs: times by events, peaks of PyTorch's allocator, the limits of the device, and notice of
errors that a process does not survive."""

import contextlib
import gc
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence

import torch

from milkernels.bench import contenders, harness, roofline
from milkernels.bench.process import Poisoned

_ARRAY_BYTES = 1 << 30  # twenty times the L2 of the largest GPUs
_HUGE, _LARGE = 8192, 4096  # widths of the probes' matrices: a few milliseconds each
_REPEATS = 8


def unavailable() -> str | None:
    """Why there is no GPU to measure on, or None."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is not built for CUDA"
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} sees no NVIDIA GPU (torch.cuda.is_available() is False)"
    return None


def architecture() -> str:
    """The device's architecture as PyTorch's extensions are told it: from Hopper on with what only this one has."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


@contextlib.contextmanager
def sound() -> Iterator[None]:
    """An error inside the block, or one that it leaves behind on the device, is told apart: fatal or not."""
    try:
        yield
        torch.cuda.synchronize()
    except Exception as error:
        try:
            torch.cuda.synchronize()
        except Exception:
            raise Poisoned(harness.describe(error)) from error
        raise


def timed(call: Callable[[], object], calls: int = 1) -> float:
    """Seconds per call, between two events around all of them: launches that the host is late with count."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with sound():
        begin.record()
        for _ in range(calls):
            call()
        end.record()
    return begin.elapsed_time(end) / 1e3 / calls


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator held at most during ``call`` beyond those before it, results included.

    What libraries keep from call to call (cuBLAS has a workspace) is there before, after a warm-up.
    """
    gc.collect()
    with sound():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
    return torch.cuda.max_memory_allocated() - before


def _best(call: Callable[[], object]) -> float:
    call()
    return min(timed(call) for _ in range(_REPEATS))


def read_bandwidth(device: str = "cuda") -> tuple[float, int]:
    """Bytes per second of the fastest of PyTorch's reductions of an array that no cache holds, and its bytes."""
    array = torch.ones(_ARRAY_BYTES // 4, device=device)
    rows = array.view(-1, 4096)
    reductions = (array.sum, array.amax, lambda: rows.sum(1), lambda: rows.sum(0))
    return _ARRAY_BYTES / min(_best(call) for call in reductions), _ARRAY_BYTES


def copy_bandwidth(device: str = "cuda") -> float:
    """Bytes per second, read and written, of a copy of that array."""
    array = torch.ones(_ARRAY_BYTES // 4, device=device)
    other = torch.empty_like(array)
    return 2 * _ARRAY_BYTES / _best(lambda: other.copy_(array))


class MatrixProbe(roofline.MatrixProbe):
    """Products of large square matrices in each type, float32 at the precision that is switched on."""

    def __init__(self, dtypes: Sequence[torch.dtype], device: str = "cuda"):
        self.device = device
        self.rates = {dtype: [] for dtype in dtypes}
        self._operands = {dtype: self._sized(dtype) for dtype in self.rates}

    def _sized(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        wide = dtype.itemsize == 2 or (dtype.itemsize == 4 and torch.get_float32_matmul_precision() != "highest")
        size = _HUGE if wide else _LARGE
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        return a, b

    def sample(self) -> None:
        for dtype, (a, b) in self._operands.items():
            self.rates[dtype].append(product_rate(a, b))

    def rate(self, dtype: torch.dtype, since: int = 0) -> float:
        return statistics.median(self.rates[dtype][since:])

    def count(self) -> int:
        return len(next(iter(self.rates.values())))


def product_rate(a: torch.Tensor, b: torch.Tensor) -> float:
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / timed(lambda: torch.mm(a, b))


def about() -> dict[str, object]:
    """The GPU and what drives it, as far as can be found out."""
    properties = torch.cuda.get_device_properties(0)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "triton": triton_version,
        **{name: contenders.installed(name) or None for name in ("setuptools", "ninja", "pytest")},
        "nvcc": (_said("nvcc", "--version").splitlines() or [None])[-1],
        **_driver(),
    }


def _said(*command: str) -> str:
    """Nothing where there is no such command, or it hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _driver() -> dict[str, str]:
    fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
    answer = _said("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    return dict(zip(fields, (value.strip() for value in answer.split(",")), strict=False)) if answer else {}
