"""Modules with the attributes of those in upstream_models.py and upstream_padded.py that return something else: each
must be left alone.  The table says why, as the report must."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import upstream_models as up
import upstream_padded as pad
from accelerate_cases import BAG, BATCH, IMAGES, LABELS, LENS, REAL, D, E, L, gate_nn, plain
from torch import nn
from torch.nn.utils import prune


class LookAlike(NamedTuple):
    make: Callable[[], nn.Module]
    reason: str  # a regular expression, of what differs
    inputs: dict[str, tuple] = BAG
    call: Callable = plain


def returning(base: type, change: Callable, method: str = "forward") -> type:
    """A subclass whose method takes the same and returns ``change(module, what its base returns)``."""
    original = getattr(base, method)

    @functools.wraps(original)  # takes the same
    def changed(self, *args, **kwargs):
        return change(self, original(self, *args, **kwargs))

    return type(f"Other{base.__name__}", (base,), {method: changed})


def with_layer(model: nn.Module, path: str, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, change(getattr(parent, name)))
    return model


class TakesAnother(up.AttnNetGated):
    def forward(self, bag, temperature=1.0):
        return super().forward(bag)


class Unequal(up.AttnNetGated):
    """Raises for what the proof gives it."""

    def forward(self, x):
        if x.ndim == 3:
            raise IndexError("one bag at a time")
        return super().forward(x)


class TanhUnits(nn.Tanh):
    def forward(self, input):
        return super().forward(input) * 1.7159


class NoSoftmax(pad.AttentionPool):
    def forward(self, X, mask=None, return_att=False):
        scores = self.fc2(self.act_layer(self.fc1(X)))
        bag = (scores.sigmoid().mT @ X).squeeze(1)
        return (bag, scores.squeeze(-1)) if return_att else bag


class NoMask(pad.AttentionPool):
    def forward(self, X, mask=None, return_att=False):
        return super().forward(X, None, return_att)


class Flattened(up.Attention):
    """Its classifier takes the bags of all branches in one row."""

    def __init__(self):
        super().__init__(E, D, branches=2, channels=3)

    def forward(self, x):
        h = self.embedded(x)
        weights = self.scores(h).T.softmax(1)
        probability = self.classifier((weights @ h).view(1, -1))
        return probability, (probability >= 0.5).float(), weights


class OtherInstances(up.ClamSB):
    """Learns from those in the middle as well."""

    def inst_eval(self, A, h, classifier):
        loss, *rest = super().inst_eval(A, h, classifier)
        return (loss + h.mean(), *rest)


class SumOfHeads(pad.MultiHead):
    def forward(self, features, attn_mask=None):
        bag, scores = super().forward(features, attn_mask)
        return bag, scores.mean(2, keepdim=True).expand_as(scores)


class LengthsInclude(pad.SlideflowMIL):
    def _masked_attention_scores(self, embeddings, lens, *, apply_softmax=True):
        return super()._masked_attention_scores(embeddings, lens + 1, apply_softmax=apply_softmax)


class Unscaled(up.BClassifier):
    """As in the paper."""

    def forward(self, feats, c):
        values, queries = self.v(feats), self.q(feats)
        critical = c.argmax(0)
        weights = (queries @ queries[critical].T).softmax(0)
        bag = (weights.T @ values)[None]
        return self.fcc(bag).view(1, -1), weights, bag


class LowestIsCritical(pad.DSMIL):
    def forward(self, X, mask=None, return_att=False, return_inst_pred=False):
        self.inst_classifier.weight.data.neg_()
        out = super().forward(X, mask, return_att, False)
        self.inst_classifier.weight.data.neg_()
        out = out if isinstance(out, tuple) else (out,)
        out = (*out, *[self.inst_classifier(X).squeeze(-1)] * return_inst_pred)
        return out if len(out) > 1 else out[0]


def gated(cls: type = up.AttnNetGated, heads: int = 2) -> nn.Module:
    return cls(L, D, True, heads)


def clam(cls: type) -> nn.Module:
    return cls(k_sample=4, sizes=(L, E, D), dropout=0.25)


def dsmil(stream: type, both: type = up.MILNet) -> nn.Module:
    return both(up.FCLayer(L, 2), stream(L, 2, units=D))


def hooked(model: nn.Module) -> nn.Module:
    model.attention_b[0].register_forward_hook(_nothing)
    return model


def _nothing(*args):
    return None


def pruned(model: nn.Module) -> nn.Module:
    prune.l1_unstructured(model.attention_a[0], "weight", amount=0.5)
    return model


def replaced(model: nn.Module) -> nn.Module:
    model.forward = functools.partial(type(model).forward, model)
    return model


def _swapped(m, out):
    return out[::-1]


def _halved_instance_loss(m, out):
    found = out[4] if len(out) == 5 else {}
    return (*out[:4], found | {"instance_loss": found["instance_loss"] / 2}) if "instance_loss" in found else out


def _one_more(m, out):
    return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1


def _halved_losses(m, out):
    return out[0], {name: loss / 2 for name, loss in out[1].items()}


def _weights_for_scores(m, out):
    bag, found = out
    return bag, {name: t if t is None else t.softmax(-1) for name, t in found.items()}


OTHER = r"returns other values \(shape \[{}\]\)"
CLAM_LOSS = {"call": lambda m, t: m(t["x"], torch.tensor([1]), True)}

LOOK_ALIKES = {
    "softmax of scores": LookAlike(
        lambda: gated(returning(up.AttnNetGated, lambda m, out: (out[0].softmax(0), out[1]))), OTHER.format("23, 2")
    ),
    "scaled scores": LookAlike(
        lambda: gated(returning(up.AttnNetGated, lambda m, out: (out[0] * 1.01, out[1]))), OTHER.format("23, 2")
    ),
    "something else than x": LookAlike(
        lambda: gated(returning(up.AttnNetGated, lambda m, out: (out[0], out[1] * 2))), OTHER.format("23, 24")
    ),
    "another order": LookAlike(
        lambda: gated(returning(up.AttnNetGated, _swapped)), r"returns float32\[23, 24\], not float32\[23, 2\]"
    ),
    "a third value": LookAlike(
        lambda: gated(returning(up.AttnNetGated, lambda m, out: (*out, out[0]))), "returns 3 values, not 2"
    ),
    "a list": LookAlike(lambda: gated(returning(up.AttnNetGated, lambda m, out: list(out))), "returns list, not "),
    "another type": LookAlike(
        lambda: gated(returning(up.AttnNetGated, lambda m, out: (out[0].float(), out[1]))),
        r"returns float32\[23, 2\], not float64",
    ),
    "noise": LookAlike(
        lambda: gated(returning(up.AttnNetGated, lambda m, out: (out[0] + torch.rand(()), out[1]))),
        OTHER.format("23, 2"),
    ),
    "approximate GELU": LookAlike(
        lambda: with_layer(gated(), "attention_a.1", lambda _: nn.GELU("tanh")),
        r"attention_a\[1\] is the approximate GELU",
    ),
    "another activation": LookAlike(
        lambda: with_layer(gated(), "attention_a.1", lambda _: nn.Hardtanh()), r"attention_a\[1\] is Hardtanh"
    ),
    "a subclass of the activation": LookAlike(
        lambda: with_layer(gated(), "attention_a.1", lambda _: TanhUnits()), r"attention_a\[1\] is TanhUnits"
    ),
    "two tanh": LookAlike(
        lambda: with_layer(gated(), "attention_b.1", lambda _: nn.Tanh()), "not an activation times a sigmoid"
    ),
    "one more layer": LookAlike(
        lambda: with_layer(gated(), "attention_a", lambda m: nn.Sequential(*m, nn.LayerNorm(D))), "has 4 layers"
    ),
    "more outputs than scores": LookAlike(lambda: gated(heads=40), "40 outputs, more than 32"),
    "other arguments": LookAlike(lambda: gated(TakesAnother), "forward takes bag, temperature, not x"),
    "raises": LookAlike(lambda: gated(Unequal), "forward raised IndexError: one bag at a time"),
    "hooks": LookAlike(lambda: hooked(gated()), r"attention_b\[0\] has hooks"),
    "pruned": LookAlike(lambda: pruned(gated()), r"attention_a\[0\] has hooks"),
    "replaced forward": LookAlike(lambda: replaced(gated()), "forward was replaced on the instance"),
    "clam, scores before the softmax": LookAlike(
        lambda: clam(returning(up.ClamSB, lambda m, out: (*out[:3], -out[3], out[4]) if len(out) == 5 else out)),
        OTHER.format("1, 15"),
    ),
    "clam, one more result": LookAlike(
        lambda: clam(returning(up.ClamMB, lambda m, out: (*out[:4], out[4] | {"more": 1}) if len(out) == 5 else out)),
        "a dict of features, more, not of features",
    ),
    "clam, another instance loss": LookAlike(
        lambda: clam(returning(up.ClamMB, _halved_instance_loss)), OTHER.format(""), **CLAM_LOSS
    ),
    "clam, instance losses of other instances": LookAlike(lambda: clam(OtherInstances), OTHER.format(""), **CLAM_LOSS),
    "attention, flattened": LookAlike(Flattened, "fused, raised RuntimeError", IMAGES),
    "attention, another order": LookAlike(
        lambda: returning(up.GatedAttention, _swapped)(E, D, channels=3), r"not float32\[1, 1\]", IMAGES
    ),
    "loss-attention, a sum": LookAlike(
        lambda: returning(up.LossAttention, lambda m, out: (out[0] * 23, *out[1:]))(E, channels=3),
        OTHER.format("1, 4"),
        IMAGES,
    ),
    "dsmil, unscaled": LookAlike(lambda: dsmil(Unscaled), "b_classifier is not known to be the second stream of DSMIL"),
    "dsmil, another order": LookAlike(
        lambda: dsmil(up.BClassifier, returning(up.MILNet, _swapped)), r"returns float32\[1, 2, 24\], not float32"
    ),
    "weights, of the other axis": LookAlike(
        lambda: returning(up.GatedWeights, lambda m, out: out.T)(L, D, 2), r"returns float32\[23, 2\], not float32"
    ),
    "pooling, another order": LookAlike(
        lambda: returning(up.GatedPooling, _swapped)(L, D, 2), r"returns float32\[2, 24\], not float32\[2, 23\]"
    ),
    "pyg, a gate for each feature": LookAlike(
        lambda: up.AttentionalAggregation(gate_nn(L)), "not one score per instance"
    ),
    "pyg, a mean": LookAlike(
        lambda: returning(up.AttentionalAggregation, lambda m, out: out / 2)(gate_nn()), OTHER.format("3, 24")
    ),
    "torchmil, no softmax": LookAlike(lambda: NoSoftmax(L, D), OTHER.format("2, 24"), BATCH),
    "torchmil, no mask": LookAlike(lambda: NoMask(L, D), r"forward\(mask, return_att\) returns other values", BATCH),
    "torchmil, dsmil of the lowest": LookAlike(lambda: LowestIsCritical(L, D), OTHER.format("2"), BATCH),
    "torchmil, clam with another loss": LookAlike(
        lambda: returning(pad.ClamTorchmil, _halved_losses, "compute_loss")(L, D, k_sample=3),
        OTHER.format(""),
        BATCH,
        lambda m, t: m.compute_loss(LABELS, t["x"]),
    ),
    "torchmil, two tensors": LookAlike(
        lambda: returning(pad.CAMILAttentionPool, lambda m, out: out[0] if isinstance(out, tuple) else out)(L, D),
        r"forward\(mask, return_att\) returns float32\[2, 24\], not \(",
        BATCH,
        lambda m, t: m(t["x"], t["x"], REAL, True),
    ),
    "millab, weights": LookAlike(
        lambda: returning(pad.MILLabABMIL, _weights_for_scores, "forward_features")(L, E, 0.2, D),
        OTHER.format("2, 1, 23"),
        BATCH,
        lambda m, t: m.forward_features(t["x"]),
    ),
    "millab, another network": LookAlike(
        lambda: with_layer(pad.MILLabABMIL(L, E, 0.2, D), "global_attn", lambda _: up.AttnNetGated(E, D)),
        "global_attn is not known to be",
        BATCH,
        lambda m, t: m.patch_embed(t["x"]),
    ),
    "millab, dsmil not normalised": LookAlike(
        lambda: returning(pad.MILLabDSMIL, lambda m, out: (out[0] + 1, out[1]), "forward_features")(L, E, D),
        OTHER.format("2, 2, 20"),
        BATCH,
    ),
    "millab, clam with a mean": LookAlike(
        lambda: returning(pad.MILLabCLAM, lambda m, out: (out[0] / 2, out[1]), "forward_features")(L, E, 0.2, True, D),
        OTHER.format("1, 20"),
        {"x": (1, 30, L)},
        lambda m, t: m.forward_features(t["x"]),
    ),
    "trident, mean of scores": LookAlike(lambda: SumOfHeads(L, D, 2), OTHER.format("2, 1, 2, 23"), BATCH),
    "trident, an encoder that adds": LookAlike(
        lambda: returning(pad.SlideEncoder, _one_more)(L, D, 2),
        OTHER.format("2, 24"),
        BATCH,
        lambda m, t: m({"features": t["x"]}, "cpu"),
    ),
    "trident, an encoder with branches": LookAlike(
        lambda: with_layer(pad.SlideEncoder(L, D, 2), "model.image_pooler", lambda _: pad.MultiHead(L, D, 2, 0.1, 3)),
        "forward raised|forward is not fused",
        BATCH,
        lambda m, t: m.model["image_pooler"](t["x"]),
    ),
    "torchmil, abmil of a mean": LookAlike(
        lambda: returning(pad.ABMIL, _one_more)(E, D, feat_ext=nn.Linear(L, E)), OTHER.format("2"), BATCH
    ),
    "slideflow, a longer bag": LookAlike(
        lambda: LengthsInclude(L, 2, E, hidden=D),
        r"_masked_attention_scores\(apply_softmax\) returns other values",
        BATCH,
        lambda m, t: m(t["x"], LENS),
    ),
}

# These pool by attention all the same: their structure leaves them alone, their graph serves what it was proven for.
SERVED_BY_THE_GRAPH = {
    "clam, scores before the softmax",
    "clam, one more result",
    "clam, another instance loss",
    "clam, instance losses of other instances",
    "pooling, another order",
    "torchmil, no mask",
    "millab, weights",
    "trident, mean of scores",
    "slideflow, a longer bag",
}
