"""Where the pieces of a streamed bag come from: kinds of sources, transforms, memory, and what can go wrong."""

import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import milkernels
from milkernels import nn
from milkernels.streaming import StreamedBag

np = pytest.importorskip("numpy")
N, L = 43, 8
X = torch.randn(N, L, generator=torch.Generator().manual_seed(0)).half().float()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def model():
    torch.manual_seed(1)
    return nn.ABMIL(L, 2, 6, 4)


def step(model, given, *bags):
    model.zero_grad()
    out = model(given, *bags)
    out.logits.square().sum().backward()
    return [out.logits.detach(), *[p.grad for p in model.parameters()]]


# Sources


def npy(path, x):
    np.save(path / "a.npy", x.numpy())
    return path / "a.npy"


def h5(path, x):
    file = pytest.importorskip("h5py").File(path / "a.h5", "w")
    return file.create_dataset("features", data=x.numpy())


def h5_path(path, x):
    h5(path, x).file.close()
    return str(path / "a.h5")


def pt(path, x):
    torch.save(x, path / "a.pt")
    return path / "a.pt"


SOURCES = {
    "tensor": lambda path, x: x,
    "strided tensor": lambda path, x: torch.cat([x, x], 1)[:, :L],
    "array": lambda path, x: x.numpy(),
    "memory map": lambda path, x: np.load(npy(path, x), mmap_mode="r"),
    "path of .npy": npy,
    "path of .pt": pt,
    "path of .h5": h5_path,
    "h5 dataset": h5,
    "list": lambda path, x: [x[:5], x[5:5], npy(path, x[5:30]), x[30:].numpy()],
    "function": lambda path, x: lambda: iter(x.split(7)),
    "function of arrays": lambda path, x: lambda: (piece.numpy() for piece in x.split(25)),
    "function of a list": lambda path, x: lambda: list(x.split(9)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_sources(name, dtype, model, tmp_path):
    stream = StreamedBag(SOURCES[name](tmp_path, X.to(dtype)), rows=10)
    offsets, mask = torch.tensor([0, 0, 12, N]), torch.arange(N) % 3 != 0
    torch.testing.assert_close(step(model, stream, offsets, mask), step(model, X.to(dtype), offsets, mask))
    assert stream.reads == 2 and stream.waited >= 0
    torch.testing.assert_close(step(model, stream, offsets, mask), step(model, X.to(dtype), offsets, mask))  # once more


@pytest.mark.parametrize("name", SOURCES)
def test_some_rows(name, tmp_path):
    stream = StreamedBag(SOURCES[name](tmp_path, X), rows=10, transform=lambda x: 2 * x)
    rows = torch.tensor([40, 3, 3, 0, 42])
    assert torch.equal(stream.take(rows), 2 * X[rows])
    assert stream.take(rows[:0]).shape == (0, L)
    for wrong, message in (([5, 43], "which has fewer; got 43"), ([-1], "at least 0; got -1")):
        with pytest.raises(ValueError, match=f"rows must be .*{message}"):
            stream.take(torch.tensor(wrong))
    with pytest.raises(ValueError, match="rows must be int64"):
        stream.take(torch.zeros(2))


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("rows", [1, N, 1000])
def test_rows_and_prefetch(rows, prefetch, model):
    stream = StreamedBag(X.numpy(), rows, prefetch=prefetch)
    torch.testing.assert_close(step(model, stream), step(model, X))


def test_a_function_s_pieces_are_cut_and_not_joined(model):
    sizes = []

    def transform(piece):
        sizes.append(len(piece))
        return piece

    with torch.no_grad():
        model(StreamedBag(lambda: iter([X[:3], X[3:3], X[3:]]), rows=16, transform=transform))
    assert sizes == [3, 16, 16, 8]


def test_bags_without_rows():
    offsets = torch.tensor([0, 0, 0])
    for out in (milkernels.mean_pool(StreamedBag(X[:0]), offsets), milkernels.mean_pool(X[:0], offsets)):
        assert torch.equal(out, torch.zeros(2, L))
    assert milkernels.mean_pool(StreamedBag(X[:0]), offsets[:1]).shape == (0, L)
    embed = milkernels.Embed(torch.randn(5, L), "relu", 0.5)
    out = milkernels.dsmil(StreamedBag(X[:0]), torch.randn(2, 5), torch.randn(3, 5), offsets, embed=embed)
    assert not out.bag.any() and bool((out.critical == -1).all()) and out.scores.shape == (0, 2)


def test_a_piece_of_a_file_may_be_kept_and_written_to(tmp_path, model):
    """It is a map of its own: nothing is read over it, and nothing of it reaches the file or the next read."""
    path, held = npy(tmp_path, X), []

    def transform(piece):
        held.append(piece)
        return piece.mul_(2)

    torch.testing.assert_close(step(model, StreamedBag(path, 10, transform)), step(model, 2 * X))
    assert torch.equal(torch.cat(held), torch.cat([2 * X, 2 * X])) and np.array_equal(np.load(path), X.numpy())


THREADS = {"tensor": 0, "array": 0, "path of .npy": 0, "path of .pt": 1, "memory map": 1, "list": 0, "function": 1}


@pytest.mark.parametrize("name", THREADS)
def test_a_thread_where_it_is_of_use(name, tmp_path):
    """Not for what is in memory, nor where the system reads ahead."""
    seen = []

    def transform(piece):
        seen.append(sum(t.name == "milkernels-stream" for t in threading.enumerate()))
        return piece

    milkernels.mean_pool(StreamedBag(SOURCES[name](tmp_path, X), 5, transform))
    assert seen[0] == THREADS[name]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be told")
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_what_the_system_reads_ahead(prefetch, tmp_path, monkeypatch):
    """Each row once, and ``prefetch`` pieces before it is needed."""
    path, told, at = npy(tmp_path, X), [], []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, size, _: told.append((offset, size)))
    milkernels.mean_pool(StreamedBag(path, 10, lambda piece: at.append(len(told)) or piece, prefetch=prefetch))
    assert at == [min(5, i + prefetch + 1) for i in range(5)]
    row = L * X.itemsize
    assert [size for _, size in told] == [10 * row] * 4 + [3 * row]
    assert [offset - told[0][0] for offset, _ in told] == [10 * row * i for i in range(5)]


# Transforms


def test_a_function_of_a_piece(model):
    raw = (X * 10).to(torch.int16)
    stream = StreamedBag(raw, rows=10, transform=lambda piece: piece.float() / 10)
    torch.testing.assert_close(step(model, stream), step(model, raw.float() / 10))


def test_an_encoder_is_trained_too(model):
    """Against one graph over the same pieces: a batch norm sees a piece at a time, and counts it once."""
    from torch import nn as torch_nn

    def made():
        torch.manual_seed(3)
        layers = torch_nn.Linear(5, L), torch_nn.BatchNorm1d(L), torch_nn.Dropout(0.3), torch_nn.Tanh()
        return torch_nn.Sequential(*layers).double()

    model, raw, encoder, other = model.double(), torch.randn(40, 5, dtype=torch.float64), made(), made()
    for pool in (model, nn.DSMILModel(L, 2, (6, 5)).double(), nn.EmbeddingPooling(L, 1, (6,), "max").double()):
        torch.manual_seed(4)
        ours = step(pool, StreamedBag(raw, 10, encoder))
        torch.manual_seed(4)
        features = torch.cat([other(piece) for piece in raw.split(10)])
        exact = step(pool, features)
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
        for a, b in zip(encoder.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dict(encoder.named_buffers()), dict(other.named_buffers()))
        encoder.zero_grad(), other.zero_grad()


def test_a_function_with_parameters_is_refused(model):
    layer = torch.nn.Linear(L, L)
    loss = model(StreamedBag(X, 10, lambda piece: layer(piece))).logits.sum()
    with pytest.raises(ValueError, match="transform must be the nn.Module itself where its parameters are trained"):
        loss.backward()


# What can go wrong


def fails_on(read, at=2):
    reads = []

    def source():
        reads.append(1)
        for i, piece in enumerate(X.split(10)):
            if len(reads) == read and i == at:
                raise OSError("the disk is gone")
            yield piece

    return source


def pieces_by_read(*reads):
    """The pieces of one read after the other."""
    left = [list(pieces) for pieces in reads]
    return lambda: iter(left.pop(0))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_the_source_is_raised(prefetch, model):
    with pytest.raises(OSError, match="the disk is gone"):
        model(StreamedBag(fails_on(1), prefetch=prefetch))
    loss = model(StreamedBag(fails_on(2), prefetch=prefetch)).logits.sum()
    with pytest.raises(OSError, match="the disk is gone"):
        loss.backward()
    assert all(p.grad is None for p in [*model.embed.parameters(), *model.attention.parameters()])


def exhausted():
    pieces = iter(X.split(10))
    return lambda: pieces


REPLAYS = {
    "exhausted": (exhausted, "got none for rows 0 to 10, piece 0"),
    "early": (lambda: pieces_by_read(X.split(10), X[:20].split(10)), "got none for rows 20 to 30, piece 2"),
    "more": (lambda: pieces_by_read(X.split(10), [*X.split(10), X[:1]]), "got more than the 43 of the first"),
    "other cuts": (lambda: pieces_by_read(X.split(10), X.split(20)), "got 20 for rows 0 to 10, piece 0"),
    "shuffled": (lambda: pieces_by_read(X.split(10), X.flip(0).split(10)), "got others for rows 0 to 10, piece 0"),
    "one value": (lambda: pieces_by_read([X], [X + torch.eye(N, L)]), "got others for rows 0 to 43, piece 0"),
}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("name", REPLAYS)
def test_other_rows_on_the_second_read(name, prefetch, model):
    source, message = REPLAYS[name]
    loss = model(StreamedBag(source(), prefetch=prefetch)).logits.sum()
    with pytest.raises(ValueError, match=f"source must give the same rows on every read; {message}"):
        loss.backward()


def test_nothing_is_half_done():
    """Neither random numbers nor buffers of what the stream went through."""
    encoder = torch.nn.Sequential(torch.nn.Linear(L, L), torch.nn.BatchNorm1d(L), torch.nn.Dropout(0.5))
    model = nn.ABMIL(L, 2, 6, 4)
    buffers = [b.clone() for b in encoder.buffers()]
    with pytest.raises(OSError, match="the disk is gone"):
        model(StreamedBag(fails_on(1), transform=encoder))
    assert all(map(torch.equal, encoder.buffers(), buffers))
    loss = model(StreamedBag(fails_on(2), transform=encoder)).logits.sum()
    buffers, state = [b.clone() for b in encoder.buffers()], torch.get_rng_state()
    with pytest.raises(OSError, match="the disk is gone"):
        loss.backward()
    assert all(map(torch.equal, encoder.buffers(), buffers)) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in encoder.parameters())


