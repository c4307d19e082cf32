"""Bags: layout checks, conversions in both directions, the schedule, collation."""

import functools
import itertools
import pickle
import re

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from milkernels import Bags, collate_bags
from milkernels.ragged import bag_index, bag_lengths, check_offsets, chunk_rows, num_partials, segments

LENGTHS = [[4], [1], [0], [2, 0, 3], [0, 1, 0], [1, 1, 1], [0, 0], [5, 2]]
CPU = torch.device("cpu")


def make(lengths, width=3, dtype=torch.int64, mask=False, extras=True):
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    total = sum(lengths)
    x = torch.randn(total, width, generator=generator)
    offsets = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=dtype)
    holes = torch.arange(total) % 3 != 1 if mask else None
    return Bags(x, offsets, holes, {"coords": torch.arange(2 * total).view(total, 2)} if extras else None)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [[0, 5], [0, 0, 5, 5], [0, 5, 5]])
def test_good_offsets_pass(offsets, dtype):
    check_offsets(torch.tensor(offsets, dtype=dtype), 5, CPU)


def test_no_bags_need_no_rows():
    check_offsets(torch.tensor([0]), 0, CPU)
    with pytest.raises(ValueError, match="end at the number of instances, 3; got 0"):
        check_offsets(torch.tensor([0]), 3, CPU)


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([0, 5], TypeError, "must be a tensor; got list"),
        (torch.tensor([0.0, 5.0]), TypeError, "int32 or int64; got torch.float32"),
        (torch.tensor([0, 5], dtype=torch.int16), TypeError, "got torch.int16"),
        (torch.tensor([[0, 5]]), ValueError, re.escape("got shape (1, 2)")),
        (torch.tensor(5), ValueError, re.escape("got shape ()")),
        (torch.empty(0, dtype=torch.int64), ValueError, re.escape("got shape (0,)")),
        (torch.tensor([0, 5], device="meta"), ValueError, "device of the instances, cpu; got meta"),
        (torch.tensor([1, 5]), ValueError, "start at 0; got 1"),
        (torch.tensor([0, 4, 3, 5]), ValueError, "got 3 after 4 at position 2"),
        (torch.tensor([0, 4]), ValueError, "end at the number of instances, 5; got 4"),
        (torch.tensor([0, 9, 5]), ValueError, "got 5 after 9 at position 2"),
    ],
)
def test_bad_offsets_say_what_was_got(offsets, error, message):
    with pytest.raises(error, match=message):
        check_offsets(offsets, 5, CPU)


def test_many_offsets_take_the_same_checks():
    offsets = torch.arange(1001) // 2
    check_offsets(offsets, 500, CPU)
    with pytest.raises(ValueError, match="end at the number of instances, 501; got 500"):
        check_offsets(offsets, 501, CPU)
    with pytest.raises(ValueError, match="start at 0; got 1"):
        check_offsets(offsets + 1, 501, CPU)
    offsets[700] = 3
    with pytest.raises(ValueError, match="got 3 after 349 at position 700"):
        check_offsets(offsets, 500, CPU)


def test_values_are_not_read_while_tracing():
    wrong = torch.tensor([0, 9, 5])
    with torch._subclasses.FakeTensorMode() as mode:
        check_offsets(mode.from_tensor(wrong), 5, CPU)
    check_offsets(wrong.to("meta"), 5, torch.device("meta"))

    def f(offsets):
        check_offsets(offsets, 5, CPU)
        return offsets + 1

    torch.fx.experimental.proxy_tensor.make_fx(f)(wrong)
    torch.fx.experimental.proxy_tensor.make_fx(f, tracing_mode="fake")(wrong)
    torch.func.vmap(f)(wrong[None])
    torch.compile(f, fullgraph=True, backend="eager")(wrong)
    with pytest.raises(ValueError, match="decrease"):
        f(wrong)


