"""Compiling is most of the time of the tests on a GPU, and each kernel keeps one core busy: before the first of them
as many processes as there are processors compile what all of them will launch."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from legs import on
from op_cases import CASES, offsets_of, step
from test_numbers import GPU_SHORT, ODD, RAGGED, some_mask

_MOST_COMPILERS, _WORTH_IT = 14, 4  # processes; jobs


def _jobs(items):
    """(kernel, case, type, type of parameters, lengths, one bag, masked) of the tests that were chosen; a kernel in few
    hands."""
    jobs = set()
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        leg, case, test = params.get("leg"), params.get("case"), item.function.__name__
        known = CASES if leg is None else leg.cases
        name = next((n for n, c in known.items() if c is case), None)
        if name is None or (leg is not None and leg.name != "gpu_triton"):
            continue
        types, shapes, masked = ("float32", None), [(RAGGED, False)], True  # of most tests
        if test == "test_oracle":
            types, shapes = ("float64", None), [(s.lengths, s.index is None) for s in params["shapes"]]
            masked = params["shapes"][0].mask is not None
        elif test == "test_error_promise":
            types = tuple(params[key] for key in ("dtype", "parameter_dtype"))
            types = tuple(None if t is None else str(t).removeprefix("torch.") for t in types)
            shapes, masked = [(GPU_SHORT, False)], False
        elif test == "test_hardly_anything":
            types, masked = ("float64", None), False
            shapes = [(these, False) for these in params["lengths"] if these]
        jobs |= {(case.kernel, name, *types, *shape, masked) for shape in shapes}
    return sorted(jobs, key=str)


def compile_in_parallel(items, seconds: float) -> None:
    """Fills Triton's cache on disk; what fails there fails again in its test, and is told there."""
    jobs, count = _jobs(items), min(_MOST_COMPILERS, (os.cpu_count() or 1) - 1)
    if len(jobs) < _WORTH_IT or count < 2:
        return
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import gpu_compile; gpu_compile.compile_jobs()"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "text": True, "env": environment}
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, **quiet) for _ in range(count)]
    for i, process in enumerate(processes):
        process.stdin.write(json.dumps(jobs[i * len(jobs) // count : (i + 1) * len(jobs) // count]))
        process.stdin.close()
    end = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
        process.wait()


def python_path() -> str:
    here = Path(__file__).parent
    return os.pathsep.join([str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def compile_jobs() -> None:
    for _, *job in json.load(sys.stdin):
        with contextlib.suppress(Exception):
            compile_job(*job)


def compile_job(name, dtype, parameter_dtype, lengths, one_bag, masked, device="cuda") -> None:
    dtype, parameter_dtype = (None if t is None else getattr(torch, t) for t in (dtype, parameter_dtype))
    tensors = CASES[name].make(lengths, dtype, 0, parameter_dtype, relu=not masked, **ODD)
    mask = some_mask(sum(lengths)) if masked else None
    step(on(device, CASES[name]).ours("triton"), tensors, None if one_bag else offsets_of(lengths), mask)
