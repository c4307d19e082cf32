"""What people write today: the formula of each op for one bag, after the public code of its authors.

They promise nothing for an empty bag (PyTorch's mean of nothing is NaN, its maximum an error); what the ops
return there is in ``milkernels.ops``.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from milkernels.testing.philox import keep_scale

_kink = 0.0


def relu(t: Tensor) -> Tensor:
    return torch.where(t > _kink * t.detach().square().mean().sqrt(), t, 0) if _kink else torch.relu(t)


@contextlib.contextmanager
def kink(at: float) -> Iterator[None]:
    """Within the block ReLU passes what lies above ``at`` times the root mean square of all that it sees."""
    global _kink
    before, _kink = _kink, at
    try:
        yield
    finally:
        _kink = before


ACTIVATIONS = {"tanh": torch.tanh, "relu": relu, "gelu": F.gelu, "identity": lambda t: t}

Tensors = dict[str, Tensor]
OneBag = Callable[[Tensor, Tensors, dict[str, Any]], Tensors]  # of x, the other tensors and the options


def _masked(scores: Tensor, t: Tensors) -> Tensor:
    return scores if "mask" not in t else scores.masked_fill(~t["mask"].bool().unsqueeze(1), -math.inf)


def _dropped(h: Tensor, t: Tensors, p: float, name: str) -> Tensor:
    if p == 0.0:
        return h
    return h * t[name].to(h.dtype) * keep_scale(p) if name in t else F.dropout(h, p)


def embedding_dropout(options: Mapping[str, Any]) -> float:
    """The embedding's share of dropped units: its own, or that of all dropout there is."""
    return options.get("e_dropout_p", options.get("dropout_p", 0.0))


def embedded(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensor:
    """The layer in front of the aggregator, where there is one: Linear, ReLU, Dropout."""
    if "e_weight" not in t:
        return x
    return _dropped(relu(F.linear(x, t["e_weight"], t["e_bias"])), t, embedding_dropout(options), "keep_embedding")


def of_embedded(one_bag: OneBag) -> OneBag:
    """The formula behind that layer."""
    return lambda x, t, options: one_bag(embedded(x, t, options), t, options)


def attention_scores_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    """ABMIL's and, with ``u_weight``, CLAM's attention network."""
    p = options["dropout_p"]
    a = ACTIVATIONS[options["activation"]](F.linear(x, t["v_weight"], t["v_bias"]))
    a = _dropped(a, t, p, "keep_activation")
    if "u_weight" in t:
        b = torch.sigmoid(F.linear(x, t["u_weight"], t["u_bias"]))
        a = a.mul(_dropped(b, t, p, "keep_sigmoid"))
    return {"scores": _masked(F.linear(a, t["w_weight"], t["w_bias"]), t)}


def _pooled(x: Tensor, scores: Tensor) -> Tensors:
    return {"bag": torch.mm(F.softmax(scores, dim=0).transpose(0, 1), x), "scores": scores}


def attention_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return _pooled(x, attention_scores_eager(x, t, options)["scores"])


def softmax_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return _pooled(x, _masked(t["scores"], t))


def query_scores_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return {"scores": _masked(torch.mm(x, t["query"].transpose(0, 1)) * options["scale"], t)}


def query_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return _pooled(x, query_scores_eager(x, t, options)["scores"])


def instance_max_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    logits = _masked(F.linear(x, t["weight"], t["bias"]), t)
    values, indices = torch.max(logits, dim=0)
    return {"values": values, "indices": indices, "logits": logits}


def _dsmil_query(h: Tensor, t: Tensors) -> Tensor:
    hidden = F.linear(h, t["q_weight"], t["q_bias"])
    return torch.tanh(F.linear(relu(hidden), t["q2_weight"], t["q2_bias"])) if "q2_weight" in t else hidden


def _dsmil_value(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensor:
    if "v_weight" not in t:
        return x
    dropped = _dropped(x, t, options["v_dropout_p"], "keep_value")
    return ACTIVATIONS[options.get("v_activation", "identity")](F.linear(dropped, t["v_weight"], t["v_bias"]))


def _dsmil_stream(x: Tensor, c: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    """DSMIL's BClassifier after the class scores ``c``."""
    v, q = _dsmil_value(x, t, options), _dsmil_query(x, t)
    _, order = torch.sort(c, 0, descending=True)
    q_max = _dsmil_query(torch.index_select(x, dim=0, index=order[0]), t)
    scores = torch.mm(q, q_max.transpose(0, 1)) / math.sqrt(q.shape[1])
    return {**_pooled(v, _masked(scores, t)), "critical": order[0]}


def dsmil_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return _dsmil_stream(x, _masked(t["instance_logits"], t), t, options)


def dsmil_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    """Both streams, as DSMIL's MILNet and training loop have them."""
    first = instance_max_eager(x, t, options)
    second = _dsmil_stream(x, first["logits"], t, options)
    first.pop("indices")  # the critical instances of the second
    return {**first, **second, "streams": torch.cat([second["bag"].flatten(), first["values"]])}


def loss_attention_pool_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    """Loss-Attention's own: exponentials over one total."""
    logits = _masked(F.linear(x, t["weight"], t["bias"]), t)
    e = torch.exp(logits).sum(dim=1, keepdim=True)
    alpha = e / e.sum(dim=0, keepdim=True)
    return {"bag": (x * alpha).sum(dim=0, keepdim=True), "scores": torch.log(e), "logits": logits}


def loss_attention_pool_logsumexp(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    """The same, safe for logits of any size, and pooled by a product."""
    logits = F.linear(x, t["weight"], t["bias"])
    scores = torch.logsumexp(logits, dim=1, keepdim=True)
    return {**_pooled(x, _masked(scores, t)), "logits": _masked(logits, t)}


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


def segment_softmax_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return {"weights": F.softmax(_masked(x, t), dim=0)}


def attention_weights_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    return {"weights": torch.exp(_masked(x, t) - t["lse"])}


def topk_instances_eager(x: Tensor, t: Tensors, options: dict[str, Any]) -> Tensors:
    """Padded to ``k`` where the bag has fewer."""
    values, indices = torch.topk(_masked(x, t), min(options["k"], len(x)), dim=0)
    missing = (0, options["k"] - len(values))
    indices = indices.masked_fill(values == -math.inf, -1)
    return {"values": F.pad(values.T, missing, value=-math.inf), "indices": F.pad(indices.T, missing, value=-1)}
