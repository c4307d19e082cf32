"""Loss-Attention, slideflow's attention MIL and PyG's attentional aggregation."""

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from milkernels import ops
from milkernels._torch import has_own
from milkernels.integrations.abmil import flat_features, image_embedding, image_features
from milkernels.integrations.engine import Structure, has, register
from milkernels.integrations.layers import (
    Embedding,
    Gate,
    Unfusable,
    check_plain,
    embedding,
    linear,
    padded,
    refuse,
    scorer,
    their_dtype,
)
from milkernels.integrations.proof import Example, Inputs


class _BagClassifier(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    embedding: Embedding


class LossAttention(Structure):
    """The model of Shi et al. 2020: the bag classifier ``linear`` scores the instances as well."""

    name = "Loss-Attention"
    methods = {"forward": ("x", "flag")}
    min_instances = (200, 200)
    opaque = ("feature_extractor_part1",)

    def instances(self, x: Tensor) -> int:
        return x.shape[1]

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "feature_extractor_part1", "feature_extractor_part2", "att_layer", "linear")

    def parts(self, module: nn.Module) -> _BagClassifier:
        check_plain("att_layer", module.att_layer)
        return _BagClassifier(*linear("linear", module.linear), image_embedding(module))

    def forward(self, module, parts, x, flag=1):
        if flag != 1:
            return NotImplemented
        weight, bias, front = parts
        h = front(image_features(module, x))
        pooled = ops.loss_attention_pool(h, (weight, bias), embed=front.embed)
        dtype = their_dtype(h, weight, bias, *front.parameters)
        weights = ops.attention_weights(pooled).to(dtype).squeeze()
        return module.linear(pooled.bag[0].to(dtype)), pooled.logits.to(dtype), weights

    def examples(self, module: nn.Module, parts: Any, inputs: Inputs) -> Iterable[Example]:
        yield Example("forward", (inputs.bag(flat_features(module), 1, 23),))


class AttentionMIL(Structure):
    """Attention_MIL of slideflow and its relatives: padded batches ``[B, M, D]`` with the length of each bag."""

    name = "attention MIL (slideflow)"
    methods = {
        "forward": ("bags", "lens", "return_attention", "uq", "uq_softmax"),
        "_masked_attention_scores": ("embeddings", "lens", "apply_softmax"),
    }
    embedding = "encoder"

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "encoder", "attention", "head") and hasattr(module, "temperature")

    def parts(self, module: nn.Module) -> Gate:
        gate = scorer("attention", module.attention)
        if gate.heads != 1:
            refuse(f"attention has {gate.heads} outputs, not 1")
        return gate.behind(embedding(module.encoder))

    def forward(self, module, gate, bags, lens, *, return_attention=False, uq=False, uq_softmax=True):
        # One instance: the scores are returned, not their softmax.  A gate by quantile looks at the scores first.
        if module.attention_gate or uq or bags.ndim != 3 or bags.shape[1] < 2 or bags.shape[0] != lens.shape[0]:
            return NotImplemented
        h = gate.embedding(bags)
        dtype, scale = gate.dtype(h), 1 / module.temperature
        gate = gate._replace(
            w_weight=gate.w_weight * scale, w_bias=None if gate.w_bias is None else gate.w_bias * scale
        )
        rows, offsets, mask = padded(h, _mask(h, lens))
        pooled = gate.pool(rows, offsets, mask)
        prediction = module.head(pooled.bag[:, 0].to(dtype))
        if not return_attention:
            return prediction
        return prediction, ops.attention_weights(pooled, offsets).to(dtype).unflatten(0, h.shape[:2])

    def _masked_attention_scores(self, module, gate, embeddings, lens, *, apply_softmax=True):
        gate = gate.behind(Embedding())
        rows, offsets, mask = padded(embeddings, _mask(embeddings, lens))
        scores = gate.scores(rows, mask)
        if apply_softmax:
            scores = ops.segment_softmax(scores, offsets, mask=mask)
        return scores.to(gate.dtype(embeddings)).unflatten(0, embeddings.shape[:2])

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        h, mask = inputs.padded(gate.behind(Embedding()).in_dim)
        x, lens = inputs.padded(gate.in_dim)[0], mask.sum(1)
        for softmax in (False, True):
            yield Example("_masked_attention_scores", (h, lens), {"apply_softmax": softmax}, mask)
        if not module.attention_gate:
            yield Example("forward", (x, lens))
            yield Example("forward", (x, lens), {"return_attention": True}, mask)


