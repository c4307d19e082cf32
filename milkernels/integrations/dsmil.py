"""DSMIL (Li et al. 2021): the stream of the critical instance, alone or with the instance classifier before it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from milkernels import ops
from milkernels._torch import submodules
from milkernels.integrations.engine import Structure, has, register, structure_of
from milkernels.integrations.layers import (
    Embedding,
    activation,
    check_plain,
    children,
    dropout,
    embedding,
    exactly,
    linear,
    masked_dtype,
    padded,
    refuse,
    their_dtype,
)
from milkernels.integrations.layers import original_class as class_of
from milkernels.integrations.proof import Example, Inputs
from milkernels.results import DSMILOutput, DSMILPooled

MIN_INSTANCES = (200, 200)
PADDING = "padding can no longer be the critical instance, as it can in the original"


def query(name: str, module: nn.Module) -> dict[str, Any]:
    """The query that ``Linear``, or ``Sequential(Linear, ReLU, Linear, Tanh)``, is, as arguments of the ops."""
    if class_of(module) is nn.Linear:
        return {"q": linear(name, module)}
    layers = children(name, module)
    if len(layers) != 4:
        refuse(f"{name} has {len(layers)} layers, not Linear, ReLU, Linear, Tanh")
    exactly(f"{name}[1]", layers[1], nn.ReLU)
    exactly(f"{name}[3]", layers[3], nn.Tanh)
    return {"q": linear(f"{name}[0]", layers[0]), "q2": linear(f"{name}[2]", layers[2])}


def value(name: str, module: nn.Module) -> dict[str, Any]:
    """The value that ``Identity``, or ``Sequential([Dropout, ]Linear[, activation])``, is, as arguments of the ops."""
    if class_of(module) is nn.Identity:
        check_plain(name, module)
        return {}
    layers = children(name, module)
    p = dropout(f"{name}[0]", layers.pop(0)) if layers and isinstance(layers[0], nn.Dropout) else 0.0
    if not 1 <= len(layers) <= 2:
        refuse(f"{name} is not Dropout, Linear and perhaps an activation")
    v = linear(f"{name}'s Linear", layers[0])
    act = activation(f"{name}'s activation", layers[1]) if len(layers) == 2 else None
    return {"value": v, "value_activation": act, "value_dropout_p": p}


class _Parts(NamedTuple):
    stream: dict[str, Any]  # arguments of ops.dsmil_pool and ops.dsmil
    classifier: tuple[Tensor, Tensor | None] | None = None  # of instances
    embedding: Embedding = Embedding()

    @property
    def dim(self) -> int:
        """The width of what the ops take."""
        return self.embedding.in_dim or self.stream["q"][0].shape[1]

    def dtype(self, x: Tensor):
        return their_dtype(x, self.stream["q"][0], *self.embedding.parameters)

    def both(self, x: Tensor, offsets: Tensor | None = None, mask: Tensor | None = None) -> DSMILOutput:
        options = {"mask": mask, "embed": self.embedding.embed, **self.stream}
        return ops.dsmil(x, self.classifier, offsets=offsets, **options)


def _second_stream(module: nn.Module) -> _Parts:
    return _Parts(query("q", module.q) | value("v", module.v))


class BClassifier(Structure):
    """The second stream of the authors' code: ``(prediction, weights, bag)`` of one bag and its instance scores."""

    name = "DSMIL, second stream"
    methods = {"forward": ("feats", "c")}
    min_instances = MIN_INSTANCES

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "q", "v", "fcc") and not has(module, "norm")

    def parts(self, module: nn.Module) -> _Parts:
        return _second_stream(module)

    def forward(self, module, parts, feats, c):
        if feats.ndim != 2 or c.ndim != 2:
            return NotImplemented
        return predict(module, ops.dsmil_pool(feats, c, **parts.stream), parts.dtype(feats))

    def examples(self, module: nn.Module, parts: _Parts, inputs: Inputs) -> Iterable[Example]:
        yield Example("forward", (inputs.bag(parts.dim), inputs.bag(module.fcc.in_channels)))


