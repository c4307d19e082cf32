"""What Triton does for DSMIL (Li, Li, Eliceiri 2021): the passes of its second stream over the rows, and what touches a
few of them. `milkernels.ops.dsmil_kernels` composes the ops of these.

An MLP query and a value with an activation or dropout are computed on slices of rows, again in the backward, as an
embedding in front of everything is.
"""

import torch
from torch import Tensor

from milkernels.triton import pool, rows
from milkernels.triton.choice import winner_gradients
from milkernels.triton.gradients import (
    PoolGradients,
    RowGradients,
    largest_finite,
    power_of_two_scale,
    zero_where_dead,
)
from milkernels.triton.host import dropout_of, product, product_dtype
from milkernels.triton.instances import Instances, Rows
from milkernels.triton.pooling import linear_gradients, pool_by_products, pool_by_products_backward

_DEAD = float("-inf")


class _DSMIL(Instances):
    """A call with the layers that rows go through, in the accumulation type: those of an MLP query, whose width is Q,
    and that of a value. A score is ``<row, vectors[b, c]> + shift[b, c]``, where a row is an instance [L], or its query
    [Q] where there is an MLP; -inf for a class without a critical instance."""

    def __init__(
        self, x, vectors, shift, critical, layers, offsets, mask, seed, v_activation, v_dropout_p, dtype, *embed
    ):
        super().__init__(x, offsets, mask, *embed)
        self.vectors, self.dead = self.to_acc(vectors).contiguous(), critical < 0
        shift = self.zeros(*critical.shape) if shift is None else self.to_acc(shift)
        self.shift = shift.masked_fill(self.dead, _DEAD)
        self.q, self.q_bias, self.q2, self.q2_bias, self.v, self.v_bias = (self.to_acc(p) for p in layers)
        self.type = product_dtype(self.dtype, dtype)
        self.activation = v_activation or "identity"
        self.dropout = dropout_of(seed, v_dropout_p)
        self.mlp, self.layered = self.q2 is not None, self.v is not None
        # Whether what is pooled is computed from the instances on slices of rows.
        self.computes_values = self.layered or self.dropout[0] is not None

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


def dsmil_rows_fwd(x, *others):
    call = _DSMIL(x, *others)
    C = call.vectors.shape[1]
    if not call.mlp and not call.computes_values:
        return pool_by_products(call, call.vectors, call.shift)
    scores = call.empty(call.rows, C)
    if not call.mlp and call.embedding is None:
        rows.products(call, call.x, call.vectors, shift=call.shift, fill=_DEAD, out=scores)
    partials = pool.Partials(call, C, call.pooled_width)
    for block in call.slices(call.workspace(of_query=call.mlp, of_value=call.computes_values, gradient=False)):
        values = scored = call.rows_at(block).values
        if call.mlp:
            _, scored = call.query_rows(call.operand(values, block, clean=False))
        if call.mlp or call.embedding is not None:
            rows.products(call, scored, call.vectors, shift=call.shift, fill=_DEAD, rows=block, out=scores)
        pooled = call.value_rows(values, block, clean=False)[1] if call.computes_values else values
        partials.add(pooled, scores, block, call.mask)
        values = scored = pooled = None  # freed before the next slice comes
    bag, lse = partials.result()
    return bag, scores, lse


def dsmil_rows_bwd(
    x, vectors, shift, critical, layers, offsets, mask, seed, v_activation, v_dropout_p, compute_dtype,
    embed, embed_activation, embed_dropout_p, embed_dtype,
    bag, scores, lse, grad_bag, grad_scores, grad_lse, needs,
):  # fmt: skip
    embed = (embed, embed_activation, embed_dropout_p, embed_dtype)
    of_rows = (offsets, mask, seed, v_activation, v_dropout_p, compute_dtype)
    call = _DSMIL(x, vectors, shift, critical, layers, *of_rows, *embed)
    sink, found = RowGradients(call, needs), {}
    of_vectors = _Backward(call, scores, bag, grad_bag, grad_scores, grad_lse, sink, found).run()
    of_vectors = of_vectors.masked_fill(call.dead[..., None], 0)  # a class that pools nothing may have summed 0 * NaN
    for name in _LAYERS:
        if name not in found and (layer := getattr(call, name)) is not None:
            found[name] = torch.zeros_like(layer)
    gradients = [sink.of_x(), of_vectors, *(found.get(name) for name in _LAYERS), sink.weight, sink.bias]
    return tuple(call.empty(0) if gradient is None else gradient for gradient in gradients)


_LAYERS = ("q", "q_bias", "q2", "q2_bias", "v", "v_bias")


