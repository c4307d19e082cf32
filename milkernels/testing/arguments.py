"""How the tensors of a case become the arguments of a public op.

A case names every tensor by itself, since each may have a gradient of its own: ``v_weight``, ``v_bias``.  The op takes
the two as one layer, ``v=(v_weight, v_bias)``.
"""

from collections.abc import Mapping
from typing import Any

import milkernels

_LAYERS = {"v": "v", "u": "u", "w": "w", "": "classifier"}  # prefix of weight and bias: argument
_DSMIL_LAYERS = {"": "classifier", "q": "q", "q2": "q2", "v": "value"}
_DSMIL = {"instance_logits": "critical", "v_activation": "value_activation", "v_dropout_p": "value_dropout_p"}


def public_name(op: str, name: str) -> str:
    """The argument that a tensor or option is or, for a weight or bias, is part of: ``v.weight``."""
    dsmil = op.startswith("dsmil")
    prefix, _, kind = name.rpartition("_")
    layers = {"e": "embed.linear"} | (_DSMIL_LAYERS if dsmil else _LAYERS)
    if kind in ("weight", "bias") and prefix in layers:
        return f"{layers[prefix]}.{kind}"
    return _DSMIL.get(name, name) if dsmil else name


def public_arguments(op: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and options by the names of a case, as keywords of the public function.

    Those of the embedding are ``e_weight``, ``e_bias``, ``e_activation`` and ``e_dropout_p``.
    """
    arguments, layers = {}, {}
    for name, value in given.items():
        argument, _, part = public_name(op, name).rpartition(".")
        if argument:
            layers.setdefault(argument, {})[part] = value
        elif name not in ("e_activation", "e_dropout_p"):
            arguments[part] = value
    for argument, parts in layers.items():
        arguments[argument] = (parts.get("weight"), parts.get("bias"))
    if (linear := arguments.pop("embed.linear", None)) is not None:
        options = given.get("e_activation", "relu"), given.get("e_dropout_p", 0.0)
        arguments["embed"] = milkernels.Embed(linear, *options)
    return arguments
