"""The registry: one ``OpCase`` per op."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from milkernels.testing import formulas
from milkernels.testing.formulas import Tensors
from milkernels.testing.inputs import ROWWISE, Inputs, Shape, features_of

MODES = ("fwd", "step", "frozen")  # forward; forward and backward; the same when x needs no gradient
_PER_INSTANCE = frozenset({"scores", "logits"})  # outputs of N rows; the others have one row per bag
_INDICES = frozenset({"indices", "critical"})  # outputs that are rows of x


def _join(bags: list[Tensors], starts: list[int]) -> Tensors:
    joined = {}
    for name in bags[0]:
        parts = [bag[name] for bag in bags]
        if name in _INDICES:
            parts = [part + start for part, start in zip(parts, starts, strict=True)]
        joined[name] = torch.cat(parts) if name in _PER_INSTANCE else torch.stack(parts)
    return joined


Factory = Callable[[Shape, Callable[..., Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class OpCase:
    """One op: inputs, call, eager formula, and what it costs.  ``name`` is the public function's."""

    name: str
    outputs: tuple[str, ...]  # in the order the op returns them
    parameters: Factory  # (shape, randn) -> tensors in the order of the op's arguments
    one_bag: Callable[[Tensor, Tensors, dict[str, Any]], Tensors]
    primary: str = "bag"  # the output that a training step differentiates
    positional: tuple[str, ...] = ()  # arguments between x and offsets; the other tensors are keywords
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: Factory = lambda shape, randn: {}
    takes_offsets: bool = True
    score_flops: Callable[[Shape], int] = lambda shape: 0  # matrix products that score all instances once
    recomputes: bool = False  # the backward scores again: hidden units are never stored
    reads_x_backward: bool = True
    pooled_heads: Callable[[Shape], int] = lambda shape: shape.heads
    zero_gradients: Callable[[Inputs], tuple[str, ...]] = lambda inputs: ()  # 0 in exact arithmetic
    tags: frozenset[str] = frozenset()

    @property
    def dropout(self) -> bool:
        return "dropout_p" in self.options

    def modes(self) -> tuple[str, ...]:
        """The modes in which there is something to compute: an op without parameters has nothing to train."""
        return MODES if self.positional else MODES[:2]

    def inputs(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        features: str | Tensor = "relu",
        seed: int = 0,
        *,
        parameter_dtype: torch.dtype | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Inputs:
        """Seeded inputs; ``features`` names a distribution or is the rows.  One bag has no offsets."""
        generator = torch.Generator().manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        x = features_of(features, shape, randn)
        parameters = self.parameters(shape, randn)
        fixed = self.fixed(shape, randn)
        _plant_winners(self, x, parameters, fixed, shape, mask)
        offsets = torch.tensor([0, *itertools.accumulate(shape.lengths)]) if shape.bags > 1 else None
        cotangent = randn(*self._primary_size(shape))
        return Inputs(
            x=x.to(dtype),
            parameters={name: t.to(parameter_dtype or dtype) for name, t in parameters.items()},
            fixed={name: t.to(dtype) for name, t in fixed.items()},
            offsets=offsets,
            mask=mask,
            options={**self.options, **options},
            lengths=shape.lengths,
            cotangent=cotangent.to(dtype),
        )

    def _primary_size(self, shape: Shape) -> tuple[int, ...]:
        if self.primary == "scores":
            return (shape.instances, shape.heads)
        if self.name in ("mean_pool", "max_pool"):
            return (shape.bags, shape.dim)
        if self.name == "instance_max":
            return (shape.bags, shape.heads)
        return (shape.bags, self.pooled_heads(shape), shape.dim)

    def prefix(self, inputs: Inputs, instances: int) -> Inputs:
        """The same inputs cut to their first rows; the last bag may be cut short, later bags are gone."""
        bounds = [(s, min(e, instances)) for s, e in inputs.bounds() if s < instances]
        lengths, rows = tuple(e - s for s, e in bounds), bounds[-1][1]

        def cut(tensors: Tensors) -> Tensors:
            # A leaf of its own: the prefix of a parameter with one row per instance must not reach back.
            return {n: t[:rows].detach().clone() if n in ROWWISE else t for n, t in tensors.items()}

        return replace(
            inputs,
            x=inputs.x.detach()[:rows].clone(),
            parameters=cut(inputs.parameters),
            fixed=cut(inputs.fixed),
            keep={name: t[:rows] for name, t in inputs.keep.items()},
            offsets=None if inputs.offsets is None else torch.tensor([0, *itertools.accumulate(lengths)]),
            mask=None if inputs.mask is None else inputs.mask[:rows],
            lengths=lengths,
            cotangent=inputs.cotangent[: rows if self.primary == "scores" else len(lengths)],
        )

    def call(self, inputs: Inputs, backend: str | None) -> Tensors:
        """The op itself, through the public function."""
        import milkernels

        tensors = inputs.parameters | inputs.fixed
        arguments = [tensors[name] for name in self.positional]
        keywords = {n: t for n, t in tensors.items() if n not in self.positional} | inputs.options
        if self.takes_offsets:
            arguments.append(inputs.offsets)
        op = getattr(milkernels, self.name)
        result = op(inputs.x, *arguments, mask=inputs.mask, backend=backend, **keywords)
        results = (result,) if isinstance(result, Tensor) else result
        return dict(zip(self.outputs, results, strict=True))

    def eager(self, inputs: Inputs, one_bag: Callable[..., Tensors] | None = None) -> Tensors:
        """The formula as people write it: plain for one bag, a loop over bags otherwise."""
        one_bag = one_bag or self.one_bag
        # Scores alone know no bags, so nobody loops for them.
        bounds = inputs.bounds() if self.takes_offsets else [(0, inputs.x.shape[0])]
        bags = [one_bag(inputs.x[s:e], inputs.rows(s, e), inputs.options) for s, e in bounds]
        if not self.takes_offsets:
            return bags[0]
        return _join(bags, [start for start, _ in bounds])

    def complete(self, outputs: Tensors, inputs: Inputs) -> Tensors:
        """``outputs`` with what eager leaves out (lse), and an index replaced by the value that it chose."""
        full = dict(outputs)
        if "lse" in self.outputs and "lse" not in full:
            scores = full["scores"]
            full["lse"] = torch.stack([torch.logsumexp(scores[s:e], dim=0) for s, e in inputs.bounds()])
        if "indices" in full:
            full["chosen"] = full.get("logits", inputs.x).detach().gather(0, full.pop("indices"))
        if "critical" in full:
            full["chosen"] = inputs.fixed["instance_logits"].gather(0, full.pop("critical"))
        return full

    def flops(self, shape: Shape, mode: str) -> int:
        """Matrix arithmetic under the memory promise: the backward computes hidden units again."""
        score = self.score_flops(shape)
        pool = 2 * shape.instances * shape.dim * self.pooled_heads(shape) if self.primary == "bag" else 0
        if mode == "fwd" or not self.reads_x_backward:
            return score + pool
        into_x = int(mode == "step")
        return (2 + int(self.recomputes) + into_x) * score + (2 + into_x) * pool

    def bytes(self, shape: Shape, dtype: torch.dtype, mode: str) -> int:
        """Traffic to main memory: x once per pass, its gradient, and the scores."""
        x = shape.instances * shape.dim * dtype.itemsize
        scores = 4 * shape.instances * shape.heads * len(_PER_INSTANCE & set(self.outputs))
        if mode == "fwd":
            return x + scores
        return x * (1 + int(self.reads_x_backward) + int(mode == "step")) + 2 * scores


def _plant_winners(
    case: OpCase, x: Tensor, parameters: Tensors, fixed: Tensors, shape: Shape, mask: Tensor | None
) -> None:
    """Gives every bag and class a clear winner, so that rounding cannot change what an op chooses."""
    if case.name not in ("instance_max", "dsmil_pool"):
        return
    for start, end in itertools.pairwise([0, *itertools.accumulate(shape.lengths)]):
        real = range(start, end) if mask is None else (start + mask[start:end].nonzero()[:, 0]).tolist()
        for c in range(shape.heads if len(real) else 0):
            row = real[(7 * c + len(real) // 2) % len(real)]
            if case.name == "instance_max":
                weight = parameters["weight"][c]
                x[row] += 10 * weight / weight.dot(weight)
            else:
                fixed["instance_logits"][row, c] = 8.0


def _attention_parameters(gated: bool) -> Factory:
    def make(shape: Shape, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
        made = {}
        for name in ("v", "u") if gated else ("v",):
            made[f"{name}_weight"] = randn(shape.hidden, shape.dim) / math.sqrt(shape.dim)
            made[f"{name}_bias"] = randn(shape.hidden) / 10
        # Twice the size that keeps the variance: the weights of a bag should differ visibly.
        made["w_weight"] = 2 * randn(shape.heads, shape.hidden) / math.sqrt(shape.hidden)
        made["w_bias"] = randn(shape.heads) / 10
        return made

    return make


def _classifier(shape: Shape, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {
        "weight": randn(shape.heads, shape.dim) / math.sqrt(shape.dim),
        "bias": randn(shape.heads) / 10,
    }


def _dsmil_parameters(shape: Shape, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {
        "q_weight": randn(shape.hidden, shape.dim) / math.sqrt(shape.dim),
        "q_bias": randn(shape.hidden) / 10,
        "q2_weight": randn(shape.hidden, shape.hidden) / math.sqrt(shape.hidden),
        "q2_bias": randn(shape.hidden) / 10,
    }


def _attention_case(name: str, gated: bool) -> OpCase:
    pools = name.endswith("_pool")
    units = ("v_weight", "v_bias", "u_weight", "u_bias") if gated else ("v_weight", "v_bias")
    return OpCase(
        name=name,
        outputs=("bag", "scores", "lse") if pools else ("scores",),
        parameters=_attention_parameters(gated),
        one_bag=formulas.attention_pool_eager if pools else formulas.attention_scores_eager,
        primary="bag" if pools else "scores",
        positional=(*units, "w_weight", "w_bias"),
        options={"activation": "tanh", "dropout_p": 0.0, "seed": 0},
        takes_offsets=pools,
        score_flops=lambda s: 2 * s.instances * s.hidden * ((2 if gated else 1) * s.dim + s.heads),
        recomputes=True,
        zero_gradients=lambda inputs: ("w_bias",) if pools else (),
        tags=frozenset({"compiled", "attention"}),
    )


def _class_flops(shape: Shape) -> int:
    return 2 * shape.instances * shape.dim * shape.heads


_ALL = (
    _attention_case("attention_pool", gated=False),
    _attention_case("gated_attention_pool", gated=True),
    _attention_case("attention_scores", gated=False),
    _attention_case("gated_attention_scores", gated=True),
    OpCase(
        name="softmax_pool",
        outputs=("bag", "scores", "lse"),
        parameters=lambda shape, randn: {"scores": randn(shape.instances, shape.heads)},
        one_bag=formulas.softmax_pool_eager,
        positional=("scores",),
    ),
    OpCase(
        name="query_pool",
        outputs=("bag", "scores", "lse"),
        parameters=lambda shape, randn: {"query": randn(shape.heads, shape.dim)},
        one_bag=formulas.query_pool_eager,
        positional=("query",),
        options={"scale": 0.05},
        score_flops=_class_flops,
    ),
    OpCase(
        name="instance_max",
        outputs=("values", "indices", "logits"),
        parameters=_classifier,
        one_bag=formulas.instance_max_eager,
        primary="values",
        positional=("weight", "bias"),
        score_flops=_class_flops,
        reads_x_backward=False,
    ),
    OpCase(
        name="dsmil_pool",
        outputs=("bag", "scores", "lse", "critical"),
        parameters=_dsmil_parameters,
        one_bag=formulas.dsmil_pool_eager,
        positional=("instance_logits", "q_weight", "q_bias"),
        fixed=lambda shape, randn: {"instance_logits": randn(shape.instances, shape.heads)},
        score_flops=lambda s: 2 * s.instances * s.hidden * (s.dim + s.hidden + s.heads),
        recomputes=True,
    ),
    OpCase(
        name="loss_attention_pool",
        outputs=("bag", "scores", "lse", "logits"),
        parameters=_classifier,
        one_bag=formulas.loss_attention_pool_eager,
        positional=("weight", "bias"),
        score_flops=_class_flops,
        pooled_heads=lambda shape: 1,
        # One class leaves a plain softmax of the logits, in which the bias cancels.
        zero_gradients=lambda inputs: ("bias",) if len(inputs.parameters["bias"]) == 1 else (),
    ),
    OpCase(
        name="weighted_pool",
        outputs=("bag",),
        parameters=lambda shape, randn: {"weights": randn(shape.instances, shape.heads)},
        one_bag=formulas.weighted_pool_eager,
        positional=("weights",),
    ),
    OpCase(
        name="mean_pool",
        outputs=("bag",),
        parameters=lambda shape, randn: {},
        one_bag=formulas.mean_pool_eager,
        pooled_heads=lambda shape: 1,
        reads_x_backward=False,
    ),
    OpCase(
        name="max_pool",
        outputs=("values", "indices"),
        parameters=lambda shape, randn: {},
        one_bag=formulas.max_pool_eager,
        primary="values",
        reads_x_backward=False,
    ),
)
CASES: dict[str, OpCase] = {case.name: case for case in _ALL}
