"""The peers of the benchmark: that each computes the same as ours, gradients included, or says why it does not run."""

import sys

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")

from milkernels.bench import cli, contenders, peers
from milkernels.bench.contenders import REGISTRY, Unavailable
from milkernels.testing import CASES, Shape, evaluate, float64_reference

LENGTHS = (40, 1, 9, 130)
ATTENTION = ("attention_pool", "gated_attention_pool", "gated_attention_pool_embed")
ONE_HEAD = ("torchmil", "pyg")
MANY_HEADS = ("padded", "pyg-segment", "segment-reduce", "jagged", "accumulate")
SEGMENTS = ("pyg-segment", "segment-reduce")


def prepared(name, op="gated_attention_pool", lengths=LENGTHS, heads=1, dtype=torch.float32, **more):
    """Case, inputs, and what the contender makes of them; skips where its package is missing."""
    package = REGISTRY[name].package
    if package:
        pytest.importorskip(package)
    case = CASES[op]
    inputs = case.inputs(Shape(lengths, dim=24, hidden=16, heads=heads), dtype, **more)
    return case, inputs, *REGISTRY[name].prepare(case, inputs, True)


def check(case, inputs, compute, its_inputs, mode):
    """Every pooled result and gradient against float64."""
    reference = float64_reference(case, inputs, mode)
    results = evaluate(compute, its_inputs, mode, case.primary)
    if its_inputs.x.dim() == 3 and mode == "step":  # of a padded batch
        real = torch.arange(max(inputs.lengths)) < torch.tensor(inputs.lengths).unsqueeze(1)
        assert (results["grad_x"][~real] == 0).all()
        results["grad_x"] = results["grad_x"][real]
    wanted = {case.primary} | {name for name in reference.results if name.startswith("grad_")}
    assert wanted <= results.keys() and (mode == "fwd") == (wanted == {case.primary})
    for name in wanted:
        result, exact = results[name], reference.results[name]
        assert result.shape == exact.shape and result.dtype == inputs.x.dtype, name
        size = reference.summands.get(name, float(torch.linalg.vector_norm(exact)))
        assert float(torch.linalg.vector_norm(result.detach().double() - exact)) <= 1e-5 * size, name