def test_values_of_a_subclass_are_read():
    """It has them, unless it is one of those that dispatch."""

    class Tagged(torch.Tensor):
        pass

    check_offsets(torch.tensor([0, 2, 5]).as_subclass(Tagged), 5, CPU)
    with pytest.raises(ValueError, match="decrease; got 5 after 9"):
        check_offsets(torch.tensor([0, 9, 5]).as_subclass(Tagged), 5, CPU)
    long = torch.arange(501)
    long[400] = 3
    with pytest.raises(ValueError, match="got 3 after 399"):
        check_offsets(long.as_subclass(Tagged), 500, CPU)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_bag_index(lengths, dtype):
    bags = make(lengths, dtype=dtype)
    expected = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert same(bag_index(bags.offsets, sum(lengths)), expected)
    assert bag_lengths(bags.offsets).tolist() == lengths
    assert bags.lengths.dtype == dtype


def test_bag_index_of_one_bag_and_of_no_bags():
    assert same(bag_index(None, 3), torch.zeros(3, dtype=torch.int64))
    assert same(bag_index(torch.tensor([0]), 0), torch.zeros(0, dtype=torch.int64))
    assert bag_index(None, 3, device=torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("offsets", [[0, 2, 3], [3, 5, 7], [0, 90, 5], [0, -4, 5], [-7, -7, -7]])
def test_bag_index_of_wrong_offsets_stays_in_range(offsets):
    index = bag_index(torch.tensor(offsets), 5)
    assert index.shape == (5,)
    assert index.min() >= 0 and index.max() <= len(offsets) - 2


def test_bag_index_compiles_for_any_size():
    compiled = torch.compile(bag_index, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([2, 0, 3], [7, 1, 4, 0]):
        offsets = make(lengths).offsets
        assert same(compiled(offsets, sum(lengths)), bag_index(offsets, sum(lengths)))


def test_bag_index_exports_with_dynamic_rows():
    class Index(torch.nn.Module):
        def forward(self, x, offsets):
            return bag_index(offsets, x.shape[0])

    rows, bounds = torch.export.Dim("rows"), torch.export.Dim("bounds", min=2)
    example = (torch.randn(6, 2), torch.tensor([0, 2, 6]))
    program = torch.export.export(Index(), example, dynamic_shapes=({0: rows}, {0: bounds}))
    for other in (torch.tensor([0, 4, 4, 9]), torch.tensor([0, 9])):
        assert same(program.module()(torch.randn(9, 2), other), bag_index(other, 9))


@pytest.mark.parametrize("seed", range(30))
def test_segments_cover_every_row_once_in_slots_of_their_own(seed):
    generator = torch.Generator().manual_seed(seed)
    num_bags = int(torch.randint(1, 12, (), generator=generator))
    lengths = torch.randint(0, (5, 300, 1500)[seed % 3], (num_bags,), generator=generator)
    lengths[torch.rand(num_bags, generator=generator) < 0.3] = 0
    if seed % 4 == 0:
        lengths = lengths // 256 * 256  # bags that end where chunks end
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    num_rows = int(offsets[-1])
    chunk = chunk_rows(num_rows)
    found = list(segments(offsets, num_rows))

    slots = [slot for slot, *_ in found]
    assert slots == sorted(set(slots))
    assert all(0 <= slot < num_partials(num_rows, num_bags) for slot in slots)
    covered = [row for _, _, start, end in found for row in range(start, end)]
    assert covered == list(range(num_rows))
    index = bag_index(offsets, num_rows)
    for slot, bag, start, end in found:
        assert (index[start:end] == bag).all()
        assert start // chunk == (end - 1) // chunk == slot - bag
    for bag, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        expected = [] if start == end else list(range(start // chunk, (end - 1) // chunk + 1))
        assert [slot - bag for slot, b, *_ in found if b == bag] == expected


def test_segments_of_one_bag():
    assert list(segments(None, 0)) == []
    assert list(segments(None, 65)) == [(0, 0, 0, 64), (1, 0, 64, 65)]
    assert list(segments(None, 4000))[-1] == (15, 0, 3840, 4000)


def test_bags_keep_what_they_are_given():
    x, offsets = torch.randn(5, 3), torch.tensor([0, 2, 5], dtype=torch.int32)
    coords, mask = torch.randn(5, 2), torch.tensor([True, False, True, True, False])
    bags = Bags(x, offsets, mask, {"coords": coords})
    assert bags.values is x and bags.offsets is offsets and bags.mask is mask
    assert bags.extras["coords"] is coords
    assert len(bags) == 2 and bags.num_instances == 5


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_of_any_type_become_bool(dtype):
    mask = torch.tensor([1, 0, 1]).to(dtype)
    assert same(Bags(torch.randn(3, 2), mask=mask).mask, torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"values": [[1.0]]}, TypeError, "values must be a tensor; got list"),
        ({"values": torch.randn(5)}, ValueError, re.escape("must be [N, L]; got shape (5,)")),
        ({"offsets": torch.tensor([0, 4])}, ValueError, "got 4"),
        ({"mask": [True] * 5}, TypeError, "mask must be a tensor; got list"),
        ({"mask": torch.ones(4)}, ValueError, re.escape("mask must be [5]; got shape (4,)")),
        ({"mask": torch.ones(5, 1)}, ValueError, re.escape("mask must be [5]; got shape (5, 1)")),
        ({"mask": torch.ones(5, device="meta")}, ValueError, "mask must be on the device .* cpu; got meta"),
        (
            {"mask": torch.zeros(5).index_fill(0, torch.tensor(3), -torch.inf)},
            ValueError,
            "mask must be bool.*got -inf",
        ),
        ({"extras": {"c": [1] * 5}}, TypeError, re.escape("extras['c'] must be a tensor; got list")),
        ({"extras": {"c": torch.ones(6, 2)}}, ValueError, re.escape("got shape [6, 2]")),
        ({"extras": {"c": torch.ones(5, device="meta")}}, ValueError, "on meta"),
    ],
)
def test_bad_bags_say_what_was_got(arguments, error, message):
    with pytest.raises(error, match=message):
        Bags(**{"values": torch.randn(5, 3), **arguments})


@pytest.mark.parametrize("lengths", LENGTHS)
def test_list_round_trip(lengths):
    bags = make(lengths)
    parts, coords = bags.to_list(), Bags(bags.extras["coords"], bags.offsets).to_list()
    assert [len(part) for part in parts] == lengths
    assert all(
        part.data_ptr() == bags.values[s:].data_ptr()
        for part, (s, _) in zip(parts, bags._spans(), strict=True)
        if len(part)
    )
    again = Bags.from_list(parts, extras={"coords": coords})
    assert same(again.values, bags.values) and same(again.offsets, bags.offsets)
    assert same(again.extras["coords"], bags.extras["coords"])


def test_a_list_of_one_is_not_copied():
    x = torch.randn(4, 3)
    assert Bags.from_list([x]).values is x
    assert Bags.from_bag(x).values is x
    assert Bags.from_bag(x).offsets.tolist() == [0, 4]


def test_list_masks():
    masks = [torch.tensor([1, 0]), torch.tensor([1])]
    bags = Bags.from_list([torch.randn(2, 3), torch.randn(1, 3)], masks=masks)
    assert bags.mask.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "at least one tensor.*got an empty list"),
        (([[1.0]],), TypeError, re.escape("tensors[0] must be a tensor; got list")),
        (([torch.ones(2, 3), torch.ones(3)],), ValueError, re.escape("tensors[1] must be [N, L]")),
        (([torch.ones(2, 3), torch.ones(2, 4)],), ValueError, re.escape("tensors[1] has [4]")),
        (([torch.ones(2, 3), torch.ones(2, 3).half()],), ValueError, "torch.float16"),
        (([torch.ones(2, 3), torch.ones(2, 3, device="meta")],), ValueError, "on meta"),
        (([torch.ones(2, 3)], [torch.ones(3)]), ValueError, re.escape("masks[0] must begin")),
        (([torch.ones(2, 3)], [torch.ones(2)] * 2), ValueError, "one tensor per bag, 1; got 2"),
        (([torch.ones(2, 3)], None, {"c": [torch.ones(3)]}), ValueError, re.escape("extras['c'][0]")),
    ],
)
def test_bad_lists_say_what_was_got(arguments, error, message):
    with pytest.raises(error, match=message):
        Bags.from_list(*arguments)


