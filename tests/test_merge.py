"""Bags that were pooled in parts: merged, they are what one call on the whole gives."""

import itertools

import oracle
import pytest
import torch

import milkernels
from milkernels import Pooled, merging, testing

INF = float("inf")
L, K = 7, 2
LENGTHS = torch.tensor([[40, 0, 1, 9], [3, 0, 30, 0], [0, 0, 25, 64]])  # [parts, bags]; the second bag is empty
PARTS, B = LENGTHS.shape
CUTS = [torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) for lengths in LENGTHS]
WHOLE = sum(CUTS)
N = int(WHOLE[-1])


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(rows):
    """Rows of the whole to those of each part: bag after bag, in each part after part."""
    pieces = rows.split(LENGTHS.T.flatten().tolist())
    return [torch.cat(pieces[p::PARTS]) for p in range(PARTS)]


def merged(op, *per_row, **options):
    parts = [op(*rows, cuts, **options) for rows, cuts in zip(zip(*map(cut, per_row), strict=True), CUTS, strict=True)]
    return milkernels.merge_pooled(parts, CUTS)


def gradients(outputs, leaves):
    """Of every output that can be far from 0, with one cotangent for all ways to compute it."""
    there = [o.masked_fill(o.detach().isinf(), 0) for o in outputs if o.requires_grad]
    cotangents = [draw(*o.shape, seed=i).to(o.dtype) for i, o in enumerate(there)]
    return torch.autograd.grad(there, leaves, cotangents)


