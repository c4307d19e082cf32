"""What is measured on a GPU, the most important first: time may run out anywhere in it."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from milkernels.bench.workload import Workload
from milkernels.testing import CASES, MODES, Shape

INSTANCES = 100_000
SIZES = tuple((dim, hidden) for hidden in (256, 128, 384) for dim in (1024, 512, 1536))
HEADLINE_SIZES = ((1024, 256), (512, 256), (1536, 384))
GIGABYTE = 1 << 30
_BFLOAT16, _FLOAT16, _FLOAT32 = "bfloat16", "float16", "float32"
_CALLED = ("gated_attention_pool", "attention_pool", "softmax_pool", "loss_attention_pool", "dsmil", "dsmil_mlp")
CALL_ROWS = (2, 8192)  # launches, and nothing but launches; kernels that serve large bags only


@dataclass(frozen=True)
class Unit:
    """What one process measures at a stretch: contenders take turns in each mode, and its rows come mode by mode.

    ``kind``: "bench" (times, peaks, after the gate), "limits" (of the device), "calls" (of small bags; modes are
    "op rows mode") or "largest" (bag that can be trained within ``memory`` bytes).
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

    def pairs(self) -> list[tuple[str, str]]:
        return [(mode, contender) for mode in self.modes for contender in self.contenders]

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"workload": self.workload.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        values = json.loads(text)
        values |= {name: tuple(values[name]) for name in ("modes", "contenders")}
        return cls(**values | {"workload": Workload.from_json(values["workload"])})


