"""The modules under torch.compile and torch.export, and what they refuse."""

import doctest

import pytest
import torch
from nn_cases import (
    LENGTHS,
    MAKERS,
    NAN,
    B,
    C,
    D,
    K,
    L,
    N,
    every_module,
    fields,
    forms,
    make,
    make_bags,
    step,
)
from op_cases import close

from milkernels import nn

# Graphs


@pytest.mark.parametrize("name", ["softmax", "dsmil-relu", "embedded-attention", "dsmil-model", "loss-attention-model"])
@pytest.mark.parametrize("form", ["bags", "padded"])
def test_compile(name, form):
    torch._dynamo.reset()
    module = make(name)
    expected = step(module, *forms(make_bags())[form])
    module.compile(fullgraph=True, backend="aot_eager")
    close(step(module, *forms(make_bags())[form]), expected)


@pytest.mark.parametrize("form", ["offsets", "bags", "padded"])
def test_compile_once_for_any_size(form):
    torch._dynamo.reset()
    module = make("abmil")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (LENGTHS, (3, 0, 9, 2, 5)):
        args, rows = forms(make_bags(lengths))[form]
        with torch.compiler.set_stance("default" if lengths is LENGTHS else "fail_on_recompile"):
            got = compiled(*args)
        close(fields(got, rows), fields(module(*args), rows))


def test_compile_with_dropout():
    torch._dynamo.reset()
    model, bags = nn.ABMIL(L, C, 8, D, dropout=0.5), make_bags(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(bags).logits, compiled(bags).logits)
    model.eval()
    torch.testing.assert_close(compiled(bags).logits, model(bags).logits)


@pytest.mark.parametrize("name", ["abmil", "dsmil-model"])
@pytest.mark.parametrize("form", ["offsets", "bags"])
def test_export_with_a_dynamic_number_of_instances(name, form):
    module, size = make(name).eval(), torch.export.Dim("rows", min=2)
    dynamic = ({0: size}, None) if form == "offsets" else ([{0: size}, None],)
    program = torch.export.export(module, forms(make_bags())[form][0], dynamic_shapes=dynamic)
    args, rows = forms(make_bags((9, 0, 30, 2), seed=1))[form]
    close(fields(program.module()(*args), rows), fields(module(*args), rows))


def test_export_of_a_padded_batch():
    module, (args, rows) = make("abmil").eval(), forms(make_bags())["padded"]
    program = torch.export.export(module, args)
    close(fields(program.module()(*args), rows), fields(module(*args), rows))


# Errors


