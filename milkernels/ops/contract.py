"""The contract of every compiled op: schema, fake, autograd.

One schema per op; the overload name is the backend (``milkernels::softmax_pool_fwd.native``), so PyTorch's
dispatcher goes straight to the kernel of that backend and device, and the fake and autograd registrations below
serve all of them.  Kernels are registered elsewhere: in ``csrc`` for ``native``.

An op is declared as a `Forward`, what it saves and differentiates as a `Backward`; both schemas, the fakes, the
autograd function and the batching rule are made from these.  Ops of one `Backward` share a kernel.

A schema has the weights of an op in one list, and the layer in front of it in another.  ``torch.autograd.Function``
does not see tensors inside of lists, so here every tensor has a name and a place of its own, and `Arguments` says how
these are grouped for a kernel.

Autocast: an op is opaque to autocast (the key falls through).  ``compute_dtype`` carries the autocast type, and the
kernels convert operands tile by tile; casting ``x`` as a whole would keep an [N, L] copy for the backward.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from milkernels import _torch, backends, native, saving
from milkernels import triton as adapter
from milkernels.dtypes import accumulation_dtype

_LIBRARY = torch.library.Library("milkernels", "DEF")
FORWARDS: list["Forward"] = []  # every op that was declared
EMBEDDED: set[str] = set()  # ops that take an embedding
KEEPING: set[str] = set()  # ops that keep what their backward would compute again, up to so many bytes
PARTS: list[str] = []  # raw ops that others are composed of
COMPOSED: dict[str, tuple[Callable, "Arguments"]] = {}  # composed raw ops: functions that take a backend's parts first

BAGS = "Tensor? offsets, Tensor? mask"
# The layer in front of an op: ``drop(act(W x + b))`` takes the place of x. Where the list is empty, there is none.
# It has a seed and a type of its own, so that it is the same for every op.
_EMBED = "embed?[e_weight e_bias e_seed]"
_EMBED_OPTIONS = ("str? embed_activation", "float embed_dropout_p", "ScalarType? embed_dtype")
NO_EMBEDDING = (None, None, None, None, 0.0, None)


class Arguments:
    """The arguments of an op: flat, each tensor under a name of its own, and grouped, as its schema has them.

    Declared as in a schema, but for the lists of tensors, which name their elements: ``weights[v_weight v_bias]`` is
    ``Tensor?[] weights`` of two.  The first of a list is always there, but ``embed?[..]`` may be empty.
    """

    def __init__(self, declarations: Sequence[str]):
        schema, self.names, self._lists = [], [], []
        self.tensors = []  # the places of tensors among flat arguments
        self.floats = []  # the names of floats
        for place, declaration in enumerate(declarations):
            if found := re.fullmatch(r"(\w+)(\??)\[(.*)\]", declaration):
                name, optional, elements = found[1], bool(found[2]), found[3].split()
                first = len(self.names)
                self._lists.append((name, optional, place, first, first + len(elements)))
                self.tensors += range(first, first + len(elements))
                self.names += elements
                schema.append(f"Tensor?[] {name}")
            else:
                if declaration.startswith("Tensor"):
                    self.tensors.append(len(self.names))
                if declaration.startswith("float"):
                    self.floats.append(declaration.split()[-1])
                self.names.append(declaration.split()[-1])
                schema.append(declaration)
        self.schema = ", ".join(schema)

    @property
    def lists(self) -> list[tuple[int, int, bool]]:
        """The lists among flat arguments: where they begin and end, and whether they may be empty."""
        return [(first, last, optional) for _, optional, _, first, last in self._lists]

    def grouped(self, flat: Sequence) -> Sequence:
        if not self._lists:
            return flat
        out, at = [], 0
        for _, optional, _, first, last in self._lists:
            out += flat[at:first]
            out.append([] if optional and flat[first] is None else list(flat[first:last]))
            at = last
        out += flat[at:]
        return out

    def flat(self, grouped: Sequence) -> Sequence:
        if not self._lists:
            return grouped
        out, at = [], 0
        for name, optional, place, first, last in self._lists:
            out += grouped[at:place]
            elements, count = grouped[place], last - first
            if len(elements) == count:
                if elements[0] is None:
                    raise ValueError(f"{self.names[first]} must be a tensor; got None")
                out += elements
            elif optional and len(elements) == 0:
                out += [None] * count
            else:
                must = "must be empty or have" if optional else "must have"
                elements = f"{count} elements, {', '.join(self.names[first:last])}; got {len(elements)}"
                raise ValueError(f"{name} {must} {elements}")
            at = place + 1
        out += grouped[at:]
        return out


def _declared(text: str, separator: str) -> list[str]:
    """What stands between separators outside of brackets."""
    return re.split(separator + r"(?![^\[]*\])", text)


@dataclass(frozen=True)
class Backward:
    """``<name>_bwd(saves, options, gradients of outputs, needs) -> gradients of inputs``.

    ``saves`` are inputs and outputs of the forward by name, ``name?`` where it may be None, and lists as `Arguments`
    has them; the gradient of an output may be None where there are several.  ``needs`` says which of ``inputs`` want a
    gradient; the others come back as empty tensors.  A gradient has the type of what is saved under its name: that of
    the input, or of accumulation.
    """

    name: str
    inputs: str  # that have a gradient
    saves: str
    outputs: str  # that have a gradient
    options: tuple[str, ...] = ()
    embeds: bool = False  # whether the ops take an embedding, which has gradients too
    keeps: bool = False  # whether it takes what the forward kept of embedded rows and hidden units

    def __post_init__(self):
        if self.embeds:
            object.__setattr__(self, "inputs", f"{self.inputs} e_weight e_bias")
            object.__setattr__(self, "saves", f"{self.saves} {_EMBED}")
            object.__setattr__(self, "options", (*self.options, *_EMBED_OPTIONS))
        if self.keeps:
            object.__setattr__(self, "saves", f"{self.saves} kept")

    @property
    def full_name(self) -> str:
        return f"{self.name}_bwd"

    @cached_property
    def _saves(self) -> list[str]:
        """As `Arguments` takes them."""
        saves = _declared(self.saves, " ")
        return [s if "[" in s else f"Tensor? {s[:-1]}" if s.endswith("?") else f"Tensor {s}" for s in saves]

    @cached_property
    def saved(self) -> list[str]:
        return Arguments(self._saves).names

    @cached_property
    def arguments(self) -> Arguments:
        optional = "?" if len(self.outputs.split()) > 1 else ""
        grads = [f"Tensor{optional} grad_{name}" for name in self.outputs.split()]
        return Arguments([*self._saves, *self.options, *grads, f"bool[{len(self.inputs.split())}] needs"])

    def schema(self) -> str:
        count = len(self.inputs.split())
        results = ", ".join(["Tensor"] * count)
        return f"({self.arguments.schema}) -> {f'({results})' if count > 1 else results}"


@dataclass(frozen=True)
class Forward:
    """``<name>_fwd(inputs) -> outputs``; ``shapes`` gives those of the outputs, from the inputs by name.

    Where the backward takes it, a last output is ``kept``, bytes that are laid out as the backend likes: at most
    ``saved_bytes`` of the embedded rows and of the products of layers with ``hidden`` units, again from the inputs.
    """

    name: str
    inputs: str
    outputs: str
    shapes: Callable[..., tuple]
    backward: Backward
    indices: str = ""  # outputs of int64
    typed: str = ""  # outputs in the type of the first input; the others accumulate in float32, float64 for float64
    hidden: Callable[..., tuple[int, ...]] = lambda **_: ()

    def __post_init__(self):
        if self.backward.embeds:
            object.__setattr__(self, "inputs", ", ".join((self.inputs, _EMBED, *_EMBED_OPTIONS)))
        if self.backward.keeps:
            object.__setattr__(self, "inputs", f"{self.inputs}, int saved_bytes")
            object.__setattr__(self, "outputs", f"{self.outputs} kept")

    @property
    def full_name(self) -> str:
        return f"{self.name}_fwd"

    @cached_property
    def arguments(self) -> Arguments:
        return Arguments(_declared(self.inputs, ", "))

    def schema(self) -> str:
        outputs = [f"Tensor {name}" for name in self.outputs.split()]
        return f"({self.arguments.schema}) -> {'(' + ', '.join(outputs) + ')' if len(outputs) > 1 else 'Tensor'}"


def num_bags(offsets: Tensor | None) -> int:
    return 1 if offsets is None else offsets.shape[0] - 1


def pooled_width(x, e_weight=None):
    """The width of the instances that an op pools, embedded or not."""
    return x.shape[1] if e_weight is None else e_weight.shape[0]


def kept_bytes(op: Forward, x, e_weight=None, compute_dtype=None, embed_dtype=None, saved_bytes=0, **others):
    """How many bytes it keeps of a call."""
    product = compute_dtype or embed_dtype or x.dtype
    return saving.kept_bytes(x, saved_bytes, product, 0 if e_weight is None else e_weight.shape[0], op.hidden(**others))


def pooled_shapes(x, offsets, heads, width):
    bags, rows = num_bags(offsets), x.shape[0]
    return (bags, heads, width), (rows, heads), (bags, heads)


# Fakes


def _forward_fake(op: Forward):
    names, outputs = op.arguments.names, op.outputs.split()

    def fake(*arguments):
        if torch.onnx.is_in_onnx_export():  # whose own error would come late and name no way out
            raise RuntimeError(f"milkernels: {op.name}: {backends.NOT_IN_ONNX}")
        inputs = op.arguments.flat(arguments)
        first = inputs[0]
        dtypes = {name: torch.int64 for name in op.indices.split()} | {name: first.dtype for name in op.typed.split()}
        by_name = dict(zip(names, inputs, strict=True))
        shapes = op.shapes(**by_name)
        if op.backward.keeps:
            dtypes["kept"], shapes = torch.uint8, (*shapes, (kept_bytes(op, **by_name),))
        results = tuple(
            first.new_empty(shape, dtype=dtypes.get(name, accumulation_dtype(first)))
            for name, shape in zip(outputs, shapes, strict=True)
        )
        return results if len(results) > 1 else results[0]

    return fake


def _backward_fake(op: Backward):
    places = [op.saved.index(name) for name in op.inputs.split()]

    def fake(*arguments):
        args = op.arguments.flat(arguments)
        results = tuple(
            torch.empty_like(args[place], memory_format=torch.contiguous_format) if need else args[0].new_empty(0)
            for place, need in zip(places, args[-1], strict=True)
        )
        return results if len(results) > 1 else results[0]

    return fake


# Autograd


def _requires_grad(inputs, tensors: Sequence[int]) -> bool:
    for i in tensors:  # noqa: SIM110, a generator takes three times as long
        if inputs[i] is not None and inputs[i].requires_grad:
            return True
    return False


class _Plan:
    """What the backward of an op takes from its forward, as places among the flat inputs, or inputs and then outputs;
    None for what this op of several does not have."""

    def __init__(self, op: Forward):
        backward, names, outputs = op.backward, op.arguments.names, op.outputs.split()
        values = [*names, *outputs]
        self.saved = [
            len(names) + outputs.index(name) if name in outputs else values.index(name) if name in values else None
            for name in backward.saved
        ]
        self.options = [names.index(option.split()[-1]) for option in backward.options]
        self.gradients = [outputs.index(name) if name in outputs else None for name in backward.outputs.split()]
        self.has_gradient = [name in backward.outputs.split() for name in outputs]
        # An input of another name than its saved form is the output of that name: the scores of softmax_pool.
        self.differentiable = [names.index(name if name in names else "given") for name in backward.inputs.split()]


def _without_python(op: Forward, backend: str, plan: _Plan) -> Callable | None:
    """The function below and the way to it, in C++."""

    def numbers(places: list[int | None]) -> list[int]:
        return [-1 if place is None else place for place in places]

    return native.differentiable_call(
        backend=backend,
        forward=f"milkernels::{op.full_name}",
        forward_lists=op.arguments.lists,
        backward=f"milkernels::{op.backward.full_name}",
        backward_lists=op.backward.arguments.lists,
        is_float=[name in op.arguments.floats for name in op.arguments.names],
        saved=numbers(plan.saved),
        options=plan.options,
        gradients=numbers(plan.gradients),
        has_gradient=plan.has_gradient,
        differentiable=plan.differentiable,
        keeps=op.backward.keeps,
    )


def _forward_function(op: Forward, backend: str, plan: _Plan) -> type[torch.autograd.Function]:
    """The forward as a function whose backward is an op of its own, so that a compiler sees one node."""
    backward, names = op.backward, op.arguments.names
    forward_op = _torch.direct(_entry(op.full_name, backend))
    backward_op = _entry(backward.full_name, backend)  # not shorter: compiled autograd traces it
    recorded_backward_op = _overload(backward.full_name, backend)
    grouped, grouped_saves = op.arguments.grouped, backward.arguments.grouped
    non_differentiable = [i for i, has in enumerate(plan.has_gradient) if not has]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            if _here.forwards is None:
                with _torch.below_autograd():
                    result = forward_op(*grouped(inputs))
            else:
                result = _here.forwards.taken()
            results = result if isinstance(result, tuple) else (result,)
            known = (*inputs, *results)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[None if i is None else known[i] for i in plan.saved])
            if non_differentiable:
                ctx.mark_non_differentiable(*[results[i] for i in non_differentiable])
            ctx.options = [inputs[i] for i in plan.options]
            return result

        @staticmethod
        def backward(ctx, *grads):
            found = [None] * len(names)
            grads = [None if i is None else grads[i] for i in plan.gradients]
            if any(g is not None for g in grads):
                wanted = ctx.needs_input_grad
                needs = [wanted[i] for i in plan.differentiable]
                op = recorded_backward_op if torch.is_grad_enabled() else backward_op
                results = op(*grouped_saves((*ctx.saved_tensors, *ctx.options, *grads, needs)))
                results = (results,) if isinstance(results, Tensor) else results
                for i, gradient, need in zip(plan.differentiable, results, needs, strict=True):
                    found[i] = gradient if need else None
            return tuple(found)

    Function.__name__ = Function.__qualname__ = op.name
    return Function


def _backward_function(op: Backward, backend: str) -> type[torch.autograd.Function]:
    backward_op = _overload(f"{op.name}_bwd", backend)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with _torch.below_autograd():
                return backward_op(*op.arguments.grouped(inputs))

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(f"milkernels: {op.name}_bwd: {backends.DIFFERENTIATED_ONCE}")

    return Function


# Batching


def _sliced(operand: Tensor | None, dim: int | None, i: int) -> Tensor | None:
    return operand if dim is None else operand.select(dim, i)


def _batching_rule(op: _torch.OpOverload):
    """One call for each slice. PyTorch's own fallback is this too, but does not look into lists."""

    def rule(info, in_dims, *arguments):
        operands, spec = _torch.pytree.tree_flatten(arguments)
        dims = _torch.pytree.tree_leaves(in_dims)  # None, which is a leaf too, for what is the same in all slices
        slices = []
        for i in range(info.batch_size):
            leaves = [_sliced(operand, dim, i) for operand, dim in zip(operands, dims, strict=True)]
            slices.append(op(*_torch.pytree.tree_unflatten(leaves, spec)))
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0,) * len(slices[0])

    return rule


