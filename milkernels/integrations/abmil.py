"""Attention MIL (Ilse et al. 2018) as models and pooling layers have it: plain, gated, padded, with many heads."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from milkernels import ops
from milkernels._torch import submodules
from milkernels.integrations.engine import SOFTMAX, Structure, has, register, structure_of
from milkernels.integrations.layers import (
    Branch,
    Embedding,
    Gate,
    activation,
    branch,
    check_plain,
    embedding,
    exactly,
    gate_of,
    linear,
    masked_dtype,
    padded,
    refuse,
    scorer,
)
from milkernels.integrations.proof import Example, Inputs
from milkernels.integrations.scores import GATED, PLAIN, proven_gate


def image_embedding(module: nn.Module) -> Embedding:
    """The linear layers behind an extractor of convolutions."""
    if not isinstance(module.feature_extractor_part2[0], nn.Linear):
        refuse("feature_extractor_part2 does not start with a Linear")
    return embedding(module.feature_extractor_part2)


def image_features(module: nn.Module, x: Tensor) -> Tensor:
    """What these take, of the images of one bag ``[1, N, ...]``."""
    return module.feature_extractor_part1(x.squeeze(0)).reshape(-1, flat_features(module))


def flat_features(module: nn.Module) -> int:
    return module.feature_extractor_part2[0].in_features


class AttentionDeepMIL(Structure):
    """The models Attention and GatedAttention of the paper's code."""

    name = "attention MIL (AttentionDeepMIL)"
    methods = {"forward": ("x",)}
    opaque = ("feature_extractor_part1",)

    def instances(self, x: Tensor) -> int:
        return x.shape[1]

    def looks_like(self, module: nn.Module) -> bool:
        gated = has(module, "attention_V", "attention_U", "attention_w")
        network = gated or isinstance(getattr(module, "attention", None), nn.Sequential)
        return network and has(module, "feature_extractor_part1", "feature_extractor_part2", "classifier")

    def parts(self, module: nn.Module) -> Gate:
        front = image_embedding(module)
        if not has(module, "attention_w"):
            return scorer("attention", module.attention).behind(front)
        v, u = branch("attention_V", module.attention_V), branch("attention_U", module.attention_U)
        return gate_of(v, u, linear("attention_w", module.attention_w)).behind(front)

    def forward(self, module, gate, x):
        h = gate.embedding(image_features(module, x))
        pooled, dtype = gate.pool(h), gate.dtype(h)
        probability = module.classifier(pooled.bag[0].to(dtype))
        weights = ops.attention_weights(pooled).to(dtype).T
        return probability, torch.ge(probability, 0.5).float(), weights

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        yield Example("forward", (inputs.bag(flat_features(module), 1, 23),))


class MILLabABMIL(Structure):
    """ABMIL of MIL-Lab, over padded batches ``[B, M, D]``."""

    name = "attention MIL (MIL-Lab)"
    methods = {"forward_features": ("h", "attn_mask", "return_attention")}
    embedding = "patch_embed"

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "patch_embed", "global_attn") and not has(module, "instance_classifiers")

    def parts(self, module: nn.Module) -> Gate:
        return proven_gate("global_attn", module.global_attn, PLAIN, GATED).behind(embedding(module.patch_embed))

    def forward_features(self, module, gate, h, attn_mask=None, return_attention=True):
        if h.ndim != 3:
            return NotImplemented
        h = gate.embedding(h)
        pooled, dtype = gate.pool(*padded(h, attn_mask)), gate.dtype(h)
        scores = pooled.scores.to(masked_dtype(dtype, attn_mask)).reshape(*h.shape[:2], gate.heads).transpose(1, 2)
        return pooled.bag.to(dtype).squeeze(1), {"attention": scores if return_attention else None}

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(gate.in_dim)
        yield Example("forward_features", (x,))
        yield Example("forward_features", (x,), {"attn_mask": mask.to(x.dtype), "return_attention": True}, mask)
        yield Example("forward_features", (x,), {"return_attention": False})


