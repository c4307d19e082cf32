"""Every op and its variants as a table, and what is done with an entry of it: make tensors, compute outputs and
gradients on a backend and by the oracle, compare.  The tests of the reference and of the kernels share it."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable

import oracle
import pytest
import torch
from functional_cases import is_required, takes
from oracle import INF
from torch import Tensor

import milkernels
from milkernels import native, testing, triton

NAN = float("nan")
SEED = 2**40 + 7
LENGTHS = (4, 0, 1, 7, 2, 3)
# Width, hidden units (of a linear query: Q), heads, classes, units of a second query layer, of a value.
SMALL = {"L": 6, "D": 5, "K": 2, "C": 3, "Q2": 4, "V": 3}


def has_kernel(op: str, backend: str, needs=(), device="cpu") -> bool:
    """Whether the backend serves calls of the op that need this for tensors on that device; where it was not built,
    whether it would."""
    absent = native.load_error(device) if backend == "native" else triton.load_error()
    return absent is not None or milkernels.backends.why_not(backend, op, device, needs=needs) is None


def offsets_of(lengths, dtype=torch.int64) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


_ENOUGH = 16  # numbers in each draw, to compare two errors of them


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: sizes of tensors by argument name (see SMALL; "N": rows, "B": bags), and other arguments."""

    op: str
    tensors: dict[str, tuple]
    options: dict = dataclasses.field(default_factory=dict)
    fixed: dict[str, tuple] = dataclasses.field(default_factory=dict)  # tensors that take no gradient
    bags: bool = True  # takes offsets
    edit: Callable[[dict[str, Tensor]], None] | None = None  # writes what random numbers do not have
    embed: dict | None = None  # of tensors e_weight and e_bias: activation and dropout_p
    lead: float = 6  # by which the logit of a class's winner is raised where features have a mean

    @property
    def kernel(self) -> str:
        """The name by which backends know the op."""
        return self.op.removeprefix("gated_")

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs of a backend beyond its op."""
        layered = self.options.get("v_activation") in ("relu", "tanh", "gelu") or self.options.get("v_dropout_p")
        found = {"embed": self.embed is not None, "q2": "q2_weight" in self.tensors, "value": layered}
        return tuple(name for name, needed in found.items() if needed)

    def make(
        self, lengths=LENGTHS, dtype=torch.float64, seed=0, parameter_dtype=None, relu=False, **sizes
    ) -> dict[str, Tensor]:
        """Tensors by name, those of ``fixed`` last; ``relu`` gives features with a mean."""
        generator = torch.Generator().manual_seed(seed)
        symbols = SMALL | sizes | {"N": sum(lengths), "B": len(lengths)}
        symbols["E"] = 2 * symbols["L"] - 3

        def randn(name, size):
            size = [symbols.get(s, s) for s in size]
            t = torch.randn(size, generator=generator, dtype=torch.float64)
            if name == "e_weight" or (relu and name != "x"):
                t = t / size[-1] ** 0.5
            elif relu:
                t = t.relu()
            return t.to(dtype if name == "x" or parameter_dtype is None else parameter_dtype)

        made = {name: randn(name, size) for name, size in (self.tensors | self.fixed).items()}
        if relu:  # keeps units off the kink of a ReLU, where rounding decides the gradient
            if "relu" in self.options.values() and "v_bias" in made:
                made["v_bias"] += 5
            if "q2_bias" in made:
                made["q_bias"] += 3
                if self.embed is not None:  # whose units are about 5
                    made["q_weight"] /= 6
            if "e_bias" in made:
                made["e_bias"] += 5 - 10 * (torch.arange(len(made["e_bias"])) % 2)  # every other one is off
        if self.op in ("instance_max", "dsmil") and relu:  # a clear winner for each bag and class
            for start, end in itertools.pairwise(offsets_of(lengths).tolist()):
                for c, w in enumerate(self._class_vectors(made).to(dtype) if start < end else ()):
                    made["x"][min(start + c, end - 1)] += self.lead * w / (w @ w)
        if self.edit is not None:
            self.edit(made)
        return {name: t.requires_grad_(name in self.tensors) for name, t in made.items()}

    def _class_vectors(self, made) -> Tensor:
        """What moves each class's logit [C, L]: W, or that through the units of the embedding that are on."""
        if self.embed is None:
            return made["weight"]
        return (made["weight"] * (made["e_bias"] > 0)) @ made["e_weight"]

    def ours(self, backend):
        """The public function on that backend, as a function of (tensors, offsets, mask)."""

        def compute(tensors, offsets, mask) -> tuple[Tensor, ...]:
            bags = {"offsets": offsets} if self.bags else {}
            if self.op == "attention_weights":
                pooled = milkernels.softmax_pool(**tensors, **bags, mask=mask, backend="reference")
                return (milkernels.attention_weights(pooled, offsets, backend=backend),)
            embed = {f"e_{name}": value for name, value in (self.embed or {}).items()}
            arguments = testing.public_arguments(self.op, tensors | self.options | embed)
            out = getattr(milkernels, self.op)(**arguments, **bags, mask=mask, backend=backend)
            return (out,) if isinstance(out, Tensor) else tuple(out)

        return compute

    def truth(self, tensors, offsets, mask) -> tuple[Tensor, ...]:
        options = {k: v for k, v in self.options.items() if k != "seed"}
        n = next(iter(tensors.values())).shape[0]
        if p := options.get("dropout_p"):
            units = tensors["v_weight"].shape[0]
            options["keep"] = [oracle.dropout_keep(SEED, n, units, branch, p) for branch in (0, 1)]
        if self.embed is not None:
            tensors = dict(tensors)
            weight, bias, p = tensors.pop("e_weight"), tensors.pop("e_bias", None), self.embed.get("dropout_p", 0)
            keep = oracle.dropout_keep(SEED, n, weight.shape[0], 3, p) if p else None
            tensors["x"] = oracle.embedded(tensors["x"], weight, bias, self.embed["activation"], p, keep, mask)
        if p := options.get("v_dropout_p"):
            options["keep"] = oracle.dropout_keep(SEED, n, tensors["x"].shape[1], 2, p)
        bags = {"offsets": offsets} if self.bags else {}
        return getattr(oracle, self.op)(**tensors, **options, **bags, mask=mask)

    def dropped(self) -> bool:
        return "seed" in self.options

    def heads(self, results) -> dict[str, int]:
        """The dimension along which those of its outputs and gradients that have heads or classes have them, where each
        has enough numbers: the error of a few, such as a bias or the lse of two bags, may be small by luck."""
        sizes = self.tensors | self.fixed
        if not any({"K", "C"} & set(size) for size in sizes.values()):
            return {}
        found = {name: 1 for name in results if name.startswith("output")}
        for name, size in ((name, size) for name, size in sizes.items() if len(size) > 1):
            found |= {f"gradient of {name}": i for i, symbol in enumerate(size) if symbol in ("K", "C")}
        return {
            name: dim
            for name, dim in found.items()
            if name in results and results[name].numel() >= _ENOUGH * results[name].shape[dim]
        }

    def has_rows(self, name: str) -> bool:
        """Whether the tensor has one row per instance."""
        return (self.tensors | self.fixed)[name][0] == "N"


