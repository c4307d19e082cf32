"""A few instances on a CPU take a model's own methods, which are faster for them."""

import copy
import pickle

import pytest
import torch
import upstream_models as up
import upstream_padded as pad
from accelerate_cases import counted
from op_cases import needs_extension

import milkernels

pytestmark = needs_extension
WIDTH = 6


def fused(model, calls: list, *args, grad: bool = False, **kwargs) -> bool:
    """Whether a fused op was called."""
    calls.clear()
    with torch.set_grad_enabled(grad):
        model(*args, **kwargs)
    return bool(calls)


def gate(**options):
    model = up.AttnNetGated(WIDTH, 4)
    assert milkernels.accelerate(model, **options).changed
    return model


@pytest.mark.parametrize("grad, few", [(False, 200), (True, 400)])
def test_fewer_than_the_structure_says(grad, few, monkeypatch):
    model, calls = gate(), counted(monkeypatch)
    assert not fused(model, calls, torch.randn(few - 1, WIDTH), grad=grad)
    assert fused(model, calls, torch.randn(few, WIDTH), grad=grad)
    assert fused(model, calls, torch.randn(few // 2, 2, WIDTH), grad=grad)  # instances, not bags


@pytest.mark.parametrize("grad", [False, True])
def test_what_pools_gains_earlier(grad, monkeypatch):
    dsmil = up.MILNet(up.FCLayer(WIDTH, 2), up.BClassifier(WIDTH, 2, units=4))
    for model, few in ((dsmil, 200), (up.Attention(M=8, L=4, channels=3), 100)):
        assert milkernels.accelerate(model).changed
        calls = counted(monkeypatch)
        rows = torch.randn(few, WIDTH) if model is dsmil else torch.randn(1, few, 1, 10, 10)
        assert not fused(model, calls, rows[:-1] if model is dsmil else rows[:, :-1], grad=grad)
        assert fused(model, calls, rows, grad=grad)


def test_images_are_counted_not_their_pixels(monkeypatch):
    model = up.Attention(M=8, L=4, channels=3)
    assert milkernels.accelerate(model, min_instances=6).changed
    calls = counted(monkeypatch)
    assert not fused(model, calls, torch.randn(1, 5, 1, 10, 10))
    assert fused(model, calls, torch.randn(1, 6, 1, 10, 10))


def test_padding_is_always_left_out(monkeypatch):
    """What is returned for padded rows does not depend on how many there are."""
    model = pad.AttentionPool(WIDTH, 4)
    assert milkernels.accelerate(model).changed
    calls, x = counted(monkeypatch), torch.randn(2, 5, WIDTH)
    assert not fused(model, calls, x)
    assert fused(model, calls, x, torch.ones(2, 5))
    assert fused(model, calls, X=x, mask=torch.ones(2, 5))


def test_types_that_eager_refuses_do_not_depend_on_the_size(monkeypatch):
    model, calls = gate(), counted(monkeypatch)
    assert fused(model, calls, torch.randn(5, WIDTH).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused(model, calls, torch.randn(5, WIDTH).bfloat16())


def test_the_least_number_can_be_given_and_is_kept(monkeypatch):
    model, x = gate(min_instances=5), torch.randn(5, WIDTH)
    calls = counted(monkeypatch)
    for kept in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused(kept, calls, x, grad=True)
        assert not fused(kept, calls, x[:4])
    assert milkernels.accelerate(model, min_instances=0).changed
    assert fused(model, calls, x[:1])
    assert milkernels.accelerate(model).changed
    assert not fused(model, calls, x)


def test_a_waiting_module_keeps_it(monkeypatch):
    model = pad.AttentionPool(None, 4)
    assert milkernels.accelerate(model, min_instances=3).waiting
    model(torch.randn(1, 2, WIDTH))
    calls = counted(monkeypatch)
    assert not fused(model, calls, torch.randn(1, 2, WIDTH))
    assert fused(model, calls, torch.randn(1, 3, WIDTH))


@pytest.mark.parametrize("number, error", [(-1, ValueError), ("5", TypeError), (2.0, TypeError)])
def test_numbers_that_are_none(number, error):
    model = up.AttnNetGated(WIDTH, 4)
    with pytest.raises(error, match=f"min_instances .*got {number if error is ValueError else type(number).__name__}"):
        milkernels.accelerate(model, min_instances=number)
    assert type(model) is up.AttnNetGated


def test_the_loss_of_torchmils_clam_counts_instances_not_labels(monkeypatch):
    model = pad.ClamTorchmil(WIDTH, 4, k_sample=2, feat_ext=up.dense(WIDTH, WIDTH, activation=torch.nn.ReLU))
    assert len(milkernels.accelerate(model, min_instances=20).changed) == 2
    calls, labels, x = counted(monkeypatch), torch.tensor([0, 1]), torch.randn(2, 10, WIDTH)
    for rows, mask, names in ((9, None, []), (10, None, ["attention_pool"]), (9, torch.ones(2, 9), ["attention_pool"])):
        calls.clear()
        model.compute_loss(labels, x[:, :rows], mask)
        assert calls == names
