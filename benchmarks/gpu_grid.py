"""What is measured on a GPU, the most important first: time may run out anywhere in it."""

from collections.abc import Iterator

from benchmarks.units import BFLOAT16, FLOAT16, FLOAT32, Unit, log_uniform_lengths, named, unit
from milkernels.testing import CASES

INSTANCES = 100_000
SIZES = tuple((dim, hidden) for hidden in (256, 128, 384) for dim in (1024, 512, 1536))
HEADLINE_SIZES = ((1024, 256), (512, 256), (1536, 384))
SCALES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
GIGABYTE = 1 << 30
WORKSPACES = "workspace-32 workspace-64 workspace-128 workspace-256 workspace-512"
EMBEDDED = "gated_attention_pool_embed"
_NATIVE = ("gated_attention_pool", "softmax_pool", "dsmil", "loss_attention_pool")  # of the called ones
_CALLED_BAGS = ("100x8", "8192")  # launches, and nothing but launches; kernels that serve large bags only
FIRST = 4  # units, which come before the tests

SLIDES = log_uniform_lengths(64, 1_000, 20_000)
SMALL_BAGS = log_uniform_lengths(256, 100, 2_000)
TINY_BAGS = log_uniform_lengths(100, 10, 100)  # as bags of digits are
FEW_ROWS = log_uniform_lengths(512, 5, 50)
# Rows in all, in 64 bags: where `auto` should go from CUDA C++ to Triton.
CROSSING = (2048, 8192, 16_384, 32_768)


def _unit(op: str, lengths, dim: int, contenders: str, *, dtype: str = BFLOAT16, **more) -> Unit:
    if more.get("kind", "bench") == "bench":
        one_bag = "attention" if "attention" in CASES[op].tags else "ops"
        more.setdefault("part", one_bag if len(lengths) == 1 else "ragged")
    return unit(op, lengths, dim, contenders, dtype=dtype, device="cuda", **more)


def _attention(op: str, size: tuple[int, int], heads: int, dtype: str, **more) -> Unit:
    ours = "triton fused" if dtype != FLOAT32 else "triton fused split"
    contenders = more.pop("contenders", f"eager {ours}")
    return _unit(op, (INSTANCES,), size[0], contenders, dtype=dtype, hidden=size[1], heads=heads, **more)


def _one_bag(op: str) -> str:
    return "eager triton" if op == "dsmil_mlp" else "eager triton native"


def _first() -> Iterator[Unit]:
    """Within three minutes, before anything is built: `FIRST` of them."""
    gated = "gated_attention_pool"
    about = {"headline": True, "seconds": 40.0}
    yield _unit(gated, (2,), 1024, "device", kind="limits", modes=("limits",), suffix=": limits", **about)
    yield _attention(gated, HEADLINE_SIZES[0], 1, BFLOAT16, **about)
    yield _unit(gated, SLIDES, 1024, "eager padded triton reference", modes=("step", "fwd"), **about)
    yield _attention(EMBEDDED, HEADLINE_SIZES[0], 1, BFLOAT16, contenders="eager triton", **about)


def _deciding() -> Iterator[Unit]:
    """What constants wait for: where `auto` changes backends, host time, the size of slices."""
    gated, size = "gated_attention_pool", HEADLINE_SIZES[0]
    yield _unit(gated, FEW_ROWS, 1024, "eager padded triton native", modes=("step", "fwd"))
    for rows in CROSSING[1::2]:
        yield _crossing(gated, rows)
    called = tuple(f"{op} {bags} {mode}" for op in _NATIVE for bags in _CALLED_BAGS for mode in ("fwd", "step"))
    yield _unit(gated, (2,), 512, "eager triton native", kind="calls", modes=called, suffix=": calls")
    options = {"contenders": WORKSPACES, "modes": ("step", "fwd"), "suffix": ": workspace"}
    yield _attention(gated, size, 1, BFLOAT16, **options)
    yield _unit("dsmil_mlp", (INSTANCES,), 1024, **options)
    for rows in CROSSING[::2]:
        yield _crossing(gated, rows)
    yield _attention(gated, size, 1, FLOAT32, autocast=True, **options)
    yield _attention(gated, size, 1, FLOAT16, **options)
    yield _attention(EMBEDDED, size, 1, BFLOAT16, **options)
    for op in _NATIVE[1:]:
        for rows in CROSSING[1::2]:
            yield _crossing(op, rows)


