"""A function of pieces, and its gradient by another read.

What a function says of the pieces is kept, one behind another, for it is little: a row for each instance, or for each
bag of a piece.  What it is made of is not.  So the graph that leads from there to the loss is PyTorch's own, and a
backward reads the pieces again, computes each once more, and hands it the gradient of what it said.  Pieces whose
gradient is 0 are not read.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from milkernels import _context
from milkernels._torch import pytree
from milkernels.dtypes import accumulation_dtype
from milkernels.layers import parameters_of
from milkernels.ops.dropout import seed_of_part
from milkernels.saving import saved_bytes
from milkernels.streaming.reading import Piece, Reading

Results = dict[str, Tensor]
Produce = Callable[[Tensor, Piece, dict[str, Any]], Results]
_WITHOUT_GRADIENT = frozenset(("indices", "lost", "count"))


class Arguments:
    """Those of an op but for its bags, with their tensors apart, so that autograd sees them.

    ``rows`` names what has a row for each instance, ``bags`` what has one for each bag.
    """

    def __init__(self, arguments: dict[str, Any], rows: Iterable[str] = (), bags: Iterable[str] = ()):
        self.tensors: list[Tensor] = []
        self.kinds: list[str] = []
        self._others: dict[str, tuple] = {}
        for name, value in arguments.items():
            leaves, spec = pytree.tree_flatten(_with_parameters(name, value))
            kind = "row" if name in rows else "bag" if name in bags else "whole"
            places = []
            for leaf in leaves:
                places.append(len(self.tensors) if isinstance(leaf, Tensor) else None)
                if isinstance(leaf, Tensor):
                    self.tensors.append(leaf)
                    self.kinds.append(kind)
            self._others[name] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], places, spec

    def of_piece(self, tensors: Iterable[Tensor], piece: Piece) -> list[Tensor]:
        spans = {"row": slice(piece.start, piece.stop), "bag": piece.bags, "whole": slice(None)}
        return [t if kind == "whole" else t[spans[kind]] for t, kind in zip(tensors, self.kinds, strict=True)]

    def put(self, tensors: list[Tensor]) -> dict[str, Any]:
        """The arguments, with these in the places of their tensors."""
        return {
            name: pytree.tree_unflatten(
                [leaf if i is None else tensors[i] for leaf, i in zip(leaves, places, strict=True)], spec
            )
            for name, (leaves, places, spec) in self._others.items()
        }


def _with_parameters(name: str, value: Any) -> Any:
    """The value with linear layers as pairs of their parameters."""
    if isinstance(value, nn.Linear):
        return parameters_of(name, value)
    if isinstance(value, (tuple, list)):
        inner = [_with_parameters(f"{name}.linear", v) if isinstance(v, nn.Linear) else v for v in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


class Call:
    """``produce(x, piece, arguments)`` of every piece of a reading; ``arguments`` are those for the piece."""

    def __init__(self, reading: Reading, arguments: Arguments, produce: Produce, seed: "Seed"):
        self.reading, self.arguments, self.produce, self.seed = reading, arguments, produce, seed
        self.names: list[str] = []
        self.sizes: list[list[int]] = []  # of what it says of each piece
        self.backend, self.limit = _context.current(), _context.current_saved_bytes()

    def is_differentiated(self) -> bool:
        tensors = (*self.arguments.tensors, *self.reading.parameters)
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def results(self) -> Results:
        """By name what it says of all pieces, one behind another."""
        outputs = _Pieces.apply(self, *self.arguments.tensors, *self.reading.parameters)
        return dict(zip(self.names, outputs, strict=True))

    def of_piece(self, i: int, piece: Piece, tensors: list[Tensor]) -> Results:
        reading = self.reading
        with reading.randomness(i):
            x = reading.features(piece)
            arguments = self.arguments.put(tensors)
            if "backend" in arguments and arguments["backend"] is None:
                arguments["backend"] = self.backend
            if "seed" in arguments:
                arguments["seed"] = self.seed.of(piece, x)
            return self.produce(x, piece, arguments)

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own, found = tensors[: len(self.arguments.tensors)], []
        self.sizes = []
        with self.reading.all() as pieces:
            for i, piece in pieces:
                results = self.of_piece(i, piece, self.arguments.of_piece(own, piece))
                found.append(list(results.values()))
                self.names = list(results)
                self.sizes.append([t.shape[0] for t in found[-1]])
                del piece, results
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def gradients(self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...], grads: tuple[Tensor | None, ...]):
        own, kinds = tensors[: len(self.arguments.tensors)], self.arguments.kinds
        kinds = [*kinds, *["whole"] * (len(tensors) - len(own))]
        totals = [
            torch.zeros_like(t, dtype=accumulation_dtype(t)) if need else None
            for t, need in zip(tensors, needs, strict=True)
        ]
        parts = [self._split(grad, [sizes[j] for sizes in self.sizes]) for j, grad in enumerate(grads)]
        wanted = [i for i in range(len(self.sizes)) if any(p is not None and bool(p[i].any()) for p in parts)]
        kept = contextlib.nullcontext() if self.limit is None else saved_bytes(self.limit)
        with kept, self.reading.some(wanted) as pieces:
            for i, piece in pieces:
                given = {name: p[i] for name, p in zip(self.names, parts, strict=True) if p is not None}
                found = self._gradients_of_piece(i, piece, own, needs, given)
                spans = {"row": slice(piece.start, piece.stop), "bag": piece.bags, "whole": slice(None)}
                for total, kind, grad in zip(totals, kinds, found, strict=True):
                    if grad is not None:
                        total[spans[kind]] += grad
                del piece, found
        return tuple(None if total is None else total.to(t.dtype) for total, t in zip(totals, tensors, strict=True))

    @staticmethod
    def _split(grad: Tensor | None, sizes: list[int]) -> tuple[Tensor, ...] | None:
        return None if grad is None else grad.split(sizes)

    def _gradients_of_piece(self, i: int, piece: Piece, own, needs, given: Results) -> list[Tensor | None]:
        """Of all inputs that need one."""
        with torch.enable_grad():
            sliced = self.arguments.of_piece(own, piece)
            leaves = [t.detach().requires_grad_(need) for t, need in zip(sliced, needs, strict=False)]
            results = self.of_piece(i, piece, leaves)
        inputs = [*leaves, *self.reading.parameters]
        there = [j for j, need in enumerate(needs) if need]
        pairs = [(results[name], grad) for name, grad in given.items() if results[name].requires_grad]
        found: list[Tensor | None] = [None] * len(inputs)
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            some = torch.autograd.grad(outputs, [inputs[j] for j in there], grads, allow_unused=True)
            for j, grad in zip(there, some, strict=True):
                found[j] = grad
        return found


class Seed:
    """Of a call's dropout: given, or drawn where the first piece is; each piece has its own of it."""

    def __init__(self, given: Tensor | int | None, drops: bool):
        self.seed, self.drops = given, drops

    def of(self, piece: Piece, x: Tensor) -> Tensor | int | None:
        if self.seed is None and self.drops:
            self.seed = torch.randint(2**63 - 1, (1,), device=x.device)
        valid = isinstance(self.seed, Tensor) or (isinstance(self.seed, int) and not isinstance(self.seed, bool))
        return seed_of_part(self.seed, piece.start) if self.drops and valid else self.seed


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *tensors: Tensor):
        outputs = call.forward(tensors)
        ctx.call, ctx.autocast = call, _autocast(call.reading.device)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[t for n, t in zip(call.names, outputs, strict=True) if n in _WITHOUT_GRADIENT])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        with torch.autocast(**ctx.autocast):
            found = ctx.call.gradients(ctx.saved_tensors, ctx.needs_input_grad[1:], grads)
        return None, *found


def _autocast(device: torch.device) -> dict[str, Any]:
    kind = device.type
    enabled = torch.is_autocast_enabled(kind)
    return {"device_type": kind, "enabled": enabled, "dtype": torch.get_autocast_dtype(kind)}
