"""Finding attention pooling in the graph of a model: scores of the rows, a softmax over them, their weighted sum.

The graph is the one that ``torch.export`` makes, so it does not matter what the attributes of a module are called or in
which of them a layer stands.  Nothing here is proven: sizes say which dimension is which, and `traced` compares the
numbers before anything is swapped.  What is found is fused by `program`.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from milkernels.integrations.layers import Unfusable, refuse

Node = fx.Node

_ACTIVATIONS = {"tanh": "tanh", "relu": "relu", "gelu": "gelu"}
# They keep every number of their input, or are refused by their sizes (`_is_view`).
_VIEWS = "transpose permute t numpy_T mT swapaxes swapdims movedim moveaxis view reshape _unsafe_view flatten"
_VIEWS = {
    *_VIEWS.split(),
    "unflatten",
    "squeeze",
    "unsqueeze",
    "alias",
    "contiguous",
    "clone",
    "expand",
    "select",
    "slice",
}
# What a model may do to scores, element by element, before the softmax.
_OF_SCORES = {"div", "mul", "add", "sub", "rsub", "neg", "where", "masked_fill", "to", "_to_copy", "type_as", "clamp"}
_LIKE = {"full_like", "zeros_like", "ones_like", "empty_like"}  # they read the shape
_PRODUCTS = {"mm", "bmm", "matmul", "einsum"}
MOST_HEADS = 32  # more outputs than this are a classifier's


def op(node: Node) -> str:
    """The operator's name without its overload, ``linear``; that of the kind of node where it calls none."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else node.op


