"""Small whole models: an embedding of the instances, a pooling, a classifier."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkernels import ops, results
from milkernels._torch import called_hooks, has_global_hooks, has_own, is_traceable_wrapper_subclass
from milkernels.arguments import DTYPES, check_choice, check_count, check_share, check_type
from milkernels.bags import Parts
from milkernels.dtypes import compute_dtype_of
from milkernels.layers import Embed
from milkernels.nn.pools import DSMIL, AttentionPool, Instances, LossAttention, ragged
from milkernels.ops.classical import check_exponent
from milkernels.ragged import checked_mask

Dims = int | Sequence[int] | None


class Prediction(NamedTuple):
    """What a model returns."""

    logits: Tensor  # [B, C]
    pooled: results.Pooled | results.LossAttentionPooled | Tensor  # of the embedded instances; a tensor is [B, L]


class InstancePrediction(NamedTuple):
    """What `InstancePooling` returns."""

    logits: Tensor  # [B, C]
    instance_logits: Tensor  # [N, C]  -inf in masked rows


class DSMILPrediction(NamedTuple):
    """What `DSMILModel` returns; its authors train on the losses of both streams."""

    logits: Tensor  # [B, C]  both streams, weighted
    bag_logits: Tensor  # [B, C]  the second stream
    instance_logits: Tensor  # [B, C]  the first stream: each bag's maximum, -inf for an empty bag
    pooled: results.DSMILOutput


# Embedding


def _embedding(name: str, in_dim: int, dims: Dims, dropout: float, **factory) -> tuple[nn.Sequential, int]:
    """``(module, width)``: Linear, ReLU, Dropout for each of ``dims``; without any, the instances as they are."""
    check_count("in_dim", in_dim)
    check_share("dropout", dropout)
    dims = () if dims is None else (dims,) if isinstance(dims, int) else dims
    check_type(name, dims, (list, tuple), "a number of features, or a sequence of them")
    layers = []
    for dim in dims:
        check_count(name, dim)
        layers += [nn.Linear(in_dim, dim, **factory), nn.ReLU(), nn.Dropout(dropout)]
        in_dim = dim
    return nn.Sequential(*layers), in_dim


def _hidden_embedding(in_dim: int, hidden_dims: Sequence[int], dropout: float, **factory):
    """`_embedding` of a model whose only dropout is there."""
    check_type("hidden_dims", hidden_dims, (list, tuple), "a sequence of numbers of features")
    if not hidden_dims and dropout:
        raise ValueError(f"dropout is that of the embedding, which needs hidden_dims; got {dropout}, {hidden_dims}")
    return _embedding("hidden_dims", in_dim, hidden_dims, dropout, **factory)


def _embed(
    embed: nn.Sequential, x, offsets, mask, in_dim: int, then: nn.Module
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The bags as `ragged` gives them, embedded; ``then`` is what takes them."""
    values, offsets, mask = ragged(x, offsets, mask, in_dim)
    embedded, mask = _through([embed] if len(embed) else [], values, mask, embed[0] if len(embed) else then)
    return embedded, offsets, mask


def _pooled(pool: nn.Module, embed: nn.Module, x, offsets, mask, in_dim: int):
    """What ``pool`` makes of the embedded bags.  The last layer of the embedding is handed to it, where calling that
    layer would do no more than its parameters say: then its output is never stored."""
    last = _last_layer(embed) if _is_plain(pool, AttentionPool, DSMIL, LossAttention) else None
    if last is None:
        return pool(*_embed(embed, x, offsets, mask, in_dim, pool))
    values, offsets, mask = ragged(x, offsets, mask, in_dim)
    before = list(embed)[:-3]
    values, mask = _through(before, values, mask, before[0] if before else pool)
    return pool(values, offsets, mask, embed=last)


def _through(
    layers: Sequence[nn.Module], values: Tensor | Parts, mask: Tensor | None, first: nn.Module
) -> tuple[Tensor | Parts, Tensor | None]:
    """``(values behind the layers, mask)``; ``first`` is what takes them."""
    if isinstance(values, Parts):
        return values.through(lambda rows, mask: _through(layers, rows, mask, first)[0], layers), mask
    _check_type(values, first)
    if layers:
        values, mask = _cleared(values, mask)
    for layer in layers:
        values = layer(values)
    return values, mask


def _check_type(x: Tensor, layer: nn.Module) -> None:
    """A layer of PyTorch takes features of its own type, outside of autocast; a pool of the ops also narrower ones, and
    of wider ones makes what the classifier behind it does not take."""
    weight = next(layer.parameters(), x)
    pools = isinstance(layer, AttentionPool | DSMIL | LossAttention)
    taken = torch.promote_types(x.dtype, weight.dtype) if pools else x.dtype
    cast = compute_dtype_of(x) is not None and weight.dtype != torch.float64
    if taken != weight.dtype and weight.dtype in DTYPES and not cast:
        raise TypeError(f"x must be of the type of the parameters, {weight.dtype}; got {x.dtype}: convert one of them")


