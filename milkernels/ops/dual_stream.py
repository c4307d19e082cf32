"""DSMIL (Li, Li, Eliceiri 2021, "Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification
with Self-supervised Contrastive Learning").
"""

import torch
from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_choice, check_linear, check_number, check_per_row
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
    num_bags,
    pooled_shapes,
    pooled_width,
)
from milkernels.ops.dropout import DROP_VALUE, dropout
from milkernels.ops.embedding import ACTIVATIONS, Embed, stage_of
from milkernels.ops.segments import INF, Segments, gather, rows_at
from milkernels.ops.trilinear import Score, dead_rows, linear, masked_scores, pooled_by_softmax, without_masked
from milkernels.ragged import check_bags, checked_mask, for_kernels
from milkernels.results import DSMIL, DSMILPooled, InstanceMax


def instance_max(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> InstanceMax:
    """The first stream of DSMIL: ``logits[i] = W x_i + b``, and their maximum in each bag and class.

    ``weight [C, L]``, ``bias [C]`` or None.  ``values`` of an empty bag are -inf; a logit of -inf is never
    picked.  The gradient of a value goes to the instance at its index.
    """
    check_bags(x, offsets)
    stage = stage_of(x, embed, seed)
    check_linear("", weight, bias, stage.width, x)
    mask = checked_mask(mask, x)
    backend = backends.choose("instance_max", x, weight, bias, *stage.parameters, requested=backend)
    if backend == "reference":
        h = stage.rows(x, mask)
        return InstanceMax(*instance_max_reference(h, weight, bias, offsets, mask, compute_dtype_of(x)))
    inputs = (for_kernels(x), weight, bias, offsets, mask)
    return InstanceMax(*call("instance_max", backend, *inputs, embed=stage.arguments))


def dsmil_pool(
    x: Tensor,
    instance_logits: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    q2_weight: Tensor | None = None,
    q2_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    v_activation: str | None = None,
    v_dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> DSMILPooled:
    """The second stream of DSMIL: ``scores[i, c] = scale <q(x_i), q(x_m)>``, m the critical instance of bag
    and class, and ``bag[b, c] = sum_i softmax(scores[i, c]) v(x_i)``.

    Args:
        instance_logits: ``[N, C]``; their largest in a bag and class is the critical instance.  No gradient.
            A class without one, where all are -inf, pools nothing, as an empty bag.
        q_weight, q_bias: ``[Q, L]``, ``[Q]`` or None: ``q(x) = W x + b``.
        q2_weight, q2_bias: ``[Q2, Q]``, ``[Q2]`` or None.  If given, ``q(x) = tanh(W2 relu(W x + b) + b2)``.
        v_weight, v_bias, v_activation: ``[Lv, L]``, ``[Lv]`` or None, an activation or None:
            ``v(x) = act(V drop(x) + b_V)``; without ``v_weight`` it is ``x``.
        v_dropout_p: the share of the units of V's input that is dropped, in [0, 1].
        scale: None is ``Q ** -0.5`` (of the last layer), as the authors ship it; the paper (v1, eq. 5) has 1.
    """
    check_bags(x, offsets)
    check_per_row("instance_logits", instance_logits, x)
    parameters = (q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias)
    stage, options = _dsmil_options(x, parameters, mask, seed, v_activation, v_dropout_p, scale, embed)
    everything = (*parameters, *stage.parameters)
    backend = backends.choose("dsmil_pool", x, instance_logits, *everything, requested=backend)
    if backend == "reference":
        h = stage.rows(x, options[0])
        bag, scores, lse, critical = _dsmil_reference(h, instance_logits, parameters, offsets, options)
    else:
        inputs = (for_kernels(x), instance_logits.detach(), *parameters, offsets, *options)
        bag, scores, lse, critical, _ = call("dsmil_pool", backend, *inputs, embed=stage.arguments)
    return DSMILPooled(bag.to(result_dtype(x, *everything)), scores, lse, critical)


def dsmil(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_weight: Tensor,
    q_bias: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    q2_weight: Tensor | None = None,
    q2_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    v_activation: str | None = None,
    v_dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> DSMIL:
    """Both streams of DSMIL (eqs. 3 to 7): `instance_max` of ``weight`` and ``bias``, and `dsmil_pool` of its logits.

    The same numbers as these two in turn, whose arguments and results it has; its backward writes the gradient
    of ``x`` once, where two ops would write one each and have them added.
    """
    check_bags(x, offsets)
    parameters = (q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias)
    stage, options = _dsmil_options(x, parameters, mask, seed, v_activation, v_dropout_p, scale, embed)
    check_linear("", weight, bias, stage.width, x)
    everything = (*parameters, *stage.parameters)
    backend = backends.choose("dsmil", x, weight, bias, *everything, requested=backend)
    if backend == "reference":
        h = stage.rows(x, options[0])
        values, _, logits = instance_max_reference(h, weight, bias, offsets, options[0], options[-1])
        bag, *rest = *_dsmil_reference(h, logits.detach(), parameters, offsets, options), values, logits
    else:
        inputs = (for_kernels(x), weight, bias, *parameters, offsets, *options)
        bag, *rest, _ = call("dsmil", backend, *inputs, embed=stage.arguments)
    return DSMIL(bag.to(result_dtype(x, *everything)), *rest)


def _dsmil_options(x, parameters, mask, seed, v_activation, v_dropout_p, scale, embed):
    """``(stage, the arguments that follow parameters and offsets)``, checked."""
    q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias = parameters
    stage = stage_of(x, embed, seed, "v_dropout_p", v_dropout_p)
    check_linear("q_", q_weight, q_bias, stage.width, x)
    if q2_weight is not None:
        check_linear("q2_", q2_weight, q2_bias, q_weight.shape[0], x)
    elif q2_bias is not None:
        raise ValueError("q2_bias needs q2_weight; got None")
    if v_weight is not None:
        check_linear("v_", v_weight, v_bias, stage.width, x)
    elif v_bias is not None or v_activation is not None or v_dropout_p:
        raise ValueError("v_bias, v_activation and v_dropout_p need v_weight; got None")
    if v_activation is not None:
        check_choice("v_activation", v_activation, ACTIVATIONS)
    if scale is not None:
        check_number("scale", scale)
    return stage, (checked_mask(mask, x), stage.seed, v_activation, v_dropout_p, scale, compute_dtype_of(x))


def _dsmil_reference(x, logits, parameters, offsets, options):
    mask, seed, v_activation, *rest = options
    query, value = parameters[:4], (*parameters[4:], v_activation)
    return dsmil_pool_reference(x, logits, query, value, offsets, mask, seed, *rest)


# The reference


@without_autocast
def instance_max_reference(x, weight, bias, offsets, mask, compute_dtype):
    """``(values, indices, logits)``: the largest logit of each bag and class, and the row that has it."""
    acc, product = types_of(compute_dtype, x, weight, bias)
    logits = masked_scores(linear(without_masked(x, mask), weight, bias, product, acc), mask)
    indices = Segments(offsets, x).first_max(logits, logits == -INF)
    return gather(logits, indices, -INF), indices, logits


@without_autocast
def dsmil_pool_reference(x, instance_logits, query, value, offsets, mask, seed, v_dropout_p, scale, compute_dtype):
    """``(bag, scores, lse, critical)``: the second stream of DSMIL.

    ``query`` is (q_weight, q_bias, q2_weight, q2_bias), linear where q2_weight is None; ``value`` is
    (v_weight, v_bias, v_activation), ``x`` itself where v_weight is None.
    """
    q_weight, q_bias, q2_weight, q2_bias = query
    acc, product = types_of(compute_dtype, x, instance_logits, *query, *value[:2])
    segments, dead = Segments(offsets, x), dead_rows(mask)
    logits = masked_scores(instance_logits, mask)
    critical = segments.first_max(logits, logits == -INF)
    instances = rows_at(x, critical)
    if q2_weight is None:
        # Absorbed: <Wq x + bq, q> = <x, Wq^T q> + <bq, q>.
        q = linear(instances, q_weight, q_bias, acc, acc)
        scores = Score.of(x, q @ q_weight.to(acc), dead, segments.index)
        if q_bias is not None:
            scores = scores + segments.to_rows(q @ q_bias.to(acc))
    else:

        def mlp(rows):
            hidden = torch.relu(linear(rows, q_weight, q_bias, product, acc))
            return torch.tanh(linear(hidden, q2_weight, q2_bias, product, acc))

        scores = Score.of(mlp(without_masked(x, mask)), mlp(instances), dead, segments.index)
    if scale is None:
        scale = (q_weight if q2_weight is None else q2_weight).shape[0] ** -0.5
    scores = masked_scores(scores * scale, mask).masked_fill(segments.to_rows(critical < 0), -INF)
    dropped = dropout(x, v_dropout_p, seed, DROP_VALUE)
    bag, lse = _value_pool(dropped, scores, segments, mask, *value, product)
    return bag.to(result_dtype(x, *query, *value[:2])), scores, lse, critical


def _value_pool(x, scores, segments, mask, v_weight, v_bias, v_activation, product) -> tuple[Tensor, Tensor]:
    """``(bag, lse)`` of the values ``act(V x + b_V)``."""
    acc = scores.dtype
    if v_weight is not None and v_activation not in (None, "identity"):
        values = linear(without_masked(x, mask), v_weight, v_bias, product, acc)
        return pooled_by_softmax(ACTIVATIONS[v_activation](values), scores, segments)
    bag, lse = pooled_by_softmax(x, scores, segments)
    if v_weight is not None:
        # Folded: the weights sum to 1, so the linear value is taken of the pooled vector.
        bag = linear(bag, v_weight, v_bias, acc, acc).masked_fill((lse == -INF)[:, :, None], 0)
    return bag, lse


def _dsmil_shapes(x, classes, v_weight, v_activation, offsets, e_weight):
    width = pooled_width(x, e_weight)
    bag, scores, lse = pooled_shapes(x, offsets, classes, width if v_weight is None else v_weight.shape[0])
    # Saved for the backward: what is pooled before a linear value is taken of it, if that is another vector.
    folded = v_weight is not None and v_activation in (None, "identity")
    return bag, scores, lse, lse, ((*lse, width) if folded else (0,))


def _both_streams(x, bag, scores, lse, critical, pooled):
    return bag, scores, lse, critical, lse, scores, pooled


# The contract

_SECOND = "q_weight q_bias q2_weight q2_bias v_weight v_bias"  # the weights of the second stream
_DSMIL = f"{BAGS}, Tensor? seed, str? v_activation, float v_dropout_p, float? scale, ScalarType? compute_dtype, {EMBED}"
_DSMIL_OPTIONS = (
    *("str? v_activation", "float v_dropout_p", "float? scale", "ScalarType? compute_dtype"),
    *EMBED_OPTIONS,
)

declare(
    Forward(
        "instance_max",
        f"Tensor x, weights[weight bias], {BAGS}, {EMBED}",
        "values indices logits",
        lambda x, weight, offsets, **_: (*[(num_bags(offsets), weight.shape[0])] * 2, (x.shape[0], weight.shape[0])),
        Backward(
            "instance_max",
            inputs="x weight bias" + EMBED_INPUTS,
            saves="x weights[weight bias] offsets? mask? indices logits" + EMBED_SAVES,
            outputs="values logits",
            options=EMBED_OPTIONS,
        ),
        indices="indices",
    ),
    Forward(
        "dsmil_pool",
        f"Tensor x, Tensor instance_logits, weights[{_SECOND}], {_DSMIL}",
        "bag scores lse critical pooled",
        lambda x, instance_logits, v_weight, v_activation, offsets, e_weight, **_: _dsmil_shapes(
            x, instance_logits.shape[1], v_weight, v_activation, offsets, e_weight
        ),
        Backward(
            "dsmil_pool",
            inputs=f"x {_SECOND}" + EMBED_INPUTS,
            saves=f"x weights[{_SECOND}] offsets? mask? seed? bag scores lse critical pooled" + EMBED_SAVES,
            options=_DSMIL_OPTIONS,
            outputs="bag scores lse",
        ),
        indices="critical",
    ),
    Forward(
        "dsmil",
        f"Tensor x, weights[weight bias {_SECOND}], {_DSMIL}",
        "bag scores lse critical values logits pooled",
        lambda x, weight, v_weight, v_activation, offsets, e_weight, **_: _both_streams(
            x, *_dsmil_shapes(x, weight.shape[0], v_weight, v_activation, offsets, e_weight)
        ),
        Backward(
            "dsmil",
            inputs=f"x weight bias {_SECOND}" + EMBED_INPUTS,
            saves=f"x weights[weight bias {_SECOND}] offsets? mask? seed? bag scores lse critical logits pooled"
            + EMBED_SAVES,
            options=_DSMIL_OPTIONS,
            outputs="bag scores lse values logits",
        ),
        indices="critical",
    ),
)
