"""The fused forward of a model, as a few lines of Python: its graph, with an op in the place of each attention pooling.

A program is text, so that it is compared, pickled and read.  It takes the parameters and buffers, then the arguments
of the call, and names nothing but PyTorch's operators and the functions of this file.
"""

import functools
import linecache
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from milkernels import ops
from milkernels.integrations.graph import Match, Node
from milkernels.integrations.layers import padded, refuse, their_dtype
from milkernels.layers import Embed
from milkernels.results import Pooled

# What programs call


class Attended(NamedTuple):
    """What a pooling returns, in the types of eager layers."""

    bag: Tensor  # [B, K, L]
    scores: Tensor  # [B, N, K]
    pooled: Pooled
    offsets: Tensor | None


def _ragged(x: Tensor, batched: bool) -> tuple[Tensor, Tensor | None]:
    """Rows ``[B * N, L]`` and offsets, of ``[B, N, L]`` or of one bag with any dimensions of size 1."""
    if batched:
        return padded(x, None)[:2]
    return x.reshape(-1, x.shape[-1]), None


def attend(x, gate, front=None, *, batched, activation, dropout_p=0.0, scale=1.0, mask=None, keeps=True, dropping=True):
    """Scores of the rows of ``x``, their softmax and the weighted sum of the rows, in one op.

    ``gate``: weights and biases of v, u (or None) and w; ``front``: those of the layer in front, its activation and the
    share of its units that is dropped; ``scale``: by which scores are multiplied; ``mask [B, N]``: which instances
    there are, or which not.
    """
    v, u, w = gate
    embed = None if front is None else Embed(*front[:2], front[2] if dropping else 0.0)
    options = {"activation": activation, "dropout_p": dropout_p if dropping else 0.0, "embed": embed}
    dtype = their_dtype(x, *v, *(u or ()), *w, *(front[0] if front else ()))
    rows, offsets = _ragged(x, batched)
    if mask is not None:
        options["mask"] = (mask if keeps else ~mask).flatten()
    if not isinstance(scale, float) or scale != 1.0:
        w = (w[0] * scale, w[1] if w[1] is None else w[1] * scale)
    if u is None:
        pooled = ops.attention_pool(rows, v, w, offsets, **options)
    else:
        pooled = ops.gated_attention_pool(rows, v, u, w, offsets, **options)
    scores = (pooled.scores / scale).to(dtype).reshape(pooled.bag.shape[0], -1, pooled.scores.shape[1])
    return Attended(pooled.bag.to(dtype), scores, pooled, offsets)


def score(x, gate, *, activation, dropout_p=0.0, dropping=True) -> Tensor:
    """Scores ``[..., K]`` of the rows of ``x [..., L]``."""
    v, u, w = gate
    rows = x.reshape(-1, x.shape[-1])
    options = {"activation": activation, "dropout_p": dropout_p if dropping else 0.0}
    if u is None:
        scores = ops.attention_scores(rows, v, w, **options)
    else:
        scores = ops.gated_attention_scores(rows, v, u, w, **options)
    return scores.to(their_dtype(x, *v, *(u or ()), *w)).reshape(*x.shape[:-1], scores.shape[1])


def pool(x, scores, *, batched) -> Attended:
    """The softmax of scores ``[B, N, K]`` and the weighted sum of the rows of ``x``."""
    rows, offsets = _ragged(x, batched)
    pooled = ops.softmax_pool(rows, scores.flatten(0, 1), offsets)
    return Attended(pooled.bag.to(their_dtype(x, scores)), scores, pooled, offsets)


def weights(attended: Attended) -> Tensor:
    """``[B, N, K]``."""
    found = ops.attention_weights(attended.pooled, attended.offsets)
    return found.reshape(attended.scores.shape).to(attended.scores.dtype)


def arrange(t: Tensor, have: str, want: str) -> Tensor:
    """Other dimensions, each a letter: those that are absent have the size 1, and m is b and n as one.

    ``arrange(bag, "bkl", "kl")``, ``arrange(scores, "bnk", "mk")``.
    """
    if "m" in want and "m" not in have:
        others = "".join(letter for letter in have if letter not in "bn1")
        t, have = arrange(t, have, "bn" + others).flatten(0, 1), "m" + others
    kept = [letter for letter in have if letter in want and letter != "1"]
    t = t.reshape([size for letter, size in zip(have, t.shape, strict=True) if letter in kept])
    t = t.permute([kept.index(letter) for letter in want if letter in kept])
    for i, letter in enumerate(want):
        if letter not in kept:
            t = t.unsqueeze(i)
    return t


