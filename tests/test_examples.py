"""The examples: their data, their models in both ways of writing them, and their training."""

import contextlib
import copy
import dataclasses
import gzip
import struct

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("sklearn")

from example_cases import WIDTH, toy, write_npz  # noqa: E402

from examples import (  # noqa: E402
    cuda_graphs,
    data,
    recipes,
    self_attention,
    slide_bag,
    train_classic,
    train_encoder,
    train_mnist_bags,
    train_published,
    train_svm,
    training,
)
from examples.recipes import Batch, Settings  # noqa: E402

LENGTHS = (3, 1, 7, 4, 2, 9)

# Every recipe, on narrow features and without dropout, so that it says the same twice.
SMALL = {
    "attention": recipes.attention((8, 6), 0.0, gated=False),
    "gated-attention": recipes.attention((8, 6), 0.0, gated=True),
    "gated-attention-features": recipes.attention(None, 0.0, gated=True),
    "dsmil": recipes.dsmil(),
    "dsmil-v1": recipes.dsmil_v1((8, 6), 0.0),
    "loss-attention": recipes.loss_attention((8, 6), 0.0, None, 0.3),
    "loss-attention-mean": recipes.loss_attention((8, 6), 0.0, None, 0.3, instances="mean"),
    "loss-attention-consistent": recipes.loss_attention((8, 6), 0.0, None, 0.3, omega=2.0, ramp=2),
    **recipes.poolings((8, 6), 0.0),
    **recipes.minets(0.0),
    "self-attention": recipes.self_attention((8, 6), 0.0),
    "self-attention-gaussian": recipes.self_attention((8, 6), 0.0, "gaussian"),
}
EAGER = [name for name, recipe in SMALL.items() if recipe.eager]


# Data


def write_uci(path, bags, labels):
    lines = []
    for b, (bag, label) in enumerate(zip(bags, labels.tolist(), strict=True)):
        for i, row in enumerate(bag.tolist()):
            lines.append(",".join([f"M-{b}", f"M-{b}_{i}", *(repr(v) for v in row), f"{label}."]))
    path.write_text("\n".join(lines) + "\n")


def write_svm(path, bags, labels):
    lines, number = ["# instance:bag:label"], 0
    for b, (bag, label) in enumerate(zip(bags, labels.tolist(), strict=True)):
        for row in bag.tolist():
            pairs = " ".join(f"{i + 1}:{v!r}" for i, v in enumerate(row) if v)
            lines.append(f"{number}:{b}:{2 * label - 1} {pairs}")
            number += 1
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("name", "file", "write"),
    [
        ("musk1", "musk1.npz", write_npz),
        ("musk1", "clean1.data", write_uci),
        ("musk2", "clean2.data", write_uci),
        ("fox", "fox.svm", write_svm),
        ("musk1", "musk1norm.svm", write_svm),
    ],
)
def test_public_formats_hold_the_same_bags(name, file, write, tmp_path):
    made = toy(7)
    made.bags.values[0, 1] = 0.0  # left out of a sparse file
    write(tmp_path / file, made.bags, made.labels)
    read = data.classic(tmp_path, name)
    assert torch.equal(read.bags.values, made.bags.values) and read.bags.values.dtype == torch.float32
    assert torch.equal(read.bags.offsets, made.bags.offsets) and torch.equal(read.labels, made.labels)


