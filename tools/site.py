"""What ``make docs`` adds to MkDocs: pages that live elsewhere in the project, and examples in docstrings.

MkDocs loads this file as a hook, and mkdocstrings as an extension of its reader; neither imports milkernels or PyTorch,
so the site is built on any machine.  A page that a developer reads beside the code (`CONTRIBUTING.md`, the tables of
`benchmarks/results/`) is shown on the site as it is, and its links are turned to where they lead there.
"""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
BORROWED = {
    "CONTRIBUTING.md": "contributing/index.md",
    "CHANGELOG.md": "contributing/changelog.md",
    "SECURITY.md": "contributing/security.md",
    "benchmarks/README.md": "performance/method.md",
    "examples/README.md": "examples/index.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def borrowed() -> dict[str, str]:
    """Where each file of the project stands on the site."""
    pages = dict(BORROWED)
    for folder, target in (("benchmarks/results", "performance"), ("examples/results", "examples")):
        found = [p for p in sorted((ROOT / folder).glob("*")) if p.suffix in (".md", ".png", ".svg")]
        pages |= {f"{folder}/{p.name}": f"{target}/{p.name}" for p in found}
    return pages


def on_files(files: Files, config) -> Files:
    pages = borrowed()
    for source, target in pages.items():
        if source.endswith(".md"):
            text = linked((ROOT / source).read_text(), source, pages)
            files.append(File.generated(config, target, content=text))
        else:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_post_build(config) -> None:
    """The index of the search as a script too: a page that was opened from the disk may load nothing else."""
    search = Path(config.site_dir, "search")
    (search / "search_index.js").write_text(f"var __index = {(search / 'search_index.json').read_text()}")


def linked(text: str, source: str, pages: dict[str, str]) -> str:
    """``text`` with its links as they are on the site: to a page of it, or, for a file that is not there, none."""

    def turned(match: re.Match) -> str:
        image, label, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        path, mark, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        file = file.removeprefix("docs/") if file.startswith("docs/") else pages.get(file)
        if file is None:
            return label if label.startswith("`") else f"`{label}`"
        return f"{image}[{label}]({posixpath.relpath(file, posixpath.dirname(pages[source]))}{mark}{anchor})"

    return _LINK.sub(turned, text)


class Doctests(griffe.Extension):
    """A docstring's doctest is shown as code; Markdown alone would take ``>>>`` for a quotation."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """``text`` with each paragraph that begins with ``>>>`` in a code block."""
    paragraphs = []
    for paragraph in re.split(r"\n{2,}", text):
        lines = paragraph.splitlines()
        start = next((i for i, line in enumerate(lines) if line.startswith(">>> ")), None)
        if start is None:
            paragraphs.append(paragraph)
            continue
        before = "\n".join(lines[:start])
        code = "\n".join(lines[start:])
        paragraphs += [part for part in (before, f"```pycon\n{code}\n```") if part]
    return "\n\n".join(paragraphs)
