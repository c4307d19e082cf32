"""Every Python block of these tutorials runs, one after another, in an empty folder."""

import contextlib
import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from example_cases import ROOT
from processes import needs_gloo

PAGES = ("feature-files", "many-slides", "attention-maps", "survival", "encoder")
MAY_LACK = ("h5py", "matplotlib", "pytorch_lightning", "ray", "dask", "pyspark", "torchsurv")


def blocks_of(page: str) -> list[tuple[int, str]]:
    """``(line, source)`` of each block."""
    text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


@pytest.mark.parametrize("page", PAGES)
def test_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space, blocks = {"__name__": "page"}, blocks_of(page)
    assert len(blocks) > 2
    ran = 0
    for line, source in blocks:
        if missing := [name for name in MAY_LACK if f"import {name}" in source or f"from {name}" in source]:
            missing = [name for name in missing if importlib.util.find_spec(name) is None]
        if missing and missing[0] not in ("ray", "dask", "pyspark"):
            pytest.skip(f"no {missing[0]}, which line {line} needs")
        if not missing:
            exec(compile("\n" * line + source, f"{page}.md", "exec"), space)
            ran += 1
    assert ran >= len(blocks) - 3


@needs_gloo
def test_several_processes(tmp_path):
    """The page is a program."""
    path = tmp_path / "train.py"
    path.write_text("\n\n".join(source for _, source in blocks_of("several-processes")))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "weights of all ranks sum to 1.0000" in done.stdout, done.stderr


def test_discrete_time_against_the_likelihood(tmp_path, monkeypatch):
    """The recipe, against the product of hazards, in float64."""
    (source,) = [source for _, source in blocks_of("survival") if "def discrete_time_nll" in source]
    space = {"torch": torch}
    with contextlib.suppress(NameError):  # what follows the function needs the page's data
        exec(source, space)
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    bin, event = torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([1, 0, 1, 0, 1, 0]).bool()
    ours = space["discrete_time_nll"](z, bin, event)
    expected = []
    for h, b, happened in zip(z.sigmoid(), bin.tolist(), event.tolist(), strict=True):
        before = (1 - h[:b]).prod()
        expected.append(-(before * (h[b] if happened else 1 - h[b])).log())
    expected = torch.stack(expected)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(loss.sum(), z)[0] for loss in (ours, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
