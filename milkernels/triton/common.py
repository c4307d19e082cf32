"""What kernels share: the ragged schedule of ``ragged.segments`` found on the device, activations, the dropout mask."""

import triton
import triton.language as tl

_DEAD = tl.constexpr(float("-inf"))

# A kernel is compiled again for integers that are 1 or divisible by 16, but not for these, which only bound loops
# and differ from call to call.
kernel = triton.jit(do_not_specialize=("bags", "rows", "first", "last", "count", "threshold", "per", "slot", "R"))


@triton.jit
def multiple(n, ALIGN: tl.constexpr):
    """A size that ALIGN divides, so that the compiler knows it: of itself it looks for 16 alone, and reads rows of 500
    or 1000 numbers one by one."""
    if ALIGN < 16:
        n = n // ALIGN * ALIGN
    return n


@triton.jit
def bag_rows(OFFSETS, bag, num_rows):
    """The rows ``[start, end)`` of a bag, kept within ``[0, num_rows]`` whatever the offsets say."""
    if OFFSETS is None:
        start = tl.cast(0, tl.int64)
        end = tl.cast(num_rows, tl.int64)
    else:
        start = tl.minimum(tl.maximum(tl.load(OFFSETS + bag).to(tl.int64), 0), num_rows)
        end = tl.minimum(tl.maximum(tl.load(OFFSETS + bag + 1).to(tl.int64), 0), num_rows)
    return start, end


@triton.jit
def segment(OFFSETS, slot, num_bags, num_rows, R):
    """The segment that writes partial results into ``slot``: ``(bag, first row, end)``, empty where there is none.

    Bag b owns the slots from ``start // R + b`` on, a number that grows with b, so that the bag is found by bisection.
    """
    low = tl.cast(slot, tl.int32) * 0
    if OFFSETS is not None:
        high = low + num_bags
        while high - low > 1:
            middle = (low + high) // 2
            start = tl.minimum(tl.maximum(tl.load(OFFSETS + middle).to(tl.int64), 0), num_rows)
            before = start // R + middle <= slot
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
    start, end = bag_rows(OFFSETS, low, num_rows)
    chunk = tl.cast(slot - low, tl.int64) * R
    return low, tl.maximum(start, chunk), tl.minimum(end, chunk + R)


@triton.jit
def slots_of(OFFSETS, bag, num_rows, R):
    """The slots ``[first, end)`` of the partial results of a bag."""
    start, end = bag_rows(OFFSETS, bag, num_rows)
    first = start // R + bag
    return first, tl.where(end > start, (end - 1) // R + bag + 1, first)


@triton.jit
def real_rows(MASK, rows, end):
    """Which of the rows are inside the segment and not masked."""
    real = rows < end
    if MASK is not None:
        real = real & (tl.load(MASK + rows, mask=real, other=0) != 0)
    return real


@triton.jit
def finite_or_zero(top):
    """A maximum to subtract: 0 in place of -inf, so that nothing is -inf - -inf."""
    return tl.where(top == _DEAD, 0.0, top)


@triton.jit
def log_sum_exp(top, total):
    """The logsumexp of scores, from their maximum and the sum of exp(score - maximum). A score of inf makes that sum
    NaN, as it does its weight."""
    lse = tl.where(total == 0, float("-inf"), finite_or_zero(top) + tl.log(total))
    return tl.where(top == float("inf"), float("inf"), lse)


@triton.jit
def shifted(product, shift):
    """product + shift; -inf where the shift is -inf, which hides a vector from rows that may hold anything."""
    return tl.where(shift == _DEAD, _DEAD, product + shift)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    wide = (1.0 - e) / (1.0 + e)
    if x.dtype == tl.float32:
        # 1 - e loses the digits of a small x; the error is 3e-8 at the switch.
        s = x * x
        narrow = size * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * (1382 / 155925))))))
        wide = tl.where(size < 0.3, narrow, wide)
    return tl.where(x < 0, -wide, tl.where(x == x, wide, x))


@triton.jit
def tanh_slope(x):
    """The derivative of tanh; 1 - y * y has no digits left where y is near 1."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "tanh":
        return tanh(x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return x


@triton.jit
def activation_gradient(x, y, ACTIVATION: tl.constexpr):
    """The derivative of the activation at ``x``, where its value is ``y``."""
    if ACTIVATION == "tanh":
        return 1.0 - y * y
    elif ACTIVATION == "relu":
        return tl.where(x > 0, x * 0 + 1, x * 0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        return x * 0 + 1


@triton.jit
def dropout_factors(SEED, rows, unit, threshold, BRANCH: tl.constexpr, UNITS: tl.constexpr, A: tl.constexpr):
    """``[rows, UNITS]``: 0 for dropped units, 1 / (1 - p) for kept ones; ``unit``, the first one, is a multiple of 8.

    Philox4x32-10 with key = seed and counter = (row low, row high, unit >> 3, branch); 8 units share a counter.
    """
    seed = tl.load(SEED).to(tl.uint64, bitcast=True)
    group = (unit // 8 + tl.arange(0, UNITS // 8)).to(tl.uint32)
    rows = rows.to(tl.int64)
    zero = (rows[:, None] * 0 + group[None, :] * 0).to(tl.uint32)
    low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None] + zero
    high = (rows >> 32).to(tl.uint32)[:, None] + zero
    w0, w1, w2, w3 = tl.philox(seed, low, high, group[None, :] + zero, zero + BRANCH)
    words = tl.permute(tl.join(tl.join(w0, w1), tl.join(w2, w3)), (0, 1, 3, 2))  # last: word >> 1, word & 1
    lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (rows.shape[0], UNITS))
    # A threshold of 65536 drops every unit, and the scale is never used.
    scale = tl.cast(65536, A) / tl.cast(tl.maximum(65536 - threshold, 1), A)
    return tl.where(lanes.to(tl.int32) >= threshold, scale, 0.0)


@triton.jit
def apply_dropout(x, factor):
    """x * factor, and 0 where the factor is 0: a dropped activation may be infinite."""
    return tl.where(factor == 0, 0.0, x * factor)
