"""A call of any op as one value that can be written down: what `make fuzz` draws, shrinks and prints, and what the
tests of what it found are made of.  `check` holds it against the oracle.

The criterion is the error promise.  One draw may break it by luck, for eager's error of a few numbers may be small;
so what breaks it is drawn again, and eight draws together have to keep it, or 64, or each result nearly all of
these alone, or as many as eager would break by the same luck.
"""

import collections
import dataclasses
import functools
from unittest import mock

import oracle
import torch
from functional_cases import takes
from op_cases import NAN, SEED, Case, has_kernel, offsets_of, same_bits, step, threads, together
from oracle import INF

import milkernels
from milkernels import native, testing
from milkernels.testing import promise
from milkernels.testing.philox import dropout_keep

_CLEAR = {torch.float64: 1e-8, torch.float32: 1e-3}  # by how much a winner wins, of the largest logit; of half types:
_CLEAR_HALF = 0.1
_DRAWS = (8, 64)  # that keep the promise together
_CANCELLED = 8  # roundings of the summands of what cancels
_LUCK = 4.0  # of one draw
_FAR = 30  # times the bound is no luck, if it is more than
_ROUNDINGS = 8  # of a result: eager may have few values exactly
_ROUNDED = 1e-13  # what the oracle itself rounds: the derivative of a tanh near 1 is 0 there, and 4 exp(-2 x) is not
_EXACT = 1e-11  # error of float64, of the size of a result
_LAYERS = ("v", "u", "w", "q", "q2", "")  # that a bias may be missing from
_BIASES = tuple(f"{layer}_bias".lstrip("_") for layer in _LAYERS)
MASK_TYPES = {"bool": torch.bool, "uint8": torch.uint8, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Call:
    """Its repr names what differs from the plainest call, and is the call again."""

    op: str
    lengths: tuple[int, ...] = (3,)
    dtype: str = "float64"
    parameter_dtype: str | None = None
    autocast: bool = False
    sizes: tuple[tuple[str, int], ...] = ()  # by symbol (see op_cases.SMALL); others are 2
    absent: tuple[str, ...] = ()  # layers, and biases, that are not given
    options: tuple[tuple[str, object], ...] = ()
    embed: tuple[str, float] | None = None  # activation and share of dropped units of the layer in front
    shared: bool = False  # one query for all bags
    mask: str | None = None  # holes, prefix, all or none: which rows are real
    mask_type: str = "bool"
    index: str | None = "int64"  # type of the offsets; None: none are given
    as_bags: bool = False  # given as Bags
    layout: str = "contiguous"
    data: str = "relu"  # noise; outlier: one row is large; whole: numbers that tie; dead: scores of -inf
    grads: str = "all"  # frozen: not of x; none; or the name of one tensor
    wanted: int | None = None  # the only output that is differentiated
    transform: str = "plain"  # vmap, compile
    threads: int = 1  # the same bits with so many as with one
    saved_bytes: int | None = 64 << 20  # in float32 and float64 the same bits as with 0
    seed: int = 0

    def __repr__(self):
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Call({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @functools.cached_property
    def type(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @functools.cached_property
    def case(self) -> Case:
        """The same as an entry of the table that the tests share."""
        op = "softmax_pool" if self.op == "attention_weights" else self.op
        sizes = dict(testing.SIZES[op]) | ({"query": ("K", "L")} if self.shared else {})
        kept = {n: s for n, s in sizes.items() if n not in self.absent and n.rpartition("_")[0] not in self.absent}
        missing = {n: None for n in self.absent if n in _BIASES and n in sizes}
        options = dict(self.options) | missing
        if any("dropout_p" in name for name in options) or (self.embed and self.embed[1]):
            options["seed"] = SEED
        embed = None
        if self.embed is not None:
            kept = testing.embedded_sizes(kept)
            kept = {n: s for n, s in kept.items() if n not in self.absent}
            embed = {"activation": self.embed[0], "dropout_p": self.embed[1]}
        fixed = {name: kept.pop(name) for name in testing.FIXED[op]}
        return Case(self.op, kept, options, fixed, bags=takes(self.op, "offsets"), embed=embed)

    def has_relu(self) -> bool:
        """Where rounding may move a unit across a kink."""
        in_front = self.embed is not None and self.embed[0] == "relu"
        return in_front or "relu" in dict(self.options).values() or "q2_weight" in self.case.tensors

    def chooses(self) -> bool:
        """Whether rounding may change which row is chosen."""
        return self.op in ("instance_max", "dsmil")

    def mask_of_rows(self) -> torch.Tensor:
        """Which rows are real, bool."""
        n = sum(self.lengths)
        if self.mask in (None, "all"):
            return torch.ones(n, dtype=torch.bool)
        if self.mask == "none":
            return torch.zeros(n, dtype=torch.bool)
        if self.mask == "prefix":  # as padding leaves it
            return torch.cat([torch.arange(m) < (m + b) // 2 for b, m in enumerate(self.lengths)])
        generator = torch.Generator().manual_seed(self.seed)
        real = torch.rand(n, generator=generator) > 0.3
        real[64:128] = False  # a whole tile
        return real

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        real, case = self.mask_of_rows(), self.case
        lengths = [int(part.sum()) for part in real.split(self.lengths)] if self.lengths else []
        symbols = {"K": 2, "C": 2, "L": 2, "D": 2, "Q2": 2, "V": 2} | dict(self.sizes)
        parameter_dtype = self.parameter_dtype and getattr(torch, self.parameter_dtype)
        # Rows that are real are drawn alone, so that each bag's winners are among them.
        made = case.make(lengths, self.type, seed, parameter_dtype, relu=self.data != "noise", **symbols)
        made = {name: t.detach() for name, t in made.items()}
        self._edit(made)
        for name, t in made.items():
            if case.has_rows(name) and self.mask is not None:
                made[name] = t.new_full((len(real), *t.shape[1:]), NAN).index_put((real.nonzero()[:, 0],), t)
        made = {name: laid_out(t, self.layout) for name, t in made.items()}
        wants = {"all": case.tensors, "frozen": [n for n in case.tensors if n != "x"], "none": ()}
        return {n: t.requires_grad_(n in wants.get(self.grads, (self.grads,))) for n, t in made.items()}

    def _edit(self, made) -> None:
        first = next(iter(made.values()))
        if self.data == "outlier" and len(first):
            first[len(first) // 2] *= 50
        elif self.data == "whole":
            for name, t in made.items():
                t.copy_(t.sign() if name in ("weight", "bias") else t.round().clamp(-1, 1))
        elif self.data == "dead":
            made["scores"][::3, 0] = -INF
            made["scores"][1::7] = -INF


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers elsewhere; what lies between them is NaN."""
    if layout == "wide":
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 9), NAN)
        wide[..., 3:-6] = t
        return wide[..., 3:-6]
    if layout == "shifted":  # dense, and on no boundary
        flat = t.new_full((t.numel() + 1,), NAN)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)
    if layout == "every second":
        return t.repeat_interleave(2, 0)[::2]
    if layout == "transposed" and t.ndim > 1:
        return t.mT.contiguous().mT
    return t


def ours(call: Call, backend: str):
    """The call on that backend, as a function of (tensors, offsets, mask)."""
    compute = call.case.ours(backend)

    def given(tensors, offsets, mask):
        if not call.as_bags:
            return compute(tensors, offsets, mask)
        return compute(tensors | {"x": milkernels.Bags(tensors["x"], offsets, mask)}, None, None)

    if call.transform == "compile":
        torch._dynamo.reset()
        return torch.compile(given, fullgraph=True, backend="aot_eager")
    if call.transform == "vmap":
        return lambda tensors, offsets, mask: vmapped(given, tensors, offsets, mask)
    return given


def vmapped(compute, tensors, offsets, mask):
    """The second of two calls that are one."""
    both = {name: torch.stack([t.detach() / 2, t]) for name, t in tensors.items()}
    return tuple(o[1] for o in torch.vmap(lambda t: compute(t, offsets, mask))(both))


def runs_of(call: Call, backend: str, seed: int):
    """(ours, eager's, exact) results of one draw, and its tensors."""
    tensors, case = call.tensors(seed), call.case
    offsets = None if call.index is None else offsets_of(call.lengths, getattr(torch, call.index))
    real = call.mask_of_rows()
    mask = None if call.mask is None else real.to(MASK_TYPES[call.mask_type])
    wanted = None if call.wanted is None else (call.wanted,)
    with mock.patch.object(oracle, "dropout_keep", _keep):
        exact_tensors = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in tensors.items()}
        exact = step(case.truth, exact_tensors, offsets, mask, wanted)
        # Where types are mixed, eager PyTorch runs under autocast.
        with torch.autocast("cpu", _half(call), enabled=call.parameter_dtype is not None or call.autocast):
            dense = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
            dense = {n: t.requires_grad_(tensors[n].requires_grad) for n, t in dense.items()}
            eager = step(case.truth, dense, offsets, mask, wanted) if call.type != torch.float64 else exact
    with torch.autocast("cpu", _half(call), enabled=call.autocast), milkernels.saved_bytes(call.saved_bytes):
        got = step(ours(call, backend), tensors, offsets, mask, wanted)
        if call.threads > 1:
            with threads(call.threads):
                same_bits(step(ours(call, backend), tensors, offsets, mask, wanted), got)
        if call.saved_bytes != 64 << 20 and _keeps_bits(call):
            with milkernels.saved_bytes(0):
                same_bits(step(ours(call, backend), tensors, offsets, mask, wanted), got)
    for name, t in tensors.items():
        if t.requires_grad and case.has_rows(name):
            assert not got[f"gradient of {name}"][~real].any(), f"gradient of {name}: a masked row has one"
    return got, eager, exact, (exact_tensors, offsets, mask)


def _keeps_bits(call: Call) -> bool:
    """Whether what is saved may not change them. A library's products, which serve the emulated device, round by where
    the rows lie."""
    if call.layout == "shifted" and leg() == "emulated":
        return False
    return call.type in (torch.float32, torch.float64) and not call.autocast


def _half(call: Call) -> torch.dtype:
    return call.type if call.type in (torch.float16, torch.bfloat16) else torch.bfloat16


@functools.lru_cache
def _keep(seed, rows, units, branch, p):
    return dropout_keep(seed, rows, units, branch, p)  # as the oracle's own, for all counters at once


def unclear(call: Call, exact) -> bool:
    """Whether a winner hardly wins, so that rounding may choose another."""
    if not call.chooses() or call.data == "whole":
        return False
    logits = [t for name, t in exact.items() if name.startswith("output")][-1]
    clear = _CLEAR_HALF if call.autocast else _CLEAR.get(call.type, _CLEAR_HALF)
    for part in logits.split(call.lengths):
        part = part[part[:, 0] != -INF]
        if len(part) > 1:
            first, second = part.topk(2, 0).values
            if (first - second).min() < clear * part.abs().max().clamp(min=1):
                return True
    return False


def overflowed(eager, exact) -> bool:
    """Whether eager PyTorch, in half types, leaves their range and says nothing."""
    return any((~eager[name].isfinite() & t.isfinite()).any() for name, t in exact.items())


def cancelled(call: Call, tensors, offsets, mask) -> dict[str, float]:
    """The size of the summands of gradients that come through a softmax, whose shifts cancel: where all do, as in bags
    of one instance, nothing but rounding is left."""
    case = call.case
    outputs = case.truth(tensors, offsets, mask)
    if len(outputs) < 3 or outputs[0].ndim != 3 or call.op == "topk_instances":
        return {}
    rows = oracle.real_rows(len(outputs[1]), offsets, mask)
    sent = torch.zeros_like(outputs[1])
    for b, r in enumerate(rows):
        weights = torch.softmax(outputs[1][r].detach(), 0).nan_to_num()
        sizes = outputs[0][b].detach().norm(dim=1)[None]  # [1, K]; and of the rows, [n, 1]
        if "x" in tensors and tensors["x"].shape[1] == outputs[0].shape[2]:
            sizes = torch.maximum(sizes, tensors["x"][r].detach().norm(dim=1)[:, None])
        sent[r] = weights * sizes * outputs[0].shape[2] ** 0.5
    leaves = {n: t for n, t in tensors.items() if t.requires_grad}
    found = oracle.gradients([outputs[1]], leaves.values(), [sent])
    return {f"gradient of {n}": float(g.norm()) for n, g in zip(leaves, found, strict=True)}


def verdict(call: Call, backend: str, seeds, cancels: bool = True) -> promise.Promise | None:
    """Of these draws together, ``cancels``: with what rounding leaves of sums that cancel; None where none is clear."""
    runs = [runs_of(call, backend, seed) for seed in seeds]
    runs = [run for run in runs if not unclear(call, run[2]) and not overflowed(*run[1:3])]
    if not runs:
        return None
    single = len(seeds) == 1
    got, eager, exact = (together(results) for results in list(zip(*runs, strict=True))[:3])
    heads = {name: dim + 1 for name, dim in call.case.heads(runs[0][0]).items()}  # behind the draws
    got, eager, exact = (promise.by_head(results, heads) for results in (got, eager, exact))
    reference = promise.Reference(exact)
    errors = promise.errors_of(eager, reference)
    if call.type == torch.float64:
        errors = {name: _EXACT * max(1.0, float(t[t.isfinite()].norm())) for name, t in exact.items()}
    allowed = dict.fromkeys(got, _ROUNDED)
    if cancels:
        eps = torch.finfo(torch.float64 if call.type == torch.float64 else torch.float32).eps
        with mock.patch.object(oracle, "dropout_keep", _keep):
            sizes = [cancelled(call, *run[3]) for run in runs]
        total = {name: _CANCELLED * eps * sum(s[name] for s in sizes) for name in sizes[0]}
        allowed = {name: _ROUNDED + total.get(name.partition("[")[0], 0.0) for name in got}
    return promise.promise_from_errors(got, errors, reference, call.type, _LUCK if single else 0.0, allowed)


def check(call: Call, backend: str = "native") -> str:
    """Raises an AssertionError where the call breaks the promise; else how it was found to be kept."""
    seen = verdict(call, backend, [call.seed], cancels=False)
    if seen is None:
        return "unclear"
    if seen.ok:
        return "kept"
    if not call.has_relu():  # whose kink rounding crosses in single draws
        seen = verdict(call, backend, [call.seed])
        luck = _ROUNDINGS * torch.finfo(_half(call) if call.autocast else call.type).eps
        wrong = [v for v in seen.verdicts if v.reason or not v.ours <= max(_FAR * v.bound, luck * v.size)]
        assert not wrong, seen.broken()
    first = call.seed + 1
    for draws in _DRAWS:
        seen = verdict(call, backend, range(first, first + draws))
        if seen is None or seen.ok:
            return f"kept by {draws} draws"
    # A few draws may be all of the error where a few numbers are large. Luck goes both ways: as often eager is unlucky.
    alone = [verdict(call, backend, [seed]) for seed in range(first, first + _DRAWS[-1])]
    alone = [v for one in alone if one is not None for v in one.verdicts]
    broken = collections.Counter(v.name for v in alone if not v.ok)
    lucky = collections.Counter(v.name for v in alone if v.eager > 2 * v.ours)
    by_luck = all(often <= max(_DRAWS[-1] // 8, lucky[name]) for name, often in broken.items())
    if by_luck and not any(v.reason for v in alone):
        return "broken by few draws"
    raise AssertionError(seen.broken())


def leg() -> str:
    """What serves ``native`` in this process."""
    if native.emulated():
        return "emulated"
    return native.build_info().get("module", "none").split("_")[2] if native.load_error() is None else "none"


def found(call: Call, *backends: str) -> None:
    """For tests: the call on every backend that has a kernel for it, or on those."""
    for backend in backends or ("native", "reference"):
        if backend == "reference" or has_kernel(call.case.kernel, backend, call.case.needs):
            check(call, backend)
