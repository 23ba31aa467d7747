"""The kernels of the CPU backend, each forced on shapes that it must serve.

The autograd around them is tested in test_fused.py, and every backend behind
the public functions in test_functional.py.
"""

import itertools

import numpy
import pytest
import torch
from cases import Case
from cases import draw as draw_case

import normlib
from benchmarks.speed import traced_peak
from normlib import backends, functional, reference
from normlib.backends import cpu
from normlib.testing import TOLERANCE, assert_close

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


PATHS = {
    # Long rows: a prime number of positions over the longest chain of
    # squares; one that is cut in two; an odd one that is neither.
    Case("batch_norm", (2, 2, 4099)): "_PLANES",
    Case("batch_norm", (2, 2, 8194)): "_PLANES",
    Case("batch_norm", (3, 5, 7, 9)): "_PLANES",
    Case("batch_norm", (1, 3, 1, 41)): "_PLANES",
    # Few positions: two, one less than a vector, more rows than one chain.
    Case("batch_norm", (3, 5, 2)): "_BATCH_COLUMNS",
    Case("batch_norm", (9, 5, 7)): "_BATCH_COLUMNS",
    Case("batch_norm", (520, 3, 2, 2)): "_BATCH_COLUMNS",
    Case("batch_norm", (5, 3, 4, 4)): "_BATCH_COLUMNS",
    # No positions; more rows than one chain, by an odd number.
    Case("batch_norm", (7, 5)): "_BATCH_COLUMNS",
    Case("batch_norm", (2, 1)): "_BATCH_COLUMNS",
    Case("batch_norm", (523, 3)): "_BATCH_COLUMNS",
    # One weight to a row, or none.
    Case("instance_norm", (2, 5, 3, 5)): "_ROWS",
    Case("instance_norm", (1, 1, 2)): "_ROWS",
    Case("group_norm", (3, 4, 9), groups=4): "_ROWS",
    Case("group_norm", (3, 6, 5), groups=3): "_GROUPS",
    Case("group_norm", (4, 6), groups=2): "_GROUPS",
    Case("layer_norm", (2, 3, 8), normalized=(8,)): "_LAYER",
    Case("layer_norm", (5, 33), normalized=(5, 33)): "_LAYER",
    Case("rms_norm", (5, 7), normalized=(7,)): "_RMS",
    Case("rms_norm", (1, 2, 3), normalized=(2, 3)): "_RMS",
    Case("rms_norm", (40, 65), normalized=(65,)): "_RMS",
}
CHANNELS_LAST = {
    Case("batch_norm", (3, 5, 7, 3)): "_BATCH_COLUMNS",
    Case("instance_norm", (2, 5, 3, 5)): "_COLUMNS",
    Case("instance_norm", (1, 3, 2, 1)): "_COLUMNS",
    Case("instance_norm", (2, 3, 2, 3, 2)): "_COLUMNS",
    # Two parts to a sample: 2 * 171 positions, 256 at most in a chain.
    Case("group_norm", (2, 6, 18, 19), groups=3): "_COLUMNS",
    Case("group_norm", (2, 6, 3, 3), groups=1): "_COLUMNS",
    Case("group_norm", (3, 4, 5, 1), groups=2): "_COLUMNS",
}
KERNELS = [(case, False) for case in PATHS] + [
    (case, True) for case in CHANNELS_LAST
]


def name(value):
    if not isinstance(value, Case):
        return "last" if value is True else None
    shape = "x".join(map(str, value.shape))
    return f"{value.norm} {shape}"


every_kernel = pytest.mark.parametrize(("case", "last"), KERNELS, ids=name)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=str
)


def draw(case, last, dtype=torch.float32, mean=0.5, affine=True):
    """x, weight, bias and dy of a kernel's case."""
    x, weight, bias, dy = draw_case(case, mean=mean)
    x, dy = x.to(dtype), dy.to(dtype)
    if last:
        x, dy = (t.contiguous(memory_format=LAST[x.dim()]) for t in (x, dy))
    if not affine:
        return x, None, None, dy
    bias = None if bias is None else bias.to(dtype)
    return x, weight.to(dtype), bias, dy


