"""Feature files in every format, what is wrong with them, and batches of whole bags."""

import os
import pickle
import sys
import warnings
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from milkernels import Bags
from milkernels.data import BagBatchSampler, FeatureFolder, read_bag

np = pytest.importorskip("numpy")
h5py = pytest.importorskip("h5py")

WIDTH = 6
DTYPES = [torch.float16, torch.float32, torch.float64]


def features(rows=5, dtype=torch.float32, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coords(rows=5):
    return torch.arange(2 * rows).view(rows, 2)


def write_h5(path, arrays, **options):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=np.asarray(array), **options)


def write_zarr(path, arrays):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(path), mode="w")
    for name, array in arrays.items():
        group.create_array(name, data=np.ascontiguousarray(array))


WRITERS = {
    "dict.pt": lambda path, arrays: torch.save(arrays, path),
    "old.pt": lambda path, arrays: torch.save(arrays, path, _use_new_zipfile_serialization=False),
    "contiguous.h5": write_h5,
    "chunked.h5": lambda path, arrays: write_h5(path, arrays, chunks=True, compression="gzip"),
    "upper.H5": write_h5,
    "a.hdf5": write_h5,
    "a.npz": lambda path, arrays: np.savez(path, **{k: v.numpy() for k, v in arrays.items()}),
    "packed.npz": lambda path, arrays: np.savez_compressed(path, **{k: v.numpy() for k, v in arrays.items()}),
    "a.zarr": write_zarr,
}
ALONE = {
    "a.pt": lambda path, x: torch.save(x, path),
    "a.pth": lambda path, x: torch.save(x, path),
    "a.npy": lambda path, x: np.save(path, x.numpy()),
    "fortran.npy": lambda path, x: np.save(path, np.asfortranarray(x.numpy())),
    "swapped.npy": lambda path, x: np.save(path, x.numpy().astype(x.numpy().dtype.newbyteorder(">"))),
    "unnamed.npz": lambda path, x: np.savez(path, x.numpy()),
}


