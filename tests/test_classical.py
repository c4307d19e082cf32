"""The classical poolings against their formulas, written straight in a loop over bags, in float64."""

import doctest

import pytest
import torch

import milkernels
from milkernels.ops import classical

OFFSETS = torch.tensor([0, 4, 4, 9, 10, 12])  # the second bag is empty
MASK = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0])  # and so is the last one, once masked
N, C = len(MASK), 3
NAN = float("nan")

FORMULAS = {
    "log_sum_exp_pool": lambda x, r=1.0: (r * x).exp().mean(0).log() / r,
    "noisy_or_pool": lambda p: 1 - (1 - p).prod(0),  # the gradient of torch.prod is exact, zeros included
    "isr_pool": lambda p: 1 - 1 / (1 + (p / (1 - p)).sum(0)),
    "generalized_mean_pool": lambda x, r=3.0: x.pow(r).mean(0).pow(1 / r),
}
CASES = [
    ("log_sum_exp_pool", {}),
    ("log_sum_exp_pool", {"r": 7.5}),
    ("noisy_or_pool", {}),
    ("isr_pool", {}),
    ("generalized_mean_pool", {}),
    ("generalized_mean_pool", {"r": 0.5}),
    ("generalized_mean_pool", {"r": 1}),
]
every_op = pytest.mark.parametrize("op", FORMULAS)
every_case = pytest.mark.parametrize("op, options", CASES)


def call(op, *args, **kwargs):
    return getattr(milkernels, op)(*args, **kwargs)


def expected(op, x, offsets=None, mask=None, **options):
    bounds = [0, len(x)] if offsets is None else offsets.tolist()
    real = torch.ones(len(x), dtype=torch.bool) if mask is None else mask.bool()
    bags = [x[start:end][real[start:end]] for start, end in zip(bounds, bounds[1:], strict=False)]
    return torch.stack([FORMULAS[op](bag, **options) if len(bag) else x.new_zeros(x.shape[1]) for bag in bags])


def probabilities(*size, dtype=torch.float64):
    return torch.rand(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def graded(fn, x):
    """The value and the gradient of ``fn``, each column of each bag with a weight of its own."""
    x = x.detach().clone().requires_grad_()
    out = fn(x)
    weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weights).sum(), x)[0]


def assert_close(got, want, tolerance=1e-12, underflow=0.0):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), rtol=tolerance, atol=underflow)


# Against the formulas


@every_case
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("mask", [None, MASK, MASK.bool()], ids=["no mask", "0/1", "bool"])
@pytest.mark.parametrize("offsets", [None, OFFSETS, OFFSETS.int()], ids=["one bag", "int64", "int32"])
def test_values_and_gradients(op, options, offsets, mask, backend):
    x = probabilities(N, C)
    want = graded(lambda x: expected(op, x, offsets, mask, **options), x)
    if mask is not None:
        x[mask == 0] = NAN
    got = graded(lambda x: call(op, x, offsets, mask=mask, backend=backend, **options), x)
    assert_close(got, want)
    if mask is not None:
        assert not got[1][mask == 0].any()


@every_case
def test_gradcheck(op, options):
    x = probabilities(N, C).requires_grad_()

    def fn(x):
        return call(op, x, OFFSETS, mask=MASK, backend="reference", **options)

    assert torch.autograd.gradcheck(fn, x)
    assert torch.autograd.gradgradcheck(fn, x)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_types(op, options, dtype):
    # Rare positives: 1 in a half type would be a pole of eager's ISR.
    x, offsets = (probabilities(60, C) / 4).to(dtype), torch.tensor([0, 20, 60])
    got = graded(lambda x: call(op, x, offsets, **options), x)
    eager = graded(lambda x: expected(op, x, offsets, **options), x)
    want = graded(lambda x: expected(op, x, offsets, **options), x.double())
    for g, e, w in zip(got, eager, want, strict=True):
        assert g.dtype == dtype
        error, allowed = (g - w).norm(), 2 * (e - w).norm() + 4 * torch.finfo(dtype).eps * w.norm()
        assert error <= allowed
    assert torch.equal(got[0], call(op, x.float(), offsets, **options).to(dtype)), "computed in float32"


@every_case
def test_autocast_changes_nothing(op, options):
    x = probabilities(N, C, dtype=torch.float32)
    want = graded(lambda x: call(op, x, OFFSETS, **options), x)
    with torch.autocast("cpu", torch.bfloat16):
        got = graded(lambda x: call(op, x, OFFSETS, **options), x)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# Bags


