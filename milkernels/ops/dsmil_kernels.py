"""DSMIL's ops (Li, Li, Eliceiri 2021), composed of raw ops that every backend has.

What is linear never meets the instances: <Wq x_i + bq, q_m> = <x_i, Wq^T q_m> + <bq, q_m>, so a linear query is one
vector for each bag and class, and V sum_i a_i x_i = sum_i a_i V x_i, since the weights sum to 1.  A backend goes over
the rows: it scores them by these vectors, pools them, and knows an MLP query and a value that is not linear.  Here is
what a few rows need, n = B C critical instances, those of the first bag first.
"""

import torch
from torch import Tensor

from milkernels import saving
from milkernels.dtypes import accumulation_dtype
from milkernels.ops.segments import INF

_EMBED = ("e_weight", "e_bias")
_FIRST = ("weight", "bias")
_ABSENT = [None] * 4
_SECOND = ("q_weight", "q_bias", "q2_weight", "q2_bias", "v_weight", "v_bias")


def hidden_units(q_weight, q2_weight, v_weight, v_activation, **_) -> tuple[int, ...]:
    """Of the layers that rows go through: those of an MLP query, and a value that is not linear."""
    query = () if q2_weight is None else (q_weight.shape[0], q2_weight.shape[0])
    value = () if _is_folded(v_weight, v_activation) or v_weight is None else (v_weight.shape[0],)
    return query + value


def _is_folded(v_weight, v_activation) -> bool:
    return v_weight is not None and v_activation in (None, "identity")


