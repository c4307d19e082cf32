"""An encoder trained end to end through every instance of large bags, beside the same encoder frozen.

    python -m examples.train_encoder --data DIR

DIR holds MNIST's four files as published.  A bag has 1,000 digits, and is positive if some of them are a 9; negative
bags have none.  Both ways have the same small convolutional encoder, drawn from the same seed, and gated attention
behind it.  *Frozen*, as features of slides usually are: the encoder stays as it is drawn, and attention is trained on
its features.  *End to end*: every digit of every bag trains the encoder, by `milkernels.encode_in_chunks`, whose
memory is that of a chunk; the table beside the AUCs says how much a step takes, for bags of several sizes, and what it
takes in one graph.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import data, report
from milkernels import encode_in_chunks
from milkernels.bench import memory
from milkernels.nn import ABMIL

FEATURES = 64
WAYS = ("frozen", "end to end")
SIZES = (1000, 4000, 16000)
_SAME = ("data", "digits", "nines", "train", "test", "epochs", "chunk", "seed", "device")


def encoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, FEATURES),
        nn.ReLU(),
    )


class OfDigits(nn.Module):
    """Gated attention behind the encoder, which is trained or not."""

    def __init__(self, frozen: bool, chunk: int):
        super().__init__()
        self.encoder = encoder().requires_grad_(not frozen)
        self.head = ABMIL(FEATURES, 1, embed_dim=None, hidden_dim=64)
        self.chunk = chunk

    def forward(self, load: Callable[[int, int], Tensor], count: int) -> Tensor:
        """The logit of a bag of ``count`` digits, of which ``load(start, end)`` gives some."""
        features = encode_in_chunks(self.encoder, load, count, self.chunk)
        return self.head(features).logits[0, 0]


class OfOneGraph(OfDigits):
    """The same as it is usually written: activations of all digits wait for the backward."""

    def forward(self, load: Callable[[int, int], Tensor], count: int) -> Tensor:
        return self.head(self.encoder(load(0, count))).logits[0, 0]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model to train (``repeat`` from 0 on), or a step to measure (``digits`` in its bag)."""

    way: str
    repeat: int = -1
    digits: int = 0


