"""Linear layers as ops take them, and the layer in front of an aggregator."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milkernels._torch import called_hooks, weight_and_bias
from milkernels.arguments import check_choice, check_shape, check_share, in_order

Linear = nn.Linear | tuple[Tensor, Tensor | None] | Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}


class Embed(NamedTuple):
    """The layer in front of an aggregator, ``h_i = drop(act(W x_i + b))``, which ops take as ``embed``.

    CLAM, MIL-Lab, TRIDENT and slideflow call it fc, patch_embed, pre_attention_layers, encoder.

    Attributes:
        linear: W ``[E, L]`` and b ``[E]``: an ``nn.Linear``, (weight, bias), (weight, None) or a weight.
        activation: tanh, relu, gelu (exact) or identity.
        dropout_p: the share of the E units that is dropped, in [0, 1].
    """

    linear: Linear
    activation: str = "relu"
    dropout_p: float = 0.0


def as_linear(name: str, layer: Linear, width: int, x: Tensor, out: int | None = None) -> tuple[Tensor, Tensor | None]:
    """``(weight, bias)`` of a layer that takes rows of ``width`` numbers to ``out`` (any, if None), checked.

    Args:
        name: the argument's, for errors.
        layer: an ``nn.Linear``, a pair ``(weight [out, width], bias [out] or None)``, or a weight.
        x: the instances, on whose device the parameters have to be.

    Raises:
        TypeError: something else, types that are not floating-point, or an ``nn.Linear`` with a forward of its own.
        ValueError: shapes or devices that do not fit; a hook, which would not be called.
    """
    if isinstance(layer, (tuple, list)):
        if len(layer) != 2:
            raise TypeError(f"{name} must be an nn.Linear, a weight or a pair (weight, bias); got {len(layer)} values")
        weight, bias = layer
    elif isinstance(layer, Tensor):
        weight, bias = layer, None
    else:
        weight, bias = parameters_of(name, layer)
    device = x.device
    if not (
        in_order(weight, device)
        and len(shape := weight.shape) == 2
        and shape[1] == width
        and (shape[0] == out if out is not None else shape[0] >= 1)
    ):
        check_shape(f"{name}.weight", weight, (out, width), x)
        shape = weight.shape
    if bias is not None and not (in_order(bias, device) and bias.shape == (shape[0],)):
        check_shape(f"{name}.bias", bias, (shape[0],), x)
    return weight, bias


def parameters_of(name: str, layer) -> tuple[Tensor, Tensor | None]:
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} must be an nn.Linear, a weight or a pair (weight, bias); got {type(layer).__name__}")
    if type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__:
        raise TypeError(f"{name} must be a plain nn.Linear; got {type(layer).__name__} with a forward of its own")
    if hooks := called_hooks(layer):
        raise ValueError(f"{name} must have no hooks, which an op does not call; got {hooks[0]}")
    return weight_and_bias(layer)


def checked_embed(embed: Embed | tuple, x: Tensor) -> tuple[Tensor, Tensor | None, str, float]:
    """``(weight, bias, activation, dropout_p)`` of the layer in front, checked."""
    if not isinstance(embed, (tuple, list)) or not 1 <= len(embed) <= len(Embed._fields):
        got = f"{len(embed)} values" if isinstance(embed, (tuple, list)) else type(embed).__name__
        raise TypeError(f"embed must be Embed({', '.join(Embed._fields)}); got {got}")
    linear, activation, dropout_p = embed = Embed(*embed)
    weight, bias = as_linear("embed.linear", linear, x.shape[1], x)
    check_choice("embed.activation", activation, ACTIVATIONS)
    check_share("embed.dropout_p", dropout_p)
    return weight, bias, activation, float(dropout_p)
