"""Who is measured.  Peers are looked for when they are asked for, and named with their version."""

import contextlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch

from milkernels.bench import peers
from milkernels.bench.peers import Compute, Prepare, Prepared, Unavailable
from milkernels.bench.peers import available_memory as available_memory
from milkernels.testing import CASES, Inputs, OpCase, evaluate

PREFIX = 4096  # instances on which a slow contender is warmed up, guessed and judged


@dataclass(frozen=True)
class Contender:
    """``prepare(case, inputs, static)`` returns what is timed and the inputs it is timed on.

    ``static`` says that only these inputs will be seen; without it the shape may change between calls.
    """

    name: str
    prepare: Prepare
    title: str = ""  # where it is not the name
    loops: bool = False  # over bags
    version: Callable[[], str] = lambda: ""
    ours: bool = False  # held to the error promise; its failure is the command's
    peer: bool = False  # somebody else's code for the same thing
    work: Callable[[Inputs], float] = lambda inputs: 1.0  # how its arithmetic grows, beyond with the instances
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around all of its runs
    about: str = ""  # what it is, in one line
    package: str = ""  # what must be installed for it
    refuses: Callable[[OpCase, Inputs], str] = lambda case, inputs: ""  # why it does not serve a call, or nothing

    def label(self, case: OpCase, inputs: Inputs) -> str:
        looping = self.loops and case.takes_offsets and len(inputs.lengths) > 1
        return " ".join(filter(None, (self.title or self.name, self.version(), looping and "(loop over bags)")))


