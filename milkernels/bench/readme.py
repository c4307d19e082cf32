"""The figures of the README, written from the result files: ``python -m milkernels.bench.readme``.

They stand between two comments, are made of ``benchmarks/results/*.json`` alone, and a test fails when they are not
what this module would write.  A row whose kernel sources have changed since it was measured is marked stale.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from milkernels.bench import report

BEGIN, END = "<!-- figures: python -m milkernels.bench.readme -->", "<!-- end of figures -->"
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


def _what(workload: dict) -> str:
    shape = workload["shape"]
    lengths, dim = shape["lengths"], shape["dim"]
    text = f"{len(lengths)} of {min(lengths)} to {max(lengths)}" if len(lengths) > 1 else "1"
    text += f": {sum(lengths):,} x {dim}"
    if workload["padded"]:
        text += ", padded"
    return text + (f", dropout {workload['dropout']:g}" if workload["dropout"] else "")


def _milliseconds(seconds: float) -> str:
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
            cells = [f"`{workload['op']}`", _what(workload) + stale, dtype, mode, other["label"]]
            if ours is None or ours["status"] != "ok" or other["status"] != "ok":
                lines.append([*cells, "not measured", "", "", "", ""])
                continue
            # On a GPU it is the allocator's peak that counts.
            memory = [r["allocator" if "gpu" in result["machine"] else "resident"] for r in (other, ours)]
            lines.append(
                [
                    *cells,
                    _milliseconds(other["median"]),
                    _milliseconds(ours["median"]),
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


def figures(root: Path = report.ROOT) -> str:
    """The Markdown between the comments: one table for each kind of machine, from its result files."""
    machines: dict[str, list[dict]] = {}
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        for result in _results(path):
            machines.setdefault(_machine(result["machine"]), []).append(result)
    digests, parts = [report.source_digest(root, gpu=gpu) for gpu in (False, True)], []
    for name, results in machines.items():
        results.sort(key=lambda result: result["workload"]["op"])
        ops = {result["workload"]["op"] for result in results}
        body = [line for result in results for line in _rows(result, digests["gpu" in result["machine"]])]
        shown = slice(int(len(ops) == 1), None)  # one op is named above the table
        table = [line[shown] for line in (_HEADER, ["---"] * len(_HEADER), *body)]
        given = dict.fromkeys(result["command"].partition(" --json")[0] for result in results)
        commands = "\n".join(f"    {command}" for command in given)
        lines = "\n".join("| " + " | ".join(line) + " |" for line in table)
        title = f"`{ops.pop()}` on {name}" if len(ops) == 1 else name
        parts.append(f"{title}:\n\n{lines}\n\nThe commands:\n\n{commands}\n")
    return "\n".join([*parts, _unmeasured([results[0]["machine"] for results in machines.values()])])


def rewrite(text: str, block: str) -> str:
    """``text`` with what stands between the comments replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README must hold {BEGIN!r} and then {END!r}")
    return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites README.md; with ``--check`` only says, by the exit code, whether it would change."""
    path = report.ROOT / "README.md"
    old = path.read_text()
    new = rewrite(old, figures())
    if "--check" in (sys.argv[1:] if argv is None else argv):
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
