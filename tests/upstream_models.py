"""Stand-ins for the models that `milkernels.accelerate` recognises: their attributes, the arguments of their methods
and what those return are those of the published code, the rest is our own, and sizes are arguments.  Models over padded
batches are in upstream_padded.py, those that only look like one of these in upstream_lookalikes.py."""

import torch
from torch import Tensor, nn

from benchmarks.clam import AttnNet, AttnNetGated, ClamSB, dense  # noqa: F401, stand-ins too

# CLAM; the single branch is what the benchmarks measure too


class ClamMB(ClamSB):
    """CLAM_MB: an attention branch and a classifier for each class; the logits are float32 whatever the model is."""

    branches = None

    def _classified(self, bag):
        logits = torch.empty(1, self.n_classes, dtype=torch.float32, device=bag.device)
        for c, classifier in enumerate(self.classifiers):
            logits[0, c] = classifier(bag[c])
        return logits

    def forward(self, h, label=None, instance_eval=False, return_features=False, attention_only=False):
        return super().forward(h, label, instance_eval, return_features, attention_only)


# Attention MIL, Loss-Attention: images of one bag [1, N, 1, S, S]


def convolutions(channels: int) -> nn.Sequential:
    """10 x 10 pixels to ``channels`` x 2 x 2."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2, stride=2), nn.Conv2d(3, channels, 3), nn.ReLU())


class _Images(nn.Module):
    """What embeds the images."""

    def __init__(self, M, channels, *more):
        super().__init__()
        self.flat = channels * 4
        self.feature_extractor_part1 = convolutions(channels)
        self.feature_extractor_part2 = nn.Sequential(nn.Linear(self.flat, M), *more, nn.ReLU())

    def embedded(self, x):
        maps = self.feature_extractor_part1(x.squeeze(0))
        return self.feature_extractor_part2(maps.view(-1, self.flat))


class Attention(_Images):
    """AttentionDeepMIL: ``(probability, class, weights [K, N])``."""

    def __init__(self, M=500, L=128, branches=1, channels=50):
        super().__init__(M, channels)
        self.attention = nn.Sequential(nn.Linear(M, L), nn.Tanh(), nn.Linear(L, branches))
        self.classifier = nn.Sequential(nn.Linear(M * branches, 1), nn.Sigmoid())

    def scores(self, h):
        return self.attention(h)

    def forward(self, x):
        h = self.embedded(x)
        weights = self.scores(h).T.softmax(1)
        probability = self.classifier(weights @ h)
        return probability, (probability >= 0.5).float(), weights


class GatedAttention(Attention):
    def __init__(self, M=500, L=128, branches=1, channels=50):
        super().__init__(M, L, branches, channels)
        del self.attention
        self.attention_V = dense(M, L, activation=nn.Tanh)
        self.attention_U = dense(M, L, activation=nn.Sigmoid)
        self.attention_w = nn.Linear(L, branches)

    def scores(self, h):
        return self.attention_w(self.attention_V(h) * self.attention_U(h))


class LossAttentionLayer(nn.Module):
    """``(instances times N times their weights, logits, weights [N])``, with the weight and bias of a classifier."""

    def __init__(self, dim=512):
        super().__init__()
        self.linear = nn.Linear(dim, 1)  # nothing uses it

    def forward(self, features, W_1, b_1, flag):
        if flag != 1:
            raise NotImplementedError("the published layer fails here as well")
        logits = nn.functional.linear(features, W_1, b_1)
        mass = (logits - logits.max()).exp().sum(1, keepdim=True)
        weights = mass / mass.sum(0)
        return features * (len(features) * weights), logits, weights.squeeze()


class LossAttention(_Images):
    """``(bag logits, instance logits, weights [N])``."""

    def __init__(self, L=500, classes=4, channels=50):
        super().__init__(L, channels, nn.Dropout())
        self.att_layer = LossAttentionLayer(L)
        self.linear = nn.Linear(L, classes)

    def forward(self, x, flag=1):
        h = self.embedded(x)
        context, logits, weights = self.att_layer(h, self.linear.weight, self.linear.bias, flag)
        return self.linear(context.mean(0, keepdim=True)), logits, weights


# DSMIL of its authors


class FCLayer(nn.Module):
    """``(instances, logits)``."""

    def __init__(self, in_size, out_size=1):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(in_size, out_size))

    def forward(self, feats):
        return feats, self.fc(feats)


class IClassifier(nn.Module):
    """The same, of images."""

    def __init__(self, feature_extractor, feature_size, output_class):
        super().__init__()
        self.feature_extractor = feature_extractor
        self.fc = nn.Linear(feature_size, output_class)

    def forward(self, x):
        feats = self.feature_extractor(x)
        feats = feats.view(len(feats), -1)
        return feats, self.fc(feats)


class BClassifier(nn.Module):
    """``(prediction [1, C], weights [N, C], bag [1, C, V])``.  The scale of the scores is a number in float32."""

    def __init__(self, input_size, output_class, dropout_v=0.0, nonlinear=True, passing_v=False, units=128):
        super().__init__()
        self.q = nn.Linear(input_size, units)
        if nonlinear:
            self.q = nn.Sequential(self.q, nn.ReLU(), nn.Linear(units, units), nn.Tanh())
        self.v = nn.Identity()
        if passing_v:
            self.v = nn.Sequential(nn.Dropout(dropout_v), *dense(input_size, input_size, activation=nn.ReLU))
        self.fcc = nn.Conv1d(output_class, output_class, kernel_size=input_size)

    def forward(self, feats, c):
        values, queries = self.v(feats), self.q(feats)
        critical = c.sort(0, descending=True).indices[0]
        scores = queries @ self.q(feats[critical]).T
        scale = torch.tensor(queries.shape[1], dtype=torch.float32, device=feats.device).sqrt()
        weights = (scores / scale).softmax(0)
        bag = (weights.T @ values)[None]
        return self.fcc(bag).view(1, -1), weights, bag


class MILNet(nn.Module):
    """``(instance logits, prediction, weights, bag)``."""

    def __init__(self, i_classifier, b_classifier):
        super().__init__()
        self.i_classifier = i_classifier
        self.b_classifier = b_classifier

    def forward(self, x):
        feats, classes = self.i_classifier(x)
        return classes, *self.b_classifier(feats, classes)


# Layers: the same attributes and different results


class PlainWeights(nn.Module):
    """DTFD-MIL's Attention2: weights, or scores, ``[K, N]``."""

    def __init__(self, L=512, D=128, K=1):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(L, D), nn.Tanh(), nn.Linear(D, K))

    def scores(self, x):
        return self.attention(x)

    def forward(self, x, isNorm=True):
        scores = self.scores(x).T
        return scores.softmax(1) if isNorm else scores


