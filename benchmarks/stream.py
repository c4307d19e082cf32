"""A bag that is larger than memory: ``python -m benchmarks.stream``.

Three figures, each of a process of its own.  The *peak* of a training step on a file of ``--gigabytes`` of float16
features, under a limit of ``--limit`` GB of address space beyond what PyTorch and the model have.  The *time* of a step
on a file beside the same bag in memory, at a size that fits, in turns: medians and their ratio.  And the share of its
time that the step spends waiting for the file.  Before them, on the file of the second figure, all gradients are
compared with those of the bag in memory.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from milkernels import nn as models
from milkernels.bench.memory import resident_peak
from milkernels.streaming import StreamedBag

GB = 1 << 30
WIDTH = 1024
MODELS = {
    "gated": lambda: models.ABMIL(WIDTH, 2, embed_dim=None, hidden_dim=256),
    "clam": lambda: models.ABMIL(WIDTH, 2, embed_dim=512, hidden_dim=256),
    "dsmil": lambda: models.DSMILModel(WIDTH, 2, nonlinear_query=False, value="linear", scale=1.0),
    "loss-attention": lambda: models.LossAttentionModel(WIDTH, 2, ()),
}


def write(path: Path, rows: int) -> None:
    """Features with a mean, as stored ones have, block by block."""
    import numpy as np

    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (rows, WIDTH)})
        block = torch.randn(16384, WIDTH, generator=torch.Generator().manual_seed(0)).add_(0.5).relu_().half()
        for start in range(0, rows, len(block)):
            some = block[: rows - start].roll(start // len(block) % WIDTH, 1)  # no two blocks alike
            file.write(some.contiguous().numpy().data)


def step(model: nn.Module, x: Tensor | StreamedBag) -> None:
    model.zero_grad(set_to_none=True)
    out = model(x)
    nn.functional.cross_entropy(out.logits, torch.ones(1, dtype=torch.int64)).backward()


def dropped(path: Path) -> None:
    """The file leaves the page cache, where the system allows it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Each of these runs in a process of its own


def peak(path: Path, args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    model = MODELS[args.model]()
    step(model, torch.randn(1024, WIDTH).half())  # libraries, threads
    stream = StreamedBag(path, rows=args.rows)
    dropped(path)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + int(args.limit * GB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with resident_peak() as found:
        start = time.perf_counter()
        step(model, stream)
        seconds = time.perf_counter() - start
    size = path.stat().st_size
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    return {
        "file_gb": size / GB,
        "limit_gb": args.limit,
        "peak_mb": found.extra / 2**20,
        "seconds": seconds,
        "waited_share": stream.waited / seconds,
        "reads": stream.reads,
        "gb_per_second": size * stream.reads / seconds / GB,
    }


def duel(path: Path, args: argparse.Namespace) -> dict:
    import numpy as np

    torch.manual_seed(0)
    model = MODELS[args.model]()
    x = torch.from_numpy(np.load(path))
    contenders = {"memory": lambda: x, "stream": lambda: StreamedBag(path, rows=args.rows)}
    gradients = {}
    for name, bag in contenders.items():  # a warm-up, and the check
        step(model, bag())
        gradients[name] = [p.grad for p in model.parameters() if p.grad is not None]
    stream, memory = (torch.cat([g.flatten() for g in gradients[name]]) for name in ("stream", "memory"))
    error = (stream - memory).norm() / memory.norm()
    times, waited = {name: [] for name in contenders}, []
    for _ in range(args.rounds):
        for name, bag in contenders.items():
            bag = bag()
            start = time.perf_counter()
            step(model, bag)
            times[name].append(time.perf_counter() - start)
            if name == "stream":
                waited.append(bag.waited / times[name][-1])
    memory, stream = (statistics.median(times[name]) for name in contenders)
    return {
        "instances": len(x),
        "memory_seconds": memory,
        "stream_seconds": stream,
        "ratio": stream / memory,
        "waited_share": statistics.median(waited),
        "gradient_error": float(error),
    }


def _in_process(what: str, path: Path, argv: list[str]) -> dict:
    command = [sys.executable, "-m", "benchmarks.stream", "--only", what, "--file", str(path), *argv]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="gated")
    parser.add_argument("--rows", type=int, default=32768, help="of a piece")
    parser.add_argument("--gigabytes", type=float, default=8, help="of features in the large file; 0: none")
    parser.add_argument("--limit", type=float, default=2, help="GB of address space beyond PyTorch's")
    parser.add_argument("--fits", type=int, default=200_000, help="instances of the bag that fits; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where files are written; the system's for temporary ones")
    parser.add_argument("--only", choices=("peak", "duel"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only:
        print(json.dumps({"peak": peak, "duel": duel}[args.only](args.file, args)))
        return
    print(f"{args.model}, float16 features, {WIDTH} each; PyTorch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for what, rows in (("duel", args.fits), ("peak", int(args.gigabytes * GB / WIDTH / 2))):
            if rows:
                path = Path(folder) / f"{what}.npy"
                write(path, rows)
                found = _in_process(what, path, argv)
                print(what + ":", ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
                path.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
