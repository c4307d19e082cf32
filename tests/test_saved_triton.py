"""Saved bytes: whatever an op keeps for its backward, up to a limit, its numbers are the same; and nobody writes there.

A limit that some rows fit in keeps these alone: 256 of the rows here, of which the others are computed again.
"""

import contextlib
import itertools

import pytest
import torch
from legs import EMBEDDED, LEGS, at, by_leg
from op_cases import CASES, NAN, close, cotangents, offsets_of, same_bits, step
from test_contract import detached, recorded
from test_numbers import some_mask
from torch.utils._python_dispatch import TorchDispatchMode

from milkernels import saved_bytes, saving
from milkernels.ops import contract

LENGTHS, SHORT = (70, 0, 5, 185), (30, 0, 5)
# One number less than a block of 64, so that memory is laid out with gaps on a CPU.
SIZES = {"L": 33, "D": 60, "K": 1, "C": 1, "Q2": 62, "V": 61}
# What has hidden units or embedded rows: one of each way to keep them, and the others.
HIDDEN = (
    *("attention_pool", "gated_attention_pool-dropout", "attention_scores", "gated_attention_scores"),
    *("dsmil_pool-mlp-q", "dsmil_pool-mlp-q-gelu-v", "dsmil_pool-relu-v-dropout", "dsmil-mlp-q-relu-v"),
    "dsmil_pool-given-mlp-q-relu-v",
)
KEEPING = (*HIDDEN, *(name for name in EMBEDDED if CASES[name].kernel in contract.KEEPING))
FEW = (
    *("gated_attention_pool-dropout", "dsmil-mlp-q-relu-v", "attention_pool-embed-gelu"),
    *("query_pool-embed-dropout", "dsmil-embed-mlp-q-relu-v"),
)
TRITON = ("interpreted", "gpu_triton")


def on(cases, *legs, slow=()):
    rows = [at(cases=[n for n in cases if n not in slow]), at(cases=[n for n in cases if n in slow], slow=True)]
    return by_leg(**dict.fromkeys(legs, rows))


def arguments(case, dtype=torch.float64, lengths=LENGTHS, poisoned=False):
    """Tensors, offsets and a mask, behind which rows hold NaN if they are ``poisoned``."""
    tensors, mask = case.make(lengths, dtype, relu=True, **SIZES), some_mask(sum(lengths))
    for name, t in tensors.items():
        if poisoned and case.has_rows(name):
            t.data[~mask] = NAN
    return tensors, offsets_of(lengths), mask


@contextlib.contextmanager
def kept_sizes():
    """The bytes that calls within the block have saved for their backward."""
    found = []

    def pack(t):
        if t.dtype == torch.uint8 and t.dim() == 1:
            found.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def size_of_all(leg, case, given) -> int:
    """The bytes that a call keeps without a limit."""
    with saved_bytes(None), kept_sizes() as found:
        case.ours(leg.backend)(*given)
    return sum(found)


