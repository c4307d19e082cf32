"""The tables of a grid's file, in Markdown, and what they say where milkernels is not the fastest."""

from collections.abc import Callable, Iterable, Sequence

_TITLES = {
    "attention": "Attention, one bag",
    "ops": "Other ops, one bag",
    "ragged": "Ragged batches",
    "sizes": "Widths, hidden units, heads",
    "bags": "The same instances in more bags",
    "threads": "Threads",
    "scaling": "From small bags to large ones",
    "largest": "The largest bag that can be trained",
    "disk": "Epochs that begin at files",
    "calls": "What a call costs",
}
_NOTES = {
    "attention": "Contenders take turns within each mode.",
    "ragged": "Eager and compile loop over the bags; padded and torchmil pad them to the longest.",
    "scaling": "Each contender in a process of its own: nanoseconds per instance, bytes of peak extra memory per "
    "instance (outputs and gradients included). A star: one run.",
    "largest": "Instances of the largest bag, its features included, before an allocation fails.",
    "disk": "One frozen training step for each file, its loading included; files were dropped from the page cache "
    "before each epoch.",
}
_HEADER = ("op and bags", "type", "mode", "contender", "ms", "spread", "M inst/s", "bags/s", "extra MB", "of floor")
_HEADER += ("error / eager's", "time / ours")
_NO_ERROR = 1e-3  # of the bound: sums that cancel, and luck


def markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def what_bags(workload: dict) -> str:
    shape = workload["shape"]
    lengths, dim = shape["lengths"], shape["dim"]
    text = f"{len(lengths)} of {min(lengths):,} to {max(lengths):,}" if len(lengths) > 1 else "1"
    text += f": {sum(lengths):,} x {dim}"
    if workload["padded"]:
        text += ", padded"
    return text + (f", dropout {workload['dropout']:g}" if workload["dropout"] else "")


def _about(unit: dict) -> str:
    """The op and its shape, and what sets the unit apart."""
    workload, shape = unit["workload"], unit["workload"]["shape"]
    text = f"`{workload['op']}` {what_bags(workload)}"
    if " D" in unit["name"]:
        text += f", D {shape['hidden']}"
    if shape["heads"] > 1:
        text += f", K {shape['heads']}"
    _, colon, suffix = unit["name"].partition(": ")
    return text + (f" ({suffix})" if colon and unit["kind"] == "bench" else "")


def machine(about: dict) -> str:
    if "gpu" in about:
        return f"{about['gpu']['name']}, CUDA {about['gpu']['cuda']}, PyTorch {about['torch']}"
    return f"{about['cpu']}, {about['threads']} threads, {about['instruction_set']}, PyTorch {about['torch']}"


def memory_key(content: dict) -> str:
    """The peak that counts: of the process, or of PyTorch's allocator on a GPU."""
    return "allocator" if "gpu" in content["machine"] else "resident"


def by_mode(unit: dict) -> dict[str, list[dict]]:
    modes: dict[str, list[dict]] = {}
    for row in unit["rows"]:
        modes.setdefault(row["mode"], []).append(row)
    return modes


def ours_of(rows: list[dict]) -> dict | None:
    """The first of our backends that was timed."""
    return next((r for r in rows if r.get("ours") and r["status"] == "ok" and r.get("median")), None)


def worst_ratio(errors: Iterable[dict]) -> float | None:
    """The largest of our error over eager's; where eager happens to have none to speak of it says nothing."""
    told = [e["ratio"] for e in errors if e["ratio"] is not None and (e["eager"] or 0) > _NO_ERROR * e["bound"]]
    return max(told, default=None)


def _refusal(row: dict) -> str:
    reason = row.get("reason", "").replace("|", "/").replace("\n", " ")
    kind = {"unavailable": "not run", "error": "broke", "differs": "another function", "FAIL": "WRONG"}[row["status"]]
    return f"{kind}: {reason[:160]}"


def _cells(unit: dict, row: dict, ours: dict | None, memory: str) -> list[str]:
    start = [_about(unit), unit["dtype"], row["mode"], row.get("label") or row["contender"]]
    if row["status"] != "ok" or not row.get("median"):
        return [*start, _refusal(row) if row["status"] != "ok" else "", *[""] * (len(_HEADER) - 5)]
    share, extra, worst = row.get("share_of_floor"), row.get(memory), worst_ratio(row.get("errors", ()))
    return [
        *start,
        milliseconds(row["median"]) + ("*" if row.get("once") else ""),
        f"{100 * row['spread']:.0f}%" if row["rounds"] > 2 else "",
        number(row["instances_per_second"] / 1e6),
        number(row["bags_per_second"]) if row.get("bags", 1) > 1 else "",
        "" if extra is None else number(extra / 1e6),
        "" if share is None else f"{100 * share:.0f}%",
        "" if worst is None else f"{worst:.2g}",
        "" if ours is None else f"{row['median'] / ours['median']:.2f}",
    ]


def _rows(units: list[dict], memory: str) -> str:
    lines = [_HEADER, ["---"] * len(_HEADER)]
    for unit in units:
        for rows in by_mode(unit).values():
            ours = ours_of(rows)
            lines += [_cells(unit, row, ours, memory) for row in rows]
    return markdown(lines)


