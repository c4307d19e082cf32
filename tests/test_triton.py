"""What the Triton kernels alone have, through Triton's interpreter: slices, scales of half types, products in three
parts, the launches of a call.  Their other numbers are in test_numbers.py, their compilation in test_aot.py.
"""

import contextlib
import dataclasses

import op_cases
import pytest
import torch
from legs import EMBEDDED, LEGS, ONE_OF_EACH
from op_cases import CASES, NAN, PLAIN, close, offsets_of, same_bits, step
from test_contract import detached, recorded
from test_numbers import HEADS as FIVE
from test_numbers import ODD, some_mask

from milkernels import native, saved_bytes, testing

pytestmark = LEGS["interpreted"].needed

INF = float("inf")
# A case of each op, and one on embedded instances of each that takes them.
one_of_each = pytest.mark.parametrize("case", [CASES[name] for name in ONE_OF_EACH], ids=ONE_OF_EACH)
embedded = pytest.mark.parametrize("case", EMBEDDED.values(), ids=EMBEDDED)


@pytest.fixture(autouse=True)
def nothing_saved():
    """All is computed again in slices of rows; what is kept instead is test_saved_triton.py's to say."""
    with saved_bytes(0):
        yield


def served(*names: str):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def run(case, tensors, offsets, mask=None, backend="triton", wanted=None):
    return step(case.ours(backend), tensors, offsets, mask, wanted)


@served(
    *("gated_attention_pool", "gated_attention_scores", "dsmil_pool-mlp-q-relu-v", "dsmil_pool-linear-v-dropout"),
    *(name for name in EMBEDDED if name != "gated_attention_pool-embed-dropout"),  # it has scales besides, below
)
@pytest.mark.slow
def test_rows_in_several_slices(case, monkeypatch):
    """A workspace that holds one segment: what is one slice of rows elsewhere is as many as there are segments."""
    lengths, mask = (70, 0, 5, 130), some_mask(205)
    tensors, offsets = case.make(lengths, **ODD), offsets_of(lengths)
    whole = run(case, tensors, offsets, mask)
    from milkernels.triton import call

    monkeypatch.setattr(call, "WORKSPACE", 1)
    close(run(case, tensors, offsets, mask), whole)


@pytest.mark.parametrize("lengths", [(70, 5), (133,)], ids=str)
@served("gated_attention_pool", "attention_pool-gelu-dropout")
@pytest.mark.slow
def test_float32_products_in_three_parts(case, lengths):
    """No larger an error than float32 products have, and not the very same bits."""
    errors = {}
    for products in ("library", "split"):
        runs = []
        for seed in range(3):
            tensors, offsets = case.make(lengths, torch.float32, seed, relu=True, **ODD), offsets_of(lengths)
            with triton_tuning().use(products=products):
                got = run(case, tensors, offsets)
            runs.append((got, step(case.truth, tensors, offsets, None), op_cases.exactly(case, tensors, offsets)))
        ours, eager, exact = (op_cases.together(results) for results in zip(*runs, strict=True))
        kept = testing.error_promise(ours, eager, exact, torch.float32)
        assert kept.ok, kept.broken()
        errors[products] = {name: (ours[name].double() - exact[name]).norm() for name in ours}
    assert errors["library"] != errors["split"]
    with triton_tuning().use(products="split"):
        torch.set_float32_matmul_precision("high")  # they obey PyTorch's own switch
        try:
            rounded = run(case, tensors, offsets)
        finally:
            torch.set_float32_matmul_precision("highest")
    with triton_tuning().use(products="library"):
        same_bits(rounded, run(case, tensors, offsets))


def test_three_parts_of_numbers_that_are_no_numbers():
    from milkernels.triton import split

    x = torch.tensor([[1.0, INF, -INF, NAN, 1e-30, 3e38, -0.0, 1 + 2**-23]])
    parts = split.split(x).float().view(3, 8)
    torch.testing.assert_close(parts.sum(0), x[0], rtol=0, atol=0, equal_nan=True)


def triton_tuning():
    from milkernels.triton import tuning

    return tuning


