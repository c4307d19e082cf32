"""Feature files, one for each slide, and a folder of them as a data set."""

import functools
import importlib
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from milkernels.arguments import DTYPES, check_type
from milkernels.bags import collate_bags

Path_ = str | os.PathLike


def _require(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"milkernels.data needs {name}: pip install milkernels[data]; got: {error}") from error


# What lies in a file: arrays by name, whose shapes are known before they are read


@contextmanager
def _pt(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """Mapped, where it is of the format that PyTorch writes since 1.6."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    yield content if isinstance(content, Mapping) else {key: content}


@contextmanager
def _npy(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    yield {key: _require("numpy").load(path, mmap_mode="c", allow_pickle=False)}


@contextmanager
def _npz(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    with _require("numpy").load(path, allow_pickle=False) as archive:
        yield {key: archive["arr_0"]} if archive.files == ["arr_0"] else dict(archive)


@contextmanager
def _h5(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    h5py = _require("h5py")
    with h5py.File(path, "r") as file:
        yield {name: _mapped(path, item) for name, item in file.items() if isinstance(item, h5py.Dataset)}


def _mapped(path: Path, dataset):
    """A dataset that is neither cut into chunks nor compressed is a stretch of the file."""
    offset = None if dataset.is_virtual or dataset.chunks or dataset.external else dataset.id.get_offset()
    if not offset or not dataset.size or dataset.dtype.kind not in "fiu" or offset % dataset.dtype.itemsize:
        return dataset
    return _require("numpy").memmap(path, dataset.dtype, "c", offset, dataset.shape)


@contextmanager
def _zarr(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    content = _require("zarr").open(str(path), mode="r")
    yield dict(content.arrays()) if hasattr(content, "arrays") else {key: content}


_FORMATS: dict[str, Callable] = {".pt": _pt, ".pth": _pt, ".h5": _h5, ".hdf5": _h5, ".npy": _npy, ".npz": _npz}
_FORMATS[".zarr"] = _zarr


@contextmanager
def _arrays(path: Path, key: str) -> Iterator[Mapping[str, Any]]:
    """What ``path`` holds; whatever is wrong with it becomes an error that names it."""
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path} must be one of {', '.join(_FORMATS)}; got {path.suffix or 'no suffix'!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has 0 bytes")
    try:
        with _FORMATS[path.suffix.lower()](path, key) as arrays:
            yield arrays
    except pickle.UnpicklingError as error:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; other objects could run code, so they are not read "
            f"(weights_only=True): save the tensor itself. PyTorch says: {said}"
        ) from error
    except ImportError:
        raise
    except Exception as error:  # of any type, with damaged files
        raise ValueError(f"{path} cannot be read as a bag: {error}") from error


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
        numpy = _require("numpy")
        array = numpy.asarray(item[...])
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{key!r} must hold numbers that PyTorch knows; got {array.dtype} (bfloat16 needs .pt)")
        item = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    elif item.layout is not torch.strided or item.is_nested or item.is_quantized:
        raise ValueError(f"{key!r} must be a dense tensor; got {item.layout}")
    return item.detach().reshape(shape)


def read_bag(path: Path_, *, features: str = "features", extras: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The bag in a feature file, ``{"features": [n, L], "coords": [n, 2]}``.

    Args:
        path: ``.pt`` (a tensor, or a dict of them), ``.h5`` or ``.hdf5``, ``.npy``, ``.npz``, or ``.zarr`` with zarr
            installed.  What the file has as ``[1, n, ...]``, as TRIDENT may, becomes ``[n, ...]``.
        features: the name of the features in it; what has no names, a tensor or an ``.npy``, holds them alone.
        extras: names of what else has a row for each instance.  None reads "coords" where they are.

    Features are float16, bfloat16, float32 or float64, and stay of that type.  ``.pt``, ``.npy`` and contiguous h5
    datasets are mapped, not read: memory fills as rows are used, and writing to the tensors does not change the file.

    Raises:
        FileNotFoundError: no such file.
        ImportError: h5py or zarr is needed, and missing.
        TypeError, ValueError: a file, which the message names, that is truncated, empty, of another format, without
            instances, without an entry of that name, with other numbers of rows, or a ``.pt`` that holds more than
            tensors: such files could run code, and are not read.

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
    ``folder.collate`` is the ``collate_fn``: it makes ``Bags`` of the features, with the extras in them.  Attributes:
    ``names``, ``paths``, ``labels`` (None without), and what is found when it is asked for: ``extras``, ``width`` and
    ``dtype``, by reading the first file, and ``lengths``, by reading the head of every file (all of an ``.npz``).

    Raises:
        FileNotFoundError: no such folder, or no file of a slide that has a label.
        ValueError: no feature files at all; two files of one slide; on reading, what `read_bag` raises, and a file of
            another width or type than the first.

    >>> import tempfile, torch
    >>> from milkernels.data import FeatureFolder
    >>> root = tempfile.mkdtemp()
    >>> for name in "abc":
    ...     torch.save(torch.randn(7, 16), f"{root}/{name}.pt")
    >>> folder = FeatureFolder(root, labels={"c": 1, "a": 0})
    >>> folder.names, folder.labels, folder.lengths, folder.width
    (['c', 'a'], [1, 0], [7, 7], 16)
    """

    def __init__(
        self,
        root: Path_,
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
            known = path.suffix.lower() in _FORMATS and not path.name.startswith(".")
            if known and files.setdefault(path.stem, path) != path:
                raise ValueError(f"root must have one file for each slide; got {files[path.stem].name} and {path.name}")
        if not files:
            raise ValueError(f"{root} has no feature files ({', '.join(_FORMATS)})")
        check_type("labels", {} if labels is None else labels, Mapping, "a mapping of slides to labels")
        missing = [] if labels is None else [name for name in labels if name not in files]
        if missing:
            raise FileNotFoundError(f"{root} has no file of {len(missing)} slides: {', '.join(map(str, missing[:3]))}")
        self.names = list(files if labels is None else labels)
        self.paths = [files[name] for name in self.names]
        self.labels = None if labels is None else list(labels.values())
        if not self.names:
            raise ValueError(f"labels must name at least one slide; got {labels}")
        self._extras = extras if extras is None else tuple(extras)

    @functools.cached_property
    def _first(self) -> tuple[tuple[str, ...], int, torch.dtype]:
        """What the others have to be like: extras, width and type of the first bag."""
        first = read_bag(self.paths[0], features=self.features, extras=self._extras)
        x = first.pop("features")
        return tuple(first), x.shape[1], x.dtype

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of what has a row for each instance."""
        return self._first[0]

    @property
    def width(self) -> int:
        """L, of all bags."""
        return self._first[1]

    @property
    def dtype(self) -> torch.dtype:
        """The type of all features."""
        return self._first[2]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        bag = read_bag(path, features=self.features, extras=self.extras)
        got, first = bag["features"], (self.width, self.dtype)
        if (got.shape[1], got.dtype) != first:
            other = f"{self.paths[0].name} has {first[0]}, {first[1]}"
            raise ValueError(f"{path} has features of width {got.shape[1]}, {got.dtype}; {other}")
        label = {} if self.labels is None else {"label": self.labels[index]}
        return bag | label | {"name": self.names[index]}

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The number of instances of each bag."""
        found = []
        for path in self.paths:
            with _arrays(path, self.features) as arrays:
                found.append(_length(arrays, self.features))
        return found

    def collate(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``{"features": Bags, "label": [B], "name": list of B}`` of samples."""
        return collate_bags(batch, per_instance=self.extras)