def _dead_scores(t):
    """Rows that do not count for the first head, for no head, and a bag of one row that does not for the last."""
    t["scores"][2::7, 0] = -INF
    t["scores"][3::11] = -INF
    t["scores"][0:5:4, -1] = -INF


def _nan_behind_dead_scores(t):
    _dead_scores(t)
    t["x"][3::11] = NAN


def _whole_numbers(t):
    """Few of them, so that many rows tie exactly, in every type."""
    for name, values in t.items():
        values.copy_(values.sign() if name in ("weight", "bias") else values.round().clamp(-1, 1))


DROPPED = {"dropout_p": 0.4, "seed": SEED}
V_DROPPED = {"v_dropout_p": 0.4, "seed": SEED}


def _case(op: str, *absent: str, sizes=None, edit=None, **options) -> Case:
    """A call of the op with the tensors that the registry has for it, but those of layers that are ``absent``: by their
    prefixes, or "bias" for all of them.  ``sizes`` of some may be others."""
    tensors = {
        name: size
        for name, size in (testing.SIZES[op] | (sizes or {})).items()
        if name.rpartition("_")[0] not in absent and ("bias" not in absent or not name.endswith("bias"))
    }
    fixed = {name: tensors.pop(name) for name in testing.FIXED[op]}
    return Case(op, tensors, options, fixed, bags=takes(op, "offsets"), edit=edit)


