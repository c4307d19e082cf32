"""The error promise: what the library says about its accuracy, as a computation.

With r the float64 result and e eager's in the type under test, every output and gradient satisfies
``|ours - r| <= 2 |e - r| + 4 eps |r|`` in the 2-norm, eps of the result's own type; head by head and class by class
where there are several, for the errors of a large one would hide those of a small one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from milkernels.testing.cases import OpCase
from milkernels.testing.formulas import embedded, kink
from milkernels.testing.inputs import Inputs

_KINK = 8  # roundings, of the root mean square, that a product of some hundred terms may be off by


@dataclass(frozen=True)
class Verdict:
    """One output or gradient: 2-norms of the differences from float64; ``size`` is the norm of that."""

    name: str
    ours: float
    eager: float
    bound: float
    size: float
    reason: str = ""  # what is wrong besides the norm

    @property
    def ok(self) -> bool:
        return not self.reason and self.ours <= self.bound  # a NaN is not below anything

    @property
    def ratio(self) -> float | None:
        """Ours over eager's error; None where eager has none."""
        return self.ours / self.eager if self.eager > 0 else None


@dataclass(frozen=True)
class Promise:
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        return bool(self.verdicts) and all(v.ok for v in self.verdicts)

    def broken(self) -> str:
        """The first broken verdicts in one line; empty if the promise is kept."""
        broken = [v for v in self.verdicts if not v.ok]
        lines = [
            f"{v.name}: {v.reason or f'error {v.ours:.2e} above {v.bound:.2e} (eager {v.eager:.2e})'}"
            for v in broken[:3]
        ]
        return "; ".join(lines + [f"and {len(broken) - 3} more"] * (len(broken) > 3))


@dataclass(frozen=True)
class Reference:
    """Results in float64.  ``summands`` has the size of what cancels, for gradients that are exactly 0."""

    results: dict[str, Tensor]
    summands: dict[str, float] = field(default_factory=dict)


def evaluate(compute: Callable[[Inputs], dict[str, Tensor]], inputs: Inputs, mode: str, primary: str):
    """Outputs of ``compute`` and, except in mode ``fwd``, ``grad_<name>`` of ``primary`` for every leaf."""
    if mode == "fwd":
        with torch.no_grad():
            return compute(inputs)
    leaves = inputs.leaves(mode)
    outputs = compute(inputs)
    target = outputs[primary]
    gradients = torch.autograd.grad(target, list(leaves.values()), inputs.cotangent.to(target.dtype))
    return outputs | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def float64_reference(case: OpCase, inputs: Inputs, mode: str = "step") -> Reference:
    """The eager formula in float64 on the same (already rounded) inputs.

    In one piece: about 2.5 GB for 100,000 instances of 512 numbers with gradients.
    """
    exact = inputs.to(torch.float64).with_keep()
    results = evaluate(case.eager, exact, mode, case.primary)
    results = case.complete({name: t.detach() for name, t in results.items()}, exact)
    zeros = () if mode == "fwd" else case.zero_gradients(inputs)
    size = _summands(exact, results) if zeros else 0.0
    return Reference(results, {f"grad_{name}": size for name in zeros})


def kinks(case: OpCase, inputs: Inputs, mode: str = "step") -> dict[str, float]:
    """How far rounding may move each gradient because it moves hidden units across the kink of a ReLU: norms.

    Units whose input is 0 but for rounding may count or not, and among millions some are. The norm is that of the
    difference between counting all of them and none; where there is no ReLU it is 0. Products accumulate in float32
    at least, whatever the type.
    """
    narrow = inputs.x.dtype if inputs.x.dtype == torch.float64 else torch.float32
    at = _KINK * torch.finfo(narrow).eps
    with kink(-at):
        every = float64_reference(case, inputs, mode).results
    with kink(at):
        none = float64_reference(case, inputs, mode).results
    names = [name for name in every if name.startswith("grad_")]
    return {name: float(torch.linalg.vector_norm(every[name] - none[name])) for name in names}


@torch.no_grad()
def _summands(inputs: Inputs, results: Mapping[str, Tensor]) -> float:
    """A shift of the scores cancels: its gradient sums terms a_i x_il g_l to 0.  Their absolute sum."""
    total = 0.0
    x = embedded(inputs.x, inputs.rows(0, len(inputs.x)), inputs.options)
    for (start, end), g in zip(inputs.bounds(), inputs.cotangent, strict=True):
        weights = torch.softmax(results["scores"][start:end], dim=0)
        total += float((weights * (x[start:end].abs() @ g.abs().T)).nan_to_num().sum())
    return total


