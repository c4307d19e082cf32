"""Stand-ins for models that people have and no structure is the name of, in our own words.  What they are called with,
how they score, what they return and how they are put together is as in published code."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from upstream_models import AttnNet, AttnNetGated, BClassifier, dense

IN, E, D, C = 12, 10, 6, 3  # width of features, of the embedding, hidden units, classes
POOLING, EMBEDDED = "scores + softmax + sum", "scores + softmax + sum + embedding"


def attention(width: int = E, heads: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, D), nn.Tanh(), nn.Linear(D, heads))


class Plain(nn.Module):
    """One module, one bag with or without a leading 1, a dict, and options that are seldom given."""

    def __init__(self, dropout=0.0, act=nn.ReLU):
        super().__init__()
        self.feature = dense(IN, E, activation=act, dropout=dropout)
        self.attention, self.classifier = attention(), nn.Sequential(nn.Linear(E, C))
        self.width = E

    def forward(self, x, return_attention=False, return_feature=False):
        h = self.feature(x).squeeze(0)
        scores = self.attention(h)
        kept = scores.clone()
        bag = torch.mm(F.softmax(scores.transpose(-1, -2), dim=-1), h)
        out = {"logits": self.classifier(bag)}
        if return_feature:
            out["feature"] = bag
        if return_attention:
            out["attention"] = kept
        return out


class GateOfLists(nn.Module):
    """Gated by ReLU, without biases, with its activation shared."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.act = nn.ReLU()
        self.front = nn.Sequential(nn.Linear(IN, E), self.act, nn.Dropout(dropout))
        self.a = nn.Sequential(nn.Linear(E, D, bias=False), self.act, nn.Dropout(dropout))
        self.b = nn.Sequential(nn.Linear(E, D, bias=False), nn.Sigmoid(), nn.Dropout(dropout))
        self.c, self.head = nn.Linear(D, 1, bias=False), nn.Linear(E, C, bias=False)

    def forward(self, x, return_attn=False):
        h = self.front(x).squeeze(0)
        A = self.c(self.a(h).mul(self.b(h)))
        A = F.softmax(torch.transpose(A, -1, -2), dim=-1)
        y = self.head(A.mm(h))
        return (y, A) if return_attn else y


class BatchedPool(nn.Module):
    """``(bag, weights)`` of one bag ``[1, N, L]``, with an option to leave the softmax out."""

    def __init__(self):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(IN, D), nn.GELU(), nn.Linear(D, 1))

    def forward(self, x, no_norm=False):
        x = x.squeeze(0)
        scores = self.score(x).transpose(0, 1)
        weights = torch.softmax(scores, dim=-1)
        bag = torch.matmul(weights, x)
        return bag, scores if no_norm else weights


class Nested(nn.Module):
    """An embedding, a pooling module that is passed over, and what it returns used again."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.patch = nn.Sequential(nn.Linear(IN, E), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.pool = GatedWeights()
        self.predict = nn.Linear(E, C)

    def forward(self, x, return_attn=False):
        h = self.patch(x)
        weights = self.pool(h)
        out = self.predict(torch.einsum("kn,nl->kl", weights, h))
        return (out, weights) if return_attn else out


class GatedWeights(nn.Module):
    """A layer from one bag to its weights; its forward takes nothing else, or whether to leave the softmax out."""

    def __init__(self):
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(E, D), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(E, D), nn.Sigmoid())
        self.attention_weights = nn.Linear(D, 2)

    def forward(self, x):
        return F.softmax(self.attention_weights(self.attention_V(x) * self.attention_U(x)).mT, dim=1)


class GatedWeightsNoNorm(GatedWeights):
    def forward(self, x, no_norm=False):
        scores = self.attention_weights(self.attention_V(x) * self.attention_U(x)).mT
        return scores if no_norm else F.softmax(scores, dim=1)


class Temperature(nn.Module):
    """Scores divided by a number, weights whose entropy is returned."""

    def __init__(self, temperature=0.7):
        super().__init__()
        self.embed, self.temperature = dense(IN, E, activation=nn.ReLU), temperature
        self.V, self.U, self.w = nn.Linear(E, D), nn.Linear(E, D), nn.Linear(D, 1)
        self.out = nn.Linear(E, C)

    def forward(self, x):
        h = self.embed(x.squeeze(0) if x.ndim == 3 else x)
        raw = self.w(torch.tanh(self.V(h)) * torch.sigmoid(self.U(h))).T
        weights = F.softmax(raw / self.temperature, dim=1)
        entropy = -(weights * torch.log(weights + 1e-8)).sum(dim=1).mean()
        return self.out(weights @ h), entropy


class Branches(nn.Module):
    """Several heads, a classifier for each, and one bag of their mean weights."""

    def __init__(self):
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(IN, E, bias=False), nn.ReLU())
        self.gate = AttnNetGated(E, D, False, 4)
        self.heads = nn.ModuleList([nn.Linear(E, C) for _ in range(4)])

    def forward(self, x):
        h = self.reduce(x[0] if x.ndim == 3 else x)
        scores = self.gate(h)[0].T
        bags = F.softmax(scores, dim=1) @ h
        return torch.stack([head(bags[i]) for i, head in enumerate(self.heads)]), scores.unsqueeze(0)


class BranchesAndMean(Branches):
    """The sum by the mean of the heads' weights as well; in training some of the best attended are left out."""

    def __init__(self, left_out=0):
        super().__init__()
        self.whole, self.left_out = nn.Linear(E, C), left_out

    def forward(self, x):
        h = self.reduce(x[0])
        scores = self.gate(h)[0].T
        if self.left_out and self.training:
            best = torch.topk(scores, self.left_out, dim=-1).indices
            kept = torch.ones_like(scores).scatter_(-1, best, 0)
            scores = scores.masked_fill(kept == 0, -1e9)
        bags = torch.mm(F.softmax(scores, dim=1), h)
        bag = torch.mm(F.softmax(scores, dim=1).mean(0, keepdim=True), h)
        return torch.stack([head(bags[i]) for i, head in enumerate(self.heads)]), self.whole(bag), scores[None]


