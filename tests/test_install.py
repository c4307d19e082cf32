"""What a user meets first: how it is installed, and what it says where something is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import milkernels
from milkernels import native

ROOT = Path(milkernels.__file__).parent.parent
README = ROOT / "README.md"
needs_tree = pytest.mark.skipif(not README.exists(), reason="needs the source tree")


@pytest.fixture
def package(tmp_path):
    """A copy of the package without compiled modules."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(milkernels.__file__).parent, tmp_path / "milkernels", ignore=ignored)
    return tmp_path


def run(folder, *arguments, **settings):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )


POOL = "import torch, milkernels; milkernels.mean_pool(torch.ones(2, 3)); milkernels.mean_pool(torch.ones(2, 3))"


def test_without_compiled_modules_it_says_so_once_and_how_to_mend_it(package):
    result = run(package, "-c", POOL)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("runs on the reference") == 1
    for said in (result.stderr, " ".join(run(package, "-m", "milkernels", "info").stdout.split())):
        assert "was not built" in said and "pip install --no-build-isolation" in said


def test_a_module_for_another_pytorch_is_named_and_not_loaded(package):
    """Loading this one would be an error of another kind: it is no module at all."""
    for name in native._MODULES.values():
        (package / "milkernels" / f"{name}_torch1_13.cpython-0-nowhere.so").write_text("not a module")
    result = run(package, "-c", POOL)
    assert result.returncode == 0, result.stderr
    assert f"is built for PyTorch 1.13, and this is {torch.__version__}" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    info = " ".join(run(package, "-m", "milkernels", "info").stdout.split())
    assert f"is built for PyTorch 1.13, and this is {torch.__version__}" in info


def test_a_module_for_another_python_is_named_too(package):
    for name in native._MODULES.values():
        (package / "milkernels" / f"{name}{native.SUFFIX}.cpython-0-nowhere.so").write_text("not a module")
    assert "is built for another Python" in run(package, "-c", POOL).stderr


def test_a_patch_release_is_the_same_pytorch():
    major, minor = torch.__version__.split(".")[:2]
    assert f"_torch{major}_{minor}" == native.SUFFIX


def test_every_word_on_installing_is_for_the_pytorch_that_is_there():
    """An isolated build compiles against the newest PyTorch, whatever is installed."""
    texts = [path.read_text() for path in Path(milkernels.__file__).parent.rglob("*.py")]
    texts += [README.read_text()] if README.exists() else []
    for text in texts:
        assert not re.search(r"pip install (-\S+ )*\.(?!\S)", text.replace("--no-build-isolation", "isolated"))


@needs_tree
@pytest.mark.slow
def test_an_installation_without_a_compiler_has_a_version_of_its_own(tmp_path):
    """And is for any platform, so it cannot be taken for one with compiled modules."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "bindings.cpp").touch()
    (tmp_path / "milkernels").mkdir()
    (tmp_path / "milkernels" / "__init__.py").touch()
    settings = {"MILKERNELS_BUILD_EXT": "", "MILKERNELS_BUILD_CUDA": "0", "MILKERNELS_BUILD_EMULATED": ""}
    settings["CXX"] = "no-such-compiler"
    result = run(tmp_path, "setup.py", "--quiet", "bdist_wheel", **settings)
    assert result.returncode == 0, result.stderr
    assert "needs a C++ compiler (no-such-compiler), and there is none" in result.stderr
    [wheel] = (tmp_path / "dist").iterdir()
    assert re.fullmatch(r"milkernels-\d+\.\d+\.\d+\+reference-py3-none-any\.whl", wheel.name)
    assert run(tmp_path, "setup.py", "--quiet", "sdist", **settings).returncode == 0
    [sdist] = (tmp_path / "dist").glob("*.tar.gz")
    assert "reference" not in sdist.name


@needs_tree
def test_the_oldest_pytorch_is_said_alike():
    said = set(re.findall(r"torch>=([\d.]+)", (ROOT / "pyproject.toml").read_text() + README.read_text()))
    assert said == {"2.9"}
