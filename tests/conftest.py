"""Which of the tests run, and what they all need.

``--tier quick`` runs of each test as few parameter sets as have every value of every parameter at least once: every op,
type, backend and shape that the test knows, but not all of their combinations; and no test marked slow. Of the cases of
an op, kernels that are interpreted or emulated run one, and one with an embedding. ``--tier rest`` runs the others,
``all``, the default, both.  ``--legs native,gpu`` runs, of the tests that have legs (tests/legs.py), those alone.

Where there is no GPU the Triton kernels are tested by Triton's interpreter, of which two faults are mended here.
"""

import contextlib
import itertools
import os
from collections import Counter

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported


def _mend_interpreter() -> None:
    """The interpreter keeps bfloat16 as bits: it cuts off what a GPU rounds, and multiplies the bits in a dot product
    (triton-lang/triton#11584).  And it patches the whole language again for each call of a device function, which is a
    third of its time."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(data).view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return np.where(np.isnan(data), bits >> 16 | 0x40, rounded).astype(np.uint16)
        return convert(data, source, target, rounding)

    def dot(builder, a, b, *rest):
        def widened(t):
            if t.dtype.scalar != tl.bfloat16:
                return t
            return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return create_dot(builder, widened(a), widened(b), *rest)

    patch = interpreter._patch_lang

    def patch_once(fn):
        used = [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]
        unpatched = any(tl.core.is_builtin(module.load) for module in used)
        return patch(fn) if unpatched else interpreter._LangPatchScope()

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = convert_float, dot
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):  # no Triton: its tests skip
        _mend_interpreter()


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each processor has a worker; tests of threads set their number


def pytest_addoption(parser):
    parser.addoption(
        "--tier", choices=("quick", "rest", "all"), default="all", help="which tests: see tests/conftest.py"
    )
    parser.addoption(
        "--legs", default="", help="names, or their beginnings, with commas between them: see tests/legs.py"
    )
    parser.addoption("--compiling", type=float, default=110, help="seconds for kernels of a GPU, before its first test")


def pytest_collection_modifyitems(config, items):
    tier, legs = config.getoption("--tier"), tuple(config.getoption("--legs").split(","))

    def keep(chosen) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]

    if any(legs):
        keep({item for item in items if (_leg(item) or legs[0]).startswith(legs)})
    absent = {(_test(item), why): item for item in reversed(items) if (why := _absent(item))}
    keep({item for item in items if not _absent(item)} | set(absent.values()))
    if tier == "all":
        return
    prompt = [item for item in items if item.get_closest_marker("slow") is None]
    tests = itertools.groupby(sorted(prompt, key=_test), _test)
    quick = {item for _, sets in tests for item in covering(list(sets))}
    keep(quick if tier == "quick" else set(items) - quick)


def _absent(item) -> str:
    """Why this machine cannot run the item, which is said once for each test."""
    marks = [*item.iter_markers("skip"), *(mark for mark in item.iter_markers("skipif") if any(mark.args))]
    return next((str(mark.kwargs.get("reason") or mark.args) for mark in marks), "")


def _test(item) -> tuple[str, str]:
    """The test that an item is one parameter set of, on each leg another."""
    return item.nodeid.partition("[")[0], _leg(item)


def _leg(item) -> str:
    """The name of the leg that the item runs on, if its test has legs."""
    leg = item.callspec.params.get("leg") if hasattr(item, "callspec") else None
    return "" if leg is None else leg.name


def covering(items: list) -> list:
    """A few of the items, which have every value of every parameter; values take turns with those of the others."""
    values = [_values(item) for item in items]
    chosen, seen, used = [], set(), Counter()
    while True:
        # The most values that were not seen, then those that were used least, then the first.
        best = max(range(len(items)), key=lambda i: (len(values[i] - seen), -sum(used[v] for v in values[i]), -i))
        if chosen and values[best] <= seen:
            return [items[i] for i in sorted(chosen)]
        chosen.append(best)
        seen |= values[best]
        used.update(values[best])


def _values(item) -> set:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    simulated = item.get_closest_marker("simulated") or parameters.get("backend") == "triton"

    def key(value):
        return (value.op, value.embed is None) if simulated and hasattr(value, "embed") else id(value)

    return {(name, key(value)) for name, value in parameters.items()}


@pytest.fixture(scope="session")
def compiled_kernels(request):
    """Triton's kernels for this GPU, compiled by all processors, before the first test that launches some."""
    from gpu_compile import compile_in_parallel

    compile_in_parallel(request.session.items, request.config.getoption("--compiling"))


@pytest.fixture(autouse=True)
def the_gpu_is_in_order():
    """A fatal CUDA error fails every test after it, and says nothing there."""
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the device is out of order after this test: {error}", returncode=3)


@pytest.fixture
def no_interpreter(monkeypatch):
    """Triton's kernels serve no CPU tensors, as where nothing interprets them."""
    from milkernels import backends

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_served", {})  # what was found while they did


@pytest.fixture
def quick_machine(monkeypatch):
    """For tests of the benchmark: the limits of this machine are not what is tested, and take a second."""
    from milkernels.bench import roofline

    monkeypatch.setattr(roofline, "read_bandwidth", lambda: (1e10, 1 << 20))
    monkeypatch.setattr(roofline, "_PROBE_SECONDS", 1e-4)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
