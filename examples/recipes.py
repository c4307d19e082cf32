"""The models of the papers, what each is trained on, and how.

A `Recipe` makes a model for features of a given width, and its loss; `Settings` are those of the optimiser.  Labels are
0 or 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from examples import eager
from examples.self_attention import SelfAttentionABMIL
from milkernels import Bags, attention_weights
from milkernels.losses import WeightEnsemble, dsmil_loss, loss_attention_loss, ramp_up
from milkernels.nn import ABMIL, DSMILModel, EmbeddingPooling, InstancePooling, LossAttentionModel, MINetDS, MINetRC


class Batch(NamedTuple):
    bags: Bags
    labels: Tensor  # int64 [B]
    keys: Sequence[int]  # of the bags, in the data set
    pos_weight: Tensor | None = None  # of positive bags, in a binary cross-entropy


Loss = Callable[[Any, Batch, int], Tensor]  # of (prediction, batch, epoch)
Stages = list[tuple[list[nn.Parameter], Loss]]


@dataclass(frozen=True)
class Settings:
    """Adam's, and for how long."""

    lr: float = 1e-3
    weight_decay: float = 1e-3
    epochs: int = 40
    bags: int = 16  # per step
    betas: tuple[float, float] = (0.9, 0.999)
    cosine: bool = False  # the learning rate goes to 0 along half a cosine
    balanced: bool = False  # positive bags weigh as much as negative ones
    shuffled: bool = True  # bags come in another order in every epoch


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Attributes:
        source: paper and equation.
        model: of the features' width.
        stages: of the model: what is optimised on which loss, one after the other in each mini-batch.
        scores: of a prediction: logits of "positive" ``[B]``.  The first is the model's; others, by name, are further
            lines of the table, such as one of its streams alone.
        settings: the published ones, if there are any.
        eager: the same model as it is usually written, of one bag: see `examples.eager`.
    """

    source: str
    model: Callable[[int], nn.Module]
    stages: Callable[[nn.Module], Stages]
    scores: dict[str, Callable[[Any], Tensor]]
    settings: Settings | None = None
    eager: Callable[..., tuple[Tensor, Tensor]] | None = None


def _bag(prediction) -> Tensor:
    return prediction.logits[:, 0]


def _two_classes(prediction) -> Tensor:
    return prediction.logits[:, 1] - prediction.logits[:, 0]


def _bce(prediction, batch: Batch, epoch: int) -> Tensor:
    labels = batch.labels.to(prediction.logits.dtype)
    return F.binary_cross_entropy_with_logits(prediction.logits[:, 0], labels, pos_weight=batch.pos_weight)


def _at_once(loss: Loss) -> Callable[[nn.Module], Stages]:
    return lambda model: [(list(model.parameters()), loss)]


# Attention, and pooling without any


def attention(widths: Sequence[int] | None, dropout: float, *, gated: bool, hidden: int = 64) -> Recipe:
    def make(width: int) -> nn.Module:
        model = ABMIL(width, 1, widths, hidden, gated=gated, dropout=dropout)
        model.attention.dropout = 0.0  # CLAM drops hidden units of the attention too, these papers do not
        return model

    return Recipe(f"Ilse et al. 2018, eq. {9 if gated else 8}", make, _at_once(_bce), {"": _bag}, eager=eager.attention)


def pooling(level: type, widths: Sequence[int] | None, dropout: float, name: str) -> Recipe:
    def make(width: int) -> nn.Module:
        return level(width, 1, widths or (), name, dropout=dropout if widths else 0.0)

    return Recipe("Wang et al. 2018", make, _at_once(_bce), {"": _bag})


def multi_level(kind: type, widths: Sequence[int], dropout: float) -> Recipe:
    """MI-Net with deep supervision, trained on the sum of its classifiers' losses, or with residual connections."""

    def loss(prediction, batch: Batch, epoch: int) -> Tensor:
        sides = prediction.side_logits[..., 0]
        labels = batch.labels.to(sides.dtype)[:, None].expand_as(sides)
        return F.binary_cross_entropy_with_logits(sides, labels, pos_weight=batch.pos_weight) * sides.shape[1]

    def make(width: int) -> nn.Module:
        return kind(width, 1, widths, dropout=dropout)

    return Recipe("Wang et al. 2018", make, _at_once(loss if kind is MINetDS else _bce), {"": _bag})