@pytest.mark.parametrize("shape", [(3, 4, 2), (1, 1, 1), (2, 0, 3), (0, 4, 3)])
def test_padded_as_it_lies(shape):
    x = torch.randn(shape)
    mask = torch.rand(shape[:2]) < 0.5
    bags = Bags.from_padded(x, mask, extras={"coords": torch.zeros(*shape[:2], 2, dtype=torch.int64)})
    assert bags.values.data_ptr() == x.data_ptr() and bags.mask.data_ptr() == mask.data_ptr()
    assert bags.offsets.tolist() == [shape[1] * b for b in range(shape[0] + 1)]
    assert bags.extras["coords"].shape == (shape[0] * shape[1], 2)
    if shape[0]:
        again, real = bags.to_padded()
        assert same(again, x) and same(real, mask)
        assert again.data_ptr() == x.data_ptr()


def test_padded_rows_may_be_strided():
    wide = torch.randn(2, 3, 8)
    bags = Bags.from_padded(wide[..., :5])
    assert bags.values.data_ptr() == wide.data_ptr() and bags.values.stride() == (8, 1)
    assert same(bags.to_padded()[0], wide[..., :5])


def test_padded_lengths():
    x = torch.randn(3, 4, 2)
    for lengths in ([4, 0, 2], torch.tensor([4, 0, 2], dtype=torch.int32)):
        mask = Bags.from_padded(x, lengths=lengths).to_padded()[1]
        assert mask.int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1]}, TypeError, "x must be a tensor; got list"),
        ({"x": torch.ones(2, 3)}, ValueError, re.escape("must be [B, M, L]; got shape (2, 3)")),
        ({"mask": torch.ones(2, 3), "lengths": [3, 3]}, ValueError, "not both"),
        ({"mask": torch.ones(2, 4)}, ValueError, re.escape("mask must begin with dimensions [2, 3]")),
        ({"mask": torch.ones(2, 3, 1)}, ValueError, re.escape("mask must be [6]")),
        ({"lengths": [3]}, ValueError, re.escape("lengths must be [2] ints; got [1]")),
        ({"lengths": [3.0, 1.0]}, ValueError, "torch.float32"),
        ({"lengths": [4, 1]}, ValueError, re.escape("within [0, 3]; got 1 to 4")),
        ({"lengths": [-1, 1]}, ValueError, "got -1 to 1"),
        ({"extras": {"c": torch.ones(6, 2)}}, ValueError, re.escape("extras['c']")),
    ],
)
def test_bad_padded_batches_say_what_was_got(arguments, error, message):
    with pytest.raises(error, match=message):
        Bags.from_padded(**{"x": torch.randn(2, 3, 4), **arguments})


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("mask", [False, True])
def test_ragged_to_padded_and_back(lengths, mask):
    bags = make(lengths, mask=mask)
    x, real = bags.to_padded(padding_value=7.0)
    assert x.shape == (len(lengths), max(lengths), 3) and real.dtype == torch.bool
    for b, length in enumerate(lengths):
        assert same(x[b, :length], bags[b]) and (x[b, length:] == 7.0).all() and not real[b, length:].any()
    there, back = bags.compact(), Bags.from_padded(x, real).compact()
    assert same(there.values, back.values) and same(there.offsets, back.offsets)


