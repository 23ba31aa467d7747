"""A norm with its neighbor in one step: an addition before, an activation.

After the table that is common to all norms: each is compared with NumPy in
float64, with torch's calls one after the other, and with finite differences.
"""

import copy
import functools
import pickle
import types

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, draw
from devices import over_devices, over_dtypes
from test_fused import Kernels
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import normlib
from benchmarks.speed import AddThenNorm
from normlib import backends, convert, functional, inference, reference
from normlib.axes import trailing_view
from normlib.backends import eager, fused
from normlib.testing import TOLERANCE, assert_close


class Fusing(Kernels):
    """Counting kernels that know of extras."""

    def forward(self, x, view, weight, bias, *args, extras=None, **kind):
        activation = None
        if extras is not None:
            self.seen.append("extras")
            activation = extras.activation
            if extras.residual is not None:
                x = torch.add(x, extras.residual, out=extras.total)
        y, *rest = super().forward(x, view, weight, bias, *args, **kind)
        return eager.activate(y, activation), *rest

    def backward(self, dy, x, view, weight, kept, *args, extras=None, **kind):
        if extras is not None and extras.activation is not None:
            mean, rstd = (k.reshape(-1, view.G, 1, 1) for k in kept)
            z = (x.reshape(view) - mean) * rstd
            for p, combine in (
                (weight, torch.mul),
                (extras.bias, torch.add),
            ):
                if p is not None:
                    z = combine(z, p.reshape(1, view.G, view.K, 1))
            dy = gradient(dy.reshape(view), z, extras.activation)
        dx, *rest = super().backward(dy, x, view, weight, kept, *args, **kind)
        if extras is not None and extras.dtotal is not None:
            dx = None if dx is None else dx + extras.dtotal
        return dx, *rest

    def backend(self):
        module = super().backend()
        module.fuse = functools.partial(fused.fuse, self)
        return module


