"""The backward of a softmax pooling, which every op that pools shares; where the gradient of rows goes; and gradients
in the types of their inputs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from milkernels.triton import pool, rows
from milkernels.triton.call import Call
from milkernels.triton.instances import Instances, Rows


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


class RowGradients:
    """Where the gradient of the rows goes: to x; or slice by slice through their embedding to its weight, its bias and
    x. ``needs`` says which inputs of an op need a gradient: x is the first, the embedding's weight and bias the
    last. ``onto``: the gradients of these three so far, to which what comes is added."""

    def __init__(self, call: Instances, needs, onto: tuple[Tensor | None, ...] | None = None):
        self.call, (need_x, *_, need_weight, need_bias) = call, needs
        self.needed = need_x or need_weight or need_bias
        self.written = onto is not None  # whether all of ``self.x`` is written, so that what comes then is added
        if onto is not None:
            self.x, self.weight, self.bias = onto
            return
        self.x = call.x.new_empty(call.x.shape) if need_x else None
        self.weight = call.zeros(call.width, call.x.shape[1]) if need_weight else None
        self.bias = call.zeros(call.width) if need_bias else None

    def slices(self, bytes_per_row: int | None = None) -> Iterator[Rows]:
        """Yields all rows once, as `Call.slices` cuts them. Let go of a slice before taking the next, for its
        memory."""
        if self.call.embedding is not None:
            aside = self.call.embedding.gradient_bytes_per_row(self.call, self.x is not None) if self.needed else 0
            bytes_per_row = (bytes_per_row or 0) + aside
        for block in self.call.slices(bytes_per_row):
            yield self.call.rows_at(block, keep=self.needed)
        self.written = True

    def add(self, at: Rows, *terms, product=None, scale=None) -> None:
        """Adds the gradient of a slice of rows, given as `rows.expand` takes it. The values of embedded rows, and
        ``product``, are overwritten."""
        call, block = self.call, at.which
        if not self.needed:
            return
        if call.embedding is None:
            product = self.x[block] if self.written else product
            rows.expand(call, self.x, *terms, product=product, scale=scale, rows=block)
            return
        grad = call.empty(block.stop - block.start, call.width) if product is None else product
        rows.expand(call, grad, *terms, product=product, scale=scale, rows=block)
        z, scale = self._through(at, grad)
        if self.x is None:
            return
        products, out = call.embedding.products, self.x[block]
        if self.written:
            of_x = products.rows_gradient(z)
            out.add_(of_x if scale is None else of_x.div_(scale))
        elif call.embedding.direct(call):
            products.rows_gradient(z, out)
        else:
            rows.expand(
                call, out, product=products.rows_gradient(z), scale=None if scale is None else 1 / scale, rows=block
            )

    def add_gathered(self, at: Rows, grad: Tensor) -> None:
        """Adds the gradient [B, C, width] of rows that `Instances.gathered` has found."""
        if not self.needed or self.call.rows == 0:
            return
        if self.call.embedding is not None:
            z, scale = self._through(at, grad.flatten(0, 1).contiguous())
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

    def _through(self, at: Rows, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Takes the gradient ``grad`` [n, E] of embedded rows back to ``(z [n, E], scale)``, the gradient of ``x W^T``
        times the scale, and adds to the gradients of the weight and the bias."""
        embedding, scale = self.call.embedding, None
        if embedding.type == torch.float16:
            scale = power_of_two_scale(largest_finite(grad), embedding.headroom())
        z, of_bias = embedding.gradient_of_products(self.call, at, grad, scale)
        if self.bias is not None:
            self.bias += of_bias
        if self.weight is not None:
            add_scaled(self.weight, embedding.products.weight_gradient(z, at.x), scale)
        return z, scale


def add_scaled(total: Tensor, part: Tensor, scale: Tensor | None) -> None:
    """Adds ``part / scale`` to ``total``."""
    if scale is None:
        total += part
    else:
        total.addcdiv_(part, scale)


def zero_where_dead(gradient: Tensor, values: Tensor) -> Tensor:
    """The gradient of scores or logits, 0 where their value is -inf."""
    return gradient.masked_fill(values == float("-inf"), 0)


def power_of_two_scale(bound: Tensor, headroom: int = 0) -> Tensor:
    """The factor that brings gradients of at most ``bound`` to about 2^(12 - headroom) in float16: at N = 100k most of
    them would be 0 there otherwise. It is a power of two, which costs no digit, and stays on the device, so that
    nothing waits."""
    exponent = (12 - headroom - bound.log2().ceil()).clamp(-40, 100)
    return torch.where(bound > 0, exponent.exp2(), 1.0)


def largest_finite(t: Tensor) -> Tensor:
    """The largest absolute value among the finite ones; 0 where there is none."""
    return t.nan_to_num(0, 0, 0).abs().amax() if t.numel() else t.new_zeros(())


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
