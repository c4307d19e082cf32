"""What the ops return: named tuples.  B counts bags, N instances, K heads, C classes; L is a width."""

from typing import NamedTuple

from torch import Tensor


class Pooled(NamedTuple):
    """What pooling by a softmax returns; all three are differentiable.

    Attributes:
        bag: ``[B, K, L]``, the vector of each bag and head.
        scores: ``[N, K]``, before the softmax.
        lse: ``[B, K]``, log-sum-exp of the scores in each bag.
    """

    bag: Tensor
    scores: Tensor
    lse: Tensor


class DSMILPooled(NamedTuple):
    """What DSMIL's second stream returns.

    Attributes:
        bag: ``[B, C, Lv]``, the vector of each bag and class; Lv is the width of the value.
        scores: ``[N, C]``, before the softmax.
        lse: ``[B, C]``, log-sum-exp of the scores in each bag.
        critical: ``[B, C]`` int64, the row of the critical instance of each class; -1: none.
    """

    bag: Tensor
    scores: Tensor
    lse: Tensor
    critical: Tensor


class DSMILOutput(NamedTuple):
    """What both streams of DSMIL return.

    Attributes:
        bag: ``[B, C, Lv]``, the vector of each bag and class; Lv is the width of the value.
        scores: ``[N, C]``, before the softmax.
        lse: ``[B, C]``, log-sum-exp of the scores in each bag.
        critical: ``[B, C]`` int64, the rows with the largest logits; -1: none.
        values: ``[B, C]``, their logits.
        logits: ``[N, C]``, of the instances.
    """

    bag: Tensor
    scores: Tensor
    lse: Tensor
    critical: Tensor
    values: Tensor
    logits: Tensor


class LossAttentionPooled(NamedTuple):
    """What Loss-Attention returns.

    Attributes:
        bag: ``[B, 1, L]``, the vector of each bag.
        scores: ``[N, 1]``, before the softmax.
        lse: ``[B, 1]``, log-sum-exp of the scores in each bag.
        logits: ``[N, C]``, of the instances.
    """

    bag: Tensor
    scores: Tensor
    lse: Tensor
    logits: Tensor


class InstanceMax(NamedTuple):
    """What DSMIL's first stream returns.

    Attributes:
        values: ``[B, C]``, the largest logit of each bag and class; -inf: none.
        indices: ``[B, C]`` int64, its row; -1: none.
        logits: ``[N, C]``, of the instances.
    """

    values: Tensor
    indices: Tensor
    logits: Tensor


class MaxPooled(NamedTuple):
    """What pooling by the maximum returns.

    Attributes:
        values: ``[B, L]``, the largest number of each bag and feature; 0 for an empty bag.
        indices: ``[B, L]`` int64, its row; -1: none.
    """

    values: Tensor
    indices: Tensor


class TopInstances(NamedTuple):
    """The highest, or lowest, instances of each bag and head, in order.

    Attributes:
        values: ``[B, K, k]``, their scores.
        indices: ``[B, K, k]`` int64, their rows; -1 past the end of a bag.
    """

    values: Tensor
    indices: Tensor


class CriticalInstances(NamedTuple):
    """The critical instances of bags that are spread over ranks.

    Attributes:
        rows: ``[B, C, L]``, the instances.
        values: ``[B, C]``, their logits.
        rank: ``[B, C]``, the rank that holds each; -1: none does.
    """

    rows: Tensor
    values: Tensor
    rank: Tensor
