"""What `accelerate` recognises and what it leaves alone, that it changes nothing else, and that `restore` undoes it."""

import copy
import re

import pytest
import torch
import upstream_models as up
import upstream_padded as pad
from accelerate_cases import CASES, D, E, L, accelerated, counted, results, step
from op_cases import needs_extension, threads
from test_contract import peak_allocated
from torch import nn
from upstream_lookalikes import LOOK_ALIKES, SERVED_BY_THE_GRAPH

import milkernels

pytestmark = needs_extension
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def same(a, b, inputs, call, tolerance=1e-9):
    a, b = (results(*step(m, call, inputs)) for m in (a, b))
    assert a.keys() == b.keys()
    for name, t in a.items():
        torch.testing.assert_close(t, b[name], rtol=tolerance, atol=tolerance, check_dtype=False)


def state(model):
    """All that could be seen of a model, but its class."""
    per_module = [
        (
            name,
            m.training,
            sorted(key for key in vars(m) if key not in ("forward", "forward_features")),
            [len(vars(m)[key]) for key in vars(m) if key.endswith("_hooks")],
        )
        for name, m in model.named_modules()
    ]
    tensors = {name: (id(p), p._version, p.grad) for name, p in model.named_parameters()}
    buffers = {name: (id(b), b._version) for name, b in model.named_buffers()}
    return per_module, tensors, buffers, list(model.state_dict()), repr(model)


@every_case
def test_what_is_recognised(case, monkeypatch):
    model = case.model()
    report = milkernels.accelerate(model, min_instances=0)
    assert {entry.name: entry.structure for entry in report.changed} == case.changed
    assert not report.waiting
    for name in case.changed:
        assert f"changed: {name or '(the model)'}: " in str(report)
    calls = counted(monkeypatch)
    next(iter(case.calls.values()))(model, case.draw(0))
    assert calls  # or it would be recognised for nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@every_case
def test_nothing_else_changes(case, dtype):
    model = case.model(dtype)
    modules = list(model.modules())
    for i, m in enumerate(modules):
        m.training = i % 3 == 0
    before, values = state(model), {name: t.clone() for name, t in model.state_dict().items()}
    classes, random = [type(m) for m in modules], torch.get_rng_state()
    milkernels.accelerate(model, min_instances=0)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    for m, was, cls in zip(model.modules(), modules, classes, strict=True):
        assert m is was and isinstance(m, cls)
        assert (type(m).__name__, type(m).__module__, type(m).__qualname__, type(m).__doc__) == (
            cls.__name__,
            cls.__module__,
            cls.__qualname__,
            cls.__doc__,
        )
    milkernels.restore(model)
    assert [type(m) for m in modules] == classes and state(model) == before


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_alone(name):
    make, reason, inputs, call = LOOK_ALIKES[name]
    torch.manual_seed(0)
    model = make().eval()
    before, cls, random = state(model), type(model), torch.get_rng_state()
    report = milkernels.accelerate(model, min_instances=0)
    assert state(model) == before and torch.equal(torch.get_rng_state(), random)
    if name in SERVED_BY_THE_GRAPH:
        (entry,) = (entry for entry in report.changed if entry.name == "")
        assert entry.structure == "attention pooling, found by its graph"
    else:
        assert type(model) is cls
        (entry,) = (entry for entry in report.left if entry.name == "")
        assert re.search(reason, entry.remark), entry.remark
        assert "left alone: (the model): " + cls.__name__ in str(report)
    x = {key: torch.randn(size).relu().requires_grad_() for key, size in inputs.items()}
    torch.manual_seed(0)
    original = make().eval()
    torch.manual_seed(0)
    expected = results(*step(original, call, x))
    torch.manual_seed(0)
    got = results(*step(model, call, x))  # parts of it may be fused
    for key, t in expected.items():
        torch.testing.assert_close(got[key], t, rtol=1e-4, atol=1e-4)


