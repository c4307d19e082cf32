"""The ops: score each instance, softmax the scores inside its bag, sum the instances by their weights.

Conventions of all of them:

- **Bags.**  ``x [N, L]`` holds the instances of all bags back to back.  ``offsets [B + 1]``, int32 or int64
  on the device of ``x``, starts at 0, never decreases and ends at N.  Bag b is
  ``x[offsets[b]:offsets[b + 1]]`` and may be empty.  ``offsets=None`` is one bag.  Offsets on the CPU are
  checked; elsewhere and under tracing wrong offsets give wrong numbers.
- **Mask.**  ``mask [N]``, bool or 0/1 of any type, non-zero = real.  A masked instance has weight 0,
  gradient 0 and scores or logits of -inf, whatever its row holds, NaN included.  A given score of -inf
  means the same for one head.  Other values in a floating-point mask, such as the 0 and -inf of one that
  is added to scores, are an error on the CPU; elsewhere they are not read, and count as real.
- **Empty bags**, and bags with every row masked: ``bag`` 0, ``lse`` -inf, indices -1.  Nothing becomes NaN.
- **Indices** are rows of ``x`` (int64), -1 for none.  The lowest index wins a tie; NaN beats every number.
- **Types.**  ``x`` is float16, bfloat16, float32 or float64; so are parameters, of the same type or another.
  Matrix products run in the type of ``x``, of autocast where it is on, or in a wider one: a CPU without units
  for a half type multiplies in float32.  ``scores``, ``lse`` and ``logits`` come in float32 (float64 if any
  input is), ``bag`` in the promoted type of ``x`` and the parameters.  Gradients come in each tensor's own type.
- **Layout.**  The rows of ``x`` may have any stride from L on; other layouts are copied by compiled kernels.
- **Embedding.**  ``embed`` is the layer in front of the aggregator, an `InstanceEmbedding` or a tuple ``(weight [E, L],
  bias, activation, dropout_p)``: instead of ``x_i`` the op takes ``h_i = drop(act(W x_i + b))``, in the type of matrix
  products, and L is E for all its other arguments and results.  Compiled kernels make ``h`` tile by tile, again in the
  backward, and never store it; `embed_instances` gives some of its rows.
- **Dropout.**  ``seed`` is an int64 tensor of one element on the device of ``x``, or an int; None draws it
  from PyTorch's default generator of that device.  The same seed drops the same units on every backend.
- **Backend.**  ``backend`` is auto, native, triton or reference; None is what ``use_backend`` or
  ``MILKERNELS_BACKEND`` says, auto otherwise.  ``auto`` takes a compiled kernel if one serves the call,
  else the reference; a backend asked for by name serves the call or raises RuntimeError.
- **Transforms.**  Compiled kernels are differentiable once, in reverse mode, by autograd; they work under
  ``torch.compile``, ``torch.export``, ``vmap`` and batched gradients.  Where torch.func (grad, vjp, jvp, jacrev,
  jacfwd, hessian) or forward mode differentiates by an argument, in a jit trace and in an export to ONNX, ``auto``
  takes the reference, which can do all of it, and is differentiable any number of times.
- **Errors.**  TypeError and ValueError name the argument and the value got.  No op synchronises with a GPU.
"""

from torch import Tensor

from milkernels import backends, ops, reference
from milkernels.arguments import (
    check_choice,
    check_count,
    check_flag,
    check_instances,
    check_linear,
    check_number,
    check_per_row,
    check_shape,
)
from milkernels.bags import check_offsets, checked_mask
from milkernels.embedding import Embed, Stage, compute_dtype_of, stage_of
from milkernels.results import (
    DSMIL,
    DSMILPooled,
    InstanceMax,
    LossAttentionPooled,
    MaxPooled,
    Pooled,
    TopInstances,
)


def _check_bags(x: Tensor, offsets: Tensor | None) -> None:
    check_instances(x)
    if offsets is not None:
        check_offsets(offsets, x.shape[0], x.device)


