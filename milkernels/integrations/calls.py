"""How a module may be called, which is not known before it is: bags as wide as one of its layers takes, alone or in a
batch, with a mask or lengths where its forward takes some.  What its own forward accepts is tried."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from milkernels.integrations.layers import Unfusable

INSTANCES, BAGS = 23, 2  # of the bags that are traced
FEW = 8  # instances of an example
_MASKS = ("mask", "attn_mask", "attention_mask", "padding_mask", "key_padding_mask", "pad_mask")
_LENGTHS = ("lens", "lengths", "bag_sizes")
_MOST_WIDTHS = 4
Call = Mapping[str, Any]  # arguments by name


class Unknown(Unfusable):
    """It is not known how it is called."""


def guesses(module: nn.Module, takes: tuple[tuple[str, Any], ...]) -> Iterator[list[Call]]:
    """Calls that differ in nothing but dimensions, for one width after the other."""
    needed = [name for name, default in takes if default is inspect.Parameter.empty]
    first, *others = needed or [name for name, _ in takes[:1]] or [""]
    unknown = [name for name in others if name not in (*_MASKS, *_LENGTHS)]
    if not first or unknown or first in _MASKS:
        wanted = ", ".join(needed) or "arguments that have no names"
        raise Unknown(f"its forward takes {wanted}, and what they are is not known without an example")
    optional = [name for name, _ in takes if name in (*_MASKS, *_LENGTHS) and name not in needed]
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    for width in _widths(module):
        found: list[Call] = []
        for shape in ((INSTANCES, width), (1, INSTANCES, width), (BAGS, INSTANCES, width)):
            x = (torch.randn(shape, generator=generator, device="cpu") + 0.5).to(parameter)
            for names in (others, *([*others, name] for name in optional)):
                for masks in _masks(names, x):
                    found.append({first: x, **masks})
        yield found


def _widths(module: nn.Module) -> list[int]:
    layers = [m.in_features for m in module.modules() if isinstance(m, nn.Linear)]
    return list(dict.fromkeys(layers))[:_MOST_WIDTHS]


def _masks(names: list[str], x: Tensor) -> Iterator[Call]:
    """For arguments of these names: lengths, or masks with a dimension more or less, of bools or numbers."""
    if not names:
        yield {}
        return
    shape = x.shape[:-1]
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1), device="cpu").to(x.device) < 0.6
    lengths = torch.arange(x.shape[-2], x.shape[-2] - shape[:-1].numel(), -1, device=x.device).reshape(shape[:-1])
    for mask in (keep, keep.unsqueeze(-1), keep.to(x.dtype)):
        yield {name: lengths if name in _LENGTHS else mask for name in names}


def sizes(example: Call) -> Iterator[dict[str, tuple[int, ...]]]:
    """The shapes of the example's tensors, and those of more or fewer instances and bags."""
    x = next(value for value in example.values() if isinstance(value, Tensor) and value.ndim >= 2)
    n, b = x.shape[-2], x.shape[0]
    for instances, bags in ((n, b), (7, 3), (n + 18, 2), (n + 6, 4)):
        other = {n: instances} | ({b: bags} if x.ndim == 3 and b > 1 else {})
        yield {
            name: tuple(other.get(s, s) if _may_differ(value, i) else s for i, s in enumerate(value.shape))
            for name, value in example.items()
            if isinstance(value, Tensor)
        }


def _may_differ(value: Tensor, dim: int) -> bool:
    """Not the width of features."""
    return not (value.is_floating_point() and value.ndim >= 2 and dim == value.ndim - 1)


def resized(example: Call, sizes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> Call:
    """The same call with tensors of other sizes and other numbers."""
    made = {}
    for name, value in example.items():
        if isinstance(value, Tensor):
            for dim, size in enumerate(sizes[name]):
                index = torch.arange(size, device=value.device) % value.shape[dim]
                value = value.index_select(dim, index)
            if value.is_floating_point() and not _is_mask(value):
                noise = torch.randn(value.shape, generator=generator, device="cpu").to(value)
                value = value + noise * value.std()
        made[name] = value
    return made


def _is_mask(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())
