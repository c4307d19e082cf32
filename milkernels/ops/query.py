"""Pooling by a query."""

from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_number, check_shape
from milkernels.dtypes import accumulation_dtype, result_dtype, without_autocast
from milkernels.ops.contract import (
    BAGS,
    EMBED,
    EMBED_INPUTS,
    EMBED_OPTIONS,
    EMBED_SAVES,
    Backward,
    Forward,
    call,
    declare,
    pooled_shapes,
    pooled_width,
)
from milkernels.ops.embedding import Embed, Stage, stage_of
from milkernels.ops.segments import Segments
from milkernels.ops.trilinear import Score, dead_rows, masked_scores, pooled_by_softmax
from milkernels.ragged import check_bags, checked_mask, for_kernels
from milkernels.results import Pooled


def _query_stage(x: Tensor, query: Tensor, offsets: Tensor | None, scale: float, seed, embed: Embed) -> Stage:
    """The arguments checked."""
    check_bags(x, offsets)
    stage = stage_of(x, embed, seed)
    if isinstance(query, Tensor) and query.ndim == 3:
        num_bags = 1 if offsets is None else offsets.shape[0] - 1
        check_shape("query", query, (num_bags, None, stage.width), x)
    else:
        check_shape("query", query, (None, stage.width), x)
    check_number("scale", scale)
    return stage


def query_pool(
    x: Tensor,
    query: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Pooling by a query: ``scores[i, k] = scale <x_i, query[b, k]>``.

    ``query`` is ``[B, K, L]``, or ``[K, L]`` for all bags; it counts as a parameter.
    """
    stage = _query_stage(x, query, offsets, scale, seed, embed)
    mask = checked_mask(mask, x)
    everything = (x, query, *stage.parameters)
    backend = backends.choose("query_pool", *everything, requested=backend)
    if backend == "reference":
        pooled = query_pool_reference(stage.rows(x, mask), query, offsets, mask, scale)
    else:
        pooled = call("query_pool", backend, for_kernels(x), query, offsets, mask, scale, embed=stage.arguments)
    bag, scores, lse = pooled
    return Pooled(bag.to(result_dtype(*everything)), scores, lse)


def query_scores(
    x: Tensor,
    query: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores ``[N, K]`` of `query_pool`."""
    stage = _query_stage(x, query, offsets, scale, seed, embed)
    mask = checked_mask(mask, x)
    backend = backends.choose("query_scores", x, query, *stage.parameters, requested=backend)
    if backend == "reference":
        return query_scores_reference(stage.rows(x, mask), query, offsets, mask, scale)
    inputs = (for_kernels(x), query, offsets, mask, scale)
    return call("query_scores", backend, *inputs, embed=stage.arguments)


# The reference


@without_autocast
def query_scores_reference(x, query, offsets, mask, scale):
    """``scale <x_i, q>``; a query per bag [B, K, L], or one for all of them [K, L]."""
    query = query.to(accumulation_dtype(x, query))
    shared = query.ndim == 2
    index = None if shared else Segments(offsets, x).index
    scores = Score.of(x, query[None] if shared else query, dead_rows(mask), index)
    return masked_scores(scores * scale, mask)


@without_autocast
def query_pool_reference(x, query, offsets, mask, scale):
    """``(bag, scores, lse)`` for the scores of `query_scores`."""
    scores = query_scores_reference(x, query, offsets, mask, scale)
    bag, lse = pooled_by_softmax(x, scores, Segments(offsets, x))
    return bag.to(result_dtype(x, query)), scores, lse


# The contract

_QUERY = f"Tensor x, Tensor query, {BAGS}, float scale, {EMBED}"
_QUERY_BACKWARD = Backward(
    "query",
    inputs="x query" + EMBED_INPUTS,
    saves="x query offsets? mask? bag? scores lse?" + EMBED_SAVES,
    options=("float scale", *EMBED_OPTIONS),
    outputs="bag scores lse",
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
)
