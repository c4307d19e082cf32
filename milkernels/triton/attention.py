"""Attention and gated attention pooling (Ilse, Tomczak, Welling 2018) on chunks of rows: the library's products with V
and U into a workspace, kernels for gate and score behind them, then the pooling driver."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from milkernels.triton import fused, pool, rows, split, tuning
from milkernels.triton.call import Call, Products, ceil_div, launch, power_of_two, product_dtype
from milkernels.triton.common import activate, activation_gradient, dropout_factors, kept, kernel, sigmoid
from milkernels.triton.gradients import PoolGradients, in_their_types, largest, power_of_two_scale


@kernel
def gate_scores(
    Z, BIAS, W, W_BIAS, MASK, SEED, OUT, first, last, D, threshold,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scores of rows [first, last) from Z = x [V; U]^T, which begins at row `first`; BIAS is that of V, then of U."""
    A: tl.constexpr = OUT.dtype.element_ty
    WIDE: tl.constexpr = 2 if GATED else 1
    r = tl.cast(first, tl.int64) + tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    out = tl.zeros([BN, BK], A)
    z_rows = Z + (r - first)[:, None] * (WIDE * D)
    for unit in tl.range(0, D, BD):
        d = unit + tl.arange(0, BD)
        inside = (r < last)[:, None] & (d < D)[None, :]
        gate = activate(_units(z_rows, BIAS, d, inside, D, A), ACTIVATION)
        if SEED is not None:
            gate = kept(gate, dropout_factors(SEED, r, unit, threshold, 0, BD, A))
        if GATED:
            u = sigmoid(_units(z_rows + D, None if BIAS is None else BIAS + D, d, inside, D, A))
            if SEED is not None:
                u = u * dropout_factors(SEED, r, unit, threshold, 1, BD, A)
            gate = gate * u
        for j in tl.static_range(K):
            w = tl.load(W + j * D + d, mask=d < D, other=0.0)
            score = tl.sum(gate * w[None, :], axis=1)
            if K == 1:
                out += score[:, None]
            else:
                out += tl.where((k == j)[None, :], score[:, None], 0.0)
    if W_BIAS is not None:
        out += tl.load(W_BIAS + k, mask=k < K, other=0.0)[None, :]
    if MASK is not None:
        real = tl.load(MASK + r, mask=r < last, other=0) != 0
        out = tl.where(real[:, None], out, float("-inf"))
    tl.store(OUT + r[:, None] * K + k[None, :], out, mask=(r < last)[:, None] & (k < K)[None, :])


@triton.jit
def _units(Z_ROWS, BIAS, d, inside, D, A: tl.constexpr):
    z = tl.load(Z_ROWS + d[None, :], mask=inside, other=0.0).to(A)
    if BIAS is not None:
        z += tl.load(BIAS + d, mask=d < D, other=0.0)[None, :]
    return z