def predict(module: nn.Module, pooled: DSMILOutput | DSMILPooled, dtype) -> tuple[Tensor, Tensor, Tensor]:
    bag = pooled.bag.to(dtype)
    return module.fcc(bag).view(1, -1), ops.attention_weights(pooled).to(dtype), bag


class MILNet(Structure):
    """Both streams of the authors' code: FCLayer or IClassifier, and BClassifier."""

    name = "DSMIL, both streams"
    methods = {"forward": ("x",)}
    min_instances = MIN_INSTANCES
    opaque = ("i_classifier.feature_extractor",)

    def instances(self, x: Tensor) -> int:
        return x.shape[0]

    def looks_like(self, module: nn.Module) -> bool:
        return list(submodules(module)) == ["i_classifier", "b_classifier"]

    def parts(self, module: nn.Module) -> _Parts:
        instances, bags = module.i_classifier, module.b_classifier
        check_plain("i_classifier", instances)
        if structure_of(bags) is not SECOND_STREAM:
            refuse("b_classifier is not known to be the second stream of DSMIL")
        check_plain("b_classifier", bags)
        if list(submodules(instances)) == ["fc"]:
            layers = children("i_classifier.fc", instances.fc)
            fc = layers[0] if len(layers) == 1 else refuse("i_classifier.fc is more than one Linear")
        elif list(submodules(instances)) == ["feature_extractor", "fc"]:
            fc = instances.fc
        else:
            refuse("i_classifier is neither a layer fc nor feature_extractor and fc")
        return SECOND_STREAM.parts(bags)._replace(classifier=linear("i_classifier.fc", fc))

    def forward(self, module, parts, x):
        if has(module.i_classifier, "feature_extractor"):
            x = module.i_classifier.feature_extractor(x).flatten(1)
        elif x.ndim != 2:
            return NotImplemented
        pooled, dtype = parts.both(x), parts.dtype(x)
        return pooled.logits.to(dtype), *predict(module.b_classifier, pooled, dtype)

    def examples(self, module: nn.Module, parts: _Parts, inputs: Inputs) -> Iterable[Example]:
        yield Example("forward", (inputs.bag(parts.dim),))


def _rows(t: Tensor, batch: Tensor) -> Tensor:
    """``[B * M, ...]`` to ``[B, M, ...]``."""
    return t.unflatten(0, batch.shape[:2])