def partial_limits(leg, case, given) -> list[int]:
    """With the first all embedded rows are kept, and some of the hidden units; some embedded rows alone."""
    x, sizes = given[0]["x"], {size_of_all(leg, case, given)}
    if case.embed is not None:
        sizes.add(saving.kept_bytes(x, saving.ALL, x.dtype, given[0]["e_weight"].shape[0], ()))
    return [size * 9 // 10 for size in sizes]


@on(KEEPING, *TRITON, slow=[name for name in KEEPING if name not in FEW])
def test_a_limit_changes_no_number(leg, case):
    given = arguments(case, poisoned=True)
    with saved_bytes(0):
        without = leg.run(case, *given)
    for limit in partial_limits(leg, case, given):
        with saved_bytes(limit), kept_sizes() as found:
            close(leg.run(case, *given), without, 1e-12)
        assert 0 < sum(found) <= limit
    with saved_bytes(None):
        same_bits(leg.run(case, *given), without)


@on(FEW, *TRITON)
def test_float32_bits(leg, case):
    given = arguments(case, torch.float32, SHORT)
    with saved_bytes(0):
        without = leg.run(case, *given)
    with saved_bytes(None):
        same_bits(leg.run(case, *given), without)


@on(FEW, *TRITON, slow=FEW)
def test_half_types_keep_the_promise(leg, case):
    """With none and some rows kept, as with all in test_numbers.py."""
    for dtype in (torch.bfloat16, torch.float16):
        for limit in (0, *partial_limits(leg, case, arguments(case, dtype))):
            with saved_bytes(limit):
                promise = leg.promise(case, dtype, lengths=LENGTHS, seeds=1, **SIZES)
            assert promise.ok, (limit, dtype, promise.broken())


@on(FEW, *TRITON)
def test_a_graph_is_walked_twice(leg, case):
    """Nobody writes into what is kept."""
    tensors, offsets, mask = arguments(case, torch.float32, SHORT)
    saved, leaves = [], [t for t in tensors.values() if t.requires_grad]

    def pack(t):
        saved.append((t, t.clone()))
        return t

    with saved_bytes(None), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = case.ours(leg.backend)(tensors, offsets, mask)
    graded = [(o, c) for o, c in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
    outputs, sent = zip(*graded, strict=True)
    once, again = (torch.autograd.grad(outputs, leaves, sent, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    assert any(t.dtype == torch.uint8 and t.numel() for t, _ in saved)
    assert all(torch.equal(t.view(torch.uint8), before.view(torch.uint8)) for t, before in saved if t.dim())


class _Kept(TorchDispatchMode):
    """Notes the sizes of what ops return as kept."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "milkernels" and func._schema.returns[-1].name == "kept":
            self.sizes.append(out[-1].numel())
        return out


@on(FEW, *TRITON)
def test_who_waits_for_no_backward_keeps_nothing(leg, case):
    tensors, offsets, mask = arguments(case, torch.float32, SHORT)
    for grad, limit, some in ((False, None, False), (True, 0, False), (True, None, True)):
        with saved_bytes(limit), torch.set_grad_enabled(grad), _Kept() as kept:
            case.ours(leg.backend)(tensors, offsets, mask)
        assert len(kept.sizes) == 1 and (kept.sizes[0] > 0) == some


# Triton


@on(FEW, "interpreted", slow=FEW)
def test_opcheck(leg, case):
    """Of as many bytes as the fake says; those that nothing is kept in are the same in each run here."""
    torch.use_deterministic_algorithms(True)  # which fills memory
    try:
        with saved_bytes(None):
            calls = recorded(case, leg.backend)
        for op, args, kwargs in itertools.chain.from_iterable(calls):
            torch.library.opcheck(op, detached(args), kwargs)
    finally:
        torch.use_deterministic_algorithms(False)


@on(FEW, "interpreted", slow=FEW)
def test_many_slices(leg, case, monkeypatch):
    """A workspace that holds one segment, some of whose rows are kept."""
    from milkernels.triton import call

    given = arguments(case)
    with saved_bytes(0):
        without = leg.run(case, *given)
    limits = [None, *partial_limits(leg, case, given)]
    monkeypatch.setattr(call, "WORKSPACE", 1)
    for limit in limits:
        with saved_bytes(limit):
            close(leg.run(case, *given), without)


@on(("gated_attention_pool-dropout", "gated_attention_pool-embed-dropout"), "interpreted")
def test_fused_scores_of_rows_that_are_not_kept(leg, case):
    """Products of those that are come from the library."""
    from milkernels.triton import tuning

    given = arguments(case, torch.float32)
    limits = partial_limits(leg, case, given)
    with saved_bytes(0):
        without = step(case.ours(leg.backend), *given)
    for limit in limits:
        with saved_bytes(limit), tuning.use(scores="fused"):
            close(step(case.ours(leg.backend), *given), without, 1e-4)


@on(("gated_attention_pool", "gated_attention_pool-embed-dropout"), "interpreted", slow=["gated_attention_pool"])
def test_products_in_three_parts_are_kept(leg, case):
    from milkernels.triton import tuning

    given = arguments(case, torch.float32, SHORT)
    with tuning.use(products="split"):
        with saved_bytes(0):
            without = leg.run(case, *given)
        with saved_bytes(None):
            same_bits(leg.run(case, *given), without)


@pytest.mark.skipif(LEGS["interpreted"].missing is not None, reason=str(LEGS["interpreted"].missing))
@pytest.mark.parametrize(
    "op, extras, products",
    [
        ("attention_pool", "gated", (3, 2)),
        ("attention_scores", "", (3, 2)),
        # The embedding's product, its gate's, and the gradients of both weights and of the embedded rows.
        ("attention_pool", "gated embed", (7, 5)),
        ("query_pool", "embed", (3, 2)),
        ("loss_attention_pool", "embed", (3, 2)),
        # Of which some are of a few critical instances.
        ("dsmil_pool", "mlp", (11, 9)),
        ("dsmil_pool", "value relu", (9, 8)),
        ("dsmil", "embed", (14, 12)),
    ],
)
def test_products_of_a_frozen_step(op, extras, products):
    """With everything saved no product with the instances is computed twice."""
    from tools.standin import launches

    found = []
    for kept in ("", " kept"):
        both = launches(op, f"{extras} frozen{kept}", N=20_000, L=128, D=64)
        found.append(sum(part.library["mm"] + part.library["addmm_"] for part in both))
    assert tuple(found) == products
