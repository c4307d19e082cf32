"""Models of other projects before and after `milkernels.accelerate`: ``python -m benchmarks.upstream --clam PATH ...``.

Each model is built as its authors build it and copied; one of the copies is accelerated, and both run in turns on the
same bags.  Outputs, and for a training step the loss and the gradients of all parameters, are compared before anything
is timed; memory is measured in processes of their own.  Checkouts are only read.

The file is of the one schema (README.md): a unit of kind "upstream" for each model, workload and type, with
``version`` (commit or package version) and ``report`` (what was changed, what was left alone and why).  Its rows are
those of the contenders ``before`` and ``after``, or one that says FAIL (another result), unchanged (nothing was
recognised) or error; ``errors``, of outputs and gradients: name, error (relative 2-norm), tolerance, ok, reason, and
where the error is larger the distances of both from the result in a wider type: after, before, and what is allowed,
with the number of ``instances`` if memory was too small for all in that type.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import pages, results, upstream_coverage
from benchmarks.upstream_models import MODELS, PROJECTS, Missing, Source
from benchmarks.upstream_run import (
    ERROR,
    FAIL,
    MODES,
    OK,
    UNCHANGED,
    Case,
    Options,
    Row,
    environment,
    measure,
)
from milkernels.bench import cli, report
from milkernels.bench.workload import DTYPES

# torchmil's own tests


TORCHMIL_TESTS = ("models/test_abmil.py", "models/test_dsmil.py", "models/test_clam.py")
TORCHMIL_TESTS += ("nn/attention/test_attention_pool.py",)


def run_torchmil_tests(source: Source) -> dict:
    """Its tests in a process of their own, with every model accelerated that they construct.

    Returns ``version``, ``passed``, ``skipped``, ``failed`` (first lines by name) and, counted by class, how many
    models were ``constructed`` and ``changed``.
    """
    folder = _torchmil_folder(source) / "tests"
    files = [folder / name for name in TORCHMIL_TESTS]
    for name, file in zip(TORCHMIL_TESTS, files, strict=True):
        if not file.is_file():
            raise Missing(f"tests/{name} does not come with torchmil here")
    with tempfile.TemporaryDirectory() as scratch:
        xml, counts = Path(scratch) / "tests.xml", Path(scratch) / "counts.json"
        (Path(scratch) / "pytest.ini").write_text("[pytest]\n")  # theirs may ask for plug-ins
        options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.accelerated_constructors"]
        options += [f"--accelerated-counts={counts}", f"--junitxml={xml}", f"--rootdir={scratch}"]
        options += ["-c", f"{scratch}/pytest.ini", "--import-mode=importlib"]
        command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
        paths = [source.path] if source.path else []
        done = subprocess.run(command, env=environment(*paths), cwd=scratch, capture_output=True, text=True)
        if not xml.exists() or not counts.exists():
            last = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(f"the tests did not run: {last[-1]}")
        return _outcome(xml) | json.loads(counts.read_text()) | {"version": source.version}


def _torchmil_folder(source: Source) -> Path:
    if source.path:
        return Path(source.path)
    spec = importlib.util.find_spec("torchmil")
    if spec is None:
        raise Missing("torchmil is not installed")
    return Path(next(iter(spec.submodule_search_locations))).parent


def _outcome(xml: Path) -> dict:
    cases = list(ET.parse(xml).getroot().iter("testcase"))
    bad = {c.get("name"): c.find(kind) for c in cases for kind in ("failure", "error") if c.find(kind) is not None}
    skipped = sum(c.find("skipped") is not None for c in cases)
    failed = {name: ((found.get("message") or "").splitlines() or [""])[0] for name, found in bad.items()}
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


# What is said


_COLUMNS = {"model": 42, "bags": 42, "type": 9, "mode": 5, "before ms": 10, "after ms": 10, "ratio": 6}
_COLUMNS |= {"spread": 9, "extra MB": 17, "difference": 11}


def _table(row: Row | None) -> Table:
    """One line: a row, or the header.  Rows are printed as they come in, so widths are fixed."""
    table = Table.grid(padding=(0, 1))
    for i, width in enumerate(_COLUMNS.values()):
        table.add_column(width=width, no_wrap=True, justify="left" if i < 4 else "right")
    if row is None:
        table.add_row(*_COLUMNS, style="bold")
    else:
        table.add_row(*_cells(row), style={FAIL: "bold red", ERROR: "red", UNCHANGED: "dim"}.get(row.status, ""))
    return table


def _cells(row: Row) -> list[str]:
    start = [f"{row.project}: {row.model}", pages.what_bags(row.workload), row.dtype, row.mode]
    if row.status != OK:
        return [*start, row.status, "", "", "", "", row.worst]
    resident = [side.resident for side in (row.before, row.after)]
    return [
        *start,
        *(pages.milliseconds(side.median) for side in (row.before, row.after)),
        f"{row.ratio:.2f}",
        "/".join(f"{100 * side.spread:.0f}" for side in (row.before, row.after)) + "%",
        "-" if None in resident else " / ".join(f"{r / 1e6:,.1f}" for r in resident),
        row.worst,
    ]


def show_notes(console: Console, rows: Sequence[Row]) -> None:
    """What the table does not say: reasons, and what was changed in each model."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    said: dict[str, None] = {}
    for row in rows:
        where = f"{row.project}: {row.model}"
        said |= dict.fromkeys(f"{where}, {line}" for line in row.report)
        if row.reason:
            said[f"{where}, {row.dtype} {row.mode}, {row.status}: {row.reason}"] = None
        for name, side in (("before", row.before), ("after", row.after)):
            if side.memory_note:
                said[f"{where}, {row.dtype}, no memory {name}: {side.memory_note}"] = None
    say("")
    for line in said:
        say(line)


