"""What the compiled attention ops alone have: activations, gates, the bits of dropout, the units that multiply
matrices.  What they share with every kernel is in test_numbers.py and test_contract.py.
"""

import itertools

import pytest
import torch
from op_cases import of_the_cpu, threads
from test_numbers import RAGGED
from torch import Tensor

import milkernels
from milkernels import native, testing
from milkernels.ops import contract
from milkernels.testing import CASES, Shape

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no extension: {native.load_error()}")

COMPILED = [name for name, case in CASES.items() if "compiled" in case.tags]
POOLS = [name for name in COMPILED if name.endswith("_pool")]
# Chunks of 256, and more bags than one in a chunk.
LONG = (0, 256, 2000, 1, 511, 700, 0)


@pytest.fixture(params=["as built", pytest.param("matrix units", marks=of_the_cpu)])
def layout(request):
    """Half types as this machine runs them, and in the layouts of the matrix units."""
    if request.param == "as built":
        yield request.param
        return
    native._extension.emulate_matrix_units(True)
    yield request.param
    native._extension.emulate_matrix_units(False)


def non_empty(shape: Shape) -> Shape:
    return Shape(tuple(n for n in shape.lengths if n), shape.dim, shape.hidden, shape.heads)


def results(case, inputs, mode="step", backend="native"):
    return testing.evaluate(lambda i: case.call(i, backend), inputs, mode, case.primary)


def assert_promise(case, inputs, dtype, mode="step"):
    exact = testing.float64_reference(case, inputs, mode)
    eager = testing.evaluate(case.eager, inputs.with_keep(), mode, case.primary)
    eager = case.complete({n: t.detach() for n, t in eager.items()}, inputs)
    got = results(case, inputs, mode)
    if dtype == torch.float64:  # eager is the oracle itself
        for key, value in got.items():
            torch.testing.assert_close(value, exact.results[key], rtol=1e-12, atol=1e-12)
        return
    promise = testing.error_promise(got, eager, exact, dtype)
    assert promise.ok, promise.broken()


# Accuracy


@pytest.mark.parametrize("features", testing.FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_error_promise(name, dtype, features, layout):
    if layout != "as built" and dtype in (torch.float32, torch.float64):
        pytest.skip("only half types use matrix units at the default precision")
    case = CASES[name]
    for seed, (heads, dim, hidden) in enumerate([(1, 128, 64), (3, 70, 41)]):
        shape = non_empty(Shape(RAGGED if seed else LONG, dim, hidden, heads))
        if layout == "matrix units":  # emulated element by element
            shape = Shape(shape.lengths[-2:], dim, hidden, heads)
        assert_promise(case, case.inputs(shape, dtype, features, seed), dtype)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "identity"])
@pytest.mark.parametrize("name", POOLS)
def test_error_promise_of_activations(name, activation):
    case = CASES[name]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case.inputs(Shape((300, 77), 96, 40, 2), dtype, activation=activation)
        assert_promise(case, inputs, dtype)


def scaled_gates(scale):
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((200,), 32, 16), torch.float32)
    for key in ("v_weight", "u_weight", "v_bias", "u_bias"):
        inputs.parameters[key] = inputs.parameters[key] * scale
    return case, inputs


def test_promise_where_gates_are_flat():
    """Far out exponentials overflow unless they are clamped."""
    assert_promise(*scaled_gates(1e3), torch.float32)


def test_promise_where_gates_are_linear():
    """tanh near 0 loses digits unless it is taken from exp(x) - 1.  Bias gradients cancel to 0 here: left out."""
    case, inputs = scaled_gates(1e-3)
    assert_promise(case, inputs, torch.float32, "fwd")
    exact, got = testing.float64_reference(case, inputs).results, results(case, inputs)
    for key in ("grad_x", "grad_v_weight", "grad_u_weight", "grad_w_weight"):
        assert (got[key] - exact[key]).norm() <= 2e-6 * exact[key].norm(), key


def test_large_scores_do_not_overflow():
    case = CASES["attention_pool"]
    inputs = case.inputs(Shape((200, 3), 32, 16), torch.float32)
    inputs.parameters["w_weight"] = inputs.parameters["w_weight"] * 1e4
    assert_promise(case, inputs, torch.float32)


