"""``make matrix``: ours beside eager PyTorch from 10 instances to 100,000, in fifteen minutes on two cores: the cells
where we lose come first.

Every cell is interleaved and gated as all rows are; peaks of memory are not taken.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch

from benchmarks import disk, grid, pages, results
from benchmarks.figures import GATED
from benchmarks.units import BFLOAT16, FLOAT16, FLOAT32, Unit, heavy_tailed_lengths, named, unit
from milkernels.bench import cli
from milkernels.bench.workload import fast_dtypes
from milkernels.testing import CASES, even_lengths, skewed_lengths

SIZES = (10, 100, 1_000, 4_000, 10_000, 30_000, 100_000)
FEW = (10, 100, 1_000, 10_000, 100_000)
POOLS = (
    "attention_pool",
    "dsmil",
    "dsmil_mlp",
    "loss_attention_pool",
    "softmax_pool",
    "query_pool",
    "mean_pool",
    "max_pool",
)
SCORES = ("segment_softmax", "topk_instances")
_OUT = Path(__file__).parents[1] / "build" / "matrix.json"


def units(dtypes: Sequence[str], threads: int = 0) -> list[Unit]:
    """``dtypes``: those that PyTorch has fast products for."""
    about = {"device": "cpu", "threads": threads, "part": "matrix", "seconds": 300.0, "peaks": False}

    def cell(op: str, lengths: Sequence[int], dtype: str = FLOAT32, dim: int = 512, **more) -> Unit:
        rows, learns = sum(lengths), len(CASES[op].tensors) > 1  # something beside the instances
        modes = ("fwd", "step", "frozen") if learns else ("fwd", "step")
        budget = len(modes) * (2.5 if rows > 30_000 else 0.8)
        return unit(
            op, lengths, dim, "eager native", dtype=dtype, modes=modes, budget=budget, **about, **more,
        )  # fmt: skip

    def whole(rows: int) -> Unit:
        return unit(
            f"{GATED}_embed", (rows,), 1024, "eager native", dtype=FLOAT32, modes=("fwd", "step"), kind="clam",
            budget=6.0, suffix=": CLAM_SB whole", **about,
        )  # fmt: skip

    def files(dtype: str) -> Unit:
        lengths = heavy_tailed_lengths(4, 5_000, 1.0, 200, 20_000)
        return unit(
            GATED, lengths, 1024, "eager native", dtype=dtype, modes=tuple(disk.FORMATS), kind="disk",
            suffix=": an epoch from files", **about,
        )  # fmt: skip

    def chosen() -> Iterator[Unit]:
        for dtype in (FLOAT32, BFLOAT16):
            if dtype in dtypes:
                yield from (cell(GATED, (n,), dtype) for n in SIZES)
        yield from (cell(f"{GATED}_embed", (n,), dim=1024) for n in FEW)
        yield from (cell(op, (n,)) for op in POOLS for n in FEW)
        for op in (GATED, "dsmil", "softmax_pool"):
            for rows in (10_000, 100_000):
                yield cell(op, skewed_lengths(32, rows), suffix=": 32 bags")
        for rows in (500, 3_000, 10_000, 30_000):
            yield whole(rows)
        for dtype in (FLOAT32, FLOAT16):
            yield files(dtype)
        for op in SCORES:
            yield cell(op, (100_000,), dim=1)
            yield cell(op, even_lengths(100, 100_000), dim=1, suffix=": 100 bags")

    return named(chosen())


def cells(content: dict) -> pd.DataFrame:
    """A line for each op, bags, type and mode: the time of eager over ours, the smallest first."""
    frame, found = pages.frame_of(content), []
    timed = frame[frame["status"].eq("ok") & frame["median"].notna()]
    for (_, mode), rows in timed.groupby(["name", "mode"], sort=False):
        ours, eager = (rows[rows["contender"].eq(name)] for name in ("native", "eager"))
        if len(ours) and len(eager):
            mine, ratio = ours.iloc[0], eager["median"].iloc[0] / ours["median"].iloc[0]
            floor = "" if pd.isna(mine["share_of_floor"]) else f"{100 * mine['share_of_floor']:.0f}%"
            found.append((ratio, mine["about"], mine["dtype"], mode, pages.milliseconds(mine["median"]), floor))
    columns = ["x eager", "op and bags", "type", "mode", "milkernels, ms", "of floor"]
    return pd.DataFrame(sorted(found, key=lambda line: line[0]), columns=columns)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__.partition("\n")[0])
    p.add_argument("--out", type=Path, default=_OUT, metavar="FILE")
    p.add_argument("--threads", type=cli.positive, default=torch.get_num_threads())
    p.add_argument("--fresh", action="store_true", help="measure everything again")
    arguments = p.parse_args(argv)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.matrix --threads {arguments.threads}"
    status = grid.measure(arguments.out, units(fast_dtypes(), arguments.threads), command, fresh=arguments.fresh)
    table = cells(results.read(arguments.out))
    print(f"{(table['x eager'] < 1).sum()} of {len(table)} cells are slower than eager, {arguments.threads} threads")
    print(pages.markdown(table.assign(**{"x eager": table["x eager"].map("{:.2f}".format)})))
    return status


if __name__ == "__main__":
    sys.exit(main())
