"""The numbers of every op on every leg (legs.py): against the float64 oracle, at sizes where tiles, chunks, heads and
vectors are cut; what masked rows, other bags, layouts, threads and stale memory must not change; and what is chosen.

A launch costs an interpreter milliseconds for each program, and a GPU a compilation for each new shape, so these legs
have the smallest sizes that cut tiles, segments and heads.  What one leg alone has is in a file of its own.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable

import op_cases
import pytest
import torch
from legs import LEGS, ONE_OF_EACH, ORDERS, VARIANTS, all_of_them, at, by_leg, threads_in_order
from op_cases import CASES, COMPILED, NAN, PLAIN, POOLS, close, cotangents, offsets_of, same_bits, step, threads
from oracle import INF
from torch import Tensor

import milkernels
from milkernels import testing, triton
from milkernels.ops import contract

# Empty bags first, last and in between; one instance; whole tiles of 64 rows, a row more, a row less.
RAGGED = (0, 1, 64, 0, 0, 63, 65, 5, 130, 0)
# More than 2048 rows: chunks of 256, a whole one and bags that cross them.
LONG = (0, 256, 2000, 1, 511, 0)
NARROW = {"L": 5, "D": 3, "K": 1, "C": 1, "Q2": 2, "V": 1}
ODD = {"L": 37, "D": 41, "K": 2, "C": 2, "Q2": 9, "V": 33}
FIVE = {"L": 37, "D": 18, "K": 5, "C": 5, "Q2": 17, "V": 7}
FEW = {"L": 12, "D": 7, "K": 2, "C": 2, "Q2": 3, "V": 4}
TINY = op_cases.LENGTHS  # of the reference, which cuts nothing

# For the interpreter.  With and without a mask there is a bag whose rows lie in two segments of 64.
SHORT = (0, 1, 64, 0, 63, 66, 0)
HEADS = {"L": 20, "D": 18, "K": 5, "C": 5, "Q2": 17, "V": 7}  # more heads than share a read
SIX = {"L": 6, "D": 5, "K": 2, "C": 2, "Q2": 3, "V": 4}
# For a GPU.  No number of rows is a multiple of 16, which would have kernels compiled once more; so would other sizes.
GPU_LONG = (0, 256, 2000, 1, 510, 0)
GPU_SHORT = (64, 0, 5, 130)
# For the emulator's order of threads: a block for each bag; several blocks for a bag; the same, of more rows each.
BLOCKS, LONE, MANY = (5, 0, 40, 1, 70, 3), (150,), (90, 1970)
BLOCK = {"L": 21, "D": 18, "K": 3, "C": 3, "Q2": 9, "V": 13}

SINGLE, DOUBLE, HALF, SHORT_HALF = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (SINGLE, HALF, SHORT_HALF, DOUBLE)


@pytest.fixture(autouse=True)
def enter(request):
    if (leg := request.node.callspec.params["leg"]).name == "gpu_triton" and leg.missing is None:
        request.getfixturevalue("compiled_kernels")


def some_mask(n: int) -> Tensor:
    """Holes everywhere; a tile and a bag with no real row at all, and a chunk where there are chunks."""
    mask = torch.rand(n, generator=torch.Generator().manual_seed(5)) > 0.3
    for start, end in (64, 128), (256, 512) if n > 2048 else (0, 0), (2256, 2257):
        mask[start:end] = False
    return mask


def few_holes(n: int) -> Tensor:
    """For the lengths of the reference: the second to last bag is masked as a whole."""
    return torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1], dtype=torch.bool)[:n]


def mixed_poison(mask, dtype) -> Tensor:
    """NaN and both infinities, one for each masked row."""
    return torch.tensor([NAN, INF, -INF]).repeat(len(mask))[: (~mask).sum(), None].to(dtype)


@dataclasses.dataclass(frozen=True)
class Shape:
    lengths: tuple
    index: torch.dtype | None = torch.int64  # of offsets; None: there are none
    mask: Callable[[int], Tensor] | None = None
    sizes: dict = dataclasses.field(default_factory=dict)

    def offsets(self):
        return None if self.index is None else offsets_of(self.lengths, self.index)

    def mask_of_rows(self):
        return None if self.mask is None else self.mask(sum(self.lengths))


# Values and gradients


def of_the_reference(lengths):
    index = None if len(lengths) == 1 else torch.int64
    return tuple(Shape(lengths, index, mask) for mask in (None, few_holes))


N = sum(TINY)
MANY_HEADS = tuple(Shape(BLOCKS, sizes=BLOCK | {"K": heads, "C": heads, "L": 40}) for heads in (31, 32))


@by_leg(
    "shapes",
    compiled=[
        at((Shape(RAGGED, torch.int64, None, NARROW),), label="narrow"),
        at((Shape(RAGGED, torch.int32, some_mask, ODD),), label="two-heads-mask"),
        at(
            (Shape(RAGGED, torch.int64, some_mask, {"L": 70, "D": 24, "K": 3, "C": 3, "Q2": 5, "V": 70}),),
            label="three-heads-mask",
        ),
        at(
            (Shape(RAGGED, torch.int32, None, {"L": 131, "D": 64, "K": 9, "C": 9, "Q2": 33, "V": 16}),),
            label="nine-heads",
        ),
        at((Shape((328,), None, some_mask, FIVE),), label="one-bag-mask"),
        at((Shape((2500,), None, None, NARROW | {"K": 2, "C": 2}),), label="one-long-bag"),
        at((Shape(LONG, torch.int64, some_mask, FEW),), label="long-mask"),
    ],
    emulated=[at(MANY_HEADS, cases=PLAIN, label="many-heads")],
    reference=[
        at(of_the_reference(TINY) + of_the_reference((0, N)), label="bags"),
        at(of_the_reference((N,)) + of_the_reference((0,)), label="one-bag"),
    ],
    interpreted=[
        at((Shape(SHORT, torch.int32, None, HEADS),), label="five-heads"),
        at((Shape(SHORT, torch.int64, some_mask, ODD),), label="two-heads-mask"),
        at((Shape((133,), None, some_mask, HEADS | {"K": 1, "C": 1}),), label="one-bag-mask"),
        at((Shape((0, 256, 2000, 1, 300), torch.int64, some_mask, FEW),), cases=PLAIN, slow=True, label="long-mask"),
    ],
    gpu=[
        at((Shape(RAGGED, torch.int64, some_mask, ODD),), cases=PLAIN, label="ragged-mask"),
        at((Shape(RAGGED, torch.int64, some_mask, ODD),), cases=VARIANTS, slow=True, label="ragged-mask"),
        at((Shape(GPU_LONG, torch.int64, some_mask, ODD),), cases=PLAIN, label="long-mask"),
        at((Shape((200,), None, None, ODD),), cases=PLAIN, slow=True, label="one-bag"),
    ],
)
def test_oracle(leg, case, shapes):
    with all_of_them() as each:
        for shape in shapes:
            with each(shape):
                tensors, offsets, mask = case.make(shape.lengths, **shape.sizes), shape.offsets(), shape.mask_of_rows()
                close(leg.run(case, tensors, offsets, mask), step(case.truth, tensors, offsets, mask))


@by_leg(
    "shape",
    compiled=[at(Shape((70, 5, 30), sizes=ODD))],
    interpreted=[
        at(
            Shape((30, 5), sizes=SIX),
            cases=(
                *(*PLAIN, "attention_pool-embed-gelu", "query_pool-embed-dropout", "instance_max-embed-dropout"),
                *("loss_attention_pool-embed", "dsmil-embed-mlp-q-relu-v"),
            ),
            slow=True,
        )
    ],
)
def test_some_gradients_only(leg, case, shape):
    """Of any of the outputs; and for each input alone, as where features or parameters are frozen."""
    tensors, offsets = case.make(shape.lengths, **shape.sizes), shape.offsets()
    mask = torch.arange(sum(shape.lengths)) % 4 > 0
    whole = leg.run(case, tensors, offsets, mask)
    outputs = [i for i in range(4) if f"output {i}" in whole and whole[f"output {i}"].is_floating_point()]
    for wanted in itertools.chain.from_iterable(itertools.combinations(outputs, n) for n in range(len(outputs))):
        got = leg.run(case, tensors, offsets, mask, wanted)
        close(got, step(case.truth, tensors, offsets, mask, wanted))
    for name in case.tensors:
        alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        for key, value in leg.run(case, alone, offsets, mask).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-12, atol=1e-12)


@by_leg(
    "checks lengths sizes",
    # Where a maximum has no derivative there is nothing to check.  The first bag is masked, the fourth crosses tiles.
    compiled=[
        at(
            ("gradcheck",),
            (3, 0, 62, 3, 1),
            {"L": 3, "D": 3, "K": 2, "C": 2, "Q2": 2, "V": 2},
            cases=(name for name in COMPILED if not name.endswith("-ties")),
        )
    ],
    reference=[at(("gradcheck", "gradgradcheck"), (2, 0, 3), {}, cases=POOLS)],
)
def test_gradcheck(leg, case, checks, lengths, sizes):
    n = sum(lengths)
    mask = torch.arange(n) % 6 != 4 if n > 5 else torch.tensor([True, True, True, False, True])
    if n > 5:
        mask[:3] = False
    with threads(1):  # thousands of tiny calls: waking threads would be most of the time
        for check in checks:
            op_cases.check_gradients(case, leg.backend, lengths, mask, getattr(torch.autograd, check), **sizes)


def promises(*types, how, label="", **row):
    """A row for each type of ``x``, or pair of it and that of the parameters."""
    pairs = [t if isinstance(t, tuple) else (t, None) for t in types]
    names = ["-".join(str(t).removeprefix("torch.") for t in pair if t is not None) for pair in pairs]
    return [at(*pair, how, label=label + name, **row) for pair, name in zip(pairs, names, strict=True)]


MIXED = (HALF, SINGLE)
PROMISED = (SINGLE, HALF, SHORT_HALF, MIXED, (SHORT_HALF, SINGLE))
MANY_ROWS = {"lengths": (300, 0, 2100), "seeds": 2} | ODD | {"L": 24}
ON_GPU = {"lengths": GPU_SHORT, "seeds": 2} | ODD


@by_leg(
    "dtype parameter_dtype how",
    compiled=[
        *promises(*PROMISED, how={"lengths": (70, 5, 130), "seeds": 3} | FIVE),
        *promises(SINGLE, HALF, how=MANY_ROWS, cases=PLAIN, label="many-rows-"),
    ],
    reference=promises(*PROMISED, how={"lengths": (70, 5, 40), "seeds": 5}),
    interpreted=promises(*(SINGLE, HALF, SHORT_HALF, MIXED), how={"lengths": (66, 5), "seeds": 2} | HEADS),
    gpu=[
        *promises(HALF, SINGLE, how=ON_GPU, cases=PLAIN),
        *promises(HALF, how=ON_GPU, cases=VARIANTS, slow=True),
        *promises(SHORT_HALF, MIXED, how=ON_GPU, cases=PLAIN, slow=True),
    ],
)
def test_error_promise(leg, case, dtype, parameter_dtype, how):
    kept = leg.promise(case, dtype, parameter_dtype, **how)
    assert kept.ok, kept.broken()


@by_leg(
    "how",
    compiled=[at({"lengths": (70, 5, 130), "seeds": 3}, cases=("softmax_pool", "segment_softmax"))],
    interpreted=[at({"lengths": (70, 5), "seeds": 1} | ODD, cases=("softmax_pool", "segment_softmax"))],
)
def test_error_promise_of_scores_far_from_zero(leg, case, how):
    def spread(tensors):
        """Half of the weights are 0, the others lie within a few factors of e.  The exponential of any score overflows
        or is 0, and one rounding of their log-sum-exp is 3e-5, which weights taken as exp(score - lse) would show."""
        tensors["scores"] += 500
        tensors["scores"][::2] -= 1e4

    kept = leg.promise(dataclasses.replace(case, edit=spread), SINGLE, **how)
    assert kept.ok, kept.broken()


@by_leg("lengths sizes seeds", compiled=[at((70, 5, 130), FIVE, 3)], interpreted=[at((70, 5), HEADS, 2)])
def test_autocast(leg, case, lengths, sizes, seeds):
    """No output and no gradient is worse than twice the reference's there, and types are the same."""
    # In more bags where one row may have nearly all the weight of one, and its error would be all that is compared.
    if leg.name == "interpreted" and case.op == "loss_attention_pool":
        lengths = (30, 5, 25, 7, 20)
    offsets, runs = offsets_of(lengths), []
    for seed in range(seeds):
        tensors = case.make(lengths, SINGLE, seed, relu=True, **sizes)
        with torch.autocast("cpu", HALF):
            both = [step(case.ours(backend), tensors, offsets, None) for backend in (leg.backend, "reference")]
        for name, t in both[0].items():
            assert t.dtype == both[1][name].dtype, name
        runs.append((*both, op_cases.exactly(case, tensors, offsets)))
    ours, reference, exact = (op_cases.together(results) for results in zip(*runs, strict=True))
    kept = testing.error_promise(ours, reference, exact, HALF)
    assert kept.ok, kept.broken()