@of_the_cpu
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_follows_the_precision_switch(precision):
    """At "high" and "medium" float32 may take the matrix units: an error between bfloat16's and float32's."""
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((100,), 64, 32), torch.float32)
    exact = testing.float64_reference(case, inputs, "fwd").results["scores"]
    before = torch.get_float32_matmul_precision()
    native._extension.emulate_matrix_units(True)
    try:
        torch.set_float32_matmul_precision(precision)
        scores = case.call(inputs, "native")["scores"]
    finally:
        torch.set_float32_matmul_precision(before)
        native._extension.emulate_matrix_units(False)
    error = float((scores - exact).norm() / exact.norm())
    low, high = {"high": (1e-7, 2e-5), "medium": (1e-4, 1e-2)}[precision]
    assert low < error < high


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "identity"])
def test_gradcheck_of_the_kernels(activation, gated):
    torch.manual_seed(0)
    offsets, mask = torch.tensor([0, 0, 3, 70, 71]), torch.rand(71) > 0.2
    mask[:3], mask[70] = False, True

    def make(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    x, parameters = make(71, 3), [make(5, 3), make(5), make(5, 3), make(5), make(2, 5), make(2)]
    if not gated:
        parameters[2] = parameters[3] = None
    live = [p for p in parameters if p is not None]

    def run(x, *live):
        given = iter(live)
        full = [None if p is None else next(given) for p in parameters]
        for dropout_p in (0.0, 0.5):
            options = (torch.tensor([3]), activation, dropout_p, None)
            bag, scores, lse = contract.call("attention_pool", "native", x, *full, offsets, mask, *options)
            yield bag, scores[mask], lse[2:]
        yield (contract.call("attention_scores", "native", x, *full, None, mask, *options)[mask],)

    def flat(x, *live):
        return tuple(t for outputs in run(x, *live) for t in outputs)

    with threads(1):  # thousands of tiny calls: waking threads would be most of the time
        assert torch.autograd.gradcheck(flat, (x, *live), nondet_tol=0.0)


def test_raw_ops_refuse_options_that_have_no_kernel():
    """Past the public functions.  What holds for every op, shapes and offsets, is in test_contract.py."""
    x, v, w = torch.randn(5, 4), torch.randn(3, 4), torch.randn(1, 3)

    def call(*options, bias=None):
        return contract.call("attention_pool", "native", x, v, bias, None, None, w, None, None, None, *options)

    with pytest.raises(ValueError, match="v_bias"):
        call(None, "tanh", 0.0, None, bias=torch.randn(4))
    with pytest.raises(ValueError, match="activation"):
        call(None, "swish", 0.0, None)
    with pytest.raises(ValueError, match="seed"):
        call(None, "tanh", 0.5, None)


# Dropout


def test_dropout_extremes_and_generator():
    x, v, w = torch.randn(50, 8), torch.randn(16, 8), torch.randn(1, 16)

    def scores(p, **options):
        return milkernels.attention_scores(x, v, w, dropout_p=p, backend="native", **options)

    assert (scores(1.0, seed=1) == 0).all()
    assert torch.equal(scores(0.0, seed=1), scores(0.0))
    torch.manual_seed(3)
    first, second = scores(0.5), scores(0.5)
    torch.manual_seed(3)
    assert torch.equal(scores(0.5), first) and not torch.equal(first, second)
    assert torch.equal(scores(0.5, seed=9), scores(0.5, seed=torch.tensor([9])))


# Autocast


def sample(rows=70):
    torch.manual_seed(0)
    x, offsets = torch.randn(rows, 12), torch.tensor([0, 30, 30, rows])
    layers = [(torch.randn(out, width), torch.randn(out)) for out, width in ((8, 12), (8, 12), (2, 8))]
    return x, layers, offsets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_equals_the_reference_under_autocast(dtype, layout):
    x, layers, offsets = sample()
    leaves = [t.requires_grad_() for t in (x, *itertools.chain(*layers))]
    exact = milkernels.gated_attention_pool(x, *layers, offsets, backend="reference")
    with torch.autocast("cpu", dtype):
        pooled = milkernels.gated_attention_pool(x, *layers, offsets, backend="native")
        reference = milkernels.gated_attention_pool(x, *layers, offsets, backend="reference")
    assert pooled.bag.dtype == torch.float32
    for ours, theirs, best in zip(pooled, reference, exact, strict=True):
        finite = best.isfinite()
        error = (ours - best)[finite].norm()
        assert error <= 2 * (theirs - best)[finite].norm() + 4 * torch.finfo(torch.float32).eps * best[finite].norm()
    grads = torch.autograd.grad(pooled.bag.sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 7
