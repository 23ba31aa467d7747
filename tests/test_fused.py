"""A pair of kernels as one step of autograd, whatever the kernels are."""

import types

import pytest
import torch
from cases import CASES, draw
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import normlib
from normlib import backends, functional
from normlib.axes import stat_axes
from normlib.backends import eager, fused
from normlib.testing import assert_close


class Kernels:
    """The formula as a pair of kernels that count their calls.

    ``seen`` tells whether the fast path was really taken. The backward
    trusts the saved statistics, as a fast one does.
    """

    def __init__(self):
        self.seen = []

    def forward(self, x, view, weight, bias, eps, *, over_batch, centered):
        assert not torch.is_grad_enabled()
        self.seen.append("forward")
        kind = {"over_batch": over_batch, "centered": centered}
        y, m = eager.normalize(x, view, weight, bias, eps, **kind)
        shape = (view.G,) if over_batch else (view.N, view.G)
        mean, var = m.mean.reshape(shape), m.var.reshape(shape)
        return y, mean, var, (mean, torch.rsqrt(var + eps))

    def backward(
        self, dy, x, view, weight, kept, needs, *, over_batch, centered
    ):
        assert not torch.is_grad_enabled()
        self.seen.append("backward")
        axes = stat_axes(over_batch)
        mean, rstd = kept
        shape = (1 if over_batch else view.N, view.G, 1, 1)
        g = dy = dy.reshape(view)
        if weight is not None:
            g = dy * weight.reshape(1, view.G, view.K, 1)
        rstd = rstd.reshape(shape)
        xhat = (x.reshape(view) - mean.reshape(shape)) * rstd
        dx = g - xhat * (g * xhat).mean(axes, keepdim=True)
        if centered:
            dx = dx - g.mean(axes, keepdim=True)
        return (
            (dx * rstd).reshape(x.shape) if needs[0] else None,
            (dy * xhat).sum((0, 3)) if needs[1] else None,
            dy.sum((0, 3)) if needs[2] else None,
        )

    def backend(self):
        def normalize(*args, moments=True, **kwargs):
            return fused.normalize(self, *args, moments=moments, **kwargs)

        yes = lambda *args, **kwargs: True  # noqa: E731
        return types.SimpleNamespace(
            available=yes,
            supports=yes,
            least=lambda *args: 0,
            pays=yes,
            normalize=normalize,
        )


@pytest.fixture
def kernels(monkeypatch):
    """Counting kernels behind the default choice, at every size."""
    counting = Kernels()
    table = {"counting": counting.backend(), "eager": eager}
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(backends, "LEAST", 0)
    return counting


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


X = torch.randn(4, 3, 5, dtype=torch.float64)
W = torch.randn(5, dtype=torch.float64)
B = torch.randn(5, dtype=torch.float64)
DY = torch.randn(4, 3, 5, dtype=torch.float64)


def layer_norm(x, w=W, b=B):
    return functional.layer_norm(x, (5,), w, b)


def torchs(x, w=W, b=B):
    return torch.nn.functional.layer_norm(x, (5,), w, b)


def test_an_ordinary_step_takes_the_kernels(kernels):
    x, w, b = (p.clone().requires_grad_() for p in (X, W, B))
    layer_norm(x, w, b).backward(DY)
    assert kernels.seen == ["forward", "backward"]
    other = [p.clone().requires_grad_() for p in (X, W, B)]
    torchs(*other).backward(DY)
    assert_close([p.grad for p in (x, w, b)], [p.grad for p in other])


def test_without_a_graph_there_is_no_step_of_autograd(kernels):
    assert layer_norm(X).grad_fn is None
    with torch.no_grad():
        assert layer_norm(X.clone().requires_grad_()).grad_fn is None
    with torch.inference_mode():
        inside = X.clone()
        assert_close(layer_norm(inside), torchs(inside))
    assert kernels.seen == 3 * ["forward"]


def test_an_inference_tensor_stays_out_of_graphs(kernels):
    with torch.inference_mode():
        x = X.clone()
    w = W.clone().requires_grad_()
    with pytest.raises(RuntimeError) as expected:
        torchs(x, w)
    with pytest.raises(RuntimeError, match=str(expected.value)[:40]):
        layer_norm(x, w)


@pytest.mark.parametrize("needed", range(1, 8))
def test_only_the_gradients_that_are_needed(kernels, needed):
    leaves = [
        p.clone().requires_grad_(bool(needed >> i & 1))
        for i, p in enumerate((X, W, B))
    ]
    layer_norm(*leaves).backward(DY)
    other = [p.detach().clone().requires_grad_() for p in leaves]
    torchs(*other).backward(DY)
    for leaf, o in zip(leaves, other, strict=True):
        if leaf.requires_grad:
            assert_close(leaf.grad, o.grad)
        else:
            assert leaf.grad is None


