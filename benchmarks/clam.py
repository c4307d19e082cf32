"""CLAM_SB whole (Lu et al. 2021): what one step on a bag of stored features takes, before `accelerate` and after it.

The model is a stand-in: its attributes, the arguments of its methods and what those return are those of the published
code, the rest is our own, and sizes are arguments.
"""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.units import Unit
from milkernels import accelerate
from milkernels.bench import harness
from milkernels.bench.workload import DTYPES

_TOLERANCE = 1e-4  # between losses, before and after
_SIZES = (1024, 512, 256)


def dense(*sizes: int, activation: type[nn.Module], dropout: float | None = None) -> nn.Sequential:
    """``Linear, activation[, Dropout]``."""
    layers = [nn.Linear(*sizes), activation()]
    return nn.Sequential(*layers, *([] if dropout is None else [nn.Dropout(dropout)]))


class AttnNet(nn.Module):
    """CLAM's Attn_Net: ``(scores [N, K], x)``."""

    def __init__(self, L=1024, D=256, dropout=False, n_classes=1):
        super().__init__()
        p = 0.25 if dropout else None
        self.module = nn.Sequential(*dense(L, D, activation=nn.Tanh, dropout=p), nn.Linear(D, n_classes))

    def forward(self, x):
        return self.module(x), x


class AttnNetGated(nn.Module):
    """CLAM's Attn_Net_Gated: ``(scores [N, K], x)``."""

    def __init__(self, L=1024, D=256, dropout=False, n_classes=1):
        super().__init__()
        p = 0.25 if dropout else None
        self.attention_a = dense(L, D, activation=nn.Tanh, dropout=p)
        self.attention_b = dense(L, D, activation=nn.Sigmoid, dropout=p)
        self.attention_c = nn.Linear(D, n_classes)

    def forward(self, x):
        gate = self.attention_a(x) * self.attention_b(x)
        return self.attention_c(gate), x


class ClamSB(nn.Module):
    """CLAM_SB.  Older checkpoints have no Dropout in the embedding, so that the network is at index 2, not 3."""

    branches = 1

    def __init__(
        self, gate=True, dropout=0.0, k_sample=8, n_classes=2, subtyping=False, sizes=(1024, 512, 256), old=False
    ):
        super().__init__()
        width, embedded, hidden = sizes
        branches = n_classes if self.branches is None else self.branches
        network = (AttnNetGated if gate else AttnNet)(embedded, hidden, dropout > 0, branches)
        embedding = dense(width, embedded, activation=nn.ReLU, dropout=None if old else dropout)
        self.attention_net = nn.Sequential(*embedding, network)
        if self.branches is None:
            self.classifiers = nn.ModuleList([nn.Linear(embedded, 1) for _ in range(n_classes)])
        else:
            self.classifiers = nn.Linear(embedded, n_classes)
        self.instance_classifiers = nn.ModuleList([nn.Linear(embedded, 2) for _ in range(n_classes)])
        self.instance_loss_fn = nn.CrossEntropyLoss()
        self.k_sample, self.n_classes, self.subtyping = k_sample, n_classes, subtyping

    def inst_eval(self, A, h, classifier):
        """Of the class of the bag: most attended are positive, least attended negative."""
        A = A.reshape(1, -1) if A.ndim == 1 else A
        chosen = [torch.topk(sign * A, self.k_sample, dim=1).indices[-1] for sign in (1, -1)]
        targets = torch.arange(2, device=h.device).flip(0).repeat_interleave(self.k_sample)
        return self._evaluated(classifier(h[torch.cat(chosen)]), targets)

    def inst_eval_out(self, A, h, classifier):
        """Of another class: most attended are negative."""
        A = A.reshape(1, -1) if A.ndim == 1 else A
        chosen = torch.topk(A, self.k_sample, dim=1).indices[-1]
        return self._evaluated(classifier(h[chosen]), torch.zeros_like(chosen))

    def _evaluated(self, logits, targets):
        return self.instance_loss_fn(logits, targets), logits.topk(1, dim=1).indices[:, 0], targets

    def _classified(self, bag):
        return self.classifiers(bag)

    def forward(self, h, label=None, instance_eval=False, return_features=False, attention_only=False):
        scores, h = self.attention_net(h)
        scores = scores.T
        if attention_only:
            return scores
        weights, results = scores.softmax(1), {}
        if instance_eval:
            loss, labels, predictions = 0.0, [], []
            for c, classifier in enumerate(self.instance_classifiers):
                inside = int(label) == c
                if not (inside or self.subtyping):
                    continue
                attention = weights if self.branches == 1 else weights[c]
                one, predicted, target = (self.inst_eval if inside else self.inst_eval_out)(attention, h, classifier)
                predictions.extend(predicted.cpu().numpy())
                labels.extend(target.cpu().numpy())
                loss = loss + one
            if self.subtyping:
                loss = loss / len(self.instance_classifiers)
            results = {"instance_loss": loss, "inst_labels": np.array(labels), "inst_preds": np.array(predictions)}
        bag = weights @ h
        logits = self._classified(bag)
        if return_features:
            results["features"] = bag
        return logits, logits.softmax(1), logits.topk(1, dim=1).indices, scores, results


def rows(unit: Unit, mode: str) -> Iterator[dict]:
    """``mode``: "fwd", in evaluation, or "step", in training with the instance losses; the features are frozen."""
    torch.manual_seed(0)
    (count,) = unit.workload.shape.lengths
    x = torch.randn(count, _SIZES[0]).relu_().to(DTYPES[unit.dtype])
    eager = ClamSB(sizes=_SIZES, k_sample=min(8, count)).to(x.dtype)
    native = copy.deepcopy(eager)
    accelerate(native, min_instances=0)
    calls = {"eager": _call(eager, x, mode), "native": _call(native, x, mode)}
    losses = {name: float(call()) for name, call in calls.items()}
    if not abs(losses["eager"] - losses["native"]) <= _TOLERANCE * abs(losses["eager"]):
        yield {"contender": "native", "status": "FAIL", "reason": f"losses differ: {losses}"}
        return
    for name, timing in harness.measure(calls, unit.budget / len(unit.modes)).items():
        if timing.error:
            yield {"contender": name, "status": "ERROR", "reason": timing.error}
        else:
            yield {"contender": name, "seconds": timing.seconds, "median": timing.median, "spread": timing.spread}


def _call(model: nn.Module, x: torch.Tensor, mode: str) -> Callable[[], torch.Tensor]:
    label = torch.tensor([1])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(x)[0].sum()

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        logits, _, _, _, results = model(x, label=label, instance_eval=True)
        loss = 0.7 * F.cross_entropy(logits, label) + 0.3 * results["instance_loss"]
        loss.backward()
        return loss.detach()

    model.train(mode != "fwd")
    return forward if mode == "fwd" else step
