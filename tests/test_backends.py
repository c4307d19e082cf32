"""Which backend is taken: by ``use_backend`` in threads, tasks, generators and compiled code, and by ``auto``."""

import asyncio
import contextvars
import re
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from op_cases import CASES, LENGTHS, needs_extension, offsets_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import milkernels
from milkernels import _context, _torch, backends, native, triton, use_backend
from milkernels.ops import contract


def taken(device: str = "cpu", op: str = "mean_pool", *, rows: int = 5, requested=None, needs=()) -> str:
    """What serves a call, which names no backend; the tensor may be on a device that is not there."""
    x = SimpleNamespace(device=torch.device(device), is_cpu=device == "cpu", dtype=torch.float32, shape=(rows, 3))
    return backends.choose(op, x, (), requested, needs)


def requested() -> str:
    """What a call that names no backend asks for."""
    return _context.current() or START


START = backends._START
AUTO = taken()


def test_blocks_nest():
    with use_backend("reference"):
        with use_backend("auto"):
            assert taken() == AUTO
        assert taken() == "reference"
    assert requested() == START


def test_an_error_leaves_the_block():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert requested() == START


def test_a_block_counts_for_its_thread_alone():
    """Two threads whose blocks overlap, and one without."""
    seen, first, second, left = {}, threading.Event(), threading.Event(), threading.Event()

    def one():
        with use_backend("reference"):
            first.set()
            second.wait(10)
            seen["one"] = requested()
        left.set()

    def other():
        first.wait(10)
        seen["before"] = requested()
        with use_backend("native"):
            second.set()
            left.wait(10)
            seen["other"] = requested()
        seen["after"] = requested()

    threads = [threading.Thread(target=f) for f in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"one": "reference", "before": START, "other": "native", "after": START}
    assert requested() == START


def test_a_block_counts_for_its_task_alone():
    async def inside():
        with use_backend("reference"):
            await asyncio.sleep(0.01)
            return requested()

    async def outside():
        await asyncio.sleep(0.005)
        return requested()

    async def both():
        return await asyncio.gather(inside(), outside())

    assert asyncio.run(both()) == ["reference", START]


def test_generators_leave_nothing_behind():
    """Their blocks need not be left in the order in which they were entered."""

    def generate(name):
        with use_backend(name):
            yield requested()

    first, second = generate("reference"), generate("native")
    assert (next(first), next(second)) == ("reference", "native")
    first.close()
    assert requested() == "native"
    second.close()
    assert requested() == START


def test_backward_and_checkpoints_inside_of_a_block():
    x = torch.randn(4, 3, requires_grad=True)
    seen = []

    def call(x):
        seen.append(requested())
        return milkernels.mean_pool(x)

    with use_backend("reference"):
        torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False).sum().backward()
    assert seen == ["reference", "reference"]


def test_threads_of_autograd_see_the_block_around_backward():
    """Of a GPU's: what PyTorch leaves for them of the thread that called."""
    seen = []

    def work(context):
        torch._C._stash_obj_in_tls("context", context)
        seen.append(requested())
        torch._C._remove_obj_from_tls("context")

    with use_backend("reference"):
        thread = threading.Thread(target=work, args=(contextvars.copy_context(),))
        thread.start()
        thread.join()
    assert seen == ["reference"]


# torch.compile


def ops_of(compiled, *args) -> set[str]:
    """The backends of our ops in the graph that is compiled for these arguments."""
    graphs = []
    torch._dynamo.reset()

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(compiled, fullgraph=True, backend=keep)(*args)
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes if "milkernels" in str(node.target)]
    return {target._overloadname for target in targets}


@needs_extension
def test_compiled_code_sees_the_block_around_it():
    """Whichever it is traced in first, it is traced once for each and never takes a stale one."""
    x = torch.randn(4, 3)
    with use_backend("native"):
        assert ops_of(milkernels.mean_pool, x) == {"native"}
    with use_backend("reference"):
        assert ops_of(milkernels.mean_pool, x) == set()

    traced = []

    def keep(graph, _):
        traced.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(milkernels.mean_pool, fullgraph=True, backend=keep)
    for _ in range(3):
        for name in ("native", "reference"):
            with use_backend(name):
                torch.testing.assert_close(compiled(x), x.mean(0, keepdim=True))
    assert len(traced) == 2
    assert requested() == START


@needs_extension
def test_a_block_inside_of_compiled_code():
    def f(x):
        with use_backend("reference"):
            inner = milkernels.mean_pool(x)
        return inner, milkernels.max_pool(x, backend="native").values

    x = torch.randn(4, 3)
    assert ops_of(f, x) == {"native"}
    assert requested() == START and not backends._traced


def test_a_block_around_a_graph_break():
    def f(x):
        with use_backend("reference"):
            torch._dynamo.graph_break()
            seen.append(taken())
            return milkernels.mean_pool(x)

    seen, x = [], torch.randn(4, 3)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, backend="eager")(x), x.mean(0, keepdim=True))
    assert seen == ["reference"] and requested() == START and not backends._traced


# auto


@pytest.fixture
def cuda_modules(monkeypatch, no_interpreter):
    """A machine whose C++ module for CUDA is there or not, and Triton too; with a kernel of every op in both."""
    monkeypatch.setattr(_torch, "has_kernel", lambda overload, device: True)
    backends._warned.clear()

    def have(native_module: bool, has_triton: bool) -> None:
        loaded = (object(), None) if native_module else (None, "the CUDA module was not built")
        monkeypatch.setitem(native._loaded, "cuda", loaded)
        missing = None if has_triton else "Triton is not installed"
        monkeypatch.setattr(triton, "load_error", lambda device="cuda": missing)
        backends._served.clear()

    yield have
    backends._warned.clear()


