"""The truth that ops are tested against: one plain loop over bags, the formula of each op written straight.

Shares no code and no identities with the package.  Everything is computed in the type of what comes in:
float64 inputs give the oracle, narrower ones what eager PyTorch gives in that type.  Masked rows are never
looked at.  Gradients come from autograd.

Arguments are named as those of the public functions.  Dropout masks are passed in: ``keep`` holds one bool
tensor for each branch, from `dropout_keep` or elsewhere.
"""

import functools
import math

import torch
from torch import Tensor

INF = float("inf")


def gradients(outputs, inputs, cotangents) -> list[Tensor | None]:
    """The gradients of all floating-point outputs together, 0 where an input was not used."""
    used = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.is_floating_point() and o.requires_grad]
    present = [t for t in inputs if t is not None]
    if not used:
        return [None if t is None else torch.zeros_like(t) for t in inputs]
    outs, cots = zip(*used, strict=True)
    found = iter(torch.autograd.grad(outs, present, cots, allow_unused=True, materialize_grads=True))
    return [None if t is None else next(found) for t in inputs]


# Dropout: Philox4x32-10 (Salmon et al. 2011), one counter at a time


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words."""
    word = 2**32
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right // word) ^ b ^ k, right % word, (left // word) ^ d ^ m, left % word
        k, m = (k + 0x9E3779B9) % word, (m + 0xBB67AE85) % word
    return a, b, c, d


@functools.lru_cache
def dropout_keep(seed: int, num_rows: int, num_units: int, branch: int, p: float) -> Tensor:
    """Which units are kept, ``[num_rows, num_units]``."""
    seed %= 2**64
    keep = []
    for row in range(num_rows):
        lanes = []
        for group in range((num_units + 7) // 8):
            counter = (row % 2**32, row // 2**32, group, branch)
            for word in philox(counter, (seed % 2**32, seed // 2**32)):
                lanes += [word % 2**16, word // 2**16]
        keep.append([lane >= _threshold(p) for lane in lanes[:num_units]])
    return torch.tensor(keep, dtype=torch.bool).reshape(num_rows, num_units)


def _threshold(p: float) -> int:
    return math.floor(p * 2**16 + 0.5)


def _drop(h: Tensor, keep: Tensor | None, p: float) -> Tensor:
    if keep is None:
        return h
    kept = 1 - _threshold(p) / 2**16
    return torch.where(keep, h / kept if kept > 0 else h, torch.zeros_like(h))


# Bags


def real_rows(num_rows: int, offsets: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """For each bag, the rows that are not masked."""
    bounds = [0, num_rows] if offsets is None else offsets.tolist()
    real = [True] * num_rows if mask is None else [bool(m) for m in mask.tolist()]
    return [
        torch.tensor([i for i in range(start, end) if real[i]], dtype=torch.int64)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]


def _scatter(rows: list[Tensor], parts: list[Tensor], num_rows: int, like: Tensor) -> Tensor:
    """``[N, K]`` from the parts of the bags, -inf elsewhere."""
    out = like.new_full((num_rows, parts[0].shape[1] if parts else 0), -INF)
    for r, part in zip(rows, parts, strict=True):
        out = out.index_put((r,), part.to(out.dtype))
    return out


def _pool(values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """``(bag [K, L], lse [K])`` of one bag; a score of -inf does not count for its head."""
    bag, lse = [], []
    for k in range(scores.shape[1]):
        counts = scores[:, k] != -INF
        s, v = scores[counts, k], values[counts]
        if len(s) == 0:
            bag.append(values.new_zeros(values.shape[1]))
            lse.append(scores.new_full((), -INF))
        else:
            bag.append(torch.softmax(s, 0).to(v.dtype) @ v)
            lse.append(torch.logsumexp(s, 0))
    return torch.stack(bag), torch.stack(lse)


def _pool_all(x, rows, values, scores):
    """Pools the values and scores of each bag: ``(bag, scores, lse)``."""
    pooled = [_pool(v, s) for v, s in zip(values, scores, strict=True)]
    bag, lse = (torch.stack(part) for part in zip(*pooled, strict=True))
    return bag, _scatter(rows, scores, x.shape[0], scores[0]), lse


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def _activation(name: str | None, h: Tensor) -> Tensor:
    if name == "tanh":
        return torch.tanh(h)
    if name == "relu":
        return torch.where(h > 0, h, torch.zeros_like(h))
    if name == "gelu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return h


# The embedding


def embedded(x, weight, bias, activation, dropout_p, keep, mask):
    """The rows that are not masked, embedded; 0 for the others."""
    (r,) = real_rows(x.shape[0], None, mask)
    h = _drop(_activation(activation, _linear(x[r], weight, bias)), None if keep is None else keep[r], dropout_p)
    return h.new_zeros(x.shape[0], weight.shape[0]).index_put((r,), h)


# The ops


def softmax_pool(x, scores, offsets=None, *, mask=None):
    rows = real_rows(x.shape[0], offsets, mask)
    scores = torch.where(scores == -INF, -INF, scores)  # no gradient, as where the mask says so
    return _pool_all(x, rows, [x[r] for r in rows], [scores[r] for r in rows])


def _attention(r, x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, activation, dropout_p, keep):
    h = _drop(_activation(activation, _linear(x[r], v_weight, v_bias)), keep and keep[0][r], dropout_p)
    if u_weight is not None:
        h = h * _drop(torch.sigmoid(_linear(x[r], u_weight, u_bias)), keep and keep[1][r], dropout_p)
    return _linear(h, w_weight, w_bias)


def attention_pool(
    x,
    v_weight,
    v_bias,
    w_weight,
    w_bias,
    offsets=None,
    *,
    u_weight=None,
    u_bias=None,
    mask=None,
    activation="tanh",
    dropout_p=0.0,
    keep=None,
):
    parameters = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    rows = real_rows(x.shape[0], offsets, mask)
    scores = [_attention(r, x, *parameters, activation, dropout_p, keep) for r in rows]
    return _pool_all(x, rows, [x[r] for r in rows], scores)


gated_attention_pool = attention_pool


def attention_scores(*args, **kwargs):
    return (attention_pool(*args, **kwargs)[1],)


gated_attention_scores = attention_scores


def query_pool(x, query, offsets=None, *, scale=1.0, mask=None):
    rows = real_rows(x.shape[0], offsets, mask)
    queries = query if query.ndim == 3 else [query] * len(rows)
    scores = [scale * _linear(x[r], q, None) for r, q in zip(rows, queries, strict=True)]
    return _pool_all(x, rows, [x[r] for r in rows], scores)


def query_scores(*args, **kwargs):
    return (query_pool(*args, **kwargs)[1],)


def weighted_pool(x, weights, offsets=None, *, mask=None):
    rows = real_rows(x.shape[0], offsets, mask)
    return (torch.stack([weights[r].to(x.dtype).t() @ x[r] for r in rows]),)


def _first_max(values: Tensor, rows: Tensor) -> int:
    """The row of ``rows`` with the largest value, the first of equal ones, NaN before all; -1: only -inf."""
    best, record = -1, -INF
    for i, value in zip(rows.tolist(), values[rows].tolist(), strict=True):
        if value > record or (math.isnan(value) and not math.isnan(record)):
            best, record = i, value
    return best


def _first_max_all(values: Tensor, rows: list[Tensor]) -> Tensor:
    columns = range(values.shape[1])
    return torch.tensor([[_first_max(values[:, c], r) for c in columns] for r in rows]).reshape(
        len(rows), values.shape[1]
    )


def instance_max(x, weight, bias=None, offsets=None, *, mask=None):
    rows = real_rows(x.shape[0], offsets, mask)
    logits = _scatter(rows, [_linear(x[r], weight, bias) for r in rows], x.shape[0], x)
    indices = _first_max_all(logits.detach(), rows)
    none = logits.new_full((), -INF)
    values = [[logits[i, c] if i >= 0 else none for c, i in enumerate(row)] for row in indices.tolist()]
    return torch.stack([torch.stack(row) for row in values]), indices, logits


def dsmil_pool(
    x,
    instance_logits,
    q_weight,
    q_bias=None,
    offsets=None,
    *,
    q2_weight=None,
    q2_bias=None,
    v_weight=None,
    v_bias=None,
    v_activation=None,
    v_dropout_p=0.0,
    keep=None,
    scale=None,
    mask=None,
):
    def query(h):
        q = _linear(h, q_weight, q_bias)
        return q if q2_weight is None else torch.tanh(_linear(_activation("relu", q), q2_weight, q2_bias))

    def value(r):
        h = _drop(x[r], None if keep is None else keep[r], v_dropout_p)
        return h if v_weight is None else _activation(v_activation, _linear(h, v_weight, v_bias))

    rows = real_rows(x.shape[0], offsets, mask)
    given = instance_logits.dim() == 3  # the critical instances themselves [B, C, L]
    critical = None if given else _first_max_all(instance_logits.detach(), rows)
    scale = len(q_weight if q2_weight is None else q2_weight) ** -0.5 if scale is None else scale
    scores = []
    for b, r in enumerate(rows):
        # A class without a critical instance has no query: it pools nothing.
        winners = instance_logits[b] if given else [x[i] if i >= 0 else None for i in critical[b].tolist()]
        columns = [x.new_full((len(r),), -INF) if m is None else query(x[r]) @ query(m) * scale for m in winners]
        scores.append(torch.stack(columns, 1))
    bag, scores, lse = _pool_all(x, rows, [value(r) for r in rows], scores)
    return bag, scores, lse, lse.new_full(lse.shape, -1, dtype=torch.int64) if given else critical


def dsmil(x, weight, bias=None, *args, mask=None, offsets=None, **options):
    values, _, logits = instance_max(x, weight, bias, offsets, mask=mask)
    pooled = dsmil_pool(x, logits.detach(), *args, mask=mask, offsets=offsets, **options)
    return *pooled, values, logits


def loss_attention_pool(x, weight, bias=None, offsets=None, *, mask=None):
    rows = real_rows(x.shape[0], offsets, mask)
    logits = [_linear(x[r], weight, bias) for r in rows]
    scores = [torch.logsumexp(part, 1, keepdim=True) for part in logits]
    pooled = _pool_all(x, rows, [x[r] for r in rows], scores)
    return *pooled, _scatter(rows, logits, x.shape[0], x)


def mean_pool(x, offsets=None, *, mask=None):
    rows = real_rows(x.shape[0], offsets, mask)
    return (torch.stack([x[r].mean(0) if len(r) else x.new_zeros(x.shape[1]) for r in rows]),)


def max_pool(x, offsets=None, *, mask=None):
    rows = real_rows(x.shape[0], offsets, mask)
    indices = _first_max_all(x.detach(), rows)
    none = x.new_zeros(())
    values = [[x[i, c] if i >= 0 else none for c, i in enumerate(row)] for row in indices.tolist()]
    return torch.stack([torch.stack(row) for row in values]), indices


def segment_softmax(scores, offsets=None, *, mask=None):
    rows = real_rows(scores.shape[0], offsets, mask)
    weights = torch.zeros_like(scores)
    for r in rows:
        for k in range(scores.shape[1]):
            counts = r[scores[r, k] != -INF]
            if len(counts):
                weights = weights.index_put((counts, torch.tensor(k)), torch.softmax(scores[counts, k], 0))
    return (weights,)


def attention_weights(x, scores, offsets=None, *, mask=None):
    """The weights of ``softmax_pool(x, scores)``."""
    return segment_softmax(scores, offsets, mask=mask)


def topk_instances(scores, k, offsets=None, *, largest=True, mask=None):
    def order(score: float) -> tuple[bool, float]:
        """NaN after all numbers, as in torch.sort."""
        return math.isnan(score), 0.0 if math.isnan(score) else score

    rows, heads = real_rows(scores.shape[0], offsets, mask), scores.shape[1]
    indices = torch.full((len(rows), heads, k), -1)
    values = scores.new_full(indices.shape, -INF if largest else INF)
    for b, r in enumerate(rows):
        for head in range(heads):
            column = scores[:, head].tolist()
            found = [i for i in r.tolist() if column[i] != -INF]
            found.sort(key=lambda i, column=column: order(column[i]), reverse=largest)
            for rank, i in enumerate(found[:k]):
                indices[b, head, rank] = i
                at = torch.tensor([b]), torch.tensor([head]), torch.tensor([rank])
                values = values.index_put(at, scores[i, head][None])
    return values, indices