def test_missing_and_broken_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bags of musk1 in .*clean1\.data"):
        data.classic(tmp_path, "musk1")
    np.savez(tmp_path / "fox.npz", features=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"fox\.npz must hold.*'labels', 'offsets'"):
        data.classic(tmp_path, "fox")
    with pytest.raises(FileNotFoundError, match="no MNIST in .*train-images-idx3-ubyte"):
        data.mnist(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\1\2\3\4")
    with pytest.raises(ValueError, match="train-images.*must begin"):
        data.mnist(tmp_path, "train")


def test_features_are_standardised_by_the_training_bags_alone():
    made = toy()
    x = made.bags.values
    x[:, 4] = 3.0 + 1e-7 * torch.randn(len(x))  # constant but for rounding
    train, test = made.take(range(40)), made.take(range(40, 60))
    first, second = data.standardised(train.bags, test.bags)
    rest = [i for i in range(WIDTH) if i != 4]
    torch.testing.assert_close(first.values.mean(0), torch.zeros(WIDTH), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.values[:, rest].std(0, correction=0), torch.ones(WIDTH - 1))
    assert not first.values[:, 4].any() and not second.values[:, 4].any()
    mean, deviation = train.bags.values.mean(0), train.bags.values.std(0, correction=0)
    torch.testing.assert_close(second.values[:, rest], ((test.bags.values - mean) / deviation)[:, rest])
    assert torch.equal(second.offsets, test.bags.offsets)


def digits(count=300, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return data.Digits(torch.rand(count, 784, generator=rng), torch.arange(count) % 10)


def test_digit_bags_are_as_in_the_paper():
    some = digits()
    drawn = data.digit_bags(some, 400, 10, 2, seed=3)
    held = [(labels == 9).any().item() for labels in some.labels[drawn.indices].split(drawn.lengths)]
    assert held == [bool(label) for label in drawn.labels] == [i % 2 == 0 for i in range(400)]
    lengths = torch.tensor(drawn.lengths, dtype=torch.float)
    assert abs(lengths.mean() - 9.5) < 0.4 and abs(lengths.std() - 2) < 0.3, "normal, rounded down"
    again, other = (data.digit_bags(some, 400, 10, 2, seed=s) for s in (3, 4))
    assert torch.equal(again.indices, drawn.indices) and not torch.equal(other.indices, drawn.indices)
    assert min(data.digit_bags(some, 50, 1, 5, seed=0).lengths) == 1
    bags, labels = data.pictures(some, drawn)
    assert torch.equal(bags.values, some.images[drawn.indices]) and torch.equal(labels, drawn.labels)
    assert torch.equal(bags.extras["digits"], some.labels[drawn.indices])


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files(packed, tmp_path):
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    for name, values in (("images-idx3", images), ("labels-idx1", torch.arange(5, dtype=torch.uint8))):
        content = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
        content += values.numpy().tobytes()
        path = tmp_path / f"train-{name}-ubyte"
        if packed:
            path = path.with_name(path.name + ".gz")
            content = gzip.compress(content)
        path.write_bytes(content)
    read = data.mnist(tmp_path, "train")
    assert read.labels.tolist() == list(range(5))
    torch.testing.assert_close(read.images.view(5, 28, 28), (images / 255 - 0.1307) / 0.3081)


def test_simulated_slides():
    positive, negative = (slide_bag.simulate(4000, 64, label, seed=5) for label in (1, 0))
    for slide in (positive, negative):
        n = len(slide.features)
        assert abs(n - 4000) < 200 and slide.features.dtype == torch.float16 and (slide.features >= 0).all()
        assert len(slide.coords) == len(slide.lesion) == n and len(slide.coords.unique(dim=0)) == n
        assert not (slide.coords % slide_bag.PATCH).any()
    assert 0.005 < positive.lesion.float().mean() < 0.04 and not negative.lesion.any()
    x = positive.features.float()
    shift = (x[positive.lesion].mean(0) - x[~positive.lesion].mean(0)).sort(descending=True).values
    assert (shift[:24] > 0.4).all() and (shift[24:] < 0.4).all(), "24 features differ"
    cohort = slide_bag.cohort(6, 100, 1000, 64, seed=1)
    assert sorted(s.label for s in cohort) == [0, 0, 0, 1, 1, 1]
    assert sorted(len(s.features) for s in cohort)[0] < 150 and max(len(s.features) for s in cohort) > 850


# Models and losses


def whole_loss(recipe, model, batch, epoch=0):
    """Of a recipe with one stage."""
    ((_, loss),) = recipe.stages(model)
    return loss(model(batch.bags), batch, epoch)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("balanced", [False, True])
def test_eager_models_are_the_same_models(name, balanced):
    """Logits, losses and the gradients of all parameters."""
    recipe, made = SMALL[name], toy(len(LENGTHS)).bags.to(torch.float64)
    labels = torch.tensor([1, 0, 0, 1, 1, 0])
    torch.manual_seed(1)
    model = recipe.model(WIDTH).double()
    weight = torch.tensor(1.7, dtype=torch.float64) if balanced else None
    batch = Batch(made, labels, range(len(labels)), weight)
    loss = whole_loss(recipe, model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    results = [recipe.eager(model, x, label, weight) for x, label in zip(made, labels, strict=True)]
    mean = torch.stack([one for _, one in results]).mean()
    torch.testing.assert_close(torch.stack([logit for logit, _ in results]), recipe.scores[""](model(made)))
    torch.testing.assert_close(mean, loss)
    expected = torch.autograd.grad(mean, list(model.parameters()))
    for (parameter, _), ours, theirs in zip(model.named_parameters(), gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, parameter=parameter: f"{parameter}: {text}")


def test_streams_are_trained_in_turns():
    """Each on the embedding and its own parameters; all belong to one of them."""
    recipe, made = SMALL["dsmil-v1"], toy(8)
    model = recipe.model(WIDTH)
    batch = Batch(made.bags, made.labels, range(8))
    names = {id(p): name for name, p in model.named_parameters()}
    stages = [({names[id(p)] for p in ps}, loss(model(made.bags), batch, 0)) for ps, loss in recipe.stages(model)]
    (of_instances, first), (of_bags, second) = stages
    assert {"streams.weight", "streams.bias"} <= of_instances and not {"streams.weight", "streams.bias"} & of_bags
    assert of_instances & of_bags == {name for name in names.values() if name.startswith("embed.")}
    assert of_instances | of_bags == set(names.values())
    prediction = model(made.bags)
    labels = made.labels.float()
    torch.testing.assert_close(
        first, F.binary_cross_entropy_with_logits(prediction.instance_logits[:, 0], labels), msg="the first stream"
    )
    torch.testing.assert_close(second, F.binary_cross_entropy_with_logits(prediction.bag_logits[:, 0], labels))
    streams = model.streams
    assert (streams.scale, streams.value, streams.nonlinear_query) == (1.0, "linear", False)


def test_consistency_uses_targets_of_earlier_epochs():
    recipe, made = SMALL["loss-attention-consistent"], toy(6)
    torch.manual_seed(0)
    model = recipe.model(WIDTH)
    ((_, loss),) = recipe.stages(model)
    plain = SMALL["loss-attention"].stages(model)[0][1]
    batch = Batch(made.bags, made.labels, range(6))
    prediction = model(made.bags)
    torch.testing.assert_close(loss(prediction, batch, 0), plain(prediction, batch, 0))  # targets are the weights
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    changed = model(made.bags)
    assert loss(changed, batch, 2) > plain(changed, batch, 2) + 1e-4
    fresh = recipe.stages(model)[0][1]
    torch.testing.assert_close(fresh(changed, batch, 2), plain(changed, batch, 2))  # every training run its own


def test_self_attention_is_between_embedding_and_pooling():
    torch.manual_seed(0)
    model, made = self_attention.SelfAttentionABMIL(WIDTH, 2, (8,), 5, kernel="laplace").double(), toy(5).bags
    made = made.to(torch.float64)
    torch.testing.assert_close(model(made).logits, model.abmil(made).logits)  # gamma begins at 0
    model.compare.gamma.data.fill_(0.7)
    h = model.compare(model.abmil.embed(made.values), made.offsets)
    expected = model.abmil.classifier(model.abmil.attention(h).bag[:, 0])
    torch.testing.assert_close(model(made).logits, expected)
    assert not torch.allclose(expected, model.abmil(made).logits)


def test_deep_supervision_is_trained_on_all_its_classifiers():
    recipe, made = SMALL["MI-Net with DS"], toy(6)
    torch.manual_seed(0)
    model = recipe.model(WIDTH)
    prediction, batch = model(made.bags), recipes.Batch(made.bags, made.labels, range(6))
    ((_, loss),) = recipe.stages(model)
    labels = made.labels.float()
    alone = [F.binary_cross_entropy_with_logits(side[:, 0], labels) for side in prediction.side_logits.unbind(1)]
    torch.testing.assert_close(loss(prediction, batch, 0), sum(alone))


# Training


@pytest.fixture(autouse=True)
def one_thread():
    """As in the examples: models are so small that threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SMALL)
def test_every_recipe_learns(name):
    """To order held-out bags; some poolings cannot choose where the threshold lies (a mean of probabilities)."""
    train, test = toy(120), toy(60, seed=1)
    model = training.fit(SMALL[name], Settings(lr=5e-3, epochs=20, bags=8), train.bags, train.labels, 0)
    assert not model.training
    found = training.predict(SMALL[name], model, test.bags, size=16)
    assert set(found) == set(SMALL[name].scores)
    for logits in found.values():
        assert train_mnist_bags.auc(logits, test.labels) > 0.85


@pytest.mark.parametrize("name", EAGER)
def test_ways_train_the_same_model(name):
    """The same mini-batches: rounding apart.  One bag per step: another path to one as good."""
    train, test = toy(120), toy(60, seed=1)
    settings, trained = Settings(lr=3e-3, epochs=4, bags=8, balanced=name == "dsmil"), {}
    for way in training.WAYS:
        model = training.fit(SMALL[name], settings, train.bags.to(torch.float32), train.labels, 3, way=way)
        trained[way] = training.predict(SMALL[name], model, test.bags, way=way)[""]
    torch.testing.assert_close(trained["loop"], trained["ragged"], atol=2e-3, rtol=2e-3)
    assert training.error_and_loss(trained["upstream"], test.labels)[0] < 0.2


def test_training_is_repeatable_and_stops_where_told():
    train = toy()
    recipe, settings = recipes.attention((8, 6), 0.5, gated=True), Settings(epochs=6, cosine=True)
    after: list[torch.Tensor] = []
    whole = training.fit(
        recipe, settings, train.bags, train.labels, 1, after_epoch=lambda m: after.append(m.classifier.weight.clone())
    )
    stopped = training.fit(recipe, settings, train.bags, train.labels, 1, epochs=4)
    other = training.fit(recipe, settings, train.bags, train.labels, 2)
    assert len(after) == 6 and torch.equal(whole.classifier.weight, after[-1])
    assert torch.equal(stopped.classifier.weight, after[3]), "the schedule is that of all epochs"
    assert not torch.equal(other.classifier.weight, whole.classifier.weight)


def test_settings_reach_the_optimiser(monkeypatch):
    """Adam's, for every stage; the learning rate after each epoch; the weight of positive bags."""
    made, seen, rates = toy(40).take([*range(0, 40, 2), *range(1, 20, 2), *range(1, 20, 2)]), [], []
    real = torch.optim.Adam

    class Adam(real):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            seen.append((self, options))

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    settings = Settings(1e-2, 3e-3, 4, 8, (0.4, 0.8), cosine=True, balanced=True)
    weights: list[torch.Tensor | None] = []

    def stages(model):
        def loss(prediction, batch, epoch):
            weights.append(batch.pos_weight)
            return prediction.logits.square().mean()

        return [(list(model.parameters()), loss)]

    recipe = dataclasses.replace(SMALL["attention"], stages=stages)
    labels = torch.tensor([1] * 10 + [0] * 30)
    training.fit(
        recipe, settings, made.bags, labels, 0, after_epoch=lambda m: rates.append(seen[0][0].param_groups[0]["lr"])
    )
    assert seen[0][1] == {"lr": 1e-2, "betas": (0.4, 0.8), "weight_decay": 3e-3, "fused": True}
    assert rates == pytest.approx([1e-2 * (1 + np.cos(np.pi * e / 4)) / 2 for e in (1, 2, 3, 4)])
    assert {float(weight) for weight in weights} == {3.0} and len(weights) == 4 * 5
    training.fit(recipe, dataclasses.replace(settings, balanced=False), made.bags, labels, 0)
    assert weights[-1] is None


def test_every_stage_takes_its_step():
    """All parameters of both streams move, and models are looked at in evaluation mode."""
    made, recipe, modes = toy(8), recipes.dsmil_v1((8, 6), 0.5), []
    torch.manual_seed(4)
    before = {name: p.clone() for name, p in recipe.model(WIDTH).named_parameters()}
    settings = Settings(weight_decay=0.0, epochs=1, bags=8)
    after = training.fit(recipe, settings, made.bags, made.labels, 4, after_epoch=lambda m: modes.append(m.training))
    assert modes == [False]
    still = [name for name, p in after.named_parameters() if torch.equal(p, before[name])]
    assert set(still) <= {"streams.q_bias"}, "a softmax does not see the same number for all"


def test_dsmil_is_trained_as_published():
    settings = recipes.dsmil().settings
    assert dataclasses.astuple(settings) == (2e-4, 5e-3, 40, 1, (0.5, 0.9), True, True, True)


def test_folds_are_stratified_and_disjoint():
    labels = torch.tensor([1] * 47 + [0] * 45)
    split = training.folds(labels, 10, 0)
    assert sorted(i for _, test in split for i in test) == list(range(92))
    for train, test in split:
        assert not set(train) & set(test) and len(train) + len(test) == 92
        assert 4 <= labels[test].sum() <= 5
    assert training.folds(labels, 10, 1) != split


def test_error_and_loss():
    error, loss = training.error_and_loss(torch.tensor([2.0, -1.0, 3.0, -4.0]).double(), torch.tensor([1, 1, 0, 0]))
    assert error == 0.5
    assert loss == pytest.approx(np.mean(np.log1p(np.exp([-2.0, 1.0, 3.0, -4.0]))))


# Nested validation


def test_nothing_is_chosen_by_test_bags(monkeypatch):
    """Settings and epochs come of inner folds of the training bags; ties go to the lower loss, then to the first."""
    train, seen = toy(40), []
    few, many = Settings(epochs=3), Settings(epochs=4, lr=0.5)
    errors = {few: [9, 5, 5], many: [9, 9, 4, 4]}  # wrong bags of each inner fold, by epoch
    losses = {few: [1.0, 0.4, 0.3], many: [1.0, 1.0, 0.9, 0.8]}

    def watched(recipe, settings, fit_on, held_out, seed):
        seen.append((fit_on, held_out))
        rows = []
        for wrong in errors[settings]:
            logits = 2.0 * held_out.labels.double() - 1
            logits[:wrong] *= -1
            rows.append({"": logits})
        return rows

    monkeypatch.setattr(train_classic, "_watched", watched)
    real = training.error_and_loss
    calls = iter([loss for settings in (few, many) for _ in range(2) for loss in losses[settings]])
    monkeypatch.setattr(training, "error_and_loss", lambda z, y: (real(z, y)[0], next(calls)))
    assert train_classic.choose(SMALL["attention"], [few, many], train, 2, 0) == (many, 4)
    for fit_on, held_out in seen:
        assert len(fit_on.labels) == len(held_out.labels) == 20
        assert fit_on.labels.sum() == held_out.labels.sum() == 10


def test_the_tested_epoch_is_the_chosen_one(monkeypatch, tmp_path):
    """Test bags are those of the outer fold, and are not among those that are trained or chosen on."""
    made = toy(40)
    write_npz(tmp_path / "fox.npz", made.bags, made.labels)
    args = train_classic.parse(["--data", str(tmp_path), "--folds", "4", "--protocol", "authors", "--epochs", "3"])
    chosen_on, split = [], training.folds(made.labels, 4, 1)
    monkeypatch.setattr(train_classic, "choose", lambda r, s, train, *rest: chosen_on.append(train) or (s[0], 2))
    labels = made.labels[split[3][1]]
    right = 2.0 * labels.double() - 1
    logits = [{"": -right}, {"": torch.where(torch.arange(10) < 3, -right, right)}, {"": right + 5}]

    def watched(recipe, settings, train, test, seed, epochs):
        assert torch.equal(test.bags.values, made.take(split[3][1]).bags.values)
        assert torch.equal(train.bags.values, chosen_on[0].bags.values) and len(train.labels) == 30
        assert epochs is None, "the authors' protocol looks at all epochs"
        return logits

    monkeypatch.setattr(train_classic, "_watched", watched)
    row = train_classic.run(train_classic.Task("fox", "attention", 1, 3), args)
    assert (row["epochs"], row["bags"]) == (2, 10)
    assert row["accuracy"] == {"": pytest.approx(0.7)}
    assert row["authors"] == {"": 1.0}, "the last epoch, at a threshold of 5"


def test_what_is_watched_is_standardised_by_what_is_trained_on(monkeypatch):
    train, test, given = toy(30), toy(12, seed=1), []
    test.bags.values.mul_(5).add_(3)
    monkeypatch.setattr(training, "fit", lambda r, s, bags, labels, *rest, **more: given.append((bags, labels)))
    predicted = []
    monkeypatch.setattr(training, "predict", lambda r, m, bags: predicted.append(bags) or {})
    train_classic._watched(SMALL["attention"], Settings(), train, test, 0)
    ((bags, labels),) = given
    assert torch.equal(bags.values, data.standardised(train.bags)[0].values) and torch.equal(labels, train.labels)
    monkeypatch.setattr(training, "fit", lambda *args, after_epoch, **more: after_epoch(None))
    train_classic._watched(SMALL["attention"], Settings(), train, test, 0)
    assert torch.equal(predicted[0].values, data.standardised(train.bags, test.bags)[1].values)


def test_the_nested_protocol_stops_where_it_was_chosen_to(monkeypatch, tmp_path):
    """And every fold of every repetition has a seed of its own."""
    made = toy(40)
    write_npz(tmp_path / "fox.npz", made.bags, made.labels)
    args = train_classic.parse(["--data", str(tmp_path), "--folds", "4", "--epochs", "9"])
    monkeypatch.setattr(train_classic, "choose", lambda r, settings, *rest: (settings[1], 3))
    seen = []

    def watched(recipe, settings, train, test, seed, epochs):
        seen.append((settings.lr, seed, epochs))
        return [{"": torch.zeros(len(test.labels)).double()}] * epochs

    monkeypatch.setattr(train_classic, "_watched", watched)
    for repeat in (0, 1):
        for fold in (0, 1):
            row = train_classic.run(train_classic.Task("fox", "attention", repeat, fold), args)
            assert row["epochs"] == 3 and "authors" not in row
    assert {(lr, epochs) for lr, _, epochs in seen} == {(train_classic.SEARCH[1].lr, 3)}
    assert len({seed for _, seed, _ in seen}) == 4


def test_published_settings_are_scaled_to_the_bags_of_a_step():
    first, second = train_classic.candidates(train_classic.RECIPES["loss-attention"])
    assert (first.lr, second.lr) == pytest.approx((4e-4, 1.6e-3)) and first.bags == second.bags == 16
    assert first.epochs == 100 and first.weight_decay == 5e-4
    assert tuple(train_classic.candidates(train_classic.RECIPES["attention"])) == train_classic.SEARCH


def test_best_threshold_on_the_test_fold():
    labels = torch.tensor([0, 0, 1, 0, 1, 1])
    assert train_classic.best_on_test(torch.tensor([-9.0, -8.0, -7.0, -6.5, -6.0, -5.0]), labels) == pytest.approx(
        5 / 6
    )
    assert train_classic.best_on_test(torch.arange(6.0), torch.tensor([0, 0, 0, 1, 1, 1])) == 1


def test_cells_of_the_table():
    cell = train_classic.cell
    assert cell([0.8, 0.9, 1.0], None, 3) == "0.900 ± 0.100"
    assert cell([0.8, 0.9, 1.0], "0.950 ± 0.010", 3) == "0.900 ± 0.100 (0.950 ± 0.010)"
    assert cell([0.8, 0.9, 1.0], "1.000", 3) == "0.900 ± 0.100 (1.000)"
    assert cell([0.7, 0.8, 0.9], "0.901", 3) == "0.800 ± 0.100 (0.901, **below**)"
    assert cell([0.8, 0.9, 1.0], None, 10) == "0.900 ± 0.100, 3 folds"
    assert cell([], "0.9", 3) == "not run"


# CUDA graphs


def test_a_third_of_a_bucket_is_padding_at_most():
    assert [cuda_graphs.bucket(n) for n in (1, 256, 257, 385, 513, 1000)] == [256, 256, 384, 512, 768, 1024]
    assert all(n <= cuda_graphs.bucket(n) < max(257, 1.5 * n) for n in range(1, 20_000, 7))


@pytest.fixture
def pretended_graphs(monkeypatch):
    """CUDA graphs where there is no CUDA: capturing runs nothing, replaying runs what was captured."""

    class Graph:
        def replay(self):
            self.step.loss.copy_(self.step.run())

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def capturing(graph, pool):
        assert pool == "pool"
        (graph.step,) = (s for s in made if s.graph is graph)
        with cuda_graphs._undone(graph.step.model, graph.step.optimizer):
            yield

    made, create = [], cuda_graphs.Step.__init__
    monkeypatch.setattr(cuda_graphs.Step, "__init__", lambda self, *rest: (made.append(self), create(self, *rest))[1])
    for name, stand_in in {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "graph": capturing}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_padded_steps_are_those_of_the_bags_alone(graphs, request):
    """Losses, and parameters in the end; also where rows of an earlier mini-batch, NaN even, lie behind."""
    torch.manual_seed(0)
    model = cuda_graphs.ABMIL(12, 1, None, 8)
    alone = copy.deepcopy(model)
    trainer, adam = cuda_graphs.Trainer(model, 4), torch.optim.Adam(alone.parameters(), lr=1e-3)
    if graphs:
        steps = request.getfixturevalue("pretended_graphs")
        trainer.graphs, trainer.pool = True, "pool"
    for i, batch in enumerate(cuda_graphs.batches(7, 4, 160, 12, 0, "cpu")):
        loss, expected = trainer(*batch), cuda_graphs.plain_step(alone, adam, *batch)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        if i % 2:
            for step in trainer.steps.values():
                step.x.data[~step.mask] = float("nan")
    assert 1 < len(trainer.steps) < 7 and all(rows == len(step.x) for rows, step in trainer.steps.items())
    assert not graphs or [step.graph is not None for step in steps] == [True] * len(trainer.steps)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        if not name.endswith("w_bias"):  # whose gradient is 0 but for rounding, which Adam follows
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_digits_train_the_encoder_through_chunks_as_in_one_graph():
    images = data.Digits(torch.randn(30, 784), torch.arange(30) % 10)
    bags, labels = train_encoder.bags_of(images, 4, 12, 2, 0)
    assert labels.tolist() == [1, 0, 1, 0] and [len(bag) for bag in bags] == [12] * 4
    assert [int((images.labels[bag] == data.DIGIT).sum()) for bag in bags] == [2, 0, 2, 0]
    found = []
    for kind in (train_encoder.OfDigits, train_encoder.OfOneGraph):
        torch.manual_seed(0)
        model = kind(False, 5)
        model(train_encoder.loader(images, bags[0], "cpu"), 12).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()
    frozen = train_encoder.OfDigits(True, 5)
    assert not any(p.requires_grad for p in frozen.encoder.parameters())


# Support vector machines


def planted(count=40, seed=0):
    """Bags whose positive ones hold one instance that no negative one has."""
    rng = torch.Generator().manual_seed(seed)
    lengths, labels = torch.randint(2, 7, (count,), generator=rng).tolist(), torch.arange(count) % 2
    bags = [torch.randn(n, 3, generator=rng) for n in lengths]
    for bag, label in zip(bags, labels.tolist(), strict=True):
        bag[-1, 0] += 8 * label
    return [bag.numpy() for bag in bags], labels.numpy()


@pytest.mark.parametrize("name", train_svm.MODELS)
def test_support_vector_machines_find_the_instance(name):
    (bags, labels), (others, truth) = planted(), planted(seed=1)
    machine = train_svm.MODELS[name]("linear", 1.0).fit(bags, labels)
    assert ((machine.scores(others) > 0) == truth).all()
    # Told as bags are, the other instances of positive bags would move the border into the negative ones.
    positive = [bag for bag, label in zip(others, truth, strict=True) if label]
    assert all(machine.decide(bag).argmax() == len(bag) - 1 for bag in positive)
    assert sum((machine.decide(bag[:-1]) > 0).sum() for bag in positive) <= 2


# Published settings


def test_published_runs_are_read_in_three_ways(tmp_path):
    made = toy(24)
    write_npz(tmp_path / "musk1.npz", made.bags, made.labels)
    args = train_published.parse(["--data", str(tmp_path), "--folds", "3", "--epochs", "5", "--device", "cpu"])
    row = train_published.run(train_published.Task("musk1", "dsmil", "as in the file", 0, 1), args)
    accuracy = row["accuracy"]
    assert row["bags"] == 8 and 0 <= accuracy["last"] <= accuracy["best"] <= accuracy["threshold"] <= 1


@pytest.mark.filterwarnings("ignore:Detected call of")  # no step is taken
def test_an_order_that_stays(monkeypatch):
    """DSMIL's bags come in the same order in every epoch, the others' in another."""
    made, seen = toy(6), []
    monkeypatch.setattr(training._Optimiser, "ragged", lambda self, model, batch, epoch: seen.extend(batch.keys))
    for name, same in (("dsmil", True), ("loss-attention", False)):
        seen.clear()
        settings = dataclasses.replace(train_published.RECIPES[name].settings, epochs=2)
        training.fit(train_published.RECIPES[name], settings, made.bags, made.labels, 0)
        assert sorted(seen[:6]) == list(range(6)) and (seen[:6] == seen[6:]) is same
