"""Training on ragged mini-batches of whole bags, and the same one bag at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from examples.recipes import Batch, Recipe, Settings
from milkernels import Bags

# How a training step goes through its bags.
WAYS = {
    "ragged": "all bags of a mini-batch in one call",
    "loop": "the same mini-batches, one bag at a time in eager PyTorch",
    "upstream": "one bag at a time in eager PyTorch, and a step for each",
}


def seeded(seed: int) -> torch.Generator:
    """Seeds PyTorch, for parameters and dropout; the generator is for the order of the bags."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


class _Optimiser:
    """Adam for each stage of a recipe."""

    def __init__(self, recipe: Recipe, model: nn.Module, settings: Settings):
        self.stages = []
        for parameters, loss in recipe.stages(model):
            options = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
            adam = torch.optim.Adam(parameters, **options, fused=True)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.epochs) if settings.cosine else None
            self.stages.append((loss, adam, cosine))

    def ragged(self, model: nn.Module, batch: Batch, epoch: int) -> None:
        for loss, adam, _ in self.stages:
            model.zero_grad(set_to_none=True)
            loss(model(batch.bags), batch, epoch).backward()
            adam.step()

    def one_by_one(self, recipe: Recipe, model: nn.Module, bags: list[Tensor], labels: Tensor, pos_weight) -> None:
        """The gradient of the same loss as the one stage has, a bag at a time."""
        ((_, adam, _),) = self.stages
        model.zero_grad(set_to_none=True)
        for x, label in zip(bags, labels, strict=True):
            _, loss = recipe.eager(model, x, label, pos_weight)
            (loss / len(labels)).backward()
        adam.step()

    def end_of_epoch(self) -> None:
        for _, _, cosine in self.stages:
            if cosine is not None:
                cosine.step()


def fit(
    recipe: Recipe,
    settings: Settings,
    bags: Bags,
    labels: Tensor,
    seed: int,
    *,
    way: str = "ragged",
    epochs: int | None = None,
    after_epoch: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """The trained model, in evaluation mode.

    Args:
        recipe, settings: what is trained, and how.
        bags, labels: the training set; labels int64 ``[B]``.
        seed: of parameters, dropout and the order of the bags.
        way: one of `WAYS`.
        epochs: when to stop; None is the end of the settings' schedule.
        after_epoch: called with the model in evaluation mode.
    """
    generator = seeded(seed)
    model = recipe.model(bags.values.shape[1]).to(bags.values.device)
    optimiser = _Optimiser(recipe, model, settings)
    pos_weight = (labels == 0).sum() / (labels == 1).sum().clamp(min=1) if settings.balanced else None
    alone, size = list(bags), 1 if way == "upstream" else settings.bags  # views
    for epoch in range(settings.epochs if epochs is None else epochs):
        model.train()
        if settings.shuffled or epoch == 0:
            order = torch.randperm(len(labels), generator=generator).tolist()
        for first in range(0, len(order), size):
            keys = order[first : first + size]
            if way == "ragged":
                optimiser.ragged(model, Batch(bags[keys], labels[keys], keys, pos_weight), epoch)
            else:
                optimiser.one_by_one(recipe, model, [alone[key] for key in keys], labels[keys], pos_weight)
        optimiser.end_of_epoch()
        model.eval()
        after_epoch(model)
    return model.eval()


@torch.no_grad()
def predict(recipe: Recipe, model: nn.Module, bags: Bags, *, way: str = "ragged", size: int = 256) -> dict[str, Tensor]:
    """Logits of "positive" of all bags, float64 on the CPU, by the names of the recipe's scores."""
    parts: dict[str, list[Tensor]] = {name: [] for name in recipe.scores}
    for first in range(0, len(bags), size):
        some = bags[first : first + size]
        if way == "ragged":
            prediction = model(some)
            for name, score in recipe.scores.items():
                parts[name].append(score(prediction))
        else:
            label = torch.zeros((), dtype=torch.int64, device=bags.values.device)
            parts[next(iter(parts))].append(torch.stack([recipe.eager(model, x, label)[0] for x in some]))
    return {name: torch.cat(scores).double().cpu() for name, scores in parts.items() if scores}


def error_and_loss(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The share of wrong bags at probability 1/2, and the binary cross-entropy."""
    labels = labels.double().cpu()
    wrong = (logits > 0) != (labels > 0.5)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return wrong.double().mean().item(), loss.item()


def folds(labels: Tensor, count: int, seed: int) -> Sequence[tuple[list[int], list[int]]]:
    """Stratified: (training bags, test bags) of each fold."""
    from sklearn.model_selection import StratifiedKFold

    split = StratifiedKFold(count, shuffle=True, random_state=seed).split(torch.zeros(len(labels), 1), labels.cpu())
    return [(train.tolist(), test.tolist()) for train, test in split]
