"""Attention and gated attention pooling (Ilse, Tomczak, Welling 2018) on slices of rows: the library writes the
products with V and U into a workspace, or where they are kept for the backward, kernels compute gates and scores from
them, and the pooling driver follows."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from milkernels.triton import fused, pool, rows, split, tuning
from milkernels.triton.common import activate, activation_gradient, apply_dropout, dropout_factors, kernel, sigmoid
from milkernels.triton.gradients import (
    PoolGradients,
    RowGradients,
    checked_inputs,
    finish,
    gradient_scale,
    in_their_types,
    weight_gradient,
)
from milkernels.triton.host import (
    Products,
    ceil_div,
    dropout_bits,
    dropout_of,
    launch,
    power_of_two,
    product_dtype,
    stacked,
)
from milkernels.triton.instances import Instances
from milkernels.triton.kept import Kept


@kernel
def gate_scores(
    Z, V_BIAS, U_BIAS, W, W_BIAS, MASK, SEED, OUT, first, last, D, threshold,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Writes to OUT [N, K] the scores of rows [first, last) from Z = x [V; U]^T, which holds these rows alone."""
    A: tl.constexpr = OUT.dtype.element_ty
    WIDE: tl.constexpr = 2 if GATED else 1
    r = tl.cast(first, tl.int64) + tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    out = tl.zeros([BN, BK], A)
    z_rows = Z + (r - first)[:, None] * (WIDE * D)
    for unit in tl.range(0, D, BD):
        d = unit + tl.arange(0, BD)
        inside = (r < last)[:, None] & (d < D)[None, :]
        gate = activate(_units(z_rows, V_BIAS, d, inside, D, A), ACTIVATION)
        if SEED is not None:
            gate = apply_dropout(gate, dropout_factors(SEED, r, unit, threshold, 0, BD, A))
        if GATED:
            u = sigmoid(_units(z_rows + D, U_BIAS, d, inside, D, A))
            if SEED is not None:
                u = u * dropout_factors(SEED, r, unit, threshold, 1, BD, A)
            gate = gate * u
        if K == 1:
            out += tl.sum(gate * tl.load(W + d, mask=d < D, other=0.0).to(A)[None, :], axis=1)[:, None]
        else:
            for j in tl.range(0, K):
                w = tl.load(W + j * D + d, mask=d < D, other=0.0).to(A)
                out += tl.where((k == j)[None, :], tl.sum(gate * w[None, :], axis=1)[:, None], 0.0)
    if W_BIAS is not None:
        out += tl.load(W_BIAS + k, mask=k < K, other=0.0).to(A)[None, :]
    if MASK is not None:
        real = tl.load(MASK + r, mask=r < last, other=0) != 0
        out = tl.where(real[:, None], out, float("-inf"))
    tl.store(OUT + r[:, None] * K + k[None, :], out, mask=(r < last)[:, None] & (k < K)[None, :])


@triton.jit
def _units(Z_ROWS, BIAS, d, inside, D, A: tl.constexpr):
    """Z + bias at units d, 0 outside."""
    z = tl.load(Z_ROWS + d[None, :], mask=inside, other=0.0).to(A)
    if BIAS is not None:
        z += tl.load(BIAS + d, mask=d < D, other=0.0).to(A)[None, :]
    return z


