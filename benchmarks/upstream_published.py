"""Models of checkouts, built as their authors build them: where each lies in its folder, its sizes, what it takes.

Packages that they import and that are not here are stood in for.  Nothing of these projects is kept here.
"""

import contextlib
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Published(NamedTuple):
    """A model, how it is built and what it is called with."""

    project: str  # the name of the folder
    module: str  # dotted, from the folder
    name: str  # of the class
    build: Callable[[type], nn.Module]
    shape: tuple[int, ...] = (1, 0, 1024)  # of a bag; 0: instances
    call: Callable[[Tensor], tuple | dict] = lambda x: (x,)
    example: bool = False  # whether accelerate is given the call
    timed: bool = False  # by ``benchmarks.upstream``, and not just compared


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


PUBLISHED = (
    Published(_MODULES, "modules.AB_MIL.ab_mil", "AB_MIL", of_sizes(**_IN, dropout=0.25), timed=True),
    Published(_MODULES, "modules.GATE_AB_MIL.gate_ab_mil", "GATE_AB_MIL", of_sizes(**_IN, dropout=0.25), timed=True),
    Published(_MODULES, "modules.AEM_MIL.aem_mil", "AEM_MIL", of_sizes(**_IN)),
    Published(_MODULES, "modules.CLAM_SB_MIL.clam_sb_mil", "CLAM_SB_MIL", of_sizes(**_IN)),
    Published(_MODULES, "modules.CLAM_MB_MIL.clam_mb_mil", "CLAM_MB_MIL", of_sizes()),
    Published(_MODULES, "modules.IB_MIL.ib_mil", "IB_MIL", of_sizes(**_IN)),
    Published(_MODULES, "modules.DG_MIL.dg_mil", "DG_MIL", of_sizes(**_IN)),
    Published(_MODULES, "modules.RANKMIX_MIL.rankmix_mil", "RANKMIX_MIL", of_sizes(**_IN)),
    Published("ACMIL", "architecture.transformer", "ABMIL", with_settings()),
    Published("ACMIL", "architecture.transformer", "ACMIL_GA", with_settings(n_token=5)),
    Published("ACMIL", "architecture.ibmil", "IBMIL", with_settings()),
    Published("ACMIL", "architecture.attmil", "AttentionGated", of_sizes(input_dim=1024)),
    Published("AEM", "architecture.transformer", "ABMIL", with_settings()),
    Published("RRT-MIL", "modules.attmil", "DAttention",
          of_sizes(input_dim=1024, n_classes=2, dropout=0.25, act="relu")),
    Published("RRT-MIL", "modules.attmil", "AttentionGated", of_sizes(input_dim=512)),
    Published("RRT-MIL", "modules.datten", "DAttention", of_sizes(input_dim=1024)),
    Published("WSI-finetuning", "models.ABMIL", "ABMIL", of_sizes(input_size=1024), BAG),
    Published("WSI-finetuning", "models.model_clam", "CLAM_MB", of_sizes(n_classes=2), BAG),
    Published("nnMIL", "network_architecture.models.ab_mil", "AB_MIL", of_sizes(**_IN)),
    Published("marugoto", "marugoto.mil.model", "MILModel", of_sizes(n_feats=1024, n_out=2), (4, 0, 1024),
          lambda x: (x, torch.full((len(x),), x.shape[1]))),
    Published("HECTOR", "im4MEC", "Im4MEC", of_sizes(), BAG),
    Published("HECTOR", "model", "HECTOR", of_sizes(), BAG, lambda x: (x, torch.tensor([2]), torch.tensor([1])),
          example=True, timed=True),
    Published("MCAT", "models.model_set_mil", "MIL_Attention_FC_surv", of_sizes(), BAG, survival("x_path"),
          example=True, timed=True),
    Published("MCAT", "models.model_set_mil", "MIL_Attention_FC_surv",
          of_sizes(omic_input_dim=80, fusion="concat"), BAG, survival("x_path", 80), example=True),
    Published("PORPOISE", "models.model_porpoise", "PorpoiseAMIL", of_sizes(), BAG, survival("x_path"),
          example=True, timed=True),
    Published("SurvPath", "models.model_DeepMISL", "MIL_Attention_FC_surv", of_sizes(), BAG, survival("x_path"),
          example=True, timed=True),
    Published("MIREL", "model.evmil", "ABMIL", of_sizes(pooling="attention", **_PROJECTED)),
    Published("MIREL", "model.evmil", "ABMIL", of_sizes(pooling="gated_attention", **_PROJECTED)),
    Published("HistoSSLscaling", "rl_benchmarks.models.slide_models.abmil", "ABMIL",
          of_sizes(in_features=1024, tiles_mlp_hidden=[512], mlp_hidden=[64], metadata_cols=0), (2, 0, 1024)),
    Published("CLAM", "models.model_clam", "CLAM_SB", of_sizes(), BAG),
    Published("CLAM", "models.model_clam", "CLAM_MB", of_sizes(), BAG),
    Published("DTFD-MIL", "Model.Attention", "Attention_with_Classifier", of_sizes(L=1024), BAG),
    Published("MADELEINE", "madeleine.models.Model", "ABMILEmbedder", of_heads(1), (2, 0, 512)),
    Published("MADELEINE", "madeleine.models.Model", "ABMILEmbedder", of_heads(4), (2, 0, 512)),
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


def built(model: Published, folder: str) -> nn.Module:
    with _importing(folder):
        cls = getattr(importlib.import_module(model.module), model.name)
        torch.manual_seed(0)
        return model.build(cls).eval()
