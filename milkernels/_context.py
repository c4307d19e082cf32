"""The backend that blocks of ``use_backend`` name, in this thread and this asyncio task: ``_context.current()``.

torch.compile cannot trace a ContextVar.  But it reads an attribute of a module as Python does, and guards the value
that it found; so traced code reads the variable as one: ``_context.backend``.
"""

from contextvars import ContextVar

from milkernels import _torch

_blocks: ContextVar[tuple[list[str], ...]] = ContextVar("milkernels.use_backend", default=())


def current() -> str | None:
    blocks = _blocks.get()
    if not blocks and (context := _torch.context_of_backward()) is not None:  # a checkpoint computes again
        blocks = context.get(_blocks, ())
    return blocks[-1][0] if blocks else None


def __getattr__(name: str) -> str | None:
    if name != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return current()


def enter(name: str) -> list[str]:
    block = [name]
    _blocks.set((*_blocks.get(), block))
    return block


def leave(block: list[str]) -> None:
    """That block, wherever it is: blocks of generators need not be left in the order in which they were entered."""
    _blocks.set(tuple(other for other in _blocks.get() if other is not block))
