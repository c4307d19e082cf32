"""Training on ragged mini-batches by CUDA graphs: each step is one launch, however many kernels it has.

    python -m examples.cuda_graphs               # measures it beside the same steps without padding and graphs

A step on some small bags keeps the host busy for longer than the GPU.  A CUDA graph replays all of its launches at
once, but only on tensors of the same shapes in the same places.  So a mini-batch is copied into tensors that stay where
they are, those of its `bucket`: rows behind its own are masked, bags behind its own are empty and weigh nothing.  Each
bucket has a graph of its own, which is captured when a mini-batch first needs it; there are some ten of them, whatever
the bags are.  Losses and gradients are those of the mini-batch alone.

Without a CUDA device the same steps, on the same padded tensors, run one operation at a time.
"""

import argparse
import contextlib
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from examples import report
from milkernels import Bags
from milkernels.nn import ABMIL

_WARM_UP = 3  # steps before a capture: in them kernels are compiled, and libraries make their workspaces


def bucket(rows: int, least: int = 256) -> int:
    """The first of 256, 384, 512, 768, 1024, ... that holds so many rows: at most a third of them are padding."""
    while least < rows:
        least = least * 4 // 3 if least % 3 == 0 else least * 3 // 2
    return least


class Step:
    """A training step of a model on ``rows`` rows in ``bags`` bags, which stay in their places.

    Args:
        model: of bags, with one logit; called with rows ``[rows, in_dim]``, offsets ``[bags + 1]`` and a mask.
        optimizer: of its parameters; ``capturable`` where the step is to be captured.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rows: int, bags: int):
        self.model, self.optimizer, self.graph = model, optimizer, None
        like = next(model.parameters())
        self.x, self.mask = like.new_zeros(rows, model.in_dim), like.new_zeros(rows, dtype=torch.bool)
        self.offsets = like.new_zeros(bags + 1, dtype=torch.int64)
        self.labels, self.weights = like.new_zeros(2, bags)

    def fill(self, x: Tensor, lengths: Sequence[int], labels: Tensor) -> None:
        """Takes a mini-batch: rows ``[n, in_dim]``, at most as many as there are, the bags' lengths and labels."""
        n, count, (rows, bags) = len(x), len(lengths), (len(self.x), len(self.labels))
        self.x[:n].copy_(x)  # what an earlier mini-batch left behind it is masked
        self.mask[:n], self.mask[n:] = True, False
        ends = [*itertools.accumulate(lengths), *[n] * (bags - count)]
        self.offsets.copy_(torch.tensor([0, *ends[:-1], rows]))  # the last bag has the masked rows
        self.labels[:count].copy_(labels)
        self.weights[:count], self.weights[count:] = 1 / count, 0.0

    def run(self) -> Tensor:
        """The mean loss over the bags, after which parameters have moved."""
        self.optimizer.zero_grad(set_to_none=True)  # so that the gradients lie in the graph's memory
        logits = self.model(self.x, self.offsets, self.mask).logits[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, self.labels, self.weights, reduction="sum")
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def capture(self, pool) -> None:
        """Forward, backward and the optimizer's step, as a graph in the memory that all graphs share: they never run
        at the same time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _undone(self.model, self.optimizer):
            for _ in range(_WARM_UP):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.loss = self.run()

    def __call__(self) -> Tensor:
        """The loss; of a graph it is overwritten by the next call."""
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.loss


@contextlib.contextmanager
def _undone(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The block leaves parameters and the optimizer's state as they were; what that did not have yet becomes 0, with
    which Adam begins."""
    parameters = [(p, p.detach().clone()) for p in model.parameters()]
    states = {t: t.clone() for t in _state(optimizer)}
    yield
    with torch.no_grad():
        for t, before in parameters:
            t.copy_(before)
        for t in _state(optimizer):
            t.copy_(states[t]) if t in states else t.zero_()


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


