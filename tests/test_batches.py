"""`Bags` as a batch: features that lie in files, and what training frameworks ask of it."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from milkernels import Bags, collate_bags
from milkernels.nn import ABMIL

numpy = pytest.importorskip("numpy")


# Files


silent = pytest.mark.filterwarnings("error")  # PyTorch warns where it reads row by row, or could write


class OpenDataSet:
    """As those of h5py are: it can be indexed, and is an array when asked for one."""

    def __init__(self, array):
        self.array, self.shape, self.ndim, self.reads = array, array.shape, array.ndim, 0

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        self.reads += 1
        return self.array[index]

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return self.array


def rows(n=6):
    return numpy.arange(2 * n, dtype=numpy.float32).reshape(n, 2)


@silent
def test_an_open_data_set_is_read_once():
    features, coords, other = (OpenDataSet(rows()) for _ in range(3))
    bags, rest = collate_bags([(features, coords, other)], per_instance={1: "coords"})
    assert torch.equal(bags.values, torch.from_numpy(rows())) and torch.equal(bags.extras["coords"], bags.values)
    assert torch.equal(rest[0], bags.values)
    assert features.reads == coords.reads == other.reads == 1
    assert torch.equal(collate_bags([features]).values, bags.values)


@silent
@pytest.mark.parametrize("library", ["h5py", "zarr"])
def test_data_sets_of_files(library, tmp_path):
    if library == "h5py":
        file = pytest.importorskip("h5py").File(tmp_path / "slide.h5", "w")
        file["features"] = rows()
    else:
        file = {"features": pytest.importorskip("zarr").array(rows())}
    bags, labels = collate_bags([(file["features"], 0), (file["features"], 1)])
    assert torch.equal(bags.values, torch.from_numpy(rows()).repeat(2, 1)) and labels.tolist() == [0, 1]


@silent
@pytest.mark.parametrize("mode", ["r", "c"])
def test_memory_maps(mode, tmp_path):
    numpy.save(tmp_path / "slide.npy", rows())
    bags = collate_bags([numpy.load(tmp_path / "slide.npy", mmap_mode=mode)])
    bags.values.add_(1)  # a tensor of a map that must only be read would end the process
    assert torch.equal(bags.values, torch.from_numpy(rows() + 1))
    assert (numpy.load(tmp_path / "slide.npy") == rows()).all()


def test_what_is_no_array_of_numbers():
    class Lazy:
        shape = (6, 2)

    for item, message in (
        (Lazy(), r"0 of sample 0 must be a tensor or an array; got Lazy; read it by \[:\]"),
        (numpy.array([["a", "b"]]), "0 of sample 0 must be an array of numbers; got <U1"),
        (rows().astype(">f4"), "0 of sample 0 must be an array of numbers; got >f4"),
    ):
        with pytest.raises(TypeError, match=message):
            collate_bags([(item, 0)])
    with pytest.raises(TypeError, match="1 of sample 0 must be an array of numbers"):
        collate_bags([(rows(), numpy.array(["a", "b"]))])


# Frameworks


LENGTHS = (5, 1, 3)
BATCH = Bags.from_list([torch.randn(n, 4) for n in LENGTHS])


def test_bags_are_iterated_one_by_one():
    assert len(BATCH) == 3 and [len(bag) for bag in BATCH] == list(LENGTHS)
    assert all(torch.equal(a, b) for a, b in zip(BATCH, BATCH.to_list(), strict=True))


@pytest.mark.parametrize(
    "batch",
    [
        (BATCH, torch.zeros(3)),
        [BATCH, torch.zeros(3)],
        {"features": BATCH, "label": torch.zeros(3), "slide": ["a", "b", "c"]},
        {"label": torch.zeros(3), "features": BATCH},
    ],
)
def test_lightning_counts_bags(batch):
    data = pytest.importorskip("pytorch_lightning.utilities.data")
    assert data.extract_batch_size(batch) == 3


def test_lightning_asks_for_the_size_of_bags_alone():
    """They have no number of bags that it would find, and it does not guess."""
    data = pytest.importorskip("pytorch_lightning.utilities.data")
    with pytest.raises(Exception, match=r"self.log\(..., batch_size=batch_size\)"):
        data.extract_batch_size(BATCH)


def test_the_mean_over_an_epoch_of_lightning(tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    samples = [(torch.full((n, 4), float(i)), torch.tensor(float(i))) for i, n in enumerate((50, 1, 1, 1, 30))]

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.seen = ABMIL(4, 1, embed_dim=None, hidden_dim=3), []

        def training_step(self, batch, _):
            bags, labels = batch
            self.log("label", labels.mean(), on_epoch=True, on_step=False)
            self.seen.append(len(bags))
            return nn.functional.mse_loss(self.model(bags).logits[:, 0], labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    model = Model()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_model_summary=False, **options)
    trainer.fit(model, DataLoader(samples, batch_size=2, collate_fn=collate_bags))
    assert model.seen == [2, 2, 1]
    assert trainer.callback_metrics["label"].item() == pytest.approx(2.0)  # the mean of 0 to 4, each bag once
