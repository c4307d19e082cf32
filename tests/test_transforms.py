"""Every op under every transform of PyTorch: the right numbers, or an error that names backend="reference"."""

import functools
import warnings

import accelerate_cases
import pytest
import torch
from op_cases import CASES, PLAIN, needs_extension, offsets_of
from torch import Tensor
from torch.autograd import forward_ad

import milkernels
from milkernels import native

SIZES = {"L": 3, "D": 2, "K": 2, "C": 2, "Q2": 2, "V": 2}
LAYOUTS = {"bags": ((3, 0, 2), torch.tensor([True, False, True, True, True])), "one-bag": ((4,), None)}
OPS = {
    name: CASES[name]
    for name in (
        *PLAIN,
        *("softmax_pool-dead-scores", "gated_attention_pool-dropout", "query_pool-shared", "query_scores-shared"),
        *("dsmil_pool-linear-v", "dsmil_pool-relu-v-dropout", "dsmil_pool-mlp-q", "dsmil-mlp-q-relu-v"),
        *("gated_attention_pool-embed-dropout", "dsmil-embed-mlp-q-relu-v"),
    )
}


class Problem:
    """A case as a function of one vector, all of its tensors, to one vector, all of its finite outputs; and what a
    plain loop of backward passes through the oracle says of it."""

    def __init__(self, case, layout: str):
        lengths, self.mask = LAYOUTS[layout]
        self.case, self.offsets = case, offsets_of(lengths) if len(lengths) > 1 else None
        tensors = case.make(lengths, **SIZES)
        if self.mask is not None:
            for name in case.tensors:
                if case.has_rows(name):
                    tensors[name].data[~self.mask] = float("nan")
        self.leaves = {name: t.detach() for name, t in tensors.items() if t.requires_grad}
        self.fixed = {name: t for name, t in tensors.items() if not t.requires_grad}
        self.point = torch.cat([t.flatten() for t in self.leaves.values()])
        # What masked rows hold is nobody's business, and a difference there would be NaN.
        self.tangent = torch.linspace(-1, 1, len(self.point), dtype=torch.float64)
        rows = self.function(self.case.truth)
        self.cotangent = torch.linspace(-1, 2, len(rows(self.point)), dtype=torch.float64)

    def function(self, compute):
        def f(vector: Tensor) -> Tensor:
            parts = vector.split([t.numel() for t in self.leaves.values()])
            tensors = {n: p.view(t.shape) for (n, t), p in zip(self.leaves.items(), parts, strict=True)}
            outputs = compute(tensors | self.fixed, self.offsets, self.mask)
            finite = [o.masked_fill(o.isinf(), 0).flatten() for o in outputs if o.is_floating_point()]
            return torch.cat(finite)

        return f

    def ours(self, backend):
        return self.function(self.case.ours(backend))

    @functools.cached_property
    def jacobian(self) -> Tensor:
        return torch.autograd.functional.jacobian(self.function(self.case.truth), self.point)

    @functools.cached_property
    def hessian(self) -> Tensor:
        f = self.function(self.case.truth)
        return torch.autograd.functional.hessian(lambda v: self.scalar(f)(v), self.point)

    def scalar(self, f):
        # Not linear in f, so that the second derivative of a linear op is not 0.
        return lambda v: (f(v) * self.cotangent).sum() + f(v).square().sum()

    @functools.cached_property
    def gradient(self) -> Tensor:
        f = self.function(self.case.truth)
        return torch.autograd.functional.jacobian(lambda v: self.scalar(f)(v), self.point)


@functools.cache
def problem(name: str, layout: str) -> Problem:
    return Problem(OPS[name], layout)


def dual(f, p: Problem) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(p.point, p.tangent))).tangent


def leaf(p: Problem) -> Tensor:
    return p.point.clone().requires_grad_()


def double_backward(f, p: Problem) -> Tensor:
    v = leaf(p)
    (first,) = torch.autograd.grad(p.scalar(f)(v), v, create_graph=True)
    return torch.stack([torch.autograd.grad(g, v, retain_graph=True)[0] for g in first])


def grads_batched(f, p: Problem) -> Tensor:
    v = leaf(p)
    out = f(v)
    eye = torch.eye(len(out), dtype=torch.float64)
    return torch.autograd.grad(out, v, eye, is_grads_batched=True)[0]


def twice(point: Tensor) -> Tensor:
    return torch.stack([point, point])


def vmap_backward(f, p: Problem) -> Tensor:
    v = twice(p.point).requires_grad_()
    return torch.autograd.grad(torch.func.vmap(p.scalar(f))(v).sum(), v)[0]


