"""All patches of a bag through an encoder, a chunk at a time, with exact gradients.

Training an encoder through every patch of a slide needs the activations of all of them in one graph, which is what
keeps it from being done (Li, Li, Eliceiri 2021, section 3.3).  Here the forward keeps the features alone, and the
backward encodes each chunk again: the pooling says what the gradient of every feature is, and a chunk's parameters need
nothing else of the others.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from milkernels import _torch
from milkernels.arguments import DTYPES, check_count


def encode_in_chunks(
    encoder: nn.Module, load: Callable[[int, int], object], count: int, chunk: int, *, store: torch.dtype | None = None
) -> Tensor:
    """The features of ``count`` patches, encoded ``chunk`` at a time, which train the encoder end to end.

    ``torch.cat([encoder(load(a, b)) for a, b in chunks])``, and its gradients, in the memory of one chunk: the backward
    loads and encodes again, a chunk at a time.  Any head may follow.

    Args:
        encoder: a module; ``encoder(load(a, b))`` is a tensor ``[b - a, ...]`` of a floating-point type.
        load: ``load(start, end)`` gives the patches in ``[start, end)``, in whatever form the encoder takes one
            argument, on its device.  It is called twice for a chunk and has to give the same both times.  What it
            draws from PyTorch's generators is repeated, so it may augment by them.
        count: patches; those of several bags, one bag after another, go through in one call.  With none ``load(0, 0)``
            is called, for the width of the features.
        chunk: patches that are encoded together; the last chunk may have fewer.
        store: the type of the features, None for the encoder's own.  A narrower one rounds them.

    Returns:
        ``[count, ...]``, on the device of what the encoder returns.

    - **Gradients** reach the encoder's parameters, all of them at once at the end of this call's backward.  They are
      summed in float32 at least.  The patches get none, and may not need one: what is in front and learns belongs into
      the encoder.  A chunk whose features' gradient is exactly 0 is not encoded again: after `instance_max` and
      `max_pool` most are not.  Once differentiable.
    - **The same as one graph of the same chunks**: dropout repeats its units, autocast is that of the forward (without
      its cache of weights, so each chunk's gradient is rounded once), buffers are left as the forward left them.
      Hooks of the encoder are called for both.  **Batch normalisation in training takes its statistics of each chunk,
      not of the bag**, as it would in a loop over chunks; running statistics are counted once.
    - **Processes.**  The model around it goes into DistributedDataParallel or FSDP2 as it is: ranks may have different
      numbers of patches.  The encoder itself, or parts of it, may be sharded by ``fully_shard``; it is whole while its
      chunks run.
    - **Between forward and backward** parameters may not change and modules may not switch between training and
      evaluation.

    Raises:
        TypeError: an encoder that is no module or returns no floating-point tensor, load that cannot be called,
            numbers that are none, a type that is not floating-point.
        ValueError: a count below 0, a chunk below 1, features of another number or shape than the patches, patches
            that need a gradient, an encoder in DistributedDataParallel, one with SyncBatchNorm in training.
        RuntimeError: in the backward, where parameters or modes changed, or where the features of a chunk are other
            ones than in the forward.

    >>> import torch
    >>> from torch import nn
    >>> from milkernels import encode_in_chunks
    >>> from milkernels.nn import ABMIL
    >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> head = ABMIL(8, num_classes=2, embed_dim=None)
    >>> patches = torch.randn(100, 3, 32, 32)
    >>> features = encode_in_chunks(encoder, lambda start, end: patches[start:end], len(patches), chunk=32)
    >>> head(features).logits.sum().backward()
    >>> features.shape, encoder[0].weight.grad.shape
    (torch.Size([100, 8]), torch.Size([8, 3, 3, 3]))
    """
    _check_arguments(encoder, load, count, chunk, store)
    recorded = torch.is_grad_enabled()
    encoding = _Encoding(encoder, load, count, chunk, store, recorded)
    parameters = tuple(encoder.parameters())
    if recorded and any(p.requires_grad for p in parameters):
        return _EncodeInChunks.apply(encoding, *parameters)
    with torch.no_grad():
        return encoding.forward(parameters)


_torch.run_by_python(encode_in_chunks)


def _check_arguments(encoder, load, count, chunk, store) -> None:
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module; got {type(encoder).__name__}")
    if not callable(load):
        raise TypeError(f"load must be a function of a start and an end; got {type(load).__name__}")
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count must be an int; got {type(count).__name__}")
    if count < 0:
        raise ValueError(f"count must be at least 0; got {count}")
    check_count("chunk", chunk)
    if store is not None and store not in DTYPES:
        raise TypeError(f"store must be a floating-point type or None; got {store!r}")
    if isinstance(encoder, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "encoder must be the module in it, encoder.module, and the model around it in DistributedDataParallel; got "
            "DistributedDataParallel, which would hand over gradients once for each chunk"
        )
    for name, module in encoder.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training and _torch.world_size() > 1:
            raise ValueError(
                f"encoder must not have SyncBatchNorm in training: ranks wait for each other at every chunk, of which "
                f"they have different numbers; got {name or 'SyncBatchNorm'}"
            )


@dataclass
class _Encoding:
    """One call: what encodes a chunk, and what has to be known to do it again."""

    encoder: nn.Module
    load: Callable[[int, int], object]
    count: int
    chunk: int
    store: torch.dtype | None
    recorded: bool  # whether gradients are wanted
    states: list = field(default_factory=list)  # of the generators before each chunk
    norms: list[Tensor] = field(default_factory=list)  # [rows]  of each chunk's features

    def __post_init__(self):
        tensors = (*self.encoder.parameters(), *self.encoder.buffers())
        self.devices = sorted({t.device for t in tensors if t.device.type not in ("cpu", "meta")}, key=str)
        kinds = {"cpu", *(device.type for device in self.devices)}
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]

    def ranges(self) -> list[tuple[int, int]]:
        """``(start, end)`` of each chunk; of no patches, one of none."""
        return [(start, min(self.count, start + self.chunk)) for start in range(0, max(self.count, 1), self.chunk)]

    def forward(self, parameters: tuple[Tensor, ...]) -> Tensor:
        """The features of all; nothing is recorded by autograd."""
        self.versions = [_torch.version(p) for p in parameters]
        self.modes = [module.training for module in self.encoder.modules()]
        features = None
        with _torch.unsharded(self.encoder), contextlib.ExitStack() as stack:
            if self.count == 0:
                stack.enter_context(_kept_buffers(self.encoder))  # there are no statistics of no patches
            for start, end in self.ranges():
                if self.recorded:
                    self._keep_state()
                rows = self.encode(start, end)
                if features is None:
                    features = rows.new_empty((self.count, *rows.shape[1:]), dtype=self.store or rows.dtype)
                    self.kind = (rows.dtype, rows.shape[1:])
                elif (rows.dtype, rows.shape[1:]) != self.kind:
                    raise ValueError(f"encoder must return one kind of features; got {self.kind} and {_kind(rows)}")
                features[start:end] = rows
                if self.recorded:
                    self.norms.append(_norms(rows))
        return features

    def _keep_state(self) -> None:
        """Of the generators, before a chunk; one for all chunks that draw nothing, since it is 5 KB."""
        state = _generator_states(self.devices)
        last = self.states[-1] if self.states else None
        drew_nothing = last is not None and all(map(torch.equal, state, last))
        self.states.append(last if drew_nothing else state)

    def encode(self, start: int, end: int) -> Tensor:
        """The features of one chunk."""
        patches = self._patches(start, end)
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                # A cached weight belongs to the graph of the chunk that cast it, or to none.
                stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
            rows = self.encoder(patches)
        if not isinstance(rows, Tensor):
            raise TypeError(f"encoder must return a tensor, the features; got {type(rows).__name__}")
        if rows.dtype not in DTYPES:
            raise TypeError(f"encoder must return floating-point features; got {rows.dtype}")
        if rows.ndim < 2 or rows.shape[0] != end - start:
            expected = f"[{end - start}, ...], a row for each patch in [{start}, {end})"
            raise ValueError(f"encoder must return {expected}; got shape {tuple(rows.shape)}")
        return rows

    def _patches(self, start: int, end: int):
        with torch.set_grad_enabled(self.recorded):
            patches = self.load(start, end)
        for leaf in _torch.pytree.tree_leaves(patches):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise ValueError(
                    f"load must give patches that need no gradient, since they get none: what computes them and learns "
                    f"belongs into the encoder; got one of shape {tuple(leaf.shape)} that needs one"
                )
        return patches

    def check_unchanged(self, parameters: tuple[Tensor, ...]) -> None:
        """What encodes again is what encoded."""
        now = list(self.encoder.named_parameters())
        same = len(now) == len(parameters)
        changed = [
            name
            for (name, p), old, version in zip(now, parameters, self.versions, strict=False)
            if p is not old or _torch.version(p) != version
        ]
        if changed or not same:
            what = changed[0] if changed else f"{len(parameters)} parameters became {len(now)}"
            raise RuntimeError(
                "parameters of the encoder must not change between forward and backward, which encodes again: take "
                f"the optimizer's step after it; changed: {what}"
            )
        if [module.training for module in self.encoder.modules()] != self.modes:
            raise RuntimeError(
                "the encoder must not switch between training and evaluation between forward and backward, which "
                "encodes again"
            )

    def gradients(self, g: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Of the parameters, where needed, of ``g [count, ...]`` of the features."""
        live = torch.stack([(rows != 0).any() for rows in g.split(self.chunk)]).tolist()  # one look at the device
        other = []  # whether a chunk gave other features than before
        with _torch.unsharded(self.encoder), _kept_buffers(self.encoder), _kept_generators(self.devices):
            parameters = list(self.encoder.parameters())
            sums: list[Tensor | None] = [None] * len(parameters)
            wanted = [i for i, need in enumerate(needed) if need]
            for (start, end), state, norms, alive in zip(self.ranges(), self.states, self.norms, live, strict=True):
                if not alive:
                    continue
                with torch.enable_grad():
                    _set_generator_states(self.devices, state)
                    rows = self.encode(start, end)
                self._check_kind(rows, start, end)
                other.append(self._differ(norms, _norms(rows)))
                if rows.requires_grad:  # otherwise the encoder lets no gradient through, as it would in one graph
                    self._add(sums, wanted, parameters, rows, g[start:end])
                del rows
            if other and torch.stack(other).any():
                raise RuntimeError(_OTHER)
            if not other:  # nobody asked which parameters the encoder uses
                for i in wanted:
                    sums[i] = torch.zeros_like(parameters[i])
            return [None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)]

    @staticmethod
    def _add(sums: list, wanted: list[int], parameters: list[Tensor], rows: Tensor, g: Tensor) -> None:
        found = torch.autograd.grad(rows, [parameters[i] for i in wanted], g.to(rows.dtype), allow_unused=True)
        for i, gradient in zip(wanted, found, strict=True):
            if gradient is None:
                continue
            if sums[i] is None:  # a copy: two parameters may have been given one and the same tensor
                sums[i] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
            else:
                sums[i] += gradient

    def _check_kind(self, rows: Tensor, start: int, end: int) -> None:
        if (rows.dtype, rows.shape[1:]) != self.kind:
            raise RuntimeError(f"{_OTHER}: [{start}, {end}) had {self.kind}, and now has {_kind(rows)}")

    def _differ(self, before: Tensor, now: Tensor) -> Tensor:
        """Whether they are not the same to rounding: kernels may be other ones where no graph is recorded."""
        types = [dtype for _, dtype, enabled in self.autocast if enabled] + [self.kind[0]]
        most = max(torch.finfo(dtype).eps for dtype in types) ** 0.5
        return ((before - now).abs() > most * before).any()


