"""Kernels that `tools.aot` must refuse, and one that it must not; prints what it says of them, as JSON."""

import json
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from milkernels.triton import host
from tools import aot, standin


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def fine(X, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, _twice(tl.load(X + at)))


@triton.jit
def spilling(X, OUT, BLOCK: tl.constexpr):
    """Holds 512 numbers or more in each thread until their maximum is known."""
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(OUT + at, x - tl.max(x, axis=0))


@triton.jit
def greedy(X, OUT, BLOCK: tl.constexpr):
    """Transposes more than fits into shared memory."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(OUT + i * BLOCK + j, tl.trans(tl.load(X + i * BLOCK + j)))


@triton.jit
def wrong(X, OUT, BLOCK: tl.constexpr):
    tl.store(OUT + tl.arange(0, BLOCK), tl.load(X + tl.arange(0, 2 * BLOCK)))


@triton.jit
def forgotten(X, OUT, BLOCK: tl.constexpr):
    tl.store(OUT + tl.arange(0, BLOCK), tl.load(X + tl.arange(0, BLOCK)))


def verdicts(arch: str) -> dict[str, list[str]]:
    most = 1 << 14 if arch.startswith("sm") else 1 << 15  # a warp of AMD has 64 threads, with 512 registers each
    sizes = {fine: (1024, 4), spilling: (most, 1), greedy: (256, 8), wrong: (128, 4)}
    with standin.standin(GPUTarget(*aot.ARCHITECTURES[arch][:3])) as record:
        x = torch.empty(1 << 16, device="cuda")
        for kernel, (block, warps) in sizes.items():
            host.launch(kernel, (1,), x, torch.empty_like(x), BLOCK=block, num_warps=warps)
    found = {launch.name: aot.examine(launch, arch).problems for launch in record.kernels}
    return found | {"never": aot.never_launched(set(found), [sys.modules[__name__]])}


if __name__ == "__main__":
    print(json.dumps({arch: verdicts(arch) for arch in sys.argv[1:]}))
