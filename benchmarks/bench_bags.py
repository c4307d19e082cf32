"""Gated attention over batches of bags, and over ever larger bags, under pytest-benchmark: ``pytest benchmarks``.

Every contender that serves the batch is there; ``-k "slides and native"`` chooses.  As in ``bench_ops.py``, times are
for comparisons between commits on one machine (``--benchmark-autosave``, then ``--benchmark-compare``).
"""

import pytest
import torch

from milkernels.bench import cpu_grid
from milkernels.bench.contenders import REGISTRY, Unavailable
from milkernels.testing import CASES, Shape, evaluate, small_lengths

CASE = CASES[cpu_grid.GATED]
BATCHES = {"small": small_lengths(), "classical": cpu_grid.CLASSICAL, "slides": cpu_grid.SLIDES_10K}
SIZES = (1_000, 10_000, 100_000)


def run(benchmark, group, name, lengths, mode):
    inputs = CASE.inputs(Shape(lengths, cpu_grid.DIM, cpu_grid.HIDDEN), torch.float32)
    try:
        with REGISTRY[name].within():
            compute, its_inputs = REGISTRY[name].prepare(CASE, inputs, True)
    except Unavailable as why:
        pytest.skip(str(why))
    benchmark.group = f"{group} {mode}"
    benchmark.extra_info["contender"] = REGISTRY[name].label(CASE, inputs)
    benchmark.extra_info["instances"] = sum(lengths)
    benchmark.pedantic(evaluate, (compute, its_inputs, mode, CASE.primary), rounds=5, warmup_rounds=1, iterations=1)


@pytest.mark.parametrize("mode", ["fwd", "step"])
@pytest.mark.parametrize("name", ["eager", "padded", "torchmil", "pyg", "pyg-segment", "jagged", "native"])
@pytest.mark.parametrize("batch", BATCHES)
def bench_bags(benchmark, batch, name, mode):
    run(benchmark, batch, name, BATCHES[batch], mode)


@pytest.mark.parametrize("mode", ["fwd", "step"])
@pytest.mark.parametrize("name", ["eager", "accumulate", "native"])
@pytest.mark.parametrize("instances", SIZES)
def bench_one_bag(benchmark, instances, name, mode):
    run(benchmark, f"one bag of {instances}", name, (instances,), mode)
