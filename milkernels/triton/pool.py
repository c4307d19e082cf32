"""The pooling driver: sums of rows by weights or by the softmax of scores, bag by bag.

A program reduces one segment (``ragged.segments``) to a partial result; another merges those of a bag in the order of
their slots. Nothing is added atomically, so results are the same from run to run.
"""

import triton.language as tl
from torch import Tensor

from milkernels.triton.call import Call
from milkernels.triton.common import finite_or_zero, kernel, log_sum_exp, multiple, real_rows, segment, slots_of
from milkernels.triton.host import alignment, ceil_div, launch, power_of_two

HEADS = 4  # at most so many heads share a read of the rows
SLOTS = 64  # so many partial results a program reads together; one number, for each is compiled


@kernel
def pool_partial(
    X, S, CENTRE, MASK, OFFSETS, TOP, TOTAL, SUM,
    bags, rows, first, last, x_stride, L, K,
    SOFTMAX: tl.constexpr, R, J: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, NS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes partial sums of rows [first, last), the first of which is at X, less the centre of their bag if given. S
    [N, K] holds scores, -inf for dead rows, or weights; without it all scores are 0, and the pooling is a mean."""
    A: tl.constexpr = SUM.dtype.element_ty
    L = multiple(L, ALIGN)
    x_stride = multiple(x_stride, ALIGN)
    slot = first // R + tl.program_id(0)
    bag, start, end = segment(OFFSETS, slot, bags, rows, R)
    if (start < end) & (start >= first) & (start < last):
        columns = tl.program_id(1) * BL + tl.arange(0, BL)
        heads = ()
        tops = ()
        totals = ()
        sums = ()
        for j in tl.static_range(J):
            # Past the last head the last one is computed once more.
            heads = heads + (tl.minimum(tl.program_id(2) * J + j, K - 1),)
            totals = totals + (tl.cast(0.0, A),)
            sums = sums + (tl.zeros([BL], A),)
            top = tl.cast(float("-inf"), A)
            if S is None:
                top = tl.cast(0.0, A)
            elif SOFTMAX:
                for row in tl.range(start, end, 256):
                    r = row + tl.arange(0, 256)
                    s = tl.load(S + r * K + heads[j], mask=r < end, other=float("-inf")).to(A)
                    top = tl.maximum(top, tl.max(s, axis=0))
            tops = tops + (top,)
        if CENTRE is not None:
            centre = tl.load(CENTRE + tl.cast(bag, tl.int64) * L + columns, mask=columns < L, other=0.0)
        for row in tl.range(start, end, BN, num_stages=NS):
            r = row + tl.arange(0, BN)
            real = real_rows(MASK, r, end)
            x = tl.load(
                X + (r - first)[:, None] * x_stride + columns[None, :],
                mask=real[:, None] & (columns < L)[None, :],
                other=0.0,
            ).to(A)
            if CENTRE is not None:
                x = x - centre[None, :]
            next_sums = ()
            next_totals = ()
            for j in tl.static_range(J):
                if S is None:
                    weight = tl.where(real, tl.cast(1.0, A), 0.0)
                    term = x
                elif SOFTMAX:
                    s = tl.load(S + r * K + heads[j], mask=real, other=float("-inf")).to(A)
                    weight = tl.exp(s - finite_or_zero(tops[j]))
                    term = tl.where((s == float("-inf"))[:, None], 0.0, x * weight[:, None])
                else:
                    weight = tl.load(S + r * K + heads[j], mask=real, other=0.0).to(A)
                    term = x * weight[:, None]
                next_sums = next_sums + (sums[j] + tl.sum(term, axis=0),)
                next_totals = next_totals + (totals[j] + tl.sum(weight, axis=0),)
            sums = next_sums
            totals = next_totals
        for j in tl.static_range(J):
            at = tl.cast(slot, tl.int64) * K + heads[j]
            tl.store(SUM + at * L + columns, sums[j], mask=columns < L)
            if SOFTMAX:
                tl.store(TOP + at, tops[j], mask=tl.program_id(1) == 0)
                tl.store(TOTAL + at, totals[j], mask=tl.program_id(1) == 0)


@kernel
def pool_combine(
    OFFSETS, TOP, TOTAL, SUM, OUT, LSE,
    rows, L, K, SOFTMAX: tl.constexpr, R, BS: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Merges the partial sums of a bag and head; in a softmax each is scaled by its own maximum, and the sum is divided
    by that of the weights."""
    A: tl.constexpr = OUT.dtype.element_ty
    bag = tl.program_id(0) // K
    k = tl.program_id(0) % K
    columns = tl.program_id(1) * BL + tl.arange(0, BL)
    first, end = slots_of(OFFSETS, bag, rows, R)
    top = tl.full([BS], float("-inf"), A)
    if SOFTMAX:
        for slot in tl.range(first, end, BS):
            s = slot + tl.arange(0, BS)
            top = tl.maximum(top, tl.load(TOP + s * K + k, mask=s < end, other=float("-inf")))
    highest = tl.max(top, axis=0)
    base = finite_or_zero(highest)
    total = tl.zeros([BS], A)
    sums = tl.zeros([BS, BL], A)
    for slot in tl.range(first, end, BS):
        s = slot + tl.arange(0, BS)
        part = tl.load(
            SUM + (s * K + k)[:, None] * L + columns[None, :],
            mask=(s < end)[:, None] & (columns < L)[None, :],
            other=0.0,
        )
        if SOFTMAX:
            part_top = tl.load(TOP + s * K + k, mask=s < end, other=float("-inf"))
            factor = tl.exp(part_top - base)
            total += tl.load(TOTAL + s * K + k, mask=s < end, other=0.0) * factor
            sums += part * factor[:, None]
        else:
            sums += part
    bag_sum = tl.sum(sums, axis=0)
    all_of_them = tl.sum(total, axis=0)
    at = tl.cast(tl.program_id(0), tl.int64)
    if SOFTMAX:
        bag_sum = bag_sum / tl.where(all_of_them == 0, 1.0, all_of_them)
    tl.store(OUT + at * L + columns, bag_sum, mask=columns < L)
    if LSE is not None:
        tl.store(LSE + at, log_sum_exp(highest, all_of_them), mask=tl.program_id(1) == 0)


@kernel
def sums_partial(
    V, W, MASK, OFFSETS, TOP, TOTAL, bags, rows, K,
    SOFTMAX: tl.constexpr, R, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes, for a segment of values V [N, K], their maximum and the sum of exp(value - maximum), or their sum (times
    W [N, K] if given); without V they are counted."""
    A: tl.constexpr = TOTAL.dtype.element_ty
    slot = tl.program_id(0)
    bag, start, end = segment(OFFSETS, slot, bags, rows, R)
    if start < end:
        k = tl.program_id(1) * BK + tl.arange(0, BK)
        top = tl.full([BK], float("-inf"), A)
        total = tl.zeros([BK], A)
        for row in tl.range(start, end, BN):
            r = row + tl.arange(0, BN)
            used = real_rows(MASK, r, end)[:, None] & (k < K)[None, :]
            at = r[:, None] * K + k[None, :]
            if SOFTMAX:
                v = tl.load(V + at, mask=used, other=float("-inf")).to(A)
                higher = tl.maximum(top, tl.max(v, axis=0))
                base = finite_or_zero(higher)
                total = total * tl.exp(top - base) + tl.sum(tl.exp(v - base[None, :]), axis=0)
                top = higher
            else:
                v = tl.where(used, tl.cast(1.0, A), 0.0)
                if V is not None:
                    v = tl.load(V + at, mask=used, other=0.0).to(A)
                if W is not None:
                    v = v * tl.load(W + at, mask=used, other=0.0).to(A)
                total += tl.sum(v, axis=0)
        at = tl.cast(slot, tl.int64) * K + k
        tl.store(TOTAL + at, total, mask=k < K)
        if SOFTMAX:
            tl.store(TOP + at, top, mask=k < K)


@kernel
def sums_combine(
    OFFSETS, TOP, TOTAL, BAG_TOP, BAG_TOTAL, rows, K,
    SOFTMAX: tl.constexpr, R, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Merges partial maxima TOP and sums TOTAL to those of each bag [B, K]; a maximum of -inf becomes 0."""
    A: tl.constexpr = BAG_TOTAL.dtype.element_ty
    bag = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    first, end = slots_of(OFFSETS, bag, rows, R)
    top = tl.full([BK], float("-inf"), A)
    total = tl.zeros([BK], A)
    for slot in tl.range(first, end, BS):
        s = slot + tl.arange(0, BS)
        used = (s < end)[:, None] & (k < K)[None, :]
        part = tl.load(TOTAL + s[:, None] * K + k[None, :], mask=used, other=0.0)
        if SOFTMAX:
            part_top = tl.load(TOP + s[:, None] * K + k[None, :], mask=used, other=float("-inf"))
            higher = tl.maximum(top, tl.max(part_top, axis=0))
            base = finite_or_zero(higher)
            total = total * tl.exp(top - base) + tl.sum(part * tl.exp(part_top - base[None, :]), axis=0)
            top = higher
        else:
            total += tl.sum(part, axis=0)
    at = tl.cast(bag, tl.int64) * K + k
    tl.store(BAG_TOTAL + at, total, mask=k < K)
    if SOFTMAX:
        tl.store(BAG_TOP + at, finite_or_zero(top), mask=k < K)


@kernel
def bag_centres(
    BAG, TOTAL, GRAD, CENTRE, SHIFT, L, K, BK: tl.constexpr, BL: tl.constexpr
):  # fmt: skip
    """CENTRE [B, L] is the shortest bag vector among a bag's heads that have a row which is not dead (TOTAL is finite
    and not 0) and only finite numbers. SHIFT[b, k] = <bag[b, k] - centre[b], grad[b, k]>, in float64: its error is one
    that all rows of a bag share, so that it adds up over them."""
    A: tl.constexpr = CENTRE.dtype.element_ty
    bag = tl.cast(tl.program_id(0), tl.int64)
    shortest = tl.cast(float("inf"), A)
    head = bag * K
    for first in tl.range(0, K, BK):
        k = first + tl.arange(0, BK)
        squares = tl.zeros([BK], A)
        for column in tl.range(0, L, BL):
            c = column + tl.arange(0, BL)
            inside = (k < K)[:, None] & (c < L)[None, :]
            v = tl.load(BAG + (bag * K + k)[:, None] * L + c[None, :], mask=inside, other=0.0)
            squares += tl.sum(v * v, axis=1)
        total = tl.load(TOTAL + bag * K + k, mask=k < K, other=0.0)
        usable = (squares < float("inf")) & (total > 0) & (total < float("inf"))
        squares = tl.where(usable, squares, float("inf"))
        least = tl.min(squares, axis=0)
        at = tl.min(tl.where(squares == least, k, K), axis=0)
        head = tl.where(least < shortest, bag * K + at, head)
        shortest = tl.minimum(shortest, least)
    for column in tl.range(0, L, BL):
        c = column + tl.arange(0, BL)
        centre = tl.load(BAG + head * L + c, mask=c < L, other=0.0)
        tl.store(CENTRE + bag * L + c, tl.where(tl.abs(centre) < float("inf"), centre, 0.0), mask=c < L)
    for first in tl.range(0, K, BK):
        k = first + tl.arange(0, BK)
        shift = tl.zeros([BK], tl.float64)
        for column in tl.range(0, L, BL):
            c = column + tl.arange(0, BL)
            inside = (k < K)[:, None] & (c < L)[None, :]
            at = (bag * K + k)[:, None] * L + c[None, :]
            centre = tl.load(BAG + head * L + c, mask=c < L, other=0.0)
            centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
            v = tl.load(BAG + at, mask=inside, other=0.0).to(tl.float64) - centre[None, :]
            shift += tl.sum(v * tl.load(GRAD + at, mask=inside, other=0.0), axis=1)
        tl.store(SHIFT + bag * K + k, shift, mask=k < K)


# Launches


def row_tile(width: int, itemsize: int, most: int = 2048) -> dict[str, int]:
    """A tile of rows whose columns lie across the threads, 16 bytes each, and whose rows lie in their registers."""
    columns = max(min(power_of_two(width), most), 16)
    lane = 16 // itemsize
    warps = min(max(columns // (32 * lane), 1), 8)
    numbers = 16 if itemsize == 8 else 64  # that a thread holds, in registers of 4 bytes
    rows = max(4, min(16, numbers * 32 * warps // columns))
    return {"BL": columns, "BN": rows, "num_warps": warps}


def head_groups(heads: int) -> tuple[int, int]:
    """Splits heads into groups that share a read of the rows: ``(groups, heads of a group)``."""
    groups = ceil_div(heads, HEADS)
    return groups, ceil_div(heads, groups)


class Partials:
    """The partial sums of one pooling, of all rows at once or of one slice of rows after the other."""

    def __init__(self, call: Call, heads: int, width: int, *, softmax: bool = True):
        self.call, self.heads, self.width, self.softmax = call, heads, width, softmax
        self.sum = call.empty(call.slots, heads, width)
        self.top = call.empty(call.slots, heads) if softmax else None
        self.total = self.top if self.top is None else call.empty(call.slots, heads)

    def add(self, x: Tensor, weights: Tensor | None, rows: slice | None = None, mask=None, centre=None) -> None:
        """Adds the rows of a slice, which ``x`` [n, width] holds, less the ``centre`` [B, width] of their bag.
        ``weights`` [N, heads] are those of all rows, and scores in a softmax, all 0 where they are None."""
        call, rows = self.call, rows or self.call.whole
        if call.rows == 0:
            return
        tile, align = row_tile(self.width, x.element_size()), alignment(self.width, x.stride(0))
        if align * x.element_size() < 16:
            tile["BN"] = max(4, tile["BN"] // 2)  # more addresses are in registers
        groups, J = head_groups(self.heads)
        grid = (call.slots_in(rows), ceil_div(self.width, tile["BL"]), groups)
        launch(
            pool_partial, grid, x, weights, centre, mask, call.offsets, self.top, self.total, self.sum,
            call.bags, call.rows, rows.start, rows.stop, x.stride(0), self.width, self.heads,
            SOFTMAX=self.softmax, R=call.chunk, J=J, NS=3, ALIGN=align, **tile,
        )  # fmt: skip

    def result(self, *, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
        """``(bag [B, heads, width], lse [B, heads])``, the latter of a softmax."""
        call = self.call
        bag = call.empty(call.bags, self.heads, self.width)
        lse = call.empty(call.bags, self.heads) if self.softmax and with_lse else None
        launch(
            pool_combine, (call.bags * self.heads, ceil_div(self.width, 32)),
            call.offsets, self.top, self.total, self.sum, bag, lse, call.rows, self.width, self.heads,
            SOFTMAX=self.softmax, R=call.chunk, BS=SLOTS, BL=32, num_warps=8,
        )  # fmt: skip
        return bag, lse


def softmax_pool(call: Call, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Pools rows ``x`` [N, L] by scores [N, K], which are -inf where a row is dead: ``(bag [B, K, L], lse [B, K])``."""
    partials = Partials(call, scores.shape[1], x.shape[1])
    partials.add(x, scores, mask=call.mask)
    return partials.result()


def weighted_sums(call: Call, x: Tensor, weights: Tensor, centre: Tensor | None = None) -> Tensor:
    """``sum_i weights[i, k] (x_i - centre[b])`` over each bag, without the masked rows: [B, K, L]."""
    partials = Partials(call, weights.shape[1], x.shape[1], softmax=False)
    partials.add(x, weights, mask=call.mask, centre=centre)
    return partials.result()[0]


def _column_tile(columns: int) -> dict[str, int]:
    block = min(power_of_two(columns), 16)
    return {"BK": block, "num_warps": 4}


def _column_sums(call: Call, values: Tensor | None, factors: Tensor | None, softmax: bool):
    K = 1 if values is None else values.shape[1]
    total = call.empty(call.slots, K)
    top = call.empty(call.slots, K) if softmax else None
    tile = _column_tile(K)
    columns = ceil_div(K, tile["BK"])
    if call.rows:
        launch(
            sums_partial, (call.slots_in(call.whole), columns),
            values, factors, call.mask, call.offsets, top, total, call.bags, call.rows, K,
            SOFTMAX=softmax, R=call.chunk, BN=min(256, 2048 // tile["BK"]), **tile,
        )  # fmt: skip
    return _merged(call, top, total, softmax)


def _merged(call: Call, top: Tensor | None, total: Tensor, softmax: bool):
    K = total.shape[1]
    bag_total = call.empty(call.bags, K)
    bag_top = call.empty(call.bags, K) if softmax else None
    tile = _column_tile(K)
    launch(
        sums_combine, (call.bags, ceil_div(K, tile["BK"])), call.offsets, top, total, bag_top, bag_total, call.rows, K,
        SOFTMAX=softmax, R=call.chunk, BS=SLOTS, **tile,
    )  # fmt: skip
    return bag_top, bag_total


def softmax_terms(call: Call, scores: Tensor) -> tuple[Tensor, Tensor]:
    """``(top, total)`` [B, K] of scores [N, K]: a weight is ``exp(score - top) / total``, which is exact where
    ``exp(score - lse)`` is not, since an lse of 500 is rounded by 3e-5."""
    return _column_sums(call, scores, None, True)


def centres(call: Call, bag: Tensor, total: Tensor, grad_bag: Tensor) -> tuple[Tensor, Tensor]:
    """``(c [B, L], <bag - c, grad_bag> [B, K])``. The gradient of a score is  a (<x - c, grad> - <bag - c, grad>)  for
    any c; near the bag vectors it keeps the digits of features with a mean.

    All heads of a bag share the centre, so that rows are read once. It is no longer than any head's own vector, so it
    costs no head a digit, and NaN in one head does not reach another. ``total`` [B, K] comes from `softmax_terms`.
    """
    K, L = bag.shape[1:]
    centre, shift = call.empty(call.bags, L), call.empty(call.bags, K)
    block = min(power_of_two(K), 8)
    launch(
        bag_centres, (call.bags,), call.to_acc(bag), total, grad_bag, centre, shift, L, K,
        BK=block, BL=min(max(power_of_two(L), 16), 2048 // block), num_warps=4,
    )  # fmt: skip
    return centre, shift


def column_sums(call: Call, values: Tensor, factors: Tensor | None = None) -> Tensor:
    """``sum_i values[i, k] factors[i, k]`` over each bag, without masked rows: [B, K]."""
    return _column_sums(call, values, factors, False)[1]


def counts(call: Call) -> Tensor:
    """How many real rows each bag has: [B, 1]."""
    return _column_sums(call, None, None, False)[1]


def merged_sums(call: Call, partial: Tensor) -> Tensor:
    """Merges the partial sums [slots, K] of each bag: [B, K]."""
    return _merged(call, None, partial, False)[1]
