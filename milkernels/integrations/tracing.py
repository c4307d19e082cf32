"""How a module is traced, fused by its graph and proven: its own forward and the program return the same, with the same
gradients, for bags of several sizes, in eval mode and in training."""

import contextlib
import copy
import inspect
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from milkernels._torch import TorchDispatchMode, in_python, pytree
from milkernels.integrations import calls, program, proof
from milkernels.integrations import graph as graphs
from milkernels.integrations.calls import Call
from milkernels.integrations.layers import Unfusable, original_class, refuse
from milkernels.integrations.traced import PLAIN, Traced, Variant, parameters_of, state_of

# Tracing


class _Call(nn.Module):
    """A call by names as one by position, which is what export takes."""

    def __init__(self, module: nn.Module, example: Call):
        super().__init__()
        self.module, self.training = module, module.training
        self.names = [name for name, value in example.items() if isinstance(value, Tensor)]
        self.constants = {name: value for name, value in example.items() if not isinstance(value, Tensor)}

    def forward(self, *tensors):
        return self.module(**dict(zip(self.names, tensors, strict=True)), **self.constants)


def exported(module: nn.Module, example: Call) -> torch.export.ExportedProgram:
    """The call as a graph, with symbols for the sizes that nothing in the module fixes."""
    call = _Call(module, example)
    tensors = tuple(example[name] for name in call.names)
    shapes = tuple({i: torch.export.Dim.AUTO for i, size in enumerate(t.shape) if size > 1} for t in tensors)
    try:
        with _quiet():
            return torch.export.export(call, tensors, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        refuse(f"it cannot be traced: {_told(error)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what is logged and printed of calls and graphs that cannot be made: the report says it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _told(error: BaseException) -> str:
    """The first line, in words that a person understands where it is a frequent one."""
    text = str(error)
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__ or ".item()" in text:
        return "what it does depends on the numbers in its tensors"
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"


def trace(module: nn.Module, example: Call) -> Variant:
    """The program for calls like the example, in the mode that the module is in."""
    traced = exported(module, example)
    graph = traced.graph
    tensors, buffers = [], set()
    for spec, node in zip(traced.graph_signature.input_specs, graph.nodes, strict=False):
        if spec.kind.name in ("PARAMETER", "BUFFER"):
            path = spec.target.removeprefix("module.")
            tensors.append((path.rpartition(".")[0], path.rpartition(".")[2]))
            buffers |= {node} if spec.kind.name == "BUFFER" else set()
        elif spec.kind.name != "USER_INPUT":
            refuse("its forward makes tensors of numbers of its own")
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            refuse("its forward switches gradients or other modes, or checkpoints")
    written = graphs.without_writes(graph, buffers)
    matches = graphs.find(graph, written)
    if not matches:
        raise graphs.why_none(graph)
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"][len(tensors) :]
    fits = _fits(values)
    program.fuse(graph, matches)
    _nest_output(graph, traced.call_spec.out_spec)
    given = tuple((name, Tensor if isinstance(value, Tensor) else value) for name, value in example.items())
    inputs = [value for value in example.values() if isinstance(value, Tensor)]
    first = next(p for p in module.parameters() if p.is_floating_point())
    fixed = (inputs[0].dtype, str(first.device)) if graphs.has_fixed_types(graph) else None
    types = tuple(None if t.is_floating_point() else t.dtype for t in inputs)
    embedding = all(match.front for match in matches)
    return Variant(module.training, given, types, fits, program.source(graph), tuple(tensors), fixed, embedding)


def _nest_output(graph, spec) -> None:
    """Returns what the module returns, not the list of tensors in it."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    nested = pytree.tree_unflatten(list(output.args[0]), spec)
    _check_output(nested)
    output.args = (nested,)


def _check_output(value: Any) -> None:
    if type(value) is dict:
        value = tuple(value.values())
    if type(value) in (tuple, list):
        for inner in value:
            _check_output(inner)
    elif not isinstance(value, (torch.fx.Node, *PLAIN)):
        refuse(f"it returns a {type(value).__name__}")


def _fits(values: list[Tensor]) -> str:
    """A function of the shapes of a call's tensors: whether they are those of the graph, which has symbols in them."""
    lines, conditions, known = [], [], set()
    environment = None
    for i, tensor in enumerate(values):
        conditions.append(f"len(s{i}_) == {tensor.ndim}")
        for j, size in enumerate(tensor.shape):
            symbol = graphs.size_of(size)
            if isinstance(symbol, int):
                conditions.append(f"s{i}_[{j}] == {symbol}")
                continue
            environment = size.node.shape_env
            if not symbol.is_symbol:
                refuse("the sizes that it takes depend on each other")
            name = str(symbol)
            if name in known:
                conditions.append(f"{name} == s{i}_[{j}]")
            else:
                known.add(name)
                conditions.append(f"({name} := s{i}_[{j}]) >= 2")
    for guard in environment.guards if environment is not None else ():
        expression = environment.simplify(guard.expr)  # without symbols that turned out to be numbers
        if not {str(s) for s in expression.free_symbols} <= known:
            refuse("which way its forward goes depends on the numbers in its tensors")
        if expression.free_symbols:
            conditions.append(f"({in_python(expression)})")
    names = ", ".join(f"s{i}_" for i in range(len(values)))
    lines = [
        f"def forward({names}):",
        "    return (",
        *(f"        {c} and" for c in conditions),
        "        True",
        "    )",
    ]
    return "\n".join(lines) + "\n"


# Proving


class _WithoutDropout(TorchFunctionMode):
    """Dropout drops nothing: what is left of a training step can be compared."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "").partition(".")[0].rstrip("_")
        if name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
            return args[0] if args else kwargs["input"]
        return function(*args, **(kwargs or {}))


def prove(subject: nn.Module, variant: Variant, example: Call, values: bool) -> None:
    """Runs the module's own forward and the program on bags of several sizes and compares what they return; and all
    gradients, where ``values`` are to be compared exactly."""
    generator, compared = torch.Generator().manual_seed(2), 0
    for sizes in calls.sizes(example):
        given = calls.resized(example, sizes, generator)
        if not variant.serves(given):
            continue  # its forward goes another way there
        compared += 1
        if values:
            given = {k: v.requires_grad_() if _differentiable(v) else v for k, v in given.items()}
        with torch.set_grad_enabled(values), _WithoutDropout():
            proof.seed(subject)
            theirs = subject(**given)
            proof.seed(subject)
            try:
                ours = variant.run(subject, given, dropping=False)
            except Exception as error:
                refuse(f"fused, its forward raised {proof.line(error)}")
        kind = "in training" if variant.training else "in eval mode"
        if found := proof.differ(ours, theirs, None, values):
            refuse(f"fused, its forward returns other results {kind}: its own are {found}")
        if values and (found := _gradients_differ(subject, given, ours, theirs)):
            refuse(f"fused, it has other gradients {kind}: {found}")
    if compared < 2:
        refuse("its graph serves bags of one size alone")


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _gradients_differ(module: nn.Module, given: Call, ours: Any, theirs: Any) -> str | None:
    wanted = {name: t for name, t in [*given.items(), *module.named_parameters()] if _differentiable(t)}
    found = []
    for result in (ours, theirs):
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
        generator = torch.Generator().manual_seed(3)
        directions = [torch.randn(t.shape, generator=generator, device="cpu").to(t) for t in outputs]
        if not outputs:
            return "none" if result is ours and found else None
        found.append(torch.autograd.grad(outputs, list(wanted.values()), directions, allow_unused=True))
    for name, a, b in zip(wanted, *found, strict=True):
        if (a is None) is not (b is None):
            return f"{name} has one in one of them alone"
        if a is not None and (different := proof.differ(a, b, None, True)):
            return f"that of {name} has {different}"
    return None


# Whether a module can be fused


def fused_by_graph(module: nn.Module, example: Call | None) -> Traced:
    """The structure that serves this one module.  Raises ``Unfusable`` with the reason where there is none."""
    if "forward" in vars(module) or not inspect.isfunction(getattr(original_class(module), "forward", None)):
        raise graphs.NoPooling("its forward is not a method of its class")
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        refuse("it has submodules that are compiled by TorchScript")
    takes, state = parameters_of(module), state_of(module)
    with proof.isolated(module), contextlib.redirect_stdout(io.StringIO()) as printed:
        own = unfused(module)
        accepted = _accepted(own, [[example]] if example is not None else calls.guesses(own, takes))
        _check_effects(own, accepted[0])
        if printed.getvalue():
            refuse("its forward prints")
        variants, reasons = _variants(own, accepted)
    if not any(not variant.training for variant in variants):
        raise next((reason for reason in reasons if not isinstance(reason, graphs.NoPooling)), reasons[0])
    in_training = next((f"in training its own forward runs: {reason}" for reason in reasons[::-1]), "")
    return Traced(state, takes, _aliases(module), tuple(variants), in_training)


def unfused(module: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        refuse(f"it cannot be copied: {proof.line(error)}")
    for inner in copied.modules():
        inner.__class__ = original_class(inner)
    return copied


def _accepted(own: nn.Module, guesses: Iterable[list[Call]]) -> list[Call]:
    """The first calls, all of one width, that its forward takes."""
    error = None
    with torch.no_grad(), proof.mode(own, False):
        for found in guesses:
            taken, softmax = [], _Softmax()
            for call in found:
                try:
                    with _quiet(), softmax:
                        own(**call)
                    taken.append(call)
                except Exception as raised:
                    error = error or raised
            if taken and not softmax.called:
                raise graphs.NoPooling("it takes no softmax")
            if taken:
                return taken
    raise calls.Unknown(f"its forward did not take the bags that were tried: {proof.line(error)}")


class _Softmax(TorchDispatchMode):
    """Whether one is called over instances: over a dimension of many, of which there is only one."""

    called = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.partition(".")[0] in ("_softmax", "_safe_softmax"):
            scores, dim = args[:2]
            many = scores.shape[dim] if scores.ndim else 0
            self.called |= many >= calls.FEW and scores.numel() <= many * calls.BAGS * graphs.MOST_HEADS
        return function(*args, **(kwargs or {}))


def _variants(own: nn.Module, accepted: list[Call]) -> tuple[list[Variant], list[Unfusable]]:
    """Those that prove right, and why others are not there."""
    wide, variants, reasons, served = proof.widened(own), [], [], set()
    for call in accepted:
        for training in (False, True):
            kind = (training, tuple(call), *_layout(call))
            if kind in served:
                continue
            with proof.mode(own, training), proof.mode(wide, training):
                try:
                    variants.append(_proven(own, wide, call))
                    served.add(kind)
                except Unfusable as reason:
                    reasons.append(reason)
                    if not training:
                        break
    return variants, reasons


def _layout(call: Call) -> tuple[int, bool]:
    """The dimensions of the bags, and whether there is one alone; masks of several shapes are tried for each."""
    x = next(value for value in call.values() if isinstance(value, Tensor))
    return x.ndim, x.shape[0] == 1


def _proven(own: nn.Module, wide: nn.Module, call: Call) -> Variant:
    variant = trace(own, call)
    prove(own, variant, call, values=False)
    first = next(p for p in wide.parameters() if p.is_floating_point())
    wider = {k: v.to(first) if _differentiable(v) else v for k, v in call.items()}
    exact = variant if variant.fixed is None else trace(wide, wider)
    prove(wide, exact, wider, values=True)
    return variant


def _aliases(module: nn.Module) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Names of the same parameter: export knows it by one of them."""
    names: dict[int, list] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append((name.rpartition(".")[0], name.rpartition(".")[2]))
    return tuple(tuple(same) for same in names.values() if len(same) > 1)


# What a forward does beside returning something


def _check_effects(own: nn.Module, call: Call) -> None:
    """A graph would leave it out, or make it once and for all."""
    for training in (False, True):
        with proof.mode(own, training), torch.no_grad():
            before, drawn, seen = state_of(own, tensors=True), _python_random(), _globals(own)
            try:
                own(**call)
            except Exception as error:
                if not training:
                    refuse(f"its forward raised {proof.line(error)}")
                continue  # BatchNorm of one bag, say: there will be no variant for it
        if state_of(own, tensors=True) != before or _globals(own) != seen:
            refuse("its forward sets attributes or variables, which a graph would not")
        if _python_random() != drawn:
            refuse("its forward draws random numbers that are not PyTorch's")


def _python_random() -> tuple:
    numpy = sys.modules.get("numpy")
    return random.getstate(), numpy and repr(numpy.random.get_state())


def _globals(own: nn.Module) -> tuple:
    """Plain values and collections among the global variables that forwards name."""
    found = {}
    for module in own.modules():
        code = getattr(type(module).forward, "__code__", None)
        for name in code.co_names if code is not None else ():
            value = getattr(type(module).forward, "__globals__", {}).get(name)
            if isinstance(value, list | dict | set):
                found[type(module), name] = len(value)
            elif isinstance(value, PLAIN):
                found[type(module), name] = value
    return tuple(found.items())
