"""What an ``OpCase`` is: one op with its inputs, its call, the formula it replaces, and what it costs."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import milkernels
from milkernels.testing.arguments import public_arguments
from milkernels.testing.formulas import OneBag, Tensors, embedded, embedding_dropout, of_embedded
from milkernels.testing.inputs import Inputs, Shape, features_of, keep_masks
from milkernels.testing.philox import keep_scale

MODES = ("fwd", "step", "frozen")  # forward; forward and backward; the same when x needs no gradient
_PER_INSTANCE = frozenset({"scores", "logits", "weights"})  # outputs of N rows; the others have one row per bag
_INDICES = frozenset({"indices", "critical"})  # outputs that are rows of x

Sizes = Mapping[str, tuple[str | int, ...]]  # of tensors by name; see OpCase
Flops = Callable[[Shape], int]


def _no_flops(shape: Shape) -> int:
    return 0


@dataclass(frozen=True)
class OpCase:
    """One op, or one variant of it.

    ``tensors`` are all that it takes, with their sizes: N instances, B bags, L numbers of an instance, D hidden units,
    K heads, C classes, Q2 units of a second query layer, V of a value, E of the layer in front.  The first one is
    ``Inputs.x``, the instances or their scores.

    Arithmetic is that of the cheapest exact algorithm that stores no hidden unit; see ``flops`` and ``bytes``.
    """

    name: str  # the key in the registry
    outputs: tuple[str, ...]  # in the order the op returns them
    one_bag: OneBag  # the formula it replaces
    tensors: Sizes
    fixed: frozenset[str] = frozenset()  # those that never need a gradient
    gain: Mapping[str, float] = field(default_factory=dict)  # of weights: by how much they are larger than usual
    op: str = ""  # the public function, where its name is not the key
    compose: Callable[[Inputs, str | None], Tensors] | None = None  # the call, where one function is not all of it
    alternatives: Mapping[str, OneBag] = field(default_factory=dict)  # other formulas for the same, by what they use
    primary: str = "bag"  # the output that a training step differentiates
    # The size of that output for one bag, of (shape, options); one with a row per instance has a column per head.
    primary_row: Callable[[Shape, Mapping[str, Any]], tuple[int, ...]] = lambda shape, _: (shape.heads, shape.dim)
    options: Mapping[str, Any] = field(default_factory=dict)
    dropout: str = ""  # the option that is the share of dropped units, where there is one
    derived: Mapping[str, Callable[[Inputs], Tensor]] = field(default_factory=dict)  # follow from the other inputs
    takes_offsets: bool = True
    winners: str = ""  # where a choice is made: in the logits of a classifier "weight", or in the tensor named
    default_heads: int = 1
    default_hidden: int = 256
    hidden_flops: Flops = _no_flops  # products for hidden units, which the backward repeats unless they are saved
    head_flops: Flops = _no_flops  # products with a few vectors per bag or of all bags, differentiated
    forward_flops: Flops = _no_flops  # products that the backward does not differentiate
    reads: tuple[int, int] = (1, 1)  # passes over x in the forward and in the backward
    columns: tuple[int, int] = (1, 1)  # tensors like the scores, [N, heads], moved in the forward and in the backward
    embeds: int = 0  # how often the forward goes over the rows to embed them; 0: it takes them as they are
    zero_gradients: Callable[[Inputs], tuple[str, ...]] = lambda inputs: ()  # 0 in exact arithmetic
    tags: frozenset[str] = frozenset()

    def __post_init__(self):
        object.__setattr__(self, "op", self.op or self.name)

    @property
    def leading(self) -> str:
        """What ``Inputs.x`` is: instances, or scores."""
        return next(iter(self.tensors))

    def with_first(self, symbol: str) -> frozenset[str]:
        """The tensors besides ``Inputs.x`` with one row for each instance ("N") or bag ("B")."""
        return frozenset(name for name, size in self.tensors.items() if size[0] == symbol) - {self.leading}

    def inner(self, shape: Shape) -> Shape:
        """What the op sees behind the layer in front of it, if there is one: instances half as wide, as in CLAM."""
        return replace(shape, dim=max(1, shape.dim // 2)) if self.embeds else shape

    def modes(self) -> tuple[str, ...]:
        """The modes in which there is something to compute: an op without parameters has nothing to train."""
        return MODES if self.leading == "x" and len(self.tensors) > 1 else MODES[:2]

    def width(self, shape: Shape) -> int:
        """Numbers in a row of ``Inputs.x``."""
        return shape.dim if self.leading == "x" else shape.heads

    def inputs(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        features: str | Tensor = "relu",
        seed: int = 0,
        *,
        parameter_dtype: torch.dtype | None = None,
        mask: Tensor | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Inputs:
        """Seeded inputs; ``features`` names a distribution or is the rows, scores are normal.

        One bag has no offsets.  ``mask`` and given rows lie on ``device``, whose own numbers the others are.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        options = {**self.options, **options}
        instances = self.leading == "x"
        x = features_of(features, shape, randn) if instances else randn(shape.instances, shape.heads)
        inner = self.inner(shape)
        tensors = self._draw(shape, randn)
        if self.winners:
            self._plant(x, tensors, _real_rows(shape, mask, x.device), options)
        per_instance = self.primary in _PER_INSTANCE
        size = (shape.instances, shape.heads) if per_instance else (shape.bags, *self.primary_row(inner, options))
        inputs = Inputs(
            x=x.to(dtype),
            parameters={n: t.to(parameter_dtype or dtype) for n, t in tensors.items() if n not in self.fixed},
            fixed={name: tensors[name].to(dtype) for name in self.fixed},
            offsets=_offsets(shape.lengths, x.device) if shape.bags > 1 else None,
            mask=mask,
            options=options,
            lengths=shape.lengths,
            cotangent=randn(*size).to(dtype),
            rowwise=self.with_first("N"),
            bagwise=self.with_first("B"),
        )
        inputs.parameters |= {name: of(inputs).to(parameter_dtype or dtype) for name, of in self.derived.items()}
        return inputs

    def _draw(self, shape: Shape, randn: Callable[..., Tensor]) -> Tensors:
        """All tensors but ``Inputs.x`` and what is derived: normal, weights so that they keep the variance."""
        inner = self.inner(shape)
        symbols = {"N": shape.instances, "B": shape.bags, "L": shape.dim, "D": shape.hidden, "Q2": shape.hidden}
        symbols |= {"K": shape.heads, "C": shape.heads, "E": inner.dim, "V": inner.dim}
        made = {}
        for name, size in self.tensors.items():
            if name == self.leading or name in self.derived:
                continue
            made[name] = t = randn(*(symbols.get(s, s) for s in size))
            if name.endswith("weight"):
                made[name] = self.gain.get(name, 1) * t / math.sqrt(t.shape[1])
            elif name.endswith("bias"):
                made[name] = t / 10
        return made

    def _plant(self, x: Tensor, tensors: Tensors, bags: list[Tensor], options: Mapping[str, Any]) -> None:
        if self.embeds:
            _plant_largest_embedded_logits(x, tensors, bags, options)
        elif self.winners == "weight":
            _plant_largest_logits(x, tensors["weight"], bags, options.get("k", 1))
        else:
            _plant_largest_entries(x, {"x": x, **tensors}[self.winners], bags, options.get("k", 1))

    def prefix(self, inputs: Inputs, instances: int) -> Inputs:
        """The same inputs cut to their first rows; the last bag may be cut short, later bags are gone."""
        bounds = [(s, min(e, instances)) for s, e in inputs.bounds() if s < instances]
        lengths, rows = tuple(e - s for s, e in bounds), bounds[-1][1]

        def cut(tensors: Tensors) -> Tensors:
            # A leaf of its own: the prefix of a parameter with one row per instance must not reach back.
            sizes = dict.fromkeys(inputs.rowwise, rows) | dict.fromkeys(inputs.bagwise, len(lengths))
            return {n: t[: sizes[n]].detach().clone() if n in sizes else t for n, t in tensors.items()}

        return replace(
            inputs,
            x=inputs.x.detach()[:rows].clone(),
            parameters=cut(inputs.parameters),
            fixed=cut(inputs.fixed),
            keep={name: t[:rows] for name, t in inputs.keep.items()},
            offsets=None if inputs.offsets is None else _offsets(lengths, inputs.x.device),
            mask=None if inputs.mask is None else inputs.mask[:rows],
            lengths=lengths,
            cotangent=inputs.cotangent[: rows if self.primary in _PER_INSTANCE else len(lengths)],
        )

    def call(self, inputs: Inputs, backend: str | None) -> Tensors:
        """The op itself, through the public function."""
        if self.compose is not None:
            return self.compose(inputs, backend)
        keywords = arguments_of(self.op, inputs)
        if self.takes_offsets:
            keywords["offsets"] = inputs.offsets
        result = getattr(milkernels, self.op)(inputs.x, mask=inputs.mask, backend=backend, **keywords)
        results = (result,) if isinstance(result, Tensor) else result
        return dict(zip(self.outputs, results, strict=True))

    def eager(self, inputs: Inputs, one_bag: OneBag | None = None) -> Tensors:
        """The formula as people write it: plain for one bag, a loop over bags otherwise."""
        one_bag = one_bag or self.one_bag
        if not self.takes_offsets:  # scores alone know no bags, so nobody loops for them
            return one_bag(inputs.x, inputs.rows(0, len(inputs.x)), inputs.options)
        bags = [one_bag(x, rest, inputs.options) for x, rest in inputs.bags()]
        return _join(bags, [start for start, _ in inputs.bounds()])

    def complete(self, outputs: Tensors, inputs: Inputs) -> Tensors:
        """``outputs`` with what eager leaves out (lse), and indices replaced by the values that they choose."""
        full = dict(outputs)
        if "lse" in self.outputs and "lse" not in full:
            full["lse"] = bag_logsumexp(full["scores"], inputs)
        compared = full.get("logits", inputs.fixed.get("instance_logits", inputs.x)).detach()
        for name in _INDICES & full.keys():
            full[f"chosen_{name}"] = _chosen(compared, full.pop(name))
        return full

    def flops(self, shape: Shape, mode: str) -> int:
        """The least matrix arithmetic: hidden units and embedded rows are saved for the backward, not computed
        again."""
        inner = self.inner(shape)
        hidden, heads = self.hidden_flops(inner), self.head_flops(inner)
        embedding = 2 * shape.instances * shape.dim * inner.dim if self.embeds else 0
        forward = hidden + heads + self.forward_flops(inner)
        if mode == "fwd":
            return forward + self.embeds * embedding
        into_x = int(mode == "step")
        into_h = 1 if self.embeds else into_x  # an embedding is trained, frozen or not
        backward = (1 + into_h) * (hidden + heads)
        if hidden or heads:  # a maximum is differentiated in its few rows
            backward += (1 + into_x) * embedding
        return forward + embedding + backward

    def bytes(self, shape: Shape, dtype: torch.dtype, mode: str) -> int:
        """Traffic to main memory: the passes over x, its gradient, and what is like the scores."""
        x = shape.instances * self.width(shape) * dtype.itemsize
        column = 4 * shape.instances * shape.heads
        if mode == "fwd":
            return x * self.reads[0] + column * self.columns[0]
        return x * (sum(self.reads) + int(mode == "step")) + column * sum(self.columns)


