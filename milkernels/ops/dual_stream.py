"""DSMIL (Li, Li, Eliceiri 2021, "Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification
with Self-supervised Contrastive Learning"): its two streams, and both in one op."""

import torch
from torch import Tensor

from milkernels import backends
from milkernels.arguments import check_choice, check_number, check_per_row, check_shape
from milkernels.bags import Bags, Parts, instances_of
from milkernels.dtypes import (
    accumulation_dtype,
    compute_dtype_of,
    converted,
    product_dtypes,
    result_dtype,
    without_autocast,
)
from milkernels.layers import ACTIVATIONS, Embed, Linear, as_linear
from milkernels.ops import dsmil_kernels
from milkernels.ops.contract import (
    BAGS,
    Backward,
    Forward,
    call,
    declare,
    declare_part,
    num_bags,
    pooled_shapes,
    pooled_width,
)
from milkernels.ops.dropout import DROP_VALUE, dropout
from milkernels.ops.embedding import embedding_of
from milkernels.ops.segments import INF, Segments, gather, rows_at
from milkernels.ops.trilinear import Score, dead_rows, linear, masked_scores, pooled_by_softmax, without_masked
from milkernels.ragged import for_kernels
from milkernels.results import DSMILOutput, DSMILPooled, InstanceMax

__all__ = ["dsmil", "dsmil_pool", "instance_max"]


