"""What Triton does for DSMIL (Li, Li, Eliceiri 2021): the passes of its second stream over the rows, and what touches a
few of them. `milkernels.ops.dsmil_kernels` composes the ops of these.

An MLP query and a value with an activation or dropout are computed on slices of rows, as an embedding in front of
everything is; what of these is not kept, again in the backward.
"""

import torch
from torch import Tensor

from milkernels.triton import pool, rows
from milkernels.triton.choice import largest_logits, winner_gradients
from milkernels.triton.gradients import LayerGradients, PoolGradients, RowGradients, zero_where_dead
from milkernels.triton.host import dropout_of, product_dtype
from milkernels.triton.instances import Instances, Layer, Rows
from milkernels.triton.pooling import linear_gradients, pool_by_products, pool_by_products_backward

_DEAD = float("-inf")


class _DSMIL(Instances):
    """A call with the layers that rows go through: those of an MLP query, whose width is Q, and that of a value. A
    score is ``<row, vectors[b, c]> + shift[b, c]``, where a row is an instance [L], or its query [Q] where there is an
    MLP; -inf for a class without a critical instance."""

    def __init__(
        self, x, vectors, shift, critical, layers, offsets, mask, seed, v_activation, v_dropout_p, dtype, *embed
    ):
        super().__init__(x, offsets, mask, *embed)
        self.vectors, self.dead = self.to_acc(vectors).contiguous(), critical < 0
        shift = self.zeros(*critical.shape) if shift is None else self.to_acc(shift)
        self.shift = shift.masked_fill(self.dead, _DEAD)
        self.type = product_dtype(self.dtype, dtype)
        self.dropout = dropout_of(seed, v_dropout_p)
        q, q_bias, q2, q2_bias, v, v_bias = layers
        self.q = self.q2 = self.v = None
        self.mlp, self.layered = q2 is not None, v is not None
        if self.mlp:
            self.q = Layer(q, q_bias, "relu", self.type, self.acc)
            self.q2 = Layer(q2, q2_bias, "tanh", self.type, self.acc, rounded=False)
        if self.layered:
            self.v = Layer(v, v_bias, v_activation or "identity", self.type, self.acc, rounded=False)
        self.hidden = [layer.kept for layer in (self.q, self.q2, self.v) if layer is not None]
        # Whether what is pooled is computed from the instances on slices of rows.
        self.computes_values = self.layered or self.dropout[0] is not None

    @property
    def pooled_width(self) -> int:
        return self.v.width if self.layered else self.width

    def workspace(self, *, gradient: bool, direct: bool = False) -> int:
        """The bytes of workspace per row: activations of the value and then of the query, and their gradients.
        ``direct`` says that products are written to the gradient of x."""
        size, acc = self.type.itemsize, self.acc.itemsize
        copied = self.type != self.dtype or (gradient and self.mask is not None and self.embedding is None)

        def of(layers) -> int:
            return sum(layer.bytes_per_row() + gradient * layer.gradient_bytes_per_row() for layer in layers if layer)

        value = (
            self.width * size * (copied or self.dropout[0] is not None) + of([self.v]) if self.computes_values else 0
        )
        query = self.width * size * copied + of([self.q, self.q2]) if self.mlp else 0
        if gradient:
            query += self.width * acc * (self.computes_values + self.mlp * (not direct))
        return max(value, query, 1)

    def operand(self, x: Tensor, block: slice, *, clean: bool) -> Tensor:
        return rows.operand(self, x, block, self.type, clean=clean and self.embedding is None)

    def value_rows(self, x: Tensor, block: slice, *, gradient: bool) -> Rows:
        """What is pooled of the slice's rows, which ``x`` [n, L] holds: [n, pooled_width]; and what its ``gradient``
        needs."""
        if self.dropout[0] is not None:
            x = rows.copied(self, x, block, self.type if self.layered else self.dtype, dropout=self.dropout)
        elif self.layered:
            x = self.operand(x, block, clean=gradient)
        return self.v.rows(self, x, block, gradient=gradient) if self.layered else Rows(block, x)


def keep(x, size):
    return x.new_empty(size, dtype=torch.uint8)


def dsmil_logits_fwd(x, weights, offsets, mask, *others):
    *embed, kept = others
    call = Instances(x, offsets, mask, *embed)
    call.keep(kept, filled=False)
    return largest_logits(call, *weights)


def dsmil_rows_fwd(x, *others):
    *others, kept, has_rows = others
    call = _DSMIL(x, *others)
    call.keep(kept, *call.hidden, filled=False, has_rows=has_rows)
    C = call.vectors.shape[1]
    if not call.mlp and not call.computes_values:
        return pool_by_products(call, call.vectors, call.shift)
    scores = call.empty(call.rows, C)
    if not call.mlp and call.embedding is None:
        rows.products(call, call.x, call.vectors, shift=call.shift, fill=_DEAD, out=scores)
    partials = pool.Partials(call, C, call.pooled_width)
    for block in call.slices(call.workspace(gradient=False)):
        values = scored = call.rows_at(block).values
        if call.mlp:
            hidden = call.q.rows(call, call.operand(values, block, clean=False), block, gradient=False).values
            scored = call.q2.rows(call, hidden, block, gradient=False).values
        if call.mlp or call.embedding is not None:
            rows.products(call, scored, call.vectors, shift=call.shift, fill=_DEAD, rows=block, out=scores)
        pooled = call.value_rows(values, block, gradient=False).values if call.computes_values else values
        partials.add(pooled, scores, block, call.mask)
        values = scored = hidden = pooled = None  # freed before the next slice comes
    bag, lse = partials.result()
    return bag, scores, lse