def log_uniform_lengths(bags: int, shortest: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """As slides come: as many of 1k to 2k instances as of 10k to 20k."""
    draw = random.Random(seed)
    return tuple(round(math.exp(draw.uniform(math.log(shortest), math.log(longest)))) for _ in range(bags))


SLIDES = log_uniform_lengths(64, 1_000, 20_000)
SMALL_BAGS = log_uniform_lengths(256, 100, 2_000)
TINY_BAGS = log_uniform_lengths(100, 10, 100)  # as bags of digits are


def describe(workload: Workload, dtype: str) -> str:
    s = workload.shape
    lengths = f"{s.instances}" if s.bags == 1 else f"{s.bags} of {min(s.lengths)}-{max(s.lengths)}"
    precision = "" if workload.precision == "highest" else f" precision {workload.precision}"
    hidden = f" D{s.hidden}" if CASES[workload.op].hidden_flops(s) else ""
    return f"{workload.op} {lengths} x {s.dim}{hidden} K{s.heads} {dtype}{precision}"


def _unit(
    op: str, lengths, dim: int, contenders: str, *, dtype=_BFLOAT16, modes=MODES, hidden=None, heads=None, **more
):
    case = CASES[op]
    shape = Shape(tuple(lengths), dim, hidden or case.default_hidden, heads or case.default_heads)
    workload = Workload(op, shape, device="cuda", precision=more.pop("precision", "highest"))
    suffix = more.pop("suffix", "")
    return Unit(describe(workload, dtype) + suffix, workload, dtype, tuple(modes), tuple(contenders.split()), **more)


def _attention(op: str, size: tuple[int, int], heads: int, dtype: str, **more) -> Unit:
    ours = "triton fused" if dtype != _FLOAT32 else "triton fused split"
    contenders = more.pop("contenders", f"eager {ours}")
    return _unit(op, (INSTANCES,), size[0], contenders, dtype=dtype, hidden=size[1], heads=heads, **more)


def _headlines() -> Iterator[Unit]:
    gated = "gated_attention_pool"
    ragged = "eager padded triton reference"
    yield _unit(gated, (2,), 1024, "device", kind="limits", modes=("limits",), suffix=": limits", headline=True)
    yield _attention(gated, HEADLINE_SIZES[0], 1, _BFLOAT16, headline=True)
    yield _unit(gated, SLIDES, 1024, ragged, modes=("step", "fwd"), headline=True)
    for size in HEADLINE_SIZES[1:]:
        yield _attention(gated, size, 1, _BFLOAT16, headline=True)
    for op in ("softmax_pool", "loss_attention_pool", "dsmil", "query_pool"):
        eager = " ".join(("eager", *(f"eager-{formula}" for formula in CASES[op].alternatives)))
        rows = GIGABYTE // (2 * 1024)
        yield _unit(op, (rows,), 1024, f"{eager} triton native", modes=("fwd", "step"), headline=True)
    for size in HEADLINE_SIZES:
        yield _attention("gated_attention_scores", size, 1, _BFLOAT16, modes=("fwd",), headline=True)
    yield _unit(gated, SMALL_BAGS, 1024, f"{ragged} native", modes=("step", "fwd"), headline=True)
    yield _attention(gated, HEADLINE_SIZES[0], 1, _FLOAT32, headline=True)
    yield _unit(gated, (1_000_000,), 512, "eager triton", modes=("step", "frozen", "fwd"), headline=True)


def _tuning() -> Iterator[Unit]:
    gated, size = "gated_attention_pool", HEADLINE_SIZES[0]
    called = tuple(f"{op} {rows} {mode}" for op in _CALLED for rows in CALL_ROWS for mode in ("fwd", "step"))
    yield _unit(gated, (2,), 512, "eager triton fused native", kind="calls", modes=called, suffix=": calls")
    sizes = "workspace-8 workspace-16 workspace-32 workspace-64"
    yield _attention(gated, size, 1, _BFLOAT16, contenders=sizes, modes=("fwd", "step"), suffix=": workspace")
    for dim, hidden in HEADLINE_SIZES[1:]:
        options = {"contenders": sizes, "modes": ("fwd", "step"), "suffix": ": workspace"}
        yield _attention(gated, (dim, hidden), 1, _BFLOAT16, **options)


def _compiled() -> Iterator[Unit]:
    """Against torch.compile, apart from the others: it compiles for longer than they all run."""
    gated, both = "gated_attention_pool", "compile triton"
    options = {"contenders": both, "suffix": ": compile", "headline": True, "seconds": 200.0}
    for size in HEADLINE_SIZES:
        yield _attention(gated, size, 1, _BFLOAT16, modes=("step", "fwd", "frozen"), **options)
    ragged = {name: value for name, value in options.items() if name != "contenders"}
    for lengths in (SLIDES, SMALL_BAGS):
        yield _unit(gated, lengths, 1024, both, modes=("step",), **ragged)
    yield _attention(gated, HEADLINE_SIZES[0], 1, _FLOAT32, modes=("step",), **options)


def _rest() -> Iterator[Unit]:
    gated, plain = "gated_attention_pool", "attention_pool"
    for op in ("dsmil_mlp", "dsmil", "loss_attention_pool", "softmax_pool", "query_pool"):
        yield _unit(op, (INSTANCES,), 1024, "eager triton native")
    yield _unit(gated, TINY_BAGS, 512, "eager triton native", hidden=128, modes=("step", "fwd"))
    yield _attention(gated, HEADLINE_SIZES[0], 1, _FLOAT32, precision="high", contenders="eager triton fused")
    yield _attention(gated, HEADLINE_SIZES[0], 1, _FLOAT16)
    for op in ("dsmil", "loss_attention_pool", "softmax_pool"):
        yield _unit(op, SLIDES, 1024, "eager triton native reference", modes=("step", "fwd"))
    attention = [
        (op, size, heads, dtype)
        for op, heads, dtype in (
            *((gated, 1, _BFLOAT16), (plain, 1, _BFLOAT16), (gated, 1, _FLOAT32), (gated, 4, _BFLOAT16)),
            *((plain, 1, _FLOAT32), (gated, 4, _FLOAT32), (plain, 4, _BFLOAT16), (plain, 4, _FLOAT32)),
        )
        for size in SIZES
    ]
    for op, size, heads, dtype in attention:
        yield _attention(op, size, heads, dtype)
    for op in ("dsmil", "dsmil_mlp", "loss_attention_pool", "softmax_pool", "query_pool"):
        for dim in (512, 1536):
            yield _unit(op, (INSTANCES,), dim, "eager triton native")
        yield _unit(op, (INSTANCES,), 1024, "eager triton native", dtype=_FLOAT32)
    yield _unit(gated, SLIDES, 1024, "eager padded triton reference", dtype=_FLOAT32, modes=("step", "fwd"))
    yield _unit(
        *(gated, (2,), 1024, "eager triton"),
        **{"kind": "largest", "modes": ("step",), "suffix": ": largest bag", "memory": 16 << 30, "seconds": 200.0},
    )


def grid() -> list[Unit]:
    """Every unit once, under a name of its own."""
    units = {}
    for part in (_headlines, _compiled, _tuning, _rest):
        for unit in part():
            units.setdefault(unit.name, unit)
    return list(units.values())


def without(unit: Unit, measured: set[tuple[str, str]]) -> Unit | None:
    """What is left of it, for one go: the modes that lack the same contenders as the first that lacks any."""
    lacking = {m: tuple(c for c in unit.contenders if (m, c) not in measured) for m in unit.modes}
    first = next(filter(None, lacking.values()), None)
    if first is None:
        return None
    return replace(unit, modes=tuple(m for m, missing in lacking.items() if missing == first), contenders=first)
