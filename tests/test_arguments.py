"""How every op takes instances and linear layers: a tensor or `Bags`; an ``nn.Linear``, a pair or a weight."""

import inspect

import pytest
import torch
from functional_cases import OFFSETS, OPS, C, L, N, arguments, randn, takes
from torch import nn
from torch.nn.utils import parametrizations

import milkernels
from milkernels import Bags, Embed, ops
from milkernels.testing import public_arguments

pytestmark = pytest.mark.filterwarnings("ignore:milkernels")  # of what runs on the reference
MASK = torch.arange(N) % 4 != 1
BACKENDS = ("reference", None)
MOST_PARAMETERS = {"dsmil": 14, "dsmil_pool": 14}  # of others 11


def results_of(op, **given):
    out = getattr(milkernels, op)(**given)
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def good(op):
    return public_arguments(op, arguments(op))


@pytest.mark.parametrize("op", ops.__all__)
def test_the_number_of_parameters(op):
    assert len(inspect.signature(getattr(milkernels, op)).parameters) <= MOST_PARAMETERS.get(op, 11)


# Instances

CLASSICAL = {
    name: {parameter: randn(N, C).sigmoid()}
    for name, parameter in (
        ("generalized_mean_pool", "x"),
        ("isr_pool", "p"),
        ("log_sum_exp_pool", "x"),
        ("noisy_or_pool", "p"),
    )
}
TAKES_BAGS = CLASSICAL | {op: None for op, tensors in OPS.items() if "x" in tensors}


def of_instances(op):
    """The name of the instances, the instances, and the other arguments of a good call without offsets."""
    given = dict(CLASSICAL.get(op) or good(op))
    given.pop("offsets", None)
    name = next(iter(given))
    return name, given.pop(name), given


