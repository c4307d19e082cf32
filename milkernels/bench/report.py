"""What a run says: the table, and the JSON file.

There is one schema for single runs and for the grids in ``benchmarks/``, whose README.md describes it.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from milkernels import native
from milkernels.bench import run
from milkernels.bench.contenders import YARDSTICKS, installed, packages
from milkernels.bench.roofline import MatrixProbe
from milkernels.bench.run import Result, Row
from milkernels.bench.workload import DTYPES, Workload

SCHEMA = 4
ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or where the package is installed
_NO_ERROR = 1e-3  # of the bound: sums that cancel, and luck
_UNSTEADY = 2.0  # how far the matrix rate may move before the report says so
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", _cpuinfo(), re.M)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def instruction_set() -> str:
    """What PyTorch uses here, and by what bfloat16 is multiplied faster than float32 where it is."""
    capability, flags = torch.backends.cpu.get_cpu_capability(), _cpuinfo()
    faster = next((name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "BF16")) if flag in flags), None)
    return f"{capability}+{faster}" if capability == "AVX512" and faster else capability


def machine() -> dict[str, object]:
    huge = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text()) if _HUGE_PAGES.exists() else None
    return {
        "cpu": cpu_model(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "extension": native.build_info() or native.load_error(),
        "huge_pages": {"kernel": huge and huge.group(1), "torch": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"},
        "versions": {name: installed(name) or None for name in ("milkernels", "numpy", *packages())},
    }


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


def row_values(row: Row, probe: MatrixProbe, bandwidth: float) -> dict[str, object]:
    rates = probe.rates[DTYPES[row.dtype]]
    values = asdict(row) | {
        "share_of_floor": row.share_of_floor,
        "limits": {"read_bandwidth": bandwidth, "matrix_rate": statistics.median(rates) if rates else None},
    }
    del values["timing"]
    values["seconds"] = row.timing.seconds if row.timing else []
    if row.timed:
        values |= {name: getattr(row.timing, name) for name in ("median", "minimum", "spread", "calls")}
        values["rounds"] = len(row.timing.seconds)
    return compact(values)


def compact(row: dict) -> dict:
    """Few digits, and of the errors those that say something."""
    if errors := row.get("errors"):
        worst = max(errors, key=lambda e: (e["ours"] or 0) / e["bound"] if e.get("bound") else e.get("error") or 0)
        row = row | {"errors": [e for e in errors if e is worst or not e["ok"]]}
    return plain(row)


def plain(value):
    """As JSON has it, which knows no NaN and no infinity; digits beyond the fifth are noise."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def provenance(command: str) -> dict[str, object]:
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"command": command, "date": date, "commit": commit()}


def of_run(result: Result, workload: Workload, argv: Sequence[str]) -> dict[str, object]:
    """The content of the file of a single run: a unit for each type."""
    shown = asdict(workload) | {"features": Path(workload.features).name}
    # Results are published: a path says nothing about them, only about whose machine it was.
    words = [Path(word).name if os.sep in word else word for word in argv]
    about = provenance(" ".join(["python -m milkernels bench", *words]))
    units = []
    for dtype in dict.fromkeys(row.dtype for row in result.rows):
        rows = [row_values(row, result.probe, result.bandwidth) for row in result.rows if row.dtype == dtype]
        unit = {"name": workload.describe(dtype), "kind": "bench", "part": "", "dtype": dtype, "threads": 0}
        units.append(unit | about | {"workload": shown, "rows": rows})
    return {"schema": SCHEMA, "machine": machine(), "units": units}


def write(content: dict, path: Path) -> None:
    """JSON with one line for each row, that a person can still search.  A reader finds the old file or the new one,
    never a part of it."""
    heads = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items() if name != "units"]
    shown = []
    for unit in content["units"]:
        rows = ",\n".join(f"   {json.dumps(row)}" for row in unit["rows"])
        about = json.dumps({name: value for name, value in unit.items() if name != "rows"})
        shown.append(f'  {about[:-1]}, "rows": [\n{rows}\n  ]}}')
    heads.append(' "units": [\n' + ",\n".join(shown) + "\n ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(heads) + "\n}\n")
    os.replace(part, path)


