"""The reads of one call: the first says where the pieces are, and every other one has to give the same."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from milkernels.arguments import check_instances
from milkernels.ragged import check_offsets, checked_mask
from milkernels.streaming.sources import Made, Prefetched, Sliced

Layer = Callable[[Tensor, Tensor | None], Tensor]  # of a piece's rows and their mask
_SAMPLED_ROWS = 128  # of a piece, by which it is known again


class Source(NamedTuple):
    """How pieces come, as `StreamedBag` was told."""

    source: Sliced | Made
    device: torch.device | None
    prefetch: int
    layers: tuple[Layer, ...]  # what rows go through before an op sees them
    modules: tuple[nn.Module, ...]  # whose parameters these have
    count: Callable[[float], None]  # is told of every read, and how long it waited for pieces

    @property
    def pins(self) -> bool:
        """Whether pieces are copied to where a GPU can fetch them."""
        return self.device is not None and self.device.type == "cuda"


class Piece(NamedTuple):
    rows: Tensor  # [n, L], as read, on the device
    start: int
    stop: int
    offsets: Tensor | None  # of the bags that have rows here, from 0 on; None for one bag
    mask: Tensor | None
    bags: slice  # these bags


class Reading:
    """The pieces of one call, for as many reads as it takes.

    Args:
        offsets, mask: of all rows, as ops take them.
        per_row: what else has a row for each instance, by the name of its argument.
    """

    def __init__(self, source: Source, offsets: Tensor | None, mask: Tensor | None, per_row: dict[str, Tensor]):
        self.source = source
        self.bounds = None if offsets is None else _checked_offsets(offsets)
        self.mask = None if mask is None else _checked_mask(mask)
        self.lengths = {name: t.shape[0] for name, t in per_row.items()}
        self.lengths |= {} if mask is None else {"mask": mask.shape[0]}
        self.parameters = [p for m in source.modules for p in m.parameters()]
        self.buffers = [b for m in source.modules for b in m.buffers()]
        self.places: list = []
        self.spans: list[tuple[int, int]] = []
        self.device: torch.device | None = None
        self._marks: list[int | None] = []
        self._states: list[tuple[Tensor, Tensor | None]] = []
        self._row: tuple | None = None

    @property
    def num_bags(self) -> int:
        return 1 if self.bounds is None else len(self.bounds) - 1

    @property
    def offsets(self) -> Tensor | None:
        return None if self.bounds is None else self.bounds.to(self.device)

    def partial_offsets(self) -> Tensor:
        """Where those of each bag begin, ``[B + 1]``, among what all pieces say of the bags that they have rows of."""
        counts = torch.zeros(self.num_bags + 1, dtype=torch.int64)
        for start, stop in self.spans:
            counts[1:][self._bags(start, stop)] += 1
        return counts.cumsum(0).to(self.device)

    # Reads

    def all(self) -> contextlib.closing:
        """All pieces, ``(i, Piece)``: the first read, or one more."""
        return contextlib.closing(self._again(range(len(self.places))) if self.places else self._first())

    def some(self, wanted: Sequence[int]) -> contextlib.closing:
        """The pieces of these numbers, once more."""
        return contextlib.closing(self._again(wanted))

    def _first(self) -> Iterator[tuple[int, Piece]]:
        stop, saved = 0, [buffer.clone() for buffer in self.buffers]
        try:
            with contextlib.closing(self._read(None)) as read:
                for i, (place, rows, mark) in enumerate(read):
                    start, stop = stop, stop + rows.shape[0]
                    self._check_piece(i, rows, stop)
                    self.places.append(place)
                    self.spans.append((start, stop))
                    self._marks.append(mark)
                    yield i, self._piece(rows, start, stop)
            if not self.places:
                raise ValueError("source must give at least one piece [n, L]; got none")
            for name, length in self._expected().items():
                if length != stop:
                    raise ValueError(f"{_expectation(name, stop)}; got {length}")
        except BaseException:
            with torch.no_grad():
                for buffer, value in zip(self.buffers, saved, strict=True):
                    buffer.copy_(value)
            raise

    def _again(self, wanted: Sequence[int]) -> Iterator[tuple[int, Piece]]:
        whole = len(wanted) == len(self.places)
        places = None if whole and isinstance(self.source.source, Made) else [self.places[i] for i in wanted]
        with self._buffers_kept(), contextlib.closing(self._read(places)) as read:
            for i in wanted:
                start, stop = self.spans[i]
                _, rows, mark = next(read, (None, None, None))
                if rows is None or rows.shape[0] != stop - start or mark != self._marks[i]:
                    got = "none" if rows is None else "others" if rows.shape[0] == stop - start else str(rows.shape[0])
                    raise ValueError(f"{_SAME}; got {got} for rows {start} to {stop}, piece {i}")
                self._check_piece(i, rows, stop)
                yield i, self._piece(rows, start, stop)
            if places is None and next(read, None) is not None:
                raise ValueError(f"{_SAME}; got more than the {self.spans[-1][1]} of the first")

    def _read(self, places: Sequence | None) -> Iterator[tuple]:
        """``(place, rows, mark)``, made by another thread where pieces are read ahead."""
        waited, source = 0.0, self.source
        made = _prepared(source.source.pieces(places), source.pins)
        ahead = 0 if source.source.at_hand and not source.pins else source.prefetch
        pieces = Prefetched(made, ahead) if ahead else made
        try:
            while True:
                before = time.perf_counter()
                found = next(pieces, None)
                waited += time.perf_counter() - before
                if found is None:
                    return
                yield found
                del found
        finally:
            pieces.close()
            source.count(waited)

    # Pieces

    def _piece(self, rows: Tensor, start: int, stop: int) -> Piece:
        rows = rows.to(self.device, non_blocking=True)
        bags, offsets = self._bags(start, stop), None
        if self.bounds is not None:
            offsets = self.bounds[bags.start : bags.stop + 1].clamp(start, stop) - start
            offsets = offsets.to(self.device)
        mask = None if self.mask is None else self.mask[start:stop].to(self.device)
        return Piece(rows, start, stop, offsets, mask, bags)

    def _bags(self, start: int, stop: int) -> slice:
        """The bags that have rows here; all of them where there is no row at all."""
        if self.bounds is None:
            return slice(0, 1)
        if start == stop:
            return slice(0, self.num_bags)
        first = int(torch.searchsorted(self.bounds, start, right=True)) - 1
        return slice(first, int(torch.searchsorted(self.bounds, stop)))

    def _check_piece(self, i: int, rows: Tensor, stop: int) -> None:
        if self.device is None:
            self.device = rows.device if self.source.device is None else self.source.device
        kind = rows.shape[1], rows.dtype
        if i == 0:
            self._row = kind
        if kind != self._row:
            raise ValueError(f"pieces must share one width and type, those of the first, {self._row}; got {kind}")
        for name, length in self._expected().items():
            if stop > length:
                raise ValueError(f"{_expectation(name, stop, 'at least ')}; got {length}")

    def _expected(self) -> dict[str, int]:
        """By argument, how many rows it is for."""
        return self.lengths | ({} if self.bounds is None else {"offsets": int(self.bounds[-1])})

    def features(self, piece: Piece) -> Tensor:
        """The rows as an op is given them."""
        x = piece.rows
        for layer in self.source.layers:
            x = layer(x, piece.mask)
        check_instances(x)
        if x.shape[0] != piece.rows.shape[0]:
            raise ValueError(f"transform must give a row for each of {piece.rows.shape[0]}; got shape {tuple(x.shape)}")
        return x

    # What a second time must not change, or has to find again

    @contextlib.contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        """A batch norm has counted these rows already."""
        saved = [buffer.clone() for buffer in self.buffers]
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(self.buffers, saved, strict=True):
                    buffer.copy_(value)

    @contextlib.contextmanager
    def randomness(self, i: int) -> Iterator[None]:
        """Within the block, layers draw for piece i what they drew at its first read."""
        if not self.source.layers:
            yield
            return
        cuda = self.device.type == "cuda"
        if i == len(self._states):
            state = torch.cuda.get_rng_state(self.device) if cuda else None
            self._states.append((torch.get_rng_state(), state))
            yield
            return
        with torch.random.fork_rng([self.device] if cuda else []):
            state, of_device = self._states[i]
            torch.set_rng_state(state)
            if of_device is not None:
                torch.cuda.set_rng_state(of_device, self.device)
            yield


_SAME = "source must give the same rows on every read"


def _prepared(pieces: Iterator, pins: bool) -> Iterator[tuple]:
    """What can be done before a piece is needed."""
    with contextlib.closing(pieces):
        for place, piece in pieces:
            mark = _mark(piece)
            yield place, piece.pin_memory() if pins and piece.device.type == "cpu" else piece, mark
            del piece


def _mark(piece: Tensor) -> int | None:
    """A number by which some of its rows are known again; None on a GPU, where looking would wait for it."""
    if piece.device.type != "cpu":
        return None
    some = piece[:: max(1, piece.shape[0] // _SAMPLED_ROWS)].clone(memory_format=torch.contiguous_format)
    some = some.view(torch.uint8).flatten()
    if rest := len(some) % 8:
        some = nn.functional.pad(some, (0, 8 - rest))
    words = some.view(torch.int64)
    return int(words @ _odd_numbers(len(words)))  # int64 wraps around


@functools.lru_cache(4)
def _odd_numbers(count: int) -> Tensor:
    return torch.arange(1, 2 * count + 1, 2)


def _checked_offsets(offsets: Tensor) -> Tensor:
    """On the host, int64."""
    bounds = offsets.cpu() if isinstance(offsets, Tensor) else offsets
    last = int(bounds[-1]) if isinstance(bounds, Tensor) and bounds.ndim == 1 and len(bounds) else 0
    check_offsets(bounds, last, torch.device("cpu"))
    return bounds.to(torch.int64)


def _checked_mask(mask: Tensor) -> Tensor:
    if isinstance(mask, Tensor) and mask.ndim != 1:
        raise ValueError(f"mask must be [N]; got shape {tuple(mask.shape)}")
    return checked_mask(mask, mask)


def _expectation(name: str, rows: int, more: str = "") -> str:
    if name == "offsets":
        return f"offsets must end at the number of instances, {more}{rows}"
    return f"{name} must have a row for each instance, {more}{rows}"
