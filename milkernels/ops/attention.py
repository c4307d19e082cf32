"""Attention pooling, plain and gated (Ilse, Tomczak, Welling 2018, "Attention-based Deep Multiple Instance
Learning")."""

import torch
from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_choice
from milkernels.bags import Bags, Parts, instances_of
from milkernels.dtypes import compute_dtype_of, converted, product_dtypes, result_dtype, without_autocast
from milkernels.layers import ACTIVATIONS, Embed, Linear, as_linear
from milkernels.ops.contract import (
    BAGS,
    Backward,
    Forward,
    call,
    declare,
    pooled_shapes,
    pooled_width,
)
from milkernels.ops.dropout import DROP_ACTIVATION, DROP_SIGMOID, dropout
from milkernels.ops.embedding import embedding_of
from milkernels.ops.segments import Segments
from milkernels.ops.trilinear import linear, masked_scores, pooled_by_softmax, without_masked
from milkernels.ragged import for_kernels
from milkernels.results import Pooled

__all__ = ["attention_pool", "attention_scores", "gated_attention_pool", "gated_attention_scores"]


def attention_pool(
    x: Tensor | Bags | Parts,
    v: Linear,
    w: Linear,
    offsets: Tensor | None = None,
    *,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Attention pooling: ``scores[i, k] = w_k . act(V x_i + b_V) + c_k``, their softmax inside each bag, and the sum of
    the instances by these weights (Ilse et al. 2018, eqs. 7 and 8).

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        v: V ``[D, L]`` and b_V ``[D]``: an ``nn.Linear``, a pair ``(weight, bias or None)``, or a weight.
        w: w ``[K, D]`` and c ``[K]``, likewise.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        activation: tanh, relu, gelu (exact) or identity.
        dropout_p: the share of hidden units that is dropped, in [0, 1].
        seed: of that dropout and the embedding's, an int64 tensor of one element on the device of ``x`` or an int; None
            draws it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``Pooled(bag [B, K, L], scores [N, K], lse [B, K])``, all differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import attention_pool
    >>> x, offsets = torch.randn(7, 16), torch.tensor([0, 3, 7])  # two bags
    >>> pooled = attention_pool(x, torch.nn.Linear(16, 8), torch.nn.Linear(8, 1), offsets)
    >>> pooled.bag.shape, pooled.scores.shape
    (torch.Size([2, 1, 16]), torch.Size([7, 1]))
    """
    if isinstance(x, Parts):
        return x.run(attention_pool, locals())
    return _pool(False, x, v, None, w, offsets, activation, dropout_p, seed, embed, mask, backend)


def gated_attention_pool(
    x: Tensor | Bags | Parts,
    v: Linear,
    u: Linear,
    w: Linear,
    offsets: Tensor | None = None,
    *,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Gated attention pooling: ``scores[i, k] = w_k . (act(V x_i + b_V) * sigmoid(U x_i + b_U)) + c_k``, their softmax
    inside each bag, and the sum of the instances by these weights (Ilse et al. 2018, eqs. 7 and 9; Lu et al. 2021,
    CLAM).

    Heads with layers of their own (TRIDENT) are one call: V and U concatenated, w block-diagonal.

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        v: V ``[D, L]`` and b_V ``[D]``: an ``nn.Linear``, a pair ``(weight, bias or None)``, or a weight.
        u: U ``[D, L]`` and b_U ``[D]``, likewise.
        w: w ``[K, D]`` and c ``[K]``, likewise.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        activation: tanh, relu, gelu (exact) or identity.
        dropout_p: the share of hidden units that is dropped, in [0, 1]; of both branches
            independently, as CLAM does.
        seed: of that dropout and the embedding's, an int64 tensor of one element on the device of ``x`` or an int; None
            draws it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``Pooled(bag [B, K, L], scores [N, K], lse [B, K])``, all differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import gated_attention_pool
    >>> x, offsets = torch.randn(7, 16), torch.tensor([0, 3, 7])  # two bags
    >>> v, u, w = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8), torch.nn.Linear(8, 1)
    >>> pooled = gated_attention_pool(x, v, u, w, offsets)
    >>> pooled.bag.shape
    torch.Size([2, 1, 16])
    """
    if isinstance(x, Parts):
        return x.run(gated_attention_pool, locals())
    return _pool(True, x, v, u, w, offsets, activation, dropout_p, seed, embed, mask, backend)


def attention_scores(
    x: Tensor | Bags | Parts,
    v: Linear,
    w: Linear,
    *,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores of `attention_pool`, ``w_k . act(V x_i + b_V) + c_k`` (Ilse et al. 2018, eq. 8), for what is pooled by
    another op or changed in between: ``attention_pool(x, ...) = softmax_pool(x, attention_scores(x, ...))``.

    Args:
        x: ``[N, L]``, or `Bags`; an instance's score does not depend on its bag.
        v, w: V ``[D, L]`` and w ``[K, D]`` with their biases, as in `attention_pool`.
        activation: tanh, relu, gelu (exact) or identity.
        dropout_p: the share of hidden units that is dropped, in [0, 1].
        seed: of that dropout and the embedding's, an int64 tensor of one element on the device of ``x`` or an int; None
            draws it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[N, K]`` in float32, float64 if any input is; -inf for masked instances.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in `attention_pool`.

    >>> import torch
    >>> from milkernels import attention_scores
    >>> attention_scores(torch.randn(7, 16), torch.nn.Linear(16, 8), torch.nn.Linear(8, 2)).shape
    torch.Size([7, 2])
    """
    if isinstance(x, Parts):
        return x.run(attention_scores, locals())
    return _scores(False, x, v, None, w, activation, dropout_p, seed, embed, mask, backend)


def gated_attention_scores(
    x: Tensor | Bags | Parts,
    v: Linear,
    u: Linear,
    w: Linear,
    *,
    activation: str = "tanh",
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores of `gated_attention_pool`, ``w_k . (act(V x_i + b_V) * sigmoid(U x_i + b_U)) + c_k`` (Ilse et al.
    2018, eq. 9).

    Args:
        x: ``[N, L]``, or `Bags`; an instance's score does not depend on its bag.
        v, u, w: V and U ``[D, L]`` and w ``[K, D]`` with their biases, as in `gated_attention_pool`.
        activation: tanh, relu, gelu (exact) or identity.
        dropout_p: the share of hidden units that is dropped, in [0, 1]; of both branches
            independently.
        seed: of that dropout and the embedding's, an int64 tensor of one element on the device of ``x`` or an int; None
            draws it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``[N, K]`` in float32, float64 if any input is; -inf for masked instances.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in `attention_pool`.

    >>> import torch
    >>> from milkernels import gated_attention_scores
    >>> v, u, w = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8), torch.nn.Linear(8, 1)
    >>> gated_attention_scores(torch.randn(7, 16), v, u, w).shape
    torch.Size([7, 1])
    """
    if isinstance(x, Parts):
        return x.run(gated_attention_scores, locals())
    return _scores(True, x, v, u, w, activation, dropout_p, seed, embed, mask, backend)


def _pool(gated, x, v, u, w, offsets, activation, dropout_p, seed, embed, mask, requested) -> Pooled:
    x, offsets, mask = instances_of(x, offsets, mask)
    embedding, seed = embedding_of(x, embed, seed, "dropout_p", dropout_p)
    weights = _weights(gated, x, v, u, w, embedding.width(x), activation)
    tensors = (*weights, *embedding.parameters)
    backend = backends.choose("attention_pool", x, tensors, requested, embedding.needs)
    options = (mask, seed, activation, float(dropout_p), compute_dtype_of(x))
    if backend == "reference":
        bag, scores, lse = attention_pool_reference(embedding.instances(x, mask), *weights, offsets, *options)
    else:
        bag, scores, lse = call(
            "attention_pool", backend, for_kernels(x), *weights, offsets, *options, embed=embedding.arguments
        )
    return Pooled(converted(bag, result_dtype(x, tensors)), scores, lse)


def _scores(gated, x, v, u, w, activation, dropout_p, seed, embed, mask, requested) -> Tensor:
    x, _, mask = instances_of(x, None, mask)
    embedding, seed = embedding_of(x, embed, seed, "dropout_p", dropout_p)
    weights = _weights(gated, x, v, u, w, embedding.width(x), activation)
    tensors = (*weights, *embedding.parameters)
    backend = backends.choose("attention_scores", x, tensors, requested, embedding.needs)
    options = (mask, seed, activation, float(dropout_p), compute_dtype_of(x))
    if backend == "reference":
        return attention_scores_reference(embedding.instances(x, mask), *weights, *options)
    return call("attention_scores", backend, for_kernels(x), *weights, None, *options, embed=embedding.arguments)


def _weights(gated: bool, x: Tensor, v: Linear, u: Linear | None, w: Linear, width: int, activation: str) -> tuple:
    """Weights and biases of V, of U (None where it is not ``gated``) and of w, checked, and so is the activation."""
    v_weight, v_bias = as_linear("v", v, width, x)
    hidden = v_weight.shape[0]
    u_weight, u_bias = as_linear("u", u, width, x, hidden) if gated else (None, None)
    w_weight, w_bias = as_linear("w", w, hidden, x)
    check_choice("activation", activation, ACTIVATIONS)
    return v_weight, v_bias, u_weight, u_bias, w_weight, w_bias


# The reference


@without_autocast
def attention_scores_reference(
    x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, mask, seed, activation, dropout_p, compute_dtype
):
    """``w (act(V x + b_V) * sigmoid(U x + b_U)) + c``; without U the sigmoid is left out."""
    weights = (v_weight, v_bias, u_weight, u_bias, w_weight, w_bias)
    acc, product = product_dtypes(compute_dtype, x, weights)
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
    return bag, scores, lse


# The contract


def _hidden(v_weight, u_weight, **_):
    return (v_weight.shape[0] * (1 if u_weight is None else 2),)


_WEIGHTS = "weights[v_weight v_bias u_weight u_bias w_weight w_bias]"
_ATTENTION = f"Tensor x, {_WEIGHTS}, {BAGS}, Tensor? seed, str activation, float dropout_p, ScalarType? compute_dtype"
_ATTENTION_BACKWARD = Backward(
    "attention",
    inputs="x v_weight v_bias u_weight u_bias w_weight w_bias",
    saves=f"x {_WEIGHTS} offsets? mask? seed? bag? scores lse?",
    options=("str activation", "float dropout_p", "ScalarType? compute_dtype"),
    outputs="bag scores lse",
    embeds=True,
    keeps=True,
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
        hidden=_hidden,
    ),
    Forward(
        "attention_scores",
        _ATTENTION,
        "scores",
        lambda x, w_weight, **_: ((x.shape[0], w_weight.shape[0]),),
        _ATTENTION_BACKWARD,
        hidden=_hidden,
    ),
    triton="attention",
)
