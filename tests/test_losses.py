"""The losses, against their equations written out bag by bag; masks, empty bags, targets that last, and bad input."""

import math

import pytest
import torch
from torch.nn import functional as F
from upstream_models import ClamMB, ClamSB

from milkernels import Bags, Embed, attention_weights, losses
from milkernels.nn import ABMIL, CLAM, DSMILModel, LossAttentionModel

LENGTHS = (3, 0, 1, 6)
OFFSETS = torch.tensor([0, 3, 3, 4, 10])
LABELS = torch.tensor([2, 0, 1, 2])


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(*tensors):
    """Of each bag."""
    return list(zip(*(t.split(LENGTHS) for t in tensors), strict=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("column", [False, True])
def test_instances_against_the_equation(reduction, column):
    logits, weights = rows(10, 4).requires_grad_(), rows(10, seed=1).abs().requires_grad_()
    given = weights[:, None] if column else weights
    loss = losses.instance_cross_entropy(logits, given, LABELS, OFFSETS, reduction=reduction)
    expected = []
    for (z, a), label in zip(parts(logits, weights), LABELS, strict=True):
        terms = -a * (z[:, label] - z.exp().sum(1).log())
        expected.append(terms.sum() / (max(1, len(z)) if reduction == "mean" else 1))
    expected = torch.stack(expected)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert loss[1] == 0
    cotangent = rows(4, seed=2)
    ours = torch.autograd.grad(loss, (logits, weights), cotangent, retain_graph=True)
    theirs = torch.autograd.grad(expected, (logits, weights), cotangent)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_masked_instances_are_not_there():
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    offsets = torch.tensor([0, 2, 2, 3, 7])
    logits, weights = rows(10, 4), rows(10, seed=1).abs()
    for reduction in ("sum", "mean"):
        wanted = losses.instance_cross_entropy(logits[mask], weights[mask], LABELS, offsets, reduction=reduction)
        spoilt = torch.where(mask[:, None], logits, -math.inf).requires_grad_()
        nan = torch.where(mask, weights, math.nan).requires_grad_()
        got = losses.instance_cross_entropy(spoilt, nan, LABELS, OFFSETS, mask=mask, reduction=reduction)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(got.sum(), (spoilt, nan))
        assert all(g.isfinite().all() and (g[~mask] == 0).all() for g in gradients)
    targets = torch.where(mask, weights + 1, math.nan)
    squares = losses.consistency(nan, targets, OFFSETS, mask=mask)
    torch.testing.assert_close(squares, torch.tensor([2.0, 0, 1, 4], dtype=torch.float64))


def test_consistency_against_the_equation():
    weights, targets = rows(10).requires_grad_(), rows(10, seed=1).requires_grad_()
    loss = losses.consistency(weights, targets, OFFSETS)
    torch.testing.assert_close(loss, torch.stack([((a - t) ** 2).sum() for a, t in parts(weights, targets)]))
    loss.sum().backward()
    torch.testing.assert_close(weights.grad, 2 * (weights - targets).detach())
    assert targets.grad is None
    assert losses.consistency(weights[:3], targets[:3]).shape == (1,)


def test_ramp_up():
    values = [losses.ramp_up(epoch, 40, 2.0) for epoch in range(60)]
    assert values[0] == pytest.approx(2 * math.exp(-5)) and values[20] == pytest.approx(2 * math.exp(-5 / 4))
    assert values == sorted(values) and set(values[40:]) == {2.0}


# Targets


def test_targets_follow_the_equation():
    ensemble, first, second = losses.WeightEnsemble(0.6), rows(10), rows(10, seed=1)
    keys = ["a", "b", 7, ("c", 1)]
    torch.testing.assert_close(ensemble.targets(keys, first[:, None], OFFSETS), first)  # nothing to differ from yet
    ensemble.update(keys, first, OFFSETS)
    torch.testing.assert_close(ensemble.targets(keys, second, OFFSETS), first)
    ensemble.update(keys, second, OFFSETS)
    z = 0.6 * (0.4 * first) + 0.4 * second
    torch.testing.assert_close(ensemble.targets(keys, second, OFFSETS), z / (1 - 0.6**2))
    other = ensemble.targets([7, "a"], torch.cat([first[3:4], first[:3]]), torch.tensor([0, 1, 4]))
    torch.testing.assert_close(other, torch.cat([z[3:4], z[:3]]) / (1 - 0.6**2))
    assert len(ensemble) == 4 and not other.requires_grad


def test_targets_last_on_disk(tmp_path):
    ensemble, weights = losses.WeightEnsemble(0.3), rows(4)
    ensemble.update([0, 1], weights, torch.tensor([0, 1, 4]))
    torch.save(ensemble.state_dict(), tmp_path / "targets.pt")
    again = losses.WeightEnsemble()
    again.load_state_dict(torch.load(tmp_path / "targets.pt"))
    assert again.beta == 0.3
    torch.testing.assert_close(again.targets([1], weights[1:]), weights[1:])


def test_a_refused_update_changes_nothing():
    ensemble = losses.WeightEnsemble()
    ensemble.update(["a"], rows(3))
    before = ensemble.state_dict()
    for keys, weights, offsets, message in (
        (["b", "a"], rows(4), torch.tensor([0, 2, 4]), "bag 'a' had 3 instances before; got 2"),
        (["a", "a"], rows(4), torch.tensor([0, 2, 4]), "keys must differ"),
        (["a"], rows(4), torch.tensor([0, 2, 4]), "keys must name every bag, 2; got 1"),
        (["a"], rows(3, 2), None, "weights must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ensemble.update(keys, weights, offsets)
        with pytest.raises(ValueError, match=message):
            ensemble.targets(keys, weights, offsets)
        assert ensemble.state_dict()["bags"].keys() == before["bags"].keys()
        assert ensemble.state_dict()["bags"]["a"][0] == 1


# Whole losses


def loss_attention():
    torch.manual_seed(0)
    return LossAttentionModel(5, 3, (8,), dtype=torch.float64), rows(10, 5)


@pytest.mark.parametrize("instances", ["sum", "mean"])
def test_loss_attention_against_eq_7(instances):
    model, x = loss_attention()
    prediction = model(x, OFFSETS)
    targets = rows(10, seed=3).softmax(0)
    options = {"lambda_": 0.7, "instances": instances, "targets": targets, "omega": 0.3}
    loss = losses.loss_attention_loss(prediction, LABELS, OFFSETS, **options)
    expected = []
    h, layer = model.embed(x), model.attention
    for (hidden, target), label in zip(parts(h, targets), LABELS, strict=True):
        z = hidden @ layer.weight.T + layer.bias
        e = z.exp().sum(1)
        alpha = e / e.sum()
        bag = alpha @ hidden @ layer.weight.T + layer.bias
        l1 = F.cross_entropy(bag[None], label[None])
        l2 = -(alpha * z.log_softmax(1)[:, label]).sum() / (max(1, len(z)) if instances == "mean" else 1)
        expected.append(l1 + 0.7 * l2 + 0.3 * ((alpha - target) ** 2).sum())
    expected = torch.stack(expected).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, parameters), rtol=1e-8, atol=1e-12)


def test_loss_attention_without_its_terms():
    model, x = loss_attention()
    prediction = model(x, OFFSETS)
    plain = losses.loss_attention_loss(prediction, LABELS, OFFSETS, lambda_=0.0)
    torch.testing.assert_close(plain, F.cross_entropy(prediction.logits, LABELS))
    alone = model(x[4:], None)
    one = losses.loss_attention_loss(alone, LABELS[3:])
    weights = attention_weights(alone.pooled)
    two = F.cross_entropy(alone.logits, LABELS[3:])
    two = two + 0.1 * losses.instance_cross_entropy(alone.pooled.logits, weights, LABELS[3:])[0]
    torch.testing.assert_close(one, two)


def test_loss_attention_trains_with_masked_rows():
    model, x = loss_attention()
    mask = torch.arange(10) % 3 != 1
    x[~mask] = math.nan
    prediction = model(x, OFFSETS, mask)
    losses.loss_attention_loss(prediction, LABELS, OFFSETS, mask=mask, lambda_=2.0).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("classes", [1, 3])
def test_dsmil_streams(classes):
    torch.manual_seed(0)
    model = DSMILModel(5, classes, dtype=torch.float64)
    prediction = model(rows(10, 5), OFFSETS)
    labels = (rows(4, classes, seed=1) > 0).double()
    there = torch.tensor([0, 2, 3])  # the second bag is empty
    of_bag = F.binary_cross_entropy_with_logits(prediction.bag_logits, labels)
    of_instance = F.binary_cross_entropy_with_logits(prediction.instance_logits[there], labels[there])
    wanted = {"bag": of_bag, "instance": of_instance, "both": (of_bag + of_instance) / 2}
    wanted["score"] = F.binary_cross_entropy_with_logits(prediction.logits, labels)
    for streams, expected in wanted.items():
        loss = losses.dsmil_loss(prediction, labels if classes > 1 else labels[:, 0].long(), streams)
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)
    instance_only = torch.autograd.grad(
        losses.dsmil_loss(prediction, labels, "instance"), list(model.parameters()), allow_unused=True
    )
    reached = {
        name for (name, _), g in zip(model.named_parameters(), instance_only, strict=True) if g is not None and g.any()
    }
    assert reached == {"streams.weight", "streams.bias"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, a, y: losses.instance_cross_entropy(z, a, y, OFFSETS, reduction="max"), "reduction must be one of"),
        (lambda z, a, y: losses.instance_cross_entropy(z, a, y[:2], OFFSETS), r"labels must be int64 \[4\]; got"),
        (lambda z, a, y: losses.instance_cross_entropy(z, a, y.float(), OFFSETS), "labels must be int64"),
        (lambda z, a, y: losses.instance_cross_entropy(z, a[:3], y, OFFSETS), r"weights must be \[10\]"),
        (lambda z, a, y: losses.instance_cross_entropy(z, a, y, OFFSETS + 1), "offsets must start at 0; got 1"),
        (lambda z, a, y: losses.consistency(a, a[:4], OFFSETS), r"targets must be \[10\]"),
        (lambda z, a, y: losses.ramp_up(1, 0), "length must be more than 0 epochs; got 0"),
        (lambda z, a, y: losses.ramp_up(-1, 5), "epoch must be at least 0; got -1"),
        (lambda z, a, y: losses.WeightEnsemble(1.0), r"beta must be in \[0, 1\); got 1.0"),
        (
            lambda z, a, y: losses.loss_attention_loss(
                loss_attention()[0](z[:, :1].expand(10, 5), OFFSETS), y, OFFSETS, omega=1.0
            ),
            "targets=None",
        ),
        (lambda z, a, y: losses.dsmil_loss(DSMILModel(4, 2, dtype=z.dtype)(z, OFFSETS), y), r"labels must be \[4, 2\]"),
        (
            lambda z, a, y: losses.dsmil_loss(DSMILModel(4, 1, dtype=z.dtype)(z, OFFSETS), y, "one"),
            "streams must be one of",
        ),
    ],
)
def test_bad_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows(10, 4), rows(10).abs(), LABELS)


