"""Pooling by scores that are given or come from a query, by weights, by the mean; Loss-Attention; softmax weights."""

from torch import Tensor

from milkernels.triton import pool, rows, single_pass
from milkernels.triton.call import Call
from milkernels.triton.gradients import PoolGradients, alive, in_their_types

_DEAD = float("-inf")


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask[:, None], _DEAD)


# Given scores, weights, the mean


def softmax_pool_fwd(x, given, offsets, mask):
    call = Call(x, offsets, mask)
    scores = masked(given.to(call.acc, copy=True), mask).contiguous()
    bag, lse = pool.softmax_pool(call, call.x, scores)
    return bag, scores, lse


def softmax_pool_bwd(x, offsets, mask, bag, scores, lse, grad_bag, grad_scores, grad_lse, needs):
    call = Call(x, offsets, mask)
    gradients = PoolGradients(call, call.x, scores, bag, grad_bag, grad_scores, grad_lse, weights=needs[0])
    grad_x = None
    if needs[0]:
        grad_x = x.new_empty(x.shape)
        _pooled_rows(call, grad_x, gradients)
    return in_their_types(call, (x, scores), (grad_x, gradients.scores), needs)


def _pooled_rows(call: Call, grad_x: Tensor, gradients: PoolGradients, *others) -> None:
    """The gradient of rows: weight times that of their bag, and weights and vectors of a score program."""
    if gradients.weights is None and not others:
        grad_x.zero_()
    else:
        rows.expand(call, grad_x, gradients.weights, gradients.bag_of(gradients.weights), *others)


def weighted_pool_fwd(x, weights, offsets, mask):
    call = Call(x, offsets, mask)
    return pool.weighted_sums(call, call.x, call.take(weights))


def weighted_pool_bwd(x, weights, offsets, mask, grad_bag, needs):
    call = Call(x, offsets, mask)
    grad_bag = call.take(grad_bag)
    grad_x = grad_weights = None
    if needs[0]:
        grad_x = x.new_empty(x.shape)
        rows.expand(call, grad_x, call.take(weights), grad_bag)
    if needs[1]:
        grad_weights = rows.products(call, call.x, grad_bag)
    return in_their_types(call, (x, weights), (grad_x, grad_weights), needs)


def mean_pool_fwd(x, offsets, mask):
    call = Call(x, offsets, mask)
    sums = pool.weighted_sums(call, call.x, call.empty(call.rows, 1).fill_(1))[:, 0]
    return sums / _counts(call).clamp(min=1)


def _counts(call: Call) -> Tensor:
    return pool.column_sums(call, call.empty(call.rows, 1).fill_(1))


def mean_pool_bwd(x, offsets, mask, grad_bag, needs):
    call = Call(x, offsets, mask)
    if not needs[0]:
        return x.new_empty(0)
    grad_x = x.new_empty(x.shape)
    vectors = (call.take(grad_bag) / _counts(call).clamp(min=1))[:, None]
    rows.expand(call, grad_x, call.empty(call.rows, 1).fill_(1), vectors)
    return grad_x


# Queries


def _query(call: Call, query: Tensor, scale: float) -> Tensor:
    return (call.take(query) * scale).contiguous()


def query_scores_fwd(x, query, offsets, mask, scale):
    call = Call(x, offsets, mask)
    return rows.products(call, call.x, _query(call, query, scale), fill=_DEAD)


def query_pool_fwd(x, query, offsets, mask, scale):
    call = Call(x, offsets, mask)
    return pool_by_products(call, _query(call, query, scale), None)


def pool_by_products(call: Call, vectors: Tensor, shift: Tensor | None):
    """``(bag, scores, lse)`` for the scores ``<x_i, vectors[b, k]> + shift[b, k]``."""
    pooled = single_pass.score_pool(call, vectors, shift, classes=False)
    if pooled is not None:
        return pooled[:3]
    scores = rows.products(call, call.x, vectors, shift=shift, fill=_DEAD)
    bag, lse = pool.softmax_pool(call, call.x, scores)
    return bag, scores, lse


def pool_by_products_backward(call: Call, gradients: PoolGradients, vectors: Tensor, grad_x: Tensor | None) -> Tensor:
    """Writes the gradient of the rows, if wanted; returns that of the vectors [B, K, L]."""
    sums = None
    if gradients.bag is not None:
        sums = single_pass.score_pool_backward(call, gradients, vectors, grad_x)
    if sums is not None:
        return gradients.of_vectors(call.x, sums[0])
    gradients.add(call.x, call.whole)
    if grad_x is not None:
        _pooled_rows(call, grad_x, gradients, gradients.scores, vectors)
    return gradients.of_vectors(call.x)


