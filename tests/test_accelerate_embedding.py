"""The last layer of an embedding is made inside of the op, wherever nothing else is asked of it; what is anything else
is called as it is."""

import copy

import pytest
import torch
import upstream_models as up
import upstream_padded as pad
from accelerate_cases import CASES, HOLES, LABELS, D, E, L, N, accelerated, cotangent, flat, kind, results, step
from op_cases import threads
from test_accelerate_guards import CHANGES, KINDS
from torch import nn

import milkernels
from milkernels import Embed, embed_instances
from milkernels import ops as public
from milkernels.integrations import layers

EMBEDDED = {name: case for name, case in CASES.items() if case.embedding}
every_embedding = pytest.mark.parametrize("case", EMBEDDED.values(), ids=EMBEDDED)
OPS = ("attention_pool", "gated_attention_pool", "attention_scores", "gated_attention_scores", "dsmil")
OPS += ("loss_attention_pool",)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def seen(monkeypatch):
    """Names of ops that are called, with whether they embed; and linear layers that are."""
    ops, linear = [], []

    def noting(name, op):
        return lambda *args, **options: (ops.append((name, options.get("embed") is not None)), op(*args, **options))[1]

    for name in OPS:
        monkeypatch.setattr(public, name, noting(name, getattr(public, name)))
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (linear.append(self), forward(self, x))[1])
    return ops, linear


# Reading


def dense(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), *more)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked(layer: nn.Module, kind: str = "forward_hook") -> nn.Module:
    getattr(layer, f"register_{kind}")(lambda *args: None)
    return layer


READ = {  # how many layers are called, and what is not
    "linear": (nn.Linear(4, 3), 0, "identity", 0.0),
    "in a Sequential": (dense(), 0, "identity", 0.0),
    "relu": (dense(nn.ReLU()), 0, "relu", 0.0),
    "tanh, dropout": (dense(nn.Tanh(), nn.Dropout(0.3)), 0, "tanh", 0.3),
    "gelu, dropout in eval": (dense(nn.GELU(), nn.Dropout(0.3).eval()), 0, "gelu", 0.0),
    "dropout alone": (dense(nn.Dropout(0.3)), 0, "identity", 0.3),
    "dropout before relu": (dense(nn.Dropout(0.3), nn.ReLU()), 0, "relu", 0.3),
    "no bias": (nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU()), 0, "relu", 0.0),
    "deeper": (nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.1), *dense(nn.ReLU())), 3, "relu", 0.0),
    "behind a norm": (nn.Sequential(nn.LayerNorm(4), *dense(nn.ReLU())), 1, "relu", 0.0),
    "behind a hook": (nn.Sequential(hooked(nn.LayerNorm(4)), *dense(nn.ReLU())), 1, "relu", 0.0),
}
CALLED = {
    "nothing": nn.Identity(),
    "empty": nn.Sequential(),
    "a norm at the end": dense(nn.ReLU(), nn.LayerNorm(3)),
    "a norm in between": dense(nn.LayerNorm(3), nn.ReLU()),
    "another activation": dense(nn.SiLU()),
    "an activation's subclass": dense(type("Other", (nn.ReLU,), {})()),
    "approximate gelu": dense(nn.GELU("tanh")),
    "dropout before tanh": dense(nn.Dropout(0.3), nn.Tanh()),
    "dropout twice": dense(nn.Dropout(0.3), nn.ReLU(), nn.Dropout(0.3)),
    "other dropout": dense(nn.ReLU(), nn.AlphaDropout(0.3)),
    "two activations": dense(nn.ReLU(), nn.Tanh()),
    "convolution": nn.Sequential(nn.Conv1d(4, 3, 1), nn.ReLU()),
    "a linear's subclass": nn.Sequential(Doubled(4, 3), nn.ReLU()),
    "a Sequential's subclass": type("Other", (nn.Sequential,), {})(nn.Linear(4, 3), nn.ReLU()),
    "a hook": nn.Sequential(hooked(nn.Linear(4, 3), "forward_pre_hook"), nn.ReLU()),
    "a hook of the activation": dense(hooked(nn.ReLU(), "full_backward_hook")),
    "a hook of all": hooked(dense(nn.ReLU())),
}


