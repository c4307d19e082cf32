"""The README and the documentation site: code that runs, links that lead somewhere, an entry for every public name."""

import importlib
import importlib.util
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import upstream_models
import upstream_padded

import milkernels
from milkernels import losses, nn, ops

ROOT = Path(milkernels.__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
REFERENCE = ROOT / "docs" / "reference"
pytestmark = pytest.mark.skipif(not PAGES, reason="needs the source tree")

FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^ *```$", re.M | re.S)
OPTIONAL = ("h5py", "matplotlib", "numpy", "onnxruntime", "onnxscript", "pytorch_lightning", "ray", "torchsurv", "zarr")
# What stands for the code of other projects where it is not installed; none of it is a package that could be.
STAND_INS = {
    "models.model_clam": {"CLAM_SB": upstream_models.ClamSB, "CLAM_MB": upstream_models.ClamMB},
    "dsmil": {name: getattr(upstream_models, name) for name in ("FCLayer", "BClassifier", "MILNet")},
    "src.models.abmil": {"ABMIL": upstream_padded.MILLabABMIL, "ABMILModel": upstream_padded.MILLabABMIL},
    "torchmil.models": {"ABMIL": lambda in_shape, **options: upstream_padded.ABMIL(*in_shape, **options)},
    "torch_geometric.nn": {"AttentionalAggregation": upstream_models.AttentionalAggregation},
}


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """``(line, code)`` of each block of the page, without its indentation."""
    text, found = path.read_text(), []
    for match in FENCE.finditer(text):
        if match[2].split(" ")[0] == language:
            code = re.sub(rf"^{match[1]}", "", match[3], flags=re.M)
            found.append((text.count("\n", 0, match.start()) + 1, code))
    return found


def lacking(code: str) -> list[str]:
    """The packages that it imports, of those that need not be there, and that are not."""
    imported = [name for name in OPTIONAL if re.search(rf"^\s*(import|from) [^#\n]*\b{name}\b", code, re.M)]
    return [name for name in imported if importlib.util.find_spec(name) is None]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


WITH_CODE = [path for path in (README, *PAGES) if path.exists() and blocks(path, "python")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what a reader of the pages has in theirs: features of slides, and their labels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(str(ROOT))
    for name, content in STAND_INS.items():
        try:
            importlib.import_module(name)
        except ImportError:
            for part in {name.split(".")[0], name}:
                monkeypatch.setitem(sys.modules, part, ModuleType(part))
            vars(sys.modules[name]).update(content)
    return tmp_path


def make_slides(folder: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (folder / "features").mkdir()
    lines = ["slide_id,label"]
    for i, count in enumerate((30, 7, 1, 12)):
        with h5py.File(folder / "features" / f"slide_{i}.h5", "w") as file:
            file["features"] = torch.randn(count, 1024).numpy()
            file["coords"] = torch.randint(0, 9999, (count, 2)).numpy()
        lines.append(f"slide_{i},{i % 2}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page, workplace):
    """From the first block to the last, as a reader would type it; a traceback has the lines of the page."""
    code, left_out = "", ""
    for line, block in blocks(page, "python"):
        if missing := lacking(block):  # what comes after it may use its names
            left_out = f"from line {line} on it needs {', '.join(missing)}"
            break
        code += "\n" * (line - code.count("\n")) + block
    if "features/" in code:
        make_slides(workplace)
    before, threads = dict(os.environ), torch.get_num_threads()
    try:
        if "__main__" in code:  # it starts processes, which import it
            script = workplace / "page.py"
            script.write_text(code)
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
            assert run.returncode == 0, run.stderr
        else:
            exec(compile(code, name_of(page), "exec"), {"__name__": "__main__"})
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.set_num_threads(threads)
    if left_out:
        pytest.skip(left_out)


def test_no_block_escapes_that_test():
    """By the name of another language, or without one."""
    for page in (README, *PAGES):
        languages = {match[2].split(" ")[0] for match in FENCE.finditer(page.read_text())}
        assert languages <= {"python", "sh", "diff", "text"}, name_of(page)


def test_commands_are_there():
    """Targets of make, modules that Python is told to run, and what pip is asked for by extras."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    project = (ROOT / "pyproject.toml").read_text()
    for page in (README, *PAGES):
        text = page.read_text()
        commands = "\n".join(code for _, code in blocks(page, "sh")) + "\n".join(re.findall(r"`([^`\n]+)`", text))
        assert set(re.findall(r"(?:^|`)make ([\w-]+)", commands, re.M)) <= targets, name_of(page)
        for module in re.findall(
            r"^python -m (milkernels|benchmarks[\w.]*|examples[\w.]*|tools[\w.]*)", commands, re.M
        ):
            assert importlib.util.find_spec(module), (name_of(page), module)
        assert all(f"\n{extra} = [" in project for extra in re.findall(r"milkernels\[(\w+)\]", text)), name_of(page)


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=name_of)
def test_links_of_a_file_lead_to_files(page):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text()):
        path = "".join(target).partition("#")[0]
        assert not path or "://" in path or (page.parent / path).exists(), path


def test_the_readme_is_short_and_begins_with_what_counts():
    text = README.read_text()
    lines = text.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 260
    assert "milkernels.accelerate(model)" in "\n".join(lines[:12])
    assert re.search(
        r"^## GPU\n\n[^.\n]*checked by interpreter, emulator and compilers; they have never run", text, re.M
    )
    assert all(command in text for command in ("\nmake bench ", "\nmake test "))


# The site


def test_every_page_is_in_the_navigation():
    """And what is in it is a page, here or borrowed from elsewhere in the project."""
    told = set(re.findall(r"([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2], re.M))
    here = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES}
    site = (ROOT / "tools" / "site.py").read_text()
    borrowed = set(re.findall(r"\": \"([\w./-]+\.md)\"", site))
    for folder, target in (("benchmarks/results", "performance"), ("examples/results", "examples")):
        borrowed |= {f"{target}/{path.name}" for path in (ROOT / folder).glob("*.md")}
    assert told == here | borrowed


def entries() -> dict[str, str]:
    """The names that the reference documents, and the page of each."""
    return {
        name: page.name
        for page in REFERENCE.glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    }


def found(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public() -> dict[str, object]:
    modules = {"milkernels": milkernels, "milkernels.nn": nn, "milkernels.losses": losses}
    for path in (ROOT / "milkernels").glob("*.py"):  # modules that a user imports by their names
        if re.search(rf"\bmilkernels\.{path.stem}\b", (REFERENCE / "index.md").read_text()):
            module = importlib.import_module(f"milkernels.{path.stem}")
            modules[module.__name__] = module
    return {f"{where}.{name}": getattr(module, name) for where, module in modules.items() for name in module.__all__}


def test_every_public_name_is_in_the_reference():
    documented = {id(found(path)) for path in entries()}
    assert [name for name, thing in public().items() if id(thing) not in documented] == []


def test_every_entry_of_the_reference_says_what_it_is_and_shows_it():
    """By an example in its docstring, or on its page."""
    for path, page in entries().items():
        text, name = found(path).__doc__ or "", path.rpartition(".")[2]
        assert text.strip(), path
        shown = "\n".join(code for _, code in blocks(REFERENCE / page, "python"))
        assert ">>> " in text or re.search(rf"\b{name}\b", shown), path


def test_pictures_are_those_that_the_tool_draws():
    written = runpy.run_path(str(ROOT / "tools" / "diagrams.py"))["written"]()
    assert [path.name for path, text in written.items() if path.read_text() != text] == []


def test_public_names_are_typed():
    """Every argument and result; mypy reads the same annotations in tests/typed.py (`make lint`)."""
    lacking = []
    for where, thing in public().items():
        functions = [thing] if inspect.isfunction(thing) else []
        if inspect.isclass(thing):
            functions = [f for name, f in vars(thing).items() if inspect.isfunction(f) and not name.startswith("_")]
            functions += [vars(thing)["__init__"]] if inspect.isfunction(vars(thing).get("__init__")) else []
        for function in functions:
            parameters = inspect.signature(function).parameters.values()
            lacking += [
                f"{where}: {p.name}" for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls")
            ]
            if function.__name__ != "__init__" and "return" not in function.__annotations__:
                lacking.append(f"{where}: what {function.__name__} returns")
    assert lacking == []
    assert (ROOT / "milkernels" / "py.typed").exists()


def test_names_of_ops_are_public():
    """They stand in the list that type checkers read."""
    assert set(ops.__all__) <= set(milkernels.__all__)