def title(about: dict) -> str:
    """A machine in a line."""
    if "gpu" in about:
        return f"{about['gpu']['name']}, CUDA {about['gpu']['cuda']}, PyTorch {about['torch']}"
    return f"{about['cpu']}, {about['threads']} threads, {about['instruction_set']}, PyTorch {about['torch']}"


def worst_ratio(errors: Iterable[dict]) -> float | None:
    """The largest of our error over eager's; where eager happens to have none to speak of it says nothing."""
    told = [e["ratio"] for e in errors if e.get("ratio") is not None and (e["eager"] or 0) > _NO_ERROR * e["bound"]]
    return max(told, default=None)


def _number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant ones, without exponents."""
    if value is None:
        return "-"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{min(places, 4)}f}"


def _headline(result: Result, workload: Workload) -> list[str]:
    shape = workload.shape
    bags = f"{shape.bags} bags of {min(shape.lengths)} to {max(shape.lengths)}" if shape.bags > 1 else "one bag"
    padded = ", padded to the longest" if workload.padded else ""
    rates = (
        f"{str(d).removeprefix('torch.')} {_number(min(r) / 1e9)}/{_number(statistics.median(r) / 1e9)}"
        for d, r in result.probe.rates.items()
    )
    return [
        title(machine()),
        f"{workload.op}: {shape.instances} instances of {shape.dim} in {bags}{padded}; "
        f"hidden {shape.hidden}, heads {shape.heads}, features {Path(workload.features).name}",
        f"read bandwidth {result.bandwidth / 1e9:.1f} GB/s; "
        "matrix rate in GFLOP/s, min/median of the probes between the rounds: " + ", ".join(rates),
    ]


def _cells(row: Row, yardsticks: Sequence[str]) -> list[str]:
    start = [row.op, row.dtype, row.mode, row.label]
    if not row.timed:
        status = row.status if row.status == run.FAIL else rf"\[{row.status}]"
        return [*start, status, *["-"] * (6 + len(yardsticks))]
    return [
        *start,
        *(_number(1e3 * seconds) for seconds in (row.timing.median, row.timing.minimum)),
        f"{len(row.timing.seconds)}{'*' if row.once else ''}",
        *(_number(row.ratios.get(name)) for name in yardsticks),
        _number(row.instances / row.timing.median / 1e6),
        _number(row.resident and row.resident / 1e6),
        "-" if row.share_of_floor is None else f"{100 * row.share_of_floor:.0f}%",
        _number(worst_ratio(row.errors), 2),
    ]


def table(rows: Sequence[Row]) -> Table:
    yardsticks = [name for name in YARDSTICKS if any(row.contender == name for row in rows)]
    result = Table(box=None, pad_edge=False, header_style="bold")
    texts = ("op", "dtype", "mode", "contender")
    ratios = (f"x {name}" for name in yardsticks)
    for name in (*texts, "median ms", "min ms", "rounds", *ratios, "M inst/s", "extra MB", "of floor", "error"):
        result.add_column(name, justify="left" if name in texts else "right", no_wrap=True)
    for row in rows:
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
    for dtype, rates in probe.rates.items():
        if max(rates) > _UNSTEADY * min(rates):
            notes.append(
                f"the matrix rate of {str(dtype).removeprefix('torch.')} changed {max(rates) / min(rates):.1f}-fold "
                "during this run: trust ratios between contenders, not single times"
            )
    said: dict[str, list[str]] = {}  # what is the same for several rows is said once
    for row in rows:
        told = {f", {row.status}": row.reason, ", no memory": row.memory_note, "": row.gate_note}
        for what, text in told.items():
            if text:
                said.setdefault(f"{row.label}{what}: {text}", []).append(f"{row.dtype} {row.mode}")
    return notes + [f"{text} [{', '.join(where)}]" for text, where in said.items()]


def show(console: Console, result: Result, workload: Workload) -> None:
    for line in _headline(result, workload):
        console.print(line, highlight=False, markup=False)
    console.print()
    console.print(table(result.rows))
    console.print()
    for line in _notes(result.rows, result.probe):
        console.print(line, highlight=False, markup=False)
