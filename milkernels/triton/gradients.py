"""The backward of a softmax pooling, which every op that pools shares; where the gradient of rows goes; and gradients
in the types of their inputs."""

import itertools
from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from milkernels.triton import pool, rows
from milkernels.triton.call import Call
from milkernels.triton.common import kernel
from milkernels.triton.host import Products, ceil_div, launch
from milkernels.triton.instances import Instances, Layer, Rows


class PoolGradients:
    """The gradient of a softmax pooling: ``scores`` [N, K] is that of the scores, ``bag`` [B, K, L] that of the bag
    vectors or None, and ``weights`` [N, K] is the softmax, by which rows get a share of ``bag``; it is None where rows
    need no gradient or ``bag`` is None.

    ``x`` are the rows that were pooled; without it, `add` takes them slice by slice.
    """

    def __init__(self, call: Call, x, scores, bag, grad_bag, grad_scores, grad_lse, *, weights: bool):
        self.call, self.input_scores = call, scores
        self.bag, self.grad_scores, self.grad_lse = map(call.to_acc, (grad_bag, grad_scores, grad_lse))
        self.centre = self.shift = None
        self.pooled = self.bag is not None or self.grad_lse is not None
        self.weights = call.empty(*scores.shape) if weights and self.bag is not None else None
        if not self.pooled:
            self.scores = zero_where_dead(self.grad_scores, scores)
            return
        self.scores = call.empty(*scores.shape)
        self.terms = pool.softmax_terms(call, scores)
        if self.bag is not None:
            if bag is None:
                raise ValueError("grad_bag is given, but bag is absent")
            self.centre, self.shift = pool.centres(call, bag, self.terms[1], self.bag)
        if x is not None:
            self.add(x, call.whole)

    def add(self, x: Tensor, block: slice) -> None:
        """Computes the gradients of a slice's scores, and its weights, from its rows, which ``x`` [n, L] holds."""
        if not self.pooled:
            return
        da = None
        if self.bag is not None:
            # The kernel below reads ``da`` and overwrites it with the gradient.
            da = rows.products(self.call, x, self.bag, centre=self.centre, rows=block, out=self.scores)
        rows.gradients_of_scores(
            self.call, self.input_scores, self.terms, da, self.shift, self.grad_lse, self.grad_scores,
            out=self.scores, weights=self.weights, rows=block,
        )  # fmt: skip

    def of_vectors(self, sums: Tensor) -> Tensor:
        """``sum_i gradient[i, k] x_i`` [B, K, L], the gradient of vectors that scores are products with, from the sums
        of ``x - centre``.

        The gradients of a bag's scores sum to the gradient of its lse and those given for the scores themselves.
        Rounding makes their sum another, which times the centre would be a large error where features have a mean.
        """
        if self.centre is None:
            return sums
        total = self.grad_lse
        if self.grad_scores is not None:
            of_scores = pool.column_sums(self.call, zero_where_dead(self.grad_scores, self.input_scores))
            total = of_scores if total is None else total + of_scores
        if total is None:
            return sums
        # Where all rows are dead the lse is -inf and has no gradient.
        total = total.masked_fill(self.empty_heads(), 0)
        return sums + total[..., None] * self.centre[:, None]

    def empty_heads(self) -> Tensor:
        """Which heads of which bags [B, K] have dead rows only."""
        return self.terms[1] == 0

    def bag_of(self, weights: Tensor | None) -> Tensor | None:
        """The gradient of the bag vectors where there are weights to share it by."""
        return None if weights is None else self.bag


def weight_gradient(products: Products, z, x, scale: Tensor | None, onto: Tensor | None) -> Tensor:
    """``z^T x / scale`` in the accumulation type, added to ``onto`` if there is one."""
    if scale is None:
        return products.weight_gradient(z, x, onto)
    part = products.weight_gradient(z, x).div_(scale)
    return part if onto is None else onto.add_(part)


