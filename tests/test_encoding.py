"""`encode_in_chunks` is one graph of the same chunks, in the memory of one of them."""

import copy
import doctest
import importlib
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import upstream_models
from accelerate_cases import accelerated
from op_cases import needs_extension, threads
from torch import nn
from torch.nn import functional as F

import milkernels
from milkernels import encode_in_chunks
from milkernels.bench.memory import allocator_peak

COUNT, CHUNK, WIDTH = 50, 16, 12
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def encoder(norm="group", dropout=0.0, dtype=torch.float64, width=WIDTH):
    """Convolutions, one of the usual normalisations and dropout, over the edges of images of 12 x 12."""
    torch.manual_seed(1)
    norms = {"group": lambda: nn.GroupNorm(2, 4), "batch": lambda: nn.BatchNorm2d(4), "none": nn.Identity}
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, bias=norm == "none"),
        norms[norm](),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(4, width, 3, 2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return made.to(dtype)


def images(count=COUNT, dtype=torch.float64, seed=0):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def in_chunks(model, x, chunk=CHUNK, **options):
    return encode_in_chunks(model, lambda a, b: x[a:b], len(x), chunk, **options)


def one_graph(model, x, chunk=CHUNK):
    return torch.cat([model(x[a : a + chunk]) for a in range(0, len(x), chunk)])


def assert_close(ours, exact, most):
    __tracebackhide__ = True
    assert (ours.double() - exact.double()).norm() <= most * exact.double().norm(), (ours, exact)


def gradients(*modules):
    return torch.cat([p.grad.flatten().double() for m in modules for p in m.parameters()])


HEADS = {
    "abmil": lambda: milkernels.nn.ABMIL(WIDTH, 3, embed_dim=8, hidden_dim=6, heads=2, dropout=0.25),
    "dsmil": lambda: milkernels.nn.DSMILModel(WIDTH, 3, query_dim=6),
    "loss-attention": lambda: milkernels.nn.LossAttentionModel(WIDTH, 3, (8,)),
    "instance+noisy_or": lambda: milkernels.nn.InstancePooling(WIDTH, 3, (8,), "noisy_or"),
    "embedding+mean": lambda: milkernels.nn.EmbeddingPooling(WIDTH, 3, (8,), "mean"),
    "embedding+max": lambda: milkernels.nn.EmbeddingPooling(WIDTH, 3, (), "max"),
}


def head(name="abmil", dtype=torch.float64):
    torch.manual_seed(2)
    return HEADS[name]().to(dtype)


def steps(enc, hd, x, autocast=False, scale=1.0):
    """The features and all gradients by chunks, and those of one graph; both from the same seed."""
    found = []
    for encode, (e, h) in ((in_chunks, (enc, hd)), (one_graph, copy.deepcopy((enc, hd)))):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = encode(e, x)
            loss = F.cross_entropy(h(features).logits.float() if autocast else h(features).logits, torch.tensor([1]))
        (scale * loss).backward()
        buffers = [b.double().flatten() for b in e.buffers()]
        found.append((features, gradients(e, h), torch.cat(buffers) if buffers else torch.zeros(1), torch.rand(1)))
    return found


# The same as one graph


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", HEADS)
def test_exact(norm, dropout, name):
    ours, exact = steps(encoder(norm, dropout), head(name), images())
    assert torch.equal(ours[0], exact[0])
    assert_close(ours[1], exact[1], 1e-14)
    assert torch.equal(ours[2], exact[2]), "running statistics are counted once"
    assert torch.equal(ours[3], exact[3]), "the generator is where it would be"


@needs_extension
def test_before_an_accelerated_model():
    torch.manual_seed(2)
    model = upstream_models.ClamSB(sizes=(WIDTH, 16, 8)).eval()
    found = []
    for encode, m in ((in_chunks, accelerated(model)), (one_graph, model)):
        enc = encoder(dtype=torch.float32)
        m(encode(enc, images(dtype=torch.float32)))[0].sum().backward()
        found.append(gradients(enc))
    assert_close(*found, 1e-5)


def test_exact_against_one_batch_of_all():
    """Where no statistics are taken of a batch, chunks do not matter."""
    enc, x = encoder("group"), images()
    other = copy.deepcopy(enc)
    milkernels.softmax_pool(f := in_chunks(enc, x, 7), f[:, :1]).bag.square().sum().backward()
    milkernels.softmax_pool(f := other(x), f[:, :1]).bag.square().sum().backward()
    assert_close(gradients(enc), gradients(other), 1e-13)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_single_precision(scale):
    ours, exact = steps(
        encoder("batch", 0.3, torch.float32), head(dtype=torch.float32), images(dtype=torch.float32), scale=scale
    )
    assert torch.equal(ours[0], exact[0])
    assert_close(ours[1], exact[1], 1e-6)


def test_autocast_is_that_of_the_forward_and_more_exact():
    """One graph adds up gradients of its cached bfloat16 weights in bfloat16; chunks add them up in float32."""
    enc, x = encoder("none", dtype=torch.float32), images(200, torch.float32)
    exact = copy.deepcopy(enc).double()
    exact(x.double()).square().sum().backward()
    errors = []
    for encode in (in_chunks, one_graph):
        e = copy.deepcopy(enc)
        with torch.autocast("cpu", torch.bfloat16):
            features = encode(e, x, 1)
        features.float().square().sum().backward()  # outside of the block
        assert features.dtype == torch.bfloat16
        errors.append(((gradients(e) - gradients(exact)).norm() / gradients(exact).norm()).item())
    assert errors[0] < 0.7 * errors[1] and errors[0] < 0.01


def test_weights_cast_by_autocast_are_not_shared():
    """A later call in the block finds no weights that no graph knows, and a backward in it none of another chunk."""
    enc, x = encoder(dtype=torch.float32), images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        in_chunks(enc, x).sum().backward()
        enc.zero_grad()
        enc(x[:4]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in enc[0].parameters())


def test_weights_that_change_in_an_autocast_block_are_cast_again():
    enc, x, found = encoder(dtype=torch.float32), images(dtype=torch.float32), []
    with torch.autocast("cpu", torch.bfloat16):
        in_chunks(enc, x).sum().backward()
        with torch.no_grad():
            enc[0].weight.mul_(-2)
        found.append(in_chunks(enc, x))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(in_chunks(enc, x))
    assert torch.equal(*found)


def test_grad_scaler():
    models, x = [encoder(dtype=torch.float32)], images(dtype=torch.float32)
    models.append(copy.deepcopy(models[0]))
    for model, scaler in zip(models, (torch.amp.GradScaler("cpu", init_scale=1024.0), None), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loss = in_chunks(model, x).square().sum()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for scaled, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(scaled, plain, 1e-6)


@pytest.mark.parametrize("what", ["once", "twice", "kept graph", "with plain"])
def test_calls_add_up(what):
    enc, x, more = encoder("batch"), images(), images(20, seed=5)
    other = copy.deepcopy(enc)
    if what == "once":
        in_chunks(enc, x).square().sum().backward()
        one_graph(other, x).square().sum().backward()
    elif what == "twice":
        (in_chunks(enc, x).square().sum() + in_chunks(enc, more).sum()).backward()
        (one_graph(other, x).square().sum() + one_graph(other, more).sum()).backward()
    elif what == "kept graph":
        loss = in_chunks(enc, x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        (2 * one_graph(other, x).square().sum()).backward()
    else:  # the restored buffers are saved by the plain graph
        (enc(more).sum() + in_chunks(enc, x).square().sum()).backward()
        (other(more).sum() + one_graph(other, x).square().sum()).backward()
    assert_close(gradients(enc), gradients(other), 1e-13)
    assert all(torch.equal(a, b) for a, b in zip(enc.buffers(), other.buffers(), strict=True))


def test_a_head_may_write_into_the_features():
    enc = encoder()
    other = copy.deepcopy(enc)
    in_chunks(enc, images()).relu_().square().sum().backward()
    one_graph(other, images()).relu().square().sum().backward()
    assert_close(gradients(enc), gradients(other), 1e-13)


def test_frozen_and_unused_parameters():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = encoder(), nn.Linear(2, 2)
            self.body[0].requires_grad_(False)

        def forward(self, x):
            return self.body(x)

    model, other = Half(), Half()
    in_chunks(model, images()).square().sum().backward()
    one_graph(other, images()).square().sum().backward()
    for (name, ours), exact in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (exact.grad is None), name
        assert ours.grad is None or torch.allclose(ours.grad, exact.grad, rtol=1e-12, atol=0), name


def test_one_tensor_given_to_two_parameters_is_not_summed_into():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(6, dtype=torch.float64)) for _ in range(2))

        def forward(self, x):
            return x + (self.a + self.b)

    model = Two()
    x = torch.randn(10, 6, dtype=torch.float64)
    encode_in_chunks(model, lambda a, b: x[a:b], 10, 3).sum().backward()
    assert model.a.grad.tolist() == model.b.grad.tolist() == [10.0] * 6


def test_half_parameters_are_summed_in_single_precision():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, x):
            return x * self.weight

    model, x = Scale(), torch.ones(1000, 1, dtype=torch.bfloat16)
    encode_in_chunks(model, lambda a, b: x[a:b], 1000, 1).sum().backward()
    assert model.weight.grad.item() == 1000.0  # one by one in bfloat16 these are 256


