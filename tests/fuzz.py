"""`make fuzz`: random calls of every op, on every backend, against the float64 oracle; the error promise decides.

    python tests/fuzz.py --examples 2000 --legs avx512,avx2,default,emulated,reference --ops softmax_pool --seed 1

A leg is a process: the kernels of one instruction set, those of CUDA run by the emulator, Triton's run by its
interpreter (which is slow, and only asked for by name), or the reference.  What breaks the promise is shrunk, and
printed as a test.
"""

import argparse
import collections
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEGS = {
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "emulated": {"MILKERNELS_EMULATE_CUDA": "1"},
    "reference": {},
    "triton": {"TRITON_INTERPRET": "1"},
}
ROUND = 500  # calls between two looks at what was found: a round ends with the first miss
# Around tiles of 16 and 64 rows and chunks of 256; more than 2048 rows are cut otherwise.
LENGTHS = (3, 0, 1, 2, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 513, 2049)
WIDTHS = (2, 1, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 37, 48, 63, 64, 65, 70, 96, 129, 131, 260)
HEADS = (2, 1, 3, 4, 5, 7, 8, 9, 16, 17)
TYPES = (
    *((("float64", None, False), ("float32", None, False), ("bfloat16", None, False), ("float16", None, False))),
    *((("bfloat16", "float32", False), ("float16", "float32", False))),
    *((("float32", None, True), ("bfloat16", "float32", True))),
)
NUMBERS = 40_000  # in the rows of a call, and products of two of its sizes: thousands of calls a minute


