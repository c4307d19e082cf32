"""A device that is not there: the host code of the Triton ops runs, its kernels are compiled or only counted.

Tensors are PyTorch's fake ones, so any size costs nothing, and host code that reads from the device raises an error.
"""

import contextlib
import functools
import importlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from milkernels import saving
from milkernels import triton as adapter
from milkernels.ops import contract
from milkernels.testing.cases import embedded_sizes
from milkernels.testing.registry import CASES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_GRID = (2**31 - 1, 65535, 65535)  # CUDA's limits


@dataclass(frozen=True)
class Usage:
    """How an op is called. ``extras`` name what is given besides (see `_GIVEN_WITH`) and options; with "embed", or
    "embed-" and an activation, rows twice as wide as ``L`` are embedded first; with "kept" everything is saved for the
    backward, else nothing."""

    op: str
    dtype: str = "bf16"  # of the rows; "bf16/fp32": of the rows and of the parameters
    L: int = 1024
    D: int = 256
    K: int = 1  # heads, or classes
    extras: tuple[str, ...] = ()
    N: int = 40_000
    B: int = 32  # where there are offsets

    @classmethod
    def parse(cls, line: str) -> "Usage":
        op, dtype, L, D, K, *extras = line.split()
        # Not a multiple of 16 where there are bags: what is a multiple is compiled apart.
        return cls(op, dtype, int(L), int(D), int(K), tuple(extras), N=39_999 if "bags" in extras else 40_000)

    def __str__(self) -> str:
        return " ".join((f"{self.op} {self.dtype} L{self.L} D{self.D} K{self.K}", *self.extras))

    def __contains__(self, extra: str) -> bool:
        return extra in self.extras

    @property
    def embedding(self) -> str | None:
        """Its activation."""
        found = next((extra for extra in self.extras if extra.startswith("embed")), None)
        return found and (found.removeprefix("embed").lstrip("-") or "relu")


@dataclass
class Launch:
    """One launch of a kernel, and what became of it."""

    kernel: object  # triton.JITFunction
    grid: tuple[int, ...]
    args: tuple
    options: dict
    compiled: object = None  # triton's CompiledKernel
    log: str = ""  # the assembler's
    error: str = ""

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass
class Record:
    """What a block of host code launched: kernels in order, and the library's operations by name; and the bytes of each
    tensor that it allocated."""

    kernels: list[Launch] = field(default_factory=list)
    library: Counter = field(default_factory=Counter)
    allocated: list[int] = field(default_factory=list)

    def __sub__(self, earlier: "Record") -> "Record":
        kernels, allocated = self.kernels[len(earlier.kernels) :], self.allocated[len(earlier.allocated) :]
        return Record(kernels, self.library - earlier.library, allocated)

    def copy(self) -> "Record":
        return Record(list(self.kernels), Counter(self.library), list(self.allocated))

    @property
    def total(self) -> int:
        return len(self.kernels) + self.library.total()


@contextlib.contextmanager
def standin(target=None) -> Iterator[Record]:
    """Within the block kernels are compiled for a ``triton.backends.compiler.GPUTarget``, or only counted without one.

    A kernel that does not compile leaves its error in the record, and the host code goes on.
    """
    from milkernels.triton import host

    record = Record()

    def run(kernel, grid, args, options):
        launch = Launch(kernel, grid, args, options)
        record.kernels.append(launch)
        if not all(0 < size <= limit for size, limit in zip(grid, _GRID, strict=False)):
            launch.error = f"grid {grid}"
        elif target is not None:
            _compile(launch)

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(host, "_run", run),
            # Aligned as by CUDA's allocator: to more than any kernel asks for.
            mock.patch.object(
                fake_tensor.FakeTensor, "data_ptr", lambda t: t.storage_offset() * t.itemsize, create=True
            ),
            contextlib.nullcontext() if target is None else _active(target),
            fake_tensor.FakeTensorMode(),
            mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
            _Counting(record),
            _Fake(),
        ):
            stack.enter_context(patch)
        yield record


# Compilation


class _Driver:
    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # the key of what a kernel has compiled

    def get_current_stream(self, device) -> int:
        return 0