MANY = backends.FEW_ROWS
ALL_NEEDS = tuple(native._CUDA_LACKS)


def test_auto_on_cuda_goes_by_rows(cuda_modules):
    """Native up to where the host bounds a call, Triton from there on; what one has not is the other's."""
    expected = {(True, True): ("native", "triton"), (False, True): ("triton",) * 2, (True, False): ("native",) * 2}
    for machine, (few, many) in expected.items():
        cuda_modules(*machine)
        for op in (declared.name for declared in contract.FORWARDS):
            for rows, backend in ((0, few), (MANY - 1, few), (MANY, many), (100 * MANY, many)):
                assert taken("cuda", op, rows=rows) == backend
            text = "native below 16,384 rows, triton from there on and under torch.compile" if few != many else few
            assert [row[2] for row in backends.report((op,)) if row[1] == "cuda"] == [text]
    cuda_modules(False, False)
    with pytest.warns(UserWarning, match="mean_pool runs on the reference; triton: Triton is not installed"):
        assert taken("cuda") == "reference"


def test_what_an_op_has_no_kernel_for_is_the_others(cuda_modules, monkeypatch):
    cuda_modules(True, True)
    monkeypatch.setattr(_torch, "has_kernel", lambda overload, device: overload != "milkernels::mean_pool_fwd.triton")
    assert taken("cuda", rows=MANY) == "native" and taken("cuda", "max_pool", rows=MANY) == "triton"
    backends._served.clear()
    monkeypatch.setattr(_torch, "has_kernel", lambda overload, device: overload != "milkernels::mean_pool_fwd.native")
    assert taken("cuda") == "triton" and taken("cuda", "max_pool") == "native"
    with pytest.raises(milkernels.BackendUnavailable, match="no kernel for mean_pool; backend='triton' can"):
        taken("cuda", requested="native")


@pytest.mark.parametrize("need", ALL_NEEDS)
def test_what_native_lacks_on_cuda_is_tritons(need, cuda_modules):
    """Whatever the rows; without Triton the reference's, which is said once."""
    cuda_modules(True, True)
    assert [taken("cuda", rows=rows, needs=(need,)) for rows in (1, MANY)] == ["triton", "triton"]
    assert taken("cuda") == "native"  # the same op without
    lack = re.escape(native.lacks("cuda")[need])
    message = rf"'native' cannot serve mean_pool: CUDA's C\+\+ kernels have {lack}"
    with pytest.raises(milkernels.BackendUnavailable, match=message + "; backend='triton' can"):
        taken("cuda", requested="native", needs=(need,))
    assert taken("cpu", needs=(need,)) == AUTO or native.emulated()
    cuda_modules(True, False)
    with pytest.warns(UserWarning, match="mean_pool runs on the reference; triton: Triton is not installed"):
        assert taken("cuda", needs=(need,)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken("cuda", needs=(need,)) == "reference" and taken("cuda") == "native"
    with pytest.raises(milkernels.BackendUnavailable, match=message + "$"):
        taken("cuda", requested="native", needs=(need,))


ASKED = {
    "gated_attention_pool": (), "attention_scores-embed": ("embed",), "query_pool": (), "dsmil": (),
    "query_pool-embed-dropout": ("embed",),
    "query_scores-embed": ("embed",), "instance_max-embed-dropout": ("embed",), "loss_attention_pool-embed": ("embed",),
    "loss_attention_pool": (), "instance_max": (), "dsmil_pool": (), "dsmil_pool-linear-v-no-bias": (),
    "dsmil_pool-linear-v-dropout": ("value",), "dsmil_pool-relu-v": ("value",), "dsmil_pool-mlp-q": ("q2",),
    "dsmil-mlp-q-relu-v": ("q2", "value"), "dsmil-embed-mlp-q-relu-v": ("embed", "q2", "value"),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_every_op_says_what_it_needs(name, monkeypatch):
    """To whom it asks for a backend; and the table of cases says the same of it."""
    case, asked = CASES[name], []
    choose = backends.choose

    def noted(op, x, parameters=(), requested=None, needs=()):
        asked.append((op, needs))
        return choose(op, x, parameters, requested, needs)

    monkeypatch.setattr(backends, "choose", noted)
    case.ours("reference")(case.make(), offsets_of(LENGTHS), None)
    assert asked == [(case.kernel, ASKED[name])] and case.needs == ASKED[name]


def test_a_compiled_call_of_any_number_of_rows(cuda_modules):
    """Is Triton's, where that is there, and does not look at the number: no guard, no second program."""

    class Pool(torch.nn.Module):
        def forward(self, x, scores):
            return milkernels.softmax_pool(x, scores).bag

    def exported():
        with FakeTensorMode(shape_env=ShapeEnv()):
            x, scores = torch.empty(100, 8, device="cuda"), torch.empty(100, 2, device="cuda")
            rows = torch.export.Dim("rows")
            program = torch.export.export(Pool(), (x, scores), dynamic_shapes=({0: rows}, {0: rows}), strict=False)
        (op,) = [node.target for node in program.graph.nodes if "milkernels" in str(node.target)]
        (bounds,) = program.range_constraints.values()
        return op._overloadname, bounds.lower <= 2 and bounds.upper > 100 * MANY

    cuda_modules(True, True)
    assert exported() == ("triton", True)
    cuda_modules(True, False)
    assert exported() == ("native", True)


def test_an_op_that_was_not_declared_is_the_references():
    """So a new op can be written before its kernels are."""
    assert taken(op="no_such_pool") == "reference"
    assert backends.why_not("native", "no_such_pool", "cpu") in (
        "it has no kernel for no_such_pool",
        native.load_error(),
    )
