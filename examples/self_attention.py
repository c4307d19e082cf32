"""Self-attention before attention pooling: SA-AbMILP (Rymarczyk et al. 2021), and what it costs.

Instances attend to each other inside their bag, by PyTorch's own attention, and are then pooled as in `ABMIL`.  Every
instance is compared with every other, so time and memory grow with the square of the bag:

    python -m examples.self_attention            # measures it beside attention pooling alone
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from examples import report
from milkernels import Bags
from milkernels.nn import ABMIL, Prediction


class SelfAttentionABMIL(nn.Module):
    """``h_i + gamma sum_j softmax_j(q(h_i) . k(h_j)) v(h_j)`` inside each bag, then attention pooling.

    ``gamma`` begins at 0, as in self-attention GANs, so training begins with `ABMIL`.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        embed_dim, hidden_dim, dropout: as in `ABMIL`.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int = 1,
        embed_dim: int | Sequence[int] | None = (256, 128, 64),
        hidden_dim: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.abmil = ABMIL(in_dim, num_classes, embed_dim, hidden_dim, gated=False, dropout=dropout)
        self.abmil.attention.dropout = 0.0
        width = self.abmil.attention.in_dim
        self.query, self.key = (nn.Linear(width, max(1, width // 8)) for _ in range(2))
        self.value = nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor | Bags, offsets: Tensor | None = None) -> Prediction:
        bags = x if isinstance(x, Bags) else Bags(x, offsets)
        if bags.mask is not None:
            raise ValueError("instances that are masked would be attended to; bags must come without a mask")
        h = self.abmil.embed(bags.values)
        q, k, v = self.query(h), self.key(h), self.value(h)
        lengths = bags.lengths.tolist()
        attended = [
            F.scaled_dot_product_attention(*(t[None, None] for t in one), scale=1.0)[0, 0]
            for one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
            if len(one[0])
        ]
        h = h + self.gamma * torch.cat([v[:0], *attended])
        pooled = self.abmil.attention(h, bags.offsets)
        return Prediction(self.abmil.classifier(pooled.bag.flatten(1)), pooled)


def _step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).logits.sum().backward()


def measure(lengths: Sequence[int], width: int, rounds: int, device: str) -> list[dict]:
    """Medians of interleaved training steps of one bag: seconds, with self-attention and without."""
    models = {"self-attention": SelfAttentionABMIL(width, 1, None), "attention": ABMIL(width, 1, None, 64, gated=False)}
    nn.init.ones_(models["self-attention"].gamma)
    models = {name: model.to(device) for name, model in models.items()}
    rows = []
    for n in track(lengths, "self_attention"):
        x, seconds = torch.randn(n, width, device=device), {name: [] for name in models}
        for i in range(rounds + 1):  # the first one warms up
            for name, model in models.items():
                start = report.now(x)
                _step(model, x)
                if i:
                    seconds[name].append(report.now(x) - start)
        rows.append({"instances": n} | {name: statistics.median(taken) for name, taken in seconds.items()})
    return rows


def markdown(results: dict) -> str:
    lines = [("instances", "self-attention, ms", "attention pooling alone, ms", "ratio")]
    for row in results["rows"]:
        taken, alone = row["self-attention"], row["attention"]
        lines.append((f"{row['instances']:,}", f"{1e3 * taken:,.1f}", f"{1e3 * alone:,.2f}", f"{taken / alone:,.0f}"))
    width = results["arguments"]["width"]
    text = f"# What self-attention costs\n\nA training step of one bag, {width} features, float32; medians.\n\n"
    return text + report.table(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.self_attention", description=__doc__.split("\n")[0])
    parser.add_argument("--instances", type=report.at_least(1), nargs="+", default=[1000, 2000, 4000, 8000, 16000])
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
