"""The CUDA C++ kernels, run on the host by csrc/cuda/emulator.h: what the tests of all compiled kernels leave out, as
it concerns GPUs alone. `make cuda-test` runs this file, and what test_numbers.py holds against the oracle, under
AddressSanitizer: there an access outside a tensor or outside shared memory ends the process.
"""

import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import op_cases
import pytest
import torch
from legs import LEGS, ORDERS, all_of_them, emulated
from op_cases import COMPILED, close, offsets_of, same_bits, step
from test_numbers import BLOCK as SIZES
from test_numbers import BLOCKS as LENGTHS
from test_numbers import LONE, MANY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.cpp_extension import include_paths

import milkernels
from milkernels import backends, native, triton
from milkernels.ops import contract

pytestmark = LEGS["emulated"].needed
every_case = pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
PLAIN = {name: case for name, case in op_cases.PLAIN.items() if name in COMPILED}

ROOT = Path(__file__).parent.parent
LARGE = 2**62


def run(case, tensors, offsets, mask=None):
    return step(case.ours("native"), tensors, offsets, mask)


class Calls(TorchDispatchMode):
    """Notes calls of the library's own ops, as they reach the kernels."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "milkernels":
            self.found.append((op, args))
        return op(*args, **(kwargs or {}))


def calls_of(case, lengths=LENGTHS, dtype=torch.float32, mask=None, **sizes):
    """The calls of kernels of a forward and a backward."""
    with Calls() as calls:
        run(case, case.make(lengths, dtype, **SIZES | sizes), offsets_of(lengths), mask)
    assert calls.found and all(op._overloadname == "native" for op, _ in calls.found)
    return calls.found


def same(tensor):
    """Whether an argument is that tensor."""
    return lambda a: torch.equal(a, tensor)


def replaced(args, old, new):
    """The arguments, with ``new`` of it in the place of each tensor that ``old`` says."""
    return tree_map_only(torch.Tensor, lambda a: new(a) if old(a) else a, args)


def outputs(op, args) -> tuple[torch.Tensor, ...]:
    result = op(*args)
    return result if isinstance(result, tuple) else (result,)


# Nonsense in tensors of integers, which nothing checks on a GPU


def nonsense(rows, bags):
    """Offsets that are none."""
    generator = torch.Generator().manual_seed(3)
    yield torch.full((bags + 1,), -7)
    yield torch.full((bags + 1,), rows + 1)
    yield torch.arange(bags, -1, -1) * (rows // bags)
    yield torch.tensor([rows, 0] * bags)[: bags + 1]
    yield torch.tensor([-LARGE, LARGE] * bags)[: bags + 1]
    yield torch.tensor([LARGE, -LARGE] * bags)[: bags + 1]
    yield torch.linspace(-rows, 2 * rows, bags + 1).long()
    for _ in range(2):
        yield torch.randint(-rows, 2 * rows, (bags + 1,), generator=generator)


def check_nonsense(case, lengths, index):
    """The numbers may be anything; the shapes are as ever."""
    sound, mask = offsets_of(lengths), torch.arange(sum(lengths)) % 5 > 0
    for op, args in calls_of(case, lengths, mask=mask, L=5):
        expected = [(o.shape, o.dtype) for o in outputs(op, args)]
        for offsets in nonsense(sum(lengths), len(lengths)):
            limits = torch.iinfo(index)
            wrong = offsets.clamp(limits.min, limits.max).to(index)
            got = outputs(op, replaced(args, same(sound), lambda _, wrong=wrong: wrong))
            assert [(o.shape, o.dtype) for o in got] == expected


@pytest.mark.parametrize("lengths, index", [(LENGTHS, torch.int32), (LONE, torch.int64)], ids=["int32", "int64"])
@every_case
def test_offsets_that_are_none_reach_nothing_outside(case, lengths, index):
    check_nonsense(case, lengths, index)


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_offsets_that_are_none_reach_nothing_outside_of_many_rows(case):
    check_nonsense(case, MANY, torch.int64)


@every_case
def test_no_bags_beside_rows(case):
    """Offsets of one number, with instances that are in none: there is no second one to read."""
    lengths = (40, 30, 1, 49, 5)
    sound, none = offsets_of(lengths), torch.zeros(1, dtype=torch.int64)

    def without_bags(a):
        return none if torch.equal(a, sound) else a.narrow(0, 0, 0) if len(a) == len(lengths) else a

    for op, args in calls_of(case, lengths):
        got = outputs(op, tree_map_only(torch.Tensor, lambda a: without_bags(a) if a.dim() > 0 else a, args))
        assert all(len(o) == 0 for o, full in zip(got, outputs(op, args), strict=True) if len(full) == len(lengths))


@every_case
def test_offsets_are_clamped(case):
    """Those that leave the tensor on either side are as if they ended there."""
    lengths = (40, 30, 1, 49)
    sound = offsets_of(lengths)
    wild = sound.clone()
    wild[0], wild[-1] = -9, LARGE
    for op, args in calls_of(case, lengths):
        got = outputs(op, replaced(args, same(sound), lambda _: wild))
        for a, b in zip(got, outputs(op, args), strict=True):
            assert a.dtype == torch.uint8 or torch.equal(a, b)  # in what is kept nobody writes behind the last row


@every_case
def test_indices_that_are_none_reach_nothing_outside(case):
    """What a forward saves comes back from outside: rows beyond the last one, and before the first."""
    sound, found = offsets_of(LENGTHS), False

    def chosen(a):
        return a.dtype == torch.int64 and a.numel() > 1 and not torch.equal(a, sound)  # and not a seed

    for op, args in calls_of(case):
        for wrong in (-1, -2, sum(LENGTHS), sum(LENGTHS) + 1, LARGE, -LARGE):
            for every in (1, 2):

                def wreck(a, wrong=wrong, every=every):
                    a = a.clone()
                    a.view(-1)[::every] = wrong
                    return a

                changed = replaced(args, chosen, wreck)
                found = found or any(a is not b for a, b in zip(tree_leaves(changed), tree_leaves(args), strict=True))
                op(*changed)
    saved = next(op for op in contract.FORWARDS if op.name == case.kernel).backward.saved
    assert found == bool({"indices", "critical"} & set(saved))


# What memory held


@pytest.mark.parametrize("lengths", [LENGTHS, LONE], ids=str)
@every_case
def test_same_bits_whatever_memory_held(case, lengths):
    """PyTorch fills fresh tensors with NaN, and with the largest integer, where it is asked to be deterministic."""
    mask = torch.arange(sum(lengths)) % 5 > 0
    mask[5:45] = False
    tensors = case.make(lengths, torch.float32, **SIZES)
    plain = run(case, tensors, offsets_of(lengths), mask)
    torch.use_deterministic_algorithms(True)
    try:
        filled = run(case, tensors, offsets_of(lengths), mask)
    finally:
        torch.use_deterministic_algorithms(False)
    same_bits(filled, plain)


# Ways to the same numbers


def small_slices():
    """Within the block rows between two kernels go through chunk by chunk."""
    return emulated("set_workspace", 1, 256 << 20)


# Only attention keeps something of rows between two kernels.
SLICED = {name: case for name, case in COMPILED.items() if case.kernel in ("attention_pool", "attention_scores")}
every_sliced = pytest.mark.parametrize("case", SLICED.values(), ids=SLICED)


@pytest.mark.parametrize("lengths", [LENGTHS, LONE, MANY, (30, 0, 700)], ids=str)
@every_sliced
def test_oracle_in_slices(case, lengths):
    """There are as many as chunks, and bags that cross them."""
    mask, tensors = torch.arange(sum(lengths)) % 5 > 0, case.make(lengths, **SIZES)
    with small_slices():
        got = run(case, tensors, offsets_of(lengths), mask)
    close(got, step(case.truth, tensors, offsets_of(lengths), mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_sliced
def test_error_promise_in_slices(case, dtype):
    with small_slices():
        kept = op_cases.promise(case, "native", dtype, torch.float32, lengths=(30, 0, 200), seeds=2, **SIZES)
    assert kept.ok, kept.broken()


@every_sliced
def test_slices_are_several(case):
    """Where they are small, more kernels are launched, so that the tests above are not of one slice."""

    def launches():
        before = native._extension.launch_count()
        run(case, case.make(MANY, **SIZES), offsets_of(MANY))
        return native._extension.launch_count() - before

    whole, slices = launches(), -(-sum(MANY) // 256)
    with small_slices():
        assert launches() >= whole + 2 * (slices - 1)  # one each way


# What there is no kernel for


REFUSED = {name: case for name, case in op_cases.CASES.items() if case.needs}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_kernels_lack_is_refused(case, monkeypatch):
    """By name, and by the kernels themselves, should anybody ask them: they leave nothing out in silence."""
    tensors, offsets = case.make(), offsets_of(op_cases.LENGTHS)
    with pytest.raises(milkernels.BackendUnavailable, match=r"cannot serve .* CUDA's C\+\+ kernels have no "):
        case.ours("native")(tensors, offsets, None)
    monkeypatch.setattr(native, "_CUDA_LACKS", {})
    monkeypatch.setattr(backends, "_served", {})
    with pytest.raises(ValueError, match=r"CUDA's C\+\+ kernels have no .*; got "):
        case.ours("native")(tensors, offsets, None)


# Sizes


def _without_cancelling_sums(case):
    """The gradient of a score's bias is what rounding leaves of a sum that cancels, the more the wider the rows are: of
    a few such numbers the error is luck."""
    if "w_bias" not in case.tensors:
        return case
    tensors = {name: size for name, size in case.tensors.items() if name != "w_bias"}
    return dataclasses.replace(case, tensors=tensors, options=case.options | {"w_bias": None})


WIDE = {
    name: _without_cancelling_sums(case)
    for name, case in PLAIN.items()
    if any("L" in sizes for sizes in case.tensors.values())
}


@pytest.mark.parametrize("case", WIDE.values(), ids=WIDE)
def test_wide_rows(case):
    lengths = (3, 0, 33)
    with all_of_them() as each:
        for L, dtype in itertools.product((2560, 2557), (torch.float32, torch.bfloat16, torch.float16)):
            with each(L, dtype):
                sizes = SIZES | {"L": L}
                if case.op == "max_pool":  # of which the oracle takes one column at a time
                    tensors, offsets = case.make(lengths, dtype, **sizes), offsets_of(lengths)
                    close(run(case, tensors, offsets), step(case.ours("reference"), tensors, offsets, None), 0)
                    continue
                kept = op_cases.promise(case, "native", dtype, lengths=lengths, seeds=3, **sizes)
                assert kept.ok, kept.broken()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_rows_that_begin_anywhere(case, dtype):
    """The first number of x, and each row, at any multiple of their size: vectors are read only where they may be."""
    tensors = {n: t.detach() for n, t in case.make(LENGTHS, dtype, **SIZES | {"L": 40}).items()}
    rows = next(name for name in tensors if case.has_rows(name))
    expected, width = None, tensors[rows].shape[1]
    for first, stride in ((0, 0), (1, 0), (2, 0), (3, 1), (4, 0), (8, 8), (4, 4), (8, 3), (0, 2), (1, 7)):
        wide = torch.full((sum(LENGTHS) * (width + stride) + first,), float("nan"), dtype=dtype)
        view = wide[first:].view(sum(LENGTHS), width + stride)[:, :width]
        view.copy_(tensors[rows])
        changed = {n: (view if n == rows else t).requires_grad_(n in case.tensors) for n, t in tensors.items()}
        got = run(case, changed, offsets_of(LENGTHS))
        if expected is None:
            expected = got
        close(got, expected, 1e-2 if dtype == torch.bfloat16 else 1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_odd_widths(case):
    """Of half types that they are calculated at all."""
    widths, offsets = (1, 2, 3, 7, 8, 9, 15, 31, 33, 127, 129), offsets_of(LENGTHS)
    with all_of_them() as each:
        for width, dtype in itertools.product(widths, (torch.float64, torch.float16)):
            with each(width, dtype):
                sizes = SIZES | {"L": width, "D": width + 1, "Q2": width, "V": width}
                tensors = case.make(LENGTHS, dtype, relu=dtype != torch.float64, **sizes)
                got = run(case, tensors, offsets)
                if dtype == torch.float64:
                    close(got, step(case.truth, tensors, offsets, None))


# Launches


def launches(op, args) -> int:
    before = native._extension.launch_count()
    op(*args)
    return native._extension.launch_count() - before


# At most so many of our own kernels, forward and backward; products and copies that PyTorch makes come on top.
LAUNCHES = {
    "softmax_pool": (1, 1),
    "attention_pool": (2, 2),
    "gated_attention_pool": (2, 2),
    "attention_scores": (1, 1),
    "gated_attention_scores": (1, 1),
    "query_pool": (1, 1),
    "query_scores": (1, 2),
    "weighted_pool": (1, 2),
    "instance_max": (1, 4),
    "dsmil_pool": (3, 4),
    "dsmil": (3, 8),
    "loss_attention_pool": (1, 1),
    "mean_pool": (1, 2),
    "max_pool": (1, 1),
}


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_launches_for_many_small_bags(case):
    """What a batch of small bags costs."""
    lengths = torch.randint(5, 61, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    forward, backward = 0, 0
    for op, args in calls_of(case, lengths, L=64, D=32, K=1, C=2):
        if op._schema.name.endswith("_fwd"):
            forward += launches(op, args)
        else:
            backward += launches(op, args)
    most = LAUNCHES.get(case.op)
    assert most is not None and forward <= most[0] and backward <= most[1], (forward, backward)


# The emulator shows what it should

FAULTS = {  # fault: what is said, in any order of threads
    "barrier-missing": "nan",
    "barrier-divergent": "a barrier that not all threads reach",
    "shuffle-divergent": "a barrier that not all threads reach",
    "copy-unwaited": "nan",
    "copy-waited-late": "nan",
    "copy-uncommitted": "asynchronous copies that were not committed",
    "copy-misaligned": "an asynchronous copy of 8 bytes that is not aligned",
    "vector-misaligned": "misaligned address",
    "shared-read": "AddressSanitizer: heap-buffer-overflow",
    "shared-write": "AddressSanitizer: heap-buffer-overflow",
    "global-read": "AddressSanitizer: heap-buffer-overflow",
    "grid-empty": "invalid configuration",
    "half-warp": "invalid configuration",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Runs a kernel of cuda/faults.cu."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("faults") / "faults"
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"ASAN_OPTIONS": "detect_leaks=0"}
    flags = ["-std=c++20", "-O1", "-g", "-DMILKERNELS_EMULATED", "-Wno-unknown-pragmas"]
    flags += ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{path}" for path in include_paths()]
    sources = [ROOT / "tests" / "cuda" / "faults.cu", ROOT / "csrc" / "cuda" / "emulator.cpp"]
    subprocess.run([compiler, *flags, "-x", "c++", *sources, "-o", program], env=environment, check=True)

    def run(fault, order):
        done = subprocess.run([program, fault, order], env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_shows(fault, order, faults):
    code, said = faults(fault, order)
    assert FAULTS[fault] in said and (code != 0 or FAULTS[fault] == "nan")


@pytest.mark.parametrize("fault", ["none", "barrier-too-late"])
def test_the_order_of_threads_shows_a_race(fault, faults):
    results = {order: faults(fault, order) for order in ORDERS}
    assert all(code == 0 for code, _ in results.values())
    if fault == "none":
        assert {float(said) for _, said in results.values()} == {2016.0}
    else:
        assert len({said for _, said in results.values()}) == len(ORDERS)


def test_host_time():
    """Of both backends' calls, with no driver and no kernel run."""
    if triton.load_error() is not None:
        pytest.skip(triton.load_error())
    command = [sys.executable, "-m", "tools.host_time", "--op", "softmax_pool", "--rounds", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[1], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("│")[1:-1] for line in done.stdout.splitlines() if "softmax_pool" in line]
    assert [(row[0].strip(), row[3].strip()) for row in rows] == [("softmax_pool", "1"), ("softmax_pool", "2")]
