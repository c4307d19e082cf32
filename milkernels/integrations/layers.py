"""Reading the layers of a model that is not ours, for a fused call in their place.

A layer may be passed over only while calling it would do what its parameters say and nothing else.  That can change
after a model was accelerated (a hook for a heat map, pruning, an adapter), so it is looked at on every call:
``Unfusable`` is raised with the reason, and the model's own forward runs; an embedding in front is called as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from milkernels import ops
from milkernels._torch import called_hooks, has_global_hooks, has_own, is_traceable_wrapper_subclass
from milkernels.bags import Bags
from milkernels.dtypes import compute_dtype_of, result_dtype
from milkernels.layers import Embed
from milkernels.ops.embedding import embed_instances
from milkernels.results import Pooled

_ACTIVATIONS = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.Identity: "identity"}


def original_class(module: nn.Module) -> type:
    """The module's class, or what it was before the module was fused."""
    return getattr(type(module), "_milkernels_original", type(module))


class Unfusable(Exception):
    """Why a module cannot be passed over now."""


def refuse(reason: str) -> NoReturn:
    raise Unfusable(reason)


def check_plain(name: str, module: nn.Module) -> None:
    """Calling the module runs the forward of its class, with the parameters it registered, and no hook."""
    if called_hooks(module):
        refuse(f"{name} has hooks")
    if "forward" in module.__dict__:
        refuse(f"the forward of {name} was replaced")


def check_global_hooks() -> None:
    if has_global_hooks():
        refuse("hooks for all modules are registered")


def check_tensors(*values: Any) -> None:
    """None of them is a tensor around others: sharded, quantized, nested."""
    for value in values:
        if isinstance(value, Mapping):
            check_tensors(*value.values())
        elif isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            refuse(f"there is a tensor of type {type(value).__name__}")


def exactly(name: str, module: nn.Module, *types: type) -> None:
    """Refuses a module of another type or a subclass: so are parametrizations, quantized layers and adapters."""
    if original_class(module) not in types:
        refuse(f"{name} is {type(module).__name__}, not {' or '.join(t.__name__ for t in types)}")
    check_plain(name, module)