def gradient(dy, z, activation):
    """The gradient through an activation, by autograd."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        y = eager.ACTIVATIONS[activation](z)
    return torch.autograd.grad(y, z, dy)[0]


@pytest.fixture
def kernels(monkeypatch):
    """Counting kernels behind the default choice, at every size."""
    counting = Fusing()
    table = {"counting": counting.backend(), "eager": eager}
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(backends, "LEAST", 0)
    return counting


def declined(kernels, f):
    """Run f, and say whether the kernels stayed out of it."""
    kernels.seen.clear()
    result = f()
    assert not kernels.seen
    return result


def apart(kernels, f):
    """Run f, and say whether norm and activation were two steps."""
    kernels.seen.clear()
    result = f()
    assert "extras" not in kernels.seen
    return result


# A residual addition before the norm


def added(name, x, residual, normalized, weight, bias, eps=1e-5):
    """Ours by name: ``"layer"`` or ``"rms"``."""
    if name == "layer":
        function, parameters = functional.add_layer_norm, (weight, bias)
    else:
        function, parameters = functional.add_rms_norm, (weight,)
    return function(x, residual, normalized, *parameters, eps)


def composed(name, x, residual, normalized, weight, bias, eps=1e-5):
    """The same by torch, one after the other."""
    total = x + residual
    if name == "layer":
        return F.layer_norm(total, normalized, weight, bias, eps), total
    return F.rms_norm(total, normalized, weight, eps), total


def rows(shape, axes=1, dtype=torch.float64, mean=0.5, device="cpu"):
    """x, residual, weight, bias, dy and dtotal, none of them 1."""
    g = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = [
        *(normal(shape) + mean, 2 * normal(shape)),
        *(normal(shape[-axes:]) + 0.5, normal(shape[-axes:])),
        *(normal(shape), normal(shape)),
    ]
    return [t.to(device, dtype) for t in tensors]


def learning(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def exactly(name, total, weight, bias, dy, dtotal, eps):
    """y, dx, dweight and dbias in NumPy, given the rounded sum."""
    arrays = total, weight, bias, dy, dtotal
    total, weight, bias, dy, dtotal = (
        a.detach().double().cpu().numpy() for a in arrays
    )
    y, cache = reference.normalize(
        total,
        trailing_view(total.shape, weight.shape),
        weight,
        bias if name == "layer" else None,
        eps,
        centered=name == "layer",
    )
    dx, *others = reference.normalize_backward(dy, cache)
    others = [d.reshape(weight.shape) for d in others]
    return [y, dx + dtotal, dx + dtotal, *others[: 1 + (name == "layer")]]


def served(backend, name, leaves):
    """Whether a backend can take the norm; the default always does."""
    if backend is None:
        return True
    x, _, weight, bias = leaves
    return backends.BACKENDS[backend].supports(
        *(x, trailing_view(x.shape, weight.shape)),
        *(weight, bias if name == "layer" else None),
        over_batch=False,
        centered=name == "layer",
    )


NAMES = pytest.mark.parametrize("name", ["layer", "rms"])


@over_devices
@over_dtypes
@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 3, 33), 1), ((1, 8), 1), ((3, 2, 5), 2)], ids=str
)
@NAMES
def test_add_and_norm_equal_the_reference(
    name, shape, axes, backend, device, dtype, mean
):
    far = mean > 1e3 and name == "layer"
    x, residual, weight, bias, dy, dtotal = rows(
        shape, axes, dtype, mean if far else 0.5, device
    )
    weight, bias = (p.to(eager.widen(x).dtype) for p in (weight, bias))
    if name == "rms":  # torch warns of an RMS norm in mixed precision
        weight = weight.to(dtype)
    leaves = learning(x, residual, weight, bias)
    normalized = weight.shape
    if not served(backend, name, leaves):
        with pytest.raises(RuntimeError, match="does not serve"):
            added(name, *leaves[:2], normalized, *leaves[2:])
        return
    y, total = added(name, *leaves[:2], normalized, *leaves[2:])
    assert y.dtype == total.dtype == dtype
    wanted = leaves[: 4 if name == "layer" else 3]
    found = torch.autograd.grad([y, total], wanted, [dy, dtotal])
    exact = exactly(name, total, weight, bias, dy, dtotal, 1e-5)
    tolerance = TOLERANCE[dtype]
    if far and dtype == torch.float32 and backend != "eager":
        tolerance = 5e-3  # what torch's own kernels lose there
    for got, expected in zip([y, *found], exact, strict=True):
        assert_close(got, expected, tolerance=tolerance)
    # Triton's interpreter cuts bfloat16 off, where a GPU rounds.
    rounding = 2**-7 if (backend, dtype) == ("triton", torch.bfloat16) else 0
    assert_close(total, x + residual, tolerance=rounding)


@NAMES
def test_unfused_it_is_the_composition_to_the_last_bit(name):
    *leaves, dy, dtotal = rows((4, 9), dtype=torch.float32)
    results = []
    for function in (added, composed):
        x, residual, weight, bias = learning(*leaves)
        both = function(name, x, residual, (9,), weight, bias)
        torch.autograd.backward(both, [dy, dtotal])
        grads = [p.grad for p in (x, residual, weight, bias)]
        results.append([*both, *grads])
    for ours, theirs in zip(*results, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@NAMES
@pytest.mark.parametrize("used", ["y", "total", "both"])
@pytest.mark.parametrize("needed", range(1, 16))
def test_only_the_gradients_that_are_needed(kernels, name, used, needed):
    *leaves, dy, dtotal = rows((4, 9))
    results = []
    for function in (added, composed):
        copies = [
            p.detach().clone().requires_grad_(bool(needed >> i & 1))
            for i, p in enumerate(leaves)
        ]
        y, total = function(name, *copies[:2], (9,), *copies[2:])
        pairs = {"y": [(y, dy)], "total": [(total, dtotal)]}
        pairs["both"] = pairs["y"] + pairs["total"]
        pairs = [p for p in pairs[used] if p[0].requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        results.append([p.grad for p in copies])
    for ours, theirs in zip(*results, strict=True):
        assert ours is theirs is None or assert_close(ours, theirs) < 1e-12
    assert "extras" in kernels.seen


@NAMES
def test_derivatives_of_add_and_norm_by_finite_differences(kernels, name):
    leaves = learning(*rows((3, 5))[:4])
    leaves = leaves[: 4 if name == "layer" else 3]

    def f(x, residual, weight, bias=None):
        return added(name, x, residual, (5,), weight, bias)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    assert set(kernels.seen) == {"extras", "forward", "backward"}
    with backends.use_backend("eager"):
        assert torch.autograd.gradgradcheck(f, leaves)


def twice(outputs, leaves, upstream):
    """Outputs, gradients, and the gradients of these gradients' size."""
    first = torch.autograd.grad(outputs, leaves, upstream, create_graph=True)
    size = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(size, leaves, materialize_grads=True)
    return [*outputs, *first, *second]


