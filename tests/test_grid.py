"""The grids of benchmarks/: what they measure, kinds of units, going on later, pages, pictures, the README's rows."""

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("tabulate")

from benchmarks import clam, cpu_grid, disk, figures, grid, kinds, largest, matrix, pages, plots, results, runner, units
from milkernels.bench import contenders, memory, report
from milkernels.testing import CASES, Shape

GATED = cpu_grid.GATED
pytestmark = pytest.mark.usefixtures("quick_machine")
needs_results = pytest.mark.skipif(not results.FOLDER.is_dir(), reason="needs the source tree")


def unit(lengths=(40, 7), who="eager native", **more):
    more = {"dtype": "float32", "budget": 0.05, "modes": ("fwd", "step")} | more
    return units.unit(GATED, lengths, 24, who, hidden=16, device="cpu", **more)


def measured(one):
    """The rows of a unit, measured in this process."""
    rows = []
    kinds.measure(lambda event: rows.extend(event.get("rows", ())), one.to_json())
    assert json.loads(json.dumps(rows)) == rows
    return {(row["mode"], row["contender"]): row for row in rows}


# What is measured


def test_the_cpu_grid_is_what_it_says():
    grid = cpu_grid.grid(["float32", "bfloat16"], 8)
    assert len({u.name for u in grid}) == len(grid)
    for u in grid:
        assert units.Unit.from_json(u.to_json()) == u
        assert u.part in pages.TITLES and set(u.contenders) <= set(contenders.REGISTRY)
        assert contenders.REGISTRY[u.contenders[-1]].ours and u.workload.device == "cpu"
        if u.kind in ("bench", "alone"):
            assert set(u.modes) <= set(u.workload.case.modes()) and u.budget > 0
    one_bag = {u.workload.op for u in grid if u.part in ("attention", "ops")}
    assert one_bag == set(CASES), "each op has its share of the floor"
    for dtype, most in (("float32", 1_000_000), ("bfloat16", 4_000_000)):
        sizes = [u.workload.shape.instances for u in grid if u.part == "scaling" and u.dtype == dtype]
        assert max(sizes) == most and sizes == sorted(sizes)
    assert all(u.kind == "alone" for u in grid if u.part == "scaling")
    assert {u.threads for u in grid if u.part == "threads"} == {1, 2, 4, 8}
    shapes = [u.workload.shape for u in grid if u.part == "sizes"]
    assert all(len({getattr(shape, size) for shape in shapes}) > 2 for size in ("dim", "hidden", "heads"))
    lengths = [n for u in grid if u.part == "ragged" for n in u.workload.shape.lengths]
    assert min(lengths) == 1 and max(lengths) == 200_000
    peers = {name for u in grid if u.part == "ragged" for name in u.contenders}
    assert peers >= {"eager", "compile", "padded", "torchmil", "pyg", "jagged", "accumulate", "native"}
    assert {u.kind for u in grid} == {"bench", "alone", "largest", "disk"}
    assert {u.dtype for u in cpu_grid.grid(["float32"], 8) if u.kind != "disk"} == {"float32"}


def test_lengths_are_heavy_tailed():
    lengths = units.heavy_tailed_lengths(101, 10_000, 1.2, 200, 200_000)
    ordered = sorted(lengths)
    assert ordered[50] == 10_000 and ordered[0] >= 200 and ordered[-1] <= 200_000
    assert sum(lengths) / 101 > 1.5 * ordered[50], "the mean lies far above the median"
    assert list(lengths) != ordered and lengths == units.heavy_tailed_lengths(101, 10_000, 1.2, 200, 200_000)
    assert min(cpu_grid.CLASSICAL) == 1 and max(cpu_grid.CLASSICAL) <= 1_044
    assert min(cpu_grid.BOTH_ENDS) >= 200 and max(cpu_grid.BOTH_ENDS) == 200_000
    assert units.heavy_tailed_lengths(1, 50, 1.0, 1, 40) == (40,)


