"""Pure PyTorch for every op: what ``auto`` falls back to, and what can be differentiated any number of times,
traced and exported.  Nothing here loops over bags or reads the value of a tensor on the host.

Arguments come checked and prepared by ``functional``: ``mask`` bool ``[N]``, ``seed`` int64 ``[1]``, or None.
An entry that does not count (a masked row, a score of -inf) is *dead*: it is selected away, never multiplied
away, because 0 * NaN is NaN.  Scores, softmax and sums are in the accumulation type: float64 if any input is
float64, else float32.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from milkernels import _torch
from milkernels.bags import bag_index

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}
DROP_ACTIVATION, DROP_SIGMOID, DROP_VALUE, DROP_EMBEDDING = range(4)  # branches of the dropout counter

_INF = float("inf")
_ALL = slice(None)
_BLOCK_ELEMENTS = {"cpu": 1 << 19, "gpu": 1 << 24}


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would compute in on the device of ``x``; None where it is off."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The promoted type of the tensors that are there."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


def _accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.promote_types(result_dtype(*tensors), torch.float32)


def _types(compute_dtype: torch.dtype | None, x: Tensor, *others: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """Of accumulation, and of products with ``x``: its own, or that of autocast; float64 where anything is."""
    acc = _accumulation_dtype(x, *others)
    return acc, acc if acc == torch.float64 else compute_dtype or x.dtype


def _plain() -> bool:
    """Whether someone looks into the ops: a compiler, a trace, or a transform.  They get PyTorch's own operators, for
    all rows at once and never in place, which they differentiate themselves."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return _torch.transforming() or _torch.batching_gradients()


