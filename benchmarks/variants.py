"""Triton with other kernels and workspaces than it takes by itself: contenders of the GPU grid.

Importing this adds them to those of `milkernels.bench`.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from milkernels import saved_bytes
from milkernels.bench.contenders import PREFIX, REGISTRY, Contender, ours
from milkernels.bench.peers import Prepared, Unavailable
from milkernels.testing import Inputs, OpCase


@contextlib.contextmanager
def _kernels(**chosen: str) -> Iterator[None]:
    """Those that Triton takes by itself, but for the chosen ones. The fused ones serve rows that are not kept."""
    from milkernels.triton import tuning

    keeping = saved_bytes(0) if "scores" in chosen else contextlib.nullcontext()
    with mock.patch.object(tuning, "_forced", {}), tuning.use(**chosen), keeping:
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
    from milkernels.triton import host

    names: Counter[str] = Counter()

    def counting(kernel, *rest, launch=host._run):
        names[kernel.__name__] += 1
        launch(kernel, *rest)

    with mock.patch.object(host, "_run", counting):
        run()
    return names


def _with_kernels(chosen: dict[str, str]) -> Contender:
    """Triton with other kernels than it takes by itself; none where they cannot serve the call."""
    name = next(iter(chosen.values()))

    def prepare(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
        compute, _ = ours("triton")(case, inputs, static)
        few = case.prefix(inputs, PREFIX)
        with torch.no_grad():
            forced = launched(lambda: compute(few))
            with _kernels():
                usual = launched(lambda: compute(few))
        if forced == usual:
            raise Unavailable(f"the kernels are those of triton: {', '.join(sorted(usual))}")
        return compute, inputs

    about = f"milkernels, Triton with the {name} kernels where it would take others"
    title = f"triton, {name}"
    return Contender(name, prepare, title=title, ours=True, within=lambda: _kernels(**chosen), about=about)


def _with_workspace(megabytes: int) -> Contender:
    name = f"workspace-{megabytes}"
    within = functools.partial(_workspace, megabytes)
    about = f"milkernels, Triton with slices of rows whose workspace is {megabytes} MB"
    return Contender(name, ours("triton"), title=f"triton, {name} MB", ours=True, within=within, about=about)


ALL = (
    *(_with_kernels(chosen) for chosen in ({"scores": "chunked"}, {"scores": "fused"}, {"products": "split"})),
    *(_with_workspace(megabytes) for megabytes in (32, 64, 128, 256, 512)),
)
REGISTRY.update({contender.name: contender for contender in ALL})