@NAMES
def test_second_derivatives_of_add_and_norm_are_the_compositions(
    kernels, name
):
    """(The check by finite differences believes the first ones.)"""
    *given, dy, dtotal = rows((4, 9))
    given = given[: 4 if name == "layer" else 3]
    results = []
    for function in (added, composed):
        leaves = learning(*given)
        x, residual, *parameters = (*leaves, None)[:4]
        both = function(name, x, residual, (9,), *parameters)
        results.append(twice(both, leaves, [dy, dtotal]))
    assert_close(*results)
    assert kernels.seen == ["extras", "forward"]


@NAMES
def test_the_norm_is_of_the_sum_as_it_is_stored(backend, name):
    """Beyond 1,024 a float16 is a whole number: 0.4 more is nothing."""
    g = torch.Generator().manual_seed(0)
    x = (1030 + torch.randint(-3, 4, (4, 9), generator=g)).half()
    residual = (0.4 * torch.rand(4, 9, generator=g)).half()
    weight, bias = torch.ones(9).half(), None
    if not served(backend, name, [x, residual, weight, bias]):
        return
    found = added(name, x, residual, (9,), weight, bias)
    y, total = composed(name, x, residual, (9,), weight, bias)
    wide = composed(name, x.float(), residual.float(), (9,), None, None)[0]
    assert torch.equal(found[1], total)
    assert_close(found[0], y)
    if name == "layer":  # what the rounding of the sum makes of y
        assert (wide - y.float()).abs().max() > 0.05


@NAMES
def test_a_residual_of_another_dtype_is_composed(backend, name):
    x, residual, weight, bias, *_ = rows((4, 9), dtype=torch.float32)
    if backend is not None and not served(
        backend, name, [x, residual, weight, bias]
    ):
        return
    for pair in (
        (x, residual.half()),
        (x, residual.bfloat16()),
        (x.half(), residual),
    ):
        found = added(name, *pair, (9,), weight, bias)
        assert_close(found, composed(name, *pair, (9,), weight, bias))
        assert found[1].dtype == torch.float32


def test_a_residual_stream_of_many_layers(kernels):
    """Both outputs go on, so that every gradient comes by two ways."""
    x, residual, weight, bias, dy, _ = rows((4, 9))
    results = []
    for function in (added, composed):
        y, stream, w = learning(x, residual, weight)
        leaves = y, stream, w
        for name in ("layer", "rms", "layer"):
            y, stream = function(name, y.sin(), stream, (9,), w, bias)
        results.append(torch.autograd.grad(y, leaves, dy))
    assert_close(*results)
    assert kernels.seen.count("extras") == 3


def test_one_tensor_may_be_both(kernels):
    x, _, weight, bias, dy, dtotal = rows((4, 9))
    results = []
    for function in (added, composed):
        (leaf,) = learning(x)
        both = function("layer", leaf, leaf, (9,), weight, bias)
        torch.autograd.backward(both, [dy, dtotal])
        results.append([*both, leaf.grad])
    assert_close(*results)


def test_inputs_stay_and_outputs_are_new(kernels):
    x, residual, weight, bias, *_ = rows((4, 9))
    before = x.clone(), residual.clone()
    y, total = added("layer", x, residual, (9,), weight, bias)
    pointers = {t.data_ptr() for t in (x, residual, y, total)}
    assert len(pointers) == 4
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_the_sum_is_saved_and_may_not_change_the_output_may(kernels):
    x, residual = learning(*rows((4, 9))[:2])
    y, total = added("rms", x, residual, (9,), None, None)
    y.mul_(2)
    y.sum().backward()
    y, total = added("rms", x, residual, (9,), None, None)
    total.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


@over_devices
def test_a_residual_and_its_gradient_may_lie_otherwise_in_memory(
    backend, device
):
    x, residual, weight, bias, dy, dtotal = rows(
        (6, 6), dtype=torch.float32, device=device
    )
    if not served(backend, "layer", [x, residual, weight, bias]):
        return
    results = []
    for odd in (False, True):
        turned = [t.T.contiguous().T if odd else t for t in (residual, dtotal)]
        a, b = learning(x, turned[0])
        b = turned[0].detach().requires_grad_()
        both = added("layer", a, b, (6,), weight, bias)
        found = torch.autograd.grad(both, [a, b], [dy, turned[1]])
        results.append([*both, *found])
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@NAMES
def test_transforms_of_add_and_norm_step_aside(kernels, name):
    x, residual, weight, bias, dy, _ = rows((4, 9))

    def of(function):
        return lambda x: function(name, x, residual[0], (9,), weight, bias)

    ours, theirs = of(added), of(composed)
    for transform in (
        lambda f: vmap(f)(x),
        lambda f: vmap(grad(lambda x: f(x)[0].pow(3).sum()))(x),
        lambda f: jvp(f, (x[0],), (dy[0],))[1],
    ):
        got = declined(kernels, functools.partial(transform, ours))
        assert_close(got, transform(theirs))


