"""Attention pooling, plain and gated (Ilse, Tomczak, Welling 2018, "Attention-based Deep Multiple Instance
Learning")."""

import torch
from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_choice, check_instances, check_linear, check_shape
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
from milkernels.ops.dropout import DROP_ACTIVATION, DROP_SIGMOID, dropout
from milkernels.ops.embedding import ACTIVATIONS, Embed, stage_of
from milkernels.ops.segments import Segments
from milkernels.ops.trilinear import linear, masked_scores, pooled_by_softmax, without_masked
from milkernels.ragged import check_bags, checked_mask, for_kernels
from milkernels.results import Pooled


def attention_pool(
    x: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    offsets: Tensor | None = None,
    *,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Attention pooling: ``scores[i, k] = w_k . act(V x_i + b_V) + c_k`` (Ilse et al. 2018, eq. 8).

    Args:
        v_weight, v_bias: V ``[D, L]``, b_V ``[D]`` or None.
        w_weight, w_bias: w ``[K, D]``, c ``[K]`` or None.
        activation: tanh, relu, gelu (exact) or identity.
        dropout_p: the share of hidden units that is dropped, in [0, 1].
    """
    parameters = (v_weight, v_bias, None, None, w_weight, w_bias)
    return _attention_pool(x, parameters, False, offsets, mask, seed, activation, dropout_p, embed, backend)


def gated_attention_pool(
    x: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    offsets: Tensor | None = None,
    *,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Gated attention pooling: ``scores[i, k] = w_k . (act(V x_i + b_V) * sigmoid(U x_i + b_U)) + c_k``
    (Ilse et al. 2018, eq. 9; Lu et al. 2021, CLAM).

    Args:
        u_weight, u_bias: U ``[D, L]``, b_U ``[D]`` or None; the rest as in `attention_pool`.
        dropout_p: drops units of both branches, independently, as CLAM does.
    """
    parameters = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    return _attention_pool(x, parameters, True, offsets, mask, seed, activation, dropout_p, embed, backend)


def attention_scores(
    x: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    *,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores ``[N, K]`` of `attention_pool`."""
    parameters = (v_weight, v_bias, None, None, w_weight, w_bias)
    return _attention_scores(x, parameters, False, mask, seed, activation, dropout_p, embed, backend)


def gated_attention_scores(
    x: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    u_weight: Tensor,
    u_bias: Tensor | None,
    w_weight: Tensor,
    w_bias: Tensor | None,
    *,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores ``[N, K]`` of `gated_attention_pool`."""
    parameters = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    return _attention_scores(x, parameters, True, mask, seed, activation, dropout_p, embed, backend)


def _attention_options(x, parameters, gated, mask, seed, activation, dropout_p, embed):
    """``(stage, the arguments that follow parameters and offsets)``, checked."""
    v_weight, v_bias, u_weight, u_bias, w_weight, w_bias = parameters
    stage = stage_of(x, embed, seed, "dropout_p", dropout_p)
    check_linear("v_", v_weight, v_bias, stage.width, x)
    hidden = v_weight.shape[0]
    if gated:
        check_shape("u_weight", u_weight, (hidden, stage.width), x)
        if u_bias is not None:
            check_shape("u_bias", u_bias, (hidden,), x)
    check_linear("w_", w_weight, w_bias, hidden, x)
    check_choice("activation", activation, ACTIVATIONS)
    return stage, (checked_mask(mask, x), stage.seed, activation, float(dropout_p), compute_dtype_of(x))


def _attention_pool(x, parameters, gated, offsets, mask, seed, activation, dropout_p, embed, requested) -> Pooled:
    check_bags(x, offsets)
    stage, options = _attention_options(x, parameters, gated, mask, seed, activation, dropout_p, embed)
    everything = (x, *parameters, *stage.parameters)
    backend = backends.choose("attention_pool", *everything, requested=requested)
    if backend == "reference":
        pooled = attention_pool_reference(stage.rows(x, options[0]), *parameters, offsets, *options)
    else:
        inputs = (for_kernels(x), *parameters, offsets, *options)
        pooled = call("attention_pool", backend, *inputs, embed=stage.arguments)
    bag, scores, lse = pooled
    return Pooled(bag.to(result_dtype(*everything)), scores, lse)


def _attention_scores(x, parameters, gated, mask, seed, activation, dropout_p, embed, requested) -> Tensor:
    check_instances(x)
    stage, options = _attention_options(x, parameters, gated, mask, seed, activation, dropout_p, embed)
    backend = backends.choose("attention_scores", x, *parameters, *stage.parameters, requested=requested)
    if backend == "reference":
        return attention_scores_reference(stage.rows(x, options[0]), *parameters, *options)
    inputs = (for_kernels(x), *parameters, None, *options)
    return call("attention_scores", backend, *inputs, embed=stage.arguments)


# The reference


@without_autocast
def attention_scores_reference(
    x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, seed, activation, dropout_p, compute_dtype
):
    """``w (act(V x + b_V) * sigmoid(U x + b_U)) + c``; without U the sigmoid is left out."""
    acc, product = types_of(compute_dtype, x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    x = without_masked(x, mask)
    gate = ACTIVATIONS[activation](linear(x, v_weight, v_bias, product, acc))
    gate = dropout(gate, dropout_p, seed, DROP_ACTIVATION)
    if u_weight is not None:
        sigmoid = torch.sigmoid(linear(x, u_weight, u_bias, product, acc))
        gate = gate * dropout(sigmoid, dropout_p, seed, DROP_SIGMOID)
    return masked_scores(linear(gate, w_weight, w_bias, acc, acc), mask)


@without_autocast
def attention_pool_reference(x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, *options):
    """``(bag, scores, lse)`` for the scores of `attention_scores`, which takes the options."""
    parameters = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    scores = attention_scores_reference(x, *parameters, *options)
    bag, lse = pooled_by_softmax(x, scores, Segments(offsets, x))
    return bag.to(result_dtype(x, *parameters)), scores, lse


# The contract

_WEIGHTS = "weights[v_weight v_bias u_weight u_bias w_weight w_bias]"
_ATTENTION = (
    f"Tensor x, {_WEIGHTS}, {BAGS}, Tensor? seed, str activation, float dropout_p, ScalarType? compute_dtype, {EMBED}"
)
_ATTENTION_BACKWARD = Backward(
    "attention",
    inputs="x v_weight v_bias u_weight u_bias w_weight w_bias" + EMBED_INPUTS,
    saves=f"x {_WEIGHTS} offsets? mask? seed? bag? scores lse?" + EMBED_SAVES,
    options=("str activation", "float dropout_p", "ScalarType? compute_dtype", *EMBED_OPTIONS),
    outputs="bag scores lse",
)
declare(
    Forward(
        "attention_pool",
        _ATTENTION,
        "bag scores lse",
        lambda x, w_weight, offsets, e_weight, **_: pooled_shapes(
            x, offsets, w_weight.shape[0], pooled_width(x, e_weight)
        ),
        _ATTENTION_BACKWARD,
    ),
    Forward(
        "attention_scores",
        _ATTENTION,
        "scores",
        lambda x, w_weight, **_: ((x.shape[0], w_weight.shape[0]),),
        _ATTENTION_BACKWARD,
    ),
)
