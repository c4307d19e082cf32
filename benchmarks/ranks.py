"""One bag over several processes: exactness, bytes and time of `all_merge`.

    python -m benchmarks.ranks [--quick]

Gated attention over gloo, with frozen features and float32 parameters; each process has one thread and its share of
the rows.  Groups take turns, and a step of a group takes as long as its slowest rank.  Exactness is that of float64
against one process, for the bag vector, the lse and the gradients of parameters, averaged over ranks as DDP does it;
bytes are those that a rank hands to collectives.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import milkernels
from milkernels.bench import report
from milkernels.bench.process import Emit, Process
from milkernels.nn import AttentionPool

_held: dict[str, object] = {}  # of a rank, between calls
_SECONDS = 600.0
OTHER_ORDER = 0  # one process with the same rows mixed: what rounding does


class Sent(TorchDispatchMode):
    """The bytes that go into collectives."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "all_gather" in str(function) or "all_reduce" in str(function):
            self.bytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


def features(rows: int, dim: int, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows of one bag, the same whoever makes them, in blocks with a seed each."""
    block = 1000
    made = []
    for first in range(start // block * block, end, block):
        g = torch.Generator().manual_seed(first)
        made.append(torch.randn(block, dim, generator=g)[max(0, start - first) : end - first].relu())
    return torch.cat(made).to(dtype) if made else torch.empty(0, dim, dtype=dtype)


def join(
    emit: Emit, rank: int, ranks: int, folder: str, rows: int, dim: int, hidden: int, dtype: str, mixed: bool = False
) -> None:
    """Makes the process a rank of a group with its share of a bag; ``mixed``: in another order."""
    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{ranks}", ranks), rank=rank, world_size=ranks)
    torch.manual_seed(0)
    _held["pool"] = AttentionPool(dim, hidden, group=dist.group.WORLD if ranks > 1 else None, dtype=kind)
    _held["x"] = features(rows, dim, rows * rank // ranks, rows * (rank + 1) // ranks, kind)
    if mixed:
        _held["x"] = _held["x"][torch.randperm(len(_held["x"]))]


def step(emit: Emit) -> None:
    """Forward and backward of this rank's rows; seconds of the slowest."""
    pool, x = _held["pool"], _held["x"]
    dist.barrier()
    start = time.perf_counter()
    pool.zero_grad()
    pooled = pool(x)
    (pooled.bag.square().sum() + pooled.lse.sum()).backward()
    taken = torch.tensor([time.perf_counter() - start])
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    emit({"seconds": taken.item()})


def results(emit: Emit, path: str) -> None:
    """What came of a step, with gradients averaged, into a file; and the bytes that it sent."""
    pool = _held["pool"]
    pool.zero_grad()
    with Sent() as forward:
        pooled = pool(_held["x"])
    loss = pooled.bag.square().sum() + pooled.lse.sum()
    with Sent() as backward:
        loss.backward()
    gradients = []
    for p in pool.parameters():
        dist.all_reduce(p.grad)
        gradients.append(p.grad.flatten() / dist.get_world_size())
    torch.save({"bag": pooled.bag.detach(), "lse": pooled.lse.detach(), "gradients": torch.cat(gradients)}, path)
    emit({"forward": forward.bytes, "backward": backward.bytes})


class Group:
    """Processes that form a group."""

    def __init__(self, ranks: int, folder: str, **bag):
        self.processes = [Process() for _ in range(ranks)]
        self.call("join", [{"rank": r, "ranks": ranks, "folder": folder, **bag} for r in range(ranks)])

    def call(self, function: str, arguments: Sequence[dict] | None = None) -> list[dict]:
        arguments = arguments or [{}] * len(self.processes)
        for process, its in zip(self.processes, arguments, strict=True):
            process.send(f"benchmarks.ranks.{function}", its)
        answers: list[dict] = []
        for process in self.processes:
            process.receive(answers.append, time.monotonic() + _SECONDS)
        return answers

    def end(self) -> None:
        for process in self.processes:
            process.stop()


def exactness(sizes: Sequence[int], rows: int, dim: int, hidden: int) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, OTHER_ORDER, *sizes):
            mixed, ranks_of = ranks == OTHER_ORDER, max(1, ranks)
            where = tempfile.mkdtemp(dir=folder)
            group = Group(ranks_of, where, rows=rows, dim=dim, hidden=hidden, dtype="float64", mixed=mixed)
            paths = [str(Path(where) / f"{r}.pt") for r in range(ranks_of)]
            sent = group.call("results", [{"path": path} for path in paths])
            group.end()
            found[ranks] = [torch.load(path) for path in paths], sent[0]
    (whole,), _ = found[1]
    print(f"One bag of {rows:,} x {dim}, float64, against one process, and bytes that a rank sends in a call:\n")
    print("| processes | bag | lse | gradients | equal on all ranks | forward | backward |\n|" + "---:|" * 7)
    for ranks in (OTHER_ORDER, *sizes):
        answers, sent = found[ranks]
        told = [f"{max(_error(a[key], whole[key]) for a in answers):.1e}" for key in ("bag", "lse", "gradients")]
        equal = all(torch.equal(a[key], answers[0][key]) for a in answers for key in a)
        name = "1, rows in another order" if ranks == OTHER_ORDER else ranks
        print(f"| {name} |", " | ".join(told), f"| {'yes' if equal else 'NO'} |", end=" ")
        print(f"{sent['forward']:,} | {sent['backward']:,} |")
    print(flush=True)


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


def speed(sizes: Sequence[int], rows: int, dim: int, hidden: int, rounds: int) -> None:
    taken: dict[int, list[float]] = {ranks: [] for ranks in (1, *sizes)}
    with tempfile.TemporaryDirectory() as folder:
        groups = {n: Group(n, folder, rows=rows, dim=dim, hidden=hidden, dtype="float32") for n in taken}
        for r in range(rounds + 1):
            for ranks, group in groups.items():
                seconds = max(answer["seconds"] for answer in group.call("step"))
                if r:
                    taken[ranks].append(seconds)
        for group in groups.values():
            group.end()
    cores = torch.get_num_threads()
    print(
        f"A step over one bag of {rows:,} x {dim}, {hidden} hidden units, float32, frozen features, one thread in each"
    )
    print(f"process, {cores} cores, median of {rounds} interleaved rounds:\n")
    print("| processes | seconds | speed-up | share of ideal on these cores |\n|" + "---:|" * 4)
    base = statistics.median(taken[1])
    for ranks, times in taken.items():
        up = base / statistics.median(times)
        print(f"| {ranks} | {statistics.median(times):.3f} | {up:.2f} | {up / min(ranks, cores):.0%} |")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.ranks", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=200_000, help="instances of the bag that is timed")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=("exactness", "time"))
    parser.add_argument("--quick", action="store_true", help="a small bag, to see that it works")
    args = parser.parse_args(argv)
    exact_rows = 20_000
    if args.quick:
        args.rows, args.dim, args.hidden, args.ranks, args.rounds, exact_rows = 3000, 64, 32, [2], 1, 2000
    parts = args.only or ("exactness", "time")
    about = f"{report.title(report.machine())}, milkernels {milkernels.__version__}"
    print(f"{about}; commit {report.commit()}, {date.today()}\n")
    if "exactness" in parts:
        exactness(args.ranks, exact_rows, args.dim, args.hidden)
    if "time" in parts:
        speed(args.ranks, args.rows, args.dim, args.hidden, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