def linear(prefix: str, out: str, width: str) -> Sizes:
    """The weight and the bias of a linear layer."""
    return {f"{prefix}weight": (out, width), f"{prefix}bias": (out,)}


def embedded_sizes(tensors: Sizes) -> Sizes:
    """The same behind a layer in front: what is not the instances is as wide as that layer."""
    sizes = {n: size if n == "x" else tuple("E" if s == "L" else s for s in size) for n, size in tensors.items()}
    return sizes | linear("e_", "E", "L")


def arguments_of(op: str, inputs: Inputs) -> dict[str, Any]:
    """Tensors and options as keywords of the public function."""
    embedding = {"e_dropout_p": embedding_dropout(inputs.options)} if "e_weight" in inputs.parameters else {}
    return public_arguments(op, inputs.parameters | inputs.fixed | inputs.options | embedding)


def embedding_case(case: OpCase, name: str, *, passes: int = 1) -> OpCase:
    """The same op with a layer in front of it, trained with it; all its dropout is one option."""
    dropout = case.dropout or "e_dropout_p"
    return replace(
        case,
        name=name,
        tensors=embedded_sizes(case.tensors),
        one_bag=of_embedded(case.one_bag),
        alternatives={use: of_embedded(one_bag) for use, one_bag in case.alternatives.items()},
        options={**case.options, dropout: 0.0, "seed": 0},
        dropout=dropout,
        embeds=passes,
        tags=case.tags - {"compiled"},  # which is for tests of the attention kernels alone
    )


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=device)


