"""How much of other models `milkernels.accelerate` fuses: ``python -m benchmarks.upstream --coverage DIR ...``.

Every DIR is a checkout, known by the name of its folder.  Each model in it that the table names is built as its authors
build it, and accelerated: what share is fused, whether outputs, all gradients and 20 training steps are what they were,
and the most bytes that a training step allocates, gradients included: before, after, and after where ops save nothing
that they can compute again.  Nothing of these projects is kept here.
"""

import contextlib
import copy
import importlib
import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import milkernels
from benchmarks.upstream_run import without_dropout
from milkernels._torch import pytree
from milkernels.bench import memory
from milkernels.integrations import Report

_ROWS, _FEW = 8_000, 300  # instances of the step whose memory is measured, and of those that are compared
_STEPS, _RATE = 20, 0.01  # of the training that is compared
_TOLERANCE = 1e-6  # of float64: some models have constants in float32


class Model(NamedTuple):
    """A model, how it is built and what it is called with."""

    project: str  # the name of the folder
    module: str  # dotted, from the folder or from ``root``
    name: str  # of the class
    build: Callable[[type], nn.Module]
    shape: tuple[int, ...] = (1, 0, 1024)  # of a bag; 0: instances
    call: Callable[[Tensor], tuple | dict] = lambda x: (x,)
    example: bool = False  # whether accelerate is given the call
    root: str = ""


def of_sizes(**sizes: Any) -> Callable[[type], nn.Module]:
    return lambda cls: cls(**sizes)


def with_settings(*args: Any, **options: Any) -> Callable[[type], nn.Module]:
    """Some take all sizes in one object."""
    settings = types.SimpleNamespace(D_feat=1024, D_inner=512, n_class=2, n_token=5, c_path="")
    return lambda cls: cls(settings, *args, **options)


def of_heads(heads: int) -> Callable[[type], nn.Module]:
    sizes = {"input_dim": 512, "hidden_dim": 512}
    attention = {"model": "ABMIL", "params": sizes | {"n_heads": heads, "dropout": True}}
    return lambda cls: cls(sizes, attention)


BAG = (0, 1024)
_IN, _MODULES = {"in_dim": 1024}, "MIL_BASELINE"
_PROJECTED = {"dim_hid": 512, "use_feat_proj": "default", "edl_evidence_func": None, "ins_pred_from": "bag"}


def survival(name: str, *omics: int) -> Callable[[Tensor], dict]:
    return lambda x: {name: x} | ({"x_omic": torch.linspace(-1, 1, omics[0]).to(x)} if omics else {})


def coattention(x: Tensor) -> dict:
    return {"x_path": x} | {f"x_omic{i + 1}": torch.linspace(-1, 1, 100 * (i + 1)).to(x) for i in range(6)}


