"""What is measured on a CPU, the most important first."""

from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks import disk
from benchmarks.units import BFLOAT16, FLOAT32, Unit, heavy_tailed_lengths, named, unit
from milkernels.testing import CASES, even_lengths, skewed_lengths, small_lengths

INSTANCES = 100_000
DIM, HIDDEN = 512, 256
GATED, EMBEDDED = "gated_attention_pool", "gated_attention_pool_embed"
CLAM = 1024  # width of its features, that it embeds in half as many
MAIN = ("dsmil", "dsmil_mlp", "loss_attention_pool", "softmax_pool", "query_pool")
MEMORY = 4 << 30  # that the largest bag has to do with
SCALES = {FLOAT32: (1_000, 10_000, 100_000, 300_000, 1_000_000), BFLOAT16: (10_000, 100_000, 1_000_000, 4_000_000)}
_ONE_BAG = "eager compile accumulate native"
_MANY_BAGS = "eager compile padded torchmil pyg pyg-segment segment-reduce jagged accumulate native"
_LARGE_BAGS = "eager padded torchmil pyg accumulate native"

# Lengths of bags
SLIDES_10K = heavy_tailed_lengths(12, 10_000, 1.2, 200, 200_000)
SLIDES_50K = heavy_tailed_lengths(3, 50_000, 1.0, 200, 200_000)
BOTH_ENDS = (200, 10_000, 1_000, 200_000, 4_000, 10_000, 25_000)  # one slide is larger than all the others
CLASSICAL = heavy_tailed_lengths(102, 12, 1.7, 1, 1_044)  # as MUSK2's

_unit = partial(unit, device="cpu", seconds=1800.0)


def grid(dtypes: Sequence[str], threads: int) -> list[Unit]:
    """``dtypes``: those that PyTorch has fast products for; ``threads``: that PyTorch takes here."""
    parts = (_attention, _ops, _ragged, _scaling, _sizes, _bags, partial(_threads, threads=threads), _disk, _largest)
    return named(one for part in parts for one in part(dtypes))


def _eagers(op: str) -> str:
    return " ".join(("eager", *(f"eager-{formula}" for formula in CASES[op].alternatives)))


def _attention(dtypes: Sequence[str]) -> Iterator[Unit]:
    everyone = "eager compile compile-max-autotune accumulate native"
    about = {"part": "attention", "headline": True}
    for dtype in dtypes:
        yield _unit(GATED, (INSTANCES,), DIM, everyone, dtype=dtype, budget=54.0, **about)
    for dtype in dtypes:
        two = ("fwd", "step")
        yield _unit(
            "attention_pool", (INSTANCES,), DIM, "eager compile native", dtype=dtype, modes=two, budget=18, **about
        )
        yield _unit(GATED, (INSTANCES,), 1024, "eager compile native", dtype=dtype, modes=two, budget=24.0, **about)
    for dtype in dtypes:
        yield _unit(EMBEDDED, (INSTANCES,), CLAM, "eager compile accumulate native", dtype=dtype, budget=36.0, **about)


def _ops(dtypes: Sequence[str]) -> Iterator[Unit]:
    """Those of the mission in every type; each op there is once, for the roofline."""
    for op in MAIN:
        for dtype in dtypes:
            about = {"modes": ("fwd", "step"), "headline": True, "part": "ops"}
            yield _unit(op, (INSTANCES,), DIM, f"{_eagers(op)} native", dtype=dtype, budget=16.0, **about)
    for op, case in CASES.items():
        if "attention" not in case.tags or not case.takes_offsets:
            about = {"modes": ("fwd", "step"), "budget": 4.0, "part": "ops"}
            yield _unit(op, (INSTANCES,), DIM, f"{_eagers(op)} native", dtype=FLOAT32, **about)


