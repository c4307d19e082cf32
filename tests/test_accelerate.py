"""Models as people have them, accelerated: they return what they returned, as exactly, and padding is left out.

What is recognised and when the module's own methods run is in test_accelerate_guards.py.
"""

import copy

import pytest
import torch
import upstream_models as up
from accelerate_cases import CASES, HOLES, LABELS, D, L, accelerated, cotangent, counted, flat, kind, results, step
from op_cases import NAN, needs_extension, threads
from torch import nn

import milkernels
from milkernels import testing

pytestmark = needs_extension

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
IMPRECISE = "dsmil-published-width"  # the square root of 128 in float32 scales its scores


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


# The same results


def largest_summand(model, call, inputs) -> float:
    """What gradients of score biases cancel: over the inputs of linear layers, the sum of their numbers times their
    gradients, in size (with h what is pooled and a the weights, its gradient is that of the bag times a, and more)."""
    seen = []

    def keep(module, args):
        if args[0].is_floating_point():
            x = args[0] if args[0].requires_grad else args[0].requires_grad_()
            x.retain_grad()
            seen.append(x)

    handles = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, nn.Linear)]
    outputs = [t for t in flat(call(model, inputs)) if t.requires_grad]
    torch.autograd.backward(outputs, [cotangent(t, i) for i, t in enumerate(outputs)])
    for handle in handles:
        handle.remove()
    return max(((t * t.grad).abs().sum().item() for t in seen if t.grad is not None), default=0.0)


def decided(case, out) -> list:
    whole = [t for t in flat(out) if not t.is_floating_point()]
    return [t.tolist() for t in (*whole, *flat(case.chosen(out)))]


def clear_draws(case, call, model, exact, dtype, count):
    """Inputs for which a rounding or two decide nothing: which instances are chosen, which class is predicted."""
    found = []
    for seed in range(200):
        draws = [case.draw(seed, dtype, change) for change in (0.0, 4 * torch.finfo(dtype).eps)]
        choices = [decided(case, call(model, draw)) for draw in draws]
        wide = {name: t.detach().double().requires_grad_() for name, t in draws[0].items()}
        if choices[0] == choices[1] == decided(case, call(exact, wide)):
            found.append((draws[0], wide))
        if len(found) == count:
            return found
    raise AssertionError("no clear draws")


def promise(case, model, ours, call, seeds) -> testing.Promise:
    """The error promise, of all outputs and gradients, over several draws together."""
    dtype, exact = next(model.parameters()).dtype, copy.deepcopy(model).double()
    every, summands = ([], [], []), {}
    for narrow, wide in clear_draws(case, call, model, exact, dtype, seeds):
        got, expected, truth = step(ours, call, narrow), step(model, call, narrow), results(*step(exact, call, wide))
        assert kind(got[0]) == kind(expected[0])
        assert {n for n, g in got[1].items() if g is None} == {n for n, g in expected[1].items() if g is None}
        if zeros := [n for n, t in truth.items() if n.startswith("gradient") and t.norm() < 1e-12]:
            size = largest_summand(copy.deepcopy(exact), call, {n: t.detach().clone() for n, t in wide.items()})
            summands |= {name: summands.get(name, 0.0) + size for name in zeros}
        for runs, run in zip(every, (results(*got), results(*expected), truth), strict=True):
            runs.append({name: _finite(t) for name, t in run.items()})
    ours, eager, truth = ({name: torch.stack([run[name] for run in runs]) for name in runs[0]} for runs in every)
    return testing.error_promise(ours, eager, testing.Reference(truth, summands), dtype)


def _finite(t):
    """Padding of scores: -inf of ours, and numbers far below the others of some."""
    return t.masked_fill(t < -1e8, 0) if t.is_floating_point() else t.double()


@pytest.mark.parametrize("dtype, seeds", [(torch.float32, 3), (torch.bfloat16, 2)], ids=str)
@every_case
def test_error_promise(case, dtype, seeds):
    model = case.model(dtype)
    ours = accelerated(model)
    for name, call in case.calls.items():
        kept = promise(case, model, ours, call, seeds)
        if not kept.ok:  # eager may have had luck with a single number, such as a loss: more draws tell
            kept = promise(case, model, ours, call, 4 * seeds)
        assert kept.ok, f"{name}: {kept.broken()}"


