"""Interleaved timing: each round runs each contender once, with a probe of the machine between rounds."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MOST_ROUNDS = 30
FEW_ROUNDS = 3  # contenders that cannot have these within the budget leave the time to the others
_CHEAP = 0.05  # a call this short is run once more to learn its time
_SHORTEST_SAMPLE = 0.002  # calls shorter than this are timed several at a time


@dataclass
class Timing:
    seconds: list[float] = field(default_factory=list)  # per call, one entry per round
    calls: int = 1  # per round
    warm: bool = True
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 for fewer than three rounds."""
        if len(self.seconds) < 3:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def plan_rounds(estimates: Mapping[str, float], budget: float, rounds: int | None = None) -> dict[str, int]:
    """Rounds per contender: as many as fit the budget for all alike, fewer (at least one) for slow ones."""
    if rounds is not None:
        return dict.fromkeys(estimates, rounds)
    plan, left = {}, budget
    slowest_first = sorted(estimates, key=lambda name: -estimates[name])
    while slowest_first:
        total = sum(estimates[name] for name in slowest_first)
        alike = MOST_ROUNDS if total <= 0 else int(max(0.0, left) / total)
        if alike >= FEW_ROUNDS:
            return plan | dict.fromkeys(slowest_first, min(alike, MOST_ROUNDS))
        slow, share = slowest_first[0], max(0.0, left) / len(slowest_first)
        plan[slow] = max(1, int(share / estimates[slow]))
        left -= plan[slow] * estimates[slow]
        slowest_first.pop(0)
    return plan


def schedule(plan: Mapping[str, int]) -> list[list[str]]:
    """Who runs in which round, in turns; those with fewer rounds are spread over all of them."""
    total = max(plan.values(), default=0)
    rounds = []
    for i in range(total):
        names = [name for name, n in plan.items() if (i + 1) * n // total > i * n // total]
        turn = i % max(1, len(names))
        rounds.append(names[turn:] + names[:turn])
    return rounds


def measure(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    rounds: int | None = None,
    between: Callable[[], object] = lambda: None,
    expected: Mapping[str, float] | None = None,
    clock: Callable[..., float] | None = None,
) -> dict[str, Timing]:
    """Warms every call up once, then times all of them round by round.  A call that raises has an ``error``.

    ``expected`` seconds guard against a warm-up that is longer than the calls after it (compilation).  ``clock`` is
    another device's ``timed``.
    """
    clock = clock or timed
    timings = {name: Timing() for name in calls}
    estimates = {}
    for name, call in calls.items():
        try:
            estimate = min(clock(call), (expected or {}).get(name, math.inf))
            if estimate < _CHEAP:
                estimate = clock(call)
        except Exception as error:  # any reason: the others still count
            timings[name].error = describe(error)
            continue
        timings[name].calls = max(1, math.ceil(_SHORTEST_SAMPLE / max(estimate, 1e-6)))
        estimates[name] = estimate * timings[name].calls
    left = budget
    while estimates:
        start = time.perf_counter()
        _run_rounds(plan_rounds(estimates, left, rounds), calls, timings, between, clock)
        left -= time.perf_counter() - start
        # Rounds are planned again while they turn out shorter than was guessed and all can have a few more.
        seen = {n: timings[n] for n in estimates if not timings[n].error}
        estimates = {name: t.median * t.calls for name, t in seen.items()}
        most = max((len(t.seconds) for t in seen.values()), default=0)
        if rounds is not None or most >= MOST_ROUNDS or left < FEW_ROUNDS * sum(estimates.values()):
            break
    between()
    return timings


def _run_rounds(
    plan: Mapping[str, int],
    calls: Mapping[str, Callable[[], object]],
    timings: Mapping[str, Timing],
    between: Callable[[], object],
    clock: Callable[..., float],
) -> None:
    for names in schedule(plan):
        between()
        for name in names:
            timing = timings[name]
            if timing.error:
                continue
            try:
                timing.seconds.append(clock(calls[name], timing.calls))
            except Exception as error:
                timing.error = describe(error)


def timed(call: Callable[[], object], calls: int = 1) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def describe(error: BaseException) -> str:
    """One line of an exception."""
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])
