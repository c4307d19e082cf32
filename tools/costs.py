"""``python -m tools.costs``: what every op costs, in counts that no noise can move, beside their record.

Matrix products that the CPU kernels ask the library for, bytes by PyTorch's allocator, launches of the Triton ops on
the device of `standin`, which is not there.  Nothing is saved for the backward but what is named so; of launches there
is besides a step with everything saved.  ``--write`` writes the record, ``tests/costs.json``, which tests hold all ops
to.
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from milkernels import native, triton
from milkernels.bench.memory import allocator_peak
from milkernels.testing import CASES, Inputs, OpCase, Shape, evaluate

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "costs.json"
# What is counted, and the package beside PyTorch whose version the count follows.
KINDS = {
    "products": "",  # of matrices, that the CPU kernels ask the library for
    "bytes": "",  # most that PyTorch's allocator held at once, outputs and gradients included
    "launches": "triton",  # of a Triton op: its kernels, and what PyTorch launches for it
    "gpu products": "triton",  # the matrix products among them
}
_ON_GPU = tuple(kind for kind, package in KINDS.items() if package)
MODES = {"fwd": tuple(KINDS), "step": tuple(KINDS), "saved step": _ON_GPU}  # and what is counted of them
TIGHT = 0.9  # a count under this share of its record is refused too: a record must not be left behind
Counts = dict[str, dict[str, dict[str, float]]]  # by op, mode and kind

# Chunks of 256 rows, the last one cut; bags that end inside a tile, with a tile, and with no row at all.
_LENGTHS, _WIDTH = (700, 0, 1, 323, 64, 911, 290), 128
_SHARES, _LARGE, _LARGE_WIDTH = (3, 0, 1, 4), 20_000, 256  # of the bytes
_HIDDEN = 64
_PRODUCT = re.compile(r"(b?add)?b?(mm|mv)_?$")
# The CPU kernels call this function of PyTorch's library themselves; loaded before it, ours counts and goes on to it.
_SYMBOL = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
_SHIM = f"""
#include <dlfcn.h>
using F = void(long, long, long, long, long, long, bool, const float*, const float*, float*, bool);
extern "C" {{
long milkernels_products = 0;
void {_SYMBOL}(long m, long n, long k, long lda, long ldb, long ldc, bool add,
               const float* a, const float* b, float* c, bool vnni) {{
  static F* library = reinterpret_cast<F*>(dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), "{_SYMBOL}"));
  ++milkernels_products;
  library(m, n, k, lda, ldb, ldc, add, a, b, c, vnni);
}}
}}
"""


# In a child


def _inputs(case: OpCase, lengths: Iterable[int], width: int) -> Inputs:
    return case.inputs(Shape(tuple(lengths), width, _HIDDEN, case.default_heads))


def _call(case: OpCase, inputs: Inputs, mode: str) -> dict[str, torch.Tensor]:
    return evaluate(lambda i: case.call(i, "native"), inputs, mode, case.primary)


def _products_of(case: OpCase, mode: str) -> dict[str, int]:
    from torch.profiler import ProfilerActivity, profile

    counter = ctypes.c_long.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "milkernels_products")
    inputs, before = _inputs(case, _LENGTHS, _WIDTH), counter.value
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _call(case, inputs, mode)
    called = sum(bool(_PRODUCT.match(event.name.removeprefix("aten::"))) for event in profiler.events())
    return {"products": counter.value - before + called}


def _bytes_of(case: OpCase, mode: str) -> dict[str, float]:
    """``bytes``, and ``growth``: bytes for each further instance beyond outputs and gradients."""
    peaks, rest = [], []
    for rows in (_LARGE, 4 * _LARGE):
        inputs = _inputs(case, (rows * share // sum(_SHARES) for share in _SHARES), _LARGE_WIDTH)
        call = functools.partial(_call, case, inputs, mode)
        kept = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in call().values())}
        peaks.append(allocator_peak(call))
        rest.append(peaks[-1] - sum(kept.values()))
    return {"bytes": peaks[0], "growth": (rest[1] - rest[0]) / (3 * _LARGE)}


def _launches_of(case: OpCase, mode: str) -> dict[str, int]:
    from tools.standin import launches

    extras = {
        "bags": case.takes_offsets,
        "shared": "query" in case.tensors and "query" not in case.with_first("B"),
        "embed": bool(case.embeds),
        "gated": "u_weight" in case.tensors,
        "mlp": "q2_weight" in case.tensors,
        "value": case.op.startswith("dsmil") and "v_weight" in case.tensors,
        case.options.get("v_activation") or "": True,
        "grads": case.compose is not None,  # a step through all that it returns
        "kept": mode == "saved step",
    }
    given = " ".join(name for name, wanted in extras.items() if wanted)
    records = launches(case.op.removeprefix("gated_"), given, N=39_999, K=case.default_heads)[: 1 + (mode != "fwd")]
    library = sum((record.library for record in records), Counter())
    products = sum(count for name, count in library.items() if _PRODUCT.match(name))
    return {"launches": sum(record.total for record in records), "gpu products": products}


_COUNTED: dict[str, Callable[[OpCase, str], dict]] = {
    "products": _products_of,
    "bytes": _bytes_of,
    "launches": _launches_of,
}


def _counts_of(what: str, op: str) -> dict[str, dict]:
    return {mode: _COUNTED[what](CASES[op], mode) for mode, kinds in MODES.items() if what in kinds}


# Measurements


def unavailable() -> str | None:
    """Why products cannot be counted here, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux":
        return "what counts them is for Linux on x86-64"
    if shutil.which("c++") is None:
        return "there is no C++ compiler"
    if not native.is_built("avx2"):
        return "the record is of the kernels for AVX2, which are not built: MILKERNELS_CPU=all builds them"
    return native.load_error()