def _without_autocast(fn):
    @functools.wraps(fn)
    def wrapper(first: Tensor, *args, **kwargs):
        if autocast_dtype(first) is None:
            return fn(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return fn(first, *args, **kwargs)

    return wrapper


# Rows, bags and blocks


def _adds_by_sorting(t: Tensor) -> bool:
    """How to add rows deterministically: on a GPU index_add uses atomics and index_put sorts; on a CPU it is
    index_put that uses atomics.  The backward of indexing is index_put, that of index_select is index_add."""
    return t.is_cuda


def _take(t: Tensor, index: Tensor) -> Tensor:
    """``t[index]``, by the op whose backward is deterministic."""
    return t[index] if _adds_by_sorting(t) else t.index_select(0, index)


def _add_rows(rows: Tensor, index: Tensor, num_bags: int, total: Tensor | None = None) -> Tensor:
    """The sum of rows in each bag, on top of ``total``, which is written to."""
    if total is not None:
        sorting = _adds_by_sorting(rows)
        return total.index_put_((index,), rows, True) if sorting else total.index_add_(0, index, rows)
    total = rows.new_zeros((num_bags, *rows.shape[1:]))
    if _torch.in_onnx_export():  # the older exporter has the others keep the last row of each bag, without a word
        return total.scatter_add(0, index.view(-1, *[1] * (rows.ndim - 1)).expand_as(rows), rows)
    if _adds_by_sorting(rows):
        return total.index_put((index,), rows, accumulate=True)
    return total.index_add(0, index, rows)


class _Segments:
    """How rows reduce to bags.  ``index`` is the bag of each row; None where there is one bag."""

    def __init__(self, offsets: Tensor | None, rows: Tensor):
        self.num_rows = rows.shape[0]
        self.num_bags = 1 if offsets is None else offsets.shape[0] - 1
        # A trace is of use for any number of bags.
        one_bag = offsets is None or (self.num_bags == 1 and not _torch.exporting())
        self.index = None if one_bag else bag_index(offsets, self.num_rows)

    def to_rows(self, per_bag: Tensor) -> Tensor:
        """The value of each row's bag: ``[B, ...]`` to ``[N, ...]``, or ``[1, ...]`` for one bag."""
        return per_bag if self.index is None else _take(per_bag, self.index)

    def sum(self, rows: Tensor) -> Tensor:
        return rows.sum(0, keepdim=True) if self.index is None else _add_rows(rows, self.index, self.num_bags)

    def max(self, rows: Tensor) -> Tensor:
        """The maximum over each bag of ``[N, C]``, -inf where there is no row.  NaN wins.  No gradient."""
        rows = rows.detach()
        if self.index is None and self.num_rows:
            return rows.amax(0, keepdim=True)
        none = rows.new_full((self.num_bags, rows.shape[1]), -_INF)
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
        rows = rows.detach().masked_fill(dead, -_INF)
        best = ((rows == self.to_rows(self.max(rows))) | rows.isnan()) & ~dead
        if self.index is None:
            return torch.where(best.any(0), best.to(torch.uint8).argmax(0), -1)[None]
        row = torch.arange(self.num_rows, device=rows.device)[:, None]
        candidates = torch.where(best, row, self.num_rows)
        none = candidates.new_full((self.num_bags, rows.shape[1]), self.num_rows)
        first = self._reduce(candidates, none, "amin")
        return torch.where(first == self.num_rows, -1, first)


def _blocks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose temporaries stay in cache, on a GPU below 64 MB."""
    if _plain() or not isinstance(num_rows, int):
        yield _ALL
        return
    size = max(1, _BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // max(width, 1))
    if num_rows <= size:
        yield _ALL
        return
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _cut(t: Tensor, rows: slice) -> Tensor:
    return t if rows == _ALL else t[rows]  # an alias of all would be one more view, which not every transform knows


def _zero_dead(values: Tensor, dead: Tensor) -> Tensor:
    """``values`` with 0 in dead rows; ``dead`` is [N, 1]."""
    if _plain():
        return values.masked_fill(dead, 0)
    # A broadcast masked_fill goes element by element on a CPU; & on the bits is as exact and 9 times faster.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return (values.view(bits) & (dead.to(bits) - 1)).view(values.dtype)


# The trilinear form  sum_{i,k} weights[i,k] <x[i], query[bag(i),k]>  over the pairs (i, k) that are not dead,
# as its three partial derivatives: every op below is made of them, and the gradient of each is the other two.
# They save their inputs only, so nothing else of the size of x is kept.  ``dead`` is [N, K], [N, 1] or None;
# weights and query come in the accumulation type, x in its own; dead weights are finite.


@_without_autocast
def _pool_formula(x: Tensor, weights: Tensor, dead: Tensor | None, index: Tensor | None, num_bags: int) -> Tensor:
    """``sum_i weights[i,k] x[i]`` over each bag: [B, K, L]."""
    num_rows, heads = weights.shape
    groups = _head_groups(dead, heads, index)
    parts = [None] * len(groups)
    for rows in _blocks(num_rows, x.shape[1], x.device):
        values = _cut(x, rows).to(weights.dtype)
        for k, (start, stop) in enumerate(groups):
            alive = values if dead is None else _zero_dead(values, _column(_cut(dead, rows), start))
            w = _cut(weights, rows).narrow(1, start, stop - start)
            if index is not None:
                parts[k] = _add_rows((w * alive)[:, None], _cut(index, rows), num_bags, parts[k])
            elif parts[k] is None:
                parts[k] = (w.t() @ alive)[None]
            else:
                parts[k].add_((w.t() @ alive)[None])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@_without_autocast
def _score_formula(x: Tensor, query: Tensor, dead: Tensor | None, index: Tensor | None) -> Tensor:
    """``<x[i], query[bag(i),k]>``: [N, K], 0 where dead."""
    if dead is not None and _plain():  # whose derivative has to be rid of dead rows as well
        return _score_alive(x.to(query.dtype), query, dead, index)
    if index is None and x.dtype == query.dtype:
        scores = x @ query[0].t()
        return scores if dead is None else scores.masked_fill(dead, 0)
    parts = []
    for rows in _blocks(x.shape[0], x.shape[1], x.device):
        values = _cut(x, rows).to(query.dtype)
        if index is None:
            parts.append(values @ query[0].t())
        else:
            bag = _cut(index, rows)
            heads = [(values * _take(query[:, k], bag)).sum(1) for k in range(query.shape[1])]
            parts.append(torch.stack(heads, 1))
    scores = parts[0] if len(parts) == 1 else torch.cat(parts)
    return scores if dead is None else scores.masked_fill(dead, 0)


def _score_alive(x: Tensor, query: Tensor, dead: Tensor, index: Tensor | None) -> Tensor:
    parts = []
    for start, stop in _head_groups(dead, query.shape[1], index):
        column = _column(dead, start)
        alive = _zero_dead(x, column)
        if index is None:
            scores = alive @ query[0, start:stop].t()
        else:
            scores = (alive * _take(query[:, start], index)).sum(1, keepdim=True)
        parts.append(scores.masked_fill(column, 0))
    return torch.cat(parts, 1)


@_without_autocast
def _expand_formula(
    weights: Tensor, query: Tensor, dead: Tensor | None, index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``sum_k weights[i,k] query[bag(i),k]``: [N, L] in ``dtype``, 0 where dead."""
    groups = _head_groups(dead, weights.shape[1], index)
    parts = []
    for rows in _blocks(weights.shape[0], query.shape[2], weights.device):
        total = None
        for start, stop in groups:
            w = _cut(weights, rows).narrow(1, start, stop - start)
            term = w @ query[0, start:stop] if index is None else w * _take(query[:, start], _cut(index, rows))
            term = term if dead is None else _zero_dead(term, _column(_cut(dead, rows), start))
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
        return (cls.forward if _plain() else cls.apply)(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])


