"""Pooling by a query that is given: one vector for each head, of each bag or of all."""

from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_number, check_shape
from milkernels.bags import Bags, Parts, instances_of
from milkernels.dtypes import accumulation_dtype, converted, result_dtype, without_autocast
from milkernels.layers import Embed
from milkernels.ops.contract import (
    BAGS,
    Backward,
    Forward,
    call,
    declare,
    num_bags,
    pooled_shapes,
    pooled_width,
)
from milkernels.ops.embedding import Embedding, embedding_of
from milkernels.ops.segments import Segments
from milkernels.ops.trilinear import Score, dead_rows, masked_scores, pooled_by_softmax
from milkernels.ragged import for_kernels
from milkernels.results import Pooled

__all__ = ["query_pool", "query_scores"]


def query_pool(
    x: Tensor | Bags | Parts,
    query: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Pooling by a query: ``scores[i, k] = scale <x_i, query[b, k]>``, their softmax inside each bag, and the sum of
    the instances by these weights.

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        query: ``[B, K, L]``, or ``[K, L]`` for all bags; it counts as a parameter.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        scale: a finite number.
        seed: of the embedding's dropout, an int64 tensor of one element on the device of ``x`` or an int; None draws
            it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``Pooled(bag [B, K, L], scores [N, K], lse [B, K])``, all differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import query_pool
    >>> x, offsets = torch.randn(7, 16), torch.tensor([0, 3, 7])  # two bags
    >>> query_pool(x, torch.randn(4, 16), offsets, scale=16**-0.5).bag.shape
    torch.Size([2, 4, 16])
    """
    if isinstance(x, Parts):
        return x.run(query_pool, locals())
    x, offsets, mask, embedding = _prepared(x, query, offsets, scale, seed, embed, mask)
    tensors = (query, *embedding.parameters)
    backend = backends.choose("query_pool", x, tensors, backend, embedding.needs)
    if backend == "reference":
        bag, scores, lse = query_pool_reference(embedding.instances(x, mask), query, offsets, mask, scale)
    else:
        inputs = (for_kernels(x), query, offsets, mask, scale)
        bag, scores, lse = call("query_pool", backend, *inputs, embed=embedding.arguments)
    return Pooled(converted(bag, result_dtype(x, tensors)), scores, lse)


def query_scores(
    x: Tensor | Bags | Parts,
    query: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores of `query_pool`, ``scale <x_i, query[b, k]>``.

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        query: ``[B, K, L]``, or ``[K, L]`` for all bags.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        scale: a finite number.
        seed: of the embedding's dropout, an int64 tensor of one element on the device of ``x`` or an int; None draws
            it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[N, K]`` in float32, float64 if any input is; -inf for masked instances.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import query_scores
    >>> query_scores(torch.randn(7, 16), torch.randn(4, 16)).shape
    torch.Size([7, 4])
    """
    if isinstance(x, Parts):
        return x.run(query_scores, locals())
    x, offsets, mask, embedding = _prepared(x, query, offsets, scale, seed, embed, mask)
    backend = backends.choose("query_scores", x, (query, *embedding.parameters), backend, embedding.needs)
    if backend == "reference":
        return query_scores_reference(embedding.instances(x, mask), query, offsets, mask, scale)
    inputs = (for_kernels(x), query, offsets, mask, scale)
    return call("query_scores", backend, *inputs, embed=embedding.arguments)


def _prepared(x, query, offsets, scale, seed, embed, mask) -> tuple[Tensor, Tensor | None, Tensor | None, Embedding]:
    """``(x, offsets, mask, embedding)``, all arguments checked."""
    x, offsets, mask = instances_of(x, offsets, mask)
    embedding, _ = embedding_of(x, embed, seed)
    per_bag = isinstance(query, Tensor) and query.ndim == 3
    check_shape("query", query, (*((num_bags(offsets),) if per_bag else ()), None, embedding.width(x)), x)
    check_number("scale", scale)
    return x, offsets, mask, embedding


# The reference


@without_autocast
def query_scores_reference(x, query, offsets, mask, scale):
    """``scale <x_i, q>``; a query per bag [B, K, L], or one for all of them [K, L]."""
    query = query.to(accumulation_dtype(x, (query,)))
    shared = query.ndim == 2
    index = None if shared else Segments(offsets, x).index
    scores = Score.of(x, query[None] if shared else query, dead_rows(mask), index)
    return masked_scores(scores * scale, mask)


@without_autocast
def query_pool_reference(x, query, offsets, mask, scale):
    """``(bag, scores, lse)`` for the scores of `query_scores`."""
    scores = query_scores_reference(x, query, offsets, mask, scale)
    bag, lse = pooled_by_softmax(x, scores, Segments(offsets, x))
    return bag, scores, lse


# The contract

_QUERY = f"Tensor x, Tensor query, {BAGS}, float scale"
_QUERY_BACKWARD = Backward(
    "query",
    inputs="x query",
    saves="x query offsets? mask? bag? scores lse?",
    options=("float scale",),
    outputs="bag scores lse",
    embeds=True,
    keeps=True,
)
declare(
    Forward(
        "query_pool",
        _QUERY,
        "bag scores lse",
        lambda x, query, offsets, e_weight, **_: pooled_shapes(x, offsets, query.shape[-2], pooled_width(x, e_weight)),
        _QUERY_BACKWARD,
    ),
    Forward(
        "query_scores",
        _QUERY,
        "scores",
        lambda x, query, **_: ((x.shape[0], query.shape[-2]),),
        _QUERY_BACKWARD,
    ),
    triton="pooling",
)
