"""``embed``, the layer in front of an op: its arguments, seeds and types for every op that takes it, and some of its
rows by `embed_instances`."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from functional_cases import DTYPES, OPS, ROWS, L, N, arguments, call, called, randn, takes
from legs import all_of_them

import milkernels
from milkernels import Embed, backends, embed_instances
from milkernels.ops import contract

pytestmark = pytest.mark.filterwarnings("ignore:milkernels")  # of what runs on the reference
E = 7
EMBEDDED = [op for op in OPS if takes(op, "embed")]
DROPOUTS = {"dropout_p", "v_dropout_p"}
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "identity": lambda h: h}
ROW = torch.arange(N)
every_op = pytest.mark.parametrize("op", EMBEDDED)


def embedding(dtype=torch.float32, activation="relu", dropout_p=0.0):
    return Embed((randn(E, L, dtype=dtype, seed=50), randn(E, dtype=dtype, seed=51)), activation, dropout_p)


def behind(op, dtype=torch.float32, parameter_dtype=None):
    """The arguments of a good call whose instances are embedded."""
    return arguments(op, dtype, parameter_dtype, width=E)


def dropout_of(op):
    """The option by which the op itself drops units, if it does."""
    return next((name for name in DROPOUTS if takes(op, name)), None)


def leaves_of(kwargs, embed):
    tensors = {n: t for n, t in kwargs.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    tensors |= dict(zip(("embed.weight", "embed.bias"), embed.linear, strict=True))
    return {n: t.requires_grad_() for n, t in tensors.items() if n != "instance_logits"}


def gradients(outputs, leaves):
    total = sum(o.double().masked_fill(o.isinf(), 0).square().sum() for o in outputs if o.requires_grad)
    return torch.autograd.grad(total, list(leaves.values()))


def same(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_which_ops_have_an_embedding():
    assert {op.removeprefix("gated_") for op in EMBEDDED} == contract.EMBEDDED
    for op in EMBEDDED:
        parameters = inspect.signature(getattr(milkernels, op)).parameters
        for name in ("embed", "seed"):
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY and parameters[name].default is None


# Errors


WEIGHT = torch.ones(E, L)
FIELDS = r"embed must be Embed\(linear, activation, dropout_p\); got"
LAYER = r"embed.linear must be an nn.Linear, a weight or a pair \(weight, bias\); got"
BAD = [
    (WEIGHT, TypeError, f"{FIELDS} Tensor"),
    (torch.nn.Linear(L, E), TypeError, f"{FIELDS} Linear"),
    ("relu", TypeError, f"{FIELDS} str"),
    ({"weight": WEIGHT}, TypeError, f"{FIELDS} dict"),
    ((), TypeError, f"{FIELDS} 0 values"),
    ((WEIGHT, "relu", 0.0, 7), TypeError, f"{FIELDS} 4 values"),
    ((None,), TypeError, f"{LAYER} NoneType"),
    ((WEIGHT.tolist(),), TypeError, f"{LAYER} 7 values"),
    (((WEIGHT, None, None),), TypeError, f"{LAYER} 3 values"),
    (((None, WEIGHT[0]),), TypeError, "embed.linear.weight must be a tensor; got NoneType"),
    ((WEIGHT.int(),), TypeError, "embed.linear.weight must be float16.*got torch.int32"),
    ((WEIGHT[0],), ValueError, r"embed.linear.weight must have 2 dimensions; got shape \(6,\)"),
    ((WEIGHT[None],), ValueError, r"embed.linear.weight must have 2 dimensions; got shape \(1, 7, 6\)"),
    ((torch.ones(E, L + 1),), ValueError, r"embed.linear.weight must be \[any, 6\]; got shape \(7, 7\)"),
    ((WEIGHT[:0],), ValueError, r"embed.linear.weight must be \[any, 6\]; got shape \(0, 6\)"),
    ((WEIGHT.to("meta"),), ValueError, "embed.linear.weight must be on the device of the instances, cpu; got meta"),
    (((WEIGHT, 0.5),), TypeError, "embed.linear.bias must be a tensor; got float"),
    (((WEIGHT, torch.ones(E).long()),), TypeError, "embed.linear.bias must be float16.*got torch.int64"),
    (((WEIGHT, torch.ones(E, 1)),), ValueError, r"embed.linear.bias must have 1 dimensions; got shape \(7, 1\)"),
    (((WEIGHT, torch.ones(L)),), ValueError, r"embed.linear.bias must be \[7\]; got shape \(6,\)"),
    (((WEIGHT, torch.ones(E).to("meta")),), ValueError, "embed.linear.bias must be on the device.*got meta"),
    ((WEIGHT, "silu"), ValueError, "embed.activation must be one of tanh, relu, gelu, identity; got 'silu'"),
    ((WEIGHT, None), ValueError, "embed.activation must be one of .*; got None"),
    ((WEIGHT, 0.5), ValueError, "embed.activation must be one of .*; got 0.5"),
    ((WEIGHT, "relu", -0.1), ValueError, "embed.dropout_p must be between 0 and 1; got -0.1"),
    ((WEIGHT, "relu", 1.5), ValueError, "embed.dropout_p must be between 0 and 1; got 1.5"),
    ((WEIGHT, "relu", float("nan")), ValueError, "embed.dropout_p must be between 0 and 1; got nan"),
    ((WEIGHT, "relu", "0.5"), TypeError, "embed.dropout_p must be a number; got str"),
    ((WEIGHT, "relu", None), TypeError, "embed.dropout_p must be a number; got NoneType"),
]
BAD_SEEDS = [
    (1.0, TypeError, "seed must be an int64 tensor, an int or None; got float"),
    (2**64, ValueError, f"seed must fit into 64 bits; got {2**64}"),
    (torch.zeros(1), TypeError, "seed must be int64; got torch.float32"),
    (torch.zeros(2, dtype=torch.int64), ValueError, r"seed must have one element; got shape \(2,\)"),
    (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "seed must be on the device"),
]


@pytest.fixture
def no_work(monkeypatch):
    """A call that goes so far as to compute something fails."""

    def works(*args, **kwargs):
        raise AssertionError("an error came too late")

    monkeypatch.setattr(backends, "choose", works)
    monkeypatch.setattr("milkernels.ops.embedding.embedded", works)


@every_op
def test_bad_embeddings(op, no_work):
    good = behind(op)
    for embed, error, match in BAD:
        with pytest.raises(error, match=match):
            call(op, **good, embed=embed)
    for seed, error, match in BAD_SEEDS:
        with pytest.raises(error, match=match):
            call(op, **good, embed=embedding(dropout_p=0.5), seed=seed)


@pytest.mark.parametrize("op, name", [(op, n) for op in EMBEDDED for n, size in OPS[op].items() if size[-1] == L])
def test_the_width_of_an_op_is_that_of_its_embedding(op, name, no_work):
    wide = (behind(op) | {name: arguments(op)[name]}) if name != "x" else arguments(op) | {"x": randn(N, E)}
    match = (
        rf"{called(op, name)} must be \[.*7\]; got shape \(.*6\)"
        if name != "x"
        else r"embed.linear.weight must be \[any, 7\]; got"
    )
    with pytest.raises(ValueError, match=match):
        call(op, **wide, embed=embedding())


# What it is


@every_op
def test_plain_tuples_are_taken(op):
    kwargs, (weight, bias) = behind(op), embedding().linear
    layer = torch.nn.Linear(L, E)
    layer.weight.data, layer.bias.data = weight, bias
    for plain, named in [
        ((weight,), Embed(weight)),
        (((weight, bias),), Embed(layer)),
        ([[weight, None], "gelu"], Embed(weight, activation="gelu")),
        (((weight, bias), "tanh", 0), Embed(layer, "tanh", 0.0)),
    ]:
        for got, expected in zip(call(op, **kwargs, embed=plain), call(op, **kwargs, embed=named), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_op
def test_it_is_the_op_of_the_embedded_instances(op, activation):
    kwargs, embed = behind(op, torch.float64), embedding(torch.float64, activation)
    leaves = leaves_of(kwargs, embed)
    got = call(op, **kwargs, embed=embed)
    h = ACTIVATIONS[activation](F.linear(kwargs["x"], *embed.linear))
    expected = call(op, **(kwargs | {"x": h}))
    same(got, expected)
    same(gradients(got, leaves), gradients(expected, leaves))


@every_op
def test_layouts_of_its_parameters(op):
    kwargs, embed = behind(op), embedding()
    weight, bias = embed.linear
    expected = call(op, **kwargs, embed=embed)
    for layer in [
        (weight.t().contiguous().t(), bias),
        (torch.cat([weight, weight], 1)[:, :L], torch.stack([bias, bias], 1)[:, 0]),
    ]:
        same(call(op, **kwargs, embed=embed._replace(linear=layer)), expected)


# Seeds


@every_op
def test_one_seed_drops_units_of_both_each_as_if_alone(op):
    """What the op itself drops is the same with a layer in front of it, and the other way round."""
    kwargs, own = behind(op, torch.float64), dropout_of(op)
    for own_p in (0.0, 0.5) if own else (0.0,):
        options = {own: own_p} if own else {}
        for p in (0.0, 0.5):
            embed = embedding(torch.float64, "identity", p)
            got = call(op, **kwargs, **options, embed=embed, seed=9)
            h = embed_instances(kwargs["x"], embed, ROW, seed=9)
            assert (h == 0).any() == (p > 0)
            same(got, call(op, **(kwargs | {"x": h}), **options, **({"seed": 9} if own else {})))


@every_op
def test_seeds(op):
    kwargs, embed = behind(op), embedding(activation="identity", dropout_p=0.5)

    def values(seed):
        return torch.cat([o.flatten() for o in call(op, **kwargs, embed=embed, seed=seed) if o.is_floating_point()])

    assert torch.equal(values(7), values(torch.tensor([7]))) and torch.equal(values(7), values(torch.tensor(7)))
    assert not torch.equal(values(7), values(7 + 2**32))
    torch.manual_seed(3)
    drawn = values(None)
    assert not torch.equal(drawn, values(None))
    torch.manual_seed(3)
    assert torch.equal(drawn, values(None))


@every_op
def test_one_seed_is_drawn_for_both_and_none_for_neither(op):
    kwargs, own = behind(op), dropout_of(op)
    options = {own: 0.5} if own else {}
    torch.manual_seed(3)
    drawn = call(op, **kwargs, **options, embed=embedding(dropout_p=0.5))
    after = torch.random.get_rng_state()
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    assert torch.equal(after, torch.random.get_rng_state())
    for a, b in zip(drawn, call(op, **kwargs, **options, embed=embedding(dropout_p=0.5), seed=seed), strict=True):
        assert torch.equal(a, b)
    call(op, **kwargs, embed=embedding())
    assert torch.equal(after, torch.random.get_rng_state())


@every_op
def test_everything_dropped(op):
    """h is 0, and no gradient reaches what made it."""
    kwargs, embed = behind(op), embedding(activation="tanh", dropout_p=1.0)
    leaves = leaves_of(kwargs, embed)
    got = call(op, **kwargs, embed=embed)
    same(got, call(op, **(kwargs | {"x": torch.zeros(N, E)})))
    found = dict(zip(leaves, gradients(got, leaves), strict=True))
    assert all(g.isfinite().all() for g in found.values())
    assert not any(found[name].any() for name in ("x", "embed.weight", "embed.bias"))


# Types


@every_op
def test_result_types(op):
    """Of every type of instances with every one of the op's parameters and of the embedding's."""
    with all_of_them() as each:
        for types in itertools.product(DTYPES, repeat=3):
            with each(*types):
                check_result_types(op, *types)


def check_result_types(op, dtype, parameter_dtype, embed_dtype):
    kwargs, embed = behind(op, dtype, parameter_dtype), embedding(embed_dtype)
    leaves = leaves_of(kwargs, embed)
    outputs = call(op, **kwargs, embed=embed)
    floating = [t for t in (*kwargs.values(), *embed.linear) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    acc = torch.float64 if torch.float64 in {t.dtype for t in floating} else torch.float32
    bag = torch.promote_types(dtype, embed_dtype)
    if any(name not in ROWS for name in list(OPS[op])[1:]):
        bag = torch.promote_types(bag, parameter_dtype)
    pools = op.endswith("_pool") or op == "dsmil"
    expected = [bag if pools and i == 0 else acc for i, o in enumerate(outputs) if o.is_floating_point()]
    assert [o.dtype for o in outputs if o.is_floating_point()] == expected
    for t, gradient in zip(leaves.values(), gradients(outputs, leaves), strict=True):
        assert gradient.dtype == t.dtype and gradient.shape == t.shape


@every_op
def test_autocast_narrows_products_only(op):
    kwargs, embed = behind(op), embedding()
    wide, exact = behind(op, torch.float64), embedding(torch.float64)
    plain, unrounded = call(op, **kwargs, embed=embed), call(op, **wide, embed=exact)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call(op, **kwargs, embed=embed)
        left_alone = call(op, **wide, embed=exact)
        h = embed_instances(kwargs["x"], embed, ROW)
    assert h.dtype == torch.bfloat16
    assert [t.dtype for t in cast] == [t.dtype for t in plain]
    same(left_alone, unrounded)
    # Products run in the type of autocast or in a wider one: never further off than where they are all narrow.
    with torch.autocast("cpu", torch.bfloat16), milkernels.use_backend("reference"):
        narrow = call(op, **kwargs, embed=embed)
    scores = next(i for i, t in enumerate(cast) if t.is_floating_point() and t.shape[0] == N)
    ours, most = (float((t[scores] - unrounded[scores]).norm()) for t in (cast, narrow))
    assert most > 1e-4 * float(unrounded[scores].norm())
    assert ours <= 2 * most


# Some of its rows


def test_rows_are_those_that_the_ops_see():
    """Scores of queries that are the units."""
    x, rows = randn(N, L), torch.tensor([8, 0, 3, 3])
    for dtype, p in [(torch.float64, 0.0), (torch.float64, 0.4), (torch.float32, 0.4), (torch.bfloat16, 0.4)]:
        embed = embedding(dtype, "gelu", p)
        units = torch.eye(E, dtype=dtype)
        seen = milkernels.query_scores(x.to(dtype), units, embed=embed, seed=2**40 + 7)
        h = embed_instances(x.to(dtype), embed, rows, seed=2**40 + 7)
        assert h.dtype == dtype and h.shape == (4, E)
        # Sums of L products and a bias, scaled and rounded.
        close = {"rtol": 0, "atol": (L + 3) * torch.finfo(dtype).eps * float(seen.abs().max())}
        torch.testing.assert_close(h.to(seen.dtype), seen[rows], **close)
        torch.testing.assert_close(h, embed_instances(x.to(dtype), embed, ROW, seed=2**40 + 7)[rows], **close)
        assert torch.equal(h, embed_instances(x.to(dtype), tuple(embed), rows, seed=torch.tensor([2**40 + 7])))


def test_no_rows():
    x, embed = randn(N, L).requires_grad_(), embedding(dropout_p=0.5)
    for instances in (x, x[:0]):
        h = embed_instances(instances, embed, ROW[:0], seed=1)
        assert h.shape == (0, E) and h.dtype == torch.float32
    (gradient,) = torch.autograd.grad(h.sum(), x)
    assert not gradient.any()


@pytest.mark.parametrize("activation", ["tanh", "gelu", "identity"])
def test_gradients_of_rows(activation):
    x, embed = randn(N, L, dtype=torch.float64).requires_grad_(), embedding(torch.float64, activation, 0.4)
    rows = torch.tensor([5, 1, 5])
    weight, bias = (t.requires_grad_() for t in embed.linear)

    def some(x, weight, bias):
        return embed_instances(x, embed._replace(linear=(weight, bias)), rows, seed=3)

    assert torch.autograd.gradcheck(some, (x, weight, bias))
    (gradient,) = torch.autograd.grad(some(x, weight, bias).sum(), x)
    assert gradient[rows].any() and not gradient[[0, 2, 3, 4, 6, 7, 8]].any()


def test_seeds_of_rows():
    x, embed = randn(N, L), embedding(activation="identity", dropout_p=0.5)
    torch.manual_seed(3)
    drawn = embed_instances(x, embed, ROW)
    assert not torch.equal(drawn, embed_instances(x, embed, ROW))
    torch.manual_seed(3)
    assert torch.equal(drawn, embed_instances(x, embed, ROW))
    state = torch.random.get_rng_state()
    embed_instances(x, embedding(), ROW)
    embed_instances(x, embed, ROW, seed=4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not embed_instances(x, embedding(dropout_p=1.0), ROW).any()


@pytest.mark.parametrize("embed_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_rows(dtype, embed_dtype):
    embed = embedding(embed_dtype)
    h = embed_instances(randn(N, L, dtype=dtype), embed, ROW)
    assert h.dtype == (torch.float64 if embed_dtype == torch.float64 else dtype)


def test_rows_of_nothing_else(no_work):
    x, embed = randn(N, L), embedding()
    for args, error, match in [
        ((x, None, ROW), TypeError, f"{FIELDS} NoneType"),
        ((x.long(), embed, ROW), TypeError, "x must be float16.*got torch.int64"),
        ((x[0], embed, ROW), ValueError, r"x must have 2 dimensions; got shape \(6,\)"),
        ((x, embed, ROW.int()), TypeError, "rows must be an int64 tensor; got torch.int32"),
        ((x, embed, ROW > 3), TypeError, "rows must be an int64 tensor; got torch.bool"),
        ((x, embed, [0, 1]), TypeError, "rows must be a tensor; got list"),
        ((x, embed, ROW[None]), ValueError, r"rows must have 1 dimension; got shape \(1, 9\)"),
        ((x, embed, ROW[0]), ValueError, r"rows must have 1 dimension; got shape \(\)"),
        ((x, embed, ROW.to("meta")), ValueError, "rows must be on the device of the instances, cpu; got meta"),
        ((x, embed, ROW - 1), ValueError, r"rows must be in \[0, 9\); got -1"),
        ((x, embed, ROW + 1), ValueError, r"rows must be in \[0, 9\); got 9"),
        ((x[:0], embed, ROW), ValueError, "rows must be in .*, so there can be none; got 9"),
        *(((x, bad, ROW), error, match) for bad, error, match in BAD),
    ]:
        with pytest.raises(error, match=match):
            embed_instances(*args)
    for seed, error, match in BAD_SEEDS:
        with pytest.raises(error, match=match):
            embed_instances(x, embedding(dropout_p=0.5), ROW, seed=seed)


def test_rows_that_are_none_are_seen_where_they_are_not_read():
    """On a GPU, whose gathers end the process for such a row, and under tracing."""
    x, embed = randn(N, L).requires_grad_(), embedding()
    rows = torch.tensor([3, -1, 8, 9])
    h = torch.compile(embed_instances, backend="eager", fullgraph=True)(x, embed, rows)
    assert h[[1, 3]].isnan().all()
    torch.testing.assert_close(h[[0, 2]], embed_instances(x, embed, rows[[0, 2]]))
    (grad,) = torch.autograd.grad(h[[0, 2]].sum(), x)
    assert grad.isfinite().all() and grad.any(1).nonzero().flatten().tolist() == [3, 8]
