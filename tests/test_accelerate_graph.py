"""The long tail: modules that are fused by their graph.  What must be fused of each kind, that it returns what it did
with the same gradients, that look-alikes are left alone, and when the module's own forward runs."""

import copy
import functools
import io
import itertools
import pickle
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import graph_lookalikes
import processes
import pytest
import torch
import upstream_graph as up
from accelerate_cases import counted, flat
from graph_lookalikes import BESIDE_IT, IN_THE_GRAPH, LOOK_ALIKES
from op_cases import needs_extension, threads
from test_contract import peak_allocated
from torch import nn
from torch.nn.utils import parametrizations, prune
from upstream_graph import IN, KINDS

import milkernels
from milkernels.integrations import engine, graph, tracing
from milkernels.integrations.layers import Unfusable
from milkernels.integrations.traced import Traced

pytestmark = needs_extension
every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def draw(kind, seed=0, rows=None):
    shape = list(kind.shape)
    shape[-2] = rows or shape[-2]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).relu()


def own(name):
    torch.manual_seed(0)
    model = KINDS[name].make().double().eval()
    for parameter in model.parameters():
        parameter.data *= 1.5
    return model


@functools.cache
def _accelerated(name):
    kind, model = KINDS[name], own(name)
    return model, milkernels.accelerate(model, example=kind.example and kind.example(draw(kind)), min_instances=0)


def accelerated(name):
    return copy.deepcopy(_accelerated(name)[0])