def run(case, x, weight, bias, dy, needs=None, eps=1e-3):
    """All that the kernels give: y, mean, var, rstd, dx, dweight, dbias."""
    view, kind = case.view, case.kind
    if needs is None:
        needs = (True, weight is not None, bias is not None)
    found = cpu.forward(x, view, weight, bias, eps, **kind)
    *found, kept = found
    grads = cpu.backward(dy, x, view, weight, kept, needs, **kind)
    return *found, kept[1], *grads


def expected(case, x, weight, bias, dy, eps=1e-3):
    """y, dx, dweight, dbias of the reference, float64."""
    arrays = [
        None if p is None else p.double().numpy() for p in (x, weight, bias)
    ]
    y, cache = case.reference(*arrays, eps)
    return y, *reference.normalize_backward(dy.double().numpy(), cache)


def flat(values):
    return [numpy.asarray(v).reshape(-1) for v in values if v is not None]


@every_kernel
def test_each_path_is_reached(case, last):
    x, weight, bias, _ = draw(case, last)
    assert cpu.supports(x, case.view, weight, bias, **case.kind)
    path = cpu._path(x, case.view, weight, bias, *case.kind.values())
    assert path is getattr(cpu, (CHANNELS_LAST if last else PATHS)[case])


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@each_dtype
@every_kernel
def test_forward_and_backward_are_the_references(case, last, dtype, affine):
    x, weight, bias, dy = draw(case, last, dtype, affine=affine)
    y, mean, var, rstd, *grads = run(case, x, weight, bias, dy)
    want = expected(case, x, weight, bias, dy)
    tolerance = TOLERANCE[dtype]
    assert_close(y, want[0], tolerance=tolerance)
    assert_close(grads[0], want[1], tolerance=tolerance)
    for got, exact in zip(flat(grads[1:]), flat(want[2:]), strict=False):
        assert_close(got, exact, tolerance=tolerance)
    axes = (0, 2, 3) if case.kind["over_batch"] else (2, 3)
    x4 = x.double().reshape(case.view)
    shape = x4.mean(axes).shape
    if case.kind["centered"]:
        assert_close(mean.view(shape), x4.mean(axes), tolerance=tolerance)
        square = x4.var(axes, correction=0)
    else:
        square = x4.square().mean(axes)
    assert_close(
        rstd.view(shape), (square + 1e-3).rsqrt(), tolerance=tolerance
    )
    if case.kind["over_batch"]:
        assert_close(var, square, tolerance=tolerance)


@pytest.fixture
def small(monkeypatch):
    """Blocks of few values, and no size from which torch's kernel is taken,
    so that small inputs take every branch of large ones."""
    monkeypatch.setattr(cpu, "BLOCK", 50)
    monkeypatch.setattr(cpu, "LARGE", 0)
    monkeypatch.setattr(cpu, "CHAIN_OF_COLUMNS", 4)
    monkeypatch.setattr(cpu, "CHAIN", 64)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mean", [0.5, 1e3])
@every_kernel
def test_blocks_and_parts_add_up(case, last, mean):
    data = draw(case, last, torch.float64, mean)
    y, _, _, _, *grads = run(case, *data)
    want = expected(case, *data)
    for got, exact in zip(flat((y, *grads)), flat(want), strict=False):
        assert_close(got, exact, tolerance=1e-7)


def torchs(case, x, weight, bias, dy, eps=1e-3):
    """y, dx, dweight, dbias of torch.nn.functional."""
    leaves = [
        None if p is None else p.clone().requires_grad_()
        for p in (x, weight, bias)
    ]
    y = case.of(torch.nn.functional, *leaves, eps)
    wanted = [p for p in leaves if p is not None]
    return y.detach(), *torch.autograd.grad(y, wanted, dy)


