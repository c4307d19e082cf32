"""Who is measured.  Peers are looked for when they are asked for, and named with their version."""

import contextlib
import functools
import importlib.metadata
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from milkernels.bench import cuda
from milkernels.testing import CASES, Inputs, OpCase, evaluate
from milkernels.testing.formulas import attention_scores_eager

Compute = Callable[[Inputs], dict[str, Tensor]]
PREFIX = 4096  # instances on which a slow contender is warmed up, guessed and judged


class Unavailable(Exception):
    """Why a contender does not run here."""


@dataclass(frozen=True)
class Contender:
    """``prepare(case, inputs, static)`` returns what is timed and the inputs it is timed on.

    ``static`` says that only these inputs will be seen; without it the shape may change between calls.
    """

    name: str
    prepare: Callable[[OpCase, Inputs, bool], tuple[Compute, Inputs]]
    title: str = ""  # where it is not the name
    loops: bool = False  # over bags
    version: Callable[[], str] = lambda: ""
    ours: bool = False  # held to the error promise; its failure is the command's
    peer: bool = False  # somebody else's code for the same thing
    work: Callable[[Inputs], float] = lambda inputs: 1.0  # how its arithmetic grows, beyond with the instances
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around all of its runs

    def label(self, case: OpCase, inputs: Inputs) -> str:
        looping = self.loops and case.takes_offsets and len(inputs.lengths) > 1
        return " ".join(filter(None, (self.title or self.name, self.version(), looping and "(loop over bags)")))


def _eager(case: OpCase, inputs: Inputs, static: bool) -> tuple[Compute, Inputs]:
    return case.eager, inputs


def _alternative(formula: str) -> Callable[[OpCase, Inputs, bool], tuple[Compute, Inputs]]:
    def prepare(case: OpCase, inputs: Inputs, static: bool) -> tuple[Compute, Inputs]:
        if formula not in case.alternatives:
            raise Unavailable(f"nobody writes this op with {formula}")
        return lambda i: case.eager(i, case.alternatives[formula]), inputs

    return prepare


def _compile(case: OpCase, inputs: Inputs, static: bool) -> tuple[Compute, Inputs]:
    torch.compiler.reset()  # what was compiled before counts against PyTorch's limit of recompilations
    one_shape = static and (len(inputs.lengths) == 1 or not case.takes_offsets)
    one_bag = torch.compile(case.one_bag, dynamic=not one_shape)
    return lambda i: case.eager(i, one_bag), inputs


def _ours(backend: str) -> Callable[[OpCase, Inputs, bool], tuple[Compute, Inputs]]:
    def prepare(case: OpCase, inputs: Inputs, static: bool) -> tuple[Compute, Inputs]:
        try:
            with torch.no_grad():
                case.call(case.prefix(inputs, 1), backend)
        except RuntimeError as error:
            if not str(error).startswith("backend "):  # a backend that was asked for and cannot; the rest are bugs
                raise
            raise Unavailable(str(error)) from error
        return lambda i: case.call(i, backend), inputs

    return prepare


def _is_attention_pool(case: OpCase) -> bool:
    return "attention" in case.tags and case.takes_offsets


def _padding(inputs: Inputs) -> float:
    return max(inputs.lengths) * len(inputs.lengths) / max(1, sum(inputs.lengths))


def _padded(case: OpCase, inputs: Inputs, static: bool) -> tuple[Compute, Inputs]:
    """A padded batch with a mask: what a DataLoader that pads hands over."""
    if not _is_attention_pool(case):
        raise Unavailable("no padded formula for this op")
    bags, longest, dim = len(inputs.lengths), max(inputs.lengths), inputs.x.shape[1]
    hidden = sum(t.shape[0] for name, t in inputs.parameters.items() if name in ("v_weight", "u_weight"))
    needed = bags * longest * (2 * dim + 4 * hidden) * inputs.x.element_size()
    if needed > 0.5 * available_memory(inputs.x.device):
        raise Unavailable(f"the padded batch and its temporaries need {needed / 1e9:.1f} GB")
    device = inputs.x.device
    inside = torch.arange(longest, device=device) < torch.tensor(inputs.lengths, device=device).unsqueeze(1)
    batch = inputs.x.new_zeros(bags, longest, dim)
    batch[inside] = inputs.x.detach()
    real = inside
    if inputs.mask is not None:
        real = torch.zeros_like(inside)
        real[inside] = inputs.mask.bool()

    def compute(i: Inputs) -> dict[str, Tensor]:
        scores = attention_scores_eager(i.x, i.parameters, i.options)["scores"]
        weights = torch.softmax(scores.masked_fill(~i.mask.unsqueeze(-1), -math.inf), dim=1)
        return {"bag": torch.bmm(weights.transpose(1, 2), i.x)}

    return compute, replace(inputs, x=batch, mask=real)


def available_memory(device: torch.device | str = "cpu") -> int:
    if torch.device(device).type == "cuda":
        return cuda.available_memory()
    import psutil

    return psutil.virtual_memory().available


class _Gate(torch.nn.Module):
    """A score program as the gate network of another library's aggregation."""

    def __init__(self, inputs: Inputs):
        super().__init__()
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return attention_scores_eager(x, self.inputs.parameters, self.inputs.options)["scores"]


def _pyg_refuses(case: OpCase, inputs: Inputs) -> str | None:
    if not _is_attention_pool(case) or inputs.mask is not None or inputs.parameters["w_weight"].shape[0] > 1:
        return "AttentionalAggregation pools with one attention head and no mask"
    return None


