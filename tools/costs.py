"""``python -m milkernels.bench.cost``: what every op costs, in counts that no noise can move, beside their record.

Instructions and matrix products of the CPU kernels are counted by Valgrind's Callgrind, in one process for all ops;
bytes by PyTorch's allocator; launches of the Triton ops on the device of `standin`, which is not there. ``--write``
writes the record, ``tests/costs.json``, which tests hold every op to.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from milkernels import native, triton
from milkernels.bench.memory import allocator_peak
from milkernels.testing import CASES, Inputs, OpCase, Shape, evaluate

_PACKAGES = Path(__file__).resolve().parents[2]  # what must be importable in a child
RECORD = _PACKAGES / "tests" / "costs.json"
MODES = ("fwd", "step")
Counts = dict[str, dict[str, dict[str, int]]]  # by op, mode and kind

# Chunks of 256 rows, the last one cut; bags that end inside a tile, with a tile, and with no row at all.
_LENGTHS, _WIDTH = (700, 0, 1, 323, 64, 911, 290), 128
_SHARES, _LARGE, _LARGE_WIDTH = (3, 0, 1, 4), 20_000, 256  # of the bytes
_HIDDEN = 64
_SECONDS = 600  # of a child


@dataclass(frozen=True)
class Kind:
    """A count may be ``most`` times its record, or ``elsewhere`` times where one of ``versions`` is not the record's.

    Where they are the record's, a count under ``TIGHT`` of it is refused too: a record must not be left behind.
    """

    most: float = 1.0
    elsewhere: float = 1.0
    versions: tuple[str, ...] = ("torch",)


TIGHT = 0.9
KINDS = {
    # Instructions of this package's compiled code: the same to the last one from run to run; the margin is for another
    # compiler.
    "instructions": Kind(1.02, 1.3, ("compiler", "torch")),
    # Instructions of PyTorch and what it is linked to: they differ by up to 0.1 % with the environment and the ops that
    # were called before.
    "library": Kind(1.05, 1.5, ("torch", "valgrind")),
    "products": Kind(),  # of matrices, that the CPU kernels ask a library for
    "bytes": Kind(),  # most that PyTorch's allocator held at once, outputs and gradients included
    "launches": Kind(versions=("torch", "triton")),  # of a Triton op: its kernels, and what PyTorch launches for it
    "gpu products": Kind(versions=("torch", "triton")),  # the matrix products among them
}
OF_INSTRUCTIONS = ("instructions", "library", "products")
_OF_LAUNCHES = ("launches", "gpu products")
_PRODUCT = re.compile(r"(at::native::cpublas::brgemm|at::_ops::(b?add)?b?(mm|mv)_?(_out)?::call|at::_ops::dot::call)\(")
_GPU_PRODUCT = re.compile(r"(b?add)?b?(mm|mv)_?$")
_LIBRARY = re.compile(r"lib(torch_cpu|mkl|dnnl|gomp|openblas)|^\?\?\?$")  # no name: compiled at run time


# What Callgrind writes

_NAME = re.compile(r"(c?)(ob|fn|fl|fi|fe)=\((\d+)\)(?: (.*))?$")


def parse(text: str) -> tuple[Counter, Counter]:
    """Instructions by object file, its own alone, and calls by the function called, of one dump."""
    names: dict[tuple[str, str], str] = {}
    instructions, calls = Counter(), Counter()
    here = called = ""
    inclusive = False  # the next line is what a call cost with all below it
    for line in text.splitlines():
        if found := _NAME.match(line):
            callee, what, number, name = found.groups()
            key = ("file" if what[0] == "f" and what != "fn" else what, number)
            if name is not None:  # said once, later by number
                names[key] = name
            if what == "ob" and not callee:
                here = names[key]
            elif what == "fn" and callee:
                called = names[key]
        elif line.startswith("calls="):
            calls[called] += int(line[6:].split()[0])
            inclusive = True
        elif line[:1] and line[0] in "0123456789+-*":
            _, *cost = line.split()
            instructions[here] += 0 if inclusive or not cost else int(cost[0])
            inclusive = False
    return instructions, calls


def _counted(text: str) -> dict[str, int]:
    """The kinds of `OF_INSTRUCTIONS` in one dump."""
    instructions, calls = parse(text)
    by_file = [(Path(path).name, count) for path, count in instructions.items()]
    return {
        "instructions": sum(count for name, count in by_file if name.startswith("_C_")),
        "library": sum(count for name, count in by_file if _LIBRARY.match(name)),
        "products": sum(count for name, count in calls.items() if _PRODUCT.match(name)),
    }


# In a child


def _inputs(case: OpCase, lengths: Iterable[int], width: int) -> Inputs:
    return case.inputs(Shape(tuple(lengths), width, _HIDDEN, case.default_heads))


def _call(case: OpCase, inputs: Inputs, mode: str) -> dict[str, torch.Tensor]:
    return evaluate(lambda i: case.call(i, "native"), inputs, mode, case.primary)


def _start_counting() -> None:
    """Valgrind listens while the program runs, so the wait for its answer must not sleep."""
    with subprocess.Popen(["callgrind_control", "--instr=on", str(os.getpid())], stdout=subprocess.DEVNULL) as control:
        while control.poll() is None:
            pass
    if control.returncode:
        raise RuntimeError("callgrind_control could not start the instrumentation")


def _child_instructions(ops: list[str]) -> dict:
    """Each op and mode leaves a dump, in this order."""
    inputs = {op: _inputs(CASES[op], _LENGTHS, _WIDTH) for op in ops}
    for op in ops:
        _call(CASES[op], inputs[op], "step")  # what is linked and kept at the first call
        _call(CASES[op], inputs[op], "fwd")
    gc.collect()
    gc.disable()
    _start_counting()
    for op in ops:
        for mode in MODES:
            torch._C._valgrind_toggle()
            _call(CASES[op], inputs[op], mode)
            torch._C._valgrind_toggle_and_dump_stats()
    return native.build_info()


def _child_bytes(ops: list[str]) -> dict:
    """``bytes``, and ``growth``: bytes for each further instance beyond outputs and gradients."""
    return {op: {mode: _bytes_of(CASES[op], mode) for mode in MODES} for op in ops}


def _bytes_of(case: OpCase, mode: str) -> dict[str, float]:
    peaks, rest = [], []
    for rows in (_LARGE, 4 * _LARGE):
        inputs = _inputs(case, (rows * share // sum(_SHARES) for share in _SHARES), _LARGE_WIDTH)
        call = functools.partial(_call, case, inputs, mode)
        kept = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in call().values())}
        peaks.append(allocator_peak(call))
        rest.append(peaks[-1] - sum(kept.values()))
    return {"bytes": peaks[0], "growth": (rest[1] - rest[0]) / (3 * _LARGE)}


def may_grow(case: OpCase) -> float:
    """Bytes for each instance beyond outputs and gradients: scores and one more number for each head, and its share
    of the partial sums, one vector and its indices for 256 instances."""
    return case.default_heads * (4 + 4 + (4 + 8) * _LARGE_WIDTH / 256)


def _child_launches(ops: list[str]) -> dict:
    return {op: _launches_of(CASES[op]) for op in ops}


def _launches_of(case: OpCase) -> dict[str, dict[str, int]]:
    from milkernels.testing.standin import launches

    extras = {
        "bags": case.takes_offsets,
        "shared": "query" in case.tensors and "query" not in case.with_first("B"),
        "embed": bool(case.embeds),
        "gated": "u_weight" in case.tensors,
        "mlp": "q2_weight" in case.tensors,
        "value": case.op.startswith("dsmil") and "v_weight" in case.tensors,
        case.options.get("v_activation") or "": True,
        "grads": case.compose is not None,  # a step through all that it returns
    }
    given = " ".join(name for name, wanted in extras.items() if wanted)
    forward, backward = launches(case.op.removeprefix("gated_"), given, N=39_999, K=case.default_heads)

    def counted(*records) -> dict[str, int]:
        library = sum((record.library for record in records), Counter())
        products = sum(count for name, count in library.items() if _GPU_PRODUCT.match(name))
        return dict(zip(_OF_LAUNCHES, (sum(record.total for record in records), products), strict=True))

    return {"fwd": counted(forward), "step": counted(forward, backward)}


# Measurements


def unavailable() -> str | None:
    """Why instructions cannot be counted here, or None."""
    for command in ("valgrind", "callgrind_control"):
        if shutil.which(command) is None:
            return f"there is no {command}"
    if not getattr(torch._C, "_valgrind_supported_platform", bool)():
        return "this PyTorch is built without Valgrind's headers"
    if _x86() and not native.is_built("avx2"):
        return "kernels for AVX2, which Valgrind can run, are not built: MILKERNELS_CPU=all builds them"
    return native.load_error()


def _x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _run_child(what: str, ops: list[str], folder: str, under: Iterable[str] = (), **settings: str) -> dict:
    """The answer of a child in which nothing but the arguments decides what is counted."""
    answer = Path(folder) / f"{what}.json"
    dropped = {"TRITON_INTERPRET", "MILKERNELS_EMULATE_CUDA", "MILKERNELS_BACKEND"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": os.pathsep.join([str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    if _x86() and native.is_built("avx2"):  # what Valgrind can run, for bytes too: a record is of one
        environment["ATEN_CPU_CAPABILITY"] = "avx2"
    environment |= settings
    command = [*under, sys.executable, "-m", __spec__.name, "--child", what, str(answer)]
    command += [argument for op in ops for argument in ("--op", op)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{what}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(answer.read_text())


def instructions(ops: Iterable[str] = tuple(CASES)) -> tuple[Counts, dict[str, str]]:
    """The kinds of `OF_INSTRUCTIONS`, and the versions of what was counted."""
    ops = list(ops)
    # Valgrind is no faster than this at fused multiply-adds, of which the products are made: let libraries have none.
    settings = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    with tempfile.TemporaryDirectory() as folder:
        dumps = f"{folder}/dump"
        options = [f"--callgrind-out-file={dumps}", "--instr-atstart=no", "--collect-atstart=no"]
        under = ["valgrind", "--tool=callgrind", *options]
        built = _run_child("instructions", ops, folder, under, **settings, MALLOC_ARENA_MAX="1")
        calls = [(op, mode) for op in ops for mode in MODES]
        counts: Counts = {op: {} for op in ops}
        for number, (op, mode) in enumerate(calls, 1):
            counts[op][mode] = _counted(Path(f"{dumps}.{number}").read_text())
    asked = subprocess.run(["valgrind", "--version"], capture_output=True, text=True)
    return counts, versions() | {
        "module": built["module"].rpartition(".")[2].removesuffix(native.SUFFIX),
        "compiler": built["compiler"],
        "valgrind": asked.stdout.strip().removeprefix("valgrind-"),
    }


def allocations(ops: Iterable[str] = tuple(CASES)) -> dict:
    """``bytes`` and ``growth``; the same whatever the instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        return _run_child("bytes", list(ops), folder)


