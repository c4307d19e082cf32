"""The modules, and models that were accelerated, under what people train with: mixed precision, export, checkpointing,
data parallel processes, Lightning, checkpoints on disk."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
import torch.distributed as dist
import upstream_models
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import milkernels
from milkernels import Bags, collate_bags
from milkernels.nn import ABMIL, DSMILModel, LossAttentionModel
from milkernels.testing import error_promise

DIM, CLASSES = 24, 2
LENGTHS = (70, 1, 33, 150)


class Ragged(nn.Module):
    """One of our models from rows and offsets to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return self.model(x, offsets).logits


class EachBag(nn.Module):
    """A model for one bag at a time, as the upstream code bases have them, over all bags."""

    def __init__(self, model: nn.Module, logits):
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        bags = torch.tensor_split(x, offsets[1:-1])
        return torch.cat([self.logits(self.model(bag)) for bag in bags])


def _clam():
    model = upstream_models.ClamSB(n_classes=CLASSES, sizes=(DIM, 32, 16))
    return EachBag(model, lambda out: out[0])


def _milnet():
    instances = upstream_models.FCLayer(DIM, CLASSES)
    model = upstream_models.MILNet(instances, upstream_models.BClassifier(DIM, CLASSES, units=16))
    return EachBag(model, lambda out: out[1] + out[0].amax(0))  # its authors train both streams


OURS = {
    "ABMIL": lambda: Ragged(ABMIL(DIM, CLASSES, embed_dim=32, hidden_dim=16, heads=2)),
    "DSMILModel": lambda: Ragged(DSMILModel(DIM, CLASSES, query_dim=16, value="linear", nonlinear_query=False)),
    "LossAttentionModel": lambda: Ragged(LossAttentionModel(DIM, CLASSES, hidden_dims=(32, 16))),
}
THEIRS = {"CLAM": _clam, "MILNet": _milnet}
MODELS = OURS | THEIRS


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]()
    if name in THEIRS:
        assert milkernels.accelerate(model, min_instances=0).changed
    return model


def bags(seed: int = 0, lengths=LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), DIM, generator=generator).relu()
    return x, torch.tensor([0, *torch.tensor(lengths).cumsum(0)])


LABELS = torch.tensor([0, 1, 1, 0])


