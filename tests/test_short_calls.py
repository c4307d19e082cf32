"""The way to kernels and through autograd without Python (csrc/autograd.cpp) is the same as the one with it, which
compilers and observers take."""

import contextlib

import pytest
import torch
from legs import ONE_OF_EACH, VARIANTS, at, by_leg
from op_cases import cotangents, every_kernel, needs_extension, offsets_of, same_bits, step
from torch._dynamo import compiled_autograd
from torch.overrides import TorchFunctionMode

from milkernels import _torch, attention_pool, max_pool, saved_bytes, softmax_pool
from milkernels.ops import contract

pytestmark = needs_extension

LENGTHS = (5, 0, 12)
MASK = torch.arange(17) % 4 > 0


@pytest.fixture
def observed(monkeypatch):
    """Within the block, calls go the long way."""

    @contextlib.contextmanager
    def block():
        with monkeypatch.context() as patch:
            patch.setattr(_torch, "unobserved", lambda tensor: False)
            yield

    return block


def test_every_op_that_is_not_composed_has_the_short_way():
    plain = {op.name for op in contract.FORWARDS if op.full_name not in contract.COMPOSED}
    assert {name for name, backend in contract._SHORT if backend == "native"} == plain


@by_leg(
    compiled=[at(cases=ONE_OF_EACH), at(cases=VARIANTS, slow=True)],
    interpreted=[at(cases=ONE_OF_EACH, slow=True)],
)
def test_the_same_bits(observed, leg, case):
    tensors, offsets = case.make(LENGTHS, torch.float32), offsets_of(LENGTHS)
    for wanted in (None, {0}, {1}):
        if wanted == {1} and len(case.ours(leg.backend)(tensors, offsets, MASK)) == 1:
            continue
        short = step(case.ours(leg.backend), tensors, offsets, MASK, wanted)
        with observed():
            long = step(case.ours(leg.backend), tensors, offsets, MASK, wanted)
        same_bits(short, long)


@every_kernel
def test_one_tensor_at_a_time_may_want_a_gradient(observed, case):
    names = [name for name, t in case.make(LENGTHS, torch.float32).items() if t.requires_grad]
    for name in names:
        tensors = {n: t.detach().requires_grad_(n == name) for n, t in case.make(LENGTHS, torch.float32).items()}
        if not any(o.requires_grad for o in case.ours("native")(tensors, offsets_of(LENGTHS), None)):
            continue
        short = step(case.ours("native"), tensors, offsets_of(LENGTHS), None)
        with observed():
            same_bits(short, step(case.ours("native"), tensors, offsets_of(LENGTHS), None))


@every_kernel
def test_what_has_no_gradient_says_so(observed, case):
    tensors = case.make(LENGTHS, torch.float32)
    call = case.ours("native")
    short = call(tensors, offsets_of(LENGTHS), None)
    with observed():
        long = call(tensors, offsets_of(LENGTHS), None)
    assert [o.requires_grad for o in short] == [o.requires_grad for o in long]
    with torch.no_grad():
        assert not any(o.requires_grad for o in call(tensors, offsets_of(LENGTHS), None))


def _bag(n=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator).requires_grad_()
    v, w = torch.nn.Linear(6, 5), torch.nn.Linear(5, 2)
    return x, v, w


def test_a_graph_is_walked_twice_if_it_is_retained():
    x, v, w = _bag()
    loss = attention_pool(x, v, w).bag.square().sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_what_is_saved_may_not_be_changed():
    x, v, w = _bag()
    features = x * 1
    loss = attention_pool(features, v, w).bag.sum()
    features += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_limit_of_what_is_kept_counts():
    x, v, w = _bag(200)
    sizes = {}
    for limit in (0, None):
        kept = []
        with (
            saved_bytes(limit),
            torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t) or t, lambda t: t),
        ):
            attention_pool(x, v, w)
        sizes[limit] = sum(t.numel() for t in kept if t.dtype == torch.uint8)
    assert sizes[0] == 0 < sizes[None]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd_records_it(backend):
    x, v, w = _bag()
    scores = torch.randn(8, 2, requires_grad=True)
    offsets = torch.tensor([0, 3, 8])
    leaves = [x, scores, *v.parameters(), *w.parameters()]

    def loss():
        pooled = attention_pool(x, v, w, offsets, dropout_p=0.25, seed=3)
        given = softmax_pool(x, scores, offsets)
        return pooled.bag.square().sum() + given.lse.square().sum() + max_pool(x, offsets).values.sum()

    expected = torch.autograd.grad(loss(), leaves)
    with compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        loss().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_gradients_for_several_cotangents_at_once():
    x, v, w = _bag()
    out = attention_pool(x, v, w).bag
    several = torch.stack(cotangents([out] * 3, seed=2))
    (batched,) = torch.autograd.grad(out, x, several, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in several]
    torch.testing.assert_close(batched, torch.stack(one_by_one))


def test_modes_see_the_raw_ops():
    class Seen(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    x, v, w = _bag()
    with Seen():
        attention_pool(x, v, w)
    assert any("attention_pool_fwd" in name for name in names), names


def test_other_counts_of_arguments_are_refused():
    short = contract._SHORT["softmax_pool", "native"]
    with pytest.raises(TypeError, match="expected 4 arguments; got 2"):
        short(torch.ones(3, 2), torch.ones(3, 1))