# Files


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [False, True], ids=["[n, L]", "[1, n, L]"])
@pytest.mark.parametrize("name", WRITERS)
def test_formats_with_names(name, leading, dtype, tmp_path):
    x, at = features(dtype=dtype), coords()
    arrays = {"coords": at, "features": x, "other": torch.zeros(3)}
    WRITERS[name](tmp_path / name, {k: v[None] if leading else v for k, v in arrays.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bag = read_bag(str(tmp_path / name))
    assert list(bag) == ["features", "coords"] and bag["features"].dtype == dtype
    assert torch.equal(bag["features"], x) and torch.equal(bag["coords"], at)
    assert list(read_bag(tmp_path / name, extras=())) == ["features"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALONE)
def test_formats_without_names(name, dtype, tmp_path):
    x = features(dtype=dtype)
    for given in (x, x[None]):
        ALONE[name](tmp_path / name, given)
        bag = read_bag(tmp_path / name)
        assert list(bag) == ["features"] and torch.equal(bag["features"], x) and bag["features"].dtype == dtype


def test_bfloat16_of_pt(tmp_path):
    x = features(dtype=torch.bfloat16)
    torch.save({"feats": x, "level": x[:, 0]}, tmp_path / "a.pt")
    bag = read_bag(tmp_path / "a.pt", features="feats", extras=["level"])
    assert torch.equal(bag["features"], x) and torch.equal(bag["level"], x[:, 0])


def pages_of(path):
    """Whether this process has mapped the file."""
    return any(line.rstrip().endswith(str(path)) for line in open("/proc/self/maps"))


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
@pytest.mark.parametrize("name", ["a.pt", "dict.pt", "a.npy", "contiguous.h5"])
def test_files_are_mapped_and_not_written(name, tmp_path):
    path, x = tmp_path / name, features(200)
    if name in ALONE:
        ALONE[name](path, x)
    else:
        WRITERS[name](path, {"features": x, "coords": coords(200)})
    before = path.read_bytes()
    bag = read_bag(path)
    assert pages_of(path)
    bag["features"].zero_()
    assert path.read_bytes() == before and torch.equal(read_bag(path)["features"], x)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def broken(path, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_bag(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [*WRITERS, *ALONE])
def test_truncated_files_are_named(name, tmp_path):
    path = tmp_path / name
    if name == "a.zarr":
        pytest.skip("a folder")
    if name in ALONE:
        ALONE[name](path, features(300))
    else:
        WRITERS[name](path, {"features": features(300), "coords": coords(300)})
    whole = path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        assert "0 bytes" in broken(path) or share
    path.write_bytes(os.urandom(500))
    broken(path)


def test_what_is_wrong_with_a_file(tmp_path):
    pt = tmp_path / "a.pt"
    assert "is not there" in broken(tmp_path / "none.h5")
    (tmp_path / "a.txt").write_text("1 2 3")
    assert "must be one of .pt" in broken(tmp_path / "a.txt")
    for content, said in [
        (features(0), r"is empty.*\[0, 6\]"),
        (features()[0], "is no bag"),
        (features().expand(2, 5, WIDTH), r"is no bag.*got shape \[2, 5, 6\]"),
        ({"feats": features()}, r"no array 'features' among \['feats'\]"),
        ({"features": "text"}, "no array 'features'"),
        ([features()], "no array"),
        (features().long(), "floating-point; got torch.int64"),
        (features().to_sparse(), "dense"),
        ({"features": features(), "coords": coords(4)}, r"'coords' must have a row for each of 5.*\[4, 2\]"),
    ]:
        torch.save(content, pt)
        with pytest.raises(ValueError, match=said):
            read_bag(pt)
        broken(pt)
    torch.save(features(), pt)
    assert "no array 'coords'" in broken(pt, extras=["coords"])
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    assert "numbers that PyTorch knows" in broken(tmp_path / "words.npy")
    np.save(tmp_path / "objects.npy", np.array([[{}]]), allow_pickle=True)
    broken(tmp_path / "objects.npy")


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_does_not_run(new, tmp_path):
    evil = Evil(tmp_path / "made")
    torch.save({"features": evil}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    assert "could run code" in broken(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(evil))
    broken(tmp_path / "b.pt")
    assert not evil.path.exists()


def test_what_is_missing_is_asked_for(tmp_path, monkeypatch):
    write_h5(tmp_path / "a.h5", {"features": features()})
    (tmp_path / "a.zarr").mkdir()
    for name, installed_by in (("h5py", r"milkernels\[data\]"), ("zarr", "zarr")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"needs {name}: pip install {installed_by};"):
            read_bag(tmp_path / f"a.{name.replace('5py', '5')}")


# Folders


LENGTHS = (7, 3, 12, 1, 5)


@pytest.fixture
def root(tmp_path):
    for i, length in enumerate(LENGTHS):
        arrays = {"features": features(length, torch.float16, i), "coords": coords(length)}
        write = write_h5 if i % 2 else WRITERS["dict.pt"]
        write(tmp_path / f"slide.{i}{'.h5' if i % 2 else '.pt'}", arrays)
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "thumbnails").mkdir()
    (tmp_path / "._slide.0.pt").write_text("what other systems leave")
    return tmp_path


def test_a_folder_without_labels(root):
    folder = FeatureFolder(root)
    assert folder.names == [f"slide.{i}" for i in range(5)] and len(folder) == 5
    assert (folder.width, folder.dtype, folder.extras) == (WIDTH, torch.float16, ("coords",))
    assert folder.lengths == list(LENGTHS)
    for i, sample in enumerate(folder):
        assert set(sample) == {"features", "coords", "name"} and sample["name"] == folder.names[i]
        assert torch.equal(sample["features"], features(LENGTHS[i], torch.float16, i))
        if i == 4:
            break
    with pytest.raises(IndexError):
        folder[5]


def test_labels_choose_the_files(root):
    folder = FeatureFolder(root, {"slide.3": 1, "slide.0": 0}, extras=())
    assert folder.names == ["slide.3", "slide.0"] and folder.lengths == [1, 7]
    batch = folder.collate([folder[0], folder[1]])
    assert isinstance(batch["features"], Bags) and batch["label"].tolist() == [1, 0] and not batch["features"].extras
    assert batch["name"] == ["slide.3", "slide.0"]


def test_what_is_wrong_with_a_folder(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder; got"):
        FeatureFolder(root / "none")
    with pytest.raises(ValueError, match="no feature files"):
        FeatureFolder(root / "thumbnails")
    with pytest.raises(FileNotFoundError, match="no file of 2 slides: a, b"):
        FeatureFolder(root, {"slide.1": 0, "a": 1, "b": 1})
    with pytest.raises(ValueError, match="at least one slide"):
        FeatureFolder(root, {})
    with pytest.raises(TypeError, match="labels must be a mapping.*got list"):
        FeatureFolder(root, [0, 1])
    torch.save(torch.zeros(3, WIDTH + 1), root / "slide.5.pt")
    torch.save({"features": features(), "coords": coords()}, root / "slide.6.pt")
    folder = FeatureFolder(root)
    with pytest.raises(ValueError, match=r"slide\.5\.pt.*no array 'coords'"):
        folder[5]
    with pytest.raises(ValueError, match=r"slide\.6\.pt has features of width 6, torch.float32; slide\.0\.pt has 6"):
        folder[6]
    with pytest.raises(ValueError, match=r"slide\.5\.pt has features of width 7"):
        FeatureFolder(root, extras=())[5]
    torch.save(features(), root / "slide.1.pt")
    with pytest.raises(ValueError, match=r"one file for each slide; got slide\.1\.h5 and slide\.1\.pt"):
        FeatureFolder(root)


def read_all(root, **options):
    folder = FeatureFolder(root, dict.fromkeys([f"slide.{i}" for i in range(5)], 1))
    sampler = BagBatchSampler(folder.lengths, 12)
    found = {}
    for batch in DataLoader(folder, batch_sampler=sampler, collate_fn=folder.collate, **options):
        bags = batch["features"]
        assert bags.num_instances <= 12 and batch["label"].tolist() == [1] * len(bags)
        places = bags.extras["coords"].split(bags.lengths.tolist())
        found |= {name: (x, at) for name, x, at in zip(batch["name"], bags, places, strict=True)}
    assert sorted(found) == folder.names
    for i, name in enumerate(folder.names):
        x, at = found[name]
        assert x.dtype == torch.float16 and torch.equal(x, features(LENGTHS[i], torch.float16, i))
        assert torch.equal(at, coords(LENGTHS[i]))


def test_a_loader(root):
    read_all(root)


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers(root, context):
    read_all(root, num_workers=1 if context == "spawn" else 2, multiprocessing_context=context)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_pinned_memory(root):
    read_all(root, pin_memory=True)


def test_lightning(root, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")
    from milkernels.nn import ABMIL

    folder = FeatureFolder(root, {f"slide.{i}": i % 2 for i in range(5)})
    sampler = BagBatchSampler(folder.lengths, 12)
    loader = DataLoader(folder, batch_sampler=sampler, collate_fn=folder.collate)
    seen, epochs = Counter(), []

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = ABMIL(WIDTH, 2, 8, 8)

        def training_step(self, batch, _):
            seen.update(batch["name"])
            loss = torch.nn.functional.cross_entropy(self.model(batch["features"]).logits, batch["label"])
            self.log("loss", loss, batch_size=len(batch["features"]))
            return loss

        def on_train_epoch_start(self):
            epochs.append(sampler.epoch)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"default_root_dir": tmp_path, "enable_model_summary": False}
    lightning.Trainer(max_epochs=3, **options).fit(Model(), loader)
    assert seen == {name: 3 for name in folder.names}
    assert len(set(epochs)) == 3


# Batches


def lengths_like(kind, count=200):
    rng = torch.Generator().manual_seed(0)
    if kind == "skewed":
        return (50 * torch.randn(count, generator=rng).exp()).long().clamp(1, 1000).tolist()
    return {"equal": [40] * count, "long": [5000] * 7, "one": [10], "with empty": [0, 5, 0, 900, 0, 3]}[kind]


KINDS = ("skewed", "equal", "long", "one", "with empty")


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bag_comes_once(kind, ranks, shuffle, drop_last):
    lengths = lengths_like(kind)
    counts = set()
    for epoch in range(3):
        samplers = [
            BagBatchSampler(lengths, 500, shuffle, 3, drop_last, num_replicas=ranks, rank=rank) for rank in range(ranks)
        ]
        of_ranks = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            of_ranks.append(list(sampler))
            assert len(of_ranks[-1]) == len(sampler)
        assert len({len(batches) for batches in of_ranks}) == 1
        counts.add(len(of_ranks[0]))
        batches = [batch for batches in of_ranks for batch in batches]
        assert all(batch and (sum(lengths[b] for b in batch) <= 500 or len(batch) == 1) for batch in batches)
        seen = Counter(bag for batch in batches for bag in batch)
        alone = all(len(batch) == 1 for batch in batches)
        if drop_last:
            assert max(seen.values(), default=1) == 1
        elif alone:
            assert set(seen) == set(range(len(lengths)))
        else:
            assert seen == Counter(range(len(lengths)))
        if kind in ("skewed", "equal"):
            assert drop_last or not alone
            assert len(seen) > 0.75 * len(lengths)
    assert len(counts) == 1, "as many batches in every epoch"


def test_batches_are_filled_and_of_similar_lengths():
    lengths = lengths_like("skewed", 1000)
    batches = list(BagBatchSampler(lengths, 1000))
    assert len(batches) <= 1.25 * sum(lengths) / 1000 + 1
    spread = [max(lengths[b] for b in batch) - min(lengths[b] for b in batch) for batch in batches]
    chance = torch.tensor(lengths)[torch.randperm(1000)].split(9)
    assert sum(spread) / len(spread) < 0.7 * sum(int(c.max() - c.min()) for c in chance) / len(chance)


def test_order_is_by_seed_and_epoch():
    lengths = lengths_like("skewed")
    sampler = BagBatchSampler(lengths, 500, seed=1)
    first, second = list(sampler), list(sampler)
    assert first != second and sampler.epoch == 2
    together = [{frozenset((a, b)) for batch in batches for a in batch for b in batch} for batches in (first, second)]
    assert len(together[0] & together[1]) < 0.6 * len(together[0]), "other neighbours in every epoch"
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(BagBatchSampler(lengths, 500, seed=2)) != first
    assert list(BagBatchSampler(torch.tensor(lengths), 500, seed=1)) == first


def test_without_shuffling_bags_stay_in_order():
    sampler = BagBatchSampler([4, 4, 4, 20, 1, 1], 9, shuffle=False)
    assert list(sampler) == [[0, 1], [2], [3], [4, 5]] == list(sampler)
    assert list(BagBatchSampler([4, 4, 4, 20, 1, 1], 9, False, drop_last=True)) == [[0, 1], [2], [3]]
    assert list(BagBatchSampler([4, 4, 4], 8, False, drop_last=True)) == [[0, 1]]
    assert list(BagBatchSampler([4, 4], 8, False, drop_last=True)) == [[0, 1]], "a full batch is not dropped"


def test_ranks_are_those_of_the_process_group(tmp_path):
    dist = torch.distributed
    sampler = BagBatchSampler([5] * 10, 10)
    assert len(sampler) == 5
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert len(sampler) == 5 and len(list(sampler)) == 5
    finally:
        dist.destroy_process_group()


def train_on_a_rank(rank, root, seen):
    from torch.nn.parallel import DistributedDataParallel

    from milkernels.losses import clam_loss
    from milkernels.nn import CLAM

    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    folder = FeatureFolder(root, {f"slide.{i}": i % 2 for i in range(5)})
    sampler = BagBatchSampler(folder.lengths, 12)
    model = DistributedDataParallel(CLAM(WIDTH, 2, 8, 8, k=2))
    adam = torch.optim.Adam(model.parameters())
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in DataLoader(folder, batch_sampler=sampler, collate_fn=folder.collate):
            adam.zero_grad()
            clam_loss(model(batch["features"]), batch["label"]).backward()
            adam.step()
            seen[f"{epoch} {rank} {len(seen)}"] = batch["name"]
    seen[f"parameters {rank}"] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_clam_on_all_bags(root):
    with torch.multiprocessing.Manager() as manager:
        shared = manager.dict()
        torch.multiprocessing.spawn(train_on_a_rank, (root, shared), nprocs=2)
        seen = dict(shared)
    assert seen.pop("parameters 0") == seen.pop("parameters 1")
    for epoch in "01":
        names = [name for key, names in seen.items() if key.startswith(epoch) for name in names]
        assert sorted(names) == [f"slide.{i}" for i in range(5)]
    steps = [sum(key.split()[1] == rank for key in seen) for rank in "01"]
    assert steps[0] == steps[1] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], 5), "lengths must be those of one bag at least"),
        (([3, -1], 5), r"from 0 on; got \[3, -1\]"),
        (([3], 0), "max_instances must be at least 1; got 0"),
        (([3], 1.5), "max_instances must be an int"),
        (([3], 5, 1), "shuffle must be True or False"),
        (([3], 5, True, 0, "no"), "drop_last must be True or False"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises((TypeError, ValueError), match=said):
        BagBatchSampler(*arguments)
    with pytest.raises(ValueError, match=r"rank must be in \[0, num_replicas\), or both None; got 2, 2"):
        BagBatchSampler([3], 5, rank=2, num_replicas=2)


def test_examples_in_the_docstrings():
    import doctest

    from milkernels import losses
    from milkernels.data import batches, files
    from milkernels.nn import models

    for module in (batches, files, losses, models):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed
