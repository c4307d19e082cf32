"""The presets: what they measure, the kinds of units, going on later, and the pages and pictures made of the file."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from milkernels.bench import (
    cli,
    contenders,
    cpu_grid,
    disk,
    evidence,
    harness,
    largest,
    memory,
    plots,
    preset,
    readme,
    report,
    runner,
    tables,
    units,
    worker,
)
from milkernels.testing import CASES, Shape

GATED = cpu_grid.GATED
pytestmark = pytest.mark.usefixtures("quick_machine")


def unit(lengths=(40, 7), who="eager native", **more):
    more = {"dtype": "float32", "budget": 0.05, "modes": ("fwd", "step")} | more
    return units.unit(GATED, lengths, 24, who, hidden=16, device="cpu", **more)


def measured(one):
    """The rows of a unit, measured in this process."""
    rows = []
    worker.measure(one, lambda event: rows.extend(event.get("rows", ())))
    assert json.loads(json.dumps(rows)) == rows
    return {(row["mode"], row["contender"]): row for row in rows}


# What is measured


@pytest.mark.parametrize("name", cpu_grid.PRESETS)
def test_the_grids(name):
    grid = cpu_grid.grid(name, ["float32", "bfloat16"], 8)
    assert len({u.name for u in grid}) == len(grid)
    for u in grid:
        assert units.Unit.from_json(u.to_json()) == u
        assert u.part in tables._TITLES and set(u.contenders) <= set(contenders.REGISTRY)
        assert contenders.REGISTRY[u.contenders[-1]].ours and u.workload.device == "cpu"
        if u.kind in ("bench", "alone"):
            assert set(u.modes) <= set(u.workload.case.modes()) and u.budget > 0
    assert {u.dtype for u in cpu_grid.grid(name, ["float32"], 8) if u.kind != "disk"} == {"float32"}


def test_the_full_grid_is_what_it_says():
    grid = cpu_grid.grid("full", ["float32", "bfloat16"], 8)
    one_bag = {u.workload.op for u in grid if u.part in ("attention", "ops")}
    assert one_bag == set(CASES), "the roofline has every op on it"
    for dtype, most in (("float32", 1_000_000), ("bfloat16", 4_000_000)):
        sizes = [u.workload.shape.instances for u in grid if u.part == "scaling" and u.dtype == dtype]
        assert max(sizes) == most and sizes == sorted(sizes)
    assert all(u.kind == "alone" for u in grid if u.part == "scaling")
    assert {u.threads for u in grid if u.part == "threads"} == {1, 2, 4, 8}
    shapes = [u.workload.shape for u in grid if u.part == "sizes"]
    assert (
        len({s.dim for s in shapes}) > 2 and len({s.hidden for s in shapes}) > 2 and len({s.heads for s in shapes}) > 2
    )
    lengths = [n for u in grid if u.part == "ragged" for n in u.workload.shape.lengths]
    assert min(lengths) == 1 and max(lengths) == 200_000
    peers = {name for u in grid if u.part == "ragged" for name in u.contenders}
    assert peers >= {"eager", "compile", "padded", "torchmil", "pyg", "scatter", "jagged", "accumulate", "native"}
    assert {u.kind for u in grid} == {"bench", "alone", "largest", "disk"}


def test_lengths_are_heavy_tailed():
    lengths = units.heavy_tailed_lengths(101, 10_000, 1.2, 200, 200_000)
    ordered = sorted(lengths)
    assert ordered[50] == 10_000 and ordered[0] >= 200 and ordered[-1] <= 200_000
    assert sum(lengths) / 101 > 1.5 * ordered[50], "the mean lies far above the median"
    assert list(lengths) != ordered and lengths == units.heavy_tailed_lengths(101, 10_000, 1.2, 200, 200_000)
    assert min(cpu_grid.CLASSICAL) == 1 and max(cpu_grid.CLASSICAL) <= 1_044
    assert min(cpu_grid.BOTH_ENDS) >= 200 and max(cpu_grid.BOTH_ENDS) == 200_000
    assert units.heavy_tailed_lengths(1, 50, 1.0, 1, 40) == (40,)


# The kinds of units


@pytest.mark.slow
def test_bench_has_rates_and_memory():
    rows = measured(unit())
    ours = rows["step", "native"]
    assert ours["status"] == "ok" and ours["bags"] == 2 and ours["instances"] == 47
    assert ours["bags_per_second"] == pytest.approx(2 / ours["median"])
    assert ours["resident"] is not None and ours["errors"] and ours["limits"]["read_bandwidth"] == 1e10
    assert rows["fwd", "eager"]["label"].startswith("eager")


def test_threads_are_those_of_the_unit(monkeypatch):
    before, seen = torch.get_num_threads(), []
    kind = {"kind": "calls", "modes": ("softmax_pool 2 fwd",)}
    monkeypatch.setattr(worker, "_calls", lambda unit, emit: seen.append(torch.get_num_threads()))
    worker._machine_threads.cache_clear()  # as in a process whose first unit wants one thread
    worker.measure(unit(threads=1, **kind), print)
    worker.measure(unit(**kind), print)
    assert seen == [1, before]


@pytest.mark.slow
def test_alone_is_another_process_and_is_judged():
    rows = measured(unit((50,), "eager accumulate native", kind="alone", seconds=300.0))
    assert set(rows) == {(m, c) for m in ("fwd", "step") for c in ("eager", "accumulate", "native")}
    assert all(row["status"] == "ok" and row["median"] > 0 and row["resident"] is not None for row in rows.values())
    ours = rows["step", "native"]
    assert {e["name"] for e in ours["errors"]} >= {"bag", "grad_x", "grad_v_weight"} and ours["share_of_floor"] > 0
    assert not rows["step", "eager"]["errors"]


def test_alone_tells_why_there_is_nothing(monkeypatch):
    rows = measured(unit((50,), "padded pyg-segment eager", kind="alone", seconds=0.01))
    assert {row["status"] for row in rows.values()} == {"error"}
    assert all("not finished" in row["reason"] for row in rows.values())
    answers = {"fwd": {"status": "unavailable", "reason": "because"}, "step": {"status": "error", "reason": "x"}}
    monkeypatch.setattr("milkernels.bench.alone.measure", lambda *a: answers)
    rows = measured(unit((50,), "eager", kind="alone"))
    assert rows["fwd", "eager"]["status"] == "unavailable" and rows["step", "eager"]["reason"] == "x"
    wrong = {"timing": {"seconds": [1.0]}, "once": True, "resident": 1, "allocator": None, "broken": "bag is off"}
    monkeypatch.setattr("milkernels.bench.alone.measure", lambda *a: {"fwd": wrong, "step": wrong})
    rows = measured(unit((50,), "native", kind="alone"))
    assert rows["fwd", "native"]["status"] == "FAIL" and rows["fwd", "native"]["reason"] == "bag is off"


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
    wrong = {"status": "FAIL", "reason": "off"}
    monkeypatch.setattr(disk, "_wrong", lambda unit: {"native": wrong})
    assert measured(one)["npz", "native"] | wrong == measured(one)["npz", "native"]
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
        worker.measure(one, lambda event: "rows" in event and emit(event))

    def stop(self):
        pass


@pytest.fixture
def tiny(monkeypatch):
    """A preset of two units, one of them for each picture."""
    alone = [{"kind": "alone", "part": "scaling", "suffix": ": alone", "seconds": 300.0}]
    grid = [unit((60,), part="attention", headline=True), *(unit((30,), **more) for more in alone)]
    monkeypatch.setattr(cpu_grid, "grid", lambda preset, dtypes, threads: grid)
    monkeypatch.setattr(worker, "Worker", InProcess)
    return grid


@pytest.mark.slow
def test_a_preset_measures_writes_and_goes_on(tiny, tmp_path, capsys):
    command = ["--preset", "quick", "--out", str(tmp_path), "--threads", "1"]
    assert cli.main(command) == 0
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert path.stem.endswith("-quick") and content["schema"] == evidence.SCHEMA
    assert {u["threads"] for u in content["units"]} == {1}, "measured with the threads that the file names"
    assert content["machine"]["threads"] == 1 and str(tmp_path) not in path.read_text()
    assert content["sources"] == report.source_digest() and not content["not_measured"] and not content["targets"]
    assert [len(u["rows"]) for u in content["units"]] == [4, 4]
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert pictures == {f"{path.stem}-{name}.png" for name in ("roofline", "scaling", "memory")}
    page = path.with_suffix(".md").read_text()
    assert all(name in page for name in pictures) and "From small bags to large ones" in page and "ns" in page
    assert "Nothing failed" in capsys.readouterr().out

    first = content["units"][0]["rows"]
    content["units"][1]["rows"] = content["units"][1]["rows"][:1]  # as if it had been stopped there
    path.write_text(json.dumps(content))
    assert cli.main(command) == 0
    assert "goes on with an earlier run of the same kernels on such a machine: 4 rows" in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert again["units"][0]["rows"] == first and len(again["units"][1]["rows"]) == 4
    assert cli.main([*command, "--fresh"]) == 0
    assert json.loads(path.read_text())["units"][0]["rows"] != first


@pytest.mark.slow
def test_an_interrupted_preset_keeps_its_rows(tiny, tmp_path, monkeypatch, capsys):
    def stopped(self, one, emit, deadline):
        if one.kind == "alone":
            raise KeyboardInterrupt
        worker.measure(one, lambda event: "rows" in event and emit(event))

    monkeypatch.setattr(InProcess, "run", stopped)
    cli.main(["--preset", "quick", "--out", str(tmp_path), "--threads", "1"])
    assert "the same command goes on here" in capsys.readouterr().out
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert len(content["units"]) == 1 and list(content["not_measured"]) == [tiny[1].name]


@pytest.mark.parametrize("option", [["--op", "dsmil"], ["--mode", "fwd"], ["--padded"], ["--json", "x.json"]])
def test_a_preset_refuses_what_it_would_ignore(option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--preset", "quick", *option])
    assert f"cannot be combined with {option[0]}" in capsys.readouterr().err


def test_a_failure_of_ours_is_the_commands(tiny, tmp_path, monkeypatch):
    def wrong(self, one, emit, deadline):
        emit({"rows": [row_of(one, m, c, status="FAIL", reason="off", ours=True) for m, c in one.pairs()]})

    monkeypatch.setattr(InProcess, "run", wrong)
    assert cli.main(["--preset", "quick", "--out", str(tmp_path)]) == 1
    assert "WRONG: off" in next(tmp_path.glob("*.md")).read_text()


# Pages and pictures


def row_of(one, mode, contender, median=1.0, **more):
    n, bags = one.workload.shape.instances, one.workload.shape.bags
    row = {"mode": mode, "contender": contender, "label": contender, "status": "ok", "median": median, "spread": 0.1}
    row |= {"ours": contender == "native", "dtype": one.dtype, "instances": n, "bags": bags, "once": False}
    row |= {"instances_per_second": n / median, "bags_per_second": bags / median, "share_of_floor": 0.5, "errors": []}
    row |= {"flops": 10**9, "bytes": 10**7, "resident": 10**6, "allocator": None, "reason": "", "rounds": 3}
    return row | {"limits": {"read_bandwidth": 1e10, "matrix_rate": 1e11}} | more


def content_of(path, *pairs):
    """The file of units with their rows."""
    about = {
        "cpu": "C",
        "instruction_set": "AVX2",
        "threads": 2,
        "torch": "2",
        "python": "3",
        "versions": {"numpy": "1"},
    }
    made = evidence.Evidence(path, [one for one, _ in pairs], about, "python -m milkernels bench --preset full")
    for one, rows in pairs:
        made.add(one, rows)
    made.save()
    return json.loads(path.read_text())


def test_the_page_says_where_we_lose(tmp_path):
    one = unit(who="eager pyg native", part="ragged", suffix=": slides")
    rows = [row_of(one, "fwd", "eager", 0.5), row_of(one, "fwd", "native", 1.0), row_of(one, "step", "native", 1.0)]
    rows += [row_of(one, "step", "eager", 2.0), row_of(one, "fwd", "pyg", status="unavailable", reason="no | mask")]
    content = content_of(tmp_path / "c.json", (one, rows))
    assert tables.losses(content) == [
        ["`gated_attention_pool` 2 of 7 to 40: 47 x 24, D 16 (slides)", "float32", "fwd", "eager", "0.50"]
    ]
    page = tables.report(content, stale=True)
    assert "**Stale:**" in page and "not run: no / mask" in page and "## Ragged batches" in page
    content = content_of(tmp_path / "d.json", (one, rows[2:4]))
    assert "Nowhere among these rows." in tables.report(content, stale=False)
    assert "## Not measured" in tables.report(content, False) and "Stale" not in tables.report(content, False)


def test_pages_of_the_other_kinds(tmp_path):
    big = unit((64,), kind="largest", part="largest", memory=1 << 32, modes=("step",), suffix=": largest")
    rows = [row_of(big, "step", c, instances=n, memory=1 << 32) for c, n in (("eager", 100_000), ("native", 300_000))]
    files = unit(kind="disk", part="disk", modes=("npz",), suffix=": disk")
    epoch = [
        row_of(files, "npz", "eager", 2.0, load=0.5, file_bytes=10**8),
        row_of(files, "npz", "native", 1.0, load=0.5, file_bytes=10**8),
    ]
    many = unit((10**6,), kind="alone", part="scaling", modes=("fwd",), suffix=": alone")
    content = content_of(
        tmp_path / "c.json", (big, rows), (files, epoch), (many, [row_of(many, "fwd", "eager", once=True)])
    )
    page = tables.report(content, stale=False)
    assert "| 4 GiB | eager | 100,000 | 3.00 |" in page and "| 200 | 2.00 |" in page
    assert "| 1,000,000 | 1,000 ns*, 1 B |" in page


def test_the_pages_and_pictures_are_those_of_the_result_files():
    assert readme.drift() == [], "run `python -m milkernels.bench.readme`"


def test_drift_is_seen(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"a\n{readme.BEGIN}\n{readme.END}\n")
    one = unit((60,), part="attention", headline=True)
    content = content_of(folder / "c.json", (one, [row_of(one, m, c) for m, c in one.pairs()]))
    wanted = ["README.md", "c.md", "c-roofline.png", "c-memory.png"]
    assert readme.drift(tmp_path) == wanted
    for path, text in readme._pages(tmp_path).items():
        path.write_text(text)
    plots.of_grid(content, folder / "c.json")
    assert readme.drift(tmp_path) == []
    assert "`gated_attention_pool`" in (tmp_path / "README.md").read_text()
    content["units"][0]["rows"][0]["median"] = 3.0
    (folder / "c.json").write_text(json.dumps(content))
    assert readme.drift(tmp_path) == wanted


def test_the_readmes_headlines(tmp_path):
    one = unit((60,), "eager compile native", part="attention", headline=True, modes=("fwd",))
    rows = [row_of(one, "fwd", c, s) for c, s in (("eager", 0.4), ("compile", 0.3), ("native", 0.2))]
    content_of(tmp_path / "c.json", (one, rows))
    (line,) = readme._headlines(json.loads((tmp_path / "c.json").read_text())["units"][0], "resident", " (stale)")
    assert line[1].endswith("(stale)") and line[4:9] == ["200", "400", "2.00", "compile: 300", "1.50"]
    broken = [row_of(one, "fwd", "native", status="error", reason="x")]
    content_of(tmp_path / "c.json", (one, broken))
    (line,) = readme._headlines(json.loads((tmp_path / "c.json").read_text())["units"][0], "resident", "")
    assert line[4] == "not measured"


def test_spread_and_rates_are_finite():
    assert harness.Timing([1.0, 2.0]).spread == 0 and math.isfinite(harness.Timing([1.0, 2.0, 3.0]).spread)
    assert runner.summary({("fwd", "eager"): {"status": "error", "reason": "r"}}, "fwd") == "eager [error: r]"


def test_bfloat16_is_measured_where_it_is_fast(monkeypatch):
    assert preset.fast_dtypes()[0] == "float32"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert preset.fast_dtypes() == ["float32"]


def test_shape_of_scores():
    scores = units.unit("segment_softmax", (30,), 512, "eager native", dtype="float32", device="cpu", heads=3)
    assert scores.workload.shape == Shape((30,), 3, 256, 3)
