"""``python -m tools.diagrams``: the pictures of ``docs/how-it-works.md``, as SVG that takes the colours of its page."""

import sys
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "assets"


def _svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """One line each, without blank ones, which would end a block of HTML in Markdown."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" fill="currentColor" '
        f'font-size="13" font-family="inherit"><title>{title}</title>'
    )
    arrow = '<path d="M0 0L8 4L0 8z" fill="currentColor"/>'
    size = 'markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"'
    marker = f'<defs><marker id="tip" {size}>{arrow}</marker></defs>'
    return "\n".join([head, marker, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "middle", weight: int = 400, faint: bool = False) -> str:
    more = ' opacity="0.75"' if faint else ""
    more += ' font-size="12"' if weight == 400 else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}"{more}>{text}</text>'


def _box(x: float, y: float, width: float, height: float, *lines: str, strong: bool = False) -> str:
    """A rectangle with a line of text in bold, and others below it."""
    colour = 'class="accent" fill="currentColor" fill-opacity="0.18"' if strong else 'fill="none"'
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" {colour} stroke="currentColor"/>'
    top = y + height / 2 + 5 - 9 * (len(lines) - 1)
    texts = [_text(x + width / 2, top + 18 * i, line, weight=600 if i == 0 else 400) for i, line in enumerate(lines)]
    return "".join([shape, *texts])


def _arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    path = "L".join(f"{x:g} {y:g}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="M{path}" fill="none" stroke="currentColor" stroke-width="1.5" marker-end="url(#tip)"{dash}/>'


def forward() -> str:
    """The way of a tile of rows through a forward."""
    parts = [
        _box(10, 60, 130, 70, "x [N, L]", "rows in memory"),
        _box(190, 60, 150, 70, "tile of rows", "stays in the cache", strong=True),
        _box(390, 20, 150, 60, "score program", "products, gate", strong=True),
        _box(590, 20, 150, 60, "online softmax", "maximum and sum", strong=True),
        _box(390, 110, 350, 60, "weighted sum", "of rows so far; scaled when the maximum grows", strong=True),
        _box(190, 220, 150, 60, "embedding", "h = act(W x + b)"),
        _box(390, 220, 160, 60, "partial result", "one a segment"),
        _box(600, 220, 140, 60, "merge", "in a fixed order"),
        _text(750, 322, "bag [B, K, L], lse [B, K], scores [N, K]", anchor="end", weight=600),
        _arrow((140, 95), (188, 95)),
        _arrow((340, 80), (388, 55)),
        _arrow((540, 50), (588, 50)),
        _arrow((665, 80), (665, 108)),
        _arrow((340, 110), (388, 135)),
        _arrow((470, 170), (470, 218)),
        _arrow((550, 250), (598, 250)),
        _arrow((670, 280), (670, 302)),
        _arrow((265, 132), (265, 218), dashed=True),
        _arrow((290, 220), (290, 132), dashed=True),
    ]
    return _svg(760, 330, "Tiles of rows pass through score, softmax and sum, and leave partial results", parts)


def slots() -> str:
    """Bags, chunks, segments and the slots of their partial results."""
    left, unit = 90, 60  # of one chunk: two units
    bags = [(0, 1), (1, 1), (1, 5), (5, 10)]
    cuts = sorted({0.0, *(float(i) for i in range(0, 11, 2)), *(end for _, end in bags)})
    parts = [_text(10, 45, "bags", anchor="start", weight=600), _text(10, 105, "chunks", anchor="start", weight=600)]
    parts += [_text(10, 165, "slots", anchor="start", weight=600)]
    for i, (start, end) in enumerate(bags):
        x, width = left + unit * start, unit * (end - start)
        if width:
            parts.append(_box(x, 25, width, 32, f"bag {i}"))
        else:
            parts.append(_text(x, 18, f"bag {i}, empty", faint=True))
    parts += [_box(left + 2 * unit * i, 85, 2 * unit, 32, f"chunk {i}") for i in range(5)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        chunk = int(start // 2)
        bag = next(i for i, (first, last) in enumerate(bags) if first <= start < last)
        parts.append(
            _box(left + unit * start, 145, unit * (end - start), 32, f"{chunk}+{bag}={chunk + bag}", strong=True)
        )
    parts.append(
        _text(
            left,
            205,
            "A segment is what a chunk and a bag share. Its partial goes to slot chunk + bag.",
            anchor="start",
        )
    )
    return _svg(760, 220, "Chunks of rows cross bags; each shared piece has a slot of its own", parts)


def backward() -> str:
    """What a backward reads again, and what it computes again."""
    parts = [
        _text(10, 24, "forward", anchor="start", weight=600),
        _box(10, 36, 220, 54, "first rows", "hidden units are saved", strong=True),
        _box(230, 36, 510, 54, "all other rows", "nothing is saved but one score for each head"),
        _text(120, 112, "up to saved_bytes, 64 MiB", faint=True),
        _text(10, 160, "backward", anchor="start", weight=600),
        _box(10, 172, 220, 54, "first rows", "hidden units are read", strong=True),
        _box(230, 172, 510, 54, "all other rows", "a tile's hidden units are computed again, then dropped"),
        _arrow((120, 122), (120, 170)),
        _text(10, 258, "Each tile gives its gradient of x, and adds to the sums for V, U and w.", anchor="start"),
    ]
    return _svg(760, 270, "Hidden units of the first rows are saved; those of the others are computed again", parts)


def house() -> str:
    """What a call passes from the public function to a kernel."""
    parts = [
        _box(10, 30, 160, 70, "public function", "checks, types, seed"),
        _box(210, 30, 160, 70, "contract", "shapes, derivative", strong=True),
        _box(430, 10, 310, 44, "native: C++ on the CPU, CUDA C++"),
        _box(430, 66, 310, 44, "triton: kernels for GPUs"),
        _box(430, 122, 310, 44, "reference: plain PyTorch"),
        _arrow((170, 65), (208, 65)),
        _arrow((370, 55), (428, 34)),
        _arrow((370, 66), (428, 86)),
        _arrow((90, 100), (90, 144), (428, 144)),
        _text(250, 136, "no kernel serves the call", faint=True),
        _text(290, 200, "One formula in float64 holds all of them to the same numbers.", weight=600),
    ]
    return _svg(760, 215, "A call goes through checks and one contract to a backend", parts)


PICTURES = {"forward": forward, "slots": slots, "backward": backward, "house": house}


def written() -> dict[Path, str]:
    return {FOLDER / f"{name}.svg": draw() for name, draw in PICTURES.items()}


def main() -> int:
    for path, text in written().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
