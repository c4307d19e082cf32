"""Bags spread over ranks: what they pool together, and what DDP makes of the gradients, is what one process has."""

import copy
import time

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run
from torch import nn

import milkernels as mk
from milkernels import losses
from milkernels.streaming import StreamedBag

pytestmark = needs_gloo
LENGTHS = (70, 0, 1, 35)  # of the whole bags
L, C, D = 12, 3, 6
LARGE = 1e4


def counts(ranks: int) -> torch.Tensor:
    """``[B, W]``: uneven shares; rank 1 has nothing of bag 0, and of all bags only the last rank has the last one."""
    weights = torch.arange(1.0, ranks + 1).expand(len(LENGTHS), ranks).clone()
    if ranks > 1:
        weights[0, 1] = 0
        weights[-1, :-1] = 0
    shares = (weights / weights.sum(1, keepdim=True) * torch.tensor(LENGTHS)[:, None]).long()
    shares[:, -1] += torch.tensor(LENGTHS) - shares.sum(1)
    return shares


def own(rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows of the whole, offsets)`` of a rank."""
    shares, starts = counts(ranks), torch.tensor([0, *LENGTHS]).cumsum(0)
    rows = [
        torch.arange(int(starts[b] + shares[b, :rank].sum()), int(starts[b] + shares[b, : rank + 1].sum()))
        for b in range(len(LENGTHS))
    ]
    return torch.cat(rows), torch.cat([torch.zeros(1, dtype=torch.int64), shares[:, rank].cumsum(0)])


class Scored(nn.Module):
    """`SoftmaxPool` with scores of the rows; large ones, whose lse loses digits in float32."""

    def __init__(self, shift=0.0, group=None):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.linspace(-1, 1, 2 * L).view(2, L)), shift
        self.pool = mk.nn.SoftmaxPool(group)

    def forward(self, x, offsets=None, mask=None):
        return self.pool(x, x @ self.weight.T + self.shift, offsets, mask)


class Embedded(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.linear, self.pool = nn.Linear(L, 8), pool

    def forward(self, x, offsets=None, mask=None):
        return self.pool(x, offsets, mask, embed=mk.Embed(self.linear, "tanh"))


MODULES = {
    "attention": lambda group=None: mk.nn.AttentionPool(L, D, heads=2, gated=False, group=group),
    "gated": lambda group=None: mk.nn.AttentionPool(L, D, heads=2, group=group),
    "embedded": lambda group=None: Embedded(mk.nn.AttentionPool(8, D, group=group)),
    "softmax": lambda group=None: Scored(group=group),
    "dsmil": lambda group=None: mk.nn.DSMIL(L, C, D, group=group),
    "dsmil-linear": lambda group=None: mk.nn.DSMIL(
        L, C, D, nonlinear_query=False, value="relu", scale=1.0, group=group
    ),
    "embedded-dsmil": lambda group=None: Embedded(mk.nn.DSMIL(8, C, D, group=group)),
    "loss-attention": lambda group=None: mk.nn.LossAttention(L, C, group=group),
    "mean": lambda group=None: mk.nn.MeanPool(group),
    "max": lambda group=None: mk.nn.MaxPool(group),
    "abmil": lambda group=None: mk.nn.ABMIL(L, C, 8, D, group=group),
    "dsmil-model": lambda group=None: mk.nn.DSMILModel(L, C, 8, D, group=group),
    "loss-attention-model": lambda group=None: mk.nn.LossAttentionModel(L, C, (8,), group=group),
}


def made(name, dtype=torch.float64, group=None):
    torch.manual_seed(1)
    return MODULES[name](group).to(dtype)


def whole(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(LENGTHS), L, generator=g, dtype=torch.float64).relu() + 0.1
    mask = torch.rand(sum(LENGTHS), generator=g) > 0.2
    return x.to(dtype), torch.tensor([0, *LENGTHS]).cumsum(0), mask


def common(out) -> dict[str, torch.Tensor]:
    """What is the same on every rank, and differentiable."""
    if isinstance(out, torch.Tensor):
        return {"mean": out}
    found = {name: getattr(out, name) for name in ("bag", "lse", "values") if hasattr(out, name)}
    if hasattr(out, "pooled"):
        found |= {"logits": out.logits} | common(out.pooled)
    return found


def loss(out, rank_weight=1.0) -> torch.Tensor:
    """Of everything that is finite; `rank_weight` has every rank want something else."""
    total = 0
    for i, t in enumerate(common(out).values()):
        wanted = torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) * (1 + 0.1 * i)
        total = (
            total
            + (t.masked_fill(t.isinf(), 0) * wanted * rank_weight).sum()
            + t.masked_fill(t.isinf(), 0).square().sum()
        )
    if hasattr(out, "scores"):  # each rank its own
        total = total + 0.01 * out.scores.masked_fill(out.scores.isinf(), 0).square().sum() * rank_weight
    return total


def error(ours, exact) -> float:
    ours, exact = ours.detach().double(), exact.detach().double()
    same = (ours == exact) | (ours.isnan() & exact.isnan())  # infinities
    difference = torch.where(same, 0, ours - exact)
    return (difference.norm() / exact[exact.isfinite()].norm().clamp(min=1e-3)).item()


def spread(rank, ranks, name, dtype, masked):
    """The errors of outputs, of the gradient of rows and of parameters, and the bits of what is common."""
    x, offsets, mask = whole()
    reference = made(name)
    x.requires_grad_()
    exact = reference(x, offsets, mask if masked else None)
    objective = sum(loss(exact, 1 + r) for r in range(ranks)) / ranks
    if hasattr(exact, "scores"):  # each rank wants something of its own rows only
        scores = exact.scores.masked_fill(exact.scores.isinf(), 0)
        for r in range(ranks):
            alone = 0.01 * scores.square()
            objective = objective - (1 + r) * (alone.sum() - alone[own(r, ranks)[0]].sum()) / ranks
    objective.backward()

    rows, own_offsets = own(rank, ranks)
    module = made(name, dtype, dist.group.WORLD)
    mine = x.detach()[rows].to(dtype).requires_grad_()
    out = module(mine, own_offsets, mask[rows] if masked else None)
    loss(out, 1 + rank).backward()
    errors = {key: error(t, common(exact)[key]) for key, t in common(out).items()}
    if hasattr(out, "scores"):
        errors["scores"] = error(out.scores, exact.scores[rows])
        weights = mk.attention_weights(out, own_offsets), mk.attention_weights(exact, offsets)[rows]
        errors["weights"] = error(*weights)
    errors["x"] = error(mine.grad / ranks, x.grad[rows]) if len(rows) else 0.0
    for p in module.parameters():
        dist.all_reduce(p.grad)
        p.grad /= ranks
    size = max([p.grad.norm().item() for p in reference.parameters()], default=1)
    for (key, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        errors[key] = ((p.grad - q.grad).norm() / size).item()
    chosen = {}
    for field in {"critical", "indices"} & set(getattr(out, "_fields", ())):
        index = getattr(out, field)
        there = rows[index.clamp(min=0)] if len(rows) else index
        chosen = {"here": torch.where(index < 0, -1, there), "all": getattr(exact, field)}
    return errors, [t.detach() for t in common(out).values()], chosen


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_exact(ranks):
    """Every module, in float64, with and without a mask, in one set of processes."""
    answers = run(everything, ranks, ranks)
    for key, (_, bits, chosen) in answers[0].items():
        for errors, its_bits, _ in (answer[key] for answer in answers):
            assert all(e < 1e-14 * (8 if name in ("x", "weights") else 4) for name, e in errors.items()), (key, errors)
            assert all(map(torch.equal, its_bits, bits)), "equal on all ranks"
        if chosen:
            here = torch.stack([answer[key][2]["here"] for answer in answers])
            assert torch.equal(here.amax(0), chosen["all"]) and ((here >= 0).sum(0) <= 1).all(), key


def everything(rank, ranks):
    return {
        f"{name} {masked}": spread(rank, ranks, name, torch.float64, masked) for name in MODULES for masked in (0, 1)
    }


# Numbers


def in_single_precision(rank, ranks):
    """Every output's error beside that of one process, against the whole in float64."""
    found = {}
    for name in ("gated", "dsmil", "loss-attention", "mean", "softmax"):
        x, offsets, _ = whole()
        rows, own_offsets = own(rank, ranks)
        exact = common(made(name)(x, offsets))
        ours = common(made(name, torch.float32, dist.group.WORLD)(x[rows].float(), own_offsets))
        one = common(made(name, torch.float32)(x.float(), offsets))
        found |= {f"{name} {k}": (error(ours[k], exact[k]), error(one[k], exact[k])) for k in exact}
    return found