def strategy(ops, compiles: bool, threads: tuple[int, ...], layouts: tuple[str, ...]):
    """Calls of these ops; how an op is called follows from its signature and the sizes in the registry."""
    from calls import _BIASES, MASK_TYPES, Call
    from functional_cases import takes
    from hypothesis import strategies as st

    from milkernels import testing

    def layers(draw, op, sizes):
        absent = {n for n in _BIASES if n in sizes and draw(st.integers(0, 3)) == 3}
        if op.startswith("dsmil"):
            absent |= {layer for layer in ("q2", "v") if draw(st.booleans())}
            if "q_bias" in absent or "q2_bias" in absent:  # the table of the tests moves both off the kink
                absent |= {"q_bias", "q2_bias"}
        return {n for n in absent if n in ("q2", "v") or n.rpartition("_")[0] not in absent}

    def options_of(draw, op, absent):
        found, share = {}, st.sampled_from((0.4, 0.1, 0.9, 1.0, 1e-6))
        if takes(op, "activation"):
            found["activation"] = draw(st.sampled_from(("tanh", "relu", "gelu", "identity")))
        if takes(op, "dropout_p") and draw(st.integers(0, 3)) == 3:
            found["dropout_p"] = draw(share)
        if takes(op, "scale") and draw(st.booleans()):
            found["scale"] = draw(st.sampled_from((0.3, 1.0, -0.5)))
        if takes(op, "value_activation") and "v" not in absent:
            if draw(st.booleans()):
                found["v_activation"] = draw(st.sampled_from(("identity", "relu", "tanh", "gelu")))
            if draw(st.integers(0, 3)) == 3:
                found["v_dropout_p"] = draw(share)
        if takes(op, "largest"):
            found |= {"k": draw(st.sampled_from((1, 3, 9, 70))), "largest": draw(st.booleans())}
        return found

    def data_of(draw, op, dtype, embed):
        # Half types cannot hold all gradients of an outlier, and round scores of hundreds by whole units.
        kinds = ["relu"] * 3 + ["outlier"] * (dtype in ("float32", "float64"))
        if op not in ("instance_max", "dsmil") or dtype == "float64":
            kinds.append("noise")
        if op in ("instance_max", "max_pool", "topk_instances") and embed is None:
            kinds.append("whole")
        if op in ("softmax_pool", "segment_softmax", "attention_weights", "topk_instances"):
            kinds.append("dead")
        return draw(st.sampled_from(kinds))

    @st.composite
    def calls(draw):
        op = draw(st.sampled_from(ops))
        known = testing.SIZES["softmax_pool" if op == "attention_weights" else op]
        dtype, parameter_dtype, autocast = draw(st.sampled_from(TYPES))
        embed = None
        if takes(op, "embed") and draw(st.integers(0, 3)) == 3:
            embed = draw(st.sampled_from(("relu", "tanh", "gelu", "identity"))), draw(st.sampled_from((0.0, 0.0, 0.3)))
        lengths = tuple(draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=7)))
        absent = layers(draw, op, known)
        sizes, rows = {}, max(1, sum(lengths))
        for symbol in sorted({s for size in known.values() for s in size if isinstance(s, str)} - {"N", "B"}):
            widest = NUMBERS // max(rows, 150)
            wide = [w for w in (HEADS if symbol in "KC" else WIDTHS) if w <= max(2, widest)]
            sizes[symbol] = draw(st.sampled_from(wide))
        if embed is not None and sizes["L"] < 2:
            sizes["L"] = 2  # E = 2 L - 3
        if embed is not None and op not in ("instance_max", "dsmil") and draw(st.integers(0, 3)) == 3:
            absent.add("e_bias")
        tensors = [n for n in Call(op, absent=tuple(absent), embed=embed).case.tensors]
        shared = "query" in known and draw(st.booleans())
        return Call(
            op,
            lengths,
            dtype,
            parameter_dtype,
            autocast,
            tuple(sizes.items()),
            tuple(sorted(absent)),
            tuple(options_of(draw, op, absent).items()),
            embed,
            shared,
            mask=draw(st.sampled_from((None, None, "holes", "prefix", "all", "none"))),
            mask_type=draw(st.sampled_from(tuple(MASK_TYPES))),
            # One bag needs none.
            index=draw(st.sampled_from(("int64", "int32", None) if len(lengths) == 1 else ("int64", "int32"))),
            as_bags=tensors[0] == "x"
            and takes(op, "offsets")
            and op != "attention_weights"
            and draw(st.integers(0, 7)) == 7,
            layout=draw(st.sampled_from(("contiguous",) * 3 + layouts)),
            data=data_of(draw, op, dtype, embed),
            grads=draw(st.sampled_from(("all", "all", "frozen", "none", *tensors))),
            wanted=draw(st.sampled_from((None, None, None, 0))),
            transform=draw(st.sampled_from(("plain",) * 100 + ("vmap",) * 8 + ("compile",) * compiles)),
            threads=draw(st.sampled_from((1,) * 12 + threads)),
            saved_bytes=draw(st.sampled_from((64 << 20, 0, None, 20_000, 100_000, 400_000))),
            seed=draw(st.integers(0, 2**20)),
        )

    return calls()