def without_dropout(model):
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def step(model, kind, x):
    """Outputs, and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_()
    out = kind.call(model, x)
    outputs = [t for t in flat(out) if t.is_floating_point() and t.requires_grad]
    generator = torch.Generator().manual_seed(5)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, [x, *model.parameters()], directions, allow_unused=True)
    return out, gradients


def same(got, expected, tolerance=1e-9):
    assert type(got) is type(expected)
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def fused(model, kind, x, monkeypatch):
    """How many poolings of a call are fused: scores may be where its own forward runs."""
    with monkeypatch.context() as patch:
        calls = counted(patch)
        kind.call(model, x)
    return sum(call.endswith("pool") for call in calls)


# Coverage


@every_kind
def test_what_share_is_fused(name, monkeypatch):
    kind, (model, report) = KINDS[name], _accelerated(name)
    (entry,) = (entry for entry in report.changed if entry.name == kind.name)
    assert entry.share == kind.share and entry.kind == type(own(name)).__name__
    assert f"{entry.share} fused" in str(report) and not [e for e in report.left if e.name == kind.name]
    assert isinstance(engine.structure_of(model), Traced)
    for training in (False, True):
        assert fused(accelerated(name).train(training), kind, draw(kind), monkeypatch) >= 1


@pytest.mark.parametrize("training", [False, True])
@every_kind
def test_outputs_and_gradients(name, training):
    """For other numbers of instances than were tried."""
    kind = KINDS[name]
    models = [without_dropout(own(name)).train(training), without_dropout(own(name))]
    milkernels.accelerate(models[1], example=kind.example and kind.example(draw(kind)), min_instances=0)
    models[1].train(training)
    for rows in (40, 57):
        found = [step(model, kind, draw(kind, 1, rows)) for model in models]
        same(found[1][0], found[0][0])
        for a, b in zip(found[1][1], found[0][1], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["plain", "gate of lists", "survival", "masked", "deep", "more of clam, branches"])
def test_training_steps(name):
    kind, found = KINDS[name], []
    for model in (own(name), accelerated(name)):
        without_dropout(model).train()
        if name != "plain" and isinstance(engine.structure_of(model), Traced):
            milkernels.accelerate(model, example=kind.example and kind.example(draw(kind)), min_instances=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for i in range(20):
            optimizer.zero_grad()
            sum(t.square().sum() for t in flat(kind.call(model, draw(kind, i))) if t.requires_grad).backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_a_step_takes_a_third_of_the_memory():
    """Of a model with an embedding, allocated at once beside the input and the parameters."""
    wide, rows = 96, 6000
    torch.manual_seed(0)
    model = up.Plain()
    model.feature = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Dropout(0.25))
    model.attention = nn.Sequential(nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, 1))
    model.classifier = nn.Linear(wide, 2)
    fast, x = copy.deepcopy(model), torch.randn(1, rows, wide)
    milkernels.accelerate(fast)

    def training_step(m):
        return torch.autograd.grad(m(x)["logits"].sum(), list(m.parameters()))

    before = peak_allocated(lambda: training_step(model))
    with milkernels.saved_bytes(0):
        assert peak_allocated(lambda: training_step(fast)) < before / 3


@pytest.mark.parametrize("name", ["plain, tanh and dropout", "gate of lists", "nested"])
def test_dropped_units(name, monkeypatch):
    """The same on every backend, others with another seed."""
    kind, x, found = KINDS[name], draw(KINDS[name]), {}
    model = accelerated(name).train()
    assert fused(model, kind, x, monkeypatch)
    for backend, seed in (("native", 1), ("reference", 1), ("native", 2)):
        torch.manual_seed(seed)
        with milkernels.use_backend(backend):
            found[backend, seed] = flat(step(model, kind, x))
    for a, b in zip(found["native", 1], found["reference", 1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert any(not torch.equal(a, b) for a, b in zip(found["native", 1], found["native", 2], strict=True))


@pytest.mark.parametrize("make", [up.GatedWeights, up.GatedWeightsNoNorm])
def test_layers_that_return_weights(make):
    torch.manual_seed(0)
    model = make().double()
    original, x = copy.deepcopy(model), draw(KINDS["plain, one bag"])[:, : up.E]
    (entry,) = milkernels.accelerate(model, min_instances=0).changed
    assert entry.share == "scores + softmax"
    same(model(x), original(x))
    if make is up.GatedWeightsNoNorm:
        for call in (lambda m: m(x, True), lambda m: m(x, no_norm=True), lambda m: m(x, no_norm=False)):
            same(call(model), call(original))


def test_more_arguments_than_the_structure_knows(monkeypatch):
    torch.manual_seed(0)
    model = up.MoreOfDSMIL(IN, 2).double()
    original, x = copy.deepcopy(model), draw(KINDS["plain, one bag"])
    logits = torch.randn(len(x), 2, dtype=torch.float64)
    (entry,) = milkernels.accelerate(model, min_instances=0).changed
    assert "DSMIL" in entry.structure
    calls = counted(monkeypatch)
    same(model(x, logits), original(x, logits), 1e-6)
    assert calls
    calls.clear()
    same(model(x, logits, more=1), original(x, logits, more=1))
    assert not calls
    with pytest.raises(AssertionError):
        model(x, logits, False)


# Look-alikes


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_left_alone(name):
    torch.manual_seed(0)
    model, x = LOOK_ALIKES[name]().double().eval(), draw(KINDS["plain, one bag"])
    original, state = copy.deepcopy(model), torch.get_rng_state()
    values = {key: t.clone() for key, t in model.state_dict().items()}
    seen = len(graph_lookalikes.SEEN)
    report = milkernels.accelerate(model, min_instances=0)
    assert not report.changed and type(model) is LOOK_ALIKES[name]
    assert torch.equal(torch.get_rng_state(), state) and vars(model).keys() == vars(original).keys()
    assert all(torch.equal(t, values[key]) for key, t in model.state_dict().items())
    assert model.calls == 0 and model.keep == [] and seen <= len(graph_lookalikes.SEEN)
    for entry in report.left:
        assert entry.remark and not entry.structure and "next step" in str(report)
    found = []
    for m in (model, original):
        torch.manual_seed(1)
        random.seed(1)
        found.append(m(x.clone()))
    if isinstance(found[0], torch.Tensor | tuple):
        same(*found, 0)


def matched(model, training=False):
    """What the matcher finds by itself, with nothing proven."""
    call = {"x": draw(KINDS["plain, one bag"])}
    exported = tracing.exported(model.double().train(training), call).graph
    return graph.find(exported, graph.without_writes(exported))


@pytest.mark.parametrize("forward", IN_THE_GRAPH, ids=lambda f: f.__name__)
def test_the_matcher_finds_no_look_alike(forward):
    try:
        assert not matched(graph_lookalikes.module(forward)())
    except Unfusable as reason:
        assert "writes" in str(reason)


def test_the_matcher_finds_what_the_look_alikes_look_like():
    def forward(self, x):
        h = self.rows(x)
        return self.weights(h).T @ h

    (match,) = matched(graph_lookalikes.module(forward)())
    assert match.front is not None and match.fold == graph.Fold() and match.gate.u is not None


def test_a_proof_is_needed_for_the_others():
    assert len(LOOK_ALIKES) == len(IN_THE_GRAPH) + len(BESIDE_IT) >= 50


# When the module's own forward runs


CHANGES = {
    "another p": lambda m: setattr(m.feature[2], "p", 0.5),
    "another mode": lambda m: m.feature[2].train(),
    "another activation": lambda m: m.feature.__setitem__(1, nn.Tanh()),
    "another attribute": lambda m: setattr(m, "width", 3),
    "one more attribute": lambda m: setattr(m, "more", 3),
    "one more layer": lambda m: m.feature.append(nn.Tanh()),
    "a hook": lambda m: m.attention[1].register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m.feature[0].register_forward_pre_hook(lambda *_: None),
    "a hook backward": lambda m: m.classifier.register_full_backward_hook(lambda *_: None),
    "a forward": lambda m: setattr(m.attention[0], "forward", lambda x: nn.Linear.forward(m.attention[0], x) * 2),
    "pruned": lambda m: prune.l1_unstructured(m.attention[0], "weight", amount=0.5),
    "parametrized": lambda m: parametrizations.weight_norm(m.attention[2]),
    "another class": lambda m: m.attention.__setitem__(0, Doubled(up.E, up.D).double()),
}


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_obeyed(change, monkeypatch):
    kind, x = KINDS["plain"], draw(KINDS["plain"])
    models = [own("plain, tanh and dropout").eval(), accelerated("plain, tanh and dropout").eval()]
    assert fused(models[1], kind, x, monkeypatch) == 1
    found = []
    for model in models:
        torch.manual_seed(3)
        CHANGES[change](model)
        found.append(step(model, kind, x))
    same(found[1][0], found[0][0])
    assert fused(models[1], kind, x, monkeypatch) == 0


@pytest.mark.parametrize("kind_of_hook", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
@pytest.mark.parametrize("name", ["plain", "nested", "head by head"])
def test_hooks_on_every_submodule_fire(name, kind_of_hook):
    kind, x = KINDS[name], draw(KINDS[name])
    counts = []
    for model in (own(name), accelerated(name)):
        seen = {}
        for module in model.modules():
            if kind_of_hook == "full_backward_hook" and hasattr(module, "inplace"):
                module.inplace = False  # PyTorch refuses such a hook beside an activation in place
        for path, module in model.named_modules():

            def hook(*_, path=path, seen=seen):
                seen[path] = seen.get(path, 0) + 1

            handle = getattr(module, f"register_{kind_of_hook}")(hook)
            step(model, kind, x)
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1] and counts[0]


CALLS = {
    "a flag": (lambda m, x: m(x, True), 0),
    "a flag by name": (lambda m, x: m(x, return_feature=True), 0),
    "the default": (lambda m, x: m(x, False, return_feature=False), 1),
    "by name": (lambda m, x: m(x=x), 1),
    "one bag alone": (lambda m, x: m(x[0]), 1),
    "one instance": (lambda m, x: m(x[:, :1]), 0),
}


@pytest.mark.parametrize("call", CALLS)
def test_other_calls(call, monkeypatch):
    (make, expected), x = CALLS[call], draw(KINDS["plain"])
    kind = KINDS["plain"]._replace(call=make)
    model, original = accelerated("plain"), own("plain")
    same(make(model, x), make(original, x))
    assert fused(model, kind, x, monkeypatch) == expected


def test_wrong_calls_raise_what_they_did():
    model = accelerated("plain")
    for args, kwargs in (((), {}), ((1, 2, 3, 4), {}), ((draw(KINDS["plain"]),), {"nothing": 1})):
        with pytest.raises(TypeError):
            model(*args, **kwargs)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, IN + 1, dtype=torch.float64))


class Branching(up.Plain):
    def forward(self, x):
        if x.shape[-2] > 30:
            return super().forward(x)["logits"]
        return self.classifier(self.feature(x).squeeze(0).mean(0, keepdim=True))


def test_a_branch_on_the_number_of_instances(monkeypatch):
    torch.manual_seed(0)
    model = Branching().double()
    original = copy.deepcopy(model)
    assert "" not in {e.name for e in milkernels.accelerate(copy.deepcopy(model), min_instances=0).changed}
    report = milkernels.accelerate(model, example=(draw(KINDS["plain"]),), min_instances=0)
    assert report.changed[0].share == up.EMBEDDED
    for rows, expected in ((40, 1), (31, 1), (30, 0), (7, 0)):
        x = draw(KINDS["plain"], 0, rows)
        same(model(x), original(x))
        assert fused(model, KINDS["plain"], x, monkeypatch) == expected


class Tied(up.Plain):
    """The same layer by two names, and the same weight in two layers."""

    def __init__(self):
        super().__init__()
        self.again = self.feature
        self.second = nn.Linear(IN, up.E)
        self.second.weight = self.feature[0].weight

    def forward(self, x):
        return super().forward(x)["logits"] + self.second(x.mean(-2)).mean() + self.again(x).mean()


def test_tied_parameters():
    torch.manual_seed(0)
    model = Tied().double()
    original = copy.deepcopy(model)
    report = milkernels.accelerate(model, min_instances=0)
    assert report.changed[0].share.startswith(up.POOLING)
    x, kind = draw(KINDS["plain"]), KINDS["plain"]
    same(*(step(m, kind, x) for m in (model, original)))
    for m in (model, original):
        m.second.weight = nn.Parameter(m.second.weight.detach() * 2)
    same(*(step(m, kind, x) for m in (model, original)))


class ByProperty(up.Plain):
    @property
    def forward(self):
        return lambda x: self.classifier(self.feature(x)[0].mean(0))


def test_forwards_that_are_no_methods():
    replaced = up.Plain()
    replaced.forward = functools.partial(up.Plain.forward, replaced)
    for model in (ByProperty(), replaced):
        assert "" not in {entry.name for entry in milkernels.accelerate(model, min_instances=0).changed}


def test_scripted_and_lazy_submodules():
    model = up.Plain()
    model.classifier = torch.jit.script(nn.Sequential(nn.Linear(up.E, 2)))
    assert "" not in {entry.name for entry in milkernels.accelerate(model, min_instances=0).changed}
    model = up.Plain()
    model.classifier = nn.LazyLinear(2)
    assert "" not in {entry.name for entry in milkernels.accelerate(model, min_instances=0).changed}
    model(torch.randn(1, 9, IN))
    assert milkernels.accelerate(model, min_instances=0).changed[0].share == up.EMBEDDED


# What holds for every accelerated model


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "file": through_file}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["plain", "survival", "masked"])
def test_copies_are_fused(name, how, monkeypatch):
    kind, x = KINDS[name], draw(KINDS[name])
    model = COPIES[how](_accelerated(name)[0])
    assert fused(model, kind, x, monkeypatch) == 1
    same(kind.call(model, x), kind.call(own(name), x))
    assert list(model.state_dict()) == list(own(name).state_dict()) and isinstance(model, type(own(name)))
    assert "" in milkernels.restore(model) and type(model) is type(own(name))


def test_in_another_process(tmp_path):
    kind, x = KINDS["plain"], draw(KINDS["plain"])
    torch.save((accelerated("plain"), x), tmp_path / "model.pt")
    code = (
        "import torch, sys; model, x = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save(model(x)['logits'], sys.argv[2])\n"
        "assert type(model)._milkernels_structure.variants"
    )
    paths = [str(Path(__file__).parent), str(Path(milkernels.__file__).parents[1])]
    environment = {"PYTHONPATH": ":".join(paths), "PATH": "", "OMP_NUM_THREADS": "1"}
    files = [str(tmp_path / "model.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, env=environment)
    torch.testing.assert_close(torch.load(files[1]), kind.call(own("plain"), x)["logits"])


@pytest.mark.parametrize("name", ["plain", "nested", "survival"])
def test_twice_is_once_and_restore(name):
    kind, model = KINDS[name], accelerated(name)
    example = kind.example and kind.example(draw(kind))
    report = milkernels.accelerate(model, example=example, min_instances=0)
    assert report == _accelerated(name)[1]
    assert "" in milkernels.restore(model) and not milkernels.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in own(name).modules()]


def test_functional_call():
    model, x = accelerated("plain"), draw(KINDS["plain"])
    other = {name: p * 0.5 for name, p in model.named_parameters()}
    got = torch.func.functional_call(model, other, (x,))
    same(got, torch.func.functional_call(own("plain"), other, (x,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_and_autocast(dtype):
    model, original = accelerated("plain").to(dtype), own("plain").to(dtype)
    x = draw(KINDS["plain"]).to(dtype)
    assert model(x)["logits"].dtype == dtype
    torch.testing.assert_close(model(x)["logits"], original(x)["logits"], rtol=0.05, atol=0.05)
    model, original = model.float(), original.float()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(x.float())["logits"], original(x.float())["logits"]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_types_that_the_graph_names_are_kept(monkeypatch):
    """Its forward makes tensors of a type of its own: in another one the own forward runs."""
    name = "more of clam, branches"
    model, original, kind = accelerated(name), own(name), KINDS[name]
    x = draw(kind)
    assert fused(model, kind, x, monkeypatch) == 1
    model, original, x = model.float(), original.float(), x.float()
    same(kind.call(model, x), kind.call(original, x), 1e-5)
    assert fused(model, kind, x, monkeypatch) == 0


@pytest.mark.slow
def test_compiled(monkeypatch):
    model, x = accelerated("plain"), draw(KINDS["plain"])
    graphs = []

    def backend(compiled, inputs):
        graphs.append(str(compiled.graph))
        return compiled.forward

    got = torch.compile(model, fullgraph=True, backend=backend)(x)
    same(got, own("plain")(x))
    assert "milkernels.attention_pool" in "".join(graphs)


def test_exported_and_transformed_it_is_what_it_was():
    model, x = accelerated("plain"), draw(KINDS["plain"])
    same(torch.func.vmap(model)(x[None]), torch.func.vmap(own("plain"))(x[None]))
    assert "milkernels" not in str(torch.jit.trace(own("plain"), x, strict=False).graph)


@pytest.mark.parametrize("few, expected", [(99, 0), (100, 1)])
def test_few_instances_take_the_own_forward(few, expected, monkeypatch):
    model = up.Plain().double()
    milkernels.accelerate(model)
    assert fused(model, KINDS["plain"], draw(KINDS["plain"], 0, few), monkeypatch) == expected


# On several ranks


def trained_on_a_rank(rank, how, name):
    """Three steps of a model on a bag of this rank, and whether its poolings were fused in each."""
    kind, model = KINDS[name], without_dropout(own(name))
    x = draw(kind, rank, 40 + rank)
    milkernels.accelerate(model, example=kind.example and kind.example(x), min_instances=0)
    if how == "ddp":
        call = nn.parallel.DistributedDataParallel(model.train())
    else:
        from torch.distributed.fsdp import fully_shard

        if how == "fsdp of layers":
            fully_shard(model.feature)
        call = fully_shard(model.train())
    optimizer, counts = torch.optim.SGD(model.parameters(), 0.1), []
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        for _ in range(3):
            optimizer.zero_grad()
            out = [t for t in flat(kind.call(call, x)) if t.requires_grad]
            sum(t.square().sum() for t in out).backward()
            optimizer.step()
            counts.append(sum(op.endswith("pool") for op in calls))
            calls.clear()
    parameters = [p if how == "ddp" else p.full_tensor() for p in model.parameters()]
    return counts, [p.detach() for p in parameters]


@processes.needs_gloo
@pytest.mark.parametrize(
    ("name", "how"),
    [*itertools.product(["plain", "survival", "nested"], ["ddp", "fsdp"]), ("plain", "fsdp of layers")],
)
def test_over_ranks(name, how):
    """What two ranks train is what one process trains on both bags.  A model that is sharded as a whole stays fused:
    FSDP's hooks run around its forward; with those of layers inside of it, its own forward runs."""
    kind, model = KINDS[name], without_dropout(own(name)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for rank in range(2):
            out = [t for t in flat(kind.call(model, draw(kind, rank, 40 + rank))) if t.requires_grad]
            (sum(t.square().sum() for t in out) / 2).backward()
        optimizer.step()
    for counts, parameters in processes.run(trained_on_a_rank, 2, how, name):
        assert counts == [int(how != "fsdp of layers")] * 3
        for got, expected in zip(parameters, model.parameters(), strict=True):
            torch.testing.assert_close(got, expected.detach(), rtol=1e-9, atol=1e-9)


# The report


def test_the_report_of_what_is_not_known():
    torch.manual_seed(0)
    report = milkernels.accelerate(up.Survival(), min_instances=0)
    assert {entry.name: entry.share for entry in report.changed} == {"attention_net.3": "scores"}
    (entry,) = report.left
    assert entry.name == "" and "example" in entry.next_step and "without an example" in entry.remark
    with pytest.raises(ValueError, match="example must be the arguments of a call of the model; got KeyError"):
        milkernels.accelerate(up.Survival(), example={"x": torch.zeros(3)})
    with pytest.raises(TypeError, match="example must be a tensor, a tuple or a dict; got int"):
        milkernels.accelerate(up.Survival(), example=3)


def test_no_foreign_names():
    class Mine(up.GatedWeights):
        def forward(self, bag, other):
            return super().forward(bag) * other

    assert "DTFD" not in str(milkernels.accelerate(Mine(), min_instances=0))


def test_the_tutorial(capsys):
    """Its Python runs, in order, and prints what stands under it."""
    text = (Path(milkernels.__file__).parents[1] / "docs" / "tutorials" / "accelerate.md").read_text()
    fences = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    names = {"__name__": "tutorial"}
    for (language, code), (after, expected) in zip(fences, [*fences[1:], ("", "")], strict=True):
        if language != "python":
            continue
        exec(code, names)
        printed = capsys.readouterr().out
        if after == "text" and "print(report)" in code:
            assert printed == expected


class Branches(nn.Module):
    """An ``if`` on a value, behind what warns for bags that have one dimension."""

    def __init__(self):
        super().__init__()
        self.hidden, self.scores = nn.Linear(16, 8), nn.Linear(8, 1)

    def forward(self, x):
        scores = self.scores(torch.tanh(self.hidden(x)))
        return torch.softmax(scores + 1 if scores.max() > 0 else scores, 0).T @ x


def test_what_cannot_be_traced_says_so_and_no_more(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = str(milkernels.accelerate(Branches()))
    assert "left alone" in report and "depends on the numbers in its tensors" in report
    assert capfd.readouterr() == ("", "")