@contextlib.contextmanager
def _active(target) -> Iterator[None]:
    from triton.runtime import driver

    previous = driver._active
    driver.set_active(_Driver(target))
    capability = (target.arch // 10, target.arch % 10) if target.backend == "cuda" else (9, 4)
    properties = SimpleNamespace(multi_processor_count=132, major=capability[0], minor=capability[1])
    try:
        with (
            mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
            mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        ):
            yield
    finally:
        driver.set_active(previous)


def _compile(launch: Launch) -> None:
    try:
        launch.compiled, printed = _compiled(launch)
        launch.log = _kept_log(launch.compiled, printed)
        if not launch.log and launch.compiled.metadata.target.backend == "cuda":
            # Somebody else's entry in Triton's cache: without a log.
            from triton import knobs

            launch.kernel.device_caches.clear()
            with knobs.compilation.scope():
                knobs.compilation.always_compile = True
                launch.compiled, printed = _compiled(launch)
            launch.log = _kept_log(launch.compiled, printed)
    except Exception as error:  # of many types: of the frontend, of passes, of the assembler
        launch.error = f"{type(error).__name__}: {_last_line(error)}"


def _compiled(launch: Launch):
    from triton import knobs

    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as printed:
        knobs.nvidia.dump_ptxas_log = True
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    return compiled, printed.getvalue()


def _kept_log(compiled, printed: str) -> str:
    """The assembler's log, kept beside the kernel in Triton's cache, for it is not printed when it comes from there."""
    from triton.runtime.cache import get_cache_manager

    entry = get_cache_manager(compiled.hash)
    if printed:
        entry.put(printed, "ptxas.log", binary=False)
        return printed
    path = entry.get_file("ptxas.log")
    if path is None:
        return ""
    with open(path) as file:
        return file.read()


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in reversed(str(error).splitlines()) if line.strip(" ^")), "")


# What host code must not do, and what else it launches


class _Fake(TorchFunctionMode):
    """Fake CUDA tensors where PyTorch has no CUDA: a few methods look for the device, what they stand for does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        stand_in = _WITHOUT_DEVICE.get(getattr(func, "__name__", ""), func)
        return stand_in(*args, **(kwargs or {}))


def _indexed(t: Tensor, index) -> Tensor:
    dim, indices = 0, index if isinstance(index, tuple) else (index,)
    for place, i in enumerate(indices):
        if i is None:
            t, dim = t.unsqueeze(dim), dim + 1
        elif i is Ellipsis:
            dim = t.dim() - sum(later is not None for later in indices[place + 1 :])
        elif isinstance(i, slice):
            t, dim = torch.ops.aten.slice.Tensor(t, dim, i.start, i.stop, i.step or 1), dim + 1
        elif isinstance(i, Tensor):
            if i.dtype in (torch.bool, torch.uint8):
                return _waits()
            t, dim = torch.ops.aten.index.Tensor(t, [None] * dim + [i]), dim + 1
        else:
            t = t.select(dim, i)
    return t


def _waits(*args):
    raise RuntimeError("a shape that depends on numbers: the host waits for the device")


def _write(t: Tensor, index, value) -> Tensor:
    view = _indexed(t, index)
    return view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)


_WITHOUT_DEVICE = {
    "__getitem__": _indexed,
    "__setitem__": _write,
    "__invert__": torch.bitwise_not,
    "nonzero": _waits,
    "contiguous": lambda t: t if t.is_contiguous() else t.clone(memory_format=torch.contiguous_format),
}


class _Counting(TorchDispatchMode):
    """Operations of the library that run on the device: all but views and allocations; and the size of these."""

    FREE = frozenset(
        ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "promote_types")
    )

    def __init__(self, record: Record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if func.namespace == "aten" and not func.is_view and name not in self.FREE:
            self.record.library[name] += 1
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.device.type != "cuda" or "pin_memory" in name:
                raise RuntimeError(f"{name} moves data between host and device")
            if isinstance(t, Tensor) and not func.is_view and not func._schema.is_mutable:
                self.record.allocated.append(t.numel() * t.itemsize)
        return out


# Calls of ops, from what `ops` declares

_LAYERS = {"u_": "gated", "q2_": "mlp", "v_": "value", "e_": "embed"}  # that may be absent: what asks for them
_GIVEN_WITH = {"offsets": "bags", "mask": "mask", "seed": "drop", "e_seed": "embed", "critical_rows": "rows"}
_TYPES = {
    "critical": torch.int64,
    "offsets": torch.int64,
    "seed": torch.int64,
    "e_seed": torch.int64,
    "mask": torch.bool,
}
_ACTIVATIONS = ("tanh", "relu", "gelu", "identity")


def _tensors(use: Usage, op: contract.Forward) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The tensors of an op with their sizes; and of those that may be absent by which extra they are given."""
    cases = [case for case in CASES.values() if case.op.removeprefix("gated_") == op.name and not case.embeds]
    sizes = {name: size for case in cases for name, size in case.tensors.items()}
    if "scores" in sizes:
        sizes["given"] = sizes["scores"]  # the name of scores that are an input where others are an output
    if "instance_logits" in sizes:
        sizes |= {"critical": ("B", "C"), "critical_rows": ("B", "C", "L")}
    if "query" in sizes and ("shared" in use or "bags" not in use):
        sizes["query"] = sizes["query"][-2:]
    if use.embedding:
        sizes = embedded_sizes(sizes)
    always = set.intersection(*(set(case.tensors) for case in cases))
    words = {f"{layer}{part}": word for layer, word in _LAYERS.items() for part in ("weight", "bias")}
    given_with = _GIVEN_WITH | {name: word for name, word in words.items() if name not in always}
    return sizes | {"offsets": ("O",), "mask": ("N",), "seed": (1,), "e_seed": (1,)}, given_with