@kernel
def gate_backward(
    Z, V_BIAS, U_BIAS, W, DS, MASK, SEED, SCALE, OUT, SUMS, first, last, slot, per, D, threshold,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, WRITES: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of Z, times SCALE, to OUT, which may be Z, and to SUMS [slots, (K + 2) D + K], from `slot`
    on, what `per` rows each add to the gradients of w [K, D], the biases of V and U, and that of w. DS [N, K] is the
    gradient of the scores.

    A program sums J heads of w. Where there are more than that, those of all heads come from a launch that does not
    write, since registers do not hold them, and one of J = 0 writes."""
    A: tl.constexpr = SUMS.dtype.element_ty
    WIDE: tl.constexpr = 2 if GATED else 1
    unit = tl.program_id(1) * BD
    d = unit + tl.arange(0, BD)
    begin = tl.cast(first, tl.int64) + tl.program_id(0) * per
    heads = ()
    dw = ()
    dw_bias = ()
    for j in tl.static_range(J):
        # Past the last head the last one is summed once more.
        heads = heads + (tl.minimum(tl.program_id(2) * J + j, K - 1),)
        dw = dw + (tl.zeros([BD], A),)
        dw_bias = dw_bias + (tl.cast(0.0, A),)
    dv_bias = tl.zeros([BD], A)
    du_bias = tl.zeros([BD], A)
    grad_scale = tl.cast(1.0, A)
    if SCALE is not None:
        grad_scale = tl.load(SCALE)
    for row in tl.range(begin, tl.minimum(begin + per, last), BN):
        r = row + tl.arange(0, BN)
        inside = (r < last)[:, None] & (d < D)[None, :]
        of_rows = (r - first)[:, None] * (WIDE * D)
        z_rows = Z + of_rows
        v = _units(z_rows, V_BIAS, d, inside, D, A)
        t = activate(v, ACTIVATION)
        dt = activation_gradient(v, t, ACTIVATION)
        if SEED is not None:
            factor = dropout_factors(SEED, r, unit, threshold, 0, BD, A)
            t = apply_dropout(t, factor)
            dt = apply_dropout(dt, factor)
        gate = t
        if GATED:
            u = sigmoid(_units(z_rows + D, U_BIAS, d, inside, D, A))
            du = u * (1.0 - u)
            if SEED is not None:
                factor = dropout_factors(SEED, r, unit, threshold, 1, BD, A)
                u = u * factor
                du = du * factor
            gate = t * u
        real = inside
        if MASK is not None:
            real = inside & (tl.load(MASK + r, mask=r < last, other=0) != 0)[:, None]
            gate = tl.where(real, gate, 0.0)
        dgate = tl.zeros([BN, BD], A)
        summed = ()
        summed_bias = ()
        for j in tl.static_range(J):
            ds = tl.load(DS + r * K + heads[j], mask=r < last, other=0.0)
            if WRITES:
                dgate += ds[:, None] * tl.load(W + j * D + d, mask=d < D, other=0.0).to(A)[None, :]
            summed = summed + (dw[j] + tl.sum(gate * ds[:, None], axis=0),)
            summed_bias = summed_bias + (dw_bias[j] + tl.sum(ds, axis=0),)
        dw = summed
        dw_bias = summed_bias
        if WRITES:
            if J == 0:
                for j in tl.range(0, K):
                    ds = tl.load(DS + r * K + j, mask=r < last, other=0.0)
                    dgate += ds[:, None] * tl.load(W + j * D + d, mask=d < D, other=0.0).to(A)[None, :]
            if GATED:
                dz = tl.where(real, dgate * u * dt, 0.0)
                dz_u = tl.where(real, dgate * t * du, 0.0)
                du_bias += tl.sum(dz_u, axis=0)
                tl.store(OUT + of_rows + D + d[None, :], (dz_u * grad_scale).to(OUT.dtype.element_ty), mask=inside)
            else:
                dz = tl.where(real, dgate * dt, 0.0)
            dv_bias += tl.sum(dz, axis=0)
            tl.store(OUT + of_rows + d[None, :], (dz * grad_scale).to(OUT.dtype.element_ty), mask=inside)
    sums = SUMS + (slot + tl.program_id(0)).to(tl.int64) * ((K + 2) * D + K)
    for j in tl.static_range(J):
        tl.store(sums + heads[j] * D + d, dw[j], mask=d < D)
        tl.store(sums + (K + 2) * D + heads[j], dw_bias[j], mask=tl.program_id(1) == 0)
    if WRITES:
        tl.store(sums + K * D + d, dv_bias, mask=d < D)
        tl.store(sums + (K + 1) * D + d, du_bias, mask=d < D)


class _Attention(Instances):
    """A call with the parameters as kernels take them: ``w`` [K, D] and the biases are as given, the weight of the
    ``products`` [units, L] is V over U."""

    def __init__(self, x, parameters, offsets, mask, seed, activation, dropout_p, compute_dtype, *embed):
        super().__init__(x, offsets, mask, *embed)
        v_weight, v_bias, u_weight, u_bias, w_weight, w_bias = parameters
        self.gated, self.activation = u_weight is not None, activation
        self.type = product_dtype(self.dtype, compute_dtype)
        self.heads, self.hidden = w_weight.shape
        self.v_bias, self.u_bias, self.w, self.w_bias = (
            None if p is None else p.contiguous() for p in (v_bias, u_bias, w_weight, w_bias)
        )
        self.sum_at_most((self.heads + 2) * self.hidden + self.heads)
        self.dropout = dropout_of(seed, dropout_p)
        plan = tuning.plan(self.x.device, self.type, self.width, self.hidden)
        self.fused = plan.scores == "fused" and fused.serves(self)
        weights = [v_weight, u_weight] if self.gated else [v_weight]
        if self.fused:
            self.products = Products(weights, self.type, fused.prepared)
        else:
            self.products = split.products_of(weights, self.type, plan)
        self.kept = Kept(self.units, self.type)  # products with V and U

    @functools.cached_property  # every slice of rows uses it
    def bias(self) -> Tensor | None:
        """The biases of V and U as the persistent kernels take them: [units]."""
        given = (self.v_bias, self.u_bias) if self.gated else (self.v_bias,)
        if given == (None,) * len(given):
            return None
        return stacked([self.zeros(self.hidden) if b is None else b for b in given], self.acc)

    @property
    def weight(self) -> Tensor:
        return self.products.weight

    @property
    def units(self) -> int:
        """The rows of V and U."""
        return self.products.units

    def workspace(self) -> int | None:
        """The bytes of workspace per row in the forward; None where it needs none."""
        converted = self.width * self.type.itemsize if self.type != self.dtype else 0
        if self.fused:
            return converted or None
        return self.units * self.type.itemsize + converted + self.products.bytes_per_row

    def gradient_workspace(self, direct: bool, need_x: bool) -> int:
        """The bytes of workspace per row in the backward, beside what the embedding needs. ``direct`` says that
        products are written to the gradient of x."""
        size, embedded = self.type.itemsize, self.embedding is not None
        # The gradient of embedded rows is as wide as what their embedding counts.
        aside = self.width * self.acc.itemsize if need_x and not direct and not embedded else 0
        copied = (self.mask is not None and not embedded) or self.type != self.dtype
        return self.units * size + aside + self.products.bytes_per_row + (self.width * size if copied else 0)

    def scale(self, ds: Tensor) -> Tensor | None:
        """The factor for gradients of units in float16, from the gradient ``ds`` of scores; None in other types."""
        if self.type != torch.float16:
            return None
        return gradient_scale(self, ds, self.headroom(), self.w)

    def headroom(self) -> int:
        """Bits by which the gradient of a unit may exceed that of its score: those of dropout in each branch, and 6 for
        an activation without bound, which multiplies the gradient of the gate."""
        bits = dropout_bits(self.dropout[1])
        return bits * (2 if self.gated else 1) + (6 if self.gated and self.activation != "tanh" else 0)

    def options(self) -> dict:
        return {"GATED": self.gated, "ACTIVATION": self.activation}


def _scores(call: _Attention, partials: pool.Partials | None = None) -> Tensor:
    """Computes the scores [N, K], -inf for masked rows; adds the rows to ``partials`` slice by slice, if given."""
    out = call.empty(call.rows, call.heads)
    for block in call.slices(call.workspace()):
        values = call.rows_at(block).values
        # Written and read again, products cost a GPU less time than computed again.
        score = fused.scores if call.fused and call.kept.of(block) is None else _scores_of_slice
        score(call, rows.operand(call, values, block, call.type, clean=False), block, out)
        if partials is not None:
            partials.add(values, out, block, call.mask)
        values = None  # freed before the next slice comes
    return out


def _scores_of_slice(call: _Attention, x: Tensor, block: slice, out: Tensor) -> None:
    """Writes the scores of a slice, whose rows x [n, L] holds, into ``out`` [N, K]."""
    seed, threshold = call.dropout
    units, count = min(max(power_of_two(call.hidden), 16), 64), 32 if seed is None else 16
    launch(
        gate_scores, (ceil_div(block.stop - block.start, count),),
        call.products.forward(call.products.parts(x), out=call.kept.of(block)),
        call.v_bias, call.u_bias, call.w, call.w_bias, call.mask, seed, out, block.start, block.stop,
        call.hidden, threshold, BN=count, BD=units, K=call.heads, BK=power_of_two(call.heads), num_warps=4,
        **call.options(),
    )  # fmt: skip


def attention_pool_fwd(x, weights, offsets, mask, *others):
    *options, saved_bytes = others
    call = _Attention(x, weights, offsets, mask, *options)
    kept = call.keep_up_to(saved_bytes, call.kept)
    partials = pool.Partials(call, call.heads, call.width)
    if call.embedding is None:
        scores = _scores(call)
        partials.add(call.x, scores, mask=call.mask)
    else:
        scores = _scores(call, partials)
    bag, lse = partials.result()
    return bag, scores, lse, kept


def attention_scores_fwd(x, weights, offsets, mask, *others):
    *options, saved_bytes = others
    call = _Attention(x, weights, offsets, mask, *options)
    kept = call.keep_up_to(saved_bytes, call.kept)
    return _scores(call), kept


def attention_bwd(
    x, weights, offsets, mask, seed, bag, scores, lse, embed, kept, activation, dropout_p, compute_dtype,
    embed_activation, embed_dropout_p, embed_dtype, grad_bag, grad_scores, grad_lse, needs,
):  # fmt: skip
    inputs = checked_inputs(needs, "v_weight v_bias u_weight u_bias w_weight w_bias", x, weights, embed)
    embed = (embed, embed_activation, embed_dropout_p, embed_dtype)
    call = _Attention(x, weights, offsets, mask, seed, activation, dropout_p, compute_dtype, *embed)
    call.keep(kept, call.kept, filled=True)
    embedded, sink = call.embedding is not None, RowGradients(call, needs)
    pooled = None if embedded else call.x
    gradients = PoolGradients(call, pooled, scores, bag, grad_bag, grad_scores, grad_lse, weights=sink.needed)
    ds, D, K = gradients.scores, call.hidden, call.heads

    need_weight = needs[1] or needs[3]
    grad_weight, sums = None, call.sums((K + 2) * D + K)
    scale = None if embedded else call.scale(ds)
    sink.pooled(call.type, gradients.weights, gradients.bag_of(gradients.weights))
    for at in sink.slices(call.gradient_workspace(sink.direct, needs[0])) if any(needs) else ():
        block = at.which
        if embedded:
            gradients.add(at.values, block)
            scale = call.scale(ds[block])
        x_rows = rows.operand(call, at.values, block, call.type, clean=not embedded)
        x_parts = call.products.parts(x_rows)
        recomputes = call.fused and call.kept.of(block) is None
        gradients_of_products = fused.gradients_of_products if recomputes else _gradients_of_products
        z = call.products.parts(gradients_of_products(call, x_rows, x_parts, block, ds, scale, sums))
        if need_weight:  # a scale of all slices is taken out at the end
            grad_weight = weight_gradient(call.products, z, x_parts, scale if embedded else None, grad_weight)
        sink.add_product(at, call.products, z, scale)
        at = x_rows = x_parts = z = None  # freed before the next slice comes
    found = [
        p.new_empty(p.shape) if p is not None and need else None for p, need in zip(weights, needs[1:7], strict=True)
    ]
    if grad_weight is None and need_weight:
        grad_weight = call.zeros(call.units, call.width)
    of_v, v_bias, of_u, u_bias, of_w, w_bias = found
    vectors = [(K * D, of_w), (D, v_bias), (D, u_bias), (K, w_bias)]
    finish(call, grad_weight, None if embedded else scale, [of_v, of_u], sums, vectors)
    return in_their_types(call, inputs, (sink.x, *found, *sink.of_embedding()), needs)


_HEADS = 8  # of which one program sums the gradients of w


def _gradients_of_products(call: _Attention, x: Tensor, parts, block: slice, ds: Tensor, scale, sums: Tensor) -> Tensor:
    """The gradient of ``x [V; U]^T`` [n, units] times the scale, for a slice, whose rows x [n, L] holds and ``parts``
    as products take them. Adds to ``sums`` what `gate_backward` sums."""
    kept = call.kept.of(block)
    products = call.products.forward(parts) if kept is None else kept
    z = products if kept is None else torch.empty_like(kept)
    D, K = call.hidden, call.heads
    units = min(max(power_of_two(D), 16), 64)
    programs, slot = ceil_div(block.stop - block.start, call.summed), block.start // call.summed
    groups = ceil_div(K, _HEADS)
    seed, threshold = call.dropout
    launches = [(True, K, 1)] if groups == 1 else [(False, ceil_div(K, groups), groups), (True, 0, 1)]
    for writes, heads, groups in launches:
        launch(
            gate_backward, (programs, ceil_div(D, units), groups),
            products, call.v_bias, call.u_bias, call.w, ds, call.mask, seed, scale, z, sums,
            block.start, block.stop, slot, call.summed, D, threshold,
            WRITES=writes, BN=16, BD=units, K=K, J=heads, num_warps=4, **call.options(),
        )  # fmt: skip
    return z
