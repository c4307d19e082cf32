"""The layer in front of an aggregator: from stored features to the instances that are scored and pooled.

Ops take it as ``embed``.  Instead of ``x_i [L]`` they see ``h_i = drop(act(W x_i + b)) [E]``, which compiled kernels
make tile by tile, and again in the backward those that `saved_bytes` did not let them save.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from milkernels.arguments import check_dense, check_device, check_instances, checked_indices, checked_seed
from milkernels.dtypes import compute_dtype_of, product_dtypes, without_autocast
from milkernels.layers import ACTIVATIONS, Embed, checked_embed
from milkernels.ops.contract import NO_EMBEDDING
from milkernels.ops.dropout import DROP_EMBEDDING, dropout
from milkernels.ops.trilinear import linear, without_masked

__all__ = ["embed_instances"]


class Embedding(NamedTuple):
    """``embed`` of a call, checked."""

    parameters: tuple[Tensor | None, ...]  # weight [E, L] and bias [E] or None; empty where there is no embedding
    arguments: tuple  # as compiled ops take it
    needs: tuple[str, ...] = ("embed",)  # of a backend

    def width(self, x: Tensor) -> int:
        """Numbers of an instance as the op sees it."""
        return self.parameters[0].shape[0] if self.parameters else x.shape[1]

    def instances(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The instances as the op sees them, ``[N, L]`` or ``[N, E]``: what the reference takes."""
        return embedded(x, mask, *self.arguments) if self.parameters else x


_NO_EMBEDDING = Embedding((), NO_EMBEDDING, ())


def embedding_of(
    x: Tensor, embed: Embed | None, seed: Tensor | int | None = None, p_name: str = "dropout_p", p: float = 0.0
) -> tuple[Embedding, Tensor | None]:
    """``embed`` checked, and the seed of the op's own dropout of a share ``p``, None where that drops nothing.

    Both have the same seed and branches of their own in the counter, so they drop independently.
    """
    own = checked_seed(seed, p_name, p, x)
    if embed is None:
        return _NO_EMBEDDING, own
    weight, bias, activation, dropout_p = checked_embed(embed, x)
    seed = checked_seed(seed if own is None else own, "embed.dropout_p", dropout_p, x)
    return Embedding((weight, bias), (weight, bias, seed, activation, dropout_p, compute_dtype_of(x))), own


def embed_instances(x: Tensor, embed: Embed, rows: Tensor, *, seed: Tensor | int | None = None) -> Tensor:
    """Some embedded instances ``h[rows]``, as an op with this ``embed`` and ``seed`` has them: what else reads them, an
    instance loss say, need not have all.

    Args:
        x: ``[N, L]``.
        embed: the layer in front, an `Embed`.
        rows: int64 ``[n]``, rows of ``x``; not the -1 by which other ops say that there is none, as `topk_instances`
            does for k above a bag's length.
        seed: as the op was given; None draws another, so other units are dropped.

    Returns:
        ``[n, E]`` in the type of matrix products; differentiable in ``x`` and the parameters of ``embed``, by PyTorch's
        own operators on every backend.

    Raises:
        ValueError: rows outside of ``[0, N)``, where they can be read without a synchronisation: on the CPU.  On a GPU
            and under tracing NaN takes the place of their instances.

    >>> import torch
    >>> from milkernels import Embed, embed_instances
    >>> x, layer = torch.randn(100, 16), torch.nn.Linear(16, 8)
    >>> embed_instances(x, Embed(layer), torch.tensor([3, 50])).shape
    torch.Size([2, 8])
    """
    check_instances(x)
    weight, bias, activation, dropout_p = checked_embed(embed, x)
    seed = checked_seed(seed, "embed.dropout_p", dropout_p, x)
    check_dense("rows", rows)
    if rows.ndim != 1:
        raise ValueError(f"rows must have 1 dimension; got shape {tuple(rows.shape)}")
    check_device("rows", rows, x)
    rows, wrong = checked_indices("rows", rows, x.shape[0])
    chosen = x.index_select(0, rows)
    h = embedded(chosen, None, weight, bias, seed, activation, dropout_p, compute_dtype_of(x), rows=rows)
    return h if wrong is None else h.masked_fill(wrong[:, None], torch.nan)


@without_autocast
def embedded(x, mask, weight, bias, seed, activation, dropout_p, compute_dtype, rows=None):
    """``drop(act(W x + b))``, in the type of products; ``rows`` says which ones ``x`` holds, None: all of them."""
    acc, product = product_dtypes(compute_dtype, x, (weight, bias))
    h = ACTIVATIONS[activation](linear(without_masked(x, mask), weight, bias, product, acc))
    return dropout(h, dropout_p, seed, DROP_EMBEDDING, rows).to(product)
