"""Kernels that go row by row: products of rows with the vectors of their bag, and rows made of such vectors.

With the sums of ``pool`` these are the three derivatives of  sum_ik weight[i,k] <x_i, vector[bag(i),k]>, of which every
op and its backward consist.
"""

import torch
import triton.language as tl
from torch import Tensor

from milkernels.triton.call import Call
from milkernels.triton.common import dropout_factors, kernel, multiple, real_rows, segment, shifted
from milkernels.triton.host import alignment, ceil_div, launch, power_of_two
from milkernels.triton.pool import row_tile


@kernel
def row_products(
    X, VECTORS, CENTRE, SHIFT, MASK, OFFSETS, OUT,
    bags, rows, first, last, x_stride, L, K, vector_stride,
    R, BK: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, NS: tl.constexpr, FILL: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """OUT[i, k] = <x_i - centre[b], vectors[b, k]> + shift[b, k], -inf where the shift is, FILL where the row is
    masked. Row `first` is at X."""
    A: tl.constexpr = OUT.dtype.element_ty
    L = multiple(L, ALIGN)
    x_stride = multiple(x_stride, ALIGN)
    bag, start, end = segment(OFFSETS, first // R + tl.program_id(0), bags, rows, R)
    if (start < end) & (start >= first) & (start < last):
        k = tl.program_id(1) * BK + tl.arange(0, BK)
        vectors = VECTORS + tl.cast(bag, tl.int64) * vector_stride
        for row in tl.range(start + tl.program_id(2) * BN, end, BN * tl.num_programs(2)):
            r = row + tl.arange(0, BN)
            real = real_rows(MASK, r, end)
            out = tl.zeros([BN, BK], A)
            for column in tl.range(0, L, BL, num_stages=NS):
                c = column + tl.arange(0, BL)
                x = tl.load(
                    X + (r - first)[:, None] * x_stride + c[None, :],
                    mask=real[:, None] & (c < L)[None, :],
                    other=0.0,
                ).to(A)
                if CENTRE is not None:
                    x = x - tl.load(CENTRE + tl.cast(bag, tl.int64) * L + c, mask=c < L, other=0.0)[None, :]
                for j in tl.static_range(BK):
                    head = tl.minimum(tl.program_id(1) * BK + j, K - 1)
                    v = tl.load(vectors + tl.cast(head, tl.int64) * L + c, mask=c < L, other=0.0)
                    product = tl.sum(x * v.to(A)[None, :], axis=1)
                    if BK == 1:
                        out += product[:, None]
                    else:
                        out += tl.where((tl.arange(0, BK) == j)[None, :], product[:, None], 0.0)
            if SHIFT is not None:
                shift = tl.load(SHIFT + tl.cast(bag, tl.int64) * K + k, mask=k < K, other=0.0).to(A)
                out = shifted(out, shift[None, :])
            out = tl.where(real[:, None], out, FILL)
            tl.store(OUT + r[:, None] * K + k[None, :], out, mask=(r < end)[:, None] & (k < K)[None, :])


@kernel
def score_gradients(
    DA, S, TOP, TOTAL, SHIFT, DLSE, DS, OFFSETS, OUT, WEIGHTS,
    bags, rows, first, last, K, R, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """OUT = a (da - shift + dlse) + DS, the gradient of the scores [N, K], 0 for dead rows; WEIGHTS, if given, gets
    a."""
    A: tl.constexpr = OUT.dtype.element_ty
    bag, start, end = segment(OFFSETS, first // R + tl.program_id(0), bags, rows, R)
    if (start < end) & (start >= first) & (start < last):
        k = tl.program_id(1) * BK + tl.arange(0, BK)
        of_bag = tl.cast(bag, tl.int64) * K + k
        top = tl.load(TOP + of_bag, mask=k < K, other=0.0)
        total = tl.load(TOTAL + of_bag, mask=k < K, other=1.0)
        constant = tl.zeros([BK], A)
        if SHIFT is not None:
            constant -= tl.load(SHIFT + of_bag, mask=k < K, other=0.0)
        if DLSE is not None:
            constant += tl.load(DLSE + of_bag, mask=k < K, other=0.0)
        for row in tl.range(start + tl.program_id(2) * BN, end, BN * tl.num_programs(2)):
            r = row + tl.arange(0, BN)
            used = (r < end)[:, None] & (k < K)[None, :]
            at = r[:, None] * K + k[None, :]
            s = tl.load(S + at, mask=used, other=float("-inf"))
            dead = s == float("-inf")
            a = tl.exp(s - top[None, :]) / total[None, :]
            da = tl.zeros([BN, BK], A) + constant[None, :]
            if DA is not None:
                da += tl.load(DA + at, mask=used, other=0.0)
            ds = a * da
            if DS is not None:
                ds += tl.load(DS + at, mask=used, other=0.0)
            tl.store(OUT + at, tl.where(dead, 0.0, ds), mask=used)
            if WEIGHTS is not None:
                tl.store(WEIGHTS + at, tl.where(dead, 0.0, a), mask=used)


@kernel
def bag_weights(
    V, TOP, TOTAL, SHIFT, G, MASK, OFFSETS, OUT,
    bags, rows, K, EXP: tl.constexpr, R, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """OUT [N, K] = exp(v - top) / total, 0 for dead rows, if EXP; else v (g - shift)."""
    A: tl.constexpr = OUT.dtype.element_ty
    bag, start, end = segment(OFFSETS, tl.program_id(0), bags, rows, R)
    if start < end:
        k = tl.program_id(1) * BK + tl.arange(0, BK)
        of_bag = tl.cast(bag, tl.int64) * K + k
        for row in tl.range(start + tl.program_id(2) * BN, end, BN * tl.num_programs(2)):
            r = row + tl.arange(0, BN)
            real = real_rows(MASK, r, end)
            used = (r < end)[:, None] & (k < K)[None, :]
            at = r[:, None] * K + k[None, :]
            if EXP:
                v = tl.load(V + at, mask=used & real[:, None], other=float("-inf")).to(A)
                out = tl.exp(v - tl.load(TOP + of_bag, mask=k < K, other=0.0)[None, :])
                if TOTAL is not None:
                    out = out / tl.load(TOTAL + of_bag, mask=k < K, other=1.0)[None, :]
                out = tl.where(v == float("-inf"), 0.0, out)
            else:
                v = tl.load(V + at, mask=used, other=0.0).to(A)
                g = tl.load(G + at, mask=used, other=0.0)
                if SHIFT is not None:
                    g = g - tl.load(SHIFT + of_bag, mask=k < K, other=0.0)[None, :]
                # A weight of 0 takes part in nothing, whatever comes back to it.
                out = tl.where(v == 0, 0.0, v * g)
            tl.store(OUT + at, out, mask=used)


@kernel
def expand_rows(
    PRODUCT, SCALE, WEIGHTS, VECTORS, WEIGHTS2, VECTORS2, MASK, OFFSETS, OUT,
    bags, rows, first, last, out_stride, L, K, K2, vector_stride2,
    R, BN: tl.constexpr, BL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """OUT[i] = product[i] scale + sum_k weights[i, k] vectors[b, k] + sum_j weights2[i, j] vectors2[b, j]; 0 if masked.

    Row `first` is at PRODUCT and at OUT, which may be one tensor; each of the three terms may be None. Without WEIGHTS
    those of VECTORS are 1.
    """
    A: tl.constexpr = tl.float64 if OUT.dtype.element_ty == tl.float64 else tl.float32
    L = multiple(L, ALIGN)
    out_stride = multiple(out_stride, ALIGN)
    bag, start, end = segment(OFFSETS, first // R + tl.program_id(0), bags, rows, R)
    if (start < end) & (start >= first) & (start < last):
        c = tl.program_id(1) * BL + tl.arange(0, BL)
        for row in tl.range(start + tl.program_id(2) * BN, end, BN * tl.num_programs(2)):
            r = row + tl.arange(0, BN)
            real = real_rows(MASK, r, end)
            used = (r < end)[:, None] & (c < L)[None, :]
            out = tl.zeros([BN, BL], A)
            if PRODUCT is not None:
                out = tl.load(PRODUCT + (r - first)[:, None] * L + c[None, :], mask=used, other=0.0).to(A)
                if SCALE is not None:
                    out = out * tl.load(SCALE)
            if VECTORS is not None:
                for k in tl.range(0, K):
                    v = tl.load(VECTORS + (tl.cast(bag, tl.int64) * K + k) * L + c, mask=c < L, other=0.0).to(A)
                    if WEIGHTS is None:
                        out += v[None, :]
                    else:
                        w = tl.load(WEIGHTS + r * K + k, mask=r < end, other=0.0)
                        out += tl.where((w == 0)[:, None], 0.0, w[:, None] * v[None, :])
            if WEIGHTS2 is not None:
                for k in tl.range(0, K2):
                    w = tl.load(WEIGHTS2 + r * K2 + k, mask=r < end, other=0.0)
                    at = tl.cast(bag, tl.int64) * vector_stride2 + tl.cast(k, tl.int64) * L
                    v = tl.load(VECTORS2 + at + c, mask=c < L, other=0.0).to(A)
                    out += tl.where((w == 0)[:, None], 0.0, w[:, None] * v[None, :])
            out = tl.where(real[:, None], out, 0.0)
            tl.store(OUT + (r - first)[:, None] * out_stride + c[None, :], out.to(OUT.dtype.element_ty), mask=used)


@kernel
def copy_rows(
    X, MASK, SEED, OUT, first, last, x_stride, L, threshold, BN: tl.constexpr, BL: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Copies rows [first, last), the first of which is at X, to OUT in its type: 0 where masked, after dropout (branch
    2), which alone counts rows from 0."""
    A: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    L = multiple(L, ALIGN)
    x_stride = multiple(x_stride, ALIGN)
    r = tl.cast(first, tl.int64) + tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BL + tl.arange(0, BL)
    inside = (r < last)[:, None] & (c < L)[None, :]
    real = real_rows(MASK, r, last)[:, None] & (c < L)[None, :]
    x = tl.load(X + (r - first)[:, None] * x_stride + c[None, :], mask=real, other=0.0).to(A)
    if SEED is not None:
        # Dropped features are selected away, not multiplied by 0: they may be infinite.
        factors = dropout_factors(SEED, r, tl.program_id(1) * BL, threshold, 2, BL, A)
        x = tl.where(factors == 0, 0.0, x * factors)
    tl.store(OUT + (r - first)[:, None] * L + c[None, :], x.to(OUT.dtype.element_ty), mask=inside)


@kernel
def gather_rows(X, INDICES, OUT, stride, rows, L, BL: tl.constexpr):
    """OUT[i] = x[indices[i]], 0 where the index is -1."""
    i = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * BL + tl.arange(0, BL)
    inside = column < L
    row = tl.load(INDICES + i)
    x = tl.load(X + tl.minimum(tl.maximum(row, 0), rows - 1) * stride + column, mask=inside, other=0.0)
    tl.store(OUT + i * L + column, tl.where(row < 0, 0.0, x).to(OUT.dtype.element_ty), mask=inside)


@kernel
def add_rows(INDICES, V, OUT, stride, rows, L, C: tl.constexpr, BL: tl.constexpr):
    """OUT[indices[b, c]] += v[b, c]. Classes of one bag may have chosen the same row; two bags never have."""
    bag = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * BL + tl.arange(0, BL)
    inside = column < L
    for c in range(C):
        row = tl.load(INDICES + bag * C + c)
        seen = row < 0
        for before in range(c):
            seen = seen | (tl.load(INDICES + bag * C + before) == row)
        if (not seen) & (row < rows):
            at = OUT + row * stride + column
            total = tl.load(at, mask=inside, other=0.0).to(V.dtype.element_ty)
            for other in range(c, C):
                same = tl.load(INDICES + bag * C + other) == row
                v = tl.load(V + (bag * C + other) * L + column, mask=inside, other=0.0)
                total += tl.where(same, v, 0.0)
            tl.store(at, total.to(OUT.dtype.element_ty), mask=inside)


# Launches


def products(
    call: Call, x: Tensor, vectors: Tensor, *, centre=None, shift=None, fill=0.0, rows: slice | None = None, out=None
) -> Tensor:
    """``<x_i - centre[b], vectors[b, k]> + shift[b, k]`` [N, K]; vectors are [B, K, L], or [K, L] for all bags. Only
    the slice ``rows``, which ``x`` holds, is written."""
    rows = rows or call.whole
    K, L = vectors.shape[-2:]
    out = call.empty(call.rows, K) if out is None else out
    if call.rows == 0:
        return out
    block = min(power_of_two(K), 8)
    tile = row_tile(L, x.element_size())
    tile["BN"] = max(4, tile["BN"] // 2) if block == 8 else min(tile["BN"], 4 if x.element_size() == 8 else 8)
    launch(
        row_products, (call.slots_in(rows), ceil_div(K, block), call.parts),
        x, vectors, centre, shift, call.mask, call.offsets, out,
        call.bags, call.rows, rows.start, rows.stop, x.stride(0), L, K, K * L if vectors.dim() == 3 else 0,
        R=call.chunk, BK=block, NS=2, FILL=fill, ALIGN=alignment(L, x.stride(0)), **tile,
    )  # fmt: skip
    return out


def _scalar_tile(columns: int) -> dict[str, int]:
    block = min(power_of_two(columns), 16)
    return {"BK": block, "BN": max(16, 512 // block), "num_warps": 4}


def gradients_of_scores(call: Call, scores: Tensor, terms, da, shift, dlse, ds, *, out, weights, rows: slice) -> None:
    """Writes, for a slice of rows, the gradient of the scores before the softmax to ``out`` and their softmax to
    ``weights``, unless it is None; both are [N, K]. ``terms`` come from `pool.softmax_terms`."""
    K = scores.shape[1]
    tile = _scalar_tile(K)
    if call.rows:
        launch(
            score_gradients, (call.slots_in(rows), ceil_div(K, tile["BK"]), call.parts),
            da, scores, *terms, shift, dlse, ds, call.offsets, out, weights,
            call.bags, call.rows, rows.start, rows.stop, K, R=call.chunk, **tile,
        )  # fmt: skip


def weights_of(call: Call, values: Tensor, *, top=None, total=None, grad=None, shift=None) -> Tensor:
    """``exp(values - top) / total``, or ``values (grad - shift)`` where ``grad`` is given: [N, K]."""
    K = values.shape[1]
    out = call.empty(call.rows, K)
    tile = _scalar_tile(K)
    if call.rows:
        launch(
            bag_weights, (call.slots_in(call.whole), ceil_div(K, tile["BK"]), call.parts),
            values, top, total, shift, grad, call.mask, call.offsets, out, call.bags, call.rows, K,
            EXP=grad is None, R=call.chunk, **tile,
        )  # fmt: skip
    return out


def expand(
    call: Call, out: Tensor, weights=None, vectors=None, weights2=None, vectors2=None, *,
    product=None, scale=None, rows: slice | None = None,
) -> None:  # fmt: skip
    """Writes ``product * scale + weights vectors + weights2 vectors2`` into the slice's rows of ``out`` [N, L], or into
    an ``out`` that holds no others. Without ``weights`` they are 1."""
    rows = rows or call.whole
    out = out if out.shape[0] == rows.stop - rows.start else out[rows]
    if call.rows == 0:
        return
    L = out.shape[1]
    K = 0 if vectors is None else vectors.shape[1]
    K2 = 0 if weights2 is None else weights2.shape[1]
    tile = row_tile(L, out.element_size(), most=1024)
    launch(
        expand_rows, (call.slots_in(rows), ceil_div(L, tile["BL"]), call.parts),
        product, scale, weights, vectors, weights2, vectors2, call.mask, call.offsets, out,
        call.bags, call.rows, rows.start, rows.stop, out.stride(0), L, K, K2,
        K2 * L if vectors2 is not None and vectors2.dim() == 3 else 0,
        R=call.chunk, ALIGN=alignment(L, out.stride(0)), **tile,
    )  # fmt: skip


def copied(call: Call, x: Tensor, rows: slice, dtype, *, dropout=None, out=None) -> Tensor:
    """Copies the slice's rows, which ``x`` [n, L] holds, into a workspace in ``dtype``: 0 where masked, after ``dropout
    = (seed, threshold)``."""
    count, L = rows.stop - rows.start, x.shape[1]
    out = call.empty(count, L, dtype=dtype) if out is None else out
    seed, threshold = dropout or (None, 0)
    block = min(max(power_of_two(L), 16), 256)
    launch(
        copy_rows, (ceil_div(count, 16), ceil_div(L, block)),
        x, call.mask, seed, out, rows.start, rows.stop, x.stride(0), L, threshold,
        BN=16, BL=block, ALIGN=alignment(L, x.stride(0)), num_warps=4,
    )  # fmt: skip
    return out


def operand(call: Call, x: Tensor, block: slice, dtype, *, clean: bool) -> Tensor:
    """The slice's rows, which ``x`` [n, L] holds, as products take them. They are copied where the type is another, or
    where ``clean`` asks for 0 in masked rows, which may hold anything and would be summed."""
    return copied(call, x, block, dtype) if x.dtype != dtype or (clean and call.mask is not None) else x


def gathered(x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of ``x`` [N, L] with these numbers, 0 for -1, in this type: [n, L]."""
    indices, L = indices.flatten(), x.shape[1]
    out = x.new_empty((len(indices), L), dtype=dtype)
    launch(
        gather_rows, (len(indices), ceil_div(L, 1024)), x, indices, out, x.stride(0), x.shape[0], L,
        BL=1024, num_warps=4,
    )  # fmt: skip
    return out


def add_to_rows(indices: Tensor, vectors: Tensor, out: Tensor) -> None:
    """``out[indices[b, c]] += vectors[b, c]``, vectors [B, C, L] in the accumulation type."""
    (bags, classes), L = indices.shape, out.shape[1]
    launch(
        add_rows, (bags, ceil_div(L, 256)), indices, vectors.contiguous(), out, out.stride(0), out.shape[0], L,
        C=classes, BL=256, num_warps=4,
    )  # fmt: skip
