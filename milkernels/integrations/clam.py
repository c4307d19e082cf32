"""CLAM (Lu et al. 2021): one attention branch or one for each class, and losses of the instances attended most and
least."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from milkernels import ops
from milkernels.integrations.abmil import torchmil_gate, torchmil_prediction
from milkernels.integrations.engine import Structure, has, register
from milkernels.integrations.layers import Embedding, Gate, Unfusable, check_plain, children, embedding, refuse
from milkernels.integrations.proof import Example, Inputs
from milkernels.integrations.scores import GATED, GATED_AND_X, PLAIN, PLAIN_AND_X, eager_scores, proven_gate
from milkernels.results import Pooled

# Methods that are given what is embedded, or give it.
_OF_INSTANCES = ("inst_eval", "inst_eval_out", "compute_inst_loss", "forward_instance_heads")
_OF_INSTANCES += ("forward", "forward_features", "forward_attention")


def _replaced(module: nn.Module) -> bool:
    """A method that was put on the instance may look at any row, and at the attention itself."""
    return any(name in vars(module) for name in _OF_INSTANCES)


def _gate_behind(module: nn.Module, gate: Gate, *layers: nn.Module) -> Gate:
    """The embedding is called as it is where its rows are needed."""
    return gate.behind(Embedding(layers) if _replaced(module) else embedding(*layers))


def _looked_at(scores: Tensor, k: int) -> Tensor:
    """The rows that instance losses look at, in order: the most attended and the least, as they choose them."""
    return torch.cat([scores.topk(k).indices, (-scores).topk(k).indices]).unique()


class CLAM(Structure):
    """CLAM_SB and CLAM_MB: ``attention_net`` is an embedding, of any number of layers, and an attention network."""

    name = "CLAM"
    methods = {"forward": ("h", "label", "instance_eval", "return_features", "attention_only")}

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "attention_net", "classifiers", "instance_classifiers") and hasattr(module, "k_sample")

    def parts(self, module: nn.Module) -> Gate:
        *layers, network = children("attention_net", module.attention_net)
        gate = proven_gate("the last layer of attention_net", network, PLAIN_AND_X, GATED_AND_X)
        branches = len(module.classifiers) if isinstance(module.classifiers, nn.ModuleList) else 1
        if gate.heads != branches:
            refuse(f"there are {gate.heads} attention branches and {branches} classifiers of bags")
        return _gate_behind(module, gate, *layers)

    def forward(self, module, gate, h, label=None, instance_eval=False, return_features=False, attention_only=False):
        if h.ndim != 2:
            return NotImplemented
        x = gate.embedding(h)
        if attention_only:
            return eager_scores(gate, x).T
        seed, dtype = gate.seed(x), gate.dtype(x)
        pooled = gate.pool(x, seed=seed)
        results = {}
        if instance_eval:
            results = self._instance_results(module, gate, pooled, x, seed, label)
        bag = pooled.bag[0].to(dtype)
        logits = _classify(module.classifiers, bag)
        if return_features:
            results["features"] = bag
        predicted = torch.topk(logits, 1, dim=1).indices
        return logits, torch.softmax(logits, dim=1), predicted, pooled.scores.to(dtype).T, results

    def _instance_results(self, module, gate: Gate, pooled: Pooled, x: Tensor, seed, label: Tensor) -> dict:
        """The losses of each class's instance classifier, by the module's own methods.

        They rank the instances.  Weights do not tell the least attended apart once they are rounded, in float16 all
        below 6e-8 are 0; scores have the same order.
        """
        attention = (ops.attention_weights(pooled) if _replaced(module) else pooled.scores).T
        own_branch = attention.shape[0] > 1 or isinstance(module.classifiers, nn.ModuleList)
        in_class = nn.functional.one_hot(label, num_classes=module.n_classes).squeeze().tolist()
        total, predictions, targets = 0.0, [], []
        for i, (classifier, inside) in enumerate(zip(module.instance_classifiers, in_class, strict=True)):
            if not inside and not module.subtyping:
                continue
            evaluate = module.inst_eval if inside else module.inst_eval_out
            ranks, h = attention[i if own_branch else 0], x
            if gate.embedding.embed is not None:
                rows = _looked_at(ranks, module.k_sample)
                ranks, h = ranks[rows], gate.instances(x, rows, seed)
            loss, predicted, target = evaluate(ranks if own_branch else ranks[None], h, classifier)
            predictions += predicted.tolist()
            targets += target.tolist()
            total = total + loss
        if module.subtyping:
            total = total / len(module.instance_classifiers)
        lists = {"inst_labels": targets, "inst_preds": predictions}
        arrays = {name: torch.tensor(values, device="cpu").numpy() for name, values in lists.items()}
        return {"instance_loss": total, **arrays}

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        widths = (layer.in_features for layer in module.attention_net.modules() if isinstance(layer, nn.Linear))
        h = inputs.bag(next(widths), 2 * module.k_sample + 7)
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


class MILLabCLAMFeatures(Structure):
    """CLAMSB of MIL-Lab: one bag ``[1, M, D]``.  Its features hold all embedded instances."""

    name = "CLAM (MIL-Lab), features"
    methods = {"forward_features": ("h", "return_attention")}
    embedding = "patch_embed"

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "patch_embed", "global_attn", "instance_classifiers")

    def parts(self, module: nn.Module) -> Gate:
        gate = proven_gate("global_attn", module.global_attn, PLAIN, GATED)
        if gate.heads != 1:
            refuse(f"global_attn has {gate.heads} heads, not 1")
        return _gate_behind(module, gate, module.patch_embed)

    def forward_features(self, module, gate, h, return_attention=True):
        if _not_one_bag(h):
            return NotImplemented
        gate, h = gate.behind(Embedding()), module.patch_embed(h.squeeze(0))
        pooled, dtype = gate.pool(h), gate.dtype(h)
        features = {"instance_feats": h}
        if return_attention:
            features["attention"] = pooled.scores.to(dtype).T
        return pooled.bag[0].to(dtype), features

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        h = inputs.bag(gate.in_dim, 1, 23)
        yield Example("forward_features", (h,))
        yield Example("forward_features", (h,), {"return_attention": False})


def _not_one_bag(h: Tensor) -> bool:
    return h.ndim - (h.shape[0] == 1) != 2


class MILLabCLAM(MILLabCLAMFeatures):
    """Its forward as well, which needs the instances that its instance losses look at."""

    name = "CLAM (MIL-Lab)"
    methods = MILLabCLAMFeatures.methods | {
        "forward": ("h", "label", "loss_fn", "attn_mask", "return_attention", "return_slide_feats")
    }

    def forward(
        self, module, gate, h, label=None, loss_fn=None, attn_mask=None, return_attention=True, return_slide_feats=None
    ):
        if gate.embedding.embed is None or _not_one_bag(h) or not return_attention:
            return NotImplemented  # it calls forward_features
        module._check_inputs(h, loss_fn, label)
        x = gate.embedding(h.squeeze(0))
        seed, dtype = gate.seed(x), gate.dtype(x)
        pooled = gate.pool(x, seed=seed)
        bag, scores = pooled.bag[0].to(dtype), pooled.scores.T
        logits = module.forward_head(bag)
        rows = _looked_at(scores[0], module.k_sample)
        instances = gate.instances(x, rows, seed)
        instance_loss = module.forward_instance_heads(instances, scores[:, rows], label)
        loss = module.compute_total_loss(logits, label, loss_fn, instance_loss)
        log = {
            "instance_loss": -1 if instance_loss is None else instance_loss.item(),
            "cls_loss": loss_fn(logits, label).item(),
            "loss": loss.item(),
            "attention": scores.to(dtype),
        }
        return {"logits": logits, "loss": loss}, log | ({"slide_feats": bag} if return_slide_feats else {})

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        yield from super().examples(module, gate, inputs)
        if gate.embedding.embed is None:
            return
        h = inputs.bag(gate.in_dim, 1, 2 * module.k_sample + 7)
        for c in range(min(len(module.instance_classifiers), 2)):
            options = {"label": torch.tensor([c], device=h.device), "loss_fn": nn.functional.cross_entropy}
            yield Example("forward", (h,), options | {"return_slide_feats": bool(c)})


class TorchmilCLAM(Structure):
    """CLAM_SB of torchmil: its loss calls the instance losses without the mask."""

    name = "CLAM (torchmil)"
    methods = {"forward": ("X", "mask", "return_att", "return_emb"), "compute_loss": ("Y", "X", "mask")}
    embedding = "feat_ext"
    note = "compute_loss keeps padding out of the instance losses, which the original lets in"

    def looks_like(self, module: nn.Module) -> bool:
        return has(module, "pool", "inst_classifiers", "classifier") and hasattr(module, "compute_inst_loss")

    def parts(self, module: nn.Module) -> Gate:
        gate = torchmil_gate(module)
        try:
            check_plain("pool", module.pool)
        except Unfusable:  # it is called, behind the embedding
            return gate.behind(Embedding((module.feat_ext,)))
        return _gate_behind(module, gate, module.feat_ext)

    def bags(self, name, given):
        return given.get("X")

    def instances(self, x: Tensor) -> int:
        return x.shape[:2].numel()

    def forward(self, module, gate, X, mask=None, return_att=False, return_emb=False):
        if gate.embedding.embed is None or return_emb or X.ndim < 3:
            return NotImplemented  # it calls its pool
        X = gate.embedding(X)
        predicted, scores = torchmil_prediction(module, gate, X, mask)
        return (predicted, scores.to(gate.dtype(X))) if return_att else predicted

    def compute_loss(self, module, gate, Y, X, mask=None):
        if gate.embedding.embed is None:
            predicted, attention, h = module.forward(X, mask, return_att=True, return_emb=True)
            loss = _loss_of_all(module, attention, h, Y, mask)
        else:
            x = gate.embedding(X)
            seed = gate.seed(x)
            predicted, scores = torchmil_prediction(module, gate, x, mask, seed)
            loss = _loss_of_some(module, gate, scores, x, seed, Y, mask)
        losses = {type(module.criterion).__name__: module.criterion(predicted.float(), Y.float())}
        return predicted, losses | {"InstLoss": loss}

    def examples(self, module: nn.Module, gate: Gate, inputs: Inputs) -> Iterable[Example]:
        x, mask = inputs.padded(gate.in_dim)
        labels = torch.tensor([0, 1], device=x.device)
        if gate.embedding.embed is not None:
            yield Example("forward", (x,))
            yield Example("forward", (x,), {"mask": mask, "return_att": True}, mask)
        yield Example("compute_loss", (labels, x))
        yield Example("compute_loss", (labels, x, torch.ones_like(mask)))


def _loss_of_all(module: nn.Module, attention: Tensor, h: Tensor, labels: Tensor, mask: Tensor | None):
    if mask is None:
        return module.compute_inst_loss(attention, h, labels)
    total, real = 0.0, mask != 0
    for i in _bags_with(real):
        bag = slice(i, i + 1)
        total = total + module.compute_inst_loss(attention[bag], h[bag], labels[bag], real[bag])
    return total


def _loss_of_some(module: nn.Module, gate: Gate, scores: Tensor, x: Tensor, seed, labels: Tensor, mask):
    """The same of those instances alone that the losses look at, which all bags have embedded at once."""
    total, real = 0.0, torch.ones_like(scores, dtype=torch.bool) if mask is None else mask != 0
    rows = {}
    for i in _bags_with(real):
        own = real[i].nonzero().flatten()
        rows[i] = own[_looked_at(scores[i, own], min(module.k_sample, len(own)))]
    if not rows:
        return total
    at = torch.cat([own + i * x.shape[1] for i, own in rows.items()])
    embedded = gate.instances(x.flatten(0, 1), at, seed).split([len(own) for own in rows.values()])
    for (i, own), h in zip(rows.items(), embedded, strict=True):
        total = total + module.compute_inst_loss(scores[i, own][None], h[None], labels[i : i + 1])
    return total


def _bags_with(real: Tensor) -> list[int]:
    """An empty bag has no instance to learn from."""
    return real.any(1).nonzero().flatten().tolist()


register(CLAM(), MILLabCLAM(), MILLabCLAMFeatures(), TorchmilCLAM())