def bag_logsumexp(scores: Tensor, inputs: Inputs) -> Tensor:
    """The log-sum-exp of the scores ``[N, K]`` in each bag: ``[B, K]``."""
    return torch.stack([torch.logsumexp(scores[s:e], dim=0) for s, e in inputs.bounds()])


def _join(bags: list[Tensors], starts: list[int]) -> Tensors:
    joined = {}
    for name in bags[0]:
        parts = [bag[name] for bag in bags]
        if name in _INDICES:
            parts = [torch.where(part < 0, -1, part + start) for part, start in zip(parts, starts, strict=True)]
        joined[name] = torch.cat(parts) if name in _PER_INSTANCE else torch.stack(parts)
    return joined


def _chosen(rows: Tensor, indices: Tensor) -> Tensor:
    """``rows [N, C]`` at ``indices`` ``[B, C]`` or ``[B, C, k]``; -inf where there is none."""
    indices = indices.reshape(*indices.shape[:2], -1)
    columns = torch.arange(rows.shape[1], device=rows.device).view(1, -1, 1)
    return rows[indices.clamp(min=0), columns].masked_fill(indices < 0, -math.inf)


# Every bag and column gets clear winners, so that rounding cannot change what an op chooses.


def _real_rows(shape: Shape, mask: Tensor | None, device: torch.device) -> list[Tensor]:
    """The rows of each bag that are not masked."""
    real = torch.ones(shape.instances, dtype=torch.bool, device=device) if mask is None else mask.bool()
    bounds = itertools.pairwise(itertools.accumulate(shape.lengths, initial=0))
    return [start + real[start:end].nonzero()[:, 0] for start, end in bounds]