# Each a function of (f, problem), and what it should give by the oracle's derivatives.
TRANSFORMS = {
    "jvp": (lambda f, p: torch.func.jvp(f, (p.point,), (p.tangent,))[1], lambda p: p.jacobian @ p.tangent),
    "dual": (dual, lambda p: p.jacobian @ p.tangent),
    "vjp": (lambda f, p: torch.func.vjp(f, p.point)[1](p.cotangent)[0], lambda p: p.cotangent @ p.jacobian),
    "grad": (lambda f, p: torch.func.grad(p.scalar(f))(p.point), lambda p: p.gradient),
    "jacrev": (lambda f, p: torch.func.jacrev(f)(p.point), lambda p: p.jacobian),
    "jacfwd": (lambda f, p: torch.func.jacfwd(f)(p.point), lambda p: p.jacobian),
    "vmap": (lambda f, p: torch.func.vmap(f)(twice(p.point)), lambda p: twice(p.function(p.case.truth)(p.point))),
    "vmap of a backward": (vmap_backward, lambda p: twice(p.gradient)),
    "vmap(grad)": (
        lambda f, p: torch.func.vmap(torch.func.grad(p.scalar(f)))(twice(p.point)),
        lambda p: twice(p.gradient),
    ),
    "hessian": (lambda f, p: torch.func.hessian(p.scalar(f))(p.point), lambda p: p.hessian),
    "double backward": (double_backward, lambda p: p.hessian),
    "is_grads_batched": (grads_batched, lambda p: p.jacobian),
    "jacobian(vectorize=True)": (
        lambda f, p: torch.autograd.functional.jacobian(f, p.point, vectorize=True),
        lambda p: p.jacobian,
    ),
    "jacobian(forward-mode)": (
        lambda f, p: torch.autograd.functional.jacobian(f, p.point, vectorize=True, strategy="forward-mode"),
        lambda p: p.jacobian,
    ),
    "functional.hessian(vectorize=True)": (
        lambda f, p: torch.autograd.functional.hessian(p.scalar(f), p.point, vectorize=True),
        lambda p: p.hessian,
    ),
}


def check(transform: str, f, p: Problem) -> None:
    got, expected = TRANSFORMS[transform][0](f, p), TRANSFORMS[transform][1](p)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, equal_nan=False)


quiet = pytest.mark.filterwarnings(
    "ignore:milkernels. .* runs on the reference", "ignore:Attempted to insert a get_attr", "ignore:.torch.jit.script"
)
every_op = pytest.mark.parametrize("name", OPS)
every_transform = pytest.mark.parametrize("transform", TRANSFORMS)
# What compiled ops can do: their backward, and a batch of calls one after the other.
COMPILED = ("vmap", "vmap of a backward", "is_grads_batched", "jacobian(vectorize=True)")
BY_NAME = 'backend="reference"'


@quiet
@every_transform
@every_op
def test_the_reference_is_right(name, transform):
    p = problem(name, "bags")
    check(transform, p.ours("reference"), p)


@quiet
@pytest.mark.parametrize("transform", ["jvp", "vmap(grad)", "hessian", "is_grads_batched"])
@pytest.mark.parametrize("name", PLAIN)
def test_the_reference_is_right_for_one_bag(name, transform):
    p = problem(name, "one-bag")
    check(transform, p.ours("reference"), p)


@quiet
@needs_extension
@every_transform
@every_op
def test_a_backend_asked_for_by_name_is_right_or_names_the_reference(name, transform):
    p = problem(name, "bags")
    if transform in COMPILED:
        check(transform, p.ours("native"), p)
    else:
        with pytest.raises(RuntimeError, match=BY_NAME):
            TRANSFORMS[transform][0](p.ours("native"), p)


@quiet
@every_transform
@every_op
def test_auto_is_right(name, transform):
    """By the reference where compiled ops cannot; only a second backward through one that has run comes too late."""
    p = problem(name, "bags")
    if transform in ("double backward", "functional.hessian(vectorize=True)") and native.load_error() is None:
        with pytest.raises(RuntimeError, match=BY_NAME):
            TRANSFORMS[transform][0](p.ours(None), p)
    else:
        check(transform, p.ours(None), p)


@quiet
@pytest.mark.parametrize("backend", ["native", "reference", None])
@pytest.mark.parametrize("name", ["softmax_pool", "gated_attention_pool", "dsmil_pool"])
def test_linearize(name, backend):
    p = problem(name, "bags")

    def tangent():
        return torch.func.linearize(p.ours(backend), p.point)[1](p.tangent)

    if backend != "native":
        torch.testing.assert_close(tangent(), p.jacobian @ p.tangent)
    elif native.load_error() is None:
        with pytest.raises(RuntimeError, match=BY_NAME):
            tangent()


@needs_extension
def test_raw_ops_refuse_too():
    """What calls them past the public functions, an exported program say."""
    x, scores = torch.randn(4, 3), torch.randn(4, 1)
    op = torch.ops.milkernels.softmax_pool_fwd.native
    with pytest.raises(RuntimeError, match=BY_NAME):
        torch.func.jvp(lambda x: op(x, scores, None, None)[0], (x,), (x,))
    with pytest.raises(RuntimeError, match=BY_NAME):
        torch.func.grad(lambda x: op(x, scores, None, None)[0].sum())(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=BY_NAME):
        op(forward_ad.make_dual(x, x).requires_grad_(), scores, None, None)
    x.requires_grad_()
    bag = op(x, scores, None, None)[0]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=BY_NAME):
        torch.autograd.grad(bag, x, forward_ad.make_dual(torch.ones_like(bag), torch.ones_like(bag)))