@NAMES
def test_compiled_and_exported_add_and_norm_step_aside(kernels, name):
    x, residual, weight, bias, *_ = rows((4, 9), dtype=torch.float32)
    expected = composed(name, x, residual, (9,), weight, bias)

    class Layer(nn.Module):
        def forward(self, x, residual):
            return added(name, x, residual, (9,), weight, bias)

    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    got = declined(kernels, lambda: compiled(x, residual))
    assert_close(got, expected)
    sizes = {0: torch.export.Dim.AUTO}
    program = declined(
        kernels,
        lambda: torch.export.export(
            *(Layer(), (x, residual)), dynamic_shapes=(sizes, sizes)
        ),
    )
    assert f"{name}_norm" in str(program.graph)
    assert_close(program.module()(x[:3], residual[:3])[0], expected[0][:3])
    traced = torch.fx.symbolic_trace(
        lambda x: added(name, x, residual, (9,), weight, bias)
    )
    assert_close(traced(x), expected)
    module = torch.fx.symbolic_trace(normlib.AddLayerNorm(9))
    assert_close(module(x, residual), normlib.AddLayerNorm(9)(x, residual))


def test_autocast_adds_as_torch_does(kernels):
    """The branch comes in 16 bits, the residual stream in 32."""
    x, residual, weight, bias, *_ = rows((4, 9), dtype=torch.float32)
    x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = declined(
            kernels, lambda: added("layer", x, residual, (9,), weight, bias)
        )
        expected = composed("layer", x, residual, (9,), weight, bias)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_adds_again(kernels, reentrant):
    *leaves, dy, dtotal = rows((4, 9))
    results = []
    for function in (added, composed):
        x, residual, weight, bias = learning(*leaves)
        both = checkpoint(
            *(function, "layer", x, residual, (9,), weight, bias),
            use_reentrant=reentrant,
        )
        torch.autograd.backward(both, [dy, dtotal])
        results.append([*both, x.grad, residual.grad, weight.grad])
    assert_close(*results)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@over_devices
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@NAMES
def test_what_is_not_finite_stays_in_its_row(backend, device, name, value):
    x, residual, weight, bias, *_ = rows(
        (4, 9), dtype=torch.float32, device=device
    )
    if not served(backend, name, [x, residual, weight, bias]):
        return
    residual[1, 2] = value
    y, total = added(name, x, residual, (9,), weight, bias)
    expected = composed(name, x, residual, (9,), weight, bias)
    assert torch.equal(y.isfinite(), expected[0].isfinite())
    assert_close(total, expected[1])
    assert y[[0, 2, 3]].isfinite().all()


def test_an_empty_sum():
    for shape in ((0, 5), (2, 0, 5)):
        y, total = added("layer", *torch.empty(2, *shape), (5,), None, None)
        assert y.shape == total.shape == shape


X, R = torch.randn(4, 9), torch.randn(4, 9)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ((X, R[:1], (9,)), RuntimeError, r"\(4, 9\).*\(1, 9\)"),
        ((X, R[0], (9,)), RuntimeError, r"\(4, 9\).*\(9,\)"),
        ((X, R.to("meta"), (9,)), RuntimeError, "on cpu.*on meta"),
        ((X, R.long(), (9,)), NotImplementedError, "int64"),
        ((X, None, (9,)), TypeError, "residual must be a tensor, got None"),
        ((X, 1.0, (9,)), TypeError, "residual must be a tensor, got 1.0"),
        ((X, R, (8,)), RuntimeError, "8"),
        ((X, R, (9,), torch.ones(8)), RuntimeError, "8"),
        ((X, R, (9,), None, -1.0), ValueError, "-1"),
    ],
    ids=[
        "rows",
        "row",
        "device",
        "dtype",
        "none",
        "number",
        "size",
        "weight",
        "eps",
    ],
)
@pytest.mark.parametrize("forced", [True, False])
def test_what_cannot_be_added_or_normalized_is_refused(
    call, error, match, forced
):
    name = "eager" if forced else "cpu"
    with backends.use_backend(name), pytest.raises(error, match=match):
        functional.add_rms_norm(*call)
    weight, *eps = (*call[3:], None)[:2] if len(call) > 3 else (None,)
    rest = {"eps": eps[0]} if eps and eps[0] is not None else {}
    with pytest.raises(error, match=match):
        functional.add_layer_norm(*call[:3], weight, None, **rest)


