"""The bench command: that it measures what it says, refuses to time wrong results, and survives failures."""

import json
import math
import time

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")

from milkernels.bench import cli, contenders, gate, harness, memory, process, report, roofline
from milkernels.bench.contenders import Contender
from milkernels.bench.workload import Workload, fast_dtypes, load_features
from milkernels.testing import CASES, MODES, Shape, evaluate, float64_reference, formulas, kinks

TINY = ["--instances", "96", "--dim", "24", "--hidden", "16", "--budget", "0.1", "--no-memory", "--threads", "1"]
SHAPE = Shape((9, 1, 40), dim=12, hidden=8, heads=2)


pytestmark = pytest.mark.usefixtures("quick_machine")


def run(tmp_path, *arguments):
    """Exit code, the JSON of a tiny run, and its rows in a list."""
    path = tmp_path / "result.json"
    code = cli.main([*TINY, *arguments, "--json", str(path)])
    content = json.loads(path.read_text())
    return code, content | {"rows": [row for unit in content["units"] for row in unit["rows"]]}


def by_contender(result, **wanted):
    rows = [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]
    return {row["contender"]: row for row in rows}


# --- the command -----------------------------------------------------------------------------------------------


def test_times_checks_and_reports(tmp_path, capsys):
    code, result = run(
        tmp_path,
        "--mode",
        "fwd,step,frozen",
        "--contenders",
        "eager",
        "--backends",
        "native,reference",
        "--dtype",
        "float32,bfloat16",
    )
    assert code == 0
    assert result["schema"] == report.SCHEMA and result["machine"]["torch"] == torch.__version__
    assert len(result["rows"]) == 2 * 3 * 3  # types, modes, contenders
    reference = by_contender(result, dtype="bfloat16", mode="step")["reference"]
    assert reference["status"] == "ok" and reference["ratios"]["eager"] > 0 and reference["rounds"] >= 1
    assert len(reference["errors"]) == 1 and reference["errors"][0]["ok"]  # the one nearest to its bound
    assert reference["limits"]["read_bandwidth"] == 1e10 and reference["limits"]["matrix_rate"] > 0
    assert [unit["dtype"] for unit in result["units"]] == ["float32", "bfloat16"]
    assert all({"name", "kind", "command", "date", "commit"} <= unit.keys() for unit in result["units"])
    assert str(tmp_path) not in json.dumps(result)  # published files name nobody's folders
    text = capsys.readouterr().out
    assert "median ms" in text and "GFLOP/s" in text and result["machine"]["cpu"] in text


@pytest.mark.parametrize("op", CASES)
def test_every_op_of_the_registry(op, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "LUCK", 1e4)  # one draw of so few numbers says little about accuracy
    case = CASES[op]
    formulas = ["eager", *(f"eager-{formula}" for formula in case.alternatives)]
    code, result = run(
        tmp_path,
        *("--op", op, "--mode", ",".join(case.modes()), "--dtype", "float32", "--lengths", "30,4,62"),
        *("--contenders", ",".join(formulas), "--backends", "reference", "--rounds", "1"),
    )
    assert code == 0, [row["reason"] for row in result["rows"]]
    assert {row["status"] for row in result["rows"]} == {"ok"}
    assert {row["op"] for row in result["rows"]} == {op} and all(row["bytes"] > 0 for row in result["rows"])
    assert result["units"][0]["workload"]["shape"]["heads"] == case.default_heads


def test_defaults_follow_the_op():
    def shape(*arguments):
        return cli._shape(cli.parser().parse_args(arguments))

    assert shape("--op", "dsmil") == Shape((100_000,), 512, hidden=128, heads=2)
    assert shape("--op", "attention_pool") == Shape((100_000,), 512, hidden=256, heads=1)
    assert shape("--op", "loss_attention_pool", "--hidden", "3").heads == 4
    assert shape("--op", "topk_instances", "--heads", "3").dim == 3  # the rows are scores


