"""The papers' models on MUSK1, MUSK2, Fox, Tiger and Elephant: 10-fold cross-validation, repeated.

    python -m examples.train_classic --data DIR
    python -m examples.train_classic --data DIR --protocol authors    # and a table that looks at the test folds

DIR holds ``musk1.npz`` (``features [N, L]``, ``offsets [B + 1]``, ``labels [B]``), UCI's ``clean1.data`` or
``musk1norm.svm``; likewise the others.

Each fold is trained on nine tenths of the bags and tested on the rest.  How long is trained, and with which settings
where there are several, is decided by cross-validation within those nine tenths: by the fewest wrong bags, then by the
lowest loss.  Features are standardised by the training bags.  No choice ever sees a test bag.  ``--protocol authors``
adds a table that does: what DSMIL's public code reports, the best epoch on the test fold at the threshold that is best
there.

A run that was cut short goes on where it was.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from examples import data, recipes, report, training
from examples.recipes import Recipe, Settings

WIDTHS, DROPOUT = (256, 128, 64), 0.5  # of the embedding: MI-Net's, which the papers share
BAGS = 16  # per step, where bags are trained in mini-batches

# What is chosen from where no settings are published.
SEARCH = (Settings(1e-3, 1e-3, 30, BAGS), Settings(2e-3, 1e-2, 30, BAGS))
LOSS_ATTENTION = Settings(1e-4, 5e-4, 100, 1)  # as published: a bag per step


def candidates(recipe: Recipe) -> list[Settings]:
    """What is chosen from.  Published settings are those of one bag per step: of more, the learning rate grows with
    their number or with its root."""
    if recipe.settings is None:
        return list(SEARCH)
    more = BAGS / recipe.settings.bags
    return [dataclasses.replace(recipe.settings, lr=recipe.settings.lr * by, bags=BAGS) for by in (more**0.5, more)]


MAIN: dict[str, Recipe] = {
    "attention": recipes.attention(WIDTHS, DROPOUT, gated=False),
    "gated-attention": recipes.attention(WIDTHS, DROPOUT, gated=True),
    "loss-attention": recipes.loss_attention(WIDTHS, DROPOUT, LOSS_ATTENTION, 0.1),
    "dsmil": recipes.dsmil(),
    "dsmil-v1": recipes.dsmil_v1(WIDTHS, DROPOUT),
}
BASELINES: dict[str, Recipe] = {
    **recipes.poolings(WIDTHS, DROPOUT),
    **recipes.minets(DROPOUT),
    "loss-attention-mean": recipes.loss_attention(WIDTHS, DROPOUT, LOSS_ATTENTION, 0.1, instances="mean"),
    "loss-attention-consistent": recipes.loss_attention(WIDTHS, DROPOUT, LOSS_ATTENTION, 0.1, omega=1.0),
    "self-attention": recipes.self_attention(WIDTHS, DROPOUT),
    "self-attention-gaussian": recipes.self_attention(WIDTHS, DROPOUT, "gaussian"),
    "self-attention-inverse-quadratic": recipes.self_attention(WIDTHS, DROPOUT, "inverse_quadratic"),
    "self-attention-laplace": recipes.self_attention(WIDTHS, DROPOUT, "laplace"),
}
RECIPES = MAIN | BASELINES

# Accuracies as published: Shi et al. 2020, table 1 (where instance+max is "mi-Net", embedding+max "MI-Net"); Li et al.
PAPERS: dict[str, tuple[str, ...]] = {
    "attention": ("0.892 ± 0.090", "0.858 ± 0.106", "0.615 ± 0.096", "0.839 ± 0.054", "0.868 ± 0.054"),
    "gated-attention": ("0.900 ± 0.088", "0.863 ± 0.094", "0.603 ± 0.068", "0.845 ± 0.046", "0.857 ± 0.064"),
    "loss-attention": ("0.917 ± 0.066", "0.911 ± 0.063", "0.712 ± 0.074", "0.897 ± 0.065", "0.900 ± 0.069"),
    "dsmil": ("0.923", "0.914", "0.767", "0.871", "0.907"),
    "instance+max": ("0.889 ± 0.088", "0.858 ± 0.110", "0.613 ± 0.078", "0.824 ± 0.076", "0.858 ± 0.083"),
    "embedding+max": ("0.887 ± 0.091", "0.859 ± 0.102", "0.622 ± 0.084", "0.830 ± 0.072", "0.862 ± 0.077"),
    "MI-Net with DS": ("0.894 ± 0.093", "0.874 ± 0.097", "0.630 ± 0.080", "0.845 ± 0.087", "0.872 ± 0.072"),
    "MI-Net with RC": ("0.898 ± 0.097", "0.873 ± 0.098", "0.619 ± 0.104", "0.836 ± 0.083", "0.857 ± 0.089"),
}
_SAME = ("data", "folds", "inner", "epochs", "protocol", "seed", "device")
_NO_LESS = 1e-9  # than a standard deviation away, but for rounding


# One fold


def choose(
    recipe: Recipe, tried_settings: Sequence[Settings], train: data.Labelled, inner: int, seed: int
) -> tuple[Settings, int]:
    """Settings and a number of epochs, by cross-validation on the training bags alone."""
    tried = []
    for settings in tried_settings:
        wrong, losses = torch.zeros(settings.epochs), torch.zeros(settings.epochs)
        for k, (fit_on, held_out) in enumerate(training.folds(train.labels, inner, seed)):
            seen = _watched(recipe, settings, train.take(fit_on), train.take(held_out), seed + k)
            for epoch, logits in enumerate(seen):
                error, loss = training.error_and_loss(logits[""], train.labels[held_out])
                wrong[epoch] += round(error * len(held_out))
                losses[epoch] += loss * len(held_out)
        tried += [((wrong[e].item(), losses[e].item()), settings, e + 1) for e in range(settings.epochs)]
    _, settings, epochs = min(tried, key=lambda one: one[0])
    return settings, epochs


def _watched(
    recipe: Recipe, settings: Settings, train: data.Labelled, test: data.Labelled, seed: int, epochs: int | None = None
) -> list[dict[str, Tensor]]:
    """The test bags' logits after each epoch."""
    x, others = data.standardised(train.bags, test.bags)
    seen: list[dict[str, Tensor]] = []

    def look(model) -> None:
        seen.append(training.predict(recipe, model, others))

    training.fit(recipe, settings, x, train.labels, seed, epochs=epochs, after_epoch=look)
    return seen


