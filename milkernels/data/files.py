"""Feature files, one for each slide, and a folder of them as a data set."""

import functools
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from milkernels.arguments import DTYPES, check_type, required
from milkernels.bags import collate_bags

_SUFFIXES = (".pt", ".pth", ".h5", ".hdf5", ".npy", ".npz", ".zarr")


def _require(name: str):
    return required(name, "milkernels.data", "zarr" if name == "zarr" else "milkernels[data]")


@contextmanager
def _arrays(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """What a file holds, by name, with shapes that are known before it is read.

    Whatever is wrong with it, also what the block finds wrong, becomes an error that names the file.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"{path} must be one of {', '.join(_SUFFIXES)}; got {path.suffix or 'no suffix'!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has 0 bytes")
    try:
        with ExitStack() as opened:
            content = _content(path, opened)
            yield content if isinstance(content, Mapping) else {key: content}
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; other objects could run code, so they are not read "
            f"(weights_only=True): save the tensor itself. PyTorch says: {said}"
        ) from error
    except Exception as error:  # of any type, with damaged files
        raise ValueError(f"{path} cannot be read as a bag: {error}") from error


def _content(path: Path, opened: ExitStack) -> Any:
    """One array, or arrays by name; mapped where the format can."""
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth"):  # PyTorch writes archives since 1.6
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if suffix == ".npy":
        return _require("numpy").load(path, mmap_mode="c", allow_pickle=False)
    if suffix == ".npz":
        archive = opened.enter_context(_require("numpy").load(path, allow_pickle=False))
        return archive["arr_0"] if archive.files == ["arr_0"] else dict(archive)
    if suffix == ".zarr":
        content = _require("zarr").open(str(path), mode="r")
        return dict(content.arrays()) if hasattr(content, "arrays") else content
    file = opened.enter_context(_require("h5py").File(path, "r"))
    return {name: _mapped(path, item) for name, item in file.items() if hasattr(item, "shape")}


def _mapped(path: Path, dataset):
    """An h5 dataset that is neither cut into chunks nor compressed is a stretch of the file."""
    offset = None if dataset.is_virtual or dataset.chunks or dataset.external else dataset.id.get_offset()
    if not offset or not dataset.size or dataset.dtype.kind not in "fiu" or offset % dataset.dtype.itemsize:
        return dataset
    return _require("numpy").memmap(path, dataset.dtype, "c", offset, dataset.shape)


def _shape(arrays: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Without a first dimension of 1 in front of rows and columns."""
    if not hasattr(arrays.get(key), "shape"):
        raise ValueError(f"it has no array {key!r} among {sorted(map(str, arrays))}")
    shape = tuple(arrays[key].shape)
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _length(arrays: Mapping[str, Any], key: str) -> int:
    shape = _shape(arrays, key)
    if len(shape) != 2 or 0 in shape:
        words = "is empty" if 0 in shape else "is no bag"
        raise ValueError(f"it {words}: {key!r} must be [n, L] or [1, n, L]; got shape {list(arrays[key].shape)}")
    return shape[0]


def _tensor(arrays: Mapping[str, Any], key: str) -> Tensor:
    shape, item = _shape(arrays, key), arrays[key]
    if not isinstance(item, Tensor):
        array = item[...]
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{key!r} must hold numbers that PyTorch knows; got {array.dtype} (bfloat16 needs .pt)")
        item = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    elif item.layout is not torch.strided or item.is_nested or item.is_quantized:
        raise ValueError(f"{key!r} must be a dense tensor; got {item.layout}")
    return item.detach().reshape(shape)


def read_bag(
    path: str | os.PathLike, *, features: str = "features", extras: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The bag in a feature file, ``{"features": [n, L], "coords": [n, 2]}``.

    Args:
        path: ``.pt`` (a tensor, or a dict of them), ``.h5``, ``.hdf5``, ``.npy``, ``.npz`` or ``.zarr``.  What the file
            has as ``[1, n, ...]``, as TRIDENT may, becomes ``[n, ...]``.
        features: the name of the features in it; what has no names, a tensor or an ``.npy``, holds them alone.
        extras: names of what else has a row for each instance.  None reads "coords" where they are.

    Features are float16, bfloat16, float32 or float64, and stay of that type.  ``.pt``, ``.npy`` and contiguous h5
    datasets are mapped, not read: memory fills as rows are used, and writing to the tensors does not change the file.

    Raises:
        FileNotFoundError, ImportError: no such file; NumPy, h5py or zarr is needed, and missing.
        ValueError: a file, which the message names, that is truncated, empty, of another format, without such features,
            with other numbers of rows, or a ``.pt`` that holds more than tensors: it could run code, and is not read.

    >>> import tempfile, torch
    >>> from milkernels.data import read_bag
    >>> path = tempfile.mkdtemp() + "/slide.pt"
    >>> torch.save(torch.randn(7, 16, dtype=torch.float16), path)
    >>> read_bag(path)["features"].shape
    torch.Size([7, 16])
    """
    path = Path(path)
    with _arrays(path, features) as arrays:
        length = _length(arrays, features)
        if extras is None:
            extras = ("coords",) if "coords" in arrays else ()
        for name in extras:
            if (shape := _shape(arrays, name))[:1] != (length,):
                raise ValueError(f"{name!r} must have a row for each of {length} instances; got shape {list(shape)}")
        bag = {"features": _tensor(arrays, features)} | {name: _tensor(arrays, name) for name in extras}
        if bag["features"].dtype not in DTYPES:
            raise ValueError(f"{features!r} must be floating-point; got {bag['features'].dtype}")
    return bag


class FeatureFolder(Dataset):
    """A folder of feature files as a data set of bags.

    Args:
        root: the folder; what it has that is no feature file is left alone, hidden files too.
        labels: by slide, the file's name without its suffix: only these are taken, in this order, and each must be
            there.  None takes every file, sorted by name, without labels.
        features, extras: as in `read_bag`.  ``extras=None`` takes coordinates if the first file has them; then every
            file must.

    ``folder[i]`` is a dict of ``features [n, L]``, the extras, ``label`` and ``name``, read when it is asked for.
    ``names``, ``paths`` and ``labels`` (None without) are lists of what was found.

    Raises:
        FileNotFoundError: no such folder, or no file of a slide that has a label.
        ValueError: no feature files at all; two files of one slide; on reading, what `read_bag` raises, and a file of
            another width or type than the first.

    >>> import tempfile, torch
    >>> from torch.utils.data import DataLoader
    >>> from milkernels.data import BagBatchSampler, FeatureFolder
    >>> root = tempfile.mkdtemp()
    >>> for name, patches in (("first", 7), ("second", 4), ("third", 9)):
    ...     file = {"features": torch.randn(patches, 16), "coords": torch.zeros(patches, 2)}
    ...     torch.save(file, f"{root}/{name}.pt")
    >>> folder = FeatureFolder(root, labels={"first": 0, "third": 1})
    >>> sampler = BagBatchSampler(folder.lengths, max_instances=20)
    >>> (batch,) = DataLoader(folder, batch_sampler=sampler, collate_fn=folder.collate)
    >>> batch["features"]
    Bags(2 bags, values=[16, 16] torch.float32 on cpu, extras=['coords'])
    >>> sorted(zip(batch["name"], batch["label"].tolist()))
    [('first', 0), ('third', 1)]
    """

    def __init__(
        self,
        root: str | os.PathLike,
        labels: Mapping[str, Any] | None = None,
        *,
        features: str = "features",
        extras: Sequence[str] | None = None,
    ):
        self.root, self.features = Path(root), features
        if not self.root.is_dir():
            raise FileNotFoundError(f"root must be a folder; got {root}")
        files: dict[str, Path] = {}
        for path in sorted(self.root.iterdir()):
            known = path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
            if known and files.setdefault(path.stem, path) != path:
                raise ValueError(f"root must have one file for each slide; got {files[path.stem].name} and {path.name}")
        if not files:
            raise ValueError(f"{root} has no feature files ({', '.join(_SUFFIXES)})")
        if labels is not None:
            check_type("labels", labels, Mapping, "a mapping of slides to labels")
            if not labels:
                raise ValueError(f"labels must name at least one slide; got {labels}")
            if missing := [str(name) for name in labels if name not in files]:
                raise FileNotFoundError(f"{root} has no file of {len(missing)} slides: {', '.join(missing[:3])}")
        self.names = list(files if labels is None else labels)
        self.paths = [files[name] for name in self.names]
        self.labels = None if labels is None else list(labels.values())
        self._extras = extras if extras is None else tuple(extras)

    @functools.cached_property
    def _first(self) -> tuple[tuple[str, ...], int, torch.dtype]:
        """What the others have to be like."""
        first = read_bag(self.paths[0], features=self.features, extras=self._extras)
        x = first.pop("features")
        return tuple(first), x.shape[1], x.dtype

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of what has a row for each instance, those of the first file."""
        return self._first[0]

    @property
    def width(self) -> int:
        """L, that of the first file."""
        return self._first[1]

    @property
    def dtype(self) -> torch.dtype:
        """The type of features, that of the first file."""
        return self._first[2]

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The number of instances of each bag, by reading the head of every file (all of an ``.npz``)."""
        found = []
        for path in self.paths:
            with _arrays(path, self.features) as arrays:
                found.append(_length(arrays, self.features))
        return found

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, (extras, *first) = self.paths[index], self._first
        bag = read_bag(path, features=self.features, extras=extras)
        if (got := [bag["features"].shape[1], bag["features"].dtype]) != first:
            other = f"{self.paths[0].name} has {first[0]}, {first[1]}"
            raise ValueError(f"{path} has features of width {got[0]}, {got[1]}; {other}")
        label = {} if self.labels is None else {"label": self.labels[index]}
        return bag | label | {"name": self.names[index]}

    def collate(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``{"features": Bags, "label": [B], "name": list of B}`` of samples: a ``collate_fn``."""
        return collate_bags(batch, per_instance=self.extras)
