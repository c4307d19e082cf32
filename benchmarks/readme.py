"""The figures of the README, written from the result files: ``python -m milkernels.bench.readme``.

They stand between two comments, are made of ``benchmarks/results/*.json`` alone, as are the pages and pictures beside
those files, and a test fails when they are not what this module would write.  A row whose kernel sources have changed
since it was measured is marked stale.  Between two other comments, if they are there, stand those of
``benchmarks.upstream``, from ``results/upstream-*.json``.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milkernels.bench import contenders, plots, report, tables
from milkernels.bench.tables import by_mode, machine, markdown, memory_key, milliseconds, ours_of, what_bags

BEGIN, END = "<!-- figures: python -m milkernels.bench.readme -->", "<!-- end of figures -->"
CONTENDERS_BEGIN = "<!-- contenders: python -m milkernels.bench.readme -->"
CONTENDERS_END = "<!-- end of contenders -->"
UPSTREAM_BEGIN = "<!-- upstream: python -m benchmarks.upstream --readme -->"
UPSTREAM_END = "<!-- end of upstream -->"
_UPSTREAM = "upstream-"  # how their result files begin
_HEADER = ("op", "bags", "type", "mode", "milkernels, ms", "eager, ms", "x eager", "fastest other, ms", "x it")
_HEADER += ("extra memory, eager / ours, MB", "of floor")
_EARLIER_HEADER = ("op", "bags", "type", "mode", "against", "theirs, ms", "milkernels, ms", "ratio")
_EARLIER_HEADER += ("extra memory, MB", "of floor")
_UPSTREAM_HEADER = (
    "upstream model",
    "bags",
    "type",
    "mode",
    "before, ms",
    "after, ms",
    "ratio",
    "extra memory, MB",
)


def _files(root: Path, *, grids: bool) -> list[Path]:
    """Those that a grid left, or those of single runs; but upstream's."""
    paths = sorted((root / "benchmarks" / "results").glob("*.json"))
    kept = [path for path in paths if not path.name.startswith(_UPSTREAM)]
    return [path for path in kept if ("units" in json.loads(path.read_text())) == grids]


def _is_stale(result: dict, root: Path) -> bool:
    return result["sources"] != report.source_digest(root, gpu="gpu" in result["machine"])


def figures(root: Path = report.ROOT) -> str:
    """The README's: the headlines of every grid, one table for each machine."""
    parts, machines = [], []
    for path in _files(root, grids=True):
        content = json.loads(path.read_text())
        machines.append(content["machine"])
        lines = [_HEADER, ["---"] * len(_HEADER)]
        for unit in content["units"]:
            if unit["headline"] and unit["kind"] == "bench":
                lines += _headlines(unit, memory_key(content), " (stale)" if _is_stale(content, root) else "")
        page = f"benchmarks/results/{path.stem}.md"
        parts.append(f"{machine(content['machine'])}; all rows, peers and pictures: [{page}]({page}):\n")
        parts.append(f"{markdown(lines)}\n\nThe command:\n\n    {content['command']}\n")
    if _files(root, grids=False):
        page = "benchmarks/results/earlier.md"
        names = dict.fromkeys(machine(json.loads(p.read_text())["machine"]) for p in _files(root, grids=False))
        parts.append(f"Earlier and smaller runs, {'; '.join(names)}: [{page}]({page}).\n")
    return "\n".join([*parts, _unmeasured(machines)])


