"""Functions of scores alone: their softmax, the weights they stand for, the largest of them."""

import torch
from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_count, check_flag, check_instances, check_shape
from milkernels.dtypes import accumulation_dtype
from milkernels.ops.contract import BAGS, Backward, Forward, call, declare, num_bags
from milkernels.ops.segments import INF, Segments, gather, stable_order
from milkernels.ops.trilinear import exponentials, masked_scores
from milkernels.ragged import check_offsets, checked_mask
from milkernels.results import DSMILOutput, DSMILPooled, LossAttentionPooled, Pooled, TopInstances

__all__ = ["attention_weights", "segment_softmax", "topk_instances"]


def segment_softmax(
    scores: Tensor, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The softmax of the scores inside each bag.

    Args:
        scores: ``[N, K]``; one of -inf does not count.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[N, K]`` in float32, float64 for float64.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import segment_softmax
    >>> segment_softmax(torch.zeros(3, 1), torch.tensor([0, 2, 3]))[:, 0]
    tensor([0.5000, 0.5000, 1.0000])
    """
    mask = _checked(scores, offsets, mask)
    backend = backends.choose("segment_softmax", scores, (), backend)
    if backend == "reference":
        return segment_softmax_reference(scores, offsets, mask)
    return call("segment_softmax", backend, scores, offsets, mask)


def attention_weights(
    pooled: Pooled | DSMILPooled | DSMILOutput | LossAttentionPooled,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weights with which a pooling op summed the instances: ``exp(scores - lse)``.

    Args:
        pooled: what the op returned: ``scores [N, K]`` and ``lse [B, K]``.
        offsets: ``[B + 1]``, those of that call; None: one bag.
        mask: ``[N]``, non-zero = a real instance; that of the call is in the scores already.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[N, K]``, differentiable in scores and lse.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import attention_weights, softmax_pool
    >>> pooled = softmax_pool(torch.randn(4, 16), torch.zeros(4, 1))
    >>> attention_weights(pooled)[:, 0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if not hasattr(pooled, "scores") or not hasattr(pooled, "lse"):
        raise TypeError(f"pooled must be what a pooling op returned; got {type(pooled).__name__}")
    scores, lse = pooled.scores, pooled.lse
    mask = _checked(scores, offsets, mask)
    if offsets is None and lse.ndim == 2 and lse.shape[0] != 1:
        raise ValueError(f"offsets of the call must be given where pooled is of {lse.shape[0]} bags; got None")
    check_shape("pooled.lse", lse, (num_bags(offsets), scores.shape[1]), scores)
    backend = backends.choose("attention_weights", scores, (lse,), backend)
    if backend == "reference":
        return attention_weights_reference(scores, lse, offsets, mask)
    return call("attention_weights", backend, scores, lse, offsets, mask)


def topk_instances(
    scores: Tensor,
    k: int,
    offsets: Tensor | None = None,
    *,
    largest: bool = True,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> TopInstances:
    """The ``k`` instances with the largest (or smallest) scores of each bag and head, best first.

    Args:
        scores: ``[N, K]``; one of -inf is never picked.
        k: at least 1; it may exceed a bag: the rest is index -1 and value -inf (+inf for the smallest).
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        largest: whether the largest are wanted.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``TopInstances(values [B, K, k], indices [B, K, k])``: values in the type of the scores, indices rows of them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import topk_instances
    >>> topk_instances(torch.tensor([[1.0], [3.0], [2.0]]), 2).indices
    tensor([[[1, 2]]])
    """
    mask = _checked(scores, offsets, mask)
    check_count("k", k)
    check_flag("largest", largest)
    backend = backends.choose("topk_instances", scores, (), backend)
    if backend == "reference":
        return TopInstances(*topk_instances_reference(scores, k, offsets, largest, mask))
    return TopInstances(*call("topk_instances", backend, scores, k, offsets, largest, mask))


def _checked(scores: Tensor, offsets: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The mask as bool ``[N]``, after a check of all three."""
    check_instances(scores, "scores")
    if offsets is not None:
        check_offsets(offsets, scores.shape[0], scores.device)
    return None if mask is None else checked_mask(mask, scores)


# The reference


def segment_softmax_reference(scores, offsets, mask):
    """The softmax of the scores inside each bag."""
    segments = Segments(offsets, scores)
    scores = masked_scores(scores.to(accumulation_dtype(scores)), mask)
    dead, e, z, _ = exponentials(scores, segments)
    return (e / segments.to_rows(z)).masked_fill(dead, 0)


def attention_weights_reference(scores, lse, offsets, mask):
    """``exp(scores - lse)``: the weights that a pooling op used."""
    scores = masked_scores(scores, mask)
    dead = scores == -INF
    return (scores - Segments(offsets, scores).to_rows(lse)).masked_fill(dead, 0).exp().masked_fill(dead, 0)


def topk_instances_reference(scores, k, offsets, largest, mask):
    """``(values, indices)`` of the k largest or smallest scores of each bag and head, best first."""
    segments = Segments(offsets, scores)
    scores = masked_scores(scores, mask)
    dead = scores == -INF
    index = torch.zeros_like(scores[:, 0], dtype=torch.int64) if segments.index is None else segments.index
    # Stable sorts, the least significant key first: by score, then the dead after the alive, then by bag.
    order = stable_order(scores.detach(), largest)
    key = (2 * index[:, None] + dead).gather(0, order)
    order = order.gather(0, stable_order(key, False))

    size = segments.sum(torch.ones_like(index))
    alive = segments.sum((~dead).to(torch.int64))
    rank = torch.arange(k, device=scores.device)
    place = (size.cumsum(0) - size)[:, None, None] + rank
    place = torch.where(rank < alive[:, :, None], place, -1)
    indices = gather(order, place.transpose(1, 2).flatten(0, 1), -1)
    values = gather(scores, indices, -INF if largest else INF)
    shape = (segments.num_bags, k)
    return values.unflatten(0, shape).transpose(1, 2), indices.unflatten(0, shape).transpose(1, 2)


# The contract

declare(
    Forward(
        "segment_softmax",
        f"Tensor scores, {BAGS}",
        "weights",
        lambda scores, **_: (tuple(scores.shape),),
        Backward("segment_softmax", "scores", "scores offsets? weights", "weights"),
    ),
    Forward(
        "attention_weights",
        f"Tensor scores, Tensor lse, {BAGS}",
        "weights",
        lambda scores, **_: (tuple(scores.shape),),
        Backward("attention_weights", "scores lse", "scores lse offsets? weights", "weights"),
    ),
    triton="pooling",
)
declare(
    Forward(
        "topk_instances",
        "Tensor scores, int k, Tensor? offsets, bool largest, Tensor? mask",
        "values indices",
        lambda scores, k, offsets, **_: ((num_bags(offsets), scores.shape[1], k),) * 2,
        Backward("topk_instances", "scores", "scores indices", "values"),
        indices="indices",
        typed="values",
    ),
    triton="choice",
)
