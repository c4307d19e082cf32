"""Modules: the parameters of the ops in ``functional``, and small complete models made of them.

Every ``forward(x, offsets=None, mask=None)`` takes bags in any of these forms, and copies none of them:

- `Bags`; then ``offsets`` and ``mask`` are None, as the bags have their own.
- ``x [N, L]`` with ``offsets [B + 1]``, or without: one bag.  ``mask [N]`` or None.
- Padded ``x [B, M, L]`` with ``mask [B, M]``, non-zero = real, or None: all are.  ``offsets`` is None.
- A jagged nested tensor ``[B, ragged, L]``; ``offsets`` and ``mask`` are None.

A list of bags becomes one by ``Bags.from_list``.  Results are those of the ops, with their conventions: a field with a
row per instance has one per row of the flattened batch, padding included.

>>> import torch
>>> from milkernels import Bags, attention_weights
>>> from milkernels.nn import ABMIL, AttentionPool
>>> bags = Bags.from_list([torch.randn(5, 512), torch.randn(9, 512)])
>>> pooled = AttentionPool(512, heads=2)(bags)
>>> pooled.bag.shape, attention_weights(pooled, bags.offsets).shape
(torch.Size([2, 2, 512]), torch.Size([14, 2]))
>>> ABMIL(512, num_classes=3)(bags).logits.shape
torch.Size([2, 3])

**Parameters** are created and initialised as those of ``torch.nn.Linear``, and ``device`` and ``dtype`` mean the same.
**Dropout** acts in training mode only; its seeds come from PyTorch's default generator, so ``manual_seed`` repeats it.
**Errors** are TypeError and ValueError that name the argument and the value got.  Constructors raise them for a size
below 1, an unknown choice, a share outside of [0, 1] and an option without what it is for; ``forward`` for bags in none
of these forms or of another width, and for what the ops check.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from milkernels import functional, results
from milkernels.arguments import check_choice, check_count, check_instances, check_number, checked_mask
from milkernels.bags import Bags
from milkernels.reference import ACTIVATIONS

Instances = Tensor | Bags
Seed = Tensor | int | None
VALUES = (None, "linear", "relu")


class Prediction(NamedTuple):
    """What a model returns."""

    logits: Tensor  # [B, C]
    pooled: results.Pooled | results.LossAttentionPooled  # of the embedded instances


class DSMILPrediction(NamedTuple):
    """What `DSMILModel` returns; its authors train on the losses of both streams."""

    logits: Tensor  # [B, C]  both streams, weighted
    bag_logits: Tensor  # [B, C]  the second stream
    instance_logits: Tensor  # [B, C]  the first stream: each bag's maximum, -inf for an empty bag
    pooled: results.DSMIL


# Arguments


def _ragged(
    x: Instances, offsets: Tensor | None, mask: Tensor | None, width: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(values [N, L], offsets, mask [N])`` of bags in any form; ``width`` is the L that is needed."""
    if not isinstance(x, Bags | Tensor):
        hint = "; make one of them by Bags.from_list" if isinstance(x, list | tuple) else ""
        raise TypeError(f"x must be a tensor or Bags; got {type(x).__name__}{hint}")
    if isinstance(x, Bags) or x.is_nested:
        if offsets is not None or mask is not None:
            got = [None if t is None else type(t).__name__ for t in (offsets, mask)]
            raise ValueError(f"offsets and mask must be None beside Bags or a nested tensor; got {got}")
        x = x if isinstance(x, Bags) else Bags.from_nested(x)
    elif x.ndim == 3:
        if offsets is not None:
            raise ValueError(f"offsets must be None beside a padded batch; got {type(offsets).__name__}")
        x = Bags.from_padded(x, mask)
    if isinstance(x, Bags):
        x, offsets, mask = x.values, x.offsets, x.mask
    check_instances(x)
    if width is not None and x.shape[1] != width:
        raise ValueError(f"x must have in_dim={width} features; got shape {tuple(x.shape)}")
    return x, offsets, mask