class TorchmilDSMIL(Structure):
    """DSMIL of torchmil, one class, over padded batches ``[B, M, ...]``."""

    name = "DSMIL (torchmil)"
    methods = {"forward": ("X", "mask", "return_att", "return_inst_pred")}
    min_instances = MIN_INSTANCES
    embedding = "feat_ext"
    note = PADDING

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "feat_ext", "q_nn", "v_nn", "inst_classifier", "bag_classifier")

    def parts(self, module: nn.Module) -> _Parts:
        stream = query("q_nn", module.q_nn) | value("v_nn", module.v_nn)
        return _Parts(stream, linear("inst_classifier", module.inst_classifier), embedding(module.feat_ext))

    def instances(self, x: Tensor) -> int:
        return x.shape[:2].numel()

    def forward(self, module, parts, X, mask=None, return_att=False, return_inst_pred=False):
        X = parts.embedding(X)
        if not return_inst_pred:  # parameters that nothing depends on have no gradient, rather than one of zeros
            parts = parts._replace(classifier=tuple(p if p is None else p.detach() for p in parts.classifier))
        pooled, dtype = parts.both(*padded(X, mask)), parts.dtype(X)
        results = [module.bag_classifier(pooled.bag.to(dtype)).squeeze(-1).squeeze(-1)]
        if return_att:
            bags = padded(X, None)[1]
            results.append(_rows(ops.attention_weights(pooled, bags), X).to(dtype))
        if return_inst_pred:
            results.append(_rows(pooled.logits, X).squeeze(-1).to(dtype))
        return tuple(results) if len(results) > 1 else results[0]

    def examples(self, module: nn.Module, parts: _Parts, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(parts.dim)
        yield Example("forward", (x,))
        yield Example("forward", (x,), {"return_inst_pred": True})
        yield Example("forward", (x,), {"mask": mask, "return_att": True}, mask)
        yield Example("forward", (x,), {"mask": mask, "return_att": True, "return_inst_pred": True}, mask)


class MILLabBClassifier(Structure):
    """The second stream of MIL-Lab's DSMIL, over padded batches: ``(normalised bag, weights)``."""

    name = "DSMIL, second stream (MIL-Lab)"
    methods = {"forward": ("h", "c", "attn_mask")}
    min_instances = MIN_INSTANCES
    note = PADDING

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "q", "v", "norm")

    def parts(self, module: nn.Module) -> _Parts:
        return _second_stream(module)

    def forward(self, module, parts, h, c, attn_mask=None):
        if h.ndim != 3 or c.ndim != 3:
            return NotImplemented
        (x, offsets, mask), dtype = padded(h, attn_mask), parts.dtype(h)
        pooled = ops.dsmil_pool(x, c.flatten(0, 1), offsets=offsets, mask=mask, **parts.stream)
        weights = ops.attention_weights(pooled, offsets)
        return module.norm(pooled.bag.to(dtype)), _rows(weights, h).to(masked_dtype(dtype, attn_mask))

    def examples(self, module: nn.Module, parts: _Parts, inputs: Inputs) -> Iterable[Example]:
        (x, mask), c = inputs.padded(parts.dim), inputs.padded(3)[0]
        yield Example("forward", (x, c))
        yield Example("forward", (x, c), {"attn_mask": mask.to(x.dtype)}, mask)


class MILLabDSMIL(Structure):
    """Both streams of MIL-Lab's DSMIL."""

    name = "DSMIL, both streams (MIL-Lab)"
    methods = {"forward_features": ("h", "attn_mask", "return_attention")}
    min_instances = MIN_INSTANCES
    embedding = "patch_embed"
    note = PADDING

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "patch_embed", "i_classifier", "b_classifier")

    def parts(self, module: nn.Module) -> _Parts:
        check_plain("i_classifier", module.i_classifier)
        check_plain("b_classifier", module.b_classifier)
        if list(submodules(module.i_classifier)) != ["inst_classifier"]:
            refuse("i_classifier is more than its layer inst_classifier")
        if structure_of(module.b_classifier) is not MILLAB_SECOND_STREAM:
            refuse("b_classifier is not known to be the second stream of MIL-Lab's DSMIL")
        classifier = linear("i_classifier.inst_classifier", module.i_classifier.inst_classifier)
        parts = MILLAB_SECOND_STREAM.parts(module.b_classifier)
        return parts._replace(classifier=classifier, embedding=embedding(module.patch_embed))

    def forward_features(self, module, parts, h, attn_mask=None, return_attention=False):
        if h.ndim != 3:
            return NotImplemented
        h = parts.embedding(h)
        (x, offsets, mask), dtype = padded(h, attn_mask), parts.dtype(h)
        pooled = parts.both(x, offsets, mask)
        found = {"instance_classes": _rows(pooled.logits, h).to(dtype)}
        if return_attention:
            found["attention"] = _rows(ops.attention_weights(pooled, offsets), h).to(masked_dtype(dtype, attn_mask))
        return module.b_classifier.norm(pooled.bag.to(dtype)), found

    def examples(self, module: nn.Module, parts: _Parts, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(parts.dim)
        yield Example("forward_features", (x,))
        yield Example("forward_features", (x,), {"attn_mask": mask.to(x.dtype), "return_attention": True}, mask)


SECOND_STREAM, MILLAB_SECOND_STREAM = BClassifier(), MILLabBClassifier()
register(SECOND_STREAM, MILNet(), TorchmilDSMIL(), MILLAB_SECOND_STREAM, MILLabDSMIL())