def test_every_formula_is_a_contender(tmp_path, capsys):
    case = CASES["loss_attention_pool"]
    assert contenders.default_contenders(case, case.inputs(SHAPE))[:3] == ["eager", "eager-logsumexp", "compile"]
    assert contenders.default_contenders(CASES["instance_max"], case.inputs(SHAPE)) == ["eager", "compile"]
    tiny = ("--mode", "fwd", "--dtype", "float32", "--rounds", "1", "--backends", "reference")
    _, result = run(tmp_path, "--op", case.name, "--contenders", "eager,eager-logsumexp", *tiny)
    rows = by_contender(result)
    assert rows["eager-logsumexp"]["label"] == "eager, logsumexp"
    ratios = rows["reference"]["ratios"]
    assert set(ratios) == {"eager", "eager-logsumexp"}
    theirs = rows["eager-logsumexp"]["median"] / rows["reference"]["median"]
    assert ratios["eager-logsumexp"] == pytest.approx(theirs, rel=1e-3)
    assert "x eager-logsumexp" in capsys.readouterr().out
    code, result = run(tmp_path, "--op", "max_pool", "--contenders", "eager-logsumexp", *tiny)
    assert code == 0 and by_contender(result)["eager-logsumexp"]["status"] == "unavailable"


@pytest.mark.parametrize(
    "shape",
    [
        ("--distribution", "small", "--bags", "6"),
        ("--distribution", "skewed", "--bags", "4", "--padded"),
        ("--lengths", "7,30,1", "--dropout", "0.25"),
        ("--op", "dsmil_pool_relu", "--dropout", "0.25", "--dtype", "float32", "--contenders", "eager"),
        ("--op", "gated_attention_pool_embed", "--lengths", "7,30,1", "--dropout", "0.25"),
        ("--op", "dsmil_mlp_embed", "--dropout", "0.25", "--contenders", "eager"),
        ("--op", "topk_instances", "--lengths", "3,30", "--padded", "--contenders", "eager"),
        ("--dtype", "float64,float16"),
        ("--features", "noise", "--seed", "3"),
    ],
    ids=[
        "small",
        "padded",
        "dropout",
        "value-dropout",
        "embedded",
        "embedded-dropout",
        "scores",
        "other-types",
        "noise",
    ],
)
def test_shapes_and_options(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "LUCK", 1e4)  # as above
    code, result = run(tmp_path, "--mode", "step", "--contenders", "eager,padded", "--backends", "reference", *shape)
    assert code == 0, [row["reason"] for row in result["rows"]]
    assert {row["status"] for row in result["rows"]} == {"ok"}


def wrong(case, inputs, static):
    def compute(i):
        outputs = case.call(i, "reference")
        return outputs | {"bag": outputs["bag"] * 1.01}

    return compute, inputs


def broken(case, inputs, static):
    def compute(i):
        raise ZeroDivisionError("as it happens")

    return compute, inputs


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(contenders.REGISTRY, "wrong", Contender("wrong", wrong, ours=True))
    code, result = run(tmp_path, "--contenders", "eager,wrong", "--dtype", "float32", "--mode", "step")
    assert code == 1
    row = by_contender(result)["wrong"]
    assert row["status"] == "FAIL" and "bag" in row["reason"] and "median" not in row
    assert "FAIL" in capsys.readouterr().out


def test_a_peer_that_computes_something_else_is_not_compared(tmp_path, monkeypatch):
    monkeypatch.setitem(contenders.REGISTRY, "peer", Contender("peer", wrong, peer=True))
    arguments = ("--contenders", "eager,peer", "--backends", "reference", "--dtype", "float32", "--mode", "fwd")
    code, result = run(tmp_path, *arguments)
    assert code == 0  # it is not ours to mend
    row = by_contender(result)["peer"]
    assert row["status"] == "differs" and not row["ratios"]