def _add(found: dict[str, Tensor], name: str, part: Tensor) -> None:
    found[name] = found[name] + part if name in found else part


class _Backward:
    """The backward of scores and pooling over the rows: at once where both are linear in x, else slice by slice."""

    def __init__(self, call: _DSMIL, scores, bag, grad_bag, grad_scores, grad_lse, sink, found):
        self.call, self.sink, self.found = call, sink, found
        # Rows of x itself are read at once, not in slices, where neither a value nor a query is computed from them.
        self.at_once = call.embedding is None
        pooled = call.x if self.at_once and call.mlp and not call.computes_values else None
        weights = sink.needed or call.layered
        self.pool = PoolGradients(call, pooled, scores, bag, grad_bag, grad_scores, grad_lse, weights=weights)
        self.values = call.computes_values and grad_bag is not None

    def run(self) -> Tensor:
        """Returns the gradient of the queries' vectors [B, C, Q or L]; adds those of the rows and of the layers."""
        call = self.call
        if not call.mlp and not call.computes_values:
            return pool_by_products_backward(call, self.pool, call.vectors, self.sink)
        of_vectors = pool.Partials(call, self.pool.input_scores.shape[1], call.vectors.shape[2], softmax=False)
        for at in self.sink.slices(call.workspace(of_query=call.mlp, of_value=call.computes_values, gradient=True)):
            part = self._value(at) if call.computes_values else None
            if not call.computes_values and not self.at_once:
                self.pool.add(at.values, at.which)
            if call.mlp:
                part = self._query(at, of_vectors, part)
            elif not self.at_once:
                of_vectors.add(at.values, self.pool.scores, at.which, call.mask)
            weights = None if call.computes_values else self.pool.weights
            linear = (None, None) if call.mlp else (self.pool.scores, call.vectors)
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
        rows.expand(call, grad, self.pool.scores, call.vectors, rows=block)
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


# A few rows


def rows_at(x, indices, *embed):
    return Instances(x, None, None, *embed).gathered(indices).values.flatten(0, -2)


def add_rows_(grad_x, grad_e_weight, grad_e_bias, x, indices, grad_rows, *embed):
    indices = indices.contiguous()
    grad_rows = grad_rows.view(*indices.shape, grad_rows.shape[1])
    if not embed[0]:
        return rows.add_to_rows(indices, grad_rows, grad_x)
    call = Instances(x, None, None, *embed)
    _onto(call, grad_x, grad_e_weight, grad_e_bias).add_gathered(call.gathered(indices), grad_rows)


def logits_bwd_(grad_x, grad_e_weight, grad_e_bias, x, weights, offsets, mask, logits, *others):
    *embed, grad_logits = others
    call = Instances(x, offsets, mask, *embed)
    of_logits = zero_where_dead(call.to_acc(grad_logits), logits)
    sink = _onto(call, grad_x, grad_e_weight, grad_e_bias)
    return linear_gradients(call, weights[0], of_logits, None, True, sink)


def _onto(call: Instances, *gradients: Tensor) -> RowGradients:
    gradients = [g if g.numel() else None for g in gradients]
    return RowGradients(call, [g is not None for g in gradients], onto=gradients)


def few_linear(x, weight, bias, activation, scale):
    z = x @ weight.t()
    if bias is not None:
        z += bias
    if activation is not None:
        {"relu": torch.relu_, "tanh": torch.tanh_}[activation](z)
    return z if scale == 1 else z.mul_(scale)


def few_linear_bwd(grad, x, weight, out, activation, scale):
    if scale != 1:
        grad = grad * scale
    if activation == "relu":
        grad = grad.masked_fill(out <= 0, 0)
    elif activation == "tanh":
        grad = grad * (1 - out * out)
    return grad @ weight, grad.t() @ x, grad.sum(0)


def linear_of_bags(pooled, lse, weight, bias):
    bag = few_linear(pooled.flatten(0, 1), weight, bias, None, 1).view(*lse.shape, weight.shape[0])
    return bag.masked_fill_((lse == _DEAD)[..., None], 0)


def few_transposed(x, weight, bias):
    return x @ weight, x.new_zeros(x.shape[0]) if bias is None else x @ bias


def few_transposed_bwd(grad, grad_shift, x, weight, bias):
    of_x, of_weight = grad @ weight.t(), x.t() @ grad
    if bias is None or grad_shift is None:
        return of_x, of_weight, x.new_zeros(x.shape[1])
    return of_x.addcmul_(grad_shift[:, None], bias), of_weight, grad_shift @ x


few_winners_bwd = winner_gradients