@pytest.mark.filterwarnings("ignore:milkernels")  # of native, which leaves float64 parameters to the reference
@by_leg("other", compiled=[at(other, label=str(other)) for other in (DOUBLE, HALF, SHORT_HALF)])
def test_types_are_those_of_the_reference(leg, case, other):
    """Whichever single tensor has another type than float32."""
    lengths = (70, 5, 130)
    with all_of_them() as each:
        for name in case.tensors | case.fixed:
            tensors = case.make(lengths, SINGLE, relu=True, **ODD)
            tensors[name] = tensors[name].detach().to(other).requires_grad_(name in case.tensors)
            got, expected = (step(case.ours(b), tensors, offsets_of(lengths), None) for b in (None, "reference"))
            for key, value in got.items():
                with each(name, key):
                    assert value.dtype == expected[key].dtype
                    a, b = (t.double().masked_fill(t.isinf(), 0) for t in (value, expected[key]))
                    assert (a - b).norm() <= 4 * torch.finfo(HALF).eps * b.norm()


# What must not change anything


POISONS = tuple(lambda mask, dtype, value=value: value for value in (NAN, INF, -INF))


@by_leg(
    "shape dtype poisons",
    compiled=[
        at(Shape(RAGGED, mask=some_mask, sizes=ODD), t, (mixed_poison,), label=str(t)) for t in (SINGLE, HALF, DOUBLE)
    ],
    reference=[
        at(Shape(TINY, mask=few_holes), SINGLE, POISONS, label="bags"),
        at(Shape((N,), None, few_holes), SINGLE, POISONS, label="one-bag"),
    ],
    interpreted=[at(Shape(SHORT, mask=some_mask, sizes=ODD), HALF, (mixed_poison,))],
    gpu=[at(Shape(RAGGED, mask=some_mask, sizes=ODD), SINGLE, (mixed_poison,), cases=PLAIN)],
)
def test_masked_rows_do_not_leak(leg, case, shape, dtype, poisons):
    """A hole in every tile, a masked tile and bag.  That they are as if absent, the oracle says above."""
    mask = shape.mask_of_rows()
    with all_of_them() as each:
        for i, poison in enumerate(poisons):
            with each("poison", i):
                op_cases.check_masked_rows_do_not_leak(
                    *(case, leg.backend, shape.lengths, shape.offsets(), mask, poison(mask, dtype), dtype),
                    **shape.sizes,
                )


