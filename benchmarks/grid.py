"""``python -m benchmarks.grid``: the CPU grid, an hour and more, into ``results/<device>.json``, its page and pictures.

Stop it when you like: the next run of the same kernels on such a machine goes on.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import cpu_grid, pages, results, runner
from benchmarks.units import Unit
from milkernels.bench import cli, report
from milkernels.bench.workload import fast_dtypes


def measure(path: Path, units: list[Unit], command: str, *, fresh: bool = False, part: bool = False) -> int:
    """Measures what the file lacks; 1 if one of ours failed.  ``part``: the units are not the whole grid."""
    evidence = results.Evidence(path, units, report.machine(), command, part=part)
    if not fresh and (count := evidence.resume([path])):
        runner.say(f"goes on with an earlier run of the same kernels on such a machine: {count} rows")
    worker = runner.Worker()
    try:
        runner.measure_units(evidence, worker.run, float("inf"))
    except KeyboardInterrupt:
        runner.say("stopped; the same command goes on here")
    finally:
        worker.stop()
        evidence.save()
    runner.conclude(evidence)
    return int(bool(evidence.failures()))


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=__doc__.partition("\n")[0])
    what = "of the units' names; the others stay as they are"
    p.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help=what)
    p.add_argument("--list", action="store_true", help="their names")
    p.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR")
    p.add_argument("--fresh", action="store_true", help="measure everything again")
    p.add_argument("--threads", type=cli.positive)
    arguments = p.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    whole = list(cpu_grid.grid(fast_dtypes(), torch.get_num_threads()))
    units = [u for u in whole if arguments.only.search(u.name)]
    if arguments.list:
        print(*(unit.name for unit in units), sep="\n")
        return 0
    if arguments.threads:  # the units are measured in other processes
        units = [replace(unit, threads=unit.threads or arguments.threads) for unit in units]
    words = [Path(word).name for word in (sys.argv[1:] if argv is None else argv)]
    path = arguments.out.resolve() / f"{results.device_slug()}.json"
    command = " ".join(["python -m benchmarks.grid", *words])
    status = measure(path, units, command, fresh=arguments.fresh, part=len(units) < len(whole))
    for made in pages.write(path) if results.read(path)["units"] else ():
        runner.say(str(made))
    return status


if __name__ == "__main__":
    sys.exit(main())