def _winning_rows(rows: int, columns: int, count: int, device: torch.device) -> Tensor:
    """``[columns, count]`` of so many rows, different ones for each column."""
    first = 7 * torch.arange(columns, device=device).unsqueeze(1) + rows // 2
    return (first + torch.arange(min(count, rows), device=device)) % rows


def _plant_largest_logits(x: Tensor, weight: Tensor, bags: list[Tensor], count: int) -> None:
    classes = torch.arange(len(weight), device=x.device)
    towards = torch.linalg.pinv(weight).T  # row c moves the logit of class c alone, by the least change of x
    for real in filter(len, bags):
        logits = x[real] @ weight.T
        for rows in _winning_rows(len(real), len(weight), count, x.device).T:
            missing = logits.amax(dim=0) + 1 - logits[rows, classes]
            x.index_add_(0, real[rows], missing.unsqueeze(1) * towards)


def _plant_largest_embedded_logits(x: Tensor, tensors: Tensors, bags: list[Tensor], options: Mapping[str, Any]) -> None:
    """Each class has a unit of the embedding that no other class sees; its winner is a row in which that is kept."""
    weight, keep = tensors["weight"], keep_masks(tensors, options, len(x), x.device)
    kept = keep.get("keep_embedding", x.new_ones(len(x), weight.shape[1], dtype=torch.bool))
    scale = keep_scale(embedding_dropout(options)) if keep else 1.0
    units = torch.arange(len(weight), device=x.device) % weight.shape[1]
    weight[:, units] = torch.eye(len(weight), device=x.device)
    towards = torch.linalg.pinv(tensors["e_weight"]).T  # row u moves the input of unit u alone
    for real in filter(len, bags):
        rest = {name: mask[real] for name, mask in keep.items()}
        h = embedded(x[real], tensors | rest, options)
        logits = h @ weight.T
        for c, unit in enumerate(units.tolist()):
            found = kept[real, unit].nonzero()[:, 0]
            if len(found) == 0:
                continue
            row = found[(7 * c + len(found) // 2) % len(found)]
            now = tensors["e_weight"][unit] @ x[real[row]] + tensors["e_bias"][unit]
            missing = (logits[:, c].amax() + 1 - logits[row, c]) / scale
            x[real[row]] += (now.relu() + missing - now) * towards[unit]


def _plant_largest_entries(x: Tensor, target: Tensor, bags: list[Tensor], count: int) -> None:
    columns = torch.arange(target.shape[1], device=target.device).unsqueeze(1)
    for real in filter(len, bags):
        rows = real[_winning_rows(len(real), target.shape[1], count, target.device)]
        # Steps that half types still resolve.
        steps = torch.arange(rows.shape[1], device=target.device) / 4
        target[rows, columns] = target[real].amax(dim=0).unsqueeze(1) + 1 + steps
