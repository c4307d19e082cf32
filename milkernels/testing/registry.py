"""The registry: every op that works on bags, and its variants under keys of their own."""

import math

import torch
from torch import Tensor

import milkernels
from milkernels.testing import formulas
from milkernels.testing.cases import Flops, OpCase, Sizes, arguments_of, bag_logsumexp, embedding_case, linear
from milkernels.testing.formulas import Tensors
from milkernels.testing.inputs import Inputs, Shape

_X = {"x": ("N", "L")}
_SCORES = {"scores": ("N", "K")}
_CLASSIFIER = linear("", "C", "L")
_POOLED = ("bag", "scores", "lse")


def _vectors(count: int) -> Flops:
    """The products of all instances with ``count`` vectors for each head."""
    return lambda s: 2 * s.instances * s.dim * s.heads * count


# Attention


def _attention(name: str, gated: bool) -> OpCase:
    pools = name.endswith("_pool")
    u = linear("u_", "D", "L") if gated else {}
    return OpCase(
        name=name,
        outputs=_POOLED if pools else ("scores",),
        tensors=_X | linear("v_", "D", "L") | u | linear("w_", "K", "D"),
        gain={"w_weight": 2.0},  # the weights of a bag should differ visibly
        one_bag=formulas.attention_pool_eager if pools else formulas.attention_scores_eager,
        primary="bag" if pools else "scores",
        options={"activation": "tanh", "dropout_p": 0.0, "seed": 0},
        dropout="dropout_p",
        takes_offsets=pools,
        hidden_flops=lambda s: 2 * s.instances * s.hidden * ((2 if gated else 1) * s.dim + s.heads),
        head_flops=_vectors(int(pools)),
        zero_gradients=lambda inputs: ("w_bias",) if pools else (),
        tags=frozenset({"compiled", "attention"}),
    )


# Queries


def _query(name: str, *, per_bag: bool) -> OpCase:
    pools = name.startswith("query_pool")
    return OpCase(
        name=name,
        op="query_pool" if pools else "query_scores",
        outputs=_POOLED if pools else ("scores",),
        tensors=_X | {"query": ("B", "K", "L") if per_bag else ("K", "L")},
        one_bag=formulas.query_pool_eager if pools else formulas.query_scores_eager,
        primary="bag" if pools else "scores",
        options={"scale": 0.05},
        takes_offsets=pools or per_bag,
        head_flops=_vectors(2 if pools else 1),
    )


# DSMIL: its second stream, and both


def _both_streams(inputs: Inputs, backend: str | None) -> Tensors:
    bags = {"offsets": inputs.offsets, "mask": inputs.mask}
    both = milkernels.dsmil(inputs.x, **arguments_of("dsmil", inputs), **bags, backend=backend)
    # A training step goes through both, as DSMIL's two losses do.
    return {**both._asdict(), "streams": torch.cat([both.bag.flatten(1), both.values], dim=1)}


def _dsmil(name: str, *, mlp: bool = False, activation: str | None = None, both: bool = False) -> OpCase:
    """Linear query and value; with ``mlp`` the non-linear query and no value.  ``both`` streams, or the second."""
    options = {} if mlp else {"v_dropout_p": 0.0, "seed": 0}
    layers = linear("q_", "D", "L") | (linear("q2_", "Q2", "D") if mlp else linear("v_", "V", "L"))
    if both:
        stream = {
            "tensors": _X | _CLASSIFIER | layers,
            "compose": _both_streams,
            "outputs": (*_POOLED, "critical", "values", "logits", "streams"),
            "one_bag": formulas.dsmil_eager,
            "primary": "streams",
            "primary_row": lambda s, _: (s.heads * (s.dim + 1),),
            "winners": "weight",
            "forward_flops": _vectors(1),
            "reads": (2, 1),  # which instance is critical is known after the first
        }
    else:
        stream = {
            "outputs": (*_POOLED, "critical"),
            "one_bag": formulas.dsmil_pool_eager,
            "tensors": _X | layers | {"instance_logits": ("N", "C")},
            "fixed": frozenset({"instance_logits"}),
            "winners": "instance_logits",
        }

    def hidden_flops(s: Shape) -> int:
        # A linear query is absorbed and a linear value folded: vectors only, however many hidden units.
        if mlp:
            return 2 * s.instances * s.hidden * (s.dim + s.hidden + s.heads)
        return 2 * s.instances * s.dim * s.dim if activation else 0

    return OpCase(
        name=name,
        op="dsmil" if both else "dsmil_pool",
        options=options | ({"v_activation": activation} if activation else {}),
        dropout="" if mlp else "v_dropout_p",
        default_heads=2,
        default_hidden=128,
        hidden_flops=hidden_flops,
        head_flops=_vectors(1 if mlp else 2),
        columns=(2, 1),
        **stream,
    )


# Ops on scores alone


def _weights_of_pooled(inputs: Inputs, backend: str | None) -> Tensors:
    scores, lse = inputs.x, inputs.parameters["lse"]
    pooled = milkernels.Pooled(scores.new_zeros(*lse.shape, 1), scores, lse)
    return {"weights": milkernels.attention_weights(pooled, inputs.offsets, mask=inputs.mask, backend=backend)}