@needs_extension
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_inside_of_a_compiled_function(backend):
    torch._dynamo.reset()
    p = problem("softmax_pool", "bags")

    def compiled(f):
        return torch.compile(f, fullgraph=True, backend=backend)

    for ours in (p.ours(None), p.ours("native")):
        torch.testing.assert_close(
            compiled(torch.func.vmap(ours))(twice(p.point)), torch.func.vmap(ours)(twice(p.point))
        )
    jvp = compiled(lambda v, t: torch.func.jvp(p.ours(None), (v,), (t,))[1])
    torch.testing.assert_close(jvp(p.point, p.tangent), p.jacobian @ p.tangent)
    torch.testing.assert_close(compiled(torch.func.grad(p.scalar(p.ours(None))))(p.point), p.gradient)
    with pytest.raises(RuntimeError, match="reference"):
        compiled(lambda v, t: torch.func.jvp(p.ours("native"), (v,), (t,))[1])(p.point, p.tangent)
    with forward_ad.dual_level():
        v = forward_ad.make_dual(p.point, p.tangent)
        tangent = forward_ad.unpack_dual(compiled(p.ours(None))(v)).tangent
        torch.testing.assert_close(tangent, p.jacobian @ p.tangent)
        with pytest.raises(RuntimeError, match="reference"):
            compiled(p.ours("native"))(v)


def test_what_is_not_differentiated_stays_with_the_kernels():
    """Features that were pooled inside of a transform of something else."""
    x, scores, head = torch.randn(4, 3), torch.randn(4, 1), torch.randn(3)
    backend = "native" if native.load_error() is None else "reference"

    def loss(head):
        return milkernels.softmax_pool(x * 1, scores, backend=backend).bag[0, 0] @ head

    expected = milkernels.softmax_pool(x, scores, backend="reference").bag[0, 0]
    torch.testing.assert_close(torch.func.grad(loss)(head), expected)


@needs_extension
def test_auto_says_once_that_the_reference_runs():
    x = torch.randn(4, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        milkernels.backends._warned.clear()
        for _ in range(2):
            torch.func.grad(lambda x: milkernels.mean_pool(x).sum())(x)
    said = [str(w.message) for w in caught if "runs on the reference" in str(w.message)]
    assert len(said) == 1 and "torch.func" in said[0] and caught[-1].filename == __file__


POOLS = (
    milkernels.log_sum_exp_pool,
    milkernels.generalized_mean_pool,
    milkernels.noisy_or_pool,
    milkernels.isr_pool,
)


@quiet
@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: pool.__name__)
def test_the_classical_functions(pool):
    p, offsets = torch.rand(5, 2, dtype=torch.float64) * 0.8 + 0.1, torch.tensor([0, 3, 5])
    expected = torch.autograd.functional.jacobian(lambda p: pool(p, offsets), p)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(lambda p: pool(p, offsets))(p), expected)


@quiet
@pytest.mark.parametrize("model", [milkernels.nn.ABMIL(3, 2, 4, 2), milkernels.nn.DSMILModel(3, 2)], ids=type)
def test_modules(model):
    """The heat maps of some code bases are Jacobians of a whole model."""
    model, x = model.double().eval(), torch.randn(5, 3, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda x: model(x).logits, x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(lambda x: model(x).logits)(x), expected)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).logits.sum()

    model.zero_grad()
    loss(parameters).backward()
    for name, gradient in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(gradient, parameters[name].grad)


@pytest.mark.parametrize("name", ["clam-sb", "clam-mb", "dsmil", "millab-wrapper", "slideflow"])
def test_accelerated_models_are_their_own(name):
    """Per-class gradient maps, per-example gradients: what the model gave before."""
    case = accelerate_cases.CASES[name]
    own = case.model()
    fast = accelerate_cases.accelerated(own)
    call, x = next(iter(case.calls.values())), case.draw(0)["x"].detach()

    def of(model):
        def first(x):
            out = call(model, {"x": x})
            while not isinstance(out, Tensor):
                out = next(iter(out.values() if isinstance(out, dict) else out))
            return out

        return first

    for transform in (torch.func.jacrev, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]):
        torch.testing.assert_close(transform(of(fast))(x), transform(of(own))(x))
    parameters = {n: p.detach() for n, p in own.named_parameters()}
    gradients = [
        torch.func.grad(lambda p, m=model: torch.func.functional_call(Whole(m, of), p, (x,)).square().sum())(
            {f"model.{n}": p for n, p in parameters.items()}
        )
        for model in (fast, own)
    ]
    torch.testing.assert_close(*gradients)


class Whole(torch.nn.Module):
    def __init__(self, model, of):
        super().__init__()
        self.model, self.of = model, of

    def forward(self, x):
        return self.of(self.model)(x)
