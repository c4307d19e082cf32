"""A trained model over a folder of feature files: a file of predictions for each slide.

    python -m examples.predict_folder --checkpoint train_slides/best.pt --features DIR --out predictions
    python -m examples.predict_folder ... --shard 2/8     # of 8 jobs the second, say of an array of jobs
    python -m examples.predict_folder --quick             # trains on simulated slides first: needs no data

``<slide>.npz`` holds ``logits [C]``, ``probabilities [C]`` and ``classes [C]``, and of the patches, in the order of the
feature file, ``scores [n, K]``, ``weights [n, K]``, which sum to 1, and ``coords [n, 2]`` where it has them.  It is
whole or not there: a run that was cut short goes on with the slides that have none.  A slide that cannot be read is
named at the end, and the others are done.  ``--heatmaps`` draws ``<slide>.png`` as well.

`Predictor` is the callable behind it, of a path: any engine can map it over paths.
"""

import argparse
import functools
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from examples import train_slides
from milkernels import Bags, attention_weights, heatmap
from milkernels.data import FeatureFolder, read_bag


class Predictor:
    """``predictor(path)`` is a dict of arrays.  The model is loaded at the first call, so that what is sent to other
    processes is the path of the checkpoint alone."""

    def __init__(self, checkpoint: str | os.PathLike, device: str = "cpu"):
        self.checkpoint, self.device = str(checkpoint), device

    @functools.cached_property
    def _loaded(self) -> tuple[torch.nn.Module, dict]:
        return train_slides.load(Path(self.checkpoint), self.device)

    def __getstate__(self) -> dict:
        return {"checkpoint": self.checkpoint, "device": self.device}

    @torch.no_grad()
    def __call__(self, path: str | os.PathLike) -> dict[str, Any]:
        (model, about), bag = self._loaded, read_bag(path)
        if bag["features"].shape[1] != about["width"]:
            got = bag["features"].shape[1]
            raise ValueError(f"{path} has features of width {got}; {self.checkpoint} takes {about['width']}")
        bags = Bags.from_bag(bag["features"]).to(self.device)
        prediction = model(bags)
        logits = prediction.logits.float()
        arrays = {
            "logits": logits[0],
            "probabilities": train_slides.MODELS[about["model"]].probabilities(logits)[0],
            "scores": prediction.pooled.scores,
            "weights": attention_weights(prediction.pooled, bags.offsets),
        }
        made = {name: array.cpu().numpy() for name, array in arrays.items()} | {"classes": np.array(about["classes"])}
        return made | ({"coords": bag["coords"].numpy()} if "coords" in bag else {})


def write(path: Path, arrays: dict[str, Any]) -> None:
    """Whole or not at all, whichever process writes it."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with open(new, "wb") as file:
        np.savez(file, **arrays)
    new.replace(path)


def predict(paths: Sequence[Path], predictor: Predictor, out: Path, *, heatmaps: bool = False) -> dict[str, str]:
    """Predicts what has no ``.npz`` in ``out`` yet; the errors by slide."""
    out.mkdir(parents=True, exist_ok=True)
    errors = {}
    for path in track(paths, "slides"):
        done = out / f"{path.stem}.npz"
        if done.is_file():
            continue
        try:
            arrays = predictor(path)
            if heatmaps and "coords" in arrays:
                column = min(int(arrays["logits"].argmax()), arrays["weights"].shape[1] - 1)
                heatmap(arrays["coords"], arrays["weights"][:, column], out / f"{path.stem}.png", title=path.stem)
            write(done, arrays)  # last: it says that the slide is done
        except Exception as error:  # one slide does not stop the others
            errors[path.stem] = f"{type(error).__name__}: {error}"
    return errors


def shard(text: str) -> tuple[int, int]:
    """``i/n``, the i-th of n."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"must be i/n, 1/n to n/n; got {text}")
    return int(i), int(n)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.predict_folder", description=__doc__, formatter_class=about)
    parser.add_argument("--checkpoint", type=Path, help="best.pt of examples.train_slides")
    parser.add_argument("--features", type=Path, help="folder of feature files")
    parser.add_argument("--out", type=Path, help="folder of predictions")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="i/n", help="every n-th slide, from the i-th on")
    parser.add_argument("--heatmaps", action="store_true", help="a picture of the attention on each slide, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="trains on simulated slides, and predicts others")
    args = parser.parse_args(argv)
    if not args.quick and None in (args.checkpoint, args.features, args.out):
        parser.error("--checkpoint, --features and --out are needed, or --quick, which simulates slides")
    if args.quick and (args.checkpoint or args.features):
        parser.error("--quick simulates slides; leave out --checkpoint and --features, or --quick")
    return args


def simulated(args: argparse.Namespace, folder: Path) -> None:
    """A checkpoint, and slides that it was not trained on."""
    args.checkpoint, args.features = folder / "train" / "best.pt", folder / "slides"
    args.out = args.out or folder / "predictions"
    train_slides.run(train_slides.parse(["--quick", "--device", args.device, "--out", str(folder / "train")]))
    args.features.mkdir()
    train_slides.write_simulated(args.features, 20, 600, 64, seed=100)


def accuracy(labels: Path, out: Path) -> tuple[float, int]:
    """Of the predictions in ``out``, and how many there are."""
    right = []
    for line in labels.read_text().split()[1:]:
        name, label = line.split(",")
        if (out / f"{name}.npz").is_file():
            with np.load(out / f"{name}.npz") as arrays:
                right.append(arrays["classes"][arrays["probabilities"].argmax()] == label)
    return float(np.mean(right)), len(right)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    print(shlex.join(["python", "-m", "examples.predict_folder", *argv]))
    with ExitStack() as stack:
        if args.quick:
            simulated(args, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        first, count = args.shard
        paths = FeatureFolder(args.features).paths[first - 1 :: count]
        errors = predict(paths, Predictor(args.checkpoint, args.device), args.out, heatmaps=args.heatmaps)
        print(f"{len(paths) - len(errors)} of {len(paths)} slides are in {args.out}")
        for name, error in errors.items():
            print(f"{name}: {error}", file=sys.stderr)
        if args.quick:
            share, slides = accuracy(args.features / "labels.csv", args.out)
            print(f"accuracy on {slides} slides that the model was not trained on: {share:.3f} (chance: 0.5)")
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
