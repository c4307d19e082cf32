"""Results as JSON and Markdown, options that all examples have, and a progress bar."""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from milkernels.bench import report as machines
from milkernels.bench import tables

RESULTS = Path(__file__).parent / "results"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that train")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that everything works")
    parser.add_argument("--out", type=Path, help="folder for results (default: examples/results; none if --quick)")


def folder(args: argparse.Namespace) -> Path | None:
    return args.out or (None if args.quick else RESULTS)


def table(lines: Iterable[Sequence[str]]) -> str:
    """Markdown; the first line is the header."""
    header, *rest = [[str(cell) for cell in line] for line in lines]
    return tables.markdown([header, ["---"] * len(header), *rest])


def _shown(value: object) -> object:
    """Of a path its last name: where data lie is nobody's business."""
    if isinstance(value, Path):
        return value.name
    return [_shown(v) for v in value] if isinstance(value, list) else value


def _command(name: str, argv: Sequence[str]) -> str:
    return shlex.join(["python", "-m", f"examples.{name}", *(word.rstrip("/").rpartition("/")[2] for word in argv)])


def page(results: dict, markdown: Callable[[dict], str]) -> str:
    """The whole Markdown page of a results file."""
    about = f"{tables.machine(results['machine'])}, {results['date']}"
    commands = "\n".join(f"    {command}" for command in results["commands"])
    return f"{markdown(results).rstrip()}\n\n{about}. The commands:\n\n{commands}\n"


def _digest() -> str:
    """Of the code that made the results: these examples."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class Report:
    """An example's results: ``<name>.json`` and ``<name>.md``, written anew whenever there are more of them.

    Args:
        name: of the example.
        markdown: the page's middle, of the results.
        args, argv: parsed, and as they came.
    """

    def __init__(self, name: str, markdown: Callable[[dict], str], args: argparse.Namespace, argv: Sequence[str]):
        self.name, self.markdown, self.folder = name, markdown, folder(args)
        self.results = {
            "commands": [_command(name, argv)],
            "arguments": {key: _shown(value) for key, value in vars(args).items()},
            "machine": machines.machine(),
            "date": date.today().isoformat(),
            "sources": _digest(),
        }

    def run(
        self, tasks: Sequence[Any], work: Callable[[Any], dict], jobs: int, same: Sequence[str], *, alone: bool = False
    ) -> None:
        """A row for each task, by ``jobs`` processes of one thread each: threads would wait for each other in models so
        small.  ``alone`` gives every task a new process, with all threads.

        A task is a dataclass, and its row holds its fields.  What the file has already stays in it, and is not done
        again, if it is of the same code and of the same values of the arguments ``same``.
        """
        kind = type(tasks[0])
        names = [f.name for f in dataclasses.fields(kind)]
        rows = {kind(*(row[name] for name in names)): row for row in self._earlier_rows(same)}
        left = [task for task in tasks if task not in rows]
        order = [*(task for task in rows if task not in set(tasks)), *tasks]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.func.__module__ if isinstance(work, partial) else work.__module__])
        columns = (TextColumn(self.name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        options = {"max_tasks_per_child": 1} if alone else {"initializer": torch.set_num_threads, "initargs": (1,)}
        with Progress(*columns) as bar, ProcessPoolExecutor(jobs, context, **options) as pool:
            shown = bar.add_task("", total=len(tasks), completed=len(tasks) - len(left))
            for i, row in enumerate(pool.map(work, left)):
                rows[left[i]] = dataclasses.asdict(left[i]) | row
                bar.advance(shown)
                if i % 20 == 0:
                    self.save([rows[task] for task in order if task in rows])
        self.save([rows[task] for task in order])

    def _earlier_rows(self, same: Sequence[str]) -> list[dict]:
        path = self.folder and self.folder / f"{self.name}.json"
        if path is None or not path.is_file():
            return []
        earlier, ours = json.loads(path.read_text()), self.results["arguments"]
        if earlier["sources"] != self.results["sources"] or any(earlier["arguments"][k] != ours[k] for k in same):
            return []
        self.results["commands"] = list(dict.fromkeys([*earlier["commands"], *self.results["commands"]]))
        return earlier["rows"]

    def save(self, rows: list[dict]) -> None:
        self.results["rows"] = rows
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{self.name}.json").write_text(json.dumps(self.results, indent=1) + "\n")
            (self.folder / f"{self.name}.md").write_text(page(self.results, self.markdown))

    def show(self) -> None:
        print(page(self.results, self.markdown))
