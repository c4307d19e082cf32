"""What the reference promises besides its numbers, which are in test_numbers.py: nothing leaks, nothing synchronises,
and it can be traced and differentiated again."""

import dataclasses
import itertools

import oracle
import pytest
import torch
from op_cases import CASES, LENGTHS, POOLS, SMALL, close, cotangents, offsets_of, step
from oracle import INF
from torch._subclasses import FakeTensorMode

import milkernels
from milkernels.ops import dropout, segments, trilinear

N, L, K, B = sum(LENGTHS), SMALL["L"], SMALL["K"], len(LENGTHS)
OFFSETS = offsets_of(LENGTHS)
# Holes, the second to last bag masked as a whole.
MASK = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1], dtype=torch.bool)


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def ours(case):
    return case.ours("reference")


# Ways to the same numbers


@every_case
def test_blocks_of_rows(case, monkeypatch):
    whole = step(ours(case), case.make(), OFFSETS, MASK)
    one = step(ours(case), case.make((N,)), None, MASK)
    monkeypatch.setattr(trilinear, "_BLOCK_ELEMENTS", {"cpu": 4 * L})
    close(step(ours(case), case.make(), OFFSETS, MASK), whole)
    close(step(ours(case), case.make((N,)), None, MASK), one)


@every_case
def test_the_ops_that_are_deterministic_on_a_gpu(case, monkeypatch):
    expected = step(ours(case), case.make(), OFFSETS, MASK)
    monkeypatch.setattr(segments, "_adds_by_sorting", lambda t: True)
    close(step(ours(case), case.make(), OFFSETS, MASK), expected)


# Dropout


def test_philox_vectors():
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, words in vectors:
        assert oracle.philox(counter, key) == words
        seed = torch.tensor([*key], dtype=torch.int64).to(torch.uint32).view(torch.int64)
        got = dropout._philox(seed, tuple(torch.tensor([c]) for c in counter))
        assert tuple(int(w) for w in got) == words


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -1, -(2**63)])
def test_dropout_mask_is_the_oracles(seed):
    for branch, p, units in [(0, 0.25, 11), (1, 0.5, 8), (2, 1.0, 3), (0, 1 / 65536, 70)]:
        got = dropout.philox_keep(torch.tensor([seed]), 9, units, branch, p)
        assert torch.equal(got, oracle.dropout_keep(seed, 9, units, branch, p))


def test_dropout_keeps_the_right_share():
    keep = dropout.philox_keep(torch.tensor([3]), 2000, 100, 0, 0.3)
    assert abs(keep.double().mean().item() - 0.7) < 5 * (0.21 / keep.numel()) ** 0.5
    assert dropout.dropout_scale(1.0) == 0 and dropout.dropout_scale(0.5) == 2


def test_everything_dropped():
    case = dataclasses.replace(CASES["gated_attention_pool"], options={"dropout_p": 1.0, "seed": 1})
    tensors = case.make()
    scores = ours(case)(tensors, OFFSETS, None)[1]
    torch.testing.assert_close(scores, tensors["w_bias"].expand_as(scores))


# Isolation


@pytest.mark.parametrize("offsets", [OFFSETS, None], ids=["bags", "one-bag"])
@pytest.mark.parametrize("op", ["softmax_pool", "attention_weights"])
def test_a_score_of_minus_infinity_hides_its_row_from_its_head(op, offsets):
    tensors = CASES[op].make()
    with torch.no_grad():
        tensors["scores"][[4, 7], 0] = -INF
        clean = step(ours(CASES[op]), tensors, offsets, None)
        tensors["x"][[4, 7]] = float("nan")
    x, scores = tensors["x"], tensors["scores"]
    outputs = ours(CASES[op])(tensors, offsets, None)
    got, expected = outputs[0][:, 0], clean["output 0"][:, 0]
    assert torch.equal(got.detach(), expected)
    got.square().sum().backward()
    assert x.grad is None or (x.grad.isfinite().all() and not x.grad[[4, 7]].any())
    assert scores.grad[:, 0].isfinite().all() and not scores.grad[[4, 7], 0].any()


