"""What a run says: the table, and the JSON file.

The JSON file, schema 2, is one object:

``schema``      2; in files of 1 the rows have ratio_to_eager and ratio_to_compile in the place of ratios
``command``     the command line, paths cut to their last part
``date``        UTC, ISO 8601
``machine``     cpu, instruction_set, threads, torch, python, system, huge_pages, versions of peers
``commit``      of the checkout the package lies in, ``-dirty`` where files differ from it; null elsewhere
``sources``     digest of the kernel sources that ran (``source_digest``); null where there are none
``workload``    op, shape (lengths, dim, hidden, heads), features, padded, dropout, seed
``roofline``    read_bandwidth (bytes/s), array_bytes, matrix_rates: type -> FLOP/s per probe, in order
``rows``        one per type, mode and contender:
    op, dtype, mode, contender, label, ours
    status      ok | FAIL (broke the error promise) | error | unavailable | differs (another function)
    reason      for any status but ok
    seconds     per call and round; median, minimum, spread (interquartile range over median), rounds,
                calls per round; ``once``: a single run after a warm-up on a prefix
    ratios      contender -> its median over this one, for eager in all its formulas and torch.compile
    instances_per_second, bags_per_second, flops, bytes, floor_seconds, share_of_floor
    resident, allocator   peak extra bytes; null where not measured, with ``memory_note``
    errors      name, ours, eager, bound, size, ratio, ok and reason per output and gradient; ``gate_note``
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from milkernels import native
from milkernels.bench import run
from milkernels.bench.contenders import YARDSTICKS, packages
from milkernels.bench.roofline import MatrixProbe
from milkernels.bench.run import Result, Row
from milkernels.bench.tables import worst_ratio
from milkernels.bench.workload import Workload

SCHEMA = 2
ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or where the package is installed
_IMPOSSIBLE = 4 / 3  # a step that keeps its hidden units does three quarters of the work counted
_UNSTEADY = 2.0  # how far the matrix rate may move before the report says so
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def instruction_set() -> str:
    """What PyTorch uses here, and the matrix unit where there is one."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability}+AMX" if capability == "AVX512" and "amx_bf16" in flags else capability


def machine() -> dict[str, object]:
    versions = {}
    for package in ("milkernels", "numpy", *packages()):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    huge = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text()) if _HUGE_PAGES.exists() else None
    return {
        "cpu": cpu_model(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "extension": native.build_info() or native.load_error(),
        "huge_pages": {
            "kernel": huge.group(1) if huge else None,
            "torch": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        },
        "versions": versions,
    }


def device_slug(name: str | None = None) -> str:
    """A file name for this kind of device; without a name of one, for the CPU."""
    return re.sub(r"[^a-z0-9]+", "-", (name or f"{cpu_model()} {instruction_set()}").lower()).strip("-")


def source_digest(root: Path = ROOT, *, gpu: bool = False) -> str | None:
    """SHA-256 over names and contents of what decides the speed: ``csrc``, the ops' contracts and reference; on a GPU
    the Triton kernels too, and only there ``csrc/cuda``."""
    if not (root / "csrc").is_dir():
        return None  # installed without sources
    package = root / "milkernels"
    cuda = root / "csrc" / "cuda"
    files = [p for p in (root / "csrc").rglob("*") if p.is_file() and (gpu or cuda not in p.parents)]
    files += (package / "ops").rglob("*.py")
    files += (package / "triton").rglob("*.py") if gpu else ()
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit(root: Path = ROOT) -> str | None:
    """The commit of the checkout, ``-dirty`` if tracked files differ; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed into an environment that lies in another project
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def row_values(row: Row) -> dict[str, object]:
    values = asdict(row) | {
        "share_of_floor": row.share_of_floor,
        "instances_per_second": row.instances_per_second,
        "bags_per_second": row.bags_per_second,
    }
    timing = values.pop("timing")
    values["seconds"] = timing["seconds"] if timing else []
    if row.timed:
        values |= {
            "median": row.timing.median,
            "minimum": row.timing.minimum,
            "spread": row.timing.spread,
            "rounds": len(row.timing.seconds),
            "calls": row.timing.calls,
        }
    return values


def plain(value: object) -> object:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(result: Result, workload: Workload, argv: Sequence[str]) -> dict[str, object]:
    shown = asdict(workload)
    shown["features"] = Path(workload.features).name
    # Results are published: a path says nothing about them, only about whose machine it was.
    words = [Path(word).name if os.sep in word else word for word in argv]
    return plain(
        {
            "schema": SCHEMA,
            "command": " ".join(["python -m milkernels bench", *words]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "commit": commit(),
            "sources": source_digest(gpu=workload.device != "cpu"),
            "workload": shown,
            "roofline": {
                "read_bandwidth": result.bandwidth,
                "array_bytes": result.bandwidth_array,
                "matrix_rates": {str(d).removeprefix("torch."): r for d, r in result.probe.rates.items()},
            },
            "rows": [row_values(row) for row in result.rows],
        }
    )


def write(result: dict[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant ones, without exponents."""
    if value is None:
        return "-"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(places, 4)}f}"


