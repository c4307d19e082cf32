"""DSMIL (Li, Li, Eliceiri 2021): the second stream, and both in one op, whose backward writes the gradient of x once.

What is linear never meets the instances: <Wq x + bq, q> = <x, Wq^T q> + <bq, q>, so a linear query is one vector for
each bag and class, and V sum_i a_i x_i = sum_i a_i V x_i. An MLP query and a value with an activation or dropout are
computed on slices of rows, again in the backward, as an embedding in front of everything is. The few critical
instances are PyTorch's own small products.
"""

import torch
from torch import Tensor

from milkernels.triton import pool, rows
from milkernels.triton.choice import first_max, instance_max_gradients
from milkernels.triton.gradients import (
    PoolGradients,
    RowGradients,
    checked_inputs,
    in_their_types,
    largest_finite,
    power_of_two_scale,
    zero_where_dead,
)
from milkernels.triton.host import dropout_of, product, product_dtype
from milkernels.triton.instances import Instances, Rows
from milkernels.triton.pooling import class_logits, masked, pool_by_products, pool_by_products_backward

_DEAD = float("-inf")
_WEIGHTS = "q_weight q_bias q2_weight q2_bias v_weight v_bias"


class _DSMIL(Instances):
    """A call with the parameters of the second stream in the accumulation type. Q is the width of queries."""

    def __init__(self, x, parameters, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype, *embed):
        super().__init__(x, offsets, mask, *embed)
        self.q, self.q_bias, self.q2, self.q2_bias, self.v, self.v_bias = (self.to_acc(p) for p in parameters)
        self.type = product_dtype(self.dtype, compute_dtype)
        self.activation = v_activation or "identity"
        self.dropout = dropout_of(seed, v_dropout_p)
        self.mlp = self.q2 is not None
        # Whether the value is linear: then the bag vectors pass it, not the rows.
        self.folded = self.v is not None and self.activation == "identity"
        self.layered = self.v is not None and not self.folded  # the value is a layer with an activation
        # Whether what is pooled is computed from the instances on slices of rows.
        self.computes_values = self.layered or self.dropout[0] is not None
        self.scale = (self.q2 if self.mlp else self.q).shape[0] ** -0.5 if scale is None else scale

    @property
    def pooled_width(self) -> int:
        return self.v.shape[0] if self.layered else self.width

    def workspace(self, *, of_query: bool, of_value: bool, gradient: bool) -> int:
        """The bytes of workspace per row: activations of the query and the value, and their gradients."""
        size, acc = self.type.itemsize, self.acc.itemsize
        copied = self.type != self.dtype or (gradient and self.mask is not None and self.embedding is None)
        per_row = self.width * size * (copied + (self.dropout[0] is not None))
        units = (self.q.shape[0] + self.q2.shape[0] if of_query else 0) + (self.pooled_width if of_value else 0)
        per_row += units * (2 * (size + acc) if gradient else size + acc)
        per_row += self.width * acc * (of_query + of_value) if gradient else 0
        return max(per_row, 1)

    def operand(self, x: Tensor, block: slice, *, clean: bool) -> Tensor:
        return rows.operand(self, x, block, self.type, clean=clean and self.embedding is None)

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``W x + b`` [n, M] in the accumulation type; ``x`` [n, L] has the type of products."""
        z = product(x, weight.to(self.type).t(), self.acc)
        return z if bias is None else z.add_(bias)

    def query_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(h, tanh(W2 h + b2))`` [n, Q] of the MLP query, where ``h = relu(W1 x + b1)`` has the type of products."""
        hidden = self.layer(x, self.q, self.q_bias).relu_().to(self.type)
        return hidden, self.layer(hidden, self.q2, self.q2_bias).tanh_()

    def value_rows(self, x: Tensor, block: slice, *, clean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(input, values, argument)`` of the slice's rows, which ``x`` [n, L] holds: values [n, pooled_width] are
        what is pooled, input is what the value layer takes, and argument is what its derivative is computed from, or
        None."""
        if self.dropout[0] is not None:
            x = rows.copied(self, x, block, self.type if self.layered else self.dtype, dropout=self.dropout)
        else:
            x = self.operand(x, block, clean=clean)
        if not self.layered:
            return x, x, None
        z = self.layer(x, self.v, self.v_bias)
        if self.activation == "gelu":
            return x, torch.nn.functional.gelu(z), z
        h = z.relu_() if self.activation == "relu" else z.tanh_()
        return x, h, h


class _CriticalQueries:
    """The queries of the critical instances: a score is ``<row, vectors[b, c]> + shift[b, c]``, where a row is an
    instance [L], or its query [Q] by the MLP. They are computed here so that the gradient flows through both uses of
    q."""

    def __init__(self, call: _DSMIL, critical: Tensor):
        self.call, self.chosen = call, call.gathered(critical)
        self.dead = critical < 0
        self.x = self.chosen.values
        self.z = _linear(self.x, call.q, call.q_bias)
        self.hidden = self.z.relu()
        self.query = _linear(self.hidden, call.q2, call.q2_bias).tanh() if call.mlp else self.z
        scaled = self.query * call.scale
        self.vectors = scaled if call.mlp else scaled @ call.q  # [B, C, Q or L]
        shift = torch.zeros_like(scaled[..., 0])
        if not call.mlp and call.q_bias is not None:
            shift = scaled @ call.q_bias
        self.shift = shift.masked_fill(self.dead, _DEAD)

    def backward(self, grad_vectors: Tensor, grad_shift: Tensor | None, found: dict[str, Tensor]) -> Tensor:
        """Adds to the gradients of the query's parameters in ``found``; returns those of the critical rows [B, C, L].

        ``grad_vectors`` [B, C, Q or L] and ``grad_shift`` [B, C] are the gradients of `vectors` and `shift`.
        """
        call = self.call
        if call.mlp:
            of_z2 = grad_vectors * call.scale * (1 - self.query**2)
            _add(found, "q2", _outer(of_z2, self.hidden))
            _add(found, "q2_bias", of_z2.sum((0, 1)))
            of_z = (of_z2 @ call.q2) * (self.z > 0)
        else:
            scaled = self.query * call.scale
            of_query = grad_vectors @ call.q.t()
            _add(found, "q", _outer(scaled, grad_vectors))
            if call.q_bias is not None and grad_shift is not None:
                of_query = of_query + grad_shift[..., None] * call.q_bias
                _add(found, "q_bias", (grad_shift[..., None] * scaled).sum((0, 1)))
            of_z = of_query * call.scale
        _add(found, "q", _outer(of_z, self.x))
        _add(found, "q_bias", of_z.sum((0, 1)))
        return of_z @ call.q


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = x @ weight.t()
    return z if bias is None else z + bias


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum of outer products of a [B, C, M] and b [B, C, L]: [M, L]."""
    return a.flatten(0, 1).t() @ b.flatten(0, 1)


def _add(found: dict[str, Tensor], name: str, part: Tensor) -> None:
    found[name] = found[name] + part if name in found else part


def dsmil_pool_fwd(x, instance_logits, weights, offsets, mask, *options):
    call = _DSMIL(x, weights, offsets, mask, *options)
    _, critical = first_max(call, masked(call.to_acc(instance_logits), mask), dead=True, empty=_DEAD)
    return _second_stream(call, critical)


def _second_stream(call: _DSMIL, critical: Tensor):
    queries = _CriticalQueries(call, critical)
    C = critical.shape[1]
    scores = call.empty(call.rows, C)
    if not call.mlp and not call.computes_values:
        bag, scores, lse = pool_by_products(call, queries.vectors.contiguous(), queries.shift)
    else:
        if not call.mlp and call.embedding is None:
            rows.products(call, call.x, queries.vectors, shift=queries.shift, fill=_DEAD, out=scores)
        partials = pool.Partials(call, C, call.pooled_width)
        for block in call.slices(call.workspace(of_query=call.mlp, of_value=call.computes_values, gradient=False)):
            values = scored = call.rows_at(block).values
            if call.mlp:
                _, scored = call.query_rows(call.operand(values, block, clean=False))
            if call.mlp or call.embedding is not None:
                rows.products(call, scored, queries.vectors, shift=queries.shift, fill=_DEAD, rows=block, out=scores)
            pooled = call.value_rows(values, block, clean=False)[1] if call.computes_values else values
            partials.add(pooled, scores, block, call.mask)
            values = scored = pooled = None  # freed before the next slice comes
        bag, lse = partials.result()
    pooled = call.empty(0)
    if call.folded:
        pooled, bag = bag, _linear(bag, call.v, call.v_bias).masked_fill((lse == _DEAD)[..., None], 0)
    return bag, scores, lse, critical, pooled


def dsmil_pool_bwd(
    x, weights, offsets, mask, seed, bag, scores, lse, critical, pooled, embed,
    v_activation, v_dropout_p, scale, compute_dtype, embed_activation, embed_dropout_p, embed_dtype,
    grad_bag, grad_scores, grad_lse, needs,
):  # fmt: skip
    inputs = checked_inputs(needs, _WEIGHTS, x, weights, embed)
    embed = (embed, embed_activation, embed_dropout_p, embed_dtype)
    call = _DSMIL(x, weights, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype, *embed)
    critical, sink = critical.contiguous(), RowGradients(call, needs)
    queries = _CriticalQueries(call, critical)
    found = _second_stream_backward(queries, bag, scores, lse, pooled, grad_bag, grad_scores, grad_lse, sink)
    return _in_order(call, inputs, found, needs, sink)


_NAMES = ("q", "q_bias", "q2", "q2_bias", "v", "v_bias")


def _in_order(call: _DSMIL, inputs, found: dict[str, Tensor], needs, sink: RowGradients, names=_NAMES):
    gradients = [sink.of_x(), *(found.get(name) for name in names), sink.weight, sink.bias]
    gradients = [
        torch.zeros_like(like) if need and gradient is None else gradient
        for like, gradient, need in zip(inputs, gradients, needs, strict=True)
    ]
    return in_their_types(call, inputs, gradients, needs)


def _second_stream_backward(
    queries, bag, scores, lse, pooled, grad_bag, grad_scores, grad_lse, sink
) -> dict[str, Tensor]:
    """The gradients of the parameters by name; that of the rows is added to ``sink``."""
    call, found = queries.call, {}
    grad_bag = call.to_acc(grad_bag)
    if call.folded and grad_bag is not None:
        grad_bag = grad_bag.masked_fill((lse == _DEAD)[..., None], 0)
        found["v"], found["v_bias"] = _outer(grad_bag, pooled), grad_bag.sum((0, 1))
        grad_bag = (grad_bag @ call.v).contiguous()
    bag = pooled if call.folded else bag
    ds, dlse = call.to_acc(grad_scores), call.to_acc(grad_lse)
    # A shift of all scores of a bag and class leaves the weights as they are, so it has a gradient by these two alone.
    grad_shift = None
    if not call.mlp and call.q_bias is not None and (ds is not None or dlse is not None):
        grad_shift = torch.zeros_like(lse) if dlse is None else dlse
        if ds is not None:
            grad_shift = grad_shift + pool.column_sums(call, zero_where_dead(ds, scores))
        grad_shift = grad_shift.masked_fill(queries.dead, 0)

    if grad_bag is None and ds is None and dlse is None:
        return {}
    backward = _Backward(call, queries, scores, bag, grad_bag, ds, dlse, sink, found)
    sink.add_gathered(queries.chosen, queries.backward(backward.run(), grad_shift, found))
    return found


class _Backward:
    """The backward of scores and pooling over the rows: at once where both are linear in x, else slice by slice."""

    def __init__(self, call: _DSMIL, queries, scores, bag, grad_bag, ds, dlse, sink, found):
        self.call, self.queries, self.sink, self.found = call, queries, sink, found
        # Rows of x itself are read at once, not in slices, where neither a value nor a query is computed from them.
        self.at_once = call.embedding is None
        pooled = call.x if self.at_once and call.mlp and not call.computes_values else None
        self.pool = PoolGradients(call, pooled, scores, bag, grad_bag, ds, dlse, weights=sink.needed or call.layered)
        self.values = call.computes_values and grad_bag is not None

    def run(self) -> Tensor:
        """Returns the gradient of the queries' vectors [B, C, Q or L]; adds those of the rows and of the layers."""
        call = self.call
        if not call.mlp and not call.computes_values:
            return pool_by_products_backward(call, self.pool, self.queries.vectors.contiguous(), self.sink)
        of_vectors = pool.Partials(call, self.pool.input_scores.shape[1], self.queries.vectors.shape[2], softmax=False)
        for at in self.sink.slices(call.workspace(of_query=call.mlp, of_value=call.computes_values, gradient=True)):
            part = self._value(at) if call.computes_values else None
            if not call.computes_values and not self.at_once:
                self.pool.add(at.values, at.which)
            if call.mlp:
                part = self._query(at, of_vectors, part)
            elif not self.at_once:
                of_vectors.add(at.values, self.pool.scores, at.which, call.mask)
            weights = None if call.computes_values else self.pool.weights
            linear = (None, None) if call.mlp else (self.pool.scores, self.queries.vectors)
            self.sink.add(at, weights, self.pool.bag_of(weights), *linear, product=part)
            at = part = None  # freed before the next slice comes
        if not call.mlp and self.at_once:
            of_vectors.add(call.x, self.pool.scores, mask=call.mask)
        return of_vectors.result()[0]

    def _value(self, at: Rows) -> Tensor | None:
        """Goes back through the value of a slice: adds its parameters' gradients and returns that of the rows [n, L],
        or None where it is not needed."""
        call, block = self.call, at.which
        x, values, argument = call.value_rows(at.values, block, clean=True)
        self.pool.add(values, block)
        if not self.values:
            return None
        grad = call.empty(block.stop - block.start, call.pooled_width)
        rows.expand(call, grad, self.pool.weights, self.pool.bag, rows=block)
        if call.layered:
            rows.copied(call, grad, block, call.acc, z=argument, activation=call.activation, out=grad)
            grad = self._through(grad, x, call.v, "v", self.sink.needed)
        if self.sink.needed and call.dropout[0] is not None:
            rows.copied(call, grad, block, call.acc, dropout=call.dropout, out=grad)
        return grad

    def _query(self, at: Rows, of_vectors: pool.Partials, onto: Tensor | None) -> Tensor | None:
        """Goes back through the MLP query of a slice likewise; returns its part plus ``onto``, the part of the
        value."""
        call, block = self.call, at.which
        x = call.operand(at.values, block, clean=True)
        hidden, query = call.query_rows(x)
        of_vectors.add(query, self.pool.scores, block, call.mask)
        grad = call.empty(block.stop - block.start, call.q2.shape[0])
        rows.expand(call, grad, self.pool.scores, self.queries.vectors, rows=block)
        rows.copied(call, grad, block, call.acc, z=query, activation="tanh", out=grad)
        grad = self._through(grad, hidden, call.q2, "q2", True)
        rows.copied(call, grad, block, call.acc, z=hidden, activation="relu", out=grad)
        grad = self._through(grad, x, call.q, "q", self.sink.needed)
        return grad if onto is None or grad is None else grad.add_(onto)

    def _through(self, grad: Tensor, x: Tensor, weight: Tensor, name: str, need_x: bool) -> Tensor | None:
        """Goes back through a layer ``W x + b`` from ``grad`` [n, M]: adds the gradients of W and b, returns that of x
        [n, L], or None where it is not needed."""
        call = self.call
        _add(self.found, f"{name}_bias", grad.sum(0))
        scale = None
        if call.type == torch.float16:
            scale = power_of_two_scale(largest_finite(grad))
            grad = grad * scale
        grad = grad.to(call.type)
        of_weight = product(grad.t(), x, call.acc)
        _add(self.found, name, of_weight if scale is None else of_weight / scale)
        if not need_x:
            return None
        of_x = product(grad, weight.to(call.type), call.acc)
        return of_x if scale is None else of_x.div_(scale)


# Both streams


def dsmil_fwd(x, weights, offsets, mask, *options):
    call = _DSMIL(x, weights[2:], offsets, mask, *options)
    logits = class_logits(call, *weights[:2])
    values, critical = first_max(call, logits, dead=True, empty=_DEAD)
    bag, scores, lse, critical, pooled = _second_stream(call, critical)
    return bag, scores, lse, critical, values, logits, pooled


def dsmil_bwd(
    x, weights, offsets, mask, seed, bag, scores, lse, critical, logits, pooled, embed,
    v_activation, v_dropout_p, scale, compute_dtype, embed_activation, embed_dropout_p, embed_dtype,
    grad_bag, grad_scores, grad_lse, grad_values, grad_logits, needs,
):  # fmt: skip
    inputs = checked_inputs(needs, f"weight bias {_WEIGHTS}", x, weights, embed)
    embed = (embed, embed_activation, embed_dropout_p, embed_dtype)
    call = _DSMIL(x, weights[2:], offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype, *embed)
    critical, sink = critical.contiguous(), RowGradients(call, needs)
    queries = _CriticalQueries(call, critical)
    found = _second_stream_backward(queries, bag, scores, lse, pooled, grad_bag, grad_scores, grad_lse, sink)
    if grad_values is not None or grad_logits is not None:
        found["weight"], found["bias"] = instance_max_gradients(
            call, weights[0], critical, logits, grad_values, grad_logits, needs[1:3], sink, queries.chosen
        )
    return _in_order(call, inputs, found, needs, sink, ("weight", "bias", *_NAMES))
