"""The backward ops called by hand: what `needs` asks for must be there, and nobody is asked who is not."""

import op_cases
import pytest
import torch
from legs import every_backend
from op_cases import CASES, offsets_of, step
from torch.utils._python_dispatch import TorchDispatchMode

from milkernels.ops import contract

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what Triton's interpreter selects away

LENGTHS = (5, 0, 12)
BACKWARDS = {f"milkernels::{op.backward.name}_bwd": op.backward for op in contract.FORWARDS}


class Calls(TorchDispatchMode):
    """Notes the calls of the backward ops."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name().rsplit(".", 1)[0] in BACKWARDS:
            self.found.append((op, args))
        return op(*args, **(kwargs or {}))


def backward_of(case, backend):
    """Its op and its arguments, and the inputs that may have a gradient by name: a tensor or None."""
    with Calls() as calls:
        step(case.ours(backend), case.make(LENGTHS), offsets_of(LENGTHS), None)
    ((op, args),) = calls.found
    backward = BACKWARDS[op.name().rsplit(".", 1)[0]]
    saved = dict(zip(backward.saved, backward.arguments.flat(args), strict=False))
    return op, args, {name: saved[name] for name in backward.inputs.split()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_backend
def test_a_gradient_of_what_is_absent_is_refused(backend, case):
    if backend == "reference" or (backend == "native" and case not in op_cases.COMPILED.values()):
        pytest.skip("it has no raw ops")
    op, args, inputs = backward_of(case, backend)
    names = list(inputs)
    for name in (name for name in names if inputs[name] is None):
        needs = [other == name for other in names]
        with pytest.raises(ValueError, match=f"needs .*{name} .*absent"):
            op(*args[:-1], needs)
    if None in inputs.values():
        with pytest.raises(ValueError, match="needs .*absent"):
            op(*args[:-1], [True] * len(names))
    results = op(*args[:-1], [t is not None for t in inputs.values()])
    for name, result in zip(names, (results,) if isinstance(results, torch.Tensor) else results, strict=True):
        assert result.shape == ((0,) if inputs[name] is None else inputs[name].shape), name
