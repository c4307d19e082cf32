"""Other projects' models before and after `accelerate`: results are compared first, failures are rows, and what is
written.  The checkouts here are made by the tests; nothing of any project is in them."""

import contextlib
import importlib.util
import json
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("psutil")

import milkernels
from benchmarks import accelerated_constructors, pages, results, upstream, upstream_run
from benchmarks.upstream_models import (
    MODELS,
    PROJECTS,
    WORKLOADS,
    Choice,
    Data,
    Missing,
    Source,
    make_data,
    separate,
)
from benchmarks.upstream_run import Case, Run
from milkernels.bench import process, report

TINY = ["--instances", "60", "--budget", "0", "--dtype", "float32", "--threads", "1"]

CLAM = """
    import torch
    from torch import nn

    class Scores(nn.Module):
        def __init__(self, columns):
            super().__init__()
            self.one = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, columns))

        def forward(self, x):
            return self.one(x), x

    class CLAM_SB(nn.Module):
        columns = 1

        def __init__(self, dropout, gate=True):
            super().__init__()
            embedding = (nn.Linear(1024, 8), nn.ReLU(), nn.Dropout(dropout))
            self.attention_net = nn.Sequential(*embedding, Scores(self.columns))
            self.classifiers = nn.Linear(8, 2)

        def forward(self, h, label=None, instance_eval=False, attention_only=False):
            scores, h = self.attention_net(h)
            if attention_only:
                return scores.T
            logits = self.classifiers((torch.softmax(scores, 0).T @ h)[:1])
            extra = {"instance_loss": scores.topk(3, dim=0).values.sum()} if instance_eval else {}
            return logits, logits.softmax(1), logits.argmax(1), scores.T, extra

    class CLAM_MB(CLAM_SB):
        columns = 2

        def __init__(self, dropout):
            raise OSError("/home/somebody/weights.pt is not there")
"""


@pytest.fixture(autouse=True)
def tidy():
    """Modules of stand-in checkouts and the number of threads are as before."""
    modules, threads = dict(sys.modules), torch.get_num_threads()
    yield
    for name in set(sys.modules) - set(modules):
        if name.startswith("_upstream_") or name.split(".")[0] in ("src", "torchmil", "slideflow"):
            del sys.modules[name]
    torch.set_num_threads(threads)


@pytest.fixture
def clam(tmp_path):
    return written(tmp_path / "clam", "models/model_clam.py", CLAM)


@pytest.fixture
def accelerate(monkeypatch):
    """Has `accelerate` do something to a model, and report ``changed``."""

    def have(does=lambda model: None, changed=("the whole of it",)):
        def stand_in(model, min_instances=None, example=None):
            does(model)
            return SimpleNamespace(changed=list(changed), left=["attention: a hook"])

        monkeypatch.setattr(milkernels, "accelerate", stand_in)

    have()
    return have