class LayerGradients:
    """The gradients of a layer's weight and bias, slice by slice; ``onto`` are those so far, to which what comes is
    added."""

    def __init__(self, call: Call, layer: Layer, need_weight=True, need_bias=True, onto=(None, None)):
        self.call, self.layer, self.needs = call, layer, (need_weight, need_bias)
        self.weight, self.bias = onto
        # Partial sums [programs, M] for the gradient of the bias; those of all slices stand in the first.
        self.sums = [call.sums(layer.width)] if need_bias and self.bias is None else []
        self.in_slices = False

    def through(self, at: Rows, grad: Tensor):
        """Takes the gradient ``grad`` [n, M] of h back to ``(z [n, M], scale)``, the gradient of ``x W^T`` times the
        scale, as products take it, and adds to the gradients of the weight and the bias."""
        layer, scale, (need_weight, need_bias) = self.layer, None, self.needs
        if layer.type == torch.float16:
            scale = gradient_scale(self.call, grad, layer.headroom())
        in_slices = isinstance(at.which, slice) and bool(self.sums)
        z, sums = layer.gradient_of_products(self.call, at, grad, scale, self.sums[0] if in_slices else None)
        self.in_slices |= in_slices
        if self.bias is not None:
            self.bias += sums.sum(0)
        elif need_bias and not in_slices:
            self.sums.append(sums)
        z = layer.products.parts(z)
        if need_weight:
            self.weight = weight_gradient(layer.products, z, at.x, scale, self.weight)
        return z, scale

    def found(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """The gradients of the weight and the bias, in the types of these or in ``dtype``, None where not needed."""
        call, layer = self.call, self.layer
        found = [
            p.new_empty(p.shape, dtype=dtype) if need and p is not None else None
            for p, need in zip(layer.given, self.needs, strict=True)
        ]
        if found == [None, None]:
            return found
        total = call.zeros(layer.width, layer.inputs) if self.weight is None else self.weight
        sums = self.sums if self.in_slices else self.sums[1:]
        sums = sums[0] if len(sums) == 1 else torch.cat(sums) if sums else call.empty(0, layer.width)
        finish(call, total, None, found[:1], sums, [(layer.width, found[1])])
        return found


class RowGradients:
    """Where the gradient of the rows goes: to x; or slice by slice through their embedding to its weight, its bias and
    x. ``needs`` says which inputs of an op need a gradient: x is the first, the embedding's weight and bias the
    last. ``onto``: the gradients of these three so far, to which what comes is added."""

    def __init__(self, call: Instances, needs, onto: tuple[Tensor | None, ...] | None = None):
        self.call, (need_x, *_, need_weight, need_bias) = call, needs
        self.needed = need_x or need_weight or need_bias
        self.written = onto is not None  # whether all of ``self.x`` is written, so that what comes then is added
        # Whether products go straight to x, and the terms of a pooling beside them (see `pooled`).
        self.direct, self.terms = False, (None, None)
        self.x, *layer = onto or (call.x.new_empty(call.x.shape) if need_x else None, None, None)
        self.layer = None
        if call.embedding is not None and self.needed:
            self.layer = LayerGradients(call, call.embedding, need_weight, need_bias, layer)

    def slices(self, bytes_per_row: int | None = None) -> Iterator[Rows]:
        """Yields all rows once, as `Call.slices` cuts them. Let go of a slice before taking the next, for its
        memory."""
        if self.layer is not None:
            whole = self.call.embedding_bytes(gradient=True, need_x=self.x is not None)
            bytes_per_row = (bytes_per_row or 0) + whole - self.call.embedding_bytes()
        for block in self.call.slices(bytes_per_row):
            yield self.call.rows_at(block, gradient=self.needed)
        if self.direct and not self.written and self.terms[0] is not None:
            rows.expand(self.call, self.x, *self.terms, product=self.x)
        self.written = True

    def takes_products(self, dtype: torch.dtype) -> bool:
        """Whether products of this type go straight to the gradient of x: those of float16 come with a scale."""
        like = self.call.x.dtype
        return dtype != torch.float16 and (dtype == like or like == torch.float32)

    def pooled(self, dtype: torch.dtype, *terms: Tensor | None) -> None:
        """Takes the terms of a pooling, as `rows.expand` does, beside which `add_product` adds products of this
        type. They are written first where products can be added to them as they are made."""
        self.terms = terms
        self.direct = self.x is not None and self.layer is None and self.takes_products(dtype)
        if self.direct and terms[0] is not None and dtype == self.call.x.dtype:
            rows.expand(self.call, self.x, *terms)
            self.written = True

    def add_product(self, at: Rows, products: Products, z, scale: Tensor | None) -> None:
        """Adds ``z W / scale`` and the terms of the pooling to the gradient of a slice of rows."""
        if not self.needed:
            return
        if self.direct:
            products.rows_gradient(z, self.x[at.which], add=self.written)
        else:
            self.add(at, *self.terms, product=products.rows_gradient(z), scale=None if scale is None else 1 / scale)

    def add(self, at: Rows, *terms, product=None, scale=None) -> None:
        """Adds the gradient of a slice of rows, given as `rows.expand` takes it. ``product`` is overwritten, and so are
        the values of embedded rows that are not kept."""
        call, block = self.call, at.which
        if not self.needed:
            return
        if call.embedding is None:
            product = self.x[block] if self.written else product
            rows.expand(call, self.x, *terms, product=product, scale=scale, rows=block)
            return
        grad = call.empty(block.stop - block.start, call.width) if product is None else product
        if product is None or scale is not None or any(t is not None for t in terms):
            rows.expand(call, grad, *terms, product=product, scale=scale, rows=block)
        z, scale = self.layer.through(at, grad)
        if self.x is None:
            return
        products, out = call.embedding.products, self.x[block]
        if self.takes_products(call.embedding.type):
            products.rows_gradient(z, out, add=self.written)
        elif self.written:
            of_x = products.rows_gradient(z)
            out.add_(of_x if scale is None else of_x.div_(scale))
        else:
            rows.expand(
                call, out, product=products.rows_gradient(z), scale=None if scale is None else 1 / scale, rows=block
            )

    def add_gathered(self, at: Rows, grad: Tensor) -> None:
        """Adds the gradient [B, C, width] of rows that `Instances.gathered` has found."""
        if not self.needed or self.call.rows == 0:
            return
        if self.call.embedding is not None:
            z, scale = self.layer.through(at, grad.flatten(0, 1).contiguous())
            if self.x is None:
                return
            of_x = self.call.embedding.products.rows_gradient(z)
            grad = (of_x if scale is None else of_x.div_(scale)).unflatten(0, at.which.shape)
        rows.add_to_rows(at.which, grad, self.of_x())

    def of_x(self) -> Tensor | None:
        """The gradient of x so far, 0 where nothing was written; None where it is not needed."""
        if self.x is not None and not self.written:
            self.x.zero_()
            self.written = True
        return self.x

    def of_embedding(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """The gradients of the embedding's weight and bias where they are needed, in the types of these or in
        ``dtype``."""
        return [None, None] if self.layer is None else self.layer.found(dtype)


def zero_where_dead(gradient: Tensor, values: Tensor) -> Tensor:
    """The gradient of scores or logits, 0 where their value is -inf."""
    return gradient.masked_fill(values == float("-inf"), 0)


@kernel
def largest_partial(X, OUT, count, per, BLOCK: tl.constexpr):
    """OUT[p] is the largest absolute value among the finite ones of X[p * per :][:per], 0 where there is none."""
    first = tl.program_id(0).to(tl.int64) * per
    last = tl.minimum(first + per, count)
    largest = tl.zeros([BLOCK], OUT.dtype.element_ty)
    for start in tl.range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.abs(tl.load(X + i, mask=i < last, other=0.0))
        largest = tl.maximum(largest, tl.where(x < float("inf"), x, 0.0))
    tl.store(OUT + tl.program_id(0), tl.max(largest, axis=0))


@kernel
def scale_of(LARGEST, W, OUT, count, D, K, headroom, BLOCK: tl.constexpr):
    """OUT is the power of two that brings the largest of LARGEST [count], times the largest sum of absolute values in a
    column of W [K, D] if given, to about 2^(12 - headroom)."""
    i = tl.arange(0, BLOCK)
    bound = tl.max(tl.load(LARGEST + i, mask=i < count, other=0.0), axis=0)
    if W is not None:
        widest = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, D, BLOCK):
            total = tl.zeros([BLOCK], tl.float32)
            for k in tl.range(0, K):
                w = tl.abs(tl.load(W + k * D + start + i, mask=start + i < D, other=0.0).to(tl.float32))
                total += tl.where(w < float("inf"), w, 0.0)
            widest = tl.maximum(widest, total)
        bound = bound * tl.max(widest, axis=0)
    bound = tl.minimum(bound, 3.0e38)
    exponent = 12 - headroom - tl.ceil(tl.log2(tl.where(bound > 0, bound, 1.0))).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, -40), 100)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(OUT, tl.where(bound > 0, scale, 1.0))


