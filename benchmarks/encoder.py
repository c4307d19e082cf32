"""Training an encoder through all patches of a bag: memory, time and gradients of `encode_in_chunks`.

    python -m benchmarks.encoder [--quick]

The encoder is a ResNet-18 of a quarter of its width with group normalisation, the patches are 64 x 64, the head is
gated attention.  Beside it: one graph of all patches, and `torch.utils.checkpoint` of each chunk.  Memory is how far
resident memory goes beyond what the process held before the step, each in a process of its own; patches are made when
they are asked for.  The head keeps nothing of its hidden units (`milkernels.saved_bytes`): that is not the encoder's.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import milkernels
from milkernels.bench import memory, report
from milkernels.bench.process import Emit, ask

CHUNK, SIDE, WIDTH, GROUPS = 64, 64, 16, 8
FEATURES = 8 * WIDTH
Encode = Callable[[nn.Module, int, int], Tensor]


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.GroupNorm(GROUPS, outside),
            nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.GroupNorm(GROUPS, outside),
        )
        same = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Sequential:
    widths = (WIDTH, WIDTH, 2 * WIDTH, 4 * WIDTH, FEATURES)
    blocks = []
    for i, (inside, outside) in enumerate(itertools.pairwise(widths)):
        blocks += [Block(inside, outside, 1 if i == 0 else 2), Block(outside, outside, 1)]
    stem = [nn.Conv2d(3, WIDTH, 7, 2, 3, bias=False), nn.GroupNorm(GROUPS, WIDTH), nn.ReLU(inplace=True)]
    stem += [nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def patches(start: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same ones for the same rows."""
    made = [torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(i)) for i in range(start, end)]
    return torch.stack(made).to(dtype)


def _in_chunks(encoder: nn.Module, count: int, chunk: int) -> Tensor:
    dtype = next(encoder.parameters()).dtype
    return milkernels.encode_in_chunks(encoder, lambda a, b: patches(a, b, dtype), count, chunk)


def _one_graph(encoder: nn.Module, count: int, chunk: int, call: Callable = lambda f, x: f(x)) -> Tensor:
    dtype = next(encoder.parameters()).dtype
    return torch.cat([call(encoder, patches(a, min(count, a + chunk), dtype)) for a in range(0, count, chunk)])


def _checkpointed(encoder: nn.Module, count: int, chunk: int) -> Tensor:
    return _one_graph(encoder, count, chunk, lambda f, x: checkpoint(f, x, use_reentrant=False))


WAYS: dict[str, Encode] = {"encode_in_chunks": _in_chunks, "checkpoint": _checkpointed, "one graph": _one_graph}


def models(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return resnet18().to(dtype), milkernels.nn.ABMIL(FEATURES, 2, embed_dim=None).to(dtype)


def step(way: str, encoder: nn.Module, head: nn.Module, count: int, chunk: int = CHUNK) -> None:
    logits = head(WAYS[way](encoder, count, chunk)).logits
    F.cross_entropy(logits, torch.ones(1, dtype=torch.int64)).backward()


def peak(emit: Emit, way: str, count: int) -> None:
    """Of one step, after one of a single chunk."""
    milkernels.saved_bytes(0)
    encoder, head = models()
    step(way, encoder, head, CHUNK)
    memory.release()
    start = time.perf_counter()
    with memory.resident_peak() as extra:
        step(way, encoder, head, count)
    emit({"bytes": extra.extra, "seconds": time.perf_counter() - start})


def seconds(counts: int, rounds: int) -> dict[str, float]:
    """The median of each way, which take turns."""
    encoder, head = models()
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for r in range(rounds + 1):
        for way, times in taken.items():
            start = time.perf_counter()
            step(way, encoder, head, counts)
            if r:
                times.append(time.perf_counter() - start)
    return {way: statistics.median(times) for way, times in taken.items()}


def errors(count: int) -> dict[str, float]:
    """Of all gradients against one graph of the same chunks, relative, in the 2-norm."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        gradients = []
        for way in ("encode_in_chunks", "one graph"):
            encoder, head = models(dtype)
            step(way, encoder, head, count)
            gradients.append(torch.cat([p.grad.flatten().double() for m in (encoder, head) for p in m.parameters()]))
        ours, exact = gradients
        found[str(dtype).removeprefix("torch.")] = ((ours - exact).norm() / exact.norm()).item()
    return found


def _cell(answer: list[dict] | str) -> str:
    if isinstance(answer, str):
        return answer
    (row,) = answer
    return "not measured" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.0f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.encoder", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[250, 1000, 4000], help="patches, for memory")
    parser.add_argument("--graph", type=int, default=1000, help="the most patches for one graph and for checkpoint")
    parser.add_argument("--timed", type=int, default=512, help="patches, for time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("memory", "time", "gradients"))
    parser.add_argument("--quick", action="store_true", help="a few patches, to see that it works")
    args = parser.parse_args(argv)
    if args.quick:
        args.counts, args.graph, args.timed, args.rounds = [64, 128], 64, 32, 1
    parts = args.only or ("gradients", "memory", "time")
    print(f"{report.title(report.machine())}; commit {report.commit()}, {date.today()}\n")
    if "gradients" in parts:
        told = ", ".join(f"{dtype} {error:.1e}" for dtype, error in errors(3 * CHUNK).items())
        print(f"Gradients against one graph of the same chunks: {told}\n", flush=True)
    if "memory" in parts:
        print(f"Memory of a step beyond what was held before, chunks of {CHUNK}:\n")
        print("| patches |", " | ".join(WAYS), "| features and their gradient |\n|" + "---:|" * (len(WAYS) + 2))
        for count in args.counts:
            ways = [way for way in WAYS if way == "encode_in_chunks" or count <= args.graph]
            cells = {way: _cell(ask("benchmarks.encoder.peak", {"way": way, "count": count}, 3600)) for way in ways}
            told = " | ".join(cells.get(way, "not measured") for way in WAYS)
            print(f"| {count:,} | {told} | {2 * 4 * count * FEATURES / 1e6:.1f} MB |", flush=True)
        print()
    if "time" in parts:
        taken = seconds(args.timed, args.rounds)
        base = taken["encode_in_chunks"]
        told = ", ".join(f"{way} {value:.2f} s ({value / base:.2f}x)" for way, value in taken.items())
        print(f"A step of {args.timed} patches, median of {args.rounds} interleaved rounds: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