def _eager(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
    return case.eager, inputs


def _alternative(formula: str) -> Prepare:
    def prepare(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
        if formula not in case.alternatives:
            raise Unavailable(f"nobody writes this op with {formula}")
        return lambda i: case.eager(i, case.alternatives[formula]), inputs

    return prepare


def _compile(mode: str | None) -> Prepare:
    def prepare(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
        torch.compiler.reset()  # what was compiled before counts against PyTorch's limit of recompilations
        one_shape = static and (len(inputs.lengths) == 1 or not case.takes_offsets)
        # The next bag would overwrite this one's results: they lie in the buffers of a CUDA graph.
        chosen = f"{mode}-no-cudagraphs" if mode and not one_shape else mode
        one_bag = torch.compile(case.one_bag, dynamic=not one_shape, mode=chosen)
        return lambda i: case.eager(i, one_bag), inputs

    return prepare


def ours(backend: str) -> Prepare:
    def prepare(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
        def compute(i: Inputs):
            try:
                return case.call(i, backend)
            except RuntimeError as error:
                if not str(error).startswith("backend "):  # a backend that was asked for and cannot; the rest are bugs
                    raise
                raise Unavailable(str(error)) from error

        if not inputs.x.is_cuda:  # where kernels would be compiled for one row
            with torch.no_grad():
                compute(case.prefix(inputs, 1))
        return compute, inputs

    return prepare


def installed(package: str) -> str:
    """Its version, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _peer(
    name: str, prepare: Prepare, refuses: Callable[[OpCase, Inputs], str], about: str, package: str = "", **more
) -> Contender:
    """Somebody else's code: of a package, or of PyTorch alone."""

    def checked(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
        if refusal := refuses(case, inputs):
            raise Unavailable(refusal)
        try:
            return prepare(case, inputs, static)
        except ImportError as error:
            raise Unavailable(f"{package or 'PyTorch'}: {error}") from error

    def version() -> str:
        return installed(package) if package else f"torch {torch.__version__.partition('+')[0]}"

    more |= {"about": about, "package": package, "refuses": refuses}
    return Contender(name, checked, version=version, peer=True, **more)


# Other formulas of an op: contender -> what they use
ALTERNATIVES = {f"eager-{formula}": formula for case in CASES.values() for formula in case.alternatives}
YARDSTICKS = ("eager", *ALTERNATIVES, "compile")  # what a result is divided by

_PEERS = (
    _peer(
        *("padded", peers.padded, peers.refuses_padded),
        "PyTorch on a padded batch and its mask, made beforehand: the eager formula, softmax and torch.bmm",
        work=peers.padding,
    ),
    _peer(
        *("torchmil", peers.torchmil, peers.refuses_torchmil),
        "torchmil.nn.AttentionPool on a padded batch and its mask, made beforehand, with the same parameters",
        package="torchmil",
        work=peers.padding,
    ),
    _peer(
        *("pyg", peers.pyg, peers.refuses_pyg),
        "torch_geometric.nn.AttentionalAggregation with the attention network as its gate, index made beforehand",
        package="torch_geometric",
    ),
    _peer(
        *("pyg-segment", peers.pyg_segment, peers.refuses_segments),
        "softmax(ptr=...) and segment(...) of torch_geometric.utils, on all bags at once",
        package="torch_geometric",
    ),
    _peer(
        *("segment-reduce", peers.segment_reduce, peers.refuses_segments),
        "torch.segment_reduce(offsets=...) for maxima, sums and pooling, on all bags at once",
    ),
    _peer(
        *("jagged", peers.jagged, peers.refuses_jagged),
        "torch.nested, jagged layout: exp of the scores, and products over the ragged dimension",
    ),
    _peer(
        *("accumulate", peers.accumulate, peers.refuses_accumulate),
        f"the eager formula with scores in slices of {peers.SLICE} instances under torch.utils.checkpoint",
        loops=True,
    ),
)
_COMPILED = {
    "compile": "torch.compile, default mode, of the eager formula: of one shape, or dynamic for several bags",
    "compile-max-autotune": 'torch.compile(mode="max-autotune") of the eager formula; no CUDA graphs for several bags',
}

REGISTRY: dict[str, Contender] = {
    c.name: c
    for c in (
        Contender("eager", _eager, loops=True, about="the formula as published code has it, one bag after another"),
        *(
            Contender(
                *(name, _alternative(formula), f"eager, {formula}"),
                loops=True,
                peer=True,
                about=f"eager with another formula of the same op: {formula}",
            )
            for name, formula in ALTERNATIVES.items()
        ),
        Contender("compile", _compile(None), loops=True, about=_COMPILED["compile"]),
        Contender(
            *("compile-max-autotune", _compile("max-autotune")), loops=True, about=_COMPILED["compile-max-autotune"]
        ),
        *_PEERS,
        Contender("native", ours("native"), ours=True, about="milkernels, the C++ kernels"),
        Contender("triton", ours("triton"), ours=True, about="milkernels, the Triton kernels"),
        Contender(
            "reference", ours("reference"), ours=True, about="milkernels in PyTorch only, with no loop over bags"
        ),
    )
}


def packages() -> tuple[str, ...]:
    """Those that peers need, whose versions therefore matter."""
    return tuple(dict.fromkeys(c.package for c in REGISTRY.values() if c.package))


def default_contenders(case: OpCase, inputs: Inputs) -> list[str]:
    """Eager in all formulas, torch.compile, and the peers that are there and serve this call; on one bag, where the
    others have nothing to tell, only the one that saves memory."""
    names = ["eager", *(name for name, formula in ALTERNATIVES.items() if formula in case.alternatives), "compile"]
    usual = [peer for peer in _PEERS if len(inputs.lengths) > 1 or peer.name == "accumulate"]
    return names + [c.name for c in usual if (not c.package or installed(c.package)) and not c.refuses(case, inputs)]


def default_backends(case: OpCase, inputs: Inputs) -> list[str]:
    """The backend that serves the op here, by its own name."""
    for name in ("native", "triton"):
        try:
            ours(name)(case, inputs, True)
        except Unavailable:
            continue
        return [name]
    return ["reference"]


def warmed_up(contender: Contender, case: OpCase, inputs: Inputs, mode: str, *, whole: bool) -> tuple[Compute, Inputs]:
    """What to time, after one run on all instances, or on a prefix where one run is all there is time for."""
    # What is compiled for a prefix may be compiled again for all instances, and that would be timed.
    whole = whole or contender.name in _COMPILED or len(inputs.x) <= PREFIX
    part = inputs if whole else case.prefix(inputs, PREFIX)
    compute, its_inputs = contender.prepare(case, part, part is inputs)
    evaluate(compute, its_inputs, mode, case.primary)
    if part is inputs:
        return compute, its_inputs
    return contender.prepare(case, inputs, False)
