"""The numbers of the compiled kernels: every op against the oracle, at sizes where tiles, chunks, heads and vectors
are cut; what masked rows, other bags, layouts, threads and stale memory must not change; and what is chosen.

What attention alone has (activations, matrix units, precision) is in test_attention.py.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import op_cases
import pytest
import torch
from op_cases import (
    COMPILED,
    NAN,
    close,
    compiled,
    cotangents,
    every_kernel,
    needs_extension,
    of_the_cpu,
    offsets_of,
    same_bits,
    step,
    threads,
)
from oracle import INF

import milkernels
from milkernels import testing
from milkernels.ops import contract

pytestmark = needs_extension

# Empty bags first, last and in between; one instance; whole tiles of 64 rows, a row more, a row less.
RAGGED = (0, 1, 64, 0, 0, 63, 65, 5, 130, 0)
# More than 2048 rows: chunks of 256, a whole one and bags that cross them.
LONG = (0, 256, 2000, 1, 511, 0)
NARROW = {"L": 5, "D": 3, "K": 1, "C": 1, "Q2": 2, "V": 1}
ODD = {"L": 37, "D": 41, "K": 2, "C": 2, "Q2": 9, "V": 33}
FIVE = {"L": 37, "D": 18, "K": 5, "C": 5, "Q2": 17, "V": 7}

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES, torch.float64)


def run(case, tensors, offsets, mask=None, backend="native", wanted=None):
    return step(case.ours(backend), tensors, offsets, mask, wanted)


def some_mask(lengths):
    """Holes everywhere; a tile and a bag with no real row at all, and a chunk where there are chunks."""
    n = sum(lengths)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(5)) > 0.3
    for start, end in (64, 128), (256, 512) if n > 2048 else (0, 0), (2256, 2257):
        mask[start:end] = False
    return mask


# Values and gradients


@pytest.mark.parametrize(
    "lengths, index, masked, sizes",
    [
        pytest.param(RAGGED, torch.int64, False, NARROW, id="narrow"),
        pytest.param(RAGGED, torch.int32, True, ODD, id="two-heads-mask"),
        pytest.param(
            RAGGED, torch.int64, True, {"L": 70, "D": 24, "K": 3, "C": 3, "Q2": 5, "V": 70}, id="three-heads-mask"
        ),
        pytest.param(
            RAGGED, torch.int32, False, {"L": 131, "D": 64, "K": 9, "C": 9, "Q2": 33, "V": 16}, id="nine-heads"
        ),
        pytest.param((328,), None, True, FIVE, id="one-bag-mask"),
        pytest.param((2500,), None, False, NARROW | {"K": 2, "C": 2}, id="one-long-bag"),
        pytest.param(LONG, torch.int64, True, {"L": 12, "D": 7, "K": 2, "C": 2, "Q2": 3, "V": 4}, id="long-mask"),
    ],
)
@every_kernel
def test_oracle(case, lengths, index, masked, sizes):
    offsets = None if index is None else offsets_of(lengths, index)
    mask, tensors = some_mask(lengths) if masked else None, case.make(lengths, **sizes)
    close(run(case, tensors, offsets, mask), step(case.truth, tensors, offsets, mask))


@every_kernel
def test_some_gradients_only(case):
    """Of any of the outputs; and for each input alone, as where features or parameters are frozen."""
    lengths, mask = (70, 5, 30), torch.arange(105) % 4 > 0
    offsets = offsets_of(lengths)
    tensors = case.make(lengths, **ODD)
    whole = run(case, tensors, offsets, mask)
    outputs = [i for i in range(4) if f"output {i}" in whole and whole[f"output {i}"].is_floating_point()]
    for count in range(len(outputs)):
        for wanted in itertools.combinations(outputs, count):
            got = run(case, tensors, offsets, mask, wanted=wanted)
            close(got, step(case.truth, tensors, offsets, mask, wanted=wanted))
    for name in case.tensors:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        for key, value in run(case, alone, offsets, mask).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-12, atol=1e-12)


@compiled(*(name for name in COMPILED if not name.endswith("-ties")))  # where a maximum has no derivative
def test_gradcheck(case):
    lengths = (3, 0, 62, 3, 1)  # the first bag is masked, the fourth one crosses tiles
    mask = torch.arange(69) % 6 != 4
    mask[:3] = False
    with threads(1):  # thousands of tiny calls: waking threads would be most of the time
        op_cases.check_gradients(case, "native", lengths, mask, L=3, D=3, K=2, C=2, Q2=2, V=2)


@pytest.mark.parametrize(
    "dtype, parameter_dtype",
    [(torch.float32, None), *((half, None) for half in HALVES), *((half, torch.float32) for half in HALVES)],
    ids=str,
)
@every_kernel
def test_error_promise(case, dtype, parameter_dtype):
    kept = op_cases.promise(case, "native", dtype, parameter_dtype, lengths=(70, 5, 130), seeds=3, **FIVE)
    assert kept.ok, kept.broken()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@compiled(*op_cases.PLAIN)
def test_error_promise_of_many_rows(case, dtype):
    kept = op_cases.promise(case, "native", dtype, lengths=(300, 0, 2100), seeds=2, **(ODD | {"L": 24}))
    assert kept.ok, kept.broken()


@compiled("softmax_pool", "segment_softmax")
def test_error_promise_of_scores_far_from_zero(case):
    def spread(tensors):
        """Half of the weights are 0, the others lie within a few factors of e.  The exponential of any score overflows
        or is 0, and one rounding of their log-sum-exp is 3e-5, which weights taken as exp(score - lse) would show."""
        tensors["scores"] += 500
        tensors["scores"][::2] -= 1e4

    kept = op_cases.promise(
        dataclasses.replace(case, edit=spread), "native", torch.float32, lengths=(70, 5, 130), seeds=3
    )
    assert kept.ok, kept.broken()


@every_kernel
def test_autocast(case):
    """Under autocast no output and no gradient is worse than twice the reference's there."""
    lengths, runs = (70, 5, 130), []
    offsets = offsets_of(lengths)
    for seed in range(3):
        tensors = case.make(lengths, torch.float32, seed, relu=True, **FIVE)
        with torch.autocast("cpu", torch.bfloat16):
            both = [run(case, tensors, offsets, backend=backend) for backend in ("native", "reference")]
        for name, t in both[0].items():
            assert t.dtype == both[1][name].dtype
        runs.append((*both, op_cases.exactly(case, tensors, offsets)))
    ours, reference, exact = (op_cases.together(results) for results in zip(*runs, strict=True))
    promise = testing.error_promise(ours, reference, exact, torch.bfloat16)
    assert promise.ok, promise.broken()


