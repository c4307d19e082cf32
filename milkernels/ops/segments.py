"""How the reference reduces rows to bags, and picks rows."""

import math

import torch
from torch import Tensor

from milkernels import _torch
from milkernels.ragged import bag_index

INF = float("inf")


def _adds_by_sorting(t: Tensor) -> bool:
    """How to add rows deterministically: on a GPU index_add uses atomics and index_put sorts; on a CPU it is
    index_put that uses atomics.  The backward of indexing is index_put, that of index_select is index_add."""
    return t.is_cuda


def take(t: Tensor, index: Tensor) -> Tensor:
    """``t[index]``, by the op whose backward is deterministic."""
    return t[index] if _adds_by_sorting(t) else t.index_select(0, index)


_RUN = 64  # rows that are added one behind another


def _in_runs(rows: Tensor, index: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
    """The sums of runs of rows that share a bag, and their bags; of few rows, the rows themselves.

    Thousands of rows added one behind another lose ten times what a matrix product loses.
    """
    count = rows.shape[0]
    if not isinstance(count, int) or count <= 4 * _RUN or not _torch.eager():
        return rows, index
    length, bag = max(_RUN, math.isqrt(count)), index
    if num_bags > count:  # those that there are here
        bag, num_bags = torch.cat([index.new_zeros(1), (index.diff() != 0).cumsum(0)]), count
    slots = num_bags + (count - 1) // length  # chunk + bag tells apart all runs: neither decreases
    slot = bag + torch.arange(count, device=index.device) // length
    return add_rows_in_order(rows, slot, slots), index.new_zeros(slots).scatter_(0, slot, index)


def add_rows(rows: Tensor, index: Tensor, num_bags: int, total: Tensor | None = None) -> Tensor:
    """The sum of rows in each bag, on top of ``total``, which is written to; ``index``, their bags, never decreases."""
    return add_rows_in_order(*_in_runs(rows, index, num_bags), num_bags, total)


def add_rows_in_order(rows: Tensor, index: Tensor, num_bags: int, total: Tensor | None = None) -> Tensor:
    """The same, each row behind the one before it."""
    if total is not None:
        sorting = _adds_by_sorting(rows)
        return total.index_put_((index,), rows, True) if sorting else total.index_add_(0, index, rows)
    total = rows.new_zeros((num_bags, *rows.shape[1:]))
    if _torch.in_onnx_export():  # the older exporter has the others keep the last row of each bag, without a word
        return total.scatter_add(0, index.view(-1, *[1] * (rows.ndim - 1)).expand_as(rows), rows)
    if _adds_by_sorting(rows):
        return total.index_put((index,), rows, accumulate=True)
    return total.index_add(0, index, rows)


class Segments:
    """How rows reduce to bags.  ``index`` is the bag of each row; None where there is one bag."""

    def __init__(self, offsets: Tensor | None, rows: Tensor):
        self.num_rows = rows.shape[0]
        self.num_bags = 1 if offsets is None else offsets.shape[0] - 1
        # A trace is of use for any number of bags.
        one_bag = offsets is None or (self.num_bags == 1 and not _torch.exporting())
        self.index = None if one_bag else bag_index(offsets, self.num_rows)

    def to_rows(self, per_bag: Tensor) -> Tensor:
        """The value of each row's bag: ``[B, ...]`` to ``[N, ...]``, or ``[1, ...]`` for one bag."""
        return per_bag if self.index is None else take(per_bag, self.index)

    def sum(self, rows: Tensor) -> Tensor:
        return rows.sum(0, keepdim=True) if self.index is None else add_rows(rows, self.index, self.num_bags)

    def max(self, rows: Tensor) -> Tensor:
        """The maximum over each bag of ``[N, C]``, -inf where there is no row.  NaN wins.  No gradient."""
        rows = rows.detach()
        if self.index is None and self.num_rows:
            return rows.amax(0, keepdim=True)
        none = rows.new_full((self.num_bags, rows.shape[1]), -INF)
        if self.index is None:
            return none
        return self._reduce(rows, none, "amax")

    def _reduce(self, rows: Tensor, none: Tensor, how: str) -> Tensor:
        # The shape is said again, since an exporter to ONNX loses it.
        return none.scatter_reduce(0, self.index[:, None].expand_as(rows), rows, how).view(none.shape)

    def first_max(self, rows: Tensor, dead: Tensor) -> Tensor:
        """The lowest row with the maximum of each bag, ``[B, C]``; -1 where all of them are dead."""
        if self.num_rows == 0:
            return dead.new_full((self.num_bags, rows.shape[1]), -1, dtype=torch.int64)
        rows = rows.detach().masked_fill(dead, -INF)
        best = ((rows == self.to_rows(self.max(rows))) | rows.isnan()) & ~dead
        if self.index is None:
            return torch.where(best.any(0), best.to(torch.uint8).argmax(0), -1)[None]
        row = torch.arange(self.num_rows, device=rows.device)[:, None]
        candidates = torch.where(best, row, self.num_rows)
        none = candidates.new_full((self.num_bags, rows.shape[1]), self.num_rows)
        first = self._reduce(candidates, none, "amin")
        return torch.where(first == self.num_rows, -1, first)


# Selection


def gather(rows: Tensor, indices: Tensor, none: float) -> Tensor:
    """``rows[indices[j, c], c]``, and ``none`` where the index is -1."""
    if rows.shape[0] == 0:
        rows = rows.sum(0, keepdim=True)  # the result still depends on them: what they are made of has a gradient of 0
    return rows.gather(0, indices.clamp(min=0)).masked_fill(indices < 0, none)


def rows_at(x: Tensor, indices: Tensor) -> Tensor:
    """``x[indices]``, 0 for an index of -1: [B, C, L]."""
    if x.shape[0] == 0:
        x = x.sum(0, keepdim=True)  # as above
    rows = take(x, indices.clamp(min=0).flatten()).unflatten(0, indices.shape)
    return rows.masked_fill((indices < 0)[:, :, None], 0)


def stable_order(t: Tensor, descending: bool) -> Tensor:
    """How to sort columns."""
    if _torch.in_onnx_export():  # where all sorting is stable, and none can be asked for
        return t.sort(dim=0, descending=descending).indices
    return torch.argsort(t, dim=0, descending=descending, stable=True)
