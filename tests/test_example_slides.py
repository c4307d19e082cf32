"""Training on a folder of feature files and predicting one: `examples.train_slides` and `examples.predict_folder`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("sklearn")
pytest.importorskip("h5py")

from example_cases import ROOT  # noqa: E402

from examples import predict_folder, report, train_slides  # noqa: E402
from milkernels import Bags  # noqa: E402
from milkernels.data import FeatureFolder  # noqa: E402


def command(name, *arguments):
    call = [sys.executable, "-m", f"examples.{name}", *map(str, arguments)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    train_slides.write_simulated(folder, 30, 200, 48, seed=0)
    return folder


def options(slides, out, *more):
    given = ["--features", str(slides), "--labels", str(slides / "labels.csv"), "--out", str(out), "--lr", "0.002"]
    return [*given, "--max-instances", "800", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def trained(slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train_slides.main(options(slides, out, "--epochs", "3"))
    return out


def test_quick_learns_something():
    printed = command("predict_folder", "--quick", "--device", "cpu")
    assert printed.startswith("python -m examples.predict_folder --quick")
    assert float(printed.split("not trained on: ")[1].split()[0]) > 0.7


def test_training(slides, trained):
    results = json.loads((trained / "train_slides.json").read_text())
    (row,) = results["rows"]
    assert row["classes"] == ["normal", "tumour"] and sum(row["slides"].values()) == 30
    assert len(row["epochs"]) == 3
    assert 0 <= row["auc"] <= 1 and str(trained) not in json.dumps(results)
    assert (trained / "attention.png").read_bytes().startswith(b"\x89PNG")
    page = (trained / "train_slides.md").read_text()
    assert "python -m examples.train_slides --features" in page and "test AUC" in page
    model, content = train_slides.load(trained / "best.pt", "cpu")
    assert not model.training and content["width"] == 48
    assert len(content["epochs"]) == train_slides.best_of(row["epochs"]) + 1


def test_a_run_that_was_cut_goes_on(slides, trained, tmp_path):
    train_slides.main(options(slides, tmp_path, "--epochs", "2"))
    first = torch.load(tmp_path / "last.pt", weights_only=True)
    train_slides.main(options(slides, tmp_path, "--epochs", "3"))
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["epochs"][:2] == first["epochs"] and len(last["epochs"]) == 3
    steps = {int(state["step"]) for state in last["optimiser"]["state"].values()}
    assert steps == {3 * int(next(iter(first["optimiser"]["state"].values()))["step"]) // 2}
    with pytest.raises(ValueError, match="is of another model or other data"):
        train_slides.main(options(slides, tmp_path, "--epochs", "4", "--model", "clam-sb"))


@pytest.mark.parametrize("model", ["clam-sb", "clam-mb", "dsmil"])
def test_every_model(model, slides, tmp_path):
    train_slides.main(options(slides, tmp_path, "--epochs", "1", "--model", model))
    arrays = predict_folder.Predictor(tmp_path / "best.pt")(slides / "slide_000.h5")
    assert arrays["probabilities"].shape == (2,) and np.allclose(arrays["weights"].sum(0), 1, atol=1e-5)


def test_slides_of_a_patient_stay_together(tmp_path):
    lines = [f"p{i // 3},s{i},{'abc'[(i // 3) % 3]}" for i in range(90)]
    (tmp_path / "labels.csv").write_text("\n".join(["case_id,slide_id,label", *lines]))
    read = train_slides.read_slides(tmp_path / "labels.csv", 0)
    assert read.classes == ["a", "b", "c"]
    patients = {name: {int(slide[1:]) // 3 for slide in of_set} for name, of_set in read.sets.items()}
    assert sum(map(len, patients.values())) == 30 and len(set.union(*patients.values())) == 30
    assert sorted(slide for of_set in read.sets.values() for slide in of_set) == sorted(f"s{i}" for i in range(90))
    assert all(label == (int(s[1:]) // 3) % 3 for of_set in read.sets.values() for s, label in of_set.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "must have columns slide_id and label"),
        ("slide_id,label\n", "got no line"),
        ("slide_id,label\ns,1\ns,0\n", "a line for each slide; s has several"),
        ("slide_id,label\n" + "\n".join(f"s{i},1" for i in range(9)), "got 1 classes, 9 in the smallest"),
        ("slide_id,label\n" + "\n".join(f"s{i},{i % 3}" for i in range(9)), "got 3 classes, 3 in the smallest"),
    ],
)
def test_what_is_wrong_with_the_labels(text, said, tmp_path):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        train_slides.read_slides(tmp_path / "labels.csv", 0)


def test_auc_of_more_classes():
    p = torch.eye(3)[[0, 1, 2, 0]]
    assert train_slides.auc(p, [0, 1, 2, 0]) == 1
    assert train_slides.auc(torch.tensor([[0.4, 0.6], [0.6, 0.4]]), [0, 1]) == 0


# Predictions


def predictions(out):
    return {path.stem: dict(np.load(path)) for path in sorted(out.glob("*.npz"))}


def test_predictions_of_a_folder(slides, trained, tmp_path):
    given = ["--checkpoint", str(trained / "best.pt"), "--features", str(slides), "--device", "cpu"]
    for i in (1, 2, 3):
        assert predict_folder.main([*given, "--out", str(tmp_path / "shards"), "--shard", f"{i}/3"]) == 0
        assert len(predictions(tmp_path / "shards")) == 10 * i
    assert predict_folder.main([*given, "--out", str(tmp_path / "whole")]) == 0
    assert predict_folder.main([*given, "--out", str(tmp_path / "one"), "--heatmaps", "--shard", "5/30"]) == 0
    found, whole = predictions(tmp_path / "shards"), predictions(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["slide_004.npz", "slide_004.png"]
    assert not list((tmp_path / "shards").glob(".*"))
    model, about = train_slides.load(trained / "best.pt", "cpu")
    for sample in FeatureFolder(slides):
        arrays = found[sample["name"]]
        assert set(arrays) == {"logits", "probabilities", "classes", "scores", "weights", "coords"}
        assert all(np.array_equal(arrays[key], whole[sample["name"]][key]) for key in arrays)
        with torch.no_grad():
            prediction = model(Bags.from_bag(sample["features"]))
        assert np.array_equal(arrays["logits"], prediction.logits[0].numpy())
        assert np.array_equal(arrays["scores"], prediction.pooled.scores.numpy())
        assert np.allclose(arrays["weights"], prediction.pooled.scores.softmax(0).numpy(), atol=1e-6)
        assert np.array_equal(arrays["coords"], sample["coords"].numpy())
        assert arrays["classes"].tolist() == about["classes"] and abs(arrays["probabilities"].sum() - 1) < 1e-6
        if sample["name"] == "slide_029":
            break


class Counted(predict_folder.Predictor):
    calls = 0

    def __call__(self, path):
        self.calls += 1
        return super().__call__(path)


def test_it_goes_on_and_names_what_cannot_be_read(slides, trained, tmp_path, capsys):
    folder, out = tmp_path / "features", tmp_path / "out"
    folder.mkdir()
    for i in range(4):
        os.link(slides / f"slide_{i:03}.h5", folder / f"slide_{i:03}.h5")
    (folder / "broken.h5").write_bytes(b"nothing")
    torch.save(torch.zeros(3, 7), folder / "narrow.pt")
    paths = FeatureFolder(folder).paths
    predictor = Counted(trained / "best.pt")
    assert predict_folder.predict(paths[:4], predictor, out).keys() == {"broken", "narrow"}
    assert len(predictions(out)) == 2 and predictor.calls == 4
    errors = predict_folder.predict(paths, predictor, out)
    assert len(predictions(out)) == 4 and predictor.calls == 8, "what is there is not done again"
    assert (
        "broken.h5" in errors["broken"]
        and "features of width 7; " in errors["narrow"]
        and "takes 48" in errors["narrow"]
    )
    given = ["--checkpoint", str(trained / "best.pt"), "--features", str(folder), "--out", str(out)]
    assert predict_folder.main([*given, "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "4 of 6 slides" in said.out and "broken: ValueError" in said.err


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    def fails(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match="no space"):
        predict_folder.write(tmp_path / "a.npz", {})
    assert not (tmp_path / "a.npz").exists()


def test_the_callable_is_small_when_it_is_sent(slides, trained):
    import pickle

    predictor = predict_folder.Predictor(trained / "best.pt")
    first = predictor(slides / "slide_000.h5")
    sent = pickle.dumps(predictor)
    assert len(sent) < 500
    second = pickle.loads(sent)(str(slides / "slide_000.h5"))
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_shards(text, capsys):
    with pytest.raises(SystemExit):
        predict_folder.parse(["--quick", f"--shard={text}"])
    assert f"must be i/n, 1/n to n/n; got {text}" in capsys.readouterr().err


@pytest.mark.parametrize("example", [train_slides, predict_folder])
def test_what_is_needed(example, capsys):
    with pytest.raises(SystemExit):
        example.main([])
    assert "or --quick, which simulates slides" in capsys.readouterr().err


@pytest.mark.parametrize("example", [train_slides, predict_folder])
def test_quick_does_not_leave_out_what_was_given(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--quick", "--features", "features"])
    assert "--quick simulates slides; leave out" in capsys.readouterr().err


def test_imports_are_checked_first():
    script = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("h5py", "sklearn") else found(name, *rest)
try:
    import examples.train_slides
except ImportError as error:
    assert "the examples need sklearn, h5py" in str(error) and "milkernels[examples]" in str(error), error
else:
    raise SystemExit("no error")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_quick_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(report.RESULTS.glob("*"))
    assert train_slides.parse(["--quick"]).out is None
    assert train_slides.parse(["--features", "a", "--labels", "b"]).out == Path("train_slides")
    assert sorted(report.RESULTS.glob("*")) == before
