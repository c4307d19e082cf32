"""The memory of a contender, in a process where nothing else is held: `milkernels.bench.process` runs this."""

import time

import torch

from milkernels.bench import contenders, memory
from milkernels.bench.contenders import Contender
from milkernels.bench.process import Emit, ask
from milkernels.bench.workload import DTYPES, Workload
from milkernels.testing import Inputs, OpCase, evaluate

_MOST = 0.9  # of the memory that is left


def measure(
    workload: Workload,
    contender: str,
    dtype: str,
    modes: list[str],
    once: list[str],
    threads: int | None,
    seconds: float,
) -> dict[str, dict] | str:
    """By mode: ``resident`` and ``allocator`` bytes or None, and the ``seconds`` of the run; or a line that says why
    there is nothing.  Modes in ``once`` are run once, after a warm-up on a prefix."""
    arguments = {"workload": workload.to_json(), "contender": contender, "dtype": dtype, "modes": modes, "once": once}
    answers = ask(f"{__name__}.peaks", arguments | {"threads": threads}, seconds)
    return answers if isinstance(answers, str) else {answer["mode"]: answer for answer in answers}


def peaks(
    emit: Emit, workload: str, contender: str, dtype: str, modes: list[str], once: list[str], threads: int | None
) -> None:
    if threads:
        torch.set_num_threads(threads)
    with memory.within(int(_MOST * contenders.available_memory())):
        chosen = Workload.from_json(workload)
        case, inputs = chosen.case, chosen.inputs(DTYPES[dtype])
        for mode in modes:
            answer, _ = peak(contenders.REGISTRY[contender], case, inputs, mode, mode in once)
            emit({"mode": mode, **answer})


def peak(contender: Contender, case: OpCase, inputs: Inputs, mode: str, once: bool):
    """What one run takes, and the run itself."""
    compute, its_inputs = contenders.warmed_up(contender, case, inputs, mode, whole=not once)

    def call():
        with contender.within():
            return evaluate(compute, its_inputs, mode, case.primary)

    memory.release()
    with memory.resident_peak() as extra:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
    del result
    held = None if once else memory.allocator_peak(call)
    return {"resident": extra.extra, "allocator": held, "seconds": seconds}, call
