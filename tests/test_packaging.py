"""Metadata, the build script and the command line."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

import milkernels
from milkernels import native

ROOT = Path(milkernels.__file__).parent.parent
PYPROJECT = ROOT / "pyproject.toml"
needs_tree = pytest.mark.skipif(not PYPROJECT.exists(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

# A module that needs no header of PyTorch, so that it compiles in a moment.
SOURCE = """
#include <Python.h>
#include "part.h"
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)
static PyModuleDef def = {PyModuleDef_HEAD_INIT, "it", PART " built for " TEXT(CPU_CAPABILITY), -1, nullptr};
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)(void) { return PyModule_Create(&def); }
"""


@pytest.fixture
def tree(tmp_path):
    """A project of the same shape with one small source."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc", "milkernels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").touch()
    (tmp_path / "milkernels" / "__init__.py").touch()
    (tmp_path / "csrc" / "part.h").write_text('#define PART "first"\n')
    (tmp_path / "csrc" / "bindings.cpp").write_text(SOURCE)
    return tmp_path


def build(tree, **settings):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MILKERNELS_")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )


def modules(tree):
    return {path.name.split(".")[0]: path for path in (tree / "milkernels").glob("_C_*.so")}


def extensions(monkeypatch, **settings):
    """What setup.py hands to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    for name in ("MILKERNELS_BUILD_EXT", "MILKERNELS_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    runpy.run_path("setup.py", run_name="__main__")
    return {extension.name: extension for extension in given["ext_modules"]}


@needs_tree
def test_the_version_is_written_once():
    version = re.search(r'^version = "(.+)"$', PYPROJECT.read_text(), re.MULTILINE)[1]
    try:
        installed = importlib.metadata.version("milkernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert milkernels.__version__ == installed == version
    assert version in (ROOT / "CHANGELOG.md").read_text()


@needs_tree
@needs_compiler
def test_one_module_per_instruction_set(monkeypatch):
    found = extensions(monkeypatch, MILKERNELS_BUILD_CUDA="0")
    x86 = "milkernels._C_avx2" in found
    assert list(found) == [f"milkernels._C_{n}" for n in (["default", "avx2", "avx512"] if x86 else ["default"])]
    sources = next(iter(found.values())).sources
    for name, extension in found.items():
        flags = extension.extra_compile_args
        flags = flags["cxx"] if isinstance(flags, dict) else flags
        capability = name.removeprefix("milkernels._C_").upper()
        assert ("CPU_CAPABILITY", capability) in extension.define_macros
        assert (f"CPU_CAPABILITY_{capability}", None) in extension.define_macros
        assert extension.sources == sources == sorted(sources)
        assert not {"-march=native", "-ffast-math", "-Ofast", "-mtune=native"} & set(flags)
        # What a flag allows must be what the loader asks for: nothing beyond the module's own name.
        assert any("avx512" in flag for flag in flags) == (capability == "AVX512")
        assert ("-mavx2" in flags) == (capability == "AVX2")


@needs_tree
def test_the_extension_can_be_switched_off(monkeypatch):
    assert extensions(monkeypatch, MILKERNELS_BUILD_EXT="0", MILKERNELS_BUILD_CUDA="0") == {}
    with pytest.raises(SystemExit, match="MILKERNELS_BUILD_EXT must be 0, 1 or unset; got 'yes'"):
        extensions(monkeypatch, MILKERNELS_BUILD_EXT="yes")


@needs_tree
def test_without_a_compiler_the_build_goes_on_unless_it_must_not(monkeypatch, capsys):
    assert extensions(monkeypatch, CXX="no-such-compiler", MILKERNELS_BUILD_CUDA="0") == {}
    assert "no-such-compiler" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no-such-compiler"):
        extensions(monkeypatch, CXX="no-such-compiler", MILKERNELS_BUILD_EXT="1")


@needs_tree
@needs_compiler
@pytest.mark.slow
def test_builds_are_separate_and_incremental(tree):
    result = build(tree, MILKERNELS_BUILD_EXT="1")
    assert result.returncode == 0, result.stderr
    built = modules(tree)
    for name, path in built.items():
        capability = name.removeprefix("_C_").upper()
        assert f"first built for {capability}\0".encode() in path.read_bytes()

    times = {path: path.stat().st_mtime_ns for path in tree.rglob("*.o")}
    assert len(times) == len(built)
    assert build(tree).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*.o")} == times

    (tree / "csrc" / "part.h").write_text('#define PART "second"\n')
    assert build(tree).returncode == 0
    assert all(b"second built for" in path.read_bytes() for path in modules(tree).values())


@needs_tree
@needs_compiler
@pytest.mark.slow
def test_a_failed_compile_fails_the_build_only_if_it_must_not(tree):
    (tree / "csrc" / "bindings.cpp").write_text("#error on purpose\n")
    optional = build(tree)
    assert optional.returncode == 0, optional.stderr
    assert "milkernels._C_default could not be compiled" in optional.stderr
    assert modules(tree) == {}
    assert build(tree, MILKERNELS_BUILD_EXT="1").returncode != 0


def test_the_loaded_module_is_the_one_for_this_machine():
    if native.load_error() is not None:
        # Where the extension had to be built, skipping every kernel test must not pass for success.
        assert os.environ.get("MILKERNELS_BUILD_EXT") != "1", native.load_error()
        pytest.skip(native.load_error())
    capability = torch.backends.cpu.get_cpu_capability()
    information = native.build_info()
    expected = capability if capability in ("AVX2", "AVX512") else "DEFAULT"
    assert information["instruction set"] == expected
    assert information["module"] == f"milkernels._C_{expected.lower()}"


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "milkernels", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_info():
    result = command("info")
    assert result.returncode == 0, result.stderr
    for expected in (milkernels.__version__, torch.__version__, "attention_pool", "served by reference"):
        assert expected in result.stdout


@pytest.mark.parametrize(("arguments", "message"), [((), "command"), (("info", "x"), "got x"), (("no",), "no")])
def test_bad_commands(arguments, message):
    result = command(*arguments)
    assert result.returncode == 2 and message in result.stderr
