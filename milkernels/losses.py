"""Losses of the papers' models on ragged bags.

Labels are one per bag.  What a bag's instances add is summed by `weighted_pool`: masked rows are never read, and an
empty bag adds 0.  Everything is computed in float32 at least, and losses come so, as autocast has it: in float16 a
count ends at 65,504 and the square of a weight below 2e-4 is 0.
"""

import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from milkernels import ops
from milkernels.arguments import (
    DTYPES,
    check_choice,
    check_count,
    check_dense,
    check_device,
    check_flag,
    check_instances,
    check_number,
    check_per_row,
    check_share,
    check_type,
    checked_indices,
)
from milkernels.bags import Bags, instances_of
from milkernels.layers import Embed, Linear, as_linear, checked_embed
from milkernels.nn import CLAMPrediction, DSMILPrediction, Prediction
from milkernels.nn.models import logits_of_rows, most_and_least
from milkernels.ragged import bag_index, bag_lengths, check_offsets, checked_mask

__all__ = [
    "WeightEnsemble",
    "clam_instance_loss",
    "clam_loss",
    "consistency",
    "dsmil_loss",
    "instance_cross_entropy",
    "loss_attention_loss",
    "ramp_up",
]
_REDUCTIONS = ("sum", "mean")


def _checked_labels(labels: Tensor, num_bags: int, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """`checked_indices` of the classes."""
    check_dense("labels", labels)
    if labels.dtype != torch.int64 or labels.shape != (num_bags,):
        raise ValueError(f"labels must be int64 [{num_bags}]; got {labels.dtype} {list(labels.shape)}")
    check_device("labels", labels, logits)
    return checked_indices("labels", labels, logits.shape[1])


def _visible(loss: Tensor, wrong: Tensor | None) -> Tensor:
    """NaN for bags whose labels are no classes, where that could not be an error."""
    return loss if wrong is None else loss.masked_fill(wrong, torch.nan)


def _num_bags(offsets: Tensor | None, rows: Tensor) -> int:
    if offsets is None:
        return 1
    check_offsets(offsets, len(rows), rows.device)
    return len(offsets) - 1


def _widened(*tensors: Tensor) -> Iterator[Tensor]:
    """In the type of accumulation: float32, float64 if any of them is."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return (t.to(dtype) for t in tensors)


def _sums(terms: Tensor, weights: Tensor, offsets: Tensor | None, mask: Tensor | None) -> Tensor:
    """``sum_{i in b} weights[i] terms[i]`` ``[B]``, in the type of ``terms``."""
    return ops.weighted_pool(terms[:, None], weights[:, None], offsets, mask=mask)[:, 0, 0]


def _lengths(terms: Tensor, offsets: Tensor | None, mask: Tensor | None) -> Tensor:
    """Instances that count, at least 1."""
    ones = torch.ones_like(terms)
    return _sums(ones, ones, offsets, mask).clamp(min=1)


def _column(name: str, weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """``[N]``, of ``[N]`` or ``[N, 1]``; N is that of ``rows``."""
    check_dense(name, weights)
    if weights.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {weights.dtype}")
    rows = weights if rows is None else rows
    check_device(name, weights, rows)
    if weights.ndim == 2 and weights.shape[1] == 1:
        weights = weights[:, 0]
    if weights.ndim != 1 or weights.shape != rows.shape[:1]:
        size = len(rows) if rows.ndim else "N"
        raise ValueError(f"{name} must be [{size}] or [{size}, 1]; got {list(weights.shape)}")
    return weights


def instance_cross_entropy(
    logits: Tensor,
    weights: Tensor,
    labels: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """The weighted cross-entropy of instances against their bag's label: L2 without lambda in Shi et al. 2020, eq. 6.

    Args:
        logits: of the instances, ``[N, C]``.
        weights: of the instances, ``[N]`` or ``[N, 1]``: those of `attention_weights`, which sum to 1 in each bag.
        labels: of the bags, int64 ``[B]``.
        offsets, mask: as in the ops.
        reduction: over the instances of a bag: "sum", as in the paper, or "mean", as in its authors' code.

    Returns:
        ``[B]`` in float32, float64 if ``logits`` or ``weights`` are; 0 for a bag without instances.

    Raises:
        TypeError, ValueError: arguments of another type or shape, labels that are no classes.  A label on a GPU, which
            is not read, makes its bag's loss NaN instead.
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    check_instances(logits, "logits")
    labels, wrong = _checked_labels(labels, _num_bags(offsets, logits), logits)
    weights, mask = _column("weights", weights, logits), checked_mask(mask, logits)
    logits, weights = _widened(logits, weights)
    if mask is not None:  # -inf there: its softmax would be NaN, and so would the gradients
        logits = logits.masked_fill(~mask[:, None], 0)
    of_instance = labels[bag_index(offsets, len(logits), logits.device)]
    terms = F.cross_entropy(logits, of_instance, reduction="none")
    loss = _sums(terms, weights, offsets, mask)
    return _visible(loss if reduction == "sum" else loss / _lengths(terms, offsets, mask), wrong)


def consistency(
    weights: Tensor, targets: Tensor, offsets: Tensor | None = None, *, mask: Tensor | None = None
) -> Tensor:
    """``sum_t (alpha_t - target_t)^2`` of each bag ``[B]``: L3 without omega(m) in Shi et al. 2020, eq. 7.

    ``weights`` and ``targets`` are ``[N]`` or ``[N, 1]``; targets, of `WeightEnsemble`, get no gradient.  The result is
    in float32, float64 if one of them is.
    """
    weights = _column("weights", weights)
    _num_bags(offsets, weights)
    targets, mask = _column("targets", targets, weights), checked_mask(mask, weights)
    weights, targets = _widened(weights, targets.detach())
    terms = (weights - targets).square()
    return _sums(terms, torch.ones_like(terms), offsets, mask)


def ramp_up(epoch: float, length: float, peak: float = 1.0) -> float:
    """omega(m) of Shi et al. 2020: ``peak * exp(-5 (1 - T)^2)``, T growing from 0 to 1 in the first ``length`` epochs.

    Raises:
        ValueError: ``length`` is not positive, or ``epoch`` negative.
    """
    for name, value in (("epoch", epoch), ("length", length), ("peak", peak)):
        check_number(name, value)
    if not length > 0:
        raise ValueError(f"length must be more than 0 epochs; got {length}")
    if not epoch >= 0:
        raise ValueError(f"epoch must be at least 0; got {epoch}")
    return peak * math.exp(-5 * (1 - min(1.0, epoch / length)) ** 2)


class WeightEnsemble:
    """Targets of the instances' weights, kept for each bag from epoch to epoch: Shi et al. 2020, before eq. 7.

    ``~alpha = beta ~alpha + (1 - beta) alpha`` once an epoch, from 0 on; a target is ``~alpha / (1 - beta^m)`` after m
    epochs, without which the first ones would be too small (Laine and Aila 2016, and the authors' code).  They are kept
    in float32 at least.

    Args:
        beta: how far the ensemble reaches back, in [0, 1); the authors have 0.6.

    A bag is known by a key, such as its index in the data set. ::

        targets = ensemble.targets(keys, weights, offsets)
        loss = loss_attention_loss(prediction, labels, offsets, targets=targets, omega=ramp_up(epoch, 80))
        ensemble.update(keys, weights, offsets)  # once an epoch for each bag
    """

    def __init__(self, beta: float = 0.6):
        check_number("beta", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1); got {beta}")
        self.beta = beta
        self._bags: dict[Hashable, tuple[int, Tensor]] = {}  # epochs, and ~alpha

    def __len__(self) -> int:
        return len(self._bags)

    def targets(self, keys: Sequence[Hashable], weights: Tensor, offsets: Tensor | None = None) -> Tensor:
        """``[N]``; of a bag that has not been seen its ``weights``, to which it is consistent."""
        parts = []
        for key, alpha in self._cut(keys, weights, offsets):
            epochs, ensemble = self._of(key, alpha)
            parts.append(ensemble.to(alpha) / (1 - self.beta**epochs) if epochs else alpha)
        return torch.cat(parts) if parts else _column("weights", weights).detach()

    def update(self, keys: Sequence[Hashable], weights: Tensor, offsets: Tensor | None = None) -> None:
        """Takes in the weights of these bags, ``[N]`` or ``[N, 1]``: once an epoch."""
        cut = self._cut(keys, weights, offsets)
        known = [self._of(key, alpha) for key, alpha in cut]  # all are checked before one is changed
        for (key, alpha), (epochs, ensemble) in zip(cut, known, strict=True):
            self._bags[key] = (epochs + 1, self.beta * ensemble.to(alpha) + (1 - self.beta) * alpha)

    def _cut(self, keys: Sequence[Hashable], weights: Tensor, offsets: Tensor | None) -> list[tuple[Hashable, Tensor]]:
        (weights,) = _widened(_column("weights", weights).detach())
        check_type("keys", keys, Sequence, "a sequence, one key for each bag")
        if len(keys) != _num_bags(offsets, weights):
            raise ValueError(f"keys must name every bag, {_num_bags(offsets, weights)}; got {len(keys)}")
        if len(set(keys)) != len(keys):
            raise ValueError(f"keys must differ; got {list(keys)}")
        lengths = [len(weights)] if offsets is None else bag_lengths(offsets).tolist()
        return list(zip(keys, weights.split(lengths), strict=True))

    def _of(self, key: Hashable, alpha: Tensor) -> tuple[int, Tensor]:
        epochs, ensemble = self._bags.get(key, (0, torch.zeros_like(alpha)))
        if ensemble.shape != alpha.shape:
            raise ValueError(f"bag {key!r} had {len(ensemble)} instances before; got {len(alpha)}")
        return epochs, ensemble

    def state_dict(self) -> dict:
        """For `torch.save`; what `load_state_dict` takes."""
        return {"beta": self.beta, "bags": dict(self._bags)}

    def load_state_dict(self, state: Mapping) -> None:
        self.beta, self._bags = state["beta"], dict(state["bags"])


def _check_fields(name: str, value, expected: type) -> None:
    if not all(hasattr(value, field) for field in expected._fields):
        raise TypeError(f"{name} must be a {expected.__name__}; got {type(value).__name__}")


def loss_attention_loss(
    prediction: Prediction,
    labels: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    lambda_: float = 0.1,
    instances: str = "sum",
    targets: Tensor | None = None,
    omega: float = 0.0,
) -> Tensor:
    """The loss of Loss-Attention, Shi et al. 2020, eq. 7: ``L1 + lambda L2 + omega(m) L3``, the mean over bags.

    Args:
        prediction: what `LossAttentionModel` returned.
        labels: of the bags, int64 ``[B]``.
        offsets, mask: of the model's call.
        lambda_: of the instances' cross-entropy; the paper has 0.1 on the classical sets, 2 on MNIST-bags.
        instances: "sum" over the instances of a bag, as in the paper, or "mean", as in its authors' code.
        targets: of `WeightEnsemble`; without them there is no third term.
        omega: its weight in this epoch, such as ``ramp_up(epoch, 80)``.

    Returns:
        A scalar, float32 at least.  A bag without instances has its first term only.
    """
    _check_fields("prediction", prediction, Prediction)
    labels, wrong = _checked_labels(labels, len(prediction.logits), prediction.logits)
    check_number("lambda_", lambda_)
    check_number("omega", omega)
    check_choice("instances", instances, _REDUCTIONS)
    if omega and targets is None:
        raise ValueError(f"omega is the weight of the consistency with targets; got {omega}, targets=None")
    weights = ops.attention_weights(prediction.pooled, offsets, mask=mask)[:, 0]
    (logits,) = _widened(prediction.logits)
    loss = _visible(F.cross_entropy(logits, labels, reduction="none"), wrong)
    if lambda_:
        options = {"mask": mask, "reduction": instances}
        loss = loss + lambda_ * instance_cross_entropy(prediction.pooled.logits, weights, labels, offsets, **options)
    if omega:
        loss = loss + omega * consistency(weights, targets, offsets, mask=mask)
    return loss.mean()


def _clam_terms(
    logits: Tensor, rows: Tensor, labels: Tensor, exclusive: bool, margin: float, temperature: float
) -> Tensor:
    """The instance loss of each bag ``[B]``, of ``logits [B, C, 2, k, 2]`` of instances ``rows [B, K, 2, k]``."""
    (logits,) = _widened(logits)
    there = (rows >= 0).to(logits.dtype)
    side = logits[..., 1] - logits[..., 0]  # [B, C, 2, k]
    of_positive, of_negative = (temperature * F.softplus((margin + s * side) / temperature) for s in (-1, 1))
    most, least = there[:, :, 0], there[:, :, 1]
    inside = (most * of_positive[:, :, 0] + least * of_negative[:, :, 1]).sum(2) / (most + least).sum(2).clamp(min=1)
    of_class = F.one_hot(labels, logits.shape[1]).bool()
    if not exclusive:
        return inside.masked_fill(~of_class, 0).sum(1)
    outside = (most * of_negative[:, :, 0]).sum(2) / most.sum(2).clamp(min=1)
    return torch.where(of_class, inside, outside).mean(1)


def _check_clam(exclusive: bool, margin: float, temperature: float) -> None:
    check_flag("exclusive", exclusive)
    check_number("margin", margin)
    check_number("temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be more than 0; got {temperature}")


def clam_instance_loss(
    x: Tensor | Bags,
    scores: Tensor,
    classifier: Linear,
    labels: Tensor,
    offsets: Tensor | None = None,
    *,
    k: int = 8,
    exclusive: bool = False,
    margin: float = 1.0,
    temperature: float = 1.0,
    embed: Embed | None = None,
    seed: Tensor | int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The loss of CLAM's instance-level clustering (Lu et al. 2021, Methods), for a model of one's own.

    Of the class of a bag the k instances attended most should be positive, and the k attended least negative; if
    classes exclude each other, those that another class attends to most should be negative for it.  An instance costs
    ``t softplus((margin - s) / t)``, s the logit of its side less that of the other: the smooth top-1 SVM loss of two
    classes (Berrada et al. 2018), which the paper has with margin 1 and t = 1.  Margin 0 and t = 1 are the
    cross-entropy, which the authors' code has without ``--inst_loss svm``.

    Args:
        x: instances, ``[N, L]`` or Bags: what the attention pooled, or with ``embed`` what it was made of.
        scores: of the attention, ``[N, 1]``, or ``[N, C]`` with a branch for each class.
        classifier: of the instances, a linear layer ``[2 C, L]``: negative and positive logit of the first class, then
            of the next.
        labels: of the bags, int64 ``[B]``.
        offsets, mask: as in the ops.
        k: instances on each side; B in the paper, 8.
        exclusive: whether classes exclude each other: "subtyping" in the authors' code.
        margin, temperature: of the surrogate, t above 0.
        embed, seed: the layer in front of the pooling, and the seed that it was called with; only the instances
            looked at are embedded again.

    Returns:
        ``[B]``, float32 at least: the mean over the instances of a class and, if ``exclusive``, over classes, as in the
        authors' code.  Of a bag with fewer than k instances all are on both sides.  0 for a bag without instances.

    Raises:
        TypeError, ValueError: arguments of another type or shape, labels that are no classes.  A label on a GPU, which
            is not read, makes its bag's loss NaN instead.

    >>> import torch
    >>> from milkernels import Bags, gated_attention_pool, losses
    >>> bags = Bags.from_list([torch.randn(n, 16) for n in (40, 25)])
    >>> v, u, w, classifier = (torch.nn.Linear(i, o) for i, o in ((16, 8), (16, 8), (8, 1), (16, 6)))
    >>> pooled = gated_attention_pool(bags, v, u, w)
    >>> losses.clam_instance_loss(bags, pooled.scores, classifier, torch.tensor([2, 0])).shape
    torch.Size([2])
    """
    x, offsets, mask = instances_of(x, offsets, mask)
    check_per_row("scores", scores, x)
    check_count("k", k)
    _check_clam(exclusive, margin, temperature)
    width = x.shape[1] if embed is None else checked_embed(embed, x)[0].shape[0]
    weight, bias = as_linear("classifier", classifier, width, x)
    classes = weight.shape[0] // 2
    if weight.shape[0] % 2 or scores.shape[1] not in (1, classes):
        got = f"{weight.shape[0]} rows, {scores.shape[1]} columns of scores"
        raise ValueError(f"classifier must be [2 C, L], and scores [N, 1] or [N, C]; got {got}")
    rows = most_and_least(scores, k, offsets, mask)
    logits = logits_of_rows(x, rows, weight, bias, embed, seed)
    labels, wrong = _checked_labels(labels, len(rows), logits)
    return _visible(_clam_terms(logits, rows, labels, exclusive, margin, temperature), wrong)


def clam_loss(
    prediction: CLAMPrediction,
    labels: Tensor,
    *,
    bag_weight: float = 0.7,
    exclusive: bool = False,
    margin: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """The loss of CLAM (Lu et al. 2021): ``c1 L_bag + c2 L_instance``, the mean over bags.

    Args:
        prediction: what `milkernels.nn.CLAM` returned.
        labels: of the bags, int64 ``[B]``.
        bag_weight: c1, in [0, 1], and c2 is the rest; the authors have 0.7.
        exclusive, margin, temperature: as in `clam_instance_loss`.

    Returns:
        A scalar, float32 at least; the bag's loss is the cross-entropy.

    Raises:
        TypeError, ValueError: as `clam_instance_loss`.

    >>> import torch
    >>> from milkernels import losses, nn
    >>> prediction = nn.CLAM(16, num_classes=2)(torch.randn(40, 16))
    >>> losses.clam_loss(prediction, torch.tensor([1]), exclusive=True).shape
    torch.Size([])
    """
    _check_fields("prediction", prediction, CLAMPrediction)
    labels, wrong = _checked_labels(labels, len(prediction.logits), prediction.logits)
    check_share("bag_weight", bag_weight)
    _check_clam(exclusive, margin, temperature)
    (logits,) = _widened(prediction.logits)
    of_bag = F.cross_entropy(logits, labels, reduction="none")
    options = (labels, exclusive, margin, temperature)
    of_instances = _clam_terms(prediction.instance_logits, prediction.instances, *options)
    return _visible(bag_weight * of_bag + (1 - bag_weight) * of_instances, wrong).mean()


def dsmil_loss(
    prediction: DSMILPrediction, labels: Tensor, streams: str = "both", *, pos_weight: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of DSMIL's streams (Li et al. 2021), the mean over bags and classes.

    Args:
        prediction: what `DSMILModel` returned.
        labels: ``[B, C]`` (``[B]`` where C is 1), between 0 and 1: classes do not exclude each other.
        streams: "both" is the mean of the two streams' losses, as the authors' code has it; "instance" and "bag" are
            one stream's, for training them in turns; "score" is that of ``prediction.logits``, v1, eq. 8.
        pos_weight: of positive labels, as in ``torch.nn.BCEWithLogitsLoss``; the authors' code balances by it.

    Returns:
        A scalar, float32 at least.  Bags without instances have no largest instance and are left out of that stream's
        loss.
    """
    check_choice("streams", streams, ("both", "instance", "bag", "score"))
    _check_fields("prediction", prediction, DSMILPrediction)
    check_dense("labels", labels)
    if labels.is_complex() or labels.is_quantized:
        raise TypeError(f"labels must be real numbers; got {labels.dtype}")
    if pos_weight is not None:
        check_dense("pos_weight", pos_weight)
        if pos_weight.dtype not in DTYPES:
            raise TypeError(f"pos_weight must be float16, bfloat16, float32 or float64; got {pos_weight.dtype}")
    of_both, of_bag, of_instance = _widened(*prediction[:3])
    labels = labels.to(of_bag.dtype)
    labels = labels[:, None] if labels.ndim == 1 and of_bag.shape[1] == 1 else labels
    if labels.shape != of_bag.shape:
        raise ValueError(f"labels must be {list(of_bag.shape)}; got {list(labels.shape)}")
    check_device("labels", labels, of_bag)
    if streams == "score":
        return F.binary_cross_entropy_with_logits(of_both, labels, pos_weight=pos_weight)
    losses = []
    if streams != "instance":
        losses.append(F.binary_cross_entropy_with_logits(of_bag, labels, pos_weight=pos_weight))
    if streams != "bag":
        there = prediction.pooled.values != -torch.inf
        logits = of_instance.masked_fill(~there, 0)
        weights = {"weight": there.to(labels.dtype), "pos_weight": pos_weight}
        terms = F.binary_cross_entropy_with_logits(logits, labels, **weights, reduction="sum")
        losses.append(terms / there.sum().clamp(min=1))
    return sum(losses) / len(losses)
