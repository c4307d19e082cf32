"""The same models the way they are usually written: one bag at a time, in eager PyTorch.

Each function takes a model of `milkernels.nn`, whose parameters it uses, one bag ``[n, L]``, its label and the weight
of positive bags, and returns the bag's logit and loss.  They are what `training.fit` trains with for comparison;
nothing here calls a fused op.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkernels.nn import ABMIL, DSMILModel, LossAttentionModel


def _embedded(model: nn.Module, x: Tensor) -> Tensor:
    """Features stored in half are converted as a whole."""
    return model.embed(x.to(next(model.parameters()).dtype))


def attention(model: ABMIL, x: Tensor, label: Tensor, pos_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    pool, h = model.attention, _embedded(model, x)
    hidden = torch.tanh(F.linear(h, pool.v_weight, pool.v_bias))
    if pool.gated:
        hidden = hidden * torch.sigmoid(F.linear(h, pool.u_weight, pool.u_bias))
    weights = torch.softmax(F.linear(hidden, pool.w_weight, pool.w_bias), dim=0)  # [n, 1]
    logit = model.classifier(weights.T @ h)[0, 0]
    return logit, F.binary_cross_entropy_with_logits(logit, label.to(logit.dtype), pos_weight=pos_weight)


def dsmil(model: DSMILModel, x: Tensor, label: Tensor, pos_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As its authors ship it."""
    streams, h = model.streams, _embedded(model, x)
    instance_logits = F.linear(h, streams.weight, streams.bias)  # [n, 1]
    query = F.relu(F.linear(h, streams.q_weight, streams.q_bias))
    query = torch.tanh(F.linear(query, streams.q2_weight, streams.q2_bias))
    critical = instance_logits[:, 0].argmax()
    weights = torch.softmax(query @ query[critical] * query.shape[1] ** -0.5, dim=0)
    bag_logit = model.classifier((weights @ h)[None, None])[0, 0, 0]
    instance_logit = instance_logits[critical, 0]
    label = label.to(bag_logit.dtype)
    of_bag = F.binary_cross_entropy_with_logits(bag_logit, label, pos_weight=pos_weight)
    of_instance = F.binary_cross_entropy_with_logits(instance_logit, label, pos_weight=pos_weight)
    return bag_logit, (of_bag + of_instance) / 2


def loss_attention(
    model: LossAttentionModel, x: Tensor, label: Tensor, pos_weight: Tensor | None = None, *, lambda_: float
) -> tuple[Tensor, Tensor]:
    classifier, h = model.attention, _embedded(model, x)
    instance_logits = F.linear(h, classifier.weight, classifier.bias)  # [n, C]
    weights = (instance_logits - instance_logits.max()).exp().sum(dim=1)
    weights = weights / weights.sum()
    logits = F.linear(weights @ h, classifier.weight, classifier.bias)
    of_instances = F.cross_entropy(instance_logits, label.expand(len(x)), reduction="none")
    loss = F.cross_entropy(logits, label) + lambda_ * weights @ of_instances
    return logits[1] - logits[0], loss
