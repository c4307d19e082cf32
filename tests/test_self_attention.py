"""`SelfAttention`: the formulas in float64, bags in every form, and memory that does not grow with the square."""

import math

import pytest
import torch
from nn_cases import FORMS, NAN, forms
from torch.utils._python_dispatch import TorchDispatchMode

from milkernels import Bags, nn
from milkernels.nn import self_attention
from milkernels.streaming import StreamedBag

L, LENGTHS = 16, (5, 0, 1, 40)
every_kernel = pytest.mark.parametrize("kernel", self_attention.KERNELS)


def dense(q, k, kernel, alpha):
    """The scores as the paper has them, by the difference of each pair."""
    if kernel == "dot":
        return (q[:, None] * k).sum(2)
    difference = q[:, None] - k
    if kernel == "laplace":
        return -difference.abs().sum(2)
    far = alpha * difference.square().sum(2)
    return torch.exp(-far) if kernel == "gaussian" else 1 / (far + 1)


def expected(module, x, lengths):
    """``[N, L]``, a bag after the other, in the type of the parameters."""
    rows = []
    for bag in x.split(lengths):
        q, k, v = module.query(bag), module.key(bag), module.value(bag)
        weights = torch.softmax(dense(q, k, module.kernel, module.alpha), 1)
        rows.append(bag + module.gamma * (weights @ v))
    return torch.cat(rows)


def make(kernel, dtype=torch.float64, width=L, **options):
    torch.manual_seed(0)
    module = nn.SelfAttention(width, kernel, **options)
    with torch.no_grad():
        module.gamma.fill_(0.7)
        if module.alpha is not None:
            module.alpha.fill_(0.3)
    return module.to(dtype)


