"""Metadata, the build script and the command line."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import milkernels
from milkernels import backends, native

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
    (tmp_path / "csrc" / "cpu").mkdir()
    (tmp_path / "csrc" / "cpu" / "intrinsics.h").touch()
    (tmp_path / "csrc" / "part.h").write_text('#define PART "first"\n')
    (tmp_path / "csrc" / "bindings.cpp").write_text(SOURCE)
    return tmp_path


def build(tree, **settings):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MILKERNELS_")} | {"MILKERNELS_CPU": "all"}
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
    for name in ("MILKERNELS_BUILD_EXT", "MILKERNELS_BUILD_CUDA", "MILKERNELS_BUILD_EMULATED", "TORCH_CUDA_ARCH_LIST"):
        # Set first, so that what setup.py itself sets is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
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
    assert milkernels.__version__ == installed and installed.partition("+")[0] == version
    assert version in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@needs_tree
@needs_compiler
def test_one_module_per_instruction_set(monkeypatch):
    found = extensions(monkeypatch, MILKERNELS_BUILD_CUDA="0")
    x86 = f"milkernels._C_avx2{native.SUFFIX}" in found
    names = ["default", "avx2", "avx512"] if x86 else ["default"]
    assert list(found) == [f"milkernels._C_{name}{native.SUFFIX}" for name in names]
    sources = next(iter(found.values())).sources
    for name, extension in found.items():
        flags = extension.extra_compile_args
        flags = flags["cxx"] if isinstance(flags, dict) else flags
        capability = name.removeprefix("milkernels._C_").removesuffix(native.SUFFIX).upper()
        assert ("CPU_CAPABILITY", capability) in extension.define_macros
        assert (f"CPU_CAPABILITY_{capability}", None) in extension.define_macros
        assert extension.sources == sources and len(set(sources)) == len(sources)
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
        capability = name.removeprefix("_C_").removesuffix(native.SUFFIX).upper()
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
def test_what_is_missing_is_built_and_what_is_there_is_not_built_again(tree):
    """By instruction sets; a module that nobody asked for stays as long as it is what the sources say."""
    native_set = torch.backends.cpu.get_cpu_capability().lower()
    native_set = native_set if native_set in ("avx2", "avx512") else "default"

    def sets():
        return {name.removeprefix("_C_").removesuffix(native.SUFFIX) for name in modules(tree)}

    result = build(tree, MILKERNELS_CPU="", ATEN_CPU_CAPABILITY="default")
    assert result.returncode == 0 and sets() == {"default"}, result.stderr
    times = {path: path.stat().st_mtime_ns for path in tree.rglob("*.o")}
    assert build(tree, MILKERNELS_CPU="native").returncode == 0
    assert sets() == {"default", native_set}
    assert times.items() <= {path: path.stat().st_mtime_ns for path in tree.rglob("*.o")}.items()
    (tree / "csrc" / "part.h").write_text('#define PART "second"\n')
    assert build(tree, MILKERNELS_CPU="default").returncode == 0
    assert sets() == {"default"}
    next(iter(modules(tree).values())).unlink()
    assert build(tree, MILKERNELS_CPU="default,default").returncode == 0
    assert sets() == {"default"}
    wrong = build(tree, MILKERNELS_CPU="default,sse9")
    assert wrong.returncode != 0 and "got 'sse9'" in wrong.stderr


@needs_tree
@needs_compiler
@pytest.mark.slow
def test_a_failed_compile_fails_the_build_only_if_it_must_not(tree):
    assert build(tree, MILKERNELS_CPU="default").returncode == 0
    assert len(modules(tree)) == 1
    (tree / "csrc" / "bindings.cpp").write_text("#error on purpose\n")
    optional = build(tree)
    assert optional.returncode == 0, optional.stderr
    assert "on purpose" in optional.stderr
    assert f"milkernels._C_default{native.SUFFIX} could not be compiled" in optional.stderr
    assert modules(tree) == {}  # an older one is not what the sources say
    assert build(tree, MILKERNELS_BUILD_EXT="1").returncode != 0


# What nvcc --list-gpu-code says: of CUDA 12.6, of 13.0, of a later one that has dropped some.
KNOWN = {
    "80 86 89 90": "8.0;8.6;8.9+PTX;9.0a",
    "75 80 86 87 89 90 100 103 110 120 121": "8.0;8.6;8.9;9.0a;10.0;12.0+PTX",
    "90 100 110 120 130": "9.0a;10.0;12.0+PTX",
}


@needs_tree
@pytest.mark.skipif(os.name != "posix", reason="stands in for nvcc with a script")
@pytest.mark.parametrize("known", KNOWN)
def test_the_cuda_module_is_for_what_the_compiler_knows(known, monkeypatch, tmp_path):
    """Whichever GPU is here, or none."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'sm_%s\\n' " + known)
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    found = extensions(monkeypatch, MILKERNELS_BUILD_EXT="0", MILKERNELS_BUILD_CUDA="1")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == KNOWN[known]
    [(name, extension)] = found.items()
    names = {Path(source).name for source in extension.sources}
    assert name == f"milkernels._C_cuda{native.SUFFIX}" and "pool_forward.cu" in names and "emulator.cpp" not in names
    assert not extension.optional
    for compiler in ("cxx", "nvcc"):
        flags = extension.extra_compile_args[compiler]
        assert "-std=c++20" in flags and "-O3" in flags and not {"-ffast-math", "--use_fast_math"} & set(flags)
    extensions(monkeypatch, MILKERNELS_BUILD_EXT="0", MILKERNELS_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"


@needs_tree
def test_the_cuda_module_needs_a_pytorch_for_cuda_and_its_compiler(monkeypatch, capsys):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    for cuda in (None, "13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert extensions(monkeypatch, MILKERNELS_BUILD_EXT="0") == {}
        assert ("CUDA's compiler" in capsys.readouterr().err) == (cuda is not None)
        with pytest.raises(SystemExit, match="CUDA's compiler"):
            extensions(monkeypatch, MILKERNELS_BUILD_EXT="0", MILKERNELS_BUILD_CUDA="1")


@needs_tree
def test_the_emulated_module_is_built_on_request(monkeypatch):
    switches = {"MILKERNELS_BUILD_EXT": "0", "MILKERNELS_BUILD_CUDA": "0"}
    assert extensions(monkeypatch, **switches) == {}
    assert extensions(monkeypatch, **switches, MILKERNELS_BUILD_EMULATED="0") == {}
    with pytest.raises(SystemExit, match="MILKERNELS_BUILD_EMULATED must be 0, 1, asan or unset; got 'yes'"):
        extensions(monkeypatch, **switches, MILKERNELS_BUILD_EMULATED="yes")


@needs_tree
@needs_compiler
@pytest.mark.slow
def test_the_emulated_module_is_compiled_as_cpp_and_anew_for_another_variant(tree):
    """Without CUDA: a .cu becomes C++."""
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "part.cu").write_text(SOURCE.replace("CPU_CAPABILITY", "MILKERNELS_EMULATED"))
    switches = {"MILKERNELS_BUILD_EXT": "0", "MILKERNELS_BUILD_CUDA": "0"}
    result = build(tree, **switches, MILKERNELS_BUILD_EMULATED="1")
    assert result.returncode == 0, result.stderr
    [(name, path)] = modules(tree).items()
    assert name == f"_C_emulated{native.SUFFIX}" and b"first built for 1\0" in path.read_bytes()
    (tree / "csrc" / "part.h").write_text('#define PART "second"\n')
    assert build(tree, **switches, MILKERNELS_BUILD_EMULATED="1").returncode == 0
    assert b"second built for 1\0" in path.read_bytes() and b"__asan_init" not in path.read_bytes()
    assert build(tree, **switches, MILKERNELS_BUILD_EMULATED="asan").returncode == 0
    assert b"__asan_init" in path.read_bytes()


@needs_tree
@pytest.mark.slow
def test_the_source_distribution_has_every_kernel(tmp_path):
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "milkernels").mkdir()
    (tmp_path / "milkernels" / "__init__.py").touch()
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--formats=tar"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    [archive] = (tmp_path / "dist").glob("*.tar")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {Path(source).suffix for source in sources} == {".cpp", ".cu", ".h"}
    assert sources | {"tests/cuda/faults.cu"} <= packed


