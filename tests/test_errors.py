"""Whatever is wrong with an argument of a public function, the error is a TypeError or ValueError that names it.

Every argument of every function is given everything that it cannot be.  What is wrong with two arguments together, such
as their lengths, is tested beside each function.
"""

import re
import warnings

import pytest
import torch
from functional_cases import OFFSETS, OPS, C, L, N, arguments, randn, takes

import milkernels as mk
from milkernels import losses, nn, visualize
from milkernels.arguments import check_dense
from milkernels.testing import public_arguments

numpy = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

ANYTHING = {
    "text": "no such",
    "bytes": b"tanh",
    "None of these": object(),
    "type": int,
    "dict": {},
    "set": {1},
    "complex number": 1j,
    "array": numpy.array([1, 2]),
    "tensor": torch.tensor([1.5, 2.5]),
    "tensor of one": torch.tensor(1.5),
}
MORE = {
    bool: {"1": 1, "list": [True]},
    int: {"0": 0, "too many": 2**70, "1.5": 1.5, "True": True, "nan": float("nan"), "list": [1]},
    float: {"nan": float("nan"), "inf": float("inf"), "too large": -(2**70), "True": True, "list": [1.0]},
    str: {"list": ["tanh"], "1": 1, "True": True},
    tuple: {"1.5": 1.5, "True": True, "number": -1},
}
NESTED = [torch.zeros(2, 3), torch.zeros(1, 3)]


def wrong_tensors(t):
    """Of another layout, kind or type than the good one."""
    made = {
        "sparse": t.to_sparse(),
        "mkldnn": t.float().contiguous().to_mkldnn(),
        "nested": torch.nested.nested_tensor(NESTED),
        "complex": t.to(torch.complex64),
        "number": 1.5,
        "True": True,
        "too large": 2**70,
        "module": torch.nn.Linear(2, 2),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        made["quantized"] = torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
        if t.ndim == 2:
            made["csr"] = t.to_sparse_csr()
            made["nested rows"] = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)])
    return made | {"array": t.numpy(), "list": t.tolist()} | {k: ANYTHING[k] for k in ("text", "dict", "type")}


def wrong_layers(weight, bias):
    """What is no linear layer, and pairs of which one part is wrong."""
    made = {"module of another kind": torch.nn.Conv1d(2, 2, 1), "module of another width": torch.nn.Linear(2, 2)}
    made |= {f"weight of {what}": (bad, bias) for what, bad in wrong_tensors(weight).items()}
    made |= {f"bias of {what}": (weight, bad) for what, bad in wrong_tensors(bias).items()}
    return made | {"three": (weight, bias, bias), "no weight": (None, bias)}


def wrong(good):
    if isinstance(good, torch.Tensor):
        return wrong_tensors(good)
    if isinstance(good, tuple) and any(isinstance(part, torch.Tensor) for part in good):
        return ANYTHING | MORE[tuple] | wrong_layers(*good)
    return ANYTHING | MORE[type(good)]


# name: (function, a good call, what would be wrong elsewhere and is right here)
MASK = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 0, 1])
LABELS = torch.tensor([0, 1, 2])
OPTIONS = {"activation": "relu", "dropout_p": 0.5, "seed": 3, "scale": 0.5, "largest": True}
OPTIONS |= {"value_dropout_p": 0.5, "value_activation": "relu"}
CALLS = {op: (getattr(mk, op), public_arguments(op, arguments(op)) | {"mask": MASK}) for op in OPS}
for op, (_, good) in CALLS.items():
    good |= {name: value for name, value in OPTIONS.items() if takes(op, name)}
X, P, EMBED = randn(N, L), randn(N, L).sigmoid(), mk.Embed((randn(4, L), randn(4)), "relu", 0.5)
POOLED = mk.softmax_pool(X, randn(N, 2), OFFSETS)
PREDICTION = nn.LossAttentionModel(L, 3, (8,))(X, OFFSETS)
CLAM = nn.CLAM(L, 3, 8)(X, OFFSETS)
STREAMS = nn.DSMILModel(L, 3)(X, OFFSETS)
ROWS = torch.tensor([1, 2])
OF_BAGS = {"offsets": OFFSETS, "mask": MASK}
PATCHES = {"coords": torch.arange(2 * N).view(N, 2), "weights": P[:, 0]}


def one_by_one(function, **fixed):
    return lambda **changed: function(**fixed, **changed)


