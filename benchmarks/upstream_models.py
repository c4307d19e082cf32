"""The models of other projects that ``benchmarks.upstream`` measures: where they come from, how they are called.

Nothing of these projects is kept here.  Their files are loaded from checkouts that the user names, or from installed
packages, as they are; what is written here is how to construct a model with the sizes its authors use, what it takes,
and the loss it is trained with.  A new model is one more entry of ``MODELS``, or of `upstream_published`.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import milkernels
from benchmarks.upstream_published import PUBLISHED, Published, built
from milkernels._torch import pytree
from milkernels.bench import report
from milkernels.testing import skewed_lengths

_IMAGE = (1, 28, 28)
_FEW = 300  # instances of an example
_IMAGES = 50  # instances per image: a convolutional network takes so much longer for each of them
_FACTORS = (1.0, 1.25, 1.5, 2.0, 4.0)  # by which an extreme instance may be made more so
_MARGIN = 0.5  # standard deviations of the scores that it should stand out by; much more would saturate a softmax


class Missing(Exception):
    """The folder or the installation does not hold what is expected of it."""


# Where models come from


@dataclass(frozen=True)
class Project:
    """An upstream project: its option on the command line, its name, and how it can be had."""

    option: str
    title: str
    package: str = ""  # what is imported where it may be an installed package
    checkout: bool = True


PROJECTS = {
    project.option: project
    for project in (
        Project("clam", "CLAM"),
        Project("attention-mil", "AttentionDeepMIL"),
        Project("dsmil", "dsmil-wsi"),
        Project("loss-attention", "Loss-Attention"),
        Project("torchmil", "torchmil", package="torchmil"),
        Project("mil-lab", "MIL-Lab"),
        Project("trident", "TRIDENT"),
        Project("slideflow", "slideflow"),
        Project("mil-baseline", "MIL_BASELINE"),
        Project("mcat", "MCAT"),
        Project("porpoise", "PORPOISE"),
        Project("survpath", "SurvPath"),
        Project("hector", "HECTOR"),
        Project("pyg", "PyTorch Geometric", package="torch_geometric", checkout=False),
    )
}


@dataclass(frozen=True)
class Source:
    """A project at hand: a checkout, or with an empty path the installed package."""

    project: Project
    path: str = ""  # absolute

    @property
    def version(self) -> str:
        """The commit of the checkout or the version of the package; "unknown" where there is no telling."""
        if self.path:
            return report.commit(Path(self.path).resolve()) or "unknown"
        try:
            return importlib.metadata.version(self.project.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def file(self, relative: str, packages: Sequence[str] = (), stand_ins: Mapping[str, ModuleType] | None = None):
        """The module in a file of the checkout, under a private name.

        ``packages`` are top-level packages of the checkout that it imports, ``stand_ins`` modules that it finds in the
        place of what is not needed.
        """
        file = Path(self.path) / relative
        if not file.is_file():
            raise Missing(f"{relative} is not in the folder given by --{self.project.option}")
        name = "_upstream_" + re.sub(r"\W", "_", f"{self.project.option}_{relative.removesuffix('.py')}")
        loaded = sys.modules.get(name)
        if loaded is not None and loaded.__file__ == str(file):
            return loaded
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        with _importing(self.path, packages, stand_ins or {}):
            sys.modules[name] = module  # dataclasses look their module up
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return module

    def module(self, name: str) -> ModuleType:
        """A module of the package, from the checkout if there is one."""
        package = self.project.package
        if not self.path:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != package:
                    raise
                raise Missing(f"{package} is not installed") from None
        file = f"{name.replace('.', '/')}/__init__.py"
        if not (Path(self.path) / file).is_file():
            raise Missing(f"{file} is not in the folder given by --{self.project.option}")
        with _importing(self.path, (package,), {}):
            return importlib.import_module(name)


@contextlib.contextmanager
def _importing(root: str, packages: Sequence[str], stand_ins: Mapping[str, ModuleType]) -> Iterator[None]:
    """Within the block imports look into ``root`` first, and leave no compiled files there."""
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        if not _lies_in(sys.modules[name], root):
            del sys.modules[name]  # of another checkout
    path, written = list(sys.path), sys.dont_write_bytecode
    replaced = {name: sys.modules.get(name) for name in stand_ins}
    sys.path.insert(0, root)
    sys.dont_write_bytecode = True
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, written
        for name, module in replaced.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _lies_in(module: ModuleType, root: str) -> bool:
    places = [*getattr(module, "__path__", []), getattr(module, "__file__", None) or ""]
    return any(Path(place).is_relative_to(root) for place in places if place)


def _slideflow() -> dict[str, ModuleType]:
    """What the file of slideflow's model imports of slideflow: a logger, and a function to move it to a GPU with."""
    names = ("slideflow", "slideflow.model", "slideflow.model.torch_utils")
    modules = {name: ModuleType(name) for name in names}
    modules["slideflow"].log = logging.getLogger("slideflow")
    modules["slideflow.model.torch_utils"].get_device = lambda: torch.device("cpu")
    return modules


