"""The registry that tests and benchmarks share: inputs, the formulas that the ops replace, and the error promise."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import milkernels
from milkernels.testing import (
    CASES,
    PHILOX_VECTORS,
    Reference,
    Shape,
    dropout_keep,
    eager_errors,
    error_promise,
    errors_of,
    evaluate,
    even_lengths,
    float64_reference,
    philox4x32,
    promise_from_errors,
    skewed_lengths,
    small_lengths,
)
from milkernels.testing.cases import arguments_of

SHAPE = Shape((9, 1, 40), dim=12, hidden=8, heads=2)


def test_skewed_lengths_are_the_documented_ones():
    numpy = pytest.importorskip("numpy")
    lengths = skewed_lengths()
    raw = numpy.exp(numpy.random.default_rng(0).uniform(math.log(200), math.log(20000), 32))
    assert len(lengths) == 32 and sum(lengths) == 100_000
    assert numpy.abs(numpy.array(lengths) - raw * 100_000 / raw.sum()).max() < 1
    assert lengths[:4] == (2347, 433, 151, 135)


def test_small_and_even_lengths():
    lengths = small_lengths()
    assert len(lengths) == 512 and min(lengths) == 5 and max(lengths) == 50
    assert even_lengths(3, 100) == (34, 33, 33)


def test_philox_known_answers():
    for counter, key, expected in PHILOX_VECTORS:
        words = philox4x32([torch.tensor(word) for word in counter], key)
        assert tuple(int(word) for word in words) == expected


def test_dropout_keeps_the_share_it_says():
    keep = dropout_keep(seed=2**40 + 7, rows=500, units=37, branch=1, p=0.25)
    assert keep.shape == (500, 37) and abs(keep.double().mean() - 0.75) < 0.02
    assert not torch.equal(keep, dropout_keep(2**40 + 7, 500, 37, branch=0, p=0.25))
    assert dropout_keep(7, 3, 8, 0, p=0.0).all()


def promise_of_seeds(case, shape, dtype, mode, seeds=8):
    """The promise over several seeds together: few numbers are too few to compare two errors."""
    ours, exact, eager = [], [], []
    for seed in range(seeds):
        inputs = case.inputs(shape, dtype, seed=seed)
        exact.append(float64_reference(case, inputs, mode))
        results = evaluate(lambda i: case.call(i, "reference"), inputs, mode, case.primary)
        ours.append(case.complete(results, inputs))
        eager.append(eager_errors(case, inputs, exact[-1], mode))

    def together(runs):
        return {name: torch.cat([run[name].flatten() for run in runs]) for name in runs[0]}

    def norms(runs):
        return {name: math.hypot(*(run[name] for run in runs)) for name in runs[0]}

    reference = Reference(together([e.results for e in exact]), norms([e.summands for e in exact]))
    return promise_from_errors(together(ours), norms(eager), reference, dtype)


@pytest.mark.parametrize("lengths", [(40, 7, 83), (130,)], ids=["ragged", "one-bag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", CASES)
def test_reference_keeps_the_promise_on_registry_inputs(op, dtype, lengths):
    case = CASES[op]
    shape = Shape(lengths, dim=24, hidden=16, heads=4)
    for mode in case.modes():
        promise = promise_of_seeds(case, shape, dtype, mode)
        assert promise.ok, f"{mode}: {promise.broken()}"


def test_inputs_are_seeded_and_cut():
    case = CASES["softmax_pool"]
    first, second = case.inputs(SHAPE, seed=5), case.inputs(SHAPE, seed=5)
    assert torch.equal(first.x, second.x) and torch.equal(first.parameters["scores"], second.parameters["scores"])
    assert not torch.equal(first.x, case.inputs(SHAPE, seed=6).x)
    assert first.x.mean() > 0.3 and abs(case.inputs(SHAPE, features="noise").x.mean()) < 0.2
    part = case.prefix(first, 12)
    assert part.lengths == (9, 1, 2) and part.offsets.tolist() == [0, 9, 10, 12]
    assert len(part.parameters["scores"]) == 12
    whole = case.eager(first)["bag"]
    assert torch.allclose(case.eager(part)["bag"][:2], whole[:2])


def test_promise_bounds_ours_by_eager():
    r = torch.tensor([3.0, 4.0], dtype=torch.float64)
    eager = {"bag": r + 0.1}
    eps = torch.finfo(torch.float32).eps

    def verdict(difference, dtype=torch.float64):
        promise = error_promise({"bag": (r + difference).to(dtype)}, eager, {"bag": r}, torch.float32)
        return promise.verdicts[0]

    assert verdict(0.199).ok and not verdict(0.201).ok
    assert verdict(0.05).ratio == pytest.approx(0.5)
    assert verdict(0.0, torch.float32).bound == pytest.approx(2 * 0.1 * math.sqrt(2) + 4 * eps * 5)
    assert not verdict(math.nan).ok


def test_promise_compares_infinities_by_position():
    r = torch.tensor([1.0, -math.inf, 2.0], dtype=torch.float64)
    same, moved = r.clone(), torch.tensor([-math.inf, 1.0, 2.0], dtype=torch.float64)
    assert error_promise({"scores": same}, {"scores": same}, {"scores": r}, torch.float64).ok
    promise = error_promise({"scores": moved}, {"scores": same}, {"scores": r}, torch.float64)
    assert not promise.ok and "infinities" in promise.broken()


def test_promise_refuses_what_is_missing_or_misshapen():
    r = {"bag": torch.ones(2, dtype=torch.float64)}
    assert "missing" in error_promise({}, r, r, torch.float32).broken()
    assert "shape" in error_promise({"bag": torch.ones(3)}, r, r, torch.float32).broken()
    assert not error_promise({"other": torch.ones(2)}, r, r, torch.float32).ok


def test_promise_bounds_gradients_that_cancel_by_their_summands():
    exact = Reference({"grad_w_bias": torch.zeros(1, dtype=torch.float64)}, {"grad_w_bias": 1000.0})
    limit = 1000 * torch.finfo(torch.float32).eps
    for size, ok in ((0.9 * limit, True), (1.1 * limit, False)):
        ours = {"grad_w_bias": torch.full((1,), size)}
        eager = {"grad_w_bias": torch.zeros(1)}
        assert error_promise(ours, eager, exact, torch.float32).ok is ok


def variants(case):
    """Options that change the formula."""
    yield {}
    if "activation" in case.options:
        yield from ({"activation": a} for a in ("relu", "gelu", "identity"))
    if case.dropout:
        yield {case.dropout: 0.4, "seed": 7}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("lengths", [SHAPE.lengths, (50,)], ids=["ragged", "one-bag"])
@pytest.mark.parametrize("op", CASES)
def test_eager_is_what_the_op_computes(op, lengths, masked):
    """Formulas and ops agree in float64, gradients included."""
    # Eager has no lse where a bag lost all of its rows; these lengths and this mask leave none so.
    case, mask = CASES[op], torch.arange(50) % 3 != 1 if masked else None
    for options in variants(case):
        inputs = case.inputs(replace(SHAPE, lengths=lengths), torch.float64, mask=mask, **options).with_keep()
        for mode in case.modes():
            ours = evaluate(lambda i: case.call(i, "reference"), inputs, mode, case.primary)
            ours = case.complete(ours, inputs)
            for one_bag in (case.one_bag, *case.alternatives.values()):
                theirs = evaluate(lambda i, f=one_bag: case.eager(i, f), inputs, mode, case.primary)
                theirs = case.complete(theirs, inputs)
                assert ours.keys() == theirs.keys()
                errors = errors_of(ours, Reference(theirs))
                assert max(errors.values()) < 1e-10, (options, mode, errors)


@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("op", [op for op, case in CASES.items() if case.winners])
def test_rounding_does_not_change_what_is_chosen(op, dropped):
    case, shape = CASES[op], Shape((9, 1, 2, 400), dim=12, hidden=8, heads=2)
    options = {case.dropout: 0.4} if dropped and case.dropout else {}
    mask = torch.arange(412) % 3 != 1
    exact = case.call(case.inputs(shape, torch.float64, mask=mask, **options), "reference")
    names = {"indices", "critical"} & set(exact)
    assert names
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = case.call(case.inputs(shape, dtype, mask=mask, **options), "reference")
        for name in names:
            assert torch.equal(rounded[name], exact[name]), (dtype, name)
            assert mask[exact[name].clamp(min=0)].all()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("op", ["instance_max_embed", "dsmil_mlp_embed"])
def test_winners_behind_an_embedding_are_clear(op, p):
    """By 1, but for what float32 rounded when they were planted, in some products of numbers below 100."""
    case, shape, eps = CASES[op], Shape((60, 1, 340), dim=12, hidden=8, heads=3), torch.finfo(torch.float32).eps
    inputs = case.inputs(shape, torch.float64, **{case.dropout: p})
    logits = case.call(inputs, "reference")["logits"]
    for start, end in inputs.bounds():
        if end - start > 1:
            first, second = logits[start:end].topk(2, dim=0).values
            torch.testing.assert_close(first - second, torch.ones_like(first), rtol=0, atol=1e3 * eps)


@pytest.mark.parametrize("op", [op for op, case in CASES.items() if case.embeds])
def test_an_embedded_case_is_the_plain_one_behind_a_layer(op):
    case, plain = CASES[op], CASES[op.removesuffix("_embed")]
    inputs = case.inputs(SHAPE, torch.float64, **{case.dropout: 0.3})
    assert inputs.x.shape == (50, 12) and inputs.parameters["e_weight"].shape == (6, 12)
    embed, seed = arguments_of(case.op, inputs)["embed"], inputs.options["seed"]
    h = milkernels.embed_instances(inputs.x, embed, torch.arange(50), seed=seed)
    assert (h == 0).double().mean() > 0.3 and set(inputs.with_keep().keep) >= {"keep_embedding"}
    parameters = {name: t for name, t in inputs.parameters.items() if not name.startswith("e_")}
    options = {name: value for name, value in inputs.options.items() if name in plain.options}
    expected = plain.call(replace(inputs, x=h, parameters=parameters, options=options), "reference")
    for name, t in case.call(inputs, "reference").items():
        torch.testing.assert_close(t, expected[name])


def test_each_dropout_has_a_mask_of_its_own():
    case = CASES["gated_attention_pool_embed"]
    keep = case.inputs(Shape((300,), dim=32, hidden=16), dropout_p=0.25).with_keep().keep
    assert set(keep) == {"keep_activation", "keep_sigmoid", "keep_embedding"}
    assert {mask.shape for mask in keep.values()} == {(300, 16)}
    masks = torch.stack([mask.flatten() for mask in keep.values()]).double()
    assert (torch.corrcoef(masks) - torch.eye(3)).abs().max() < 0.06  # 4 deviations of independent ones


def test_a_bag_with_a_query_of_its_own_can_be_cut():
    case = CASES["query_pool_per_bag"]
    inputs = case.inputs(SHAPE)
    part = case.prefix(inputs, 9)
    assert part.parameters["query"].shape == (1, 2, 12) and part.lengths == (9,)
    assert torch.allclose(case.call(part, "reference")["bag"][0], case.call(inputs, "reference")["bag"][0])


def test_lse_of_the_registry_is_that_of_the_scores():
    mask = torch.arange(50) % 3 != 1
    case = CASES["attention_weights"]
    for m in (None, mask):
        inputs = case.inputs(SHAPE, torch.float64, mask=m)
        weights = case.call(inputs, "reference")["weights"]
        assert all(torch.allclose(weights[s:e].sum(0), torch.ones(2).double()) for s, e in inputs.bounds())


def test_fewer_instances_than_asked_for():
    case = CASES["topk_instances"]
    inputs = case.inputs(SHAPE, k=5)
    for results in (case.call(inputs, "reference"), case.eager(inputs)):
        assert results["indices"].shape == (3, 2, 5)
        assert results["indices"][1].tolist() == [[9, -1, -1, -1, -1]] * 2
        assert results["values"][1, :, 1:].isneginf().all()


def test_both_streams_of_dsmil_are_trained():
    inputs = CASES["dsmil"].inputs(SHAPE, torch.float64)
    results = evaluate(lambda i: CASES["dsmil"].call(i, "reference"), inputs, "step", "streams")
    assert results["streams"].shape == (3, 2 * 12 + 2)
    assert torch.equal(results["streams"][:, -2:], results["values"])
    gradients = {name: t for name, t in results.items() if name.startswith("grad_")}
    assert set(gradients) == {f"grad_{n}" for n in ("x", *inputs.parameters)} and all(
        g.any() for g in gradients.values()
    )


def test_the_largest_error_of_the_formulas_counts():
    case = CASES["loss_attention_pool"]
    inputs = case.inputs(SHAPE, torch.bfloat16)
    exact = float64_reference(case, inputs, "fwd")
    each = [
        errors_of(case.complete(evaluate(lambda i, f=f: case.eager(i, f), inputs, "fwd", "bag"), inputs), exact)
        for f in (case.one_bag, case.alternatives["logsumexp"])
    ]
    assert each[0] != each[1]
    assert eager_errors(case, inputs, exact, "fwd") == {name: max(e[name] for e in each) for name in each[0]}


def test_bounds_of_bags():
    inputs = CASES["mean_pool"].inputs(SHAPE)
    assert inputs.bounds() == list(itertools.pairwise([0, 9, 10, 50]))