def _headlines(unit: dict, memory: str, stale: str) -> list[list[str]]:
    """Lines of cells as ``_HEADER`` names them."""
    lines = []
    for mode, rows in by_mode(unit).items():
        timed = [row for row in rows if row["status"] == "ok" and row.get("median")]
        ours = ours_of(rows)
        start = [f"`{unit['workload']['op']}`", what_bags(unit["workload"]) + stale, unit["dtype"], mode]
        if ours is None:
            lines.append([*start, "not measured", *[""] * (len(_HEADER) - 5)])
            continue
        eager = next((row for row in timed if row["contender"] == "eager"), None)
        others = [row for row in timed if not row["ours"] and row is not eager]
        best = min(others, key=lambda row: row["median"], default=None)
        extra = [None if row is None else row.get(memory) for row in (eager, ours)]
        share = ours.get("share_of_floor")
        lines.append(
            [
                *start,
                milliseconds(ours["median"]),
                "not measured" if eager is None else milliseconds(eager["median"]),
                "" if eager is None else f"{eager['median'] / ours['median']:.2f}",
                "" if best is None else f"{best['label']}: {milliseconds(best['median'])}",
                "" if best is None else f"{best['median'] / ours['median']:.2f}",
                "not measured" if None in extra else " / ".join(f"{m / 1e6:,.1f}" for m in extra),
                "" if share is None else f"{100 * share:.0f}%",
            ]
        )
    return lines