@by_leg(compiled=[at()], reference=[at()])
def test_padded_batch(leg, case):
    """As it lies, with NaN for padding: the oracle never looks at that, so this is the ragged batch."""
    lengths, longest = (30, 1, 0, 70), 70
    padded = case.make((longest,) * len(lengths), **ODD)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    for name, t in padded.items():
        if case.has_rows(name):
            t.data[~real.flatten()] = NAN
    bags = milkernels.Bags.from_padded(next(iter(padded.values())).detach().unflatten(0, real.shape), real)
    got = leg.run(case, padded, bags.offsets, bags.mask)
    close(got, step(case.truth, padded, bags.offsets, bags.mask))
    for name in case.tensors:
        if case.has_rows(name):
            assert not got[f"gradient of {name}"][~bags.mask].any()


# (lengths, bag, row): the row lies in a tile, and in vectors of rows, that it shares with other bags.
IN_TILES = (((60, 6, 70, 0, 30), 1, 65), ((70, 300, 2000, 5), 1, 300))


@by_leg(
    "dtype poison places sizes",
    compiled=[at(t, p, IN_TILES, FIVE, label=f"{t}-{p}") for t in (SINGLE, HALF) for p in (NAN, INF)],
    reference=[at(SINGLE, NAN, ((TINY, 3, 6),), {})],
    interpreted=[
        at(SINGLE, NAN, IN_TILES[:1], ODD, cases=ONE_OF_EACH, slow=True, label="nan"),
        at(SINGLE, INF, IN_TILES[:1], ODD, cases=PLAIN, slow=True, label="inf"),
    ],
    gpu=[at(SINGLE, NAN, ((RAGGED, 6, 130),), ODD, cases=PLAIN)],
)
def test_nan_stays_in_its_bag(leg, case, dtype, poison, places, sizes):
    for lengths, bag, row in places:
        op_cases.check_nan_stays_in_its_bag(case, leg.backend, lengths, bag, row, dtype, poison, **sizes)


