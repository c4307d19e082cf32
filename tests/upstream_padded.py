"""Stand-ins, as in upstream_models.py, for models over padded batches ``[B, M, L]``: of torchmil, MIL-Lab, TRIDENT and
slideflow."""

import torch
from torch import nn
from upstream_models import dense

NEGATIVE = -1e9  # what some add where others select

# torchmil


class LazyLinear(nn.Module):
    """A module around a Linear, or around PyTorch's LazyLinear where the width is not known."""

    def __init__(self, in_features=None, out_features=512, bias=True):
        super().__init__()
        lazy = in_features is None
        self.module = nn.LazyLinear(out_features, bias) if lazy else nn.Linear(in_features, out_features, bias)

    def forward(self, x):
        return self.module(x)


def masked_softmax(scores, mask):
    if mask is not None:
        scores = torch.where(mask.bool().unsqueeze(-1), scores, -torch.inf)
    return scores.softmax(1)


class AttentionPool(nn.Module):
    """The bag ``[B, L]``, and if asked the scores ``[B, M]``."""

    def __init__(self, in_dim=None, att_dim=128, act="tanh", gated=False):
        super().__init__()
        self.gated = gated
        self.fc1 = LazyLinear(in_dim, att_dim)
        self.fc2 = nn.Linear(att_dim, 1, bias=False)
        if gated:
            self.fc_gated = LazyLinear(in_dim, att_dim)
            self.act_gated = nn.Sigmoid()
        self.act_layer = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}[act]()

    def forward(self, X, mask=None, return_att=False):
        hidden = self.act_layer(self.fc1(X))
        if self.gated:
            hidden = hidden * self.act_gated(self.fc_gated(X))
        scores = self.fc2(hidden)
        bag = (masked_softmax(scores, mask).mT @ X).squeeze(1)
        return (bag, scores.squeeze(-1)) if return_att else bag


class ABMIL(nn.Module):
    """The prediction ``[B]``, and if asked the scores."""

    def __init__(self, in_dim=None, att_dim=128, att_act="tanh", gated=False, feat_ext=None):
        super().__init__()
        self.criterion = nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext or nn.Identity()
        self.pool = AttentionPool(in_dim, att_dim, att_act, gated)
        self.classifier = LazyLinear(in_dim, 1)

    def forward(self, X, mask=None, return_att=False):
        pooled = self.pool(self.feat_ext(X), mask, return_att)
        if return_att:
            return self.classifier(pooled[0]).squeeze(-1), pooled[1]
        return self.classifier(pooled).squeeze(-1)

    def compute_loss(self, Y, X, mask=None):
        predicted = self.forward(X, mask)
        return predicted, {type(self.criterion).__name__: self.criterion(predicted.float(), Y.float())}

    def predict(self, X, mask=None, return_inst_pred=True):
        return self.forward(X, mask, return_att=return_inst_pred)


class DSMIL(nn.Module):
    """The prediction ``[B]``, and if asked the weights ``[B, M, 1]`` and the instance logits ``[B, M]``."""

    def __init__(self, in_dim, att_dim=128, nonlinear_q=False, nonlinear_v=False, dropout=0.0, feat_ext=None):
        super().__init__()
        self.criterion = nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext or nn.Identity()
        self.q_nn = nn.Linear(in_dim, att_dim)
        if nonlinear_q:
            self.q_nn = nn.Sequential(self.q_nn, nn.ReLU(), nn.Linear(att_dim, att_dim), nn.Tanh())
        self.v_nn = nn.Identity()
        if nonlinear_v:
            self.v_nn = nn.Sequential(nn.Dropout(dropout), *dense(in_dim, in_dim, activation=nn.ReLU))
        self.inst_classifier = nn.Linear(in_dim, 1)
        self.bag_classifier = nn.Linear(in_dim, 1)

    def forward(self, X, mask=None, return_att=False, return_inst_pred=False):
        X = self.feat_ext(X)
        logits, values, queries = self.inst_classifier(X), self.v_nn(X), self.q_nn(X)
        critical = logits.argmax(1)[:, 0]  # padding or not
        scores = queries @ queries[torch.arange(len(X)), critical][..., None] / queries.shape[-1] ** 0.5
        weights = masked_softmax(scores, mask)
        results = [self.bag_classifier(weights.mT @ values)[:, 0, 0]]
        results += [weights] * return_att + [logits.squeeze(-1)] * return_inst_pred
        return tuple(results) if len(results) > 1 else results[0]

    def compute_loss(self, Y, X, mask=None):
        predicted, instances = self.forward(X, mask, return_inst_pred=True)
        highest, name = instances.max(1).values, type(self.criterion).__name__
        losses = {name: self.criterion(predicted.float(), Y.float())}
        return (predicted + highest) / 2, losses | {f"{name}_max": self.criterion(highest.float(), Y.float())}