CALLS |= {
    "attention_weights": (one_by_one(mk.attention_weights, pooled=POOLED), OF_BAGS),
    "attention_weights of": (mk.attention_weights, {"pooled": ()}),
    "merge_pooled": (mk.merge_pooled, {"parts": ()}),
    "merge_pooled of": (one_by_one(mk.merge_pooled, parts=[POOLED]), {"offsets": ()}),
    "log_sum_exp_pool": (mk.log_sum_exp_pool, {"x": P, **OF_BAGS, "r": 2.0}),
    "generalized_mean_pool": (mk.generalized_mean_pool, {"x": P, **OF_BAGS, "r": 2.0}),
    "noisy_or_pool": (mk.noisy_or_pool, {"p": P, **OF_BAGS}),
    "isr_pool": (mk.isr_pool, {"p": P, **OF_BAGS}),
    "embed_instances": (one_by_one(mk.embed_instances, embed=EMBED), {"x": X, "rows": ROWS, "seed": 1}),
    "embed_instances by": (one_by_one(mk.embed_instances, x=X, rows=ROWS), {"embed": ()}),
    "embedding": (lambda **embed: mk.embed_instances(X, EMBED._replace(**embed), ROWS), EMBED._asdict()),
    "instance_cross_entropy": (
        losses.instance_cross_entropy,
        {"logits": randn(N, C), "weights": P[:, 0], "labels": LABELS, **OF_BAGS, "reduction": "sum"},
    ),
    "consistency": (losses.consistency, {"weights": P[:, 0], "targets": P[:, 0], **OF_BAGS}),
    "ramp_up": (losses.ramp_up, {"epoch": 1.0, "length": 3.0, "peak": 1.0}),
    "WeightEnsemble": (losses.WeightEnsemble, {"beta": 0.5}),
    "targets": (
        one_by_one(losses.WeightEnsemble().targets, keys=list("abc")),
        {"weights": P[:, 0], "offsets": OFFSETS},
    ),
    "loss_attention_loss": (
        one_by_one(losses.loss_attention_loss, prediction=PREDICTION),
        {"labels": LABELS, **OF_BAGS, "lambda_": 0.1, "instances": "sum", "targets": P[:, 0], "omega": 0.5},
    ),
    "dsmil_loss": (
        one_by_one(losses.dsmil_loss, prediction=STREAMS),
        {"labels": torch.ones(3, 3), "streams": "both", "pos_weight": torch.ones(3)},
    ),
    "clam_loss": (
        one_by_one(losses.clam_loss, prediction=CLAM),
        {"labels": LABELS, "bag_weight": 0.5, "exclusive": True, "margin": 1.0, "temperature": 2.0},
    ),
    "clam_instance_loss": (
        one_by_one(losses.clam_instance_loss, embed=EMBED),
        {"x": X, "scores": randn(N, 1), "classifier": randn(6, 4), "labels": LABELS, **OF_BAGS}
        | {"k": 2, "exclusive": True, "margin": 0.5, "temperature": 2.0, "seed": 1},
    ),
    "clam of": (one_by_one(losses.clam_loss, labels=LABELS), {"prediction": ()}),
    "loss of": (one_by_one(losses.loss_attention_loss, labels=LABELS), {"prediction": ()}),
    "losses of": (one_by_one(losses.dsmil_loss, labels=LABELS), {"prediction": ()}),
    "heatmap": (visualize.heatmap, PATCHES | {"patch_size": 2.0, "scale": "log", "cmap": "inferno", "dpi": 50.0}),
    "heatmap to": (one_by_one(visualize.heatmap, **PATCHES), {"path": ()}),
    "attention_arrays": (
        one_by_one(visualize.attention_arrays, pooled=POOLED, bags_or_offsets=OFFSETS),
        {"coords": PATCHES["coords"]},
    ),
    "Bags": (mk.Bags, {"values": X, **OF_BAGS}),
    "Bags with": (one_by_one(mk.Bags, values=X), {"extras": ()}),
    "from_list": (mk.Bags.from_list, {"tensors": ()}),
    "from_list with": (one_by_one(mk.Bags.from_list, tensors=[X]), {"masks": ()}),
    "from_list and": (one_by_one(mk.Bags.from_list, tensors=[X]), {"extras": ()}),
    "from_padded": (mk.Bags.from_padded, {"x": X[None], "mask": MASK[None]}),
    "from_padded with": (one_by_one(mk.Bags.from_padded, x=X[None]), {"lengths": torch.tensor([3])}),
    "from_padded and": (one_by_one(mk.Bags.from_padded, x=X[None]), {"extras": ()}),
    "from_batch": (mk.Bags.from_batch, {"x": X, "batch": torch.arange(N), "num_bags": N, "mask": MASK}),
    "from_nested": (mk.Bags.from_nested, {"x": ()}),
    "collate_bags": (mk.collate_bags, {"batch": ()}),
    "collate_bags with": (one_by_one(mk.collate_bags, batch=[(X, X)]), {"per_instance": ()}),
    "collate_bags of": (one_by_one(mk.collate_bags, batch=[{"x": X}]), {"features": "x"}),
    "topk of": (one_by_one(mk.topk_instances, scores=P), {"k": 2}),
}
MODULES = {
    nn.AttentionPool: {"hidden_dim": 4, "heads": 2, "gated": True, "activation": "tanh", "dropout": 0.5, "bias": True},
    nn.DSMIL: {"num_classes": 2, "query_dim": 4, "value": "relu", "value_dim": 3, "value_dropout": 0.5, "scale": 0.5},
    nn.LossAttention: {"num_classes": 2, "bias": True},
    nn.SelfAttention: {"kernel": "gaussian", "key_dim": 3},
    nn.ABMIL: {"num_classes": 2, "embed_dim": (4,), "hidden_dim": 3, "heads": 2, "activation": "tanh", "dropout": 0.5},
    nn.CLAM: {"num_classes": 2, "embed_dim": (4,), "hidden_dim": 3, "multi_branch": True, "gated": True, "k": 2}
    | {"dropout": 0.5},
    nn.DSMILModel: {"num_classes": 2, "embed_dim": (4,), "dropout": 0.5, "lambda_": 0.5},
    nn.LossAttentionModel: {"num_classes": 2, "hidden_dims": (4,), "dropout": 0.5},
    nn.InstancePooling: {"num_classes": 2, "hidden_dims": (4,), "pooling": "log_sum_exp", "dropout": 0.5, "r": 2.0},
    nn.EmbeddingPooling: {"num_classes": 2, "hidden_dims": (4,), "pooling": "log_sum_exp", "dropout": 0.5, "r": 2.0},
    nn.MINetDS: {"num_classes": 2, "hidden_dims": (4,), "pooling": "log_sum_exp", "dropout": 0.5, "r": 2.0},
    nn.MINetRC: {"num_classes": 2, "hidden_dims": (4,), "pooling": "log_sum_exp", "dropout": 0.5, "r": 2.0},
}
for kind, options in MODULES.items():
    CALLS[kind.__name__] = kind, {"in_dim": L, **options}
    CALLS[f"{kind.__name__}.forward"] = kind(L, **options), {"x": X, **OF_BAGS}