def test_single_precision_keeps_the_promise():
    eps = torch.finfo(torch.float32).eps
    for answer in run(in_single_precision, 3, 3):
        for key, (ours, one) in answer.items():
            assert ours <= 2 * one + 4 * eps, (key, ours, one)


def large(rank, ranks, how):
    x, offsets, _ = whole()
    rows, own_offsets = own(rank, ranks)
    scores = x @ torch.linspace(-1, 1, L, dtype=torch.float64)[:, None] * 3 + LARGE
    scores = scores.float()
    exact = mk.softmax_pool(x, scores.double(), offsets, backend="reference")
    if how == "module":
        return error(mk.nn.SoftmaxPool(dist.group.WORLD)(x[rows].float(), scores[rows], own_offsets).bag, exact.bag)
    part = mk.softmax_pool(x[rows].float(), scores[rows], own_offsets)
    return error(mk.all_merge(part, offsets=own_offsets if how == "offsets" else None).bag, exact.bag)


def test_large_scores_keep_their_digits():
    """An lse of 1e4 in float32 has lost what shares need, unless the scores say it."""
    eps = torch.finfo(torch.float32).eps
    assert max(run(large, 3, 3, "offsets")) < 4 * eps and max(run(large, 3, 3, "module")) < 4 * eps
    assert max(run(large, 3, 3, "none")) > 100 * eps, "then nothing was tested"


