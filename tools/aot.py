"""``python -m tools.aot``: compiles every Triton kernel as the host code launches it, with no GPU.

Fails on what would be slow or wrong: spills, too much shared memory, wgmma that is serialised or reads registers, a
missing TMA load, a kernel that does not compile, a kernel that nothing launches, host code that waits for the device.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from milkernels import triton as adapter
from milkernels.ops import contract
from tools.standin import Launch, Usage, call_op, modules, standin

KB = 1024
# name: (backend, architecture, threads of a warp, most shared memory of a program)
ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32, 163 * KB),
    "sm_90": ("cuda", 90, 32, 227 * KB),
    "sm_100": ("cuda", 100, 32, 227 * KB),
    "gfx942": ("hip", "gfx942", 64, 64 * KB),
}
# Bytes for each thread, of a call with several heads; with one there are none, but for a few of float64, which the
# assembler spills with registers to spare.
MOST_SPILLED, OF_FLOAT64 = 64, 16
# What ptxas says of wgmma that it serialises. C7519, that it waits for a register once more, is harmless.
_SERIALISED = re.compile(r"\((C7510|C7511|C7513|C7514|C7515)\)")

# op, type (of the parameters too), L, D, heads or classes, what is given besides
USAGES = """
attention_pool      bf16       1024  256  1  gated
attention_pool      bf16       1024  256  1  gated bags mask drop
attention_pool      bf16        512  128  1  gated frozen
attention_pool      bf16       1536  384  4  gated bags grads
attention_pool      bf16       1024  256  1
attention_pool      bf16       1000  200  9  relu nobias
attention_pool      bf16       1024  256 16  gated
attention_pool      bf16        500  128 32  gated bags drop
attention_pool      fp32        166  384 64  gated bags mask
attention_pool      bf16/fp32  1024  256  1  gated
attention_pool      fp16       1024  256  1  gelu drop
attention_pool      fp16       1024  256  1  gated
attention_scores    bf16       1024  256  1  identity
query_scores        bf16       1024    1  4  mask
attention_pool      fp32       1024  256  1  gated
attention_pool      fp32        512  384  4  gated bags mask drop
attention_pool      fp32       1024  256  1  gated autocast
attention_pool      fp64        512  128  1  gated bags
softmax_pool        bf16       1024    1  1
softmax_pool        fp32       1000    1  9  bags mask grads
query_pool          bf16       1024    1  1
query_pool          fp16       2560    1  4  bags grads
query_pool          fp64       1000    1  2  bags shared
query_pool          bf16        500    1  2  bags
weighted_pool       fp32       1024    1  1
weighted_pool       bf16       1000    1  4  bags mask
mean_pool           bf16       1024    1  1
mean_pool           fp32       2560    1  1  bags
mean_pool           fp32        166    1  1  bags mask
max_pool            bf16       1024    1  1
max_pool            fp32       1000    1  1  bags mask
max_pool            fp64       1024    1  1
loss_attention_pool bf16       1024    1  2
loss_attention_pool fp32       1024    1  4  bags mask grads
loss_attention_pool fp32        166    1  2  bags
instance_max        bf16       1024    1  1
instance_max        fp32       1024    1  2  bags mask grads
dsmil_pool          bf16       1024  128  1
dsmil_pool          fp32       1024  128  2  bags value
dsmil_pool          bf16       1024  128  1  value relu drop
dsmil_pool          fp32       1024  128  2  mlp value relu drop mask
dsmil               bf16       1024  128  1  value
dsmil               fp32       2560  128  4  mlp autocast grads
dsmil               fp64       1000  128  9  value
segment_softmax     fp32          1    1  1
segment_softmax     bf16          1    1  9  bags mask
attention_weights   fp32          1    1  1
attention_weights   fp64          1    1  4  bags mask
topk_instances      fp32          1    1  1  bags
topk_instances      bf16          1    1  2  mask
topk_instances      fp64          1    1  1
attention_pool      bf16       1024  256  1  gated fused
attention_pool      bf16       1024  256  1  gated fused bags mask drop
attention_pool      bf16        512  128  1  fused frozen
attention_pool      fp16       1536  384  4  gated fused
attention_pool      fp16       1000  200  1  gated fused mask
attention_scores    bf16/fp32  1024  256  1  gated fused
attention_pool      fp32       1024  256  1  gated fused tf32
attention_pool      bf16        512  256  1  gated embed
attention_pool      fp16        512  256  1  gated embed-gelu bags mask drop
attention_pool      fp32        512  128  2  embed drop split frozen
attention_pool      bf16        512  256  1  gated embed fused drop
attention_scores    bf16/fp32   512  128  1  gated embed-tanh autocast
query_pool          fp32        500    1  2  embed bags mask grads
query_scores        fp64       1000    1  2  embed-identity drop
instance_max        fp16        512    1  2  embed drop bags
dsmil_pool          bf16        512  128  2  embed value relu mask
dsmil               fp32        512  128  1  embed mlp autocast drop grads
loss_attention_pool bf16        512    1  2  embed-identity bags
attention_pool      fp32       1024  256  1  gated split
dsmil_pool          fp32       1024  128  1  mlp value relu split
attention_pool      bf16       1024  256  1  gated bags drop kept
attention_pool      fp16        512  256  1  gated embed-gelu bags kept
attention_pool      fp32        512  128  2  gated embed kept frozen
dsmil_pool          bf16       1024  128  1  mlp value relu drop kept
dsmil               fp32        512  128  1  embed mlp autocast kept
"""


def usages() -> list[Usage]:
    """Those of the table; an op that it does not name, in three ways of its own."""
    named = [Usage.parse(line) for line in USAGES.strip().splitlines()]
    missing = {op.name for op in contract.FORWARDS} - {usage.op for usage in named}
    ways = ("bf16 1024 256 1", "fp32 1000 128 4 bags mask grads", "fp64 512 128 2")
    return named + [Usage.parse(f"{op} {way}") for op in sorted(missing) for way in ways]


@dataclass
class Row:
    """A kernel compiled for one architecture; or an op whose host code failed there."""

    kernel: str
    usage: str  # the first one that launches it so
    tile: str
    arch: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: int = 0
    problems: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        numbers = (self.registers, self.spills, f"{self.shared / KB:.0f}", self.instructions)
        return (self.kernel, self.usage, self.tile, self.arch, *map(str, numbers), "; ".join(self.problems) or "ok")


# One kernel


def examine(launch: Launch, arch: str, most_spilled: int = 0) -> Row:
    """What the assembler and the code say of a kernel."""
    row = Row(launch.name, "", _tile(launch), arch)
    if launch.compiled is None:
        row.problems.append(launch.error or "not compiled")
        return row
    row.shared = launch.compiled.metadata.shared
    (_examine_amdgcn if "amdgcn" in launch.compiled.asm else _examine_ptx)(row, launch)
    if row.spills > most_spilled:
        row.problems.append(f"spills {row.spills} bytes")
    most_shared = ARCHITECTURES[arch][-1]
    if row.shared > most_shared:
        row.problems.append(f"{row.shared / KB:.0f} KB of shared memory, over {most_shared // KB}")
    return row


def _examine_ptx(row: Row, launch: Launch) -> None:
    ptx, log = launch.compiled.asm["ptx"], launch.log
    row.registers = _largest(r"Used (\d+) registers", log)
    row.spills = max(_largest(r"(\d+) bytes spill stores", log), _largest(r"(\d+) bytes spill loads", log))
    row.instructions = len(re.findall(r"^\s+(?:@!?%\w+ )?[a-z][\w.:]*\s[^;]*;", ptx, re.M))
    if row.registers == 0:
        row.problems.append("no log of the assembler")
    if serialised := sorted(set(_SERIALISED.findall(log))):
        row.problems.append(f"serialised wgmma ({', '.join(serialised)})")
    # The accumulator in braces, then A: registers, in braces too, or a descriptor.
    if re.search(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*\{", ptx):
        row.problems.append("wgmma with A in registers, which ptxas before 13.3 may miscompile")
    if row.arch != "sm_80" and described(launch):
        if "cp.async.bulk.tensor" not in ptx:
            row.problems.append("no TMA")
        if "mma.sync" in ptx:
            row.problems.append("mma.sync in place of the architecture's own products")


def _examine_amdgcn(row: Row, launch: Launch) -> None:
    code = launch.compiled.asm["amdgcn"]
    row.registers = _largest(r"\.vgpr_count:\s+(\d+)", code)
    row.spills = _largest(r"\.private_segment_fixed_size:\s+(\d+)", code)
    row.instructions = len(re.findall(r"^\s+(?:s|v|ds|global|buffer|flat|scratch)_\w+", code, re.M))


def _largest(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)


def described(launch: Launch) -> bool:
    """Whether it reads or writes through tensor descriptors."""
    return any(type(arg).__name__ == "TensorDescriptor" for arg in launch.args)


def _tile(launch: Launch) -> str:
    tile = {k: v for k, v in launch.options.items() if k.startswith("B") and isinstance(v, int)}
    return " ".join(f"{k}{v}" for k, v in tile.items()) + f" w{launch.options.get('num_warps', 4)}"


# All kernels


def of_architecture(arch: str, usages: Iterable[Usage]) -> tuple[list[Row], set[str]]:
    """Rows of the different kernels that these calls compile, and the names of all kernels launched."""
    from triton.backends.compiler import GPUTarget

    found: dict[object, tuple[Launch, str, int]] = {}
    rows, names = [], set()
    for usage in usages:
        with standin(GPUTarget(*ARCHITECTURES[arch][:3])) as record:
            try:
                call_op(usage, record)
            except Exception as error:
                rows.append(Row("(host)", str(usage), "", arch, problems=[f"{type(error).__name__}: {error}"]))
        if "fused" in usage and arch in ("sm_90", "sm_100") and not any(map(described, record.kernels)):
            rows.append(Row("(host)", str(usage), "", arch, problems=["no kernel with TMA is launched"]))
        most_spilled = MOST_SPILLED if usage.K > 1 else OF_FLOAT64 if usage.dtype == "fp64" else 0
        for launch in record.kernels:
            names.add(launch.name)
            key = (launch.name, launch.compiled.hash if launch.compiled else launch.error)
            first, label, bound = found.get(key, (launch, str(usage), most_spilled))
            found[key] = first, label, min(bound, most_spilled)
    for launch, label, bound in found.values():
        row = examine(launch, arch, bound)
        row.usage = label
        rows.append(row)
    return rows, names


def never_launched(launched: set[str], within: Iterable) -> list[str]:
    """Kernels of these modules that no call launched and no other kernel calls."""
    from triton import JITFunction

    kernels, called = {}, set()
    for module in within:
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction) and kernel.fn.__module__ == module.__name__:
                kernels[kernel.fn.__name__] = module.__name__
                called |= set(kernel.fn.__code__.co_names)
    return [f"{module}.{name}" for name, module in kernels.items() if name not in launched | called]


def table(rows: list[Row]) -> None:
    heads = (
        "kernel",
        "first launched by",
        "tile",
        "arch",
        "registers",
        "spills",
        "shared KB",
        "instructions",
        "verdict",
    )
    lines = [heads, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) - 1)]
    for line in lines:
        cells = (c.rjust(w) if 4 <= i < 8 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False)))
        print("  ".join((*cells, line[-1])))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--op",
        action="append",
        choices=sorted(op.name for op in contract.FORWARDS),
        help="only this one; may be repeated",
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="architectures at a time")
    arguments = parser.parse_args(argv)
    if adapter.interpreted():
        parser.error("TRITON_INTERPRET=1 is set; it leaves nothing to compile")
    import triton

    start, archs = time.time(), arguments.arch or list(ARCHITECTURES)
    chosen = usages()
    chosen = [usage for usage in chosen if not arguments.op or usage.op in arguments.op]
    with ProcessPoolExecutor(min(arguments.jobs, len(archs)), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(of_architecture, archs, [chosen] * len(archs)))
    rows = [row for found, _ in results for row in found]
    if not arguments.op:
        launched = set().union(*(names for _, names in results))
        rows += [Row(name, "", "", "", problems=["never launched"]) for name in never_launched(launched, modules())]
    rows.sort(key=lambda row: (bool(row.problems), row.kernel, row.usage, row.tile, archs.index(row.arch or archs[0])))
    table(rows)
    compiled = [row for row in rows if row.registers]
    print(
        f"{len({row.kernel for row in compiled})} kernels, {len(compiled)} configurations; most registers "
        f"{max(row.registers for row in compiled)}, spills {max(row.spills for row in compiled)} bytes; "
        f"{sum(bool(row.problems) for row in rows)} failures; {time.time() - start:.0f} s, Triton {triton.__version__}"
    )
    return int(any(row.problems for row in rows))


if __name__ == "__main__":
    sys.exit(main())