def launches_of_triton(ops: Iterable[str] = tuple(CASES)) -> Counts:
    with tempfile.TemporaryDirectory() as folder:
        return _run_child("launches", list(ops), folder)


def versions() -> dict[str, str]:
    """Those that can be had without a measurement."""
    found = {"torch": torch.__version__.partition("+")[0]}
    with contextlib.suppress(ImportError):
        import triton as compiler

        found["triton"] = compiler.__version__
    return found


# The record


def judge(kind: str, measured: int, recorded: int | None, same: bool) -> str | None:
    """What is wrong with a count, or None; ``same``: all versions that matter to it are those of the record."""
    again = "python -m milkernels.bench.cost --write"
    if recorded is None:
        return f"{measured:,} {kind}, and none recorded: run {again}"
    most = KINDS[kind].most if same else KINDS[kind].elsewhere
    if measured > most * recorded:
        share = f", {measured / recorded:.3f} times" if recorded else ""
        bound = f" (at most {most} times)" if most > 1 else ""
        return f"{measured:,} {kind}{share}, where {recorded:,} are recorded{bound}"
    if same and measured < TIGHT * recorded:
        return f"{measured:,} {kind}, better than the {recorded:,} recorded: run {again}"
    return None


def same_versions(kind: str, found: dict[str, str], record: dict) -> bool:
    return all(found.get(name) == record["versions"].get(name) for name in KINDS[kind].versions)


