"""Pooling by scores that are given or come from a query, by weights, by the mean; Loss-Attention; softmax weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from milkernels.triton import pool, rows, single_pass
from milkernels.triton.call import Call
from milkernels.triton.gradients import PoolGradients, RowGradients, checked_inputs, in_their_types, zero_where_dead
from milkernels.triton.instances import Instances, Rows

_DEAD = float("-inf")


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The scores [N, K], -inf where the mask is False."""
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
        if gradients.weights is None:
            grad_x.zero_()
        else:
            rows.expand(call, grad_x, gradients.weights, gradients.bag)
    return in_their_types(call, (x, scores), (grad_x, gradients.scores), needs)


def weighted_pool_fwd(x, weights, offsets, mask):
    call = Call(x, offsets, mask)
    return pool.weighted_sums(call, call.x, call.to_acc(weights))


def weighted_pool_bwd(x, weights, offsets, mask, grad_bag, needs):
    call = Call(x, offsets, mask)
    grad_bag = call.to_acc(grad_bag)
    grad_x = grad_weights = None
    if needs[0]:
        grad_x = x.new_empty(x.shape)
        rows.expand(call, grad_x, call.to_acc(weights), grad_bag)
    if needs[1]:
        grad_weights = rows.products(call, call.x, grad_bag)
    return in_their_types(call, (x, weights), (grad_x, grad_weights), needs)


def mean_pool_fwd(x, offsets, mask):
    call = Call(x, offsets, mask)
    partials = pool.Partials(call, 1, call.width)
    partials.add(call.x, None, mask=call.mask)
    return partials.result(with_lse=False)[0][:, 0]


def mean_pool_bwd(x, offsets, mask, grad_bag, needs):
    call = Call(x, offsets, mask)
    if not needs[0]:
        return x.new_empty(0)
    grad_x = x.new_empty(x.shape)
    rows.expand(call, grad_x, None, (call.to_acc(grad_bag) / pool.counts(call).clamp_(min=1))[:, None])
    return grad_x


# Queries


def _query(call: Call, query: Tensor, scale: float) -> Tensor:
    """The query [K, L] or [B, K, L] times the scale."""
    return (call.to_acc(query) * scale).contiguous()


def query_scores_fwd(x, query, offsets, mask, scale, *others):
    *embed, saved_bytes = others
    call = Instances(x, offsets, mask, *embed)
    kept = call.keep_up_to(saved_bytes)
    return row_products(call, _query(call, query, scale), None), kept


def row_products(call: Instances, vectors: Tensor, shift: Tensor | None) -> Tensor:
    """``<x_i, vectors[b, k]> + shift[b, k]`` [N, K], -inf where masked."""
    out = call.empty(call.rows, vectors.shape[-2])
    for block in call.slices():
        rows.products(call, call.rows_at(block).values, vectors, shift=shift, fill=_DEAD, rows=block, out=out)
    return out


def query_pool_fwd(x, query, offsets, mask, scale, *others):
    *embed, saved_bytes = others
    call = Instances(x, offsets, mask, *embed)
    kept = call.keep_up_to(saved_bytes)
    return *pool_by_products(call, _query(call, query, scale), None), kept


def pool_by_products(call: Instances, vectors: Tensor, shift: Tensor | None):
    """Pools by the scores ``<x_i, vectors[b, k]> + shift[b, k]``: ``(bag [B, K, L], scores [N, K], lse [B, K])``."""
    pooled = single_pass.score_pool(call, vectors, shift, classes=False)
    if pooled is not None:
        return pooled[:3]
    scores = call.empty(call.rows, vectors.shape[-2])
    partials = pool.Partials(call, vectors.shape[-2], call.width)
    for block in call.slices():
        values = call.rows_at(block).values
        rows.products(call, values, vectors, shift=shift, fill=_DEAD, rows=block, out=scores)
        partials.add(values, scores, block, call.mask)
        values = None  # freed before the next slice comes
    bag, lse = partials.result()
    return bag, scores, lse


def pool_by_products_backward(call: Instances, gradients: PoolGradients, vectors: Tensor, sink: RowGradients) -> Tensor:
    """Adds to the gradient of the rows; returns that of the vectors [B, K, L]."""
    sums = None
    if gradients.bag is not None:
        sums = single_pass.score_pool_backward(call, gradients, vectors, sink)
    if sums is not None:
        return gradients.of_vectors(sums[0])
    partials = pool.Partials(call, vectors.shape[-2], call.width, softmax=False)
    for at in sink.slices():
        gradients.add(at.values, at.which)
        partials.add(at.values, gradients.scores, at.which, call.mask, gradients.centre)
        sink.add(at, gradients.weights, gradients.bag_of(gradients.weights), gradients.scores, vectors)
        at = None  # freed before the next slice comes
    return gradients.of_vectors(partials.result()[0])


def query_bwd(
    x, query, offsets, mask, bag, scores, lse, embed, kept, scale, embed_activation, embed_dropout_p, embed_dtype,
    grad_bag, grad_scores, grad_lse, needs,
):  # fmt: skip
    inputs = checked_inputs(needs, "query", x, [query], embed)
    call = Instances(x, offsets, mask, embed, embed_activation, embed_dropout_p, embed_dtype)
    call.keep(kept, filled=True)
    sink = RowGradients(call, needs)
    gradients = PoolGradients(call, None, scores, bag, grad_bag, grad_scores, grad_lse, weights=sink.needed)
    grad_query = pool_by_products_backward(call, gradients, _query(call, query, scale), sink) * scale
    grad_query = grad_query.sum(0) if query.dim() == 2 else grad_query
    found = (sink.x, grad_query, *sink.of_embedding())
    return in_their_types(call, inputs, found, needs)


