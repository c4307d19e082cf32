"""What an op saves of what its backward would compute again: how much, that it changes no result, who says so."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from legs import at, by_leg
from op_cases import CASES, check_gradients, offsets_of, same_bits, threads
from test_numbers import ODD, some_mask
from torch.utils.checkpoint import checkpoint

from milkernels import gated_attention_pool, native, saved_bytes, saving

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16
KEEPING = tuple(
    name for name, case in CASES.items() if case.kernel in ("attention_pool", "attention_scores", "dsmil_pool", "dsmil")
)
KEEPING += tuple(name for name, case in CASES.items() if case.embed is not None and name not in KEEPING)
LONG = (300, 0, 1, 500)  # more than what is kept together, and a rest
LIMITS = (None, 60_000, 250_000, 700_000)
needs_kernels = pytest.mark.skipif(
    native.load_error() is not None or native.emulated(), reason=f"no kernels of the CPU: {native.load_error()}"
)


def run(leg, case, limit, tensors, offsets, mask=None):
    with saved_bytes(limit):
        return leg.run(case, tensors, offsets, mask)


@by_leg(
    "dtype lengths",
    compiled=[at(SINGLE, LONG, cases=KEEPING, label="float32"), at(DOUBLE, LONG, cases=KEEPING, label="float64")],
)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_no_bit_depends_on_the_limit(leg, case, dtype, lengths, masked):
    tensors, offsets = case.make(lengths, dtype, relu=True, **ODD), offsets_of(lengths)
    mask = some_mask(sum(lengths)) if masked else None
    if masked:
        mask[64:200] = False  # tiles without a real row
    expected = run(leg, case, 0, tensors, offsets, mask)
    for limit in LIMITS:
        same_bits(run(leg, case, limit, tensors, offsets, mask), expected)


@by_leg(
    "lengths",
    compiled=[at(LONG, cases=KEEPING)],
)
@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
def test_half_types_keep_the_promise(leg, case, lengths, dtype):
    for limit in (None, 60_000):
        with saved_bytes(limit):
            kept = leg.promise(case, dtype, lengths=lengths, seeds=3, **ODD)
        assert kept.ok, kept.broken()


@by_leg(native=[at(cases=KEEPING)])
def test_no_bit_depends_on_the_threads(leg, case):
    tensors, offsets = case.make(LONG, SINGLE, relu=True, **ODD), offsets_of(LONG)
    for limit in (None, 60_000, 0):
        expected = run(leg, case, limit, tensors, offsets)
        for count in (2, 3, 4):
            with threads(count):
                same_bits(run(leg, case, limit, tensors, offsets), expected)


def gated(n=300, width=24, units=16, dtype=SINGLE, **kwargs):
    make = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=dtype).requires_grad_()  # noqa: E731
    parameters = [(draw(units, width), draw(units)) for _ in range(2)] + [(draw(1, units), draw(1))]
    x = draw(n, width)
    return x, parameters, lambda: gated_attention_pool(x, *parameters, **kwargs)


def kept_by(call) -> int:
    """Bytes that autograd holds of what the forward made besides its outputs."""
    held = []

    def pack(t):
        if t.dtype == torch.uint8:
            held.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(held)


@needs_kernels
def test_how_much_is_kept():
    _, _, call = gated()
    row = 64 * 4  # 2 * 16 units of float32, in blocks of 64 columns
    for limit, rows in ((0, 0), (row * 63, 0), (row * 255, 192), (row * 319, 256), (row * 320, 320), (None, 320)):
        with saved_bytes(limit):
            assert kept_by(call) == rows * row, limit
    with torch.no_grad(), saved_bytes(None):
        assert kept_by(call) == 0
    assert kept_by(gated(n=0)[2]) == 0
    assert kept_by(gated(dtype=DOUBLE)[2]) == 320 * row * 2
    assert kept_by(gated(dtype=HALF)[2]) == 320 * row // 2
    assert kept_by(gated(width=96, units=70)[2]) == 320 * 4 * 192


@needs_kernels
def test_frozen_calls_keep_nothing():
    x, parameters, _ = gated()
    frozen = [tuple(t.detach() for t in layer) for layer in parameters]
    assert kept_by(lambda: gated_attention_pool(x.detach(), *frozen)) == 0


def test_limits_that_are_none():
    for bad in (-1, "64MB", "much", "", 2**62):
        with pytest.raises(ValueError, match="limit must be a number of bytes"):
            saved_bytes(bad)
    for bad in (1.5, True, [1]):
        with pytest.raises(TypeError, match="limit must be a number of bytes"):
            saved_bytes(bad)


def test_amounts():
    x = torch.empty(1, 1)
    for given, expected in (("64MiB", 64 << 20), ("1.5 KiB", 1536), ("7", 7), ("7B", 7), (7, 7), (0, 0), (None, -1)):
        with saved_bytes(given):
            assert saving.limit_of(x) == expected
    assert saving.limit_of(x) == 64 << 20
    assert saving.limit_of(torch.empty(1, 1, device="meta")) == 0


def test_blocks_and_setting():
    x = torch.empty(1, 1)
    try:
        saved_bytes(5)
        assert saving.limit_of(x) == 5
        with saved_bytes(6):
            with saved_bytes(None):
                assert saving.limit_of(x) == -1
            assert saving.limit_of(x) == 6
        assert saving.limit_of(x) == 5
        seen = []
        other = threading.Thread(target=lambda: seen.append(saving.limit_of(x)))
        other.start()
        other.join()
        assert seen == [64 << 20]
    finally:
        saved_bytes(64 << 20)


@pytest.mark.parametrize(("value", "expected"), [("1KiB", "1024"), ("0", "0"), ("None", "-1"), ("lots", "ValueError")])
def test_the_environment(value, expected):
    code = "import torch; from milkernels import saving; print(saving.limit_of(torch.empty(1, 1)))"
    environment = os.environ | {"MILKERNELS_SAVED_BYTES": value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert expected in done.stdout + done.stderr.splitlines()[-1] if done.stderr else expected in done.stdout


@needs_kernels
def test_a_graph_is_walked_twice():
    x, parameters, call = gated()
    leaves = [x, *(t for layer in parameters for t in layer)]
    with saved_bytes(None):
        loss = call().bag.square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    call()  # another call, whose memory must be another
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernels
def test_calls_that_wait_have_memory_of_their_own():
    expected = step_of(0.0)
    for scale in (0.0, 1.0, 2.0):
        calls = [gated(n=n) for n in (300, 310, 320)]
        outputs = [call().bag.sum() * (scale + 1) for _, _, call in calls]
        for (x, _, _), out in zip(reversed(calls), reversed(outputs), strict=True):
            out.backward()
            x.grad = None
        del outputs
    assert torch.equal(step_of(0.0), expected)


def step_of(shift: float) -> torch.Tensor:
    x, _, call = gated()
    (call().bag + shift).square().sum().backward()
    return x.grad


@needs_kernels
def test_many_threads_at_once():
    expected, found = step_of(0.0), []

    def work():
        found.extend(step_of(0.0) for _ in range(50))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 200 and all(torch.equal(f, expected) for f in found)


def _child(queue):
    torch.set_num_threads(1)
    queue.put(step_of(0.0).sum().item())


@needs_kernels
def test_a_fork():
    torch.set_num_threads(1)
    expected = step_of(0.0).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()


@needs_kernels
def test_what_is_saved_may_be_offloaded():
    x, _, call = gated()
    expected = step_of(0.0)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy() if not t.requires_grad else t, _unpack)
    with hooks:
        out = call().bag
    out.square().sum().backward()
    assert torch.equal(x.grad, expected)


def _unpack(saved):
    return saved if isinstance(saved, torch.Tensor) else torch.from_numpy(saved)


@needs_kernels
@pytest.mark.parametrize("limit", [0, 70_000, None])
def test_checkpoints(limit):
    x, _, call = gated()
    with saved_bytes(limit):
        checkpoint(lambda: call().bag, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, step_of(0.0))


@needs_kernels
def test_compiled_calls_follow_the_limit():
    x, parameters, call = gated()
    expected = step_of(0.0)
    compiled = torch.compile(lambda x: gated_attention_pool(x, *parameters).bag, fullgraph=True, backend="aot_eager")
    for limit in (0, 70_000, None, 0):
        with saved_bytes(limit):
            (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
        assert torch.equal(found, expected)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def inside(x):
        with saved_bytes("1MiB"):
            return gated_attention_pool(x, *parameters).bag

    for rows in (300, 70, 513):
        part = torch.randn(rows, 24, requires_grad=True)
        (found,) = torch.autograd.grad(inside(part).square().sum(), part)
        (eager,) = torch.autograd.grad(gated_attention_pool(part, *parameters).bag.square().sum(), part)
        assert torch.equal(found, eager)
    torch._dynamo.reset()


@needs_kernels
def test_exported_programs_keep_nothing():
    x, parameters, _ = gated()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.ParameterList([t.detach() for layer in parameters for t in layer])

        def forward(self, x):
            w = self.w
            return gated_attention_pool(x, (w[0], w[1]), (w[2], w[3]), (w[4], w[5])).bag

    program = torch.export.export(Model(), (x.detach(),))
    limits = [node.args[-1] for node in program.graph.nodes if "attention_pool_fwd" in str(node.target)]
    assert limits == [0]
    assert torch.equal(program.module()(x), Model()(x))


@needs_kernels
@pytest.mark.parametrize("limit", [0, 60_000, None])
@pytest.mark.parametrize("name", ["gated_attention_pool-dropout", "dsmil-embed-mlp-q-relu-v", "attention_scores-embed"])
def test_gradcheck(name, limit):
    with saved_bytes(limit):
        check_gradients(CASES[name], "native", (3, 0, 5), None)


@needs_kernels
def test_kept_that_is_no_such_memory():
    x, ((v, vb), (u, ub), (w, wb)), _ = gated()
    op = torch.ops.milkernels
    inputs = (x.detach(), [t.detach() for t in (v, vb, u, ub, w, wb)], None, None, None)
    bag, scores, lse, kept = op.attention_pool_fwd.native(*inputs, "tanh", 0.0, None, [], None, 0.0, None, -1)
    assert kept.dtype == torch.uint8 and kept.shape == (320 * 256,)
    options = ("tanh", 0.0, None, None, 0.0, None, torch.ones_like(bag), None, None, [True] * 7 + [False] * 2)
    full = op.attention_bwd.native(*inputs, bag, scores, lse, [], kept, *options)
    for part in (kept[:0], kept[: 256 * 256], kept[:1000]):
        found = op.attention_bwd.native(*inputs, bag, scores, lse, [], part, *options)
        assert all(torch.equal(a, b) for a, b in zip(full, found, strict=True))
    for wrong in (kept.float(), kept[None], kept[::2]):
        with pytest.raises(ValueError, match="kept must be contiguous uint8"):
            op.attention_bwd.native(*inputs, bag, scores, lse, [], wrong, *options)


@needs_kernels
def test_memory_comes_again():
    """Fresh pages cost as much as what they spare."""
    native.release_workspace()
    x, _, call = gated(n=3000, width=64, units=64)
    addresses = set()
    with saved_bytes(None):
        for _ in range(4):
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: addresses.add(t.data_ptr()) or t if t.dtype == torch.uint8 else t, lambda t: t
            ):
                call().bag.sum().backward()
            x.grad = None
    assert len(addresses) == 1


def test_every_op_that_computes_twice_is_here():
    from milkernels.ops import contract

    kept = {op.name for op in contract.FORWARDS if op.backward.keeps}
    here = {CASES[name].kernel for name in KEEPING}
    assert kept <= here