@pytest.mark.parametrize("mode", ["fwd", "step", "frozen"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("name", ONE_HEAD + MANY_HEADS)
def test_attention_of_ragged_bags(name, op, heads, mode, monkeypatch):
    monkeypatch.setattr(peers, "SLICE", 32)  # several slices of the longest bags
    if name in ONE_HEAD and heads > 1:
        with pytest.raises(Unavailable, match="one attention head"):
            prepared(name, op, heads=heads)
        return
    check(*prepared(name, op, heads=heads), mode)


@pytest.mark.parametrize("name", ONE_HEAD + MANY_HEADS)
def test_attention_of_one_bag(name, monkeypatch):
    monkeypatch.setattr(peers, "SLICE", 32)
    check(*prepared(name, lengths=(130,)), "step")


@pytest.mark.parametrize(
    ("name", "op", "modes"),
    [
        *((name, op, "fwd,step") for name in SEGMENTS for op in ("softmax_pool", "mean_pool", "max_pool")),
        ("jagged", "softmax_pool", "fwd,step"),
        ("jagged", "mean_pool", "fwd"),  # whose backward some versions of PyTorch lack
        ("accumulate", "attention_scores", "fwd,step"),
        ("accumulate", "gated_attention_scores", "fwd,step"),
    ],
)
def test_other_ops(name, op, modes, monkeypatch):
    monkeypatch.setattr(peers, "SLICE", 32)
    for mode in modes.split(","):
        check(*prepared(name, op, heads=2), mode)


@pytest.mark.parametrize("name", ["padded", "torchmil", "accumulate"])
def test_peers_with_a_mask(name):
    mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    mask[3:11] = False
    check(*prepared(name, mask=mask), "step")


@pytest.mark.parametrize("name", ["pyg", *SEGMENTS, "jagged"])
def test_peers_without_a_mask_say_so(name):
    with pytest.raises(Unavailable, match="no mask"):
        prepared(name, mask=torch.ones(sum(LENGTHS), dtype=torch.bool))


@pytest.mark.parametrize("name", ["padded", "torchmil", "pyg", *SEGMENTS, "jagged", "accumulate"])
def test_peers_refuse_other_ops(name):
    with pytest.raises(Unavailable):
        prepared(name, "dsmil", heads=2)


def test_a_layer_in_front_of_another_op_is_nobodys():
    for name in ("query_pool_embed", "dsmil_mlp_embed", "instance_max_embed", "loss_attention_pool_embed"):
        inputs = CASES[name].inputs(Shape(LENGTHS, dim=24, hidden=16, heads=2))
        formulas = [f"eager-{formula}" for formula in CASES[name].alternatives]
        assert contenders.default_contenders(CASES[name], inputs) == ["eager", *formulas, "compile"]


def test_torchmil_has_no_dropout():
    with pytest.raises(Unavailable, match="no dropout"):
        prepared("torchmil", dropout_p=0.25)


@pytest.mark.parametrize("name", [name for name, c in REGISTRY.items() if c.package])
def test_a_missing_package_is_named(name, monkeypatch):
    package = REGISTRY[name].package
    monkeypatch.setitem(sys.modules, package, None)  # an ImportError where it is imported
    for module in [m for m in sys.modules if m.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(contenders, "installed", lambda p: "")
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape(LENGTHS, dim=24, hidden=16))
    with pytest.raises(Unavailable, match=f"^{package}: "):
        REGISTRY[name].prepare(case, inputs, True)
    assert REGISTRY[name].label(case, inputs) == name
    assert name not in contenders.default_contenders(case, inputs)


@pytest.mark.parametrize("name", ["padded", "torchmil", "jagged"])
def test_what_pads_must_fit(name, monkeypatch):
    monkeypatch.setattr(peers, "available_memory", lambda device: 1000)
    with pytest.raises(Unavailable, match="GB"):
        prepared(name)


def test_accumulate_keeps_hidden_units_of_one_slice(monkeypatch):
    monkeypatch.setattr(peers, "SLICE", 32)
    case, inputs, compute, _ = prepared("accumulate")
    inputs.leaves("step")
    kept = []

    def pack(t):
        if t.dim() == 2 and t.shape[1] == 16 and t.shape[0] not in (1, 2):  # hidden units, not parameters
            kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        compute(inputs)
    assert not kept


@pytest.mark.parametrize("name", ["compile", "compile-max-autotune"])
def test_compiled_with_a_mode(name, monkeypatch):
    asked = []

    def compiled(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    for lengths in ((9,), LENGTHS):
        case, inputs, compute, its_inputs = prepared(name, lengths=lengths)
        check(case, inputs, compute, its_inputs, "step")
    modes = [None, None] if name == "compile" else ["max-autotune", "max-autotune-no-cudagraphs"]
    assert asked == [{"dynamic": False, "mode": modes[0]}, {"dynamic": True, "mode": modes[1]}]


def test_compiling_again_is_not_timed(monkeypatch):
    monkeypatch.setattr(contenders, "PREFIX", 16)
    seen = []

    def compiled(function, **options):
        return lambda x, *rest: seen.append(len(x)) or function(x, *rest)

    monkeypatch.setattr(torch, "compile", compiled)
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((130,), dim=24, hidden=16))
    for name in ("compile", "compile-max-autotune"):
        contenders.warmed_up(REGISTRY[name], case, inputs, "step", whole=False)
    assert seen == [130, 130]


def test_defaults():
    case = CASES["gated_attention_pool"]

    def defaults(op="gated_attention_pool", lengths=LENGTHS, heads=1):
        case = CASES[op]
        return contenders.default_contenders(case, case.inputs(Shape(lengths, dim=24, hidden=16, heads=heads)))

    assert defaults(lengths=(9,)) == ["eager", "compile", "accumulate"]
    several = defaults(heads=2)
    assert several[:3] == ["eager", "compile", "padded"]
    assert {"segment-reduce", "jagged", "accumulate"} <= set(several)
    assert not set(several) & {*ONE_HEAD, "compile-max-autotune"}
    assert defaults("mean_pool")[:2] == ["eager", "compile"] and "segment-reduce" in defaults("mean_pool")
    assert defaults("dsmil", heads=2) == ["eager", "compile"]
    assert contenders.packages() == ("torchmil", "torch_geometric")
    label = REGISTRY["jagged"].label(case, case.inputs(Shape(LENGTHS, dim=24, hidden=16)))
    assert label.startswith("jagged torch 2.")


def test_every_contender_is_described_in_a_line():
    for contender in REGISTRY.values():
        assert 10 <= len(contender.about) <= 110 and "\n" not in contender.about, contender.name


def test_a_peer_that_does_not_run_is_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmil", None)
    monkeypatch.setitem(sys.modules, "torchmil.nn", None)
    arguments = ["--lengths", "30,1,5", "--dim", "24", "--hidden", "16", "--heads", "1", "--dtype", "float32"]
    arguments += ["--mode", "fwd", "--rounds", "1", "--budget", "0.1", "--no-memory", "--backends", "reference"]
    assert cli.main([*arguments, "--contenders", "eager,torchmil,segment-reduce"]) == 0
    text = capsys.readouterr().out
    assert "torchmil" in text and "[unavailable]" in text and "unavailable: torchmil: " in text