WIDE = [
    (Case("batch_norm", (16, 8, 24, 24)), False),
    (Case("batch_norm", (300, 8, 5)), False),
    (Case("batch_norm", (4, 4, 128, 128)), False),
    (Case("batch_norm", (16, 8, 24, 24)), True),
    (Case("instance_norm", (8, 8, 24, 24)), False),
    (Case("instance_norm", (8, 8, 24, 24)), True),
    (Case("instance_norm", (2, 8, 65, 65)), True),
    (Case("instance_norm", (1, 4, 257, 257)), True),
    (Case("batch_norm", (20_001, 3, 2)), False),
    (Case("group_norm", (8, 16, 24, 24), groups=4), False),
    (Case("layer_norm", (256, 384), normalized=(384,)), False),
    (Case("rms_norm", (256, 384), normalized=(384,)), False),
]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
@pytest.mark.parametrize(("case", "last"), WIDE, ids=name)
def test_no_digit_is_lost_that_torch_keeps(case, last, mean, affine):
    """Standard deviation 1 about the given mean."""
    if not affine and not case.has_bias and mean:
        pytest.skip("the same arithmetic as with a weight")
    x, weight, bias, dy = draw(case, last, mean=2 * mean, affine=affine)
    x = x / 2
    ours = run(case, x, weight, bias, dy, eps=1e-5)
    ours = flat((ours[0], *ours[4:]))
    theirs = flat(torchs(case, x, weight, bias, dy, eps=1e-5))
    exact = flat(expected(case, x, weight, bias, dy, eps=1e-5))
    for got, other, want in zip(ours, theirs, exact, strict=False):
        scale = max(1.0, numpy.abs(want).max())
        error, torch_error = (
            numpy.abs(v - want).max() / scale for v in (got, other)
        )
        assert error <= 1.5 * max(torch_error, 1e-6)


@pytest.mark.parametrize(
    ("shape", "mean"),
    [((4, 2, 3000), 12.0), ((1, 2, 1_000_003), 0.0)],
    ids=["away from 0", "a long chain"],
)
def test_the_variance_keeps_its_digits(shape, mean):
    """E[x^2] - E[x]^2 would lose some, as would a sum of a million."""
    case = Case("batch_norm", shape)
    x, weight, bias, dy = draw(case, False, mean=2 * mean)
    _, _, var, *_ = run(case, x / 2, weight, bias, dy)
    exact = (x / 2).double().var((0, 2), correction=0)
    assert ((var - exact) / exact).abs().max() < 5e-7


@pytest.mark.parametrize(
    ("means", "near"),
    [
        ([0.0, 5.8, -5.8], True),  # where the standard deviation is 2
        ([0.0, 0.0, 6.2], False),
        ([0.0, 0.0, -6.2], False),
        ([0.0, 0.0, torch.nan], False),
        ([0.0, 0.0, torch.inf], False),
    ],
    ids=str,
)
def test_one_mean_away_from_zero_is_noticed(means, near):
    mean = torch.tensor(means)
    assert cpu._near(mean, torch.full((3,), 4.0), 3) == near
    assert cpu._modest(mean, torch.full((3,), 0.5), 3) == near


@pytest.mark.parametrize("mean", [100.0, 1e4])
@pytest.mark.parametrize(
    "case",
    [
        Case("batch_norm", (16, 8, 24, 24)),
        Case("batch_norm", (9000, 8)),
        Case("group_norm", (4, 16, 24, 24), groups=4),
    ],
    ids=name,
)
def test_columns_keep_the_digits_of_planes(case, mean):
    """PyTorch's kernel for columns does not."""
    last = len(case.shape) > 2
    x, weight, bias, dy = draw(case, last, mean=2 * mean)
    x = x / 2
    ours = run(case, x, weight, bias, dy, eps=1e-5)
    shape = case.shape if last else (1, *case.shape[::-1], 1)
    planes = (x.contiguous() if last else x.T.reshape(shape)).contiguous()
    exact = flat(expected(case, x, weight, bias, dy, eps=1e-5))
    if last:
        theirs = torchs(case, planes, weight, bias, dy.contiguous(), eps=1e-5)
        errors = [
            numpy.abs(a - b).max()
            for a, b in zip(flat(theirs), exact, strict=True)
        ]
    else:  # a channel is a plane of 9000 positions: its rounding by formula
        unit = mean * 2.0**-23
        errors = [unit, unit, 9000 * unit, 1e-3]
    for got, want, allowed in zip(
        flat((ours[0], *ours[4:])), exact, errors, strict=True
    ):
        rounding = 1e-6 * max(1.0, numpy.abs(want).max())
        assert numpy.abs(got - want).max() <= 2 * allowed + rounding


