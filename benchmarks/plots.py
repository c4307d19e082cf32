"""Pictures: of one run (times with their floor, and where they lie under the roofs), and of a grid's file (the roofline
of every op, how time and memory grow, memory).  A grid's pictures carry the digest of the figures that they show.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from milkernels.bench.run import Result, Row
from milkernels.bench.tables import memory_key
from milkernels.bench.workload import DTYPES, Workload


def save(result: Result, workload: Workload, path: Path) -> None:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        if row.timed:
            groups.setdefault((row.dtype, row.mode), []).append(row)
    figure = Figure(figsize=(3.4 * (len(groups) + 1) + 1, 4))
    axes = figure.subplots(1, len(groups) + 1, squeeze=False)
    for axis, ((dtype, mode), rows) in zip(axes[0], groups.items(), strict=False):
        _bars(axis, f"{dtype}, {mode}", rows)
    _roofline(axes[0][-1], result)
    shape = workload.shape
    figure.suptitle(f"{workload.op}, {shape.instances} instances of {shape.dim} in {shape.bags} bag(s)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _bars(axis: Axes, title: str, rows: list[Row]) -> None:
    milliseconds = [1e3 * row.timing.median for row in rows]
    positions = range(len(rows))
    axis.bar(positions, milliseconds, color=["tab:green" if row.ours else "tab:gray" for row in rows])
    axis.bar_label(axis.containers[0], fmt="{:,.4g}", fontsize=8)
    axis.margins(y=0.1)  # room for the labels
    axis.axhline(1e3 * rows[0].floor_seconds, color="tab:red", linestyle="--", linewidth=1, label="floor")
    axis.set_xticks(positions, [row.contender for row in rows], rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("ms")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)


def _roofline(axis: Axes, result: Result) -> None:
    rows = [row for row in result.rows if row.timed and row.flops and row.bytes]
    dtypes = list(dict.fromkeys(row.dtype for row in result.rows))
    ridges = {dtype: result.probe.rate(DTYPES[dtype]) / result.bandwidth for dtype in dtypes}
    intensities = [row.flops / row.bytes for row in rows] + list(ridges.values())
    low, high = min(intensities) / 4, max(intensities) * 4  # both slopes of every roof are in sight
    for number, dtype in enumerate(dtypes):
        colour, ridge = f"C{number}", ridges[dtype]
        roof = [result.bandwidth * min(i, ridge) / 1e9 for i in (low, ridge, high)]
        axis.plot((low, ridge, high), roof, color=colour, label=dtype)
        for row in rows:
            if row.dtype == dtype:
                point = (row.flops / row.bytes, row.flops / row.timing.median / 1e9)
                axis.plot(*point, "o" if row.ours else "x", color=colour, markersize=5)
    axis.plot([], [], "ko", markersize=5, label="milkernels")
    axis.plot([], [], "kx", markersize=5, label="others")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("FLOP per byte")
    axis.set_ylabel("GFLOP/s")
    axis.set_title("roofline", fontsize=10)
    axis.legend(fontsize=8)


# A grid

_COLOURS = {"native": "tab:green", "triton": "tab:green", "eager": "tab:gray", "compile": "tab:blue"}
_COLOURS |= {"accumulate": "tab:orange"}
_SOURCE = "Source"


def digest(content: dict) -> str:
    """The digest of all that was measured, as it stands in the pictures made of it."""
    return hashlib.sha256(json.dumps(content["units"], sort_keys=True).encode()).hexdigest()


def source_of(path: Path) -> str | None:
    """The digest that a picture carries."""
    from PIL import Image

    with Image.open(path) as image:
        return image.text.get(_SOURCE)


def names(content: dict, path: Path) -> list[str]:
    """The names of the pictures that there are for this file."""
    drawn = {"roofline": any(r["ours"] for _, r in _one_bag(content)), "scaling": any(_timed(content, "scaling"))}
    drawn["memory"] = bool(_memory_rows(content))
    return [f"{path.stem}-{name}.png" for name, there in drawn.items() if there]


def of_grid(content: dict, path: Path) -> list[Path]:
    """Writes ``<name>-roofline.png`` and so on beside the file, but for those with nothing to show."""
    draw = {"roofline": _grid_roofline, "scaling": _grid_scaling, "memory": _grid_memory}
    written = [path.with_name(name) for name in names(content, path)]
    for picture in written:
        figure = draw[picture.stem.rpartition("-")[2]](content)
        figure.savefig(picture, format="png", dpi=110, metadata={_SOURCE: digest(content), "Software": None})
    return written


def _timed(content: dict, *parts: str) -> Iterator[tuple[dict, dict]]:
    """Units of some parts of the report and their timed rows."""
    for unit in content["units"]:
        if unit["part"] in parts and unit["kind"] in ("bench", "alone"):
            yield from ((unit, row) for row in unit["rows"] if row["status"] == "ok" and row.get("median"))


def _one_bag(content: dict) -> list[tuple[dict, dict]]:
    """Rows of every op at the size that all of them have: one bag of the commonest shape."""
    rows = list(_timed(content, "attention", "ops"))
    dims = [unit["workload"]["shape"]["dim"] for unit, row in rows]
    common = statistics.mode(dims) if dims else 0
    return [(u, r) for u, r in rows if u["workload"]["shape"]["dim"] in (common, u["workload"]["shape"]["heads"])]


def _grid_roofline(content: dict) -> Figure:
    rows = [(u, r) for u, r in _one_bag(content) if r["ours"]]
    ops = list(dict.fromkeys(u["workload"]["op"] for u, _ in rows))
    figure = Figure(figsize=(15, 0.29 * len(ops) + 2.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _roofs(left, rows, ops)
    _shares(right, rows, ops)
    figure.suptitle("One bag: what the machine allows, and what milkernels reaches")
    return figure


def _roofs(axis: Axes, rows: list[tuple[dict, dict]], ops: list[str]) -> None:
    """Ops without arithmetic have no place here; their share of the floor is beside it."""
    shown = [(u, r) for u, r in rows if r["flops"]]
    reach = [r["flops"] / r["bytes"] for _, r in shown]
    low, high = min(reach) / 2, max(reach) * 2
    together: dict[tuple[int, int], list] = {}
    for colour, dtype in zip(("C0", "C3", "C4"), dict.fromkeys(u["dtype"] for u, _ in shown), strict=False):
        limits = [r["limits"] for u, r in shown if u["dtype"] == dtype]
        bandwidth, rate = (statistics.median(x[n] for x in limits) for n in ("read_bandwidth", "matrix_rate"))
        ridge = rate / bandwidth
        roof = [bandwidth * min(i, ridge) / 1e9 for i in (low, ridge, high)]
        limits_text = f"{dtype}: {bandwidth / 1e9:.0f} GB/s, {rate / 1e9:,.0f} GFLOP/s"
        axis.plot((low, ridge, high), roof, color=colour, label=limits_text)
        for unit, row in (pair for pair in shown if pair[0]["dtype"] == dtype):
            x, y = row["flops"] / row["bytes"], row["flops"] / row["median"] / 1e9
            axis.plot(x, y, "o", color=colour, markersize=5, fillstyle="full" if row["mode"] == "fwd" else "none")
            if dtype == "float32" and row["mode"] == "fwd":
                near = (round(12 * math.log10(x)), round(12 * math.log10(y)))  # one label for what lies together
                together.setdefault(near, [(x, y)]).append(str(ops.index(unit["workload"]["op"]) + 1))
    for place, *numbers in together.values():
        axis.annotate(", ".join(numbers), place, (7, -3), textcoords="offset points", fontsize=7)
    axis.plot([], [], "ko", markersize=5, label="forward (numbered in float32)")
    axis.plot([], [], "ko", markersize=5, fillstyle="none", label="step")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved", ylabel="GFLOP/s")
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3)


def _shares(axis: Axes, rows: list[tuple[dict, dict]], ops: list[str]) -> None:
    marks = {("float32", "fwd"): ("o", "full"), ("float32", "step"): ("o", "none")}
    marks |= {("bfloat16", "fwd"): ("s", "full"), ("bfloat16", "step"): ("s", "none")}
    for (dtype, mode), (mark, fill) in marks.items():
        points = [
            (100 * r["share_of_floor"], ops.index(u["workload"]["op"]))
            for u, r in rows
            if (u["dtype"], r["mode"]) == (dtype, mode) and r["share_of_floor"]
        ]
        if points:
            colour = "C0" if dtype == "float32" else "C3"
            label = f"{dtype} {'forward' if mode == 'fwd' else mode}"
            axis.plot(*zip(*points, strict=True), mark, color=colour, fillstyle=fill, markersize=6, label=label)
    axis.set_yticks(range(len(ops)), [f"{op}  {i + 1}" for i, op in enumerate(ops)], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(100, color="tab:red", linestyle="--", linewidth=1)
    axis.set_xlim(left=0)
    axis.set_xlabel("% of the floor reached (more is better; the dashed line is the floor)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _grid_scaling(content: dict) -> Figure:
    lines: dict[tuple, list[tuple[int, float, float | None]]] = {}
    memory = memory_key(content)
    for unit, row in _timed(content, "scaling"):
        n = sum(unit["workload"]["shape"]["lengths"])
        extra = row.get(memory)
        point = (n, 1e9 * row["median"] / n, None if extra is None else extra / n)
        lines.setdefault((row["mode"], row["contender"], unit["dtype"]), []).append(point)
    modes = list(dict.fromkeys(mode for mode, _, _ in lines))
    figure = Figure(figsize=(5.6 * len(modes), 8), layout="constrained")
    axes = figure.subplots(2, len(modes), squeeze=False, sharex=True)
    for (mode, contender, dtype), points in lines.items():
        style = {"color": _COLOURS.get(contender), "linestyle": "-" if dtype == "float32" else "--", "marker": "."}
        for line, which in enumerate((1, 2)):
            known = [(p[0], p[which]) for p in sorted(points) if p[which]]
            if known:
                axis = axes[line][modes.index(mode)]
                axis.plot(*zip(*known, strict=True), label=f"{contender}, {dtype}", **style)
    for column, mode in enumerate(modes):
        axes[0][column].set_title("forward" if mode == "fwd" else mode, fontsize=10)
        for axis, name in zip(axes[:, column], ("ns per instance", "bytes of extra memory per instance"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel="instances in the bag", ylabel=name)
            axis.grid(alpha=0.3, which="both")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle("Gated attention, one bag, each contender in a process of its own: flat is linear")
    return figure


def _memory_rows(content: dict) -> list[tuple[dict, dict]]:
    memory = memory_key(content)
    return [(u, r) for u, r in _one_bag(content) if r.get(memory) is not None and u["headline"]]


def _grid_memory(content: dict) -> Figure:
    memory, rows = memory_key(content), _memory_rows(content)
    modes = [mode for mode in ("fwd", "step") if any(r["mode"] == mode for _, r in rows)]
    figure = Figure(figsize=(6.4 * len(modes), 6), layout="constrained")
    for axis, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        bars: dict[str, dict[str, float]] = {}
        for unit, row in rows:
            if row["mode"] == mode and (row["ours"] or row["contender"] in _COLOURS):
                name = f"{unit['workload']['op']}, {unit['dtype']}"
                bars.setdefault(name, {})[row["contender"]] = max(0.1, row[memory] / 1e6)
        _grouped(axis, bars)
        axis.set(xscale="log", xlabel="MB beyond the inputs", title="forward" if mode == "fwd" else mode)
        axis.set_xlim(left=0.5)
        axis.xaxis.set_major_formatter("{x:g}")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle("Peak extra memory, one bag; outputs and gradients included")
    return figure


def _grouped(axis: Axes, bars: dict[str, dict[str, float]]) -> None:
    who = [c for c in _COLOURS if any(c in found for found in bars.values())]
    height = 0.8 / max(1, len(who))
    for i, contender in enumerate(who):
        points = [(line + i * height, f[contender]) for line, f in enumerate(bars.values()) if contender in f]
        places, values = zip(*points, strict=True)
        axis.barh(places, values, height, color=_COLOURS[contender], label=contender)
    axis.set_yticks([line + 0.4 - height / 2 for line in range(len(bars))], list(bars), fontsize=8)
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
