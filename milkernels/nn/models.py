"""Small whole models: an embedding of the instances, a pooling, a classifier."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milkernels import ops, results
from milkernels._torch import called_hooks, has_global_hooks, has_own, is_traceable_wrapper_subclass
from milkernels.arguments import DTYPES, check_choice, check_count, check_flag, check_share, check_type
from milkernels.bags import Parts
from milkernels.dtypes import compute_dtype_of
from milkernels.layers import Embed
from milkernels.nn.pools import DSMIL, AttentionPool, Instances, LossAttention, ragged
from milkernels.ops.classical import check_exponent
from milkernels.ops.embedding import embedded, embedding_of
from milkernels.ragged import checked_mask

Dims = int | Sequence[int] | None


class Prediction(NamedTuple):
    """What a model returns.

    Attributes:
        logits: ``[B, C]``.
        pooled: what the pooling of the embedded instances returned; a tensor is ``[B, L]``.
    """

    logits: Tensor
    pooled: results.Pooled | results.LossAttentionPooled | Tensor


class InstancePrediction(NamedTuple):
    """What `InstancePooling` returns.

    Attributes:
        logits: ``[B, C]``.
        instance_logits: ``[N, C]``, -inf in masked rows.
    """

    logits: Tensor
    instance_logits: Tensor


class SidePrediction(NamedTuple):
    """What `MINetDS` returns.

    Attributes:
        logits: ``[B, C]``.
        side_logits: ``[B, layers, C]``, of the bag as each layer of the embedding has it.
    """

    logits: Tensor
    side_logits: Tensor


class CLAMPrediction(NamedTuple):
    """What `CLAM` returns; K is 1, or C with a branch for each class.

    Attributes:
        logits: ``[B, C]``.
        pooled: what the pooling of the embedded instances returned.
        instances: ``[B, K, 2, k]`` rows of ``x``: the k attended most, then the k attended least, the most extreme
            first; -1 past the end of a bag.
        instance_logits: ``[B, C, 2, k, 2]`` of these, by each class: negative and positive; 0 where there is none.
    """

    logits: Tensor
    pooled: results.Pooled
    instances: Tensor
    instance_logits: Tensor


class DSMILPrediction(NamedTuple):
    """What `DSMILModel` returns; its authors train on the losses of both streams.

    Attributes:
        logits: ``[B, C]``, both streams, weighted.
        bag_logits: ``[B, C]``, the second stream.
        instance_logits: ``[B, C]``, the first stream: the maximum of each bag, -inf for an empty one.
        pooled: what `DSMIL` returned.
    """

    logits: Tensor
    bag_logits: Tensor
    instance_logits: Tensor
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
    check_feature_type(values, first)
    if layers:
        values, mask = _cleared(values, mask)
    for layer in layers:
        values = layer(values)
    return values, mask


def check_feature_type(x: Tensor, layer: nn.Module) -> None:
    """A layer of PyTorch takes features of its own type, outside of autocast; a pool of the ops also narrower ones, and
    of wider ones makes what the classifier behind it does not take."""
    weight = next(layer.parameters(), x)
    pools = isinstance(layer, (AttentionPool, DSMIL, LossAttention))
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

    With ``gated=True`` and one head this is also the backbone of `CLAM`, without its instance loss.

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
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
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


# CLAM, whose instances attended most and least are classified too


def most_and_least(scores: Tensor, k: int, offsets: Tensor | None, mask: Tensor | None) -> Tensor:
    """``[B, K, 2, k]``: rows of the k largest and the k smallest scores of each bag and head; -1 past a bag's end."""
    scores = scores.detach()
    chosen = (ops.topk_instances(scores, k, offsets, largest=largest, mask=mask) for largest in (True, False))
    return torch.stack([top.indices for top in chosen], 2)