def test_derivatives_of_every_order(kernels, case):
    x, weight, bias, _ = draw(case)
    leaves = [p.requires_grad_() for p in (x, weight, bias) if p is not None]

    def f(x, weight, bias=None):
        return case.of(functional, x, weight, bias, 1e-3)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    assert {"forward", "backward"} == set(kernels.seen)


def test_a_third_derivative():
    """By the formula that the fast path falls back to; x^3 has one."""
    x = X[:2].clone().requires_grad_()

    def nth(f, n):
        y = f(x).pow(3).sum()
        for _ in range(n):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = (g * DY[:2]).sum()
        return y

    with backends.use_backend("eager"):
        expected = nth(layer_norm, 3)
    counting = Kernels()

    def fast(x):
        view = functional.trailing_view(x.shape, (5,))
        kind = {"over_batch": False, "centered": True, "moments": False}
        return fused.normalize(counting, x, view, W, B, 1e-5, **kind)[0]

    assert_close(nth(fast, 3), expected)
    assert counting.seen == ["forward"]


def test_the_moments_carry_their_gradient(kernels, case):
    x, weight, bias, dy = draw(case)
    results = []
    for forced in (False, True):
        leaf = x.clone().requires_grad_()
        if forced:
            with backends.use_backend("eager"):
                y, mean, var = functional.normalize(
                    leaf, case.view, weight, bias, **case.kind
                )
        else:
            y, mean, var = functional.normalize(
                leaf, case.view, weight, bias, **case.kind
            )
        (y * dy).sum().add(mean.pow(3).sum() + var.pow(3).sum()).backward()
        results.append([y, mean, var, leaf.grad])
    assert_close(*results)
    assert "forward" in kernels.seen


def declined(kernels, f):
    """Run f, and say whether the kernels stayed out of it."""
    kernels.seen.clear()
    result = f()
    assert not kernels.seen
    return result


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_transforms_go_to_torchs_own_kernel(kernels):
    dx = torch.randn_like(X)
    for ours, theirs in (
        (
            lambda: grad(lambda x: layer_norm(x).pow(3).sum())(X),
            grad(lambda x: torchs(x).pow(3).sum())(X),
        ),
        (lambda: vmap(layer_norm)(X), vmap(torchs)(X)),
        (
            lambda: jvp(layer_norm, (X,), (dx,))[1],
            jvp(torchs, (X,), (dx,))[1],
        ),
        # A plain tensor closed over, with a transform going on around it.
        (lambda: vmap(lambda s: s * layer_norm(X))(W), None),
    ):
        result = declined(kernels, ours)
        if theirs is not None:
            assert_close(result, theirs)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_forward_mode_goes_to_torchs_own_kernel(kernels):
    from torch.autograd import forward_ad as fwad

    def tangent(f):
        with fwad.dual_level():
            dual = fwad.make_dual(X, DY)
            return fwad.unpack_dual(f(dual)).tangent

    result = declined(kernels, lambda: tangent(layer_norm))
    assert_close(result, tangent(torchs))


def test_autocast_goes_to_torchs_own_kernel(kernels):
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = declined(kernels, lambda: layer_norm(x, W.float(), B.float()))
        expected = torchs(x, W.float(), B.float())
    assert y.dtype == expected.dtype
    assert_close(y, expected)


