"""Poolings with their parameters, and bags in any form as the ops take them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from milkernels import ops, results
from milkernels.arguments import check_choice, check_count, check_flag, check_instances, check_number, check_share
from milkernels.bags import Bags, Parts
from milkernels.distributed import Ranks, all_critical, all_max, all_mean, all_merge, as_ranks, seed_of_rank
from milkernels.layers import ACTIVATIONS, Embed, as_linear
from milkernels.ops.segments import rows_at

Instances = Tensor | Bags | Parts
Seed = Tensor | int | None
VALUES = (None, "linear", "relu")


# Arguments


def ragged(
    x: Instances, offsets: Tensor | None, mask: Tensor | None, width: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(values [N, L], offsets, mask [N])`` of bags in any form; ``width`` is the L that is needed."""
    if isinstance(x, Parts):
        return x.expecting(width), offsets, mask
    if not isinstance(x, (Bags, Tensor)):
        hint = "; make one of them by Bags.from_list" if isinstance(x, (list, tuple)) else ""
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
    both = isinstance(x, Tensor) and t.is_nested == x.is_nested and t.layout == x.layout
    if not both or t.shape[:2] != x.shape[:2]:
        got = "a nested tensor" if t.is_nested else f"shape {tuple(t.shape)}"
        raise ValueError(f"{name} must be [N, K], or begin with the dimensions of x; got {got}")
    return Bags.from_nested(t).values if t.is_nested else t.flatten(0, 1)


class _Spread(nn.Module):
    """A module whose bags may be spread over the ranks of a group."""

    def __init__(self, group: Any = None):
        super().__init__()
        self.group: Ranks | None = None if group is None else as_ranks(group)

    def _merged(self, pooled, offsets: Tensor | None):
        """What this rank pooled, merged with what the others did."""
        if self.group is None:
            return pooled
        offsets = None if offsets is None else offsets.to(pooled.bag.device)  # those of a stream may be elsewhere
        return all_merge(pooled, self.group, offsets=offsets)

    def _seed(self, seed: Seed, x: Tensor | Parts, p: float, embed: Embed | None) -> Seed:
        """What the op is given: another seed on every rank where anything is dropped, since it counts rows from 0."""
        if self.group is None:
            return seed
        drops = p or (isinstance(embed, (tuple, list)) and Embed(*embed).dropout_p)  # what else it is, the op refuses
        if not drops:
            return seed
        if seed is None:
            seed = torch.randint(2**63 - 1, (1,), device=x.device if isinstance(x, Tensor) else None)
        return seed_of_rank(seed, self.group)

    def _describe_group(self) -> str:
        return "" if self.group is None else f", group={self.group.name!r} of {self.group.size}"