def test_a_file_that_is_cut_short(tmp_path, model):
    path = npy(tmp_path, X)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EOFError, match="ends before row 43 of the 43 that its header says"):
        model(StreamedBag(path))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StreamedBag(iter([X])), TypeError, "got list_iterator; give a function that returns a new one"),
        (lambda: StreamedBag(5), TypeError, "source must be an array or tensor that slices, .*; got int"),
        (lambda: StreamedBag([]), ValueError, "source must hold at least one array or path; got an empty list"),
        (lambda: StreamedBag([X, 5]), TypeError, r"source\[1\] must be an array or tensor that slices, or a path; got"),
        (lambda: StreamedBag(X[0]), ValueError, r"source must be \[N, L\]; got shape \(8,\)"),
        (lambda: StreamedBag(X.clone().requires_grad_()), ValueError, "source must not require a gradient"),
        (lambda: StreamedBag("a.txt"), ValueError, "source must end with one of .npy, .* got 'a.txt'"),
        (lambda: StreamedBag(X, rows=0), ValueError, "rows must be at least 1; got 0"),
        (lambda: StreamedBag(X, rows=2.0), TypeError, "rows must be an int; got float"),
        (lambda: StreamedBag(X, prefetch=-1), ValueError, "prefetch must be at least 0; got -1"),
        (lambda: StreamedBag(X, prefetch=None), TypeError, "prefetch must be an int; got NoneType"),
        (lambda: StreamedBag(X, transform=5), TypeError, "transform must be a function or an nn.Module; got int"),
        (
            lambda: StreamedBag(X, device="nowhere"),
            ValueError,
            "device must be one that PyTorch has here; got 'nowhere'",
        ),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((StreamedBag(torch.randn(5, 9)),), ValueError, r"x must have in_dim=8 features; got shape \(5, 9\)"),
        ((StreamedBag(X.to(torch.uint8)),), TypeError, "x must be of the type|x must be float16"),
        ((StreamedBag([X, X.half()]),), ValueError, "pieces must share one width and type, those of the first"),
        ((StreamedBag([X, X[:, :7]]),), ValueError, "pieces must share one width and type, those of the first"),
        ((StreamedBag(lambda: iter(())),), ValueError, r"source must give at least one piece \[n, L\]; got none"),
        ((StreamedBag(lambda: None),), TypeError, "what source returns must be an iterator of pieces; got NoneType"),
        ((StreamedBag(lambda: [5]),), ValueError, r"piece 0 of source must be \[n, L\]; got shape \(\)"),
        ((StreamedBag(lambda: ["a"]),), TypeError, "piece 0 of source must be a tensor, or an array"),
        (
            (StreamedBag(X, 10), torch.tensor([0, 12])),
            ValueError,
            "the number of instances, at least 20; got 12",
        ),
        ((StreamedBag(X, 10), torch.tensor([0, 99])), ValueError, "end at the number of instances, 43; got 99"),
        ((StreamedBag(X, 10), torch.tensor([0, 9, 4, N])), ValueError, "offsets must not decrease; got 4 after 9"),
        ((StreamedBag(X, 10), [0, N]), TypeError, "offsets must be a tensor; got list"),
        ((StreamedBag(X, 10), None, torch.ones(40)), ValueError, "mask must have a row for each instance, at least 43"),
        ((StreamedBag(X, 10), None, torch.ones(50)), ValueError, "mask must have a row for each instance, 43; got 50"),
        ((StreamedBag(X, 10), None, torch.ones(N, 1)), ValueError, r"mask must be \[N\]; got shape \(43, 1\)"),
        ((StreamedBag(X, 10, lambda x: x[:5]),), ValueError, r"transform must give a row for each of 10; got shape"),
        ((StreamedBag(X, 10, lambda x: 5),), TypeError, "transform must give a tensor; got int"),
        ((StreamedBag("nowhere.npy"),), FileNotFoundError, "nowhere.npy"),
    ],
)
def test_bags_that_do_not_fit(given, error, message, model):
    with pytest.raises(error, match=message):
        model(*given)


