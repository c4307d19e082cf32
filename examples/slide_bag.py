"""A simulated slide of 100,000 patches: train on whole slides, then ask which patches decided.

    python -m examples.slide_bag

A slide is a disc of tissue on a grid of patches, each with features as of a frozen encoder (ReLU, float16 as they are
stored).  Positive slides hold a few round lesions, whose patches differ in some of the features; all slides hold
harmless spots that differ in others.  Gated attention is trained on whole slides, several in a call, and then asked
about a slide that it has not seen.  ``slide_bag.png`` is its attention, ``slide_bag_lesions.png`` where lesions are.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from examples import data, recipes, report, training
from examples.recipes import Settings
from milkernels import Bags, attention_arrays, heatmap, topk_instances

PATCH = 256  # pixels
LESION, HARMLESS = 0.02, 0.10  # shares of the tissue
_MARKERS = 24  # features in which lesions, or harmless spots, differ
RECIPE = recipes.attention(None, 0.0, gated=True, hidden=128)
SETTINGS = Settings(lr=2e-3, weight_decay=1e-4, epochs=12, bags=4)


class Slide(NamedTuple):
    features: Tensor  # float16 [n, L]
    coords: Tensor  # int64 [n, 2], x and y in pixels
    lesion: Tensor  # bool [n]
    label: int


def simulate(patches: int, width: int, label: int, seed: int) -> Slide:
    """A slide of about this many patches."""
    generator = torch.Generator().manual_seed(seed)
    side = int((patches / 0.785) ** 0.5) + 1
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    place = (grid + 0.5) / side * 2 - 1
    inside = place.square().sum(1) <= 1
    grid, place = grid[inside], place[inside]
    lesion = _spots(place, LESION, 3, generator) if label else torch.zeros(len(grid), dtype=torch.bool)
    harmless = _spots(place, HARMLESS, 8, generator) & ~lesion
    encoder = torch.Generator().manual_seed(0)  # the same for all slides
    mean = 0.3 * torch.randn(width, generator=encoder)
    markers = torch.randperm(width, generator=encoder)[: 2 * _MARKERS].view(2, _MARKERS)
    x = mean + torch.randn(len(grid), width, generator=generator)
    for spot, where in ((lesion, markers[0]), (harmless, markers[1])):
        x[:, where] += 1.2 * spot[:, None]
    return Slide(F.relu(x).half(), grid * PATCH, lesion, label)


def _spots(place: Tensor, share: float, count: int, generator: torch.Generator) -> Tensor:
    """Which places lie in one of ``count`` discs, which together cover about this share of the tissue."""
    radius = max((share / count) ** 0.5, 2 * len(place) ** -0.5)  # of some patches at least
    angle = 6.2832 * torch.rand(count, generator=generator)
    centre = 0.8 * torch.rand(count, 1, generator=generator).sqrt() * torch.stack([angle.cos(), angle.sin()], 1)
    return (torch.cdist(place, centre) <= radius).any(1)


def cohort(count: int, smallest: int, largest: int, width: int, seed: int) -> list[Slide]:
    """Slides of many sizes, every other one positive."""
    steps = max(1, count - 1)
    sizes = [round(smallest * (largest / smallest) ** (i / steps)) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [simulate(sizes[i], width, i % 2, 1000 * seed + i) for i in order]


def labelled(slides: Sequence[Slide]) -> data.Labelled:
    bags = Bags.from_list([s.features for s in slides], extras={"coords": [s.coords for s in slides]})
    return data.Labelled(bags, torch.tensor([s.label for s in slides]))


def explain(model, slide: Slide, device: str, out: Path | None) -> dict:
    """What the attention says of one slide, and pictures of it."""
    from sklearn.metrics import roc_auc_score

    bags = labelled([slide]).bags.to(device)
    with torch.no_grad():
        model(bags)  # warms up
        start = report.now(bags.values)
        prediction = model(bags)
        seconds = report.now(bags.values) - start
    (one,) = attention_arrays(prediction.pooled, bags)
    _, top = topk_instances(prediction.pooled.scores, 100)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        heatmap(one.coords, one.weights[:, 0], out / "slide_bag.png", patch_size=PATCH, title="attention", dpi=60)
        lesions, options = out / "slide_bag_lesions.png", {"scale": "linear", "title": "lesions", "label": "lesion"}
        heatmap(slide.coords, slide.lesion.float(), lesions, patch_size=PATCH, dpi=60, **options)
    return {
        "patches": len(slide.features),
        "lesion": slide.lesion.float().mean().item(),
        "probability": prediction.logits.sigmoid().item(),
        "attention_auc": float(roc_auc_score(slide.lesion, one.scores[:, 0])),
        "top_100_in_lesions": slide.lesion[top.flatten().cpu()].float().mean().item(),
        "seconds": seconds,
    }


def train_and_explain(args: argparse.Namespace, out: Path | None) -> dict:
    smallest, largest = args.patches // 20, args.patches // 2
    train, test = (
        labelled(cohort(args.slides, smallest, largest, args.width, args.seed + i)).to(args.device) for i in (1, 2)
    )
    starts, seconds, losses = [report.now(train.labels)], [], []
    settings = dataclasses.replace(SETTINGS, epochs=args.epochs)
    with Progress() as bar:
        shown = bar.add_task("epochs", total=args.epochs)

        def after_epoch(model) -> None:
            seconds.append(report.now(train.labels) - starts[-1])
            logits = training.predict(RECIPE, model, train.bags, size=SETTINGS.bags)[""]
            losses.append(training.error_and_loss(logits, train.labels)[1])
            starts.append(report.now(train.labels))
            bar.advance(shown)

        model = training.fit(RECIPE, settings, train.bags, train.labels, args.seed, after_epoch=after_epoch)
    logits = training.predict(RECIPE, model, test.bags, size=SETTINGS.bags)[""]
    return {
        "slides": args.slides,
        "smallest": smallest,
        "largest": largest,
        "width": args.width,
        "losses": losses,
        "seconds_per_epoch": statistics.median(seconds),
        "accuracy": 1 - training.error_and_loss(logits, test.labels)[0],
    } | explain(model, simulate(args.patches, args.width, 1, args.seed + 3), args.device, out)


def markdown(results: dict) -> str:
    (row,) = results["rows"]
    lines = [
        ("training slides", f"{row['slides']} of {row['smallest']:,} to {row['largest']:,} patches"),
        ("features of a patch", f"{row['width']}, float16"),
        ("training", f"{len(row['losses'])} epochs, {row['seconds_per_epoch']:.1f} s each (median)"),
        ("loss after the first and the last epoch", f"{row['losses'][0]:.3f}, {row['losses'][-1]:.3f}"),
        ("accuracy on as many slides, held out", f"{row['accuracy']:.3f}"),
        ("the slide", f"{row['patches']:,} patches, {row['lesion']:.1%} of them in lesions"),
        ("predicted probability", f"{row['probability']:.3f}, in {1e3 * row['seconds']:,.0f} ms"),
        ("AUC of the attention score, patches in lesions or not", f"{row['attention_auc']:.3f}"),
        ("of the 100 patches attended to most, in lesions", f"{row['top_100_in_lesions']:.0%}"),
    ]
    pictures = "![attention](slide_bag.png) ![lesions](slide_bag_lesions.png)"
    return f"# A simulated slide\n\n{report.table([('what', 'figure'), *lines])}\n\n{pictures}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.slide_bag", description=__doc__, formatter_class=about)
    parser.add_argument("--patches", type=report.at_least(200), default=100_000, help="of the slide that is explained")
    parser.add_argument("--slides", type=report.at_least(2), default=32, help="to train on; as many again to test on")
    parser.add_argument("--width", type=report.at_least(48), default=512, help="features of a patch")
    parser.add_argument("--epochs", type=report.at_least(1), default=SETTINGS.epochs)
    report.add_options(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.patches, args.slides, args.width, args.epochs = 2000, 32, 64, 20
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    results = report.Report("slide_bag", markdown, args, argv)
    results.save([train_and_explain(args, results.folder)])
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
