"""``make figures``: measures the rows that the README shows, in ten minutes on two cores, and writes them there.

The rows go to ``results/headline.json``, of the one schema; the README's table is made of that file, and a test holds
it to that.  ``--readme`` only makes the table and the pages of ``results/`` again.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks import grid, pages, picture, results, variants
from benchmarks.units import BFLOAT16, FLOAT32, Unit, named, unit
from milkernels.bench import contenders, report
from milkernels.bench.workload import fast_dtypes
from milkernels.testing import skewed_lengths

MOST_ROWS = 10
GATED = "gated_attention_pool"
_FIGURES = ("<!-- figures: python -m benchmarks.figures --readme -->", "<!-- end of figures -->")
_CONTENDERS = ("<!-- contenders: python -m benchmarks.figures --readme -->", "<!-- end of contenders -->")
_unit = partial(unit, device="cpu", seconds=300.0)


def units(dtypes: Sequence[str]) -> list[Unit]:
    """Each mode of each is a row; ``dtypes``: those that PyTorch has fast products for."""

    def chosen() -> Iterator[Unit]:
        about = {"dtype": FLOAT32, "part": "headline"}
        three = "eager compile native"
        yield _unit(GATED, (10_000,), 512, three, modes=("step", "frozen"), budget=8.0, **about)
        yield _unit(GATED, (100_000,), 512, three, modes=("fwd", "step", "frozen"), budget=60.0, **about)
        if BFLOAT16 in dtypes:
            yield _unit(GATED, (100_000,), 512, three, modes=("step",), budget=15.0, **about | {"dtype": BFLOAT16})
        ragged = skewed_lengths(32, 100_000)
        yield _unit(GATED, ragged, 512, "eager padded native", modes=("step",), budget=40.0, suffix=": ragged", **about)
        yield _unit("dsmil", (100_000,), 512, "eager native", modes=("step",), budget=15.0, **about)
        both = "eager eager-logsumexp native"
        yield _unit("loss_attention_pool", (100_000,), 512, both, modes=("step",), budget=10.0, **about)
        yield _unit("softmax_pool", (100_000,), 512, "eager native", modes=("fwd",), budget=3.0, **about)

    return named(chosen())


def table(content: dict) -> str:
    """A line for each unit and mode, those that lose most first, and where they come from."""
    frame, lines = pages.frame_of(content), []
    for (_, mode), rows in frame.groupby(["name", "mode"], sort=False):
        timed = rows[rows["status"].eq("ok") & rows["median"].notna()]
        ours, theirs = (timed[timed["ours"].eq(is_ours)].sort_values("median") for is_ours in (True, False))
        eager, ratio = timed[timed["contender"].eq("eager")], float("inf")
        line = {"op and bags": rows["about"].iloc[0], "type": rows["dtype"].iloc[0], "mode": mode}
        if len(ours):
            mine = ours.iloc[0]
            line |= {"milkernels, ms": pages.milliseconds(mine["median"])}
            if len(eager):
                line["eager, ms"] = pages.milliseconds(eager["median"].iloc[0])
                line["x eager"] = f"{eager['median'].iloc[0] / mine['median']:.2f}"
                memory = [float(eager["extra"].iloc[0]), float(mine["extra"])]
                shown = "not measured" if any(map(pd.isna, memory)) else " / ".join(f"{m / 1e6:,.1f}" for m in memory)
                line["extra memory, eager / ours, MB"] = shown
            if len(theirs):
                ratio = theirs["median"].iloc[0] / mine["median"]
                line["fastest other"] = f"{theirs['label'].iloc[0]}, {pages.milliseconds(theirs['median'].iloc[0])} ms"
                line["x it"] = f"{ratio:.2f}"
            line["of floor"] = "" if pd.isna(mine["share_of_floor"]) else f"{100 * mine['share_of_floor']:.0f}%"
        else:
            line["milkernels, ms"] = "not measured"
        lines.append((ratio, line))
    order = ["op and bags", "type", "mode", "milkernels, ms", "eager, ms", "x eager", "fastest other", "x it"]
    order += ["extra memory, eager / ours, MB", "of floor"]
    shown = pd.DataFrame([line for _, line in sorted(lines, key=lambda pair: pair[0])]).reindex(columns=order)
    return f"{report.title(content['machine'])}:\n\n{pages.markdown(shown)}\n\n{pages.measured_by(content['units'])}\n"


def contenders_table() -> str:
    """Who can be measured, other ways of our own left out."""
    shown = [c for c in contenders.REGISTRY.values() if c not in variants.ALL]
    names = [f"`{c.name}`" for c in shown]
    return pages.markdown(pd.DataFrame({"contender": names, "what it is": [c.about for c in shown]})) + "\n"


def rewrite(text: str, block: str, begin: str, end: str) -> str:
    """``text`` with what stands between the comments replaced."""
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"the page must hold {begin!r} and then {end!r}")
    return f"{before}{begin}\n\n{block}\n{end}{after}"


def written(root: Path = report.ROOT) -> dict[Path, str]:
    """Every page that is made of something else, as it should be."""
    readme, method = root / "README.md", root / "benchmarks" / "README.md"
    folder = root / "benchmarks" / "results"
    rows = table(results.read(folder / results.HEADLINE.name))
    made = {page: rewrite(page.read_text(), rows, *_FIGURES) for page in (readme, root / "docs/performance/index.md")}
    made[method] = rewrite(method.read_text(), contenders_table(), *_CONTENDERS)
    for path in results.grids(folder):
        pictures = [p.name for p in sorted(folder.glob(f"{path.stem}-*.png"))]
        made[path.with_suffix(".md")] = pages.page(results.read(path), pictures)
    return made | picture.written(root)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.partition("\n")[0])
    p.add_argument("--readme", action="store_true", help="measure nothing, only write the pages")
    p.add_argument("--out", type=Path, default=results.HEADLINE, metavar="FILE", help=argparse.SUPPRESS)
    arguments = p.parse_args(argv)
    status = 0
    if not arguments.readme:
        interrupted = (results.read(arguments.out) or {}).get("not_measured")
        status = grid.measure(arguments.out, units(fast_dtypes()), "make figures", fresh=not interrupted)
    if arguments.out == results.HEADLINE:
        for path, text in written().items():
            path.write_text(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