# Choices


def test_ties_go_to_the_lowest_index():
    x = torch.zeros(9, 2)
    x[[3, 4, 7], 0] = 2.0
    offsets, weight = torch.tensor([0, 2, 6, 9]), torch.eye(2)
    expected = [[0, 0], [3, 2], [7, 6]]
    for indices in (
        milkernels.instance_max(x, weight, offsets).indices,
        milkernels.max_pool(x, offsets).indices,
        milkernels.dsmil_pool(x, x, weight, offsets).critical,
        milkernels.topk_instances(x, 1, offsets).indices[..., 0],
    ):
        assert indices.tolist() == expected
    assert milkernels.instance_max(x, weight).indices.tolist() == [[3, 0]]
    assert milkernels.max_pool(x).indices.tolist() == [[3, 0]]
    assert milkernels.topk_instances(x, 4).indices.tolist() == [[[3, 4, 7, 0], [0, 1, 2, 3]]]
    assert milkernels.topk_instances(x, 4, largest=False).indices.tolist() == [[[0, 1, 2, 5], [0, 1, 2, 3]]]


def test_the_gradient_of_a_tie_goes_to_one_instance():
    x = torch.ones(4, 1, requires_grad=True)
    for values in (milkernels.instance_max(x, torch.ones(1, 1)).values, milkernels.max_pool(x).values):
        (gradient,) = torch.autograd.grad(values.sum(), x)
        assert gradient.flatten().tolist() == [1, 0, 0, 0]


def test_nan_wins_like_in_torch_max():
    x = torch.tensor([[1.0], [float("nan")], [3.0], [float("nan")]])
    assert milkernels.instance_max(x, torch.ones(1, 1)).indices.item() == torch.max(x, 0).indices.item() == 1
    assert milkernels.max_pool(x, torch.tensor([0, 1, 3, 4])).indices.flatten().tolist() == [0, 1, 3]
    assert milkernels.topk_instances(x, 3).indices.flatten().tolist() == [1, 3, 2]


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 0, 4])], ids=["one-bag", "bags"])
def test_padding_never_wins(offsets):
    """Padding by zeros beats real scores that are all negative, where libraries multiply by the mask."""
    x, mask = torch.tensor([[-3.0], [-1.0], [0.0], [0.0]]), torch.tensor([True, True, False, False])
    weight = torch.ones(1, 1)
    best = milkernels.instance_max(x, weight, offsets, mask=mask)
    assert (best.values[-1].item(), best.indices[-1].item()) == (-1.0, 1)
    assert milkernels.dsmil_pool(x, x, weight, offsets, mask=mask).critical[-1].item() == 1
    assert milkernels.max_pool(x, offsets, mask=mask).values[-1].item() == -1.0
    assert milkernels.topk_instances(x, 3, offsets, mask=mask).indices[-1].tolist() == [[1, 0, -1]]


def test_a_class_without_a_critical_instance_pools_nothing():
    case = CASES["dsmil_pool"]
    tensors = case.make()
    tensors["instance_logits"][:, 1] = -INF
    got = step(ours(case), tensors, OFFSETS, None)
    close(got, step(case.truth, tensors, OFFSETS, None))
    assert (got["output 3"][:, 1] == -1).all() and not got["output 0"][:, 1].any()


def test_topk_fills_up():
    scores = torch.tensor([[0.5], [-INF], [2.0]])
    top = milkernels.topk_instances(scores, 4, torch.tensor([0, 3, 3]))
    assert top.values.tolist() == [[[2.0, 0.5, -INF, -INF]], [[-INF] * 4]]
    assert top.indices.tolist() == [[[2, 0, -1, -1]], [[-1] * 4]]
    least = milkernels.topk_instances(scores, 3, largest=False)
    assert least.values.tolist() == [[[0.5, 2.0, INF]]] and least.indices.tolist() == [[[0, 2, -1]]]


