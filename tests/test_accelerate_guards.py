"""After a model was accelerated: hooks and changed layers are obeyed, it can be copied, saved and compiled, and what
was built lazily is settled at its first call."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import upstream_models as up
import upstream_padded as pad
from accelerate_cases import CASES, D, E, L, accelerated, counted, flat, results, step
from op_cases import needs_extension, threads
from torch import nn
from torch.nn.utils import parametrizations, prune

import milkernels

pytestmark = needs_extension
ONE_OF_EACH = (
    "clam-net clam-sb clam-mb attention attention-gated loss-attention dsmil dsmil-linear dtfd hi-ml-gated pyg pyg-mlp "
    "torchmil-pool-gelu-gated torchmil-clam torchmil-camil-gated torchmil-dsmil-nonlinear millab-abmil millab-dsmil "
    "millab-clam trident slideflow clam-deep millab-clam-subtyping trident-encoder torchmil-abmil-embedding "
    "torchmil-clam-embedding torchmil-dsmil-embedding"
)
EACH = {name: CASES[name] for name in ONE_OF_EACH.split()}
every_structure = pytest.mark.parametrize("case", EACH.values(), ids=EACH)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def first_call(case):
    return next(iter(case.calls.values()))


def close(got, expected, tolerance=1e-9):
    assert got.keys() == expected.keys()
    for name, t in got.items():
        assert t.dtype == expected[name].dtype
        size = tolerance if t.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(t, expected[name], rtol=size, atol=size)


# Hooks


def _seen(kind: str, module: nn.Module, name: str, calls: list):
    def hook(*args):
        calls.append(name)

    return getattr(module, f"register_{kind}")(hook)


KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", KINDS)
@every_structure
def test_hooks_on_every_layer_are_called(case, kind, monkeypatch):
    """As often as in the original, which runs then; without them the fused one runs again."""
    model, inputs, call = case.model(), case.draw(0), first_call(case)
    ours, expected = accelerated(model), []
    for name, module in model.named_modules():
        _seen(kind, module, name, expected)
    step(model, call, inputs)
    assert case.layer in expected
    ops = counted(monkeypatch)
    step(ours, call, inputs)
    fused = list(ops)
    for name, module in ours.named_modules():
        seen = []
        handle = _seen(kind, module, name, seen)
        step(ours, call, inputs)
        assert len(seen) == expected.count(name), name
        handle.remove()
    ops.clear()
    step(ours, call, inputs)
    assert ops == fused != []


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.layer not in ("", "att_layer")])
def test_a_hook_that_changes_what_is_returned(case):
    """On one layer that is passed over."""
    found, inputs = [], case.draw(0)
    for model in (case.model(), accelerated(case.model())):
        whole = results(*step(model, first_call(case), inputs))
        model.get_submodule(case.layer).register_forward_hook(lambda m, args, out: out.sin() + 1)

        found.append(results(*step(model, first_call(case), inputs)))
        assert any(not torch.allclose(t, whole[name]) for name, t in found[-1].items())
    close(*found, 1e-7)  # a square root in float32 scales the scores of DSMIL


@pytest.mark.parametrize("kind", KINDS[:3])
def test_hooks_for_all_modules(kind, monkeypatch):
    case, seen, ops = CASES["clam-sb"], [], counted(monkeypatch)
    ours, inputs = accelerated(case.model()), case.draw(0)
    ops.clear()
    register = getattr(torch.nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *args: seen.append(type(module)))
    try:
        step(ours, case.calls["plain"], inputs)
    finally:
        handle.remove()
    assert nn.Tanh in seen and nn.Sigmoid in seen and not ops
    step(ours, case.calls["plain"], inputs)
    assert ops == ["gated_attention_pool"]


# Changed layers


class Adapted(nn.Linear):
    """As adapters of low rank are."""

    def forward(self, input):
        return super().forward(input) + input.mean(-1, keepdim=True)


def adapt(parent, name, layer):
    adapted = Adapted(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
    adapted.load_state_dict(layer.state_dict())
    setattr(parent, name, adapted)


def old_weight_norm(parent, name, layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer)
    layer.weight_g.data *= 1.5


def new_weight_norm(parent, name, layer):
    parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data *= 1.5


def spectral_norm(parent, name, layer):
    torch.manual_seed(0)
    parametrizations.spectral_norm(layer)


def replace_forward(parent, name, layer):
    layer.forward = lambda x: type(layer).forward(layer, x).square()


CHANGES = {
    "adapter": adapt,
    "weight_norm": old_weight_norm,
    "weight_norm, parametrized": new_weight_norm,
    "spectral_norm": spectral_norm,
    "pruned": lambda parent, name, layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "pruned bias": lambda parent, name, layer: layer.bias is None or prune.random_unstructured(layer, "bias", 0.9),
    "forward": replace_forward,
    "new weight": lambda parent, name, layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() / 2)),
}


@every_structure
def test_changed_weights_are_obeyed(case):
    """In every linear layer, one by one."""
    original, fused, inputs, call = case.model(), accelerated(case.model()), case.draw(0), first_call(case)
    layers = [path for path, module in original.named_modules() if type(module) is nn.Linear]
    for path, (name, change) in itertools.product(layers, CHANGES.items()):
        if path == "att_layer.linear":
            continue  # nothing uses it
        found, (parent, _, attribute) = [], path.rpartition(".")
        for model in (copy.deepcopy(original), copy.deepcopy(fused)):
            torch.manual_seed(1)
            change(model.get_submodule(parent), attribute, model.get_submodule(path))
            found.append(flat(call(model, inputs)))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, msg=lambda m, at=(path, name): f"{at}: {m}")


OTHER_ACTIVATION = {nn.Tanh: nn.Hardtanh, nn.Sigmoid: nn.Hardsigmoid, nn.ReLU: nn.Softsign, nn.GELU: nn.SiLU}


@every_case
def test_other_activations_are_obeyed(case):
    original, fused, inputs, call = case.model(), accelerated(case.model()), case.draw(0), first_call(case)
    for path, module in list(original.named_modules()):
        if type(module) in OTHER_ACTIVATION:
            found = []
            for model in (copy.deepcopy(original), copy.deepcopy(fused)):
                model.set_submodule(path, OTHER_ACTIVATION[type(module)]())
                found.append(results(*step(model, call, inputs)))
            close(*found, 1e-7)


def test_fused_again_without_pruning_and_norms(monkeypatch):
    case, ops = CASES["clam-sb"], counted(monkeypatch)
    ours, inputs = accelerated(case.model()), case.draw(0)
    layer = ours.get_submodule(case.layer)

    def run():
        ops.clear()
        step(ours, case.calls["plain"], inputs)
        return list(ops)

    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert run() == []
    prune.remove(layer, "weight")
    assert run() == ["gated_attention_pool"]
    parametrizations.weight_norm(layer)
    assert run() == []
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert run() == ["gated_attention_pool"]


def test_a_forward_of_the_module_itself(monkeypatch):
    """What is put on the instance goes before the fused one, and the outer model calls it."""
    case, ops = CASES["clam-sb"], counted(monkeypatch)
    ours = accelerated(case.model())
    network = ours.attention_net[3]
    network.forward = lambda x: (x[:, :1] * 0, x)
    ops.clear()
    scores = ours(case.draw(0)["x"])[3]
    assert not scores.any() and not ops


def test_another_class_of_the_network(monkeypatch):
    """The network inside is exchanged for one that nobody proved."""
    case, ops = CASES["clam-sb"], counted(monkeypatch)
    models = case.model(), accelerated(case.model())
    ops.clear()
    found = []
    for model in models:
        torch.manual_seed(0)
        model.attention_net[3] = up.AttnNetGated(E, D).double()
        found.append(results(*step(model, case.calls["plain"], case.draw(0))))
    close(*found)
    assert not ops


# Copies


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": through_pickle, "file": through_file}


@pytest.mark.parametrize("how", COPIES)
@every_structure
def test_copies_are_fused(case, how, monkeypatch):
    model, inputs, ops = case.model(), case.draw(0), counted(monkeypatch)
    ours = accelerated(model)
    again = COPIES[how](ours)
    assert [type(m) for m in again.modules()] == [type(m) for m in ours.modules()]
    for name, call in case.calls.items():
        ops.clear()
        expected = results(*step(ours, call, inputs))
        fused = list(ops)
        ops.clear()
        got = results(*step(again, call, inputs))
        assert ops == fused, name
        assert got.keys() == expected.keys() and all(torch.equal(t, expected[key]) for key, t in got.items())
    assert sorted(milkernels.restore(again)) == sorted(case.changed)
    if how != "copy":  # which shares its modules
        assert [type(m) for m in ours.modules()] != [type(m) for m in again.modules()]


def test_state_dicts_are_exchanged():
    case = CASES["millab-dsmil"]
    ours, other = accelerated(case.model()), case.make().double()
    other.load_state_dict(ours.state_dict())
    ours.load_state_dict(other.state_dict())
    close(*(results(*step(m.eval(), case.calls["plain"], case.draw(0))) for m in (ours, other)))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("how", [None, *COPIES])
def test_methods_that_a_wrapper_captured(inner, how, monkeypatch):
    """Of the whole wrapper, or of the model within and then of the wrapper."""
    case, ops = CASES["millab-wrapper"], counted(monkeypatch)
    wrapper, inputs = case.model(), case.draw(0)
    if inner:
        milkernels.accelerate(wrapper.model, min_instances=0)
    report = milkernels.accelerate(wrapper, min_instances=0)
    assert {entry.name for entry in report.changed} == {"model", "model.global_attn"}
    ours = wrapper if how is None else COPIES[how](wrapper)
    for name in ("plain", "features", "slide", "holes"):
        ops.clear()
        got = results(*step(ours, case.calls[name], inputs))
        assert ops == ["gated_attention_pool"], name
        expected = results(*step(case.model(), case.calls[name], inputs))
        assert got.keys() == expected.keys()
        close(got, {key: t.masked_fill(t < -1e8, -torch.inf) for key, t in expected.items()})
    milkernels.restore(ours)
    ops.clear()
    step(ours, case.calls["features"], inputs)
    assert not ops
    for method in (ours.forward, ours.forward_features):
        assert method.__self__ is ours.model or how == "copy"
        assert method.__func__ is getattr(pad.MILLabABMIL, method.__name__)


def test_the_model_inside_a_wrapper_alone(monkeypatch):
    """The wrapper's forward is the model's, which finds the fused method of its instance."""
    case, ops = CASES["millab-wrapper"], counted(monkeypatch)
    wrapper = case.model()
    milkernels.accelerate(wrapper.model, min_instances=0)
    ops.clear()
    wrapper(case.draw(0)["x"])
    assert ops == ["gated_attention_pool"]


# Lazily built

LAZY = {
    "pool": (lambda: pad.AttentionPool(None, D, gated=True), {"": "attention pooling (torchmil)"}),
    "abmil": (
        lambda: pad.ABMIL(None, D),
        {"": "attention MIL (torchmil)", "pool": "attention pooling (torchmil)"},
    ),
}


@pytest.mark.parametrize("how", [None, "deepcopy", "pickle", "file"])
@pytest.mark.parametrize("name", LAZY)
def test_waiting_for_the_first_call(name, how, monkeypatch):
    make, expected = LAZY[name]
    model, ops, x = make(), counted(monkeypatch), torch.randn(3, 12, L)
    report = milkernels.accelerate(model, min_instances=0)
    assert {entry.name: entry.structure for entry in report.waiting} == expected
    assert not report.changed and not report.left and "waiting for a first call: " in str(report)
    assert milkernels.accelerate(model, min_instances=0) == report
    if how is not None:
        model = COPIES[how](model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = model(x)
    again = milkernels.accelerate(model, min_instances=0)
    assert {entry.name: entry.structure for entry in again.changed} == expected and not again.waiting
    ops.clear()
    torch.testing.assert_close(model(x), whole)
    assert ops == ["gated_attention_pool" if name == "pool" else "attention_pool"]
    assert milkernels.restore(model) == list(expected)


def test_lazy_clam():
    """Its pooling is settled by any call, its loss by the first loss."""
    torch.manual_seed(0)
    model, x, labels = pad.ClamTorchmil(None, D, k_sample=3), torch.randn(3, 12, L), torch.tensor([0, 1, 1])
    assert len(milkernels.accelerate(model, min_instances=0).waiting) == 2
    model(x)
    copied = milkernels.accelerate(copy.deepcopy(model), min_instances=0)
    assert len(copied.changed) == len(copied.waiting) == 1
    first = model.compute_loss(labels, x)[1]["InstLoss"]
    torch.testing.assert_close(model.compute_loss(labels, x)[1]["InstLoss"], first)
    report = milkernels.accelerate(model, min_instances=0)
    assert {entry.name for entry in report.changed} == {"", "pool"} and not report.waiting


class OtherLazyPool(pad.AttentionPool):
    def forward(self, X, mask=None, return_att=False):
        out = super().forward(X, mask, return_att)
        return (out[0] * 2, out[1]) if return_att else out * 2


def test_a_lazy_look_alike_is_left_alone():
    model, x = OtherLazyPool(None, D), torch.randn(3, 12, L)
    assert milkernels.accelerate(model, min_instances=0).waiting
    with pytest.warns(UserWarning, match="OtherLazyPool was left alone: its forward returns other values"):
        first = model(x)
    assert type(model) is OtherLazyPool
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), first)


def test_restored_while_waiting():
    model = pad.AttentionPool(None, D)
    milkernels.accelerate(model, min_instances=0)
    assert milkernels.restore(model) == [""]
    assert type(model) is pad.AttentionPool
    model(torch.randn(1, 2, L))
    assert type(model) is pad.AttentionPool


# torch.compile

COMPILED = (
    "clam-net-gated clam-sb attention attention-gated loss-attention dsmil torchmil-pool torchmil-dsmil-nonlinear "
    "torchmil-abmil millab-abmil trident clam-deep torchmil-abmil-embedding torchmil-clam-embedding millab-dsmil "
    "trident-encoder"
)


def check_compiled(name, backend, tolerance):
    torch._dynamo.reset()
    case = CASES[name]
    ours, inputs, call = accelerated(case.model()), case.draw(0), case.calls["plain"]
    expected = results(*step(ours, call, inputs))
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    close(results(*step(ours, compiled, inputs)), expected, tolerance)


@pytest.mark.parametrize("name", COMPILED.split())
def test_compiled_in_one_piece(name):
    check_compiled(name, "eager", 1e-10)


@pytest.mark.parametrize("name", ["hi-ml-gated", "dsmil-linear"])
def test_compiled_with_its_backward(name):
    check_compiled(name, "aot_eager", 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hi-ml-gated"])
def test_compiled_by_inductor(name):
    check_compiled(name, "inductor", 1e-9)


def test_compiled_before_and_after(monkeypatch):
    """A compiled model is compiled again when it was accelerated, and when it was restored."""
    torch._dynamo.reset()
    case = CASES["hi-ml-gated"]
    model, x = case.model(), case.draw(0)["x"]
    compiled, graphs = torch.compile(model, backend=lambda graph, _: graphs.append(str(graph.code)) or graph), []
    expected = compiled(x)
    milkernels.accelerate(model, min_instances=0)
    torch.testing.assert_close(compiled(x), expected)
    milkernels.restore(model)
    torch.testing.assert_close(compiled(x), expected)
    assert ["milkernels" in code for code in graphs] == [False, True]