@pytest.mark.filterwarnings("ignore:milkernels")  # of native, which leaves float64 parameters to the reference
@pytest.mark.parametrize("other", [torch.float64, *HALVES], ids=str)
@every_kernel
def test_types_are_those_of_the_reference(case, other):
    """Whichever single tensor has another type than float32."""
    lengths = (70, 5, 130)
    for name in case.tensors | case.fixed:
        tensors = case.make(lengths, torch.float32, relu=True, **ODD)
        tensors[name] = tensors[name].detach().to(other).requires_grad_(name in case.tensors)
        got, expected = (run(case, tensors, offsets_of(lengths), backend=b) for b in (None, "reference"))
        for key, value in got.items():
            assert value.dtype == expected[key].dtype, (name, key)
            a, b = (t.double().masked_fill(t.isinf(), 0) for t in (value, expected[key]))
            assert (a - b).norm() <= 4 * torch.finfo(torch.bfloat16).eps * b.norm(), (name, key)


# What must not change anything


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_kernel
def test_masked_rows_do_not_leak(case, dtype):
    """A hole in every tile, a masked tile and bag.  That they are as if absent, the oracle says above."""
    offsets, mask = offsets_of(RAGGED), some_mask(RAGGED)
    poison = torch.tensor([NAN, INF, -INF]).repeat(len(mask))[: (~mask).sum(), None].to(dtype)
    op_cases.check_masked_rows_do_not_leak(case, "native", RAGGED, offsets, mask, poison, dtype, **ODD)


