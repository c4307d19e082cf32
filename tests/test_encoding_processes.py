"""`encode_in_chunks` on several ranks, which have different numbers of patches: DDP and FSDP2 around it."""

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo, run
from test_encoding import encoder, gradients, head, images, in_chunks, one_graph
from torch import nn

pytestmark = needs_gloo
COUNTS = (24, 41, 8)


class Model(nn.Module):
    def __init__(self, encode, unused=False, **options):
        super().__init__()
        self.encode, self.encoder, self.head = (
            encode,
            encoder(dtype=torch.float32, **options),
            head(dtype=torch.float32).eval(),
        )
        if unused:
            self.encoder[5].weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.head(self.encode(self.encoder, x, 8)).logits


def loss(model, rank, silent=()):
    x = images(COUNTS[rank], torch.float32, seed=rank)
    value = nn.functional.cross_entropy(model(x), torch.tensor([rank % 3]))
    return value * 0 if rank in silent else value


def expected(ranks, silent=(), **options):
    """The mean over ranks of their gradients, in one process."""
    model = Model(one_graph, **options)
    (sum(loss(model, rank, silent) for rank in range(ranks)) / ranks).backward()
    return gradients(model)


def close(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


def ddp(rank, ranks, silent, unused):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    buckets = []
    model = nn.parallel.DistributedDataParallel(Model(in_chunks, unused))

    def hook(state, bucket):
        buckets.append(1)
        return default_hooks.allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    loss(model, rank, silent).backward()
    if unused:
        assert not model.module.encoder[5].weight.grad.any()
        model.module.encoder[5].weight = None
    found = gradients(model)
    return close(found, expected(ranks, silent)), len(buckets), found


@pytest.mark.parametrize("unused", [False, True], ids=["", "a parameter is unused"])
@pytest.mark.parametrize("silent", [(), (1,)], ids=["all", "one has no gradient"])
def test_ddp(silent, unused):
    """Ranks with 3, 6 and 1 chunks, of which one's are not encoded again, hand over gradients once."""
    answers = run(ddp, 3, 3, silent, unused)
    assert all(error < 1e-6 and buckets == 1 for error, buckets, _ in answers)
    assert all(torch.equal(found, answers[0][2]) for *_, found in answers)


def fsdp(rank, ranks, what):
    from torch.distributed.fsdp import fully_shard

    model = Model(in_chunks, unused=what == "encoder, a parameter is unused")
    if what == "blocks":
        fully_shard(model.encoder[0])
        fully_shard(model.encoder[4])
    if what.startswith("encoder,") or what in ("encoder", "blocks"):
        fully_shard(model.encoder)
    if what == "encoder alone":
        fully_shard(model.encoder)
    else:
        fully_shard(model, reshard_after_forward=what == "root, resharded" or None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    errors = []
    plain = Model(one_graph)
    silent = (1,) if "unused" in what else ()
    other = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, rank, silent).backward()
        other.zero_grad()
        (sum(loss(plain, r, silent) for r in range(ranks)) / ranks).backward()
        if "unused" in what:
            assert not model.encoder[5].weight.grad.full_tensor().any()
            model.encoder[5].weight.grad = None
        both = zip((p for p in model.parameters() if p.grad is not None), plain.parameters(), strict=True)
        for a, b in both:
            whole = a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else mean(a.grad)
            errors.append(((whole - b.grad).norm() / gradients(plain).norm()).item())
            if not hasattr(a.grad, "full_tensor"):
                a.grad = whole
        optimizer.step()
        other.step()
    held = loss(model, rank)
    optimizer.step()
    try:
        held.backward()
    except RuntimeError as error:
        said = str(error)
    else:
        said = "nothing"
    return max(errors), said


def mean(t):
    t = t.clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()


@pytest.mark.parametrize(
    "what", ["root", "root, resharded", "encoder", "encoder, a parameter is unused", "blocks", "encoder alone"]
)
def test_fsdp2(what):
    """Whatever is sharded: the whole model, the encoder in it, blocks of the encoder."""
    for error, said in run(fsdp, 3, 3, what):
        assert error < 1e-6
        if what in ("encoder", "blocks"):
            assert "must not change between forward and backward" in said


def refused(rank, what):
    model = encoder("batch", dtype=torch.float32)
    model = (
        nn.parallel.DistributedDataParallel(model) if what == "ddp" else nn.SyncBatchNorm.convert_sync_batchnorm(model)
    )
    try:
        in_chunks(model, images(8, torch.float32))
    except ValueError as error:
        return [str(error)]
    return [""]


@pytest.mark.parametrize(
    ("what", "said"),
    [("ddp", "encoder must be the module in it, encoder.module"), ("sync", "must not have SyncBatchNorm")],
)
def test_encoders_that_would_wait_for_each_other(what, said):
    assert all(said in error for (error,) in run(refused, 2, what))