# Layers


class Block(nn.Module):
    """A pre-norm Transformer block whose stream comes as a pair."""

    def __init__(self, width, norm):
        super().__init__()
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, y, stream):
        y, stream = self.norms[0](y, stream)
        y = self.attention(y, y, y, need_weights=False)[0]
        y, stream = self.norms[1](y, stream)
        return self.mlp(y), stream


class Transformer(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, norm) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y, stream = torch.zeros_like(x), x
        for block in self.blocks:
            y, stream = block(y, stream)
        return self.head((y + stream).mean(1))


def trained(model, x, target, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model


PAIRS = pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (normlib.AddLayerNorm, nn.LayerNorm),
        (normlib.AddRMSNorm, nn.RMSNorm),
    ],
)


@PAIRS
def test_a_transformer_trains_as_with_two_layers(kernels, ours, theirs):
    torch.manual_seed(0)
    x, target = torch.randn(4, 5, 8), torch.randint(3, (4,))
    model = Transformer(ours)
    twin = Transformer(lambda width: AddThenNorm(theirs(width)))
    state = {
        k.replace("norms.0.", "norms.0.norm.").replace(
            "norms.1.", "norms.1.norm."
        ): v
        for k, v in model.state_dict().items()
    }
    twin.load_state_dict(state)
    trained(model, x, target)
    trained(twin, x, target)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(a, b)
    assert kernels.seen.count("extras") == 3 * 4


@PAIRS
def test_a_layer_with_a_residual_is_saved_loaded_and_copied(
    ours, theirs, tmp_path
):
    layer = ours(8)
    with torch.no_grad():
        layer.weight.normal_()
    plain = theirs(8)
    plain.load_state_dict(layer.state_dict())
    assert repr(layer) == "Add" + repr(plain)
    torch.save(layer, tmp_path / "layer")
    x, residual = torch.randn(2, 3, 8)
    expected = plain(x + residual), x + residual
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(tmp_path / "layer", weights_only=False),
    ):
        assert type(other) is ours
        assert_close(other(x, residual), expected)
    state = {k: 2 * v for k, v in layer.state_dict().items()}
    y, _ = functional_call(layer, state, (x, residual))
    assert_close(y, 2 * expected[0])


# An activation behind the norm


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


BOTH = pytest.mark.parametrize("activation", ["relu", "silu"])


def activated(activation):
    """normlib.functional with the keyword given to every norm."""
    names = {case.norm for case in CASES.values()}
    return types.SimpleNamespace(
        **{
            name: functools.partial(
                getattr(functional, name), activation=activation
            )
            for name in names
        }
    )


def in_numpy(z, dy, activation):
    """The activation, and the gradient with respect to z."""
    if activation == "relu":
        return numpy.maximum(z, 0.0), dy * (z > 0)
    sigmoid = 1 / (1 + numpy.exp(-z))
    return z * sigmoid, dy * (sigmoid + z * sigmoid * (1 - sigmoid))


def serves(backend, case, x, weight, bias):
    module = backends.BACKENDS.get(backend)
    call = x, case.view, weight, bias
    return module is None or module.supports(*call, **case.kind)


@over_devices
@over_dtypes
@BOTH
def test_norm_and_activation_equal_the_reference(
    case, activation, backend, device, dtype, mean
):
    far = mean > 1e3 and case.has_bias
    x, weight, bias, dy = draw(case, mean=mean if far else 0.5)
    kept = eager.widen(x.to(dtype)).dtype if case.has_bias else dtype
    x, dy = x.to(dtype), dy.to(dtype)
    parameters = [None if p is None else p.to(kept) for p in (weight, bias)]
    z, cache = case.reference(
        *(None if p is None else p.double().numpy() for p in (x, *parameters)),
        1e-5,
    )
    if activation == "relu":  # on which side of 0 is a matter of rounding
        dy[torch.tensor(abs(z) < 0.05)] = 0
    y, dz = in_numpy(z, dy.double().numpy(), activation)
    exact = [y, *reference.normalize_backward(dz, cache)]
    leaves = [
        None if p is None else p.to(device).requires_grad_()
        for p in (x, *parameters)
    ]
    library = activated(activation)
    if not serves(backend, case, *leaves):
        with pytest.raises(RuntimeError, match="does not serve"):
            case.of(library, *leaves, 1e-5)
        return
    y = case.of(library, *leaves, 1e-5)
    wanted = [p for p in leaves if p is not None]
    grads = torch.autograd.grad(y, wanted, dy.to(device))
    assert y.dtype == dtype
    tolerance = TOLERANCE[dtype]
    if far and dtype == torch.float32 and backend != "eager":
        tolerance = 1e-2  # what torch's own kernels lose there
    for got, expected in zip([y, *grads], exact, strict=False):
        expected = expected.reshape(got.shape)
        assert_close(got, expected, tolerance=tolerance)


