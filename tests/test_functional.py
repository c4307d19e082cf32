"""What all public ops share: argument checks, result types, layouts, seeds, backends and compositions."""

import inspect
import itertools

import oracle
import pytest
import torch
from functional_cases import DTYPES, OFFSETS, OPS, ROWS, B, K, L, N, arguments, call, called, randn, refuses, takes
from legs import all_of_them

import milkernels
from milkernels import native, testing

NATIVE = pytest.param("native", marks=pytest.mark.skipif(native.load_error() is not None, reason="no extension"))
every_op = pytest.mark.parametrize("op", OPS)


# Errors


@every_op
def test_bad_instances(op):
    x = next(iter(OPS[op]))
    refuses(TypeError, f"{x} must be a tensor; got list", op, **{x: [[1.0]]})
    refuses(TypeError, f"{x} must be float16.*got torch.int64", op, **{x: torch.zeros(N, L, dtype=torch.int64)})
    refuses(TypeError, f"{x} must be float16.*got torch.complex64", op, **{x: torch.zeros(N, L) * 1j})
    refuses(ValueError, rf"{x} must have 2 dimensions; got shape \(6,\)", op, **{x: torch.zeros(L)})
    refuses(ValueError, rf"{x} must have 2 dimensions; got shape \(1, 9, 6\)", op, **{x: torch.zeros(1, N, L)})
    refuses(ValueError, rf"{x} must have at least one column; got shape \(9, 0\)", op, **{x: torch.zeros(N, 0)})
    refuses(TypeError, f"{x} must be a dense tensor; got layout", op, **{x: torch.zeros(N, L).to_sparse()})


@pytest.mark.parametrize("op, name", [(op, name) for op, sizes in OPS.items() for name in list(sizes)[1:]])
def test_bad_parameters(op, name):
    good, said = arguments(op)[name], called(op, name)
    refuses(TypeError, f"{said} must be a tensor; got float", op, **{name: 1.0})
    refuses(TypeError, f"{said} must be .*got torch.int32", op, **{name: good.int()})
    refuses(ValueError, rf"{said} must .*; got shape", op, **{name: good[None, None]})
    refuses(
        ValueError, rf"{said} must .*; got shape", op, **{name: torch.cat([good, good[..., :1]], -1)[..., 1:, None]}
    )
    if name in ("instance_logits", "scores", "weights"):
        refuses(ValueError, rf"{said} must be \[9, any\]; got shape \(8,", op, **{name: good[1:]})
        refuses(ValueError, rf"{said} must be \[9, any\]; got shape \(9, 0\)", op, **{name: good[:, :0]})
    else:
        wide = torch.cat([good, good], -1)
        refuses(ValueError, rf"{said} must be \[.*\]; got shape \(", op, **{name: wide})
    refuses(ValueError, f"{said} must be on the device of the instances, cpu; got meta", op, **{name: good.to("meta")})


@every_op
def test_missing_parameters(op):
    for name in [n for n in list(OPS[op])[1:] if not n.endswith("bias")]:
        refuses(TypeError, f"{called(op, name)} must be a tensor; got NoneType", op, **{name: None})


@pytest.mark.parametrize("op", [op for op in OPS if takes(op, "offsets")])
def test_bad_offsets(op):
    refuses(TypeError, "offsets must be a tensor; got list", op, offsets=[0, N])
    refuses(TypeError, "offsets must be int32 or int64; got torch.float32", op, offsets=OFFSETS.float())
    refuses(ValueError, r"offsets must be 1-D.*got shape \(1, 4\)", op, offsets=OFFSETS[None])
    refuses(ValueError, "offsets must start at 0; got 1", op, offsets=torch.tensor([1, 4, 4, N]))
    refuses(ValueError, "offsets must not decrease; got 3 after 4", op, offsets=torch.tensor([0, 4, 3, N]))
    refuses(ValueError, "offsets must end at the number of instances, 9; got 8", op, offsets=OFFSETS.clamp(max=8))
    refuses(ValueError, "offsets must be on the device of the instances", op, offsets=OFFSETS.to("meta"))


