"""A simulated slide of 100,000 patches: train on whole slides, then ask which patches decided.

    python -m examples.slide_bag

A slide is a disc of tissue on a grid of patches, each with features as of a frozen encoder (ReLU, float16 as they are
stored).  Positive slides hold a few round lesions, whose patches differ in some of the features; all slides hold harmless
spots that differ in others.  A gated attention model is trained on whole slides, several in a call, and asked about a
slide of ``--patches`` patches that it has not seen.  ``slide_bag.png`` has the lesions, and the attention as a heat map.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PATCH = 256  # pixels
_MARKERS = 24  # features in which lesions, or harmless spots, differ


class Slide(NamedTuple):
    features: Tensor  # float16 [n, L]
    coords: Tensor  # int64 [n, 2], x and y in pixels
    lesion: Tensor  # bool [n]
    label: int


def simulate(patches: int, width: int, label: int, seed: int) -> Slide:
    """A slide of about this many patches, of tissue that covers 2 % (a lesion, if positive) and 10 % (harmless)."""
    generator = torch.Generator().manual_seed(seed)
    side = int((patches / 0.785) ** 0.5) + 1
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    place = (grid + 0.5) / side * 2 - 1
    inside = place.square().sum(1) <= 1
    grid, place = grid[inside], place[inside]
    lesion = _spots(place, 0.02, 3, generator) if label else torch.zeros(len(grid), dtype=torch.bool)
    harmless = _spots(place, 0.10, 8, generator) & ~lesion
    encoder = torch.Generator().manual_seed(0)  # the same for all slides
    mean = 0.3 * torch.randn(width, generator=encoder)
    markers = torch.randperm(width, generator=encoder)[: 2 * _MARKERS].view(2, _MARKERS)
    x = mean + torch.randn(len(grid), width, generator=generator)
    for spot, where in ((lesion, markers[0]), (harmless, markers[1])):
        x[:, where] += 1.2 * spot[:, None]
    return Slide(F.relu(x).half(), grid * PATCH, lesion, label)


def _spots(place: Tensor, share: float, count: int, generator: torch.Generator) -> Tensor:
    """Which places lie in one of ``count`` discs, which together cover about this share of the tissue."""
    radius = (share / count) ** 0.5
    angle = 6.2832 * torch.rand(count, generator=generator)
    centre = 0.8 * torch.rand(count, 1, generator=generator).sqrt() * torch.stack([angle.cos(), angle.sin()], 1)
    return (torch.cdist(place, centre) <= radius).any(1)