@served(
    *("gated_attention_pool", "dsmil_pool-mlp-q-relu-v"),
    *("gated_attention_pool-embed-dropout", "dsmil_pool-embed"),
)
@pytest.mark.slow
def test_float16_gradients_do_not_underflow(case):
    """Of a loss that is small the gradients are as exact as of one that is not; parameters are float32 here, so that
    they can hold them."""
    offsets = offsets_of((300,))
    tensors = case.make((300,), torch.float16, parameter_dtype=torch.float32, relu=True, **ODD)
    parameters = {n: t for n, t in tensors.items() if t.requires_grad and n not in ("x", "w_bias")}
    bag = case.ours("triton")(tensors, offsets, None)[0]
    sent = torch.randn(bag.shape, generator=torch.Generator().manual_seed(0))
    usual, small = (
        torch.autograd.grad(bag, parameters.values(), sent * size, retain_graph=True) for size in (1.0, 2.0**-40)
    )
    for name, a, b in zip(parameters, usual, small, strict=True):
        assert a.norm() > 0
        assert (b * 2.0**40 - a).norm() <= 1e-3 * a.norm(), name


@served("gated_attention_pool-embed-dropout", "dsmil-embed-mlp-q-relu-v")
@pytest.mark.slow
def test_float16_slices_have_scales_of_their_own(case, monkeypatch):
    from milkernels.triton import call

    monkeypatch.setattr(call, "WORKSPACE", 1)
    kept = op_cases.promise(case, "triton", torch.float16, lengths=(70, 5, 60), seeds=2, **FIVE)
    assert kept.ok, kept.broken()


@served(
    *("gated_attention_pool", "gated_attention_pool-dropout", "attention_pool-gelu-dropout"),
    "gated_attention_pool-embed-dropout",
)
def test_float16_gradients_do_not_overflow(case):
    """Nine units of ten are dropped, the others count tenfold, twice where there is a gate; and features are large."""
    options = case.options | ({"dropout_p": 0.9} if case.dropped() else {})
    embed = case.embed and case.embed | {"dropout_p": 0.9}
    case = dataclasses.replace(case, options=options, embed=embed)
    tensors = case.make((60,), torch.float16, relu=True, **ODD)
    tensors["x"].data.mul_(30)
    for name, t in run(case, tensors, None).items():
        assert t.isfinite().all(), name


@served("gated_attention_pool", "gated_attention_pool-dropout", "attention_pool-gelu-dropout")
@pytest.mark.parametrize("heads", [9, 17])
def test_many_heads_are_summed_in_groups(case, heads):
    tensors, offsets = case.make((70, 5), torch.float64, **(ODD | {"K": heads})), offsets_of((70, 5))
    mask = some_mask(75)
    close(run(case, tensors, offsets, mask), run(case, tensors, offsets, mask, "reference"))


def test_rows_in_no_bag():
    """As offsets [1] say on a device, where nobody looks at them: nothing is read past their end."""
    from milkernels import triton

    x, scores, offsets = torch.ones(5, 4), torch.zeros(5, 2), torch.zeros(1, dtype=torch.int64)
    with recorded_launches() as launched:
        bag, _, lse = triton.kernel("softmax_pool_fwd")(x, scores, offsets, None)
        mean = triton.kernel("mean_pool_fwd")(x, offsets, None)
        values, indices = triton.kernel("max_pool_fwd")(x, offsets, None)
    assert launched == [] and bag.shape == (0, 2, 4) and lse.shape == (0, 2)
    assert mean.shape == values.shape == indices.shape == (0, 4)


@served("dsmil_pool-linear-v", "softmax_pool", "query_pool")
def test_autocast_does_not_reach_what_is_not_a_product_with_the_instances(case):
    tensors, offsets = case.make((70, 5), torch.float32, **ODD), offsets_of((70, 5))
    with torch.autocast("cpu", torch.bfloat16):
        got = run(case, tensors, offsets)
    same_bits(got, run(case, tensors, offsets))


@embedded
@pytest.mark.slow
def test_embedding_without_a_gradient(case):
    """What an op has to learn alone: no gradient of embedded instances is made for it, and it is the same."""
    tensors, offsets = case.make((70, 5), torch.float32, **ODD), offsets_of((70, 5))
    whole = run(case, tensors, offsets)
    learned = [name for name in case.tensors if name not in ("x", "e_weight", "e_bias")]
    frozen = {name: t.detach().requires_grad_(name in learned) for name, t in tensors.items()}
    with recorded_launches() as launched:
        got = run(case, frozen, offsets)
    # Layers that rows pass behind it.
    own = ("q_weight", "q2_weight", "v_weight") if "q2_weight" in case.tensors else ()
    assert launched.count("layer_gradients") == len(own) and "layer_rows" in launched
    same_bits(got, {name: whole[name] for name in got})


@contextlib.contextmanager
def recorded_launches():
    """The names of the kernels launched within the block, in order."""
    from milkernels.triton import host

    names, launch = [], host._run

    def run(kernel, *rest):
        names.append(kernel.fn.__name__)
        launch(kernel, *rest)

    host._run = run
    try:
        yield names
    finally:
        host._run = launch


