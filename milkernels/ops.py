"""The contract of every compiled op: schema, fake, autograd.

One schema per op; the overload name is the backend (``milkernels::attention_pool_fwd.native``), so PyTorch's
dispatcher goes straight to the kernel of that backend and device, and the fake and autograd registrations below
serve all of them.  Kernels are registered elsewhere: ``csrc/bindings.cpp`` for ``native``.

Autocast: an op is opaque to autocast (the key falls through).  ``compute_dtype`` carries the autocast type, and the
kernels convert operands tile by tile; casting ``x`` as a whole would keep an [N, L] copy for the backward.
"""

import torch
from torch import Tensor

from milkernels import backends

_INPUTS = (
    "Tensor x, Tensor v_weight, Tensor? v_bias, Tensor? u_weight, Tensor? u_bias, "
    "Tensor w_weight, Tensor? w_bias, Tensor? offsets, Tensor? mask, Tensor? seed, "
    "str activation, float dropout_p, ScalarType? compute_dtype"
)
_NUM_DIFFERENTIABLE, _NUM_TENSORS, _NUM_INPUTS = 7, 10, 13  # x .. w_bias; x .. seed; x .. compute_dtype

SCHEMAS = {
    "attention_pool_fwd": f"({_INPUTS}) -> (Tensor bag, Tensor scores, Tensor lse)",
    "attention_scores_fwd": f"({_INPUTS}) -> Tensor",
    # bag, scores and lse are the forward's results; None where the forward was attention_scores.  `needs` says which
    # of (x, v_weight .. w_bias) want a gradient; the others come back as empty tensors.
    "attention_bwd": (
        f"({_INPUTS}, Tensor? bag, Tensor? scores, Tensor? lse, "
        "Tensor? grad_bag, Tensor? grad_scores, Tensor? grad_lse, bool[7] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

_LIBRARY = torch.library.Library("milkernels", "DEF")


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _attention_pool_fake(x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, offsets, *options):
    num_bags = 1 if offsets is None else offsets.shape[0] - 1
    heads, dtype = w_weight.shape[0], _accumulation_dtype(x)
    return (
        x.new_empty((num_bags, heads, x.shape[1]), dtype=dtype),
        x.new_empty((x.shape[0], heads), dtype=dtype),
        x.new_empty((num_bags, heads), dtype=dtype),
    )


def _attention_scores_fake(x, v_weight, v_bias, u_weight, u_bias, w_weight, w_bias, *options):
    return x.new_empty((x.shape[0], w_weight.shape[0]), dtype=_accumulation_dtype(x))


def _attention_bwd_fake(*args):
    inputs, needs = args[:_NUM_DIFFERENTIABLE], args[-1]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else args[0].new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


class _Attention(torch.autograd.Function):
    """Forward of either op; the backward is an op of its own, so that a compiler sees one node."""

    @staticmethod
    def forward(ctx, backend: str, name: str, *inputs):
        output = _below_autograd(name, backend, inputs)
        bag, scores, lse = output if name == "attention_pool_fwd" else (None, output, None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_NUM_TENSORS], bag, scores, lse)
        ctx.backend, ctx.name, ctx.options = backend, name, inputs[_NUM_TENSORS:]
        return output

    @staticmethod
    def backward(ctx, *grads):
        unused = (None,) * (2 + _NUM_INPUTS)
        if all(g is None for g in grads):
            return unused
        if ctx.name == "attention_scores_fwd":
            grads = (None, *grads, None)
        needs = list(ctx.needs_input_grad[2 : 2 + _NUM_DIFFERENTIABLE])
        *tensors, bag, scores, lse = ctx.saved_tensors
        results = _op("attention_bwd", ctx.backend)(*tensors, *ctx.options, bag, scores, lse, *grads, needs)
        results = (g if need else None for g, need in zip(results, needs, strict=True))
        return (None, None, *results, *unused[2 + _NUM_DIFFERENTIABLE :])


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: str, name: str, *inputs):
        return _below_autograd(name, backend, inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "milkernels: the fused attention ops are differentiable once; "
            'for a second derivative call the op with backend="reference"'
        )


def _op(name: str, backend: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.milkernels, name), backend)


def _below_autograd(name: str, backend: str, inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return _op(name, backend)(*inputs)


def _register(name: str, backend: str, fake, function: type[torch.autograd.Function]) -> None:
    """Defines one op of one backend. torch.library.register_autograd would do, but it rebuilds the argument list from
    the schema on every call: 90 us a call against 25 us, which bags of a few instances feel."""

    def autograd_kernel(*inputs):
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            return function.apply(backend, name, *inputs)
        return _below_autograd(name, backend, inputs)

    overload = f"{name}.{backend}"
    _LIBRARY.define(overload + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(overload, autograd_kernel, "Autograd")
    torch.library.register_fake(f"milkernels::{overload}", fake, lib=_LIBRARY)


for _backend in backends.KERNELS:
    _register("attention_pool_fwd", _backend, _attention_pool_fake, _Attention)
    _register("attention_scores_fwd", _backend, _attention_scores_fake, _Attention)
    _register("attention_bwd", _backend, _attention_bwd_fake, _AttentionBackward)


def attention_pool(backend: str, *inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``(bag [B, K, L], scores [N, K], lse [B, K])``, all in the accumulation type; inputs in schema order."""
    return _op("attention_pool_fwd", backend)(*inputs)


def attention_scores(backend: str, *inputs) -> Tensor:
    """``scores [N, K]`` in the accumulation type; inputs in schema order without ``offsets``."""
    return _op("attention_scores_fwd", backend)(*inputs[:_NUM_DIFFERENTIABLE], None, *inputs[_NUM_DIFFERENTIABLE:])
