"""Heads and classes share rows, tiles and launches, and nothing else: what one of them looks at, or cannot look at,
changes neither the numbers nor the digits of another."""

import dataclasses

import op_cases
import pytest
import torch
from legs import every_backend, every_kernels_backend
from op_cases import CASES, NAN, close, offsets_of, step
from oracle import INF

from milkernels import saved_bytes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what Triton's interpreter selects away

# Bags that are a block of threads each, and one of several segments.
every_length = pytest.mark.parametrize("lengths", [(40, 0, 90), (150,)], ids=["ragged", "lone"])
SIZES = {"L": 24, "D": 18, "K": 3, "C": 3, "Q2": 9, "V": 13}
ROW = 7  # of the first bag


def cases(*names: str):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


class OtherHeads(op_cases.Case):
    """The heads but the first: their outputs, and what comes back from these but the scores, which see all rows."""

    def ours(self, backend):
        compute = super().ours(backend)
        return lambda *arguments: _others(compute(*arguments))

    def truth(self, *arguments):
        return _others(super().truth(*arguments))


def _others(outputs):
    return tuple(o[:, 1:].detach() if i == 1 else o[:, 1:] for i, o in enumerate(outputs))


def other_heads_of(case, edit):
    return OtherHeads(**vars(case) | {"edit": edit})


# Digits


def _seen_by_the_first_head_alone(t) -> None:
    """A row a thousand times as long as the others, which the first head looks at, and hardly anything else."""
    x, others = t["x"], slice(1, None)
    x[ROW] *= -1e3
    if "scores" in t:
        t["scores"][ROW, 0], t["scores"][ROW, others] = 20, -60
    elif "query" in t:
        _aim(t["query"], x[ROW])
    elif "instance_logits" in t:
        # The product of two queries is large with itself, and negative with that of the opposite row.
        x[ROW + 1] = x[ROW] / -1e3
        t["instance_logits"][ROW, 0], t["instance_logits"][ROW + 1, others] = 100, 100
    else:
        h = torch.tanh(x[ROW] @ t["v_weight"].mT + t["v_bias"])
        if "u_weight" in t:
            h = h * torch.sigmoid(x[ROW] @ t["u_weight"].mT + t["u_bias"])
        _aim(t["w_weight"], h)


def _aim(vectors, row) -> None:
    """Scores of the row: 20 of the first vector, -60 of the others."""
    wanted = torch.full(vectors.shape[:-1], -60, dtype=row.dtype)
    wanted[..., 0] = 20
    vectors += ((wanted - vectors @ row) / (row @ row))[..., None] * row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_length
@cases(
    *("softmax_pool", "query_pool", "query_pool-shared", "attention_pool", "gated_attention_pool"),
    *("dsmil_pool", "dsmil_pool-linear-v", "dsmil_pool-mlp-q", "dsmil_pool-relu-v"),
)
@every_kernels_backend  # the reference rounds as eager PyTorch does
def test_a_row_that_one_head_looks_at_costs_the_others_no_digit(backend, case, lengths, dtype):
    case = other_heads_of(case, _seen_by_the_first_head_alone)
    with saved_bytes(0):  # hidden units that are kept in bfloat16 have eager's error, which is another for each seed
        kept = op_cases.promise(case, backend, dtype, lengths=lengths, seeds=3, **SIZES)
    assert kept.ok, kept.broken()


# What is no number


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@every_length
@every_backend
def test_a_row_reaches_no_head_that_it_hides_from(backend, lengths, value):
    got = []
    for held in (value, 1.0):

        def hidden(t, held=held):
            t["x"][ROW], t["scores"][ROW, 1:] = held, -INF

        case = other_heads_of(CASES["softmax_pool"], hidden)
        got.append(step(case.ours(backend), case.make(lengths, **SIZES), offsets_of(lengths), None))
        got[-1]["gradient of scores"] = got[-1]["gradient of scores"][:, 1:]
    close(*got)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@every_length
@cases("dsmil_pool", "dsmil_pool-linear-v", "dsmil_pool-relu-v", "dsmil_pool-mlp-q")
@every_backend
def test_a_class_without_a_critical_instance_pools_nothing(backend, case, lengths, value):
    """Whatever the rows hold, and next to classes that have one."""
    tensors, offsets = case.make(lengths, **SIZES), offsets_of(lengths)
    with torch.no_grad():
        tensors["instance_logits"][:, 1:] = -INF
        tensors["x"][ROW + 1] = value
    outputs = case.ours(backend)(tensors, offsets, None)
    bag, scores, lse, critical = outputs
    assert (bag[:, 1:] == 0).all() and (lse[:, 1:] == -INF).all() and (critical[:, 1:] == -1).all()
    assert (scores[:, 1:] == -INF).all()
    leaves = [t for t in tensors.values() if t.requires_grad]
    parts = [o[:, 1:] for o in (bag, scores, lse)]
    for gradient in torch.autograd.grad(parts, leaves, op_cases.cotangents(parts), materialize_grads=True):
        assert not gradient[gradient.isfinite()].any()


