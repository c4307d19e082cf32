"""What is measured, in a form that another process can be told."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from milkernels.testing import CASES, FEATURES, Inputs, OpCase, Shape

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def fast_dtypes() -> list[str]:
    """Without the instructions for it one bfloat16 step of eager takes half a minute: not by default."""
    mkldnn = torch.ops.mkldnn
    fast = torch.backends.mkldnn.is_available() and mkldnn._is_mkldnn_bf16_supported()
    return ["float32", "bfloat16"] if fast else ["float32"]


@dataclass(frozen=True)
class Workload:
    """One op on one shape.  ``features`` is a distribution of the registry or an .npz file."""

    op: str
    shape: Shape
    features: str = "relu"
    padded: bool = False
    dropout: float = 0.0
    seed: int = 0
    device: str = "cpu"
    precision: str = "highest"  # of float32 products, by PyTorch's own switch
    autocast: bool = False  # of them, to bfloat16

    @property
    def case(self) -> OpCase:
        return CASES[self.op]

    def describe(self, dtype: str) -> str:
        s = self.shape
        lengths = f"{s.instances}" if s.bags == 1 else f"{s.bags} of {min(s.lengths)}-{max(s.lengths)}"
        precision = "" if self.precision == "highest" else f" precision {self.precision}"
        precision += " autocast" if self.autocast else ""
        embedded = f" E{self.case.inner(s).dim}" if self.case.embeds else ""
        hidden = f" D{s.hidden}" if self.case.hidden_flops(s) else ""
        return f"{self.op} {lengths} x {s.dim}{embedded}{hidden} K{s.heads} {dtype}{precision}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Within the block float32 products have the precision, or the type, of this workload."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        device = torch.device(self.device).type
        try:
            # Without its cache, which would spare all calls but the first what a training step pays.
            with torch.autocast(device, torch.bfloat16, enabled=self.autocast, cache_enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        values = json.loads(text)
        shape = values.pop("shape")
        return cls(shape=Shape(**{**shape, "lengths": tuple(shape["lengths"])}), **values)

    def __post_init__(self):
        if self.dropout and not self.case.dropout:
            raise ValueError(f"{self.op} has no dropout")

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """The same tensors in every process: seeded, or read from the file."""
        named = self.features in FEATURES
        features = self.features if named else load_features(self.features)[0].to(self.device)
        options = {self.case.dropout: self.dropout} if self.case.dropout else {}
        options["device"] = self.device
        if not self.padded:
            return self.case.inputs(self.shape, dtype, features, self.seed, **options)
        lengths = torch.tensor(self.shape.lengths)
        mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).flatten().to(self.device)  # [B * M], real rows
        if isinstance(features, Tensor):
            rows = features.new_zeros(len(mask), features.shape[1])
            rows[mask] = features
            features = rows
        return self.case.inputs(self.shape.padded(), dtype, features, self.seed, mask=mask, **options)


def load_features(path: str) -> tuple[Tensor, tuple[int, ...]]:
    """Standardised columns of ``features [N, L]``, and the bag lengths that ``offsets [B + 1]`` gives."""
    import numpy as np

    with np.load(Path(path)) as data:
        missing = {"features", "offsets"} - set(data)
        if missing:
            raise ValueError(f"{path} has no {' and no '.join(sorted(missing))}; it has {', '.join(data)}")
        features, offsets = torch.from_numpy(data["features"]).double(), data["offsets"].tolist()
    if features.dim() != 2 or offsets[0] != 0 or offsets[-1] != len(features) or offsets != sorted(offsets):
        raise ValueError(f"{path}: offsets do not cut features of shape {tuple(features.shape)} into bags")
    deviation = features.std(dim=0, correction=0)
    # Constant columns exist (bag-of-words features that never occur); they become 0, not NaN.
    standardised = (features - features.mean(dim=0)) / torch.where(deviation > 0, deviation, 1.0)
    lengths = tuple(end - start for start, end in itertools.pairwise(offsets))
    if 0 in lengths:
        raise ValueError(f"{path}: bag {lengths.index(0)} is empty; eager has no answer for it to compare with")
    return standardised.float(), lengths