def linear(name: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias.  Those that weight_norm or pruning refreshes in a hook are no registered parameters."""
    exactly(name, module, nn.Linear)
    if not has_own(module, "weight", "bias"):
        refuse(f"{name} has a weight that is computed")
    check_tensors(module.weight)
    return module.weight, module.bias


def dropout(name: str, module: nn.Module) -> float:
    exactly(name, module, nn.Dropout)
    return module.p if module.training else 0.0


def activation(name: str, module: nn.Module) -> str:
    exactly(name, module, *_ACTIVATIONS, nn.GELU)
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else refuse(f"{name} is the approximate GELU")
    return _ACTIVATIONS[type(module)]


def children(name: str, module: nn.Module) -> list[nn.Module]:
    exactly(name, module, nn.Sequential)
    return list(module)


class Embedding(NamedTuple):
    """What is in front of an aggregator: layers that are called as they are, then the one that its ops take."""

    called: Sequence[nn.Module] = ()
    embed: Embed | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """What the ops take beside ``embed``."""
        for layer in self.called:
            x = layer(x)
        return x

    @property
    def in_dim(self) -> int | None:
        """What ``embed`` takes, None where there is none."""
        return None if self.embed is None else self.embed.linear[0].shape[1]

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Weight and bias of ``embed``, if there is one."""
        return () if self.embed is None else self.embed.linear


def embedding(*layers: nn.Module) -> Embedding:
    """The embedding that layers, or one Sequential, are if they end in ``Linear[, activation][, Dropout]``.

    Nothing is refused: where the end is anything else, or more than it seems, all of them are called as they are.
    """
    inner = layers
    try:
        if len(layers) == 1 and original_class(layers[0]) is nn.Sequential:
            inner = children("the embedding", layers[0])
        start, embed = _last_layer(inner)
    except Unfusable:
        return Embedding(layers)
    return Embedding(layers) if embed is None else Embedding(inner[:start], embed)


def without_called(module: nn.Module) -> nn.Module:
    """An embedding without its layers that are called as they are: what they take is not known."""
    called, embed = embedding(module)
    if embed is None:
        return nn.Identity()
    return nn.Sequential(*list(module)[len(called) :]) if called else module


def _last_layer(layers: Sequence[nn.Module]) -> tuple[int, Embed | None]:
    """Where it starts, and what it is: ``Linear[, activation][, Dropout]``, or ``Linear, Dropout, ReLU``."""
    start, act, p = len(layers), "identity", 0.0

    def ends_with(*types: type) -> bool:
        return start > 0 and isinstance(layers[start - 1], types)

    if behind := ends_with(nn.Dropout):
        start -= 1
        p = dropout("the Dropout", layers[start])
    if ends_with(*_ACTIVATIONS, nn.GELU):
        start -= 1
        act = activation("the activation", layers[start])
    if act == "relu" and not behind and ends_with(nn.Dropout):  # which commutes with a ReLU
        start -= 1
        p = dropout("the Dropout", layers[start])
    if not ends_with(nn.Linear):
        return start, None
    return start - 1, Embed(linear("the Linear", layers[start - 1]), act, p)


class Branch(NamedTuple):
    """``drop(act(W x + b))``."""

    weight: Tensor
    bias: Tensor | None
    activation: str
    dropout_p: float


def branch(name: str, module: nn.Module) -> Branch:
    """``Sequential(Linear, activation[, Dropout])`` as a branch; a gate's second one has the activation "sigmoid"."""
    layers = children(name, module)
    if not 2 <= len(layers) <= 3:
        refuse(f"{name} has {len(layers)} layers, not Linear, activation and perhaps Dropout")
    if type(layers[1]) is nn.Sigmoid:
        check_plain(f"{name}[1]", layers[1])
        act = "sigmoid"
    else:
        act = activation(f"{name}[1]", layers[1])
    p = dropout(f"{name}[2]", layers[2]) if len(layers) == 3 else 0.0
    return Branch(*linear(f"{name}[0]", layers[0]), act, p)


class Gate(NamedTuple):
    """A score network, plain or gated, as the arguments of the attention ops."""

    v_weight: Tensor
    v_bias: Tensor | None
    u_weight: Tensor | None
    u_bias: Tensor | None
    w_weight: Tensor
    w_bias: Tensor | None
    activation: str
    dropout_p: float
    embedding: Embedding = Embedding()

    @property
    def in_dim(self) -> int:
        """The width of what its ops take, which is embedded by them."""
        return self.embedding.in_dim or self.v_weight.shape[1]

    @property
    def heads(self) -> int:
        return self.w_weight.shape[0]

    def behind(self, embedding: Embedding) -> "Gate":
        return self._replace(embedding=embedding)

    def dtype(self, x: Tensor) -> torch.dtype:
        return their_dtype(x, *self[:6], *self.embedding.parameters)

    def _arguments(self) -> tuple[Any, Any, tuple, dict]:
        options = {"activation": self.activation, "dropout_p": self.dropout_p, "embed": self.embedding.embed}
        if self.u_weight is None:
            return ops.attention_scores, ops.attention_pool, (self[:2], self[4:6]), options
        return ops.gated_attention_scores, ops.gated_attention_pool, (self[:2], self[2:4], self[4:6]), options

    def scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        op, _, parameters, options = self._arguments()
        return op(x, *parameters, mask=mask, **options)

    def pool(self, x: Tensor, offsets: Tensor | None = None, mask: Tensor | None = None, seed=None) -> Pooled:
        _, op, parameters, options = self._arguments()
        return op(x, *parameters, offsets, mask=mask, seed=seed, **options)

    def seed(self, x: Tensor) -> Tensor | None:
        """A seed for a pooling whose embedded instances are read elsewhere too: the same units are dropped there."""
        drops = self.embedding.embed is not None and self.embedding.embed.dropout_p > 0
        return torch.randint(2**63 - 1, (1,), device=x.device) if drops else None

    def instances(self, x: Tensor, rows: Tensor, seed: Tensor | None) -> Tensor:
        """``h[rows]`` of what a pooling with this seed had, in the type of eager layers."""
        return embed_instances(x, self.embedding.embed, rows, seed=seed).to(self.dtype(x))


def gate_of(v: Branch, u: Branch | None, w: tuple[Tensor, Tensor | None]) -> Gate:
    if v.activation == "sigmoid" or (u is not None and u.activation != "sigmoid"):
        refuse("the gate is not an activation times a sigmoid")
    if u is not None and u.dropout_p != v.dropout_p:
        refuse(f"the branches of the gate drop different shares, {v.dropout_p} and {u.dropout_p}")
    return Gate(v.weight, v.bias, *((None, None) if u is None else u[:2]), *w, v.activation, v.dropout_p)


def scorer(name: str, module: nn.Module) -> Gate:
    """The gate that ``Sequential(Linear, activation[, Dropout], Linear)`` is."""
    layers = children(name, module)
    if not 3 <= len(layers) <= 4:
        refuse(f"{name} has {len(layers)} layers, not Linear, activation, perhaps Dropout, and Linear")
    p = dropout(f"{name}[2]", layers[2]) if len(layers) == 4 else 0.0
    v = Branch(*linear(f"{name}[0]", layers[0]), activation(f"{name}[1]", layers[1]), p)
    return gate_of(v, None, linear(f"{name}[{len(layers) - 1}]", layers[-1]))


def is_score_network(module: nn.Module) -> bool:
    """``Sequential(Linear, Tanh[, Dropout], Linear)``, whatever else may be wrong with it."""
    layers = list(module) if isinstance(module, nn.Sequential) else []
    kinds = [nn.Linear, nn.Tanh, nn.Dropout, nn.Linear] if len(layers) == 4 else [nn.Linear, nn.Tanh, nn.Linear]
    return len(layers) == len(kinds) and all(map(isinstance, layers, kinds))


# Types and shapes as the model's own forward would return them


def their_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The type in which eager layers with these parameters return: that of autocast, or the promoted one."""
    return compute_dtype_of(x) or result_dtype(x, parameters)


def masked_dtype(dtype: torch.dtype, mask: Tensor | None) -> torch.dtype:
    """That of scores to which MIL-Lab has added its mask, of numbers."""
    return dtype if mask is None else torch.promote_types(dtype, mask.dtype)


def padded(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A padded batch ``[B, M, L]`` and its mask ``[B, M]`` as ragged bags: rows, offsets, mask."""
    bags = Bags.from_padded(x, mask)
    return bags.values, bags.offsets, bags.mask