def dsmil_rows_bwd(
    x, vectors, shift, critical, layers, offsets, mask, seed, v_activation, v_dropout_p, compute_dtype,
    embed, embed_activation, embed_dropout_p, embed_dtype, kept,
    bag, scores, lse, grad_bag, grad_scores, grad_lse, needs,
):  # fmt: skip
    embed = (embed, embed_activation, embed_dropout_p, embed_dtype)
    of_rows = (offsets, mask, seed, v_activation, v_dropout_p, compute_dtype)
    call = _DSMIL(x, vectors, shift, critical, layers, *of_rows, *embed)
    call.keep(kept, *call.hidden, filled=True)
    sink = RowGradients(call, needs)
    backward = _Backward(call, scores, bag, grad_bag, grad_scores, grad_lse, sink)
    of_vectors = backward.run()
    of_vectors = of_vectors.masked_fill(call.dead[..., None], 0)  # a class that pools nothing may have summed 0 * NaN
    found = [sink.of_x(), of_vectors]
    for layer in (backward.q, backward.q2, backward.v):
        found += [None, None] if layer is None else layer.found(call.acc)
    found += sink.of_embedding(call.acc)
    return tuple(call.empty(0) if gradient is None else gradient for gradient in found)


class _Backward:
    """The backward of scores and pooling over the rows: at once where both are linear in x, else slice by slice."""

    def __init__(self, call: _DSMIL, scores, bag, grad_bag, grad_scores, grad_lse, sink):
        self.call, self.sink = call, sink
        self.q, self.q2, self.v = (layer and LayerGradients(call, layer) for layer in (call.q, call.q2, call.v))
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
        if not call.computes_values:
            self.sink.pooled(call.type, self.pool.weights, self.pool.bag_of(self.pool.weights))
        for at in self.sink.slices(call.workspace(gradient=True, direct=self.sink.direct)):
            part = self._value(at) if call.computes_values else None
            if not call.computes_values and not self.at_once:
                self.pool.add(at.values, at.which)
            if call.mlp:
                self._query(at, of_vectors, part)
            else:
                if not self.at_once:
                    of_vectors.add(at.values, self.pool.scores, at.which, call.mask)
                weights = None if call.computes_values else self.pool.weights
                self.sink.add(at, weights, self.pool.bag_of(weights), self.pool.scores, call.vectors, product=part)
            at = part = None  # freed before the next slice comes
        if not call.mlp and self.at_once:
            of_vectors.add(call.x, self.pool.scores, mask=call.mask)
        return of_vectors.result()[0]

    def _value(self, at: Rows) -> Tensor | None:
        """Goes back through the value of a slice: adds its parameters' gradients and returns that of the rows [n, L],
        or None where it is not needed."""
        call, block = self.call, at.which
        value = call.value_rows(at.values, block, gradient=True)
        self.pool.add(value.values, block)
        if not self.values:
            return None
        grad = call.empty(block.stop - block.start, call.pooled_width)
        rows.expand(call, grad, self.pool.weights, self.pool.bag, rows=block)
        if call.layered:
            z, scale = self.v.through(value, grad)
            value = grad = None
            grad = _of_input(self.v, z, scale) if self.sink.needed else None
        if self.sink.needed and call.dropout[0] is not None:
            rows.copied(call, grad, block, call.acc, dropout=call.dropout, out=grad)
        return grad

    def _query(self, at: Rows, of_vectors: pool.Partials, of_value: Tensor | None) -> None:
        """Goes back through the MLP query of a slice likewise; adds the gradient of the rows, of which ``of_value`` is
        the part of the value."""
        call, block = self.call, at.which
        hidden = call.q.rows(call, call.operand(at.values, block, clean=True), block, gradient=True)
        query = call.q2.rows(call, hidden.values, block, gradient=True)
        of_vectors.add(query.values, self.pool.scores, block, call.mask)
        grad = call.empty(block.stop - block.start, call.q2.width)
        rows.expand(call, grad, self.pool.scores, call.vectors, rows=block)
        grad = _of_input(self.q2, *self.q2.through(query, grad))
        z, scale = self.q.through(hidden, grad)
        if of_value is None:
            self.sink.add_product(at, call.q.products, z, scale)
        elif self.sink.needed:
            self.sink.add(at, None, None, product=_of_input(self.q, z, scale).add_(of_value))


def _of_input(layer: LayerGradients, z, scale: Tensor | None) -> Tensor:
    """The gradient of what a layer takes [n, L], from what `LayerGradients.through` returns."""
    of_input = layer.layer.products.rows_gradient(z)
    return of_input if scale is None else of_input.div_(scale)


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
    *embed, kept, grad_logits = others
    call = Instances(x, offsets, mask, *embed)
    call.keep(kept, filled=True)
    of_logits = zero_where_dead(call.to_acc(grad_logits), logits)
    sink = _onto(call, grad_x, grad_e_weight, grad_e_bias)
    return linear_gradients(call, weights[0], of_logits, None, True, sink)


def _onto(call: Instances, *gradients: Tensor) -> RowGradients:
    gradients = [g if g.numel() else None for g in gradients]
    return RowGradients(call, [g is not None for g in gradients], onto=gradients)


def few_linear(x, weight, bias, activation, scale):
    z = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
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