class _SecondStream:
    """A call on one backend, whose ops are ``ops``; the weights are in the accumulation type."""

    def __init__(self, ops, x, weights, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype, *embed):
        self.ops, self.x, self.embed, self.bags, self.acc = ops, x, embed, (offsets, mask), accumulation_dtype(x)
        self.weights = [w if w is None or w.dtype is self.acc else w.to(self.acc) for w in weights]
        q_weight, _, q2_weight, _, v_weight, _ = self.weights
        self.mlp = q2_weight is not None
        self.folded = _is_folded(v_weight, v_activation)
        self.scale = (q2_weight if self.mlp else q_weight).shape[0] ** -0.5 if scale is None else scale
        # The layers that rows go through: those of an MLP query, and a value that is not linear.
        layers = (self.weights[:4] if self.mlp else _ABSENT[:4]) + (_ABSENT[:2] if self.folded else self.weights[4:])
        self.of_rows = (layers, offsets, mask, seed, v_activation, v_dropout_p, compute_dtype, *embed)
        self.hidden = hidden_units(q_weight, q2_weight, v_weight, v_activation)

    def keep(self, limit: int) -> Tensor:
        """Memory for what is kept of embedded rows and hidden units."""
        embed, product = self.embed[0], self.of_rows[-5] or self.x.dtype
        embedded = embed[0].shape[0] if embed else 0
        return self.ops.keep(self.x, saving.kept_bytes(self.x, limit, product, embedded, self.hidden))

    def forward(self, queries: "_Queries", kept: Tensor, has_rows: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(bag, scores, lse, pooled)``: pooled is what a linear value is taken of; empty where there is none.
        ``has_rows``: the embedded rows are in ``kept`` already."""
        bag, scores, lse = self.ops.dsmil_rows_fwd(self.x, *queries.of_rows, *self.of_rows, kept, has_rows)
        if not self.folded:
            return bag, scores, lse, bag.new_empty(0)
        return self.ops.linear_of_bags(bag, lse, *self.weights[4:]), scores, lse, bag

    def backward(self, queries: "_Queries", kept, saved, grads, found: dict[str, Tensor], needs) -> Tensor | None:
        """Adds to ``found`` the gradients by name; returns that of the critical rows [n, L], which waits to be added to
        those of the rows: what several give to one row is summed before it is rounded."""
        bag, scores, lse, pooled = saved
        grad_bag, grad_scores, grad_lse = (None if g is None else g.to(self.acc) for g in grads)
        if grad_bag is None and grad_scores is None and grad_lse is None:
            return None
        if self.folded:
            if grad_bag is not None:
                of_bag = grad_bag.masked_fill((lse == -INF)[..., None], 0).flatten(0, 1)
                grad_bag, found["v_weight"], found["v_bias"] = self.ops.few_linear_bwd(
                    of_bag, pooled.flatten(0, 1), self.weights[4], None, None, 1.0
                )
                grad_bag = grad_bag.view_as(pooled)
            bag = pooled
        gradients = self.ops.dsmil_rows_bwd(
            self.x, *queries.of_rows, *self.of_rows, kept, bag, scores, lse, grad_bag, grad_scores, grad_lse, needs
        )
        names = ("x", "vectors", *_SECOND, *_EMBED)
        layers = (True, True, *self.of_rows[0], True, True)
        found |= {n: g for n, g, layer in zip(names, gradients, layers, strict=True) if layer is not None}
        of_shift = self._of_shift(scores, lse, grad_scores, grad_lse)
        return queries.backward(found.pop("vectors").flatten(0, 1), of_shift, found)

    def _of_shift(self, scores: Tensor, lse: Tensor, grad_scores, grad_lse) -> Tensor | None:
        """The gradient [n] of what the bias of a linear query adds to the scores of a bag and class.  That leaves the
        softmax as it is, so it gets none from the bag."""
        if self.mlp or self.weights[1] is None or (grad_scores is None and grad_lse is None):
            return None
        total = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(lse == -INF, 0)
        if grad_scores is not None:
            alive = grad_scores.masked_fill(scores == -INF, 0)
            total = total + self.ops.weighted_pool_fwd(alive.new_ones(len(alive), 1), alive, *self.bags)[..., 0]
        return total.view(-1)


class _Queries:
    """Those of the critical instances ``rows`` [n, L]: a score is ``<row, vectors[b, c]> + shift[b, c]``, where a row
    is an instance, or its query by the MLP.  They are computed here, so the gradient flows through both uses of q."""

    def __init__(self, call: _SecondStream, critical: Tensor, rows: Tensor):
        ops, (q_weight, q_bias, q2_weight, q2_bias, _, _) = call.ops, call.weights
        self.call, self.rows, shift = call, rows, None
        if call.mlp:
            self.hidden = ops.few_linear(rows, q_weight, q_bias, "relu", 1.0)
            self.query = ops.few_linear(self.hidden, q2_weight, q2_bias, "tanh", 1.0)
            vectors = self.query * call.scale
        else:
            self.query = ops.few_linear(rows, q_weight, q_bias, None, call.scale)
            vectors, shift = ops.few_transposed(self.query, q_weight, q_bias)
            shift = shift.view(critical.shape)
        self.of_rows = (vectors.view(*critical.shape, vectors.shape[1]), shift, critical)

    def backward(self, of_vectors: Tensor, of_shift: Tensor | None, found: dict[str, Tensor]) -> Tensor:
        """Adds to the gradients of the query's parameters; returns that of the rows."""
        call, ops, (q_weight, q_bias, q2_weight, _, _, _) = self.call, self.call.ops, self.call.weights
        if call.mlp:
            of_hidden, of_q2, of_q2_bias = ops.few_linear_bwd(
                of_vectors, self.hidden, q2_weight, self.query, "tanh", call.scale
            )
            _add(found, q2_weight=of_q2, q2_bias=of_q2_bias)
            of_rows, of_q, of_q_bias = ops.few_linear_bwd(of_hidden, self.rows, q_weight, self.hidden, "relu", 1.0)
        else:
            of_query, found["q_weight"], found["q_bias"] = ops.few_transposed_bwd(
                of_vectors, of_shift, self.query, q_weight, q_bias
            )
            of_rows, of_q, of_q_bias = ops.few_linear_bwd(of_query, self.rows, q_weight, None, None, call.scale)
        _add(found, q_weight=of_q, q_bias=of_q_bias)
        return of_rows


def _add(found: dict[str, Tensor], **parts: Tensor) -> None:
    for name, part in parts.items():
        found[name] = found[name].add_(part) if name in found else part


class _Gradients:
    """What a backward returns: the gradients of its inputs, by name."""

    def __init__(self, call: _SecondStream, names, inputs, needs):
        self.call, self.inputs, self.found = call, dict(zip(names, inputs, strict=True)), {}
        self.needs = dict(zip(names, needs, strict=True))
        for name, need in self.needs.items():
            if need and self.inputs[name] is None:
                raise ValueError(f"needs says that {name} wants a gradient, but {name} is absent")
        self.of_instances = [self.needs[name] for name in ("x", *_EMBED)]

    def add_rows(self, critical: Tensor, of_rows: Tensor | None) -> None:
        """Adds the gradients [n, L] of the rows of these numbers [B, C]."""
        if of_rows is not None and any(self.of_instances):
            self.call.ops.add_rows_(*self.written(), self.call.x, critical, of_rows, *self.call.embed)

    def written(self) -> list[Tensor]:
        """The gradients so far of x, in its type, and of the embedding, in that of sums; empty where nobody needs
        them."""
        return [self._written(name) if self.needs[name] else self.call.x.new_empty(0) for name in ("x", *_EMBED)]

    def _written(self, name: str) -> Tensor:
        if name not in self.found:
            like = self.inputs[name]
            dtype = like.dtype if name == "x" else self.call.acc
            self.found[name] = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        return self.found[name]

    def in_their_types(self) -> tuple[Tensor, ...]:
        """All of them in the types of the inputs: 0 where there is none, empty where nobody needs it."""
        out = []
        for name, like in self.inputs.items():
            if not self.needs[name]:
                out.append(self.call.x.new_empty(0))
            elif (found := self.found.get(name)) is None:
                out.append(torch.zeros_like(like, memory_format=torch.contiguous_format))
            else:
                out.append(found if found.dtype is like.dtype else found.to(like.dtype))
        return tuple(out)


# The ops. `ops` are those of a backend; the other arguments are as `dual_stream` declares them.


def dsmil_pool_fwd(ops, x, critical_rows, critical, weights, *others):
    *options, saved_bytes = others
    call = _SecondStream(ops, x, weights, *options)
    kept = call.keep(saved_bytes)
    return *call.forward(_Queries(call, critical, _rows_of(call, critical, critical_rows)), kept, False), kept


def dsmil_pool_bwd(
    ops, x, critical_rows, critical, weights, offsets, mask, seed, bag, scores, lse, pooled, embed, kept,
    v_activation, v_dropout_p, scale, compute_dtype, embed_activation, embed_dropout_p, embed_dtype,
    grad_bag, grad_scores, grad_lse, needs,
):  # fmt: skip
    embed_options = (embed, embed_activation, embed_dropout_p, embed_dtype)
    call = _SecondStream(
        ops, x, weights, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype, *embed_options
    )
    names = ("x", "critical_rows", *_SECOND, *_EMBED)
    to = _Gradients(call, names, (x, critical_rows, *weights, *_embedding(embed)), needs)
    queries = _Queries(call, critical, _rows_of(call, critical, critical_rows))
    saved, grads = (bag, scores, lse, pooled), (grad_bag, grad_scores, grad_lse)
    of_rows = call.backward(queries, kept, saved, grads, to.found, to.of_instances)
    if critical_rows is None:
        to.add_rows(critical, of_rows)
    elif of_rows is not None:
        to.found["critical_rows"] = of_rows.view_as(critical_rows)
    return to.in_their_types()


def dsmil_fwd(ops, x, weights, offsets, mask, *others):
    *options, saved_bytes = others
    call = _SecondStream(ops, x, weights[2:], offsets, mask, *options)
    kept = call.keep(saved_bytes)
    values, critical, logits = ops.dsmil_logits_fwd(x, weights[:2], offsets, mask, *call.embed, kept)
    bag, scores, lse, pooled = call.forward(_Queries(call, critical, _rows_of(call, critical)), kept, True)
    return bag, scores, lse, critical, values, logits, pooled, kept


def dsmil_bwd(
    ops, x, weights, offsets, mask, seed, bag, scores, lse, critical, logits, pooled, embed, kept,
    v_activation, v_dropout_p, scale, compute_dtype, embed_activation, embed_dropout_p, embed_dtype,
    grad_bag, grad_scores, grad_lse, grad_values, grad_logits, needs,
):  # fmt: skip
    embed_options = (embed, embed_activation, embed_dropout_p, embed_dtype)
    call = _SecondStream(
        ops, x, weights[2:], offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype, *embed_options
    )
    to = _Gradients(call, ("x", *_FIRST, *_SECOND, *_EMBED), (x, *weights, *_embedding(embed)), needs)
    queries = _Queries(call, critical, _rows_of(call, critical))
    saved, grads = (bag, scores, lse, pooled), (grad_bag, grad_scores, grad_lse)
    of_rows = call.backward(queries, kept, saved, grads, to.found, to.of_instances)
    if grad_logits is not None:
        of_weight, of_bias = ops.logits_bwd_(
            *to.written(), x, weights[:2], offsets, mask, logits, *embed_options, kept, grad_logits
        )
        _add(to.found, weight=of_weight, bias=of_bias)
    if grad_values is not None:
        of_winners, of_weight, of_bias = ops.few_winners_bwd(
            grad_values.to(call.acc), critical, queries.rows, weights[0].to(call.acc)
        )
        _add(to.found, weight=of_weight, bias=of_bias)
        of_rows = of_winners if of_rows is None else of_rows.add_(of_winners)
    to.add_rows(critical, of_rows)
    return to.in_their_types()


def _rows_of(call: _SecondStream, critical: Tensor, given: Tensor | None = None) -> Tensor:
    """The critical instances [n, L] as the op sees them, 0 where there is none."""
    if given is None:
        return call.ops.rows_at(call.x, critical, *call.embed)
    return given.to(call.acc).flatten(0, 1)


def _embedding(embed) -> tuple[Tensor | None, Tensor | None]:
    return tuple(embed[:2]) if embed else (None, None)
