"""Loss-based attention (Shi et al. 2020, "Loss-based Attention for Deep Multiple Instance Learning")."""

from torch import Tensor

from milkernels import backends
from milkernels.bags import Bags, Parts, instances_of
from milkernels.dtypes import compute_dtype_of, converted, product_dtypes, result_dtype, without_autocast
from milkernels.layers import Embed, Linear, as_linear
from milkernels.ops.contract import (
    BAGS,
    Backward,
    Forward,
    call,
    declare,
    pooled_shapes,
    pooled_width,
)
from milkernels.ops.embedding import embedding_of
from milkernels.ops.segments import Segments
from milkernels.ops.trilinear import linear, masked_scores, pooled_by_softmax, without_masked
from milkernels.ragged import for_kernels
from milkernels.results import LossAttentionPooled

__all__ = ["loss_attention_pool"]


def loss_attention_pool(
    x: Tensor | Bags | Parts,
    classifier: Linear,
    offsets: Tensor | None = None,
    *,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> LossAttentionPooled:
    """Loss-based attention: ``scores[i] = log sum_c exp(logits[i, c])`` with ``logits[i] = W x_i + b``, their softmax
    inside each bag, and the sum of the instances by these weights (Shi et al. 2020, eqs. 3 and 4).

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        classifier: W ``[C, L]`` and b ``[C]`` of the bag classifier: an ``nn.Linear``, a pair ``(weight, bias or
            None)``, or a weight.  Logits may have any spread.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        seed: of the embedding's dropout, an int64 tensor of one element on the device of ``x`` or an int; None draws
            it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``LossAttentionPooled(bag [B, 1, L], scores [N, 1], lse [B, 1], logits [N, C])``, all differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import loss_attention_pool
    >>> x, offsets, classifier = torch.randn(7, 16), torch.tensor([0, 3, 7]), torch.nn.Linear(16, 2)
    >>> pooled = loss_attention_pool(x, classifier, offsets)
    >>> classifier(pooled.bag[:, 0]).shape  # the logits of the bags
    torch.Size([2, 2])
    """
    if isinstance(x, Parts):
        return x.run(loss_attention_pool, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    embedding, _ = embedding_of(x, embed, seed)
    weights = as_linear("classifier", classifier, embedding.width(x), x)
    tensors = (*weights, *embedding.parameters)
    backend = backends.choose("loss_attention_pool", x, tensors, backend, embedding.needs)
    if backend == "reference":
        instances = embedding.instances(x, mask)
        pooled = loss_attention_pool_reference(instances, *weights, offsets, mask, compute_dtype_of(x))
    else:
        inputs = (for_kernels(x), *weights, offsets, mask)
        pooled = call("loss_attention_pool", backend, *inputs, embed=embedding.arguments)
    bag, scores, lse, logits = pooled
    return LossAttentionPooled(converted(bag, result_dtype(x, tensors)), scores, lse, logits)


# The reference


@without_autocast
def loss_attention_pool_reference(x, weight, bias, offsets, mask, compute_dtype):
    """``(bag, scores, lse, logits)``: the score of an instance is the log-sum-exp of its class logits."""
    acc, product = product_dtypes(compute_dtype, x, (weight, bias))
    logits = linear(without_masked(x, mask), weight, bias, product, acc)
    scores = masked_scores(logits.logsumexp(1, keepdim=True), mask)
    bag, lse = pooled_by_softmax(x, scores, Segments(offsets, x))
    return bag, scores, lse, masked_scores(logits, mask)


# The contract

declare(
    Forward(
        "loss_attention_pool",
        f"Tensor x, weights[weight bias], {BAGS}",
        "bag scores lse logits",
        lambda x, weight, offsets, e_weight, **_: (
            *pooled_shapes(x, offsets, 1, pooled_width(x, e_weight)),
            (x.shape[0], weight.shape[0]),
        ),
        Backward(
            "loss_attention_pool",
            inputs="x weight bias",
            saves="x weights[weight bias] offsets? mask? bag scores lse logits",
            outputs="bag scores lse logits",
            embeds=True,
            keeps=True,
        ),
    ),
    triton="pooling",
)