class Survival(nn.Module):
    """Keyword arguments without names in the signature; CLAM's network, pooled here; another tensor beside."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention_net = nn.Sequential(
            nn.Linear(IN, E), nn.ReLU(), nn.Dropout(dropout), AttnNetGated(E, D, dropout > 0)
        )
        self.rho = dense(E, E, activation=nn.ReLU)
        self.omic, self.classifier = dense(5, E, activation=nn.ELU), nn.Linear(2 * E, C)

    def forward(self, **kwargs):
        scores, h = self.attention_net(kwargs["x_path"])
        weights = F.softmax(torch.transpose(scores, 1, 0), dim=1)
        bag = self.rho(torch.mm(weights, h)).squeeze()
        both = torch.cat([bag, self.omic(kwargs["x_omic"])], axis=0)
        logits = self.classifier(both).unsqueeze(0)
        hazards = torch.sigmoid(logits)
        return hazards, torch.cumprod(1 - hazards, dim=1), torch.topk(logits, 1, dim=1)[1], scores, None


class WithStage(nn.Module):
    """Three arguments, and an attention network whose rows are embedded in front."""

    def __init__(self):
        super().__init__()
        self.fc, self.net = dense(IN, E, activation=nn.ReLU), AttnNet(E, D)
        self.stage, self.out = nn.Embedding(4, 5), nn.Linear(E + 5, C)

    def forward(self, h, stage, molecular=None):
        scores, h = self.net(self.fc(h))
        bag = F.softmax(scores.T, dim=1) @ h
        return self.out(torch.cat([bag, self.stage(stage)], dim=1)), scores


class MoreOfClam(nn.Module):
    """CLAM with other options, a leading 1 and a dict; its instance losses run as they were."""

    def __init__(self, branches=1, dropout=0.0):
        super().__init__()
        network = AttnNetGated(E, D, dropout > 0, branches)
        self.attention_net = nn.Sequential(nn.Linear(IN, E), nn.ReLU(), nn.Dropout(dropout), network)
        self.classifiers = nn.Linear(E, C) if branches == 1 else nn.ModuleList([nn.Linear(E, 1) for _ in range(C)])
        self.instance_classifiers = nn.ModuleList([nn.Linear(E, 2) for _ in range(C)])
        self.k_sample = 4

    def forward(self, h, label=None, instance_eval=False, return_features=False, attention_only=False, attn=False):
        scores, h = self.attention_net(h.squeeze(0))
        scores = torch.transpose(scores, 1, 0)
        if attention_only:
            return scores
        bag = torch.mm(F.softmax(scores, dim=1), h)
        if isinstance(self.classifiers, nn.ModuleList):
            logits = torch.empty(1, C).type_as(bag)
            for c, classify in enumerate(self.classifiers):
                logits[0, c] = classify(bag[c])
        else:
            logits = self.classifiers(bag)
        out = {"logits": logits, "predicted": torch.topk(logits, 1, dim=1)[1]}
        if instance_eval:
            out["instances"] = self.instance_classifiers[int(label)](h[scores[0].topk(self.k_sample).indices]).sum()
        return out


class MoreOfDSMIL(BClassifier):
    def forward(self, feats, c, scaled=True, **options):
        assert scaled
        return super().forward(feats, c)


class ByLengths(nn.Module):
    """Padded bags and their lengths, a mask made of indices, a product summed."""

    def __init__(self):
        super().__init__()
        self.encoder, self.attention = dense(IN, E, activation=nn.ReLU), attention()
        self.head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(E), nn.Dropout(0.0), nn.Linear(E, C))

    def forward(self, bags, lens):
        h = self.encoder(bags)
        scores = self.attention(h)
        index = torch.arange(h.shape[1]).repeat(h.shape[0], 1).to(scores.device)
        real = (index < lens.unsqueeze(-1)).unsqueeze(-1)
        weights = torch.softmax(torch.where(real, scores, torch.full_like(scores, -1e10)), dim=1)
        return self.head((weights * h).sum(-2))


class Backboned(nn.Module):
    """A batch ``[B, N, L]`` and a sum over its instances."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(IN, D), nn.Tanh(), nn.Linear(D, 1))
        self.myfc = nn.Linear(IN, C)

    def forward(self, x):
        weights = torch.softmax(self.attention(x), dim=1)
        return self.myfc(torch.sum(x * weights, dim=1))


