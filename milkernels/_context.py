"""What blocks say in this thread and this asyncio task: which backend (``use_backend``), how much may be saved
(``saved_bytes``).

torch.compile cannot trace a ContextVar.  But it reads an attribute of a module as Python does, and guards the value
that it found; so traced code reads the variables as such: ``_context.backend``, ``_context.saved_bytes``.
"""

from contextvars import ContextVar
from typing import Any

from milkernels import _torch

_blocks: ContextVar[tuple[list[str], ...]] = ContextVar("milkernels.use_backend", default=())
_saved_bytes: ContextVar[int | None] = ContextVar("milkernels.saved_bytes", default=None)


def current() -> str | None:
    blocks = _blocks.get()
    if not blocks and (context := _torch.context_of_backward()) is not None:  # a checkpoint computes again
        blocks = context.get(_blocks, ())
    return blocks[-1][0] if blocks else None


def current_saved_bytes() -> int | None:
    limit = _saved_bytes.get()
    if limit is None and (context := _torch.context_of_backward()) is not None:  # as above
        limit = context.get(_saved_bytes)
    return limit


def __getattr__(name: str) -> Any:
    if name == "backend":
        return current()
    if name == "saved_bytes":
        return current_saved_bytes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def enter(name: str) -> list[str]:
    block = [name]
    _blocks.set((*_blocks.get(), block))
    return block


def leave(block: list[str]) -> None:
    """That block, wherever it is: blocks of generators need not be left in the order in which they were entered."""
    _blocks.set(tuple(other for other in _blocks.get() if other is not block))


def set_saved_bytes(limit: int) -> int | None:
    """Returns what it was before."""
    before = _saved_bytes.get()
    _saved_bytes.set(limit)
    return before


def reset_saved_bytes(before: int | None) -> None:
    _saved_bytes.set(before)
