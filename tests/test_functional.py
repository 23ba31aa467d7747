"""normlib.functional: the table of norms, then batch norm against torch."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, draw
from devices import over_devices, over_dtypes
from hypothesis import given, settings
from hypothesis import strategies as st

from normlib import backends, functional, reference
from normlib.axes import View, channel_view
from normlib.reference import normalize_backward
from normlib.testing import TOLERANCE, assert_close


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def serves(backend, case, x, *parameters):
    """Whether a forced backend serves a call; the default always does."""
    if backend is None:
        return True
    module = backends.BACKENDS[backend]
    weight, bias = (*parameters, None)[:2]
    return module.supports(x, case.view, weight, bias, **case.kind)


@over_devices
@over_dtypes
def test_every_norm_equals_the_reference(case, backend, device, dtype, mean):
    x, weight, bias, dy = draw(case, mean=mean if case.has_bias else 0.5)
    half = dtype in (torch.float16, torch.bfloat16)
    # torch warns of an RMS norm in mixed precision.
    kept = torch.float32 if half and case.has_bias else dtype
    x, dy = x.to(dtype), dy.to(dtype)
    parameters = [None if p is None else p.to(kept) for p in (weight, bias)]
    arrays = [
        None if p is None else p.double().numpy() for p in (x, *parameters)
    ]
    expected, cache = case.reference(*arrays, 1e-5)
    gradients = normalize_backward(dy.double().numpy(), cache)
    leaves = [
        None if p is None else p.to(device).requires_grad_()
        for p in (x, *parameters)
    ]
    if not serves(backend, case, *leaves):
        with pytest.raises(RuntimeError, match="does not serve"):
            case.of(functional, *leaves, 1e-5)
        return
    y = case.of(functional, *leaves, 1e-5)
    assert y.dtype == dtype
    y.backward(dy.to(device))
    tolerance = TOLERANCE[dtype]
    if backend != "eager" and mean > 1e2 and dtype == torch.float32:
        tolerance = 5e-3  # what torch's own kernels lose there
    assert_close(y, expected, tolerance=tolerance)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf is not None:
            gradient = gradient.reshape(leaf.shape)
            assert_close(leaf.grad, gradient, tolerance=tolerance)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e2, 1e4, 1e6])
def test_far_from_zero_it_loses_no_more_digits_than_torch(mean):
    x = (torch.randn(64, 16, 8, 8, dtype=torch.float64) + mean).float()
    dy = torch.randn(x.shape)
    results = []
    for f, dtype in (
        (F.batch_norm, torch.float64),
        (functional.batch_norm, torch.float32),
        (F.batch_norm, torch.float32),
    ):
        leaf = x.to(dtype).requires_grad_()
        y = f(leaf, None, None, training=True)
        y.backward(dy.to(dtype))
        results.append((y.detach().double(), leaf.grad.double()))
    exact, ours, theirs = results
    for e, o, t in zip(exact, ours, theirs, strict=True):
        error, torchs = (o - e).abs().max(), (t - e).abs().max()
        assert error <= max(torchs, 4e-6)


def test_first_and_second_derivatives_by_finite_differences(case, backend):
    x, weight, bias, _ = draw(case)
    leaves = [p.requires_grad_() for p in (x, weight, bias) if p is not None]

    def f(x, weight, bias=None):
        return case.of(functional, x, weight, bias, 1e-3)

    if serves(backend, case, *leaves):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (8, 32, 24, 24)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_group_norm_of_channels_last_keeps_its_digits(shape, mean):
    """PyTorch's own kernel does not: E[x^2] - E[x]^2 in float32."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) + mean
    x = x.float().to(memory_format=torch.channels_last)
    dy = torch.randn(shape).to(memory_format=torch.channels_last)
    results = []
    for f, leaf, upstream in (
        (F.group_norm, x.double().contiguous(), dy.double()),
        (functional.group_norm, x.clone(), dy),
        (F.group_norm, x.contiguous(), dy.contiguous()),
    ):
        leaf.requires_grad_()
        y = f(leaf, 4)
        y.backward(upstream)
        results.append((y.detach().double(), leaf.grad.double()))
        if leaf.dtype == torch.float32 and f is functional.group_norm:
            assert y.is_contiguous(memory_format=torch.channels_last)
    for exact, ours, contiguous in zip(*results, strict=True):
        error, torchs = (
            (got - exact).abs().max() for got in (ours, contiguous)
        )
        assert error <= max(4 * torchs, 3e-6)