_LARGEST = 256  # programs that look for the largest number


def gradient_scale(call: Call, gradient: Tensor, headroom: int, w: Tensor | None = None) -> Tensor:
    """The factor [1] that brings gradients of at most the largest finite one, times the largest column of |w| [K, D] if
    given, to about 2^(12 - headroom) in float16: at N = 100k most of them would be 0 there otherwise. It is a power of
    two, which costs no digit, and stays on the device, so that nothing waits."""
    count = gradient.numel()
    programs = min(max(ceil_div(count, 1024), 1), _LARGEST)
    largest, scale = call.empty(programs), call.empty(1)
    launch(largest_partial, (programs,), gradient, largest, count, ceil_div(count, programs), BLOCK=1024, num_warps=4)
    K, D = (0, 0) if w is None else w.shape
    launch(scale_of, (1,), largest, w, scale, programs, D, K, headroom, BLOCK=_LARGEST, num_warps=4)
    return scale


@kernel
def finish_gradients(
    TOTAL, SCALE, SUMS, FIRST, SECOND, A, B, C, D, numbers, count, columns, a, b, c, tiles,
    BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes TOTAL, two matrices of so many numbers one after the other, divided by the scale to FIRST and SECOND; and
    the sums over the rows of SUMS [count, columns] to A (columns before a), B (before b), C (before c) and D. Each is
    written in its own type, or not where it is None."""
    if tl.program_id(0) < tiles:
        if TOTAL is not None:
            i = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
            value = tl.load(TOTAL + i, mask=i < 2 * numbers if SECOND is not None else i < numbers, other=0.0)
            if SCALE is not None:
                value = value / tl.load(SCALE)
            if FIRST is not None:
                tl.store(FIRST + i, value.to(FIRST.dtype.element_ty), mask=i < numbers)
            if SECOND is not None:
                inside = (i >= numbers) & (i < 2 * numbers)
                tl.store(SECOND + (i - numbers), value.to(SECOND.dtype.element_ty), mask=inside)
    else:
        column = (tl.program_id(0) - tiles) * BC + tl.arange(0, BC)
        total = tl.zeros([BP, BC], SUMS.dtype.element_ty)
        for row in tl.range(0, count, BP):
            r = row + tl.arange(0, BP)
            at = r.to(tl.int64)[:, None] * columns + column[None, :]
            total += tl.load(SUMS + at, mask=(r < count)[:, None] & (column < columns)[None, :], other=0.0)
        found = tl.sum(total, axis=0)
        if A is not None:
            tl.store(A + column, found.to(A.dtype.element_ty), mask=column < a)
        if B is not None:
            tl.store(B + (column - a), found.to(B.dtype.element_ty), mask=(column >= a) & (column < b))
        if C is not None:
            tl.store(C + (column - b), found.to(C.dtype.element_ty), mask=(column >= b) & (column < c))
        if D is not None:
            tl.store(D + (column - c), found.to(D.dtype.element_ty), mask=(column >= c) & (column < columns))


def finish(call: Call, total: Tensor | None, scale, matrices, sums: Tensor, vectors) -> None:
    """Writes the gradients of matrices, of which ``total`` holds the sums times the scale, one after the other; and of
    vectors, whose partial sums stand side by side in the columns of ``sums`` [programs, columns]. ``matrices`` are one
    or two, ``vectors`` at most four pairs ``(columns, vector)``; what is not needed is None."""
    matrices, ends = [*matrices, None][:2], list(itertools.accumulate(length for length, _ in vectors))
    numbers = next((m.numel() for m in matrices if m is not None), 0)
    count, columns = sums.shape
    ends += [columns] * (4 - len(ends))
    vectors = [vector for _, vector in vectors] + [None] * (4 - len(vectors))
    tiles = ceil_div(2 * numbers, 2048)
    launch(
        finish_gradients, (tiles + ceil_div(columns, 32),),
        total, scale, sums, *matrices, *vectors, numbers, count, columns, *ends[:3], tiles,
        BT=2048, BP=64, BC=32, num_warps=4,
    )  # fmt: skip


def checked_inputs(needs, names: str, x: Tensor, weights, embed) -> tuple[Tensor | None, ...]:
    """The inputs of an op that may have a gradient, in the order of ``needs``: x, the weights, which have these names,
    and those of the embedding. Raises ValueError where one that needs a gradient is absent."""
    inputs = (x, *weights, *(embed[:2] or (None, None)))
    for need, name, value in zip(needs, ("x", *names.split(), "e_weight", "e_bias"), inputs, strict=True):
        if need and value is None:
            raise ValueError(f"needs says that {name} wants a gradient, but {name} is absent")
    return inputs


def in_their_types(call: Call, inputs, found, needs) -> tuple[Tensor, ...]:
    """Each gradient that is needed, in the type of its input and in memory of its own; empty ones for the others."""

    def own(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        gradient = gradient.to(dtype).contiguous()
        whole = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.itemsize
        return gradient if whole else gradient.clone()

    return tuple(
        own(gradient, like.dtype) if need else call.x.new_empty(0)
        for like, gradient, need in zip(inputs, found, needs, strict=True)
    )