def _headline(result: Result, workload: Workload) -> list[str]:
    here, shape = machine(), workload.shape
    bags = f"{shape.bags} bags of {min(shape.lengths)} to {max(shape.lengths)}" if shape.bags > 1 else "one bag"
    padded = ", padded to the longest" if workload.padded else ""
    lines = [
        f"{here['cpu']}, {here['threads']} threads, {here['instruction_set']}, torch {here['torch']}",
        f"{workload.op}: {shape.instances} instances of {shape.dim} in {bags}{padded}; "
        f"hidden {shape.hidden}, heads {shape.heads}, features {Path(workload.features).name}",
        f"read bandwidth {result.bandwidth / 1e9:.1f} GB/s on {result.bandwidth_array >> 20} MiB; "
        "matrix rate in GFLOP/s, min/median of the probes between the rounds: "
        + ", ".join(
            f"{str(d).removeprefix('torch.')} {_number(min(r) / 1e9)}/{_number(statistics.median(r) / 1e9)}"
            for d, r in result.probe.rates.items()
        ),
    ]
    pages = here["huge_pages"]
    if pages["kernel"] == "madvise" and not pages["torch"]:
        lines.append("huge pages: not for PyTorch's own tensors (THP_MEM_ALLOC_ENABLE=1 would allow them)")
    return lines


def _cells(row: Row, yardsticks: Sequence[str]) -> list[str]:
    start = [row.op, row.dtype, row.mode, row.label]
    if not row.timed:
        status = row.status if row.status == run.FAIL else f"[{row.status}]"
        return [*start, status.replace("[", r"\["), *["-"] * (6 + len(yardsticks))]
    rounds = f"{len(row.timing.seconds)}{'*' if row.once else ''}"
    memory = "-" if row.resident is None else _number(row.resident / 1e6)
    return [
        *start,
        _number(1e3 * row.timing.median),
        _number(1e3 * row.timing.minimum),
        rounds,
        *(_number(row.ratios.get(name)) for name in yardsticks),
        _number(row.instances_per_second / 1e6),
        memory,
        "-" if row.share_of_floor is None else f"{100 * row.share_of_floor:.0f}%",
        _number(worst_ratio(row.errors), 2),
    ]


def table(rows: Sequence[Row]) -> Table:
    yardsticks = [name for name in YARDSTICKS if any(row.contender == name for row in rows)]
    result = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "dtype", "mode", "contender"):
        result.add_column(name, no_wrap=True)
    for name in (
        "median ms",
        "min ms",
        "rounds",
        *(f"x {name}" for name in yardsticks),
        "M inst/s",
        "extra MB",
        "of floor",
        "error",
    ):
        result.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, (row.dtype, row.mode)):
            result.add_section()
        previous = (row.dtype, row.mode)
        style = {run.FAIL: "bold red", run.OK: "bold" if row.ours else ""}.get(row.status, "dim")
        result.add_row(*_cells(row, yardsticks), style=style)
    return result


def _notes(rows: Sequence[Row], probe: MatrixProbe) -> list[str]:
    notes = [
        "x eager and so on: its median over this one. extra MB: peak resident memory beyond the inputs, "
        "outputs and gradients included. of floor: the least time this machine allows over the median; a "
        "contender that keeps hidden units instead of computing them again may pass 100%. error: the largest "
        "of our error over eager's, both against float64."
    ]
    if any(row.once for row in rows):
        notes.append("* one run, after a warm-up on a few instances: a round would not fit the budget")
    if any((row.share_of_floor or 0) > _IMPOSSIBLE for row in rows):
        notes.append("shares far above 100%: the probes were disturbed more than the contenders; do not use them")
    for dtype, rates in probe.rates.items():
        if max(rates) > _UNSTEADY * min(rates):
            notes.append(
                f"the matrix rate of {str(dtype).removeprefix('torch.')} changed {max(rates) / min(rates):.1f}-fold "
                "during this run: trust ratios between contenders, not single times"
            )
    said: dict[str, list[str]] = {}  # what is the same for several rows is said once
    for row in rows:
        where = f"{row.dtype} {row.mode}"
        if row.reason:
            said.setdefault(f"{row.label}, {row.status}: {row.reason}", []).append(where)
        if row.memory_note:
            said.setdefault(f"{row.label}, no memory: {row.memory_note}", []).append(where)
        if row.gate_note:
            said.setdefault(f"{row.label}: {row.gate_note}", []).append(where)
    return notes + [f"{text} [{', '.join(where)}]" for text, where in said.items()]


def show(console: Console, result: Result, workload: Workload) -> None:
    for line in _headline(result, workload):
        console.print(line, highlight=False, markup=False)
    console.print()
    console.print(table(result.rows))
    console.print()
    for line in _notes(result.rows, result.probe):
        console.print(line, highlight=False, markup=False)