def best_on_test(logits: Tensor, labels: Tensor) -> float:
    """Accuracy at the threshold where true less false positives are most, as DSMIL's public code has it."""
    from sklearn.metrics import roc_curve

    false, true, thresholds = roc_curve(labels, logits)
    return ((logits >= thresholds[(true - false).argmax()]) == (labels > 0)).double().mean().item()


@dataclasses.dataclass(frozen=True)
class Task:
    set: str
    model: str
    repeat: int
    fold: int


def run(task: Task, args: argparse.Namespace) -> dict:
    """Trains and tests one fold."""
    recipe, whole = RECIPES[task.model], data.classic(args.data, task.set).to(args.device)
    split = training.folds(whole.labels, args.folds, args.seed + task.repeat)
    train, test = (whole.take(indices) for indices in split[task.fold])
    seed = 1000 * (args.seed + task.repeat) + 10 * task.fold
    among = candidates(recipe)
    if args.epochs:
        among = [dataclasses.replace(settings, epochs=args.epochs) for settings in among]
    settings, epochs = choose(recipe, among, train, args.inner, seed + 1)
    authors = args.protocol == "authors"
    seen = _watched(recipe, settings, train, test, seed, None if authors else epochs)
    labels = test.labels.cpu()
    row = {"epochs": epochs, "settings": dataclasses.asdict(settings), "bags": len(labels)}
    row["accuracy"] = {name: 1 - training.error_and_loss(z, labels)[0] for name, z in seen[epochs - 1].items()}
    if authors:
        row["authors"] = {name: max(best_on_test(logits[name], labels) for logits in seen) for name in recipe.scores}
    return row


# The table


