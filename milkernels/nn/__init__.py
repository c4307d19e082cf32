"""Modules: the parameters of ``milkernels.ops``, and small complete models made of them.

Every ``forward(x, offsets=None, mask=None)`` takes bags in any of these forms, and copies none of them:

- `Bags`; then ``offsets`` and ``mask`` are None, as the bags have their own.
- ``x [N, L]`` with ``offsets [B + 1]``, or without: one bag.  ``mask [N]`` or None.
- Padded ``x [B, M, L]`` with ``mask [B, M]``, non-zero = real, or None: all are.  ``offsets`` is None.
- A jagged nested tensor ``[B, ragged, L]``; ``offsets`` and ``mask`` are None.
- A `StreamedBag`, which is read in pieces, with ``offsets`` and ``mask`` of all rows, or without.

A list of bags becomes one by ``Bags.from_list``.  Results are those of the ops, with their conventions: a field with a
row per instance has one per row of the flattened batch, padding included.

>>> import torch
>>> from milkernels import Bags, attention_weights
>>> from milkernels.nn import ABMIL, AttentionPool
>>> bags = Bags.from_list([torch.randn(5, 512), torch.randn(9, 512)])
>>> pooled = AttentionPool(512, heads=2)(bags)
>>> pooled.bag.shape, attention_weights(pooled, bags.offsets).shape
(torch.Size([2, 2, 512]), torch.Size([14, 2]))
>>> ABMIL(512, num_classes=3)(bags).logits.shape
torch.Size([2, 3])

**Embedding.**  `AttentionPool`, `DSMIL` and `LossAttention` take ``embed``, an `Embed`, as their ops do:
the layer in front of them, whose width is their ``in_dim`` then and whose ``dropout_p`` acts as given.  The models hand
the last Linear, ReLU and Dropout of their ``embed`` over so; where one of these was replaced or has hooks they call it.

**Ranks.**  The poolings, `ABMIL`, `DSMILModel` and `LossAttentionModel` take ``group``, the processes of
``torch.distributed`` over which the instances of each bag are spread: see `milkernels.distributed`.

**Parameters** are created and initialised as those of ``torch.nn.Linear``, and ``device`` and ``dtype`` mean the same.
**Dropout** acts in training mode only; its seeds come from PyTorch's default generator, so ``manual_seed`` repeats it.
**Errors** are TypeError and ValueError that name the argument and the value got.  Constructors raise them for a size
below 1, an unknown choice, a share outside of [0, 1] and an option without what it is for; ``forward`` for bags in none
of these forms or of another width, and for what the ops check.
"""

from milkernels.nn.models import (
    ABMIL,
    CLAM,
    CLAMPrediction,
    DSMILModel,
    DSMILPrediction,
    EmbeddingPooling,
    InstancePooling,
    InstancePrediction,
    LossAttentionModel,
    MINet,
    MiNet,
    MINetDS,
    MINetRC,
    Prediction,
    SidePrediction,
)
from milkernels.nn.pools import DSMIL, AttentionPool, LossAttention, MaxPool, MeanPool, SoftmaxPool
from milkernels.nn.self_attention import SelfAttention

__all__ = [
    "ABMIL",
    "CLAM",
    "DSMIL",
    "AttentionPool",
    "CLAMPrediction",
    "DSMILModel",
    "DSMILPrediction",
    "EmbeddingPooling",
    "InstancePooling",
    "InstancePrediction",
    "LossAttention",
    "LossAttentionModel",
    "MINet",
    "MINetDS",
    "MINetRC",
    "MaxPool",
    "MeanPool",
    "MiNet",
    "Prediction",
    "SelfAttention",
    "SidePrediction",
    "SoftmaxPool",
]
