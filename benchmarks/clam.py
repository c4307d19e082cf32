"""CLAM_SB whole (Lu et al. 2021): what one step on a bag of stored features takes, before `accelerate` and after it.

The model is the stand-in of the tests: the attributes and methods of the published code, in words of our own.
"""

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.units import Unit
from milkernels import accelerate
from milkernels.bench import harness
from milkernels.bench.workload import DTYPES
from tests.upstream_models import ClamSB

_TOLERANCE = 1e-4  # between losses, before and after
_SIZES = (1024, 512, 256)


def rows(unit: Unit, mode: str) -> Iterator[dict]:
    """``mode``: "fwd", in evaluation, or "step", in training with the instance losses; the features are frozen."""
    torch.manual_seed(0)
    (count,) = unit.workload.shape.lengths
    x = torch.randn(count, _SIZES[0]).relu_().to(DTYPES[unit.dtype])
    eager = ClamSB(sizes=_SIZES, k_sample=min(8, count)).to(x.dtype)
    native = copy.deepcopy(eager)
    accelerate(native, min_instances=0)
    calls = {"eager": _call(eager, x, mode), "native": _call(native, x, mode)}
    losses = {name: float(call()) for name, call in calls.items()}
    if not abs(losses["eager"] - losses["native"]) <= _TOLERANCE * abs(losses["eager"]):
        yield {"contender": "native", "status": "FAIL", "reason": f"losses differ: {losses}"}
        return
    for name, timing in harness.measure(calls, unit.budget / len(unit.modes)).items():
        if timing.error:
            yield {"contender": name, "status": "ERROR", "reason": timing.error}
        else:
            yield {"contender": name, "seconds": timing.seconds, "median": timing.median, "spread": timing.spread}


def _call(model: nn.Module, x: torch.Tensor, mode: str) -> Callable[[], torch.Tensor]:
    label = torch.tensor([1])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(x)[0].sum()

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        logits, _, _, _, results = model(x, label=label, instance_eval=True)
        loss = 0.7 * F.cross_entropy(logits, label) + 0.3 * results["instance_loss"]
        loss.backward()
        return loss.detach()

    model.train(mode != "fwd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a first call
        (forward if mode == "fwd" else step)()
    return forward if mode == "fwd" else step