def test_arguments_that_do_not_fit():
    stream = StreamedBag(X, 10)
    with pytest.raises(ValueError, match="scores must have a row for each instance, 43; got 50"):
        milkernels.softmax_pool(stream, torch.ones(50, 1))
    with pytest.raises(ValueError, match=r"query must be \[2, any, L\]; got shape \(3, 1, 8\)"):
        milkernels.query_pool(stream, torch.ones(3, 1, L), torch.tensor([0, 5, N]))
    with pytest.raises(ValueError, match="backend must be one of"):
        milkernels.mean_pool(stream, backend="fast")
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1; got 2"):
        milkernels.attention_pool(stream, torch.ones(3, L), torch.ones(1, 3), dropout_p=2)
    with pytest.raises(TypeError, match="seed must be an int64 tensor, an int or None; got str"):
        milkernels.attention_pool(stream, torch.ones(3, L), torch.ones(1, 3), dropout_p=0.5, seed="a")


def test_what_is_changed_before_the_backward_is_found(model):
    loss = model(StreamedBag(X, 10)).logits.sum()
    with torch.no_grad():
        model.attention.v_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_stream_is_not_traced():
    stream = StreamedBag(X, 10)
    compiled = torch.compile(milkernels.mean_pool, backend="eager")
    assert torch.equal(compiled(stream), milkernels.mean_pool(stream)) and stream.reads == 2
    with pytest.raises(RuntimeError, match="torch.func needs the bag in memory"):
        torch.func.grad(lambda w: milkernels.attention_scores(stream, w, torch.ones(1, 3)).sum())(torch.ones(3, L))