def _earlier_rows(result: dict, stale: bool) -> list[list[str]]:
    """Lines of cells as ``_EARLIER_HEADER`` names them, one for each contender but the first of ours."""
    workload, lines = result["workload"], []
    for dtype, mode in dict.fromkeys((row["dtype"], row["mode"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["dtype"], row["mode"]) == (dtype, mode)]
        ours = next((r for r in rows if r["ours"]), None)
        for other in (r for r in rows if r is not ours):
            bags = what_bags(workload) + (" (stale)" if stale else "")
            cells = [f"`{workload['op']}`", bags, dtype, mode, other["label"]]
            if ours is None or ours["status"] != "ok" or other["status"] != "ok":
                lines.append([*cells, "not measured", "", "", "", ""])
                continue
            memory = [r["resident"] for r in (other, ours)]
            lines.append(
                [
                    *cells,
                    milliseconds(other["median"]),
                    milliseconds(ours["median"]),
                    f"{other['median'] / ours['median']:.2f}",
                    "not measured" if None in memory else " / ".join(f"{m / 1e6:,.1f}" for m in memory),
                    f"{100 * ours['share_of_floor']:.0f}%",
                ]
            )
    return lines


def earlier(root: Path = report.ROOT) -> str:
    """The page of single runs, as ``--json`` leaves them."""
    machines: dict[str, list[dict]] = {}
    for path in _files(root, grids=False):
        result = json.loads(path.read_text())
        machines.setdefault(machine(result["machine"]), []).append(result)
    parts = ["# Single runs\n\nOf `python -m milkernels bench --json`, each with the command that made it.\n"]
    for name, results in machines.items():
        results.sort(key=lambda result: result["workload"]["op"])
        body = [line for result in results for line in _earlier_rows(result, _is_stale(result, root))]
        table = markdown([_EARLIER_HEADER, ["---"] * len(_EARLIER_HEADER), *body])
        parts.append(f"## {name}\n\n{table}\n\nThe commands:\n\n{_commands(results)}\n")
    return "\n".join(parts)


def _unmeasured(machines: list[dict]) -> str:
    return "" if any("gpu" in about for about in machines) else "GPUs: not measured.\n"


def _commands(results: list[dict]) -> str:
    given = dict.fromkeys(result["command"].partition(" --json")[0] for result in results)
    return "\n".join(f"    {command}" for command in given)


def contenders_table() -> str:
    """The table of the method page: who can be measured, other ways of our own left out."""
    known = [c for c in contenders.REGISTRY.values() if not c.ours or c.name == (c.title or c.name)]
    lines = [[f"`{c.name}`", c.about] for c in known if not c.name.startswith("workspace")]
    return markdown([["contender", "what it is"], ["---", "---"], *lines]) + "\n"


def integrations_digest(root: Path = report.ROOT) -> str | None:
    """SHA-256 over names and contents of what `accelerate` puts into models."""
    package = root / "milkernels"
    files = [*(package / "integrations").rglob("*.py"), *package.glob("integrations.py")]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest() if files else None


def _upstream_cells(row: dict, stale: str) -> list[str]:
    """As ``_UPSTREAM_HEADER`` names them."""
    start = [f"{row['project']}: {row['model']}", what_bags(row["workload"]) + stale, row["dtype"], row["mode"]]
    if row["status"] != "ok":
        return [*start, row["status"] if row["status"] == "FAIL" else "not measured", "", "", ""]
    sides = (row["before"], row["after"])
    memory = [side["resident"] for side in sides]
    return [
        *start,
        *(milliseconds(side["median"]) for side in sides),
        f"{row['ratio']:.2f}",
        "not measured" if None in memory else " / ".join(f"{m / 1e6:,.1f}" for m in memory),
    ]


def _keep_newest(results: list[dict]) -> None:
    """Drops rows that a later run measured again."""
    seen = set()
    for result in sorted(results, key=lambda result: result["date"], reverse=True):
        keys = [(r["project"], r["model"], json.dumps(r["workload"]), r["dtype"], r["mode"]) for r in result["rows"]]
        result["rows"] = [row for key, row in zip(keys, result["rows"], strict=True) if key not in seen]
        seen.update(keys)


def upstream_figures(root: Path = report.ROOT) -> str:
    """The Markdown of other projects' models before and after `accelerate`: one table for each kind of machine."""
    now = (report.source_digest(root), integrations_digest(root))
    machines: dict[str, list[dict]] = {}
    for path in sorted((root / "benchmarks" / "results").glob(f"{_UPSTREAM}*.json")):
        result = json.loads(path.read_text())
        machines.setdefault(machine(result["machine"]), []).append(result)
    parts = []
    for name, results in machines.items():
        _keep_newest(results)
        lines = [list(_UPSTREAM_HEADER), ["---"] * len(_UPSTREAM_HEADER)]
        for result in results:
            stale = "" if (result["sources"], result["integrations"]) == now else " (stale)"
            lines += [_upstream_cells(row, stale) for row in result["rows"]]
        versions = {row["project"]: row["version"] for result in results for row in result["rows"]}
        of = ", ".join(f"{project} {version[:12]}" for project, version in versions.items())
        parts.append(f"{name}; {of}:\n\n{markdown(lines)}\n\nThe commands:\n\n{_commands(results)}\n")
    return "\n".join(parts) or "Not measured.\n"


def rewrite(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with what stands between the comments replaced."""
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"the README must hold {begin!r} and then {end!r}")
    return f"{before}{begin}\n\n{block}\n{end}{after}"


def _pages(root: Path) -> dict[Path, str]:
    """Every page that is made of result files, as it should be."""
    readme, results = root / "README.md", root / "benchmarks" / "results"
    text = rewrite(readme.read_text(), figures(root))
    if UPSTREAM_BEGIN in text:
        text = rewrite(text, upstream_figures(root), UPSTREAM_BEGIN, UPSTREAM_END)
    pages = {readme: text}
    method = root / "benchmarks" / "README.md"
    if method.exists():
        pages[method] = rewrite(method.read_text(), contenders_table(), CONTENDERS_BEGIN, CONTENDERS_END)
    if _files(root, grids=False):
        pages[results / "earlier.md"] = earlier(root)
    for path in _files(root, grids=True):
        content = json.loads(path.read_text())
        pages[path.with_suffix(".md")] = tables.report(content, _is_stale(content, root), plots.names(content, path))
    return pages


def drift(root: Path = report.ROOT) -> list[str]:
    """The pages and pictures that are not what the result files would make."""
    found = [p.name for p, text in _pages(root).items() if not p.exists() or p.read_text() != text]
    for path in _files(root, grids=True):
        content = json.loads(path.read_text())
        for name in plots.names(content, path):
            picture = path.with_name(name)
            if not picture.exists() or plots.source_of(picture) != plots.digest(content):
                found.append(name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Writes README.md, the pages of ``benchmarks/results`` and their pictures; with ``--check`` only says what would
    change, and by the exit code whether anything would."""
    root = report.ROOT
    if "--check" in (sys.argv[1:] if argv is None else argv):
        for name in (found := drift(root)):
            print(f"{name} is not what the result files say")
        return int(bool(found))
    for path, text in _pages(root).items():
        path.write_text(text)
    for path in _files(root, grids=True):
        plots.of_grid(json.loads(path.read_text()), path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