@pytest.mark.parametrize("shape", [(4096, 512), (16, 128, 32, 32)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_large_batch_norm_of_channels_last_keeps_its_digits(shape, mean):
    """PyTorch's own kernel adds float32 in chains as long as the batch."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) + mean
    exact = F.batch_norm(x, None, None, training=True)
    x = x.float()
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    y = functional.batch_norm(x, None, None, training=True)
    error = (y.double() - exact).abs().max()
    # A value of this size is off by so much before any arithmetic.
    assert error < 1e-4 + mean * 2e-7


def test_normalize_returns_the_biased_moments():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    view = channel_view(x.shape)
    _, mean, var = functional.normalize(x, view, over_batch=True)
    assert_close(mean, x.mean((0, 2)))
    assert_close(var, x.var((0, 2), correction=0))
    _, mean, var = functional.normalize(x, view)
    assert_close(mean, x.mean(2))
    assert_close(var, x.var(2, correction=0))


@settings(deadline=None, max_examples=50)
@given(
    shift=st.floats(-10, 10),
    scale=st.floats(0.1, 10),
    name=st.sampled_from(sorted(CASES)),
)
def test_shift_and_scale_of_the_input_change_nothing(shift, scale, name):
    """Shift: where the norm centers. Scale: always, where eps is zero."""
    case = CASES[name]
    x, *_ = draw(case)
    if case.view.count(case.kind["over_batch"]) == 1:
        return
    y = functional.normalize(x, case.view, eps=0.0, **case.kind)[0]
    moved = x * scale + (shift if case.kind["centered"] else 0.0)
    again = functional.normalize(moved, case.view, eps=0.0, **case.kind)[0]
    assert_close(again, y, tolerance=1e-8)


def test_group_norm_with_one_group_is_layer_norm_of_the_image():
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    one = functional.normalize(x, channel_view(x.shape, 1))[0]
    assert_close(one, F.layer_norm(x, x.shape[1:]))


def test_group_norm_with_a_group_for_each_channel_is_instance_norm():
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    assert_close(
        functional.normalize(x, channel_view(x.shape, 6))[0],
        F.instance_norm(x),
    )


def test_batch_norm_of_one_instance_is_instance_norm():
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    ours = functional.batch_norm(x, None, None, training=True)
    assert_close(ours, F.instance_norm(x))


def both(x, rm=None, rv=None, w=None, b=None, **kwargs):
    """Ours and torch's batch_norm on copies; the values, or the error."""
    results = []
    for f in (functional.batch_norm, F.batch_norm):
        running = [None if r is None else r.clone() for r in (rm, rv)]
        try:
            y = f(x, *running, w, b, **kwargs)
            results.append((y, *(r for r in running if r is not None)))
        except Exception as error:
            before = [r for r in (rm, rv) if r is not None]
            after = [r for r in running if r is not None]
            error.untouched = all(map(torch.equal, before, after))
            results.append(error)
    return results


X = torch.randn(4, 3, 5)
ZERO, ONE = torch.zeros(3), torch.ones(3)
BAD = {
    "no axes": ((torch.tensor(1.0),), {"training": True}),
    "one axis": ((X[0, 0],), {"training": True}),
    "weight too long": ((X, ZERO, ONE, torch.ones(4)), {"training": True}),
    "bias too short": ((X, ZERO, ONE, ONE, ZERO[:2]), {"training": True}),
    "running too long": ((X, torch.zeros(4), ONE), {"training": True}),
    "running too short": ((X, ZERO, ONE[:2]), {}),
    "running too short in training": (
        (X, ZERO, ONE[:2]),
        {"training": True},
    ),
    "running of another dtype": (
        (X, ZERO, ONE.double()),
        {"training": True},
    ),
    "eight bits": ((X.to(torch.float8_e5m2), ZERO, ONE), {}),
    "one running mean": ((X, ZERO, None), {"training": True}),
    "one running var": ((X, None, ONE), {"training": True}),
    "evaluation without statistics": ((X,), {}),
    "evaluation without variance": ((X, ZERO, None), {}),
    "one value": ((X[:1, :, 0], ZERO, ONE), {"training": True}),
    "eps 0 in training": ((X, ZERO, ONE), {"training": True, "eps": 0.0}),
    "negative eps": ((X, ZERO, ONE), {"training": True, "eps": -1.0}),
    "negative eps, evaluation": ((X, ZERO, ONE), {"eps": -1.0}),
    "integers": ((X.long(), ZERO, ONE), {"training": True}),
    "booleans": ((X > 0, ZERO, ONE), {}),
    "complex": ((X + 0j,), {"training": True}),
    "float64 input": ((X.double(), ZERO, ONE), {"training": True}),
    "float64 weight": ((X, ZERO, ONE, ONE.double()), {"training": True}),
    "16-bit weight": ((X, None, None, ONE.half()), {"training": True}),
    "mixed parameters": (
        (X.bfloat16(), ZERO, ONE, ONE.bfloat16()),
        {"training": True},
    ),
    "running mean with gradient": (
        (X, ZERO.clone().requires_grad_(), ONE),
        {"training": True},
    ),
    "not a tensor": (([[1.0, 2.0, 3.0]],), {"training": True}),
}


@pytest.mark.parametrize(("args", "kwargs"), BAD.values(), ids=BAD.keys())
def test_bad_input_raises_what_torch_raises(args, kwargs):
    ours, theirs = both(*args, **kwargs)
    assert isinstance(theirs, Exception), "torch accepts this"
    assert isinstance(ours, type(theirs)), (repr(ours), repr(theirs))
    assert ours.untouched


@pytest.mark.parametrize(
    ("args", "kwargs", "values"),
    [
        ((X, ZERO, ONE, torch.ones(4)), {"training": True}, r"3 .* 4"),
        ((X[:1, :, 0],), {"training": True}, r"\(1, 3\)"),
        ((X,), {"training": True, "eps": -2.5}, r"-2\.5"),
        ((X.long(),), {"training": True}, "int64"),
        ((X, ZERO, None), {"training": True}, "running_var is None"),
        ((X.double(), ZERO, ONE), {}, "float64.*float32"),
    ],
)
def test_errors_carry_the_rule_and_the_received_values(args, kwargs, values):
    with pytest.raises(Exception, match=values):
        functional.batch_norm(
            *args,
            **(
                {"running_mean": None, "running_var": None}
                if len(args) == 1
                else {}
            ),
            **kwargs,
        )


def test_normalize_refuses_bad_input():
    view = channel_view(X.shape)
    with pytest.raises(NotImplementedError, match="int64"):
        functional.normalize(X.long(), view)
    with pytest.raises(ValueError, match="-1"):
        functional.normalize(X, view, eps=-1.0)
    with pytest.raises(RuntimeError, match=r"holds 72 values.*60"):
        functional.normalize(X, View(4, 3, 1, 6))
    with pytest.raises(RuntimeError, match="3 elements not 4"):
        functional.normalize(X, view, torch.ones(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_nan_and_infinity_propagate_as_in_torch(bad, training):
    x = X.clone()
    x[1, 2, 3] = bad
    ours, theirs = both(x, ZERO, ONE, ONE, ZERO, training=training)
    assert_close(ours, theirs)
    assert ours[0][:, :2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_output(shape, training):
    ours, theirs = both(
        torch.empty(shape), ZERO, ONE, ONE, ZERO, training=training
    )
    assert_close(ours, theirs)


def test_a_batch_without_channels_is_empty_too():
    ours, theirs = both(torch.empty(4, 0, 2), training=True)
    assert_close(ours, theirs)


def test_momentum_one_forgets_the_past():
    rm, rv = torch.full((3,), 9.0), torch.full((3,), 9.0)
    ours, theirs = both(X, rm, rv, training=True, momentum=1.0)
    assert_close(ours, theirs)


def test_eps_larger_than_the_variance_shrinks_the_output():
    x = torch.randn(64, 2, dtype=torch.float64) * 1e-3
    y = functional.batch_norm(x, None, None, training=True, eps=1e-5)
    s2 = x.var(0, correction=0)
    assert_close(y.var(0, correction=0), s2 / (s2 + 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_computed_in_thirty_two(case, dtype):
    """The result is the float32 one, rounded once."""
    x, weight, bias, _ = (
        None if p is None else p.to(dtype) for p in draw(case)
    )
    y, *stats = functional.normalize(x, case.view, weight, bias, **case.kind)
    wide = functional.normalize(
        x.float(),
        case.view,
        weight.float(),
        None if bias is None else bias.float(),
        **case.kind,
    )
    assert torch.equal(y, wide[0].to(dtype))
    assert all(map(torch.equal, stats, wide[1:]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_norm_of_sixteen_bits_is_rounded_once(training, dtype):
    parts = [torch.randn(4, 3, 5), 3 * torch.rand(3), 3 * torch.rand(3)]
    parts = [p.to(dtype) for p in (*parts, torch.randn(3), torch.randn(3))]
    y = functional.batch_norm(*parts, training)
    wide = functional.batch_norm(*(p.float() for p in parts), training)
    assert y.dtype == dtype
    if not training:
        assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_weight_and_bias_are_independent(given, training):
    w = torch.randn(3) if given == "weight" else None
    b = torch.randn(3) if given == "bias" else None
    assert_close(*both(X, ZERO, ONE, w, b, training=training))


def test_evaluation_takes_an_eps_of_zero():
    assert_close(*both(X, ZERO, 2 * ONE, eps=0.0))


def test_two_values_a_channel_are_enough():
    assert_close(*both(X[:2, :, 0], ZERO, ONE, training=True))


def test_the_returned_statistics_carry_their_gradient():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    _, mean, var = functional.normalize(
        x, channel_view(x.shape), over_batch=True
    )
    (dmean,) = torch.autograd.grad(mean.sum(), x, retain_graph=True)
    (dvar,) = torch.autograd.grad(var.sum(), x)
    assert_close(dmean, torch.full_like(x, 1 / 6))
    assert_close(dvar, 2 / 6 * (x - x.mean(0)))


def test_every_default_eps_is_torchs():
    x = torch.randn(2, 3, 4, dtype=torch.float64) * 1e-3
    pairs = {
        "batch_norm": ((), F.batch_norm(x, None, None, training=True)),
        "instance_norm": ((), F.instance_norm(x)),
        "group_norm": ((3,), F.group_norm(x, 3)),
        "layer_norm": (((4,),), F.layer_norm(x, (4,))),
    }
    for name, (args, expected) in pairs.items():
        ours, _ = getattr(reference, name)(x.numpy(), *args)
        assert_close(ours, expected)
    view = channel_view(x.shape)
    assert_close(functional.normalize(x, view)[0], F.instance_norm(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("norm", "size"), [("layer_norm", (4, 5)), ("group_norm", 2)]
)
def test_where_torch_refuses_float32_parameters_the_formula_serves(
    norm, size, dtype, monkeypatch
):
    """Its kernels for CUDA do; of other refusals nothing is made up."""
    x = torch.randn(3, 4, 5).to(dtype)
    shape = size if norm == "layer_norm" else (4,)
    weight, bias = torch.randn(2, *shape)
    expected = getattr(F, norm)(x, size, weight, bias)

    def refuses(*args):
        raise RuntimeError("expected scalar type Half but found Float")

    monkeypatch.setattr(F, norm, refuses)
    ours = getattr(functional, norm)
    y = ours(x, size, weight, bias)
    assert y.dtype == dtype
    assert_close(y, expected)
    for call in (
        (x, size, weight.to(dtype), bias.to(dtype)),
        (x.float(), size, weight, bias),
    ):
        with pytest.raises(RuntimeError, match="found Float"):
            ours(*call)
