"""Results as JSON and Markdown, options that all examples have, and a progress bar."""

import argparse
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from milkernels.bench import report as machines
from milkernels.bench import tables

RESULTS = Path(__file__).parent / "results"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that everything works")
    parser.add_argument("--out", type=Path, help="folder for results (default: examples/results; none if --quick)")


def folder(args: argparse.Namespace) -> Path | None:
    return args.out or (None if args.quick else RESULTS)


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn())


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
    return f"{markdown(results)}\n\n{about}. The command:\n\n    {results['command']}\n"


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
            "command": _command(name, argv),
            "arguments": {key: _shown(value) for key, value in vars(args).items()},
            "machine": machines.machine(),
            "date": date.today().isoformat(),
            "sources": _digest(),
        }

    def earlier_rows(self, *same: str) -> list[dict]:
        """Those of a run that was cut short, if it was of the same code, with the same values of these arguments."""
        path = self.folder and self.folder / f"{self.name}.json"
        if path is None or not path.is_file():
            return []
        earlier = json.loads(path.read_text())
        ours = self.results["arguments"]
        alike = earlier["sources"] == self.results["sources"] and all(earlier["arguments"][k] == ours[k] for k in same)
        return earlier["rows"] if alike else []

    def save(self, rows: list[dict]) -> None:
        self.results["rows"] = rows
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{self.name}.json").write_text(json.dumps(self.results, indent=1) + "\n")
            (self.folder / f"{self.name}.md").write_text(page(self.results, self.markdown))

    def show(self) -> None:
        print(page(self.results, self.markdown))
