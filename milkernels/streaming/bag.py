"""A bag that is read in pieces."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from milkernels import _torch
from milkernels.arguments import check_count, check_dense
from milkernels.bags import Parts
from milkernels.streaming import pooling
from milkernels.streaming.reading import Layer, Source
from milkernels.streaming.sources import as_source


class _Reads:
    """What a stream and its views count together."""

    def __init__(self):
        self.count, self.waited = 0, 0.0

    def add(self, waited: float) -> None:
        self.count, self.waited = self.count + 1, self.waited + waited


class StreamedBag(Parts):
    """Instances that are never in memory at once: ops, `milkernels.nn` and its models take it for ``x``.

    A forward reads the source once (DSMIL twice), piece by piece, and a backward once more: results and gradients are
    those of the whole, exactly, to rounding.  Memory holds ``prefetch + 2`` pieces, what an op needs for one of them,
    and what results have of each instance, such as scores.  ``offsets`` and ``mask`` are those of all rows, so a stream
    may hold several bags.

    Args:
        source: where rows ``[N, L]`` come from.  What slices: a tensor, a NumPy array or memory map, an h5 or zarr
            dataset.  The path of a file: .npy, whose pieces are mapped one at a time; .pt, a tensor; .h5, its dataset
            ``features``.  A list of these, one behind another.  Or a function that returns an iterator of pieces
            ``[n, L]``, a new one each time.  Every read has to give the same rows in the same order.
        rows: of a piece, at most.  A function's pieces are cut to it, and not joined.
        transform: of a piece ``[n, L]`` to the features ``[n, L']`` that the op sees, such as ``torch.Tensor.float`` or
            an encoder.  It runs where and when the op does, on ``device``, at every read, with the same random numbers.
            The parameters of an ``nn.Module`` are trained; a function must have none.
        device: where pieces go; None leaves them where they are.
        prefetch: how many pieces are read ahead: by the system from a .npy file; by a thread from all else that is not
            in memory, and whatever the source, where ``device`` is a GPU.  0: none, and there is no thread.

    Attributes:
        reads: how often the source was read, in part or whole.
        waited: the seconds that these spent waiting for it.

    - **Dropout** drops other units in each piece: see `seed_of_part`.
    - **Errors.**  TypeError and ValueError for arguments, offsets and masks that do not fit what the source gives, for
      pieces of several widths or types, and for a read that gives other rows than the first: their number, and a sample
      of 128 of a piece's on the CPU, are compared.  What the source raises is raised.  In each case no thread is left,
      and no random state, buffer or gradient of what the stream went through is changed.
    - **Not traced.**  ``torch.compile`` leaves a call with a stream to eager PyTorch, or raises.  Gradients are taken
      once, by autograd.

    >>> import torch
    >>> from milkernels.nn import ABMIL
    >>> from milkernels.streaming import StreamedBag
    >>> x = torch.randn(1000, 64)
    >>> model, stream = ABMIL(64, 2), StreamedBag(x, rows=300)
    >>> model(stream).logits.sum().backward()
    >>> stream.reads
    2
    """

    def __init__(
        self,
        source: Any,
        rows: int = 32768,
        transform: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | int | None = None,
        prefetch: int = 2,
    ):
        check_count("rows", rows)
        if isinstance(prefetch, bool) or not isinstance(prefetch, int):
            raise TypeError(f"prefetch must be an int; got {type(prefetch).__name__}")
        if prefetch < 0:
            raise ValueError(f"prefetch must be at least 0; got {prefetch}")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be a function or an nn.Module; got {type(transform).__name__}")
        device = None if device is None else _device(device)
        self.rows, self.prefetch, self.transform, self.device = rows, prefetch, transform, device
        self._reads = _Reads()
        self._source = Source(as_source(source, rows, prefetch), device, prefetch, (), (), self._reads.add)
        if transform is not None:
            modules = (transform,) if isinstance(transform, nn.Module) else ()
            self._source = self._with(_layer_of(transform), modules)

    @property
    def reads(self) -> int:
        return self._reads.count

    @property
    def waited(self) -> float:
        return self._reads.waited

    def run(self, op: Callable, arguments: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a StreamedBag is read by Python, which is not traced; call the model without a compiler"
            )
        if _torch.transforming():
            raise RuntimeError("a StreamedBag is differentiated by autograd alone; torch.func needs the bag in memory")
        return pooling.run(self._source, op, {n: v for n, v in arguments.items() if v is not self})

    def through(self, layer: Layer, modules: Iterable[nn.Module] = ()) -> "StreamedBag":
        """The same rows behind one more layer, ``layer(rows [n, L], mask [n] or None)``; ``modules`` hold its
        parameters, which are trained."""
        view = copy.copy(self)
        view._source = self._with(layer, tuple(modules))
        return view

    def expecting(self, width: int | None) -> "StreamedBag":
        """The same rows, which have to be so wide."""

        def checked(x: Tensor, _: Tensor | None) -> Tensor:
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] != width:
                raise ValueError(f"x must have in_dim={width} features; got shape {tuple(x.shape)}")
            return x

        return self if width is None else self.through(checked)

    def instances(self, mask: Tensor | None = None) -> Tensor:
        """All rows at once, behind their layers: ``[N, L]``, differentiable in these."""
        return pooling.instances(self._source, mask)

    @torch.no_grad()
    def take(self, rows: Tensor) -> Tensor:
        """Some rows ``[n, L]``, behind ``transform``; without gradients.

        Of what slices these are read alone; a function's iterator is gone through.

        Args:
            rows: int64 ``[n]``, from 0 on; not the -1 by which ops say that there is none.

        Raises:
            TypeError, ValueError: rows of another type or shape, or outside of ``[0, N)``.
        """
        check_dense("rows", rows)
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64 [n]; got {rows.dtype} {list(rows.shape)}")
        return pooling.take(self._source, rows)

    def _with(self, layer: Layer, modules: tuple[nn.Module, ...]) -> Source:
        source = self._source
        return source._replace(layers=(*source.layers, layer), modules=(*source.modules, *modules))

    def __repr__(self) -> str:
        return f"StreamedBag(rows={self.rows}, device={self.device}, prefetch={self.prefetch})"


def _device(device: torch.device | str | int) -> torch.device:
    """The device, with its index."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"device must be one that PyTorch has here; got {device!r}") from error


def _layer_of(transform: Callable[[Tensor], Tensor]) -> Layer:
    trained = isinstance(transform, nn.Module)

    def layer(rows: Tensor, _: Tensor | None) -> Tensor:
        features = transform(rows)
        if not isinstance(features, Tensor):
            raise TypeError(f"transform must give a tensor; got {type(features).__name__}")
        if features.requires_grad and not trained:
            raise ValueError("transform must be the nn.Module itself where its parameters are trained; got a function")
        return features

    return layer