@pytest.mark.parametrize("name", READ)
def test_what_ops_take(name):
    module, called, activation, p = READ[name]
    found = layers.embedding(module)
    inner = [module] if isinstance(module, nn.Linear) else list(module)
    linear = inner[called]
    assert list(found.called) == inner[:called]
    weight, bias = found.embed.linear
    assert weight is linear.weight and bias is linear.bias
    assert found.embed[1:] == (activation, p)
    module.eval()
    x = torch.randn(6, 5 if name == "deeper" else 4)
    h = embed_instances(found(x), layers.embedding(module).embed, torch.arange(6))
    torch.testing.assert_close(h, module(x))
    rest = layers.without_called(module)
    torch.testing.assert_close(rest(found(x)), module(x))


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_as_it_is(name):
    module = CALLED[name]
    assert layers.embedding(module) == ((module,), None)
    assert type(layers.without_called(module)) is nn.Identity


def test_layers_that_follow_each_other():
    first, *rest = CALLED["another activation"]
    assert layers.embedding(first, *rest) == ((first, *rest), None)
    first, *rest = READ["deeper"][0]
    assert layers.embedding(first, *rest).called == (first, *rest[:2])
    assert layers.embedding() == ((), None)


# Passed over


@every_embedding
def test_the_embedding_is_not_called(case, seen):
    ops, called = seen
    model, inputs = accelerated(case.model()), case.draw(0)
    linear = model.get_submodule(case.embedding)
    for name, call in case.calls.items():
        ops.clear()
        called.clear()
        step(model, call, inputs)
        whole = name in case.eager
        assert (linear in called) == whole, name
        assert any(embeds for _, embeds in ops) != whole, name
        assert called.count(linear) <= 1


def first_call(case):
    return next(call for name, call in case.calls.items() if name not in case.eager)


def same(got, expected, tolerance=1e-9):
    assert got.keys() == expected.keys()
    for name, t in got.items():
        size = tolerance if t.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(t, expected[name], rtol=size, atol=size)


@pytest.mark.parametrize("change", CHANGES)
@every_embedding
def test_a_changed_layer_is_called(case, change, seen):
    """The pooling is fused as before."""
    ops, _ = seen
    models, inputs, call = (case.model(), accelerated(case.model())), case.draw(0), first_call(case)
    ops.clear()
    step(models[1], call, inputs)
    before, found = [name for name, _ in ops], []
    parent, _, attribute = case.embedding.rpartition(".")
    for model in models:
        torch.manual_seed(1)
        CHANGES[change](model.get_submodule(parent), attribute, model.get_submodule(case.embedding))
        ops.clear()
        found.append(results(*step(model, call, inputs)))
    same(*found)
    assert ops == [(name, change == "new weight") for name in before]


@pytest.mark.parametrize("kind", KINDS)
@every_embedding
def test_a_hook_is_called(case, kind, seen):
    ops, called = seen
    model, inputs, call = accelerated(case.model()), case.draw(0), first_call(case)
    linear, hooks = model.get_submodule(case.embedding), []
    handle = getattr(linear, f"register_{kind}")(lambda *args: hooks.append(kind))
    ops.clear()
    called.clear()
    got = results(*step(model, call, inputs))
    assert len(hooks) == called.count(linear) == 1
    assert ops and not any(embeds for _, embeds in ops)
    same(got, results(*step(case.model(), call, inputs)))
    handle.remove()
    ops.clear()
    step(model, call, inputs)
    assert any(embeds for _, embeds in ops)