@every_op
def test_bad_mask(op):
    refuses(TypeError, "mask must be a tensor; got list", op, mask=[True] * N)
    refuses(ValueError, r"mask must be \[9\]; got shape \(8,\)", op, mask=torch.ones(N - 1))
    refuses(ValueError, r"mask must be \[9\]; got shape \(9, 1\)", op, mask=torch.ones(N, 1))
    refuses(ValueError, "mask must be on the device of the instances, cpu; got meta", op, mask=torch.ones(N).to("meta"))


@every_op
def test_bad_backend(op, no_interpreter):
    refuses(ValueError, "backend must be one of auto, .*; got 'fast'", op, backend="fast")
    refuses(milkernels.BackendUnavailable, "backend 'triton' cannot serve", op, backend="triton")


@pytest.mark.parametrize("op", [op for op in OPS if "attention" in op and op != "loss_attention_pool"])
def test_bad_attention_options(op):
    refuses(ValueError, "activation must be one of tanh, relu, gelu, identity; got 'silu'", op, activation="silu")
    bad_dropout("dropout_p", op)


@pytest.mark.parametrize("op", ["dsmil_pool", "dsmil"])
def test_bad_dsmil_options(op):
    bad_dropout("v_dropout_p", op)
    refuses(ValueError, "value_activation must be one of .*; got 'silu'", op, v_activation="silu")
    refuses(TypeError, "scale must be a number; got str", op, scale="1")
    without = {name: t for name, t in arguments(op).items() if name not in ("v_weight", "v_bias")}
    for extra in ({"v_activation": "relu"}, {"v_dropout_p": 0.1}):
        with pytest.raises(ValueError, match="need a value; got None"):
            call(op, **without, **extra)


