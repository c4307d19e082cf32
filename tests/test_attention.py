"""The compiled attention ops: accuracy, gradients, ragged rules, determinism, memory, and their torch.library contract.

What they share with every op (arguments, result types, compositions) is in test_functional.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import milkernels
from milkernels import backends, native, ops, testing
from milkernels.testing import CASES, Shape

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=f"no extension: {native.load_error()}")

COMPILED = [name for name, case in CASES.items() if "compiled" in case.tags]
POOLS = [name for name in COMPILED if name.endswith("_pool")]
# Empty bags first, last and in between; one instance; whole tiles, a row more, a row less; chunks of 64 and of 256.
RAGGED = (0, 1, 64, 0, 0, 63, 65, 5, 130, 0)
LONG = (0, 256, 2000, 1, 511, 700, 0)


@pytest.fixture(params=["as built", "matrix units"])
def layout(request):
    """Half types as this machine runs them, and in the layouts of the matrix units."""
    native._extension.emulate_matrix_units(request.param == "matrix units")
    yield request.param
    native._extension.emulate_matrix_units(False)


@pytest.fixture
def threads():
    """Sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("name", POOLS)
def test_error_promise_with_dropout(name):
    case = CASES[name]
    inputs = case.inputs(Shape((300, 77), 96, 40, 2), torch.float32, dropout_p=0.25, seed=2**40 + 7)
    inputs.options["seed"] = 2**40 + 7
    assert_promise(case, inputs, torch.float32)


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
def test_gradcheck_of_the_kernels(activation, gated, threads):
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
            bag, scores, lse = ops.attention_pool("native", x, *full, offsets, mask, *options)
            yield bag, scores[mask], lse[2:]
        yield (ops.attention_scores("native", x, *full, mask, *options)[mask],)

    def flat(x, *live):
        return tuple(t for outputs in run(x, *live) for t in outputs)

    threads(1)  # thousands of tiny calls: waking threads would be most of the time
    assert torch.autograd.gradcheck(flat, (x, *live), nondet_tol=0.0)


def test_gradients_of_scores_and_lse_add_up():
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((40, 100), 24, 12, 2), torch.float64)
    leaves = list(inputs.leaves("step").values())
    weights = [torch.randn_like(t) for t in case.call(inputs, "native").values()]
    for chosen in ([0], [1], [2], [0, 2], [1, 2], [0, 1, 2]):
        grads = []
        for backend in ("native", "reference"):
            outputs = list(case.call(inputs, backend).values())
            grads.append(torch.autograd.grad([outputs[i] for i in chosen], leaves, [weights[i] for i in chosen]))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


# Ragged rules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", POOLS)
def test_masked_rows_are_as_if_absent(name, dtype):
    """NaN and inf in masked rows reach no output and no gradient; an all-masked bag is an empty one."""
    case = CASES[name]
    shape = Shape((70, 5, 300, 64), 40, 24, 2)
    mask = torch.rand(shape.instances, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[70:75] = False
    inputs = case.inputs(shape, dtype, mask=mask)
    with torch.no_grad():
        inputs.x[~mask] = torch.tensor([float("nan"), float("inf")] * 20, dtype=dtype)
    got = results(case, inputs)
    lengths = tuple(int(m.sum()) for m in mask.split(shape.lengths))
    absent = case.inputs(Shape(lengths, 40, 24, 2), dtype)
    absent.x, absent.parameters, absent.cotangent = (
        inputs.x.detach()[mask],
        inputs.parameters,
        inputs.cotangent,
    )
    expected = results(case, absent)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    assert (got["scores"][~mask] == -torch.inf).all() and (got["grad_x"][~mask] == 0).all()
    assert (got["bag"][1] == 0).all() and (got["lse"][1] == -torch.inf).all()
    for key in got:
        ours = got[key][mask] if key in ("scores", "grad_x") else got[key]
        torch.testing.assert_close(ours, expected[key], **tolerance)


def test_padded_batch_equals_ragged():
    case = CASES["gated_attention_pool"]
    ragged = case.inputs(Shape((30, 1, 200), 40, 24, 2), torch.float64)
    x, mask = milkernels.Bags(ragged.x, ragged.offsets).to_padded(padding_value=float("nan"))
    bags = milkernels.Bags.from_padded(x, mask)
    padded = case.inputs(Shape((200, 200, 200), 40, 24, 2), torch.float64, mask=bags.mask)
    padded.x, padded.parameters, padded.cotangent = bags.values.clone(), ragged.parameters, ragged.cotangent
    got, expected = results(case, padded), results(case, ragged)
    for key in got:
        ours = got[key][bags.mask] if key in ("scores", "grad_x") else got[key]
        torch.testing.assert_close(ours, expected[key])


def test_nan_stays_in_its_bag():
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((70, 60, 300), 40, 24), torch.float32)
    clean = results(case, inputs)
    with torch.no_grad():
        inputs.x[100, 3] = float("nan")
    dirty = results(case, inputs)
    rows, bags = torch.arange(430), torch.arange(3)
    others = (rows < 70) | (rows >= 130)
    assert dirty["bag"][1].isnan().any() and dirty["lse"][1].isnan().all()
    for key, keep in (("bag", bags != 1), ("lse", bags != 1), ("scores", others), ("grad_x", others)):
        assert torch.equal(dirty[key][keep], clean[key][keep])
    assert dirty["grad_v_weight"].isnan().any()  # parameter gradients show it, as in eager


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)])
def test_nothing_to_pool(lengths):
    x = torch.randn(sum(lengths), 7, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    v, w = torch.randn(5, 7, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    pooled = milkernels.attention_pool(x, v, None, w, None, offsets, backend="native")
    assert pooled.bag.shape == (len(lengths), 2, 7) and pooled.scores.shape == (sum(lengths), 2)
    if not sum(lengths):
        assert (pooled.bag == 0).all() and (pooled.lse == -torch.inf).all()
    pooled.bag.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, v, w))


