"""The oracle against finite differences and against torch."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, draw

from normlib import reference
from normlib.axes import channel_view
from normlib.testing import assert_close


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def arrays(case):
    return [p if p is None else p.numpy() for p in draw(case)]


def test_forward_and_backward_equal_torch(case):
    x, weight, bias, dy = draw(case)
    y, cache = case.reference(x.numpy(), weight.numpy(), bias, 1e-5)
    gradients = reference.normalize_backward(dy.numpy(), cache)
    leaves = [p.requires_grad_() for p in (x, weight, bias) if p is not None]
    theirs = case.of(F, x, weight, bias, 1e-5)
    theirs.backward(dy)
    assert_close(y, theirs)
    for ours, leaf in zip(gradients, leaves, strict=False):
        assert_close(ours.reshape(leaf.shape), leaf.grad)


def test_backward_is_the_slope_of_the_forward(case):
    x, weight, bias, dy = arrays(case)

    def loss(x, weight, bias):
        return float((case.reference(x, weight, bias, 1e-3)[0] * dy).sum())

    _, cache = case.reference(x, weight, bias, 1e-3)
    gradients = reference.normalize_backward(dy, cache)
    parameters = [x, weight, bias]
    for i, gradient in enumerate(gradients):
        if parameters[i] is None:
            continue
        direction = numpy.random.default_rng(i).normal(
            size=parameters[i].shape
        )
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(parameters)
            moved[i] = parameters[i] + step * direction
            ends.append(loss(*moved))
        slope = (ends[0] - ends[1]) / 2e-5
        ours = (gradient.reshape(direction.shape) * direction).sum()
        assert_close(ours, slope, tolerance=1e-7)


def test_each_norm_is_normalize_over_its_view(case):
    x, weight, bias, _ = arrays(case)
    y, _ = reference.normalize(x, case.view, weight, bias, 1e-5, **case.kind)
    assert_close(y, case.reference(x, weight, bias, 1e-5)[0], tolerance=0)


def test_the_gradient_through_a_centered_norm_has_two_fingerprints(case):
    """dx sums to zero, and is orthogonal to xhat, where eps is zero."""
    if case.view.count(case.kind["over_batch"]) == 1:
        pytest.skip("one value a statistic: xhat is 0 / 0 without eps")
    x, weight, bias, dy = arrays(case)
    _, cache = case.reference(x, weight, bias, 0.0)
    dx, _, _ = reference.normalize_backward(dy, cache)
    dx = dx.reshape(case.view)
    sums = (0, 2, 3) if case.kind["over_batch"] else (2, 3)
    assert_close((dx * cache.xhat).sum(sums), numpy.zeros(dx.sum(sums).shape))
    if case.kind["centered"]:
        assert_close(dx.sum(sums), numpy.zeros(dx.sum(sums).shape))


def test_it_never_imports_torch():
    assert not any(value is torch for value in vars(reference).values())


def test_a_constant_channel_becomes_the_bias():
    y, _ = reference.batch_norm(numpy.full((4, 2), 7.0), bias=[1.0, -2.0])
    assert_close(y, numpy.tile([1.0, -2.0], (4, 1)))


def test_weights_must_fit_the_view():
    with pytest.raises(ValueError, match="reshape"):
        reference.normalize(
            numpy.zeros((2, 6)), channel_view((2, 6)), numpy.ones(5)
        )


def test_a_negative_eps_is_refused():
    with pytest.raises(ValueError, match=r"-0\.5"):
        reference.batch_norm(numpy.zeros((2, 6)), eps=-0.5)


def test_a_view_must_hold_the_values():
    with pytest.raises(ValueError, match="size 10"):
        reference.normalize(numpy.zeros((2, 5)), channel_view((2, 6)))
