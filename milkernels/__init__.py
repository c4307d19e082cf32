"""Fused kernels for multiple-instance learning in PyTorch: score, softmax and pool ragged bags."""

from importlib import metadata

from milkernels import nn as nn  # not in __all__: a star would put it over torch's
from milkernels.backends import BackendUnavailable, use_backend
from milkernels.bags import Bags, collate_bags
from milkernels.distributed import all_critical, all_merge
from milkernels.encoding import encode_in_chunks
from milkernels.integrations import accelerate, restore
from milkernels.layers import Embed
from milkernels.merging import merge_pooled
from milkernels.ops.attention import attention_pool, attention_scores, gated_attention_pool, gated_attention_scores
from milkernels.ops.classical import generalized_mean_pool, isr_pool, log_sum_exp_pool, noisy_or_pool
from milkernels.ops.dropout import seed_of_part
from milkernels.ops.dual_stream import dsmil, dsmil_pool, instance_max
from milkernels.ops.embedding import embed_instances
from milkernels.ops.loss_attention import loss_attention_pool
from milkernels.ops.pooling import max_pool, mean_pool, softmax_pool, weighted_pool
from milkernels.ops.query import query_pool, query_scores
from milkernels.ops.scores import attention_weights, segment_softmax, topk_instances
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

# By name, and not as those of ops: type checkers and editors read this list, and compute none.
__all__ = [
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
    "attention_pool",
    "attention_scores",
    "attention_weights",
    "collate_bags",
    "dsmil",
    "dsmil_pool",
    "embed_instances",
    "encode_in_chunks",
    "gated_attention_pool",
    "gated_attention_scores",
    "generalized_mean_pool",
    "heatmap",
    "instance_max",
    "isr_pool",
    "log_sum_exp_pool",
    "loss_attention_pool",
    "max_pool",
    "mean_pool",
    "merge_pooled",
    "noisy_or_pool",
    "query_pool",
    "query_scores",
    "restore",
    "saved_bytes",
    "seed_of_part",
    "segment_softmax",
    "softmax_pool",
    "topk_instances",
    "use_backend",
    "weighted_pool",
]
