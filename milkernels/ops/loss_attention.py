"""Loss-based attention (Shi et al. 2020, "Loss-based Attention for Deep Multiple Instance Learning")."""

from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_linear
from milkernels.dtypes import compute_dtype_of, result_dtype, types_of, without_autocast
from milkernels.ops.contract import (
    BAGS,
    EMBED,
    EMBED_INPUTS,
    EMBED_OPTIONS,
    EMBED_SAVES,
    Backward,
    Forward,
    call,
    declare,
    pooled_shapes,
    pooled_width,
)
from milkernels.ops.embedding import Embed, stage_of
from milkernels.ops.segments import Segments
from milkernels.ops.trilinear import linear, masked_scores, pooled_by_softmax, without_masked
from milkernels.ragged import check_bags, checked_mask, for_kernels
from milkernels.results import LossAttentionPooled


def loss_attention_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> LossAttentionPooled:
    """Loss-based attention (Shi et al. 2020, "Loss-based Attention for Deep Multiple Instance Learning"):
    ``scores[i] = log sum_c exp(logits[i, c])`` with ``logits[i] = W x_i + b``.

    ``weight [C, L]`` and ``bias [C]`` (or None) are those of the bag classifier.  Logits may have any spread.
    """
    check_bags(x, offsets)
    stage = stage_of(x, embed, seed)
    check_linear("", weight, bias, stage.width, x)
    mask = checked_mask(mask, x)
    everything = (x, weight, bias, *stage.parameters)
    backend = backends.choose("loss_attention_pool", *everything, requested=backend)
    if backend == "reference":
        pooled = loss_attention_pool_reference(stage.rows(x, mask), weight, bias, offsets, mask, compute_dtype_of(x))
    else:
        inputs = (for_kernels(x), weight, bias, offsets, mask)
        pooled = call("loss_attention_pool", backend, *inputs, embed=stage.arguments)
    return LossAttentionPooled(pooled[0].to(result_dtype(*everything)), *pooled[1:])


# The reference


@without_autocast
def loss_attention_pool_reference(x, weight, bias, offsets, mask, compute_dtype):
    """``(bag, scores, lse, logits)``: the score of an instance is the log-sum-exp of its class logits."""
    acc, product = types_of(compute_dtype, x, weight, bias)
    logits = linear(without_masked(x, mask), weight, bias, product, acc)
    scores = masked_scores(logits.logsumexp(1, keepdim=True), mask)
    bag, lse = pooled_by_softmax(x, scores, Segments(offsets, x))
    return bag.to(result_dtype(x, weight, bias)), scores, lse, masked_scores(logits, mask)


# The contract

declare(
    Forward(
        "loss_attention_pool",
        f"Tensor x, weights[weight bias], {BAGS}, {EMBED}",
        "bag scores lse logits",
        lambda x, weight, offsets, e_weight, **_: (
            *pooled_shapes(x, offsets, 1, pooled_width(x, e_weight)),
            (x.shape[0], weight.shape[0]),
        ),
        Backward(
            "loss_attention_pool",
            inputs="x weight bias" + EMBED_INPUTS,
            saves="x weights[weight bias] offsets? mask? bag scores lse logits" + EMBED_SAVES,
            outputs="bag scores lse logits",
            options=EMBED_OPTIONS,
        ),
    ),
)