@BOTH
def test_an_activation_unfused_is_the_composition_to_the_last_bit(
    case, activation
):
    x, weight, bias, dy = (
        None if p is None else p.float() for p in draw(case)
    )
    results = []
    for library, act in (
        (activated(activation), lambda y: y),
        (functional, eager.ACTIVATIONS[activation]),
    ):
        given = x, weight, bias
        leaves = [None if p is None else learning(p)[0] for p in given]
        y = act(case.of(library, *leaves, 1e-5))
        y.backward(dy)
        results.append([y, *(p.grad for p in leaves if p is not None)])
    assert all(map(torch.equal, *results))


@BOTH
def test_derivatives_through_an_activation_by_finite_differences(
    kernels, case, activation
):
    x, weight, bias, _ = draw(case, seed=3)
    leaves = [p.requires_grad_() for p in (x, weight, bias) if p is not None]

    def f(x, weight, bias=None):
        return case.of(activated(activation), x, weight, bias, 1e-3)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    assert set(kernels.seen) == {"extras", "forward", "backward"}


@BOTH
def test_second_derivatives_through_an_activation_are_the_compositions(
    kernels, case, activation
):
    *given, dy = (p for p in draw(case, seed=3) if p is not None)
    results = []
    for library, act in (
        (activated(activation), lambda y: y),
        (F, eager.ACTIVATIONS[activation]),
    ):
        leaves = learning(*given)
        x, weight, bias = (*leaves, None)[:3]
        y = act(case.of(library, x, weight, bias, 1e-3))
        results.append(twice([y], leaves, [dy]))
    assert_close(*results)
    assert kernels.seen == ["extras", "forward"]


@BOTH
@pytest.mark.parametrize("needed", range(1, 8))
def test_gradients_through_an_activation_as_needed(
    kernels, activation, needed
):
    """Also of the weight alone, whose gradient needs the bias."""
    case = CASES["group, pairs"]
    *given, dy = draw(case)
    results = []
    for library, act in (
        (activated(activation), lambda y: y),
        (F, eager.ACTIVATIONS[activation]),
    ):
        leaves = [
            p.detach().clone().requires_grad_(bool(needed >> i & 1))
            for i, p in enumerate(given)
        ]
        act(case.of(library, *leaves, 1e-5)).backward(dy)
        results.append([p.grad for p in leaves])
    for ours, theirs in zip(*results, strict=True):
        assert ours is theirs is None or assert_close(ours, theirs) < 1e-12
    assert kernels.seen == ["extras", "forward", "backward"]


def test_a_bias_behind_which_is_an_activation_may_not_change(kernels):
    x, weight, bias, dy = draw(CASES["layer, tokens"])
    weight, bias = learning(weight, bias)
    y = functional.layer_norm(x, (8,), weight, bias, activation="silu")
    with torch.no_grad():
        bias.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.backward(dy)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@over_devices
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@BOTH
def test_what_is_not_finite_goes_through_an_activation(
    case, backend, device, activation, value
):
    x, weight, bias, dy = (
        None if p is None else p.float().to(device) for p in draw(case)
    )
    x[(0,) * x.dim()] = value
    if not serves(backend, case, x, weight, bias):
        return
    (x,) = learning(x)
    y = case.of(activated(activation), x, weight, bias, 1e-5)
    z = case.of(F, x, weight, bias, 1e-5)
    expected = eager.ACTIVATIONS[activation](z)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_close(y[~y.isnan()], expected[~expected.isnan()])
    dx = torch.autograd.grad(y, x, dy)[0]
    assert torch.equal(
        dx.isnan(), torch.autograd.grad(expected, x, dy)[0].isnan()
    )


