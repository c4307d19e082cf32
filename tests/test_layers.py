"""The package's architecture: imports run one way only, need PyTorch only, and change nothing outside."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import milkernels

PACKAGE = Path(milkernels.__file__).parent

# A module may import modules of lower layers, and of its own folder; never of its own layer.
LAYERS = {
    "_torch": -2,
    "_context": -1,
    "arguments": -1,
    "dtypes": -1,
    "results": -1,
    "ragged": 0,
    "bags": 1,
    "native": 1,
    "triton": 1,
    "backends": 2,
    "ops": 3,
    "merging": 6,
    "visualize": 6,
    "nn": 7,
    "integrations": 8,
    "losses": 8,
    "": 9,  # milkernels/__init__.py
    "testing": 10,
    "bench": 11,
    "__main__": 12,
}
TOOLS = ("testing", "bench", "__main__")
FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(module: str) -> str:
    """``milkernels.triton.pool`` -> ``triton``; the package itself is the unit with the empty name."""
    return (module.split(".") + [""])[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


CORE = [path for path in FILES if unit_of(module_of(path)) not in ("triton", *TOOLS)]


def imported_modules(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, wherever in it, with the line; ``from milkernels import x`` is x."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [alias.name for alias in node.names if base == "milkernels" and is_module(alias.name)]
            found += [(f"{base}.{name}", node.lineno) for name in names]
            if len(names) < len(node.names):
                found.append((base, node.lineno))
    return found


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


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
                if name.split(".")[0] in ("numpy", "rich", "matplotlib", "triton", "psutil", "pytest"):
                    raise ModuleNotFoundError(f"{name} is not there", name=name)

        sys.meta_path.insert(0, Refuse())
        import torch
        import milkernels
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
