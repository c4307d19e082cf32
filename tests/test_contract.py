"""What the compiled ops promise besides numbers: they are the ones that run, they are sound torch.library ops (fakes,
autograd, compile, export), they refuse what would read out of bounds, and they keep to their memory."""

import contextlib

import pytest
import torch
from op_cases import (
    CASES,
    COMPILED,
    PLAIN,
    close,
    compiled,
    every_kernel,
    has_kernel,
    needs_extension,
    offsets_of,
    step,
    threads,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from milkernels import saved_bytes
from milkernels.ops import contract

pytestmark = needs_extension

LENGTHS = (30, 0, 35, 5)
# No two sizes are equal, so that no check of shapes passes by chance.
SIZES = {"L": 12, "D": 8, "K": 2, "C": 3, "Q2": 6, "V": 9}
MASK = torch.arange(70) % 5 > 0
VARIANTS = (
    "attention_pool-gelu-dropout",
    "gated_attention_pool-dropout",
    "query_pool-shared",
    "dsmil_pool-linear-v-dropout",
    "dsmil_pool-relu-v-dropout",
    "dsmil_pool-mlp-q-gelu-v",
    "dsmil_pool-no-bias-scale-1",
)


class Recorder(TorchDispatchMode):
    """Keeps the calls of our ops that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "milkernels":
            self.calls.append((op, args, kwargs or {}))
        return op(*args, **(kwargs or {}))


def recorded(case, backend="native", dtype=torch.float32, offsets=None, mask=MASK):
    """``(forward, backward)``: the calls of our ops, as (op, args, kwargs)."""
    tensors = case.make(LENGTHS, dtype, **SIZES)
    offsets = offsets_of(LENGTHS) if offsets is None else offsets
    with Recorder() as forward:
        outputs = [o for o in case.ours(backend)(tensors, offsets, mask) if o.requires_grad]
    leaves = [t for t in tensors.values() if t.requires_grad]
    with Recorder() as backward:
        torch.autograd.grad(outputs, leaves, [torch.randn_like(o) for o in outputs], allow_unused=True)
    return forward.calls, backward.calls


def leaves_of(args, graded=True):
    """The arguments, lists included, without what they were made by."""
    return tree_map_only(Tensor, lambda a: a.detach().requires_grad_(graded and a.requires_grad), args)


def detached(args):
    return leaves_of(args, graded=False)


def argument_names(op):
    return [argument.name for argument in op._schema.arguments]


# The backend that runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_kernel
def test_the_kernel_is_what_runs(case, dtype):
    forward, backward = recorded(case, None, dtype)
    assert forward
    assert {op._overloadname for op, _, _ in forward + backward} == {"native"}


@every_kernel
def test_float64_parameters_are_refused(case):
    for name in list(case.tensors)[1:] if case.op != "attention_weights" else []:
        tensors = case.make(LENGTHS, torch.float32, **SIZES)
        tensors[name] = tensors[name].detach().double()
        with pytest.raises(RuntimeError, match="float64 parameters with torch.float32"):
            case.ours("native")(tensors, offsets_of(LENGTHS), None)


# torch.library


@pytest.mark.slow
@compiled(*PLAIN, *VARIANTS)
def test_opcheck(case):
    forward, backward = recorded(case)
    with filled_memory():
        for op, args, kwargs in forward:
            torch.library.opcheck(op, leaves_of(args), kwargs)
        for op, args, kwargs in backward:  # differentiable once
            torch.library.opcheck(op, detached(args), kwargs)


@contextlib.contextmanager
def filled_memory():
    """What is kept has room that nobody writes to: it is compared too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_kernel
def test_a_gradient_that_nobody_asked_for_is_not_there(case):
    """Nothing of its size is allocated.  Each of the others is what it is where all are asked for."""
    _, backward = recorded(case)
    for op, args, kwargs in backward:
        *args, needs = detached(args)
        whole = op(*args, needs, **kwargs)
        for i in range(len(needs)) if isinstance(whole, tuple) else ():
            got = op(*args, [need and j == i for j, need in enumerate(needs)], **kwargs)
            assert all(g.numel() == 0 for j, g in enumerate(got) if j != i)
            torch.testing.assert_close(got[i], whole[i])


@compiled(*PLAIN, *VARIANTS)
def test_raw_ops_refuse_what_would_read_out_of_bounds(case):
    """Called past the public functions: bad offsets, and each tensor one short of what it shares."""
    forward, _ = recorded(case)
    for op, args, kwargs in forward:
        names = argument_names(op)
        args = detached(args)
        if "offsets" in names and args[names.index("offsets")] is not None:
            for bad in ([0, 30, 30, 65], [1, 30, 30, 70], [0, 40, 30, 70], [0, -1, 30, 70], [0, 2**40, 2**40, 70]):
                changed = list(args)
                changed[names.index("offsets")] = torch.tensor(bad)
                with pytest.raises(ValueError, match="offsets must"):
                    op(*changed, **kwargs)
            changed[names.index("offsets")] = torch.tensor([0.0, 30, 30, 70])
            with pytest.raises(TypeError, match="int32 or int64"):
                op(*changed, **kwargs)
        for size in (sum(LENGTHS), *SIZES.values()):
            flat, spec = tree_flatten(args)
            shapes = {i: a.shape for i, a in enumerate(flat) if isinstance(a, Tensor)}
            places = [(i, d) for i, shape in shapes.items() for d, n in enumerate(shape) if n == size]
            for i, d in places if len(places) > 1 else []:
                changed = list(flat)
                changed[i] = flat[i].narrow(d, 0, size - 1).contiguous()
                with pytest.raises((ValueError, RuntimeError)):
                    op(*tree_unflatten(changed, spec), **kwargs)
                    pytest.fail(f"{op}: tensor {i} of {names} was too short in dimension {d}")


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@compiled(*PLAIN, *VARIANTS)
def test_raw_ops_refuse_lists_of_another_length(case, mode):
    """Forward and backward, in Python and, where nothing is differentiated, in C++."""
    for op, args, kwargs in (call for calls in recorded(case) for call in calls):
        args = list(detached(args))
        with mode():
            for i, name in enumerate(argument_names(op)):
                if not isinstance(args[i], list) or name == "needs":
                    continue
                for wrong in (args[i][:-1], [*args[i], None]) if args[i] else ([None],):
                    with pytest.raises(ValueError, match=f"{name} must .* elements, .*; got {len(wrong)}"):
                        op(*args[:i], wrong, *args[i + 1 :], **kwargs)
                if args[i]:
                    with pytest.raises(ValueError, match="must be a tensor; got None"):
                        op(*args[:i], [None, *args[i][1:]], *args[i + 1 :], **kwargs)


def compiled_steps(case, backend):
    """Eager and compiled outputs and gradients, at two sizes with one compilation."""
    torch._dynamo.reset()
    compute = torch.compile(case.ours("native"), fullgraph=True, dynamic=True, backend=backend)
    for lengths in (LENGTHS, (41, 0, 38, 16)):
        tensors, offsets = case.make(lengths, torch.float32, **SIZES), offsets_of(lengths)
        mask = torch.arange(sum(lengths)) % 5 > 0
        with torch.compiler.set_stance("default" if lengths is LENGTHS else "fail_on_recompile"):
            got = step(compute, tensors, offsets, mask)
        yield got, step(case.ours("native"), tensors, offsets, mask)


@pytest.mark.slow
@compiled(*PLAIN, *VARIANTS)
def test_compile_fullgraph_with_two_sizes(case):
    for got, expected in compiled_steps(case, "aot_eager"):
        close(got, expected, 1e-5)


@pytest.mark.slow
@compiled("gated_attention_pool-dropout", "dsmil_pool-mlp-q-relu-v")
def test_compile_with_inductor(case):
    for got, expected in compiled_steps(case, "inductor"):
        close(got, expected, 1e-5)


@compiled("gated_attention_pool", "softmax_pool", "dsmil_pool-linear-v", "instance_max")
def test_export_with_a_dynamic_number_of_instances(case):
    class Model(torch.nn.Module):
        def forward(self, tensors, offsets):
            return case.ours("native")(tensors, offsets, None)

    def inputs(lengths):
        tensors = case.make(lengths, torch.float32, **SIZES)
        return {n: t.detach() for n, t in tensors.items()}, offsets_of(lengths)

    rows = torch.export.Dim("rows", min=2)
    dynamic = {name: {0: rows} if case.has_rows(name) else None for name in case.tensors | case.fixed}
    program = torch.export.export(Model(), inputs(LENGTHS), dynamic_shapes=(dynamic, None))
    assert any("milkernels" in str(node.target) for node in program.graph.nodes)
    other = inputs((41, 0, 38, 16))
    for got, expected in zip(program.module()(*other), Model()(*other), strict=True):
        torch.testing.assert_close(got, expected)


@every_kernel
def test_a_second_derivative_is_refused_by_name_or_right(case):
    """Never 0 or an error about something else: where the backward is PyTorch's own, it is the reference's."""

    def second(backend):
        tensors = case.make(LENGTHS, **SIZES)
        leaves = [t for t in tensors.values() if t.requires_grad]
        outputs = [o for o in case.ours(backend)(tensors, offsets_of(LENGTHS), None) if o.requires_grad]
        total = sum(o.masked_fill(o.isinf(), 0).square().sum() for o in outputs)
        first = [g for g in torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True) if g is not None]
        squares = sum(g.square().sum() for g in first)
        return torch.autograd.grad(squares, leaves, allow_unused=True, materialize_grads=True)

    _, backward = recorded(case)
    if backward:
        with pytest.raises(RuntimeError, match='backend="reference"'):
            second("native")
        return
    for ours, expected in zip(second("native"), second("reference"), strict=True):
        torch.testing.assert_close(ours, expected)


