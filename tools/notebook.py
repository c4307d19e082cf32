"""Makes the notebook of a script and executes it: ``make notebook``.

    python -m tools.notebook examples/quick_start.py

``# %%`` begins a cell of code, ``# %% [markdown]`` one of text, whose lines are comments; ``# %magic`` is a magic.  The
notebook lies beside the script, with its output, and nothing of the machine or the time in it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def cells_of(script: str) -> list[tuple[str, str]]:
    """``(kind, source)`` of each cell: "markdown" or "code"."""
    cells = []
    for part in script.split("# %%")[1:]:
        head, _, body = part.partition("\n")
        text = "markdown" in head
        lines = [line[1:].removeprefix(" ") if text or line.startswith("# %") else line for line in body.split("\n")]
        cells.append(("markdown" if text else "code", "\n".join(lines).strip("\n")))
    return cells


def notebook_of(script: Path):
    """Executed, in the folder above the script's."""
    import nbformat
    from nbclient import NotebookClient

    form = nbformat.v4
    makers = {"markdown": form.new_markdown_cell, "code": form.new_code_cell}
    cells = [makers[kind](source, id=f"cell-{i}") for i, (kind, source) in enumerate(cells_of(script.read_text()))]
    notebook = form.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(script.parents[1])}}
    NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata = {}
    return notebook


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.notebook", description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="+", type=Path)
    for script in parser.parse_args(argv).scripts:
        import nbformat

        path = script.resolve().with_suffix(".ipynb")
        nbformat.write(notebook_of(script.resolve()), path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