@every_op
def test_a_nan_stays_in_its_bag_and_column(op):
    x = probabilities(N, C)
    want = graded(lambda x: call(op, x, OFFSETS, mask=MASK), x)
    x[5] = NAN  # masked
    x[6, 1] = NAN
    bag, grad = graded(lambda x: call(op, x, OFFSETS, mask=MASK), x)
    assert bag[2, 1].isnan()
    assert not grad[5].any()
    bag[2, 1], grad[4:9, 1] = want[0][2, 1], want[1][4:9, 1]
    assert_close((bag, grad), want)


@every_op
def test_bags_without_instances(op):
    none = torch.zeros(0, C, requires_grad=True)
    for offsets, num_bags in ((None, 1), (torch.tensor([0]), 0), (torch.tensor([0, 0, 0]), 2)):
        bag, grad = graded(lambda x, offsets=offsets: call(op, x, offsets), none)
        assert torch.equal(bag, torch.zeros(num_bags, C)) and grad.shape == (0, C)


@every_case
def test_the_order_of_instances_does_not_matter(op, options):
    x, order = probabilities(N, C), torch.tensor([3, 1, 0, 2, 8, 7, 4, 6, 5, 9, 11, 10])
    out, grad = graded(lambda x: call(op, x, OFFSETS, **options), x)
    assert_close(graded(lambda x: call(op, x, OFFSETS, **options), x[order]), (out, grad[order]))


@every_case
def test_pooling_the_pools_of_parts_is_pooling_the_whole(op, options):
    # Parts of one length, which the means need.
    x, parts = probabilities(N, C), torch.arange(0, N + 1, 3)
    whole = graded(lambda x: call(op, x, **options), x)
    assert_close(graded(lambda x: call(op, call(op, x, parts, **options), **options), x), whole)


# Extreme values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("r, size", [(1, 1000), (1000, 1), (1e-3, 1e6)])
def test_log_sum_exp_does_not_overflow(r, size, dtype):
    spread = torch.tensor([0, -1.5, 0, -3, -2000]) / r
    for x in (size + spread, -size + spread, torch.tensor([size, -size]), torch.tensor([-size])):
        x = x.to(dtype)[:, None]
        got = graded(lambda x: call("log_sum_exp_pool", x, r=r), x)
        n = torch.tensor(float(len(x)), dtype=torch.float64)
        want = graded(lambda x: (torch.logsumexp(r * x, 0, keepdim=True) - n.log()) / r, x.double())  # noqa: B023
        assert_close(got, want, 1e-6)


TINY = 1e-20
EDGES = [
    [0.0, 0.0, 0.0],
    [TINY, 3 * TINY, 0.0],
    [0.0, 0.3, 1.0],
    [1.0],
    [1 - 1e-7, 0.5],
    [1 - 1e-7, 1 - 1e-7, 0.25],
    [1 - 1e-7, 1.0, 0.25],
    [1.0, 0.5, 1.0],
    [1.0, 1.0, 1.0],
    [0.9] * 400,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: str(edge[:3]))
def test_noisy_or_at_the_edges(edge, dtype):
    p = torch.tensor(edge, dtype=dtype)[:, None]
    out, grad = graded(lambda p: call("noisy_or_pool", p), p)
    assert_close([grad], [graded(lambda p: FORMULAS["noisy_or_pool"](p)[None], p.double())[1]], 2e-6)
    want = p.double().sum() if p.max() < 1e-10 else FORMULAS["noisy_or_pool"](p.double())
    assert_close([out.squeeze()], [want.squeeze()], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: str(edge[:3]))
def test_isr_at_the_edges(edge, dtype):
    p = torch.tensor(edge, dtype=dtype)[:, None]
    out, grad = graded(lambda p: call("isr_pool", p), p)
    sure = p == 1
    if sure.any():
        assert out == 1
        assert torch.equal(grad, sure.to(dtype) * (sure.sum() == 1))
    else:
        q = p.double()
        odds = (q / (1 - q)).sum()
        assert_close([out.squeeze(), grad], [odds / (1 + odds), ((1 - q) * (1 + odds)) ** -2], 2e-6)