for kind in (nn.MeanPool, nn.MaxPool):
    CALLS[f"{kind.__name__}.forward"] = kind(), {"x": X, **OF_BAGS}
CALLS["SoftmaxPool.forward"] = nn.SoftmaxPool(), {"x": X, "scores": randn(N, 2), **OF_BAGS}

ARRAYS = {"array", "list"}
RIGHT = {  # here
    ("heatmap", "coords"): ARRAYS,
    ("heatmap", "weights"): ARRAYS,
    ("attention_arrays", "coords"): ARRAYS,
    ("heatmap to", "path"): {"text"},
    ("from_padded with", "lengths"): ARRAYS,
    ("Bags", "values"): {"complex", "quantized"},  # of any type
    ("from_padded", "x"): {"complex", "quantized"},
    ("from_batch", "x"): {"complex", "quantized"},
    ("Bags with", "extras"): {"dict"},
    ("from_list and", "extras"): {"dict"},
    ("from_padded and", "extras"): {"dict"},
    ("collate_bags with", "per_instance"): {"dict", "set"},
    ("ramp_up", "epoch"): {"0"},
    ("from_batch", "num_bags"): {"0"},
}
# A nested x has its own offsets and mask, which are named then.
TOGETHER = {
    (f"{kind.__name__}.forward", "x"): {"nested", "nested rows"}
    for kind in (*MODULES, nn.MeanPool, nn.MaxPool, nn.SoftmaxPool)
}