def sizes(node: Node) -> tuple:
    """Its shape: numbers, and symbols where a dimension may have any size."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(map(size_of, value.shape))


def size_of(size: int | torch.SymInt) -> Any:
    """A number, or a symbol or an expression of symbols."""
    expression = size if isinstance(size, int) else size.node.expr
    return int(expression) if isinstance(size, int) or expression.is_number else expression


def longer(node: Node) -> list:
    """The sizes other than 1, in order."""
    return [s for s in sizes(node) if s != 1]


def is_off(node: Node) -> bool:
    """A dropout that drops nothing."""
    return op(node) == "dropout" and (not node.args[2] or node.args[1] == 0)


def _is_view(node: Node) -> bool:
    if op(node) in ("expand", "select", "slice"):
        return longer(node) == longer(node.args[0])
    if op(node) in ("stack", "cat"):
        return len(node.args[0]) == 1
    return op(node) in _VIEWS or is_off(node)


def _viewed(node: Node) -> Node:
    """What a view is of."""
    return node.all_input_nodes[0]


def root(node: Node) -> Node:
    """What it is a view of."""
    while _is_view(node):
        node = _viewed(node)
    return node


def uses(node: Node) -> Iterator[Node]:
    """What is done with a tensor and with views of it."""
    for user in node.users:
        if _is_view(user):
            yield from uses(user)
        else:
            yield user


class Gate(NamedTuple):
    """``w(drop(act(v rows)) [* drop(sigmoid(u rows))])``: nodes that call linear layers."""

    v: Node
    u: Node | None
    w: Node
    activation: str
    dropout_p: float


class Front(NamedTuple):
    """The layer in front: ``drop(act(linear))``."""

    linear: Node
    activation: str
    dropout_p: float


class Fold(NamedTuple):
    """What is done to scores before the softmax, if an op can do it: a scale, and a mask then."""

    scale: float = 1.0
    by: Node | None = None  # a tensor of one number, by which they are multiplied,
    divided: bool = False  # or divided
    mask: Node | None = None
    keeps: bool = False  # whether the mask says which instances are kept, not which are not


class Match(NamedTuple):
    """One attention pooling.  Letters name the dimensions of its nodes: b bags, n instances, m instances of all bags, k
    heads, l features, 1."""

    gate: Gate
    rows: Node  # [(b,) n, l]: what is scored and pooled
    scored: Node  # what the softmax takes
    weights: Node  # what it returns
    bag: Node
    averages: tuple[Node, ...]  # sums of the rows by the mean of the heads' weights
    letters: dict[Node, str]
    fold: "Fold | None" = None  # None: what is done to the scores before the softmax is done as it was
    front: Front | None = None  # where there is a fold

    @property
    def nodes(self) -> list[Node]:
        gate = self.gate
        inner = [layer.args[0] for layer in (gate.v, gate.u, gate.w) if layer is not None]
        return [*inner, gate.w, self.rows, self.scored, self.weights, self.bag, *self.averages]


def find(graph: fx.Graph, written: Collection[Node] = ()) -> list[Match]:
    """Every attention pooling in it whose parts nothing else interferes with, or writes into."""
    _merge_softmaxes(graph)
    _part_heads(graph)
    matches = [match for node in graph.nodes if op(node) == "softmax" and (match := _match(node))]
    matches = [match for match in matches if not {root(node) for node in match.nodes} & set(written)]
    return [_folded(match, bool(written)) for match in matches]


def _merge_softmaxes(graph: fx.Graph) -> None:
    """Of the same scores there need be only one."""
    known: dict[tuple, Node] = {}
    for node in list(graph.nodes):
        if op(node) == "softmax" and not node.kwargs:
            first = known.setdefault(tuple(node.args), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _part_heads(graph: fx.Graph) -> None:
    """``sum(rows * stack(weights of heads))`` as a stack of the sums of each head, where all of them are known.

    The last dimension of rows ``[(B,) N, L, K]`` is that of heads: each scores ``rows[..., k]``.
    """
    for node in list(graph.nodes):
        product = node.args[0] if op(node) == "sum" and len(node.args) == 2 else None
        if not isinstance(product, Node) or op(product) != "mul" or len(product.users) != 1:
            continue
        for rows, stack in (product.args[:2], product.args[1::-1]):
            if not isinstance(stack, Node) or not isinstance(rows, Node) or op(stack) != "stack":
                continue
            heads, last = stack.args[0], len(sizes(stack)) - 1
            if len(heads) == 1 or stack.args[1:] not in ((-1,), (last,)) or sizes(rows)[-1:] != (len(heads),):
                continue
            each = {user.args[2]: user for user in rows.users if op(user) == "select" and user.args[1] in (-1, last)}
            if len(sizes(rows)) == last + 1 and each.keys() == set(range(len(heads))) and node.args[1] in ([0], [1]):
                _sum_each(graph, node, product.target, [(each[i], head) for i, head in enumerate(heads)])
                break


def _sum_each(graph: fx.Graph, node: Node, multiply: Callable, pairs: list[tuple[Node, Node]]) -> None:
    def call(function: Callable, *args) -> Node:
        made = graph.call_function(function, args)
        with node.meta["val"].fake_mode:
            made.meta["val"] = function(*fx.map_arg(args, lambda n: n.meta["val"]))
        return made

    with graph.inserting_before(node):
        sums = [call(node.target, call(multiply, *pair), node.args[1]) for pair in pairs]
        node.replace_all_uses_with(call(torch.ops.aten.stack.default, sums, -1))
    product = node.args[0]
    graph.erase_node(node)
    graph.erase_node(product)


def _match(weights: Node) -> Match | None:
    gates = [gate for node in _sources(weights.args[0]) if (gate := _gate(node))]
    if len(gates) != 1:
        return None
    (gate,) = gates
    instances = sizes(weights)[weights.args[1]]
    rows = _by_bags(gate.v.args[0], instances)
    if rows is None or isinstance(instances, int):
        return None
    bag, averages = _weighted_sums(weights, rows)
    width = sizes(rows)[-1]
    if bag is None:
        return None
    names = {instances: "n", width: "l"}
    names |= {longer(rows)[0]: "b"} if len(longer(rows)) == 3 else {}
    heads = sizes(gate.w)[-1]
    if heads in names or len(names) != len(longer(rows)):  # sizes that do not tell dimensions apart
        return None
    names |= {heads: "k"}
    if "b" in names.values():
        names |= {longer(rows)[0] * instances: "m"}  # instances of all bags
    if None in averages:
        return None
    want = {rows: "bnl", gate.w: "bnk", weights.args[0]: "bnk", weights: "bnk", bag: "bkl"}
    want |= dict.fromkeys(averages, "bl")
    letters = {node: "".join("1" if s == 1 else names.get(s, "?") for s in sizes(node)) for node in want}
    absent = {"1"} | ({"b"} - set(names.values())) | ({"k"} if heads == 1 else set())
    known = {node: text.replace("1", "").replace("m", "bn") for node, text in letters.items()}
    if any(sorted(known[node]) != sorted(set(w) - absent) for node, w in want.items()):
        return None
    return Match(gate, rows, weights.args[0], weights, bag, averages, letters)


def _by_bags(rows: Node, instances: Any) -> Node | None:
    """The rows that are scored, or what they are a view of, where their instances have a dimension of their own."""
    while not (2 <= len(longer(rows)) <= 3 and longer(rows)[-2] == instances):
        if not _is_view(rows):
            return None
        rows = _viewed(rows)
    return rows


def _sources(node: Node) -> Iterator[Node]:
    """The linear layers whose outputs scores are made of, element by element."""
    node = root(node)
    if op(node) == "linear":
        yield node
    elif op(node) in _OF_SCORES:
        for before in node.all_input_nodes:
            yield from _sources(before)


def _gate(w: Node) -> Gate | None:
    if op(w) != "linear" or not isinstance(sizes(w)[-1], int) or sizes(w)[-1] > MOST_HEADS:
        return None
    hidden, p = _undropped(w.args[0])
    if op(hidden) != "mul" or len(hidden.all_input_nodes) != 2:
        branch = _branch(hidden)
        return Gate(branch[0], None, w, branch[1], p) if branch and branch[1] != "sigmoid" else None
    sides = [_undropped(side) for side in hidden.args[:2]]
    branches = [_branch(side) for side, _ in sides]
    if p or sides[0][1] != sides[1][1] or None in branches:
        return None
    second, first = sorted(branches, key=lambda branch: branch[1] != "sigmoid")
    if second[1] != "sigmoid" or first[1] == "sigmoid" or root(first[0].args[0]) is not root(second[0].args[0]):
        return None
    return Gate(first[0], second[0], w, first[1], sides[0][1])


def _undropped(node: Node) -> tuple[Node, float]:
    """What a dropout takes, and the share that it drops."""
    node = root(node)
    return (root(node.args[0]), node.args[1]) if op(node) == "dropout" else (node, 0.0)


def _branch(node: Node) -> tuple[Node, str] | None:
    """The linear layer and the activation behind it."""
    act = _activation(node)
    layer = root(node.args[0]) if act else node
    return (layer, act) if act and op(layer) == "linear" else None


def _activation(node: Node) -> str | None:
    if op(node) == "gelu" and node.kwargs.get("approximate", "none") != "none":
        return None
    return "sigmoid" if op(node) == "sigmoid" else _ACTIVATIONS.get(op(node))


def _weighted_sums(weights: Node, rows: Node) -> tuple[Node | None, tuple[Node, ...]]:
    """The one sum of the rows by the weights, and those by weights that are averaged over heads before."""
    found, averages = [], []
    for user in dict.fromkeys(uses(weights)):
        if op(user) == "mean" and longer(user) == longer(rows)[:-1]:
            averages += [average for node in dict.fromkeys(uses(user)) for average in _sums(node, user, rows)]
        else:
            found += _sums(user, weights, rows)
    bag = found[0] if len(found) == 1 else None
    return bag, tuple(averages)


def _sums(user: Node, weights: Node, rows: Node) -> list[Node | None]:
    """The sum that a use of weights is: a product of matrices, or of elements and their sum.  None: another sum."""
    others = {root(node) for node in user.all_input_nodes} - {weights}
    if op(user) in _PRODUCTS:
        return [user if others == {root(rows)} else None]
    if op(user) == "mul" and others == {root(rows)}:
        return [node if op(node) == "sum" else None for node in dict.fromkeys(uses(user))]
    return []


def _folded(match: Match, in_order: bool) -> Match:
    """With what the op can do beside scoring and pooling; ``in_order``: unless operators would change places."""
    fold = _fold(match)
    if fold is None or (in_order and (fold.by is not None or fold.mask is not None)):
        return match
    given = [node for node in (fold.by, fold.mask) if node is not None]
    if any(_depends(node, match.gate.w) for node in given):
        return match
    if fold.mask is not None and not _is_only_read_by(match.gate.w, match.scored):
        return match  # somebody wants the scores as they were before the mask
    if fold.mask is not None:
        names = dict(zip(sizes(match.rows), match.letters[match.rows], strict=True))
        letters = "".join("1" if s == 1 else names.get(s, "?") for s in sizes(fold.mask))
        if sorted(letters.replace("1", "")) != sorted(set(match.letters[match.rows]) - {"1", "l"}):
            return match
        match.letters[fold.mask] = letters
    match = match._replace(fold=fold)
    return match._replace(front=_front(match))


def _fold(match: Match) -> Fold | None:
    node, fold = root(match.scored), Fold()
    while node is not match.gate.w:
        before, name = node.all_input_nodes[0], op(node)
        if name in ("mul", "div") and fold.by is None and len(node.args) == 2 and not node.kwargs:
            by = node.args[1]
            if isinstance(by, Node) and name == "mul" and all(s == 1 for s in sizes(node.args[0])):
                before, by = by, node.args[0]
            if not isinstance(by, Node) and by:
                fold = fold._replace(scale=fold.scale / by if name == "div" else fold.scale * by)
            elif isinstance(by, Node) and all(s == 1 for s in sizes(by)):
                fold = fold._replace(by=by, divided=name == "div")
            else:
                return None
        elif name in ("masked_fill", "where") and fold == Fold():
            masked = _masked(node)
            if masked is None:
                return None
            before, mask, keeps = masked
            fold = fold._replace(mask=mask, keeps=keeps)
        else:
            return None
        node = root(before)
    return fold


def _masked(node: Node) -> tuple[Node, Node, bool] | None:
    """The scores, the mask, and whether it keeps them; None where what is filled in is not as good as -inf."""
    if op(node) == "masked_fill":
        scores, mask, value = node.args
        keeps = False
    else:
        mask, scores, value = node.args
        keeps = True
    if isinstance(value, Node) and op(value) in ("full_like", "full", "scalar_tensor", "new_full"):
        value = next((a for a in value.args[::-1] if isinstance(a, int | float)), None)
    small = isinstance(value, int | float) and value <= -1e4
    is_mask = isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool
    return (scores, mask, keeps) if small and is_mask and isinstance(scores, Node) else None


def _depends(node: Node, other: Node) -> bool:
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is other:
            return True
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def _is_only_read_by(first: Node, last: Node) -> bool:
    """Whether all that reads the one, at any remove, is on the way to the other."""
    path = {root(last), *_between_scores(last, first)}
    readers = {user for node in path - {root(last)} for user in uses(node)} - path
    return all(op(user) in _LIKE and set(uses(user)) <= path for user in readers)


def _between_scores(last: Node, first: Node) -> Iterator[Node]:
    node = root(last)
    while node is not first:
        yield node
        node = root(next(before for before in node.all_input_nodes if first in set(_sources(before))))
    yield first


def _front(match: Match) -> Front | None:
    """The layer that makes the rows, if nothing but the pooling reads them."""
    taken = {match.gate.v, match.gate.u, match.bag, *match.averages}
    rows = root(match.rows)
    readers = set(uses(rows)) - taken
    if any(op(node) != "mul" or set(uses(node)) != {match.bag} for node in readers):
        return None
    node, p = _undropped(rows)
    act = _activation(node) or "identity"
    if act == "sigmoid":
        return None
    layer = root(node.args[0]) if act != "identity" else node
    if act == "relu" and not p:
        layer, p = _undropped(layer)  # a dropout commutes with a ReLU
    chain = [*_between(rows, layer)]
    if (
        op(layer) != "linear"
        or any(len(set(n.users)) != 1 for n in chain[1:])
        or longer(layer)[-1:] != longer(rows)[-1:]
    ):
        return None
    return Front(layer, act, p)


def _between(last: Node, first: Node) -> Iterator[Node]:
    """From a node back to what it was made of, both included, by first inputs."""
    while last is not first:
        yield last
        last = _viewed(last)
    yield first


# Before anything is looked for


def without_writes(graph: fx.Graph, buffers: Collection[Node] = ()) -> set[Node]:
    """Replaces operators that write into their input where nothing else reads it.

    Returns the tensors that others write into, which stay as they are: nothing of a pooling may be among them.  Writing
    into an argument or a parameter is refused, into a buffer unless it is only counted up.
    """
    written = set()
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        target = node.args[0] if node.args else None
        if not isinstance(target, Node):
            refuse(f"its forward calls {op(node)}, which writes")
        plain = _functional(node)
        if target in buffers and len(target.users) == 1 and not node.users:
            continue
        if plain is not None and target.op == "call_function" and len(target.users) == 1 and not _shares(target):
            node.target = plain
            continue
        while _shares(target) or _is_view(target):
            target = _viewed(target)
        if target.op == "placeholder":
            refuse("its forward writes into what it is given, or a parameter")
        written |= {target, node}
    return written


def _shares(node: Node) -> bool:
    """Whether it may be a view of a part."""
    return op(node) in _VIEWS or op(node) in ("unbind", "split", "chunk", "diagonal", "getitem")


def _functional(node: Node) -> Callable | None:
    """``aten.relu`` of ``aten.relu_``."""
    name = op(node)
    if not name.endswith("_") or not hasattr(torch.ops.aten, name[:-1]):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1]), node.target._overloadname, None)


def has_fixed_types(graph: fx.Graph) -> bool:
    """Whether it names types or devices, which are those of the model that the graph was made of."""

    def named(value) -> bool:
        return isinstance(value, torch.dtype | torch.device)

    return any(any(map(named, [*n.args, *n.kwargs.values()])) for n in graph.nodes if n.op == "call_function")


def why_none(graph: fx.Graph) -> Unfusable:
    """Why nothing was found."""
    softmaxes = [node for node in graph.nodes if op(node) == "softmax"]
    over_instances = [node for node in softmaxes if not isinstance(sizes(node)[node.args[1]], int)]
    if not over_instances:
        return NoPooling("no softmax is over instances" if softmaxes else "it takes no softmax")
    if not any(_gate(w) for node in over_instances for w in _sources(node.args[0])):
        return Unfusable("its scores are not Linear(activation(Linear(rows))), plain or gated")
    return Unfusable("what is summed by its weights is not, once, the rows that are scored")


class NoPooling(Unfusable):
    """It takes no softmax over instances."""