MODELS = (
    Model(_MODULES, "modules.AB_MIL.ab_mil", "AB_MIL", of_sizes(**_IN, dropout=0.25)),
    Model(_MODULES, "modules.GATE_AB_MIL.gate_ab_mil", "GATE_AB_MIL", of_sizes(**_IN, dropout=0.25)),
    Model(_MODULES, "modules.AEM_MIL.aem_mil", "AEM_MIL", of_sizes(**_IN)),
    Model(_MODULES, "modules.CLAM_SB_MIL.clam_sb_mil", "CLAM_SB_MIL", of_sizes(**_IN)),
    Model(_MODULES, "modules.CLAM_MB_MIL.clam_mb_mil", "CLAM_MB_MIL", of_sizes()),
    Model(_MODULES, "modules.IB_MIL.ib_mil", "IB_MIL", of_sizes(**_IN)),
    Model(_MODULES, "modules.DG_MIL.dg_mil", "DG_MIL", of_sizes(**_IN)),
    Model(_MODULES, "modules.RANKMIX_MIL.rankmix_mil", "RANKMIX_MIL", of_sizes(**_IN)),
    Model("ACMIL", "architecture.transformer", "ABMIL", with_settings()),
    Model("ACMIL", "architecture.transformer", "ACMIL_GA", with_settings(n_token=5)),
    Model("ACMIL", "architecture.ibmil", "IBMIL", with_settings()),
    Model("ACMIL", "architecture.attmil", "AttentionGated", of_sizes(input_dim=1024)),
    Model("AEM", "architecture.transformer", "ABMIL", with_settings()),
    Model("RRT-MIL", "modules.attmil", "DAttention", of_sizes(input_dim=1024, n_classes=2, dropout=0.25, act="relu")),
    Model("RRT-MIL", "modules.attmil", "AttentionGated", of_sizes(input_dim=512)),
    Model("RRT-MIL", "modules.datten", "DAttention", of_sizes(input_dim=1024)),
    Model("WSI-finetuning", "models.ABMIL", "ABMIL", of_sizes(input_size=1024), BAG),
    Model("WSI-finetuning", "models.model_clam", "CLAM_MB", of_sizes(n_classes=2), BAG),
    Model("nnMIL", "network_architecture.models.ab_mil", "AB_MIL", of_sizes(**_IN)),
    Model("marugoto", "marugoto.mil.model", "MILModel", of_sizes(n_feats=1024, n_out=2), (4, 0, 1024),
          lambda x: (x, torch.full((len(x),), x.shape[1]))),
    Model("HECTOR", "im4MEC", "Im4MEC", of_sizes(), BAG),
    Model("HECTOR", "model", "HECTOR", of_sizes(), BAG, lambda x: (x, torch.tensor([2]), torch.tensor([1])), True),
    Model("MCAT", "models.model_set_mil", "MIL_Attention_FC_surv", of_sizes(), BAG, survival("x_path"), True),
    Model("MCAT", "models.model_set_mil", "MIL_Attention_FC_surv",
          of_sizes(omic_input_dim=80, fusion="concat"), BAG, survival("x_path", 80), True),
    Model("PORPOISE", "models.model_porpoise", "PorpoiseAMIL", of_sizes(), BAG, survival("x_path"), True),
    Model("SurvPath", "models.model_DeepMISL", "MIL_Attention_FC_surv", of_sizes(), BAG, survival("x_path"), True),
    Model("MIREL", "model.evmil", "ABMIL", of_sizes(pooling="attention", **_PROJECTED)),
    Model("MIREL", "model.evmil", "ABMIL", of_sizes(pooling="gated_attention", **_PROJECTED)),
    Model("HistoSSLscaling", "rl_benchmarks.models.slide_models.abmil", "ABMIL",
          of_sizes(in_features=1024, tiles_mlp_hidden=[512], mlp_hidden=[64], metadata_cols=0), (2, 0, 1024)),
    Model("CLAM", "models.model_clam", "CLAM_SB", of_sizes(), BAG),
    Model("CLAM", "models.model_clam", "CLAM_MB", of_sizes(), BAG),
    Model("DTFD-MIL", "Model.Attention", "Attention_with_Classifier", of_sizes(L=1024), BAG),
    Model("MADELEINE", "madeleine.models.Model", "ABMILEmbedder", of_heads(1), (2, 0, 512)),
    Model("MADELEINE", "madeleine.models.Model", "ABMILEmbedder", of_heads(4), (2, 0, 512)),
)  # fmt: skip


# Importing what needs packages that are not here


_SELDOM_HERE = """cv2 einops fastai h5py huggingface_hub lifelines loguru matplotlib nystrom_attention omegaconf
openslide PIL seaborn sklearn sksurv tensorboardX thop timm topk torch_geometric torchmetrics torchvision tqdm
transformers wandb"""


class _StandIns:
    """Finds packages that a checkout imports and that are not installed: their classes are empty modules."""

    def __init__(self, root: str):
        self._root = Path(root)

    def find_spec(self, name: str, path: object = None, target: object = None):
        top = name.partition(".")[0]
        own = (self._root / top).exists() or (self._root / f"{top}.py").exists()
        return importlib.machinery.ModuleSpec(name, self) if top in _SELDOM_HERE.split() and not own else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


@contextlib.contextmanager
def _importing(folder: str) -> Iterator[None]:
    """Within the block imports look into the folder first; what came from there is forgotten afterwards."""
    modules, path, written = dict(sys.modules), list(sys.path), sys.dont_write_bytecode
    finder = _StandIns(folder)
    sys.path.insert(0, folder)
    if (Path(folder) / "__init__.py").exists():  # it is a package, which may import itself
        sys.path.append(str(Path(folder).parent))
    sys.meta_path.append(finder)
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, written
        sys.meta_path.remove(finder)
        importlib.invalidate_caches()
        for name in set(sys.modules) - set(modules):
            if isinstance(sys.modules[name], _StandIn) or _is_of(name, folder):
                del sys.modules[name]


def _is_of(name: str, folder: str) -> bool:
    top = Path(folder) / name.partition(".")[0]
    return top.exists() or top.with_suffix(".py").exists() or top.name == Path(folder).name


def _built(model: Model, folder: str) -> nn.Module:
    with _importing(folder):
        cls = getattr(importlib.import_module(model.module), model.name)
        torch.manual_seed(0)
        return model.build(cls).eval()


# One row


