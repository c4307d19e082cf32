"""The notebook is that of its script, was executed, and what it says is so."""

import json

import pytest
from example_cases import ROOT

pytest.importorskip("matplotlib")

from tools.notebook import cells_of  # noqa: E402

SCRIPT = ROOT / "examples" / "quick_start.py"


def cells():
    notebook = json.loads(SCRIPT.with_suffix(".ipynb").read_text())
    return notebook["cells"]


def test_it_is_the_script():
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells()]
    assert found == cells_of(SCRIPT.read_text()), "run make notebook"


def test_it_was_executed():
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert "image/png" in outputs[-1]["data"]
    text = SCRIPT.with_suffix(".ipynb").read_text()
    assert len(text) < 100_000 and "/tmp/" not in text and "/home/" not in text


def test_it_runs_and_learns(capsys):
    space = {"__name__": "quick_start"}
    exec(compile(SCRIPT.read_text(), "quick_start", "exec"), space)
    assert space["accuracy"] > 0.7
    assert "accuracy on 20 slides" in capsys.readouterr().out
