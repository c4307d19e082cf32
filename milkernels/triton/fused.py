"""Attention scores and their backward whose kernels compute gates where the products are: no workspace of [rows,
hidden] in the forward, one write of it in the backward. ``tuning`` says which calls come here.

Tiles are read through tensor descriptors (TMA) where the device has them and the layout allows it, else by pointers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from milkernels.triton import tuning
from milkernels.triton.common import activate, activation_gradient, apply_dropout, dropout_factors, kernel
from milkernels.triton.host import ceil_div, launch, power_of_two

_MOST_HEADS = 8  # the sums over hidden units are unrolled over the heads

# FAST stands for the approximate exp2 and reciprocal of NVIDIA's special function units (relative errors of 2^-22 and
# 2^-23, flushing subnormals): as good as float32 needs behind products of half types or of tf32.


@triton.jit
def _exp2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _decay(x, rate: tl.constexpr, least: tl.constexpr, FAST: tl.constexpr):
    """exp(-rate x), bounded so that products stay finite: below `least` tanh and sigmoid have come to their limits."""
    return _exp2(tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL) * (-1.4426950408889634 * rate), FAST)


@triton.jit
def _gate(v, u, GATED: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """act(v) sigmoid(u), or act(v) alone; one reciprocal serves both."""
    if ACTIVATION == "tanh":
        a = _decay(v, 2.0, -15.0, FAST)
        if GATED:
            return (1.0 - a) * _reciprocal((1.0 + a) * (1.0 + _decay(u, 1.0, -40.0, FAST)), FAST)
        else:
            return (1.0 - a) * _reciprocal(1.0 + a, FAST)
    elif GATED:
        return activate(v, ACTIVATION) * _reciprocal(1.0 + _decay(u, 1.0, -40.0, FAST), FAST)
    else:
        return activate(v, ACTIVATION)


@triton.jit
def _branches(v, u, GATED: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """act(v) and sigmoid(u); u is returned as it is where there is no gate."""
    if ACTIVATION == "tanh":
        a = _decay(v, 2.0, -15.0, FAST)
        if GATED:
            b = _decay(u, 1.0, -40.0, FAST)
            r = _reciprocal((1.0 + a) * (1.0 + b), FAST)
            return (1.0 - a) * (1.0 + b) * r, (1.0 + a) * r
        else:
            return (1.0 - a) * _reciprocal(1.0 + a, FAST), u
    elif GATED:
        return activate(v, ACTIVATION), _reciprocal(1.0 + _decay(u, 1.0, -40.0, FAST), FAST)
    else:
        return activate(v, ACTIVATION), u


@triton.jit
def _factors(SEED, instance, unit, threshold, GATED: tl.constexpr, BD: tl.constexpr):
    """The factors by which dropout scales the product of both branches, and so its gradients: [rows, BD]."""
    factors = dropout_factors(SEED, instance, unit, threshold, 0, BD, tl.float32)
    if GATED:
        factors = factors * dropout_factors(SEED, instance, unit, threshold, 1, BD, tl.float32)
    return factors


@triton.jit
def _row_tile(
    X, row, column, count, L, x_stride, TMA: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr
):
    """A tile [BN, BL] of X. Past the last row it holds anything, past the last column 0."""
    if TMA:
        return X.load([row, column])
    else:
        r = tl.minimum(row + tl.arange(0, BN), count - 1).to(tl.int64)
        c = column + tl.arange(0, BL)
        at = X + r[:, None] * x_stride + c[None, :]
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=(c < L)[None, :], other=0.0)


@triton.jit
def _unit_rows(WEIGHT, rows, column, L, EVEN: tl.constexpr, BL: tl.constexpr):
    """A tile [rows, BL] of the weight, 0 past the last column."""
    c = column + tl.arange(0, BL)
    at = WEIGHT + rows.to(tl.int64)[:, None] * L + c[None, :]
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(c < L)[None, :], other=0.0)


@kernel
def score_tiles(
    X, WEIGHT, BIAS, W, W_BIAS, MASK, SEED, OUT, first, count, L, D, x_stride, threshold,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Writes to OUT [chunks, count, K] what a chunk of BD units adds to the scores of `count` rows from `first` on,
    which X holds. WEIGHT is V over U. A program goes through tiles; those of the same rows are neighbours, to meet in
    L2."""
    tl.assume(L > 0)  # else ptxas may serialise the products, for the sake of no product at all
    WIDE: tl.constexpr = 2 if GATED else 1
    chunks = tl.cdiv(D, BD)
    k = tl.arange(0, BK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, BN) * chunks, tl.num_programs(0)):
        chunk = tile % chunks
        row = (tile // chunks) * BN
        unit = chunk * BD
        acc = tl.zeros([BN, WIDE * BD], tl.float32)
        for column in tl.range(0, L, BL):
            x = _row_tile(X, row, column, count, L, x_stride, TMA, EVEN, BN, BL)
            if TMA:
                weight = tl.reshape(WEIGHT.load([0, unit, column]), [WIDE * BD, BL])
            else:
                j = tl.arange(0, WIDE * BD)
                weight = _unit_rows(WEIGHT, (j // BD) * D + tl.minimum(unit + j % BD, D - 1), column, L, EVEN, BL)
            acc = tl.dot(x, weight.T, acc, input_precision=PRECISION)
        v = acc
        u = acc
        if GATED:
            v, u = _halves(acc)
        r = row + tl.arange(0, BN)
        instance = tl.cast(first, tl.int64) + r
        d = unit + tl.arange(0, BD)
        if BIAS is not None:
            v += tl.load(BIAS + d, mask=d < D, other=0.0)[None, :]
            if GATED:
                u += tl.load(BIAS + D + d, mask=d < D, other=0.0)[None, :]
        gate = _gate(v, u, GATED, ACTIVATION, FAST)
        if SEED is not None:
            gate = apply_dropout(gate, _factors(SEED, instance, unit, threshold, GATED, BD))
        # Past the last unit the tile holds those of U or anything: they may not be finite, so they are selected away.
        gate = tl.where((d < D)[None, :], gate, 0.0)
        score = tl.zeros([BN, BK], tl.float32)
        for j in tl.static_range(K):
            of_head = tl.sum(gate * tl.load(W + j * D + d, mask=d < D, other=0.0)[None, :], axis=1)
            if K == 1:
                score += of_head[:, None]
            else:
                score += tl.where((k == j)[None, :], of_head[:, None], 0.0)
        if W_BIAS is not None:
            score += tl.where(chunk == 0, tl.load(W_BIAS + k, mask=k < K, other=0.0), 0.0)[None, :]
        if MASK is not None:
            real = tl.load(MASK + instance, mask=r < count, other=0) != 0
            score = tl.where(real[:, None], score, float("-inf"))
        at = (tl.cast(chunk, tl.int64) * count + r)[:, None] * K + k[None, :]
        tl.store(OUT + at, score, mask=(r < count)[:, None] & (k < K)[None, :])


@triton.jit
def _halves(t):
    """Splits the columns into a left and a right half. In an accumulator's layout a thread has columns of both, so that
    nothing moves."""
    return tl.split(tl.permute(tl.reshape(t, [t.shape[0], 2, t.shape[1] // 2]), [0, 2, 1]))


@kernel
def gate_gradients(
    X, WEIGHT, BIAS, W, DS, MASK, SEED, SCALE, OUT, SUMS, first, count, L, D, x_stride, out_stride, threshold,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, K: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes to OUT [V and U, D, count] the gradient of the products, times SCALE, 0 for masked rows; to SUMS [parts,
    (K + 2) D + K] what parts of tiles add to the gradients of w and of the biases. Units lie across the warps, so that
    sums over rows shuffle little."""
    tl.assume(L > 0)
    chunks = tl.cdiv(D, BD)
    tile = tl.program_id(0) // chunks
    row = tile * BN
    unit = (tl.program_id(0) % chunks) * BD
    d = unit + tl.arange(0, BD)
    v = tl.zeros([BD, BN], tl.float32)
    u = tl.zeros([BD, BN], tl.float32)
    for column in tl.range(0, L, BL):
        x = _row_tile(X, row, column, count, L, x_stride, TMA, EVEN, BN, BL).T
        if TMA:
            v = tl.dot(WEIGHT.load([unit, column]), x, v, input_precision=PRECISION)
            if GATED:
                u = tl.dot(WEIGHT.load([D + unit, column]), x, u, input_precision=PRECISION)
        else:
            inside = tl.minimum(d, D - 1)
            v = tl.dot(_unit_rows(WEIGHT, inside, column, L, EVEN, BL), x, v, input_precision=PRECISION)
            if GATED:
                u = tl.dot(_unit_rows(WEIGHT, D + inside, column, L, EVEN, BL), x, u, input_precision=PRECISION)
    if PARTS == 1:
        _part_gradients(
            v, u, BIAS, W, DS, MASK, SEED, SCALE, OUT, SUMS, tile, first, row, count, unit, D, out_stride, threshold,
            GATED, ACTIVATION, K, TMA, FAST, BN, BD,
        )  # fmt: skip
    else:
        v0, v1 = _halves(v)
        u0, u1 = _halves(u)
        _part_gradients(
            v0, u0, BIAS, W, DS, MASK, SEED, SCALE, OUT, SUMS, 2 * tile, first, row, count, unit, D, out_stride,
            threshold, GATED, ACTIVATION, K, TMA, FAST, BN // 2, BD,
        )  # fmt: skip
        _part_gradients(
            v1, u1, BIAS, W, DS, MASK, SEED, SCALE, OUT, SUMS, 2 * tile + 1, first, row + BN // 2, count, unit, D,
            out_stride, threshold, GATED, ACTIVATION, K, TMA, FAST, BN // 2, BD,
        )  # fmt: skip


@triton.jit
def _part_gradients(
    v, u, BIAS, W, DS, MASK, SEED, SCALE, OUT, SUMS, part, first, row, count, unit, D, out_stride, threshold,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, FAST: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    d = unit + tl.arange(0, BD)
    if BIAS is not None:
        v += tl.load(BIAS + d, mask=d < D, other=0.0)[:, None]
        if GATED:
            u += tl.load(BIAS + D + d, mask=d < D, other=0.0)[:, None]
    r = row + tl.arange(0, BN)
    instance = tl.cast(first, tl.int64) + r
    real = r < count
    if MASK is not None:
        real = real & (tl.load(MASK + instance, mask=r < count, other=0) != 0)

    t, s = _branches(v, u, GATED, ACTIVATION, FAST)
    gate = t
    dv = activation_gradient(v, t, ACTIVATION)
    if GATED:
        gate = t * s
        dv = s * dv
        du = gate * (1.0 - s)
    # The gate is selected, not multiplied by 0: a masked row may hold NaN.
    gate = tl.where(real[None, :], gate, 0.0)
    if SEED is not None:
        factors = _factors(SEED, instance, unit, threshold, GATED, BD).T
        gate = apply_dropout(gate, factors)
    scale = tl.cast(1.0, tl.float32)  # a power of two, so it rounds nothing
    if SCALE is not None:
        scale = tl.load(SCALE)
    dgate = tl.zeros([BD, BN], tl.float32)
    sums = SUMS + tl.cast(part, tl.int64) * ((K + 2) * D + K) + d
    for j in tl.static_range(K):
        ds = tl.load(DS + instance * K + j, mask=real, other=0.0)
        dgate += tl.load(W + j * D + d, mask=d < D, other=0.0)[:, None] * (ds * scale)[None, :]
        tl.store(sums + j * D, tl.sum(gate * ds[None, :], axis=1), mask=d < D)
        tl.store(sums + ((K + 2) * D + j) - d, tl.sum(ds, axis=0), mask=d == 0)
    if SEED is not None:
        dgate = dgate * factors
    dv = tl.where(real[None, :], dgate * dv, 0.0)
    tl.store(sums + K * D, tl.sum(dv, axis=1) / scale, mask=d < D)
    _store_units(OUT, dv, 0, unit, row, D, out_stride, TMA, BN, BD)
    if GATED:
        du = tl.where(real[None, :], dgate * du, 0.0)
        tl.store(sums + (K + 1) * D, tl.sum(du, axis=1) / scale, mask=d < D)
        _store_units(OUT, du, 1, unit, row, D, out_stride, TMA, BN, BD)
    else:
        tl.store(sums + (K + 1) * D, tl.zeros([BD], tl.float32), mask=d < D)


@triton.jit
def _store_units(
    OUT, values, BRANCH: tl.constexpr, unit, row, D, out_stride, TMA: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    """Stores units as rows of OUT, which has room for whole tiles of columns; a branch ends at its last unit."""
    if TMA:
        OUT.store([BRANCH, unit, row], tl.reshape(values.to(OUT.dtype), [1, BD, BN]))
    else:
        d = unit + tl.arange(0, BD)
        at = (BRANCH * D + d).to(tl.int64)[:, None] * out_stride + (row + tl.arange(0, BN))[None, :]
        tl.store(OUT + at, values.to(OUT.dtype.element_ty), mask=(d < D)[:, None])


# Launches


def serves(call) -> bool:
    """Whether these kernels can take the place of products on slices of rows, at their accuracy."""
    if call.type == torch.float64 or call.heads > _MOST_HEADS:
        return False
    backend, architecture = tuning.target(call.x.device)
    if backend == "cuda" and architecture < 80:
        return False
    return call.type != torch.float32 or backend == "interpreter" or (backend == "cuda" and tf32_allowed())


def tf32_allowed() -> bool:
    """Whether PyTorch's own float32 products use tf32 at this moment. The older of its two switches refuses to be read
    where the newer one was set."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def prepared(weight: Tensor) -> Tensor:
    """V over U [units, L] as the kernels take it: float32 is rounded to tf32, for tensor cores cut off what is past it.
    Where rows and weights are both cut off, errors are more than twice those of rounded ones."""
    if weight.dtype != torch.float32 or tuning.target(weight.device)[0] != "cuda":
        return weight
    return as_tf32(weight)


def as_tf32(t: Tensor) -> Tensor:
    """Rounds to the nearest numbers of 11 significant bits (Veltkamp 1968)."""
    high = t * (2**13 + 1)
    return high - (high - t)


def scores(call, x: Tensor, block: slice, out: Tensor) -> None:
    """Writes the scores of a slice, whose rows x [n, L] holds, into ``out`` [N, K]; -inf for masked rows."""
    count = block.stop - block.start
    if count == 0:
        return
    options = _options(call, x, forward=True)
    chunks = ceil_div(call.hidden, options["BD"])
    of_chunks = out[block] if chunks == 1 else call.empty(chunks, count, call.heads)
    x_tiles, weight = x, call.weight
    if options["TMA"]:
        x_tiles = _descriptor(x, options["BN"], options["BL"])
        weight = weight.view(-1, call.hidden, call.width)
        weight = _descriptor(weight, weight.shape[0], options["BD"], options["BL"])
    programs = min(tuning.multiprocessors(x.device), ceil_div(count, options["BN"]) * chunks)
    seed, threshold = call.dropout
    launch(
        score_tiles, (programs,),
        x_tiles, weight, call.bias, call.to_acc(call.w), call.to_acc(call.w_bias), call.mask, seed,
        of_chunks, block.start, count,
        call.width, call.hidden, x.stride(0), threshold, BK=power_of_two(call.heads), **options,
    )  # fmt: skip
    if chunks > 1:
        torch.sum(of_chunks, 0, out=out[block])


def gradients_of_products(call, x: Tensor, parts, block: slice, ds: Tensor, scale, sums: Tensor) -> Tensor:
    """The gradient of ``x [V; U]^T`` [n, units] times the scale, for a slice, whose rows x [n, L] holds. Writes to
    ``sums``, made by `Call.sums`, what the slice adds to the gradients of w and of the biases."""
    options = _options(call, x, forward=False)
    BN, BD, PARTS = options["BN"], options["BD"], options["PARTS"]
    count, D = block.stop - block.start, call.hidden
    tiles, chunks = ceil_div(count, BN), ceil_div(D, BD)
    z = call.empty(call.units, tiles * BN, dtype=call.type)
    of_parts = call.empty(tiles * PARTS, sums.shape[1])
    x_tiles, weight, out = x, call.weight, z
    if options["TMA"]:
        x_tiles = _descriptor(x, BN, options["BL"])
        weight = _descriptor(weight, BD, options["BL"])
        out = _descriptor(z.view(-1, D, tiles * BN), 1, BD, BN // PARTS)
    seed, threshold = call.dropout
    launch(
        gate_gradients, (tiles * chunks,),
        x_tiles, weight, call.bias, call.to_acc(call.w), ds, call.mask, seed, scale, out, of_parts, block.start, count,
        call.width, D, x.stride(0), z.stride(0), threshold, **options,
    )  # fmt: skip
    of_slice = sums[block.start // call.summed : ceil_div(block.stop, call.summed)].zero_()
    torch.sum(of_parts, 0, out=of_slice[0])
    return z[:, :count].t()


def _descriptor(t: Tensor, *tile: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, list(tile))


def _options(call, x: Tensor, *, forward: bool) -> dict:
    """The options of a launch: the variant of a kernel and its tile."""
    itemsize = call.type.itemsize
    aligned = call.width * itemsize % 16 == 0 and x.stride(0) * itemsize % 16 == 0
    aligned = aligned and call.weight.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    tma = aligned and tuning.large_tiles(call.x.device)
    tile = (_large_tile if tma else _small_tile)(call, forward)
    nvidia = tuning.target(call.x.device)[0] == "cuda"
    variant = {"K": call.heads, "TMA": tma, "EVEN": call.width % tile["BL"] == 0}
    return {**call.options(), **variant, "FAST": nvidia, "PRECISION": "tf32" if nvidia else "ieee", **tile}


# Tiles are the largest whose accumulators and epilogue fit into the registers that the compiler reports.


def _large_tile(call, forward: bool) -> dict[str, int]:
    dropped = call.dropout[0] is not None
    blackwell = tuning.target(call.x.device)[1] >= 100  # its accumulators come into the registers all at once
    tile = {"BN": 128, "BD": 128, "BL": 128 // call.type.itemsize, "num_warps": 8, "num_stages": 4}
    if forward:
        tile["BD"] = (256 >> call.gated) >> (dropped or blackwell)
    else:
        crowded = call.gated + 4 * dropped + (call.heads > 1) + 3 * (call.heads > 3) + blackwell
        tile |= {"BN": 64, "PARTS": 1} if crowded > 1 else {"PARTS": 1 + call.gated}
        tile["BD"] = 64 if crowded > 4 else 128
    return tile | {"BD": min(max(power_of_two(call.hidden), 64), tile["BD"])}


def _small_tile(call, forward: bool) -> dict[str, int]:
    tile = {
        "BN": 128 if forward else 32 if call.heads > 3 else 64,
        "BD": 64,
        "BL": 64 // call.type.itemsize,
        "num_warps": 8,
        "num_stages": 3,
    }
    return tile if forward else tile | {"PARTS": 1}
