"""Fused kernels for multiple-instance learning in PyTorch: score, softmax and pool ragged bags."""

from importlib import metadata

from milkernels import nn as nn  # not in __all__: a star would put it over torch's
from milkernels import ops
from milkernels.backends import BackendUnavailable, use_backend
from milkernels.bags import Bags, collate_bags
from milkernels.distributed import all_critical, all_merge
from milkernels.encoding import encode_in_chunks
from milkernels.integrations import accelerate, restore
from milkernels.layers import Embed
from milkernels.merging import merge_pooled
from milkernels.ops import *
from milkernels.ops.dropout import seed_of_part
from milkernels.results import (
    CriticalInstances,
    DSMILOutput,
    DSMILPooled,
    InstanceMax,
    LossAttentionPooled,
    MaxPooled,
    Pooled,
    TopInstances,
)
from milkernels.saving import saved_bytes
from milkernels.visualize import BagAttention, attention_arrays, heatmap

try:
    __version__ = metadata.version("milkernels")
except metadata.PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    *ops.__all__,
    "BackendUnavailable",
    "BagAttention",
    "Bags",
    "CriticalInstances",
    "DSMILOutput",
    "DSMILPooled",
    "Embed",
    "InstanceMax",
    "LossAttentionPooled",
    "MaxPooled",
    "Pooled",
    "TopInstances",
    "accelerate",
    "all_critical",
    "all_merge",
    "attention_arrays",
    "collate_bags",
    "encode_in_chunks",
    "heatmap",
    "merge_pooled",
    "restore",
    "saved_bytes",
    "seed_of_part",
    "use_backend",
]