def units_of(rows: Sequence[Row], command: str) -> list[dict]:
    come_from, units = report.provenance(command), {}
    for row in rows:
        shape = row.workload["shape"]
        op = f"{row.project}: {row.model}"
        name = f"{op}, {row.workload['name']} {sum(shape['lengths'])} x {shape['dim']} {row.dtype}"
        about = {"name": name, "kind": "upstream", "part": "upstream", "dtype": row.dtype, "threads": 0}
        about |= come_from | {"version": row.version, "report": row.report, "workload": {"op": op, **row.workload}}
        units.setdefault(name, about | {"rows": []})["rows"] += _rows_of(row)
    return list(units.values())


def _rows_of(row: Row) -> list[dict]:
    lengths = row.workload["shape"]["lengths"]
    common = {"dtype": row.dtype, "mode": row.mode, "status": row.status, "reason": row.reason}
    common |= {"instances": sum(lengths), "bags": len(lengths)}
    after = common | {"contender": "after", "label": "after", "ours": True, "errors": row.errors}
    if row.status != OK:
        return [report.compact(after)]
    before = common | {"contender": "before", "label": "before", "ours": False, "errors": []}
    sides = [before | asdict(row.before), after | asdict(row.after)]
    return [report.compact(side | {"rounds": len(side["seconds"])}) for side in sides]


def command_line(argv: Sequence[str], given: Mapping[str, str | None]) -> str:
    """Published with the results, so folders give way to what they hold."""
    titles = {path: PROJECTS[option].title for option, path in given.items() if path}
    words = []
    for word in argv:
        option, equals, value = word.rpartition("=")
        words.append(option + equals + titles.get(value, Path(value).name if os.sep in value else value))
    return f"python -m benchmarks.upstream {shlex.join(words)}"


# The command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.upstream", description=__doc__.partition("\n\n")[0])
    upstream = p.add_argument_group("projects", "a checkout, or without PATH the installed package")
    for project in PROJECTS.values():
        if not project.checkout:
            upstream.add_argument(f"--{project.option}", action="store_const", const="", help=project.title)
        else:
            optional = {"nargs": "?", "const": ""} if project.package else {}
            upstream.add_argument(f"--{project.option}", metavar="PATH", help=project.title, **optional)
    p.add_argument("--instances", type=cli.positive, default=100_000, help="in all bags (%(default)s)")
    p.add_argument("--budget", type=float, default=10.0, help="seconds of timing per row (%(default)s)")
    p.add_argument("--dtype", type=cli.names_among(tuple(DTYPES)), default=["float32", "bfloat16"], metavar="TYPE,...")
    p.add_argument(
        "--mode", type=cli.names_among(MODES), default=list(MODES), metavar="MODE,...", help=", ".join(MODES)
    )
    p.add_argument("--models", type=re.compile, default=re.compile(""), metavar="REGEX", help='of "clam CLAM_SB bag"')
    p.add_argument("--threads", type=cli.positive)
    p.add_argument("--no-memory", action="store_true")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--save", action="store_true", help="in benchmarks/results/<device>.json")
    p.add_argument("--list", action="store_true", help="what --models chooses from")
    p.add_argument("--coverage", nargs="+", metavar="DIR", help="only say what share of the models in these is fused")
    p.add_argument("--torchmil-tests", action="store_true", help="only run torchmil's own tests, models accelerated")
    return p


