"""DSMIL (Li, Li, Eliceiri 2021): the second stream, and both in one op, whose backward writes the gradient of x once.

What is linear never meets the instances: <Wq x + bq, q> = <x, Wq^T q> + <bq, q>, so a linear query is one vector for
each bag and class, and V sum_i a_i x_i = sum_i a_i V x_i. An MLP query and a value with an activation or dropout are
computed on slices of rows, again in the backward. The few critical instances are PyTorch's own small products.
"""

import torch
from torch import Tensor

from milkernels.triton import pool, rows
from milkernels.triton.attention import dropout_of
from milkernels.triton.call import Call, product, product_dtype
from milkernels.triton.choice import add_to_rows, first_max, gather_rows, instance_max_gradients
from milkernels.triton.gradients import PoolGradients, alive, in_their_types, largest, power_of_two_scale
from milkernels.triton.pooling import class_logits, masked, pool_by_products, pool_by_products_backward

_DEAD = float("-inf")


class _DSMIL(Call):
    def __init__(self, x, parameters, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype):
        super().__init__(x, offsets, mask)
        self.q, self.q_bias, self.q2, self.q2_bias, self.v, self.v_bias = (self.take(p) for p in parameters)
        self.type = product_dtype(x, compute_dtype)
        self.activation = v_activation or "identity"
        self.dropout = dropout_of(seed, v_dropout_p)
        self.mlp = self.q2 is not None
        self.folded = self.v is not None and self.activation == "identity"
        self.layered = self.v is not None and not self.folded  # the value is no linear map of what is pooled
        self.staged = self.layered or self.dropout[0] is not None  # and its rows are not those of x
        self.scale = (self.q2 if self.mlp else self.q).shape[0] ** -0.5 if scale is None else scale

    @property
    def pooled_width(self) -> int:
        return self.v.shape[0] if self.layered else self.width

    def row_blocks(self, *, of_query: bool, of_value: bool, gradient: bool):
        """Slices of rows whose workspace is bounded: activations of the query and the value, and their gradients."""
        size, acc = self.type.itemsize, self.acc.itemsize
        copied = self.type != self.x.dtype or (gradient and self.mask is not None)
        per_row = self.width * size * (copied + (self.dropout[0] is not None))
        units = (self.q.shape[0] + self.q2.shape[0] if of_query else 0) + (self.pooled_width if of_value else 0)
        per_row += units * (2 * (size + acc) if gradient else size + acc)
        per_row += self.width * acc * (of_query + of_value) if gradient else 0
        return self.blocks(max(per_row, 1))

    def rows_of(self, block: slice, *, clean: bool) -> Tensor:
        """The slice of x for products; a copy where the type is another, or masked rows are in the way of sums."""
        x = self.x[block]
        if self.type != x.dtype or (clean and self.mask is not None):
            return rows.staged(self, x, block, self.type)
        return x

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``W x + b`` in the accumulation type; ``x`` has that of products."""
        z = product(x, weight.to(self.type).t(), self.acc)
        return z if bias is None else z.add_(bias)

    def query_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(relu(W1 x + b1), tanh(W2 . + b2))`` of the MLP query, the first in the type of products."""
        hidden = self.layer(x, self.q, self.q_bias).relu_().to(self.type)
        return hidden, self.layer(hidden, self.q2, self.q2_bias).tanh_()

    def value_rows(self, block: slice, *, clean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(input, what is pooled, its argument or value)`` of a staged value; the last one is for its derivative."""
        if self.dropout[0] is not None:
            dtype = self.type if self.layered else self.x.dtype
            x = rows.staged(self, self.x[block], block, dtype, dropout=self.dropout)
        else:
            x = self.rows_of(block, clean=clean)
        if not self.layered:
            return x, x, None
        z = self.layer(x, self.v, self.v_bias)
        if self.activation == "gelu":
            return x, torch.nn.functional.gelu(z), z
        h = z.relu_() if self.activation == "relu" else z.tanh_()
        return x, h, h


class _CriticalQueries:
    """The queries of the critical instances, computed here so that the gradient flows through both uses of q."""

    def __init__(self, call: _DSMIL, critical: Tensor):
        self.call, self.critical = call, critical
        self.dead = critical < 0
        self.x = call.take(gather_rows(call, critical))
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
        """Adds to the gradients of the query's parameters; returns those of the critical rows."""
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
    return a.flatten(0, 1).t() @ b.flatten(0, 1)


def _add(found: dict[str, Tensor], name: str, part: Tensor) -> None:
    found[name] = found[name] + part if name in found else part


def dsmil_pool_fwd(x, instance_logits, q, q_bias, q2, q2_bias, v, v_bias, offsets, mask, *options):
    call = _DSMIL(x, (q, q_bias, q2, q2_bias, v, v_bias), offsets, mask, *options)
    _, critical = first_max(call, masked(call.take(instance_logits), mask), dead=True, empty=_DEAD)
    return _second_stream(call, critical)


def _second_stream(call: _DSMIL, critical: Tensor):
    queries = _CriticalQueries(call, critical)
    C = critical.shape[1]
    scores = call.empty(call.rows, C)
    if not call.mlp and not call.staged:
        bag, scores, lse = pool_by_products(call, queries.vectors.contiguous(), queries.shift)
    else:
        if not call.mlp:
            rows.products(call, call.x, queries.vectors, shift=queries.shift, fill=_DEAD, out=scores)
        partials = pool.Partials(call, C, call.pooled_width)
        for block in call.row_blocks(of_query=call.mlp, of_value=call.staged, gradient=False):
            if call.mlp:
                _, query = call.query_rows(call.rows_of(block, clean=False))
                rows.products(call, query, queries.vectors, shift=queries.shift, fill=_DEAD, rows=block, out=scores)
            pooled = call.value_rows(block, clean=False)[1] if call.staged else call.x[block]
            partials.add(pooled, scores, block, call.mask)
        bag, lse = partials.result()
    pooled = call.empty(0)
    if call.folded:
        pooled, bag = bag, _linear(bag, call.v, call.v_bias).masked_fill((lse == _DEAD)[..., None], 0)
    return bag, scores, lse, critical, pooled


def dsmil_pool_bwd(
    x, q, q_bias, q2, q2_bias, v, v_bias, offsets, mask, seed, bag, scores, lse, critical, pooled, v_activation,
    v_dropout_p, scale, compute_dtype, grad_bag, grad_scores, grad_lse, needs,
):  # fmt: skip
    parameters = (q, q_bias, q2, q2_bias, v, v_bias)
    call = _DSMIL(x, parameters, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype)
    found = _second_stream_backward(call, bag, scores, lse, critical, pooled, grad_bag, grad_scores, grad_lse, needs[0])
    return _in_order(call, (x, *parameters), found, needs)


_NAMES = ("x", "q", "q_bias", "q2", "q2_bias", "v", "v_bias")


def _in_order(call: Call, inputs, found: dict[str, Tensor], needs, names=_NAMES) -> tuple[Tensor, ...]:
    gradients = [found.get(name) for name in names]
    gradients = [
        torch.zeros_like(like) if need and gradient is None else gradient
        for like, gradient, need in zip(inputs, gradients, needs, strict=True)
    ]
    return in_their_types(call, inputs, gradients, needs)


def _second_stream_backward(
    call, bag, scores, lse, critical, pooled, grad_bag, grad_scores, grad_lse, need_x
) -> dict[str, Tensor]:
    """The gradients by name."""
    critical, found = critical.contiguous(), {}
    queries = _CriticalQueries(call, critical)
    grad_bag = call.take(grad_bag)
    if call.folded and grad_bag is not None:
        grad_bag = grad_bag.masked_fill((lse == _DEAD)[..., None], 0)
        found["v"], found["v_bias"] = _outer(grad_bag, pooled), grad_bag.sum((0, 1))
        grad_bag = (grad_bag @ call.v).contiguous()
    bag = pooled if call.folded else bag
    ds, dlse = call.take(grad_scores), call.take(grad_lse)
    # A shift of all scores of a bag and class leaves the weights as they are.
    grad_shift = None
    if not call.mlp and call.q_bias is not None and (ds is not None or dlse is not None):
        grad_shift = torch.zeros_like(lse) if dlse is None else dlse
        if ds is not None:
            grad_shift = grad_shift + pool.column_sums(call, alive(ds, scores))
        grad_shift = grad_shift.masked_fill(queries.dead, 0)

    if grad_bag is None and ds is None and dlse is None:
        return {}
    grad_x = call.x.new_empty(call.x.shape) if need_x else None
    backward = _Backward(call, queries, scores, bag, grad_bag, ds, dlse, grad_x, found)
    of_rows = queries.backward(backward.run(), grad_shift, found)
    if need_x:
        add_to_rows(critical, of_rows, grad_x)
        found["x"] = grad_x
    return found


class _Backward:
    """Of scores and pooling, over the rows: at once where both are linear in x, else slice by slice."""

    def __init__(self, call: _DSMIL, queries, scores, bag, grad_bag, ds, dlse, grad_x, found):
        self.call, self.queries, self.grad_x, self.found = call, queries, grad_x, found
        # Rows of x that a linear query scores are read once for all of it.
        pooled = call.x if call.mlp and not call.staged else None
        need_weights = grad_x is not None or call.layered
        self.pool = PoolGradients(call, pooled, scores, bag, grad_bag, ds, dlse, weights=need_weights)
        self.values = call.staged and grad_bag is not None

    def run(self) -> Tensor:
        """The gradient of the queries' vectors [B, C, Q or L]; those of x and of the layers are written and added."""
        call = self.call
        if not call.mlp and not call.staged:
            return pool_by_products_backward(call, self.pool, self.queries.vectors.contiguous(), self.grad_x)
        if call.mlp:
            of_vectors = pool.Partials(call, self.pool.given.shape[1], call.q2.shape[0], softmax=False)
        for block in call.row_blocks(of_query=call.mlp, of_value=call.staged, gradient=True):
            part = self._value(block) if call.staged else None
            if call.mlp:
                part = self._query(block, of_vectors, part)
            self._rows_of_x(block, part)
        return of_vectors.result()[0] if call.mlp else pool.weighted_sums(call, call.x, self.pool.scores)

    def _rows_of_x(self, block: slice, part: Tensor | None) -> None:
        """Writes the gradient of x: what came through layers, that of the bag and that of a linear query."""
        if self.grad_x is None:
            return
        weights = None if self.call.staged else self.pool.weights
        linear = (None, None) if self.call.mlp else (self.pool.scores, self.queries.vectors)
        rows.expand(
            self.call, self.grad_x, weights, self.pool.bag_of(weights), *linear, product=part, rows=block
        )  # fmt: skip

    def _value(self, block: slice) -> Tensor | None:
        """Through the value: its parameters' gradients are added; returns that of the rows of x, if wanted."""
        call, count = self.call, block.stop - block.start
        x, values, argument = call.value_rows(block, clean=True)
        self.pool.add(values, block)
        if not self.values:
            return None
        grad = call.empty(count, call.pooled_width)
        rows.expand(call, grad, self.pool.weights, self.pool.bag, rows=block)
        if call.layered:
            rows.staged(call, grad, block, call.acc, z=argument, activation=call.activation, out=grad)
            grad = self._through(grad, x, call.v, "v", self.grad_x is not None)
        if self.grad_x is not None and call.dropout[0] is not None:
            rows.staged(call, grad, block, call.acc, dropout=call.dropout, out=grad)
        return grad

    def _query(self, block: slice, of_vectors: pool.Partials, onto: Tensor | None) -> Tensor | None:
        """Through the MLP query, likewise; ``onto`` is added."""
        call = self.call
        x = call.rows_of(block, clean=True)
        hidden, query = call.query_rows(x)
        of_vectors.add(query, self.pool.scores, block, call.mask)
        grad = call.empty(block.stop - block.start, call.q2.shape[0])
        rows.expand(call, grad, self.pool.scores, self.queries.vectors, rows=block)
        rows.staged(call, grad, block, call.acc, z=query, activation="tanh", out=grad)
        grad = self._through(grad, hidden, call.q2, "q2", True)
        rows.staged(call, grad, block, call.acc, z=hidden, activation="relu", out=grad)
        grad = self._through(grad, x, call.q, "q", self.grad_x is not None)
        return grad if onto is None or grad is None else grad.add_(onto)

    def _through(self, grad: Tensor, x: Tensor, weight: Tensor, name: str, wanted: bool) -> Tensor | None:
        """Through a layer ``W x + b``: adds the gradients of W and b, returns that of x."""
        call = self.call
        _add(self.found, f"{name}_bias", grad.sum(0))
        scale = None
        if call.type == torch.float16:
            scale = power_of_two_scale(largest(grad))
            grad = grad * scale
        grad = grad.to(call.type)
        of_weight = product(grad.t(), x, call.acc)
        _add(self.found, name, of_weight if scale is None else of_weight / scale)
        if not wanted:
            return None
        of_x = product(grad, weight.to(call.type), call.acc)
        return of_x if scale is None else of_x.div_(scale)


# Both streams


def dsmil_fwd(x, weight, bias, q, q_bias, q2, q2_bias, v, v_bias, offsets, mask, *options):
    call = _DSMIL(x, (q, q_bias, q2, q2_bias, v, v_bias), offsets, mask, *options)
    logits = class_logits(call, weight, bias)
    values, critical = first_max(call, logits, dead=True, empty=_DEAD)
    bag, scores, lse, critical, pooled = _second_stream(call, critical)
    return bag, scores, lse, critical, values, logits, pooled


def dsmil_bwd(
    x, weight, bias, q, q_bias, q2, q2_bias, v, v_bias, offsets, mask, seed, bag, scores, lse, critical, logits, pooled,
    v_activation, v_dropout_p, scale, compute_dtype, grad_bag, grad_scores, grad_lse, grad_values, grad_logits, needs,
):  # fmt: skip
    parameters = (q, q_bias, q2, q2_bias, v, v_bias)
    call = _DSMIL(x, parameters, offsets, mask, seed, v_activation, v_dropout_p, scale, compute_dtype)
    found = _second_stream_backward(call, bag, scores, lse, critical, pooled, grad_bag, grad_scores, grad_lse, needs[0])
    if grad_values is not None or grad_logits is not None:
        names = ("x", "weight", "bias")
        first = instance_max_gradients(
            call, weight, critical, logits, grad_values, grad_logits, needs[:3], found.get("x")
        )
        found |= {name: gradient for name, gradient in zip(names, first, strict=True) if gradient is not None}
    return _in_order(call, (x, weight, bias, *parameters), found, needs, ("x", "weight", "bias", *_NAMES[1:]))