def _for_kernels(x: Tensor) -> Tensor:
    """``x`` with rows that kernels can read: unit stride inside, no overlap between."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


# Attention (Ilse, Tomczak, Welling 2018, "Attention-based Deep Multiple Instance Learning")


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
    check_choice("activation", activation, reference.ACTIVATIONS)
    return stage, (checked_mask(mask, x), stage.seed, activation, float(dropout_p), compute_dtype_of(x))


def _attention_pool(x, parameters, gated, offsets, mask, seed, activation, dropout_p, embed, requested) -> Pooled:
    _check_bags(x, offsets)
    stage, options = _attention_options(x, parameters, gated, mask, seed, activation, dropout_p, embed)
    everything = (x, *parameters, *stage.parameters)
    backend = backends.choose("attention_pool", *everything, requested=requested)
    if backend == "reference":
        pooled = reference.attention_pool(stage.rows(x, options[0]), *parameters, offsets, *options)
    else:
        inputs = (_for_kernels(x), *parameters, offsets, *options)
        pooled = ops.call("attention_pool", backend, *inputs, embed=stage.arguments)
    bag, scores, lse = pooled
    return Pooled(bag.to(reference.result_dtype(*everything)), scores, lse)


def _attention_scores(x, parameters, gated, mask, seed, activation, dropout_p, embed, requested) -> Tensor:
    check_instances(x)
    stage, options = _attention_options(x, parameters, gated, mask, seed, activation, dropout_p, embed)
    backend = backends.choose("attention_scores", x, *parameters, *stage.parameters, requested=requested)
    if backend == "reference":
        return reference.attention_scores(stage.rows(x, options[0]), *parameters, *options)
    inputs = (_for_kernels(x), *parameters, None, *options)
    return ops.call("attention_scores", backend, *inputs, embed=stage.arguments)


# Given scores, and queries


def softmax_pool(
    x: Tensor,
    scores: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Pooling by given scores ``[N, K]``: ``bag[b, k] = sum_i softmax_{i in b}(scores[i, k]) x_i``.

    ``bag`` comes in the type of ``x``; the ``scores`` returned are the given ones, masked.
    """
    _check_bags(x, offsets)
    check_per_row("scores", scores, x)
    mask = checked_mask(mask, x)
    backend = backends.choose("softmax_pool", x, scores, requested=backend)
    if backend == "reference":
        return Pooled(*reference.softmax_pool(x, scores, offsets, mask))
    bag, scores, lse = ops.call("softmax_pool", backend, _for_kernels(x), scores, offsets, mask)
    return Pooled(bag.to(x.dtype), scores, lse)


def _query_stage(x: Tensor, query: Tensor, offsets: Tensor | None, scale: float, seed, embed: Embed) -> Stage:
    """The arguments checked."""
    _check_bags(x, offsets)
    stage = stage_of(x, embed, seed)
    if isinstance(query, Tensor) and query.ndim == 3:
        num_bags = 1 if offsets is None else offsets.shape[0] - 1
        check_shape("query", query, (num_bags, None, stage.width), x)
    else:
        check_shape("query", query, (None, stage.width), x)
    check_number("scale", scale)
    return stage