# What is encoded again


def test_patches_without_gradient_are_not_encoded_again():
    enc, x, loaded = encoder(), images(), []
    other = copy.deepcopy(enc)

    def load(a, b):
        loaded.append((a, b))
        return x[a:b]

    classifier = torch.ones(2, WIDTH, dtype=torch.float64) * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    milkernels.instance_max(encode_in_chunks(enc, load, COUNT, 5), classifier).values.sum().backward()
    milkernels.instance_max(other(x), classifier).values.sum().backward()
    assert len(loaded) in (COUNT // 5 + 1, COUNT // 5 + 2), "of two classes two chunks at most"
    assert_close(gradients(enc), gradients(other), 1e-13)


@pytest.mark.parametrize(
    ("value", "again"), [(0.0, 0), (-0.0, 0), (1e-45, 1), (1e-30, 1), (math.nan, 1), (math.inf, 1)]
)
def test_zero_means_zero(value, again):
    """Not a norm of 0, which squares of small numbers have."""
    enc, x, loaded = encoder(dtype=torch.float32), images(dtype=torch.float32), []
    features = encode_in_chunks(enc, lambda a, b: loaded.append(a) or x[a:b], COUNT, CHUNK)
    g = torch.zeros_like(features)
    g[20, 3] = value
    del loaded[:]
    features.backward(g)
    assert loaded == [16][:again]
    assert all(p.grad is not None for p in enc.parameters())
    assert math.isnan(value) == any(p.grad.isnan().any() for p in enc.parameters()) or value == math.inf


def test_augmentation_is_repeated_and_other_graphs_are_not_disturbed():
    enc, x = encoder(dropout=0.5), images()
    found = []

    def load(a, b):
        return x[a:b] + torch.randn_like(x[a:b])

    for chunked in (True, False):
        e = copy.deepcopy(enc)
        torch.manual_seed(4)
        if chunked:
            features = encode_in_chunks(e, load, COUNT, CHUNK)
        else:
            features = torch.cat([e(load(a, min(COUNT, a + CHUNK))) for a in range(0, COUNT, CHUNK)])
        features.square().sum().backward()
        found += [gradients(e), torch.rand(1)]
    assert_close(found[0], found[2], 1e-13)
    assert torch.equal(found[1], found[3])


# Forms of arguments


def test_memory_is_that_of_a_chunk():
    enc = encoder(dtype=torch.float32)
    peaks = []
    for count in (64, 512):
        x = images(count, torch.float32)

        def step(x=x):
            in_chunks(enc, x, 16).square().sum().backward()

        step()
        peaks.append(allocator_peak(step) - 4 * 4 * count * WIDTH)  # the features, their gradient and the squares'
    graph = allocator_peak(lambda: one_graph(enc, x, 16).square().sum().backward())
    assert peaks[1] < 1.1 * peaks[0] and graph > 5 * peaks[1], (peaks, graph)


def test_nothing_is_kept_without_gradients():
    enc, x = encoder(), images()
    with torch.no_grad():
        features = in_chunks(enc, x)
    assert not features.requires_grad and torch.equal(features, one_graph(enc, x))
    with torch.inference_mode():
        assert torch.equal(in_chunks(enc, x), features)
    assert not in_chunks(enc.requires_grad_(False), x).requires_grad


@pytest.mark.parametrize("store", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_in_a_narrower_type(store):
    enc = encoder()
    other = copy.deepcopy(enc)
    features = in_chunks(enc, images(), store=store)
    rounded = one_graph(other, images()).to(store)
    assert features.dtype == store and torch.equal(features, rounded)
    features.double().square().sum().backward()
    rounded.double().square().sum().backward()
    assert_close(gradients(enc), gradients(other), 1e-13)


def test_no_patches():
    """A rank without rows of a bag has a gradient of 0, and no statistics."""
    enc = encoder("batch")
    features = in_chunks(enc, images(0))
    assert features.shape == (0, WIDTH) and features.requires_grad
    head("abmil")(features).logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in enc.parameters())
    assert all(b.isfinite().all() for b in enc.buffers()) and enc[1].num_batches_tracked == 0


def test_patches_in_any_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = encoder()

        def forward(self, batch):
            return (self.body(batch["image"]) * batch["scale"][:, None]).unflatten(1, (3, 4))

    model, x, scale = Two(), images(), torch.arange(COUNT, dtype=torch.float64)
    features = encode_in_chunks(model, lambda a, b: {"image": x[a:b], "scale": scale[a:b]}, COUNT, CHUNK)
    assert features.shape == (COUNT, 3, 4)
    features.sum().backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    other({"image": x, "scale": scale}).sum().backward()
    assert_close(gradients(model), gradients(other), 1e-13)


@pytest.mark.slow
def test_compiled_encoders_and_compiled_callers():
    enc, x = encoder(dtype=torch.float32), images(48, torch.float32)
    other = copy.deepcopy(enc)
    compiled = torch.compile(enc, backend="aot_eager")

    @torch.compile(backend="aot_eager")
    def step(x):
        return in_chunks(compiled, 2 * x).square().sum()

    step(x).backward()
    one_graph(other, 2 * x).square().sum().backward()
    assert_close(gradients(enc), gradients(other), 1e-5)


def test_backward_in_another_thread():
    enc, x = encoder(dropout=0.3), images()
    loss = in_chunks(enc, x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(p.grad.any() for p in enc.parameters())


# What must not happen in between


def test_parameters_that_changed():
    enc = encoder()
    loss = in_chunks(enc, images()).sum()
    with torch.no_grad():
        enc[4].weight.mul_(2)
    with pytest.raises(RuntimeError, match="must not change between forward and backward.*changed: 4.weight"):
        loss.backward()
    assert all(p.grad is None for p in enc.parameters())


def test_parameters_that_were_replaced():
    enc = encoder()
    loss = in_chunks(enc, images()).sum()
    enc[4].bias = nn.Parameter(enc[4].bias.detach().clone())
    with pytest.raises(RuntimeError, match="changed: 4.bias"):
        loss.backward()


def test_an_optimizer_may_step_over_other_parameters():
    enc, hd = encoder(), head()
    loss = in_chunks(enc, images()).sum()
    with torch.no_grad():
        hd.classifier.weight.mul_(2)
    loss.backward()


def test_modes_that_changed():
    enc = encoder(dropout=0.5)
    loss = in_chunks(enc, images()).sum()
    enc.eval()
    with pytest.raises(RuntimeError, match="switch between training and evaluation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_other_patches_the_second_time(dtype):
    enc, x = encoder("batch", dtype=dtype), images(dtype=dtype)
    order = [list(range(COUNT))]
    features = encode_in_chunks(enc, lambda a, b: x[order[0][a:b]], COUNT, CHUNK)
    statistics = [b.clone() for b in enc.buffers()]
    order[0] = order[0][::-1]
    with pytest.raises(RuntimeError, match="other ones in the backward than in the forward"):
        features.square().sum().backward()
    assert all(p.grad is None for p in enc.parameters())
    assert all(torch.equal(a, b) for a, b in zip(enc.buffers(), statistics, strict=True))


def test_a_loader_that_fails_leaves_everything_as_it_was():
    enc, x, calls = encoder("batch", 0.3), images(), []

    def load(a, b):
        calls.append(a)
        if len(calls) == 6:
            raise OSError("the disk is gone")
        return x[a:b]

    loss = encode_in_chunks(enc, load, COUNT, CHUNK).square().sum()
    state, statistics = torch.get_rng_state(), [b.clone() for b in enc.buffers()]
    with pytest.raises(OSError, match="the disk is gone"):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in enc.parameters())
    assert all(torch.equal(a, b) for a, b in zip(enc.buffers(), statistics, strict=True))


def test_only_once_differentiable():
    enc = encoder("none")
    (g,) = torch.autograd.grad(in_chunks(enc, images()).square().sum(), enc[4].bias, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# Wrong arguments


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.weight, self.what = nn.Parameter(torch.ones(1)), what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"encoder": lambda x: x}, TypeError, "encoder must be a torch.nn.Module; got function"),
        ({"load": torch.ones(3)}, TypeError, "load must be a function of a start and an end; got Tensor"),
        ({"count": 2.0}, TypeError, "count must be an int; got float"),
        ({"count": True}, TypeError, "count must be an int; got bool"),
        ({"count": -1}, ValueError, "count must be at least 0; got -1"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1; got 0"),
        ({"chunk": None}, TypeError, "chunk must be an int; got NoneType"),
        ({"store": torch.int8}, TypeError, "store must be a floating-point type or None; got torch.int8"),
        ({"store": "half"}, TypeError, "store must be a floating-point type or None; got 'half'"),
        ({"encoder": Returns(lambda x: (x, x))}, TypeError, "encoder must return a tensor, the features; got tuple"),
        ({"encoder": Returns(lambda x: x.long())}, TypeError, "floating-point features; got torch.int64"),
        (
            {"encoder": Returns(lambda x: x[1:])},
            ValueError,
            r"a row for each patch in \[0, 16\); got shape \(15, 3, 12",
        ),
        ({"encoder": Returns(lambda x: x.sum())}, ValueError, r"got shape \(\)"),
        ({"encoder": Returns(lambda x: x.flatten(1)[:, : len(x)])}, ValueError, "one kind of features; got"),
        ({"load": lambda a, b: images().requires_grad_()[a:b]}, ValueError, "load must give patches that need no grad"),
    ],
)
def test_wrong_arguments(change, error, said):
    x = images()
    arguments = {"encoder": encoder(), "load": lambda a, b: x[a:b], "count": COUNT, "chunk": CHUNK} | change
    with pytest.raises(error, match=said):
        encode_in_chunks(**arguments)


def test_the_example_of_the_docstring():
    done = doctest.testmod(importlib.import_module("milkernels.encoding"))
    assert done.attempted and not done.failed


@pytest.mark.slow
@pytest.mark.parametrize("command", ["encoder", "ranks"])
def test_benchmarks_run(command):
    call = [sys.executable, "-m", f"benchmarks.{command}", "--quick"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "median of 1 interleaved rounds" in done.stdout
