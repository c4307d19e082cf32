"""MNIST-bags: a bag of digits is positive if it holds a 9 (Ilse et al. 2018).

    python -m examples.train_mnist_bags --data DIR

DIR holds MNIST's four files as published.  For every mean size of bags and number of training bags each model is
trained anew ``--repeats`` times on bags of the training images, and its AUC taken on bags of the test images.  The
network and the settings are those of Shi et al. 2020 (tables A8 and A9), for all models.
``train_mnist_bags.png`` shows to which digits of test bags the attention goes.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from examples import data, recipes, report, training
from examples.recipes import Recipe, Settings
from milkernels import Bags, attention_arrays

FEATURES = 500
PUBLISHED = Settings(5e-4, 1e-4, 30, 1)
DEVIATIONS = {10: 2, 50: 10, 100: 20}  # of the size of bags, by its mean


class OfImages(nn.Module):
    """A model of features behind a LeNet, which sees the images of all bags at once."""

    def __init__(self, head: nn.Module, dropout: float = 0.5):
        super().__init__()
        self.lenet = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 20, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(20, 50, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(800, FEATURES),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.head = head

    def forward(self, bags: Bags):
        return self.head(self.lenet(bags.values), bags.offsets)


def of_images(recipe: Recipe) -> Recipe:
    def stages(model: OfImages) -> recipes.Stages:
        shared = list(model.lenet.parameters())
        return [(shared + parameters, loss) for parameters, loss in recipe.stages(model.head)]

    made = {"model": lambda width: OfImages(recipe.model(FEATURES)), "stages": stages, "settings": PUBLISHED}
    return dataclasses.replace(recipe, **made, eager=None)


RECIPES: dict[str, Recipe] = {
    name: of_images(recipe)
    for name, recipe in {
        "attention": recipes.attention(None, 0.0, gated=False, hidden=128),
        "gated-attention": recipes.attention(None, 0.0, gated=True, hidden=128),
        "loss-attention": recipes.loss_attention(None, 0.0, PUBLISHED, 2.0),
        "dsmil": recipes.dsmil(),
        "dsmil-v1": recipes.dsmil_v1(None, 0.0),
        **recipes.poolings(None, 0.0, ("max", "mean")),
    }.items()
}

# AUC as published, for bags of 10, by the number of training bags: Shi et al. 2020, table 2 (of attention the rows with
# one sigmoid, as here; their pooling functions have a softmax of two classes), and for 100 Li et al. (DSMIL).
PAPERS: dict[str, dict[int, str]] = {
    "attention": {50: "0.858", 100: "0.901; Li et al. 0.948", 150: "0.942", 200: "0.961"},
    "gated-attention": {50: "0.869", 100: "0.912; Li et al. 0.916", 150: "0.966", 200: "0.968"},
    "loss-attention": {50: "0.931", 100: "0.969", 150: "0.978", 200: "0.984"},
    "dsmil": {100: "0.948"},
    "instance+max": {50: "0.904", 100: "0.947", 150: "0.952", 200: "0.954"},
    "instance+mean": {50: "0.800", 100: "0.851", 150: "0.913", 200: "0.939"},
    "embedding+max": {50: "0.805", 100: "0.943", 150: "0.962", 200: "0.975"},
    "embedding+mean": {50: "0.794", 100: "0.847", 150: "0.904", 200: "0.934"},
}
_SAME = ("data", "test", "epochs", "bags_per_step", "seed", "device")


def in_batches(settings: Settings, bags: int) -> Settings:
    """The learning rate grows with the bags of a step."""
    return dataclasses.replace(settings, bags=bags, lr=settings.lr * bags / settings.bags)


def auc(logits: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, logits))


@dataclasses.dataclass(frozen=True)
class Task:
    model: str
    mean: int  # size of bags
    train: int  # bags
    repeat: int


def _drawn(args: argparse.Namespace) -> Task | None:
    """Whose attention is drawn."""
    whole = "attention" in args.models and report.folder(args) is not None
    return Task("attention", args.means[0], args.train[-1], 0) if whole else None


def _settings(model: str, args: argparse.Namespace) -> Settings:
    settings = in_batches(RECIPES[model].settings, args.bags_per_step)
    return dataclasses.replace(settings, epochs=args.epochs or settings.epochs)


def _trained(task: Task, args: argparse.Namespace) -> nn.Module:
    digits, seed = _digits(args.data, "train"), 1000 * (args.seed + task.repeat) + task.train
    drawn = data.digit_bags(digits, task.train, task.mean, DEVIATIONS[task.mean], seed)
    train = data.pictures(digits, drawn).to(args.device)
    return training.fit(RECIPES[task.model], _settings(task.model, args), train.bags, train.labels, seed)


@functools.cache
def _digits(folder: Path, part: str) -> data.Digits:
    return data.mnist(folder, part)


def _test(mean: int, args: argparse.Namespace) -> data.Labelled:
    digits = _digits(args.data, "t10k")
    drawn = data.digit_bags(digits, args.test, mean, DEVIATIONS[mean], 1000 * args.seed + 1)
    return data.pictures(digits, drawn).to(args.device)


def run(task: Task, args: argparse.Namespace) -> dict:
    """Trains and tests one model."""
    recipe, test, model = RECIPES[task.model], _test(task.mean, args), _trained(task, args)
    logits = training.predict(recipe, model, test.bags, size=50)
    if task == _drawn(args):
        report.folder(args).mkdir(parents=True, exist_ok=True)
        picture(model, test, report.folder(args) / "train_mnist_bags.png")
    return {"auc": {name: auc(of_name, test.labels.cpu()) for name, of_name in logits.items()}}


def markdown(results: dict) -> str:
    rows, arguments = results["rows"], results["arguments"]
    quick = arguments.get("quick", False)
    papers = f"after {arguments['epochs']} epochs" if quick else "in brackets what the papers report"
    text = f"""# MNIST-bags