def test_rows_may_be_strided_and_anything_else_is_copied():
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((90, 40), 24, 12), torch.float32)
    expected, dense = results(case, inputs), inputs.x.detach()
    wide = torch.full((130, 30), float("nan"))
    wide[:, 3:27] = dense
    for x in (wide[:, 3:27], dense.t().contiguous().t(), dense.flip(0).flip(0)):
        inputs.x = x.detach()
        got = results(case, inputs)
        for key in got:
            torch.testing.assert_close(got[key], expected[key])


def test_raw_ops_refuse_what_would_read_out_of_bounds():
    x, v, w = torch.randn(5, 4), torch.randn(3, 4), torch.randn(1, 3)
    options = (None, "tanh", 0.0, None)

    def call(x=x, v=v, w=w, offsets=None, mask=None, bias=None, options=options):
        return ops.attention_pool("native", x, v, bias, None, None, w, None, offsets, mask, *options)

    for offsets in ([0, 3], [1, 5], [0, 4, 3, 5], [0, -1, 5], [0, 2**40, 5]):
        with pytest.raises(ValueError, match="offsets must"):
            call(offsets=torch.tensor(offsets))
    with pytest.raises(TypeError, match="int32 or int64"):
        call(offsets=torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match="mask"):
        call(mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="v_weight"):
        call(v=torch.randn(3, 5))
    with pytest.raises(ValueError, match="v_bias"):
        call(bias=torch.randn(4))
    with pytest.raises(ValueError, match="activation"):
        call(options=(None, "swish", 0.0, None))
    with pytest.raises(ValueError, match="seed"):
        call(options=(None, "tanh", 0.5, None))


# Dropout


def test_dropout_mask_is_the_reference_mask():
    """Where every unit has weight 1 and value 1, a score counts the kept units, so one flipped bit would show."""
    rows, units, seed, p = 300, 72, 2**63 - 5, 0.25
    x, v, v_bias, w = torch.zeros(rows, 4), torch.zeros(units, 4), torch.ones(units), torch.eye(units)
    scores = milkernels.attention_scores(
        x, v, v_bias, w, None, activation="identity", dropout_p=p, seed=seed, backend="native"
    )
    keep = testing.dropout_keep(seed, rows, units, 0, p)
    assert torch.equal(scores != 0, keep)
    torch.testing.assert_close(scores[keep], torch.full_like(scores[keep], 1 / (1 - round(p * 65536) / 65536)))
    gated = milkernels.gated_attention_scores(
        x, v, v_bias, v, v_bias, w, None, activation="identity", dropout_p=p, seed=seed, backend="native"
    )
    assert torch.equal(gated != 0, keep & testing.dropout_keep(seed, rows, units, 1, p))


