"""CLAM (Lu et al. 2021): one attention branch or one for each class, and losses of the instances attended most and
least."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from milkernels import functional as F
from milkernels.integrations.abmil import TORCHMIL_POOL
from milkernels.integrations.engine import Structure, has, structure_of
from milkernels.integrations.layers import Gate, children, refuse, their_dtype
from milkernels.integrations.proof import Example, Inputs
from milkernels.integrations.scores import GATED, GATED_AND_X, PLAIN, PLAIN_AND_X, eager_scores, proven_gate


class _Parts(NamedTuple):
    embedding: list[nn.Module]  # called as they are
    gate: Gate


class CLAM(Structure):
    """CLAM_SB and CLAM_MB: ``attention_net`` is an embedding, of any number of layers, and an attention network."""

    name = "CLAM"
    methods = {"forward": ("h", "label", "instance_eval", "return_features", "attention_only")}

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "attention_net", "classifiers", "instance_classifiers") and hasattr(module, "k_sample")

    def parts(self, module: nn.Module) -> _Parts:
        *embedding, network = children("attention_net", module.attention_net)
        gate = proven_gate("the last layer of attention_net", network, PLAIN_AND_X, GATED_AND_X)
        branches = len(module.classifiers) if isinstance(module.classifiers, nn.ModuleList) else 1
        if gate.heads != branches:
            refuse(f"there are {gate.heads} attention branches and {branches} classifiers of bags")
        return _Parts(embedding, gate)

    def forward(self, module, parts, h, label=None, instance_eval=False, return_features=False, attention_only=False):
        if h.ndim != 2:
            return NotImplemented
        for layer in parts.embedding:
            h = layer(h)
        if attention_only:
            return eager_scores(parts.gate, h).T
        pooled, dtype = parts.gate.pool(h), their_dtype(h, *parts.gate[:6])
        results = self._instance_results(module, pooled, h, label, dtype) if instance_eval else {}
        bag = pooled.bag[0].to(dtype)
        logits = _classify(module.classifiers, bag)
        if return_features:
            results["features"] = bag
        predicted = torch.topk(logits, 1, dim=1).indices
        return logits, torch.softmax(logits, dim=1), predicted, pooled.scores.to(dtype).T, results

    def _instance_results(self, module, pooled: F.Pooled, h: Tensor, label: Tensor, dtype: torch.dtype) -> dict:
        """The losses of each class's instance classifier, by the module's own methods."""
        attention = F.attention_weights(pooled).to(dtype).T
        own_branch = attention.shape[0] > 1 or isinstance(module.classifiers, nn.ModuleList)
        in_class = nn.functional.one_hot(label, num_classes=module.n_classes).squeeze().tolist()
        total, predictions, targets = 0.0, [], []
        for i, (classifier, inside) in enumerate(zip(module.instance_classifiers, in_class, strict=True)):
            if not inside and not module.subtyping:
                continue
            evaluate = module.inst_eval if inside else module.inst_eval_out
            loss, predicted, target = evaluate(attention[i] if own_branch else attention, h, classifier)
            predictions += predicted.tolist()
            targets += target.tolist()
            total = total + loss
        if module.subtyping:
            total = total / len(module.instance_classifiers)
        arrays = {"inst_labels": torch.tensor(targets).numpy(), "inst_preds": torch.tensor(predictions).numpy()}
        return {"instance_loss": total, **arrays}

    def examples(self, module: nn.Module, parts: _Parts, inputs: Inputs) -> Iterable[Example]:
        first = parts.embedding[0] if parts.embedding else None
        dim = first.in_features if isinstance(first, nn.Linear) else parts.gate.in_dim
        h = inputs.bag(dim, 2 * module.k_sample + 7)
        yield Example("forward", (h,), {"attention_only": True})
        yield Example("forward", (h,), {"return_features": True})
        for c in range(min(module.n_classes, 2)):
            label = torch.tensor([c], device=h.device)
            yield Example("forward", (h,), {"label": label, "instance_eval": True})


def _classify(classifiers: nn.Module, bag: Tensor) -> Tensor:
    """``[1, C]``, by one classifier of one branch or by one for each branch."""
    if not isinstance(classifiers, nn.ModuleList):
        return classifiers(bag)
    return torch.cat([classify(branch) for classify, branch in zip(classifiers, bag, strict=True)])[None].float()


class MILLabCLAM(Structure):
    """CLAMSB of MIL-Lab: one bag ``[1, M, D]``."""

    name = "CLAM (MIL-Lab)"
    methods = {"forward_features": ("h", "return_attention")}
    opaque = ("patch_embed",)

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "patch_embed", "global_attn", "instance_classifiers")

    def parts(self, module: nn.Module) -> Gate:
        gate = proven_gate("global_attn", module.global_attn, PLAIN, GATED)
        return gate if gate.heads == 1 else refuse(f"global_attn has {gate.heads} heads, not 1")

    def forward_features(self, module, gate, h, return_attention=True):
        if h.ndim - (h.shape[0] == 1) != 2:
            return NotImplemented
        h = module.patch_embed(h.squeeze(0))
        pooled, dtype = gate.pool(h), their_dtype(h, *gate[:6])
        features = {"instance_feats": h}
        if return_attention:
            features["attention"] = pooled.scores.to(dtype).T
        return pooled.bag[0].to(dtype), features

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        h = inputs.bag(gate.in_dim, 1, 23)
        yield Example("forward_features", (h,))
        yield Example("forward_features", (h,), {"return_attention": False})


class TorchmilCLAM(Structure):
    """CLAM_SB of torchmil: its pooling is fused as any; its loss calls the instance losses without the mask."""

    name = "CLAM (torchmil)"
    methods = {"compute_loss": ("Y", "X", "mask")}
    opaque = ("feat_ext",)
    few = (0, 0)
    note = "compute_loss keeps padding out of the instance losses, which the original lets in"

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "pool", "inst_classifiers", "classifier") and hasattr(module, "compute_inst_loss")

    def parts(self, module: nn.Module) -> Gate:
        if structure_of(module.pool) is not TORCHMIL_POOL:
            refuse(f"pool is not known to be {TORCHMIL_POOL.name}")
        return TORCHMIL_POOL.parts(module.pool)

    def compute_loss(self, module, gate, Y, X, mask=None):
        predicted, attention, embedded = module.forward(X, mask, return_att=True, return_emb=True)
        losses = {type(module.criterion).__name__: module.criterion(predicted.float(), Y.float())}
        if mask is None:
            losses["InstLoss"] = module.compute_inst_loss(attention, embedded, Y)
            return predicted, losses
        total, real = 0.0, mask != 0
        for i in real.any(1).nonzero().flatten().tolist():  # an empty bag has no instance to learn from
            bag = slice(i, i + 1)
            total = total + module.compute_inst_loss(attention[bag], embedded[bag], Y[bag], real[bag])
        return predicted, losses | {"InstLoss": total}

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(gate.in_dim)
        labels = torch.tensor([0, 1], device=x.device)
        yield Example("compute_loss", (labels, x))
        yield Example("compute_loss", (labels, x, torch.ones_like(mask)))


STRUCTURES = (CLAM(), MILLabCLAM(), TorchmilCLAM())