@pytest.mark.parametrize(("ours", "expected"), [(False, 0), (True, 1)])
def test_a_failing_contender_is_a_row(ours, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(contenders.REGISTRY, "broken", Contender("broken", broken, ours=ours))
    arguments = ("--contenders", "eager,broken", "--backends", "reference", "--dtype", "float32", "--mode", "fwd")
    code, result = run(tmp_path, *arguments)
    assert code == expected
    row = by_contender(result)["broken"]
    assert row["status"] == "error" and "as it happens" in row["reason"]
    assert by_contender(result)["reference"]["status"] == "ok"


def test_a_backend_without_a_kernel_is_a_row(tmp_path, no_interpreter):
    arguments = ("--op", "mean_pool", "--contenders", "eager", "--backends", "triton", "--mode", "fwd")
    code, result = run(tmp_path, *arguments)
    assert code == 0
    assert {row["status"] for row in result["rows"] if row["contender"] == "triton"} == {"unavailable"}


def test_what_does_not_fit_the_budget_runs_once(tmp_path):
    arguments = ("--contenders", "eager", "--backends", "reference", "--dtype", "float32", "--mode", "fwd")
    _, result = run(tmp_path, *arguments, "--budget", "0")  # without memory: one round, warmed up
    assert {row["once"] for row in result["rows"]} == {False} and {row["rounds"] for row in result["rows"]} == {1}
    tiny = [word for word in TINY if word != "--no-memory"]
    assert cli.main([*tiny, *arguments, "--budget", "0", "--json", str(tmp_path / "m.json")]) == 0
    rows = json.loads((tmp_path / "m.json").read_text())["units"][0]["rows"]
    assert {row["once"] for row in rows} == {True} and {row["rounds"] for row in rows} == {1}
    assert all(row["resident"] is not None or not memory._CLEAR_REFS.exists() for row in rows)


def test_features_of_a_file(tmp_path):
    numpy = pytest.importorskip("numpy")
    features = numpy.random.default_rng(0).integers(-300, 300, (40, 9)).astype("float32")
    features[:, 3] = 5  # a constant column has no deviation to divide by
    data = tmp_path / "bags.npz"
    numpy.savez(data, features=features, offsets=numpy.array([0, 12, 13, 40]))
    standardised, lengths = load_features(str(data))
    assert lengths == (12, 1, 27) and standardised.isfinite().all() and (standardised[:, 3] == 0).all()
    arguments = ("--features", str(data), "--contenders", "eager", "--mode", "fwd")
    code, result = run(tmp_path, *arguments)
    assert code == 0 and result["units"][0]["workload"]["shape"]["lengths"] == [12, 1, 27]
    assert result["units"][0]["workload"]["features"] == "bags.npz"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--op", "nothing"),
        ("--dtype", "int8"),
        ("--mode", "backward"),
        ("--contenders", "eagre"),
        ("--features", "absent.npz"),
        ("--op", "mean_pool", "--dropout", "0.5"),
        ("--op", "mean_pool", "--mode", "frozen"),
        ("--op", "segment_softmax", "--mode", "frozen"),
        ("--instances", "3", "--bags", "5"),
        ("--instances", "0"),
    ],
)
def test_wrong_arguments_are_explained(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


# --- rounds ----------------------------------------------------------------------------------------------------


def test_rounds_follow_the_budget():
    assert harness.plan_rounds({"a": 1.0, "b": 1.0}, 10) == {"a": 5, "b": 5}
    assert harness.plan_rounds({"a": 1e-3}, 10) == {"a": harness.MOST_ROUNDS}
    assert harness.plan_rounds({"slow": 30.0, "fast": 0.5}, 10) == {"slow": 1, "fast": 1}
    assert harness.plan_rounds({"slow": 6.0, "fast": 0.5}, 10) == {"slow": 1, "fast": 8}
    assert harness.plan_rounds({"slow": 30.0}, 10, rounds=4) == {"slow": 4}


def test_rounds_are_interleaved():
    rounds = harness.schedule({"a": 4, "b": 4, "c": 2})
    assert [sorted(names) for names in rounds] == [["a", "b"], ["a", "b", "c"], ["a", "b"], ["a", "b", "c"]]
    assert len({names[0] for names in rounds}) > 1  # nobody is always first


def test_measure_probes_between_rounds_and_reports_errors():
    probes = []

    def fails():
        raise ValueError("no")

    timings = harness.measure(
        {"sleep": lambda: time.sleep(0.003), "fails": fails}, 1, rounds=3, between=lambda: probes.append(1)
    )
    assert timings["fails"].error == "ValueError: no"
    assert len(timings["sleep"].seconds) == 3 and timings["sleep"].minimum >= 0.003
    assert len(probes) == 4


def test_spread_is_relative():
    assert harness.Timing([1.0, 2.0, 3.0]).spread == pytest.approx(0.5)
    assert harness.Timing([1.0, 9.0]).spread == 0.0


# --- limits ----------------------------------------------------------------------------------------------------


def test_floor_is_the_larger_limit():
    assert roofline.floor_seconds(flops=100, nbytes=1, rate=10, bandwidth=1) == 10
    assert roofline.floor_seconds(flops=100, nbytes=30, rate=10, bandwidth=1) == 30


def test_half_types_may_be_multiplied_in_float32():
    probe = roofline.MatrixProbe([torch.bfloat16, torch.float64])
    probe.rates = {torch.bfloat16: [1.0, 3.0], torch.float64: [2.0, 2.0], torch.float32: [9.0, 5.0]}
    assert probe.rate(torch.bfloat16) == 7.0 and probe.rate(torch.float64) == 2.0
    assert probe.rate(torch.bfloat16, since=1) == 5.0


def test_work_of_the_gated_op():
    case, shape = CASES["gated_attention_pool"], Shape((1000,), dim=512, hidden=256)
    score, pool = 2 * 1000 * 256 * (2 * 512 + 1), 2 * 1000 * 512
    assert case.flops(shape, "fwd") == score + pool
    assert case.flops(shape, "frozen") == 2 * score + 2 * pool
    assert case.flops(shape, "step") == 3 * score + 3 * pool
    assert case.bytes(shape, torch.bfloat16, "fwd") == 1000 * 512 * 2 + 4000
    assert case.bytes(shape, torch.bfloat16, "step") == 3 * 1000 * 512 * 2 + 8000


def test_work_of_ops_bound_by_memory():
    shape = Shape((1000,), dim=512, hidden=128, heads=2)
    vectors, x, column = 2 * 1000 * 512 * 2, 1000 * 512 * 2, 4 * 1000 * 2

    def work(op, mode):
        return CASES[op].flops(shape, mode), CASES[op].bytes(shape, torch.bfloat16, mode)

    # Absorbed query and folded value: logits, scores and pooling are two vectors each.
    assert work("dsmil", "fwd") == (3 * vectors, 2 * x + 2 * column)
    assert work("dsmil", "frozen") == (5 * vectors, 3 * x + 3 * column)
    assert work("dsmil", "step") == (7 * vectors, 4 * x + 3 * column)
    assert work("dsmil_pool", "fwd") == (2 * vectors, x + 2 * column)
    assert work("dsmil_pool_relu", "fwd") == (2 * vectors + 2 * 1000 * 512 * 512, x + 2 * column)
    assert work("instance_max", "step") == (vectors, 2 * x + column)
    assert work("max_pool", "step") == (0, 2 * x)
    assert work("segment_softmax", "fwd") == (0, 1000 * 2 * 2 + column)  # of scores, not of instances


def test_work_behind_an_embedding():
    shape, inner = Shape((1000,), dim=512, hidden=128, heads=2), Shape((1000,), dim=256, hidden=128, heads=2)
    layer = 2 * 1000 * 512 * 256

    def work(op):
        return {mode: (CASES[op].flops(shape, mode), CASES[op].bytes(shape, torch.bfloat16, mode)) for mode in MODES}

    def plain(op):
        """What the op behind it has to do, which sends a gradient to the layer in every training."""
        fwd, step = (CASES[op].flops(inner, mode) for mode in ("fwd", "step"))
        return {"fwd": fwd, "step": step, "frozen": step}

    for op, passes in (("gated_attention_pool", 1), ("query_pool", 1), ("dsmil_mlp", 2), ("loss_attention_pool", 1)):
        assert {mode: flops for mode, (flops, _) in work(f"{op}_embed").items()} == {
            "fwd": plain(op)["fwd"] + passes * layer,
            "step": plain(op)["step"] + 3 * layer,
            "frozen": plain(op)["frozen"] + 2 * layer,
        }
        assert {mode: nbytes for mode, (_, nbytes) in work(f"{op}_embed").items()} == {
            mode: CASES[op].bytes(shape, torch.bfloat16, mode) for mode in MODES
        }
    # The gradient of a maximum is that of few rows.
    vectors = CASES["instance_max"].flops(inner, "fwd")
    assert {flops for flops, _ in work("instance_max_embed").values()} == {vectors + layer}


def test_an_embedding_is_named():
    shape = Shape((70,), dim=24, hidden=16)
    embedded = Workload("gated_attention_pool_embed", shape).describe("float32")
    assert embedded.endswith("70 x 24 E12 D16 K1 float32")
    assert Workload("query_pool_embed", shape).describe("float32").endswith("70 x 24 E12 K1 float32")
    case = CASES["gated_attention_pool_embed"]
    few = gate._float64_bytes(CASES["gated_attention_pool"].inputs(shape), case, "step")
    assert gate._float64_bytes(case.inputs(shape), case, "step") == few + 8 * 70 * 6 * 12


def of_child(workload, seconds=120):
    about = {"contender": "eager", "dtype": "float32", "modes": ["fwd", "step"], "once": [], "threads": 1}
    return memory.of_contender(seconds, workload, **about)


def test_peak_memory_of_a_child_process():
    answers = of_child(Workload("mean_pool", Shape((20000,), dim=128)))
    x = 20000 * 128 * 4
    assert answers["step"]["allocator"] >= x > answers["fwd"]["allocator"]
    resident = answers["step"]["resident"]
    assert resident is None or resident >= 0.9 * x


def test_a_child_process_that_dies_or_hangs_is_explained(monkeypatch):
    workload = Workload("mean_pool", Shape((20,), dim=8))
    assert of_child(workload, seconds=0.01) == "not finished after 0 s"
    monkeypatch.setattr(process.sys, "executable", "false")
    assert of_child(workload) == "the process ended with exit status 1"


def test_no_high_water_mark_is_no_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no" / "such" / "file")
    with memory.resident_peak() as peak:
        torch.ones(1 << 20)
    assert peak.extra is None


# --- the gate ---------------------------------------------------------------------------------------------------


def test_the_gate_does_not_count_on_luck(monkeypatch):
    case = CASES["instance_max"]
    inputs = case.inputs(Shape((30,), dim=12, heads=2), torch.bfloat16)
    baseline = gate.yardstick(case, inputs, "fwd", seconds=0.0, memory=1 << 30)

    def off_by(factor):
        """Results with ``values`` so many times as far from float64 as eager's."""
        results = case.call(inputs, "reference")
        error = factor * baseline.eager_errors["values"] / math.sqrt(2)
        return results | {"values": baseline.reference.results["values"] + error}

    def verdict(factor):
        promise = gate.judge(case, baseline, lambda i: off_by(factor), inputs, "fwd", 0.0)
        return next(v for v in promise.verdicts if v.name == "values")

    assert verdict(9.9).ok and not verdict(10.1).ok  # two numbers: 2 * (1 + 8 / 2)
    assert verdict(3.0).ratio == pytest.approx(3)
    monkeypatch.setattr(gate, "LUCK", 0)
    assert verdict(1.9).ok and not verdict(2.1).ok


def test_the_gate_draws_again_where_a_sum_over_all_rows_may_be_luck(monkeypatch):
    """An error of all rows in one direction is as likely to be near 0 for eager as for ours."""
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(Shape((30,) * 8, dim=24, hidden=16, heads=1))
    baseline = gate.yardstick(case, inputs, "frozen", seconds=0.0, memory=1 << 30)

    def judged(first, later):
        """A gradient that is so many times as far off as eager's in the first draw, and in others."""

        def results(case, compute, inputs, mode):
            eager = case.complete(evaluate(case.eager, inputs, mode, case.primary), inputs)
            exact = float64_reference(case, inputs, mode).results["grad_v_bias"]
            factor = first if inputs is baseline.judged else later
            return eager | {"grad_v_bias": (exact + factor * (eager["grad_v_bias"] - exact)).detach()}

        monkeypatch.setattr(gate, "_results", results)
        return gate.judge(case, baseline, case.eager, inputs, "frozen", seconds=0.0)

    assert judged(1, 1).ok and judged(4, 1).ok
    assert not judged(4, 4).ok and not judged(100, 1).ok


def test_the_gate_does_not_count_on_the_luck_of_a_kink(monkeypatch):
    """A hidden unit whose input is 0 but for rounding: counted or not, the gradients are right."""
    monkeypatch.setattr(gate, "LUCK", 0)
    case = CASES["dsmil_pool_mlp"]
    inputs = case.inputs(Shape((400,), dim=24, hidden=16, heads=2))
    with torch.no_grad():
        at = inputs.x[7].double() @ inputs.parameters["q_weight"][3].double()
        inputs.parameters["q_bias"][3] = -at
    inputs.parameters["q2_weight"][:, 3] *= 100  # it is felt
    baseline = gate.yardstick(case, inputs, "step", seconds=0.0, memory=1 << 30)

    def judged(at):
        with formulas.kink(at):
            results = case.complete(evaluate(case.eager, inputs, "step", case.primary), inputs)
        monkeypatch.setattr(gate, "_results", lambda *of: results)
        return gate.judge(case, baseline, case.eager, inputs, "step", seconds=0.0)

    eps = torch.finfo(torch.float32).eps
    plain = [judged(side * 4 * eps) for side in (-1, 1)]
    assert all(promise.ok for promise in plain), [promise.broken() for promise in plain]
    errors = [{v.name: v.ours for v in promise.verdicts}["grad_x"] for promise in plain]
    assert max(errors) > 100 * min(errors), "one of them counts the unit, one does not"
    assert not judged(0.3).ok and not judged(-0.3).ok, "a kink elsewhere is another function"
    assert set(kinks(CASES["gated_attention_pool"], CASES["gated_attention_pool"].inputs(SHAPE)).values()) == {0.0}


def test_the_gate_judges_slow_eager_on_a_prefix(monkeypatch):
    monkeypatch.setattr(gate, "PREFIX", 16)
    case = CASES["gated_attention_pool"]
    inputs = case.inputs(SHAPE, torch.bfloat16)
    baseline = gate.yardstick(case, inputs, "step", seconds=1e6, memory=1 << 30)
    assert len(baseline.judged.x) == 16 and baseline.whole is not None and "first 16 instances" in baseline.note
    good = gate.judge(case, baseline, lambda i: case.call(i, "reference"), inputs, "step", 0.0)
    assert good.ok, good.broken()

    def wrong_behind_the_prefix(i):
        outputs = case.call(i, "reference")
        return outputs if len(i.x) == 16 else outputs | {"scores": outputs["scores"] + 1}

    assert not gate.judge(case, baseline, wrong_behind_the_prefix, inputs, "fwd", 0.0).ok


# --- the file -----------------------------------------------------------------------------------------------------


def test_few_digits_and_only_telling_errors(tmp_path):
    errors = [
        {"name": n, "ours": o, "bound": 1.0, "ok": o <= 1} for n, o in (("bag", 0.5), ("lse", 0.123456789), ("x", 2.0))
    ]
    row = report.compact({"median": 0.123456789, "share": float("nan"), "errors": errors})
    assert row["median"] == 0.12346 and row["share"] is None and [e["name"] for e in row["errors"]] == ["x"]
    report.write({"schema": 4, "units": [{"name": "u", "rows": [row, row]}]}, tmp_path / "f" / "it.json")
    assert json.loads((tmp_path / "f" / "it.json").read_text())["units"][0] == {"name": "u", "rows": [row, row]}
    assert not list((tmp_path / "f").glob("*.part"))


def test_bfloat16_is_measured_where_it_is_fast(monkeypatch):
    assert fast_dtypes()[0] == "float32"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert fast_dtypes() == ["float32"]
