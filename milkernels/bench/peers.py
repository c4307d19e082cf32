"""Other people's code for the same ops: what one writes with a padded batch, segments or another library.

Each peer is two functions: one says why it does not serve a call, or nothing; one prepares what is timed.  Packages
are imported where they are prepared.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from milkernels.testing import Inputs, OpCase
from milkernels.testing.formulas import attention_scores_eager, embedded, softmax_pool_eager

Compute = Callable[[Inputs], dict[str, Tensor]]
Prepared = tuple[Compute, Inputs]
Prepare = Callable[[OpCase, Inputs, bool], Prepared]
SLICE = 8192  # instances whose hidden units ``accumulate`` has at a time


class Unavailable(Exception):
    """Why a contender does not run here."""


def available_memory(device: torch.device | str = "cpu") -> int:
    if torch.device(device).type == "cuda":
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # that the allocator holds
        return torch.cuda.mem_get_info()[0] + idle
    import psutil

    return psutil.virtual_memory().available


def _is_attention_pool(case: OpCase) -> bool:
    return "attention" in case.tags and case.takes_offsets


def _behind(inputs: Inputs) -> Inputs:
    """What an aggregator gets: the instances, or what the layer in front of it makes of all of them."""
    return replace(inputs, x=embedded(inputs.x, inputs.parameters, inputs.options))


def _scores(case: OpCase, inputs: Inputs) -> Tensor:
    """By the attention network, or as given."""
    if "scores" in inputs.parameters:
        return inputs.parameters["scores"]
    return attention_scores_eager(inputs.x, inputs.parameters, inputs.options)["scores"]


def _pointers(inputs: Inputs) -> Tensor:
    return inputs.offsets if inputs.offsets is not None else torch.tensor([0, len(inputs.x)], device=inputs.x.device)


def _lengths(inputs: Inputs) -> Tensor:
    return torch.tensor(inputs.lengths, device=inputs.x.device)


def padding(inputs: Inputs) -> float:
    """The rows of a padded batch over those that are real."""
    return max(inputs.lengths) * len(inputs.lengths) / max(1, sum(inputs.lengths))


def _must_fit(inputs: Inputs, numbers: int, what: str) -> None:
    """``numbers``: of each row of the padded batch."""
    needed = len(inputs.lengths) * max(inputs.lengths) * numbers * inputs.x.element_size()
    if needed > 0.5 * available_memory(inputs.x.device):
        raise Unavailable(f"{what} need {needed / 1e9:.1f} GB")


def _batch(inputs: Inputs) -> Inputs:
    """What a DataLoader that pads hands over: ``x [B, M, L]`` and ``mask [B, M]``."""
    dim, device = inputs.x.shape[1], inputs.x.device
    hidden = sum(t.shape[0] for name, t in inputs.parameters.items() if name in ("v_weight", "u_weight", "e_weight"))
    _must_fit(inputs, 2 * dim + 4 * hidden, "the padded batch and its temporaries")
    longest = max(inputs.lengths)
    inside = torch.arange(longest, device=device) < _lengths(inputs).unsqueeze(1)
    batch = inputs.x.new_zeros(len(inputs.lengths), longest, dim)
    batch[inside] = inputs.x.detach()
    real = inside
    if inputs.mask is not None:
        real = torch.zeros_like(inside)
        real[inside] = inputs.mask.bool()
    return replace(inputs, x=batch, mask=real)


def refuses_padded(case: OpCase, inputs: Inputs) -> str:
    return "" if _is_attention_pool(case) else "no padded formula for this op"


def padded(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
    def compute(i: Inputs) -> dict[str, Tensor]:
        i = _behind(i)
        scores = attention_scores_eager(i.x, i.parameters, i.options)["scores"]
        weights = torch.softmax(scores.masked_fill(~i.mask.unsqueeze(-1), -math.inf), dim=1)
        return {"bag": torch.bmm(weights.transpose(1, 2), i.x)}

    return compute, _batch(inputs)


def refuses_torchmil(case: OpCase, inputs: Inputs) -> str:
    if not _is_attention_pool(case) or inputs.parameters["w_weight"].shape[0] > 1 or inputs.options["dropout_p"]:
        return "AttentionPool pools with one attention head and no dropout"
    return ""


def torchmil(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
    from torchmil.nn import AttentionPool

    hidden, dim = inputs.parameters["v_weight"].shape
    places = {"v": "fc1.module", "u": "fc_gated.module", "w": "fc2"}
    gated = "u_weight" in inputs.parameters
    with torch.device("meta"):  # its own parameters are not used
        pool = AttentionPool(dim, hidden, inputs.options["activation"], gated)
    for prefix in "vuw" if gated else "vw":
        linear = pool.get_submodule(places[prefix])
        # Not as nn.Parameter, which would be another leaf.  Its last layer has no bias: ours must have a gradient.
        del linear.weight, linear.bias
        linear.weight, linear.bias = inputs.parameters[f"{prefix}_weight"], inputs.parameters[f"{prefix}_bias"]

    def compute(i: Inputs) -> dict[str, Tensor]:
        return {"bag": pool(_behind(i).x, i.mask).unsqueeze(1)}

    return compute, _batch(inputs)


class _Gate(torch.nn.Module):
    """A score program as the gate network of another library's aggregation."""

    def __init__(self, inputs: Inputs):
        super().__init__()
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return attention_scores_eager(x, self.inputs.parameters, self.inputs.options)["scores"]


