"""The instances as an op sees them: rows x [N, L], or their embedding ``h = drop(act(W x + b))`` [N, E].

The library computes the product for a slice of rows and a kernel does the rest. The backward does both again where the
forward did not keep their result, so that of others no more than a slice of h is ever there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from milkernels import saving
from milkernels.triton import rows, split, tuning
from milkernels.triton.call import Call
from milkernels.triton.common import (
    activate,
    activation_gradient,
    apply_dropout,
    dropout_factors,
    kernel,
    multiple,
    tanh_slope,
)
from milkernels.triton.host import (
    alignment,
    ceil_div,
    dropout_bits,
    dropout_of,
    launch,
    power_of_two,
    product_dtype,
)
from milkernels.triton.kept import Kept, lay_out


@triton.jit
def _numbers(INDEX, MASK, i, first, count):
    """The numbers of rows i of a slice that begins at `first`, or those in INDEX; and which of them are real."""
    if INDEX is not None:
        r = tl.load(INDEX + i, mask=i < count, other=-1)
        real = r >= 0
    else:
        r = i + first
        real = i < count
        if MASK is not None:
            real = real & (tl.load(MASK + r, mask=real, other=0) != 0)
    return r, real


@kernel
def layer_rows(
    Z, BIAS, INDEX, MASK, SEED, OUT, first, count, E, threshold,
    ACTIVATION: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """OUT [count, E], which may be Z, is drop(act(Z + bias)) with dropout branch 3; 0 for masked rows and where INDEX
    is -1."""
    A: tl.constexpr = tl.float64 if Z.dtype.element_ty == tl.float64 else tl.float32
    E = multiple(E, ALIGN)
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    unit = tl.program_id(1) * BE
    e = unit + tl.arange(0, BE)
    inside = (i < count)[:, None] & (e < E)[None, :]
    r, real = _numbers(INDEX, MASK, i, first, count)
    at = i[:, None] * E + e[None, :]
    z = tl.load(Z + at, mask=inside, other=0.0).to(A)
    if BIAS is not None:
        z += tl.load(BIAS + e, mask=e < E, other=0.0)[None, :]
    h = activate(z, ACTIVATION)
    if SEED is not None:
        h = apply_dropout(h, dropout_factors(SEED, r, unit, threshold, 3, BE, A))
    tl.store(OUT + at, tl.where(real[:, None], h, 0.0).to(OUT.dtype.element_ty), mask=inside)


@kernel
def layer_gradients(
    G, ARGUMENT, BIAS, INDEX, MASK, SEED, SCALE, OUT, SUMS, first, count, slot, per, E, threshold,
    ACTIVATION: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes to OUT, which may be ARGUMENT, the gradient of Z times SCALE, from the gradient G of h, all [count, E];
    and to SUMS [slots, E], from `slot` on, what `per` rows each add to the gradient of the bias. ARGUMENT is what
    `Layer` keeps: Z or h."""
    A: tl.constexpr = SUMS.dtype.element_ty
    unit = tl.program_id(1) * BE
    e = unit + tl.arange(0, BE)
    E = multiple(E, ALIGN)
    begin = tl.program_id(0).to(tl.int64) * per
    sums = tl.zeros([BE], A)
    grad_scale = tl.cast(1.0, A)
    if SCALE is not None:
        grad_scale = tl.load(SCALE)
    for row in tl.range(begin, tl.minimum(begin + per, count), BN):
        i = row + tl.arange(0, BN)
        inside = (i < count)[:, None] & (e < E)[None, :]
        r, real = _numbers(INDEX, MASK, i, first, count)
        at = i[:, None] * E + e[None, :]
        g = tl.load(G + at, mask=inside, other=0.0)
        a = tl.load(ARGUMENT + at, mask=inside, other=0.0).to(A)
        if ACTIVATION == "relu":
            # h is 0 where a unit is off or dropped; NaN stays.
            g = tl.where(a > 0, g * (tl.cast(65536, A) / tl.cast(tl.maximum(65536 - threshold, 1), A)), a * 0.0)
        else:
            if ACTIVATION != "identity":
                if BIAS is not None:
                    a += tl.load(BIAS + e, mask=e < E, other=0.0)[None, :]
                slope = tanh_slope(a) if ACTIVATION == "tanh" else activation_gradient(a, a, ACTIVATION)
                g = g * slope
            if SEED is not None:
                g = apply_dropout(g, dropout_factors(SEED, r, unit, threshold, 3, BE, A))
        g = tl.where(real[:, None], g, 0.0)
        sums += tl.sum(g, axis=0)
        tl.store(OUT + at, (g * grad_scale).to(OUT.dtype.element_ty), mask=inside)
    tl.store(SUMS + (slot + tl.program_id(0)).to(tl.int64) * E + e, sums, mask=e < E)