def _per_row(name: str, t: Tensor, x: Instances) -> Tensor:
    """What came with ``x``, in its form or as rows, as rows."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    if not t.is_nested and t.ndim != 3:
        return t
    if not isinstance(x, Tensor) or t.is_nested != x.is_nested or t.shape[:2] != x.shape[:2]:
        got = "a nested tensor" if t.is_nested else "shape"
        raise ValueError(f"{name} must be [N, K], or begin with the dimensions of x; got {got} {tuple(t.shape)}")
    return Bags.from_nested(t).values if t.is_nested else t.flatten(0, 1)


def _check_share(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1; got {value}")


class _Linears(nn.Module):
    """A module with parameters of linear layers: ``<prefix>weight [out, in]``, ``<prefix>bias [out]`` or None."""

    def _add_linear(self, prefix: str, in_dim: int, out_dim: int, bias: bool, **factory) -> None:
        weight = nn.Parameter(torch.empty(out_dim, in_dim, **factory))
        self.register_parameter(f"{prefix}weight", weight)
        self.register_parameter(f"{prefix}bias", nn.Parameter(torch.empty(out_dim, **factory)) if bias else None)

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as ``torch.nn.Linear`` does."""
        for name, weight in self.named_parameters(recurse=False):
            if not name.endswith("weight"):
                continue
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bias = getattr(self, name.replace("weight", "bias"))
            if bias is not None:
                bound = weight.shape[1] ** -0.5
                nn.init.uniform_(bias, -bound, bound)

    def _describe(self, *names: str) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


# Poolings