# Half types


def half(t):
    return t.detach().half().requires_grad_()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_many_instances_in_float16(reduction):
    """A count of 70,000 is infinite in float16, and so is their sum."""
    n = 70_000
    logits, weights = half(torch.zeros(n, 2)), torch.ones(n, dtype=torch.float16)
    loss = losses.instance_cross_entropy(logits, weights, torch.tensor([1]), reduction=reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([math.log(2) * (n if reduction == "sum" else 1)]))
    loss.sum().backward()
    assert logits.grad.dtype == torch.float16 and logits.grad.any()


def test_small_weights_in_float16():
    """Their squares are 0 in float16, and so is a tenth of a share of them."""
    weights, targets = half(torch.full((1000,), 1e-4)), torch.full((1000,), 2e-4).half()
    loss = losses.consistency(weights, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([1000 * 1e-8]), rtol=0.02, atol=0)
    loss.sum().backward()
    assert weights.grad.dtype == torch.float16
    ensemble, tiny = losses.WeightEnsemble(0.99), torch.full((5,), 2e-6).half()
    for _ in range(3):
        ensemble.update(["a"], tiny)
    torch.testing.assert_close(ensemble.targets(["a"], tiny), tiny.float())


def test_whole_losses_in_float16():
    torch.manual_seed(0)
    model, x = LossAttentionModel(5, 3, (8,)).half(), rows(10, 5).half()
    prediction = model(x, OFFSETS)
    loss = losses.loss_attention_loss(prediction, LABELS, OFFSETS, lambda_=0.7)
    wide = prediction._replace(logits=prediction.logits.float())
    assert loss.dtype == torch.float32 and loss == losses.loss_attention_loss(wide, LABELS, OFFSETS, lambda_=0.7)
    prediction = DSMILModel(5, 3).half()(x, OFFSETS)
    labels = (rows(4, 3, seed=1) > 0).long()
    for streams in ("both", "instance", "bag", "score"):
        loss = losses.dsmil_loss(prediction, labels, streams)
        wide = type(prediction)(*(t.float() for t in prediction[:3]), prediction.pooled)
        assert loss.dtype == torch.float32 and loss == losses.dsmil_loss(wide, labels, streams)


