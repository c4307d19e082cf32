"""The kernels on a CUDA device: their numbers against the oracle, which stays on the CPU, and what only a device shows.

The most basic tests come first, so that ``-x`` stops early.  Without a device all skip but the last, which runs the
code of the others by Triton's interpreter.
"""

import contextlib
import copy
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time

import op_cases
import pytest
import test_numbers
import torch
import upstream_models as up
import upstream_padded as pad
from gpu_compile import compile_job, python_path
from legs import Leg, on, on_legs
from op_cases import CASES, PLAIN, offsets_of, same_bits, step
from test_numbers import GPU_LONG, GPU_SHORT, ODD, RAGGED, Shape, some_mask

import milkernels
from milkernels import backends, testing, triton
from milkernels.ops import contract

EVEN = {"L": 64, "D": 32, "K": 1, "C": 2, "Q2": 16, "V": 64}  # what tensor descriptors can read
SINGLE, HALF = torch.float32, torch.bfloat16
_SANITIZING = 40  # seconds
_FREE_BYTES = 40 << 30  # for the test beyond 2^31 elements


one_of_each = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)


def some_cases(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


# The device, and calls on it


class Device(str):
    """A device, and the backend that is tested there."""

    backend: str

    def __new__(cls, name, backend):
        made = super().__new__(cls, name)
        made.backend = backend
        return made


@pytest.fixture(scope="session", params=on_legs("gpu_triton", "gpu_native"))
def device(request):
    if request.param == "triton":
        request.getfixturevalue("compiled_kernels")
    return Device("cuda", request.param)


@pytest.fixture(autouse=True)
def served(request):
    """Some ops have no C++ kernel for CUDA."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    case, backend = parameters.get("case"), parameters.get("device")
    if case is not None and backend is not None and not op_cases.has_kernel(case.kernel, backend, case.needs, "cuda"):
        pytest.skip(backends.why_not(backend, case.kernel, "cuda", needs=case.needs))


def run(device, case, tensors, offsets=None, mask=None):
    return step(on(str(device), case).ours(device.backend), tensors, offsets, mask)


class Call:
    """A call on tensors that stay on the device, forward and backward, without a word to the host."""

    def __init__(self, case, device, lengths=RAGGED, dtype=SINGLE, seed=0, **sizes):
        made = case.make(lengths, dtype, seed, relu=True, **(ODD | sizes))
        self.compute = case.ours(device.backend)
        self.tensors = {n: t.detach().to(device).requires_grad_(t.requires_grad) for n, t in made.items()}
        self.offsets, self.mask = offsets_of(lengths).to(device), some_mask(sum(lengths)).to(device)
        self.leaves = {n: t for n, t in self.tensors.items() if t.requires_grad}
        self.sent = [c.to(device) for c in op_cases.cotangents([o.cpu() for o in self._differentiable()])]

    def _differentiable(self):
        outputs = self.compute(self.tensors, self.offsets, self.mask)
        return [o for o in outputs if o.requires_grad]

    def __call__(self):
        outputs = self.compute(self.tensors, self.offsets, self.mask)
        found = torch.autograd.grad(
            [o for o in outputs if o.requires_grad], list(self.leaves.values()), self.sent, materialize_grads=True
        )
        results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        return results | {f"gradient of {n}": g for n, g in zip(self.leaves, found, strict=True)}


def copied(results):
    return {name: t.clone() for name, t in results.items()}


# Numbers


def test_auto_takes_the_kernels(device):
    x, many = torch.ones(5, 3, device=device), torch.ones(backends.FEW_ROWS, 3, device=device)
    for op in (declared.name for declared in contract.FORWARDS):
        native = backends.why_not("native", op, "cuda") is None
        assert backends.choose(op, x) == ("native" if native else "triton") and backends.choose(op, many) == "triton"
        if native or device.backend == "triton":
            assert backends.choose(op, x, requested=device.backend) == device.backend
    bag = milkernels.softmax_pool(x, torch.zeros(5, 1, device=device), backend=device.backend).bag
    assert bag.device == x.device and torch.equal(bag, torch.ones_like(bag))


@one_of_each
def test_autocast(case, device):
    """Outputs and gradients have the types that the reference gives them, and are near its numbers."""
    tensors = case.make(GPU_SHORT, SINGLE, relu=True, **ODD)
    with torch.autocast(device, HALF):
        got = run(device, case, tensors, offsets_of(GPU_SHORT))
    with torch.autocast("cpu", HALF):
        expected = step(case.ours("reference"), tensors, offsets_of(GPU_SHORT), None)
    for name, t in got.items():
        assert t.dtype == expected[name].dtype, name
        if t.is_floating_point():  # an empty bag has an lse of -inf
            a, b = (value.masked_fill(value.isinf(), 0) for value in (t, expected[name]))
            assert (a - b).norm() <= 0.05 * b.norm() + 1e-6, name


THEIRS = {
    "CLAM": (lambda: up.ClamSB(sizes=(37, 20, 12)), (70, 37), lambda out: out[0]),
    "DSMIL": (lambda: up.MILNet(up.FCLayer(37, 2), up.BClassifier(37, 2, units=12)), (70, 37), lambda out: out[1]),
    "torchmil": (lambda: pad.AttentionPool(37, 12, gated=True), (3, 21, 37), lambda out: out),
}


@pytest.mark.parametrize("name", THEIRS)
def test_models_of_others(name, device):
    """Proven on the device and run there: the numbers of the original in float64."""
    if device.backend == "native" and name != "torchmil":
        pytest.skip("C++ has no embedding stage and no MLP query for CUDA")
    build, size, primary = THEIRS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(size)
    ours = copy.deepcopy(model).to(device)
    with milkernels.use_backend(device.backend):
        assert milkernels.accelerate(ours, min_instances=0).changed
        primary(ours(x.to(device))).sum().backward()
        got = primary(ours(x.to(device)))
    exact = model.double()
    expected = primary(exact(x.double()))
    expected.sum().backward()
    assert (got.cpu() - expected).norm() <= 1e-4 * expected.norm()
    for (key, p), q in zip(ours.named_parameters(), exact.parameters(), strict=True):
        if q.grad is not None and q.grad.norm() > 1e-9:  # those of score biases are 0
            assert (p.grad.cpu() - q.grad).norm() <= 1e-4 * q.grad.norm(), key


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("chosen", [{"scores": "fused"}, {"products": "split"}], ids=["fused", "split"])
@some_cases("gated_attention_pool", "attention_pool-relu", "gated_attention_scores")
def test_other_kernels(case, chosen, dtype, device):
    """Those that a plan may choose, where they serve the call at all: the fused ones for rows that are not kept."""
    from benchmarks.variants import launched
    from milkernels.triton import tuning

    if device.backend != "triton":
        pytest.skip("a plan chooses between Triton's kernels")
    kept, case = [], on(str(device), case)

    def check():
        kept.append(op_cases.promise(case, device.backend, dtype, lengths=RAGGED, seeds=2, **EVEN))

    with milkernels.saved_bytes(0):
        usual = launched(check)
        with tuning.use(**chosen):
            forced = launched(check)
    if forced == usual:
        pytest.skip("the kernels are the usual ones")
    assert kept[1].ok, kept[1].broken()


# What only a device shows


@one_of_each
def test_nothing_waits_for_the_device(case, device):
    call = Call(case, device)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@one_of_each
def test_cuda_graph(case, device):
    """Captured forward and backward, replayed on other numbers and other bags."""
    call, other = Call(case, device), Call(case, device, lengths=RAGGED[::-1], seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    with torch.no_grad():
        for name, t in call.tensors.items():
            t.copy_(other.tensors[name])
        call.offsets.copy_(other.offsets)
        call.mask.copy_(other.mask)
        for sent, others in zip(call.sent, other.sent, strict=True):
            sent.copy_(others)
    graph.replay()
    same_bits(copied(results), other())


def test_the_example_of_cuda_graphs(device):
    """Replayed steps, of several buckets, are those of the bags alone."""
    example = pytest.importorskip("examples.cuda_graphs")
    torch.manual_seed(0)
    model = example.ABMIL(12, 1, None, 8).to(device)
    alone = copy.deepcopy(model)
    adam = torch.optim.Adam(alone.parameters(), lr=1e-3)
    with milkernels.use_backend(device.backend):
        trainer = example.Trainer(model, 4)
        for batch in example.batches(12, 4, 160, 12, 0, str(device)):
            torch.testing.assert_close(trainer(*batch), example.plain_step(alone, adam, *batch), rtol=1e-3, atol=1e-5)
    assert 1 < len(trainer.steps) < 12
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        if not name.endswith("w_bias"):  # whose gradient is 0 but for rounding, which Adam follows
            assert (p - q).norm() <= 0.01 * q.norm(), name


@pytest.mark.slow
@one_of_each
def test_two_streams(case, device):
    calls = [Call(case, device, GPU_LONG, seed=seed) for seed in range(2)]
    alone = [copied(call()) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(4):
        for i, (call, stream) in enumerate(zip(calls, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[i].append(copied(call()))
    torch.cuda.synchronize()
    for expected, found in zip(alone, results, strict=True):
        for each in found:
            same_bits(each, expected)


@one_of_each
def test_wrong_offsets_do_no_harm(case, device):
    """They give wrong numbers; a compute sanitizer, or the next call, would tell of an access outside."""
    n = 328
    call = Call(case, device, lengths=(n, 0, 0))
    before, right = copied(call()), call.offsets.clone()
    for wrong in ((5, 400, 2, 71), (-7, 30, 2**31 - 1, -3), (380, 390, 400, 410), (0, -(2**40), 2**40, n)):
        call.offsets.copy_(torch.tensor(wrong))
        call()
        torch.cuda.synchronize()
    call.offsets.copy_(right)
    same_bits(call(), before)


def test_memory_does_not_grow_with_the_hidden_units(device):
    from benchmarks.cuda import peak_memory

    rows, width, hidden = 2_000_000, 256, 256
    x = torch.randn(rows, width, device=device, dtype=HALF, requires_grad=True)
    v, u = (torch.randn(hidden, width, device=device, dtype=HALF, requires_grad=True) for _ in range(2))
    w = torch.randn(1, hidden, device=device, dtype=HALF, requires_grad=True)

    def train():
        bag = milkernels.gated_attention_pool(x, v, u, w, backend=device.backend).bag
        torch.autograd.grad(bag, (x, v, u, w), torch.ones_like(bag))

    train()
    beyond = peak_memory(train) - x.numel() * x.element_size()
    assert beyond <= 300e6 + 16 * rows < rows * hidden * 2  # fewer than one hidden tensor of a half type


_LARGE = ("softmax_pool", "gated_attention_pool", "query_pool", "loss_attention_pool", "dsmil", "max_pool", "mean_pool")


@pytest.mark.parametrize("name", _LARGE)
def test_more_than_two_billion_elements(name, device):
    """A bag at the end of 2^31 numbers is pooled as it is alone."""
    if torch.cuda.mem_get_info()[0] < _FREE_BYTES:
        pytest.skip(f"less than {_FREE_BYTES >> 30} GB of memory are free")
    large_bag_at_the_end(name, device, (2**31 >> 11) + 5000, 2048)
    torch.cuda.empty_cache()


def large_bag_at_the_end(name, device, before, width, few=777):
    case = testing.CASES[name]
    alone = case.inputs(testing.Shape((few,), width, 64, case.default_heads), HALF, device=device)
    count = before + few

    def behind_others(t):
        made = t.new_zeros(count, *t.shape[1:])
        made[before:] = t
        return made

    rows = {n: behind_others(t) for n, t in alone.parameters.items() if t.shape[:1] == (few,)}
    both = dataclasses.replace(
        alone,
        x=behind_others(alone.x),
        parameters=alone.parameters | rows,
        offsets=torch.tensor([0, before, count], device=device),
        lengths=(before, few),
        cotangent=alone.cotangent.expand(2, *alone.cotangent.shape[1:]).contiguous(),
    )
    mode = "step" if "step" in case.modes() else "fwd"
    expected = testing.evaluate(lambda i: case.call(i, device.backend), alone, mode, case.primary)
    got = testing.evaluate(lambda i: case.call(i, device.backend), both, mode, case.primary)
    for key in (*case.outputs, "grad_x"):
        if key in ("indices", "critical"):
            assert torch.equal(got[key][1:] - before, expected[key]), key
        elif key in got:
            last = got[key][before:] if got[key].shape[0] == count else got[key][1:]
            difference, size = ((t.double()).norm() for t in (last - expected[key], expected[key]))
            assert difference <= 0.01 * size, (key, float(difference), float(size))  # rounding, in other segments


@pytest.mark.slow
@some_cases("gated_attention_pool-dropout", "dsmil")
def test_compiled_graph(case, device):
    call = Call(case, device)
    expected = copied(call())
    torch.compiler.reset()
    call.compute = torch.compile(call.compute, fullgraph=True)
    same_bits(call(), expected)


_SANITIZED = """
import torch
import op_cases
from test_gpu import Call, Device
for name in ("gated_attention_pool-dropout", "softmax_pool", "query_pool", "dsmil", "max_pool", "loss_attention_pool"):
    Call(op_cases.CASES[name], Device("cuda", "native"), (3, 0, 70, 5))()
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", on_legs("gpu_native"), indirect=True)  # whose accesses no compiler writes
def test_compute_sanitizer(device):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    # Each allocation by itself, or an access behind one would lie in another.
    environment = os.environ | {"PYTHONPATH": python_path(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said, end = {}, time.monotonic() + _SANITIZING
    with contextlib.ExitStack() as stack:
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", _SANITIZED]
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            said[tool] = process, log
        for tool, (process, log) in said.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            log.seek(0)
            assert process.returncode != 9, f"{tool}: {log.read()[-3000:]}"
        codes = {tool: process.returncode for tool, (process, _) in said.items()}
    if set(codes.values()) != {0}:
        pytest.skip(f"exit statuses after {_SANITIZING} s: {codes}")


# These tests themselves


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is selected away
@pytest.mark.skipif(
    torch.cuda.is_available() or not triton.interpreted() or triton.load_error() is not None,
    reason="for machines without a GPU",
)
@pytest.mark.slow
def test_the_code_of_these_tests():
    """By the interpreter, for a few cases, so that it has run before there is a device."""
    case, other, cpu = CASES["gated_attention_pool"], CASES["softmax_pool"], Device("cpu", "triton")
    leg = Leg("gpu", "triton", CASES, None)
    test_numbers.test_oracle(leg, on("cpu", case), (Shape((0, 9, 64, 1, 0), mask=some_mask, sizes=ODD),))
    test_numbers.test_hardly_anything(leg, on("cpu", other), [(0, 0)], [torch.float64], ODD)
    test_numbers.test_error_promise(leg, on("cpu", other), SINGLE, None, test_numbers.ON_GPU)
    test_autocast(CASES["dsmil"], cpu)
    for name in THEIRS:
        test_models_of_others(name, cpu)
    test_numbers.test_same_bits_again(leg, on("cpu", other), (70, 0, 5), SINGLE, ODD, test_numbers.AGAIN, True)
    Call(other, cpu, (70, 0, 5))()
    compile_job("softmax_pool", "bfloat16", "float32", GPU_SHORT, False, False, device="cpu")
    with contextlib.suppress(pytest.skip.Exception):
        test_other_kernels(case, {"scores": "fused"}, SINGLE, cpu)
    for name in ("softmax_pool", "dsmil", "max_pool"):
        large_bag_at_the_end(name, cpu, 70, 16, few=30)