class _Linears(_Spread):
    """A module with parameters of linear layers: ``<prefix>weight [out, in]``, ``<prefix>bias [out]`` or None."""

    in_dim: int

    def _width(self, embed: Embed | None) -> int | None:
        """Features that the instances have to have; None where those of their embedding count, which the op checks."""
        return self.in_dim if embed is None else None

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
        group: the ranks over which bags are spread, as in `all_merge`; None: this process has all of them.

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
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        for name, size in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("heads", heads)):
            check_count(name, size)
        for name, flag in (("gated", gated), ("bias", bias), ("score_bias", score_bias)):
            check_flag(name, flag)
        check_choice("activation", activation, ACTIVATIONS)
        check_share("dropout", dropout)
        self.in_dim, self.hidden_dim, self.heads = in_dim, hidden_dim, heads
        self.gated, self.activation, self.dropout = gated, activation, dropout
        self.bias, self.score_bias = bias, score_bias
        for prefix in ("v_", "u_") if gated else ("v_",):
            self._add_linear(prefix, in_dim, hidden_dim, bias, device=device, dtype=dtype)
        self._add_linear("w_", hidden_dim, heads, score_bias, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(
        self,
        x: Instances,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        embed: Embed | None = None,
        seed: Seed = None,
    ) -> results.Pooled:
        """``Pooled(bag [B, K, L], scores [N, K], lse [B, K])``; ``seed`` fixes what dropout drops."""
        values, offsets, mask = ragged(x, offsets, mask, self._width(embed))
        v, w = (self.v_weight, self.v_bias), (self.w_weight, self.w_bias)
        dropout = self.dropout if self.training else 0.0
        options = {"activation": self.activation, "dropout_p": dropout, "embed": embed, "mask": mask}
        options |= {"seed": self._seed(seed, values, dropout, embed)}
        if self.gated:
            pooled = ops.gated_attention_pool(values, v, (self.u_weight, self.u_bias), w, offsets, **options)
        else:
            pooled = ops.attention_pool(values, v, w, offsets, **options)
        return self._merged(pooled, offsets)

    def extra_repr(self) -> str:
        sizes = ("in_dim", "hidden_dim", "heads")
        options = ("gated", "activation", "dropout", "bias", "score_bias")
        return self._describe(*sizes, *options) + self._describe_group()


class SoftmaxPool(_Spread):
    """Pooling by given scores: `softmax_pool`.

    Args:
        group: the ranks over which bags are spread, as in `all_merge`; None: this process has all of them.
    """

    def forward(
        self, x: Instances, scores: Tensor, offsets: Tensor | None = None, mask: Tensor | None = None
    ) -> results.Pooled:
        """``Pooled(bag [B, K, L], scores [N, K], lse [B, K])``.

        ``scores`` are ``[N, K]``, one row per row of ``x``; beside padded or nested ``x`` also in its form.
        """
        values, offsets, mask = ragged(x, offsets, mask)
        pooled = ops.softmax_pool(values, _per_row("scores", scores, x), offsets, mask=mask)
        return self._merged(pooled, offsets)

    def extra_repr(self) -> str:
        return self._describe_group()[2:]


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
        group: the ranks over which bags are spread, as in `all_merge`; None: this process has all of them.  With one,
            ``values`` are the maxima over all ranks, ``critical`` rows of this rank, -1 where another one has the
            critical instance.

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
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        check_choice("value", value, VALUES)
        check_flag("nonlinear_query", nonlinear_query)
        check_flag("bias", bias)
        if value is None and (value_dim is not None or value_dropout):
            raise ValueError(f"value_dim and value_dropout need a value; got {value_dim}, {value_dropout}, value=None")
        check_share("value_dropout", value_dropout)
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
        self,
        x: Instances,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        embed: Embed | None = None,
        seed: Seed = None,
    ) -> results.DSMILOutput:
        """``DSMILOutput(bag [B, C, Lv], scores [N, C], lse, critical, values [B, C], logits [N, C])``; ``seed`` fixes
        what dropout drops."""
        values, offsets, mask = ragged(x, offsets, mask, self._width(embed))
        dropout = self.value_dropout if self.value and self.training else 0.0
        first = {"seed": self._seed(seed, values, dropout, embed), "embed": embed, "mask": mask}
        second = {"scale": self.scale}
        if self.nonlinear_query:
            second |= {"q2": (self.q2_weight, self.q2_bias)}
        if self.value:
            second |= {"value": (self.v_weight, self.v_bias), "value_dropout_p": dropout}
            second |= {"value_activation": None if self.value == "linear" else self.value}
        classifier, q = (self.weight, self.bias), (self.q_weight, self.q_bias)
        if self.group is None:
            return ops.dsmil(values, classifier, q, offsets, **first, **second)
        return self._over_ranks(values, classifier, q, offsets, first, second)

    def _over_ranks(self, x, classifier, q, offsets, first: dict, second: dict) -> results.DSMILOutput:
        """The critical instances of all ranks first: every rank scores its own rows against them."""
        found = ops.instance_max(x, classifier, offsets, **first)
        if isinstance(x, Parts):
            rows = _critical_rows_of_parts(x, found, offsets, first["mask"], first["embed"])
        else:
            rows = _critical_rows(x, found.indices, first["embed"], first["seed"])
        critical = all_critical(rows, found.values, self.group)
        pooled = self._merged(ops.dsmil_pool(x, critical.rows, q, offsets, **first, **second), offsets)
        here = torch.where(critical.rank == self.group.rank, found.indices, -1)
        return results.DSMILOutput(pooled.bag, pooled.scores, pooled.lse, here, critical.values, found.logits)

    def extra_repr(self) -> str:
        value = ("value_dim", "value_dropout") if self.value else ()
        options = self._describe("nonlinear_query", "value", *value, "scale")
        sizes = self._describe("in_dim", "num_classes", "query_dim")
        return f"{sizes}, {options}, bias={self.bias is not None}{self._describe_group()}"


def _critical_rows(x: Tensor, indices: Tensor, embed: Embed | None, seed: Seed) -> Tensor:
    """``x[indices]``, or embedded, ``[B, C, L]``; zeros for an index of -1."""
    if embed is None:
        return rows_at(x, indices)
    if x.shape[0] == 0:
        return x.new_zeros(*indices.shape, as_linear("embed.linear", embed[0], x.shape[1], x)[0].shape[0])
    rows = ops.embed_instances(x, embed, indices.clamp(min=0).flatten(), seed=seed).unflatten(0, indices.shape)
    return rows.masked_fill((indices < 0)[..., None], 0)