@pytest.mark.slow
def test_the_benchmark(capfd):
    from benchmarks import stream

    stream.main(["--fits", "3000", "--gigabytes", "0.02", "--rounds", "1", "--rows", "1024", "--model", "dsmil"])
    out = capfd.readouterr().out
    assert "duel: instances 3000" in out and "peak: file_gb 0.02" in out and "gradient_error" in out


# The page of the documentation

PAGE = Path(__file__).parent.parent / "docs" / "tutorials" / "large-bags.md"


@pytest.mark.skipif(not PAGE.exists(), reason="a source distribution has no docs")
def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks, names = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S), {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) >= 8 and "source must give the same rows on every read" in capsys.readouterr().out


# Memory

STEP = """
    import resource, sys
    from pathlib import Path
    import numpy as np
    import torch
    from milkernels import nn, saved_bytes
    from milkernels.streaming import StreamedBag

    rows, width, path = 1 << 17, 1024, Path(sys.argv[1])
    block = torch.randn(4096, width).half().numpy()
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, 4096):
            file.write(np.roll(block, start // 4096, 1).data)
    model = nn.AttentionPool(width, 8)
    source = path if sys.argv[2] == "path" else np.load(path, mmap_mode="r")
    model(torch.randn(100, width)).bag.sum().backward()
    model.zero_grad()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (BEYOND << 20),) * 2)
    with saved_bytes("8MiB"):
        if sys.argv[2] == "memory":
            model(torch.from_numpy(np.load(path))).bag.sum().backward()
        else:
            model(StreamedBag(source, rows=4096)).bag.square().sum().backward()
    assert model.v_weight.grad.any()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("kind", ["path", "memory map", "memory"])
def test_a_file_larger_than_the_memory_that_there_is(kind, tmp_path):
    """256 MB of features under a limit of 200 MB beyond PyTorch's: a thread of glibc reserves 64 MB of it."""
    code = textwrap.dedent(STEP).replace("BEYOND", "200")
    command = [sys.executable, "-c", code, str(tmp_path / "bag.npy"), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=None)
    if kind == "memory":
        assert done.returncode and "memory" in done.stderr.lower(), done.stderr
    else:
        assert done.returncode == 0, done.stderr
