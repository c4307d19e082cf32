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

_PROBE_SECONDS = 0.01
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
        """Operands that take about ``_PROBE_SECONDS``; some types are a hundred times slower than others."""
        b = torch.randn(_WIDTH, _WIDTH).to(dtype)
        rows = 16
        while True:
            a = torch.randn(rows, _WIDTH).to(dtype)
            # The best of a few: one disturbed product must not end in a probe too small to measure anything.
            if rows >= 4096 or 2 * min(self._seconds(a, b) for _ in range(4)) > _PROBE_SECONDS:
                return a, b
            rows *= 2

    @staticmethod
    def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
        start = time.perf_counter()
        torch.mm(a, b)
        return time.perf_counter() - start

    def sample(self) -> None:
        for dtype, (a, b) in self._operands.items():
            self.rates[dtype].append(2 * a.shape[0] * _WIDTH**2 / self._seconds(a, b))

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