# Extremes


def test_logits_far_apart_neither_underflow_nor_overflow():
    """The quotient of sums of exponentials, as published, is 0 or NaN here."""
    x = torch.tensor([[-400.0], [-150.0], [900.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-0.5]])
    for offsets in (None, torch.tensor([0, 1, 2, 3])):
        pooled = milkernels.loss_attention_pool(x, weight, offsets)
        assert torch.equal(pooled.scores.flatten(), torch.tensor([200.0, 75.0, 900.0]))
        weights = milkernels.attention_weights(pooled, offsets).flatten()
        assert weights.tolist() == ([0.0, 0.0, 1.0] if offsets is None else [1.0, 1.0, 1.0])
        (gradient,) = torch.autograd.grad(pooled.bag.sum() + pooled.lse.sum(), x)
        assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_a_shift_of_the_scores_cancels(shift):
    x, scores = torch.randn(N, L).double(), torch.randn(N, K).double()
    plain = milkernels.softmax_pool(x, scores, OFFSETS)
    shifted = milkernels.softmax_pool(x, scores + shift, OFFSETS)
    torch.testing.assert_close(shifted.bag, plain.bag)
    torch.testing.assert_close(shifted.lse, plain.lse + shift)


def test_a_score_of_infinity():
    """As logsumexp and softmax of PyTorch have it, in its own bag and head."""
    x, scores = torch.randn(N, L).double(), torch.randn(N, K).double()
    plain = milkernels.softmax_pool(x, scores, OFFSETS, backend="reference")
    at = int(OFFSETS[-2])  # in the last bag
    scores[at, 0] = torch.inf
    pooled = milkernels.softmax_pool(x, scores, OFFSETS, backend="reference")
    assert pooled.lse[-1, 0] == scores[at:, 0].logsumexp(0) == torch.inf
    assert pooled.bag[-1, 0].isnan().all()
    weights = milkernels.segment_softmax(scores, OFFSETS, backend="reference")
    assert weights[at:, 0].isnan().all() and scores[at:, 0].softmax(0).isnan().all()
    weights = milkernels.attention_weights(pooled, OFFSETS, backend="reference")  # exp(scores - lse)
    assert weights[at, 0].isnan() and not weights[at + 1 :, 0].any()
    for ours, theirs in zip(pooled, plain, strict=True):
        if len(ours) == len(OFFSETS) - 1:
            torch.testing.assert_close(ours[:-1], theirs[:-1])
            torch.testing.assert_close(ours[-1, 1:], theirs[-1, 1:])


def test_no_bags_at_all():
    for case in CASES.values():
        if case.op != "attention_scores":
            for t in ours(case)(case.make(()), torch.zeros(1, dtype=torch.int32), None):
                assert 0 in t.shape


# Weights


def test_weights_sum_to_one():
    case = CASES["gated_attention_pool"]
    pooled = milkernels.Pooled(*ours(case)(case.make(), OFFSETS, MASK))
    weights = milkernels.attention_weights(pooled, OFFSETS)
    assert not weights[~MASK].any()
    for start, end in itertools.pairwise(OFFSETS.tolist()):
        total = weights[start:end].sum(0)
        expected = torch.full_like(total, float(MASK[start:end].any()))
        torch.testing.assert_close(total, expected)


# Tracing, synchronisation, memory


def two_streams(x, w, v, offsets, mask):
    scored = milkernels.instance_max(x, w, offsets, mask=mask, backend="reference")
    pooled = milkernels.dsmil_pool(
        x,
        scored.logits,
        w,
        offsets,
        value=v,
        value_dropout_p=0.3,
        seed=1,
        mask=mask,
        backend="reference",
    )
    top = milkernels.topk_instances(pooled.scores, 2, offsets, backend="reference")
    return pooled.bag, pooled.lse, scored.values, top.values


