"""Modules whose graph looks like attention pooling and is not, or does more than its graph says: each is left alone."""

import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from upstream_graph import IN, C, D, E

SEEN = []


class Parts(nn.Module):
    """What all of them are made of."""

    def __init__(self):
        super().__init__()
        self.front, self.other = nn.Linear(IN, E), nn.Linear(IN, E)
        self.v, self.u, self.w, self.many = nn.Linear(E, D), nn.Linear(E, D), nn.Linear(D, 1), nn.Linear(D, C)
        self.out, self.direct = nn.Linear(E, C), nn.Linear(E, 1)
        self.factor = nn.Parameter(torch.ones(E))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("average", torch.zeros(E))
        self.calls, self.keep = 0, []

    def rows(self, x):
        return torch.relu(self.front(x))

    def gate(self, h):
        return torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))

    def weights(self, h):
        return F.softmax(self.w(self.gate(h)), dim=0)


def softmax_over_classes(self, x):
    h = self.rows(x)
    return F.softmax(self.many(self.gate(h)), dim=1).T @ h


def softmax_over_features(self, x):
    h = self.rows(x)
    return F.softmax(self.gate(h), dim=1).T @ h


def softmax_over_all(self, x):
    h = self.rows(x)
    return F.softmax(self.many(self.gate(h)).flatten(), dim=0).view(-1, C).T @ h


def sigmoid_weights(self, x):
    h = self.rows(x)
    return torch.sigmoid(self.w(self.gate(h))).T @ h


def softmax_twice(self, x):
    h = self.rows(x)
    return F.softmax(self.weights(h), dim=0).T @ h


def log_softmax_weights(self, x):
    h = self.rows(x)
    return F.log_softmax(self.w(self.gate(h)), dim=0).T @ h


def weights_normalised_again(self, x):
    h = self.rows(x)
    weights = self.weights(h) ** 2
    return (weights / weights.sum()).T @ h


def another_tensor_is_pooled(self, x):
    return self.weights(self.rows(x)).T @ torch.relu(self.other(x))


def the_input_is_pooled(self, x):
    return self.weights(self.rows(x)).T @ x


def a_function_of_the_rows_is_pooled(self, x):
    h = self.rows(x)
    return self.weights(h).T @ (h * self.factor)


def rows_in_another_order(self, x):
    h = self.rows(x)
    return self.weights(h).T @ h.flip(0)


def rows_shifted(self, x):
    h = self.rows(x)
    return self.weights(h).T @ h.roll(1, 0)


def some_rows(self, x):
    h = self.rows(x)
    return self.weights(h)[1:].T @ h[1:]


def detached_rows(self, x):
    h = self.rows(x)
    return self.weights(h).T @ h.detach()


def detached_scores(self, x):
    h = self.rows(x)
    return F.softmax(self.w(self.gate(h)).detach(), dim=0).T @ h


def scores_of_detached_rows(self, x):
    h = self.rows(x)
    return self.weights(h.detach()).T @ h


def weights_used_twice(self, x):
    h, weights = self.rows(x), self.weights(self.rows(x))
    return weights.T @ h + weights.T @ h.square()


def two_sums_of_the_same(self, x):
    h = self.rows(x)
    weights = self.weights(h)
    return self.out(weights.T @ h), weights.T @ h.flip(0)


def mean_weights_pool_another(self, x):
    h = self.rows(x)
    weights = F.softmax(self.many(self.gate(h)), dim=0)
    return weights.T @ h, weights.mean(1, keepdim=True).T @ torch.relu(self.other(x))


def summands_by_mean_weights(self, x):
    h = self.rows(x)
    weights = F.softmax(self.many(self.gate(h)), dim=0)
    weighted = weights.mean(1, keepdim=True) * h
    return weights.T @ h, weighted.sum(0), weighted.amax(0)


def weights_of_the_other_head(self, x):
    both = torch.stack([self.rows(x), torch.relu(self.other(x))], -1)
    weights = torch.stack([self.weights(both[..., 1]), self.weights(both[..., 0])], -1)
    return (both * weights).sum(0)


def weights_dropped(self, x):
    h = self.rows(x)
    return F.dropout(self.weights(h), 0.5, True).T @ h


def noise_in_the_gate(self, x):
    h = self.rows(x)
    gate = self.gate(h)
    return F.softmax(self.w(gate + torch.randn_like(gate)), dim=0).T @ h


def noise_in_the_rows(self, x):
    h = self.rows(x)
    return self.weights(h + torch.rand_like(h)).T @ h


def gates_of_two_tensors(self, x):
    h, z = self.rows(x), torch.relu(self.other(x))
    gate = torch.tanh(self.v(h)) * torch.sigmoid(self.u(z))
    return F.softmax(self.w(gate), dim=0).T @ h


def two_tanh(self, x):
    h = self.rows(x)
    return F.softmax(self.w(torch.tanh(self.v(h)) * torch.tanh(self.u(h))), dim=0).T @ h


def two_sigmoids(self, x):
    h = self.rows(x)
    return F.softmax(self.w(torch.sigmoid(self.v(h)) * torch.sigmoid(self.u(h))), dim=0).T @ h


def a_sum_of_gates(self, x):
    h = self.rows(x)
    return F.softmax(self.w(torch.tanh(self.v(h)) + torch.sigmoid(self.u(h))), dim=0).T @ h


def another_activation(self, x):
    h = self.rows(x)
    return F.softmax(self.w(F.silu(self.v(h))), dim=0).T @ h