def half(rank, ranks):
    x, offsets, _ = whole(torch.float16)
    rows, own_offsets = own(rank, ranks)
    out = made("gated", torch.float32, dist.group.WORLD)(x[rows], own_offsets)
    with torch.autocast("cpu", torch.bfloat16):
        cast = made("gated", torch.float32, dist.group.WORLD)(x[rows], own_offsets)
    one = made("gated", torch.float32)(x, offsets)
    return [
        out.bag.dtype == one.bag.dtype,
        cast.lse.dtype == torch.float32,
        error(out.bag, one.bag),
        error(cast.bag, one.bag),
    ]


def test_half_types_and_autocast():
    for same, wide, plain, cast in run(half, 2, 2):
        assert same and wide and plain < 1e-3 and cast < 2e-2


def repeated(rank, ranks):
    rows, own_offsets = own(rank, ranks)
    x, found = whole(torch.float32)[0][rows], []
    for _ in range(2):
        module = made("gated", torch.float32, dist.group.WORLD)
        mine = x.clone().requires_grad_()
        out = module(mine, own_offsets)
        loss(out, 1 + rank).backward()
        found.append([out.bag.detach(), out.lse.detach(), mine.grad, *(p.grad for p in module.parameters())])
    return found


def test_runs_repeat_to_the_last_bit():
    first, second = run(repeated, 3, 3), run(repeated, 3, 3)
    for (a, b), (c, d) in zip(first, second, strict=True):
        for others in (b, c, d):
            assert all(map(torch.equal, a, others))


def ties(rank, ranks):
    """Equal rows everywhere: the lowest rank has the maximum; NaN wins; a rank without any never does."""
    values = torch.tensor([[1.0, 2.0, -torch.inf, 0.0]])
    if rank == 1:
        values = torch.tensor([[1.0, 3.0, -torch.inf, torch.nan]])
    if rank == 2:
        values = torch.tensor([[-torch.inf, 3.0, -torch.inf, 9.0]])
    rows = torch.full((1, 4, 2), float(rank + 1)).requires_grad_()
    values.requires_grad_()
    out = mk.all_critical(rows, values)
    (out.rows.sum() + 2 * out.values.nan_to_num(0, 0, 0).sum()).backward()
    return out.rank, out.rows.detach(), out.values.detach(), rows.grad[0, :, 0], values.grad