def bags_of(lengths=LENGTHS, dtype=torch.float64, width=L, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Bags.from_list([torch.randn(n, width, generator=generator, dtype=torch.float64).relu() for n in lengths]).to(
        dtype=dtype
    )


def step(module, compute, x):
    """``{name: tensor}`` of the output and all gradients."""
    x = x.detach().requires_grad_()
    out = compute(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names, leaves = ["x"], [x]
    for name, parameter in module.named_parameters():
        names, leaves = [*names, name], [*leaves, parameter]
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.fixture(params=[self_attention._AT_ONCE, 64], ids=["one-chunk", "chunks"])
def at_once(request, monkeypatch):
    monkeypatch.setattr(self_attention, "_AT_ONCE", request.param)


@every_kernel
@pytest.mark.parametrize("key_dim", [None, 5])
def test_formula(at_once, kernel, key_dim):
    module, bags = make(kernel, key_dim=key_dim), bags_of()
    ours = step(module, lambda x: module(x, bags.offsets).values, bags.values)
    theirs = step(module, lambda x: expected(module, x, LENGTHS), bags.values)
    for name, value in theirs.items():
        assert value.abs().max() > 0, f"{name} says nothing"
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@every_kernel
def test_by_hand(kernel):
    """Two instances, of one feature, and what is compared as they are."""
    module = nn.SelfAttention(1, kernel, dtype=torch.float64)
    with torch.no_grad():
        for layer in (module.query, module.key, module.value):
            layer.weight.fill_(1)
            layer.bias.zero_()
        module.gamma.fill_(1)
    near, far = {
        "dot": ((1, 3), (3, 9)),
        "gaussian": ((1, math.exp(-4)), (math.exp(-4), 1)),
        "inverse_quadratic": ((1, 0.2), (0.2, 1)),
        "laplace": ((0, -2), (-2, 0)),
    }[kernel]
    weights = torch.tensor([near, far], dtype=torch.float64).softmax(1)
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(module(x).values, x + weights @ x)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_promise(kernel, dtype):
    """At most twice the error of the formula in that type, and four roundings; summed over several seeds."""
    lengths, ours, eager, size = (120, 1, 30), {}, {}, {}
    for seed in range(3):
        module, bags = make(kernel, dtype, width=64), bags_of(lengths, dtype, 64, seed)
        exact = make(kernel, torch.float64, width=64)
        exact.load_state_dict(module.state_dict())
        reference = step(exact, lambda x, m=exact: expected(m, x, lengths), bags.values.double())
        found = step(module, lambda x, m=module, b=bags: m(x, b.offsets).values, bags.values)
        naive = step(module, lambda x, m=module: expected(m, x, lengths), bags.values)
        for name, r in reference.items():
            for errors, value in ((ours, found[name] - r), (eager, naive[name] - r), (size, r)):
                errors[name] = errors.get(name, 0.0) + value.double().square().sum().item()
    eps = torch.finfo(dtype).eps
    for name in size:
        if name == "key.bias" and kernel == "dot":
            continue  # 0 in exact arithmetic: it shifts all scores of a query
        bound = 2 * eager[name] ** 0.5 + 4 * eps * size[name] ** 0.5
        assert ours[name] ** 0.5 <= bound, f"{name}: {ours[name] ** 0.5:.2e} above {bound:.2e}"


@every_kernel
def test_gradcheck(at_once, kernel):
    module, bags = make(kernel), bags_of((4, 0, 9))
    parameters = dict(module.named_parameters())

    def call(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(module, named, (x, bags.offsets)).values

    assert torch.autograd.gradcheck(call, (bags.values.requires_grad_(), *parameters.values()))


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_bags(form):
    """Masked rows, which hold NaN, count for nothing, and are 0; their gradient is too."""
    module, bags = make("gaussian"), bags_of((4, 0, 1, 7))
    args, rows = forms(bags)[form]
    out = module(*args)
    torch.testing.assert_close(out.values[rows], expected(module, bags.values, [4, 0, 1, 7]))
    assert not out.values.isnan().any() and torch.equal(out.compact().offsets.long(), bags.offsets)
    others = torch.ones(len(out.values), dtype=torch.bool).index_fill(0, rows, False)
    assert (out.values[others] == 0).all()


def test_no_gradient_of_masked_rows():
    module = make("laplace")
    x = torch.randn(6, L, dtype=torch.float64)
    x[2] = NAN
    x.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    module(x, torch.tensor([0, 3, 6]), mask).values.sum().backward()
    assert (x.grad[2] == 0).all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@every_kernel
def test_no_instances(kernel):
    module = make(kernel)
    for lengths in ((0,), (0, 0)):
        x = torch.zeros(0, L, dtype=torch.float64, requires_grad=True)
        out = module(x, torch.zeros(len(lengths) + 1, dtype=torch.int64))
        out.values.sum().backward()
        assert out.values.shape == (0, L) and len(out) == len(lengths)
        assert all((p.grad == 0).all() for p in module.parameters())
    masked = module(torch.full((3, L), NAN, dtype=torch.float64), None, torch.zeros(3))
    assert (masked.values == 0).all()


class Largest(TorchDispatchMode):
    """The most numbers that an operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and not getattr(func, "is_view", False):
                self.numbers = max(self.numbers, t.numel())
        return out


@every_kernel
def test_memory(kernel):
    """No tensor has a number for each pair of instances, and only what each instance has is kept for the backward."""
    count = 3000
    module, x = make(kernel, torch.float32), torch.randn(count, L, requires_grad=True)
    saved = []
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = module(x).values.sum()
        out.backward()
    assert largest.numbers <= self_attention._AT_ONCE < count**2 / 4
    assert max(t.numel() for t in saved) <= count * L and len(saved) < 20


def test_attention_begins_as_if_it_were_not_there():
    module, bags = nn.SelfAttention(L), bags_of(dtype=torch.float32)
    assert torch.equal(module(bags).values, bags.values) and module.alpha is None
    assert [nn.SelfAttention(w).query.out_features for w in (1, 7, 64)] == [1, 1, 8]
    module(bags).values.square().sum().backward()
    assert module.gamma.grad != 0


def test_negative_alpha_counts_as_zero():
    module, bags = make("gaussian"), bags_of()
    with torch.no_grad():
        module.alpha.fill_(-2)
    out = module(bags).values
    mean = torch.cat([module.value(bag).mean(0, keepdim=True).expand_as(bag) for bag in bags if len(bag)])
    torch.testing.assert_close(out, bags.values + module.gamma * mean)


def test_extras_and_a_pooling_behind():
    bags = bags_of()
    bags = Bags(bags.values, bags.offsets, extras={"coords": torch.arange(len(bags.values))})
    out = make("dot")(bags)
    assert out.extras["coords"] is bags.extras["coords"] and out.offsets is bags.offsets
    assert nn.ABMIL(L, 2, 8).double()(out).logits.shape == (4, 2)


@every_kernel
def test_autocast_compile_and_bits(kernel):
    module, bags = make(kernel, torch.float32), bags_of(dtype=torch.float32)
    exact = module(bags).values
    with torch.autocast("cpu", torch.bfloat16):
        low = module(bags).values
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, rtol=0.03, atol=0.03)
    first, again = (step(module, lambda x: module(x, bags.offsets).values, bags.values) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.testing.assert_close(torch.compile(module, backend="eager")(bags).values, exact)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nn.SelfAttention(0), ValueError, "in_dim must be at least 1; got 0"),
        (lambda: nn.SelfAttention(4, "cosine"), ValueError, "kernel must be one of .*'cosine'"),
        (lambda: nn.SelfAttention(4, key_dim=0), ValueError, "key_dim must be at least 1; got 0"),
        (lambda: nn.SelfAttention(4)(torch.zeros(3, 5)), ValueError, "in_dim=4 features; got shape"),
        (
            lambda: nn.SelfAttention(4)(torch.zeros(3, 4).double()),
            TypeError,
            "type of the parameters.*got torch.float64",
        ),
        (lambda: nn.SelfAttention(4)(StreamedBag(torch.zeros(3, 4))), TypeError, "x must have all .*got StreamedBag"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_trace_would_be_of_one_size_and_is_refused():
    with pytest.raises(RuntimeError, match="a trace would keep the sizes"):
        torch.jit.trace(lambda x: nn.SelfAttention(6)(x).values, torch.randn(9, 6))


def test_training_on_a_bag_whose_rows_are_many():
    """It learns what a pooling alone cannot see: whether a bag holds two instances that are the same."""
    generator = torch.Generator().manual_seed(0)
    pools = [torch.randn(12, 8, generator=generator) for _ in range(60)]
    for i, bag in enumerate(pools):
        if i % 2:
            bag[6:] = bag[:6]
    bags, labels = Bags.from_list(pools), torch.arange(60) % 2
    torch.manual_seed(0)
    module, classifier = nn.SelfAttention(8, "laplace", key_dim=8), nn.ABMIL(8, 1, 32)
    optimiser = torch.optim.Adam([*module.parameters(), *classifier.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        logits = classifier(module(bags)).logits[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