@pytest.mark.parametrize("bad", ["gelu", "ReLU", "", ["relu"], torch.relu])
def test_an_unknown_activation_is_refused_before_anything_moves(bad):
    running = torch.zeros(9), torch.ones(9)
    names = "'relu', 'silu'"
    for call in (
        lambda a: functional.batch_norm(X, *running, None, None, True, **a),
        lambda a: functional.instance_norm(X[None], **a),
        lambda a: functional.group_norm(X, 3, **a),
        lambda a: functional.layer_norm(X, (9,), **a),
        lambda a: functional.rms_norm(X, (9,), **a),
    ):
        with pytest.raises(ValueError, match=names) as told:
            call({"activation": bad})
        assert repr(bad) in str(told.value)
    assert_close(running, (torch.zeros(9), torch.ones(9)))


def pair(norm, act, seed=0):
    """Ours, and Sequential of torch.nn's with the same random parameters."""
    name, *args = norm
    torch.manual_seed(seed)
    ours = normlib.NormActivation(getattr(normlib, name)(*args), act())
    theirs = nn.Sequential(getattr(nn, name)(*args), act())
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


LAYERS = {
    "batch": (("BatchNorm2d", 6), (4, 6, 3, 5)),
    "batch, dense": (("BatchNorm1d", 6), (7, 6)),
    "cumulative": (("BatchNorm2d", 6, 1e-5, None), (4, 6, 3, 5)),
    "untracked": (("BatchNorm2d", 6, 1e-5, 0.1, True, False), (4, 6, 3, 5)),
    "instance": (("InstanceNorm2d", 6, 1e-5, 0.1, True, True), (4, 6, 3, 5)),
    "instance, one": (("InstanceNorm2d", 6), (6, 3, 5)),
    "group": (("GroupNorm", 3, 6), (4, 6, 3, 5)),
    "layer": (("LayerNorm", 5), (4, 6, 5)),
    "rms": (("RMSNorm", 5), (4, 6, 5)),
}
ACTS = pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])


@pytest.mark.parametrize(("norm", "shape"), LAYERS.values(), ids=LAYERS.keys())
@ACTS
def test_a_pair_of_layers_is_the_sequence_of_them(kernels, norm, shape, act):
    """In training, twice, and in evaluation: outputs, gradients, buffers."""
    ours, theirs = pair(norm, act)
    assert repr(ours) == repr(theirs).replace("Sequential", "NormActivation")
    for step, training in enumerate((True, True, False)):
        g = torch.Generator().manual_seed(step)
        x, dy = (torch.randn(shape, generator=g) for _ in range(2))
        results = []
        for module in (ours.train(training), theirs.train(training)):
            (leaf,) = learning(x)
            y = module(leaf)
            leaves = [leaf, *module.parameters()]
            grads = torch.autograd.grad(y, leaves, dy)
            results.append([y, *grads, *module.buffers()])
        assert_close(*results)
    evaluates = norm[0].startswith(("Batch", "Instance")) and len(norm) < 6
    fused_steps = 2 if evaluates and norm[0][0] == "B" else 3
    if norm == LAYERS["instance"][0]:
        fused_steps = 2
    assert kernels.seen.count("extras") == fused_steps
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def group_and_silu():
    ours, theirs = pair(("GroupNorm", 3, 6), nn.SiLU)
    return ours, theirs, torch.randn(4, 6, 3, 5)