# Registration


def declare(*ops: Forward, triton: str | None = None, composed: ModuleType | None = None) -> None:
    """Registers ops, the backwards that they share, and Triton's kernels for them: those of ``milkernels.triton``'s
    module of that name.  Kernels in C++ register themselves when their module is loaded.  The kernels of ops that are
    ``composed`` are functions of this module, which take the raw ops of a backend first."""
    FORWARDS.extend(ops)
    EMBEDDED.update(op.name for op in ops if op.backward.embeds)
    KEEPING.update(op.name for op in ops if op.backward.keeps)
    backwards = dict.fromkeys(op.backward for op in ops)
    for op in (*ops, *backwards):
        for backend in backends.KERNELS:
            _define(op, backend)
        if triton is not None:
            adapter.register(op.full_name, triton)
        else:
            _compose(op, composed)
    for backend in backends.KERNELS:
        for op in ops:
            plan = _Plan(op)
            function = _forward_function(op, backend, plan)
            _implement(op, backend, _forward_fake(op), function)
            overload = _overload(op.full_name, backend)
            entry = _torch.direct(_entry(op.full_name, backend))
            _CALLS[op.name, backend] = overload, entry, _torch.direct_apply(function), op.arguments
            if composed is None and (short := _without_python(op, backend, plan)):
                _SHORT[op.name, backend] = short
        for op in backwards:
            _implement(op, backend, _backward_fake(op), _backward_function(op, backend))