@every_kernel
def test_padded_batch(case):
    """As it lies, with NaN for padding: the oracle never looks at that, so this is the ragged batch."""
    lengths, longest = (30, 1, 0, 70), 70
    padded = case.make((longest,) * len(lengths), **ODD)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    for name, t in padded.items():
        if case.has_rows(name):
            t.data[~real.flatten()] = NAN
    bags = milkernels.Bags.from_padded(next(iter(padded.values())).detach().unflatten(0, real.shape), real)
    got = run(case, padded, bags.offsets, bags.mask)
    close(got, step(case.truth, padded, bags.offsets, bags.mask))
    for name in case.tensors:
        if case.has_rows(name):
            assert not got[f"gradient of {name}"][~bags.mask].any()


@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kernel
def test_nan_stays_in_its_bag(case, dtype, poison):
    """The row lies in a tile, and in vectors of rows, that it shares with other bags."""
    for lengths, row in (((60, 6, 70, 0, 30), 65), ((70, 300, 2000, 5), 300)):
        bag = next(b for b, end in enumerate(offsets_of(lengths)[1:].tolist()) if row < end)
        op_cases.check_nan_stays_in_its_bag(case, "native", lengths, bag, row, dtype, poison, **FIVE)


@compiled("softmax_pool")
def test_nan_behind_a_score_that_one_head_does_not_count(case):
    tensors = case.make(RAGGED, **FIVE)
    with torch.no_grad():
        tensors["x"][[1, 80, 200, 210]] = NAN
        tensors["scores"][[1, 80, 200], 0] = -INF
    offsets = offsets_of(RAGGED)
    got = run(case, tensors, offsets)
    close(got, step(case.truth, tensors, offsets, None), equal_nan=True)
    assert got["output 0"][5, 0].isfinite().all() and got["output 0"][5, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (0, 1, 0), None], ids=str)
@every_kernel
def test_hardly_anything(case, lengths, dtype):
    offsets = None if lengths is None else offsets_of(lengths)
    tensors = case.make((0,) if lengths is None else lengths, dtype, relu=True)
    expected = run(case, tensors, offsets, backend="reference")
    close(run(case, tensors, offsets), expected, 1e-10 if dtype == torch.float64 else 0.02)