class AttentionPool(_Linears):
    """Attention pooling (Ilse, Tomczak, Welling 2018, eq. 8), gated by default (eq. 9; Lu et al. 2021, CLAM).

    ``scores[i, k] = w_k . (act(V x_i + b_V) * sigmoid(U x_i + b_U)) + c_k``, without the sigmoid if not ``gated``.

    Args:
        in_dim: L, features of an instance.
        hidden_dim: D, hidden units.
        heads: K, attention distributions, each with a bag vector of its own.
        gated: whether there is a U.
        activation: tanh, relu, gelu (exact) or identity.
        dropout: the share of hidden units dropped in training, on both branches independently, in [0, 1].
        bias: whether V and U have biases.
        score_bias: whether w has one; the softmax does not see it, the scores do.

    Attributes:
        v_weight, u_weight: ``[D, L]``; v_bias, u_bias: ``[D]`` or None.  u_* only if gated.
        w_weight: ``[K, D]``; w_bias: ``[K]`` or None.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int = 128,
        heads: int = 1,
        *,
        gated: bool = True,
        activation: str = "tanh",
        dropout: float = 0.0,
        bias: bool = True,
        score_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("heads", heads)):
            check_count(name, size)
        check_choice("activation", activation, ACTIVATIONS)
        _check_share("dropout", dropout)
        self.in_dim, self.hidden_dim, self.heads = in_dim, hidden_dim, heads
        self.gated, self.activation, self.dropout = gated, activation, dropout
        self.bias, self.score_bias = bias, score_bias
        for prefix in ("v_", "u_") if gated else ("v_",):
            self._add_linear(prefix, in_dim, hidden_dim, bias, device=device, dtype=dtype)
        self._add_linear("w_", hidden_dim, heads, score_bias, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(
        self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None, *, seed: Seed = None
    ) -> results.Pooled:
        """``Pooled(bag [B, K, L], scores [N, K], lse [B, K])``; ``seed`` fixes what dropout drops."""
        values, offsets, mask = _ragged(x, offsets, mask, self.in_dim)
        pool, gate = functional.attention_pool, ()
        if self.gated:
            pool, gate = functional.gated_attention_pool, (self.u_weight, self.u_bias)
        parameters = (self.v_weight, self.v_bias, *gate, self.w_weight, self.w_bias)
        dropout = {"dropout_p": self.dropout if self.training else 0.0, "seed": seed}
        return pool(values, *parameters, offsets, activation=self.activation, mask=mask, **dropout)

    def extra_repr(self) -> str:
        sizes = ("in_dim", "hidden_dim", "heads")
        return self._describe(*sizes, "gated", "activation", "dropout", "bias", "score_bias")


class SoftmaxPool(nn.Module):
    """Pooling by given scores: `functional.softmax_pool`."""

    def forward(
        self, x: Instances, scores: Tensor, offsets: Tensor | None = None, mask: Tensor | None = None
    ) -> results.Pooled:
        """``Pooled(bag [B, K, L], scores [N, K], lse [B, K])``.

        ``scores`` are ``[N, K]``, one row per row of ``x``; beside padded or nested ``x`` also in its form.
        """
        values, offsets, mask = _ragged(x, offsets, mask)
        return functional.softmax_pool(values, _per_row("scores", scores, x), offsets, mask=mask)


class DSMIL(_Linears):
    """Both streams of DSMIL (Li, Li, Eliceiri 2021, eqs. 3 to 7): an instance classifier, whose largest logit names
    the critical instance of a bag and class, and a pooling by the distance of queries to the critical one's.

    The defaults are what its authors ship: ``BClassifier(nonlinear=True, passing_v=False)``.  The paper (v1) has
    ``nonlinear_query=False, value="linear", scale=1.0``.

    Args:
        in_dim: L, features of an instance.
        num_classes: C.
        query_dim: Q, of the query and of its hidden layer.
        nonlinear_query: ``q(x) = tanh(W2 relu(W x + b) + b2)``, otherwise ``W x + b``.
        value: what is pooled.  None: the instance itself; "linear": ``V x + b_V`` (eq. 4); "relu": its positive part
            (the authors' ``passing_v``).
        value_dim: Lv, None for L; only with a value.
        value_dropout: the share of the value's inputs dropped in training, in [0, 1]; only with a value.
        scale: of the scores.  None is ``Q ** -0.5`` as the authors have it; the paper (v1, eq. 5) has 1.
        bias: whether the classifier, query and value have biases.

    Attributes:
        weight: ``[C, L]``; bias: ``[C]`` or None: the instance classifier.
        q_weight: ``[Q, L]``; q2_weight: ``[Q, Q]``, only if nonlinear; q_bias, q2_bias: ``[Q]`` or None.
        v_weight: ``[Lv, L]``; v_bias: ``[Lv]`` or None; only with a value.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int = 1,
        query_dim: int = 128,
        *,
        nonlinear_query: bool = True,
        value: str | None = None,
        value_dim: int | None = None,
        value_dropout: float = 0.0,
        scale: float | None = None,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_choice("value", value, VALUES)
        if value is None and (value_dim is not None or value_dropout):
            raise ValueError(f"value_dim and value_dropout need a value; got {value_dim}, {value_dropout}, value=None")
        _check_share("value_dropout", value_dropout)
        value_dim = in_dim if value_dim is None else value_dim
        sizes = {"in_dim": in_dim, "num_classes": num_classes, "query_dim": query_dim, "value_dim": value_dim}
        for name, size in sizes.items():
            check_count(name, size)
        if scale is not None:
            check_number("scale", scale)
        self.in_dim, self.num_classes, self.query_dim, self.value_dim = sizes.values()
        self.nonlinear_query, self.scale = nonlinear_query, scale
        self.value, self.value_dropout = value, value_dropout
        layers = [("", in_dim, num_classes), ("q_", in_dim, query_dim)]
        layers += [("q2_", query_dim, query_dim)] if nonlinear_query else []
        layers += [("v_", in_dim, value_dim)] if value else []
        for layer in layers:
            self._add_linear(*layer, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(
        self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None, *, seed: Seed = None
    ) -> results.DSMIL:
        """``DSMIL(bag [B, C, Lv], scores [N, C], lse, critical, values [B, C], logits [N, C])``; ``seed`` fixes what
        dropout drops."""
        values, offsets, mask = _ragged(x, offsets, mask, self.in_dim)
        options = {"seed": seed, "scale": self.scale, "mask": mask}
        if self.nonlinear_query:
            options |= {"q2_weight": self.q2_weight, "q2_bias": self.q2_bias}
        if self.value:
            options |= {"v_weight": self.v_weight, "v_bias": self.v_bias}
            options |= {"v_activation": None if self.value == "linear" else self.value}
            options |= {"v_dropout_p": self.value_dropout if self.training else 0.0}
        return functional.dsmil(values, self.weight, self.bias, self.q_weight, self.q_bias, offsets, **options)

    def extra_repr(self) -> str:
        value = ("value_dim", "value_dropout") if self.value else ()
        options = self._describe("nonlinear_query", "value", *value, "scale")
        return f"{self._describe('in_dim', 'num_classes', 'query_dim')}, {options}, bias={self.bias is not None}"


class LossAttention(_Linears):
    """Loss-based attention (Shi et al. 2020): ``scores[i] = log sum_c exp(w_c . x_i + b_c)``.

    The parameters are those of the bag classifier: ``F.linear(pooled.bag[:, 0], weight, bias)`` are the bag's logits.

    Args:
        in_dim: L, features of an instance.
        num_classes: C.
        bias: whether there is one.

    Attributes:
        weight: ``[C, L]``; bias: ``[C]`` or None.
    """

    def __init__(self, in_dim: int, num_classes: int, bias: bool = True, *, device=None, dtype=None):
        super().__init__()
        check_count("in_dim", in_dim)
        check_count("num_classes", num_classes)
        self.in_dim, self.num_classes = in_dim, num_classes
        self._add_linear("", in_dim, num_classes, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(
        self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None
    ) -> results.LossAttentionPooled:
        """``LossAttentionPooled(bag [B, 1, L], scores [N, 1], lse [B, 1], logits [N, C])``."""
        values, offsets, mask = _ragged(x, offsets, mask, self.in_dim)
        return functional.loss_attention_pool(values, self.weight, self.bias, offsets, mask=mask)

    def extra_repr(self) -> str:
        return f"{self._describe('in_dim', 'num_classes')}, bias={self.bias is not None}"


class MeanPool(nn.Module):
    """The mean of each bag: `functional.mean_pool`."""

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``[B, L]``."""
        values, offsets, mask = _ragged(x, offsets, mask)
        return functional.mean_pool(values, offsets, mask=mask)


class MaxPool(nn.Module):
    """The maximum of each bag, feature by feature: `functional.max_pool`."""

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> results.MaxPooled:
        """``MaxPooled(values [B, L], indices [B, L])``."""
        values, offsets, mask = _ragged(x, offsets, mask)
        return functional.max_pool(values, offsets, mask=mask)


# Models


def _embedding(name: str, in_dim: int, dims: Sequence[int], dropout: float, **factory):
    """``(module, width)``: Linear, ReLU, Dropout for each of ``dims``; without any, the instances as they are."""
    check_count("in_dim", in_dim)
    _check_share("dropout", dropout)
    layers = []
    for dim in dims:
        check_count(name, dim)
        layers += [nn.Linear(in_dim, dim, **factory), nn.ReLU(), nn.Dropout(dropout)]
        in_dim = dim
    return nn.Sequential(*layers), in_dim


def _embed(embed: nn.Sequential, x, offsets, mask, in_dim: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The bags as `_ragged` gives them, embedded."""
    values, offsets, mask = _ragged(x, offsets, mask, in_dim)
    if len(embed) == 0:
        return values, offsets, mask
    mask = checked_mask(mask, values)
    if mask is not None:
        # The embedding's weight gradient multiplies all rows by theirs, which is 0 here; 0 * NaN is NaN.
        values = values.masked_fill(~mask[:, None], 0)
    return embed(values), offsets, mask


class ABMIL(nn.Module):
    """Attention-based MIL (Ilse et al. 2018): embed each instance, pool by attention, classify the bag.

    With ``gated=True`` and one head this is also CLAM's backbone (Lu et al. 2021), without its instance loss.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        embed_dim: of the embedding, a linear layer and ReLU; None pools the instances as they are.
        hidden_dim, heads, gated, activation: as in `AttentionPool`; the bag vectors of all heads are concatenated.
        dropout: of the embedding and of the attention's hidden units, as in CLAM, in [0, 1].

    ``forward`` returns ``Prediction(logits [B, C], pooled)``.  An empty bag is a bag vector of 0.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int | None = 512,
        hidden_dim: int = 256,
        heads: int = 1,
        *,
        gated: bool = True,
        activation: str = "tanh",
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        check_count("num_classes", num_classes)
        dims = () if embed_dim is None else (embed_dim,)
        self.in_dim = in_dim
        self.embed, width = _embedding("embed_dim", in_dim, dims, dropout, **factory)
        options = {"gated": gated, "activation": activation, "dropout": dropout}
        self.attention = AttentionPool(width, hidden_dim, heads, **options, **factory)
        self.classifier = nn.Linear(heads * width, num_classes, **factory)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Prediction:
        pooled = self.attention(*_embed(self.embed, x, offsets, mask, self.in_dim))
        return Prediction(self.classifier(pooled.bag.flatten(1)), pooled)


class DSMILModel(nn.Module):
    """DSMIL with its bag classifier (Li et al. 2021): the streams of `DSMIL`, their logits weighted as in v1, eq. 8.

    ``logits = lambda_ * instance_logits + (1 - lambda_) * bag_logits``, where ``instance_logits`` are the maxima of the
    first stream, and ``bag_logits`` come of a convolution through which every class sees the bag vectors of all.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        embed_dim: of an embedding, a linear layer and ReLU; None takes the instances as they are, as the authors do.
        query_dim, options: as in `DSMIL`, by name: nonlinear_query, value, value_dim, value_dropout, scale, bias.
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
        embed_dim: int | None = None,
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
        _check_share("lambda_", lambda_)
        if embed_dim is None and dropout:
            raise ValueError(f"dropout is that of the embedding, which needs embed_dim; got {dropout}, embed_dim=None")
        dims = () if embed_dim is None else (embed_dim,)
        self.in_dim, self.lambda_ = in_dim, lambda_
        self.embed, width = _embedding("embed_dim", in_dim, dims, dropout, **factory)
        self.streams = DSMIL(width, num_classes, query_dim, **options, **factory)
        self.classifier = nn.Conv1d(num_classes, num_classes, self.streams.value_dim, **factory)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> DSMILPrediction:
        pooled = self.streams(*_embed(self.embed, x, offsets, mask, self.in_dim))
        bag_logits = self.classifier(pooled.bag).squeeze(2)
        logits = self.lambda_ * pooled.values + (1 - self.lambda_) * bag_logits
        logits = torch.where(pooled.critical < 0, bag_logits, logits)
        return DSMILPrediction(logits, bag_logits, pooled.values, pooled)

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}"


class LossAttentionModel(nn.Module):
    """Loss-based attention (Shi et al. 2020): embed each instance, pool it by how sure the bag's classifier is of it.

    The instances' logits, on which its authors train too, are ``pooled.logits``; -inf in masked rows.

    Args:
        in_dim: features of an instance.
        num_classes: C.
        hidden_dims: of the embedding, a linear layer and ReLU each; empty takes the instances as they are.
        dropout: after each layer of the embedding, in [0, 1]; only with one.
        factory: device and dtype.

    ``forward`` returns ``Prediction(logits [B, C], pooled)``.  An empty bag is a bag vector of 0.
    """

    def __init__(
        self, in_dim: int, num_classes: int, hidden_dims: Sequence[int] = (256, 128, 64), *, dropout=0.0, **factory
    ):
        super().__init__()
        if not hidden_dims and dropout:
            raise ValueError(f"dropout is that of the embedding, which needs hidden_dims; got {dropout}, {hidden_dims}")
        self.in_dim = in_dim
        self.embed, width = _embedding("hidden_dims", in_dim, hidden_dims, dropout, **factory)
        self.attention = LossAttention(width, num_classes, **factory)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Prediction:
        pooled = self.attention(*_embed(self.embed, x, offsets, mask, self.in_dim))
        logits = nn.functional.linear(pooled.bag[:, 0], self.attention.weight, self.attention.bias)
        return Prediction(logits, pooled)
