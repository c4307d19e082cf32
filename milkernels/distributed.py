"""Bags that are spread over processes: every rank of a group holds some instances of each bag.

**Rows.**  All ranks call with the same number of bags, B.  A rank holds consecutive rows of each bag, those of rank 0
first; of some bags it may have none, and it may have none at all.  ``scores``, ``logits`` and indices stay with the
rank that holds the rows; ``bag``, ``lse`` and what is made of them are the same numbers on every rank, to the last bit.

**Gradients.**  The objective is the mean over ranks of their losses, as DistributedDataParallel and FSDP2 have it.
These average the gradients of parameters, and nothing else has to be done.  The gradient of a rank's own instances is
that of the sum over ranks.  The backward communicates too, so either every rank calls it, or none.

**What is sent.**  An all-gather of ``[B, K, L + 2]`` numbers forward and one of ``[B, K, L + 1]`` backward, whatever
the number of instances.  They are added in the order of ranks, so runs repeat to the last bit.  These are functional
collectives, which torch.compile traces, over gloo, NCCL or whatever serves the group.

    pooled = gated_attention_pool(x, v, u, w, offsets)                    # of this rank's rows
    pooled = all_merge(pooled, offsets=offsets)                           # of the rows of all ranks
    pooled = AttentionPool(512, group=dist.group.WORLD)(x, offsets)       # both in one
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from milkernels import _torch
from milkernels.arguments import check_shape, check_tensor
from milkernels.merging import LogSum, log_sum_of, merge_bags, share_of, split_gradients
from milkernels.ops.dropout import seed_of_part
from milkernels.results import CriticalInstances, DSMILOutput, DSMILPooled, LossAttentionPooled, Pooled

__all__ = ["all_critical", "all_merge"]

Part = TypeVar("Part", Pooled, DSMILPooled, DSMILOutput, LossAttentionPooled)
_KINDS = (Pooled, DSMILPooled, DSMILOutput, LossAttentionPooled)
_ROWS = 40  # bits for the rows of one rank


class Ranks(NamedTuple):
    """A group of processes, seen from one of them.  It can be copied with the module that has it, and traced."""

    name: str
    size: int
    rank: int


def as_ranks(group) -> Ranks:
    """A ProcessGroup, a DeviceMesh of one dimension, or None, which is all processes.

    Raises:
        TypeError: something else.
        ValueError: a mesh of several dimensions, or a group without this process.
        RuntimeError: there are no groups of processes.
    """
    if isinstance(group, Ranks):
        return group
    return Ranks(*_torch.group_of(group))


def all_merge(pooled: Part, group: Any = None, *, offsets: Tensor | None = None) -> Part:
    """Merges what every rank pooled of its own rows: what one process pools of all of them, to rounding.

    Args:
        pooled: what a pooling op or module returned for this rank's rows: ``bag [B, K, L]``, ``lse [B, K]`` and
            ``scores [N, K]``; N may be 0, and B, K and L are those of the other ranks.
        group: a ``torch.distributed`` ProcessGroup, or a DeviceMesh of one dimension (``mesh["bags"]``); None: all
            processes.
        offsets: ``[B + 1]``, of this rank's rows, as the op was given.  With them, or with one bag, shares are taken
            of the scores, which have the digits that a large lse in float32 lost.

    Returns:
        The type of ``pooled``: ``bag`` and ``lse`` are those of all ranks' rows, equal on every rank; ``scores``,
        ``logits``, and all else are this rank's own, as they came.  `attention_weights` of it are this rank's weights.

    - **Gradients** flow through bag, lse, scores and logits.  Once differentiable.
    - **DSMIL**: the part has to be scored against the critical instance of the whole bag, which `all_critical` finds:
      `dsmil_pool` takes its rows.  `milkernels.nn.DSMIL` with a group does both.

    Raises:
        TypeError: something that is no pooling, parts that are DTensors, a group that is none.
        ValueError: shapes that do not fit, a mesh of several dimensions, a group without this process.
        RuntimeError: no process group, or a rank that did not come before the group's timeout.
    """
    if not isinstance(pooled, _KINDS):
        raise TypeError(f"pooled must be what a pooling op returned; got {type(pooled).__name__}")
    check_tensor("pooled.bag", pooled.bag, 3)
    num_bags, heads, _ = pooled.bag.shape
    check_shape("pooled.lse", pooled.lse, (num_bags, heads), pooled.bag)
    ranks = as_ranks(group)
    if ranks.size == 1:
        return pooled
    part = pooled
    if offsets is None and num_bags != 1:
        part = Pooled(pooled.bag, pooled.scores[:0], pooled.lse)
    bag, lse = _Merge.apply(pooled.bag, pooled.lse, log_sum_of(part, offsets).sum.detach(), ranks)
    return pooled._replace(bag=bag, lse=lse)


def all_critical(rows: Tensor, values: Tensor, group: Any = None) -> CriticalInstances:
    """The critical instances of bags whose rows are spread over ranks: those with the largest values of all ranks.

    Args:
        rows: ``[B, C, L]``, this rank's own critical instances; anything in a bag of which it has none.
        values: ``[B, C]``, their logits, -inf where it has none: ``values`` of `instance_max`.
        group: as in `all_merge`.

    Returns:
        ``CriticalInstances(rows [B, C, L], values [B, C], rank [B, C])``, equal on every rank: where several have the
        largest value, those of the lowest rank, as the lowest row wins in `instance_max`; NaN is larger than any
        number.  Where no rank has one, rows are 0, values -inf and rank is -1.  The gradients of rows and values,
        summed over ranks, go to the rank that had them.

    Raises:
        TypeError, ValueError, RuntimeError: as `all_merge`.
    """
    check_tensor("rows", rows, 3)
    check_shape("values", values, tuple(rows.shape[:2]), rows)
    return CriticalInstances(*_largest(rows, values, values != -torch.inf, as_ranks(group)))


# What the modules call


def all_mean(mean: Tensor, counts: Tensor, ranks: Ranks) -> Tensor:
    """The mean of bags ``[B, L]``, of every rank's mean ``[B, L]`` of ``counts [B]`` rows."""
    if ranks.size == 1:
        return mean
    top = torch.zeros_like(counts, dtype=torch.promote_types(mean.dtype, torch.float32)).masked_fill(
        counts == 0, -torch.inf
    )
    return _Merge.apply(mean[:, None], top[:, None], counts[:, None], ranks)[0][:, 0]