def other_layouts(t):
    """The same numbers: inside wider rows, every second row, transposed."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 9), NAN, dtype=t.dtype)
    wide[..., 3:-6] = t
    yield wide[..., 3:-6]
    yield t.repeat_interleave(2, 0)[::2]
    if t.ndim > 1:
        yield t.mT.contiguous().mT


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.bfloat16, 1e-2)], ids=str)
@every_kernel
def test_layouts(case, dtype, tolerance):
    lengths = (90, 0, 40)
    tensors, offsets = case.make(lengths, dtype, **ODD), offsets_of(lengths)
    expected = run(case, tensors, offsets)
    for name, t in tensors.items():
        for other in other_layouts(t.detach()):
            changed = tensors | {name: other.requires_grad_(t.requires_grad)}
            close(run(case, changed, offsets), expected, tolerance)
    rows = next(iter(case.tensors))
    same = tensors[rows].detach()[:1].expand_as(tensors[rows])
    both = [run(case, tensors | {rows: t.requires_grad_()}, offsets) for t in (same, same.clone())]
    close(*both, tolerance)


@every_kernel
def test_layouts_of_the_gradients_that_come_back(case):
    """``sum().backward()`` sends one number, expanded; what follows a transposition sends columns."""
    lengths = (90, 0, 40)
    tensors = case.make(lengths, **ODD)
    leaves = [t for t in tensors.values() if t.requires_grad]
    outputs = [o for o in case.ours("native")(tensors, offsets_of(lengths), None) if o.is_floating_point()]
    ones = [torch.ones((), dtype=o.dtype).expand_as(o) for o in outputs]
    columns = [c.mT.contiguous().mT for c in cotangents(outputs)]
    for sent in (ones, columns):
        dense = [s.contiguous() for s in sent]
        got, expected = (
            torch.autograd.grad(outputs, leaves, g, retain_graph=True, materialize_grads=True) for g in (sent, dense)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@of_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [(50,), (3000,), RAGGED, (700, 0, 3, 5000), (2,) * 1500],
    ids=["one-tile", "one-bag", "ragged", "long", "many-bags"],
)
@every_kernel
def test_same_bits_whatever_the_threads(case, lengths, dtype):
    """Of no number of threads either, where a library or an elementwise operator would cut its work by them."""
    tensors, offsets = case.make(lengths, dtype, **FIVE), offsets_of(lengths)
    runs = []
    for count in (1, 2, 3, 2):
        with threads(count):
            runs.append(run(case, tensors, offsets))
    for other in runs[1:]:
        same_bits(other, runs[0])


_POISON = """
import sys
import torch
from op_cases import COMPILED, offsets_of, step
out = {}
for name, case in COMPILED.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for lengths in ((0, 1, 64, 63, 130), (300, 0, 1900)):
            mask = torch.arange(sum(lengths)) % 5 > 0
            mask[64:128] = False
            tensors = case.make(lengths, dtype, L=37, D=41, K=5, C=3, Q2=9, V=33)
            for given in (None, mask):
                key = name, str(dtype), lengths, given is None
                out[key] = step(case.ours("native"), tensors, offsets_of(lengths), given)