class _Pool(_Formula):
    forward = staticmethod(_pool_formula)

    @staticmethod
    def backward(ctx, grad):
        x, weights, dead, index = ctx.saved_tensors
        need_x, need_weights = ctx.needs_input_grad[:2]
        grad_x = _Expand.of(weights, grad, dead, index, x.dtype) if need_x else None
        return grad_x, _Score.of(x, grad, dead, index) if need_weights else None, None, None, None


class _Score(_Formula):
    forward = staticmethod(_score_formula)

    @staticmethod
    def backward(ctx, grad):
        x, query, dead, index = ctx.saved_tensors
        need_x, need_query = ctx.needs_input_grad[:2]
        grad_x = _Expand.of(grad, query, dead, index, x.dtype) if need_x else None
        return grad_x, _Pool.of(x, grad, dead, index, query.shape[0]) if need_query else None, None, None


class _Expand(_Formula):
    forward = staticmethod(_expand_formula)

    @staticmethod
    def backward(ctx, grad):
        weights, query, dead, index = ctx.saved_tensors
        need_weights, need_query = ctx.needs_input_grad[:2]
        grad_weights = _Score.of(grad, query, dead, index) if need_weights else None
        grad_query = _Pool.of(grad, weights, dead, index, query.shape[0]) if need_query else None
        return grad_weights, grad_query, None, None, None


class _ZeroDead(_Formula):
    forward = staticmethod(_zero_dead)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return _ZeroDead.of(grad, *ctx.saved_tensors), None


# Selection, softmax, linear layers


def _gather(rows: Tensor, indices: Tensor, none: float) -> Tensor:
    """``rows[indices[j, c], c]``, and ``none`` where the index is -1."""
    if rows.shape[0] == 0:
        return rows.new_full(indices.shape, none)
    return rows.gather(0, indices.clamp(min=0)).masked_fill(indices < 0, none)


