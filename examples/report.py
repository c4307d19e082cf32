"""Results as JSON and Markdown, options that all examples have, and a progress bar."""

import argparse
import ast
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from milkernels.bench import report as machines

RESULTS = Path(__file__).parent / "results"
_SAVE_EVERY = 10  # seconds


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        return value

    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    jobs = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--jobs", type=at_least(1), default=jobs, help="processes that train, of one thread each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that everything works")
    parser.add_argument("--out", type=Path, help="folder for results (default: examples/results; none if --quick)")


def folder(args: argparse.Namespace) -> Path | None:
    return args.out or (None if args.quick else RESULTS)


def table(lines: Iterable[Sequence[str]]) -> str:
    """Markdown; the first line is the header."""
    header, *rest = [[str(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rest])


def _shown(value: object) -> object:
    """Of a path its last name: where data lie is nobody's business."""
    if isinstance(value, Path):
        return value.name
    return [_shown(v) for v in value] if isinstance(value, list) else value


def _command(name: str, argv: Sequence[str]) -> str:
    """As it was called, of each path its last name."""
    words = [word.partition("=") if word.startswith("--") else ("", "", word) for word in argv]
    words = [option + equals + value.rstrip("/").rpartition("/")[2] for option, equals, value in words]
    return shlex.join(["python", "-m", f"examples.{name}", *words])


def _machine(device: str) -> dict[str, object]:
    about = machines.machine()
    if torch.device(device).type == "cuda":
        about["gpu"] = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return about


def page(results: dict, markdown: Callable[[dict], str]) -> str:
    """The whole Markdown page of a results file."""
    return "\n\n".join([markdown(results).rstrip(), *_runs(results)]) + "\n"


def _runs(results: dict) -> Iterator[str]:
    """What ran where, and which rows are of it where there are others."""
    earlier = results.get("earlier", [])
    rows_of = [[row for row in results["rows"] if row.get("earlier") == i] for i in (None, *range(len(earlier)))]
    for run, rows in zip([results, *earlier], rows_of, strict=True):
        if not rows and earlier:
            continue
        about = f"{machines.title(run['machine'])}, {run['date']}"
        if len(rows) < len(results["rows"]):
            about += ", " + ", ".join(dict.fromkeys(row["model"] for row in rows))
        yield f"{about}. The commands:"
        yield "\n".join(f"    {command}" for command in run["commands"])


def _sources(name: str) -> Iterator[Path]:
    """The files of an example: its own, and what it imports of the others."""
    left, found = [name], set()
    while left:
        one = left.pop()
        path = Path(__file__).with_name(f"{one}.py")
        if one in found or not path.is_file():
            continue
        found.add(one)
        yield path
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module == "examples":
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("examples."):
                left.append(node.module.partition(".")[2])


def _digest(name: str) -> str:
    """Of the example's sources; what of milkernels it ran says the commit."""
    digest = hashlib.sha256()
    for path in sorted(_sources(name)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def now(x: Tensor) -> float:
    """Seconds, after what ``x``'s device has to do is done."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def as_json(results: dict) -> str:
    """A line for each row."""
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({**results, "rows": []}, indent=1)
    return head.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


class Report:
    """An example's results: ``<name>.json`` and ``<name>.md``, written anew whenever there are more of them.

    Args:
        name: of the example.
        markdown: the page's middle, of the results.
        args, argv: parsed, and as they came.
        stay: rows of other code or another machine stay, marked, until they are done again: for what is no time and no
            memory. Rows then have a ``model``.
    """

    def __init__(
        self,
        name: str,
        markdown: Callable[[dict], str],
        args: argparse.Namespace,
        argv: Sequence[str],
        *,
        stay: bool = False,
    ):
        self.name, self.markdown, self.folder, self.stay = name, markdown, folder(args), stay
        self.results = {
            "commands": [_command(name, argv)],
            "arguments": {key: _shown(value) for key, value in vars(args).items()},
            "machine": _machine(args.device),
            "commit": machines.commit(),
            "date": date.today().isoformat(),
            "sources": _digest(name),
        }

    def run(
        self, tasks: Sequence[Any], work: Callable[[Any], dict], jobs: int, same: Sequence[str], *, alone: bool = False
    ) -> None:
        """A row for each task, by ``jobs`` processes of one thread each: threads would wait for each other in models so
        small.  ``alone`` gives every task a new process, with all threads.

        A task is a dataclass, and its row holds its fields.  What the file has already stays in it, and is not done
        again, if it is of the same code and machine, and of the same values of the arguments ``same``.
        """
        kind = type(tasks[0])
        names = [f.name for f in dataclasses.fields(kind)]
        rows = {kind(*(row[name] for name in names)): row for row in self._earlier_rows(same)}
        left = [task for task in tasks if "earlier" in rows.get(task, ("earlier",))]
        order = [*(task for task in rows if task not in set(tasks)), *tasks]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.func.__module__ if isinstance(work, partial) else work.__module__])
        options = {"max_tasks_per_child": 1} if alone else {"initializer": torch.set_num_threads, "initargs": (1,)}
        columns = (TextColumn(self.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar, ProcessPoolExecutor(jobs, context, **options) as pool:
            shown = bar.add_task("", total=len(tasks), completed=len(tasks) - len(left))
            futures = {pool.submit(work, task): task for task in left}
            saved = time.monotonic()
            try:
                for future in as_completed(futures):
                    rows[futures[future]] = dataclasses.asdict(futures[future]) | future.result()
                    bar.advance(shown)
                    if time.monotonic() - saved > _SAVE_EVERY:
                        self.save([rows[task] for task in order if task in rows])
                        saved = time.monotonic()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self.save([rows[task] for task in order if task in rows])

    def _earlier_rows(self, same: Sequence[str]) -> list[dict]:
        """Those of the file, if they belong to this run; otherwise it is put aside."""
        path = self.folder and self.folder / f"{self.name}.json"
        if path is None or not path.is_file():
            return []
        earlier, ours = json.loads(path.read_text()), self.results
        alike = all(earlier.get(key) == ours[key] for key in ("sources", "machine"))
        if all(earlier["arguments"].get(key) == ours["arguments"].get(key) for key in same):
            rows, runs = earlier.pop("rows"), earlier.pop("earlier", [])
            if alike:
                ours["commands"] = list(dict.fromkeys([*earlier["commands"], *ours["commands"]]))
            elif self.stay:
                rows = [{**row, "earlier": row.get("earlier", -1) + 1} for row in rows]
                runs = [earlier, *runs]
            if alike or self.stay:
                if runs:
                    ours["earlier"] = runs
                return rows
        aside = path.replace(path.with_suffix(".json.old"))
        print(f"{path.name} is of other code, another machine or other arguments: it is {aside.name} now")
        return []

    def save(self, rows: list[dict]) -> None:
        self.results["rows"] = rows
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / f"{self.name}.json", as_json(self.results))
            _write(self.folder / f"{self.name}.md", page(self.results, self.markdown))

    def show(self) -> None:
        print(page(self.results, self.markdown))