def test_the_lowest_rank_wins_a_tie():
    for rank, (owner, rows, values, g_rows, g_values) in enumerate(run(ties, 3, 3)):
        assert owner.tolist() == [[0, 1, -1, 1]]
        assert rows[0, :, 0].tolist() == [1, 2, 0, 2]
        assert values[0, :3].tolist() == [1, 3, -torch.inf] and values[0, 3].isnan()
        mine = [float(owner[0, c] == rank) for c in range(4)]
        assert g_rows.tolist() == [3 * m for m in mine]  # of the sum over three ranks
        assert g_values[0, :2].tolist() == [6 * m for m in mine[:2]]


# With what PyTorch has


class Model(nn.Module):
    def __init__(self, group=None):
        super().__init__()
        self.encoder, self.abmil = nn.Linear(L, 8), mk.nn.ABMIL(8, 2, 6, D, group=group)

    def forward(self, x, offsets):
        return self.abmil(torch.relu(self.encoder(x)), offsets).logits


def labels():
    return torch.arange(len(LENGTHS)) % 2


def plain_gradients():
    torch.manual_seed(1)
    model, (x, offsets, _) = Model().double(), whole()
    nn.functional.cross_entropy(model(x, offsets), labels()).backward()
    return model


def largest_error(parameters, exact):
    size = max(p.grad.norm() for p in exact.parameters()).clamp(min=1e-9)
    pairs = zip(parameters, exact.parameters(), strict=True)
    return max(((p - q.grad).norm() / size).item() for p, q in pairs)


def wrapped(rank, ranks, how):
    rows, offsets = own(rank, ranks)
    x = whole()[0][rows]
    torch.manual_seed(1)
    group = dist.group.WORLD
    mesh = None
    if how in ("mesh", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "bags"))
        group = mesh["bags"]
        rows, offsets = own(rank % 2, 2)
        x = whole()[0][rows]
    model = Model(group).double()
    if how in ("ddp", "mesh"):
        model = nn.parallel.DistributedDataParallel(model)
    if how in ("fsdp2", "hsdp"):
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.encoder, mesh=mesh)
        fully_shard(model, mesh=mesh)
    compiled = how in ("aot_eager", "inductor")
    call = torch.compile(model, backend=how, fullgraph=True) if compiled else model
    nn.functional.cross_entropy(call(x, offsets), labels()).backward()
    found = []
    for p in model.parameters():
        g = p.grad.full_tensor() if how in ("fsdp2", "hsdp") else p.grad
        if compiled:
            dist.all_reduce(g)
            g /= ranks
        found.append(g)
    return largest_error(found, plain_gradients())


@pytest.mark.parametrize(
    ("how", "ranks"),
    [
        *(("ddp", 3), ("fsdp2", 3), ("mesh", 4), ("hsdp", 4)),
        *(pytest.param(backend, 2, marks=pytest.mark.slow) for backend in ("aot_eager", "inductor")),
    ],
)
def test_gradients_as_they_come(how, ranks):
    """What DDP and FSDP2 leave in ``grad`` is what one process has: of a mesh, two copies of two shares each, where
    the second dimension has the bags and, under "hsdp", the shards of parameters too."""
    assert max(run(wrapped, ranks, ranks, how)) < 1e-14


def compiled_ops(rank, ranks, backend):
    """The functions themselves, inside of a compiled function, and DSMIL's two gathers."""
    rows, offsets = own(rank, ranks)
    x = whole()[0][rows]
    dsmil = made("dsmil", group=dist.group.WORLD)

    @torch.compile(backend=backend, fullgraph=True)
    def step(x, scores):
        return mk.all_merge(mk.softmax_pool(x, scores, offsets), offsets=offsets).bag, dsmil(x, offsets).bag

    scores = x[:, :2].clone().requires_grad_()
    found = step(x, scores)
    sum(t.square().sum() for t in found).backward()
    compiled, scores.grad = scores.grad, None
    plain = mk.all_merge(mk.softmax_pool(x, scores, offsets), offsets=offsets).bag, dsmil(x, offsets).bag
    sum(t.square().sum() for t in plain).backward()
    return [error(a, b) for a, b in zip((*found, compiled), (*plain, scores.grad), strict=True)]