@pytest.mark.parametrize("wrong", [-1, 4, -100])
def test_labels_that_are_no_classes(wrong):
    labels = torch.tensor([2, 0, wrong, 2])
    message = rf"labels must be in \[0, 4\); got {wrong}"
    with pytest.raises(ValueError, match=message):
        losses.instance_cross_entropy(rows(10, 4), rows(10), labels, OFFSETS)
    graph = torch.compile(losses.instance_cross_entropy, backend="eager", fullgraph=True)
    traced = graph(rows(10, 4), rows(10), labels, OFFSETS)  # which reads no values
    assert traced[2].isnan()
    torch.testing.assert_close(traced[3:], losses.instance_cross_entropy(rows(10, 4)[4:], rows(10)[4:], LABELS[3:]))


# CLAM

CLAM_OFFSETS = torch.tensor([0, 30, 30, 33, 57])
CLAM_LENGTHS = (30, 0, 3, 24)
CLAM_LABELS = torch.tensor([2, 0, 1, 0])


def surrogate(logits, target, margin, temperature):
    """The smooth top-1 SVM of two classes, as Berrada et al. have it: a log-sum-exp over the classes."""
    wrong = torch.arange(2) != target
    return temperature * ((logits + margin * wrong) / temperature).logsumexp(-1) - logits[target]


