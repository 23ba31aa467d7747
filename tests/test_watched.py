"""Torch's own kernels for the CPU, where something is added to them."""

import copy

import pytest
import torch
from torch import nn

import normlib
from normlib import backends, functional
from normlib.backends import cpu
from normlib.testing import assert_close


def draw(shape, mean=0.0, last=False, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).add_(mean).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.fixture
def every_size(monkeypatch):
    monkeypatch.setattr(backends, "LEAST", 0)
    monkeypatch.setattr(cpu, "WATCHED", 0)
    monkeypatch.setattr(cpu, "UNIT", 0)
    monkeypatch.setattr(cpu, "NARROW", 0)
    monkeypatch.setattr(cpu, "least", lambda *call: 0)
    monkeypatch.setattr(cpu, "pays", lambda *call, **kind: True)


def outcome(layer, x, dy):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


def exact(layer, x, dy):
    """The same in float64, of the formula."""
    twin = copy.deepcopy(layer).double()
    with normlib.use_backend("eager"):
        return outcome(twin, x.double(), dy.double()), twin


def off(got, want):
    scale = want.abs().max().clamp(min=1.0)
    return float((got.double() - want).detach().abs().max() / scale.detach())


WATCHED = {
    "dense": (normlib.BatchNorm1d, (8,), (9000, 8), False),
    "batch, last": (normlib.BatchNorm2d, (8,), (16, 8, 24, 24), True),
    "group, last": (normlib.GroupNorm, (4, 16), (4, 16, 24, 24), True),
}
over_watched = pytest.mark.parametrize(
    ("make", "sizes", "shape", "last"), WATCHED.values(), ids=WATCHED
)


