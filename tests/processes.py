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


def run(function: Callable, ranks: int, *args, seconds: float = 60, timeout: float = 30) -> list:
    """What ``function(rank, *args)`` returns in each of them, in order; numbers, text and lists of them, or tensors.

    The first error of a rank is raised here.  ``timeout`` is that of the group, ``seconds`` that of all.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
        arguments = [
            (function, r, ranks, str(Path(folder) / "store"), pipes[r][1], timeout, args) for r in range(ranks)
        ]
        processes = [_CONTEXT.Process(target=_work, args=a, daemon=True) for a in arguments]
        try:
            for process in processes:
                process.start()
            return _answers(pipes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.join(2)
                if process.is_alive():
                    process.kill()
                    process.join()


def _answers(pipes, deadline: float) -> list:
    answers = []
    for rank, (receive, send) in enumerate(pipes):
        send.close()
        if not receive.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"rank {rank} has not answered")
        try:
            answers.append(torch.load(io.BytesIO(receive.recv_bytes()), weights_only=False))
        except EOFError:
            answers.append("it died")
    for rank, answer in enumerate(answers):
        if isinstance(answer, str):
            raise RuntimeError(f"rank {rank}: {answer}")
    return [answer[0] for answer in answers]


def _work(function, rank: int, ranks: int, path: str, pipe, timeout: float, args) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=dist.FileStore(path, ranks), rank=rank, world_size=ranks, timeout=wait)
    try:
        answer = (function(rank, *args),)
    except BaseException:
        answer = traceback.format_exc()
    written = io.BytesIO()  # the process may be gone before a tensor that is shared is read
    torch.save(answer, written)
    pipe.send_bytes(written.getvalue())
    pipe.close()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