def logits_of_rows(
    x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, embed: Embed | None, seed: Tensor | int | None
) -> Tensor:
    """``[B, C, 2, k, 2]`` of instances ``rows [B, K, 2, k]``, embedded: each class has two rows of ``weight [2 C, E]``,
    and looks at its own head, or at the only one.  0 where a row is -1."""
    if len(x) == 0:
        x = F.pad(x, (0, 0, 0, 1))
    there, flat = rows >= 0, rows.clamp(min=0).flatten()
    embedding, _ = embedding_of(x, embed, seed)
    h = x.index_select(0, flat)
    if embedding.parameters:
        h = embedded(h, there.flatten(), *embedding.arguments, rows=flat)
    else:
        h = h.masked_fill(~there.flatten()[:, None], 0)  # a row that is not there may hold NaN
    h = h.to(weight.dtype).unflatten(0, rows.shape).flatten(2, 3)  # [B, K, 2 k, E]
    logits = h @ weight.unflatten(0, (-1, 2)).transpose(1, 2)  # [B, C, 2 k, 2]
    if bias is not None:
        logits = logits + bias.unflatten(0, (-1, 1, 2))
    return logits.unflatten(2, rows.shape[2:]).masked_fill(~there[..., None], 0)


class CLAM(nn.Module):
    """CLAM (Lu et al. 2021): embed each instance, pool by gated attention, classify the bag, and the instances attended
    most and least, on which `milkernels.losses.clam_loss` trains too.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        embed_dim: of the embedding, as in `ABMIL`.
        hidden_dim, gated: of the attention, as in `AttentionPool`.
        multi_branch: an attention branch and a bag vector for each class, as in the paper (CLAM_MB); otherwise one for
            all of them (CLAM_SB).
        k: instances attended most, and as many attended least, that are classified: B in the paper, which has 8.
        dropout: of the embedding and of the attention's hidden units, in [0, 1]; the paper has 0.25.

    ``forward`` returns ``CLAMPrediction(logits [B, C], pooled, instances, instance_logits)``.  The instances are chosen
    by their scores, without the labels, and embedded again, all others never outside of the pooling.  A bag of fewer
    than 2 k instances has some on both sides, as in the authors' code, and one of fewer than k has -1 among them.

    >>> import torch
    >>> from milkernels import Bags
    >>> from milkernels.nn import CLAM
    >>> bags = Bags.from_list([torch.randn(n, 32) for n in (40, 25)])
    >>> prediction = CLAM(32, num_classes=3, embed_dim=16, hidden_dim=16, multi_branch=True, k=4)(bags)
    >>> prediction.logits.shape, prediction.instance_logits.shape
    (torch.Size([2, 3]), torch.Size([2, 3, 2, 4, 2]))
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: Dims = 512,
        hidden_dim: int = 256,
        *,
        multi_branch: bool = False,
        gated: bool = True,
        k: int = 8,
        dropout: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_count("num_classes", num_classes)
        check_count("k", k)
        check_flag("multi_branch", multi_branch)
        self.in_dim, self.multi_branch, self.k = in_dim, multi_branch, k
        self.embed, width = _embedding("embed_dim", in_dim, embed_dim, dropout, **factory)
        heads = num_classes if multi_branch else 1
        self.attention = AttentionPool(width, hidden_dim, heads, gated=gated, dropout=dropout, **factory)
        self.classifier = nn.Linear(width, num_classes, **factory)
        self.instance_classifier = nn.Linear(width, 2 * num_classes, **factory)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> CLAMPrediction:
        # As in `_pooled`, but the last layer is needed again, for the instances that are classified.
        last = _last_layer(self.embed) if _is_plain(self.attention, AttentionPool) else None
        before = self.embed if last is None else self.embed[:-3]
        values, offsets, mask = _embed(before, x, offsets, mask, self.in_dim, self.attention)
        if not isinstance(values, Tensor):
            raise TypeError(f"x must have its instances at hand, some are classified; got {type(values).__name__}")
        options, seed = {}, None
        if last is not None:
            # The same seed drops the same units of an instance, pooled or classified.
            drops = max(last.dropout_p, self.attention.dropout if self.training else 0.0) > 0
            seed = torch.randint(2**63 - 1, (1,), device=values.device) if drops else None
            options = {"embed": last, "seed": seed}
        pooled = self.attention(values, offsets, mask, **options)
        if self.multi_branch:
            logits = (pooled.bag * self.classifier.weight).sum(2) + self.classifier.bias
        else:
            logits = self.classifier(pooled.bag[:, 0])
        rows, classify = most_and_least(pooled.scores, self.k, offsets, mask), self.instance_classifier
        instance_logits = logits_of_rows(values, rows, classify.weight, classify.bias, last, seed)
        return CLAMPrediction(logits, pooled, rows, instance_logits)

    def extra_repr(self) -> str:
        return f"multi_branch={self.multi_branch}, k={self.k}"


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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
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
        group: Any = None,
        **factory: Any,
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
        **factory: Any,
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
        **options: Any,
    ):
        super().__init__(in_dim, num_classes, hidden_dims, pooling, **options)
        if pooling == "generalized_mean" and not hidden_dims:
            raise ValueError(f"generalized_mean takes no negative features, so it needs hidden_dims; got {hidden_dims}")

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Prediction:
        values, offsets, mask = _embed(self.embed, x, offsets, mask, self.in_dim, self.classifier)
        pooled = _pool(self.pooling, values, (offsets, mask), self.r)
        return Prediction(self.classifier(pooled), pooled)


MiNet, MINet = InstancePooling, EmbeddingPooling  # as Wang et al. call them: mi-Net and MI-Net


class _MultiLevel(EmbeddingPooling):
    """MI-Net that pools behind each layer of the embedding."""

    def __init__(self, in_dim: int, num_classes: int, hidden_dims: Sequence[int], pooling: str, **options: Any):
        super().__init__(in_dim, num_classes, hidden_dims, pooling, **options)
        if not hidden_dims:
            raise ValueError(f"hidden_dims must have a layer to pool behind; got {hidden_dims}")

    def _levels(self, x: Instances, offsets: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        """The bags as each layer has them: ``[B, width]``."""
        values, offsets, mask = ragged(x, offsets, mask, self.in_dim)
        pooled = []
        for first in range(0, len(self.embed), 3):  # Linear, ReLU, Dropout
            values, mask = _through(list(self.embed[first : first + 3]), values, mask, self.embed[first])
            pooled.append(_pool(self.pooling, values, (offsets, mask), self.r))
        return pooled


class MINetDS(_MultiLevel):
    """MI-Net with deep supervision (Wang et al. 2018, section 3.4): the instances are pooled behind each layer of the
    embedding, and each time the bag is classified.

    Train on the sum of the losses of ``side_logits``; ``logits`` are those of the mean of their probabilities.

    Args:
        in_dim, num_classes, pooling, options: as in `EmbeddingPooling`; dropout and r by name.
        hidden_dims: of the embedding, as many as there are classifiers: at least one.

    ``forward`` returns ``SidePrediction(logits [B, C], side_logits [B, len(hidden_dims), C])``.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int = 1,
        hidden_dims: Sequence[int] = (256, 128, 64),
        pooling: str = "max",
        **options: Any,
    ):
        super().__init__(in_dim, num_classes, hidden_dims, pooling, **options)
        factory = {name: options[name] for name in ("device", "dtype") if name in options}
        self.classifier = nn.ModuleList(nn.Linear(dim, num_classes, **factory) for dim in hidden_dims)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> SidePrediction:
        levels = self._levels(x, offsets, mask)
        sides = torch.stack([classify(bag) for classify, bag in zip(self.classifier, levels, strict=True)], 1)
        return SidePrediction(F.logsigmoid(sides).logsumexp(1) - F.logsigmoid(-sides).logsumexp(1), sides)


class MINetRC(_MultiLevel):
    """MI-Net with residual connections (Wang et al. 2018, section 3.5): the instances are pooled behind each layer of
    the embedding, and the sum of the bag vectors is classified.

    Args:
        in_dim, num_classes, pooling, options: as in `EmbeddingPooling`; dropout and r by name.
        hidden_dims: of the embedding, at least one, and all the same.

    ``forward`` returns ``Prediction(logits [B, C], pooled [B, L])``.  An empty bag is a bag vector of 0.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int = 1,
        hidden_dims: Sequence[int] = (128, 128, 128),
        pooling: str = "max",
        **options: Any,
    ):
        super().__init__(in_dim, num_classes, hidden_dims, pooling, **options)
        if len(set(hidden_dims)) > 1:
            raise ValueError(f"hidden_dims must all be the same, their bag vectors are added; got {hidden_dims}")

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Prediction:
        pooled = torch.stack(self._levels(x, offsets, mask)).sum(0)
        return Prediction(self.classifier(pooled), pooled)
