"""The run as a picture: time per contender with its floor, and where each one lies under the roofs."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from milkernels.bench.run import Result, Row
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