@every_case
def test_twice_is_once(case):
    model = case.model()
    first = milkernels.accelerate(model, min_instances=0)
    classes = [type(m) for m in model.modules()]
    second = milkernels.accelerate(model, min_instances=0)
    assert second == first
    assert [type(m) for m in model.modules()] == classes
    assert sorted(milkernels.restore(model)) == sorted(case.changed)
    assert milkernels.restore(model) == []


@every_case
def test_restored_is_as_it_was(case, monkeypatch):
    model, inputs, calls = case.model(), case.draw(0), counted(monkeypatch)
    classes = [type(m) for m in model.modules()]
    before = [results(*step(model, call, inputs)) for call in case.calls.values()]
    milkernels.accelerate(model, min_instances=0)
    calls.clear()
    milkernels.restore(model)
    after = [results(*step(model, call, inputs)) for call in case.calls.values()]
    assert not calls and [type(m) for m in model.modules()] == classes
    for a, b in zip(before, after, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_restored_may_be_accelerated_again(monkeypatch):
    case, calls = CASES["clam-sb"], counted(monkeypatch)
    model = case.model()
    milkernels.accelerate(model, min_instances=0)
    milkernels.restore(model)
    assert len(milkernels.accelerate(model, min_instances=0).changed) == 2
    calls.clear()
    same(model, case.model(), case.draw(0), case.calls["plain"])
    assert calls == ["gated_attention_pool"]


class Ensemble(nn.Module):
    """Several, one of them twice, one that nothing recognises and one that only looks right."""

    def __init__(self):
        super().__init__()
        self.first = up.ClamSB(k_sample=4, sizes=(L, E, D))
        self.second = pad.MultiHead(L, D, 2)
        self.members = nn.ModuleDict({"again": self.first, "net": self.first.attention_net[-1]})
        self.odd = nn.GRU(L, 4)
        self.other = LOOK_ALIKES["scaled scores"].make()

    def forward(self, x):
        scores = self.members["net"](self.first.attention_net[:-1](x))[0]
        return (
            self.first(x)[0],
            self.members["again"](x)[3],
            self.second(x[None]),
            self.other(x),
            self.odd(x)[0],
            scores,
        )


def test_a_whole_model(monkeypatch):
    torch.manual_seed(0)
    model, x = Ensemble().double().eval(), torch.randn(30, L, dtype=torch.float64).requires_grad_()
    original, calls = copy.deepcopy(model), counted(monkeypatch)
    report = milkernels.accelerate(model, min_instances=0)
    assert {entry.name for entry in report.changed} == {"first", "first.attention_net.3", "second"}
    assert [entry.name for entry in report.left] == ["other"]
    assert model.members["net"] is model.first.attention_net[-1]
    calls.clear()
    same(model, original, {"x": x}, lambda m, t: m(t["x"]))
    assert (
        sorted(calls) == ["gated_attention_pool"] * 2 + ["gated_attention_scores", "attention_pool"] or len(calls) == 4
    )
    milkernels.restore(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in original.modules()}


def test_what_is_no_module():
    for wrong in (None, up.ClamSB, torch.zeros(3), [nn.Linear(2, 2)]):
        for call in (milkernels.accelerate, milkernels.restore):
            with pytest.raises(TypeError, match=f"torch.nn.Module; got {type(wrong).__name__}"):
                call(wrong)


def test_nothing_to_recognise():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    report = milkernels.accelerate(model, min_instances=0)
    assert not (report.changed or report.left or report.waiting) and str(report) == "nothing was recognised"
    assert milkernels.restore(model) == [] and type(model) is nn.Sequential


def test_what_can_not_be_looked_into():
    """Compiled by TorchScript, and without values."""
    case = CASES["hi-ml"]
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    model = nn.ModuleDict({"scripted": scripted, "other": case.model()})
    report = milkernels.accelerate(model, min_instances=0)
    assert {entry.name for entry in report.changed} == {"other", "other.attention"} and not report.left
    (entry,) = milkernels.accelerate(up.GatedPooling(L, D).to("meta"), min_instances=0).left
    assert "no floating parameters with values" in entry.remark


@pytest.mark.parametrize("name", ["hi-ml", "clam-sb", "dsmil"])
def test_another_default_device(name):
    """Models are built under that of no values; the example bags are made on the device of the model."""
    expected = str(milkernels.accelerate(CASES[name].model(), min_instances=0))
    assert "changed" in expected
    model = CASES[name].model()
    with torch.device("meta"):
        assert str(milkernels.accelerate(model, min_instances=0)) == expected


# Memory

ROWS, WIDTH, HIDDEN = 20_000, 96, 96


def no_embedding(model, name):
    """So that nothing but pooling is measured."""
    *_, network = getattr(model, name) if name == "attention_net" else (None,)
    setattr(model, name, nn.Identity() if network is None else nn.Sequential(nn.Identity(), nn.Identity(), network))
    return model


def milnet():
    return up.MILNet(up.FCLayer(WIDTH, 2), up.BClassifier(WIDTH, 2, passing_v=True, dropout_v=0.2, units=HIDDEN))


SIZES = (WIDTH, WIDTH, HIDDEN)
LARGE = {
    "clam-sb": lambda: no_embedding(up.ClamSB(sizes=SIZES, dropout=0.25), "attention_net"),
    "clam-mb": lambda: no_embedding(up.ClamMB(sizes=SIZES, gate=False, n_classes=3), "attention_net"),
    "clam-net": lambda: up.AttnNetGated(WIDTH, HIDDEN, True),
    "dsmil": milnet,
    "hi-ml": lambda: up.GatedPooling(WIDTH, HIDDEN),
    "pyg": lambda: up.AttentionalAggregation(up.dense(WIDTH, HIDDEN, activation=nn.Tanh).append(nn.Linear(HIDDEN, 1))),
    "torchmil": lambda: pad.AttentionPool(WIDTH, HIDDEN, gated=True),
    "torchmil-dsmil": lambda: pad.DSMIL(WIDTH, HIDDEN, True),
    "millab": lambda: no_embedding(pad.MILLabABMIL(WIDTH, WIDTH, 0.2, HIDDEN), "patch_embed"),
    "trident": lambda: pad.MultiHead(WIDTH, HIDDEN // 2, 2, 0.1, gated=True),
    "clam-sb, embedding": lambda: up.ClamSB(sizes=SIZES, dropout=0.25, old=True),
    "torchmil, embedding": lambda: pad.ABMIL(HIDDEN, HIDDEN, feat_ext=up.dense(*SIZES[1:], activation=nn.ReLU)),
    "torchmil-dsmil, embedding": lambda: pad.DSMIL(WIDTH, HIDDEN, feat_ext=nn.Linear(WIDTH, WIDTH)),
    "millab, embedding": lambda: pad.MILLabABMIL(WIDTH, WIDTH, 0.2, HIDDEN),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_temporary_has_all_instances(name):
    """Forward and backward of the parameters, units dropped: not one tensor of the size of the hidden units, of which
    the original has several at once."""
    model = LARGE[name]().train()
    padded = isinstance(model, pad.AttentionPool | pad.ABMIL | pad.DSMIL | pad.MILLabABMIL | pad.MultiHead)
    x = torch.randn(2, ROWS // 2, WIDTH) if padded else torch.randn(ROWS, WIDTH)

    def training_step(m):
        out = m(x)
        out = out if isinstance(out, tuple) else (out,)
        first = next(iter(out[0].values())) if isinstance(out[0], dict) else out[0]
        return torch.autograd.grad(first.sum(), list(m.parameters()), allow_unused=True)

    smallest = 4 * ROWS * HIDDEN
    fused = accelerated(model)
    with milkernels.saved_bytes(0):
        assert peak_allocated(lambda: training_step(fused)) < smallest
    assert peak_allocated(lambda: training_step(model)) > 2 * smallest
