"""One contender in a process of its own: ``python -m milkernels.bench.alone SPEC``.

Its peak memory, and where that is asked for its times and what the gate says.  SPEC is JSON; so is the answer, on the
last line.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from milkernels.bench import contenders, gate, harness, memory
from milkernels.bench.contenders import Contender, Unavailable
from milkernels.bench.workload import DTYPES, Workload
from milkernels.testing import Inputs, OpCase, evaluate

_PACKAGES = Path(__file__).resolve().parents[2]  # what must be importable in the child
_MOST = 0.9  # of the memory that is left
_LONG = 6.0  # seconds of a run above which there is one only
_JUDGED = 100_000  # instances: float64 and eager take their time


def _measure(spec: dict) -> dict[str, dict]:
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    workload, answers = Workload.from_json(spec["workload"]), {}
    with memory.within(int(_MOST * contenders.available_memory())):
        case, inputs = workload.case, workload.inputs(DTYPES[spec["dtype"]])
        contender = contenders.REGISTRY[spec["contender"]]
        for mode in spec["modes"]:
            if spec["budget"]:
                answers[mode] = _timed(contender, case, inputs, mode, spec["budget"])
            else:
                answers[mode] = _one(contender, case, inputs, mode, mode in spec["once"])
    return answers


def _timed(contender: Contender, case: OpCase, inputs: Inputs, mode: str, budget: float) -> dict:
    """Memory, then times, then what the gate says of ours; or the reason why there are none."""
    # A contender that compiles is taken for eager: a prefix would be compiled for itself.
    like = contender if contender.ours or contender.peer else contenders.REGISTRY["eager"]
    try:
        guess = gate.guess_seconds(like, case, inputs, mode)
        once = guess > _LONG
        answer = _one(contender, case, inputs, mode, once, budget) | {"once": once}
        return answer | (_judged(contender, case, inputs, mode, guess) if contender.ours else {})
    except Unavailable as why:
        return {"status": "unavailable", "reason": str(why)}
    except Exception as error:  # any reason: the other modes still count
        return {"status": "error", "reason": harness.describe(error)}


def _one(contender: Contender, case: OpCase, inputs: Inputs, mode: str, once: bool, budget: float = 0.0) -> dict:
    compute, its_inputs = contenders.warmed_up(contender, case, inputs, mode, whole=not once)

    def call():
        with contender.within():
            return evaluate(compute, its_inputs, mode, case.primary)

    memory.release()
    with memory.resident_peak() as peak:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    del result
    answer = {"resident": peak.extra, "allocator": None if once else memory.allocator_peak(call), "seconds": seconds}
    if budget:
        timing = harness.Timing([seconds], warm=False)
        if not once:
            timing = harness.measure({contender.name: call}, budget)[contender.name]
        answer["timing"] = asdict(timing)
    return answer


def _judged(contender: Contender, case: OpCase, inputs: Inputs, mode: str, guess: float) -> dict:
    """What the gate says; beyond ``_JUDGED`` instances of the first ones."""
    judged = inputs if len(inputs.x) <= _JUDGED else case.prefix(inputs, contenders.PREFIX)
    seconds = gate.guess_seconds(contenders.REGISTRY["eager"], case, judged, mode)
    baseline = gate.yardstick(case, judged, mode, seconds, contenders.available_memory() // 2)
    compute, _ = contender.prepare(case, judged, True)
    promise = gate.judge(case, baseline, compute, judged, mode, guess)
    note = baseline.note
    if judged is not inputs:
        note = f"judged on the first {len(judged.x)} instances"
    return {
        "errors": [asdict(v) | {"ok": v.ok, "ratio": v.ratio} for v in promise.verdicts],
        "gate_note": note,
        "broken": "" if promise.ok else promise.broken(),
    }


def measure(
    workload_json: str,
    contender: str,
    dtype: str,
    modes: list[str],
    once: list[str],
    threads: int | None,
    timeout: float,
    budget: float = 0.0,
) -> dict[str, dict] | str:
    """Answers by mode from a child process, or a line that says why there are none.

    An answer has ``resident`` and ``allocator`` bytes or None, and the ``seconds`` of the run.  Modes in
    ``once`` are run once, after a warm-up on a prefix.  With a ``budget`` of seconds for each mode it also has the
    ``timing`` of rounds and whether there was only ``once``; of our own contenders ``errors``, ``gate_note`` and
    what is ``broken``; or nothing but ``status`` and ``reason``.
    """
    spec = {
        "workload": workload_json,
        "contender": contender,
        "dtype": dtype,
        "modes": modes,
        "once": once,
        "threads": threads,
        "budget": budget,
    }
    paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "milkernels.bench.alone", json.dumps(spec)]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not finished after {timeout:.0f} s"
    if child.returncode != 0:
        return (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    return json.loads(child.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