def test_no_bags_to_padded():
    x, mask = make([], extras=False).to_padded()
    assert x.shape == (0, 0, 3) and mask.shape == (0, 0)


@pytest.mark.parametrize("lengths", [[4], [2, 0, 3], [0, 1, 0], [1, 1, 1]])
def test_nested_round_trip(lengths):
    bags = make(lengths, extras=False)
    nested = bags.to_nested()
    assert nested.layout == torch.jagged and nested.values().data_ptr() == bags.values.data_ptr()
    assert [part.shape[0] for part in nested.unbind()] == lengths
    again = Bags.from_nested(nested)
    assert again.values.data_ptr() == bags.values.data_ptr() and same(again.offsets, bags.offsets)


def test_nested_with_holes_is_masked():
    x, start, length = torch.randn(3, 5, 4), torch.tensor([1, 0, 2]), torch.tensor([3, 0, 2])
    nested = torch.nested.narrow(x, 1, start, length, layout=torch.jagged)
    bags = Bags.from_nested(nested)
    assert bags.values.data_ptr() == x.data_ptr()
    for b, part in enumerate(bags.to_list()):
        assert same(part, x[b, start[b] : start[b] + length[b]])


def test_nested_drops_masked_rows():
    bags = make([3, 2], mask=True)
    assert all(same(a, b) for a, b in zip(bags.to_nested().unbind(), bags.to_list(), strict=True))