def _inputs(use: Usage, op: contract.Forward) -> dict:
    """The inputs of a forward by name."""
    shapes, given_with = _tensors(use, op)
    bags = use.B if "bags" in use else 1
    sizes = {"N": use.N, "L": 2 * use.L if use.embedding else use.L, "E": use.L, "D": use.D, "K": use.K}
    sizes |= {"B": bags, "O": bags + 1, "C": use.K, "Q2": use.D, "V": use.L}  # a value keeps the width
    dtype, _, of_parameters = use.dtype.partition("/")
    rowwise = dict.fromkeys((name for name, size in shapes.items() if size[0] == "N"), DTYPES[dtype])
    types = {"lse": torch.float64 if dtype == "fp64" else torch.float32} | rowwise | _TYPES
    parameter_type = DTYPES[of_parameters or dtype]
    activation = next((name for name in _ACTIVATIONS if name in use), None)
    options = {
        **{"activation": activation or "tanh", "v_activation": activation, "k": 8, "largest": True},
        **{"dropout_p": 0.25 * ("drop" in use), "v_dropout_p": 0.25 * ("drop" in use)},
        **{"scale": None if op.name.startswith("dsmil") else 0.05},
        **{"compute_dtype": torch.bfloat16 if "autocast" in use else None},
    }
    options |= {"embed_activation": use.embedding, "embed_dropout_p": options["dropout_p"] if use.embedding else 0.0}
    options["embed_dtype"] = options["compute_dtype"] if use.embedding else None
    options["saved_bytes"] = saving.ALL if "kept" in use else 0
    given = ("", *use.extras, *(["embed"] if use.embedding else []))

    def absent(name: str) -> bool:
        return given_with.get(name, "") not in given or (name.endswith("bias") and "nobias" in use)

    def value(name: str):
        if name in options and name not in shapes:
            return options[name]
        if absent(name):
            return None
        return torch.empty(
            [sizes.get(s, s) for s in shapes[name]], dtype=types.get(name, parameter_type), device="cuda"
        )

    return {name: value(name) for name in op.arguments.names}


def _backward(use: Usage, op: contract.Forward, inputs: dict, outputs: dict) -> None:
    known, backward = inputs | outputs, op.backward
    graded = backward.outputs.split()
    # The first output alone has a gradient, as in training, unless all are asked for.
    wanted = graded if "grads" in use else graded[:1]
    grads = [torch.empty_like(outputs[n]) if n in wanted and n in outputs else None for n in graded]
    if grads[0] is None:
        grads = [torch.empty_like(outputs[n]) if n in outputs else None for n in graded]
    options = [known[option.split()[-1]] for option in backward.options]
    needs = [isinstance(known[name], Tensor) for name in backward.inputs.split()]
    needs[0] = "frozen" not in use
    saved = [known.get(name) for name in backward.saved]
    _kernel(f"{backward.name}_bwd")(*backward.arguments.grouped((*saved, *options, *grads, needs)))


class _Parts:
    """Triton's kernels of the raw ops that others are composed of."""

    def __getattr__(self, name: str):
        return adapter.kernel(name)


def _kernel(name: str):
    if name not in contract.COMPOSED:
        return adapter.kernel(name)
    return functools.partial(contract.COMPOSED[name][0], _Parts())


def call_op(use: Usage, record: Record) -> tuple[Record, Record]:
    """Calls the op and its backward within a `standin`; what each launched."""
    from milkernels.triton import tuning

    op = next(op for op in contract.FORWARDS if op.name == use.op)
    forced = {"scores": "fused"} if "fused" in use else {}
    forced |= {"products": "split"} if "split" in use else {}
    with tuning.use(**forced), _precision("high" if "tf32" in use else "highest"):
        inputs, start = _inputs(use, op), record.copy()
        out = _kernel(f"{op.name}_fwd")(*op.arguments.grouped(tuple(inputs.values())))
        middle = record.copy()
        outputs = dict(zip(op.outputs.split(), out if isinstance(out, tuple) else (out,), strict=True))
        _backward(use, op, inputs, outputs)
    return middle - start, record - middle


@contextlib.contextmanager
def _precision(wanted: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launches(op: str, extras: str = "", **sizes) -> tuple[Record, Record]:
    """What one call of an op and its backward launch, of kernels and of the library: nothing is compiled, no GPU is
    needed. ``launches("attention_pool", "gated mask", N=100_000)[0].total``; for sizes see `Usage`."""
    with standin() as record:
        return call_op(Usage(op, extras=tuple(extras.split()), **sizes), record)


def modules() -> list:
    """All modules of `milkernels.triton`."""
    import pkgutil

    return [importlib.import_module(f"{adapter.__name__}.{m.name}") for m in pkgutil.iter_modules(adapter.__path__)]
