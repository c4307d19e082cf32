"""Self-attention inside each bag, in the memory of its instances."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from milkernels import _torch
from milkernels.arguments import check_choice, check_count
from milkernels.bags import Bags, Parts
from milkernels.dtypes import without_autocast
from milkernels.nn.models import check_feature_type
from milkernels.nn.pools import Instances, ragged

KERNELS = ("dot", "gaussian", "inverse_quadratic", "laplace")
_AT_ONCE = 2**21  # scores: 8 MB of float32


class SelfAttention(nn.Module):
    """Self-attention of the instances of a bag (Rymarczyk et al. 2021), to be followed by a pooling.

    ``h_i = x_i + gamma sum_j softmax_j(s(q(x_i), k(x_j))) v(x_j)``, over the instances j of the bag of i, where q, k
    and v are linear layers and s is, by the name of the kernel,

    - "dot": ``q . k`` (SA-AbMILP);
    - "gaussian": ``exp(-alpha |q - k|^2)`` (GSA);
    - "inverse_quadratic": ``1 / (alpha |q - k|^2 + 1)`` (IQSA);
    - "laplace": ``-sum_c |q_c - k_c|`` (LSA).

    Every instance is compared with every other: time grows with the square of the bag.  Memory does not: forward and
    backward compare some instances at a time with their whole bag, and the backward compares them again.

    Args:
        in_dim: L, features of an instance.
        kernel: one of the above.
        key_dim: of q and k; None is ``max(1, in_dim // 8)``, as the authors have it.
        factory: device and dtype.

    Attributes:
        query, key, value: ``torch.nn.Linear``.
        gamma: a number, at first 0, so that training begins with the instances as they are.
        alpha: a number, at first 1, of which the positive part counts; only of "gaussian" and "inverse_quadratic".

    ``forward(x, offsets=None, mask=None)`` takes bags in any form but a `StreamedBag`, and returns them as `Bags` of
    ``values [N, L]``, with the same offsets, mask and extras.  Masked rows are not compared with any, and are 0.
    Results are those of the linear layers' type; scores and sums are float32 at least.  It cannot be differentiated
    twice. ``torch.compile`` breaks its graph here; ``torch.export`` and ``torch.jit.trace`` refuse it.

    >>> import torch
    >>> from milkernels import Bags
    >>> from milkernels.nn import AttentionPool, SelfAttention
    >>> bags = Bags.from_list([torch.randn(n, 64) for n in (40, 25)])
    >>> AttentionPool(64)(SelfAttention(64, "laplace")(bags)).bag.shape
    torch.Size([2, 1, 64])
    """

    def __init__(self, in_dim: int, kernel: str = "dot", key_dim: int | None = None, **factory: Any):
        super().__init__()
        check_count("in_dim", in_dim)
        check_choice("kernel", kernel, KERNELS)
        key_dim = max(1, in_dim // 8) if key_dim is None else key_dim
        check_count("key_dim", key_dim)
        self.in_dim, self.kernel = in_dim, kernel
        self.query, self.key = (nn.Linear(in_dim, key_dim, **factory) for _ in range(2))
        self.value = nn.Linear(in_dim, in_dim, **factory)
        self.gamma = nn.Parameter(torch.zeros((), **factory))
        scaled = kernel in ("gaussian", "inverse_quadratic")
        self.register_parameter("alpha", nn.Parameter(torch.ones((), **factory)) if scaled else None)

    def forward(self, x: Instances, offsets: Tensor | None = None, mask: Tensor | None = None) -> Bags:
        if isinstance(x, Parts):
            raise TypeError(f"x must have all instances at hand, each is compared with all; got {type(x).__name__}")
        if torch.jit.is_tracing():
            raise RuntimeError("SelfAttention takes bag after bag in Python: a trace would keep the sizes of this one")
        extras = x.extras if isinstance(x, Bags) else None
        bags = Bags(*ragged(x, offsets, mask, self.in_dim), extras)
        check_feature_type(bags.values, self.query)
        real = bags.compact()
        x, offsets = real.values, real.offsets
        attended = attend(self.query(x), self.key(x), self.value(x), self.alpha, self.kernel, offsets)
        h = x + self.gamma * attended
        if bags.mask is not None:
            h = h.new_zeros(bags.values.shape).index_copy(0, bags.mask.nonzero().squeeze(1), h)
        return Bags(h, bags.offsets, bags.mask, extras)

    def extra_repr(self) -> str:
        return f"in_dim={self.in_dim}, kernel={self.kernel!r}"


@without_autocast
def attend(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, kernel: str, offsets: Tensor) -> Tensor:
    """``[N, L]``, of the type of v: the values of each bag, weighted for each of its queries.

    ``q, k [N, Q]``, ``v [N, L]``, ``offsets [B + 1]``; alpha is a number.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    alpha = alpha if alpha is None else alpha.to(wide)
    return _Attend.apply(q.to(wide), k.to(wide), v.to(wide), alpha, kernel, offsets.tolist()).to(v.dtype)


_torch.run_by_python(attend)


def _chunks(bounds: list[int]) -> Iterator[tuple[slice, slice]]:
    """Queries, few enough that their scores are `_AT_ONCE` at most, and their bag."""
    for start, end in itertools.pairwise(bounds):
        size = max(1, _AT_ONCE // max(1, end - start))
        for first in range(start, end, size):
            yield slice(first, min(first + size, end)), slice(start, end)


def _scores(q: Tensor, k: Tensor, alpha: Tensor | None, kernel: str) -> Tensor:
    if kernel == "dot":
        return q @ k.T
    if kernel == "laplace":
        return -torch.cdist(q, k, 1.0)
    # Norms and products cancel in the distance of near neighbours, so they are float64.
    norms = q.double().square().sum(1, keepdim=True) + k.double().square().sum(1)
    far = alpha.relu() * torch.addmm(norms, q.double(), k.double().T, alpha=-2).clamp(min=0).to(q.dtype)
    return (-far).exp() if kernel == "gaussian" else 1 / (far + 1)


class _Attend(torch.autograd.Function):
    """Of a chunk of queries at a time, whose scores the backward computes again."""

    @staticmethod
    def forward(ctx, q, k, v, alpha, kernel, bounds):
        ctx.save_for_backward(q, k, v, alpha)
        ctx.kernel, ctx.bounds = kernel, bounds
        out = torch.empty_like(v)
        for rows, bag in _chunks(bounds):
            torch.mm(_scores(q[rows], k[bag], alpha, kernel).softmax(1), v[bag], out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, alpha = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (q, k, v))
        grad_alpha = None if alpha is None else torch.zeros_like(alpha)
        for rows, bag in _chunks(ctx.bounds):
            leaves = [t.detach().requires_grad_() for t in (q[rows], k[bag], *([] if alpha is None else [alpha]))]
            with torch.enable_grad():
                scores = _scores(*leaves[:2], leaves[2] if len(leaves) == 3 else None, ctx.kernel)
            weights = scores.detach().softmax(1)
            grad_v[bag].addmm_(weights.T, grad[rows])
            of_weights = grad[rows] @ v[bag].T
            of_scores = weights * (of_weights - (of_weights * weights).sum(1, keepdim=True))
            of_q, of_k, *of_alpha = torch.autograd.grad(scores, leaves, of_scores)
            grad_q[rows] = of_q
            grad_k[bag] += of_k
            if of_alpha:
                grad_alpha += of_alpha[0]
        return grad_q, grad_k, grad_v, grad_alpha, None, None
