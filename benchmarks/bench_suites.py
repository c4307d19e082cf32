"""Ops and bags under pytest-benchmark: ``pytest benchmarks``, for comparisons between commits on one machine
(``--benchmark-autosave``, then ``--benchmark-compare``).

`python -m milkernels bench` is the one to quote: it interleaves, checks results and knows the machine's limits.
The whole suite takes minutes; ``-k small`` leaves large bags out, ``-k "slides and native"`` chooses.
"""

import pytest
import torch

from benchmarks import cpu_grid
from milkernels.bench.contenders import REGISTRY, Unavailable, default_backends
from milkernels.testing import CASES, Shape, evaluate, small_lengths

GATED = cpu_grid.GATED
# Eager half types take half a minute per step on machines without matrix units: small shape only.
OPS = {"small": (small_lengths(64), (torch.float32, torch.bfloat16)), "default": ((100_000,), (torch.float32,))}
BATCHES = {"small": small_lengths(), "classical": cpu_grid.CLASSICAL, "slides": cpu_grid.SLIDES_10K}
BATCHES |= {f"{n} in one": (n,) for n in (1_000, 10_000, 100_000)}


def _ops():
    for op, case in CASES.items():
        for shape, (_, dtypes) in OPS.items():
            for dtype in dtypes:
                for mode in case.modes():
                    name = str(dtype).removeprefix("torch.")
                    for contender in ("eager", "ours"):
                        parameters = (op, shape, dtype, mode, contender)
                        yield pytest.param(*parameters, id=f"{op}-{shape}-{name}-{mode}-{contender}")


def run(benchmark, group, name, op, lengths, mode, dtype=torch.float32):
    case = CASES[op]
    inputs = case.inputs(Shape(lengths, 512, case.default_hidden, case.default_heads), dtype)
    contender = REGISTRY[name or default_backends(case, inputs)[0]]
    try:
        with contender.within():
            compute, its_inputs = contender.prepare(case, inputs, True)
    except Unavailable as why:
        pytest.skip(str(why))
    benchmark.group = f"{group} {mode}"
    benchmark.extra_info["contender"] = contender.label(case, inputs)
    benchmark.pedantic(evaluate, (compute, its_inputs, mode, case.primary), rounds=5, warmup_rounds=1, iterations=1)


@pytest.mark.parametrize(("op", "shape", "dtype", "mode", "contender"), tuple(_ops()))
def bench_op(benchmark, op, shape, dtype, mode, contender):
    run(benchmark, f"{op} {shape} {dtype}", "eager" * (contender == "eager"), op, OPS[shape][0], mode, dtype)


@pytest.mark.parametrize("mode", ["fwd", "step"])
@pytest.mark.parametrize(
    "name", ["eager", "padded", "torchmil", "pyg", "segment-reduce", "jagged", "accumulate", "native"]
)
@pytest.mark.parametrize("batch", BATCHES)
def bench_bags(benchmark, batch, name, mode):
    run(benchmark, batch, name, GATED, BATCHES[batch], mode)
