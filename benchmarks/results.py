"""The files in ``results/``, one for each kind of machine; README.md describes the schema.

A grid's file is written anew after every row that is measured, so that a run that was cut short loses nothing and the
next one goes on with it, if the kernels are the same; that is all that the digest of their sources is for.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks import targets
from benchmarks.units import Unit
from milkernels.bench import report

FOLDER = report.ROOT / "benchmarks" / "results"
HEADLINE = FOLDER / "headline.json"  # whose rows are on the README
PICTURE = FOLDER / "picture.json"  # which the README's picture shows
FAILED = ("error", report.run.FAIL)
SKIPPED = "skipped: no time for it, or nothing to do it with"  # a stage
FOREIGN = ("upstream",)  # kinds of units that a grid leaves as they are
Key = tuple[str, str]  # mode, contender


def device_slug(name: str | None = None) -> str:
    """A file name for this kind of device; without a name of one, for the CPU."""
    name = name or f"{report.cpu_model()} {report.instruction_set()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def grids(folder: Path = FOLDER) -> list[Path]:
    """The files that have a page of their own."""
    return [path for path in sorted(folder.glob("*.json")) if path.name not in (HEADLINE.name, PICTURE.name)]


def source_digest(root: Path = report.ROOT, *, gpu: bool = False) -> str | None:
    """SHA-256 over names and contents of what decides the speed: ``csrc`` and the ops; on a GPU the Triton kernels too,
    and only there ``csrc/cuda``."""
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


def read(path: Path) -> dict | None:
    """The content of a file of this schema, if it is one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if content.get("schema") == report.SCHEMA else None


def merge(path: Path, machine: dict, units: Iterable[dict]) -> None:
    """Puts units into a file, in the place of those of the same name."""
    old = read(path) or {"schema": report.SCHEMA, "machine": machine, "units": []}
    found = {unit["name"]: unit for unit in old["units"]} | {unit["name"]: unit for unit in units}
    report.write(old | {"units": list(found.values())}, path)


class Evidence:
    """What a grid has measured on this device, of this code."""

    def __init__(
        self,
        path: Path,
        units: list[Unit],
        machine: dict,
        command: str,
        commit: str | None = None,
        *,
        part: bool = False,
    ):
        """``part``: the units are some of the grid's, and what the file has of the others stays."""
        self.path, self.units, self.machine = path, units, machine
        self.about = report.provenance(command) | {"sources": source_digest(gpu="gpu" in machine)}
        if commit:  # of this tree, where git cannot tell
            self.about["commit"] = commit
        self.provenance: dict[str, dict] = {}  # of units
        self.rows: dict[str, dict[Key, dict]] = {unit.name: {} for unit in units}
        self.stages: dict[str, dict] = {}
        self.retried: set[str] = set()  # units of which something failed in an earlier run
        before = read(path) or {"units": []}
        self.part = part
        self.before = [unit for unit in before["units"] if part or unit["kind"] in FOREIGN]
        left = before.get("not_measured", {}).items() if part else ()
        self.left = {name: modes for name, modes in left if name not in self.rows}

    def resume(self, paths: Iterable[Path]) -> int:
        """Takes over what the first of these files of the same kernels and device holds; returns how many rows.

        A unit that is not the same any more is measured anew, and so is a mode of which a contender failed or is not
        there: all of them, for they are compared within one run.
        """
        for path in paths:
            before = read(path)
            if before is None or not _same(before["machine"], self.machine):
                continue
            same = [unit for unit in before["units"] if unit.get("sources") == self.about["sources"]]
            if not same:
                continue
            self.stages = {n: s for n, s in before.get("stages", {}).items() if s["status"] == "ok"}
            found = {_identity(unit): unit for unit in same}
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
        self.provenance[unit.name] = {name: old[name] for name in self.about}
        self.retried |= {unit.name} if failed else set()

    def add(self, unit: Unit, rows: list[dict]) -> None:
        self.provenance[unit.name] = self.about
        for row in rows:
            self.rows[unit.name][row["mode"], row["contender"]] = report.compact(row)
        self.save()

    def measured(self, unit: Unit) -> set[Key]:
        return set(self.rows[unit.name])

    def not_measured(self) -> dict[str, list[str]]:
        left = dict(self.left)
        for unit in self.units:
            missing = [key for key in unit.pairs() if key not in self.rows[unit.name]]
            if missing:
                left[unit.name] = list(dict.fromkeys(mode for mode, _ in missing))
        return left

    def failures(self) -> list[str]:
        """Our own rows that are wrong or broken, and stages that failed."""
        said = {name: stage["status"] for name, stage in self.stages.items()}
        found = [f"{name}: {status}" for name, status in said.items() if status not in ("ok", SKIPPED)]
        for name, rows in self.rows.items():
            for (mode, contender), row in rows.items():
                if row["status"] in FAILED and row.get("ours", contender != "eager"):
                    found.append(f"{name}, {mode}, {contender}: {row['status']}: {row.get('reason', '')}")
        return found

    def targets(self) -> list[dict]:
        if "gpu" not in self.machine:
            return []
        return [target for unit in self.units for target in targets.of(unit, self.rows[unit.name])]

    def save(self) -> None:
        own = {unit.name: self._unit(unit) for unit in self.units if self.rows[unit.name]}
        before = {unit["name"]: unit for unit in self.before}
        units = list((before | own if self.part else own | before).values())  # each where it stood
        content = {"schema": report.SCHEMA, "machine": self.machine, "not_measured": self.not_measured()}
        if "gpu" in self.machine:
            content |= {"stages": self.stages, "targets": self.targets()}
        report.write(report.plain(content | {"units": units}), self.path)

    def _unit(self, unit: Unit) -> dict:
        about = {name: getattr(unit, name) for name in ("name", "kind", "part", "dtype", "threads")}
        in_order = [self.rows[unit.name][key] for key in unit.pairs() if key in self.rows[unit.name]]
        come_from = self.provenance.get(unit.name, self.about)
        return about | come_from | {"workload": asdict(unit.workload), "rows": in_order}


def _identity(unit: dict) -> tuple:
    # A property that files from before it do not have is one that is not set.
    return unit["name"], unit["threads"], json.dumps({k: v for k, v in unit["workload"].items() if v}, sort_keys=True)


def _same(one: dict, other: dict) -> bool:
    def kind(machine: dict) -> tuple:
        if "gpu" in machine:
            return machine["torch"], *(machine["gpu"].get(name) for name in ("name", "cuda", "triton"))
        return tuple(machine.get(name) for name in ("torch", "cpu", "instruction_set", "threads"))

    return kind(one) == kind(other)