# What models are given


@dataclass(frozen=True)
class Workload:
    """Bags by name: ``one`` bag, of features or of images, or several, padded to the longest or back to back."""

    name: str
    bags: int = 1
    images: bool = False
    padded: bool = False

    def lengths(self, instances: int) -> tuple[int, ...]:
        if self.bags > 1:
            return skewed_lengths(self.bags, instances)
        return (max(1, instances // _IMAGES) if self.images else instances,)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("bag"),
        Workload("images", images=True),
        Workload("batch", bags=32, padded=True),
        Workload("batch-of-8", bags=8, padded=True),
        Workload("ragged", bags=32),
    )
}


@dataclass(frozen=True)
class Data:
    """``x [B, M, ...]``, with ``mask [B, M]`` where bags are padded; ``[N, L]`` with ``index [N]`` back to back."""

    x: Tensor
    lengths: tuple[int, ...]
    labels: Tensor  # [B], 0 or 1
    mask: Tensor | None = None  # bool
    real: Tensor | None = None  # the mask as numbers of the type of x
    counts: Tensor | None = None  # the lengths
    index: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Data":
        real = None if self.real is None else self.real.to(dtype)
        return replace(self, x=self.x.to(dtype), real=real)

    def part(self, parts: int) -> "Data":
        """The first instances of the bags: at most one of ``parts`` equal parts of the longest one from each."""
        most = -(-max(self.lengths) // parts)
        lengths = tuple(min(length, most) for length in self.lengths)
        if self.index is not None:
            starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
            kept = torch.arange(len(self.x)) - starts[self.index] < most
            return replace(self, x=self.x[kept], index=self.index[kept], lengths=lengths)
        mask, real = (None if t is None else t[:, :most].contiguous() for t in (self.mask, self.real))
        x, counts = self.x[:, :most].contiguous(), self.counts.clamp(max=most)
        return replace(self, x=x, mask=mask, real=real, counts=counts, lengths=lengths)


def make_data(workload: Workload, instances: int, dim: int, seed: int = 0) -> Data:
    """Seeded features with a mean, as real ones have; padding is 0, as projects pad."""
    lengths = workload.lengths(instances)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(1, len(lengths) + 1) % 2
    shape = _IMAGE if workload.images else (dim,)
    x = torch.randn(sum(lengths), *shape, generator=generator).relu_()
    if workload.images:  # of different brightness: an untrained network takes noise alone for all the same
        x *= 2 * torch.rand(len(x), 1, 1, 1, generator=generator)
    counts = torch.tensor(lengths)
    if not workload.padded and len(lengths) > 1:
        return Data(x, lengths, labels, index=torch.repeat_interleave(torch.arange(len(lengths)), counts))
    if not workload.padded:
        return Data(x.unsqueeze(0), lengths, labels, counts=counts)
    mask = torch.arange(max(lengths)) < counts.unsqueeze(1)
    padded = x.new_zeros(*mask.shape, dim)
    padded[mask] = x
    return Data(padded, lengths, labels, mask, mask.to(x.dtype), counts)


@dataclass(frozen=True)
class Choice:
    """What a model that picks instances picks them by: ``scores(model, data) [B, M, C]``, the highest ``count`` of
    each column, and with ``lowest`` the lowest as well."""

    scores: Callable[[nn.Module, Data], Tensor]
    count: int = 1
    lowest: bool = False


@torch.no_grad()
def separate(choice: Choice, model: nn.Module, data: Data) -> None:
    """Makes what is picked stand out, in place: two good results may pick differently among near ties, and then differ.

    Each bag gets as many equal rows as are picked from it, which may be picked in any order: the extreme instance of
    all bags, scaled if it does not stand out, plus some of the bag's own extreme, so that no two bags are alike.
    """
    scores = choice.scores(model, data)
    ends = [(column, sign) for column in range(scores.shape[-1]) for sign in ((1, -1) if choice.lowest else (1,))]
    extremes = [_extremes(choice, model, data, scores, *end) for end in ends]
    for end, rows in enumerate(extremes):
        start = end * choice.count
        for bag, length in enumerate(data.lengths):
            if start + choice.count <= length:
                data.x[bag, start : start + choice.count] = rows[bag]


def _extremes(choice: Choice, model: nn.Module, data: Data, scores: Tensor, column: int, sign: int) -> Tensor:
    """For each bag a row ``[B, L]`` that is scored higher in the column, or with sign -1 lower, than its real ones."""
    real = torch.arange(scores.shape[1]) < data.counts.unsqueeze(1)
    inside = (sign * scores[..., column]).masked_fill(~real, -torch.inf)
    extreme = data.x.flatten(0, 1)[inside.argmax()]
    some = data.x[torch.arange(len(data.x)), inside.argmax(dim=1)] / 4
    rows = torch.stack([factor * extreme + some for factor in _FACTORS], dim=1)  # [B, factors, L]
    few = Data(rows.flatten(0, 1).unsqueeze(0), (len(rows) * len(_FACTORS),), data.labels[:1])
    reached = (sign * choice.scores(model, few)[0, :, column]).view(len(rows), -1)
    enough = reached >= inside.max() + _MARGIN * inside[real].std()
    chosen = torch.where(enough.any(dim=1), enough.int().argmax(dim=1), reached.argmax(dim=1))  # the first, or the best
    return rows[torch.arange(len(rows)), chosen]


# The models


def accelerate(model: nn.Module, example: tuple | dict | None = None) -> tuple[bool, list[str]]:
    """Whether `milkernels.accelerate` changed anything in the model, and the lines of its report."""
    done = milkernels.accelerate(model, example=example)
    lines = [f"changed: {entry}" for entry in done.changed]
    return bool(done.changed), lines + [f"left alone: {entry}" for entry in done.left]


@dataclass(frozen=True)
class Model:
    """``build(source)`` gives the model; ``forward`` and ``loss`` call it on ``Data``, as its authors do."""

    project: str
    name: str
    build: Callable[[Source], nn.Module]
    forward: Callable[[nn.Module, Data], Any]
    loss: Callable[[nn.Module, Data], Tensor]
    dim: int = 512
    workloads: tuple[str, ...] = ("bag",)
    choice: Choice | None = None
    accelerate: Callable[[nn.Module], tuple[bool, list[str]]] = accelerate

    @property
    def key(self) -> str:
        return f"{self.project} {self.name}"


class GivenEmbeddings(nn.Module):
    """CLAM behind its embedding: its own attention network, softmax over the bag, weighted sum, its own classifier."""

    def __init__(self, clam: nn.Module):
        super().__init__()
        self.attention, self.classifiers = clam.attention_net[-1], clam.classifiers
        self.fused = False

    def forward(self, h: Tensor) -> Tensor:
        if not self.fused:
            scores, h = self.attention(h)
            return self.classifiers(torch.softmax(scores, dim=0).T @ h)
        (v, *_), (u, *dropout), w = self.attention.attention_a, self.attention.attention_b, self.attention.attention_c
        p = sum(layer.p for layer in dropout if isinstance(layer, nn.Dropout)) if self.training else 0.0
        pooled = milkernels.gated_attention_pool(h, v, u, w, dropout_p=p)
        return self.classifiers(pooled.bag[0])

    def fuse(self) -> tuple[bool, list[str]]:
        self.fused = True
        return True, ["changed: attention network, softmax and weighted sum as milkernels.gated_attention_pool"]


def _one(data: Data) -> Tensor:
    """The only bag, ``[N, ...]``."""
    return data.x[0]


def _clam_loss(model: nn.Module, data: Data) -> Tensor:
    logits, _, _, _, extra = model(_one(data), label=data.labels, instance_eval=True)
    return 0.7 * F.cross_entropy(logits, data.labels) + 0.3 * extra["instance_loss"]


_CLAM_CHOICE = Choice(lambda m, d: m(_one(d), attention_only=True).T.unsqueeze(0), count=8, lowest=True)


def _clam(name: str, cls: str, **sizes: Any) -> Model:
    return Model(
        "clam",
        name,
        lambda source: getattr(source.file("models/model_clam.py"), cls)(dropout=0.25, **sizes),
        forward=lambda m, d: m(_one(d)),
        loss=_clam_loss,
        dim=1024,
        choice=_CLAM_CHOICE,
    )


_CLAM = (
    _clam("CLAM_SB", "CLAM_SB"),
    _clam("CLAM_SB without gate", "CLAM_SB", gate=False),
    _clam("CLAM_MB", "CLAM_MB"),
    Model(
        "clam",
        "CLAM_SB, aggregation only",
        lambda source: GivenEmbeddings(source.file("models/model_clam.py").CLAM_SB(dropout=0.25)),
        forward=lambda m, d: m(_one(d)),
        loss=lambda m, d: F.cross_entropy(m(_one(d)), d.labels),
        accelerate=GivenEmbeddings.fuse,
    ),
)


def _attention_mil(cls: str) -> Model:
    return Model(
        "attention-mil",
        cls,
        lambda source: getattr(source.file("model.py"), cls)(),
        forward=lambda m, d: m(d.x),
        loss=lambda m, d: m.calculate_objective(d.x, d.labels)[0].sum(),
        workloads=("images",),
    )


def _dsmil_loss(model: nn.Module, data: Data) -> Tensor:
    instances, bag, _, _ = model(_one(data))
    target = F.one_hot(data.labels, 2).to(bag.dtype)
    both = (bag, instances.max(dim=0, keepdim=True).values)
    return 0.5 * sum(F.binary_cross_entropy_with_logits(logits, target) for logits in both)


def _dsmil(name: str, **options: bool) -> Model:
    def build(source: Source) -> nn.Module:
        theirs = source.file("dsmil.py")
        return theirs.MILNet(theirs.FCLayer(512, 2), theirs.BClassifier(512, 2, **options))

    return Model(
        "dsmil",
        name,
        build,
        forward=lambda m, d: m(_one(d)),
        loss=_dsmil_loss,
        choice=Choice(lambda m, d: m.i_classifier(_one(d))[1].unsqueeze(0)),
    )


def _given_scores(model: nn.Module, data: Data) -> tuple[Tensor, ...]:
    """DSMIL's bag classifier with two of the features for scores of the instances."""
    return model(_one(data), _one(data)[:, :2])


_DSMIL = (
    _dsmil("MILNet", nonlinear=True),
    _dsmil("MILNet, linear q", nonlinear=False),
    _dsmil("MILNet, passing v", nonlinear=True, passing_v=True),
    Model(
        "dsmil",
        "MILNet, aggregation only",
        lambda source: source.file("dsmil.py").BClassifier(512, 2),
        forward=_given_scores,
        loss=lambda m, d: F.binary_cross_entropy_with_logits(
            _given_scores(m, d)[0], F.one_hot(d.labels, 2).to(d.x.dtype)
        ),
        choice=Choice(lambda m, d: d.x[..., :2]),
    ),
)


def _loss_attention_loss(model: nn.Module, data: Data) -> Tensor:
    bag, instances, weights = model(data.x)
    each = F.cross_entropy(instances, data.labels.expand(len(instances)), reduction="none")
    return F.cross_entropy(bag, data.labels) + 2.0 * (weights * each).mean()


_LOSS_ATTENTION = Model(
    "loss-attention",
    "CNN",
    lambda source: source.file("MIL/model.py").CNN(),
    forward=lambda m, d: m(d.x),
    loss=_loss_attention_loss,
    workloads=("images",),
)


def _torchmil(name: str, cls: str, choice: Choice | None = None, **options: Any) -> Model:
    return Model(
        "torchmil",
        name,
        lambda source: getattr(source.module("torchmil.models"), cls)(in_shape=(512,), **options),
        forward=lambda m, d: m(d.x, d.mask),
        loss=lambda m, d: sum(m.compute_loss(d.labels, d.x, d.mask)[1].values()),
        workloads=("bag", "batch", "batch-of-8"),
        choice=choice,
    )


_TORCHMIL = (
    _torchmil("ABMIL", "ABMIL"),
    _torchmil("ABMIL, gated", "ABMIL", gated=True),
    _torchmil("DSMIL", "DSMIL", Choice(lambda m, d: m(d.x, d.mask, return_inst_pred=True)[1].unsqueeze(-1))),
    _torchmil(
        "CLAM_SB",
        "CLAM_SB",
        Choice(lambda m, d: m(d.x, d.mask, return_att=True)[1].unsqueeze(-1), count=10, lowest=True),
        gated=True,
    ),
)


def _mil_lab(name: str, file: str, choice: Choice | None, workloads: tuple[str, ...], **options: Any) -> Model:
    def call(model: nn.Module, data: Data) -> tuple[dict, dict]:
        return model(data.x, label=data.labels, loss_fn=F.cross_entropy, attn_mask=data.real)

    return Model(
        "mil-lab",
        name,
        lambda source: getattr(source.file(f"src/models/{file}.py", packages=("src",)), name)(**options),
        forward=call,
        loss=lambda m, d: call(m, d)[0]["loss"],
        dim=1024,
        workloads=workloads,
        choice=choice,
    )


_MIL_LAB = (
    _mil_lab("ABMIL", "abmil", None, ("bag", "batch")),
    _mil_lab("DSMIL", "dsmil", Choice(lambda m, d: m.i_classifier(m.patch_embed(d.x))), ("bag", "batch")),
    _mil_lab(
        "CLAMSB",
        "clam",
        Choice(lambda m, d: m.forward_attention(d.x, attention_only=True).T.unsqueeze(0), count=8, lowest=True),
        ("bag",),
        instance_loss_fn="ce",
    ),
)


_TRIDENT_POOLING = "trident/slide_encoder_models/model_zoo/reusable_blocks/ABMIL.py"


def _trident(heads: int, workloads: tuple[str, ...]) -> Model:
    return Model(
        "trident",
        f"ABMIL, gated, heads: {heads}",
        lambda source: source.file(_TRIDENT_POOLING).ABMIL(n_heads=heads, gated=True),
        forward=lambda m, d: m(d.x, d.mask),
        loss=lambda m, d: m(d.x, d.mask)[0].sum(),
        dim=1024,
        workloads=workloads,
    )


def _trident_encoder(source: Source) -> nn.Module:
    """Without the rest of the package, which reads slides."""
    pooling, files = source.file(_TRIDENT_POOLING), ModuleType("trident.IO")
    files.get_weights_path = files.get_dir = None
    stand_ins = {"trident.IO": files, _TRIDENT_POOLING.removesuffix(".py").replace("/", "."): pooling}
    theirs = source.file("trident/slide_encoder_models/load.py", stand_ins=stand_ins)
    with _importing(source.path, (), stand_ins):  # its constructor imports as well
        return theirs.ABMILSlideEncoder(
            freeze=False, input_feature_dim=1024, n_heads=1, head_dim=512, dropout=0.0, gated=True
        )


_SLIDE_ENCODER = Model(
    "trident",
    "ABMILSlideEncoder",
    _trident_encoder,
    forward=lambda m, d: m({"features": d.x}, device="cpu"),
    loss=lambda m, d: m({"features": d.x}, device="cpu").sum(),
    dim=1024,
)


_SLIDEFLOW = Model(
    "slideflow",
    "Attention_MIL",
    lambda source: source.file("slideflow/mil/models/att_mil.py", stand_ins=_slideflow()).Attention_MIL(1024, 2),
    forward=lambda m, d: m(d.x, d.counts),
    loss=lambda m, d: F.cross_entropy(m(d.x, d.counts), d.labels),
    dim=1024,
    workloads=("batch",),  # its batch norm cannot be trained on one bag
)


def _pyg(source: Source) -> nn.Module:
    gate = nn.Sequential(nn.Linear(512, 128), nn.Tanh(), nn.Linear(128, 1))
    return source.module("torch_geometric.nn").AttentionalAggregation(gate)


_PYG = Model(
    "pyg",
    "AttentionalAggregation",
    _pyg,
    forward=lambda m, d: m(d.x, d.index),
    loss=lambda m, d: m(d.x, d.index).sum(),
    workloads=("ragged",),
)


def _published(project: Project, known: Published) -> Model:
    """A model of a checkout, with a loss of its first output: logits, or hazards."""
    batched = len(known.shape) == 3

    def forward(model: nn.Module, data: Data) -> Any:
        given = known.call(data.x if batched else _one(data))
        return model(**given) if isinstance(given, dict) else model(*given)

    def loss(model: nn.Module, data: Data) -> Tensor:
        outputs = pytree.tree_leaves(forward(model, data))
        return next(t for t in outputs if isinstance(t, Tensor) and t.requires_grad).square().mean()

    def fuse(model: nn.Module) -> tuple[bool, list[str]]:
        x = torch.ones([size or _FEW for size in known.shape]).to(next(model.parameters()))
        return accelerate(model, known.call(x) if known.example else None)

    return Model(
        project.option,
        known.name,
        lambda source: built(known, source.path),
        forward,
        loss,
        dim=known.shape[-1],
        accelerate=fuse,
    )


_PUBLISHED = [
    _published(project, known)
    for project in PROJECTS.values()
    for known in PUBLISHED
    if known.project == project.title and known.timed
]

MODELS = (
    *_CLAM,
    _attention_mil("Attention"),
    _attention_mil("GatedAttention"),
    *_DSMIL,
    _LOSS_ATTENTION,
    *_TORCHMIL,
    *_MIL_LAB,
    _trident(1, ("bag", "batch")),
    _trident(8, ("bag",)),  # eight heads of a padded batch take more memory than a workstation has
    _SLIDE_ENCODER,
    _SLIDEFLOW,
    _PYG,
    *_PUBLISHED,
)
