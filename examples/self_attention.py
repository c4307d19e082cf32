"""Self-attention before attention pooling: SA-AbMILP and its kernels (Rymarczyk et al. 2021), and what they cost.

Instances attend to each other inside their bag, by `milkernels.nn.SelfAttention`, and are then pooled as in `ABMIL`.
Every instance is compared with every other, so time grows with the square of the bag; memory does not:

    python -m examples.self_attention            # measures both beside attention pooling alone
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch
from rich.progress import track
from torch import Tensor, nn

from examples import report
from milkernels import Bags
from milkernels.bench import memory
from milkernels.nn import ABMIL, Prediction, SelfAttention

ALONE = "attention pooling alone"
NAMES = {"dot": "SA", "gaussian": "GSA", "inverse_quadratic": "IQSA", "laplace": "LSA"}  # the paper's


class SelfAttentionABMIL(nn.Module):
    """An embedding, `SelfAttention`, attention pooling and a classifier.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        embed_dim, hidden_dim, dropout: as in `ABMIL`.
        kernel: of the self-attention.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int = 1,
        embed_dim: int | Sequence[int] | None = (256, 128, 64),
        hidden_dim: int = 64,
        dropout: float = 0.0,
        kernel: str = "dot",
    ):
        super().__init__()
        self.abmil = ABMIL(in_dim, num_classes, embed_dim, hidden_dim, gated=False, dropout=dropout)
        self.abmil.attention.dropout = 0.0
        self.compare = SelfAttention(self.abmil.attention.in_dim, kernel)

    def forward(self, x: Tensor | Bags, offsets: Tensor | None = None) -> Prediction:
        bags = x if isinstance(x, Bags) else Bags(x, offsets)
        pooled = self.abmil.attention(self.compare(self.abmil.embed(bags.values), bags.offsets, bags.mask))
        return Prediction(self.abmil.classifier(pooled.bag.flatten(1)), pooled)


def _step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).logits.sum().backward()


def _seconds(model: nn.Module, x: Tensor) -> float:
    start = report.now(x)
    _step(model, x)
    return report.now(x) - start


def measure(lengths: Sequence[int], width: int, rounds: int, device: str) -> list[dict]:
    """Training steps of one bag, interleaved: seconds, medians, and bytes beyond what was held before, once each."""
    models = {kernel: SelfAttentionABMIL(width, 1, None, kernel=kernel) for kernel in NAMES}
    for model in models.values():
        nn.init.ones_(model.compare.gamma)
    models[ALONE] = ABMIL(width, 1, None, 64, gated=False)
    models = {name: model.to(device) for name, model in models.items()}
    rows = []
    for n in track(lengths, "self_attention"):
        x, seconds = torch.randn(n, width, device=device), {name: [] for name in models}
        extra: dict[str, int | None] = {}
        for name, model in models.items():
            _step(model, x[:10])
            memory.release()
            with memory.resident_peak() as peak:
                _step(model, x)  # which warms up too
            extra[name] = peak.extra
        for _ in range(rounds):
            for name, model in models.items():
                seconds[name].append(_seconds(model, x))
        rows += [
            {"instances": n, "model": name, "seconds": statistics.median(taken), "bytes": extra[name]}
            for name, taken in seconds.items()
        ]
    return rows


def markdown(results: dict) -> str:
    rows, (width, rounds) = results["rows"], (results["arguments"][key] for key in ("width", "rounds"))
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [("instances", *(f"{NAMES[m]}, {m}" if m in NAMES else m for m in models))]
    for n in dict.fromkeys(row["instances"] for row in rows):
        found = {row["model"]: row for row in rows if row["instances"] == n}
        lines.append((f"{n:,}", *(_cell(found[model]) for model in models)))
    return f"""# What self-attention costs

A training step of one bag, {width} features, float32: the median of {rounds}, and memory beyond what was held before,
gradients included.

{report.table(lines)}
"""


def _cell(row: dict) -> str:
    extra = "not measured" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.0f} MB"
    return f"{1e3 * row['seconds']:,.1f} ms, {extra}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.self_attention", description=__doc__.split("\n")[0])
    parser.add_argument("--instances", type=report.at_least(1), nargs="+", default=[1000, 4000, 20000])
    parser.add_argument("--width", type=report.at_least(1), default=512, help="features of an instance")
    parser.add_argument("--rounds", type=report.at_least(1), default=3)
    report.add_options(parser)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.quick:
        args.instances, args.width, args.rounds = [200, 800], 32, 5
    torch.manual_seed(args.seed)
    results = report.Report("self_attention", markdown, args, argv)
    results.save(measure(args.instances, args.width, args.rounds, args.device))
    results.show()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
