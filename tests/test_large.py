"""Sizes at the far end: past 2^31 numbers, a million bags, many heads, wide rows, many hidden units."""

import itertools

import pytest
import torch
from calls import Call, check
from functional_cases import takes
from op_cases import needs_extension

import milkernels
from milkernels import testing

fcntl = pytest.importorskip("fcntl")  # of Unix
pytestmark = [pytest.mark.slow, needs_extension]

OPTIONS = {"topk_instances": (("k", 70),)}
# By what is large: bags, sizes by symbol.
SIZES = {
    "64 heads": ((3, 0, 130), {"K": 64, "C": 64, "L": 24, "D": 18, "Q2": 9, "V": 13}),
    "L = 20,000": ((3, 0, 66), {"K": 2, "C": 2, "L": 20_000, "D": 9, "Q2": 5, "V": 7}),
    "D = 4,096": ((3, 0, 66), {"K": 2, "C": 2, "L": 24, "D": 4096, "Q2": 4096, "V": 4096}),
}
OPS = [op for op in testing.SIZES if op != "attention_weights"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_sizes(op, sizes, dtype):
    lengths, symbols = SIZES[sizes]
    if op == "max_pool" and sizes == "L = 20,000":
        pytest.skip("the promise is held column by column, which takes two minutes")
    known = {symbol for size in testing.SIZES[op].values() for symbol in size} & symbols.keys()
    if sizes == "64 heads" and op in ("instance_max", "dsmil"):
        lengths = (66, 0, 130)  # a row for each class to win with
    check(Call(op, lengths, dtype, sizes=tuple((s, symbols[s]) for s in sorted(known)), options=OPTIONS.get(op, ())))


def available() -> int:
    """Bytes of memory, where it can be known."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
    except OSError:
        return 0
    return int(lines["MemAvailable"].split()[0]) * 1024


def arguments(op, n, bags, width, dtype):
    """Tensors of ops by the registry, other than the rows: small, and the same for every width of bags."""
    generator = torch.Generator().manual_seed(0)
    symbols = {"N": n, "B": bags, "L": width, "D": 8, "K": 2, "C": 2, "Q2": 4, "V": 4}
    made = {}
    for name, size in itertools.islice(testing.SIZES[op].items(), 1, None):
        t = torch.randn([symbols.get(s, s) for s in size], generator=generator)
        made[name] = (t / size_of(t)).to(dtype)
    return made


def size_of(t):
    return t.shape[-1] ** 0.5 if t.ndim > 1 else 1.0


def call(op, x, tensors, offsets):
    first = next(iter(testing.SIZES[op]))
    given = {first: x} | tensors | dict(OPTIONS.get(op, ()))
    bags = {"offsets": offsets} if takes(op, "offsets") else {}
    out = getattr(milkernels, op)(**testing.public_arguments(op, given), **bags, backend="native")
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


ROWS, WIDTH, LAST = 1_000_000, 2560, 777  # instances of 2560 numbers, 2^31.25 of them; those of the last bag


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """5 GB of bfloat16; its tests take 13 GB, so one process at a time has them."""
    with open(tmp_path_factory.getbasetemp().parent / "large.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if available() < 16e9:
            pytest.skip(f"needs 16 GB of memory; {available() / 1e9:.0f} are available")
        yield made_rows()


def made_rows():
    x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(10_007, WIDTH, generator=generator).relu_().bfloat16()
    for start in range(0, ROWS, len(block)):
        x[start : start + len(block)] = block[: ROWS - start]
    x[-LAST:] = torch.randn(LAST, WIDTH, generator=generator).relu_().bfloat16()
    assert x.numel() > 2**31
    return x


@pytest.mark.parametrize("op", [op for op in OPS if next(iter(testing.SIZES[op])) == "x"])
def test_past_2_to_the_31_numbers(op, rows):
    """The last bag, all of it past 2^31, is what it is alone; and so is the gradient of its rows."""
    offsets = torch.tensor([0, ROWS - LAST, ROWS])
    tensors = arguments(op, ROWS, 2, WIDTH, torch.bfloat16)
    per_row = {name for name, size in testing.SIZES[op].items() if size[0] == "N"}
    per_bag = {name for name, size in testing.SIZES[op].items() if size[0] == "B"}
    alone = {n: t[-LAST:] if n in per_row else t[-1:] if n in per_bag else t for n, t in tensors.items()}
    x, last = rows.detach().requires_grad_(), rows[-LAST:].detach().clone().requires_grad_()
    got, expected = call(op, x, tensors, offsets), call(op, last, alone, torch.tensor([0, LAST]))
    for g, e in zip(got, expected, strict=True):
        g = g[-len(e) :]
        if not g.is_floating_point():
            g = torch.where(g >= 0, g - (ROWS - LAST), g)
        torch.testing.assert_close(g, e, rtol=1e-2, atol=1e-2)
    at = 0 if got[0].is_floating_point() else 1
    (dx,) = torch.autograd.grad(got[at][-len(expected[at]) :].float().sum(), x)
    (expected_dx,) = torch.autograd.grad(expected[at].float().sum(), last)
    torch.testing.assert_close(dx[-LAST:], expected_dx, rtol=1e-2, atol=1e-2)
    if got[at].shape[0] == 2:
        assert not dx[:10_007].any()


@pytest.mark.parametrize("op", OPS)
def test_a_million_bags_of_one(op):
    """As a thousand of them are."""
    n, few, width = 1_000_000, 1000, 4
    tensors = arguments(op, n, n, width, torch.float32)
    cut = {name for name, size in testing.SIZES[op].items() if size[0] in ("N", "B")}
    first = torch.randn(n, width, generator=torch.Generator().manual_seed(2))
    for start in (0, n - few):
        part = {name: t[start : start + few] if name in cut else t for name, t in tensors.items()}
        whole, alone = first.clone().requires_grad_(), first[start : start + few].clone().requires_grad_()
        got, expected = call(op, whole, tensors, torch.arange(n + 1)), call(op, alone, part, torch.arange(few + 1))
        for g, e in zip(got, expected, strict=True):
            g = g[start : start + few]
            torch.testing.assert_close(g if g.is_floating_point() else torch.where(g >= 0, g - start, g), e)
        sums = [torch.autograd.grad(o[0].square().sum(), x)[0] for o, x in ((got, whole), (expected, alone))]
        torch.testing.assert_close(sums[0][start : start + few], sums[1])