def written(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(textwrap.dedent(text))
    return folder


def run(tmp_path, *arguments):
    """Exit code, and the content of the file of a tiny run."""
    path = tmp_path / "result.json"
    path.unlink(missing_ok=True)
    code = upstream.main([*TINY, *arguments, "--json", str(path)])
    return code, results.read(path)


def rows_of(content, contender="after", **wanted):
    """With what their units say of them."""
    rows = [{**unit, **row} for unit in content["units"] for row in unit["rows"]]
    return [r for r in rows if r["contender"] == contender and all(r[key] == value for key, value in wanted.items())]


# The command


def test_measures_and_reports(tmp_path, clam, accelerate, capsys):
    code, result = run(tmp_path, "--clam", str(clam), "--models", "CLAM_SB bag", "--no-memory")
    fwd, step = rows_of(result)
    assert code == 0, [fwd["reason"], step["reason"]]
    assert result["schema"] == report.SCHEMA and result["machine"]["torch"] == torch.__version__
    assert {"date", "commit", "command"} <= set(step) and (fwd["mode"], step["mode"]) == ("fwd", "step")
    assert {fwd["status"], step["status"]} == {"ok"} and step["ours"]
    assert step["version"] == "unknown" and step["workload"]["op"] == "CLAM: CLAM_SB"
    assert step["workload"]["shape"] == {"lengths": [60], "dim": 1024}
    (before,) = rows_of(result, "before", mode="step")
    assert before["median"] > 0 and before["seconds"] and before["spread"] is not None and not before["ours"]
    assert len(step["errors"]) == 1 and fwd["errors"][0]["name"].startswith("output ")
    assert step["report"] == ["changed: the whole of it", "left alone: attention: a hook"]
    assert str(tmp_path) not in json.dumps(result) and "--clam CLAM" in step["command"]
    said = capsys.readouterr().out
    assert "before ms" in said and "CLAM: CLAM_SB" in said and "left alone: attention: a hook" in said


def test_what_fails_is_a_row(tmp_path, clam, accelerate):
    empty = tmp_path / "empty"
    empty.mkdir()
    options = ("--models", "CLAM_MB|slideflow|CLAM_SB bag", "--mode", "fwd", "--no-memory")
    code, result = run(tmp_path, "--clam", str(clam), "--slideflow", str(empty), *options)
    assert code == 1
    (broken,) = (row for row in rows_of(result) if row["workload"]["op"] == "CLAM: CLAM_MB")
    assert broken["status"] == "error" and broken["reason"] == "OSError: weights.pt is not there"  # nobody's folders
    (missing,) = (row for row in rows_of(result) if row["workload"]["op"].startswith("slideflow"))
    assert missing["reason"] == "slideflow/mil/models/att_mil.py is not in the folder given by --slideflow"
    assert {row["workload"]["op"] for row in rows_of(result, status="ok")} == {"CLAM: CLAM_SB"}


def test_a_wrong_result_is_not_timed(tmp_path, clam, accelerate, capsys):
    @torch.no_grad()
    def spoil(model):
        model.classifiers.weight *= 1.01

    accelerate(spoil)
    code, result = run(tmp_path, "--clam", str(clam), "--models", "CLAM_SB bag", "--no-memory")
    rows = rows_of(result)
    assert code == 1 and {row["status"] for row in rows} == {"FAIL"} and not rows_of(result, "before")
    assert all("median" not in row for row in rows)
    assert "output 0: relative difference" in rows[0]["reason"]
    assert "FAIL" in capsys.readouterr().out


def test_a_wrong_gradient_fails_the_step_alone(tmp_path, clam, accelerate):
    def spoil(model):
        model.classifiers.weight.register_hook(lambda gradient: 1.01 * gradient)

    accelerate(spoil)
    _, result = run(tmp_path, "--clam", str(clam), "--models", "CLAM_SB bag", "--no-memory")
    fwd, step = rows_of(result)
    assert fwd["status"] == "ok" and step["status"] == "FAIL" and "classifiers.weight" in step["reason"]


def test_what_serves_one_dropout_only_is_compared_with_its_own(tmp_path, clam, accelerate):
    """As what is fused by its graph does: another dropout takes the model's own forward, which is right."""

    def spoil(model):
        own, dropout = model.forward, model.attention_net[2]
        p = dropout.p
        model.forward = lambda h, **k: own(1.01 * h if dropout.p == p else h, **k)

    accelerate(spoil)
    _, result = run(tmp_path, "--clam", str(clam), "--models", "CLAM_SB bag", "--no-memory")
    assert {row["status"] for row in rows_of(result)} == {"FAIL"}


def test_an_unchanged_model_is_not_timed(tmp_path, clam, accelerate):
    accelerate(changed=())
    code, result = run(tmp_path, "--clam", str(clam), "--models", "CLAM_SB bag", "--no-memory")
    rows = rows_of(result)
    assert code == 0 and {row["status"] for row in rows} == {"unchanged"}
    assert rows[0]["reason"] == "left alone: attention: a hook"


@pytest.mark.parametrize(
    "arguments",
    [(), ("--clam", "no/such/folder"), ("--clam", ""), ("--pyg", "--models", "nothing"), ("--dtype", "int8")],
)
def test_wrong_arguments_are_explained(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        upstream.main(list(arguments))
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_command_line_names_nobodys_folders():
    argv = ["--clam", "/a/b", "--dsmil=/c/d", "--torchmil", "--models", "CLAM|x y", "--json", "/e/f.json"]
    words = upstream.command_line(argv, {"clam": "/a/b", "dsmil": "/c/d", "torchmil": "", "pyg": None})
    expected = "--clam CLAM --dsmil=dsmil-wsi --torchmil --models 'CLAM|x y' --json f.json"
    assert words == f"python -m benchmarks.upstream {expected}"


def test_the_registry():
    keys = [model.key for model in MODELS]
    assert len(set(keys)) == len(keys) and {model.project for model in MODELS} == set(PROJECTS)
    assert {name for model in MODELS for name in model.workloads} == set(WORKLOADS)


# Checkouts


def test_a_file_is_loaded_without_a_trace(tmp_path):
    text = "from slideflow import log\nfrom src.part import VALUE\nassert log is not None\n"
    folder = written(tmp_path / "one", "src/models/a.py", text)
    written(folder, "src/part.py", "VALUE = 1\n")
    source, stand_ins = Source(PROJECTS["mil-lab"], str(folder)), {"slideflow": SimpleNamespace(log=1)}
    path = list(sys.path)
    module = source.file("src/models/a.py", packages=("src",), stand_ins=stand_ins)
    assert module.VALUE == 1 and module.__name__.startswith("_upstream_")
    assert sys.path == path and "slideflow" not in sys.modules and not list(folder.rglob("*.pyc"))
    assert source.file("src/models/a.py") is module
    other = written(tmp_path / "two", "src/models/a.py", text)
    written(other, "src/part.py", "VALUE = 2\n")
    again = Source(PROJECTS["mil-lab"], str(other)).file("src/models/a.py", packages=("src",), stand_ins=stand_ins)
    assert again.VALUE == 2  # not what the first one imported


def test_a_file_that_does_not_load_can_be_tried_again(tmp_path):
    folder = written(tmp_path, "dsmil.py", "raise ImportError('no such thing')\n")
    source = Source(PROJECTS["dsmil"], str(folder))
    for _ in range(2):
        with pytest.raises(ImportError, match="no such thing"):
            source.file("dsmil.py")
    with pytest.raises(Missing, match="MIL/model.py is not in the folder given by --dsmil"):
        source.file("MIL/model.py")


def test_a_package_that_is_not_there(tmp_path):
    absent = replace(PROJECTS["torchmil"], package="no_such_package")
    with pytest.raises(Missing, match="no_such_package is not installed"):
        Source(absent).module("no_such_package.models")
    assert Source(absent).version == "unknown"
    with pytest.raises(Missing, match="torchmil/models/__init__.py is not in the folder given by --torchmil"):
        Source(PROJECTS["torchmil"], str(tmp_path)).module("torchmil.models")


# Bags


def test_bags_of_every_workload():
    for workload in WORKLOADS.values():
        data = make_data(workload, 4000, 6)
        lengths = workload.lengths(4000)
        assert data.lengths == lengths and len(data.labels) == len(lengths)
        assert torch.equal(data.x, make_data(workload, 4000, 6).x)
        if workload.padded:
            assert data.mask.sum(1).tolist() == list(lengths) == data.counts.tolist()
            assert not data.x[~data.mask].any() and data.x.shape[:2] == data.mask.shape
        elif len(lengths) > 1:
            assert torch.bincount(data.index).tolist() == list(lengths) and len(data.x) == 4000


@pytest.mark.parametrize("name", ["bag", "batch-of-8", "ragged"])
def test_a_part_of_the_bags(name):
    data = make_data(WORKLOADS[name], 4000, 3)
    part = data.part(4)
    most = -(-max(data.lengths) // 4)
    assert part.lengths == tuple(min(n, most) for n in data.lengths)
    if name == "ragged":
        assert torch.bincount(part.index).tolist() == list(part.lengths)
        assert torch.equal(part.x[part.index == 2], data.x[data.index == 2][:most])
    else:
        assert torch.equal(part.x, data.x[:, :most]) and part.counts.tolist() == list(part.lengths)


def test_what_is_picked_stands_out():
    torch.manual_seed(0)
    model, data = nn.Linear(16, 2), make_data(WORKLOADS["batch-of-8"], 2000, 16)
    separate(Choice(lambda m, d: m(d.x), count=3, lowest=True), model, data)
    assert not data.x[~data.mask].any()
    for x, length in zip(data.x, data.lengths, strict=True):
        for scores in (s * column for column in model(x[:length]).T for s in (1, -1)):
            values, rows = scores.topk(4)
            picked = x[rows[:3]]
            assert (picked == picked[0]).all() and values[2] - values[3] > 0.02 * scores.std()


# Comparing


def test_differences():
    a = torch.tensor([1.0, 2.0, -torch.inf, 2.0])
    assert upstream_run.difference(a, a) == (0.0, "")
    assert upstream_run.difference(a, torch.tensor([1.0, 2.0, -1e9, 2.3])) == (pytest.approx(0.1), "")  # both masked
    assert upstream_run.difference(a, torch.tensor([1.0, 2.0, 0.0, 2.0]))[1] == "masked elsewhere"
    assert upstream_run.difference(a, torch.tensor([1.0, torch.nan, -torch.inf, 2.0]))[1] == "NaN"
    assert "float64" in upstream_run.difference(a, a.double())[1] and "(3,)" in upstream_run.difference(a, a[:3])[1]
    assert upstream_run.difference(torch.zeros(2), torch.zeros(2)) == (0.0, "")


class Pooling(nn.Module):
    """The gradient of the score's bias is 0 but for rounding; ``shift`` is what it is off by."""

    def __init__(self):
        super().__init__()
        self.score, self.drop, self.shift = nn.Linear(6, 1), nn.Dropout(0.5), 0.0

    def forward(self, data: Data):
        scores = self.score(self.drop(data.x[0]))
        scores = scores + self.shift * (self.score.bias - self.score.bias.detach())
        return (torch.softmax(scores, 0).T @ data.x[0]).sum() + self.shift * self.score.bias.sum()


def pair(shift, instances=400):
    model = next(m for m in MODELS if m.key == "clam CLAM_SB")
    model = replace(model, forward=lambda m, d: m(d), loss=lambda m, d: m(d))
    torch.manual_seed(0)
    before, after = Pooling(), Pooling()
    after.load_state_dict(before.state_dict())
    after.shift = shift
    data = make_data(WORKLOADS["bag"], instances, 6)
    return Run(model, before, data, "step"), Run(model, after, data, "step")


@pytest.mark.parametrize("memory", [1 << 40, 30_000])
def test_what_cancels_is_held_to_the_size_of_its_terms(memory, monkeypatch):
    monkeypatch.setattr(upstream_run.contenders, "available_memory", lambda: memory)
    monkeypatch.setattr(
        upstream_run.memory, "resident_peak", lambda: contextlib.nullcontext(SimpleNamespace(extra=50_000))
    )

    def verdict(shift):
        entries = {e["name"]: e for e in upstream_run.compare(*pair(shift))}
        assert entries["gradient of score.weight"]["ok"]
        return entries["gradient of score.bias"]

    small, large = verdict(1e-9), verdict(1e-3)
    assert small["error"] > 1e-4 and small["ok"] and small["after"] <= small["allowed"]
    assert not large["ok"] and upstream_run.broken([large]).startswith("gradient of score.bias: relative difference")
    assert ("instances" in small) == (memory < 1 << 40)


def test_dropout_is_off_for_the_comparison_only():
    run, _ = pair(0.0)
    with upstream_run.without_dropout(run.module):
        assert run.module.drop.p == 0.0
    assert run.module.drop.p == 0.5
    first, second = upstream_run.results(run), upstream_run.results(run)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run.module.score.weight.grad is None


def test_results_of_one_side_only():
    before, after = pair(0.0)
    after.module.score.bias.requires_grad_(False)
    (entry,) = (e for e in upstream_run.compare(before, after) if e["name"] == "gradient of score.bias")
    assert not entry["ok"] and entry["reason"] == "only before"


# Memory


def test_peaks_of_a_child_process(tmp_path, clam, accelerate, monkeypatch):
    case = Case(MODELS[0], Source(PROJECTS["clam"], str(clam)), "bag", "float32", 3000)
    assert Case.from_json(case.to_json()) == case
    answers = upstream_run._ask_child(case, "before", ["fwd", "step"], 1)
    hidden = 3000 * 8 * 4
    assert answers["step"]["allocator"] >= 2 * hidden and answers["fwd"]["allocator"] >= hidden
    answers = []
    upstream_run.measure_memory(answers.append, case.to_json(), "after", ["fwd"], 1)
    assert answers[0]["mode"] == "fwd" and answers[0]["allocator"] >= hidden
    monkeypatch.setattr(process.sys, "executable", "false")
    _, result = run(tmp_path, "--clam", str(clam), "--models", "CLAM_SB bag", "--mode", "fwd")
    (row,) = rows_of(result)
    assert row["status"] == "ok" and row["resident"] is None
    assert row["memory_note"] == "the process ended with exit status 1"


# The page


def test_rows_on_the_page_of_the_machine(tmp_path, clam, accelerate):
    chosen = ("--clam", str(clam), "--models", "CLAM_SB bag|CLAM_MB", "--mode", "fwd", "--no-memory")
    _, result = run(tmp_path, *chosen)
    before, after = rows_of(result, "before", status="ok")[0], rows_of(result, status="ok")[0]
    unit = next(unit for unit in result["units"] if unit["workload"]["op"] == "CLAM: CLAM_SB")
    sides = [before | {"median": 0.2, "resident": 3_000_000}, after | {"median": 0.05, "resident": 1_000_000}]
    failed = after | {"status": "FAIL", "mode": "step", "median": None, "reason": "off"}
    path = tmp_path / "some-machine.json"
    results.merge(path, result["machine"], [{"name": "other", "kind": "bench", "rows": []}])
    results.merge(path, result["machine"], result["units"])
    results.merge(path, result["machine"], [unit | {"rows": [*sides, failed]}])  # the newest of each unit
    content = results.read(path)
    assert [u["kind"] for u in content["units"]] == ["bench", "upstream", "upstream"]
    page = pages.page(content | {"units": content["units"][1:]})
    assert "## Models of other projects before and after accelerate" in page and "WRONG: off" in page
    assert "| `CLAM: CLAM_SB` 1: 60 x 1024 | float32 | fwd | before | 200 |" in page and "| 4.00 |" in page
    assert "broke: OSError: weights.pt is not there" in page and "python -m benchmarks.upstream" in page


# Torchmil's tests


def test_the_outermost_constructor_accelerates(monkeypatch):
    seen = []

    def stand_in(model, min_instances=None, example=None):
        seen.append((type(model).__name__, hasattr(model, "ready")))
        return SimpleNamespace(changed=["it"], waiting=[], left=[])

    class Part:
        def __init__(self, fails=False):
            if fails:
                raise ValueError("as asked")
            self.ready = True

    class Whole:
        def __init__(self):
            self.part, self.ready = Part(), True

    monkeypatch.setattr(milkernels, "accelerate", stand_in)
    monkeypatch.setattr(accelerated_constructors, "constructed", {"Part": 0, "Whole": 0})
    monkeypatch.setattr(accelerated_constructors, "changed", {"Part": 0, "Whole": 0})
    for cls in (Part, Whole):
        cls.__init__ = accelerated_constructors.accelerated(cls)
    Whole()
    with pytest.raises(ValueError, match="as asked"):
        Part(fails=True)
    Part()
    assert seen == [("Whole", True), ("Part", True)]
    assert accelerated_constructors.changed == {"Part": 1, "Whole": 1}


def test_torchmils_tests_run_in_a_process_of_their_own(tmp_path, capsys):
    text = """
        from torch import nn

        class ABMIL(nn.Module):
            pass

        class DSMIL(ABMIL):
            pass

        class CLAM_SB(ABMIL):
            pass
    """
    before = sys.modules.get("torchmil")  # the real one, where another test has imported it
    folder = written(tmp_path, "torchmil/models/__init__.py", text)
    pool = "from torch import nn\n\nclass AttentionPool(nn.Module):\n    pass\n"
    written(folder, "torchmil/nn/attention/attention_pool.py", pool)
    for name in ("torchmil", "torchmil/nn", "torchmil/nn/attention"):
        written(folder, f"{name}/__init__.py", "")
    with pytest.raises(SystemExit, match="tests/models/test_abmil.py does not come with torchmil"):
        upstream.main(["--torchmil", str(folder), "--torchmil-tests"])
    for name in upstream.TORCHMIL_TESTS:
        written(folder, f"tests/{name}", "def test_nothing():\n    pass\n")
    used = "from torchmil.models import ABMIL\n\ndef test_it():\n    assert ABMIL() is None\n"
    written(folder, "tests/models/test_abmil.py", used)
    assert upstream.main(["--torchmil", str(folder), "--torchmil-tests"]) == 1
    said = capsys.readouterr().out
    assert "3 of its tests passed, 1 failed, 0 skipped; models changed: ABMIL 0 of 1" in said and "test_it" in said
    assert sys.modules.get("torchmil") is before


@pytest.mark.slow
def test_torchmils_own_tests_pass_with_every_model_accelerated():
    if importlib.util.find_spec("torchmil") is None:
        pytest.skip("torchmil is not installed")
    done = upstream.run_torchmil_tests(Source(PROJECTS["torchmil"], ""))
    assert not done["failed"] and done["passed"] > 20
    assert set(done["constructed"]) == {"ABMIL", "DSMIL", "CLAM_SB", "AttentionPool"}
    assert done["changed"] == done["constructed"]