class ClamTorchmil(nn.Module):
    """CLAM_SB: the instance losses know masks, and are called without."""

    def __init__(self, in_dim=None, att_dim=128, att_act="tanh", k_sample=10, gated=False, feat_ext=None):
        super().__init__()
        self.criterion = nn.BCEWithLogitsLoss()
        self.feat_ext = feat_ext or nn.Identity()
        self.k_sample = k_sample
        self.pool = AttentionPool(in_dim, att_dim, att_act, gated)
        self.classifier = LazyLinear(in_dim, 1)
        self.inst_classifiers = nn.ModuleList([LazyLinear(in_dim, 2) for _ in range(2)])

    def inst_loss_fn(self, logits, targets):
        return nn.functional.cross_entropy(logits.float(), targets)

    def inst_eval(self, att, emb, classifier, mask=None, signs=(1, -1)):
        real = torch.ones_like(att, dtype=torch.bool) if mask is None else mask.bool()
        k = min(self.k_sample, int(real.sum()))
        chosen = [(sign * att).masked_fill(~real, NEGATIVE).topk(k).indices for sign in signs]
        targets = torch.tensor([int(sign > 0 and len(signs) > 1) for sign in signs]).repeat_interleave(k)
        logits = classifier(emb[torch.cat(chosen)])
        return self.inst_loss_fn(logits, targets), logits.argmax(1), targets

    def inst_eval_out(self, att, emb, classifier, mask=None):
        return self.inst_eval(att, emb, classifier, mask, signs=(1,))

    def compute_inst_loss(self, att, emb, labels, mask=None):
        total = 0.0
        for i, label in enumerate(labels.tolist()):
            inside, outside = self.inst_classifiers[int(label != 0)], self.inst_classifiers[int(label == 0)]
            bag = att[i], emb[i], None if mask is None else mask[i]
            total = total + self.inst_eval(*bag[:2], inside, bag[2])[0]
            total = total + self.inst_eval_out(*bag[:2], outside, bag[2])[0]
        return total

    def forward(self, X, mask=None, return_att=False, return_emb=False):
        X = self.feat_ext(X)
        bag, scores = self.pool(X, mask, return_att=True)
        results = [self.classifier(bag).squeeze(1), *[scores] * return_att, *[X] * return_emb]
        return tuple(results) if len(results) > 1 else results[0]

    def compute_loss(self, Y, X, mask=None):
        predicted, scores, X = self.forward(X, mask, return_att=True, return_emb=True)
        losses = {type(self.criterion).__name__: self.criterion(predicted.float(), Y.float())}
        return predicted, losses | {"InstLoss": self.compute_inst_loss(scores, X, Y)}


class CAMILAttentionPool(nn.Module):
    """Scores of ``T``, values of ``M``."""

    def __init__(self, in_dim, att_dim=128, gated=False):
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(in_dim, att_dim)
        self.fc2 = nn.Linear(att_dim, 1, bias=False)
        if gated:
            self.fc_gated = nn.Linear(in_dim, att_dim)
            self.act_gated = nn.Sigmoid()

    def forward(self, T, M, mask=None, return_att=False):
        hidden = self.fc1(T).tanh()
        if self.gated:
            hidden = hidden * self.act_gated(self.fc_gated(T))
        scores = self.fc2(hidden)
        bag = (masked_softmax(scores, mask).mT @ M).squeeze(1)
        return (bag, scores.squeeze(-1)) if return_att else bag


# MIL-Lab


class GlobalAttention(nn.Module):
    """The attributes of CLAM's Attn_Net; returns the scores alone."""

    def __init__(self, L=1024, D=256, dropout=0.0, num_classes=1):
        super().__init__()
        self.module = nn.Sequential(*dense(L, D, activation=nn.Tanh, dropout=dropout), nn.Linear(D, num_classes))

    def forward(self, x):
        return self.module(x)