def test_a_subclass_goes_to_torchs_own_kernel(kernels):
    class Named(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls += func is torch.nn.functional.layer_norm
            return super().__torch_function__(func, types, args, kwargs)

    y = declined(kernels, lambda: layer_norm(X.as_subclass(Named)))
    assert isinstance(y, Named)
    assert Named.calls == 1


def test_a_torch_function_mode_sees_torchs_own_function(kernels):
    from torch.overrides import TorchFunctionMode

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names = []
    with Spy():
        declined(kernels, lambda: layer_norm(X))
    assert "layer_norm" in names


def test_fake_and_meta_tensors_go_to_torchs_own_kernel(kernels):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        declined(kernels, lambda: layer_norm(torch.empty(4, 3, 5), None, None))
    meta = torch.empty(4, 3, 5, device="meta")
    y = declined(kernels, lambda: layer_norm(meta, None, None))
    assert y.is_meta


def test_a_compiled_and_an_exported_call_hold_torchs_own_op(kernels):
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    assert_close(declined(kernels, lambda: compiled(X)), torchs(X))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return layer_norm(x, None, None)

    program = torch.export.export(
        Layer(), (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    assert "layer_norm" in str(program.graph)
    assert_close(program.module()(X[:2]), torchs(X[:2], None, None))


def test_a_traced_call_holds_torchs_own_op(kernels):
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x, w, b):  # a tensor as a default value is more than fx can print
        return layer_norm(x, w, b)

    graph = declined(kernels, lambda: make_fx(f)(X, W, B))
    assert "native_layer_norm" in str(graph.graph)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_jit_trace_holds_torchs_own_op(kernels):
    traced = declined(
        kernels,
        lambda: torch.jit.trace(layer_norm, (X, W, B), check_trace=False),
    )
    assert "aten::layer_norm" in str(traced.graph)


def test_a_backward_in_batches_of_gradients(kernels):
    """The batch dimension shows in the keys of dy alone."""
    x = X.clone().requires_grad_()
    stack = torch.randn(3, *X.shape, dtype=torch.float64)
    results = [
        torch.autograd.grad(f(x), x, stack, is_grads_batched=True)[0]
        for f in (layer_norm, torchs)
    ]
    assert_close(*results)
    assert kernels.seen == ["forward"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same_again(kernels, reentrant):
    results = []
    for f in (layer_norm, torchs):
        x = X.clone().requires_grad_()
        y = checkpoint(f, x, use_reentrant=reentrant)
        y.backward(DY)
        results.append([y, x.grad])
    assert_close(*results)
    assert kernels.seen.count("forward") == 2


def test_saved_tensors_go_through_hooks(kernels):
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer_norm(x)
    y.backward(DY)
    assert X.shape in packed
    other = X.clone().requires_grad_()
    torchs(other).backward(DY)
    assert_close(x.grad, other.grad)


def test_the_output_may_be_changed_in_place_the_input_may_not(kernels):
    x = X.clone().requires_grad_()
    y = layer_norm(x * 1)
    y.add_(1).relu_()
    y.backward(DY)
    z = x * 1
    y = layer_norm(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.backward(DY)


def test_a_weight_whose_input_needs_no_gradient_may_change(kernels):
    """It is of no use to its own gradient, so nothing is stale."""
    w = W.clone().requires_grad_()
    y = layer_norm(X, w)
    with torch.no_grad():
        w.zero_()
    y.backward(DY)
    other = W.clone().requires_grad_()
    torchs(X, other).backward(DY)
    assert_close(w.grad, other.grad)


def test_an_expanded_gradient_is_read_right(kernels):
    x = X.clone().requires_grad_()
    layer_norm(x).sum().backward()
    other = X.clone().requires_grad_()
    torchs(other).sum().backward()
    assert_close(x.grad, other.grad)


def test_batch_norm_moves_its_running_statistics_once(kernels):
    running = [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
    theirs = [r.clone() for r in running]
    x = X.clone().requires_grad_()
    y = functional.batch_norm(x, *running, training=True)
    assert kernels.seen == ["forward"]
    expected = torch.nn.functional.batch_norm(x, *theirs, training=True)
    assert_close([y, *running], [expected, *theirs])
    assert not any(r.requires_grad for r in running)


def test_a_small_and_a_large_batch_in_one_graph(monkeypatch):
    """Torch's kernel keeps the running statistics that ours then moves."""
    bn = normlib.BatchNorm1d(3, dtype=torch.float64)
    theirs = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    results = []
    for module in (bn, theirs):
        x = X.clone().requires_grad_()
        monkeypatch.setattr(backends, "LEAST", 2**15)
        y = module(x)
        monkeypatch.setattr(backends, "LEAST", 0)
        with backends.use_backend("eager"):
            z = module(x)
        torch.autograd.backward([y, z], [DY, DY])
        results.append([x.grad, *module.buffers()])
    assert_close(*results)


def test_a_missing_private_name_switches_every_fast_path_off(
    kernels, monkeypatch
):
    monkeypatch.setattr(fused, "_QUESTIONS", None)
    assert_close(declined(kernels, lambda: layer_norm(X)), torchs(X))


def test_nothing_is_missing_in_this_torch():
    assert fused.plain(X, None, W)


def test_functional_call_of_a_layer(kernels):
    layer = normlib.LayerNorm(5, dtype=torch.float64)
    y = functional_call(layer, {"weight": W, "bias": B}, (X,))
    assert_close(y, torchs(X))
    assert kernels.seen == ["forward"]
