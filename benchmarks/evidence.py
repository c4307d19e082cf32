"""The file that a grid leaves, ``benchmarks/results/<device>.json``: written anew after every row that is measured, so
that a run that was cut short loses nothing and the next one goes on with it.

Schema 3 is one object: ``schema``, ``command``, ``date``, ``machine`` (as in ``report``; on a GPU also ``gpu``),
``commit``, ``sources``; ``stages``: name -> status, seconds and what it said; ``units``: each with name, kind, part
(of the report), headline, workload, dtype, threads (0: those of ``machine``), commit (at which it was measured) and
``rows`` as ``report`` describes them, and in each row

``allocator``   peak bytes of PyTorch's allocator beyond those before the call: outputs and gradients, no inputs
``limits``      read_bandwidth (bytes/s) and matrix_rate (FLOP/s, median of the probes) in the same process
``errors``      of ours, the one nearest to its bound, and all beyond it

and, by the kind of the unit (``units.Unit``), ``host`` and ``median`` seconds per call, ``launches``,
``triton_kernels`` ("calls"), ``instances`` and ``memory`` ("largest"), ``load`` seconds and ``file_bytes`` ("disk");
``targets``: as ``targets.of`` says; ``not_measured``: unit -> modes for which there was no time.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from milkernels.bench import report, targets
from milkernels.bench.units import Unit

SCHEMA = 3
FAILED = ("error", report.run.FAIL)
_DIGITS = 5  # more are noise
Key = tuple[str, str]  # mode, contender


class Evidence:
    """What has been measured on this device, of this code."""

    def __init__(self, path: Path, units: list[Unit], machine: dict, command: str, commit: str | None = None):
        self.path, self.units, self.command = path, units, command
        sources = report.source_digest(gpu="gpu" in machine)
        self.head = {"machine": machine, "commit": commit or report.commit(), "sources": sources}
        self.commits: dict[str, str | None] = {}  # of units
        self.rows: dict[str, dict[Key, dict]] = {unit.name: {} for unit in units}
        self.stages: dict[str, dict] = {}
        self.retried: set[str] = set()  # units of which something failed in an earlier run

    def resume(self, paths: Iterable[Path]) -> int:
        """Takes over what the first of these files of the same kernels and device holds; returns how many rows.

        A unit that is not the same any more is measured anew, and so is a mode of which a contender failed or is not
        there: all of them, for they are compared within one run.
        """
        for path in paths:
            before = self._same(path)
            if before is None:
                continue
            self.stages = {n: s for n, s in before["stages"].items() if s["status"] == "ok"}
            found = {_identity(unit): unit for unit in before["units"]}
            for unit in self.units:
                old = found.get(_identity(json.loads(json.dumps(self._unit(unit)))))
                if old is not None:
                    self._keep(unit, old)
            return sum(map(len, self.rows.values()))
        return 0

    def _keep(self, unit: Unit, old: dict) -> None:
        measured = {(row["mode"], row["contender"]) for row in old["rows"]}
        failed = {row["mode"] for row in old["rows"] if row["status"] in FAILED}
        partial = {mode for mode, contender in unit.pairs() if (mode, contender) not in measured}
        wanted = [row for row in old["rows"] if row["mode"] not in failed | partial]
        self.rows[unit.name] = {(row["mode"], row["contender"]): row for row in wanted}
        self.commits[unit.name] = old["commit"]
        self.retried |= {unit.name} if failed else set()

    def _same(self, path: Path) -> dict | None:
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        ours = self.head["machine"]
        theirs = before.get("machine", {})
        same = before.get("schema") == SCHEMA and before["sources"] == self.head["sources"]
        same = same and theirs.get("torch") == ours.get("torch")
        return before if same and _of_kind(theirs) == _of_kind(ours) else None

    def add(self, unit: Unit, rows: list[dict]) -> None:
        self.commits[unit.name] = self.head["commit"]
        for row in rows:
            self.rows[unit.name][row["mode"], row["contender"]] = _compact(row)
        self.save()

    def measured(self, unit: Unit) -> set[Key]:
        return set(self.rows[unit.name])

    def not_measured(self) -> dict[str, list[str]]:
        left = {}
        for unit in self.units:
            missing = [key for key in unit.pairs() if key not in self.rows[unit.name]]
            if missing:
                left[unit.name] = list(dict.fromkeys(mode for mode, _ in missing))
        return left

    def failures(self) -> list[str]:
        """Our own rows that are wrong or broken, and stages that failed."""
        found = [f"{name}: {stage['status']}" for name, stage in self.stages.items() if stage["status"] != "ok"]
        for name, rows in self.rows.items():
            for (mode, contender), row in rows.items():
                if row["status"] in FAILED and row.get("ours", contender != "eager"):
                    found.append(f"{name}, {mode}, {contender}: {row['status']}: {row.get('reason', '')}")
        return found

    def targets(self) -> list[dict]:
        if "gpu" not in self.head["machine"]:
            return []
        return [target for unit in self.units for target in targets.of(unit, self.rows[unit.name])]

    def save(self) -> None:
        """A reader finds the old file or the new one, never a part of it."""
        content = {
            "schema": SCHEMA,
            "command": self.command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self.head,
            "stages": self.stages,
            "targets": self.targets(),
            "not_measured": self.not_measured(),
            "units": [self._unit(unit) for unit in self.units if self.rows[unit.name]],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(_text(report.plain(content)))
        os.replace(part, self.path)

    def _unit(self, unit: Unit) -> dict:
        about = {name: getattr(unit, name) for name in ("name", "kind", "part", "headline", "dtype", "threads")}
        about["commit"] = self.commits.get(unit.name)
        in_order = [self.rows[unit.name][key] for key in unit.pairs() if key in self.rows[unit.name]]
        return about | {"workload": asdict(unit.workload), "rows": in_order}


def _identity(unit: dict) -> tuple:
    return unit["name"], unit["threads"], json.dumps(unit["workload"])


def _of_kind(machine: dict) -> tuple:
    if "gpu" in machine:
        return tuple(machine["gpu"].get(name) for name in ("name", "cuda", "triton"))
    return tuple(machine.get(name) for name in ("cpu", "instruction_set", "threads"))


def _compact(row: dict) -> dict:
    """Few digits, and of the errors those that say something."""
    errors = row.get("errors")
    if errors:
        worst = max(errors, key=lambda e: (e["ours"] or 0) / e["bound"] if e["bound"] else 0)
        row = row | {"errors": [e for e in errors if e is worst or not e["ok"]]}
    return _rounded(row)


def _rounded(value):
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{_DIGITS}g}")
    return value


def _text(content: dict) -> str:
    """JSON with one line for each row and target: a few hundred that a person can still search."""
    units = content.pop("units")
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items() if name != "targets"]
    targets_ = ",\n".join(f"  {json.dumps(target)}" for target in content["targets"])
    lines.append(f' "targets": [\n{targets_}\n ]')
    shown = []
    for unit in units:
        rows = ",\n".join(f"   {json.dumps(row)}" for row in unit.pop("rows"))
        shown.append(f'  {json.dumps(unit)[:-1]}, "rows": [\n{rows}\n  ]}}')
    lines.append(' "units": [\n' + ",\n".join(shown) + "\n ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"