class GlobalGatedAttention(nn.Module):
    def __init__(self, L=1024, D=256, dropout=0.0, num_classes=1):
        super().__init__()
        self.attention_a = dense(L, D, activation=nn.Tanh, dropout=dropout)
        self.attention_b = dense(L, D, activation=nn.Sigmoid, dropout=dropout)
        self.attention_c = nn.Linear(D, num_classes)

    def forward(self, x):
        return self.attention_c(self.attention_a(x) * self.attention_b(x))


def perceptron(in_dim, embed_dim, layers, dropout):
    """``Linear, ReLU`` at the end, with Dropout between layers.  All share one ReLU."""
    relu, made = nn.ReLU(), []
    for i in range(layers):
        made += [nn.Linear(embed_dim if i else in_dim, embed_dim), relu, nn.Dropout(dropout)]
    return nn.Sequential(*made[:-1])


def hidden_from_padding(scores, attn_mask, dim):
    """The mask is of numbers; what it leaves out is far below the rest, not -inf."""
    if attn_mask is None:
        return scores
    return scores + (1 - attn_mask).unsqueeze(dim) * torch.finfo(scores.dtype).min


class MILLabABMIL(nn.Module):
    """``(results, log)`` of its forward; ``(bag, {"attention": scores [B, K, M]})`` of its features."""

    def __init__(self, in_dim=1024, embed_dim=512, dropout=0.25, attn_dim=384, gate=True, num_classes=2, layers=1):
        super().__init__()
        self.patch_embed = perceptron(in_dim, embed_dim, layers, dropout)
        self.global_attn = (GlobalGatedAttention if gate else GlobalAttention)(embed_dim, attn_dim, dropout)
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward_attention(self, h, attn_mask=None, attn_only=True):
        h = self.patch_embed(h)
        scores = hidden_from_padding(self.global_attn(h).mT, attn_mask, 1)
        return scores if attn_only else (h, scores)

    def forward_features(self, h, attn_mask=None, return_attention=True):
        h, scores = self.forward_attention(h, attn_mask, attn_only=False)
        return (scores.softmax(-1) @ h).squeeze(1), {"attention": scores if return_attention else None}

    def forward_head(self, h):
        return self.classifier(h)

    def forward(self, h, attn_mask=None, return_attention=False, return_slide_feats=False):
        features, log = self.forward_features(h, attn_mask=attn_mask, return_attention=return_attention)
        return {"logits": self.forward_head(features)}, log | ({"slide_feats": features} if return_slide_feats else {})


class MILLabIClassifier(nn.Module):
    def __init__(self, in_dim, num_classes):
        super().__init__()
        self.inst_classifier = nn.Linear(in_dim, num_classes)

    def forward(self, h):
        return self.inst_classifier(h)


class MILLabBClassifier(nn.Module):
    """``(normalised bag [B, C, L], weights [B, M, C])``."""

    def __init__(self, in_dim, attn_dim=384, dropout=0.0):
        super().__init__()
        self.q = nn.Linear(in_dim, attn_dim)
        self.v = nn.Sequential(nn.Dropout(dropout), nn.Linear(in_dim, in_dim))
        self.norm = nn.LayerNorm(in_dim)
        self.fcc = nn.Conv1d(3, 3, kernel_size=in_dim)  # nothing uses it

    def forward(self, h, c, attn_mask=None):
        values, queries = self.v(h), self.q(h)
        critical = c.argmax(1)  # padding or not
        chosen = torch.stack([bag[rows] for bag, rows in zip(h, critical, strict=True)])
        scores = hidden_from_padding(queries @ self.q(chosen).mT, attn_mask, 2)
        scale = torch.tensor(queries.shape[-1], dtype=torch.float32).sqrt()
        weights = (scores / scale).softmax(1)
        return self.norm(weights.mT @ values), weights


class MILLabDSMIL(nn.Module):
    def __init__(self, in_dim=1024, embed_dim=512, attn_dim=384, dropout_v=0.0, num_classes=2):
        super().__init__()
        self.patch_embed = dense(in_dim, embed_dim, activation=nn.ReLU)
        self.i_classifier = MILLabIClassifier(embed_dim, num_classes)
        self.b_classifier = MILLabBClassifier(embed_dim, attn_dim, dropout_v)
        self.classifier = nn.Conv1d(num_classes, num_classes, kernel_size=embed_dim)

    def forward_features(self, h, attn_mask=None, return_attention=False):
        h = self.patch_embed(h)
        found = {"instance_classes": self.i_classifier(h)}
        features, weights = self.b_classifier(h, found["instance_classes"], attn_mask=attn_mask)
        return features, found | ({"attention": weights} if return_attention else {})

    def forward(self, h, attn_mask=None, return_attention=False):
        features, found = self.forward_features(h, attn_mask=attn_mask, return_attention=return_attention)
        logits = (self.classifier(features).squeeze(-1) + found["instance_classes"].max(1).values) / 2
        return {"logits": logits}, {name: found[name] for name in found if name == "attention"}


