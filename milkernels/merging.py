"""Pooling of bags in parts: a bag that does not fit, or whose instances are read or held in turns, is pooled part by
part and the results are merged.

**The identity.**  Pooling by a softmax is associative, and its backward splits by parts.  With the share of part p in
its bag, ``share_p = exp(lse_p - lse)``::

    bag   = sum_p share_p bag_p            grad_bag_p = share_p grad_bag
    lse   = log sum_p exp(lse_p)           grad_lse_p = share_p (grad_lse + <bag_p - bag, grad_bag>)

Scores belong to their own part, and so does their gradient.  So a part needs of the others no more than ``(bag, lse)``
and ``(grad_bag, grad_lse)``.  A logarithm in float32 has lost digits of its sum, 5e-4 of an lse of 1e4; a `LogSum`
carries the sum, and what is merged here is computed in float64: it is few numbers.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from milkernels.arguments import check_dense, check_shape, check_tensor, check_type, readable
from milkernels.dtypes import result_dtype
from milkernels.ops.scores import attention_weights
from milkernels.ops.segments import Segments
from milkernels.ragged import bag_index, check_offsets
from milkernels.results import DSMILOutput, DSMILPooled, LossAttentionPooled, Pooled

Part = TypeVar("Part", Pooled, DSMILPooled, DSMILOutput, LossAttentionPooled)
_KINDS = (Pooled, DSMILPooled, DSMILOutput, LossAttentionPooled)
_INF = float("inf")


def merge_pooled(parts: Sequence[Part], offsets: Sequence[Tensor] | None = None) -> Part:
    """Merges poolings of parts of the same bags: what one pooling of all their instances gives, to rounding.

    Args:
        parts: what one pooling op or module returned for each part, all of one type: ``bag [B, K, L]``, ``lse [B, K]``
            and, of the part's own N instances, ``scores [N, K]``.
        offsets: of each part, ``[B + 1]``, as its op was given; a bag may have no instance in a part.  May be None for
            one bag.

    Returns:
        The type of the parts, for the whole: its bags one after another, in each the instances of the parts in the
        order of the parts.  ``offsets`` of the whole are ``sum(offsets)``.  `attention_weights` and `topk_instances`
        take ``scores`` with them.

    - **Numbers.**  An lse in float32 has lost digits, 5e-4 of an lse of 1e4, and the share of a part in its bag is
      ``exp`` of it.  So shares are taken of the scores, in float64.  A part may come without its own (``scores[:0]``;
      they are missing in the result then), and has the digits of its lse.  ``bag`` is in the type of the parts':
      of a half type each was rounded already, which one pooling rounds once.  Where that matters, pool rows that are
      widened part by part, ``x.float()``.
    - **Gradients** flow through ``bag``, ``lse``, ``scores``, ``logits`` and ``values``, once or any number of times as
      the parts allow.
    - **DSMIL** scores against the critical instance of a whole bag.  Parts that were scored against one and the same
      are merged right.  Those of `dsmil` and `dsmil_pool`, each with the critical instance of its own rows, mean
      nothing together: find that of the whole first, by `instance_max` of the parts and the largest of their
      ``values``, pool each part by its query, and merge these.  ``critical`` are rows of the whole: the part's with the
      largest of ``values``, the first of equal ones; without ``values``, in `DSMILPooled`, the first part's that has
      one.

    Raises:
        TypeError: no sequence, or parts that are no poolings, or of several types.
        ValueError: no part, shapes or devices that do not fit, offsets that are missing or do not fit.
    """
    parts = _checked_parts(parts)
    offsets = _checked_offsets(parts, offsets)
    kind, fields = type(parts[0]), {}
    fields["bag"], fields["lse"] = _pooled(parts, offsets)
    order = _order(parts, offsets)
    for name in {"scores", "logits"} & set(kind._fields):
        rows = torch.cat([getattr(part, name) for part in parts])
        fields[name] = rows if order is None else rows.index_select(0, order)
    if "critical" in kind._fields:
        fields |= _critical(parts, order)
    return kind(**fields)


def _pooled(parts: list, offsets: list) -> tuple[Tensor, Tensor]:
    sums = [log_sum_of(part, cuts) for part, cuts in zip(parts, offsets, strict=True)]
    bag, total = merge_bags([part.bag for part in parts], sums)
    bag_type, lse_type = (result_dtype(ts[0], ts) for ts in ([p.bag for p in parts], [p.lse for p in parts]))
    return bag.to(bag_type), total.log().to(lse_type)


# The identity


class LogSum(NamedTuple):
    """The sum of ``exp(scores)`` over a part or a whole, ``sum * exp(top)``, both float64 ``[B, K]``; an empty one has
    a top of -inf."""

    top: Tensor
    sum: Tensor

    def log(self) -> Tensor:
        """The lse, float64."""
        return torch.where(self.top.isinf(), self.top, self.top + self.sum.log())


def log_sum_of(part: Part, offsets: Tensor | None = None) -> LogSum:
    """That of a part, with the digits that its lse lost, if it has its scores.  Differentiable in lse."""
    return LogSum(part.lse.double(), _lost(part, offsets))


def merge_bags(bags: Sequence[Tensor], sums: Sequence[LogSum]) -> tuple[Tensor, LogSum]:
    """``(bag [B, K, L] float64, its LogSum)`` of parts that have all B bags each; differentiable in all of them."""
    tops, totals = (torch.stack(field, 1).flatten(0, 1) for field in zip(*sums, strict=True))  # [B * P, K]
    offsets = torch.arange(len(bags[0]) + 1, device=tops.device) * len(bags)
    return merge_ragged(torch.stack(tuple(bags), 1).flatten(0, 1), LogSum(tops, totals), offsets)


def merge_ragged(bags: Tensor, sums: LogSum, offsets: Tensor) -> tuple[Tensor, LogSum]:
    """``(bag [B, K, L] float64, its LogSum)`` of parts ``bags [P, K, L]``, ``sums [P, K]``, one behind another: those
    of bag b are ``offsets[b]`` to ``offsets[b + 1]``.  They are added in their order; differentiable in all of them."""
    segments = Segments(offsets, bags)
    top = segments.max(sums.top)
    masses = share_of(sums, LogSum(segments.to_rows(top), torch.ones_like(sums.top)))
    total = segments.sum(masses).masked_fill(top == -_INF, 1)
    shares = masses / segments.to_rows(total)
    return segments.sum(shares[..., None] * bags.double()), LogSum(top, total)


def share_of(part: LogSum, whole: LogSum) -> Tensor:
    """The sum of the weights that a part has in its bags, ``exp(lse_p - lse)`` ``[B, K]``; 0 of an empty part."""
    dead = part.top == -_INF
    below = part.top - whole.top.masked_fill(whole.top == -_INF, 0)
    return part.sum / whole.sum * below.masked_fill(dead, 0).exp().masked_fill(dead, 0)


def split_gradients(
    share: Tensor, bag: Tensor, whole: Tensor, grad_bag: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``(grad_bag_p, grad_lse_p)`` of a part, in float64, from the gradients of the whole; None where both are.

    Args:
        share: ``[B, K]``, of the part, as `share_of` has it.
        bag, whole: ``[B, K, L]``, what the part pooled and what the whole did, in the type of sums if possible.
        grad_bag, grad_lse: ``[B, K, L]`` and ``[B, K]``, of the whole; None for 0.
    """
    if grad_bag is None and grad_lse is None:
        return None, None
    # A part without rows has a bag of 0, which is no mean of anything: its share of 0 leaves nothing of it.
    through = 0 if grad_bag is None else ((bag.double() - whole.double()) * grad_bag.double()).sum(-1)
    direct = 0 if grad_lse is None else grad_lse.double()
    return (
        None if grad_bag is None else share[..., None] * grad_bag.double(),
        (share * (direct + through)).masked_fill(share == 0, 0),
    )