@kernel
def gate_backward(
    Z, BIAS, W, DS, MASK, SEED, SCALE, SUMS, first, last, D, threshold,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of Z, times SCALE, over Z, and into SUMS [programs, K + 2, D] what these rows add to the
    gradients of w (K rows) and of the biases of V and U. DS: gradients of the scores, [N, K]."""
    A: tl.constexpr = SUMS.dtype.element_ty
    WIDE: tl.constexpr = 2 if GATED else 1
    unit = tl.program_id(1) * BD
    d = unit + tl.arange(0, BD)
    begin = tl.cast(first, tl.int64) + tl.program_id(0) * ROWS
    dw = ()
    for _j in tl.static_range(K):
        dw = dw + (tl.zeros([BD], A),)
    dv_bias = tl.zeros([BD], A)
    du_bias = tl.zeros([BD], A)
    grad_scale = tl.cast(1.0, A)
    if SCALE is not None:
        grad_scale = tl.load(SCALE)
    for row in tl.range(begin, tl.minimum(begin + ROWS, last), BN):
        r = row + tl.arange(0, BN)
        inside = (r < last)[:, None] & (d < D)[None, :]
        z_rows = Z + (r - first)[:, None] * (WIDE * D)
        v = _units(z_rows, BIAS, d, inside, D, A)
        t = activate(v, ACTIVATION)
        dt = activation_gradient(v, t, ACTIVATION)
        if SEED is not None:
            factor = dropout_factors(SEED, r, unit, threshold, 0, BD, A)
            t = kept(t, factor)
            dt = kept(dt, factor)
        gate = t
        if GATED:
            u = sigmoid(_units(z_rows + D, None if BIAS is None else BIAS + D, d, inside, D, A))
            du = u * (1.0 - u)
            if SEED is not None:
                factor = dropout_factors(SEED, r, unit, threshold, 1, BD, A)
                u = u * factor
                du = du * factor
            gate = t * u
        alive = inside
        if MASK is not None:
            alive = inside & (tl.load(MASK + r, mask=r < last, other=0) != 0)[:, None]
            gate = tl.where(alive, gate, 0.0)
        dgate = tl.zeros([BN, BD], A)
        added = ()
        for j in tl.static_range(K):
            ds = tl.load(DS + r * K + j, mask=r < last, other=0.0)
            w = tl.load(W + j * D + d, mask=d < D, other=0.0)
            dgate += ds[:, None] * w[None, :]
            added = added + (dw[j] + tl.sum(gate * ds[:, None], axis=0),)
        dw = added
        if GATED:
            dz = tl.where(alive, dgate * u * dt, 0.0)
            dz_u = tl.where(alive, dgate * t * du, 0.0)
            du_bias += tl.sum(dz_u, axis=0)
            tl.store(z_rows + D + d[None, :], (dz_u * grad_scale).to(Z.dtype.element_ty), mask=inside)
        else:
            dz = tl.where(alive, dgate * dt, 0.0)
        dv_bias += tl.sum(dz, axis=0)
        tl.store(z_rows + d[None, :], (dz * grad_scale).to(Z.dtype.element_ty), mask=inside)
    sums = SUMS + tl.program_id(0) * ((K + 2) * D) + d
    for j in tl.static_range(K):
        tl.store(sums + j * D, dw[j], mask=d < D)
    tl.store(sums + K * D, dv_bias, mask=d < D)
    tl.store(sums + (K + 1) * D, du_bias, mask=d < D)


class _Attention(Call):
    """The parameters as kernels take them: V over U in the type of products, the rest in that of accumulation."""

    def __init__(self, x, parameters, offsets, mask, seed, activation, dropout_p, compute_dtype):
        super().__init__(x, offsets, mask)
        v_weight, v_bias, u_weight, u_bias, w_weight, w_bias = parameters
        self.gated, self.activation = u_weight is not None, activation
        self.type = product_dtype(x, compute_dtype)
        weights = [v_weight, u_weight] if self.gated else [v_weight]
        self.weight = torch.cat([w.to(self.type) for w in weights]) if self.gated else v_weight.to(self.type)
        self.weight = self.weight.contiguous()
        self.heads, self.hidden = w_weight.shape
        self.w, self.w_bias = self.take(w_weight), self.take(w_bias)
        self.bias = None
        if v_bias is not None or u_bias is not None:
            none = self.zeros(self.hidden)
            biases = [v_bias, u_bias] if self.gated else [v_bias]
            self.bias = torch.cat([none if b is None else b.to(self.acc) for b in biases])
        self.dropout = dropout_of(seed, dropout_p)
        plan = tuning.plan(self.x.device, self.type, self.width, self.hidden)
        self.fused = plan.scores == "fused" and fused.serves(self)
        if self.fused:
            self.weight = fused.prepared(self.weight)
        by_parts = plan.products == "split" and split.serves(self.type) and not self.fused
        self.products = split.SplitProducts(self.weight) if by_parts else Products(self.weight)

    @property
    def units(self) -> int:
        return self.weight.shape[0]

    def rows_of(self, block: slice, workspace: bool) -> Tensor:
        """The slice of x for products; a copy where its type is another, or masked rows may hold anything."""
        if workspace or self.x.dtype != self.type:
            return rows.staged(self, self.x[block], block, self.type)
        return self.x[block]

    def headroom(self) -> int:
        """Bits by which a unit's gradient may exceed its score's: factors of dropout, and what a gate multiplies."""
        share = max((1 << 16) - self.dropout[1], 1)  # that is kept
        factor = 17 - share.bit_length()
        return factor * (2 if self.gated else 1) + (6 if self.gated and self.activation != "tanh" else 0)

    def options(self) -> dict:
        return {"GATED": self.gated, "ACTIVATION": self.activation}


def dropout_of(seed: Tensor | None, p: float) -> tuple[Tensor | None, int]:
    """``(seed, threshold)``: a unit is dropped if its 16 bits are below the threshold; no seed, no dropout."""
    threshold = int(p * 65536 + 0.5)
    return (None, 0) if seed is None or threshold == 0 else (seed, threshold)


def _scores(call: _Attention) -> Tensor:
    if call.fused:
        return fused.scores(call)
    out = call.empty(call.rows, call.heads)
    heads = power_of_two(call.heads)
    seed, threshold = call.dropout
    units = min(max(power_of_two(call.hidden), 16), 64)
    size = torch.finfo(call.type).bits // 8
    converted = call.width * size if call.type != call.x.dtype else 0
    for block in call.blocks(call.units * size + converted + call.products.bytes_per_row):
        z = call.products.forward(call.rows_of(block, False))
        launch(
            gate_scores, (ceil_div(block.stop - block.start, 32),),
            z, call.bias, call.w, call.w_bias, call.mask, seed, out, block.start, block.stop, call.hidden,
            threshold, BN=32, BD=units, K=call.heads, BK=heads, num_warps=4, **call.options(),
        )  # fmt: skip
    return out


def attention_pool_fwd(x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, *options):
    call = _Attention(x, (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias), offsets, mask, *options)
    scores = _scores(call)
    bag, lse = pool.softmax_pool(call, call.x, scores)
    return bag, scores, lse


def attention_scores_fwd(x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, *options):
    call = _Attention(x, (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias), offsets, mask, *options)
    return _scores(call)


def attention_bwd(
    x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, mask, seed, bag, scores, lse, activation,
    dropout_p, compute_dtype, grad_bag, grad_scores, grad_lse, needs,
):  # fmt: skip
    parameters = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    call = _Attention(x, parameters, offsets, mask, seed, activation, dropout_p, compute_dtype)
    gradients = PoolGradients(call, call.x, scores, bag, grad_bag, grad_scores, grad_lse, weights=needs[0])
    ds, D, K = gradients.scores, call.hidden, call.heads

    grad_x = call.x.new_empty(call.x.shape) if needs[0] else None
    need_weight = needs[1] or needs[3]
    grad_weight = call.zeros(call.units, call.width) if need_weight else None
    pooled = gradients.weights, gradients.bag_of(gradients.weights)
    sums = call.zeros(K + 2, D)
    scale = None
    if call.type == torch.float16:
        bound = largest(ds) * call.w.abs().nan_to_num(0, 0, 0).sum(0).amax()
        scale = power_of_two_scale(bound, call.headroom())
    size = torch.finfo(call.type).bits // 8
    # Products that need neither another type nor a scale are written where the gradient of x will be.
    direct = needs[0] and call.type == call.x.dtype and scale is None
    aside = call.width * call.acc.itemsize if needs[0] and not direct else 0
    per_row = call.units * size + aside + call.products.bytes_per_row
    copied = call.mask is not None or call.type != call.x.dtype
    for block in call.blocks(per_row + (call.width * size if copied else 0)) if any(needs) else ():
        x_rows = call.rows_of(block, call.mask is not None)
        gradients_of_products = fused.gradients_of_products if call.fused else _gradients_of_products
        z, part = gradients_of_products(call, x_rows, block, ds, scale)
        sums += part.sum(0)
        if need_weight:
            grad_weight += call.products.of_weight(z, x_rows)
        if direct:
            call.products.of_rows(z, grad_x[block])
        elif needs[0]:
            inverse = None if scale is None else 1 / scale
            rows.expand(call, grad_x, *pooled, product=call.products.of_rows(z), scale=inverse, rows=block)
        x_rows = z = None  # before those of the next block
    if direct and gradients.weights is not None:
        rows.expand(call, grad_x, *pooled, product=grad_x)
    if need_weight and scale is not None:
        grad_weight /= scale
    found = (
        grad_x,
        None if grad_weight is None else grad_weight[:D],
        sums[K],
        None if grad_weight is None else grad_weight[D:],
        sums[K + 1],
        sums[:K],
        ds.sum(0),
    )
    return in_their_types(call, (x, *parameters), found, needs)


_SUMMED_ROWS = 64  # by one program of gate_backward


def _gradients_of_products(call: _Attention, x: Tensor, block: slice, ds: Tensor, scale: Tensor | None):
    """``(z, sums)`` of a block, whose rows x holds: the gradient of ``x [V; U]^T`` [rows, units], times the scale, and
    what programs add to the gradients of w and of the biases [programs, K + 2, D]."""
    z = call.products.forward(x)
    D, K = call.hidden, call.heads
    units = min(max(power_of_two(D), 16), 64)
    programs = ceil_div(block.stop - block.start, _SUMMED_ROWS)
    sums = call.empty(programs, K + 2, D)
    seed, threshold = call.dropout
    launch(
        gate_backward, (programs, ceil_div(D, units)),
        z, call.bias, call.w, ds, call.mask, seed, scale, sums, block.start, block.stop, D, threshold,
        ROWS=_SUMMED_ROWS, BN=16, BD=units, K=K, num_warps=4, **call.options(),
    )  # fmt: skip
    return z, sums