def _mask(x: Tensor, lens: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) < lens.to(x.device)[:, None]


class _Aggregation(NamedTuple):
    gate: Gate | None  # None: the gate network is called as it is, and only the pooling is fused
    in_dim: int | None


class AttentionalAggregation(Structure):
    """PyG's aggregation with one score per instance, over ``ptr`` or a sorted ``index``."""

    name = "attentional aggregation (PyG)"
    methods = {"forward": ("x", "index", "ptr", "dim_size", "dim")}
    note = "an unsorted index, and any index under torch.compile, takes its own forward"

    def looks_like(self, module: nn.Module) -> bool:
        networks = ("gate_nn", "gate_mlp", "nn", "mlp")
        return all(hasattr(module, name) for name in networks) and (has(module, "gate_nn") or has(module, "gate_mlp"))

    def parts(self, module: nn.Module) -> _Aggregation:
        network = module.gate_nn if module.gate_mlp is None else module.gate_mlp
        own = [m.weight for m in network.modules() if has_own(m, "weight")]  # not what parametrizations compute
        weights = [weight for weight in own if weight is not None and weight.ndim == 2]
        if not weights or weights[-1].shape[0] != 1:
            refuse("its gate has not one score per instance")
        gate = None
        if module.gate_mlp is None:
            with contextlib.suppress(Unfusable):  # then it is called as it is
                gate = scorer("gate_nn", network)
        return _Aggregation(gate, weights[0].shape[1])

    def forward(self, module, parts, x, index=None, ptr=None, dim_size=None, dim=-2):
        if x.ndim != 2 or dim not in (-2, 0) or (ptr is None and index is not None and not _is_sorted(index)):
            return NotImplemented
        offsets = ptr if ptr is not None or index is None else _offsets(index, dim_size)
        values = x
        if module.mlp is not None:
            values = module.mlp(x, batch=index, batch_size=dim_size)
        elif module.nn is not None:
            values = module.nn(x)
        if parts.gate is not None and values is x:
            return parts.gate.pool(x, offsets).bag[:, 0].to(parts.gate.dtype(x))
        if parts.gate is not None:
            scores = parts.gate.scores(x)
        elif module.gate_mlp is not None:
            scores = module.gate_mlp(x, batch=index, batch_size=dim_size)
        else:
            scores = module.gate_nn(x)
        dtype = torch.promote_types(values.dtype, scores.dtype if parts.gate is None else values.dtype)
        return ops.softmax_pool(values, scores, offsets).bag[:, 0].to(dtype)

    def examples(self, module: nn.Module, parts: _Aggregation, inputs: Inputs) -> Iterable[Example]:
        x = inputs.bag(parts.in_dim, 23)
        offsets = torch.tensor([0, 9, 9, 23], device=x.device)
        index = torch.tensor([0] * 9 + [2] * 14, device=x.device)
        yield Example("forward", (x,), {"ptr": offsets, "index": index, "dim_size": 3})
        yield Example("forward", (x,), {"index": index, "dim_size": 4})


def _is_sorted(index: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool((index[1:] >= index[:-1]).all())


def _offsets(index: Tensor, dim_size: int | None) -> Tensor:
    size = int(index[-1]) + 1 if dim_size is None else dim_size
    return torch.searchsorted(index, torch.arange(size + 1, device=index.device, dtype=index.dtype))


register(LossAttention(), AttentionMIL(), AttentionalAggregation())