@pytest.mark.parametrize("between", [nn.LayerNorm(L), nn.SiLU()], ids=["norm", "activation"])
def test_other_layers_in_front_and_behind(between, seen):
    """In front of the last layer they are called; behind it, all of them are."""
    ops, called = seen
    for behind in (False, True):
        model = up.ClamSB(k_sample=4, sizes=(L, L if behind else E, D)).double().eval()
        first, rest = model.attention_net[:3], model.attention_net[3:]
        if behind:
            model.attention_net = nn.Sequential(*first, between, *rest).double()
        else:
            model.attention_net = nn.Sequential(nn.Linear(L, L), between, *first, *rest).double()
        ours, inputs, call = accelerated(model), CASES["clam-sb"].draw(0), CASES["clam-sb"].calls["class 1"]
        ops.clear()
        called.clear()
        got = results(*step(ours, call, inputs))
        assert ops == [("gated_attention_pool", not behind)] and (ours.attention_net[0] in called)
        same(got, results(*step(model, call, inputs)))


# Dropout


class Given(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = [h]

    def forward(self, x):
        return self.h[0].reshape(*x.shape[:-1], -1)


# The embedding, whose layers are Linear, activation and Dropout, perhaps added here; and a call.
INSTANCE_LOSSES = {
    "clam-sb": ("attention_net", "class 1"),
    "clam-sb-subtyping": ("attention_net", "class 0"),
    "clam-mb": ("attention_net", "class 1"),
    "clam-mb-plain-subtyping": ("attention_net", "class 1"),
    "millab-clam": ("patch_embed", "slide"),
    "torchmil-clam-embedding": ("feat_ext", "loss"),
}


@pytest.mark.parametrize("name", INSTANCE_LOSSES)
def test_instance_losses_see_the_units_that_the_pooling_saw(name):
    """As if all instances had been embedded, with the op's dropout."""
    case, (at, call), p = CASES[name], INSTANCE_LOSSES[name], 0.4
    model, inputs = case.model(), case.draw(0)
    front = model.get_submodule(at)
    if len(front) == 2:
        front.append(nn.Dropout())
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    front[2].p = p
    ours = accelerated(model).train()
    torch.manual_seed(7)
    out, gradients = step(ours, case.calls[call], inputs)

    torch.manual_seed(7)
    x, seed = inputs["x"].flatten(0, -2), torch.randint(2**63 - 1, (1,))
    embed = Embed(front[0], "gelu" if name.startswith("torchmil") else "relu", p)
    h = embed_instances(x, embed, torch.arange(len(x)), seed=seed)
    setattr(model, at, nn.Sequential(Given(h), *front[3:]))  # CLAM's attention network is in there as well
    parameters = dict(model.named_parameters()) | {f"{at}.0.weight": front[0].weight, f"{at}.0.bias": front[0].bias}
    whole = case.calls[call](model.eval(), inputs)
    outputs = [t for t in flat(whole) if t.requires_grad]
    given = [cotangent(t, i) for i, t in enumerate(outputs)]
    # The network has another index there.
    names = {key: key if key in parameters else key.replace(f"{at}.3", f"{at}.1") for key in gradients if key != "x"}
    expected = torch.autograd.grad(outputs, [parameters[n] for n in names.values()], given, allow_unused=True)
    same(results(out, {key: gradients[key] for key in names}), results(whole, dict(zip(names, expected, strict=True))))


@pytest.mark.parametrize("name", ["clam-sb", "trident-encoder", "loss-attention", "torchmil-abmil-embedding"])
def test_units_are_dropped_in_training_alone(name):
    case = CASES[name]
    model, inputs = case.model(), case.draw(0)
    ours, drops = accelerated(model), [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert drops
    same(results(*step(ours, first_call(case), inputs)), results(*step(model, first_call(case), inputs)))
    ours.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(results(*step(ours, first_call(case), inputs)))
    assert all(torch.equal(t, found[1][key]) for key, t in found[0].items())
    assert any(not torch.equal(t, found[2][key]) for key, t in found[0].items())


# Types

STORED = ("clam-sb", "clam-sb-subtyping", "clam-mb", "millab-abmil", "millab-dsmil", "millab-clam", "trident-encoder")
STORED += ("torchmil-clam-embedding", "torchmil-dsmil-embedding", "slideflow")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_stored_in_half_with_parameters_in_full(name, dtype):
    """The features go in as they are; what is returned, and its gradients, is in full.  Eager layers refuse them."""
    case = CASES[name]
    model = case.model(torch.float32)
    ours, x = accelerated(model), case.draw(0, torch.float32)["x"].detach().to(dtype)
    for call_name, call in case.calls.items():
        if call_name in case.eager or call_name in ("mask", "holes", "numbers"):  # masks in the type of x
            continue
        with pytest.raises(RuntimeError):
            call(model, {"x": x})
        got, expected = call(ours, {"x": x}), call(model, {"x": x.float()})
        assert kind(got) == kind(expected), call_name
        for t, other in zip(flat(got), flat(expected), strict=True):
            if t.is_floating_point():
                torch.testing.assert_close(t, other, rtol=0.1, atol=0.05)
        total = sum(t.masked_fill(t.isinf(), 0).sum() for t in flat(got) if t.requires_grad)
        for p, g in zip(
            ours.parameters(), torch.autograd.grad(total, ours.parameters(), allow_unused=True), strict=True
        ):
            assert g is None or g.dtype == p.dtype


@every_embedding
def test_under_autocast(case):
    """The types of what is returned are those of the original."""
    model = case.model(torch.float32)
    ours, inputs = accelerated(model), case.draw(0, torch.float32)
    for call in case.calls.values():
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = call(ours, inputs), call(model, inputs)
        assert [t.dtype for t in flat(got)] == [t.dtype for t in flat(expected)]


# Few instances, and none


@pytest.mark.parametrize("name", ["clam-sb", "clam-mb", "millab-clam"])
def test_fewer_instances_than_are_sampled(name):
    """The original fails."""
    case = CASES[name]
    model, inputs = case.model(), case.draw(0)
    few = {"x": inputs["x"][..., :3, :]}
    call = case.calls["plain" if name == "millab-clam" else "class 1"]
    for m in (model, accelerated(model)):
        with pytest.raises(RuntimeError, match="out of range"):
            call(m, few)


def test_sampled_from_both_ends():
    """Of a bag with fewer than twice as many, some are both among the most and the least attended."""
    for name, call in (("clam-sb", "class 1"), ("clam-sb-subtyping", "class 0"), ("millab-clam", "plain")):
        case = CASES[name]
        model, x = case.model(), case.draw(0)["x"].detach()[..., :5, :].clone().requires_grad_()
        same(*(results(*step(m, case.calls[call], {"x": x})) for m in (accelerated(model), model)))


@pytest.mark.parametrize(
    "name, call",
    [
        ("clam-sb", "plain"),
        ("clam-mb", "attention"),
        ("millab-abmil", "plain"),
        ("millab-dsmil", "features"),
        ("trident-encoder", "scores"),
    ],
)
def test_no_instances(name, call):
    case = CASES[name]
    ours, x = accelerated(case.model()), case.draw(0)["x"][..., :0, :]
    out = case.calls[call](ours, {"x": x})
    assert all(t.isfinite().all() for t in flat(out) if t.numel())


def test_few_take_the_encoders_own_forward(seen):
    ops, _ = seen
    model = pad.SlideEncoder(L, D, 2)
    assert len(milkernels.accelerate(model).changed) == 2
    for rows, fused in ((99, False), (100, True)):
        ops.clear()
        with torch.no_grad():
            model({"features": torch.randn(1, rows, L)}, device="cpu")
        assert bool(ops) == fused
    with pytest.raises((RuntimeError, AssertionError)):
        model({"features": torch.randn(1, 5, L)}, device="no such device")


# What looks at all instances


@pytest.mark.parametrize(
    "name, call", [("clam-sb", "class 1"), ("millab-clam", "plain"), ("torchmil-clam-embedding", "loss")]
)
def test_an_instance_loss_of_ones_own_is_given_all(name, call, seen):
    ops, _ = seen
    case, rows = CASES[name], []
    models, found = (case.model(), accelerated(case.model())), []
    for model in models:

        def own(A, h, *rest, evaluate=model.inst_eval, **options):
            rows.append(len(h))
            return evaluate(-A, h.flip(0), *rest, **options)

        model.inst_eval = own
        ops.clear()
        found.append(results(*step(model, case.calls[call], case.draw(0))))
    same(*found)
    assert set(rows) == {12 if name.startswith("torchmil") else N} and ops and not any(embeds for _, embeds in ops)


class OtherForward(pad.MILLabCLAM):
    def forward(self, h):
        return self.forward_features(h)[1]["instance_feats"]


def test_another_forward_of_clam_has_its_features_fused(seen):
    ops, _ = seen
    torch.manual_seed(0)
    model = OtherForward(L, E, 0.25, True, D).eval()
    report = milkernels.accelerate(model, min_instances=0)
    assert {e.name: e.structure for e in report.changed}[""] == "CLAM (MIL-Lab), features"
    ops.clear()
    model(torch.randn(1, N, L))
    assert ops == [("gated_attention_pool", False)]


@pytest.mark.parametrize("name", ["torchmil-abmil-embedding", "torchmil-clam-embedding"])
def test_a_hook_on_the_pool_behind_it(name):
    case, calls = CASES[name], []
    model, inputs = accelerated(case.model()), case.draw(0)
    model.pool.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
    got = [results(*step(model, call, inputs)) for call in case.calls.values()]
    assert calls == [(3, 12, E)] * len(case.calls)
    for found, call in zip(got, case.calls.values(), strict=True):
        same(found, results(*step(case.model(), call, inputs)), 1e-7)


def test_padding_stays_out_of_losses_where_the_pool_has_hooks():
    case = CASES["torchmil-clam-embedding"]
    model = accelerated(case.model())
    x = torch.where(HOLES[..., None], case.draw(0)["x"].detach(), 1e3)
    expected = model.compute_loss(LABELS, x, HOLES)[1]["InstLoss"]
    model.pool.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(model.compute_loss(LABELS, x, HOLES)[1]["InstLoss"], expected)


def test_a_model_whose_embedding_came_later(seen):
    """Read on every call."""
    ops, _ = seen
    model = pad.ABMIL(E, D).double().eval()
    ours, x = accelerated(model), CASES["torchmil-abmil"].draw(0)["x"]
    for m in (model, ours):
        torch.manual_seed(0)
        m.feat_ext = up.dense(L, E, activation=nn.ReLU).double()
    ops.clear()
    same(*(results(*step(m, lambda m, t: m(t["x"]), {"x": x})) for m in (ours, model)))
    assert ops[0] == ("attention_pool", True)


def test_copies_embed(seen):
    ops, _ = seen
    case = CASES["trident-encoder"]
    ours = accelerated(case.model())
    for m in (copy.deepcopy(ours), ours):
        ops.clear()
        step(m, case.calls["plain"], case.draw(0))
        assert ops == [("gated_attention_pool", True)]
    milkernels.restore(ours)
    ops.clear()
    step(ours, case.calls["plain"], case.draw(0))
    assert not ops


class LogitsSeen(up.ClamSB):
    def _evaluated(self, logits, targets):
        self.seen = logits.detach().double()
        return super()._evaluated(logits, targets)


@pytest.mark.parametrize("embedded", [True, False])
def test_clam_finds_the_least_attended_under_float16(embedded):
    """Their weights are all 0 in float16; the module's own softmax is in float32 under CUDA's autocast."""
    torch.manual_seed(0)
    own = LogitsSeen(sizes=(16, 24, 8)).eval()
    with torch.no_grad():
        own.attention_net[-1].attention_c.weight.mul_(20)
    fast = copy.deepcopy(own)
    if not embedded:  # a hook on the embedding keeps it out of the op
        fast.attention_net[0].register_forward_hook(lambda *_: None)
    assert {e.structure for e in milkernels.accelerate(fast, min_instances=0).changed} >= {"CLAM"}
    x, label = 2 * torch.randn(3000, 16), torch.tensor([1])
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        fast(x, label, True)
        weights = own(x)[3].softmax(1).half()
    assert (weights == 0).sum() > 50
    with torch.no_grad():
        exact = own.double()
        exact(x.double(), label, True)
    torch.testing.assert_close(fast.seen, exact.seen, rtol=0, atol=5e-3)
