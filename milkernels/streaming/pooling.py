"""What each op is of a bag in pieces: what it says of a piece, and how that is put together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from milkernels import ops, saving
from milkernels.arguments import checked_seed
from milkernels.dtypes import compute_dtype_of, converted
from milkernels.layers import as_linear, checked_embed
from milkernels.merging import LogSum, log_sum_of, merge_ragged
from milkernels.ops.contract import Forwards
from milkernels.ops.embedding import embedded
from milkernels.ops.segments import INF, Segments, gather, rows_at
from milkernels.results import DSMILOutput, DSMILPooled, InstanceMax, LossAttentionPooled, MaxPooled, Pooled
from milkernels.streaming.reading import Piece, Reading, Source
from milkernels.streaming.replay import Arguments, Call, Results, Seed

Given = dict[str, Any]


def run(source: Source, op: Callable, arguments: Given) -> Any:
    """``op`` of the rows of a source; ``arguments`` are those of the op but for these."""
    arguments = dict(arguments)
    offsets, mask = arguments.pop("offsets", None), arguments.pop("mask", None)
    rows = {name: arguments[name] for name in _PER_ROW if isinstance(arguments.get(name), Tensor)}
    rows = {name: t for name, t in rows.items() if t.ndim != 3}  # critical instances have a row for each bag and class
    reading = Reading(source, offsets, mask, rows)
    seed = Seed(arguments.get("seed"), _drops(arguments))
    for name in _PER_BAG:
        t = arguments.get(name)
        if isinstance(t, Tensor) and t.ndim == 3 and t.shape[0] != reading.num_bags:
            raise ValueError(f"{name} must be [{reading.num_bags}, any, L]; got shape {tuple(t.shape)}")
    return _OPS[op.__name__](_Run(op, reading, seed), arguments)


def instances(source: Source, mask: Tensor | None) -> Tensor:
    """What the layers make of all rows, ``[N, L]``: for few columns."""
    reading = Reading(source, None, mask, {})
    produce = lambda x, piece, given: {"rows": x}  # noqa: E731
    return Call(reading, Arguments({}), produce, Seed(None, False)).results()["rows"]


def take(source: Source, rows: Tensor) -> Tensor:
    """Some rows, behind the layers."""
    wanted = rows.unique().cpu()
    if len(wanted) and wanted[0] < 0:
        raise ValueError(f"rows must be at least 0; got {int(wanted[0])}")
    found = source.source.rows_at(wanted.tolist())
    if len(found) != len(wanted):
        raise ValueError(f"rows must be within the source, which has fewer; got {int(wanted[-1])}")
    chosen = found[torch.searchsorted(wanted, rows.cpu())]
    chosen = chosen if source.device is None else chosen.to(source.device)
    return Reading(source, None, None, {}).features(Piece(chosen, 0, len(chosen), None, None, slice(0, 1)))


_PER_ROW = ("scores", "weights", "critical")
_PER_BAG = ("query", "critical")


def _drops(arguments: Given) -> bool:
    """Whether dropout may be asked for; what is no number the op itself complains about."""
    embed = arguments.get("embed")
    shares = [arguments.get("dropout_p"), arguments.get("value_dropout_p")]
    shares += [embed[2]] if isinstance(embed, (tuple, list)) and len(embed) > 2 else []
    return any(isinstance(share, (int, float)) and share != 0 for share in shares)


class _Run:
    """One call: the op, the reads it takes, its seed."""

    def __init__(self, op: Callable, reading: Reading, seed: Seed):
        self.op, self.reading, self.seed = op, reading, seed
        self._forwards: dict[tuple[str, int], Forwards] = {}  # by op and piece, where there will be a backward
        self._kept = 0

    def call(self, arguments: Given, produce: Callable[[Tensor, Piece, Given], Results]) -> Results:
        per_bag = [name for name in _PER_BAG if getattr(arguments.get(name), "ndim", 0) == 3]
        per_row = [name for name in _PER_ROW if name not in per_bag]
        call = Call(self.reading, Arguments(arguments, per_row, per_bag), produce, self.seed)
        self._differentiated = call.is_differentiated()
        return call.results()

    def of_piece(self, op: Callable, x: Tensor, piece: Piece, given: Given):
        """The op of a piece; at its second read only what its backward starts from."""
        given = given | {"offsets": piece.offsets, "mask": piece.mask}
        if torch.is_grad_enabled():
            with self._forwards[op.__name__, piece.start].resumed():
                return op(x, **given)
        if not self._differentiated:
            return op(x, **given)
        limit = saving.limit_of(x)
        forwards = Forwards(limit if limit == saving.ALL else max(limit - self._kept, 0))
        with forwards.recorded():
            result = op(x, **given)
        self._kept += forwards.kept
        self._forwards[op.__name__, piece.start] = forwards
        return result

    def segments(self, parts: Tensor) -> Segments:
        """Of what pieces say of their bags."""
        return Segments(self.reading.partial_offsets(), parts)


# A softmax


def _pool(run: _Run, arguments: Given) -> Pooled | LossAttentionPooled:
    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        return _of_pooled(run.of_piece(run.op, x, piece, given), piece)

    results = run.call(arguments, produce)
    bag, lse = _merged(run, results)
    if "logits" in results:
        return LossAttentionPooled(bag, results["scores"], lse, results["logits"])
    return Pooled(bag, results["scores"], lse)


def _softmax_pool(run: _Run, arguments: Given) -> Pooled:
    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        return _of_pooled(run.of_piece(ops.softmax_pool, _widened(x), piece, given), piece)

    kind, produce = _typed(produce)
    results = run.call(arguments, produce)
    bag, lse = _merged(run, results)
    return Pooled(converted(bag, kind()), results["scores"], lse)


def _mean_pool(run: _Run, arguments: Given) -> Tensor:
    """The softmax of equal scores, whose sums are counts."""

    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        x = _widened(x)
        equal = x.new_zeros(x.shape[0], 1)
        results = _of_pooled(run.of_piece(ops.softmax_pool, x, piece, given | {"scores": equal}), piece)
        del results["scores"]
        return results

    kind, produce = _typed(produce)
    bag, _ = _merged(run, run.call(arguments, produce))
    return converted(bag[:, 0], kind())


def _of_pooled(pooled, piece: Piece) -> Results:
    """By name, of a piece: first what there is for its bags."""
    results = {"bag": pooled.bag, "lse": pooled.lse}
    if not torch.is_grad_enabled():  # known from the first read
        results["lost"] = log_sum_of(pooled, piece.offsets).sum
    return results | {name: getattr(pooled, name) for name in ("scores", "logits") if hasattr(pooled, name)}


def _merged(run: _Run, results: Results) -> tuple[Tensor, Tensor]:
    """``(bag, lse)`` of the whole, in the types of the pieces'."""
    bag, lse = results["bag"], results["lse"]
    whole, total = merge_ragged(bag, LogSum(lse.double(), results["lost"]), run.reading.partial_offsets())
    return converted(whole, bag.dtype), converted(total.log(), lse.dtype)