@by_leg(compiled=[at(cases=("softmax_pool",))])
def test_nan_behind_a_score_that_one_head_does_not_count(leg, case):
    tensors = case.make(RAGGED, **FIVE)
    with torch.no_grad():
        tensors["x"][[1, 80, 200, 210]] = NAN
        tensors["scores"][[1, 80, 200], 0] = -INF
    offsets = offsets_of(RAGGED)
    got = leg.run(case, tensors, offsets)
    close(got, step(case.truth, tensors, offsets, None), equal_nan=True)
    assert got["output 0"][5, 0].isfinite().all() and got["output 0"][5, 1].isnan().all()


@by_leg(
    "lengths dtypes sizes",
    compiled=[at(((), (0,), (0, 0), (1,), (0, 1, 0), None), (DOUBLE, HALF), {})],
    interpreted=[at(((), (0,), (0, 0), (1,), None), (DOUBLE,), {}, cases=ONE_OF_EACH)],
    gpu=[at(((), (0, 0), (1,), None), (DOUBLE,), ODD, cases=PLAIN, slow=True)],
)
def test_hardly_anything(leg, case, lengths, dtypes, sizes):
    with all_of_them() as each:
        for these, dtype in itertools.product(lengths, dtypes):
            with each(these, dtype):
                offsets = None if these is None else offsets_of(these)
                tensors = case.make((0,) if these is None else these, dtype, relu=True, **sizes)
                expected = step(op_cases.Case.ours(case, "reference"), tensors, offsets, None)
                close(leg.run(case, tensors, offsets), expected, 1e-10 if dtype == DOUBLE else 0.02)