def _crossing(op: str, rows: int, **more) -> Unit:
    return _unit(op, (rows // 64,) * 64, 1024, "eager triton native", modes=("step", "fwd"), **more)


def _headlines() -> Iterator[Unit]:
    gated = "gated_attention_pool"
    for size in HEADLINE_SIZES[1:]:
        yield _attention(gated, size, 1, BFLOAT16, headline=True)
    for op in ("softmax_pool", "loss_attention_pool", "dsmil", "query_pool"):
        eager = " ".join(("eager", *(f"eager-{formula}" for formula in CASES[op].alternatives)))
        rows = GIGABYTE // (2 * 1024)
        yield _unit(op, (rows,), 1024, f"{eager} triton native", modes=("fwd", "step"), headline=True)
    for size in HEADLINE_SIZES:
        yield _attention("gated_attention_scores", size, 1, BFLOAT16, modes=("fwd",), headline=True)
    contenders = "eager padded triton reference native"
    yield _unit(gated, SMALL_BAGS, 1024, contenders, modes=("step", "fwd"), headline=True)
    yield _attention(gated, HEADLINE_SIZES[0], 1, FLOAT32, headline=True)
    yield _attention(gated, HEADLINE_SIZES[0], 1, FLOAT32, autocast=True, contenders="eager triton", headline=True)
    yield _unit(gated, (1_000_000,), 512, "eager triton", modes=("step", "frozen", "fwd"), headline=True)


def _compiled() -> Iterator[Unit]:
    """Against torch.compile, apart from the others: it compiles for longer than they all run."""
    gated, both = "gated_attention_pool", "compile triton"
    options = {"contenders": both, "suffix": ": compile", "headline": True, "seconds": 200.0}
    for size in HEADLINE_SIZES:
        yield _attention(gated, size, 1, BFLOAT16, modes=("step", "fwd", "frozen"), **options)
    ragged = {name: value for name, value in options.items() if name != "contenders"}
    for lengths in (SLIDES, SMALL_BAGS):
        yield _unit(gated, lengths, 1024, both, modes=("step",), **ragged)
    yield _attention(gated, HEADLINE_SIZES[0], 1, FLOAT32, modes=("step",), **options)
    yield _attention(EMBEDDED, HEADLINE_SIZES[0], 1, BFLOAT16, modes=("frozen", "fwd"), **options)


def _rest() -> Iterator[Unit]:
    gated, plain = "gated_attention_pool", "attention_pool"
    for op in ("dsmil_mlp", "dsmil", "loss_attention_pool", "softmax_pool", "query_pool"):
        yield _unit(op, (INSTANCES,), 1024, _one_bag(op))
    for dtype, rows in ((FLOAT32, CROSSING[1]), (FLOAT32, CROSSING[2])):
        yield _crossing(gated, rows, dtype=dtype)
    yield _unit(gated, TINY_BAGS, 512, "eager triton native", hidden=128, modes=("step", "fwd"))
    yield _unit(EMBEDDED, SLIDES, 1024, "eager padded triton reference", modes=("frozen", "fwd"))
    yield _attention(EMBEDDED, HEADLINE_SIZES[0], 1, FLOAT32, contenders="eager triton")
    for op in ("dsmil_mlp_embed", "loss_attention_pool_embed", "query_pool_embed"):
        yield _unit(op, (INSTANCES,), 1024, "eager triton")
    yield _attention(gated, HEADLINE_SIZES[0], 1, FLOAT32, precision="high", contenders="eager triton fused")
    yield _attention(gated, HEADLINE_SIZES[0], 1, FLOAT16)
    for op in ("dsmil", "loss_attention_pool", "softmax_pool"):
        yield _unit(op, SLIDES, 1024, "eager triton native reference", modes=("step", "fwd"))
    attention = [
        (op, size, heads, dtype)
        for op, heads, dtype in (
            *((gated, 1, BFLOAT16), (plain, 1, BFLOAT16), (gated, 1, FLOAT32), (gated, 4, BFLOAT16)),
            *((plain, 1, FLOAT32), (gated, 4, FLOAT32), (plain, 4, BFLOAT16), (plain, 4, FLOAT32)),
        )
        for size in SIZES
    ]
    for op, size, heads, dtype in attention:
        yield _attention(op, size, heads, dtype)
    for op in ("dsmil", "dsmil_mlp", "loss_attention_pool", "softmax_pool", "query_pool"):
        for dim in (512, 1536):
            yield _unit(op, (INSTANCES,), dim, _one_bag(op))
        yield _unit(op, (INSTANCES,), 1024, _one_bag(op), dtype=FLOAT32)
    yield _unit(gated, SLIDES, 1024, "eager padded triton reference", dtype=FLOAT32, modes=("step", "fwd"))
    for n in SCALES:
        yield _unit(gated, (n,), 512, "eager triton", modes=("fwd", "step"), part="scaling", suffix=": scaling")
    yield _unit(
        *(gated, (2,), 1024, "eager triton"),
        **{"kind": "largest", "modes": ("step",), "suffix": ": largest bag", "memory": 16 << 30, "seconds": 200.0},
    )


def grid() -> list[Unit]:
    return named(unit for part in (_first, _deciding, _headlines, _compiled, _rest) for unit in part())
