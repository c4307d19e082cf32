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
_NUM_PARAMETERS = 6  # v_weight .. w_bias, the inputs after x that may need a gradient

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
    inputs, needs = args[: 1 + _NUM_PARAMETERS], args[-1]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else args[0].new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


def _save_pool(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.options = inputs[10:]


def _save_scores(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], None, output, None)
    ctx.options = inputs[10:]


def _attention_backward(backend: str, ctx, grad_bag, grad_scores, grad_lse):
    *tensors, bag, scores, lse = ctx.saved_tensors
    needs = [bool(n) for n in ctx.needs_input_grad[: 1 + _NUM_PARAMETERS]]
    unused = (None,) * (13 - 1 - _NUM_PARAMETERS)
    if grad_bag is None and grad_scores is None and grad_lse is None:
        return (None,) * 13
    op = getattr(torch.ops.milkernels.attention_bwd, backend)
    grads = op(*tensors, *ctx.options, bag, scores, lse, grad_bag, grad_scores, grad_lse, needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True)) + unused


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "milkernels: the fused attention ops are differentiable once; "
        'for a second derivative call the op with backend="reference"'
    )


def _register(backend: str) -> None:
    for name, schema in SCHEMAS.items():
        _LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def op(name: str) -> str:
        return f"milkernels::{name}.{backend}"

    torch.library.register_fake(op("attention_pool_fwd"), _attention_pool_fake, lib=_LIBRARY)
    torch.library.register_fake(op("attention_scores_fwd"), _attention_scores_fake, lib=_LIBRARY)
    torch.library.register_fake(op("attention_bwd"), _attention_bwd_fake, lib=_LIBRARY)
    torch.library.register_autograd(
        op("attention_pool_fwd"),
        lambda ctx, *grads: _attention_backward(backend, ctx, *grads),
        setup_context=_save_pool,
        lib=_LIBRARY,
    )
    torch.library.register_autograd(
        op("attention_scores_fwd"),
        lambda ctx, grad: _attention_backward(backend, ctx, None, grad, None),
        setup_context=_save_scores,
        lib=_LIBRARY,
    )
    torch.library.register_autograd(op("attention_bwd"), _refuse_double_backward, lib=_LIBRARY)


for _backend in backends.KERNELS:
    _register(_backend)


def attention_pool(backend: str, *inputs) -> tuple[Tensor, Tensor, Tensor]:
    """``(bag [B, K, L], scores [N, K], lse [B, K])``, all in the accumulation type; inputs in schema order."""
    return getattr(torch.ops.milkernels.attention_pool_fwd, backend)(*inputs)


def attention_scores(backend: str, *inputs) -> Tensor:
    """``scores [N, K]`` in the accumulation type; inputs in schema order without ``offsets``."""
    return getattr(torch.ops.milkernels.attention_scores_fwd, backend)(*inputs[:7], None, *inputs[7:])