class Row(NamedTuple):
    model: str
    share: str  # what is fused, or why nothing could be tried
    equal: str
    before: float = 0.0  # MiB of a training step
    after: float = 0.0
    least: float = 0.0  # with nothing saved


def _bag(model: Model, rows: int, dtype: torch.dtype) -> Tensor:
    shape = [size or rows for size in model.shape]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu().to(dtype)


def _run(model: Model, module: nn.Module, x: Tensor) -> list[Tensor]:
    given = model.call(x)
    out = module(**given) if isinstance(given, dict) else module(*given)
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def _step(model: Model, module: nn.Module, x: Tensor) -> list[Tensor]:
    """A loss of every output, and the gradients of all parameters."""
    outputs = _run(model, module, x)
    loss = sum(t.square().mean() for t in outputs if t.requires_grad)
    gradients = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return [*outputs, *(g for g in gradients if g is not None)]


def _train(model: Model, module: nn.Module, x: Tensor) -> list[Tensor]:
    """How far 20 training steps take each parameter."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, _RATE, momentum=0.9)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        sum(t.square().mean() for t in _run(model, module, x) if t.requires_grad).backward()
        optimizer.step()
    return [p.detach() - s for p, s in zip(parameters, start, strict=True)]


def _differ(model: Model, before: nn.Module, after: nn.Module) -> float:
    """The largest relative difference of an output, a gradient, or a parameter's way in training, without dropout."""
    worst, x = 0.0, _bag(model, _FEW, torch.float64)
    for training, run in ((False, _step), (True, _step), (True, _train)):
        found = []
        for module in (before, after):
            wide = copy.deepcopy(module).double().train(training)
            torch.manual_seed(0)
            found.append([t.detach() for t in run(model, wide, x)])
        if len(found[0]) != len(found[1]):
            return math.inf
        for a, b in zip(*found, strict=True):
            size, distance = float(a.norm()), float((a - b).norm())
            relative = distance / size if size > 1e-9 else distance
            worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def _share(report: Report) -> str:
    """Of the module that has the largest."""
    shares = [entry.share for entry in report.changed]
    return max(shares, key=len, default="nothing")


def measured(model: Model, folder: str) -> Row:
    name = f"{model.project}: {model.name}"
    try:
        before = _built(model, folder)
        x = _bag(model, _FEW, torch.float32)
        _run(model, before, x)
    except Exception as error:  # of theirs: a package is not here, say
        return Row(name, f"not built: {type(error).__name__}: {str(error)[:60]}", "")
    after = copy.deepcopy(before)
    report = milkernels.accelerate(after, example=model.call(x) if model.example else None)
    share = _share(report)
    with contextlib.ExitStack() as stack:
        for module in (before, after):
            stack.enter_context(without_dropout(module))
        exact = copy.deepcopy(before)
        milkernels.accelerate(exact, example=model.call(x) if model.example else None, min_instances=0)
        worst = _differ(model, before, exact)
    x = _bag(model, _ROWS // (model.shape[0] or 1), torch.float32)
    peaks = [memory.allocator_peak(lambda m=m: _step(model, m, x)) for m in (before.train(), after.train())]
    with milkernels.saved_bytes(0):
        peaks.append(memory.allocator_peak(lambda: _step(model, after, x)))
    return Row(name, share, "yes" if worst <= _TOLERANCE else f"no: {worst:.1e}", *(p / 2**20 for p in peaks))


def show(folders: Sequence[str], console: Console) -> int:
    """Prints the table; 1 where a result differs or nothing was found in the folders."""
    at_hand = {Path(folder).resolve().name.lower(): str(Path(folder).resolve()) for folder in folders}
    chosen = [model for model in MODELS if model.project.lower() in at_hand]
    rows = []
    console.print(_line("model", "fused", "equal", "MiB before", "after", "nothing saved"), highlight=False)
    for model in chosen:
        row = measured(model, at_hand[model.project.lower()])
        rows.append(row)
        shares = [f"{peak:.0f} ({peak / row.before:.2f})" for peak in (row.after, row.least) if row.before]
        sizes = [f"{row.before:.0f}", *shares] if row.before else []
        console.print(_line(row.model, row.share, row.equal, *sizes), highlight=False, markup=False)
    whole = sum(row.share.startswith("scores + softmax + sum") for row in rows)
    console.print(f"{whole} of {len(rows)} models have the whole pooling fused", highlight=False)
    return int(not rows or any(row.equal.startswith("no") for row in rows))


def _line(*cells: str) -> str:
    """Rows are printed as they come in, so widths are fixed."""
    return " ".join(cell.ljust(width) for cell, width in zip(cells, (40, 40, 12, 10, 10, 13), strict=False)).rstrip()
