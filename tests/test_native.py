"""What the kernels of the CPU alone have: memory that this machine's allocator filled, and products without the
library.  Their numbers are in test_numbers.py, what attention alone has in test_attention.py."""

import os
import subprocess
import sys
from pathlib import Path

import op_cases
import pytest
import torch
from op_cases import compiled, needs_extension, of_the_cpu, offsets_of, same_bits, step, threads
from test_numbers import FIVE, RAGGED

from milkernels import segment_softmax

pytestmark = needs_extension

_POISON = """
import sys
import torch
from op_cases import COMPILED, offsets_of, step
out = {}
for name, case in COMPILED.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for lengths in ((0, 1, 64, 63, 130), (300, 0, 1900)):
            mask = torch.arange(sum(lengths)) % 5 > 0
            mask[64:128] = False
            tensors = case.make(lengths, dtype, L=37, D=41, K=5, C=3, Q2=9, V=33)
            for given in (None, mask):
                key = name, str(dtype), lengths, given is None
                out[key] = step(case.ours("native"), tensors, offsets_of(lengths), given)
torch.save(out, sys.argv[1])
"""

_HALF = """
import op_cases
import torch
for dtype in (torch.bfloat16, torch.float16):
    kept = op_cases.promise(op_cases.CASES["gated_attention_pool"], "native", dtype, lengths=(70, 5, 130), seeds=3)
    assert kept.ok, kept.broken()
"""


@of_the_cpu
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MALLOC_PERTURB_ is glibc's")
@pytest.mark.slow
def test_results_do_not_depend_on_what_memory_held(tmp_path):
    """Fresh memory is filled with 3.4e38 in one run and 0 or -1.7e38 in others."""
    runs = []
    for fill in ("0", "1", "128"):
        path = tmp_path / fill
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        env = os.environ | {"MALLOC_PERTURB_": fill, "OMP_NUM_THREADS": "2", "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", _POISON, str(path)], env=env, check=True)
        runs.append(torch.load(path))
    assert runs[0]
    for other in runs[1:]:
        for key, expected in runs[0].items():
            for name, value in expected.items():
                assert torch.equal(other[key][name], value), (key, name)


@of_the_cpu
@compiled("gated_attention_pool", "dsmil-mlp-q-relu-v", "query_pool-embed-dropout")
def test_products_without_the_librarys_micro_kernels(case):
    """As on a processor without AVX2: what a library's gemm would take their place has other bits for other threads."""
    with torch.backends.mkldnn.flags(enabled=False):
        kept = op_cases.promise(case, "native", torch.float32, lengths=(70, 5, 130), seeds=3, **FIVE)
        assert kept.ok, kept.broken()
        tensors, offsets = case.make(RAGGED, torch.float32, **FIVE), offsets_of(RAGGED)
        runs = []
        for count in (1, 3):
            with threads(count):
                runs.append(step(case.ours("native"), tensors, offsets, None))
        same_bits(*runs)


@of_the_cpu
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_half_types_where_the_library_is_told_to_use_less(instructions):
    """Than the machine has: its micro-kernels for bfloat16 then raise."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", _HALF], env=env, check=True)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_softmax_of_scores_beside_dead_ones(heads, dtype):
    """Of as many rows as vectors take, and of more and fewer: a compiler once lost what was added beside zeros."""
    generator = torch.Generator().manual_seed(heads)
    for rows in (1, 15, 16, 17, 32, 130, 3000):
        scores = torch.randn(rows, heads, dtype=torch.float64, generator=generator)
        scores[1:][torch.rand(rows - 1, heads, generator=generator) < 0.3] = -torch.inf
        scores, grad = scores.to(dtype), torch.randn(rows, heads, dtype=dtype, generator=generator)
        found = {}
        for name, given in (("native", scores), ("exact", scores.double())):
            given = given.clone().requires_grad_()
            weights = segment_softmax(given, backend=name) if name == "native" else given.softmax(0)
            found[name] = weights, *torch.autograd.grad(weights, given, grad.to(given.dtype))
        for ours, exact in zip(found["native"], found["exact"], strict=True):
            tolerance = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)