class MultiHeadABMIL(Structure):
    """TRIDENT's: every head has a gate of its own and a score for each branch.  All heads are one call: their V and U
    one after another, their w on the diagonal of one matrix."""

    name = "multi-head attention MIL (TRIDENT)"
    methods = {"forward": ("features", "attn_mask")}

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "attention_heads", "branching_layers")

    def parts(self, module: nn.Module) -> Gate:
        vs = [branch(f"attention_heads[{i}]", m) for i, m in enumerate(module.attention_heads)]
        ws = [linear(f"branching_layers[{i}]", m) for i, m in enumerate(module.branching_layers)]
        us = [branch(f"gating_layers[{i}]", m) for i, m in enumerate(module.gating_layers)] if module.gated else None
        if len(vs) != len(ws) or (us and len(us) != len(vs)):
            refuse("its heads have no gate or no scores of their own")
        w_weight = torch.block_diag(*(weight for weight, _ in ws))
        w_bias = _concatenated("branching_layers", [bias for _, bias in ws])
        return gate_of(_one_branch("attention_heads", vs), us and _one_branch("gating_layers", us), (w_weight, w_bias))

    def forward(self, module, gate, features, attn_mask=None):
        if features.ndim != 3 or (attn_mask is not None and attn_mask.shape != features.shape[:2]):
            return NotImplemented
        return pooled_heads(module, gate, features, attn_mask)

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(gate.in_dim)
        yield Example("forward", (x,))
        yield Example("forward", (x,), {"attn_mask": mask}, mask)