def hold(names, ours, eager, exact):
    """The promise, head by head: at most twice eager's error and four roundings."""
    for name, one, other, truth in zip(names, ours, eager, exact, strict=True):
        for head in range(truth.shape[1] if name != "grad_x" else 1):
            a, b, r = ((t if name == "grad_x" else t[:, head]).detach().double() for t in (one, other, truth))
            finite = r.isfinite()
            assert torch.equal(a[~finite], r[~finite]), name
            a, b, r = a[finite], b[finite], r[finite]
            bound = 2 * (b - r).norm() + 4 * torch.finfo(one.dtype).eps * r.norm()
            assert (a - r).norm() <= bound, (name, head, float((a - r).norm()), float(bound))


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_promise_at_any_size_of_lse(dtype, shift):
    x = (draw(N, L) + 1).to(dtype)
    scores = (3 * draw(N, K, seed=1) + shift).to(torch.promote_types(dtype, torch.float32))
    scores[::7, 0], mask = -INF, torch.arange(N) % 5 != 2

    def run(op, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = tuple(op(*leaves))
        return [*outputs, *gradients(outputs, leaves)]

    def in_parts(x, scores):
        parts = zip(cut(x), cut(scores), CUTS, cut(mask), strict=True)
        return milkernels.merge_pooled([milkernels.softmax_pool(*part, mask=m) for *part, m in parts], CUTS)

    def eager(x, scores):
        return oracle.softmax_pool(x, scores, WHOLE, mask=mask)

    names = ("bag", "scores", "lse", "grad_x", "grad_scores")
    ours, exact = run(in_parts, x, scores), run(eager, x.double(), scores.double() - shift)
    exact[1], exact[2] = exact[1] + shift, exact[2] + shift
    assert [t.dtype for t in ours] == [dtype, scores.dtype, scores.dtype, dtype, scores.dtype]
    hold(names, ours, run(eager, x, scores), exact)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_parameters_get_their_gradients(backend):
    x, shapes = draw(N, L), {"v_weight": (5, L), "v_bias": (5,), "w_weight": (K, 5), "w_bias": (K,)}
    parameters = {name: draw(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(shapes.items())}
    leaves = [x.requires_grad_(), *parameters.values()]
    layers = testing.public_arguments("attention_pool", parameters)

    def pool(x, offsets):
        return milkernels.attention_pool(x, **layers, offsets=offsets, backend=backend)

    ours, whole = merged(pool, x), pool(x, WHOLE)
    torch.testing.assert_close([*ours], [*whole])
    torch.testing.assert_close(gradients(ours, leaves), gradients(whole, leaves))


def test_scores_lie_in_the_order_of_bags():
    x, scores = draw(N, L), draw(N, K, seed=1)
    ours, whole = merged(milkernels.softmax_pool, x, scores), milkernels.softmax_pool(x, scores, WHOLE)
    assert torch.equal(ours.scores, scores)
    weights = milkernels.attention_weights(ours, sum(CUTS))
    torch.testing.assert_close(weights, milkernels.attention_weights(whole, WHOLE))
    again = milkernels.merge_pooled([ours, milkernels.softmax_pool(x, scores, WHOLE)], [WHOLE, WHOLE])
    torch.testing.assert_close(again.bag, whole.bag)  # every instance twice


def test_one_bag_needs_no_offsets():
    x, scores = draw(N, L), draw(N, K, seed=1)
    parts = [milkernels.softmax_pool(*rows) for rows in zip(x.split(20), scores.split(20), strict=True)]
    whole = milkernels.softmax_pool(x, scores)
    torch.testing.assert_close([*milkernels.merge_pooled(parts)], [*whole])
    one_by_one = list(itertools.accumulate(parts, lambda a, b: milkernels.merge_pooled([a, b])))[-1]
    torch.testing.assert_close([*one_by_one], [*whole])
    without = milkernels.merge_pooled([part._replace(scores=part.scores[:0]) for part in parts])
    torch.testing.assert_close([without.bag, without.lse], [whole.bag, whole.lse])
    assert without.scores.shape == (0, K)


def test_loss_attention_carries_its_logits():
    x, weight = draw(N, L), draw(3, L, seed=1)

    def pool(x, offsets):
        return milkernels.loss_attention_pool(x, weight, offsets)

    ours = merged(pool, x)
    assert type(ours) is milkernels.LossAttentionPooled
    torch.testing.assert_close([*ours], [*pool(x, WHOLE)])


@pytest.mark.parametrize("both", [True, False])
def test_dsmil_carries_its_critical_instances(both):
    """The same critical instance lies in every part of a bag, so that all are scored against it."""
    x, weight, q = draw(N, L), draw(3, L, seed=1), draw(4, L, seed=2)
    largest = torch.linalg.pinv(weight) @ torch.full((3,), 50.0, dtype=torch.float64)
    for start, length in zip(WHOLE.tolist(), LENGTHS.T, strict=False):
        for first in (start + length.cumsum(0) - length)[length > 0].tolist():
            x[first] = largest
    x.requires_grad_()

    def pool(x, offsets):
        if both:
            return milkernels.dsmil(x, weight, q, offsets)
        return milkernels.dsmil_pool(x, x.detach() @ weight.T, q, offsets)

    ours, whole = merged(pool, x), pool(x, WHOLE)
    assert type(ours) is type(whole)
    torch.testing.assert_close([*ours], [*whole])
    assert ours.critical[0].tolist() == [0] * 3 and ours.critical[1].tolist() == [-1] * 3


def test_the_critical_instance_is_that_of_the_largest_value():
    def part(values, critical, rows):
        one = torch.zeros(2, 2, 3), torch.zeros(rows, 2), torch.zeros(2, 2), torch.tensor(critical)
        return milkernels.DSMILOutput(*one, torch.tensor(values), torch.zeros(rows, 2))

    parts = [
        part([[1.0, 2.0], [-INF, 5.0]], [[1, 0], [-1, 2]], 3),
        part([[3.0, 2.0], [-INF, INF]], [[0, 1], [-1, 3]], 4),
    ]
    ours = milkernels.merge_pooled(parts, [torch.tensor([0, 2, 3]), torch.tensor([0, 2, 4])])
    # Rows of the whole: 0 and 1 of the first part, 0 and 1 of the second, then 2 of the first, 2 and 3 of the second.
    assert ours.critical.tolist() == [[2, 0], [-1, 6]]
    assert ours.values.tolist() == [[3.0, 2.0], [-INF, INF]]
    nan = parts[0]._replace(values=torch.tensor([[float("nan"), 2.0], [-INF, 5.0]]))
    assert (
        milkernels.merge_pooled([parts[1], nan], [torch.tensor([0, 2, 4]), torch.tensor([0, 2, 3])]).critical[0, 0] == 3
    )


def test_a_score_of_infinity():
    x, scores = draw(N, L), draw(N, K, seed=1)
    scores[4, 0] = INF
    ours = merged(milkernels.softmax_pool, x, scores, backend="reference")
    assert ours.lse[0, 0] == INF and ours.bag[0, 0].isnan().all()
    ours.lse[0, 0], ours.bag[0, 0], scores[4, 0] = 0, 0, -INF
    rest = milkernels.softmax_pool(x, scores, WHOLE)
    torch.testing.assert_close(ours.bag[1:], rest.bag[1:])
    torch.testing.assert_close(ours.bag[0, 1], rest.bag[0, 1])


def test_it_can_be_compiled():
    x, scores = draw(N, L).float(), draw(N, K, seed=1).float()
    parts = list(map(milkernels.softmax_pool, cut(x), cut(scores), CUTS))
    fast = torch.compile(milkernels.merge_pooled, backend="eager", fullgraph=True)
    torch.testing.assert_close([*fast(parts, CUTS)], [*milkernels.softmax_pool(x, scores, WHOLE)])


ONE = milkernels.softmax_pool(draw(5, L), draw(5, K), torch.tensor([0, 2, 5]))
OTHER = milkernels.loss_attention_pool(draw(5, L), draw(2, L), torch.tensor([0, 2, 5]))
CRITICAL = milkernels.dsmil_pool(draw(5, L), draw(5, K), draw(3, L), torch.tensor([0, 2, 5]))
BOUNDS = torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    ("parts", "offsets", "error", "message"),
    [
        (None, None, TypeError, "parts must be a sequence of poolings; got NoneType"),
        ([], None, ValueError, "parts must hold at least one pooling"),
        (ONE, None, TypeError, r"parts\[0\] must be what a pooling op returned; got Tensor"),
        ([ONE, ONE.bag], None, TypeError, r"parts\[1\] must be what a pooling op returned; got Tensor"),
        ([ONE, OTHER], None, TypeError, "parts must be of one type; got Pooled and LossAttentionPooled"),
        ([ONE, ONE._replace(lse=ONE.lse[1:])], None, ValueError, r"parts\[1\].lse must be \[2, 2\]; got shape"),
        ([ONE, ONE._replace(bag=ONE.bag[1:])], None, ValueError, r"parts\[1\].bag must be \[2, 2, 7\]; got shape"),
        ([ONE, ONE._replace(bag=None)], None, TypeError, r"parts\[1\].bag must be a tensor; got NoneType"),
        ([ONE._replace(scores=ONE.scores[:, :1])], None, ValueError, r"parts\[0\].scores must be \[5, 2\]; got"),
        ([OTHER._replace(logits=OTHER.logits[1:])], None, ValueError, r"parts\[0\].logits must be \[5, 2\]; got"),
        ([CRITICAL._replace(critical=CRITICAL.critical + 5)], None, ValueError, r"critical must be rows of its scores"),
        ([CRITICAL._replace(critical=CRITICAL.lse)], None, ValueError, r"parts\[0\].critical must be int64 \[2, 2\]"),
        ([ONE, ONE], None, ValueError, "offsets of every part are needed to order the scores of 2 bags; got None"),
        ([ONE, ONE], BOUNDS, TypeError, "offsets must be a sequence of tensors, one for each part; got Tensor"),
        ([ONE, ONE], [BOUNDS], ValueError, "offsets must be one for each of 2 parts; got 1"),
        ([ONE, ONE], [BOUNDS, BOUNDS[:2]], ValueError, "offsets must end at the number of instances, 5; got 2"),
        ([ONE, ONE], [BOUNDS, BOUNDS[::2]], ValueError, r"offsets\[1\] must be \[3\]; got shape \(2,\)"),
        ([ONE, ONE], [BOUNDS, [0, 2, 5]], TypeError, "offsets must be a tensor; got list"),
    ],
)
def test_bad_parts_are_explained(parts, offsets, error, message):
    with pytest.raises(error, match=message):
        milkernels.merge_pooled(parts, offsets)


def test_parts_without_scores_need_no_offsets():
    bare = [part._replace(scores=part.scores[:0]) for part in (ONE, ONE)]
    torch.testing.assert_close(milkernels.merge_pooled(bare).bag, ONE.bag)
    assert isinstance(milkernels.merge_pooled(bare), Pooled)


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_of_a_part_are_those_of_the_whole(dtype, shift):
    """What a part needs of the others is (bag, lse) and their gradients; the second part has no row of two bags."""
    x, scores = (draw(N, L) + 1).to(dtype), (3 * draw(N, K, seed=1) + shift).to(dtype)
    scores[::7, 0] = -INF
    grads = [draw(B, K, L, seed=2).to(dtype), draw(B, K, seed=3).to(dtype)]
    leaves = [x.double().requires_grad_(), (scores.double() - shift).requires_grad_()]
    bag, _, lse = oracle.softmax_pool(*leaves, WHOLE)
    there = lse.masked_fill(lse.detach().isinf(), 0)
    exact = torch.autograd.grad([bag, there], leaves, [g.double() for g in grads])

    rows = [[t.requires_grad_() for t in part] for part in zip(cut(x), cut(scores), strict=True)]
    parts = [milkernels.softmax_pool(*part, cuts) for part, cuts in zip(rows, CUTS, strict=True)]
    sums = [merging.log_sum_of(part, cuts) for part, cuts in zip(parts, CUTS, strict=True)]
    with torch.no_grad():
        whole, total = merging.merge_bags([part.bag for part in parts], sums)
    found = []
    for part, mass, leaves in zip(parts, sums, rows, strict=True):
        share = merging.share_of(mass, total).detach()
        split = merging.split_gradients(share, part.bag.detach(), whole, *grads)
        found.append(torch.autograd.grad([part.bag, part.lse], leaves, [g.to(dtype) for g in split]))
    for i, truth in enumerate(exact):
        ours = torch.cat([found[p][i].split(LENGTHS[p].tolist())[b] for b in range(B) for p in range(PARTS)])
        error = (ours.double() - truth).norm() / truth.norm()
        assert error <= 8 * torch.finfo(dtype).eps, (i, float(error))


def test_a_part_of_nothing_has_no_gradient():
    none = torch.zeros(1, 1, dtype=torch.float64)
    nothing, whole = merging.LogSum(none - INF, none + 1), merging.LogSum(none, none + 1)
    for part, of in ((nothing, whole), (nothing, nothing)):
        share = merging.share_of(part, of)
        bag = torch.zeros(1, 1, L)
        split = merging.split_gradients(share, bag, bag + 1, torch.ones(1, 1, L), torch.full((1, 1), INF))
        assert not any(g.any() for g in (share, *split))
    assert merging.split_gradients(share, bag, bag, None, None) == (None, None)
