"""Loss-Attention and DSMIL on the classic sets with the settings that their authors publish, 10 folds, five times.

    python -m examples.train_published --data DIR

One bag per step, their optimiser, learning rate, weight decay and number of epochs; DSMIL's bags in the same order in
every epoch, as its public code has them.  Every fold is trained to the end of the schedule, and tested after each
epoch.  The table then shows the same runs read in three ways: the last epoch, the best epoch on the test fold, and that
at the threshold that is best there.  Only the first one does not look at test bags.

Features are standardised by the training bags; for DSMIL on Fox, Tiger and Elephant also as the files have them, on
which its authors' code trains.

A run that was cut short goes on where it was.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from examples import data, report, train_classic, training

RECIPES = {
    name: dataclasses.replace(recipe, settings=dataclasses.replace(recipe.settings, shuffled=name != "dsmil"))
    for name, recipe in train_classic.RECIPES.items()
    if name in ("loss-attention", "dsmil")
}
FEATURES = ("standardised", "as in the file")
READINGS = {
    "last": "last epoch",
    "best": "best epoch on the test fold",
    "threshold": "best epoch and threshold on the test fold",
}
_SAME = ("data", "folds", "epochs", "seed", "device")


@dataclasses.dataclass(frozen=True)
class Task:
    set: str
    model: str
    features: str
    repeat: int
    fold: int


def run(task: Task, args: argparse.Namespace) -> dict:
    """Trains one fold to the end of the schedule, and reads it in three ways."""
    recipe, whole = RECIPES[task.model], data.classic(args.data, task.set).to(args.device)
    split = training.folds(whole.labels, args.folds, args.seed + task.repeat)
    train, test = (whole.take(indices) for indices in split[task.fold])
    x, others = train.bags, test.bags
    if task.features == "standardised":
        x, others = data.standardised(x, others)
    settings = dataclasses.replace(recipe.settings, epochs=args.epochs or recipe.settings.epochs)
    seen = []
    training.fit(
        recipe,
        settings,
        x,
        train.labels,
        1000 * (args.seed + task.repeat) + 10 * task.fold,
        way="upstream",
        after_epoch=lambda model: seen.append(training.predict(recipe, model, others)[""]),
    )
    right = [1 - training.error_and_loss(logits, test.labels)[0] for logits in seen]
    threshold = max(train_classic.best_on_test(logits, test.labels.cpu()) for logits in seen)
    return {"accuracy": {"last": right[-1], "best": max(right), "threshold": threshold}, "bags": len(test.labels)}


# The table


def markdown(results: dict) -> str:
    rows, arguments = results["rows"], results["arguments"]
    sets = [one for one in data.CLASSIC if any(row["set"] == one for row in rows)]
    lines = [["model", "features", "read at", *sets]]
    for model, features in dict.fromkeys((row["model"], row["features"]) for row in rows):
        of_model = [row for row in rows if (row["model"], row["features"]) == (model, features)]
        for key, reading in READINGS.items():
            values = [[row["accuracy"][key] for row in of_model if row["set"] == one] for one in sets]
            lines.append([model, features, reading, *map(_cell, values)])
    for model, papers in train_classic.PAPERS.items():
        if model in RECIPES and not arguments["quick"]:
            lines.append([model, "", "*its paper*", *(papers[data.CLASSIC.index(one)] for one in sets)])
    return f"""# The settings that authors publish

Accuracy, mean ± standard deviation over folds, and their number ({arguments["folds"]} folds, repeated). One bag
per step; {_settings(arguments)}. The same runs are
read in three ways, of which only the first does not look at the test fold.

{report.table(lines)}
"""


def _settings(arguments: dict) -> str:
    texts = []
    for name, recipe in RECIPES.items():
        s = recipe.settings
        texts.append(
            f"{name}: Adam, learning rate {s.lr:g}{', cosine' if s.cosine else ''}, weight decay {s.weight_decay:g}, "
            f"betas {s.betas[0]:g} and {s.betas[1]:g}, {arguments['epochs'] or s.epochs} epochs"
        )
    return "; ".join(texts)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f} ({len(values)})"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.train_published", description=__doc__, formatter_class=about)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--sets", nargs="+", choices=data.CLASSIC, default=list(data.CLASSIC))
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--folds", type=report.at_least(2), default=10)
    parser.add_argument("--repeats", type=report.at_least(1), default=5)
    parser.add_argument("--epochs", type=report.at_least(1), help="instead of the published number")
    report.add_options(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.sets, args.folds, args.repeats, args.epochs = args.sets[:1], 2, 1, 4
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    for name in args.sets:
        data.classic(args.data, name)  # before any work
    cells = [(s, m, FEATURES[0]) for m in args.models for s in args.sets]
    cells += [(s, m, FEATURES[1]) for s, m, _ in cells if m == "dsmil" and not s.startswith("musk")]
    # A whole cross-validation of everything first, then the next one: what is cut short has a figure for each cell.
    tasks = [Task(*cell, r, k) for r in range(args.repeats) for cell in cells for k in range(args.folds)]
    results = report.Report("train_published", markdown, args, argv, stay=True)
    results.run(tasks, partial(run, args=args), args.jobs, _SAME)
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