class MILLabCLAM(nn.Module):
    """One bag ``[1, M, L]``: ``(results, log)`` of its forward, ``(bag, {"instance_feats": ..., "attention": scores
    [1, M]})`` of its features."""

    bag_weight = 0.7

    def __init__(
        self, in_dim=1024, embed_dim=512, dropout=0.25, gate=True, attention_dim=384, num_classes=2, layers=1, k=8
    ):
        super().__init__()
        self.k_sample, self.subtyping = k, num_classes > 2
        self.instance_loss_fn = nn.CrossEntropyLoss()
        self.patch_embed = perceptron(in_dim, embed_dim, layers, dropout)
        self.global_attn = (GlobalGatedAttention if gate else GlobalAttention)(embed_dim, attention_dim, dropout)
        self.classifier = nn.Linear(embed_dim, num_classes)
        self.instance_classifiers = nn.ModuleList([nn.Linear(embed_dim, 2) for _ in range(num_classes)])

    def forward_attention(self, h, attention_only=False):
        h = self.patch_embed(h.squeeze(0))
        scores = self.global_attn(h).T
        return scores if attention_only else (h, scores)

    def forward_features(self, h, return_attention=True):
        h, scores = self.forward_attention(h)
        found = {"instance_feats": h} | ({"attention": scores} if return_attention else {})
        return scores.softmax(-1) @ h, found

    def forward_head(self, h):
        return self.classifier(h)

    def _check_inputs(self, features, loss_fn, label):
        if label is None or loss_fn is None or (features.ndim == 3 and len(features) > 1):
            raise ValueError("one bag, its label and a loss are needed")

    def inst_eval(self, A, h, classifier, signs=(1, -1)):
        chosen = torch.cat([torch.topk(sign * A, self.k_sample, dim=1).indices[-1] for sign in signs])
        targets = torch.tensor([int(len(signs) == 2 and sign > 0) for sign in signs]).repeat_interleave(self.k_sample)
        logits = classifier(h[chosen])
        return self.instance_loss_fn(logits, targets), logits.argmax(1), targets

    def inst_eval_out(self, A, h, classifier):
        return self.inst_eval(A, h, classifier, signs=(1,))

    def forward_instance_heads(self, h, attention_scores, label=None):
        total = 0.0
        for c, classifier in enumerate(self.instance_classifiers):
            if c == int(label):
                total = total + self.inst_eval(attention_scores, h, classifier)[0]
            elif self.subtyping:
                total = total + self.inst_eval_out(attention_scores, h, classifier)[0]
        return total / (len(self.instance_classifiers) if self.subtyping else 1)

    def compute_total_loss(self, logits, label, loss_fn, inst_loss):
        return loss_fn(logits, label) * self.bag_weight + (1 - self.bag_weight) * inst_loss

    def forward(
        self, h, label=None, loss_fn=None, attn_mask=None, return_attention=True, return_slide_feats=None
    ):  # it takes a mask and has no use for it
        self._check_inputs(h, loss_fn, label)
        features, found = self.forward_features(h, return_attention=return_attention)
        logits, attention = self.forward_head(features), found["attention"]
        inst_loss = self.forward_instance_heads(found["instance_feats"], attention, label)
        loss = self.compute_total_loss(logits, label, loss_fn, inst_loss)
        log = {"instance_loss": inst_loss.item(), "cls_loss": loss_fn(logits, label).item(), "loss": loss.item()}
        log |= {"attention": attention} | ({"slide_feats": features} if return_slide_feats else {})
        return {"logits": logits, "loss": loss}, log


