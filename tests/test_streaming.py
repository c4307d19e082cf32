"""Bags that are read in pieces: what ops, modules and models say of them is what they say of the whole."""

import dataclasses
import itertools
from unittest import mock

import op_cases
import oracle
import pytest
import torch
from legs import ONE_OF_EACH, all_of_them, on_legs
from op_cases import CASES, INF, LENGTHS, NAN, Case, offsets_of
from torch import Tensor

import milkernels
from milkernels import nn, ops, seed_of_part, use_backend
from milkernels.streaming import StreamedBag

ROWS = 5
backends = pytest.mark.parametrize("backend", on_legs("native", "reference"))


def pieces_of(x: Tensor, rows: int = ROWS, **options) -> StreamedBag:
    return StreamedBag(x.detach(), rows, **options)


@dataclasses.dataclass(frozen=True)
class Streamed(Case):
    """The case with a stream for ``x``, which gets no gradient."""

    rows: int = ROWS

    def ours(self, backend):
        compute = super().ours(backend)
        return lambda tensors, *bags: compute(tensors | {"x": pieces_of(tensors["x"], self.rows)}, *bags)

    def truth(self, tensors, offsets, mask):
        keep = oracle.dropout_keep

        def in_parts(seed, num_rows, *others):
            starts = range(0, num_rows, self.rows)
            return torch.cat([keep(seed_of_part(seed, s), min(self.rows, num_rows - s), *others) for s in starts])

        with mock.patch.object(oracle, "dropout_keep", in_parts):
            return super().truth({"x": tensors["x"]} | tensors, offsets, mask)


def streamed(case: Case) -> Streamed:
    tensors = dict(case.tensors)
    fixed = {"x": tensors.pop("x")} | case.fixed
    whole = dataclasses.replace(case, tensors=tensors, fixed=fixed)
    return Streamed(*(getattr(whole, field.name) for field in dataclasses.fields(case)))


STREAMED = {name: streamed(case) for name, case in CASES.items() if "x" in case.tensors and case.op in ops.__all__}
STREAMED = {name: case for name, case in STREAMED.items() if case.op != "attention_weights"}
cases = pytest.mark.parametrize("case", STREAMED.values(), ids=STREAMED)


def same_as_the_oracle(case, backend, offsets, mask, lengths=LENGTHS) -> None:
    tensors = case.make(lengths)
    got = op_cases.step(case.ours(backend), tensors, offsets, mask)
    op_cases.close(got, op_cases.step(case.truth, tensors, offsets, mask), 1e-13)


@backends
@cases
def test_the_numbers_of_the_whole(case, backend):
    """Every op, in float64: all outputs and the gradients of everything else, pieces that cross bags, an empty bag."""
    with all_of_them() as each:
        for masked, lengths in itertools.product((False, True), (LENGTHS, (6, 11, 0))):
            mask = torch.arange(sum(lengths)) % 4 != 1 if masked else None
            with each(lengths, "masked" if masked else "all rows"):
                same_as_the_oracle(case, backend, offsets_of(lengths) if case.bags else None, mask, lengths)


@backends
def test_one_bag_needs_no_offsets(backend):
    for name in ("gated_attention_pool", "loss_attention_pool", "dsmil-mlp-q-relu-v", "max_pool", "mean_pool"):
        same_as_the_oracle(STREAMED[name], backend, None, None, (17,))


PROMISED = [name for name in ONE_OF_EACH if name in STREAMED]


@pytest.mark.parametrize("case", [STREAMED[name] for name in PROMISED], ids=PROMISED)
@pytest.mark.parametrize(
    "types",
    [(torch.float32,), (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16,)],
    ids=["float32", "bfloat16-float32", "float16-float32", "bfloat16"],
)
def test_the_promise(case, types):
    case = dataclasses.replace(case, rows=48, lead=15)  # wide embeddings spread the logits
    kept = op_cases.promise(case, None, *types, lengths=(90, 0, 70), seeds=4, L=40, D=24, K=2)
    assert kept.ok, kept.broken()


@backends
@pytest.mark.parametrize("name", PROMISED)
def test_rows_that_do_not_count(name, backend):
    mask = torch.arange(sum(LENGTHS)) % 3 != 0
    case = STREAMED[name]
    offsets = offsets_of(LENGTHS)
    op_cases.check_masked_rows_do_not_leak(case, backend, LENGTHS, offsets, mask, NAN, torch.float32)
    if case.bags:
        op_cases.check_nan_stays_in_its_bag(case, backend, LENGTHS, 3, 9)


