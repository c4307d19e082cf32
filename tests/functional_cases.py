"""A good call of every public op, for the tests of their arguments and results."""

import inspect
import re

import pytest
import torch

import milkernels
from milkernels import testing

N, L, D, K, C = 9, 6, 5, 2, 3
OFFSETS = torch.tensor([0, 4, 4, 9])
B = len(OFFSETS) - 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def randn(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


V = {"v_weight": (D, L), "v_bias": (D,)}
U = {"u_weight": (D, L), "u_bias": (D,)}
W = {"w_weight": (K, D), "w_bias": (K,)}
CLASSES = {"weight": (C, L), "bias": (C,)}
DSMIL = {
    "q_weight": (D, L),
    "q_bias": (D,),
    "q2_weight": (4, D),
    "q2_bias": (4,),
    "v_weight": (4, L),
    "v_bias": (4,),
}
ROWS = {"scores", "weights", "instance_logits"}  # no parameters: their type does not make the type of a result

# op: tensors by name and size, the first being x or scores
OPS = {
    "softmax_pool": {"x": (N, L), "scores": (N, K)},
    "attention_pool": {"x": (N, L), **V, **W},
    "gated_attention_pool": {"x": (N, L), **V, **U, **W},
    "attention_scores": {"x": (N, L), **V, **W},
    "gated_attention_scores": {"x": (N, L), **V, **U, **W},
    "query_pool": {"x": (N, L), "query": (B, K, L)},
    "query_scores": {"x": (N, L), "query": (K, L)},
    "weighted_pool": {"x": (N, L), "weights": (N, K)},
    "instance_max": {"x": (N, L), **CLASSES},
    "dsmil_pool": {"x": (N, L), "instance_logits": (N, C), **DSMIL},
    "dsmil": {"x": (N, L), **CLASSES, **DSMIL},
    "loss_attention_pool": {"x": (N, L), **CLASSES},
    "mean_pool": {"x": (N, L)},
    "max_pool": {"x": (N, L)},
    "segment_softmax": {"scores": (N, K)},
    "topk_instances": {"scores": (N, K)},
}


def takes(op, name):
    return name in inspect.signature(getattr(milkernels, op)).parameters


def called(op, name):
    """The name by which errors call an argument of `arguments`, as a regular expression."""
    return re.escape(testing.public_name(op, name))


def arguments(op, dtype=torch.float32, parameter_dtype=None, width=L):
    """A good call of the op, by keyword; ``width`` is that of what its parameters multiply."""
    made = {}
    for i, (name, size) in enumerate(OPS[op].items()):
        size = (*size[:-1], width) if i and size[-1] == L else size
        made[name] = randn(*size, dtype=dtype if i == 0 else parameter_dtype or dtype, seed=i)
    if takes(op, "offsets"):
        made["offsets"] = OFFSETS
    if op == "topk_instances":
        made["k"] = 2
    return made


def call(op, **kwargs):
    out = getattr(milkernels, op)(**testing.public_arguments(op, kwargs))
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def refuses(error, match, op, **changes):
    with pytest.raises(error, match=match):
        call(op, **(arguments(op) | changes))
