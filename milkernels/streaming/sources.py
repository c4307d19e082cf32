"""Where the pieces of a bag come from, and how they are read again.

A source gives pieces by their *places*.  One that slices finds a piece by its place alone, so some of them can be left
out; a function's iterator has to be gone through from its beginning.
"""

import contextlib
import errno
import mmap
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milkernels.arguments import check_type, required

_POPULATE = 22  # MADV_POPULATE_READ of Linux 5.14, which Python has no name for
_AT_ONCE = 4 << 20  # bytes, between which other threads of Python may run
FORMATS = (
    "an array or tensor that slices, the path of a file (.npy, .pt, .h5), a list of these, or a function that returns "
    "an iterator of pieces [n, L]"
)


def as_source(source: Any, rows: int, ahead: int) -> "Sliced | Made":
    """The source of pieces of at most so many rows; while one is computed, so many are read ahead.

    Raises:
        TypeError: what is none of these: an iterator, which could be read once, before all.
        ValueError: an array that is not ``[N, L]``, or a tensor that requires a gradient; an empty list.
    """
    if isinstance(source, Tensor | str | os.PathLike) or _slices(source):
        return Sliced([source], rows, ahead)
    if callable(source):
        return Made(source, rows)
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("source must hold at least one array or path; got an empty list")
        return Sliced(source, rows, ahead)
    hint = "; give a function that returns a new one" if isinstance(source, Iterator) else ""
    raise TypeError(f"source must be {FORMATS}; got {type(source).__name__}{hint}")


def as_rows(piece: Any, name: str) -> Tensor:
    """What a source gave as a tensor ``[n, L]``; NumPy's memory is taken as it is."""
    if not isinstance(piece, Tensor):
        try:
            piece = torch.from_numpy(piece) if type(piece).__module__ == "numpy" else torch.as_tensor(piece)
        except (TypeError, ValueError, RuntimeError) as error:
            got = getattr(piece, "dtype", type(piece).__name__)
            raise TypeError(f"{name} must be a tensor, or an array of a type that PyTorch has; got {got}") from error
    if piece.ndim != 2:
        raise ValueError(f"{name} must be [n, L]; got shape {tuple(piece.shape)}")
    if piece.requires_grad:
        raise ValueError(f"{name} must not require a gradient: features in pieces get none; got requires_grad=True")
    return piece


def _slices(source: Any) -> bool:
    return hasattr(source, "shape") and hasattr(source, "__getitem__") and not isinstance(source, type)