def _lines(rows: list[dict], sets: Sequence[str], column: str, papers: bool) -> Iterator[list[str]]:
    """Of each model and each of its scores: mean and deviation over folds, and perhaps what the papers say."""
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        folds = max(sum(row["set"] == one for row in of_model) for one in sets)
        for name in of_model[0][column]:
            cells = []
            for one in sets:
                values = [row[column][name] for row in of_model if row["set"] == one]
                known = papers and not name and model in PAPERS and (column == "accuracy" or model == "dsmil")
                cells.append(cell(values, PAPERS[model][data.CLASSIC.index(one)] if known else None, folds))
            yield [f"{model}, {name}" if name else model, RECIPES[model].source, str(folds), *cells]


def cell(values: Sequence[float], paper: str | None, folds: int) -> str:
    if not values:
        return "not run"
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    text = f"{mean:.3f} ± {deviation:.3f}"
    if paper is not None:
        below = float(paper.split()[0]) - mean > deviation + _NO_LESS
        text += f" ({paper}{', **below**' if below else ''})"
    return text if len(values) == folds else f"{text}, {len(values)} folds"


def markdown(results: dict) -> str:
    rows, arguments = results["rows"], results["arguments"]
    sets = [one for one in data.CLASSIC if any(row["set"] == one for row in rows)]
    header = ["model", "source", "folds", *sets]
    papers = """in brackets what the papers
report, ± as they give it, *below* where ours is less by more than our standard deviation."""
    chosen = f"""Epochs, and settings where
there are several, are chosen by {arguments["inner"]}-fold cross-validation within the training bags of each fold, and
all of these are then trained on for as many epochs."""
    if quick := arguments.get("quick", False):
        papers = f"of {arguments['epochs']} epochs at most, which is\nnothing to compare with the papers."
    text = f"""# The classic data sets

Accuracy, mean ± standard deviation over folds ({arguments["folds"]} folds, repeated); {papers} {chosen}

{report.table([header, *_lines(rows, sets, "accuracy", not quick)])}

"""
    if arguments["protocol"] == "authors":
        text += f"""The protocol of DSMIL's public code, **which looks at the test folds**: the best of all epochs on
the test fold, at the threshold that is best there.{"" if quick else " In brackets what its paper reports."}

{report.table([header, *_lines(rows, sets, "authors", not quick)])}

"""
    return text + _chosen(rows)


def _chosen(rows: list[dict]) -> str:
    """How often the search took what."""
    lines = [["model", "learning rate, weight decay, bags per step: how often", "epochs, median"]]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        counts: dict[str, int] = {}
        for row in of_model:
            taken = "{lr:g}, {weight_decay:g}, {bags}".format(**row["settings"])
            counts[taken] = counts.get(taken, 0) + 1
        taken = "; ".join(f"{key}: {count}" for key, count in sorted(counts.items()))
        lines.append([model, taken, f"{statistics.median(row['epochs'] for row in of_model):g}"])
    return "What was chosen, over all sets and folds:\n\n" + report.table(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.train_classic", description=__doc__, formatter_class=about)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--sets", nargs="+", choices=data.CLASSIC, default=list(data.CLASSIC))
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--folds", type=report.at_least(2), default=10)
    parser.add_argument("--repeats", type=report.at_least(1), default=5)
    parser.add_argument(
        "--baseline-repeats", type=report.at_least(1), help=f"of {', '.join(BASELINES)} (default: as the others)"
    )
    parser.add_argument("--inner", type=report.at_least(2), default=2, help="folds of the search")
    parser.add_argument("--epochs", type=report.at_least(1), help="of all models, instead of their own")
    parser.add_argument("--protocol", choices=("nested", "authors"), default="nested")
    report.add_options(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.sets, args.folds, args.repeats, args.epochs = args.sets[:1], 2, 1, 4
    args.baseline_repeats = args.repeats if args.baseline_repeats is None else args.baseline_repeats
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    for name in args.sets:
        data.classic(args.data, name)  # before any work
    repeats = {model: args.baseline_repeats if model in BASELINES else args.repeats for model in args.models}
    tasks = [
        Task(s, m, r, k) for m in args.models for s in args.sets for r in range(repeats[m]) for k in range(args.folds)
    ]
    results = report.Report("train_classic", markdown, args, argv, stay=True)
    results.run(tasks, partial(run, args=args), args.jobs, _SAME)
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
