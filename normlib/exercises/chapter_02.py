"""Checks of chapter 2: batch normalization, forward, backward and ported."""

import numpy
import torch

import normlib
from normlib import reference
from normlib.exercises import exercise
from normlib.exercises.compare import array, has_keys, says, unpacked
from normlib.functional import batch_normalization, moments

_EPS = (1e-5, 1e-2, 0.5)


@exercise(
    "ch2-repair",
    "Each of the four lines has a slip. Which mean belongs in the first "
    "two, and does the first even give a mean?",
    "What does the normalized column's standard deviation have to be, and "
    "which power of the variance gives that? Then ask what gamma scales.",
)
def repair(answer) -> None:
    """Batch norm of (m, units), from a misprinted page."""
    rng = numpy.random.default_rng(0)
    for eps in _EPS:
        x = rng.normal(4.0, [0.3, 1.0, 5.0], size=(9, 3))
        weight, bias = rng.uniform(0.5, 2, 3), rng.normal(size=3)
        wanted, _ = reference.batch_norm(x, weight, bias, eps)
        given = x.copy()
        got = array(answer(given, weight, bias, eps), x.shape)
        assert (given == x).all(), "it changed its input"
        says("mean of the output", got.mean(0), wanted.mean(0), "the bias")
        says("standard deviation", got.std(0), wanted.std(0), f"eps={eps}")
        says("output", got, wanted, f"eps={eps}")


@exercise(
    "ch2-channels-last",
    "All values with the same last index share a mean: average over the "
    "other three axes.",
    "With the channels last, arrays of shape (C,) broadcast as they are.",
)
def channels_last(answer) -> None:
    """Batch norm of (N, H, W, C)."""
    rng = numpy.random.default_rng(1)
    for shape in ((4, 3, 3, 2), (3, 5, 2, 4), (2, 4, 4, 4)):
        x = rng.normal(1.0, 3.0, size=shape)
        c = shape[-1]
        weight, bias = rng.uniform(0.5, 2, c), rng.normal(size=c)
        first = numpy.moveaxis(x, -1, 1)
        wanted, _ = reference.batch_norm(first, weight, bias, 1e-3)
        wanted = numpy.moveaxis(wanted, 1, -1)
        got = array(answer(x, weight, bias, 1e-3), shape)
        says("output", got, wanted, f"shape {shape}")


def _suspect(keeps_mean: bool, keeps_slope: bool):
    """A backward that passes through the mean, and through the variance."""

    def backward(dy, x, weight, eps):
        rstd = 1 / numpy.sqrt(x.var(0) + eps)
        xhat = (x - x.mean(0)) * rstd
        g = dy * weight
        mean = g.mean(0) if keeps_mean else 0.0
        slope = (g * xhat).mean(0) if keeps_slope else 0.0
        return rstd * (g - mean - xhat * slope)

    return backward


SUSPECTS = {
    "A": _suspect(True, False),
    "B": _suspect(False, False),
    "C": _suspect(True, True),
    "D": _suspect(False, True),
}
"""Four backwards ``(dy, x, weight, eps) -> dx``, one of them right."""


@exercise(
    "ch2-fingerprints",
    "For each suspect compute dx.sum(0) and (dx * xhat).sum(0) with a random "
    "dy. Compare with the table in the section on fingerprints.",
    "If the sum of dx is not 0 the mean was taken as a constant; if the sum "
    "of dx * xhat is not 0 the variance was.",
)
def fingerprints(answer) -> None:
    """Which statistics each suspect takes as constant, by its sums."""
    has_keys(answer, SUSPECTS)
    wrong = [name for name in SUSPECTS if answer[name] != _verdict(name)]
    assert not wrong, f"{4 - len(wrong)} of 4 are right"


def _verdict(name: str) -> str:
    rng = numpy.random.default_rng(2)
    dy, x = rng.normal(size=(2, 8, 2))
    dx = SUSPECTS[name](dy, x, numpy.ones(2), 1e-9)
    xhat, _ = reference.batch_norm(x, eps=1e-9)
    clean = [numpy.abs(s.sum(0)).max() < 1e-6 for s in (dx, dx * xhat)]
    return {
        (True, True): "right",
        (False, True): "mean",
        (True, False): "variance",
        (False, False): "both",
    }[tuple(map(bool, clean))]


