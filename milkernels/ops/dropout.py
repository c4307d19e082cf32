"""The dropout that is the same on every backend: which units it keeps is a function of the seed and their place."""

import torch
from torch import Tensor

from milkernels.ops.trilinear import blocks, cut

DROP_ACTIVATION, DROP_SIGMOID, DROP_VALUE, DROP_EMBEDDING = range(4)  # branches of the dropout counter
_LOW = 0xFFFFFFFF


def seed_of_part(seed: Tensor | int, first_row: int) -> Tensor | int:
    """The seed for a call on the part of a batch that begins at row ``first_row``: every part drops other units.

    Ops count rows from 0, so parts that share a seed would drop the same units again.  The first part keeps the seed;
    those of others are its hash with their first row, by the mixing function of SplitMix64 (Steele, Lea, Flood 2014).
    So what is dropped depends on where parts begin, and not on who holds them, or on the order in which they come.

    Args:
        seed: as ops take it: an int64 tensor of one element, or an int.
        first_row: of the part, in the whole; at least 0.

    Returns:
        What was given: a tensor on its device, without synchronisation, or an int.

    >>> from milkernels import seed_of_part
    >>> seed_of_part(7, 0), seed_of_part(7, 1) == seed_of_part(7, 2)
    (7, False)
    """
    if isinstance(first_row, bool) or not isinstance(first_row, int):
        raise TypeError(f"first_row must be an int; got {type(first_row).__name__}")
    if not 0 <= first_row < 2**63:
        raise ValueError(f"first_row must be at least 0, and fit into 64 bits; got {first_row}")
    if first_row == 0:
        return seed
    if not isinstance(seed, Tensor):
        return int(seed_of_part(torch.tensor([seed]), first_row))
    z = seed + _signed(first_row * 0x9E3779B97F4A7C15)  # int64 wraps around
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def _signed(bits: int) -> int:
    """The int64 that has these lowest 64 bits."""
    return (bits + 2**63) % 2**64 - 2**63


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def dropout_threshold(p: float) -> int:
    """A unit is dropped when its 16 random bits are below this."""
    return int(p * 65536 + 0.5)


def dropout_scale(p: float) -> float:
    """What kept units are multiplied by, so that the mean stays; 0 where none is kept."""
    threshold = dropout_threshold(p)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def philox_keep(seed: Tensor, rows: int | Tensor, num_units: int, branch: int, p: float) -> Tensor:
    """The units that dropout keeps, bool ``[rows, num_units]``, of so many rows or of those: the same on every backend.

    Philox4x32-10 (Salmon et al. 2011) with key = (low, high half of the seed) and counter = (row low, row
    high, unit >> 3, branch); ``unit & 7`` picks 16 bits of the result, low half of a word first.
    """
    threshold, num_groups = dropout_threshold(p), -(-num_units // 8)
    counted = not isinstance(rows, Tensor) or rows.ndim == 0  # a jit trace counts in tensors
    row = (torch.arange(rows, device=seed.device) if counted else rows)[:, None]
    group = torch.arange(num_groups, device=seed.device)[None]
    parts = []
    for block in blocks(row.shape[0], 16 * num_groups, seed.device):
        words = _philox(seed, (cut(row, block) & _LOW, cut(row, block) >> 32, group, torch.full_like(group, branch)))
        lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
        parts.append(lanes.flatten(1)[:, :num_units] >= threshold)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four random words, 32 bits each in an int64, for each counter of four; they broadcast."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 wraps around; the 64 bits are those of the unsigned product.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _LOW) ^ c1 ^ key0, b & _LOW
        c2, c3 = ((a >> 32) & _LOW) ^ c3 ^ key1, a & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def dropout(h: Tensor, p: float, seed: Tensor | None, branch: int, rows: Tensor | None = None) -> Tensor:
    """``h`` holds all rows, or the ones given."""
    if dropout_threshold(p) == 0:
        return h
    keep = philox_keep(seed, h.shape[0] if rows is None else rows, h.shape[1], branch, p)
    return torch.where(keep, h * dropout_scale(p), 0)