def test_dropout_extremes_and_generator():
    x, v, w = torch.randn(50, 8), torch.randn(16, 8), torch.randn(1, 16)

    def scores(p, **options):
        return milkernels.attention_scores(x, v, None, w, None, dropout_p=p, backend="native", **options)

    assert (scores(1.0, seed=1) == 0).all()
    assert torch.equal(scores(0.0, seed=1), scores(0.0))
    torch.manual_seed(3)
    first, second = scores(0.5), scores(0.5)
    torch.manual_seed(3)
    assert torch.equal(scores(0.5), first) and not torch.equal(first, second)
    assert torch.equal(scores(0.5, seed=9), scores(0.5, seed=torch.tensor([9])))


# Determinism


@pytest.mark.parametrize("lengths", [(3000,), RAGGED, (700, 0, 3, 5000)])
def test_same_bits_whatever_the_threads(lengths, threads):
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape(lengths, 64, 40, 2), torch.float32, dropout_p=0.25)
    runs = []
    for n in (1, 2, 3, 2):
        threads(n)
        runs.append(results(case, inputs))
    for run in runs[1:]:
        for key, value in runs[0].items():
            assert torch.equal(run[key], value), key


_POISON = """
import torch
from milkernels.testing import CASES, Shape, evaluate
out = {}
for name in ("gated_attention_pool", "attention_scores"):
    case = CASES[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for lengths in ((0, 1, 64, 63, 130), (300, 0, 2500)):
            inputs = case.inputs(Shape(lengths, 37, 41, 2), dtype, dropout_p=0.25)
            got = evaluate(lambda i: case.call(i, "native"), inputs, "step", case.primary)
            out[name, dtype, lengths] = {k: t.detach() for k, t in got.items()}
import sys
torch.save(out, sys.argv[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MALLOC_PERTURB_ is glibc's")
def test_results_do_not_depend_on_what_memory_held(tmp_path):
    """Fresh memory is filled with 3.4e38 in one run and 0 or -1.7e38 in others."""
    runs = []
    for fill in ("0", "1", "128"):
        path = tmp_path / fill
        env = os.environ | {"MALLOC_PERTURB_": fill, "OMP_NUM_THREADS": "2"}
        subprocess.run([sys.executable, "-c", _POISON, str(path)], env=env, check=True)
        runs.append(torch.load(path))
    for run in runs[1:]:
        for key, expected in runs[0].items():
            for name, value in expected.items():
                assert torch.equal(run[key][name], value), (key, name)


# The torch.library contract


def sample(gated=True, dtype=torch.float32, rows=70):
    torch.manual_seed(0)
    x, offsets = torch.randn(rows, 12, dtype=dtype), torch.tensor([0, 30, 30, rows])
    parameters = [torch.randn(s, dtype=dtype) for s in ((8, 12), (8,), (8, 12), (8,), (2, 8), (2,))]
    if not gated:
        parameters[2] = parameters[3] = None
    return x, parameters, offsets


@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(gated):
    x, parameters, offsets = sample(gated)
    mask = torch.arange(70) % 5 > 0
    leaves = [t if t is None else t.requires_grad_() for t in (x, *parameters)]
    args = (*leaves, offsets, mask, torch.tensor([5]), "tanh", 0.25, None)
    pool, scores, bwd = (
        getattr(torch.ops.milkernels, name).native
        for name in ("attention_pool_fwd", "attention_scores_fwd", "attention_bwd")
    )
    torch.library.opcheck(pool, args)
    torch.library.opcheck(scores, (*args[:7], None, *args[8:]))
    out = [t.detach() for t in pool(*args)]
    plain = [t.detach() if isinstance(t, Tensor) else t for t in args]
    needs = [t is not None for t in leaves]
    torch.library.opcheck(bwd, (*plain, *out, *(torch.randn_like(t) for t in out), needs))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compile_fullgraph_with_two_sizes(dropout_p):
    def step(x, parameters, offsets):
        pooled = milkernels.gated_attention_pool(x, *parameters, offsets, dropout_p=dropout_p, seed=4)
        return torch.autograd.grad(pooled.bag.square().sum() + pooled.lse[0].sum(), [x, *parameters])

    def loss(x, parameters, offsets):
        pooled = milkernels.gated_attention_pool(x, *parameters, offsets, dropout_p=dropout_p, seed=4)
        return pooled.bag.square().sum() + pooled.lse[0].sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (70, 90):
        x, parameters, offsets = sample(rows=rows)
        leaves = [t.requires_grad_() for t in (x, *parameters)]
        with backends.use_backend("native"):
            expected = torch.autograd.grad(loss(x, parameters, offsets), leaves)
            got = torch.autograd.grad(compiled(x, parameters, offsets), leaves)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_export_with_a_dynamic_number_of_instances():
    _, parameters, offsets = sample()

    class Model(torch.nn.Module):
        def forward(self, x, offsets):
            return milkernels.gated_attention_pool(x, *parameters, offsets, backend="native").bag

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Model(), (torch.randn(70, 12), offsets), dynamic_shapes=({0: rows}, None))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "milkernels.attention_pool_fwd.native" in targets
    x, _, offsets = sample(rows=95)
    torch.testing.assert_close(program.module()(x, offsets), Model()(x, offsets))


def test_double_backward_is_refused_by_name():
    x, parameters, offsets = sample()
    x.requires_grad_()
    pooled = milkernels.gated_attention_pool(x, *parameters, offsets, backend="native")
    (grad,) = torch.autograd.grad(pooled.bag.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_equals_the_reference_under_autocast(dtype, layout):
    x, parameters, offsets = sample()
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    exact = milkernels.gated_attention_pool(x, *parameters, offsets, backend="reference")
    with torch.autocast("cpu", dtype):
        pooled = milkernels.gated_attention_pool(x, *parameters, offsets, backend="native")
        reference = milkernels.gated_attention_pool(x, *parameters, offsets, backend="reference")
    assert pooled.bag.dtype == torch.float32
    for ours, theirs, best in zip(pooled, reference, exact, strict=True):
        finite = best.isfinite()
        error = (ours - best)[finite].norm()
        assert error <= 2 * (theirs - best)[finite].norm() + 4 * torch.finfo(torch.float32).eps * best[finite].norm()
    grads = torch.autograd.grad(pooled.bag.sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 7


def test_half_features_with_float32_parameters():
    x, parameters, offsets = sample()
    half = x.half().requires_grad_()
    leaves = [t.requires_grad_() for t in parameters]
    pooled = milkernels.gated_attention_pool(half, *leaves, offsets, backend="native")
    expected = milkernels.gated_attention_pool(half.detach().float(), *leaves, offsets, backend="native")
    assert pooled.bag.dtype == torch.float32
    torch.testing.assert_close(pooled.bag, expected.bag, rtol=1e-3, atol=1e-3)
    grads = torch.autograd.grad(pooled.bag.sum(), [half, *leaves])
    assert [g.dtype for g in grads] == [torch.float16] + [torch.float32] * 6


def test_frozen_inputs_cost_nothing():
    """No gradient that nobody asked for is computed: nothing of its size is allocated."""
    x, parameters, offsets = sample()
    pooled = milkernels.gated_attention_pool(x, *(p.requires_grad_() for p in parameters), offsets, backend="native")
    grads = torch.ops.milkernels.attention_bwd.native(
        x,
        *(p.detach() for p in parameters),
        offsets,
        None,
        None,
        "tanh",
        0.0,
        None,
        *(t.detach() for t in pooled),
        torch.randn_like(pooled.bag),
        None,
        None,
        [False, True] + [False] * 5,
    )
    assert [g.numel() for g in grads] == [0, parameters[0].numel(), 0, 0, 0, 0, 0]
    pooled.bag.sum().backward()
    assert x.grad is None and all(p.grad is not None for p in parameters)


# Memory


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_does_not_grow_with_the_hidden_units(dtype, threads):
    """Exact gate: allocator events of forward and step stay within scores, partials, workspace and accumulators."""
    threads(2)  # each has tiles of its own
    instances, dim, hidden = 20_000, 128, 64
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((instances,), dim, hidden), dtype)
    with torch.no_grad():
        forward = peak_allocated(lambda: case.call(inputs, "native"))
    # scores, partial sums, and a few tiles per thread and packed weights: nothing of N x hidden (5 MB in float32)
    assert forward <= 4 * instances + 4 * (instances / 256 + 1) * dim + 2 * 2**20
    leaves = inputs.leaves("step").values()

    def step():
        return torch.autograd.grad(case.call(inputs, "native")["bag"].sum(), list(leaves))

    beyond_dx = peak_allocated(step) - inputs.x.numel() * inputs.x.element_size()
    accumulators = 16 * 4 * (2 * hidden * dim + 4 * hidden)
    assert beyond_dx <= 16 * instances + accumulators + 3 * 2**20


def test_eager_breaks_that_bound():
    """The gate above would notice: eager's hidden units are far over it."""
    instances, dim, hidden = 20_000, 128, 64
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((instances,), dim, hidden), torch.float32)
    with torch.no_grad():
        assert peak_allocated(lambda: case.eager(inputs)) > 4 * instances * hidden
