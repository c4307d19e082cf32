"""``make wheel``: a wheel with compiled kernels for this Python and PyTorch, repaired, checked, installed and tested.

1. The wheel is built from the tree: every instruction set, or those that ``MILKERNELS_CPU`` names, no CUDA C++.
2. auditwheel gives it the tag of the oldest Linux that it runs on.  PyTorch's libraries are left out, and OpenMP's with
   them: those of the PyTorch that is installed are used, for a second OpenMP in a process starts threads of its own.
3. It is installed into an environment of its own, beside the same PyTorch.
4. The source distribution is unpacked without the package, and its tests run there, on what was installed.

``--pure`` makes the wheel for everything else, ``+reference``: no compiled kernels.  ``--check FILE`` does 3 and 4 with
a wheel that is there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK, OUT = ROOT / "build" / "wheel", ROOT / "dist"
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libc10.so", "libgomp.so.1")
TESTS = (
    "tests/test_install.py",
    "tests/test_native.py",
    "tests/test_numbers.py",
    "tests/test_packaging.py",
    "tests/test_nn.py",
)
NEEDED = ("pytest", "numpy", "matplotlib")  # of these tests
SETS = ("avx512", "avx2", "default")


def run(*command: str | Path, folder: Path = ROOT, **settings: str) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=folder, env=os.environ | settings, check=True)


def build(pure: bool) -> Path:
    """The wheel as setuptools makes it."""
    shutil.rmtree(WORK / "built", ignore_errors=True)
    about = {"MILKERNELS_BUILD_EXT": "1", "MILKERNELS_CPU": os.environ.get("MILKERNELS_CPU") or "all"}
    if pure:  # as where there is no compiler
        about = {"MILKERNELS_BUILD_EXT": "", "CXX": "no-compiler"}
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", WORK / "built")
    run(sys.executable, "-m", "pip", "wheel", *options, ".", MILKERNELS_BUILD_CUDA="0", **about)
    [wheel] = (WORK / "built").glob("*.whl")
    return wheel


def repair(wheel: Path) -> Path:
    """With its tag, in ``dist``."""
    excluded = [part for name in EXCLUDED for part in ("--exclude", name)]
    shutil.rmtree(WORK / "repaired", ignore_errors=True)
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", WORK / "repaired", wheel)
    [repaired] = (WORK / "repaired").glob("*.whl")
    OUT.mkdir(exist_ok=True)
    return Path(shutil.copy2(repaired, OUT))


def faults(wheel: Path, sets: Sequence[str] = SETS) -> list[str]:
    """What is wrong with a wheel's contents and its name; ``sets``: the instruction sets that it must have."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found = {match[1] for name in names if (match := re.match(r"milkernels/_C_(\w+?)_torch[\d_]+\.", name))}
    wrong = [f"no module for {name}" for name in sets if name not in found]
    wrong += [f"a module for {name}" for name in sorted(found - set(sets))]
    wrong += [
        f"a library of somebody else: {name}" for name in names if re.search(r"\.libs/|lib(torch|c10|gomp)", name)
    ]
    wrong += [
        f"not of the package: {name}" for name in names if not re.match(r"milkernels(/|-[^/]+\.dist-info/)", name)
    ]
    wrong += [] if "milkernels/py.typed" in names else ["no py.typed: its types would not count"]
    local, tag = (r"\+torch\d+\.\d+", "manylinux") if sets else (r"\+reference", "none-any")
    return wrong + (
        [] if re.search(local, wheel.name) and tag in wheel.name else [f"another name than meant: {wheel.name}"]
    )


def sources() -> Path:
    """The source distribution, unpacked, without the package itself: what is imported must be what was installed."""
    shutil.rmtree(WORK / "sources", ignore_errors=True)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", WORK / "sources")
    [archive] = (WORK / "sources").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(WORK / "sources", filter="data")
    [folder] = (path for path in (WORK / "sources").iterdir() if path.is_dir())
    OUT.mkdir(exist_ok=True)
    shutil.copy2(archive, OUT)
    for path in (folder / "milkernels", *folder.glob("*.egg-info")):  # the latter would tell another version
        shutil.rmtree(path)
    return folder


def check(wheel: Path, torch: str, sets: Sequence[str], arguments: Sequence[str]) -> None:
    """Installs it into an environment of its own and runs the tests of the source distribution there; where it has not
    all instruction sets, as on a machine that has no better one."""
    environment = WORK / "environment"
    run(sys.executable, "-m", "venv", "--clear", environment)
    python = environment / "bin" / "python"
    index = os.environ.get("TORCH_INDEX")
    run(python, "-m", "pip", "install", "--quiet", *(["--index-url", index] if index else []), torch)
    run(python, "-m", "pip", "install", "--quiet", *NEEDED)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    run(python, "-m", "milkernels", "info", folder=WORK)
    tests = sources()
    settings = {"ATEN_CPU_CAPABILITY": sets[0]} if sets and set(sets) != set(SETS) else {}
    options = ("-q", "--tier", "quick", "--legs", "native,reference", *TESTS, *arguments)
    run(python, "-m", "pytest", *options, folder=tests, **settings)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tools.wheel", description=__doc__.partition("\n")[0])
    p.add_argument("--pure", action="store_true", help="no compiled kernels")
    p.add_argument("--check", type=Path, metavar="FILE", help="build nothing; install and test this wheel")
    p.add_argument("--no-tests", action="store_true", help="build and look into it only")
    p.add_argument(
        "--torch", default=f"torch=={metadata.version('torch').partition('+')[0]}", help="what to install beside it"
    )
    arguments, others = p.parse_known_args(argv)
    chosen = os.environ.get("MILKERNELS_CPU") or "all"
    sets = () if arguments.pure else SETS if chosen == "all" else tuple(chosen.split(","))
    if arguments.check:
        wheel = arguments.check.resolve()
    else:
        built = build(arguments.pure)
        wheel = Path(shutil.copy2(built, OUT)) if arguments.pure and OUT.mkdir(exist_ok=True) is None else repair(built)
        if wrong := faults(wheel, sets):
            raise SystemExit("\n".join([f"{wheel.name}:", *wrong]))
    if not arguments.no_tests:
        check(wheel, arguments.torch, sets, others)
    print(wheel)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"tools.wheel: exit status {error.returncode} of the command above")