def _embedded(case: Case, activation: str, dropout_p: float = 0.0, *, bias: bool = True) -> Case:
    """The same op on embedded instances, E wide."""
    tensors = dict(testing.embedded_sizes(case.tensors))
    if not bias:
        del tensors["e_bias"]
    options = case.options | ({"seed": SEED} if dropout_p else {})
    embed = {"activation": activation, "dropout_p": dropout_p}
    return dataclasses.replace(case, tensors=tensors, options=options, embed=embed)


def _given_instances(case: Case) -> Case:
    """`dsmil_pool` of critical instances that are given, not chosen by logits."""
    return dataclasses.replace(case, tensors=case.tensors | {"instance_logits": ("B", "C", "L")}, fixed={})


def _plain(op: str) -> Case:
    options = testing.CASES[op].options
    return _case(op, **{name: value for name, value in options.items() if is_required(op, name)})


ONE_HEAD = {"w_weight": (1, "D")}
SHARED = {"query": ("K", "L")}
CASES = {op: _plain(op) for op in testing.SIZES}
CASES |= {
    "softmax_pool-dead-scores": _case("softmax_pool", edit=_dead_scores),
    "softmax_pool-nan-behind-dead-scores": _case("softmax_pool", edit=_nan_behind_dead_scores),
    "attention_pool-relu": _case("attention_pool", activation="relu"),
    "attention_pool-gelu-dropout": _case("attention_pool", activation="gelu", **DROPPED),
    "attention_pool-identity-no-bias": _case(
        "attention_pool", "bias", sizes=ONE_HEAD, activation="identity", v_bias=None, w_bias=None
    ),
    "gated_attention_pool-dropout": _case("gated_attention_pool", **DROPPED),
    "gated_attention_pool-no-bias": _case(
        "gated_attention_pool", "bias", sizes=ONE_HEAD, v_bias=None, u_bias=None, w_bias=None
    ),
    "gated_attention_scores": _case("gated_attention_scores", **DROPPED),
    "query_pool-shared": _case("query_pool", sizes=SHARED, scale=0.3),
    "query_scores-shared": _case("query_scores", sizes=SHARED),
    "query_scores": _case("query_scores", scale=0.3),
    "instance_max-no-bias": _case("instance_max", "bias"),
    "instance_max-ties": _case("instance_max", edit=_whole_numbers),
    "dsmil_pool": _case("dsmil_pool", "q2", "v"),
    "dsmil_pool-no-bias-scale-1": _case("dsmil_pool", "q2", "v", "bias", scale=1.0),
    "dsmil_pool-linear-v": _case("dsmil_pool", "q2"),
    "dsmil_pool-linear-v-no-bias": _case("dsmil_pool", "q2", "bias", v_activation="identity"),
    "dsmil_pool-linear-v-dropout": _case("dsmil_pool", "q2", **V_DROPPED),
    "dsmil_pool-relu-v": _case("dsmil_pool", "q2", v_activation="relu"),
    "dsmil_pool-relu-v-dropout": _case("dsmil_pool", "q2", v_activation="relu", **V_DROPPED),
    "dsmil_pool-mlp-q": _case("dsmil_pool", "v"),
    "dsmil_pool-mlp-q-linear-v": _case("dsmil_pool"),
    "dsmil_pool-mlp-q-relu-v": _case("dsmil_pool", v_activation="relu", **V_DROPPED),
    "dsmil_pool-mlp-q-tanh-v": _case("dsmil_pool", v_activation="tanh", **V_DROPPED),
    "dsmil_pool-mlp-q-gelu-v": _case("dsmil_pool", v_activation="gelu", scale=0.3, **V_DROPPED),
    "dsmil_pool-mlp-q-no-bias": _case("dsmil_pool", "bias", v_activation="relu"),
    "dsmil_pool-given-linear-v": _given_instances(_case("dsmil_pool", "q2")),
    "dsmil_pool-given-mlp-q-relu-v": _given_instances(_case("dsmil_pool", v_activation="relu", **V_DROPPED)),
    "dsmil": _case("dsmil", "q2"),
    "dsmil-mlp-q-relu-v": _case("dsmil", v_activation="relu", scale=0.3, **V_DROPPED),
    "dsmil-no-bias": _case("dsmil", "q2", "v", "bias", bias=None),
    "loss_attention_pool-one-class": _case("loss_attention_pool", "bias", sizes={"weight": (1, "L")}),
    "max_pool-ties": _case("max_pool", edit=_whole_numbers),
    "segment_softmax-dead-scores": _case("segment_softmax", edit=_dead_scores),
    # They take what a pooling returned, of instances and scores.
    "attention_weights": Case("attention_weights", testing.SIZES["softmax_pool"]),
    "attention_weights-dead-scores": Case("attention_weights", testing.SIZES["softmax_pool"], edit=_dead_scores),
    "topk_instances": _case("topk_instances", k=3),
    "topk_instances-dead-scores": _case("topk_instances", k=70, edit=_dead_scores),
    "topk_instances-ties": _case("topk_instances", k=9, edit=_whole_numbers),
    "topk_instances-smallest": _case("topk_instances", k=3, largest=False, edit=_dead_scores),
}
CASES |= {
    "attention_pool-embed-gelu": _embedded(CASES["attention_pool"], "gelu", bias=False),
    "gated_attention_pool-embed-dropout": _embedded(CASES["gated_attention_pool-dropout"], "relu", 0.3),
    "attention_scores-embed": _embedded(CASES["attention_scores"], "tanh"),
    "query_pool-embed-dropout": _embedded(CASES["query_pool"], "identity", 0.3),
    "query_scores-embed": _embedded(CASES["query_scores-shared"], "relu"),
    "instance_max-embed-dropout": _embedded(CASES["instance_max"], "relu", 0.3),
    "dsmil_pool-embed": _embedded(CASES["dsmil_pool-linear-v"], "relu"),
    "dsmil_pool-given-embed": _embedded(CASES["dsmil_pool-given-linear-v"], "relu", 0.3),
    "dsmil-embed-mlp-q-relu-v": _embedded(CASES["dsmil-mlp-q-relu-v"], "relu", 0.3),
    "loss_attention_pool-embed": _embedded(CASES["loss_attention_pool"], "relu"),
}
PLAIN = {name: case for name, case in CASES.items() if "-" not in name}  # one case of each op
POOLS = {name: case for name, case in PLAIN.items() if name.endswith("_pool")}


