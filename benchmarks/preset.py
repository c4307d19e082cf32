"""``python -m milkernels bench --preset``: a grid of units, resumable, and the report that is made of it."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from milkernels.bench import cpu_grid, report, runner, tables, worker
from milkernels.bench.evidence import Evidence

RESULTS = report.ROOT / "benchmarks" / "results"


def fast_dtypes() -> list[str]:
    """Without the instructions for it one bfloat16 step of eager takes half a minute: not by default."""
    mkldnn = torch.ops.mkldnn
    fast = torch.backends.mkldnn.is_available() and mkldnn._is_mkldnn_bf16_supported()
    return ["float32", "bfloat16"] if fast else ["float32"]


def run(preset: str, out: Path | None, fresh: bool, threads: int | None) -> int:
    """Measures what is not measured yet and writes ``<device>.json``, tables and pictures; 1 if one of ours failed."""
    if threads:
        torch.set_num_threads(threads)
    folder = (out or (RESULTS if preset == "full" and RESULTS.is_dir() else Path.cwd())).resolve()
    name = report.device_slug() + ("-quick" if preset == "quick" else "")
    units = cpu_grid.grid(preset, fast_dtypes(), torch.get_num_threads())
    if threads:  # the units are measured in other processes
        units = [replace(unit, threads=unit.threads or threads) for unit in units]
    command = f"python -m milkernels bench --preset {preset}" + (f" --threads {threads}" if threads else "")
    evidence = Evidence(folder / f"{name}.json", units, report.machine(), command)
    count = 0 if fresh else evidence.resume([evidence.path])
    if count:
        runner.say(f"goes on with an earlier run of the same kernels on such a machine: {count} rows")
    process = worker.Worker()
    try:
        runner.measure_units(evidence, process.run, float("inf"))
    except KeyboardInterrupt:
        runner.say("stopped; the same command goes on here")
    finally:
        process.stop()
        evidence.save()
    runner.conclude(evidence)
    for path in write_page(evidence.path):
        runner.say(str(path))
    return int(bool(evidence.failures()))


def write_page(path: Path) -> list[Path]:
    """Writes the page and the pictures of the file at ``path`` beside it; returns where they are."""
    from milkernels.bench import plots  # matplotlib takes a second to import

    content = json.loads(path.read_text())
    pictures = plots.of_grid(content, path)
    page = path.with_suffix(".md")
    page.write_text(tables.report(content, False, [picture.name for picture in pictures]))
    return [page, *pictures]