def measure(what: str, ops: Iterable[str] = tuple(CASES)) -> Counts:
    """Counts in a process of its own, in which nothing but the arguments decides what is counted."""
    dropped = {"TRITON_INTERPRET", "MILKERNELS_EMULATE_CUDA", "MILKERNELS_BACKEND"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MILKERNELS_SAVED_BYTES": "0"}
    if native.is_built("avx2"):
        environment["ATEN_CPU_CAPABILITY"] = "avx2"
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        if what == "products":
            source, shim = Path(folder) / "shim.cpp", Path(folder) / "shim.so"
            source.write_text(_SHIM)
            subprocess.run(["c++", "-shared", "-fPIC", "-O1", str(source), "-o", str(shim), "-ldl"], check=True)
            environment["LD_PRELOAD"] = str(shim)
        command = [sys.executable, "-m", "tools.costs", "--child", what, str(answer)]
        command += [argument for op in ops for argument in ("--op", op)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{what}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(answer.read_text())


def may_grow(case: OpCase) -> float:
    """Bytes for each instance beyond outputs and gradients: scores and one more number for each head, and its share
    of the partial sums, one vector and its indices for 256 instances."""
    return case.default_heads * (4 + 4 + (4 + 8) * _LARGE_WIDTH / 256)


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__.partition("+")[0]}
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = importlib.import_module("triton").__version__
    return found


# The record


def judge(kind: str, measured: float, recorded: float | None, same: bool) -> str | None:
    """What is wrong with a count, or None; ``same``: the versions that matter to it are those of the record."""
    again = "python -m tools.costs --write"
    if recorded is None:
        return f"{measured:,} {kind}, and none recorded: run {again}"
    if measured > recorded:
        return f"{measured:,} {kind}, where {recorded:,} are recorded"
    if same and measured < TIGHT * recorded:
        return f"{measured:,} {kind}, better than the {recorded:,} recorded: run {again}"
    return None


def complaints(op: str, measured: dict, found: dict[str, str], record: dict) -> list[str]:
    """What `judge` says of one op's counts by mode and kind."""
    told = []
    for mode, counts in measured.items():
        recorded = record["counts"].get(op, {}).get(mode, {})
        for kind in KINDS.keys() & counts.keys():
            packages = filter(None, ("torch", KINDS[kind]))
            same = all(found.get(name) == record["versions"].get(name) for name in packages)
            if (problem := judge(kind, counts[kind], recorded.get(kind), same)) is not None:
                told.append(f"{op} {mode}: {problem}")
    return sorted(told)


def write(counts: Counts, path: Path = RECORD) -> None:
    """Replaces the record, with one line for each op and mode."""
    lines = []
    for op, modes in counts.items():
        counted = {mode: json.dumps({k: modes[mode][k] for k in kinds}) for mode, kinds in MODES.items()}
        shown = ",\n".join(f'   "{mode}": {numbers}' for mode, numbers in counted.items())
        lines.append(f'  "{op}": {{\n{shown}\n  }}')
    body = ",\n".join(lines)
    path.write_text(f'{{\n "versions": {json.dumps(versions())},\n "counts": {{\n{body}\n }}\n}}\n')


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.costs", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=list(CASES))
    parser.add_argument("--write", action="store_true", help="record what is measured, of all ops")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "ANSWER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    ops = arguments.op or list(CASES)
    if arguments.child:
        what, answer = arguments.child
        torch.set_num_threads(1)
        Path(answer).write_text(json.dumps({op: _counts_of(what, op) for op in ops}))
        return 0
    if (reason := unavailable() or triton.load_error()) is not None:
        print(f"cannot count: {reason}", file=sys.stderr)
        return 2
    if arguments.write and arguments.op:
        parser.error("a record is of all ops: --write goes without --op")
    parts = [measure(what, ops) for what in _COUNTED]
    counts = {op: {m: {k: n for p in parts for k, n in p[op].get(m, {}).items()} for m in MODES} for op in ops}
    if arguments.write:
        write(counts)
    record = json.loads(RECORD.read_text())
    for op in ops:
        for mode, kinds in MODES.items():
            shown = ", ".join(f"{counts[op][mode][kind]:,} {kind}" for kind in kinds)
            print(f"{op} {mode}: {shown}")
    told = [line for op in ops for line in complaints(op, counts[op], versions(), record)]
    print(*told, sep="\n", end="\n" if told else "")
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main())