# Outputs and gradients


def cotangents(outputs, seed=1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def step(compute, tensors, offsets, mask, wanted=None) -> dict[str, Tensor]:
    """All outputs of a call and all gradients, by name; ``wanted`` are the outputs that are differentiated."""
    outputs = compute(tensors, offsets, mask)
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    chosen = [i for i in range(len(outputs)) if wanted is None or i in wanted]
    gradients = oracle.gradients(
        [outputs[i] for i in chosen], leaves.values(), [c for i, c in enumerate(cotangents(outputs)) if i in chosen]
    )
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


def close(got, expected, tolerance=1e-10, equal_nan=False) -> None:
    assert got.keys() == expected.keys()
    for name, t in got.items():
        torch.testing.assert_close(
            t,
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=equal_nan,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def same_bits(got, expected) -> None:
    assert got.keys() == expected.keys()
    for name, t in got.items():
        assert torch.equal(t, expected[name]), name  # NaN equals nothing


# Checks that the reference and the kernels pass alike, at sizes of their own


def promise(case, backend, dtype, parameter_dtype=None, *, lengths, seeds, **sizes) -> testing.Promise:
    """The error promise over several seeds together: few numbers are too few to compare two errors."""
    offsets, runs = offsets_of(lengths), []
    for seed in range(seeds):
        tensors = case.make(lengths, dtype, seed, parameter_dtype, relu=True, **sizes)
        # Where types are mixed, eager PyTorch runs under autocast.
        with torch.autocast("cpu", dtype, enabled=parameter_dtype is not None):
            eager = step(case.truth, tensors, offsets, None)
        runs.append((step(case.ours(backend), tensors, offsets, None), eager, exactly(case, tensors, offsets)))
    heads = {name: dim + 1 for name, dim in case.heads(runs[0][0]).items()}  # behind the seeds
    return testing.error_promise(*(together(results) for results in zip(*runs, strict=True)), dtype, heads)


def exactly(case, tensors, offsets) -> dict[str, Tensor]:
    """Outputs and gradients by the oracle in float64, for the same numbers."""
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    return step(case.truth, exact, offsets, None)


def together(results) -> dict[str, Tensor]:
    """The results of several runs as one, indices as numbers."""
    joined = {name: torch.stack([r[name] for r in results]) for name in results[0]}
    return {n: t if t.is_floating_point() else t.double() for n, t in joined.items()}


def check_masked_rows_do_not_leak(case, backend, lengths, offsets, mask, poison, dtype, **sizes) -> None:
    """The same bits whatever masked rows hold, and no gradient there."""

    def filled(value):
        tensors = case.make(lengths, dtype, **sizes)
        for name, t in tensors.items():
            if case.has_rows(name):
                t.data[~mask] = value
        return step(case.ours(backend), tensors, offsets, mask)

    got = filled(poison)
    same_bits(got, filled(1.0))
    for name in case.tensors:
        if case.has_rows(name):
            assert not got[f"gradient of {name}"][~mask].any()


def check_nan_stays_in_its_bag(case, backend, lengths, bag, row, dtype=torch.float32, poison=NAN, **sizes) -> None:
    offsets = offsets_of(lengths)
    assert offsets[bag] <= row < offsets[bag + 1]

    def filled(value):
        tensors = case.make(lengths, dtype, **sizes)
        for name, t in tensors.items():
            if case.has_rows(name):
                t.data[row] = value
        return step(case.ours(backend), tensors, offsets, None)

    clean, got = filled(0.0), filled(poison)
    bags, rows = torch.arange(len(lengths)) != bag, torch.ones(sum(lengths), dtype=torch.bool)
    rows[offsets[bag] : offsets[bag + 1]] = False
    for name, t in got.items():
        if name.startswith("gradient") and not case.has_rows(name.split()[-1]):
            continue  # parameters gather all rows
        others = bags if t.shape[0] == len(lengths) else rows
        assert torch.equal(t[others], clean[name][others]), name
    if case.kernel != "topk_instances" and poison != poison:
        assert got["output 0"].isnan().any()
        parameters = [got[f"gradient of {name}"] for name in case.tensors if not case.has_rows(name)]
        assert not parameters or any(g.isnan().any() for g in parameters)  # they show it, as in eager


def check_gradients(case, backend, lengths, mask, check=torch.autograd.gradcheck, **sizes) -> None:
    """Numerical differences against the gradients of all outputs together."""
    tensors = case.make(lengths, **sizes)
    names = [name for name, t in tensors.items() if t.requires_grad]

    def compute(*values):
        out = case.ours(backend)(tensors | dict(zip(names, values, strict=True)), offsets_of(lengths), mask)
        # Numerical differences of -inf are NaN.
        return [o.masked_fill(o.isinf(), 0) for o in out if o.is_floating_point()]

    assert check(compute, [tensors[name] for name in names])


# The kernels


@contextlib.contextmanager
def threads(count: int):
    """Within the block PyTorch has that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


COMPILED = {name: case for name, case in CASES.items() if has_kernel(case.kernel, "native", case.needs)}
every_kernel = pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
# What concerns the kernels of the CPU alone: how many threads, which units.
of_the_cpu = pytest.mark.skipif(native.emulated(), reason="of the CPU's kernels, where CUDA's are emulated")
needs_extension = pytest.mark.skipif(native.load_error() is not None, reason=f"no extension: {native.load_error()}")


def compiled(*names: str):
    """Parametrises over those cases that have a kernel."""
    chosen = {name: COMPILED[name] for name in names if name in COMPILED}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)
