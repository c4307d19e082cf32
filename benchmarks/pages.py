"""The page of a result file, its tables made by pandas: ``python -m benchmarks.pages`` writes all of them.

A page is made of its file alone, and a test fails when it is not what this module would write.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks import results
from milkernels.bench import report

TITLES = {
    "attention": "Attention, one bag",
    "ops": "Other ops, one bag",
    "ragged": "Ragged batches",
    "sizes": "Widths, hidden units, heads",
    "bags": "The same instances in more bags",
    "threads": "Threads",
    "scaling": "From small bags to large ones",
    "largest": "The largest bag that can be trained",
    "disk": "Epochs that begin at files",
    "calls": "What a call costs",
    "limits": "Limits of the device",
    "upstream": "Models of other projects before and after accelerate",
}
NOTES = {
    "attention": "Contenders take turns within each mode.",
    "ragged": "Eager and compile loop over the bags; padded and torchmil pad them to the longest.",
    "scaling": "Each contender in a process of its own, one after the other. A star: one run.",
    "largest": "Instances of the largest bag, its features included, before an allocation fails within so many GiB.",
    "disk": "One frozen training step for each file, its loading included; files were dropped from the page cache "
    "before each epoch. The mode is the format.",
    "upstream": "Outputs and gradients are compared before anything is timed.",
}
_STATUS = {"unavailable": "not run", "error": "broke", "differs": "another function", "FAIL": "WRONG"}
_STATUS |= {"unchanged": "not recognised"}
_WORST = ["op and bags", "type", "mode", "contender", "time / ours"]


def markdown(frame: pd.DataFrame) -> str:
    text = frame.fillna("").to_markdown(index=False, disable_numparse=True, tablefmt="github")
    return re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", text))  # without padding, which is most of a long table


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def what_bags(workload: dict) -> str:
    lengths, dim = workload["shape"]["lengths"], workload["shape"]["dim"]
    text = f"{len(lengths)} of {min(lengths):,} to {max(lengths):,}" if len(lengths) > 1 else "1"
    text += f": {sum(lengths):,} x {dim}"
    if workload["padded"]:
        text += ", padded"
    return text + (f", dropout {workload['dropout']:g}" if workload["dropout"] else "")


def about(unit: dict) -> str:
    """The op and its shape, and what sets the unit apart."""
    workload, shape = unit["workload"], unit["workload"]["shape"]
    text = f"`{workload['op']}` {what_bags(workload)}" if unit["kind"] != "largest" else f"`{workload['op']}`"
    if re.search(r" D\d", unit["name"]):
        text += f", D {shape['hidden']}"
    if shape.get("heads", 1) > 1:
        text += f", K {shape['heads']}"
    _, colon, suffix = unit["name"].partition(": ")
    return text + (f" ({suffix})" if colon and unit["kind"] == "bench" else "")


def frame_of(content: dict) -> pd.DataFrame:
    """A line for each row of each unit: its fields, those of its unit, and what is made of them."""
    memory = "allocator" if "gpu" in content["machine"] else "resident"
    lines = []
    for unit in content["units"]:
        for row in unit["rows"]:
            more = {"extra": row.get(memory), "about": about(unit), "part": unit["part"] or unit["kind"]}
            lines.append({"name": unit["name"], "kind": unit["kind"], "dtype": unit["dtype"]} | row | more)
    columns = ["label", "median", "once", "spread", "instances", "share_of_floor", "load", "memory", "host"]
    frame = pd.DataFrame(lines)
    frame = frame.reindex(columns=dict.fromkeys([*frame.columns, *columns, "ours", "reason", "errors"]))
    timed = frame["median"].notna() & (frame["status"] == "ok")
    first = frame[timed & frame["ours"].eq(True)].groupby(["name", "mode"])["median"].first()
    keys = pd.MultiIndex.from_frame(frame[["name", "mode"]])
    frame["ratio"] = frame["median"].astype(float) / first.reindex(keys).to_numpy(float)
    return frame


def table(frame: pd.DataFrame) -> str:
    """All that the rows have to tell, without the columns that would be empty."""

    def column(name: str, show) -> list[str]:
        return ["" if pd.isna(value) else show(value) for value in frame[name]]

    ok = frame["status"] == "ok"
    kind = frame["status"].map(_STATUS)
    reason = frame["reason"].fillna("").str.replace("|", "/").str.replace("\n", " ").str[:160]
    largest = frame["kind"] == "largest"
    shown = pd.DataFrame(
        {
            "op and bags": frame["about"],
            "type": frame["dtype"],
            "mode": frame["mode"],
            "contender": frame["label"].fillna(frame["contender"]),
            "ms": column("median", milliseconds) + pd.Series(frame["once"].eq(True).map({True: "*", False: ""})),
            "spread": column("spread", lambda x: f"{100 * x:.0f}%"),
            "M inst/s": column("speed", number),
            "extra MB": column("extra", lambda x: number(x / 1e6)),
            "of floor": column("share_of_floor", lambda x: f"{100 * x:.0f}%"),
            "error / eager's": ["" if w is None else f"{w:.2g}" for w in map(_worst, frame["errors"])],
            "time / ours": column("ratio", lambda x: f"{x:.2f}"),
            "loading alone, ms": column("load", milliseconds),
            "host, us": column("host", lambda x: f"{1e6 * x:.0f}"),
            "instances": [f"{n:,.0f}" if on else "" for n, on in zip(frame["instances"], largest & ok, strict=True)],
            "GiB": column("memory", lambda x: f"{x / (1 << 30):g}"),
            "": [f"{k}: {r}" if not fine else "" for k, r, fine in zip(kind, reason, ok, strict=True)],
        }
    )
    return markdown(shown.loc[:, (shown != "").any()])


def _worst(errors) -> float | None:
    return report.worst_ratio(errors) if isinstance(errors, list) else None


def losses(frame: pd.DataFrame) -> pd.DataFrame:
    """Every timed row in which somebody else was faster than the best of ours, the worst first."""
    timed = frame[frame["median"].notna() & (frame["status"] == "ok")]
    best = timed[timed["ours"].eq(True)].groupby(["name", "mode"])["median"].min()
    best = best.reindex(pd.MultiIndex.from_frame(timed[["name", "mode"]])).to_numpy()
    timed = timed.assign(against=timed["median"] / best)
    lost = timed[~timed["ours"].eq(True) & (timed["against"] < 1)].sort_values("against", kind="stable")
    shown = lost[["about", "dtype", "mode", "label"]].assign(ratio=[f"{ratio:.2f}" for ratio in lost["against"]])
    return shown.set_axis(_WORST, axis=1)


def measured_by(units: list[dict]) -> str:
    """Dates, commits and commands, each once, with the number of units that came of it."""
    runs: dict[tuple, int] = {}
    for unit in units:
        commit, dash, dirty = (unit["commit"] or "an unknown commit").partition("-")
        key = (unit["date"][:10], commit[:12] + dash + dirty if unit["commit"] else commit, unit["command"])
        runs[key] = runs.get(key, 0) + 1
    return "\n".join(f"- {date} at {at} ({count}): `{command}`" for (date, at, command), count in runs.items())


def page(content: dict, pictures: Sequence[str] = ()) -> str:
    machine, frame = content["machine"], frame_of(content)
    frame["speed"] = frame["instances"].where(frame["kind"] != "largest") / frame["median"] / 1e6
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    text = [f"# {report.title(machine)}\n", f"Python {machine['python']}, {versions}. Measured:\n"]
    text += [measured_by(content["units"]) + "\n"]
    text += ["How each number is made, and what it does not say: [benchmarks/README.md](../README.md).\n"]
    text += [f"![{name}]({name})\n" for name in pictures]
    lost = losses(frame)
    text.append("## Where milkernels is not the fastest\n")
    text.append((markdown(lost) if len(lost) else "Nowhere among these rows.") + "\n")
    for part, rows in frame.groupby("part", sort=False):
        text.append(f"## {TITLES.get(part, part)}\n")
        text += [NOTES[part] + "\n"] if part in NOTES else []
        text.append(table(rows) + "\n")
    if content.get("not_measured"):
        text.append("## Not measured\n")
        text += [f"- {name}: {', '.join(modes)}" for name, modes in content["not_measured"].items()] + [""]
    return "\n".join(text)


def write(path: Path) -> list[Path]:
    """Writes the page and the pictures of a file beside it; returns where they are."""
    from benchmarks import plots  # matplotlib takes a second to import

    content = results.read(path)
    pictures = plots.draw(frame_of(content), path)
    path.with_suffix(".md").write_text(page(content, [picture.name for picture in pictures]))
    return [path.with_suffix(".md"), *pictures]


def main(folder: Path = results.FOLDER) -> int:
    for path in results.grids(folder):
        for made in write(path):
            print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
