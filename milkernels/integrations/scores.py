"""Score networks: what gives one score per instance and head, called by models that softmax and pool themselves."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from milkernels.integrations.engine import SCORES, Structure, has, register, structure_of
from milkernels.integrations.layers import (
    Gate,
    branch,
    check_plain,
    gate_of,
    is_score_network,
    linear,
    original_class,
    refuse,
    scorer,
)
from milkernels.integrations.proof import Example, Inputs

_MOST_HEADS = 32  # more outputs than this are a classifier's, and better served by a matrix product


def eager_scores(gate: Gate, x: Tensor) -> Tensor:
    """``[..., L]`` to ``[..., K]`` in the type that eager layers return."""
    scores = gate.scores(x.flatten(0, -2))
    return scores.to(gate.dtype(x)).reshape(*x.shape[:-1], gate.heads)


class ScoreNetwork(Structure):
    """A module that maps instances ``x [..., L]`` to scores ``[..., K]``, and may return ``x`` beside them."""

    pools = False
    min_instances = (200, 400)

    def __init__(
        self, name: str, looks: Callable[[nn.Module], bool], read: Callable, returns_x: bool, takes: str = "x"
    ):
        self.name, self._looks, self._read, self._returns_x = name, looks, read, returns_x
        self.methods = {"forward": (takes,)}

    def looks_like(self, module: nn.Module) -> bool:
        return self._looks(module)

    def parts(self, module: nn.Module) -> Gate:
        gate = self._read(module)
        return gate if gate.heads <= _MOST_HEADS else refuse(f"it has {gate.heads} outputs, more than {_MOST_HEADS}")

    def share(self, parts: Gate) -> str:
        return SCORES

    def forward(self, module: nn.Module, gate: Gate, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not isinstance(x, Tensor) or x.ndim < 2 or x.layout != torch.strided:
            return NotImplemented
        scores = eager_scores(gate, x)
        return (scores, x) if self._returns_x else scores

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        yield Example("forward", (inputs.bag(gate.in_dim),))
        yield Example("forward", (inputs.bag(gate.in_dim, 2, 5),))


def _is_plain(module: nn.Module) -> bool:
    return has(module, "module") and is_score_network(module.module)


def _read_plain(module: nn.Module) -> Gate:
    return scorer("module", module.module)


def _is_gated(module: nn.Module) -> bool:
    return has(module, "attention_a", "attention_b", "attention_c")


def _read_gated(module: nn.Module) -> Gate:
    v, u = branch("attention_a", module.attention_a), branch("attention_b", module.attention_b)
    return gate_of(v, u, linear("attention_c", module.attention_c))


def _is_sequential(module: nn.Module) -> bool:
    return original_class(module) is nn.Sequential and is_score_network(module)


def _read_sequential(module: nn.Module) -> Gate:
    return scorer("it", module)


# CLAM's return x as well; those of MIL-Lab and PANTHER, with the same attributes, do not.
PLAIN = ScoreNetwork("attention network", _is_plain, _read_plain, False)
PLAIN_AND_X = ScoreNetwork("attention network that returns x", _is_plain, _read_plain, True)
GATED = ScoreNetwork("gated attention network", _is_gated, _read_gated, False)
GATED_AND_X = ScoreNetwork("gated attention network that returns x", _is_gated, _read_gated, True)
SEQUENTIAL = ScoreNetwork("attention network, sequential", _is_sequential, _read_sequential, False, takes="input")

register(PLAIN, PLAIN_AND_X, GATED, GATED_AND_X, SEQUENTIAL)


def proven_gate(name: str, module: nn.Module, *structures: ScoreNetwork) -> Gate:
    """The gate of a score network that was proven to be one of these, to be passed over."""
    structure = structure_of(module)
    if structure not in structures:
        refuse(f"{name} is not known to be {' or '.join(s.name for s in structures)}")
    check_plain(name, module)
    return structure.parts(module)