def self_attention(widths: Sequence[int] | None, dropout: float, kernel: str = "dot") -> Recipe:
    def make(width: int) -> nn.Module:
        return SelfAttentionABMIL(width, 1, widths, dropout=dropout if widths else 0.0, kernel=kernel)

    return Recipe("Rymarczyk et al. 2021", make, _at_once(_bce), {"": _bag})


# DSMIL

_ALONE = "instance classifier alone"


def _streams(which: str) -> Loss:
    def loss(prediction, batch: Batch, epoch: int) -> Tensor:
        return dsmil_loss(prediction, batch.labels, which, pos_weight=batch.pos_weight)

    return loss


def dsmil() -> Recipe:
    """The model that its authors ship, without an embedding, and how they train it: both streams at once."""
    settings = Settings(2e-4, 5e-3, 40, 1, (0.5, 0.9), cosine=True, balanced=True)
    return Recipe(
        "Li et al. 2021, as shipped",
        lambda width: DSMILModel(width, 1),
        _at_once(_streams("both")),
        {"": lambda p: p.bag_logits[:, 0], _ALONE: lambda p: p.instance_logits[:, 0]},
        settings,
        eager.dsmil,
    )


def dsmil_v1(widths: Sequence[int] | None, dropout: float) -> Recipe:
    """As in the first version of the paper, the two streams trained in turns."""

    def make(width: int) -> nn.Module:
        options = {"nonlinear_query": False, "value": "linear", "scale": 1.0, "dropout": dropout if widths else 0.0}
        return DSMILModel(width, 1, widths, **options)

    def in_turns(model: nn.Module) -> Stages:
        shared = list(model.embed.parameters())
        first = [model.streams.weight, model.streams.bias]
        known = {id(p) for p in (*shared, *first)}
        rest = [p for p in model.parameters() if id(p) not in known]
        return [(shared + first, _streams("instance")), (shared + rest, _streams("bag"))]

    scores = {"": _bag, _ALONE: lambda p: p.instance_logits[:, 0]}
    return Recipe("Li et al. 2021, v1, eqs. 3-8", make, in_turns, scores)


# Loss-Attention


def loss_attention(
    widths: Sequence[int] | None,
    dropout: float,
    settings: Settings,
    lambda_: float,
    *,
    instances: str = "sum",
    omega: float = 0.0,
    ramp: float = 40.0,
) -> Recipe:
    """``omega`` is the peak of the consistency's weight, reached after ``ramp`` epochs; 0 where the paper has 0."""

    def stages(model: nn.Module) -> Stages:
        ensemble = WeightEnsemble()

        def loss(prediction, batch: Batch, epoch: int) -> Tensor:
            offsets, options = batch.bags.offsets, {"lambda_": lambda_, "instances": instances}
            if omega:
                weights = attention_weights(prediction.pooled, offsets)
                options |= {"targets": ensemble.targets(batch.keys, weights, offsets)}
                options |= {"omega": ramp_up(epoch, ramp, omega)}
                ensemble.update(batch.keys, weights, offsets)
            return loss_attention_loss(prediction, batch.labels, offsets, **options)

        return [(list(model.parameters()), loss)]

    def make(width: int) -> nn.Module:
        return LossAttentionModel(width, 2, widths or (), dropout=dropout if widths else 0.0)

    alone = partial(eager.loss_attention, lambda_=lambda_) if instances == "sum" and not omega else None
    source = f"Shi et al. 2020, eqs. 5-{7 if omega else 6}"
    return Recipe(source, make, stages, {"": _two_classes}, settings, alone)


# The tables


def minets(dropout: float) -> dict[str, Recipe]:
    """The widths of the paper."""
    deep, residual = (256, 128, 64), (128, 128, 128)
    return {
        "MI-Net with DS": multi_level(MINetDS, deep, dropout),
        "MI-Net with RC": multi_level(MINetRC, residual, dropout),
    }


_POOLINGS = ("max", "mean", "log_sum_exp", "generalized_mean", "noisy_or", "isr")


def poolings(widths: Sequence[int] | None, dropout: float, names: Sequence[str] = _POOLINGS) -> dict[str, Recipe]:
    made = {f"instance+{name}": pooling(InstancePooling, widths, dropout, name) for name in names}
    levels = {f"embedding+{name}": pooling(EmbeddingPooling, widths, dropout, name) for name in names}
    return made | {key: r for key, r in levels.items() if key.split("+")[1] in EmbeddingPooling.POOLINGS}
