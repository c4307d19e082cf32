"""Sums over very many rows: in tiles and slices, so that no long chain of additions loses digits to each of them."""

import pytest
import torch
from legs import every_backend
from op_cases import CASES, offsets_of

from milkernels import native, testing

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what Triton's interpreter selects away

SIZES = {"L": 4, "D": 12, "K": 2, "C": 2, "Q2": 3, "V": 3}


def gradients(compute, case, tensors, offsets, sent) -> dict[str, torch.Tensor]:
    """Those of the parameters, from that of the bag vectors; but that of the bias of w, which is 0."""
    leaves = {n: t for n, t in tensors.items() if t.requires_grad and n != "w_bias" and not case.has_rows(n)}
    bag = compute(tensors, offsets, None)[0]
    found = torch.autograd.grad(bag, list(leaves.values()), sent.to(bag.dtype))
    return dict(zip(leaves, found, strict=True))


def one_bag_at_a_time(case, tensors, sent, rows: int) -> dict[str, torch.Tensor]:
    """As eager PyTorch adds what one bag after the other gives."""
    total = {}
    for i, of_bag in enumerate(sent.split(1)):
        part = {n: t[i * rows : (i + 1) * rows] if case.has_rows(n) else t for n, t in tensors.items()}
        for name, value in gradients(case.truth, case, part, offsets_of((rows,)), of_bag).items():
            total[name] = total.get(name, 0) + value
    return total


@pytest.mark.parametrize(
    "case",
    [CASES[name] for name in ("attention_pool", "gated_attention_pool", "loss_attention_pool", "dsmil_pool-mlp-q")],
    ids=lambda case: case.op,
)
@every_backend
def test_error_promise_of_the_parameters_of_many_bags(backend, case):
    slow = backend == "triton" or (backend == "native" and native.emulated())
    bags, rows = (30, 40) if slow else (150, 100)
    tensors = case.make((rows,) * bags, torch.float32, relu=True, **SIZES)
    sent = torch.randn(bags, 1 if case.op == "loss_attention_pool" else 2, SIZES["L"], dtype=torch.float64)
    sent += 1  # so that sums do not stay small by chance
    wide = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    eager, exact = (one_bag_at_a_time(case, given, sent, rows) for given in (tensors, wide))
    ours = gradients(case.ours(backend), case, tensors, offsets_of((rows,) * bags), sent)
    kept = testing.error_promise(ours, eager, exact, torch.float32)
    assert kept.ok, kept.broken()