def _scaling(units: list[dict], memory: str) -> str:
    contenders = list(dict.fromkeys(row["contender"] for unit in units for row in unit["rows"]))
    lines = [["type", "mode", "instances", *contenders], ["---"] * (3 + len(contenders))]
    groups = {(unit["dtype"], mode): None for unit in units for mode in by_mode(unit)}
    for dtype, mode in groups:
        for unit in sorted(units, key=lambda u: sum(u["workload"]["shape"]["lengths"])):
            found = {row["contender"]: row for row in unit["rows"] if row["mode"] == mode}
            if unit["dtype"] == dtype and found:
                n = sum(unit["workload"]["shape"]["lengths"])
                cells = [_per_instance(found.get(name), n, memory) for name in contenders]
                lines.append([dtype, mode, f"{n:,}", *cells])
    return markdown(lines)


def _per_instance(row: dict | None, n: int, memory: str) -> str:
    if row is None:
        return "not measured"
    if row["status"] != "ok":
        return _refusal(row)
    extra = "" if row.get(memory) is None else f", {row[memory] / n:,.0f} B"
    return f"{number(1e9 * row['median'] / n)} ns{'*' if row.get('once') else ''}{extra}"


def _largest(units: list[dict], memory: str) -> str:
    lines = [["op", "type", "mode", "memory", "contender", "instances", "ours / theirs"], ["---"] * 7]
    for unit in units:
        for rows in by_mode(unit).values():
            ours = next((r["instances"] for r in rows if r.get("ours") and r["status"] == "ok"), None)
            for row in rows:
                start = [f"`{unit['workload']['op']}` x {unit['workload']['shape']['dim']}", unit["dtype"], row["mode"]]
                if row["status"] != "ok":
                    lines.append([*start, "", row["contender"], _refusal(row), ""])
                    continue
                times = f"{ours / row['instances']:.2f}" if ours and row["instances"] else ""
                size = f"{row['memory'] / (1 << 30):g} GiB"
                lines.append([*start, size, row["contender"], f"{row['instances']:,}", times])
    return markdown(lines)


def _disk(units: list[dict], memory: str) -> str:
    lines = [["files", "type", "format", "contender", "epoch, ms", "loading alone, ms", "MB/s of it", "time / ours"]]
    lines.append(["---"] * len(lines[0]))
    for unit in units:
        for mode, rows in by_mode(unit).items():
            ours = ours_of(rows)
            for row in rows:
                start = [what_bags(unit["workload"]), unit["dtype"], mode, row["contender"]]
                if row["status"] != "ok":
                    lines.append([*start, _refusal(row), "", "", ""])
                    continue
                speed = number(row["file_bytes"] / row["load"] / 1e6)
                against = "" if ours is None else f"{row['median'] / ours['median']:.2f}"
                lines.append([*start, milliseconds(row["median"]), milliseconds(row["load"]), speed, against])
    return markdown(lines)


_KINDS: dict[str, Callable[[list[dict], str], str]] = {"alone": _scaling, "largest": _largest, "disk": _disk}


def losses(content: dict) -> list[list[str]]:
    """Every timed row in which somebody else was faster than the best of ours, the worst first."""
    found = []
    for unit in content["units"]:
        for rows in by_mode(unit).values():
            timed = [row for row in rows if row["status"] == "ok" and row.get("median")]
            ours = min((row["median"] for row in timed if row["ours"]), default=0.0)
            for row in timed:
                if not row["ours"] and row["median"] < ours:
                    start = [_about(unit), unit["dtype"], row["mode"], row.get("label") or row["contender"]]
                    found.append((row["median"] / ours, start))
    return [[*cells, f"{ratio:.2f}"] for ratio, cells in sorted(found, key=lambda pair: pair[0])]


def report(content: dict, stale: bool, pictures: Sequence[str] = ()) -> str:
    """The whole page."""
    parts: dict[str, list[dict]] = {}
    for unit in content["units"]:
        if unit["kind"] != "limits":
            parts.setdefault(unit.get("part") or unit["kind"], []).append(unit)
    memory = memory_key(content)
    text = [f"# {machine(content['machine'])}\n", _head(content, stale)]
    text += [f"![{name}]({name})\n" for name in pictures]
    lost = losses(content)
    text.append("## Where milkernels is not the fastest\n")
    header = ["op and bags", "type", "mode", "contender", "time / ours"]
    text.append((markdown([header, ["---"] * 5, *lost]) if lost else "Nowhere among these rows.") + "\n")
    for part, units in parts.items():
        text.append(f"## {_TITLES.get(part, part)}\n")
        text += [_NOTES[part] + "\n"] if part in _NOTES else []
        text.append(_KINDS.get(units[0]["kind"], _rows)(units, memory) + "\n")
    if content["not_measured"]:
        text.append("## Not measured\n")
        text += [f"- {name}: {', '.join(modes)}" for name, modes in content["not_measured"].items()] + [""]
    return "\n".join(text)


def _head(content: dict, stale: bool) -> str:
    about = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [
        f"Measured {content['date'][:10]} by `{content['command']}`, Python {about['python']}, {versions}.",
        "How each number is made, and what it does not say: [benchmarks/README.md](../README.md). All of this page is",
        "made from the JSON file of the same name.",
    ]
    if stale:
        lines.append("\n**Stale:** the kernels have changed since.")
    return "\n".join(lines) + "\n"