class Leg:
    """One process: draws, checks, counts."""

    def __init__(self, name: str, note: Path):
        import torch

        torch.set_num_threads(1)
        import calls

        self.name, self.calls = name, calls
        self.backend = name if name in ("reference", "triton") else "native"
        if self.backend == "native" and calls.leg() != name:
            raise SystemExit(f"{name}: this machine, or what was built, serves {calls.leg()}")
        self.counts, self.outcomes, self.missed = collections.Counter(), collections.Counter(), []
        self.note = open(note, "w")  # noqa: SIM115  of the call that runs, for a process that dies in it

    def ops(self, wanted):
        from milkernels import backends, testing

        known = [op for op in testing.SIZES if not wanted or op in wanted]
        kernel = {op: op.removeprefix("gated_") for op in known}
        return [op for op in known if backends.why_not(self.backend, kernel[op], "cpu") is None]

    def serves(self, call) -> bool:
        import torch
        from op_cases import has_kernel

        if self.backend == "reference":  # transformed it is PyTorch's own operators, which round as a library does
            return call.transform == "plain" or call.type == torch.float64
        return has_kernel(call.case.kernel, self.backend, call.case.needs)

    def check(self, call):
        self.note.seek(0)
        self.note.truncate()
        self.note.write(repr(call))
        self.note.flush()
        self.last = call
        outcome = self.calls.check(call, self.backend)
        self.counts[call.op] += 1
        self.outcomes[outcome] += 1
        if call.transform != "plain":
            self.outcomes[call.transform] += 1

    def run(self, ops, examples: int, seed: int, budget: float) -> None:
        import hypothesis
        from hypothesis import HealthCheck, Phase, Verbosity

        start, done = time.monotonic(), 0
        # The reference's products are a library's: their bits depend on the threads, and of bfloat16 rows of odd width
        # some read the number behind each (PyTorch 2.13 with AMX).
        kernels = self.name.startswith(("avx", "default"))
        threads = (2, 3) if kernels else ()
        layouts = ("shifted", "transposed") + ("wide", "every second") * (self.name != "reference")
        while sum(self.counts.values()) < examples and time.monotonic() - start < budget:
            count = min(ROUND, examples - sum(self.counts.values()))
            drawn = strategy(ops, self.name != "emulated", threads, layouts).filter(self.serves)
            one = hypothesis.given(drawn)(lambda call: self.check(call))
            one = hypothesis.settings(
                max_examples=count,
                deadline=None,
                database=None,
                verbosity=Verbosity.quiet,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            )(hypothesis.seed(seed + done)(one))
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    one()
            except Exception as error:  # whatever a call raises is a miss
                self.report(error)
            done += 1

    def report(self, error) -> None:
        call = self.last  # Hypothesis ends with the smallest
        self.missed.append(call)
        print(f"\n# {self.name}: {type(error).__name__}: {str(error)[:300]}")
        print(f"def test_{call.op}_{len(self.missed)}():\n    found({call!r}, {self.backend!r})\n", flush=True)

    def summary(self) -> None:
        print(f"{self.name}: {sum(self.counts.values())} calls, {len(self.missed)} misses; {dict(self.outcomes)}")
        print("   " + ", ".join(f"{op} {n}" for op, n in sorted(self.counts.items())), flush=True)


def environment(leg: str) -> dict[str, str]:
    """What a process of that leg runs in."""
    from milkernels import native

    found = dict(os.environ) | LEGS[leg]
    if leg == "emulated":
        (module,) = Path(native.__file__).parent.glob(f"_C_emulated{native.SUFFIX}.*")
        if b"__asan_init" in module.read_bytes():  # as `make cuda-test` builds it
            names = ("libasan.so", "libstdc++.so.6")
            paths = [subprocess.check_output(["c++", f"-print-file-name={n}"], text=True).strip() for n in names]
            found |= {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    return found


def legs_here() -> list[str]:
    import torch

    from milkernels import native

    order = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    runs = order[: order.index(best) + 1] if best in order else order[:1]
    found = [name for name in reversed(runs) if native.is_built(name)]
    return found + ["emulated"] * native._is_here("_C_emulated") + ["reference"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000, help="calls of each leg")
    parser.add_argument("--minutes", type=float, default=1e9, help="at most so many for each leg")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--legs", default="", help=f"of {','.join(LEGS)}; without it those that are built, less triton")
    parser.add_argument("--ops", default="")
    parser.add_argument("--leg", help=argparse.SUPPRESS)
    parser.add_argument("--note", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    ops = options.ops.split(",") if options.ops else []
    if options.leg:
        leg = Leg(options.leg, options.note)
        leg.run(leg.ops(ops), options.examples, options.seed, 60 * options.minutes)
        leg.summary()
        return len(leg.missed) > 0
    failed = 0
    print(f"seed {options.seed}")
    for name in options.legs.split(",") if options.legs else legs_here():
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder, "call")
            command = [sys.executable, __file__, *sys.argv[1:], "--leg", name, "--note", str(note)]
            code = subprocess.run(command, env=environment(name)).returncode
            failed |= code != 0
            if code not in (0, 1):
                print(f"# {name}: the process ended with {code} in\n    {note.read_text()}")
    return failed


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
