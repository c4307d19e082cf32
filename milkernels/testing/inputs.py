"""Shapes of bags and the seeded inputs of one call."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from milkernels.testing.philox import dropout_keep

FEATURES = ("relu", "noise")
# What is dropped: (option, name of the mask, branch of the counter, parameter and which of its sizes counts units)
_DROPS = (
    ("dropout_p", "keep_activation", 0, "v_weight", 0),
    ("dropout_p", "keep_sigmoid", 1, "u_weight", 0),
    ("v_dropout_p", "keep_value", 2, "v_weight", 1),
    ("dropout_p", "keep_embedding", 3, "e_weight", 0),
    ("e_dropout_p", "keep_embedding", 3, "e_weight", 0),
)


@dataclass(frozen=True)
class Shape:
    """Bags of ``lengths`` instances of ``dim`` numbers; ``heads`` is also the number of classes."""

    lengths: tuple[int, ...]
    dim: int = 512
    hidden: int = 256
    heads: int = 1

    @property
    def instances(self) -> int:
        return sum(self.lengths)

    @property
    def bags(self) -> int:
        return len(self.lengths)

    def padded(self) -> "Shape":
        """The shape of the same bags padded to the longest one."""
        return replace(self, lengths=(max(self.lengths),) * self.bags)


def skewed_lengths(bags: int = 32, instances: int = 100_000, seed: int = 0) -> tuple[int, ...]:
    """Bags as slides come: log-uniform between 200 and 20000, then scaled to ``instances`` in all."""
    import numpy as np

    raw = np.exp(np.random.default_rng(seed).uniform(math.log(200), math.log(20000), bags))
    return _scaled(raw.tolist(), instances)


def small_lengths(bags: int = 512, seed: int = 0) -> tuple[int, ...]:
    """Many small bags, 5 to 50 instances each."""
    import numpy as np

    return tuple(int(n) for n in np.random.default_rng(seed).integers(5, 51, bags))


def even_lengths(bags: int, instances: int) -> tuple[int, ...]:
    return _scaled([1.0] * bags, instances)


def _scaled(raw: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers proportional to ``raw`` that sum to ``total``; largest remainders are rounded up."""
    exact = [r * total / sum(raw) for r in raw]
    lengths = [math.floor(e) for e in exact]
    by_remainder = sorted(range(len(raw)), key=lambda i: (lengths[i] - exact[i], i))
    for i in by_remainder[: total - sum(lengths)]:
        lengths[i] += 1
    return tuple(lengths)


@dataclass
class Inputs:
    """What one call of an op takes.  ``lengths`` repeats ``offsets`` on the host, for the loops over bags."""

    x: Tensor  # the instances [N, L]; the scores [N, K] for ops that see nothing else
    parameters: dict[str, Tensor]  # every input besides x that may need a gradient
    fixed: dict[str, Tensor]  # inputs that never do
    offsets: Tensor | None
    mask: Tensor | None
    options: dict[str, Any]  # keyword arguments of the op
    lengths: tuple[int, ...]
    cotangent: Tensor  # gradient of the primary output
    keep: dict[str, Tensor] = field(default_factory=dict)  # dropout masks that make eager repeatable
    rowwise: frozenset[str] = frozenset()  # those besides x with one row per instance
    bagwise: frozenset[str] = frozenset()  # those with one row per bag

    def leaves(self, mode: str) -> dict[str, Tensor]:
        """The tensors that need a gradient in this mode, marked so."""
        self.x.requires_grad_(mode == "step")
        leaves = {"x": self.x} if mode == "step" else {}
        return leaves | {name: t.requires_grad_() for name, t in self.parameters.items()}

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """Parameters and other tensors that go with the rows ``[start, end)``, mask and dropout included."""
        tensors, per_instance = self._with_rows()
        return {name: t[start:end] if name in per_instance else t for name, t in tensors.items()}

    def bags(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The rows of each bag and what goes with them.

        Tensors are split once: the gradient of a slice ``x[start:end]`` is as large as that of ``x``, for every bag.
        """
        tensors, per_instance = self._with_rows()
        cut = {name: tensors[name].split(self.lengths) for name in per_instance & tensors.keys()}
        cut |= {name: tensors[name].unbind() for name in self.bagwise}
        for bag, x in enumerate(self.x.split(self.lengths)):
            yield x, tensors | {name: parts[bag] for name, parts in cut.items()}

    def _with_rows(self) -> tuple[dict[str, Tensor], frozenset[str]]:
        """All tensors but ``x``, and the names of those that have one row per instance."""
        tensors = self.parameters | self.fixed | self.keep
        if self.mask is not None:
            tensors["mask"] = self.mask
        return tensors, self.rowwise | {"mask", *self.keep}

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Copies of the same numbers in another type, without autograd history."""

        def cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: t.detach().to(dtype, copy=True) for name, t in tensors.items()}

        return replace(
            self,
            x=self.x.detach().to(dtype, copy=True),
            parameters=cast(self.parameters),
            fixed=cast(self.fixed),
            cotangent=self.cotangent.to(dtype),
        )

    def with_keep(self) -> "Inputs":
        """The same inputs with the kernels' dropout mask spelled out, so that eager drops the same units."""
        if self.keep:
            return self
        return replace(self, keep=keep_masks(self.parameters, self.options, len(self.x), self.x.device))

    def bounds(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(itertools.accumulate(self.lengths, initial=0)))


def keep_masks(
    parameters: Mapping[str, Tensor], options: Mapping[str, Any], rows: int, device: torch.device
) -> dict[str, Tensor]:
    """The units that the kernels keep, by the names under which formulas know them."""
    keep = {}
    for option, name, branch, parameter, dim in _DROPS:
        p = options.get(option, 0.0)
        if p and parameter in parameters:
            units = parameters[parameter].shape[dim]
            keep[name] = dropout_keep(options["seed"], rows, units, branch, p).to(device)
    return keep


def features_of(features: str | Tensor, shape: Shape, randn: Callable[..., Tensor]) -> Tensor:
    """The rows ``[N, L]`` in float32: a named distribution, or given."""
    if isinstance(features, Tensor):
        if features.shape != (shape.instances, shape.dim):
            raise ValueError(f"features of shape {tuple(features.shape)} do not fill {shape}")
        return features.float().clone()
    if features not in FEATURES:
        raise ValueError(f"features must be one of {', '.join(FEATURES)}; got {features!r}")
    x = randn(shape.instances, shape.dim)
    return x.relu_() if features == "relu" else x