@dataclass
class Rows:
    """Some rows as an op sees them, and what the gradient of embedded ones goes back through. E is L where rows are not
    embedded."""

    which: slice | Tensor  # the numbers of the rows, a slice of n or int64 [B, C], where -1 is no row
    values: Tensor  # [n, E], or [B, C, E]
    x: Tensor | None = None  # [n, L]: the rows that were embedded, in the type of products
    argument: Tensor | None = None  # [n, E]: what the derivative of the activation is computed from (see `Layer`)
    kept: bool = False  # whether the values are those that the op keeps, which nobody may overwrite


_TILE = {"BN": 32, "num_warps": 8}


class Layer:
    """A layer W [M, L], b [M] that rows pass, ``h = drop(act(W x + b))``. ``x W^T`` is rounded only as a part of h:
    products of half types come in float32. The gradient of rows needs it, or h alone where h tells the activation's
    derivative. h has the type of products, or where it is not ``rounded`` the accumulation type.

    Of rows that the op keeps, it keeps h where that has the type of products and no more is needed, else the products,
    rounded to this type, from which h is made again."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype, acc: torch.dtype, *,
        dropout: tuple[Tensor | None, int] = (None, 0), rounded: bool = True,
    ):  # fmt: skip
        self.given, self.type, self.acc = (weight, bias), dtype, acc
        self.out = dtype if rounded else acc
        self.width, self.inputs = weight.shape
        plan = tuning.plan(weight.device, dtype, self.inputs, self.width)
        self.products = split.products_of([weight], dtype, plan)
        self.bias = None if bias is None else bias.contiguous()
        self.dropout, self.activation = dropout, activation
        self.needs_product = activation in ("tanh", "gelu")
        self.kept, self.keeps_product = Kept(self.width, dtype), self.needs_product or self.out != dtype

    def bytes_per_row(self) -> int:
        """The bytes of workspace that h needs."""
        wide = self.width * self.acc.itemsize if self.out != self.acc else 0
        return self.width * self.out.itemsize + wide + self.products.bytes_per_row

    def gradient_bytes_per_row(self) -> int:
        """The bytes of workspace that the gradient of h needs besides. It takes the place of the product if that is not
        needed, and of h where it has the type of products."""
        needed = self.needs_product + (self.out == self.acc)
        return self.width * (self.acc.itemsize * needed + (self.type.itemsize if self.out != self.type else 0))

    def has(self, which: slice | Tensor) -> bool:
        """Whether rows are there without x."""
        return self.kept.filled and self.kept.of(which) is not None

    def rows(self, call: Call, x: Tensor | None, which: slice | Tensor, *, gradient: bool) -> Rows:
        """Takes rows ``x`` [n, L], which have the type of products, through the layer: h, which is 0 for masked rows,
        and what its ``gradient`` needs. Of rows that the layer `has`, x is for the gradient alone."""
        x = None if x is None else self.products.parts(x)
        kept, there = self.kept.of(which), self.has(which)
        if there and not self.keeps_product:
            return Rows(which, kept, x, kept, kept=True)
        z = kept if there else self._products(x, kept)
        if kept is not None and not self.keeps_product:
            h = kept
        elif kept is not None or self.out != self.acc or (gradient and self.needs_product):
            h = torch.empty_like(z, dtype=self.out)
        else:
            h = z
        self._activate(call, z, h, which)
        argument = z if self.needs_product else h
        return Rows(which, h, x, argument, kept=h is kept) if gradient else Rows(which, h)

    def _products(self, x, kept: Tensor | None) -> Tensor:
        """``x W^T`` [n, M], in the accumulation type; in the place of what is ``kept`` if this takes it."""
        takes = kept is not None and (self.keeps_product or kept.dtype == self.acc)
        return self.products.forward(x, self.acc, kept if takes else None)

    def _activate(self, call: Call, z: Tensor, h: Tensor, which: slice | Tensor) -> None:
        """Writes h [n, M] from the products z."""
        seed, threshold = self.dropout
        first, index = _places(which)
        units = self._units()
        launch(
            layer_rows, (ceil_div(z.shape[0], _TILE["BN"]), ceil_div(self.width, units)),
            z, self.bias, index, call.mask, seed, h, first, z.shape[0], self.width, threshold,
            ACTIVATION=self.activation, BE=units, ALIGN=alignment(self.width), **_TILE,
        )  # fmt: skip

    def gradient_of_products(
        self, call: Call, at: Rows, grad: Tensor, scale: Tensor | None, sums: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``(z [n, M], sums [programs, M])`` from the gradient ``grad`` [n, M] of h: z is the gradient of ``x W^T``,
        times the scale and in the type of products, and the sum over the rows of sums is that of the bias. Of a slice
        of rows it is written into ``sums``, made by `Call.sums`, if given. The values of a slice are overwritten by z
        where they have its type and are not kept."""
        over = isinstance(at.which, slice) and at.values.dtype == self.type and not at.kept
        z = at.values if over else torch.empty_like(at.argument, dtype=self.type)
        count, units = grad.shape[0], self._units()
        first, index = _places(at.which)
        per, slot = (64, 0) if sums is None else (call.summed, first // call.summed)
        programs = ceil_div(count, per)
        sums = call.empty(programs, self.width) if sums is None else sums
        seed, threshold = self.dropout
        launch(
            layer_gradients, (programs, ceil_div(self.width, units)),
            grad, at.argument, self.bias, index, call.mask, seed, scale, z, sums, first, count, slot, per, self.width,
            threshold, ACTIVATION=self.activation, BE=units, ALIGN=alignment(self.width),
            **_TILE | ({} if seed is None else {"BN": 16}),
        )  # fmt: skip
        return z, sums

    def headroom(self) -> int:
        """log2 of the largest factor by which the gradient of ``x W^T`` may exceed that of h, rounded up."""
        return dropout_bits(self.dropout[1]) + (self.activation == "gelu")

    def _units(self) -> int:
        return min(max(power_of_two(self.width), 16), 128)


def _places(which: slice | Tensor) -> tuple[int, Tensor | None]:
    """The numbers of rows as kernels take them: ``(first row, None)`` or ``(0, numbers)``."""
    return (which.start, None) if isinstance(which, slice) else (0, which.flatten())


class Instances(Call):
    """A call whose op sees the rows ``x`` [N, L] as they are, or embedded [N, E] where ``embed`` has a weight [E, L],
    a bias and a seed."""

    def __init__(self, x, offsets, mask, embed=(), activation=None, dropout_p=0.0, dtype=None):
        super().__init__(x, offsets, mask)
        self.embedding = None
        if embed:
            weight, bias, seed = embed
            dtype = product_dtype(x.dtype, dtype)
            self.embedding = Layer(weight, bias, activation, dtype, self.acc, dropout=dropout_of(seed, dropout_p))
            self.width, self.dtype = self.embedding.width, self.embedding.type

    def keep_up_to(self, limit: int, *hidden: Kept) -> Tensor:
        """Memory of at most so many bytes for embedded rows and what is kept of hidden layers, which the call fills."""
        if limit == 0:
            return self.empty(0, dtype=torch.uint8)
        product = hidden[0].dtype if hidden else self.dtype
        embedded = 0 if self.embedding is None else self.embedding.width
        size = saving.kept_bytes(self.x, limit, product, embedded, tuple(layer.width for layer in hidden))
        memory = self.empty(size, dtype=torch.uint8)
        self.keep(memory, *hidden, filled=False)
        return memory

    def keep(self, memory: Tensor, *hidden: Kept, filled: bool, has_rows: bool = False) -> None:
        """Takes the memory that `keep_up_to` has made for these: to fill it, or where it is ``filled`` to read it; it
        may have the embedded rows before it has the rest."""
        if memory.shape[0] == 0:
            return
        first = [] if self.embedding is None else [self.embedding.kept]
        lay_out(self, memory, first, hidden)
        for layer in hidden:
            layer.filled = filled
        for layer in first:
            layer.filled = filled or has_rows

    def rows_at(self, block: slice, *, gradient: bool = False) -> Rows:
        """A slice of rows as the op sees them; with what their ``gradient`` needs."""
        layer, x = self.embedding, self.x[block]
        if layer is None:
            return Rows(block, x)
        x = rows.operand(self, x, block, layer.type, clean=gradient) if gradient or not layer.has(block) else None
        return layer.rows(self, x, block, gradient=gradient)

    def embedding_bytes(self, *, gradient: bool = False, need_x: bool = False) -> int:
        """The bytes of workspace for each row that the embedding needs: for h, and for its gradient; 0 without one."""
        if self.embedding is None:
            return 0
        layer, L = self.embedding, self.x.shape[1]
        size = layer.bytes_per_row() + (layer.gradient_bytes_per_row() if gradient else 0)
        copied = self.x.dtype != layer.type or (gradient and self.mask is not None)
        # Products of another type than x may be made aside; those of float16 have a scale, which is taken from them
        # there.
        aside = need_x and (layer.type == torch.float16 or layer.type != self.x.dtype)
        return size + L * (layer.type.itemsize * copied + self.acc.itemsize * aside)

    def slices(self, bytes_per_row: int | None = None) -> Iterable[slice]:
        """`Call.slices`, with the workspace of the embedding besides."""
        if self.embedding is not None:
            return self.blocks((bytes_per_row or 0) + self.embedding_bytes())
        return super().slices(bytes_per_row)

    def gathered(self, indices: Tensor) -> Rows:
        """The rows with these numbers [B, C], 0 for -1; values are [B, C, width] in the accumulation type."""
        if self.rows == 0:
            return Rows(indices, self.zeros(*indices.shape, self.width))
        if self.embedding is None:
            return Rows(indices, rows.gathered(self.x, indices, self.acc).unflatten(0, indices.shape))
        x = rows.gathered(self.x, indices, self.embedding.type)
        found = self.embedding.rows(self, x, indices, gradient=True)
        return replace(found, values=self.to_acc(found.values).unflatten(0, indices.shape))
