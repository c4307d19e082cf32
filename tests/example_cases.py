"""Bags for the tests of the examples, and the examples themselves, which are not installed."""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples import data  # noqa: E402
from milkernels import Bags  # noqa: E402

WIDTH = 12


def toy(count=60, width=WIDTH, seed=0):
    """Bags of 1 to 9; in positive ones half of the instances, or the only one, differ in three features."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=rng).tolist()
    labels = torch.arange(count) % 2
    bags = [torch.randn(n, width, generator=rng) for n in lengths]
    for bag, label in zip(bags, labels.tolist(), strict=True):
        bag[: (len(bag) + 1) // 2, :3] += 3 * label
    return data.Labelled(Bags.from_list(bags), labels)


def write_npz(path, bags, labels):
    np.savez(path, features=bags.values.numpy(), offsets=bags.offsets.numpy(), labels=labels.numpy())
