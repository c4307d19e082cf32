"""What is measured on a GPU, the most important first: time may run out anywhere in it."""

from collections.abc import Iterator

from benchmarks.units import BFLOAT16, FLOAT16, FLOAT32, Unit, log_uniform_lengths, named, unit
from milkernels.testing import CASES

INSTANCES = 100_000
SIZES = tuple((dim, hidden) for hidden in (256, 128, 384) for dim in (1024, 512, 1536))
HEADLINE_SIZES = ((1024, 256), (512, 256), (1536, 384))
SCALES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
GIGABYTE = 1 << 30
EMBEDDED = "gated_attention_pool_embed"
_CALLED = ("gated_attention_pool", "attention_pool", "softmax_pool", "loss_attention_pool", "dsmil", "dsmil_mlp")
CALL_ROWS = (2, 8192)  # launches, and nothing but launches; kernels that serve large bags only

SLIDES = log_uniform_lengths(64, 1_000, 20_000)
SMALL_BAGS = log_uniform_lengths(256, 100, 2_000)
TINY_BAGS = log_uniform_lengths(100, 10, 100)  # as bags of digits are


def _unit(op: str, lengths, dim: int, contenders: str, *, dtype: str = BFLOAT16, **more) -> Unit:
    if more.get("kind", "bench") == "bench":
        one_bag = "attention" if "attention" in CASES[op].tags else "ops"
        more.setdefault("part", one_bag if len(lengths) == 1 else "ragged")
    return unit(op, lengths, dim, contenders, dtype=dtype, device="cuda", **more)


def _attention(op: str, size: tuple[int, int], heads: int, dtype: str, **more) -> Unit:
    ours = "triton fused" if dtype != FLOAT32 else "triton fused split"
    contenders = more.pop("contenders", f"eager {ours}")
    return _unit(op, (INSTANCES,), size[0], contenders, dtype=dtype, hidden=size[1], heads=heads, **more)


def _headlines() -> Iterator[Unit]:
    gated = "gated_attention_pool"
    ragged = "eager padded triton reference"
    yield _unit(gated, (2,), 1024, "device", kind="limits", modes=("limits",), suffix=": limits", headline=True)
    yield _attention(gated, HEADLINE_SIZES[0], 1, BFLOAT16, headline=True)
    yield _unit(gated, SLIDES, 1024, ragged, modes=("step", "fwd"), headline=True)
    for size in HEADLINE_SIZES[1:]:
        yield _attention(gated, size, 1, BFLOAT16, headline=True)
    for op in ("softmax_pool", "loss_attention_pool", "dsmil", "query_pool"):
        eager = " ".join(("eager", *(f"eager-{formula}" for formula in CASES[op].alternatives)))
        rows = GIGABYTE // (2 * 1024)
        yield _unit(op, (rows,), 1024, f"{eager} triton native", modes=("fwd", "step"), headline=True)
    for size in HEADLINE_SIZES:
        yield _attention("gated_attention_scores", size, 1, BFLOAT16, modes=("fwd",), headline=True)
    yield _unit(gated, SMALL_BAGS, 1024, f"{ragged} native", modes=("step", "fwd"), headline=True)
    yield _attention(gated, HEADLINE_SIZES[0], 1, FLOAT32, headline=True)
    yield _attention(EMBEDDED, HEADLINE_SIZES[0], 1, BFLOAT16, contenders="eager triton", headline=True)
    yield _unit(gated, (1_000_000,), 512, "eager triton", modes=("step", "frozen", "fwd"), headline=True)


def _tuning() -> Iterator[Unit]:
    gated, size = "gated_attention_pool", HEADLINE_SIZES[0]
    called = tuple(f"{op} {rows} {mode}" for op in _CALLED for rows in CALL_ROWS for mode in ("fwd", "step"))
    yield _unit(gated, (2,), 512, "eager triton fused native", kind="calls", modes=called, suffix=": calls")
    sizes = "workspace-8 workspace-16 workspace-32 workspace-64"
    yield _attention(gated, size, 1, BFLOAT16, contenders=sizes, modes=("fwd", "step"), suffix=": workspace")
    for dim, hidden in HEADLINE_SIZES[1:]:
        options = {"contenders": sizes, "modes": ("fwd", "step"), "suffix": ": workspace"}
        yield _attention(gated, (dim, hidden), 1, BFLOAT16, **options)


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
        yield _unit(op, (INSTANCES,), 1024, "eager triton native")
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
            yield _unit(op, (INSTANCES,), dim, "eager triton native")
        yield _unit(op, (INSTANCES,), 1024, "eager triton native", dtype=FLOAT32)
    yield _unit(gated, SLIDES, 1024, "eager padded triton reference", dtype=FLOAT32, modes=("step", "fwd"))
    for n in SCALES:
        yield _unit(gated, (n,), 512, "eager triton", modes=("fwd", "step"), part="scaling", suffix=": scaling")
    yield _unit(
        *(gated, (2,), 1024, "eager triton"),
        **{"kind": "largest", "modes": ("step",), "suffix": ": largest bag", "memory": 16 << 30, "seconds": 200.0},
    )


def grid() -> list[Unit]:
    return named(unit for part in (_headlines, _compiled, _tuning, _rest) for unit in part())
