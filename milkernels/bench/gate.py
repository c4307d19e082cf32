"""The correctness gate: no time is printed for a result that breaks the error promise."""

import math
import time
from dataclasses import dataclass, replace

import torch

from milkernels.bench.contenders import PREFIX, Compute, Contender
from milkernels.testing import (
    Inputs,
    OpCase,
    Promise,
    Reference,
    eager_errors,
    evaluate,
    float64_reference,
    kinks,
    promise_from_errors,
)

SLOW = 5.0  # seconds that one run for the gate may take
# One of two equally good results of n numbers has, once in a hundred draws, more than 2 * (1 + 8 / n) times the error
# of the other (for n from 2 on): the luck of a few numbers, such as the gradient of a bias of two classes.
LUCK = 8
# What the rows of a bag have in common, such as the rounding of its vector, adds up to one random number in every sum
# over all rows: eager may be near 0 there by chance. So many other gradients that come back tell.
DRAWS = 6


@dataclass(frozen=True)
class Yardstick:
    """Float64 results and eager's errors, on all instances or on a prefix of them."""

    judged: Inputs
    reference: Reference
    eager_errors: dict[str, float]
    dtype: torch.dtype
    whole: Reference | None  # float64 results on all instances, where ``judged`` is a prefix
    note: str = ""


def guess_seconds(contender: Contender, case: OpCase, inputs: Inputs, mode: str) -> float:
    """The time of one run on all instances, guessed from a second run on a prefix of them."""
    part = case.prefix(inputs, PREFIX) if len(inputs.x) > PREFIX else inputs
    compute, its_part = contender.prepare(case, part, True)
    evaluate(compute, its_part, mode, case.primary)
    start = time.perf_counter()
    evaluate(compute, its_part, mode, case.primary)
    seconds = time.perf_counter() - start
    return seconds * len(inputs.x) / len(part.x) * contender.work(inputs) / contender.work(part)


def _float64_bytes(inputs: Inputs, case: OpCase, mode: str) -> int:
    sizes = {name: t.shape[0] for name, t in inputs.parameters.items() if name.endswith("weight")}
    embedding = sizes.pop("e_weight", 0)
    hidden, width = max(sizes.values(), default=0), inputs.x.shape[1]
    per_instance = 2 * width + 6 * (hidden + embedding) if mode != "fwd" else width + 4 * (hidden + embedding)
    return 8 * len(inputs.x) * per_instance


def yardstick(case: OpCase, inputs: Inputs, mode: str, seconds: float, memory: int) -> Yardstick:
    """``seconds`` is eager's guessed time in this mode, ``memory`` what may be used."""
    dtype = _computed_in(inputs)
    fits = _float64_bytes(inputs, case, mode) <= memory
    if (seconds <= SLOW and fits) or len(inputs.x) <= PREFIX:
        judged, whole, note = inputs, None, ""
    else:
        judged = case.prefix(inputs, PREFIX)
        whole = float64_reference(case, inputs, mode) if fits else None
        why = f"eager would take {seconds:.0f} s" if fits else "float64 would not fit into memory"
        note = f"judged on the first {PREFIX} instances ({why})"
        if whole is not None:
            note += f"; all are held to eager's relative error there if a run takes less than {SLOW:.0f} s"
    reference = float64_reference(case, judged, mode)
    return Yardstick(judged, reference, _eager_errors(case, judged, reference, mode), dtype, whole, note)


def _eager_errors(case: OpCase, inputs: Inputs, reference: Reference, mode: str) -> dict[str, float]:
    if inputs.x.dtype == torch.float64:
        return _scaled_errors(case, inputs, reference, mode)
    return eager_errors(case, inputs, reference, mode)


def _scaled_errors(case: OpCase, inputs: Inputs, reference: Reference, mode: str) -> dict[str, float]:
    """Eager's errors in float64, where no better type shows them: float32's, scaled by the ratio of their eps.

    One rounding error is no measure of another, so all outputs take the largest relative one, and all gradients.
    """
    # Half as much again: what ours are compared with is off by as much itself (2 * 1.5 e = 2 e + e).
    scale = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    narrow = inputs.to(torch.float32)
    rounded = float64_reference(case, narrow, mode)
    sizes = {name: float(_finite_norm(t)) for name, t in reference.results.items()}
    largest = {True: 0.0, False: 0.0}  # of the gradients, of the outputs
    for name, error in eager_errors(case, narrow, rounded, mode).items():
        if name not in rounded.summands and sizes[name] > 0:
            kind = name.startswith("grad_")
            largest[kind] = max(largest[kind], error / sizes[name])
    return {name: scale * largest[name.startswith("grad_")] * size for name, size in sizes.items()}


