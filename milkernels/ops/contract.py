"""The contract of every compiled op: schema, fake, autograd.

One schema per op; the overload name is the backend (``milkernels::softmax_pool_fwd.native``), so PyTorch's
dispatcher goes straight to the kernel of that backend and device, and the fake and autograd registrations below
serve all of them.  Kernels are registered elsewhere: in ``csrc`` for ``native``.

An op is declared as a `Forward`, what it saves and differentiates as a `Backward`; both schemas, the fakes and the
autograd function are made from these.  Ops of one `Backward` share a kernel.

Autocast: an op is opaque to autocast (the key falls through).  ``compute_dtype`` carries the autocast type, and the
kernels convert operands tile by tile; casting ``x`` as a whole would keep an [N, L] copy for the backward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from milkernels import _torch, backends
from milkernels.dtypes import accumulation_dtype

_LIBRARY = torch.library.Library("milkernels", "DEF")
FORWARDS: list["Forward"] = []  # every op that was declared
EMBEDDED: set[str] = set()  # ops that have an instance stage


@dataclass(frozen=True)
class Backward:
    """``<name>_bwd(saves, options, gradients of outputs, needs) -> gradients of inputs``.

    ``saves`` are inputs and outputs of the forward by name, those in brackets may be None; and so may be the gradient
    of an output, where there are several.  ``needs`` says which of ``inputs`` want a gradient; the others come back as
    empty tensors.  A gradient has the type of what is saved under its name: that of the input, or of accumulation.
    """

    name: str
    inputs: str  # that have a gradient
    saves: str
    outputs: str  # that have a gradient
    options: tuple[str, ...] = ()

    def saved(self) -> list[str]:
        return [name.strip("[]") for name in self.saves.split()]

    def schema(self) -> str:
        saved = [f"Tensor? {name[1:-1]}" if name[0] == "[" else f"Tensor {name}" for name in self.saves.split()]
        optional = "?" if len(self.outputs.split()) > 1 else ""
        grads = [f"Tensor{optional} grad_{name}" for name in self.outputs.split()]
        count = len(self.inputs.split())
        results = ", ".join(["Tensor"] * count)
        arguments = [*saved, *self.options, *grads, f"bool[{count}] needs"]
        return f"({', '.join(arguments)}) -> {f'({results})' if count > 1 else results}"


@dataclass(frozen=True)
class Forward:
    """``<name>_fwd(inputs) -> outputs``; ``shapes`` gives those of the outputs, from the inputs by name."""

    name: str
    inputs: str
    outputs: str
    shapes: Callable[..., tuple]
    backward: Backward
    indices: str = ""  # outputs of int64
    typed: str = ""  # outputs in the type of the first input; the others accumulate in float32, float64 for float64

    def schema(self) -> str:
        outputs = [f"Tensor {name}" for name in self.outputs.split()]
        return f"({self.inputs}) -> {'(' + ', '.join(outputs) + ')' if len(outputs) > 1 else 'Tensor'}"

    def names(self) -> list[str]:
        return [declaration.split()[-1].split("=")[0] for declaration in self.inputs.split(", ")]


def num_bags(offsets: Tensor | None) -> int:
    return 1 if offsets is None else offsets.shape[0] - 1


def pooled_width(x, e_weight=None):
    """Of what is pooled."""
    return x.shape[1] if e_weight is None else e_weight.shape[0]


def pooled_shapes(x, offsets, heads, width):
    bags, rows = num_bags(offsets), x.shape[0]
    return (bags, heads, width), (rows, heads), (bags, heads)


BAGS = "Tensor? offsets, Tensor? mask"
# The instance stage: ``drop(act(W x + b))`` takes the place of x. All None: there is none. It has a seed and a type of
# its own, so that it is the same for every op.
EMBED = "Tensor? e_weight, Tensor? e_bias, Tensor? e_seed, str? e_activation, float e_dropout_p, ScalarType? e_dtype"
EMBED_SAVES, EMBED_INPUTS = " [e_weight] [e_bias] [e_seed]", " e_weight e_bias"
EMBED_OPTIONS = ("str? e_activation", "float e_dropout_p", "ScalarType? e_dtype")
NO_EMBEDDING = (None, None, None, None, 0.0, None)


# Fakes


def _forward_fake(op: Forward):
    names, outputs = op.names(), op.outputs.split()

    def fake(*inputs):
        if torch.onnx.is_in_onnx_export():  # whose own error would come late and name no way out
            raise RuntimeError(f"milkernels: {op.name}: {backends.NOT_IN_ONNX}")
        first = inputs[0]
        dtypes = {name: torch.int64 for name in op.indices.split()} | {name: first.dtype for name in op.typed.split()}
        shapes = op.shapes(**dict(zip(names, inputs, strict=True)))
        results = tuple(
            first.new_empty(shape, dtype=dtypes.get(name, accumulation_dtype(first)))
            for name, shape in zip(outputs, shapes, strict=True)
        )
        return results if len(results) > 1 else results[0]

    return fake


def _backward_fake(op: Backward):
    saves = op.saved()
    places = [saves.index(name) for name in op.inputs.split()]

    def fake(*args):
        results = tuple(
            torch.empty_like(args[place], memory_format=torch.contiguous_format) if need else args[0].new_empty(0)
            for place, need in zip(places, args[-1], strict=True)
        )
        return results if len(results) > 1 else results[0]

    return fake


# Autograd


def _op(name: str, backend: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.milkernels, name), backend)


def _below_autograd(name: str, backend: str, inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return _op(name, backend)(*inputs)


def _forward_function(op: Forward, backend: str) -> type[torch.autograd.Function]:
    """The forward as a function whose backward is an op of its own, so that a compiler sees one node."""
    backward, names, outputs = op.backward, op.names(), op.outputs.split()
    options = [names.index(option.split()[-1]) for option in backward.options]
    graded = [outputs.index(name) if name in outputs else None for name in backward.outputs.split()]
    fixed = [i for i, name in enumerate(outputs) if name not in backward.outputs.split()]
    # An input of another name than its saved form is the output of that name: the scores of softmax_pool.
    inputs_of = [names.index(name if name in names else "given") for name in backward.inputs.split()]
    whence = [
        ("output", outputs.index(name)) if name in outputs else ("input", names.index(name)) if name in names else None
        for name in backward.saved()
    ]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            result = _below_autograd(op.name + "_fwd", backend, inputs)
            results = result if isinstance(result, tuple) else (result,)
            sources = {"input": inputs, "output": results}
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*(place and sources[place[0]][place[1]] for place in whence))
            ctx.mark_non_differentiable(*(results[i] for i in fixed))
            ctx.options = [inputs[i] for i in options]
            return result

        @staticmethod
        def backward(ctx, *grads):
            found = [None] * len(names)
            grads = [None if i is None else grads[i] for i in graded]
            if any(g is not None for g in grads):
                needs = [ctx.needs_input_grad[i] for i in inputs_of]
                results = _op(backward.name + "_bwd", backend)(*ctx.saved_tensors, *ctx.options, *grads, needs)
                results = (results,) if isinstance(results, Tensor) else results
                for i, gradient, need in zip(inputs_of, results, needs, strict=True):
                    found[i] = gradient if need else None
            return tuple(found)

    Function.__name__ = Function.__qualname__ = op.name
    return Function


def _backward_function(op: Backward, backend: str) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            return _below_autograd(op.name + "_bwd", backend, inputs)

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(f"milkernels: {op.name}_bwd: {backends.DIFFERENTIATED_ONCE}")

    return Function


def _register(name: str, backend: str, schema: str, fake, function: type[torch.autograd.Function]) -> None:
    """Defines one op of one backend. torch.library.register_autograd would do, but it rebuilds the argument list from
    the schema on every call: 90 us a call against 40 us, which bags of a few instances feel."""

    def autograd_kernel(*inputs):
        if _torch.transforming() and any(isinstance(t, Tensor) and _torch.differentiated(t) for t in inputs):
            raise RuntimeError(f"milkernels: {name}: {backends.DIFFERENTIATED_ONCE}")
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return function.apply(*inputs)
        return _below_autograd(name, backend, inputs)

    overload = f"{name}.{backend}"
    _LIBRARY.define(overload + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(overload, autograd_kernel, "Autograd")
    torch.library.register_fake(f"milkernels::{overload}", fake, lib=_LIBRARY)


def declare(*ops: Forward) -> None:
    """Registers ops, and the backwards that they share."""
    FORWARDS.extend(ops)
    EMBEDDED.update(op.name for op in ops if "e_weight" in op.names())
    for backend in backends.KERNELS:
        for op in ops:
            _register(f"{op.name}_fwd", backend, op.schema(), _forward_fake(op), _forward_function(op, backend))
        for op in dict.fromkeys(op.backward for op in ops):
            _register(f"{op.name}_bwd", backend, op.schema(), _backward_fake(op), _backward_function(op, backend))


def call(op: str, backend: str, *inputs, embed: tuple = NO_EMBEDDING):
    """The outputs of ``<op>_fwd``, both in the order declared above; scores and sums in the accumulation type."""
    return _op(f"{op}_fwd", backend)(*inputs, *(embed if op in EMBEDDED else ()))
