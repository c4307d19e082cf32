"""The fused level of attention through Triton's interpreter. That its tiles compile as they should is test_aot.py's to
say; on a GPU, test_gpu.py says which numbers."""

import types

import op_cases
import pytest
import torch
from legs import LEGS
from op_cases import CASES, NAN, close, offsets_of, same_bits, step
from test_numbers import some_mask

import milkernels

pytestmark = LEGS["interpreted"].needed

# Empty bags first, last and in between; tiles of 64 and 128 rows end inside bags, and the last one is not full.
RAGGED = (0, 1, 64, 0, 63, 72, 0)
PADDED = {
    "L": 72,
    "D": 41,
    "K": 2,
}  # a last tile of columns that is not full; one chunk of units, not full either
POINTERS = {"L": 37, "D": 70, "K": 1}  # rows that no descriptor takes; two small chunks
CHUNKS = {"L": 64, "D": 130, "K": 4}  # a second chunk of which two units are real
ATTENTION = {name: case for name, case in CASES.items() if case.kernel in ("attention_pool", "attention_scores")}
every_case = pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
GATED, PLAIN = CASES["gated_attention_pool"], CASES["attention_pool"]
both = pytest.mark.parametrize("case", [GATED, PLAIN], ids=["gated", "plain"])


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Calls take this level, for all of their rows, and its launches are noted: ``(kernel, options)``."""
    from milkernels.triton import fused, tuning

    noted, launch = [], fused.launch

    def note(kernel, grid, *args, **options):
        noted.append(types.SimpleNamespace(name=kernel.fn.__name__, grid=grid, **options))
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(fused, "launch", note)
    with tuning.use(scores="fused"), milkernels.saved_bytes(0):
        yield noted


def run(case, tensors, offsets, mask=None):
    return step(case.ours("triton"), tensors, offsets, mask)


def chunked(case, tensors, offsets, mask=None):
    from milkernels.triton import tuning

    with tuning.use(scores="chunked"):
        return run(case, tensors, offsets, mask)


def close_to_the_oracle(case, tensors, offsets, mask) -> None:
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    if mask is not None:
        exact["x"].data[~mask] = 0
    got = {n: t.double() for n, t in run(case, tensors, offsets, mask).items()}
    close(got, step(case.truth, exact, offsets, mask), 3e-5)


@pytest.mark.parametrize(
    "sizes, masked, tma",
    [
        pytest.param(PADDED, True, True, id="descriptors-mask"),
        pytest.param(POINTERS, False, False, id="pointers"),
        pytest.param(CHUNKS, False, True, id="chunks"),
    ],
)
@every_case
def test_oracle(case, sizes, masked, tma, launched):
    """In float32, whose products the interpreter does not round."""
    tma = tma and case.embed is None  # of embedded instances the width is odd in these cases
    tensors = case.make(RAGGED, torch.float32, **sizes)
    for name, t in tensors.items():
        if name.endswith("weight"):
            t.data /= t.shape[1] ** 0.5  # scores of a size that float32 can bear in an exponent
    mask = some_mask(sum(RAGGED)) if masked else None
    if masked:
        tensors["x"].data[~mask] = NAN
    close_to_the_oracle(case, tensors, offsets_of(RAGGED), mask)
    assert [kernel.name for kernel in launched] == ["score_tiles", "gate_gradients"]
    assert all(kernel.TMA is tma for kernel in launched)


@pytest.mark.parametrize(
    "dtype, parameter_dtype",
    [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
@both
def test_error_promise(case, dtype, parameter_dtype, launched):
    sizes = {"L": 40, "D": 33, "K": 2}
    kept = op_cases.promise(case, "triton", dtype, parameter_dtype, lengths=(70, 5, 60), seeds=2, **sizes)
    assert kept.ok, kept.broken()
    assert len(launched) == 4


def test_float16_gradients_do_not_underflow(launched):
    offsets = offsets_of((150,))
    tensors = GATED.make((150,), torch.float16, parameter_dtype=torch.float32, relu=True, L=40, D=20, K=1)
    parameters = {n: t for n, t in tensors.items() if t.requires_grad and n not in ("x", "w_bias")}
    bag = GATED.ours("triton")(tensors, offsets, None)[0]
    usual, small = (
        torch.autograd.grad(bag, parameters.values(), torch.full_like(bag, size), retain_graph=True)
        for size in (1.0, 2.0**-40)
    )
    for name, a, b in zip(parameters, usual, small, strict=True):
        assert a.norm() > 0
        assert (b * 2.0**40 - a).norm() <= 1e-3 * a.norm(), name
    assert len(launched) == 3


@both
@pytest.mark.slow
def test_masked_rows_do_not_leak(case):
    offsets, mask = offsets_of(RAGGED), some_mask(sum(RAGGED))
    poison = torch.tensor([NAN, torch.inf, -torch.inf]).repeat(len(mask))[: (~mask).sum(), None].bfloat16()
    op_cases.check_masked_rows_do_not_leak(case, "triton", RAGGED, offsets, mask, poison, torch.bfloat16, **PADDED)


@pytest.mark.parametrize("sizes", [PADDED, POINTERS], ids=["descriptors", "pointers"])
@both
def test_gradients_of_masked_rows_are_selected_away(case, sizes):
    """By the kernel, whatever the op does before: it is given NaN where the mask is False, and 0."""
    from milkernels.triton import attention, fused

    made = {name: t.detach() for name, t in case.make((150,), torch.float32, **sizes).items()}
    x, mask = made.pop("x"), some_mask(150)
    parameters = [made.get(n) for n in ("v_weight", "v_bias", "u_weight", "u_bias", "w_weight", "w_bias")]
    ds, found = torch.ones(150, sizes["K"]), []
    for value in (0.0, NAN):
        x[~mask] = value
        call = attention._Attention(x, parameters, None, mask, None, "tanh", 0.0, None)
        sums = call.sums((call.heads + 2) * call.hidden + call.heads)
        found.append((fused.gradients_of_products(call, x, x, slice(0, 150), ds, None, sums), sums))
    (z, sums), (of_nan, sums_of_nan) = found
    assert not z[~mask].any() and z[mask].any(1).all()
    assert torch.equal(of_nan, z) and torch.equal(sums_of_nan, sums)


@pytest.mark.parametrize("poison", [NAN, torch.inf], ids=str)
@both
def test_nan_stays_in_its_bag(case, poison):
    op_cases.check_nan_stays_in_its_bag(case, "triton", (60, 6, 70), 1, 62, torch.float32, poison, **PADDED)


@pytest.mark.parametrize("size", [20.0, 200.0, 1e30])
@both
def test_saturated_gates(case, size):
    """Where exponentials overflow in float32 and products of them do."""
    tensors = case.make((70,), torch.float32, L=16, D=8, K=1)
    with torch.no_grad():
        tensors["x"] *= size
    got, expected = run(case, tensors, None), op_cases.exactly(case, tensors, None)
    for name in ("output 1", "gradient of w_weight"):
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [PADDED, POINTERS], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("name", ["attention_scores", "gated_attention_scores"])
def test_infinite_features(name, sizes):
    """They saturate gates; units and columns that only fill a tile do not make NaN of them."""
    case = op_cases.Case(CASES[name].op, CASES[name].tensors, bags=False)
    tensors = {n: t.detach() for n, t in case.make((70,), torch.float32, **sizes).items()}
    tensors["x"][3, 5], tensors["x"][65, 36] = torch.inf, -torch.inf
    (got,), (expected,) = case.ours("triton")(tensors, None, None), case.truth(tensors, None, None)
    assert expected.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    tensors["x"][3] = NAN
    (got,) = case.ours("triton")(tensors, None, None)
    assert torch.equal(got.isnan().all(1), torch.arange(70) == 3) and not got[4:].isnan().any()


@pytest.mark.parametrize("gated", [True, False])
def test_dropout_is_that_of_the_chunked_level(gated, launched):
    """Heads that pick one unit each: its gate, or exactly 0 where it is dropped. In the units of two chunks."""
    picked = [0, 7, 8, 63, 64, 101, 127, 129]
    case = CASES["gated_attention_scores"] if gated else CASES["attention_scores"]
    tensors = {n: t.detach() for n, t in case.make((130,), torch.float32, L=20, D=130, K=8).items()}
    tensors["w_weight"] = torch.zeros(8, 130).index_put_((torch.arange(8), torch.tensor(picked)), torch.tensor(1.0))
    tensors["w_bias"] = None
    case = op_cases.Case(case.op, case.tensors, op_cases.DROPPED, bags=False)
    (got,), before = case.ours("triton")(tensors, None, None), len(launched)
    from milkernels.triton import tuning

    with tuning.use(scores="chunked"):
        (expected,) = case.ours("triton")(tensors, None, None)
    assert before == len(launched) == 1
    assert torch.equal(got == 0, expected == 0)
    assert 0.3 < (got == 0).float().mean() < 0.75
    torch.testing.assert_close(got, expected)


def test_few_programs_go_through_all_tiles(monkeypatch, launched):
    tensors, offsets = GATED.make((300, 100), torch.float32, L=16, D=130, K=1), offsets_of((300, 100))
    whole = run(GATED, tensors, offsets)
    from milkernels.triton import tuning

    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 3)
    same_bits(run(GATED, tensors, offsets), whole)
    assert [kernel.grid for kernel in launched if kernel.name == "score_tiles"] == [(8,), (3,)]


@both
@pytest.mark.slow
def test_rows_in_several_slices(case, monkeypatch, launched):
    """A workspace of one segment, for the backward and, where x comes in another type, for the forward."""
    lengths, mask = (70, 0, 5, 130), some_mask(205)
    tensors, offsets = case.make(lengths, torch.float32, L=24, D=130, K=2), offsets_of(lengths)

    def cast(tensors, offsets, mask):
        with torch.autocast("cpu", torch.bfloat16):
            return case.ours("triton")(tensors, offsets, mask)

    whole = step(cast, tensors, offsets, mask)
    del launched[:]
    from milkernels.triton import call

    monkeypatch.setattr(call, "WORKSPACE", 1)
    close(step(cast, tensors, offsets, mask), whole, 1e-4)
    assert [kernel.name for kernel in launched] == ["score_tiles"] * 4 + ["gate_gradients"] * 4


@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.slow
def test_embedded_slices(tma, monkeypatch, launched):
    """Embedded slice by slice, scored and pooled while they are there."""
    case = CASES["gated_attention_pool-embed-dropout"]
    tensors, offsets = case.make((70, 0, 5, 130), torch.float32, L=9, D=130, K=2), offsets_of((70, 0, 5, 130))
    width = 16 if tma else 15
    for name, t in tensors.items():
        if name in ("e_weight", "e_bias"):
            tensors[name] = torch.cat([t.detach(), t.detach()])[:width].requires_grad_()
        elif name in ("v_weight", "u_weight"):
            tensors[name] = torch.cat([t.detach(), t.detach()], 1)[:, :width].div(4).requires_grad_()
    from milkernels.triton import call

    monkeypatch.setattr(call, "WORKSPACE", 1)
    mask = some_mask(205)
    close_to_the_oracle(case, tensors, offsets, mask)
    assert [kernel.name for kernel in launched] == ["score_tiles"] * 4 + ["gate_gradients"] * 4
    assert all(kernel.TMA is tma for kernel in launched)


def test_layouts(launched):
    """Rows inside wider ones: with descriptors where their beginnings are aligned, else without."""
    tensors, offsets = GATED.make((40, 0, 30), torch.float32, L=16, D=5, K=2), offsets_of((40, 0, 30))
    expected = run(GATED, tensors, offsets)
    for left, width in ((4, 24), (3, 24), (4, 23)):
        wide = torch.full((70, width), NAN)
        wide[:, left : left + 16] = tensors["x"].detach()
        changed = tensors | {"x": wide[:, left : left + 16].requires_grad_()}
        close(run(GATED, changed, offsets), expected, 1e-5)
    assert [kernel.TMA for kernel in launched] == [True] * 4 + [False] * 4


def test_layout_of_weights(launched):
    """Part of a longer tensor, at an address that no descriptor takes."""
    tensors = PLAIN.make((70,), torch.float32, L=16, D=5, K=2)
    expected, weight = run(PLAIN, tensors, None), tensors["v_weight"].detach()
    del launched[:]
    long = torch.cat([torch.zeros(1), weight.flatten()])
    close(run(PLAIN, tensors | {"v_weight": long[1:].view_as(weight).requires_grad_()}, None), expected, 1e-5)
    assert [kernel.TMA for kernel in launched] == [False, False]


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)], ids=str)
@both
def test_hardly_anything(case, lengths):
    tensors, offsets = case.make(lengths, torch.float32, relu=True), offsets_of(lengths)
    expected = step(case.ours("reference"), tensors, offsets, None)
    close(run(case, tensors, offsets), expected, 1e-5)


def test_what_is_served(launched):
    """Double precision and many heads go on chunks, as float32 does where its products are not to be rounded."""
    offsets = offsets_of((20, 5))
    for dtype, heads in ((torch.float64, 1), (torch.float32, 9)):
        tensors = GATED.make((20, 5), dtype, L=8, D=4, K=heads)
        same_bits(run(GATED, tensors, offsets), chunked(GATED, tensors, offsets))
    assert not launched


def test_float32_follows_pytorchs_switch():
    from milkernels.triton import fused

    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert fused.tf32_allowed() is allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_weights_are_rounded_to_tf32():
    from milkernels.triton import fused

    t = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    rounded = fused.as_tf32(t)
    assert not (rounded.view(torch.int32) & 0x1FFF).any()
    assert ((rounded - t).abs() <= 2.0**-11 * 2.0 ** t.abs().log2().floor()).all()


def test_the_default_is_the_chunked_level(launched):
    from milkernels.triton import tuning

    assert tuning.Plan() == tuning.Plan(scores="chunked", products="library")
    milkernels.attention_scores(torch.randn(5, 8), torch.randn(4, 8), torch.randn(1, 4), backend="triton")
    assert len(launched) == 1