def bad_dropout(p, op):
    for value in (-0.1, 1.5, float("nan")):
        refuses(ValueError, f"{called(op, p)} must be between 0 and 1; got {value}", op, **{p: value})
    refuses(TypeError, f"{called(op, p)} must be a number; got str", op, **{p: "0.5"})
    for seed, error, match in [
        (1.0, TypeError, "seed must be an int64 tensor, an int or None; got float"),
        (2**64, ValueError, f"seed must fit into 64 bits; got {2**64}"),
        (torch.zeros(1), TypeError, "seed must be int64; got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"seed must have one element; got shape \(2,\)"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "seed must be on the device"),
    ]:
        refuses(error, match, op, seed=seed, **{p: 0.5})


def test_other_bad_options():
    for op in ("query_pool", "query_scores"):
        refuses(TypeError, "scale must be a number; got NoneType", op, scale=None)
        refuses(ValueError, r"query must be \[3, any, 6\]; got shape \(2, 2, 6\)", op, query=torch.ones(2, K, L))
    refuses(ValueError, "k must be at least 1; got 0", "topk_instances", k=0)
    refuses(TypeError, "k must be an int; got float", "topk_instances", k=2.0)
    pooled = milkernels.softmax_pool(randn(N, L), randn(N, K), OFFSETS)
    with pytest.raises(TypeError, match="pooled must be what a pooling op returned; got Tensor"):
        milkernels.attention_weights(pooled.scores, OFFSETS)
    with pytest.raises(ValueError, match="offsets of the call must be given where pooled is of 3 bags; got None"):
        milkernels.attention_weights(pooled)


# Results


@pytest.mark.filterwarnings("ignore:milkernels")  # of native, for float64 parameters
@every_op
def test_result_types(op):
    """Of every type of instances with every one of parameters."""
    with all_of_them() as each:
        for types in itertools.product(DTYPES, repeat=2):
            with each(*types):
                check_result_types(op, *types)


def check_result_types(op, dtype, parameter_dtype):
    kwargs = arguments(op, dtype, parameter_dtype)
    tensors = [t.requires_grad_() for t in kwargs.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    outputs = call(op, **kwargs)
    wide = torch.float64 in {t.dtype for t in tensors}
    acc = torch.float64 if wide else torch.float32
    parameters = {t.dtype for n, t in kwargs.items() if n in OPS[op] and n not in ROWS}
    bag = dtype
    for other in parameters:
        bag = torch.promote_types(bag, other)
    expected = {"bag": bag, "indices": torch.int64, "critical": torch.int64}
    expected["values"] = acc if "weight" in OPS[op] else dtype  # those of a classifier, or some of the instances' own
    names = testing.CASES[op].outputs[: len(outputs)]
    assert [o.dtype for o in outputs] == [expected.get(name, acc) for name in names]
    sum(o.double().masked_fill(o.isinf(), 0).sum() for o in outputs if o.requires_grad).backward()
    for t in tensors:
        assert t.grad is None or (t.grad.dtype == t.dtype and t.grad.shape == t.shape)


@every_op
def test_result_shapes_and_empty_bags(op):
    """As the oracle has them; the bag in the middle is empty."""
    outputs, exact = call(op, **arguments(op)), getattr(oracle, op)(**arguments(op, torch.float64), mask=None)
    assert [o.shape for o in outputs] == [e.shape for e in exact]
    for o, e in zip(outputs, exact, strict=True):
        if len(o) == B:
            assert torch.equal(o[1], e[1].to(o.dtype)) and (o[1] == o[1].flatten()[0]).all()


@every_op
def test_one_bag_needs_no_offsets(op):
    kwargs = arguments(op)
    kwargs |= {name: kwargs[name][0] for name, size in testing.SIZES[op].items() if size[0] == "B"}
    whole = call(
        op, **(kwargs | ({"offsets": torch.tensor([0, N], dtype=torch.int32)} if takes(op, "offsets") else {}))
    )
    kwargs.pop("offsets", None)
    for got, expected in zip(call(op, **kwargs), whole, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["reference", None])
@every_op
def test_layouts(op, backend):
    """Rows with a longer stride, columns with any, expanded rows, int32 offsets, masks of any type."""
    kwargs = arguments(op) | {"backend": backend}
    name = next(iter(OPS[op]))
    x, mask = kwargs[name], torch.tensor([1, 0, 1, 1, 1, 1, 0, 1, 1])
    expected = call(op, **kwargs, mask=mask.bool())
    strided = torch.cat([x, x], 1)[:, : x.shape[1]]
    for changed in ({name: strided}, {name: x.t().contiguous().t()}, {"mask": mask.float()}, {"mask": mask}):
        if takes(op, "offsets"):
            changed["offsets"] = OFFSETS.int()
        for got, want in zip(call(op, **({"mask": mask.bool()} | kwargs | changed)), expected, strict=True):
            torch.testing.assert_close(got, want)
    row = x[:1].expand_as(x)
    for got, want in zip(call(op, **(kwargs | {name: row})), call(op, **(kwargs | {name: row.clone()})), strict=True):
        torch.testing.assert_close(got, want)


# Compositions


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("gated", [True, False])
def test_attention_pool_is_softmax_pool_of_attention_scores(gated, dropout_p, backend):
    name = "gated_attention" if gated else "attention"
    kwargs = arguments(f"{name}_pool", torch.float64)
    offsets = kwargs.pop("offsets")
    mask = torch.arange(N) % 4 != 1
    options = {"dropout_p": dropout_p, "seed": 5, "mask": mask, "backend": backend}
    leaves = [t.requires_grad_() for t in kwargs.values()]
    pooled = milkernels.Pooled(*call(f"{name}_pool", **kwargs, offsets=offsets, **options))
    (scores,) = call(f"{name}_scores", **kwargs, **options)
    composed = milkernels.softmax_pool(kwargs["x"], scores, offsets, mask=mask)

    def gradients(out):
        return torch.autograd.grad(out.bag.square().sum() + out.lse[[0, 2]].sum(), leaves)

    for got, expected in zip((*pooled, *gradients(pooled)), (*composed, *gradients(composed)), strict=True):
        torch.testing.assert_close(got, expected)


def test_query_pool_is_softmax_pool_of_query_scores():
    kwargs = arguments("query_pool")
    pooled = milkernels.query_pool(**kwargs, scale=0.5)
    composed = milkernels.softmax_pool(kwargs["x"], milkernels.query_scores(**kwargs, scale=0.5), OFFSETS)
    for got, expected in zip(pooled, composed, strict=True):
        torch.testing.assert_close(got, expected)


def test_pooling_is_the_weighted_sum_of_its_weights():
    for op in ("gated_attention_pool", "query_pool", "softmax_pool", "loss_attention_pool"):
        kwargs = arguments(op, torch.float64)
        pooled = milkernels.Pooled(*call(op, **kwargs)[:3])
        weights = milkernels.attention_weights(pooled, OFFSETS)
        torch.testing.assert_close(weights, milkernels.segment_softmax(pooled.scores, OFFSETS))
        torch.testing.assert_close(pooled.bag, milkernels.weighted_pool(kwargs["x"], weights, OFFSETS))


def test_the_order_of_bags_changes_nothing_else():
    kwargs = arguments("gated_attention_pool", torch.float64)
    x = kwargs.pop("x")
    both = milkernels.Pooled(*call("gated_attention_pool", **kwargs, x=x))
    kwargs["offsets"] = torch.tensor([0, 5, 9])
    swapped = milkernels.Pooled(*call("gated_attention_pool", **kwargs, x=torch.cat([x[4:], x[:4]])))
    torch.testing.assert_close(swapped.bag, both.bag[[2, 0]])


# Seeds


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_seeds(backend):
    kwargs = arguments("gated_attention_scores") | {"dropout_p": 0.5, "backend": backend}

    def scores(seed):
        return call("gated_attention_scores", **kwargs, seed=seed)[0]

    assert torch.equal(scores(7), scores(torch.tensor([7])))
    assert torch.equal(scores(7), scores(torch.tensor(7)))
    assert not torch.equal(scores(7), scores(7 + 2**32))
    torch.manual_seed(3)
    drawn = scores(None)
    assert not torch.equal(drawn, scores(None))
    torch.manual_seed(3)
    assert torch.equal(drawn, scores(None))


def test_no_dropout_draws_no_seed():
    state = torch.random.get_rng_state()
    call("gated_attention_pool", **arguments("gated_attention_pool"))
    assert torch.equal(state, torch.random.get_rng_state())


# Autocast and backends


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_autocast_narrows_products_only(backend):
    kwargs = arguments("gated_attention_pool") | {"backend": backend}
    plain = call("gated_attention_pool", **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call("gated_attention_pool", **kwargs)
        wide = call("gated_attention_pool", **(arguments("gated_attention_pool", torch.float64) | {"backend": backend}))
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    exact = call("gated_attention_pool", **arguments("gated_attention_pool", torch.float64))
    for a, b in zip(wide, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_use_backend(no_interpreter):
    kwargs = arguments("mean_pool")
    with (
        milkernels.use_backend("triton"),
        pytest.raises(milkernels.BackendUnavailable, match="'triton' cannot serve mean_pool"),
    ):
        milkernels.mean_pool(**kwargs)
    with milkernels.use_backend("triton"):
        milkernels.mean_pool(**kwargs, backend="reference")
    with pytest.raises(ValueError, match="got 'fast'"), milkernels.use_backend("fast"):
        pass


def test_every_op_takes_the_same_options():
    for op in OPS:
        parameters = inspect.signature(getattr(milkernels, op)).parameters
        for name in ("mask", "backend"):
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY and parameters[name].default is None
        if takes(op, "offsets"):
            assert parameters["offsets"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert getattr(milkernels, op).__doc__


def test_public_names():
    assert set(OPS) | {"attention_weights", "merge_pooled", "Bags", "collate_bags"} <= set(milkernels.__all__)
    assert all(hasattr(milkernels, name) for name in milkernels.__all__)
    assert isinstance(milkernels.__version__, str)