def other_layouts(t):
    """The same numbers: inside wider rows, every second row, transposed."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 9), NAN, dtype=t.dtype)
    wide[..., 3:-6] = t
    yield wide[..., 3:-6]
    yield t.repeat_interleave(2, 0)[::2]
    if t.ndim > 1:
        yield t.mT.contiguous().mT


@by_leg(
    "dtype tolerance shape",
    compiled=[
        at(DOUBLE, 1e-10, Shape((90, 0, 40), sizes=ODD), label="float64"),
        at(HALF, 1e-2, Shape((90, 0, 40), sizes=ODD), label="bfloat16"),
    ],
    interpreted=[
        at(DOUBLE, 1e-10, Shape((40, 0, 30), sizes=SIX), cases=(*PLAIN, "attention_pool-embed-gelu"), slow=True)
    ],
)
def test_layouts(leg, case, dtype, tolerance, shape):
    tensors, offsets = case.make(shape.lengths, dtype, **shape.sizes), shape.offsets()
    expected = leg.run(case, tensors, offsets)
    for name, t in tensors.items():
        for other in other_layouts(t.detach()):
            changed = tensors | {name: other.requires_grad_(t.requires_grad)}
            close(leg.run(case, changed, offsets), expected, tolerance)
    rows = next(iter(case.tensors))
    same = tensors[rows].detach()[:1].expand_as(tensors[rows])
    both = [leg.run(case, tensors | {rows: t.requires_grad_()}, offsets) for t in (same, same.clone())]
    close(*both, tolerance)


@by_leg(compiled=[at()], interpreted=[at(cases=ONE_OF_EACH)])
def test_layouts_of_the_gradients_that_come_back(leg, case):
    """``sum().backward()`` sends one number, expanded; what follows a transposition sends columns."""
    lengths = (90, 0, 40)
    tensors = case.make(lengths, **ODD)
    leaves = [t for t in tensors.values() if t.requires_grad]
    outputs = [o for o in case.ours(leg.backend)(tensors, offsets_of(lengths), None) if o.is_floating_point()]
    ones = [torch.ones((), dtype=o.dtype).expand_as(o) for o in outputs]
    columns = [c.mT.contiguous().mT for c in cotangents(outputs)]
    for sent in (ones, columns):
        dense = [s.contiguous() for s in sent]
        got, expected = (
            torch.autograd.grad(outputs, leaves, g, retain_graph=True, materialize_grads=True) for g in (sent, dense)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# Of one number of threads or another, where a library or an elementwise operator would cut its work by them; in one
# order of an emulated block's threads or another, where a result that changes was a race: a barrier is missing.
THREADS = tuple(functools.partial(threads, count) for count in (1, 2, 3, 2))
IN_ORDER = tuple(functools.partial(threads_in_order, order) for order in ORDERS)
AGAIN = (contextlib.nullcontext,) * 5


@by_leg(
    "lengths dtype sizes ways masked",
    native=[
        at(lengths, dtype, FIVE, THREADS, False, label=f"{label}-{dtype}")
        for label, lengths in {
            "one-tile": (50,),
            "one-bag": (3000,),
            "ragged": RAGGED,
            "long": (700, 0, 3, 5000),
            "many-bags": (2,) * 1500,
        }.items()
        for dtype in (SINGLE, HALF, DOUBLE)
    ],
    emulated=[
        at(BLOCKS, SINGLE, BLOCK, IN_ORDER, True, label="float32"),
        at(BLOCKS, HALF, BLOCK, IN_ORDER, True, label="bfloat16"),
        at(LONE, DOUBLE, BLOCK, IN_ORDER, True, label="lone-float64"),
        at(MANY, SINGLE, BLOCK, IN_ORDER, True, label="many-rows-float32"),
    ],
    interpreted=[
        at(
            *(SHORT, SINGLE, HEADS, AGAIN[:2], False),
            cases=(
                *("gated_attention_pool", "dsmil_pool", "dsmil-mlp-q-relu-v", "instance_max", "max_pool"),
                "gated_attention_pool-embed-dropout",
            ),
            slow=True,
        )
    ],
    gpu=[at(GPU_LONG, SINGLE, ODD, AGAIN, True, cases=PLAIN)],
)
def test_same_bits_again(leg, case, lengths, dtype, sizes, ways, masked):
    tensors, runs = case.make(lengths, dtype, **sizes), []
    mask = torch.arange(sum(lengths)) % 7 > 0 if masked else None
    for way in ways:
        with way():
            runs.append(leg.run(case, tensors, offsets_of(lengths), mask))
    for other in runs[1:]:
        same_bits(other, runs[0])


@by_leg(**{leg: [at(cases=("attention_scores",))] for leg in ("compiled", "reference", "interpreted", "gpu")})
def test_dropout_mask_is_that_of_the_definition(leg, case):
    """Where every unit has weight 1 and value 1, a score counts the kept units, so one flipped bit would show."""
    rows, units, seed, p = 300, 72, 2**63 - 5, 0.25
    x, v, v_bias, w = (
        t.to(leg.device) for t in (torch.zeros(rows, 4), torch.zeros(units, 4), torch.ones(units), torch.eye(units))
    )
    options = {"activation": "identity", "dropout_p": p, "seed": seed, "backend": leg.backend}
    keep = testing.dropout_keep(seed, rows, units, 0, p)
    scores = milkernels.attention_scores(x, (v, v_bias), w, **options).cpu()
    assert torch.equal(scores != 0, keep)
    torch.testing.assert_close(scores[keep], torch.full_like(scores[keep], 1 / (1 - round(p * 65536) / 65536)))
    gated = milkernels.gated_attention_scores(x, (v, v_bias), (v, v_bias), w, **options).cpu()
    assert torch.equal(gated != 0, keep & testing.dropout_keep(seed, rows, units, 1, p))


# Choices


@by_leg(
    "dtype",
    compiled=[at(t, cases=("instance_max", "max_pool", "dsmil_pool", "topk_instances"), label=str(t)) for t in DTYPES],
)
def test_the_lowest_of_equal_rows_wins_across_vectors_tiles_and_chunks(leg, case, dtype):
    n, best = 2300, [2299, 700, 513, 512, 300, 255, 64, 63, 9, 8, 3]
    rows = torch.zeros(n, 3, dtype=dtype)
    eye, backend = torch.eye(3, dtype=dtype), leg.backend
    calls = {
        "instance_max": lambda o: milkernels.instance_max(rows, eye, o, backend=backend).indices,
        "max_pool": lambda o: milkernels.max_pool(rows, o, backend=backend).indices,
        "dsmil_pool": lambda o: milkernels.dsmil_pool(rows, rows, eye, o, backend=backend).critical,
        "topk_instances": lambda o: milkernels.topk_instances(rows, 1, o, backend=backend).indices[..., 0],
    }
    for i, row in enumerate(best):
        rows[row, 1] = 2.0
        assert calls[case.op](None).tolist() == [[0, row, 0]]
        second = [0, row, 0] if row < 100 else [100, row, 100]
        first = [0, row if row < 100 else 0, 0]
        later = [100, min(r for r in best[: i + 1] if r >= 100), 100]
        assert calls[case.op](offsets_of((100, n - 100))).tolist() == [first, later if row < 100 else second]


MAXIMA = ("instance_max", "max_pool", "dsmil_pool")


@by_leg("dtype", compiled=[at(t, cases=MAXIMA, label=str(t)) for t in DTYPES])
def test_padding_never_wins(leg, case, dtype):
    """Masked rows with the largest numbers, by far, where code that multiplies by the mask lets them win."""
    lengths = (70, 5, 130, 3)
    offsets, mask = offsets_of(lengths), torch.arange(208) % 3 == 1
    mask[205:] = False
    tensors = {n: t.detach() for n, t in case.make(lengths, dtype, relu=True).items()}
    tensors["x"] = (-1 - tensors["x"]).masked_fill(~mask[:, None], 0)  # padding by 0 beats every real row
    for name in ("weight", "bias", "instance_logits"):
        if name in tensors:
            tensors[name] = tensors[name].abs()
    if "instance_logits" in tensors:
        tensors["instance_logits"] = (-tensors["instance_logits"]).masked_fill(~mask[:, None], 100)
    got, expected = (f(tensors, offsets, mask) for f in (case.ours(leg.backend), case.truth))
    i = {"instance_max": 1, "max_pool": 1, "dsmil_pool": 3}[case.op]
    assert mask[got[i][:3]].all() and (got[i][3] == -1).all()
    if case.op != "instance_max" or dtype in (SINGLE, DOUBLE):  # half logits are rounded in eager
        assert torch.equal(got[i], expected[i])
    if case.op == "instance_max":
        values, indices, logits = got
        assert torch.equal(values[:3], logits.gather(0, indices[:3])) and (values[3] == -INF).all()
        assert (values[:3] < 1).all() and (logits[~mask] == -INF).all()


@by_leg("dtype", compiled=[at(t, cases=("instance_max",), label=str(t)) for t in DTYPES])
def test_the_gradient_of_a_maximum_goes_to_its_row(leg, case, dtype):
    lengths = (70, 0, 5, 130)
    offsets, mask = offsets_of(lengths), torch.arange(205) % 5 > 0
    tensors = case.make(lengths, dtype, relu=True)
    values, indices, _ = case.ours(leg.backend)(tensors, offsets, mask)
    assert (values[1] == -INF).all() and (indices[1] == -1).all()
    sent = torch.arange(1.0, 13).reshape(4, 3).to(values.dtype)
    x, weight, bias = torch.autograd.grad(values, [tensors[n] for n in ("x", "weight", "bias")], sent)
    rows, expected = torch.zeros(205, 3).double(), torch.tensor([True, False, True, True])
    for b in (0, 2, 3):
        for c in range(3):
            rows[indices[b, c], c] += sent[b, c].double()
    tolerance = 1e-5 if dtype in (SINGLE, DOUBLE) else 0.02
    for got, want in (
        (x, rows @ tensors["weight"].double()),
        (weight, rows.T @ tensors["x"].double()),
        (bias, sent[expected].double().sum(0)),
    ):
        torch.testing.assert_close(got.double(), want.detach(), rtol=tolerance, atol=tolerance)
    assert not x[torch.ones(205, dtype=torch.bool).index_fill(0, indices[[0, 2, 3]].unique(), False)].any()


@by_leg(
    "lengths",
    compiled=[at((5, 0, 70, 130), cases=MAXIMA, label="bags"), at((205,), cases=MAXIMA, label="one-bag")],
    interpreted=[at((5, 0, 70, 130), cases=MAXIMA)],
)
def test_nan_wins(leg, case, lengths):
    """As in torch.max: the first of several, over larger numbers before and behind it."""
    tensors, offsets = case.make(lengths), offsets_of(lengths)
    chooser = tensors["instance_logits" if case.op == "dsmil_pool" else "x"].data
    chooser[[30, 160]] = INF if case.op == "max_pool" else 1e3
    chooser[[40, 41, 140, 170]] = NAN
    got = leg.run(case, tensors, offsets)
    close(got, step(case.truth, tensors, offsets, None), equal_nan=True)
    indices = got["output 3" if case.op == "dsmil_pool" else "output 1"]
    assert indices[-1].unique().item() == (40 if len(lengths) == 1 else 140)


def _numbers_that_tie(lengths, dtype):
    """Many ties, NaN, both infinities and both zeros."""
    generator, n = torch.Generator().manual_seed(3), sum(lengths)
    scores = torch.randint(-4, 5, (n, 5), generator=generator).to(dtype) / 2
    scores[:, 1] = torch.randn(n, generator=generator).to(dtype)
    for column, value in ((2, NAN), (2, -INF), (3, INF), (3, -INF), (4, -0.0), (4, NAN)):
        scores[torch.rand(n, generator=generator) < 0.2, column] = value
    scores[:, 4] = scores[:, 4].masked_fill(scores[:, 4] > 0, -INF)
    return scores, torch.rand(n, generator=generator) > 0.4


EVERY_ONE = tuple(itertools.product((1, 2, 64, 131, 700), (False, True), (False, True)))  # k, with mask, as one bag
A_FEW = ((1, False, False), (64, True, False), (331, False, False))


@by_leg(
    "dtype largest lengths calls",
    compiled=[
        at(t, largest, (RAGGED, (600,), (0, 0), LONG), EVERY_ONE, cases=("topk_instances",), label=f"{t}-{largest}")
        for t in DTYPES
        for largest in (True, False)
    ],
    interpreted=[
        at(t, most, (SHORT, (300,), (0, 0)), A_FEW, cases=("topk_instances",), slow=True, label=f"{t}-{most}")
        for t in (SINGLE, HALF, DOUBLE)
        for most in (True, False)
    ],
)
def test_topk_is_exactly_the_references(leg, case, dtype, largest, lengths, calls):
    """More asked for than a bag, or all bags, have."""
    for these in lengths:
        scores, mask = _numbers_that_tie(these, dtype)
        for k, masked, one_bag in calls:
            options = {"largest": largest, "mask": mask if masked else None}
            got, expected = (
                milkernels.topk_instances(scores, k, None if one_bag else offsets_of(these), backend=backend, **options)
                for backend in (leg.backend, "reference")
            )
            assert torch.equal(got.indices, expected.indices), (these, k)
            torch.testing.assert_close(got.values, expected.values, rtol=0, atol=0, equal_nan=True)
            assert not (got.values[got.indices >= 0] == -INF).any()


# Logits far apart


@by_leg(compiled=[at(cases=("loss_attention_pool",))])
def test_loss_attention_of_logits_far_apart(leg, case):
    """The authors' quotient of sums of exponentials, each less one maximum, loses a bag whose logits are lower."""

    def apart(tensors):
        tensors["x"] *= 100
        tensors["x"][70:75] -= 200 * torch.linalg.pinv(tensors["weight"].float()).sum(1)

    lengths = (70, 5, 130)
    case = dataclasses.replace(case, edit=apart)
    tensors, offsets = case.make(lengths, SINGLE, L=8), offsets_of(lengths)
    with torch.no_grad():
        logits = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
        assert logits.min() < -400 and logits.max() > 400 and logits[70:75].max() < logits.max() - 200
        e = (logits - logits.max()).exp().sum(1)
        theirs = torch.cat([part / part.sum() for part in e.split(lengths)])
        assert theirs[70:75].isnan().all()
    pooled = milkernels.LossAttentionPooled(*case.ours(leg.backend)(tensors, offsets, None))
    weights = (pooled.scores - pooled.lse.repeat_interleave(torch.tensor(lengths), 0)).exp()
    exact = op_cases.exactly(case, tensors, offsets)
    truth = (exact["output 1"] - exact["output 2"].repeat_interleave(torch.tensor(lengths), 0)).exp()
    torch.testing.assert_close(weights.double(), truth, rtol=1e-3, atol=1e-6)
    for part in weights.split(lengths):
        torch.testing.assert_close(part.sum(), torch.tensor(1.0), rtol=1e-3, atol=0)
    kept = leg.promise(case, SINGLE, lengths=lengths, seeds=5, L=8)
    assert kept.ok, kept.broken()


