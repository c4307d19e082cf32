"""Programs that leave: traces, and models for ONNX by both exporters.  They hold PyTorch's own operators only, and are
right for other numbers of instances and bags than those they were made with."""

import copy
import inspect
import logging
import warnings

import pytest
import torch
import upstream_models
from op_cases import CASES, PLAIN, needs_extension, offsets_of
from torch import Tensor, nn

import milkernels

VARIANTS = ("query_pool-shared", "dsmil_pool-relu-v", "dsmil_pool-mlp-q", "dsmil_pool-embed", "topk_instances-ties")
DROPPED = ("gated_attention_pool-dropout", "gated_attention_pool-embed-dropout", "dsmil_pool-relu-v-dropout")
# How many instances the bags have, in the example and afterwards: one bag without offsets, or some, also empty ones.
LAYOUTS = {"bags": ((4, 0, 3), (5, 2, 0, 9)), "one-bag": ((5,), (11,))}
MADE_BY_EXPORTERS = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
pytestmark = MADE_BY_EXPORTERS


class Call(nn.Module):
    """A case as a module of tensors alone: offsets and mask, where it has them, and the others."""

    def __init__(self, case, ragged: bool, backend: str | None = None):
        super().__init__()
        self.case, self.ragged, self.backend = case, ragged, backend
        self.names = [*case.tensors, *case.fixed]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = list(tensors)
        offsets, mask = (rest.pop(0), rest.pop(0)) if self.ragged else (None, None)
        return tuple(self.case.ours(self.backend)(dict(zip(self.names, rest, strict=True)), offsets, mask))

    def example(self, lengths) -> tuple[Tensor, ...]:
        tensors = tuple(t.detach() for t in self.case.make(lengths, torch.float32).values())
        if not self.ragged:
            return tensors
        return offsets_of(lengths), torch.arange(sum(lengths)) % 4 > 0, *tensors

    def dynamic(self) -> list[dict[int, str]]:
        """The dimensions that change, of each tensor."""
        sizes = (self.case.tensors | self.case.fixed).values()
        own = [
            {0: "rows"} if size[0] == "N" else {0: "bags"} if size[0] == "B" and self.ragged else {} for size in sizes
        ]
        return [{0: "bounds"}, {0: "rows"}, *own] if self.ragged else own


def same(got, expected) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-4, atol=1e-5)


# torch.jit.trace


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*PLAIN, *VARIANTS, *DROPPED])
def test_trace(name, layout):
    example, other = LAYOUTS[layout]
    call = Call(CASES[name], layout == "bags")
    traced = torch.jit.trace(call, call.example(example), check_trace=False)
    assert "milkernels" not in str(traced.inlined_graph).replace("/milkernels/", "")
    for lengths in (other, (6,)):  # one bag as well, where offsets say so
        inputs = call.example(lengths) if layout == "bags" or len(lengths) == 1 else call.example((sum(lengths),))
        if layout == "bags" and len(lengths) == 1:
            inputs = (torch.tensor([0, 6]), *inputs[1:])
        same(traced(*inputs), Call(call.case, call.ragged, "reference")(*inputs))


@needs_extension
def test_trace_of_a_backend_asked_for_by_name():
    """The tracer knows no lists of tensors that may be absent."""
    call = Call(CASES["gated_attention_pool"], True, "native")
    with pytest.raises(RuntimeError, match='trace with backend="reference"'):
        torch.jit.trace(call, call.example((4, 0, 3)), check_trace=False)


class Logits(nn.Module):
    def __init__(self, model: nn.Module, pick=lambda out: out.logits):
        super().__init__()
        self.model, self.pick = model, pick

    # Not *args: what PyTorch 2.9 exports of a forward with dynamic shapes asks for them by another name than it has.
    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.pick(self.model(x) if offsets is None else self.model(x, offsets))