def test_which_ops_take_bags():
    """All that take instances but `embed_instances`, whose rows are those of a tensor."""
    taken = {op for op in ops.__all__ if "Bags" in str(inspect.signature(getattr(milkernels, op)))}
    assert taken == set(TAKES_BAGS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("op", TAKES_BAGS)
def test_bags_are_the_tensor_and_what_stands_beside_it(op, mask, backend):
    name, x, given = of_instances(op)
    bags = {"offsets": OFFSETS} if takes(op, "offsets") else {}
    expected = results_of(op, **{name: x}, **given, **bags, mask=mask, backend=backend)
    same_bits(results_of(op, **{name: Bags(x, OFFSETS, mask)}, **given, backend=backend), expected)


@pytest.mark.parametrize("op", TAKES_BAGS)
def test_nothing_stands_beside_bags(op):
    name, x, given = of_instances(op)
    for mask in (None, MASK):
        bags = {name: Bags(x, OFFSETS, mask)}
        with pytest.raises(ValueError, match="mask must be None beside Bags"):
            results_of(op, **bags, **given, mask=MASK)
        if takes(op, "offsets"):
            for beside in ({"offsets": OFFSETS}, {"offsets": OFFSETS, "mask": MASK}):
                with pytest.raises(ValueError, match="offsets must be None beside Bags"):
                    results_of(op, **bags, **given, **beside)


# Linear layers


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def layer_of(weight, bias, kind=nn.Linear):
    layer = kind(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return layer


def layers_of(given):
    """The pairs among the arguments, by name; that of the embedding as ``embed``."""
    return {name: value for name, value in given.items() if isinstance(value, tuple)}


LAYERS = [(op, name) for op in OPS for name in layers_of(good(op))]
LAYERS += [(op, "embed") for op in OPS if takes(op, "embed")]
every_layer = pytest.mark.parametrize("op, name", LAYERS)


def with_layer(op, name):
    """``(call, weight, bias)``: what a call with another layer in that place returns."""
    given, embedded = good(op), (randn(L, L, seed=50), randn(L, seed=51))
    weight, bias = embedded if name == "embed" else given[name]

    def call(layer, backend=None):
        return results_of(op, **(given | {name: Embed(layer) if name == "embed" else layer}), backend=backend)

    return call, weight, bias


@pytest.mark.parametrize("backend", BACKENDS)
@every_layer
def test_layers_pairs_and_weights_give_the_same_bits(op, name, backend):
    call, weight, bias = with_layer(op, name)
    expected = call((weight, bias), backend)
    same_bits(call([weight, bias], backend), expected)
    same_bits(call(layer_of(weight, bias), backend), expected)
    without = call((weight, None), backend)
    same_bits(call(weight, backend), without)
    same_bits(call(layer_of(weight, None), backend), without)


@every_layer
def test_a_layer_learns(op, name):
    call, weight, bias = with_layer(op, name)
    layer = layer_of(weight, bias)
    sum(t.square().sum() for t in call(layer) if t.requires_grad and t.isfinite().all()).backward()
    assert layer.weight.grad.any()


@every_layer
def test_a_parametrised_layer_is_taken_as_it_is(op, name):
    call, weight, bias = with_layer(op, name)
    layer = parametrizations.weight_norm(layer_of(weight, bias))
    for got, expected in zip(call(layer), call((weight, bias)), strict=True):
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(0)
    same_bits(call(layer), call((weight * 0, bias)))


class Halved(nn.Linear):
    """A layer whose weight is half of the parameter of that name."""

    weight = property(lambda self: self._parameters["weight"] / 2)


@every_layer
def test_a_layer_is_read_as_python_reads_it(op, name):
    """Also where its parameters lie in a place of their own."""
    call, weight, bias = with_layer(op, name)
    layer = layer_of(weight * 2, bias)
    layer.__class__ = Halved
    same_bits(call(layer), call((weight, bias)))
    layer = layer_of(weight * 2, bias)
    layer.__dict__["weight"] = weight  # before the parameter
    same_bits(call(layer), call((weight, bias)))
    del layer.bias
    layer.bias = bias  # instead of it
    same_bits(call(layer), call((weight, bias)))


def hooked(layer, register):
    getattr(layer, register)(lambda *args: None)
    return layer


@every_layer
def test_layers_that_an_op_would_not_call_are_refused(op, name):
    call, weight, bias = with_layer(op, name)
    said = "embed.linear" if name == "embed" else name
    replaced = layer_of(weight, bias)
    replaced.forward = lambda x: x
    for bad, error, match in (
        (layer_of(weight, bias, Doubled), TypeError, f"{said} must be a plain nn.Linear; got Doubled with a forward"),
        (replaced, TypeError, f"{said} must be a plain nn.Linear; got Linear with a forward of its own"),
        (nn.Bilinear(2, 2, 2), TypeError, f"{said} must be an nn.Linear, a weight or a pair.*; got Bilinear"),
        (nn.Sequential(layer_of(weight, bias)), TypeError, f"{said} must be an nn.Linear.*; got Sequential"),
        ((weight, bias, bias), TypeError, f"{said} must be an nn.Linear.*; got 3 values"),
        ((weight,), TypeError, f"{said} must be an nn.Linear.*; got 1 values"),
        ("relu", TypeError, f"{said} must be an nn.Linear.*; got str"),
        ((None, bias), TypeError, f"{said}.weight must be a tensor; got NoneType"),
    ):
        with pytest.raises(error, match=match):
            call(bad)
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        with pytest.raises(ValueError, match=f"{said} must have no hooks, which an op does not call; got "):
            call(hooked(layer_of(weight, bias), f"register_{kind}"))


@pytest.mark.parametrize("op, name", [(op, name) for op, name in LAYERS if name not in ("embed", "q2", "value")])
def test_a_layer_may_not_be_missing(op, name):
    """That of the gate, above all: without it the op would be another one."""
    with pytest.raises(TypeError, match=f"{name} must be an nn.Linear, a weight or a pair.*; got NoneType"):
        results_of(op, **(good(op) | {name: None}))


# The critical instances of DSMIL, given


@pytest.mark.parametrize("backend", BACKENDS)
def test_critical_instances_are_those_that_logits_choose(backend):
    given = good("dsmil_pool") | {"backend": backend}
    chosen = milkernels.dsmil_pool(**given)
    rows = given["x"][chosen.critical]
    again = milkernels.dsmil_pool(**(given | {"critical": rows}))
    assert (again.critical == -1).all() and again.critical.shape == chosen.critical.shape
    for got, expected in zip(again[:3], chosen[:3], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda rows: rows[:-1], ValueError, r"critical must be \[.*\]; got shape"),
        (lambda rows: rows[:, :, 1:], ValueError, r"critical must be \[.*\]; got shape"),
        (lambda rows: rows[:, :0], ValueError, r"critical must be \[.*\]; got shape"),
        (lambda rows: rows[None], ValueError, "critical must have 2 dimensions; got shape"),
        (lambda rows: rows.long(), TypeError, "critical must be float16, .*; got torch.int64"),
        (lambda rows: rows.tolist(), TypeError, "critical must be a tensor; got list"),
    ],
)
def test_critical_instances_are_checked(edit, error, words):
    given = good("dsmil_pool")
    bags = len(given["offsets"]) - 1
    with pytest.raises(error, match=words):
        milkernels.dsmil_pool(**(given | {"critical": edit(torch.zeros(bags, C, L))}))