def step(model: nn.Module, x: Tensor, offsets: Tensor, labels: Tensor = LABELS, **autocast) -> dict[str, Tensor]:
    """Logits and the gradients of the loss."""
    model.zero_grad()
    with torch.autocast("cpu", **autocast) if autocast else contextlib.nullcontext():
        logits = model(x, offsets)
        loss = nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    gradients = {f"grad_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def reference_step(model: nn.Module, x: Tensor, offsets: Tensor, **autocast) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    milkernels.restore(model)
    with milkernels.use_backend("reference"):
        return step(model, x, offsets, **autocast)


def _holds(ours: list[dict], eager: list[dict], exact: list[dict], dtype: torch.dtype) -> None:
    """The error promise over several seeds.  Gradients that are 0 in exact arithmetic (of score biases) are left out:
    what is left of them is rounding, in both."""
    joined = [
        {k: torch.cat([r[k].double().flatten() for r in results]) for k in exact[0]} for results in (eager, exact)
    ]
    zero = {k for k, t in joined[1].items() if t.norm() < 1e-9}
    for results in (eager, exact, ours):
        assert set(results[0]) == set(exact[0])
    stacked = {k: torch.cat([r[k].flatten() for r in ours]) for k in exact[0] if k not in zero}
    eager, exact = ({k: t for k, t in results.items() if k not in zero} for results in joined)
    promise = error_promise(stacked, eager, exact, dtype)
    assert promise.ok, promise.broken()


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", ["float32 features", "half features"])
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name, features, dtype):
    """float32 parameters, products in a half type; features in float32, or stored in that half type."""
    results = ([], [], [])
    for seed in range(4):
        model, (x, offsets) = make(name, seed), bags(seed)
        x = x.to(dtype) if features == "half features" else x
        results[0].append(step(model, x, offsets, dtype=dtype))
        results[1].append(reference_step(model, x, offsets, dtype=dtype))
        results[2].append(reference_step(copy.deepcopy(model).double(), x.to(dtype).double(), offsets))
        assert all(g.dtype == torch.float32 for k, g in results[0][-1].items() if k != "logits")
    assert results[0][0]["logits"].dtype == results[1][0]["logits"].dtype
    _holds(*results, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ABMIL", "DSMILModel", "LossAttentionModel"])
def test_half_features_without_autocast(name, dtype):
    """What eager layers refuse: features stored in half go into a pooling with float32 parameters."""
    torch.manual_seed(0)
    pool = {
        "ABMIL": milkernels.nn.AttentionPool(DIM, 16),
        "DSMILModel": milkernels.nn.DSMIL(DIM, CLASSES, 16),
        "LossAttentionModel": milkernels.nn.LossAttention(DIM, CLASSES),
    }[name]
    x, offsets = bags()
    narrow, wide = pool(x.to(dtype), offsets), pool(x.to(dtype).float(), offsets)
    assert narrow.bag.dtype == torch.float32
    torch.testing.assert_close(narrow.bag, wide.bag, rtol=0, atol=0.02 * wide.bag.abs().max().item())
    narrow.bag.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in pool.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_grad_scaler(name):
    """Scaled gradients are the scale times the gradients; a step with overflow is skipped and the scale falls."""
    model, (x, offsets) = make(name), bags()
    plain = step(model, x, offsets, dtype=torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for overflow in (False, True):
        model.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x, offsets).float(), LABELS) * (float("inf") if overflow else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if not overflow:
            for key, p in model.named_parameters():
                if p.grad is not None and plain[f"grad_{key}"].norm() > 1e-5:
                    torch.testing.assert_close(p.grad, plain[f"grad_{key}"], rtol=0.02, atol=2e-4)
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert moved is not overflow
    assert scaler.get_scale() == 2.0**9


# Graphs


@pytest.mark.parametrize("name", OURS)
def test_compile_without_graph_breaks_for_any_bags(name):
    model = make(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (LENGTHS, (5, 90, 2, 7)):
        x, offsets = bags(lengths=lengths)
        ours, eager = step(compiled, x, offsets), step(model, x, offsets)
        torch.testing.assert_close(list(ours.values()), list(eager.values()))


@pytest.mark.parametrize("name", OURS)
def test_export_for_any_number_of_instances(name):
    model, (x, offsets) = make(name).eval(), bags()
    rows = torch.export.Dim("rows", min=2, max=10_000)
    program = torch.export.export(model, (x, offsets), dynamic_shapes=({0: rows}, None))
    assert any("milkernels" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for lengths in (LENGTHS, (5, 90, 2, 7)):
        x, offsets = bags(lengths=lengths)
        torch.testing.assert_close(loaded(x, offsets), model(x, offsets))


def test_export_of_an_accelerated_model():
    model = make("CLAM").model.eval()
    (x, _), rows = bags(), torch.export.Dim("rows", min=2, max=10_000)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    assert any("milkernels" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x[:57])[0], model(x[:57])[0])


# Training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_drops_the_same_units(name, reentrant):
    model, (x, offsets) = make(name), bags()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.4
        if isinstance(module, milkernels.nn.AttentionPool):
            module.dropout = 0.4
    results = []
    for through in (False, True):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        logits = checkpoint(model, leaf, offsets, use_reentrant=reentrant) if through else model(leaf, offsets)
        nn.functional.cross_entropy(logits, LABELS).backward()
        results.append([logits.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _train_in_parallel(rank: int, name: str, address: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        model = make(name)
        unused = name == "CLAM"  # its instance classifiers
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        x, offsets = bags()
        half = slice(0, offsets[2]) if rank == 0 else slice(offsets[2], None)
        share = offsets[:3] if rank == 0 else offsets[2:] - offsets[2]
        logits = parallel(x[half], share)
        nn.functional.cross_entropy(logits, LABELS[2 * rank : 2 * rank + 2]).backward()
        torch.save({k: p.grad for k, p in model.named_parameters()}, f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ABMIL", "CLAM"])
def test_two_processes_average_their_gradients(name, tmp_path):
    address = f"file://{tmp_path}/rendezvous"
    torch.multiprocessing.spawn(_train_in_parallel, (name, address, str(tmp_path)), nprocs=2)
    alone = step(make(name), *bags())  # the mean over four bags is that of the means over two
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for key, gradient in got.items():
            if gradient is not None:
                torch.testing.assert_close(gradient, alone[f"grad_{key}"], rtol=1e-4, atol=1e-6)


class KeyInstances(torch.utils.data.Dataset):
    """Bags of noise; in those of class 1 a few instances lie elsewhere."""

    def __init__(self, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.samples = []
        for i in range(size):
            x = torch.randn(int(torch.randint(5, 60, (), generator=generator)), DIM, generator=generator)
            x[: 3 * (i % 2)] += 2.0
            self.samples.append((x, i % 2))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int):
        return self.samples[i]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["ABMIL", "CLAM"])
def test_lightning_trains_to_right_answers(name, precision, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make(name)

        def training_step(self, batch: tuple[Bags, Tensor], _):
            bags, labels = batch
            return nn.functional.cross_entropy(self.model(bags.values, bags.offsets).float(), labels)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=5e-3)

    def loader(seed: int, **options) -> DataLoader:
        return DataLoader(KeyInstances(64, seed), batch_size=16, collate_fn=collate_bags, **options)

    lightning.seed_everything(0)
    training = Training()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about loggers, workers and the like
        trainer = lightning.Trainer(
            max_epochs=12,
            accelerator="cpu",
            precision=precision,
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(training, loader(1, shuffle=True))
    training.eval()
    with torch.no_grad():
        right = [training.model(b.values, b.offsets).argmax(1) == labels for b, labels in loader(2)]
    assert torch.cat(right).float().mean() > 0.9
    (path,) = tmp_path.rglob("*.ckpt")
    again = make(name, seed=3)
    state = torch.load(path, weights_only=True)["state_dict"]
    again.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    x, offsets = bags()
    torch.testing.assert_close(again.eval()(x, offsets), training.model(x, offsets))


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_on_disk(name):
    """Weights alone go to disk and come back, between accelerated and untouched models as well."""
    model, (x, offsets) = make(name).eval(), bags()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = MODELS[name]().eval()
    assert list(state) == list(fresh.state_dict())
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x, offsets), model(x, offsets))
