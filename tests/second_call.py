"""A call of an op after the first: run by test_aot.py in a process where Triton's kernels are not interpreted.

Prints for each op, forward and backward, which kernels Triton would have to compile for the first call, for the same
one again, for nearly as many rows, and over an epoch of ragged batches; what they allocate; and, where ``compile`` is
asked for, the memory that compiled kernels would want of Triton, which PyTorch's allocator does not know of.
"""

import json
import sys
from random import Random

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import _allocation

from tools.standin import Usage, call_op, standin

OPS = {
    "softmax_pool": "bags mask",
    "attention_pool": "gated bags mask kept",
    "dsmil": "bags mask mlp kept",
    "loss_attention_pool": "bags mask",
}
ROWS = {"first": 4096, "again": 4096, "other": 3999}
EPOCH = 60  # batches of 1 to 64 bags of 20 to 20,000 rows


def calls(op: str, compiles: bool) -> dict[str, dict]:
    asked, known = [], set()

    def hook(*, key, fn, **rest):
        """Before Triton compiles, which it leaves out for what is true."""
        if (fn.name, key) not in known:
            known.add((fn.name, key))
            asked.append(fn.name.rpartition(".")[2])
        return not compiles

    found = {}
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = hook
        for name, rows in ROWS.items():
            asked.clear()
            with standin(GPUTarget("cuda", 90, 32)) as record:
                call_op(Usage(op, extras=tuple(OPS[op].split()), N=rows), record)
            compiled = [launch.compiled for launch in record.kernels if launch.compiled is not None]
            assert len(compiled) == compiles * len(record.kernels), [launch.error for launch in record.kernels]
            found[name] = {
                "launched": len(record.kernels),
                "compiled": list(asked),
                "allocated": record.allocated,
                "scratch": sum(
                    one.metadata.global_scratch_size + one.metadata.profile_scratch_size for one in compiled
                ),
            }
        if not compiles:
            found["epoch"] = epoch(op, asked)
    return found


def epoch(op: str, asked: list[str]) -> list[list[str]]:
    """Which kernels each batch of an epoch would have to wait for."""
    random, waited = Random(0), []
    for _ in range(EPOCH):
        bags = random.randint(1, 64)
        rows = sum(int(20 * 1000 ** random.random()) for _ in range(bags))
        asked.clear()
        with standin(GPUTarget("cuda", 90, 32)) as record:
            call_op(Usage(op, extras=tuple(OPS[op].split()), N=rows, B=bags), record)
        waited.append(list(asked))
    return waited


if __name__ == "__main__":
    results = {op: calls(op, "compile" in sys.argv) for op in OPS}
    results["allocator"] = type(_allocation._allocator.get()).__name__
    print(json.dumps(results))