def test_a_large_lse():
    """In float32 it has lost 5e-4 of each share."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator) + 1
    scores = (3 * torch.randn(4000, 1, generator=generator) + 1e4).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    truth, ours = oracle.softmax_pool(x.double(), exact)[0], milkernels.softmax_pool(pieces_of(x, 300), scores).bag
    assert (ours - truth).norm() <= 4e-7 * truth.norm()
    grad = torch.randn(1, 1, 8, generator=generator)
    (a,), (b,) = torch.autograd.grad(ours, scores, grad), torch.autograd.grad(truth, exact, grad.double())
    assert (a - b).norm() <= 2e-6 * b.norm()


# DSMIL


@pytest.mark.parametrize("options", [{}, {"embed": True}], ids=["plain", "embedded"])
def test_the_lowest_row_wins_a_tie_across_pieces(options):
    x = torch.zeros(20, 3)
    x[7, 0] = x[12, 0] = x[18, 0] = 2
    x[16, 1] = x[3, 1] = INF
    x[9, 2] = x[19, 2] = NAN
    classifier, q = torch.eye(3), torch.ones(2, 3)
    found = milkernels.instance_max(pieces_of(x.nan_to_num(0, 9)), classifier)
    assert found.indices.tolist() == [[7, 3, 0]]
    embed = milkernels.Embed(torch.eye(3)) if options else None
    out = milkernels.dsmil(pieces_of(x), classifier, q, torch.tensor([0, 0, 8, 20]), embed=embed)
    whole = milkernels.dsmil(x, classifier, q, torch.tensor([0, 0, 8, 20]), embed=embed)
    assert torch.equal(out.critical, whole.critical)
    torch.testing.assert_close(out.values, whole.values, equal_nan=True)
    pooled = milkernels.max_pool(pieces_of(x))
    torch.testing.assert_close([*pooled], [*milkernels.max_pool(x)], equal_nan=True)


def test_a_class_without_a_critical_instance_pools_nothing():
    """Its logits overflow to -inf, though there are rows."""
    x, classifier, q = torch.rand(12, 4) + 1, torch.ones(2, 4), torch.randn(3, 4)
    classifier[1] = -3e38
    for out in (milkernels.dsmil(pieces_of(x), classifier, q), milkernels.dsmil(x, classifier, q)):
        assert out.critical[0, 1] == -1 and out.lse[0, 1] == -INF
        assert not out.bag[0, 1].any() and bool((out.scores[:, 1] == -INF).all())


@pytest.mark.parametrize("embed_dim", [None, 6, (6, 5)])
def test_reads_of_dsmil(embed_dim):
    """Three; behind trained layers, the few pieces that hold a critical instance once more."""
    x = torch.randn(40, 8)
    read = []

    class Noted:
        shape = x.shape

        def __getitem__(self, rows):
            read.append(rows.start)
            return x[rows]

    model = nn.DSMILModel(8, 2, embed_dim)
    stream = StreamedBag(Noted(), rows=10)
    out = model(stream)
    assert read == [0, 10, 20, 30] * 2
    read.clear()
    out.logits.sum().backward()
    winners = sorted({int(i) // 10 * 10 for i in out.pooled.critical.flatten()})
    assert read == [0, 10, 20, 30] + (winners if embed_dim == (6, 5) else [])


def test_pieces_without_gradient_are_not_read_again():
    """No gradient is one of exactly 0: not a sum of 0, and not a norm of 0, which squares of small numbers have."""
    x, read, g = torch.randn(40, 4), [], torch.zeros(40, 1)
    g[12], g[17], g[33] = 1, -1, 1e-30

    class Noted:
        shape = x.shape

        def __getitem__(self, rows):
            read.append(rows.start)
            return x[rows]

    v, w = torch.randn(3, 4), torch.randn(1, 3)
    found = []
    for bag in (StreamedBag(Noted(), rows=10), x):
        leaves = [t.clone().requires_grad_() for t in (v, w)]
        scores = milkernels.attention_scores(bag, *leaves)
        read.clear()
        found.append(torch.autograd.grad(scores, leaves, g))
        assert read == ([10, 30] if bag is not x else [])
    torch.testing.assert_close(*found)


# Modules and models

WIDTH = 10
MODELS = {
    "attention": lambda f: nn.AttentionPool(WIDTH, 6, 2, **f),
    "attention, not gated": lambda f: nn.AttentionPool(WIDTH, 6, gated=False, **f),
    "DSMIL": lambda f: nn.DSMIL(WIDTH, 3, 6, **f),
    "DSMIL of the paper": lambda f: nn.DSMIL(WIDTH, 3, 6, nonlinear_query=False, value="linear", scale=1.0, **f),
    "Loss-Attention": lambda f: nn.LossAttention(WIDTH, 3, **f),
    "mean": lambda f: nn.MeanPool(),
    "max": lambda f: nn.MaxPool(),
    "ABMIL": lambda f: nn.ABMIL(WIDTH, 3, 8, 6, heads=2, **f),
    "ABMIL, two layers": lambda f: nn.ABMIL(WIDTH, 3, (8, 7), 6, **f),
    "ABMIL, no layer": lambda f: nn.ABMIL(WIDTH, 3, None, 6, **f),
    "DSMIL model": lambda f: nn.DSMILModel(WIDTH, 3, **f),
    "DSMIL model, two layers": lambda f: nn.DSMILModel(WIDTH, 3, (8, 7), **f),
    "Loss-Attention model": lambda f: nn.LossAttentionModel(WIDTH, 3, (8, 7), **f),
    "Loss-Attention model, no layer": lambda f: nn.LossAttentionModel(WIDTH, 3, (), **f),
} | {
    f"{kind.__name__} {pooling} {dims}": lambda f, kind=kind, pooling=pooling, dims=dims: kind(
        WIDTH, 2, dims, pooling, **f
    )
    for kind in (nn.InstancePooling, nn.EmbeddingPooling)
    for pooling in kind.POOLINGS
    for dims in ((8, 6), ())
    if (kind, pooling, dims) != (nn.EmbeddingPooling, "generalized_mean", ())
}


def flat(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for part in out for t in flat(part)]


def step_of(model, out) -> list[Tensor]:
    """All results, those that are -inf as they are, and all gradients."""
    results = flat(out)
    there = [t.masked_fill(t.detach().isinf(), 0) for t in results if t.requires_grad]
    grads = torch.autograd.grad(there, [*model.parameters()], op_cases.cotangents(there), allow_unused=True)
    return results + [torch.zeros(()) if g is None else g for g in grads]


@backends
@pytest.mark.parametrize("name", MODELS)
def test_models(name, backend):
    torch.manual_seed(0)
    model = MODELS[name]({"dtype": torch.float64})
    x, mask = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64), torch.arange(sum(LENGTHS)) % 4 != 1
    for bags in ((None, None), (offsets_of(LENGTHS), mask)):
        with use_backend(backend):
            pair = [step_of(model, model(given, *bags)) if [*model.parameters()] else flat(model(given, *bags))
                    for given in (pieces_of(x), x)]  # fmt: skip
        torch.testing.assert_close(*pair, rtol=1e-13, atol=1e-13)


def test_scores_beside_the_rows():
    x, scores = torch.randn(17, 4), torch.randn(17, 2)
    ours, whole = nn.SoftmaxPool()(pieces_of(x), scores), nn.SoftmaxPool()(x, scores)
    torch.testing.assert_close([*ours], [*whole])
    top = milkernels.topk_instances(ours.scores, 3)
    assert torch.equal(top.indices, milkernels.topk_instances(scores, 3).indices)


# Dropout


@backends
def test_every_piece_drops_other_units(backend):
    """Rows that are all the same would have the same scores."""
    x, v, w = torch.ones(16, 64), torch.randn(64, 64), torch.randn(1, 64)
    out = milkernels.attention_pool(pieces_of(x, 4), v, w, dropout_p=0.5, seed=7, backend=backend)
    assert out.scores.unique().numel() == 16
    parts = [
        milkernels.attention_pool(part, v, w, dropout_p=0.5, seed=seed_of_part(7, 4 * i), backend=backend)
        for i, part in enumerate(x.split(4))
    ]
    torch.testing.assert_close(out.scores, torch.cat([part.scores for part in parts]))
    whole = milkernels.attention_pool(x, v, w, dropout_p=0.5, seed=7, backend=backend)
    one = milkernels.attention_pool(pieces_of(x, 16), v, w, dropout_p=0.5, seed=7, backend=backend)
    torch.testing.assert_close([*one], [*whole])


@pytest.mark.parametrize("name", ["ABMIL", "DSMIL", "Loss-Attention"])
@pytest.mark.parametrize("dims", [(8,), (8, 7)])
def test_a_backward_drops_what_its_forward_dropped(name, dims):
    """Against a graph over pieces, each with the random numbers that the stream had for it."""
    torch.manual_seed(0)
    model = {
        "ABMIL": lambda: nn.ABMIL(WIDTH, 2, dims, 6, dropout=0.5),
        "DSMIL": lambda: nn.DSMILModel(WIDTH, 2, dims, dropout=0.5, value="relu", value_dropout=0.5),
        "Loss-Attention": lambda: nn.LossAttentionModel(WIDTH, 2, dims, dropout=0.5),
    }[name]()
    model = model.double()
    x = torch.randn(30, WIDTH, dtype=torch.float64)
    out = model(pieces_of(x, 30))
    torch.manual_seed(1)
    ours = step_of(model, model(pieces_of(x, 30)))
    torch.manual_seed(1)
    whole = step_of(model, model(x))
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(out.logits, ours[0])

    def loss(*parameters):  # by numerical differences, in several pieces
        torch.manual_seed(2)
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), parameters, strict=True):
                parameter.copy_(value)
        assert named
        return model(pieces_of(x, 7)).logits.sin().sum()

    start = [p.detach().clone() for p in model.parameters()]
    loss(*start).backward()
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in start]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), along, strict=True))
    step = 1e-6
    up, down = (loss(*[p + s * d for p, d in zip(start, along, strict=True)]) for s in (step, -step))
    torch.testing.assert_close(slope.item(), ((up - down) / (2 * step)).item(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("seed", "row", "expected"),
    [(7, 0, 7), (-3, 0, -3), (0, 1, None), (7, 32768, None), (2**63 - 1, 2**40, None)],
)
def test_seeds_of_parts(seed, row, expected):
    """SplitMix64, in Python's integers."""
    found = seed_of_part(seed, row)
    z = (seed + row * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    assert found == (seed if row == 0 else (z + 2**63) % 2**64 - 2**63)
    assert expected is None or found == expected
    assert int(seed_of_part(torch.tensor([seed]), row)) == found


@pytest.mark.parametrize("row", [-1, 2**63, True, 1.0])
def test_a_wrong_first_row(row):
    with pytest.raises((TypeError, ValueError), match="first_row must be"):
        seed_of_part(7, row)


# Types, and what blocks say


def test_autocast_counts_for_the_backward_too():
    torch.manual_seed(0)
    model = nn.ABMIL(WIDTH, 2, (8, 7), 6)
    x = torch.randn(40, WIDTH)
    found = []
    for given in (pieces_of(x, 40), x):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(given).logits.float().square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        loss = model(pieces_of(x, 7)).logits.float().square().sum()
    loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], found[1], rtol=5e-2, atol=5e-3)