def _pyg(case: OpCase, inputs: Inputs, static: bool) -> tuple[Compute, Inputs]:
    refusal = _pyg_refuses(case, inputs)
    if refusal is not None:
        raise Unavailable(refusal)
    try:
        from torch_geometric.nn import AttentionalAggregation
    except ImportError as error:
        raise Unavailable(f"PyTorch Geometric: {error}") from error
    lengths = torch.tensor(inputs.lengths, device=inputs.x.device)
    index = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    aggregate = AttentionalAggregation(_Gate(inputs))

    def compute(i: Inputs) -> dict[str, Tensor]:
        return {"bag": aggregate(i.x, index, dim_size=len(i.lengths)).unsqueeze(1)}

    return compute, inputs


def _installed(package: str) -> Callable[[], str]:
    def version() -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return version


@contextlib.contextmanager
def _kernels(**chosen: str) -> Iterator[None]:
    """Those that Triton takes by itself, but for the chosen ones."""
    from milkernels.triton import tuning

    with mock.patch.object(tuning, "_forced", {}), tuning.use(**chosen):
        yield


@contextlib.contextmanager
def _workspace(megabytes: int) -> Iterator[None]:
    from milkernels.triton import call

    before, call.WORKSPACE = call.WORKSPACE, megabytes << 20
    try:
        yield
    finally:
        call.WORKSPACE = before


def launched(run: Callable[[], object]) -> Counter[str]:
    """The Triton kernels that ``run`` launches, by name."""
    from milkernels.triton import call

    names: Counter[str] = Counter()

    def counting(kernel, *rest, launch=call._run):
        names[kernel.__name__] += 1
        launch(kernel, *rest)

    with mock.patch.object(call, "_run", counting):
        run()
    return names


def _with_kernels(chosen: dict[str, str]) -> Contender:
    """Triton with other kernels than it takes by itself; none where they cannot serve the call."""
    name = next(iter(chosen.values()))

    def prepare(case: OpCase, inputs: Inputs, static: bool) -> tuple[Compute, Inputs]:
        compute, _ = _ours("triton")(case, inputs, static)
        few = case.prefix(inputs, PREFIX)
        with torch.no_grad():
            forced = launched(lambda: compute(few))
            with _kernels():
                usual = launched(lambda: compute(few))
        if forced == usual:
            raise Unavailable(f"the kernels are those of triton: {', '.join(sorted(usual))}")
        return compute, inputs

    return Contender(name, prepare, title=f"triton, {name}", ours=True, within=lambda: _kernels(**chosen))


def _with_workspace(megabytes: int) -> Contender:
    name = f"workspace-{megabytes}"
    within = functools.partial(_workspace, megabytes)
    return Contender(name, _ours("triton"), title=f"triton, {name} MB", ours=True, within=within)


# Other formulas of an op: contender -> what they use
ALTERNATIVES = {f"eager-{formula}": formula for case in CASES.values() for formula in case.alternatives}
YARDSTICKS = ("eager", *ALTERNATIVES, "compile")  # what a result is divided by

REGISTRY: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender("eager", _eager, loops=True),
        *(
            Contender(name, _alternative(formula), title=f"eager, {formula}", loops=True, peer=True)
            for name, formula in ALTERNATIVES.items()
        ),
        Contender("compile", _compile, loops=True),
        Contender("padded", _padded, peer=True, work=_padding),
        Contender("pyg", _pyg, version=_installed("torch_geometric"), peer=True),
        Contender("native", _ours("native"), ours=True),
        Contender("triton", _ours("triton"), ours=True),
        *(_with_kernels(chosen) for chosen in ({"scores": "chunked"}, {"scores": "fused"}, {"products": "split"})),
        *(_with_workspace(megabytes) for megabytes in (8, 16, 32, 64)),
        Contender("reference", _ours("reference"), ours=True),
    )
}


def default_contenders(case: OpCase, inputs: Inputs) -> list[str]:
    """Eager in all formulas and torch.compile; on several bags also the peers that are there and have this op."""
    names = ["eager", *(name for name, formula in ALTERNATIVES.items() if formula in case.alternatives), "compile"]
    if len(inputs.lengths) > 1 and _is_attention_pool(case):
        pyg = _installed("torch_geometric")() and _pyg_refuses(case, inputs) is None
        names += ["padded", *(["pyg"] if pyg else [])]
    return names


def default_backends(case: OpCase, inputs: Inputs) -> list[str]:
    """The backend that serves the op here, by its own name."""
    for name in ("native", "triton"):
        try:
            _ours(name)(case, inputs, True)
        except Unavailable:
            continue
        return [name]
    return ["reference"]


def warmed_up(contender: Contender, case: OpCase, inputs: Inputs, mode: str, *, whole: bool) -> tuple[Compute, Inputs]:
    """What to time, after one run on all instances, or on a prefix where one run is all there is time for."""
    part = inputs if whole or len(inputs.x) <= PREFIX else case.prefix(inputs, PREFIX)
    compute, its_inputs = contender.prepare(case, part, part is inputs)
    evaluate(compute, its_inputs, mode, case.primary)
    if part is inputs:
        return compute, its_inputs
    if contender.name == "compile":
        return compute, inputs  # compiled for any length; preparing again would compile again
    return contender.prepare(case, inputs, False)