class Masked(nn.Module):
    """Functional activations, a learned temperature, a mask of what is padding, weights returned."""

    def __init__(self):
        super().__init__()
        self.tiles = nn.Sequential(nn.Linear(IN, E), nn.ReLU())
        self.att, self.gate, self.w = nn.Linear(E, D), nn.Linear(E, D), nn.Linear(D, 1)
        self.temperature, self.mlp = nn.Parameter(torch.tensor([1.3])), nn.Linear(E, C)

    def forward(self, features, mask=None):
        h = self.tiles(features)
        scores = self.w(F.tanh(self.att(h)) * F.sigmoid(self.gate(h))) / self.temperature
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        weights = F.softmax(scores, dim=1)
        return self.mlp(torch.matmul(weights.transpose(1, 2), h).squeeze(1)), weights


class HeadByHead(nn.Module):
    """Heads with gates of their own, each of which is summed by itself."""

    def __init__(self, heads=3):
        super().__init__()
        self.pre = nn.Sequential(nn.Linear(IN, IN), nn.LayerNorm(IN), nn.GELU(), nn.Linear(IN, E), nn.GELU())
        self.attn = nn.ModuleList([AttnNetGated(E, D) for _ in range(heads)])
        self.post = nn.Linear(heads * E, C)

    def forward(self, bags):
        h = self.pre(bags)
        out = []
        for network in self.attn:
            scores = torch.swapaxes(network(h)[0], 1, 2)
            out.append(torch.bmm(F.softmax(scores, dim=-1), h))
        return self.post(torch.cat(out, dim=-1)).squeeze(1)


class Stacked(nn.Module):
    """Rows with a last dimension of heads, whose weights are stacked as the rows are and summed outside of them."""

    def __init__(self, heads=1):
        super().__init__()
        self.heads = heads
        self.pre = nn.Sequential(nn.Linear(IN, E), nn.LayerNorm(E), nn.GELU(), nn.Linear(E, E * heads), nn.GELU())
        self.nets = nn.ModuleList([AttnNetGated(E, D) for _ in range(heads)])

    def forward(self, bags, return_attention=False):
        h = self.pre(bags).unflatten(-1, (E, self.heads))
        scores = [net(h[..., i])[0] for i, net in enumerate(self.nets)]
        weights = torch.stack([F.softmax(s, dim=1) for s in scores], dim=-1)
        out = torch.sum(h * weights, dim=1)
        return (out, torch.stack(scores, dim=-1)) if return_attention else out


class Evidence(nn.Module):
    """A projection of ``[B * N, L]`` with dropout before its ReLU, and a scoring network that returns weights."""

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention()

        def forward(self, h):
            return F.softmax(self.attention(h).transpose(2, 1), dim=2)

    def __init__(self, dropout=0.0):
        super().__init__()
        drop = nn.Dropout(dropout)
        self.project = nn.Sequential(nn.Linear(IN, IN), drop, nn.ReLU(), nn.Linear(IN, E), drop, nn.ReLU())
        self.instances, self.head = self.Weights(), nn.Linear(E, C)

    def forward(self, x, return_instances=False):
        h = self.project(x.flatten(0, 1)).reshape(x.shape[0], x.shape[1], -1)
        bag = torch.matmul(self.instances(h), h).squeeze(1)
        evidence = F.softplus(self.head(bag)) + 1
        return (evidence, F.softmax(self.head(h), dim=-1)[:, :, 1]) if return_instances else evidence