_CALLED = {f"{__name__.replace('.', '_')}_{f.__name__}": f for f in (attend, score, pool, weights, arrange)}
_KNOWN = _CALLED | {"torch": torch, "device": torch.device, "inf": float("inf"), "nan": float("nan")}


# Making one


def fuse(graph: fx.Graph, matches: Sequence[Match]) -> None:
    """Puts the ops into the graph, in place."""
    for match in matches:
        _fuse(graph, match)
    for node in reversed(list(graph.nodes)):
        pure = node.op == "call_function" and not getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        if pure and not node.users:
            graph.erase_node(node)
    if any(match.fold is not None and (match.fold.by or match.fold.mask) for match in matches):
        _put_in_order(graph)


def _put_in_order(graph: fx.Graph) -> None:
    """Every node behind those that it reads: what was folded into an op may be known only after the scores were."""
    last = None
    placed: set[Node] = set()

    def place(node: Node) -> None:
        nonlocal last
        waiting = [node]
        while waiting:
            if missing := [n for n in waiting[-1].all_input_nodes if n not in placed]:
                waiting += missing
                continue
            found = waiting.pop()
            if found not in placed:
                placed.add(found)
                if last is not None:
                    last.append(found)
                last = found

    for node in list(graph.nodes):
        place(node)


def _fuse(graph: fx.Graph, match: Match) -> None:
    gate, letters = match.gate, match.letters
    layers = tuple(layer and _parameters(layer) for layer in (gate.v, gate.u, gate.w))
    options = {"activation": gate.activation, "dropout_p": gate.dropout_p}
    batched = {"batched": "b" in letters[match.rows]}

    def call(before: Node, function: Callable, *args, **kwargs) -> Node:
        with graph.inserting_before(before):
            return graph.call_function(function, args, kwargs)

    if match.fold is not None:
        front = match.front and (_parameters(match.front.linear), match.front.activation, match.front.dropout_p)
        x = match.front.linear.args[0] if front else match.rows
        fold, at = match.fold, gate.w
        scale, mask = fold.scale, fold.mask
        if fold.by is not None:
            scale = call(
                at, operator.truediv if fold.divided else operator.mul, scale, call(at, torch.squeeze, fold.by)
            )
        if mask is not None:
            mask = call(at, arrange, mask, letters[mask], "bn")
            batched |= {"mask": mask, "keeps": fold.keeps}
        if scale != 1.0:
            batched |= {"scale": scale}
        done = call(at, attend, x, layers, front, **batched, **options)
        scores = call(at, arrange, call(at, operator.getitem, done, 1), "bnk", letters[gate.w])
        gate.w.replace_all_uses_with(scores)
    else:
        scores = call(gate.w, score, match.rows, layers, **options)
        gate.w.replace_all_uses_with(call(gate.w, arrange, scores, letters[match.rows][:-1] + "k", letters[gate.w]))
        scores = call(match.weights, arrange, match.scored, letters[match.scored], "bnk")
        done = call(match.weights, pool, match.rows, scores, **batched)
    for node in match.averages:
        average = call(node, torch.mean, call(node, operator.getitem, done, 0), 1)
        node.replace_all_uses_with(call(node, arrange, average, "bl", letters[node]))
    bag = call(match.bag, arrange, call(match.bag, operator.getitem, done, 0), "bkl", letters[match.bag])
    match.bag.replace_all_uses_with(bag)
    returned = call(match.weights, arrange, call(match.weights, weights, done), "bnk", letters[match.weights])
    match.weights.replace_all_uses_with(returned)


def _parameters(layer: Node) -> tuple[Node, Node | None]:
    return layer.args[1], layer.args[2] if len(layer.args) > 2 else None


def source(graph: fx.Graph) -> str:
    """The graph as ``def forward(self, ...)``."""
    code = graph.python_code("", verbose=False)
    for name in code.globals.keys() - _KNOWN.keys():
        if re.search(rf"\b{name}\b", code.src):
            refuse(f"its forward needs {name}")
    return code.src.strip() + "\n"


@functools.cache
def compiled(text: str, dropping: bool = True) -> Callable:
    """The function that a text defines; ``dropping=False``: without the dropout in ops, for a proof."""
    file = f"<milkernels program {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    names = dict(_KNOWN)
    if not dropping:
        names |= {n: functools.partial(f, dropping=False) for n, f in _CALLED.items() if f in (attend, score)}
    exec(compile(text, file, "exec"), names)
    return names["forward"]