def _lost(part, offsets: Tensor | None) -> Tensor:
    """What the exponential of an lse has to be multiplied by, for what the lse lost to rounding: the sum of the weights
    ``exp(scores - lse)``, which is 1 otherwise."""
    lse = part.lse.detach().double()
    if part.scores.shape[0] == 0:
        return torch.ones_like(lse)
    weights = attention_weights(Pooled(part.bag, part.scores.detach().double(), lse), offsets)
    sums = Segments(offsets, weights).sum(weights)
    return torch.where(lse.isfinite(), sums, 1)


def _order(parts: list, offsets: list) -> Tensor | None:
    """Where the rows of the whole come from among those of all parts, one part after another; None for one bag, where
    they lie so already."""
    if offsets[0] is None:
        return None
    rows = (part.scores.shape[0] for part in parts)
    return torch.cat(list(map(bag_index, offsets, rows))).argsort(stable=True)


def _critical(parts: list, order: Tensor | None) -> dict[str, Tensor]:
    """``critical``, and ``values`` where there are."""
    starts = itertools.accumulate((part.scores.shape[0] for part in parts), initial=0)
    rows = torch.stack(
        [torch.where(p.critical < 0, -1, p.critical + start) for p, start in zip(parts, starts, strict=False)]
    )
    values = torch.stack([part.values for part in parts]) if hasattr(parts[0], "values") else None
    # argmax takes the first of equal ones, and NaN before any number.
    chosen = ((rows >= 0).int() if values is None else values.detach()).argmax(0)[None]
    rows = rows.gather(0, chosen)[0]
    if order is not None and len(order):
        rows = torch.where(rows < 0, -1, order.argsort()[rows.clamp(min=0)])
    return {"critical": rows} | ({} if values is None else {"values": values.gather(0, chosen)[0]})