@needs_tree
def test_a_version_names_the_pytorch_of_its_modules(monkeypatch):
    """But for a source distribution, which whoever unpacks it may build for another one."""

    def version(*argv, **settings):
        given = {}
        monkeypatch.setattr(setuptools, "setup", given.update)
        monkeypatch.setattr(sys, "argv", ["setup.py", *argv])
        monkeypatch.chdir(ROOT)
        for name, value in ({"MILKERNELS_BUILD_CUDA": "0", "MILKERNELS_BUILD_EXT": ""} | settings).items():
            monkeypatch.setenv(name, value)
        runpy.run_path("setup.py", run_name="__main__")
        return given["options"]["egg_info"]["tag_build"]

    of_torch = "+torch" + ".".join(torch.__version__.split(".")[:2])
    assert version("bdist_wheel", CXX="no-compiler") == "+reference"
    assert version("bdist_wheel", MILKERNELS_BUILD_EXT="0") == ""
    assert version("sdist", CXX="no-compiler") == ""
    if shutil.which("c++"):
        assert version("bdist_wheel", CXX="c++") == of_torch
        assert version("sdist", CXX="c++") == ""


@needs_tree
def test_what_is_wrong_with_a_wheel_is_said(tmp_path):
    from tools import wheel

    good = ["milkernels/py.typed", "milkernels-0.1.0.dist-info/METADATA"]
    good += [f"milkernels/_C_{name}_torch2_13.cpython-311-x86_64-linux-gnu.so" for name in wheel.SETS]

    def said(name, names, sets=wheel.SETS):
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            for each in names:
                archive.writestr(each, "")
        return wheel.faults(path, sets)

    compiled = "milkernels-0.1.0+torch2.13-cp311-cp311-manylinux_2_28_x86_64.whl"
    pure = "milkernels-0.1.0+reference-py3-none-any.whl"
    assert said(compiled, good) == [] and said(pure, good[:2], ()) == []
    assert said(compiled, good[1:]) == ["no py.typed: its types would not count"]
    assert said(compiled, good[:-1]) == ["no module for default"]
    [alien] = said(compiled, [*good, "milkernels.libs/libgomp-abc.so.1"])[:1]
    assert "somebody else" in alien
    assert said(compiled, [*good, "tests/test_a.py"]) == ["not of the package: tests/test_a.py"]
    assert "another name" in said("milkernels-0.1.0-cp311-cp311-linux_x86_64.whl", good)[0]
    assert said(pure, good, ())[0].startswith("a module for ")