def complaints(op: str, measured: dict, found: dict[str, str], record: dict) -> list[str]:
    """What `judge` says of one op's counts by mode and kind."""
    told = []
    for mode, counts in measured.items():
        recorded = record["counts"].get(op, {}).get(mode, {})
        for kind in KINDS.keys() & counts.keys():
            problem = judge(kind, counts[kind], recorded.get(kind), same_versions(kind, found, record))
            if problem is not None:
                told.append(f"{op} {mode}: {problem}")
    return sorted(told)


def merged(*parts: Counts) -> Counts:
    """All kinds of all parts; what is no kind is left out."""
    return {
        op: {mode: {k: part[op][mode][k] for part in parts for k in KINDS if k in part[op][mode]} for mode in MODES}
        for op in parts[0]
    }


def write(counts: Counts, found: dict[str, str]) -> None:
    """Replaces the figures of these ops; what was recorded with other versions would be compared wrongly."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"versions": found, "counts": {}}
    kept = record["counts"] if record["versions"] == found else {}
    if kept.keys() - counts.keys() != record["counts"].keys() - counts.keys():
        raise SystemExit("the record is of other versions: write it for all ops")
    known = kept | counts
    text = json.dumps({"versions": found, "counts": {op: known[op] for op in CASES if op in known}}, indent=1)
    # One line for each op and mode.
    flat = re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text)
    RECORD.write_text(flat + "\n")


def _table(counts: Counts, record: dict, found: dict[str, str]):
    from rich.table import Table

    made_with = ", ".join(f"{name} {version}" for name, version in found.items())
    table = Table(title=f"counts of a call, and their record where it is another; {made_with}")
    for column in ("op", "mode", *KINDS):
        table.add_column(column, justify="left" if column in ("op", "mode") else "right")
    for op, modes in counts.items():
        for mode, kinds in modes.items():
            recorded = record["counts"].get(op, {}).get(mode, {})
            cells = []
            for kind in KINDS:
                ours, theirs = kinds.get(kind), recorded.get(kind)
                cell = "-" if ours is None else f"{ours:,}"
                if ours is not None and theirs is not None and ours != theirs:
                    cell += f"\n({theirs:,})"
                    if judge(kind, ours, theirs, same_versions(kind, found, record)):
                        cell = f"[red]{cell}[/red]"
                cells.append(cell)
            table.add_row(op, mode, *cells)
    return table


_CHILDREN = {"instructions": _child_instructions, "bytes": _child_bytes, "launches": _child_launches}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m milkernels.bench.cost", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=list(CASES))
    parser.add_argument("--write", action="store_true", help="record what is measured")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "ANSWER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    ops = arguments.op or list(CASES)
    if arguments.child:
        what, answer = arguments.child
        torch.set_num_threads(1)
        Path(answer).write_text(json.dumps(_CHILDREN[what](ops)))
        return 0
    reason = unavailable() or triton.load_error()
    if reason is not None:
        print(f"cannot count: {reason}", file=sys.stderr)
        return 2
    from rich.console import Console

    counts, found = instructions(ops)
    counts = merged(counts, allocations(ops), launches_of_triton(ops))
    if arguments.write:
        write(counts, found)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"versions": {}, "counts": {}}
    Console(width=120).print(_table(counts, record, found))
    told = [line for op in ops for line in complaints(op, counts[op], found, record)]
    print(*told, sep="\n", end="\n" if told else "")
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main())