def declare_part(name: str, schema: str, triton: str) -> None:
    """Registers a raw op of which others are composed: each backend has a kernel for it, and no one differentiates
    it."""
    PARTS.append(name)
    for backend in backends.KERNELS:
        _LIBRARY.define(f"{name}.{backend}{schema}")
    adapter.register(name, triton)


class _Parts:
    """The raw ops of a backend, by name; ``short`` where nobody looks on."""

    def __init__(self, backend: str, short: bool = False):
        self._backend, self._short = backend, short

    def __getattr__(self, name: str) -> Callable:
        op = (native.raw_call(name, self._backend) if self._short else None) or _overload(name, self._backend)
        setattr(self, name, op)
        return op


def register_composed(name: str, backend: str, device: str) -> None:
    (function, declared), parts = COMPOSED[name], _Parts(backend)

    def kernel(*arguments):
        declared.flat(arguments)  # checks the lists
        with _torch.without_autocast():
            return function(parts, *arguments)

    _LIBRARY.impl(f"{name}.{backend}", kernel, device.upper())


def _compose(op: Forward | Backward, module: ModuleType) -> None:
    name = op.full_name
    COMPOSED[name] = getattr(module, name), op.arguments
    for backend, adapter_of in backends.KERNELS.items():
        for device in adapter_of.device_types():
            if backend == "triton" or adapter_of.load_error(device) is None:  # Triton is looked for when a kernel runs
                register_composed(name, backend, device)


