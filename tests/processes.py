"""Functions run by several processes that form a group of `torch.distributed` over gloo."""

import contextlib
import datetime
import io
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no torch.distributed over gloo"
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "milkernels"])
_groups: dict[int, "_Group"] = {}  # by their size: starting processes takes longer than most tests


def run(function: Callable, ranks: int, *args, seconds: float = 120, timeout: float | None = None) -> list:
    """What ``function(rank, *args)`` returns in each of them, in order: numbers, tensors and lists of them.

    Errors of ranks are raised here.  They are the same processes for every call, unless the last one failed;
    with a ``timeout``, that of the group, they are started for this call alone.
    """
    group = _Group(ranks, timeout) if timeout else _groups.pop(ranks, None) or _Group(ranks, 20)
    try:
        answers = group.call(function, args, time.monotonic() + seconds)
    except BaseException:
        group.end()
        raise
    if timeout:
        group.end()
    else:
        _groups[ranks] = group
    return answers


class _Group:
    def __init__(self, ranks: int, timeout: float):
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = _CONTEXT.Pipe()
            arguments = (rank, ranks, str(Path(self.folder.name) / "store"), theirs, timeout)
            self.processes.append(_CONTEXT.Process(target=_work, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def call(self, function: Callable, args: tuple, deadline: float) -> list:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"rank {rank} has not answered")
            try:
                answers.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
            except EOFError:
                answers.append("it died")
        if errors := [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if isinstance(answer, str)]:
            raise RuntimeError("\n".join(errors))  # the others may only have waited for one of them
        return [answer[0] for answer in answers]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


def _work(rank: int, ranks: int, path: str, pipe, timeout: float) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=dist.FileStore(path, ranks), rank=rank, world_size=ranks, timeout=wait)
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                answer = (function(rank, *args),)
            except BaseException:
                answer = traceback.format_exc()
            written = io.BytesIO()  # not as shared memory: this process may be gone before a tensor is read
            torch.save(answer, written)
            pipe.send_bytes(written.getvalue())
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