def query_pool(
    x: Tensor,
    query: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pooled:
    """Pooling by a query: ``scores[i, k] = scale <x_i, query[b, k]>``.

    ``query`` is ``[B, K, L]``, or ``[K, L]`` for all bags; it counts as a parameter.
    """
    stage = _query_stage(x, query, offsets, scale, seed, embed)
    mask = checked_mask(mask, x)
    everything = (x, query, *stage.parameters)
    backend = backends.choose("query_pool", *everything, requested=backend)
    if backend == "reference":
        pooled = reference.query_pool(stage.rows(x, mask), query, offsets, mask, scale)
    else:
        pooled = ops.call("query_pool", backend, _for_kernels(x), query, offsets, mask, scale, embed=stage.arguments)
    bag, scores, lse = pooled
    return Pooled(bag.to(reference.result_dtype(*everything)), scores, lse)


def query_scores(
    x: Tensor,
    query: Tensor,
    offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    seed: Tensor | int | None = None,
    embed: Embed = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The scores ``[N, K]`` of `query_pool`."""
    stage = _query_stage(x, query, offsets, scale, seed, embed)
    mask = checked_mask(mask, x)
    backend = backends.choose("query_scores", x, query, *stage.parameters, requested=backend)
    if backend == "reference":
        return reference.query_scores(stage.rows(x, mask), query, offsets, mask, scale)
    inputs = (_for_kernels(x), query, offsets, mask, scale)
    return ops.call("query_scores", backend, *inputs, embed=stage.arguments)


def weighted_pool(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``sum_{i in b} weights[i, k] x_i``, no softmax: ``[B, K, L]`` in the type of ``x``.

    ``weights`` are ``[N, K]``.
    """
    _check_bags(x, offsets)
    check_per_row("weights", weights, x)
    mask = checked_mask(mask, x)
    backend = backends.choose("weighted_pool", x, weights, requested=backend)
    if backend == "reference":
        return reference.weighted_pool(x, weights, offsets, mask)
    return ops.call("weighted_pool", backend, _for_kernels(x), weights, offsets, mask).to(x.dtype)


# DSMIL (Li, Li, Eliceiri 2021, "Dual-stream Multiple Instance Learning Network for Whole Slide Image
# Classification with Self-supervised Contrastive Learning")


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
    _check_bags(x, offsets)
    stage = stage_of(x, embed, seed)
    check_linear("", weight, bias, stage.width, x)
    mask = checked_mask(mask, x)
    backend = backends.choose("instance_max", x, weight, bias, *stage.parameters, requested=backend)
    if backend == "reference":
        h = stage.rows(x, mask)
        return InstanceMax(*reference.instance_max(h, weight, bias, offsets, mask, compute_dtype_of(x)))
    inputs = (_for_kernels(x), weight, bias, offsets, mask)
    return InstanceMax(*ops.call("instance_max", backend, *inputs, embed=stage.arguments))


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
    _check_bags(x, offsets)
    check_per_row("instance_logits", instance_logits, x)
    parameters = (q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias)
    stage, options = _dsmil_options(x, parameters, mask, seed, v_activation, v_dropout_p, scale, embed)
    everything = (*parameters, *stage.parameters)
    backend = backends.choose("dsmil_pool", x, instance_logits, *everything, requested=backend)
    if backend == "reference":
        h = stage.rows(x, options[0])
        bag, scores, lse, critical = _dsmil_reference(h, instance_logits, parameters, offsets, options)
    else:
        inputs = (_for_kernels(x), instance_logits.detach(), *parameters, offsets, *options)
        bag, scores, lse, critical, _ = ops.call("dsmil_pool", backend, *inputs, embed=stage.arguments)
    return DSMILPooled(bag.to(reference.result_dtype(x, *everything)), scores, lse, critical)


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
    _check_bags(x, offsets)
    parameters = (q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias)
    stage, options = _dsmil_options(x, parameters, mask, seed, v_activation, v_dropout_p, scale, embed)
    check_linear("", weight, bias, stage.width, x)
    everything = (*parameters, *stage.parameters)
    backend = backends.choose("dsmil", x, weight, bias, *everything, requested=backend)
    if backend == "reference":
        h = stage.rows(x, options[0])
        values, _, logits = reference.instance_max(h, weight, bias, offsets, options[0], options[-1])
        bag, *rest = *_dsmil_reference(h, logits.detach(), parameters, offsets, options), values, logits
    else:
        inputs = (_for_kernels(x), weight, bias, *parameters, offsets, *options)
        bag, *rest, _ = ops.call("dsmil", backend, *inputs, embed=stage.arguments)
    return DSMIL(bag.to(reference.result_dtype(x, *everything)), *rest)


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
        check_choice("v_activation", v_activation, reference.ACTIVATIONS)
    if scale is not None:
        check_number("scale", scale)
    return stage, (checked_mask(mask, x), stage.seed, v_activation, v_dropout_p, scale, compute_dtype_of(x))


def _dsmil_reference(x, logits, parameters, offsets, options):
    mask, seed, v_activation, *rest = options
    query, value = parameters[:4], (*parameters[4:], v_activation)
    return reference.dsmil_pool(x, logits, query, value, offsets, mask, seed, *rest)


# Others


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
    _check_bags(x, offsets)
    stage = stage_of(x, embed, seed)
    check_linear("", weight, bias, stage.width, x)
    mask = checked_mask(mask, x)
    everything = (x, weight, bias, *stage.parameters)
    backend = backends.choose("loss_attention_pool", *everything, requested=backend)
    if backend == "reference":
        pooled = reference.loss_attention_pool(stage.rows(x, mask), weight, bias, offsets, mask, compute_dtype_of(x))
    else:
        inputs = (_for_kernels(x), weight, bias, offsets, mask)
        pooled = ops.call("loss_attention_pool", backend, *inputs, embed=stage.arguments)
    return LossAttentionPooled(pooled[0].to(reference.result_dtype(*everything)), *pooled[1:])


def mean_pool(
    x: Tensor, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The mean of the instances of each bag: ``[B, L]`` in the type of ``x``."""
    _check_bags(x, offsets)
    mask = checked_mask(mask, x)
    backend = backends.choose("mean_pool", x, requested=backend)
    if backend == "reference":
        return reference.mean_pool(x, offsets, mask)
    return ops.call("mean_pool", backend, _for_kernels(x), offsets, mask).to(x.dtype)


def max_pool(
    x: Tensor, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> MaxPooled:
    """The maximum over the instances of each bag, feature by feature: ``[B, L]`` in the type of ``x``."""
    _check_bags(x, offsets)
    mask = checked_mask(mask, x)
    backend = backends.choose("max_pool", x, requested=backend)
    if backend == "reference":
        return MaxPooled(*reference.max_pool(x, offsets, mask))
    return MaxPooled(*ops.call("max_pool", backend, _for_kernels(x), offsets, mask))


def _check_scores(scores: Tensor, offsets: Tensor | None) -> None:
    check_instances(scores, "scores")
    if offsets is not None:
        check_offsets(offsets, scores.shape[0], scores.device)


def segment_softmax(
    scores: Tensor, offsets: Tensor | None = None, *, mask: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The softmax of the scores ``[N, K]`` inside each bag: ``[N, K]`` in float32, float64 for float64."""
    _check_scores(scores, offsets)
    mask = checked_mask(mask, scores)
    backend = backends.choose("segment_softmax", scores, requested=backend)
    if backend == "reference":
        return reference.segment_softmax(scores, offsets, mask)
    return ops.call("segment_softmax", backend, scores, offsets, mask)


def attention_weights(
    pooled: Pooled | DSMILPooled | LossAttentionPooled,
    offsets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weights ``[N, K]`` with which a pooling op summed the instances: ``exp(scores - lse)``.

    ``offsets`` are those of that call; its mask is in the scores already.
    """
    if not hasattr(pooled, "scores") or not hasattr(pooled, "lse"):
        raise TypeError(f"pooled must be what a pooling op returned; got {type(pooled).__name__}")
    scores, lse = pooled.scores, pooled.lse
    _check_scores(scores, offsets)
    num_bags = 1 if offsets is None else offsets.shape[0] - 1
    check_shape("pooled.lse", lse, (num_bags, scores.shape[1]), scores)
    mask = checked_mask(mask, scores)
    backend = backends.choose("attention_weights", scores, lse, requested=backend)
    if backend == "reference":
        return reference.attention_weights(scores, lse, offsets, mask)
    return ops.call("attention_weights", backend, scores, lse, offsets, mask)


def topk_instances(
    scores: Tensor,
    k: int,
    offsets: Tensor | None = None,
    *,
    largest: bool = True,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> TopInstances:
    """The ``k`` instances with the largest (or smallest) scores ``[N, K]`` of each bag and head, best first.

    ``k`` may exceed a bag: the rest is index -1 and value -inf (+inf for the smallest).  A score of -inf is
    never picked.  Values come in the type of the scores.
    """
    _check_scores(scores, offsets)
    check_count("k", k)
    check_flag("largest", largest)
    mask = checked_mask(mask, scores)
    backend = backends.choose("topk_instances", scores, requested=backend)
    if backend == "reference":
        return TopInstances(*reference.topk_instances(scores, k, offsets, largest, mask))
    return TopInstances(*ops.call("topk_instances", backend, scores, k, offsets, largest, mask))