def cases(arguments: argparse.Namespace, sources: Sequence[Source]) -> list[Case]:
    """In the order of the registry, of the projects that are at hand."""
    at_hand = {source.project.option: source for source in sources}
    chosen = [
        Case(model, at_hand[model.project], workload, dtype, arguments.instances)
        for model in MODELS
        if model.project in at_hand
        for workload in model.workloads
        for dtype in arguments.dtype
    ]
    return [case for case in chosen if arguments.models.search(case.name)]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.list:
        print("\n".join(f"{model.key} {workload}" for model in MODELS for workload in model.workloads))
        return 0
    if arguments.coverage:
        for folder in arguments.coverage:
            if not Path(folder).is_dir():
                p.error(f"--coverage: there is no folder {folder!r}")
        return upstream_coverage.show(arguments.coverage, Console(width=130))
    given = {option: getattr(arguments, option.replace("-", "_")) for option in PROJECTS}
    for option, path in given.items():
        if path is not None and not (Path(path).is_dir() if path else PROJECTS[option].package):
            p.error(f"--{option}: there is no folder {path!r}")
    folders = {option: str(Path(path).resolve()) if path else "" for option, path in given.items()}
    sources = [Source(PROJECTS[option], folders[option]) for option, path in given.items() if path is not None]
    console = Console() if sys.stdout.isatty() else Console(width=sum(_COLUMNS.values()) + len(_COLUMNS))
    if arguments.torchmil_tests:
        return _say_tests(console, Source(PROJECTS["torchmil"], folders["torchmil"]))
    chosen = cases(arguments, sources)
    if not chosen:
        p.error("nothing to measure: name projects, and with --models some of what --list says")
    return _measure_all(console, chosen, arguments, command_line(argv, given))


def _measure_all(console: Console, chosen: Sequence[Case], arguments: argparse.Namespace, command: str) -> int:
    options = Options(arguments.budget, arguments.mode, arguments.threads, not arguments.no_memory)
    if options.threads:
        torch.set_num_threads(options.threads)
    targets = [arguments.json] if arguments.json else []
    if arguments.save:
        targets.append(results.FOLDER / f"{results.device_slug()}.json")
    console.print(_table(None))
    rows: list[Row] = []
    for case in chosen:
        with console.status(f"{case.name} {case.dtype}") as status:
            new = measure(case, options, lambda what, s=status, c=case: s.update(f"{c.name} {c.dtype}: {what}"))
        for row in new:
            console.print(_table(row))
        rows += new
        for path in targets:  # each time: what is measured is not lost if a later model takes the process with it
            results.merge(path, report.machine(), units_of(rows, command))
    if arguments.save:
        pages.write(targets[-1])
    show_notes(console, rows)
    return int(any(row.status in (FAIL, ERROR) for row in rows))


def _say_tests(console: Console, source: Source) -> int:
    try:
        done = run_torchmil_tests(source)
    except Missing as error:
        sys.exit(f"--torchmil-tests: {error}")
    counts = ", ".join(f"{name} {done['changed'].get(name, 0)} of {n}" for name, n in done["constructed"].items())
    console.print(
        f"torchmil {done['version']}: {done['passed']} of its tests passed, {len(done['failed'])} failed, "
        f"{done['skipped']} skipped; models changed: {counts or 'none were constructed'}",
        highlight=False,
        markup=False,
    )
    for name, message in done["failed"].items():
        console.print(f"  {name}: {message}", highlight=False, markup=False)
    return int(bool(done["failed"]) or not done["passed"] or not any(done["changed"].values()))


if __name__ == "__main__":
    sys.exit(main())