def _critical_rows_of_parts(x: Parts, first: results.InstanceMax, offsets, mask, embed: Embed | None) -> Tensor:
    """The same by one more read: sums of all rows, of which one has a weight that is not 0."""
    if embed is not None and Embed(*embed).dropout_p:
        raise ValueError(
            f"embed must drop nothing where a bag that is read in pieces is spread over ranks too; got dropout_p="
            f"{Embed(*embed).dropout_p}"
        )
    count, num_classes = first.logits.shape
    at = torch.where(first.indices < 0, count, first.indices)
    weights = first.logits.new_zeros(count + 1, num_classes).scatter(0, at, 1.0)[:-1]
    rows = ops.weighted_pool(x, weights, offsets, mask=mask)
    if embed is None:
        return rows
    flat = rows.flatten(0, 1)
    embedded = ops.embed_instances(flat, embed, torch.arange(flat.shape[0], device=flat.device))
    return embedded.unflatten(0, rows.shape[:2]).masked_fill((first.indices < 0)[..., None], 0)


class LossAttention(_Linears):
    """Loss-based attention (Shi et al. 2020): ``scores[i] = log sum_c exp(w_c . x_i + b_c)``.

    The parameters are those of the bag classifier: ``F.linear(pooled.bag[:, 0], weight, bias)`` are the bag's logits.

    Args:
        in_dim: L, features of an instance.
        num_classes: C.
        bias: whether there is one.
        group: the ranks over which bags are spread, as in `all_merge`; None: this process has all of them.

    Attributes:
        weight: ``[C, L]``; bias: ``[C]`` or None.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        bias: bool = True,
        *,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(group)
        check_count("in_dim", in_dim)
        check_count("num_classes", num_classes)
        check_flag("bias", bias)
        self.in_dim, self.num_classes = in_dim, num_classes
        self._add_linear("", in_dim, num_classes, bias, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(
        self,
        x: Instances,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        embed: Embed | None = None,
        seed: Seed = None,
    ) -> results.LossAttentionPooled:
        """``LossAttentionPooled(bag [B, 1, L], scores [N, 1], lse [B, 1], logits [N, C])``; ``seed`` fixes what the
        dropout of ``embed`` drops."""
        values, offsets, mask = ragged(x, offsets, mask, self._width(embed))
        options = {"seed": self._seed(seed, values, 0.0, embed), "embed": embed, "mask": mask}
        pooled = ops.loss_attention_pool(values, (self.weight, self.bias), offsets, **options)
        return self._merged(pooled, offsets)

    def extra_repr(self) -> str:
        return f"{self._describe('in_dim', 'num_classes')}, bias={self.bias is not None}{self._describe_group()}"


class MeanPool(_Spread):
    """The mean of each bag: `mean_pool`.

    Args:
        group: the ranks over which bags are spread, as in `all_merge`; None: this process has all of them.
    """

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``[B, L]``."""
        values, offsets, mask = ragged(x, offsets, mask)
        mean = ops.mean_pool(values, offsets, mask=mask)
        if self.group is None:
            return mean
        return all_mean(mean, _counts(values, offsets, mask).to(mean.device), self.group)

    def extra_repr(self) -> str:
        return self._describe_group()[2:]


def _counts(x: Tensor | Parts, offsets: Tensor | None, mask: Tensor | None) -> Tensor:
    """How many instances of each bag are real: float64 ``[B]``."""
    if mask is None and offsets is not None:
        return offsets.diff().double()
    if mask is not None:
        real = (mask != 0).double()[:, None]
    elif isinstance(x, Parts):  # which knows the number of its rows when it has read them
        real = x.through(lambda rows, _: rows.new_ones(rows.shape[0], 1, dtype=torch.float64)).instances()
    else:
        real = x.new_ones(x.shape[0], 1, dtype=torch.float64)
    return ops.weighted_pool(real, torch.ones_like(real), offsets).flatten()


class MaxPool(_Spread):
    """The maximum of each bag, feature by feature: `max_pool`.

    Args:
        group: the ranks over which bags are spread, as in `all_merge`; None: this process has all of them.  With one,
            ``indices`` are rows of this rank, -1 where another one has the maximum.
    """

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> results.MaxPooled:
        """``MaxPooled(values [B, L], indices [B, L])``."""
        values, offsets, mask = ragged(x, offsets, mask)
        pooled = ops.max_pool(values, offsets, mask=mask)
        return pooled if self.group is None else results.MaxPooled(*all_max(*pooled, self.group))

    def extra_repr(self) -> str:
        return self._describe_group()[2:]
