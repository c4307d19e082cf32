"""The dropout mask apart from every backend: published known answers and a slow second version."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Random123's known answers for philox4x32-10: (counter, key, result), low word first.
PHILOX_VECTORS = (
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words; written for reading, not for speed."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    mask = 0xFFFFFFFF
    for _ in range(10):
        # The low 64 bits of a product are right although int64 wraps; the mask undoes the sign of the shift.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & mask) ^ c1 ^ k0, b & mask, ((a >> 32) & mask) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def dropout_keep(seed: int, rows: int, units: int, branch: int, p: float) -> Tensor:
    """The mask ``[rows, units]`` of hidden units that every backend keeps (bool)."""
    row = torch.arange(rows).view(-1, 1)
    group = torch.arange((units + 7) // 8).view(1, -1)
    zero = torch.zeros_like(row + group)
    words = philox4x32(
        [(row & 0xFFFFFFFF) + zero, (row >> 32) + zero, group + zero, zero + branch],
        (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF),
    )
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (lanes >= round(p * 65536)).flatten(1)[:, :units]


def keep_scale(p: float) -> float:
    """What kept units are multiplied by."""
    return 65536 / (65536 - round(p * 65536))