AUC on {arguments["test"]:,} test bags, mean ± standard deviation over repetitions, each with new training bags, whose
number is in the header; {papers}. Bags per step: {arguments["bags_per_step"]}.
"""
    for mean in sorted({row["mean"] for row in rows}):
        of_mean = [row for row in rows if row["mean"] == mean]
        counts = sorted({row["train"] for row in of_mean})
        lines = [["model", "source", *(f"{count} bags" for count in counts)]]
        for model in dict.fromkeys(row["model"] for row in of_mean):
            found = [row for row in of_mean if row["model"] == model]
            for name in found[0]["auc"]:
                known = PAPERS.get(model, {}) if mean == 10 and not name and not quick else {}
                cells = []
                for count in counts:
                    values = [row["auc"][name] for row in found if row["train"] == count]
                    cells.append(_cell(values, known.get(count)))
                lines.append([f"{model}, {name}" if name else model, RECIPES[model].source, *cells])
        text += f"\n{mean} ± {DEVIATIONS[mean]} digits in a bag:\n\n{report.table(lines)}\n"
    return text + "\nTest bags, digits in the order of their attention:\n\n![digits](train_mnist_bags.png)"


def _cell(values: Sequence[float], paper: str | None) -> str:
    if not values:
        return "not run"
    text = f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
    return text if paper is None else f"{text} ({paper})"


def picture(model: nn.Module, test: data.Labelled, path: Path, bags: int = 6, most: int = 12) -> None:
    """Test bags, their digits in the order of their attention weights; a frame around each 9."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    some = test.bags[:bags]
    with torch.no_grad():
        prediction = model(some)
    figure = Figure(figsize=(1.0 * most, 1.25 * bags), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(bags, most, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    probabilities = prediction.logits.sigmoid()[:, 0].tolist()
    for b, one in enumerate(attention_arrays(prediction.pooled, some)):
        start = int(some.offsets[b])
        weights = torch.from_numpy(one.weights[:, 0])
        axes[b, 0].set_title(f"p = {probabilities[b]:.2f}", loc="left", fontsize=8)
        for axis, i in zip(axes[b], weights.argsort(descending=True).tolist(), strict=False):
            axis.imshow(some.values[start + i].view(28, 28).cpu(), cmap="gray_r")
            axis.text(0, 31, f"{weights[i]:.2f}", fontsize=8, va="top")
            if some.extras["digits"][start + i] == data.DIGIT:
                axis.add_patch(_frame())
    figure.savefig(path, dpi=100)


def _frame():
    from matplotlib.patches import Rectangle

    return Rectangle((-0.5, -0.5), 28, 28, fill=False, edgecolor="tab:red", linewidth=2)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.train_mnist_bags", description=__doc__, formatter_class=about)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's four files")
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), help="default: all; if --quick some of them")
    parser.add_argument("--means", type=int, nargs="+", choices=list(DEVIATIONS), default=[10, 50, 100])
    parser.add_argument(
        "--train", type=report.at_least(2), nargs="+", default=[50, 100, 150, 200, 300], help="training bags"
    )
    parser.add_argument("--test", type=report.at_least(2), default=1000, help="test bags")
    parser.add_argument("--repeats", type=report.at_least(1), default=5)
    parser.add_argument("--epochs", type=report.at_least(1), help="instead of the published number")
    parser.add_argument("--bags-per-step", type=report.at_least(1), default=1, help="the learning rate grows with them")
    report.add_options(parser)
    args = parser.parse_args(argv)
    args.models = args.models or (["attention", "instance+max", "embedding+max"] if args.quick else list(RECIPES))
    if args.quick:
        args.means, args.train, args.test, args.repeats, args.epochs = args.means[:1], [50], 100, 1, 6
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    for part in ("train", "t10k"):
        data.mnist(args.data, part)  # before any work
    grid = [(model, mean) for mean in args.means for model in args.models]
    tasks = [Task(model, mean, count, r) for model, mean in grid for count in args.train for r in range(args.repeats)]
    results = report.Report("train_mnist_bags", markdown, args, argv, stay=True)
    results.run(tasks, partial(run, args=args), args.jobs, _SAME)
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