def accelerated() -> tuple[nn.Module, nn.Module]:
    """A model of others, and itself as it was."""
    model = upstream_models.MILNet(upstream_models.FCLayer(16, 2), upstream_models.BClassifier(16, 2, units=8)).eval()
    own = copy.deepcopy(model)
    assert milkernels.accelerate(model, min_instances=0).changed
    return Logits(model, lambda out: out[1]), Logits(own, lambda out: out[1])


def test_trace_of_an_accelerated_model():
    model, own = accelerated()
    traced = torch.jit.trace(model, (torch.randn(20, 16),), check_trace=False)
    x = torch.randn(33, 16)
    same([traced(x)], [own(x)])


# ONNX


@pytest.fixture
def onnx_file(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    logging.disable(logging.WARNING)
    yield str(tmp_path / "model.onnx")
    logging.disable(logging.NOTSET)


def export(module: nn.Module, args: tuple, file: str, axes: list[dict[int, str]], dynamo: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = tuple({d: torch.export.Dim.DYNAMIC for d in dims} or None for dims in axes)
            takes = inspect.signature(module.forward).parameters.values()
            shapes = (shapes,) if any(p.kind is p.VAR_POSITIONAL for p in takes) else shapes
            torch.onnx.export(module, args, file, dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            names = [f"input{i}" for i in range(len(args))]
            dynamic = {name: dims for name, dims in zip(names, axes, strict=True) if dims}
            options = {"input_names": names, "dynamic_axes": dynamic, "opset_version": 18}
            torch.onnx.export(module, args, file, dynamo=False, **options)


def run(file: str, args: tuple) -> list:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    inputs = session.get_inputs()
    assert len(inputs) == len(args)
    return session.run(None, {i.name: a.numpy() for i, a in zip(inputs, args, strict=True)})


def check_onnx(name: str, layout: str, file: str, dynamo: bool) -> None:
    example, other = LAYOUTS[layout]
    call = Call(CASES[name], layout == "bags").eval()
    export(call, call.example(example), file, call.dynamic(), dynamo)
    inputs = call.example(other)
    same(run(file, inputs), Call(call.case, call.ragged, "reference")(*inputs))


USED = [name for name in (*PLAIN, *VARIANTS) if name not in ("attention_weights", "gated_attention_scores")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", USED)  # not what has an input that it does not use, or drops units
def test_onnx_by_the_older_exporter(name, layout, onnx_file):
    if not CASES[name].bags and layout == "bags":
        pytest.skip("it takes no offsets, and an unused input is not exported")
    check_onnx(name, layout, onnx_file, dynamo=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated_attention_pool", "dsmil_pool-mlp-q", "max_pool", "topk_instances-ties"])
def test_onnx_by_the_newer_exporter(name, onnx_file):
    check_onnx(name, "bags", onnx_file, dynamo=True)


@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "newer"])
def test_onnx_of_a_module(dynamo, onnx_file):
    model, args = Logits(milkernels.nn.ABMIL(16, 2, 8, 4)).eval(), (torch.randn(50, 16), torch.tensor([0, 20, 50]))
    export(model, args, onnx_file, [{0: "rows"}, {0: "bounds"}], dynamo)
    args = (torch.randn(70, 16), torch.tensor([0, 5, 5, 70]))
    same(run(onnx_file, args), [model(*args)])


@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "newer"])
def test_onnx_of_an_accelerated_model(dynamo, onnx_file):
    model, own = accelerated()
    export(model, (torch.randn(50, 16),), onnx_file, [{0: "rows"}], dynamo)
    x = torch.randn(70, 16)
    same(run(onnx_file, (x,)), [own(x)])


@needs_extension
@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "newer"])
def test_onnx_of_a_backend_asked_for_by_name_is_refused(dynamo, onnx_file):
    call = Call(CASES["mean_pool"], True, "native").eval()
    with pytest.raises(RuntimeError, match='backend="reference"'):
        export(call, call.example((4, 0, 3)), onnx_file, call.dynamic(), dynamo)
