"""What every op costs, in counts: no more than recorded in costs.json, and no less without the record saying so."""

import json
import re

import pytest

from milkernels import native, triton
from milkernels.bench import cost
from milkernels.testing import CASES

every_op = pytest.mark.parametrize("op", CASES)
needs_extension = pytest.mark.skipif(native.load_error() is not None, reason=f"{native.load_error()}")
needs_triton = pytest.mark.skipif(triton.load_error() is not None, reason=f"{triton.load_error()}")


@pytest.fixture(scope="module")
def record():
    return json.loads(cost.RECORD.read_text())


@pytest.fixture(scope="module")
def instructions(record):
    """Of all ops, and the versions: one process under Valgrind, for PyTorch takes long to import there."""
    if (reason := cost.unavailable()) is not None:
        pytest.skip(reason)
    counts, found = cost.instructions()
    if found["module"] != record["versions"]["module"]:
        pytest.skip(f"recorded of {record['versions']['module']}, and here {found['module']} runs under Valgrind")
    return counts, found


@pytest.fixture(scope="module")
def allocations():
    return cost.allocations()


@pytest.fixture(scope="module")
def launches():
    return cost.launches_of_triton()


def told(op, counts, found, record, kinds):
    """Complaints about one op, all of whose counts of these kinds must be there."""
    assert all(counts[op][mode].keys() >= set(kinds) for mode in cost.MODES)
    return "\n".join(cost.complaints(op, cost.merged({op: counts[op]})[op], found, record))


@every_op
def test_instructions(op, instructions, record):
    counts, found = instructions
    assert all(counts[op][mode]["instructions"] > 0 for mode in cost.MODES)
    assert not (problem := told(op, counts, found, record, cost.OF_INSTRUCTIONS)), problem


@needs_extension
@every_op
def test_bytes(op, allocations, record):
    assert not (problem := told(op, allocations, cost.versions(), record, ["bytes"])), problem


@needs_extension
@every_op
def test_bytes_grow_with_scores_alone(op, allocations):
    """The law itself, whatever is recorded; hidden units or a copy of x would be hundreds of bytes."""
    for mode in cost.MODES:
        growth, bound = allocations[op][mode]["growth"], cost.may_grow(CASES[op])
        assert growth <= bound, f"{op} {mode}: {growth:.1f} bytes for each further instance, where {bound:.0f} may be"


@needs_triton
@every_op
def test_launches(op, launches, record):
    assert all(counts["launches"] > 0 for counts in launches[op].values())
    assert not (problem := told(op, launches, cost.versions(), record, ["launches", "gpu products"])), problem


def test_the_record_is_whole_and_of_this_registry(record):
    assert list(record["counts"]) == list(CASES)
    for modes in record["counts"].values():
        assert list(modes) == list(cost.MODES)
        assert all(list(counts) == list(cost.KINDS) for counts in modes.values())
    assert {name for kind in cost.KINDS.values() for name in kind.versions} <= record["versions"].keys()


# The guard itself


@pytest.mark.parametrize(
    "kind, measured, recorded, same, expected",
    [
        ("launches", 10, 10, True, None),
        ("launches", 11, 10, True, "11 launches, 1.100 times, where 10 are recorded"),
        ("launches", 11, 10, False, "where 10 are recorded"),
        ("launches", 8, 10, True, "better than the 10 recorded: run python -m milkernels.bench.cost --write"),
        ("launches", 8, 10, False, None),
        ("products", 1, 0, True, "1 products, where 0 are recorded"),
        ("bytes", 1001, 1000, True, "1,001 bytes"),
        ("instructions", 1020, 1000, True, None),
        ("instructions", 1021, 1000, True, "1.021 times.*at most 1.02 times"),
        ("instructions", 1300, 1000, False, None),
        ("instructions", 1301, 1000, False, "at most 1.3 times"),
        ("library", 899, 1000, True, "better"),
        ("library", 1, None, True, "none recorded"),
    ],
)
def test_judge(kind, measured, recorded, same, expected):
    said = cost.judge(kind, measured, recorded, same)
    assert (said is None) == (expected is None)
    assert expected is None or re.search(expected, said)


DUMP = """\
version: 1
positions: line
events: Ir

ob=(1) /somewhere/milkernels/_C_avx2.so
fl=(1) ???
fn=(1) tile
0 100
cob=(2) /somewhere/libtorch_cpu.so
cfi=(2) blas.cpp
cfn=(2) at::native::cpublas::brgemm(long, long)
calls=3 0
0 9000
+4 20
* 1
fi=(2)
5 7

ob=(2)
fl=(2)
fn=(2)
0 300
cfn=(3) at::_ops::mm_out::call(at::Tensor const&)
calls=2 0
-2 50
cfn=(4) at::_ops::mm::redispatch(at::Tensor const&)
calls=2 0
* 50
ob=(3) ???
fn=(5) 0x0000000004a1c000
0 1000
ob=(4) /somewhere/libpython3.so
fn=(6) eval
0 5000
ob=(1)
fn=(1)
0 2

totals: 6430
"""


def test_parse():
    """Own instructions by object, never those of callees; names said once; calls wherever they are made."""
    instructions, calls = cost.parse(DUMP)
    assert {path.rpartition("/")[2]: count for path, count in instructions.items()} == {
        "_C_avx2.so": 130,
        "libtorch_cpu.so": 300,
        "???": 1000,
        "libpython3.so": 5000,
    }
    assert sum(instructions.values()) == 6430
    assert calls["at::native::cpublas::brgemm(long, long)"] == 3
    assert cost._counted(DUMP) == {"instructions": 130, "library": 1300, "products": 5}