def _results(case: OpCase, compute: Compute, inputs: Inputs, mode: str) -> dict[str, torch.Tensor]:
    return case.complete(evaluate(compute, inputs, mode, case.primary), inputs)


def _for_mode(reference: Reference, mode: str) -> Reference:
    def asked(name: str) -> bool:
        return not name.startswith("grad_") or (mode != "fwd" and (mode == "step" or name != "grad_x"))

    return Reference({n: t for n, t in reference.results.items() if asked(n)}, reference.summands)


def judge(case: OpCase, baseline: Yardstick, compute: Compute, inputs: Inputs, mode: str, seconds: float) -> Promise:
    """Holds every output, and in the training modes every gradient, to the error promise.

    ``seconds`` is the guessed time of one run; slow ones are judged on what eager is judged on, and only there.
    """
    reference = _for_mode(baseline.reference, mode)
    promise = _held(case, compute, baseline.judged, mode, baseline.eager_errors, reference)
    if not promise.ok and mode != "fwd" and baseline.dtype != torch.float64:
        promise = _over_draws(case, compute, baseline.judged, mode, promise)
    if baseline.whole is None or not promise.ok or seconds > SLOW:
        return promise
    whole = _for_mode(baseline.whole, mode)
    sizes = {v.name: v.size for v in promise.verdicts}
    allowed = {
        name: baseline.eager_errors[name] / max(sizes[name], math.ulp(0.0)) * float(_finite_norm(t))
        for name, t in whole.results.items()
    }
    everywhere = _held(case, compute, inputs, mode, allowed, whole)
    return promise if everywhere.ok else everywhere


def _held(
    case: OpCase, compute: Compute, inputs: Inputs, mode: str, errors: dict[str, float], reference: Reference
) -> Promise:
    """A promise that seems broken is looked at again: eager may have had luck with the kink of a ReLU."""
    results, dtype = _results(case, compute, inputs, mode), _computed_in(inputs)
    promise = promise_from_errors(results, errors, reference, dtype, LUCK)
    if promise.ok or mode == "fwd":
        return promise
    return promise_from_errors(results, errors, reference, dtype, LUCK, kinks(case, inputs, mode))


def _over_draws(case: OpCase, compute: Compute, inputs: Inputs, mode: str, promise: Promise) -> Promise:
    """The broken verdicts again, over several gradients that come back together: root mean squares of the errors."""
    broken = {v.name: v for v in promise.verdicts if not v.ok}
    if not all(name.startswith("grad_") and not v.reason and v.eager > 0 for name, v in broken.items()):
        return promise
    draws: dict[str, list] = {name: [v] for name, v in broken.items()}
    generator = torch.Generator(inputs.cotangent.device).manual_seed(0)
    for _ in range(DRAWS):
        cotangent = torch.empty_like(inputs.cotangent).normal_(generator=generator)
        drawn = replace(inputs, cotangent=cotangent)
        reference = _for_mode(float64_reference(case, drawn, mode), mode)
        errors = _eager_errors(case, drawn, reference, mode)
        held = promise_from_errors(_results(case, compute, drawn, mode), errors, reference, _computed_in(inputs))
        for verdict in held.verdicts:
            if verdict.name in draws:
                draws[verdict.name].append(verdict)
    eps = torch.finfo(_computed_in(inputs)).eps

    def together(verdict):
        ours, eager, size = (
            math.sqrt(sum(getattr(v, part) ** 2 for v in draws[verdict.name]) / (DRAWS + 1))
            for part in ("ours", "eager", "size")
        )
        return replace(verdict, ours=ours, eager=eager, size=size, bound=2 * eager + 4 * eps * size)

    return Promise(tuple(together(v) if v.name in broken else v for v in promise.verdicts))


def _computed_in(inputs: Inputs) -> torch.dtype:
    """The type of products: under autocast another than that of the instances."""
    device, dtype = inputs.x.device.type, inputs.x.dtype
    return torch.get_autocast_dtype(device) if dtype == torch.float32 and torch.is_autocast_enabled(device) else dtype


def _finite_norm(t: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(t.masked_fill(t.isinf(), 0.0))


def disagreement(case: OpCase, baseline: Yardstick, compute: Compute, inputs: Inputs) -> str:
    """Why a peer's pooled result is not the same function as float64 eager's, or nothing.

    This is to catch another formula, not rounding: half of the digits must agree.
    """
    result = evaluate(compute, inputs, "fwd", case.primary)[case.primary].double()
    exact = baseline.reference.results[case.primary]
    if result.shape != exact.shape:
        return f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    error = float(torch.linalg.vector_norm(result - exact) / torch.linalg.vector_norm(exact))
    tolerance = math.sqrt(torch.finfo(baseline.dtype).eps)
    return "" if error <= tolerance else f"relative difference {error:.1e} from float64"
