"""Ops that choose: the largest logit or feature of each bag, and the k best instances. The lowest row wins a tie, NaN
beats every number, and dead rows are never chosen."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from milkernels.triton import pool
from milkernels.triton.call import Call
from milkernels.triton.common import bag_rows, kernel, multiple, real_rows, segment, slots_of
from milkernels.triton.gradients import RowGradients, checked_inputs, in_their_types, zero_where_dead
from milkernels.triton.host import alignment, ceil_div, launch
from milkernels.triton.instances import Instances
from milkernels.triton.pooling import class_logits, linear_gradients

_NONE = tl.constexpr(1 << 62)  # stands for no row: it is past any


@triton.jit
def _first_largest(values, index, eligible, none):
    """``(value, index)`` of the first largest in each column of [rows, columns]; NaN is the largest. The index is
    ``none``, which is past any other, where nothing is eligible."""
    nan = tl.min(tl.where(eligible & (values != values), index, none), axis=0)
    top = tl.max(tl.where(eligible & (values == values), values, float("-inf")), axis=0)
    at = tl.min(tl.where(eligible & (values == top[None, :]), index, none), axis=0)
    found = tl.where(nan < none, nan, at)
    return tl.where(nan < none, float("nan"), top), found


@triton.jit
def _better(value, at, best, best_at):
    """The better of two candidates, the first of which comes from later rows."""
    wins = (at < _NONE) & ((best_at == _NONE) | ((best == best) & ((value > best) | (value != value))))
    return tl.where(wins, value, best), tl.where(wins, at, best_at)


@kernel
def max_partial(
    X, MASK, OFFSETS, VALUES, ROWS, bags, rows, x_stride, L,
    DEAD: tl.constexpr, R, BN: tl.constexpr, BL: tl.constexpr, NS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes the first largest of each column of a segment, and its row. If DEAD, -inf is not eligible."""
    A: tl.constexpr = VALUES.dtype.element_ty
    L = multiple(L, ALIGN)
    x_stride = multiple(x_stride, ALIGN)
    slot = tl.program_id(0)
    bag, start, end = segment(OFFSETS, slot, bags, rows, R)
    if start < end:
        c = tl.program_id(1) * BL + tl.arange(0, BL)
        best = tl.full([BL], float("-inf"), A)
        best_at = tl.full([BL], _NONE, tl.int64)
        for row in tl.range(start, end, BN, num_stages=NS):
            r = tl.cast(row, tl.int64) + tl.arange(0, BN)
            used = real_rows(MASK, r, end)[:, None] & (c < L)[None, :]
            x = tl.load(X + r[:, None] * x_stride + c[None, :], mask=used, other=float("-inf")).to(A)
            if DEAD:
                used = used & (x != float("-inf"))
            value, at = _first_largest(x, tl.arange(0, BN)[:, None], used, BN)
            best, best_at = _better(value, tl.where(at < BN, tl.cast(row, tl.int64) + at, _NONE), best, best_at)
        tl.store(VALUES + tl.cast(slot, tl.int64) * L + c, best, mask=c < L)
        tl.store(ROWS + tl.cast(slot, tl.int64) * L + c, best_at, mask=c < L)


