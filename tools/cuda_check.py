"""``python -m tools.cuda_check``: builds the CUDA module and reads what came out, with no GPU.

Fails on what would be slow or missing: an op without a kernel, spills and stack frames, registers that a full block has
not, a kernel that should read vectors of 16 bytes and does not, a warning of the compiler.  Needs
a PyTorch built for CUDA, and nvcc.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from milkernels import native

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = {"sm_80": "8.0", "sm_90a": "9.0a", "sm_100": "10.0+PTX"}
REGISTERS = 65536  # of a multiprocessor; a thread has 255
MOST_THREADS = 1024
MOST_SPILLED = 64  # bytes for each thread of a kernel in float64, which is there to be exact; in other types, none

# What machine code is looked through for. Names here, instructions there.
INSTRUCTIONS = {
    "LDGSTS.128": re.compile(r"LDGSTS\.E\S*\.128"),  # cp.async of 16 bytes
    "LDG.128": re.compile(r"LDG\.E\S*\.128"),
    "STG.128": re.compile(r"STG\.E\S*\.128"),
    "LDS.128": re.compile(r"LDS\S*\.128"),
}
# What a kernel must have, whatever its types: those whose cost is to read or to write rows. What holds for every kernel
# is in `_judge`.
WANTED = {
    "pool_kernel": ("LDGSTS.128", "LDS.128"),
    "pool_backward_kernel": ("LDGSTS.128", "LDS.128"),
    "class_max_kernel": ("LDGSTS.128", "LDS.128"),
    "row_products_kernel": ("LDG.128",),
    "expand_rows_kernel": ("LDG.128", "STG.128"),
    "copy_rows_kernel": ("LDG.128", "STG.128"),
    "gate_scores_kernel": ("LDG.128",),
    "gate_backward_kernel": ("LDG.128", "STG.128"),
}
# Ops that the host does not bound, which are Triton's alone.
LEFT_TO_TRITON = ("attention_weights", "segment_softmax", "topk_instances")


@dataclass
class Code:
    """A kernel for one architecture: what the assembler says of it, and what its machine code has."""

    name: str  # of the template
    types: str  # its arguments
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0  # what is asked for at launch is not known here
    threads: int | None = None  # of a block, by __launch_bounds__
    found: set[str] = field(default_factory=set)

    @property
    def exact(self) -> bool:
        return "double" in self.types


@dataclass
class Row:
    """All types of a kernel on one architecture, the worst of each."""

    kernel: str
    arch: str
    codes: list[Code] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        def worst(number: str, codes: Iterable[Code]) -> str:
            return str(max((getattr(code, number) for code in codes), default="-"))

        plain, exact = ([code for code in self.codes if code.exact == which] for which in (False, True))
        found = set.intersection(*(code.found for code in self.codes)) if self.codes else set()
        return (
            *(self.kernel, self.arch, str(len(self.codes))),
            *(worst("registers", self.codes), worst("stack", plain), worst("spills", plain)),
            *(worst("stack", exact), worst("spills", exact), worst("shared", self.codes)),
            " ".join(name for name in INSTRUCTIONS if name in found) or "-",
            "; ".join(self.problems) or "ok",
        )


HEADS = "kernel", "arch", "types", "registers", "stack", "spills", "f64 stack", "f64 spills", "shared", "all have"


# The build


def toolkit() -> Path | None:
    """Where CUDA's compiler lives, whatever link or wrapper calls it."""
    home = os.environ.get("CUDA_HOME")
    for nvcc in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if nvcc and os.path.exists(nvcc):
            said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
            if top := re.search(r"^#\$ TOP=(.+)$", said.stderr, re.M):
                return Path(top[1]).resolve()
    return None


