"""What is accelerated, as a table: a model that people have, small, the calls that are made of it, and what is expected
to be recognised; and what is done with an entry of it: inputs, outputs, gradients."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import upstream_models as up
import upstream_padded as pad
from torch import Tensor, nn

import milkernels
from milkernels import ops

L, E, D, N = 24, 20, 16, 40  # width, of the embedding, hidden units, instances
LENGTHS = (12, 5, 9)
REAL = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
HOLES = REAL & (torch.arange(36).reshape(3, 12) % 4 != 2)
LENS = torch.tensor(LENGTHS)
LABELS = torch.tensor([0, 1, 1])
PTR = torch.tensor([0, 15, 15, 29, N])
INDEX = torch.arange(4).repeat_interleave(PTR.diff())
BAG, BATCH, IMAGES = {"x": (N, L)}, {"x": (3, 12, L)}, {"x": (1, 12, 1, 10, 10)}

Call = Callable[[nn.Module, dict[str, Tensor]], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: dict[str, tuple]
    calls: dict[str, Call]
    changed: dict[str, str]  # name of the module: what it is taken for
    chosen: Callable[[Any], Any] = lambda out: ()  # what is chosen, where indices are not among the outputs
    layer: str = ""  # one that is passed over
    embedding: str = ""  # the Linear of the embedding that ops take
    eager: tuple[str, ...] = ()  # calls that need all embedded instances, or are not fused

    def model(self, dtype=torch.float64, training=False) -> nn.Module:
        """In training no unit is dropped.  Scores are spread, ReLUs on one side of their kink, as far as is known."""
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            model = self.make()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data *= 2
            if isinstance(module, nn.Dropout) and training:
                module.p = 0.0
        return model.to(dtype).train(training)

    def draw(self, seed: int, dtype=torch.float64, change: float = 0.0) -> dict[str, Tensor]:
        """Features with a mean; ``change``: each number is off by this share."""
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, size in self.inputs.items():
            t = torch.randn(size, generator=generator, dtype=torch.float64).relu().to(dtype)
            noise = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
            made[name] = (t * (1 + change * noise)).to(dtype).requires_grad_()
        return made


def accelerated(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    report = milkernels.accelerate(model, min_instances=0)
    assert report.changed, str(report)
    return model


# Calls


def plain(m, t):
    return m(t["x"])


def clam(label=None, **options) -> Call:
    options |= {} if label is None else {"label": torch.tensor([label]), "instance_eval": True}
    return lambda m, t: m(t["x"], **options)


CLAM_CALLS = {
    "plain": plain,
    "features": clam(return_features=True),
    "attention": clam(attention_only=True),
    "class 0": clam(0),
    "class 1": clam(1, return_features=True),
}


def most_and_least(k: int) -> Callable:
    """Instances that are attended most and least, as a set, and how many of them have a number of their own: equal
    ones, in a half type, may be chosen in any order."""

    def chosen(out):
        if isinstance(out, Tensor):
            return ()
        ends = [(sign * out[3].softmax(1)).topk(k) for sign in (1, -1)]
        return [t for values, rows in ends for t in (rows.sort(1).values, values.diff().count_nonzero())]

    return chosen


CLAM_LOSS = {"loss": lambda m, t: m.compute_loss(LABELS, t["x"])}


def attended_in_log(out):
    """The same of MIL-Lab's, of its four."""
    scores = out[1]["attention"] if isinstance(out, tuple) and "attention" in out[1] else torch.zeros(1, 8)
    return [(sign * scores[0]).topk(4).indices.sort().values for sign in (1, -1)]


def pool_calls(*tensors: str) -> dict[str, Call]:
    """Scores of padding are not compared: these return what they are, the fused -inf."""

    def scores(mask):
        def call(m, t):
            bag, scores = m(*(t[name] for name in tensors), mask, return_att=True)
            return bag, scores if mask is None else scores[mask.bool()]

        return call

    return {
        "plain": lambda m, t: m(*(t[name] for name in tensors)),
        "scores": scores(None),
        "mask": lambda m, t: m(*(t[name] for name in tensors), REAL),
        "holes": scores(HOLES),
        "numbers": lambda m, t: m(*(t[name] for name in tensors), mask=HOLES.to(t["x"].dtype)),
    }