torch.save(out, sys.argv[1])
"""


@of_the_cpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MALLOC_PERTURB_ is glibc's")
@pytest.mark.slow
def test_results_do_not_depend_on_what_memory_held(tmp_path):
    """Fresh memory is filled with 3.4e38 in one run and 0 or -1.7e38 in others."""
    runs = []
    for fill in ("0", "1", "128"):
        path = tmp_path / fill
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        env = os.environ | {"MALLOC_PERTURB_": fill, "OMP_NUM_THREADS": "2", "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", _POISON, str(path)], env=env, check=True)
        runs.append(torch.load(path))
    assert runs[0]
    for other in runs[1:]:
        for key, expected in runs[0].items():
            for name, value in expected.items():
                assert torch.equal(other[key][name], value), (key, name)


# Choices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@compiled("instance_max", "max_pool", "dsmil_pool", "topk_instances")
def test_the_lowest_of_equal_rows_wins_across_vectors_tiles_and_chunks(case, dtype):
    n, best = 2300, [2299, 700, 513, 512, 300, 255, 64, 63, 9, 8, 3]
    rows = torch.zeros(n, 3, dtype=dtype)
    eye = torch.eye(3, dtype=dtype)
    calls = {
        "instance_max": lambda o: milkernels.instance_max(rows, eye, o, backend="native").indices,
        "max_pool": lambda o: milkernels.max_pool(rows, o, backend="native").indices,
        "dsmil_pool": lambda o: milkernels.dsmil_pool(rows, rows, eye, o, backend="native").critical,
        "topk_instances": lambda o: milkernels.topk_instances(rows, 1, o, backend="native").indices[..., 0],
    }
    for i, row in enumerate(best):
        rows[row, 1] = 2.0
        assert calls[case.op](None).tolist() == [[0, row, 0]]
        second = [0, row, 0] if row < 100 else [100, row, 100]
        first = [0, row if row < 100 else 0, 0]
        later = [100, min(r for r in best[: i + 1] if r >= 100), 100]
        assert calls[case.op](offsets_of((100, n - 100))).tolist() == [first, later if row < 100 else second]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@compiled("instance_max", "max_pool", "dsmil_pool")
def test_padding_never_wins(case, dtype):
    """Masked rows with the largest numbers, by far, where code that multiplies by the mask lets them win."""
    lengths = (70, 5, 130, 3)
    offsets, mask = offsets_of(lengths), torch.arange(208) % 3 == 1
    mask[205:] = False
    tensors = {n: t.detach() for n, t in case.make(lengths, dtype, relu=True).items()}
    tensors["x"] = (-1 - tensors["x"]).masked_fill(~mask[:, None], 0)  # padding by 0 beats every real row
    for name in ("weight", "bias", "instance_logits"):
        if name in tensors:
            tensors[name] = tensors[name].abs()
    if "instance_logits" in tensors:
        tensors["instance_logits"] = (-tensors["instance_logits"]).masked_fill(~mask[:, None], 100)
    got, expected = (f(tensors, offsets, mask) for f in (case.ours("native"), case.truth))
    i = {"instance_max": 1, "max_pool": 1, "dsmil_pool": 3}[case.op]
    assert mask[got[i][:3]].all() and (got[i][3] == -1).all()
    if case.op != "instance_max" or dtype in (torch.float32, torch.float64):  # half logits are rounded in eager
        assert torch.equal(got[i], expected[i])
    if case.op == "instance_max":
        values, indices, logits = got
        assert torch.equal(values[:3], logits.gather(0, indices[:3])) and (values[3] == -INF).all()
        assert (values[:3] < 1).all() and (logits[~mask] == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@compiled("instance_max")
def test_the_gradient_of_a_maximum_goes_to_its_row(case, dtype):
    lengths = (70, 0, 5, 130)
    offsets, mask = offsets_of(lengths), torch.arange(205) % 5 > 0
    tensors = case.make(lengths, dtype, relu=True)
    values, indices, _ = case.ours("native")(tensors, offsets, mask)
    assert (values[1] == -INF).all() and (indices[1] == -1).all()
    sent = torch.arange(1.0, 13).reshape(4, 3).to(values.dtype)
    x, weight, bias = torch.autograd.grad(values, [tensors[n] for n in ("x", "weight", "bias")], sent)
    rows, expected = torch.zeros(205, 3).double(), torch.tensor([True, False, True, True])
    for b in (0, 2, 3):
        for c in range(3):
            rows[indices[b, c], c] += sent[b, c].double()
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 0.02
    for got, want in (
        (x, rows @ tensors["weight"].double()),
        (weight, rows.T @ tensors["x"].double()),
        (bias, sent[expected].double().sum(0)),
    ):
        torch.testing.assert_close(got.double(), want.detach(), rtol=tolerance, atol=tolerance)
    assert not x[torch.ones(205, dtype=torch.bool).index_fill(0, indices[[0, 2, 3]].unique(), False)].any()


@pytest.mark.parametrize("lengths", [(5, 0, 70, 130), (205,)], ids=str)
@compiled("instance_max", "max_pool", "dsmil_pool")
def test_nan_wins(case, lengths):
    """As in torch.max: the first of several, over larger numbers before and behind it."""
    tensors, offsets = case.make(lengths), offsets_of(lengths)
    chooser = tensors["instance_logits" if case.op == "dsmil_pool" else "x"].data
    chooser[[30, 160]] = INF if case.op == "max_pool" else 1e3
    chooser[[40, 41, 140, 170]] = NAN
    got = run(case, tensors, offsets)
    close(got, step(case.truth, tensors, offsets, None), equal_nan=True)
    indices = got["output 3" if case.op == "dsmil_pool" else "output 1"]
    assert indices[-1].unique().item() == (40 if len(lengths) == 1 else 140)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@compiled("topk_instances")
def test_topk_is_exactly_the_references(case, dtype, largest):
    """Many ties, NaN, both infinities and both zeros; more asked for than a bag, or all bags, have."""
    generator = torch.Generator().manual_seed(3)
    for lengths in (RAGGED, (600,), (0, 0), LONG):
        n = sum(lengths)
        scores = torch.randint(-4, 5, (n, 5), generator=generator).to(dtype) / 2
        scores[:, 1] = torch.randn(n, generator=generator).to(dtype)
        for column, value in ((2, NAN), (2, -INF), (3, INF), (3, -INF), (4, -0.0), (4, NAN)):
            scores[torch.rand(n, generator=generator) < 0.2, column] = value
        scores[:, 4] = scores[:, 4].masked_fill(scores[:, 4] > 0, -INF)
        for k in (1, 2, 64, 131, 700):
            for mask in (None, torch.rand(n, generator=generator) > 0.4):
                for offsets in (offsets_of(lengths), None):
                    options = {"largest": largest, "mask": mask}
                    got, expected = (
                        milkernels.topk_instances(scores, k, offsets, backend=backend, **options)
                        for backend in ("native", "reference")
                    )
                    assert torch.equal(got.indices, expected.indices), (lengths, k)
                    torch.testing.assert_close(got.values, expected.values, rtol=0, atol=0, equal_nan=True)
                    picked = got.values[got.indices >= 0]
                    assert not (picked == -INF).any()


# Logits far apart


@compiled("loss_attention_pool")
def test_loss_attention_of_logits_far_apart(case):
    """The authors' quotient of sums of exponentials, each less one maximum, loses a bag whose logits are lower."""

    def apart(tensors):
        tensors["x"] *= 100
        tensors["x"][70:75] -= 200 * torch.linalg.pinv(tensors["weight"].float()).sum(1)

    lengths = (70, 5, 130)
    case = dataclasses.replace(case, edit=apart)
    tensors, offsets = case.make(lengths, torch.float32, L=8), offsets_of(lengths)
    with torch.no_grad():
        logits = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
        assert logits.min() < -400 and logits.max() > 400 and logits[70:75].max() < logits.max() - 200
        e = (logits - logits.max()).exp().sum(1)
        theirs = torch.cat([part / part.sum() for part in e.split(lengths)])
        assert theirs[70:75].isnan().all()
    pooled = milkernels.LossAttentionPooled(*case.ours("native")(tensors, offsets, None))
    weights = (pooled.scores - pooled.lse.repeat_interleave(torch.tensor(lengths), 0)).exp()
    exact = op_cases.exactly(case, tensors, offsets)
    truth = (exact["output 1"] - exact["output 2"].repeat_interleave(torch.tensor(lengths), 0)).exp()
    torch.testing.assert_close(weights.double(), truth, rtol=1e-3, atol=1e-6)
    for part in weights.split(lengths):
        torch.testing.assert_close(part.sum(), torch.tensor(1.0), rtol=1e-3, atol=0)
    kept = op_cases.promise(case, "native", torch.float32, lengths=lengths, seeds=5, L=8)
    assert kept.ok, kept.broken()