class Sliced:
    """Arrays one behind another, each opened when it is reached if it is a file."""

    def __init__(self, arrays: Sequence, rows: int, ahead: int = 0):
        self.arrays, self.rows, self.ahead = list(arrays), rows, ahead
        for i, array in enumerate(self.arrays):
            name = _name(i, self.arrays)
            if isinstance(array, str | os.PathLike):
                _opener(array, name)
            elif not isinstance(array, Tensor) and not _slices(array):
                raise TypeError(f"{name} must be an array or tensor that slices, or a path; got {type(array).__name__}")
            else:
                _check_array(array, name)

    @property
    def at_hand(self) -> bool:
        """Whether no thread is of use: pieces are in memory, or the system reads them ahead."""
        return all(
            isinstance(array, Tensor)
            or (isinstance(array, str | os.PathLike) and Path(array).suffix == ".npy")
            or (type(array).__module__ == "numpy" and not _is_mapped(array))
            for array in self.arrays
        )

    def pieces(self, places: Sequence | None = None) -> Iterator[tuple[Any, Tensor]]:
        """``(place, piece)``: all of them, or those at these places."""
        wanted: dict[int, list] | None = None if places is None else {}
        for place in places or ():
            wanted.setdefault(place[0], []).append(place)
        for i, array in self._opened(None if wanted is None else list(wanted)):
            here = self._places(i, array.shape[0]) if wanted is None else wanted[i]
            for n, place in enumerate(here):
                if isinstance(array, _Npy):
                    array.will_need(here[n + self.ahead if n else 0 : n + self.ahead + 1])
                yield place, self._piece(array, place)

    def _places(self, i: int, length: int) -> list[tuple[int, int, int]]:
        """Those of an array; a source without any row has one."""
        starts = range(0, max(length, len(self.arrays) == 1), self.rows)
        return [(i, start, min(start + self.rows, length)) for start in starts]

    def rows_at(self, rows: Sequence[int]) -> Tensor:
        """These rows, which rise; without those beyond the last one."""
        found, base, left = [], 0, list(rows)
        with contextlib.closing(self._opened()) as opened:
            for i, array in opened:
                here = [row - base for row in left if row < base + array.shape[0]]
                found += [self._piece(array, (i, row, row + 1)).clone() for row in here]
                found.append(self._piece(array, (i, 0, 0)))
                base, left = base + array.shape[0], left[len(here) :]
                if not left:
                    break
        return torch.cat(found)

    def _opened(self, which: Sequence[int] | None = None) -> Iterator[tuple[int, Any]]:
        for i in range(len(self.arrays)) if which is None else which:
            array, name = self.arrays[i], _name(i, self.arrays)
            if not isinstance(array, str | os.PathLike):
                yield i, array
                continue
            with _opener(array, name)(Path(array)) as opened:
                _check_array(opened, f"{name} ({os.fspath(array)})")
                yield i, opened

    def _piece(self, array: Any, place: tuple[int, int, int]) -> Tensor:
        i, start, stop = place
        piece = array[start:stop]
        if _is_mapped(piece):
            piece = piece.copy()  # here, so that who computes does not wait for the pages
        elif isinstance(piece, Tensor) and not isinstance(self.arrays[i], Tensor):
            piece = piece.clone()
        piece = as_rows(piece, _name(i, self.arrays))
        if piece.shape[0] != stop - start:
            got = f"{piece.shape[0]} of rows {start} to {stop}"
            raise ValueError(
                f"{_name(i, self.arrays)} must have the {array.shape[0]} rows that its shape says; got {got}"
            )
        return piece


class Made:
    """What a function's iterator gives; its place is how many came before."""

    at_hand = False

    def __init__(self, make: Callable[[], Iterable], rows: int):
        self.make, self.rows = make, rows

    def pieces(self, places: Sequence | None = None) -> Iterator[tuple[int, Tensor]]:
        made = self.make()
        check_type("what source returns", made, Iterable, "an iterator of pieces")
        count, last = 0, None if places is None else max(places, default=-1)
        wanted = None if places is None else set(places)
        for i, given in enumerate(made):
            given = as_rows(given, f"piece {i} of source")
            for piece in given.split(self.rows) if given.shape[0] else ():
                if last is not None and count > last:
                    return
                if wanted is None or count in wanted:
                    yield count, piece
                count += 1

    def rows_at(self, rows: Sequence[int]) -> Tensor:
        """These rows, which rise; without those beyond the last one."""
        found, base, left = [], 0, list(rows)
        with contextlib.closing(self.pieces()) as pieces:
            for _, piece in pieces:
                here = [row - base for row in left if row < base + piece.shape[0]]
                found.append(piece[here])
                base, left = base + piece.shape[0], left[len(here) :]
                if not left:
                    break
        return torch.cat(found) if found else torch.empty(0, 1)


def _name(i: int, arrays: Sequence) -> str:
    return "source" if len(arrays) == 1 else f"source[{i}]"


def _check_array(array: Any, name: str) -> None:
    if len(array.shape) != 2 or array.shape[1] < 1:
        raise ValueError(f"{name} must be [N, L]; got shape {tuple(array.shape)}")
    if isinstance(array, Tensor):
        as_rows(array[:0], name)
        if array.layout is not torch.strided or array.is_nested:
            raise TypeError(f"{name} must be a dense tensor; got layout {array.layout}")


def _is_mapped(piece: Any) -> bool:
    """Whether it is a view of a file in NumPy's memory map, whose pages are read when they are looked at."""
    while piece is not None and type(piece).__module__.startswith("numpy"):
        if type(piece).__name__ == "memmap":
            return True
        piece = getattr(piece, "base", None)
    return False


# Files


def _opener(path: str | os.PathLike, name: str) -> Callable:
    openers = {".npy": _Npy, ".pt": _torch_file, ".pth": _torch_file, ".h5": _h5_file, ".hdf5": _h5_file}
    suffix = Path(path).suffix
    if suffix not in openers:
        raise ValueError(f"{name} must end with one of {', '.join(openers)}; got {os.fspath(path)!r}")
    return openers[suffix]


