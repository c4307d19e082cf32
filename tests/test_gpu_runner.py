"""``make gpu`` without a GPU: what it measures and in which order, its deadline, what a crash costs, going on later."""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")

import milkernels
from benchmarks import cuda, gpu_grid, kinds, largest, results, runner, targets, units
from milkernels.bench import contenders, process
from milkernels.bench.run import Bench, Options
from milkernels.bench.workload import Workload
from milkernels.testing import CASES, MODES, Shape

ROOT = Path(milkernels.__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")
MACHINE = {"torch": "2", "gpu": {"name": "Some GPU", "cuda": "13", "triton": "3"}}


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit(name="a", modes=("fwd", "step"), who=("eager", "triton"), op="gated_attention_pool", **more):
    workload = Workload(op, Shape((30, 4), 12, 8), device=more.pop("device", "cpu"))
    return units.Unit(name, workload, "float32", tuple(modes), tuple(who), **more)


def store(path, *units, machine=MACHINE, **head):
    made = results.Evidence(path / "some-gpu.json", list(units), machine, "make gpu")
    made.about |= {"commit": "c", "sources": "s"} | head
    return made


def row(mode, contender, median=1.0, **more):
    return {"mode": mode, "contender": contender, "status": "ok", "median": median, "dtype": "float32"} | more


def rows_of(part):
    """What a worker sends for a unit, one event for each mode."""
    for mode in part.modes:
        yield {"rows": [row(mode, contender, ours=contender != "eager") for contender in part.contenders]}


def on_disk(made):
    content = json.loads(made.path.read_text())
    return {(u["name"], r["mode"], r["contender"]): r["status"] for u in content["units"] for r in u["rows"]}, content


# What is measured


def test_the_grid():
    all_units = gpu_grid.grid()
    assert len({u.name for u in all_units}) == len(all_units)
    assert all(u.headline and "native" not in u.contenders for u in all_units[: gpu_grid.FIRST]), "nothing is built yet"
    assert all_units[0].kind == "limits" and all_units[-1].kind == "largest"
    names = [("calls" if u.kind == "calls" else u.contenders[0]) for u in all_units]
    assert names.index("calls") < names.index("workspace-32") < names.index("compile")
    for u in all_units:
        assert units.Unit.from_json(u.to_json()) == u
        if u.kind == "bench":
            assert set(u.contenders) <= set(contenders.REGISTRY) and set(u.modes) <= set(u.workload.case.modes())
            assert contenders.REGISTRY[u.contenders[-1]].ours
        if "native" in u.contenders:  # CUDA C++ has neither
            assert not u.workload.case.embeds and u.workload.op != "dsmil_mlp"
    seen = {
        (u.workload.op, u.workload.shape.dim, u.workload.shape.hidden, u.workload.shape.heads, u.dtype)
        for u in all_units
    }
    for op in ("gated_attention_pool", "attention_pool"):
        for dim in (512, 1024, 1536):
            for hidden in (128, 256, 384):
                for heads in (1, 4):
                    assert {(op, dim, hidden, heads, dtype) for dtype in ("bfloat16", "float32")} <= seen
    assert sum("compile" in u.contenders for u in all_units) and any(set(u.modes) == set(MODES) for u in all_units)
    large = [u for u in all_units if u.workload.shape.instances * u.workload.shape.dim * 2 == gpu_grid.GIGABYTE]
    assert {u.workload.op for u in large} >= {"softmax_pool", "loss_attention_pool", "dsmil", "query_pool"}
    assert len(gpu_grid.SLIDES) == 64 and min(gpu_grid.SLIDES) >= 1000 and max(gpu_grid.SLIDES) <= 20_000
    assert len(gpu_grid.SMALL_BAGS) == 256 and min(gpu_grid.SMALL_BAGS) >= 100 and max(gpu_grid.SMALL_BAGS) <= 2000


def test_what_is_left_of_a_unit():
    whole = unit(modes=("fwd", "step", "frozen"))
    assert units.without(whole, set()) == whole
    assert units.without(whole, {("fwd", "eager"), ("fwd", "triton")}).modes == ("step", "frozen")
    part = units.without(whole, {("fwd", "eager")})
    assert (part.modes, part.contenders) == (("fwd",), ("triton",))
    assert units.without(whole, set(whole.pairs())) is None


# The run


def test_rows_are_on_disk_as_they_are_measured_and_in_order(gpu, tmp_path, capsys):
    made, order = store(tmp_path, unit("a"), unit("b")), []

    def measure(part, emit, deadline):
        for event in rows_of(part):
            emit(event)
            order.append((part.name, event["rows"][0]["mode"]))
            assert len(on_disk(made)[0]) == 2 * len(order)

    runner.measure_units(made, measure, time.monotonic() + 60)
    assert order == [("a", "fwd"), ("a", "step"), ("b", "fwd"), ("b", "step")]
    assert not made.not_measured() and not made.failures()
    assert "a, fwd: eager 1000 ms; triton 1000 ms" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part"))


def test_what_does_not_fit_is_listed(gpu, tmp_path, capsys):
    made, now = store(tmp_path, unit("a"), unit("b"), unit("c")), [0.0]

    def measure(part, emit, deadline):
        assert deadline <= 100
        for i, event in enumerate(rows_of(part)):
            if part.name == "b" and i == 1:
                now[0] = 100.0
                raise process.OutOfTime("triton step")
            emit(event)
            now[0] += 10

    runner.measure_units(made, measure, 100.0, clock=lambda: now[0])
    assert made.not_measured() == {"b": ["step"], "c": ["fwd", "step"]} and not made.failures()
    made.save()
    assert on_disk(made)[1]["not_measured"] == made.not_measured()
    runner.conclude(made)
    assert "Not measured for want of time (3 modes" in capsys.readouterr().out


def test_a_crash_costs_one_row(gpu, tmp_path):
    made, goes = store(tmp_path, unit("a", ("fwd", "step"), ("eager", "triton", "fused")), unit("b")), []

    def measure(part, emit, deadline):
        goes.append((part.name, part.modes, part.contenders))
        for event in rows_of(part):
            if event["rows"][0]["mode"] == "step" and "fused" in part.contenders:
                raise process.Died("illegal memory access", contender="fused", mode="step")
            emit(event)

    runner.measure_units(made, measure, time.monotonic() + 60)
    assert goes[1] == ("a", ("step",), ("eager", "triton")) and goes[2][0] == "b"
    status, content = on_disk(made)
    assert [key for key, value in status.items() if value == "error"] == [("a", "step", "fused")]
    assert len(status) == 6 + 4 and made.failures() == ["a, step, fused: error: illegal memory access"]


@pytest.mark.parametrize(
    "error", [process.Died("signal SIGSEGV"), process.OutOfTime("eager fwd")], ids=["died", "hung"]
)
def test_a_unit_that_only_fails_ends(gpu, tmp_path, error):
    made, goes = store(tmp_path, unit("a", seconds=1e-3), unit("b")), []

    def measure(part, emit, deadline):
        goes.append(part.name)
        if part.name == "a":
            raise error
        for event in rows_of(part):
            emit(event)

    runner.measure_units(made, measure, time.monotonic() + 60)
    assert goes == ["a", "b"] and not made.not_measured()
    assert len(made.failures()) == 2  # eager's rows are not ours to mend


def test_a_later_run_goes_on(gpu, tmp_path):
    first = store(tmp_path, unit("a"), unit("b"), unit("c"))
    for name in ("a", "b"):
        for event in rows_of(unit(name)):
            first.add(unit(name), event["rows"])
    first.add(unit("a"), [row("step", "triton") | {"status": "error", "ours": True}])
    first.stages = {"build": {"status": "exit status 1"}, "tests": {"status": "ok"}}
    first.save()

    again, order = store(tmp_path, unit("a"), unit("b"), unit("c")), []
    assert again.resume([tmp_path / "absent.json", first.path]) == 6
    assert again.stages == {"tests": {"status": "ok"}}

    def measure(part, emit, deadline):
        order.append((part.name, part.modes, part.contenders))
        for event in rows_of(part):
            emit(event)

    runner.measure_units(again, measure, time.monotonic() + 60)
    both = ("eager", "triton")  # they are compared within one run
    assert order == [("c", ("fwd", "step"), both), ("a", ("step",), both)]
    assert not again.failures() and not again.not_measured()


@pytest.mark.parametrize(
    "change",
    [{"sources": "t"}, {"machine": MACHINE | {"torch": "3"}}, {"machine": MACHINE | {"gpu": {"name": "Other"}}}],
    ids=str,
)
def test_other_code_or_another_device_starts_anew(tmp_path, change):
    first = store(tmp_path, unit("a"))
    first.add(unit("a"), [row("fwd", "eager")])
    other = store(tmp_path, unit("a"), **change)
    assert other.resume([first.path]) == 0 and not other.measured(unit("a"))
    first.path.write_text("{ cut short")
    assert store(tmp_path, unit("a")).resume([first.path]) == 0


class Machine:
    """A machine that is lent, by a clock of its own: what a stage takes of it, if it does not fail or hang, and what is
    on disk after so many minutes."""

    SECONDS = {"build": 80, "smoke": 35, "tests": 100, "native-smoke": 12, "native-tests": 35, "sanitizer": 40}
    SECONDS |= {"slow-tests": 100, "slow-native-tests": 30, "compiling": 4, "limits": 12, "rows": 4}  # of each mode

    def __init__(self, folder, broken, how):
        self.folder, self.broken, self.how, self.time, self.seen = folder, broken, how, 0.0, {}

    def spend(self, name, seconds=None, most=float("inf"), grace=0.0):
        """Whether it went well within ``most`` seconds."""
        needed, well = self.SECONDS[name] if seconds is None else seconds, True
        if name == self.broken:
            needed, well = {"fails": (2.0, False), "hangs": (float("inf"), False)}[self.how]
        spent = needed if needed <= most else most + grace
        for minutes in (3, 6, 9):
            if self.time < 60 * minutes <= self.time + spent:
                self.look(minutes)
        self.time += spent
        return well and needed <= most

    def look(self, minutes):
        content = json.loads((self.folder / "some-gpu.json").read_text())
        stages = {name: stage["status"] for name, stage in content["stages"].items()}
        good = [u["name"] for u in content["units"] if all(r["status"] == "ok" for r in u["rows"])]
        self.seen[minutes] = stages, good

    def job(self, command, log, **settings):
        began, name, pauses = self.time, log.stem, []

        @contextlib.contextmanager
        def paused():
            start = self.time
            yield
            pauses.append(self.time - start)

        def finish(seconds):
            left = max(0.0, self.SECONDS[name] - (self.time - began - sum(pauses)))
            well = self.spend(name, left, seconds, runner.GRACE)
            for option in command:
                if option.startswith("--junitxml=") and well:
                    Path(option.partition("=")[2]).write_text("<x><testcase name='test_it'/></x>")
            return {"status": "ok" if well else f"it {self.how or 'took too long'}", "said": ""}

        return types.SimpleNamespace(finish=finish, paused=paused, stop=lambda: None)

    def compilers(self, units, count):
        return types.SimpleNamespace(finish=lambda seconds: int(not self.spend("compiling", most=seconds)))

    def measure(self, part, emit, deadline):
        kind = "limits" if part.kind == "limits" else "rows"
        if kind == self.broken and part.name not in [u.name for u in gpu_grid.grid()[:2]]:
            kind = "unbroken"
        for event in rows_of(part):
            event["rows"] = [r | {"flops": 1, "bytes": 1, "limits": LIMITS} for r in event["rows"]]
            if not self.spend(kind, None if kind != "unbroken" else self.SECONDS["rows"], deadline - self.time):
                if self.how == "fails":
                    raise process.Died("illegal memory access")
                raise process.OutOfTime("triton step")
            emit(event)


LIMITS = {"matrix_rate": 1e15, "read_bandwidth": 4e12}


@pytest.fixture
def lent(gpu, monkeypatch, tmp_path):
    """Runs ``make gpu`` on a machine where one thing is broken."""

    def sitting(broken="", how="", arguments=()):
        machine = Machine(tmp_path, broken, how)
        monkeypatch.setattr(gpu.cuda, "unavailable", lambda: None)
        monkeypatch.setattr(gpu.cuda, "about", lambda: MACHINE["gpu"])
        monkeypatch.setattr(gpu.cuda, "architecture", lambda: "9.0a")
        monkeypatch.setattr(gpu, "now", lambda: machine.time)
        monkeypatch.setattr(gpu, "Job", machine.job)
        worker = types.SimpleNamespace(run=machine.measure, stop=lambda: None)
        monkeypatch.setattr(gpu.runner, "Worker", lambda: worker)
        monkeypatch.setattr(gpu.runner, "Compilers", machine.compilers)
        machine.status = gpu.main(["--out", str(tmp_path), "--commit", "abc", *arguments])
        machine.look(0)
        return machine

    return sitting


STAGES = ("smoke", "tests", "build", "native smoke", "native tests", "sanitizer")
BROKEN = [(what, how) for what in Machine.SECONDS for how in ("fails", "hangs") if not what.startswith("slow")]


@pytest.mark.parametrize(("broken", "how"), [("", ""), *BROKEN], ids=lambda value: value or "nothing")
def test_a_sitting(gpu, lent, broken, how):
    """Whatever fails or hangs: what comes after it is done, what was measured is on disk, the budget is kept."""
    machine, first = lent(broken, how), [u.name for u in gpu_grid.grid()[: gpu_grid.FIRST]]
    assert machine.time <= gpu.FULL.whole + runner.GRACE and machine.status == int(broken not in ("", "compiling"))
    (stages, rows), after_three = machine.seen[0], machine.seen[3]
    assert tuple(stages) == STAGES
    lost = {broken.replace("-", " ")} | ({"native smoke", "native tests", "sanitizer"} if broken == "build" else set())
    assert {name for name, status in stages.items() if status != "ok"} == lost & set(STAGES)
    assert [status for name, status in stages.items() if name in lost and name != broken.replace("-", " ")] == [
        results.SKIPPED for name in stages if broken == "build" and name in lost - {"build"}
    ]
    # After three minutes: the limits and the first rows, but for one that hangs and one that it leaves no time for.
    missing = [name for name in first if name not in after_three[1]]
    assert len(missing) <= {"limits": 1, "rows": 1}.get(broken, 0) and "smoke" in after_three[0]
    assert set(machine.seen[6][0]) >= {"smoke", "tests", "build"} and set(machine.seen[6][1]) >= set(after_three[1])
    # In the end: what constants wait for, and the first headlines behind it.
    decided = [name for name in (u.name for u in gpu_grid.grid()[gpu_grid.FIRST :]) if name in rows]
    enough = 9 if how == "hangs" or broken == "build" else 15
    assert len(decided) >= enough, (len(decided), stages)


def test_a_quick_sitting_and_what_follows(gpu, lent):
    quick = lent(arguments=["--quick"])
    stages, rows = quick.seen[0]
    assert quick.status == 0 and quick.time <= gpu.QUICK.whole
    assert [name for name, status in stages.items() if status == "ok"] == ["smoke", "build", "native smoke"]
    assert {u.name for u in gpu_grid.grid()[: gpu_grid.FIRST + 2]} <= set(rows)
    whole = lent()
    assert set(whole.seen[3][1]) >= set(rows) and len(whole.seen[0][1]) > len(rows) + 10
    assert set(whole.seen[0][0].values()) == {"ok"}
    third = lent()  # what is slow comes once the rest is in order
    assert {"slow tests", "slow native tests"} <= set(third.seen[0][0]) and third.status == 0


def test_jobs(gpu, tmp_path, capsys):
    def job(code):
        return gpu.Job([sys.executable, "-c", code], tmp_path / "it.log")

    found = job("import time; print('so far', flush=True); time.sleep(60)").finish(1.5)
    assert found["status"].startswith("not finished") and "so far" in capsys.readouterr().out
    assert job("print(1); print(2)").finish(60) == {"status": "ok", "said": "2"}
    assert job("raise SystemExit(3)").finish(60)["status"] == "exit status 3"
    # A child in a group of its own counts, and ends, with it.
    command = "[sys.executable, '-c', 'while True: print(1, flush=True)']"
    busy = job(f"import subprocess, sys; subprocess.run({command}, process_group=0)")
    while not busy.log.stat().st_size:
        time.sleep(0.05)
    with busy.paused():
        time.sleep(0.2)
        before = busy.log.stat().st_size
        time.sleep(0.2)
        assert busy.log.stat().st_size == before
    busy.stop()
    time.sleep(0.2)
    before = busy.log.stat().st_size
    time.sleep(0.2)
    assert busy.log.stat().st_size == before > 0


@pytest.mark.slow
def test_smoke_is_ten_tests(gpu, tmp_path):
    """Their names are only known where there is a GPU, or seems to be."""
    (tmp_path / "pretended.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\nimport milkernels.backends as b\n"
        "b.why_not = lambda *a, **k: None\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "TRITON_INTERPRET": ""}
    legs = ("gpu_triton", "gpu_native")
    options = ["-p", "pretended", "--collect-only", "-q", "-m", "not slow", "-k", " or ".join(map(gpu.smoke, legs))]
    command = [sys.executable, "-m", "pytest", "tests/test_numbers.py", "tests/test_gpu.py", *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert [sum(leg in line for line in found) for leg in legs] == [5, 5] and len(found) == 10, done.stdout


def test_outcome_of_the_tests(gpu, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_none(): pytest.skip('no GPU')\n"
    )
    xml = tmp_path / "it.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(tmp_path / "test_it.py"),
        f"--junitxml={xml}",
        "-c",
        os.devnull,
    ]
    subprocess.run(command, capture_output=True, cwd=tmp_path)
    outcome = gpu._outcome(xml)
    assert (
        outcome["passed"] == 1
        and list(outcome["failed"]) == ["test_bad"]
        and outcome["skipped"] == {"test_none": "no GPU"}
    )


def test_it_refuses_without_a_gpu(tmp_path):
    # A make above this one, as in `make test ARGS=...`, would pass its arguments on.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")} | {"CUDA_VISIBLE_DEVICES": ""}
    out = tmp_path / "out"
    for command in (
        ["make", "-C", str(ROOT), "gpu", f"PYTHON={sys.executable}", f"OUT={out}", "ARGS=", "QUICK="],
        [sys.executable, str(SCRIPT)],
    ):
        if command[0] == "make" and not (ROOT / "Makefile").exists():
            continue
        start = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and "needs a GPU" in done.stderr and "Nothing was measured" in done.stderr
        assert not out.exists() and time.monotonic() - start < 60


# The process that measures

_PROCESS = """
import json, os, signal, sys, time
for line in sys.stdin:
    name = json.loads(json.loads(line)["arguments"]["unit"])["name"]
    print(json.dumps({"doing": {"contender": "triton", "mode": "step"}}), flush=True)
    if name == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang": time.sleep(60)
    if name == "exit": sys.exit("what it said last")
    if name == "poisoned": print(json.dumps({"poisoned": "illegal memory access"}), flush=True); time.sleep(60)
    print(json.dumps({"rows": [os.getpid()]}), flush=True)
    print(json.dumps({"done": name}), flush=True)
"""


def test_the_process_is_replaced_when_it_dies():
    worker, pids = runner.Worker((sys.executable, "-c", _PROCESS)), []
    soon = time.monotonic() + 60
    try:
        for _ in range(2):
            worker.run(unit("fine"), lambda event: pids.append(*event["rows"]), soon)
        assert pids[0] == pids[1]
        for name, reason in (("segfault", "SIGSEGV"), ("exit", "what it said last"), ("poisoned", "illegal memory")):
            with pytest.raises(process.Died, match=reason) as death:
                worker.run(unit(name), pids.append, soon)
            assert (death.value.contender, death.value.mode) == ("triton", "step")
        with pytest.raises(process.OutOfTime, match="triton step"):
            worker.run(unit("hang"), pids.append, time.monotonic() + 1)
        worker.run(unit("fine"), lambda event: pids.append(*event["rows"]), soon)
        assert len(set(pids)) == 2
    finally:
        worker.stop()


def test_compilers_are_gone_before_anything_is_timed():
    busy = runner.Compilers([unit(name) for name in "abc"], 2)
    assert len(busy.processes) == 2
    sleeping = process.Process((sys.executable, "-c", "import time; time.sleep(60)"))
    sleeping.send("anything", {})
    busy.processes.append(sleeping)
    children = [one.process for one in busy.processes]
    start = time.monotonic()
    assert busy.finish(0.5) >= 1 and time.monotonic() - start < 30
    assert all(child.poll() is not None for child in children)


def test_compiling_runs_our_contenders_only(monkeypatch):
    ran = []
    registry = contenders.REGISTRY | {"triton": contenders.REGISTRY["reference"]}
    monkeypatch.setattr(contenders, "REGISTRY", registry)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append(1))
    kinds.compile_unit(unit(who=("eager", "triton", "reference")))
    assert len(ran) == 2  # modes
    kinds.compile_unit(unit(kind="calls", modes=("softmax_pool 2 fwd", "softmax_pool 2 step")))
    assert len(ran) == 4


@pytest.mark.slow
def test_the_process_measures(tmp_path):
    worker, events = runner.Worker(), []
    small = unit("it", who=("eager", "padded", "reference", "native"), device="cpu")
    worker.run(small, events.append, time.monotonic() + 600)
    worker.stop()
    made = store(tmp_path, small)
    for event in events:
        made.add(small, event["rows"])
    assert not made.not_measured()
    rows = on_disk(made)[1]["units"][0]["rows"]
    assert {r["status"] for r in rows if r["contender"] != "native"} == {"ok"}
    ours = next(r for r in rows if r["contender"] == "reference")
    assert ours["limits"]["matrix_rate"] > 0 and ours["ratios"]["eager"] > 0 and len(ours["errors"]) == 1


class _Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def pretended(monkeypatch):
    """torch.cuda as far as measuring needs it; tensors lie on "cpu:0", which is no GPU but not called "cpu"."""
    held = iter(range(0, 10**9, 1000))
    for name, stand_in in {
        "Event": _Event,
        "synchronize": lambda: None,
        "memory_allocated": lambda: next(held),
        "max_memory_allocated": lambda: next(held),
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda, "_ARRAY_BYTES", 1 << 20)
    monkeypatch.setattr(cuda, "_HUGE", 32)
    monkeypatch.setattr(cuda, "_LARGE", 32)
    for name in ("read_bandwidth", "copy_bandwidth", "MatrixProbe"):
        monkeypatch.setattr(cuda, name, functools.partial(getattr(cuda, name), device="cpu:0"))


@pytest.mark.parametrize(
    ("op", "autocast"),
    [(op, False) for op in ("gated_attention_pool", "dsmil", "max_pool", "topk_instances")]
    + [("gated_attention_pool", True)],
)
def test_measuring_as_on_a_gpu(op, autocast, pretended):
    options = {"device": "cpu:0", "precision": "high", "autocast": autocast, "seed": 3}
    workload = Workload(op, Shape((30, 12), 12, 8, 2), **options)
    finished, at_work = [], []
    modes = workload.case.modes()
    bench = Bench(
        workload,
        Options(["float32"], modes, ["eager", "padded", "reference"], 0.01),
        finished=finished.append,
        at_work=lambda *pair: at_work.append(pair),
        gpu=cuda,
    )
    before = torch.get_float32_matmul_precision()
    result = bench.run()
    assert [rows[0].mode for rows in finished] == list(modes) and torch.get_float32_matmul_precision() == before
    for r in result.rows:
        assert r.status in ("ok", "unavailable"), (r.contender, r.reason)
        assert r.status != "ok" or (r.allocator == 1000 and r.resident is None and not r.once and r.floor_seconds > 0)
    assert {("eager", mode) for mode in modes} <= set(at_work)
    if autocast:  # eager's own errors are those of the half type
        verdict = next(r for r in result.rows if r.contender == "reference").errors[0]
        assert verdict["eager"] > 1e-4 * verdict["size"]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_other_kinds_of_units(pretended, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_grid, "INSTANCES", 64)
    monkeypatch.setattr(contenders, "available_memory", lambda device="cpu": 2000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(total_memory=4000))
    fractions, events = [], []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(largest, "largest", lambda fits: 64 if fits(64) else 0)
    there = {"device": "cpu:0"}
    kinds.measure(events.append, unit("limits", ("limits",), ("device",), kind="limits", **there).to_json())
    called = unit("calls", ("softmax_pool 2x5 step",), ("eager", "native"), kind="calls", **there)
    kinds.measure(events.append, called.to_json())
    one = Workload("gated_attention_pool", Shape((2,), 12, 8), **there)
    for contender, memory in (("eager", 1000), ("reference", 3000)):
        asked = unit("largest", ("step",), (contender,), kind="largest", memory=memory)
        kinds.measure(events.append, replace(asked, workload=one).to_json())
    rows = {(r["mode"], r["contender"]): r for event in events for r in event.get("rows", ())}
    limits = rows["limits", "device"]
    assert limits["read_bandwidth"] > 0 and limits["copy_bandwidth"] > 0 and len(limits["product_rates"]) == 3
    assert set(limits["matrix_rates"]) == {"bfloat16", "float16", "float32", "float64", "tf32"}
    called = rows["softmax_pool 2x5 step", "eager"]
    assert 0 < called["host"] <= called["median"] and called["triton_kernels"] == {} and called["launches"] is None
    assert rows["softmax_pool 2x5 step", "native"]["status"] in ("ok", "unavailable")
    assert rows["step", "eager"]["instances"] == 64 and fractions == [0.25, 1.0]
    assert rows["step", "reference"]["status"] == "unavailable"
    assert events[0]["rows"] and {"doing": {"contender": "eager", "mode": "step"}} in events


def test_compiling_is_not_taken_for_the_time_of_a_run(pretended, monkeypatch):
    ran = []

    def prepare(case, inputs, static):
        def compute(i):
            ran.append(1)
            time.sleep(0.5 if len(ran) == 1 else 0.001)
            return case.eager(i)

        return compute, inputs

    monkeypatch.setitem(contenders.REGISTRY, "slow-first", contenders.Contender("slow-first", prepare))
    workload = Workload("mean_pool", Shape((30,), 12), device="cpu:0")
    rows = Bench(workload, Options(["float32"], ["fwd"], ["slow-first"], 0.3), gpu=cuda).run().rows
    assert len(rows[0].timing.seconds) >= 10


def test_an_error_that_poisons_is_told_from_one_that_does_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(ValueError), cuda.sound():
        raise ValueError("only this call")

    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(process.Poisoned, match="illegal memory access"), cuda.sound():
        pass
    assert not issubclass(process.Poisoned, Exception)


def test_the_largest_that_fits():
    asked = []
    for limit in (70_000, 100_000, 1_000_000, 123_456_789):
        found = largest.largest(lambda n, limit=limit: asked.append(n) or n <= limit)
        assert 0.95 * limit <= found * (1 + largest._CLOSE) and found <= limit
    assert largest.largest(lambda n: False) == 0 and len(asked) < 100
    assert largest.largest(lambda n: True, most=1 << 20) == 1 << 20


def test_contenders_with_other_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from milkernels.triton import call, tuning

    before = call.WORKSPACE
    with contenders.REGISTRY["workspace-64"].within():
        assert call.WORKSPACE == 64 << 20
    assert before == call.WORKSPACE
    with contenders.REGISTRY["fused"].within():
        assert tuning.plan(torch.device("cpu"), torch.float32, 64, 32).scores == "fused"
    case = CASES["softmax_pool"]  # which has no such kernels
    fused = contenders.REGISTRY["fused"]
    if triton_runs():
        with pytest.raises(contenders.Unavailable, match="the kernels are those of triton"), fused.within():
            fused.prepare(case, case.inputs(Shape((5,), 8)), True)


def triton_runs() -> bool:
    """Whether Triton was imported as an interpreter: later is too late."""
    from triton.runtime.interpreter import InterpretedFunction

    from milkernels.triton import pool

    return any(isinstance(value, InterpretedFunction) for value in vars(pool).values())


# What is made of the rows


def judged(u, rows):
    return {
        t["what"]: (t["value"], t["goal"], t["met"])
        for t in targets.of(u, {(r["mode"], r["contender"]): r for r in rows})
    }


def test_targets():
    one = next(u for u in gpu_grid.grid() if u.kind == "bench")
    limits = {"limits": {"matrix_rate": 1e15, "read_bandwidth": 4e12}}
    eager = row("step", "eager", 3.0, allocator=400_000_000)
    ours = row("step", "triton", 2.0, allocator=100_000 * 1024 * 2 + 90_000_000, flops=1, bytes=1, **limits)
    got = judged(one, [eager, ours, row("step", "compile", 1.9)])
    assert got["x eager"] == (1.5, 1.4, True) and got["x torch.compile"] == (0.95, 1.0, False)
    assert got["bytes beyond the gradient of x"] == (90_000_000, 301_600_000, True)
    fast = row("fwd", "fused", 1.0, flops=6e14, bytes=1, **limits)
    assert judged(one, [fast])["share of the matrix rate"] == (0.6, 0.55, True)
    ragged = next(u for u in gpu_grid.grid() if u.workload.shape.bags > 1)
    slow = [row("step", "eager", 4.0), row("step", "padded", 5.0), row("step", "triton", **limits)]
    assert {k: v[2] for k, v in judged(ragged, slow).items()} == {
        "x the loop over bags": False,
        "x the padded batch": True,
    }
    memory = next(u for u in gpu_grid.grid() if u.workload.op == "softmax_pool" and u.headline)
    read = row("fwd", "triton", 1.0, flops=1, bytes=3.6e12, **limits)
    assert judged(memory, [read]) == {"share of the read bandwidth": (0.9, 0.85, True)}
    many = next(u for u in gpu_grid.grid() if u.workload.shape.instances == 1_000_000)
    rows = [row("frozen", "eager", allocator=10**9), row("frozen", "triton", allocator=2 * 10**8, **limits)]
    assert judged(many, rows)["share of eager's bytes beyond it"] == (0.2, 0.1, False)
    assert judged(one, [row("step", "triton", **limits) | {"status": "FAIL"}]) == {}