def all_max(values: Tensor, indices: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """What `max_pool` returns: the maxima over all ranks, 0 of empty bags, and the rows of this rank that have them,
    -1 where another rank does."""
    if ranks.size == 1:
        return values, indices
    _, values, rank = _largest(values.new_zeros((*values.shape, 0)), values, indices >= 0, ranks)
    return values.masked_fill(rank < 0, 0), torch.where(rank == ranks.rank, indices, -1)


def seed_of_rank(seed: Tensor | int, ranks: Ranks) -> Tensor | int:
    """Other units are dropped on every rank, whose rows an op counts from 0, where all ranks have the same seed."""
    return seed_of_part(seed, ranks.rank << _ROWS)


# Over the group


class _Merge(torch.autograd.Function):
    """``(bag [B, K, L], lse [B, K])`` of the whole from those of this rank; ``sums [B, K]`` is what the exponential of
    its lse is multiplied by.  The identity is that of `milkernels.merging`."""

    @staticmethod
    def forward(ctx, bag: Tensor, lse: Tensor, sums: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        acc = torch.promote_types(bag.dtype, lse.dtype)
        sent = torch.cat([bag.to(acc), lse[..., None].to(acc), sums[..., None].to(acc)], -1)  # [B, K, L + 2]
        parts = _torch.all_gather(sent, ranks.size, ranks.name).unbind(0)
        found = [LogSum(part[..., -2].double(), part[..., -1].double()) for part in parts]
        whole, total = merge_bags([part[..., :-2] for part in parts], found)
        ctx.ranks, ctx.acc, ctx.types = ranks, acc, (bag.dtype, lse.dtype)
        ctx.save_for_backward(parts[ranks.rank][..., :-2], whole, share_of(found[ranks.rank], total))
        return whole.to(bag.dtype), total.log().to(lse.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_bag: Tensor, g_lse: Tensor):
        bag, whole, share = ctx.saved_tensors
        sent = torch.cat([g_bag.to(ctx.acc), g_lse[..., None].to(ctx.acc)], -1)  # [B, K, L + 1]
        g = _torch.all_gather(sent, ctx.ranks.size, ctx.ranks.name).double().sum(0)
        # An lse of -inf, of an empty bag, has no gradient, whatever a loss makes of it.
        g_bag, g_lse = split_gradients(share, bag, whole, g[..., :-1], g[..., -1])
        return g_bag.to(ctx.types[0]), g_lse.to(ctx.types[1]), None, None


def _largest(rows: Tensor, values: Tensor, alive: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """``(rows [B, C, L], values [B, C], rank [B, C])`` of the lowest rank with the largest value that is alive."""
    if ranks.size > 1:
        return _Largest.apply(rows, values, alive, ranks)
    rank = torch.where(alive, 0, -1)
    return rows.masked_fill(~alive[..., None], 0), values.masked_fill(~alive, -torch.inf), rank


class _Largest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, values: Tensor, alive: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        acc = torch.promote_types(rows.dtype, values.dtype)
        sent = torch.cat([rows.to(acc), values[..., None].to(acc), alive[..., None].to(acc)], -1)  # [B, C, L + 2]
        parts = _torch.all_gather(sent, ranks.size, ranks.name)  # [W, B, C, L + 2]
        there = parts[..., -1] > 0
        found = parts[..., -2].masked_fill(~there, -torch.inf)
        best = ((found == found.amax(0)) | found.isnan()) & there
        order = torch.arange(ranks.size, device=rows.device)[:, None, None]
        rank = torch.where(best, order, ranks.size).amin(0)  # [B, C]
        none = rank == ranks.size
        chosen = rank.masked_fill(none, 0)[None]
        at = chosen[..., None].expand(1, *parts.shape[1:-1], rows.shape[-1])
        rows_out = parts[..., :-2].gather(0, at)[0].masked_fill(none[..., None], 0).to(rows.dtype)
        values_out = found.gather(0, chosen)[0].to(values.dtype)
        rank = rank.masked_fill(none, -1)
        ctx.ranks, ctx.acc, ctx.types = ranks, acc, (rows.dtype, values.dtype)
        ctx.save_for_backward(rank)
        ctx.mark_non_differentiable(rank)
        return rows_out, values_out, rank

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_rows: Tensor, g_values: Tensor, _):
        (rank,) = ctx.saved_tensors
        sent = torch.cat([g_rows.to(ctx.acc), g_values[..., None].to(ctx.acc)], -1)
        g = _torch.all_gather(sent, ctx.ranks.size, ctx.ranks.name).sum(0)
        g = g.masked_fill((rank != ctx.ranks.rank)[..., None], 0)
        return g[..., :-1].to(ctx.types[0]), g[..., -1].to(ctx.types[1]), None, None