def eager_errors(case: OpCase, inputs: Inputs, reference: Reference, mode: str = "step") -> dict[str, float]:
    """Eager's errors in the type of ``inputs``: the largest, where people write more than one formula."""
    inputs, errors = inputs.with_keep(), {}
    for one_bag in (case.one_bag, *case.alternatives.values()):
        results = evaluate(lambda i, one_bag=one_bag: case.eager(i, one_bag), inputs, mode, case.primary)
        for name, error in errors_of(case.complete(results, inputs), reference).items():
            errors[name] = error if math.isnan(error) else max(error, errors.get(name, 0.0))
    return errors


def error_promise(
    ours: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor] | Reference,
    dtype: torch.dtype,
    heads: Mapping[str, int] | None = None,
) -> Promise:
    """Holds every result in ``ours`` to the promise; ``dtype`` is the type that ``eager`` was computed in.

    Infinities are compared by position and left out of the norms.  Gradients that are 0 in exact arithmetic
    (``Reference.summands``) are bounded by eps of ``dtype`` times the size of what cancels. ``heads`` says along which
    dimension results have heads or classes, each of which is held to it.
    """
    reference = oracle if isinstance(oracle, Reference) else Reference(dict(oracle))
    if heads:
        heads = {name: dim for name, dim in heads.items() if name not in reference.summands}
        ours, eager = by_head(ours, heads), by_head(eager, heads)
        reference = replace(reference, results=by_head(reference.results, heads))
    return promise_from_errors(ours, errors_of(eager, reference), reference, dtype)


def by_head(results: Mapping[str, Tensor], heads: Mapping[str, int]) -> dict[str, Tensor]:
    """The results with those that have heads along a dimension taken apart: ``name[k]`` is that of head k."""
    parts = {}
    for name, result in results.items():
        if name in heads:
            parts |= {f"{name}[{k}]": part for k, part in enumerate(result.unbind(heads[name]))}
        else:
            parts[name] = result
    return parts


def errors_of(results: Mapping[str, Tensor], reference: Reference) -> dict[str, float]:
    exact = reference.results
    return {name: _difference(t, exact[name])[0] for name, t in results.items() if name in exact}


def promise_from_errors(
    ours: Mapping[str, Tensor],
    eager_errors: Mapping[str, float],
    reference: Reference,
    dtype: torch.dtype,
    luck: float = 0.0,
    kinks: Mapping[str, float] | None = None,
) -> Promise:
    """``error_promise`` where eager's errors are known and its results are gone.

    In a single draw the error of few numbers may be small by luck: that of n counts ``1 + luck / n`` times. ``kinks``
    (see there) are added to the bounds.
    """
    verdicts = []
    for name, result in ours.items():
        exact = reference.results.get(name)
        if exact is None or name not in eager_errors:
            verdicts.append(_unmeasured(name, "nothing to compare it with"))
            continue
        error, size, reason = _difference(result, exact)
        eager, eps = eager_errors[name], torch.finfo(result.dtype).eps
        if name in reference.summands:
            bound = torch.finfo(dtype).eps * reference.summands[name]
        else:
            bound = 2 * eager * (1 + luck / max(1, exact.numel())) + 4 * eps * size + (kinks or {}).get(name, 0.0)
        verdicts.append(Verdict(name, error, eager, bound, size, reason))
    missing = sorted(set(reference.results) - set(ours))
    return Promise((*verdicts, *(_unmeasured(name, "missing") for name in missing)))


def _unmeasured(name: str, reason: str) -> Verdict:
    return Verdict(name, math.nan, math.nan, math.nan, math.nan, reason)


def _difference(result: Tensor, exact: Tensor) -> tuple[float, float, str]:
    """``|result - exact|``, ``|exact|`` (finite entries), and what is wrong that a norm does not show."""
    if result.shape != exact.shape:
        return math.nan, math.nan, f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    result, exact = result.detach().double(), exact.detach()
    if bool(result.isnan().any()) and not bool(exact.isnan().any()):
        return math.nan, math.nan, "NaN"
    infinite = exact.isinf()
    if bool(infinite.any()) or bool(result.isinf().any()):
        if not torch.equal(torch.where(result.isinf(), result, 0), torch.where(infinite, exact, 0)):
            return math.nan, math.nan, "infinities elsewhere than in float64"
        result, exact = result.masked_fill(infinite, 0), exact.masked_fill(infinite, 0)
    return float(torch.linalg.vector_norm(result - exact)), float(torch.linalg.vector_norm(exact)), ""
