"""What the GPU kernels are meant to reach, held against the rows of a unit: ratios within one process."""

from collections.abc import Iterator

from benchmarks.gpu_grid import GIGABYTE, INSTANCES
from benchmarks.units import Unit
from milkernels.bench.workload import DTYPES

OURS = ("triton", "fused", "split", "native")
# Shares of the measured matrix rate, by (width, hidden units)
_FORWARD = {(512, 256): 0.50, (1024, 256): 0.55, (1536, 384): 0.60}
_SCORES = 0.65
# Shares of the measured read bandwidth, where nothing but x counts
_BANDWIDTH, _NATIVE_BANDWIDTH = 0.85, 0.90
_EAGER_STEP, _EAGER_STEP_WIDE, _COMPILED_STEP = 1.4, 1.2, 1.0
_LOOP, _PADDED = 5.0, 4.0
_NATIVE_LOOP, _SMALL_BAGS = 10.0, 2000  # instances of a bag at most
_SPARE_MEMORY = 300e6  # a workspace of 256 MB and partial results, beyond the gradient of x and 16 bytes for each score
_EAGERS_MEMORY = 0.1
_MANY = 1_000_000
Rows = dict[tuple[str, str], dict]


def of(unit: Unit, rows: Rows) -> list[dict]:
    """The targets that this unit can tell about: what, unit, mode, contender, goal, value, met."""
    if unit.kind != "bench":
        return []
    found = []
    for (mode, contender), row in rows.items():
        if contender in OURS and row["status"] == "ok" and row.get("median"):
            about = {"unit": unit.name, "mode": mode, "contender": contender}
            for what, goal, value, least in (*_speed(unit, mode, row, rows), *_memory(unit, mode, row, rows)):
                met = value >= goal if least else value <= goal
                found.append({"what": what, "goal": goal, "value": float(f"{value:.4g}"), "met": met, **about})
    return found


def _speed(unit: Unit, mode: str, row: dict, rows: Rows) -> Iterator[tuple[str, float, float, bool]]:
    shape, op = unit.workload.shape, unit.workload.op
    size, gated, half = (shape.dim, shape.hidden), op == "gated_attention_pool", unit.dtype != "float32"
    one = shape.bags == 1 and shape.instances >= INSTANCES
    if mode == "fwd" and half and one:
        rate = row["flops"] / row["median"] / row["limits"]["matrix_rate"]
        if gated and size in _FORWARD:
            yield "share of the matrix rate", _FORWARD[size], rate, True
        elif op == "gated_attention_scores":
            yield "scores alone, share of the matrix rate", _SCORES, rate, True
    nbytes = shape.instances * shape.dim * DTYPES[unit.dtype].itemsize
    case = unit.workload.case
    if mode == "fwd" and nbytes >= GIGABYTE and not case.embeds and case.hidden_flops(shape) == 0:
        share = row["bytes"] / row["median"] / row["limits"]["read_bandwidth"]
        goal = _NATIVE_BANDWIDTH if row["contender"] == "native" else _BANDWIDTH
        yield "share of the read bandwidth", goal, share, True
    if mode != "step" or not gated:
        return
    times = {c: other["median"] for (m, c), other in rows.items() if m == mode and other.get("median")}
    faster = {c: seconds / row["median"] for c, seconds in times.items()}
    if shape.bags > 1:
        small = row["contender"] == "native" and max(shape.lengths) <= _SMALL_BAGS
        loop = _NATIVE_LOOP if small else _LOOP
        goals = {"eager": ("x the loop over bags", loop), "padded": ("x the padded batch", _PADDED)}
    elif one and half:
        eager = _EAGER_STEP_WIDE if shape.dim >= 1536 else _EAGER_STEP
        goals = {"eager": ("x eager", eager), "compile": ("x torch.compile", _COMPILED_STEP)}
    else:
        goals = {}
    for other, (what, goal) in goals.items():
        if other in faster:
            yield what, goal, faster[other], True


def _memory(unit: Unit, mode: str, row: dict, rows: Rows) -> Iterator[tuple[str, float, float, bool]]:
    shape = unit.workload.shape
    if row.get("allocator") is None or unit.workload.op not in ("gated_attention_pool", "attention_pool"):
        return
    gradient = shape.instances * shape.dim * DTYPES[unit.dtype].itemsize if mode == "step" else 0
    beyond = row["allocator"] - gradient
    yield "bytes beyond the gradient of x", _SPARE_MEMORY + 16 * shape.instances * shape.heads, beyond, False
    eager = rows.get((mode, "eager"), {}).get("allocator")
    if shape.instances >= _MANY and eager is not None:
        yield "share of eager's bytes beyond it", _EAGERS_MEMORY, beyond / max(1, eager - gradient), False