# Nothing is left out


_WITH_KERNELS = (LEGS["native"], LEGS["emulated"], LEGS["interpreted"])


@pytest.mark.parametrize("leg", [pytest.param(leg, id=leg.name, marks=leg.needed) for leg in _WITH_KERNELS])
def test_every_op_has_a_kernel(leg):
    """Except what is composed of others."""
    public = [name for name in milkernels.__all__ if getattr(milkernels, name).__module__.startswith("milkernels.ops.")]
    composed = {"embed_instances", "generalized_mean_pool", "isr_pool", "log_sum_exp_pool", "noisy_or_pool"}
    ops = {name.removeprefix("gated_") for name in public if name.islower()} - composed - {"seed_of_part"}
    served = {op.name for op in contract.FORWARDS if op_cases.has_kernel(op.name, leg.backend)}
    left = {"attention_weights", "segment_softmax", "topk_instances"} if leg.name == "emulated" else set()  # to Triton
    assert ops == {case.kernel for case in CASES.values()} == served | left and not served & left
    if leg.backend == "triton":
        backwards = {f"{op.backward.name}_bwd" for op in contract.FORWARDS}
        declared = {f"{name}_fwd" for name in served} | backwards | set(contract.PARTS)
        assert set(triton.kernels()) | set(contract.COMPOSED) == declared
