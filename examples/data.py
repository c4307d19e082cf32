"""Bags of public data sets, and of simulated slides.

The classic sets are public: MUSK at the UCI repository (``clean1.data``, ``clean2.data``), Fox, Tiger and Elephant
(Andrews, Tsochantaridis, Hofmann 2002) as ``.svm`` files beside several MIL codes.  MNIST's four files
(``train-images-idx3-ubyte.gz``...) are those of LeCun and Cortes.  Nothing is downloaded here.
"""

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from milkernels import Bags

CLASSIC = ("musk1", "musk2", "fox", "tiger", "elephant")
_NAMES = {"musk1": ("musk1", "clean1", "musk1norm"), "musk2": ("musk2", "clean2", "musk2norm")}
DIGIT = 9  # a bag of digits is positive if it holds one


class Labelled(NamedTuple):
    bags: Bags
    labels: Tensor  # int64 [B], 0 or 1

    def take(self, indices: Sequence[int]) -> "Labelled":
        return Labelled(self.bags[list(indices)], self.labels[list(indices)])

    def to(self, device: str) -> "Labelled":
        return Labelled(self.bags.to(device), self.labels.to(device))


# The classic sets


def classic(folder: Path, name: str) -> Labelled:
    """One of `CLASSIC`: ``<name>.npz``, UCI's ``clean1.data`` or an ``.svm`` file, whichever lies in the folder."""
    for stem in _NAMES.get(name, (name,)):
        for suffix, read in _READERS.items():
            path = folder / f"{stem}{suffix}"
            if path.is_file():
                return read(path)
    tried = ", ".join(f"{stem}{suffix}" for stem in _NAMES.get(name, (name,)) for suffix in _READERS)
    raise FileNotFoundError(f"no bags of {name} in {folder}: looked for {tried}")


def _read_npz(path: Path) -> Labelled:
    """``features [N, L]``, ``offsets [B + 1]``, ``labels [B]``."""
    with np.load(path, allow_pickle=False) as data:
        missing = {"features", "offsets", "labels"} - set(data.files)
        if missing:
            raise ValueError(f"{path.name} must hold features, offsets and labels; {sorted(missing)} are missing")
        x, offsets, labels = (torch.from_numpy(data[key]) for key in ("features", "offsets", "labels"))
    return Labelled(Bags(x.float(), offsets), (labels > 0).long())


def _read_uci(path: Path) -> Labelled:
    """A conformation of a molecule per line: molecule, conformation, features, label."""
    rows = [line.rstrip(".").split(",") for line in path.read_text().split()]
    return _grouped(
        (row[0] for row in rows), [[float(v) for v in row[2:-1]] for row in rows], (float(row[-1]) for row in rows)
    )


def _read_svm(path: Path) -> Labelled:
    """An instance per line: ``instance:bag:label feature:value ...``, features from 1 on."""
    names, labels, features = [], [], []
    for line in path.read_text().splitlines():
        first, *pairs = line.split() or [""]
        if first.count(":") != 2:
            continue  # a header
        _, bag, label = first.split(":")
        names.append(bag)
        labels.append(float(label))
        features.append({int(i): float(v) for i, v in (pair.split(":") for pair in pairs)})
    width = max((max(row, default=0) for row in features), default=0)
    return _grouped(names, [[row.get(i, 0.0) for i in range(1, width + 1)] for row in features], labels)


_READERS = {".npz": _read_npz, ".data": _read_uci, ".svm": _read_svm}


def _grouped(names: Iterable[str], features: list[list[float]], labels: Iterable[float]) -> Labelled:
    """Bags of the instances with the same name, in the order in which names come; positive if an instance is."""
    bags: dict[str, tuple[list[list[float]], list[float]]] = {}
    for name, row, label in zip(names, features, labels, strict=True):
        rows, of_bag = bags.setdefault(name, ([], []))
        rows.append(row)
        of_bag.append(label)
    made = Bags.from_list([torch.tensor(rows) for rows, _ in bags.values()])
    return Labelled(made, torch.tensor([int(max(of_bag) > 0) for _, of_bag in bags.values()]))


def standardised(train: Bags, *others: Bags) -> list[Bags]:
    """Each feature with mean 0 and deviation 1 over the instances of ``train``; what is constant there but for rounding
    is 0, or dividing would make noise of it."""
    deviation, mean = torch.std_mean(train.values, dim=0, correction=0)
    constant = deviation <= 1e-4 * deviation.max()
    scale = torch.where(constant, 0.0, 1 / deviation.masked_fill(constant, 1.0))
    return [Bags((bags.values - mean) * scale, bags.offsets) for bags in (train, *others)]


# MNIST-bags


class Digits(NamedTuple):
    images: Tensor  # float32 [n, 784], normalised as usual
    labels: Tensor  # int64 [n]


def mnist(folder: Path, part: str) -> Digits:
    """``part`` is "train" or "t10k"; files as published, packed or not."""
    images, labels = _idx(folder, f"{part}-images-idx3-ubyte"), _idx(folder, f"{part}-labels-idx1-ubyte")
    return Digits((images.flatten(1).float() / 255 - 0.1307) / 0.3081, labels.long())


def _idx(folder: Path, name: str) -> Tensor:
    for path, read in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            with read(path, "rb") as file:
                content = file.read()
            break
    else:
        raise FileNotFoundError(f"no MNIST in {folder}: looked for {name} and {name}.gz")
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} must begin as a file of unsigned bytes does; got {content[:4]!r}")
    dims = np.frombuffer(content, ">u4", content[3], 4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(dims).copy())


class DigitBags(NamedTuple):
    """Which images are in which bag."""

    indices: Tensor  # int64 [N]
    lengths: list[int]
    labels: Tensor  # int64 [B], alternating


def digit_bags(digits: Digits, count: int, mean: float, deviation: float, seed: int) -> DigitBags:
    """MNIST-bags (Ilse et al. 2018), balanced as by their ``mnist_bags_loader.py``: lengths are normal, every other bag
    holds a 9, the others none."""
    rng = np.random.default_rng(seed)
    labels = digits.labels.numpy()
    others = np.flatnonzero(labels != DIGIT)
    lengths = np.maximum(1, rng.normal(mean, deviation, count).astype(int)).tolist()
    parts = []
    for i, length in enumerate(lengths):
        drawn = others[rng.integers(0, len(others), length)]
        while i % 2 == 0 and not (labels[drawn] == DIGIT).any():
            drawn = rng.integers(0, len(labels), length)
        parts.append(drawn)
    return DigitBags(torch.from_numpy(np.concatenate(parts)), lengths, torch.tensor([1 - i % 2 for i in range(count)]))


def pictures(digits: Digits, made: DigitBags) -> Labelled:
    """The images themselves, with their digits among the extras."""
    bags = Bags.from_list(list(digits.images[made.indices].split(made.lengths)))
    return Labelled(Bags(bags.values, bags.offsets, extras={"digits": digits.labels[made.indices]}), made.labels)
