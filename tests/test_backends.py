"""Which backend is taken: by ``use_backend`` in threads, tasks, generators and compiled code, and by ``auto``."""

import asyncio
import contextvars
import threading
from types import SimpleNamespace

import pytest
import torch
from op_cases import needs_extension

import milkernels
from milkernels import _context, _torch, backends, native, triton, use_backend
from milkernels.ops import contract


def taken(device: str = "cpu", op: str = "mean_pool", dtype=torch.float32) -> str:
    """What a call that names no backend is served by; the tensor may be on a device that is not there."""
    return backends.choose(op, SimpleNamespace(device=torch.device(device), dtype=dtype))


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


def test_auto_on_cuda_takes_the_native_kernels_where_triton_is_missing(cuda_modules):
    expected = {(True, True): "triton", (False, True): "triton", (True, False): "native"}
    for machine, backend in expected.items():
        cuda_modules(*machine)
        for op in (declared.name for declared in contract.FORWARDS):
            assert taken("cuda", op) == backend
            assert [row[2] for row in backends.report((op,)) if row[1] == "cuda"] == [backend]
    cuda_modules(False, False)
    with pytest.warns(UserWarning, match="mean_pool runs on the reference; triton: Triton is not installed"):
        assert taken("cuda") == "reference"


def test_auto_on_cuda_takes_the_native_kernels_for_what_triton_cannot(cuda_modules, monkeypatch):
    cuda_modules(True, True)
    monkeypatch.setattr(_torch, "has_kernel", lambda overload, device: overload != "milkernels::mean_pool_fwd.triton")
    assert taken("cuda") == "native" and taken("cuda", "max_pool") == "triton"


def test_an_op_that_was_not_declared_is_the_references():
    """So a new op can be written before its kernels are."""
    assert taken(op="no_such_pool") == "reference"
    assert backends.why_not("native", "no_such_pool", "cpu") in (
        "it has no kernel for no_such_pool",
        native.load_error(),
    )
