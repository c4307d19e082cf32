"""What people write today: the formula of each op for one bag, after the public code of its authors.

They promise nothing for an empty bag (PyTorch's mean of nothing is NaN, its maximum an error); what the ops
return there is in ``milkernels.functional``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from milkernels.testing.philox import keep_scale

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "identity": lambda t: t}

Tensors = dict[str, Tensor]


def _masked(scores: Tensor, t: Tensors) -> Tensor:
    return scores if "mask" not in t else scores.masked_fill(~t["mask"].bool().unsqueeze(1), -math.inf)


def _dropped(h: Tensor, t: Tensors, options: dict[str, Any], name: str) -> Tensor:
    p = options.get("dropout_p", 0.0)
    if p == 0.0:
        return h
    return h * t[name].to(h.dtype) * keep_scale(p) if name in t else F.dropout(h, p)


def attention_scores_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    """ABMIL's and, with ``u_weight``, CLAM's attention network."""
    a = ACTIVATIONS[options.get("activation", "tanh")](F.linear(x, t["v_weight"], t["v_bias"]))
    a = _dropped(a, t, options, "keep_activation")
    if "u_weight" in t:
        b = torch.sigmoid(F.linear(x, t["u_weight"], t["u_bias"]))
        a = a.mul(_dropped(b, t, options, "keep_sigmoid"))
    return {"scores": _masked(F.linear(a, t["w_weight"], t["w_bias"]), t)}


def _pooled(x: Tensor, scores: Tensor) -> Tensors:
    return {"bag": torch.mm(F.softmax(scores, dim=0).transpose(0, 1), x), "scores": scores}


def attention_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return _pooled(x, attention_scores_eager(x, t, options)["scores"])


def softmax_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return _pooled(x, _masked(t["scores"], t))


def query_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return _pooled(x, _masked(torch.mm(x, t["query"].transpose(0, 1)) * options["scale"], t))


def instance_max_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    logits = _masked(F.linear(x, t["weight"], t["bias"]), t)
    values, indices = torch.max(logits, dim=0)
    return {"values": values, "indices": indices, "logits": logits}


def dsmil_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    """DSMIL's BClassifier with the non-linear query and no value transform, as shipped."""

    def query(h: Tensor) -> Tensor:
        hidden = torch.relu(F.linear(h, t["q_weight"], t["q_bias"]))
        return torch.tanh(F.linear(hidden, t["q2_weight"], t["q2_bias"]))

    q = query(x)
    _, order = torch.sort(_masked(t["instance_logits"], t), 0, descending=True)
    q_max = query(torch.index_select(x, dim=0, index=order[0]))
    scores = torch.mm(q, q_max.transpose(0, 1)) / math.sqrt(q.shape[1])
    return {**_pooled(x, _masked(scores, t)), "critical": order[0]}


def loss_attention_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    logits = _masked(F.linear(x, t["weight"], t["bias"]), t)
    e = torch.exp(logits).sum(dim=1, keepdim=True)
    alpha = e / e.sum(dim=0, keepdim=True)
    return {"bag": (x * alpha).sum(dim=0, keepdim=True), "scores": torch.log(e), "logits": logits}


def weighted_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    weights = t["weights"]
    if "mask" in t:
        weights = weights.masked_fill(~t["mask"].bool().unsqueeze(1), 0.0)
    return {"bag": torch.mm(weights.transpose(0, 1), x)}


def mean_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return {"bag": (x if "mask" not in t else x[t["mask"].bool()]).mean(dim=0)}


def max_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    values, indices = torch.max(_masked(x, t), dim=0)
    return {"values": values, "indices": indices}