def gated(x, w, v, offsets, mask):
    heads = w.mT[:2, :3].contiguous()
    pooled = milkernels.gated_attention_pool(x, w, v, heads, offsets, mask=mask, dropout_p=0.3, backend="reference")
    return pooled.bag, pooled.lse


def traced_inputs(n):
    torch.manual_seed(0)
    x, w, v = (torch.randn(*size, requires_grad=True) for size in ((n, L), (3, L), (3, L)))
    return x, w, v, torch.tensor([0, n // 2, n // 2, n]), torch.rand(n) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("fn", [two_streams, gated])
def test_compile_with_dynamic_sizes(fn):
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 14):
        inputs = traced_inputs(n)
        with torch.random.fork_rng():
            expected = step_of(fn, inputs)
        with torch.compiler.set_stance("default" if n == 9 else "fail_on_recompile"):
            got = step_of(compiled, inputs)
        if fn is two_streams:  # the other one draws its seed, which compiled code may do differently
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)


def step_of(fn, inputs):
    outputs = fn(*inputs)
    return *outputs, *oracle.gradients(outputs, inputs[:3], cotangents(outputs))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    inputs = traced_inputs(40)
    got = step_of(torch.compile(two_streams, fullgraph=True), inputs)
    for a, b in zip(got, step_of(two_streams, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one_bag", [True, False])
def test_export_with_any_number_of_instances(one_bag):
    class Model(torch.nn.Module):
        def forward(self, x, w, v, offsets, mask):
            return two_streams(x, w, v, offsets, mask)

    def inputs(n):
        x, w, v, offsets, mask = (t.detach() for t in traced_inputs(n))
        return x, w, v, None if one_bag else offsets, mask

    rows = {0: torch.export.Dim("N")}
    exported = torch.export.export(Model(), inputs(9), dynamic_shapes=(rows, None, None, None, rows))
    for got, expected in zip(exported.module()(*inputs(30)), two_streams(*inputs(30)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lengths", [LENGTHS, (N,)], ids=str)
@every_case
def test_no_synchronisation(case, lengths):
    """A fake tensor has no value: whatever reads one on the host raises."""
    with FakeTensorMode() as mode:
        tensors = {n: mode.from_tensor(t) for n, t in case.make(lengths).items()}
        offsets = None if len(lengths) == 1 else mode.from_tensor(OFFSETS)
        results = step(ours(case), tensors, offsets, mode.from_tensor(MASK))
    for name, t in step(ours(case), case.make(lengths), None if offsets is None else OFFSETS, MASK).items():
        assert results[name].shape == t.shape and results[name].dtype == t.dtype


@pytest.mark.parametrize("name", ["softmax_pool", "query_pool", "dsmil_pool", "dsmil_pool-linear-v", "mean_pool"])
@pytest.mark.parametrize("bags", [True, False], ids=["bags", "one-bag"])
def test_only_x_is_kept_for_the_backward(name, bags):
    offsets, kept = torch.tensor([0, 90, 100])[:: 1 if bags else 2], []
    tensors = CASES[name].make((90, 10) if bags else (100,), torch.bfloat16, parameter_dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(CASES[name])(tensors, offsets, None)
    x = tensors["x"]
    assert all(t.numel() < x.numel() or t.data_ptr() == x.data_ptr() for t in kept)


@pytest.mark.parametrize("case", POOLS.values(), ids=POOLS)
def test_autocast(case):
    tensors = case.make(dtype=torch.float32)
    plain = ours(case)(tensors, OFFSETS, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ours(case)(tensors, OFFSETS, MASK)
        exact = ours(case)(case.make(), OFFSETS, MASK)
    for a, b, c, d in zip(plain, cast, exact, ours(case)(case.make(), OFFSETS, MASK), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=0.1, atol=0.1)
        torch.testing.assert_close(c, d, rtol=0, atol=0)
