"""The embedding in front of a pooling: what the modules hand to the op, and when they call their layers instead."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from nn_cases import B, C, D, E, K, L, N, Q, fields, make_bags
from op_cases import close, same_bits
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import milkernels
from milkernels import Embed, nn
from milkernels.ops import attention, dual_stream, embedding, loss_attention

pytestmark = pytest.mark.filterwarnings("ignore:milkernels")  # of what runs on the reference
MODELS = {
    "abmil": lambda dims, **more: nn.ABMIL(L, C, dims, D, K, **more),
    "dsmil": lambda dims, **more: nn.DSMILModel(L, C, dims, Q, **more),
    "loss-attention": lambda dims, **more: nn.LossAttentionModel(L, C, dims, **more),
}
every_model = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)


@pytest.fixture
def handed(monkeypatch):
    """The embeddings that ops are given, in order."""
    seen, embedding_of = [], embedding.embedding_of

    def recording(x, embed, *rest):
        seen.append(embed)
        return embedding_of(x, embed, *rest)

    for family in (attention, dual_stream, loss_attention):
        monkeypatch.setattr(family, "embedding_of", recording)
    return seen


def outcome(model, bags):
    """Results and gradients of all parameters."""
    model.zero_grad()
    results = fields(model(bags), torch.arange(N))
    sum(t.masked_fill(t.isinf(), 0).square().sum() for t in results.values() if t.requires_grad).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach() for name, t in results.items()} | gradients


# Models: when the op takes the last layer


@every_model
@pytest.mark.parametrize("dims", [(8,), (9, 8), (10, 9, 8)], ids=str)
def test_the_op_takes_the_last_layer(make_model, dims, handed):
    model, bags, called = make_model(dims, dtype=torch.float64), make_bags(), []
    linears = [layer for layer in model.embed if isinstance(layer, torch.nn.Linear)]
    for layer in linears[:-1]:
        layer.register_forward_hook(lambda module, args, output: called.append(module))
    outcome(model, bags)
    (embed,) = handed
    weight, bias = embed.linear
    assert weight is linears[-1].weight and bias is linears[-1].bias
    assert embed[1:] == ("relu", 0.0) and called == linears[:-1]


@every_model
def test_without_an_embedding_nothing_is_handed_over(make_model, handed):
    make_model(())(make_bags(dtype=torch.float32))
    assert handed == [None]


def test_keys_of_the_state_dict_are_those_of_the_layers():
    for make_model in MODELS.values():
        keys = {name for name in make_model((9, 8)).state_dict() if name.startswith("embed")}
        assert keys == {f"embed.{i}.{name}" for i in (0, 3) for name in ("weight", "bias")}


@contextlib.contextmanager
def for_all_modules():
    handle = torch_module.register_module_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


def hook(kind):
    return lambda layer: getattr(layer, f"register_{kind}_hook")(lambda *args: None)


def replaced_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def change(index, new):
    def changed(embed):
        embed[index] = new

    return changed


# What may be done to an embedding of one layer
CHANGES = {
    **{f"{kind} hook": lambda e, kind=kind: hook(kind)(e[0]) for kind in ("forward", "forward_pre", "full_backward")},
    "backward pre hook": lambda e: hook("full_backward_pre")(e[0]),
    "hook of the activation": lambda e: hook("forward")(e[1]),
    "hook of the dropout": lambda e: hook("forward")(e[2]),
    "hook of the whole": lambda e: hook("forward")(e),
    "other forward": lambda e: replaced_forward(e[0]),
    "other forward of the activation": lambda e: replaced_forward(e[1]),
    "other forward of the whole": replaced_forward,
    "subclass": change(0, Doubled(L, 8, dtype=torch.float64)),
    "other activation": change(1, torch.nn.Tanh()),
    "subclass of the activation": change(1, type("Mine", (torch.nn.ReLU,), {})()),
    "other dropout": change(2, torch.nn.AlphaDropout(0.0)),
    "no dropout": lambda e: e.__delitem__(2),
    "one more layer": lambda e: e.append(torch.nn.LayerNorm(8, dtype=torch.float64)),
    "weight norm": lambda e: parametrizations.weight_norm(e[0]),
    "pruning": lambda e: prune.l1_unstructured(e[0], "weight", 0.5),
}


@every_model
@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_changed_layer_is_called(make_model, changed, handed):
    torch.manual_seed(0)
    model, bags = make_model((8,), dtype=torch.float64), make_bags()
    changed(model.embed)
    got = outcome(model, bags)
    assert handed == [None]
    pool = model.streams if isinstance(model, nn.DSMILModel) else model.attention
    expected = fields(pool(model.embed(bags.values), bags.offsets), torch.arange(N))
    for name, t in expected.items():
        torch.testing.assert_close(got[f"pooled.{name}"], t.detach())
    assert any("embed" in name for name in got), "the embedding is trained"


@every_model
def test_hooks_of_all_modules_and_of_the_pool_see_what_they_saw(make_model, handed):
    model, bags, seen = make_model((8,)), make_bags(dtype=torch.float32), []
    with for_all_modules():
        model(bags)
    pool = model.streams if isinstance(model, nn.DSMILModel) else model.attention
    handle = pool.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(bags)
    handle.remove()
    assert handed == [None, None] and seen == [(N, 8)]
    model(bags)
    assert handed[-1] is not None


def test_another_pool_is_called_as_it_was():
    class Mine(nn.AttentionPool):
        def forward(self, x, offsets=None, mask=None):
            return super().forward(x, offsets, mask)

    model = nn.ABMIL(L, C, 8, D)
    model.attention = Mine(8, D)
    assert model(make_bags(dtype=torch.float32)).logits.isfinite().all()


@every_model
def test_called_or_handed_over_results_are_the_same(make_model):
    model, bags = make_model((9, 8), dtype=torch.float64), make_bags()
    handed_over = outcome(model, bags)
    hook("forward")(model.embed)
    close(outcome(model, bags), handed_over)


# Types


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_features_beside_float32_weights(make_model, dtype):
    model, bags = make_model((8,)), make_bags(dtype=torch.float32).to(dtype)
    got, exact = model(bags), model(bags.to(torch.float32))
    assert got.logits.dtype == torch.float32
    torch.testing.assert_close(got.logits, exact.logits, rtol=0.05, atol=0.05)
    got.logits[0].sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@every_model
@pytest.mark.parametrize("dims", [(8,), (9, 8)], ids=str)
def test_autocast_is_that_of_the_layers(make_model, dims):
    model, bags = make_model(dims), make_bags(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = outcome(model, bags)
        hook("forward")(model.embed)
        called = outcome(model, bags)
    for name, t in called.items():
        assert got[name].dtype == t.dtype, name
        torch.testing.assert_close(
            got[name].float(), t.float(), rtol=0.05, atol=0.05 * float(t.nan_to_num().abs().max())
        )


# Dropout


@every_model
def test_dropout_of_the_layer_acts_where_it_trains(make_model, handed):
    model, bags = make_model((8,), dropout=0.3), make_bags(dtype=torch.float32)
    model(bags)
    model.eval()(bags)
    model.embed[-1].train()  # Monte Carlo dropout
    model(bags)
    assert [embed.dropout_p for embed in handed] == [0.3, 0.0, 0.3]


def test_dropout_is_that_of_the_op():
    torch.manual_seed(0)
    model, bags = nn.ABMIL(L, C, 8, D, dropout=0.5, dtype=torch.float64), make_bags()
    layer, pool = model.embed[0], model.attention
    torch.manual_seed(5)
    got = model(bags).pooled
    torch.manual_seed(5)
    embed = Embed(layer, "relu", 0.5)
    v, u, w = (pool.v_weight, pool.v_bias), (pool.u_weight, pool.u_bias), (pool.w_weight, pool.w_bias)
    expected = milkernels.gated_attention_pool(bags, v, u, w, dropout_p=0.5, embed=embed)
    same_bits(got._asdict(), expected._asdict())


POOLS = {
    "attention": lambda p: nn.AttentionPool(E, D, K, dropout=p, dtype=torch.float64),
    "dsmil": lambda p: nn.DSMIL(E, C, Q, value="relu", value_dropout=p, dtype=torch.float64),
    "loss-attention": lambda p: nn.LossAttention(E, C, dtype=torch.float64),
}


@pytest.mark.parametrize("make_pool", POOLS.values(), ids=POOLS)
def test_a_seed_fixes_what_the_embedding_drops(make_pool):
    pool, bags = make_pool(0.4), make_bags()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(E, L, generator=generator, dtype=torch.float64)
    embed = Embed(weight, "relu", 0.4)
    first = pool(bags, embed=embed, seed=7)
    same_bits(fields(pool(bags, embed=embed, seed=torch.tensor([7])), torch.arange(N)), fields(first, torch.arange(N)))
    h = milkernels.embed_instances(bags.values, embed, torch.arange(N), seed=7)
    dropped = (h == 0) & (F.relu(bags.values @ weight.T) > 0)
    assert 0.25 < dropped.double().mean() / (bags.values @ weight.T > 0).double().mean() < 0.55
    close(fields(pool(h, bags.offsets, seed=7), torch.arange(N)), fields(first, torch.arange(N)))
    assert not torch.equal(pool(bags, embed=embed, seed=8).bag, first.bag)
    # The pool's own mode says nothing about a layer that is not its own.
    kept = pool.eval()(bags, embed=embed, seed=7)
    close(fields(pool(h, bags.offsets), torch.arange(N)), fields(kept, torch.arange(N)))


@every_model
def test_checkpointing_drops_the_same_units(make_model):
    torch.manual_seed(0)
    model, bags = make_model((8,), dropout=0.5, dtype=torch.float64), make_bags()

    def step(run):
        torch.manual_seed(3)
        model.zero_grad()
        logits = run(bags).logits
        logits.square().sum().backward()
        return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters()}

    plain = step(model)
    checkpointed = step(lambda bags: checkpoint(model, bags, use_reentrant=False))
    same_bits(checkpointed, plain)


# Gradients


@every_model
def test_gradcheck(make_model):
    torch.manual_seed(0)
    model, bags = make_model((8,), dtype=torch.float64), make_bags()
    torch.nn.init.uniform_(model.embed[0].bias, 0.3, 1.0)
    names = [name for name, _ in model.named_parameters()]

    def logits(x, *parameters):
        found = dict(zip(names, parameters, strict=True))
        prediction = torch.func.functional_call(model, found, (x, bags.offsets))
        return prediction.logits, prediction.pooled.scores

    x = bags.values.clone().requires_grad_()
    with milkernels.use_backend("reference"):
        assert torch.autograd.gradcheck(logits, (x, *model.parameters()))


# Bags


@every_model
def test_masked_rows_full_of_nan(make_model):
    model, bags = make_model((9, 8), dtype=torch.float64), make_bags()
    expected = outcome(model, bags)
    padded, mask = bags.to_padded(float("nan"))
    model.zero_grad()
    prediction = model(padded, None, mask)
    results = fields(prediction, mask.flatten().nonzero()[:, 0])
    sum(t.masked_fill(t.isinf(), 0).square().sum() for t in results.values() if t.requires_grad).backward()
    close({n: t.detach() for n, t in results.items()}, {n: expected[n] for n in results})
    close({n: p.grad for n, p in model.named_parameters()}, {n: expected[n] for n, _ in model.named_parameters()})


@every_model
def test_bags_that_are_all_empty(make_model):
    model = make_model((8,), dropout=0.5)
    prediction = model(torch.zeros(0, L), torch.zeros(B + 1, dtype=torch.int64))
    assert prediction.logits.shape == (B, C) and prediction.logits.isfinite().all()
    prediction.logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
