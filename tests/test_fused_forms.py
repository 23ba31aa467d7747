"""A norm with its neighbor in one step: the residual addition before it."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from devices import DEVICES
from test_fused import Kernels
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import normlib
from normlib import backends, functional, reference
from normlib.axes import trailing_view
from normlib.backends import eager, fused
from normlib.testing import TOLERANCE, assert_close


class Fusing(Kernels):
    """Counting kernels that know of extras."""

    def forward(self, x, *args, extras=None, **kind):
        if extras is not None:
            self.seen.append("extras")
            if extras.residual is not None:
                x = torch.add(x, extras.residual, out=extras.total)
        return super().forward(x, *args, **kind)

    def backward(self, *args, extras=None, **kind):
        dx, *rest = super().backward(*args, **kind)
        if extras is not None and extras.dtotal is not None:
            dx = None if dx is None else dx + extras.dtotal
        return dx, *rest

    def backend(self):
        module = super().backend()
        module.fuse = functools.partial(fused.fuse, self)
        return module


@pytest.fixture
def kernels(monkeypatch):
    """Counting kernels behind the default choice, at every size."""
    counting = Fusing()
    table = {"counting": counting.backend(), "eager": eager}
    monkeypatch.setattr(backends, "BACKENDS", table)
    monkeypatch.setattr(backends, "LEAST", 0)
    return counting


@pytest.fixture(params=[*backends.available(), "default"])
def backend(request, monkeypatch):
    monkeypatch.setattr(backends, "LEAST", 0)
    if request.param == "default":
        yield None
        return
    with backends.use_backend(request.param):
        yield request.param


def declined(kernels, f):
    """Run f, and say whether the kernels stayed out of it."""
    kernels.seen.clear()
    result = f()
    assert not kernels.seen
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "mean"),
    [
        (torch.float64, 1e4),
        (torch.float32, 0.5),
        (torch.float32, 1e4),
        (torch.bfloat16, 0.5),
        (torch.float16, 0.5),
    ],
    ids=str,
)
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


def test_a_residual_and_its_gradient_may_lie_otherwise_in_memory(backend):
    x, residual, weight, bias, dy, dtotal = rows((6, 6), dtype=torch.float32)
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
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@NAMES
def test_what_is_not_finite_stays_in_its_row(backend, name, value):
    x, residual, weight, bias, *_ = rows((4, 9), dtype=torch.float32)
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
        ((X, R, (8,)), RuntimeError, "8"),
        ((X, R, (9,), torch.ones(8)), RuntimeError, "8"),
        ((X, R, (9,), None, -1.0), ValueError, "-1"),
    ],
    ids=str,
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


class AddThenNorm(nn.Module):
    """What the fused layers stand for, by torch.nn."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual):
        total = x + residual
        return self.norm(total), total


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
