"""The reference's arithmetic: pure PyTorch, what ``auto`` falls back to, and what can be differentiated any number of
times, traced and exported.  Nothing here loops over bags or reads the value of a tensor on the host.

An entry that does not count (a masked row, a score of -inf) is *dead*: it is selected away, never multiplied
away, because 0 * NaN is NaN.  Scores, softmax and sums are in the accumulation type: float64 if any input is
float64, else float32.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from milkernels import _torch
from milkernels.dtypes import without_autocast
from milkernels.ops.segments import INF, Segments, add_rows, take

_ALL = slice(None)
_ROWS_OF_A_SUM = 512  # terms that a product may add one after another
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "gpu": 1 << 24}


def plain() -> bool:
    """Whether someone looks into the ops: a compiler, a trace, or a transform.  They get PyTorch's own operators, for
    all rows at once and never in place, which they differentiate themselves."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _torch.transforming() or _torch.batching_gradients()


def blocks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose temporaries stay in cache, on a GPU below 64 MB."""
    if plain() or not isinstance(num_rows, int):
        yield _ALL
        return
    size = max(1, _BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // max(width, 1))
    if num_rows <= size:
        yield _ALL
        return
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def cut(t: Tensor, rows: slice) -> Tensor:
    return t if rows == _ALL else t[rows]  # an alias of all would be one more view, which not every transform knows


def zero_dead(values: Tensor, dead: Tensor) -> Tensor:
    """``values`` with 0 in dead rows; ``dead`` is [N, 1]."""
    if plain():
        return values.masked_fill(dead, 0)
    # A broadcast masked_fill goes element by element on a CPU; & on the bits is as exact and 9 times faster.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return (values.view(bits) & (dead.to(bits) - 1)).view(values.dtype)


# The trilinear form  sum_{i,k} weights[i,k] <x[i], query[bag(i),k]>  over the pairs (i, k) that are not dead,
# as its three partial derivatives: every op below is made of them, and the gradient of each is the other two.
# They save their inputs only, so nothing else of the size of x is kept.  ``dead`` is [N, K], [N, 1] or None;
# weights and query come in the accumulation type, x in its own; dead weights are finite.


@without_autocast
def _pool_formula(x: Tensor, weights: Tensor, dead: Tensor | None, index: Tensor | None, num_bags: int) -> Tensor:
    """``sum_i weights[i,k] x[i]`` over each bag: [B, K, L]."""
    num_rows, heads = weights.shape
    groups = _head_groups(dead, heads, index)
    parts = [None] * len(groups)
    for rows in blocks(num_rows, x.shape[1], x.device):
        values = cut(x, rows).to(weights.dtype)
        for k, (start, stop) in enumerate(groups):
            alive = values if dead is None else zero_dead(values, _column(cut(dead, rows), start))
            w = cut(weights, rows).narrow(1, start, stop - start)
            if index is not None:
                parts[k] = add_rows((w * alive)[:, None], cut(index, rows), num_bags, parts[k])
            elif parts[k] is None:
                parts[k] = (w.t() @ alive)[None]
            else:
                parts[k].add_((w.t() @ alive)[None])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@without_autocast
def _score_formula(x: Tensor, query: Tensor, dead: Tensor | None, index: Tensor | None) -> Tensor:
    """``<x[i], query[bag(i),k]>``: [N, K], 0 where dead."""
    if dead is not None and plain():  # whose derivative has to be rid of dead rows as well
        return _score_alive(x.to(query.dtype), query, dead, index)
    if index is None and x.dtype == query.dtype:
        scores = x @ query[0].t()
        return scores if dead is None else scores.masked_fill(dead, 0)
    parts = []
    for rows in blocks(x.shape[0], x.shape[1], x.device):
        values = cut(x, rows).to(query.dtype)
        if index is None:
            parts.append(values @ query[0].t())
        else:
            bag = cut(index, rows)
            heads = [(values * take(query[:, k], bag)).sum(1) for k in range(query.shape[1])]
            parts.append(torch.stack(heads, 1))
    scores = parts[0] if len(parts) == 1 else torch.cat(parts)
    return scores if dead is None else scores.masked_fill(dead, 0)


def _score_alive(x: Tensor, query: Tensor, dead: Tensor, index: Tensor | None) -> Tensor:
    parts = []
    for start, stop in _head_groups(dead, query.shape[1], index):
        column = _column(dead, start)
        alive = zero_dead(x, column)
        if index is None:
            scores = alive @ query[0, start:stop].t()
        else:
            scores = (alive * take(query[:, start], index)).sum(1, keepdim=True)
        parts.append(scores.masked_fill(column, 0))
    return torch.cat(parts, 1)


@without_autocast
def _expand_formula(
    weights: Tensor, query: Tensor, dead: Tensor | None, index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``sum_k weights[i,k] query[bag(i),k]``: [N, L] in ``dtype``, 0 where dead."""
    groups = _head_groups(dead, weights.shape[1], index)
    parts = []
    for rows in blocks(weights.shape[0], query.shape[2], weights.device):
        total = None
        for start, stop in groups:
            w = cut(weights, rows).narrow(1, start, stop - start)
            term = w @ query[0, start:stop] if index is None else w * take(query[:, start], cut(index, rows))
            term = term if dead is None else zero_dead(term, _column(cut(dead, rows), start))
            total = term if total is None else total + term
        parts.append(total.to(dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _head_groups(dead: Tensor | None, heads: int, index: Tensor | None) -> list[tuple[int, int]]:
    """Heads that share a product: all of them, unless bags are ragged or each head has its own dead rows."""
    if index is None and (dead is None or dead.shape[1] == 1):
        return [(0, heads)]
    return [(k, k + 1) for k in range(heads)]


def _column(dead: Tensor, head: int) -> Tensor:
    return dead if dead.shape[1] == 1 else dead[:, head : head + 1]


class _Formula(torch.autograd.Function):
    @classmethod
    def of(cls, *inputs):
        return (cls.forward if plain() else cls.apply)(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])


class Pool(_Formula):
    forward = staticmethod(_pool_formula)

    @staticmethod
    def backward(ctx, grad):
        x, weights, dead, index = ctx.saved_tensors
        need_x, need_weights = ctx.needs_input_grad[:2]
        grad_x = Expand.of(weights, grad, dead, index, x.dtype) if need_x else None
        return grad_x, Score.of(x, grad, dead, index) if need_weights else None, None, None, None


class Score(_Formula):
    forward = staticmethod(_score_formula)

    @staticmethod
    def backward(ctx, grad):
        x, query, dead, index = ctx.saved_tensors
        need_x, need_query = ctx.needs_input_grad[:2]
        grad_x = Expand.of(grad, query, dead, index, x.dtype) if need_x else None
        return grad_x, Pool.of(x, grad, dead, index, query.shape[0]) if need_query else None, None, None


class Expand(_Formula):
    forward = staticmethod(_expand_formula)

    @staticmethod
    def backward(ctx, grad):
        weights, query, dead, index = ctx.saved_tensors
        need_weights, need_query = ctx.needs_input_grad[:2]
        grad_weights = Score.of(grad, query, dead, index) if need_weights else None
        grad_query = Pool.of(grad, weights, dead, index, query.shape[0]) if need_query else None
        return grad_weights, grad_query, None, None, None


class ZeroDead(_Formula):
    forward = staticmethod(zero_dead)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return ZeroDead.of(grad, *ctx.saved_tensors), None


class Layer(_Formula):
    """A linear layer whose weight's gradient is added up block by block of rows: some processors' libraries add the
    terms of a narrow product one after another, and of thousands of rows that loses what a loop over bags keeps."""

    @staticmethod
    def forward(x, weight, bias):
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_weight = None
        if need_weight:
            parts = zip(grad.split(_ROWS_OF_A_SUM), x.split(_ROWS_OF_A_SUM), strict=True)
            grad_weight = functools.reduce(torch.add, (g.t() @ rows for g, rows in parts))
        return grad @ weight if need_x else None, grad_weight, grad.sum(0) if need_bias else None


# Masks, softmax, linear layers


def dead_rows(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else ~mask[:, None]


def without_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with masked rows set to 0, so that no product, value or gradient sees what they hold."""
    if mask is None:
        return x
    return ZeroDead.of(x, ~mask[:, None])


def masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask[:, None], -INF)


def exponentials(scores: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dead, e, z, lse)``: which scores are dead, ``exp(scores - maximum)`` with 0 where dead, its sum over
    each bag (1 for an empty one, to divide by), and the log-sum-exp."""
    dead = scores == -INF
    top = segments.max(scores)
    top = top.masked_fill(top == -INF, 0)
    # Filled before and after: neither value nor gradient ever meets -inf - -inf or NaN - -inf.
    e = (scores - segments.to_rows(top)).masked_fill(dead, 0).exp().masked_fill(dead, 0)
    z = segments.sum(e)
    empty = z == 0
    z = z.masked_fill(empty, 1)
    lse = (top + z.log()).masked_fill(empty, -INF)
    return dead, e, z, torch.where(top == INF, top, lse)  # where e and z are NaN, as in PyTorch's softmax


def pooled_by_softmax(x: Tensor, scores: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """``(bag, lse)`` in the accumulation type, in which ``scores`` come."""
    dead, e, z, lse = exponentials(scores, segments)
    # Divided before they are pooled: the gradients of a bag's scores then sum to 0 but for their own roundings.
    weights = (e / segments.to_rows(z)).masked_fill(dead, 0)
    return Pool.of(x, weights, dead, segments.index, segments.num_bags), lse


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, product: torch.dtype, acc: torch.dtype) -> Tensor:
    """A linear layer: the product in ``product``, the result, and a bias of another type, in the accumulation type."""
    x, weight = x.to(product), weight.to(product)
    layer = Layer.of if x.ndim == 2 and product.itemsize >= 4 else F.linear  # half types round every sum
    if bias is None or bias.dtype == product:  # rounding once, as PyTorch does
        return layer(x, weight, bias).to(acc)
    return layer(x, weight, None).to(acc) + bias.to(acc)