def numbers(m, t):
    """MIL-Lab's masks."""
    return HOLES.to(t["x"].dtype)


def features_at_real(m, t):
    bag, found = m.forward_features(t["x"], attn_mask=numbers(m, t), return_attention=True)
    return bag, found["attention"].squeeze(1)[HOLES]


def clam_millab(label: int, **options) -> Call:
    """Its training step; numbers of the log as tensors in the type that they had."""
    options |= {"label": torch.tensor([label]), "loss_fn": nn.functional.cross_entropy}

    def call(m, t):
        results, log = m(t["x"], **options)
        numbers = {key: results["loss"].new_tensor(v) for key, v in log.items() if isinstance(v, float)}
        return results, log | numbers

    return call


def encoder(**options) -> Call:
    return lambda m, t: m({"features": t["x"]}, "cpu", **options)


def multi_head_at_real(m, t):
    bag, scores = m(t["x"], HOLES)
    return bag, scores.movedim(-1, 1)[HOLES]


MILLAB_CALLS = {
    "plain": plain,
    "features": lambda m, t: m.forward_features(t["x"]),
    "slide": lambda m, t: m(t["x"], return_attention=True, return_slide_feats=True),
    "holes": features_at_real,
    "attention": lambda m, t: m.forward_attention(t["x"]),
}
DSMIL_CALLS = {
    "plain": lambda m, t: (m(t["x"]), m.inst_classifier(t["x"]).detach()),
    "weights": lambda m, t: (*m(t["x"], return_att=True), m.inst_classifier(t["x"]).detach()),
    "all": lambda m, t: m(t["x"], None, True, True),
    "mask": lambda m, t: m(t["x"], torch.ones(3, 12), True, True),
    "loss": lambda m, t: (*m.compute_loss(LABELS, t["x"]), m.inst_classifier(t["x"])),
}
SLIDEFLOW_CALLS = {
    "plain": lambda m, t: m(t["x"], LENS),
    "weights": lambda m, t: m(t["x"], LENS, return_attention=True),
    "attention": lambda m, t: m.calculate_attention(t["x"], LENS),
    "scores": lambda m, t: m.calculate_attention(t["x"], LENS, apply_softmax=False)[REAL],
    "uncertainty": lambda m, t: m(t["x"], LENS, uq=True),
    "one instance": lambda m, t: m(t["x"][:, :1], LENS.clamp(max=1), return_attention=True),
}
PYG_CALLS = {
    "one bag": plain,
    "index": lambda m, t: m(t["x"], INDEX),
    "more bags": lambda m, t: m(t["x"], INDEX, dim_size=6),
    "ptr": lambda m, t: m(t["x"], ptr=PTR),
    "unsorted": lambda m, t: m(t["x"], INDEX.flip(0), dim_size=4),
}

GATED, PLAIN = "gated attention network", "attention network"
SIZES = {"sizes": (L, E, D)}


def _clam(make, k=4, **options) -> Case:
    start = options.pop("start", 0)  # of the last layer of the embedding
    at, gated = f"attention_net.{start + (2 if options.get('old') else 3)}", options.get("gate", True)
    changed = {at: (GATED if gated else PLAIN) + " that returns x", "": "CLAM"}
    changed |= {} if gated else {f"{at}.module": PLAIN + ", sequential"}
    return Case(
        lambda: make(k_sample=k, **SIZES, **options),
        BAG,
        CLAM_CALLS,
        changed,
        most_and_least(k),
        f"{at}.attention_c" if gated else f"{at}.module.0",
        f"attention_net.{start}",
    )


def deep_clam(**options) -> nn.Module:
    """One more layer in front."""
    model = up.ClamSB(**options)
    model.attention_net = nn.Sequential(*up.dense(L, L, activation=nn.Tanh, dropout=0.25), *model.attention_net)
    return model