def _widened(x: Tensor) -> Tensor:
    """Ops without parameters round to the type of x, which pieces should not do one by one."""
    return converted(x, torch.promote_types(x.dtype, torch.float32))


def _typed(produce):
    """``(kind, produce)``: kind() is the type of the rows, known when produce saw some."""
    kinds: list[torch.dtype] = []

    def noted(x: Tensor, piece: Piece, given: Given) -> Results:
        kinds[:] = [x.dtype]
        return produce(x, piece, given)

    return lambda: kinds[0], noted


# Rows and sums


def _scores(run: _Run, arguments: Given) -> Tensor:
    of_bags = {"offsets"} if run.op is ops.query_scores else ()

    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        bags = {name: piece.offsets for name in of_bags}
        return {"scores": run.op(x, mask=piece.mask, **bags, **given)}

    return run.call(arguments, produce)["scores"]


def _weighted_pool(run: _Run, arguments: Given) -> Tensor:
    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        return {"bag": run.of_piece(ops.weighted_pool, _widened(x), piece, given)}

    kind, produce = _typed(produce)
    bags = run.call(arguments, produce)["bag"]
    return converted(run.segments(bags).sum(bags.double()), kind())


# Maxima


def _max_pool(run: _Run, arguments: Given) -> MaxPooled:
    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        found = run.of_piece(ops.max_pool, x, piece, given)
        return {"values": found.values, "indices": _in_whole(found.indices, piece)}

    results = run.call(arguments, produce)
    chosen = _chosen(run, results)
    return MaxPooled(gather(results["values"], chosen, 0), gather(results["indices"], chosen, -1))


def _in_whole(indices: Tensor, piece: Piece) -> Tensor:
    return torch.where(indices < 0, -1, indices + piece.start)


def _chosen(run: _Run, results: Results) -> Tensor:
    """Which of the pieces' maxima is that of the whole: of the lowest row, as they come in order; -1 for none."""
    return run.segments(results["values"]).first_max(results["values"], results["indices"] < 0)