@exercise(
    "ch2-mean-only",
    "The graph has only x, mean, y: x has two arrows, and the mean one, with "
    "slope -1 into every row.",
    "Only a shift of the whole column goes unnoticed, so the projection "
    "removes only the component along (1, ..., 1).",
)
def mean_only(answer) -> None:
    """Backward of y = weight * (x - mean) + bias."""
    rng = numpy.random.default_rng(3)
    for m in (2, 7):
        x, dy = rng.normal(2.0, 3.0, size=(2, m, 3))
        weight = rng.uniform(0.5, 2, 3)
        names = "dx", "dweight", "dbias"
        got = unpacked(answer(dy, x, weight), *names)
        g, centered = dy * weight, x - x.mean(0)
        wanted = (g - g.mean(0), (dy * centered).sum(0), dy.sum(0))
        for name, mine, right in zip(names, got, wanted, strict=True):
            says(name, array(mine, right.shape), right, f"m={m}")


@exercise(
    "ch2-running",
    "new average = momentum * old average + (1 - momentum) * this batch's "
    "value, for the mean and for the variance, and in training only.",
    "The batch's own moments normalize in training; the averages do "
    "otherwise. batch_normalization takes the offset before the scale.",
)
def running(answer) -> None:
    """The TensorFlow recipe with averages and a switch."""
    generator = torch.Generator().manual_seed(4)
    layer = answer(3, momentum=0.8)
    scale, offset = layer.scale, layer.offset
    mean, variance = torch.zeros(3), torch.ones(3)
    for step in range(3):
        s1 = 4 * torch.randn(5, 3, generator=generator) + 2
        out = layer(s1, training=True)
        batch = moments(s1, [0])
        wanted = batch_normalization(s1, *batch, offset, scale, 1e-3)
        says("output in training", array(out, (5, 3)), wanted, f"call {step}")
        mean = 0.8 * mean + 0.2 * batch[0]
        variance = 0.8 * variance + 0.2 * batch[1]
        for name, right in (
            ("moving_mean", mean),
            ("moving_variance", variance),
        ):
            got = array(getattr(layer, name), (3,))
            says(name, got, right, f"after {step + 1} training calls")
    assert layer.scale is scale, "scale was made anew by a call"
    assert layer.offset is offset, "offset was made anew by a call"
    one = torch.tensor([[1.0, -2.0, 30.0]])
    wanted = batch_normalization(one, mean, variance, offset, scale, 1e-3)
    out = layer(one, training=False)
    says("output for one example", array(out, (1, 3)), wanted, "evaluation")
    got = array(layer.moving_mean, (3,))
    says("moving_mean", got, mean, "after a call with training=False")


@exercise(
    "ch2-keras",
    "eps is carried over as it is. momentum is the weight of the old average "
    "in Keras and of the new batch in PyTorch.",
    "Copy gamma, beta, moving_mean and moving_variance into weight, bias, "
    "running_mean and running_var of a layer made with .double().",
)
def keras(answer) -> None:
    """A Keras layer's settings and arrays as a BatchNorm2d."""
    rng = numpy.random.default_rng(5)
    for momentum, eps in ((0.99, 1e-3), (0.9, 1e-2)):
        config = {
            "epsilon": eps,
            "momentum": momentum,
            "gamma": rng.uniform(0.5, 2, 4),
            "beta": rng.normal(size=4),
            "moving_mean": rng.normal(size=4),
            "moving_variance": rng.uniform(0.001, 0.1, 4),
        }
        layer = answer(dict(config))
        assert isinstance(layer, normlib.BatchNorm2d), (
            f"expected a normlib.BatchNorm2d, got {type(layer).__name__}"
        )
        x = rng.normal(size=(3, 4, 2, 2))
        stats = (config["moving_mean"], config["moving_variance"])
        mean, var = (s.reshape(4, 1, 1) for s in stats)
        gamma, beta = (config[k].reshape(4, 1, 1) for k in ("gamma", "beta"))
        wanted = (x - mean) / numpy.sqrt(var + eps) * gamma + beta
        out = layer.eval()(torch.tensor(x))
        says("output in evaluation", array(out, x.shape), wanted, f"{eps=}")
        layer.train()(torch.tensor(x))
        batch = x.mean((0, 2, 3))
        wanted = momentum * config["moving_mean"] + (1 - momentum) * batch
        got = array(layer.running_mean, (4,))
        says("running mean after a batch", got, wanted, f"{momentum=}")
