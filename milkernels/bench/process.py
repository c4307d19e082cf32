"""Functions in a process of their own, which may die or be ended: ``python -m milkernels.bench.process``.

It reads calls, one JSON line each (a function by its full name, and its arguments), and answers in JSON lines: whatever
the function emits (``doing`` says who is at work), then ``done``.  An error that spoils the process is answered by
``poisoned``, and ends it.
"""

import contextlib
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

_PACKAGES = Path(__file__).resolve().parents[2]  # what must be importable in the process
Emit = Callable[[dict], object]


class Died(Exception):
    """The process ended in the middle of a call; ``contender`` and ``mode`` were at work, where it is known."""

    def __init__(self, reason: str, contender: str = "", mode: str = ""):
        super().__init__(reason)
        self.contender, self.mode = contender, mode


class OutOfTime(Exception):
    """The call was not finished at its deadline."""


class Poisoned(BaseException):
    """An error of a GPU after which every call in this process fails; no ``except Exception`` may hide it."""


class Process:
    """One process that lives as long as nothing goes wrong in it."""

    def __init__(self, command: tuple[str, ...] = ()):
        self.command = command or (sys.executable, "-m", "milkernels.bench.process")
        self.process: subprocess.Popen | None = None

    def call(self, function: str, arguments: dict, emit: Emit, deadline: float) -> None:
        """``function(emit, **arguments)`` in the process, or `Died`, or `OutOfTime` where it had to be ended;
        ``deadline`` is of ``time.monotonic``."""
        self.send(function, arguments)
        self.receive(emit, deadline)

    def send(self, function: str, arguments: dict) -> None:
        if self.process is None or self.process.poll() is not None:
            self._start()
        with contextlib.suppress(OSError):  # where it has ended, `receive` will say so
            self.process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
            self.process.stdin.flush()

    def receive(self, emit: Emit, deadline: float) -> None:
        at_work = {"contender": "", "mode": ""}
        while True:
            try:
                event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.stop()
                raise OutOfTime(f"{at_work['contender']} {at_work['mode']}".strip()) from None
            if event is None:
                raise Died(self._epitaph(), **at_work)
            if "doing" in event:
                at_work = event["doing"]
            elif "poisoned" in event:
                self.stop()
                raise Died(event["poisoned"], **at_work)
            elif "done" in event:
                return
            else:
                emit(event)

    def _start(self) -> None:
        self.stop()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by stop
        self.process = subprocess.Popen(
            self.command,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,  # torch.compile has processes of its own, which must end with it
        )
        self.events: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process.stdout, self.events), daemon=True).start()

    @staticmethod
    def _listen(stream, events: queue.Queue) -> None:
        for line in stream:
            events.put(json.loads(line))
        events.put(None)

    def stop(self) -> None:
        if self.process is None:
            return
        end_group(self.process)
        self.process = None
        self.errors.close()

    def _epitaph(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().strip().splitlines()[-1:]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self.stop()
        return ": ".join([f"the process ended with {how}", *last])


def ask(function: str, arguments: dict, seconds: float) -> list[dict] | str:
    """What the function emits in a process for this call alone, or a line that says why there is nothing."""
    process, answers = Process(), []
    try:
        process.call(function, arguments, answers.append, time.monotonic() + seconds)
        return answers
    except (Died, OutOfTime) as why:
        return str(why) if isinstance(why, Died) else f"not finished after {seconds:.0f} s"
    finally:
        process.stop()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(_PACKAGES), os.environ.get("PYTHONPATH", "")]).rstrip(":")}


def end_group(process: subprocess.Popen) -> None:
    """Ends a process that leads a session, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    import torch

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints must not end up among the answers

    def emit(event: dict) -> None:
        answers.write(json.dumps(event) + "\n")

    for line in sys.stdin:
        call = json.loads(line)
        module, _, name = call["function"].rpartition(".")
        try:
            getattr(importlib.import_module(module), name)(emit, **call["arguments"])
        except Poisoned as error:
            emit({"poisoned": str(error)})
            return 3
        emit({"done": name})
        gc.collect()  # the next call finds the memory that this one found
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