@pytest.mark.usefixtures("every_size")
@over_watched
def test_near_zero_it_is_torchs_own_call(make, sizes, shape, last):
    ours = make(*sizes)
    theirs = getattr(nn, make.__name__)(*sizes)
    x, dy = draw(shape, 0.5, last), draw(shape, 0, last, 1)
    for a, b in zip(outcome(ours, x, dy), outcome(theirs, x, dy), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("mean", [100.0, 1e4])
@over_watched
def test_far_from_zero_it_is_not(make, sizes, shape, last, mean):
    ours = make(*sizes)
    theirs = getattr(nn, make.__name__)(*sizes)
    x, dy = draw(shape, mean, last), draw(shape, 0, last, 1)
    wanted, twin = exact(ours, x, dy)
    found = outcome(ours, x, dy), outcome(theirs, x, dy)
    ours_off, theirs_off = (
        [off(*p) for p in zip(f, wanted, strict=True)] for f in found
    )
    assert ours_off[0] < theirs_off[0] / 2
    assert max(ours_off[1:3]) <= max(theirs_off[1:3])
    for a, b in zip(ours.buffers(), twin.buffers(), strict=True):
        assert_close(a.double(), b.double(), tolerance=2e-7 * mean)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_running_statistics_move_once(mean):
    x = draw((9000, 8), mean)
    layer = normlib.BatchNorm1d(8, momentum=0.5)
    versions = [b._version for b in layer.buffers()][:2]
    layer(x)
    half = x.double().mean(0) / 2
    assert_close(
        layer.running_mean.double(), half, tolerance=1e-6 * mean + 1e-6
    )
    var = x.double().var(0) / 2 + 0.5
    assert_close(layer.running_var.double(), var, tolerance=1e-4)
    assert layer.num_batches_tracked == 1
    assert [b._version for b in layer.buffers()][:2] == versions


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_without_running_statistics(mean):
    x = draw((9000, 8), mean)
    y = functional.batch_norm(x, None, None, training=True)
    assert_close(y.double().mean(0), torch.zeros(8).double(), tolerance=1e-3)
    assert_close(y.double().var(0), torch.ones(8).double(), tolerance=1e-3)


@pytest.mark.usefixtures("every_size")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_how_far_is_far(sign):
    """Ten standard deviations for batch norm, one for group norm."""
    none = (None, None, None)
    for mean, near in ((8.0, True), (12.0, False)):
        x = draw((5000, 4), sign * mean)
        y = cpu.watched_batch_norm(x, *none, 0.1, 1e-5)
        assert (y is not None) == near
    for mean, near in ((0.8, True), (1.2, False)):
        x = draw((4, 6, 20, 20), sign * mean, last=True)
        y = cpu.watched_group_norm(x, 2, *none[1:], 1e-5)
        assert (y is not None) == near


@pytest.mark.usefixtures("every_size")
def test_a_nan_in_one_channel_hides_no_other_that_is_far():
    layer, (x, dy) = normlib.BatchNorm1d(2), (draw((9000, 2)) for _ in "xy")
    x[:, 1] += 1e4
    wanted, _ = exact(normlib.BatchNorm1d(1), x[:, 1:], dy[:, 1:])
    x[0, 0] = torch.nan
    y, dx, *_ = outcome(layer, x, dy)
    assert y[:, 0].isnan().all()
    assert off(y[:, 1:], wanted[0]) < 2e-3
    assert off(dx[:, 1:], wanted[1]) < 2e-3
    assert_close(layer.running_mean[1], 0.1 * x[:, 1].mean(), tolerance=1e-5)


def last_group(channels, groups, **needs):
    x = draw((2, channels, 3, 3), last=True)
    x.requires_grad_(needs.get("x", False))
    weight, bias = (
        torch.ones(channels, requires_grad=needs.get(name, False))
        for name in ("weight", "bias")
    )
    return cpu.watched_group_norm(x, groups, weight, bias, 1e-5)


@pytest.mark.usefixtures("every_size")
def test_where_the_backward_would_be_slow_or_wrong_it_is_declined():
    assert last_group(8, 4) is not None
    assert last_group(8, 4, x=True) is None
    assert last_group(8, 2, x=True) is not None
    assert last_group(8, 2, weight=True) is None
    assert last_group(8, 2, bias=True) is None
    assert last_group(8, 8) is None
    args = (2, None, None, 1e-5)  # contiguous
    assert cpu.watched_group_norm(draw((5, 400)), *args) is None
    with torch.no_grad():
        assert last_group(8, 4, x=True, weight=True) is not None


def declined(x):
    running = torch.zeros(4), torch.ones(4)
    found = cpu.watched_batch_norm(x, running, None, None, 0.1, 1e-5)
    return found is None and torch.equal(running[0], torch.zeros(4))


@pytest.mark.usefixtures("every_size")
def test_what_is_not_watched():
    assert declined(draw((5, 4, 3, 3)))  # planes, which are ours
    assert declined(draw((5, 4), dtype=torch.bfloat16))
    assert declined(draw((4, 5, 3, 3)).transpose(0, 1))
    assert not declined(draw((5, 4)))


@pytest.mark.usefixtures("every_size")
def test_what_is_not_plain_is_not_watched(monkeypatch):
    asked = []
    for name in ("watched_batch_norm", "watched_group_norm"):
        monkeypatch.setattr(cpu, name, lambda *call: asked.append(call))
    x, last, ones = draw((5, 4)), draw((5, 4, 3, 3), last=True), torch.ones(4)
    special = ones.as_subclass(Special)
    batch = functional.batch_norm
    batch(x, ones, ones, special, training=True)
    batch(x, ones, ones, ones, special, training=True)
    batch(x, special, ones, training=True)
    batch(x, ones, special, training=True)
    functional.group_norm(last, 2, special)
    functional.group_norm(last, 2, ones, special)
    with torch.autocast("cpu"):
        batch(x, ones, ones, training=True)
        functional.group_norm(last, 2)
    assert not asked
    batch(x, ones, ones, ones, ones, training=True)
    functional.group_norm(last, 2, ones, ones)
    assert len(asked) == 2


class Special(torch.Tensor):
    pass


def test_small_calls_are_not_watched():
    assert declined(draw((5, 4)))


@pytest.mark.parametrize(
    ("layer", "last"),
    [
        (normlib.BatchNorm1d(2), False),
        (normlib.BatchNorm2d(2), True),
        (normlib.GroupNorm(1, 3), True),
        (normlib.GroupNorm(1, 2), True),
    ],
    ids=["dense", "batch, last", "group, last", "two to a group"],
)
def test_a_long_chain_is_not_left_to_float32(layer, last):
    batch = "Batch" in type(layer).__name__
    rows = 2 * cpu.CHAIN_OF_TORCH * (torch.get_num_threads() if batch else 1)
    channels = len(layer.weight)
    while rows * channels < 2**20:
        rows *= 2
    shape = (1, channels, rows // 512, 512) if last else (rows, channels)
    x = draw(shape, 0.9, last)
    want = copy.deepcopy(layer).double()(x.double())
    assert off(layer(x), want) < 2e-6
    with torch.no_grad():
        assert off(layer(x), want) < 2e-6


@pytest.mark.usefixtures("every_size")
def test_float64_is_left_to_torch_at_any_length(monkeypatch):
    monkeypatch.setattr(cpu, "CHAIN_OF_TORCH", 3)
    kinds = ((torch.float32, True), (torch.float64, False))
    for dtype, too_long in kinds:
        x, ones = draw((40, 4), dtype=dtype), torch.ones(4, dtype=dtype)
        y = cpu.watched_batch_norm(x, (ones - 1, ones), ones, None, 0.1, 1e-5)
        assert (y is None) == too_long
        x = draw((2, 6, 3, 3), last=True, dtype=dtype)
        y = cpu.watched_group_norm(x, 2, None, None, 1e-5)
        assert (y is None) == too_long


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (normlib.BatchNorm1d(3), (2**17, 3)),
        (normlib.BatchNorm2d(5), (32, 5, 64, 64)),
    ],
    ids=["dense", "channels last"],
)
def test_few_channels_are_not_left_to_torch(layer, shape, mean):
    """It does them one row after another, each sum in a single chain."""
    last = len(shape) == 4
    x, dy = draw(shape, mean, last), draw(shape, 0, last, 1)
    found, (wanted, _) = outcome(layer, x, dy), exact(layer, x, dy)
    assert "Fused" in type(found[0].grad_fn).__name__
    for got, want in zip(found, wanted, strict=True):
        assert off(got, want) < 2e-7 * max(mean, 10.0)


