"""Bags as one value: what carries instances and offsets, makes them of other layouts and of samples."""

import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from milkernels._torch import has_values, pytree, ragged_dimension
from milkernels.arguments import check_dense, check_instances, check_type, readable
from milkernels.ragged import INT_TYPES, bag_index, bag_lengths, check_offset_values, check_offsets, checked_mask

Extras = Mapping[str, Tensor] | None

_COUNT_TYPES = (torch.uint8, torch.int8, torch.int16, *INT_TYPES)


class Bags:
    """A batch of bags: instances back to back and where each bag begins.

    Args:
        values: ``[N, L]`` instances of all bags, of any type.
        offsets: ``[B + 1]`` int32 or int64 on the device of ``values``; None makes one bag.
        mask: ``[N]``, bool or 0/1 of any type, non-zero = a real instance; kept as bool.  None: all are real.
        extras: per-instance tensors by name (coordinates, labels), each ``[N, ...]``, on the same device.

    The offsets are checked once, here; for tensors on a GPU this reads them and is the one synchronisation.
    Nothing is copied, so the attributes ``values``, ``offsets`` and ``extras`` are what was passed in.
    ``len(bags)`` is the number of bags, ``bags[i]`` one of them, and ``Bags`` a pytree.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a shape, device or offset that does not fit.
    """

    def __init__(
        self,
        values: Tensor,
        offsets: Tensor | None = None,
        mask: Tensor | None = None,
        extras: Extras = None,
    ):
        _check_dims("values", values)
        num_rows = values.shape[0]
        if offsets is None:
            offsets = _even_offsets(1, num_rows, values.device)
        else:
            check_offsets(offsets, num_rows, values.device)
            if offsets.device.type not in ("cpu", "meta") and has_values(offsets):
                check_offset_values(offsets, num_rows)
        self.values, self.offsets = values, offsets
        self.mask, self.extras = checked_mask(mask, values), _checked_extras(extras, values)

    @classmethod
    def _unchecked(cls, values: Tensor, offsets: Tensor, mask: Tensor | None, extras: dict) -> "Bags":
        bags = cls.__new__(cls)
        bags.values, bags.offsets, bags.mask, bags.extras = values, offsets, mask, extras
        return bags

    def _map(self, fn, offsets: Tensor | None = None) -> "Bags":
        """Applies ``fn`` to every per-instance tensor, and to the offsets unless new ones are given."""
        offsets = fn(self.offsets) if offsets is None else offsets
        mask = None if self.mask is None else fn(self.mask)
        return self._unchecked(fn(self.values), offsets, mask, {k: fn(v) for k, v in self.extras.items()})

    @classmethod
    def from_bag(cls, x: Tensor, mask: Tensor | None = None, extras: Extras = None) -> "Bags":
        """One bag ``[N, L]``; no copy."""
        return cls(x, None, mask, extras)

    @classmethod
    def from_list(
        cls,
        tensors: Iterable[Tensor],
        masks: Iterable[Tensor] | None = None,
        extras: Mapping[str, Iterable[Tensor]] | None = None,
    ) -> "Bags":
        """Bags from a list of ``[n_b, L]`` tensors of one type and device; a single one is not copied.

        ``masks`` has one ``[n_b]`` and each of ``extras`` one ``[n_b, ...]`` tensor per bag.

        Raises:
            TypeError: something that is not a tensor.
            ValueError: no tensor at all, or widths, types, devices or lengths that do not fit together.
        """
        check_type("tensors", tensors, Iterable, "a sequence of tensors")
        tensors = list(tensors)
        if not tensors:
            raise ValueError("tensors must hold at least one tensor, to know the width; got an empty list")
        for i, tensor in enumerate(tensors):
            _check_dims(f"tensors[{i}]", tensor)
        lengths = [tensor.shape[0] for tensor in tensors]
        values = _concatenate("tensors", tensors, lengths)
        mask = None if masks is None else _concatenate("masks", masks, lengths)
        joined = {k: _concatenate(f"extras[{k!r}]", parts, lengths) for k, parts in _items(extras)}
        offsets = _offsets_of(lengths, values.device)
        return cls._unchecked(values, offsets, checked_mask(mask, values), _checked_extras(joined, values))

    @classmethod
    def from_padded(
        cls,
        x: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        extras: Extras = None,
    ) -> "Bags":
        """A padded batch as it lies: rows ``[B * M, L]``, bags of M rows each, padding masked out.

        No copy and no synchronisation where ``x`` can be viewed as ``[B * M, L]`` (a copy otherwise).

        Args:
            x: ``[B, M, L]``.
            mask: ``[B, M]``, non-zero = real, holes allowed.  Or
            lengths: ``[B]``, the first ``lengths[b]`` rows of bag b are real.  With neither, all rows are.
            extras: ``[B, M, ...]`` tensors by name.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: shapes that do not fit; mask and lengths; a length not in [0, M] (if on the CPU).
        """
        _check_dims("x", x, "[B, M, L]", 3)
        num_bags, longest = x.shape[:2]
        if mask is not None and lengths is not None:
            raise ValueError("give mask or lengths, not both; got both")
        if lengths is not None:
            mask = _prefix_mask(lengths, num_bags, longest, x.device)

        def flat(name: str, tensor: Tensor) -> Tensor:
            _check_rows(name, tensor, (num_bags, longest), x.device)
            return tensor.reshape(num_bags * longest, *tensor.shape[2:])

        values = flat("x", x)
        mask = None if mask is None else checked_mask(flat("mask", mask), values)
        extras = {name: flat(f"extras[{name!r}]", tensor) for name, tensor in _items(extras)}
        return cls._unchecked(values, _even_offsets(num_bags, longest, x.device), mask, extras)

    @classmethod
    def from_nested(cls, x: Tensor) -> "Bags":
        """Bags from a nested tensor ``[B, ragged, L]`` of layout ``torch.jagged``; no copy.

        A nested tensor with holes (``torch.nested.narrow``) has them masked out.

        Raises:
            TypeError: not a nested tensor of that layout.
            ValueError: not 3-D, or ragged in another dimension.
        """
        if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
            got = getattr(x, "layout", type(x).__name__)
            raise TypeError(f"x must be a nested tensor of layout torch.jagged; got {got}")
        if x.ndim != 3 or ragged_dimension(x) != 1:
            raise ValueError(f"x, a nested tensor, must be [B, ragged, L]; got shape {tuple(x.shape)}")
        values, offsets, lengths = x.values(), x.offsets(), x.lengths()
        if lengths is None:
            return cls(values, offsets)
        # Rows in no bag go to a neighbour, masked out, so that the offsets run from 0 to N.
        num_rows = values.shape[0]
        outer = torch.cat([offsets[:1] * 0, offsets[1:-1], offsets[:1] * 0 + num_rows])
        index = bag_index(outer, num_rows)
        rows = torch.arange(num_rows, device=values.device)
        mask = (rows >= offsets[index]) & (rows < (offsets[:-1] + lengths)[index])
        return cls(values, outer, mask)

    @classmethod
    def from_batch(
        cls,
        x: Tensor,
        batch: Tensor,
        num_bags: int | None = None,
        mask: Tensor | None = None,
        extras: Extras = None,
    ) -> "Bags":
        """Bags from ``x [N, L]``, not copied, and the bag of each row, ``batch [N]`` int32 or int64, sorted.

        ``num_bags=None`` takes ``batch[-1] + 1``.  Reads ``batch``, on a GPU too, so it synchronises.

        Raises:
            TypeError: ``batch`` is no tensor, or neither int32 nor int64.
            ValueError: ``batch`` is not sorted, does not fit ``x``, or is outside ``[0, num_bags)``.
        """
        _check_dims("x", x)
        _check_rows("batch", batch, (x.shape[0],), x.device)
        if batch.dtype not in INT_TYPES:
            raise TypeError(f"batch must be int32 or int64; got {batch.dtype}")
        if batch.ndim != 1:
            raise ValueError(f"batch must be 1-D; got shape {list(batch.shape)}")
        steps = batch[1:] < batch[:-1]
        if bool(steps.any()):
            at = int(steps.nonzero()[0]) + 1
            got = f"{int(batch[at])} after {int(batch[at - 1])} at position {at}"
            raise ValueError(f"batch must be sorted; got {got}")
        first, last = (int(batch[0]), int(batch[-1])) if len(batch) else (0, -1)
        num_bags = last + 1 if num_bags is None else num_bags
        check_type("num_bags", num_bags, int, "an int")
        if not 0 <= num_bags < 2**31:
            raise ValueError(f"num_bags must be at least 0, and below 2^31; got {num_bags}")
        if first < 0 or last >= num_bags:
            raise ValueError(f"batch must be within [0, {num_bags}); got {first} to {last}")
        bounds = torch.arange(num_bags + 1, device=batch.device, dtype=batch.dtype)
        offsets = torch.searchsorted(batch.contiguous(), bounds)
        return cls._unchecked(x, offsets, checked_mask(mask, x), _checked_extras(extras, x))

    def to_list(self) -> list[Tensor]:
        """The bags as ``[n_b, L]`` tensors: views, or, if there is a mask, copies without the masked rows."""
        bags = self.compact()
        return [bags.values[start:end] for start, end in bags._spans()]

    def to_padded(self, padding_value: float = 0.0) -> tuple[Tensor, Tensor]:
        """``(x [B, M, L], mask [B, M] bool)``, M the longest bag; ``padding_value`` fills past a bag's end.

        Masked instances stay where they are, with mask False.  A view if all bags have the same length; reads
        the offsets, so it synchronises on a GPU.
        """
        spans = self._spans()
        lengths = [end - start for start, end in spans]
        longest = max(lengths, default=0)
        mask = self.values.new_ones(self.num_instances, dtype=torch.bool) if self.mask is None else self.mask
        if all(length == longest for length in lengths):
            shape = (len(lengths), longest)
            return self.values.view(*shape, self.values.shape[1]), mask.view(shape)
        rows = [self.values[start:end] for start, end in spans]
        real = [mask[start:end] for start, end in spans]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True, padding_value=padding_value), pad(real, batch_first=True)

    def to_nested(self) -> Tensor:
        """A nested tensor ``[B, ragged, L]``, ``torch.jagged``; a copy only to drop masked rows."""
        bags = self.compact()
        return torch.nested.nested_tensor_from_jagged(bags.values, bags.offsets)

    def to_batch(self) -> Tensor:
        """The bag of each row, ``[N]`` int64: the ``batch`` index that goes with ``values``."""
        return bag_index(self.offsets, self.num_instances)

    def compact(self) -> "Bags":
        """The same bags without masked rows and without a mask; a copy, or ``self`` if there is no mask.

        Synchronises on a GPU, as the number of rows that stay must be known.
        """
        if self.mask is None:
            return self
        kept = torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))  # how many rows stay before each row
        rows = self.mask.nonzero().squeeze(1)
        bags = self._map(lambda t: t.index_select(0, rows), kept[self.offsets.long()].to(self.offsets.dtype))
        bags.mask = None
        return bags

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "Bags":
        """Moves every tensor to ``device``; converts ``values``, if floating, to ``dtype``."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        bags = self if device is None else self._map(lambda t: t.to(device, non_blocking=non_blocking))
        values = bags.values.to(dtype) if bags.values.is_floating_point() else bags.values
        return self._unchecked(values, bags.offsets, bags.mask, bags.extras)

    def pin_memory(self) -> "Bags":
        """Every tensor in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self._map(lambda t: t.pin_memory())

    def detach(self) -> "Bags":
        """The same bags outside of the autograd graph."""
        return self._map(lambda t: t.detach())

    @property
    def num_instances(self) -> int:
        """N, masked rows included."""
        return self.values.shape[0]

    @property
    def lengths(self) -> Tensor:
        """The number of rows of each bag, ``[B]``, masked rows included."""
        return bag_lengths(self.offsets)

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def _spans(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.offsets.tolist()))

    # There is no __iter__: frameworks that look for the size of a batch (Lightning's mean over an epoch) would take the
    # length of the first bag for it.  Without one they go on to the labels, and Python iterates by __getitem__.
    def __getitem__(self, index) -> "Tensor | Bags":
        """An int gives that bag's rows ``[n_b, L]``, a view, masked rows included; so does iteration.

        A slice gives ``Bags``, a view if its step is 1.  A list or 1-D tensor of ints, or of B bools, gathers
        ``Bags``.  All read the offsets, so they synchronise on a GPU.
        """
        rows = range(len(self))
        if isinstance(index, slice):
            picked = rows[index]
            return self._narrow(picked.start, len(picked)) if picked.step == 1 else self._gather(picked)
        if isinstance(index, Tensor) and index.ndim or not hasattr(index, "__index__"):
            if not isinstance(index, list) and not hasattr(index, "__array__"):
                raise TypeError(f"a bag index must be an int, slice, list or tensor; got {index!r}")
            picked = torch.as_tensor(index).cpu()
            picked = torch.arange(len(self))[picked if picked.numel() else picked.long()]
            if picked.ndim != 1:
                raise IndexError(f"a bag index must be 1-D; got {index!r}")
            return self._gather(picked.tolist())
        bag = operator.index(index)
        if bag not in range(-len(self), len(self)):
            raise IndexError(f"bag index must be within [{-len(self)}, {len(self)}); got {bag}")
        start, end = self.offsets[rows[bag] : rows[bag] + 2].tolist()
        return self.values[start:end]

    def _narrow(self, first: int, count: int) -> "Bags":
        offsets = self.offsets[first : first + count + 1]
        start, end = offsets[[0, -1]].tolist()
        return self._map(lambda t: t[start:end], offsets - start)

    def _gather(self, positions: Sequence[int]) -> "Bags":
        spans = self._spans()
        spans = [spans[i] for i in positions]
        offsets = _offsets_of([end - start for start, end in spans], self.offsets.device, self.offsets.dtype)
        return self._map(lambda t: torch.cat([t[:0], *(t[start:end] for start, end in spans)]), offsets)

    def __repr__(self) -> str:
        if not isinstance(self.values, Tensor):  # a pytree of something else than tensors
            return f"Bags({self.values!r}, {self.offsets!r}, {self.mask!r}, {self.extras!r})"
        shape, kind, device = list(self.values.shape), self.values.dtype, self.values.device
        mask = "" if self.mask is None else ", mask"
        extras = f", extras={list(self.extras)}" if self.extras else ""
        return f"Bags({len(self)} bags, values={shape} {kind} on {device}{mask}{extras})"


