"""Train on a folder of feature files, as CLAM and TRIDENT leave them, with the labels in a CSV file.

    python -m examples.train_slides --features DIR --labels labels.csv
    python -m examples.train_slides --quick     # simulated slides: needs no data

The CSV has a header, and a line for each slide: ``slide_id``, the file's name without its suffix, and ``label``, a
number or a word.  Where it has ``case_id`` too, all slides of a patient are in the same set.

A fifth of the slides is for testing and another fifth for validation.  ``best.pt`` is the model of the epoch with the
largest AUC on the validation slides, and the smallest loss where several have it.  The test slides are looked at once,
at the end, by that model.  A run that was cut short goes on from ``last.pt``.  ``attention.png`` is the attention on
the test slide that is surest to be of the last class.
"""

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from examples import report, slide_bag
from milkernels import attention_arrays, heatmap
from milkernels.data import BagBatchSampler, FeatureFolder
from milkernels.losses import clam_loss, dsmil_loss
from milkernels.nn import ABMIL, CLAM, DSMILModel

SETS = ("train", "val", "test")


class Kind(NamedTuple):
    """A model, by what it is made of and trained on."""

    make: Callable[[int, int], nn.Module]  # of the features' width and the number of classes
    loss: Callable[[Any, Tensor], Tensor]  # of a prediction and labels [B]
    probabilities: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(1)


def _dsmil_loss(prediction, labels: Tensor) -> Tensor:
    return dsmil_loss(prediction, F.one_hot(labels, prediction.logits.shape[1]))


MODELS = {
    "abmil": Kind(lambda w, c: ABMIL(w, c, dropout=0.25), lambda p, y: F.cross_entropy(p.logits, y)),
    "clam-sb": Kind(lambda w, c: CLAM(w, c), clam_loss),
    "clam-mb": Kind(lambda w, c: CLAM(w, c, multi_branch=True), clam_loss),
    "dsmil": Kind(lambda w, c: DSMILModel(w, c), _dsmil_loss, torch.sigmoid),
}


# Slides and their labels


class Slides(NamedTuple):
    classes: list[str]  # as they are called in the file
    sets: dict[str, dict[str, int]]  # of each set the class of each slide


def read_slides(path: Path, seed: int) -> Slides:
    """The slides of a CSV file, in three sets."""
    from sklearn.model_selection import StratifiedGroupKFold

    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"slide_id", "label"} <= set(rows[0]):
        got = list(rows[0]) if rows else "no line"
        raise ValueError(f"{path} must have columns slide_id and label, and slides; got {got}")
    names, labels = [row["slide_id"] for row in rows], [row["label"] for row in rows]
    if len(set(names)) != len(names):
        raise ValueError(f"{path} must have a line for each slide; {max(names, key=names.count)} has several")
    classes = sorted(set(labels))
    patients = [row.get("case_id") or row["slide_id"] for row in rows]
    fewest = min(len({p for p, of in zip(patients, labels, strict=True) if of == c}) for c in classes)
    if len(classes) < 2 or fewest < 5:
        got = f"{len(classes)} classes, {fewest} in the smallest"
        raise ValueError(f"{path} must have 2 classes or more, with 5 slides (patients) each; got {got}")
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(names, labels, patients)
    test, val, *train = (held_out.tolist() for _, held_out in folds)
    places = {"train": sorted(sum(train, [])), "val": val, "test": test}
    return Slides(classes, {s: {names[i]: classes.index(labels[i]) for i in at} for s, at in places.items()})