def compiled_module(rank, ranks, name):
    """The module by inductor, beside itself without a compiler."""
    rows, offsets = own(rank, ranks)
    found = []
    for compiled in (True, False):
        module = made(name, group=dist.group.WORLD)
        call = torch.compile(module, fullgraph=True) if compiled else module
        x = whole()[0][rows].requires_grad_()
        out = call(x, offsets)
        loss(out).backward()
        found.append([*common(out).values(), x.grad, *(p.grad for p in module.parameters())])
    torch._dynamo.reset()
    return [error(*pair) for pair in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_modules_compiled_by_inductor(name):
    for errors in run(compiled_module, 2, 2, name):
        assert max(errors) < 1e-14, errors


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_into_one_graph(backend):
    for errors in run(compiled_ops, 2, 2, backend):
        assert max(errors) < 1e-14


class EndToEnd(nn.Module):
    def __init__(self, group=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(L, 8), nn.Tanh())
        self.dsmil = mk.nn.DSMILModel(8, 2, query_dim=D, group=group)

    def forward(self, x, offsets, chunk):
        features = mk.encode_in_chunks(self.encoder, lambda a, b: x[a:b], len(x), chunk)
        return self.dsmil(features, offsets)


def end_to_end(rank, ranks):
    rows, own_offsets = own(rank, ranks)
    x, offsets, _ = whole()
    models = []
    for wrap, its_x, its_offsets in (
        (nn.parallel.DistributedDataParallel, x[rows], own_offsets),
        (lambda m: m, x, offsets),
    ):
        torch.manual_seed(1)
        models.append(wrap(EndToEnd(dist.group.WORLD if its_x is not x else None).double()))
        losses.dsmil_loss(models[-1](its_x, its_offsets, 16), nn.functional.one_hot(labels(), 2)).backward()
    return largest_error([p.grad for p in models[0].parameters()], models[1])


def test_through_an_encoder_and_over_ranks():
    """The last rank has most of the rows, the second none of the first bag: other numbers of chunks everywhere."""
    assert max(run(end_to_end, 3, 3)) < 1e-14


STREAMED = ("gated", "embedded", "dsmil", "embedded-dsmil", "loss-attention", "mean", "max", "abmil", "dsmil-model")


def streamed(rank, ranks):
    """Every rank reads its own rows in pieces."""
    x, offsets, mask = whole()
    rows, own_offsets = own(rank, ranks)
    errors = {}
    for name in STREAMED:
        for masked in (False, True):
            module, other = made(name, group=dist.group.WORLD), made(name, group=dist.group.WORLD)
            stream = StreamedBag(x[rows], rows=16, prefetch=0)
            out = module(stream, own_offsets, mask[rows] if masked else None)
            one = other(x[rows], own_offsets, mask[rows] if masked else None)
            errors |= {f"{name} {key}": error(t, common(one)[key]) for key, t in common(out).items()}
            if name in ("mean", "max"):
                continue
            loss(out, 1 + rank).backward()
            loss(one, 1 + rank).backward()
            errors[name] = largest_error([p.grad for p in module.parameters()], other)
    alone = mk.nn.MeanPool(dist.group.WORLD)
    errors["one bag"] = error(alone(StreamedBag(x[rows], rows=16, prefetch=0)), alone(x[rows]))
    return errors


def test_streamed_by_every_rank():
    for errors in run(streamed, 3, 3):
        assert all(e < 5e-14 for e in errors.values()), errors


def dropped(rank, ranks):
    torch.manual_seed(7)  # on all ranks
    x = torch.ones(64, L)
    module = mk.nn.AttentionPool(L, 16, dropout=0.5, group=dist.group.WORLD)
    embedded = Embedded(mk.nn.DSMIL(8, C, D, group=dist.group.WORLD))
    first = module(x).scores
    again = module(x, seed=3).scores, module(x, seed=3).scores
    module.eval()
    h = embedded.pool(x, embed=mk.Embed(embedded.linear, "tanh", 0.5), seed=5)
    return first.detach(), torch.equal(*again), module(x).scores.std().item(), h.logits.detach()


def test_ranks_drop_other_units():
    (a, same, none, h), (b, *_, k) = run(dropped, 2, 2)
    assert not torch.equal(a, b) and (a == b).float().mean() < 0.2 and same and none == 0
    assert not torch.equal(h, k)


# What goes wrong


def absent(rank, ranks):
    x = torch.ones(4, L, requires_grad=True)
    if rank == 1:
        raise ValueError("no such slide")
    start = time.monotonic()
    try:
        mk.all_merge(mk.softmax_pool(x, x[:, :1]))
    except RuntimeError:
        return time.monotonic() - start
    return None


def late(rank, ranks):
    if rank == 1:
        time.sleep(8)
        return 0.0
    start = time.monotonic()
    x = torch.ones(4, L)
    try:
        mk.all_merge(mk.softmax_pool(x, x[:, :1]))
    except RuntimeError:
        return time.monotonic() - start
    return None


@pytest.mark.parametrize("what", [pytest.param(late, marks=pytest.mark.slow), absent])
def test_a_rank_that_fails_does_not_keep_the_others(what):
    """They wait no longer than the group's timeout, here of three seconds."""
    start = time.monotonic()
    if what is absent:
        with pytest.raises(RuntimeError, match="(?s)rank 1.*no such slide"):
            run(what, 2, 2, timeout=3)
    else:
        waited, _ = run(what, 2, 2, timeout=3)
        assert 2 < waited < 7
    assert time.monotonic() - start < 30


def refused(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "bags"))
    x = torch.ones(4, L)
    spread = DTensor.from_local(x, mesh["bags"], [Shard(0)])
    pooled = mk.softmax_pool(x, x[:, :1])
    alone = dist.new_group([0])
    said = []
    for call in (
        lambda: mk.softmax_pool(spread, x[:, :1]),
        lambda: mk.nn.AttentionPool(L, 4)(spread),
        lambda: mk.nn.ABMIL(L, 4)(spread),
        lambda: mk.Bags(spread, torch.tensor([0, 4])),
        lambda: mk.gated_attention_pool(
            x, DTensor.from_local(torch.ones(3, L), mesh["bags"], [Shard(0)]), torch.ones(3, L), torch.ones(1, 3)
        ),
        lambda: mk.softmax_pool(x, spread[:, :1]),
        lambda: mk.all_merge(pooled._replace(bag=DTensor.from_local(pooled.bag, mesh["bags"], [Shard(0)]))),
        lambda: mk.all_merge(pooled, mesh),
        lambda: mk.all_merge(pooled, "bags"),
        lambda: mk.all_merge(pooled.bag),
        lambda: mk.all_merge(pooled._replace(lse=pooled.lse[:, :0])),
        lambda: mk.all_critical(torch.ones(1, 2, 3), torch.ones(1, 3)),
        lambda: (
            mk.nn.MeanPool(alone) and (_ for _ in ()).throw(ValueError("in it")) if rank == 0 else mk.nn.MeanPool(alone)
        ),
    ):
        try:
            call()
            said.append("nothing")
        except (TypeError, ValueError) as wrong:
            said.append(f"{type(wrong).__name__}: {wrong}")
    return [
        *said,
        repr(mk.nn.AttentionPool(L, 4, group=mesh["bags"])),
        copy.deepcopy(mk.nn.MaxPool(mesh["bags"])).group.size,
    ]


def test_wrong_arguments():
    for rank, said in enumerate(run(refused, 2, 2)):
        *errors, shown, size = said
        for error in errors[:7]:
            assert error.startswith("TypeError") and ".to_local()" in error, error
        assert errors[7].startswith("ValueError: group must be a mesh of one dimension, mesh[name]; got one of 2")
        assert errors[8] == "TypeError: group must be a ProcessGroup, a DeviceMesh or None; got str"
        assert errors[9] == "TypeError: pooled must be what a pooling op returned; got Tensor"
        assert errors[10].startswith("ValueError: pooled.lse must be [1, 1]; got shape (1, 0)")
        assert errors[11].startswith("ValueError: values must be [1, 2]; got shape (1, 3)")
        assert errors[12].startswith("ValueError") and ("in it" in errors[12] or rank == 0)
        assert "of 2" in shown and size == 2


def test_no_process_group():
    pooled = mk.softmax_pool(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group first"):
        mk.all_merge(pooled)
    with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group first"):
        mk.nn.AttentionPool(4, group="world")