class Captured(nn.Module):
    """A model behind a wrapper that takes the methods of its instance when it is made."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.forward = self.model.forward
        self.forward_features = self.model.forward_features


# TRIDENT and slideflow


class MultiHead(nn.Module):
    """``(bag [B, branches, L], scores [B, branches, heads, M])``."""

    def __init__(self, feature_dim=1024, head_dim=256, n_heads=8, dropout=0.0, n_branches=1, gated=False):
        super().__init__()
        self.gated, self.n_heads = gated, n_heads
        heads = range(n_heads)

        def gates(activation):
            return nn.ModuleList([dense(feature_dim, head_dim, activation=activation, dropout=dropout) for _ in heads])

        self.attention_heads = gates(nn.Tanh)
        if gated:
            self.gating_layers = gates(nn.Sigmoid)
        self.branching_layers = nn.ModuleList([nn.Linear(head_dim, n_branches) for _ in heads])
        if n_heads > 1:
            self.condensing_layer = nn.Linear(n_heads * feature_dim, feature_dim)

    def forward(self, features, attn_mask=None):
        scores, bags = [], []
        for i in range(self.n_heads):
            hidden = self.attention_heads[i](features)
            if self.gated:
                hidden = hidden * self.gating_layers[i](features)
            scores.append(self.branching_layers[i](hidden))
            if attn_mask is not None:
                scores[i] = scores[i].masked_fill(~attn_mask[..., None], NEGATIVE)
            bags.append(scores[i].softmax(1).mT @ features)
        bag = torch.cat(bags, -1)
        if self.n_heads > 1:
            bag = self.condensing_layer(bag)
        return bag, torch.stack(scores, 1).permute(0, 3, 1, 2)


class SlideEncoder(nn.Module):
    """TRIDENT's ABMILSlideEncoder: the bag ``[B, L]``, and if asked the scores ``[B, 1, heads, M]``."""

    def __init__(self, width=1024, head_dim=512, n_heads=8, dropout=0.0, gated=True, dropped=0.1):
        super().__init__()
        layers = {"pre_attention_layers": dense(width, width, activation=nn.GELU, dropout=dropped)}
        layers["image_pooler"] = MultiHead(width, head_dim, n_heads, dropout, 1, gated)
        layers["post_attention_layers"] = dense(width, width, activation=nn.GELU, dropout=dropped)
        self.model = nn.ModuleDict(layers)

    def forward(self, batch, device="cuda", return_raw_attention=False):
        h = self.model["pre_attention_layers"](batch["features"].to(device))
        bag, scores = self.model["image_pooler"](h)
        bag = self.model["post_attention_layers"](bag.squeeze(1))
        return (bag, scores) if return_raw_attention else bag


class SlideflowMIL(nn.Module):
    """Attention_MIL, with the length of each bag: the prediction, and if asked the weights ``[B, M, 1]``."""

    def __init__(self, n_feats, n_out, z_dim=256, *, hidden=None, dropout_p=0.5, attention_gate=0, temperature=1.0):
        super().__init__()
        hidden = hidden or (z_dim + 1) // 2
        self.encoder = dense(n_feats, z_dim, activation=nn.ReLU)
        self.attention = nn.Sequential(nn.Linear(z_dim, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(z_dim), nn.Dropout(dropout_p), nn.Linear(z_dim, n_out))
        self.attention_gate, self.temperature = attention_gate, temperature

    def forward(self, bags, lens, *, return_attention=False, uq=False, uq_softmax=True):
        h = self.encoder(bags)
        scores = self._masked_attention_scores(h, lens, apply_softmax=False)
        if self.attention_gate and bags.shape[1] > 1:
            least = torch.quantile(scores, q=self.attention_gate, dim=1, keepdim=True)
            scores = torch.where(scores > least, scores, -torch.inf)
        weights = (scores / self.temperature).softmax(1)
        bag = (weights * h).sum(1)
        if uq:
            predicted = self.head[3](self.head[1](self.head[0](bag)))
            return predicted, torch.zeros_like(predicted)
        predicted = self.head(bag)
        if not return_attention:
            return predicted
        return predicted, (weights if bags.shape[1] > 1 else scores)

    def calculate_attention(self, bags, lens, *, apply_softmax=True):
        return self._masked_attention_scores(self.encoder(bags), lens, apply_softmax=apply_softmax)

    def _masked_attention_scores(self, embeddings, lens, *, apply_softmax=True):
        real = (torch.arange(embeddings.shape[1]) < lens[:, None])[..., None]
        scores = torch.where(real, self.attention(embeddings), -torch.inf)
        return scores.softmax(1) if apply_softmax else scores