def write_simulated(folder: Path, count: int, largest: int, width: int, seed: int) -> None:
    """Slides of `examples.slide_bag` as feature files, with their labels in ``labels.csv``."""
    import h5py

    lines = ["slide_id,label"]
    for i, slide in enumerate(slide_bag.cohort(count, largest // 4, largest, width, seed)):
        with h5py.File(folder / f"slide_{i:03}.h5", "w") as file:
            file["features"], file["coords"] = slide.features.numpy(), slide.coords.numpy()
        lines.append(f"slide_{i:03},{'tumour' if slide.label else 'normal'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def loader(folder: FeatureFolder, args: argparse.Namespace, *, shuffle: bool = False) -> DataLoader:
    sampler = BagBatchSampler(folder.lengths, args.max_instances, shuffle, args.seed)
    pin = torch.device(args.device).type == "cuda"
    return DataLoader(
        folder, batch_sampler=sampler, collate_fn=folder.collate, num_workers=args.workers, pin_memory=pin
    )


# Checkpoints


def save(path: Path, content: dict) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    torch.save(content, new)
    new.replace(path)


def load(path: Path, device: str) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in evaluation mode, and what else is in it."""
    content = torch.load(path, map_location=device, weights_only=True)
    model = MODELS[content["model"]].make(content["width"], len(content["classes"])).to(device)
    model.load_state_dict(content["parameters"])
    return model.eval(), content


# Training


@torch.no_grad()
def probabilities(kind: Kind, model: nn.Module, folder: FeatureFolder, args: argparse.Namespace) -> Tensor:
    """``[slides, C]``, in the folder's order."""
    model.eval()
    logits = [model(batch["features"].to(args.device)).logits for batch in loader(folder, args)]
    return kind.probabilities(torch.cat(logits).float()).cpu()


def auc(p: Tensor, labels: Sequence[int]) -> float:
    """Of the second class of two; of more the mean of each against the others."""
    from sklearn.metrics import roc_auc_score

    labels = torch.tensor(labels)
    classes = [1] if p.shape[1] == 2 else range(p.shape[1])
    return sum(float(roc_auc_score(labels == c, p[:, c])) for c in classes) / len(classes)


def best_of(epochs: Sequence[dict]) -> int:
    """The largest AUC, the smallest loss where several have it."""
    return min(range(len(epochs)), key=lambda i: (-epochs[i]["val_auc"], epochs[i]["val_loss"]))


def train(folders: dict[str, FeatureFolder], classes: list[str], args: argparse.Namespace) -> list[dict]:
    """What each epoch came to; the models are in ``last.pt`` and ``best.pt``."""
    torch.manual_seed(args.seed)
    kind, last = MODELS[args.model], args.out / "last.pt"
    model = kind.make(folders["train"].width, len(classes)).to(args.device)
    optimiser = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    about = {"model": args.model, "width": folders["train"].width, "classes": classes}
    epochs: list[dict] = []
    if last.is_file():
        model, content = load(last, args.device)
        if {key: content[key] for key in about} != about:
            raise ValueError(f"{last} is of another model or other data; name another --out")
        optimiser = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
        optimiser.load_state_dict(content["optimiser"])
        epochs = content["epochs"]
    batches = loader(folders["train"], args, shuffle=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        shown = bar.add_task("batches", total=args.epochs * len(batches), completed=len(epochs) * len(batches))
        for epoch in range(len(epochs), args.epochs):
            batches.batch_sampler.set_epoch(epoch)
            model.train()
            total = 0.0
            for batch in batches:
                bags, labels = batch["features"].to(args.device, non_blocking=True), batch["label"].to(args.device)
                with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
                    loss = kind.loss(model(bags), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item() * len(bags)
                bar.advance(shown)
            p, labels = probabilities(kind, model, folders["val"], args), folders["val"].labels
            of_label = p[torch.arange(len(p)), labels].clamp(min=1e-9)
            row = {"loss": total / len(folders["train"]), "val_auc": auc(p, labels)}
            epochs.append(row | {"val_loss": -of_label.log().mean().item()})
            description = f"epoch {epoch + 1}: loss {row['loss']:.3f}, validation AUC {row['val_auc']:.3f}"
            bar.update(shown, description=description)
            content = about | {"parameters": model.state_dict(), "epochs": epochs}
            if best_of(epochs) == epoch:
                save(args.out / "best.pt", content)
            save(last, content | {"optimiser": optimiser.state_dict()})
    return epochs


def test(folder: FeatureFolder, args: argparse.Namespace) -> dict:
    """What ``best.pt`` makes of the test slides."""
    model, content = load(args.out / "best.pt", args.device)
    p = probabilities(MODELS[args.model], model, folder, args)
    row = {
        "auc": auc(p, folder.labels),
        "accuracy": (p.argmax(1) == torch.tensor(folder.labels)).double().mean().item(),
    }
    if "coords" in folder.extras:
        surest = int(p[:, -1].argmax())
        draw(model, folder, surest, args)
        row["drawn"] = f"{folder.names[surest]}: {content['classes'][-1]} with p = {p[surest, -1]:.2f}"
    return row


@torch.no_grad()
def draw(model: nn.Module, folder: FeatureFolder, index: int, args: argparse.Namespace) -> None:
    bags = folder.collate([folder[index]])["features"].to(args.device)
    prediction = model(bags)
    (one,) = attention_arrays(prediction.pooled, bags)
    heatmap(one.coords, one.weights[:, -1], args.out / "attention.png", title=folder.names[index], dpi=80)


def markdown(results: dict) -> str:
    (row,) = results["rows"]
    best = best_of(row["epochs"])
    of_best, slides = row["epochs"][best], row["slides"]
    lines = [
        ("classes", ", ".join(row["classes"])),
        ("slides", ", ".join(f"{slides[name]} {name}" for name in SETS)),
        ("loss of the first and the last epoch", f"{row['epochs'][0]['loss']:.3f}, {row['epochs'][-1]['loss']:.3f}"),
        ("best epoch", f"{best + 1} of {len(row['epochs'])}, validation AUC {of_best['val_auc']:.3f}"),
        ("test AUC", f"{row['auc']:.3f} (chance: 0.5)"),
        ("test accuracy", f"{row['accuracy']:.3f} (always the most frequent class: {row['chance']:.3f})"),
    ]
    picture = f"\n\n![attention](attention.png) {row['drawn']}" if "drawn" in row else ""
    return f"# {results['arguments']['model']} on slides\n\n{report.table([('what', 'figure'), *lines])}{picture}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.train_slides", description=__doc__, formatter_class=about)
    parser.add_argument("--features", type=Path, help="folder of .h5, .pt, .npy, .npz or .zarr, one for each slide")
    parser.add_argument("--labels", type=Path, help="CSV file with slide_id, label and perhaps case_id")
    parser.add_argument("--model", choices=list(MODELS), default="abmil")
    parser.add_argument("--epochs", type=report.at_least(1), default=20)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--weight-decay", type=float, default=1e-5)
    parser.add_argument("--max-instances", type=report.at_least(1), default=65536, help="of a batch of whole bags")
    parser.add_argument("--workers", type=report.at_least(0), default=0, help="processes that read files")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    report.add_options(parser)
    args = parser.parse_args(argv)
    if not args.quick and (args.features is None or args.labels is None):
        parser.error("--features and --labels are needed, or --quick, which simulates slides")
    if args.quick and (args.features or args.labels):
        parser.error("--quick simulates slides; leave out --features and --labels, or --quick")
    if args.quick:
        args.epochs, args.lr, args.max_instances = 6, 2e-3, 2048
    elif args.out is None:
        args.out = Path("train_slides")
    return args


def run(args: argparse.Namespace) -> dict:
    """The results; files go to ``args.out``, of a quick run without one nowhere."""
    with ExitStack() as stack:
        if args.quick:
            args.features = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            args.labels = args.features / "labels.csv"
            write_simulated(args.features, 50, 600, 64, args.seed)
            args.out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        slides = read_slides(args.labels, args.seed)
        folders = {name: FeatureFolder(args.features, labels) for name, labels in slides.sets.items()}
        args.out.mkdir(parents=True, exist_ok=True)
        row = {"classes": slides.classes, "slides": {name: len(folder) for name, folder in folders.items()}}
        row["epochs"] = train(folders, slides.classes, args)
        of_test = torch.tensor(folders["test"].labels)
        row["chance"] = (of_test == of_test.mode().values).double().mean().item()
        return row | test(folders["test"], args)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    results = report.Report("train_slides", markdown, args, argv)
    results.save([run(args)])
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