@pytest.mark.parametrize(
    ("norm", "shape", "served"),
    [
        ("group_norm", (3, 6, 5), True),
        ("layer_norm", (4, 6), True),
        ("rms_norm", (4, 6), False),
    ],
)
def test_a_bias_without_a_weight_is_added_or_declined(norm, shape, served):
    trailing = norm != "group_norm"
    view = (
        functional.trailing_view(shape, (6,))
        if trailing
        else functional.channel_view(shape, 3)
    )
    kind = {"over_batch": False, "centered": norm != "rms_norm"}
    x, bias = torch.randn(shape), torch.randn(6)
    assert cpu.supports(x, view, None, bias, **kind) == served
    if served:
        y = cpu.forward(x, view, None, bias, 1e-3, **kind)[0]
        plain = cpu.forward(x, view, None, None, 1e-3, **kind)[0]
        assert_close(y, plain + bias.view(-1, *[1] * (not trailing)))


@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
@every_kernel
def test_a_constant_input_gives_the_bias(case, last, value):
    """But for the rounding of x * rstd, where rstd is 1 / sqrt(eps)."""
    if not case.kind["centered"]:
        pytest.skip("not centered, a constant is no zero")
    x, weight, bias, dy = draw(case, last)
    x = torch.full_like(x, value)
    y, *_, dx, _, _ = run(case, x, weight, bias, dy, eps=1e-4)
    want, exact_dx, *_ = expected(case, x, weight, bias, dy, eps=1e-4)
    rounding = value * 100 * weight.abs().max().item() * 2**-21
    assert numpy.abs(y.double().numpy() - want).max() <= rounding + 1e-6
    assert_close(dx, exact_dx, tolerance=1e-4 + 1e-6 * value, floor=0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@every_kernel
def test_nan_and_infinity_spread_as_in_torch(case, last, value):
    x, weight, bias, dy = draw(case, last)
    x[(0,) * x.dim()] = value
    y, mean, var, *_, dx, dweight, _ = run(case, x, weight, bias, dy)
    theirs = torchs(case, x, weight, bias, dy)
    assert torch.equal(y.isnan(), theirs[0].isnan())
    assert torch.equal(dx.isnan(), theirs[1].isnan())
    assert torch.equal(dweight.isnan(), theirs[2].view(-1).isnan())
    if case.kind["over_batch"]:
        assert not mean[0].isfinite()
        assert var[0].isnan()
        assert torch.equal(mean[0].isnan(), torch.tensor(value).isnan())


@every_kernel
def test_nothing_given_is_written_to(case, last):
    data = draw(case, last)
    before = [None if p is None else p.clone() for p in data]
    y, *_, dx, dweight, dbias = run(case, *data)
    for p, q in zip(data, before, strict=True):
        assert p is None or torch.equal(p, q)
    given = {p.data_ptr() for p in data if p is not None}
    for fresh in (y, dx, dweight, dbias):
        assert fresh is None or fresh.data_ptr() not in given


@pytest.mark.parametrize("value", [0.5, None], ids=["one value", "one row"])
@every_kernel
def test_an_expanded_gradient_is_read_as_what_it_stands_for(case, last, value):
    x, weight, bias, dy = draw(case, last)
    thin = dy[:1] if value is None else torch.full((1,) * dy.dim(), value)
    thin = thin.expand(dy.shape)
    before = thin.clone()
    got = run(case, x, weight, bias, thin)
    want = run(case, x, weight, bias, before)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert torch.equal(thin, before)


@every_kernel
def test_a_gradient_in_another_layout_is_read_right(case, last):
    x, weight, bias, dy = draw(case, last)
    turned = dy.mT.contiguous().mT
    got = run(case, x, weight, bias, turned)[4:]
    want = run(case, x, weight, bias, dy)[4:]
    for a, b in zip(flat(got), flat(want), strict=True):
        assert_close(a, b)


@every_kernel
def test_parameters_with_gaps_are_read_right(case, last):
    x, weight, bias, dy = draw(case, last)

    def thin(p):
        return None if p is None else torch.stack([p, p + 1], -1)[..., 0]

    got = run(case, x, thin(weight), thin(bias), dy)
    want = run(case, x, weight, bias, dy)
    for a, b in zip(got, want, strict=True):
        assert a is None or torch.equal(a, b)


@every_kernel
def test_y_and_dx_have_the_layout_of_x(case, last):
    x, weight, bias, dy = draw(case, last)
    y, *_, dx, _, _ = run(case, x, weight, bias, dy)
    for fresh in (y, dx):
        assert fresh.stride() == x.stride()
        assert fresh.dtype == x.dtype
        assert fresh._base is None


@every_kernel
def test_only_what_is_needed_comes_back_and_is_the_same(case, last):
    x, weight, bias, dy = draw(case, last)
    full = run(case, x, weight, bias, dy)[4:]
    size = case.view.G * case.view.K
    for needs in itertools.product([False, True], repeat=3):
        if bias is None and needs[2]:
            continue
        # Without dx, the caller has not kept the weight.
        scale = weight if needs[0] else None
        found = cpu.forward(x, case.view, weight, bias, 1e-3, **case.kind)
        got = cpu.backward(
            *(dy, x, case.view, scale, found[3], needs), **case.kind
        )
        for wanted, a, b in zip(needs, got, full, strict=True):
            assert (a is not None) == wanted
            assert a is None or torch.equal(a, b)
        assert all(p is None or p.numel() == size for p in got[1:])


X = torch.randn(4, 6, 3)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (X.bfloat16(), "16 bits"),
        (X[:0], "nothing to normalize"),
        (X[:1, :, :1].contiguous(), "one value to a statistic"),
        (X[:, :, ::2], "gaps"),
        (X.transpose(0, 1), "transposed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_path_does_not_serve_is_declined(x, why):
    view = functional.channel_view(x.shape)
    kind = {"over_batch": True, "centered": True}
    assert not cpu.supports(x, view, None, None, **kind)


def test_trailing_axes_are_not_taken_for_channels():
    """Layer norm over (H, W), where H * W is the number of channels."""
    x = torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)
    view = functional.trailing_view(x.shape, (2, 2))
    kind = {"over_batch": False, "centered": True}
    assert not cpu.supports(x, view, None, None, **kind)


def test_parameters_of_another_dtype_are_declined():
    view = functional.channel_view(X.shape)
    kind = {"over_batch": True, "centered": True}
    weight = torch.ones(6)
    assert cpu.supports(X, view, weight, weight, **kind)
    assert not cpu.supports(X, view, weight.double(), weight, **kind)
    assert not cpu.supports(X, view, weight, weight.double(), **kind)


LARGE = [
    (Case("batch_norm", (16, 32, 32, 32)), False),
    (Case("batch_norm", (1024, 128, 2, 2)), False),
    (Case("instance_norm", (16, 32, 32, 32)), False),
    (Case("instance_norm", (16, 32, 32, 32)), True),
    (Case("group_norm", (16, 32, 32, 32), groups=8), True),
    (Case("layer_norm", (1024, 512), normalized=(512,)), False),
    (Case("rms_norm", (1024, 512), normalized=(512,)), False),
]


@pytest.mark.parametrize(("case", "last"), LARGE, ids=name)
def test_both_passes_hold_no_more_than_torchs(case, last):
    affine = case.norm != "layer_norm"
    x, weight, bias, dy = draw(case, last, affine=affine)

    def ours():
        return run(case, x, weight, bias, dy)

    def theirs():
        return torchs(case, x, weight, bias, dy)

    spare = 2**17  # the statistics, in float64 while they merge
    assert traced_peak(ours) <= traced_peak(theirs) + spare


def test_backend_is_listed():
    assert "cpu" in backends.available()


@pytest.mark.parametrize("size", [35, 64, 112])
def test_planes_of_one_value_each_have_a_mean(size):
    """Where each sum of a row is a chain of equal roundings."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 1, 1, generator=g)
    x = x.expand(8, 64, size, size).contiguous()
    layer = normlib.BatchNorm2d(64, momentum=1.0)
    y, exact = layer(x), x[:, :, 0, 0].double()
    assert "Fused" in type(y.grad_fn).__name__
    mean, std = exact.mean(0), (exact.var(0, correction=0) + 1e-5).sqrt()
    assert ((layer.running_mean - mean) / std).abs().max() < 1e-6
    want = ((exact - mean) / std)[:, :, None, None]
    assert (y - want).abs().max() < 5e-6