def pooled_heads(module: nn.Module, gate: Gate, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(bags [B, branches, L], scores [B, branches, heads, M])``."""
    pooled, dtype = gate.pool(*padded(x, mask)), gate.dtype(x)
    heads = len(module.attention_heads)
    bag = pooled.bag.to(dtype).unflatten(1, (heads, -1)).transpose(1, 2).flatten(2)
    if module.n_heads > 1:
        bag = module.condensing_layer(bag)
    scores = pooled.scores.to(dtype).reshape(*x.shape[:2], heads, gate.heads // heads)
    return bag, scores.permute(0, 3, 2, 1)


class SlideEncoder(Structure):
    """TRIDENT's ABMILSlideEncoder: an embedding, the pooling of many heads, and layers of the bag."""

    name = "attention MIL (TRIDENT's slide encoder)"
    methods = {"forward": ("batch", "device", "return_raw_attention")}
    embedding = "model.pre_attention_layers"

    def looks_like(self, module: nn.Module) -> bool:
        layers = ("pre_attention_layers", "image_pooler", "post_attention_layers")
        return has(module, "model") and has(module.model, *layers)

    def parts(self, module: nn.Module) -> Gate:
        pooler = module.model.image_pooler
        if structure_of(pooler) is not MULTI_HEAD:
            refuse(f"image_pooler is not known to be {MULTI_HEAD.name}")
        check_plain("image_pooler", pooler)
        return MULTI_HEAD.parts(pooler).behind(embedding(module.model.pre_attention_layers))

    def bags(self, name, given):
        """On another device, to which it moves them, there are never too few."""
        on_cpu = torch.device(given.get("device", "cuda")).type == "cpu"
        return given["batch"]["features"] if on_cpu else None

    def forward(self, module, gate, batch, device="cuda", return_raw_attention=False):
        x = batch["features"].to(device)
        if x.ndim != 3 or gate.heads != len(module.model.image_pooler.attention_heads):
            return NotImplemented  # more than one branch
        bag, scores = pooled_heads(module.model.image_pooler, gate, gate.embedding(x))
        bag = module.model.post_attention_layers(bag.squeeze(1))
        return (bag, scores) if return_raw_attention else bag

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        batch = {"features": inputs.padded(gate.in_dim)[0]}
        yield Example("forward", (batch, inputs.device))
        yield Example("forward", (batch, inputs.device), {"return_raw_attention": True})


def _one_branch(name: str, branches: list[Branch]) -> Branch:
    if len({b[2:] for b in branches}) != 1:
        refuse(f"{name} have different activations or dropout")
    weights = torch.cat([b.weight for b in branches])
    return Branch(weights, _concatenated(name, [b.bias for b in branches]), *branches[0][2:])


def _concatenated(name: str, biases: list[Tensor | None]) -> Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if given and len(given) < len(biases):
        refuse(f"some of {name} have no bias")
    return torch.cat(given) if given else None


# torchmil


def _read_fc(module: nn.Module, act: str) -> Gate:
    """The gate of layers fc1, fc2 and, if gated, fc_gated."""
    v, u = Branch(*_lazy_linear("fc1", module.fc1), act, 0.0), None
    if module.gated:
        exactly("act_gated", module.act_gated, nn.Sigmoid)
        u = Branch(*_lazy_linear("fc_gated", module.fc_gated), "sigmoid", 0.0)
    gate = gate_of(v, u, linear("fc2", module.fc2))
    return gate if gate.heads == 1 else refuse(f"fc2 has {gate.heads} outputs, not 1")


def _lazy_linear(name: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A Linear, or torchmil's LazyLinear, which is a module around one."""
    if type(module).__name__ == "LazyLinear" and list(submodules(module)) == ["module"]:
        check_plain(name, module)
        module = module.module
    return linear(name, module)


class TorchmilPool(Structure):
    """AttentionPool of torchmil, over padded batches ``[B, M, L]``."""

    name = "attention pooling (torchmil)"
    methods = {"forward": ("X", "mask", "return_att")}

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "fc1", "fc2", "act_layer") and hasattr(module, "gated")

    def parts(self, module: nn.Module) -> Gate:
        return _read_fc(module, activation("act_layer", module.act_layer))

    def forward(self, module, gate, X, mask=None, return_att=False):
        if X.ndim != 3:
            return NotImplemented
        pooled, dtype = gate.pool(*padded(X, mask)), gate.dtype(X)
        bag = pooled.bag[:, 0].to(dtype)
        return (bag, pooled.scores.to(dtype).reshape(X.shape[:2])) if return_att else bag

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(gate.in_dim)
        yield Example("forward", (x,))
        yield Example("forward", (x,), {"mask": mask, "return_att": True}, mask)


class TorchmilABMIL(Structure):
    """ABMIL of torchmil: an embedding in front of its pooling."""

    name = "attention MIL (torchmil)"
    methods = {"forward": ("X", "mask", "return_att")}
    embedding = "feat_ext"

    def looks_like(self, module: nn.Module) -> bool:
        return set(submodules(module)) - {"criterion"} == {"feat_ext", "pool", "classifier"}

    def parts(self, module: nn.Module) -> Gate:
        check_plain("pool", module.pool)
        return torchmil_gate(module)

    def instances(self, x: Tensor) -> int:
        return x.shape[:2].numel()

    def forward(self, module, gate, X, mask=None, return_att=False):
        if X.ndim < 3:
            return NotImplemented
        X = gate.embedding(X)
        predicted, scores = torchmil_prediction(module, gate, X, mask)
        return (predicted, scores.to(gate.dtype(X))) if return_att else predicted

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(gate.in_dim)
        yield Example("forward", (x,))
        yield Example("forward", (x,), {"mask": mask, "return_att": True}, mask)


def torchmil_gate(module: nn.Module) -> Gate:
    """The embedding of a model with feat_ext in front of a pool."""
    if structure_of(module.pool) is not TORCHMIL_POOL:
        refuse(f"pool is not known to be {TORCHMIL_POOL.name}")
    return TORCHMIL_POOL.parts(module.pool).behind(embedding(module.feat_ext))


def torchmil_prediction(
    module: nn.Module, gate: Gate, x: Tensor, mask: Tensor | None, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(predictions [B], scores [B, M])``; the scores are not rounded yet."""
    pooled, dtype = gate.pool(*padded(x, mask), seed=seed), gate.dtype(x)
    predicted = module.classifier(pooled.bag[:, 0].to(dtype)).squeeze(-1)
    return predicted, pooled.scores.reshape(x.shape[:2])


class CAMILPool(Structure):
    """CAMILAttentionPool of torchmil: scores from one tensor, ``T``, values from another, ``M``."""

    name = "attention pooling of two tensors (CAMIL)"
    methods = {"forward": ("T", "M", "mask", "return_att")}

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "fc1", "fc2") and hasattr(module, "gated") and not has(module, "act_layer")

    def parts(self, module: nn.Module) -> Gate:
        return _read_fc(module, "tanh")

    def forward(self, module, gate, T, M, mask=None, return_att=False):
        if T.ndim != 3 or M.ndim != 3 or T.shape[:2] != M.shape[:2]:
            return NotImplemented
        (rows, offsets, mask), dtype = padded(T, mask), gate.dtype(T)
        scores = gate.scores(rows, mask)
        bag = ops.softmax_pool(padded(M, None)[0], scores, offsets, mask=mask).bag[:, 0].to(dtype)
        return (bag, scores.to(dtype).reshape(T.shape[:2])) if return_att else bag

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(gate.in_dim)
        values = inputs.padded(gate.in_dim)[0]
        yield Example("forward", (x, values))
        yield Example("forward", (x, values), {"mask": mask, "return_att": True}, mask)


# Layers whose attributes say the same and whose results differ


def _is_layer(module: nn.Module) -> bool:
    gated = has(module, "attention_V", "attention_U", "attention_weights")
    plain = isinstance(getattr(module, "attention", None), nn.Sequential)
    return len(submodules(module)) == (3 if gated else 1) and (gated or plain)


def _read_layer(module: nn.Module) -> Gate:
    if not has(module, "attention_weights"):
        return scorer("attention", module.attention)
    v, u = branch("attention_V", module.attention_V), branch("attention_U", module.attention_U)
    return gate_of(v, u, linear("attention_weights", module.attention_weights))


class WeightsLayer(Structure):
    """DTFD-MIL's and its copies': one bag to its weights, or scores, ``[K, N]``.  What asks for scores differs."""

    pools = False

    def __init__(self, name: str, option: str = "", scores_if: bool = False):
        self.name, self._option, self._scores_if = name, option, scores_if
        self.methods = {"forward": ("x", option) if option else ("x",)}

    def looks_like(self, module: nn.Module) -> bool:
        return _is_layer(module)

    def parts(self, module: nn.Module) -> Gate:
        return _read_layer(module)

    def share(self, parts: Gate) -> str:
        return SOFTMAX

    def forward(self, module, gate, x, *option, **options):
        if x.ndim != 2:
            return NotImplemented
        given = option[0] if option else options.get(self._option, not self._scores_if)
        scores = gate.scores(x)
        softmax = not self._option or bool(given) is not self._scores_if
        return (ops.segment_softmax(scores) if softmax else scores).to(gate.dtype(x)).T

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        yield Example("forward", (inputs.bag(gate.in_dim),))
        if self._option:
            yield Example("forward", (inputs.bag(gate.in_dim),), {self._option: self._scores_if})


class PoolingLayer(Structure):
    """hi-ml's: one bag to ``(weights [K, N], pooled [K, L])``."""

    name = "attention layer (hi-ml)"
    methods = {"forward": ("features",)}

    def looks_like(self, module: nn.Module) -> bool:
        return _is_layer(module)

    def parts(self, module: nn.Module) -> Gate:
        return _read_layer(module)

    def forward(self, module, gate, features):
        x = features.reshape(-1, gate.in_dim)
        pooled, dtype = gate.pool(x), gate.dtype(x)
        return ops.attention_weights(pooled).to(dtype).T, pooled.bag[0].to(dtype)

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        yield Example("forward", (inputs.bag(gate.in_dim),))
        yield Example("forward", (inputs.bag(gate.in_dim, 2, 5),))


TORCHMIL_POOL, MULTI_HEAD = TorchmilPool(), MultiHeadABMIL()
register(
    WeightsLayer("attention weights (DTFD-MIL)", "isNorm", False),
    WeightsLayer("attention weights, without norm if asked", "no_norm", True),
    WeightsLayer("attention weights"),
)
register(PoolingLayer(), AttentionDeepMIL(), MILLabABMIL(), MULTI_HEAD, SlideEncoder())
register(TORCHMIL_POOL, TorchmilABMIL(), CAMILPool())
