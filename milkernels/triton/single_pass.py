"""Pooling by scores that are products of the rows themselves, in one read of them: a tile of whole rows stays in
registers while it is scored, weighted and summed; in the backward, while it is differentiated.

A query: scores <x, q_k> + shift_k, a head each. Classes: logits W x + b, and one head whose score is their log-sum-exp.
"""

import triton.language as tl
from torch import Tensor

from milkernels.triton import pool
from milkernels.triton.common import finite_or_zero, kernel, log_sum_exp, multiple, real_rows, segment, shifted
from milkernels.triton.gradients import PoolGradients, RowGradients
from milkernels.triton.host import alignment, launch, power_of_two
from milkernels.triton.instances import Instances


@kernel
def score_and_pool(
    X, VECTORS, SHIFT, MASK, OFFSETS, PRODUCTS, SCORES, TOP, TOTAL, SUM,
    bags, rows, x_stride, L, vector_stride,
    J: tl.constexpr, CLASSES: tl.constexpr, R, BN: tl.constexpr, BL: tl.constexpr, NS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes the PRODUCTS [N, J] of rows with J vectors, the SCORES [N, 1] where these are logits of classes, and the
    partial pooling of a segment."""
    A: tl.constexpr = SUM.dtype.element_ty
    H: tl.constexpr = 1 if CLASSES else J
    L = multiple(L, ALIGN)
    x_stride = multiple(x_stride, ALIGN)
    slot = tl.program_id(0)
    bag, start, end = segment(OFFSETS, slot, bags, rows, R)
    if start < end:
        c = tl.arange(0, BL)
        vectors = ()
        shifts = ()
        for j in tl.static_range(J):
            at = VECTORS + tl.cast(bag, tl.int64) * vector_stride + j * L + c
            vectors = vectors + (tl.load(at, mask=c < L, other=0.0),)
            shift = tl.cast(0.0, A)
            if SHIFT is not None:
                shift = tl.load(SHIFT + tl.cast(bag, tl.int64) * J + j).to(A)
            shifts = shifts + (shift,)
        tops = ()
        totals = ()
        sums = ()
        for _h in tl.static_range(H):
            tops = tops + (tl.cast(float("-inf"), A),)
            totals = totals + (tl.cast(0.0, A),)
            sums = sums + (tl.zeros([BL], A),)
        for row in tl.range(start, end, BN, num_stages=NS):
            r = row + tl.arange(0, BN)
            real = real_rows(MASK, r, end)
            x = tl.load(X + r[:, None] * x_stride + c[None, :], mask=real[:, None] & (c < L)[None, :], other=0.0).to(A)
            products = ()
            for j in tl.static_range(J):
                p = tl.sum(x * vectors[j][None, :], axis=1)
                if SHIFT is not None:
                    p = shifted(p, shifts[j])
                p = tl.where(real, p, float("-inf"))
                tl.store(PRODUCTS + r * J + j, p, mask=r < end)
                products = products + (p,)
            if CLASSES:
                highest = products[0]
                for j in tl.static_range(1, J):
                    highest = tl.maximum(highest, products[j])
                base = finite_or_zero(highest)
                total = tl.zeros([BN], A)
                for j in tl.static_range(J):
                    total += tl.exp(products[j] - base)
                scores = (log_sum_exp(highest, total),)
                tl.store(SCORES + r, scores[0], mask=r < end)
            else:
                scores = products
            next_tops = ()
            next_totals = ()
            next_sums = ()
            for h in tl.static_range(H):
                higher = tl.maximum(tops[h], tl.max(scores[h], axis=0))
                base = finite_or_zero(higher)
                old = tl.exp(tops[h] - base)
                weight = tl.exp(scores[h] - base)
                term = tl.where((scores[h] == float("-inf"))[:, None], 0.0, x * weight[:, None])
                next_tops = next_tops + (higher,)
                next_totals = next_totals + (totals[h] * old + tl.sum(weight, axis=0),)
                next_sums = next_sums + (sums[h] * old + tl.sum(term, axis=0),)
            tops = next_tops
            totals = next_totals
            sums = next_sums
        for h in tl.static_range(H):
            at = tl.cast(slot, tl.int64) * H + h
            tl.store(TOP + at, tops[h])
            tl.store(TOTAL + at, totals[h])
            tl.store(SUM + at * L + c, sums[h], mask=c < L)


@kernel
def score_and_pool_backward(
    X, VECTORS, S, LOGITS, GRAD_BAG, CENTRE, SHIFT, TOP, TOTAL, DLSE, DS, DLOGITS, MASK, OFFSETS, GRAD_X, SUM, BIAS,
    bags, rows, x_stride, grad_stride, L, vector_stride,
    J: tl.constexpr, CLASSES: tl.constexpr, R, BN: tl.constexpr, BL: tl.constexpr, NS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of rows, and partial sums of the gradient of vectors: coefficients times x - centre for
    queries, times x for classes, whose coefficients are summed in BIAS."""
    A: tl.constexpr = SUM.dtype.element_ty
    H: tl.constexpr = 1 if CLASSES else J
    L = multiple(L, ALIGN)
    x_stride = multiple(x_stride, ALIGN)
    grad_stride = multiple(grad_stride, ALIGN)
    slot = tl.program_id(0)
    bag, start, end = segment(OFFSETS, slot, bags, rows, R)
    if start < end:
        c = tl.arange(0, BL)
        of_bag = tl.cast(bag, tl.int64)
        centre = tl.load(CENTRE + of_bag * L + c, mask=c < L, other=0.0)
        vectors = ()
        sums = ()
        biases = ()
        for j in tl.static_range(J):
            at = VECTORS + of_bag * vector_stride + j * L + c
            vectors = vectors + (tl.load(at, mask=c < L, other=0.0),)
            sums = sums + (tl.zeros([BL], A),)
            biases = biases + (tl.cast(0.0, A),)
        grads = ()
        tops = ()
        totals = ()
        constants = ()
        for h in tl.static_range(H):
            at = of_bag * H + h
            grads = grads + (tl.load(GRAD_BAG + at * L + c, mask=c < L, other=0.0),)
            tops = tops + (tl.load(TOP + at),)
            totals = totals + (tl.load(TOTAL + at),)
            constants = constants + ((tl.load(DLSE + at) if DLSE is not None else 0.0) - tl.load(SHIFT + at),)
        for row in tl.range(start, end, BN, num_stages=NS):
            r = row + tl.arange(0, BN)
            real = real_rows(MASK, r, end)
            inside = real[:, None] & (c < L)[None, :]
            x = tl.load(X + r[:, None] * x_stride + c[None, :], mask=inside, other=0.0).to(A)
            centred = x - centre[None, :]
            out = tl.zeros([BN, BL], A)
            gradients = ()
            for h in tl.static_range(H):
                s = tl.load(S + r * H + h, mask=r < end, other=float("-inf"))
                dead = s == float("-inf")
                a = tl.where(dead, 0.0, tl.exp(s - tops[h]) / totals[h])
                ds = a * (tl.sum(centred * grads[h][None, :], axis=1) + constants[h])
                if DS is not None:
                    ds += tl.load(DS + r * H + h, mask=r < end, other=0.0)
                gradients = gradients + (tl.where(dead, 0.0, ds),)
                out += tl.where(dead[:, None], 0.0, a[:, None] * grads[h][None, :])
            next_sums = ()
            next_biases = ()
            for j in tl.static_range(J):
                if CLASSES:
                    logit = tl.load(LOGITS + r * J + j, mask=r < end, other=float("-inf"))
                    score = tl.load(S + r, mask=r < end, other=0.0)
                    coefficient = gradients[0] * tl.exp(logit - finite_or_zero(score))
                    if DLOGITS is not None:
                        coefficient += tl.load(DLOGITS + r * J + j, mask=r < end, other=0.0)
                    coefficient = tl.where(logit == float("-inf"), 0.0, coefficient)
                    summed = x
                else:
                    coefficient = gradients[j]
                    summed = centred
                unused = (coefficient == 0)[:, None]
                out += tl.where(unused, 0.0, coefficient[:, None] * vectors[j][None, :])
                next_sums = next_sums + (
                    sums[j] + tl.sum(tl.where(unused, 0.0, coefficient[:, None] * summed), axis=0),
                )
                next_biases = next_biases + (biases[j] + tl.sum(coefficient, axis=0),)
            sums = next_sums
            biases = next_biases
            if GRAD_X is not None:
                out = tl.where(real[:, None], out, 0.0).to(GRAD_X.dtype.element_ty)
                tl.store(
                    GRAD_X + r[:, None] * grad_stride + c[None, :], out, mask=(r < end)[:, None] & (c < L)[None, :]
                )
        for j in tl.static_range(J):
            at = tl.cast(slot, tl.int64) * J + j
            tl.store(SUM + at * L + c, sums[j], mask=c < L)
            if BIAS is not None:
                tl.store(BIAS + at, biases[j])


# Launches


def tile(call: Instances, vectors: int, numbers: int, tiles: int) -> dict[str, int] | None:
    """A tile of whole rows: registers hold ``tiles`` of them at once, and ``numbers`` per column for each of the
    vectors. None where these do not fit, or rows come slice by slice."""
    if call.embedding is not None:
        return None
    columns = max(power_of_two(call.width), 16)
    lane = 16 // call.x.element_size()
    warps = min(max(columns // (32 * lane), 1), 8)
    each = max(columns // (32 * warps), 1) * (call.acc.itemsize // 4)  # registers of one row or vector
    if each > 16 or vectors * numbers * each > 96:
        return None
    rows = (220 - vectors * numbers * each) // (tiles * each)  # of 255 registers
    return {"BL": columns, "BN": max(2, min(16, power_of_two(rows + 1) // 2)), "num_warps": warps}


def score_pool(call: Instances, vectors: Tensor, shift: Tensor | None, classes: bool):
    """``(bag, scores, lse, products)``, or None where a tile is too large. Vectors are [B, J, L], or [J, L] for all
    bags; shift is [B, J]."""
    J = vectors.shape[-2]
    shape = tile(call, J, numbers=2, tiles=2)
    if shape is None:
        return None
    partials = pool.Partials(call, 1 if classes else J, call.width)
    products = call.empty(call.rows, J)
    scores = call.empty(call.rows, 1) if classes else products
    if call.rows:
        launch(
            score_and_pool, (call.slots_in(call.whole),),
            call.x, vectors, shift, call.mask, call.offsets,
            products, scores, partials.top, partials.total, partials.sum,
            call.bags, call.rows, call.x.stride(0), call.width, _stride(vectors),
            J=J, CLASSES=classes, R=call.chunk, NS=2, ALIGN=alignment(call.width, call.x.stride(0)), **shape,
        )  # fmt: skip
    bag, lse = partials.result()
    return bag, scores, lse, products


def _stride(vectors: Tensor) -> int:
    return vectors.shape[1] * vectors.shape[2] if vectors.dim() == 3 else 0


def score_pool_backward(
    call: Instances, gradients: PoolGradients, vectors: Tensor, sink: RowGradients, logits=None, grad_logits=None
):
    """``(sums [B, J, L], sums of coefficients [B, J] of classes)``, or None where a tile is too large; writes the
    gradient of x.

    For queries the sums are of rows less the centre, which `PoolGradients.of_vectors` adds again.
    """
    J, classes = vectors.shape[-2], logits is not None
    shape = tile(call, J, numbers=3, tiles=3)
    if shape is None or gradients.bag is None:
        return None
    partials = pool.Partials(call, J, call.width, softmax=False)
    biases = call.empty(call.slots, J) if classes else None
    if call.rows:
        launch(
            score_and_pool_backward, (call.slots_in(call.whole),),
            call.x, vectors, gradients.input_scores, logits, gradients.bag, gradients.centre, gradients.shift,
            *gradients.terms, gradients.grad_lse, gradients.grad_scores, grad_logits, call.mask, call.offsets,
            sink.x, partials.sum, biases,
            call.bags, call.rows, call.x.stride(0), call.width, call.width, _stride(vectors),
            J=J, CLASSES=classes, R=call.chunk, NS=2, ALIGN=alignment(call.width, call.x.stride(0)), **shape,
        )  # fmt: skip
    sink.written = True
    return partials.result()[0], None if biases is None else pool.merged_sums(call, biases)
