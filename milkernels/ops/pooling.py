"""Pooling by scores or weights that are given, by the mean and by the maximum."""

import torch
from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_per_row
from milkernels.bags import Bags, Parts, instances_of
from milkernels.dtypes import accumulation_dtype, converted, without_autocast
from milkernels.ops.contract import BAGS, Backward, Forward, call, declare, num_bags, pooled_shapes, pooled_width
from milkernels.ops.segments import INF, Segments, gather
from milkernels.ops.trilinear import Pool, dead_rows, masked_scores, pooled_by_softmax
from milkernels.ragged import for_kernels
from milkernels.results import MaxPooled, Pooled

__all__ = ["max_pool", "mean_pool", "softmax_pool", "weighted_pool"]


def softmax_pool(
    x: Tensor | Bags | Parts,
    scores: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Pooling by given scores: ``bag[b, k] = sum_{i in b} softmax_{i in b}(scores[i, k]) x_i``.

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        scores: ``[N, K]``; one of -inf does not count, for its head.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``Pooled(bag [B, K, L], scores [N, K], lse [B, K])``, all differentiable: ``bag`` in the type of ``x``,
        ``scores`` the given ones, masked.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import softmax_pool
    >>> x, offsets = torch.randn(7, 16), torch.tensor([0, 3, 7])  # two bags
    >>> softmax_pool(x, torch.randn(7, 1), offsets).bag.shape
    torch.Size([2, 1, 16])
    """
    if isinstance(x, Parts):
        return x.run(softmax_pool, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    check_per_row("scores", scores, x)
    backend = backends.choose("softmax_pool", x, (scores,), backend)
    if backend == "reference":
        return Pooled(*softmax_pool_reference(x, scores, offsets, mask))
    bag, scores, lse = call("softmax_pool", backend, for_kernels(x), scores, offsets, mask)
    return Pooled(converted(bag, x.dtype), scores, lse)


def weighted_pool(
    x: Tensor | Bags | Parts,
    weights: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sum of the instances of each bag by given weights, without a softmax: ``sum_{i in b} weights[i, k] x_i``.

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        weights: ``[N, K]``.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[B, K, L]`` in the type of ``x``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import weighted_pool
    >>> weighted_pool(torch.ones(7, 16), torch.full((7, 1), 0.5), torch.tensor([0, 3, 7]))[:, 0, 0]
    tensor([1.5000, 2.0000])
    """
    if isinstance(x, Parts):
        return x.run(weighted_pool, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    check_per_row("weights", weights, x)
    backend = backends.choose("weighted_pool", x, (weights,), backend)
    if backend == "reference":
        return weighted_pool_reference(x, weights, offsets, mask)
    return converted(call("weighted_pool", backend, for_kernels(x), weights, offsets, mask), x.dtype)


def mean_pool(
    x: Tensor | Bags | Parts, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The mean of the instances of each bag.

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[B, L]`` in the type of ``x``; 0 for an empty bag.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import mean_pool
    >>> mean_pool(torch.arange(4.0)[:, None], torch.tensor([0, 1, 4]))
    tensor([[0.],
            [2.]])
    """
    if isinstance(x, Parts):
        return x.run(mean_pool, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    backend = backends.choose("mean_pool", x, (), backend)
    if backend == "reference":
        return mean_pool_reference(x, offsets, mask)
    return converted(call("mean_pool", backend, for_kernels(x), offsets, mask), x.dtype)


def max_pool(
    x: Tensor | Bags | Parts, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> MaxPooled:
    """The maximum over the instances of each bag, feature by feature, and where it is.

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``MaxPooled(values [B, L], indices [B, L])``: ``values`` in the type of ``x``, 0 for an empty bag; ``indices``
        are rows of ``x``, the lowest of equal ones, -1 for an empty bag.  A value's gradient goes to the row at its
        index.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import max_pool
    >>> max_pool(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 2, 3])).values
    tensor([[3.],
            [2.]])
    """
    if isinstance(x, Parts):
        return x.run(max_pool, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    backend = backends.choose("max_pool", x, (), backend)
    if backend == "reference":
        return MaxPooled(*max_pool_reference(x, offsets, mask))
    return MaxPooled(*call("max_pool", backend, for_kernels(x), offsets, mask))


# The reference


@without_autocast
def softmax_pool_reference(x, scores, offsets, mask):
    """``(bag, scores, lse)`` for scores that are given."""
    scores = masked_scores(scores.to(accumulation_dtype(x, (scores,))), mask)
    scores = scores.masked_fill(scores == -INF, -INF)  # no gradient, as for a masked row
    bag, lse = pooled_by_softmax(x, scores, Segments(offsets, x))
    return bag.to(x.dtype), scores, lse


@without_autocast
def weighted_pool_reference(x, weights, offsets, mask):
    """``sum_i w_i x_i`` over each bag."""
    dead = dead_rows(mask)
    weights = weights.to(accumulation_dtype(x, (weights,)))
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
    triton="pooling",
)
declare(
    Forward(
        "max_pool",
        f"Tensor x, {BAGS}",
        "values indices",
        lambda x, offsets, **_: ((num_bags(offsets), x.shape[1]),) * 2,
        Backward("max_pool", "x", "x indices", "values"),
        indices="indices",
        typed="values",
    ),
    triton="choice",
)