def _milnet(classes=2, **options) -> Case:
    options = {"units": D} | options
    return Case(
        lambda: up.MILNet(up.FCLayer(L, classes), up.BClassifier(L, classes, **options)),
        BAG,
        {"plain": plain},
        {"b_classifier": "DSMIL, second stream", "": "DSMIL, both streams"},
        lambda out: out[0].argmax(0),
        "i_classifier.fc.0",
    )


def _pool(make, calls, changed, layer, inputs=BATCH, **more) -> Case:
    return Case(make, inputs, calls, changed, layer=layer, **more)


def deep_extractor() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(L), nn.Linear(L, L), nn.ReLU(), *up.dense(L, E, activation=nn.Tanh, dropout=0.2))


def _torchmil_pool(**options) -> Case:
    name = {"": "attention pooling (torchmil)"}
    return _pool(lambda: pad.AttentionPool(L, D, **options), pool_calls("x"), name, "fc1.module")


def _pyg(make, layer="") -> Case:
    name = {"": "attentional aggregation (PyG)"}
    return Case(make, BAG, PYG_CALLS, name, layer=layer)


def gate_nn(heads=1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(L, D), nn.Tanh(), nn.Linear(D, heads))


CASES = {
    "clam-net": Case(
        lambda: up.AttnNet(L, D, True, 3),
        BAG,
        {"plain": plain},
        {"": PLAIN + " that returns x", "module": PLAIN + ", sequential"},
        layer="module.3",
    ),
    "clam-net-gated": Case(
        lambda: up.AttnNetGated(L, D, True, 3),
        BATCH,
        {"plain": plain},
        {"": GATED + " that returns x"},
        layer="attention_a.0",
    ),
    "clam-sb": _clam(up.ClamSB, dropout=0.25),
    "clam-sb-plain-old": _clam(up.ClamSB, gate=False, old=True),
    "clam-sb-subtyping": _clam(up.ClamSB, dropout=0.25, subtyping=True, n_classes=3),
    "clam-deep": _clam(deep_clam, dropout=0.25, start=3),
    "clam-mb": _clam(up.ClamMB, dropout=0.25, n_classes=3),
    "clam-mb-plain-subtyping": _clam(up.ClamMB, gate=False, subtyping=True),
    "attention": Case(
        lambda: up.Attention(E, D, channels=3),
        IMAGES,
        {"plain": plain},
        {"": "attention MIL (AttentionDeepMIL)", "attention": PLAIN + ", sequential"},
        layer="attention.1",
        embedding="feature_extractor_part2.0",
    ),
    "attention-gated": Case(
        lambda: up.GatedAttention(E, D, channels=3),
        IMAGES,
        {"plain": plain},
        {"": "attention MIL (AttentionDeepMIL)"},
        layer="attention_w",
        embedding="feature_extractor_part2.0",
    ),
    "loss-attention": Case(
        lambda: up.LossAttention(E, channels=3),
        IMAGES,
        {"plain": plain},
        {"": "Loss-Attention"},
        layer="att_layer",
        embedding="feature_extractor_part2.0",
    ),
    "dsmil": _milnet(dropout_v=0.2, passing_v=True),
    "dsmil-linear": _milnet(1, nonlinear=False),
    "dsmil-published-width": _milnet(units=128),
    "dsmil-second-stream": Case(
        lambda: up.BClassifier(L, 2, units=D),
        BAG | {"c": (N, 2)},
        {"plain": lambda m, t: (*m(t["x"], t["c"]), t["c"] * 1)},
        {"": "DSMIL, second stream"},
        lambda out: out[3].argmax(0),
        "q.0",
    ),
    "dsmil-images": Case(
        lambda: up.MILNet(up.IClassifier(up.convolutions(3), 12, 2), up.BClassifier(12, 2, units=D)),
        {"x": (30, 1, 10, 10)},
        {"plain": plain},
        {"b_classifier": "DSMIL, second stream", "": "DSMIL, both streams"},
        lambda out: out[0].argmax(0),
        "i_classifier.fc",
    ),
    "dtfd": Case(
        lambda: up.PlainWeights(L, D, 2),
        BAG,
        {"plain": plain, "scores": lambda m, t: m(t["x"], isNorm=False)},
        {"": "attention weights (DTFD-MIL)", "attention": PLAIN + ", sequential"},
        layer="attention.0",
    ),
    "dtfd-classifier": Case(
        lambda: up.AttentionWithClassifier(L, D),
        BAG,
        {"plain": plain},
        {"": "attention pooling, found by its graph", "attention": "attention weights (DTFD-MIL)"},
        layer="attention.attention_U.1",
    ),
    "hi-ml": Case(
        lambda: up.PlainPooling(L, D, 2),
        BATCH,
        {"plain": plain},
        {"": "attention layer (hi-ml)", "attention": PLAIN + ", sequential"},
        layer="attention.0",
    ),
    "hi-ml-gated": Case(
        lambda: up.GatedPooling(L, D),
        BAG,
        {"plain": plain},
        {"": "attention layer (hi-ml)"},
        layer="attention_weights",
    ),
    "pyg": Case(
        lambda: up.AttentionalAggregation(gate_nn()),
        BAG,
        PYG_CALLS,
        {"": "attentional aggregation (PyG)", "gate_nn": PLAIN + ", sequential"},
        layer="gate_nn.2",
    ),
    "pyg-values": Case(
        lambda: up.AttentionalAggregation(gate_nn(), nn.Linear(L, 8)),
        BAG,
        PYG_CALLS,
        {"": "attentional aggregation (PyG)", "gate_nn": PLAIN + ", sequential"},
        layer="gate_nn.0",
    ),
    "pyg-linear-gate": _pyg(lambda: up.AttentionalAggregation(nn.Linear(L, 1), nn.Linear(L, 8))),
    "pyg-mlp": _pyg(lambda: up.AttentionalAggregation(up.Perceptron(L, D, 1), up.Perceptron(L, 8))),
    "torchmil-pool": _torchmil_pool(),
    "torchmil-pool-gelu-gated": _torchmil_pool(act="gelu", gated=True),
    "torchmil-pool-relu": _torchmil_pool(act="relu"),
    "torchmil-abmil": _pool(
        lambda: pad.ABMIL(L, D, gated=True),
        pool_calls("x") | {"loss": lambda m, t: m.compute_loss(LABELS, t["x"], REAL)},
        {"pool": "attention pooling (torchmil)", "": "attention MIL (torchmil)"},
        "pool.act_gated",
    ),
    "torchmil-abmil-embedding": _pool(
        lambda: pad.ABMIL(E, D, feat_ext=deep_extractor()),
        pool_calls("x") | {"loss": lambda m, t: m.compute_loss(LABELS, t["x"], REAL)},
        {"pool": "attention pooling (torchmil)", "": "attention MIL (torchmil)"},
        "pool.fc2",
        embedding="feat_ext.3",
    ),
    "torchmil-clam": _pool(
        lambda: pad.ClamTorchmil(L, D, k_sample=3, gated=True),
        pool_calls("x") | CLAM_LOSS,
        {"pool": "attention pooling (torchmil)", "": "CLAM (torchmil)"},
        "pool.fc2",
    ),
    "torchmil-clam-embedding": _pool(
        lambda: pad.ClamTorchmil(E, D, k_sample=3, gated=True, feat_ext=up.dense(L, E, activation=nn.GELU)),
        pool_calls("x") | CLAM_LOSS | {"embedded": lambda m, t: m(t["x"], return_emb=True)},
        {"pool": "attention pooling (torchmil)", "": "CLAM (torchmil)"},
        "pool.fc2",
        embedding="feat_ext.0",
        eager=("embedded",),
    ),
    "torchmil-camil": _pool(
        lambda: pad.CAMILAttentionPool(L, D),
        pool_calls("x", "values"),
        {"": "attention pooling of two tensors (CAMIL)"},
        "fc1",
        BATCH | {"values": (3, 12, 7)},
    ),
    "torchmil-camil-gated": _pool(
        lambda: pad.CAMILAttentionPool(L, D, True),
        pool_calls("x", "values"),
        {"": "attention pooling of two tensors (CAMIL)"},
        "act_gated",
        BATCH | {"values": (3, 12, L)},
    ),
    "torchmil-dsmil": Case(
        lambda: pad.DSMIL(L, D),
        BATCH,
        DSMIL_CALLS,
        {"": "DSMIL (torchmil)"},
        lambda out: out[-1].reshape(3, 12).argmax(1),
        "inst_classifier",
    ),
    "torchmil-dsmil-nonlinear": Case(
        lambda: pad.DSMIL(L, D, True, True, 0.2),
        BATCH,
        DSMIL_CALLS,
        {"": "DSMIL (torchmil)"},
        lambda out: out[-1].reshape(3, 12).argmax(1),
        "v_nn.2",
    ),
    "torchmil-dsmil-embedding": Case(
        lambda: pad.DSMIL(E, D, feat_ext=nn.Linear(L, E)),
        BATCH,
        {name: DSMIL_CALLS[name] for name in ("all", "mask")},
        {"": "DSMIL (torchmil)"},
        lambda out: out[-1].reshape(3, 12).argmax(1),
        "inst_classifier",
        embedding="feat_ext",
    ),
    "millab-abmil": _pool(
        lambda: pad.MILLabABMIL(L, E, 0.25, D),
        MILLAB_CALLS,
        {"global_attn": GATED, "": "attention MIL (MIL-Lab)"},
        "global_attn.attention_c",
        embedding="patch_embed.0",
        eager=("attention",),
    ),
    "millab-abmil-plain": _pool(
        lambda: pad.MILLabABMIL(L, E, 0.25, D, gate=False, layers=2),
        MILLAB_CALLS,
        {"global_attn": PLAIN, "": "attention MIL (MIL-Lab)", "global_attn.module": PLAIN + ", sequential"},
        "global_attn.module.1",
        embedding="patch_embed.3",
        eager=("attention",),
    ),
    "millab-dsmil": Case(
        lambda: pad.MILLabDSMIL(L, E, D, 0.2, 3),
        BATCH,
        {
            "plain": lambda m, t: m(t["x"], return_attention=True),
            "features": lambda m, t: m.forward_features(t["x"]),
            "mask": lambda m, t: m.forward_features(t["x"], numbers(m, t) * 0 + 1, True),
        },
        {"b_classifier": "DSMIL, second stream (MIL-Lab)", "": "DSMIL, both streams (MIL-Lab)"},
        lambda out: out[1]["instance_classes"].argmax(1) if "instance_classes" in out[1] else (),
        "i_classifier.inst_classifier",
        embedding="patch_embed.0",
    ),
    "millab-clam": Case(
        lambda: pad.MILLabCLAM(L, E, 0.25, True, D, k=4),
        {"x": (1, N, L)},
        {
            "plain": clam_millab(1),
            "slide": clam_millab(0, return_slide_feats=True),
            "features": lambda m, t: m.forward_features(t["x"]),
            "no scores": lambda m, t: m.forward_features(t["x"], return_attention=False),
        },
        {"global_attn": GATED, "": "CLAM (MIL-Lab)"},
        attended_in_log,
        layer="global_attn.attention_b.0",
        embedding="patch_embed.0",
        eager=("features", "no scores"),
    ),
    "millab-clam-subtyping": Case(
        lambda: pad.MILLabCLAM(L, E, 0.25, False, D, 3, layers=2, k=4),
        {"x": (1, N, L)},
        {"plain": clam_millab(2)},
        {"global_attn": PLAIN, "global_attn.module": PLAIN + ", sequential", "": "CLAM (MIL-Lab)"},
        attended_in_log,
        layer="global_attn.module.0",
        embedding="patch_embed.3",
    ),
    "millab-wrapper": _pool(
        lambda: pad.Captured(pad.MILLabABMIL(L, E, 0.25, D)),
        {name: MILLAB_CALLS[name] for name in ("plain", "features", "slide", "holes")},
        {"model.global_attn": GATED, "model": "attention MIL (MIL-Lab)"},
        "model.global_attn.attention_c",
    ),
    "trident": _pool(
        lambda: pad.MultiHead(L, D, 3, 0.1, 1, True),
        {"plain": plain, "holes": multi_head_at_real},
        {"": "multi-head attention MIL (TRIDENT)"},
        "gating_layers.1.0",
    ),
    "trident-branches": _pool(
        lambda: pad.MultiHead(L, D, 2, 0.1, 3),
        {"plain": plain, "holes": multi_head_at_real},
        {"": "multi-head attention MIL (TRIDENT)"},
        "branching_layers.1",
    ),
    "trident-encoder": _pool(
        lambda: pad.SlideEncoder(L, D, 2, 0.1),
        {"plain": encoder(), "scores": encoder(return_raw_attention=True)},
        {
            "model.image_pooler": "multi-head attention MIL (TRIDENT)",
            "": "attention MIL (TRIDENT's slide encoder)",
        },
        "model.image_pooler.gating_layers.1.0",
        embedding="model.pre_attention_layers.0",
    ),
    "slideflow": Case(
        lambda: pad.SlideflowMIL(L, 2, E, hidden=D),
        BATCH,
        SLIDEFLOW_CALLS,
        {"": "attention MIL (slideflow)", "attention": PLAIN + ", sequential"},
        layer="attention.2",
        embedding="encoder.0",
        eager=("attention", "scores", "uncertainty", "one instance"),
    ),
    "slideflow-temperature": Case(
        lambda: pad.SlideflowMIL(L, 2, E, hidden=D, temperature=2.0),
        BATCH,
        SLIDEFLOW_CALLS,
        {"": "attention MIL (slideflow)", "attention": PLAIN + ", sequential"},
        layer="attention.0",
    ),
    "slideflow-quantile": Case(
        lambda: pad.SlideflowMIL(L, 2, E, hidden=D, attention_gate=0.5),
        BATCH,
        {name: SLIDEFLOW_CALLS[name] for name in ("attention", "scores")},
        {"": "attention MIL (slideflow)", "attention": PLAIN + ", sequential"},
        layer="attention.0",
    ),
}