def _last_layer(embed: nn.Module) -> Embed | None:
    """Its last Linear, ReLU and Dropout as the ``embed`` of an op; None where they are not just these."""
    if not _is_plain(embed, nn.Sequential) or len(embed) < 3 or has_global_hooks():
        return None
    linear, relu, dropout = list(embed)[-3:]
    if not (_is_plain(linear, nn.Linear) and _is_plain(relu, nn.ReLU) and _is_plain(dropout, nn.Dropout)):
        return None
    if not has_own(linear, "weight", "bias") or is_traceable_wrapper_subclass(linear.weight):
        return None  # computed before each call, or sharded or quantized
    return Embed((linear.weight, linear.bias), "relu", dropout.p if dropout.training else 0.0)


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Calling the module runs the forward of one of these classes and no hook; parametrizations, adapters and quantized
    layers are of other classes."""
    return type(module) in kinds and not called_hooks(module) and "forward" not in module.__dict__


def _cleared(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Zeros in masked rows: a linear layer's weight gradient multiplies all rows by theirs, which is 0 there; 0 * NaN
    is NaN."""
    mask = checked_mask(mask, values)
    return (values if mask is None else values.masked_fill(~mask[:, None], 0)), mask


def _instance_logits(model: "_Pooling", values: Tensor | Parts, offsets: Tensor | None, mask: Tensor | None):
    """``(logits [N, C] of the instances, offsets, mask)``, with their bags on the device of the logits."""

    def classify(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        values, mask = (values, mask) if len(model.embed) else _cleared(values, mask)
        return model.classifier(values), mask

    if not isinstance(values, Parts):
        logits, mask = classify(values, mask)
        return logits, offsets, mask
    logits = values.through(lambda rows, mask: classify(rows, mask)[0], [model.classifier]).instances(mask)
    offsets, mask = (None if t is None else t.to(logits.device) for t in (offsets, mask))
    return logits, offsets, checked_mask(mask, logits)


# Models


class ABMIL(nn.Module):
    """Attention-based MIL (Ilse et al. 2018): embed each instance, pool by attention, classify the bag.

    With ``gated=True`` and one head this is also CLAM's backbone (Lu et al. 2021), without its instance loss.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        embed_dim: of the embedding, a linear layer and ReLU, or several of them in turn; None pools the instances as
            they are.  The last one is handed to the pooling as its ``embed``: compiled kernels do not store its output.
        hidden_dim, heads, gated, activation: as in `AttentionPool`; the bag vectors of all heads are concatenated.
        dropout: of the embedding and of the attention's hidden units, as in CLAM, in [0, 1].
        group: the ranks over which bags are spread, as in `AttentionPool`.

    ``forward`` returns ``Prediction(logits [B, C], pooled)``.  An empty bag is a bag vector of 0.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: Dims = 512,
        hidden_dim: int = 256,
        heads: int = 1,
        *,
        gated: bool = True,
        activation: str = "tanh",
        dropout: float = 0.0,
        group=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_count("num_classes", num_classes)
        self.in_dim = in_dim
        self.embed, width = _embedding("embed_dim", in_dim, embed_dim, dropout, **factory)
        options = {"gated": gated, "activation": activation, "dropout": dropout, "group": group}
        self.attention = AttentionPool(width, hidden_dim, heads, **options, **factory)
        self.classifier = nn.Linear(heads * width, num_classes, **factory)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Prediction:
        pooled = _pooled(self.attention, self.embed, x, offsets, mask, self.in_dim)
        return Prediction(self.classifier(pooled.bag.flatten(1)), pooled)


class DSMILModel(nn.Module):
    """DSMIL with its bag classifier (Li et al. 2021): the streams of `DSMIL`, their logits weighted as in v1, eq. 8.

    ``logits = lambda_ * instance_logits + (1 - lambda_) * bag_logits``, where ``instance_logits`` are the maxima of the
    first stream, and ``bag_logits`` come of a convolution through which every class sees the bag vectors of all.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        embed_dim: of an embedding, as in `ABMIL`; None takes the instances as they are, as the authors do.
        query_dim, options: as in `DSMIL`, by name: nonlinear_query, value, value_dim, value_dropout, scale, bias,
            group.
        dropout: of the embedding, in [0, 1]; only with one.
        lambda_: the share of the first stream, in [0, 1]; the final version of the paper has 1/2.

    ``forward`` returns ``DSMILPrediction(logits, bag_logits, instance_logits, pooled)``, all logits ``[B, C]``.  An
    empty bag has no maximum, so its ``logits`` are the ``bag_logits`` of a bag vector of 0; its ``instance_logits`` are
    -inf, and have to be left out of a loss.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: Dims = None,
        query_dim: int = 128,
        *,
        dropout: float = 0.0,
        lambda_: float = 0.5,
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_share("lambda_", lambda_)
        if embed_dim is None and dropout:
            raise ValueError(f"dropout is that of the embedding, which needs embed_dim; got {dropout}, embed_dim=None")
        self.in_dim, self.lambda_ = in_dim, lambda_
        self.embed, width = _embedding("embed_dim", in_dim, embed_dim, dropout, **factory)
        self.streams = DSMIL(width, num_classes, query_dim, **options, **factory)
        self.classifier = nn.Conv1d(num_classes, num_classes, self.streams.value_dim, **factory)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> DSMILPrediction:
        pooled = _pooled(self.streams, self.embed, x, offsets, mask, self.in_dim)
        bag_logits = self.classifier(pooled.bag).squeeze(2)
        logits = self.lambda_ * pooled.values + (1 - self.lambda_) * bag_logits
        logits = torch.where(pooled.values == -torch.inf, bag_logits, logits)  # critical has a -1 also for other ranks
        return DSMILPrediction(logits, bag_logits, pooled.values, pooled)

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}"