def refuses_pyg(case: OpCase, inputs: Inputs) -> str:
    if not _is_attention_pool(case) or inputs.mask is not None or inputs.parameters["w_weight"].shape[0] > 1:
        return "AttentionalAggregation pools with one attention head and no mask"
    return ""


def pyg(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
    from torch_geometric.nn import AttentionalAggregation

    index = torch.repeat_interleave(_lengths(inputs))
    aggregate = AttentionalAggregation(_Gate(inputs))

    def compute(i: Inputs) -> dict[str, Tensor]:
        return {"bag": aggregate(_behind(i).x, index, dim_size=len(i.lengths)).unsqueeze(1)}

    return compute, inputs


_REDUCED = {"mean_pool": "mean", "max_pool": "max"}


def refuses_segments(case: OpCase, inputs: Inputs) -> str:
    if not _is_attention_pool(case) and case.name not in ("softmax_pool", *_REDUCED):
        return "nobody writes this op with segments"
    return "segments have no mask" if inputs.mask is not None else ""


def _by_segments(
    case: OpCase,
    inputs: Inputs,
    softmax: Callable[[Tensor], Tensor],
    reduce: Callable[[Tensor, str], Tensor],
) -> Prepared:
    """``softmax`` of scores ``[N, K]`` in each bag; ``reduce`` of rows over each bag: "sum", "mean" or "max"."""

    def compute(i: Inputs) -> dict[str, Tensor]:
        if case.name in _REDUCED:
            return {case.primary: reduce(i.x, _REDUCED[case.name])}
        i = _behind(i)
        weights = softmax(_scores(case, i))
        return {"bag": reduce(weights.unsqueeze(2) * i.x.unsqueeze(1), "sum")}

    return compute, inputs


def pyg_segment(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
    from torch_geometric.utils import segment, softmax

    ptr = _pointers(inputs)
    return _by_segments(case, inputs, lambda s: softmax(s, ptr=ptr), lambda t, how: segment(t, ptr, how))


def segment_reduce(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
    offsets, lengths, rows = _pointers(inputs), _lengths(inputs), len(inputs.x)

    def reduce(t: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(t, how, offsets=offsets)

    def spread(t: Tensor) -> Tensor:
        return torch.repeat_interleave(t, lengths, dim=0, output_size=rows)

    def softmax(scores: Tensor) -> Tensor:
        e = torch.exp(scores - spread(reduce(scores.detach(), "max")))
        return e / spread(reduce(e, "sum"))

    return _by_segments(case, inputs, softmax, reduce)


def refuses_jagged(case: OpCase, inputs: Inputs) -> str:
    if not _is_attention_pool(case) and case.name not in ("softmax_pool", "mean_pool"):
        return "nobody writes this op with nested tensors"
    return "nested tensors have no mask" if inputs.mask is not None else ""


def jagged(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
    # The backward of a product over the ragged dimension pads what it gives to x.
    _must_fit(inputs, 2 * inputs.x.shape[1], "padded gradients of the nested tensor")
    offsets, shortest, longest = _pointers(inputs), min(inputs.lengths), max(inputs.lengths)
    ones = inputs.x.new_ones(len(inputs.x), 1)

    def nested(t: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(t, offsets, min_seqlen=shortest, max_seqlen=longest)

    def compute(i: Inputs) -> dict[str, Tensor]:
        x = nested(_behind(i).x)
        if case.name == "mean_pool":
            return {"bag": x.mean(dim=1)}
        scores = nested(i.parameters["scores"]) if "scores" in i.parameters else _scores(case, replace(i, x=x))
        # By hand: PyTorch 2.13 differentiates a softmax over the ragged dimension as one over all instances, and a
        # sum over it not at all; only products over it have the right gradients.
        e = torch.exp(scores - scores.detach().amax(dim=1, keepdim=True)).transpose(1, 2)
        total = torch.matmul(e, nested(ones))
        return {"bag": torch.matmul(e, x) / total}

    return compute, inputs


def refuses_accumulate(case: OpCase, inputs: Inputs) -> str:
    return "" if "attention" in case.tags else "no attention network whose hidden units it could compute again"


def accumulate(case: OpCase, inputs: Inputs, static: bool) -> Prepared:
    """The scores in slices of instances, whose hidden units the backward computes again."""

    def scores_of(i: Inputs, x: Tensor, start: int) -> Tensor:
        slices, drops = [], bool(i.options["dropout_p"])
        for part in x.split(SLICE):  # not x[s:e], whose gradient is as large as that of x for every slice
            rows = i.rows(start, start + len(part))
            given = (part, rows, i.options)
            result = checkpoint(attention_scores_eager, *given, use_reentrant=False, preserve_rng_state=drops)
            slices.append(result["scores"])
            start += len(part)
        return torch.cat(slices)

    def compute(i: Inputs) -> dict[str, Tensor]:
        if not case.takes_offsets:
            return {"scores": scores_of(i, i.x, 0)}
        i, starts = _behind(i), [start for start, _ in i.bounds()]
        bags = zip(i.x.split(i.lengths), starts, strict=True)
        pooled = [softmax_pool_eager(x, {"scores": scores_of(i, x, start)}, {})["bag"] for x, start in bags]
        return {"bag": torch.stack(pooled)}

    return compute, inputs
