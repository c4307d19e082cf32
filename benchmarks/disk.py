"""An epoch that begins at files: bags are loaded one after the other and each takes one training step.

The features are frozen, as those of stored slides are.  Files are dropped from the page cache before each epoch where
the system allows it, so that they are read from the disk.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.largest import refused
from benchmarks.units import Unit
from milkernels.bench import contenders, gate
from milkernels.bench.contenders import Contender, Unavailable
from milkernels.bench.workload import DTYPES
from milkernels.testing import Inputs, evaluate

_EPOCHS = 5


def _numpy():
    import numpy

    return numpy


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise Unavailable(f"h5py: {error}") from error
    return h5py


# Format -> (how it is written, how it is read)
FORMATS: dict[str, tuple[Callable[[Path, Tensor], object], Callable[[Path], Tensor]]] = {
    "npz": (
        lambda path, x: _numpy().savez(path, features=x.numpy()),
        lambda path: torch.from_numpy(_numpy().load(path)["features"]),
    ),
    "h5": (
        lambda path, x: _h5py().File(path, "w").create_dataset("features", data=x.numpy()).file.close(),
        lambda path: torch.from_numpy(_h5py().File(path)["features"][:]),
    ),
    "pt": (lambda path, x: torch.save(x, path), torch.load),
    "pt, memory-mapped": (lambda path, x: torch.save(x, path), lambda path: torch.load(path, mmap=True)),
    "npy, memory-mapped": (
        lambda path, x: _numpy().save(path, x.numpy()),
        lambda path: torch.from_numpy(_numpy().load(path, mmap_mode="c")),
    ),
}


def rows(unit: Unit, mode: str) -> Iterator[dict]:
    """One row for each contender: ``seconds`` of epochs, ``load`` seconds of one without any step, ``file_bytes``.

    The files hold the type of the unit.  Parameters are float32; eager takes ``x.float()``, as people write it.
    """
    inputs = unit.workload.inputs(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        try:
            paths = _written(mode, inputs, DTYPES[unit.dtype], Path(folder))
        except Exception as error:
            yield from ({"contender": name, **refused(error)} for name in unit.contenders)
            return
        yield from _epochs(unit, mode, inputs, paths)


def _written(mode: str, inputs: Inputs, dtype: torch.dtype, folder: Path) -> list[Path]:
    save, _ = FORMATS[mode]
    suffix = mode.partition(",")[0]
    paths = [folder / f"{i}.{suffix}" for i in range(len(inputs.lengths))]
    for path, (start, end) in zip(paths, inputs.bounds(), strict=True):
        save(path, inputs.x[start:end].detach().to(dtype, copy=True))
    return paths


def _epochs(unit: Unit, mode: str, inputs: Inputs, paths: list[Path]) -> Iterator[dict]:
    """The contenders take turns, and so does loading alone."""
    case, load = unit.workload.case, FORMATS[mode][1]
    first = replace(case.prefix(inputs, inputs.lengths[0]), offsets=None)
    wrong = _wrong(unit)

    def step(contender: Contender, x: Tensor) -> None:
        one = replace(first, x=x if contender.ours else x.float(), lengths=(len(x),))
        compute, one = contender.prepare(case, one, False)
        evaluate(compute, one, "frozen", case.primary)

    def touch(x: Tensor) -> None:
        x.view(-1)[:: max(1, 4096 // x.element_size())].sum()  # every page, for what is mapped is not read yet

    takers = {"load": touch}
    for name in unit.contenders:
        takers[name] = lambda x, contender=contenders.REGISTRY[name]: step(contender, x)
    seconds: dict[str, list[float]] = {name: [] for name in takers}
    broken: dict[str, dict] = {}
    for epoch in range(_EPOCHS + 1):  # the first one warms up
        for name, take in takers.items():
            if name in broken:
                continue
            try:
                taken = _epoch(paths, load, take)
            except Exception as error:
                broken[name] = refused(error)
                continue
            if epoch:
                seconds[name].append(taken)
    size = sum(path.stat().st_size for path in paths)
    for name in unit.contenders:
        if "load" in broken or name in broken or name in wrong:
            yield {"contender": name, **(broken.get("load") or broken.get(name) or wrong[name])}
            continue
        times, loading = seconds[name], statistics.median(seconds["load"])
        yield {"contender": name, "status": "ok", "seconds": times, "median": statistics.median(times)} | {
            "load": loading,
            "file_bytes": size,
            "instances": len(inputs.x),
            "bags": len(paths),
        }


def _wrong(unit: Unit) -> dict[str, dict]:
    """Those of ours whose step on the first bag the gate refuses, all numbers in the type of the files.

    Products run in the type of ``x``, so float32 parameters beside half features are held to what half eager reaches.
    """
    case, found, inputs = unit.workload.case, {}, unit.workload.inputs(DTYPES[unit.dtype])
    first = replace(case.prefix(inputs, inputs.lengths[0]), offsets=None)
    seconds = gate.guess_seconds(contenders.REGISTRY["eager"], case, first, "frozen")
    baseline = gate.yardstick(case, first, "frozen", seconds, contenders.available_memory() // 2)
    for name in unit.contenders:
        contender = contenders.REGISTRY[name]
        if contender.ours:
            compute, _ = contender.prepare(case, first, False)
            promise = gate.judge(case, baseline, compute, first, "frozen", seconds)
            if not promise.ok:
                found[name] = {"status": "FAIL", "reason": promise.broken()}
    return found


def _epoch(paths: list[Path], load: Callable[[Path], Tensor], take: Callable[[Tensor], None]) -> float:
    for path in paths:
        _forget(path)
    start = time.perf_counter()
    for path in paths:
        take(load(path))
    return time.perf_counter() - start


def _forget(path: Path) -> None:
    """Out of the page cache, where the system can be asked to."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