class LossAttentionModel(nn.Module):
    """Loss-based attention (Shi et al. 2020): embed each instance, pool it by how sure the bag's classifier is of it.

    The instances' logits, on which its authors train too, are ``pooled.logits``; -inf in masked rows.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        hidden_dims: of the embedding, a linear layer and ReLU each; empty takes the instances as they are.  The last
            one is handed to the pooling, as in `ABMIL`.
        dropout: after each layer of the embedding, in [0, 1]; only with one.
        group: the ranks over which bags are spread, as in `LossAttention`.
        factory: device and dtype.

    ``forward`` returns ``Prediction(logits [B, C], pooled)``.  An empty bag is a bag vector of 0.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        hidden_dims: Sequence[int] = (256, 128, 64),
        *,
        dropout: float = 0.0,
        group=None,
        **factory,
    ):
        super().__init__()
        self.in_dim = in_dim
        self.embed, width = _hidden_embedding(in_dim, hidden_dims, dropout, **factory)
        self.attention = LossAttention(width, num_classes, group=group, **factory)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Prediction:
        pooled = _pooled(self.attention, self.embed, x, offsets, mask, self.in_dim)
        logits = F.linear(pooled.bag[:, 0], self.attention.weight, self.attention.bias)
        return Prediction(logits, pooled)


# Pooling functions without parameters: max, mean, and the classical ones

_EXPONENTS = {"log_sum_exp": 1.0, "generalized_mean": 3.0}
_Ragged = tuple[Tensor | None, Tensor | None]  # offsets and mask


def _pool(pooling: str, x: Tensor, bags: _Ragged, r: float | None) -> Tensor:
    offsets, mask = bags
    if pooling == "max":
        return ops.max_pool(x, offsets, mask=mask).values
    if pooling == "mean":
        return ops.mean_pool(x, offsets, mask=mask)
    pool = ops.log_sum_exp_pool if pooling == "log_sum_exp" else ops.generalized_mean_pool
    return pool(x, offsets, r=r, mask=mask)


def _log_sum_exp(z: Tensor, bags: _Ragged) -> Tensor:
    """The log-sum-exp over the instances of each bag: ``[B, C]``."""
    offsets, mask = bags
    return ops.softmax_pool(z[:, :1], z, offsets, mask=mask).lse


def _mean_logits(z: Tensor, bags: _Ragged) -> Tensor:
    return _log_sum_exp(F.logsigmoid(z), bags) - _log_sum_exp(F.logsigmoid(-z), bags)


def _noisy_or_logits(z: Tensor, bags: _Ragged) -> Tensor:
    """``log((1 - q) / q)`` of q, the product of ``1 - sigmoid(z)``: no probability is rounded to 1, or to 0."""
    of_one = F.softplus(z)  # -log(1 - sigmoid(z))
    offsets, mask = bags
    none = ops.weighted_pool(of_one, torch.ones_like(z[:, :1]), offsets, mask=mask)[:, 0]  # -log q
    few = 1e-4
    large = none.clamp(min=few)
    low = z < -20  # softplus is exp there, which underflows where its logarithm does not
    logarithms = torch.where(low, z, of_one.masked_fill(low, 1).log())
    return torch.where(none < few, _log_sum_exp(logarithms, bags) + none / 2, large + torch.log(-torch.expm1(-large)))


# Poolings of probabilities whose logit is better computed without the probability.  ISR's is the logarithm of the
# summed odds exp(z).
_LOGITS: dict[str, Callable[[Tensor, _Ragged], Tensor]] = {
    "max": lambda z, bags: _pool("max", z, bags, None),
    "mean": _mean_logits,
    "noisy_or": _noisy_or_logits,
    "isr": _log_sum_exp,
}


class _Pooling(nn.Module):
    """The embedding, the classifier and the choice of a pooling function."""

    POOLINGS: tuple[str, ...]

    def __init__(
        self,
        in_dim: int,
        num_classes: int = 1,
        hidden_dims: Sequence[int] = (256, 128, 64),
        pooling: str = "max",
        *,
        dropout: float = 0.0,
        r: float | None = None,
        **factory,
    ):
        super().__init__()
        check_choice("pooling", pooling, self.POOLINGS)
        check_count("num_classes", num_classes)
        if r is None:
            r = _EXPONENTS.get(pooling)
        elif pooling not in _EXPONENTS:
            raise ValueError(f"r is the exponent of {' and '.join(_EXPONENTS)}; got {r} beside pooling={pooling!r}")
        else:
            check_exponent(r)
        self.in_dim, self.pooling, self.r = in_dim, pooling, r
        self.embed, width = _hidden_embedding(in_dim, hidden_dims, dropout, **factory)
        self.classifier = nn.Linear(width, num_classes, **factory)

    def extra_repr(self) -> str:
        return f"pooling={self.pooling!r}" + ("" if self.r is None else f", r={self.r}")


class InstancePooling(_Pooling):
    """Instance-level MIL (mi-Net in Wang et al. 2018; "Instance+max" and "Instance+mean" in later papers): classify
    each instance, pool the probabilities ``sigmoid(instance_logits)`` class by class.

    Args:
        in_dim: features of an instance.
        num_classes: C, that do not exclude each other.
        hidden_dims: of the embedding, a linear layer and ReLU each; empty takes the instances as they are.
        pooling: max, mean, log_sum_exp, generalized_mean, noisy_or or isr: see `milkernels.ops.classical`.
        dropout: after each layer of the embedding, in [0, 1]; only with one.
        r: the exponent of log_sum_exp (None: 1) and generalized_mean (None: 3).
        factory: device and dtype.

    ``forward`` returns ``InstancePrediction(logits [B, C], instance_logits [N, C])``; ``sigmoid(logits)`` are the
    pooled probabilities, and logits are float32 at least.  Those of max, mean, noisy_or and isr come from the
    instances' logits, so that bags of many or of sure instances do not saturate.  For the others probabilities are kept
    between eps and 1 - eps, beyond which there is no gradient.  An empty bag has eps.
    """

    POOLINGS = ("max", "mean", "log_sum_exp", "generalized_mean", "noisy_or", "isr")

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> InstancePrediction:
        values, offsets, mask = _embed(self.embed, x, offsets, mask, self.in_dim, self.classifier)
        instance_logits, offsets, mask = _instance_logits(self, values, offsets, mask)
        z = instance_logits.to(torch.promote_types(instance_logits.dtype, torch.float32))
        eps, bags = torch.finfo(z.dtype).eps, (offsets, mask)
        if self.pooling in _LOGITS:
            logits = _LOGITS[self.pooling](z, bags)
            there = ops.mean_pool(torch.ones_like(z[:, :1]), offsets, mask=mask) > 0
            logits = torch.where(there, logits, torch.full_like(logits, eps).logit())
        else:
            logits = _pool(self.pooling, z.sigmoid(), bags, self.r).logit(eps)
        if mask is not None:
            instance_logits = instance_logits.masked_fill(~mask[:, None], -torch.inf)
        return InstancePrediction(logits, instance_logits)


class EmbeddingPooling(_Pooling):
    """Embedding-level MIL (MI-Net in Wang et al. 2018; "Embedding+max" and "Embedding+mean" in later papers): pool the
    embedded instances feature by feature, classify the bag.

    Args:
        in_dim, hidden_dims, dropout, r, factory: as in `InstancePooling`.
        num_classes: C.
        pooling: max, mean, log_sum_exp or generalized_mean; the last needs hidden_dims, after which no feature is
            negative.

    ``forward`` returns ``Prediction(logits [B, C], pooled [B, L])``.  An empty bag is a bag vector of 0.
    """

    POOLINGS = ("max", "mean", *_EXPONENTS)

    def __init__(
        self,
        in_dim: int,
        num_classes: int = 1,
        hidden_dims: Sequence[int] = (256, 128, 64),
        pooling: str = "max",
        **options,
    ):
        super().__init__(in_dim, num_classes, hidden_dims, pooling, **options)
        if pooling == "generalized_mean" and not hidden_dims:
            raise ValueError(f"generalized_mean takes no negative features, so it needs hidden_dims; got {hidden_dims}")

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Prediction:
        values, offsets, mask = _embed(self.embed, x, offsets, mask, self.in_dim, self.classifier)
        pooled = _pool(self.pooling, values, (offsets, mask), self.r)
        return Prediction(self.classifier(pooled), pooled)
