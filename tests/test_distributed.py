"""Bags spread over ranks: what they pool together is what one process pools, and what DDP makes of the gradients too."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run
from torch import nn

import milkernels as mk

pytestmark = needs_gloo
LENGTHS = (70, 0, 1, 35)  # of the whole bags
L, C, D = 12, 3, 6
LARGE = 1e4


def counts(ranks: int) -> torch.Tensor:
    """``[B, W]``: uneven shares; rank 1 has nothing of bag 0, and of all bags only the last rank has the last one."""
    weights = torch.arange(1.0, ranks + 1).expand(len(LENGTHS), ranks).clone()
    if ranks > 1:
        weights[0, 1] = 0
        weights[-1, :-1] = 0
    shares = (weights / weights.sum(1, keepdim=True) * torch.tensor(LENGTHS)[:, None]).long()
    shares[:, -1] += torch.tensor(LENGTHS) - shares.sum(1)
    return shares


def own(rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows of the whole, offsets)`` of a rank."""
    shares, starts = counts(ranks), torch.tensor([0, *LENGTHS]).cumsum(0)
    rows = [
        torch.arange(int(starts[b] + shares[b, :rank].sum()), int(starts[b] + shares[b, : rank + 1].sum()))
        for b in range(len(LENGTHS))
    ]
    return torch.cat(rows), torch.cat([torch.zeros(1, dtype=torch.int64), shares[:, rank].cumsum(0)])


class Scored(nn.Module):
    """`SoftmaxPool` with scores of the rows; large ones, whose lse loses digits in float32."""

    def __init__(self, shift=0.0, group=None):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.linspace(-1, 1, 2 * L).view(2, L)), shift
        self.pool = mk.nn.SoftmaxPool(group)

    def forward(self, x, offsets=None, mask=None):
        return self.pool(x, x @ self.weight.T + self.shift, offsets, mask)


class Embedded(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.linear, self.pool = nn.Linear(L, 8), pool

    def forward(self, x, offsets=None, mask=None):
        return self.pool(x, offsets, mask, embed=mk.Embed(self.linear, "tanh"))


MODULES = {
    "attention": lambda group=None: mk.nn.AttentionPool(L, D, heads=2, gated=False, group=group),
    "gated": lambda group=None: mk.nn.AttentionPool(L, D, heads=2, group=group),
    "embedded": lambda group=None: Embedded(mk.nn.AttentionPool(8, D, group=group)),
    "softmax": lambda group=None: Scored(group=group),
    "dsmil": lambda group=None: mk.nn.DSMIL(L, C, D, group=group),
    "dsmil-linear": lambda group=None: mk.nn.DSMIL(L, C, D, nonlinear_query=False, value="relu", scale=1.0, group=group),
    "embedded-dsmil": lambda group=None: Embedded(mk.nn.DSMIL(8, C, D, group=group)),
    "loss-attention": lambda group=None: mk.nn.LossAttention(L, C, group=group),
    "mean": lambda group=None: mk.nn.MeanPool(group),
    "max": lambda group=None: mk.nn.MaxPool(group),
    "abmil": lambda group=None: mk.nn.ABMIL(L, C, 8, D, group=group),
    "dsmil-model": lambda group=None: mk.nn.DSMILModel(L, C, 8, D, group=group),
    "loss-attention-model": lambda group=None: mk.nn.LossAttentionModel(L, C, (8,), group=group),
}


def made(name, dtype=torch.float64, group=None):
    torch.manual_seed(1)
    return MODULES[name](group).to(dtype)


def whole(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(LENGTHS), L, generator=g, dtype=torch.float64).relu() + 0.1
    mask = torch.rand(sum(LENGTHS), generator=g) > 0.2
    return x.to(dtype), torch.tensor([0, *LENGTHS]).cumsum(0), mask


def common(out) -> dict[str, torch.Tensor]:
    """What is the same on every rank, and differentiable."""
    if isinstance(out, torch.Tensor):
        return {"mean": out}
    found = {name: getattr(out, name) for name in ("bag", "lse", "values") if hasattr(out, name)}
    if hasattr(out, "pooled"):
        found |= {"logits": out.logits} | common(out.pooled)
    return found


def loss(out, rank_weight=1.0) -> torch.Tensor:
    """Of everything that is finite; `rank_weight` has every rank want something else."""
    total = 0
    for i, t in enumerate(common(out).values()):
        wanted = torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) * (1 + 0.1 * i)
        total = total + (t.masked_fill(t.isinf(), 0) * wanted * rank_weight).sum() + t.masked_fill(t.isinf(), 0).square().sum()
    if hasattr(out, "scores"):  # each rank its own
        total = total + 0.01 * out.scores.masked_fill(out.scores.isinf(), 0).square().sum() * rank_weight
    return total