# Memory

INSTANCES, DIM, HIDDEN = 60_000, 128, 64
BIG = {"L": DIM, "D": HIDDEN, "Q2": HIDDEN, "V": HIDDEN, "K": 1, "C": 1}
BIG_LENGTHS = (INSTANCES // 3, 0, INSTANCES - INSTANCES // 3)
LARGE = (
    "gated_attention_pool",
    "gated_attention_pool-dropout",
    "attention_scores",
    "softmax_pool",
    "query_pool",
    "query_scores",
    "weighted_pool",
    "instance_max",
    "dsmil_pool",
    "dsmil_pool-linear-v",
    "dsmil_pool-linear-v-dropout",
    "dsmil_pool-relu-v-dropout",
    "dsmil_pool-mlp-q",
    "dsmil_pool-mlp-q-relu-v",
    "loss_attention_pool",
    "mean_pool",
    "max_pool",
)


def peak_allocated(call) -> int:
    """The most bytes that PyTorch's CPU allocator held during the call beyond what it held before."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kept = call()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def num_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def forward_bound() -> int:
    """Beyond the outputs: scores, partial sums with an index each, tiles per thread and packed weights."""
    return 8 * INSTANCES + 12 * (INSTANCES // 256 + len(BIG_LENGTHS) + 1) * DIM + 2 * 2**20


def step_bound(case, tensors) -> int:
    """Beyond outputs and the gradient of x: a few vectors of one number per instance, and accumulators of slices."""
    parameters = sum(t.numel() for name, t in tensors.items() if not case.has_rows(name))
    return 32 * INSTANCES + 16 * 4 * parameters + 3 * 2**20


@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "autocast"],
)
@compiled(*LARGE)
def test_nothing_grows_with_instances_times_width(case, dtype, autocast):
    """Exact gate, by allocator events.  One copy of x, or the hidden units of all instances, is far above it."""
    compute, offsets = case.ours("native"), offsets_of(BIG_LENGTHS)
    tensors = case.make(BIG_LENGTHS, dtype, **BIG)
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    smallest = dtype.itemsize * INSTANCES * HIDDEN
    assert max(forward_bound(), step_bound(case, tensors)) < smallest
    with threads(2), cast:  # each thread has tiles of its own
        with torch.no_grad():
            outputs = num_bytes(compute(tensors, offsets, None))
            assert peak_allocated(lambda: compute(tensors, offsets, None)) - outputs <= forward_bound()
        for frozen in (False, True) if len(case.tensors) > 1 else (False,):
            tensors["x"].requires_grad_(not frozen)
            leaves = {name: t for name, t in tensors.items() if t.requires_grad}

            def one_step(leaves=leaves):
                first = next(o for o in compute(tensors, offsets, None) if o.requires_grad)
                return torch.autograd.grad(first.sum(), list(leaves.values()))

            wanted = num_bytes(t for name, t in leaves.items() if case.has_rows(name)) + outputs
            for limit in (0, 1 << 20):
                with saved_bytes(limit):
                    found = peak_allocated(one_step) - wanted
                assert found <= step_bound(case, tensors) + limit, f"{frozen=} {limit=}"


@compiled(*(name for name in LARGE if not CASES[name].dropped() and name != "max_pool"))  # a maximum copies nothing
def test_the_gate_above_would_notice_eager(case):
    tensors = case.make(BIG_LENGTHS, torch.float32, **BIG)
    with torch.no_grad():
        peak = peak_allocated(lambda: case.truth(tensors, offsets_of(BIG_LENGTHS), None))
    assert peak > step_bound(case, tensors)


@pytest.mark.parametrize("autocast", [False, True])
@every_kernel
def test_only_x_is_kept_for_the_backward(case, autocast):
    """No copy of it in another type, no hidden units unless there is room for them."""
    lengths, kept = (300, 0, 100), []
    tensors = case.make(lengths, torch.float32, **BIG)
    with (
        saved_bytes(0),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        case.ours("native")(tensors, offsets_of(lengths), None)
    given = {t.data_ptr() for t in tensors.values()}
    assert all(t.numel() < sum(lengths) * HIDDEN or t.data_ptr() in given for t in kept)


def test_the_public_ops_that_are_compiled_are_tested():
    """An op that a backend knows but no case calls would pass everything here."""
    compiled = {op.name for op in contract.FORWARDS if has_kernel(op.name, "native")}
    assert {case.kernel for case in COMPILED.values()} == compiled