def instance_max(
    x: Tensor | Bags | Parts,
    classifier: Linear,
    offsets: Tensor | None = None,
    *,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> InstanceMax:
    """The first stream of DSMIL: ``logits[i] = W x_i + b``, and their maximum in each bag and class (Li et al. 2021,
    eq. 3).

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        classifier: W ``[C, L]`` and b ``[C]``: an ``nn.Linear``, a pair ``(weight, bias or None)``, or a weight.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        seed: of the embedding's dropout, an int64 tensor of one element on the device of ``x`` or an int; None draws
            it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``InstanceMax(values [B, C], indices [B, C], logits [N, C])``: values of an empty bag are -inf, indices are
        rows of ``x`` or -1; the lowest of equal ones wins, and a logit of -inf is never picked.  The gradient of a
        value goes to the instance at its index.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import instance_max
    >>> instance_max(torch.tensor([[1.0], [3.0], [2.0]]), torch.ones(1, 1)).indices
    tensor([[1]])
    """
    if isinstance(x, Parts):
        return x.run(instance_max, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    embedding, _ = embedding_of(x, embed, seed)
    weights = as_linear("classifier", classifier, embedding.width(x), x)
    backend = backends.choose("instance_max", x, (*weights, *embedding.parameters), backend, embedding.needs)
    if backend == "reference":
        instances = embedding.instances(x, mask)
        return InstanceMax(*instance_max_reference(instances, *weights, offsets, mask, compute_dtype_of(x)))
    inputs = (for_kernels(x), *weights, offsets, mask)
    return InstanceMax(*call("instance_max", backend, *inputs, embed=embedding.arguments))


def dsmil_pool(
    x: Tensor | Bags | Parts,
    critical: Tensor,
    q: Linear,
    offsets: Tensor | None = None,
    *,
    q2: Linear | None = None,
    value: Linear | None = None,
    value_activation: str | None = None,
    value_dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> DSMILPooled:
    """The second stream of DSMIL: ``scores[i, c] = scale <q(x_i), q(x_m)>``, m the critical instance of bag and class,
    and ``bag[b, c] = sum_i softmax(scores[i, c]) v(x_i)`` (Li et al. 2021, eqs. 4 to 6).

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        critical: logits of the instances ``[N, C]``; the largest of a bag and class names its critical instance.  They
            get no gradient.  A class without one, where all are -inf, pools nothing, as an empty bag.  Or the critical
            instances themselves ``[B, C, L]``, as q takes them (behind ``embed``, embedded), which get a gradient.
        q: ``[Q, L]`` and ``[Q]``: ``q(x) = W x + b``: an ``nn.Linear``, a pair ``(weight, bias or None)``, or a weight.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        q2: ``[Q2, Q]`` and ``[Q2]``.  If given, ``q(x) = tanh(W2 relu(W x + b) + b2)``, as the authors ship it.
        value: V ``[Lv, L]`` and b_V ``[Lv]``: ``v(x) = act(V drop(x) + b_V)``; None: it is ``x``, and Lv is L.
        value_activation: tanh, relu, gelu (exact), or identity and None: none.
        value_dropout_p: the share of the units of V's input that is dropped, in [0, 1].
        scale: None is ``Q ** -0.5`` (of the last layer), as the authors ship it; the paper (v1, eq. 5) has 1.
        seed: of the dropout of value and embedding, an int64 tensor of one element on the device of ``x`` or an int;
            None draws it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``DSMILPooled(bag [B, C, Lv], scores [N, C], lse [B, C], critical [B, C])``, the last one rows of ``x``, -1
        where there is none and where the instances were given; the others are differentiable.  The query of a critical
        instance is computed again, so the gradient flows through both uses of ``q``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import dsmil_pool
    >>> x, logits, q = torch.randn(7, 16), torch.randn(7, 2), torch.nn.Linear(16, 8)
    >>> dsmil_pool(x, logits, q, torch.tensor([0, 3, 7])).bag.shape
    torch.Size([2, 2, 16])
    """
    if isinstance(x, Parts):
        return x.run(dsmil_pool, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    embedding, weights, options, needs = _second_stream(
        x, q, q2, value, value_activation, value_dropout_p, scale, seed, embed, mask
    )
    given = _given_instances(critical, x, offsets, embedding.width(x))
    tensors = (*weights, *embedding.parameters)
    backend = backends.choose("dsmil_pool", x, (critical, *tensors), backend, needs)
    if backend == "reference":
        instances = embedding.instances(x, mask)
        bag, scores, lse, chosen = _second_stream_reference(instances, critical, weights, offsets, options)
    else:
        chosen = _critical_instances(backend, critical, offsets, mask) if given is None else given
        inputs = (for_kernels(x), None if given is None else critical, chosen, *weights, offsets, *options)
        bag, scores, lse, _ = call("dsmil_pool", backend, *inputs, embed=embedding.arguments)
        chosen = chosen if given is None else chosen - 1
    return DSMILPooled(converted(bag, result_dtype(x, tensors)), scores, lse, chosen)


def dsmil(
    x: Tensor | Bags | Parts,
    classifier: Linear,
    q: Linear,
    offsets: Tensor | None = None,
    *,
    q2: Linear | None = None,
    value: Linear | None = None,
    value_activation: str | None = None,
    value_dropout_p: float = 0.0,
    scale: float | None = None,
    seed: Tensor | int | None = None,
    embed: Embed | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> DSMILOutput:
    """Both streams of DSMIL (Li et al. 2021, eqs. 3 to 7): `instance_max` of the classifier, and `dsmil_pool` of its
    logits.

    The same numbers as these two in turn; its backward writes the gradient of ``x`` once, where two ops would write one
    each and have them added.

    Args:
        x: ``[N, L]``, the instances of all bags back to back, or `Bags`.
        classifier: W ``[C, L]`` and b ``[C]`` of the first stream, as ``q``.
        q: ``[Q, L]`` and ``[Q]``: ``q(x) = W x + b``: an ``nn.Linear``, a pair ``(weight, bias or None)``, or a weight.
        offsets: ``[B + 1]``, where each bag begins; None: one bag.
        q2: ``[Q2, Q]`` and ``[Q2]``.  If given, ``q(x) = tanh(W2 relu(W x + b) + b2)``, as the authors ship it.
        value: V ``[Lv, L]`` and b_V ``[Lv]``: ``v(x) = act(V drop(x) + b_V)``; None: it is ``x``, and Lv is L.
        value_activation: tanh, relu, gelu (exact), or identity and None: none.
        value_dropout_p: the share of the units of V's input that is dropped, in [0, 1].
        scale: None is ``Q ** -0.5`` (of the last layer), as the authors ship it; the paper (v1, eq. 5) has 1.
        seed: of the dropout of value and embedding, an int64 tensor of one element on the device of ``x`` or an int;
            None draws it from PyTorch's generator.
        embed: the layer in front, an `Embed` whose E takes the place of L, or None.
        mask: ``[N]``, non-zero = a real instance; None: all are.
        backend: auto, native, triton or reference; None: what `use_backend` says.

    Returns:
        ``DSMILOutput(bag [B, C, Lv], scores [N, C], lse [B, C], critical [B, C], values [B, C], logits [N, C])``:
        ``critical`` are the instances with the largest logits, ``values`` these logits.  All but ``critical`` are
        differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device; the message names it and what it got.
        BackendUnavailable: the backend asked for by name cannot serve the call.

    >>> import torch
    >>> from milkernels import dsmil
    >>> x, classifier = torch.randn(7, 16), torch.nn.Linear(16, 2)
    >>> q, q2 = torch.nn.Linear(16, 8), torch.nn.Linear(8, 8)
    >>> out = dsmil(x, classifier, q, torch.tensor([0, 3, 7]), q2=q2)
    >>> out.bag.shape, out.values.shape
    (torch.Size([2, 2, 16]), torch.Size([2, 2]))
    """
    if isinstance(x, Parts):
        return x.run(dsmil, locals())
    x, offsets, mask = instances_of(x, offsets, mask)
    embedding, weights, options, needs = _second_stream(
        x, q, q2, value, value_activation, value_dropout_p, scale, seed, embed, mask
    )
    first = as_linear("classifier", classifier, embedding.width(x), x)
    tensors = (*weights, *embedding.parameters)
    backend = backends.choose("dsmil", x, (*first, *tensors), backend, needs)
    if backend == "reference":
        instances = embedding.instances(x, mask)
        values, _, logits = instance_max_reference(instances, *first, offsets, mask, options[-1])
        second = _second_stream_reference(instances, logits.detach(), weights, offsets, options)
        bag, scores, lse, critical = second
    else:
        inputs = (for_kernels(x), *first, *weights, offsets, *options)
        results = call("dsmil", backend, *inputs, embed=embedding.arguments)
        bag, scores, lse, critical, values, logits, _ = results
    return DSMILOutput(converted(bag, result_dtype(x, tensors)), scores, lse, critical, values, logits)


def _second_stream(x, q, q2, value, value_activation, value_dropout_p, scale, seed, embed, mask):
    """``(embedding, weights and biases of q, q2 and V, the options that follow offsets, what a backend needs)``,
    checked."""
    embedding, seed = embedding_of(x, embed, seed, "value_dropout_p", value_dropout_p)
    width = embedding.width(x)
    q_weight, q_bias = as_linear("q", q, width, x)
    q2_weight, q2_bias = (None, None) if q2 is None else as_linear("q2", q2, q_weight.shape[0], x)
    v_weight, v_bias = (None, None) if value is None else as_linear("value", value, width, x)
    if value is None and (value_activation is not None or value_dropout_p):
        raise ValueError("value_activation and value_dropout_p need a value; got None")
    if value_activation is not None:
        check_choice("value_activation", value_activation, ACTIVATIONS)
    if scale is not None:
        check_number("scale", scale)
    options = (mask, seed, value_activation, value_dropout_p, scale, compute_dtype_of(x))
    needs = embedding.needs if q2 is None else (*embedding.needs, "q2")
    if value_dropout_p or value_activation not in (None, "identity"):
        needs = (*needs, "value")
    return embedding, (q_weight, q_bias, q2_weight, q2_bias, v_weight, v_bias), options, needs


def _given_instances(critical: Tensor, x: Tensor, offsets: Tensor | None, width: int) -> Tensor | None:
    """Where ``critical`` are instances ``[B, C, width]``: zeros ``[B, C]``, for none of them is missing.  None where it
    are logits."""
    if not isinstance(critical, Tensor) or critical.dim() != 3:
        check_per_row("critical", critical, x)
        return None
    check_shape("critical", critical, (num_bags(offsets), None, width), x)
    return critical.new_zeros(critical.shape[:2], dtype=torch.int64)


def _critical_instances(backend: str, logits: Tensor, offsets: Tensor | None, mask: Tensor | None) -> Tensor:
    """The row with the largest logit of each bag and class ``[B, C]``; -1 where all are -inf."""
    logits = converted(logits.detach(), accumulation_dtype(logits))
    values, indices = call("max_pool", backend, logits, offsets, mask)
    return indices.masked_fill(values == -INF, -1)


def _second_stream_reference(x, critical, weights, offsets, options):
    mask, seed, value_activation, *rest = options
    return dsmil_pool_reference(x, critical, weights[:4], (*weights[4:], value_activation), offsets, mask, seed, *rest)


# The reference


@without_autocast
def instance_max_reference(x, weight, bias, offsets, mask, compute_dtype):
    """``(values, indices, logits)``: the largest logit of each bag and class, and the row that has it."""
    acc, product = product_dtypes(compute_dtype, x, (weight, bias))
    logits = masked_scores(linear(without_masked(x, mask), weight, bias, product, acc), mask)
    indices = Segments(offsets, x).first_max(logits, logits == -INF)
    return gather(logits, indices, -INF), indices, logits


@without_autocast
def dsmil_pool_reference(x, given, query, value, offsets, mask, seed, v_dropout_p, scale, compute_dtype):
    """``(bag, scores, lse, critical)``: the second stream of DSMIL.

    ``given`` are logits [N, C], or the critical instances [B, C, L], which leave ``critical`` at -1.  ``query`` is
    (q_weight, q_bias, q2_weight, q2_bias), linear where q2_weight is None; ``value`` is
    (v_weight, v_bias, v_activation), ``x`` itself where v_weight is None.
    """
    q_weight, q_bias, q2_weight, q2_bias = query
    acc, product = product_dtypes(compute_dtype, x, (given, *query, *value[:2]))
    segments, dead = Segments(offsets, x), dead_rows(mask)
    if given.dim() == 3:
        instances, alive = given, given.new_ones(given.shape[:2], dtype=torch.bool)
        critical = torch.full_like(alive, -1, dtype=torch.int64)
    else:
        logits = masked_scores(given, mask)
        critical = segments.first_max(logits, logits == -INF)
        instances, alive = rows_at(x, critical), critical >= 0
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
    scores = masked_scores(scores * scale, mask).masked_fill(~segments.to_rows(alive), -INF)
    dropped = dropout(x, v_dropout_p, seed, DROP_VALUE)
    bag, lse = _value_pool(dropped, scores, segments, mask, *value, product)
    return bag, scores, lse, critical


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
    return bag, scores, lse, ((*lse, width) if folded else (0,))


def _both_streams(bag, scores, lse, pooled):
    return bag, scores, lse, lse, lse, scores, pooled


# The contract

_SECOND = "q_weight q_bias q2_weight q2_bias v_weight v_bias"  # the weights of the second stream
_DSMIL = f"{BAGS}, Tensor? seed, str? v_activation, float v_dropout_p, float? scale, ScalarType? compute_dtype"
_DSMIL_OPTIONS = ("str? v_activation", "float v_dropout_p", "float? scale", "ScalarType? compute_dtype")

declare(
    Forward(
        "instance_max",
        f"Tensor x, weights[weight bias], {BAGS}",
        "values indices logits",
        lambda x, weight, offsets, **_: (*[(num_bags(offsets), weight.shape[0])] * 2, (x.shape[0], weight.shape[0])),
        Backward(
            "instance_max",
            inputs="x weight bias",
            saves="x weights[weight bias] offsets? mask? indices logits",
            outputs="values logits",
            embeds=True,
        ),
        indices="indices",
    ),
    triton="choice",
)
declare(
    Forward(
        "dsmil_pool",
        f"Tensor x, Tensor? critical_rows, Tensor critical, weights[{_SECOND}], {_DSMIL}",
        "bag scores lse pooled",
        lambda x, critical, v_weight, v_activation, offsets, e_weight, **_: _dsmil_shapes(
            x, critical.shape[1], v_weight, v_activation, offsets, e_weight
        ),
        Backward(
            "dsmil_pool",
            inputs=f"x critical_rows {_SECOND}",
            saves=f"x critical_rows? critical weights[{_SECOND}] offsets? mask? seed? bag scores lse pooled",
            options=_DSMIL_OPTIONS,
            outputs="bag scores lse",
            embeds=True,
            keeps=True,
        ),
        hidden=dsmil_kernels.hidden_units,
    ),
    Forward(
        "dsmil",
        f"Tensor x, weights[weight bias {_SECOND}], {_DSMIL}",
        "bag scores lse critical values logits pooled",
        lambda x, weight, v_weight, v_activation, offsets, e_weight, **_: _both_streams(
            *_dsmil_shapes(x, weight.shape[0], v_weight, v_activation, offsets, e_weight)
        ),
        Backward(
            "dsmil",
            inputs=f"x weight bias {_SECOND}",
            saves=f"x weights[weight bias {_SECOND}] offsets? mask? seed? bag scores lse critical logits pooled",
            options=_DSMIL_OPTIONS,
            outputs="bag scores lse values logits",
            embeds=True,
            keeps=True,
        ),
        indices="critical",
        hidden=dsmil_kernels.hidden_units,
    ),
    composed=dsmil_kernels,
)

_EMBED = "Tensor?[] embed, str? embed_activation, float embed_dropout_p, ScalarType? embed_dtype"
_ROWS = (
    f"Tensor x, Tensor vectors, Tensor? shift, Tensor critical, Tensor?[] weights, {BAGS}, Tensor? seed, "
    f"str? v_activation, float v_dropout_p, ScalarType? compute_dtype, {_EMBED}"
)
_PARTS = {
    # Memory for what is kept.
    "keep": "(Tensor x, int bytes) -> Tensor",
    # `instance_max`, which keeps the embedded rows.
    "dsmil_logits_fwd": f"(Tensor x, Tensor?[] weights, {BAGS}, {_EMBED}, Tensor(a!) kept) -> (Tensor values, "
    "Tensor indices, Tensor logits)",
    # The passes of the second stream over the rows; `needs` are those of x, e_weight and e_bias. `has_rows`: the
    # embedded rows are kept already.
    "dsmil_rows_fwd": f"({_ROWS}, Tensor(a!) kept, bool has_rows) -> (Tensor bag, Tensor scores, Tensor lse)",
    "dsmil_rows_bwd": f"({_ROWS}, Tensor kept, Tensor bag, Tensor scores, Tensor lse, Tensor? grad_bag, "
    f"Tensor? grad_scores, Tensor? grad_lse, bool[3] needs) -> ({', '.join(['Tensor'] * 10)})",
    # A few rows [n, L] as the op sees them, and their gradients on their way to what they are made of.
    "rows_at": f"(Tensor x, Tensor indices, {_EMBED}) -> Tensor",
    "add_rows_": "(Tensor(a!) grad_x, Tensor(b!) grad_e_weight, Tensor(c!) grad_e_bias, Tensor x, Tensor indices, "
    f"Tensor grad_rows, {_EMBED}) -> ()",
    # The gradient of all logits W x + b on its way: adds those of the rows, returns those of W and b.
    "logits_bwd_": "(Tensor(a!) grad_x, Tensor(b!) grad_e_weight, Tensor(c!) grad_e_bias, Tensor x, Tensor?[] weights, "
    f"{BAGS}, Tensor logits, {_EMBED}, Tensor kept, Tensor grad_logits) -> (Tensor weight, Tensor bias)",
    # Layers on a few rows, whose bits no number of threads changes: scale act(x W^T + b), V pooled + b (0 for an empty
    # bag), and (x W, x b).
    "few_linear": "(Tensor x, Tensor weight, Tensor? bias, str? activation, float scale) -> Tensor",
    "few_linear_bwd": "(Tensor grad, Tensor x, Tensor weight, Tensor? out, str? activation, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    "linear_of_bags": "(Tensor pooled, Tensor lse, Tensor weight, Tensor? bias) -> Tensor",
    "few_transposed": "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    "few_transposed_bwd": "(Tensor grad, Tensor? grad_shift, Tensor x, Tensor weight, Tensor? bias) "
    "-> (Tensor, Tensor, Tensor)",
    # From the gradients of the largest logits: those of their rows [n, L], of W and of b.
    "few_winners_bwd": "(Tensor grad_values, Tensor indices, Tensor rows, Tensor weight) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _PARTS.items():
    declare_part(_name, _schema, triton="dsmil")