class _Npy:
    """A .npy file ``[N, L]``.  Slices are maps of their own, which are copied where something is written: one of the
    whole file would count as memory, all of it."""

    def __init__(self, path: Path):
        np = required("numpy", "a .npy file", "numpy")
        self._file = path.open("rb")
        try:
            version = np.lib.format.read_magic(self._file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, by_columns, self.dtype = read(self._file)
            if by_columns and min(self.shape, default=0) > 1:
                raise ValueError(f"{path} must be stored row by row; got Fortran order")
            if self.dtype.hasobject:
                raise ValueError(f"{path} must hold numbers; got {self.dtype}")
            self._start = self._file.tell()
        except BaseException:
            self._file.close()
            raise

    def __getitem__(self, rows: slice) -> Any:
        np = required("numpy", "a .npy file", "numpy")
        start, size = self._bytes(rows.start, rows.stop)
        if size == 0:
            return np.empty((0, self.shape[1]), self.dtype)
        if start + size > os.fstat(self._file.fileno()).st_size:
            raise EOFError(f"{self._file.name} ends before row {rows.stop} of the {self.shape[0]} that its header says")
        before = start % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self._file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=start - before)
        _read(pages)
        return np.frombuffer(pages, self.dtype, offset=before).reshape(-1, self.shape[1])

    def will_need(self, places: Sequence[tuple[int, int, int]]) -> None:
        """The system begins to read these, where it can be told to."""
        if hasattr(os, "posix_fadvise"):
            for _, start, stop in places:
                os.posix_fadvise(self._file.fileno(), *self._bytes(start, stop), os.POSIX_FADV_WILLNEED)

    def _bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Where these rows begin in the file, and their size."""
        row = self.shape[1] * self.dtype.itemsize
        return self._start + start * row, (stop - start) * row

    def __enter__(self) -> "_Npy":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def _read(pages: mmap.mmap) -> None:
    """Waits for the pages, all at once, so that who computes does not wait for one after another; what cannot be read
    is an OSError here and would end the process there.  A system that cannot be asked reads them when they are looked
    at."""
    if sys.platform != "linux":
        return
    for start in range(0, len(pages), _AT_ONCE):
        try:
            pages.madvise(_POPULATE, start, min(_AT_ONCE, len(pages) - start))
        except OSError as error:
            if error.errno == errno.EINVAL:  # an older Linux
                return
            raise


@contextlib.contextmanager
def _torch_file(path: Path) -> Iterator[Tensor]:
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, Tensor):
        raise TypeError(f"{path} must hold a tensor [N, L]; got {type(loaded).__name__}")
    yield loaded


@contextlib.contextmanager
def _h5_file(path: Path) -> Iterator[Any]:
    with required("h5py", "an .h5 file", "h5py").File(path, "r") as file:
        if "features" not in file:
            raise ValueError(f"{path} must have a dataset 'features'; got {sorted(file)}")
        yield file["features"]


# Reading ahead


class Prefetched:
    """An iterator that a thread of its own reads ahead, so many pieces; what that raises is raised here.

    `close` ends the thread, and waits until it has ended.
    """

    def __init__(self, pieces: Iterator, ahead: int):
        self._pieces, self._stop = pieces, threading.Event()
        self._queue: queue.Queue = queue.Queue(max(ahead - 1, 1))  # and one is in the hand of the thread
        self._thread = threading.Thread(target=self._work, name="milkernels-stream", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for piece in self._pieces:
                self._queue.put((piece, None))
                del piece  # the queue has it, for as long as nobody took it
                if self._stop.is_set():
                    return
            self._queue.put((None, StopIteration()))
        except BaseException as error:
            self._queue.put((None, error))
        finally:
            close = getattr(self._pieces, "close", None)
            if close is not None:
                close()

    def __iter__(self) -> "Prefetched":
        return self

    def __next__(self) -> Any:
        piece, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # for who asks once more
            raise error
        return piece

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():  # which may wait for room in the queue
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.02)
        self._thread.join()