def approximate_gelu(self, x):
    h = self.rows(x)
    return F.softmax(self.w(F.gelu(self.v(h), approximate="tanh")), dim=0).T @ h


def no_hidden_units(self, x):
    h = self.rows(x)
    return F.softmax(self.direct(h), dim=0).T @ h


def normalised_hidden_units(self, x):
    h = self.rows(x)
    return F.softmax(self.w(F.layer_norm(self.gate(h), (D,))), dim=0).T @ h


def a_maximum(self, x):
    h = self.rows(x)
    return (self.weights(h) * h).amax(0)


def a_mean(self, x):
    h = self.rows(x)
    return (self.weights(h) * h).mean(0)


def no_sum(self, x):
    h = self.rows(x)
    return self.weights(h) * h


def a_sum_of_features(self, x):
    h = self.rows(x)
    return (self.weights(h) * h).sum(1)


def a_sum_of_some(self, x):
    h = self.rows(x)
    return (self.weights(h) * h)[:5].sum(0)


def a_sum_and_its_summands(self, x):
    h = self.rows(x)
    weighted = self.weights(h) * h
    return weighted.sum(0), weighted.std(0)


def weights_between_instances(self, x):
    h = self.rows(x)
    return F.softmax(self.gate(h) @ self.gate(h).T, dim=1) @ h


def weights_plus_one(self, x):
    h = self.rows(x)
    return (self.weights(h) + 1.0).T @ h


def a_branch_on_numbers(self, x):
    h = self.rows(x)
    if h.mean() > 100:
        return h.mean(0, keepdim=True)
    return self.weights(h).T @ h


def the_best_weight_is_read(self, x):
    h = self.rows(x)
    weights = self.weights(h)
    return weights.T @ h * float(weights.max())


def weights_changed_in_place(self, x):
    h = self.rows(x)
    weights = self.weights(h)
    bag = weights.T @ h
    return bag, weights.mul_(2)


def rows_changed_in_place(self, x):
    h = self.rows(x)
    weights = self.weights(h)
    h.mul_(self.factor)
    return weights.T @ h


def the_input_changed_in_place(self, x):
    with torch.no_grad():
        x.clamp_(-3, 3)
    h = self.rows(x)
    return self.weights(h).T @ h


def a_window_of_memory(self, x):
    h = self.rows(x)
    scrambled = h.as_strided((h.shape[0], E), (1, h.shape[0]))
    return self.weights(h).T @ scrambled


def rows_read_as_columns(self, x):
    h = self.rows(x)
    return self.weights(h).T @ h.T.reshape(-1, E)


def gradients_switched_off(self, x):
    with torch.no_grad():
        h = self.rows(x)
    return self.weights(h).T @ h


def a_counter(self, x):
    self.calls += 1
    h = self.rows(x)
    return self.weights(h).T @ h


def weights_kept(self, x):
    h = self.rows(x)
    self.last = self.weights(h)
    return self.last.T @ h


def weights_appended(self, x):
    h = self.rows(x)
    self.keep.append(h.shape[0])
    return self.weights(h).T @ h


def a_global_list(self, x):
    SEEN.append(x.shape[0])
    h = self.rows(x)
    return self.weights(h).T @ h


def a_print(self, x):
    print("forward")
    h = self.rows(x)
    return self.weights(h).T @ h


def a_running_average(self, x):
    h = self.rows(x)
    with torch.no_grad():
        self.average.copy_(0.9 * self.average + 0.1 * h.mean(0))
    return self.weights(h).T @ h


def pythons_random_numbers(self, x):
    h = self.rows(x)
    h = h * random.random()
    return self.weights(h).T @ h


def another_object(self, x):
    h = self.rows(x)
    return Answer(self.weights(h).T @ h)


class Answer:
    def __init__(self, bag):
        self.bag = bag

    def __eq__(self, other):
        return torch.equal(self.bag, other.bag)


def module(forward: Callable) -> type[nn.Module]:
    return type("".join(word.title() for word in forward.__name__.split("_")), (Parts,), {"forward": forward})


# What the graph shows, and what only the proof or a look at what happens beside it does.
IN_THE_GRAPH = (
    softmax_over_classes, softmax_over_features, softmax_over_all, sigmoid_weights, softmax_twice, log_softmax_weights,
    weights_normalised_again, another_tensor_is_pooled, the_input_is_pooled, a_function_of_the_rows_is_pooled,
    rows_in_another_order, rows_shifted, some_rows, detached_rows, detached_scores, scores_of_detached_rows,
    weights_used_twice, two_sums_of_the_same, mean_weights_pool_another, summands_by_mean_weights, weights_dropped,
    weights_of_the_other_head,
    noise_in_the_gate, noise_in_the_rows,
    gates_of_two_tensors, two_tanh, two_sigmoids, a_sum_of_gates, another_activation, approximate_gelu, no_hidden_units,
    normalised_hidden_units, a_maximum, a_mean, no_sum, a_sum_of_features, a_sum_of_some, a_sum_and_its_summands,
    weights_between_instances, weights_plus_one, weights_changed_in_place, rows_changed_in_place, a_window_of_memory,
)  # fmt: skip
BESIDE_IT = (
    a_branch_on_numbers, the_best_weight_is_read, the_input_changed_in_place,
    rows_read_as_columns, gradients_switched_off, a_counter, weights_kept, weights_appended, a_global_list, a_print,
    a_running_average, pythons_random_numbers, another_object,
)  # fmt: skip
LOOK_ALIKES = {f.__name__.replace("_", " "): module(f) for f in (*IN_THE_GRAPH, *BESIDE_IT)}