@pytest.mark.parametrize(
    ("make_module", "error", "match"),
    [
        (lambda: nn.AttentionPool(0), ValueError, "in_dim must be at least 1; got 0"),
        (lambda: nn.AttentionPool(6.0), TypeError, "in_dim must be an int; got float"),
        (lambda: nn.AttentionPool(6, 0), ValueError, "hidden_dim must be at least 1; got 0"),
        (lambda: nn.AttentionPool(6, heads=-1), ValueError, "heads must be at least 1; got -1"),
        (lambda: nn.AttentionPool(6, activation="selu"), ValueError, "activation must be one of tanh.*got 'selu'"),
        (lambda: nn.AttentionPool(6, dropout=1.5), ValueError, "dropout must be between 0 and 1; got 1.5"),
        (lambda: nn.AttentionPool(6, dropout=NAN), ValueError, "dropout must be between 0 and 1; got nan"),
        (lambda: nn.AttentionPool(6, dropout="0.1"), TypeError, "dropout must be a number; got str"),
        (lambda: nn.DSMIL(6, 0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: nn.DSMIL(6, query_dim=0), ValueError, "query_dim must be at least 1; got 0"),
        (lambda: nn.DSMIL(6, value="tanh"), ValueError, "value must be one of None, linear, relu; got 'tanh'"),
        (lambda: nn.DSMIL(6, value="relu", value_dim=0), ValueError, "value_dim must be at least 1; got 0"),
        (lambda: nn.DSMIL(6, value_dim=4), ValueError, "need a value; got 4"),
        (lambda: nn.DSMIL(6, value_dropout=0.2), ValueError, "need a value; got None, 0.2"),
        (lambda: nn.DSMIL(6, value="relu", value_dropout=-0.1), ValueError, "value_dropout must be.*got -0.1"),
        (lambda: nn.DSMIL(6, scale="1"), TypeError, "scale must be a number; got str"),
        (lambda: nn.LossAttention(6, 0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: nn.ABMIL(6, 0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: nn.ABMIL(6, 2, 0), ValueError, "embed_dim must be at least 1; got 0"),
        (lambda: nn.ABMIL(0, 2), ValueError, "in_dim must be at least 1; got 0"),
        (lambda: nn.ABMIL(6, 2, dropout=2), ValueError, "dropout must be between 0 and 1; got 2"),
        (lambda: nn.DSMILModel(6, 2, lambda_=1.1), ValueError, "lambda_ must be between 0 and 1; got 1.1"),
        (lambda: nn.DSMILModel(6, 2, dropout=0.1), ValueError, "needs embed_dim; got 0.1"),
        (lambda: nn.DSMILModel(6, 2, values="relu"), TypeError, "values"),
        (lambda: nn.LossAttentionModel(6, 2, (8, 0)), ValueError, "hidden_dims must be at least 1; got 0"),
        (lambda: nn.LossAttentionModel(6, 2, (), dropout=0.1), ValueError, "needs hidden_dims; got 0.1"),
        (lambda: nn.ABMIL(6, 2, (8, 0)), ValueError, "embed_dim must be at least 1; got 0"),
        (lambda: nn.InstancePooling(6, 0), ValueError, "num_classes must be at least 1; got 0"),
        (lambda: nn.InstancePooling(6, pooling="sum"), ValueError, "pooling must be one of max.*isr; got 'sum'"),
        (lambda: nn.InstancePooling(6, hidden_dims=(), dropout=0.1), ValueError, "needs hidden_dims; got 0.1"),
        (lambda: nn.InstancePooling(6, r=2.0), ValueError, "got 2.0 beside pooling='max'"),
        (lambda: nn.InstancePooling(6, pooling="log_sum_exp", r=0), ValueError, "r must be positive.*got 0"),
        (lambda: nn.EmbeddingPooling(6, pooling="isr"), ValueError, "pooling must be one of max.*mean; got 'isr'"),
        (lambda: nn.EmbeddingPooling(6, 1, (), "generalized_mean"), ValueError, "needs hidden_dims; got ()"),
    ],
)
def test_constructors_refuse(make_module, error, match):
    with pytest.raises(error, match=match):
        make_module()


@every_module
def test_forward_refuses_what_is_not_bags(name):
    module, bags = make(name), make_bags()
    if name == "softmax":
        module = lambda x, *rest: nn.SoftmaxPool()(x, torch.zeros(N, K), *rest)  # noqa: E731
    x, offsets = bags.values, bags.offsets
    padded, mask = bags.to_padded()
    for args, error, match in [
        ((list(bags),), TypeError, "x must be a tensor or Bags; got list; .*Bags.from_list"),
        ((x.numpy(),), TypeError, "x must be a tensor or Bags; got ndarray"),
        ((bags, offsets), ValueError, r"offsets and mask must be None beside Bags.*got \['Tensor', None\]"),
        ((bags, None, mask.flatten()), ValueError, r"offsets and mask must be None.*got \[None, 'Tensor'\]"),
        ((bags.to_nested(), offsets), ValueError, "offsets and mask must be None beside Bags or a nested"),
        ((padded, offsets, mask), ValueError, "offsets must be None beside a padded batch; got Tensor"),
        ((padded, None, mask[:, 1:]), ValueError, "mask must begin with dimensions"),
        ((x, offsets, mask), ValueError, "mask"),
        ((x[0],), ValueError, r"x must have 2 dimensions; got shape \(6,\)"),
        ((x.long(), offsets), TypeError, "x must be float16.*got torch.int64"),
        ((x, offsets + 1), ValueError, "offsets must start at 0; got 1"),
    ]:
        with pytest.raises(error, match=match):
            module(*args)


@pytest.mark.parametrize("name", [n for n in MAKERS if n not in ("softmax", "mean", "max")])
def test_forward_refuses_another_width(name):
    match = r"x must have in_dim=6 features; got shape \(12, 5\)"
    if name.startswith("embedded"):
        match = r"embed.linear.weight must be \[any, 5\]; got shape \(7, 6\)"
    with pytest.raises(ValueError, match=match):
        make(name)(make_bags().values[:, 1:])


@pytest.mark.parametrize("pool", [nn.AttentionPool(L), nn.DSMIL(L), nn.LossAttention(L, C)])
def test_pools_refuse_an_embedding_of_another_width(pool):
    x = make_bags(dtype=torch.float32).values
    with pytest.raises(ValueError, match=r"weight must be \[any, 5\]; got shape \(\d+, 6\)"):
        pool(x, embed=(torch.zeros(5, L),))
    with pytest.raises(TypeError, match="embed must be Embed\\(linear, .*got Linear"):
        pool(x, embed=torch.nn.Linear(L, L))


def test_softmax_pool_refuses_scores_that_do_not_fit():
    pool, bags = nn.SoftmaxPool(), make_bags()
    padded, mask = bags.to_padded()
    scores = torch.zeros(N, K)
    for args, error, match in [
        ((bags, scores[1:]), ValueError, r"scores must be \[12, any\]; got shape \(11, 2\)"),
        ((bags, [1.0]), TypeError, "scores must be a tensor; got list"),
        ((bags, scores[None]), ValueError, r"scores must be \[N, K\], or begin with.*got shape \(1, 12, 2\)"),
        ((bags.values, scores[None]), ValueError, r"scores must be \[N, K\], or begin with"),
        ((padded, torch.zeros(B, 6, K), None, mask), ValueError, r"scores must be \[N, K\].*got shape \(4, 6, 2\)"),
        ((bags, bags.to_nested()), ValueError, "got a nested tensor"),
    ]:
        with pytest.raises(error, match=match):
            pool(*args)


def test_the_examples_run():
    results = doctest.testmod(nn)
    assert results.attempted > 5 and results.failed == 0