@pytest.mark.parametrize(
    ("channels", "dtype", "few"),
    [
        (8, torch.float32, False),
        (7, torch.float32, True),
        (4, torch.float64, False),
        (3, torch.float64, True),
    ],
)
def test_few_channels_are_not_those_that_fill_a_vector(channels, dtype, few):
    y = normlib.BatchNorm1d(channels, dtype=dtype)(
        draw((2**17, channels), dtype=dtype)
    )
    assert ("Fused" in type(y.grad_fn).__name__) == few


# Layer norm with a weight of ones


@pytest.mark.parametrize("shape", [(1024, 256), (64, 16, 96)])
def test_a_layer_norm_without_weight_agrees(shape):
    ours = normlib.LayerNorm(shape[1:], elementwise_affine=False)
    x, dy = draw(shape, 3.0), draw(shape, 0, seed=1)
    wanted, _ = exact(ours, x, dy)
    for got, want in zip(outcome(ours, x, dy), wanted, strict=True):
        assert off(got, want) < 2e-6
    grad = torch.autograd.grad  # a second derivative
    small = x[:2, ..., :5].double().requires_grad_()
    small32 = small.detach().float().requires_grad_()
    of = [
        grad(
            functional.layer_norm(s, s.shape[1:]).pow(3).sum(),
            s,
            create_graph=True,
        )[0]
        .square()
        .sum()
        for s in (small, small32)
    ]
    assert_close(
        grad(of[1], small32)[0].double(), grad(of[0], small)[0], tolerance=1e-3
    )


def test_ones_where_they_pay_and_nowhere_else():
    x = draw((1024, 256))
    ones = cpu.unit_weight(x, [256])
    assert torch.equal(ones, torch.ones(256))
    assert cpu.unit_weight(x, (1024, 256)).shape == (1024, 256)
    assert cpu.unit_weight(x, [255]) is None
    assert cpu.unit_weight(x, []) is None
    assert cpu.unit_weight(x[:9], [256]) is None
    assert cpu.unit_weight(x.double(), [256]) is None
    assert cpu.unit_weight(x.bfloat16(), [256]) is None
    assert cpu.unit_weight(x.as_subclass(Special), [256]) is None
    with torch.autocast("cpu"):
        assert cpu.unit_weight(x, [256]) is None


def test_ones_made_in_inference_mode_serve_training():
    x = draw((512, 131))
    with torch.inference_mode():
        functional.layer_norm(x, (131,))
    x.requires_grad_()
    functional.layer_norm(x, (131,)).sum().backward()
    assert x.grad is not None


def test_a_forced_backend_is_not_given_ones():
    x = draw((1024, 256))
    with normlib.use_backend("eager"):
        y = functional.layer_norm(x, (256,))
    assert_close(y, functional.layer_norm(x, (256,)), tolerance=1e-5)


def test_a_wrong_shape_is_refused_as_ever():
    x = draw((1024, 256))
    for wrong in ([255], [1024], []):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            functional.layer_norm(x, wrong)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(64, 8), (16384, 8)])
def test_a_number_in_place_of_a_shape_is_refused_in_torchs_words(
    shape, weighted
):
    weight = torch.ones(8) if weighted else None
    with pytest.raises(TypeError, match="must be tuple of ints, not int"):
        functional.layer_norm(draw(shape), 8, weight)