def _entry(name: str, backend: str) -> Callable:
    """Calls a raw op.  Where it is composed and nobody looks on, its function is called without the dispatcher, which
    makes every argument twice."""
    overload = _overload(name, backend)
    if name not in COMPOSED:
        return overload
    function, parts = COMPOSED[name][0], _Parts(backend, short=True)

    def enter(x: Tensor, *others):
        if not _torch.unobserved(x):
            return overload(x, *others)
        with _torch.below_autograd(), _torch.without_autocast():
            return function(parts, x, *others)

    return enter


# By (op, backend): the forward, shorter ways to it and to its autograd function, its arguments.
_CALLS: dict[tuple[str, str], tuple] = {}
_SHORT: dict[tuple[str, str], Callable] = {}  # both, without Python, for tensors that nobody looks into


def _overload(name: str, backend: str) -> _torch.OpOverload:
    return getattr(getattr(torch.ops.milkernels, name), backend)


def _define(op: Forward | Backward, backend: str) -> None:
    _LIBRARY.define(f"{op.full_name}.{backend}{op.schema()}", tags=(torch.Tag.pt2_compliant_tag,))


def _implement(op: Forward | Backward, backend: str, fake, function: type[torch.autograd.Function]) -> None:
    """Autograd and fake of one op of one backend. torch.library.register_autograd would do, but it rebuilds the
    argument list from the schema on every call: 90 us a call against 40 us, which bags of a few instances feel."""
    overload, declared = _overload(op.full_name, backend), op.arguments

    def autograd_kernel(*arguments):
        if _torch.transforming():
            inputs = declared.flat(arguments)
            tensors = [inputs[i] for i in declared.tensors if inputs[i] is not None]
            if any(_torch.differentiated(t) for t in tensors):
                raise RuntimeError(f"milkernels: {op.full_name}: {backends.DIFFERENTIATED_ONCE}")
        if torch.is_grad_enabled():
            inputs = declared.flat(arguments)
            if _requires_grad(inputs, declared.tensors):
                return function.apply(*inputs)
        with _torch.below_autograd():
            return overload(*arguments)

    _LIBRARY.impl(f"{op.full_name}.{backend}", autograd_kernel, "Autograd")
    torch.library.register_fake(f"milkernels::{op.full_name}.{backend}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"milkernels::{op.full_name}.{backend}", _batching_rule(overload), lib=_LIBRARY)


def call(op: str, backend: str, *inputs, embed: tuple = NO_EMBEDDING):
    """The outputs of ``<op>_fwd``, both in the order declared above, the inputs flat; scores and sums in the
    accumulation type."""
    overload, entry, apply, declared = _CALLS[op, backend]
    if op in EMBEDDED:
        inputs = (*inputs, *embed)
    if _here.forwards is not None:
        return _here.forwards.call(op, backend, inputs)
    if _torch.unobserved(inputs[0]) and (short := _SHORT.get((op, backend))):
        return short(*inputs, saving.limit_of(inputs[0])) if op in KEEPING else short(*inputs)
    differentiated = torch.is_grad_enabled() and _requires_grad(inputs, declared.tensors)
    if keeps := op in KEEPING:
        inputs = (*inputs, saving.limit_of(inputs[0]) if differentiated and not torch.compiler.is_exporting() else 0)
    if not _torch.eager():
        results = overload(*declared.grouped(inputs))
    # What the kernel of autograd does, without the way there: the dispatcher makes every argument twice.
    elif differentiated:
        results = apply(*inputs)
    else:
        with _torch.below_autograd():
            results = entry(*declared.grouped(inputs))
    if not keeps:
        return results
    return results[:-1] if len(results) > 2 else results[0]


# A backward without its forward, for what is read again


class _Here(threading.local):
    forwards: "Forwards | None" = None


_here = _Here()


class Forwards:
    """The raw forwards of a block that records them, in turn, for one that resumes them: there the same calls get these
    results, and a graph to the same backward, and no kernel runs.  So the backward of a piece needs no other forward
    than the one that was.  The reference has no raw forwards: its calls run again.

    Args:
        limit: how many bytes these forwards may keep, all together, of what their backward would compute again.
    """

    def __init__(self, limit: int):
        self._left, self._results, self._next = limit, [], None

    @property
    def kept(self) -> int:
        """The bytes that they keep."""
        return sum(results[-1].numel() for keeps, results in self._results if keeps)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """The block in which they run, where no gradients are recorded."""
        self._results.clear()
        with self._active(None):
            yield

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """A block with the same calls on the same numbers."""
        if not self._results:
            yield
            return
        with self._active(0):
            yield

    @contextlib.contextmanager
    def _active(self, first: int | None) -> Iterator[None]:
        before, self._next, _here.forwards = _here.forwards, first, self
        try:
            yield
        finally:
            _here.forwards = before

    def call(self, op: str, backend: str, inputs: Sequence):
        _, entry, apply, declared = _CALLS[op, backend]
        if keeps := op in KEEPING:
            inputs = (*inputs, self._left)
        if self._next is not None:
            results = apply(*inputs)
        else:
            with _torch.below_autograd():
                results = entry(*declared.grouped(inputs))
            self._results.append((keeps, results if isinstance(results, tuple) else (results,)))
            self._left -= results[-1].numel() if keeps and self._left > 0 else 0
        if not keeps:
            return results
        return results[:-1] if len(results) > 2 else results[0]

    def taken(self):
        """The results of the next call, as tensors of their own, which a graph may begin at."""
        _, results = self._results[self._next]
        self._next += 1
        results = tuple(t.detach() for t in results)
        return results if len(results) > 1 else results[0]