# Outputs and gradients


def flat(out: Any) -> list[Tensor]:
    """The tensors of what a call returned, in order."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, tuple | list):
        return [t for value in out for t in flat(value)]
    return [torch.as_tensor(out)] if hasattr(out, "__array__") else []


def kind(out: Any) -> Any:
    """All about it but the numbers."""
    if isinstance(out, Tensor):
        return out.dtype, tuple(out.shape), out.requires_grad
    if isinstance(out, dict):
        return [(key, kind(value)) for key, value in out.items()]
    if isinstance(out, tuple | list):
        return type(out).__name__, [kind(value) for value in out]
    return (type(out).__name__, *((str(out.dtype), out.shape) if hasattr(out, "__array__") else (out,)))


def cotangent(t: Tensor, seed: int) -> Tensor:
    """The same numbers in every type."""
    numbers = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(torch.bfloat16).to(t.dtype)


def step(model: nn.Module, call: Call, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor | None]]:
    """What is returned, and the gradients of all of it: of every input and parameter."""
    leaves = inputs | {name: p for name, p in model.named_parameters()}
    out = call(model, inputs)
    outputs = [t for t in flat(out) if t.requires_grad]
    given = [cotangent(t, i) for i, t in enumerate(outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True)
    return out, dict(zip(leaves, found, strict=True))


def results(out: Any, gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    named = {f"output {i}": t.detach() for i, t in enumerate(flat(out))}
    return named | {f"gradient of {name}": g for name, g in gradients.items() if g is not None}


OPS = ("softmax_pool", "attention_pool", "gated_attention_pool", "attention_scores", "gated_attention_scores")
OPS += ("segment_softmax", "dsmil_pool", "dsmil", "loss_attention_pool")


def counted(monkeypatch) -> list[str]:
    """From now on every call of a fused op is written down there."""
    calls = []

    def counting(name, op):
        return lambda *args, **kwargs: (calls.append(name), op(*args, **kwargs))[1]

    for name in OPS:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return calls