# Checks


def _checked_parts(parts: Sequence) -> list:
    check_type("parts", parts, Iterable, "a sequence of poolings")
    parts = list(parts)
    if not parts:
        raise ValueError("parts must hold at least one pooling; got an empty sequence")
    for i, part in enumerate(parts):
        if not isinstance(part, _KINDS):
            raise TypeError(f"parts[{i}] must be what a pooling op returned; got {type(part).__name__}")
        if type(part) is not type(parts[0]):
            raise TypeError(f"parts must be of one type; got {type(parts[0]).__name__} and {type(part).__name__}")
        _check_part(f"parts[{i}]", part, parts[0])
    return parts


def _check_part(name: str, part, first) -> None:
    bag = first.bag
    check_tensor(f"{name}.bag", bag, 3)
    num_bags, heads, _ = bag.shape
    check_shape(f"{name}.bag", part.bag, tuple(bag.shape), bag)
    check_shape(f"{name}.lse", part.lse, (num_bags, heads), bag)
    check_tensor(f"{name}.scores", part.scores, 2)
    num_rows = part.scores.shape[0]
    check_shape(f"{name}.scores", part.scores, (num_rows, heads), bag)
    if hasattr(part, "logits"):
        check_tensor(f"{name}.logits", first.logits, 2)
        check_shape(f"{name}.logits", part.logits, (num_rows, first.logits.shape[1]), bag)
    if hasattr(part, "values"):
        check_shape(f"{name}.values", part.values, (num_bags, heads), bag)
    if hasattr(part, "critical"):
        _check_critical(f"{name}.critical", part.critical, (num_bags, heads), num_rows)


def _check_critical(name: str, critical: Tensor, shape: tuple[int, int], num_rows: int) -> None:
    check_dense(name, critical)
    if critical.dtype != torch.int64 or tuple(critical.shape) != shape:
        raise ValueError(f"{name} must be int64 {list(shape)}; got {critical.dtype} {list(critical.shape)}")
    if readable(critical) and critical.numel() and critical.max() >= num_rows:
        raise ValueError(f"{name} must be rows of its scores, below {num_rows}; got {int(critical.max())}")


def _checked_offsets(parts: list, offsets: Sequence[Tensor] | None) -> list[Tensor | None]:
    bag = parts[0].bag
    if offsets is None:
        if bag.shape[0] != 1 and any(part.scores.shape[0] for part in parts):
            raise ValueError(f"offsets of every part are needed to order the scores of {bag.shape[0]} bags; got None")
        return [None] * len(parts)
    check_type("offsets", offsets, Sequence, "a sequence of tensors, one for each part")
    if len(offsets) != len(parts):
        raise ValueError(f"offsets must be one for each of {len(parts)} parts; got {len(offsets)}")
    for i, (part, cuts) in enumerate(zip(parts, offsets, strict=True)):
        check_offsets(cuts, part.scores.shape[0], bag.device)
        if cuts.shape[0] != bag.shape[0] + 1:
            raise ValueError(f"offsets[{i}] must be [{bag.shape[0] + 1}]; got shape {tuple(cuts.shape)}")
    return list(offsets)
