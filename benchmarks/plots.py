"""Pictures of a grid: how near every op comes to its floor, and how time and memory grow with the bag."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

_COLOURS = {"native": "tab:green", "triton": "tab:green", "eager": "tab:gray", "compile": "tab:blue"}
_COLOURS |= {"accumulate": "tab:orange"}
_MODES = {"fwd": "forward"}


def names(frame: pd.DataFrame, path: Path) -> list[str]:
    """The pictures that there are for this file: those with something to show."""
    return [f"{path.stem}-{name}.png" for name, (rows, _) in _PICTURES.items() if len(rows(frame))]


def draw(frame: pd.DataFrame, path: Path) -> list[Path]:
    """Writes them beside the file."""
    written = [path.with_name(name) for name in names(frame, path)]
    for picture in written:
        rows, figure = _PICTURES[picture.stem.rpartition("-")[2]]
        figure(rows(frame)).savefig(picture, dpi=110, metadata={"Software": None})
    return written


def _floor_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Ours of one bag, of every op."""
    parts = frame["part"].isin(["attention", "ops"]) & frame["ours"].eq(True) & frame["status"].eq("ok")
    return frame[parts & frame["share_of_floor"].notna()].drop_duplicates(["op", "dtype", "mode"])


def _floor(rows: pd.DataFrame) -> Figure:
    ops = list(dict.fromkeys(rows["op"]))
    figure = Figure(figsize=(9, 0.29 * len(ops) + 2.2), layout="constrained")
    axis = figure.subplots()
    for (dtype, mode), points in rows.groupby(["dtype", "mode"], sort=False):
        colour, mark = ("C0", "o") if dtype == "float32" else ("C3", "s")
        axis.plot(
            100 * points["share_of_floor"],
            [ops.index(op) for op in points["op"]],
            mark,
            color=colour,
            fillstyle={"fwd": "full", "step": "none"}.get(mode, "left"),
            label=f"{dtype} {_MODES.get(mode, mode)}",
        )
    axis.set_yticks(range(len(ops)), ops, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(100, color="tab:red", linestyle="--", linewidth=1)
    axis.set_xlim(left=0)
    axis.set_xlabel("% of the floor reached (more is better; the dashed line is the floor)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _scaling_rows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["part"].eq("scaling") & frame["status"].eq("ok") & frame["median"].notna()]


def _scaling(rows: pd.DataFrame) -> Figure:
    modes = list(dict.fromkeys(rows["mode"]))
    figure = Figure(figsize=(5.6 * len(modes), 8), layout="constrained")
    axes = figure.subplots(2, len(modes), squeeze=False, sharex=True)
    for (mode, contender, dtype), points in rows.groupby(["mode", "contender", "dtype"], sort=False):
        points = points.sort_values("instances")
        style = {"color": _COLOURS.get(contender), "linestyle": "-" if dtype == "float32" else "--", "marker": "."}
        for line, each in enumerate((1e9 * points["median"], points["extra"])):
            axis = axes[line][modes.index(mode)]
            axis.plot(points["instances"], each / points["instances"], label=f"{contender}, {dtype}", **style)
    for column, mode in enumerate(modes):
        axes[0][column].set_title(_MODES.get(mode, mode), fontsize=10)
        for axis, name in zip(axes[:, column], ("ns per instance", "bytes of extra memory per instance"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel="instances in the bag", ylabel=name)
            axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle("Gated attention, one bag, each contender in a process of its own: flat is linear")
    return figure


_PICTURES: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], Callable[[pd.DataFrame], Figure]]] = {
    "floor": (_floor_rows, _floor),
    "scaling": (_scaling_rows, _scaling),
}