@pytest.mark.parametrize("op", ["noisy_or_pool", "isr_pool"])
def test_second_derivatives_with_a_certain_instance(op):
    p = torch.tensor([[0.3], [1.0], [0.6]], dtype=torch.float64, requires_grad=True)
    near = torch.tensor([[0.3], [1 - 1e-9], [0.6]], dtype=torch.float64, requires_grad=True)
    got, want = (
        torch.autograd.functional.hessian(lambda p: call(op, p, backend="reference").sum(), t) for t in (p, near)
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("r", [0.5, 2, 3.0, 50, 1000])
def test_generalized_mean_of_any_size(r, dtype):
    shares = torch.tensor([0.25, 1, 0.5, 1], dtype=dtype)[:, None]
    want = graded(lambda x: FORMULAS["generalized_mean_pool"](x, r)[None], shares.double())
    for size in (1, 2.0**100, 2.0**-100):
        out, grad = graded(lambda x: call("generalized_mean_pool", x, r=r), shares * size)
        assert_close((out / size, grad), want, 1e-4 if dtype == torch.float32 else 1e-12, underflow=1e-14)


@pytest.mark.parametrize("r", [0.5, 1, 1.5, 3])
def test_generalized_mean_of_zeros(r):
    x = torch.tensor([0.0, 0.0, 0.0, 0.25, 1.0], dtype=torch.float64)[:, None]
    out, grad = graded(lambda x: call("generalized_mean_pool", x, torch.tensor([0, 2, 5]), r=r), x)
    assert_close([out.flatten()], [torch.tensor([0, ((0.25**r + 1) / 3) ** (1 / r)], dtype=x.dtype)])
    assert grad.isfinite().all() and (grad[3:] > 0).all()
    assert r == 1 or not grad[:3].any()


@pytest.mark.parametrize("op", ["log_sum_exp_pool", "generalized_mean_pool"])
def test_large_r_is_the_maximum(op):
    x = probabilities(N, C)
    assert_close([call(op, x, OFFSETS, r=1e6)], [milkernels.max_pool(x, OFFSETS).values], 1e-5)


# Errors, tracing, examples


@every_op
def test_errors(op):
    name, x = op_argument(op), probabilities(N, C)
    with pytest.raises(TypeError, match=f"{name} must be a tensor; got list"):
        call(op, [[1.0]])
    with pytest.raises(TypeError, match=f"{name} must be float16.*got torch.int64"):
        call(op, x.long())
    with pytest.raises(ValueError, match=rf"{name} must have 2 dimensions; got shape \(3,\)"):
        call(op, x[0])
    with pytest.raises(ValueError, match="offsets must end at the number of instances, 12; got 11"):
        call(op, x, OFFSETS.clamp(max=11))
    with pytest.raises(TypeError, match="offsets must be int32 or int64; got torch.float32"):
        call(op, x, OFFSETS.float())
    with pytest.raises(ValueError, match=r"mask must be \[12\]; got shape \(11,\)"):
        call(op, x, OFFSETS, mask=MASK[1:])
    with pytest.raises(ValueError, match="backend must be one of .*; got 'fastest'"):
        call(op, x, OFFSETS, backend="fastest")


def op_argument(op):
    return "p" if op in ("noisy_or_pool", "isr_pool") else "x"


@pytest.mark.parametrize("op", ["log_sum_exp_pool", "generalized_mean_pool"])
def test_bad_r(op):
    for r in (0, -1.5, float("inf"), NAN):
        with pytest.raises(ValueError, match=f"r must be .*finite; got {r}"):
            call(op, probabilities(N, C), OFFSETS, r=r)
    for r in (None, "3", torch.tensor(3.0)):
        with pytest.raises(TypeError, match=f"r must be a number; got {type(r).__name__}"):
            call(op, probabilities(N, C), OFFSETS, r=r)


@every_op
def test_compile(op):
    compiled = torch.compile(
        lambda x, offsets, mask: call(op, x, offsets, mask=mask), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (N, N - 1):
        x, offsets, mask = probabilities(n, C), OFFSETS.clamp(max=n), MASK[:n]
        x[1] = 1.0
        want = graded(lambda x, offsets=offsets, mask=mask: call(op, x, offsets, mask=mask), x)
        assert_close(graded(lambda x, offsets=offsets, mask=mask: compiled(x, offsets, mask), x), want)


def test_the_examples_run():
    results = doctest.testmod(classical)
    assert results.attempted > 5 and results.failed == 0
