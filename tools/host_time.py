"""``python -m tools.host_time``: what a call costs the host, with no GPU: CUDA C++ beside Triton.

Kernels are not run. Those of Triton go through its own launch path down to a launcher that does nothing, those of C++
through the emulated module, which counts them; so what neither has is the driver, some microseconds for each launch.
The tensors lie on the CPU and are small, for what PyTorch computes runs for real.
"""

import argparse
import statistics
import sys
import time
from types import SimpleNamespace

import torch

import milkernels
from milkernels import native, triton
from milkernels.testing import CASES, Shape, public_arguments

OPS = ("softmax_pool", "query_pool", "loss_attention_pool", "instance_max", "gated_attention_pool")
MODES = ("fwd", "step")
_BAGS, _ROWS, _WIDTH = 100, 8, 16
_CALLS = 20  # of a round


class _Driver:
    """Compiles for a GPU that is not there and launches nothing."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target, self.launches = GPUTarget("cuda", 90, 32), 0
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (None, None, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132},
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        def launch(*args):
            self.launches += 1

        return launch


def triton_without_device() -> _Driver:
    """From now on Triton's kernels serve CPU tensors, as far as the host can tell."""
    from triton.runtime import driver

    found = _Driver()
    driver.set_active(found)
    for name, module in triton.kernels().items():
        triton.register(name, module, ("cpu",))
    triton.device_types = lambda: ("cuda", "cpu")
    return found


def calls(op: str, backend: str) -> dict[str, object]:
    """The call of an op on a batch of small bags, by mode."""
    case = CASES[op]
    inputs = case.inputs(Shape((_ROWS,) * _BAGS, _WIDTH, _WIDTH, min(case.default_heads, 2)))
    weights = {name: p for name, p in inputs.parameters.items() if not name.endswith("bias")}
    layers = public_arguments(op, weights | inputs.fixed)
    compute, x, offsets = getattr(milkernels, op), inputs.x.requires_grad_(), inputs.offsets
    leaves = [x, *(p.requires_grad_() for p in weights.values())]

    def forward():
        with torch.no_grad():
            compute(x, offsets=offsets, backend=backend, **layers)

    def step():
        out = compute(x, offsets=offsets, backend=backend, **layers)[0]
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return dict(zip(MODES, (forward, step), strict=True))


def measure(ops, launches: dict[str, object], rounds: int) -> list[tuple[str, str, dict[str, tuple[float, int]]]]:
    """Rows ``(op, mode, {backend: (seconds per call, launches)})``; the backends take turns."""
    rows = []
    for op in ops:
        both = {backend: calls(op, backend) for backend in launches}
        for mode in MODES:
            seconds, counts = {b: [] for b in both}, {}
            for backend, of in both.items():
                of[mode]()
                before = launches[backend]()
                of[mode]()
                counts[backend] = launches[backend]() - before
            for _ in range(rounds):
                for backend, of in both.items():
                    start = time.perf_counter()
                    for _ in range(_CALLS):
                        of[mode]()
                    seconds[backend].append((time.perf_counter() - start) / _CALLS)
            rows.append((op, mode, {b: (statistics.median(s), counts[b]) for b, s in seconds.items()}))
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.host_time", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args(argv)
    if not native.emulated() or native.load_error() is not None or triton.load_error() is not None:
        reason = native.load_error() or triton.load_error() or "set MILKERNELS_EMULATE_CUDA=1"
        print(f"needs Triton and the emulated module: {reason}", file=sys.stderr)
        return 2
    if triton.interpreted():
        print("TRITON_INTERPRET=1 is no launch path; unset it", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.table import Table

    emulated = native._extension
    driver = triton_without_device()
    emulated.set_dry(True)
    table = Table(title=f"host time of a call, {_BAGS} bags of {_ROWS} x {_WIDTH}, no driver")
    for column in ("op", "mode", "C++ us", "launches", "Triton us", "launches", "Triton / C++"):
        table.add_column(column, justify="left" if column in ("op", "mode") else "right")
    launches = {"native": emulated.launch_count, "triton": lambda: driver.launches}
    for op, mode, found in measure(arguments.op or OPS, launches, arguments.rounds):
        (ours, count), (theirs, their_count) = found["native"], found["triton"]
        times = f"{1e6 * ours:.0f}", str(count), f"{1e6 * theirs:.0f}", str(their_count)
        table.add_row(op, mode, *times, f"{theirs / ours:.1f}")
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