# Loss-Attention (Shi et al. 2020)


def loss_attention_pool_fwd(x, weights, offsets, mask, *others):
    *embed, saved_bytes = others
    weight, bias = weights
    call = Instances(x, offsets, mask, *embed)
    kept = call.keep_up_to(saved_bytes)
    vectors, shift = weight.contiguous(), _per_bag(call, bias)
    pooled = single_pass.score_pool(call, vectors, shift, classes=True)
    if pooled is not None:
        return *pooled, kept
    logits, scores = call.empty(call.rows, vectors.shape[0]), call.empty(call.rows, 1)
    partials = pool.Partials(call, 1, call.width)
    for block in call.slices():
        values = call.rows_at(block).values
        rows.products(call, values, vectors, shift=shift, fill=_DEAD, rows=block, out=logits)
        torch.logsumexp(logits[block], 1, keepdim=True, out=scores[block])
        partials.add(values, scores, block, call.mask)
        values = None  # freed before the next slice comes
    bag, lse = partials.result()
    return bag, scores, lse, logits, kept


def class_logits(call: Instances, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``W x_i + b`` [N, C], -inf where masked."""
    return row_products(call, weight.contiguous(), _per_bag(call, bias))


def _per_bag(call: Call, bias: Tensor | None) -> Tensor | None:
    """The bias [C], in its own type, repeated for each bag: [B, C]."""
    return None if bias is None else bias.expand(call.bags, -1).contiguous()


def loss_attention_pool_bwd(
    x, weights, offsets, mask, bag, scores, lse, logits, embed, kept, embed_activation, embed_dropout_p, embed_dtype,
    grad_bag, grad_scores, grad_lse, grad_logits, needs,
):  # fmt: skip
    weight, _ = weights
    inputs = checked_inputs(needs, "weight bias", x, weights, embed)
    call = Instances(x, offsets, mask, embed, embed_activation, embed_dropout_p, embed_dtype)
    call.keep(kept, filled=True)
    sink, gradients = RowGradients(call, needs), None
    if grad_bag is not None or grad_scores is not None or grad_lse is not None:
        gradients = PoolGradients(call, None, scores, bag, grad_bag, grad_scores, grad_lse, weights=sink.needed)
        found = single_pass.score_pool_backward(
            call, gradients, weight.contiguous(), sink, logits, call.to_acc(grad_logits)
        )
        if found is not None:
            return in_their_types(call, inputs, (sink.x, *(part.sum(0) for part in found), None, None), needs)
    of_logits = call.zeros(*logits.shape) if grad_logits is None else zero_where_dead(call.to_acc(grad_logits), logits)

    def through_scores(at: Rows) -> None:
        block = at.which
        gradients.add(at.values, block)
        shares = (logits[block] - scores[block]).exp()
        of_logits[block].add_(zero_where_dead(gradients.scores[block] * shares, logits[block]))

    before = None if gradients is None else through_scores
    of_layer = linear_gradients(call, weight, of_logits, gradients, needs[1], sink, before)
    return in_their_types(call, inputs, (sink.of_x(), *of_layer, *sink.of_embedding()), needs)


def linear_gradients(
    call: Instances,
    weight: Tensor,
    of_logits: Tensor,
    gradients: PoolGradients | None,
    need_weight: bool,
    sink: RowGradients,
    before: Callable[[Rows], None] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """The gradients of W [C, L] and b [C] from the gradient ``of_logits`` [N, C] of ``W x + b``, which ``before``
    completes for a slice of rows. Adds the gradient of the rows to ``sink``, with that of a pooling if given."""
    weights = None if gradients is None else gradients.weights
    pooled = (None, None) if weights is None else (weights, gradients.bag)
    partials = pool.Partials(call, of_logits.shape[1], call.width, softmax=False) if need_weight else None
    for at in sink.slices():
        if before is not None:
            before(at)
        if need_weight:
            partials.add(at.values, of_logits, at.which, call.mask)
        sink.add(at, *pooled, of_logits, weight.contiguous())
        at = None  # freed before the next slice comes
    return partials.result()[0].sum(0) if need_weight else None, of_logits.sum(0)


# Softmax weights


def segment_softmax_fwd(scores, offsets, mask):
    call = Call(scores.contiguous(), offsets, mask)
    top, total = pool.softmax_terms(call, call.x)
    return rows.weights_of(call, call.x, top=top, total=total)


def segment_softmax_bwd(scores, offsets, weights, grad_weights, needs):
    call = Call(scores, offsets, None)
    if not needs[0]:
        return scores.new_empty(0)
    grad = call.to_acc(grad_weights)
    shift = pool.column_sums(call, weights, grad)
    return rows.weights_of(call, weights, grad=grad, shift=shift).to(scores.dtype)


def attention_weights_fwd(scores, lse, offsets, mask):
    call = Call(scores.contiguous(), offsets, mask)
    return rows.weights_of(call, call.x, top=call.to_acc(lse))


def attention_weights_bwd(scores, lse, offsets, weights, grad_weights, needs):
    call = Call(scores, offsets, None)
    of_scores = rows.weights_of(call, weights, grad=call.to_acc(grad_weights))
    of_lse = -pool.column_sums(call, of_scores) if needs[1] else None
    return in_their_types(call, (scores, lse), (of_scores, of_lse), needs)