def build(folder: Path, home: Path) -> tuple[Path, str]:
    """The module, built from a copy of the sources in ``folder``, and what the compilers said."""
    shutil.rmtree(folder / "csrc", ignore_errors=True)
    (folder / "milkernels").mkdir(parents=True, exist_ok=True)
    (folder / "milkernels" / "__init__.py").touch()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")  # with their times: what is unchanged is not compiled again
    wheels = Path(torch.__file__).parents[1] / "nvidia"  # headers of libraries that PyTorch includes
    headers = [os.environ.get("CPATH"), *map(str, sorted(wheels.glob("*/include")))]
    environment = os.environ | {
        "CUDA_HOME": str(home),
        "CPATH": os.pathsep.join(filter(None, headers)),
        "TORCH_CUDA_ARCH_LIST": ";".join(ARCHITECTURES.values()),
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
        "MILKERNELS_BUILD_EXT": "0",
        "MILKERNELS_BUILD_CUDA": "1",
        "MILKERNELS_BUILD_EMULATED": "0",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # The assembler says nothing of what is not compiled again.
    with (folder / "build.log").open("a") as log:
        log.write(done.stdout)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\ncuda_check: the CUDA module does not compile; the reason is above.")
    [module] = (folder / "milkernels").glob(f"_C_cuda{native.SUFFIX}.*.so")
    return module, done.stdout


# It runs in a process of its own, where no other build of the module is.
_UNREGISTERED = """
import importlib.util, json, sys, torch
name = "milkernels." + sys.argv[1].rpartition("/")[2].partition(".")[0]
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from milkernels import native
from milkernels.ops import contract
assert native.load_error("cuda") is None, native.load_error("cuda")
ops = contract.FORWARDS
names = [f"{op.name}_fwd" for op in ops] + [f"{op.name}_bwd" for op in {op.backward for op in ops}]
names += contract.PARTS
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = sorted(name for name in names if not has(f"milkernels::{name}.native", "CUDA"))
print(json.dumps([len(names), missing, module.build_info()]))
"""


def unregistered(module: Path) -> tuple[int, list[str], dict[str, str]]:
    """How many ops there are, those of which the module has no kernel, and what it says of itself."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("MILKERNELS_EMULATE_CUDA", None)
    done = subprocess.run(
        [sys.executable, "-c", _UNREGISTERED, str(module)], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\ncuda_check: the CUDA module cannot be imported; the reason is above.")
    return json.loads(done.stdout)


# What came out


def assembler_reports(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """By mangled name and architecture; the latest where there are several."""
    reports = {}
    for entry in log.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'(\S+)' for '(\w+)'", entry).groups()
        properties = entry.partition(f"properties for {name}\n")[2]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", properties)[:3])
        used = re.search(r"Used (\d+) registers(.*)", entry)
        shared = re.search(r"(\d+) bytes smem", used[2])
        reports[name, arch] = {
            "registers": int(used[1]),
            "stack": stack,
            "spills": max(stores, loads),
            "shared": int(shared[1]) if shared else 0,
        }
    return reports


def disassembler(home: Path) -> str | None:
    """cuobjdump: of the toolkit, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    candidates = (home / "bin" / "cuobjdump", shutil.which("cuobjdump"), bundled)
    return next((str(path) for path in candidates if path and Path(path).exists()), None)


def machine_code(cuobjdump: str, module: Path) -> dict[tuple[str, str], set[str]]:
    """Which of ``INSTRUCTIONS`` each kernel has, by mangled name and architecture."""
    found, here, arch = {}, set(), None
    with subprocess.Popen([cuobjdump, "-sass", str(module)], stdout=subprocess.PIPE, text=True) as dump:
        for line in dump.stdout:
            if line.startswith("arch = "):
                arch = line.split()[-1]
            elif "Function : " in line:
                here = found.setdefault((line.split()[-1], arch), set())
            elif "/*" in line:
                here.update(name for name, pattern in INSTRUCTIONS.items() if name not in here and pattern.search(line))
    if dump.returncode != 0:
        raise SystemExit(f"cuda_check: {cuobjdump} -sass fails on {module}")
    return found


def portable_code(cuobjdump: str, module: Path) -> dict[str, str]:
    """The PTX of each kernel, by mangled name."""
    dump = subprocess.run([cuobjdump, "-ptx", str(module)], capture_output=True, text=True, check=True).stdout
    return {part.partition("(")[0].strip(): part for part in re.split(r"^\s*(?:\.\w+ )*\.entry ", dump, flags=re.M)[1:]}


def demangled(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Mangled name: template and arguments."""
    names = list(names)
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    result = {}
    for mangled, name in zip(names, said.splitlines(), strict=True):
        name = re.sub(r"\((?:anonymous namespace|[\w:]+)\)(?:::|(?=\d))", "", name)  # of casts of an enum, too
        kernel, arguments = re.match(r"(?:void )?(?:\w+::)*(\w+)(?:<(.*?)>)?\(", name).groups()
        result[mangled] = kernel, arguments or ""
    return result


def examine(module: Path, cuobjdump: str, log: str) -> list[Code]:
    reports, found = assembler_reports(log), machine_code(cuobjdump, module)
    ptx, names = portable_code(cuobjdump, module), demangled({name for name, _ in found})
    codes = []
    for (mangled, arch), instructions in found.items():
        code = Code(*names[mangled], arch, found=instructions, **reports.get((mangled, arch), {}))
        text = ptx.get(mangled, "")
        if bound := re.search(r"\.maxntid (\d+)", text):
            blocks = re.search(r"\.minnctapersm (\d+)", text)
            code.threads = int(bound[1]) * (int(blocks[1]) if blocks else 1)
        codes.append(code)
    return codes


def _judge(code: Code) -> list[str]:
    """What is wrong with it."""
    problems = []
    if code.registers == 0:
        problems.append("no report of the assembler")
    most_spilled = MOST_SPILLED if code.exact else 0
    if code.spills > most_spilled:
        problems.append(f"spills {code.spills} bytes")
    if code.stack > 0 and not code.exact:
        problems.append(f"stack frame of {code.stack} bytes")
    allowed = min(REGISTERS // (code.threads or MOST_THREADS) // 8 * 8, 255)
    if code.registers > allowed:
        of = "a block of its bounds" if code.threads else f"{MOST_THREADS} threads, as it has no launch bounds,"
        problems.append(f"{code.registers} registers, where {of} has {allowed}")
    return problems + [f"no {name}" for name in WANTED.get(code.name, ()) if name not in code.found]


def rows_of(codes: list[Code]) -> list[Row]:
    rows: dict[tuple[str, str], Row] = {}
    for code in codes:
        rows.setdefault((code.name, code.arch), Row(code.name, code.arch)).codes.append(code)
    for row in rows.values():
        problems: dict[str, list[str]] = {}  # and the types that have them
        for code in row.codes:
            for problem in _judge(code):
                problems.setdefault(problem, []).append(f"<{code.types}>")
        row.problems = [f"{problem}: {' '.join(types)}" for problem, types in problems.items()]
    for arch in ARCHITECTURES:
        names = {name for name, other in rows if other == arch}
        missing = (set(WANTED) | {name for name, _ in rows}) - names
        rows |= {(name, arch): Row(name, arch, problems=["there is no such kernel"]) for name in missing}
    order = list(ARCHITECTURES)
    return sorted(rows.values(), key=lambda row: (bool(row.problems), row.kernel, order.index(row.arch)))


def table(rows: list[Row]) -> None:
    lines = [(*HEADS, "verdict"), *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    for line in lines:
        cells = (c.rjust(w) if 2 <= i < 9 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False)))
        print("  ".join((*cells, line[-1])))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_check", description=__doc__.split(":")[1])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda-check", help="where to build")
    arguments = parser.parse_args(argv)
    home, start = toolkit(), time.time()
    if home is None:
        parser.error("CUDA's compiler nvcc is neither in CUDA_HOME nor on the PATH nor in /usr/local/cuda")
    if torch.version.cuda is None:
        parser.error(f"PyTorch {torch.__version__} is not built for CUDA")
    cuobjdump = disassembler(home)
    if cuobjdump is None:
        parser.error("cuobjdump is neither in CUDA's toolkit nor on the PATH nor in Triton")
    module, said = build(arguments.build.resolve(), home)
    ops, missing, info = unregistered(module)
    left = [name for name in missing if name.startswith(LEFT_TO_TRITON)]
    ops, missing = ops - len(left), [name for name in missing if name not in left]
    codes = examine(module, cuobjdump, (arguments.build / "build.log").read_text())
    rows = rows_of(codes)
    if missing:
        rows.append(Row("(ops)", "", problems=[f"no kernel for CUDA: {', '.join(missing)}"]))
    warnings = dict.fromkeys(re.findall(r"(csrc/\S+: warning.*)", said))
    rows += [Row("(compiler)", "", problems=[warning]) for warning in warnings]
    table(rows)
    print(
        f"{len({code.name for code in codes})} kernels, {len(codes)} of all types and architectures; "
        f"{ops - len(missing)} of {ops} ops registered, {len(left)} left to Triton; "
        f"{sum(bool(row.problems) for row in rows)} failures; "
        f"{time.time() - start:.0f} s, CUDA {info['CUDA']}, PyTorch {torch.__version__}"
    )
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
