"""Every op of the registry under pytest-benchmark: ``pytest benchmarks``.

For comparisons within one suite run, such as a change against the commit before it (``--benchmark-compare``).
``python -m milkernels bench`` is the one to quote: it interleaves, checks results and knows the machine's limits.
The default shape takes minutes for all ops; ``-k small`` leaves it out.
"""

import pytest
import torch

from milkernels.bench import contenders
from milkernels.testing import CASES, Shape, evaluate, small_lengths

LENGTHS = {"small": small_lengths(64), "default": (100_000,)}
# Eager half types take half a minute per step on machines without matrix units: small shape only.
DTYPES = {"small": (torch.float32, torch.bfloat16), "default": (torch.float32,)}


def _parameters():
    for op, case in CASES.items():
        for shape, dtypes in DTYPES.items():
            for dtype in dtypes:
                for mode in case.modes():
                    for contender in ("eager", "ours"):
                        name = str(dtype).removeprefix("torch.")
                        yield pytest.param(
                            op, shape, dtype, mode, contender, id=f"{op}-{shape}-{name}-{mode}-{contender}"
                        )


@pytest.mark.parametrize(("op", "shape", "dtype", "mode", "contender"), tuple(_parameters()))
def bench_op(benchmark, op, shape, dtype, mode, contender):
    case = CASES[op]
    inputs = case.inputs(Shape(LENGTHS[shape], 512, case.default_hidden, case.default_heads), dtype)
    name = contender if contender == "eager" else contenders.default_backends(case, inputs)[0]
    compute, its_inputs = contenders.REGISTRY[name].prepare(case, inputs, True)
    benchmark.group = f"{op} {shape} {str(dtype).removeprefix('torch.')} {mode}"
    benchmark.extra_info["contender"] = name
    benchmark.pedantic(evaluate, (compute, its_inputs, mode, case.primary), rounds=5, warmup_rounds=1, iterations=1)
