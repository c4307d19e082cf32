"""What runs the ops, as a table: a leg is a backend on a device, with the cases that it serves.  Tests of numbers are
written once, in test_numbers.py, and say for each leg at which sizes they run there.

The native leg is the instruction set that the process loads; ATEN_CPU_CAPABILITY chooses it for PyTorch's own products
as well, so each has a process of its own (.ci/run).
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import op_cases
import pytest
import torch
from op_cases import CASES, COMPILED, PLAIN, Case

import milkernels
from milkernels import native, triton
from milkernels.ops import contract


@dataclasses.dataclass(frozen=True)
class OnDevice(Case):
    """The case with tensors on the CPU and our side of it on the device, so that all checks of ``op_cases`` serve."""

    device: str = "cuda"

    def ours(self, backend):
        compute = super().ours(backend)

        def there(tensors, offsets, mask):
            offsets, mask = (None if t is None else t.to(self.device) for t in (offsets, mask))
            outputs = compute({name: t.to(self.device) for name, t in tensors.items()}, offsets, mask)
            return tuple(o.cpu() for o in outputs)

        return there


def on(device: str, case: Case) -> OnDevice:
    return OnDevice(*(getattr(case, field.name) for field in dataclasses.fields(case)), device)


@dataclasses.dataclass(frozen=True, eq=False)
class Leg:
    name: str
    backend: str
    cases: dict[str, Case]  # that it serves
    missing: str | None  # why this machine has not got it
    device: str = "cpu"
    marks: tuple = ()

    @property
    def needed(self) -> list:
        """The marks of tests of this leg."""
        return [*self.marks, pytest.mark.skipif(self.missing is not None, reason=str(self.missing))]

    def run(self, case, tensors, offsets, mask=None, wanted=None):
        return op_cases.step(case.ours(self.backend), tensors, offsets, mask, wanted)

    def promise(self, case, *types, **how):
        return op_cases.promise(case, self.backend, *types, **how)

    def name_of(self, case) -> str | None:
        return next((name for name, own in self.cases.items() if own is case), None)


_SIMULATED = (
    pytest.mark.simulated,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of what is selected away
)


def _emulated_here() -> str | None:
    if native.emulated():
        return native.load_error()
    return "needs MILKERNELS_EMULATE_CUDA=1, as `make cuda-test` sets it"


def _on_a_gpu(backend: str) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if backend == "native":
        return milkernels.backends.why_not("native", "softmax_pool", "cuda")
    return "TRITON_INTERPRET=1" if triton.interpreted() else triton.load_error()


def _gpu(backend: str) -> Leg:
    served = {
        name: case for name, case in CASES.items() if op_cases.has_kernel(case.kernel, backend, case.needs, "cuda")
    }
    cases = {name: on("cuda", case) for name, case in served.items()}
    return Leg(f"gpu_{backend}", backend, cases, _on_a_gpu(backend), "cuda")


_KERNELS = {*triton.kernels(), *contract.COMPOSED}
_INTERPRETED = {name: case for name, case in CASES.items() if f"{case.kernel}_fwd" in _KERNELS}
LEGS = {
    leg.name: leg
    for leg in (
        Leg("native", "native", COMPILED, "CUDA's are emulated" if native.emulated() else native.load_error()),
        Leg("emulated", "native", COMPILED, _emulated_here(), marks=_SIMULATED[:1]),
        Leg("reference", "reference", CASES, None),
        Leg(
            "interpreted",
            "triton",
            _INTERPRETED,
            triton.load_error() if triton.interpreted() else "there is a GPU",
            marks=_SIMULATED,
        ),
        _gpu("triton"),
        _gpu("native"),
    )
}
GROUPS = {name: (name,) for name in LEGS}
GROUPS |= {"compiled": ("native", "emulated"), "gpu": ("gpu_triton", "gpu_native")}
EMBEDDED = {name: case for name, case in CASES.items() if case.embed is not None}
ONE_OF_EACH = tuple(PLAIN | EMBEDDED)
VARIANTS = tuple(name for name in CASES if name not in PLAIN)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a leg runs: all of its cases, or those, with these values of the test's other arguments."""

    values: tuple
    cases: tuple | None
    slow: bool
    label: str


def at(*values, cases=None, slow=False, label="") -> Row:
    return Row(values, None if cases is None else tuple(cases), slow, label)


def by_leg(arguments: str = "", **rows: list[Row]):
    """Parametrises over ``leg``, ``case`` and arguments: for each leg, or group of legs, its rows.  One that this
    machine has not got is skipped as a whole, and says why."""
    names = ["leg", "case", *arguments.split()]
    made = []
    for leg, row in ((LEGS[name], row) for group, its in rows.items() for name in GROUPS[group] for row in its):
        if leg.missing is not None:
            skipped = pytest.param(leg, *[None] * (len(names) - 1), id=leg.name, marks=pytest.mark.skip(leg.missing))
            if all(p.id != leg.name for p in made):
                made.append(skipped)
            continue
        marks = (*leg.marks, pytest.mark.slow) if row.slow else leg.marks
        for name in leg.cases if row.cases is None else row.cases:
            if name in leg.cases:
                label = "-".join(filter(None, (leg.name, name, row.label)))
                made.append(pytest.param(leg, leg.cases[name], *row.values, id=label, marks=marks))
    return pytest.mark.parametrize(names, made)


@contextlib.contextmanager
def all_of_them() -> Iterator:
    """``with all_of_them() as each: ... with each("float32"):`` goes on behind a failure, and names all at the end."""
    failed = []

    @contextlib.contextmanager
    def each(*what):
        try:
            yield
        except Exception as error:
            failed.append(f"{' '.join(map(str, what))}: {str(error).strip() or type(error).__name__}")

    yield each
    assert not failed, "\n".join([f"{len(failed)} failed", *failed])


def on_legs(*names: str) -> list:
    """The backends of those legs, as parameters."""
    return [pytest.param(LEGS[name].backend, id=name, marks=LEGS[name].needed) for name in names]


_COMPILED = "emulated" if native.emulated() else "native"
every_backend = pytest.mark.parametrize("backend", on_legs(_COMPILED, "interpreted", "reference"))
every_kernels_backend = pytest.mark.parametrize("backend", on_legs(_COMPILED, "interpreted"))


# The emulator

ORDERS = ("forward", "reverse", "shuffled")


@contextlib.contextmanager
def emulated(setting: str, value, usual):
    """Within the block a setting of the emulated module is another than usual."""
    getattr(native._extension, setting)(value)
    try:
        yield
    finally:
        getattr(native._extension, setting)(usual)


def threads_in_order(order: str):
    """Within the block the threads of a block run in that order."""
    return emulated("set_order", order, "forward")