def error(ours, exact) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())  # infinities
    difference = torch.where(same, 0, ours - exact)
    return (difference.norm() / exact[exact.isfinite()].norm().clamp(min=1e-3)).item()


def spread(rank, ranks, name, dtype, masked):
    """The errors of outputs, of the gradient of rows and of parameters, and the bits of what is common."""
    x, offsets, mask = whole()
    reference = made(name)
    x.requires_grad_()
    exact = reference(x, offsets, mask if masked else None)
    objective = sum(loss(exact, 1 + r) for r in range(ranks)) / ranks
    if hasattr(exact, "scores"):  # each rank wants something of its own rows only
        scores = exact.scores.masked_fill(exact.scores.isinf(), 0)
        for r in range(ranks):
            alone = 0.01 * scores.square()
            objective = objective - (1 + r) * (alone.sum() - alone[own(r, ranks)[0]].sum()) / ranks
    objective.backward()

    rows, own_offsets = own(rank, ranks)
    module = made(name, dtype, dist.group.WORLD)
    mine = x.detach()[rows].to(dtype).requires_grad_()
    out = module(mine, own_offsets, mask[rows] if masked else None)
    loss(out, 1 + rank).backward()
    errors = {key: error(t, common(exact)[key]) for key, t in common(out).items()}
    if hasattr(out, "scores"):
        errors["scores"] = error(out.scores, exact.scores[rows])
        weights = mk.attention_weights(out, own_offsets), mk.attention_weights(exact, offsets)[rows]
        errors["weights"] = error(*weights)
    errors["x"] = error(mine.grad / ranks, x.grad[rows]) if len(rows) else 0.0
    for p in module.parameters():
        dist.all_reduce(p.grad)
        p.grad /= ranks
    size = max([p.grad.norm().item() for p in reference.parameters()], default=1)
    for (key, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        errors[key] = ((p.grad - q.grad).norm() / size).item()
    chosen = {}
    for field in {"critical", "indices"} & set(getattr(out, "_fields", ())):
        index = getattr(out, field)
        there = rows[index.clamp(min=0)] if len(rows) else index
        chosen = {"here": torch.where(index < 0, -1, there), "all": getattr(exact, field)}
    return errors, [t.detach() for t in common(out).values()], chosen


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_exact(ranks):
    """Every module, in float64, with and without a mask, in one set of processes."""
    answers = run(everything, ranks, ranks, seconds=120)
    for key in answers[0]:
        for errors, bits, chosen in (answer[key] for answer in answers):
            assert all(e < 1e-14 * (8 if name in ("x", "weights") else 4) for name, e in errors.items()), (key, errors)
            assert all(map(torch.equal, bits, answers[0][key][1])), "equal on all ranks"
        if chosen:
            here = torch.stack([answer[key][2]["here"] for answer in answers])
            assert torch.equal(here.amax(0), chosen["all"]) and ((here >= 0).sum(0) <= 1).all(), key


def everything(rank, ranks):
    return {f"{name} {masked}": spread(rank, ranks, name, torch.float64, masked) for name in MODULES for masked in (0, 1)}
