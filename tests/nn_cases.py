"""The modules, bags in every form, and what comes of them, for the tests of `milkernels.nn`."""

import pytest
import torch
from op_cases import cotangents

from milkernels import Bags, Embed, nn

NAN = float("nan")
LENGTHS = (4, 0, 1, 7)
EMPTY = 1
B, N, L, D, K, C, Q, E = len(LENGTHS), sum(LENGTHS), 6, 5, 2, 3, 4, 7
VALUE = {"value": "relu", "value_dim": 5}


class Scored(torch.nn.Module):
    """`SoftmaxPool` with scores made of the instances, so that it is called as the others are."""

    def __init__(self, dtype=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, K * L, dtype=dtype).view(K, L))
        self.pool = nn.SoftmaxPool()

    def forward(self, x, offsets=None, mask=None):
        rows = x.values if isinstance(x, Bags) else x.values() if x.is_nested else x
        return self.pool(x, rows.nan_to_num() @ self.weight.T, offsets, mask)


class Embedded(torch.nn.Module):
    """A pooling that is handed the layer in front of it."""

    def __init__(self, pool, activation="relu", **factory):
        super().__init__()
        self.linear, self.pool = torch.nn.Linear(L, pool.in_dim, **factory), pool
        self.activation = activation

    def forward(self, x, offsets=None, mask=None, **options):
        return self.pool(x, offsets, mask, embed=Embed(self.linear, self.activation), **options)


MAKERS = {
    "attention": lambda **f: nn.AttentionPool(L, D, K, **f),
    "attention-plain": lambda **f: nn.AttentionPool(L, D, gated=False, activation="relu", bias=False, **f),
    "softmax": Scored,
    "dsmil": lambda **f: nn.DSMIL(L, C, Q, **f),
    "dsmil-linear": lambda **f: nn.DSMIL(L, C, Q, nonlinear_query=False, value="linear", scale=1.0, **f),
    "dsmil-relu": lambda **f: nn.DSMIL(L, C, Q, **VALUE, **f),
    "loss-attention": lambda **f: nn.LossAttention(L, C, **f),
    "embedded-attention": lambda **f: Embedded(nn.AttentionPool(E, D, K, **f), **f),
    "embedded-dsmil": lambda **f: Embedded(nn.DSMIL(E, C, Q, **VALUE, **f), "tanh", **f),
    "embedded-loss-attention": lambda **f: Embedded(nn.LossAttention(E, C, **f), **f),
    "mean": lambda **f: nn.MeanPool(),
    "max": lambda **f: nn.MaxPool(),
    "abmil": lambda **f: nn.ABMIL(L, C, 8, D, K, **f),
    "abmil-no-embedding": lambda **f: nn.ABMIL(L, C, None, D, gated=False, **f),
    "clam": lambda **f: nn.CLAM(L, C, 8, D, k=3, dropout=0.0, **f),
    "clam-branches": lambda **f: nn.CLAM(L, C, (8, 7), D, multi_branch=True, k=2, dropout=0.0, **f),
    "clam-no-embedding": lambda **f: nn.CLAM(L, C, None, D, gated=False, k=9, dropout=0.0, **f),
    "dsmil-model": lambda **f: nn.DSMILModel(L, C, 8, Q, lambda_=0.25, **VALUE, **f),
    "dsmil-model-no-embedding": lambda **f: nn.DSMILModel(L, C, **f),
    "abmil-deep": lambda **f: nn.ABMIL(L, C, (8, 7), D, **f),
    "loss-attention-model": lambda **f: nn.LossAttentionModel(L, C, (8, 7), **f),
    "instance-model-no-embedding": lambda **f: nn.InstancePooling(L, C, (), **f),
    "embedding-model-no-embedding": lambda **f: nn.EmbeddingPooling(L, C, (), **f),
}
MAKERS |= {
    f"instance-model-{pooling}": lambda pooling=pooling, **f: nn.InstancePooling(L, C, (8, 7), pooling, **f)
    for pooling in nn.InstancePooling.POOLINGS
}
MAKERS |= {
    f"embedding-model-{pooling}": lambda pooling=pooling, **f: nn.EmbeddingPooling(L, C, (8, 7), pooling, **f)
    for pooling in nn.EmbeddingPooling.POOLINGS
}
MAKERS |= {
    f"{name}-model-{pooling}": lambda kind=kind, pooling=pooling, **f: kind(L, C, (7, 7), pooling, **f)
    for name, kind in (("deep-supervision", nn.MINetDS), ("residual", nn.MINetRC))
    for pooling in ("max", "log_sum_exp")
}
LAYERS = [name for name in MAKERS if not any(word in name for word in ("model", "abmil", "clam"))]
MODELS = [name for name in MAKERS if name not in LAYERS]
every_module = pytest.mark.parametrize("name", MAKERS)


