"""The backward of a softmax pooling, which every op that pools shares, and gradients in the types of their inputs."""

import torch
from torch import Tensor

from milkernels.triton import pool, rows
from milkernels.triton.call import Call


class PoolGradients:
    """The gradient of the ``scores`` [N, K], and the ``weights`` [N, K] by which rows get that of their ``bag``, None
    where they are not wanted or the bag vectors [B, K, L] have no gradient.

    ``x`` are the rows that were pooled; without it, `add` takes them slice by slice.
    """

    def __init__(self, call: Call, x, scores, bag, grad_bag, grad_scores, grad_lse, *, weights: bool):
        self.call, self.given = call, scores
        self.bag, self.grad_scores, self.grad_lse = call.take(grad_bag), call.take(grad_scores), call.take(grad_lse)
        self.centre = self.shift = None
        self.pooled = self.bag is not None or self.grad_lse is not None
        self.weights = call.empty(*scores.shape) if weights and self.bag is not None else None
        if not self.pooled:
            self.scores = alive(self.grad_scores, scores)
            return
        self.scores = call.empty(*scores.shape)
        self.terms = pool.softmax_terms(call, scores)
        if self.bag is not None:
            self.centre, self.shift = _centred(bag, self.bag)
        if x is not None:
            self.add(x, call.whole)

    def add(self, x: Tensor, block: slice) -> None:
        """The slice's rows, which ``x`` holds."""
        if not self.pooled:
            return
        da = None
        if self.bag is not None:
            # It is overwritten where it stands.
            da = rows.products(self.call, x, self.bag, centre=self.centre, rows=block, out=self.scores)
        rows.gradients_of_scores(
            self.call, self.given, self.terms, da, self.shift, self.grad_lse, self.grad_scores,
            out=self.scores, weights=self.weights, rows=block,
        )  # fmt: skip

    def of_vectors(self, x: Tensor, sums: Tensor | None = None) -> Tensor:
        """``sum_i gradient[i, k] x_i`` [B, K, L], the gradient of vectors that scores are products with; ``sums`` are
        those of ``x - centre`` if they are known.

        The gradients of a bag's scores sum to that of its lse and those of the scores themselves: what rounding makes
        of them beyond that is an error that all rows share, and is large where features have a mean.
        """
        if self.centre is None:
            return pool.weighted_sums(self.call, x, self.scores)
        if sums is None:
            sums = pool.weighted_sums(self.call, x, self.scores, self.centre)
        total = self.grad_lse
        if self.grad_scores is not None:
            given = pool.column_sums(self.call, alive(self.grad_scores, self.given))
            total = given if total is None else total + given
        if total is None:
            return sums
        # A head without a living row has no lse.
        total = total.masked_fill(self.given_none(), 0)
        return sums + total[..., None] * self.centre[:, None]

    def given_none(self) -> Tensor:
        """[B, K]: no row is alive."""
        return self.terms[1] == 0

    def bag_of(self, weights: Tensor | None) -> Tensor | None:
        return None if weights is None else self.bag


def _centred(bag: Tensor, grad_bag: Tensor) -> tuple[Tensor, Tensor]:
    """``(c [B, L], <bag - c, grad_bag> [B, K])``: the gradient of a score is  a (<x - c, grad> - <bag - c, grad>)  for
    any c; near the bag vectors it keeps the digits of features with a mean."""
    centre = bag.mean(1).nan_to_num(0, 0, 0)
    return centre, ((bag - centre[:, None]) * grad_bag).sum(-1)


def alive(gradient: Tensor, values: Tensor) -> Tensor:
    """0 where a score or logit is -inf."""
    return gradient.masked_fill(values == float("-inf"), 0)


def power_of_two_scale(bound: Tensor, headroom: int = 0) -> Tensor:
    """What gradients of at most ``bound`` are multiplied by so that the largest come to about 2^12 in float16, or to
    ``headroom`` bits less: at N = 100k most of them would be 0 there otherwise. A power of two, which costs no digit;
    on the device, so that nothing waits."""
    exponent = (12 - headroom - bound.log2().ceil()).clamp(-40, 100)
    return torch.where(bound > 0, exponent.exp2(), 1.0)


def largest(t: Tensor) -> Tensor:
    """The largest finite size; 0 of nothing."""
    return t.nan_to_num(0, 0, 0).abs().amax() if t.numel() else t.new_zeros(())


def in_their_types(call: Call, inputs, found, needs) -> tuple[Tensor, ...]:
    """Each gradient that is wanted in the type of its input, in memory of its own; empty ones for the others."""

    def own(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        gradient = gradient.to(dtype).contiguous()
        whole = gradient.untyped_storage().nbytes() == gradient.numel() * gradient.itemsize
        return gradient if whole else gradient.clone()

    return tuple(
        own(gradient, like.dtype) if need else call.x.new_empty(0)
        for like, gradient, need in zip(inputs, found, needs, strict=True)
    )
