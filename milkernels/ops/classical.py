"""The pooling functions that MIL papers compare with, from before attention: log-sum-exp, noisy-or, ISR and the
generalised mean.  They are compositions of ``milkernels.ops``, whose conventions they keep.

Each pools column by column, ``[N, C]`` to ``[B, C]``, so they serve both ways to use a pooling (Wang et al. 2018,
"Revisiting Multiple Instance Neural Networks"):

>>> import torch
>>> from milkernels import isr_pool, log_sum_exp_pool, generalized_mean_pool, max_pool, mean_pool, noisy_or_pool
>>> x, offsets = torch.randn(7, 16), torch.tensor([0, 3, 7])  # two bags
>>> linear = torch.nn.Linear(16, 1)

*Instance level*: classify each instance, then pool the probabilities (mi-Net).

>>> p = torch.sigmoid(linear(x))  # [N, 1]
>>> for bag in (noisy_or_pool(p, offsets), isr_pool(p, offsets), generalized_mean_pool(p, offsets, r=4),
...             log_sum_exp_pool(p, offsets, r=4), max_pool(p, offsets).values, mean_pool(p, offsets)):
...     assert bag.shape == (2, 1) and 0 < bag.min() and bag.max() < 1

*Embedding level*: pool the features, then classify the bag (MI-Net).

>>> for bag in (log_sum_exp_pool(x, offsets), generalized_mean_pool(x.relu(), offsets),
...             max_pool(x, offsets).values, mean_pool(x, offsets)):
...     assert torch.sigmoid(linear(bag)).shape == (2, 1)

What they share beyond those conventions:

- **Types.**  Computed in float32, float64 for float64; returned in the type of the input.
- **Empty bags** give 0, as in `mean_pool` and `max_pool`.  For noisy-or and ISR that is what the formulas say: where
  there is no instance, none is positive.
- **Domains.**  No op synchronises with a GPU, so values outside of a domain are not found; they give meaningless
  numbers or NaN, in their own bag only.
- **Memory.**  A few temporaries of the size of the input, some kept for the backward: little for the scores or
  probabilities of instances, which have a column per class, but ``N x L`` each for embeddings.
- **Errors.**  TypeError and ValueError name the argument and the value got: types, shapes, devices, offsets, ``r``.
- **Backend.**  ``backend`` is handed to the ops they are made of; ``reference`` is differentiable any number of times.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from milkernels.arguments import check_number
from milkernels.bags import Bags, Parts, instances_of
from milkernels.ops.pooling import max_pool, mean_pool, weighted_pool
from milkernels.ragged import bag_index

__all__ = ["generalized_mean_pool", "isr_pool", "log_sum_exp_pool", "noisy_or_pool"]


def log_sum_exp_pool(
    x: Tensor | Bags | Parts,
    offsets: Tensor | None = None,
    *,
    r: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``1/r log(1/n sum_i exp(r x_i))``, a soft maximum (Ramon & De Raedt 2000, "Multi Instance Neural Networks").

    It goes from the mean to the maximum as r grows.  No size of ``r x`` overflows; the error is about
    ``eps (|x| + 1/r)``.

    Args:
        x: ``[N, C]``, any finite numbers, or `Bags`.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        r: a finite number above 0.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[B, C]`` in the type of ``x``, 0 for an empty bag; differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the ops that this one is made of.

    >>> import torch
    >>> from milkernels import log_sum_exp_pool
    >>> log_sum_exp_pool(torch.tensor([[1.0], [3.0]]), r=100.0)
    tensor([[2.9931]])
    """
    if isinstance(x, Parts):
        return x.run(log_sum_exp_pool, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    check_exponent(r)
    # The result does not depend on what is subtracted, so the maximum needs no gradient.
    top = max_pool(x.detach(), offsets, mask=mask, backend=backend).values.to(_compute_dtype(x))
    below = _without_masked(x - _to_rows(top, offsets, x), mask)
    mean = mean_pool((r * below).exp(), offsets, mask=mask, backend=backend)
    # At least 1/n: the maximum is one of the x.  It is 0 for an empty bag only, where the maximum is 0 too.
    return (top + mean.masked_fill(mean == 0, 1).log() / r).to(x.dtype)


def noisy_or_pool(
    p: Tensor | Bags | Parts, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """``1 - prod_i (1 - p_i)``: the probability that any of independent instances is positive (Maron & Lozano-Perez
    1998, "A Framework for Multiple-Instance Learning"; Viola, Platt, Zhang 2006, "Multiple Instance Boosting for
    Object Detection").

    Precise for small and for large probabilities.  The gradient, the product of the others' ``1 - p``, is right also
    where p is 0 or 1; products are taken by logarithms, so the relative error of a small one is ``eps |log|`` of it.
    (Second derivatives between two instances of p = 1 come as 0.)

    Args:
        p: ``[N, C]``, probabilities in [0, 1], or `Bags`.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[B, C]`` in the type of ``p``, 0 for an empty bag; differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the ops that this one is made of.

    >>> import torch
    >>> from milkernels import noisy_or_pool
    >>> noisy_or_pool(torch.tensor([[0.5], [0.5], [0.0]]))
    tensor([[0.7500]])
    """
    if isinstance(p, Parts):
        return p.run(noisy_or_pool, locals())
    p, offsets, mask = instances_of(p, offsets, mask, "p")
    sure, log_none = _sums(lambda p: torch.log1p(-p), p, offsets, mask, backend)
    none = (1 - sure) * log_none.exp()
    return _complement(none, -torch.expm1(log_none)).to(p.dtype)


def isr_pool(
    p: Tensor | Bags | Parts, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """``s / (1 + s)`` with the summed odds ``s = sum_i p_i / (1 - p_i)``: integrated segmentation and recognition
    (Keeler, Rumelhart, Leow 1991, "Integrated Segmentation and Recognition of Hand-Printed Numerals"; Viola et al.
    2006).

    Precise for small and for large probabilities.  A p of 1 gives 1, with the gradient that the formula tends to: 1
    for that instance and 0 for the others, 0 for all where several are 1.  (Second derivatives between those are 0.)

    Args:
        p: ``[N, C]``, probabilities in [0, 1], or `Bags`.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[B, C]`` in the type of ``p``, 0 for an empty bag; differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the ops that this one is made of.

    >>> import torch
    >>> from milkernels import isr_pool
    >>> isr_pool(torch.tensor([[0.5], [0.5], [0.0]]))
    tensor([[0.6667]])
    """
    if isinstance(p, Parts):
        return p.run(isr_pool, locals())
    p, offsets, mask = instances_of(p, offsets, mask, "p")
    sure, odds = _sums(lambda p: p / (1 - p), p, offsets, mask, backend)
    none = (1 - sure) / (1 + (1 - sure) * odds)
    return _complement(none, odds / (1 + odds)).to(p.dtype)


def generalized_mean_pool(
    x: Tensor | Bags | Parts,
    offsets: Tensor | None = None,
    *,
    r: float = 3.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``(1/n sum_i x_i^r)^(1/r)``, the generalised mean: the mean for r = 1, towards the maximum as r grows (GeM,
    Radenovic, Tolias, Chum 2018, "Fine-tuning CNN Image Retrieval with No Human Annotation").

    Any size of ``x`` and ``r`` is safe, as x is divided by its maximum in the bag.  Where the derivative does not
    exist, in a bag of zeros or for ``x_i = 0`` and r < 1, the gradient is 0 (r = 1 is `mean_pool`).

    Args:
        x: ``[N, C]``, finite numbers from 0 on, or `Bags`.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        r: a finite number above 0.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[B, C]`` in the type of ``x``, 0 for an empty bag; differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the ops that this one is made of.

    >>> import torch
    >>> from milkernels import generalized_mean_pool
    >>> generalized_mean_pool(torch.tensor([[3.0], [4.0]]), r=2.0)
    tensor([[3.5355]])
    """
    if isinstance(x, Parts):
        return x.run(generalized_mean_pool, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    check_exponent(r)
    if r == 1:
        return mean_pool(x, offsets, mask=mask, backend=backend)
    # The result does not depend on what is divided by, so the maximum needs no gradient.
    top = max_pool(x.detach(), offsets, mask=mask, backend=backend).values.to(_compute_dtype(x))
    top = top.masked_fill(top == 0, 1)
    share = _without_masked(x, mask) / _to_rows(top, offsets, x)
    # Powers of 0 are kept out of the graph: their derivatives are 0 or infinite, and 0 * inf is NaN.
    zero = share == 0
    power = share.masked_fill(zero, 1).pow(r).masked_fill(zero, 0)
    mean = mean_pool(power, offsets, mask=mask, backend=backend)
    zero = mean == 0
    return (top * mean.masked_fill(zero, 1).pow(1 / r)).masked_fill(zero, 0).to(x.dtype)


def check_exponent(r: float) -> None:
    check_number("r", r)
    if not 0 < r < math.inf:
        raise ValueError(f"r must be positive and finite; got {r}")


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _without_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """0 in masked rows, so that no product or derivative sees what they hold."""
    return x if mask is None else x.masked_fill(~mask[:, None], 0)


def _to_rows(per_bag: Tensor, offsets: Tensor | None, x: Tensor) -> Tensor:
    """The value of each row's bag, ``[N, C]``, or ``[1, C]`` for one bag."""
    return per_bag if per_bag.shape[0] == 1 else per_bag[bag_index(offsets, x.shape[0])]


def _sums(term: Callable[[Tensor], Tensor], p: Tensor, offsets, mask, backend) -> tuple[Tensor, Tensor]:
    """``(sure, total)`` of each bag: whether a p is 1, and the sum of ``term(p)``, which has a pole there, over the
    other instances.

    The pole is kept out of the sum because its gradient, the product of 0 and infinity, is finite.  ``sure`` is 0 or
    1 and carries it: ``1 - sure`` has the value and the gradient of ``1 - p`` for the one p that is 1.  For two of
    them or more it is constant, as their product is in first order.
    """
    p = _without_masked(p, mask).to(_compute_dtype(p))  # 0 adds nothing to either sum
    ones, certain = p.new_ones((p.shape[0], 1)), p == 1
    sure, total = (
        weighted_pool(rows, ones, offsets, backend=backend)[:, 0]
        for rows in (p.masked_fill(~certain, 0), term(p.masked_fill(certain, 0)))
    )
    return sure.clamp(max=1), total


def _complement(none: Tensor, small: Tensor) -> Tensor:
    """``1 - none``, taken from ``small`` where that is the more precise: no instance of such a bag has p = 1.

    Each side's gradient loses digits where the other one is taken.
    """
    return torch.where(none > 0.5, small, 1 - none)