def test_bad_nested_tensors_say_what_was_got():
    with pytest.raises(TypeError, match="got torch.strided"):
        Bags.from_nested(torch.ones(2, 3))
    with pytest.raises(TypeError, match="got list"):
        Bags.from_nested([torch.ones(2, 3)])
    jagged = torch.nested.nested_tensor_from_jagged(torch.ones(4, 3), torch.tensor([0, 1, 4]))
    with pytest.raises(ValueError, match=re.escape("must be [B, ragged, L]")):
        Bags.from_nested(jagged.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_batch_round_trip(lengths, dtype):
    bags = make(lengths, mask=True)
    batch = bags.to_batch()
    again = Bags.from_batch(bags.values, batch.to(dtype), len(lengths), bags.mask, bags.extras)
    assert again.values is bags.values and again.mask is bags.mask
    assert same(again.offsets, bags.offsets) and same(again.to_batch(), batch)


def test_batch_counts_its_bags():
    assert Bags.from_batch(torch.ones(3, 2), torch.tensor([0, 2, 2])).lengths.tolist() == [1, 0, 2]
    assert len(Bags.from_batch(torch.ones(0, 2), torch.zeros(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize(
    ("batch", "num_bags", "error", "message"),
    [
        ([0, 0, 1], None, TypeError, "batch must be a tensor; got list"),
        (torch.zeros(3), None, TypeError, "int32 or int64; got torch.float32"),
        (torch.tensor([0, 1]), None, ValueError, re.escape("got shape [2]")),
        (torch.zeros(3, 1, dtype=torch.int64), None, ValueError, re.escape("1-D; got shape [3, 1]")),
        (torch.tensor([0, 2, 1]), None, ValueError, "sorted; got 1 after 2 at position 2"),
        (torch.tensor([-1, 0, 1]), None, ValueError, re.escape("within [0, 2); got -1 to 1")),
        (torch.tensor([0, 0, 3]), 3, ValueError, re.escape("within [0, 3); got 0 to 3")),
    ],
)
def test_bad_batch_says_what_was_got(batch, num_bags, error, message):
    with pytest.raises(error, match=message):
        Bags.from_batch(torch.randn(3, 2), batch, num_bags)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_compact_drops_masked_rows(lengths, dtype):
    bags = make(lengths, mask=True, dtype=dtype)
    compact = bags.compact()
    assert compact.mask is None and compact.offsets.dtype == dtype
    assert same(compact.values, bags.values[bags.mask])
    assert same(compact.extras["coords"], bags.extras["coords"][bags.mask])
    assert same(compact.to_batch(), bags.to_batch()[bags.mask])
    Bags(compact.values, compact.offsets)
    assert compact.compact() is compact


def test_conversions_are_differentiable():
    x = torch.randn(5, 3, requires_grad=True)
    bags = Bags(x, torch.tensor([0, 2, 5]), torch.tensor([1, 1, 0, 1, 1]))
    total = bags.to_padded()[0].sum() + sum(part.sum() for part in bags.to_list()) + bags[[1]].values.sum()
    total.backward()
    assert x.grad[:, 0].tolist() == [2, 2, 2, 3, 3]
    assert not bags.detach().values.requires_grad


def test_to_converts_floating_values_only():
    bags = make([2, 3], mask=True)
    bags.extras["weight"] = torch.ones(5, dtype=torch.float64)
    half = bags.to(torch.float16)
    assert half.values.dtype == torch.float16 and half.offsets.dtype == torch.int64
    assert half.mask.dtype == torch.bool and half.extras["weight"].dtype == torch.float64
    assert same(bags.to(dtype=torch.float64).values, bags.values.double())
    meta = bags.to("meta", torch.float16)
    assert {t.device.type for t in pytree.tree_leaves(meta)} == {"meta"}
    assert Bags(torch.ones(2, 3, dtype=torch.int64)).to(torch.float16).values.dtype == torch.int64


def test_indexing():
    bags = make([2, 0, 3, 1], mask=True)
    parts = [bags.values[0:2], bags.values[2:2], bags.values[2:5], bags.values[5:6]]
    assert all(same(bags[i], parts[i]) and same(bags[i - 4], parts[i]) for i in range(4))
    assert bags[2].data_ptr() == bags.values[2:].data_ptr()
    assert all(same(a, b) for a, b in zip(bags, parts, strict=True))

    middle = bags[1:3]
    assert middle.values.data_ptr() == bags.values[2:].data_ptr()
    assert middle.offsets.tolist() == [0, 0, 3] and same(middle.mask, bags.mask[2:5])
    assert same(middle.extras["coords"], bags.extras["coords"][2:5])
    assert len(bags[3:1]) == 0 and bags[3:1].num_instances == 0


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ([3, 0], [3, 0]),
        ([-1, -1], [3, 3]),
        ([], []),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor([True, False, True, False]), [0, 2]),
        ([False, True, False, True], [1, 3]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        (slice(0, 4, 2), [0, 2]),
    ],
)
def test_gathering(index, expected):
    bags = make([2, 0, 3, 1], mask=True, dtype=torch.int32)
    picked = bags[index]
    assert len(picked) == len(expected) and picked.offsets.dtype == torch.int32
    assert all(same(a, bags[b]) for a, b in zip(picked, expected, strict=True))
    rows = [row for b in expected for row in range(bags.offsets[b], bags.offsets[b + 1])]
    assert same(picked.mask, bags.mask[rows]) and same(picked.extras["coords"], bags.extras["coords"][rows])


@pytest.mark.parametrize(
    ("index", "error"),
    [(4, IndexError), (-5, IndexError), ([4], IndexError), ([0.5], IndexError), ([True], IndexError)]
    + [("ab", TypeError), ((0, 1), TypeError), (None, TypeError), ([[0, 1]], IndexError)],
)
def test_bad_indices(index, error):
    with pytest.raises(error):
        make([2, 0, 3, 1])[index]


def test_repr():
    expected = "Bags(2 bags, values=[3, 3] torch.float32 on cpu, mask, extras=['coords'])"
    assert repr(make([2, 1], mask=True)) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs an accelerator")
def test_pin_memory():
    assert all(t.is_pinned() for t in pytree.tree_leaves(make([2, 1], mask=True).pin_memory()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_offsets_on_a_gpu_are_checked_once():
    bags = make([2, 0, 3], mask=True).to("cuda")
    assert {t.device.type for t in pytree.tree_leaves(bags)} == {"cuda"}
    with pytest.raises(ValueError, match="got 3 after 9"):
        Bags(bags.values, torch.tensor([0, 9, 3, 5], device="cuda"))
    x = torch.randn(3, 4, 5, device="cuda")
    mask = torch.rand(3, 4, device="cuda") < 0.5
    torch.cuda.set_sync_debug_mode("error")
    try:
        check_offsets(torch.zeros(3, dtype=torch.int64, device="cuda"), 5, x.device)
        padded = Bags.from_padded(x, mask)
        bag_index(padded.offsets, 12)
        Bags.from_bag(x[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mask", [False, True])
def test_pytree(mask):
    bags = make([2, 0, 3], mask=mask)
    bags.extras["mask"] = torch.ones(5)  # an extra may have any name
    leaves, spec = pytree.tree_flatten(bags)
    assert len(leaves) == 4 + mask and all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.values is bags.values and again.extras.keys() == bags.extras.keys()
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    keys = [pytree.keystr(key) for key, _ in pytree.tree_flatten_with_path(bags)[0]]
    assert keys[:2] == [".values", ".offsets"]


def test_pytree_skips_checks():
    names = pytree.tree_map(lambda t: "leaf", make([2, 0, 3]))
    assert names.values == "leaf" and repr(names).startswith("Bags('leaf'")


def test_bags_pass_through_compile():
    def f(bags):
        sums = bags.values.new_zeros(len(bags), 3)
        return sums.index_add(0, bag_index(bags.offsets, bags.num_instances), bags.values)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([2, 0, 3], [1, 4, 2, 3]):
        torch.testing.assert_close(compiled(make(lengths)), f(make(lengths)))


def test_bags_pickle():
    bags = make([2, 1], mask=True)
    again = pickle.loads(pickle.dumps(bags))
    assert all(same(a, b) for a, b in zip(*map(pytree.tree_leaves, (bags, again)), strict=True))


class Slides(torch.utils.data.Dataset):
    lengths = (3, 0, 1, 5)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        n = self.lengths[i]
        return {
            "features": torch.full((n, 2), float(i)),
            "label": i,
            "coords": torch.arange(2 * n).view(n, 2),
        }


@pytest.mark.parametrize("workers", [0, 1])
def test_collate_in_a_data_loader(workers):
    collate = functools.partial(collate_bags, per_instance=("coords",))
    options = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    loader = DataLoader(Slides(), batch_size=2, collate_fn=collate, **options)
    first, second = loader
    assert list(first) == ["features", "label"] and first["label"].tolist() == [0, 1]
    bags = second["features"]
    assert bags.lengths.tolist() == [1, 5] and bags.values[:, 0].tolist() == [2, 3, 3, 3, 3, 3]
    assert bags.extras["coords"].tolist() == [[0, 1]] + [[2 * i, 2 * i + 1] for i in range(5)]


def test_collate_tensors():
    bags = collate_bags([torch.ones(2, 3), torch.zeros(0, 3)])
    assert isinstance(bags, Bags) and bags.lengths.tolist() == [2, 0]


@pytest.mark.parametrize(("per_instance", "name"), [((1,), "1"), (1, "1"), ({1: "coords"}, "coords")])
def test_collate_tuples(per_instance, name):
    samples = [(torch.ones(n, 3), torch.arange(n), torch.tensor(n), f"slide {n}") for n in (2, 1)]
    bags, label, slide = collate_bags(samples, per_instance=per_instance)
    assert bags.extras[name].tolist() == [0, 1, 0]
    assert label.tolist() == [2, 1] and slide == ["slide 2", "slide 1"]


def test_collate_numpy_features():
    numpy = pytest.importorskip("numpy")
    out = collate_bags([{"x": numpy.ones((n, 2), "float32"), "y": 1.0} for n in (2, 1)], features="x")
    assert same(out["x"].values, torch.ones(3, 2)) and out["y"].tolist() == [1.0, 1.0]


ONE = {"features": torch.ones(2, 3), "coords": torch.ones(2, 2), "label": 0}


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        ([], {}, ValueError, "empty batch"),
        ([1.0], {}, TypeError, "got float"),
        ([torch.ones(2, 3), ONE], {}, TypeError, "got Tensor, dict"),
        ([torch.ones(2, 3)], {"per_instance": (1,)}, ValueError, re.escape("no 1; they have [0]")),
        ([ONE], {"features": "x"}, ValueError, "no 'x'; they have"),
        ([ONE], {"per_instance": ("xy",)}, ValueError, "no 'xy'; they have"),
        ([ONE], {"per_instance": "features"}, ValueError, "must not name the features"),
        ([ONE, {"features": torch.ones(1, 3)}], {}, ValueError, "sample 1 has"),
        ([{**ONE, "coords": torch.ones(3, 2)}], {"per_instance": "coords"}, ValueError, "coords"),
        ([{**ONE, "features": "path"}], {}, TypeError, "'features' of sample 0 must be a tensor or an array; got str"),
        ([ONE, {**ONE, "features": torch.ones(2, 4)}], {}, ValueError, re.escape("tensors[1] has [4]")),
        ([ONE, {**ONE, "coords": torch.ones(1, 2)}], {}, ValueError, "name it: per_instance"),
    ],
)
def test_bad_samples_say_what_was_got(batch, options, error, message):
    with pytest.raises(error, match=message):
        collate_bags(batch, **options)


def test_no_bags_of_some_instances_where_offsets_are_not_read():
    with pytest.raises(ValueError, match="need no instances; got 3"):
        check_offsets(torch.zeros(1, dtype=torch.int64, device="meta"), 3, torch.device("meta"))