# A score of inf


def _infinite_scores(t) -> None:
    """Of the first head: one row's where scores are given, else those of all rows."""
    if "scores" in t:
        t["scores"][ROW, 0] = INF
    elif "query" in t:
        t["x"][:, 0] = 1
        t["query"][..., 0, 0] = INF
    else:
        t["w_bias" if "w_bias" in t else "bias"][0] = INF


@every_length
@cases(
    *("softmax_pool", "query_pool", "query_pool-shared", "attention_pool", "gated_attention_pool"),
    *("loss_attention_pool", "segment_softmax"),
)
@every_backend
def test_a_score_of_inf(backend, case, lengths):
    """As in torch.softmax and torch.logsumexp, for its head and its bag alone."""
    case = dataclasses.replace(case, edit=_infinite_scores)
    tensors, offsets = case.make(lengths, **SIZES), offsets_of(lengths)
    got, expected = (f(tensors, offsets, None) for f in (case.ours(backend), case.truth))
    close(dict(enumerate(got)), dict(enumerate(expected)), equal_nan=True)
    if len(got) > 1:
        assert (got[2][0, 0] == INF) and got[0][0, 0].isnan().all()
    if case.op != "loss_attention_pool":  # which has one head
        case = other_heads_of(case, None)
        both = [step(f, tensors, offsets, None) for f in (case.ours(backend), case.truth)]
        close(*both, equal_nan=True)


# One row for all of them


def _one_winner(t) -> None:
    """Of all classes and bags: their first row, which is large where the classes look."""
    for name in ("weight", "e_weight"):
        if name in t:
            t[name].abs_()
    t["x"].abs_().div_(8)
    t["x"][[0, 40]] += 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@cases("instance_max", "instance_max-embed-dropout", "dsmil")
@every_kernels_backend  # the reference rounds as eager PyTorch does
def test_a_row_that_all_classes_choose_is_rounded_once(backend, case, dtype):
    """Its gradient is a sum of twelve."""
    case, lengths = dataclasses.replace(case, edit=_one_winner), (40, 30)
    tensors = case.make(lengths, dtype, **(SIZES | {"C": 12}))
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    values, indices = (0, 1) if case.op == "instance_max" else (4, 3)
    sent, gradients = torch.randn(2, 12, generator=torch.Generator().manual_seed(3)), []
    for compute, given in ((case.ours(backend), tensors), (case.truth, wide)):
        outputs = compute(given, offsets_of(lengths), None)
        assert (outputs[indices] == torch.tensor([[0], [40]])).all()
        gradients.append(torch.autograd.grad(outputs[values], given["x"], sent.to(outputs[values].dtype))[0].double())
    got, exact = gradients
    eps, summands = torch.finfo(dtype).eps, 100 * torch.finfo(torch.float32).eps
    if case.embed is not None:
        summands = eps  # of the products of its layer
    excess = (got - exact).abs() - 0.51 * eps * exact.abs()
    assert excess.max() <= summands * exact.abs().max()


def test_heads_of_a_case():
    case = CASES["attention_pool"]
    results = step(case.truth, case.make(D=20), offsets_of(op_cases.LENGTHS), None)
    # Not of the lse, six numbers for each head.
    assert case.heads(results) == {"output 0": 1, "output 1": 1, "gradient of w_weight": 0}
    assert CASES["mean_pool"].heads({"output 0": None}) == {}


@pytest.mark.parametrize("case", op_cases.PLAIN.values(), ids=op_cases.PLAIN)
@every_backend
def test_without_instances_gradients_are_zero_and_not_absent(backend, case):
    """Processes that share a bag wait for each other's gradients, also for those of one that has none of its rows."""

    def reached(lengths) -> dict[tuple[int, str], float]:
        """The largest gradient that each output has to each tensor."""
        tensors, found = case.make(lengths, torch.float32, **SIZES), {}
        leaves = {name: t for name, t in tensors.items() if t.requires_grad}
        for i, output in enumerate(case.ours(backend)(tensors, offsets_of(lengths), None)):
            if not output.requires_grad:
                continue
            total = output.masked_fill(output.isinf(), 0).sum()
            gradients = torch.autograd.grad(total, leaves.values(), retain_graph=True, allow_unused=True)
            found |= {(i, n): g.abs().sum().item() for n, g in zip(leaves, gradients, strict=True) if g is not None}
        return found

    assert reached((0, 0)) == dict.fromkeys(reached((4, 3)), 0)