def test_shape_of_scores():
    scores = units.unit("segment_softmax", (30,), 512, "eager native", dtype="float32", device="cpu", heads=3)
    assert scores.workload.shape == Shape((30,), 3, 256, 3)


# The kinds of units


@pytest.mark.slow
def test_bench_has_rates_and_memory():
    rows = measured(unit())
    ours = rows["step", "native"]
    assert ours["status"] == "ok" and ours["bags"] == 2 and ours["instances"] == 47
    assert ours["resident"] is not None and ours["errors"] and ours["limits"]["read_bandwidth"] == 1e10
    assert rows["fwd", "eager"]["label"].startswith("eager")


def test_threads_are_those_of_the_unit(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setitem(kinds._KINDS, "calls", lambda unit, emit: seen.append(torch.get_num_threads()))
    for threads in (1, 0):
        kinds.measure(print, unit(threads=threads, kind="calls", modes=("softmax_pool 2 fwd",)).to_json())
    assert seen == [1, kinds._machine_threads()]
    torch.set_num_threads(before)


@pytest.mark.slow
def test_alone_is_another_process_and_is_judged():
    rows = measured(unit((50,), "eager accumulate native", kind="alone", seconds=300.0))
    assert set(rows) == {(m, c) for m in ("fwd", "step") for c in ("eager", "accumulate", "native")}
    assert all(row["status"] == "ok" and row["median"] > 0 and row["resident"] is not None for row in rows.values())
    ours = rows["step", "native"]
    assert len(ours["errors"]) == 1 and ours["share_of_floor"] > 0
    assert not rows["step", "eager"]["errors"]


def test_alone_tells_why_there_is_nothing(monkeypatch):
    rows = measured(unit((50,), "padded pyg-segment eager", kind="alone", seconds=0.01))
    assert {row["status"] for row in rows.values()} == {"error"}
    assert all("not finished" in row["reason"] for row in rows.values())

    def rows_of(who, fwd, step):
        monkeypatch.setattr(kinds, "ask", lambda *a: [{"mode": "fwd"} | fwd, {"mode": "step"} | step])
        return measured(unit((50,), who, kind="alone"))

    rows = rows_of("eager", {"status": "unavailable", "reason": "because"}, {"status": "error", "reason": "x"})
    assert rows["fwd", "eager"]["status"] == "unavailable" and rows["step", "eager"]["reason"] == "x"
    wrong = {"timing": {"seconds": [1.0]}, "once": True, "resident": 1, "status": "FAIL", "reason": "bag is off"}
    rows = rows_of("native", wrong, wrong)
    assert rows["fwd", "native"]["status"] == "FAIL" and rows["fwd", "native"]["reason"] == "bag is off"


def test_alone_is_judged_by_the_gate(monkeypatch):
    """In the process itself: a wrong result fails, what cannot run says so."""

    def spoilt(case, inputs, static):
        return lambda i: {name: t + 1 for name, t in case.call(i, "reference").items()}, inputs

    events = []
    monkeypatch.setitem(kinds.REGISTRY, "wrong", contenders.Contender("wrong", spoilt, ours=True))
    kinds.alone(events.append, unit((50,), "wrong", modes=("fwd",)).to_json(), "wrong")
    kinds.alone(events.append, unit((50,), "x", modes=("fwd",)).to_json(), "eager-logsumexp")
    assert [event["status"] for event in events] == ["FAIL", "unavailable"] and "bag" in events[0]["reason"]


def test_the_largest_bag_obeys_the_limit(monkeypatch):
    asked = []

    def search(fits):
        asked.extend([fits(100), fits(4_000_000)])
        return 100

    monkeypatch.setattr(largest, "largest", search)
    one = unit((64,), "eager", kind="largest", memory=1 << 28, modes=("step",))
    rows = measured(one)
    assert asked == [True, False] and rows["step", "eager"]["instances"] == 100  # 4M rows of 24 are 384 MB alone
    assert torch.ones(100 << 20).sum() > 0, "the limit ends with the search"
    rows = measured(replace(one, memory=1 << 60))
    assert rows["step", "eager"]["status"] == "unavailable" and "free" in rows["step", "eager"]["reason"]


def test_a_limit_on_memory():
    with memory.within(64 << 20), pytest.raises(RuntimeError, match="alloc"):
        torch.ones(1 << 26)
    with memory.within(1 << 30):
        torch.ones(1 << 24)


@pytest.mark.parametrize("mode", disk.FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_come_back_as_they_were(mode, dtype, tmp_path):
    if mode == "h5":
        pytest.importorskip("h5py")
    inputs = unit().workload.inputs(torch.float32)
    paths = disk._written(mode, inputs, getattr(torch, dtype), tmp_path)
    loaded = [disk.FORMATS[mode][1](path) for path in paths]
    assert [len(x) for x in loaded] == [40, 7] and all(x.dtype == getattr(torch, dtype) for x in loaded)
    assert torch.equal(torch.cat(loaded), inputs.x.to(getattr(torch, dtype)))
    disk._forget(paths[0])
    disk._forget(tmp_path / "absent")


def test_epochs_are_judged_in_the_type_of_the_files(monkeypatch):
    one, seen = unit(kind="disk", modes=("npz",), dtype="float16"), []
    native = contenders.REGISTRY["native"]

    def half_is_wrong(case, inputs, static):
        compute, inputs = native.prepare(case, inputs, static)

        def spoilt(i):
            seen.append(i.x.dtype)
            return {name: t + 1 if i.x.dtype == torch.float16 else t for name, t in compute(i).items()}

        return spoilt, inputs

    monkeypatch.setitem(contenders.REGISTRY, "native", replace(native, prepare=half_is_wrong))
    assert measured(one)["npz", "native"]["status"] == "FAIL" and torch.float16 in seen
    monkeypatch.setitem(contenders.REGISTRY, "native", native)
    assert measured(one)["npz", "native"]["status"] == "ok"


def test_epochs_from_files(monkeypatch):
    one = unit(kind="disk", modes=("npz", "pt, memory-mapped"), dtype="float16")
    rows = measured(one)
    assert set(rows) == {(mode, who) for mode in one.modes for who in ("eager", "native")}
    for row in rows.values():
        assert row["status"] == "ok" and len(row["seconds"]) == 5 and row["load"] > 0 and row["bags"] == 2
        assert row["file_bytes"] >= 47 * 24 * 2 and row["ours"] == (row["contender"] == "native")
    broken = {"npz": (disk.FORMATS["npz"][0], lambda path: 1 / 0)}
    monkeypatch.setattr(disk, "FORMATS", disk.FORMATS | broken)
    rows = measured(one)
    assert "ZeroDivision" in rows["npz", "native"]["reason"] and rows["npz", "native"]["status"] == "error"
    monkeypatch.setattr(disk, "_h5py", lambda: (_ for _ in ()).throw(contenders.Unavailable("h5py: no")))
    rows = measured(replace(one, modes=("h5",)))
    assert {row["status"] for row in rows.values()} == {"unavailable"}


# The command


class InProcess:
    """A worker that needs no process."""

    def run(self, one, emit, deadline):
        kinds.measure(lambda event: "rows" in event and emit(event), one.to_json())

    def stop(self):
        pass


@pytest.fixture
def tiny(monkeypatch):
    """A grid of two units, one of them for each picture."""
    alone = {"kind": "alone", "part": "scaling", "suffix": ": alone", "seconds": 300.0}
    found = [unit((60,), part="attention"), unit((30,), **alone)]
    monkeypatch.setattr(cpu_grid, "grid", lambda dtypes, threads: found)
    monkeypatch.setattr(runner, "Worker", InProcess)
    return found


@pytest.mark.slow
def test_a_grid_measures_writes_and_goes_on(tiny, tmp_path, monkeypatch, capsys):
    command = ["--out", str(tmp_path), "--threads", "1"]
    assert grid.main(command) == 0
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["schema"] == report.SCHEMA
    assert {u["threads"] for u in content["units"]} == {1}, "measured with the threads that the file names"
    assert content["machine"]["threads"] == 1 and str(tmp_path.parent) not in path.read_text()
    assert {u["sources"] for u in content["units"]} == {results.source_digest()} and not content["not_measured"]
    assert [len(u["rows"]) for u in content["units"]] == [4, 4]
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert pictures == {f"{path.stem}-{name}.png" for name in ("floor", "scaling")}
    page = path.with_suffix(".md").read_text()
    assert all(name in page for name in pictures) and "From small bags to large ones" in page
    assert "Nothing failed" in capsys.readouterr().out

    first = content["units"][0]["rows"]
    content["units"][1]["rows"] = content["units"][1]["rows"][:1]  # as if it had been stopped there
    foreign = {"name": "theirs", "kind": "upstream", "rows": []}
    path.write_text(json.dumps(content | {"units": [*content["units"], foreign]}))
    assert grid.main([*command, "--list"]) == 0 and tiny[0].name in capsys.readouterr().out
    monkeypatch.setattr(pages, "write", lambda path: [])
    assert grid.main(command) == 0
    assert "goes on with an earlier run of the same kernels on such a machine: 4 rows" in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert again["units"][0]["rows"] == first and len(again["units"][1]["rows"]) == 4
    assert again["units"][2] == foreign, "what is not the grid's stays"
    assert grid.main([*command, "--fresh"]) == 0
    assert json.loads(path.read_text())["units"][0]["rows"] != first


@pytest.mark.slow
def test_an_interrupted_grid_keeps_its_rows(tiny, tmp_path, monkeypatch, capsys):
    def stopped(self, one, emit, deadline):
        if one.kind == "alone":
            raise KeyboardInterrupt
        kinds.measure(lambda event: "rows" in event and emit(event), one.to_json())

    monkeypatch.setattr(InProcess, "run", stopped)
    grid.main(["--out", str(tmp_path), "--threads", "1"])
    assert "the same command goes on here" in capsys.readouterr().out
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert len(content["units"]) == 1 and list(content["not_measured"]) == [tiny[1].name]


def test_a_failure_of_ours_is_the_commands(tiny, tmp_path, monkeypatch):
    def wrong(self, one, emit, deadline):
        emit({"rows": [row_of(one, m, c, status="FAIL", reason="off", ours=True) for m, c in one.pairs()]})

    monkeypatch.setattr(InProcess, "run", wrong)
    assert grid.main(["--out", str(tmp_path)]) == 1
    assert "WRONG: off" in next(tmp_path.glob("*.md")).read_text()


def test_measuring_a_part_leaves_the_rest(tiny, tmp_path, monkeypatch):
    def good(self, one, emit, deadline):
        emit({"rows": [row_of(one, mode, contender) for mode, contender in one.pairs()]})

    monkeypatch.setattr(InProcess, "run", good)
    monkeypatch.setattr(pages, "write", lambda path: [])
    assert grid.main(["--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"not_measured": {tiny[0].name: ["step"]}}))
    monkeypatch.setattr(results, "source_digest", lambda gpu=False: "of other kernels")
    assert grid.main(["--out", str(tmp_path), "--only", re.escape(tiny[1].name)]) == 0
    after = json.loads(path.read_text())
    assert after["units"][0] == before["units"][0] and after["units"][1]["sources"] == "of other kernels"
    assert [unit["name"] for unit in after["units"]] == [one.name for one in tiny]
    assert after["not_measured"] == {tiny[0].name: ["step"]}


def test_source_digest_follows_contents(tmp_path):
    assert results.source_digest(tmp_path) is None
    for folder in ("csrc", "milkernels"):
        (tmp_path / folder).mkdir()
    source = tmp_path / "csrc" / "a.cpp"
    source.write_text("1")
    first = results.source_digest(tmp_path)
    (tmp_path / "milkernels" / "notes.txt").write_text("no source")
    assert results.source_digest(tmp_path) == first
    (tmp_path / "milkernels" / "triton").mkdir()
    on_a_gpu = results.source_digest(tmp_path, gpu=True)
    (tmp_path / "milkernels" / "triton" / "pool.py").write_text("1")
    with_triton = results.source_digest(tmp_path, gpu=True)
    assert with_triton != on_a_gpu
    (tmp_path / "csrc" / "cuda").mkdir()
    (tmp_path / "csrc" / "cuda" / "pool.cu").write_text("1")
    assert results.source_digest(tmp_path, gpu=True) != with_triton
    assert results.source_digest(tmp_path) == first  # which a CPU does not run
    source.write_text("2")
    assert results.source_digest(tmp_path) != first
    assert report.commit(tmp_path) is None


def test_units_are_merged_by_name(tmp_path):
    path, machine = tmp_path / "m.json", {"cpu": "C"}
    results.merge(path, machine, [{"name": "a", "rows": [1]}, {"name": "b", "rows": []}])
    results.merge(path, machine, [{"name": "a", "rows": [2]}, {"name": "c", "rows": []}])
    content = results.read(path)
    assert [(u["name"], u["rows"]) for u in content["units"]] == [("a", [2]), ("b", []), ("c", [])]
    assert content["machine"] == machine
    path.write_text(json.dumps(content | {"schema": 3}))
    assert results.read(path) is None and results.read(tmp_path / "absent") is None


# Pages and pictures


def row_of(one, mode, contender, median=1.0, **more):
    n, bags = one.workload.shape.instances, one.workload.shape.bags
    row = {"mode": mode, "contender": contender, "label": contender, "status": "ok", "median": median, "spread": 0.1}
    row |= {"ours": contender == "native", "dtype": one.dtype, "instances": n, "bags": bags, "once": False}
    row |= {"op": one.workload.op, "share_of_floor": 0.5, "errors": [], "rounds": 3, "reason": ""}
    return row | {"flops": 10**9, "bytes": 10**7, "resident": 10**6, "allocator": None} | more


ABOUT = {"cpu": "C", "instruction_set": "AVX2", "threads": 2, "torch": "2", "python": "3", "versions": {"numpy": "1"}}


def content_of(path, *pairs, **about):
    """The file of units with their rows."""
    made = results.Evidence(
        path, [one for one, _ in pairs], ABOUT | about, "python -m benchmarks.grid", "0123456789abcdef"
    )
    for one, rows in pairs:
        made.add(one, rows)
    made.save()
    return json.loads(path.read_text())


def test_the_page_says_where_we_lose(tmp_path):
    one = unit(who="eager pyg native", part="ragged", suffix=": slides")
    rows = [row_of(one, "fwd", "eager", 0.5), row_of(one, "fwd", "native", 1.0), row_of(one, "step", "native", 1.0)]
    rows += [row_of(one, "step", "eager", 2.0), row_of(one, "fwd", "pyg", status="unavailable", reason="no | mask")]
    content = content_of(tmp_path / "c.json", (one, rows))
    lost = pages.losses(pages.frame_of(content))
    line = ["`gated_attention_pool` 2 of 7 to 40: 47 x 24, D 16 (slides)", "float32", "fwd", "eager", "0.50"]
    assert lost.to_numpy().tolist() == [line]
    page = pages.page(content)
    assert "not run: no / mask" in page and "## Ragged batches" in page
    assert re.search(r"- \d{4}-\d\d-\d\d at 0123456789ab \(1\): `python -m benchmarks.grid`", page)
    content = content_of(tmp_path / "d.json", (one, rows[2:4]))
    assert "Nowhere among these rows." in pages.page(content) and "## Not measured" in pages.page(content)


def test_pages_of_the_other_kinds(tmp_path):
    big = unit((64,), kind="largest", part="largest", memory=1 << 32, modes=("step",), suffix=": largest")
    rows = [
        {
            "mode": "step",
            "contender": c,
            "label": c,
            "status": "ok",
            "instances": n,
            "memory": 1 << 32,
            "ours": c != "eager",
        }
        for c, n in (("eager", 100_000), ("native", 300_000))
    ]
    files = unit(kind="disk", part="disk", modes=("npz",), suffix=": disk")
    epoch = [row_of(files, "npz", c, m, load=0.5, file_bytes=10**8) for c, m in (("eager", 2.0), ("native", 1.0))]
    many = unit((10**6,), kind="alone", part="scaling", modes=("fwd",), suffix=": alone")
    alone = [row_of(many, "fwd", "eager", once=True)]
    content = content_of(tmp_path / "c.json", (big, rows), (files, epoch), (many, alone))
    page = pages.page(content)
    assert "| eager | 100,000 | 4 |" in page and "| native | 300,000 | 4 |" in page
    assert "| eager | 2,000 |" in page and "| 2.00 | 500 |" in page and "loading alone, ms" in page
    assert "| eager | 1,000* |" in page


def test_a_page_of_a_gpu(tmp_path):
    one = unit(who="eager triton", part="ops")
    both = [
        row_of(one, "fwd", "eager", 0.2, allocator=3e6),
        row_of(one, "fwd", "triton", 0.1, allocator=1e6, ours=True),
    ]
    gpu = {"name": "Some GPU", "cuda": "13", "triton": "3"}
    page = pages.page(content_of(tmp_path / "g.json", (one, both), gpu=gpu))
    assert page.startswith("# Some GPU, CUDA 13, PyTorch 2\n") and "| 3.00 |" in page and "| 2.00 |" in page


def test_pictures(tmp_path):
    one, many = unit((60,), part="attention"), unit((60,), kind="alone", part="scaling", suffix=": alone")
    path = tmp_path / "c.json"
    content = content_of(path, *((u, [row_of(u, m, c) for m, c in u.pairs()]) for u in (one, many)))
    drawn = plots.draw(pages.frame_of(content), path)
    assert [p.name for p in drawn] == ["c-floor.png", "c-scaling.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)
    content = content_of(tmp_path / "d.json", (one, [row_of(one, "fwd", "eager")]))
    assert plots.names(pages.frame_of(content), tmp_path / "d.json") == []


def test_rows_in_words():
    assert runner.summary({("fwd", "eager"): {"status": "error", "reason": "r"}}, "fwd") == "eager [error: r]"
    assert pages.milliseconds(1.5) == "1,500" and pages.number(0.012345) == "0.0123" and pages.number(1234) == "1,234"


# The README


def test_the_readmes_rows():
    for dtypes in (["float32"], ["float32", "bfloat16"]):
        chosen = figures.units(dtypes)
        assert sum(len(u.modes) for u in chosen) <= figures.MOST_ROWS and {u.dtype for u in chosen} == set(dtypes)
        assert all(u.kind == "bench" and u.contenders[0] == "eager" and u.contenders[-1] == "native" for u in chosen)
        assert sum(u.budget for u in chosen) < 200, "compiling and checking take the rest of ten minutes"


def test_the_matrix(tmp_path):
    chosen = matrix.units(["float32", "bfloat16"], 2)
    assert all(u.contenders == ("eager", "native") and u.threads == 2 and not u.peaks for u in chosen)
    assert sum(u.budget for u in chosen) < 300, "checking takes the rest of fifteen minutes"
    assert {u.dtype for u in matrix.units(["float32"]) if u.kind != "disk"} == {"float32"}
    assert {u.kind for u in chosen} == {"bench", "clam", "disk"}
    wins, loses = unit((60,), "eager native", modes=("fwd", "step")), unit((50,), "eager native", modes=("fwd",))
    rows = [row_of(wins, "fwd", c, s) for c, s in (("eager", 0.4), ("native", 0.2))]
    rows += [row_of(wins, "step", "eager"), row_of(wins, "step", "native", status="error", reason="x", median=None)]
    other = [row_of(loses, "fwd", c, s) for c, s in (("eager", 0.1), ("native", 0.4))]
    table = matrix.cells(content_of(tmp_path / "c.json", (wins, rows), (loses, other)))
    assert list(table["x eager"]) == [0.25, 2.0] and list(table["milkernels, ms"]) == ["400", "200"]


@pytest.mark.parametrize("mode", ["fwd", "step"])
def test_the_whole_clam(monkeypatch, mode):
    one = unit((30,), "eager native", modes=(mode,), kind="clam", budget=0.05)
    found = {row["contender"]: row for row in clam.rows(one, mode)}
    assert set(found) == {"eager", "native"} and all(row["median"] > 0 for row in found.values())
    monkeypatch.setattr(clam, "_TOLERANCE", -1.0)
    assert [row["status"] for row in clam.rows(one, mode)] == ["FAIL"]


def test_the_readmes_table(tmp_path):
    slow, fast = unit((60,), "eager compile native", modes=("fwd",)), unit((50,), "eager native", modes=("fwd", "step"))
    rows = [row_of(slow, "fwd", c, s) for c, s in (("eager", 0.4), ("compile", 0.3), ("native", 0.6))]
    other = [row_of(fast, "fwd", c, s) for c, s in (("eager", 0.4), ("native", 0.1))]
    other += [row_of(fast, "step", "eager"), row_of(fast, "step", "native", status="error", reason="x", median=None)]
    text = figures.table(content_of(tmp_path / "c.json", (fast, other), (slow, rows)))
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert "| 600 | 400 | 0.67 | compile, 300 ms | 0.50 | 1.0 / 1.0 | 50% |" in lines[0], "what loses comes first"
    assert "| 100 | 400 | 4.00 | eager, 400 ms | 4.00 |" in lines[1] and "not measured" in lines[2]
    assert text.startswith("C, 2 threads, AVX2, PyTorch 2:") and " at 0123456789ab (2): " in text
    assert "nan" not in text


def test_figures_are_measured_anew_unless_interrupted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(grid, "measure", lambda path, units, command, fresh: asked.append((command, fresh)) or 0)
    path = tmp_path / "headline.json"
    for left in (None, {}, {"a": ["fwd"]}):
        if left is not None:
            path.write_text(json.dumps({"schema": report.SCHEMA, "not_measured": left, "units": []}))
        assert figures.main(["--out", str(path)]) == 0
    assert asked == [("make figures", True), ("make figures", True), ("make figures", False)]


@needs_results
def test_the_readme_and_the_pages_are_those_of_the_result_files():
    stale = [path.name for path, text in figures.written().items() if not path.exists() or path.read_text() != text]
    assert not stale, "run `python -m benchmarks.figures --readme`"
    for path in results.FOLDER.glob("*.md"):
        assert all(path.with_name(name).is_file() for name in re.findall(r"\((\S+png)\)", path.read_text()))
        assert path.with_suffix(".json").is_file()


@needs_results
def test_every_result_file_is_of_the_schema():
    for path in results.FOLDER.glob("*.json"):
        content = results.read(path)
        assert content is not None, path.name
        assert all(
            {"name", "kind", "command", "date", "commit", "workload", "rows"} <= u.keys() for u in content["units"]
        )
        assert "/" not in "".join(u["command"] for u in content["units"]), "nobody's folders"


def test_what_stands_between_the_comments_is_replaced():
    assert figures.rewrite("a<1>old<2>b", "new", "<1>", "<2>") == "a<1>\n\nnew\n<2>b"
    with pytest.raises(ValueError, match="must hold"):
        figures.rewrite("a<2>b", "new", "<1>", "<2>")
