"""The package's architecture: imports run one way only, need PyTorch only, and change nothing outside."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import milkernels

PACKAGE = Path(milkernels.__file__).parent

# A module may import modules of lower layers, and of its own folder; never of its own layer.
LAYERS = {
    "_torch": -2,
    "_context": -1,
    "arguments": -1,
    "dtypes": -1,
    "layers": 0,
    "results": -1,
    "ragged": 0,
    "encoding": 0,
    "saving": 0,
    "bags": 1,
    "native": 1,
    "triton": 1,
    "backends": 2,
    "ops": 3,
    "data": 6,
    "merging": 6,
    "visualize": 6,
    "distributed": 7,
    "streaming": 7,
    "nn": 8,
    "integrations": 9,
    "losses": 9,
    "": 10,  # milkernels/__init__.py
    "testing": 11,
    "bench": 12,
    "__main__": 13,
}
TOOLS = ("testing", "bench", "__main__")
FILES = sorted(PACKAGE.rglob("*.py"))
ROOT = PACKAGE.parent
OUTSIDE = (
    "tools",
    "benchmarks",
)  # the packages of a checkout that import milkernels, and are imported by nothing in it
OUTER = [path for folder in OUTSIDE for path in sorted((ROOT / folder).rglob("*.py"))]


def unit_of(module: str) -> str:
    """``milkernels.triton.pool`` -> ``triton``; the package itself is the unit with the empty name."""
    return (module.split(".") + [""])[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


CORE = [path for path in FILES if unit_of(module_of(path)) not in ("triton", *TOOLS)]


def imported_modules(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, wherever in it, with the line; ``from package import module`` is the latter."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names if is_module(f"{base}.{alias.name}")]
            found += [(f"{base}.{name}", node.lineno) for name in names]
            if len(names) < len(node.names):
                found.append((base, node.lineno))
    return found


def is_module(name: str) -> bool:
    """Whether the package has a module of that full name."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name.split(".")[0] in ("milkernels", *OUTSIDE) and (
        path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    )


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Some nodes of which each leads to the next and the last is the first again; empty where there is no circle."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for node in sorted(graph.get(path[-1], ())):
            if node in path:
                return [*path[path.index(node) :], node]
            if node not in done and (circle := search([*path, node])):
                return circle
        done.add(path[-1])
        return []

    return next((circle for node in sorted(graph) if node not in done and (circle := search([node]))), [])


def test_every_module_has_a_layer():
    units = {unit_of(module_of(path)) for path in FILES}
    assert units <= set(LAYERS), f"give {sorted(units - set(LAYERS))} a place in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path):
    unit = unit_of(module_of(path))
    for imported, line in imported_modules(path):
        if imported.split(".")[0] != "milkernels":
            continue
        other = unit_of(imported)
        assert other == unit or LAYERS[other] < LAYERS[unit], (
            f"{path.relative_to(PACKAGE)}:{line}: {unit or 'milkernels'} must not import {imported}"
        )


@pytest.mark.parametrize(
    ("graph", "circle"),
    [
        ({}, []),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": {"outside"}}, []),
        ({"a": {"a"}}, ["a", "a"]),
        ({"a": {"b"}, "b": {"c", "d"}, "d": {"b"}}, ["b", "d", "b"]),
        ({"a": {"b"}, "x": {"y"}, "y": {"a", "z"}, "z": {"x"}}, ["x", "y", "z", "x"]),
    ],
    ids=["empty", "diamond", "itself", "behind", "apart"],
)
def test_circles_are_found(graph, circle):
    assert circle_in(graph) == circle


def test_imports_anywhere_in_a_file_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "milkernels")
    folder = tmp_path / "milkernels" / "folder"
    folder.mkdir(parents=True)
    for name in ("__init__", "other", "third", "fourth"):
        (folder / f"{name}.py").write_text("")
    (folder / "one.py").write_text(
        textwrap.dedent("""
            from typing import TYPE_CHECKING

            from milkernels.folder import name, other

            if TYPE_CHECKING:
                from milkernels.folder.third import Class

            def function():
                from . import fourth
        """)
    )
    found = {module for module, _ in imported_modules(folder / "one.py") if module != "typing"}
    assert found == {f"milkernels.folder{module}" for module in ("", ".other", ".third", ".fourth")}