@pytest.mark.parametrize("training", [False, True])
@every_case
def test_float64(case, training):
    """The same but for the order of sums; in training as well, where no unit is dropped."""
    model = case.model(training=training)
    ours, inputs = accelerated(model), case.draw(0)
    for call in case.calls.values():
        got, expected = step(ours, call, inputs), step(model, call, inputs)
        assert kind(got[0]) == kind(expected[0])
        got, expected = results(*got), results(*expected)
        assert got.keys() == expected.keys()
        for name, t in got.items():
            loose = case is CASES[IMPRECISE] or expected[name].dtype == torch.float32
            tolerance = 1e-6 if loose else 1e-10
            torch.testing.assert_close(_finite(t), _finite(expected[name]), rtol=tolerance, atol=tolerance)


# Dropout

DROPPED = ("clam-net-gated", "clam-sb", "clam-mb", "dsmil", "torchmil-dsmil-nonlinear", "millab-abmil-plain")
DROPPED += ("millab-abmil", "millab-dsmil", "trident", "trident-branches", "trident-encoder", "millab-clam")
DROPPED += ("clam-deep", "loss-attention", "torchmil-abmil-embedding")


@pytest.mark.parametrize("name", DROPPED)
def test_dropped_units_are_the_same_on_every_backend(name, monkeypatch):
    """Those of the layers that are called as they are, and after them those of the op, by the seed."""
    case, calls = CASES[name], counted(monkeypatch)
    ours, inputs = accelerated(case.model()).train(), case.draw(0)

    def run(backend, seed):
        torch.manual_seed(seed)
        calls.clear()
        with milkernels.use_backend(backend):
            found = results(*step(ours, case.calls["plain"], inputs))
        assert calls
        return found

    native, reference, other = run("native", 5), run("reference", 5), run("native", 6)
    assert native.keys() == reference.keys()
    for key, t in native.items():
        torch.testing.assert_close(t, reference[key], rtol=1e-9, atol=1e-9)
    assert any(not torch.equal(t, other[key]) for key, t in native.items())


def constant_network(network: nn.Module, p: float) -> nn.Module:
    """Each head is one unit, which is the same for every instance."""
    for name, t in network.named_parameters():
        nn.init.zeros_(t)
        if name in ("module.3.weight", "attention_c.weight"):
            nn.init.eye_(t)
        elif name.endswith("0.bias"):
            nn.init.constant_(t, 1.0)
    for m in network.modules():
        if isinstance(m, nn.Dropout):
            m.p = p
    return network.double()


@pytest.mark.parametrize("make, branches", [(up.AttnNet, 1), (up.AttnNetGated, 2)])
def test_share_of_dropped_units(make, branches, monkeypatch):
    units, rows, p = 16, 4000, 0.3
    ours = accelerated(constant_network(make(8, units, True, units), p))
    x, calls = torch.zeros(rows, 8, dtype=torch.float64), counted(monkeypatch)
    whole = ours.eval()(x)[0]
    dropped = ours.train()(x)[0]
    assert len(calls) == 2
    kept = dropped != 0
    share, expected = kept.double().mean().item(), (1 - p) ** branches
    assert abs(share - expected) < 5 * (expected * (1 - expected) / kept.numel()) ** 0.5
    torch.testing.assert_close(dropped[kept], (whole / (1 - p) ** branches)[kept], rtol=1e-4, atol=0)
    columns = kept.double().mean(0)  # no unit is dropped more than others
    assert (columns - expected).abs().max() < 5 * (expected * (1 - expected) / rows) ** 0.5