def test_what_looks_on_sees_both_layers(kernels):
    ours, theirs, x = group_and_silu()
    expected = theirs(x)
    seen = []
    for module in ours:
        handle = module.register_forward_hook(
            lambda module, args, y: seen.append((args[0], y))
        )
        assert_close(apart(kernels, lambda: ours(x)), expected)
        handle.remove()
    assert_close(seen[0][1], theirs[0](x))
    assert_close(seen[1], (theirs[0](x), expected))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append(module)
    )
    assert_close(apart(kernels, lambda: ours(x)), expected)
    handle.remove()
    assert seen[2:] == [*ours, ours]
    for hook in ("register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(ours[0], hook)(lambda *args: None)
        assert_close(apart(kernels, lambda: ours(x)), expected)
        handle.remove()
    kernels.seen.clear()
    assert_close(ours(x), expected)
    assert kernels.seen == ["extras", "forward"]


def test_other_children_are_called_one_after_the_other(kernels):
    ours, theirs, x = group_and_silu()
    expected = theirs(x)
    for change in (
        lambda m: m.append(nn.Identity()),
        lambda m: m.__setitem__(0, theirs[0]),
        lambda m: setattr(m[0], "forward", theirs[0].forward),
        lambda m: nn.utils.parametrizations.weight_norm(m[0], dim=None),
        lambda m: m[0].compile(backend="eager"),
    ):
        other = copy.deepcopy(ours)
        change(other)
        assert_close(apart(kernels, lambda m=other: m(x)), expected)
    ours[1] = nn.GELU()
    assert_close(apart(kernels, lambda: ours(x)), F.gelu(theirs[0](x)))
    assert type(ours[:1]) is normlib.NormActivation
    assert_close(apart(kernels, lambda: ours[:1](x)), theirs[0](x))


def test_a_relu_in_place_leaves_the_input_alone(kernels):
    ours = normlib.NormActivation(normlib.LayerNorm(5), nn.ReLU(inplace=True))
    x = torch.randn(3, 5)
    before = x.clone()
    assert_close(ours(x), F.relu(F.layer_norm(x, (5,))))
    assert torch.equal(x, before)
    assert "extras" in kernels.seen


def test_autocast_transforms_and_compilers_step_aside(kernels):
    ours, theirs, x = group_and_silu()
    with torch.autocast("cpu", torch.bfloat16):
        y = declined(kernels, lambda: ours(x.bfloat16()))
        assert torch.equal(y, theirs(x.bfloat16()))
    for transform in (
        lambda f: vmap(f, randomness="error")(x[:, None]),
        lambda f: jvp(f, (x,), (x.cos(),))[1],
        lambda f: grad(lambda x: f(x).pow(3).sum())(x),
    ):
        got = declined(kernels, functools.partial(transform, ours))
        assert_close(got, transform(theirs))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(declined(kernels, lambda: compiled(x)), theirs(x))
    program = declined(kernels, lambda: torch.export.export(ours, (x,)))
    assert "group_norm" in str(program.graph)
    assert "silu" in str(program.graph)
    traced = torch.fx.symbolic_trace(ours)
    assert_close(traced(x), theirs(x))


def test_folding_conversion_and_freezing_see_a_sequence(kernels):
    torch.manual_seed(0)
    bn = normlib.BatchNorm2d(4)
    block = normlib.NormActivation(bn, nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), block)
    x = torch.randn(2, 3, 6, 6)
    model(x)
    model.eval()
    expected = model(x)
    folded = inference.fold_batch_norm(model)
    assert not any(isinstance(m, normlib.BatchNorm) for m in folded.modules())
    assert_close(folded(x), expected)
    theirs = convert.to_torch(copy.deepcopy(model))
    assert type(theirs[1][0]) is nn.BatchNorm2d
    assert_close(theirs(x), expected)
    back = convert.from_torch(theirs)
    assert type(back[1][0]) is normlib.BatchNorm2d
    assert_close(back.train()(x), model.train()(x))


class Diffusion(nn.Module):
    """A residual block of a diffusion model's U-Net, and a head."""

    def __init__(self, pair):
        super().__init__()
        self.first = pair()
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.second = pair()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        y = self.conv2(self.second(self.conv1(self.first(x))))
        return self.head((x + y).mean((2, 3)))


@ACTS
@pytest.mark.parametrize("norm", [("GroupNorm", 3, 6), ("BatchNorm2d", 6)])
def test_a_diffusion_block_trains_saves_and_loads(
    kernels, norm, act, tmp_path
):
    torch.manual_seed(0)
    x, target = torch.randn(4, 6, 5, 5), torch.randint(3, (4,))
    model = Diffusion(lambda: pair(norm, act)[0])
    twin = Diffusion(lambda: pair(norm, act)[1])
    twin.load_state_dict(model.state_dict())
    trained(model, x, target)
    trained(twin, x, target)
    assert kernels.seen.count("extras") == 3 * 2
    assert_close(list(model.parameters()), list(twin.parameters()))
    torch.save(model.state_dict(), tmp_path / "state")
    other = Diffusion(lambda: pair(norm, act, seed=1)[0])
    other.load_state_dict(torch.load(tmp_path / "state"))
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other
    model.eval()
    for loaded in copies:
        assert_close(loaded.eval()(x), model(x))
    state = {k: 0.5 * v for k, v in model.state_dict().items()}
    assert_close(
        functional_call(model, state, (x,)),
        functional_call(twin.eval(), state, (x,)),
    )