@of_the_cpu
@compiled("gated_attention_pool", "dsmil-mlp-q-relu-v", "query_pool-embed-dropout")
def test_products_without_the_librarys_micro_kernels(case):
    """As on a processor without AVX2: what a library's gemm would take their place has other bits for other threads."""
    with torch.backends.mkldnn.flags(enabled=False):
        kept = op_cases.promise(case, "native", torch.float32, lengths=(70, 5, 130), seeds=3, **FIVE)
        assert kept.ok, kept.broken()
        tensors, offsets = case.make(RAGGED, torch.float32, **FIVE), offsets_of(RAGGED)
        with threads(1):
            alone = run(case, tensors, offsets)
        with threads(3):
            same_bits(run(case, tensors, offsets), alone)


# Nothing is left out


def test_every_op_has_a_kernel():
    """Except what is composed of others."""
    public = [name for name in milkernels.__all__ if getattr(milkernels, name).__module__.startswith("milkernels.ops.")]
    composed = {"embed_instances", "generalized_mean_pool", "isr_pool", "log_sum_exp_pool", "noisy_or_pool"}
    ops = {name.removeprefix("gated_") for name in public if name.islower()} - composed
    compiled = {op.name for op in contract.FORWARDS if op_cases.has_kernel(op.name, "native")}
    assert ops == {case.kernel for case in op_cases.CASES.values()} == compiled