def test_share_of_dropped_values(monkeypatch):
    """One instance has weight 1: the bag is its dropped features."""
    width, p = 1500, 0.3
    stream = up.BClassifier(width, 1, dropout_v=p, passing_v=True, units=4)
    with torch.no_grad():
        nn.init.eye_(stream.v[1].weight)
        nn.init.zeros_(stream.v[1].bias)
    ours, calls = accelerated(stream).train(), counted(monkeypatch)
    bag = ours(torch.ones(1, width), torch.ones(1, 1))[2].flatten()
    assert calls == ["dsmil_pool"]
    kept = bag != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / width) ** 0.5
    torch.testing.assert_close(bag[kept], torch.full_like(bag[kept], 1 / (1 - p)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("change", ["one in eval", "another share"])
@pytest.mark.parametrize("name", ["clam-net-gated", "clam-sb", "millab-abmil", "trident"])
def test_branches_that_drop_differently_are_left_to_the_model(name, change):
    case = CASES[name]
    model, inputs = case.model().train(), case.draw(0)
    ours = accelerated(model)
    for m in (model, ours):
        dropout = [d for d in m.modules() if isinstance(d, nn.Dropout)][-1]
        if change == "one in eval":
            dropout.eval()
        else:
            dropout.p = 0.5
    found = []
    for m in (model, ours):
        torch.manual_seed(2)
        found.append(results(*step(m, case.calls["plain"], inputs)))
    for key, t in found[0].items():
        assert torch.equal(t, found[1][key]), key


def test_every_dropout_has_its_own_mode():
    """All of the gate in eval, the model in training, and the other way round."""
    case = CASES["clam-net-gated"]
    ours, inputs = accelerated(case.model()).train(), case.draw(0)
    whole = case.model()(inputs["x"])[0]
    for m in ours.modules():
        m.training = not isinstance(m, nn.Dropout)
    torch.testing.assert_close(ours(inputs["x"])[0], whole)
    for m in ours.modules():
        m.training = isinstance(m, nn.Dropout)
    assert not torch.allclose(ours(inputs["x"])[0], whole)


def test_the_report_says_what_stays_in_training():
    model = up.AttnNetGated(L, D, True)
    model.attention_b[2].p = 0.5
    (entry,) = milkernels.accelerate(model.eval(), min_instances=0).changed
    assert "in training its own methods run" in entry.remark and "0.25 and 0.5" in entry.remark
    assert not model.training and not model.attention_b[2].training


# Padding: rows of a bag, and of the batch where they are padding


def rows_of_camil(m, x, mask):
    bag, scores = m(x, x[..., :7] * 2, mask, return_att=True)
    return [bag], [(scores, -torch.inf)]


def rows_of_pool(m, x, mask):
    bag, scores = m(x, mask, return_att=True)
    return [bag], [(scores, -torch.inf)]


def rows_of_dsmil(m, x, mask):
    predicted, weights, logits = m(x, mask, True, True)
    return [predicted], [(weights, 0.0), (logits, -torch.inf)]


def rows_of_millab_abmil(m, x, mask):
    bag, found = m.forward_features(x, attn_mask=mask if mask is None else mask.double())
    return [bag], [(found["attention"].mT, -torch.inf)]


def rows_of_millab_dsmil(m, x, mask):
    bag, found = m.forward_features(x, mask if mask is None else mask.double(), True)
    return [bag], [(found["attention"], 0.0), (found["instance_classes"], -torch.inf)]


def rows_of_trident(m, x, mask):
    bag, scores = m(x, mask)
    return [bag], [(scores.movedim(-1, 1), -torch.inf)]


def rows_of_slideflow(m, x, mask):
    lens = torch.full((len(x),), x.shape[1]) if mask is None else mask.sum(1)
    predicted, weights = m(x, lens, return_attention=True)
    return [predicted], [(weights, 0.0), (m.calculate_attention(x, lens, apply_softmax=False), -torch.inf)]


NAN_IS_EMBEDDED = ("torchmil-abmil-embedding", "slideflow")  # by layers of the model, before its pooling
PADDED = {
    "torchmil-pool": rows_of_pool,
    "torchmil-pool-gelu-gated": rows_of_pool,
    "torchmil-abmil": rows_of_pool,
    "torchmil-abmil-embedding": rows_of_pool,
    "torchmil-clam": rows_of_pool,
    "torchmil-clam-embedding": rows_of_pool,
    "torchmil-camil-gated": rows_of_camil,
    "torchmil-dsmil": rows_of_dsmil,
    "torchmil-dsmil-nonlinear": rows_of_dsmil,
    "torchmil-dsmil-embedding": rows_of_dsmil,
    "millab-abmil": rows_of_millab_abmil,
    "millab-dsmil": rows_of_millab_dsmil,
    "trident": rows_of_trident,
    "trident-branches": rows_of_trident,
    "slideflow": rows_of_slideflow,
    "slideflow-temperature": rows_of_slideflow,
}
PREFIX = torch.arange(12) < torch.tensor([12, 5, 9])[:, None]
EMPTY = PREFIX & torch.tensor([True, False, True])[:, None]


def one_by_one(case, method, x, mask):
    """Each bag alone, without padding, by the model's own methods: outputs and the gradients of their sum."""
    model, bags = case.model(), []
    for bag, real in zip(x, mask, strict=True):
        bags.append(method(model, bag[real][None], None) if real.any() else None)
    total = sum(squares(t) for bag in bags if bag for t in (*bag[0], *(t for t, _ in bag[1])))
    return bags, torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True)


def squares(t):
    return t.masked_fill(t.isinf(), 0).square().sum()


MASKS = {"prefix": PREFIX, "holes": HOLES, "empty": EMPTY}
PADDINGS = [
    (name, mask, poison)
    for name in PADDED
    for mask in MASKS
    for poison in ((NAN, 1e4, -1e4) if "dsmil" in name else (NAN,))  # the sign decides what is critical
    if not ("slideflow" in name and mask == "holes")  # it takes lengths
]


@pytest.mark.parametrize("name, mask, poison", PADDINGS)
def test_padding_is_as_if_absent(name, mask, poison):
    """Whatever it holds: NaN, and what would be the critical instance of DSMIL."""
    case, method, mask = CASES[name], PADDED[name], MASKS[mask]
    if name.startswith(NAN_IS_EMBEDDED) and poison != poison:
        poison = 1e3
    x = torch.where(mask[..., None], case.draw(0)["x"].detach(), poison).requires_grad_()
    expected, gradients = one_by_one(case, method, x, mask)
    ours = accelerated(case.model())
    per_bag, per_row = method(ours, x, mask)
    for i, (bag, real) in enumerate(zip(expected, mask, strict=True)):
        for t, fill in per_row:
            assert t[i, ~real].eq(fill).all()
        if bag is None:
            assert all(t[i].isfinite().all() for t in per_bag)
            continue
        for t, alone in zip(per_bag, bag[0], strict=True):
            torch.testing.assert_close(t[i], alone[0], rtol=1e-6, atol=1e-9)
        for (t, _), (alone, _) in zip(per_row, bag[1], strict=True):
            torch.testing.assert_close(t[i, real], alone[0], rtol=1e-6, atol=1e-9)
    total = sum(squares(t[mask.any(1)]) for t in (*per_bag, *(t for t, _ in per_row)))
    for got, alone in zip(
        torch.autograd.grad(total, [x, *ours.parameters()], allow_unused=True), gradients, strict=True
    ):
        assert (got is None) == (alone is None)
        if got is not None:
            torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["torchmil-clam", "torchmil-clam-embedding"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_instance_losses_of_clam_are_those_of_each_bag(name, mask):
    case = CASES[name]
    model = case.model()
    x = torch.where(mask[..., None], case.draw(0)["x"].detach(), NAN)
    alone = [model.compute_loss(LABELS[i, None], x[i, real][None]) for i, real in enumerate(mask) if real.any()]
    predicted, losses = accelerated(model).compute_loss(LABELS, x, mask)
    torch.testing.assert_close(losses["InstLoss"], sum(bag["InstLoss"] for _, bag in alone))
    torch.testing.assert_close(predicted[mask.any(1)], torch.cat([p for p, _ in alone]))
    if mask.any(1).all():
        torch.testing.assert_close(losses["BCEWithLogitsLoss"], sum(b["BCEWithLogitsLoss"] for _, b in alone) / 3)


def test_padding_can_be_the_critical_instance_of_the_originals():
    """Of what the two tests above hold the fused methods to, the originals return something else."""
    for name in ("torchmil-dsmil", "millab-dsmil"):
        case = CASES[name]
        found = []
        for poison in (1e4, -1e4):
            x = torch.where(PREFIX[..., None], case.draw(0)["x"], poison)
            found.append(PADDED[name](case.model(), x, PREFIX)[0][0])
        assert not torch.allclose(*found)
