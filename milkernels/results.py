"""What the ops return: named tuples, whose fields are described in ``milkernels.ops``."""

from typing import NamedTuple

from torch import Tensor


class Pooled(NamedTuple):
    """What pooling by a softmax returns; all three are differentiable."""

    bag: Tensor  # [B, K, L]
    scores: Tensor  # [N, K]  before the softmax
    lse: Tensor  # [B, K]  log-sum-exp of the scores in each bag


class DSMILPooled(NamedTuple):
    bag: Tensor  # [B, C, Lv]
    scores: Tensor  # [N, C]
    lse: Tensor  # [B, C]
    critical: Tensor  # [B, C]  the critical instance of each class


class DSMILOutput(NamedTuple):
    bag: Tensor  # [B, C, Lv]
    scores: Tensor  # [N, C]
    lse: Tensor  # [B, C]
    critical: Tensor  # [B, C]  the instances with the largest logits
    values: Tensor  # [B, C]  their logits
    logits: Tensor  # [N, C]


class LossAttentionPooled(NamedTuple):
    bag: Tensor  # [B, 1, L]
    scores: Tensor  # [N, 1]
    lse: Tensor  # [B, 1]
    logits: Tensor  # [N, C]


class InstanceMax(NamedTuple):
    values: Tensor  # [B, C]
    indices: Tensor  # [B, C]
    logits: Tensor  # [N, C]


class MaxPooled(NamedTuple):
    values: Tensor  # [B, L]
    indices: Tensor  # [B, L]


class TopInstances(NamedTuple):
    values: Tensor  # [B, K, k]
    indices: Tensor  # [B, K, k]


class CriticalInstances(NamedTuple):
    """The critical instances of bags that are spread over ranks."""

    rows: Tensor  # [B, C, L]
    values: Tensor  # [B, C]  their logits
    rank: Tensor  # [B, C]  that holds them; -1: none does