def _ragged(dtypes: Sequence[str]) -> Iterator[Unit]:
    def batch(name: str, lengths: Sequence[int], who: str, budget: float, dtype: str, dim=DIM, hidden=HIDDEN) -> Unit:
        about = {"modes": ("fwd", "step"), "budget": budget, "part": "ragged", "headline": who == _MANY_BAGS}
        return _unit(GATED, lengths, dim, who, dtype=dtype, hidden=hidden, suffix=f": {name}", **about)

    for dtype in dtypes:
        yield batch("slides, 10k typical", SLIDES_10K, _MANY_BAGS, 40.0, dtype)
        yield batch("small", small_lengths(), _MANY_BAGS, 10.0, dtype)
    yield batch("classical", CLASSICAL, _MANY_BAGS, 8.0, FLOAT32, 166, 128)
    yield batch("slides, 50k typical", SLIDES_50K, _LARGE_BAGS, 24.0, FLOAT32)
    yield batch("200 to 200k", BOTH_ENDS, _LARGE_BAGS, 24.0, FLOAT32)
    for op in ("dsmil", "loss_attention_pool", "softmax_pool"):
        about = {"modes": ("fwd", "step"), "budget": 8.0, "part": "ragged"}
        who = f"{_eagers(op)} native" if op != "softmax_pool" else "eager pyg-segment native"
        yield _unit(op, SLIDES_10K, DIM, who, dtype=FLOAT32, suffix=": slides, 10k typical", **about)


def _scaling(dtypes: Sequence[str]) -> Iterator[Unit]:
    about = {"kind": "alone", "modes": ("fwd", "step"), "budget": 4.0, "part": "scaling", "suffix": ": alone"}
    for dtype in dtypes:
        for n in SCALES[dtype]:
            yield _unit(GATED, (n,), DIM, _ONE_BAG, dtype=dtype, **about)


def _sizes(dtypes: Sequence[str]) -> Iterator[Unit]:
    about = {"modes": ("fwd", "step"), "budget": 8.0, "part": "sizes"}
    others = {FLOAT32: ({"dim": 256}, {"hidden": 128}, {"heads": 4})}  # where there is time for more than the extremes
    for dtype in dtypes:
        for size in (*others.get(dtype, ()), {"dim": 2048}, {"hidden": 512}, {"heads": 16}):
            shape = {"dim": DIM, "hidden": HIDDEN} | size
            yield _unit(GATED, (INSTANCES,), contenders="eager native", dtype=dtype, **shape, **about)


def _bags(dtypes: Sequence[str]) -> Iterator[Unit]:
    about = {"dtype": dtypes[-1] if FLOAT32 not in dtypes else FLOAT32, "modes": ("fwd", "step"), "part": "bags"}
    for bags in (10, 100, 1_000, 10_000):
        yield _unit(GATED, even_lengths(bags, INSTANCES), DIM, "eager native", budget=8.0, **about)
    yield _unit(GATED, skewed_lengths(32, INSTANCES), DIM, "eager native", budget=8.0, suffix=": skewed", **about)


def _threads(dtypes: Sequence[str], threads: int) -> Iterator[Unit]:
    counts = sorted({threads, *(1 << i for i in range(threads.bit_length()) if 1 << i < threads)})
    about = {"modes": ("fwd", "step"), "budget": 12.0, "part": "threads"}
    for dtype in dtypes:
        for count in counts:
            suffix = f": {count} threads" if count > 1 else ": 1 thread"
            yield _unit(GATED, (INSTANCES,), DIM, "eager native", dtype=dtype, threads=count, suffix=suffix, **about)
    for count in counts:
        suffix = f": {count} threads" if count > 1 else ": 1 thread"
        yield _unit("dsmil", (INSTANCES,), DIM, "eager native", dtype=FLOAT32, threads=count, suffix=suffix, **about)


def _largest(dtypes: Sequence[str]) -> Iterator[Unit]:
    about = {"kind": "largest", "modes": ("step", "frozen"), "memory": MEMORY, "part": "largest"}
    yield _unit(GATED, (1024,), DIM, _ONE_BAG, dtype=FLOAT32, suffix=": largest bag", **about)
    yield _unit("dsmil", (1024,), DIM, "eager native", dtype=FLOAT32, suffix=": largest bag", **about)
    yield _unit(EMBEDDED, (1024,), CLAM, "eager native", dtype=FLOAT32, suffix=": largest bag", **about)


def _disk(dtypes: Sequence[str]) -> Iterator[Unit]:
    about = {"kind": "disk", "modes": tuple(disk.FORMATS), "part": "disk"}
    lengths = heavy_tailed_lengths(8, 10_000, 1.0, 200, 200_000)
    for dtype in (FLOAT32, "float16"):
        yield _unit(GATED, lengths, 1024, "eager native", dtype=dtype, suffix=": from disk", **about)
