"""``python -m benchmarks.picture``: time and memory of a training step by the size of the bag, drawn from
``results/picture.json`` for light and dark pages; ``--measure`` measures that file first, in some minutes.

The step has a gradient of the features, as where a layer in front of the aggregator learns.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import grid, pages, results
from benchmarks.units import FLOAT32, Unit, named, unit
from milkernels.bench import report

OP, MODE, DIM = "gated_attention_pool", "step", 512
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)
LABELS = {"eager": "eager PyTorch", "native": "milkernels"}
FOLDER = Path("docs", "assets")
_PANELS = (("time of a step", "ms"), ("memory beyond the inputs", "MB"))
_WIDTH, _HEIGHT, _LEFT, _TOP, _PANEL, _PLOT = 900, 330, 52, 56, 450, (280, 210)
_THEMES = {
    "light": {"text": "#1f2328", "faint": "#d0d7de", "eager": "#6e7781", "native": "#00796b"},
    "dark": {"text": "#e6edf3", "faint": "#30363d", "eager": "#9198a1", "native": "#4db6ac"},
}


def units() -> list[Unit]:
    def chosen() -> Iterator[Unit]:
        for n in SIZES:
            about = {"dtype": FLOAT32, "device": "cpu", "modes": (MODE,), "part": "picture", "seconds": 300.0}
            yield unit(OP, (n,), DIM, " ".join(LABELS), budget=6.0 if n >= 30_000 else 2.0, **about)

    return named(chosen())


def series(content: dict) -> dict[str, list[tuple[float, float, float]]]:
    """By contender: instances, milliseconds, megabytes."""
    frame = pages.frame_of(content)
    frame = frame[frame["status"].eq("ok") & frame["mode"].eq(MODE) & frame["median"].notna() & frame["extra"].notna()]
    found = {}
    for name in LABELS:
        rows = frame[frame["contender"].eq(name)].sort_values("instances")
        numbers = zip(rows["instances"], 1e3 * rows["median"], rows["extra"].astype(float) / 1e6, strict=True)
        found[name] = [tuple(map(float, line)) for line in numbers]
    return found


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _scale(low: float, high: float, start: float, end: float):
    low, high = math.log10(low), math.log10(high)
    return lambda value: start + (math.log10(value) - low) / (high - low) * (end - start)


def _panel(number: int, lines: dict, theme: dict) -> Iterator[str]:
    """One of the two plots: logarithmic axes, a line for each contender and its name at the end of it."""
    title, unit_name = _PANELS[number]
    points = {name: [(line[0], line[1 + number]) for line in found] for name, found in lines.items() if found}
    values = [y for found in points.values() for _, y in found]
    left, right = _LEFT + number * _PANEL, _LEFT + number * _PANEL + _PLOT[0]
    top, bottom = _TOP, _TOP + _PLOT[1]
    sizes = sorted({x for found in points.values() for x, _ in found})
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))
    x_of, y_of = _scale(sizes[0], sizes[-1], left, right), _scale(low, high, bottom, top)
    yield f'<text x="{left - 40}" y="{top - 20}" font-weight="600">{title}, {unit_name}</text>'
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        y = y_of(10.0**power)
        yield f'<path d="M{left} {y:.1f}H{right}" stroke="{theme["faint"]}"/>'
        yield f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(10.0**power)}</text>'
    for size in sizes:
        yield f'<text x="{x_of(size):.1f}" y="{bottom + 20}" text-anchor="middle">{_short(size)}</text>'
    yield f'<text x="{(left + right) / 2}" y="{bottom + 42}" text-anchor="middle">instances in the bag</text>'
    ends = _apart({name: y_of(found[-1][1]) for name, found in points.items()})
    for name, found in points.items():
        path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in found)
        width = 3 if name == "native" else 2
        yield f'<path d="M{path}" fill="none" stroke="{theme[name]}" stroke-width="{width}"/>'
        dots = (f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5" fill="{theme[name]}"/>' for x, y in found)
        yield "".join(dots)
        yield f'<text x="{right + 10}" y="{ends[name] + 4:.1f}" fill="{theme[name]}">{LABELS[name]}</text>'


def _apart(heights: dict[str, float], least: float = 17.0) -> dict[str, float]:
    """Heights of labels, from the top, moved so that none covers another."""
    placed, last = {}, -math.inf
    for name, y in sorted(heights.items(), key=lambda pair: pair[1]):
        last = placed[name] = max(y, last + least)
    return placed


def draw(content: dict, scheme: str) -> str:
    theme, lines = _THEMES[scheme], series(content)
    body = "\n".join(part for number in range(len(_PANELS)) for part in _panel(number, lines, theme))
    name = f"Gated attention, one bag of {DIM} numbers each, {FLOAT32}: {_PANELS[0][0]} and {_PANELS[1][0]}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="13" '
        f'font-family="system-ui, sans-serif" fill="{theme["text"]}">\n<title>{name}</title>\n{body}\n</svg>\n'
    )


def written(root: Path = report.ROOT) -> dict[Path, str]:
    """The pictures as they should be; none where nothing was measured."""
    content = results.read(root / "benchmarks" / "results" / results.PICTURE.name)
    if not content:
        return {}
    return {root / FOLDER / f"scaling-{scheme}.svg": draw(content, scheme) for scheme in _THEMES}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__.partition("\n")[0])
    p.add_argument("--measure", action="store_true", help="measure first; an interrupted run goes on")
    arguments = p.parse_args(argv)
    status = 0
    if arguments.measure:
        status = grid.measure(results.PICTURE, units(), "python -m benchmarks.picture --measure")
    for path, text in written().items():
        path.write_text(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
