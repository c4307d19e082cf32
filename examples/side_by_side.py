"""The same training three ways: ragged mini-batches on milkernels, the same mini-batches one bag at a time in eager
PyTorch, and upstream's way, one bag at a time and an optimiser step for each.

    python -m examples.side_by_side --data DIR      # the classic sets of DIR, and simulated slides
    python -m examples.side_by_side                 # simulated slides alone

Every run has a process of its own, and the ways take turns.  Wall time is that of training; memory the peak of the
process beyond the data and libraries (on a GPU of PyTorch's allocator); accuracy that on held-out bags.  The classic
sets are trained with one thread (their bags are so small that threads wait for each other), slides with all.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from examples import data, recipes, report, slide_bag, train_classic, training
from examples.recipes import Recipe, Settings
from milkernels.bench import memory

CLASSIC = ("attention", "gated-attention", "dsmil", "loss-attention")
SLIDES: dict[str, Recipe] = {
    "gated-attention": slide_bag.RECIPE,
    "dsmil": recipes.dsmil(),
    "loss-attention": recipes.loss_attention(None, 0.0, Settings(), 0.1),
}
_SAME = ("data", "epochs", "slides", "patches", "slide_epochs", "seed", "device")


@dataclasses.dataclass(frozen=True)
class Task:
    part: str  # a classic set, or "slides"
    model: str
    way: str
    round: int


def _bags(task: Task, args: argparse.Namespace) -> tuple[data.Labelled, data.Labelled]:
    """Training and test bags: in each round another fold, or other slides."""
    if task.part == "slides":
        sizes, seeds = (args.patches // 80, args.patches), [2 * (args.seed + task.round) + i for i in (1, 2)]
        train, test = (slide_bag.labelled(slide_bag.cohort(args.slides, *sizes, 512, seed)) for seed in seeds)
    else:
        whole = data.classic(args.data, task.part)
        train, test = (whole.take(some) for some in training.folds(whole.labels, 5, args.seed)[task.round % 5])
        x, others = data.standardised(train.bags, test.bags)
        train, test = data.Labelled(x, train.labels), data.Labelled(others, test.labels)
    return train.to(args.device), test.to(args.device)


def _setup(task: Task, args: argparse.Namespace) -> tuple[Recipe, Settings]:
    """The learning rate of a bag per step is that of a mini-batch over the root of its bags."""
    if task.part == "slides":
        recipe, settings, epochs = SLIDES[task.model], slide_bag.SETTINGS, args.slide_epochs
    else:
        recipe, epochs = train_classic.RECIPES[task.model], args.epochs
        settings = train_classic.candidates(recipe)[0]
    lr = settings.lr / settings.bags**0.5 if task.way == "upstream" else settings.lr
    return recipe, dataclasses.replace(settings, epochs=epochs, lr=lr)


def run(task: Task, args: argparse.Namespace) -> dict:
    """In a process of its own: trains, measures, tests."""
    if task.part != "slides":
        torch.set_num_threads(1)
    (recipe, settings), (train, test) = _setup(task, args), _bags(task, args)
    once = dataclasses.replace(settings, epochs=1)
    few = train.take(range(2))
    training.fit(recipe, once, few.bags, few.labels, 0, way=task.way)  # libraries start
    with _peak(train.bags.values) as peak:
        start = report.now(train.labels)
        model = training.fit(recipe, settings, train.bags, train.labels, args.seed + task.round, way=task.way)
        seconds = report.now(train.labels) - start
    logits = training.predict(recipe, model, test.bags, way=task.way, size=8)[""]
    error, loss = training.error_and_loss(logits, test.labels)
    lengths = train.bags.lengths
    return {
        "seconds": seconds,
        "memory": peak.extra,
        "accuracy": 1 - error,
        "loss": loss,
        "epochs": settings.epochs,
        "train": len(lengths),
        "test": len(test.labels),
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "instances": int(lengths.sum()),
    }


@contextlib.contextmanager
def _peak(x: Tensor) -> Iterator[memory.Peak]:
    """Of the process, or of PyTorch's allocator on a GPU."""
    memory.release()
    if not x.is_cuda:
        with memory.resident_peak() as peak:
            yield peak
        return
    peak, before = memory.Peak(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield peak
    peak.extra = torch.cuda.max_memory_allocated() - before


def markdown(results: dict) -> str:
    rows = results["rows"]
    lines = [["bags", "model", "way", "training, s", "x ragged", "extra memory, MB", "accuracy", "loss"]]
    for part, model in dict.fromkeys((row["part"], row["model"]) for row in rows):
        some = [row for row in rows if (row["part"], row["model"]) == (part, model)]
        ragged = _median(some, "ragged", "seconds")
        one = some[0]
        what = f"{part}: {one['train']} of {one['shortest']:,} to {one['longest']:,}, {one['epochs']} epochs"
        for way in dict.fromkeys(row["way"] for row in some):
            seconds, extra = _median(some, way, "seconds"), _median(some, way, "memory")
            scores = (_median(some, way, "accuracy"), _median(some, way, "loss"))
            cells = [f"{seconds:.2f}", f"{seconds / ragged:.2f}", f"{extra / 1e6:,.0f}" if extra is not None else "?"]
            lines.append([what, model, way, *cells, *(f"{value:.3f}" for value in scores)])
            what = model = ""
    ways = "\n".join(f"- *{way}*: {what}." for way, what in training.WAYS.items())
    rounds = len({row["round"] for row in rows})
    return f"""# The same training, ragged and one bag at a time

{ways}

Medians of {rounds} rounds, in which the ways take turns, each in a process of its own; a round has another fold or
other slides. The learning rate of *upstream* is that of the mini-batches over the root of their bags.

{report.table(lines)}"""


def _median(rows: list[dict], way: str, key: str) -> float | None:
    values = [row[key] for row in rows if row["way"] == way and row[key] is not None]
    return statistics.median(values) if values else None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.side_by_side", description=__doc__, formatter_class=about)
    parser.add_argument("--data", type=Path, help="folder with classic sets; without it slides only")
    parser.add_argument("--sets", nargs="+", choices=data.CLASSIC, default=["tiger", "musk2"])
    parser.add_argument("--models", nargs="+", choices=CLASSIC, help="default: all; if --quick one of them")
    parser.add_argument("--epochs", type=report.at_least(1), default=20, help="on the classic sets")
    parser.add_argument("--slides", type=report.at_least(2), default=16)
    parser.add_argument("--patches", type=report.at_least(800), default=80_000, help="of the largest slide")
    parser.add_argument("--slide-epochs", type=report.at_least(1), default=4)
    parser.add_argument("--rounds", type=report.at_least(1), default=3)
    report.add_options(parser)
    args = parser.parse_args(argv)
    args.models = args.models or (["gated-attention"] if args.quick else list(CLASSIC))
    if args.quick:
        args.sets, args.epochs, args.rounds = args.sets[:1], 5, 1
        args.slides, args.patches, args.slide_epochs = 32, 1600, 20
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    sets = args.sets if args.data else []
    for name in sets:
        data.classic(args.data, name)  # before any work
    pairs = [
        (part, model) for part in [*sets, "slides"] for model in args.models if part != "slides" or model in SLIDES
    ]
    tasks = [Task(part, model, way, i) for part, model in pairs for i in range(args.rounds) for way in training.WAYS]
    results = report.Report("side_by_side", markdown, args, argv)
    results.run(tasks, partial(run, args=args), 1, _SAME, alone=True)
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