_OTHER = (
    "the features of a chunk are other ones in the backward than in the forward: load has to give the same patches for "
    "the same rows, and load and the encoder may draw random numbers from PyTorch's generators only"
)


class _EncodeInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, encoding: _Encoding, *parameters: Tensor) -> Tensor:
        features = encoding.forward(parameters)
        # Not by save_for_backward: what is kept are the modules' own, and `check_unchanged` has the better words.
        ctx.encoding, ctx.parameters = encoding, parameters
        return features

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        ctx.encoding.check_unchanged(ctx.parameters)
        gradients = ctx.encoding.gradients(g, ctx.needs_input_grad[1:])
        pairs = zip(gradients, ctx.parameters, ctx.needs_input_grad[1:], strict=True)
        return None, *(_torch.sharded_as(d, p) if needed else None for d, p, needed in pairs)


def _kind(rows: Tensor) -> tuple:
    return rows.dtype, rows.shape[1:]


def _norms(rows: Tensor) -> Tensor:
    """``[n]``, of the features of each patch: what they are known again by."""
    rows = rows.detach().flatten(1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))


# What is left as it was


@contextlib.contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """After the block every buffer is what it was before."""
    places = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    kept = [(m, name, b, b.detach().clone()) for m, name, b in places]
    try:
        yield
    finally:
        for m, name, buffer, values in kept:
            buffer.data.copy_(values)  # past autograd: other graphs may have saved it, and values are what they saved
            if getattr(m, name) is not buffer:
                setattr(m, name, buffer)


def _generator_states(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices)]


def _set_generator_states(devices: list[torch.device], states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


@contextlib.contextmanager
def _kept_generators(devices: list[torch.device]) -> Iterator[None]:
    states = _generator_states(devices)
    try:
        yield
    finally:
        _set_generator_states(devices, states)
