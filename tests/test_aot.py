"""The gate that compiles Triton kernels with no GPU, and the stand-in device behind it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from milkernels import triton
from milkernels.ops import contract

pytestmark = pytest.mark.skipif(triton.load_error() is not None, reason=f"{triton.load_error()}")

if triton.load_error() is None:
    from tools import aot
    from tools.standin import launches, standin

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(op.name for op in contract.FORWARDS)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, where kernels are compiled: here they may be interpreted."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)


def test_gate_on_one_op():
    done = run("-m", "tools.aot", "--op", "segment_softmax", "--arch", "sm_90", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, totals = done.stdout.splitlines()
    assert {row.split()[0] for row in rows[1:]} == {"sums_partial", "sums_combine", "bag_weights"}
    assert all(re.search(r"sm_90 +\d+ +0 +\d+ +\d+  ok$", row) for row in rows[1:]), done.stdout
    assert totals.startswith(f"3 kernels, {len(rows) - 1} configurations; most registers ")
    assert " 0 failures; " in totals


def test_gate_refuses_bad_kernels():
    done = run(str(Path(__file__).with_name("aot_kernels.py")), "sm_90", "gfx942", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    nvidia, amd = json.loads(done.stdout).values()
    for found in (nvidia, amd):
        assert found["fine"] == []
        assert any(re.fullmatch(r"spills \d+ bytes", problem) for problem in found["spilling"])
        assert "CompilationError" in found["wrong"][0]
        # Not the helper, which another kernel calls.
        assert found["never"] == ["__main__.forgotten"]
    assert nvidia["greedy"] == ["256 KB of shared memory, over 227"]  # AMD's transposition goes through less


def test_gate_compiles_nothing_in_an_interpreter():
    done = run("-m", "tools.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr


def test_every_op_is_in_the_table():
    assert {usage.op for usage in aot.usages()} == set(OPS)


# Host code


@pytest.mark.parametrize(
    "extras", ["", "bags mask grads", "gated drop mlp value relu mask kept", "frozen nobias autocast"]
)
@pytest.mark.parametrize("op", OPS)
def test_host_code_waits_for_nothing(op, extras):
    """On tensors that hold nothing: what reads them raises an error. So every op can be captured in a CUDA graph."""
    forward, _ = launches(op, extras, dtype="fp32", K=2)
    assert forward.kernels


@pytest.mark.parametrize("extras", ["embed", "embed-gelu bags mask grads gated drop mlp value relu", "embed nobias"])
@pytest.mark.parametrize("op", sorted(contract.EMBEDDED))
def test_embedded_instances_are_never_all_there(op, extras):
    """A million of them; nor is anything else of their size, but the gradient of x where it is asked for."""
    sizes = {"dtype": "fp32", "N": 1_000_000, "L": 64, "D": 32, "K": 2}
    from milkernels.triton import call

    for x_too in (False, True):
        both = launches(op, extras if x_too else f"{extras} frozen", **sizes)
        large = [size for part in both for size in part.allocated if size > call.WORKSPACE]
        assert large == [1_000_000 * 128 * 4] * x_too
        assert "layer_rows" in {launch.name for launch in both[0].kernels}


@pytest.mark.parametrize(
    "transfer",
    [
        lambda x: x[0, 0].item(),
        lambda x: x[0].tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.zeros(3).to(x.device),
    ],
    ids=["item", "tolist", "cpu", "to", "nonzero", "index", "bool", "tensor", "to-device"],
)
def test_transfers_are_noticed(transfer):
    with standin():
        x = torch.empty(4, 4, device="cuda")
        with pytest.raises(Exception, match="host and device|waits for the device|_local_scalar_dense"):
            transfer(x)


@pytest.mark.parametrize("index", [slice(1, 3), 2, (None, 1), (..., None), (slice(None), None, 0), (..., slice(2))])
def test_fake_tensors_are_indexed_as_others(index):
    expected = torch.empty(4, 5)[index]
    with standin():
        got = torch.empty(4, 5, device="cuda")[index]
        assert (got.shape, got.stride(), got.storage_offset()) == (
            expected.shape,
            expected.stride(),
            expected.storage_offset(),
        )


def test_launches_do_not_grow_with_the_rows_of_a_workspace():

    def count(n: int):
        return [part.total for part in launches("attention_pool", "gated", dtype="fp32", N=n)]

    assert count(100) == count(1000) == count(4096)
    forward, backward = launches("attention_pool", "gated", dtype="fp32", N=1000)
    assert [launch.name for launch in forward.kernels] == ["gate_scores", "pool_partial", "pool_combine"]
    assert forward.library["mm"] == 1 and forward.total == len(forward.kernels) + forward.library.total()
    # The products again, the gradient of the weights, and that of x, which is added to what the pooling gives it.
    assert backward.library["mm"] == 2 and backward.library["addmm_"] == 1
    assert count(1_000_000)[0] > forward.total


@pytest.mark.parametrize("compiles", ["", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_second_call_is_what_a_cuda_graph_can_hold(compiles):
    """Nothing is compiled, no memory comes from anybody but PyTorch's allocator; and reading raises, as above. Nor does
    an epoch of ragged batches wait for a compiler after the first of them."""
    done = run(str(Path(__file__).with_name("second_call.py")), compiles, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("allocator") == "NullAllocator"  # with which a kernel that wants memory cannot be launched
    assert set(found) == {"softmax_pool", "attention_pool", "dsmil", "loss_attention_pool"}
    for op, calls in found.items():
        waited = calls.pop("epoch", [])
        assert not any(waited[10:]), op
        assert calls["first"]["compiled"] and calls["first"]["allocated"] == calls["again"]["allocated"], op
        assert calls["again"]["compiled"] == calls["other"]["compiled"] == [], op
        assert len({calls[name]["launched"] for name in calls}) == 1 and not any(c["scratch"] for c in calls.values())