@kernel
def max_combine(
    OFFSETS, VALUES, ROWS, OUT, INDICES, rows, L,
    EMPTY: tl.constexpr, R, BS: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Writes the first largest of each bag and column [B, L] and its row; EMPTY and -1 where there is none."""
    A: tl.constexpr = VALUES.dtype.element_ty
    bag = tl.program_id(0)
    c = tl.program_id(1) * BL + tl.arange(0, BL)
    first, end = slots_of(OFFSETS, bag, rows, R)
    best = tl.full([BL], float("-inf"), A)
    best_at = tl.full([BL], _NONE, tl.int64)
    for slot in tl.range(first, end, BS):
        s = slot + tl.arange(0, BS)
        used = (s < end)[:, None] & (c < L)[None, :]
        value = tl.load(VALUES + s[:, None] * L + c[None, :], mask=used, other=float("-inf"))
        at = tl.load(ROWS + s[:, None] * L + c[None, :], mask=used, other=_NONE)
        value, at = _first_largest(value, at, used & (at < _NONE), _NONE)
        best, best_at = _better(value, at, best, best_at)
    none = best_at == _NONE
    out = tl.cast(bag, tl.int64) * L + c
    tl.store(OUT + out, tl.where(none, EMPTY, best).to(OUT.dtype.element_ty), mask=c < L)
    tl.store(INDICES + out, tl.where(none, -1, best_at), mask=c < L)


@kernel
def scatter(INDICES, G, OUT, count, columns, k, stride, rows, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """OUT[indices[j, c, i], c] = g[j, c, i], or += if ADD, for g [B, columns, k]. No two numbers go to one place."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(INDICES + j, mask=j < count, other=-1)
    used = (row >= 0) & (row < rows)
    at = OUT + row * stride + (j // k) % columns
    g = tl.load(G + j, mask=used, other=0.0).to(OUT.dtype.element_ty)
    if ADD:
        g += tl.load(at, mask=used, other=0.0)
    tl.store(at, g, mask=used)


@kernel
def sort_keys(X, MASK, OFFSETS, KEYS, bags, rows, x_stride, LARGEST: tl.constexpr, R, BN: tl.constexpr):
    """Writes KEYS [K, N] that order rows by their bag, then the dead last, then (except for float64) by their score,
    NaN above all."""
    k = tl.program_id(1)
    bag, start, end = segment(OFFSETS, tl.program_id(0), bags, rows, R)
    for row in tl.range(start, end, BN):
        r = row + tl.arange(0, BN)
        x = tl.load(X + r * x_stride + k, mask=r < end, other=0.0)
        dead = (x == float("-inf")) | (real_rows(MASK, r, end) == 0)
        key = tl.cast(bag, tl.int64) * 2 + dead.to(tl.int64)
        if X.dtype.element_ty != tl.float64:
            bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)  # -0 + 0 is 0
            number = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            number = tl.where(x == x, number, 0x7FFFFFFF).to(tl.int64)
            key = key * (1 << 32) + (0x7FFFFFFF - number if LARGEST else number + 0x80000000)
        tl.store(KEYS + tl.cast(k, tl.int64) * rows + r, key, mask=r < end)


@kernel
def pick(X, MASK, OFFSETS, ORDER, VALUES, INDICES, rows, K, k, x_stride, NONE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the values and numbers [B, K, k] of the first k rows of a bag and column in ORDER [K, N]; NONE and -1
    where no row is left that is not dead."""
    bag = tl.program_id(0) // K
    column = tl.program_id(0) % K
    start, end = bag_rows(OFFSETS, bag, rows)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < k) & (start + i < end)
    row = tl.load(ORDER + tl.cast(column, tl.int64) * rows + start + i, mask=inside, other=0)
    x = tl.load(X + row * x_stride + column, mask=inside, other=float("-inf"))
    living = inside & (x != float("-inf"))
    if MASK is not None:
        living = living & (tl.load(MASK + row, mask=inside, other=0) != 0)
    at = tl.cast(tl.program_id(0), tl.int64) * k + i
    tl.store(VALUES + at, tl.where(living, x, NONE), mask=i < k)
    tl.store(INDICES + at, tl.where(living, row, -1), mask=i < k)


# Launches


def first_max(call: Call, values: Tensor, *, dead: bool, empty: float) -> tuple[Tensor, Tensor]:
    """``(values, rows)`` [B, L] of the first largest in each column and bag of ``values`` [N, L], in their type.
    ``dead`` says that -inf is not eligible, ``empty`` is the value of a bag that has none."""
    L = values.shape[1]
    best, at = call.empty(call.slots, L), call.empty(call.slots, L, dtype=torch.int64)
    out, indices = call.empty(call.bags, L, dtype=values.dtype), call.empty(call.bags, L, dtype=torch.int64)
    tile = pool.row_tile(L, values.element_size(), most=512)
    if call.rows:
        launch(
            max_partial, (call.slots_in(call.whole), ceil_div(L, tile["BL"])),
            values, call.mask, call.offsets, best, at, call.bags, call.rows, values.stride(0), L,
            DEAD=dead, R=call.chunk, NS=3, ALIGN=alignment(L, values.stride(0)), **tile,
        )  # fmt: skip
    launch(
        max_combine, (call.bags, ceil_div(L, 32)), call.offsets, best, at, out, indices, call.rows, L,
        EMPTY=empty, R=call.chunk, BS=32, BL=32, num_warps=2,
    )  # fmt: skip
    return out, indices


def put(indices: Tensor, values: Tensor, out: Tensor, k: int = 1, *, add: bool = False) -> None:
    """``out[indices[j, c, i], c] = values[j, c, i]``, or ``+=`` with ``add``, for values [B, columns, k]; an index of
    -1 goes nowhere."""
    count, columns = indices.numel(), out.shape[1]
    launch(
        scatter, (ceil_div(count, 256),), indices, values.contiguous(), out, count, columns, k, out.stride(0),
        out.shape[0], ADD=add, BLOCK=256, num_warps=4,
    )  # fmt: skip


# The ops


def instance_max_fwd(x, weights, offsets, mask, *embed):
    return largest_logits(Instances(x, offsets, mask, *embed), *weights)


def largest_logits(call: Instances, weight: Tensor, bias: Tensor | None):
    """``(values, indices, logits)`` of the logits ``W x + b``."""
    logits = class_logits(call, weight, bias)
    return *first_max(call, logits, dead=True, empty=float("-inf")), logits


def instance_max_bwd(
    x, weights, offsets, mask, indices, logits, embed, embed_activation, embed_dropout_p, embed_dtype,
    grad_values, grad_logits, needs,
):  # fmt: skip
    inputs = checked_inputs(needs, "weight bias", x, weights, embed)
    call = Instances(x, offsets, mask, embed, embed_activation, embed_dropout_p, embed_dtype)
    sink = RowGradients(call, needs)
    of_layer = _instance_max_gradients(call, weights[0], indices, logits, grad_values, grad_logits, needs[1:3], sink)
    found = (sink.of_x(), *of_layer, *sink.of_embedding())
    return in_their_types(call, inputs, found, needs)


def _instance_max_gradients(call: Instances, weight, indices, logits, grad_values, grad_logits, needs, sink):
    """The gradients of W [C, L] and b [C]; adds that of the rows to ``sink``. Where the logits have no gradient of
    their own, only the chosen rows [B, C] have one."""
    indices = indices.contiguous()
    grad_values = call.to_acc(grad_values)
    if grad_logits is not None:
        of_logits = zero_where_dead(call.to_acc(grad_logits), logits)
        if grad_values is not None:
            put(indices, grad_values, of_logits, add=True)
        return linear_gradients(call, weight, of_logits, None, needs[0], sink)
    chosen = call.gathered(indices)
    of_rows, *of_layer = winner_gradients(grad_values, indices, chosen.values.flatten(0, 1), call.to_acc(weight))
    if sink.needed:
        sink.add_gathered(chosen, of_rows.view_as(chosen.values))
    return of_layer


def winner_gradients(grad_values, indices, rows, weight):
    """From the gradients of the largest logits [B, C], those of ``rows`` [B C, L] by ``weight`` [C, L]: the gradients
    of the rows, of the weight and of the bias. An index of -1 is none."""
    g = grad_values.masked_fill(indices < 0, 0)[:, :, None]
    of_weight = (g * rows.view(*indices.shape, rows.shape[1])).sum(0)
    return (g * weight).flatten(0, 1), of_weight, g.sum((0, 2))


def max_pool_fwd(x, offsets, mask):
    call = Call(x, offsets, mask)
    return first_max(call, call.x, dead=False, empty=0.0)


def max_pool_bwd(x, indices, grad_values, needs):
    if not needs[0]:
        return x.new_empty(0)
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    put(indices.contiguous(), grad_values, grad_x)
    return grad_x


def topk_instances_fwd(scores, k, offsets, largest, mask):
    call = Call(scores, offsets, mask)
    K = scores.shape[1]
    values, indices = (call.empty(call.bags, K, k, dtype=t) for t in (scores.dtype, torch.int64))
    launch(
        pick, (call.bags * K, ceil_div(k, 256)),
        call.x, call.mask, call.offsets, _order(call, largest), values, indices, call.rows, K, k,
        call.x.stride(0), NONE=float("-inf") if largest else float("inf"), BLOCK=256, num_warps=4,
    )  # fmt: skip
    return values, indices


def _order(call: Call, largest: bool) -> Tensor:
    """The order [K, N] of rows: bag after bag, in each of them the best first and the dead last. The library sorts."""
    K = call.x.shape[1]
    keys = call.empty(K, call.rows, dtype=torch.int64)
    if call.rows:
        launch(
            sort_keys, (call.slots_in(call.whole), K), call.x, call.mask, call.offsets, keys, call.bags, call.rows,
            call.x.stride(0), LARGEST=largest, R=call.chunk, BN=256, num_warps=4,
        )  # fmt: skip
    if call.acc == torch.float64:  # scores fill 64 bits, so they are sorted first
        numbers = call.x.t().contiguous()
        order = torch.sort(numbers, dim=1, descending=largest, stable=True).indices
        return order.gather(1, torch.sort(keys.gather(1, order), dim=1, stable=True).indices)
    return torch.sort(keys, dim=1, stable=True).indices


def topk_instances_bwd(scores, indices, grad_values, needs):
    if not needs[0]:
        return scores.new_empty(0)
    grad = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    put(indices.contiguous(), grad_values, grad, k=indices.shape[2])
    return grad