@one_of_each
def test_wrong_offsets_stay_inside(case):
    """On a device offsets are not looked at: decreasing ones, and those past the rows, give wrong numbers only. An
    access outside would be a segmentation fault here, or a change of what lies behind the rows."""
    n = 70
    tensors = {name: t.detach() for name, t in case.make((n, 0, 0), torch.float32, **ODD).items()}
    for wrong in ((5, 90, 2, 71), (-7, 30, 10**6, -3), (80, 90, 100, 110)):
        inputs = _padded_by_nan(tensors)
        offsets = torch.tensor(wrong)
        with _unchecked():
            outputs = case.ours("triton")(inputs, offsets, None)
        assert outputs[0].shape[0] in (3, n)
        for name, t in inputs.items():
            assert t._base[-1].isnan().all(), name


def _padded_by_nan(tensors):
    """Each tensor with NaN before and behind it, in one piece of memory."""
    made = {}
    for name, t in tensors.items():
        base = torch.full((t.numel() + 2 * 4096,), NAN, dtype=t.dtype)
        base[4096:-4096] = t.flatten()
        made[name] = base[4096:-4096].view(t.shape)
    return made


class _unchecked:
    """Within the block ops take offsets as they are, as they do on a device."""

    def __enter__(self):
        from milkernels import ragged

        self.module, self.check = ragged, ragged.check_offset_values
        ragged.check_offset_values = lambda *_: None

    def __exit__(self, *_):
        self.module.check_offset_values = self.check


@pytest.mark.skipif(native.load_error() is not None, reason=f"no extension: {native.load_error()}")
@served(
    *("attention_pool-gelu-dropout", "gated_attention_pool-dropout", "dsmil_pool-relu-v-dropout"),
    *("query_pool-embed-dropout", "instance_max-embed-dropout"),
)
def test_dropout_is_that_of_the_cpu_kernels(case):
    """One unit that is dropped on one side only would be far off."""
    tensors, offsets = case.make((133,), **(ODD | {"D": 70, "L": 70})), None
    close(run(case, tensors, offsets), run(case, tensors, offsets, backend="native"))


def test_rows_past_four_billion_are_counted_in_the_dropout():
    """The counter's second word; 2^32 rows do not fit anywhere, so the kernel's own function is asked."""
    import triton as compiler
    import triton.language as tl

    from milkernels.testing import philox
    from milkernels.triton import common

    @compiler.jit
    def factors(SEED, OUT, first, threshold, BRANCH: tl.constexpr, dropout: tl.constexpr):
        r = tl.cast(first, tl.int64) + tl.arange(0, 8)
        kept = dropout(SEED, r, 0, threshold, BRANCH, 16, tl.float32)
        tl.store(OUT + tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :], kept)

    first, out, key = 2**33 + 5, torch.empty(8, 16), (op_cases.SEED & 0xFFFFFFFF, op_cases.SEED >> 32)
    factors[(1,)](torch.tensor([op_cases.SEED]), out, first, 1 << 15, BRANCH=1, dropout=common.dropout_factors)
    row, unit = torch.arange(first, first + 8)[:, None], torch.arange(16)[None]
    counter = [t.expand(8, 16) for t in (row & 0xFFFFFFFF, row >> 32, unit >> 3, torch.ones_like(unit))]
    words = torch.stack(philox.philox4x32(counter, key), -1).gather(-1, (unit >> 1 & 3).expand(8, 16)[..., None])[
        ..., 0
    ]
    lanes = words >> 16 * (unit & 1) & 0xFFFF
    assert torch.equal(out, 2.0 * (lanes >= 1 << 15))


# As torch.library ops


@served(*PLAIN, "query_pool-embed-dropout", "dsmil_pool-embed")
@pytest.mark.slow
def test_opcheck(case):
    for calls in recorded(case, "triton"):
        for op, args, kwargs in calls:
            torch.library.opcheck(op, detached(args), kwargs)


@served("gated_attention_pool-dropout", "dsmil", "loss_attention_pool", "topk_instances", "attention_pool-embed-gelu")
def test_compile_fullgraph(case):
    """One graph for two sizes, forward and backward, with the numbers of eager."""
    compute = torch.compile(case.ours("triton"), fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for lengths in ((30, 0, 35), (7, 20, 3)):
        tensors, offsets = case.make(lengths, **ODD), offsets_of(lengths)
        close(step(compute, tensors, offsets, None), run(case, tensors, offsets))
