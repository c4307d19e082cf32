"""A piece of work that one process measures at a stretch, and how lengths of bags are drawn."""

import json
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from milkernels.bench.workload import Workload
from milkernels.testing import CASES, MODES, Shape

BFLOAT16, FLOAT16, FLOAT32 = "bfloat16", "float16", "float32"


@dataclass(frozen=True)
class Unit:
    """What one process measures at a stretch: contenders take turns in each mode, and its rows come mode by mode.

    ``kind``: "bench" (times, peaks, after the gate), "alone" (the same of every contender in a process of its own),
    "limits" (of the device), "calls" (of small bags; modes are "op bags mode"), "largest" (bag that can be trained
    within ``memory`` bytes), "disk" (an epoch that begins at files; modes are formats), "clam" (the whole CLAM_SB,
    before `accelerate` and after it) or "upstream" (a model of another project; the contenders are before and after).
    """

    name: str
    workload: Workload
    dtype: str
    modes: tuple[str, ...]
    contenders: tuple[str, ...]
    kind: str = "bench"
    headline: bool = False
    memory: int = 0
    seconds: float = 90.0  # a unit that takes longer hangs
    budget: float = 0.0  # seconds of rounds in all, where it is not the same for every mode
    threads: int = 0  # on a CPU; 0: as many as PyTorch takes
    part: str = ""  # of a report
    peaks: bool = True  # of memory, each in a process of its own

    def pairs(self) -> list[tuple[str, str]]:
        return [(mode, contender) for mode in self.modes for contender in self.contenders]

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"workload": self.workload.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        values = json.loads(text)
        values |= {name: tuple(values[name]) for name in ("modes", "contenders")}
        return cls(**values | {"workload": Workload.from_json(values["workload"])})


def unit(
    op: str,
    lengths: Sequence[int],
    dim: int,
    contenders: str,
    *,
    dtype: str,
    device: str,
    modes: Sequence[str] = MODES,
    hidden: int | None = None,
    heads: int | None = None,
    **more,
) -> Unit:
    """``contenders`` are divided by spaces; what is left out of the shape is the op's default."""
    case = CASES[op]
    width, heads = (dim if case.leading == "x" else heads or case.default_heads), heads or case.default_heads
    shape = Shape(tuple(lengths), width, hidden or case.default_hidden, heads)
    about = {name: more.pop(name) for name in ("precision", "autocast", "padded", "dropout") if name in more}
    workload = Workload(op, shape, device=device, **about)
    name = workload.describe(dtype) + more.pop("suffix", "")
    return Unit(name, workload, dtype, tuple(modes), tuple(contenders.split()), **more)


def named(units: Iterable[Unit]) -> list[Unit]:
    """Every unit once, under a name of its own: the first that has it."""
    found: dict[str, Unit] = {}
    for one in units:
        found.setdefault(one.name, one)
    return list(found.values())


def without(unit: Unit, measured: set[tuple[str, str]]) -> Unit | None:
    """What is left of it, for one go: the modes that lack the same contenders as the first that lacks any."""
    lacking = {m: tuple(c for c in unit.contenders if (m, c) not in measured) for m in unit.modes}
    first = next(filter(None, lacking.values()), None)
    if first is None:
        return None
    return replace(unit, modes=tuple(m for m, missing in lacking.items() if missing == first), contenders=first)


# Lengths of bags


def log_uniform_lengths(bags: int, shortest: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Bags as slides come: as many of 1k to 2k instances as of 10k to 20k."""
    draw = random.Random(seed)
    return tuple(round(math.exp(draw.uniform(math.log(shortest), math.log(longest)))) for _ in range(bags))


def heavy_tailed_lengths(bags: int, typical: int, spread: float, shortest: int, longest: int) -> tuple[int, ...]:
    """Evenly spaced quantiles of a log-normal distribution of median ``typical`` (``spread``: the standard deviation of
    the logarithm), cut off at both ends: the same for all, no draw may be lucky.  Not in order."""
    normal = statistics.NormalDist(math.log(typical), spread)
    quantiles = [normal.inv_cdf((i + 0.5) / bags) for i in range(bags)]
    lengths = [min(longest, max(shortest, round(math.exp(q)))) for q in quantiles]
    random.Random(0).shuffle(lengths)
    return tuple(lengths)