def _dead_rows(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else ~mask[:, None]


def _without_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` with masked rows set to 0, so that no product, value or gradient sees what they hold."""
    if mask is None:
        return x
    return _ZeroDead.of(x, ~mask[:, None])


def _masked_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask[:, None], -_INF)


def _exp(scores: Tensor, segments: _Segments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dead, e, z, lse)``: which scores are dead, ``exp(scores - maximum)`` with 0 where dead, its sum over
    each bag (1 for an empty one, to divide by), and the log-sum-exp."""
    dead = scores == -_INF
    top = segments.max(scores)
    top = top.masked_fill(top == -_INF, 0)
    # Filled before and after: neither value nor gradient ever meets -inf - -inf or NaN - -inf.
    e = (scores - segments.to_rows(top)).masked_fill(dead, 0).exp().masked_fill(dead, 0)
    z = segments.sum(e)
    empty = z == 0
    z = z.masked_fill(empty, 1)
    lse = (top + z.log()).masked_fill(empty, -_INF)
    return dead, e, z, torch.where(top == _INF, top, lse)  # where e and z are NaN, as in PyTorch's softmax


def _softmax_pool(x: Tensor, scores: Tensor, segments: _Segments) -> tuple[Tensor, Tensor]:
    """``(bag, lse)`` in the accumulation type, in which ``scores`` come."""
    dead, e, z, lse = _exp(scores, segments)
    return _Pool.of(x, e, dead, segments.index, segments.num_bags) / z[:, :, None], lse


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, product: torch.dtype, acc: torch.dtype) -> Tensor:
    """A linear layer: the product in ``product``, the result, and a bias of another type, in the accumulation type."""
    x, weight = x.to(product), weight.to(product)
    if bias is None or bias.dtype == product:  # rounding once, as PyTorch does
        return F.linear(x, weight, bias).to(acc)
    return F.linear(x, weight).to(acc) + bias.to(acc)


# Dropout


def dropout_threshold(p: float) -> int:
    """A unit is dropped when its 16 random bits are below this."""
    return int(p * 65536 + 0.5)


def dropout_scale(p: float) -> float:
    """What kept units are multiplied by, so that the mean stays; 0 where none is kept."""
    threshold = dropout_threshold(p)
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def philox_keep(seed: Tensor, rows: int | Tensor, num_units: int, branch: int, p: float) -> Tensor:
    """The units that dropout keeps, bool ``[rows, num_units]``, of so many rows or of those: the same on every backend.

    Philox4x32-10 (Salmon et al. 2011) with key = (low, high half of the seed) and counter = (row low, row
    high, unit >> 3, branch); ``unit & 7`` picks 16 bits of the result, low half of a word first.
    """
    threshold, num_groups = dropout_threshold(p), -(-num_units // 8)
    counted = not isinstance(rows, Tensor) or rows.ndim == 0  # a jit trace counts in tensors
    row = (torch.arange(rows, device=seed.device) if counted else rows)[:, None]
    group = torch.arange(num_groups, device=seed.device)[None]
    parts = []
    for block in _blocks(row.shape[0], 16 * num_groups, seed.device):
        words = _philox(seed, (_cut(row, block) & _LOW, _cut(row, block) >> 32, group, torch.full_like(group, branch)))
        lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
        parts.append(lanes.flatten(1)[:, :num_units] >= threshold)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_LOW = 0xFFFFFFFF


def _philox(seed: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four random words, 32 bits each in an int64, for each counter of four; they broadcast."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 wraps around; the 64 bits are those of the unsigned product.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & _LOW) ^ c1 ^ key0, b & _LOW
        c2, c3 = ((a >> 32) & _LOW) ^ c3 ^ key1, a & _LOW
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _dropout(h: Tensor, p: float, seed: Tensor | None, branch: int, rows: Tensor | None = None) -> Tensor:
    """``h`` holds all rows, or the ones given."""
    if dropout_threshold(p) == 0:
        return h
    keep = philox_keep(seed, h.shape[0] if rows is None else rows, h.shape[1], branch, p)
    return torch.where(keep, h * dropout_scale(p), 0)


# The ops


@_without_autocast
def embedded(x, mask, weight, bias, seed, activation, dropout_p, compute_dtype, rows=None):
    """The instance stage, ``drop(act(W x + b))``, in the type of products; ``rows`` says which ones ``x`` holds."""
    acc, product = _types(compute_dtype, x, weight, bias)
    h = ACTIVATIONS[activation](_linear(_without_masked(x, mask), weight, bias, product, acc))
    return _dropout(h, dropout_p, seed, DROP_EMBEDDING, rows).to(product)


@_without_autocast
def softmax_pool(x, scores, offsets, mask):
    """``(bag, scores, lse)`` for scores that are given."""
    scores = _masked_scores(scores.to(_accumulation_dtype(x, scores)), mask)
    scores = scores.masked_fill(scores == -_INF, -_INF)  # no gradient, as for a masked row
    bag, lse = _softmax_pool(x, scores, _Segments(offsets, x))
    return bag.to(x.dtype), scores, lse


@_without_autocast
def attention_scores(
    x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, seed, activation, dropout_p, compute_dtype
):
    """``w (act(V x + b_V) * sigmoid(U x + b_U)) + c``; without U the sigmoid is left out."""
    acc, product = _types(compute_dtype, x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    x = _without_masked(x, mask)
    gate = ACTIVATIONS[activation](_linear(x, v_weight, v_bias, product, acc))
    gate = _dropout(gate, dropout_p, seed, DROP_ACTIVATION)
    if u_weight is not None:
        sigmoid = torch.sigmoid(_linear(x, u_weight, u_bias, product, acc))
        gate = gate * _dropout(sigmoid, dropout_p, seed, DROP_SIGMOID)
    return _masked_scores(_linear(gate, w_weight, w_bias, acc, acc), mask)


@_without_autocast
def attention_pool(x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, *options):
    """``(bag, scores, lse)`` for the scores of `attention_scores`, which takes the options."""
    parameters = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    scores = attention_scores(x, *parameters, *options)
    bag, lse = _softmax_pool(x, scores, _Segments(offsets, x))
    return bag.to(result_dtype(x, *parameters)), scores, lse


@_without_autocast
def query_scores(x, query, offsets, mask, scale):
    """``scale <x_i, q>``; a query per bag [B, K, L], or one for all of them [K, L]."""
    query = query.to(_accumulation_dtype(x, query))
    shared = query.ndim == 2
    index = None if shared else _Segments(offsets, x).index
    scores = _Score.of(x, query[None] if shared else query, _dead_rows(mask), index)
    return _masked_scores(scores * scale, mask)


@_without_autocast
def query_pool(x, query, offsets, mask, scale):
    """``(bag, scores, lse)`` for the scores of `query_scores`."""
    scores = query_scores(x, query, offsets, mask, scale)
    bag, lse = _softmax_pool(x, scores, _Segments(offsets, x))
    return bag.to(result_dtype(x, query)), scores, lse


@_without_autocast
def weighted_pool(x, weights, offsets, mask):
    """``sum_i w_i x_i`` over each bag."""
    dead = _dead_rows(mask)
    weights = weights.to(_accumulation_dtype(x, weights))
    weights = weights if dead is None else weights.masked_fill(dead, 0)
    segments = _Segments(offsets, x)
    return _Pool.of(x, weights, dead, segments.index, segments.num_bags).to(x.dtype)


@_without_autocast
def instance_max(x, weight, bias, offsets, mask, compute_dtype):
    """``(values, indices, logits)``: the largest logit of each bag and class, and the row that has it."""
    acc, product = _types(compute_dtype, x, weight, bias)
    logits = _masked_scores(_linear(_without_masked(x, mask), weight, bias, product, acc), mask)
    indices = _Segments(offsets, x).first_max(logits, logits == -_INF)
    return _gather(logits, indices, -_INF), indices, logits


@_without_autocast
def dsmil_pool(x, instance_logits, query, value, offsets, mask, seed, v_dropout_p, scale, compute_dtype):
    """``(bag, scores, lse, critical)``: the second stream of DSMIL.

    ``query`` is (q_weight, q_bias, q2_weight, q2_bias), linear where q2_weight is None; ``value`` is
    (v_weight, v_bias, v_activation), ``x`` itself where v_weight is None.
    """
    q_weight, q_bias, q2_weight, q2_bias = query
    acc, product = _types(compute_dtype, x, instance_logits, *query, *value[:2])
    segments, dead = _Segments(offsets, x), _dead_rows(mask)
    logits = _masked_scores(instance_logits, mask)
    critical = segments.first_max(logits, logits == -_INF)
    instances = _rows_at(x, critical)
    if q2_weight is None:
        # Absorbed: <Wq x + bq, q> = <x, Wq^T q> + <bq, q>.
        q = _linear(instances, q_weight, q_bias, acc, acc)
        scores = _Score.of(x, q @ q_weight.to(acc), dead, segments.index)
        if q_bias is not None:
            scores = scores + segments.to_rows(q @ q_bias.to(acc))
    else:

        def mlp(rows):
            hidden = torch.relu(_linear(rows, q_weight, q_bias, product, acc))
            return torch.tanh(_linear(hidden, q2_weight, q2_bias, product, acc))

        scores = _Score.of(mlp(_without_masked(x, mask)), mlp(instances), dead, segments.index)
    if scale is None:
        scale = (q_weight if q2_weight is None else q2_weight).shape[0] ** -0.5
    scores = _masked_scores(scores * scale, mask).masked_fill(segments.to_rows(critical < 0), -_INF)
    dropped = _dropout(x, v_dropout_p, seed, DROP_VALUE)
    bag, lse = _value_pool(dropped, scores, segments, mask, *value, product)
    return bag.to(result_dtype(x, *query, *value[:2])), scores, lse, critical


def _rows_at(x: Tensor, indices: Tensor) -> Tensor:
    """``x[indices]``, 0 for an index of -1: [B, C, L]."""
    if x.shape[0] == 0:
        return x.new_zeros((*indices.shape, x.shape[1]))
    rows = _take(x, indices.clamp(min=0).flatten()).unflatten(0, indices.shape)
    return rows.masked_fill((indices < 0)[:, :, None], 0)


def _value_pool(x, scores, segments, mask, v_weight, v_bias, v_activation, product) -> tuple[Tensor, Tensor]:
    """``(bag, lse)`` of the values ``act(V x + b_V)``."""
    acc = scores.dtype
    if v_weight is not None and v_activation not in (None, "identity"):
        values = _linear(_without_masked(x, mask), v_weight, v_bias, product, acc)
        return _softmax_pool(ACTIVATIONS[v_activation](values), scores, segments)
    bag, lse = _softmax_pool(x, scores, segments)
    if v_weight is not None:
        # Folded: the weights sum to 1, so the linear value is taken of the pooled vector.
        bag = _linear(bag, v_weight, v_bias, acc, acc).masked_fill((lse == -_INF)[:, :, None], 0)
    return bag, lse


@_without_autocast
def loss_attention_pool(x, weight, bias, offsets, mask, compute_dtype):
    """``(bag, scores, lse, logits)``: the score of an instance is the log-sum-exp of its class logits."""
    acc, product = _types(compute_dtype, x, weight, bias)
    logits = _linear(_without_masked(x, mask), weight, bias, product, acc)
    scores = _masked_scores(logits.logsumexp(1, keepdim=True), mask)
    bag, lse = _softmax_pool(x, scores, _Segments(offsets, x))
    return bag.to(result_dtype(x, weight, bias)), scores, lse, _masked_scores(logits, mask)


@_without_autocast
def mean_pool(x, offsets, mask):
    """The mean of the real instances of each bag."""
    segments = _Segments(offsets, x)
    ones = x.new_ones((x.shape[0], 1), dtype=_accumulation_dtype(x))
    dead = _dead_rows(mask)
    count = segments.sum(ones if dead is None else ones.masked_fill(dead, 0))
    total = _Pool.of(x, ones, dead, segments.index, segments.num_bags)[:, 0]
    return (total / count.clamp(min=1)).to(x.dtype)


def max_pool(x, offsets, mask):
    """``(values, indices)``: the maximum over the real instances of each bag, feature by feature."""
    dead = torch.zeros_like(x[:, :1], dtype=torch.bool) if mask is None else _dead_rows(mask)
    indices = _Segments(offsets, x).first_max(x, dead)
    return _gather(x, indices, 0), indices


def segment_softmax(scores, offsets, mask):
    """The softmax of the scores inside each bag."""
    segments = _Segments(offsets, scores)
    scores = _masked_scores(scores.to(_accumulation_dtype(scores)), mask)
    dead, e, z, _ = _exp(scores, segments)
    return (e / segments.to_rows(z)).masked_fill(dead, 0)


def attention_weights(scores, lse, offsets, mask):
    """``exp(scores - lse)``: the weights that a pooling op used."""
    scores = _masked_scores(scores, mask)
    dead = scores == -_INF
    return (scores - _Segments(offsets, scores).to_rows(lse)).masked_fill(dead, 0).exp().masked_fill(dead, 0)


def topk_instances(scores, k, offsets, largest, mask):
    """``(values, indices)`` of the k largest or smallest scores of each bag and head, best first."""
    segments = _Segments(offsets, scores)
    scores = _masked_scores(scores, mask)
    dead = scores == -_INF
    index = torch.zeros_like(scores[:, 0], dtype=torch.int64) if segments.index is None else segments.index
    # Stable sorts, the least significant key first: by score, then the dead after the alive, then by bag.
    order = _stable_order(scores.detach(), largest)
    key = (2 * index[:, None] + dead).gather(0, order)
    order = order.gather(0, _stable_order(key, False))

    size = segments.sum(torch.ones_like(index))
    alive = segments.sum((~dead).to(torch.int64))
    rank = torch.arange(k, device=scores.device)
    place = (size.cumsum(0) - size)[:, None, None] + rank
    place = torch.where(rank < alive[:, :, None], place, -1)
    indices = _gather(order, place.transpose(1, 2).flatten(0, 1), -1)
    values = _gather(scores, indices, -_INF if largest else _INF)
    shape = (segments.num_bags, k)
    return values.unflatten(0, shape).transpose(1, 2), indices.unflatten(0, shape).transpose(1, 2)


def _stable_order(t: Tensor, descending: bool) -> Tensor:
    """How to sort columns."""
    if _torch.in_onnx_export():  # where all sorting is stable, and none can be asked for
        return t.sort(dim=0, descending=descending).indices
    return torch.argsort(t, dim=0, descending=descending, stable=True)
