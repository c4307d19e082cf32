"""The modules: their results are those of the ops for every form of bags, and they are good citizens of PyTorch."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from nn_cases import (
    EMPTY,
    LAYERS,
    LENGTHS,
    MAKERS,
    MODELS,
    NAN,
    B,
    C,
    D,
    K,
    L,
    N,
    Q,
    every_module,
    fields,
    forms,
    make,
    make_bags,
    step,
)
from op_cases import close, same_bits

import milkernels
from milkernels import Bags, native, nn

# Values


def attention(m, x, offsets):
    gate = ((m.u_weight, m.u_bias),) if m.gated else ()
    op = milkernels.gated_attention_pool if m.gated else milkernels.attention_pool
    activation = "tanh" if m.gated or m.activation == "tanh" else "relu"
    layers = ((m.v_weight, m.v_bias), *gate, (m.w_weight, m.w_bias))
    return op(x, *layers, offsets, activation=activation, backend="reference")


def dsmil(m, x, offsets):
    options = {"scale": 1.0} if not m.nonlinear_query else {"q2": (m.q2_weight, m.q2_bias)}
    options |= {"value": (m.v_weight, m.v_bias)} if m.value else {}
    options |= {"value_activation": "relu"} if m.value == "relu" else {}
    layers = ((m.weight, m.bias), (m.q_weight, m.q_bias))
    return milkernels.dsmil(x, *layers, offsets, **options, backend="reference")


def loss_attention(m, x, offsets):
    return milkernels.loss_attention_pool(x, (m.weight, m.bias), offsets, backend="reference")


def embedded(m, x):
    for layer in m.embed:
        x = F.relu(F.linear(x, layer.weight, layer.bias)) if isinstance(layer, torch.nn.Linear) else x
    return x


def abmil(m, x, offsets):
    pooled = attention(m.attention, embedded(m, x), offsets)
    bag = torch.cat([pooled.bag[:, k] for k in range(pooled.bag.shape[1])], 1)
    return nn.Prediction(bag @ m.classifier.weight.T + m.classifier.bias, pooled)


def clam(m, x, offsets):
    h = embedded(m, x)
    pooled = attention(m.attention, h, offsets)
    layer, heads = m.classifier, pooled.bag.shape[1]
    logits = torch.stack([pooled.bag[:, c % heads] @ layer.weight[c] + layer.bias[c] for c in range(C)], 1)
    rows = torch.full((B, heads, 2, m.k), -1)
    found = torch.zeros(B, C, 2, m.k, 2, dtype=x.dtype)
    for b, (start, n) in enumerate(zip(offsets.tolist(), LENGTHS, strict=False)):
        for head in range(heads):
            order = pooled.scores[start : start + n, head].argsort(descending=True) + start
            for side, chosen in enumerate((order, order.flip(0))):
                rows[b, head, side, : len(chosen[: m.k])] = chosen[: m.k]
        for c in range(C):
            weight, bias = (p[2 * c : 2 * c + 2] for p in (m.instance_classifier.weight, m.instance_classifier.bias))
            for place in (rows[b, c % heads] >= 0).nonzero().tolist():
                at = rows[b, c % heads][tuple(place)]
                found[b, c][tuple(place)] = h[at] @ weight.T + bias
    return nn.CLAMPrediction(logits, pooled, rows, found)


def dsmil_model(m, x, offsets):
    pooled = dsmil(m.streams, embedded(m, x), offsets)
    bag_logits = torch.einsum("bjl,cjl->bc", pooled.bag, m.classifier.weight) + m.classifier.bias
    logits = [
        bag_logits[b] if n == 0 else m.lambda_ * pooled.values[b] + (1 - m.lambda_) * bag_logits[b]
        for b, n in enumerate(LENGTHS)
    ]
    return nn.DSMILPrediction(torch.stack(logits), bag_logits, pooled.values, pooled)


def loss_attention_model(m, x, offsets):
    pooled = loss_attention(m.attention, embedded(m, x), offsets)
    return nn.Prediction(pooled.bag[:, 0] @ m.attention.weight.T + m.attention.bias, pooled)


def embedded_pool(m, x, offsets):
    h = getattr(torch, m.activation)(F.linear(x, m.linear.weight, m.linear.bias))
    ops = {nn.AttentionPool: attention, nn.DSMIL: dsmil, nn.LossAttention: loss_attention}
    return ops[type(m.pool)](m.pool, h, offsets)


def softmax(m, x, offsets):
    return milkernels.softmax_pool(x, x @ m.weight.T, offsets, backend="reference")


POOLED = {
    "max": lambda x, r: x.max(0).values,
    "mean": lambda x, r: x.mean(0),
    "log_sum_exp": lambda x, r: ((r * x).exp().mean(0)).log() / r,
    "generalized_mean": lambda x, r: (x**r).mean(0) ** (1 / r),
    "noisy_or": lambda x, r: 1 - (1 - x).prod(0),
    "isr": lambda x, r: (odds := (x / (1 - x)).sum(0)) / (1 + odds),
}


def instance_model(m, x, offsets):
    instance_logits = embedded(m, x) @ m.classifier.weight.T + m.classifier.bias
    nothing = torch.full((C,), torch.finfo(x.dtype).eps, dtype=x.dtype)
    bags = instance_logits.sigmoid().split(LENGTHS)
    p = torch.stack([POOLED[m.pooling](bag, m.r) if len(bag) else nothing for bag in bags])
    return nn.InstancePrediction(torch.log(p / (1 - p)), instance_logits)


def embedding_model(m, x, offsets):
    bags = embedded(m, x).split(LENGTHS)
    pooled = torch.stack([POOLED[m.pooling](bag, m.r) if len(bag) else bag.new_zeros(bag.shape[1]) for bag in bags])
    return nn.Prediction(pooled @ m.classifier.weight.T + m.classifier.bias, pooled)


def levels_of(model, x, offsets):
    """The bags behind each layer of the embedding, an empty one as zeros."""
    levels = []
    for first in range(0, len(model.embed), 3):
        x = model.embed[first : first + 3](x)
        bags = [x[a:b] for a, b in itertools.pairwise(offsets.tolist())]
        pool = (lambda bag: bag.amax(0)) if model.pooling == "max" else lambda bag: bag.exp().mean(0).log()
        levels.append(torch.stack([pool(bag) if len(bag) else x.new_zeros(x.shape[1]) for bag in bags]))
    return levels


def deep_supervision(m, x, offsets):
    sides = [classify(bags) for classify, bags in zip(m.classifier, levels_of(m, x, offsets), strict=True)]
    return nn.SidePrediction(torch.stack(sides).sigmoid().mean(0).logit(), torch.stack(sides, 1))


def residual(m, x, offsets):
    pooled = sum(levels_of(m, x, offsets))
    return nn.Prediction(m.classifier(pooled), pooled)


EXPECTED = {
    "deep-supervision": deep_supervision,
    "residual": residual,
    "attention": attention,
    "softmax": softmax,
    "dsmil": dsmil,
    "loss-attention": loss_attention,
    "embedded": embedded_pool,
    "mean": lambda m, x, offsets: milkernels.mean_pool(x, offsets, backend="reference"),
    "max": lambda m, x, offsets: milkernels.max_pool(x, offsets, backend="reference"),
    "abmil": abmil,
    "clam": clam,
    "dsmil-model": dsmil_model,
    "loss-attention-model": loss_attention_model,
    "instance-model": instance_model,
    "embedding-model": embedding_model,
}


def expected_of(name):
    return next(EXPECTED[key] for key in sorted(EXPECTED, key=len, reverse=True) if name.startswith(key))


@every_module
def test_results_are_those_of_the_ops_for_every_form(name):
    module, bags = make(name), make_bags()
    expected_module = copy.deepcopy(module)
    expected_module.forward = lambda *args: expected_of(name)(expected_module, *args)
    expected = step(expected_module, (bags.values, bags.offsets), torch.arange(N))
    for form, (args, rows) in forms(bags).items():
        assert step(module, args, rows).keys() == expected.keys(), form
        close(step(module, args, rows), expected)
    assert all(g.any() for n, g in expected.items() if n.startswith("gradient")), "a parameter without a gradient"


@every_module
def test_forms_without_padding_give_the_same_bits(name):
    module, made = make(name, torch.float32), forms(make_bags(dtype=torch.float32))
    expected = step(module, *made["offsets"])
    for form in ("int32", "bags", "nested"):
        same_bits(step(module, *made[form]), expected)


@every_module
def test_one_bag(name):
    module, x = make(name), make_bags((N,)).values
    rows = torch.arange(N)
    expected = step(module, (x, torch.tensor([0, N])), rows)
    for args in ((x,), (x[None],), (Bags(x),)):
        same_bits(step(module, args, rows), expected)
    compare = close if native.load_error() else same_bits  # with a mask autograd adds gradients in another order
    compare(step(module, (x[None], None, torch.ones(1, N)), rows), expected)


@every_module
@pytest.mark.parametrize("form", ["mask", "padded"])
def test_masked_rows_take_no_gradient(name, form):
    module, ((x, *rest), rows) = make(name), forms(make_bags())[form]
    x = x.clone().requires_grad_()
    outputs = [o for o in fields(module(x, *rest), rows).values() if o.requires_grad]
    gradient = torch.autograd.grad(sum(o[o.isfinite()].sum() for o in outputs), x)[0].view(-1, L)
    assert gradient[rows].any() and gradient[rows].isfinite().all()
    gradient[rows] = 0
    assert not gradient.any()


@pytest.mark.parametrize("form", ["padded", "nested", "bags", "offsets"])
def test_softmax_pool_takes_scores_as_rows_or_in_the_form_of_x(form):
    bags = make_bags()
    (x, *rest), rows = forms(bags)[form]
    scores = torch.randn(N, K, dtype=torch.float64)
    expected = fields(milkernels.softmax_pool(bags.values, scores, bags.offsets), torch.arange(N))
    given = [scores]
    if form == "padded":
        padded = torch.full((x.shape[0] * x.shape[1], K), NAN, dtype=torch.float64)
        padded[rows] = scores
        given = [padded, padded.view(*x.shape[:2], K)]
    if form == "nested":
        given.append(torch.nested.nested_tensor_from_jagged(scores, x.offsets()))
    for scores in given:
        close(fields(nn.SoftmaxPool()(x, scores, *rest), rows), expected)


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_bag_has_finite_logits_and_gradients(name):
    module = make(name)
    for args, _ in forms(make_bags()).values():
        module.zero_grad()
        prediction = module(*args)
        if isinstance(module, nn.MINetDS):
            expected = torch.stack([layer.bias for layer in module.classifier]).sigmoid().mean(0).logit()
        else:
            expected = module.classifier.bias if hasattr(module, "classifier") else module.attention.bias
        if isinstance(module, nn.InstancePooling):  # no instance, none is positive
            eps = torch.finfo(expected.dtype).eps
            expected = torch.full_like(expected, math.log(eps / (1 - eps)))
        torch.testing.assert_close(prediction.logits[EMPTY], expected, rtol=1e-13, atol=0)
        prediction.logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("lambda_", [0, 0.5, 1.0])
def test_dsmil_weighs_its_streams(lambda_):
    model = nn.DSMILModel(L, C, lambda_=lambda_)
    logits, bag_logits, instance_logits, pooled = model(make_bags(dtype=torch.float32))
    assert torch.equal(instance_logits, pooled.values) and instance_logits[EMPTY].isneginf().all()
    full = [b for b in range(B) if b != EMPTY]
    torch.testing.assert_close(logits[full], torch.lerp(bag_logits, instance_logits, lambda_)[full])
    assert torch.equal(logits[EMPTY], bag_logits[EMPTY]) and torch.equal(logits[EMPTY], model.classifier.bias)


@pytest.mark.parametrize("pooling", ["max", "mean", "noisy_or", "isr"])
@pytest.mark.parametrize("z", [-200.0, -90.0, -30.0, -9.5, -3.0, 0.0, 17.0, 23.0, 90.0])
def test_instances_do_not_saturate(pooling, z):
    """1000 instances, of probabilities that float32 rounds to 0 or 1: their logit is right, and has a gradient."""
    model = nn.InstancePooling(1, 1, (), pooling)
    torch.nn.init.ones_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    x = torch.full((1000, 1), z).requires_grad_()
    logit = model(x).logits
    none = 1000 * (math.log1p(math.exp(z)) if z > -30 else math.exp(z))  # -log of the probability that none is
    noisy_or = none + math.log(-math.expm1(-none)) if none > 1e-12 else math.log(1000) + z
    exact = {"max": z, "mean": z, "noisy_or": noisy_or, "isr": math.log(1000) + z}[pooling]
    torch.testing.assert_close(logit.item(), exact, rtol=2e-5, atol=2e-5)
    logit.backward()
    assert x.grad.isfinite().all() and 0.99 < x.grad.sum() < 1001


@pytest.mark.parametrize("pooling", nn.InstancePooling.POOLINGS)
def test_pooled_logits_of_half_types_are_finite(pooling):
    model = nn.InstancePooling(1, 1, (), pooling, dtype=torch.float16)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    prediction = model(torch.zeros(100_000, 1, dtype=torch.float16))
    assert prediction.logits.isfinite().all() and prediction.logits.dtype == torch.float32
    assert prediction.instance_logits.dtype == torch.float16


def test_types_and_autocast():
    bags = make_bags(dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        pooled = nn.AttentionPool(L, D, dtype=torch.float32)(bags.to(dtype))
        assert pooled.bag.dtype == torch.promote_types(dtype, torch.float32)
    assert nn.AttentionPool(L, D, dtype=torch.bfloat16)(bags.to(torch.bfloat16)).bag.dtype == torch.bfloat16
    for name in MODELS:
        model = make(name, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(bags).logits
        torch.testing.assert_close(logits.float(), model(bags).logits, rtol=0.1, atol=0.1)


# Dropout


def test_attention_dropout_is_that_of_the_op_and_in_training_only():
    bags = make_bags()
    for gated in (True, False):
        module = nn.AttentionPool(L, D, K, gated=gated, dropout=0.4, dtype=torch.float64)
        gate = ((module.u_weight, module.u_bias),) if gated else ()
        layers = ((module.v_weight, module.v_bias), *gate, (module.w_weight, module.w_bias))
        op = milkernels.gated_attention_pool if gated else milkernels.attention_pool
        dropped, kept = (op(bags, *layers, dropout_p=p, seed=7) for p in (0.4, 0.0))
        assert not torch.equal(dropped.scores, kept.scores)
        assert torch.equal(module(bags, seed=7).scores, dropped.scores)
        assert torch.equal(module(bags, seed=torch.tensor([7])).scores, dropped.scores)
        assert torch.equal(module.eval()(bags, seed=7).scores, kept.scores)


def test_dsmil_dropout_is_that_of_the_op_and_in_training_only():
    bags = make_bags()
    module = nn.DSMIL(L, C, Q, nonlinear_query=False, value="relu", value_dropout=0.4, dtype=torch.float64)
    layers = ((module.weight, module.bias), (module.q_weight, module.q_bias))
    value = {"value": (module.v_weight, module.v_bias), "value_activation": "relu", "seed": 7}
    dropped, kept = (milkernels.dsmil(bags, *layers, **value, value_dropout_p=p) for p in (0.4, 0.0))
    assert not torch.equal(dropped.bag, kept.bag)
    assert torch.equal(module(bags, seed=7).bag, dropped.bag)
    assert torch.equal(module.eval()(bags, seed=7).bag, kept.bag)


@pytest.mark.parametrize(
    "make_model",
    [
        lambda p: nn.ABMIL(L, C, 16, 16, dropout=p),
        lambda p: nn.ABMIL(L, C, None, 16, dropout=p),
        lambda p: nn.DSMILModel(L, C, 16, dropout=p),
        lambda p: nn.DSMILModel(L, C, value="linear", value_dropout=p),
        lambda p: nn.LossAttentionModel(L, C, (16,), dropout=p),
        lambda p: nn.InstancePooling(L, C, (16,), dropout=p),
        lambda p: nn.EmbeddingPooling(L, C, (16,), "mean", dropout=p),
    ],
)
def test_model_dropout(make_model):
    model, bags = make_model(0.5), make_bags(dtype=torch.float32)
    torch.manual_seed(1)
    first, second = model(bags).logits, model(bags).logits
    torch.manual_seed(1)
    again = model(bags).logits
    assert torch.equal(first, again) and not torch.equal(first, second)
    plain = make_model(0.0)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(bags).logits, plain(bags).logits)


# Parameters


def test_parameters_are_those_of_linear_layers():
    layers = {"v_": (L, D), "u_": (L, D), "w_": (D, K)}
    torch.manual_seed(3)
    module = nn.AttentionPool(L, D, K)
    torch.manual_seed(3)
    for prefix, size in layers.items():
        linear = torch.nn.Linear(*size)
        assert torch.equal(getattr(module, f"{prefix}weight"), linear.weight)
        assert torch.equal(getattr(module, f"{prefix}bias"), linear.bias)
    before = copy.deepcopy(module.state_dict())
    module.reset_parameters()
    assert not any(torch.equal(before[name], p) for name, p in module.state_dict().items())
    torch.manual_seed(3)
    module.reset_parameters()
    same_bits(module.state_dict(), before)


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (
            nn.AttentionPool(L, D, K),
            {
                "v_weight": (D, L),
                "v_bias": (D,),
                "u_weight": (D, L),
                "u_bias": (D,),
                "w_weight": (K, D),
                "w_bias": (K,),
            },
        ),
        (nn.AttentionPool(L, D, gated=False, bias=False), {"v_weight": (D, L), "w_weight": (1, D), "w_bias": (1,)}),
        (
            nn.AttentionPool(L, D, score_bias=False),
            {"v_weight": (D, L), "v_bias": (D,), "u_weight": (D, L), "u_bias": (D,), "w_weight": (1, D)},
        ),
        (
            nn.DSMIL(L, C, Q),
            {
                "weight": (C, L),
                "bias": (C,),
                "q_weight": (Q, L),
                "q_bias": (Q,),
                "q2_weight": (Q, Q),
                "q2_bias": (Q,),
            },
        ),
        (
            nn.DSMIL(L, C, Q, nonlinear_query=False, value="linear", value_dim=7, bias=False),
            {"weight": (C, L), "q_weight": (Q, L), "v_weight": (7, L)},
        ),
        (nn.LossAttention(L, C, bias=False), {"weight": (C, L)}),
    ],
)
def test_names_and_shapes_of_parameters(module, shapes):
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == shapes
    assert module(make_bags(dtype=torch.float32)).bag.isfinite().all()


@pytest.mark.parametrize("name", MAKERS)
def test_state_dict_copy_and_pickle(name):
    module, bags = make(name, torch.float32), make_bags(dtype=torch.float32)
    expected = fields(module(bags), torch.arange(N))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = make(name, torch.float32, seed=1)
    if len(list(loaded.parameters())) and name != "softmax":
        assert not torch.equal(
            next(iter(fields(loaded(bags), torch.arange(N)).values())), next(iter(expected.values()))
        )
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        same_bits(fields(other(bags), torch.arange(N)), expected)
        assert repr(other) == repr(module)


def test_device_and_dtype():
    for name in LAYERS + MODELS:
        if name in ("softmax", "mean", "max"):
            continue
        module = MAKERS[name](device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            nn.AttentionPool(512),
            "AttentionPool(in_dim=512, hidden_dim=128, heads=1, gated=True, activation='tanh', dropout=0.0, "
            "bias=True, score_bias=True)",
        ),
        (
            nn.AttentionPool(6, 5, 2, gated=False, activation="gelu", dropout=0.1, bias=False, score_bias=False),
            "AttentionPool(in_dim=6, hidden_dim=5, heads=2, gated=False, activation='gelu', dropout=0.1, "
            "bias=False, score_bias=False)",
        ),
        (
            nn.DSMIL(6),
            "DSMIL(in_dim=6, num_classes=1, query_dim=128, nonlinear_query=True, value=None, scale=None, bias=True)",
        ),
        (
            nn.DSMIL(6, 2, 4, nonlinear_query=False, value="relu", value_dropout=0.2, scale=1.0, bias=False),
            "DSMIL(in_dim=6, num_classes=2, query_dim=4, nonlinear_query=False, value='relu', value_dim=6, "
            "value_dropout=0.2, scale=1.0, bias=False)",
        ),
        (nn.LossAttention(6, 2, bias=False), "LossAttention(in_dim=6, num_classes=2, bias=False)"),
        (nn.SoftmaxPool(), "SoftmaxPool()"),
    ],
)
def test_repr_is_the_call_that_makes_the_module(module, text):
    assert repr(module) == text
    again = eval(text, {name: getattr(nn, name) for name in ("AttentionPool", "DSMIL", "LossAttention", "SoftmaxPool")})
    assert repr(again) == text and again.state_dict().keys() == module.state_dict().keys()


def test_repr_of_models():
    text = repr(nn.DSMILModel(L, C, lambda_=0.25))
    assert "lambda_=0.25" in text and "(streams): DSMIL(in_dim=6, num_classes=3" in text


# MI-Net behind each layer of its embedding


def test_multi_level_models_by_hand():
    bags = make_bags((4, 1, 7))
    model = nn.MINetDS(L, C, (5, 4, 3)).double()
    sides = model(bags).side_logits
    assert sides.shape == (3, 3, C)
    torch.testing.assert_close(sides[:, 2], _last(model)(bags).logits)
    with torch.no_grad():
        for classifier in model.classifier:
            classifier.bias.fill_(1e4)
    assert model(bags).logits.isfinite().all(), "no probability is rounded to 1"
    with pytest.raises(ValueError, match=r"hidden_dims must all be the same.*got \(5, 4\)"):
        nn.MINetRC(L, C, (5, 4))
    for kind in (nn.MINetDS, nn.MINetRC):
        with pytest.raises(ValueError, match=r"hidden_dims must have a layer.*got \(\)"):
            kind(L, C, ())
    assert nn.MiNet is nn.InstancePooling and nn.MINet is nn.EmbeddingPooling


def _last(model):
    """MI-Net with the last classifier of three."""
    one = nn.EmbeddingPooling(L, C, (5, 4, 3)).double()
    one.embed, one.classifier = model.embed, model.classifier[2]
    return one