def test_there_is_no_import_circle():
    """Among all modules, in folders too. That a module of a package loads the package first is no import of it."""
    graph = {module_of(path): {module for module, _ in imported_modules(path)} for path in [*FILES, *OUTER]}
    assert not (circle := circle_in(graph)), " -> ".join(circle)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_package_knows_nothing_of_the_checkout(path):
    for imported, line in imported_modules(path):
        assert imported.split(".")[0] not in (*OUTSIDE, "tests", "examples"), f"line {line}: {imported}"


@pytest.mark.parametrize("path", OUTER, ids=module_of)
def test_tools_and_benchmarks_do_not_import_each_other(path):
    """Tools serve the code, benchmarks measure it; what both need is in `milkernels.testing` or `milkernels.bench`."""
    others = {*OUTSIDE, "tests", "examples"} - {path.relative_to(ROOT).parts[0]}
    for imported, line in imported_modules(path):
        assert imported.split(".")[0] not in others, f"line {line}: {imported}"


@pytest.mark.parametrize("path", CORE, ids=module_of)
def test_the_core_imports_torch_and_the_standard_library_only(path):
    for imported, line in imported_modules(path):
        root = imported.split(".")[0]
        assert root in sys.stdlib_module_names or root in ("torch", "milkernels"), f"line {line}: {imported}"


def run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_needs_nothing_but_torch():
    run("""
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("numpy", "h5py", "zarr", "rich", "matplotlib", "triton", "psutil", "pytest"):
                    raise ModuleNotFoundError(f"{name} is not there", name=name)

        sys.meta_path.insert(0, Refuse())
        import torch
        import milkernels
        import milkernels.data
        import milkernels.nn
        import milkernels.visualize

        pooled = milkernels.softmax_pool(torch.ones(3, 2), torch.zeros(3, 1), backend="reference")
        assert torch.equal(pooled.bag, torch.ones(1, 1, 2)), pooled
        loaded = {name for name in sys.modules if name.startswith(("milkernels.bench", "milkernels.testing"))}
        assert not loaded, loaded
    """)


def test_importing_changes_nothing_outside():
    run("""
        import os, random, sys, warnings
        import torch
        # What PyTorch itself loads late, when asked, is not ours.
        import torch.library, torch.utils._pytree, torch._subclasses, torch.nn.functional

        watched = [
            torch, torch.Tensor, torch._C, torch._C._TensorBase, torch.ops.aten, torch.library,
            torch.nn, torch.nn.functional, torch.nn.Module, torch.autograd, torch.autograd.Function,
            torch.cuda, torch.backends,
        ]

        def state():
            settings = (
                torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
                torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                torch.get_rng_state().tolist(), random.getstate(), dict(os.environ), list(warnings.filters),
                list(sys.path), sys.excepthook,
            )
            return settings, [dict(vars(owner)) for owner in watched]

        settings, before = state()
        import milkernels
        now, after = state()
        assert settings == now, "a setting"
        for owner, old, new in zip(watched, before, after):
            changed = [name for name in old if name in new and new[name] is not old[name]]
            gone = [name for name in old if name not in new]
            assert not changed and not gone, (owner, changed, gone)
    """)


def _private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


_OBJECTS = (torch.nn.Linear(1, 1), torch.zeros(1), torch.zeros(1).untyped_storage(), torch.autograd.Function)
OF_OBJECTS = {name for thing in _OBJECTS for name in dir(thing) if _private(name)}  # _modules, _version, ...


def private_uses(path: Path) -> list[str]:
    """What a file takes of PyTorch whose name begins with an underscore: imports, and attributes of its modules and of
    its objects."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            of_torch = ast.unparse(node.value).split(".")[0] == "torch"
            private = _private(node.attr) and (of_torch or node.attr in OF_OBJECTS)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            private = any(name.startswith("torch.") and any(map(_private, name.split("."))) for name in names)
        else:
            continue
        if private:
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_the_private_parts_of_pytorch_have_one_room():
    """Elsewhere a new PyTorch would break what nobody looks for."""
    shipped = [path for path in FILES if unit_of(module_of(path)) not in ("bench", "testing")]
    room = PACKAGE / "_torch.py"
    assert not [use for path in shipped if path != room for use in private_uses(path)]
    assert len(private_uses(room)) > 20


def test_private_uses_are_found(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "from torch.utils import _pytree\nimport torch._dynamo\nfrom milkernels import _torch\ntorch._C.x\n"
        "module._parameters\nself._own\npair._replace()\nmodule.__dict__\n"
    )
    assert {use.split(":")[1] for use in private_uses(file)} == {"1", "2", "4", "5"}