class Trainer:
    """Steps on mini-batches of at most ``bags`` bags, each in its bucket: by graphs on a CUDA device."""

    def __init__(self, model: nn.Module, bags: int, lr: float = 1e-3):
        self.model, self.bags, self.graphs = model, bags, next(model.parameters()).is_cuda
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, capturable=self.graphs)
        self.steps: dict[int, Step] = {}  # by bucket
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None

    def __call__(self, x: Tensor, lengths: Sequence[int], labels: Tensor) -> Tensor:
        rows = bucket(len(x))
        known = rows in self.steps
        if not known:
            self.steps[rows] = Step(self.model, self.optimizer, rows, self.bags)
        step = self.steps[rows]
        step.fill(x, lengths, labels)
        if self.graphs and not known:
            step.capture(self.pool)
        return step()


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, lengths: Sequence[int], labels: Tensor):
    """The same step on the mini-batch as it is."""
    optimizer.zero_grad(set_to_none=True)
    bags = Bags.from_list(list(x.split(list(lengths))))
    loss = F.binary_cross_entropy_with_logits(model(bags).logits[:, 0], labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def batches(count: int, bags: int, longest: int, width: int, seed: int, device: str):
    """``(rows [n, width], lengths, labels [bags])``: bags of 5 to ``longest`` rows, positive ones of larger numbers."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        size = bags if i < count - 1 else max(1, bags // 2)  # an epoch ends with what is left
        lengths = torch.randint(5, longest + 1, (size,), generator=generator)
        labels = torch.randint(2, (size,), generator=generator).float()
        x = torch.randn(int(lengths.sum()), width, generator=generator).relu()
        x += 0.2 * labels.repeat_interleave(lengths)[:, None]
        yield x.to(device), lengths.tolist(), labels.to(device)


def measure(args: argparse.Namespace) -> list[dict]:
    """The same steps in both ways, from the same parameters: seconds of one, and the losses."""
    model = ABMIL(args.width, 1, None, 128).to(args.device)
    alone = deepcopy(model)
    trainer, adam = Trainer(model, args.bags), torch.optim.Adam(alone.parameters(), lr=1e-3)
    padded = "graphs" if trainer.graphs else "padded, no graphs: there is no CUDA device"
    ways = {"as they are": lambda *batch: plain_step(alone, adam, *batch), padded: trainer}
    rows = []
    for way, step in ways.items():
        losses, seconds = [], []
        for epoch in track(range(args.epochs + 1), way):  # the first one warms up, and captures
            made = batches(args.batches, args.bags, args.longest, args.width, args.seed, args.device)
            for batch in made:
                start = report.now(batch[0])
                loss = step(*batch)
                taken = report.now(batch[0]) - start
                losses.append(loss.item())
                seconds += [taken] if epoch else []
        row = {"way": way, "seconds": statistics.median(seconds), "first": losses[0], "last": losses[-1]}
        rows.append(row | {"buckets": len(trainer.steps) if step is trainer else None})
    return rows


def markdown(results: dict) -> str:
    lines = [("mini-batches", "ms a step", "first loss", "last loss", "buckets")]
    for row in results["rows"]:
        losses = (f"{row['first']:.4f}", f"{row['last']:.4f}")
        lines.append((row["way"], f"{1e3 * row['seconds']:.3f}", *losses, row["buckets"] or ""))
    about = results["arguments"]
    text = f"{about['bags']} bags of 5 to {about['longest']} instances of {about['width']} numbers, float32; medians."
    return f"# Steps by CUDA graphs\n\n{text}\n\n{report.table(lines)}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.cuda_graphs", description=__doc__.split("\n")[0])
    parser.add_argument("--bags", type=report.at_least(1), default=64, help="of a mini-batch")
    parser.add_argument("--longest", type=report.at_least(5), default=50, help="instances of a bag at most")
    parser.add_argument("--width", type=report.at_least(1), default=512, help="features of an instance")
    parser.add_argument("--batches", type=report.at_least(1), default=50, help="mini-batches of an epoch")
    parser.add_argument("--epochs", type=report.at_least(1), default=3)
    report.add_options(parser)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.quick:
        args.bags, args.width, args.batches, args.epochs = 16, 32, 16, 4
    torch.manual_seed(args.seed)
    results = report.Report("cuda_graphs", markdown, args, argv)
    results.save(measure(args))
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
