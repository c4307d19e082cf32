"""What a type checker says of a program that uses the public names: `make lint` has mypy check it, strictly.

Nobody runs it.  ``assert_type`` fails where an annotation is missing, and so returns Any.
"""

from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type

import milkernels as mk
from milkernels import losses, nn

x, offsets, mask = torch.randn(7, 16), torch.tensor([0, 3, 7]), torch.ones(7)
scores, query, rows = torch.randn(7, 1), torch.randn(1, 16), torch.tensor([1])
v, u, w, c = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8), torch.nn.Linear(8, 1), torch.nn.Linear(16, 2)
embed = mk.Embed(torch.nn.Linear(16, 16), "relu", 0.25)
bags = mk.Bags(x, offsets)

# Ops
assert_type(mk.attention_pool(x, v, w, offsets, activation="relu", dropout_p=0.1, seed=3, embed=embed), mk.Pooled)
assert_type(mk.gated_attention_pool(bags, v, (u.weight, None), w.weight, backend="reference"), mk.Pooled)
assert_type(mk.attention_scores(x, v, w, mask=mask), Tensor)
assert_type(mk.gated_attention_scores(bags, v, u, w), Tensor)
assert_type(mk.softmax_pool(x, scores, offsets, mask=mask).bag, Tensor)
assert_type(mk.query_pool(bags, query, scale=0.5), mk.Pooled)
assert_type(mk.query_scores(x, query, offsets), Tensor)
assert_type(mk.weighted_pool(x, scores, offsets), Tensor)
assert_type(mk.mean_pool(bags), Tensor)
assert_type(mk.max_pool(bags), mk.MaxPooled)
assert_type(mk.instance_max(bags, c), mk.InstanceMax)
assert_type(mk.dsmil(bags, c, v, q2=(u.weight[:, :8], None), value=c), mk.DSMILOutput)
assert_type(mk.dsmil_pool(bags, scores, v), mk.DSMILPooled)
assert_type(mk.loss_attention_pool(bags, c), mk.LossAttentionPooled)
assert_type(mk.segment_softmax(scores, offsets), Tensor)
assert_type(mk.topk_instances(scores, 2, offsets, largest=False), mk.TopInstances)
assert_type(mk.embed_instances(x, embed, rows, seed=1), Tensor)
assert_type(mk.log_sum_exp_pool(x, offsets), Tensor)
assert_type(mk.noisy_or_pool(x, offsets), Tensor)
assert_type(mk.isr_pool(x, offsets), Tensor)
assert_type(mk.generalized_mean_pool(x, offsets, r=2.0), Tensor)
pooled = mk.gated_attention_pool(bags, v, u, w)
assert_type(mk.attention_weights(pooled, offsets), Tensor)
assert_type(mk.merge_pooled([pooled, pooled]).lse, Tensor)

# Bags
assert_type(mk.Bags.from_list([x], extras={"coords": [x]}), mk.Bags)
assert_type(mk.Bags.from_padded(x[None], lengths=[7]), mk.Bags)
assert_type(bags.to_list(), list[Tensor])
assert_type(bags.to_padded(), tuple[Tensor, Tensor])
assert_type(bags.to("cpu", torch.float16).pin_memory().num_instances, int)
assert_type(len(bags), int)

# Settings
with mk.use_backend("reference"), mk.saved_bytes("1GiB"):
    pass

# Models
report = mk.accelerate(torch.nn.Sequential(v), min_instances=0)
assert_type([str(entry) for entry in report.changed], list[str])
assert_type(mk.restore(torch.nn.Sequential(v)), list[str])
prediction: nn.Prediction = nn.ABMIL(16, 2, [32, 16], dropout=0.25)(bags)
assert_type(prediction.logits, Tensor)
assert_type(nn.AttentionPool(16, device="cpu", dtype=torch.float64).forward(x, offsets), mk.Pooled)
assert_type(nn.DSMILModel(16, 1).forward(bags), nn.DSMILPrediction)
assert_type(losses.dsmil_loss(nn.DSMILModel(16, 1).forward(bags), torch.ones(2)), Tensor)

# Pictures
one = mk.attention_arrays(pooled, bags)[0]
assert_type(one, mk.BagAttention)
mk.heatmap(one.coords, one.weights[:, 0], Path("slide.png"), scale="log")
