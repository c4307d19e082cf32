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


_SIZES = {"N": N, "B": B, "L": L, "D": D, "K": K, "C": C, "Q2": 4, "V": 4}


def takes(op, name):
    return name in inspect.signature(getattr(milkernels, op)).parameters


def is_required(op, name):
    return takes(op, name) and inspect.signature(getattr(milkernels, op)).parameters[name].default is inspect._empty


# op: tensors by name and size, the first being x or scores; for those that take them by these names
OPS = {
    op: {name: tuple(_SIZES[s] for s in size) for name, size in sizes.items()}
    for op, sizes in testing.SIZES.items()
    if not testing.CASES[op].derived
}
# No parameters: their type does not make the type of a result
ROWS = {name for sizes in testing.SIZES.values() for name, size in sizes.items() if size[0] == "N"} - {"x"}


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
    return made | {name: value for name, value in testing.CASES[op].options.items() if is_required(op, name)}


def call(op, **kwargs):
    out = getattr(milkernels, op)(**testing.public_arguments(op, kwargs))
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def refuses(error, match, op, **changes):
    with pytest.raises(error, match=match):
        call(op, **(arguments(op) | changes))