def make(name, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return MAKERS[name](dtype=dtype) if name not in ("mean", "max") else MAKERS[name]()


def make_bags(lengths=LENGTHS, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Bags.from_list([1 + torch.randn(n, L, generator=generator, dtype=dtype) for n in lengths])


def forms(bags):
    """The same bags in every form: the arguments, and the row in them of each instance."""
    x, offsets, rows = bags.values, bags.offsets, torch.arange(bags.num_instances)
    padded, mask = bags.to_padded(NAN)
    holes = torch.stack([x, torch.full_like(x, NAN)], 1).flatten(0, 1)  # a masked row after each instance
    real = torch.tensor([1, 0]).repeat(len(x))
    return {
        "offsets": ((x, offsets), rows),
        "int32": ((x, offsets.int()), rows),
        "bags": ((bags,), rows),
        "nested": ((bags.to_nested(),), rows),
        "mask": ((holes, 2 * offsets, real), 2 * rows),
        "masked-bags": ((Bags(holes, 2 * offsets, real),), 2 * rows),
        "padded": ((padded, None, mask), mask.flatten().nonzero()[:, 0]),
        "padded-ints": ((padded, None, mask.int()), mask.flatten().nonzero()[:, 0]),
    }


FORMS = list(forms(make_bags()))
# Fields with a row per instance, of what a model returns; of what a layer does, "scores" and "logits".
PER_ROW = {name: () for name in ("Prediction", "SidePrediction", "CLAMPrediction", "DSMILPrediction")}
PER_ROW |= {"InstancePrediction": ("instance_logits",)}


def fields(result, rows, prefix="") -> dict[str, torch.Tensor]:
    """Everything in a result by name, as if the instances had come without masked rows."""
    if isinstance(result, torch.Tensor):
        return {"bag": result}
    made = {}
    for name, t in result._asdict().items():
        if name == "pooled":
            made |= fields(t, rows, "pooled.")
        elif name in PER_ROW.get(type(result).__name__, ("scores", "logits")):
            made[prefix + name] = t[rows]
        elif not t.is_floating_point():
            place = torch.full((max(int(rows.max()), 0) + 2,), -1)
            place[rows] = torch.arange(len(rows))  # place[-1] stays -1: none
            made[prefix + name] = place[t]
        else:
            made[prefix + name] = t
    return made


def step(module, args, rows) -> dict[str, torch.Tensor]:
    """Results and the gradients of all parameters."""
    outputs = fields(module(*args), rows)
    kept = {n: o.masked_fill(o.isinf(), 0) for n, o in outputs.items() if o.requires_grad}
    parameters = dict(module.named_parameters())
    if kept and parameters:
        torch.autograd.backward(list(kept.values()), cotangents(kept.values()), inputs=list(parameters.values()))
    made = {n: o.detach() for n, o in outputs.items()}
    made |= {f"gradient of {n}": p.grad.clone() for n, p in parameters.items()}
    module.zero_grad()
    return made