def _instance_max(run: _Run, arguments: Given) -> InstanceMax:
    values, indices, _, logits = _first_stream(run, arguments, rows=False)
    return InstanceMax(values, indices, logits)


def _first_stream(run: _Run, arguments: Given, rows: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """``(values, indices [B, C], critical instances [B, C, L] as the op sees them, logits [N, C])``."""
    embed = arguments.get("embed")
    trained = any(p.requires_grad for p in run.reading.parameters)
    plain = rows and not trained and not _drops({"embed": embed})

    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        found = run.of_piece(ops.instance_max, x, piece, given)
        results = {"values": found.values, "indices": _in_whole(found.indices, piece), "logits": found.logits}
        if rows:
            results["rows"] = _rows_at(x, found.indices, None if plain else given.get("embed"), given.get("seed"))
        return results

    results = run.call(arguments, produce)
    chosen = _chosen(run, results)
    values, indices = gather(results["values"], chosen, -INF), gather(results["indices"], chosen, -1)
    if not rows:
        return values, indices, None, results["logits"]
    critical = _of_pieces(results["rows"], chosen)
    if plain:  # so few rows are embedded and classified here, which spares a read to hand them their gradients
        critical = critical.detach()
        if embed is not None:
            every = torch.arange(indices.numel(), device=critical.device).view(indices.shape)
            critical = _rows_at(critical.flatten(0, 1), every.masked_fill(indices < 0, -1), embed, None)
        logits = _logits_of(critical, arguments["classifier"])
        values = _Valued.apply(values.detach(), logits.masked_fill(indices < 0, -INF))
    return values, indices, critical, results["logits"]


def _rows_at(x: Tensor, indices: Tensor, embed, seed) -> Tensor:
    """The instances at these rows, 0 where there is none: ``[b, C, L]``."""
    rows = rows_at(x, indices)  # 0 before they are embedded too: what a masked row holds reaches no weight
    if embed is None:
        return rows
    weight, bias, activation, p = checked_embed(embed, x)
    options = checked_seed(seed, "embed.dropout_p", p, x), activation, p, compute_dtype_of(x)
    flat = indices.clamp(min=0).flatten()
    rows = embedded(rows.flatten(0, 1), None, weight, bias, *options, rows=flat).unflatten(0, indices.shape)
    return rows.masked_fill((indices < 0)[..., None], 0)


def _of_pieces(rows: Tensor, chosen: Tensor) -> Tensor:
    """``rows[chosen[b, c], c]``, 0 where it is -1: ``[B, C, L]``."""
    classes = torch.arange(rows.shape[1], device=rows.device).expand_as(chosen)
    return rows[chosen.clamp(min=0), classes].masked_fill((chosen < 0)[..., None], 0)


def _logits_of(critical: Tensor, classifier) -> Tensor:
    """The logit ``[B, C]`` of each class of its own instance."""
    weight, bias = as_linear("classifier", classifier, critical.shape[-1], critical)
    kind = torch.promote_types(critical.dtype, weight.dtype)
    logits = (critical.to(kind) * weight.to(kind)).sum(-1)
    return logits if bias is None else logits + bias.to(kind)


class _Valued(torch.autograd.Function):
    """The values, with the graph of others that are the same but for rounding."""

    @staticmethod
    def forward(ctx, values: Tensor, others: Tensor) -> Tensor:
        ctx.dtype = others.dtype
        return values.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


# DSMIL


def _dsmil(run: _Run, arguments: Given) -> DSMILOutput:
    first = {name: arguments[name] for name in ("classifier", "seed", "embed", "backend")}
    values, indices, critical, logits = _first_stream(run, first)
    second = {name: value for name, value in arguments.items() if name != "classifier"}
    pooled = _second_stream(run, second, critical, indices)
    return DSMILOutput(*pooled, indices, values, logits)


def _dsmil_pool(run: _Run, arguments: Given) -> DSMILPooled:
    critical = arguments.pop("critical")
    if isinstance(critical, Tensor) and critical.ndim == 3:
        pooled = _second_stream(run, arguments, critical, None)
        return DSMILPooled(*pooled, torch.full_like(pooled.lse, -1, dtype=torch.int64))

    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        logits = given["critical"]
        values, local = ops.max_pool(logits, piece.offsets, mask=piece.mask, backend=given["backend"])
        local = local.masked_fill(values == -INF, -1)
        rows = _rows_at(x, local, given["embed"], given["seed"])
        return {"values": values, "indices": _in_whole(local, piece), "rows": rows}

    if not isinstance(critical, Tensor):
        raise TypeError(f"critical must be a tensor; got {type(critical).__name__}")
    first = {name: arguments[name] for name in ("embed", "seed", "backend")}
    results = run.call(first | {"critical": critical.detach()}, produce)
    chosen = _chosen(run, results)
    indices = gather(results["indices"], chosen, -1)
    return DSMILPooled(*_second_stream(run, arguments, _of_pieces(results["rows"], chosen), indices), indices)


def _second_stream(run: _Run, arguments: Given, critical: Tensor, indices: Tensor | None) -> Pooled:
    """``indices`` say which classes of which bags have no critical instance; None: all have one."""

    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        return _of_pooled(run.of_piece(ops.dsmil_pool, x, piece, given), piece)

    results = run.call(arguments | {"critical": critical}, produce)
    scores = results["scores"]
    bag, lse = _merged(run, results)
    if indices is not None:
        none = (indices < 0) & (lse > -INF)  # rows, but no logit above -inf
        if bool(none.any()):
            of_rows = Segments(run.reading.offsets, scores).to_rows(none)
            scores = scores.masked_fill(of_rows, -INF)
            bag, lse = bag.masked_fill(none[..., None], 0), lse.masked_fill(none, -INF)
    return Pooled(bag, scores, lse)


# The classical ones


def _of_classical(run: _Run, arguments: Given) -> Results:
    def produce(x: Tensor, piece: Piece, given: Given) -> Results:
        real = torch.ones_like(x[:, :1], dtype=torch.float64) if piece.mask is None else piece.mask[:, None].double()
        results = {"values": run.op(_widened(x), offsets=piece.offsets, mask=piece.mask, **given)}
        return results | {"count": Segments(piece.offsets, x).sum(real)}

    kind, produce = _typed(produce)
    results = run.call(arguments, produce)
    return results | {"kind": kind()}


def _by_itself(run: _Run, arguments: Given) -> Tensor:
    """The op of what it says of the pieces: a probability for each of them."""
    results = _of_classical(run, arguments)
    whole = run.op(results["values"].double(), run.reading.partial_offsets(), backend=arguments["backend"])
    return converted(whole, results["kind"])


def _log_sum_exp_pool(run: _Run, arguments: Given) -> Tensor:
    results, r = _of_classical(run, arguments), arguments["r"]
    values, count = results["values"].double(), results["count"]
    segments = run.segments(values)
    top = segments.max(values.masked_fill(count == 0, -INF))
    empty = top == -INF
    top = top.masked_fill(empty, 0)
    e = count * (r * (values - segments.to_rows(top))).masked_fill(count == 0, 0).exp()
    mean = segments.sum(e) / segments.sum(count).clamp(min=1)
    whole = (top + mean.masked_fill(empty, 1).log() / r).masked_fill(empty, 0)
    return converted(whole, results["kind"])


def _generalized_mean_pool(run: _Run, arguments: Given) -> Tensor:
    results, r = _of_classical(run, arguments), arguments["r"]
    values, count = results["values"].double(), results["count"]
    segments = run.segments(values)
    top = segments.max(values)
    top = top.masked_fill(top <= 0, 1)
    share = values / segments.to_rows(top)
    zero = share == 0  # whose derivative may be 0 or infinite
    power = share.masked_fill(zero, 1).pow(r).masked_fill(zero, 0)
    mean = segments.sum(count * power) / segments.sum(count).clamp(min=1)
    zero = mean == 0
    whole = (top * mean.masked_fill(zero, 1).pow(1 / r)).masked_fill(zero, 0)
    return converted(whole, results["kind"])


_OPS = {
    "attention_pool": _pool,
    "gated_attention_pool": _pool,
    "query_pool": _pool,
    "loss_attention_pool": _pool,
    "softmax_pool": _softmax_pool,
    "mean_pool": _mean_pool,
    "attention_scores": _scores,
    "gated_attention_scores": _scores,
    "query_scores": _scores,
    "weighted_pool": _weighted_pool,
    "max_pool": _max_pool,
    "instance_max": _instance_max,
    "dsmil": _dsmil,
    "dsmil_pool": _dsmil_pool,
    "noisy_or_pool": _by_itself,
    "isr_pool": _by_itself,
    "log_sum_exp_pool": _log_sum_exp_pool,
    "generalized_mean_pool": _generalized_mean_pool,
}
