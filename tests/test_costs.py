"""What every op costs, in counts: no more than recorded in costs.json, and no less without the record saying so."""

import json
import re

import pytest

from milkernels import native, triton
from milkernels.testing import CASES
from tools import costs

every_op = pytest.mark.parametrize("op", CASES)
needs_extension = pytest.mark.skipif(native.load_error() is not None, reason=f"{native.load_error()}")
needs_triton = pytest.mark.skipif(triton.load_error() is not None, reason=f"{triton.load_error()}")


@pytest.fixture(scope="module")
def record():
    return json.loads(costs.RECORD.read_text())


@pytest.fixture(scope="module")
def products():
    if (reason := costs.unavailable()) is not None:
        pytest.skip(reason)
    return costs.measure("products")


@pytest.fixture(scope="module")
def allocations():
    return costs.measure("bytes")


@pytest.fixture(scope="module")
def launches():
    return costs.measure("launches")


def told(op, counts, record, *kinds):
    """Complaints about one op, all of whose counts of these kinds must be there."""
    for mode, counted in costs.MODES.items():
        assert counts[op].get(mode, {}).keys() >= set(kinds) & set(counted)
    return "\n".join(costs.complaints(op, counts[op], costs.versions(), record))


@every_op
def test_products(op, products, record):
    assert not (problem := told(op, products, record, "products")), problem


def test_products_are_counted(products):
    assert 0 < products["attention_pool"]["fwd"]["products"] < products["attention_pool"]["step"]["products"]


@needs_extension
@every_op
def test_bytes(op, allocations, record):
    assert not (problem := told(op, allocations, record, "bytes")), problem


@needs_extension
@every_op
def test_bytes_grow_with_scores_alone(op, allocations):
    """The law itself, whatever is recorded; hidden units or a copy of x would be hundreds of bytes."""
    for mode in ("fwd", "step"):
        growth, bound = allocations[op][mode]["growth"], costs.may_grow(CASES[op])
        assert growth <= bound, f"{op} {mode}: {growth:.1f} bytes for each further instance, where {bound:.0f} may be"


@needs_triton
@every_op
def test_launches(op, launches, record):
    assert all(counts["launches"] > 0 for counts in launches[op].values())
    assert not (problem := told(op, launches, record, "launches", "gpu products")), problem


def test_the_record_is_whole_and_of_this_registry(record):
    assert list(record["counts"]) == list(CASES)
    for modes in record["counts"].values():
        assert list(modes) == list(costs.MODES)
        assert all(list(counts) == list(costs.MODES[mode]) for mode, counts in modes.items())
    assert record["versions"].keys() == {"torch", "triton"}


# The guard itself


@pytest.mark.parametrize(
    "kind, measured, recorded, same, expected",
    [
        ("launches", 10, 10, True, None),
        ("launches", 11, 10, True, "11 launches, where 10 are recorded"),
        ("launches", 11, 10, False, "where 10 are recorded"),
        ("launches", 8, 10, True, "better than the 10 recorded: run python -m tools.costs --write"),
        ("launches", 8, 10, False, None),
        ("products", 1, 0, True, "1 products, where 0 are recorded"),
        ("bytes", 1001, 1000, True, "1,001 bytes"),
        ("bytes", 1, None, True, "none recorded"),
    ],
)
def test_judge(kind, measured, recorded, same, expected):
    said = costs.judge(kind, measured, recorded, same)
    assert (said is None) == (expected is None)
    assert expected is None or re.search(expected, said)


def test_complaints_and_the_record(tmp_path, record):
    counts = {"mean_pool": record["counts"]["mean_pool"]}
    costs.write(counts, tmp_path / "costs.json")
    again = json.loads((tmp_path / "costs.json").read_text())
    assert (
        again["counts"] == counts and costs.complaints("mean_pool", counts["mean_pool"], costs.versions(), again) == []
    )
    more = {"fwd": {"launches": counts["mean_pool"]["fwd"]["launches"] + 1}}
    (said,) = costs.complaints("mean_pool", more, costs.versions(), again)
    assert said.startswith("mean_pool fwd: ") and "are recorded" in said