def query_bwd(x, query, offsets, mask, bag, scores, lse, scale, grad_bag, grad_scores, grad_lse, needs):
    call = Call(x, offsets, mask)
    gradients = PoolGradients(call, None, scores, bag, grad_bag, grad_scores, grad_lse, weights=needs[0])
    grad_x = x.new_empty(x.shape) if needs[0] else None
    grad_query = pool_by_products_backward(call, gradients, _query(call, query, scale), grad_x) * scale
    grad_query = grad_query.sum(0) if query.dim() == 2 else grad_query
    return in_their_types(call, (x, query), (grad_x, grad_query), needs)


# Loss-Attention (Shi et al. 2020)


def loss_attention_pool_fwd(x, weight, bias, offsets, mask):
    call = Call(x, offsets, mask)
    shift = _per_bag(call, bias)
    pooled = single_pass.score_pool(call, call.take(weight), shift, classes=True)
    if pooled is not None:
        return pooled
    logits = class_logits(call, weight, bias)
    scores = logits.logsumexp(1, keepdim=True)
    bag, lse = pool.softmax_pool(call, call.x, scores)
    return bag, scores, lse, logits


def class_logits(call: Call, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W x_i + b`` [N, C], -inf where masked."""
    return rows.products(call, call.x, call.take(weight), shift=_per_bag(call, bias), fill=_DEAD)


def _per_bag(call: Call, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else call.take(bias).expand(call.bags, -1).contiguous()


def loss_attention_pool_bwd(
    x, weight, bias, offsets, mask, bag, scores, lse, logits, grad_bag, grad_scores, grad_lse, grad_logits, needs
):
    call = Call(x, offsets, mask)
    gradients = None
    if grad_bag is not None or grad_scores is not None or grad_lse is not None:
        gradients = PoolGradients(call, None, scores, bag, grad_bag, grad_scores, grad_lse, weights=needs[0])
        grad_x = x.new_empty(x.shape) if needs[0] else None
        found = single_pass.score_pool_backward(
            call, gradients, call.take(weight), grad_x, logits, call.take(grad_logits)
        )
        if found is not None:
            return in_their_types(call, (x, weight, bias), (grad_x, *(part.sum(0) for part in found)), needs)
        gradients.add(call.x, call.whole)
    of_logits = call.zeros(*logits.shape) if grad_logits is None else alive(call.take(grad_logits), logits)
    if gradients is not None:
        shares = (logits - scores).exp()
        of_logits = of_logits + alive(gradients.scores * shares, logits)
    return in_their_types(call, (x, weight, bias), linear_gradients(call, weight, of_logits, gradients, needs), needs)


def linear_gradients(call: Call, weight, of_logits: Tensor, gradients: PoolGradients | None, needs, onto=None):
    """Those of x, W and b from the gradient [N, C] of ``W x + b``; to x that of a pooling is added, or ``onto``."""
    grad_x = grad_weight = None
    if needs[0]:
        grad_x = call.x.new_empty(call.x.shape) if onto is None else onto
        pooled = (None, None) if gradients is None else (gradients.weights, gradients.bag_of(gradients.weights))
        rows.expand(call, grad_x, *pooled, of_logits, call.take(weight), product=onto)
    if needs[1]:
        grad_weight = pool.weighted_sums(call, call.x, of_logits).sum(0)
    return grad_x, grad_weight, of_logits.sum(0)


# Softmax weights


def segment_softmax_fwd(scores, offsets, mask):
    call = Call(scores.contiguous(), offsets, mask)
    top, total = pool.softmax_terms(call, call.x)
    return rows.weights_of(call, call.x, top=top, total=total)


def segment_softmax_bwd(scores, offsets, weights, grad_weights, needs):
    call = Call(scores, offsets, None)
    if not needs[0]:
        return scores.new_empty(0)
    grad = call.take(grad_weights)
    shift = pool.column_sums(call, weights, grad)
    return rows.weights_of(call, weights, grad=grad, shift=shift).to(scores.dtype)


def attention_weights_fwd(scores, lse, offsets, mask):
    call = Call(scores.contiguous(), offsets, mask)
    return rows.weights_of(call, call.x, top=call.take(lse))


def attention_weights_bwd(scores, lse, offsets, weights, grad_weights, needs):
    call = Call(scores, offsets, None)
    of_scores = rows.weights_of(call, weights, grad=call.take(grad_weights))
    of_lse = -pool.column_sums(call, of_scores) if needs[1] else None
    return in_their_types(call, (scores, lse), (of_scores, of_lse), needs)