@pytest.mark.parametrize("name", CALLS)
def test_the_argument_is_named(name):
    function, good = CALLS[name]
    if all(value != () for value in good.values() if isinstance(value, tuple)):
        function(**good)
    for argument, value in good.items():
        fine = RIGHT.get((name, argument), set()) | TOGETHER.get((name, argument), set())
        for what, bad in wrong(value).items():
            if what in fine or (argument == "seed" and what == "0"):
                continue
            with pytest.raises((TypeError, ValueError)) as raised:
                function(**(good | {argument: bad}))
                pytest.fail(f"{argument}={what} was taken")
            assert re.search(rf"\b{argument}\b", str(raised.value)), f"{argument}={what}: {raised.value}"


@pytest.mark.parametrize("value", [-torch.inf, -1e9, 0.5, float("nan")])
def test_a_mask_that_is_added_to_scores(value):
    mask = torch.zeros(N).index_fill(0, torch.tensor([2, 5]), value)
    for call in (
        lambda: mk.mean_pool(X, mask=mask),
        lambda: mk.Bags(X, mask=mask),
        lambda: nn.AttentionPool(L)(X, mask=mask),
        lambda: nn.AttentionPool(L)(X[None], mask=mask[None]),
        lambda: mk.noisy_or_pool(P, mask=mask),
    ):
        with pytest.raises(ValueError, match=f"mask must be bool, or 1 for .*; got {value}"):
            call()
    for dtype in (torch.bool, torch.uint8, torch.float64):
        assert torch.equal(mk.mean_pool(X, mask=(mask == 0).to(dtype)), mk.mean_pool(X, mask=mask == 0))
    integers = (mask == 0).int() * 255  # as images have them
    assert torch.equal(mk.mean_pool(X, mask=integers), mk.mean_pool(X, mask=mask == 0))


MODELS = [
    lambda **d: nn.ABMIL(L, 2, 8, **d),
    lambda **d: nn.ABMIL(L, 2, None, **d),
    lambda **d: nn.ABMIL(L, 2, (8, 4), **d),
    lambda **d: nn.CLAM(L, 2, 8, **d),
    lambda **d: nn.CLAM(L, 2, None, multi_branch=True, **d),
    lambda **d: nn.DSMILModel(L, 2, 8, **d),
    lambda **d: nn.DSMILModel(L, 2, **d),
    lambda **d: nn.LossAttentionModel(L, 2, (8,), **d),
    lambda **d: nn.InstancePooling(L, 2, (8,), **d),
    lambda **d: nn.InstancePooling(L, 2, (), **d),
    lambda **d: nn.EmbeddingPooling(L, 2, (8,), **d),
    lambda **d: nn.EmbeddingPooling(L, 2, (), "mean", **d),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_features_beside_a_model_of_another_type(model, dtype):
    """A model takes them, or says which types there are; PyTorch names "mat1" and "mat2"."""
    model = model()
    with torch.autocast("cpu", torch.bfloat16):
        if dtype != torch.float64:
            assert model(X.to(dtype), OFFSETS).logits.isfinite().all()
    try:
        assert model(X.to(dtype), OFFSETS).logits.isfinite().all() and dtype != torch.float64
    except TypeError as error:
        assert f"x must be of the type of the parameters, torch.float32; got {dtype}" in str(error)
    assert model.to(dtype)(X.to(dtype), OFFSETS).logits.isfinite().all()


def test_weights_of_several_bags_need_their_offsets():
    offsets = torch.tensor([0, 2, 4])
    pooled = mk.softmax_pool(torch.randn(4, 3), torch.zeros(4, 1), offsets)
    with pytest.raises(ValueError, match="offsets of the call must be given where pooled is of 2 bags; got None"):
        mk.attention_weights(pooled)


def test_weights_of_several_heads_are_shown_how_to_be_one():
    coords = torch.arange(2 * N).view(N, 2)
    with pytest.raises(ValueError, match=r"those of one head, as weights\[:, 0\]; got shape \(9, 1\)"):
        visualize.heatmap(coords, P[:, :1])
    with pytest.raises(ValueError, match=r"those of one head, as weights\[0\]; got shape \(1, 9\)"):
        visualize.heatmap(coords, P[:, 0][None])


def test_dense_tensors():
    for layout in ("sparse", "mkldnn", "nested", "csr"):
        with pytest.raises(TypeError, match="t must be a dense tensor; got"):
            check_dense("t", wrong_tensors(X)[layout])
