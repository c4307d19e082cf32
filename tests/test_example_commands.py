"""The examples as commands, the results in the repository, and real data."""

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("sklearn")

from example_cases import ROOT, toy, write_npz  # noqa: E402

from examples import (  # noqa: E402
    data,
    report,
    self_attention,
    side_by_side,
    slide_bag,
    train_classic,
    train_encoder,
    train_mnist_bags,
    train_published,
    train_svm,
    training,
)
from examples.recipes import Settings  # noqa: E402

BESIDE = ROOT.parent / "shared" / "data"
DATA = Path(os.environ.get("MILKERNELS_TEST_DATA", BESIDE / "mil"))
MNIST = BESIDE / "mnist"

# Commands


@pytest.fixture
def classic_data(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    for name in ("musk1", "tiger"):
        made = toy(24, seed=len(name))
        write_npz(folder / f"{name}.npz", made.bags, made.labels)
    return folder


@pytest.fixture
def mnist_data(tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        for name, values in (
            ("images-idx3", rng.integers(0, 256, (200, 28, 28))),
            ("labels-idx1", np.arange(200) % 10),
        ):
            head = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    return folder


def command(name, *arguments):
    """As users call it, in a process of its own."""
    call = [sys.executable, "-m", f"examples.{name}", *map(str, arguments)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_train_classic_quick(classic_data, tmp_path):
    out = tmp_path / "out"
    options = ["--data", classic_data, "--quick", "--out", out, "--protocol", "authors", "--jobs", 2]
    printed = command("train_classic", *options, "--models", "attention", "dsmil", "instance+isr", "self-attention")
    results = json.loads((out / "train_classic.json").read_text())
    assert len(results["rows"]) == 4 * 2 and all(set(row) >= {"accuracy", "authors"} for row in results["rows"])
    assert (out / "train_classic.md").read_text() in printed and "looks at the test folds" in printed
    assert "nothing to compare" in printed and "**below**" not in printed
    assert "python -m examples.train_classic --data sets --quick" in printed
    assert "dsmil, instance classifier alone" in printed and str(tmp_path) not in json.dumps(results)
    # Another call adds to the file, and does nothing again.
    before = results["rows"]
    command("train_classic", *options, "--models", "attention", "embedding+max")
    results = json.loads((out / "train_classic.json").read_text())
    assert len(results["rows"]) == 5 * 2 and len(results["commands"]) == 2
    assert all(row in results["rows"] for row in before)


@pytest.mark.slow
def test_train_mnist_bags_quick(mnist_data, tmp_path):
    out = tmp_path / "out"
    printed = command("train_mnist_bags", "--data", mnist_data, "--quick", "--out", out, "--jobs", 1)
    rows = json.loads((out / "train_mnist_bags.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"attention", "instance+max", "embedding+max"}
    assert all(0 <= value <= 1 for row in rows for value in row["auc"].values())
    assert "| instance+max |" in printed and "after 6 epochs" in printed and "papers" not in printed
    assert (out / "train_mnist_bags.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_train_encoder_quick(mnist_data, tmp_path):
    printed = command("train_encoder", "--data", mnist_data, "--quick", "--out", tmp_path, "--jobs", 1)
    rows = json.loads((tmp_path / "train_encoder.json").read_text())["rows"]
    assert {(row["way"], row["repeat"], row["digits"]) for row in rows} == {
        ("frozen", 0, 0),
        ("end to end", 0, 0),
        ("end to end", -1, 1000),
        ("one graph", -1, 1000),
    }
    assert all(0 <= row["auc"] <= 1 for row in rows if "auc" in row) and "| one graph |" in printed


def test_slide_bag_quick(tmp_path):
    command("slide_bag", "--quick", "--out", tmp_path)
    (row,) = json.loads((tmp_path / "slide_bag.json").read_text())["rows"]
    assert row["patches"] > 1900 and row["losses"][-1] < row["losses"][0]
    assert row["accuracy"] > 0.6 and row["attention_auc"] > 0.6, "it learns something"
    for name in re.findall(r"\((\S+png)\)", (tmp_path / "slide_bag.md").read_text()):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_side_by_side_quick(classic_data, tmp_path):
    printed = command("side_by_side", "--data", classic_data, "--quick", "--out", tmp_path, "--models", "dsmil")
    rows = json.loads((tmp_path / "side_by_side.json").read_text())["rows"]
    assert [(row["part"], row["way"]) for row in rows] == [(p, w) for p in ("tiger", "slides") for w in training.WAYS]
    assert all(row["seconds"] > 0 for row in rows) and printed.count("| loop |") == 2
    assert side_by_side.parse(["--quick"]).models == ["gated-attention"]


def test_side_by_side_compares_what_is_compared():
    """Every model is there in both ways of writing it, and mini-batches are the same in two of three ways."""
    args = side_by_side.parse(["--data", "somewhere"])
    for part, models in (("tiger", side_by_side.CLASSIC), ("slides", side_by_side.SLIDES)):
        for model in models:
            setup = {w: side_by_side._setup(side_by_side.Task(part, model, w, 0), args) for w in training.WAYS}
            assert setup["ragged"] == setup["loop"] and setup["ragged"][0].eager is not None
            assert {settings.epochs for _, settings in setup.values()} == {20 if part == "tiger" else args.slide_epochs}


@pytest.mark.parametrize(("name", "models"), [("train_published", 2), ("train_svm", 2)])
def test_classic_sets_quick(name, models, classic_data, tmp_path):
    command(name, "--quick", "--jobs", "1", "--data", classic_data, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / f"{name}.json").read_text())["rows"]
    assert len(rows) == models * 2 and len({row["model"] for row in rows}) == models


def test_self_attention_quick(tmp_path):
    command("self_attention", "--quick", "--out", tmp_path)
    rows = json.loads((tmp_path / "self_attention.json").read_text())["rows"]
    assert [row["instances"] for row in rows[::5]] == [200, 800] and len({row["model"] for row in rows}) == 5
    assert all(row["seconds"] > 0 for row in rows)


def test_cuda_graphs_quick(tmp_path):
    printed = command("cuda_graphs", "--quick", "--device", "cpu", "--out", tmp_path)
    plain, padded = json.loads((tmp_path / "cuda_graphs.json").read_text())["rows"]
    assert "no CUDA device" in padded["way"] and padded["way"] in printed and padded["buckets"] >= 1
    for name in ("first", "last"):
        assert padded[name] == pytest.approx(plain[name], rel=1e-3)
    assert plain["last"] < plain["first"]


def test_quick_runs_leave_no_results():
    before = sorted(report.RESULTS.glob("*")) if report.RESULTS.is_dir() else []
    command("self_attention", "--quick")
    assert (sorted(report.RESULTS.glob("*")) if report.RESULTS.is_dir() else []) == before


@dataclasses.dataclass(frozen=True)
class Number:
    value: int


@pytest.mark.slow
def test_rows_of_other_code_or_arguments_are_done_again(tmp_path, monkeypatch):
    def results(seed=0, argv=("--seed", "0")):
        args = report.argparse.Namespace(out=tmp_path, quick=False, seed=seed, device="cpu")
        return report.Report("numbers", lambda results: "# Numbers", args, argv)

    def put_aside():
        return json.loads((tmp_path / "numbers.json.old").read_text())["rows"]

    results().save([{"value": 1, "square": "kept"}])
    tasks = [Number(1), Number(2)]
    again = results()
    again.run(tasks, _square, 1, ("seed",))
    assert again.results["rows"] == [{"value": 1, "square": "kept"}, {"value": 2, "square": 4}]
    other = results(seed=1)
    other.run(tasks, _square, 1, ("seed",))
    assert [row["square"] for row in other.results["rows"]] == [1, 4]
    assert put_aside() == again.results["rows"], "nothing is lost"
    other.save([{"value": 1, "square": "kept"}])
    monkeypatch.setattr(report, "_digest", lambda name: "other code")
    changed = results(seed=1)
    changed.run(tasks, _square, 1, ("seed",))
    assert [row["square"] for row in changed.results["rows"]] == [1, 4]
    assert put_aside() == [{"value": 1, "square": "kept"}]


@dataclasses.dataclass(frozen=True)
class Fold:
    model: str
    value: int


@pytest.mark.slow
def test_rows_of_other_code_stay_where_they_may(tmp_path, monkeypatch):
    def results(argv, seed=0):
        args = report.argparse.Namespace(out=tmp_path, quick=False, seed=seed, device="cpu")
        return report.Report("numbers", lambda results: "# Numbers", args, argv, stay=True)

    def run(code, argv, tasks, seed=0):
        monkeypatch.setattr(report, "_digest", lambda name: code)
        one = results(argv, seed)
        one.run(tasks, _square, 1, ("seed",))
        return [(row["model"], row["value"], row.get("earlier")) for row in one.results["rows"]]

    def of_runs():
        return re.findall("^(?!#|    ).*(?=[.] The commands)", (tmp_path / "numbers.md").read_text(), re.MULTILINE)

    assert run("first", ["--a"], [Fold("a", 1), Fold("b", 2)]) == [("a", 1, None), ("b", 2, None)]
    assert len(of_runs()) == 1 and not of_runs()[0].endswith("a, b")
    assert run("second", ["--b"], [Fold("c", 3)]) == [("a", 1, 0), ("b", 2, 0), ("c", 3, None)]
    assert [text.rpartition("20")[2].partition(", ")[2] for text in of_runs()] == ["c", "a, b"]
    assert run("second", ["--b"], [Fold("c", 3)])[:2] == [("a", 1, 0), ("b", 2, 0)]
    third = run("third", ["--c"], [Fold("a", 1), Fold("d", 4)])
    assert sorted(third) == [("a", 1, None), ("b", 2, 1), ("c", 3, 0), ("d", 4, None)]
    page = (tmp_path / "numbers.md").read_text()
    assert [text.rpartition("20")[2].partition(", ")[2] for text in of_runs()] == ["a, d", "c", "b"]
    assert re.findall("--[abc]", page) == ["--c", "--b", "--a"]
    assert run("third", ["--c"], [Fold("a", 1)], seed=1) == [("a", 1, None)], "other arguments make other numbers"


def test_results_are_of_the_example_and_of_what_it_imports():
    assert {path.stem for path in report._sources("self_attention")} == {"self_attention", "report"}
    assert {path.stem for path in report._sources("train_slides")} >= {"slide_bag", "recipes", "eager"}


def _no_three(task):
    if task.value == 3:
        raise RuntimeError("three")
    return _square(task)


def test_a_run_that_fails_keeps_what_it_has(tmp_path):
    args = report.argparse.Namespace(out=tmp_path, quick=False, device="cpu")
    results = report.Report("numbers", lambda results: "# Numbers", args, [])
    with pytest.raises(RuntimeError, match="three"):
        results.run([Number(1), Number(2), Number(3)], _no_three, 1, ())
    assert [row["value"] for row in json.loads((tmp_path / "numbers.json").read_text())["rows"]] == [1, 2]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--data", "/home/me/sets", "--quick"], "--data sets --quick"),
        (["--data=../me/sets/", "--out", "a/b"], "--data=sets --out b"),
        (["--models", "instance+max", "attention"], "--models instance+max attention"),
    ],
)
def test_commands_are_shown_without_folders(argv, shown):
    assert report._command("slide_bag", argv) == f"python -m examples.slide_bag {shown}"


@pytest.mark.parametrize(
    ("example", "argv", "said"),
    [
        (train_classic, ["--data", "x", "--folds", "1"], "must be at least 2; got 1"),
        (train_classic, ["--data", "x", "--repeats", "0"], "must be at least 1; got 0"),
        (train_classic, ["--data", "x", "--jobs", "0"], "must be at least 1; got 0"),
        (train_classic, ["--data", "x", "--epochs", "0"], "must be at least 1; got 0"),
        (train_classic, ["--data", "x", "--sets", "musk3"], "invalid choice: 'musk3'"),
        (train_classic, [], "required: --data"),
        (train_mnist_bags, ["--data", "x", "--train", "1"], "must be at least 2; got 1"),
        (train_encoder, ["--data", "x", "--chunk", "0"], "must be at least 1; got 0"),
        (train_encoder, ["--data", "x", "--nines", "1001"], "--nines must be at most --digits, 1000; got 1001"),
        (slide_bag, ["--width", "32"], "must be at least 48; got 32"),
        (slide_bag, ["--patches", "10"], "must be at least 200; got 10"),
        (side_by_side, ["--rounds", "0"], "must be at least 1; got 0"),
        (self_attention, ["--rounds", "0"], "must be at least 1; got 0"),
        (self_attention, ["--instances", "0"], "must be at least 1; got 0"),
    ],
)
def test_bad_options(example, argv, said, capsys):
    with pytest.raises(SystemExit):
        example.main(argv)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train_classic", "train_encoder", "train_mnist_bags", "side_by_side"])
def test_data_are_looked_for_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.setattr(report.Report, "run", lambda *args, **options: pytest.fail("work"))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        sys.modules[f"examples.{name}"].main(["--data", str(tmp_path)])


def _square(task):
    return {"square": task.value**2}


# Results in the repository, and real data


WITH_PAGES = (
    train_classic,
    train_published,
    train_svm,
    train_encoder,
    train_mnist_bags,
    slide_bag,
    side_by_side,
    self_attention,
)
PAGES = {module.__name__.split(".")[1]: module for module in WITH_PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_committed_pages_are_those_of_their_files(name):
    path = report.RESULTS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no results of {name}")
    page = path.with_suffix(".md").read_text()
    assert page == report.page(json.loads(path.read_text()), PAGES[name].markdown)
    for picture in re.findall(r"\((\S+png)\)", page):
        assert path.with_name(picture).is_file()


@pytest.mark.skipif(
    not (DATA / "musk1.npz").is_file(), reason="no musk1.npz: MILKERNELS_TEST_DATA names no such folder"
)
@pytest.mark.parametrize("name", ["attention", "dsmil-v1", "loss-attention", "instance+noisy_or"])
def test_musk1(name):
    """Ten epochs on four fifths of real molecules: well above the 0.51 of always saying yes."""
    whole, right = data.classic(DATA, "musk1"), []
    assert (len(whole.labels), int(whole.labels.sum()), len(whole.bags.values)) == (92, 47, 476)
    recipe = train_classic.RECIPES[name]
    for train, test in training.folds(whole.labels, 5, 0)[:3]:
        train, test = whole.take(train), whole.take(test)
        x, others = data.standardised(train.bags, test.bags)
        model = training.fit(recipe, Settings(2e-3, 1e-3, 10), x, train.labels, 0)
        logits = training.predict(recipe, model, others)[""]
        right.append(1 - training.error_and_loss(logits, test.labels)[0])
    assert np.mean(right) > 0.65


@pytest.mark.skipif(not MNIST.is_dir(), reason="no MNIST beside the checkout")
def test_digits_of_mnist():
    some = data.mnist(MNIST, "t10k")
    assert len(some.images) == 10000 and torch.bincount(some.labels).tolist()[9] == 1009
    assert abs(some.images.mean()) < 0.05 and abs(some.images.std() - 1) < 0.05