def test_a_block_counts_for_the_backward_too():
    x, v, w = torch.randn(20, 4), torch.randn(3, 4, requires_grad=True), torch.randn(1, 3)
    with use_backend("reference"), milkernels.saved_bytes(0):
        loss = milkernels.attention_pool(pieces_of(x), v, w).bag.sum()
    with mock.patch.object(ops.attention, "call", side_effect=AssertionError("a kernel was called")):
        loss.backward()


@pytest.mark.skipif(milkernels.native.load_error() is not None, reason="no extension")
def test_no_kernel_runs_its_forward_twice():
    x, v, w = torch.randn(200, 8), torch.randn(6, 8, requires_grad=True), torch.randn(1, 6)
    loss = milkernels.attention_pool(pieces_of(x, 64), v, w).bag.sum()
    with torch.profiler.profile() as profiler:
        loss.backward()
    names = [event.name for event in profiler.events()]
    assert sum("attention_bwd" in name for name in names) >= 4
    assert not [name for name in names if "attention_pool_fwd" in name]


def test_a_limit_of_saved_bytes_is_that_of_all_pieces():
    from milkernels.streaming import pooling

    kept = []
    forwards = pooling.Forwards

    def noted(limit):
        kept.append(forwards(limit))
        return kept[-1]

    x, v, w = torch.randn(512, 8), torch.randn(64, 8, requires_grad=True), torch.randn(1, 64)
    with mock.patch.object(pooling, "Forwards", noted), milkernels.saved_bytes(200 * 64 * 4):
        milkernels.attention_pool(pieces_of(x, 128), v, w)
    assert sum(f.kept for f in kept) <= 200 * 64 * 4
    if milkernels.native.load_error() is None:
        assert kept[0].kept > kept[1].kept > 0 == kept[3].kept
