"""Structure is not proof: the same attributes return different things in different code bases.  Before a module is
swapped, its own methods and the fused ones are run on small random bags, and what they return is compared."""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from milkernels._torch import submodules
from milkernels.integrations.layers import Unfusable, refuse, without_called

ROWS = 23  # of a bag, and of the longest in a padded batch
LENGTHS = (ROWS, ROWS - 6)


class Example(NamedTuple):
    method: str
    args: tuple
    kwargs: dict[str, Any] = {}
    mask: Tensor | None = None  # [B, M]: what is returned for padded rows is not compared


class Inputs:
    """Random bags in the type and on the device of a module."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def bag(self, dim: int, *leading: int) -> Tensor:
        shape = (*(leading or (ROWS,)), dim)
        # Said, since the default device may be another one.
        return (torch.randn(shape, generator=self._generator, device="cpu") + 0.5).to(self.device, self.dtype)

    def padded(self, dim: int) -> tuple[Tensor, Tensor]:
        """Two bags and their mask, bool.  Padding repeats a real row, so that none of it has the one maximum."""
        x = self.bag(dim, len(LENGTHS), ROWS)
        mask = torch.arange(ROWS, device=self.device) < torch.tensor(LENGTHS, device=self.device)[:, None]
        return torch.where(mask[..., None], x, x[:, :1]), mask


def difference(module: nn.Module, structure: Any) -> str | None:
    """What the structure's fused methods return differently from the module's own, or None.

    In eval mode, without gradients; the module and the state of random numbers are as they were.  Types and shapes are
    compared in the module's own type, values in float64, where rounding cannot decide which instance is chosen.
    """
    with isolated(module), torch.no_grad(), mode(module, False), _without(module, structure):
        structure.parts(module)  # why it cannot be fused says more than why it cannot be copied
        for subject, values in ((module, False), (widened(module), True)):
            first = next(p for p in subject.parameters() if p.is_floating_point())
            inputs = Inputs(first.dtype, first.device)
            for example in structure.examples(subject, structure.parts(subject), inputs):
                if found := _compare(subject, structure, example, values):
                    return found
    return None


@contextlib.contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """The state of random numbers is as it was after the block, within it new tensors have values."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None or parameter.is_meta:
        refuse("it has no floating parameters with values")
    with torch.random.fork_rng([parameter.device] if parameter.is_cuda else []), _device_with_values():
        yield


def widened(module: nn.Module) -> nn.Module:
    """A copy in float64, on the CPU if its device has no such type."""
    device = next(p for p in module.parameters() if p.is_floating_point()).device
    try:
        return copy.deepcopy(module).to(device if device.type in ("cpu", "cuda") else "cpu", torch.float64)
    except Exception as error:
        refuse(f"it cannot be copied: {line(error)}")


def _device_with_values() -> contextlib.AbstractContextManager:
    """Models are built under ``torch.device("meta")``, but what they make of a bag on the way needs values."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else contextlib.nullcontext()


def _compare(module: nn.Module, structure: Any, example: Example, values: bool) -> str | None:
    name, args, kwargs, mask = example
    call = f"{name}({', '.join(kwargs)})" if kwargs else name
    seed(module)
    try:
        theirs = getattr(module, name)(*args, **kwargs)
    except Exception as error:
        return f"its {call} raised {line(error)}"
    seed(module)
    try:
        ours = getattr(structure, name)(module, structure.parts(module), *args, **kwargs)
    except Unfusable:
        raise
    except Exception as error:
        return f"{call}, fused, raised {line(error)}"
    if ours is NotImplemented:
        return f"{call} is not fused"
    found = differ(ours, theirs, mask, values)
    return found and f"its {call} returns {found}"


def seed(module: nn.Module) -> None:
    """Seeds the generators that were put aside: ``torch.manual_seed`` would seed those of all devices."""
    torch.default_generator.manual_seed(0)
    parameter = next(module.parameters())
    if parameter.is_cuda:
        with torch.cuda.device(parameter.device):
            torch.cuda.manual_seed(0)


def differ(ours: Any, theirs: Any, mask: Tensor | None, values: bool) -> str | None:
    """What ``theirs`` is, in contrast to ``ours``."""
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        return _differ_tensors(ours, theirs, mask, values)
    if type(ours) is not type(theirs):
        return f"{_kind(theirs)}, not {_kind(ours)}"
    if isinstance(theirs, Mapping):
        if list(ours) != list(theirs):
            return f"a dict of {', '.join(map(str, theirs))}, not of {', '.join(map(str, ours))}"
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, Sequence) and not isinstance(theirs, str):
        if len(ours) != len(theirs):
            return f"{len(theirs)} values, not {len(ours)}"
        found = (differ(o, t, mask, values) for o, t in zip(ours, theirs, strict=True))
        return next(filter(None, found), None)
    if hasattr(theirs, "__array__"):  # NumPy, which need not be there
        return _differ_tensors(torch.as_tensor(ours), torch.as_tensor(theirs), None, values)
    if isinstance(theirs, float):
        return None if not values or math.isclose(ours, theirs, rel_tol=1e-4) else f"{theirs}, not {ours}"
    return None if ours == theirs or theirs is ours else f"{theirs!r}, not {ours!r}"


def _differ_tensors(ours: Tensor, theirs: Tensor, mask: Tensor | None, values: bool) -> str | None:
    if ours.shape != theirs.shape or ours.device != theirs.device or ours.dtype != theirs.dtype:
        return f"{_kind(theirs)}, not {_kind(ours)}"
    if not values:
        return None
    if not theirs.is_floating_point():
        return None if torch.equal(ours, theirs) else "other indices"
    tolerance = 1e-5 if theirs.dtype == torch.float64 else 1e-4  # some have constants in float32
    ours, theirs = _real_rows(ours.double(), mask), _real_rows(theirs.double(), mask)
    size = theirs[theirs.isfinite()].abs().amax().item() if theirs.isfinite().any() else 1.0
    if torch.allclose(ours, theirs, rtol=0, atol=tolerance * max(size, 1e-3), equal_nan=True):
        return None
    return f"other values (shape {list(theirs.shape)})"


def _real_rows(t: Tensor, mask: Tensor | None) -> Tensor:
    """Without the padding of a tensor ``[B, ..., M, ...]``; other tensors as they are."""
    if mask is None or t.ndim < 2 or t.shape[0] != mask.shape[0] or mask.shape[1] not in t.shape[1:]:
        return t
    at = list(t.shape).index(mask.shape[1], 1)
    return t.movedim(at, 1)[mask]


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__


def line(error: BaseException) -> str:
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])


@contextlib.contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """All of it in training or not; no method of its own that says so is called."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = training
    try:
        yield
    finally:
        for m, was in modes:
            m.training = was


@contextlib.contextmanager
def _without(module: nn.Module, structure: Any) -> Iterator[None]:
    """Without what is called as it is, a feature extractor say: what it takes is not known."""
    taken = []
    for path in filter(None, (*structure.opaque, structure.embedding)):
        parent, _, name = path.rpartition(".")
        modules = submodules(module.get_submodule(parent))
        if modules.get(name) is not None:
            taken.append((modules, name, modules[name]))
            modules[name] = without_called(modules[name]) if path == structure.embedding else nn.Identity()
    try:
        yield
    finally:
        for modules, name, extractor in taken:
            modules[name] = extractor