def clam_by_hand(h, scores, weight, bias, k, exclusive, margin, temperature):
    """The equations of the Methods of Lu et al., bag by bag and instance by instance."""
    losses_of_bags = []
    for bag, a, label in zip(h.split(CLAM_LENGTHS), scores.split(CLAM_LENGTHS), CLAM_LABELS.tolist(), strict=True):
        of_classes = []
        for c in range(3):
            order = a[:, c % a.shape[1]].argsort(descending=True).tolist()
            pairs = [(i, 1 if c == label else 0) for i in order[:k]]
            pairs += [(i, 0) for i in order[-k:]] if c == label else []
            logits = [bag[i] @ weight[2 * c : 2 * c + 2].T + bias[2 * c : 2 * c + 2] for i, _ in pairs]
            terms = [surrogate(z, t, margin, temperature) for z, (_, t) in zip(logits, pairs, strict=True)]
            of_classes.append(sum(terms) / max(1, len(terms)) if terms else bag.sum())
        losses_of_bags.append(sum(of_classes) / 3 if exclusive else of_classes[label])
    return torch.stack(losses_of_bags)


@pytest.mark.parametrize(("margin", "temperature"), [(1.0, 1.0), (0.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_clam_against_the_equations(heads, exclusive, margin, temperature):
    h, scores = rows(57, 5).requires_grad_(), rows(57, heads, seed=1)
    weight, bias = rows(6, 5, seed=2).requires_grad_(), rows(6, seed=3).requires_grad_()
    options = {"k": 4, "exclusive": exclusive, "margin": margin, "temperature": temperature}
    ours = losses.clam_instance_loss(h, scores, (weight, bias), CLAM_LABELS, CLAM_OFFSETS, **options)
    theirs = clam_by_hand(h, scores, weight, bias, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert ours[1] == 0
    cotangent = rows(4, seed=4)
    ours, theirs = (torch.autograd.grad(loss, (h, weight, bias), cotangent) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_cross_entropy_is_the_surrogate_without_a_margin():
    logits = rows(2)
    for target in (0, 1):
        torch.testing.assert_close(surrogate(logits, target, 0.0, 1.0), F.cross_entropy(logits, torch.tensor(target)))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("branches", [False, True])
def test_clam_as_its_code_has_it(branches, exclusive):
    """Against a stand-in for CLAM_SB and CLAM_MB, with its cross-entropy, on bags of at least k instances."""
    theirs = (ClamMB if branches else ClamSB)(n_classes=3, k_sample=4, sizes=(6, 5, 4), subtyping=exclusive).double()
    model = CLAM(6, 3, 5, 4, multi_branch=branches, k=4, dropout=0.25, dtype=torch.float64).eval()
    theirs.eval()
    embed, _, _, network = theirs.attention_net
    network = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
    attention = model.attention
    pairs = [(model.embed[0].weight, embed.weight), (model.embed[0].bias, embed.bias)]
    for prefix, layer in zip("vuw", network, strict=True):
        pairs += [(getattr(attention, f"{prefix}_{name}"), getattr(layer, name)) for name in ("weight", "bias")]
    lasts = theirs.classifiers if branches else [theirs.classifiers]
    pairs += [(getattr(model.classifier, n), torch.cat([getattr(c, n) for c in lasts])) for n in ("weight", "bias")]
    instance = theirs.instance_classifiers
    pairs += [
        (getattr(model.instance_classifier, n), torch.cat([getattr(c, n) for c in instance]))
        for n in ("weight", "bias")
    ]
    with torch.no_grad():
        for ours, other in pairs:
            ours.copy_(other)
    x, offsets, labels = rows(40, 6), torch.tensor([0, 9, 40]), torch.tensor([1, 2])
    prediction = model(x, offsets)
    loss = losses.clam_loss(prediction, labels, bag_weight=0.6, exclusive=exclusive, margin=0.0)
    expected = []
    for b, label in enumerate(labels):
        logits, _, _, scores, results = theirs(x[offsets[b] : offsets[b + 1]], label, instance_eval=True)
        torch.testing.assert_close(prediction.logits[b : b + 1], logits.to(torch.float64), rtol=1e-6, atol=1e-6)
        bag = F.cross_entropy(prediction.logits[b], label)
        expected.append(0.6 * bag + 0.4 * results["instance_loss"])
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-12, atol=0)
    own = losses.clam_instance_loss(
        model.embed[0](x).relu(), prediction.pooled.scores, model.instance_classifier, labels, offsets, k=4,
        exclusive=exclusive, margin=0.0,
    )  # fmt: skip
    behind = losses.clam_instance_loss(
        Bags(x, offsets), prediction.pooled.scores, model.instance_classifier, labels, k=4,
        exclusive=exclusive, margin=0.0, embed=Embed(model.embed[0]),
    )  # fmt: skip
    torch.testing.assert_close(own, behind, rtol=1e-12, atol=0)
    of_bag = F.cross_entropy(prediction.logits, labels)
    torch.testing.assert_close(0.6 * of_bag + 0.4 * own.mean(), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("embed", [False, True])
def test_masked_instances_are_not_classified(embed):
    mask = torch.rand(57, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[0], mask[30:33] = False, False
    x, scores, classifier = rows(57, 5), rows(57, 1, seed=1), rows(6, 5 - embed, seed=2).requires_grad_()
    layer = rows(4, 5, seed=5).requires_grad_()
    options = {"k": 3, "exclusive": True, "embed": Embed(layer) if embed else None}
    counts = torch.stack([m.sum() for m in mask.split(CLAM_LENGTHS)])
    offsets = F.pad(counts.cumsum(0), (1, 0))
    wanted = losses.clam_instance_loss(x[mask], scores[mask], classifier, CLAM_LABELS, offsets, **options)
    spoilt = torch.where(mask[:, None], x, math.nan)
    got = losses.clam_instance_loss(spoilt, scores, classifier, CLAM_LABELS, CLAM_OFFSETS, mask=mask, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    leaves = (classifier, layer) if embed else (classifier,)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), leaves))
    nothing = losses.clam_instance_loss(
        spoilt, scores, classifier, CLAM_LABELS, CLAM_OFFSETS, mask=torch.zeros_like(mask), **options
    )
    assert (nothing == 0).all() and all(g.isfinite().all() for g in torch.autograd.grad(nothing.sum(), leaves))
    none = losses.clam_instance_loss(x[:0], scores[:0], classifier, CLAM_LABELS[:1], **options)
    assert none.tolist() == [0]


def test_clam_drops_the_same_units_in_both_places():
    """A bag of one instance: its bag vector is that instance as it was embedded, and so are its logits made of it."""
    torch.manual_seed(0)
    model = CLAM(6, 3, 40, 4, k=2, dropout=0.5, dtype=torch.float64)
    prediction = model(rows(1, 6))
    assert (prediction.pooled.bag == 0).double().mean() > 0.3
    expected = model.instance_classifier(prediction.pooled.bag[0]).view(3, 2)
    torch.testing.assert_close(prediction.instance_logits[0, :, 0, 0], expected)
    torch.testing.assert_close(prediction.instance_logits[0, :, 1, 0], expected)
    assert prediction.instances.tolist() == [[[[0, -1], [0, -1]]]] and not prediction.instance_logits[..., 1, :].any()


def test_clam_refuses():
    x, scores, classifier = rows(57, 5), rows(57, 1), rows(6, 5)
    good = {"x": x, "scores": scores, "classifier": classifier, "labels": CLAM_LABELS, "offsets": CLAM_OFFSETS}
    for change, said in [
        ({"k": 0}, "k must be at least 1; got 0"),
        ({"margin": "1"}, "margin must be a number"),
        ({"temperature": 0.0}, "temperature must be more than 0; got 0.0"),
        ({"exclusive": 1}, "exclusive must be True or False"),
        ({"labels": CLAM_LABELS + 1}, r"labels must be in \[0, 3\)"),
        ({"labels": CLAM_LABELS[:2]}, r"labels must be int64 \[4\]"),
        ({"scores": scores[:5]}, r"scores must be \[57, any\]"),
        ({"scores": rows(57, 2)}, r"scores \[N, 1\] or \[N, C\]; got 6 rows, 2 columns"),
        ({"classifier": classifier[:5]}, r"classifier must be \[2 C, L\].*got 5 rows"),
        ({"classifier": rows(6, 4)}, "classifier.weight must be"),
    ]:
        with pytest.raises((TypeError, ValueError), match=said):
            losses.clam_instance_loss(**(good | change))
    with pytest.raises(TypeError, match="prediction must be a CLAMPrediction"):
        losses.clam_loss(ABMIL(5, 3)(torch.randn(4, 5)), CLAM_LABELS[:1])
    prediction = CLAM(5, 3, k=1)(torch.randn(4, 5))
    with pytest.raises(ValueError, match="bag_weight must be between 0 and 1; got 2"):
        losses.clam_loss(prediction, CLAM_LABELS[:1], bag_weight=2)