class Parts:
    """Bags whose instances are never there at once, such as `StreamedBag`: what an op or a model has of them is asked
    for here."""

    def run(self, op: Callable, arguments: dict[str, Any]) -> Any:
        """What ``op(**arguments)`` stands for; ``arguments`` has all of them, and this one among them."""
        raise NotImplementedError

    def through(self, layer: Callable[[Tensor, Tensor | None], Tensor], modules: Iterable[nn.Module] = ()) -> "Parts":
        """The same bags behind one more layer, ``layer(rows [n, L], mask [n] or None)``, whose parameters are those of
        ``modules``."""
        raise NotImplementedError

    def expecting(self, width: int | None) -> "Parts":
        """The same bags, an error if they are not so wide; None: any."""
        raise NotImplementedError

    def instances(self, mask: Tensor | None = None) -> Tensor:
        """All rows at once, behind their layers: ``[N, L]``, differentiable in these."""
        raise NotImplementedError


def instances_of(
    x: "Tensor | Bags", offsets: Tensor | None, mask: Tensor | None, name: str = "x"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(x [N, L], offsets, mask bool [N])`` of what an op is given, checked: a tensor, or `Bags`, which have all."""
    if isinstance(x, Bags):
        if offsets is not None or mask is not None:
            given = "mask" if offsets is None else "offsets"
            raise ValueError(f"{given} must be None beside Bags, which have their own; got a value")
        x, offsets, mask = x.values, x.offsets, x.mask
    check_instances(x, name)
    if offsets is not None:
        check_offsets(offsets, x.shape[0], x.device)
    return x, offsets, None if mask is None else checked_mask(mask, x)


# Pytree: the tensors are the leaves; whether there is a mask and the names of the extras are the structure.


def _flatten_with_keys(bags: Bags):
    mask = [] if bags.mask is None else [("mask", bags.mask)]
    leaves = [("values", bags.values), ("offsets", bags.offsets), *mask, *bags.extras.items()]
    return [(pytree.GetAttrKey(key), leaf) for key, leaf in leaves], (bool(mask), tuple(bags.extras))


def _flatten(bags: Bags):
    keyed, context = _flatten_with_keys(bags)
    return [leaf for _, leaf in keyed], context


def _unflatten(leaves: Iterable[Any], context: tuple[bool, tuple[str, ...]]) -> Bags:
    has_mask, names = context
    values, offsets, *rest = leaves
    mask = rest.pop(0) if has_mask else None
    return Bags._unchecked(values, offsets, mask, dict(zip(names, rest, strict=True)))


pytree.register_pytree_node(
    Bags,
    _flatten,
    _unflatten,
    serialized_type_name="milkernels.Bags",
    to_dumpable_context=lambda context: [context[0], list(context[1])],
    from_dumpable_context=lambda dumped: (dumped[0], tuple(dumped[1])),
    flatten_with_keys_fn=_flatten_with_keys,
)


def collate_bags(
    batch: Sequence[Any],
    *,
    per_instance: Sequence[str | int] | Mapping[int, str] = (),
    features: str = "features",
) -> Any:
    """A ``collate_fn`` for ``torch.utils.data.DataLoader`` that makes ``Bags`` of the samples' features.

    Args:
        batch: samples, all alike: features ``[n, L]``, tuples ``(features, *rest)`` or dicts.  Features are tensors or
            arrays; of an array that lies in a file (memory map, h5 or zarr data set) all rows are read, at once.
        per_instance: what has one row per instance, ``[n, ...]``, and goes into ``Bags.extras``: keys of a
            dict, or positions in a tuple (features are 0), named ``"1"``... or as in ``{1: "coords"}``.
        features: the key of the features in a dict.

    Returns:
        ``Bags``; or a tuple or dict like the samples, with ``Bags`` in the place of the features, without
        what went into the extras, the rest collated by ``default_collate``.  For ``DataLoader`` set options
        with ``functools.partial``.

    Raises:
        TypeError: samples of another or of mixed types, or features that are neither tensors nor arrays of numbers.
        ValueError: no samples; a key or position that is missing; lengths, widths or types that do not fit.
    """
    check_type("batch", batch, Sequence, "a sequence of samples")
    if not batch:
        raise ValueError("collate_bags needs at least one sample; got an empty batch")
    kind, *others = {_kind(sample) for sample in batch}
    if others or kind is None:
        got = ", ".join(sorted({type(sample).__name__ for sample in batch}))
        raise TypeError(f"batch must hold samples: all tensors, all tuples (features, *rest) or all dicts; got {got}")
    if kind is Tensor:
        batch, features = [{0: sample} for sample in batch], 0
    elif kind is tuple:
        batch, features = [dict(enumerate(sample)) for sample in batch], 0
    if not isinstance(features, Hashable):
        raise TypeError(f"features must be a key of the samples; got {type(features).__name__}")
    if isinstance(per_instance, (str, int)) and not isinstance(per_instance, bool):
        per_instance = (per_instance,)
    check_type("per_instance", per_instance, (Sequence, Set, Mapping), "keys or positions")
    if not isinstance(per_instance, Mapping):
        per_instance = {key: str(key) for key in per_instance}
    columns = _columns(batch, features, per_instance)
    extras = {name: _as_tensors(key, columns.pop(key)) for key, name in per_instance.items()}
    bags = Bags.from_list(_as_tensors(features, columns[features]), extras=extras)
    made = {k: bags if k == features else _collate_rest(k, column) for k, column in columns.items()}
    return bags if kind is Tensor else made if kind is Mapping else tuple(made.values())


def _kind(sample) -> type | None:
    """What a sample of `collate_bags` is: a mapping, a tuple, or features alone, as a tensor; None: none of them."""
    if isinstance(sample, Mapping):
        return Mapping
    if isinstance(sample, (tuple, list)):
        return tuple
    return Tensor if isinstance(sample, Tensor) or hasattr(sample, "__array__") else None


def _columns(batch: Sequence[Mapping], features, per_instance: Mapping) -> dict[Any, list]:
    keys = list(batch[0])
    for i, sample in enumerate(batch):
        if set(sample) != set(keys):
            raise ValueError(f"samples must have the same entries, {keys}; sample {i} has {list(sample)}")
    for key in (features, *per_instance):
        if key not in keys:
            name = "features" if key is features else "per_instance"
            raise ValueError(f"{name} must be entries of the samples, which have no {key!r}; they have {keys}")
    if features in per_instance:
        raise ValueError(f"per_instance must not name the features; got {features!r}")
    return {key: [sample[key] for sample in batch] for key in keys}


def _as_tensors(key, column: list) -> list[Tensor]:
    """Arrays, and data sets of feature files that are open still, become tensors: one read of each."""
    return [_as_tensor(f"{key!r} of sample {i}", item) for i, item in enumerate(column)]


def _as_tensor(name: str, item) -> Tensor:
    if isinstance(item, Tensor):
        return item
    if not hasattr(item, "__array__"):
        hint = "; read it by [:]" if hasattr(item, "shape") else ""
        raise TypeError(f"{name} must be a tensor or an array; got {type(item).__name__}{hint}")
    array = item.__array__()  # PyTorch itself would read a data set row by row
    try:
        # A tensor of memory that must not be written to, of a file that is mapped to read, would let it be written.
        return torch.as_tensor(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of numbers; got {array.dtype}: {error}") from error


def _collate_rest(key, column: list):
    if all(getattr(item, "ndim", 0) and hasattr(item, "__array__") for item in column):
        column = _as_tensors(key, column)
    shapes = [tuple(item.shape) for item in column if hasattr(item, "shape")]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"{key!r} has different shapes in this batch, {shapes}; if it has one row per instance, "
            f"name it: per_instance=({key!r},)"
        )
    return torch.utils.data.default_collate(column)


def _check_dims(name: str, x: Tensor, expected: str = "[N, L]", ndim: int = 2) -> None:
    check_dense(name, x)
    if x.ndim != ndim:
        raise ValueError(f"{name} must be {expected}; got shape {tuple(x.shape)}")


def _check_rows(name: str, tensor: Tensor, leading: tuple[int, ...], device: torch.device) -> None:
    check_dense(name, tensor)
    if tuple(tensor.shape[: len(leading)]) != leading or tensor.device != device:
        got = f"shape {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must begin with dimensions {list(leading)}, on {device}; got {got}")


def _checked_extras(extras: Extras, values: Tensor) -> dict[str, Tensor]:
    for name, tensor in _items(extras):
        _check_rows(f"extras[{name!r}]", tensor, (values.shape[0],), values.device)
    return dict(_items(extras))


def _items(extras: Mapping | None) -> Iterable[tuple[str, Any]]:
    if extras is None:
        return ()
    check_type("extras", extras, Mapping, "a mapping of names to tensors")
    return extras.items()


def _concatenate(name: str, parts: Iterable[Tensor], lengths: list[int]) -> Tensor:
    """One tensor from the parts of all bags; torch.cat would promote types silently."""
    check_type(name, parts, Iterable, "a sequence of tensors")
    parts = list(parts)
    if len(parts) != len(lengths):
        raise ValueError(f"{name} must have one tensor per bag, {len(lengths)}; got {len(parts)}")
    for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        _check_rows(f"{name}[{i}]", part, (length,), getattr(parts[0], "device", None))
        got, expected = ((list(p.shape[1:]), p.dtype) for p in (part, parts[0]))
        if got != expected:
            raise ValueError(
                f"{name} must share one width and type; {name}[{i}] has {got[0]}, {got[1]} "
                f"and {name}[0] has {expected[0]}, {expected[1]}"
            )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _offsets_of(lengths: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=dtype, device=device)


def _even_offsets(num_bags: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(num_bags + 1, device=device) * length  # no copy from the host, so no synchronisation


def _prefix_mask(lengths, num_bags: int, longest: int, device: torch.device) -> Tensor:
    try:
        lengths = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be [{num_bags}] ints; got {type(lengths).__name__}") from error
    check_dense("lengths", lengths)
    if lengths.shape != (num_bags,) or lengths.dtype not in _COUNT_TYPES:
        raise ValueError(f"lengths must be [{num_bags}] ints; got {list(lengths.shape)} of {lengths.dtype}")
    if readable(lengths) and num_bags:
        low, high = lengths.min().item(), lengths.max().item()
        if low < 0 or high > longest:
            raise ValueError(f"lengths must be within [0, {longest}]; got {low} to {high}")
    return torch.arange(longest, device=device) < lengths.to(device)[:, None]