def bags_of(digits: data.Digits, count: int, size: int, nines: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """``(which images are in each bag, labels)``; every other bag is positive, by ``nines`` digits."""
    rng = np.random.default_rng(seed)
    labels = digits.labels.numpy()
    ones, others = np.flatnonzero(labels == data.DIGIT), np.flatnonzero(labels != data.DIGIT)
    bags = []
    for i in range(count):
        drawn = others[rng.integers(0, len(others), size)]
        if i % 2 == 0:
            drawn[rng.choice(size, nines, replace=False)] = ones[rng.integers(0, len(ones), nines)]
        bags.append(torch.from_numpy(drawn))
    return bags, torch.tensor([1.0 - i % 2 for i in range(count)])


def loader(digits: data.Digits, bag: Tensor, device: str) -> Callable[[int, int], Tensor]:
    """Reads some images of a bag when they are encoded, as patches would be read from a slide."""
    return lambda start, end: digits.images[bag[start:end]].to(device)


def run(task: Task, args: argparse.Namespace) -> dict:
    return trained(task, args) if task.repeat >= 0 else step_of(task, args)


def trained(task: Task, args: argparse.Namespace) -> dict:
    """The AUC on test bags, and the seconds of a training step."""
    from sklearn.metrics import roc_auc_score

    train, test = data.mnist(args.data, "train"), data.mnist(args.data, "t10k")
    seed = 1000 * (args.seed + task.repeat)
    bags, labels = bags_of(train, args.train, args.digits, args.nines, seed + 1)
    torch.manual_seed(seed)
    model = OfDigits(task.way == "frozen", args.chunk).to(args.device)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    order, seconds = torch.Generator().manual_seed(seed), []
    for _ in range(args.epochs):
        for i in torch.randperm(len(bags), generator=order).tolist():
            start = report.now(train.images)
            logit = model(loader(train, bags[i], args.device), len(bags[i]))
            adam.zero_grad()
            F.binary_cross_entropy_with_logits(logit, labels[i].to(logit.device)).backward()
            adam.step()
            seconds.append(report.now(train.images) - start)
    bags, labels = bags_of(test, args.test, args.digits, args.nines, 1000 * args.seed + 2)
    with torch.no_grad():
        logits = [model(loader(test, bag, args.device), len(bag)).item() for bag in bags]
    return {"auc": float(roc_auc_score(labels, logits)), "seconds": statistics.median(seconds)}


def step_of(task: Task, args: argparse.Namespace) -> dict:
    """How far a step goes beyond the memory that was held before; none on a GPU, whose memory is its own."""
    images = data.Digits(torch.randn(1000, 784), torch.zeros(1000, dtype=torch.int64))
    kind = OfOneGraph if task.way == "one graph" else OfDigits
    model = kind(False, args.chunk).to(args.device)

    def step(count: int) -> None:
        load = loader(images, torch.arange(count) % 1000, args.device)
        model(load, count).square().backward()

    step(args.chunk)
    memory.release()
    with memory.resident_peak() as peak:
        step(task.digits)
    return {"bytes": peak.extra}


def markdown(results: dict) -> str:
    rows, arguments = results["rows"], results["arguments"]
    lines = [["encoder", "AUC on test bags", "seconds of a step, median"]]
    for way in WAYS:
        found = [row for row in rows if row["way"] == way and row["repeat"] >= 0]
        if not found:
            continue  # a page of a run that goes on
        aucs = [row["auc"] for row in found]
        spread = f" ± {statistics.stdev(aucs):.3f}" if len(aucs) > 1 else ""
        seconds = statistics.median(row["seconds"] for row in found)
        lines.append([way, f"{statistics.mean(aucs):.3f}{spread}", f"{seconds:.3f}"])
    sizes = sorted({row["digits"] for row in rows if row["digits"]})
    held = [["digits in the bag", *(f"{size:,}" for size in sizes)]]
    for way in dict.fromkeys(row["way"] for row in rows if row["digits"]):
        by_size = {row["digits"]: row["bytes"] for row in rows if row["way"] == way and row["digits"]}
        cells = ["not measured" if by_size.get(s) is None else f"{by_size[s] / 1e6:,.0f} MB" for s in sizes]
        held.append([way, *cells])
    repeats = arguments["repeats"]
    about = "One repetition." if repeats == 1 else f"Mean ± standard deviation of {repeats} repetitions."
    return f"""# An encoder trained through every instance

Bags of {arguments["digits"]:,} MNIST digits; in positive ones {arguments["nines"]} are a 9, in negative ones none.
{arguments["train"]} training bags, {arguments["epochs"]} epochs, one bag a step; {arguments["test"]} test bags. {about}

{report.table(lines)}

The same encoder is drawn for both; *frozen* it stays so, and attention is trained on its features.

Memory of one step end to end, beyond what the process held before, in chunks of {arguments["chunk"]}:

{report.table(held)}"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.train_encoder", description=__doc__, formatter_class=about)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's four files")
    parser.add_argument("--digits", type=report.at_least(2), default=1000, help="in a bag")
    parser.add_argument("--nines", type=report.at_least(1), default=100, help="in a positive bag")
    parser.add_argument("--train", type=report.at_least(2), default=80, help="training bags")
    parser.add_argument("--test", type=report.at_least(2), default=100, help="test bags")
    parser.add_argument("--epochs", type=report.at_least(1), default=6)
    parser.add_argument("--repeats", type=report.at_least(1), default=3)
    parser.add_argument("--chunk", type=report.at_least(1), default=128, help="digits that are encoded together")
    report.add_options(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.digits, args.nines, args.train, args.test, args.epochs, args.repeats = 200, 20, 10, 10, 1, 1
    if args.nines > args.digits:
        parser.error(f"--nines must be at most --digits, {args.digits}; got {args.nines}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    for part in ("train", "t10k"):
        data.mnist(args.data, part)  # before any work
    tasks = [Task(way, repeat) for repeat in range(args.repeats) for way in WAYS]
    sizes = SIZES[:1] if args.quick else SIZES
    steps = [Task(way, digits=size) for size in sizes for way in ("end to end", "one graph")]
    results = report.Report("train_encoder", markdown, args, argv)
    results.run([*tasks, *steps], partial(run, args=args), args.jobs, _SAME, alone=True)
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