class GatedWeights(PlainWeights):
    """DTFD-MIL's Attention_Gated."""

    def __init__(self, L=512, D=128, K=1):
        nn.Module.__init__(self)
        self.attention_V = dense(L, D, activation=nn.Tanh)
        self.attention_U = dense(L, D, activation=nn.Sigmoid)
        self.attention_weights = nn.Linear(D, K)

    def scores(self, x):
        return self.attention_weights(self.attention_V(x) * self.attention_U(x))


class AttentionWithClassifier(nn.Module):
    """DTFD-MIL's Attention_with_Classifier."""

    def __init__(self, L=512, D=128, K=1, num_cls=2):
        super().__init__()
        self.attention = GatedWeights(L, D, K)
        self.classifier = nn.Linear(L, num_cls)

    def forward(self, x):
        return self.classifier(self.attention(x) @ x)


class PlainPooling(nn.Module):
    """hi-ml's AttentionLayer: ``(weights [K, N], pooled [K, L])``."""

    def __init__(self, input_dims, hidden_dims, attention_dims=1):
        super().__init__()
        self.input_dims = input_dims
        self.attention = nn.Sequential(
            nn.Linear(input_dims, hidden_dims), nn.Tanh(), nn.Linear(hidden_dims, attention_dims)
        )

    def scores(self, x):
        return self.attention(x)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        features = features.view(-1, self.input_dims)
        weights = self.scores(features).T.softmax(1)
        return weights, weights @ features


class GatedPooling(PlainPooling):
    """hi-ml's GatedAttentionLayer."""

    def __init__(self, input_dims, hidden_dims, attention_dims=1):
        super().__init__(input_dims, hidden_dims, attention_dims)
        del self.attention
        self.attention_V = dense(input_dims, hidden_dims, activation=nn.Tanh)
        self.attention_U = dense(input_dims, hidden_dims, activation=nn.Sigmoid)
        self.attention_weights = nn.Linear(hidden_dims, attention_dims)

    def scores(self, x):
        return self.attention_weights(self.attention_V(x) * self.attention_U(x))


# PyG


class Perceptron(nn.Module):
    """PyG's MLP in so far as it is called with the batch."""

    def __init__(self, *sizes: int):
        super().__init__()
        pairs = zip(sizes, sizes[1:], strict=False)
        self.lins = nn.ModuleList([nn.Linear(*pair) for pair in pairs])

    def forward(self, x, batch=None, batch_size=None):
        for i, layer in enumerate(self.lins):
            x = layer(x) if i == 0 else layer(x.relu())
        return x


class AttentionalAggregation(nn.Module):
    """PyG's, over ``index``, sorted or not, or ``ptr``."""

    def __init__(self, gate_nn, nn=None):
        super().__init__()
        called = isinstance(gate_nn, Perceptron)
        self.gate_nn, self.gate_mlp = (None, gate_nn) if called else (gate_nn, None)
        called = isinstance(nn, Perceptron)
        self.nn, self.mlp = (None, nn) if called else (nn, None)

    def forward(self, x, index=None, ptr=None, dim_size=None, dim=-2):
        scores = self.gate_nn(x) if self.gate_mlp is None else self.gate_mlp(x, batch=index, batch_size=dim_size)
        if self.mlp is not None:
            x = self.mlp(x, batch=index, batch_size=dim_size)
        elif self.nn is not None:
            x = self.nn(x)
        if ptr is not None:
            index, dim_size = torch.arange(len(ptr) - 1).repeat_interleave(ptr.diff()), len(ptr) - 1
        elif index is None:
            index = torch.zeros(len(x), dtype=torch.int64)
        size = int(index.max()) + 1 if dim_size is None else dim_size
        rows = index[:, None].expand_as(scores)
        highest = scores.new_full((size, scores.shape[1]), -torch.inf)
        highest = highest.scatter_reduce(0, rows, scores.detach(), "amax")
        mass = (scores - highest[index]).exp()
        total = mass.new_zeros(size, mass.shape[1]).index_add(0, index, mass)
        return x.new_zeros(size, x.shape[1]).index_add(0, index, mass / (total[index] + 1e-16) * x)