@needs_tree
def test_the_releases_are_repaired_alike():
    """By `make wheel` and by the workflow."""
    from tools import wheel

    workflow = ROOT / ".github" / "workflows" / "release.yml"
    if not workflow.exists():
        pytest.skip("needs the repository")
    assert set(re.findall(r"--exclude (\S+)", workflow.read_text())) == set(wheel.EXCLUDED)
    newest, oldest = "3.14", re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT.read_text())[1]
    ci = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert {f'python: "{oldest}", torch: "torch==2.9.', f'python: "{newest}", torch: "torch"'} <= set(
        re.findall(r'python: "[\d.]+", torch: "torch(?:==2\.9\.|")', ci)
    )


def test_the_loaded_module_is_the_one_for_this_machine():
    if native.load_error() is not None:
        # Where the extension had to be built, skipping every kernel test must not pass for success.
        assert os.environ.get("MILKERNELS_BUILD_EXT") != "1", native.load_error()
        pytest.skip(native.load_error())
    if native.emulated():
        pytest.skip("the CUDA kernels are emulated")
    capability = torch.backends.cpu.get_cpu_capability()
    information = native.build_info()
    expected = capability if capability in ("AVX2", "AVX512") else "DEFAULT"
    assert information["instruction set"] == expected
    assert information["module"] == f"milkernels._C_{expected.lower()}{native.SUFFIX}"


def test_kernels_for_cuda_tensors_say_why_they_are_not_there():
    """And never keep the package from being imported."""
    reason = native.load_error("cuda")
    assert (reason is None) == bool(native.build_info("cuda"))
    assert backends.why_not("native", "max_pool", "meta") == "it has no kernels for meta tensors"
    assert backends.why_not("native", "max_pool", "cuda") == reason
    if torch.version.cuda is None:
        assert "not built for CUDA" in reason


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
    server = "native" if native.load_error() is None else "reference"
    for expected in (milkernels.__version__, torch.__version__, "attention_pool", f"served by {server}"):
        assert expected in result.stdout
    assert "Compiled kernels for CUDA tensors" in result.stdout


def test_without_arguments_there_is_help_and_a_version_on_request():
    result = command()
    assert result.returncode == 0 and "info" in result.stdout and "bench" in result.stdout, result.stderr
    assert command("--version").stdout == f"milkernels {milkernels.__version__}\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_reader_may_stop_reading():
    line = f"set -o pipefail; '{sys.executable}' -m milkernels info | head -1"
    result = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and not result.stderr
    assert result.stdout.startswith("milkernels ") and result.stdout.count("\n") == 1


def test_info_compares_the_pytorch_of_the_build():
    text = command("info").stdout
    if native.load_error() is None:
        assert re.search(rf"built with torch +\d\S* \(this is {re.escape(torch.__version__)}\)", text)


@pytest.mark.parametrize(("arguments", "message"), [(("--no",), "got --no"), (("info", "x"), "got x"), (("no",), "no")])
def test_bad_commands(arguments, message):
    result = command(*arguments)
    assert result.returncode == 2 and message in result.stderr