def _exact_lse(inputs: Inputs) -> Tensor:
    scores = inputs.x.double()
    if inputs.mask is not None:
        scores = scores.masked_fill(~inputs.mask.bool().unsqueeze(1), -math.inf)
    return bag_logsumexp(scores, inputs)


_ALL = (
    _attention("attention_pool", gated=False),
    _attention("gated_attention_pool", gated=True),
    _attention("attention_scores", gated=False),
    _attention("gated_attention_scores", gated=True),
    OpCase(
        name="softmax_pool",
        outputs=_POOLED,
        one_bag=formulas.softmax_pool_eager,
        tensors=_X | _SCORES,
        head_flops=_vectors(1),
        columns=(1, 2),  # the backward reads scores and writes their gradient
    ),
    _query("query_pool", per_bag=False),
    _query("query_pool_per_bag", per_bag=True),
    _query("query_scores", per_bag=False),
    _query("query_scores_per_bag", per_bag=True),
    OpCase(
        name="instance_max",
        outputs=("values", "indices", "logits"),
        one_bag=formulas.instance_max_eager,
        tensors=_X | _CLASSIFIER,
        primary="values",
        primary_row=lambda s, _: (s.heads,),
        winners="weight",
        default_heads=2,
        forward_flops=_vectors(1),
        reads=(1, 0),
        columns=(1, 0),
    ),
    _dsmil("dsmil_pool"),
    _dsmil("dsmil_pool_relu", activation="relu"),
    _dsmil("dsmil_pool_mlp", mlp=True),
    _dsmil("dsmil", both=True),
    _dsmil("dsmil_mlp", mlp=True, both=True),
    OpCase(
        name="loss_attention_pool",
        outputs=(*_POOLED, "logits"),
        one_bag=formulas.loss_attention_pool_eager,
        alternatives={"logsumexp": formulas.loss_attention_pool_logsumexp},
        tensors=_X | _CLASSIFIER,
        primary_row=lambda s, _: (1, s.dim),
        default_heads=4,
        # One vector for each class, and one for the pooled bag.
        head_flops=lambda s: 2 * s.instances * s.dim * (s.heads + 1),
        # One class leaves a plain softmax of the logits, in which the bias cancels.
        zero_gradients=lambda inputs: ("bias",) if len(inputs.parameters["bias"]) == 1 else (),
    ),
    OpCase(
        name="weighted_pool",
        outputs=("bag",),
        one_bag=formulas.weighted_pool_eager,
        tensors=_X | {"weights": ("N", "K")},
        head_flops=_vectors(1),
    ),
    OpCase(
        name="mean_pool",
        outputs=("bag",),
        one_bag=formulas.mean_pool_eager,
        tensors=_X,
        primary_row=lambda s, _: (s.dim,),
        forward_flops=lambda s: s.instances * s.dim,
        reads=(1, 0),
        columns=(0, 0),
    ),
    OpCase(
        name="max_pool",
        outputs=("values", "indices"),
        one_bag=formulas.max_pool_eager,
        tensors=_X,
        primary="values",
        primary_row=lambda s, _: (s.dim,),
        winners="x",
        reads=(1, 0),
        columns=(0, 0),
    ),
    OpCase(
        name="segment_softmax",
        outputs=("weights",),
        one_bag=formulas.segment_softmax_eager,
        tensors=_SCORES,
        primary="weights",
        reads=(1, 0),
        columns=(1, 2),  # the backward reads the weights and their gradient
    ),
    OpCase(
        name="attention_weights",
        compose=_weights_of_pooled,
        outputs=("weights",),
        one_bag=formulas.attention_weights_eager,
        tensors=_SCORES | {"lse": ("B", "K")},
        derived={"lse": _exact_lse},
        primary="weights",
        reads=(1, 0),
        columns=(1, 2),
    ),
    OpCase(
        name="topk_instances",
        outputs=("values", "indices"),
        one_bag=formulas.topk_instances_eager,
        tensors=_SCORES,
        primary="values",
        primary_row=lambda s, options: (s.heads, options["k"]),
        options={"k": 8},
        winners="x",
        reads=(1, 0),
        columns=(0, 0),
    ),
)
_PLAIN = {case.name: case for case in _ALL}
_EMBEDDED = (
    *(embedding_case(_PLAIN[op], f"{op}_embed") for op in ("gated_attention_pool", "query_pool", "instance_max")),
    embedding_case(_PLAIN["dsmil_mlp"], "dsmil_mlp_embed", passes=2),  # which instance is critical, and the scores
    embedding_case(_PLAIN["loss_attention_pool"], "loss_attention_pool_embed"),
)
CASES: dict[str, OpCase] = {case.name: case for case in (*_ALL, *_EMBEDDED)}
# Of each op all the tensors that it takes, whichever of its cases does; and those that never need a gradient
SIZES: dict[str, Sizes] = {}
FIXED: dict[str, frozenset[str]] = {}
for _case in _ALL:
    SIZES[_case.op] = SIZES.get(_case.op, {}) | _case.tensors
    FIXED[_case.op] = _case.fixed