class Flattened(nn.Module):
    """A batch that is flattened to be scored."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.feature = dense(IN, E, activation=nn.ReLU, dropout=dropout)
        self.attention, self.classifier = attention(), nn.Linear(E, C)

    def forward(self, x, return_attention=False, return_feature=False):
        h = self.feature(x)
        bags, n, width = h.shape
        scores = self.attention(h.view(-1, width)).view(bags, n, 1)
        bag = torch.bmm(F.softmax(torch.transpose(scores, -1, -2), dim=-1), h).view(bags, width)
        out = {"logits": self.classifier(bag)}
        if return_feature:
            out["feature"] = bag
        if return_attention:
            out["attention"] = scores.transpose(-1, -2)
        return out


class Deep(nn.Module):
    """Two layers in front, BatchNorm between them, and a residual head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(IN, IN), nn.BatchNorm1d(IN), nn.Linear(IN, E)
        self.attention, self.head = attention(heads=2), nn.Linear(E, E)
        self.out = nn.Linear(E, C)

    def forward(self, x):
        h = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        bag = self.attention(h).softmax(0).mT @ h
        bag = bag.mean(0)
        return self.out(bag + self.head(bag))


# The table


class Kind(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the bags of a call
    share: str  # what must be fused
    call: Callable[[nn.Module, Tensor], Any] = lambda m, x: m(x)
    example: Callable[[Tensor], Any] | None = None  # what accelerate is given
    name: str = ""  # the module that is fused


def survival(x: Tensor) -> dict:
    return {"x_path": x, "x_omic": torch.linspace(-1, 1, 5, dtype=x.dtype)}


def staged(x: Tensor) -> tuple:
    return x, torch.tensor([2])


def lengths(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], x.shape[1] - len(x), -1)


def padding(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[1]) >= lengths(x)[:, None] - 3).unsqueeze(-1)


KINDS = {
    "plain": Kind(Plain, (1, 40, IN), EMBEDDED),
    "plain, one bag": Kind(Plain, (40, IN), EMBEDDED),
    "plain, gelu": Kind(lambda: Plain(act=nn.GELU), (1, 40, IN), EMBEDDED),
    "plain, tanh and dropout": Kind(lambda: Plain(0.25, nn.Tanh), (40, IN), EMBEDDED),
    "gate of lists": Kind(lambda: GateOfLists(0.25), (1, 40, IN), EMBEDDED),
    "pool": Kind(BatchedPool, (1, 40, IN), POOLING),
    "nested": Kind(lambda: Nested(0.25), (40, IN), EMBEDDED),
    "temperature": Kind(Temperature, (40, IN), EMBEDDED),
    "branches": Kind(Branches, (1, 40, IN), EMBEDDED),
    "branches and mean": Kind(BranchesAndMean, (1, 40, IN), EMBEDDED),
    "branches, best left out": Kind(lambda: BranchesAndMean(3), (1, 40, IN), EMBEDDED),
    "survival": Kind(lambda: Survival(0.25), (40, IN), EMBEDDED, lambda m, x: m(**survival(x)), survival),
    "with a stage": Kind(WithStage, (40, IN), EMBEDDED, lambda m, x: m(*staged(x)), staged),
    "more of clam": Kind(lambda: MoreOfClam(dropout=0.25), (1, 40, IN), EMBEDDED),
    "more of clam, branches": Kind(lambda: MoreOfClam(C), (1, 40, IN), EMBEDDED),
    "by lengths": Kind(ByLengths, (3, 40, IN), EMBEDDED, lambda m, x: m(x, lengths(x))),
    "backboned": Kind(Backboned, (3, 40, IN), POOLING),
    "masked": Kind(Masked, (3, 40, IN), EMBEDDED, lambda m, x: m(x, padding(x))),
    "masked, without a mask": Kind(Masked, (3, 40, IN), EMBEDDED),
    "head by head": Kind(HeadByHead, (3, 40, IN), POOLING),
    "one stacked head": Kind(Stacked, (3, 40, IN), EMBEDDED),
    "stacked heads": Kind(lambda: Stacked(4), (3, 40, IN), POOLING),
    "evidence": Kind(lambda: Evidence(0.25), (1, 40, IN), EMBEDDED),
    "flattened": Kind(lambda: Flattened(0.25), (3, 40, IN), EMBEDDED),
    "deep": Kind(Deep, (40, IN), EMBEDDED),
}
