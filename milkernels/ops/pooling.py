"""Pooling by given scores or weights, by the mean and by the maximum."""

import torch
from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_per_row
from milkernels.dtypes import accumulation_dtype, without_autocast
from milkernels.ops.contract import BAGS, Backward, Forward, call, declare, num_bags, pooled_shapes, pooled_width
from milkernels.ops.segments import INF, Segments, gather
from milkernels.ops.trilinear import Pool, dead_rows, masked_scores, pooled_by_softmax
from milkernels.ragged import check_bags, checked_mask, for_kernels
from milkernels.results import MaxPooled, Pooled


def softmax_pool(
    x: Tensor,
    scores: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Pooling by given scores ``[N, K]``: ``bag[b, k] = sum_i softmax_{i in b}(scores[i, k]) x_i``.

    ``bag`` comes in the type of ``x``; the ``scores`` returned are the given ones, masked.
    """
    check_bags(x, offsets)
    check_per_row("scores", scores, x)
    mask = checked_mask(mask, x)
    backend = backends.choose("softmax_pool", x, scores, requested=backend)
    if backend == "reference":
        return Pooled(*softmax_pool_reference(x, scores, offsets, mask))
    bag, scores, lse = call("softmax_pool", backend, for_kernels(x), scores, offsets, mask)
    return Pooled(bag.to(x.dtype), scores, lse)


def weighted_pool(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``sum_{i in b} weights[i, k] x_i``, no softmax: ``[B, K, L]`` in the type of ``x``.

    ``weights`` are ``[N, K]``.
    """
    check_bags(x, offsets)
    check_per_row("weights", weights, x)
    mask = checked_mask(mask, x)
    backend = backends.choose("weighted_pool", x, weights, requested=backend)
    if backend == "reference":
        return weighted_pool_reference(x, weights, offsets, mask)
    return call("weighted_pool", backend, for_kernels(x), weights, offsets, mask).to(x.dtype)


def mean_pool(
    x: Tensor, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The mean of the instances of each bag: ``[B, L]`` in the type of ``x``."""
    check_bags(x, offsets)
    mask = checked_mask(mask, x)
    backend = backends.choose("mean_pool", x, requested=backend)
    if backend == "reference":
        return mean_pool_reference(x, offsets, mask)
    return call("mean_pool", backend, for_kernels(x), offsets, mask).to(x.dtype)


def max_pool(
    x: Tensor, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> MaxPooled:
    """The maximum over the instances of each bag, feature by feature: ``[B, L]`` in the type of ``x``."""
    check_bags(x, offsets)
    mask = checked_mask(mask, x)
    backend = backends.choose("max_pool", x, requested=backend)
    if backend == "reference":
        return MaxPooled(*max_pool_reference(x, offsets, mask))
    return MaxPooled(*call("max_pool", backend, for_kernels(x), offsets, mask))


# The reference


@without_autocast
def softmax_pool_reference(x, scores, offsets, mask):
    """``(bag, scores, lse)`` for scores that are given."""
    scores = masked_scores(scores.to(accumulation_dtype(x, scores)), mask)
    scores = scores.masked_fill(scores == -INF, -INF)  # no gradient, as for a masked row
    bag, lse = pooled_by_softmax(x, scores, Segments(offsets, x))
    return bag.to(x.dtype), scores, lse


@without_autocast
def weighted_pool_reference(x, weights, offsets, mask):
    """``sum_i w_i x_i`` over each bag."""
    dead = dead_rows(mask)
    weights = weights.to(accumulation_dtype(x, weights))
    weights = weights if dead is None else weights.masked_fill(dead, 0)
    segments = Segments(offsets, x)
    return Pool.of(x, weights, dead, segments.index, segments.num_bags).to(x.dtype)


@without_autocast
def mean_pool_reference(x, offsets, mask):
    """The mean of the real instances of each bag."""
    segments = Segments(offsets, x)
    ones = x.new_ones((x.shape[0], 1), dtype=accumulation_dtype(x))
    dead = dead_rows(mask)
    count = segments.sum(ones if dead is None else ones.masked_fill(dead, 0))
    total = Pool.of(x, ones, dead, segments.index, segments.num_bags)[:, 0]
    return (total / count.clamp(min=1)).to(x.dtype)


def max_pool_reference(x, offsets, mask):
    """``(values, indices)``: the maximum over the real instances of each bag, feature by feature."""
    dead = torch.zeros_like(x[:, :1], dtype=torch.bool) if mask is None else dead_rows(mask)
    indices = Segments(offsets, x).first_max(x, dead)
    return gather(x, indices, 0), indices


# The contract

declare(
    Forward(
        "softmax_pool",
        f"Tensor x, Tensor given, {BAGS}",
        "bag scores lse",
        lambda x, given, offsets, **_: pooled_shapes(x, offsets, given.shape[1], pooled_width(x)),
        Backward("softmax_pool", "x scores", "x offsets? mask? bag scores lse", "bag scores lse"),
    ),
    Forward(
        "weighted_pool",
        f"Tensor x, Tensor weights, {BAGS}",
        "bag",
        lambda x, weights, offsets, **_: pooled_shapes(x, offsets, weights.shape[1], pooled_width(x))[:1],
        Backward("weighted_pool", "x weights", "x weights offsets? mask?", "bag"),
    ),
    Forward(
        "mean_pool",
        f"Tensor x, {BAGS}",
        "bag",
        lambda x, offsets, **_: ((num_bags(offsets), x.shape[1]),),
        Backward("mean_pool", "x", "x offsets? mask?", "bag"),
    ),
    Forward(
        "max_pool",
        f"Tensor x, {BAGS}",
        "values indices",
        lambda x, offsets, **_: ((num_bags(offsets), x.shape[1]),) * 2,
        Backward("max_pool", "x", "x indices", "values"),
        indices="indices",
        typed="values",
    ),
)
