"""The figures of the README, written from the result files: ``python -m milkernels.bench.readme``.

They stand between two comments, are made of ``benchmarks/results/*.json`` alone, and a test fails when they are not
what this module would write.  A row whose kernel sources have changed since it was measured is marked stale.  Between
two other comments, if they are there, stand those of ``benchmarks.upstream``, from ``results/upstream-*.json``.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milkernels.bench import report

BEGIN, END = "<!-- figures: python -m milkernels.bench.readme -->", "<!-- end of figures -->"
UPSTREAM_BEGIN = "<!-- upstream: python -m benchmarks.upstream --readme -->"
UPSTREAM_END = "<!-- end of upstream -->"
_UPSTREAM = "upstream-"  # how their result files begin
_HEADER = (
    "op",
    "bags",
    "type",
    "mode",
    "against",
    "theirs, ms",
    "milkernels, ms",
    "ratio",
    "extra memory, MB",
    "of floor",
)
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


def what_bags(workload: dict) -> str:
    shape = workload["shape"]
    lengths, dim = shape["lengths"], shape["dim"]
    text = f"{len(lengths)} of {min(lengths)} to {max(lengths)}" if len(lengths) > 1 else "1"
    text += f": {sum(lengths):,} x {dim}"
    if workload["padded"]:
        text += ", padded"
    return text + (f", dropout {workload['dropout']:g}" if workload["dropout"] else "")


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _rows(result: dict, digest: str | None) -> list[list[str]]:
    """Lines of cells as ``_HEADER`` names them."""
    workload = result["workload"]
    stale = " (stale)" if digest != result["sources"] else ""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault((row["dtype"], row["mode"]), []).append(row)
    lines = []
    for (dtype, mode), rows in groups.items():
        ours = next((r for r in rows if r["ours"]), None)
        for other in (r for r in rows if r is not ours):
            cells = [f"`{workload['op']}`", what_bags(workload) + stale, dtype, mode, other["label"]]
            if ours is None or ours["status"] != "ok" or other["status"] != "ok":
                lines.append([*cells, "not measured", "", "", "", ""])
                continue
            # On a GPU it is the allocator's peak that counts.
            memory = [r["allocator" if "gpu" in result["machine"] else "resident"] for r in (other, ours)]
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


def _results(path: Path) -> list[dict]:
    """One for each workload of the file; of a run on a GPU those that were called its headlines."""
    result = json.loads(path.read_text())
    if "units" not in result:
        return [result]
    chosen = [unit for unit in result["units"] if unit["headline"] and unit["kind"] == "bench"]
    return [result | {"workload": unit["workload"], "rows": unit["rows"]} for unit in chosen]


def _machine(about: dict) -> str:
    if "gpu" in about:
        return f"{about['gpu']['name']}, CUDA {about['gpu']['cuda']}, PyTorch {about['torch']}"
    return f"{about['cpu']}, {about['threads']} threads, {about['instruction_set']}, PyTorch {about['torch']}"


def _unmeasured(machines: list[dict]) -> str:
    seen = {about["instruction_set"] for about in machines if "gpu" not in about}
    wider = [name for kind, name in (("AVX512", "AVX-512"), ("AVX512+AMX", "AMX")) if kind not in seen]
    kinds = [] if any("gpu" in about for about in machines) else ["GPUs"]
    kinds += [f"CPUs with {' or '.join(wider)}"] if wider else []
    return ", and ".join(kinds) + ": not measured.\n" if kinds else ""


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _commands(results: list[dict]) -> str:
    given = dict.fromkeys(result["command"].partition(" --json")[0] for result in results)
    return "\n".join(f"    {command}" for command in given)


def figures(root: Path = report.ROOT) -> str:
    """The Markdown between the comments: one table for each kind of machine, from its result files."""
    machines: dict[str, list[dict]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        if path.name.startswith(_UPSTREAM):
            continue
        for result in _results(path):
            machines.setdefault(_machine(result["machine"]), []).append(result)
    digests, parts = [report.source_digest(root, gpu=gpu) for gpu in (False, True)], []
    for name, results in machines.items():
        results.sort(key=lambda result: result["workload"]["op"])
        ops = {result["workload"]["op"] for result in results}
        body = [line for result in results for line in _rows(result, digests["gpu" in result["machine"]])]
        shown = slice(int(len(ops) == 1), None)  # one op is named above the table
        table = [line[shown] for line in (_HEADER, ["---"] * len(_HEADER), *body)]
        title = f"`{ops.pop()}` on {name}" if len(ops) == 1 else name
        parts.append(f"{title}:\n\n{_markdown(table)}\n\nThe commands:\n\n{_commands(results)}\n")
    return "\n".join([*parts, _unmeasured([results[0]["machine"] for results in machines.values()])])


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
        machines.setdefault(_machine(result["machine"]), []).append(result)
    parts = []
    for name, results in machines.items():
        _keep_newest(results)
        lines = [list(_UPSTREAM_HEADER), ["---"] * len(_UPSTREAM_HEADER)]
        for result in results:
            stale = "" if (result["sources"], result["integrations"]) == now else " (stale)"
            lines += [_upstream_cells(row, stale) for row in result["rows"]]
        versions = {row["project"]: row["version"] for result in results for row in result["rows"]}
        of = ", ".join(f"{project} {version[:12]}" for project, version in versions.items())
        parts.append(f"{name}; {of}:\n\n{_markdown(lines)}\n\nThe commands:\n\n{_commands(results)}\n")
    return "\n".join(parts) or "Not measured.\n"


def rewrite(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with what stands between the comments replaced."""
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"the README must hold {begin!r} and then {end!r}")
    return f"{before}{begin}\n\n{block}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites README.md; with ``--check`` only says, by the exit code, whether it would change."""
    path = report.ROOT / "README.md"
    old = path.read_text()
    new = rewrite(old, figures())
    if UPSTREAM_BEGIN in new:
        new = rewrite(new, upstream_figures(), UPSTREAM_BEGIN, UPSTREAM_END)
    if "--check" in (sys.argv[1:] if argv is None else argv):
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
