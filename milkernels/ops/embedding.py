"""The instance stage: a layer in front of an aggregator, from stored features to what is scored and pooled."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from milkernels.arguments import (
    check_choice,
    check_dense,
    check_device,
    check_instances,
    check_linear,
    check_share,
    checked_indices,
    checked_seed,
)
from milkernels.dtypes import compute_dtype_of, types_of, without_autocast
from milkernels.ops.contract import NO_EMBEDDING
from milkernels.ops.dropout import DROP_EMBEDDING, dropout
from milkernels.ops.trilinear import linear, without_masked

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}


class InstanceEmbedding(NamedTuple):
    """The layer in front of an aggregator, ``h_i = drop(act(W x_i + b))``, which ops take as ``embed``.

    CLAM, MIL-Lab, TRIDENT and slideflow call it fc, patch_embed, pre_attention_layers, encoder.
    """

    weight: Tensor  # [E, L]
    bias: Tensor | None = None  # [E]
    activation: str = "relu"  # tanh, relu, gelu (exact) or identity
    dropout_p: float = 0.0  # the share of the E units that is dropped, in [0, 1]


Embed = InstanceEmbedding | tuple | None


class Stage(NamedTuple):
    """What is scored and pooled: the instances as they are, or their embedding."""

    embedding: InstanceEmbedding | None
    width: int  # of an instance as the op sees it
    seed: Tensor | None  # of the op's own dropout
    arguments: tuple = NO_EMBEDDING  # as compiled ops take the embedding

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return () if self.embedding is None else self.embedding[:2]

    def rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What the reference takes for ``x``."""
        return x if self.embedding is None else embedded(x, mask, *self.arguments)


def stage_of(x: Tensor, embed: Embed, seed: Tensor | int | None = None, p_name: str = "dropout_p", p=0.0) -> Stage:
    """``p`` is the share of the op's own dropout, which has the same seed."""
    if embed is None:
        return Stage(None, x.shape[1], checked_seed(seed, p_name, p, x))
    embed = _checked_embedding(embed, x)
    own = checked_seed(seed, p_name, p, x)
    seed = checked_seed(seed if own is None else own, "embed.dropout_p", embed.dropout_p, x)
    arguments = (embed.weight, embed.bias, seed, embed.activation, float(embed.dropout_p), compute_dtype_of(x))
    return Stage(embed, embed.weight.shape[0], own, arguments)


def _checked_embedding(embed: Embed, x: Tensor) -> InstanceEmbedding:
    fields = InstanceEmbedding._fields
    if not isinstance(embed, tuple | list) or not 1 <= len(embed) <= len(fields):
        got = f"{len(embed)} values" if isinstance(embed, tuple | list) else type(embed).__name__
        raise TypeError(f"embed must be an InstanceEmbedding, ({', '.join(fields)}); got {got}")
    embed = InstanceEmbedding(*embed)
    check_linear("embed.", embed.weight, embed.bias, x.shape[1], x)
    check_choice("embed.activation", embed.activation, ACTIVATIONS)
    check_share("embed.dropout_p", embed.dropout_p)
    return embed


def embed_instances(x: Tensor, embed: Embed, rows: Tensor, *, seed: Tensor | int | None = None) -> Tensor:
    """Some embedded instances ``h[rows]``, as an op with this ``embed`` and ``seed`` has them: what else reads them, an
    instance loss say, need not have all.

    Args:
        x: ``[N, L]``.
        rows: int64 ``[n]``, rows of ``x``; not the -1 by which other ops say that there is none, as `topk_instances`
            does for k above a bag's length.
        seed: as the op was given; None draws another, so other units are dropped.

    Returns:
        ``[n, E]`` in the type of matrix products; differentiable in ``x`` and the parameters of ``embed``, by PyTorch's
        own operators on every backend.

    Raises:
        ValueError: rows outside of ``[0, N)``, where they can be read without a synchronisation: on the CPU.  On a GPU
            and under tracing NaN takes the place of their instances.
    """
    check_instances(x)
    stage = stage_of(x, _checked_embedding(embed, x), seed)
    check_dense("rows", rows)
    if rows.ndim != 1:
        raise ValueError(f"rows must have 1 dimension; got shape {tuple(rows.shape)}")
    check_device("rows", rows, x)
    rows, wrong = checked_indices("rows", rows, x.shape[0])
    h = embedded(x.index_select(0, rows), None, *stage.arguments, rows=rows)
    return h if wrong is None else h.masked_fill(wrong[:, None], torch.nan)


@without_autocast
def embedded(x, mask, weight, bias, seed, activation, dropout_p, compute_dtype, rows=None):
    """The instance stage, ``drop(act(W x + b))``, in the type of products; ``rows`` says which ones ``x`` holds."""
    acc, product = types_of(compute_dtype, x, weight, bias)
    h = ACTIVATIONS[activation](linear(without_masked(x, mask), weight, bias, product, acc))
    return dropout(h, dropout_p, seed, DROP_EMBEDDING, rows).to(product)
