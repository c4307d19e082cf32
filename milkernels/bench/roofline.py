"""What the machine allows: read bandwidth, matrix rate, and the floor that they set.

The floor of an op is the larger of the bytes it must move over the bandwidth and the arithmetic it must do
over the matrix rate.  Rates of virtual machines change by the second, so they are probed between the rounds.
"""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from milkernels import native

_PROBE_SECONDS = 0.005
_WIDTH = 512  # of the probe's matrices: the default embedding and twice the default hidden size
_CACHE_FALLBACK = 64 << 20


def last_level_cache() -> int:
    """Bytes of the largest cache that the first CPU sees."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes, default=_CACHE_FALLBACK)


def read_bandwidth(repeats: int = 5) -> tuple[float, int]:
    """Bytes per second of the best of several sums over an array that no cache holds, and its bytes."""
    elements = max(256 << 20, 4 * last_level_cache()) // 4
    array = torch.ones(elements)
    array.sum()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - start)
    return 4 * elements / best, 4 * elements


class MatrixProbe:
    """Short matrix products in each type; every ``sample`` appends one rate (FLOP/s) per type."""

    def __init__(self, dtypes: Sequence[torch.dtype]):
        # float32 always: a kernel may convert narrower operands and multiply them in float32.
        self.rates: dict[torch.dtype, list[float]] = {d: [] for d in dict.fromkeys((*dtypes, torch.float32))}
        self._operands = {dtype: self._sized(dtype) for dtype in self.rates}

    def _sized(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Operands that take ``_PROBE_SECONDS`` or more, and twice as long when there are twice as many rows.

        Some types are a hundred times slower than others; on a busy machine threads that wait for each other
        cost milliseconds whatever the size, and a probe must not measure that.
        """
        b = torch.randn(_WIDTH, _WIDTH).to(dtype)
        rows, previous = 16, math.inf
        while True:
            a = torch.randn(rows, _WIDTH).to(dtype)
            seconds = min(self._seconds(a, b) for _ in range(3))
            if rows >= 4096 or (seconds > _PROBE_SECONDS and seconds > 1.6 * previous):
                return a, b
            rows, previous = 2 * rows, seconds

    @staticmethod
    def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        return time.perf_counter() - start

    def sample(self) -> None:
        for dtype, (a, b) in self._operands.items():
            rate = 2 * a.shape[0] * _WIDTH**2 / self._seconds(a, b)
            if dtype == torch.float32:  # the kernels' tile products may run faster than torch.mm: a ceiling is the best
                rate = max(rate, native.product_rate() or 0.0)
            self.rates[dtype].append(rate)

    def rate(self, dtype: torch.dtype, since: int = 0) -> float:
        """Median rate from sample ``since`` on that products of ``dtype`` can count on."""
        rates = [statistics.median(self.rates[dtype][since:])]
        if dtype.itemsize < torch.float32.itemsize:
            rates.append(statistics.median(self.rates[torch.float32][since:]))
        return max(rates)

    def count(self) -> int:
        return len(self.rates[torch.float32])


def floor_seconds(flops: float, nbytes: float, rate: float, bandwidth: float) -> float:
    return max(flops / rate, nbytes / bandwidth)
